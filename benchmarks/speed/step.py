"""Time a training step of `Distiller` against other ways to distil.

    KERAS_BACKEND=jax python benchmarks/speed/step.py [mlp cnn]

Every way trains the same student with the same loss. The ways take turns, an
epoch each; a ratio is the median of the ratios within the rounds. *loop* is a
compiled step written by hand, without metrics and callbacks.
"""

import sys
import time

import keras
import numpy as np
from keras import layers

from keras_ptloss import Distiller, PTLoss

BATCH, STEPS, ROUNDS = 32, 50, 9
LOSS = PTLoss([2.0, 0.5], from_logits=True)
SHAPES = {"mlp": (30,), "cnn": (32, 32, 3)}


def network(kind):
    """Return a model of ten classes."""
    if kind == "mlp":
        hidden = [layers.Dense(128, "relu"), layers.Dense(128, "relu")]
    else:
        hidden = [
            layers.Conv2D(16, 3, activation="relu"),
            layers.MaxPooling2D(),
        ]
        hidden += [layers.Conv2D(32, 3, activation="relu"), layers.Flatten()]
    inputs = keras.Input(SHAPES[kind])
    return keras.Sequential([inputs, *hidden, layers.Dense(10)])


def fitting(model, *data):
    """Return a function that trains a compiled model for an epoch."""
    return lambda: model.fit(*data, batch_size=BATCH, shuffle=False, verbose=0)


def distiller(student, teacher, x):
    """Return an epoch of `keras_ptloss.Distiller`."""
    model = Distiller(student=student, teacher=teacher)
    model.compile("adam", loss=LOSS)
    return fitting(model, x)


def keras_distiller(student, teacher, x):
    """Return an epoch of `keras.distillation.Distiller`."""
    loss = keras.distillation.LogitsDistillation(
        temperature=1.0, loss=lambda t, s: LOSS(keras.ops.softmax(t), s)
    )
    model = keras.distillation.Distiller(
        teacher, student, distillation_losses=loss, student_loss_weight=0.0
    )
    model.compile("adam", loss="sparse_categorical_crossentropy")  # Unused.
    return fitting(model, x, np.zeros(len(x), "int32"))


def loop(student, teacher, x):
    """Return an epoch of a compiled step written by hand."""
    optimizer = keras.optimizers.Adam()
    optimizer.build(student.trainable_variables)
    make_step = jax_step if keras.config.backend() == "jax" else tensorflow_step
    step = make_step(student, teacher, optimizer)

    def epoch():
        for start in range(0, len(x), BATCH):
            loss = step(x[start : start + BATCH])
        float(loss)

    return epoch


def jax_step(student, teacher, optimizer):
    """Return a step on JAX, of models without other state."""
    import jax

    @jax.jit
    def update(trainable, slots, frozen, x):
        t, _ = teacher.stateless_call(frozen, [], x, training=False)

        def value(trainable):
            y, _ = student.stateless_call(trainable, [], x, training=True)
            return LOSS(jax.nn.softmax(t), y)

        loss, gradient = jax.value_and_grad(value)(trainable)
        return loss, *optimizer.stateless_apply(slots, gradient, trainable)

    parts = (student, optimizer, teacher)
    state = [[v.value for v in part.variables] for part in parts]

    def step(x):
        loss, state[0], state[1] = update(*state, x)
        return loss

    return step


def tensorflow_step(student, teacher, optimizer):
    """Return a step on TensorFlow."""
    import tensorflow as tf

    @tf.function
    def step(x):
        t = tf.nn.softmax(teacher(x, training=False))
        with tf.GradientTape() as tape:
            loss = LOSS(t, student(x, training=True))
        weights = student.trainable_variables
        optimizer.apply(tape.gradient(loss, weights), weights)
        return loss

    return step


print(f"Keras {keras.__version__}, {keras.config.backend()}\n")
print("| network | way | CPU ms per step | ratio |\n|---|---|---|---|")
for kind in sys.argv[1:] or SHAPES:
    x = np.random.default_rng(0).normal(size=(STEPS * BATCH, *SHAPES[kind]))
    ways = {}
    for way in (distiller, keras_distiller, loop):
        ways[way.__name__] = way(network(kind), network(kind), x.astype("f"))
    seconds = {name: [] for name in ways}
    for _ in range(1 + ROUNDS):
        for name, epoch in ways.items():
            start = time.process_time()
            epoch()
            seconds[name].append(time.process_time() - start)
    ours = np.array(seconds["distiller"])
    for name, values in seconds.items():
        ratio = np.median((values / ours)[1:])  # The first round compiles.
        ms = 1e3 * np.median(values[1:]) / STEPS
        print(f"| {kind} | {name} | {ms:.2f} | {ratio:.2f} |", flush=True)
