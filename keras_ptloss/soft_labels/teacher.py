"""The teacher: its identity, and its outputs as columns of a store."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ptloss._backend import as_array
from keras_ptloss._math import two_events
from keras_ptloss._validation import SUM_TOLERANCE, fail, on_simplex
from keras_ptloss.soft_labels.inputs import (
    num_examples,
    sequence_mask,
    weights_of_positions,
)
from keras_ptloss.soft_labels.layout import NO_ENTRY, REST, Layout, Values

Tensor = Any


def teacher_identity(teacher: Any) -> str:
    """Return the name by which a store identifies a teacher by default.

    For a Keras model, this is a hash of its configuration and weights; for a
    function, it is its name.
    """
    if not isinstance(teacher, keras.Model):
        return getattr(teacher, "__qualname__", type(teacher).__qualname__)
    try:
        config = json.dumps(
            keras.saving.serialize_keras_object(teacher)["config"],
            sort_keys=True,
            default=str,
        )
    except NotImplementedError:  # a subclassed model without `get_config`
        config = ""
    # The same layer may be "dense_1" in one process and "dense" in the next.
    config = re.sub(r"_\d+\"", '"', config)
    digest = hashlib.sha256(f"{type(teacher).__name__}{config}".encode())
    for weight in teacher.weights:
        digest.update(as_array(weight).tobytes())
    return f"{type(teacher).__name__} {digest.hexdigest()[:16]}"


def likeliest(outputs: Tensor, k: int, from_logits: bool) -> Tensor:
    """Return the k most likely classes as events, on the outputs' device.

    Args:
        outputs: `(..., C)`, probabilities or logits.
        k: number of classes.
        from_logits: whether `outputs` are logits.

    Returns:
        Events `(..., k + 1, 2)`, float32.
    """
    logits = ops.cast(outputs, "float32")
    if from_logits:
        logits = ops.log_softmax(logits, axis=-1)
    else:
        logits = ops.log(logits)
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


class LikeliestOf(keras.Model):
    """A teacher that keeps only the k most likely classes, on its device."""

    def __init__(self, teacher: keras.Model, k: int, from_logits: bool) -> None:
        super().__init__()
        self.teacher, self.k, self.from_logits = teacher, k, from_logits

    def call(self, inputs: Tensor) -> Tensor:
        """Return `likeliest` of the teacher's outputs."""
        outputs = self.teacher(inputs, training=False)
        return likeliest(outputs, self.k, self.from_logits)


def asked(
    teacher: Any, top_k: int | None, from_logits: bool
) -> Callable[[Any], Any]:
    """Return a function from a batch of inputs to outputs, or to events."""
    if isinstance(teacher, keras.Model):
        if top_k is not None:
            teacher = LikeliestOf(teacher, top_k, from_logits)
        return teacher.predict_on_batch
    if not callable(teacher):
        fail("teacher", "a Keras model or a function of a batch", teacher)
    if top_k is None:
        return teacher
    return lambda x: cut(teacher(x), top_k, from_logits)


def cut(outputs: Any, top_k: int, from_logits: bool) -> np.ndarray:
    """Return the k most likely classes of outputs `(..., C)`, as events."""
    outputs = _numbers(outputs)
    if top_k > outputs.shape[-1] or outputs.ndim > 3:
        raise ValueError(
            "`top_k` must be at most the number of classes, and the outputs "
            "must have shape (batch, num_classes) or (batch, time, "
            f"num_classes). Received: top_k={top_k}, outputs of shape "
            f"{outputs.shape}"
        )
    tensor = ops.convert_to_tensor(outputs)
    return as_array(likeliest(tensor, top_k, from_logits))


def record_batch(
    outputs: Any,
    about: dict[str, Any],
    first: int,
    x: Any,
    prints: np.ndarray | None,
    ids: Sequence[Any] | None,
    weight: Any = None,
) -> Any:
    """Check a batch of outputs and return it as an Arrow record batch.

    Args:
        outputs: probabilities or logits, `(batch, C)`; events `(batch, k + 1,
            2)` or `(batch, time, k + 1, 2)`; or a list of the events of each
            sequence, `(time, k + 1, 2)`. The event of all other classes may be
            left out.
        about: the layout's `dtype`, `class_names`, `teacher` and `from_logits`.
        first: index of the first example, for errors.
        x: the inputs of the batch, or None if unknown.
        prints: the fingerprints of the inputs, or None.
        ids: the user's ids, or None.
        weight: the sample weights of the batch, or None. Positions of weight 0
            are not stored.
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
    return Layout.of(values, **about).encode(values)


def _columns(
    outputs: Any, about: dict[str, Any], x: Any, weight: Any
) -> Values:
    """Return the columns of a batch of outputs; see `record_batch`."""
    names = about["class_names"]
    num_classes = None if names is None else len(names)
    if isinstance(outputs, list) and np.ndim(outputs[0]) == 3:
        lengths = np.array([len(sequence) for sequence in outputs])
        tokens = lengths if x is None else sequence_mask(x).sum(axis=1)
        if (lengths != tokens).any():
            row = int(np.argmax(lengths != tokens))
            raise ValueError(
                "Events must have one position for each token of `inputs`; use "
                "the id -2 where there is no entry. Received: "
                f"{lengths[row]} positions for the {tokens[row]} tokens of "
                f"sequence {row}"
            )
        flat = _numbers(np.concatenate(outputs))
        return _in_sequences(_entries(flat, num_classes), lengths)
    outputs = _numbers(outputs)
    if x is not None and len(outputs) != num_examples(x):
        raise ValueError(
            f"The teacher must return one row for each of {num_examples(x)} "
            f"examples. Received: outputs of shape {outputs.shape}"
        )
    if outputs.ndim == 2:
        return _probabilities(outputs, about)
    if outputs.ndim > 4 or outputs.shape[-1] != 2:
        raise ValueError(
            "The teacher must return an array of shape (batch, num_classes) "
            "or, with top_k, (batch, time, num_classes). Received: outputs of "
            f"shape {outputs.shape}"
        )
    if outputs.ndim == 3:
        return _entries(outputs, num_classes)
    real = np.ones(outputs.shape[:2], bool) if x is None else sequence_mask(x)
    if real.shape != outputs.shape[:2]:
        raise ValueError(
            "The teacher must return one row for each position of the inputs, "
            f"{real.shape}. Received: outputs of shape {outputs.shape}"
        )
    kept = weights_of_positions(weight, real.shape).astype(bool)[real]
    values = _entries(outputs[real], num_classes, kept)
    return _in_sequences(values, real.sum(axis=1))


def _numbers(outputs: Any) -> np.ndarray:
    """Return outputs as an array of numbers; refuse masked arrays."""
    if np.ma.isMaskedArray(outputs):
        raise ValueError(
            "The teacher's outputs must not be a masked array. Leave out the "
            "examples without an answer. Received: a masked array"
        )
    array = as_array(outputs)
    if array.dtype.name == "bfloat16":  # which NumPy does not know
        array = array.astype("float32")
    if array.ndim < 2 or array.dtype.kind not in "biuf":
        raise ValueError(
            "The teacher must return numbers of shape (batch, num_classes). "
            f"Received: {array.dtype} of shape {array.shape}"
        )
    return array


def _probabilities(outputs: np.ndarray, about: dict[str, Any]) -> Values:
    """Return the column of probabilities for outputs `(n, C)`."""
    dtype, names = about["dtype"], about["class_names"]
    rows = two_events(outputs, from_logits=about["from_logits"])
    rows = rows.astype("float64")
    if names is not None and len(names) != rows.shape[1]:
        raise ValueError(
            "`class_names` must name every class of the teacher, in the "
            f"teacher's order. Received: {len(names)} class_names for "
            f"{rows.shape[1]} classes"
        )
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
        "dtype='float32', or store only the most likely classes (top_k)",
    )
    return {"probabilities": rounded}


def _entries(
    events: np.ndarray,
    num_classes: int | None,
    kept: np.ndarray | None = None,
) -> Values:
    """Return the columns of events `(n, k + 1, 2)`, or `(n, k, 2)`.

    Args:
        events: ids and log-probabilities, see `layout`. Without an entry for
            all other classes, those classes get the remaining probability.
        num_classes: number of ids; None if unknown.
        kept: which rows are stored, `(n,)`; None for all.
    """
    with np.errstate(invalid="ignore"):  # of NaN
        ids = events[..., 0].astype("int64")
    log_probs, log_rest = events[..., 1].astype("float64"), None
    largest = np.iinfo("int32").max if num_classes is None else num_classes - 1
    if (ids[:, -1] < 0).all() and (ids[:, -1] == REST).any():
        log_rest = log_probs[:, -1]
        ids, log_probs = ids[:, :-1], log_probs[:, :-1]
    known = ids >= 0
    fits = (known & (ids <= largest)) | (ids == NO_ENTRY)
    _check_rows(
        (fits & (ids == events[:, : ids.shape[1], 0])).all(-1),
        events[..., 0],
        f"whole ids from 0 to {largest}, or -2 where there is no entry, and "
        "log-probabilities on the last axis. If the last axis has all classes "
        "of a sequence, pass top_k",
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
    return {
        "top_ids": np.where(known, ids, NO_ENTRY).astype("int32"),
        "log_probs": np.where(known, log_probs - log_total[:, None], 0.0),
        "log_rest": np.where(empty, 0.0, log_rest - log_total),
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
    """Return the columns of sequences, given the columns of their positions.

    Args:
        values: columns of entries, with one row for each position.
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
