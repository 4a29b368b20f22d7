"""What a PTLoss costs: value and gradient on logits, beside other losses.

    KERAS_BACKEND=jax python benchmarks/speed/loss.py \
        --output benchmarks/results/loss.md
    KERAS_BACKEND=tensorflow python benchmarks/speed/loss.py \
        --output benchmarks/results/loss.md

Every loss gets the same logits and soft labels, is averaged over the batch and
differentiated by the logits, in one compiled function. A run measures one
backend and appends its tables to the output. All losses of a table row are
timed in turn, repeat by repeat; a ratio is the median over the repeats of the
ratio within a repeat.
"""

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import time

import keras
import numpy as np

from keras_ptloss import PTLoss

CROSS_ENTROPY = "Keras cross-entropy"
HEADER = """# PTLoss: value and gradient, beside other losses

`KERAS_BACKEND=jax|tensorflow python benchmarks/speed/loss.py --output \
benchmarks/results/loss.md`, once a backend.

Forward and backward from float32 logits (standard normal, times 3) with soft
labels (softmax of the like), mean over the batch, one compiled function.
"PTLoss" is `PTLoss(eps, from_logits=True, teacher_from_logits=False)`, epsilon
uniform in [-1/m, 10]; "Keras KL" is `KLDivergence` after softmax; "Keras
cross-entropy" is `CategoricalCrossentropy(from_logits=True)`, the 1.00 of the
ratios. First number: ratio to it, median of the ratios within each of the
interleaved repeats, with their quartiles in brackets; then the median in
microseconds. At a few dozen microseconds the cost of calling a compiled
function is most of what is seen.
"""


def losses(classes, seed):
    """Return `{name: function (labels, logits) -> mean loss}`."""
    generator = np.random.default_rng(seed)

    def perturbed(order, rows):
        low = -1.0 / np.arange(1, order + 1)
        shape = (classes, order) if rows == "per class" else (order,)
        return PTLoss(
            generator.uniform(low, 10.0, size=shape),
            from_logits=True,
            teacher_from_logits=False,
        )

    kl = keras.losses.KLDivergence()
    table = {
        CROSS_ENTROPY: keras.losses.CategoricalCrossentropy(from_logits=True),
        "Keras KL": lambda t, z: kl(t, keras.ops.softmax(z)),
    }
    if keras.backend.backend() == "jax":
        import jax
        import optax

        table["Optax KL"] = lambda t, z: optax.losses.kl_divergence(
            jax.nn.log_softmax(z), t
        ).mean()
    for order in (1, 5):
        for rows in ("shared", "per class"):
            table[f"PTLoss M={order} {rows}"] = perturbed(order, rows)
    return table


def compiled(loss, xla):
    """Return a function `(labels, logits)` that waits for both results."""
    if keras.backend.backend() == "jax":
        import jax

        both = jax.jit(jax.value_and_grad(loss, argnums=1))
        return lambda t, z: jax.block_until_ready(both(t, z))
    import tensorflow as tf

    @tf.function(jit_compile=xla)
    def value_and_gradient(t, z):
        with tf.GradientTape() as tape:
            tape.watch(z)
            value = loss(t, z)
        return value, tape.gradient(value, z)

    return lambda t, z: [part.numpy() for part in value_and_gradient(t, z)]


def measure(classes, batch, xla, repeats, seed):
    """Return `{name: seconds a call, (repeats,)}`."""
    generator = np.random.default_rng(seed)
    draw = generator.normal(size=(2, batch, classes)).astype("float32") * 3
    logits = keras.ops.convert_to_tensor(draw[0])
    labels = keras.ops.softmax(keras.ops.convert_to_tensor(draw[1]))
    functions = {
        name: compiled(loss, xla)
        for name, loss in losses(classes, seed).items()
    }
    calls = {}
    for name, function in functions.items():
        function(labels, logits)  # compiles
        start = time.perf_counter()
        for _ in range(3):
            function(labels, logits)
        once = (time.perf_counter() - start) / 3
        calls[name] = int(np.clip(0.02 / once, 2, 500))
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                function(labels, logits)
            seconds[name].append((time.perf_counter() - start) / calls[name])
    return {name: np.array(values) for name, values in seconds.items()}


def table(xla, arguments):
    """Measure one way of compiling; return Markdown lines."""
    lines = []
    for classes in arguments.classes:
        for batch in arguments.batch:
            seconds = measure(
                classes, batch, xla, arguments.repeats, arguments.seed
            )
            if not lines:
                lines.append("| C | batch | " + " | ".join(seconds) + " |")
                lines.append("|---" * (len(seconds) + 2) + "|")
            cells = []
            for values in seconds.values():
                ratios = values / seconds[CROSS_ENTROPY]
                low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
                cells.append(
                    f"**{middle:.2f}** [{low:.2f}, {high:.2f}] "
                    f"{1e6 * np.median(values):,.0f} µs"
                )
            lines.append(f"| {classes} | {batch} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    return lines


def machine():
    """Return a sentence on the processor, the versions and the day."""
    cpu = "unknown processor"
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":")[1].strip()
    names = ("keras", keras.backend.backend(), "numpy", "optax")
    versions = [f"{n} {importlib.metadata.version(n)}" for n in names]
    load = os.getloadavg()[0]
    return (
        f"{cpu}, {os.cpu_count()} cores (load average "
        f"{load:.1f} at the start); {', '.join(versions)}; "
        f"{datetime.date.today()}."
    )


def main():
    """Measure this backend and append to the output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument(
        "--classes", type=int, nargs="+", default=[2, 100, 1000]
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 4096])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    backend = keras.backend.backend()
    titles = {"jax": {True: "jax.jit"}}.get(
        backend,
        {True: "tf.function(jit_compile=True)", False: "plain tf.function"},
    )
    lines = []
    facts = f"{arguments.repeats} repeats, seed {arguments.seed}. {machine()}"
    for xla, title in titles.items():
        lines += ["", f"## {backend}: {title}", "", facts, ""]
        lines += table(xla, arguments)
    report = "\n".join(lines) + "\n"
    print(report)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        new = not arguments.output.exists()
        with open(arguments.output, "a") as file:
            file.write((HEADER if new else "") + report)


if __name__ == "__main__":
    main()
