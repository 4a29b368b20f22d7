"""The Gaussians of Ren et al. (2022): data and training, compiled by JAX."""

import csv
import functools
import types

import jax
import keras
import numpy as np
from jax import numpy as jnp
from keras import layers
from scipy.special import softmax

from keras_ptloss import PTLoss, proxy_teacher, pt_loss
from keras_ptloss.losses import Flooding, FocalLoss, LabelSmoothingLoss

EPOCHS, BATCH, LEARNING_RATE, MOMENTUM = 100, 32, 5e-4, 0.9
KL = PTLoss(0.0, from_logits=True, name="KL")

# The ranges of Table 5, and levels for Flooding, of which it gives none.
SMOOTHING = [
    LabelSmoothingLoss(d, from_logits=True, name=f"delta {d}")
    for d in (0.02, 0.05, 0.1, 0.15, 0.2)
]
TEMPERATURES = [
    PTLoss(0.0, teacher_temperature=tau, from_logits=True, name=f"tau {tau}")
    for tau in (0.1, 0.2, 0.5, 2.0, 5.0, 10.0)
]
FOCAL = [
    FocalLoss(gamma, from_logits=True, name=f"gamma {gamma}")
    for gamma in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
]
FLOODING = [
    Flooding(KL, level, name=f"level {level}")
    for level in (0.01, 0.02, 0.05, 0.1, 0.2)
]


def draw(seed):
    """Return inputs, labels and p(class | x) of 105,000 rows."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(-1, 2, size=(3, 30))
    parts = []
    for number in (100_000, 5_000):
        labels = rng.integers(3, size=number)
        x = centres[labels] + np.sqrt(6) * rng.normal(size=(number, 30))
        squares = np.sum((x[:, None] - centres) ** 2, axis=2)
        parts.append((x.astype("float32"), labels, softmax(-squares / 12, 1)))
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def build():
    """Return the MLP."""
    hidden = [layers.Dense(128, "relu"), layers.Dense(128, "relu")]
    model = keras.Sequential([keras.Input((30,)), *hidden, layers.Dense(3)])
    model.compile(
        keras.optimizers.SGD(LEARNING_RATE, MOMENTUM),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


MODEL = build()


def logits(weights, x):
    """Return the MLP's outputs with other weights."""
    return MODEL.stateless_call(weights, [], x)[0]


def predict(weights, x):
    """Return the MLP's probabilities with other weights."""
    return softmax(np.asarray(logits(weights, x), "float64"), axis=1)


@functools.partial(jax.jit, static_argnames="loss")
def epochs(weights, x, t, loss, epsilon, validation, key):
    """Return the weights and validation accuracies after each epoch."""

    def cost(weights, rows):
        z = logits(weights, x[rows])
        if loss is not None:
            return loss(t[rows], z)
        return jnp.mean(pt_loss(t[rows], z, epsilon, from_logits=True))

    def step(state, rows):
        weights, velocity = state
        slopes = jax.grad(cost)(weights, rows)
        velocity = [
            MOMENTUM * v + g for v, g in zip(velocity, slopes, strict=True)
        ]
        weights = [
            w - LEARNING_RATE * v
            for w, v in zip(weights, velocity, strict=True)
        ]
        return (weights, velocity), None

    def epoch(state, key):
        order = jax.random.permutation(key, len(x))
        batches = order[: len(x) // BATCH * BATCH].reshape(-1, BATCH)
        state, _ = jax.lax.scan(step, state, batches)
        z = logits(state[0], validation[0])
        return state, (state[0], jnp.mean(z.argmax(axis=1) == validation[1]))

    state = weights, [jnp.zeros_like(w) for w in weights]
    return jax.lax.scan(epoch, state, jax.random.split(key, EPOCHS))[1]


def train(task, x, t, loss=KL, epsilon=()):
    """Return the weights of each epoch, the best epoch and its accuracy.

    PTLoss takes its coefficients from `epsilon` if `loss` is None, so that all
    coefficients share one compiled function.
    """
    keras.utils.set_random_seed(task.seed)
    weights = [jnp.asarray(w) for w in build().get_weights()]
    epsilon = np.pad(np.asarray(epsilon, "float32"), (0, 5 - len(epsilon)))
    key = jax.random.key(task.seed)
    t = np.asarray(t, "float32")
    path, right = epochs(weights, x, t, loss, epsilon, task.validation, key)
    # Keras may delete the memory of JAX arrays that become its weights.
    path = [np.array(w) for w in path]
    path = [[w[epoch] for w in path] for epoch in range(EPOCHS)]
    return path, int(right.argmax()), float(right.max())


def accuracy(task, weights):
    """Return the test accuracy."""
    predicted = predict(weights, task.test_x).argmax(axis=1)
    return np.mean(predicted == task.test_labels)


def load(seed):
    """Return the data and the teacher of a seed."""
    x, labels, truth = draw(seed)
    task = types.SimpleNamespace(seed=seed, x=x[:5000], truth=truth[:5000])
    task.onehot = np.eye(3)[labels[:5000]]
    task.few_x, task.few_labels = x[5000:6000], labels[5000:6000]
    task.validation = x[6000:10000], labels[6000:10000]
    task.validation_truth = truth[6000:10000]
    test, new = slice(10000, 100000), slice(100000, None)
    task.test_x, task.test_labels = x[test], labels[test]
    task.bayes = np.mean(truth[test].argmax(axis=1) == labels[test])
    task.new_x, task.new_truth = x[new], truth[new]
    task.path, task.best, _ = train(task, task.x, task.onehot)
    return task


def minimum(t, loss=KL, epsilon=()):
    """Return the probabilities at which a loss is lowest, or NaN."""
    if loss is None:
        return proxy_teacher(t, epsilon).probabilities
    if isinstance(loss, LabelSmoothingLoss):
        return (1 - loss.delta) * t + loss.delta / 3
    if isinstance(loss, PTLoss):
        log_t = np.log(np.maximum(t, 1e-7))
        return softmax(log_t / loss.teacher_temperature, axis=1)
    return np.full_like(t, np.nan)


def distance(t, truth):
    """Return the mean L2 distance of targets to the truth.

    Targets of labelled rows, after the others, are left out.
    """
    if len(t) < len(truth):
        return np.nan
    return np.linalg.norm(t[: len(truth)] - truth, axis=1).mean()


def read(path, seed=None):
    """Return the rows of a CSV file, of one seed or of all."""
    if not path.exists():
        return []
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if seed is None or row["seed"] == str(seed)]


def append(path, seed, method, setting, epoch, *scores):
    """Append a student to a CSV file, and print it."""
    row = (seed, method, setting, epoch, *(f"{score:.5f}" for score in scores))
    print(*row, flush=True)
    columns = ("seed", "method", "setting", "epoch")
    columns += ("validation", "test", "distance")
    new = not path.exists()
    with path.open("a", newline="") as file:
        csv.writer(file).writerows([columns, row] if new else [row])
