"""The formulas that the losses, the proxy teacher and the search share.

Symbols are the paper's: `t` teacher probabilities, `p` student probabilities,
`q` proxy teacher, all of shape `(..., C)`. Functions with an argument `xp` work
on NumPy arrays (`xp=numpy`) and on tensors (`xp=keras.ops`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

Tensor = Any

# Smaller teacher probabilities are replaced by this value before they are
# scaled, because APIs and float16 files often round them to zero.
MIN_PROBABILITY = 1e-7


def log_teacher_probs(teacher_probs: Tensor, xp: Any = np) -> Tensor:
    """Return `z = log max(t, 1e-7)`, the logits of a teacher's probabilities.

    All code that applies a temperature or a matrix to a teacher's outputs
    starts from this `z`, so losses, searches and corrections give consistent
    results.
    """
    return xp.log(xp.maximum(teacher_probs, MIN_PROBABILITY))


def negative_log_likelihood(
    probs: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Return `-log max(q_y, 1e-7)` of each example, `(..., N)`.

    Args:
        probs: q, `(..., N, C)`.
        labels: y, `(N,)`.
    """
    of_label = probs[..., np.arange(len(labels)), labels]
    return -np.log(np.maximum(of_label, MIN_PROBABILITY))


def perturbation(s: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
    """Return `P(s) = sum_m eps_m s^m` with `s = 1 - p` (Eq. 7)."""
    return s * _horner(s, coefficients)


def slope(s: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
    """Return `h(s) = dP/ds = sum_m m eps_m s^(m-1)`."""
    return _horner(s, [m * e for m, e in enumerate(coefficients, start=1)])


def curvature(s: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
    """Return `dh/ds = sum_m m (m-1) eps_m s^(m-2)`."""
    terms = [m * (m - 1) * e for m, e in enumerate(coefficients, start=1)]
    return _horner(s, terms[1:])


def _horner(s: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """Return `terms[0] + terms[1] s + terms[2] s^2 + ...`."""
    value = 0.0 * s
    for term in reversed(terms):
        value = value * s + term
    return value


def shared_proxy(
    teacher_probs: Tensor, epsilon: Tensor, xp: Any = np
) -> Tensor:
    """Return the exact proxy teacher of a single shared epsilon of order 1.

    The first-order condition of Eq. 8 is `q_c = t_c / (nu - eps t_c)`. The
    multiplier nu is the root of `sum_c q_c = 1`; Newton's method on
    `1 / sum_c q_c` converges from the lower end of nu's interval, in at most
    16 steps for `eps >= -0.9999`.

    Args:
        teacher_probs: `(..., C)`, float32 or better.
        epsilon: a number above -1.
        xp: `numpy` or `keras.ops`.

    Returns:
        Probabilities, `(..., C)`.
    """
    t = teacher_probs
    largest = xp.max(t, axis=-1, keepdims=True)
    highest = 1.0 + xp.maximum(epsilon, 0.0)
    nu = xp.maximum((1.0 + epsilon) * largest, 1.0 + xp.minimum(epsilon, 0.0))
    for _ in range(16):
        q = t / (nu - epsilon * t)
        total = xp.sum(q, axis=-1, keepdims=True)
        if xp is np and np.max(np.abs(total - 1.0), initial=0.0) < 1e-12:
            break
        fall = xp.sum(q / (nu - epsilon * t), axis=-1, keepdims=True)
        nu = xp.minimum(nu + (total - 1.0) * total / fall, highest)
    q = t / (nu - epsilon * t)
    return q / xp.sum(q, axis=-1, keepdims=True)


def two_events(outputs: Tensor, *, from_logits: bool) -> Tensor:
    """Expand the single column of a binary head to two; else do nothing.

    A binary head gives the probability `p` of the second class, or its logit
    `z`. With two classes this is `[1 - p, p]`, or the logits `[0, z]`.
    """
    if outputs.shape[-1] != 1:
        return outputs
    xp = np if isinstance(outputs, np.ndarray) else ops
    first = xp.zeros_like(outputs) if from_logits else 1.0 - outputs
    return xp.concatenate([first, outputs], axis=-1)


def model_probs(outputs: Tensor, *, from_logits: bool) -> Tensor:
    """Return a model's outputs as probabilities `(..., C)`, in float32."""
    outputs = two_events(ops.cast(outputs, "float32"), from_logits=from_logits)
    return ops.softmax(outputs, axis=-1) if from_logits else outputs
