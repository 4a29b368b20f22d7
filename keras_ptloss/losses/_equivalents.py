"""Coefficients that turn PTLoss into other losses (Appendix A.1).

`-log p = sum_m (1 - p)^m / m` has no last term; each mapping is cut at `order`
and exact in the limit. All leave the teacher's entropy in the value, which
does not depend on the student: gradients are what coincides. Coefficients per
example go into `pt_loss`, which takes `(N, C, M)`.
"""

from typing import Any

import numpy as np

from keras_ptloss._checks import (
    as_floats,
    check_count,
    check_number,
    fail,
)


def focal_epsilon(gamma: int, order: int) -> np.ndarray:
    """Return the coefficients of focal loss (Eq. 14), `(order,)`.

    `-(1-p)^gamma log p = sum_m (1-p)^(m+gamma) / m`, so that

        epsilon_m = -1/m                     for m <= gamma
        epsilon_m = 1/(m - gamma) - 1/m      above

    Args:
        gamma: the focusing parameter, an integer of at least 0.
        order: number of coefficients. The gradient's error falls as
            `(1-p)^order`.

    Returns:
        Coefficients shared by the classes.

    Raises:
        ValueError: if an argument is not of this form.

    Example:
        >>> focal_epsilon(gamma=1, order=3).round(3)
        array([-1.   ,  0.5  ,  0.167])

    Reference:
        Lin et al. 2017, Focal Loss for Dense Object Detection.
    """
    gamma = check_count("gamma", gamma, at_least=0)
    m = np.arange(1, check_count("order", order) + 1, dtype="float64")
    target = np.where(m > gamma, 1.0 / np.maximum(m - gamma, 1.0), 0.0)
    return target - 1.0 / m


def temperature_epsilon(
    teacher_probs: Any, temperature: float, order: int
) -> np.ndarray:
    """Return the coefficients of temperature scaling (Eq. 22), `(N, C, order)`.

    With `t'` the teacher at the temperature, `t' ~ t^(1/temperature)`:

        epsilon_{n,c,m} = (t'_{n,c} / t_{n,c} - 1) / m

    Args:
        teacher_probs: `(N, C)`, all above 0.
        temperature: above 0; 1 changes nothing.
        order: number of coefficients.

    Returns:
        Coefficients per example and class.

    Raises:
        ValueError: if an argument is not of this form.

    Example:
        >>> temperature_epsilon([[0.8, 0.2]], 2.0, order=2).round(3)
        array([[[-0.167, -0.083],
                [ 0.667,  0.333]]])

    Reference:
        Hinton et al. 2015, Distilling the Knowledge in a Neural Network.
    """
    teacher = _positive(teacher_probs)
    if check_number("temperature", temperature, at_least=0.0) == 0.0:
        fail("temperature", "above 0", temperature)
    softened = teacher ** (1.0 / temperature)
    softened /= softened.sum(axis=-1, keepdims=True)
    return _of_target(teacher, softened, order)


def label_smoothing_epsilon(
    teacher_probs: Any, delta: float, order: int
) -> np.ndarray:
    """Return the coefficients of label smoothing (Eq. 27), `(N, C, order)`.

    The target is `(1 - delta) t + delta / C` (Eq. 23 has `delta / 2`, for
    `C = 2`):

        epsilon_{n,c,m} = delta (1 / (C t_{n,c}) - 1) / m

    Args:
        teacher_probs: `(N, C)`, all above 0.
        delta: share of the uniform distribution, from 0 to 1.
        order: number of coefficients.

    Returns:
        Coefficients per example and class.

    Raises:
        ValueError: if an argument is not of this form.

    Example:
        >>> label_smoothing_epsilon([[0.8, 0.2]], 0.1, order=2).round(4)
        array([[[-0.0375, -0.0187],
                [ 0.15  ,  0.075 ]]])

    Reference:
        Szegedy et al. 2016, Rethinking the Inception Architecture.
    """
    teacher = _positive(teacher_probs)
    if check_number("delta", delta, at_least=0.0) > 1.0:
        fail("delta", "at most 1", delta)
    smoothed = (1.0 - delta) * teacher + delta / teacher.shape[-1]
    return _of_target(teacher, smoothed, order)


def _of_target(
    teacher: np.ndarray, target: np.ndarray, order: int
) -> np.ndarray:
    """Return `(target / teacher - 1) / m`, by which `t` acts as `target`."""
    m = np.arange(1, check_count("order", order) + 1)
    return (target / teacher - 1.0)[..., None] / m


def _positive(teacher_probs: Any) -> np.ndarray:
    expected = "of shape (examples, classes) and above 0 everywhere"
    teacher = as_floats("teacher_probs", teacher_probs, expected)
    if teacher.ndim != 2 or not np.all(teacher > 0):
        fail("teacher_probs", expected, teacher_probs)
    return teacher
