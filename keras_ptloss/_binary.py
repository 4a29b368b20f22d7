"""Binary heads: one sigmoid output, or one logit, is two events.

A model with one output gives `p`, or its logit `z`, of the second class. As
rows of two classes that is `[1 - p, p]`, or `[0, z]`, whose softmax it is.
Every part of the package that takes rows of classes calls `two_events` first.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

Tensor = Any


def two_events(outputs: Tensor, *, from_logits: bool) -> Tensor:
    """Return rows `(..., 2)` for outputs `(..., 1)`, others as they are.

    Args:
        outputs: logits or probabilities, `(..., C)`: a NumPy array or a
            tensor. A class axis of unknown size, as in `tf.data` graphs, is
            read when the graph runs.
        from_logits: whether they are logits.
    """
    classes = outputs.shape[-1] if len(outputs.shape) else 0
    symbolic = isinstance(outputs, keras.KerasTensor)
    if classes not in (1, None) or (classes is None and symbolic):
        return outputs
    xp = np if isinstance(outputs, np.ndarray) else ops
    column = outputs[..., :1]
    first = xp.zeros_like(column) if from_logits else 1.0 - column
    rows = xp.concatenate([first, outputs], axis=-1)
    if classes is None:
        several = ops.cast(ops.shape(outputs)[-1] > 1, "int32")
        rows = rows[..., several:]
    return rows


def of_classes(rows: Tensor, classes: int | None) -> Tensor:
    """Return rows whose class axis is known to have `classes`, if that is.

    An axis of unknown size that turns out to have another is an error when
    the graph runs; it would be broadcast otherwise.
    """
    if classes is None or rows.shape[-1] is not None:
        return rows
    return ops.reshape(rows, (*ops.shape(rows)[:-1], classes))
