"""The fit by L-BFGS-B: exact derivatives, bounds, never worse than plain KL."""

import dataclasses

import helpers
import numpy as np
import pytest

from keras_ptloss.search._fit import (
    INVERSE_TEMPERATURES,
    Form,
    Parameters,
    Teacher,
    fit,
    penalty_of,
    proxy,
    value_and_gradient,
)
from keras_ptloss.search._objectives import OBJECTIVES

CLASSES, ORDER = 3, 2


@pytest.fixture(scope="module")
def problem():
    """A teacher biased towards the first class, and labels of the truth."""
    truth = helpers.dirichlet(0, 120, CLASSES)
    teacher = helpers.skewed(truth, [1.0, 0.4, 0.2])
    return Teacher(teacher, None), helpers.draw_labels(truth, seed=1)


def form(calibration="none", shape="per_class", penalty=0.0):
    return Form(calibration, shape, ORDER, penalty)


def random_parameters(calibration, shape, seed=0):
    generator = np.random.default_rng(seed)
    start = Parameters.start(form(calibration, shape), CLASSES)
    return Parameters(
        scale=generator.uniform(0.5, 1.5, start.scale.shape),
        bias=generator.normal(size=start.bias.shape),
        epsilon=generator.uniform(-0.3, 2.0, start.epsilon.shape),
    )


def run_fit(problem, what, objective="nll", **arguments):
    teacher, labels = problem
    return fit(
        what, teacher, labels, OBJECTIVES[objective], upper=10.0, **arguments
    )


class TestTeacher:
    def test_logits(self):
        logits = np.random.default_rng(0).normal(size=(5, 3))
        teacher = Teacher(None, logits)
        np.testing.assert_allclose(
            teacher.probabilities, helpers.softmax(logits)
        )

    @pytest.mark.parametrize("given", ["probabilities", "logits"])
    def test_calibrated(self, given):
        logits = np.random.default_rng(0).normal(size=(5, 3))
        if given == "probabilities":
            logits = np.log(helpers.softmax(logits))
            teacher = Teacher(helpers.softmax(logits), None)
        else:
            teacher = Teacher(None, logits)
        parameters = random_parameters("vector", "zero")
        np.testing.assert_allclose(
            teacher.calibrated(parameters),
            helpers.calibrate(logits, 1 / parameters.scale, parameters.bias),
        )

    def test_not_calibrated_is_untouched(self, problem):
        teacher = problem[0]
        start = Parameters.start(form(), CLASSES)
        assert teacher.calibrated(start) is teacher.probabilities


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("calibration", ["temperature", "vector"])
@pytest.mark.parametrize("shape", ["shared", "per_class"])
@pytest.mark.parametrize("name", ["scale", "bias", "epsilon"])
def test_gradient(problem, objective, calibration, shape, name):
    teacher, labels = problem
    objective = OBJECTIVES[objective]
    parameters = random_parameters(calibration, shape)

    def value(part):
        moved = dataclasses.replace(parameters, **{name: part})
        q, _ = proxy(teacher.calibrated(moved), moved.epsilon)
        return objective.score(q, labels)

    found, gradient, unconverged = value_and_gradient(
        teacher, labels, objective, parameters
    )
    part = getattr(parameters, name)
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
    parameters = Parameters(np.ones(1), np.zeros(1), np.array([[0.5, 1.0]]))
    nll = OBJECTIVES["nll"]
    whole, by_whole, _ = value_and_gradient(
        Teacher(probabilities, None), labels, nll, parameters
    )
    parts = [
        value_and_gradient(
            Teacher(probabilities[rows], None), labels[rows], nll, parameters
        )
        for rows in (slice(0, 65), slice(65, 130))
    ]
    np.testing.assert_allclose(whole, np.mean([part[0] for part in parts]))
    np.testing.assert_allclose(
        by_whole.epsilon, np.mean([part[1].epsilon for part in parts], axis=0)
    )


class TestPenalty:
    def test_value(self):
        parameters = Parameters(
            np.array([1.0, 2.0]), np.array([1.0, 3.0]), np.array([[1.0, 2.0]])
        )
        # Squared epsilon 5, spread of the scale 0.25, bias (1 + 9) / 2.
        assert penalty_of(parameters, 0.1)[0] == pytest.approx(0.1 * 10.25)

    @pytest.mark.parametrize("shape", ["shared", "per_class"])
    @pytest.mark.parametrize("name", ["scale", "bias", "epsilon"])
    def test_derivative(self, shape, name):
        parameters = random_parameters("vector", shape)
        expected = helpers.numerical_gradient(
            lambda part: penalty_of(
                dataclasses.replace(parameters, **{name: part}), 0.3
            )[0],
            getattr(parameters, name),
        )
        derivative = getattr(penalty_of(parameters, 0.3)[1], name)
        np.testing.assert_allclose(derivative, expected, atol=1e-8)

    def test_one_temperature_is_free(self):
        parameters = Parameters(np.array([3.0]), np.zeros(1), np.zeros((1, 2)))
        assert penalty_of(parameters, 1.0)[0] == 0.0

    def test_penalty_shrinks(self, problem):
        sizes = [
            np.sum(run_fit(problem, form(penalty=w)).parameters.epsilon ** 2)
            for w in (0.0, 0.01, 1.0)
        ]
        assert sizes[0] > sizes[1] > sizes[2]


class TestFit:
    @pytest.mark.parametrize("objective", sorted(OBJECTIVES))
    @pytest.mark.parametrize("shape", ["shared", "per_class"])
    def test_never_above_the_score_at_zero(self, problem, objective, shape):
        teacher, labels = problem
        fitted = run_fit(problem, form(shape=shape), objective)
        at_zero = OBJECTIVES[objective].score(teacher.probabilities, labels)
        assert fitted.value <= at_zero
        assert fitted.unconverged == 0
        assert fitted.evaluations > 0

    def test_per_class_repairs_the_bias(self, problem):
        teacher, labels = problem
        shared = run_fit(problem, form(shape="shared")).value
        per_class = run_fit(problem, form()).value
        assert per_class < shared - 0.02

    def test_temperature_alone_is_its_minimum(self, problem):
        """Against a scan of the temperature by NumPy alone."""
        teacher, labels = problem
        fitted = run_fit(problem, form("temperature", "zero"))
        logits = np.log(teacher.probabilities)
        scales = np.linspace(0.05, 3, 2951)
        scan = [
            helpers.nll(helpers.softmax(s * logits), labels) for s in scales
        ]
        np.testing.assert_allclose(
            fitted.parameters.scale, scales[np.argmin(scan)], atol=2e-3
        )
        np.testing.assert_allclose(fitted.value, np.min(scan), atol=1e-6)
        np.testing.assert_array_equal(fitted.parameters.epsilon, 0.0)

    @pytest.mark.parametrize("upper", [0.5, 10.0])
    def test_bounds(self, problem, upper):
        teacher, labels = problem
        fitted = fit(
            form("vector"),
            teacher,
            labels,
            OBJECTIVES["nll"],
            upper=upper,
            starts=2,
        )
        epsilon = fitted.parameters.epsilon
        assert np.all(epsilon >= -1.0 / np.arange(1, ORDER + 1))
        assert np.all(epsilon <= upper)
        low, high = INVERSE_TEMPERATURES
        assert np.all(fitted.parameters.scale >= low)
        assert np.all(fitted.parameters.scale <= high)
        assert fitted.unconverged == 0

    def test_several_starts_are_deterministic_and_not_worse(self, problem):
        one = run_fit(problem, form())
        first = run_fit(problem, form(), starts=3, seed=4)
        second = run_fit(problem, form(), starts=3, seed=4)
        np.testing.assert_array_equal(
            first.parameters.epsilon, second.parameters.epsilon
        )
        assert first.value == second.value
        assert first.value <= one.value
        assert first.evaluations > one.evaluations

    def test_is_a_local_minimum(self, problem):
        """At the end the projected gradient is zero."""
        teacher, labels = problem
        fitted = run_fit(problem, form("temperature", "shared"))
        _, gradient, _ = value_and_gradient(
            teacher, labels, OBJECTIVES["nll"], fitted.parameters
        )
        epsilon = fitted.parameters.epsilon
        inside = (epsilon > -1.0 / np.arange(1, ORDER + 1)) & (epsilon < 10.0)
        np.testing.assert_allclose(gradient.epsilon[inside], 0.0, atol=1e-4)
        np.testing.assert_allclose(gradient.scale, 0.0, atol=1e-4)

    def test_nothing_to_fit(self, problem):
        teacher, labels = problem
        fitted = run_fit(problem, form(shape="zero"))
        assert fitted.evaluations == 0
        expected = helpers.nll(teacher.probabilities, labels)
        assert fitted.value == pytest.approx(expected)

    def test_value_contains_the_penalty(self, problem):
        teacher, labels = problem
        fitted = run_fit(problem, form(penalty=0.05))
        q, _ = proxy(teacher.probabilities, fitted.parameters.epsilon)
        squared = np.sum(fitted.parameters.epsilon**2) / CLASSES
        expected = helpers.nll(q, labels) + 0.05 * squared
        assert fitted.value == pytest.approx(expected)


@pytest.mark.parametrize(
    "calibration, shape, count",
    [
        ("none", "zero", 0),
        ("none", "shared", 2),
        ("none", "per_class", 6),
        ("temperature", "zero", 1),
        ("temperature", "shared", 3),
        ("vector", "zero", 6),
        ("vector", "per_class", 12),
    ],
)
def test_count_of_parameters(calibration, shape, count):
    assert form(calibration, shape).parameters(CLASSES) == count


def test_gradient_where_the_hessian_vanishes():
    """A certain row stays where it is, on the edge of the convex domain too."""
    rows = np.eye(3)[[0, 1, 2, 0]]
    labels = np.array([0, 1, 0, 2])
    parameters = Parameters(
        scale=np.ones(1),
        bias=np.zeros(1),
        epsilon=np.tile(-1.0 / np.arange(1, 6), (3, 1)),
    )
    _, gradient, _ = value_and_gradient(
        Teacher(rows, None), labels, OBJECTIVES["brier"], parameters
    )
    np.testing.assert_array_equal(gradient.epsilon, 0.0)
    assert np.all(np.isfinite(gradient.scale))
