"""What the losses of a teacher and a student share: form, dtype, config."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ptloss._binary import of_classes, two_events
from keras_ptloss._calibration import LOWEST, Calibration, Rows
from keras_ptloss._checks import (
    check_class_axis,
    check_classes,
    check_flag,
    check_probabilities,
    shapes_differ,
)

Tensor = Any


class TeacherLoss(keras.losses.Loss):
    """The Keras shell of a pure function of teacher and student.

    A loss is this class and one line, its function with its own arguments;
    the flags, the dtype and the config stand here.

    Args:
        function: `function(y_true, y_pred, **own, from_logits=...,
            teacher_from_logits=...)`, one loss an example, `(...)`.
        own: the arguments of the loss itself, numbers and arrays; each becomes
            an attribute and an entry of the config.
        from_logits: whether the student's outputs are logits.
        teacher_from_logits: whether the teacher's are; None means the same as
            `from_logits`.
        **kwargs: `name`, `reduction` and `dtype` of `keras.losses.Loss`.
    """

    # What stands in rows of weight 0; None is uniform, as probabilities and as
    # logits.
    _padding: Any = None

    def __init__(
        self,
        function: Callable[..., Tensor],
        own: dict[str, Any],
        *,
        from_logits: bool,
        teacher_from_logits: bool | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if teacher_from_logits is None:
            teacher_from_logits = from_logits
        self.from_logits = check_flag("from_logits", from_logits)
        self.teacher_from_logits = check_flag(
            "teacher_from_logits", teacher_from_logits
        )
        self._function = function
        self._own = tuple(own)
        for name, value in own.items():
            setattr(self, name, value)

    @property
    def teacher_classes(self) -> tuple[int, ...] | None:
        """Class counts of the teachers that `y_true` has side by side.

        None is one teacher, with the classes of the student.
        """
        return None

    def __call__(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor = None
    ) -> Tensor:
        """Return the loss, reduced.

        Args:
            y_true: the teacher, `(..., C)`. A row at weight 0, or hidden by
                a mask, may hold anything, as padding does: 0 * NaN is NaN, for
                every weight of the student.
            y_pred: the student, `(..., C)`, with its Keras mask if it has one.
            sample_weight: one number an example, `(...)` or a leading part of
                it; None is 1.
        """
        if not hasattr(y_pred, "shape"):
            y_pred = ops.convert_to_tensor(y_pred, dtype=self.dtype)
        for weight in (unmasked(y_pred), sample_weight):
            if weight is not None:
                y_true = ops.convert_to_tensor(y_true, dtype=self.dtype)
                _check_leading_axes(y_true, y_pred)
                rank = len(y_pred.shape)
                y_true = _weighted_rows(y_true, weight, rank, self._padding)
        if sample_weight is not None:
            sample_weight = _of_positions(sample_weight, y_pred, self.dtype)
        return super().__call__(y_true, y_pred, sample_weight)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return one loss an example, `(...)`."""
        values = self._function(
            y_true,
            y_pred,
            **{name: getattr(self, name) for name in self._own},
            from_logits=self.from_logits,
            teacher_from_logits=self.teacher_from_logits,
        )
        return ops.cast(values, self.dtype)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same loss again."""
        return {
            **super().get_config(),
            **{n: np.asarray(getattr(self, n)).tolist() for n in self._own},
            "from_logits": self.from_logits,
            "teacher_from_logits": self.teacher_from_logits,
            "dtype": self.dtype,  # which Keras leaves out
        }


class _Unmasked(keras.losses.Loss):
    """1 a position, which Keras sets to 0 where a mask hides it.

    Masks are no attribute of a JAX tracer; an unreduced loss is the public way
    to them.
    """

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return ones, `(...)`."""
        self.ones = ops.ones_like(y_pred[..., 0])
        return self.ones


def unmasked(y_pred: Tensor) -> Tensor | None:
    """Return 1 a position of `y_pred`, 0 where its Keras mask hides it.

    Args:
        y_pred: `(..., C)`.

    Returns:
        `(...)`, or None if there is no mask.
    """
    if not ops.is_tensor(y_pred) or not y_pred.shape:
        return None
    dtype = keras.backend.standardize_dtype(y_pred.dtype)
    loss = _Unmasked("unmasked", reduction=None, dtype=dtype)
    seen = loss(y_pred, y_pred)
    return None if seen is loss.ones else seen


def weight_of_cases(weight: Tensor, rank: int) -> Tensor:
    """Return weights with an axis for each of the rows' `rank` leading ones.

    Args:
        weight: `(...)`, a leading part of it, or `(..., 1)`.
        rank: how many axes `(...)` has.
    """
    if len(weight.shape) == rank + 1 and weight.shape[-1] == 1:
        weight = ops.squeeze(weight, axis=-1)
    for _ in range(rank - len(weight.shape)):
        weight = ops.expand_dims(weight, axis=-1)
    return weight


def _of_positions(weight: Tensor, y_pred: Tensor, dtype: str) -> Tensor:
    """Return the weights of all positions, `(...)`, where Keras needs them.

    Keras lays axes side by side from the last one on, and a mean by the
    weights is divided by the sum of those that are handed in.
    """
    shape = y_pred.shape[:-1]
    if len(shape) < 2:
        return weight
    weight = ops.convert_to_tensor(weight, dtype=dtype)
    weight = weight_of_cases(weight, len(shape))
    if tuple(weight.shape) == tuple(shape) and None not in shape:
        return weight
    return weight * ops.ones_like(y_pred[..., 0], dtype=dtype)


def _check_leading_axes(y_true: Tensor, y_pred: Tensor) -> None:
    """Require a row of the teacher for each of the student's.

    Weights would spread one row over the batch.
    """
    leading = y_pred.shape[:-1]
    if shapes_differ(y_true.shape[: len(leading)], leading):
        raise ValueError(
            "`y_true` must have a row for each of `y_pred`. Received: y_true "
            f"of shape {tuple(y_true.shape)}, y_pred of shape "
            f"{tuple(y_pred.shape)}"
        )


def _weighted_rows(
    y_true: Tensor, weight: Tensor, rank: int, padding: Any
) -> Tensor:
    """Return rows, constant ones in place of those at weight 0.

    Args:
        y_true: `(..., C)`.
        weight: `(...)`, a leading part of it, or `(..., 1)`.
        rank: how many axes the student's rows have.
        padding: the constant, or a row of them; None is uniform rows.
    """
    if padding is None:
        padding = 1.0 / (y_true.shape[-1] or 1)
    seen = ops.not_equal(ops.convert_to_tensor(weight), 0)
    seen = weight_of_cases(seen, rank - 1)
    for _ in range(len(y_true.shape) - len(seen.shape)):
        seen = ops.expand_dims(seen, axis=-1)
    return ops.where(seen, y_true, ops.cast(padding, y_true.dtype))


def read_student(y_pred: Tensor, *, from_logits: bool) -> Tensor:
    """Return the student's rows `(..., C)`, in float32 or better.

    The one column of a binary head becomes two.

    Raises:
        ValueError: if there is no class axis, or (seen outside compiled
            functions) rows that should be probabilities are not.
    """
    y_pred = ops.convert_to_tensor(y_pred)
    check_class_axis("y_pred", y_pred)
    wide = keras.backend.result_type(y_pred.dtype, "float32")
    y_pred = two_events(ops.cast(y_pred, wide), from_logits=from_logits)
    if not from_logits:
        check_probabilities("y_pred", y_pred, "say from_logits=True")
    return y_pred


def read_teacher(
    y_true: Tensor,
    student: Tensor,
    *,
    from_logits: bool,
    calibration: Calibration | None = None,
) -> Rows:
    """Return the teacher's `t` and `log t`, in the form of the student's rows.

    Args:
        y_true: the teacher's outputs, `(..., C_in)`.
        student: what `read_student` returned, `(..., C)`.
        from_logits: whether `y_true` holds logits.
        calibration: of the teacher; None is none.

    Raises:
        ValueError: as `read_student`, and if the shapes differ.
    """
    calibration = calibration or Calibration()
    y_true = ops.cast(ops.convert_to_tensor(y_true), student.dtype)
    check_class_axis("y_true", y_true)
    y_true = two_events(y_true, from_logits=from_logits)
    if not from_logits:
        check_probabilities("y_true", y_true, "say teacher_from_logits=True")
    calibration.check_input("y_true", y_true.shape[-1])
    rows = calibration.with_log(y_true, from_logits=from_logits)
    check_classes("y_true", rows.weights, "y_pred", student)
    classes = student.shape[-1]
    return Rows(
        of_classes(rows.weights, classes),
        rows.total,
        of_classes(rows.log, classes),
    )


def log_student(student: Tensor, *, from_logits: bool) -> Tensor:
    """Return `log p` of the rows that `read_student` returned, held finite."""
    if from_logits:
        return ops.maximum(ops.log_softmax(student, axis=-1), LOWEST)
    return ops.log(ops.maximum(student, keras.config.epsilon()))
