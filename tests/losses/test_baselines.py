"""The baselines, against NumPy, Keras and each other's gradients."""

import helpers
import keras
import numpy as np
import pytest
from keras import ops

from keras_ptloss import PTLoss, pt_loss
from keras_ptloss.losses import (
    Flooding,
    FocalLoss,
    LabelSmoothingLoss,
    focal_epsilon,
    label_smoothing_epsilon,
    temperature_epsilon,
)

ORDER = 400


@pytest.fixture(scope="module")
def rows():
    """A teacher's probabilities and a student's logits."""
    rng = np.random.default_rng(0)
    teacher = rng.dirichlet(np.ones(4), size=6).astype("float32")
    return teacher, rng.normal(size=(6, 4)).astype("float32")


def gradient(loss, teacher, logits):
    return helpers.gradient_of(lambda z: loss(teacher, z), logits)


def test_focal_loss_is_kerass(rows):
    teacher, logits = rows
    kerass = keras.losses.CategoricalFocalCrossentropy(
        alpha=1.0, gamma=1.5, from_logits=True
    )
    ours = FocalLoss(1.5, from_logits=True)
    np.testing.assert_allclose(ours(*rows), kerass(*rows), rtol=1e-5)
    student = helpers.softmax(logits).astype("float32")
    np.testing.assert_allclose(
        FocalLoss(1.5)(teacher, student), kerass(*rows), rtol=1e-5
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_is_finite_at_a_certain_student(gamma):
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]], "float32")
    loss = FocalLoss(gamma, from_logits=True)
    slope = gradient(loss, np.eye(2, dtype="float32"), logits)
    assert np.isfinite(slope).all()


def test_label_smoothing_against_numpy_and_keras(rows):
    teacher, logits = rows
    ours = LabelSmoothingLoss(0.2, from_logits=True)
    expected = helpers.pt_loss_of_logits(0.8 * teacher + 0.05, logits, 0.0)
    np.testing.assert_allclose(ours(*rows), expected.mean(), rtol=1e-5)
    kerass = keras.losses.CategoricalCrossentropy(
        from_logits=True, label_smoothing=0.2
    )
    np.testing.assert_allclose(
        gradient(ours, *rows), gradient(kerass, *rows), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("make", [FocalLoss, LabelSmoothingLoss])
def test_rows_of_zeros_and_of_weight_zero(rows, make):
    teacher, logits = (x.copy() for x in rows)
    loss = make(0.3, from_logits=True, reduction=None)
    before = ops.convert_to_numpy(loss(teacher, logits))
    teacher[1], teacher[2] = 0.0, np.nan
    weight = np.array([1, 1, 0, 1, 1, 1], "float32")
    value = ops.convert_to_numpy(loss(teacher, logits, weight))
    assert not value[1:3].any()
    np.testing.assert_allclose(value[3:], before[3:], rtol=1e-6)


class TestFlooding:
    def test_value(self, rows):
        mean = helpers.pt_loss_of_logits(*rows, [0.5]).mean()
        for level in (0.5 * mean, 2.0 * mean):
            loss = Flooding(PTLoss(0.5, from_logits=True), level)
            expected = abs(mean - level) + level
            np.testing.assert_allclose(loss(*rows), expected, rtol=1e-5)

    def test_gradient_turns_below_the_level(self, rows):
        inner = PTLoss(0.5, from_logits=True)
        np.testing.assert_allclose(
            gradient(Flooding(inner, 9.0), *rows),
            -gradient(inner, *rows),
            rtol=1e-6,
        )

    def test_weights_come_first(self, rows):
        weight = np.array([0, 0, 0, 1, 2, 3], "float32")
        inner = PTLoss(0.5, from_logits=True)
        loss = Flooding(inner, 9.0)
        expected = 18.0 - float(inner(*rows, weight))
        np.testing.assert_allclose(loss(*rows, weight), expected, rtol=1e-6)

    def test_needs_a_mean(self):
        with pytest.raises(ValueError, match="`loss` must take the mean"):
            Flooding(PTLoss(0.5, reduction="sum"), 1.0)
        with pytest.raises(ValueError, match="`loss` must be"):
            Flooding("kl_divergence", 1.0)


@pytest.mark.parametrize(
    "loss",
    [
        FocalLoss(1.5, from_logits=True, dtype="float16"),
        LabelSmoothingLoss(0.2, reduction="sum"),
        Flooding(FocalLoss(1.5, from_logits=True), 0.5),
    ],
    ids=lambda loss: loss.name,
)
def test_config_round_trip(loss):
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(loss)
    )
    assert again.get_config() == loss.get_config()
    assert again.dtype == loss.dtype


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FocalLoss(-1.0), "`gamma` must be"),
        (lambda: FocalLoss(keras.Variable(1.0)), "no effect"),
        (lambda: LabelSmoothingLoss(1.5), "`delta` must be .*at most 1"),
        (lambda: Flooding(PTLoss(0.0), -1.0), "`level` must be"),
        (lambda: focal_epsilon(1.5, 3), "`gamma` must be"),
        (lambda: temperature_epsilon([[1.0, 0.0]], 2.0, 3), "above 0"),
        (lambda: temperature_epsilon([[0.5, 0.5]], 0.0, 3), "above 0"),
        (lambda: label_smoothing_epsilon([[0.5, 0.5]], 2.0, 3), "at most 1"),
    ],
)
def test_wrong_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.fixture(scope="module")
def mild():
    """Rows on which a series of order 400 has converged."""
    rng = np.random.default_rng(1)
    teacher = rng.dirichlet(10 * np.ones(3), size=5).astype("float32")
    return teacher, rng.normal(size=(5, 3)).astype("float32")


class TestEquivalents:
    """PTLoss has the gradient of the loss that its coefficients stand for."""

    def check(self, epsilon, other, teacher, logits):
        def ours(t, z):
            return pt_loss(t, z, epsilon, from_logits=True)

        np.testing.assert_allclose(
            gradient(ours, teacher, logits),
            gradient(other, teacher, logits),
            atol=1e-5,
        )

    def test_focal(self, mild):
        other = FocalLoss(2.0, from_logits=True, reduction="sum")
        self.check(focal_epsilon(2, ORDER), other, *mild)

    def test_temperature(self, mild):
        other = PTLoss(
            0.0, teacher_temperature=2.0, from_logits=True, reduction="sum"
        )
        self.check(temperature_epsilon(mild[0], 2.0, ORDER), other, *mild)

    def test_label_smoothing(self, mild):
        other = LabelSmoothingLoss(0.3, from_logits=True, reduction="sum")
        self.check(label_smoothing_epsilon(mild[0], 0.3, ORDER), other, *mild)
