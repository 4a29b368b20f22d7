"""The fit by L-BFGS-B: exact derivatives, bounds, never worse than plain KL."""

import dataclasses

import helpers
import numpy as np
import pytest

from keras_ptloss._calibration import Calibration
from keras_ptloss.search._examples import Examples
from keras_ptloss.search._fit import (
    SCALES,
    UPPER,
    Form,
    Point,
    fit,
    penalty_of,
    proxy,
    value_and_gradient,
)
from keras_ptloss.search._objectives import OBJECTIVES

pytestmark = pytest.mark.newest

CLASSES, ORDER = 3, 2


@pytest.fixture(scope="module")
def problem():
    """A teacher biased towards the first class, and labels of the truth."""
    truth = helpers.dirichlet(0, 120, CLASSES)
    teacher = helpers.skewed(truth, [1.0, 0.4, 0.2])
    labels = helpers.draw_labels(truth, seed=1)
    return Examples(np.log(teacher), teacher, labels, labels)


def form(calibration="none", shape="per_class", penalty=0.0):
    return Form(calibration, shape == "per_class", ORDER, penalty)


def random_point(calibration, shape, seed=0):
    generator = np.random.default_rng(seed)
    start = Point.start(form(calibration, shape), CLASSES)
    return Point(
        scale=generator.uniform(0.5, 1.5, start.scale.shape),
        bias=generator.normal(size=start.bias.shape),
        epsilon=generator.uniform(-0.3, 2.0, start.epsilon.shape),
    )


def run_fit(problem, what, objective="nll", **arguments):
    return fit(what, problem, OBJECTIVES[objective], **arguments)


class TestExamples:
    def test_calibrated(self, problem):
        calibration = Calibration([0.5, 1.0, 2.0], [0.1, 0.0, -0.3])
        np.testing.assert_allclose(
            problem.calibrated(calibration),
            helpers.calibrate(
                problem.logits, [2.0, 1.0, 0.5], [0.1, 0.0, -0.3]
            ),
        )

    def test_not_calibrated_is_untouched(self, problem):
        assert problem.calibrated(Calibration()) is problem.probabilities


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("calibration", ["temperature", "vector"])
@pytest.mark.parametrize("shape", ["shared", "per_class"])
@pytest.mark.parametrize("name", ["scale", "bias", "epsilon"])
def test_gradient(problem, objective, calibration, shape, name):
    objective = OBJECTIVES[objective]
    point = random_point(calibration, shape)

    def value(part):
        moved = dataclasses.replace(point, **{name: part})
        q, _ = proxy(problem.calibrated(moved.calibration), moved.epsilon)
        return objective.score(q, problem.labels)

    found, gradient, unconverged = value_and_gradient(problem, objective, point)
    part = getattr(point, name)
    assert unconverged == 0
    np.testing.assert_allclose(found, value(part))
    # A bias common to all classes changes nothing: its derivative is 0.
    np.testing.assert_allclose(
        getattr(gradient, name),
        helpers.numerical_gradient(value, part, step=1e-5),
        atol=1e-7,
    )


def test_gradient_does_not_depend_on_the_blocks(problem):
    """600 classes: several blocks of rows."""
    probabilities = helpers.dirichlet(0, 130, 600)
    labels = helpers.draw_labels(probabilities, seed=1)
    point = Point(np.asarray(1.0), np.asarray(0.0), np.array([0.5, 1.0]))
    nll = OBJECTIVES["nll"]
    examples = Examples(np.log(probabilities), probabilities, labels, labels)
    whole, by_whole, _ = value_and_gradient(examples, nll, point)
    parts = [
        value_and_gradient(examples[rows], nll, point)
        for rows in (slice(0, 65), slice(65, 130))
    ]
    np.testing.assert_allclose(whole, np.mean([part[0] for part in parts]))
    np.testing.assert_allclose(
        by_whole.epsilon, np.mean([part[1].epsilon for part in parts], axis=0)
    )


class TestPenalty:
    def test_value(self):
        parameters = Point(
            np.array([1.0, 2.0]), np.array([1.0, 3.0]), np.array([[1.0, 2.0]])
        )
        # Squared epsilon 5, spread of the scale 0.25, bias (1 + 9) / 2.
        assert penalty_of(parameters, 0.1)[0] == pytest.approx(0.1 * 10.25)

    @pytest.mark.parametrize("shape", ["shared", "per_class"])
    @pytest.mark.parametrize("name", ["scale", "bias", "epsilon"])
    def test_derivative(self, shape, name):
        parameters = random_point("vector", shape)
        expected = helpers.numerical_gradient(
            lambda part: penalty_of(
                dataclasses.replace(parameters, **{name: part}), 0.3
            )[0],
            getattr(parameters, name),
        )
        derivative = getattr(penalty_of(parameters, 0.3)[1], name)
        np.testing.assert_allclose(derivative, expected, atol=1e-8)

    def test_one_temperature_is_free(self):
        parameters = Point(np.asarray(3.0), np.asarray(0.0), np.zeros(2))
        assert penalty_of(parameters, 1.0)[0] == 0.0

    def test_penalty_shrinks(self, problem):
        sizes = [
            np.sum(run_fit(problem, form(penalty=w)).point.epsilon ** 2)
            for w in (0.0, 0.01, 1.0)
        ]
        assert sizes[0] > sizes[1] > sizes[2]


class TestFit:
    @pytest.mark.parametrize("objective", sorted(OBJECTIVES))
    @pytest.mark.parametrize("shape", ["shared", "per_class"])
    def test_never_above_the_score_at_zero(self, problem, objective, shape):
        fitted = run_fit(problem, form(shape=shape), objective)
        at_zero = OBJECTIVES[objective].score(
            problem.probabilities, problem.labels
        )
        assert fitted.value <= at_zero
        assert fitted.unconverged == 0
        assert fitted.evaluations > 0

    def test_per_class_repairs_the_bias(self, problem):
        shared = run_fit(problem, form(shape="shared")).value
        per_class = run_fit(problem, form()).value
        assert per_class < shared - 0.02

    def test_bounds(self, problem):
        fitted = run_fit(problem, form("vector"), starts=2)
        epsilon = fitted.point.epsilon
        assert np.all(epsilon >= -1.0 / np.arange(1, ORDER + 1))
        assert np.all(epsilon <= UPPER)
        low, high = SCALES
        assert np.all(fitted.point.scale >= low)
        assert np.all(fitted.point.scale <= high)
        assert fitted.unconverged == 0

    def test_several_starts_are_deterministic_and_not_worse(self, problem):
        one = run_fit(problem, form())
        first = run_fit(problem, form(), starts=3, seed=4)
        second = run_fit(problem, form(), starts=3, seed=4)
        np.testing.assert_array_equal(first.point.epsilon, second.point.epsilon)
        assert first.value == second.value
        assert first.value <= one.value
        assert first.evaluations > one.evaluations

    def test_is_a_local_minimum(self, problem):
        """At the end the projected gradient is zero."""
        fitted = run_fit(problem, form("temperature", "shared"))
        _, gradient, _ = value_and_gradient(
            problem, OBJECTIVES["nll"], fitted.point
        )
        epsilon = fitted.point.epsilon
        inside = (epsilon > -1.0 / np.arange(1, ORDER + 1)) & (epsilon < 10.0)
        np.testing.assert_allclose(gradient.epsilon[inside], 0.0, atol=1e-4)
        np.testing.assert_allclose(gradient.scale, 0.0, atol=1e-4)

    def test_value_contains_the_penalty(self, problem):
        fitted = run_fit(problem, form(penalty=0.05))
        q, _ = proxy(problem.probabilities, fitted.point.epsilon)
        squared = np.sum(fitted.point.epsilon**2) / CLASSES
        expected = helpers.nll(q, problem.labels) + 0.05 * squared
        assert fitted.value == pytest.approx(expected)


def test_gradient_where_the_hessian_vanishes():
    """A certain row stays where it is, on the edge of the convex domain too."""
    rows = np.eye(3)[[0, 1, 2, 0]]
    labels = np.array([0, 1, 0, 2])
    point = Point(
        scale=np.asarray(1.0),
        bias=np.asarray(0.0),
        epsilon=np.tile(-1.0 / np.arange(1, 6), (3, 1)),
    )
    examples = Examples(np.log(np.maximum(rows, 1e-7)), rows, labels, labels)
    _, gradient, _ = value_and_gradient(examples, OBJECTIVES["brier"], point)
    np.testing.assert_allclose(gradient.epsilon, 0.0, atol=1e-12)
    assert np.all(np.isfinite(gradient.scale))
