"""The Arrow schema of a store, and the way between arrays and its columns.

A store has rows of one of three kinds:

* `probabilities`: C probabilities for each example.
* `top_k`: the k likeliest classes of each example, their log-probabilities, and
  the log-probability of all other classes together.
* `tokens`: the same for each position of a sequence. Positions without an entry
  at the ends of a sequence are not stored; `start` is the first one stored.

In memory, the last two are events of shape `(..., k + 1, 2)`, as `TopKPTLoss`
takes them: ids and natural log-probabilities, the last entry with id -1 for all
other classes. An id of -2 means that there is no entry.
"""

import dataclasses
import json
from typing import Any, Literal, NamedTuple

import numpy as np

from keras_ptloss._validation import SUM_TOLERANCE, fail, on_simplex

REST = -1
NO_ENTRY = -2
ENTRIES = ("top_ids", "log_probs", "log_rest")

Kind = Literal["probabilities", "top_k", "tokens"]
# Columns by name. Tokens have an `offsets` array beside them: the positions of
# sequence i are those from `offsets[i]` to `offsets[i + 1]`.
Values = dict[str, Any]


def pyarrow() -> Any:
    """Import pyarrow, which is an optional dependency.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ImportError(
            "SoftLabels stores its rows in Arrow files, which requires "
            "pyarrow. Run `pip install pyarrow`."
        ) from error
    return pa


@dataclasses.dataclass(frozen=True)
class Layout:
    """What kind of rows a store has.

    Args:
        kind: kind of rows, see above.
        dtype: of probabilities and log-probabilities, `"float16"` or
            `"float32"`.
        num_classes: number of classes or of token ids; None if unknown.
        top_k: k, for `top_k` and `tokens`.
        class_names: names of the classes, in their order.
        teacher: a name or a fingerprint of the teacher.
        from_logits: whether the teacher gave logits; probabilities are stored
            of either.
        has_fingerprints: whether rows carry fingerprints of their inputs.
        has_ids: whether rows carry the user's ids.
    """

    kind: Kind
    dtype: str = "float16"
    num_classes: int | None = None
    top_k: int | None = None
    class_names: tuple[str, ...] | None = None
    teacher: str | None = None
    from_logits: bool = False
    has_fingerprints: bool = False
    has_ids: bool = False

    def __post_init__(self) -> None:
        """Check the user's choices; JSON had made a list of the tuple."""
        if self.dtype not in ("float16", "float32"):
            fail("dtype", "'float16' or 'float32'", self.dtype)
        if self.class_names is None:
            return
        names = tuple(self.class_names)
        object.__setattr__(self, "class_names", names)
        if len(set(names)) < len(names):
            fail("class_names", "unique names", names)
        if self.num_classes not in (None, len(names)):
            raise ValueError(
                "`class_names` must name every class of the teacher, in its "
                f"order. Received: {len(names)} class_names for "
                f"{self.num_classes} classes"
            )

    @classmethod
    def of_schema(cls, schema: Any) -> "Layout | None":
        """Return the layout that `schema` wrote; None if there is none."""
        found = (schema.metadata or {}).get(b"keras_ptloss")
        return None if found is None else cls(**json.loads(found))

    def schema(self) -> Any:
        """Return the Arrow schema, which carries this layout as JSON."""
        pa = pyarrow()
        floats = pa.float16() if self.dtype == "float16" else pa.float32()
        types = {"fingerprint": pa.uint64()} if self.has_fingerprints else {}
        if self.has_ids:
            types["id"] = pa.string()
        if self.kind == "probabilities":
            types["probabilities"] = pa.list_(floats, self.num_classes)
        else:
            entries = {
                "top_ids": pa.list_(pa.int32(), self.top_k),
                "log_probs": pa.list_(floats, self.top_k),
                "log_rest": floats,
            }
            if self.kind == "tokens":
                types["start"] = pa.int32()
                entries = {n: pa.list_(kind) for n, kind in entries.items()}
            types |= entries
        about = json.dumps(vars(self))
        return pa.schema(list(types.items()), {"keras_ptloss": about})

    def encode(
        self, values: Values, fingerprints: Any = None, ids: Any = None
    ) -> Any:
        """Return an Arrow record batch of some rows."""
        pa = pyarrow()
        schema = self.schema()
        columns = []
        for name, kind in zip(schema.names, schema.types, strict=True):
            if name == "fingerprint":
                columns.append(pa.array(fingerprints, kind))
            elif name == "id":
                columns.append(pa.array([str(i) for i in ids], kind))
            elif pa.types.is_list(kind):
                offsets = pa.array(values["offsets"], pa.int32())
                array = _as_arrow(values[name], kind.value_type)
                columns.append(
                    pa.ListArray.from_arrays(offsets, array, type=kind)
                )
            else:
                columns.append(_as_arrow(values[name], kind))
        return pa.record_batch(columns, schema=schema)


class Columns(NamedTuple):
    """Some rows, ready to be stored.

    Attributes:
        kind: kind of rows.
        num_classes: number of classes or of token ids; None if unknown.
        values: the columns by name.
    """

    kind: Kind
    num_classes: int | None
    values: Values

    def layout(self, **about: Any) -> Layout:
        """Return the layout of the rows, with further fields of it."""
        rows = self.kind == "probabilities"
        top_k = None if rows else self.values["top_ids"].shape[1]
        return Layout(
            self.kind, num_classes=self.num_classes, top_k=top_k, **about
        )


def _as_arrow(values: Any, kind: Any) -> Any:
    """Return an Arrow array of numbers, or of lists of k numbers."""
    pa = pyarrow()
    lists = pa.types.is_fixed_size_list(kind)
    numbers = kind.value_type if lists else kind
    with np.errstate(over="ignore"):  # below -65504, float16 has -inf
        flat = np.ascontiguousarray(values, numbers.to_pandas_dtype())
    array = pa.array(flat.reshape(-1), numbers)
    return (
        pa.FixedSizeListArray.from_arrays(array, type=kind) if lists else array
    )


def views(batch: Any) -> Values:
    """Return NumPy views of a record batch's columns; ids are copied."""
    pa = pyarrow()
    found: Values = {}
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        if pa.types.is_string(array.type):
            found[name] = array.to_numpy(zero_copy_only=False)
            continue
        if pa.types.is_list(array.type):
            offsets = array.offsets.to_numpy()
            found["offsets"] = offsets - offsets[0]  # of a slice
            array = array.flatten()
        if pa.types.is_fixed_size_list(array.type):
            k = array.type.list_size
            found[name] = array.flatten().to_numpy().reshape(-1, k)
        else:
            found[name] = array.to_numpy()
    return found


def from_outputs(
    outputs: np.ndarray, *, from_logits: bool, dtype: str, first: int = 0
) -> Values:
    """Return the column of outputs `(n, C)`: probabilities that sum to 1.

    Args:
        outputs: probabilities, or logits with `from_logits`.
        from_logits: whether they are logits.
        dtype: in which they will be stored.
        first: number of the first row, for errors.
    """
    rows = outputs.astype("float64")
    if from_logits:
        check_rows(np.isfinite(rows).all(-1), rows, first, "finite logits")
        rows = np.exp(rows - rows.max(-1, keepdims=True))
    else:
        check_rows(
            on_simplex(rows),
            rows,
            first,
            "probabilities: non-negative numbers that sum to 1. Give logits "
            "with from_logits=True, and divide percentages by 100",
        )
    rows /= rows.sum(-1, keepdims=True)
    rounded = rows.astype(dtype)
    check_rows(
        np.abs(rounded.sum(-1, dtype="float64") - 1) <= SUM_TOLERANCE,
        rows,
        first,
        f"large enough for {dtype}, which rounds these by more than 1 %. Say "
        "dtype='float32', or store the likeliest classes only (top_k)",
    )
    return {"probabilities": rounded}


def from_entries(
    top_ids: Any,
    log_probs: Any,
    log_rest: Any,
    num_classes: int | None,
    first: int,
) -> Values:
    """Return the columns of n rows of k entries each, after a check.

    Args:
        top_ids: classes or token ids, `(n, k)`; -2 where there is no entry.
        log_probs: their natural log-probabilities, `(n, k)`.
        log_rest: that of all other ids, `(n,)`; None for what the entries
            leave of 1.
        num_classes: number of ids; None if unknown.
        first: number of the first row, for errors.
    """
    top_ids, log_probs = np.asarray(top_ids), np.asarray(log_probs, "float64")
    if top_ids.shape != log_probs.shape or top_ids.ndim != 2:
        raise ValueError(
            "`top_ids` and `log_probs` must have the same shape, with k "
            "entries on the last axis. Received: shapes {top_ids.shape} and "
            f"{log_probs.shape}"
        )
    known = top_ids >= 0
    largest = np.iinfo("int32").max if num_classes is None else num_classes - 1
    fits = (top_ids == NO_ENTRY) | (known & (top_ids <= largest))
    expected = f"ids from 0 to {largest}, or -2 where there is no entry"
    check_rows(fits.all(-1), top_ids, first, expected)
    # Entries come first, so that `top_ids[:, 0]` tells whether there is one.
    order = np.argsort(~known, axis=-1, kind="stable")
    top_ids, log_probs, known = (
        np.take_along_axis(a, order, -1) for a in (top_ids, log_probs, known)
    )
    filled = np.where(known, top_ids, -2 - np.arange(top_ids.shape[1]))
    differ = (np.diff(np.sort(filled)) > 0).all(-1)
    check_rows(differ, top_ids, first, "ids that all differ")
    log_probs = np.where(known, log_probs, -np.inf)
    given = np.exp(log_probs).sum(-1)
    if log_rest is None:
        with np.errstate(divide="ignore"):
            log_rest = np.log(np.maximum(1.0 - given, 0.0))
    total = given + np.exp(np.asarray(log_rest, "float64"))
    empty = ~known[:, 0]
    check_rows(
        empty | (np.abs(total - 1) <= SUM_TOLERANCE),
        log_probs,
        first,
        "probabilities that sum to 1, of which the likeliest and the rest are "
        "stored as logarithms. Give logits with from_logits=True",
    )
    log_total = np.log(np.where(empty, 1.0, total))
    return {
        "top_ids": top_ids.astype("int32"),
        "log_probs": np.where(known, log_probs - log_total[:, None], 0.0),
        "log_rest": np.where(empty, 0.0, log_rest - log_total),
    }


def check_rows(good: Any, rows: Any, first: int, expected: str) -> None:
    """Raise an error that shows the first bad row, unless all are good."""
    if not good.all():
        bad = int(np.argmin(good))
        shown = np.array2string(rows[bad], precision=4, threshold=8)
        raise ValueError(
            f"The teacher's outputs must be {expected}. Received: {shown} in "
            f"row {first + bad}, of sum {rows[bad].sum():.6g} "
            f"({np.count_nonzero(~good)} of these {len(good)} rows are bad)"
        )


def in_sequences(values: Values, lengths: Any) -> Values:
    """Return the columns of sequences, of those of all their positions.

    Args:
        values: columns of `from_entries`, a row for each position.
        lengths: the number of positions of each sequence.
    """
    stored = values["top_ids"][:, 0] != NO_ENTRY
    keep = np.zeros(len(stored), bool)
    starts, offsets, low = [], [0], 0
    for length in lengths:
        where = np.flatnonzero(stored[low : low + length])
        start, stop = (where[0], where[-1] + 1) if len(where) else (0, 0)
        keep[low + start : low + stop] = True
        starts.append(start)
        offsets.append(offsets[-1] + stop - start)
        low += length
    kept = {name: column[keep] for name, column in values.items()}
    return {**kept, "start": np.array(starts), "offsets": np.array(offsets)}


def events(rows: Values, out: np.ndarray | None = None) -> np.ndarray:
    """Return events `(n, k + 1, 2)` float32 of the columns of n rows.

    Args:
        rows: columns of entries.
        out: where to put them.
    """
    count, k = rows["top_ids"].shape
    if out is None:
        out = np.empty((count, k + 1, 2), "float32")
    out[:, :k, 0] = rows["top_ids"]
    out[:, :k, 1] = rows["log_probs"]
    out[:, k, 0] = REST
    out[:, k, 1] = rows["log_rest"]
    out[rows["top_ids"][:, 0] == NO_ENTRY, k] = NO_ENTRY, 0
    return out
