"""KL from the corrected teacher to the student."""

from typing import Any

import keras
from keras import ops

from keras_ptloss._math import two_events
from keras_ptloss._validation import fail, valid_probs
from keras_ptloss.correction import Correction
from keras_ptloss.losses.base import TeacherLoss
from keras_ptloss.losses.pt_loss import pt_loss

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_ptloss")
class CorrectedKLDivergence(TeacherLoss):
    """KL divergence from the corrected teacher to the student.

    It is the loss for a live teacher. With stored teacher outputs,
    `result.correct(teacher_outputs)` and any Keras loss do the same.

        q    = correction(t)
        loss = sum_c q_c (log q_c - log p_c)

    If the correction is a temperature and epsilon alone, `PTLoss` has the same
    optimum for each example. If the student cannot fit each example, its
    probabilities are better with this loss.

    Args:
        correction: a `Correction`, for example `SearchResult.correction`.
        from_logits: whether `y_pred`, the student's output, holds logits.
        reduction: as in `keras.losses.Loss`.
        name: name of the loss.
        dtype: dtype of the result; the computation is in float32 or better.

    Call arguments: `y_true`, the teacher's probabilities before the correction,
    `(..., C)`; of several teachers side by side, `(..., C_1 + C_2 + ...)`, as
    `np.concatenate` makes them. Rows of zeros are padding and cost 0. `y_pred`,
    `(..., C)`.

    Raises:
        ValueError: if `correction` is not a `Correction`. When called, if the
            numbers of classes differ, or (in eager calls) if rows that should
            be probabilities are not. In compiled functions the loss of such a
            row is NaN.

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

    correction: Correction

    def __init__(
        self,
        correction: Correction,
        *,
        from_logits: bool = False,
        name: str | None = "corrected_kl_divergence",
        **kwargs: Any,
    ) -> None:
        if not isinstance(correction, Correction):
            fail("correction", "a keras_ptloss.Correction", correction)
        super().__init__(
            {"correction": correction},
            from_logits=from_logits,
            name=name,
            **kwargs,
        )

    @property
    def teacher_classes(self) -> tuple[int, ...] | None:
        """Number of classes of each teacher that `y_true` has side by side."""
        return self.correction.teacher_classes

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return one loss per example, `(...)`."""
        y_true = ops.convert_to_tensor(y_true)
        wide = keras.backend.result_type(y_true.dtype, "float32")
        y_true = two_events(ops.cast(y_true, wide), from_logits=False)
        # The sum of a row is 1, 0 if it is padding, or NaN if it is invalid.
        total, probs = 1.0, []
        for t in self.correction.split(y_true):
            t = valid_probs("y_true", t, "apply a softmax to them first")
            row = ops.sum(t, axis=-1, keepdims=True)
            probs.append(ops.where(row > 0.0, t, 1.0 / (t.shape[-1] or 1)))
            total = total * row
        q = total * self.correction.apply(ops.concatenate(probs, axis=-1))
        loss = pt_loss(
            ops.stop_gradient(q), y_pred, 0.0, from_logits=self.from_logits
        )
        return ops.cast(loss, self.dtype)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same loss again."""
        correction = keras.saving.serialize_keras_object(self.correction)
        return {**super().get_config(), "correction": correction}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CorrectedKLDivergence":
        """Build the loss from what `get_config` returned."""
        correction = keras.saving.deserialize_keras_object(config["correction"])
        return cls(**{**config, "correction": correction})
