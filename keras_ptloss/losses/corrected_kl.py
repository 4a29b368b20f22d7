"""KL from the corrected teacher to the student."""

from typing import Any

import keras
from keras import ops

from keras_ptloss._math import two_events
from keras_ptloss._validation import fail
from keras_ptloss.correction import Correction
from keras_ptloss.losses.base import TeacherLoss
from keras_ptloss.losses.pt_loss import pt_loss

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_ptloss")
class CorrectedKLDivergence(TeacherLoss):
    """KL divergence from the corrected teacher to the student.

    Use this loss for a live teacher. If the teacher's outputs are stored, you
    can get the same result by passing them through
    `result.correct(teacher_outputs)` and training with any Keras loss.

        q    = correction(t)
        loss = sum_c q_c (log q_c - log p_c)

    If the correction consists only of a temperature and epsilon, `PTLoss` has
    the same optimum for each example. A student that cannot fit every example
    has better probabilities with this loss.

    Args:
        correction: a `Correction`, for example `SearchResult.correction`.
        **kwargs: `from_logits`, `reduction`, `name` and `dtype`, as in
            `PTLoss`.

    In a call, `y_true` holds the teacher's probabilities before the correction,
    `(..., C)`. The probabilities of several teachers are side by side, `(...,
    C_1 + C_2 + ...)`, as `np.concatenate` returns them.

    Example:
        >>> import keras, numpy as np
        >>> correction = Correction(epsilon=0.5, temperature=2.0)
        >>> student = keras.Sequential([keras.layers.Dense(3)])
        >>> loss = CorrectedKLDivergence(correction, from_logits=True)
        >>> student.compile("adam", loss=loss)
        >>> x = np.ones((8, 4), "float32")
        >>> teacher_probs = np.full((8, 3), 1 / 3, "float32")
        >>> history = student.fit(x, teacher_probs, verbose=0)
    """

    def __init__(self, correction: Correction, **kwargs: Any) -> None:
        if not isinstance(correction, Correction):
            fail("correction", "a keras_ptloss.Correction", correction)
        super().__init__({"correction": correction}, **kwargs)
        self.teacher_classes = correction.teacher_classes

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return one loss per example, `(...)`."""
        y_true = ops.convert_to_tensor(y_true)
        wide = keras.backend.result_type(y_true.dtype, "float32")
        y_true = two_events(ops.cast(y_true, wide), from_logits=False)
        padding = ops.all(ops.equal(y_true, 0.0), axis=-1, keepdims=True)
        q = ops.stop_gradient(self.correction.apply(y_true))
        q = ops.where(padding, 0.0, q)
        return pt_loss(q, y_pred, 0.0, from_logits=self.from_logits)
