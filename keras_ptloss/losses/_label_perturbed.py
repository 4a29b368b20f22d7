"""PTLoss as its authors released it: perturbed at the label."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ptloss._backend import visible_values
from keras_ptloss._binary import of_classes, two_events
from keras_ptloss._checks import check_number, differ, on_simplex
from keras_ptloss.losses._base import TeacherLoss, log_student, read_student
from keras_ptloss.losses._pt_loss import pt_loss

Tensor = Any


def label_perturbed_loss(
    y_true: Tensor,
    y_pred: Tensor,
    epsilon: float,
    *,
    from_logits: bool = False,
    teacher_from_logits: bool = False,
) -> Tensor:
    """Compute `KL(t || p) + epsilon (1 - p_y)`, `(...)`.

    `y_true` is `(..., 2, C)`: the teacher's row, then the one-hot label.
    """
    y_true = ops.convert_to_tensor(y_true)
    shape, student_shape = tuple(y_true.shape), tuple(y_pred.shape)
    if len(shape) != len(student_shape) + 1 or differ(shape[-2], 2):
        raise ValueError(
            "`y_true` must hold the teacher's row and the one-hot label, "
            "(..., 2, classes): np.stack([teacher, one_hot], axis=-2). "
            f"Received: y_true of shape {shape}, y_pred of shape "
            f"{student_shape}"
        )
    teacher, label = y_true[..., 0, :], y_true[..., 1, :]
    student = read_student(y_pred, from_logits=from_logits)
    kl = pt_loss(
        teacher,
        student,
        0.0,
        from_logits=from_logits,
        teacher_from_logits=teacher_from_logits,
    )
    one_minus_p = -ops.expm1(log_student(student, from_logits=from_logits))
    label = two_events(ops.cast(label, student.dtype), from_logits=False)
    _check_one_hot(label)
    label = of_classes(label, student.shape[-1])
    return kl + epsilon * ops.sum(label * one_minus_p, axis=-1)


def _check_one_hot(label: Tensor) -> None:
    """Require one-hot rows `(..., C)`, where their values can be seen.

    Those at weight 0 come uniform.
    """
    values = visible_values(label)
    if values is None or not values.size:
        return
    rows = values.reshape(-1, values.shape[-1])
    one_hot = (rows.max(axis=-1) == 1) | (np.ptp(rows, axis=-1) == 0)
    bad = ~(on_simplex(rows) & one_hot)
    if bad.any():
        row = int(np.argmax(bad))
        shown = np.array2string(rows[row], precision=4, threshold=6)
        raise ValueError(
            "`y_true` must hold the one-hot label in its second row, "
            "np.stack([teacher, one_hot], axis=-2). Received: "
            f"y_true[{row}, 1]={shown} ({np.count_nonzero(bad)} of {len(bad)} "
            "rows are bad)"
        )


@keras.saving.register_keras_serializable(package="keras_ptloss")
class LabelPerturbedLoss(TeacherLoss):
    """KL from the teacher, perturbed at the label: what the authors released.

    The authors' code for CIFAR-100 is not Eq. 7. It perturbs order 1 alone, by
    one number (0.1 there), at the label `y` in place of the teacher:

        loss = KL(t || p) + epsilon (1 - p_y)

    It therefore needs labels for all data. They travel with the teacher:
    `y_true` is `(..., 2, C)`, the teacher's row and then the one-hot label,
    `np.stack([teacher, one_hot], axis=-2)`; `y_pred` is the student,
    `(..., C)`. Where the teacher is the label itself it is Poly-1 cross-entropy
    (Leng et al. 2022).

    Args:
        epsilon: weight of the term, at least -1, below which a student would
            leave a label that the teacher agrees with.
        from_logits: whether the student's outputs are logits.
        teacher_from_logits: whether the teacher's are; None means the same as
            `from_logits`. The label's row is one-hot in any case.
        name: name of the loss.
        **kwargs: `reduction` and `dtype`, as in `keras.losses.Loss`. The
            computation is float32 or better.

    Raises:
        ValueError: if `epsilon` is below -1; when called, if the shapes are
            others, or (seen outside compiled functions) rows that should be
            probabilities are not, or the label's row is not one-hot: a smoothed
            label is refused, for it cannot be told from the teacher.

    Example:
        >>> import numpy as np
        >>> teacher = np.array([[0.7, 0.3], [0.6, 0.4]])
        >>> one_hot = np.eye(2)[[0, 1]]
        >>> y_true = np.stack([teacher, one_hot], axis=-2)
        >>> loss = LabelPerturbedLoss(0.1, reduction=None)
        >>> [round(float(value), 3) for value in loss(y_true, teacher)]
        [0.03, 0.06]

    Reference:
        Zhang et al. 2023, Do Not Blindly Imitate the Teacher
        (https://arxiv.org/abs/2305.05010), the code released with it.
    """

    def __init__(
        self,
        epsilon: float,
        *,
        from_logits: bool = False,
        teacher_from_logits: bool | None = None,
        name: str | None = "label_perturbed_loss",
        **kwargs: Any,
    ) -> None:
        epsilon = check_number("epsilon", epsilon, at_least=-1.0)
        super().__init__(
            label_perturbed_loss,
            {"epsilon": epsilon},
            from_logits=from_logits,
            teacher_from_logits=teacher_from_logits,
            name=name,
            **kwargs,
        )
