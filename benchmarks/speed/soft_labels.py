"""Stored soft labels: memory and speed of a large store; live against stored.

    python benchmarks/speed/soft_labels.py memory
    python benchmarks/speed/soft_labels.py epochs

`memory` writes and reads 1,000,000 x 100 float16 rows and prints the peak of
the resident memory after each step. `epochs` trains a student for a few epochs
with a teacher of 10 times its parameters, run at every step or stored once.
Prints JSON lines.
"""

import argparse
import json
import tempfile
import time

import keras
import numpy as np
from machine import resident

from keras_ptloss import Distiller, PTLoss, SoftLabels
from keras_ptloss.soft_labels import SoftLabelSpec


def report(step, **values):
    """Print a JSON line with the peak of the resident memory so far."""
    peak = resident("VmHWM")
    rounded = {k: round(v, 3) for k, v in values.items()}
    backend = keras.backend.backend()
    print(
        json.dumps(
            {"step": step, "backend": backend, **rounded}
            | {"peak_resident_mib": round(peak)}
        ),
        flush=True,
    )


class Numbers(keras.utils.PyDataset):
    """Examples made on the fly, so that they take no memory."""

    def __init__(self, examples, size):
        """Number `examples` examples, `size` in a batch."""
        super().__init__()
        self.examples, self.size = examples, size

    def __len__(self):
        """Return the number of batches."""
        return -(-self.examples // self.size)

    def __getitem__(self, index):
        """Return a batch."""
        low = index * self.size
        ids = np.arange(low, min(low + self.size, self.examples))
        return (ids[:, None] + np.arange(8.0, dtype="float32"),)


def memory(examples=1_000_000, classes=100, batch_size=4096):
    """Write and read a large store."""
    report("imported")

    def teacher(x):
        rng = np.random.default_rng(int(x[0, 0]))
        rows = rng.random((len(x), classes), "float32")
        return rows / rows.sum(-1, keepdims=True)

    dataset = Numbers(examples, batch_size)
    with tempfile.TemporaryDirectory() as folder:
        path = folder + "/teacher.softlabels"
        began = time.perf_counter()
        SoftLabels.write(
            teacher,
            dataset,
            path,
            spec=SoftLabelSpec(num_examples=examples),
            verbose=0,
        )
        seconds = time.perf_counter() - began
        report("written", seconds=seconds, rows_per_second=examples / seconds)
        began = time.perf_counter()
        labels = SoftLabels.open(path)
        report("opened and verified", seconds=time.perf_counter() - began)
        began = time.perf_counter()
        for low in range(0, examples, batch_size):
            block = labels[low : low + batch_size]
        seconds = time.perf_counter() - began
        report(
            "read in order", seconds=seconds, last_sum=float(block[-1].sum())
        )
        began = time.perf_counter()
        order = np.random.default_rng(0).permutation(examples)
        for low in range(0, examples, batch_size):
            block = labels[order[low : low + batch_size]]
        report("read shuffled", seconds=time.perf_counter() - began)
        began = time.perf_counter()
        attached = labels.attach(dataset)
        for index in range(attached.num_batches):
            attached[index]
        report(
            "attached and checked",
            seconds=time.perf_counter() - began,
            mean_total_variation_e6=labels.mean_total_variation * 1e6,
            max_total_variation_e6=labels.max_total_variation * 1e6,
        )


def classifier(width, inputs, classes):
    """Build a perceptron of three hidden layers."""
    layers = [keras.layers.Dense(width, "relu") for _ in range(3)]
    model = keras.Sequential(
        [
            keras.Input((inputs,)),
            *layers,
            keras.layers.Dense(classes, "softmax"),
        ]
    )
    return model


def epochs(examples=20_000, inputs=64, classes=100, batch_size=64, count=3):
    """Train on the live teacher and on its stored outputs."""
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(examples, inputs))
    x = x.astype("float32")
    teacher = classifier(1024, inputs, classes)
    student = classifier(300, inputs, classes)
    weights = student.get_weights()
    distiller = Distiller(student, teacher)
    for model in (student, distiller):
        model.compile("adam", loss=PTLoss(0.0))
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        labels = SoftLabels.write(
            teacher, x, folder + "/store", batch_size=batch_size, verbose=0
        )
        written = time.perf_counter() - began
        rates = {}
        for name, model, data in (
            ("live", distiller, {"x": x, "batch_size": batch_size}),
            ("stored", student, {"x": labels.attach(x, batch_size=batch_size)}),
        ):
            student.set_weights(weights)
            model.fit(**data, epochs=1, verbose=0)  # compiles
            began = time.perf_counter()
            model.fit(**data, epochs=count, verbose=0)
            rates[name] = 3600 * count / (time.perf_counter() - began)
    report(
        "epochs per hour",
        **rates,
        ratio=rates["stored"] / rates["live"],
        seconds_to_store=written,
        teacher_to_student=teacher.count_params() / student.count_params(),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["memory", "epochs"])
    {"memory": memory, "epochs": epochs}[parser.parse_args().what]()
