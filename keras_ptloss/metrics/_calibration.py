"""Metrics of a student against labels, of its calibration among all."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ptloss._backend import has_no_values, visible_values
from keras_ptloss._binary import two_events
from keras_ptloss._checks import (
    SUM_TOLERANCE,
    check_classes,
    check_count,
    check_flag,
    check_ignore_class,
    check_probabilities,
    differ,
    fail,
    shapes_differ,
)
from keras_ptloss._keras import set_direction
from keras_ptloss.metrics._cases import (
    MeanOfCases,
    looked_at,
    seen_weights,
)

Tensor = Any


def read_cases(
    y_true: Tensor,
    y_pred: Tensor,
    weight: Tensor,
    *,
    from_logits: bool,
    ignore_class: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return labels as rows and probabilities, `(..., C)`, and weights `(...)`.

    Args:
        y_true: class indices, `(...)` or `(..., 1)`, or one-hot rows.
        y_pred: the student's outputs, `(..., C)`.
        weight: one number a case, `(...)`.
        from_logits: whether `y_pred` holds logits.
        ignore_class: the index whose cases get weight 0.

    Returns:
        All in float32. The weight of a label that is no class is NaN, where
        it cannot be seen and refused.
    """
    y_true = ops.convert_to_tensor(y_true)
    y_pred = ops.cast(ops.convert_to_tensor(y_pred), "float32")
    student = two_events(y_pred, from_logits=from_logits)
    labels, is_class, ignored = _labels(y_true, student, ignore_class)
    weight = ops.where(ignored, 0.0, weight)
    wrong = ops.not_equal(weight, 0.0) & ~is_class
    seen = visible_values(wrong)
    if seen is not None and seen.any():
        classes = student.shape[-1]
        fail(
            "y_true",
            f"class indices in [0, {classes}), or one-hot rows, except where "
            "the weight is 0 or `ignore_class` says so",
            ops.convert_to_numpy(y_true)[seen][0],
        )
    weight = ops.where(wrong, np.nan, weight)
    student = looked_at(student, weight)
    if from_logits:
        student = ops.softmax(student, axis=-1)
    else:
        check_probabilities("y_pred", student, "say from_logits=True")
    return labels, student, weight


def _labels(
    y_true: Tensor, student: Tensor, ignore_class: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return labels as rows, which of them are classes, which are ignored.

    The shape tells indices from one-hot rows, since C is at least 2; where the
    last axis is of unknown size, it does so when the graph runs.
    """
    y_true = ops.cast(y_true, "float32")
    rank = len(student.shape)
    if len(y_true.shape) == rank - 1:
        y_true = ops.expand_dims(y_true, axis=-1)
    if shapes_differ(y_true.shape[:-1], student.shape[:-1]):
        raise ValueError(
            "`y_true` must hold one class index, or one one-hot row, for each "
            "case of `y_pred`. Received: y_true of shape "
            f"{tuple(y_true.shape)}, y_pred of shape {tuple(student.shape)}"
        )
    classes = ops.shape(student)[-1]
    size = y_true.shape[-1]
    if differ(size, 1):
        check_classes("y_true", y_true, "y_pred", student)
        return _of_rows(y_true)
    of_indices = _of_indices(y_true[..., 0], classes, ignore_class)
    if size == 1:
        return of_indices
    is_column = ops.equal(ops.shape(y_true)[-1], 1)
    return tuple(
        ops.where(is_column, one, other)
        for one, other in zip(of_indices, _of_rows(y_true), strict=True)
    )


def _of_indices(
    indices: Tensor, classes: Any, ignore_class: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Read class indices `(...)`."""
    whole = ops.equal(ops.floor(indices), indices)
    is_class = whole & (indices >= 0) & (indices < classes)
    ignored = ops.zeros_like(is_class)
    if ignore_class is not None:
        ignored = ops.equal(indices, ignore_class)
    indices = ops.cast(ops.where(is_class, indices, 0.0), "int32")
    return ops.one_hot(indices, classes, dtype="float32"), is_class, ignored


def _of_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Read one-hot (or soft) rows `(..., C)`."""
    sums = ops.abs(ops.sum(rows, axis=-1) - 1.0) <= SUM_TOLERANCE
    is_class = ops.all(rows >= 0, axis=-1) & sums
    finite = ops.where(ops.expand_dims(is_class, axis=-1), rows, 0.0)
    return finite, is_class, ops.zeros_like(is_class)


@keras.saving.register_keras_serializable(package="keras_ptloss")
class BrierScore(MeanOfCases):
    """Squared distance between probabilities and labels, 0 to 2.

    A proper score: it is best for the true probabilities, so it judges
    accuracy and calibration together.

        Brier = mean_n sum_c (p_{n,c} - y_{n,c})^2

    It is the sum over the classes; scores of two-class problems that look at
    one of them are half of it.

    `y_true` holds class indices, `(...)` or `(..., 1)`, or one-hot rows,
    `(..., C)`. `y_pred` is `(..., C)`; one column, of a binary head, is the two
    events that it stands for, next to labels 0 and 1. `sample_weight` has the
    shape `(...)` or a leading part of it; every position of the leading axes
    is one case, and one of weight 0 is not looked at. A label that is no class
    is an error, or, in compiled functions, which cannot raise one, makes the
    result NaN.

    Args:
        from_logits: whether `y_pred` holds logits.
        ignore_class: a class index whose cases are not looked at, such as
            -100 or 255, as in `keras.losses.SparseCategoricalCrossentropy`;
            None is none.
        name: name of the metric.
        dtype: dtype of the running sums and the result.

    Raises:
        ValueError: if `ignore_class` is no integer; on update, if labels and
            predictions do not fit, or (seen outside compiled functions) labels
            are no classes or rows that should be probabilities are not.

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
        ignore_class: int | None = None,
        name: str = "brier_score",
        dtype: Any = "float32",
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.from_logits = check_flag("from_logits", from_logits)
        self.ignore_class = check_ignore_class(ignore_class)

    def cases(
        self, y_true: Tensor, y_pred: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the squared distances and the weights, `(...)`."""
        labels, student, weight = read_cases(
            y_true,
            y_pred,
            weight,
            from_logits=self.from_logits,
            ignore_class=self.ignore_class,
        )
        return ops.sum(ops.square(student - labels), axis=-1), weight

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same metric again."""
        return {
            "from_logits": self.from_logits,
            "ignore_class": self.ignore_class,
            **super().get_config(),
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
    would. With weights, `|B|` and `N` are sums of weights. It is 0 before the
    first example.

    `y_true` holds class indices, `(...)` or `(..., 1)`, or one-hot rows,
    `(..., C)`. `y_pred` is `(..., C)`; one column, of a binary head, is the two
    events that it stands for, next to labels 0 and 1. `sample_weight` has the
    shape `(...)` or a leading part of it; every position of the leading axes
    is one case, and one of weight 0 is not looked at. A label that is no class
    is an error, or, in compiled functions, which cannot raise one, makes the
    result NaN.

    Args:
        num_bins: number of bins.
        from_logits: whether `y_pred` holds logits.
        ignore_class: a class index whose cases are not looked at, such as
            -100 or 255, as in `keras.losses.SparseCategoricalCrossentropy`;
            None is none.
        name: name of the metric.
        dtype: dtype of the running sums and the result.

    Raises:
        ValueError: if `num_bins` is not a positive integer or `ignore_class`
            no integer; on update, if labels and predictions do not fit, or
            (seen outside compiled functions) labels are no classes or rows
            that should be probabilities are not.

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
        ignore_class: int | None = None,
        name: str = "expected_calibration_error",
        dtype: Any = "float32",
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        set_direction(self, "down")
        self.num_bins = check_count("num_bins", num_bins)
        self.from_logits = check_flag("from_logits", from_logits)
        self.ignore_class = check_ignore_class(ignore_class)
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
        labels, student, weight = read_cases(
            y_true,
            y_pred,
            seen_weights(y_pred, sample_weight),
            from_logits=self.from_logits,
            ignore_class=self.ignore_class,
        )
        confidence = ops.max(student, axis=-1)
        right = ops.equal(
            ops.argmax(student, axis=-1), ops.argmax(labels, axis=-1)
        )
        bins = confidence_bins(confidence, self.num_bins)
        gaps = weight * (ops.cast(right, "float32") - confidence)
        if has_no_values(gaps):
            return
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
            "ignore_class": self.ignore_class,
            **super().get_config(),
        }
