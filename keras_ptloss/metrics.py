"""Metrics of a student: its distance to the teacher, and its calibration.

`TeacherAgreement`, `TotalVariationDistance` and `KLToTeacher` compare the
student with the teacher, not with labels: `y_true` holds the teacher's
probabilities, `(..., C)`, and a row of zeros is padding. `BrierScore` and
`ExpectedCalibrationError` compare it with true labels: class indices, `(...)`
or `(..., 1)`, or one-hot rows, `(..., C)`. A label that is not a class is an
error in an eager call, and gives NaN in a compiled function.

`y_pred` holds the student's outputs, `(..., C)`, or `(..., 1)` for the
probability (or the logit) of the second of two classes. All metrics are
averaged over all leading axes. `sample_weight` is `(...)`, or one weight per
example, `(N,)`. Positions with weight 0, or hidden by a Keras mask, may hold
any values, including NaN.
"""

from typing import Any

import keras
from keras import ops

from keras_ptloss._backend import set_direction, visible_values
from keras_ptloss._validation import (
    check_classes,
    check_count,
    check_flag,
    fail,
    valid_probs,
)
from keras_ptloss.losses.base import (
    TINY,
    log_student,
    position_weights,
    read_student,
    read_teacher,
)

Tensor = Any

__all__ = [
    "BrierScore",
    "ExpectedCalibrationError",
    "KLToTeacher",
    "TeacherAgreement",
    "TotalVariationDistance",
]


class StudentMetric(keras.metrics.Metric):
    """Base class of all metrics: a mean over the positions of the student.

    A subclass implements `read_truth` and `values`. With weights w, the metric
    is

        sum_b |sum_n w_n value_{n,b}| / sum_n w_n

    where only the calibration error has more than one bin b.
    """

    default_name: str
    better = "down"
    num_bins = 1

    def __init__(
        self,
        *,
        from_logits: bool = False,
        name: str | None = None,
        dtype: Any = "float32",
    ) -> None:
        super().__init__(name=name or self.default_name, dtype=dtype)
        set_direction(self, self.better)
        self.from_logits = check_flag("from_logits", from_logits)
        self.sums = self.add_weight(
            shape=(self.num_bins,), initializer="zeros", name="sums"
        )
        self.count = self.add_weight(
            shape=(), initializer="zeros", name="count"
        )

    def read_truth(
        self, y_true: Tensor, student: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the truth for the comparison, `(..., C)`, and weights."""
        raise NotImplementedError

    def values(self, truth: Tensor, student: Tensor) -> Tensor:
        """Return the values of each position, `(...)` or `(..., num_bins)`.

        Args:
            truth: probabilities, `(..., C)`.
            student: logits with `from_logits`, else probabilities, `(..., C)`.
        """
        raise NotImplementedError

    def update_state(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor = None
    ) -> None:
        """Add a batch: the truth and the student's outputs."""
        y_pred = ops.convert_to_tensor(y_pred)
        weight = position_weights(y_pred, sample_weight)
        if weight is None:
            weight = ops.ones_like(y_pred[..., 0], dtype="float32")
        student = ops.cast(_where_weighted(y_pred, weight), "float32")
        student = read_student(student, from_logits=self.from_logits)
        truth, weight = self.read_truth(y_true, student, weight)
        values = ops.reshape(self.values(truth, student), (-1, self.num_bins))
        sums = ops.sum(ops.reshape(weight, (-1, 1)) * values, axis=0)
        self.sums.assign_add(ops.cast(sums, self.dtype))
        self.count.assign_add(ops.cast(ops.sum(weight), self.dtype))

    def result(self) -> Tensor:
        """Return the metric, a scalar; 0 before the first example."""
        return ops.divide_no_nan(ops.sum(ops.abs(self.sums)), self.count)

    def probs(self, student: Tensor) -> Tensor:
        """Return the student's probabilities."""
        return ops.softmax(student, axis=-1) if self.from_logits else student

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same metric again."""
        return {**super().get_config(), "from_logits": self.from_logits}


class TeacherMetric(StudentMetric):
    """Base class of the metrics that compare the student with the teacher."""

    def read_truth(
        self, y_true: Tensor, student: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the teacher's probabilities, and weights with 0 at padding."""
        teacher = read_teacher(_where_weighted(y_true, weight), student)
        padding = ops.all(ops.equal(teacher, 0.0), axis=-1)
        return teacher, ops.where(padding, 0.0, weight)


class LabelMetric(StudentMetric):
    """Base class of the metrics that compare the student with true labels."""

    def read_truth(
        self, y_true: Tensor, student: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return one-hot labels, and weights with NaN at invalid labels."""
        num_classes = student.shape[-1]
        labels = ops.convert_to_tensor(y_true)
        if labels.shape[-1] == 1 and len(labels.shape) == len(student.shape):
            labels = ops.squeeze(labels, axis=-1)
        if len(labels.shape) == len(weight.shape):
            indices = ops.cast(labels, "int32")
            valid = (indices >= 0) & (indices < num_classes)
            indices = ops.where(valid, indices, -1)  # PyTorch refuses others.
            labels = ops.one_hot(indices, num_classes, dtype="float32")
        check_classes("y_true", labels, "y_pred", student)
        labels = ops.cast(_where_weighted(labels, weight), "float32")
        labels = valid_probs("y_true", labels, "give class indices instead")
        # A row of zeros stands for an index outside of [0, C).
        wrong = ops.all(ops.equal(labels, 0.0), axis=-1) & ops.not_equal(
            weight, 0
        )
        values = visible_values(wrong)
        if values is not None and values.any():
            fail(
                "y_true",
                f"class indices in [0, {num_classes}), or one-hot rows, except "
                "where the weight is 0",
                ops.convert_to_numpy(y_true)[values][0].tolist(),
            )
        return labels, ops.where(wrong, float("nan"), weight)


@keras.saving.register_keras_serializable(package="keras_ptloss")
class TeacherAgreement(TeacherMetric):
    """Share of examples for which teacher and student predict the same class.

        agreement = mean_n [argmax_c t_{n,c} = argmax_c p_{n,c}]

    Teacher and student can agree and both be wrong. If classes are tied, the
    first of them is used.

    Args:
        from_logits: whether the student's outputs are logits.
        name, dtype: as in `keras.metrics.Metric`.

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

    default_name = "teacher_agreement"
    better = "up"

    def values(self, truth: Tensor, student: Tensor) -> Tensor:
        """Return 1 where both predict the same class, else 0."""
        # NaN where a row is invalid, else 0.
        valid = 0.0 * (ops.max(truth, -1) + ops.max(student, -1))
        same = ops.equal(ops.argmax(truth, -1), ops.argmax(student, -1))
        return ops.cast(same, "float32") + valid


@keras.saving.register_keras_serializable(package="keras_ptloss")
class TotalVariationDistance(TeacherMetric):
    """Half the L1 distance between teacher and student, from 0 to 1.

        TV = mean_n 1/2 sum_c |t_{n,c} - p_{n,c}|

    This is the largest difference between the probabilities that teacher and
    student give to any set of classes. Unlike with KL, a single confident error
    cannot dominate the mean.

    Args:
        from_logits: whether the student's outputs are logits.
        name, dtype: as in `keras.metrics.Metric`.

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

    default_name = "total_variation_distance"

    def values(self, truth: Tensor, student: Tensor) -> Tensor:
        """Return half the L1 distance."""
        return 0.5 * ops.sum(ops.abs(truth - self.probs(student)), axis=-1)


@keras.saving.register_keras_serializable(package="keras_ptloss")
class KLToTeacher(TeacherMetric):
    """Kullback-Leibler divergence from teacher to student, in nats.

        KL = mean_n sum_c t_{n,c} (log t_{n,c} - log p_{n,c})

    This is PTLoss without the perturbation. PTLoss moves the student away from
    the teacher on purpose, and this metric shows how far. Student probabilities
    are clipped from below at `keras.config.epsilon()`.

    Args:
        from_logits: whether the student's outputs are logits.
        name, dtype: as in `keras.metrics.Metric`.

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

    default_name = "kl_to_teacher"

    def values(self, truth: Tensor, student: Tensor) -> Tensor:
        """Return the divergence."""
        log_t = ops.log(ops.maximum(truth, TINY))
        log_p = log_student(student, from_logits=self.from_logits)
        return ops.sum(truth * (log_t - log_p), axis=-1)


@keras.saving.register_keras_serializable(package="keras_ptloss")
class BrierScore(LabelMetric):
    """Squared distance between the student and one-hot true labels.

        Brier = mean_n sum_c (p_{n,c} - y_{n,c})^2

    It ranges from 0 to 2. The true probabilities have the lowest expected
    score, so the score measures accuracy and calibration together. It is a sum
    over all classes; definitions for two classes that use only one of them give
    half of this score.

    Args:
        from_logits: whether the student's outputs are logits.
        name, dtype: as in `keras.metrics.Metric`.

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

    default_name = "brier_score"

    def values(self, truth: Tensor, student: Tensor) -> Tensor:
        """Return the squared distance."""
        return ops.sum(ops.square(self.probs(student) - truth), axis=-1)


@keras.saving.register_keras_serializable(package="keras_ptloss")
class ExpectedCalibrationError(LabelMetric):
    """Distance between the student's confidence and its accuracy.

    A student with confidence 0.9 should be right 9 times in 10. Examples are
    sorted by their confidence `max_c p_c` into bins B of equal width,
    `(m / num_bins, (m + 1) / num_bins]`:

        ECE = sum_B (|B| / N) |accuracy(B) - confidence(B)|

    With sample weights, `|B|` and `N` are sums of weights. The bins are summed
    over all batches, so the result does not depend on the batch size.

    Args:
        num_bins: number of bins.
        **kwargs: `from_logits`, `name` and `dtype`, as in
            `BrierScore`.

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

    default_name = "expected_calibration_error"

    def __init__(self, *, num_bins: int = 15, **kwargs: Any) -> None:
        self.num_bins = check_count("num_bins", num_bins)
        super().__init__(**kwargs)

    def values(self, truth: Tensor, student: Tensor) -> Tensor:
        """Return accuracy minus confidence, in the column of its bin."""
        confidence = ops.max(self.probs(student), axis=-1)
        right = ops.equal(ops.argmax(student, -1), ops.argmax(truth, -1))
        gap = ops.cast(right, confidence.dtype) - confidence
        bins = ops.ceil(confidence * self.num_bins) - 1
        bins = ops.cast(ops.clip(bins, 0, self.num_bins - 1), "int32")
        return gap[..., None] * ops.one_hot(bins, self.num_bins)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same metric again."""
        return {**super().get_config(), "num_bins": self.num_bins}


def _where_weighted(rows: Tensor, weight: Tensor) -> Tensor:
    """Return rows `(..., C)`, with zeros in the rows of weight 0."""
    rows = ops.convert_to_tensor(rows)
    seen = ops.not_equal(ops.expand_dims(weight, -1), 0.0)
    return ops.where(seen, rows, ops.zeros_like(rows))
