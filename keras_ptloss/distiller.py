"""Train a student from live, frozen teachers."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ptloss._backend import replicas
from keras_ptloss._checks import (
    check_classes,
    check_number,
    check_output_form,
    fail,
)
from keras_ptloss.metrics._teacher import TEACHER_METRICS, TeacherAgreement

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_ptloss")
class Distiller(keras.Model):
    """Train a student on the outputs of one or more frozen teachers.

    Each training and test step runs the teacher on the batch, in inference
    mode and outside the gradient, and hands its outputs to the loss as
    `y_true`. Nothing else differs from training the student itself: sample
    weights, masks, regularisers, `add_loss`, callbacks, mixed precision,
    `tf.data` and distribution strategies are Keras's own.

    `fit` takes unlabelled `x`, or `(x, y)`. Labels feed the compiled metrics
    alone, unless `hard_label_weight` is set. `teacher_metrics` compare the
    student with the teacher; they need no labels.

    The teacher is neither a layer nor a weight of the distiller: it is not in
    what is saved, nor in the optimizer, and never changes. Give it again after
    loading:

        distiller = keras.saving.load_model("distiller.keras")
        distiller.teacher = teacher

    For a teacher behind an API, or one too slow to run at every step, store
    its outputs and fit the student on them; a distiller is not needed then.

    Args:
        student: the model to train; `distiller.student` afterwards.
        teacher: a Keras model that gives probabilities or logits (say which to
            the loss), or a list of them, whose weighted mean is the target.
        teacher_weights: one non-negative number a teacher; they are normalised.
            None weighs all alike.
        student_inputs: where `x` is a dict and student and teacher take
            different inputs, the key of the student's.
        teacher_inputs: the key of the teacher's.
        hard_label_loss: a Keras loss of labels and student outputs, such as
            `keras.losses.SparseCategoricalCrossentropy(from_logits=True)`.
        hard_label_weight: its weight, from 0 (labels are not used) to 1 (the
            teacher is not used); the distillation loss has the rest.
        teacher_metrics: Keras metrics of teacher and student outputs, such as
            `KLToTeacher`; None is `[TeacherAgreement()]`. There are none
            where `hard_label_weight` is 1.
        name: name of the model.
        **kwargs: passed on to `keras.Model`.

    Raises:
        ValueError: if an argument is not of this form.

    Example:
        >>> import keras, numpy as np
        >>> teacher = keras.Sequential([keras.layers.Dense(3, "softmax")])
        >>> student = keras.Sequential([keras.layers.Dense(3)])
        >>> distiller = Distiller(student, teacher)
        >>> loss = PTLoss(0.5, from_logits=True, teacher_from_logits=False)
        >>> distiller.compile("adam", loss=loss)
        >>> x = np.random.default_rng(0).normal(size=(32, 4))
        >>> history = distiller.fit(x, verbose=0)
        >>> sorted(history.history)
        ['loss', 'teacher_agreement']

    Reference:
        Hinton et al. 2015, Distilling the Knowledge in a Neural Network;
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), Figure 1.
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: Any = None,
        *,
        teacher_weights: Sequence[float] | None = None,
        student_inputs: str | None = None,
        teacher_inputs: str | None = None,
        hard_label_loss: Any = None,
        hard_label_weight: float = 0.0,
        teacher_metrics: Sequence[keras.metrics.Metric] | None = None,
        name: str = "distiller",
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, **kwargs)
        if not isinstance(student, keras.Model):
            fail("student", "a Keras model", student)
        self.student = student
        self.teacher_weights = _check_weights(teacher_weights)
        self.student_inputs = student_inputs
        self.teacher_inputs = teacher_inputs
        self.hard_label_loss = _check_hard_label_loss(hard_label_loss)
        self.hard_label_weight = check_number(
            "hard_label_weight", hard_label_weight, at_least=0.0
        )
        if self.hard_label_weight > 1.0:
            fail("hard_label_weight", "at most 1", hard_label_weight)
        if self.hard_label_weight and hard_label_loss is None:
            raise ValueError(
                "`hard_label_loss` must be a Keras loss when "
                "`hard_label_weight` is above 0. Received: "
                f"hard_label_loss=None, hard_label_weight={hard_label_weight}"
            )
        if teacher_metrics is None:
            teacher_metrics = [TeacherAgreement()]
        teacher_metrics = _check_teacher_metrics(teacher_metrics)
        if self.hard_label_weight == 1.0:
            teacher_metrics = []  # no teacher is asked
        self.teacher_metrics = teacher_metrics
        self._frozen = _Frozen(())
        if teacher is not None:
            self.teacher = teacher

    @property
    def teacher(self) -> Any:
        """The teacher, the list of teachers, or None after loading."""
        models = self._frozen.models
        return list(models) if len(models) > 1 else next(iter(models), None)

    @teacher.setter
    def teacher(self, teacher: Any) -> None:
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
            if model is self.student:
                raise ValueError(
                    "`teacher` must be another model than the student "
                    f"(keras.models.clone_model copies one). Received: teacher="
                    f"{model.name!r}, student={self.student.name!r}"
                )
            _check_outputs(model, self.student)
            _check_shares_nothing(model, self.student)
        weights = self.teacher_weights
        if weights is not None and len(weights) != len(models):
            raise ValueError(
                "`teacher_weights` must have one number a teacher. Received: "
                f"teacher_weights={weights} with {len(models)} teachers"
            )
        self._frozen = _Frozen(models)
        # Read by `jit_compile="auto"`, which does not see the teacher.
        self.supports_jit = all(
            layer.supports_jit
            for model in models
            for layer in model._flatten_layers()
        )
        # Compiled steps hold the old teacher.
        self.train_function = self.test_function = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; past Keras, which tracks models, for a teacher."""
        if name == "teacher":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """Hide the teacher: Keras saves every model that `dir` shows."""
        return [name for name in super().__dir__() if name != "teacher"]

    @property
    def non_trainable_variables(self) -> list[Any]:
        """The student's, then the teachers' weights.

        On JAX, whatever a compiled step reads must be among the variables
        that are handed to it; other arrays are compiled in as constants.
        """
        variables = list(super().non_trainable_variables)
        for model in self._frozen.models:
            variables.extend(model.variables)
        return variables

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return the student's outputs."""
        return self.student(
            _select(inputs, self.student_inputs, "student_inputs"),
            training=training,
        )

    def build(self, input_shape: Any) -> None:
        """Build the student."""
        if not self.student.built:
            self.student.build(
                _select(input_shape, self.student_inputs, "student_inputs")
            )
        for model in self._frozen.models:
            _check_shares_nothing(model, self.student)
        self.built = True

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Compare the student's outputs with the teacher's on the same batch.

        Called by Keras's `train_step` and `test_step`.
        """
        weight = self.hard_label_weight
        if weight and y is None:
            raise ValueError(
                "`y` must hold labels when `hard_label_weight` is above 0. "
                f"Received: y=None, hard_label_weight={weight}"
            )
        hard = own = 0.0
        if weight:
            hard = self.hard_label_loss(y, y_pred, sample_weight=sample_weight)
            hard = weight * hard
            own = sum(ops.sum(loss) for loss in self.losses) / replicas()
        if weight == 1.0:
            return hard + own

        target = self._target(x)
        check_classes(
            "teacher", target, "student", _one_tensor("student", y_pred)
        )
        for metric in self.teacher_metrics:
            metric.update_state(target, y_pred, sample_weight)
        total = super().compute_loss(
            x=x,
            y=target,
            y_pred=y_pred,
            sample_weight=sample_weight,
            training=training,
        )
        if not weight:
            return total
        # `total` holds the student's own losses too; these count in full.
        return hard + (1.0 - weight) * (total - own) + own

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> dict[str, Any]:
        """Update the compiled metrics with labels, where there are any."""
        if y is not None:
            return super().compute_metrics(x, y, y_pred, sample_weight)
        return self._label_free_results()

    def get_metrics_result(self) -> dict[str, Any]:
        """Return the metrics' values; those of labels once labels were seen."""
        if any(
            metric.name == "compile_metrics" and not metric.built
            for metric in self.metrics
        ):
            return self._label_free_results()
        return super().get_metrics_result()

    def _label_free_results(self) -> dict[str, Any]:
        return {
            m.name: m.result()
            for m in self.metrics
            if m.name != "compile_metrics"
        }

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Train the student; arguments as in `keras.Model.fit`.

        Raises:
            ValueError: if the loss was told that a model that ends in a softmax
                gives logits, or `metrics` of `compile` has one of teacher and
                student.

        Warns:
            UserWarning: if the loss was told that a model that ends in a linear
                dense layer gives probabilities.
        """
        self._check_compiled()
        with self._weights_given_back():
            return super().fit(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Judge the student; arguments as in `keras.Model.evaluate`.

        Raises and warns as `fit`.
        """
        self._check_compiled()
        with self._weights_given_back():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the student's outputs, as `keras.Model.predict`."""
        with self._weights_given_back():
            return super().predict(*args, **kwargs)

    def _check_compiled(self) -> None:
        """Compare what `compile` was told with what the models give."""
        compiled = getattr(self, "_compile_metrics", None)
        metrics = getattr(compiled, "_user_metrics", None)
        for metric in keras.tree.flatten(metrics):
            if isinstance(metric, TEACHER_METRICS):
                fail(
                    "metrics",
                    "metrics of labels; those of teacher and student go to "
                    "Distiller(teacher_metrics=[...])",
                    [metric.name],
                )
        loss: Any = getattr(self, "loss", None)
        if not hasattr(loss, "teacher_from_logits"):
            return  # neither PTLoss nor its like
        for model in self._frozen.models:
            check_output_form(
                "teacher",
                model,
                loss.teacher_from_logits,
                "teacher_from_logits",
                stacklevel=4,
            )
        check_output_form(
            "student",
            self.student,
            loss.from_logits,
            "from_logits",
            stacklevel=4,
        )

    @contextlib.contextmanager
    def _weights_given_back(self) -> Iterator[None]:
        """On JAX a run holds the weights: an interrupted one gives them back.

        The teacher's too, which would be useless without them.
        """
        try:
            yield
        finally:
            sync = getattr(self, "jax_state_sync", None)
            if sync is not None:
                sync()

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the distiller, less the teacher."""
        return {
            **super().get_config(),
            "student": keras.saving.serialize_keras_object(self.student),
            "teacher_weights": self.teacher_weights,
            "student_inputs": self.student_inputs,
            "teacher_inputs": self.teacher_inputs,
            "hard_label_loss": (
                None
                if self.hard_label_loss is None
                else keras.saving.serialize_keras_object(self.hard_label_loss)
            ),
            "hard_label_weight": self.hard_label_weight,
            "teacher_metrics": [
                keras.saving.serialize_keras_object(metric)
                for metric in self.teacher_metrics
            ],
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> "Distiller":
        """Build a distiller without a teacher: set `distiller.teacher`."""
        config = dict(config)
        for key in ("student", "hard_label_loss", "teacher_metrics"):
            config[key] = keras.saving.deserialize_keras_object(
                config[key], custom_objects=custom_objects
            )
        return cls(**config)

    def _target(self, x: Any) -> Any:
        """Return the mean of the teachers' outputs, without a gradient."""
        models = self._frozen.models
        if not models:
            raise ValueError(
                "`teacher` must be set before fit or evaluate; a loaded "
                "distiller has none: `distiller.teacher = model`. Received: "
                "teacher=None"
            )
        inputs = _select(x, self.teacher_inputs, "teacher_inputs")
        weights = self.teacher_weights or [1.0] * len(models)
        target = 0.0
        for weight, model in zip(weights, models, strict=True):
            output = model(inputs, training=False)
            output = ops.cast(_one_tensor("teacher", output), "float32")
            target = target + weight / sum(weights) * output
        return ops.stop_gradient(target)


class _Frozen:
    """Models out of Keras's sight, which would track and save them."""

    def __init__(self, models: Sequence[keras.Model]) -> None:
        self.models = tuple(models)


def _select(inputs: Any, key: str | None, argument: str) -> Any:
    if key is None:
        return inputs
    if not isinstance(inputs, dict) or key not in inputs:
        keys = sorted(inputs) if isinstance(inputs, dict) else type(inputs)
        fail(argument, f"a key of x, which has {keys}", key)
    return inputs[key]


def _check_hard_label_loss(loss: Any) -> Any:
    if loss is not None and not isinstance(loss, keras.losses.Loss):
        fail("hard_label_loss", "a keras.losses.Loss, or None", loss)
    return loss


def _check_teacher_metrics(metrics: Any) -> list[keras.metrics.Metric]:
    several = isinstance(metrics, (list, tuple))
    if not several or not all(
        isinstance(metric, keras.metrics.Metric) for metric in metrics
    ):
        fail("teacher_metrics", "a list of Keras metrics, or None", metrics)
    return list(metrics)


def _one_tensor(argument: str, outputs: Any) -> Any:
    if isinstance(outputs, (list, tuple, dict)):
        raise ValueError(
            f"`{argument}` must give one tensor, (..., classes); choose one by "
            "keras.Model(model.inputs, model.outputs[0]). Received: outputs in "
            f"a {type(outputs).__name__} of {len(outputs)}"
        )
    return outputs


def _check_shares_nothing(teacher: keras.Model, student: keras.Model) -> None:
    """Training the student must not move the teacher."""
    own = {id(variable) for variable in teacher.variables}
    for variable in student.trainable_variables:
        if id(variable) in own:
            raise ValueError(
                "`teacher` must share no trainable weight with the student, "
                "which would move it: keras.models.clone_model copies a model, "
                "and trainable=False freezes shared layers. Received: teacher="
                f"{teacher.name!r}, which shares {variable.path!r}"
            )


def _check_weights(weights: Any) -> list[float] | None:
    if weights is None:
        return None
    array = np.asarray(weights, dtype="float64")
    if array.ndim != 1 or not np.all(array >= 0) or not array.sum() > 0:
        fail("teacher_weights", "non-negative numbers, not all 0", weights)
    return [float(weight) for weight in array]


def _check_outputs(teacher: keras.Model, student: keras.Model) -> None:
    """Compare class counts at once where both models know theirs."""
    counts = []
    for name, model in (("teacher", teacher), ("student", student)):
        try:
            shape = model.output_shape
        except (AttributeError, ValueError):
            return  # not built yet: seen on the first batch
        if not isinstance(shape, tuple) or isinstance(shape[-1], tuple):
            _one_tensor(name, shape)
        counts.append(shape[-1])
    if counts[0] != counts[1]:
        raise ValueError(
            "`teacher` and `student` must have the same number of classes. "
            f"Received: teacher {teacher.name!r} with {counts[0]} outputs, "
            f"student {student.name!r} with {counts[1]}"
        )
