"""The perturbed distillation loss (Eq. 7)."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ptloss._binary import two_events
from keras_ptloss._calibration import (
    Rows,
    check_teacher_calibration,
    softmax_and_log,
    teacher_calibration,
)
from keras_ptloss._checks import (
    check_constant_epsilon,
    check_epsilon,
    check_flag,
)
from keras_ptloss._perturbation import perturbation, slope
from keras_ptloss._xla import fuses_shift, row_sum, threads_by_operations
from keras_ptloss.losses._base import (
    TeacherLoss,
    log_student,
    read_student,
    read_teacher,
)

Tensor = Any

# The order from which loops over the polynomial take more operations than they
# move bytes, unless there is little beside it.
LONG = 5


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
    entropy: bool = True,
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
        entropy: whether the value has `sum_c t_c log t_c`, which the student
            does not move. Without it the student's gradient is the same, for a
            logarithm a value less; the value is a cross-entropy, perturbed,
            and not 0 where `p = t`.

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
    check_flag("from_logits", from_logits)
    if teacher_from_logits is None:
        teacher_from_logits = from_logits
    check_flag("teacher_from_logits", teacher_from_logits)
    check_flag("entropy", entropy)
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
    log_teacher = teacher.log if entropy else None
    constant = isinstance(epsilon, np.ndarray)
    if constant and not np.any(epsilon):
        coefficients = []  # KL
    else:
        epsilon = ops.cast(epsilon, student.dtype)
        coefficients = [epsilon[..., m] for m in range(epsilon.shape[-1])]
        if len(epsilon.shape) == 3:  # an example's holds at all its positions
            middle = (1,) * (len(student.shape) - 2)
            of_examples = (-1, *middle, epsilon.shape[1])
            coefficients = [ops.reshape(x, of_examples) for x in coefficients]
    if not from_logits:
        log_p = log_student(student, from_logits=False)
        rows = Rows(student, None, log_p)
    elif constant:
        return _with_gradient(teacher, log_teacher, student, coefficients)
    else:  # may be differentiated as well: leave it to autodiff
        rows = softmax_and_log(student)
    terms = _terms(rows, coefficients)
    value = _expected(teacher.probabilities, log_teacher, terms, coefficients)
    return ops.squeeze(value, axis=-1)


def _terms(student: Rows, coefficients: Sequence[Tensor]) -> Tensor:
    """Return `sum_m epsilon_{c,m} (1 - p_c)^m - log p_c`, `(..., C)`."""
    if not coefficients:
        return -student.log
    # 1 - p has the digits that the softmax has, as -expm1(log p) would.
    one_minus_p = 1.0 - student.probabilities
    return perturbation(one_minus_p, coefficients) - student.log


def _expected(
    weights: Tensor,
    log_teacher: Tensor | None,
    terms: Tensor,
    coefficients: Sequence[Tensor],
) -> Tensor:
    """Return `sum_c weights_c (log t_c + terms_c)`, `(..., 1)`.

    `log t` is left out where it is None.
    """
    if log_teacher is None:
        return row_sum(weights * terms)
    if _is_long(weights, coefficients) and fuses_shift(weights):
        return row_sum(weights * log_teacher) + row_sum(weights * terms)
    return row_sum(weights * (log_teacher + terms))


def _is_long(x: Tensor, coefficients: Sequence[Tensor]) -> bool:
    return len(coefficients) >= LONG and threads_by_operations(x)


def _with_gradient(
    teacher: Rows,
    log_teacher: Tensor | None,
    logits: Tensor,
    coefficients: Sequence[Tensor],
) -> Tensor:
    """Eq. 7 with its gradient written out, at half the cost of autodiff.

    With `h` the slope of the perturbation, `w_c = t_c (1 + p_c h_c)`:

        d loss / d logits = p sum_c w_c - w

    A teacher that is yet to be divided by its totals is divided after the sums.
    """
    log = () if log_teacher is None else (log_teacher,)
    shares = () if teacher.total is None else (1.0 / teacher.total,)

    @ops.custom_gradient
    def differentiable(weights: Tensor, logits: Tensor, *rest: Tensor) -> Any:
        log_teacher = rest[0] if log else None
        share = rest[-1] if shares else None
        student = softmax_and_log(logits)
        terms = _terms(student, coefficients)
        undivided = _expected(weights, log_teacher, terms, coefficients)
        value = undivided if share is None else share * undivided

        def gradient(*args: Tensor, upstream: Tensor = None) -> Any:
            if upstream is None:  # as TensorFlow and JAX call it
                (upstream,) = args
            upstream = ops.expand_dims(upstream, -1)
            divided = upstream if share is None else upstream * share
            both = terms if log_teacher is None else log_teacher + terms
            p = student.probabilities
            w, total = _weights(weights, share, p, coefficients)
            return (
                divided * both,
                upstream * (total * p - w),
                *(divided * weights for _ in log),
                *(upstream * undivided for _ in shares),
            )

        return ops.squeeze(value, axis=-1), gradient

    return differentiable(teacher.weights, logits, *log, *shares)


def _weights(
    teacher: Tensor,
    share: Tensor | None,
    p: Tensor,
    coefficients: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Return `w_c = t_c (1 + p_c h_c)`, `(..., C)`, and its sum, `(..., 1)`.

    Args:
        teacher: t, or what becomes it by `share`; that sums to 1.
        share: `(..., 1)`, or None.
        p: the student.
        coefficients: epsilon, one a power.
    """
    if not coefficients:
        w, total = teacher, row_sum(teacher)
    else:
        bent = teacher * (p * slope(1.0 - p, coefficients))
        w = teacher + bent
        if not _is_long(teacher, coefficients):
            total = row_sum(w)
        elif share is None:  # `t p h` takes fewer operations than `w`
            total = row_sum(teacher) + row_sum(bent)
        else:
            return share * w, 1.0 + share * row_sum(bent)
    return (w, total) if share is None else (share * w, share * total)


@keras.saving.register_keras_serializable(package="keras_ptloss")
class PTLoss(TeacherLoss):
    """Perturbed distillation loss: KL from teacher to student, perturbed.

    Use it as any Keras loss, with the teacher's outputs as `y_true`:

        loss = sum_c t_c (log t_c - log p_c)
             + sum_c t_c sum_m epsilon_{c,m} (1 - p_c)^m           (Eq. 7)

    `epsilon = 0` is `keras.losses.KLDivergence`. Coefficients that make the
    student better are found by `ProxyTeacherSearch`, as `result.epsilon`.
    The loss is convex in `p` while `epsilon_m >= -1 / m`.

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
        entropy: whether the value has `sum_c t_c log t_c`, which the student
            does not move. Without it the student's gradient is the same, for a
            logarithm a value less; the value is a cross-entropy, perturbed,
            and not 0 where `p = t`.
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
        entropy: bool = True,
        name: str | None = "pt_loss",
        **kwargs: Any,
    ) -> None:
        own = {
            "epsilon": check_constant_epsilon(epsilon),
            **check_teacher_calibration(
                teacher_temperature, teacher_scale, teacher_bias
            ),
            "entropy": check_flag("entropy", entropy),
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
