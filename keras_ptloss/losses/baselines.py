"""The methods that the paper compares PTLoss with, as losses.

Some of these methods do not need a new class. The page "Which loss, which
function?" lists KL, temperature scaling and a mix with hard labels. The other
methods are:

* One-hot labels (OHT): `keras.utils.to_categorical(labels)` in place of the
  teacher's probabilities.
* Early-stopped teacher (ESKD, Cho and Hariharan 2019): fit the teacher with
  `keras.callbacks.EarlyStopping(..., restore_best_weights=True)`.
* Teacher-free self-distillation (Tf-KD_self, Yuan et al. 2020): fit a student
  on labels, then distil it into `keras.models.clone_model(student)`, mixed with
  hard labels. Yuan et al. apply a temperature to teacher and student;
  `teacher_temperature` applies only to the teacher.
* FilterKD: the `FilteredTeacher` callback.

The functions at the end return the coefficients that turn PTLoss into focal
loss, temperature scaling and label smoothing (Appendix A.1).
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ptloss._backend import replicas
from keras_ptloss._validation import check_count, check_number, fail
from keras_ptloss.losses.base import (
    TINY,
    TeacherLoss,
    log_student,
    read_student,
    read_teacher,
)
from keras_ptloss.losses.pt_loss import pt_loss

Tensor = Any

MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


@keras.saving.register_keras_serializable(package="keras_ptloss")
class FocalLoss(TeacherLoss):
    """Focal loss with a teacher's probabilities in place of the label.

    A class has less weight if the student already gives it a high probability:

        loss = -sum_c t_c (1 - p_c)^gamma log p_c                 (Eq. 12)

    This is a form of cross-entropy: with `gamma = 0`, the loss is the KL
    divergence plus the teacher's entropy, which does not depend on the student.

    Args:
        gamma: the focusing parameter, at least 0.
        **kwargs: `from_logits`, `reduction`, `name` and `dtype`, as in
            `PTLoss`.

    Example:
        >>> import numpy as np
        >>> loss = FocalLoss(2.0)
        >>> teacher, student = np.array([[0.0, 1.0]]), np.array([[0.75, 0.25]])
        >>> round(float(loss(teacher, student)), 4)
        0.7798

    Reference:
        Lin et al. 2017, Focal Loss for Dense Object Detection
        (https://arxiv.org/abs/1708.02002).
    """

    def __init__(self, gamma: float, **kwargs: Any) -> None:
        gamma = check_number("gamma", gamma, at_least=0.0)
        super().__init__({"gamma": gamma}, **kwargs)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return one loss per example, `(...)`."""
        student = read_student(y_pred, from_logits=self.from_logits)
        t = read_teacher(y_true, student)
        log_p = log_student(student, from_logits=self.from_logits)
        # If gamma is below 1, the power has an infinite slope at 0.
        one_minus_p = ops.maximum(-ops.expm1(log_p), TINY)
        return -ops.sum(t * ops.power(one_minus_p, self.gamma) * log_p, axis=-1)


@keras.saving.register_keras_serializable(package="keras_ptloss")
class LabelSmoothingLoss(TeacherLoss):
    """KL divergence from a mix of the teacher and the uniform distribution.

        loss = KL(t' || p),    t' = (1 - delta) t + delta / C     (Eq. 23)

    This lowers the teacher's confidence on all rows in the same way, and never
    changes the teacher's ranking of the classes. Eq. 23 has `delta / 2`, for
    `C = 2`.

    Args:
        delta: share of the uniform distribution, from 0 (plain KL) to 1.
        **kwargs: `from_logits`, `reduction`, `name` and `dtype`, as in
            `PTLoss`.

    Example:
        >>> import numpy as np
        >>> loss = LabelSmoothingLoss(0.1)
        >>> teacher = np.array([[1.0, 0.0]])
        >>> round(float(loss(teacher, np.array([[0.95, 0.05]]))), 4)
        0.0

    Reference:
        Szegedy et al. 2016, Rethinking the Inception Architecture for Computer
        Vision (https://arxiv.org/abs/1512.00567).
    """

    def __init__(self, delta: float, **kwargs: Any) -> None:
        delta = check_number("delta", delta, at_least=0.0, at_most=1.0)
        super().__init__({"delta": delta}, **kwargs)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return one loss per example, `(...)`."""
        student = read_student(y_pred, from_logits=self.from_logits)
        t = read_teacher(y_true, student)
        # The mean is 1 / C, and 0 for rows of padding.
        uniform = ops.mean(t, axis=-1, keepdims=True)
        smoothed = (1.0 - self.delta) * t + self.delta * uniform
        return pt_loss(smoothed, student, 0.0, from_logits=self.from_logits)


@keras.saving.register_keras_serializable(package="keras_ptloss")
class Flooding(TeacherLoss):
    """Keep the training loss from falling below a level.

    With `L` the mean of another loss over the batch:

        loss = |L - level| + level

    Below the level, the gradient changes its sign. L is the mean after weights
    and masks are applied; under a `tf.distribute` strategy it is the mean
    over a replica's part of the batch. Regularisation losses are not part of L.
    `val_loss` is flooded too, so monitor a metric instead.

    Args:
        loss: a `keras.losses.Loss` whose `reduction` is a mean. It gets the
            same `y_true` and `y_pred`.
        level: the flood level, in the units of the loss, at least 0.
        name: name of the loss.

    Example:
        >>> import numpy as np
        >>> from keras_ptloss import PTLoss
        >>> kl, probs = PTLoss(0.0), np.array([[0.9, 0.1], [0.5, 0.5]])
        >>> float(Flooding(kl, 0.25)(probs, probs))
        0.5

    Reference:
        Ishida et al. 2020, Do We Need Zero Training Loss After Achieving Zero
        Training Error? (https://arxiv.org/abs/2002.08709).
    """

    def __init__(
        self,
        loss: keras.losses.Loss,
        level: float,
        *,
        name: str | None = None,
    ) -> None:
        if not isinstance(loss, keras.losses.Loss):
            fail("loss", "a keras.losses.Loss", loss)
        if loss.reduction not in MEANS:
            raise ValueError(
                "`loss` must take the mean over the batch, with a reduction "
                f"of {', '.join(map(repr, MEANS))}. Received: loss "
                f"{loss.name!r} with reduction={loss.reduction!r}"
            )
        super().__init__(
            {"loss": loss, "level": check_number("level", level, at_least=0.0)},
            from_logits=getattr(loss, "from_logits", False),
            reduction=loss.reduction,
            name=name,
            dtype=loss.dtype,
        )
        # A Distiller reads these attributes of its loss.
        self.teacher_classes = getattr(loss, "teacher_classes", None)
        self.correction = getattr(loss, "correction", None)

    def __call__(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor = None
    ) -> Tensor:
        """Return the flooded mean, a scalar; arguments as for `loss`."""
        mean = self.loss(y_true, y_pred, sample_weight=sample_weight)
        # Keras has divided the mean by the number of replicas.
        level = ops.cast(self.level / replicas(), mean.dtype)
        return ops.abs(mean - level) + level

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same loss again."""
        config = super().get_config()
        return {name: config[name] for name in ("loss", "level", "name")}


def focal_epsilon(gamma: int, order: int) -> np.ndarray:
    """Return the coefficients of focal loss (Eq. 14), `(order,)`.

    `-(1-p)^gamma log p = sum_m (1-p)^(m+gamma) / m`, so that

        epsilon_m = -1/m                     for m <= gamma
        epsilon_m = 1/(m - gamma) - 1/m      for m > gamma

    The series is cut at `order`; without the cut it is exact. Only the
    gradients of the two losses are equal, because the value of PTLoss also
    contains the teacher's entropy.

    Args:
        gamma: the focusing parameter, an integer of at least 0.
        order: number of coefficients. The error in the gradient decreases in
            proportion to `(1-p)^order`.

    Example:
        >>> focal_epsilon(gamma=1, order=3).round(3)
        array([-1.   ,  0.5  ,  0.167])
    """
    gamma = check_count("gamma", gamma, at_least=0)
    m = np.arange(1, check_count("order", order) + 1, dtype="float64")
    target = np.where(m > gamma, 1.0 / np.maximum(m - gamma, 1.0), 0.0)
    return target - 1.0 / m


def temperature_epsilon(
    teacher_probs: Any, temperature: float, order: int
) -> np.ndarray:
    """Return the coefficients of temperature scaling (Eq. 22).

    With `t'` the teacher at the temperature, `t' ~ t^(1/temperature)`:

        epsilon_{n,c,m} = (t'_{n,c} / t_{n,c} - 1) / m

    The series is cut at `order`; see `focal_epsilon`.

    Args:
        teacher_probs: `(N, C)`, all above 0.
        temperature: a number above 0; 1 changes nothing.
        order: number of coefficients.

    Returns:
        Coefficients per example and class, `(N, C, order)`, for `pt_loss`.

    Example:
        >>> temperature_epsilon([[0.8, 0.2]], 2.0, order=2).round(3)
        array([[[-0.167, -0.083],
                [ 0.667,  0.333]]])
    """
    t = _check_positive(teacher_probs)
    temperature = check_number("temperature", temperature, above=0.0)
    softened = t ** (1.0 / temperature)
    softened /= softened.sum(axis=-1, keepdims=True)
    return _epsilon_of_target(t, softened, order)


def label_smoothing_epsilon(
    teacher_probs: Any, delta: float, order: int
) -> np.ndarray:
    """Return the coefficients of label smoothing (Eq. 27).

    The target is that of `LabelSmoothingLoss`:

        epsilon_{n,c,m} = delta (1 / (C t_{n,c}) - 1) / m

    The series is cut at `order`; see `focal_epsilon`.

    Args:
        teacher_probs: `(N, C)`, all above 0.
        delta: share of the uniform distribution, from 0 to 1.
        order: number of coefficients.

    Returns:
        Coefficients per example and class, `(N, C, order)`, for `pt_loss`.

    Example:
        >>> label_smoothing_epsilon([[0.8, 0.2]], 0.1, order=2).round(4)
        array([[[-0.0375, -0.0187],
                [ 0.15  ,  0.075 ]]])
    """
    t = _check_positive(teacher_probs)
    delta = check_number("delta", delta, at_least=0.0, at_most=1.0)
    smoothed = (1.0 - delta) * t + delta / t.shape[-1]
    return _epsilon_of_target(t, smoothed, order)


def _epsilon_of_target(
    t: np.ndarray, target: np.ndarray, order: int
) -> np.ndarray:
    """Return coefficients that replace `t` by `target`, `(N, C, order)`."""
    m = np.arange(1, check_count("order", order) + 1)
    return (target / t - 1.0)[..., None] / m


def _check_positive(teacher_probs: Any) -> np.ndarray:
    """Require `(N, C)` without zeros."""
    t = np.asarray(teacher_probs, "float64")
    if t.ndim != 2 or not np.all(t > 0):
        fail("teacher_probs", "(examples, classes), all above 0", teacher_probs)
    return t
