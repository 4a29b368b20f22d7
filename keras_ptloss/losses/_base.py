"""What the losses of a teacher and a student share: flags, dtype, config."""

from typing import Any

import keras
import numpy as np
from keras import ops

Tensor = Any


class TeacherLoss(keras.losses.Loss):
    """The Keras shell of a pure function of teacher and student.

    A loss gives the function's own arguments (`arguments`) and calls it
    (`of`); flags, reduction, dtype and config stand here.

    Args:
        from_logits: whether the student's outputs are logits.
        teacher_from_logits: whether the teacher's are; None means the same as
            `from_logits`.
        **kwargs: `name`, `reduction` and `dtype` of `keras.losses.Loss`.
    """

    def __init__(
        self,
        *,
        from_logits: bool,
        teacher_from_logits: bool | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.from_logits = bool(from_logits)
        self.teacher_from_logits = (
            self.from_logits
            if teacher_from_logits is None
            else bool(teacher_from_logits)
        )

    def of(self, y_true: Tensor, y_pred: Tensor, **flags: bool) -> Tensor:
        """Return one loss an example, `(...)`, in float32 or better."""
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        """Return the function's own arguments: numbers and arrays."""
        raise NotImplementedError

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return one loss an example, `(...)`."""
        values = self.of(
            y_true,
            y_pred,
            from_logits=self.from_logits,
            teacher_from_logits=self.teacher_from_logits,
        )
        return ops.cast(values, self.dtype)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same loss again."""
        own = {
            name: np.asarray(value).tolist()
            for name, value in self.arguments().items()
        }
        return {
            **super().get_config(),
            **own,
            "from_logits": self.from_logits,
            "teacher_from_logits": self.teacher_from_logits,
            "dtype": self.dtype,
        }


def at_least_float32(x: Tensor) -> Tensor:
    """Return a tensor of `x` in its dtype, or in float32 if that is wider."""
    x = ops.convert_to_tensor(x)
    return ops.cast(x, keras.backend.result_type(x.dtype, "float32"))
