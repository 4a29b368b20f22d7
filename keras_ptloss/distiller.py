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
    supports_jit,
    weights_given_back,
)
from keras_ptloss._math import model_probs
from keras_ptloss._validation import (
    check_classes,
    check_head,
    check_number,
    fail,
    last_layer,
    one_flag_each,
    one_tensor,
    refuse_variable,
)
from keras_ptloss.losses.base import position_weights
from keras_ptloss.metrics import TeacherAgreement, TeacherMetric

Tensor = Any

__all__ = ["Distiller"]

# The arguments that are saved. Those in FIXED cannot be changed.
FIXED = (
    "student",
    "teacher_from_logits",
    "student_inputs",
    "teacher_inputs",
    "hard_label_loss",
    "teacher_metrics",
)
SETTINGS = (*FIXED, "teacher_weights", "hard_label_weight")


class Targets(NamedTuple):
    """The targets of a training step, which replace `y`."""

    labels: Any
    teacher_probs: Any


def _checked(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a Keras method: check its data and protect the weights."""

    @functools.wraps(method)
    def run(self: "Distiller", *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(method).bind(self, *args, **kwargs).arguments
        if given.get("y") is None and given.get("sample_weight") is not None:
            raise ValueError(
                "`sample_weight` must come with `y`, because Keras ignores it "
                "otherwise. If there are no labels, pass zeros as `y` and do "
                "not use metrics that need labels. Received: y=None"
            )
        if getattr(self.student, "preprocessor", None) is not None:
            _refuse_texts(given.get("x"))
        # On JAX, the models would lose their weights if a run is interrupted.
        with weights_given_back(self):
            return method(self, *args, **kwargs)

    return run


@keras.saving.register_keras_serializable(package="keras_ptloss")
class Distiller(keras.Model):
    """Train a student on the outputs of one or more frozen teachers.

    Each step runs the teacher on the batch, in inference mode and without
    gradients. The compiled loss gets the teacher's probabilities as `y_true`.
    Otherwise Keras trains the student as usual, with dtype policies, sample
    weights, masks, regularisers, callbacks, `tf.data` and distribution over
    devices.

    `fit` takes `x` or `(x, y)`. The true labels `y` are used only by the
    compiled metrics and by `hard_label_loss`. Metrics that need labels are not
    reported when the data has no labels.

    The teacher never changes, and it is not saved: set `distiller.teacher`
    again after loading. You can set `teacher`, `teacher_weights` and
    `hard_label_weight` at any time, also in a callback; the change takes effect
    in the next step. The other arguments are fixed.

    Args:
        student: the model to train. It must not have its own `train_step`.
        teacher: a built Keras model, or a list of them. The target is the
            weighted mean of their probabilities. With a loss from a search with
            several teachers, the target is their probabilities side by side.
        teacher_from_logits: whether the teacher gives logits; a list of flags
            for several teachers. None infers it from the last layer: softmax or
            a single sigmoid output means probabilities, and a dense layer
            without activation means logits.
        teacher_weights: one non-negative number per teacher, for the mean. None
            gives all teachers the same weight. A teacher of weight 0 is not
            run.
        student_inputs: the key of the student's inputs, if `x` is a dict and
            the models take different inputs.
        teacher_inputs: the key of the teacher's inputs, in the same way.
        hard_label_loss: a `keras.losses.Loss` between the true labels and the
            student.
        hard_label_weight: the weight w of `hard_label_loss`, from 0 to 1. The
            total loss is `w * hard_label_loss + (1 - w) * loss`.
        teacher_metrics: Keras metrics that get the teacher's probabilities as
            `y_true`, corrected if the loss corrects them. They do not need
            labels. None means `[TeacherAgreement()]`.
        **kwargs: arguments of `keras.Model`.

    Raises:
        ValueError: in the first step, if the last layer of a model contradicts
            the arguments, or if the models do not fit the loss.

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
                    f"`student` must not have its own `{name}`, because the "
                    "Distiller does not call it. Received: student="
                    f"{student.name!r} of class {type(student).__name__}"
                )
        # With the student's policy, losses are scaled as if the student were
        # trained alone. Each model casts its inputs itself.
        policy = {"dtype": student.dtype_policy, "autocast": False}
        super().__init__(**{"name": "distiller", **policy, **kwargs})
        # Keras would track, train and save these if they were attributes.
        self._hidden = types.SimpleNamespace(
            teachers=(),
            teacher_weights=None,
            hard_label_weight=0.0,
            weight_variable=keras.Variable(0.0, trainable=False),
            given_metrics=teacher_metrics,
            compiled_metrics=None,
            all_metrics=(),
        )
        self.student = student
        self.teacher_from_logits = teacher_from_logits
        self.student_inputs = student_inputs
        self.teacher_inputs = teacher_inputs
        self.hard_label_loss = hard_label_loss
        if hard_label_loss is not None and hard_label_weight is None:
            expected = "given together with `hard_label_loss`"
            fail("hard_label_weight", expected, hard_label_weight)
        if hard_label_weight is not None:
            self.hard_label_weight = hard_label_weight
        self.teacher_weights = teacher_weights
        if teacher is not None:
            self.teacher = teacher
        self.built = student.built

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; refuse arguments that cannot change."""
        if name in FIXED and hasattr(self, name):
            raise AttributeError(
                f"`{name}` of a Distiller cannot be changed. Build a new "
                f"Distiller. Received: {name}={value!r}"
            )
        if name == "teacher":  # Keras would track it as a layer to train.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """Leave out the teacher, because Keras saves every model in `dir`."""
        hidden = {"teacher", "teacher_metrics"}
        return [name for name in super().__dir__() if name not in hidden]

    @property
    def teacher_metrics(self) -> Any:
        """The argument `teacher_metrics`, or None."""
        return self._hidden.given_metrics

    @property
    def teacher(self) -> Any:
        """The teacher, a tuple of several teachers, or None after loading."""
        models = self._hidden.teachers
        return models if len(models) > 1 else next(iter(models), None)

    @teacher.setter
    def teacher(self, teacher: Any) -> None:
        models = teacher if isinstance(teacher, (list, tuple)) else [teacher]
        for model in models:
            if not isinstance(model, keras.Model) or model is self.student:
                raise ValueError(
                    "`teacher` must be a Keras model other than the student, "
                    "or a list of them. For a teacher behind an API, store its "
                    "outputs (SoftLabels) and fit the student on them. "
                    f"Received: teacher={teacher!r}"
                )
            if not model.built:
                raise ValueError(
                    "`teacher` must be built and trained. Call it on a batch, "
                    "then load its weights. Received: teacher="
                    f"{model.name!r}, which has no weights yet"
                )
        self._change("teachers", tuple(models))
        # Keras reads this for jit_compile="auto"; it does not see the teacher.
        self.supports_jit = all(map(supports_jit, models))

    @property
    def teacher_weights(self) -> Any:
        """The weights of the teachers in their mean, or None."""
        return self._hidden.teacher_weights

    @teacher_weights.setter
    def teacher_weights(self, weights: Any) -> None:
        if weights is not None:
            weights = tuple(float(weight) for weight in weights)
            if not 0.0 < sum(weights) < np.inf or min(weights) < 0.0:
                fail("teacher_weights", "numbers >= 0, not all 0", weights)
        self._change("teacher_weights", weights)

    @property
    def hard_label_weight(self) -> float:
        """The weight of the hard-label loss, from 0 to 1."""
        return self._hidden.hard_label_weight

    @hard_label_weight.setter
    def hard_label_weight(self, weight: float) -> None:
        name = "hard_label_weight"
        weight = check_number(name, weight, at_least=0.0, at_most=1.0)
        if weight and self.hard_label_loss is None:
            fail(name, "0 without a `hard_label_loss`", weight)
        # At 0 and 1, the step is compiled differently. Between these, the
        # weight is a variable, and no new step is needed.
        low, high = sorted((weight, self.hard_label_weight))
        self._change(name, weight, new_step=low == 0.0 or high == 1.0)
        self._hidden.weight_variable.assign(weight)

    def _change(self, name: str, value: Any, *, new_step: bool = True) -> None:
        """Change a setting, also between two steps of a running `fit`."""
        if keras.config.backend() == "jax":
            self.jax_state_sync()
        setattr(self._hidden, name, value)
        if new_step and self.train_function is not None:
            self.make_train_function(force=True)
        if new_step and self.test_function is not None:
            self.make_test_function(force=True)

    @property
    def non_trainable_variables(self) -> list[Any]:
        """The variables of the student and of the teachers, without repetition.

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

        The `loss` gets the teacher's probabilities as `y_true`, and the metrics
        get true labels.
        """
        loss, *others = keras.tree.flatten(loss)
        if others:
            fail("loss", "a single loss: the student has one output", others)
        (loss_weights,) = keras.tree.flatten(loss_weights)
        refuse_variable("loss_weights", loss_weights)
        of_labels = keras.tree.flatten([metrics, weighted_metrics])
        if any(isinstance(metric, TeacherMetric) for metric in of_labels):
            fail(
                "metrics",
                "metrics of true labels. Pass metrics of the teacher to "
                "Distiller(teacher_metrics=[...])",
                metrics,
            )
        hidden, of_teacher = self._hidden, self._hidden.given_metrics
        if of_teacher is None:
            shown = last_layer(self.student)[2]
            from_logits = getattr(loss, "from_logits", shown)
            of_teacher = [TeacherAgreement(from_logits=bool(from_logits))]
        hidden.compiled_metrics = None
        super().compile(
            optimizer, loss, loss_weights, metrics, weighted_metrics, **kwargs
        )
        hidden.compiled_metrics = _compiled(of_teacher)
        hidden.all_metrics = (*of_teacher, *of_labels)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile with the settings of the saved distiller."""
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
        """Run Keras's step; takes `(data)`, or `(state, data)` on JAX."""
        return super().train_step(*self._with_targets(*step))

    def test_step(self, *step: Any) -> Any:
        """Run Keras's step; takes `(data)`, or `(state, data)` on JAX."""
        return super().test_step(*self._with_targets(*step))

    def _with_targets(self, *step: Any) -> tuple[Any, ...]:
        """Return the arguments of a step, with `Targets` in place of `y`."""
        *states, data = step
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if states:  # On JAX, the values of the variables are arguments.
            ours = (self.trainable_variables, self.non_trainable_variables)
            values = [
                pair
                for variables, state in zip(ours, states[0], strict=False)
                for pair in zip(variables, state, strict=True)
            ]
            with keras.StatelessScope(state_mapping=values):
                y = self._targets(x, y)
        else:
            y = self._targets(x, y)
        return *states, keras.utils.pack_x_y_sample_weight(x, y, sample_weight)

    def _targets(self, x: Any, labels: Any) -> Targets:
        """Return the labels, and the teacher's probabilities of a batch."""
        if self.hard_label_weight and labels is None:
            fail("y", "labels, because `hard_label_weight` is above 0", None)
        models = self._hidden.teachers
        if not models:
            if self.hard_label_weight == 1.0:
                return Targets(labels, None)
            expected = "a model. A loaded distiller has none: set "
            fail("teacher", expected + "distiller.teacher = model", None)
        counts = getattr(self.loss, "teacher_classes", None) or ()
        side_by_side = len(counts) > 1
        weights = self.teacher_weights or (1.0,) * len(models)
        if side_by_side and self.teacher_weights:
            expected = "None with a loss that weights the teachers itself"
            fail("teacher_weights", expected, weights)
        if len(weights) != len(models):
            expected = f"one for each of {len(models)} teachers"
            fail("teacher_weights", expected, weights)
        flags = one_flag_each(
            self.teacher_from_logits, len(models), "teacher_from_logits"
        )
        if self.teacher_inputs is not None:
            x = x[self.teacher_inputs]
        probs = [
            (weight / sum(weights), self._probs(model, flag, x))
            for model, flag, weight in zip(models, flags, weights, strict=True)
            if weight
        ]
        if not side_by_side:
            return Targets(labels, sum(weight * p for weight, p in probs))
        received = tuple(p.shape[-1] for _, p in probs)
        if received != tuple(counts):
            fail("teacher", f"the teachers of the loss, {counts}", received)
        return Targets(labels, ops.concatenate([p for _, p in probs], axis=-1))

    def _probs(
        self, teacher: keras.Model, from_logits: bool | None, x: Any
    ) -> Tensor:
        """Return a teacher's probabilities, `(..., C)`."""
        own = {id(weight) for weight in teacher.weights}
        for weight in self.student.trainable_weights:
            if id(weight) in own:
                raise ValueError(
                    "`teacher` must not share trainable weights with the "
                    "student. Copy the model with keras.models.clone_model, or "
                    "freeze shared layers with trainable=False. Received: "
                    f"teacher={teacher.name!r}, which shares {weight.path!r}"
                )
        flag = "teacher_from_logits"
        shown = check_head("teacher", teacher, from_logits, flag)
        from_logits = shown if from_logits is None else from_logits
        if from_logits is None:
            expected = "True or False, because the teacher's last layer does "
            expected += "not show whether its outputs are logits"
            fail(flag, expected, None)
        with no_gradient():
            outputs = one_tensor("teacher", teacher(x, training=False))
            probs = model_probs(outputs, from_logits=from_logits)
        return ops.stop_gradient(probs)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Return the total loss of a batch, a scalar; `y` may be `Targets`."""
        if not isinstance(y, Targets):  # Keras calls this to build the model.
            y = self._targets(x, y)
            self.compute_metrics(x, y, y_pred, sample_weight)
        one_tensor("student", y_pred)
        parts = (self.loss, self.hard_label_loss, *self._hidden.all_metrics)
        flags = {getattr(part, "from_logits", None) for part in parts}
        for flag in flags - {None} or flags:
            check_head("student", self.student, flag, "from_logits")
        sample_weight = position_weights(y_pred, sample_weight)
        weight: Any = self.hard_label_weight
        hard = own = 0.0
        if weight:
            hard_label_loss: Any = self.hard_label_loss
            hard = hard_label_loss(y.labels, y_pred, sample_weight)
            own = sum(ops.sum(loss) for loss in self.losses) / replicas()
        if weight == 1.0:
            return hard + own
        target = y.teacher_probs
        if getattr(self.loss, "teacher_classes", None) is None:
            if (target.shape[-1], y_pred.shape[-1]) == (2, 1):
                target = target[..., 1:]  # as losses for binary heads need it
            check_classes("teacher", target, "student", y_pred)
        total = super().compute_loss(x, target, y_pred, sample_weight, training)
        if not weight:
            return total
        # `total` contains the student's own losses, which keep their weight.
        weight = ops.convert_to_tensor(self._hidden.weight_variable)
        return weight * hard + (1.0 - weight) * (total - own) + own

    @property
    def metrics(self) -> list[Any]:
        """The compiled metrics, followed by the teacher metrics."""
        of_teacher = self._hidden.compiled_metrics
        return super().metrics + ([] if of_teacher is None else [of_teacher])

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> dict[str, Any]:
        """Update and return the metrics that the batch has data for."""
        y = y if isinstance(y, Targets) else Targets(y, None)
        sample_weight = position_weights(y_pred, sample_weight)
        of_teacher, seen = self._hidden.compiled_metrics, []
        for metric in self.metrics:
            if metric is of_teacher:
                if y.teacher_probs is None:
                    continue
                probs = y.teacher_probs
                correction = getattr(self.loss, "correction", None)
                if correction is not None:
                    probs = correction.apply(probs)
                metric.update_state(probs, y_pred, sample_weight)
            elif metric.name == "compile_metrics":
                if y.labels is None:
                    continue
                # Keras needs labels to decide what "accuracy" means. They may
                # come after TensorFlow has compiled the step.
                if not metric.built:
                    build = functools.partial(metric.build, y.labels, y_pred)
                    outside_of_step(build)
                metric.update_state(y.labels, y_pred, sample_weight)
            seen.append(metric)
        return _results(seen)

    def get_metrics_result(self) -> dict[str, Any]:
        """Return the values of the metrics by name."""
        return _results(self.metrics)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the distiller, except the teacher."""
        settings = {name: getattr(self, name) for name in SETTINGS}
        return keras.saving.serialize_keras_object(
            {**super().get_config(), **settings}
        )

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> "Distiller":
        """Build a distiller without a teacher; set `distiller.teacher` next."""
        return cls(
            **keras.saving.deserialize_keras_object(
                config, custom_objects=custom_objects
            )
        )


def _compiled(metrics: Sequence[keras.metrics.Metric]) -> Any:
    """Return the container that Keras makes for these metrics, or None.

    Callbacks with mode="auto" look for a metric's direction only in this
    container, and Keras has no public name for it.
    """
    if not metrics:
        return None
    model = keras.Model()
    model.compile(None, weighted_metrics=list(metrics), jit_compile=False)
    (container,) = (m for m in model.metrics if m.name == "compile_metrics")
    container.build(np.zeros((1, 2)), np.zeros((1, 2)))
    return container


def _results(metrics: Sequence[keras.metrics.Metric]) -> dict[str, Any]:
    """Return the values of all built metrics, by name."""
    results = {}
    for metric in metrics:
        if getattr(metric, "built", True):
            value = metric.result()
            value = value if isinstance(value, dict) else {metric.name: value}
            results.update(value)
    return results


def _refuse_texts(x: Any) -> None:
    """Raise a `ValueError` if the inputs contain texts."""
    for leaf in keras.tree.flatten(getattr(x, "element_spec", x)):
        dtype = getattr(leaf, "dtype", type(leaf))
        if dtype in (str, "string") or getattr(dtype, "kind", "") in "OSU":
            raise ValueError(
                "`x` must hold the outputs of the preprocessor, because a "
                "Distiller does not preprocess texts: "
                "x = student.preprocessor(texts). Received: x with texts"
            )
