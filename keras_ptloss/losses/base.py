"""The base class of the losses between a teacher and a student."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ptloss._math import two_events
from keras_ptloss._validation import (
    check_classes,
    check_constant_epsilon,
    check_flag,
    refuse_variable,
    shapes_differ,
    valid_probs,
)

Tensor = Any

LOWEST = -1e30  # replaces log 0, so that 0 log 0 = 0
TINY = float(np.finfo("float32").tiny)


class TeacherLoss(keras.losses.Loss):
    """Base class of the losses between a teacher and a student.

    `y_true` holds the teacher's probabilities, and `y_pred` holds the student's
    probabilities or logits, both `(..., C)`. A subclass implements `call`.

    Each row of `y_true` must be non-negative and sum to one within 1 %. A row
    of zeros is padding, and its loss is 0. Any other row raises a `ValueError`
    in an eager call, and gives NaN in a compiled step. Rows with weight 0, or
    hidden by a Keras mask, may hold any values, including NaN.

    The settings are fixed, because a training step that is already compiled
    would ignore a change.

    Args:
        settings: the arguments of the subclass. Each becomes an attribute that
            cannot be set again, and an entry of the config.
        from_logits: whether `y_pred` holds logits.
        **kwargs: `reduction`, `name` and `dtype` of `keras.losses.Loss`. The
            loss is computed in float32 or better; `dtype` is the dtype of the
            result.
    """

    # Number of classes of each teacher, if `y_true` has the probabilities of
    # several side by side. None means one teacher with the student's classes.
    teacher_classes: tuple[int, ...] | None = None
    # This value replaces the rows of `y_true` that have weight 0 or are masked.
    padding: float = 0.0

    def __init__(
        self,
        settings: dict[str, Any],
        *,
        from_logits: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        settings["from_logits"] = check_flag("from_logits", from_logits)
        for name, value in settings.items():
            setattr(self, name, value)
        self._settings = tuple(settings)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute that is not one of the settings."""
        if name in getattr(self, "_settings", ()):
            raise AttributeError(
                f"`{name}` of a {type(self).__name__} cannot be changed, "
                "because a training step that is already compiled would ignore "
                "the change. Create a new loss and recompile the model with "
                f"that loss. Received: {name}={value!r}"
            )
        super().__setattr__(name, value)

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
        y_pred = ops.convert_to_tensor(y_pred)
        weight = position_weights(y_pred, sample_weight)
        if weight is not None:
            y_true = ops.convert_to_tensor(y_true, dtype=self.dtype)
            # Without this check, `ops.where` would repeat a single row.
            if shapes_differ(y_true.shape[: len(weight.shape)], weight.shape):
                raise ValueError(
                    "`y_true` must have one row for each row of `y_pred`. "
                    f"Received: y_true of shape {tuple(y_true.shape)}, y_pred "
                    f"of shape {tuple(y_pred.shape)}"
                )
            counts = ops.not_equal(weight, 0.0)
            while len(counts.shape) < len(y_true.shape):
                counts = ops.expand_dims(counts, -1)
            y_true = ops.where(
                counts, y_true, ops.cast(self.padding, y_true.dtype)
            )
        return super().__call__(y_true, y_pred, weight)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same loss again."""
        settings = {name: getattr(self, name) for name in self._settings}
        settings["dtype"] = self.dtype  # Keras leaves the dtype out.
        return keras.saving.serialize_keras_object(
            {**super().get_config(), **settings}
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TeacherLoss":
        """Build the loss from what `get_config` returned."""
        return cls(**keras.saving.deserialize_keras_object(config))


def fixed_epsilon(epsilon: Any) -> np.ndarray:
    """Return the coefficients of a loss, which cannot be changed."""
    refuse_variable("epsilon", epsilon)
    values = check_constant_epsilon(epsilon)
    values.setflags(write=False)
    return values


def read_student(y_pred: Tensor, *, from_logits: bool) -> Tensor:
    """Return the student's outputs `(..., C)` in float32 or better.

    The single column of a binary head is expanded to two classes. Probabilities
    are checked and divided by their sum.
    """
    y_pred = ops.convert_to_tensor(y_pred)
    wide = keras.backend.result_type(y_pred.dtype, "float32")
    y_pred = two_events(ops.cast(y_pred, wide), from_logits=from_logits)
    if from_logits:
        return y_pred
    return valid_probs("y_pred", y_pred, "set from_logits=True")


def read_teacher(y_true: Tensor, student: Tensor) -> Tensor:
    """Return the teacher's checked probabilities `(..., C)`.

    Args:
        y_true: `(..., C)`, or `(..., 1)` for a binary head, which gives the
            probability of the second class.
        student: the output of `read_student`, `(..., C)`.

    Raises:
        ValueError: if the shapes differ, or (in eager calls) if a row is
            invalid.
    """
    y_true = ops.cast(ops.convert_to_tensor(y_true), student.dtype)
    y_true = two_events(y_true, from_logits=False)
    check_classes("y_true", y_true, "y_pred", student)
    return valid_probs("y_true", y_true, "apply a softmax to them first")


def log_student(student: Tensor, *, from_logits: bool) -> Tensor:
    """Return a finite `log p` of the output of `read_student`, `(..., C)`."""
    if from_logits:
        return ops.maximum(ops.log_softmax(student, axis=-1), LOWEST)
    return ops.log(ops.maximum(student, keras.config.epsilon()))


def position_weights(y_pred: Tensor, sample_weight: Tensor) -> Tensor | None:
    """Return the weight of each position, `(...)`; 0 at masked positions.

    Returns None if there are neither weights nor a mask.

    Args:
        y_pred: a tensor `(..., C)`.
        sample_weight: `(...)` or `(..., 1)`; or one weight per example, `(N,)`.
            Keras would treat the latter as weights of the last axis.
    """
    if sample_weight is not None:
        rank = len(y_pred.shape) - 1
        sample_weight = ops.convert_to_tensor(sample_weight, "float32")
        if sample_weight.shape[rank:] == (1,):
            sample_weight = ops.squeeze(sample_weight, axis=-1)
        while len(sample_weight.shape) < rank:
            sample_weight = ops.expand_dims(sample_weight, axis=-1)
    loss = _Ones("ones", reduction=None, dtype="float32")
    weight = loss(y_pred, y_pred, sample_weight)
    return None if weight is loss.ones else weight


class _Ones(keras.losses.Loss):
    """A loss of 1 at each position, which Keras multiplies by weight and mask.

    This is the only public way to read the mask of a tensor: on JAX, traced
    tensors have no attribute for the mask.
    """

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return ones, `(...)`."""
        self.ones = ops.ones_like(y_pred[..., 0])
        return self.ones
