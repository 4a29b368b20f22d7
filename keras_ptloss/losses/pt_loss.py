"""The perturbed distillation loss PTLoss (Eq. 7)."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ptloss._backend import custom_gradient
from keras_ptloss._math import log_teacher_probs, perturbation, slope
from keras_ptloss._validation import (
    check_epsilon,
    check_flag,
    check_number,
)
from keras_ptloss.losses.base import (
    TINY,
    TeacherLoss,
    fixed_epsilon,
    log_student,
    read_student,
    read_teacher,
)

Tensor = Any


def pt_loss(
    y_true: Tensor,
    y_pred: Tensor,
    epsilon: Tensor,
    *,
    teacher_temperature: float = 1.0,
    from_logits: bool = False,
) -> Tensor:
    """Compute PTLoss, a perturbed KL divergence from teacher to student.

    `epsilon_m` is added to the leading coefficients `1 / m` of the series
    `-log p = sum_m (1 - p)^m / m`.

        loss = sum_c t_c (log t_c - log p_c)
             + sum_c t_c sum_m epsilon_{c,m} (1 - p_c)^m           (Eq. 7)

    The student's optimum is then not the teacher `t` but a *proxy teacher*,
    which can be closer to the true distribution.

    Args:
        y_true: the teacher's probabilities, `(..., C)`, or `(..., 1)` for the
            probability of the second of two classes. Rows of zeros are padding,
            and their loss is 0.
        y_pred: the student's probabilities, `(..., C)`, or logits with
            `from_logits`; `(..., 1)` for a binary head.
        epsilon: coefficients: a number (order 1), `(M,)` shared by the classes,
            `(C, M)` per class, or `(N, C, M)` per example.
        teacher_temperature: a number above 0. The teacher becomes
            `softmax(log(max(t, 1e-7)) / teacher_temperature)`, unless it is 1.
        from_logits: whether `y_pred` holds logits.

    Returns:
        One loss per example, shape `(...)`, in nats, in float32 or better.

    Raises:
        ValueError: if the shapes differ, if `epsilon` has another shape or is
            not finite, or (in eager calls) if a row is not a probability
            distribution. In compiled functions the loss of such a row is NaN.

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
    temperature = check_number(
        "teacher_temperature", teacher_temperature, above=0.0
    )
    student = read_student(y_pred, from_logits=from_logits)
    t = read_teacher(y_true, student)
    if temperature != 1.0:
        # The sum is 0 for padding, NaN for an invalid row, and 1 otherwise.
        total = ops.sum(t, axis=-1, keepdims=True)
        t = total * ops.softmax(log_teacher_probs(t, ops) / temperature)
    epsilon = check_epsilon(
        epsilon, max_rank=3, classes=t.shape[-1], examples=student.shape[0]
    )
    constant = isinstance(epsilon, np.ndarray)
    if constant and not np.any(epsilon):
        coefficients = []
    else:
        epsilon = ops.cast(epsilon, student.dtype)
        if len(epsilon.shape) == 3:  # Each example has its own coefficients.
            *_, classes, order = epsilon.shape
            positions = (1,) * (len(student.shape) - 2)
            epsilon = ops.reshape(epsilon, (-1, *positions, classes, order))
        coefficients = [epsilon[..., m] for m in range(epsilon.shape[-1])]
    if from_logits and constant:
        return _from_logits(t, student, coefficients)
    # Here, automatic differentiation also covers epsilon.
    log_p = log_student(student, from_logits=from_logits)
    p = ops.exp(log_p) if from_logits else student
    return _eq_7(t, p, log_p, coefficients)


def _eq_7(
    t: Tensor, p: Tensor, log_p: Tensor, coefficients: Sequence[Tensor]
) -> Tensor:
    """Return Eq. 7 with `0 log 0 = 0`, `(...)`."""
    log_t = ops.log(ops.maximum(t, TINY))
    return ops.sum(t * (log_t + _cost(p, log_p, coefficients)), axis=-1)


def _cost(p: Tensor, log_p: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
    """Return `-log p_c + sum_m epsilon_{c,m} (1 - p_c)^m`, `(..., C)`."""
    if not coefficients:
        return -log_p
    return perturbation(1.0 - p, coefficients) - log_p


def _from_logits(
    t: Tensor, logits: Tensor, coefficients: Sequence[Tensor]
) -> Tensor:
    """Return Eq. 7 with a gradient that costs half as much as autodiff.

    With `h` the slope of the perturbation and `w_c = t_c (1 + p_c h_c)`,

        d loss / d logits = p sum_c w_c - w.
    """

    @custom_gradient
    def loss(t: Tensor, logits: Tensor) -> Any:
        log_p = log_student(logits, from_logits=True)
        p = ops.exp(log_p)

        def gradient(upstream: Tensor) -> tuple[Tensor, Tensor]:
            upstream = ops.expand_dims(upstream, -1)
            w = t
            if coefficients:
                w = t * (1.0 + p * slope(1.0 - p, coefficients))
            by_logits = p * ops.sum(w, axis=-1, keepdims=True) - w
            log_t = ops.log(ops.maximum(t, TINY))
            by_t = 1.0 + log_t + _cost(p, log_p, coefficients)
            return upstream * by_t, upstream * by_logits

        return _eq_7(t, p, log_p, coefficients), gradient

    return loss(t, logits)


@keras.saving.register_keras_serializable(package="keras_ptloss")
class PTLoss(TeacherLoss):
    """Perturbed distillation loss: `pt_loss` (Eq. 7) as a Keras loss.

    Use it like any Keras loss, with the teacher's probabilities as `y_true`.
    With `epsilon = 0`, it is `keras.losses.KLDivergence`. `ProxyTeacherSearch`
    finds coefficients that make the student better. The loss is convex in the
    student's probabilities if `epsilon_m >= -1 / m` for every m.

    Args:
        epsilon: coefficients: a number (order 1), `(M,)` shared by the classes,
            or `(C, M)` per class.
        teacher_temperature: a number above 0. The teacher becomes
            `softmax(log(max(t, 1e-7)) / teacher_temperature)`, unless it is 1.
        from_logits: whether `y_pred`, the student's output, holds logits.
        reduction: as in `keras.losses.Loss`.
        name: name of the loss.
        dtype: dtype of the result. The loss is computed in float32 or better.

    Example:
        >>> import keras, numpy as np
        >>> student = keras.Sequential([keras.layers.Dense(3)])
        >>> student.compile("adam", loss=PTLoss([0.5, 0.1], from_logits=True))
        >>> x = np.ones((8, 4), "float32")
        >>> teacher_probs = np.full((8, 3), 1 / 3, "float32")
        >>> history = student.fit(x, teacher_probs, verbose=0)
    """

    def __init__(
        self,
        epsilon: Any,
        *,
        teacher_temperature: float = 1.0,
        from_logits: bool = False,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "pt_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(
            {
                "epsilon": fixed_epsilon(epsilon),
                "teacher_temperature": check_number(
                    "teacher_temperature", teacher_temperature, above=0.0
                ),
            },
            from_logits=from_logits,
            reduction=reduction,
            name=name,
            dtype=dtype,
        )

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return one loss per example, `(...)`."""
        return pt_loss(
            y_true,
            y_pred,
            self.epsilon,
            teacher_temperature=self.teacher_temperature,
            from_logits=self.from_logits,
        )
