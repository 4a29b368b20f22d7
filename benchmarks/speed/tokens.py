"""Memory and time of losses on tokens, beside Keras's sparse cross-entropy.

    KERAS_BACKEND=jax python benchmarks/speed/tokens.py

From hidden states `(tokens, width)` and a head `(vocabulary, width)` to the
mean loss and both gradients, in one compiled function. Each loss runs in its
own process, as memory is the largest resident set, less that before the calls.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

RIVAL = "Keras sparse cross-entropy"
LOSSES = (RIVAL, "TopKPTLoss", "fused_top_k_pt_loss")
WIDTH, ENTRIES, CALLS = 256, 16, 3


def step(name, tokens, vocabulary):
    """Return a compiled function of no arguments that waits for its results."""
    import keras
    import numpy as np
    from keras import ops

    from keras_ptloss.losses import TopKPTLoss, fused_top_k_pt_loss

    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(tokens, WIDTH)).astype("float32")
    head = rng.normal(size=(vocabulary, WIDTH), scale=0.1).astype("float32")
    ids = np.stack([rng.permutation(vocabulary)[:ENTRIES] for _ in hidden])
    logs = np.log(0.9 * rng.dirichlet(np.ones(ENTRIES), tokens))
    y_true = np.stack([ids, logs], axis=-1).astype("float32")
    epsilon = [0.5, -0.2]

    def logits(h, w):
        return ops.matmul(h, ops.transpose(w))

    rival = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    top_k = TopKPTLoss(epsilon, from_logits=True)
    loss, targets = {
        RIVAL: (lambda y, h, w: rival(y, logits(h, w)), ids[:, 0]),
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
    def both(y, h, w):
        with tf.GradientTape() as tape:
            tape.watch([h, w])
            value = loss(y, h, w)
        return value, tape.gradient(value, [h, w])

    return lambda: [x.numpy().sum() for x in both(*inputs)[1]]


def resident(field):
    """Return a field of this process's status in MiB."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def measure(name, tokens, vocabulary):
    """Return MiB and seconds of one loss, in this process."""
    step(name, tokens, 1000)()  # loads the compiler
    run = step(name, tokens, vocabulary)
    before = resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    run()  # compiles
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {"mib": resident("VmHWM") - before, "seconds": min(seconds)}


def main(tokens, vocabularies):
    """Print a table with a line for each vocabulary and loss."""
    print("| vocabulary | loss | MiB | ratio | seconds | ratio |")
    print("|---|---|---|---|---|---|")
    for vocabulary in vocabularies:
        rival = None
        for name in LOSSES:
            command = [sys.executable, __file__, "--loss", name]
            command += ["--tokens", tokens, "--vocabularies", vocabulary]
            out = subprocess.check_output([str(part) for part in command])
            found = json.loads(out.splitlines()[-1])
            rival = rival or found
            cells = [f"{vocabulary:,}", name]
            for key, form in (("mib", ".0f"), ("seconds", ".2f")):
                ratio = found[key] / rival[key]
                cells += [format(found[key], form), f"{ratio:.2f}"]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    sizes = [32_000, 152_000]
    parser.add_argument("--vocabularies", type=int, nargs="+", default=sizes)
    parser.add_argument("--loss", choices=LOSSES, help="one, in this process")
    given = parser.parse_args()
    if given.loss:
        found = measure(given.loss, given.tokens, given.vocabularies[0])
        print(json.dumps(found))
    else:
        main(given.tokens, given.vocabularies)
