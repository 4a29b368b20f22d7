"""PTLoss for a teacher that gives only k log-probabilities.

All classes without a value are merged into one event, called the rest. Teacher
and student are then distributions over k + 1 events, to which Eq. 7 applies
unchanged. With the student's logits z,

    log p_i = z_i - L,    log p_r = L_r - L,    L = log(sum_i exp z_i + exp L_r)

where L_r is the log-sum-exp over the classes without a value. So L_r is the
logit of the rest, and the loss is `pt_loss` on k + 1 logits. (Computing
`log(1 - sum_i p_i)` would lose precision if the sum is close to 1.)
"""

from collections.abc import Callable
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from keras_ptloss._backend import custom_gradient, visible_values
from keras_ptloss._math import log_teacher_probs
from keras_ptloss._validation import (
    SUM_TOLERANCE,
    check_choice,
    check_number,
    fail,
    shapes_differ,
)
from keras_ptloss.losses.base import (
    LOWEST,
    TINY,
    TeacherLoss,
    fixed_epsilon,
    read_student,
)
from keras_ptloss.losses.pt_loss import pt_loss

Tensor = Any
Tail = Literal["event", "renormalize"]

REST = -1  # The id of the rest. Lower ids are padding.


def top_k_pt_loss(
    y_true: Tensor,
    y_pred: Tensor,
    epsilon: Any,
    *,
    tail: Tail = "event",
    teacher_temperature: float = 1.0,
    from_logits: bool = False,
) -> Tensor:
    """Compute PTLoss on k + 1 events; see `TopKPTLoss`.

    Args:
        y_true: ids and natural log-probabilities, `(..., k, 2)`.
        y_pred: the student's probabilities, `(..., C)`, or logits with
            `from_logits`.
        epsilon: as in `TopKPTLoss`.
        tail: as in `TopKPTLoss`.
        teacher_temperature: as in `TopKPTLoss`.
        from_logits: as in `TopKPTLoss`.

    Returns:
        One loss per position, shape `(...)`, in nats.

    Raises:
        ValueError: in eager calls, if `y_true` is invalid. In compiled
            functions the loss of an invalid position is NaN, and ids outside
            the student's classes are part of the rest.

    Example:
        >>> import numpy as np
        >>> y_true = np.array([[[2, np.log(0.7)], [0, np.log(0.2)]]])
        >>> student = np.array([[0.25, 0.0, 0.6, 0.15]], "float32")
        >>> [round(float(v), 4) for v in top_k_pt_loss(y_true, student, 0.0)]
        [0.0227]
    """
    settings = _check_settings(epsilon, tail, teacher_temperature)
    student = read_student(y_pred, from_logits=from_logits)
    if not from_logits:
        student = ops.log(ops.maximum(student, TINY))
    num_classes = student.shape[-1]
    targets = _read_targets(y_true, student, num_classes)
    logits = ops.reshape(student, (-1, num_classes))
    event_logits = _event_logits(logits, _ids(targets))
    loss = _events_loss(targets, event_logits, num_classes, **settings)
    return ops.reshape(loss, ops.shape(student)[:-1])


@keras.saving.register_keras_serializable(package="keras_ptloss")
class TopKPTLoss(TeacherLoss):
    """PTLoss for a teacher of which only k log-probabilities are known.

    APIs of language models return the k most likely tokens at each position.
    `y_true` is a single float tensor `(..., k, 2)`, so it works with `fit`,
    masks, `sample_weight` and `tf.data`:

        y_true = np.stack([ids, log_probabilities], axis=-1)

    All other classes together are one more event, which has the remaining
    probability. On these k + 1 events

        loss = sum_e t_e (log t_e - log p_e)
             + sum_e t_e sum_m epsilon_m (1 - p_e)^m               (Eq. 7)

    With `epsilon = 0`, the loss lies between 0 and the KL divergence of the
    full distributions, and equals that divergence if k is the number of
    classes.

    An entry with id -1 is the log-probability of all other classes. Without
    such an entry, the other classes get the remaining probability. Entries with
    lower ids are padding, for positions with fewer than k classes. A position
    that has only padding has a loss of 0.

    Classes drawn from the teacher at random can be targets too: give each id
    once, with the logarithm of its share of the draws.

    Args:
        epsilon: coefficients: a number (order 1), or `(M,)`.
        tail: `"event"`, as above; or `"renormalize"`, which divides the
            probabilities of teacher and student by their sums over the k
            classes. The student's probability of all other classes then does
            not change the loss.
        teacher_temperature: a number above 0. The teacher's events become
            `softmax(log(max(t_e, 1e-7)) / teacher_temperature)`, unless it
            is 1.
        from_logits: whether `y_pred`, the student's output, holds logits.
        **kwargs: `reduction`, `name` and `dtype`, as in `PTLoss`. The reduction
            `"mean_with_sample_weight"` leaves positions of weight 0 out of the
            mean. `dtype` is float32 or float64; smaller types cannot hold ids.

    Example:
        >>> import keras, numpy as np
        >>> student = keras.Sequential([keras.layers.Dense(1000)])
        >>> student.compile("adam", loss=TopKPTLoss(0.0, from_logits=True))
        >>> ids = np.tile([7, 42, 999], (8, 5, 1))
        >>> log_probabilities = np.log(np.tile([0.5, 0.3, 0.1], (8, 5, 1)))
        >>> y_true = np.stack([ids, log_probabilities], axis=-1)
        >>> history = student.fit(np.ones((8, 5, 4)), y_true, verbose=0)

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), Eq. 7; Anshumann
        et al. 2025, Sparse Logit Sampling (https://arxiv.org/abs/2503.16870).
    """

    padding = float(REST - 1)

    def __init__(
        self,
        epsilon: Any,
        *,
        tail: Tail = "event",
        teacher_temperature: float = 1.0,
        from_logits: bool = False,
        name: str | None = "top_k_pt_loss",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            _check_settings(epsilon, tail, teacher_temperature),
            from_logits=from_logits,
            name=name,
            **kwargs,
        )
        if self.dtype not in ("float32", "float64"):
            fail("dtype", "'float32' or 'float64', which hold ids", self.dtype)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return one loss per position, `(...)`."""
        return top_k_pt_loss(
            y_true,
            y_pred,
            self.epsilon,
            tail=self.tail,
            teacher_temperature=self.teacher_temperature,
            from_logits=self.from_logits,
        )


def top_k_events(y_true: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the k + 1 events of a teacher as probabilities and labels.

    A search can then correct a language model, with the next tokens of a text
    as labels: the k tokens and all other tokens are k + 1 classes, and the
    label is the class of the actual next token. Use
    `ProxyTeacherSearch(RidgeSearch(steps=1))` and `ignore_class=-1`, because
    the top-k losses can only use a temperature and a shared epsilon.

    Args:
        y_true: as in `TopKPTLoss`.
        labels: the actual next tokens, integers, `(...)`. Positions with a
            negative label are left out.

    Returns:
        Probabilities `(N, k + 1)`, with all other tokens in the last column;
        and labels `(N,)`, which are -1 at positions that are left out or are
        padding.

    Example:
        >>> import numpy as np
        >>> y_true = [[[7, np.log(0.5)], [4, np.log(0.3)]]] * 2
        >>> probs, events = top_k_events(y_true, [4, 9])
        >>> probs.round(2).tolist(), events.tolist()
        ([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]], [1, 2])
    """
    y_true = np.asarray(y_true, "float64")
    labels = np.asarray(labels)
    leading = y_true.shape[:-2]
    _check_targets(y_true, leading, np.inf)
    if labels.shape != leading or labels.dtype.kind not in "iu":
        fail("labels", f"integers of shape {leading}, as y_true has", labels)
    y_true, labels = y_true.reshape(-1, *y_true.shape[-2:]), labels.reshape(-1)
    ids = y_true[..., 0]
    probs, _ = _events(y_true, np.inf, "event", 1.0, np)
    # Stored soft labels have a column of the probability of all classes that
    # are not listed. `_events` returns this probability in its last column.
    used = (ids >= 0).any(axis=0)
    probs, given = probs[:, [*used, True]], ids[:, used] == labels[:, None]
    rest = probs.shape[-1] - 1
    events = np.where(given.any(axis=-1), given.argmax(axis=-1), rest)
    left_out = (labels < 0) | (ids < REST).all(axis=-1)
    return probs, np.where(left_out, -1, events)


def fused_top_k_pt_loss(
    y_true: Tensor,
    hidden: Tensor,
    weights: Tensor,
    epsilon: Any,
    *,
    bias: Tensor = None,
    tail: Tail = "event",
    teacher_temperature: float = 1.0,
    chunk: int = 4096,
) -> Tensor:
    """Compute `top_k_pt_loss` of `hidden @ weights + bias` in less memory.

    The logits `(positions, C)` are computed in chunks of the vocabulary, once
    for the loss and again for its gradient. Call this function where a model
    has its hidden states, for example in `compute_loss`.

    Args:
        y_true: as in `TopKPTLoss`.
        hidden: the inputs of the head, `(..., H)`. The head is computed in
            their dtype, and the loss in float32 or better.
        weights: the head's weights: `(H, C)`, as in a `Dense` layer, or
            `(C, H)`, as in an embedding. H and C must differ.
        epsilon: as in `TopKPTLoss`.
        bias: the head's bias, `(C,)`, or None.
        tail: as in `TopKPTLoss`.
        teacher_temperature: as in `TopKPTLoss`.
        chunk: number of classes in a chunk.

    Returns:
        One loss per position, shape `(...)`, in nats. It has gradients with
        respect to `hidden`, `weights` and `bias`.

    Example:
        >>> import keras, numpy as np
        >>> embed = keras.layers.Embedding(1000, 8)
        >>> class Student(keras.Sequential):
        ...     def compute_loss(self, x, y, y_pred, *args, **kwargs):
        ...         head = embed.embeddings  # (1000, 8); y_pred is hidden
        ...         loss = fused_top_k_pt_loss(y, y_pred, head, 0.0)
        ...         return keras.ops.mean(loss)
        >>> student = Student([keras.Input((5,)), embed])
        >>> student.compile("adam")
        >>> y_true = np.tile(
        ...     [[7, np.log(0.6)], [42, np.log(0.3)]], (8, 5, 1, 1)
        ... )
        >>> history = student.fit(np.ones((8, 5)), y_true, verbose=0)

    Reference:
        Wijmans et al. 2024, Cut Your Losses (https://arxiv.org/abs/2411.09009),
        for cross-entropy.
    """
    settings = _check_settings(epsilon, tail, teacher_temperature)
    hidden = ops.convert_to_tensor(hidden)
    weights = ops.convert_to_tensor(weights)
    size, shape = hidden.shape[-1], tuple(weights.shape)
    if len(shape) != 2 or size not in shape or shape[0] == shape[1]:
        fail(
            "weights",
            f"of shape ({size}, C) or (C, {size}) for hidden states with "
            f"{size} units, where C is not {size}",
            shape,
        )
    if shape[1] == size:
        weights = ops.transpose(weights)
    num_classes = weights.shape[1]
    if bias is None:
        bias = ops.zeros((num_classes,), weights.dtype)
    targets = _read_targets(y_true, hidden, num_classes)
    event_logits = _head_event_logits(
        ops.reshape(hidden, (-1, size)),
        weights,
        ops.convert_to_tensor(bias),
        _ids(targets),
        min(chunk, num_classes),
    )
    loss = _events_loss(targets, event_logits, num_classes, **settings)
    return ops.reshape(loss, ops.shape(hidden)[:-1])


def _check_settings(
    epsilon: Any, tail: Any, temperature: Any
) -> dict[str, Any]:
    """Return the checked settings of a loss, by name."""
    values = fixed_epsilon(epsilon)
    if values.ndim > 1:
        fail("epsilon", "shared by the classes: a number or (order,)", epsilon)
    check_choice("tail", tail, ("event", "renormalize"))
    temperature = check_number("teacher_temperature", temperature, above=0.0)
    return {
        "epsilon": values,
        "tail": tail,
        "teacher_temperature": temperature,
    }


def _read_targets(y_true: Tensor, student: Tensor, num_classes: int) -> Tensor:
    """Return checked targets `(N, k, 2)` in float32 or better."""
    y_true = ops.convert_to_tensor(y_true)
    _check_targets(y_true, student.shape[:-1], num_classes)
    wide = keras.backend.result_type(student.dtype, "float32")
    y_true = ops.cast(y_true, wide)
    return ops.reshape(y_true, (-1, ops.shape(y_true)[-2], 2))


def _check_targets(y_true: Any, leading: Any, num_classes: float) -> None:
    """Raise a `ValueError` if the shape or visible values are wrong."""
    shape = tuple(y_true.shape)
    if shapes_differ(shape, (*leading, None, 2)) or 0 in shape[-2:]:
        raise ValueError(
            "`y_true` must have shape (..., k, 2): k ids and log-probabilities "
            "for each position of the student, as from np.stack([ids, "
            "log_probabilities], axis=-1). Received: y_true of shape "
            f"{shape} for positions of shape {tuple(leading)}"
        )
    seen = visible_values(y_true)
    if seen is None:
        return
    rows = seen.astype("float64").reshape(-1, *shape[-2:])
    invalid = _invalid(rows, np) | (rows[..., 0] >= num_classes).any(axis=-1)
    if invalid.any():
        row = int(np.argmax(invalid))
        raise ValueError(
            f"`y_true` must hold whole ids below {num_classes}, without "
            "repetition, and natural logarithms of probabilities that sum "
            f"to at most 1. Received: ids {rows[row, :, 0].tolist()} with "
            f"values {rows[row, :, 1].tolist()} at position {row} "
            f"({invalid.sum()} of {len(rows)} positions are invalid)"
        )


def _invalid(y_true: Tensor, xp: Any) -> Tensor:
    """Return which positions `(N,)` of targets `(N, k, 2)` are invalid."""
    ids, values = y_true[..., 0], y_true[..., 1]
    mass = xp.where(ids >= REST, xp.exp(xp.minimum(values, 1.0)), 0.0)
    ordered = xp.sort(ids, axis=-1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= REST)
    # Written so that NaN is invalid.
    whole = xp.all(ids == xp.round(ids), axis=-1)
    small = xp.sum(mass, axis=-1) <= 1.0 + SUM_TOLERANCE
    return ~(whole & small & ~xp.any(twice, axis=-1))


def _ids(targets: Tensor) -> Tensor:
    """Return the ids of targets `(N, k, 2)` as int32."""
    return ops.cast(ops.round(targets[..., 0]), "int32")


def _events(
    y_true: Tensor, num_classes: float, tail: str, temperature: float, xp: Any
) -> tuple[Tensor, Tensor]:
    """Return the teacher's probabilities of its events, by NumPy or `ops`.

    Returns two arrays `(N, k + 1)`, with the rest in the last column: the
    probabilities, and which of the columns are events. Padding is not an event.
    A class that the student does not have is part of the rest.
    """
    ids = y_true[..., 0]
    # Padding may have any value, including NaN.
    values = xp.where(ids >= REST, y_true[..., 1], LOWEST)
    known = (ids >= 0.0) & (ids < num_classes)
    t = xp.where(known, xp.exp(values), 0.0)
    outside = xp.where(known, 0.0, xp.exp(values))
    rest = xp.where(
        xp.any(ids == REST, axis=-1, keepdims=True),
        xp.sum(outside, axis=-1, keepdims=True),
        xp.maximum(1.0 - xp.sum(t, axis=-1, keepdims=True), 0.0),
    )
    count = xp.sum(xp.where(known, 1.0, 0.0), axis=-1, keepdims=True)
    has_rest = (count < num_classes) & (tail == "event")
    event = xp.concatenate([known, has_rest], axis=-1)
    t = xp.where(event, xp.concatenate([t, rest], axis=-1), 0.0)
    total = xp.sum(t, axis=-1, keepdims=True)
    t = t / xp.where(total > 0.0, total, 1.0)
    if temperature != 1.0:
        z = xp.where(event, log_teacher_probs(t, xp) / temperature, LOWEST)
        t = xp.where(total > 0.0, ops.softmax(z), 0.0)
    return t, event


def _events_loss(
    targets: Tensor,
    event_logits: Tensor,
    num_classes: int,
    *,
    epsilon: np.ndarray,
    tail: str,
    teacher_temperature: float,
) -> Tensor:
    """Return Eq. 7 on the events, `(N,)`, with the student's event logits."""
    t, event = _events(targets, num_classes, tail, teacher_temperature, ops)
    invalid = ops.expand_dims(_invalid(targets, ops), -1)
    return pt_loss(
        ops.where(invalid, float("nan"), t),
        ops.where(event, event_logits, LOWEST),
        epsilon,
        from_logits=True,
    )


# Event logits, `(N, k + 1)`: the logits of k ids, then L_r. Their gradients are
# explicit, because automatic differentiation takes twice the memory.


def _split(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Separate the logits `(N, size)` with an id, `(N, k)`, from the others.

    Returns:
        The logits of the ids, `(N, k)`, with `LOWEST` for an id that is not a
        column; all logits, with `LOWEST` at the ids, `(N, size + 1)`; and the
        places of the ids in the latter, `(N k, 2)`.
    """
    size = logits.shape[-1]
    # Ids without a column are put into one more column.
    columns = ops.where((ids >= 0) & (ids < size), ids, size)
    # `ops.full_like` fails on PyTorch's device "meta" (Keras 3.15).
    nothing = LOWEST * ops.ones_like(logits[:, :1])
    logits = ops.concatenate([logits, nothing], axis=-1)
    rows = ops.arange(ops.shape(ids)[0], dtype="int32")[:, None]
    places = ops.stack([ops.broadcast_to(rows, ops.shape(ids)), columns], -1)
    places = ops.reshape(places, (-1, 2))
    removed = LOWEST * ops.ones_like(places[:, 0], dtype=logits.dtype)
    others = ops.scatter_update(logits, places, removed)
    return ops.take_along_axis(logits, columns, axis=-1), others, places


def _by_logits(
    logits: Tensor, ids: Tensor, rest: Tensor, upstream: Tensor
) -> Tensor:
    """Return the gradient by the logits of all classes or of one chunk.

    With u the upstream gradient,

        d / d z_i = u_i,    d / d z_c = u_r exp(z_c - L_r) for the others.
    """
    _, others, places = _split(logits, ids)
    gradient = upstream[:, -1:] * ops.exp(others - rest)
    of_given = ops.reshape(upstream[:, :-1], (-1,))
    return ops.scatter_update(gradient, places, of_given)[:, :-1]


def _event_logits(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the event logits of logits `(N, C)`."""

    @custom_gradient
    def project(logits: Tensor) -> Any:
        given, others, _ = _split(logits, ids)
        rest = ops.logsumexp(others, axis=-1, keepdims=True)

        def gradient(upstream: Tensor) -> Tensor:
            return _by_logits(logits, ids, rest, upstream)

        return ops.concatenate([given, rest], axis=-1), gradient

    return project(logits)


def _head_event_logits(
    hidden: Tensor, weights: Tensor, bias: Tensor, ids: Tensor, chunk: int
) -> Tensor:
    """Return the event logits of `hidden @ weights + bias`, chunk by chunk.

    The gradient computes the logits once more.
    """
    units, num_classes = weights.shape
    wide = keras.backend.result_type(hidden.dtype, "float32")

    @custom_gradient
    def project(hidden: Tensor, weights: Tensor, bias: Tensor) -> Any:
        def compute(first: Any, size: int) -> tuple[Tensor, Tensor]:
            """Return the weights and the logits of a chunk of classes."""
            w = ops.slice(weights, (0, first), (units, size))
            w = ops.cast(w, hidden.dtype)
            b = ops.cast(ops.slice(bias, (first,), (size,)), hidden.dtype)
            return w, ops.cast(ops.matmul(hidden, w) + b, wide)

        def forward(first: Any, size: int, given: Tensor, rest: Tensor) -> Any:
            _, logits = compute(first, size)
            found, others, _ = _split(logits, ids - first)
            more = ops.logsumexp(others, axis=-1, keepdims=True)
            return ops.maximum(given, found), ops.logaddexp(rest, more)

        lowest = LOWEST * ops.ones_like(ids, dtype=wide)
        given, rest = _over_chunks(
            forward, num_classes, chunk, lowest, lowest[:, :1]
        )

        def gradient(upstream: Tensor) -> tuple[Tensor, ...]:
            def backward(first: Any, size: int, *sums: Tensor) -> Any:
                by_hidden, by_weights, by_bias = sums
                w, logits = compute(first, size)
                by_z = _by_logits(logits, ids - first, rest, upstream)
                by_b = ops.cast(ops.sum(by_z, axis=0), bias.dtype)
                by_z = ops.cast(by_z, hidden.dtype)
                by_h = ops.cast(ops.matmul(by_z, ops.transpose(w)), wide)
                by_w = ops.matmul(ops.transpose(hidden), by_z)
                by_w = ops.cast(by_w, weights.dtype)
                return (
                    by_hidden + by_h,
                    ops.slice_update(by_weights, (0, first), by_w),
                    ops.slice_update(by_bias, (first,), by_b),
                )

            by_hidden, by_weights, by_bias = _over_chunks(
                backward,
                num_classes,
                chunk,
                ops.zeros_like(hidden, dtype=wide),
                ops.zeros_like(weights),
                ops.zeros_like(bias),
            )
            return ops.cast(by_hidden, hidden.dtype), by_weights, by_bias

        return ops.concatenate([given, rest], axis=-1), gradient

    return project(hidden, weights, bias)


def _over_chunks(
    step: Callable[..., Any], num_classes: int, chunk: int, *carried: Tensor
) -> Any:
    """Apply `carried = step(first class, size, *carried)` to all chunks.

    This is a loop, because a compiler may run unrolled steps at the same time,
    and each step needs memory for its logits.
    """
    whole, left = divmod(num_classes, chunk)
    carried = ops.fori_loop(
        0, whole, lambda i, carried: step(i * chunk, chunk, *carried), carried
    )
    return step(whole * chunk, left, *carried) if left else carried
