"""Keras layers that correct a teacher's outputs."""

from typing import Any

import keras

from keras_ptloss._correction import Correction

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_ptloss")
class CorrectedTeacher(keras.layers.Layer):
    """Turn a teacher's outputs into the corrected teacher's probabilities.

    `keras.Sequential([teacher, CorrectedTeacher(correction)])` is the corrected
    teacher as a model; `SearchResult.proxy_model` builds it. It has no weights.

    Args:
        correction: a `Correction`.
        **kwargs: passed on to `keras.layers.Layer`: `name`, ...

    Input shape: `(..., C_in)`; output shape: `(..., C)`.

    Raises:
        ValueError: if `correction` is none. On a call, if the input has another
            class count than the correction, or (seen outside compiled
            functions) rows that should be probabilities are not.

    Example:
        >>> import numpy as np
        >>> layer = CorrectedTeacher(Correction([2.0, 0.5]))
        >>> np.asarray(layer(np.array([[0.7, 0.2, 0.1]]))).round(3)
        array([[0.838, 0.113, 0.049]], dtype=float32)

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), §4.2.
    """

    def __init__(self, correction: Correction, **kwargs: Any) -> None:
        # Bits below float32's would be lost in the solver.
        kwargs.setdefault("dtype", "float32")
        super().__init__(**kwargs)
        if not isinstance(correction, Correction):
            raise ValueError(
                "`correction` must be a keras_ptloss.Correction. Received: "
                f"correction={correction!r}"
            )
        self.correction = correction

    def call(self, inputs: Tensor) -> Tensor:
        """Return the corrected rows of `(..., C_in)`, `(..., C)`."""
        return self.correction.target(inputs)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return `(..., C)`."""
        return (*input_shape[:-1], self.correction.classes(input_shape[-1]))

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same layer again."""
        correction = keras.saving.serialize_keras_object(self.correction)
        return {**super().get_config(), "correction": correction}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CorrectedTeacher":
        """Build the layer from what `get_config` returned."""
        correction = keras.saving.deserialize_keras_object(config["correction"])
        return cls(**{**config, "correction": correction})
