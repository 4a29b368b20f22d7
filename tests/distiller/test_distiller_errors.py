"""Errors and warnings of a distiller."""

import keras
import numpy as np
import pytest
from distillers import (
    CLASSES,
    FEATURES,
    distil,
    logits,
    logits_loss,
    make_linear,
    make_model,
    pt_losses,
)

from keras_ptloss import Distiller, PTLoss

BACKEND = keras.backend.backend()
calls = pytest.mark.parametrize(
    "call", ["fit", "evaluate", "train_on_batch", "test_on_batch"]
)


def run(distiller, call, x):
    options = {} if call.endswith("batch") else {"verbose": 0}
    getattr(distiller, call)(x, **options)


HOLDERS = {
    "list": lambda loss: [loss],
    "tuple": lambda loss: (loss,),
    "dict": lambda loss: {"dense": loss},
}


class TestLossInAContainer:
    """Keras takes one; it is the loss that it holds."""

    @pytest.mark.parametrize("holder", HOLDERS)
    @pytest.mark.parametrize(
        "columns, ending", [(3, "softmax"), (1, "sigmoid")]
    )
    def test_checked_as_alone(self, holder, columns, ending):
        teacher = make_linear(columns, ending, seed=1)
        distiller = Distiller(make_linear(columns), teacher)
        with pytest.raises(ValueError, match="`teacher_from_logits` must be"):
            distiller.compile("sgd", HOLDERS[holder](logits_loss()))

    @pytest.mark.parametrize("holder", HOLDERS)
    @pytest.mark.parametrize("columns", [1, CLASSES])
    def test_same_numbers_as_alone(self, x, holder, columns):
        logs = []
        for hold in (lambda value: value, HOLDERS[holder]):
            distiller = Distiller(
                make_linear(columns), make_linear(columns, seed=1)
            )
            distiller.compile(
                "sgd", hold(logits_loss()), loss_weights=hold(0.5)
            )
            logs.append(distiller.evaluate(x, verbose=0, return_dict=True))
        assert logs[0] == logs[1]

    def test_several(self):
        distiller = Distiller(make_linear(), make_linear(seed=1))
        with pytest.raises(ValueError, match="`loss` must be one"):
            distiller.compile("sgd", [logits_loss(), logits_loss()])


class TestWrongInput:
    @pytest.mark.parametrize("ending", ["softmax", "sigmoid"])
    def test_probabilities_taken_for_logits(self, ending):
        columns = 1 if ending == "sigmoid" else CLASSES
        told = make_linear(columns, ending, seed=1)
        with pytest.raises(
            ValueError, match=f"`teacher_from_logits` must.*{ending}"
        ):
            distil(make_linear(columns), told)
        inputs = keras.Input((FEATURES,))
        dense = keras.layers.Dense(columns, name="head")(inputs)
        if ending == "softmax":
            student = keras.Model(inputs, keras.layers.Softmax()(dense))
        else:
            student = keras.Model(told.inputs, told.outputs)
        with pytest.raises(ValueError, match="`from_logits` must be False"):
            distil(student, make_linear(columns))

    def test_probabilities_taken_for_logits_by_a_later_teacher(self):
        distiller = distil(make_linear(), make_linear(seed=1))
        with pytest.raises(ValueError, match="`teacher_from_logits` must be"):
            distiller.teacher = make_linear(activation="softmax", seed=2)

    def test_logits_taken_for_probabilities(self):
        teacher = make_linear(activation="softmax")
        distiller = Distiller(make_linear(seed=1), teacher)
        with pytest.warns(UserWarning, match="`student`.*logits") as record:
            distiller.compile("sgd", loss=PTLoss(0.5))
        assert record[0].filename == __file__
        distiller = Distiller(make_linear(activation="softmax"), teacher)
        distiller.compile("sgd", loss=PTLoss(0.5))
        with pytest.warns(UserWarning, match="`teacher`.*logits") as record:
            distiller.teacher = make_linear()
        assert record[0].filename == __file__

    @pytest.mark.parametrize("data", ["array", "tf.data", "PyDataset"])
    def test_class_weight_without_labels(self, x, data):
        class Batches(keras.utils.PyDataset):
            def __len__(self):
                return 1

            def __getitem__(self, index):
                return (x,)

        batches = x
        if data == "tf.data":
            tf = pytest.importorskip("tensorflow")
            batches = tf.data.Dataset.from_tensors((x,))
        elif data == "PyDataset":
            batches = Batches()
        with pytest.raises(ValueError, match="`class_weight` must come with"):
            distil(make_linear(), make_linear(seed=1)).fit(
                batches, class_weight={0: 1.0, 1: 2.0}
            )

    @pytest.mark.parametrize(
        "call, before",
        [
            ("fit", (None, 32, 1, 0, None, 0.0, None, True)),
            ("train_on_batch", (None, None)),
        ],
    )
    @pytest.mark.parametrize("by_name", [False, True])
    def test_class_weight_of_a_call(self, x, call, before, by_name):
        """By its name, and by its place in Keras's signature."""
        weight = {0: 1.0, 1: 2.0}
        given = {"class_weight": weight} if by_name else {}
        arguments = () if by_name else (*before, weight)
        distiller = distil(make_linear(), make_linear(seed=1))
        with pytest.raises(ValueError, match="`class_weight` must come with"):
            getattr(distiller, call)(x, *arguments, **given)

    @pytest.mark.parametrize(
        "call, before",
        [
            ("fit", (None, 32, 1, 0, None, 0.0, None, True, None)),
            ("evaluate", (None, 32, 0)),
            ("train_on_batch", (None,)),
            ("test_on_batch", (None,)),
        ],
    )
    @pytest.mark.parametrize("by_name", [False, True])
    def test_sample_weight_of_a_call(self, x, call, before, by_name):
        weight = np.ones(len(x))
        given = {"sample_weight": weight} if by_name else {}
        arguments = () if by_name else (*before, weight)
        distiller = distil(make_linear(), make_linear(seed=1))
        with pytest.raises(ValueError, match="`sample_weight` must come with"):
            getattr(distiller, call)(x, *arguments, **given)

    def test_class_weight_with_labels(self, x, y):
        """It weighs the teacher's rows by the labels, as Keras's does."""
        student, teacher = make_linear(), make_linear(seed=1)
        distiller = Distiller(student, teacher)
        distiller.compile(keras.optimizers.SGD(0.0), loss=logits_loss())
        weights = np.array([1.0, 3.0, 0.0])
        history = distiller.fit(
            x, y, class_weight=dict(enumerate(weights)), verbose=0
        ).history
        values = pt_losses(logits(teacher, x), logits(student, x)) * weights[y]
        np.testing.assert_allclose(history["loss"], values.mean(), rtol=1e-5)

    @pytest.mark.parametrize("built", [False, True])
    def test_student_on_layers_of_the_teacher(self, x, built):
        shared = keras.layers.Dense(8)
        teacher = keras.Sequential(
            [keras.Input((FEATURES,)), shared, keras.layers.Dense(CLASSES)]
        )
        student = keras.Sequential([shared, keras.layers.Dense(CLASSES)])
        if built:
            student.build((None, FEATURES))
        with pytest.raises(ValueError, match="share no trainable weight"):
            distil(student, teacher).fit(x, verbose=0)
        shared.trainable = False
        before = teacher.predict(x, verbose=0)
        distil(student, teacher).fit(x, verbose=0)
        np.testing.assert_array_equal(before, teacher.predict(x, verbose=0))

    @calls
    @pytest.mark.parametrize("several", ["dict", "list", "late list"])
    def test_teacher_of_several_outputs(self, x, several, call):
        inputs = keras.Input((FEATURES,))
        outputs = [keras.layers.Dense(CLASSES)(inputs) for _ in range(2)]
        if several == "dict":
            outputs = {"a": outputs[0], "b": outputs[1]}
        teacher = keras.Model(inputs, outputs)
        late = keras.Sequential([keras.layers.Dense(CLASSES)])
        student = late if several == "late list" else make_linear(seed=1)
        with pytest.raises(ValueError, match="`teacher` must give one tensor"):
            run(distil(student, teacher), call, x)

    def test_student_of_several_outputs(self, x):
        inputs = keras.Input((FEATURES,))
        outputs = [keras.layers.Dense(CLASSES)(inputs) for _ in range(2)]
        with pytest.raises(ValueError, match="`student` must give one tensor"):
            distil(keras.Model(inputs, outputs), make_model())

    def test_student_as_its_own_teacher(self):
        model = make_model()
        with pytest.raises(ValueError, match="`teacher` must be another model"):
            Distiller(model, model)

    def test_class_counts_differ(self):
        with pytest.raises(ValueError, match="same number of classes.*with 5"):
            distil(make_model(), make_model(5))

    @calls
    def test_class_counts_differ_seen_on_the_first_batch(self, x, call):
        late = keras.Sequential([keras.layers.Dense(5)])
        distiller = Distiller(make_model(), late)
        distiller.compile("sgd", loss=logits_loss())
        with pytest.raises(ValueError, match="same number of classes"):
            run(distiller, call, x)

    @calls
    def test_probabilities_taken_for_logits_seen_on_the_first_batch(
        self, x, call
    ):
        """Nothing says what a subclassed model gives, but its rows."""

        class Late(keras.Model):
            def __init__(self):
                super().__init__()
                self.dense = keras.layers.Dense(CLASSES)

            def call(self, inputs):
                return self.dense(inputs)

        distiller = Distiller(make_linear(), Late())
        distiller.compile(
            "sgd",
            loss=PTLoss(0.5, from_logits=True, teacher_from_logits=False),
            run_eagerly=True,
        )
        with pytest.raises(ValueError, match="say teacher_from_logits=True"):
            run(distiller, call, x)

    def test_teacher_that_is_no_model(self):
        with pytest.raises(ValueError, match="behind an API"):
            Distiller(make_model(), lambda x: x)

    def test_student_that_is_no_model(self):
        with pytest.raises(ValueError, match="`student` must be a Keras model"):
            Distiller("bert", make_model())

    def test_weights_of_another_length(self):
        with pytest.raises(ValueError, match="`teacher_weights`.*1 teachers"):
            Distiller(make_model(), make_model(seed=1), teacher_weights=[1, 2])

    def test_negative_weights(self):
        with pytest.raises(ValueError, match="`teacher_weights`.*-1"):
            Distiller(make_model(), make_model(seed=1), teacher_weights=[-1])

    @pytest.mark.parametrize(
        "weights", [[np.inf, 1.0], [1e308, 1e308], ["a", 1.0], {"a": 1.0}]
    )
    def test_weights_that_are_no_numbers(self, weights):
        with pytest.raises(ValueError, match="`teacher_weights` must be fin"):
            Distiller(
                make_model(),
                [make_model(seed=1), make_model(seed=2)],
                teacher_weights=weights,
            )

    def test_hard_label_loss_without_a_weight(self):
        loss = keras.losses.MeanSquaredError()
        with pytest.raises(ValueError, match="`hard_label_weight` must.*None"):
            Distiller(make_model(), hard_label_loss=loss)
        unused = Distiller(
            make_model(), hard_label_loss=loss, hard_label_weight=0.0
        )
        assert unused.hard_label_weight == 0.0
        assert Distiller(make_model()).hard_label_weight == 0.0

    @pytest.mark.parametrize("call", ["fit", "train_on_batch"])
    def test_nothing_to_train_for(self, x, call):
        """With labels alone, or losses of its own, a student is trained."""
        distiller = Distiller(make_linear(), make_linear(seed=1))
        distiller.compile("sgd")
        if BACKEND == "jax":  # Keras refuses it on others
            distiller.evaluate(x, verbose=0)
        with pytest.raises(ValueError, match="`loss` must be given.*None"):
            run(distiller, call, x)

    @pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan")])
    def test_hard_label_weight_out_of_range(self, weight):
        with pytest.raises(ValueError, match="`hard_label_weight`"):
            Distiller(
                make_model(),
                make_model(seed=1),
                hard_label_loss=keras.losses.MeanSquaredError(),
                hard_label_weight=weight,
            )

    def test_hard_label_weight_without_a_loss(self):
        with pytest.raises(ValueError, match="`hard_label_loss`"):
            Distiller(make_model(), make_model(seed=1), hard_label_weight=0.5)

    def test_hard_label_loss_that_is_no_loss(self):
        with pytest.raises(ValueError, match="`hard_label_loss`.*'mse'"):
            Distiller(
                make_model(),
                make_model(seed=1),
                hard_label_loss="mse",
                hard_label_weight=0.5,
            )

    @calls
    def test_hard_labels_missing(self, x, call):
        distiller = distil(
            make_model(),
            make_model(seed=1),
            hard_label_loss=keras.losses.MeanSquaredError(),
            hard_label_weight=0.5,
        )
        with pytest.raises(ValueError, match="`y` must hold labels"):
            run(distiller, call, x)

    @calls
    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_inputs_without_the_key(self, x, call, side):
        keys = {"student_inputs": "a", "teacher_inputs": "a"}
        distiller = distil(
            make_model(),
            make_model(seed=1),
            **{**keys, f"{side}_inputs": "b"},
        )
        # Keras 3.12 wraps it, where it builds the model by calling it.
        errors = (ValueError, RuntimeError)
        with pytest.raises(errors, match=rf"`{side}_inputs`.*\['a'\]"):
            run(distiller, call, {"a": x})

    @pytest.mark.parametrize("argument", ["student_inputs", "teacher_inputs"])
    def test_keys(self, x, argument):
        for key in (3, ["a"]):
            match = f"`{argument}` must be a key of x.*Received: {argument}="
            with pytest.raises(ValueError, match=match):
                Distiller(make_model(), make_model(), **{argument: key})
        distiller = distil(make_model(), make_model(seed=1), **{argument: "a"})
        errors = (ValueError, RuntimeError)
        match = f"`{argument}` must be None where x is no dict.*='a'"
        with pytest.raises(errors, match=match):
            run(distiller, "fit", x)

    @calls
    def test_no_teacher(self, x, call):
        with pytest.raises(ValueError, match="`teacher` must be set"):
            run(distil(make_model(), None), call, x)

    @pytest.mark.skipif(BACKEND == "jax", reason="JAX takes distributions")
    @calls
    def test_distribution(self, x, call):
        distiller = distil(make_linear(), make_linear(seed=1))
        try:
            devices = keras.distribution.DataParallel(devices=["cpu:0"])
        except AttributeError:
            pytest.skip("Keras 3.12 makes none on this backend")
        keras.distribution.set_distribution(devices)
        try:
            with pytest.raises(ValueError, match="`keras.distribution` must"):
                run(distiller, call, x)
        finally:
            keras.distribution.set_distribution(None)
