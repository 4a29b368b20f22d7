"""PTLoss of a teacher that a matrix calibrates: `t = softmax(A z + b)`."""

import helpers
import keras
import numpy as np
import pytest
from keras import ops

from keras_ptloss import PTLoss, pt_loss

CLASSES = 4
EPSILON = np.array([2.0, -0.4, 1.5])
RNG = np.random.default_rng(0)
SCALES = {
    "vector": RNG.uniform(0.3, 2, CLASSES),
    "square": np.eye(CLASSES) + 0.3 * RNG.normal(size=(CLASSES, CLASSES)),
    "two_teachers": RNG.normal(size=(CLASSES, 2 * CLASSES)) / 2,
    "fewer_classes": RNG.normal(size=(CLASSES, 3)),
}
BIAS = RNG.normal(size=CLASSES)


@pytest.fixture(params=SCALES, ids=SCALES.keys())
def case(request):
    return Case(SCALES[request.param])


class Case:
    """A scale, a teacher for it, a student, and their reference."""

    def __init__(self, scale):
        self.scale = scale
        full = np.diag(scale) if scale.ndim == 1 else scale
        self.matrix = full
        rng = np.random.default_rng(1)
        z = rng.normal(size=(6, full.shape[1]))
        self.teacher_logits = (2 * z).astype("float32")
        self.logits = rng.normal(size=(6, CLASSES)).astype("float32")

    def teacher(self, z):
        return helpers.softmax(np.asarray(z, "float64") @ self.matrix.T + BIAS)

    def values(self, z, logits):
        return helpers.pt_loss_of_logits(self.teacher(z), logits, EPSILON)

    @property
    def expected(self):
        return self.values(self.teacher_logits, self.logits)

    def build(self, **arguments):
        arguments.setdefault("from_logits", True)
        return PTLoss(
            EPSILON, teacher_scale=self.scale, teacher_bias=BIAS, **arguments
        )


def test_unweighted(case):
    value = case.build()(case.teacher_logits, case.logits)
    np.testing.assert_allclose(value, case.expected.mean(), rtol=1e-5)


def test_no_reduction(case):
    value = case.build(reduction=None)(case.teacher_logits, case.logits)
    np.testing.assert_allclose(value, case.expected, rtol=1e-5, atol=1e-6)


def test_teacher_probabilities(case):
    """`z` is then the logarithm of each, and one row need not sum to 1."""
    p = helpers.softmax(case.teacher_logits).astype("float32")
    loss = case.build(reduction=None, teacher_from_logits=False)
    expected = case.values(np.log(p), case.logits)
    np.testing.assert_allclose(
        loss(p, case.logits), expected, rtol=1e-5, atol=1e-6
    )


def test_student_probabilities(case):
    student = helpers.softmax(case.logits).astype("float32")
    loss = case.build(
        reduction=None, from_logits=False, teacher_from_logits=True
    )
    np.testing.assert_allclose(
        loss(case.teacher_logits, student), case.expected, rtol=1e-5, atol=1e-6
    )


def test_sample_weighted(case):
    weight = np.array([0.0, 1.0, 2.0, 0.5, 1.0, 3.0], "float32")
    value = case.build()(case.teacher_logits, case.logits, sample_weight=weight)
    expected = np.mean(case.expected * weight)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_zero_weighted(case):
    value = case.build()(
        case.teacher_logits, case.logits, sample_weight=np.zeros(6)
    )
    assert float(value) == 0.0


def test_leading_axes(case):
    value = case.build(reduction=None)(
        case.teacher_logits.reshape(2, 3, -1), case.logits.reshape(2, 3, -1)
    )
    np.testing.assert_allclose(
        value, case.expected.reshape(2, 3), rtol=1e-5, atol=1e-6
    )


def test_jit(case):
    value = helpers.compiled(case.build())(case.teacher_logits, case.logits)
    np.testing.assert_allclose(value, case.expected.mean(), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(case, dtype):
    value = case.build(dtype=dtype)(case.teacher_logits, case.logits)
    assert keras.backend.standardize_dtype(value.dtype) == dtype
    value = float(ops.cast(value, "float32"))
    np.testing.assert_allclose(value, case.expected.mean(), rtol=3e-2)


def test_gradient_of_the_student(case):
    loss = case.build(reduction="sum")
    gradient = helpers.gradient_of(
        lambda z: loss(case.teacher_logits, z), case.logits
    )
    expected = helpers.numerical_gradient(
        lambda z: case.values(case.teacher_logits, z).sum(), case.logits
    )
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_gradient_of_the_teacher(case):
    loss = case.build(reduction="sum")
    gradient = helpers.gradient_of(
        lambda z: loss(z, case.logits), case.teacher_logits
    )
    expected = helpers.numerical_gradient(
        lambda z: case.values(z, case.logits).sum(), case.teacher_logits
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def test_huge_logits(case):
    z = (1e4 * np.sign(case.teacher_logits)).astype("float32")
    loss = case.build(reduction="sum")
    assert np.isfinite(float(loss(z, case.logits)))
    gradient = helpers.gradient_of(lambda s: loss(z, s), case.logits)
    assert np.all(np.isfinite(gradient))


def test_config(case):
    loss = case.build(teacher_temperature=2.0, name="mine", dtype="float16")
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(loss)
    )
    assert again.get_config() == loss.get_config()
    np.testing.assert_array_equal(again.teacher_scale, case.scale)
    np.testing.assert_array_equal(again.teacher_bias, BIAS)
    assert again.teacher_temperature == 2.0


def test_model_fit_and_serialization(case, tmp_path):
    x = np.random.default_rng(2).normal(size=(6, 5)).astype("float32")
    student = helpers.linear_model(CLASSES)
    student.compile(
        keras.optimizers.Adam(0.05), case.build(), jit_compile=helpers.jit()
    )
    z = case.teacher_logits
    losses = student.fit(x, z, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    value = student.evaluate(x, z, verbose=0)
    expected = case.values(z, student.predict(x, verbose=0)).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    student.save(tmp_path / "student.keras")
    again = keras.saving.load_model(tmp_path / "student.keras")
    assert again.loss.get_config() == student.loss.get_config()
    np.testing.assert_allclose(
        again.evaluate(x, z, verbose=0), value, rtol=1e-6
    )


def test_temperature_per_class_is_of_the_classes_that_come_out():
    """`(A z)_c / temperature_c`, not `A (z / temperature)`."""
    case = Case(SCALES["square"])
    temperature = np.array([0.5, 1.0, 2.0, 4.0])
    value = pt_loss(
        case.teacher_logits,
        case.logits,
        EPSILON,
        from_logits=True,
        teacher_temperature=temperature,
        teacher_scale=case.scale,
    )
    scaled = case.teacher_logits.astype("float64") @ case.scale.T
    teacher = helpers.softmax(scaled / temperature)
    expected = helpers.pt_loss_of_logits(teacher, case.logits, EPSILON)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "value", [0.0, [1.0, -1.0], [[np.nan]], np.ones((2, 2, 2)), "large", None]
)
def test_wrong_scale(value):
    with pytest.raises(
        ValueError, match="`teacher_scale` must be.*Received: teacher_scale="
    ):
        PTLoss(0.5, teacher_scale=value)


def test_other_class_counts():
    loss = Case(SCALES["two_teachers"]).build()
    rows = np.zeros((2, CLASSES), "float32")
    with pytest.raises(
        ValueError, match="`y_true` must have the 8 classes.*with 4 classes"
    ):
        loss(rows, rows)
    with pytest.raises(ValueError, match="same number of classes"):
        loss(np.zeros((2, 8), "float32"), rows[:, :3])
    with pytest.raises(ValueError, match="must be of the same classes"):
        PTLoss(0.5, teacher_scale=np.ones((3, 4)), teacher_bias=BIAS)
