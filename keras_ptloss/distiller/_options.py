"""What the arguments of a distiller, and its loss, must be."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_ptloss._checks import (
    as_floats,
    check_number,
    check_output_form,
    fail,
)
from keras_ptloss.distiller._teachers import (
    check_class_count,
    check_class_counts,
    teacher_classes,
)


def check_weights(
    weights: Any, *, teachers: int | None = None
) -> list[float] | None:
    """Require one non-negative number a teacher, or None.

    Args:
        weights: of the teachers.
        teachers: how many there are; None where that is not known yet.
    """
    if weights is None:
        return None
    expected = "finite non-negative numbers, not all 0"
    array = as_floats("teacher_weights", weights, expected)
    with np.errstate(over="ignore"):
        total = array.sum()
    good = array.ndim == 1 and np.all(array >= 0) and 0 < total < np.inf
    if not good:
        fail("teacher_weights", expected, weights)
    if teachers is not None and len(array) != teachers:
        raise ValueError(
            "`teacher_weights` must have one number a teacher. Received: "
            f"teacher_weights={weights} with {teachers} teachers"
        )
    return [float(weight) for weight in array]


def check_hard_labels(loss: Any, weight: Any) -> float:
    """Require a Keras loss where its weight is above 0; return the weight."""
    if loss is not None and not isinstance(loss, keras.losses.Loss):
        fail("hard_label_loss", "a keras.losses.Loss, or None", loss)
    if weight is None:
        if loss is None:
            return 0.0
        fail(
            "hard_label_weight",
            "a number from 0 to 1 where there is a `hard_label_loss`",
            weight,
        )
    number = check_number("hard_label_weight", weight, at_least=0.0)
    if number > 1.0:
        fail("hard_label_weight", "at most 1", weight)
    if number and loss is None:
        raise ValueError(
            "`hard_label_loss` must be a Keras loss when `hard_label_weight` "
            "is above 0. Received: hard_label_loss=None, "
            f"hard_label_weight={weight}"
        )
    return number


def check_key(argument: str, value: Any) -> str | None:
    """Require the key of one model's inputs, or None."""
    if value is not None and not isinstance(value, str):
        fail(argument, "a key of x, a text, or None", value)
    return value


def check_has_targets(distiller: Any, labels: Any) -> None:
    """Require what the loss of a step is of: labels, a teacher, or both."""
    weight = distiller.hard_label_weight
    if weight and labels is None:
        raise ValueError(
            "`y` must hold labels when `hard_label_weight` is above 0. "
            f"Received: y=None, hard_label_weight={weight}"
        )
    if weight < 1.0 and distiller.teacher is None:
        raise ValueError(
            "`teacher` must be set before fit or evaluate; a loaded "
            "distiller has none: `distiller.teacher = model`. Received: "
            "teacher=None"
        )


def check_is_trained(distiller: Any) -> None:
    """Require a loss, or losses of the student's own, where it is trained."""
    weight = distiller.hard_label_weight
    if distiller.loss is None and weight < 1.0 and not distiller.losses:
        raise ValueError(
            "`loss` must be given to `compile` before fit: the student, "
            "without losses of its own, learns nothing from the teacher "
            f"otherwise. Received: loss=None, hard_label_weight={weight}"
        )


def one_loss(argument: str, value: Any) -> Any:
    """Return what a list, a tuple or a dict of one holds, as Keras takes one.

    Args:
        argument: name of the argument.
        value: a loss, or the weight of one.
    """
    if not isinstance(value, (list, tuple, dict)):
        return value
    leaves = keras.tree.flatten(value)
    if len(leaves) != 1:
        fail(argument, "one, for the student has one output", value)
    return leaves[0]


def check_forms(
    loss: Any,
    teachers: Sequence[keras.Model],
    student: keras.Model,
    *,
    weights: Any = None,
    stacklevel: int,
) -> None:
    """Compare what a loss was told with what the models give.

    Args:
        loss: of any kind; those of Keras were told nothing of a teacher.
        teachers: the models that it takes for the teacher.
        student: the model that it takes for the student.
        weights: of the teachers, or None.
        stacklevel: of the warning; 3 is the caller's caller.
    """
    _check_counts(loss, teachers, student, weights)
    if not hasattr(loss, "teacher_from_logits"):
        return
    flags = loss.teacher_from_logits
    if not isinstance(flags, tuple) or len(flags) == 1:
        flags = np.ravel(flags).tolist() * len(teachers)
    ends = [
        ("teacher", model, flag, "teacher_from_logits")
        for model, flag in zip(teachers, flags, strict=bool(teachers))
    ]
    student_end = ("student", student, loss.from_logits, "from_logits")
    for name, model, flag, argument in [*ends, student_end]:
        check_output_form(
            name, model, flag, argument, stacklevel=stacklevel + 1
        )


def _check_counts(
    loss: Any,
    teachers: Sequence[keras.Model],
    student: keras.Model,
    weights: Any,
) -> None:
    """Compare class counts: the student's, or those that the loss is for."""
    counts = teacher_classes(loss)
    if counts is None:
        for model in teachers:
            check_class_counts(model, student)
        return
    if len(counts) > 1 and weights is not None:
        raise ValueError(
            "`teacher_weights` must be None with a loss of several teachers, "
            f"which has a matrix for them. Received: teacher_weights={weights}"
        )
    if len(counts) > 1 and teachers and len(teachers) != len(counts):
        raise ValueError(
            f"`teacher` must be the {len(counts)} teachers that the loss is "
            f"for, in their order. Received: {len(teachers)} teachers"
        )
    if len(counts) == 1:
        counts = counts * len(teachers)
    for model, count in zip(teachers, counts, strict=bool(teachers)):
        check_class_count(model, count)
