"""A teacher's k + 1 events: the k classes it gives, and all others together.

With `t_i` of the classes given, `t_r = 1 - sum_i t_i` of all others, r, and the
student's logits z, Eq. 7 of the merged distributions is

    loss = sum_e t_e (log t_e - log p_e + sum_m eps_m (1 - p_e)^m)
    log p_i = z_i - L,    log p_r = L_r - L,    L = log(exp L_k + exp L_r)

with `L_k` and `L_r` the log-sum-exp over the classes given and over the others.
`1 - sum_i p_i` would have no digits left where the k have nearly everything.
With `w_e = t_e (1 + p_e h(1 - p_e))`, h the slope of the perturbation:

    d loss / d z_i = p_i sum_e w_e - w_i
    d loss / d z_c = (p_r sum_e w_e - w_r) exp(z_c - L_r)    of the others
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_ptloss._backend import maximum, minimum, visible_values
from keras_ptloss._calibration import LOWEST, TINY
from keras_ptloss._checks import SUM_TOLERANCE, shapes_differ
from keras_ptloss._perturbation import perturbation, slope

Tensor = Any

REST = -1  # the id of all other classes; what is below is padding
LARGEST_ID = 2**24  # above it float32 has no room for every integer
TAILS = ("event", "renormalize", "teacher_only", "spread")


class Events(NamedTuple):
    """What the teacher says of a position, as probabilities that sum to 1.

    Attributes:
        ids: classes, int32, `(N, K)`; any where `known` is false.
        known: whether an entry is a class, `(N, K)`.
        log_t: its `log t_i`, `(N, K)`; `LOWEST` where it is none.
        log_rest: `log t_r`, `(N, 1)`; `LOWEST` where all others have nothing.
    """

    ids: Tensor
    known: Tensor
    log_t: Tensor
    log_rest: Tensor


def read_events(
    y_true: Tensor, classes: Any, *, tail: str, temperature: float = 1.0
) -> Events:
    """Return the events of targets `(N, K, 2)`: ids, log-probabilities.

    Args:
        y_true: an entry of id -1 is the rest's; without one it is what the
            others leave of 1. Lower ids are padding.
        classes: how many classes the student has.
        tail: what is done with the rest, see `TopKPTLoss`.
        temperature: of the teacher.
    """
    ids = ops.cast(ops.round(y_true[..., 0]), "int32")
    known = ids >= 0
    given = ops.equal(ids, REST)
    values = maximum(y_true[..., 1], LOWEST)
    log_t = ops.where(known, values, LOWEST)
    left = 1.0 - ops.sum(ops.exp(log_t), axis=-1, keepdims=True)
    log_rest = ops.where(
        ops.any(given, axis=-1, keepdims=True),
        ops.max(ops.where(given, values, LOWEST), axis=-1, keepdims=True),
        ops.where(left > 0.0, ops.log(maximum(left, TINY)), LOWEST),
    )
    others = classes - ops.sum(ops.cast(known, "int32"), axis=-1, keepdims=True)
    has_rest = (others > 0) & (log_rest > LOWEST)
    if tail in ("renormalize", "teacher_only"):
        has_rest = ops.zeros_like(has_rest)
    log_t = log_t / temperature
    if tail == "spread":  # the temperature is of each of the others
        log_others = ops.log(ops.cast(ops.maximum(others, 1), log_t.dtype))
        log_rest = (log_rest - log_others) / temperature + log_others
    else:
        log_rest = log_rest / temperature
    log_rest = ops.where(has_rest, log_rest, LOWEST)
    together = ops.concatenate([log_t, log_rest], axis=-1)
    together = ops.log_softmax(together, axis=-1)
    return Events(
        ids,
        known,
        ops.where(known, together[..., :-1], LOWEST),
        ops.where(has_rest, together[..., -1:], LOWEST),
    )


def events_loss(
    events: Events,
    logits: Tensor,
    log_others: Tensor,
    coefficients: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Eq. 7 on the events, and its derivatives.

    Args:
        events: of N positions.
        logits: the student's, of the events' classes, `(N, K)`.
        log_others: `L_r`, `(N, 1)`; `LOWEST` where there are no others, or
            they are to be left out.
        coefficients: epsilon, one a power.

    Returns:
        The loss, `(N,)`; `d loss / d z_i`, `(N, K)`; and what multiplies
        `exp(z_c - L_r)` of the others, `(N, 1)`.
    """
    logits = ops.where(events.known, maximum(logits, LOWEST), LOWEST)
    largest = ops.max(logits, axis=-1, keepdims=True)
    largest = ops.maximum(largest, log_others)
    logits, log_others = logits - largest, log_others - largest  # their digits
    log_given = ops.logsumexp(logits, axis=-1, keepdims=True)
    total = ops.logaddexp(log_given, log_others)
    log_t = ops.concatenate([events.log_t, events.log_rest], axis=-1)
    # Of p_r the digits are in L_k - L_r.
    log_rest = -ops.softplus(maximum(log_given - log_others, LOWEST))
    log_p = ops.concatenate([minimum(logits - total, 0.0), log_rest], -1)
    log_p = maximum(log_p, LOWEST)
    t, p, one_minus_p = ops.exp(log_t), ops.exp(log_p), -ops.expm1(log_p)
    terms = log_t + (perturbation(one_minus_p, coefficients) - log_p)
    w = t * (1.0 + p * slope(one_minus_p, coefficients))
    derivative = p * ops.sum(w, axis=-1, keepdims=True) - w
    loss = ops.sum(t * terms, axis=-1)
    return loss, derivative[..., :-1], derivative[..., -1:]


def loss_of_events(
    targets: Tensor,
    inputs: Sequence[Tensor],
    project: Callable[..., tuple[Tensor, Tensor]],
    gradients: Callable[..., Sequence[Tensor]],
    *,
    classes: Any,
    epsilon: Sequence[float],
    tail: str,
    temperature: float,
) -> Tensor:
    """Return Eq. 7 on the events, `(N,)`, with its gradient written out.

    Kept for it are `inputs` and some numbers a position, not the student's
    probabilities.

    Args:
        targets: ids and log-probabilities, `(N, K, 2)`; no gradient is theirs.
        inputs: what the student's logits are made of.
        project: `(events, *inputs)` to the logits of the events, `(N, K)`, and
            `L_r`, `(N, 1)`.
        gradients: `(of_logits, events, *inputs)` to the gradients by `inputs`,
            with `of_logits` from the logits of some classes, and the events
            numbered within them, to the gradient by these logits.
        classes: how many classes the student has.
        epsilon: coefficients, one a power.
        tail: what is done with the rest.
        temperature: of the teacher.
    """

    @ops.custom_gradient
    def differentiable(targets: Tensor, *inputs: Tensor) -> Any:
        events = read_events(
            targets, classes, tail=tail, temperature=temperature
        )
        given, log_others = project(events, *inputs)
        if tail == "renormalize":
            log_others = ops.full_like(log_others, LOWEST)
        loss, *derivatives = events_loss(events, given, log_others, epsilon)

        def gradient(*args: Tensor, upstream: Tensor = None) -> Any:
            if upstream is None:  # as TensorFlow and JAX call it
                (upstream,) = args
            upstream = ops.expand_dims(upstream, -1)
            of_given, of_others = (upstream * d for d in derivatives)

            def of_logits(logits: Tensor, events: Events) -> Tensor:
                # A given class may be far above the others; its value is put.
                share = ops.exp(minimum(logits - log_others, 0.0))
                return put(
                    share * of_others, events.ids, events.known, of_given
                )

            return (
                ops.zeros_like(targets),
                *gradients(of_logits, events, *inputs),
            )

        return loss, gradient

    return differentiable(targets, *inputs)


def pick(rows: Tensor, events: Events) -> Tensor:
    """Return `rows`, `(N, C)`, at the events' classes, `(N, K)`."""
    return ops.take_along_axis(rows, ops.maximum(events.ids, 0), axis=-1)


def put(rows: Tensor, ids: Tensor, present: Tensor, values: Tensor) -> Tensor:
    """Return `rows`, `(N, C)`, with `values` at `ids` where `present`.

    The number of updates is fixed, so the others repeat one that is present,
    or, in a row without any, what is at class 0.
    """
    anchor = ops.expand_dims(ops.argmax(present, axis=-1), -1)
    any_present = ops.any(present, axis=-1, keepdims=True)
    id_there = ops.take_along_axis(ids, anchor, axis=-1)
    value_there = ops.take_along_axis(values, anchor, axis=-1)
    id_there = ops.where(any_present, id_there, 0)
    value_there = ops.where(any_present, value_there, rows[:, :1])
    ids = ops.where(present, ids, id_there)
    values = ops.where(present, values, value_there)
    numbers = ops.expand_dims(ops.arange(ops.shape(ids)[0], dtype="int32"), -1)
    places = ops.stack([ops.broadcast_to(numbers, ops.shape(ids)), ids], -1)
    return ops.scatter_update(
        rows, ops.reshape(places, (-1, 2)), ops.reshape(values, (-1,))
    )


def check_targets(
    y_true: Tensor,
    classes: int | None,
    rows: Sequence[int | None] | None,
    argument: str = "y_pred",
) -> None:
    """Require targets `(..., K, 2)` for the student's `(..., C)`.

    Args:
        y_true: the targets.
        classes: C, where it is known.
        rows: shape of the student's rows; None where there is no student.
        argument: name of the argument that they are.

    Raises:
        ValueError: if the shape is another; where values are seen, if an id is
            no class or comes twice, or the rows are not log-probabilities.
    """
    shape = tuple(y_true.shape)
    leading = shape[:-2] if rows is None else tuple(rows)[:-1]
    expected = (*leading, None, 2)
    if shapes_differ(shape, expected) or shape[-2] == 0:
        beside = "" if rows is None else f", {argument} of shape {tuple(rows)}"
        raise ValueError(
            "`y_true` must hold ids and their log-probabilities for each row "
            "of the student, (..., k, 2): "
            "np.stack([ids, log_probabilities], axis=-1). "
            f"Received: y_true of shape {shape}{beside}"
        )
    seen = visible_values(y_true)
    if seen is None or not seen.size:
        return
    seen = seen.astype("float64").reshape(-1, *seen.shape[-2:])
    ids, values = seen[..., 0], seen[..., 1]
    largest = min(classes or LARGEST_ID, LARGEST_ID) - 1
    wrong = (ids != np.round(ids)) | (ids > largest)
    _refuse(
        wrong,
        ids,
        f"have whole ids of at most {largest}, the student's last class",
    )
    order = np.sort(ids, axis=-1)
    twice = (order[:, 1:] == order[:, :-1]) & (order[:, 1:] >= REST)
    _refuse(twice, order[:, 1:], "have each id once in a position; add up")
    mass = np.where(ids >= REST, np.exp(np.minimum(values, 1.0)), 0.0)
    wrong = ~(mass.sum(axis=-1, keepdims=True) <= 1.0 + SUM_TOLERANCE)
    _refuse(
        np.broadcast_to(wrong, values.shape),
        values,
        "hold natural logarithms of probabilities that sum to at most 1",
    )


def _refuse(wrong: np.ndarray, values: np.ndarray, rule: str) -> None:
    if wrong.any():
        row = int(np.argmax(wrong.any(axis=-1)))
        shown = np.array2string(values[row], precision=4, threshold=6)
        raise ValueError(
            f"`y_true` must {rule}. Received: {shown} at position {row} "
            f"({np.count_nonzero(wrong.any(axis=-1))} of {len(wrong)} are bad)"
        )
