"""Teacher outputs: how to get them, and how to store them in Arrow columns.

`SoftLabels` explains the three kinds of rows (`probabilities`, `top_k` and
`tokens`) and events. Positions without an event at the start and end of a token
sequence are not stored; `start` is the first stored position.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from keras_ptloss._backend import as_array
from keras_ptloss._math import two_events
from keras_ptloss._validation import (
    SUM_TOLERANCE,
    as_rows,
    check_choice,
    fail,
    on_simplex,
    refuse,
    refuse_masked,
)
from keras_ptloss.soft_labels.inputs import (
    num_examples,
    sequence_mask,
    weights_of_positions,
)

REST = -1
NO_ENTRY = -2

# Columns by name. For tokens, there is also an array `offsets`: sequence i has
# the positions from `offsets[i]` to `offsets[i + 1]`.
Values = dict[str, Any]


def pyarrow() -> Any:
    """Import pyarrow, which is an optional dependency."""
    try:
        import pyarrow as pa
    except ImportError as error:
        message = "SoftLabels needs pyarrow. Run `pip install pyarrow`."
        raise ImportError(message) from error
    return pa


# Ask the teacher.


def teacher_identity(teacher: Any) -> str:
    """Return a hash of a Keras model, or the name of a function."""
    if not isinstance(teacher, keras.Model):
        return getattr(teacher, "__qualname__", type(teacher).__qualname__)
    try:
        settings = keras.saving.serialize_keras_object(teacher)["config"]
        config = json.dumps(settings, sort_keys=True, default=str)
    except NotImplementedError:  # a subclassed model without `get_config`
        config = ""
    # The same layer may be "dense_1" in one process and "dense" in the next.
    config = re.sub(r"_\d+\"", '"', config)
    digest = hashlib.sha256(f"{type(teacher).__name__}{config}".encode())
    for weight in teacher.weights:
        digest.update(as_array(weight).tobytes())
    return f"{type(teacher).__name__} {digest.hexdigest()[:16]}"


def asked(teacher: Any, top_k: int | None, from_logits: bool) -> Any:
    """Return a function from a batch of inputs to outputs, or to events."""
    if isinstance(teacher, keras.Model):
        if top_k is not None:
            teacher = LikeliestOf(teacher, top_k, from_logits)
        return teacher.predict_on_batch
    if top_k is None:
        return teacher
    return lambda x: cut(teacher(x), top_k, from_logits)


class LikeliestOf(keras.Model):
    """A teacher that keeps only the k most likely classes, on its device."""

    def __init__(self, teacher: keras.Model, k: int, from_logits: bool) -> None:
        super().__init__()
        self.teacher, self.k, self.from_logits = teacher, k, from_logits

    def call(self, inputs: Any) -> Any:
        """Return `likeliest` of the teacher's outputs."""
        outputs = self.teacher(inputs, training=False)
        return likeliest(outputs, self.k, self.from_logits)


def cut(outputs: Any, top_k: int, from_logits: bool) -> np.ndarray:
    """Return the k most likely classes of outputs `(..., C)`, as events."""
    tensor = ops.convert_to_tensor(_numbers(outputs))
    return as_array(likeliest(tensor, top_k, from_logits))


def likeliest(outputs: Any, k: int, from_logits: bool) -> Any:
    """Return the k most likely classes of a tensor `(..., C)`, as events."""
    logits = ops.cast(outputs, "float32")
    logits = ops.log_softmax(logits) if from_logits else ops.log(logits)
    values, ids = ops.top_k(logits, k)
    # `log(1 - sum)` would lose all precision if the sum of the k is close to 1.
    # So add up the other classes: those with a lower value than the last of the
    # k, and those with the same value that are not among the k.
    last = values[..., -1:]
    lower = ops.where(logits < last, logits, -np.inf)
    level = ops.sum(ops.cast(logits >= last, "float32"), -1, keepdims=True) - k
    others = ops.logaddexp(
        ops.logsumexp(lower, axis=-1, keepdims=True), last + ops.log(level)
    )
    ids = ops.cast(ids, "float32")
    names = ops.concatenate([ids, ops.full_like(others, REST)], axis=-1)
    log_probs = ops.concatenate([values, others], axis=-1)
    return ops.stack([names, log_probs], axis=-1)


# From outputs to columns.


def record_batch(
    outputs: Any,
    about: dict[str, Any],
    first: int,
    x: Any = None,
    prints: np.ndarray | None = None,
    ids: Sequence[Any] | None = None,
    weight: Any = None,
) -> Any:
    """Check a batch of outputs and return it as an Arrow record batch.

    `about` has the layout's `dtype`, `class_names`, `teacher` and
    `from_logits`; `first` is the index of the first example, for errors.
    Positions whose sample weight is 0 are not stored.
    """
    try:
        values = _columns(outputs, about, x, weight)
    except ValueError as error:
        raise ValueError(
            f"{error}, in the batch that starts at example {first}"
        ) from None
    if prints is not None:
        values["fingerprint"] = prints
    if ids is not None:
        values["id"] = [str(name) for name in ids]
    return _encoded(values, Layout.of(values, **about))


def _columns(
    outputs: Any, about: dict[str, Any], x: Any, weight: Any
) -> Values:
    """Return the columns of a batch of outputs; see `record_batch`."""
    if isinstance(outputs, list) and np.ndim(outputs[0]) == 3:
        lengths = np.array([len(sequence) for sequence in outputs])
        tokens = lengths if x is None else sequence_mask(x).sum(axis=1)
        if (lengths != tokens).any():
            row = int(np.argmax(lengths != tokens))
            raise ValueError(
                "Sequences must have one position for each token of `inputs`. "
                f"Received: {lengths[row]} positions for the {tokens[row]} "
                f"tokens of sequence {row}"
            )
        flat = _numbers(np.concatenate(outputs))
        return _in_sequences(_entries(flat, about), lengths)
    outputs = _numbers(outputs)
    shape = f"outputs of shape {outputs.shape}"
    if x is not None and len(outputs) != num_examples(x):
        expected = f"one row for each of {num_examples(x)} inputs"
        refuse("outputs", expected, shape)
    if outputs.ndim == 2:
        return _probabilities(outputs, about)
    if outputs.ndim > 4 or outputs.shape[-1] != 2:
        expected = (
            "of shape (batch, num_classes) or, with top_k, (batch, time, "
        )
        refuse("outputs", f"{expected}num_classes)", shape)
    if outputs.ndim == 3:
        return _entries(outputs, about)
    real = np.ones(outputs.shape[:2], bool) if x is None else sequence_mask(x)
    if real.shape != outputs.shape[:2]:
        refuse("outputs", f"one row for each position, {real.shape}", shape)
    kept = weights_of_positions(weight, real.shape).astype(bool)[real]
    values = _entries(outputs[real], about, kept)
    return _in_sequences(values, real.sum(axis=1))


def _numbers(outputs: Any) -> np.ndarray:
    """Return outputs as an array of numbers; refuse masked arrays."""
    refuse_masked("outputs", outputs)
    array = as_rows("outputs", outputs)
    if array.ndim < 2 or array.dtype.kind not in "biuf":
        fail("outputs", "numbers of shape (batch, num_classes)", array)
    return array


def _probabilities(outputs: np.ndarray, about: dict[str, Any]) -> Values:
    """Return the column of probabilities for outputs `(n, C)`."""
    dtype, names = about["dtype"], about["class_names"]
    rows = two_events(outputs, from_logits=about["from_logits"])
    rows = rows.astype("float64")
    if names is not None and len(names) != rows.shape[1]:
        expected = f"the names of {rows.shape[1]} classes, in their order"
        fail("class_names", expected, names)
    if about["from_logits"]:
        _check_rows(np.isfinite(rows).all(-1), rows, "finite logits")
        rows = np.exp(rows - rows.max(-1, keepdims=True))
    else:
        _check_rows(
            on_simplex(rows),
            rows,
            "probabilities: non-negative numbers that sum to 1. If these are "
            "logits, pass from_logits=True; divide percentages by 100",
        )
    rows /= rows.sum(-1, keepdims=True)
    rounded = rows.astype(dtype)
    _check_rows(
        np.abs(rounded.sum(-1, dtype="float64") - 1) <= SUM_TOLERANCE,
        rows,
        f"large enough for {dtype}, which rounds these by more than 1 %. Pass "
        "dtype='float32' or top_k",
    )
    return {"probabilities": rounded}


def _entries(events: Any, about: dict[str, Any], kept: Any = None) -> Values:
    """Return the columns of events `(n, k + 1, 2)`, or `(n, k, 2)`.

    Without an event for all other classes, those get the remaining probability.
    `kept`, `(n,)`, says which rows are stored.
    """
    with np.errstate(invalid="ignore"):  # of NaN
        ids = events[..., 0].astype("int64")
    log_probs, log_rest = events[..., 1].astype("float64"), None
    names = about["class_names"]
    largest = np.iinfo("int32").max if names is None else len(names) - 1
    if (ids[:, -1] < 0).all() and (ids[:, -1] == REST).any():
        log_rest = log_probs[:, -1]
        ids, log_probs = ids[:, :-1], log_probs[:, :-1]
    known = ids >= 0
    fits = (known & (ids <= largest)) | (ids == NO_ENTRY)
    _check_rows(
        (fits & (ids == events[:, : ids.shape[1], 0])).all(-1),
        events[..., 0],
        f"whole ids from 0 to {largest} (-2 where there is no entry) and "
        "log-probabilities. If they are all classes of a sequence, pass top_k",
    )
    if kept is not None:
        known = known & kept[:, None]
    # Entries come first, so that `top_ids[:, 0]` tells whether there is one.
    order = np.argsort(~known, axis=-1, kind="stable")
    ids, log_probs, known = (
        np.take_along_axis(a, order, -1) for a in (ids, log_probs, known)
    )
    filled = np.where(known, ids, NO_ENTRY - np.arange(ids.shape[1]))
    differ = (np.diff(np.sort(filled)) > 0).all(-1)
    _check_rows(differ, ids, "ids that all differ")
    given = np.exp(np.where(known, log_probs, -np.inf)).sum(-1)
    if log_rest is None:
        with np.errstate(divide="ignore"):
            log_rest = np.log(np.maximum(1.0 - given, 0.0))
    empty = ~known[:, 0]
    total = np.where(empty, 1.0, given + np.exp(log_rest))
    _check_rows(
        np.abs(total - 1) <= SUM_TOLERANCE,
        log_probs,
        "logarithms of probabilities that sum to 1, including that of all "
        "other classes. If these are logits, pass from_logits=True",
    )
    log_total = np.log(total)
    log_probs = np.where(known, log_probs - log_total[:, None], 0.0)
    log_rest = np.where(empty, 0.0, log_rest - log_total)
    with np.errstate(over="ignore"):  # float16 has -inf for less than -65504
        return {
            "top_ids": np.where(known, ids, NO_ENTRY).astype("int32"),
            "log_probs": log_probs.astype(about["dtype"]),
            "log_rest": log_rest.astype(about["dtype"]),
        }


def _check_rows(good: Any, rows: Any, expected: str) -> None:
    """Raise an error that shows the first invalid row, if there is one."""
    if not good.all():
        bad = int(np.argmin(good))
        shown = np.array2string(rows[bad], precision=4, threshold=8)
        raise ValueError(
            f"The teacher's outputs must be {expected}. Received: {shown} in "
            f"row {bad}, which sums to {rows[bad].sum():.6g} "
            f"({np.count_nonzero(~good)} of {len(good)} rows are invalid)"
        )


def _in_sequences(values: Values, lengths: np.ndarray) -> Values:
    """Return the columns of sequences, given the columns of their positions."""
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
    kept["start"] = np.array(starts, "int32")
    return kept | {"offsets": np.array(offsets, "int32")}


# From columns to Arrow, and back.


@dataclasses.dataclass
class Layout:
    """What kind of rows a store has."""

    kind: Literal["probabilities", "top_k", "tokens"]
    dtype: str = "float16"  # of the probabilities or log-probabilities
    num_classes: int | None = None  # None for `top_k` and `tokens`
    top_k: int | None = None
    class_names: tuple[str, ...] | None = None
    teacher: str | None = None  # its name or hash
    from_logits: bool = False  # what the teacher gave; probabilities are stored
    has_fingerprints: bool = False
    has_ids: bool = False

    def __post_init__(self) -> None:
        """Check the user's choices; restore the tuple that JSON made a list."""
        check_choice("dtype", self.dtype, ("float16", "float32"))
        if self.class_names is not None:
            self.class_names = tuple(self.class_names)
            if len(set(self.class_names)) < len(self.class_names):
                fail("class_names", "unique names", self.class_names)

    @classmethod
    def of(cls, values: Values, **about: Any) -> "Layout":
        """Return the layout of columns; `about` has the other fields."""
        about["has_fingerprints"] = "fingerprint" in values
        about["has_ids"] = "id" in values
        if "probabilities" in values:
            num_classes = values["probabilities"].shape[1]
            return cls("probabilities", num_classes=num_classes, **about)
        top_k = values["top_ids"].shape[1]
        tokens = "offsets" in values
        return cls("tokens" if tokens else "top_k", top_k=top_k, **about)

    @classmethod
    def of_schema(cls, schema: Any) -> "Layout":
        """Return the layout in the metadata of a schema."""
        try:
            return cls(**json.loads(schema.metadata[b"keras_ptloss"]))
        except TypeError as error:
            raise ValueError(
                f"Soft labels of another version of keras_ptloss: {error}"
            ) from error


def _encoded(values: Values, layout: Layout) -> Any:
    """Return columns as an Arrow record batch, with the layout as metadata."""
    pa = pyarrow()
    offsets = values.pop("offsets", None)
    arrays = {name: _as_arrow(column) for name, column in values.items()}
    if offsets is not None:
        for name in ("top_ids", "log_probs", "log_rest"):
            arrays[name] = pa.ListArray.from_arrays(offsets, arrays[name])
    about = {"keras_ptloss": json.dumps(vars(layout))}
    return pa.RecordBatch.from_pydict(arrays, metadata=about)


def _as_arrow(column: Any) -> Any:
    """Return an Arrow array of texts, of numbers, or of lists of k numbers."""
    pa = pyarrow()
    if isinstance(column, list) or column.ndim == 1:
        return pa.array(column)
    numbers = pa.array(column.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(numbers, column.shape[1])


def in_float32(schema: Any) -> Any:
    """Return an Arrow schema with float32 in place of float16."""
    pa = pyarrow()

    def wide(kind: Any) -> Any:
        if pa.types.is_fixed_size_list(kind):
            return pa.list_(wide(kind.value_type), kind.list_size)
        if pa.types.is_list(kind):
            return pa.list_(wide(kind.value_type))
        return pa.float32() if pa.types.is_float16(kind) else kind

    return pa.schema([(one.name, wide(one.type)) for one in schema])


def views(batch: Any) -> Values:
    """Return NumPy views of a record batch's columns, and copies of ids."""
    pa = pyarrow()
    found: Values = {}
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        if pa.types.is_list(array.type):
            found["offsets"] = array.offsets.to_numpy()
            array = array.values
        if pa.types.is_fixed_size_list(array.type):
            numbers = array.flatten().to_numpy()
            found[name] = numbers.reshape(-1, array.type.list_size)
        else:
            texts = pa.types.is_string(array.type)
            found[name] = array.to_numpy(zero_copy_only=not texts)
    return found


def events(values: Values, rows: Any, out: Any = None) -> np.ndarray:
    """Return rows of `top_k` or `tokens` columns as float32 events."""
    top_ids = values["top_ids"][rows]
    if out is None:
        out = np.empty((len(top_ids), top_ids.shape[1] + 1, 2), "float32")
    out[:, :-1, 0] = top_ids
    out[:, :-1, 1] = values["log_probs"][rows]
    out[:, -1, 0] = REST
    out[:, -1, 1] = values["log_rest"][rows]
    out[top_ids[:, 0] == NO_ENTRY, -1] = NO_ENTRY, 0
    return out
