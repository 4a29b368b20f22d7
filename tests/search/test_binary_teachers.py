"""A teacher of one column, searched and corrected as one of two columns."""

import helpers
import keras
import numpy as np
import pytest
import scipy.special
from keras import layers, ops

from keras_ptloss import (
    Correction,
    ProxyTeacher,
    ProxyTeacherSearch,
    proxy_teacher,
)
from keras_ptloss.losses import ProxyKLDivergence
from keras_ptloss.search import (
    CalibrationSearch,
    CrossValidatedSearch,
    GradientSearch,
    RandomSearch,
)

METHODS = {
    "default": CrossValidatedSearch(order=2),
    "per class": GradientSearch(order=2, per_class=True, penalty=0.01),
    "vector": CalibrationSearch("vector"),
    "vector and epsilon": GradientSearch(
        order=2, calibration="vector", penalty=0.01
    ),
    "random": RandomSearch(order=2, trials=5),
}
both_forms = pytest.mark.parametrize("from_logits", [False, True])


def columns(rows, from_logits):
    """Write one column, `p` or `z` of the second class, as two."""
    first = 0 * rows if from_logits else 1 - rows
    return np.concatenate([first, rows], axis=-1)


@pytest.fixture(scope="module")
def data():
    """Inputs, the teacher's logits, which are too sure, and labels."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 2)).astype("float32")
    z = x @ [[2.0], [1.0]]
    labels = (rng.random((300, 1)) < scipy.special.expit(z / 2 - 0.3)) * 1
    return x, z, labels[:, 0]


@both_forms
@pytest.mark.parametrize("name", METHODS)
def test_search(data, name, from_logits):
    _, z, labels = data
    one = z if from_logits else scipy.special.expit(z)
    two = columns(one, from_logits)
    search = ProxyTeacherSearch(METHODS[name], objective="nll")
    found, expected = (
        search.search(rows, labels, from_logits=from_logits)
        for rows in (one, two)
    )
    assert found.score == pytest.approx(expected.score, rel=1e-9)
    assert found.score < found.score_at_zero
    q = expected.proxy_teacher(two).probabilities
    assert expected.score == pytest.approx(helpers.nll(q, labels))
    np.testing.assert_allclose(
        found.proxy_teacher(one).probabilities, q, rtol=1e-9
    )


def head(from_logits, two):
    """A model that gives the logits of `data`, or their sigmoids."""
    inputs = keras.Input((2,))
    dense = layers.Dense(1, None if from_logits else "sigmoid", use_bias=False)
    outputs = dense(inputs)
    dense.set_weights([np.array([[2.0], [1.0]])])
    if two:
        first = 0 * outputs if from_logits else 1 - outputs
        outputs = layers.Concatenate()([first, outputs])
    return keras.Model(inputs, outputs)


@both_forms
def test_data_set_and_model(data, from_logits):
    x, z, labels = data
    search = ProxyTeacherSearch(METHODS["vector and epsilon"])
    results, models = [], []
    for two in (False, True):
        batches = zip(np.split(x, 3), np.split(labels, 3), strict=True)
        teacher = head(from_logits, two)
        results.append(search.search(teacher, batches, from_logits=from_logits))
        models.append(results[-1].proxy_model(teacher))
    one, two = results
    right = (scipy.special.softmax(columns(z, True), -1)[:, 1] > 0.5) * 1
    assert np.mean(right == labels) > 0.6  # labels are of the same rows
    assert one.score_at_zero == pytest.approx(
        helpers.nll(scipy.special.softmax(columns(z, True), -1), labels),
        rel=1e-5,
    )
    assert one.score == pytest.approx(two.score, rel=1e-5)
    got, expected = (model.predict(x, verbose=0) for model in models)
    assert got.shape == (300, 2)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    outputs = z if from_logits else scipy.special.expit(z)
    np.testing.assert_allclose(
        got, one.proxy_teacher(outputs).probabilities, atol=1e-5
    )


@both_forms
@pytest.mark.parametrize("epsilon", [[1.0, 0.5], [[1.0, 0.5], [-0.4, 2.0]]])
def test_layer_and_loss(data, from_logits, epsilon):
    """Against the solver in float64, on two columns."""
    z = data[1][:64]
    one = (z if from_logits else scipy.special.expit(z)).astype("float32")
    t = scipy.special.softmax(columns(z, True), axis=-1)
    right = proxy_teacher(t, epsilon).probabilities
    student = np.random.default_rng(1).normal(size=(64, 1)).astype("float32")
    expected = helpers.pt_loss_of_logits(right, columns(student, True), 0.0)
    layer = ProxyTeacher(epsilon, teacher_from_logits=from_logits)
    loss = ProxyKLDivergence(
        Correction(epsilon, teacher_from_logits=from_logits),
        from_logits=True,
        reduction=None,
    )
    for rows in (one, columns(one, from_logits)):
        np.testing.assert_allclose(
            ops.convert_to_numpy(layer(rows)), right, rtol=1e-5
        )
        for outputs in (student, columns(student, True)):
            np.testing.assert_allclose(
                loss(rows, outputs), expected, rtol=1e-4, atol=1e-6
            )
