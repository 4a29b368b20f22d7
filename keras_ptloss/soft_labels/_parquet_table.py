"""Parquet files of teacher outputs as one table in memory."""

import dataclasses
import functools
import glob
import os
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_ptloss._checks import fail
from keras_ptloss.soft_labels._data import take
from keras_ptloss.soft_labels._parquet import (
    check_files,
    first_of_each,
    import_pyarrow,
)
from keras_ptloss.soft_labels._parquet_file import ParquetFile
from keras_ptloss.soft_labels._spec import SoftLabelSpec, read_spec


def find_files(source: str | os.PathLike[str]) -> list[Path] | None:
    """The Parquet files of a directory, a pattern or a file; None if no such.

    Files and folders whose names begin with `_` or `.` are other tools' notes.

    Raises:
        FileNotFoundError: If a pattern fits no file.
        ValueError: If folders of a directory have further files.
    """
    path = Path(source)
    if path.is_dir():
        every = [
            file
            for file in sorted(path.rglob("*.parquet"))
            if not any(p[0] in "_." for p in file.relative_to(path).parts)
        ]
        found = [file for file in every if file.parent == path]
        if found and len(found) < len(every):
            deeper = next(file for file in every if file.parent != path)
            wanted = "a directory without further Parquet files in its folders"
            fail("source", wanted, f"{path}, with {deeper.relative_to(path)}")
        return found or None
    if path.suffix != ".parquet":
        return None
    if path.is_file():
        return [path]
    found = sorted(
        Path(name) for name in glob.glob(str(source), recursive=True)
    )
    if not found:
        raise FileNotFoundError(f"No Parquet files at {source}")
    return found


@dataclasses.dataclass
class Table:
    """Rows as a store has them, in memory.

    Args:
        source: Where they are from, for errors.
        spec: Of the rows; `num_examples` is how many there are.
        num_classes: C.
        arrays: Of `N` rows, as `encode` gives them.
        keys: `(N,)` fingerprints, or ids as texts.
        distance: `(N,)` total variation from the rows in the files.
        renormalised: `(N,)` bool, whether they were divided by their sum.
        ignored: Columns that are not read, sorted.
        total_variation: Of the store that was exported; None if unknown.
        duplicates: How many rows were of an example that had one, and equal.
    """

    source: str
    spec: SoftLabelSpec
    num_classes: int
    arrays: dict[str, Any]
    keys: Any
    distance: Any
    renormalised: Any
    ignored: tuple[str, ...]
    total_variation: dict[str, float] | None = None
    duplicates: int = 0

    def without_duplicates(self) -> "Table":
        """Keep one row of each key."""
        kept = first_of_each(
            self.keys,
            self.spec,
            self.num_classes,
            functools.partial(take, self.arrays),
            self.source,
        )
        if len(kept) == len(self.keys):
            return self
        return dataclasses.replace(
            self,
            spec=dataclasses.replace(self.spec, num_examples=len(kept)),
            arrays=take(self.arrays, kept),
            keys=self.keys[kept],
            distance=self.distance[kept],
            renormalised=self.renormalised[kept],
            duplicates=len(self.keys) - len(kept),
        )


def read_table(
    files: list[Path],
    *,
    by: str,
    spec: SoftLabelSpec | None,
    verify: bool = True,
) -> Table:
    """Read all rows of files of one form.

    Args:
        files: The files, in any order.
        by: `"fingerprint"`, or `"id"` for a user's ids.
        spec: What the rows are to be stored as; by default that of the files.
        verify: Whether to compare checksums, where there are any.

    Raises:
        ValueError: If a file is damaged, has other columns, or a row that is
            none; the message names the file and the row.
    """
    pa = import_pyarrow()
    if verify:
        check_files(files)
    opened = [ParquetFile(pa, path, verify) for path in files]
    # Spark writes a partition without rows too.
    first = next((file for file in opened if file.rows), opened[0])
    for file in opened:
        if (file.kind, file.metadata) != (first.kind, first.metadata):
            file.fail(f"is of another form or store than {first.path}")
    total = sum(file.rows for file in opened)
    metadata = first.metadata
    source = str(first.path.parent if len(files) > 1 else first.path)
    if metadata and metadata["rows"] != total:
        fail(
            "path",
            f"a whole directory: {metadata['rows']} rows were written (or, of a"
            " part that is meant, written without the metadata that say so:"
            " `table.replace_schema_metadata()`)",
            f"{source}, with {total} rows in {len(files)} files",
        )
    if not total:
        fail("source", "Parquet files with at least one row", source)
    width = first.width()
    spec = _spec(first, spec, width, total)
    num_classes = _num_classes(first, spec, width)
    parts = [
        part
        for file in opened
        for part in file.parts(file.key(by), spec, num_classes, width)
    ]
    keys, arrays, distance, renormalised = keras.tree.map_structure(
        lambda *pieces: np.concatenate(pieces), *parts
    )
    return Table(
        source=source,
        spec=spec,
        num_classes=num_classes,
        arrays=arrays,
        keys=keys,
        distance=distance,
        renormalised=renormalised,
        ignored=tuple(sorted(set().union(*(f.other_columns for f in opened)))),
        # Of the exported store, which is another if the k largest are taken.
        total_variation=metadata["total_variation"]
        if metadata and metadata["spec"].get("top_k") == spec.top_k
        else None,
    ).without_duplicates()


def _spec(
    file: ParquetFile, spec: SoftLabelSpec | None, width: int, total: int
) -> SoftLabelSpec:
    """Complete the spec by what the files say."""
    logits = file.kind == "logits"
    if file.metadata:
        stored = read_spec(SoftLabelSpec, file.metadata["spec"])
        spec = _with_stored(stored, spec or SoftLabelSpec(), file.path)
    elif spec is None:
        dtype = "float16" if file.is_half else "float32"
        spec = SoftLabelSpec(from_logits=logits, dtype=dtype)
    if spec.from_logits != logits:
        fail(
            "from_logits",
            f"{logits}: the column of {file.path} is {file.kind!r}",
            spec.from_logits,
        )
    if file.kind == "top_ids":
        if spec.top_k not in (None, width):
            fail("top_k", f"None or the {width} of {file.path}", spec.top_k)
        spec = dataclasses.replace(spec, top_k=width)
    return dataclasses.replace(spec, num_examples=total)


def _with_stored(
    stored: SoftLabelSpec, spec: SoftLabelSpec, path: Path
) -> SoftLabelSpec:
    """Take what is left at its default from the files; refuse what differs.

    Only a dtype may, which can then be float32 alone, and loses nothing.
    """
    found = {}
    for field in dataclasses.fields(spec):
        name = field.name
        before, now = getattr(stored, name), getattr(spec, name)
        if now == field.default:
            found[name] = before
        elif before not in (None, now) and name not in (
            "dtype",
            "num_examples",
        ):
            fail(name, f"{before!r}, as {path} says", now)
    return dataclasses.replace(spec, **found)


def _num_classes(file: ParquetFile, spec: SoftLabelSpec, width: int) -> int:
    names = len(spec.class_names) if spec.class_names else None
    known = spec.num_classes or names
    if file.metadata:
        stored = int(file.metadata["num_classes"])
        if known not in (None, stored):
            file.fail(f"has {stored} classes, not {known}")
        known = stored
    if file.kind != "top_ids":
        found = max(width, 2)  # one column is a binary head
        if known not in (None, found):
            file.fail(f"has lists of {width} numbers, not {known}")
        known = found
    if known is None:
        fail(
            "num_classes",
            "given, as spec=SoftLabelSpec(num_classes=...): the k largest do"
            " not tell how many there are",
            None,
        )
    if spec.top_k is not None and spec.top_k >= known:
        fail("top_k", f"below the {known} classes", spec.top_k)
    return known


def open_table(
    files: list[Path], *, spec: SoftLabelSpec | None, verify: bool
) -> "MemoryShard":
    """Read files for `SoftLabels.open`."""
    table = read_table(files, by="fingerprint", spec=spec, verify=verify)
    if table.duplicates:
        warnings.warn(
            f"{table.source} has {table.duplicates} more rows than examples;"
            " those of one example are equal, and count once",
            stacklevel=3,
        )
    return MemoryShard(table)


class MemoryShard:
    """A `Table` in the place of a store's shard."""

    ordered = False
    start = 0

    def __init__(self, table: Table) -> None:
        self.stop, self.fingerprints = len(table.keys), table.keys
        self.read = functools.partial(take, table.arrays)
        self.manifest = {
            "spec": dataclasses.asdict(table.spec),
            "num_classes": table.num_classes,
            "total_variation": table.total_variation
            or {
                "sum": float(table.distance.sum()),
                "max": float(table.distance.max()),
            },
        }
