"""Label smoothing, of a teacher (Eq. 23)."""

from typing import Any

import keras
from keras import ops

from keras_ptloss._checks import check_number, fail
from keras_ptloss.losses._base import TeacherLoss, read_student, read_teacher
from keras_ptloss.losses._pt_loss import pt_loss

Tensor = Any


def label_smoothing_loss(
    y_true: Tensor,
    y_pred: Tensor,
    delta: float,
    *,
    from_logits: bool = False,
    teacher_from_logits: bool = False,
) -> Tensor:
    """Compute `KL(t' || p)` with `t' = (1 - delta) t + delta / C`, `(...)`."""
    student = read_student(y_pred, from_logits=from_logits)
    rows = read_teacher(y_true, student, from_logits=teacher_from_logits)
    teacher = rows.probabilities
    classes = ops.cast(ops.shape(teacher)[-1], teacher.dtype)
    smoothed = (1.0 - delta) * teacher + delta / classes
    return pt_loss(
        smoothed,
        student,
        0.0,
        from_logits=from_logits,
        teacher_from_logits=False,
    )


@keras.saving.register_keras_serializable(package="keras_ptloss")
class LabelSmoothingLoss(TeacherLoss):
    """KL to the student from a teacher mixed with the uniform distribution.

    It lowers the confidence of every row alike, and never changes the
    teacher's ranking of the classes:

        loss = KL(t' || p),    t' = (1 - delta) t + delta / C     (Eq. 23)

    Eq. 23 writes `delta / 2`, for `C = 2`. The gradient is that of
    `keras.losses.CategoricalCrossentropy(label_smoothing=delta)`, and of PTLoss
    with `label_smoothing_epsilon` in the limit of its order; unlike these it
    is 0 where `p = t'`. `y_true` is the teacher, `(..., C)`, `y_pred` the
    student, `(..., C)`.

    Args:
        delta: share of the uniform distribution, from 0 (KL) to 1.
        from_logits: whether the student's outputs are logits.
        teacher_from_logits: whether the teacher's are; None means the same as
            `from_logits`.
        name: name of the loss.
        **kwargs: `reduction` and `dtype`, as in `keras.losses.Loss`. The
            computation is float32 or better.

    Raises:
        ValueError: if `delta` is not from 0 to 1; when called, if the shapes
            differ, or (seen outside compiled functions) rows that should be
            probabilities are not.

    Example:
        >>> import numpy as np
        >>> loss = LabelSmoothingLoss(0.1)
        >>> teacher = np.array([[1.0, 0.0]])
        >>> round(float(loss(teacher, np.array([[0.8, 0.2]]))), 4)
        0.0939
        >>> round(float(loss(teacher, np.array([[0.95, 0.05]]))), 4)
        0.0

    Reference:
        Szegedy et al. 2016, Rethinking the Inception Architecture for Computer
        Vision (https://arxiv.org/abs/1512.00567).
    """

    def __init__(
        self,
        delta: float,
        *,
        from_logits: bool = False,
        teacher_from_logits: bool | None = None,
        name: str | None = "label_smoothing_loss",
        **kwargs: Any,
    ) -> None:
        delta = check_number("delta", delta, at_least=0.0)
        if delta > 1.0:
            fail("delta", "at most 1", delta)
        super().__init__(
            label_smoothing_loss,
            {"delta": delta},
            from_logits=from_logits,
            teacher_from_logits=teacher_from_logits,
            name=name,
            **kwargs,
        )
