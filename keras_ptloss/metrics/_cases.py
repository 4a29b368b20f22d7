"""What the metrics share: which cases are looked at, and the direction.

A case is a position of the leading axes. One of weight 0, hidden by a Keras
mask or of an ignored class is not looked at: its rows and its label may be
anything, NaN too.
"""

from typing import Any

import keras
from keras import ops

from keras_ptloss._checks import check_class_axis
from keras_ptloss._keras import set_direction
from keras_ptloss.losses._base import unmasked, weight_of_cases

Tensor = Any


class MeanOfCases(keras.metrics.Mean):
    """Mean over the cases that are looked at.

    Args:
        name: name of the metric.
        dtype: dtype of the running sums and the result.
    """

    # "up" if more is better, "down" if less is.
    _better = "down"

    def __init__(self, *, name: str, dtype: Any) -> None:
        super().__init__(name=name, dtype=dtype)
        set_direction(self, self._better)

    def cases(
        self, y_true: Tensor, y_pred: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return values and weights, `(...)`; values at weight 0 are finite.

        Args:
            y_true: as handed in.
            y_pred: as handed in.
            weight: one number a case, `(...)`.
        """
        raise NotImplementedError

    def update_state(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor = None
    ) -> None:
        """Add cases.

        Args:
            y_true: as the class says.
            y_pred: `(..., C)`. Its Keras mask, if it has one, is a weight.
            sample_weight: `(...)`, or a leading part of it.
        """
        weight = seen_weights(y_pred, sample_weight)
        values, weight = self.cases(y_true, y_pred, weight)
        super().update_state(values, sample_weight=weight)


def seen_weights(y_pred: Tensor, sample_weight: Tensor = None) -> Tensor:
    """Return the weight of each case, `(...)` in float32.

    Args:
        y_pred: `(..., C)`. What its Keras mask hides has weight 0.
        sample_weight: `(...)`, a leading part of it, or None.
    """
    y_pred = ops.convert_to_tensor(y_pred)
    check_class_axis("y_pred", y_pred)
    seen = unmasked(y_pred)
    if seen is None:
        seen = ops.ones_like(y_pred[..., 0])
    seen = ops.cast(seen, "float32")
    if sample_weight is None:
        return seen
    weight = ops.cast(ops.convert_to_tensor(sample_weight), "float32")
    return seen * weight_of_cases(weight, len(seen.shape))


def looked_at(rows: Tensor, weight: Tensor) -> Tensor:
    """Return rows `(..., C)`, uniform ones in place of those at weight 0."""
    classes = ops.cast(ops.shape(rows)[-1], rows.dtype)
    seen = ops.expand_dims(ops.not_equal(weight, 0.0), axis=-1)
    return ops.where(seen, rows, 1.0 / classes)
