"""Flooding against |L - level| + level."""

import helpers
import keras
import numpy as np
import pytest
from keras import ops

from keras_ptloss import Distiller, PTLoss
from keras_ptloss.losses import Flooding

BACKEND = keras.backend.backend()
CLASSES = 4
MEANS = ["sum_over_batch_size", "mean", "mean_with_sample_weight"]
WEIGHT = np.array([0.0, 1.0, 2.0, 0.5, 1.0, 3.0], "float32")


def make_rows():
    """A teacher's probabilities and a student's logits."""
    logits = 2.0 * np.random.default_rng(0).normal(size=(6, CLASSES))
    teacher = helpers.softmax(logits[::-1])
    return teacher.astype("float32"), logits.astype("float32")


def inner_loss(**arguments):
    return PTLoss(0.5, from_logits=True, teacher_from_logits=False, **arguments)


class TestFlooding:
    @pytest.fixture
    def mean(self):
        """The inner loss of the rows, by NumPy."""
        return helpers.pt_loss_of_logits(*make_rows(), 0.5).mean()

    @pytest.fixture
    def rows(self):
        return make_rows()

    @pytest.mark.parametrize("reduction", MEANS)
    @pytest.mark.parametrize(
        "weight", [None, WEIGHT], ids=["plain", "weighted"]
    )
    @pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
    def test_floods_the_mean(self, rows, reduction, weight, factor):
        inner = inner_loss(reduction=reduction)
        mean = float(inner(*rows, sample_weight=weight))
        level = factor * mean
        value = Flooding(inner, level)(*rows, sample_weight=weight)
        np.testing.assert_allclose(value, abs(mean - level) + level, rtol=1e-6)

    def test_unweighted(self, rows, mean):
        value = Flooding(inner_loss(), 3.0)(*rows)
        np.testing.assert_allclose(value, 6.0 - mean, rtol=1e-5)

    @pytest.mark.parametrize("above", [True, False])
    def test_gradient_turns_below_the_level(self, rows, mean, above):
        teacher, logits = rows
        inner = inner_loss()
        flooded = Flooding(inner, mean - 0.1 if above else mean + 0.1)
        plain = helpers.gradient_of(lambda z: inner(teacher, z), logits)
        gradient = helpers.gradient_of(lambda z: flooded(teacher, z), logits)
        sign = 1.0 if above else -1.0
        np.testing.assert_allclose(gradient, sign * plain, rtol=1e-5)

    def test_zero_weighted(self, rows):
        """Nothing to learn; the value is the floor's mirror image."""
        teacher, logits = rows
        flooded = Flooding(inner_loss(), 0.5)
        weight = np.zeros(6, "float32")
        assert float(flooded(teacher, logits, sample_weight=weight)) == 1.0
        gradient = helpers.gradient_of(
            lambda z: flooded(teacher, z, sample_weight=weight), logits
        )
        np.testing.assert_array_equal(gradient, 0.0)

    def test_jit(self, rows, mean):
        flooded = Flooding(inner_loss(), 0.1)
        value = helpers.compiled(flooded)(*rows)
        np.testing.assert_allclose(value, abs(mean - 0.1) + 0.1, rtol=1e-5)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_dtype(self, rows, mean, dtype):
        flooded = Flooding(inner_loss(dtype=dtype), 0.1)
        value = flooded(*rows)
        assert keras.backend.standardize_dtype(value.dtype) == dtype
        np.testing.assert_allclose(
            float(ops.cast(value, "float32")),
            abs(mean - 0.1) + 0.1,
            rtol=2e-2,
        )

    def test_config(self):
        flooded = Flooding(PTLoss([0.5, 0.1], dtype="float16"), 0.2, name="f")
        again = keras.saving.deserialize_keras_object(
            keras.saving.serialize_keras_object(flooded)
        )
        assert again.get_config() == flooded.get_config()
        assert again.loss.epsilon.tolist() == [0.5, 0.1]
        assert again.dtype == "float16"

    def test_errors(self):
        with pytest.raises(ValueError, match="`loss` must be a keras.losses"):
            Flooding("mse", 0.1)
        for reduction in (None, "none", "sum"):
            with pytest.raises(
                ValueError, match=f"mean over the batch.*{reduction!r}"
            ):
                Flooding(PTLoss(0.0, reduction=reduction), 0.1)
        for level in (-0.1, np.inf):
            with pytest.raises(ValueError, match="`level` must be"):
                Flooding(PTLoss(0.0), level)

    def test_masked_tokens(self):
        """Padding does not count in the mean that is flooded."""
        tokens = np.array([[1, 2, 0], [3, 0, 0]])
        teacher = np.full((2, 3, 2), [0.9, 0.1], "float32")
        student = keras.Sequential(
            [
                keras.layers.Embedding(4, 3, mask_zero=True),
                keras.layers.Dense(2),
            ]
        )
        inner = PTLoss(0.0, from_logits=True, teacher_from_logits=False)
        student.compile(loss=inner)
        plain = student.evaluate(tokens, teacher, verbose=0)
        student.compile(loss=Flooding(inner, 3.0))
        flooded = student.evaluate(tokens, teacher, verbose=0)
        np.testing.assert_allclose(flooded, 6.0 - plain, rtol=1e-6)

    @pytest.mark.skipif(
        BACKEND != "tensorflow", reason="tf.distribute needs TensorFlow"
    )
    def test_each_replica_floods_its_part(self):
        import tensorflow as tf

        if len(tf.config.list_logical_devices("CPU")) < 2:
            pytest.skip("needs two logical devices: see conftest.py")
        x = np.ones((4, 2), "float32")
        soft_labels = np.array(
            [[0.5, 0.5], [0.5, 0.5], [1.0, 0.0], [1.0, 0.0]], "float32"
        )
        with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
            student = keras.Sequential(
                [keras.layers.Dense(2, kernel_initializer="zeros")]
            )
            inner = PTLoss(0.0, from_logits=True, teacher_from_logits=False)
            student.compile(loss=Flooding(inner, 0.2))
        value = student.evaluate(x, soft_labels, batch_size=4, verbose=0)
        # KL from the uniform student: 0 on one replica, log 2 on the other.
        np.testing.assert_allclose(value, (0.4 + np.log(2)) / 2, rtol=1e-5)

    def test_flooding_holds_the_level(self):
        x, soft_labels = helpers.soft_labelled(CLASSES)
        y_true = keras.utils.to_categorical(soft_labels.argmax(axis=1), CLASSES)
        student = helpers.linear_model(CLASSES)
        inner = PTLoss(0.0, from_logits=True, teacher_from_logits=False)
        student.compile(keras.optimizers.SGD(0.5), loss=Flooding(inner, 1.0))
        student.fit(x, y_true, epochs=60, batch_size=32, verbose=0)
        loss = float(inner(y_true, student.predict(x, verbose=0)))
        np.testing.assert_allclose(loss, 1.0, atol=0.1)

    @pytest.mark.parametrize("from_logits", [False, True])
    @pytest.mark.parametrize("teacher_from_logits", [False, True, None])
    def test_flags_are_the_flooded_losss(
        self, from_logits, teacher_from_logits
    ):
        inner = PTLoss(
            0.5,
            from_logits=from_logits,
            teacher_from_logits=teacher_from_logits,
        )
        flooded = Flooding(Flooding(inner, 0.2), 0.1)
        assert flooded.from_logits is inner.from_logits
        assert flooded.teacher_from_logits is inner.teacher_from_logits

    def test_other_losses_have_no_flags(self):
        flooded = Flooding(keras.losses.KLDivergence(), 0.1)
        assert not hasattr(flooded, "from_logits")
        assert not hasattr(flooded, "teacher_from_logits")

    def test_distiller_refuses_what_it_refuses_of_the_flooded_loss(self):
        teacher = helpers.linear_model(CLASSES, activation="softmax")
        distiller = Distiller(helpers.linear_model(CLASSES), teacher)
        loss = PTLoss(0.5, from_logits=True)
        for wrong in (loss, Flooding(loss, 0.1)):
            with pytest.raises(
                ValueError, match="`teacher_from_logits` must be False"
            ):
                distiller.compile("sgd", loss=wrong)
