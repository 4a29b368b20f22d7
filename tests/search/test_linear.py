"""Calibration alone: gradients, the ridge, and the convex optimum."""

import helpers
import numpy as np
import pytest
import scipy.optimize

from keras_ptloss import ProxyTeacherSearch
from keras_ptloss.search import CalibrationSearch
from keras_ptloss.search._linear import (
    fit_linear,
    fit_temperature,
    objective_of_logits,
)
from keras_ptloss.search._objectives import OBJECTIVES

NLL = OBJECTIVES["nll"]
CLASSES, ROWS = 3, 200


@pytest.fixture(scope="module")
def problem():
    """Logits of a teacher that takes class 1 for class 0, and true labels."""
    truth = helpers.dirichlet(0, ROWS, CLASSES)
    confused = truth @ [[1.0, 0.0, 0.0], [0.6, 0.4, 0.0], [0.0, 0.0, 1.0]]
    return np.log(confused), helpers.draw_labels(truth, 1)


def ridge(d, b, penalty, rows):
    """The formula of the module, entry by entry."""
    classes = len(b)
    total = sum(d[c, c] ** 2 + b[c] ** 2 for c in range(classes))
    for c in range(classes):
        for k in range(classes):
            total += (c != k) * (classes - 1) * d[c, k] ** 2
    return penalty * classes / rows * total


@pytest.mark.parametrize("penalty", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("calibration", ["vector", "matrix"])
def test_is_the_optimum(problem, calibration, penalty):
    """Against SciPy's BFGS on the formula, with its own differences."""
    z, labels = problem
    s = fit_temperature(z, labels, NLL)
    u = max(s, 1.0 / np.mean([np.std(row) for row in z]))
    eye = np.eye(CLASSES)
    free = np.ones((3, 3), bool) if calibration == "matrix" else eye > 0

    def loss(vector):
        d = np.zeros((CLASSES, CLASSES))
        d[free] = vector[: free.sum()]
        b = vector[free.sum() :]
        q = helpers.softmax(z @ (s * eye + u * d).T + b)
        return helpers.nll(q, labels) + ridge(d, b, penalty, ROWS)

    best = scipy.optimize.minimize(loss, np.zeros(free.sum() + CLASSES))
    found = fit_linear(
        z, labels, NLL, calibration=calibration, penalty=penalty, scale=s
    ).calibration
    a = found.scale if calibration == "matrix" else np.diag(found.scale)
    vector = np.concatenate([((a - s * eye) / u)[free], found.bias])
    assert loss(vector) <= best.fun + 1e-6
    np.testing.assert_allclose(vector, best.x, atol=5e-3)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_slope(problem, name):
    z, labels = problem[0][:20], problem[1][:20]
    objective = OBJECTIVES[name]
    value, slope = objective_of_logits(z, labels, objective)
    assert value == pytest.approx(objective.score(helpers.softmax(z), labels))
    expected = helpers.numerical_gradient(
        lambda z: float(objective.score(helpers.softmax(z), labels)), z
    )
    np.testing.assert_allclose(slope, expected, atol=1e-7)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 8.0])
def test_temperature(temperature):
    truth = helpers.dirichlet(0, 4000, CLASSES)
    labels = helpers.draw_labels(truth, 1)
    scale = fit_temperature(temperature * np.log(truth), labels, NLL)
    assert scale * temperature == pytest.approx(1.0, abs=0.1)
    scan = np.linspace(0.5, 1.5, 1001) / temperature
    scores = [
        helpers.nll(helpers.softmax(s * temperature * np.log(truth)), labels)
        for s in scan
    ]
    assert scale == pytest.approx(scan[np.argmin(scores)], rel=2e-3)


def test_temperature_of_one_bad_error():
    """Its likelihood has no floor: 500 right by .1, one wrong by 10."""
    margins = np.array([0.1] * 500 + [-10.0])
    z = np.stack([margins, np.zeros(501)], axis=1)
    best = scipy.optimize.minimize_scalar(
        lambda s: np.logaddexp(0.0, -s * margins).mean(),
        bounds=(0.05, 20.0),
        method="bounded",
    )
    scale = fit_temperature(z, np.zeros(501, int), NLL)
    assert scale == pytest.approx(best.x, rel=1e-3)


def test_a_strong_ridge_leaves_the_temperature(problem):
    z, labels = problem
    s = fit_temperature(z, labels, NLL)
    found = fit_linear(
        z, labels, NLL, calibration="matrix", penalty=1e6, scale=s
    ).calibration
    np.testing.assert_allclose(found.scale, s * np.eye(CLASSES), atol=1e-4)


def test_a_teacher_turned_round_is_turned_back():
    """The best temperature makes it uniform: the matrix has no use for it."""
    truth = helpers.dirichlet(0, 400, CLASSES)
    labels = helpers.draw_labels(truth, 1)
    wrong = -np.log(truth)
    s = fit_temperature(wrong, labels, NLL)
    found = fit_linear(
        wrong, labels, NLL, calibration="matrix", penalty=0.01, scale=s
    ).calibration
    q = found(wrong, from_logits=True)
    assert helpers.nll(q, labels) < helpers.nll(truth, labels) + 0.02


@pytest.mark.parametrize("calibration", ["temperature", "vector", "matrix"])
def test_search(problem, calibration):
    z, labels = problem
    penalty = None if calibration == "temperature" else 0.1
    search = ProxyTeacherSearch(CalibrationSearch(calibration, penalty))
    result = search.search(z, labels, from_logits=True)
    q = result.proxy_teacher(z).probabilities
    assert result.score == pytest.approx(helpers.nll(q, labels))
    assert result.score <= result.score_at_zero
    assert result.solves == 0
    ndim = {"temperature": 0, "vector": 1, "matrix": 2}[calibration]
    assert result.correction.scale.ndim == ndim
    np.testing.assert_array_equal(result.epsilon, 0.0)
    assert result.method == "calibration"
    assert result.trials["calibration"] == [calibration]
