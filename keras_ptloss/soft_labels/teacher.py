"""The teacher: its identity, and its outputs as columns of a store."""

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_ptloss._backend import as_array
from keras_ptloss._math import two_events
from keras_ptloss._validation import fail
from keras_ptloss.soft_labels.inputs import (
    num_examples,
    sequence_mask,
    weights_of_positions,
)
from keras_ptloss.soft_labels.layout import (
    NO_ENTRY,
    REST,
    Columns,
    from_entries,
    from_outputs,
    in_sequences,
)

Tensor = Any


def teacher_identity(teacher: Any) -> str:
    """Return the name by which a store identifies a teacher by default.

    Of a Keras model, that is a hash of its configuration and weights; of a
    function, its name.
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
    # The second layer of a kind is "dense_1", in the next process "dense".
    config = re.sub(r"_\d+\"", '"', config)
    digest = hashlib.sha256(f"{type(teacher).__name__}{config}".encode())
    for weight in teacher.weights:
        digest.update(as_array(weight).tobytes())
    return f"{type(teacher).__name__} {digest.hexdigest()[:16]}"


def likeliest(
    outputs: Tensor, k: int, from_logits: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k likeliest classes, on the device of the outputs.

    Args:
        outputs: `(..., C)`, probabilities or logits.
        k: how many classes.
        from_logits: whether they are logits.

    Returns:
        Their ids and log-probabilities `(..., k)`, and the log-probability of
        all others together `(...)`.
    """
    logits = ops.cast(outputs, "float32")
    if from_logits:
        logits = ops.log_softmax(logits, axis=-1)
    else:
        logits = ops.log(logits)
    values, ids = ops.top_k(logits, k)
    # `log(1 - sum)` would have no digits left where the k have nearly all. So
    # add up the others: those lower than the last of the k, and those level
    # with it that are not among the k.
    last = values[..., -1:]
    lower = ops.where(logits < last, logits, -np.inf)
    level = ops.sum(ops.cast(logits >= last, "float32"), axis=-1) - k
    others = ops.logaddexp(
        ops.logsumexp(lower, axis=-1), last[..., 0] + ops.log(level)
    )
    return ids, values, others


class Entries(NamedTuple):
    """The k likeliest classes of each example, or of each position.

    Attributes:
        ids: `(..., k)`.
        log_probs: `(..., k)`.
        log_rest: log-probability of all others, `(...)`; None if unknown.
        num_classes: number of classes, None if unknown.
    """

    ids: Any
    log_probs: Any
    log_rest: Any
    num_classes: int | None = None


class LikeliestOf(keras.Model):
    """A teacher whose outputs are cut to the k likeliest on its device."""

    def __init__(self, teacher: keras.Model, k: int, from_logits: bool) -> None:
        super().__init__()
        self.teacher, self.k, self.from_logits = teacher, k, from_logits
        self.num_classes: int | None = None

    def call(self, inputs: Tensor) -> Any:
        """Return what `likeliest` returns of the teacher's outputs."""
        outputs = self.teacher(inputs, training=False)
        self.num_classes = outputs.shape[-1]
        return likeliest(outputs, self.k, self.from_logits)


def asked(
    teacher: Any, top_k: int | None, from_logits: bool
) -> Callable[[Any], Any]:
    """Return what asks a teacher about a batch of inputs.

    Args:
        teacher: a Keras model, or a function of a batch.
        top_k: how many classes are stored; None for all.
        from_logits: whether its outputs are logits.

    Returns:
        A function from a batch to an array, or to `Entries`.
    """
    if not isinstance(teacher, keras.Model):
        if not callable(teacher):
            fail("teacher", "a Keras model or a function of a batch", teacher)
        return teacher
    if top_k is None:
        return teacher.predict_on_batch
    model = LikeliestOf(teacher, top_k, from_logits)

    def run(x: Any) -> Entries:
        ids, log_probs, log_rest = model.predict_on_batch(x)
        return Entries(ids, log_probs, log_rest, model.num_classes)

    return run


def columns(
    outputs: Any,
    *,
    top_k: int | None,
    from_logits: bool,
    dtype: str,
    x: Any,
    first: int,
    weight: Any = None,
) -> Columns:
    """Return what is stored of outputs, after a check.

    Args:
        outputs: for a batch: `(batch, C)`; with `top_k` also `(batch, time,
            C)`; or, without it, events `(batch, k + 1, 2)` or `(batch, time,
            k + 1, 2)`, as `TopKPTLoss` takes them; or `Entries`.
        top_k: how many classes are stored; None for all.
        from_logits: whether `(..., C)` are logits.
        dtype: in which probabilities will be stored.
        x: the inputs of the batch, None if unknown.
        first: number of the first example, for errors.
        weight: the sample weights of the batch or None. Positions of weight 0
            are not stored.
    """
    if not isinstance(outputs, Entries):
        outputs = _without_mask(outputs)
        if top_k is not None:
            outputs = _cut(outputs, top_k, from_logits)
        elif outputs.ndim > 2 and outputs.shape[-1] == 2:
            outputs = _of_events(outputs)
        elif outputs.ndim != 2:
            raise ValueError(
                "The teacher must return (batch, num_classes), or with top_k "
                "(batch, time, num_classes). Received: outputs of shape "
                f"{outputs.shape}, top_k=None"
            )
    count = None if x is None else num_examples(x)
    found = outputs.ids if isinstance(outputs, Entries) else outputs
    if count is not None and len(found) != count:
        raise ValueError(
            f"The teacher must return a row for each of {count} examples. "
            f"Received: outputs of shape {found.shape}"
        )
    if not isinstance(outputs, Entries):
        rows = two_events(outputs, from_logits=from_logits)
        values = from_outputs(
            rows, from_logits=from_logits, dtype=dtype, first=first
        )
        return Columns("probabilities", rows.shape[1], values)
    positions = outputs.ids.ndim == 3
    if positions:
        shape = outputs.ids.shape[:2]
        real = np.ones(shape, bool) if x is None else sequence_mask(x)
        if real.shape != shape:
            raise ValueError(
                "The teacher must return a row for each position of the "
                f"inputs, {real.shape}. Received: outputs of shape {shape}"
            )
        kept = real & weights_of_positions(weight, shape).astype(bool)
        ids, log_probs, log_rest, num_classes = outputs
        ids = np.where(kept[..., None], ids, NO_ENTRY)[real]
        log_rest = None if log_rest is None else log_rest[real]
        outputs = Entries(ids, log_probs[real], log_rest, num_classes)
    ids, log_probs, log_rest, num_classes = outputs
    values = from_entries(ids, log_probs, log_rest, num_classes, first)
    if not positions:
        return Columns("top_k", outputs.num_classes, values)
    values = in_sequences(values, real.sum(axis=1))
    return Columns("tokens", outputs.num_classes, values)


def _without_mask(outputs: Any) -> np.ndarray:
    """Return outputs as an array of numbers, which has no mask."""
    if np.ma.isMaskedArray(outputs):
        raise ValueError(
            "The teacher's outputs must have no mask: leave out the examples "
            "without an answer. Received: a masked array"
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


def _cut(outputs: np.ndarray, top_k: int, from_logits: bool) -> Entries:
    """Cut outputs `(..., C)` to the k likeliest."""
    num_classes = outputs.shape[-1]
    if top_k > num_classes or outputs.ndim > 3:
        raise ValueError(
            "`top_k` must be at most the number of classes, of outputs (batch, "
            "num_classes) or (batch, time, num_classes). Received: "
            f"top_k={top_k}, outputs of shape {outputs.shape}"
        )
    found = likeliest(ops.convert_to_tensor(outputs), top_k, from_logits)
    ids, log_probs, log_rest = map(as_array, found)
    return Entries(ids, log_probs, log_rest, num_classes)


def _of_events(outputs: np.ndarray) -> Entries:
    """Read events `(..., k + 1, 2)`, or `(..., k, 2)` without the rest."""
    ids, log_probs = outputs[..., 0], outputs[..., 1]
    if np.any(ids != np.round(ids)) or outputs.ndim > 4:
        raise ValueError(
            "The teacher must return ids and log-probabilities on the last "
            "axis, or give top_k. Received: ids that are not integers, in "
            f"outputs of shape {outputs.shape}, top_k=None"
        )
    ids = ids.astype("int64")
    if (ids[..., -1] < 0).all() and (ids[..., -1] == REST).any():
        return Entries(ids[..., :-1], log_probs[..., :-1], log_probs[..., -1])
    return Entries(ids, log_probs, None)
