"""The teacher asked for the likeliest tokens, and its answer checked."""

from collections.abc import Callable
from typing import Any, NoReturn

import keras
import numpy as np
from keras import ops

from keras_ptloss._backend import as_array
from keras_ptloss._checks import SUM_TOLERANCE, fail
from keras_ptloss.losses._events import LARGEST_ID, Events
from keras_ptloss.losses._top_k import log_of_others
from keras_ptloss.soft_labels._tokens.entries import tokens_of_entries
from keras_ptloss.soft_labels._tokens.spec import TokenLabelSpec, Tokens
from keras_ptloss.soft_labels._tokens.writer import TokenWriter

Tensor = Any


def likeliest(rows: Tensor, k: int, from_logits: bool) -> tuple[Tensor, ...]:
    """Return what is stored of rows of all tokens, computed where they are.

    Args:
        rows: `(batch, time, V)`.
        k: How many tokens.
        from_logits: Whether they are logits, not probabilities.

    Returns:
        Ids and log-probabilities, `(batch, time, k)`; the log of all others'
        mass and that of the row's sum, `(batch, time)`.
    """
    shape = tuple(rows.shape)
    logits = ops.reshape(ops.cast(rows, "float32"), (-1, shape[-1]))
    if not from_logits:
        logits = ops.log(logits)
    values, ids = ops.top_k(logits, k)
    total = ops.logsumexp(logits, axis=-1, keepdims=True)
    events = Events(ids, ops.ones_like(ids, "bool"), values, total)
    others = log_of_others(logits, events)
    leading = ops.shape(rows)[:-1]
    return (
        ops.reshape(ids, (*leading, k)),
        ops.reshape(values - total, (*leading, k)),
        ops.reshape(others - total, leading),
        ops.reshape(total, leading),
    )


class _Asked(keras.Model):
    """A frozen teacher whose rows of all tokens never leave its device."""

    def __init__(self, teacher: keras.Model, spec: TokenLabelSpec) -> None:
        super().__init__(name="asked")
        self.teacher, self.spec = teacher, spec

    def call(self, inputs: Tensor) -> Any:
        return _cut(self.teacher(inputs, training=False), self.spec)


def _cut(rows: Any, spec: TokenLabelSpec) -> Any:
    """Cut rows of all tokens to the likeliest; leave what is none."""
    if len(rows.shape) != 3 or rows.shape[-1] < spec.top_k:
        return rows
    # The vocabulary's size is only seen here.
    size = ops.full((1,), rows.shape[-1], dtype="int32")
    return size, *likeliest(rows, spec.top_k, spec.from_logits)


def asked(teacher: Any, spec: TokenLabelSpec) -> Callable[[Tensor], Any]:
    """Return what is called on each batch."""
    if isinstance(teacher, keras.Model):
        return _Asked(teacher, spec).predict_on_batch
    if not callable(teacher):
        fail("teacher", "a keras.Model or a callable", teacher)

    def run(x: Tensor) -> Any:
        rows = teacher(x)
        if ops.is_tensor(rows):
            return _cut(rows, spec)
        rows = as_array(rows)
        tensor = ops.convert_to_tensor if rows.ndim == 3 else np.asarray
        return _cut(tensor(rows), spec)

    return run


def _check_entries(rows: Any, spec: TokenLabelSpec) -> None:
    """Require entries, of a teacher that gives no rows of all tokens."""
    shape = rows.shape
    if len(shape) == 3:
        spec.check_vocabulary(shape[-1])  # which has fewer than k
    if len(shape) != 4 or shape[-1] != 2:
        fail(
            "teacher",
            "one that returns (batch, time, V), or ids and log-probabilities"
            " (batch, time, entries, 2)",
            f"one that returns shape {shape}",
        )
    if spec.vocabulary_size is None:
        fail("vocabulary_size", "given for a teacher that returns ids", None)
    # The first whole number that a float has not is one more than a power of 2.
    exact = 2 ** np.arange(LARGEST_ID.bit_length()) + 1
    exact = exact[exact < spec.vocabulary_size].astype("float64")
    with np.errstate(over="ignore"):
        lost = exact[exact.astype(rows.dtype).astype("float64") != exact]
    if len(lost):
        fail(
            "teacher",
            "one whose dtype has all ids below vocabulary_size="
            f"{spec.vocabulary_size} (float32 has)",
            f"one that returns {rows.dtype}, which rounds {lost[0]:.0f}",
        )


def ask_tokens(
    run: Callable[[Tensor], Any],
    x: Tensor,
    row: int,
    kept: Any,
    writer: TokenWriter,
) -> tuple[Tokens, int]:
    """Call the teacher, and read what it says of the tokens that count.

    Args:
        run: What `asked` returned.
        x: A batch of inputs.
        row: Position of the first sequence in the data set.
        kept: `(batch, time)` bool, which tokens count.
        writer: What its answer is for.

    Raises:
        RuntimeError: If the teacher raises.
        ValueError: If what it returns cannot be stored.
    """
    spec = writer.spec
    where = (
        f"on the sequences {row} to {row + len(kept) - 1}. The {writer.stored}"
        " before are stored: call again to go on"
    )
    try:
        found = keras.tree.map_structure(ops.convert_to_numpy, run(x))
    except Exception as error:
        raise RuntimeError(
            f"The teacher failed {where}: {type(error).__name__}: {error}"
        ) from error
    if isinstance(found, (tuple, list)):
        rows = found[1]
        spec.check_vocabulary(int(found[0][0]))
    else:
        rows = found
        _check_entries(rows, spec)
    if rows.shape[:2] != kept.shape:
        raise ValueError(
            f"The teacher returned shape {(*rows.shape[:2], '...')} where the"
            f" ids have {kept.shape}, {where}"
        )
    places = np.argwhere(kept)

    def refuse(token: int, problem: str) -> NoReturn:
        sequence, position = places[token]
        raise ValueError(
            f"The teacher's answer {problem}, at position {position} of"
            f" sequence {row + sequence}, {where}"
        )

    if rows is found:
        ids, logs = rows[kept][..., 0].astype("float64"), rows[kept][..., 1]
        # Not a cast alone, by which inf and 1e30 would be padding.
        wrong = (~(np.abs(ids) < 2.0**63) | (ids != np.round(ids))).any(-1)
        if wrong.any():
            token = int(np.argmax(wrong))
            refuse(token, f"has ids that are no whole int64, {ids[token]}")
        tokens = tokens_of_entries(ids.astype("int64"), logs, spec, refuse)
        return tokens, int(spec.vocabulary_size or 0)
    size, ids, values, tail, total = found
    _check_totals(total[kept], spec, refuse)
    return Tokens(ids[kept], values[kept], tail[kept]), int(size[0])


def _check_totals(total: Any, spec: TokenLabelSpec, refuse: Any) -> None:
    """Refuse rows without a sum, or whose probabilities do not add up to 1."""
    bad = np.flatnonzero(~np.isfinite(total))
    if len(bad):
        what = "NaN, or negative numbers (are they logits? from_logits=True)"
        if spec.from_logits:
            what = "NaN or infinity"
        refuse(int(bad[0]), f"has {what}")
    off = np.abs(np.exp(total) - 1) > SUM_TOLERANCE
    if not spec.from_logits and off.any():
        row = int(np.argmax(off))
        refuse(
            row,
            f"has probabilities that add up to {np.exp(total[row]):.6g} (are"
            " they logits? Then from_logits=True in the spec)",
        )
