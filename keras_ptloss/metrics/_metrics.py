"""Metrics of a student: against its teacher, and of its calibration."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_ptloss._backend import visible_values
from keras_ptloss._checks import (
    check_class_axis,
    check_classes,
    check_count,
    check_probabilities,
    fail,
)
from keras_ptloss.losses._pt_loss import pt_loss

Tensor = Any


def _student(y_pred: Tensor, from_logits: bool) -> Tensor:
    if from_logits:
        return ops.softmax(y_pred, axis=-1)
    check_probabilities("y_pred", y_pred, "say from_logits=True")
    return y_pred


def _teacher(y_true: Tensor, teacher_from_logits: bool) -> Tensor:
    if teacher_from_logits:
        return ops.softmax(y_true, axis=-1)
    check_probabilities("y_true", y_true, "say teacher_from_logits=True")
    return y_true


def _pair(y_true: Tensor, y_pred: Tensor) -> tuple[Tensor, Tensor]:
    """Return teacher and student in float32, their class axes checked."""
    y_true = ops.cast(ops.convert_to_tensor(y_true), "float32")
    y_pred = ops.cast(ops.convert_to_tensor(y_pred), "float32")
    check_classes("y_true", y_true, "y_pred", y_pred)
    return y_true, y_pred


def _labelled(
    y_true: Tensor, y_pred: Tensor, from_logits: bool
) -> tuple[Tensor, Tensor]:
    """Return labels as rows `(..., C)`, and probabilities, both float32.

    Class indices come as `(...)` or `(..., 1)`, one-hot rows as `(..., C)`;
    since C is at least 2, the shape tells which.
    """
    y_true = ops.convert_to_tensor(y_true)
    y_pred = ops.cast(ops.convert_to_tensor(y_pred), "float32")
    check_class_axis("y_pred", y_pred)
    rank, classes = len(y_pred.shape), y_pred.shape[-1]
    if len(y_true.shape) == rank and y_true.shape[-1] == 1:
        y_true = ops.squeeze(y_true, axis=-1)
    if len(y_true.shape) == rank - 1:
        values = visible_values(y_true)
        if values is not None:
            outside = (values < 0) | (values >= classes)
            if outside.any():
                wanted = f"class indices in [0, {classes})"
                fail("y_true", wanted, values[outside][0])
        y_true = ops.one_hot(ops.cast(y_true, "int32"), classes)
    else:
        check_classes("y_true", y_true, "y_pred", y_pred)
    return ops.cast(y_true, "float32"), _student(y_pred, from_logits)


def _agreement(y_true: Tensor, y_pred: Tensor) -> Tensor:
    y_true, y_pred = _pair(y_true, y_pred)
    same = ops.equal(ops.argmax(y_true, axis=-1), ops.argmax(y_pred, axis=-1))
    return ops.cast(same, "float32")


def _total_variation(
    y_true: Tensor,
    y_pred: Tensor,
    *,
    from_logits: bool,
    teacher_from_logits: bool,
) -> Tensor:
    y_true, y_pred = _pair(y_true, y_pred)
    teacher = _teacher(y_true, teacher_from_logits)
    student = _student(y_pred, from_logits)
    return 0.5 * ops.sum(ops.abs(teacher - student), axis=-1)


def _kl(
    y_true: Tensor,
    y_pred: Tensor,
    *,
    from_logits: bool,
    teacher_from_logits: bool,
) -> Tensor:
    """KL(t || p): PTLoss without its perturbation."""
    y_true, y_pred = _pair(y_true, y_pred)
    return pt_loss(
        y_true,
        y_pred,
        0.0,
        from_logits=from_logits,
        teacher_from_logits=teacher_from_logits,
    )


def _brier(y_true: Tensor, y_pred: Tensor, *, from_logits: bool) -> Tensor:
    labels, student = _labelled(y_true, y_pred, from_logits)
    return ops.sum(ops.square(student - labels), axis=-1)


@keras.saving.register_keras_serializable(package="keras_ptloss")
class TeacherAgreement(keras.metrics.MeanMetricWrapper):
    """Share of examples where teacher and student name the same class.

    A student can agree with its teacher and err with it, so agreement tells
    how well it imitates, not how well it does.

        agreement = mean_n [argmax_c t_{n,c} = argmax_c p_{n,c}]

    The largest logit is the largest probability: either form will do on
    either side. Of classes that tie the first is taken.

    `y_true` is the teacher, `(..., C)`, `y_pred` the student, `(..., C)`, and
    `sample_weight` has the shape `(...)` or a leading part of it; every
    position of the leading axes is one case.

    Args:
        name: name of the metric.
        dtype: dtype of the running sums and the result.

    Raises:
        ValueError: on update, if the class counts differ or C is 1.

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

    def __init__(
        self, *, name: str = "teacher_agreement", dtype: Any = "float32"
    ) -> None:
        super().__init__(_agreement, name=name, dtype=dtype)
        # Keras reads it for `mode="auto"` of EarlyStopping and ModelCheckpoint.
        self._direction = "up"

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same metric again."""
        return {"name": self.name, "dtype": self.dtype}


class _DistanceToTeacher(keras.metrics.MeanMetricWrapper):
    """Mean over examples of a distance between two rows of probabilities."""

    def __init__(
        self,
        distance: Callable[..., Tensor],
        from_logits: bool,
        teacher_from_logits: bool | None,
        name: str,
        dtype: Any,
    ) -> None:
        self.from_logits = bool(from_logits)
        self.teacher_from_logits = (
            self.from_logits
            if teacher_from_logits is None
            else bool(teacher_from_logits)
        )
        super().__init__(
            distance,
            name=name,
            dtype=dtype,
            from_logits=self.from_logits,
            teacher_from_logits=self.teacher_from_logits,
        )
        # Keras reads it for `mode="auto"` of EarlyStopping and ModelCheckpoint.
        self._direction = "down"

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same metric again."""
        return {
            "from_logits": self.from_logits,
            "teacher_from_logits": self.teacher_from_logits,
            "name": self.name,
            "dtype": self.dtype,
        }


@keras.saving.register_keras_serializable(package="keras_ptloss")
class TotalVariationDistance(_DistanceToTeacher):
    """Half the L1 distance between teacher and student, 0 to 1.

    It is the largest difference in probability that the two give to any set
    of classes. Unlike KL it is bounded, so one confident error of the student
    cannot dominate the mean.

        TV = mean_n 1/2 sum_c |t_{n,c} - p_{n,c}|

    `y_true` is the teacher, `(..., C)`, `y_pred` the student, `(..., C)`, and
    `sample_weight` has the shape `(...)` or a leading part of it; every
    position of the leading axes is one case.

    Args:
        from_logits: whether the student's outputs are logits.
        teacher_from_logits: whether the teacher's are; None means the same as
            `from_logits`.
        name: name of the metric.
        dtype: dtype of the running sums and the result.

    Raises:
        ValueError: on update, if the class counts differ, C is 1, or (seen
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

    def __init__(
        self,
        *,
        from_logits: bool = False,
        teacher_from_logits: bool | None = None,
        name: str = "total_variation_distance",
        dtype: Any = "float32",
    ) -> None:
        super().__init__(
            _total_variation, from_logits, teacher_from_logits, name, dtype
        )


@keras.saving.register_keras_serializable(package="keras_ptloss")
class KLToTeacher(_DistanceToTeacher):
    """Kullback-Leibler divergence from teacher to student, in nats.

    What `PTLoss` is without its perturbation: logged beside PTLoss, it shows
    how far the student stays from the unperturbed teacher on purpose.

        KL = mean_n sum_c t_{n,c} (log t_{n,c} - log p_{n,c})

    `0 log 0 = 0`; a student's probability counts as
    `keras.config.epsilon()` at least, as in Keras, so that the mean stays
    finite. `y_true` is the teacher, `(..., C)`, `y_pred` the student,
    `(..., C)`, and `sample_weight` has the shape `(...)` or a leading part of
    it; every position of the leading axes is one case.

    Args:
        from_logits: whether the student's outputs are logits.
        teacher_from_logits: whether the teacher's are; None means the same as
            `from_logits`.
        name: name of the metric.
        dtype: dtype of the running sums and the result.

    Raises:
        ValueError: on update, if the class counts differ, C is 1, or (seen
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

    def __init__(
        self,
        *,
        from_logits: bool = False,
        teacher_from_logits: bool | None = None,
        name: str = "kl_to_teacher",
        dtype: Any = "float32",
    ) -> None:
        super().__init__(_kl, from_logits, teacher_from_logits, name, dtype)


# Their `y_true` is the teacher: labels in its place would be silently wrong.
TEACHER_METRICS = (TeacherAgreement, TotalVariationDistance, KLToTeacher)


@keras.saving.register_keras_serializable(package="keras_ptloss")
class BrierScore(keras.metrics.MeanMetricWrapper):
    """Squared distance between probabilities and labels, 0 to 2.

    A proper score: it is best for the true probabilities, so it judges
    accuracy and calibration together.

        Brier = mean_n sum_c (p_{n,c} - y_{n,c})^2

    It is the sum over the classes; scores of two-class problems that look at
    one of them are half of it. `y_true` holds class indices, `(...)` or
    `(..., 1)`, or one-hot rows, `(..., C)`; `y_pred` is `(..., C)` and
    `sample_weight` has the shape `(...)` or a leading part of it; every
    position of the leading axes is one case.

    Args:
        from_logits: whether `y_pred` holds logits.
        name: name of the metric.
        dtype: dtype of the running sums and the result.

    Raises:
        ValueError: on update, if labels and predictions do not fit, C is 1,
            or (seen outside compiled functions) rows that should be
            probabilities are not.

    Example:
        >>> import numpy as np
        >>> score = BrierScore()
        >>> score.update_state(
        ...     np.array([0, 1]), np.array([[1.0, 0.0], [0.5, 0.5]])
        ... )
        >>> float(score.result())
        0.25

    Reference:
        Brier 1950, Verification of Forecasts Expressed in Terms of
        Probability, Monthly Weather Review 78(1).
    """

    def __init__(
        self,
        *,
        from_logits: bool = False,
        name: str = "brier_score",
        dtype: Any = "float32",
    ) -> None:
        self.from_logits = bool(from_logits)
        super().__init__(
            _brier, name=name, dtype=dtype, from_logits=self.from_logits
        )
        # Keras reads it for `mode="auto"` of EarlyStopping and ModelCheckpoint.
        self._direction = "down"

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same metric again."""
        return {
            "from_logits": self.from_logits,
            "name": self.name,
            "dtype": self.dtype,
        }


def confidence_bins(confidence: Tensor, num_bins: int) -> Tensor:
    """Return the bin m of each confidence, in `(m, m + 1] / num_bins`."""
    bins = ops.ceil(confidence * num_bins) - 1
    return ops.cast(ops.clip(bins, 0, num_bins - 1), "int32")


@keras.saving.register_keras_serializable(package="keras_ptloss")
class ExpectedCalibrationError(keras.metrics.Metric):
    """How far confidence is from accuracy, averaged over bins of confidence.

    A student that says 0.9 should be right 9 times in 10. Examples are sorted
    by their confidence `max_c p_c` into bins B of equal width,
    `(m / num_bins, (m + 1) / num_bins]`:

        ECE = sum_B (|B| / N) |accuracy(B) - confidence(B)|

    The sums of each bin are kept, so that batches give what the whole data
    would. With weights, |B| and N are sums of weights. It is 0 before the
    first example. `y_true` holds class indices, `(...)` or `(..., 1)`, or
    one-hot rows, `(..., C)`; `y_pred` is `(..., C)` and `sample_weight` has
    the shape `(...)`, or a leading part of it; every position of the leading
    axes is one case.

    Args:
        num_bins: number of bins.
        from_logits: whether `y_pred` holds logits.
        name: name of the metric.
        dtype: dtype of the running sums and the result.

    Raises:
        ValueError: if `num_bins` is not a positive integer; on update, if
            labels and predictions do not fit, C is 1, or (seen outside
            compiled functions) rows that should be probabilities are not.

    Example:
        >>> import numpy as np
        >>> error = ExpectedCalibrationError(num_bins=10)
        >>> error.update_state(
        ...     np.array([0, 1]), np.array([[0.75, 0.25], [0.75, 0.25]])
        ... )
        >>> float(error.result())
        0.25

    Reference:
        Guo et al. 2017, On Calibration of Modern Neural Networks, Eq. 3
        (https://arxiv.org/abs/1706.04599).
    """

    def __init__(
        self,
        *,
        num_bins: int = 15,
        from_logits: bool = False,
        name: str = "expected_calibration_error",
        dtype: Any = "float32",
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.num_bins = check_count("num_bins", num_bins)
        self.from_logits = bool(from_logits)
        # Keras reads it for `mode="auto"` of EarlyStopping and ModelCheckpoint.
        self._direction = "down"
        self._visible = _Visible(
            name="visible", reduction=None, dtype="float32"
        )
        # |B| (accuracy - confidence) is all that the formula needs of a bin.
        self.gaps = self.add_variable(
            shape=(self.num_bins,),
            initializer="zeros",
            dtype=self.dtype,
            name="gaps",
        )
        self.count = self.add_variable(
            shape=(), initializer="zeros", dtype=self.dtype, name="count"
        )

    def update_state(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor = None
    ) -> None:
        """Add examples.

        Args:
            y_true: class indices, `(...)` or `(..., 1)`, or one-hot rows,
                `(..., C)`.
            y_pred: `(..., C)`. Its Keras mask, if it has one, is a weight.
            sample_weight: `(...)`, or a leading part of it.
        """
        weight = self._visible(y_pred, y_pred)
        if sample_weight is not None:
            weight = weight * _leading(sample_weight, weight)
        labels, student = _labelled(y_true, y_pred, self.from_logits)
        confidence = ops.max(student, axis=-1)
        right = ops.equal(
            ops.argmax(student, axis=-1), ops.argmax(labels, axis=-1)
        )
        bins = confidence_bins(confidence, self.num_bins)
        gaps = weight * (ops.cast(right, "float32") - confidence)
        gaps = ops.segment_sum(
            ops.reshape(gaps, (-1,)),
            ops.reshape(bins, (-1,)),
            num_segments=self.num_bins,
        )
        self.gaps.assign_add(ops.cast(gaps, self.dtype))
        self.count.assign_add(ops.cast(ops.sum(weight), self.dtype))

    def result(self) -> Tensor:
        """Return the error, a scalar."""
        return ops.divide_no_nan(ops.sum(ops.abs(self.gaps)), self.count)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same metric again."""
        return {
            "num_bins": self.num_bins,
            "from_logits": self.from_logits,
            "name": self.name,
            "dtype": self.dtype,
        }


class _Visible(keras.losses.Loss):
    """1 a case, 0 where a Keras mask hides it.

    Masks are no attribute of a JAX tracer; an unreduced loss is the public way
    to them.
    """

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        return ops.ones_like(y_pred[..., 0])


def _leading(weight: Tensor, cases: Tensor) -> Tensor:
    """Return `weight` in float32, axes aligned with the first of `cases`."""
    weight = ops.cast(ops.convert_to_tensor(weight), "float32")
    rank = len(cases.shape)
    if len(weight.shape) == rank + 1 and weight.shape[-1] == 1:
        weight = ops.squeeze(weight, axis=-1)
    for _ in range(rank - len(weight.shape)):
        weight = ops.expand_dims(weight, axis=-1)
    return weight
