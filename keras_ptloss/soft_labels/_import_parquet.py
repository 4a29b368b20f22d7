"""Import of Parquet files: each example's row by fingerprint or id."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from keras_ptloss._checks import fail
from keras_ptloss.soft_labels import _data as data
from keras_ptloss.soft_labels._journal import at_once
from keras_ptloss.soft_labels._match import Contents
from keras_ptloss.soft_labels._names import shorten
from keras_ptloss.soft_labels._parquet_table import Table, read_table
from keras_ptloss.soft_labels._report import ImportReport
from keras_ptloss.soft_labels._soft_labels import SoftLabels
from keras_ptloss.soft_labels._spec import SoftLabelSpec, encode
from keras_ptloss.soft_labels._writer import ShardWriter

_BATCH = 4096


def import_parquet(
    files: list[Path],
    dataset: Any,
    path: Path,
    *,
    spec: SoftLabelSpec | None,
    uniform: bool,
    ids: list[str] | None,
) -> ImportReport:
    """Make a store of the rows; see `import_soft_labels`.

    Args:
        files: The Parquet files.
        dataset: What `as_dataset` returned.
        path: Directory of the store.
        spec: Of the store; by default that of the files.
        uniform: Whether examples without a row get a uniform one.
        ids: Of the examples, for a column of ids; None for fingerprints.
    """
    by = "fingerprint" if ids is None else "id"
    table = read_table(files, by=by, spec=spec)
    hashes = data.all_fingerprints(dataset)
    expected = spec.num_examples if spec else None
    if expected not in (None, len(hashes)):
        data.wrong_length(len(hashes), expected)
    if ids is not None and len(ids) != len(hashes):
        fail("ids", f"{len(hashes)} ids, one an example", f"{len(ids)} ids")
    wanted = hashes if ids is None else np.array(ids, dtype=object)
    rows = Contents(table.keys).nearest(wanted)
    found = table.keys[rows] == wanted
    names = ids or [f"example {row}" for row in range(len(hashes))]
    missing = tuple(names[row] for row in np.flatnonzero(~found))
    if missing and (not uniform or not found.any()):
        raise ValueError(
            f"`source` must hold a row of each of the {len(names)} examples"
            ' (or empty_rows="uniform"). Received:'
            f" {table.source}, whose {len(table.keys)} rows lack"
            f" {len(missing)}: {shorten(missing)}"
        )
    spec = dataclasses.replace(table.spec, num_examples=len(hashes))
    arrays = _with_uniform_row(table)
    distance = np.append(table.distance, 0.0)
    rows = np.where(found, rows, len(table.keys))
    with at_once(ShardWriter(path, spec, (0, 1))) as writer:
        for low in range(0, len(rows), _BATCH):
            some = slice(low, low + _BATCH)
            part = data.take(arrays, rows[some])
            off = distance[rows[some]]
            writer.append_encoded(hashes[some], part, table.num_classes, off)
        writer.finish()
    return ImportReport(
        labels=SoftLabels.open(path),
        filled=np.zeros(len(rows), bool),
        renormalised=np.append(table.renormalised, False)[rows],
        empty=~found,
        other=np.zeros(len(rows)),
        ignored=table.ignored,
        failed=missing,
        duplicates=table.duplicates,
        foreign=len(table.keys) - len(np.unique(rows[found])),
    )


def _with_uniform_row(table: Table) -> dict[str, Any]:
    """The arrays with one more row, for the examples that have none."""
    fill = 0.0 if table.spec.from_logits else 1 / table.num_classes
    row = encode(table.spec, np.full((1, table.num_classes), fill))
    return {
        name: np.concatenate([array, row[name]])
        for name, array in table.arrays.items()
    }
