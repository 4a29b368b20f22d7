"""Class axes of unknown size, as `tf.data` generators have them.

TensorFlow's graphs see None there; JAX gets the arrays.
"""

import helpers
import keras
import numpy as np
import pytest

from keras_ptloss import Correction, PTLoss
from keras_ptloss.losses import (
    Flooding,
    FocalLoss,
    LabelPerturbedLoss,
    LabelSmoothingLoss,
    ProxyKLDivergence,
)

PT_LOSSES = {
    "shared": PTLoss([1.0, 0.5], from_logits=True, teacher_from_logits=False),
    "per_class": PTLoss(
        np.ones((3, 2)), from_logits=True, teacher_from_logits=False
    ),
    "probabilities": PTLoss([1.0, 0.5]),
    "vector": PTLoss(
        1.0,
        from_logits=True,
        teacher_from_logits=False,
        teacher_scale=[0.5, 1.0, 2.0],
        teacher_bias=[0.1, 0.0, 0.3],
    ),
    "matrix": PTLoss(
        1.0,
        from_logits=True,
        teacher_from_logits=False,
        teacher_scale=np.arange(9.0).reshape(3, 3) / 9,
    ),
}
BASELINES = {
    name: loss(0.3, from_logits=True, teacher_from_logits=False)
    for name, loss in {
        "label_smoothing": LabelSmoothingLoss,
        "focal": FocalLoss,
        "label_perturbed": LabelPerturbedLoss,
    }.items()
}
CORRECTED = {
    "corrected": Correction([1.0, 0.5], scale=0.8),
    "corrected_by_matrix": Correction(
        [1.0, 0.5], proxy_scale=np.eye(3) + 0.1, proxy_bias=[0.3, 0.0, -0.3]
    ),
}
LOSSES = {
    **PT_LOSSES,
    **{
        name: ProxyKLDivergence(correction, from_logits=True)
        for name, correction in CORRECTED.items()
    },
    **BASELINES,
    "flooding": Flooding(PT_LOSSES["shared"], 9.0),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def data(name, columns):
    """Inputs and what the loss takes, `(12, columns)`."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 5)).astype("float32")
    if columns == 1:
        y_true = rng.uniform(size=(12, 1))
        labels = rng.integers(0, 2, size=(12, 1))
    else:
        y_true = rng.dirichlet(np.ones(columns), 12)
        labels = np.eye(columns)[rng.integers(0, columns, 12)]
    if name == "label_perturbed":
        y_true = np.stack([y_true, labels], axis=-2)
    return x, y_true.astype("float32")


def batches(x, y_true, size=6):
    """A generator that says nothing of its sizes but the rank."""
    tf = pytest.importorskip("tensorflow")

    def generate():
        for start in range(0, len(x), size):
            yield x[start : start + size], y_true[start : start + size]

    return tf.data.Dataset.from_generator(
        generate,
        output_signature=(
            tf.TensorSpec((None, 5)),
            tf.TensorSpec((None,) * y_true.ndim),
        ),
    ).apply(tf.data.experimental.assert_cardinality(len(x) // size))


def student_of(name, classes, jit_compile=False):
    activation = None
    if name == "probabilities":
        activation = "softmax" if classes > 1 else "sigmoid"
    student = helpers.linear_model(classes, activation=activation)
    student.compile("sgd", LOSSES[name], jit_compile=jit_compile)
    return student


@pytest.mark.parametrize(
    ("name", "jit_compile"),
    [("shared", True), *((name, False) for name in LOSSES)],
)
def test_same_value_and_training(name, jit_compile):
    x, y_true = data(name, 3)
    known = student_of(name, 3, jit_compile)
    unknown = student_of(name, 3, jit_compile)
    np.testing.assert_allclose(
        unknown.evaluate(batches(x, y_true), verbose=0),
        known.evaluate(x, y_true, batch_size=6, verbose=0),
        rtol=1e-6,
    )
    unknown.fit(batches(x, y_true), shuffle=False, verbose=0)
    known.fit(x, y_true, batch_size=6, shuffle=False, verbose=0)
    for a, b in zip(unknown.get_weights(), known.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "name", ["shared", "probabilities", "corrected", *BASELINES, "flooding"]
)
@pytest.mark.parametrize("columns", [1, 2])
def test_binary_heads(name, columns):
    x, y_true = data(name, columns)
    student = student_of(name, 1)
    np.testing.assert_allclose(
        student.evaluate(batches(x, y_true), verbose=0),
        student.evaluate(x, y_true, batch_size=6, verbose=0),
        rtol=1e-6,
    )


def test_against_the_formula():
    x, y_true = data("shared", 3)
    student = student_of("shared", 3)
    expected = helpers.pt_loss_of_logits(
        y_true, student.predict(x, verbose=0), [1.0, 0.5]
    )
    value = student.evaluate(batches(x, y_true), verbose=0)
    np.testing.assert_allclose(value, expected.mean(), rtol=1e-5)


@every_loss
@pytest.mark.parametrize("columns", [1, 2, 4])
def test_other_class_counts_are_no_numbers(name, columns):
    """They would be broadcast, were they not looked at in the graph."""
    tf = pytest.importorskip("tensorflow")

    x, y_true = data(name, columns)
    student = student_of(name, 3)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        student.evaluate(batches(x, y_true), verbose=0)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="about graphs"
)
def test_both_axes_unknown():
    tf = pytest.importorskip("tensorflow")

    loss = LOSSES["shared"]
    y_true = data("shared", 3)[1]
    logits = np.random.default_rng(1).normal(size=(12, 3)).astype("float32")
    spec = tf.TensorSpec((None, None))
    graph = tf.function(loss, input_signature=[spec, spec])
    np.testing.assert_allclose(
        graph(y_true, logits),
        helpers.pt_loss_of_logits(y_true, logits, [1.0, 0.5]).mean(),
        rtol=1e-5,
    )
