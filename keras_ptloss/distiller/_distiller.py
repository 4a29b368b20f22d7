"""Keras's own training, with the outputs of frozen teachers as targets."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_ptloss._backend import no_gradient, replicas
from keras_ptloss._checks import fail
from keras_ptloss._keras import supports_jit
from keras_ptloss.distiller._metrics import (
    check_label_metrics,
    check_teacher_metrics,
    compiled,
    metrics_for,
)
from keras_ptloss.distiller._options import (
    check_forms,
    check_hard_labels,
    check_has_targets,
    check_is_trained,
    check_key,
    check_weights,
    one_loss,
)
from keras_ptloss.distiller._teachers import (
    OutOfSight,
    call_alone,
    check_rows,
    check_stands_still,
    check_teachers,
    joint_output,
    select,
)
from keras_ptloss.distiller._training import Targets, Training

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_ptloss")
class Distiller(Training):
    """Train a student on the outputs of one or more frozen teachers.

    Each training and test step runs the teacher on the batch, in inference
    mode and before anything is recorded for the gradient, and hands its
    outputs to the loss as `y_true`. Nothing else differs from training the
    student itself: dtype policies, sample weights, masks, regularisers,
    `add_loss`, callbacks, mixed precision, `tf.data` and distribution
    strategies are Keras's own.

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
            the loss), or a list of them. Their weighted mean is the target; or,
            with the loss of a search among several, all of them side by side.
        teacher_weights: of the mean, one non-negative number a teacher; they
            are normalised. None weighs all alike.
        student_inputs: where `x` is a dict and student and teacher take
            different inputs, the key of the student's.
        teacher_inputs: the key of the teacher's.
        hard_label_loss: a Keras loss of labels and student outputs, such as
            `keras.losses.SparseCategoricalCrossentropy(from_logits=True)`.
        hard_label_weight: its weight, from 0 (labels are not used) to 1 (the
            teacher is not used); the distillation loss has the rest. To be
            said where there is a `hard_label_loss`; None is 0.
        teacher_metrics: Keras metrics of teacher and student outputs, such as
            `KLToTeacher`; None is `[TeacherAgreement()]`. Where the loss takes
            other classes than the student's, the teacher is the corrected one.
            There are none where `hard_label_weight` is 1.
        **kwargs: passed on to `keras.Model`; the dtype policy is the
            student's.

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
        hard_label_weight: float | None = None,
        teacher_metrics: Sequence[keras.metrics.Metric] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(student, keras.Model):
            fail("student", "a Keras model", student)
        # The student's policy scales losses as for the student alone, and
        # inputs reach both models as they are, for them to cast.
        arguments = {
            "name": "distiller",
            "dtype": student.dtype_policy,
            "autocast": False,
        }
        super().__init__(**{**arguments, **kwargs})
        self._hidden = OutOfSight()
        self.student = student
        self.teacher_weights = check_weights(teacher_weights)
        self.student_inputs = check_key("student_inputs", student_inputs)
        self.teacher_inputs = check_key("teacher_inputs", teacher_inputs)
        self.hard_label_loss: Any = hard_label_loss
        self.hard_label_weight = check_hard_labels(
            hard_label_loss, hard_label_weight
        )
        self._hidden.given_metrics = check_teacher_metrics(teacher_metrics)
        if teacher is not None:
            self.teacher = teacher
        if student.built:
            self.built = True

    @property
    def teacher(self) -> Any:
        """The teacher, the list of teachers, or None after loading."""
        models = self._hidden.teachers
        return list(models) if len(models) > 1 else next(iter(models), None)

    @teacher.setter
    def teacher(self, teacher: Any) -> None:
        models = check_teachers(teacher, self.student)
        check_weights(self.teacher_weights, teachers=len(models))
        if self.compiled:
            weights = self.teacher_weights
            check_forms(
                self.loss, models, self.student, weights=weights, stacklevel=4
            )
        self._hidden.teachers = tuple(models)
        # Read by `jit_compile="auto"`, which does not see the teacher.
        self.supports_jit = all(map(supports_jit, models))
        if not all(model.built for model in models):
            self.built = False  # `call` builds it, before a step is compiled
        # Compiled steps hold the old teacher.
        self.train_function = self.test_function = None

    @property
    def teacher_metrics(self) -> list[keras.metrics.Metric]:
        """The metrics of teacher and student that `compile` has set up."""
        return list(self._hidden.metrics)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a teacher past Keras."""
        # Keras makes a layer of a model, to be trained and saved, before the
        # setter of a property is called.
        if name == "teacher":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """Hide what must not be saved: Keras saves whatever `dir` shows."""
        hidden = {"teacher", "teacher_metrics"}
        return [name for name in super().__dir__() if name not in hidden]

    @property
    def non_trainable_variables(self) -> list[Any]:
        """The student's, then the teachers' variables, each once.

        On JAX, whatever a compiled step reads must be among the variables
        that are handed to it; other arrays are compiled in as constants.
        """
        variables = list(super().non_trainable_variables)
        for model in self._hidden.teachers:
            variables.extend(model.variables)
        return list({id(variable): variable for variable in variables}.values())

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        """Configure training; arguments as in `keras.Model.compile`.

        Args:
            optimizer: as in Keras.
            loss: of teacher, `y_true`, and student, `y_pred`; or a list of one.
            loss_weights: as in Keras.
            metrics: of labels and student.
            weighted_metrics: the same, with sample weights.
            **kwargs: as in Keras.

        Raises:
            ValueError: if the loss was told that a model that ends in a softmax
                or a sigmoid gives logits, is for other class counts, or there
                are several; if a metric of teacher and student was told other
                than the loss, or is given as one of labels.

        Warns:
            UserWarning: if the loss was told that a model that ends in a linear
                dense layer gives probabilities.
        """
        check_label_metrics(metrics, weighted_metrics)
        loss = one_loss("loss", loss)
        loss_weights = one_loss("loss_weights", loss_weights)
        hidden = self._hidden
        check_forms(
            loss,
            hidden.teachers,
            self.student,
            weights=self.teacher_weights,
            stacklevel=3,
        )
        given = hidden.given_metrics if self.hard_label_weight < 1.0 else []
        of_teacher = metrics_for(loss, self.student, given)
        hidden.metrics, hidden.compiled_metrics = [], None
        super().compile(
            optimizer, loss, loss_weights, metrics, weighted_metrics, **kwargs
        )
        hidden.metrics = of_teacher
        hidden.compiled_metrics = compiled(of_teacher)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as the saved distiller was."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def build(self, input_shape: Any) -> None:
        """Do nothing: the student builds itself in its first call, as alone."""

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return the student's outputs."""
        key = self.teacher_inputs
        if key is None or (isinstance(inputs, dict) and key in inputs):
            for model in self._hidden.teachers:
                if not model.built:
                    model(select(inputs, key, "teacher_inputs"), training=False)
        inputs = select(inputs, self.student_inputs, "student_inputs")
        if self._hidden.stateless:
            return call_alone(self.student, inputs, training=training)
        return self.student(inputs, training=training)

    def train_step(self, *step: Any) -> Any:
        """Make Keras's step, `(data)` or on JAX `(state, data)`."""
        return super().train_step(*self._ask_before(step, training=True))

    def test_step(self, *step: Any) -> Any:
        """Make Keras's step, `(data)` or on JAX `(state, data)`."""
        return super().test_step(*self._ask_before(step, training=False))

    def _ask_before(
        self, step: tuple[Any, ...], *, training: bool
    ) -> tuple[Any, ...]:
        """Return the arguments of a step, with `Targets` in place of labels."""
        *states, data = step
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        values: list[tuple[Any, Tensor]] = []
        if states:  # JAX hands the variables' values to the step
            trainable, non_trainable, *others = states[0]
            variables = self.non_trainable_variables
            values.extend(zip(self.trainable_variables, trainable, strict=True))
            values.extend(zip(variables, non_trainable, strict=True))
            with keras.StatelessScope(state_mapping=values) as scope:
                y = self._targets(x, y, call_alone)
            seen = [scope.get_current_value(variable) for variable in variables]
            states = [(trainable, seen, *others)]
        else:
            y = self._targets(x, y)
        if training:
            inputs = select(x, self.student_inputs, "student_inputs")
            for model in self._hidden.teachers:
                check_stands_still(model, self.student, inputs, values)
        return *states, keras.utils.pack_x_y_sample_weight(x, y, sample_weight)

    def _targets(
        self, x: Any, labels: Any, call: Callable[..., Any] = operator.call
    ) -> Targets:
        """Return the labels, and what the teachers answer, as one tensor."""
        check_has_targets(self, labels)
        if self.hard_label_weight == 1.0:
            return Targets(labels, None)
        models = self._hidden.teachers
        inputs = select(x, self.teacher_inputs, "teacher_inputs")
        with no_gradient():
            outputs = [call(model, inputs, training=False) for model in models]
        target = joint_output(outputs, self.teacher_weights, self.loss)
        return Targets(labels, target)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Compare the student's outputs with the teacher's on the same batch.

        Args:
            x: the batch.
            y: what a step put in the place of the labels; labels or None where
                Keras asks outside of a step, to build what is not built.
            y_pred: the student's outputs.
            sample_weight: as in Keras.
            training: whether it is a training step.

        Returns:
            The loss, a scalar.
        """
        if not isinstance(y, Targets):
            y = self._targets(x, y)
            # Some metrics make their variables when they first see data.
            self._update_teacher_metrics(y, y_pred, sample_weight)
        elif training:
            check_is_trained(self)
        weight = self.hard_label_weight
        hard = own = 0.0
        if weight:
            hard = self.hard_label_loss(
                y.labels, y_pred, sample_weight=sample_weight
            )
            hard = weight * hard
            own = sum(ops.sum(loss) for loss in self.losses) / replicas()
        if weight == 1.0:
            return hard + own
        check_rows(y.teacher, y_pred, self.loss)
        total = super().compute_loss(
            x=x,
            y=y.teacher,
            y_pred=y_pred,
            sample_weight=sample_weight,
            training=training,
        )
        if not weight:
            return total
        # `total` holds the student's own losses too; these count in full.
        return hard + (1.0 - weight) * (total - own) + own

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the distiller, less the teacher."""
        serialize = keras.saving.serialize_keras_object
        metrics = self._hidden.given_metrics
        return {
            **super().get_config(),
            "student": serialize(self.student),
            "teacher_weights": self.teacher_weights,
            "student_inputs": self.student_inputs,
            "teacher_inputs": self.teacher_inputs,
            "hard_label_loss": serialize(self.hard_label_loss),
            "hard_label_weight": self.hard_label_weight,
            "teacher_metrics": metrics and [serialize(m) for m in metrics],
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
