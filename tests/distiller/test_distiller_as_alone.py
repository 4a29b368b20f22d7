"""A distiller trains as the student alone does on the teacher's outputs.

The oracle is Keras: the same student, fitted on what the teacher predicts.
"""

import keras
import numpy as np
import pytest
from distillers import FEATURES, logits_loss

from keras_ptloss import Distiller

BACKEND = keras.backend.backend()
CLASSES = 3
POLICIES = ["float32", "mixed_bfloat16", "mixed_float16"]
KINDS = ["functional", "sequential", "subclassed"]


def layers(seed):
    init = keras.initializers.GlorotUniform(seed=seed)
    return [
        # In float32 as preprocessing is: bfloat16 would blur its input.
        keras.layers.Rescaling(1.0, offset=-300.0, dtype="float32"),
        keras.layers.Dense(8, "tanh", kernel_initializer=init),
        keras.layers.Dropout(0.5, seed=seed),
        keras.layers.Dense(CLASSES, kernel_initializer=init),
    ]


class Subclassed(keras.Model):
    def __init__(self, seed):
        super().__init__()
        self.steps = layers(seed)

    def call(self, x, training=None):
        for layer in self.steps:
            x = layer(x)
        return x


def make(kind, seed):
    if kind == "subclassed":
        return Subclassed(seed)
    if kind == "sequential":
        return keras.Sequential([keras.Input((FEATURES,)), *layers(seed)])
    inputs = outputs = keras.Input((FEATURES,))
    for layer in layers(seed):
        outputs = layer(outputs)
    return keras.Model(inputs, outputs)


@pytest.fixture(params=POLICIES)
def policy(request):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy(before)


@pytest.fixture
def x():
    """Numbers near 300, which bfloat16 holds to 2 only."""
    noise = np.random.default_rng(0).normal(size=(32, FEATURES))
    return (300.0 + noise).astype("float32")


def pair(kind):
    """Return a distiller and the same student alone, compiled alike."""
    student, teacher, alone = make(kind, 1), make(kind, 2), make(kind, 1)
    distiller = Distiller(student, teacher)
    for model in (distiller, alone):
        model.compile(keras.optimizers.SGD(0.1), loss=logits_loss())
    return distiller, alone


def same(one, two):
    """Compare to the last digit on TensorFlow.

    JAX compiles teacher and student into one program, which may round
    otherwise than two.
    """
    one, two = (
        np.asarray(keras.ops.convert_to_numpy(value), "float32")
        for value in (one, two)
    )
    if BACKEND == "tensorflow":
        np.testing.assert_array_equal(one, two)
    else:
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def same_weights(distiller, alone):
    ours = distiller.student.get_weights()
    for a, b in zip(ours, alone.get_weights(), strict=True):
        same(a, b)


@pytest.mark.parametrize("kind", KINDS)
class TestAsTheStudentAlone:
    def test_fit_and_evaluate(self, x, kind, policy):
        distiller, alone = pair(kind)
        run = {"batch_size": 8, "verbose": 0}
        targets = distiller.teacher.predict(x, **run)
        fit = {**run, "epochs": 2, "shuffle": False}
        ours = distiller.fit(x, **fit).history["loss"]
        same(ours, alone.fit(x, targets, **fit).history["loss"])
        assert type(distiller.optimizer) is type(alone.optimizer)
        scaled = keras.optimizers.LossScaleOptimizer
        assert isinstance(alone.optimizer, scaled) == (
            policy == "mixed_float16"
        )
        same_weights(distiller, alone)
        ours = distiller.evaluate(x, return_dict=True, **run)["loss"]
        same(ours, alone.evaluate(x, targets, return_dict=True, **run)["loss"])

    def test_predict_and_call(self, x, kind, policy):
        distiller, alone = pair(kind)
        ours, its = (
            model.predict(x, batch_size=8, verbose=0)
            for model in (distiller, alone)
        )
        assert ours.dtype == its.dtype
        same(ours, its)
        ours, its = distiller(x), alone(x)
        assert ours.dtype == its.dtype
        same(ours, its)

    def test_on_batches(self, x, kind, policy):
        distiller, alone = pair(kind)
        targets = distiller.teacher.predict(x, batch_size=32, verbose=0)
        for _ in range(2):
            ours = distiller.train_on_batch(x, return_dict=True)
            its = alone.train_on_batch(x, targets, return_dict=True)
            same(ours["loss"], its["loss"])
        same_weights(distiller, alone)
        ours = distiller.test_on_batch(x, return_dict=True)
        its = alone.test_on_batch(x, targets, return_dict=True)
        same(ours["loss"], its["loss"])


@pytest.mark.skipif(BACKEND == "torch", reason="Keras refuses it on PyTorch")
@pytest.mark.parametrize("steps", [1, 3])
def test_steps_per_execution(x, steps):
    distiller, alone = pair("sequential")
    targets = distiller.teacher.predict(x, batch_size=8, verbose=0)
    fit = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}
    for model, data in ((distiller, (x,)), (alone, (x, targets))):
        model.compile("sgd", loss=logits_loss(), steps_per_execution=steps)
        model.fit(*data, **fit)
    same_weights(distiller, alone)


def test_word_ids_of_a_subclassed_model(x):
    """The embedding's input is integers, whatever a wrapper would guess."""

    class Words(keras.Model):
        def __init__(self, seed):
            super().__init__()
            init = keras.initializers.RandomNormal(seed=seed)
            self.embed = keras.layers.Embedding(
                9, 4, embeddings_initializer=init
            )
            self.head = keras.layers.Dense(CLASSES, kernel_initializer=init)

        def call(self, inputs):
            words = self.embed(inputs["words"])
            return self.head(keras.ops.mean(words, axis=1))

    data = {"words": np.arange(32 * 5).reshape(32, 5) % 9, "extra": x}
    student, teacher, alone = Words(1), Words(2), Words(1)
    distiller = Distiller(student, teacher)
    for model in (distiller, alone):
        model.compile("sgd", loss=logits_loss())
    distiller.fit(data, batch_size=8, shuffle=False, verbose=0)
    targets = teacher.predict(data, batch_size=8, verbose=0)
    alone.fit(data, targets, batch_size=8, shuffle=False, verbose=0)
    same_weights(distiller, alone)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's tape")
def test_tape_keeps_nothing_of_the_teacher(x):
    """Its activations are gone when the student starts."""
    import weakref

    kept = []

    class Teacher(Subclassed):
        def call(self, x, training=None):
            for layer in self.steps:
                x = layer(x)
                kept.append(weakref.ref(x))
            return 1.0 * x

    class Watch(keras.layers.Layer):
        def call(self, x):
            alive.append(sum(reference() is not None for reference in kept))
            return x

    alive = []
    student = keras.Sequential([Watch(), *layers(1)])
    teacher = Teacher(2)
    teacher(x)
    student(x)
    distiller = Distiller(student, teacher)
    distiller.compile("sgd", loss=logits_loss(), run_eagerly=True)
    kept.clear(), alive.clear()
    distiller.train_on_batch(x)
    assert len(kept) == 4 and alive == [0]
