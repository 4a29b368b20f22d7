"""What a training step of `Distiller` costs, beside other ways to train.

    python benchmarks/speed/step.py --backend jax|tensorflow \
        [--output benchmarks/results/step.md] [--models mlp cnn bert] [--memory]

Every way trains the same student on the same batches with the same `PTLoss`,
in the same order. They are timed in turn, an epoch each, round by round; a
ratio is the median over the rounds of the ratio within a round. `--memory`
trains each way once more in a process of its own, for its peak memory.
`--program` reads operations, bytes and kernels off JAX's compiled steps: they
do not depend on the load.
"""

import argparse
import functools
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
from machine import load_average, machine, resident

HEADER = """# A training step of `Distiller`, beside other ways

`python benchmarks/speed/step.py --backend jax|tensorflow --memory --output \
benchmarks/results/step.md`, once a backend.

* *Distiller*: `fit`, with its default metric; *no metrics*:
  `teacher_metrics=[]`; *8 steps*: `steps_per_execution=8`; *corrected*: the
  loss is `ProxyKLDivergence` of two coefficients and a matrix.
* *keras.distillation*: Keras's own, `LogitsDistillation(temperature=1)` with
  the same `PTLoss`, which keeps three metrics.
* *loop*: a step written by hand (teacher, student, loss, gradient, optimizer),
  compiled by XLA, called in a Python loop over NumPy batches; no metrics.
  TensorFlow's `fit` takes a plain graph on a CPU, not XLA: there are
  *Distiller, XLA* and *loop, plain graph* too.
* *stored labels*: `student.fit` on the teacher's outputs, kept beforehand.
* *empty fit*: `fit` of a model whose step does nothing: what Keras's own loop
  takes.

Ratios are to *Distiller*, below 1 is faster: median over the interleaved rounds
of the ratio of an epoch's time within a round, quartiles in brackets. "CPU" is
the process's time on all threads, "wall" the clock's; other work on the machine
moves the wall's more. Examples a second are by the wall, the median. Peak
memory is the largest resident size of a process that trains this way alone,
with all that it imports.

Networks, student and teacher alike: *mlp* 30-128-128-3, batch 32; *cnn* three
3 x 3 convolutions (16, 32, 64 filters) on 32 x 32 x 3 images, batch 64; *bert*
BERT-tiny (2 layers, 128 wide, KerasHub, random weights), 32 tokens, batch 32.
Adam.
"""
DISTILLER = "Distiller"


def network(kind):
    """Return a function that makes the model, its inputs, and the batch."""
    import keras

    generator = np.random.default_rng(0)
    layers = keras.layers
    if kind == "mlp":

        def make():
            return keras.Sequential(
                [
                    keras.Input((30,)),
                    layers.Dense(128, "relu"),
                    layers.Dense(128, "relu"),
                    layers.Dense(3),
                ]
            )

        return make, generator.normal(size=(6400, 30)).astype("float32"), 32
    if kind == "cnn":

        def make():
            blocks = [keras.Input((32, 32, 3))]
            for filters in (16, 32, 64):
                blocks += [
                    layers.Conv2D(filters, 3, activation="relu"),
                    layers.MaxPooling2D(),
                ]
            return keras.Sequential(
                [*blocks, layers.Flatten(), layers.Dense(10)]
            )

        images = generator.normal(size=(1024, 32, 32, 3)).astype("float32")
        return make, images, 64
    import keras_hub

    def make():
        backbone = keras_hub.models.BertBackbone(
            vocabulary_size=30522,
            num_layers=2,
            num_heads=2,
            hidden_dim=128,
            intermediate_dim=512,
            max_sequence_length=128,
        )
        return keras_hub.models.BertTextClassifier(
            backbone, num_classes=2, preprocessor=None
        )

    shape = (512, 32)
    tokens = {
        "token_ids": generator.integers(0, 30522, shape).astype("int32"),
        "segment_ids": np.zeros(shape, "int32"),
        "padding_mask": np.ones(shape, "int32"),
    }
    return make, tokens, 32


def examples(x):
    """Return how many examples there are."""
    return len(next(iter(x.values())) if isinstance(x, dict) else x)


def new_loss():
    """Return the loss that every way has."""
    from keras_ptloss import PTLoss

    return PTLoss([2.0, 0.5], from_logits=True, teacher_from_logits=True)


def fitting(model, batch, *data):
    """Return a function that trains a compiled model for an epoch."""

    def epoch():
        model.fit(*data, batch_size=batch, verbose=0, shuffle=False, epochs=1)

    epoch.model = model
    return epoch


def proxy_loss(classes):
    """Return KL to a corrected teacher: Newton's method, then a matrix."""
    from keras_ptloss import Correction
    from keras_ptloss.losses import ProxyKLDivergence

    correction = Correction(
        [2.0, 0.5],
        proxy_scale=np.eye(classes) + 0.1,
        teacher_from_logits=True,
    )
    return ProxyKLDivergence(correction, from_logits=True)


def distiller(make, x, batch, *, metrics=None, steps=1, xla="auto", loss=None):
    """Return an epoch of `Distiller`."""
    from keras_ptloss import Distiller

    student = make()
    loss = new_loss() if loss is None else loss(student.output_shape[-1])
    model = Distiller(student, make(), teacher_metrics=metrics)
    model.compile("adam", loss=loss, steps_per_execution=steps, jit_compile=xla)
    return fitting(model, batch, x)


def keras_distiller(make, x, batch, *, steps=1):
    """Return an epoch of `keras.distillation.Distiller`."""
    import keras

    model = keras.distillation.Distiller(
        teacher=make(),
        student=make(),
        distillation_losses=keras.distillation.LogitsDistillation(
            temperature=1.0, loss=new_loss()
        ),
        student_loss_weight=0.0,
    )
    model.compile(
        "adam",
        loss="sparse_categorical_crossentropy",  # unused; Keras wants one
        steps_per_execution=steps,
    )
    return fitting(model, batch, x, np.zeros(examples(x), "int32"))


def stored(make, x, batch, *, steps=1):
    """Return an epoch of `student.fit` on stored outputs."""
    labels = make().predict(x, batch_size=batch, verbose=0)
    student = make()
    # KerasHub's models would compare the teacher's rows with class indices.
    student.compile(
        "adam", loss=new_loss(), metrics=[], steps_per_execution=steps
    )
    return fitting(student, batch, x, labels)


def empty(make, x, batch, *, steps=1):
    """Return an epoch of a model whose step does nothing."""
    import keras

    class Empty(keras.Model):
        def call(self, inputs):
            return inputs

        def train_step(self, *step):
            logs = {"loss": keras.ops.zeros(())}
            return (logs, step[0]) if len(step) == 2 else logs

    model = Empty()
    model.built = True
    model.compile("adam", steps_per_execution=steps)
    return fitting(model, batch, x)


def loop(make, x, batch, *, xla=True):
    """Return an epoch of a step written by hand."""
    import keras

    student, teacher, loss = make(), make(), new_loss()
    optimizer = keras.optimizers.Adam()
    optimizer.build(student.trainable_variables)
    step = _jax_step
    if keras.backend.backend() == "tensorflow":
        step = functools.partial(_tensorflow_step, xla)
    step = step(student, teacher, loss, optimizer)

    def epoch():
        total = examples(x)
        for start in range(0, total, batch):
            part = slice(start, start + batch)
            rows = (
                {k: v[part] for k, v in x.items()}
                if isinstance(x, dict)
                else x[part]
            )
            last = step(rows)
        return float(last)

    return epoch


def _jax_step(student, teacher, loss, optimizer):
    import functools

    import jax

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, frozen, x):
        trainable, others, slots = state
        target, _ = teacher.stateless_call(*frozen, x, training=False)

        def value(trainable):
            y, new = student.stateless_call(trainable, others, x, training=True)
            return loss(target, y), new

        (now, others), gradient = jax.value_and_grad(value, has_aux=True)(
            trainable
        )
        trainable, slots = optimizer.stateless_apply(slots, gradient, trainable)
        return now, (trainable, others, slots)

    def values(variables):
        return [variable.value for variable in variables]

    state = (
        values(student.trainable_variables),
        values(student.non_trainable_variables),
        values(optimizer.variables),
    )
    frozen = (
        values(teacher.trainable_variables),
        values(teacher.non_trainable_variables),
    )

    def step(x):
        nonlocal state
        now, state = update(state, frozen, x)
        return now

    return step


def _tensorflow_step(xla, student, teacher, loss, optimizer):
    import tensorflow as tf

    @tf.function(jit_compile=xla)
    def step(x):
        target = teacher(x, training=False)
        with tf.GradientTape() as tape:
            value = loss(target, student(x, training=True))
        variables = student.trainable_variables
        gradient = tape.gradient(
            value, [variable.value for variable in variables]
        )
        optimizer.apply(gradient, variables)
        return value

    return step


WAYS = {
    DISTILLER: distiller,
    "Distiller, no metrics": lambda *a: distiller(*a, metrics=[]),
    "Distiller, corrected": lambda *a: distiller(*a, loss=proxy_loss),
    "keras.distillation": keras_distiller,
    "loop": loop,
    "stored labels": stored,
    "empty fit": empty,
    "Distiller, 8 steps": lambda *a: distiller(*a, steps=8),
    "keras.distillation, 8 steps": lambda *a: keras_distiller(*a, steps=8),
    "stored labels, 8 steps": lambda *a: stored(*a, steps=8),
    "empty fit, 8 steps": lambda *a: empty(*a, steps=8),
}
# What Keras's `fit` compiles as a plain graph on a CPU.
TENSORFLOW_WAYS = {
    "Distiller, XLA": lambda *a: distiller(*a, xla=True),
    "loop, plain graph": lambda *a: loop(*a, xla=False),
}


PROGRAMS = {
    DISTILLER: lambda x, batch: (x,),
    "Distiller, no metrics": lambda x, batch: (x,),
    "keras.distillation": lambda x, batch: (x, np.zeros(batch, "int32")),
}


def measure(epochs, rounds):
    """Return `{name: seconds an epoch, (2, rounds)}`, CPU and wall."""
    seconds = {name: [] for name in epochs}
    for epoch in epochs.values():
        epoch()  # compiles
    for _ in range(rounds):
        for name, epoch in epochs.items():
            cpu, wall = time.process_time(), time.perf_counter()
            epoch()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            seconds[name].append((cpu, wall))
    return {name: np.array(both).T for name, both in seconds.items()}


def table(kind, arguments):
    """Measure one network; return Markdown rows."""
    make, x, batch = network(kind)
    ways = dict(WAYS)
    if arguments.backend == "tensorflow":
        ways |= TENSORFLOW_WAYS
    if arguments.ways:
        ways = {name: ways[name] for name in [DISTILLER, *arguments.ways]}
    epochs = {name: way(make, x, batch) for name, way in ways.items()}
    seconds = measure(epochs, arguments.rounds)
    steps = -(-examples(x) // batch)
    lines = []
    for name, times in seconds.items():
        cells = []
        for clock in (0, 1):
            ratios = times[clock] / seconds[DISTILLER][clock]
            low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
            cells.append(
                f"**{middle:.2f}** [{low:.2f}, {high:.2f}] | "
                f"{1e3 * np.median(times[clock]) / steps:.2f}"
            )
        memory = "-"
        if arguments.memory and "8 steps" not in name:
            memory = f"{peak_memory(kind, name, arguments.backend):,.0f}"
        lines.append(
            f"| {kind} | {name} | {' | '.join(cells)} | "
            f"{examples(x) / np.median(times[1]):,.0f} | {memory} |"
        )
        print(lines[-1], flush=True)
    return lines


def program(kind):
    """Return Markdown rows on the compiled steps of JAX, which no load moves.

    Millions of operations, MiB read and written by all kernels, and kernels.
    """
    import jax
    import keras

    make, x, batch = network(kind)
    rows = keras.tree.map_structure(lambda values: values[:batch], x)
    lines = []
    for name, data in PROGRAMS.items():
        epoch = WAYS[name](make, x, batch)
        model = epoch.model
        epoch()
        model.optimizer.build(model.trainable_variables)
        state = tuple(
            [variable.value for variable in variables]
            for variables in (
                model.trainable_variables,
                model.non_trainable_variables,
                model.optimizer.variables,
                model.metrics_variables,
            )
        )
        step = jax.jit(model.train_step, donate_argnums=0)
        compiled = step.lower(state, data(rows, batch)).compile()
        cost, text = compiled.cost_analysis(), compiled.as_text()
        entry = text[text.index("\nENTRY") :]
        kernels = len(
            re.findall(r" = \S+ (?:fusion|dot|convolution|call)\(", entry)
        )
        lines.append(
            f"| {kind} | {name} | {cost['flops'] / 1e6:.2f} | "
            f"{cost['bytes accessed'] / 2**20:.2f} | {kernels} |"
        )
        print(lines[-1], flush=True)
    return lines


def peak_memory(kind, name, backend):
    """Return the MiB of a process that trains in one way only."""
    command = [sys.executable, __file__, "--backend", backend]
    done = subprocess.run(
        [*command, "--models", kind, "--only", name],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout.split()[-1])


def write(report, output):
    """Append to a file, if there is one."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        new = not output.exists()
        with open(output, "a") as file:
            file.write((HEADER if new else "") + report)


def main():
    """Measure a backend and append to the output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["jax", "tensorflow"])
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn", "bert"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", action="store_true")
    every_way = [*WAYS, *TENSORFLOW_WAYS]
    parser.add_argument("--ways", nargs="+", choices=every_way)
    parser.add_argument("--only", choices=every_way)
    parser.add_argument("--program", action="store_true")
    arguments = parser.parse_args()
    arguments.backend = arguments.backend or os.environ.get(
        "KERAS_BACKEND", "jax"
    )
    os.environ["KERAS_BACKEND"] = arguments.backend
    if arguments.only:
        way = (WAYS | TENSORFLOW_WAYS)[arguments.only]
        epoch = way(*network(arguments.models[0]))
        for _ in range(2):
            epoch()
        print(resident("VmHWM"))
        return
    if arguments.program:
        lines = [
            "",
            "## jax: the compiled step",
            "",
            "| network | way | million operations | MiB moved | kernels |",
            "|---" * 5 + "|",
        ]
        for kind in arguments.models:
            lines += program(kind)
        return write("\n".join(lines) + "\n", arguments.output)
    lines = [
        "",
        f"## {arguments.backend}",
        "",
        "| network | way | CPU | ms a step | wall | ms a step | examples/s | "
        "peak MiB |",
        "|---" * 8 + "|",
    ]
    for kind in arguments.models:
        lines += table(kind, arguments)
    packages = ("keras", "keras-hub", arguments.backend, "numpy")
    work = load_average("at the end")
    facts = f"{arguments.rounds} rounds. {machine(packages, work)}"
    report = "\n".join([*lines, "", facts]) + "\n"
    write(report, arguments.output)


if __name__ == "__main__":
    main()
