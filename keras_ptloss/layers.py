"""Keras layers that correct a teacher's outputs."""

from typing import Any

import keras

from keras_ptloss._checks import fail
from keras_ptloss._correction import Correction
from keras_ptloss._several import SideBySide

__all__ = ["CorrectedTeacher", "TeachersSideBySide"]

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_ptloss")
class CorrectedTeacher(keras.layers.Layer):
    """Turn a teacher's outputs into the corrected teacher's probabilities.

    `keras.Sequential([teacher, CorrectedTeacher(correction)])` is the corrected
    teacher as a model; `SearchResult.proxy_model` builds it. It has no weights.

    Args:
        correction: a `Correction`.
        **kwargs: passed on to `keras.layers.Layer`: `name`, ...

    Input shape: `(..., C_in)`, of several teachers their rows side by side, or
    a list of one tensor a teacher; output shape: `(..., C)`.

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
        """Return the corrected rows, `(..., C)`, of `(..., C_in)` or a list."""
        return self.correction.target(inputs, argument="inputs")

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return `(..., C)`."""
        first = input_shape
        if input_shape and isinstance(input_shape[0], (list, tuple)):
            first = input_shape[0]
        return (*first[:-1], self.correction.classes(first[-1]))

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same layer again."""
        correction = keras.saving.serialize_keras_object(self.correction)
        return {**super().get_config(), "correction": correction}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CorrectedTeacher":
        """Build the layer from what `get_config` returned."""
        correction = keras.saving.deserialize_keras_object(config["correction"])
        return cls(**{**config, "correction": correction})


@keras.saving.register_keras_serializable(package="keras_ptloss")
class TeachersSideBySide(keras.layers.Layer):
    """Ask several models of the same inputs; put their outputs side by side.

    With `CorrectedTeacher` behind it, it is the corrected teacher of several
    live ones, as a model; `SearchResult.proxy_model` builds it.

    Args:
        teachers: Keras models, in the order of the correction.
        counts: their class counts, as `Correction.teachers`.
        from_logits: whether they give logits, one flag for all or one each.
        **kwargs: passed on to `keras.layers.Layer`: `name`, ...

    Input: what the teachers take; output shape: `(..., C_1 + C_2 + ...)`.

    Raises:
        ValueError: if `teachers` are not as many models; on a call, if one has
            another class count.

    Example:
        >>> import keras, numpy as np
        >>> teachers = [
        ...     keras.Sequential([keras.layers.Dense(classes, "softmax")])
        ...     for classes in (3, 5)
        ... ]
        >>> layer = TeachersSideBySide(teachers, (3, 5))
        >>> layer(np.ones((2, 4), "float32")).shape[-1]
        8
    """

    def __init__(
        self,
        teachers: list[keras.Model],
        counts: tuple[int, ...],
        *,
        from_logits: Any = False,
        **kwargs: Any,
    ) -> None:
        # The inputs reach the teachers as they are, whatever the global policy.
        kwargs.setdefault("dtype", "float32")
        super().__init__(**kwargs)
        if not isinstance(teachers, (list, tuple)) or not all(
            isinstance(model, keras.Model) for model in teachers
        ):
            fail("teachers", "a list of Keras models", teachers)
        self.row = SideBySide(counts, from_logits, ("counts", "from_logits"))
        self.row.check_number("teachers", len(teachers))
        self.teachers = list(teachers)

    def call(self, inputs: Any) -> Tensor:
        """Return the teachers' outputs, `(..., C_1 + C_2 + ...)`."""
        outputs = [model(inputs, training=False) for model in self.teachers]
        return self.row.join("teachers", outputs)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same layer again."""
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "teachers": [serialize(model) for model in self.teachers],
            "counts": list(self.row.counts),
            "from_logits": list(self.row.from_logits),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TeachersSideBySide":
        """Build the layer from what `get_config` returned."""
        load = keras.saving.deserialize_keras_object
        teachers = [load(model) for model in config["teachers"]]
        return cls(**{**config, "teachers": teachers})
