"""The solver where a class is tiny, against arithmetic of 400 digits.

A row may fail, if it says so; one that is called converged is right in every
class, by that class's own magnitude.
"""

import helpers
import keras
import numpy as np
import pytest
import scipy.special

from keras_ptloss import Correction, ProxyTeacher, proxy_teacher
from keras_ptloss.layers import CorrectedTeacher
from keras_ptloss.proxy._layer import proxy_tensor
from keras_ptloss.proxy._newton import newton

mpmath = pytest.importorskip("mpmath")

pytestmark = pytest.mark.newest

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


def one_large(classes, small, order=ORDER):
    """The proxy's small class: `classes - 1` are equal, epsilon_m = -1/m.

    Of `t s^M / q`, which is the same for all classes, the ratio of a small one
    to the large one falls as `q` rises: by bisection of its logarithm.
    """
    n, m = classes - 1, order
    with mpmath.workdps(50):
        t = mpmath.mpf(float(small))
        of_teacher = mpmath.log(t / (1 - n * t))
        low, high = mpmath.mpf(-1500), -mpmath.log(classes)
        for _ in range(120):
            x = (low + high) / 2
            q = mpmath.exp(x)
            large, rest = mpmath.log1p(-n * q), mpmath.log1p(-q)
            ratio = of_teacher + m * (rest - mpmath.log(n) - x) + large - x
            low, high = (x, high) if ratio > 0 else (low, x)
        return float(mpmath.exp(low))


def rows_of_one_large(classes, small):
    """Return rows `(N, C)`, the large class first."""
    small = np.asarray(small)[:, None]
    rest = np.repeat(small, classes - 1, axis=1)
    return np.concatenate([1.0 - (classes - 1) * small, rest], axis=1)


@pytest.mark.parametrize("decades", [2, 16, 300])
# From 17 classes on in another layout.
@pytest.mark.parametrize(
    ("classes", "count"), [(2, 6), (3, 6), (10, 6), (17, 4), (100, 3)]
)
@pytest.mark.parametrize("kind", sorted(EPSILONS))
def test_converged_rows_are_right(kind, classes, count, decades):
    rng = np.random.default_rng(classes + decades)
    epsilon = EPSILONS[kind](classes, rng)
    teacher = hard_rows(classes, count, decades, seed=decades)
    result = proxy_teacher(teacher, epsilon)
    assert np.mean(result.converged) > 0.8
    for t, q, converged in zip(
        teacher, result.probabilities, result.converged, strict=True
    ):
        np.testing.assert_array_equal(q == 0, t == 0)
        if converged:
            right = polished(t, q, epsilon)
            assert right is not None, (t, q)
            np.testing.assert_allclose(q, right, rtol=1e-11)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-12])
@pytest.mark.parametrize("kind", sorted(EPSILONS))
@pytest.mark.parametrize(("classes", "decades"), [(3, 16), (10, 300)])
def test_converged_rows_are_within_the_tolerance(
    kind, tolerance, classes, decades
):
    """The residual is the distance to first order, not a bound on it."""
    epsilon = EPSILONS[kind](classes, np.random.default_rng(classes))
    teacher = hard_rows(classes, 6, decades, seed=decades + 1)
    result = proxy_teacher(teacher, epsilon, tolerance=tolerance)
    done = np.flatnonzero(result.converged)
    assert len(done) >= 5
    for row in done:
        q = result.probabilities[row]
        right = polished(teacher[row], q, epsilon)
        np.testing.assert_allclose(q, right, rtol=2 * tolerance)


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


@pytest.mark.parametrize("tolerance", [1e-3, 1e-12])
@pytest.mark.parametrize("classes", [2, 17, 1000])
def test_one_large_class(classes, tolerance):
    small = 10.0 ** -np.array([4, 6, 9, 12, 15, 30, 60, 100, 200, 300])
    teacher = rows_of_one_large(classes, small)
    result = proxy_teacher(teacher, LOWEST, tolerance=tolerance)
    assert result.converged.all()
    right = [one_large(classes, x) for x in small]
    np.testing.assert_allclose(
        result.probabilities[:, 1:],
        np.repeat(np.array(right)[:, None], classes - 1, axis=1),
        rtol=2 * tolerance,
    )


@pytest.mark.parametrize("order", [1, 2, 5])
def test_fsolve_says_where_it_fails(order):
    """Its steps on logits need not get there; then no row is converged."""
    small = 10.0 ** -np.arange(1.0, 16.0)
    teacher = np.stack([1 - small, small], axis=1)
    epsilon = -1.0 / np.arange(1, order + 1)
    result = proxy_teacher(teacher, epsilon, solver="fsolve")
    right = [one_large(2, x, order) for x in small]
    off = np.abs(result.probabilities[:, 1] / right - 1)
    assert np.all(~result.converged | (off < 1e-6)), off
    # Were it right everywhere, nothing would be tested.
    assert result.converged[:3].all() and off.max() > 0.1


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
    """Inputs that need each of them, most outside the convex region."""

    def test_reach_of_the_tangent(self):
        """Convex: a class leapt too far, where no step was left to go back."""
        teacher = [0.0021262, 0.99784877, 2.5032728e-05]
        epsilon = [LOWEST, LOWEST, [5.255, 0.355, 9.243, 5.149, 9.117]]
        result = proxy_teacher([teacher], epsilon)
        assert result.converged.all()
        right = polished(teacher, result.probabilities[0], epsilon)
        np.testing.assert_allclose(result.probabilities[0], right, rtol=1e-11)

    def test_steps_stay_inside_the_simplex(self):
        """A class too small for its loss to count would go below 0."""
        teacher = [[1.0 - 2.5e-13, 8.2e-14, 1.7e-13]]
        epsilon = [[-3.7, 2.0], [1.8, -2.8], [-2.9, 4.2]]
        q = proxy_teacher(teacher, epsilon).probabilities
        assert np.all(q >= 0)
        np.testing.assert_allclose(q.sum(axis=1), 1.0)

    @pytest.mark.parametrize(
        ("teacher", "epsilon"),
        [
            (
                [0.997214, 0.001583794, 0.001202206],
                [[-1.0, -0.5], [4.99, -1.0], [0.831, -1.0]],
            ),
            (
                [0.00869858, 0.798488920, 0.1928125],
                [
                    [8.354, 5.831, 7.474, -3.764, -2.379],
                    [-3.643, 6.98, -3.751, -0.231, -2.293],
                    [-3.11, -3.506, -1.282, 2.03, -3.025],
                ],
            ),
            (
                [0.022816, 0.976895912, 0.000288088],
                [
                    [4.109, 9.959, 4.689, 4.345, -0.717],
                    [-1.895, 4.594, 0.834, -2.698, -2.934],
                    [4.836, 5.98, -0.136, 0.929, 4.337],
                ],
            ),
        ],
    )
    def test_start_is_not_above_the_teacher(self, teacher, epsilon):
        """Where one step of the map is, another, higher minimum is near."""
        result = proxy_teacher([teacher], epsilon)
        t, q = np.array(teacher), result.probabilities[0]
        assert result.converged.all()
        assert helpers.pt_loss(t, q, epsilon) < helpers.pt_loss(t, t, epsilon)

    @pytest.mark.parametrize(
        ("teacher", "epsilon"),
        [
            (
                [5.86e-7, 0.091400628, 0.908598786],
                [
                    [4.566, 6.96, -2.877, 3.938, 2.102],
                    [-2.865, -3.585, -1.424, 3.734, 3.059],
                    [1.07, -3.779, -1.683, 0.168, -3.523],
                ],
            ),
            (
                [8.669e-5, 1.3324e-5, 0.999899986],
                [
                    [1.113, -1.45, 2.987, 0.365, 1.802],
                    [-0.788, 9.079, 6.159, 4.918, -3.387],
                    [-1.151, -3.315, -3.905, -2.411, -3.356],
                ],
            ),
        ],
    )
    def test_a_large_class_keeps_a_share(self, teacher, epsilon):
        """Left with nothing by the others' leap, it would stay there."""
        result = proxy_teacher([teacher], epsilon)
        assert result.converged.all()
        assert np.all(result.probabilities > 0)

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

    @pytest.mark.parametrize("classes", [2, 17])
    def test_one_large_class(self, classes):
        small = np.geomspace(1e-5, 1e-36, 63).astype("float32")
        teacher = rows_of_one_large(classes, small.astype("float64"))
        right = np.array([one_large(classes, x) for x in small])[:, None]
        got = ProxyTeacher(LOWEST)(teacher.astype("float32"))
        got = keras.ops.convert_to_numpy(got)
        off = np.abs(got[:, 1:] / right - 1).max(axis=1)
        assert off[small > 1e-32].max() < 2e-6
        # Below, a few millionths of t are subnormal: 0, or of few digits.
        torch = keras.backend.backend() == "torch"
        assert off.max() < (5e-3 if torch else 3e-5)

    def test_small_hessians_keep_their_weight(self):
        """Held at 1e6 times the smallest float, the steps went to and fro."""
        small = np.float32(4e-34) * np.arange(1, 20, dtype="float32")
        teacher = rows_of_one_large(2, small.astype("float64"))
        _, _, residual, steps = newton(
            keras.ops.convert_to_tensor(teacher.astype("float32")),
            keras.ops.convert_to_tensor(LOWEST.astype("float32")[:, None]),
            tolerance=1e-5,
            max_steps=100,
        )
        assert np.all(keras.ops.convert_to_numpy(residual) <= 1e-5)
        assert np.all(keras.ops.convert_to_numpy(steps) <= 6)

    @pytest.mark.parametrize("order", [1, 5])
    def test_correction_of_a_hard_teacher(self, order):
        """In float64, and in float32 in the layer of `proxy_model`."""
        z = np.stack([np.zeros(20), -np.arange(1.0, 21.0)], axis=1)
        epsilon = -1.0 / np.arange(1, order + 1)
        correction = Correction(epsilon, teacher_from_logits=True)
        right = scipy.special.expit(z[:, 1] / (order + 1))
        np.testing.assert_allclose(
            correction.proxy(z).probabilities[:, 1], right, rtol=1e-11
        )
        layer = CorrectedTeacher(correction)
        model = keras.Sequential([keras.Input((2,)), layer])
        got = model.predict(z.astype("float32"), verbose=0)
        np.testing.assert_allclose(got[:, 1], right, rtol=2e-6)

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
