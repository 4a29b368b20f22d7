"""The proxy teacher as a layer: its values, its derivative, its training."""

import helpers
import keras
import numpy as np
import pytest
from keras import ops

from keras_ptloss import Distiller, ProxyTeacher, PTLoss, proxy_teacher
from keras_ptloss.proxy import _layer
from keras_ptloss.proxy._newton import newton

BACKEND = keras.backend.backend()


@pytest.fixture
def teacher_rows():
    rows = np.random.default_rng(0).dirichlet([0.7] * 4, size=16)
    return rows.astype("float32")


def gradient(function, *arrays):
    """Differentiate a scalar function by the backend's own autodiff."""
    tensors = [ops.convert_to_tensor(a, "float32") for a in arrays]
    if BACKEND == "jax":
        import jax

        grads = jax.jit(jax.grad(function, argnums=range(len(arrays))))(
            *tensors
        )
    elif BACKEND == "torch":
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        function(*tensors).backward()
        grads = [tensor.grad for tensor in tensors]
    else:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            for tensor in tensors:
                tape.watch(tensor)
            value = function(*tensors)
        grads = tape.gradient(value, tensors)
    return [ops.convert_to_numpy(g) for g in grads]


@pytest.mark.parametrize(
    "epsilon", [0.5, [2.0, 0.5, 0.1], np.linspace(-0.3, 4, 12).reshape(4, 3)]
)
def test_values_are_the_solver_s(teacher_rows, epsilon):
    layer = ProxyTeacher(epsilon)
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer(teacher_rows)),
        proxy_teacher(teacher_rows, epsilon).probabilities,
        atol=2e-6,
    )


@pytest.mark.skipif(BACKEND != "jax", reason="JAX compiles it")
def test_is_compiled_once_outside_of_compiled_functions(monkeypatch):
    """A loop that JAX meets there is compiled anew, 1.4 s a call."""
    traced = []

    def counted(*args, **settings):
        traced.append(args)
        return newton(*args, **settings)

    monkeypatch.setattr(_layer, "newton", counted)
    layer = ProxyTeacher([0.5, 0.25])
    rows = np.full((7, 3), 1 / 3, "float32")
    for _ in range(3):
        layer(rows)
    assert len(traced) == 1


def test_leading_axes(teacher_rows):
    layer = ProxyTeacher([1.0, 0.5])
    cube = teacher_rows.reshape(2, 8, 4)
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer(cube)).reshape(16, 4),
        ops.convert_to_numpy(layer(teacher_rows)),
        atol=1e-6,
    )


def test_derivative_against_finite_differences(teacher_rows):
    """Of the solver, in float64, with respect to epsilon and to the teacher."""
    rng = np.random.default_rng(1)
    upstream = rng.normal(size=teacher_rows.shape)
    epsilon = rng.uniform(-0.2, 2.0, size=(4, 3))
    layer = ProxyTeacher(epsilon)
    layer.build((None, 4))

    def through_layer(eps, rows):
        output, _ = layer.stateless_call([eps], [], rows)
        return ops.sum(output * ops.cast(upstream, "float32"))

    def through_solver(eps, rows):
        return np.sum(proxy_teacher(rows, eps).probabilities * upstream)

    by_epsilon, by_teacher = gradient(through_layer, epsilon, teacher_rows)
    step = 1e-5
    for index in np.ndindex(epsilon.shape):
        shift = np.zeros_like(epsilon)
        shift[index] = step
        slope = through_solver(epsilon + shift, teacher_rows)
        slope -= through_solver(epsilon - shift, teacher_rows)
        np.testing.assert_allclose(
            by_epsilon[index], slope / (2 * step), atol=2e-5
        )
    direction = rng.normal(size=teacher_rows.shape) * teacher_rows
    direction -= direction.mean(axis=1, keepdims=True)  # along the simplex
    rows = teacher_rows.astype("float64")
    rows, direction = rows * 0.9 + 0.025, direction * 0.1
    _, by_teacher = gradient(through_layer, epsilon, rows)
    slope = through_solver(epsilon, rows + step * direction)
    slope -= through_solver(epsilon, rows - step * direction)
    np.testing.assert_allclose(
        np.sum(by_teacher * direction), slope / (2 * step), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("temperature", [2.0, [0.5, 1.0, 2.0, 3.0]])
@pytest.mark.parametrize("bias", [None, [0.5, -1.0, 0.0, 1.0]])
@pytest.mark.parametrize("from_logits", [False, True])
def test_calibration_comes_first(teacher_rows, temperature, bias, from_logits):
    layer = ProxyTeacher(
        [1.0, 0.5],
        teacher_from_logits=from_logits,
        teacher_temperature=temperature,
        teacher_bias=bias,
    )
    logits = np.log(teacher_rows) + 3.0 * from_logits
    calibrated = helpers.calibrate(logits, temperature, bias or 0.0)
    got = layer(logits if from_logits else teacher_rows)
    np.testing.assert_allclose(
        ops.convert_to_numpy(got),
        proxy_teacher(calibrated, [1.0, 0.5]).probabilities,
        atol=2e-6,
    )


def test_calibration_is_saved(teacher_rows, tmp_path):
    layer = ProxyTeacher(
        0.5,
        teacher_from_logits=True,
        teacher_temperature=[1.0, 2.0, 3.0, 4.0],
        teacher_bias=0.5,
    )
    model = keras.Sequential([keras.Input((4,)), layer])
    model.save(tmp_path / "proxy.keras")
    loaded = keras.saving.load_model(tmp_path / "proxy.keras")
    np.testing.assert_array_equal(
        model.predict(teacher_rows, verbose=0),
        loaded.predict(teacher_rows, verbose=0),
    )


def biased_teacher(n=2000):
    """A teacher that gives class 0 five times its due."""
    rng = np.random.default_rng(0)
    truth = rng.dirichlet([1.0, 1.0, 1.0], size=n)
    labels = np.array([rng.choice(3, p=row) for row in truth])
    skewed = truth * [5.0, 1.0, 1.0]
    skewed /= skewed.sum(axis=1, keepdims=True)
    return skewed.astype("float32"), labels


def test_epsilon_is_trained_by_fit():
    rows, labels = biased_teacher()
    model = keras.Sequential(
        [keras.Input((3,)), ProxyTeacher(np.zeros((3, 2)))]
    )
    model.compile(
        keras.optimizers.Adam(0.1), loss="sparse_categorical_crossentropy"
    )
    before = model.evaluate(rows, labels, verbose=0)
    model.fit(rows, labels, epochs=10, batch_size=200, verbose=0)
    after = model.evaluate(rows, labels, verbose=0)
    assert after < before - 0.01
    epsilon = ops.convert_to_numpy(model.layers[-1].epsilon)
    assert np.any(epsilon != 0)
    assert np.all(epsilon >= np.array([-1.0, -0.5]) - 1e-6)


def test_frozen_epsilon_stays(teacher_rows):
    layer = ProxyTeacher([1.0], trainable=False)
    layer.build((None, 4))
    assert layer.trainable_variables == []


def test_save_and_reload(teacher_rows, tmp_path):
    rng = np.random.default_rng(0)
    model = keras.Sequential(
        [keras.Input((4,)), ProxyTeacher(np.zeros((4, 2)))]
    )
    model.layers[-1].epsilon.assign(rng.uniform(0, 3, size=(4, 2)))
    model.save(tmp_path / "proxy.keras")
    loaded = keras.saving.load_model(tmp_path / "proxy.keras")
    np.testing.assert_array_equal(
        model.predict(teacher_rows, verbose=0),
        loaded.predict(teacher_rows, verbose=0),
    )


def test_as_the_teacher_of_a_distiller():
    """KL to the proxy and PTLoss to the teacher have the same optimum."""
    rng = np.random.default_rng(0)
    x = np.tile(np.eye(6, dtype="float32"), (40, 1))  # batches of all six
    table = rng.dirichlet([1.0, 1.0, 1.0], size=6)
    teacher = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(3, "relu", use_bias=False)]
    )
    teacher.set_weights([table.astype("float32")])  # probabilities by lookup
    epsilon = np.array([[3.0, 0.5], [0.2, 0.0], [1.0, 1.0]])
    proxy = keras.Sequential([teacher, ProxyTeacher(epsilon)])
    for live, loss in (
        (proxy, PTLoss(0.0)),
        (teacher, PTLoss(epsilon)),
    ):
        student = keras.Sequential(
            [keras.Input((6,)), keras.layers.Dense(3, "softmax")]
        )
        distiller = Distiller(student, live)
        distiller.compile(keras.optimizers.Adam(0.05), loss=loss)
        distiller.fit(x, epochs=10, batch_size=6, shuffle=False, verbose=0)
        np.testing.assert_allclose(
            student.predict(x[:6], verbose=0),
            proxy_teacher(table, epsilon).probabilities,
            atol=5e-3,
        )


def test_wrong_input(teacher_rows):
    with pytest.raises(ValueError, match="`epsilon` must be finite"):
        ProxyTeacher([np.nan])
    with pytest.raises(ValueError, match="one row a class.*4 classes"):
        ProxyTeacher(np.zeros((3, 2)))(teacher_rows)
    with pytest.raises(ValueError, match="`max_steps`.*max_steps=0"):
        ProxyTeacher(0.5, max_steps=0)
    with pytest.raises(ValueError, match="`inputs`.*teacher_from_logits=True"):
        ProxyTeacher(0.5)(np.array([[2.0, -1.0, 0.3]]))
    with pytest.raises(ValueError, match="`teacher_temperature`.*=-1"):
        ProxyTeacher(0.5, teacher_temperature=-1)
    with pytest.raises(
        ValueError, match="`inputs`.*2 classes.*bias.*4 classes"
    ):
        ProxyTeacher(0.5, teacher_bias=[0.0, 1.0])(teacher_rows)
