"""Soft labels in Parquet files: what the columns hold, and their writing.

    fingerprint, or id      which example the row is of
    probabilities           lists of C numbers, or
    log_probabilities       natural logarithms of them, or
    logits                  where the teacher gives these, or
    top_ids, top_log_probabilities, log_tail
                            lists of k classes; log of the mass of the others

Each file's schema carries the store's spec as JSON. Rows have no order: they
are found by what names their example. Pages have checksums; those of whole
files, whose footers Parquet leaves without, are in `_checksums.json`.
"""

import contextlib
import dataclasses
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from keras_ptloss._checks import check_choice, check_count, check_real, fail
from keras_ptloss.soft_labels._names import shorten
from keras_ptloss.soft_labels._numbers import ROUNDING
from keras_ptloss.soft_labels._spec import (
    SoftLabelSpec,
    decode,
    probabilities_of,
    read_spec,
    top_k_of,
)
from keras_ptloss.soft_labels._store import checksum, is_of_the_machine

# Key of the spec in a file's metadata, and its format.
KEY = b"keras_ptloss.soft_labels"
FORMAT = "keras_ptloss.soft_labels.parquet/1"
CHECKSUMS = "_checksums.json"
DENSE = ("probabilities", "log_probabilities", "logits")
TOP = ("top_ids", "top_log_probabilities")
# Rows in a row group, which are also read and written at a time; fewer where
# there are many classes.
_GROUP = 1 << 16
_GROUP_NUMBERS = 1 << 21


def import_pyarrow() -> Any:
    """Return `pyarrow` with what is used of it loaded; it is an extra."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "Parquet needs pyarrow: pip install 'keras_ptloss[parquet]'"
        ) from error
    return pyarrow


def read_batches(
    file: Any, size: int, columns: list[str], fail: Callable[[str], NoReturn]
) -> Iterator[Any]:
    """Yield a Parquet file's batches; `fail` says what is damaged."""
    try:
        yield from file.iter_batches(size, columns=columns)
    except (OSError, import_pyarrow().ArrowException) as error:
        if is_of_the_machine(error):
            raise
        fail(f"is damaged ({error})")


def read_metadata(stored: bytes | None) -> dict[str, Any] | None:
    """The JSON record of a file of ours; None of others.

    Raises:
        ValueError: If it is damaged or of another format.
    """
    if stored is None:
        return None
    try:
        values: dict[str, Any] = json.loads(stored)
        check_choice("format", values["format"], (FORMAT,))
        read_spec(SoftLabelSpec, values["spec"])
        check_count("num_classes", values["num_classes"], at_least=2)
        check_count("rows", values["rows"], at_least=0)
        for name in ("sum", "max"):
            error = check_real(
                name, values["total_variation"][name], "a number"
            )
            if not 0 <= error < float("inf"):
                fail(name, "a finite number of at least 0", error)
    except (ValueError, TypeError, KeyError, RecursionError) as problem:
        raise ValueError(f"its metadata are wrong: {problem!r}") from problem
    return values


def check_files(files: list[Path]) -> None:
    """Compare the checksums of whole files, where the directory has them.

    Raises:
        ValueError: If a file differs; names it.
    """
    for folder in {path.parent for path in files}:
        record = folder / CHECKSUMS
        if not record.exists():
            continue
        try:
            known = json.loads(record.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            fail("path", f"JSON ({error})", str(record))
        if not isinstance(known, dict):
            wanted = "an object of JSON, from file to checksum"
            fail("path", wanted, str(record))
        for path in files:
            mine = path.parent == folder
            if mine and known.get(path.name) != checksum(path):
                fail(
                    "path",
                    "an intact file, but its checksum is not that in"
                    f" {CHECKSUMS} (delete that if the file is meant to"
                    " differ)",
                    str(path),
                )


def group_rows(width: int) -> int:
    """How many rows of so many numbers are handled at a time."""
    return max(1, min(_GROUP, _GROUP_NUMBERS // max(width, 1)))


def first_of_each(
    keys: Any, spec: SoftLabelSpec, num_classes: int, read: Any, where: str
) -> Any:
    """Return the first row of each key, in order; the others must be equal.

    Args:
        keys: `(N,)` fingerprints or ids.
        spec: Of the rows.
        num_classes: C.
        read: Returns the stored arrays of an array of rows.
        where: What holds them, for errors.

    Raises:
        ValueError: If rows of one example differ by more than 0.001.
    """
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(keys)))
    step = group_rows(num_classes)
    for low in range(0, len(again), step):
        rows = again[low : low + step]
        ones, others = (
            probabilities_of(
                decode(spec, read(part), num_classes), spec.from_logits
            )
            for part in (first[inverse[rows]], rows)
        )
        apart = np.flatnonzero(np.abs(ones - others).max(-1) > ROUNDING)
        if len(apart):
            names = shorten(str(keys[row]) for row in rows[apart])
            raise ValueError(
                "Rows of one example must be equal (to 0.001 in each"
                f" probability). Received: {where}, with rows that contradict"
                f" each other of {names}"
            )
    return np.sort(first)


def write_parquet(
    labels: Any, directory: Path, *, ids: Any, rows_per_file: int
) -> int:
    """Write the rows to a new directory; see `SoftLabels.to_parquet`."""
    pa = import_pyarrow()
    rows = np.arange(len(labels))
    names = None
    if ids is None:
        rows = first_of_each(
            labels.fingerprints,
            labels.spec,
            labels.shape[1],
            labels.stored,
            str(labels.path),
        )
    else:
        names = _id_column(pa, ids, len(labels))
    values = {
        "format": FORMAT,
        "spec": dataclasses.asdict(labels.spec),
        "num_classes": labels.shape[1],
        "rows": len(rows),
        "total_variation": {
            "sum": labels.mean_total_variation * len(rows),
            "max": labels.max_total_variation,
        },
    }
    step = group_rows(labels.spec.top_k or labels.shape[1])
    schema = _table(pa, labels, rows[:1], names).schema
    schema = schema.with_metadata({KEY: json.dumps(values).encode()})
    with new_directory(directory) as folder:
        for number, low in enumerate(range(0, len(rows), rows_per_file)):
            part = rows[low : low + rows_per_file]
            path = folder / f"part-{number:05d}.parquet"
            with _writer(pa, path, schema) as writer:
                for i in range(0, len(part), step):
                    group = _table(pa, labels, part[i : i + step], names)
                    writer.write_table(group.cast(schema))
        record = {path.name: checksum(path) for path in folder.iterdir()}
        (folder / CHECKSUMS).write_text(json.dumps(record, indent=1), "utf-8")
    return len(rows)


def _writer(pa: Any, path: Path, schema: Any) -> Any:
    # A float16 in float32 has two bytes of nearly nothing, which the splitting
    # of bytes lays together for the compression.
    floats = [
        f"{field.name}.list.element"
        for field in schema
        if pa.types.is_fixed_size_list(field.type)
        and pa.types.is_floating(field.type.value_type)
    ]
    return pa.parquet.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=False,
        use_byte_stream_split=floats,
        write_page_checksum=True,
    )


def _table(pa: Any, labels: Any, rows: Any, names: Any) -> Any:
    stored = labels.stored(rows)
    columns = {"fingerprint": pa.array(labels.fingerprints[rows])}
    if names is not None:
        columns["id"] = names.take(pa.array(rows))
    if labels.spec.top_k is None:
        name = "logits" if labels.from_logits else "probabilities"
        columns[name] = fixed_size_lists(pa, stored["labels"], "float32")
    else:
        classes, log_values, log_tail = top_k_of(stored)
        columns["top_ids"] = fixed_size_lists(pa, classes, "int32")
        columns["top_log_probabilities"] = fixed_size_lists(
            pa, log_values, "float32"
        )
        columns["log_tail"] = pa.array(log_tail)
    return pa.table(columns)


def fixed_size_lists(pa: Any, rows: Any, dtype: str) -> Any:
    """Rows `(n, width)` as an Arrow array that every reader understands."""
    flat = pa.array(np.ascontiguousarray(rows, dtype).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])


def _id_column(pa: Any, ids: Any, count: int) -> Any:
    try:
        # PyArrow 16 knows no UUIDs.
        names = [str(i) if isinstance(i, uuid.UUID) else i for i in ids]
        large = any(isinstance(i, int) and i >= 1 << 63 for i in names)
        column = pa.array(names, pa.uint64() if large else None)
    except (ValueError, TypeError, OverflowError) as error:
        fail("ids", f"integers or texts of one kind ({error})", ids)
    if len(column) != count or column.null_count:
        fail("ids", f"{count} ids, one a row", f"{len(column)} ids")
    found = plain_ids(pa, column)
    if found is None:
        fail("ids", "integers, texts or UUIDs", column.type)
    if len(found.unique()) != count:
        fail("ids", "different", f"{count - len(found.unique())} repeated")
    return found


def plain_ids(pa: Any, column: Any) -> Any:
    """Ids as Arrow integers or texts; None if they are of another kind."""
    kinds, column = pa.types, getattr(column, "storage", column)
    if kinds.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if kinds.is_fixed_size_binary(kind) and kind.byte_width == 16:
        names = (uuid.UUID(bytes=name) for name in column.to_pylist())
        return pa.array([str(name) for name in names])
    if kinds.is_large_string(kind) or kinds.is_string_view(kind):
        return column.cast(pa.string())
    return column if kinds.is_integer(kind) or kinds.is_string(kind) else None


@contextlib.contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """Make a directory that gets its name once all of it is on the disk.

    A process that is killed leaves `NAME.partial`, which the next one empties
    if there is nothing else in it.
    """
    import fcntl  # absent where stores can only be read

    _check_new(final)
    partial = final.with_name(final.name + ".partial")
    if partial.is_symlink() or partial.is_file():
        fail("directory", f"one without {partial} beside it", str(final))
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"{final} is being written by another process"
            ) from None
        _check_new(final)  # another process may just have finished
        try:
            _remove_own(partial, final)
            yield partial
            for path in partial.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            os.fsync(descriptor)
            partial.rename(final)
        except BaseException:
            with contextlib.suppress(OSError, ValueError):
                _remove_own(partial, final)
                partial.rmdir()
            raise
    finally:
        os.close(descriptor)


def _check_new(final: Path) -> None:
    if os.path.lexists(final):
        fail("directory", "a new directory", str(final))


def _remove_own(partial: Path, final: Path) -> None:
    """Remove what is written here, if there is nothing else."""
    found = list(partial.iterdir())
    foreign = [
        path.name
        for path in found
        if path.is_symlink()
        or not path.is_file()
        or not re.fullmatch(rf"part-\d{{5,}}\.parquet|{CHECKSUMS}", path.name)
    ]
    if foreign:
        fail(
            "directory",
            f"one beside which {partial} has no files of others:"
            f" {shorten(foreign)}",
            str(final),
        )
    for path in found:
        path.unlink()
