"""The correction of a teacher: calibration, then epsilon.

It is what a search finds and what everything after it stands on:

    t = softmax(A z + b)            `calibration`, of the teacher's outputs
    q = proxy(t, epsilon)           where PTLoss leads a student (Eq. 8)
"""

import dataclasses
from typing import Any

import keras
import numpy as np

from keras_ptloss._binary import two_events
from keras_ptloss._calibration import Calibration
from keras_ptloss._checks import (
    check_constant_epsilon,
    check_probabilities,
    fail,
    on_simplex,
)
from keras_ptloss.losses import PTLoss
from keras_ptloss.proxy import ProxyTeacherResult, proxy_teacher


@keras.saving.register_keras_serializable(package="keras_ptloss")
@dataclasses.dataclass(frozen=True, eq=False)
class Correction:
    """How a teacher's outputs are corrected: calibration, then epsilon.

    Args:
        epsilon: coefficients of PTLoss: a number (order 1), `(M,)` shared by
            the classes, or `(C, M)` per class. 0 is plain KL.
        scale: `A`, of the calibration `t = softmax(A z + b)` ahead of epsilon:
            a number (the inverse of a temperature), `(C,)`, or a matrix,
            `(C, C_in)`. `z` are the teacher's logits, or the logarithms of its
            probabilities.
        bias: `b`: a number, or `(C,)`.
        from_logits: whether the teacher's outputs are logits.

    Raises:
        ValueError: if an argument is not of this form.

    Example:
        >>> import numpy as np
        >>> correction = Correction([2.0, 0.5], scale=0.5)
        >>> teacher = np.array([[0.98, 0.02]])
        >>> correction.teacher(teacher).round(3)
        array([[0.875, 0.125]])
        >>> correction.proxy(teacher).probabilities.round(3)
        array([[0.94, 0.06]])

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), §4.2; Guo et al.
        2017, On Calibration of Modern Neural Networks.
    """

    epsilon: Any = 0.0
    scale: Any = 1.0
    bias: Any = 0.0
    from_logits: bool = False
    calibration: Calibration = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the arguments; keep them as float64 arrays."""
        calibration = Calibration(self.scale, self.bias)
        epsilon = check_constant_epsilon(
            self.epsilon, classes=calibration.classes
        )
        for name, value in {
            "epsilon": epsilon,
            "scale": calibration.scale,
            "bias": calibration.bias,
            "from_logits": bool(self.from_logits),
            "calibration": calibration,
        }.items():
            object.__setattr__(self, name, value)

    @property
    def is_identity(self) -> bool:
        """Whether it is plain KL: no calibration, and epsilon = 0."""
        return self.calibration.is_identity and not np.any(self.epsilon)

    def teacher(self, outputs: Any) -> np.ndarray:
        """Return the calibrated teacher, `(..., C)`, in float64.

        Args:
            outputs: the teacher's outputs, `(..., C_in)`, or `(..., 1)` of a
                binary head.

        Returns:
            Probabilities.

        Raises:
            ValueError: if `outputs` are not of this form, or not logits or
                probabilities as `from_logits` says.
        """
        return self.calibration(
            self.read(outputs), from_logits=self.from_logits
        )

    def proxy(self, outputs: Any) -> ProxyTeacherResult:
        """Return where a student distilled with `loss()` ends.

        Args:
            outputs: as in `teacher`.

        Returns:
            The proxy teachers of the rows, all in one axis, `(N, C)`.

        Raises:
            ValueError: as `teacher`.
        """
        teacher = self.teacher(outputs)
        rows = teacher.reshape(-1, teacher.shape[-1])
        return proxy_teacher(rows, self.epsilon)

    def loss(self, *, from_logits: bool = False, **arguments: Any) -> PTLoss:
        """Build the `PTLoss` whose optimum is `proxy`.

        Args:
            from_logits: whether the student's outputs are logits.
            **arguments: `reduction`, `name` and `dtype` of a Keras loss.

        Returns:
            A `PTLoss` that takes the teacher's outputs as they are.
        """
        return PTLoss(
            self.epsilon,
            from_logits=from_logits,
            teacher_from_logits=self.from_logits,
            teacher_scale=self.scale,
            teacher_bias=self.bias,
            **arguments,
        )

    def read(self, outputs: Any) -> np.ndarray:
        """Check a teacher's outputs, `(..., C_in)`; return them in float64.

        A binary head's one column becomes two; probabilities are normalised.

        Raises:
            ValueError: as `teacher`.
        """
        rows = np.asarray(outputs)
        if rows.dtype.kind not in "fiu" or rows.ndim < 2 or not rows.size:
            raise ValueError(
                "`teacher` must give numbers of shape (examples, ..., classes)."
                f" Received: teacher outputs of shape {rows.shape} and dtype "
                f"{rows.dtype}"
            )
        rows = two_events(rows.astype("float64"), from_logits=self.from_logits)
        self.calibration.check_input("teacher", rows.shape[-1])
        if not self.from_logits:
            check_probabilities("teacher", rows, "say from_logits=True")
            return np.asarray(rows / rows.sum(axis=-1, keepdims=True))
        if not np.all(np.isfinite(rows)):
            fail("teacher", "finite logits", outputs)
        if rows.size > rows.shape[-1] and on_simplex(rows).all():
            raise ValueError(
                "`from_logits` must be False for probabilities: all rows of "
                "the teacher are non-negative and sum to 1. Received: "
                f"from_logits=True, teacher[0]={rows[0]}"
            )
        return rows

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same correction again."""
        return {
            "epsilon": self.epsilon.tolist(),
            "scale": self.scale.tolist(),
            "bias": self.bias.tolist(),
            "from_logits": self.from_logits,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Correction":
        """Build the correction from what `get_config` returned."""
        return cls(**config)
