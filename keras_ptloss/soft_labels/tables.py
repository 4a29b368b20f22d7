"""Read probabilities from CSV, JSON lines and Parquet files."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keras_ptloss._validation import fail, on_simplex
from keras_ptloss.soft_labels.outputs import pyarrow


class Table(NamedTuple):
    """Probabilities and ids, as read from files.

    Attributes:
        probabilities: `(N, C)` float64, in the order of the class names.
        ids: the ids of the rows, or None if the files have no ids.
    """

    probabilities: np.ndarray
    ids: list[Any] | None


def read_table(
    files: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    class_names: Sequence[str],
) -> Table:
    r"""Read probabilities from tables with one column for each class.

    Every class must have a column with exactly its name and no empty cells. In
    each row, the probabilities of the classes must sum to one within 1 %. Other
    columns are ignored.

    Args:
        files: one file or several: `.csv`, `.parquet`, or `.jsonl` with one
            JSON object per line.
        class_names: names of the classes, in the order that you want.

    Returns:
        A `Table`. Pass its probabilities to `SoftLabels.from_array`. The ids
        are those of the column `custom_id` or, without it, of `id`.

    Raises:
        ValueError: if a class has no column, if a cell is empty, or if a row
            does not sum to one.

    Example:
        >>> import pathlib
        >>> import tempfile
        >>> from keras_ptloss.soft_labels import read_table
        >>> file = pathlib.Path(tempfile.mkdtemp(), "answers.csv")
        >>> _ = file.write_text("id,no,yes,model\na,0.25,0.75,m\n")
        >>> table = read_table(file, ["yes", "no"])
        >>> print(table.probabilities, table.ids)
        [[0.75 0.25]] ['a']
    """
    if isinstance(files, (str, os.PathLike)):
        files = [files]
    rows: list[np.ndarray] = []
    ids: list[Any] = []
    for file in map(Path, files):
        table = _read(file, class_names)
        rows.append(_probabilities(table, file, class_names))
        for column in ("custom_id", "id"):
            if column in table.column_names and column not in class_names:
                ids += table.column(column).to_pylist()
                break
    probabilities = np.concatenate(rows)
    if ids and len(ids) != len(probabilities):
        fail("files", "files that all have ids, or none with ids", files)
    return Table(probabilities, ids or None)


def _read(file: Path, class_names: Sequence[str]) -> Any:
    """Return the Arrow table in a file."""
    pa = pyarrow()
    types = dict.fromkeys(class_names, pa.float64())
    if file.suffix == ".csv":
        from pyarrow import csv

        # If ids were read as numbers, they would lose leading zeros.
        types = {"custom_id": pa.string(), "id": pa.string()} | types
        options = csv.ConvertOptions(column_types=types)
        return csv.read_csv(file, convert_options=options)
    if file.suffix == ".jsonl":
        from pyarrow import json

        options = json.ParseOptions(explicit_schema=pa.schema(types.items()))
        return json.read_json(file, parse_options=options)
    if file.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(file)
    fail("files", "files named .csv, .jsonl or .parquet", str(file))


def _probabilities(
    table: Any, file: Path, class_names: Sequence[str]
) -> np.ndarray:
    """Check the classes' columns and return them as an array `(N, C)`."""
    where = f"Received: {file} with the columns {table.column_names}"
    # Arrow reads a key that is in no JSON line as a column of nulls.
    missing = [
        name
        for name in class_names
        if name not in table.column_names
        or (len(table) and table.column(name).null_count == len(table))
    ]
    if missing:
        raise ValueError(
            f"`files` must have a column for each of {list(class_names)}. The "
            f"columns {missing} are missing. {where}"
        )
    columns = [table.column(name).to_numpy() for name in class_names]
    found = np.stack(columns, axis=-1).astype("float64")
    empty = np.argwhere(np.isnan(found))
    if len(empty):
        row, column = empty[0]
        raise ValueError(
            "Every row must have a probability for every class. Received: an "
            f"empty cell in column {class_names[column]!r}, row {row} (counted "
            f"from 0) of {file}"
        )
    good = on_simplex(found)
    if not good.all():
        row = int(np.argmin(good))
        raise ValueError(
            "The classes' columns must be probabilities that sum to one. "
            "Name all classes, or divide each row by its sum. "
            f"{where}. Row {row} (counted from 0) is {found[row]}, which sums "
            f"to {found[row].sum():.6g}"
        )
    return found
