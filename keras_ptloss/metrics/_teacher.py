"""Metrics of a student against its teacher; they need no labels."""

from typing import Any

import keras
from keras import ops

from keras_ptloss._binary import of_classes, two_events
from keras_ptloss._checks import (
    check_classes,
    check_flag,
    check_probabilities,
)
from keras_ptloss.losses._pt_loss import pt_loss
from keras_ptloss.metrics._cases import MeanOfCases, looked_at

Tensor = Any


class TeacherMetric(MeanOfCases):
    """Mean over the cases of a number for a teacher's and a student's row.

    Args:
        from_logits: whether the student's outputs are logits.
        teacher_from_logits: whether the teacher's are; None means the same as
            `from_logits`.
        name: name of the metric; None is the metric's own.
        dtype: dtype of the running sums and the result.
    """

    _own_name: str
    # Whether logits and probabilities of two columns or more do alike; read
    # by Distiller too.
    any_form = False

    def __init__(
        self,
        *,
        from_logits: bool = False,
        teacher_from_logits: bool | None = None,
        name: str | None = None,
        dtype: Any = "float32",
    ) -> None:
        super().__init__(name=name or self._own_name, dtype=dtype)
        if teacher_from_logits is None:
            teacher_from_logits = from_logits
        self.from_logits = check_flag("from_logits", from_logits)
        self.teacher_from_logits = check_flag(
            "teacher_from_logits", teacher_from_logits
        )

    def values(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Return one number a case, `(..., C)`, `(..., C)` to `(...)`."""
        raise NotImplementedError

    def cases(
        self, y_true: Tensor, y_pred: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the cases' numbers and weights, `(...)`."""
        y_pred = ops.cast(ops.convert_to_tensor(y_pred), "float32")
        y_true = ops.cast(ops.convert_to_tensor(y_true), "float32")
        student = two_events(y_pred, from_logits=self.from_logits)
        teacher = two_events(y_true, from_logits=self.teacher_from_logits)
        check_classes("y_true", teacher, "y_pred", student)
        teacher = of_classes(teacher, student.shape[-1])
        student = looked_at(student, weight)
        teacher = looked_at(teacher, weight)
        for argument, outputs, rows, flag in (
            ("y_pred", y_pred, student, "from_logits"),
            ("y_true", y_true, teacher, "teacher_from_logits"),
        ):
            either = self.any_form and outputs.shape[-1] != 1
            if not (getattr(self, flag) or either):
                check_probabilities(argument, rows, f"say {flag}=True")
        return self.values(teacher, student), weight

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same metric again."""
        return {
            "from_logits": self.from_logits,
            "teacher_from_logits": self.teacher_from_logits,
            **super().get_config(),
        }


@keras.saving.register_keras_serializable(package="keras_ptloss")
class TeacherAgreement(TeacherMetric):
    """Share of examples where teacher and student name the same class.

    A student can agree with its teacher and err with it, so agreement tells
    how well it imitates, not how well it does.

        agreement = mean_n [argmax_c t_{n,c} = argmax_c p_{n,c}]

    The largest logit is the largest probability: either form will do on
    either side. Of classes that tie the first is taken. One column alone does
    not tell a probability from a logit: the flags do.

    `y_true` is the teacher, `(..., C)`, `y_pred` the student, `(..., C)`; one
    column, of a binary head, is the two events that it stands for.
    `sample_weight` has the shape `(...)` or a leading part of it; every
    position of the leading axes is one case, and one of weight 0 is not looked
    at.

    Args:
        from_logits: whether the student's outputs are logits; it matters for
            one column only.
        teacher_from_logits: whether the teacher's are; None means the same as
            `from_logits`.
        name: name of the metric; None is `"teacher_agreement"`.
        dtype: dtype of the running sums and the result.

    Raises:
        ValueError: on update, if the class counts differ, or (seen outside
            compiled functions) one column that should be probabilities is not.

    Example:
        >>> import numpy as np
        >>> agreement = TeacherAgreement()
        >>> agreement.update_state(
        ...     np.array([[0.9, 0.1], [0.4, 0.6]]),
        ...     np.array([[0.6, 0.4], [0.5, 0.5]]),
        ... )
        >>> float(agreement.result())
        0.5

    Reference:
        Stanton et al. 2021, Does Knowledge Distillation Really Work?
        (https://arxiv.org/abs/2106.05945).
    """

    _own_name = "teacher_agreement"
    _better = "up"
    any_form = True

    def values(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Return 1 where both name the same class, else 0."""
        same = ops.equal(ops.argmax(teacher, axis=-1), ops.argmax(student, -1))
        return ops.cast(same, "float32")


@keras.saving.register_keras_serializable(package="keras_ptloss")
class TotalVariationDistance(TeacherMetric):
    """Half the L1 distance between teacher and student, 0 to 1.

    It is the largest difference in probability that the two give to any set
    of classes. Unlike KL it is bounded, so one confident error of the student
    cannot dominate the mean.

        TV = mean_n 1/2 sum_c |t_{n,c} - p_{n,c}|

    `y_true` is the teacher, `(..., C)`, `y_pred` the student, `(..., C)`; one
    column, of a binary head, is the two events that it stands for.
    `sample_weight` has the shape `(...)` or a leading part of it; every
    position of the leading axes is one case, and one of weight 0 is not looked
    at.

    Args:
        from_logits: whether the student's outputs are logits.
        teacher_from_logits: whether the teacher's are; None means the same as
            `from_logits`.
        name: name of the metric; None is `"total_variation_distance"`.
        dtype: dtype of the running sums and the result.

    Raises:
        ValueError: on update, if the class counts differ, or (seen
            outside compiled functions) rows that should be probabilities are
            not.

    Example:
        >>> import numpy as np
        >>> distance = TotalVariationDistance()
        >>> distance.update_state(
        ...     np.array([[0.75, 0.25], [0.5, 0.5]]),
        ...     np.array([[0.5, 0.5], [0.5, 0.5]]),
        ... )
        >>> float(distance.result())
        0.125

    Reference:
        Levin, Peres and Wilmer 2017, Markov Chains and Mixing Times, §4.1.
    """

    _own_name = "total_variation_distance"

    def values(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Return half the L1 distance."""
        if self.from_logits:
            student = ops.softmax(student, axis=-1)
        if self.teacher_from_logits:
            teacher = ops.softmax(teacher, axis=-1)
        return 0.5 * ops.sum(ops.abs(teacher - student), axis=-1)


@keras.saving.register_keras_serializable(package="keras_ptloss")
class KLToTeacher(TeacherMetric):
    """Kullback-Leibler divergence from teacher to student, in nats.

    What `PTLoss` is without its perturbation: logged beside PTLoss, it shows
    how far the student stays from the unperturbed teacher on purpose.

        KL = mean_n sum_c t_{n,c} (log t_{n,c} - log p_{n,c})

    `0 log 0 = 0`; where the student gives probabilities, one counts as
    `keras.config.epsilon()` at least, as in Keras, so that the mean stays
    finite.

    `y_true` is the teacher, `(..., C)`, `y_pred` the student, `(..., C)`; one
    column, of a binary head, is the two events that it stands for.
    `sample_weight` has the shape `(...)` or a leading part of it; every
    position of the leading axes is one case, and one of weight 0 is not looked
    at.

    Args:
        from_logits: whether the student's outputs are logits.
        teacher_from_logits: whether the teacher's are; None means the same as
            `from_logits`.
        name: name of the metric; None is `"kl_to_teacher"`.
        dtype: dtype of the running sums and the result.

    Raises:
        ValueError: on update, if the class counts differ, or (seen
            outside compiled functions) rows that should be probabilities are
            not.

    Example:
        >>> import numpy as np
        >>> divergence = KLToTeacher()
        >>> divergence.update_state(
        ...     np.array([[0.5, 0.5]]), np.array([[0.8, 0.2]])
        ... )
        >>> round(float(divergence.result()), 4)
        0.2231

    Reference:
        Hinton et al. 2015, Distilling the Knowledge in a Neural Network
        (https://arxiv.org/abs/1503.02531).
    """

    _own_name = "kl_to_teacher"

    def values(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Return PTLoss without its perturbation."""
        return pt_loss(
            teacher,
            student,
            0.0,
            from_logits=self.from_logits,
            teacher_from_logits=self.teacher_from_logits,
        )


# Their `y_true` is the teacher: labels in its place would be silently wrong.
TEACHER_METRICS = (TeacherAgreement, TotalVariationDistance, KLToTeacher)
