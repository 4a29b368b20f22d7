"""Time PTLoss beside Keras's and Optax's KL divergence.

    KERAS_BACKEND=jax python benchmarks/speed/loss.py

Each loss gets the same logits and soft labels, is averaged over the batch and
differentiated with respect to the logits, in one compiled function. The losses
take turns, and the table shows the median over the rounds of the time relative
to Keras's KL divergence. The times are CPU times of the process, which other
work on the machine hardly changes.
"""

import argparse
import time

import keras
import numpy as np
from keras import ops

from keras_ptloss import PTLoss

BACKEND = keras.backend.backend()


def losses():
    """Return `{name: function of (soft labels, logits)}`."""
    kl = keras.losses.KLDivergence()
    table = {"Keras KL": lambda t, z: kl(t, ops.softmax(z))}
    if BACKEND == "jax":
        import jax
        import optax

        table["Optax KL"] = lambda t, z: optax.losses.kl_divergence(
            jax.nn.log_softmax(z), t
        ).mean()
    table["PTLoss(0)"] = PTLoss(0.0, from_logits=True)
    table["order 1"] = PTLoss(1.0, from_logits=True)
    table["order 5"] = PTLoss([1.0, 0.5, 0.3, 0.2, 0.1], from_logits=True)
    return table


def compiled(loss):
    """Return a function that computes value and gradient and waits for both."""
    if BACKEND == "jax":
        import jax

        both = jax.jit(jax.value_and_grad(loss, argnums=1))
        return lambda t, z: jax.block_until_ready(both(t, z))
    import tensorflow as tf

    @tf.function(jit_compile=True)
    def value_and_gradient(t, z):
        with tf.GradientTape() as tape:
            tape.watch(z)
            value = loss(t, z)
        return value, tape.gradient(value, z)

    return lambda t, z: [x.numpy() for x in value_and_gradient(t, z)]


def measure(classes, batch, rounds):
    """Return `{name: seconds per call, (rounds,)}`."""
    draws = np.random.default_rng(0).normal(size=(2, batch, classes))
    logits, teacher = (ops.cast(3 * x, "float32") for x in draws)
    soft_labels = ops.softmax(teacher)
    functions = {name: compiled(loss) for name, loss in losses().items()}
    for function in functions.values():
        function(soft_labels, logits)  # compile
    calls = int(np.clip(2e6 / (classes * batch), 2, 200))
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.process_time()
            for _ in range(calls):
                function(soft_labels, logits)
            seconds[name].append((time.process_time() - start) / calls)
    return {name: np.array(values) for name, values in seconds.items()}


def main():
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--classes", type=int, nargs="+", default=[2, 10, 100, 1000]
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256, 4096])
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    names = list(losses())
    print(f"| classes | batch | {names[0]}, us | {' | '.join(names[1:])} |")
    print("|---" * (len(names) + 2) + "|")
    ratios = []
    for classes in arguments.classes:
        for batch in arguments.batch:
            seconds = measure(classes, batch, arguments.rounds)
            base = seconds[names[0]]
            row = [np.median(seconds[name] / base) for name in names[1:]]
            ratios.append(row)
            cells = " | ".join(f"{ratio:.2f}" for ratio in row)
            base_us = 1e6 * np.median(base)
            print(f"| {classes} | {batch} | {base_us:.0f} | {cells} |")
    cells = " | ".join(f"{ratio:.2f}" for ratio in np.median(ratios, axis=0))
    print(f"| median | | | {cells} |")


if __name__ == "__main__":
    main()
