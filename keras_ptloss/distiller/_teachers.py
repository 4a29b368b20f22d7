"""The frozen teachers: what may be one, and what they answer."""

import inspect
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ptloss._binary import two_events
from keras_ptloss._checks import (
    check_classes,
    differ,
    fail,
    one_tensor,
    output_shape,
)
from keras_ptloss._several import SideBySide

Tensor = Any


class OutOfSight:
    """Holds what Keras would track, train or save if it saw it."""

    def __init__(self) -> None:
        self.teachers: tuple[keras.Model, ...] = ()
        self.given_metrics: list[keras.metrics.Metric] | None = None
        self.metrics: list[keras.metrics.Metric] = []
        self.compiled_metrics: Any = None
        # Whether `stateless_call` is under way.
        self.stateless = False


def check_teachers(teacher: Any, student: keras.Model) -> list[keras.Model]:
    """Require a model or a list of them that `student` can learn from."""
    models = teacher if isinstance(teacher, (list, tuple)) else [teacher]
    if not models:
        fail("teacher", "a Keras model or a list of them", teacher)
    for model in models:
        if not isinstance(model, keras.Model):
            raise ValueError(
                "`teacher` must be a Keras model or a list of them; for "
                "a teacher behind an API, store its outputs (SoftLabels) "
                "and fit the student on them. Received: "
                f"teacher={teacher!r}"
            )
        if model is student:
            raise ValueError(
                "`teacher` must be another model than the student "
                f"(keras.models.clone_model copies one). Received: teacher="
                f"{model.name!r}, student={student.name!r}"
            )
        check_shares_no_training(model, student)
    return list(models)


def check_shares_no_training(
    teacher: keras.Model, student: keras.Model
) -> list[Any]:
    """Refuse weights of the teacher that the student's gradient would move.

    Returns:
        The weights that both have and no gradient moves. Training may move
        them otherwise: see `check_stands_still`.
    """
    own = {id(weight) for weight in teacher.weights}
    for weight in student.trainable_weights:
        if id(weight) in own:
            raise ValueError(
                "`teacher` must share no trainable weight with the student, "
                "which would move it: keras.models.clone_model copies a model, "
                "and trainable=False freezes shared layers. Received: teacher="
                f"{teacher.name!r}, which shares {weight.path!r}"
            )
    return [w for w in student.non_trainable_weights if id(w) in own]


def check_stands_still(
    teacher: keras.Model,
    student: keras.Model,
    inputs: Tensor,
    values: Sequence[tuple[Any, Tensor]] = (),
) -> None:
    """Refuse shared weights that the student's training moves by itself.

    As batch normalisation does, which averages what it sees, or spectral
    normalisation. Which layers do, and whether `trainable=False` stops them,
    only they know: the student is run as in training, without keeping what it
    writes. Seeds that move are no weights: in inference none is drawn.

    Args:
        teacher: the teacher.
        student: the student; it is built if it has to be looked at.
        inputs: a batch of the student's, or its symbols.
        values: pairs of a variable and its value, where the models do not hold
            their values themselves (within a compiled step of JAX).
    """
    shared = check_shares_no_training(teacher, student)
    if not shared:
        return
    if not student.built:
        student(inputs, training=False)
    with keras.StatelessScope(state_mapping=list(values)) as scope:
        before = [scope.get_current_value(weight) for weight in shared]
        student(inputs, training=True)
    for weight, value in zip(shared, before, strict=True):
        if scope.get_current_value(weight) is not value:
            raise ValueError(
                "`teacher` must share no state with the student that training "
                "moves, as batch normalisation does: keras.models.clone_model "
                "copies a model, and trainable=False stops a shared "
                "BatchNormalization. Received: teacher="
                f"{teacher.name!r}, which shares {weight.path!r}"
            )


def call_alone(model: keras.Model, inputs: Any, training: Any) -> Tensor:
    """Call a built model as Keras's own steps on JAX do, by `call` itself.

    Nothing casts the inputs of a subclassed model then, nor tells its layers
    whether it is trained; that is left to the model, as it is alone.
    """
    if "training" in inspect.signature(model.call).parameters:
        return model.call(inputs, training=training)
    return model.call(inputs)


def teacher_classes(loss: Any) -> tuple[int, ...] | None:
    """Return the class counts that a loss takes side by side, or None."""
    return getattr(loss, "teacher_classes", None)


def joint_output(
    outputs: Sequence[Tensor], weights: Sequence[float] | None, loss: Any
) -> Tensor:
    """Return what the loss takes as `y_true`: the mean, or all side by side.

    One column, `p` or `z` of a binary head, and two, `[1 - p, p]` or `[0, z]`,
    are affine in each other: the mean is the same in either form.
    """
    counts = teacher_classes(loss)
    from_logits = getattr(loss, "teacher_from_logits", None)
    outputs = [ops.cast(one_tensor("teacher", o), "float32") for o in outputs]
    if counts is not None and len(counts) > 1:
        joined = SideBySide(counts, from_logits).join("teacher", outputs)
        return ops.stop_gradient(joined)
    if isinstance(from_logits, tuple):
        (from_logits,) = from_logits
    columns = {output.shape[-1] for output in outputs}
    if columns == {1, 2} and from_logits is not None:
        outputs = [two_events(o, from_logits=from_logits) for o in outputs]
    weights = weights or [1.0] * len(outputs)
    mean = 0.0
    for output, weight in zip(outputs, weights, strict=True):
        check_classes("teacher", output, "teacher", outputs[0])
        mean = mean + weight / sum(weights) * output
    return ops.stop_gradient(mean)


def compared(loss: Any, target: Tensor) -> Tensor:
    """Return the teacher in the student's classes, for metrics of both."""
    return target if teacher_classes(loss) is None else loss.teacher(target)


def compared_logits(loss: Any) -> bool | None:
    """Return whether `compared` gives logits, or None if a loss was not told.

    Args:
        loss: of any kind; those of Keras were told nothing of a teacher.
    """
    if teacher_classes(loss) is not None:
        return False  # as the loss corrects it
    return getattr(loss, "teacher_from_logits", None)


def check_rows(target: Tensor, y_pred: Tensor, loss: Any) -> None:
    """Require outputs of teacher and student that can be compared.

    Args:
        target: the teachers'.
        y_pred: the student's.
        loss: may take one column for two, or other classes than the student's.
    """
    y_pred = one_tensor("student", y_pred)
    if teacher_classes(loss) is not None:
        return  # the loss looks itself
    binary = hasattr(loss, "teacher_from_logits")
    if binary and {target.shape[-1], y_pred.shape[-1]} == {1, 2}:
        target, y_pred = target[..., :1], y_pred[..., :1]
    check_classes("teacher", target, "student", y_pred)


def select(inputs: Any, key: str | None, argument: str) -> Any:
    """Return `inputs`, or what they have under `key`."""
    if key is None:
        return inputs
    if not isinstance(inputs, dict):
        fail(argument, "None where x is no dict", key)
    if key not in inputs:
        fail(argument, f"a key of x, which has {sorted(inputs)}", key)
    return inputs[key]


def check_class_count(teacher: keras.Model, classes: int) -> None:
    """Compare a teacher's class count with the one that a loss is for."""
    count = columns("teacher", teacher)
    if differ(count, classes) and (count, classes) != (1, 2):
        raise ValueError(
            f"`teacher` must have the {classes} classes that the loss is for. "
            f"Received: teacher {teacher.name!r} with {count} outputs"
        )


def check_class_counts(teacher: keras.Model, student: keras.Model) -> None:
    """Compare class counts at once where both models know theirs."""
    counts = [columns("teacher", teacher), columns("student", student)]
    # One column and two can be the same two events; the loss decides.
    if set(counts) != {1, 2} and differ(*counts):
        raise ValueError(
            "`teacher` and `student` must have the same number of classes. "
            f"Received: teacher {teacher.name!r} with {counts[0]} outputs, "
            f"student {student.name!r} with {counts[1]}"
        )


def columns(name: str, model: keras.Model) -> int | None:
    """Return a model's class count, or None until it is built."""
    shape = output_shape(name, model)
    return shape[-1] if shape else None  # else seen on the first batch
