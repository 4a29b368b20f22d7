"""A distiller trains as the student alone does on the teacher's outputs.

The oracle is Keras: the same student, fitted on what the teacher predicts.
"""

import contextlib

import keras
import numpy as np
import pytest
from distillers import FEATURES, logits_loss

from keras_ptloss import Distiller

BACKEND = keras.backend.backend()
CLASSES = 3
POLICIES = ["float32", "mixed_bfloat16", "mixed_float16"]
# The last two have no weights before their first batch.
KINDS = ["functional", "sequential", "deferred", "subclassed"]
RUN = {"batch_size": 8, "verbose": 0}
FIT = {**RUN, "epochs": 2, "shuffle": False}


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
    if kind == "deferred":
        return keras.Sequential(layers(seed))
    if kind == "sequential":
        return keras.Sequential([keras.Input((FEATURES,)), *layers(seed)])
    inputs = outputs = keras.Input((FEATURES,))
    for layer in layers(seed):
        outputs = layer(outputs)
    return keras.Model(inputs, outputs)


@contextlib.contextmanager
def under(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    yield
    keras.config.set_dtype_policy(before)


@pytest.fixture(params=POLICIES)
def policy(request):
    with under(request.param):
        yield request.param


@pytest.fixture
def x():
    """Numbers near 300, which bfloat16 holds to 2 only."""
    noise = np.random.default_rng(0).normal(size=(32, FEATURES))
    return (300.0 + noise).astype("float32")


def pair(kind, teacher_kind=None, teacher_policy=None):
    """Return a distiller, the same student alone, and a copy of the teacher.

    Students are compiled alike. The distiller's teacher was not called yet.
    """
    with under(teacher_policy or keras.config.dtype_policy()):
        teacher, copy = (make(teacher_kind or kind, 2) for _ in range(2))
    if (teacher_kind or kind) == "deferred":
        # On PyTorch the first `predict` of a Sequential that is not built
        # rounds its inputs to the model's dtype, which later ones do not.
        copy.build((None, FEATURES))
    student, alone = make(kind, 1), make(kind, 1)
    distiller = Distiller(student, teacher)
    for model in (distiller, alone):
        model.compile(keras.optimizers.SGD(0.1), loss=logits_loss())
    return distiller, alone, copy


def same(one, two, *, apart=False):
    """Compare to the last digit, unless `apart` on JAX.

    Args:
        one: what the distiller gives.
        two: what the student alone gives.
        apart: whether the teacher is in one of the programs, and not in the
            other. JAX compiles it and the student into one, and may then
            round otherwise.
    """
    one, two = (
        np.asarray(keras.ops.convert_to_numpy(value), "float32")
        for value in (one, two)
    )
    if apart and BACKEND == "jax":
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_array_equal(one, two)


def same_weights(distiller, alone):
    ours = distiller.student.get_weights()
    for a, b in zip(ours, alone.get_weights(), strict=True):
        same(a, b, apart=True)


def compare_fit_and_evaluate(distiller, alone, x, targets):
    """Train both and judge both; the teacher is first seen in training."""
    ours = distiller.fit(x, **FIT).history["loss"]
    same(ours, alone.fit(x, targets, **FIT).history["loss"], apart=True)
    same_weights(distiller, alone)
    ours = distiller.evaluate(x, return_dict=True, **RUN)["loss"]
    its = alone.evaluate(x, targets, return_dict=True, **RUN)["loss"]
    same(ours, its, apart=True)


@pytest.mark.parametrize("kind", KINDS)
class TestAsTheStudentAlone:
    def test_fit_and_evaluate(self, x, kind, policy):
        distiller, alone, copy = pair(kind)
        compare_fit_and_evaluate(distiller, alone, x, copy.predict(x, **RUN))
        assert type(distiller.optimizer) is type(alone.optimizer)
        scaled = keras.optimizers.LossScaleOptimizer
        assert isinstance(alone.optimizer, scaled) == (
            policy == "mixed_float16"
        )

    def test_predict_and_call(self, x, kind, policy):
        distiller, alone, _ = pair(kind)
        ours, its = (model.predict(x, **RUN) for model in (distiller, alone))
        assert ours.dtype == its.dtype
        same(ours, its)
        ours, its = distiller(x), alone(x)
        assert ours.dtype == its.dtype
        same(ours, its)

    @pytest.mark.parametrize("policy", POLICIES[::2], indirect=True)
    def test_on_batches(self, x, kind, policy):
        distiller, alone, copy = pair(kind)
        targets = copy.predict(x, batch_size=32, verbose=0)
        for _ in range(2):
            ours = distiller.train_on_batch(x, return_dict=True)
            its = alone.train_on_batch(x, targets, return_dict=True)
            same(ours["loss"], its["loss"], apart=True)
        same_weights(distiller, alone)
        ours = distiller.test_on_batch(x, return_dict=True)
        its = alone.test_on_batch(x, targets, return_dict=True)
        same(ours["loss"], its["loss"], apart=True)


@pytest.mark.parametrize(
    "kind, teacher_kind",
    [
        ("deferred", "deferred"),
        ("subclassed", "functional"),
        ("functional", "subclassed"),
    ],
)
@pytest.mark.parametrize("call", ["evaluate", "test_on_batch"])
def test_judged_before_all_is_built(x, kind, teacher_kind, call):
    distiller, alone, copy = pair(kind, teacher_kind)
    run = {"return_dict": True} | (RUN if call == "evaluate" else {})
    targets = copy.predict(x, **RUN)
    ours = getattr(distiller, call)(x, **run)["loss"]
    its = getattr(alone, call)(x, targets, **run)["loss"]
    same(ours, its, apart=True)


@pytest.mark.parametrize("kind", ["functional", "subclassed"])
@pytest.mark.parametrize(
    "policy, teacher_policy",
    [("float32", "mixed_bfloat16"), ("mixed_bfloat16", "float32")],
    indirect=["policy"],
)
def test_teacher_of_another_policy(x, kind, policy, teacher_policy):
    distiller, alone, copy = pair(kind, teacher_policy=teacher_policy)
    compare_fit_and_evaluate(distiller, alone, x, copy.predict(x, **RUN))


@pytest.mark.skipif(BACKEND == "torch", reason="Keras refuses it on PyTorch")
@pytest.mark.parametrize("steps", [1, 3])
def test_steps_per_execution(x, steps):
    distiller, alone, copy = pair("sequential")
    targets = copy.predict(x, **RUN)
    for model, data in ((distiller, (x,)), (alone, (x, targets))):
        model.compile("sgd", loss=logits_loss(), steps_per_execution=steps)
        model.fit(*data, **FIT)
    same_weights(distiller, alone)


class Words(keras.Model):
    """The mean of words' embeddings, in a head."""

    def __init__(self, seed):
        super().__init__()
        init = keras.initializers.RandomNormal(seed=seed)
        self.embed = keras.layers.Embedding(
            1001, 4, embeddings_initializer=init
        )
        self.head = keras.layers.Dense(CLASSES, kernel_initializer=init)

    def call(self, inputs):
        if isinstance(inputs, dict):
            inputs = inputs["words"]
        return self.head(keras.ops.mean(self.embed(inputs), axis=1))


class TestWordIds:
    """Above 256, where bfloat16 has no odd numbers; float16 above 2048."""

    @pytest.mark.parametrize("policy", POLICIES[1:], indirect=True)
    @pytest.mark.parametrize("dtype", ["int32", "float32"])
    @pytest.mark.parametrize("kind", ["functional", "dict"])
    def test_as_the_student_alone(self, x, policy, dtype, kind):
        """Whatever a wrapper would guess that the inputs are.

        Keras itself blurs those in floats of a subclassed model, in bfloat16.
        """

        def words(seed):
            if kind != "functional":
                return Words(seed)
            inputs = keras.Input((5,), dtype=dtype)
            return keras.Model(inputs, Words(seed).call(inputs))

        ids = np.random.default_rng(0).integers(257, 1001, (32, 5))
        data = ids.astype(dtype)
        if kind == "dict":
            data = {"words": data, "extra": x}
        student, alone = words(1), words(1)
        distiller = Distiller(student, words(2))
        for model in (distiller, alone):
            model.compile(keras.optimizers.SGD(1.0), loss=logits_loss())
        targets = words(2).predict(data, **RUN)
        same(distiller(data), alone(data))
        distiller.fit(data, **FIT)
        alone.fit(data, targets, **FIT)
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
