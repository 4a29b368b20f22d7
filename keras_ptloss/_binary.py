"""Binary heads: one sigmoid output, or one logit, is two events.

A model with one output gives `p`, or its logit `z`, of the second class. As
rows of two classes that is `[1 - p, p]`, or `[0, z]`, whose softmax it is.
Every part of the package that takes rows of classes calls `two_events` first.
"""

from typing import Any

import numpy as np
from keras import ops

Tensor = Any


def two_events(outputs: Tensor, *, from_logits: bool) -> Tensor:
    """Return rows `(..., 2)` for outputs `(..., 1)`, others as they are.

    Args:
        outputs: logits or probabilities, `(..., C)`: a NumPy array or a
            tensor.
        from_logits: whether they are logits.
    """
    if len(outputs.shape) == 0 or outputs.shape[-1] != 1:
        return outputs
    xp = np if isinstance(outputs, np.ndarray) else ops
    first = xp.zeros_like(outputs) if from_logits else 1.0 - outputs
    return xp.concatenate([first, outputs], axis=-1)
