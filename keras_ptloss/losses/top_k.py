"""PTLoss for a teacher that gives k log-probabilities and nothing else.

All classes without a value are merged into one event, the rest. Teacher and
student are then distributions over k + 1 events, on which Eq. 7 holds as it
stands. With the student's logits z,

    log p_i = z_i - L,    log p_r = L_r - L,    L = log(sum_i exp z_i + exp L_r)

where L_r is the log-sum-exp over the classes without a value. So L_r is the
logit of the rest, and the loss is `pt_loss` on k + 1 logits. (The digits of
`log(1 - sum_i p_i)` would be lost where the k classes have nearly all.)
"""

from collections.abc import Callable
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from keras_ptloss._backend import visible_values
from keras_ptloss._math import log_teacher_probs
from keras_ptloss._validation import (
    SUM_TOLERANCE,
    check_choice,
    check_constant_epsilon,
    check_count,
    check_flag,
    check_number,
    fail,
    shapes_differ,
)
from keras_ptloss.losses.base import (
    LOWEST,
    TINY,
    TeacherLoss,
    read_student,
    refuse_variables,
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
        epsilon: coefficients: a number (order 1), or `(M,)`.
        tail: `"event"` or `"renormalize"`.
        teacher_temperature: a number above 0.
        from_logits: whether `y_pred` holds logits.

    Returns:
        One loss per position, shape `(...)`, in nats.

    Raises:
        ValueError: if an argument is invalid, or (in eager calls) if `y_true`
            is. In compiled functions the loss of an invalid position is NaN,
            and ids that the student does not have belong to the rest.

    Example:
        >>> import numpy as np
        >>> y_true = np.array([[[2, np.log(0.7)], [0, np.log(0.2)]]])
        >>> student = np.array([[0.25, 0.0, 0.6, 0.15]], "float32")
        >>> [round(float(v), 4) for v in top_k_pt_loss(y_true, student, 0.0)]
        [0.0227]

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), Eq. 7.
    """
    check_flag("from_logits", from_logits)
    settings = _check_settings(epsilon, tail, teacher_temperature)
    student = read_student(y_pred, from_logits=from_logits)
    if not from_logits:
        student = ops.log(ops.maximum(student, TINY))
    y_true = _read_targets(y_true, student, student.shape[-1])
    leading = ops.shape(student)[:-1]
    logits = ops.reshape(student, (-1, student.shape[-1]))
    targets = ops.reshape(y_true, (-1, ops.shape(y_true)[-2], 2))
    event_logits = _event_logits(logits, _ids(targets))
    loss = _events_loss(targets, event_logits, student.shape[-1], **settings)
    return ops.reshape(loss, leading)


@keras.saving.register_keras_serializable(package="keras_ptloss")
class TopKPTLoss(TeacherLoss):
    """PTLoss for a teacher of which only k log-probabilities are known.

    APIs of language models give the likeliest k tokens at each position.
    `y_true` is one float tensor `(..., k, 2)`, which `fit`, masks,
    `sample_weight` and `tf.data` take as any other:

        y_true = np.stack([ids, log_probabilities], axis=-1)

    All other classes together are one more event, with the probability that
    remains. On these k + 1 events

        loss = sum_e t_e (log t_e - log p_e)
             + sum_e t_e sum_m epsilon_m (1 - p_e)^m               (Eq. 7)

    With `epsilon = 0` the loss is at least 0, at most the KL divergence of the
    full distributions, and equal to it if k is the number of classes.

    An entry with id -1 is the log-probability of all other classes. Without
    one, the other classes have what the k classes leave of 1. Entries with
    lower ids are padding, for positions with fewer than k classes. A position
    of padding alone costs 0. Positions are divided by their sum.

    Classes drawn from the teacher at random are targets too: give each id once,
    with the logarithm of its share of the draws, and `tail="event"`.

    Args:
        epsilon: coefficients: a number (order 1), or `(M,)`.
        tail: `"event"`, as above; or `"renormalize"`, which divides teacher and
            student by their sums over the k classes and leaves the student's
            probability of all others free.
        teacher_temperature: a number above 0. The teacher's events become
            `softmax(log(max(t_e, 1e-7)) / teacher_temperature)`, unless it
            is 1.
        from_logits: whether `y_pred`, the student's output, holds logits.
        reduction: as in `keras.losses.Loss`. `"mean_with_sample_weight"` leaves
            positions of weight 0 out of the mean.
        name: name of the loss.
        dtype: `"float32"` or `"float64"`. Smaller types cannot hold ids.

    Raises:
        ValueError: if an argument is invalid. When called: see `top_k_pt_loss`.

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
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "top_k_pt_loss",
        dtype: Any = None,
    ) -> None:
        refuse_variables(
            epsilon=epsilon, teacher_temperature=teacher_temperature
        )
        super().__init__(
            _check_settings(epsilon, tail, teacher_temperature),
            from_logits=from_logits,
            reduction=reduction,
            name=name,
            dtype=dtype,
        )
        if self.dtype not in ("float32", "float64"):
            fail("dtype", "'float32' or 'float64', which hold ids", self.dtype)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return one loss per position, `(...)`."""
        loss = top_k_pt_loss(
            y_true,
            y_pred,
            self.epsilon,
            tail=self.tail,
            teacher_temperature=self.teacher_temperature,
            from_logits=self.from_logits,
        )
        return ops.cast(loss, self.dtype)


def top_k_events(y_true: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the k + 1 events of a teacher as probabilities and labels.

    The labels of a text are its next tokens, so that a search for a language
    model needs no other labels. The k tokens and the rest are k + 1 classes,
    and the label tells which of them came. Only a temperature and a shared
    epsilon can be used by the top-k losses, so stop after the first step:

        probs, events = top_k_events(y_true, next_tokens)
        search = ProxyTeacherSearch(RidgeSearch(steps=1))
        result = search.search(probs, events, ignore_class=-1)
        loss = TopKPTLoss(
            result.epsilon, teacher_temperature=result.temperature
        )

    Args:
        y_true: ids and natural log-probabilities, `(..., k, 2)`, as
            `TopKPTLoss` takes them.
        labels: the tokens that came, integers, `(...)`. Positions with a
            negative one are left out.

    Returns:
        Probabilities `(N, k + 1)`, the last one that of the rest; and labels,
        `(N,)`, -1 at positions that are left out or consist of padding.

    Raises:
        ValueError: if an argument is invalid.

    Example:
        >>> import numpy as np
        >>> y_true = [[[7, np.log(0.5)], [4, np.log(0.3)]]] * 2
        >>> probs, events = top_k_events(y_true, [4, 9])
        >>> probs.round(2).tolist(), events.tolist()
        ([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]], [1, 2])
    """
    y_true = np.asarray(y_true, "float64")
    labels = np.asarray(labels)
    _check_targets(y_true, None, np.inf)
    if labels.shape != y_true.shape[:-2] or labels.dtype.kind not in "iu":
        fail(
            "labels",
            f"integers of shape {y_true.shape[:-2]}, one for each position of "
            "y_true",
            labels,
        )
    y_true, labels = y_true.reshape(-1, *y_true.shape[-2:]), labels.reshape(-1)
    ids = y_true[..., 0]
    probs, _ = _events(y_true, np.inf, "event", 1.0, np)
    # Stored soft labels have a column of the rest, which is the last one here.
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

    The logits `(positions, C)` and their gradient are most of the memory in
    training a language model. This function computes them in chunks of the
    vocabulary, forward and once more backward. Call it where a model has its
    hidden states, in `compute_loss` for example.

    Args:
        y_true: ids and natural log-probabilities, `(..., k, 2)`, as
            `TopKPTLoss` takes them.
        hidden: the inputs of the head, `(..., H)`. The head is computed in
            their dtype, the loss in float32 or better.
        weights: the head's weights: `(H, C)`, as in a `Dense` layer, or
            `(C, H)`, as in an embedding. H and C must differ.
        epsilon: coefficients: a number (order 1), or `(M,)`.
        bias: the head's bias, `(C,)`, or None.
        tail: `"event"` or `"renormalize"`.
        teacher_temperature: a number above 0.
        chunk: number of classes in a chunk.

    Returns:
        One loss per position, shape `(...)`, in nats. It has gradients with
        respect to `hidden`, `weights` and `bias`.

    Raises:
        ValueError: as `top_k_pt_loss`.

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
        Wijmans et al. 2024, Cut Your Losses (https://arxiv.org/abs/2411.09009),
        for cross-entropy.
    """
    settings = _check_settings(epsilon, tail, teacher_temperature)
    check_count("chunk", chunk)
    hidden = ops.convert_to_tensor(hidden)
    weights = ops.convert_to_tensor(weights)
    size, shape = hidden.shape[-1], tuple(weights.shape)
    if len(shape) != 2 or size not in shape or shape[0] == shape[1]:
        fail(
            "weights",
            f"of shape ({size}, C) or (C, {size}) for hidden states with "
            f"{size} units, where C is another number",
            shape,
        )
    num_classes = shape[0] if shape[1] == size else shape[1]
    if bias is None:
        bias = ops.zeros((num_classes,), weights.dtype)
    y_true = _read_targets(y_true, hidden, num_classes)
    targets = ops.reshape(y_true, (-1, ops.shape(y_true)[-2], 2))
    event_logits = _head_event_logits(
        ops.reshape(hidden, (-1, size)),
        weights,
        ops.convert_to_tensor(bias),
        _ids(targets),
        min(chunk, num_classes),
        y_true.dtype,
    )
    loss = _events_loss(targets, event_logits, num_classes, **settings)
    return ops.reshape(loss, ops.shape(hidden)[:-1])


def _check_settings(
    epsilon: Any, tail: Any, temperature: Any
) -> dict[str, Any]:
    values = check_constant_epsilon(epsilon)
    if values.ndim > 1:
        fail("epsilon", "shared by the classes: a number or (order,)", epsilon)
    values.setflags(write=False)
    check_choice("tail", tail, ("event", "renormalize"))
    value = check_number("teacher_temperature", temperature, at_least=0.0)
    if value == 0.0:
        fail("teacher_temperature", "above 0", temperature)
    return {"epsilon": values, "tail": tail, "teacher_temperature": value}


def _read_targets(y_true: Tensor, student: Tensor, num_classes: int) -> Tensor:
    """Return `y_true` in float32 or better, checked where it has values."""
    y_true = ops.convert_to_tensor(y_true)
    wide = keras.backend.result_type(student.dtype, "float32")
    seen = visible_values(y_true)
    _check_targets(y_true if seen is None else seen, student, num_classes)
    return ops.cast(y_true, wide)


def _check_targets(y_true: Any, student: Any, num_classes: float) -> None:
    """Raise a `ValueError` if the shape is wrong or visible values are."""
    shape = tuple(y_true.shape)
    leading = shape[:-2] if student is None else student.shape[:-1]
    if shapes_differ(shape, (*leading, None, 2)) or 0 in shape[-2:]:
        beside = "" if student is None else f" beside {tuple(student.shape)}"
        raise ValueError(
            "`y_true` must have shape (..., k, 2), ids and log-probabilities "
            "for each position of the student: np.stack([ids, "
            "log_probabilities], axis=-1). Received: y_true of shape "
            f"{shape}{beside}"
        )
    if not isinstance(y_true, np.ndarray):
        return
    rows = y_true.astype("float64").reshape(-1, *shape[-2:])
    invalid = _invalid(rows, np) | (rows[..., 0] >= num_classes).any(axis=-1)
    if invalid.any():
        row = int(np.argmax(invalid))
        below = "" if np.isinf(num_classes) else f" below {num_classes}"
        raise ValueError(
            f"`y_true` must hold whole ids{below}, each only once in a "
            "position, and natural logarithms of probabilities that sum to at "
            f"most 1. Received: y_true with ids {rows[row, :, 0].tolist()} and "
            f"values {rows[row, :, 1].tolist()} at position {row} "
            f"({invalid.sum()} of {len(rows)} positions are invalid)"
        )


def _invalid(y_true: Tensor, xp: Any) -> Tensor:
    """Return which positions `(N,)` of targets `(N, k, 2)` are invalid."""
    ids, values = y_true[..., 0], y_true[..., 1]
    entry = ids >= REST
    mass = xp.where(entry, xp.exp(xp.minimum(values, 1.0)), 0.0)
    ordered = xp.sort(ids, axis=-1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= REST)
    # Written so that NaN is invalid.
    whole = xp.all(ids == xp.round(ids), axis=-1)
    small = xp.sum(mass, axis=-1) <= 1.0 + SUM_TOLERANCE
    return ~(whole & small & ~xp.any(twice, axis=-1))


def _events(
    y_true: Tensor, num_classes: float, tail: str, temperature: float, xp: Any
) -> tuple[Tensor, Tensor]:
    """Return the teacher's events.

    Args:
        y_true: ids and log-probabilities, `(N, k, 2)`.
        num_classes: number of the student's classes.
        tail: as in `TopKPTLoss`.
        temperature: of the teacher.
        xp: `numpy` or `keras.ops`.

    Returns:
        Probabilities, `(N, k + 1)`, the last one that of the rest; and which
        of them are events. Padding is none, nor is a class that the student
        does not have, whose probability belongs to the rest.
    """
    ids = y_true[..., 0]
    # Padding may have any value, NaN too.
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
    y_true: Tensor,
    event_logits: Tensor,
    num_classes: int,
    *,
    epsilon: np.ndarray,
    tail: str,
    teacher_temperature: float,
) -> Tensor:
    """Return Eq. 7 on the events, `(N,)`.

    Args:
        y_true: ids and log-probabilities, `(N, k, 2)`.
        event_logits: the student's, `(N, k + 1)`; the last one is L_r.
        num_classes: number of the student's classes.
        epsilon: coefficients, `(M,)`.
        tail: as in `TopKPTLoss`.
        teacher_temperature: a number above 0.
    """
    t, event = _events(y_true, num_classes, tail, teacher_temperature, ops)
    invalid = ops.expand_dims(_invalid(y_true, ops), -1)
    return pt_loss(
        ops.where(invalid, float("nan"), t),
        ops.where(event, event_logits, LOWEST),
        epsilon,
        from_logits=True,
    )


def _ids(y_true: Tensor) -> Tensor:
    """Return the ids of targets `(N, k, 2)` as int32."""
    return ops.cast(ops.round(y_true[..., 0]), "int32")


def _split(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Separate the logits with an id from the others.

    Args:
        logits: `(N, size)`.
        ids: int32, `(N, k)`; those that are no column of `logits` do not count.

    Returns:
        The logits of the ids, `(N, k)`, `LOWEST` where an id does not count;
        the logits, `LOWEST` at the ids, `(N, size + 1)`; and where the ids are
        in these, `(N k, 2)`.
    """
    size = logits.shape[-1]
    # Ids that do not count are put into one more column.
    columns = ops.where((ids >= 0) & (ids < size), ids, size)
    nothing = ops.full_like(logits[:, :1], LOWEST)
    logits = ops.concatenate([logits, nothing], axis=-1)
    rows = ops.arange(ops.shape(ids)[0], dtype="int32")[:, None]
    places = ops.stack([ops.broadcast_to(rows, ops.shape(ids)), columns], -1)
    places = ops.reshape(places, (-1, 2))
    removed = ops.full_like(places[:, 0], LOWEST, dtype=logits.dtype)
    others = ops.scatter_update(logits, places, removed)
    return ops.take_along_axis(logits, columns, axis=-1), others, places


def _logsumexp(x: Tensor) -> Tensor:
    return ops.logsumexp(x, axis=-1, keepdims=True)


def _by_logits(
    logits: Tensor, ids: Tensor, rest: Tensor, upstream: Tensor
) -> Tensor:
    """Return the gradient of event logits with respect to logits.

    With u the upstream gradient,

        d / d z_i = u_i,    d / d z_c = u_r exp(z_c - L_r) for the others.

    Args:
        logits: `(N, size)`, of all classes or of a chunk.
        ids: int32, `(N, k)`, counted from the first of these classes.
        rest: L_r of all classes, `(N, 1)`.
        upstream: `(N, k + 1)`.
    """
    _, others, places = _split(logits, ids)
    gradient = upstream[:, -1:] * ops.exp(others - rest)
    of_given = ops.reshape(upstream[:, :-1], (-1,))
    return ops.scatter_update(gradient, places, of_given)[:, :-1]


def _event_logits(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the event logits `(N, k + 1)` of logits `(N, C)`.

    The gradient is written out because autodiff takes twice the memory.
    """

    @ops.custom_gradient
    def project(logits: Tensor) -> Any:
        given, others, _ = _split(logits, ids)
        rest = _logsumexp(others)

        def gradient(*args: Tensor, upstream: Tensor = None) -> Any:
            if upstream is None:  # PyTorch passes it by keyword.
                (upstream,) = args
            return _by_logits(logits, ids, rest, upstream)

        return ops.concatenate([given, rest], axis=-1), gradient

    return project(logits)


def _head_event_logits(
    hidden: Tensor,
    weights: Tensor,
    bias: Tensor,
    ids: Tensor,
    chunk: int,
    dtype: str,
) -> Tensor:
    """Return the event logits `(N, k + 1)` of a head, chunk by chunk.

    The gradient computes the logits once more.

    Args:
        hidden: `(N, H)`.
        weights: `(H, C)` or `(C, H)`.
        bias: `(C,)`.
        ids: int32, `(N, k)`.
        chunk: number of classes in a chunk.
        dtype: dtype of the logits.
    """
    axis = 0 if weights.shape[1] == hidden.shape[1] else 1  # of the classes

    def part(weights: Tensor, bias: Tensor, first: Any, size: int) -> Any:
        """Return the weights `(H, size)` and bias of a chunk."""
        start, sizes = [0, 0], list(weights.shape)
        start[axis], sizes[axis] = first, size
        w = ops.slice(weights, start, sizes)
        w = ops.cast(ops.transpose(w) if axis == 0 else w, hidden.dtype)
        return w, ops.cast(ops.slice(bias, (first,), (size,)), hidden.dtype)

    @ops.custom_gradient
    def project(hidden: Tensor, weights: Tensor, bias: Tensor) -> Any:
        def forward(first: Any, size: int, given: Tensor, rest: Tensor) -> Any:
            w, b = part(weights, bias, first, size)
            logits = ops.cast(ops.matmul(hidden, w) + b, dtype)
            found, others, _ = _split(logits, ids - first)
            rest = ops.logaddexp(rest, _logsumexp(others))
            return ops.maximum(given, found), rest

        lowest = ops.full_like(ids, LOWEST, dtype=dtype)
        given, rest = _over_chunks(
            forward, bias.shape[0], chunk, lowest, lowest[:, :1]
        )

        def gradient(*args: Tensor, upstream: Tensor = None) -> Any:
            if upstream is None:  # PyTorch passes it by keyword.
                (upstream,) = args

            def backward(
                first: Any,
                size: int,
                by_hidden: Any,
                by_weights: Any,
                by_b: Any,
            ) -> Any:
                w, b = part(weights, bias, first, size)
                logits = ops.cast(ops.matmul(hidden, w) + b, dtype)
                by_logits = _by_logits(logits, ids - first, rest, upstream)
                by_bias = ops.cast(ops.sum(by_logits, axis=0), bias.dtype)
                by_logits = ops.cast(by_logits, hidden.dtype)
                by_hidden = by_hidden + ops.cast(
                    ops.matmul(by_logits, ops.transpose(w)), dtype
                )
                by_part = ops.matmul(ops.transpose(hidden), by_logits)
                by_part = ops.transpose(by_part) if axis == 0 else by_part
                start: list[Any] = [0, 0]
                start[axis] = first
                return (
                    by_hidden,
                    ops.slice_update(
                        by_weights, start, ops.cast(by_part, weights.dtype)
                    ),
                    ops.slice_update(by_b, (first,), by_bias),
                )

            by_hidden, by_weights, by_bias = _over_chunks(
                backward,
                bias.shape[0],
                chunk,
                ops.zeros_like(hidden, dtype=dtype),
                ops.zeros_like(weights),
                ops.zeros_like(bias),
            )
            return ops.cast(by_hidden, hidden.dtype), by_weights, by_bias

        return ops.concatenate([given, rest], axis=-1), gradient

    return project(hidden, weights, bias)


def _over_chunks(
    step: Callable[..., Any], num_classes: int, chunk: int, *carried: Tensor
) -> Any:
    """Return what `step(first class, size, *carried)` makes of all chunks.

    This is a loop, because a compiler may run unrolled steps at the same time,
    each with logits of its own.
    """
    whole, left = divmod(num_classes, chunk)
    carried = ops.fori_loop(
        0, whole, lambda i, carried: step(i * chunk, chunk, *carried), carried
    )
    return step(whole * chunk, left, *carried) if left else carried
