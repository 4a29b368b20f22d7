"""The base class of the losses between a teacher and a student."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ptloss._math import two_events
from keras_ptloss._validation import (
    check_class_axis,
    check_classes,
    check_flag,
    fail,
    shapes_differ,
    valid_probs,
)

Tensor = Any

LOWEST = -1e30  # replaces log 0, so that 0 log 0 = 0
TINY = float(np.finfo("float32").tiny)


class TeacherLoss(keras.losses.Loss):
    """Base class of the losses between a teacher and a student.

    `y_true` holds the teacher's probabilities, `(..., C)`; `y_pred` the
    student's probabilities or logits, `(..., C)`. A subclass implements `call`.

    Each row of `y_true` must be non-negative and sum to one within 1 %. A row
    of zeros is padding and costs 0. Any other row raises a `ValueError` in an
    eager call, and gives NaN in a compiled step. Rows of weight 0, and rows
    behind a Keras mask, may hold anything, NaN too.

    The settings are fixed: a compiled training step would not see a change.

    Args:
        settings: the arguments of the subclass. Each becomes an attribute that
            cannot be set again, and an entry of the config.
        from_logits: whether `y_pred` holds logits.
        **kwargs: `reduction`, `name` and `dtype` of `keras.losses.Loss`.
    """

    # Replaces the rows of `y_true` that have weight 0 or are masked.
    padding: float = 0.0

    def __init__(
        self, settings: dict[str, Any], *, from_logits: bool, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        for name, value in settings.items():
            setattr(self, name, value)
        self.from_logits = check_flag("from_logits", from_logits)
        self._settings = (*settings, "from_logits")

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute that is not one of the settings."""
        if name in getattr(self, "_settings", ()):
            raise AttributeError(
                f"`{name}` of a {type(self).__name__} cannot be changed, "
                "because a compiled training step would not see the change. "
                "Build a new loss and compile the model with it. "
                f"Received: {name}={value!r}"
            )
        super().__setattr__(name, value)

    @property
    def teacher_classes(self) -> tuple[int, ...] | None:
        """Number of classes of each teacher that `y_true` has side by side.

        None means one teacher with the classes of the student.
        """
        return None

    def __call__(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor = None
    ) -> Tensor:
        """Return the reduced loss.

        Args:
            y_true: the teacher's probabilities, `(..., C)`.
            y_pred: the student's outputs, `(..., C)`.
            sample_weight: `(...)`, `(..., 1)`, or one weight per example,
                `(N,)`, for all positions of the example.
        """
        if not hasattr(y_pred, "shape"):
            y_pred = ops.convert_to_tensor(y_pred, dtype=self.dtype)
        for weight in (unmasked(y_pred), sample_weight):
            if weight is not None:
                y_true = ops.convert_to_tensor(y_true, dtype=self.dtype)
                y_true = self._replace_unweighted(y_true, y_pred, weight)
        if sample_weight is not None and len(y_pred.shape) > 2:
            # Keras aligns axes from the last one on: weights (N,) would be
            # taken for the positions' weights.
            sample_weight = expand_weights(
                ops.convert_to_tensor(sample_weight, dtype=self.dtype),
                len(y_pred.shape) - 1,
            ) * ops.ones_like(y_pred[..., 0], dtype=self.dtype)
        return super().__call__(y_true, y_pred, sample_weight)

    def _replace_unweighted(
        self, y_true: Tensor, y_pred: Tensor, weight: Tensor
    ) -> Tensor:
        """Return `y_true` with `padding` in the rows of weight 0."""
        leading = y_pred.shape[:-1]
        if shapes_differ(y_true.shape[: len(leading)], leading):
            raise ValueError(
                "`y_true` must have one row for each row of `y_pred`. "
                f"Received: y_true of shape {tuple(y_true.shape)}, y_pred of "
                f"shape {tuple(y_pred.shape)}"
            )
        weight = expand_weights(ops.convert_to_tensor(weight), len(leading))
        for _ in range(len(y_true.shape) - len(leading)):
            weight = ops.expand_dims(weight, -1)
        padding = ops.cast(self.padding, y_true.dtype)
        return ops.where(ops.not_equal(weight, 0), y_true, padding)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same loss again."""
        settings = {name: getattr(self, name) for name in self._settings}
        return {
            **super().get_config(),
            **{
                name: value.tolist() if isinstance(value, np.ndarray) else value
                for name, value in settings.items()
            },
            "dtype": self.dtype,  # Keras leaves it out.
        }


def refuse_variables(**settings: Any) -> None:
    """Raise a `ValueError` if a loss's setting is a `keras.Variable`."""
    for name, value in settings.items():
        if isinstance(value, keras.Variable):
            fail(
                name,
                "a number or an array. The settings of a loss are fixed when "
                "it is built, so a variable that changes later has no effect",
                value,
            )


def read_student(y_pred: Tensor, *, from_logits: bool) -> Tensor:
    """Return the student's outputs `(..., C)` in float32 or better.

    A binary head's one column becomes two. Probabilities are checked and
    divided by their sum.
    """
    y_pred = ops.convert_to_tensor(y_pred)
    check_class_axis("y_pred", y_pred)
    wide = keras.backend.result_type(y_pred.dtype, "float32")
    y_pred = two_events(ops.cast(y_pred, wide), from_logits=from_logits)
    if from_logits:
        return y_pred
    return valid_probs("y_pred", y_pred, "set from_logits=True")


def read_teacher(y_true: Tensor, student: Tensor) -> Tensor:
    """Return the teacher's checked probabilities `(..., C)`.

    Args:
        y_true: `(..., C)`, or `(..., 1)` where a binary head gives the
            probability of the second class.
        student: what `read_student` returned, `(..., C)`.

    Raises:
        ValueError: if the shapes differ, or if a row is invalid and its values
            can be seen.
    """
    y_true = ops.cast(ops.convert_to_tensor(y_true), student.dtype)
    check_class_axis("y_true", y_true)
    if y_true.shape[-1] is None and student.shape[-1] is not None:
        # A graph may know the number of columns only when it runs. A wrong
        # number fails then.
        first = 1.0 - y_true[..., :1]
        several = ops.cast(ops.shape(y_true)[-1] > 1, "int32")
        shape = (*ops.shape(y_true)[:-1], student.shape[-1])
        y_true = ops.concatenate([first, y_true], axis=-1)[..., several:]
        y_true = ops.reshape(y_true, shape)
    y_true = two_events(y_true, from_logits=False)
    check_classes("y_true", y_true, "y_pred", student)
    return valid_probs("y_true", y_true, "apply a softmax to them first")


def log_student(student: Tensor, *, from_logits: bool) -> Tensor:
    """Return finite `log p` of what `read_student` returned, `(..., C)`."""
    if from_logits:
        return ops.maximum(ops.log_softmax(student, axis=-1), LOWEST)
    return ops.log(ops.maximum(student, keras.config.epsilon()))


class _Unmasked(keras.losses.Loss):
    """One at every position, which Keras sets to zero at masked positions.

    This is the public way to read the mask of a tensor: on JAX, traced tensors
    have no attribute for it.
    """

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return ones, `(...)`."""
        self.ones = ops.ones_like(y_pred[..., 0])
        return self.ones


def unmasked(y_pred: Tensor) -> Tensor | None:
    """Return 1 for each position of `y_pred`, 0 for masked ones, `(...)`.

    Returns None if there is no mask.
    """
    if not ops.is_tensor(y_pred) or not y_pred.shape:
        return None
    dtype = keras.backend.standardize_dtype(y_pred.dtype)
    loss = _Unmasked("unmasked", reduction=None, dtype=dtype)
    values = loss(y_pred, y_pred)
    return None if values is loss.ones else values


def expand_weights(weight: Tensor, rank: int) -> Tensor:
    """Return weights of `rank` axes, with axes of size 1 added at the end.

    Args:
        weight: one weight per position, `(...)` or `(..., 1)`, or per example,
            `(N,)`.
        rank: number of axes of the positions `(...)`.
    """
    if len(weight.shape) == rank + 1 and weight.shape[-1] == 1:
        weight = ops.squeeze(weight, axis=-1)
    for _ in range(rank - len(weight.shape)):
        weight = ops.expand_dims(weight, axis=-1)
    return weight
