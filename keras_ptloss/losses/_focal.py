"""Focal loss, with a teacher for the label (Eq. 12)."""

from typing import Any

import keras
from keras import ops

from keras_ptloss._calibration import TINY
from keras_ptloss._checks import check_number
from keras_ptloss.losses._base import (
    TeacherLoss,
    log_student,
    read_student,
    read_teacher,
)

Tensor = Any


def focal_loss(
    y_true: Tensor,
    y_pred: Tensor,
    gamma: float,
    *,
    from_logits: bool = False,
    teacher_from_logits: bool = False,
) -> Tensor:
    """Compute `-sum_c t_c (1 - p_c)^gamma log p_c` (Eq. 12), `(...)`."""
    student = read_student(y_pred, from_logits=from_logits)
    rows = read_teacher(y_true, student, from_logits=teacher_from_logits)
    teacher = rows.probabilities
    log_p = log_student(student, from_logits=from_logits)
    # Above 0, where the power has no finite slope for gamma below 1.
    one_minus_p = ops.maximum(-ops.expm1(log_p), TINY)
    focus = ops.power(one_minus_p, gamma)
    return -ops.sum(teacher * focus * log_p, axis=-1)


@keras.saving.register_keras_serializable(package="keras_ptloss")
class FocalLoss(TeacherLoss):
    """Focal loss with a teacher for the label.

    Classes that the student already gives a high probability count less:

        loss = -sum_c t_c (1 - p_c)^gamma log p_c                 (Eq. 12)

    It is a cross-entropy: `gamma = 0` is KL plus the teacher's entropy, which
    the student does not feel. Its gradient is that of PTLoss with
    `focal_epsilon(gamma, order)` in the limit of the order, and it is
    `keras.losses.CategoricalFocalCrossentropy(alpha=1.0)`, in log space and
    with a teacher of either form. `y_true` is the teacher, `(..., C)`, `y_pred`
    the student, `(..., C)`.

    Args:
        gamma: the focusing parameter, at least 0.
        from_logits: whether the student's outputs are logits.
        teacher_from_logits: whether the teacher's are; None means the same as
            `from_logits`.
        name: name of the loss.
        **kwargs: `reduction` and `dtype`, as in `keras.losses.Loss`. The
            computation is float32 or better.

    Raises:
        ValueError: if `gamma` is below 0; when called, if the shapes differ,
            or (seen outside compiled functions) rows that should be
            probabilities are not.

    Example:
        >>> import numpy as np
        >>> loss = FocalLoss(2.0)
        >>> student = np.array([[0.75, 0.25]])
        >>> round(float(loss(np.array([[1.0, 0.0]]), student)), 4)
        0.018
        >>> round(float(loss(np.array([[0.0, 1.0]]), student)), 4)
        0.7798

    Reference:
        Lin et al. 2017, Focal Loss for Dense Object Detection
        (https://arxiv.org/abs/1708.02002).
    """

    def __init__(
        self,
        gamma: float,
        *,
        from_logits: bool = False,
        teacher_from_logits: bool | None = None,
        name: str | None = "focal_loss",
        **kwargs: Any,
    ) -> None:
        gamma = check_number("gamma", gamma, at_least=0.0)
        super().__init__(
            focal_loss,
            {"gamma": gamma},
            from_logits=from_logits,
            teacher_from_logits=teacher_from_logits,
            name=name,
            **kwargs,
        )
