"""Train a student on the outputs of live, frozen teachers."""

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_ptloss._backend import (
    no_gradient,
    outside_of_step,
    replicas,
    weights_given_back,
)
from keras_ptloss._checks import (
    as_floats,
    check_classes,
    check_number,
    fail,
    one_tensor,
    output_shape,
)
from keras_ptloss._keras import supports_jit
from keras_ptloss._math import two_events
from keras_ptloss.losses.base import expand_weights
from keras_ptloss.metrics import (
    BrierScore,
    ExpectedCalibrationError,
    TeacherAgreement,
    TeacherMetric,
)

Tensor = Any

__all__ = ["Distiller"]

# What these activations give: logits (True) or probabilities (False).
HEADS = {
    "linear": True,
    "softmax": False,
    "sparsemax": False,
    "sigmoid": False,
    "hard_sigmoid": False,
}
# Layers whose linear outputs are logits.
DENSE_LAYERS = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
)


class Targets(NamedTuple):
    """What a step compares the student with. It replaces `y`."""

    labels: Any
    teacher_probs: Any


def _checked(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap one of Keras's methods: check its data and protect the weights.

    On JAX an interrupted run would leave the models without their weights.
    """

    @functools.wraps(method)
    def run(self: "Distiller", *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(method).bind(self, *args, **kwargs).arguments
        if given.get("y") is None and given.get("sample_weight") is not None:
            raise ValueError(
                "`sample_weight` must come with `y`, because Keras ignores it "
                "otherwise. If there are no labels, pass zeros as `y` and use "
                "no metrics of labels. Received: y=None"
            )
        for model in (self.student, *self._hidden.teachers):
            task = getattr(model, "preprocessor", None) is not None
            if task and _has_texts(given.get("x")):
                raise ValueError(
                    "`x` must hold the outputs of the preprocessor, because a "
                    "Distiller does not preprocess texts: "
                    "x = student.preprocessor(texts). Received: x with texts"
                )
        with weights_given_back(self):
            return method(self, *args, **kwargs)

    return run


@keras.saving.register_keras_serializable(package="keras_ptloss")
class Distiller(keras.Model):
    """Train a student on the outputs of one or more frozen teachers.

    Each training or test step runs the teacher on the batch, in inference mode
    and without gradients. Its probabilities are the `y_true` of the compiled
    loss. Everything else is Keras's own training of the student: dtype
    policies, sample weights, masks, regularisers, callbacks, `tf.data` and
    distribution over devices.

    `fit` takes `x`, or `(x, y)` with true labels `y`. Labels are for the
    compiled metrics, and for the `hard_label_loss` if there is one.
    `teacher_metrics` compare the student with the teacher and need no labels.
    A metric of labels is not reported for data without labels.

    The teacher never changes, and it is not saved. Set it again after loading:

        distiller = keras.saving.load_model("distiller.keras")
        distiller.teacher = teacher

    `teacher`, `teacher_weights` and `hard_label_weight` can be set at any time,
    also in a callback, and hold from the next step on. Annealing
    `hard_label_weight` is cheap; a change of the others compiles the step
    again. The other arguments are fixed.

    If the teacher is behind an API, or is slow, store its outputs and fit the
    student on them. That needs no distiller.

    Args:
        student: the model to train. It must not have a `train_step` of its own.
        teacher: a built Keras model, or a list of them. The target is the
            weighted mean of their probabilities; or, with the loss of a search
            among several teachers, all of them side by side.
        teacher_from_logits: whether the teacher gives logits; of several
            teachers one flag, or a list of flags. None reads it off the last
            layer: softmax or one sigmoid output means probabilities, a dense
            layer without activation means logits.
        teacher_weights: one non-negative number per teacher, for the mean. None
            weights all teachers equally. A teacher of weight 0 is not run.
        student_inputs: the key of the student's inputs in `x`, if `x` is a dict
            and the models take different inputs.
        teacher_inputs: the key of the teacher's inputs.
        hard_label_loss: a `keras.losses.Loss` of true labels and student
            outputs.
        hard_label_weight: its weight w, from 0 to 1. The total loss is
            `w * hard_label_loss + (1 - w) * loss`.
        teacher_metrics: Keras metrics whose `y_true` is the teacher's
            probabilities, such as `KLToTeacher`; None means
            `[TeacherAgreement()]`. If the loss corrects the teacher, they
            compare the student with the corrected teacher.
        **kwargs: arguments of `keras.Model`.

    Raises:
        ValueError: if an argument has another form, or if the last layer of a
            model shows that it gives something else than the arguments say.

    Example:
        >>> import keras, numpy as np
        >>> from keras_ptloss import PTLoss
        >>> inputs = keras.Input((4,))
        >>> dense = keras.layers.Dense(3, "softmax")
        >>> teacher = keras.Sequential([inputs, dense])
        >>> student = keras.Sequential([inputs, keras.layers.Dense(3)])
        >>> distiller = Distiller(student=student, teacher=teacher)
        >>> distiller.compile("adam", loss=PTLoss(0.5, from_logits=True))
        >>> x = np.random.default_rng(0).normal(size=(32, 4))
        >>> history = distiller.fit(x, verbose=0)
        >>> sorted(history.history)
        ['loss', 'teacher_agreement']

    Reference:
        Hinton et al. 2015, Distilling the Knowledge in a Neural Network;
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), Figure 1.
    """

    fit = _checked(keras.Model.fit)
    evaluate = _checked(keras.Model.evaluate)
    predict = _checked(keras.Model.predict)
    train_on_batch = _checked(keras.Model.train_on_batch)
    test_on_batch = _checked(keras.Model.test_on_batch)

    _fixed = (
        "student",
        "teacher_from_logits",
        "student_inputs",
        "teacher_inputs",
        "hard_label_loss",
    )
    _properties = ("teacher", "teacher_weights", "hard_label_weight")

    def __init__(
        self,
        *,
        student: keras.Model,
        teacher: Any = None,
        teacher_from_logits: bool | Sequence[bool] | None = None,
        teacher_weights: Sequence[float] | None = None,
        student_inputs: str | None = None,
        teacher_inputs: str | None = None,
        hard_label_loss: keras.losses.Loss | None = None,
        hard_label_weight: float | None = None,
        teacher_metrics: Sequence[keras.metrics.Metric] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(student, keras.Model):
            fail("student", "a Keras model", student)
        for name in ("train_step", "compute_loss"):
            if getattr(type(student), name) is not getattr(keras.Model, name):
                raise ValueError(
                    f"`student` must not have a `{name}` of its own, because "
                    "the Distiller would not call it. Received: student="
                    f"{student.name!r} of class {type(student).__name__}"
                )
        if hard_label_loss is not None:
            if not isinstance(hard_label_loss, keras.losses.Loss):
                fail("hard_label_loss", "a keras.losses.Loss", hard_label_loss)
            if hard_label_weight is None:
                fail("hard_label_weight", "a number from 0 to 1", None)
        # The student's policy scales losses as if it were trained alone. Inputs
        # reach both models unchanged, and each casts them for itself.
        arguments = {
            "name": "distiller",
            "dtype": student.dtype_policy,
            "autocast": False,
        }
        super().__init__(**{**arguments, **kwargs})
        # What Keras would track, train or save if it saw it.
        self._hidden = types.SimpleNamespace(
            teachers=(),
            flags=(),
            teacher_weights=None,
            hard_label_weight=0.0,
            weight_variable=keras.Variable(0.0, trainable=False),
            given_metrics=teacher_metrics,
            compiled_metrics=None,
        )
        self.student = student
        self.teacher_from_logits = teacher_from_logits
        self.student_inputs = student_inputs
        self.teacher_inputs = teacher_inputs
        self.hard_label_loss = hard_label_loss
        self.hard_label_weight = hard_label_weight or 0.0
        self.teacher_weights = teacher_weights
        if teacher is not None:
            self.teacher = teacher
        self.built = student.built

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; refuse arguments that cannot change."""
        if name in self._fixed and hasattr(self, name):
            raise AttributeError(
                f"`{name}` of a Distiller cannot be changed. Build a new "
                f"Distiller. Received: {name}={value!r}"
            )
        if name in self._properties:
            # Keras would take a teacher for a layer, to be trained and saved.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """Leave out the teacher: Keras saves every model that `dir` shows."""
        return [name for name in super().__dir__() if name != "teacher"]

    @property
    def teacher(self) -> Any:
        """The teacher, the list of teachers, or None after loading."""
        models = self._hidden.teachers
        return list(models) if len(models) > 1 else next(iter(models), None)

    @teacher.setter
    def teacher(self, teacher: Any) -> None:
        several = isinstance(teacher, (list, tuple))
        models = tuple(teacher) if several else (teacher,)
        flags = self.teacher_from_logits
        if not isinstance(flags, (list, tuple)):
            flags = [flags] * len(models)
        if len(flags) != len(models) or not models:
            fail(
                "teacher_from_logits",
                f"None, one flag, or a list of {len(models)} flags",
                self.teacher_from_logits,
            )
        flags = [
            _check_teacher(model, self.student, flag)
            for model, flag in zip(models, flags, strict=True)
        ]
        _check_number_of_teachers(self.loss, models, self.teacher_weights)
        self._sync()
        self._hidden.teachers, self._hidden.flags = models, tuple(flags)
        # Keras reads it for jit_compile="auto", and does not see the teacher.
        self.supports_jit = all(map(supports_jit, models))
        self._compile_again()

    @property
    def teacher_weights(self) -> list[float] | None:
        """The weights of the teachers in their mean, or None."""
        weights = self._hidden.teacher_weights
        return None if weights is None else list(weights)

    @teacher_weights.setter
    def teacher_weights(self, weights: Any) -> None:
        if weights is not None:
            expected = "finite non-negative numbers, not all 0"
            values = as_floats("teacher_weights", weights, expected)
            total = values.sum()
            if values.ndim != 1 or values.min() < 0 or not 0 < total < np.inf:
                fail("teacher_weights", expected, weights)
            weights = tuple(values.tolist())
        _check_number_of_teachers(self.loss, self._hidden.teachers, weights)
        self._sync()
        self._hidden.teacher_weights = weights
        self._compile_again()

    @property
    def hard_label_weight(self) -> float:
        """The weight of the hard-label loss, from 0 to 1."""
        return self._hidden.hard_label_weight

    @hard_label_weight.setter
    def hard_label_weight(self, weight: float) -> None:
        if isinstance(weight, keras.Variable):
            fail(
                "hard_label_weight",
                "a number. To change it later, set distiller.hard_label_weight",
                weight,
            )
        weight = check_number("hard_label_weight", weight, at_least=0.0)
        if weight > 1.0:
            fail("hard_label_weight", "at most 1", weight)
        if weight and self.hard_label_loss is None:
            raise ValueError(
                "`hard_label_loss` must be a Keras loss if `hard_label_weight` "
                f"is above 0. Received: hard_label_weight={weight}"
            )
        self._sync()
        # A step with weight 0 or 1 leaves one of the two losses out.
        other_step = {weight, self._hidden.hard_label_weight} & {0.0, 1.0}
        self._hidden.hard_label_weight = weight
        self._hidden.weight_variable.assign(weight)
        if other_step:
            self._compile_again()

    def _sync(self) -> None:
        """Write the state of a running JAX epoch back into the variables."""
        if keras.config.backend() == "jax":
            self.jax_state_sync()

    def _compile_again(self) -> None:
        """Replace compiled steps, which hold settings that have changed."""
        if self.train_function is not None:
            self.make_train_function(force=True)
        if self.test_function is not None:
            self.make_test_function(force=True)

    @property
    def non_trainable_variables(self) -> list[Any]:
        """The variables of the student, then those of the teachers, each once.

        On JAX, a compiled step must be given every variable that it reads.
        """
        variables = [
            *super().non_trainable_variables,
            self._hidden.weight_variable,
            *(v for model in self._hidden.teachers for v in model.variables),
        ]
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
            loss: a loss whose `y_true` is the teacher's probabilities.
            loss_weights: a number that multiplies the loss.
            metrics: metrics of true labels.
            weighted_metrics: the same, with sample weights.
            **kwargs: as in Keras.

        Raises:
            ValueError: if the loss is for other teachers, or if it, the
                hard-label loss or a metric was told to expect logits and the
                student gives probabilities, or the other way round.
        """
        loss = _only_one("loss", loss)
        loss_weights = _only_one("loss_weights", loss_weights)
        if isinstance(loss_weights, keras.Variable):
            fail("loss_weights", "a number, which cannot change", loss_weights)
        hidden = self._hidden
        _check_number_of_teachers(loss, hidden.teachers, self.teacher_weights)
        from_logits = getattr(loss, "from_logits", None)
        gives = check_head("student", self.student, from_logits, "from_logits")
        check_head(
            "student",
            self.student,
            getattr(self.hard_label_loss, "from_logits", None),
            "hard_label_loss.from_logits",
        )
        from_logits = gives if from_logits is None else from_logits
        of_teacher = hidden.given_metrics
        if of_teacher is None:
            of_teacher = [TeacherAgreement(from_logits=bool(from_logits))]
        of_labels = keras.tree.flatten([metrics, weighted_metrics])
        for metric in (*of_teacher, *of_labels):
            _check_metric(metric, from_logits, metric in of_labels)
        hidden.compiled_metrics = None
        super().compile(
            optimizer, loss, loss_weights, metrics, weighted_metrics, **kwargs
        )
        hidden.compiled_metrics = _compiled(of_teacher)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as the saved distiller was compiled."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def build(self, input_shape: Any) -> None:
        """Do nothing: the student builds itself when it is first called."""

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return the student's outputs."""
        if self.student_inputs is not None:
            inputs = inputs[self.student_inputs]
        return self.student(inputs, training=training)

    def train_step(self, *step: Any) -> Any:
        """Run Keras's step, `(data)` or on JAX `(state, data)`."""
        return super().train_step(*self._with_targets(*step))

    def test_step(self, *step: Any) -> Any:
        """Run Keras's step, `(data)` or on JAX `(state, data)`."""
        return super().test_step(*self._with_targets(*step))

    def _with_targets(self, *step: Any) -> tuple[Any, ...]:
        """Return the arguments of a step, with `Targets` in place of `y`."""
        *states, data = step
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        values: list[tuple[Any, Tensor]] = []
        for trainable, non_trainable, *_ in states:  # on JAX
            values += zip(self.trainable_variables, trainable, strict=True)
            variables = self.non_trainable_variables
            values += zip(variables, non_trainable, strict=True)
        if states:
            with keras.StatelessScope(state_mapping=values):
                y = self._targets(x, y)
        else:
            y = self._targets(x, y)
        return *states, keras.utils.pack_x_y_sample_weight(x, y, sample_weight)

    def _targets(self, x: Any, labels: Any) -> Targets:
        """Return the labels and the teacher's probabilities on a batch."""
        if self.hard_label_weight and labels is None:
            raise ValueError(
                "`y` must hold labels if `hard_label_weight` is above 0. "
                f"Received: y=None, hard_label_weight={self.hard_label_weight}"
            )
        models = self._hidden.teachers
        if not models:
            if self.hard_label_weight == 1.0:
                return Targets(labels, None)
            raise ValueError(
                "`teacher` must be set before fit or evaluate. A loaded "
                "distiller has none: set distiller.teacher = model. Received: "
                "teacher=None"
            )
        if self.teacher_inputs is not None:
            x = x[self.teacher_inputs]
        weights = self.teacher_weights or [1.0] * len(models)
        kept = [k for k, weight in enumerate(weights) if weight]
        probs = []
        with no_gradient():
            for k in kept:
                _check_shares_no_weight(models[k], self.student)
                outputs = one_tensor("teacher", models[k](x, training=False))
                outputs = two_events(
                    ops.cast(outputs, "float32"),
                    from_logits=self._hidden.flags[k],
                )
                if self._hidden.flags[k]:
                    outputs = ops.softmax(outputs, axis=-1)
                probs.append(ops.stop_gradient(outputs))
        counts = getattr(self.loss, "teacher_classes", None)
        received = tuple(p.shape[-1] for p in probs)
        if counts is not None:
            counts = counts if len(counts) > 1 else counts * len(probs)
            if None not in received and received != tuple(counts):
                fail(
                    "teacher",
                    f"the teachers that the loss is for, of {counts} classes",
                    received,
                )
            if len(self.loss.teacher_classes) > 1:
                return Targets(labels, ops.concatenate(probs, axis=-1))
        if len(set(received)) > 1:
            fail("teacher", "models with the same number of classes", received)
        total = sum(weights)
        mean = sum(
            p * (weights[k] / total) for k, p in zip(kept, probs, strict=True)
        )
        return Targets(labels, mean)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Return the total loss of a batch, a scalar.

        Args:
            x: the batch.
            y: `Targets`; or true labels or None, and the teacher is run on `x`.
            y_pred: the student's outputs.
            sample_weight: one weight per example or per position.
            training: whether it is a training step.
        """
        if not isinstance(y, Targets):
            # Keras is building what is not built yet, such as metrics.
            y = self._targets(x, y)
            self.compute_metrics(x, y, y_pred, sample_weight)
        one_tensor("student", y_pred)
        sample_weight = _per_position(sample_weight, y_pred)
        weight, hard, own = self.hard_label_weight, 0.0, 0.0
        if weight:
            hard = self.hard_label_loss(y.labels, y_pred, sample_weight)
            own = sum(ops.sum(loss) for loss in self.losses) / replicas()
        if weight == 1.0:
            return hard + own
        if self.loss is None and not weight and not self.losses:
            raise ValueError(
                "`loss` must be passed to `compile`, because the student has "
                "no losses of its own. Received: loss=None"
            )
        target = y.teacher_probs
        if getattr(self.loss, "teacher_classes", None) is None:
            if (target.shape[-1], y_pred.shape[-1]) == (2, 1):
                target = target[..., 1:]  # as losses of binary heads take it
            check_classes("teacher", target, "student", y_pred)
        total = super().compute_loss(x, target, y_pred, sample_weight, training)
        if not weight:
            return total
        # The student's own losses, which `total` holds too, count in full.
        weight = ops.convert_to_tensor(self._hidden.weight_variable)
        return weight * hard + (1.0 - weight) * (total - own) + own

    @property
    def metrics(self) -> list[Any]:
        """The compiled metrics; those of teacher and student come last."""
        of_teacher = self._hidden.compiled_metrics
        return super().metrics + ([] if of_teacher is None else [of_teacher])

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> dict[str, Any]:
        """Update the metrics that the batch has data for; return their values.

        Args:
            x: the batch.
            y: `Targets`, or true labels.
            y_pred: the student's outputs.
            sample_weight: one weight per example or per position.
        """
        y = y if isinstance(y, Targets) else Targets(y, None)
        sample_weight = _per_position(sample_weight, y_pred)
        of_teacher = self._hidden.compiled_metrics
        unseen = []
        if y.teacher_probs is None:
            unseen.append(of_teacher)
        elif of_teacher is not None:
            probs = _corrected(self.loss, y.teacher_probs)
            of_teacher.update_state(probs, y_pred, sample_weight)
        if y.labels is None:
            of_labels = (m for m in self.metrics if m is not of_teacher)
            unseen += [m for m in of_labels if m.name == "compile_metrics"]
        else:
            for metric in self.metrics:
                # "accuracy" waits for labels, to know which kind it is. They
                # may come after TensorFlow has compiled the step.
                if not getattr(metric, "built", True):
                    build = functools.partial(metric.build, y.labels, y_pred)
                    outside_of_step(build)
            super().compute_metrics(x, y.labels, y_pred, sample_weight)
        return _results(m for m in self.metrics if m not in unseen)

    def get_metrics_result(self) -> dict[str, Any]:
        """Return the values of the metrics that have seen data."""
        return _results(self.metrics)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the distiller, without the teacher."""
        serialize = keras.saving.serialize_keras_object
        metrics = self._hidden.given_metrics
        flags = self.teacher_from_logits
        return {
            **super().get_config(),
            "student": serialize(self.student),
            "teacher_from_logits": flags
            if flags is None
            else np.array(flags).tolist(),
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


def check_head(
    argument: str, model: keras.Model, from_logits: bool | None, flag: str
) -> bool | None:
    """Check a model's last layer against what is said of its outputs.

    Args:
        argument: `teacher` or `student`, for errors.
        model: the model.
        from_logits: whether its outputs are said to be logits, or None.
        flag: the name of the argument that says so, for errors.

    Returns:
        True if the last layer gives logits, False if it gives probabilities,
        None if it does not show.

    Raises:
        ValueError: if the outputs are no distribution over classes, or not what
            `from_logits` says.
    """
    name, columns = _last_activation(model)
    gives = HEADS.get(name)
    received = f"Received: {argument}={model.name!r}, {flag}={from_logits}"
    if name in ("sigmoid", "hard_sigmoid") and columns not in (1, None):
        raise ValueError(
            f"`{argument}` must give one distribution over the classes, and it "
            f"ends in {columns} independent sigmoids. To distil those, fit the "
            "student on the teacher's outputs with "
            f"keras.losses.BinaryCrossentropy(). {received}"
        )
    if gives is not None and from_logits is not None and gives != from_logits:
        kind = "logits" if gives else "probabilities"
        raise ValueError(
            f"`{flag}` must be {gives}, because `{argument}` ends in a {name} "
            f"layer, which gives {kind}. {received}"
        )
    if gives is None and name is not None and not from_logits:
        raise ValueError(
            f"`{argument}` must give probabilities or logits, and it ends in "
            f"{name}, which gives no probabilities. End it in a softmax, or in "
            f"a dense layer without activation; if its outputs are logits, "
            f"set {flag}=True. {received}"
        )
    return gives


def _last_activation(model: Any) -> tuple[str | None, int | None]:
    """Return the name of a model's last activation and the number of outputs.

    The name is None if the model or layer does not show an activation of Keras.
    """
    shape = output_shape("model", model)
    layer = model
    while isinstance(layer, keras.Model):
        if isinstance(layer, keras.Sequential):
            layer = layer.layers[-1] if layer.layers else None
            continue
        names = getattr(layer, "output_names", ())
        try:
            layer = layer.get_layer(names[0]) if len(names) == 1 else None
        except ValueError:  # The output is of an operation, not of a layer.
            layer = None
    columns = shape[-1] if shape else getattr(layer, "units", None)
    # A layer such as Softmax or ReLU is an activation itself.
    activation = getattr(layer, "activation", None)
    name = getattr(activation, "__name__", type(layer).__name__.lower())
    if name == "linear" and not isinstance(layer, DENSE_LAYERS):
        return None, columns
    return (name if name in dir(keras.activations) else None), columns


def _check_teacher(
    teacher: Any, student: keras.Model, from_logits: bool | None
) -> bool:
    """Check a teacher; return whether it gives logits."""
    if not isinstance(teacher, keras.Model):
        raise ValueError(
            "`teacher` must be a Keras model or a list of them. For a teacher "
            "behind an API, store its outputs (SoftLabels) and fit the student "
            f"on them. Received: teacher={teacher!r}"
        )
    if not teacher.built:
        raise ValueError(
            "`teacher` must be built and trained, and it has no weights yet. "
            "Call it on a batch, then load its weights. Received: teacher="
            f"{teacher.name!r}"
        )
    if teacher is student:
        raise ValueError(
            "`teacher` must be another model than the student. "
            "keras.models.clone_model copies a model. Received: teacher="
            f"{teacher.name!r}, student={student.name!r}"
        )
    gives = check_head("teacher", teacher, from_logits, "teacher_from_logits")
    if from_logits is None and gives is None:
        raise ValueError(
            "`teacher_from_logits` must be True or False, because the last "
            f"layer of the teacher {teacher.name!r} does not show whether it "
            "gives logits or probabilities. Received: teacher_from_logits=None"
        )
    return bool(gives if from_logits is None else from_logits)


def _check_shares_no_weight(teacher: keras.Model, student: keras.Model) -> None:
    """Refuse a teacher that would move when the student is trained."""
    own = {id(weight) for weight in teacher.weights}
    for weight in student.trainable_weights:
        if id(weight) in own:
            raise ValueError(
                "`teacher` must share no trainable weight with the student, "
                "which would change it. keras.models.clone_model copies a "
                "model; trainable=False freezes shared layers. Received: "
                f"teacher={teacher.name!r}, which shares {weight.path!r}"
            )


def _check_number_of_teachers(
    loss: Any, teachers: Sequence[keras.Model], weights: Any
) -> None:
    """Check teachers and weights against the loss and each other."""
    if weights is not None and teachers and len(weights) != len(teachers):
        fail(
            "teacher_weights",
            f"one number for each of the {len(teachers)} teachers",
            list(weights),
        )
    counts = getattr(loss, "teacher_classes", None) or ()
    if len(counts) > 1:
        if weights is not None:
            raise ValueError(
                "`teacher_weights` must be None with a loss for several "
                "teachers, which weights them itself. Received: "
                f"teacher_weights={list(weights)}"
            )
        if teachers and len(teachers) != len(counts):
            raise ValueError(
                f"`teacher` must be the {len(counts)} teachers that the loss "
                f"is for, in their order. Received: {len(teachers)} teachers"
            )


def _check_metric(metric: Any, from_logits: bool | None, labels: bool) -> None:
    """Check one of this package's metrics against the loss."""
    ours = (TeacherMetric, BrierScore, ExpectedCalibrationError)
    if not isinstance(metric, ours):
        return
    if labels and isinstance(metric, TeacherMetric):
        fail(
            "metrics",
            "metrics of true labels. Pass metrics of the teacher as "
            "Distiller(teacher_metrics=[...])",
            [metric.name],
        )
    if from_logits is not None and metric.from_logits != from_logits:
        raise ValueError(
            f"`{metric.name}` must have from_logits={from_logits}, as the loss "
            f"has. Received: from_logits={metric.from_logits}"
        )


def _only_one(argument: str, value: Any) -> Any:
    """Return the element of a list, tuple or dict of one, as Keras takes it."""
    if not isinstance(value, (list, tuple, dict)):
        return value
    leaves = keras.tree.flatten(value)
    if len(leaves) != 1:
        fail(argument, "one, because the student has one output", value)
    return leaves[0]


def _corrected(loss: Any, teacher_probs: Tensor) -> Tensor:
    """Return the teacher as the loss corrects it, if it does."""
    inner = getattr(loss, "loss", loss)  # of Flooding
    correction = getattr(inner, "correction", None)
    return correction.apply(teacher_probs) if correction else teacher_probs


def _per_position(sample_weight: Tensor, y_pred: Tensor) -> Tensor:
    """Return one weight per position of `y_pred`, `(...)`, or None.

    Keras would take weights of examples `(N,)` for weights of tokens.
    """
    if sample_weight is None or len(y_pred.shape) < 3:
        return sample_weight
    weight = expand_weights(sample_weight, len(y_pred.shape) - 1)
    return weight * ops.ones_like(y_pred[..., 0], dtype=weight.dtype)


def _compiled(metrics: Sequence[keras.metrics.Metric]) -> Any:
    """Return the container that Keras would make for these metrics, or None.

    Callbacks with mode="auto" look for a metric's direction in such containers
    alone, and Keras has no public name for them.
    """
    if not metrics:
        return None
    model = keras.Model()
    model.compile(None, weighted_metrics=list(metrics), jit_compile=False)
    (container,) = (m for m in model.metrics if m.name == "compile_metrics")
    container.build(np.zeros((1, 2)), np.zeros((1, 2)))
    return container


def _results(metrics: Any) -> dict[str, Any]:
    """Return the values of metrics by name, of those that are built."""
    results = {}
    for metric in metrics:
        if getattr(metric, "built", True):
            result = metric.result()
            several = isinstance(result, dict)
            results.update(result if several else {metric.name: result})
    return results


def _has_texts(x: Any) -> bool:
    """Return whether inputs hold texts, as far as they show it."""
    leaves = keras.tree.flatten(getattr(x, "element_spec", x))
    dtypes = [getattr(leaf, "dtype", type(leaf)) for leaf in leaves]
    return any(
        dtype in (str, "string")
        or getattr(dtype, "kind", "") in ("O", "S", "U")
        for dtype in dtypes
    )
