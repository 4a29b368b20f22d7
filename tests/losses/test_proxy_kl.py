"""KL to the corrected teacher: values by NumPy, and the life of a loss."""

import helpers
import keras
import numpy as np
import pytest

from keras_ptloss import Correction, PTLoss, proxy_teacher
from keras_ptloss.losses import ProxyKLDivergence

CLASSES = 4
CORRECTION = Correction(
    [1.0, 0.5],
    scale=0.8,
    proxy_scale=np.eye(CLASSES) + 0.1,
    proxy_bias=[0.3, 0.0, 0.0, -0.3],
)


def corrected(teacher):
    t = helpers.softmax(0.8 * np.log(teacher))
    q = proxy_teacher(t, [1.0, 0.5]).probabilities
    scale, bias = np.eye(CLASSES) + 0.1, [0.3, 0.0, 0.0, -0.3]
    return helpers.softmax(np.log(q) @ scale.T + bias)


@pytest.fixture
def rows():
    teacher = helpers.dirichlet(0, 10, CLASSES)
    student = np.random.default_rng(1).normal(size=(10, CLASSES))
    return teacher.astype("float32"), student.astype("float32")


def expected(rows):
    return helpers.pt_loss_of_logits(corrected(rows[0]), rows[1], 0.0)


def test_config(rows):
    loss = ProxyKLDivergence(
        CORRECTION, from_logits=True, reduction="sum", name="mine"
    )
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert again.name == "mine"
    assert again.reduction == "sum"
    assert again.from_logits
    np.testing.assert_allclose(again(*rows), loss(*rows))


def test_unweighted(rows):
    loss = ProxyKLDivergence(CORRECTION, from_logits=True)
    np.testing.assert_allclose(loss(*rows), expected(rows).mean(), rtol=1e-5)


def test_probabilities(rows):
    teacher, student = rows
    loss = ProxyKLDivergence(CORRECTION)
    np.testing.assert_allclose(
        loss(teacher, helpers.softmax(student).astype("float32")),
        expected(rows).mean(),
        rtol=1e-5,
    )


def test_sample_weighted(rows):
    weights = np.arange(10.0)
    loss = ProxyKLDivergence(CORRECTION, from_logits=True)
    np.testing.assert_allclose(
        loss(*rows, sample_weight=weights),
        (weights * expected(rows)).mean(),
        rtol=1e-5,
    )
    assert float(loss(*rows, sample_weight=np.zeros(10))) == 0.0


def test_no_reduction(rows):
    loss = ProxyKLDivergence(CORRECTION, from_logits=True, reduction=None)
    np.testing.assert_allclose(loss(*rows), expected(rows), atol=1e-5)


def test_gradient(rows):
    """`p - q`: none goes through the correction."""
    teacher, student = rows
    loss = ProxyKLDivergence(CORRECTION, from_logits=True, reduction=None)
    gradient = helpers.gradient_of(lambda z: loss(teacher, z), student)
    np.testing.assert_allclose(
        gradient, helpers.softmax(student) - corrected(teacher), atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_students(rows, dtype):
    teacher, student = rows
    student = keras.ops.cast(student, dtype)
    loss = ProxyKLDivergence(CORRECTION, from_logits=True)
    exact = np.asarray(keras.ops.cast(student, "float32"))
    np.testing.assert_allclose(
        loss(teacher, student), expected((teacher, exact)).mean(), rtol=1e-4
    )


def test_same_optimum_as_pt_loss(rows):
    """Without a part after epsilon both gradients vanish at the proxy."""
    teacher, _ = rows
    epsilon = [1.5, 0.3]
    optimum = np.log(proxy_teacher(teacher, epsilon).probabilities)
    for loss in (
        PTLoss(epsilon, from_logits=True, teacher_from_logits=False),
        ProxyKLDivergence(Correction(epsilon), from_logits=True),
    ):
        gradient = helpers.gradient_of(
            lambda z, loss=loss: loss(teacher, z), optimum.astype("float32")
        )
        np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_model_fit_and_serialization(tmp_path):
    x, soft_labels = helpers.soft_labelled(CLASSES)
    model = helpers.linear_model(CLASSES)
    model.compile(
        keras.optimizers.Adam(0.05),
        loss=ProxyKLDivergence(CORRECTION, from_logits=True),
    )
    before = model.evaluate(x, soft_labels, verbose=0)
    expected_loss = helpers.pt_loss_of_logits(
        corrected(soft_labels), model.predict(x, verbose=0), 0.0
    )
    np.testing.assert_allclose(before, expected_loss.mean(), rtol=1e-4)
    history = model.fit(x, soft_labels, epochs=5, verbose=0).history["loss"]
    assert history[-1] < history[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        loaded.evaluate(x, soft_labels, verbose=0),
        model.evaluate(x, soft_labels, verbose=0),
        rtol=1e-6,
    )


def test_needs_a_correction():
    match = "`correction` must be a keras_ptloss.Correction.*0.5"
    with pytest.raises(ValueError, match=match):
        ProxyKLDivergence(0.5)


def test_logits_by_mistake(rows):
    loss = ProxyKLDivergence(CORRECTION, from_logits=True)
    with pytest.raises(ValueError, match="teacher_from_logits=True of the"):
        loss(rows[1], rows[1])


@pytest.mark.parametrize(
    ("correction", "match"),
    [
        (Correction(1.0, scale=[1.0, 2.0, 3.0]), "`y_true` must have the 3"),
        (Correction(proxy_scale=np.eye(3) + 1), "`y_true` must have the 3"),
        (Correction(np.ones((3, 2))), "`epsilon`.*4 classes"),
    ],
)
def test_other_class_counts(rows, correction, match):
    with pytest.raises(ValueError, match=match):
        ProxyKLDivergence(correction, from_logits=True)(*rows)
