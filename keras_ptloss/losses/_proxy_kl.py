"""KL to the corrected teacher: the correction inside the loss."""

from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from keras_ptloss.losses._base import TeacherLoss, read_student
from keras_ptloss.losses._pt_loss import pt_loss

if TYPE_CHECKING:  # it builds this loss
    from keras_ptloss._correction import Correction

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_ptloss")
class ProxyKLDivergence(TeacherLoss):
    """KL from the corrected teacher to the student.

    `y_true` are the teacher's outputs as they come, live or stored. The loss
    corrects them itself, without a gradient, and compares the student with the
    result:

        q    = softmax(A' log proxy(softmax(A z + b), epsilon) + b')
        loss = sum_c q_c (log q_c - log p_c)

    Outputs of several teachers stand side by side in a row of `y_true`,
    `(..., C_1 + C_2 + ...)`, as `np.concatenate` puts them.

    Without `A'` and `b'` it has the optimum of `PTLoss`, example by example;
    with them it goes where PTLoss cannot. A student too small to answer each
    example by itself ends nearer to the mean of the `q` than by PTLoss.

    Args:
        correction: a `keras_ptloss.Correction`, as `SearchResult.correction`
            or made by hand.
        from_logits: whether the student's outputs are logits.
        name: name of the loss.
        **kwargs: `reduction` and `dtype`, as in `keras.losses.Loss`. The
            computation is float32 or better.

    Raises:
        ValueError: if `correction` is none; when called, if the class counts
            differ, or (seen outside compiled functions) rows that should be
            probabilities are not.

    Example:
        >>> import keras, numpy as np
        >>> correction = Correction([2.0, 0.5], scale=0.5)
        >>> student = keras.Sequential([keras.layers.Dense(3)])
        >>> loss = ProxyKLDivergence(correction, from_logits=True)
        >>> student.compile("adam", loss=loss)
        >>> x = np.ones((8, 4), "float32")
        >>> soft_labels = np.full((8, 3), 1 / 3, "float32")
        >>> history = student.fit(x, soft_labels, verbose=0)

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), §4.2, for the
        proxy teacher.
    """

    def __init__(
        self,
        correction: "Correction",
        *,
        from_logits: bool = False,
        name: str | None = "proxy_kl_divergence",
        **kwargs: Any,
    ) -> None:
        if not callable(getattr(correction, "target", None)):
            raise ValueError(
                "`correction` must be a keras_ptloss.Correction. Received: "
                f"correction={correction!r}"
            )
        super().__init__(
            self._to_the_corrected,
            {},  # the correction is no number or array
            from_logits=from_logits,
            teacher_from_logits=None,  # the correction says it
            name=name,
            **kwargs,
        )
        self.correction = correction
        self.teacher_from_logits = correction.teacher_from_logits
        if correction.row is not None:
            self._padding = correction.row.uniform()

    @property
    def teacher_classes(self) -> tuple[int, ...] | None:
        """Class counts of the teachers that `y_true` has side by side."""
        if self.correction.row is not None:
            return self.correction.row.counts
        return self.correction.calibration.rectangle

    def teacher(self, y_true: Tensor) -> Tensor:
        """Return the corrected teacher, `(..., C)`, of outputs as they come."""
        corrected = self.correction.target(y_true, argument="y_true")
        return ops.stop_gradient(corrected)

    def _to_the_corrected(
        self,
        y_true: Tensor,
        y_pred: Tensor,
        *,
        from_logits: bool,
        teacher_from_logits: bool,
    ) -> Tensor:
        """Return `KL(q || p)`: `(..., C_in)`, `(..., C)` to `(...)`."""
        student = read_student(y_pred, from_logits=from_logits)
        y_true = ops.cast(ops.convert_to_tensor(y_true), student.dtype)
        return pt_loss(
            self.teacher(y_true),
            student,
            0.0,
            from_logits=from_logits,
            teacher_from_logits=False,
        )

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same loss again."""
        config = super().get_config()
        del config["teacher_from_logits"]  # the correction says it
        correction = keras.saving.serialize_keras_object(self.correction)
        return {**config, "correction": correction}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ProxyKLDivergence":
        """Build the loss from what `get_config` returned."""
        correction = keras.saving.deserialize_keras_object(config["correction"])
        return cls(**{**config, "correction": correction})
