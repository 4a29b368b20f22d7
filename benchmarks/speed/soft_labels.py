"""Speed and memory of stored soft labels.

    python benchmarks/speed/soft_labels.py --rows 1000000 --rival /work/rival

Compares this version with memory maps (`numpy.load(mmap_mode="r")`, which have
no fingerprints and no checksums) and, with `--rival`, with the store of the
version in that folder, the last one before Arrow. Writes rows of probabilities,
top-k rows or token sequences, and reads them in order and shuffled, 1,024 rows
(64 sequences) at a time, as float32. Each step runs in a process of its own, of
which the CPU time counts and the anonymous memory that it adds; the system's
file cache is warm. Prints a Markdown table.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

BATCH = 1024
BLOCK = 4096
LENGTH = 128  # tokens in a sequence
VOCABULARY = 50_000
STEPS = ("write", "in order", "shuffled")


def anonymous():
    """Return this process's anonymous memory in MiB."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise KeyError("RssAnon")


def probabilities(low, a):
    """Return a block of rows; only few differ, as drawing them takes long."""
    rng = np.random.default_rng(low % 16)
    rows = np.exp(2 * rng.standard_normal((BLOCK, a.classes), "float32"))
    rows /= rows.sum(-1, keepdims=True)
    return rows[: a.rows - low]


def likeliest(count, rng, a):
    """Return events `(count, k + 1, 2)` of different ids."""
    start = rng.integers(0, VOCABULARY - 100 * a.k, (count, 1))
    ids = start + 100 * np.arange(a.k)
    probs = rng.random((count, a.k + 1)) + 0.1
    events = np.empty((count, a.k + 1, 2), "float32")
    events[..., :-1, 0], events[..., -1, 0] = ids, -1
    events[..., 1] = np.log(probs / probs.sum(-1, keepdims=True))
    return events


class Numbers:
    """Examples 0, 1, 2, ... which take no memory."""

    def __init__(self, count, batch):
        import keras

        outer = self

        class Data(keras.utils.PyDataset):
            def __len__(self):
                return -(-count // batch)

            def __getitem__(self, index):
                return (outer.batch(index),)

        self.count, self.size, self.data = count, batch, Data()

    def batch(self, index):
        """Return one batch of numbers."""
        low = index * self.size
        return np.arange(low, min(low + self.size, self.count))


def of_tokens(x, a):
    """Return the events of a batch of sequences."""
    rng = np.random.default_rng(int(x[0, 0]) % 16)
    return likeliest(x.size, rng, a).reshape(*x.shape, a.k + 1, 2)


class Tokens(Numbers):
    """Sequences of token ids that all differ."""

    def batch(self, index):
        """Return one batch of sequences."""
        rows = super().batch(index)
        return rows[:, None] + np.arange(LENGTH, dtype="int32")


def write_new(path, a):
    """Write by this version."""
    from keras_ptloss import SoftLabels

    def teacher(x):
        if a.kind == "tokens":
            return of_tokens(x, a)
        if a.kind == "top_k":
            rng = np.random.default_rng(int(x[0]) // BLOCK % 16)
            return likeliest(len(x), rng, a)
        return probabilities(int(x[0]), a)

    data = Tokens(a.rows, 64) if a.kind == "tokens" else Numbers(a.rows, BLOCK)
    SoftLabels.write(teacher, data.data, path, verbose=0)


def write_old(path, a):
    """Write by the version before Arrow."""
    from keras_ptloss import soft_labels as old

    if a.kind == "tokens":
        old.TokenLabels.write(
            lambda x: of_tokens(x, a),
            Tokens(a.rows, 64).data,
            path,
            spec=old.TokenLabelSpec(top_k=a.k, vocabulary_size=VOCABULARY),
            verbose=0,
        )
        return
    top_k = a.k if a.kind == "top_k" else None
    old.SoftLabels.write(
        lambda x: probabilities(int(x[0]), a),
        Numbers(a.rows, BLOCK).data,
        path,
        spec=old.SoftLabelSpec(num_examples=a.rows, top_k=top_k),
        verbose=0,
    )


def write_numpy(path, a):
    """Write `.npy` files, as float16."""
    path.mkdir()
    shapes = {"probabilities": (a.classes,), "top_k": (a.k,)}
    shape = shapes.get(a.kind, (LENGTH, a.k))
    rest = shape[:-1]
    names = {"log_probs": ("f2", shape), "ids": ("i4", shape)}
    names["log_rest"] = ("f2", rest)
    if a.kind == "probabilities":
        names = {"probabilities": ("f2", shape)}
    files = {
        name: np.lib.format.open_memmap(
            path / f"{name}.npy", "w+", dtype, (a.rows, *of_row)
        )
        for name, (dtype, of_row) in names.items()
    }
    size = 64 if a.kind == "tokens" else BLOCK
    for low in range(0, a.rows, size):
        part = slice(low, min(low + size, a.rows))
        if a.kind == "probabilities":
            files["probabilities"][part] = probabilities(low, a)
            continue
        count = part.stop - low
        if a.kind == "tokens":
            x = np.full((count, LENGTH), low)
            events = of_tokens(x, a)
        else:
            rng = np.random.default_rng(low // BLOCK % 16)
            events = likeliest(count, rng, a)
        files["ids"][part] = events[..., :-1, 0]
        files["log_probs"][part] = events[..., :-1, 1]
        files["log_rest"][part] = events[..., -1, 1]
    for file in files.values():
        file.flush()


def reader_new(path, a):
    """Return a function from indices to float32 rows."""
    from keras_ptloss import SoftLabels

    return SoftLabels.open(path, verify=False).read


def reader_old(path, a):
    """Return the same of the version before Arrow."""
    from keras_ptloss import soft_labels as old

    if a.kind == "tokens":
        from keras_ptloss.soft_labels._tokens.spec import decode_tokens

        labels = old.TokenLabels.open(path, verify=False)
        return lambda index: decode_tokens(
            labels._files.tokens(index), VOCABULARY
        )
    labels = old.SoftLabels.open(path, verify=False)
    rows = labels.top_k_targets if a.kind == "top_k" else labels
    return lambda index: rows[index]


def reader_numpy(path, a):
    """Return the same of memory maps."""
    files = {f.stem: np.load(f, mmap_mode="r") for f in path.iterdir()}
    if a.kind == "probabilities":
        return lambda index: files["probabilities"][index].astype("float32")

    def read(index):
        ids = files["ids"][index]
        out = np.empty((*ids.shape[:-1], a.k + 1, 2), "float32")
        out[..., :-1, 0], out[..., -1, 0] = ids, -1
        out[..., :-1, 1] = files["log_probs"][index]
        out[..., -1, 1] = files["log_rest"][index]
        return out

    return read


def step(a):
    """Do one step in this process; print its CPU seconds and memory."""
    if a.store != "numpy":
        import keras_ptloss  # noqa: F401 before the clock starts

    path = a.folder / a.store
    if a.step == "write":
        before = anonymous()
        began = time.process_time()
        globals()[f"write_{a.store}"](path, a)
        seconds, memory = time.process_time() - began, anonymous() - before
        print(json.dumps({"seconds": seconds, "memory": memory}))
        return
    order = np.arange(a.rows)
    if a.step == "shuffled":
        order = np.random.default_rng(1).permutation(a.rows)
    size = 64 if a.kind == "tokens" else BATCH
    read = globals()[f"reader_{a.store}"](path, a)
    read(order[:size])
    # Memory maps are read once, so that no store pays for a cold cache.
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                while opened.read(2**24):
                    pass
    before = anonymous()
    began = time.process_time()
    highest = 0
    for low in range(0, a.rows, size):
        read(order[low : low + size])
        if low % (size * 100) == 0:
            highest = max(highest, anonymous())
    seconds = time.process_time() - began
    print(json.dumps({"seconds": seconds, "memory": highest - before}))


def child(store, step_, folder, a):
    """Run a step in a process of its own; return what it printed."""
    root = a.rival if store == "old" else pathlib.Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    options = {"kind": a.kind, "rows": a.rows, "classes": a.classes, "k": a.k}
    options |= {"folder": folder, "store": store, "step": step_}
    command = [sys.executable, __file__]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    """Measure all stores of one kind of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = ("probabilities", "top_k", "tokens")
    parser.add_argument("--kind", choices=kinds, default=kinds[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--rival", type=pathlib.Path)
    parser.add_argument("--folder", type=pathlib.Path)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.step:
        step(a)
        return
    stores = ["numpy", "new"] + (["old"] if a.rival else [])
    unit = "positions" if a.kind == "tokens" else "rows"
    scale = (LENGTH if a.kind == "tokens" else 1) * a.rows / 1000
    print(f"{a.kind}, {a.rows:,} rows, thousands of {unit} per CPU second\n")
    print("| store | MB | write | in order | shuffled | MiB in order |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        for store in stores:
            found = {name: child(store, name, folder, a) for name in STEPS}
            files = pathlib.Path(folder, store).rglob("*")
            size = sum(f.stat().st_size for f in files if f.is_file()) / 1e6
            rates = [f"{scale / found[s]['seconds']:,.0f}" for s in STEPS]
            memory = found["in order"]["memory"]
            cells = [f"{size:,.0f}", *rates, f"{memory:.0f}"]
            print(f"| {store} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
