"""The correction of a teacher: calibration, then epsilon.

It is what a search finds and what everything after it stands on:

    t = softmax(A z + b)            `calibration`, of the teacher's outputs
    q = proxy(t, epsilon)           where PTLoss leads a student (Eq. 8)
    softmax(A' log q + b')          `recalibration`, of the proxy

Of several teachers, `z` are the logarithms of their probabilities side by side,
and `A` has the columns of all.
"""

import dataclasses
from typing import Any

import keras
import numpy as np

from keras_ptloss._binary import two_events
from keras_ptloss._calibration import Calibration, check_bias, check_scale
from keras_ptloss._checks import (
    check_constant_epsilon,
    check_flag,
    check_probabilities,
    differ,
)
from keras_ptloss._several import SideBySide
from keras_ptloss._teacher import read_outputs, read_row
from keras_ptloss.losses import ProxyKLDivergence, PTLoss
from keras_ptloss.proxy import ProxyTeacherResult, proxy_teacher
from keras_ptloss.proxy._layer import proxy_tensor

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_ptloss")
@dataclasses.dataclass(frozen=True, eq=False)
class Correction:
    """How a teacher's outputs are corrected: calibration, then epsilon.

    It is a value: nothing of it can be written to, and two of equal arguments
    are equal.

    Args:
        epsilon: coefficients of PTLoss: a number (order 1), `(M,)` shared by
            the classes, or `(C, M)` per class. 0 is plain KL.
        scale: `A`, of the calibration `t = softmax(A z + b)` ahead of epsilon:
            a number (the inverse of a temperature), `(C,)`, or a matrix,
            `(C, C_in)`. `z` are the teacher's logits, or the logarithms of its
            probabilities.
        bias: `b`: a number, or `(C,)`.
        proxy_scale: `A'`, of a second calibration, after epsilon:
            `softmax(A' log q + b')`. PTLoss cannot carry it: a student has to
            be led to the corrected distribution itself.
        proxy_bias: `b'`.
        teacher_from_logits: whether the teacher's outputs are logits; of
            several teachers one flag for all, or one each.
        teachers: class counts `(C_1, C_2, ...)` of several teachers, whose
            outputs are given side by side, or in a list; of one teacher with
            other classes than C, its own, `(C_1,)`. `scale` is then a matrix of
            as many columns, and `z` the logarithms of each teacher's
            probabilities, logits or not. None is one teacher of C classes.

    Raises:
        ValueError: if an argument is not of this form.

    Example:
        >>> import numpy as np
        >>> correction = Correction([2.0, 0.5], scale=0.5)
        >>> teacher = np.array([[0.98, 0.02]])
        >>> correction.teacher(teacher).round(3)
        array([[0.875, 0.125]])
        >>> correction.proxy(teacher).probabilities.round(3)
        array([[0.947, 0.053]])
        >>> both = Correction(
        ...     scale=[[1, 0, 1, 0], [0, 1, 0, 1]], teachers=(2, 2)
        ... )
        >>> both.teacher([teacher, np.array([[0.2, 0.8]])]).round(3)
        array([[0.925, 0.075]])

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), §4.2; Guo et al.
        2017, On Calibration of Modern Neural Networks.
    """

    epsilon: Any = 0.0
    scale: Any = 1.0
    bias: Any = 0.0
    proxy_scale: Any = 1.0
    proxy_bias: Any = 0.0
    teacher_from_logits: Any = False
    teachers: tuple[int, ...] | None = None
    calibration: Calibration = dataclasses.field(init=False, repr=False)
    recalibration: Calibration = dataclasses.field(init=False, repr=False)
    row: SideBySide | None = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the arguments; keep them as float64 arrays."""
        calibration = Calibration(self.scale, self.bias)
        recalibration = Calibration(
            check_scale("proxy_scale", self.proxy_scale),
            check_bias("proxy_bias", self.proxy_bias),
        )
        epsilon = check_constant_epsilon(
            self.epsilon, classes=calibration.classes
        )
        epsilon.setflags(write=False)
        _check_classes(calibration, epsilon, recalibration)
        row = None
        flags: Any
        if self.teachers is None:
            flags = check_flag("teacher_from_logits", self.teacher_from_logits)
        else:
            row = SideBySide(self.teachers, self.teacher_from_logits)
            flags = row.from_logits
            _check_columns(calibration, row)
        for name, value in {
            "epsilon": epsilon,
            "scale": calibration.scale,
            "bias": calibration.bias,
            "proxy_scale": recalibration.scale,
            "proxy_bias": recalibration.bias,
            "teacher_from_logits": flags,
            "teachers": None if row is None else row.counts,
            "row": row,
            "calibration": calibration,
            "recalibration": recalibration,
        }.items():
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        """Whether it is the same correction: of equal arguments."""
        if not isinstance(other, Correction):
            return NotImplemented
        return self.get_config() == other.get_config()

    def __hash__(self) -> int:
        """Return one number of all corrections that are equal."""
        arrays = (self.epsilon, self.scale, self.bias, self.proxy_scale)
        return hash(tuple(np.concatenate([a.ravel() for a in arrays]).tolist()))

    def __reduce__(self) -> tuple[Any, ...]:
        """Build copies anew: those of NumPy's arrays could be written to."""
        return type(self).from_config, (self.get_config(),)

    @property
    def is_identity(self) -> bool:
        """Whether it is plain KL: no calibration, and epsilon = 0."""
        return self.is_pt_loss and not (
            np.any(self.epsilon) or not self.calibration.is_identity
        )

    @property
    def is_pt_loss(self) -> bool:
        """Whether PTLoss can carry it.

        That is, there is one teacher, and nothing follows epsilon.
        """
        return self.row is None and self.recalibration.is_identity

    def classes(self, inputs: int) -> int:
        """Return C, the classes that come out of a teacher of `inputs`."""
        known = self.recalibration.classes or self.calibration.classes
        return known or max(inputs, 2)

    def teacher(self, outputs: Any) -> np.ndarray:
        """Return the calibrated teacher, `(..., C)`, in float64.

        Args:
            outputs: the teacher's outputs, `(..., C_in)`, or `(..., 1)` of a
                binary head. Those of several teachers are an array of their
                rows side by side, `(..., C_1 + C_2 + ...)`, or a list of one
                array a teacher.

        Returns:
            Probabilities.

        Raises:
            ValueError: if `outputs` are not of this form, or not logits or
                probabilities as `teacher_from_logits` says.
        """
        if self.row is not None:
            z = self.row.logarithms("outputs", read_row(self.row, outputs))
            return self.calibration(z, from_logits=True)
        rows = read_outputs(
            outputs,
            from_logits=self.teacher_from_logits,
            if_logits="take their softmax, or say teacher_from_logits=True",
            argument="outputs",
        )
        self.calibration.check_input("outputs", rows.shape[-1])
        return self.calibration(rows, from_logits=self.teacher_from_logits)

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
        self.recalibration.check_input("outputs", teacher.shape[-1])
        rows = teacher.reshape(-1, teacher.shape[-1])
        solved = proxy_teacher(rows, self.epsilon)
        if self.recalibration.is_identity:
            return solved
        corrected = self.recalibration(solved.probabilities, from_logits=False)
        return dataclasses.replace(solved, probabilities=corrected)

    def target(self, outputs: Tensor, *, argument: str = "outputs") -> Tensor:
        """Return the corrected teacher of tensors, for a loss or a layer.

        As `proxy`, in the dtype of `outputs`, and compiled with what it is
        called from.

        Args:
            outputs: the teacher's outputs, `(..., C_in)`, float32 or better;
                those of several teachers side by side, or a list of them.
            argument: what errors call `outputs`, where they are another's
                argument.

        Returns:
            Probabilities, `(..., C)`.
        """
        from_logits = self.teacher_from_logits
        if self.row is not None:
            rows = self.row.logarithms(
                argument, self.row.join(argument, outputs)
            )
            from_logits = True
        else:
            rows = two_events(outputs, from_logits=from_logits)
            if not from_logits:
                advice = "say teacher_from_logits=True of the correction"
                check_probabilities(argument, rows, advice)
            self.calibration.check_input(argument, rows.shape[-1])
        teacher = self.calibration(rows, from_logits=from_logits)
        self.recalibration.check_input(argument, teacher.shape[-1])
        if teacher.shape[-1] is not None:
            check_constant_epsilon(self.epsilon, classes=teacher.shape[-1])
        if np.any(self.epsilon):
            teacher = proxy_tensor(teacher, self.epsilon)
        return self.recalibration(teacher, from_logits=False)

    def loss(
        self, *, from_logits: bool = False, **arguments: Any
    ) -> PTLoss | ProxyKLDivergence:
        """Build the loss whose optimum is `proxy`.

        It is a `PTLoss` where PTLoss can carry the correction, and KL to the
        corrected teacher, `ProxyKLDivergence`, where something follows
        epsilon or there are several teachers.

        Args:
            from_logits: whether the student's outputs are logits.
            **arguments: `reduction`, `name` and `dtype` of a Keras loss.

        Returns:
            A loss that takes the teacher's outputs as they are.
        """
        if not self.is_pt_loss:
            return ProxyKLDivergence(self, from_logits=from_logits, **arguments)
        return PTLoss(
            self.epsilon,
            from_logits=from_logits,
            teacher_from_logits=self.teacher_from_logits,
            teacher_scale=self.scale,
            teacher_bias=self.bias,
            **arguments,
        )

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same correction again."""
        return {
            "epsilon": self.epsilon.tolist(),
            "scale": self.scale.tolist(),
            "bias": self.bias.tolist(),
            "proxy_scale": self.proxy_scale.tolist(),
            "proxy_bias": self.proxy_bias.tolist(),
            "teacher_from_logits": self.teacher_from_logits,
            "teachers": self.teachers,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Correction":
        """Build the correction from what `get_config` returned."""
        return cls(**config)


def _check_classes(
    calibration: Calibration, epsilon: np.ndarray, recalibration: Calibration
) -> None:
    """Require that what follows epsilon is of the classes of what it follows.

    Those of calibration and epsilon are compared already.
    """
    classes = calibration.classes
    if classes is None and epsilon.ndim == 2:
        classes = len(epsilon)
    if differ(classes, recalibration.input_classes):
        raise ValueError(
            f"`proxy_scale` and `proxy_bias` must be of the {classes} classes "
            "that scale, bias and epsilon are of. Received: proxy_scale of "
            f"shape {recalibration.scale.shape}, proxy_bias of shape "
            f"{recalibration.bias.shape}"
        )


def _check_columns(calibration: Calibration, row: SideBySide) -> None:
    """Require a matrix with a column for each class of each teacher."""
    shape = calibration.scale.shape
    if len(shape) != 2 or shape[1] != row.width:
        raise ValueError(
            "`scale` must be a matrix with the columns of all `teachers`, "
            f"{' + '.join(map(str, row.counts))} = {row.width}. Received: "
            f"scale of shape {shape}, teachers={row.counts}"
        )
