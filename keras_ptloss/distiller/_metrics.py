"""Metrics of teacher and student, as Keras's training knows them."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_ptloss._checks import fail
from keras_ptloss.distiller._teachers import columns, compared_logits
from keras_ptloss.metrics._teacher import TEACHER_METRICS, TeacherAgreement


def check_teacher_metrics(metrics: Any) -> list[keras.metrics.Metric] | None:
    """Require Keras metrics, or None."""
    if metrics is None:
        return None
    several = isinstance(metrics, (list, tuple))
    if not several or not all(
        isinstance(metric, keras.metrics.Metric) for metric in metrics
    ):
        fail("teacher_metrics", "a list of Keras metrics, or None", metrics)
    return list(metrics)


def check_label_metrics(*metrics: Any) -> None:
    """Refuse metrics of a teacher where those of labels belong."""
    for metric in keras.tree.flatten(metrics):
        if isinstance(metric, TEACHER_METRICS):
            fail(
                "metrics",
                "metrics of labels; those of teacher and student go to "
                "Distiller(teacher_metrics=[...])",
                [metric.name],
            )


def metrics_for(
    loss: Any,
    student: keras.Model,
    given: Sequence[keras.metrics.Metric] | None,
) -> list[keras.metrics.Metric]:
    """Return the metrics of teacher and student beside a loss.

    They see the same rows as the loss, and values cannot be looked at under
    `fit`: what they were told is compared with what the loss was.

    Args:
        loss: of any kind; those of Keras were told nothing of a teacher.
        student: tells whether one column has to be told from two.
        given: of any kind; only those of a teacher were told. None is the
            default.

    Raises:
        ValueError: if one takes for logits what is probabilities by the loss,
            or the other way round.
    """
    teacher_from_logits = compared_logits(loss)
    if given is None:
        return [
            TeacherAgreement(
                from_logits=getattr(loss, "from_logits", False),
                # Keras's losses, which have no word for it, take probabilities.
                teacher_from_logits=teacher_from_logits or False,
            )
        ]
    if teacher_from_logits is not None:
        said = {
            "from_logits": loss.from_logits,
            "teacher_from_logits": teacher_from_logits,
        }
        for metric in given:
            _compare_flags(metric, said, columns("student", student))
    return list(given)


def _compare_flags(
    metric: keras.metrics.Metric, said: dict[str, bool], student_columns: Any
) -> None:
    if not isinstance(metric, TEACHER_METRICS):
        return
    if metric.any_form and student_columns != 1:
        return
    for flag, value in said.items():
        if getattr(metric, flag) != value:
            raise ValueError(
                f"`teacher_metrics` must have {flag}={value} where the loss "
                f"compares such rows. Received: {metric.name} with "
                f"{flag}={getattr(metric, flag)}"
            )


def compiled(metrics: Sequence[keras.metrics.Metric]) -> Any:
    """Return the metric of metrics that `compile` would make of these.

    `mode="auto"` of Keras's callbacks looks for the direction of a metric in
    such metrics alone, and has no public name for them. None of none.
    """
    if not metrics:
        return None
    model = keras.Model()
    model.compile(None, weighted_metrics=list(metrics), jit_compile=False)
    (container,) = (m for m in model.metrics if m.name == "compile_metrics")
    # Nothing of these arrays but their number is looked at: all are metrics
    # already, no names of metrics.
    container.build(np.zeros((1, 2)), np.zeros((1, 2)))
    return container
