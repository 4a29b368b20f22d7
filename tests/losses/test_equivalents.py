"""Appendix A.1: coefficients by which PTLoss is focal loss and others.

The losses coincide up to the teacher's entropy, which the student does not
feel: compared are differences between two students, and gradients.
"""

import numpy as np
import pytest

from keras_ptloss import pt_loss
from keras_ptloss.losses import (
    focal_epsilon,
    label_smoothing_epsilon,
    temperature_epsilon,
)

ORDER = 400  # (1 - p)^400 is below 1e-9 for p > 0.05


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    teacher = rng.dirichlet([2.0, 2.0, 2.0], size=20) * 0.8 + 0.2 / 3
    students = [
        rng.dirichlet([2.0, 2.0, 2.0], size=20) * 0.8 + 0.2 / 3
        for _ in range(2)
    ]
    return teacher, students


def difference(teacher, students, epsilon):
    first, second = (
        np.asarray(pt_loss(teacher, student, epsilon)) for student in students
    )
    return first - second


def cross_entropy(target, student):
    return -np.sum(target * np.log(student), axis=-1)


@pytest.mark.parametrize("gamma", [0, 1, 2, 5])
def test_focal_loss(rows, gamma):
    """Eq. 14, against Eq. 12 written out."""
    teacher, students = rows
    focal = [
        -np.sum(teacher * (1 - p) ** gamma * np.log(p), axis=-1)
        for p in students
    ]
    # The tail is sum over m > M of gamma / (m (m - gamma)) (1-p)^m.
    np.testing.assert_allclose(
        difference(teacher, students, focal_epsilon(gamma, ORDER)),
        focal[0] - focal[1],
        atol=2e-5,
    )


def test_focal_gamma_zero_is_kl():
    np.testing.assert_array_equal(focal_epsilon(0, 5), np.zeros(5))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_scaling(rows, temperature):
    """Eq. 22's exact counterpart, against softmax(log t / temperature)."""
    teacher, students = rows
    target = teacher ** (1 / temperature)
    target /= target.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(
        difference(
            teacher, students, temperature_epsilon(teacher, temperature, ORDER)
        ),
        cross_entropy(target, students[0]) - cross_entropy(target, students[1]),
        atol=2e-5,
    )


@pytest.mark.parametrize("delta", [0.0, 0.1, 1.0])
def test_label_smoothing(rows, delta):
    """Eq. 27 with delta / C, against (1 - delta) t + delta / C."""
    teacher, students = rows
    target = (1 - delta) * teacher + delta / 3
    np.testing.assert_allclose(
        difference(
            teacher, students, label_smoothing_epsilon(teacher, delta, ORDER)
        ),
        cross_entropy(target, students[0]) - cross_entropy(target, students[1]),
        atol=2e-5,
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: focal_epsilon(-1, 3), "`gamma`.*gamma=-1"),
        (lambda: focal_epsilon(1.5, 3), "`gamma`.*gamma=1.5"),
        (lambda: focal_epsilon(1, 0), "`order`.*order=0"),
        (
            lambda: temperature_epsilon([[0.5, 0.5]], 0.0, 3),
            "`temperature`.*temperature=0.0",
        ),
        (
            lambda: temperature_epsilon([[1.0, 0.0]], 2.0, 3),
            "`teacher_probs` must be .* above 0 everywhere",
        ),
        (
            lambda: temperature_epsilon("a", 2.0, 3),
            "`teacher_probs` must be .*teacher_probs='a'",
        ),
        (
            lambda: label_smoothing_epsilon(None, 0.1, 3),
            "`teacher_probs` must be .*teacher_probs=None",
        ),
        (
            lambda: label_smoothing_epsilon([[0.5, 0.5]], 1.5, 3),
            "`delta`.*delta=1.5",
        ),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
