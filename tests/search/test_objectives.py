"""Objectives against loops and scikit-learn, derivatives by differences."""

import helpers
import numpy as np
import pytest

from keras_ptloss.search._objectives import (
    FLOOR,
    OBJECTIVES,
    brier,
    nll,
    nll_derivative,
    risk,
    risk_derivative,
)

NAMES = sorted(OBJECTIVES)


@pytest.fixture(params=[2, 3, 10])
def rows(request):
    q = helpers.dirichlet(0, 20, request.param)
    return q, helpers.draw_labels(q, seed=1)


def test_names():
    assert NAMES == ["brier", "nll", "risk"]
    assert all(OBJECTIVES[name].name == name for name in NAMES)


def test_risk(rows):
    np.testing.assert_allclose(risk(*rows), helpers.risk(*rows))


def test_nll_is_log_loss(rows):
    metrics = pytest.importorskip("sklearn.metrics")
    q, labels = rows
    expected = metrics.log_loss(labels, q, labels=range(q.shape[1]))
    np.testing.assert_allclose(nll(q, labels), expected)


def test_brier_is_mean_squared_distance(rows):
    q, labels = rows
    distance = [
        np.sum((row - np.eye(q.shape[1])[y]) ** 2)
        for row, y in zip(q, labels, strict=True)
    ]
    np.testing.assert_allclose(brier(q, labels), np.mean(distance))


def test_brier_of_two_classes_is_twice_sklearns():
    metrics = pytest.importorskip("sklearn.metrics")
    q = helpers.dirichlet(0, 30, 2)
    labels = helpers.draw_labels(q, seed=1)
    expected = 2 * metrics.brier_score_loss(labels, q[:, 1])
    np.testing.assert_allclose(brier(q, labels), expected)


@pytest.mark.parametrize("name", NAMES)
def test_derivative(rows, name):
    q, labels = rows
    objective = OBJECTIVES[name]
    expected = helpers.numerical_gradient(
        lambda p: objective.score(p, labels), q, step=1e-7
    )
    # At 1e-4 of 1 the differences themselves are coarse.
    np.testing.assert_allclose(
        objective.evaluate(q, labels)[1], expected, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axes", [(4,), (2, 3)])
def test_leading_axes_are_trials(name, axes):
    q = helpers.dirichlet(0, int(np.prod(axes)) * 8, 3).reshape(*axes, 8, 3)
    labels = np.random.default_rng(0).integers(0, 3, 8)
    objective = OBJECTIVES[name]
    score = objective.score(q, labels)
    derivative = objective.evaluate(q, labels)[1]
    assert score.shape == axes
    assert derivative.shape == q.shape
    for index in np.ndindex(axes):
        np.testing.assert_allclose(
            score[index], objective.score(q[index], labels)
        )
        np.testing.assert_allclose(
            derivative[index], objective.evaluate(q[index], labels)[1]
        )


class TestExactZerosAndOnes:
    Q = np.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])

    def test_perfect_rows_score_zero(self):
        one_hot, labels = np.eye(3), np.arange(3)
        for name in NAMES:
            score = OBJECTIVES[name].score(one_hot, labels)
            np.testing.assert_allclose(score, 0.0, atol=1e-12)

    def test_risk_with_zeros(self):
        labels = np.array([0, 1])
        np.testing.assert_allclose(
            risk(self.Q, labels), helpers.risk(self.Q, labels)
        )

    def test_nll_of_a_ruled_out_label_is_the_floor(self):
        labels = np.array([1, 1])
        expected = (-np.log(FLOOR) - np.log(0.5)) / 2
        np.testing.assert_allclose(nll(self.Q, labels), expected)

    @pytest.mark.parametrize("name", NAMES)
    def test_derivatives_are_finite(self, name):
        derivative = OBJECTIVES[name].evaluate(self.Q, np.array([0, 0]))[1]
        assert np.all(np.isfinite(derivative))

    def test_nll_is_flat_below_the_floor(self):
        derivative = nll_derivative(self.Q, np.array([1, 1]))
        np.testing.assert_array_equal(derivative[0], 0.0)

    def test_risk_of_perfect_rows_has_no_slope_of_distance(self):
        """At q = y the distance has no derivative: 0 stands for it."""
        derivative = risk_derivative(np.eye(2), np.arange(2))
        np.testing.assert_array_equal(derivative, 0.0)


@pytest.mark.parametrize("case", helpers.golden_parameters())
def test_golden_risk(case):
    value = risk(np.array(case["proxy_teacher"]), np.array(case["labels"]))
    np.testing.assert_allclose(value, case["risk_eq11"], rtol=1e-9)


def test_risk_derivative_near_a_vertex():
    """From q - y: sum q^2 - 2 q_y + 1 cancels to 0 there."""
    q = np.array([[1 - 3e-9, 3e-9], [0.4, 0.6]])
    slope = risk_derivative(q, np.array([0, 0]))
    assert np.abs(slope).max() < 1.0
