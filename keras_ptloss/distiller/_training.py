"""Keras's training where labels may be missing, and metrics are of two kinds.

Nothing here asks a teacher.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import keras

from keras_ptloss._backend import (
    check_distribution,
    outside_of_step,
    weights_given_back,
)
from keras_ptloss.distiller._teachers import OutOfSight, compared

# Where `help` and notebooks show the arguments of what is wrapped.
_takes_what = functools.partial(functools.wraps, assigned=(), updated=())


class Targets(NamedTuple):
    """What a step compares the student with, in the place of `y`."""

    labels: Any
    teacher: Any


class Training(keras.Model):
    """Metrics of labels, where there are any, and of teacher and student.

    `self._hidden` is an `OutOfSight`, which its heir makes.
    """

    _hidden: OutOfSight

    def stateless_call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the student as its own `stateless_call` would."""
        self._hidden.stateless = True
        try:
            return super().stateless_call(*args, **kwargs)
        finally:
            self._hidden.stateless = False

    @property
    def metrics(self) -> list[Any]:
        """The compiled metrics, those of teacher and student the last."""
        own = self._hidden.compiled_metrics
        return super().metrics + ([] if own is None else [own])

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> dict[str, Any]:
        """Update the metrics: those of labels where there are any.

        Args:
            x: the batch.
            y: as in `compute_loss`.
            y_pred: the student's outputs.
            sample_weight: as in Keras.

        Returns:
            The metrics' values by name.
        """
        if not isinstance(y, Targets):
            y = Targets(y, None)
        self._update_teacher_metrics(y, y_pred, sample_weight)
        if y.labels is None:
            return self.get_metrics_result()
        for metric in self.metrics:
            # Named metrics as "accuracy" wait for labels to say which they
            # are; these may come in a later call than the first.
            if not getattr(metric, "built", True):
                outside_of_step(
                    functools.partial(metric.build, y.labels, y_pred)
                )
        return super().compute_metrics(x, y.labels, y_pred, sample_weight)

    def _update_teacher_metrics(
        self, y: Targets, y_pred: Any, sample_weight: Any
    ) -> None:
        metrics = self._hidden.compiled_metrics
        if metrics is not None and y.teacher is not None:
            teacher = compared(self.loss, y.teacher)
            metrics.update_state(teacher, y_pred, sample_weight)

    def get_metrics_result(self) -> dict[str, Any]:
        """Return the metrics' values; those of labels once labels were seen."""
        results = {}
        for metric in self.metrics:
            if getattr(metric, "built", True):
                result = metric.result()
                if not isinstance(result, dict):
                    result = {metric.name: result}
                results.update(result)
        return results

    @_takes_what(keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Train the student; arguments as in `keras.Model.fit`.

        Raises:
            ValueError: if there is `class_weight` or `sample_weight`, and no
                labels; if a `keras.distribution` is set, on another backend
                than JAX.
        """
        _check_call(super().fit, *args, **kwargs)
        with weights_given_back(self):
            return super().fit(*args, **kwargs)

    @_takes_what(keras.Model.train_on_batch)
    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Train on one batch; arguments as in `keras.Model.train_on_batch`.

        Raises:
            ValueError: as `fit`.
        """
        _check_call(super().train_on_batch, *args, **kwargs)
        return super().train_on_batch(*args, **kwargs)

    @_takes_what(keras.Model.evaluate)
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Judge the student; arguments as in `keras.Model.evaluate`.

        Raises:
            ValueError: if there is `sample_weight`, and no labels; if a
                `keras.distribution` is set, on another backend than JAX.
        """
        _check_call(super().evaluate, *args, **kwargs)
        with weights_given_back(self):
            return super().evaluate(*args, **kwargs)

    @_takes_what(keras.Model.test_on_batch)
    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Judge one batch; arguments as in `keras.Model.test_on_batch`.

        Raises:
            ValueError: as `evaluate`.
        """
        _check_call(super().test_on_batch, *args, **kwargs)
        return super().test_on_batch(*args, **kwargs)

    @_takes_what(keras.Model.predict)
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the student's outputs, as `keras.Model.predict`."""
        with weights_given_back(self):
            return super().predict(*args, **kwargs)


def _check_call(method: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Require labels where one of Keras's methods is given weights.

    By the names that the method has, for arguments may come by position.
    """
    check_distribution()
    given = inspect.signature(method).bind_partial(*args, **kwargs).arguments
    if given.get("y") is not None:
        return
    class_weight = given.get("class_weight")
    if class_weight is not None and not _has_labels(given.get("x")):
        raise ValueError(
            "`class_weight` must come with labels, whose classes it weighs. "
            f"Received: class_weight={class_weight}, y=None"
        )
    if given.get("sample_weight") is not None:
        raise ValueError(
            "`sample_weight` must come with `y`; Keras drops it otherwise. "
            "Labels that are not known may be any, zeros for example, where "
            "no metric and no `hard_label_weight` looks at them. Received: "
            "y=None"
        )


def _has_labels(x: Any) -> bool:
    """Return whether a data set has labels, as far as it tells."""
    batch = getattr(x, "element_spec", None)  # of a tf.data.Dataset
    if isinstance(x, keras.utils.PyDataset):
        batch = x[0]
    return isinstance(batch, (tuple, list)) and len(batch) > 1
