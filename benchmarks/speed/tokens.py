"""Peak memory and time of losses on a language model's tokens.

    KERAS_BACKEND=jax python benchmarks/speed/tokens.py \
        --output benchmarks/results/tokens.md
    KERAS_BACKEND=tensorflow python benchmarks/speed/tokens.py \
        --output benchmarks/results/tokens.md

From hidden states and a head to a loss and the gradients of both, one compiled
function: Keras's sparse cross-entropy on one label a token, `TopKPTLoss` on the
teacher's 16 likeliest, and the same fused with the head. Each measurement is
that of a process of its own, which has one peak. In a round all losses take
their turn; a ratio is the median over the rounds of the ratio within a round.
"""

import argparse
import ctypes
import gc
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

from machine import load_average, machine, resident

RIVAL = "Keras sparse cross-entropy"
LOSSES = (RIVAL, "TopKPTLoss", "fused_top_k_pt_loss")
HEADER = """# Tokens: peak memory and time, beside sparse cross-entropy

`KERAS_BACKEND=jax|tensorflow python benchmarks/speed/tokens.py --output \
benchmarks/results/tokens.md`, once a backend.

Forward and backward, from float32 hidden states `(tokens, width)` and a head
`(vocabulary, width)` to the mean loss and both gradients, one compiled function
(XLA). "Keras sparse cross-entropy" has logits and one label a token,
"TopKPTLoss" logits and 16 entries a token, epsilon of order 2; the fused one
makes no logits but of a chunk, 4,096 classes. Memory is the process's largest
resident set in all calls, less what it has before them (the inputs, and the
libraries, of which the same with 1,000 classes has made use): results,
temporaries, and what compiling takes. Time is that of the fastest call after
the first. Each number is of a process of its own; ratios are to
cross-entropy in the same round, the median of the rounds, with the lowest and
the highest in brackets. The head's gradient, `vocabulary * width * 4` bytes, is
in all of them.
"""


def build(name, tokens, width, vocabulary, entries, seed):
    """Return a compiled function of no arguments that waits for its results."""
    import keras
    import numpy as np
    from keras import ops

    from keras_ptloss.losses import TopKPTLoss, fused_top_k_pt_loss

    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(tokens, width)).astype("float32")
    head = rng.normal(size=(vocabulary, width), scale=0.1).astype("float32")
    labels = rng.integers(0, vocabulary, tokens)
    ids = np.stack([rng.permutation(vocabulary)[:entries] for _ in hidden])
    logs = np.log(0.9 * rng.dirichlet(np.ones(entries), tokens))
    y_true = np.stack([ids, logs], axis=-1).astype("float32")
    epsilon = [0.5, -0.2]
    rival = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    top_k = TopKPTLoss(epsilon, from_logits=True)

    def logits(hidden, head):
        return ops.matmul(hidden, ops.transpose(head))

    loss, targets = {
        RIVAL: (lambda y, h, w: rival(y, logits(h, w)), labels),
        "TopKPTLoss": (lambda y, h, w: top_k(y, logits(h, w)), y_true),
        "fused_top_k_pt_loss": (
            lambda y, h, w: ops.mean(fused_top_k_pt_loss(y, h, w, epsilon)),
            y_true,
        ),
    }[name]
    inputs = [ops.convert_to_tensor(x) for x in (targets, hidden, head)]
    if keras.backend.backend() == "jax":
        import jax

        both = jax.jit(jax.value_and_grad(loss, argnums=(1, 2)))
        return lambda: jax.block_until_ready(both(*inputs))
    import tensorflow as tf

    @tf.function(jit_compile=True)
    def both(y, hidden, head):
        with tf.GradientTape() as tape:
            tape.watch([hidden, head])
            value = loss(y, hidden, head)
        return value, tape.gradient(value, [hidden, head])

    def run():
        value, gradients = both(*inputs)
        return value.numpy(), [gradient[0, 0].numpy() for gradient in gradients]

    return run


def measure(arguments):
    """Return seconds and MiB of one loss, in this process."""
    shape = arguments.tokens, arguments.width
    others = arguments.entries, arguments.seed
    build(arguments.loss, *shape, 1000, *others)()  # loads the compiler
    run = build(arguments.loss, *shape, arguments.vocabulary[0], *others)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free, to the system
    before = resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak, anew
    run()  # compiles
    seconds = []
    for _ in range(arguments.calls):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "mib": resident("VmHWM") - before}


def ask(name, vocabulary, arguments):
    """Measure one loss in a process of its own."""
    command = [sys.executable, __file__, "--loss", name]
    command += ["--vocabulary", str(vocabulary)]
    for option in ("tokens", "width", "entries", "calls", "seed"):
        command += [f"--{option}", str(getattr(arguments, option))]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode:
        sys.exit(out.stderr)
    return json.loads(out.stdout.splitlines()[-1])


def table(arguments):
    """Measure this backend; return Markdown lines."""
    lines = [
        "| vocabulary | loss | memory, ratio | MiB | time, ratio | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for vocabulary in arguments.vocabulary:
        rounds = [
            {name: ask(name, vocabulary, arguments) for name in LOSSES}
            for _ in range(arguments.rounds)
        ]
        for name in LOSSES:
            cells = [f"{vocabulary:,}", name]
            for quantity, form in (("mib", ",.0f"), ("seconds", ".2f")):
                ratios = [
                    r[name][quantity] / r[RIVAL][quantity] for r in rounds
                ]
                middle = statistics.median(r[name][quantity] for r in rounds)
                cells += [
                    f"**{statistics.median(ratios):.2f}** "
                    f"[{min(ratios):.2f}, {max(ratios):.2f}]",
                    format(middle, form),
                ]
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    return lines


def main():
    """Measure this backend and append to the output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument(
        "--vocabulary", type=int, nargs="+", default=[32_000, 152_000]
    )
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--entries", type=int, default=16)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loss", choices=LOSSES, help="one, in this process")
    arguments = parser.parse_args()
    if arguments.loss:
        print(json.dumps(measure(arguments)))
        return
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    packages = ("keras", backend, "numpy")
    work = f"shared with other work ({load_average('at the start')})"
    facts = (
        f"{arguments.tokens} tokens, width {arguments.width}, "
        f"{arguments.rounds} rounds, fastest of {arguments.calls} calls, seed "
        f"{arguments.seed}. {machine(packages, work)}"
    )
    lines = ["", f"## {backend}", "", facts, "", *table(arguments)]
    report = "\n".join(lines) + "\n"
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        new = not arguments.output.exists()
        with open(arguments.output, "a") as file:
            file.write((HEADER if new else "") + report)


if __name__ == "__main__":
    main()
