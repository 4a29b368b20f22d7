"""proxy_teacher: two solvers, the fixed point, a grid and golden values."""

import dataclasses

import helpers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_ptloss import proxy_teacher
from keras_ptloss.proxy._fsolve import _logit_equations, solve_fsolve
from keras_ptloss.proxy._stationarity import numpy_adjoint

ORDER = 3
LOWER = -1.0 / np.arange(1, ORDER + 1)  # where the loss is convex


def random_epsilon(seed, classes, *, shape, low=-1.0, high=10.0):
    size = (ORDER,) if shape == "shared" else (classes, ORDER)
    return np.random.default_rng(seed).uniform(low, high, size=size)


def every_shape():
    return pytest.mark.parametrize("shape", ["shared", "per_class"])


def every_class_count(*counts):
    return pytest.mark.parametrize("classes", counts or (2, 3, 10, 100))


def losses(teacher, q, epsilon):
    """Eq. 7, up to rounding at exact zeros of both."""
    return helpers.pt_loss(teacher, q, epsilon)


class TestSolversAgree:
    @every_class_count()
    @every_shape()
    @pytest.mark.parametrize("region", ["convex", "paper"])
    def test_where_fsolve_converges(self, classes, shape, region):
        rows = 30 if classes < 100 else 8
        teacher = helpers.dirichlet(0, rows, classes)
        low = LOWER if region == "convex" else -1.0
        epsilon = random_epsilon(1, classes, shape=shape, low=low)
        newton = proxy_teacher(teacher, epsilon)
        fsolve = proxy_teacher(teacher, epsilon, solver="fsolve")
        both = newton.converged & fsolve.converged
        # Far outside the convex region there may be several solutions.
        worse = losses(teacher, fsolve.probabilities, epsilon) > (
            losses(teacher, newton.probabilities, epsilon) + 1e-7
        )
        if region == "convex":
            assert not np.any(worse & both)
        same = both & ~worse
        assert same.any() or classes == 100
        np.testing.assert_allclose(
            newton.probabilities[same], fsolve.probabilities[same], atol=1e-5
        )

    @every_class_count()
    @every_shape()
    def test_newton_is_never_above_fsolve_nor_the_teacher(self, classes, shape):
        rows, seed = 30 if classes < 100 else 4, 0
        teacher = helpers.dirichlet(seed, rows, classes, 0.3)
        epsilon = random_epsilon(seed, classes, shape=shape)
        newton = proxy_teacher(teacher, epsilon)
        fsolve = proxy_teacher(teacher, epsilon, solver="fsolve")
        at_newton = losses(teacher, newton.probabilities, epsilon)
        at_fsolve = losses(teacher, fsolve.probabilities, epsilon)
        at_teacher = losses(teacher, teacher, epsilon)
        assert np.all(at_newton <= at_teacher + 1e-9)
        assert np.all(at_newton <= at_fsolve + 1e-9)

    @every_class_count(2, 5)
    def test_jacobian(self, classes):
        """Closed form against differences; singular in all C logits."""
        teacher = helpers.dirichlet(0, 1, classes)[0]
        epsilon = random_epsilon(1, classes, shape="per_class")
        logits = np.random.default_rng(2).normal(size=classes)
        _, jacobian = _logit_equations(logits, teacher, list(epsilon.T))
        step = 1e-6
        for c in range(classes):
            moved = step * np.eye(classes)[c]
            up, down = (
                _logit_equations(z, teacher, list(epsilon.T))[0]
                for z in (logits + moved, logits - moved)
            )
            np.testing.assert_allclose(
                jacobian[:, c], (up - down) / (2 * step), atol=1e-7
            )
        np.testing.assert_allclose(jacobian.sum(axis=1), 0.0, atol=1e-12)

    @every_class_count(2, 10)
    def test_gauge_does_not_change_the_solution(self, classes):
        """With and without the published form's free shift of the logits."""
        teacher = helpers.dirichlet(0, 20, classes)
        epsilon = random_epsilon(1, classes, shape="shared", low=LOWER)
        (fixed, _, first, _), (free, _, second, _) = (
            solve_fsolve(
                teacher,
                epsilon,
                fix_gauge=fix_gauge,
                tolerance=1e-8,
                max_steps=1000,
            )
            for fix_gauge in (True, False)
        )
        both = (first < 1e-8) & (second < 1e-8)
        assert both.any()
        np.testing.assert_allclose(fixed[both], free[both], atol=1e-6)


class TestNewton:
    @every_class_count()
    @every_shape()
    def test_is_a_fixed_point(self, classes, shape):
        teacher = helpers.dirichlet(0, 50, classes)
        epsilon = random_epsilon(2, classes, shape=shape, low=LOWER)
        q = proxy_teacher(teacher, epsilon).probabilities
        np.testing.assert_allclose(
            helpers.fixed_point(teacher, q, epsilon), q, atol=1e-9
        )

    CORNERS = {
        "lower": LOWER,
        "upper": np.full(ORDER, 10.0),
        "lower_first": np.array([-1.0, 10.0, 10.0]),
        "upper_first": np.array([10.0, -0.5, -1 / 3]),
        "only_last_lower": np.array([0.0, 0.0, -1 / 3]),
        "zero": np.zeros(ORDER),
    }

    @every_class_count(2, 10)
    @pytest.mark.parametrize("name", CORNERS)
    def test_converges_on_the_corners(self, classes, name):
        """Exact corners of the box, one-hot rows, exact zeros, near-zeros."""
        teacher = helpers.dirichlet(3, 200, classes, 0.2)
        teacher[:50] = np.eye(classes)[np.arange(50) % classes]
        teacher[50:100, 0] = 0.0
        teacher[50:100, 1] += 1e-3
        teacher[100, :] = 1e-12
        teacher[100, 0] = 1.0
        teacher /= teacher.sum(axis=1, keepdims=True)
        result = proxy_teacher(teacher, self.CORNERS[name])
        assert result.converged.all(), np.flatnonzero(~result.converged)
        np.testing.assert_allclose(result.probabilities.sum(axis=1), 1.0)
        assert np.all(result.probabilities >= 0)

    @pytest.mark.parametrize("seed", range(5))
    @every_class_count(3, 100)
    def test_converges_on_mixed_corners(self, classes, seed):
        """Each class's coefficients at a corner of its own."""
        generator = np.random.default_rng(seed)
        at_upper = generator.random((classes, ORDER)) < 0.5
        epsilon = np.where(at_upper, 10.0, LOWER)
        teacher = helpers.dirichlet(seed, 200, classes, 0.3)
        result = proxy_teacher(teacher, epsilon)
        assert result.converged.all(), np.flatnonzero(~result.converged)

    @every_class_count(2, 5)
    def test_one_hot_stays(self, classes):
        teacher = np.eye(classes)
        result = proxy_teacher(teacher, [0.5, 3.0])
        np.testing.assert_allclose(result.probabilities, teacher, atol=1e-12)

    def test_exact_zero_stays(self):
        """A class that the teacher rules out gets nothing: `w_c = t_c (..)`."""
        teacher = np.array([[0.6, 0.4, 0.0]])
        epsilon = np.array([[0.0, 0.0], [0.0, 0.0], [10.0, 10.0]])
        result = proxy_teacher(teacher, epsilon)
        np.testing.assert_allclose(result.probabilities, teacher, atol=1e-10)

    @pytest.mark.parametrize("seed", range(3))
    def test_is_the_minimum_on_a_grid(self, seed):
        """C = 2, in the convex region: one dimension, by brute force."""
        teacher = helpers.dirichlet(seed, 10, 2)
        epsilon = random_epsilon(seed, 2, shape="per_class", low=LOWER)
        q = proxy_teacher(teacher, epsilon).probabilities
        first = np.linspace(1e-5, 1 - 1e-5, 100_001)
        grid = np.stack([first, 1 - first], axis=1)
        for row, solved in zip(teacher, q, strict=True):
            on_grid = losses(np.tile(row, (len(grid), 1)), grid, epsilon)
            best = np.argmin(on_grid)
            np.testing.assert_allclose(solved[0], first[best], atol=3e-5)
            assert losses(row, solved, epsilon) <= on_grid[best] + 1e-9

    @every_class_count(3, 10)
    def test_shared_positive_coefficients_keep_the_ranking(self, classes):
        teacher = helpers.dirichlet(0, 100, classes)
        epsilon = random_epsilon(0, classes, shape="shared", low=0.0)
        q = proxy_teacher(teacher, epsilon).probabilities
        np.testing.assert_array_equal(np.argsort(teacher), np.argsort(q))

    def test_coefficients_per_class_change_the_label(self):
        teacher = np.array([[0.55, 0.45]])
        q = proxy_teacher(teacher, [[0.0], [5.0]]).probabilities
        assert q[0].argmax() == 1

    def test_zero_epsilon_is_the_teacher(self):
        teacher = helpers.dirichlet(0, 20, 4)
        result = proxy_teacher(teacher, [0.0, 0.0])
        np.testing.assert_allclose(result.probabilities, teacher, atol=1e-12)
        assert result.steps.max() == 0

    def test_scalar_is_order_one(self):
        teacher = helpers.dirichlet(0, 5, 3)
        np.testing.assert_array_equal(
            proxy_teacher(teacher, 2.0).probabilities,
            proxy_teacher(teacher, [2.0]).probabilities,
        )

    @pytest.mark.parametrize("rows", [64, 65, 200])
    def test_rows_do_not_feel_each_other(self, rows):
        """Blocks of rows and the filling of the last one do not show."""
        teacher = helpers.dirichlet(0, 200, 600)[:rows]
        epsilon = [1.0, 0.5, 3.0]
        together = proxy_teacher(teacher, epsilon).probabilities
        alone = proxy_teacher(teacher[-1:], epsilon).probabilities
        assert together.shape == teacher.shape
        np.testing.assert_allclose(together[-1:], alone, atol=1e-10)

    def test_rows_are_normalised(self):
        teacher = helpers.dirichlet(0, 5, 3)
        rounded = teacher.astype("float16")
        result = proxy_teacher(rounded, [1.0])
        np.testing.assert_allclose(result.probabilities.sum(1), 1, atol=1e-12)
        expected = proxy_teacher(teacher, [1.0]).probabilities
        np.testing.assert_allclose(result.probabilities, expected, atol=1e-3)

    @settings(max_examples=25, deadline=None)
    @given(
        permutation=st.permutations(range(4)),
        seed=st.integers(0, 1000),
        shared=st.booleans(),
    )
    def test_permutation_of_the_classes(self, permutation, seed, shared):
        teacher = helpers.dirichlet(seed, 3, 4)
        shape = "shared" if shared else "per_class"
        epsilon = random_epsilon(seed, 4, shape=shape, low=LOWER)
        moved = epsilon if shared else epsilon[permutation]
        np.testing.assert_allclose(
            proxy_teacher(teacher[:, permutation], moved).probabilities,
            proxy_teacher(teacher, epsilon).probabilities[:, permutation],
            atol=1e-9,
        )


class TestGolden:
    @pytest.mark.parametrize("case", helpers.golden_parameters())
    def test_proxy_and_risk(self, case):
        result = proxy_teacher(case["teacher"], case["epsilon"])
        np.testing.assert_allclose(
            result.probabilities, case["proxy_teacher"], atol=1e-5
        )
        value = helpers.risk(result.probabilities, case["labels"])
        np.testing.assert_allclose(value, case["risk_eq11"], rtol=1e-5)


class TestResult:
    @pytest.mark.parametrize("solver", ["newton", "fsolve"])
    def test_columns(self, solver):
        teacher, epsilon = helpers.dirichlet(0, 7, 3), [2.0, 0.5]
        result = proxy_teacher(teacher, epsilon, solver=solver)
        assert result.probabilities.shape == (7, 3)
        for name in ("loss", "residual", "converged", "steps"):
            assert getattr(result, name).shape == (7,), name
        assert result.solver == solver
        assert result.seconds > 0
        negentropy = np.sum(teacher * np.log(teacher), axis=1)
        expected = losses(teacher, result.probabilities, epsilon) - negentropy
        np.testing.assert_allclose(result.loss, expected, rtol=1e-9)

    def test_residual_is_the_relative_distance_of_a_class(self):
        """After one step, the largest of all classes, to first order."""
        teacher, epsilon = helpers.dirichlet(0, 5, 3), np.array([0.1, 0.02])
        early = proxy_teacher(teacher, epsilon, max_steps=1)
        solved = proxy_teacher(teacher, epsilon).probabilities
        off = np.abs(solved / early.probabilities - 1.0).max(axis=1)
        np.testing.assert_allclose(early.residual, off, rtol=0.05)

    def test_small_classes_by_closed_form(self):
        """At epsilon_m = -1/m, two classes: q2 / q1 = (t2 / t1)^(1/6)."""
        small = 10.0 ** -np.arange(1.0, 16.0)
        teacher = np.stack([1 - small, small], axis=1)
        result = proxy_teacher(teacher, -1.0 / np.arange(1, 6))
        ratio = (small / (1 - small)) ** (1 / 6)
        assert result.converged.all()
        np.testing.assert_allclose(
            result.probabilities[:, 1], ratio / (1 + ratio), rtol=1e-10
        )

    def test_frozen(self):
        result = proxy_teacher([[0.5, 0.5]], 1.0)
        with pytest.raises(dataclasses.FrozenInstanceError):
            result.loss = 0.0

    def test_text_where_all_is_well(self):
        text = str(proxy_teacher(helpers.dirichlet(0, 4, 3), 1.0))
        assert "4 proxy teachers by newton" in text
        assert text.endswith("all converged")
        one = str(proxy_teacher(helpers.dirichlet(0, 1, 3), 1.0))
        assert "1 proxy teacher by newton" in one

    def test_text_says_what_to_do(self):
        result = proxy_teacher(
            helpers.dirichlet(0, 4, 3), [5.0, 5.0], max_steps=1
        )
        assert not result.converged.any()
        assert "4 of 4 did not converge: raise max_steps" in str(result)

    def test_text_of_fsolve_points_to_newton(self):
        result = proxy_teacher(
            helpers.dirichlet(0, 4, 3), [5.0], solver="fsolve", max_steps=2
        )
        assert 'did not converge: use solver="newton"' in str(result)

    def test_tolerance(self):
        teacher = helpers.dirichlet(0, 50, 3)
        loose = proxy_teacher(teacher, [5.0, 2.0], tolerance=1e-2)
        tight = proxy_teacher(teacher, [5.0, 2.0])
        assert loose.residual.max() <= 1e-2
        assert tight.residual.max() <= 1e-12
        assert loose.steps.sum() < tight.steps.sum()


class TestDerivative:
    """numpy_adjoint against finite differences of fsolve's solution."""

    @pytest.fixture(params=[2, 3, 5])
    def problem(self, request):
        classes = request.param
        teacher = 0.7 * helpers.dirichlet(0, 4, classes) + 0.3 / classes
        epsilon = np.random.default_rng(1).uniform(-0.2, 0.6, (classes, 2))
        upstream = np.random.default_rng(2).normal(size=teacher.shape)
        return teacher, epsilon, upstream

    @staticmethod
    def by_fsolve(teacher, epsilon):
        teacher = np.asarray(teacher)
        q, _, residual, _ = solve_fsolve(
            teacher, np.asarray(epsilon), tolerance=1e-12, max_steps=1000
        )
        assert residual.max() < 1e-9
        return q

    def adjoint(self, problem):
        teacher, epsilon, upstream = problem
        q = proxy_teacher(teacher, epsilon).probabilities
        return numpy_adjoint(teacher, q, epsilon.T, upstream)

    def test_epsilon(self, problem):
        teacher, epsilon, upstream = problem
        by_epsilon, _ = self.adjoint(problem)
        expected = helpers.numerical_gradient(
            lambda e: np.sum(upstream * self.by_fsolve(teacher, e)),
            epsilon,
            step=1e-5,
        )
        np.testing.assert_allclose(by_epsilon.T, expected, atol=1e-6)

    def test_teacher(self, problem):
        """Along the simplex: mass moved from the last class to another."""
        teacher, epsilon, upstream = problem
        _, by_teacher = self.adjoint(problem)
        step = 1e-5
        for c in range(teacher.shape[1] - 1):
            direction = np.zeros(teacher.shape[1])
            direction[c], direction[-1] = 1.0, -1.0
            up = self.by_fsolve(teacher + step * direction, epsilon)
            down = self.by_fsolve(teacher - step * direction, epsilon)
            expected = np.sum(upstream * (up - down), axis=1) / (2 * step)
            np.testing.assert_allclose(
                by_teacher @ direction, expected, atol=1e-6
            )


class TestErrors:
    GOOD = np.full((2, 3), 1 / 3)

    @pytest.mark.parametrize(
        "row, shown",
        [
            ([3.0, -1.0, 0.5], "3"),
            ([-0.1, 0.6, 0.5], "-0.1"),
            ([np.nan, 0.5, 0.5], "nan"),
            ([0.3, 0.3, 0.3], "0.9"),
        ],
    )
    def test_not_probabilities(self, row, shown):
        match = "`teacher_probs` must hold probabilities.*" + shown
        with pytest.raises(ValueError, match=match):
            proxy_teacher([row], 1.0)

    @pytest.mark.parametrize(
        "rows",
        [[0.5, 0.5], np.ones((0, 3))],
    )
    def test_shape(self, rows):
        match = "`teacher_probs` must be of shape.*none of them empty.*=.*"
        with pytest.raises(ValueError, match=match):
            proxy_teacher(rows, 1.0)

    @pytest.mark.parametrize(
        "epsilon, match",
        [
            ([np.nan], r"`epsilon` must be finite.*nan"),
            (np.ones((1, 3, 1)), r"`epsilon` must be of shape"),
            (np.ones((2, 1)), r"`epsilon`.*one row a class.*\(2, 1\).*3 class"),
        ],
    )
    def test_epsilon(self, epsilon, match):
        with pytest.raises(ValueError, match=match):
            proxy_teacher(self.GOOD, epsilon)

    @pytest.mark.parametrize(
        "argument, value",
        [
            ("solver", "bfgs"),
            ("solver", None),
            ("tolerance", -1.0),
            ("tolerance", np.nan),
            ("max_steps", 0),
            ("max_steps", 1.5),
            ("max_steps", True),
        ],
    )
    def test_setting(self, argument, value):
        match = f"`{argument}` must be.*Received: {argument}={value!r}"
        with pytest.raises(ValueError, match=match):
            proxy_teacher(self.GOOD, 1.0, **{argument: value})
