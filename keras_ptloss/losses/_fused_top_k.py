"""PTLoss on k + 1 events, fused with the projection that makes the logits.

Logits of all classes, `(tokens, vocabulary)`, and their gradient are most of
what a language model's training keeps. Here a chunk of the vocabulary is
projected at a time, forward and once more backward, and what is kept are the
hidden states, some numbers a token, and the weights' gradient, which is
needed anyway. The price is one more projection.

Forward, over the chunks: the logits of the classes given are picked where
they are met; `L_r`, the log-sum-exp over the others, is summed up with the
largest logit so far taken off. Backward, with `d loss / d z` of `_events.py`:

    d loss / d hidden = sum over chunks of (d loss / d z) W_chunk
    d loss / d W_chunk = (d loss / d z)' hidden
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from keras import backend, ops

from keras_ptloss._backend import compiled_on_jax, maximum
from keras_ptloss._calibration import LOWEST, TINY
from keras_ptloss._checks import check_choice, check_count, fail
from keras_ptloss.losses._events import (
    Events,
    check_targets,
    loss_of_events,
    put,
)
from keras_ptloss.losses._top_k import check_arguments

Tensor = Any

# Without "spread", whose target is a row of the whole vocabulary.
TAILS = ("event", "renormalize", "teacher_only")


def fused_top_k_pt_loss(
    y_true: Tensor,
    hidden: Tensor,
    weights: Tensor,
    epsilon: Any,
    *,
    bias: Tensor = None,
    tail: str = "event",
    teacher_temperature: float = 1.0,
    chunk: int = 4096,
) -> Tensor:
    """Compute `top_k_pt_loss` of `hidden @ weights + bias`, without logits.

    For vocabularies whose logits do not fit: value and gradients are those of
    `TopKPTLoss`, the memory that of a chunk of the vocabulary. Called where a
    model has its hidden states, in `compute_loss` for example.

    Args:
        y_true: ids and natural log-probabilities, `(..., k, 2)`, as
            `TopKPTLoss` takes them.
        hidden: what the head is applied to, `(..., H)`. Its dtype is the
            projection's; the loss is computed in float32 or better.
        weights: the head's: `(H, C)`, as of a `Dense` layer, or `(C, H)`, as
            of embeddings that are the head as well. H, of `hidden`, says
            which; so C and H must differ.
        epsilon: coefficients: a number (order 1), or `(M,)`.
        bias: the head's, `(C,)`, or None.
        tail: `"event"`, `"renormalize"` or `"teacher_only"`.
        teacher_temperature: of the teacher's events, a number above 0.
        chunk: classes projected at a time. Arrays of `(tokens, chunk)` are
            the largest made.

    Returns:
        One loss a position, shape `(...)`, in nats. Differentiable by
        `hidden`, `weights` and `bias`, once.

    Raises:
        ValueError: if an argument is not of this form, or the targets are not
            (see `top_k_pt_loss`).

    Example:
        >>> import keras, numpy as np
        >>> class Student(keras.Model):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = keras.layers.Embedding(1000, 8)
        ...         self.embed.build()
        ...
        ...     def call(self, x):
        ...         return self.embed(x)  # hidden states
        ...
        ...     def compute_loss(self, x, y, y_pred, sample_weight, training):
        ...         head = self.embed.embeddings  # (1000, 8)
        ...         loss = fused_top_k_pt_loss(y, y_pred, head, 0.0)
        ...         return keras.ops.mean(loss)
        >>> student = Student()
        >>> student.compile("adam")
        >>> y_true = np.tile(
        ...     [[7, np.log(0.6)], [42, np.log(0.3)]], (8, 5, 1, 1)
        ... )
        >>> history = student.fit(np.ones((8, 5)), y_true, verbose=0)

    Reference:
        Hsu et al. 2024, Liger Kernel (https://arxiv.org/abs/2410.10989), and
        Wijmans et al. 2024, Cut Your Losses (https://arxiv.org/abs/2411.09009),
        for cross-entropy.
    """
    own = check_arguments(epsilon, tail, teacher_temperature)
    check_choice("tail", tail, TAILS)
    chunk = check_count("chunk", chunk)
    hidden = ops.convert_to_tensor(hidden)
    weights = ops.convert_to_tensor(weights)
    rows = _classes_are_rows(hidden, weights)
    classes = weights.shape[0 if rows else 1]
    if bias is None:
        bias = ops.zeros((classes,), weights.dtype)
    bias = ops.convert_to_tensor(bias)
    if tuple(bias.shape) != (classes,):
        fail("bias", f"of shape ({classes},), one a class", tuple(bias.shape))
    wide = backend.result_type(hidden.dtype, "float32")
    y_true = ops.cast(ops.convert_to_tensor(y_true), wide)
    check_targets(y_true, classes, hidden.shape, "hidden")
    leading = ops.shape(hidden)[:-1]
    hidden = ops.reshape(hidden, (-1, hidden.shape[-1]))
    entries = ops.shape(y_true)[-2]
    targets = ops.reshape(y_true, (ops.shape(hidden)[0], entries, 2))
    values = _of_rows_compiled(
        targets,
        hidden,
        weights,
        bias,
        head=_Head(rows, classes, min(chunk, classes)),
        epsilon=tuple(float(e) for e in own["epsilon"]),
        tail=tail,
        temperature=own["teacher_temperature"],
    )
    return ops.reshape(values, leading)


def _of_rows(
    targets: Tensor,
    hidden: Tensor,
    weights: Tensor,
    bias: Tensor,
    *,
    head: "_Head",
    epsilon: tuple[float, ...],
    tail: str,
    temperature: float,
) -> Tensor:
    """Return the loss of N positions, `(N,)`, with its gradient."""
    return loss_of_events(
        targets,
        (hidden, weights, bias),
        head.project,
        head.gradients,
        classes=head.classes,
        epsilon=epsilon,
        tail=tail,
        temperature=temperature,
    )


_of_rows_compiled = compiled_on_jax(
    _of_rows, settings=["head", "epsilon", "tail", "temperature"]
)


def _classes_are_rows(hidden: Tensor, weights: Tensor) -> bool:
    """Return whether weights are `(C, H)`, and not `(H, C)`."""
    size, shape = hidden.shape[-1], tuple(weights.shape)
    if len(shape) != 2 or size not in shape or shape[0] == shape[1]:
        fail(
            "weights",
            f"of shape ({size}, C) or (C, {size}) for hidden states of shape "
            f"(..., {size}), with another number of classes C",
            shape,
        )
    return bool(shape[1] == size)


class _Head(NamedTuple):
    """A projection, chunk of the vocabulary by chunk.

    Attributes:
        rows: whether weights are `(C, H)`, and not `(H, C)`.
        classes: C.
        chunk: classes at a time; the last chunk may be smaller.
    """

    rows: bool
    classes: int
    chunk: int

    def project(
        self, events: Events, hidden: Tensor, weights: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return logits of the events, `(N, K)`, and `L_r`, `(N, 1)`."""
        nothing = ops.full_like(events.log_t, -float("inf"))

        def step(first: Any, size: int, given: Tensor, *sums: Tensor) -> Any:
            largest, total = sums
            part = self._weights(weights, first, size)
            logits = self._logits(hidden, part, bias, first, given.dtype)
            met = _within(events, first, size)
            there = ops.where(met.known, met.ids, 0)
            picked = ops.take_along_axis(logits, there, axis=-1)
            given = ops.where(met.known, picked, given)
            others = put(logits, met.ids, met.known, nothing)
            so_far = ops.max(others, axis=-1, keepdims=True)
            so_far = ops.maximum(largest, so_far)
            each = ops.exp(others - so_far)
            total = total * ops.exp(largest - so_far)
            total = total + ops.sum(each, axis=-1, keepdims=True)
            return given, so_far, total

        column = events.log_rest
        given, largest, total = self._over_chunks(
            step,
            ops.full_like(events.log_t, LOWEST),
            ops.full_like(column, LOWEST),
            ops.zeros_like(column),
        )
        return given, largest + ops.log(maximum(total, TINY))

    def gradients(
        self,
        of_logits: Callable[[Tensor, Events], Tensor],
        events: Events,
        hidden: Tensor,
        weights: Tensor,
        bias: Tensor,
    ) -> Sequence[Tensor]:
        """Return the gradients by hidden states, weights and bias.

        Args:
            of_logits: from a chunk's logits and its events, numbered within
                it, the gradient by these logits.
            events: of N positions.
            hidden: `(N, H)`.
            weights: `(C, H)` or `(H, C)`.
            bias: `(C,)`.
        """
        wide = events.log_t.dtype

        def step(
            first: Any, size: int, by_hidden: Tensor, *sums: Tensor
        ) -> Any:
            by_weights, by_bias = sums
            part = self._weights(weights, first, size)
            logits = self._logits(hidden, part, bias, first, wide)
            by_logits = of_logits(logits, _within(events, first, size))
            by_column = ops.cast(ops.sum(by_logits, axis=0), bias.dtype)
            by_logits = ops.cast(by_logits, hidden.dtype)
            narrow = ops.cast(part, hidden.dtype)
            more = ops.cast(ops.matmul(by_logits, narrow), wide)
            by_part = ops.matmul(ops.transpose(by_logits), hidden)
            by_part = ops.cast(by_part, weights.dtype)
            if not self.rows:
                by_part = ops.transpose(by_part)
            place = (first, 0) if self.rows else (0, first)
            return (
                by_hidden + more,
                ops.slice_update(by_weights, place, by_part),
                ops.slice_update(by_bias, (first,), by_column),
            )

        by_hidden, by_weights, by_bias = self._over_chunks(
            step,
            ops.zeros_like(hidden, dtype=wide),
            ops.zeros_like(weights),
            ops.zeros_like(bias),
        )
        return ops.cast(by_hidden, hidden.dtype), by_weights, by_bias

    def _over_chunks(self, step: Callable[..., Any], *carried: Tensor) -> Any:
        """Return what `step(first class, size, *carried)` leaves of all.

        A loop, and not as many steps in a row, of which a compiler may run
        several at once, each with its own logits.
        """
        whole, left = divmod(self.classes, self.chunk)

        def of_number(number: Any, carried: Any) -> Any:
            return step(number * self.chunk, self.chunk, *carried)

        carried = ops.fori_loop(0, whole, of_number, carried)
        if left:
            carried = step(whole * self.chunk, left, *carried)
        return carried

    def _weights(self, weights: Tensor, first: Any, size: int) -> Tensor:
        """Return the weights of a chunk, `(size, H)`."""
        if self.rows:
            return ops.slice(weights, (first, 0), (size, weights.shape[1]))
        part = ops.slice(weights, (0, first), (weights.shape[0], size))
        return ops.transpose(part)

    @staticmethod
    def _logits(
        hidden: Tensor, part: Tensor, bias: Tensor, first: Any, dtype: str
    ) -> Tensor:
        """Return a chunk's logits, `(N, size)`."""
        size = part.shape[0]
        offset = ops.cast(ops.slice(bias, (first,), (size,)), hidden.dtype)
        part = ops.transpose(ops.cast(part, hidden.dtype))
        return ops.cast(ops.matmul(hidden, part) + offset, dtype)


def _within(events: Events, first: Any, size: int) -> Events:
    """Return the events with ids counted from `first`, known in the chunk."""
    ids = events.ids - first
    known = events.known & (ids >= 0) & (ids < size)
    return Events(ids, known, events.log_t, events.log_rest)
