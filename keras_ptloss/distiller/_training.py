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

    def fit(
        self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train the student; arguments as in `keras.Model.fit`.

        Raises:
            ValueError: if there is `class_weight` or `sample_weight`, and no
                labels; if a `keras.distribution` is set, on another backend
                than JAX.
        """
        _check_call(super().fit, x, y, *args, **kwargs)
        with weights_given_back(self):
            return super().fit(x, y, *args, **kwargs)

    def train_on_batch(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Train on one batch; arguments as in `keras.Model.train_on_batch`.

        Raises:
            ValueError: as `fit`.
        """
        train = super().train_on_batch
        _check_call(train, x, y, sample_weight, *args, **kwargs)
        return train(x, y, sample_weight, *args, **kwargs)

    def evaluate(
        self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Judge the student; arguments as in `keras.Model.evaluate`.

        Raises:
            ValueError: if there is `sample_weight`, and no labels; if a
                `keras.distribution` is set, on another backend than JAX.
        """
        _check_call(super().evaluate, x, y, *args, **kwargs)
        with weights_given_back(self):
            return super().evaluate(x, y, *args, **kwargs)

    def test_on_batch(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Judge one batch; arguments as in `keras.Model.test_on_batch`.

        Raises:
            ValueError: as `evaluate`.
        """
        test = super().test_on_batch
        _check_call(test, x, y, sample_weight, *args, **kwargs)
        return test(x, y, sample_weight, *args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the student's outputs, as `keras.Model.predict`."""
        with weights_given_back(self):
            return super().predict(*args, **kwargs)


def _check_call(
    method: Callable[..., Any], x: Any, y: Any, *args: Any, **kwargs: Any
) -> None:
    """Check what one of Keras's methods is about to be given.

    By the names that the method has, for weights may come by position.
    """
    check_distribution()
    bound = inspect.signature(method).bind_partial(x, y, *args, **kwargs)
    _check_class_weight(bound.arguments.get("class_weight"), x, y)
    _check_sample_weight(bound.arguments.get("sample_weight"), y)


def _check_class_weight(class_weight: Any, x: Any, y: Any) -> None:
    """Require labels where there are weights of classes."""
    if class_weight is None or y is not None:
        return
    batch = getattr(x, "element_spec", None)  # of a tf.data.Dataset
    if isinstance(x, keras.utils.PyDataset):
        batch = x[0]
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise ValueError(
            "`class_weight` must come with labels, whose classes it weighs. "
            f"Received: class_weight={class_weight}, y=None"
        )


def _check_sample_weight(sample_weight: Any, y: Any) -> None:
    """Require labels beside weights, which Keras drops without them."""
    if sample_weight is not None and y is None:
        raise ValueError(
            "`sample_weight` must come with `y`; Keras drops it otherwise. "
            "Labels that are not known may be any, zeros for example, where "
            "no metric and no `hard_label_weight` looks at them. Received: "
            "y=None"
        )
