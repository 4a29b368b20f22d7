"""One sigmoid output, or one logit, is two events: closed forms in NumPy."""

import helpers
import keras
import numpy as np
import pytest
import scipy.special
from keras import ops

from keras_ptloss import PTLoss
from keras_ptloss.losses import (
    Flooding,
    FocalLoss,
    LabelPerturbedLoss,
    LabelSmoothingLoss,
)

EPSILON = np.array([2.0, -0.4])
LEVEL = 5.0  # above every mean below
WEIGHT = np.array([0.0, 1.0, 2.0, 0.5, 1.0, 3.0], "float32")


def log_events(z):
    """Return `log p` and `log(1 - p)` of logits."""
    return -np.logaddexp(0, -z), -np.logaddexp(0, z)


def kl(t, z):
    log_p, log_1_p = log_events(z)
    negentropy = scipy.special.xlogy(t, t) + scipy.special.xlogy(1 - t, 1 - t)
    return negentropy - t * log_p - (1 - t) * log_1_p


def numpy_pt_loss(t, y, z):
    """Both events are perturbed: `1 - p` of one is `p` of the other."""
    p = scipy.special.expit(z)
    total = kl(t, z)
    for m, eps in enumerate(EPSILON, start=1):
        total = total + eps * (t * (1 - p) ** m + (1 - t) * p**m)
    return total


def numpy_label_smoothing(t, y, z):
    return kl(0.8 * t + 0.1, z)


def numpy_focal(t, y, z):
    p = scipy.special.expit(z)
    log_p, log_1_p = log_events(z)
    second = (1 - t) * p**1.5 * log_1_p
    return -(t * (1 - p) ** 1.5 * log_p + second)


def numpy_label_perturbed(t, y, z):
    p = scipy.special.expit(z)
    return kl(t, z) + 0.3 * np.where(y == 1, 1 - p, p)


LOSSES = {
    "pt_loss": (PTLoss, EPSILON, numpy_pt_loss),
    "label_smoothing": (LabelSmoothingLoss, 0.2, numpy_label_smoothing),
    "focal": (FocalLoss, 1.5, numpy_focal),
    "label_perturbed": (LabelPerturbedLoss, 0.3, numpy_label_perturbed),
}


@pytest.fixture(params=LOSSES, ids=LOSSES.keys())
def case(request):
    return Case(request.param)


class Case:
    """A loss, and rows `(6, 1)` of logits with their teacher and labels."""

    def __init__(self, name):
        self.loss, self.number, self.reference = LOSSES[name]
        self.stacked = name == "label_perturbed"
        rng = np.random.default_rng(0)
        self.z = (2 * rng.normal(size=(6, 1))).astype("float32")
        self.teacher_z = (2 * rng.normal(size=(6, 1))).astype("float32")
        self.t = scipy.special.expit(self.teacher_z)
        self.y = np.array([[0], [1], [1], [0], [1], [0]], "float32")

    def y_true(self, teacher, *, columns=1):
        """Return what the loss takes: a teacher, and labels beside it."""
        if not self.stacked:
            return teacher
        labels = self.y[np.arange(len(teacher)) % 6]
        if columns == 2:
            labels = np.concatenate([1 - labels, labels], axis=-1)
        return np.stack([teacher, labels], axis=-2)

    def build(self, **arguments):
        arguments.setdefault("from_logits", True)
        arguments.setdefault("teacher_from_logits", False)
        return self.loss(self.number, **arguments)

    def values(self, t, z):
        y = self.y[np.arange(len(z)) % 6]
        t, z = np.asarray(t, "float64"), np.asarray(z, "float64")
        return self.reference(t, y, z)[:, 0]

    @property
    def expected(self):
        return self.values(self.t, self.z)


def two(p):
    return np.concatenate([1 - p, p], axis=-1)


class TestValue:
    def test_logits(self, case):
        value = case.build(reduction=None)(case.y_true(case.t), case.z)
        assert value.shape == (6,)
        np.testing.assert_allclose(value, case.expected, rtol=1e-5, atol=1e-6)

    def test_sigmoids(self, case):
        student = scipy.special.expit(case.z)
        loss = case.build(reduction=None, from_logits=False)
        value = loss(case.y_true(case.t), student)
        np.testing.assert_allclose(value, case.expected, rtol=1e-5, atol=1e-6)

    def test_teacher_logit(self, case):
        loss = case.build(reduction=None, teacher_from_logits=True)
        value = loss(case.y_true(case.teacher_z), case.z)
        np.testing.assert_allclose(value, case.expected, rtol=1e-5, atol=1e-6)

    def test_two_columns_give_the_same(self, case):
        loss = case.build(reduction=None)
        y_true = case.y_true(two(case.t), columns=2)
        zeros = np.zeros_like(case.z)
        for student in (case.z, np.concatenate([zeros, case.z], axis=-1)):
            np.testing.assert_allclose(
                loss(y_true, student), case.expected, rtol=1e-5, atol=1e-6
            )

    def test_two_columns_of_the_student_alone(self, case):
        student = np.concatenate([np.zeros_like(case.z), case.z], axis=-1)
        value = case.build(reduction=None)(case.y_true(case.t), student)
        np.testing.assert_allclose(value, case.expected, rtol=1e-5, atol=1e-6)

    def test_sample_weighted(self, case):
        value = case.build()(case.y_true(case.t), case.z, sample_weight=WEIGHT)
        expected = np.mean(case.expected * WEIGHT)
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    def test_zero_weighted(self, case):
        value = case.build()(
            case.y_true(case.t), case.z, sample_weight=np.zeros(6)
        )
        assert float(value) == 0.0

    def test_leading_axes(self, case):
        y_true = case.y_true(case.t)
        value = case.build(reduction=None)(
            y_true.reshape(2, 3, *y_true.shape[1:]), case.z.reshape(2, 3, 1)
        )
        expected = case.expected.reshape(2, 3)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)

    def test_jit(self, case):
        value = helpers.compiled(case.build())(case.y_true(case.t), case.z)
        np.testing.assert_allclose(value, case.expected.mean(), rtol=1e-5)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_dtype(self, case, dtype):
        value = case.build(dtype=dtype)(case.y_true(case.t), case.z)
        assert keras.backend.standardize_dtype(value.dtype) == dtype
        value = float(ops.cast(value, "float32"))
        np.testing.assert_allclose(value, case.expected.mean(), rtol=2e-2)

    def test_flooded(self, case):
        value = Flooding(case.build(), LEVEL)(case.y_true(case.t), case.z)
        expected = 2 * LEVEL - case.expected.mean()
        np.testing.assert_allclose(value, expected, rtol=1e-5)


class TestGradient:
    def test_against_differences(self, case):
        loss = case.build(reduction="sum")
        gradient = helpers.gradient_of(
            lambda z: loss(case.y_true(case.t), z), case.z
        )
        expected = helpers.numerical_gradient(
            lambda z: case.values(case.t, z).sum(), case.z
        )
        np.testing.assert_allclose(gradient, expected, atol=1e-5)

    @pytest.mark.parametrize("from_logits", [False, True])
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_certain_students(self, case, from_logits, dtype):
        """Logits of +-1e4, probabilities of 0 and 1, certain teachers."""
        student = np.array([[0.0], [1.0], [1.0], [0.0]], "float32")
        y_true = case.y_true(np.array([[0.0], [0.0], [1.0], [1.0]], "float32"))
        if from_logits:
            student = 1e4 * (2 * student - 1)
        loss = case.build(reduction=None, from_logits=from_logits)
        student = ops.cast(student, dtype)
        assert np.all(np.isfinite(ops.convert_to_numpy(loss(y_true, student))))
        gradient = helpers.gradient_of(lambda z: loss(y_true, z), student)
        assert np.all(np.isfinite(gradient))


class TestConventions:
    def test_one_hot_teacher_is_binary_crossentropy(self):
        case = Case("pt_loss")
        ours = PTLoss(0.0, from_logits=True, teacher_from_logits=False)
        kerass = keras.losses.BinaryCrossentropy(from_logits=True)
        np.testing.assert_allclose(
            ours(case.y, case.z), kerass(case.y, case.z), rtol=1e-5
        )

    def test_focal_is_kerass(self):
        case = Case("focal")
        ours = case.build()(case.y, case.z)
        kerass = keras.losses.BinaryFocalCrossentropy(
            gamma=1.5, from_logits=True
        )(case.y, case.z)
        np.testing.assert_allclose(ours, kerass, rtol=1e-4)

    def test_epsilon_per_class(self):
        """Row 0 is of the first event, `1 - p`."""
        case = Case("pt_loss")
        epsilon = np.array([[3.0], [0.5]])
        loss = PTLoss(
            epsilon, from_logits=True, teacher_from_logits=False, reduction=None
        )
        t, p = case.t[:, 0], scipy.special.expit(case.z[:, 0])
        expected = kl(case.t, case.z)[:, 0]
        expected = expected + 3.0 * (1 - t) * p + 0.5 * t * (1 - p)
        np.testing.assert_allclose(
            loss(case.t, case.z), expected, rtol=1e-5, atol=1e-6
        )

    @pytest.mark.parametrize("teacher_from_logits", [False, True])
    def test_calibration(self, teacher_from_logits):
        """Platt scaling of the one logit, written for two events."""
        case = Case("pt_loss")
        loss = PTLoss(
            0.0,
            from_logits=True,
            teacher_from_logits=teacher_from_logits,
            teacher_temperature=2.0,
            teacher_bias=[0.0, -0.7],
            reduction=None,
        )
        t = scipy.special.expit(case.teacher_z.astype("float64") / 2 - 0.7)
        teacher = case.teacher_z if teacher_from_logits else case.t
        np.testing.assert_allclose(
            loss(teacher, case.z), kl(t, case.z)[:, 0], rtol=1e-4, atol=1e-6
        )


class TestModel:
    @pytest.mark.parametrize("from_logits", [False, True])
    def test_model_fit(self, case, tmp_path, from_logits):
        rng = np.random.default_rng(3)
        x = rng.normal(size=(24, 5)).astype("float32")
        t = rng.uniform(size=(24, 1)).astype("float32")
        activation = None if from_logits else "sigmoid"
        student = helpers.linear_model(1, activation=activation)
        student.compile(
            keras.optimizers.Adam(0.05),
            case.build(from_logits=from_logits),
            jit_compile=helpers.jit(from_logits),
        )
        y_true = case.y_true(t)
        losses = student.fit(x, y_true, epochs=8, verbose=0).history["loss"]
        assert losses[-1] < losses[0]
        value = student.evaluate(x, y_true, verbose=0)
        z = student.predict(x, verbose=0).astype("float64")
        z = z if from_logits else scipy.special.logit(z)
        expected = case.values(t, z).mean()
        np.testing.assert_allclose(value, expected, rtol=1e-4)
        student.save(tmp_path / "student.keras")
        again = keras.saving.load_model(tmp_path / "student.keras")
        np.testing.assert_allclose(
            again.evaluate(x, y_true, verbose=0), value, rtol=1e-6
        )


class TestErrors:
    def test_logits_for_sigmoids(self, case):
        loss = case.build(from_logits=False)
        student = scipy.special.expit(case.z)
        with pytest.raises(
            ValueError, match="`y_true` must hold.*teacher_from_logits=True"
        ):
            loss(case.y_true(case.teacher_z), student)
        with pytest.raises(ValueError, match="`y_pred` must hold.*from_logits"):
            loss(case.y_true(case.t), case.z)

    def test_three_classes_beside_one_column(self, case):
        rows = np.full((6, 3), 1 / 3, "float32")
        y_true = np.stack([rows, rows], axis=-2) if case.stacked else rows
        with pytest.raises(ValueError, match="same number of classes"):
            case.build()(y_true, case.z)
