"""The calibration of a teacher: `t = softmax(A z + b)`.

`z` are the teacher's logits, or the logarithms of its probabilities. This
module has the only check of `A` and `b`, and the only place that applies them,
to NumPy arrays and to tensors alike.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import keras
import numpy as np
import scipy.special
from keras import ops

from keras_ptloss._checks import as_floats, differ, fail
from keras_ptloss._xla import exponential

Tensor = Any

LOWEST = -1e30  # logarithms and logits of masked classes: 0 * -inf is NaN
TINY = float(np.finfo("float32").tiny)  # inside logarithms: 0 log 0 = 0


class Rows(NamedTuple):
    """Distributions `weights / total`, and their logarithm.

    A softmax may be left as exponentials and their sum: what a loss sums over
    the classes is then divided once a row, not once a value.

    Attributes:
        weights: `(..., C)`, at or above 0.
        total: what they are divided by, `(..., 1)`; None is 1.
        log: the logarithm of the distribution, `(..., C)`, finite: of a masked
            class, whose logit is -inf, `LOWEST`.
    """

    weights: Tensor
    total: Tensor | None
    log: Tensor

    @property
    def probabilities(self) -> Tensor:
        """The distributions, `(..., C)`."""
        return self.weights if self.total is None else self.weights / self.total


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """The linear map of logits `z -> A z + b`, and its softmax.

    Args:
        scale: `A`: a number (the inverse of a temperature), one a class,
            `(C,)` (vector scaling), or a matrix, `(C, C_in)` (matrix scaling),
            whose `C_in` inputs may be those of several teachers side by side.
            Numbers and vectors are above 0.
        bias: `b`: a number, or one a class, `(C,)`.

    Raises:
        ValueError: if an argument is not of this form.

    Reference:
        Guo et al. 2017, On Calibration of Modern Neural Networks; Kull et al.
        2019, Beyond temperature scaling (https://arxiv.org/abs/1910.12656).
    """

    scale: Any = 1.0
    bias: Any = 0.0

    def __post_init__(self) -> None:
        """Check the arguments; keep them as float64 arrays."""
        scale = check_scale("scale", self.scale)
        bias = check_bias("bias", self.bias)
        if scale.ndim and bias.ndim and len(scale) != len(bias):
            raise ValueError(
                "`scale` and `bias` must be of the same classes. Received: "
                f"scale of shape {scale.shape}, bias of shape {bias.shape}"
            )
        for name, array in {"scale": scale, "bias": bias}.items():
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @property
    def is_identity(self) -> bool:
        """Whether it leaves every distribution as it is."""
        if self.scale.ndim == 2 or np.any(self.scale != 1.0):
            return False
        return bool(np.all(self.bias == self.bias.flat[0]))

    @property
    def classes(self) -> int | None:
        """C, the classes that come out; None if any number may."""
        sizes = [len(a) for a in (self.scale, self.bias) if a.ndim]
        return sizes[0] if sizes else None

    @property
    def input_classes(self) -> int | None:
        """C_in, the classes that go in; None if any number may."""
        return self.scale.shape[1] if self.scale.ndim == 2 else self.classes

    @property
    def rectangle(self) -> tuple[int] | None:
        """`(C_in,)` of a matrix whose `C_in` is not C, else None."""
        shape = self.scale.shape
        return shape[1:] if len(shape) == 2 and shape[0] != shape[1] else None

    def check_input(self, argument: str, classes: int | None) -> None:
        """Require that rows of `classes` entries can be calibrated."""
        if differ(self.input_classes, classes):
            raise ValueError(
                f"`{argument}` must have the {self.input_classes} classes that "
                f"its calibration (temperature, scale, bias) is for. Received: "
                f"{argument} with {classes} classes"
            )

    def __call__(self, outputs: Tensor, *, from_logits: bool) -> Tensor:
        """Return the calibrated distribution, `(..., C)`.

        Args:
            outputs: logits or probabilities, `(..., C_in)`: a NumPy array or a
                tensor.
            from_logits: whether they are logits.

        Returns:
            Probabilities, of the kind that `outputs` is. Probabilities that
            need no calibration come back as they are; ones that do are held at
            or above `keras.config.epsilon()`, since a class at 0 could never
            move. So are, before a matrix, the logits -inf of masked classes.
        """
        array = isinstance(outputs, np.ndarray)
        if self.is_identity and not from_logits:
            return outputs
        z = self._logits(outputs, from_logits, np if array else ops)
        return (scipy.special.softmax if array else ops.softmax)(z, axis=-1)

    def with_log(self, outputs: Tensor, *, from_logits: bool) -> Rows:
        """Return the calibrated distribution and its logarithm, `(..., C)`.

        The logarithm costs nothing beside a softmax.

        Args:
            outputs: logits or probabilities, `(..., C_in)`: a tensor.
            from_logits: whether they are logits.
        """
        if self.is_identity and not from_logits:
            return Rows(outputs, None, ops.log(ops.maximum(outputs, TINY)))
        return softmax_and_log(self._logits(outputs, from_logits, ops))

    def _logits(self, outputs: Tensor, from_logits: bool, xp: Any) -> Tensor:
        """Return `A z + b`, `(..., C)`."""
        z = outputs if from_logits else log_probabilities(outputs, xp)
        if self.is_identity:
            return z
        if from_logits and self.scale.ndim == 2:
            z = hold_masked(z, xp)
        scale = self.scale.astype(keras.backend.standardize_dtype(z.dtype))
        bias = self.bias.astype(scale.dtype)
        # By functions: PyTorch's tensors do not multiply NumPy's arrays.
        multiply = xp.matmul if scale.ndim == 2 else xp.multiply
        z = multiply(z, scale.T)
        return xp.add(z, bias) if np.any(bias) else z


def softmax_and_log(logits: Tensor) -> Rows:
    """Return `softmax(z)` and its logarithm, of one exponential a value."""
    shifted = logits - ops.max(logits, axis=-1, keepdims=True)
    shifted = ops.maximum(shifted, LOWEST)
    weights = exponential(shifted)
    total = ops.sum(weights, axis=-1, keepdims=True)
    return Rows(weights, total, shifted - ops.log(total))


def log_probabilities(probabilities: Tensor, xp: Any = np) -> Tensor:
    """Return `log max(p, floor)`, the `z` of probabilities.

    The floor is `keras.config.epsilon()`, as in Keras's own losses. `xp` is
    NumPy or `keras.ops`.
    """
    return xp.log(xp.maximum(probabilities, keras.config.epsilon()))


def hold_masked(logits: Tensor, xp: Any) -> Tensor:
    """Return logits with -inf at the floor of probabilities, below the largest.

    A matrix would take `0 * -inf`, which is NaN, into every class.
    """
    largest = xp.max(logits, axis=-1, keepdims=True)
    floor = largest + math.log(keras.config.epsilon())
    return xp.where(logits == -np.inf, floor, logits)


def check_scale(argument: str, value: Any, *, max_rank: int = 2) -> np.ndarray:
    """Require `A`: a number or `(C,)` above 0, or at rank 2 `(C, C_in)`.

    Returns:
        A float64 array of its own.
    """
    form = "a finite number above 0, or one a class"
    if max_rank == 2:
        form += ", or a matrix (C, C_in)"
    array = as_floats(argument, value, form)
    good = array.ndim <= max_rank and array.size and np.all(np.isfinite(array))
    if not good or (array.ndim < 2 and not np.all(array > 0)):
        fail(argument, form, value)
    return array


def check_bias(argument: str, value: Any) -> np.ndarray:
    """Require `b`: a finite number or `(C,)`; None is zero."""
    form = "a finite number, or one a class, or None"
    array = as_floats(argument, 0.0 if value is None else value, form)
    if array.ndim > 1 or not array.size or not np.all(np.isfinite(array)):
        fail(argument, form, value)
    return array


def check_teacher_calibration(
    teacher_temperature: Any, teacher_scale: Any, teacher_bias: Any
) -> dict[str, np.ndarray]:
    """Require the arguments that users set; return them as arrays, by name.

    Args:
        teacher_temperature: a number above 0, or one a class, `(C,)`.
        teacher_scale: `A`, as in `Calibration`.
        teacher_bias: `b`, as in `Calibration`; None is zero.

    Raises:
        ValueError: if an argument is not of this form, or they are of
            different classes.
    """
    name = "teacher_temperature"
    arrays = {
        name: check_scale(name, teacher_temperature, max_rank=1),
        "teacher_scale": check_scale("teacher_scale", teacher_scale),
        "teacher_bias": check_bias("teacher_bias", teacher_bias),
    }
    if len({len(array) for array in arrays.values() if array.ndim}) > 1:
        shapes = [f"{n} of shape {a.shape}" for n, a in arrays.items()]
        raise ValueError(
            "`teacher_temperature`, `teacher_scale` and `teacher_bias` must be "
            f"of the same classes. Received: {', '.join(shapes)}"
        )
    return arrays


def teacher_calibration(
    teacher_temperature: Any, teacher_scale: Any, teacher_bias: Any
) -> Calibration:
    """Return `z -> A z / temperature + b` of the arguments that users set.

    Raises:
        ValueError: as `check_teacher_calibration`.
    """
    temperature, scale, bias = check_teacher_calibration(
        teacher_temperature, teacher_scale, teacher_bias
    ).values()
    if scale.ndim == 2 and temperature.ndim:
        temperature = temperature[:, None]  # of the classes that come out
    return Calibration(scale / temperature, bias)
