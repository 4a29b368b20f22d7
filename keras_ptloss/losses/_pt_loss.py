"""The perturbed distillation loss (Eq. 7)."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ptloss._backend import row_sum
from keras_ptloss._binary import two_events
from keras_ptloss._calibration import (
    check_teacher_calibration,
    teacher_calibration,
)
from keras_ptloss._checks import check_constant_epsilon, check_epsilon
from keras_ptloss._perturbation import perturbation, slope
from keras_ptloss.losses._base import (
    LOWEST,
    TINY,
    TeacherLoss,
    read_student,
    read_teacher,
)

Tensor = Any


def pt_loss(
    y_true: Tensor,
    y_pred: Tensor,
    epsilon: Tensor,
    *,
    from_logits: bool = False,
    teacher_from_logits: bool | None = None,
    teacher_temperature: Any = 1.0,
    teacher_scale: Any = 1.0,
    teacher_bias: Any = 0.0,
) -> Tensor:
    """Compute PTLoss: KL from teacher to student, its series perturbed.

    `-log p = sum_m (1 - p)^m / m`. PTLoss adds `epsilon_m` to the leading
    coefficients `1 / m`, so that the student's optimum is no longer the
    teacher `t` but a *proxy teacher*, which may be nearer to the truth:

        loss = sum_c t_c (log t_c - log p_c)
             + sum_c t_c sum_m epsilon_{c,m} (1 - p_c)^m           (Eq. 7)

    It is computed in the logarithms of the probabilities, in float32 or better
    whatever the dtype of the input, with `0 log 0 = 0`.

    Args:
        y_true: the teacher, `(..., C)`: probabilities, or logits with
            `teacher_from_logits`. `(..., 1)` of a binary head is the two
            events that it stands for, here and in `y_pred`.
        y_pred: the student, `(..., C)`: probabilities, or logits with
            `from_logits`.
        epsilon: coefficients: a number (order 1), `(M,)` shared by the
            classes, `(C, M)` per class, or `(N, C, M)` per example.
        from_logits: whether `y_pred` holds logits.
        teacher_from_logits: whether `y_true` does; None means the same as
            `from_logits`.
        teacher_temperature: calibration of the teacher alone,
            `t = softmax(A z / teacher_temperature + b)`, `z` being its logits
            or the logarithms of its probabilities; a number above 0, or one a
            class, `(C,)`.
        teacher_scale: `A`: a number, one a class, `(C,)`, or a matrix,
            `(C, C_in)`; a teacher of C_in classes then has `y_true`
            `(..., C_in)`.
        teacher_bias: `b`: a number, or one a class, `(C,)`.

    Returns:
        One loss an example, shape `(...)`, in nats.

    Raises:
        ValueError: if the class counts differ, `epsilon` has another rank or
            is not finite, or (seen outside compiled functions) rows that
            should be probabilities are not.

    Example:
        >>> import numpy as np
        >>> teacher = np.array([[0.9, 0.1], [0.4, 0.6]], "float32")
        >>> student = np.array([[0.8, 0.2], [0.5, 0.5]], "float32")
        >>> loss = pt_loss(teacher, student, [0.5, 0.1])
        >>> [round(float(value), 4) for value in loss]
        [0.1767, 0.2951]

    Reference:
        Zhang et al. 2023, Do Not Blindly Imitate the Teacher
        (https://arxiv.org/abs/2305.05010).
    """
    if teacher_from_logits is None:
        teacher_from_logits = from_logits
    student = read_student(y_pred, from_logits=from_logits)
    teacher = read_teacher(
        y_true,
        student,
        from_logits=teacher_from_logits,
        calibration=teacher_calibration(
            teacher_temperature, teacher_scale, teacher_bias
        ),
    )
    epsilon = check_epsilon(
        epsilon,
        max_rank=3,
        classes=student.shape[-1],
        examples=student.shape[0],
    )
    constant = isinstance(epsilon, np.ndarray)
    epsilon = ops.cast(epsilon, student.dtype)
    coefficients = [epsilon[..., m] for m in range(epsilon.shape[-1])]
    if not from_logits:
        return _pt_loss_of_probabilities(teacher, student, coefficients)
    if not constant:
        # Coefficients may be differentiated as well: leave it to autodiff.
        return _pt_loss_of_logits(teacher, student, coefficients)[0]
    return _with_gradient(teacher, student, coefficients)


def _pt_loss_of_probabilities(
    teacher: Tensor, student: Tensor, coefficients: Sequence[Tensor]
) -> Tensor:
    """Eq. 7 on probabilities, clipped from below as Keras's losses are."""
    log_student = ops.log(ops.maximum(student, keras.config.epsilon()))
    terms = _terms(teacher, log_student, 1.0 - student, coefficients)
    return _expected(teacher, terms)


def _pt_loss_of_logits(
    teacher: Tensor, logits: Tensor, coefficients: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 7 on the student's logits; also its terms and probabilities."""
    shifted = logits - ops.max(logits, axis=-1, keepdims=True)
    shifted = ops.maximum(shifted, LOWEST)  # 0 * -inf, of a masked class
    exp = ops.exp(shifted)
    total = ops.sum(exp, axis=-1, keepdims=True)
    student = exp / total
    # 1 - p has the digits that `total` has, as -expm1(log p) would.
    log_student = shifted - ops.log(total)
    terms = _terms(teacher, log_student, 1.0 - student, coefficients)
    return _expected(teacher, terms), terms, student


def _terms(
    teacher: Tensor,
    log_student: Tensor,
    one_minus_p: Tensor,
    coefficients: Sequence[Tensor],
) -> Tensor:
    """Return `log t_c - log p_c + sum_m epsilon_{c,m} (1 - p_c)^m`."""
    log_teacher = ops.log(ops.maximum(teacher, TINY))
    return log_teacher + (perturbation(one_minus_p, coefficients) - log_student)


def _expected(teacher: Tensor, terms: Tensor) -> Tensor:
    """Return `sum_c t_c terms_c`, `(...)`."""
    return ops.squeeze(row_sum(teacher * terms), axis=-1)


def _with_gradient(
    teacher: Tensor, logits: Tensor, coefficients: Sequence[Tensor]
) -> Tensor:
    """Eq. 7 with its gradient written out, at half the cost of autodiff.

    With `h` the slope of the perturbation, `w_c = t_c (1 + p_c h_c)`:

        d loss / d logits = p sum_c w_c - w
    """

    @ops.custom_gradient
    def differentiable(teacher: Tensor, logits: Tensor) -> Any:
        loss, terms, student = _pt_loss_of_logits(teacher, logits, coefficients)

        def gradient(*args: Tensor, upstream: Tensor = None) -> Any:
            if upstream is None:  # as TensorFlow and JAX call it
                (upstream,) = args
            upstream = ops.expand_dims(upstream, -1)
            h = slope(1.0 - student, coefficients)
            w = teacher * (1.0 + student * h)
            return (
                upstream * (terms + 1.0),
                upstream * (row_sum(w) * student - w),
            )

        return loss, gradient

    return differentiable(teacher, logits)


@keras.saving.register_keras_serializable(package="keras_ptloss")
class PTLoss(TeacherLoss):
    """Perturbed distillation loss: KL from teacher to student, perturbed.

    Use it as any Keras loss, with the teacher's outputs as `y_true`:

        loss = sum_c t_c (log t_c - log p_c)
             + sum_c t_c sum_m epsilon_{c,m} (1 - p_c)^m           (Eq. 7)

    `epsilon = 0` is `keras.losses.KLDivergence`. Coefficients that make the
    student better are found by `ProxyTeacherSearch`, whose `result.loss()`
    builds this loss. The loss is convex in `p` while `epsilon_m >= -1 / m`.

    Args:
        epsilon: coefficients: a number (order 1), `(M,)` shared by the
            classes, or `(C, M)` per class.
        from_logits: whether the student's outputs are logits.
        teacher_from_logits: whether the teacher's are; None means the same as
            `from_logits`.
        teacher_temperature: calibration of the teacher alone,
            `t = softmax(A z / teacher_temperature + b)`, `z` being its logits
            or the logarithms of its probabilities; a number above 0, or one a
            class, `(C,)`.
        teacher_scale: `A`: a number, one a class, `(C,)`, or a matrix,
            `(C, C_in)`; a teacher of C_in classes then has `y_true`
            `(..., C_in)`.
        teacher_bias: `b`: a number, or one a class, `(C,)`.
        name: name of the loss.
        **kwargs: `reduction` and `dtype`, as in `keras.losses.Loss`. The
            computation is float32 or better.

    Raises:
        ValueError: if an argument is not of this form.

    Example:
        >>> import keras, numpy as np
        >>> student = keras.Sequential([keras.layers.Dense(3)])
        >>> student.compile(
        ...     "adam",
        ...     loss=PTLoss(
        ...         [0.5, 0.1], from_logits=True, teacher_from_logits=False
        ...     ),
        ... )
        >>> x = np.ones((8, 4), "float32")
        >>> soft_labels = np.full((8, 3), 1 / 3, "float32")
        >>> history = student.fit(x, soft_labels, verbose=0)

    Reference:
        Zhang et al. 2023, Do Not Blindly Imitate the Teacher
        (https://arxiv.org/abs/2305.05010), Eq. 7.
    """

    def __init__(
        self,
        epsilon: Any,
        *,
        from_logits: bool = False,
        teacher_from_logits: bool | None = None,
        teacher_temperature: Any = 1.0,
        teacher_scale: Any = 1.0,
        teacher_bias: Any = 0.0,
        name: str | None = "pt_loss",
        **kwargs: Any,
    ) -> None:
        own = {
            "epsilon": check_constant_epsilon(epsilon),
            **check_teacher_calibration(
                teacher_temperature, teacher_scale, teacher_bias
            ),
        }
        super().__init__(
            pt_loss,
            own,
            from_logits=from_logits,
            teacher_from_logits=teacher_from_logits,
            name=name,
            **kwargs,
        )

    @property
    def teacher_classes(self) -> tuple[int, ...] | None:
        """Class counts of the teachers that `y_true` has side by side."""
        scale = np.shape(self.teacher_scale)
        return scale[1:] if len(scale) == 2 and scale[0] != scale[1] else None

    def teacher(self, y_true: Tensor) -> Tensor:
        """Return the calibrated teacher, `(..., C)`, of outputs as they come.

        Args:
            y_true: float32 or better, `(..., C_in)`.
        """
        calibration = teacher_calibration(
            self.teacher_temperature, self.teacher_scale, self.teacher_bias
        )
        flag = self.teacher_from_logits
        rows = two_events(y_true, from_logits=flag)
        calibration.check_input("y_true", rows.shape[-1])
        return ops.stop_gradient(calibration(rows, from_logits=flag))
