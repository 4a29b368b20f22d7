"""Keras's training where labels may be missing, and metrics are of two kinds.

Nothing here asks a teacher.
"""

import functools
from typing import Any, NamedTuple

import keras

from keras_ptloss._backend import outside_of_step, weights_given_back
from keras_ptloss.distiller._teachers import OutOfSight


class Targets(NamedTuple):
    """What a step compares the student with, in the place of `y`."""

    labels: Any
    teacher: Any
    # The teacher in the student's classes, for metrics; None as `teacher`.
    compared: Any = None


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
            teacher = y.teacher if y.compared is None else y.compared
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
            ValueError: if there is `class_weight`, and no labels.
        """
        _check_class_weight(kwargs.get("class_weight"), x, y)
        with weights_given_back(self):
            return super().fit(x, y, *args, **kwargs)

    def train_on_batch(
        self, x: Any, y: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train on one batch; arguments as in `keras.Model.train_on_batch`.

        Raises:
            ValueError: if there is `class_weight`, and no labels.
        """
        _check_class_weight(kwargs.get("class_weight"), x, y)
        return super().train_on_batch(x, y, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Judge the student; arguments as in `keras.Model.evaluate`."""
        with weights_given_back(self):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the student's outputs, as `keras.Model.predict`."""
        with weights_given_back(self):
            return super().predict(*args, **kwargs)


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
