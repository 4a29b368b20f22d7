"""The other losses that the paper compares with (§5).

What needs no class of its own, with `t` stored teacher probabilities:

* KL from the teacher: `PTLoss(0.0)`.
* Temperature, vector scaling: `PTLoss(0.0, teacher_temperature=tau)`, with
  one number a class and `teacher_bias` besides.
* Hard-label mix: `Distiller(..., hard_label_loss=loss, hard_label_weight=w)`.
* One-hot labels (OHT): `keras.utils.to_categorical(labels)` for `t`, where
  `PTLoss(0.0)` is `keras.losses.CategoricalCrossentropy`.
* Early-stopped teacher (ESKD, Cho and Hariharan 2019): fit the teacher with
  `keras.callbacks.EarlyStopping("val_accuracy", patience=epochs,
  restore_best_weights=True)`; it ends with the weights of its best epoch.
* Teacher-free self-distillation (Tf-KD_self, Yuan et al. 2020): fit a student
  on labels, and distil it into `keras.models.clone_model(student)`, a copy
  with new weights, by a `Distiller` with `hard_label_weight`. The temperature
  is the teacher's alone, as everywhere here; Yuan et al. soften both.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_ptloss._backend import replicas
from keras_ptloss._calibration import Calibration
from keras_ptloss._checks import (
    check_classes,
    check_number,
    check_probabilities,
    fail,
)
from keras_ptloss.losses._pt_loss import LOWEST, TINY, pt_loss

Tensor = Any

MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


def label_smoothing_loss(
    y_true: Tensor,
    y_pred: Tensor,
    delta: float,
    *,
    from_logits: bool = False,
    teacher_from_logits: bool = False,
) -> Tensor:
    """Compute `KL(t' || p)` with `t' = (1 - delta) t + delta / C`, `(...)`."""
    teacher = _teacher(y_true, teacher_from_logits)
    smoothed = (1.0 - delta) * teacher + delta / teacher.shape[-1]
    return pt_loss(
        smoothed,
        y_pred,
        0.0,
        from_logits=from_logits,
        teacher_from_logits=False,
    )


def focal_loss(
    y_true: Tensor,
    y_pred: Tensor,
    gamma: float,
    *,
    from_logits: bool = False,
    teacher_from_logits: bool = False,
) -> Tensor:
    """Compute `-sum_c t_c (1 - p_c)^gamma log p_c` (Eq. 12), `(...)`."""
    log_student = _log_student(y_pred, from_logits)
    teacher = _teacher(y_true, teacher_from_logits)
    teacher = ops.cast(teacher, log_student.dtype)
    check_classes("y_true", teacher, "y_pred", log_student)
    # Above 0, where the power has no finite slope for gamma below 1.
    one_minus_p = ops.maximum(-ops.expm1(log_student), TINY)
    focus = ops.power(one_minus_p, gamma)
    return -ops.sum(teacher * focus * log_student, axis=-1)


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
    if len(shape) != len(student_shape) + 1 or shape[-2] != 2:
        raise ValueError(
            "`y_true` must hold the teacher's row and the one-hot label, "
            "(..., 2, classes): np.stack([teacher, one_hot], axis=-2). "
            f"Received: y_true of shape {shape}, y_pred of shape "
            f"{student_shape}"
        )
    teacher, label = y_true[..., 0, :], y_true[..., 1, :]
    kl = pt_loss(
        teacher,
        y_pred,
        0.0,
        from_logits=from_logits,
        teacher_from_logits=teacher_from_logits,
    )
    one_minus_p = -ops.expm1(_log_student(y_pred, from_logits))
    label = ops.cast(label, one_minus_p.dtype)
    return kl + epsilon * ops.sum(label * one_minus_p, axis=-1)


def _teacher(y_true: Tensor, from_logits: bool) -> Tensor:
    """Return `t`, `(..., C)`."""
    y_true = _at_least_float32(y_true)
    if not from_logits:
        check_probabilities("y_true", y_true, "say teacher_from_logits=True")
    return Calibration()(y_true, from_logits=from_logits)


def _log_student(y_pred: Tensor, from_logits: bool) -> Tensor:
    """Return `log p`, `(..., C)`, held finite."""
    y_pred = _at_least_float32(y_pred)
    if from_logits:
        return ops.maximum(ops.log_softmax(y_pred, axis=-1), LOWEST)
    check_probabilities("y_pred", y_pred, "say from_logits=True")
    return ops.log(ops.maximum(y_pred, keras.config.epsilon()))


def _at_least_float32(x: Tensor) -> Tensor:
    x = ops.convert_to_tensor(x)
    return ops.cast(x, keras.backend.result_type(x.dtype, "float32"))


class _FunctionLoss(keras.losses.Loss):
    """The Keras shell of a function above, with its one number."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        number: dict[str, float],
        from_logits: bool,
        teacher_from_logits: bool | None,
        reduction: str | None,
        name: str | None,
        dtype: Any,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self._function = function
        self._number = number
        self.from_logits = bool(from_logits)
        self.teacher_from_logits = (
            self.from_logits
            if teacher_from_logits is None
            else bool(teacher_from_logits)
        )

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return one loss an example, `(...)`."""
        values = self._function(
            y_true,
            y_pred,
            **self._number,
            from_logits=self.from_logits,
            teacher_from_logits=self.teacher_from_logits,
        )
        return ops.cast(values, self.dtype)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same loss again."""
        return {
            **super().get_config(),
            **self._number,
            "from_logits": self.from_logits,
            "teacher_from_logits": self.teacher_from_logits,
            "dtype": self.dtype,
        }


@keras.saving.register_keras_serializable(package="keras_ptloss")
class LabelSmoothingLoss(_FunctionLoss):
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
        reduction: as in `keras.losses.Loss`.
        name: name of the loss.
        dtype: dtype of the value. The computation is float32 or better.

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
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "label_smoothing_loss",
        dtype: Any = None,
    ) -> None:
        self.delta = check_number("delta", delta, at_least=0.0)
        if self.delta > 1.0:
            fail("delta", "at most 1", delta)
        super().__init__(
            label_smoothing_loss,
            {"delta": self.delta},
            from_logits,
            teacher_from_logits,
            reduction,
            name,
            dtype,
        )


@keras.saving.register_keras_serializable(package="keras_ptloss")
class FocalLoss(_FunctionLoss):
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
        reduction: as in `keras.losses.Loss`.
        name: name of the loss.
        dtype: dtype of the value. The computation is float32 or better.

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
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "focal_loss",
        dtype: Any = None,
    ) -> None:
        self.gamma = check_number("gamma", gamma, at_least=0.0)
        super().__init__(
            focal_loss,
            {"gamma": self.gamma},
            from_logits,
            teacher_from_logits,
            reduction,
            name,
            dtype,
        )


@keras.saving.register_keras_serializable(package="keras_ptloss")
class LabelPerturbedLoss(_FunctionLoss):
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
        reduction: as in `keras.losses.Loss`.
        name: name of the loss.
        dtype: dtype of the value. The computation is float32 or better.

    Raises:
        ValueError: if `epsilon` is below -1; when called, if the shapes are
            others, or (seen outside compiled functions) rows that should be
            probabilities are not.

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
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "label_perturbed_loss",
        dtype: Any = None,
    ) -> None:
        self.epsilon = check_number("epsilon", epsilon, at_least=-1.0)
        super().__init__(
            label_perturbed_loss,
            {"epsilon": self.epsilon},
            from_logits,
            teacher_from_logits,
            reduction,
            name,
            dtype,
        )


@keras.saving.register_keras_serializable(package="keras_ptloss")
class Flooding(keras.losses.Loss):
    """Keep the training loss at a level, so that it does not go to zero.

    With `L` the mean of another loss over the batch:

        flooded = |L - level| + level

    Below the level the gradient changes its sign. It is the mean that is
    flooded, after weights and masks, never one example; under a `tf.distribute`
    strategy the mean over a replica's part of the batch. Regularisers stay
    outside. `val_loss` is flooded as well: watch a metric instead.

    Args:
        loss: the loss to flood, a `keras.losses.Loss` whose `reduction` is a
            mean; `y_true` and `y_pred` are what it takes.
        level: the flood level, in the loss's units, at least 0.
        name: name of the loss.

    Raises:
        ValueError: if an argument is not of this form.

    Example:
        >>> import numpy as np
        >>> kl, rows = PTLoss(0.0), np.array([[0.9, 0.1], [0.5, 0.5]])
        >>> float(Flooding(kl, 0.25)(rows, rows))
        0.5
        >>> float(kl(rows, rows[::-1])) < 0.5
        True

    Reference:
        Ishida et al. 2020, Do We Need Zero Training Loss After Achieving Zero
        Training Error? (https://arxiv.org/abs/2002.08709).
    """

    def __init__(
        self,
        loss: keras.losses.Loss,
        level: float,
        *,
        name: str | None = "flooding",
    ) -> None:
        if not isinstance(loss, keras.losses.Loss):
            fail("loss", "a keras.losses.Loss", loss)
        if loss.reduction not in MEANS:
            raise ValueError(
                "`loss` must take the mean over the batch, with a reduction "
                f"of {', '.join(map(repr, MEANS))}. Received: loss "
                f"{loss.name!r} with reduction={loss.reduction!r}"
            )
        super().__init__(name=name, reduction=loss.reduction, dtype=loss.dtype)
        self.loss = loss
        self.level = check_number("level", level, at_least=0.0)

    def __call__(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor = None
    ) -> Tensor:
        """Return the flooded mean, a scalar.

        Args:
            y_true: as the flooded loss takes it.
            y_pred: as the flooded loss takes it.
            sample_weight: as the flooded loss takes it.

        Returns:
            A scalar.
        """
        mean = self.loss(y_true, y_pred, sample_weight=sample_weight)
        # Keras has divided the mean by the number of replicas.
        level = ops.cast(self.level / replicas(), mean.dtype)
        return ops.abs(mean - level) + level

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same loss again."""
        return {
            "loss": keras.saving.serialize_keras_object(self.loss),
            "level": self.level,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Flooding":
        """Build the loss from what `get_config` returned."""
        loss = keras.saving.deserialize_keras_object(config["loss"])
        return cls(**{**config, "loss": loss})
