"""What a PTLoss costs: value and gradient on logits, beside other losses.

    python benchmarks/speed/loss.py --backend jax [--before CHECKOUT] \
        [--output benchmarks/results/loss.csv] [--full]
    python benchmarks/speed/loss_report.py benchmarks/results/loss.csv

Every loss gets the same logits and soft labels, is averaged over the batch and
differentiated by the logits, in one compiled function. `--before` is another
checkout of this project, whose PTLoss is timed beside this one's.

All losses of a table row are timed in turn, round by round; a ratio is the
median over the rounds of the ratio within a round, with quartiles. Two clocks:
the process's CPU time, of all threads, which other work on the machine hardly
moves; and the wall's. Passes and bytes are read off the compiled program, and
hold whatever else the machine does.

Two costs that are no loss's are kept out of the times: glibc is told to keep
what is freed, so that no loss pays for fresh pages; and JAX not to hand
programs over to another thread, which takes longer than the smallest of them
(it does so with some 1,000 operations and more).
"""

import argparse
import csv
import importlib
import os
import pathlib
import re
import sys
import time

import numpy as np
from machine import machine

ORDERS = (1, 5)
KEEP = {  # freed memory, in this process
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_ARENA_MAX": "1",
}
QUARTILES = ("low", "ratio", "high")
WIDTHS = {"f64": 8, "s64": 8, "f32": 4, "s32": 4, "bf16": 2, "f16": 2}


def load(checkout):
    """Return the PTLoss of a checkout; None is the one that is imported."""
    if checkout is not None:
        for name in [n for n in sys.modules if n.startswith("keras_ptloss")]:
            del sys.modules[name]
        sys.path.insert(0, str(checkout))
    module = importlib.import_module("keras_ptloss")
    if checkout is not None:
        del sys.path[0]
    return module.PTLoss


def rivals():
    """Return `{name: function (labels, logits) -> mean loss}`."""
    import keras

    kl = keras.losses.KLDivergence()
    table = {
        "Keras cross-entropy": keras.losses.CategoricalCrossentropy(
            from_logits=True
        ),
        "Keras KL": lambda t, z: kl(t, keras.ops.softmax(z)),
    }
    if keras.backend.backend() == "jax":
        import jax
        import optax

        table["Optax KL"] = lambda t, z: optax.losses.kl_divergence(
            jax.nn.log_softmax(z), t
        ).mean()
    return table


def forms(full):
    """Return `{name: (per class, dtype, arguments, teacher_from_logits)}`."""
    table = {"shared": (False, "float32", {}, False)}
    if full:
        table["per class"] = (True, "float32", {}, False)
    table["temperature"] = (
        False,
        "float32",
        {"teacher_temperature": 2.0},
        True,
    )
    table["bfloat16"] = (False, "bfloat16", {}, False)
    return table


def losses(classes, form, packages, seed):
    """Return the rivals of one table row, and the PTLoss of each package."""
    per_class, _, arguments, from_logits = form
    table = rivals()
    if from_logits:
        scale = 1.0 / arguments["teacher_temperature"]
        table = {name: _of_logits(f, scale) for name, f in table.items()}
    generator = np.random.default_rng(seed)
    for order in ORDERS:
        low = -1.0 / np.arange(1, order + 1)
        shape = (classes, order) if per_class else (order,)
        epsilon = generator.uniform(low, 10.0, size=shape)
        for name, loss in packages.items():
            table[f"{name} M={order}"] = loss(
                epsilon,
                from_logits=True,
                teacher_from_logits=from_logits,
                **arguments,
            )
    return table


def _of_logits(loss, scale):
    import keras

    return lambda t, z: loss(keras.ops.softmax(scale * t), z)


def compiled(loss, xla, labels, logits):
    """Return a function that waits for value and gradient, and its cost.

    The cost is `(passes, bytes a value, exponentials and logarithms a value)`.
    """
    import keras

    values = int(np.prod(logits.shape))
    if keras.backend.backend() == "jax":
        import jax

        both = jax.jit(jax.value_and_grad(loss, argnums=1))
        text = both.lower(labels, logits).compile().as_text()
        call = lambda t, z: jax.block_until_ready(both(t, z))  # noqa: E731
        return call, cost_of_hlo(text, values)
    import tensorflow as tf

    @tf.function(jit_compile=xla, autograph=False)
    def both(t, z):
        with tf.GradientTape() as tape:
            tape.watch(z)
            value = loss(t, z)
        return value, tape.gradient(value, z)

    def call(t, z):
        return [part.numpy() for part in both(t, z)]

    if not xla:
        return call, cost_of_graph(both, labels, logits, values)
    text = both.experimental_get_compiler_ir(labels, logits)("optimized_hlo")
    return call, cost_of_hlo(text, values)


def cost_of_hlo(text, values):
    """Return passes, bytes and transcendentals of an XLA program."""
    shapes, passes, total = {}, 0, 0
    entry = text[text.index("\nENTRY") :]
    for line in entry.splitlines():
        match = re.match(
            r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)", line
        )
        if not match:
            continue
        name, kind, operation, rest = match.groups()
        shapes[name] = _bytes(kind, values)
        if operation in ("parameter", "tuple", "get-tuple-element", "bitcast"):
            continue
        names = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
        moved = shapes[name] + sum(shapes.get(n, 0) for n in set(names))
        passes += moved > 0
        total += moved
    powers = r" = \w+\[([\d,]+)\]\S* (?:exponential|log|log-plus-one)\("
    transcendentals = sum(
        np.prod([int(n) for n in shape.split(",")])
        for shape in re.findall(powers, text)
    )
    return passes, total / values, float(transcendentals) / values


def _bytes(kind, values):
    """Return the bytes of a type's arrays that have `values` or more."""
    total = 0
    for dtype, shape in re.findall(r"\b([a-z]+\d+)\[([\d,]+)\]", kind):
        size = int(np.prod([int(n) for n in shape.split(",")]))
        if size >= values:
            total += size * WIDTHS[dtype]
    return total


def cost_of_graph(function, labels, logits, values):
    """Return passes, bytes and transcendentals of a plain TensorFlow graph.

    Of the graph as the runtime has optimised it. A kernel of softmax counts as
    one pass, though it goes over its rows, which stay in the cache, thrice.
    """
    import tensorflow as tf

    v1 = tf.compat.v1
    concrete = function.get_concrete_function(labels, logits)
    metadata = v1.RunMetadata()
    with v1.Session(graph=tf.Graph()) as session:
        t = v1.placeholder(labels.dtype, labels.shape)
        z = v1.placeholder(logits.dtype, logits.shape)
        value, gradient = tf.graph_util.import_graph_def(
            concrete.graph.as_graph_def(),
            dict(
                zip((i.op.name for i in concrete.inputs), (t, z), strict=True)
            ),
            [o.name for o in concrete.outputs],
            name="",
        )
        session.run(
            (value, gradient),
            {t: labels.numpy(), z: logits.numpy()},
            v1.RunOptions(
                trace_level=v1.RunOptions.FULL_TRACE,
                output_partition_graphs=True,
            ),
            metadata,
        )
    sizes, passes, total, transcendentals = {}, 0, 0, 0
    skipped = {"_Arg", "_Retval", "_Recv", "_Send", "Placeholder", "Identity"}
    for device in metadata.step_stats.dev_stats:
        for node in device.node_stats:
            name = node.node_name.split(":")[0]
            for output in node.output:
                shape = output.tensor_description.shape.dim
                count = int(np.prod([d.size for d in shape]))
                dtype = tf.as_dtype(output.tensor_description.dtype)
                if count >= values:
                    key = f"{name}:{output.slot}" if output.slot else name
                    sizes[key] = count * dtype.size
    for graph in metadata.partition_graphs:
        for node in graph.node:
            written = sizes.get(node.name, 0)
            read = sum(sizes.get(i, 0) for i in set(node.input))
            if node.op in skipped or not written + read:
                continue
            passes += 1
            total += written + read
            transcendentals += node.op in (
                "Exp",
                "Log",
                "Softmax",
                "LogSoftmax",
                "SoftmaxCrossEntropyWithLogits",
            )
    return passes, total / values, float(transcendentals)


def measure(functions, labels, logits, rounds, seed):
    """Return `{name: seconds a call, (2, rounds)}`, CPU and wall.

    Each round lays its arrays elsewhere, so that no loss has a place of luck.
    """
    calls, seconds = {}, {name: [] for name in functions}
    for name, function in functions.items():
        function(labels, logits)  # compiles
        start = time.perf_counter()
        for _ in range(3):
            function(labels, logits)
        once = (time.perf_counter() - start) / 3
        calls[name] = int(np.clip(0.02 / once, 2, 500))
    shifts = np.random.default_rng(seed).integers(64, 2**16, size=(rounds, 3))
    for gaps in shifts:
        held = []
        for gap, x in zip(gaps, (labels, logits, None), strict=True):
            held.append(np.empty(gap, "uint8"))
            if x is not None:
                held.append(0 * x + x)
        _, t, _, z, _ = held
        for name, function in functions.items():
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(calls[name]):
                function(t, z)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            seconds[name].append((cpu / calls[name], wall / calls[name]))
    return {name: np.array(both).T for name, both in seconds.items()}


def rows(classes, batch, form_name, form, xla, packages, arguments):
    """Measure one cell; return a row for each loss."""
    import keras

    generator = np.random.default_rng(arguments.seed)
    draw = generator.normal(size=(2, batch, classes)).astype("float32") * 3
    dtype = form[1]
    logits = keras.ops.cast(keras.ops.convert_to_tensor(draw[0]), dtype)
    labels = keras.ops.convert_to_tensor(draw[1])
    if not form[3]:
        labels = keras.ops.softmax(labels)
    labels = keras.ops.cast(labels, dtype)
    table = losses(classes, form, packages, arguments.seed)
    both = {n: compiled(f, xla, labels, logits) for n, f in table.items()}
    seconds = measure(
        {name: call for name, (call, _) in both.items()},
        labels,
        logits,
        arguments.rounds,
        arguments.seed,
    )
    kl = [name for name in seconds if name.endswith("KL")]
    found = []
    for name, times in seconds.items():
        passes, width, transcendentals = both[name][1]
        row = {
            "classes": classes,
            "batch": batch,
            "form": form_name,
            "loss": name,
            "passes": passes,
            "bytes": f"{width:.0f}",
            "transcendentals": f"{transcendentals:.0f}",
        }
        for clock, time_of in zip(("cpu", "wall"), (0, 1), strict=True):
            medians = [np.median(seconds[rival][time_of]) for rival in kl]
            best = kl[int(np.argmin(medians))]
            ratios = times[time_of] / seconds[best][time_of]
            quartiles = np.quantile(ratios, [0.25, 0.5, 0.75])
            for part, value in zip(QUARTILES, quartiles, strict=True):
                row[f"{clock}_{part}"] = f"{value:.3f}"
            row[f"{clock}_us"] = f"{1e6 * np.median(times[time_of]):.1f}"
        found.append(row)
        print(*row.values(), flush=True)
    return found


def measured(xla, packages, arguments):
    """Yield the rows of each cell of one way of compiling."""
    for classes in arguments.classes:
        for batch in arguments.batch:
            if classes * batch > arguments.values:
                continue
            for name, form in forms(arguments.full).items():
                # The other forms where time is what is seen, not the call.
                plain = name == "shared" or arguments.full
                if plain or (classes, batch) in ((100, 256), (1000, 256)):
                    yield rows(
                        classes, batch, name, form, xla, packages, arguments
                    )


def append(found, path):
    """Append rows to a CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, found[0].keys(), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(found)


def main():
    """Measure a backend and append to the output as rows come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["jax", "tensorflow"])
    parser.add_argument("--before", type=pathlib.Path)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--classes", type=int, nargs="+")
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--values", type=int, default=2**25)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    full = arguments.full
    arguments.classes = arguments.classes or (
        [2, 10, 100, 1000, 30000] if full else [2, 10, 100, 1000]
    )
    arguments.batch = arguments.batch or (
        [32, 256, 1024, 4096] if full else [32, 256, 4096]
    )
    backend = arguments.backend or os.environ.get("KERAS_BACKEND", "jax")
    os.environ["KERAS_BACKEND"] = backend
    if not os.environ.keys() >= KEEP.keys():  # read where a process begins
        os.execve(
            sys.executable, [sys.executable, *sys.argv], os.environ | KEEP
        )
    if backend == "jax":
        import jax

        jax.config.update("jax_cpu_enable_async_dispatch", False)
    packages = {"PTLoss": load(None)}
    if arguments.before:
        packages["before"] = load(arguments.before)
    programs = {"jax": {True: "jax.jit"}}.get(
        backend,
        {True: "tf.function(jit_compile=True)", False: "plain tf.function"},
    )
    versions = ("keras", backend, "numpy", "optax")
    for xla, program in programs.items():
        for found in measured(xla, packages, arguments):
            facts = machine(versions, f"{arguments.rounds} rounds")
            where = {"backend": backend, "program": program}
            load_now = f"{os.getloadavg()[0]:.1f}"
            found = [
                where | row | {"load": load_now, "facts": facts}
                for row in found
            ]
            if arguments.output:
                append(found, arguments.output)


if __name__ == "__main__":
    main()
