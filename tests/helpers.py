"""NumPy references, written from the formulas of the paper, in float64.

They are deliberately plain: powers instead of Horner's rule, and loops over
orders and rows. Nothing here is imported from the package.
"""

import json
import pathlib

import keras
import numpy as np
import pytest
import scipy.special

# Losses, proxy teachers and Eq. 11 scores in float64, computed by an
# independent implementation.
GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden.json").read_text())


def golden_parameters():
    return [
        pytest.param(case, id=f"{index}-C{case['C']}-{case['kind']}")
        for index, case in enumerate(GOLDEN)
    ]


def softmax(logits):
    return scipy.special.softmax(np.asarray(logits, "float64"), axis=-1)


def per_class(epsilon, classes):
    """Write coefficients out as `(C, M)`, or `(N, C, M)` as they are."""
    epsilon = np.asarray(epsilon, "float64")
    if epsilon.ndim == 0:
        epsilon = epsilon[None]
    if epsilon.ndim == 1:
        epsilon = np.tile(epsilon, (classes, 1))
    return epsilon


def perturbation(p, epsilon):
    """`sum_m eps_{c,m} (1 - p_c)^m` for each class."""
    epsilon = per_class(epsilon, p.shape[-1])
    total = np.zeros_like(p)
    for m in range(1, epsilon.shape[-1] + 1):
        total = total + epsilon[..., m - 1] * (1.0 - p) ** m
    return total


def pt_loss(teacher, student, epsilon):
    """Eq. 7 on probabilities, one value per row."""
    teacher = np.asarray(teacher, "float64")
    student = np.asarray(student, "float64")
    kl = scipy.special.rel_entr(teacher, student).sum(axis=-1)
    return kl + (teacher * perturbation(student, epsilon)).sum(axis=-1)


def pt_loss_of_logits(teacher, logits, epsilon):
    """Eq. 7 on the student's logits, one value per row; finite at +-1e4."""
    teacher = np.asarray(teacher, "float64")
    logits = np.asarray(logits, "float64")
    log_p = scipy.special.log_softmax(logits, axis=-1)
    kl = np.sum(scipy.special.xlogy(teacher, teacher) - teacher * log_p, -1)
    return kl + np.sum(teacher * perturbation(np.exp(log_p), epsilon), -1)


def fixed_point(teacher, q, epsilon):
    """`w_c = t_c (1 + q_c h_c(q_c))` divided by its sum."""
    epsilon = per_class(epsilon, q.shape[-1])
    out = np.empty_like(q)
    for n in range(len(q)):
        h = np.zeros(q.shape[1])
        for m in range(1, epsilon.shape[-1] + 1):
            h += m * epsilon[:, m - 1] * (1.0 - q[n]) ** (m - 1)
        w = teacher[n] * (1.0 + q[n] * h)
        out[n] = w / w.sum()
    return out


def risk(q, labels):
    """Eq. 11 with loops."""
    distances, negentropies = [], []
    for row, label in zip(q, labels, strict=True):
        y = np.zeros(len(row))
        y[label] = 1.0
        distances.append(np.linalg.norm(row - y))
        negentropies.append(scipy.special.xlogy(row, row).sum())
    return np.mean(distances) ** 2 + np.mean(np.square(negentropies))


def nll(q, labels):
    return np.mean([-np.log(row[y]) for row, y in zip(q, labels, strict=True)])


def numerical_gradient(function, x, step=1e-6):
    """Central differences of a scalar function, entry by entry."""
    x = np.array(x, "float64")
    gradient = np.empty_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


def dirichlet(seed, rows, classes, concentration=1.0):
    generator = np.random.default_rng(seed)
    return generator.dirichlet(np.full(classes, concentration), size=rows)


def draw_labels(probabilities, seed):
    """Draw one label from each row."""
    uniform = np.random.default_rng(seed).random((len(probabilities), 1))
    cumulative = np.cumsum(probabilities, axis=1)
    cumulative /= cumulative[:, -1:]
    return np.argmax(uniform < cumulative, axis=1)


def skewed(truth, factors):
    """A teacher biased by class: `t_c` proportional to `truth_c factor_c`."""
    teacher = truth * np.asarray(factors)
    return teacher / teacher.sum(axis=1, keepdims=True)


def gradient_of(function, *inputs, argument=0):
    """Gradient of `sum(function(*inputs))` by the backend's own autodiff."""
    if keras.backend.backend() == "torch":
        tensors = [keras.ops.convert_to_tensor(x) for x in inputs]
        tensors[argument] = tensors[argument].detach().requires_grad_()
        function(*tensors).float().sum().backward()
        return tensors[argument].grad.float().cpu().numpy()
    if keras.backend.backend() == "jax":
        import jax
        import jax.numpy as jnp

        arrays = [jnp.asarray(x) for x in inputs]
        gradient = jax.grad(
            lambda *args: jnp.sum(function(*args).astype("float32")),
            argnums=argument,
        )
        return np.asarray(gradient(*arrays).astype("float32"))
    import tensorflow as tf

    tensors = [tf.convert_to_tensor(x) for x in inputs]
    with tf.GradientTape() as tape:
        tape.watch(tensors[argument])
        value = tf.reduce_sum(tf.cast(function(*tensors), "float32"))
    gradient = tape.gradient(value, tensors[argument])
    return np.asarray(tf.cast(gradient, "float32"))


def compiled(function):
    """Compile a function of tensors, except on PyTorch."""
    if keras.backend.backend() == "torch":
        return function
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function, jit_compile=True)


def jit(wanted=True):
    """Return `jit_compile`: PyTorch's compiler takes minutes for a model."""
    return wanted and keras.backend.backend() != "torch"


def linear_model(classes, *, seed=0, activation=None):
    """Build one dense layer on five inputs."""
    init = keras.initializers.GlorotUniform(seed=seed)
    return keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(
                classes, activation=activation, kernel_initializer=init
            ),
        ]
    )


def soft_labelled(classes):
    """Draw 32 examples `(32, 5)` and a teacher's probabilities of them."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(32, 5)).astype("float32")
    soft_labels = generator.dirichlet(np.ones(classes), 32).astype("float32")
    return x, soft_labels
