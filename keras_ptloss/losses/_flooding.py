"""Flooding: a training loss held at a level."""

from typing import Any

import keras
from keras import ops

from keras_ptloss._backend import replicas
from keras_ptloss._checks import check_number, fail

Tensor = Any

MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


@keras.saving.register_keras_serializable(package="keras_ptloss")
class Flooding(keras.losses.Loss):
    """Keep the training loss at a level, so that it does not go to zero.

    With `L` the mean of another loss over the batch:

        flooded = |L - level| + level

    Below the level the gradient changes its sign. It is the mean that is
    flooded, after weights and masks, never one example; under a `tf.distribute`
    strategy the mean over a replica's part of the batch. Regularisers stay
    outside. `val_loss` is flooded as well: watch a metric instead.

    Args:
        loss: the loss to flood, a `keras.losses.Loss` whose `reduction` is a
            mean; `y_true` and `y_pred` are what it takes.
        level: the flood level, in the loss's units, at least 0.
        name: name of the loss.

    Raises:
        ValueError: if an argument is not of this form.

    Example:
        >>> import numpy as np
        >>> from keras_ptloss import PTLoss
        >>> kl, rows = PTLoss(0.0), np.array([[0.9, 0.1], [0.5, 0.5]])
        >>> float(Flooding(kl, 0.25)(rows, rows))
        0.5
        >>> float(kl(rows, rows[::-1])) < 0.5
        True

    Reference:
        Ishida et al. 2020, Do We Need Zero Training Loss After Achieving Zero
        Training Error? (https://arxiv.org/abs/2002.08709).
    """

    def __init__(
        self,
        loss: keras.losses.Loss,
        level: float,
        *,
        name: str | None = "flooding",
    ) -> None:
        if not isinstance(loss, keras.losses.Loss):
            fail("loss", "a keras.losses.Loss", loss)
        if loss.reduction not in MEANS:
            raise ValueError(
                "`loss` must take the mean over the batch, with a reduction "
                f"of {', '.join(map(repr, MEANS))}. Received: loss "
                f"{loss.name!r} with reduction={loss.reduction!r}"
            )
        super().__init__(name=name, reduction=loss.reduction, dtype=loss.dtype)
        self.loss = loss
        self.level = check_number("level", level, at_least=0.0)

    @property
    def from_logits(self) -> bool:
        """The flooded loss's, which `Distiller` compares with its student."""
        return self.loss.from_logits

    @property
    def teacher_from_logits(self) -> bool:
        """The flooded loss's; an AttributeError if it knows no teacher."""
        return self.loss.teacher_from_logits

    @property
    def teacher_classes(self) -> tuple[int, ...] | None:
        """The flooded loss's; None if it has none."""
        return getattr(self.loss, "teacher_classes", None)

    def teacher(self, y_true: Tensor) -> Tensor:
        """Return the teacher as the flooded loss corrects it."""
        return self.loss.teacher(y_true)

    def __call__(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor = None
    ) -> Tensor:
        """Return the flooded mean, a scalar.

        Args:
            y_true: as the flooded loss takes it.
            y_pred: as the flooded loss takes it.
            sample_weight: as the flooded loss takes it.

        Returns:
            A scalar.
        """
        mean = self.loss(y_true, y_pred, sample_weight=sample_weight)
        # Keras has divided the mean by the number of replicas.
        level = ops.cast(self.level / replicas(), mean.dtype)
        return ops.abs(mean - level) + level

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same loss again."""
        return {
            "loss": keras.saving.serialize_keras_object(self.loss),
            "level": self.level,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Flooding":
        """Build the loss from what `get_config` returned."""
        loss = keras.saving.deserialize_keras_object(config["loss"])
        return cls(**{**config, "loss": loss})
