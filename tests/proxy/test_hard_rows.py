"""The solver where a class is tiny, against arithmetic of 400 digits.

A row may fail, if it says so; one that is called converged is right in every
class, by that class's own magnitude.
"""

import helpers
import keras
import numpy as np
import pytest

from keras_ptloss import ProxyTeacher, proxy_teacher
from keras_ptloss.proxy._layer import proxy_tensor

mpmath = pytest.importorskip("mpmath")

ORDER = 5
LOWEST = -1.0 / np.arange(1, ORDER + 1)  # where the loss is barely convex


def polished(t, q, epsilon):
    """Newton's method on the equations of §2 of the paper, from `q`.

    The loss is convex: where the equations hold is the solution, wherever one
    came from. Returns None where the method does not get there.
    """
    with mpmath.workdps(400):
        return _polished(t, q, helpers.per_class(epsilon, len(t)))


def _polished(t, q, epsilon):
    classes = [c for c in range(len(t)) if t[c] > 0]
    if len(classes) == 1:
        return np.sign(t)
    t = [mpmath.mpf(float(x)) for x in t]
    total = sum(t[c] for c in classes)
    q = [mpmath.mpf(float(x)) for x in q]
    largest = max(classes, key=lambda c: q[c])
    terms = [
        [exact(e, m) for m, e in enumerate(row, start=1)] for row in epsilon
    ]
    nu = None
    for _ in range(60):
        q[largest] = 1 - sum(q[c] for c in classes if c != largest)
        w, slope = {}, {}
        for c in classes:
            s, row = 1 - q[c], list(enumerate(terms[c], start=1))
            h = sum(m * e * s ** (m - 1) for m, e in row)
            k = sum(m * (m - 1) * e * s ** (m - 2) for m, e in row if m > 1)
            w[c] = t[c] / total * (1 + q[c] * h)
            slope[c] = t[c] / total * (h - q[c] * k)
        if nu is None:
            nu = sum(w.values())
        gap = {c: w[c] - nu * q[c] for c in classes}
        by_q = {c: slope[c] - nu for c in classes}
        change = sum(gap[c] / by_q[c] for c in classes)
        change /= sum(q[c] / by_q[c] for c in classes)
        step = {c: (q[c] * change - gap[c]) / by_q[c] for c in classes}
        nu += change
        for c in classes:
            q[c] += step[c]
        if any(q[c] <= 0 for c in classes):
            return None
        if max(abs(step[c] / q[c]) for c in classes) < mpmath.mpf(10) ** -40:
            return np.array([float(x) for x in q])
    return None


def exact(epsilon, m):
    """Read -1/3 as what is meant, not as the float that is nearest to it."""
    lowest = float(epsilon) == -1.0 / m
    return -mpmath.mpf(1) / m if lowest else mpmath.mpf(float(epsilon))


def hard_rows(classes, count, decades, seed):
    """Rows whose classes are spread over so many powers of ten."""
    rng = np.random.default_rng(seed)
    rows = 10.0 ** -rng.uniform(0, decades, size=(count, classes))
    rows[:: count // 2, 0] = rows[:: count // 2].max(axis=1)  # ties
    rows[1, 1:] = 0.0  # one-hot
    if classes > 2:
        rows[2, 0] = 0.0
    return rows / rows.sum(axis=1, keepdims=True)


EPSILONS = {
    "lowest": lambda classes, rng: LOWEST,
    "highest": lambda classes, rng: np.full(ORDER, 10.0),
    "zero": lambda classes, rng: np.zeros(ORDER),
    "shared": lambda classes, rng: rng.uniform(LOWEST, 10.0),
    "per class": lambda classes, rng: rng.uniform(
        LOWEST, 10.0, (classes, ORDER)
    ),
    "at either bound": lambda classes, rng: np.where(
        rng.random((classes, ORDER)) < 0.5, LOWEST, 10.0
    ),
    "lowest or zero": lambda classes, rng: np.where(
        rng.random((classes, 1)) < 0.5, LOWEST, 0.0
    ),
}


@pytest.mark.parametrize("decades", [2, 16, 300])
@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("kind", sorted(EPSILONS))
def test_converged_rows_are_right(kind, classes, decades):
    rng = np.random.default_rng(classes + decades)
    epsilon = EPSILONS[kind](classes, rng)
    teacher = hard_rows(classes, 6, decades, seed=decades)
    result = proxy_teacher(teacher, epsilon)
    assert np.mean(result.converged) > 0.8
    for t, q, converged in zip(
        teacher, result.probabilities, result.converged, strict=True
    ):
        np.testing.assert_array_equal(q == 0, t == 0)
        if converged:
            right = polished(t, q, epsilon)
            assert right is not None, (t, q)
            np.testing.assert_allclose(q, right, rtol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 5])
def test_two_classes_by_closed_form(order):
    """`q2 / q1 = (t2 / t1)^(1/(M+1))` at epsilon_m = -1/m, m = 1..M."""
    small = 10.0 ** -np.arange(1.0, 301.0)
    teacher = np.stack([1 - small, small], axis=1)
    result = proxy_teacher(teacher, -1.0 / np.arange(1, order + 1))
    ratio = (small / (1 - small)) ** (1 / (order + 1))
    right = ratio / (1 + ratio)
    off = np.abs(result.probabilities[:, 1] / right - 1)
    assert np.mean(result.converged) > 0.95
    assert off[result.converged].max() < 1e-9


def test_a_thousand_classes():
    teacher = hard_rows(1000, 6, 12, seed=0)[2:]  # 0 / 0 where one-hot
    for epsilon in (LOWEST, np.full(ORDER, 10.0)):
        result = proxy_teacher(teacher, epsilon)
        assert result.converged.all()
        fixed = helpers.fixed_point(teacher, result.probabilities, epsilon)
        held = teacher > 0
        np.testing.assert_allclose(
            fixed[held], result.probabilities[held], rtol=1e-8
        )


class TestSafeguards:
    """Inputs outside the convex region that need each of them."""

    def test_steps_stay_inside_the_simplex(self):
        """A class too small for its loss to count would go below 0."""
        teacher = [[1.0 - 2.5e-13, 8.2e-14, 1.7e-13]]
        epsilon = [[-3.7, 2.0], [1.8, -2.8], [-2.9, 4.2]]
        q = proxy_teacher(teacher, epsilon).probabilities
        assert np.all(q >= 0)
        np.testing.assert_allclose(q.sum(axis=1), 1.0)

    def test_no_loss_is_above_the_teacher_s(self):
        """The line search: Newton's own step may climb to a saddle."""
        rng = np.random.default_rng(0)
        for _ in range(10):
            teacher = hard_rows(3, 64, 4, seed=int(rng.integers(100)))
            epsilon = rng.uniform(-4, 10, (3, 3))
            result = proxy_teacher(teacher, epsilon)

            def loss(q, epsilon=epsilon, teacher=teacher):
                p = np.maximum(q, 1e-300)
                terms = helpers.perturbation(p, epsilon) - np.log(p)
                return np.sum(teacher * terms, axis=1)

            own = loss(teacher)
            assert np.all(
                loss(result.probabilities) <= own + 1e-9 * (1 + np.abs(own))
            )

    def test_fsolve_may_end_above_the_teacher(self):
        """A stationary point that is no minimum is not called converged."""
        teacher, epsilon = np.array([[0.394, 0.606]]), [1.6, -3.9]
        result = proxy_teacher(teacher, epsilon, solver="fsolve")
        q = result.probabilities
        np.testing.assert_allclose(
            helpers.fixed_point(teacher, q, epsilon), q, atol=1e-9
        )
        assert result.loss[0] > np.sum(
            teacher * (helpers.perturbation(teacher, epsilon) - np.log(teacher))
        )
        assert not result.converged[0]


class TestFloat32:
    """The layer, and with it `proxy_model` and `ProxyKLDivergence`."""

    @pytest.mark.parametrize("kind", sorted(EPSILONS))
    def test_agrees_with_float64(self, kind):
        rng = np.random.default_rng(0)
        epsilon = EPSILONS[kind](3, rng).astype("float32")
        teacher = hard_rows(3, 64, 9, seed=1).astype("float32")
        right = proxy_teacher(teacher, epsilon).probabilities
        got = keras.ops.convert_to_numpy(ProxyTeacher(epsilon)(teacher))
        np.testing.assert_allclose(got, right, atol=2e-6, rtol=2e-4)
        held = right > 1e-30
        np.testing.assert_allclose(got[held], right[held], rtol=2e-3)

    def test_compiled(self):
        teacher = hard_rows(3, 64, 9, seed=1).astype("float32")
        layer = ProxyTeacher(LOWEST)
        model = keras.Sequential([keras.Input((3,)), layer])
        np.testing.assert_allclose(
            model.predict(teacher, verbose=0),
            keras.ops.convert_to_numpy(layer(teacher)),
            rtol=1e-4,
        )

    @pytest.mark.parametrize("kind", ["highest", "shared", "per class"])
    def test_gradient(self, kind):
        """Against differences of the solver in float64."""
        rng = np.random.default_rng(3)
        epsilon = EPSILONS[kind](3, rng)
        teacher = hard_rows(3, 8, 5, seed=2)
        upstream = rng.normal(size=teacher.shape)

        def value(x):
            return np.sum(upstream * proxy_teacher(teacher, x).probabilities)

        def loss(x):
            rows = keras.ops.convert_to_tensor(teacher, "float32")
            weight = keras.ops.convert_to_tensor(upstream, "float32")
            return weight * proxy_tensor(rows, x)

        np.testing.assert_allclose(
            helpers.gradient_of(loss, epsilon.astype("float32")),
            helpers.numerical_gradient(value, epsilon, step=1e-5),
            rtol=1e-3,
            atol=1e-5,
        )
