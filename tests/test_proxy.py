"""Proxy teachers: the solver, its derivative and the layer."""

import helpers
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_ptloss import ProxyTeacher, proxy_teacher
from keras_ptloss.proxy import epsilon_gradient, proxy_tensor

# Shapes of epsilon, with 3 classes. There are few, because each is compiled.
SHAPES = [(3,), (3, 3), (3, 1)]


def loss(t, q, epsilon):
    """PTLoss at `q` without the teacher's entropy, one value a row."""
    log_q = np.log(np.maximum(q, 1e-300))
    perturbation = helpers.perturbation(q, epsilon)
    return (t * (perturbation - log_q)).sum(axis=-1)


def slope_of_log(t, q, epsilon):
    """`log(t_c (1 + q_c h_c) / q_c)`, equal for all classes at the solution."""
    epsilon = helpers.per_class(epsilon, q.shape[-1])
    h = sum(
        m * epsilon[..., m - 1] * (1 - q) ** (m - 1)
        for m in range(1, epsilon.shape[-1] + 1)
    )
    return np.log(t) - np.log(q) + np.log1p(q * h)


cases = given(
    shape=st.sampled_from(SHAPES),
    concentration=st.sampled_from([0.05, 0.5, 2.0]),
    seed=st.integers(0, 2**31),
)


def draw(shape, concentration, seed, lowest):
    rng = np.random.default_rng(seed)
    t = rng.dirichlet(np.full(3, concentration), size=50)
    return t, rng.uniform(lowest, 10.0, size=shape)


@pytest.mark.parametrize("case", helpers.golden_parameters())
def test_golden(case):
    result = proxy_teacher(case["teacher"], case["epsilon"])
    assert result.converged.all()
    # The golden teachers are rounded; their rows are divided by their sums.
    np.testing.assert_allclose(
        result.probabilities, case["proxy_teacher"], atol=2e-5
    )


@settings(max_examples=25, deadline=None)
@cases
def test_fixed_point_in_the_convex_region(**drawn):
    lowest = -1.0 / np.arange(1, drawn["shape"][-1] + 1)
    t, epsilon = draw(**drawn, lowest=lowest)
    result = proxy_teacher(t, epsilon)
    assert result.converged.all()
    q = result.probabilities
    np.testing.assert_allclose(q.sum(axis=-1), 1.0, rtol=1e-12)
    expected = helpers.fixed_point(t, q, epsilon)
    np.testing.assert_allclose(q, expected, rtol=1e-9, atol=1e-14)


@settings(max_examples=25, deadline=None)
@cases
def test_never_above_the_teacher_outside_the_convex_region(**drawn):
    t, epsilon = draw(**drawn, lowest=-3.0)
    q = proxy_teacher(t, epsilon).probabilities
    assert np.all(loss(t, q, epsilon) <= loss(t, t, epsilon) + 1e-12)
    assert np.isfinite(q).all()


@pytest.mark.parametrize("order", [1, 3, 5])
@pytest.mark.parametrize("share", [-1.0, -0.5, 3.0])
def test_two_hundred_decades(order, share):
    """`share` of 1/m; -1 is the end of the convex region."""
    rng = np.random.default_rng(0)
    logs = rng.uniform(-200, 0, size=(200, 3)) * np.log(10)
    t = helpers.softmax(logs)
    epsilon = share / np.arange(1, order + 1)
    result = proxy_teacher(t, epsilon)
    assert result.converged.all()
    q = result.probabilities
    small = np.sort(q, axis=-1)[:, :-1]
    assert np.all(small > 0)
    if share > -1.0:
        # All but the largest class have digits of 1 - q.
        found = slope_of_log(t, q, epsilon)
        np.testing.assert_allclose(found - found[:, :1], 0.0, atol=1e-9)
    else:
        # 1 + q_c h_c is (1 - q_c)^M, and 1 - q of the largest class is the
        # sum of the others.
        rest = np.where(
            q == q.max(-1, keepdims=True), small.sum(-1, keepdims=True), 1 - q
        )
        found = np.log(t) - np.log(q) + order * np.log(rest)
        np.testing.assert_allclose(found - found[:, :1], 0.0, atol=1e-6)


def test_closed_form_is_newtons():
    t = np.random.default_rng(0).dirichlet(np.full(3, 0.3), size=50)
    for value in (-0.999, -0.3, 2.0, 1000.0):
        closed = proxy_teacher(t, value)
        newton = proxy_teacher(t, np.full((3, 1), value))
        assert not closed.steps.any()
        assert newton.converged.all()
        np.testing.assert_allclose(
            closed.probabilities, newton.probabilities, rtol=1e-9, atol=1e-15
        )


def test_one_hot_rows_and_epsilon_zero_give_the_teacher():
    one_hot = np.eye(3)
    for epsilon in ([3.0, -0.5, 1.0], [-1.0, -0.5, -1 / 3], np.ones((3, 3))):
        result = proxy_teacher(one_hot, epsilon)
        assert result.converged.all()
        np.testing.assert_array_equal(result.probabilities, one_hot)
    t = np.random.default_rng(0).dirichlet(np.ones(3), size=5)
    found = proxy_teacher(t, [0.0, 0.0, 0.0]).probabilities
    np.testing.assert_allclose(found, t, rtol=1e-12)


@pytest.mark.parametrize("epsilon", [2.0, [-0.5, 1.0, 0.2], "per class"])
def test_against_fsolve(epsilon):
    rng = np.random.default_rng(0)
    t = rng.dirichlet(np.ones(3), size=20)
    if epsilon == "per class":
        epsilon = rng.uniform(0, 3, size=(3, 3))
    newton = proxy_teacher(t, epsilon)
    reference = proxy_teacher(t, epsilon, solver="fsolve")
    assert reference.converged.mean() > 0.9
    assert "fsolve" in str(reference)
    np.testing.assert_allclose(
        newton.probabilities[reference.converged],
        reference.probabilities[reference.converged],
        atol=1e-6,
    )


def test_rows_that_did_not_converge_are_reported():
    t = np.random.default_rng(0).dirichlet(np.full(10, 0.02), size=30)
    result = proxy_teacher(t, [-1.0, -0.5, -1 / 3], solver="fsolve")
    assert not result.converged.all()
    assert 'use solver="newton"' in str(result)


def test_shape_of_sequences_and_binary_heads():
    t = np.random.default_rng(0).uniform(size=(3, 5, 1)).astype("float16")
    result = proxy_teacher(t, [2.0, 0.5, 0.1])
    assert result.probabilities.shape == (3, 5, 2)
    assert result.converged.shape == (3, 5)
    both = np.concatenate([1 - t.astype("float64"), t], axis=-1)
    expected = proxy_teacher(both.reshape(-1, 2), [2.0, 0.5, 0.1]).probabilities
    np.testing.assert_allclose(
        result.probabilities.reshape(-1, 2), expected, rtol=1e-12
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[0.5, 0.9]], 1.0), "`teacher_probs` must hold probabilities"),
        (([0.5, 0.5], 1.0), "`teacher_probs` must be of shape"),
        (([[0.5, 0.5]], np.zeros((3, 1))), "`epsilon`"),
    ],
)
def test_wrong_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        proxy_teacher(*arguments)
    with pytest.raises(ValueError, match="`solver` must be"):
        proxy_teacher([[0.5, 0.5]], 1.0, solver="bisection")


class TestDerivative:
    @pytest.mark.parametrize("shape", [(1,), (3,), (3, 3)])
    def test_epsilon_gradient(self, shape):
        rng = np.random.default_rng(0)
        t = rng.dirichlet(np.ones(3), size=6)
        t[0] = [0.6, 0.4, 0.0]
        t[1] = [0.0, 1.0, 0.0]
        epsilon, upstream = rng.uniform(0, 3, shape), rng.normal(size=t.shape)

        def value(epsilon):
            return (proxy_teacher(t, epsilon).probabilities * upstream).sum()

        q = proxy_teacher(t, epsilon).probabilities
        np.testing.assert_allclose(
            epsilon_gradient(t, q, epsilon, upstream),
            helpers.numerical_gradient(value, epsilon, 1e-5),
            rtol=1e-6,
            atol=1e-8,
        )

    @pytest.mark.parametrize("epsilon", [[1.5], [0.5, 2.0, 0.1]])
    def test_of_tensors(self, epsilon):
        rng = np.random.default_rng(0)
        t = rng.dirichlet(np.ones(3), size=6)
        epsilon, upstream = np.array(epsilon), rng.normal(size=t.shape)

        def value(t, epsilon):
            q = proxy_teacher(t, epsilon).probabilities
            return (q * upstream).sum()

        factors = keras.ops.convert_to_tensor(upstream, "float32")

        def tensor(t, epsilon):
            return proxy_tensor(t, epsilon) * factors

        small = [t.astype("float32"), epsilon.astype("float32")]
        np.testing.assert_allclose(
            helpers.gradient_of(tensor, *small, argument=1),
            helpers.numerical_gradient(lambda e: value(t, e), epsilon, 1e-5),
            rtol=1e-4,
            atol=1e-5,
        )
        # The function of arrays divides t by its sum.
        found = helpers.gradient_of(tensor, *small)
        found = found - (found * t).sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(
            found,
            helpers.numerical_gradient(lambda t: value(t, epsilon), t, 1e-6),
            rtol=1e-3,
            atol=1e-4,
        )


class TestLayer:
    @pytest.mark.parametrize(
        "epsilon", [[2.0, 0.5, 0.1], np.ones((3, 3)), [-1.0, -0.5, -1 / 3]]
    )
    def test_values(self, epsilon):
        t = np.random.default_rng(0).dirichlet(np.full(3, 0.5), size=20)
        t[0], t[1] = [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]
        found = ProxyTeacher(epsilon)(t.astype("float32"))
        np.testing.assert_allclose(
            ops.convert_to_numpy(found),
            proxy_teacher(t, epsilon).probabilities,
            rtol=1e-4,
            atol=1e-5,
        )

    def test_constant_epsilon_of_order_one(self):
        t = np.random.default_rng(0).dirichlet(np.ones(4), size=5)
        padded = np.concatenate([t, np.zeros((1, 4))]).astype("float32")
        found = ops.convert_to_numpy(proxy_tensor(padded, np.array([2.0])))
        assert not found[-1].any()
        np.testing.assert_allclose(
            found[:-1], proxy_teacher(t, 2.0).probabilities, rtol=1e-5
        )

    def test_wrong_rows(self):
        layer = ProxyTeacher([2.0, 0.5])
        with pytest.raises(ValueError, match="`inputs` must hold"):
            layer(np.array([[2.0, -1.0]]))

    def test_fit_trains_epsilon_and_keeps_the_loss_convex(self, tmp_path):
        rng = np.random.default_rng(0)
        truth = rng.dirichlet(np.ones(3), size=256)
        labels = helpers.draw_labels(truth, seed=1)
        overconfident = helpers.softmax(3 * np.log(truth)).astype("float32")
        model = keras.Sequential([keras.Input((3,)), ProxyTeacher([0.0, 0.0])])
        model.compile(
            keras.optimizers.Adam(0.2),
            "sparse_categorical_crossentropy",
            jit_compile=helpers.jit(),
        )
        before = model.evaluate(overconfident, labels, verbose=0)
        model.fit(overconfident, labels, batch_size=256, epochs=30, verbose=0)
        assert model.evaluate(overconfident, labels, verbose=0) < before
        epsilon = model.get_weights()[0]
        assert np.all(epsilon >= [-1.0, -0.5])
        assert np.any(epsilon != 0.0)
        model.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(again.get_weights()[0], epsilon)

    def test_binary_head_and_shape(self):
        layer = ProxyTeacher([2.0, 0.5])
        found = layer(np.array([[0.2], [0.9]], "float32"))
        assert tuple(found.shape) == layer.compute_output_shape((2, 1))
        assert layer.compute_output_shape((None, 5, 4)) == (None, 5, 4)
        with pytest.raises(ValueError, match="must have shape"):
            ProxyTeacher(np.ones((3, 1)))(np.full((2, 4), 0.25))
