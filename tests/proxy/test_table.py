"""The table of the equation of one class: where the solver begins."""

import keras
import numpy as np
import pytest

from keras_ptloss._backend import float64
from keras_ptloss.proxy import _blocks
from keras_ptloss.proxy._newton import SURE
from keras_ptloss.proxy._stationarity import Layout
from keras_ptloss.proxy._table import NODES, Table, proxies_by_table, table_of

EPSILONS = {
    "one": [3.0],
    "five": [5.0, 0.2, -0.3, 8.0, 1.0],
    "small": [1e-3, -1e-3],
    "lowest": [-1.0, -0.5, -1.0 / 3.0],
    "highest": [10.0] * 5,
}


def rows(classes, concentration=0.3, count=40):
    generator = np.random.default_rng(classes)
    teacher = generator.dirichlet(np.full(classes, concentration), count)
    teacher[0] = np.eye(classes)[0]
    teacher[1] = np.append(0.0, np.full(classes - 1, 1.0 / (classes - 1)))
    return teacher


def without_a_table(teacher, epsilon):
    coefficients = np.asarray(epsilon)[:, None, None]
    return _blocks.numpy_newton(
        teacher, coefficients, tolerance=1e-12, max_steps=100
    )


def sum_w(teacher, epsilon):
    """`sum_c t_c (1 + t_c h_c)`, `(N, 1)`."""
    orders = np.arange(1, len(epsilon) + 1)
    slope = (1.0 - teacher)[..., None] ** (orders - 1) @ (orders * epsilon)
    return np.sum(teacher * (1.0 + teacher * slope), axis=1, keepdims=True)


@pytest.mark.parametrize("kind", EPSILONS)
@pytest.mark.parametrize("classes", [3, 40])
def test_solutions_are_those_without_a_table(kind, classes):
    teacher, epsilon = rows(classes), np.array(EPSILONS[kind])
    found = _blocks.solve_newton(teacher, epsilon)
    wanted = without_a_table(teacher, epsilon)
    np.testing.assert_array_less(found.residual, 1.0000001e-12)
    np.testing.assert_allclose(found.q, wanted[0], rtol=2e-11, atol=1e-300)
    np.testing.assert_allclose(found.loss, wanted[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("classes", [3, 40])
def test_points_are_near_the_solutions(classes):
    teacher = rows(classes, 1.0)[2:]
    epsilons = np.array([EPSILONS["five"], EPSILONS["highest"]])
    layout = Layout.of(classes)
    nu = np.concatenate([sum_w(teacher, epsilon) for epsilon in epsilons])
    with float64():
        q = layout.leave(
            proxies_by_table(
                layout,
                layout.enter(
                    keras.ops.convert_to_tensor(np.tile(teacher, (2, 1))), 2
                ),
                layout.enter(keras.ops.convert_to_tensor(nu), 2),
                Table(*map(keras.ops.convert_to_tensor, table_of(epsilons))),
            )
        )
        q = keras.ops.convert_to_numpy(q)
    wanted = [without_a_table(teacher, epsilon)[0] for epsilon in epsilons]
    np.testing.assert_allclose(q, np.concatenate(wanted), rtol=0.05)


@pytest.mark.parametrize("kind", ["one", "five", "highest"])
def test_values_invert_the_equation(kind):
    epsilon = np.array(EPSILONS[kind])
    table = table_of(epsilon[None])
    y = table.first[0] + np.arange(NODES) * table.width[0]
    q = table.values[0]
    orders = np.arange(1, len(epsilon) + 1)
    slope = (1.0 - q)[:, None] ** (orders - 1) @ (orders * epsilon)
    np.testing.assert_allclose(np.log1p(q * slope) - np.log(q), y, atol=5e-3)
    assert np.all(np.diff(q) < 0)


def test_of_a_loss_that_is_not_convex_no_table_is_used():
    teacher, epsilon = rows(5), np.array([2.0, -3.0])
    found = _blocks.solve_newton(teacher, epsilon)
    wanted = without_a_table(teacher, epsilon)
    np.testing.assert_array_equal(found.steps, wanted[3])
    np.testing.assert_allclose(found.q, wanted[0], rtol=1e-10, atol=1e-300)


def test_steps_are_fewer():
    teacher, epsilon = rows(100), np.array(EPSILONS["five"])
    found = _blocks.solve_newton(teacher, epsilon)
    assert (
        found.steps.mean() < 0.8 * without_a_table(teacher, epsilon)[3].mean()
    )


def test_high_orders_have_no_table():
    teacher, epsilon = rows(4), np.full(SURE + 1, 0.1)
    found = _blocks.solve_newton(teacher, epsilon)
    np.testing.assert_array_equal(
        found.steps, without_a_table(teacher, epsilon)[3]
    )
