"""Several teachers, side by side: one row of outputs, `(..., C_1 + C_2 + ...)`.

A matrix reads all of them at once. Its `z` are then the logarithms of each
teacher's probabilities, whatever it gave: so logits and probabilities may
stand in one row, and a shift of one teacher's logits changes nothing. One
teacher whose classes are not the student's is a row of one.
"""

import dataclasses
import itertools
from typing import Any

import keras
import numpy as np
import scipy.special
from keras import ops

from keras_ptloss._binary import two_events
from keras_ptloss._calibration import hold_masked, log_probabilities
from keras_ptloss._checks import (
    check_count,
    check_flag,
    check_probabilities,
    differ,
    fail,
    shapes_differ,
)

Tensor = Any


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """What stands in a row: which columns are whose, and in which form.

    Args:
        counts: the class count of each teacher, 2 of a binary head.
        from_logits: whether its outputs are logits, one flag for all or one a
            teacher.
        names: what errors call these two.

    Raises:
        ValueError: if an argument is not of this form.
    """

    counts: tuple[int, ...]
    from_logits: Any = False
    names: dataclasses.InitVar[tuple[str, str]] = (
        "teachers",
        "teacher_from_logits",
    )

    def __post_init__(self, names: tuple[str, str]) -> None:
        """Check the arguments; keep them as tuples."""
        many, form = names
        if not isinstance(self.counts, (list, tuple)) or not self.counts:
            fail(many, "the class count of each teacher", self.counts)
        counts = tuple(check_count(many, c, at_least=2) for c in self.counts)
        given = given_each(form, self.from_logits, len(counts))
        flags = tuple(check_flag(form, flag) for flag in given)
        object.__setattr__(self, "counts", counts)
        object.__setattr__(self, "from_logits", flags)

    @property
    def width(self) -> int:
        """The number of columns of all teachers."""
        return sum(self.counts)

    @property
    def columns(self) -> list[slice]:
        """Each teacher's columns."""
        ends = itertools.accumulate(self.counts)
        return [slice(e - c, e) for e, c in zip(ends, self.counts, strict=True)]

    def join(self, argument: str, outputs: Any) -> Tensor:
        """Return the teachers' rows side by side, `(..., C_1 + C_2 + ...)`.

        Args:
            argument: name of the argument that `outputs` is.
            outputs: a list of one output a teacher, `(..., C_k)`, or `(..., 1)`
                of a binary head; or their rows side by side already.

        Raises:
            ValueError: if there are more or fewer, or of other class counts.
        """
        if not isinstance(outputs, (list, tuple)):
            if differ(outputs.shape[-1], self.width):
                raise ValueError(
                    f"`{argument}` must have the classes of all teachers side "
                    f"by side, {' + '.join(map(str, self.counts))} = "
                    f"{self.width}. Received: {argument} with "
                    f"{outputs.shape[-1]} classes"
                )
            return outputs
        self.check_number(argument, len(outputs))
        parts: list[Tensor] = []
        for k, (output, flag) in enumerate(
            zip(outputs, self.from_logits, strict=True)
        ):
            part = two_events(output, from_logits=flag)
            one, first = part.shape[:-1], (parts or [part])[0].shape[:-1]
            received = f"{argument}[{k}] of shape {tuple(output.shape)}"
            if differ(part.shape[-1], self.counts[k]):
                raise ValueError(
                    f"`{argument}[{k}]` must be outputs with {self.counts[k]} "
                    f"classes. Received: {received}"
                )
            if shapes_differ(one, first):
                raise ValueError(
                    f"`{argument}[{k}]` must be of the same examples as "
                    f"{argument}[0]. Received: {received}, {argument}[0] of "
                    f"shape {tuple(outputs[0].shape)}"
                )
            parts.append(part)
        if all(isinstance(part, np.ndarray) for part in parts):
            return np.concatenate(parts, axis=-1)
        return ops.concatenate(parts, axis=-1)

    def check_number(self, argument: str, teachers: int) -> None:
        """Require as many teachers as this is of."""
        if teachers != len(self.counts):
            raise ValueError(
                f"`{argument}` must be the outputs of {len(self.counts)} "
                f"teachers, in their order. Received: {teachers} of them"
            )

    def logarithms(self, argument: str, rows: Tensor) -> Tensor:
        """Return `z`, the logarithms of each teacher's probabilities.

        Args:
            argument: name of the argument that `rows` is.
            rows: the teachers side by side: a NumPy array, or a tensor of
                float32 or better.

        Raises:
            ValueError: if a teacher's rows should be probabilities and are not,
                where their values can be seen.
        """
        numpy = isinstance(rows, np.ndarray)
        xp = np if numpy else ops
        log_softmax = scipy.special.log_softmax if numpy else ops.log_softmax
        parts = []
        for k, (column, flag) in enumerate(
            zip(self.columns, self.from_logits, strict=True)
        ):
            part = rows[..., column]
            if flag:
                parts.append(log_softmax(hold_masked(part, xp), axis=-1))
                continue
            check_probabilities(
                f"{argument}, teacher {k}",
                part,
                "say so in teacher_from_logits of the correction",
            )
            parts.append(log_probabilities(part, xp))
        return xp.concatenate(parts, axis=-1)

    def uniform(self) -> np.ndarray:
        """Return a row in which every teacher says nothing, `(C_1 + ...,)`."""
        return np.concatenate([np.full(c, 1.0 / c) for c in self.counts])


def is_several(teacher: Any) -> bool:
    """Whether it is a list of teachers, and not the rows of one, in a list.

    A teacher in a list is a model, or outputs with a class axis beside that of
    the examples; a row in a list has one axis.
    """
    if not isinstance(teacher, (list, tuple)):
        return False
    return any(
        isinstance(one, keras.Model)
        or (hasattr(one, "__array__") and len(getattr(one, "shape", ())) > 1)
        for one in teacher
    )


def given_each(argument: str, value: Any, teachers: int) -> tuple[Any, ...]:
    """Return what is given for each teacher, by a value for all or a list."""
    if not isinstance(value, (list, tuple)):
        return (value,) * teachers
    if len(value) != teachers:
        fail(argument, f"one flag, or one for each of {teachers}", value)
    return tuple(value)
