"""The correction of a teacher, as found by a search, and its Keras layers."""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ptloss._backend import as_array
from keras_ptloss._math import log_teacher_probs, model_probs, two_events
from keras_ptloss._progress import Verbose, track
from keras_ptloss._validation import (
    as_floats,
    as_probabilities,
    check_constant_epsilon,
    fail,
    one_flag_each,
    valid_probs,
)
from keras_ptloss.proxy import ROWS_AT_ONCE, proxy_teacher, proxy_tensor

__all__ = ["CorrectedTeacher", "Correction", "TeachersSideBySide"]

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_ptloss")
@dataclasses.dataclass(frozen=True, eq=False)
class Correction:
    """A function that corrects the outputs of one or more teachers.

    Step 1 corrects the confidence, step 2 moves probability between classes:

        z_k    = log max(t_k, 1e-7)                    of teacher k, (..., C_k)
        t      = softmax(sum_k z_k / temperature_k)                 step 1
        r      = log proxy(t, epsilon)                              step 1
        logits = (1 + log_prob_weight) r + prob_weight softmax(r)
                 + matrix @ [z_1, z_2, ...] + bias                  step 2
        q      = softmax(logits)

    The proxy is the paper's proxy teacher (Eq. 8). For a single teacher, step 1
    is therefore the optimum of `PTLoss(epsilon,
    teacher_temperature=temperature)`. Without step 2 and with `temperature=1`,
    exact zeros stay zeros.

    Args:
        epsilon: coefficients of PTLoss: a number (order 1), `(M,)` shared by
            the classes, or `(C, M)` per class.
        temperature: a number, or one for each teacher. `inf` leaves a teacher
            out of step 1; use it if the teacher's classes are not the
            student's. If all temperatures are `inf`, r is uniform.
        matrix: `(C, C_1 + C_2 + ...)`, or None for zeros.
        bias: `(C,)`, or None for zeros.
        log_prob_weight: this number plus 1 is the weight of r in step 2.
        prob_weight: the weight of softmax(r) in step 2.
        kept_classes: classes that keep the teacher's probability. With several
            teachers, this is the probability in the softmax of their mean z.
            The other classes share the remaining probability.
        teacher_classes: the number of classes of each teacher; needed only for
            several teachers.
        from_logits: whether the outputs given to `correct` are logits. Pass one
            flag for all teachers, or one per teacher. Losses and layers always
            take probabilities.

    Example:
        >>> import numpy as np
        >>> correction = Correction(epsilon=0.5, temperature=2.0)
        >>> correction.correct(np.array([[0.98, 0.02]])).round(3)
        array([[0.907, 0.093]])

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), Eq. 8.
    """

    epsilon: Any = 0.0
    temperature: Any = 1.0
    matrix: Any = None
    bias: Any = None
    log_prob_weight: float = 0.0
    prob_weight: float = 0.0
    kept_classes: tuple[int, ...] = ()
    teacher_classes: tuple[int, ...] | None = None
    from_logits: Any = False

    def __post_init__(self) -> None:
        """Check the arguments, and store arrays as read-only float64."""
        matrix = _finite("matrix", self.matrix, ndim=2)
        counts = self.teacher_classes
        if counts is None and matrix is not None:
            counts = (matrix.shape[1],)
        teachers = len(counts) if counts else 1
        temperature = np.asarray(self.temperature, "float64")
        one_or_each = temperature.shape in ((), (teachers,))
        if not one_or_each or not np.all(temperature > 0.0):
            fail(
                "temperature",
                f"a positive number, or one for each of {teachers} teachers",
                self.temperature,
            )
        temperatures = np.broadcast_to(temperature, (teachers,)).tolist()
        flags = one_flag_each(self.from_logits, teachers)
        one = teachers == 1
        for name, value in {
            "epsilon": check_constant_epsilon(self.epsilon),
            "temperature": temperatures[0] if one else tuple(temperatures),
            "matrix": matrix,
            "bias": _finite("bias", self.bias, ndim=1),
            "log_prob_weight": float(self.log_prob_weight),
            "prob_weight": float(self.prob_weight),
            "kept_classes": tuple(int(c) for c in self.kept_classes),
            "teacher_classes": counts and tuple(int(count) for count in counts),
            "from_logits": flags[0] if one else flags,
        }.items():
            if isinstance(value, np.ndarray):
                value.setflags(write=False)
            object.__setattr__(self, name, value)
        self._check_classes()

    def _check_classes(self) -> None:
        """Require that all arguments agree on the number of classes."""
        classes, counts = self.num_classes, self.teacher_classes or ()
        shapes = {
            "matrix": None if self.matrix is None else self.matrix.shape,
            "bias": None if self.bias is None else self.bias.shape,
            "epsilon": self.epsilon.shape if self.epsilon.ndim == 2 else None,
        }
        kept = self.kept_classes
        if (
            any(shape and shape[0] != classes for shape in shapes.values())
            or shapes["matrix"] not in (None, (classes, sum(counts)))
            or any(count != classes for count in self._counts_in_step_1())
            or any(c < 0 or c >= (classes or np.inf) for c in kept)
            or (kept and counts and classes not in counts)
        ):
            raise ValueError(
                "The arguments must agree on the number of classes C: `matrix` "
                "is (C, sum of teacher_classes), `bias` (C,), `epsilon` (C, M) "
                "if it is per class, and `kept_classes` are below C. A teacher "
                "with other classes must have temperature=inf, and cannot keep "
                f"classes. Received: shapes {shapes}, temperature="
                f"{self.temperature}, teacher_classes={self.teacher_classes}, "
                f"kept_classes={kept}"
            )

    @property
    def num_classes(self) -> int | None:
        """The number of classes C, or None if the correction fits any C."""
        per_class = self.epsilon if self.epsilon.ndim == 2 else None
        for array in (self.bias, self.matrix, per_class):
            if array is not None:
                return len(array)
        counts = self.teacher_classes or ()
        return (*self._counts_in_step_1(), *counts, None)[0]

    def _counts_in_step_1(self) -> list[int]:
        """Return the number of classes of each teacher in step 1."""
        counts, temperatures = self.teacher_classes, _tuple(self.temperature)
        return [
            count
            for count, temperature in zip(
                counts or (), temperatures, strict=False
            )
            if temperature < np.inf
        ]

    @property
    def has_step_2(self) -> bool:
        """Whether the correction is more than a temperature and epsilon."""
        return bool(
            self.matrix is not None
            or self.bias is not None
            or self.log_prob_weight
            or self.prob_weight
            or self.kept_classes
        )

    @property
    def is_identity(self) -> bool:
        """Whether the correction returns its only teacher unchanged."""
        return (
            self.temperature == 1.0
            and not self.epsilon.any()
            and not self.has_step_2
        )

    def correct(
        self, teacher_outputs: Any, *, verbose: Verbose = "auto"
    ) -> np.ndarray:
        """Return the corrected probabilities of stored teacher outputs.

        Args:
            teacher_outputs: `(..., C)`, probabilities, or logits if
                `from_logits` is True; `(..., 1)` for a sigmoid head. For
                several teachers, pass a list of arrays, or one array with their
                outputs side by side.
            verbose: 1 shows a progress bar, 0 does not; "auto" shows it after
                two seconds.

        Returns:
            Probabilities, `(..., C)`, float64.
        """
        flags = _tuple(self.from_logits)
        outputs = teacher_outputs
        if len(flags) == 1:
            outputs = [outputs]
        elif not isinstance(outputs, (list, tuple)):
            outputs = self.split(as_array(outputs))
        if len(outputs) != len(flags):
            expected = f"one array for each of {len(flags)} teachers"
            fail("teacher_outputs", expected, outputs)
        probs = [
            as_probabilities(
                "teacher_outputs", output, flag, "take their softmax first"
            )
            for output, flag in zip(outputs, flags, strict=True)
        ]
        side_by_side = np.concatenate(probs, axis=-1)
        rows = side_by_side.reshape(-1, side_by_side.shape[-1])
        starts = range(0, max(len(rows), 1), ROWS_AT_ONCE)
        parts = [
            _corrected(self, self.split(rows[low : low + ROWS_AT_ONCE]), np)
            for low in track(
                starts,
                f"Correcting {len(rows)} teacher outputs",
                len(starts),
                verbose=verbose,
            )
        ]
        return np.concatenate(parts).reshape(*side_by_side.shape[:-1], -1)

    def apply(self, teacher_probs: Tensor) -> Tensor:
        """Return the corrected probabilities of a tensor, by `keras.ops`.

        Args:
            teacher_probs: probabilities, `(..., C)`, float32 or better. The
                probabilities of several teachers are side by side, `(..., C_1 +
                C_2 + ...)`. Rows that are not probabilities are an error in an
                eager call, and become NaN in a compiled function.

        Returns:
            Probabilities, `(..., C)`, in the dtype of `teacher_probs`.
        """
        name, advice = "teacher_probs", "apply a softmax to them first"
        parts = self.split(two_events(teacher_probs, from_logits=False))
        valid = [valid_probs(name, part, advice) for part in parts]
        return _corrected(self, valid, ops)

    def split(self, side_by_side: Tensor) -> list[Tensor]:
        """Split outputs that are side by side into one array per teacher."""
        width = side_by_side.shape[-1]
        counts = self.teacher_classes or (self.num_classes or width,)
        if width is not None and width != sum(counts):
            raise ValueError(
                "Teacher outputs must have as many classes as the correction, "
                f"{' + '.join(map(str, counts))}. Received: teacher outputs of "
                f"shape {tuple(side_by_side.shape)}"
            )
        ends = np.cumsum(counts).tolist()
        return [
            side_by_side[..., end - count : end]
            for count, end in zip(counts, ends, strict=True)
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the correction to a JSON file."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.get_config(), file, indent=2)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Correction":
        """Read a correction that `save` wrote."""
        with open(path, encoding="utf-8") as file:
            return cls.from_config(json.load(file))

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same correction again."""
        return {
            name: np.asarray(value).tolist()
            if isinstance(value, (np.ndarray, tuple))
            else value
            for name, value in vars(self).items()
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Correction":
        """Build the correction from what `get_config` returned."""
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        """Whether the other correction has the same arguments."""
        if not isinstance(other, Correction):
            return NotImplemented
        return self.get_config() == other.get_config()


def _corrected(
    correction: Correction, teacher_probs: Sequence[Tensor], xp: Any
) -> Tensor:
    """Return q of the class docstring; `xp` is `numpy` or `keras.ops`."""
    first = teacher_probs[0]
    dtype = keras.backend.standardize_dtype(first.dtype)

    def constant(values: Any) -> Tensor:
        return xp.array(values, dtype=dtype)

    classes = correction.num_classes or first.shape[-1]
    z = [log_teacher_probs(t, xp) for t in teacher_probs]
    pooled = 0.0 * z[0][..., :1] + constant(np.zeros(classes))
    for z_k, temperature in zip(z, _tuple(correction.temperature), strict=True):
        if np.isfinite(temperature):
            pooled = pooled + z_k / temperature
    log_t = _log_softmax(pooled, xp)
    if not correction.has_step_2:
        as_it_is = correction.temperature == 1.0
        return _proxy(first if as_it_is else xp.exp(log_t), correction, xp)

    r = _log_proxy(log_t, correction, xp)
    logits = (1.0 + correction.log_prob_weight) * r
    logits = logits + correction.prob_weight * xp.exp(r)
    if correction.matrix is not None:
        both = xp.concatenate(z, axis=-1)
        logits = logits + xp.matmul(both, constant(correction.matrix.T))
    if correction.bias is not None:
        logits = logits + constant(correction.bias)
    if not correction.kept_classes:
        return xp.exp(_log_softmax(logits, xp))

    kept = np.zeros(classes)
    kept[list(correction.kept_classes)] = 1.0
    mean = first
    if len(z) > 1:
        alike = [z_k for z_k in z if z_k.shape[-1] == classes]
        mean = xp.exp(_log_softmax(sum(alike) / len(alike), xp))
    of_kept = mean * constant(kept)
    others = xp.exp(_log_softmax(logits - constant(1e30 * kept), xp))
    rest = 1.0 - xp.sum(of_kept, axis=-1, keepdims=True)
    return of_kept + others * rest


def _log_softmax(logits: Tensor, xp: Any) -> Tensor:
    logits = logits - xp.max(logits, axis=-1, keepdims=True)
    return logits - xp.log(xp.sum(xp.exp(logits), axis=-1, keepdims=True))


def _proxy(t: Tensor, correction: Correction, xp: Any) -> Tensor:
    """Return the proxy teacher of probabilities."""
    if not correction.epsilon.any():
        return t
    if xp is np:
        rows = proxy_teacher(
            t.reshape(-1, t.shape[-1]), correction.epsilon, verbose=0
        )
        return rows.probabilities.reshape(t.shape)
    return proxy_tensor(t, correction.epsilon)


def _log_proxy(log_t: Tensor, correction: Correction, xp: Any) -> Tensor:
    """Return the logarithm of the proxy teacher.

    It stays finite where probabilities underflow: for a shared epsilon of order
    1, it is the logarithm of `t / (nu - epsilon t)`, which needs only nu.
    """
    t = xp.exp(log_t)
    q = _proxy(t, correction, xp)
    if correction.epsilon.shape != (1,):
        return xp.log(xp.maximum(q, 1e-30))
    epsilon = float(correction.epsilon[0])
    largest = xp.max(t, axis=-1, keepdims=True)
    nu = largest / xp.max(q, axis=-1, keepdims=True) + epsilon * largest
    return _log_softmax(log_t - xp.log(nu - epsilon * t), xp)


def _finite(argument: str, values: Any, *, ndim: int) -> np.ndarray | None:
    """Return a float64 copy of finite numbers, or None."""
    if values is None:
        return None
    expected = f"finite numbers with {ndim} axes, or None"
    array = as_floats(argument, values, expected)
    if array.ndim != ndim or not array.size or not np.isfinite(array).all():
        fail(argument, expected, values)
    return array


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


@keras.saving.register_keras_serializable(package="keras_ptloss")
class CorrectedTeacher(keras.layers.Layer):
    """Correct a teacher's probabilities inside a model.

    `keras.Sequential([teacher, CorrectedTeacher(result.correction)])` gives you
    the corrected teacher as a Keras model. If the teacher gives logits, put a
    `keras.layers.Softmax()` in between. The layer has no weights.

    Args:
        correction: a `Correction`.
        **kwargs: `name` and other arguments of `keras.layers.Layer`.

    Input: probabilities, `(..., C)`; for several teachers, a list of tensors,
    or one tensor with their probabilities side by side. Output: `(..., C)`.
    Rows that are not probabilities raise a ValueError, or become NaN in
    compiled functions.

    Example:
        >>> import numpy as np
        >>> layer = CorrectedTeacher(Correction([2.0, 0.5]))
        >>> np.asarray(layer(np.array([[0.7, 0.2, 0.1]]))).round(3)
        array([[0.838, 0.113, 0.049]], dtype=float32)
    """

    def __init__(self, correction: Correction, **kwargs: Any) -> None:
        # Half precision is not precise enough for the proxy teacher.
        kwargs.setdefault("dtype", "float32")
        super().__init__(**kwargs)
        if not isinstance(correction, Correction):
            fail("correction", "a keras_ptloss.Correction", correction)
        self.correction = correction

    def call(self, inputs: Tensor) -> Tensor:
        """Return the corrected probabilities."""
        parts = inputs if isinstance(inputs, (list, tuple)) else [inputs]
        parts = [two_events(part, from_logits=False) for part in parts]
        return self.correction.apply(ops.concatenate(parts, axis=-1))

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same layer again."""
        return keras.saving.serialize_keras_object(
            {**super().get_config(), "correction": self.correction}
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CorrectedTeacher":
        """Build the layer from what `get_config` returned."""
        return cls(**keras.saving.deserialize_keras_object(config))


@keras.saving.register_keras_serializable(package="keras_ptloss")
class TeachersSideBySide(keras.layers.Layer):
    """Call several models on the same inputs and concatenate their outputs.

    To correct several live teachers, add `CorrectedTeacher(result.correction)`
    after this layer.

    Args:
        teachers: Keras models, in the order of the search.
        from_logits: whether the teachers give logits. Pass one flag for all
            teachers, or one per teacher.
        **kwargs: `name` and other arguments of `keras.layers.Layer`.

    Input: the inputs of the teachers. Output: probabilities, `(..., C_1 + C_2 +
    ...)`.

    Example:
        >>> import keras, numpy as np
        >>> teachers = [
        ...     keras.Sequential([keras.layers.Dense(num_classes, "softmax")])
        ...     for num_classes in (3, 5)
        ... ]
        >>> TeachersSideBySide(teachers)(np.ones((2, 4), "float32")).shape[-1]
        8
    """

    def __init__(
        self,
        teachers: Sequence[keras.Model],
        *,
        from_logits: bool | Sequence[bool] = False,
        **kwargs: Any,
    ) -> None:
        # The teachers get the inputs unchanged, under every global policy.
        kwargs.setdefault("autocast", False)
        kwargs.setdefault("dtype", "float32")
        super().__init__(**kwargs)
        self.teachers = list(teachers)
        self.from_logits = list(one_flag_each(from_logits, len(teachers)))

    def call(self, inputs: Any) -> Tensor:
        """Return the teachers' probabilities side by side."""
        parts = [
            model_probs(model(inputs, training=False), from_logits=flag)
            for model, flag in zip(self.teachers, self.from_logits, strict=True)
        ]
        return ops.concatenate(parts, axis=-1)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same layer again."""
        settings = {"teachers": self.teachers, "from_logits": self.from_logits}
        return keras.saving.serialize_keras_object(
            {**super().get_config(), **settings}
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TeachersSideBySide":
        """Build the layer from what `get_config` returned."""
        return cls(**keras.saving.deserialize_keras_object(config))
