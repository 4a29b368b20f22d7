"""One Parquet file of teacher outputs, whoever wrote it, read and checked."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from keras_ptloss._binary import two_events
from keras_ptloss._checks import SUM_TOLERANCE
from keras_ptloss.soft_labels._ask import invalid_row
from keras_ptloss.soft_labels._names import shorten
from keras_ptloss.soft_labels._numbers import ROUNDING
from keras_ptloss.soft_labels._parquet import (
    DENSE,
    KEY,
    TOP,
    group_rows,
    plain_ids,
    read_batches,
    read_metadata,
)
from keras_ptloss.soft_labels._spec import (
    SoftLabelSpec,
    encode_measured,
    encode_top_k,
)
from keras_ptloss.soft_labels._store import is_of_the_machine

_IDS = ("id", "custom_id")


class ParquetFile:
    """A Parquet file; what goes wrong in it names it."""

    def __init__(self, pa: Any, path: Path, verify: bool) -> None:
        self._pa, self.path = pa, path
        try:
            self._file = pa.parquet.ParquetFile(
                path, page_checksum_verification=verify
            )
            self.schema = self._file.schema_arrow
            self.rows = self._file.metadata.num_rows
            self.metadata = read_metadata((self.schema.metadata or {}).get(KEY))
        except FileNotFoundError:
            raise
        except Exception as error:
            if is_of_the_machine(error):
                raise
            # Damaged footers make pyarrow raise what its parsers raise.
            self.fail(f"is unreadable ({error})")
        kinds = [n for n in (*DENSE, TOP[0]) if n in self.schema.names]
        if len(kinds) != 1 or (kinds == [TOP[0]]) != (
            TOP[1] in self.schema.names
        ):
            self.fail(
                f"has the columns {shorten(self.schema.names)}: it must have"
                f" one of {shorten(DENSE)}, or {shorten(TOP)}"
            )
        (self.kind,) = kinds

    def fail(self, problem: str) -> NoReturn:
        """Raise the error for this file."""
        raise ValueError(
            "`path` must be intact Parquet files of one distribution a row."
            f" Received: {self.path}, which {problem}"
        )

    def _refuse(
        self, wrong: Any, first: int, what: str, values: Any = None
    ) -> None:
        """Fail for the first row that is wrong, and its first wrong value."""
        if wrong.any():
            row = np.argmax(wrong.reshape(len(wrong), -1).any(-1))
            value = (wrong if values is None else values)[wrong][0]
            self.fail(f"has {what.format(value)} in row {first + row}")

    @property
    def is_half(self) -> bool:
        kind = self.schema.field(self.kind).type
        # Ray writes arrays as an extension type of its own, known where Ray is.
        kind = getattr(kind, "storage_type", kind)
        inner = getattr(kind, "value_type", kind)
        return bool(self._pa.types.is_float16(inner))

    @property
    def other_columns(self) -> set[str]:
        read = {*DENSE, *TOP, "log_tail", "fingerprint", *_IDS}
        return set(self.schema.names) - read

    def key(self, by: str) -> str:
        """The column that names the example."""
        wanted = ("fingerprint",) if by == "fingerprint" else _IDS
        found = [name for name in wanted if name in self.schema.names]
        if not found:
            has = [n for n in ("fingerprint", *_IDS) if n in self.schema.names]
            hint = {
                "fingerprint": " (fingerprints are those of"
                " soft_labels.fingerprint; rows with ids are imported by"
                " import_soft_labels(..., ids=...))",
                "id": " (without `ids`, rows are found by their fingerprint)",
            }[by]
            self.fail(
                f"has no column {shorten(wanted)} but {shorten(has)}{hint}"
            )
        return found[0]

    def width(self) -> int:
        """How many numbers a list has."""
        for batch in read_batches(self._file, 1, [self.kind], self.fail):
            if len(batch):
                return int(self._lists(batch, self.kind, 0).shape[1])
        self.fail("has no rows")

    def parts(
        self, key: str, spec: SoftLabelSpec, num_classes: int, width: int
    ) -> Iterator[tuple[Any, dict[str, Any], Any, Any]]:
        """Yield keys, encoded arrays, distances and what was renormalised."""
        columns = [key, *(TOP if self.kind == TOP[0] else (self.kind,))]
        if self.kind == TOP[0] and "log_tail" in self.schema.names:
            columns.append("log_tail")
        row, size = 0, group_rows(width)
        for batch in read_batches(self._file, size, columns, self.fail):
            if not len(batch):
                continue
            keys = self._keys(batch.column(key), key, row)
            if self.kind == TOP[0]:
                arrays, distance = self._top(batch, spec, num_classes, row)
                renormalised = np.zeros(len(batch), bool)
            else:
                values = self._lists(batch, self.kind, row, width)
                values = self._rows(values, row)
                arrays, distance = encode_measured(spec, values)
                off = np.abs(values.sum(-1) - 1) > ROUNDING
                renormalised = off & (self.kind != "logits")
            yield keys, arrays, distance, renormalised
            row += len(batch)
        if row != self.rows:
            self.fail(f"has {row} rows where its footer says {self.rows}")

    def _lists(
        self, batch: Any, name: str, first: int, width: int | None = None
    ) -> Any:
        """The lists of a column as `(n, width)` float64 or int64."""
        pa, column = self._pa, batch.column(name)
        if isinstance(column.type, pa.BaseExtensionType):
            column = column.storage
        self._refuse(column.is_null().to_numpy(False), first, f"no {name}")
        if not hasattr(column.type, "value_type"):
            self.fail(f"has {column.type}, not lists, in the column {name}")
        lengths = pa.compute.list_value_length(column).to_numpy(False)
        width = int(lengths[0]) if width is None else width
        other = np.flatnonzero(lengths != width)
        if len(other) or not width:
            row = other[0] if len(other) else 0
            self.fail(
                f"has {lengths[row]} numbers in row {first + row} of the column"
                f" {name}, not {width or 'one or more'}"
            )
        values = column.flatten()
        whole = name == TOP[0]
        right = pa.types.is_integer if whole else pa.types.is_floating
        if not right(values.type):
            wanted = "integers" if whole else "floats"
            self.fail(f"has {values.type}, not {wanted}, in the column {name}")
        if values.null_count:
            nulls = values.is_null().to_numpy(False).reshape(-1, width)
            self._refuse(nulls, first, "a null")
        numbers = values.to_numpy(zero_copy_only=False)
        dtype = "int64" if whole else "float64"
        return numbers.astype(dtype).reshape(-1, width)

    def _rows(self, values: Any, first: int) -> Any:
        """Check rows of C numbers; return probabilities or logits."""
        logits = self.kind == "logits"
        if self.kind == "log_probabilities":
            self._check_logs(values, first)
            values = np.exp(values)
        if values.shape[1] == 1:
            values = two_events(values, from_logits=logits)
        found = invalid_row(values, logits)
        if found is not None:
            self.fail(f"has {found[1]} in row {first + found[0]}")
        return values

    def _check_logs(self, values: Any, first: int) -> None:
        wrong = np.isnan(values) | (values > ROUNDING)
        self._refuse(wrong, first, "a log-probability of {}", values)

    def _top(
        self, batch: Any, spec: SoftLabelSpec, num_classes: int, first: int
    ) -> tuple[dict[str, Any], Any]:
        """Check the k largest and encode them, without their full rows."""
        k = spec.top_k
        ids = self._lists(batch, TOP[0], first, k)
        logs = self._lists(batch, TOP[1], first, k)
        self._check_logs(logs, first)
        order = np.sort(ids, axis=-1)
        for wrong, what in (
            ((ids < 0) | (ids >= num_classes), f"no class of {num_classes}"),
            (order[:, 1:] == order[:, :-1], "a class twice"),
        ):
            rows = np.flatnonzero(wrong.any(-1))
            if len(rows):
                found = ids[rows[0]].tolist()
                self.fail(f"has {what} in row {first + rows[0]}, {found}")
        mass = np.exp(logs).sum(-1)
        over = mass > 1 + SUM_TOLERANCE
        self._refuse(over, first, "probabilities that add up to {:.6g}", mass)
        if "log_tail" in batch.schema.names:
            tail = batch.column("log_tail").to_numpy(zero_copy_only=False)
            tail = tail.astype("float64")
            self._check_logs(tail[:, None], first)
            whole = mass + np.exp(tail)
            off = np.abs(whole - 1) > SUM_TOLERANCE
            what = "probabilities that with their tail add up to {:.6g}"
            self._refuse(off, first, what, whole)
        else:
            with np.errstate(divide="ignore"):
                tail = np.log(np.maximum(1 - mass, 0))
        given = {"classes": ids, "log_values": logs, "log_tail": tail}
        return encode_top_k(spec, num_classes, given)

    def _keys(self, column: Any, name: str, first: int) -> Any:
        """Fingerprints `(n,)` uint64, or ids as texts."""
        pa, kinds = self._pa, self._pa.types
        self._refuse(column.is_null().to_numpy(False), first, f"no {name}")
        if name != "fingerprint":
            ids = plain_ids(pa, column)
            if ids is None:
                self.fail(f"has ids of {column.type}, not integers or texts")
            return np.array(ids.cast(pa.string()).to_pylist(), dtype=object)
        if kinds.is_dictionary(column.type):
            column = column.dictionary_decode()
        kind = column.type
        if kinds.is_int64(kind):
            # Of tools without unsigned integers: the same 64 bits.
            return column.to_numpy(zero_copy_only=False).view("uint64")
        if kinds.is_decimal(kind) and kind.scale == 0:
            column = column.cast(pa.uint64())
        elif not kinds.is_uint64(kind):
            self.fail(f"has fingerprints of {kind}, not uint64")
        return column.to_numpy(zero_copy_only=False)
