"""Data sets and teachers for the tests of stored soft labels."""

import importlib.util
import os

import keras
import numpy as np
import pytest

from keras_ptloss.soft_labels import SoftLabels, SoftLabelSpec

N, C = 50, 4
# Of processes that tests start: JAX is there the soonest, where it is at all.
CHILD = "jax" if importlib.util.find_spec("jax") else keras.config.backend()
ENVIRONMENT = {**os.environ, "KERAS_BACKEND": CHILD}


def flipped(good, place, bit):
    """A file's bytes, with a bit of one of them flipped."""
    bad = bytearray(good)
    bad[place] ^= 1 << bit
    return bytes(bad)


def spoilt(good, header, count):
    """Versions of a `.npy` file's bytes: a flipped bit each, and cut off.

    Args:
        good: The bytes.
        header: Places in the header.
        count: How many places behind it, drawn at random.
    """
    random = np.random.default_rng(0)
    for place in [*header, *random.integers(128, len(good), count)]:
        yield flipped(good, place, random.integers(8))
    for size in (0, 10, 127, len(good) - 1):
        yield good[:size]


def features(n=N, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 3)).astype("float32")


def softmax(logits):
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


class Teacher:
    """A known function of the inputs that records what it was asked."""

    def __init__(self, logits=False, fail_at=None, classes=C):
        weights = np.random.default_rng(1).normal(size=(3, classes))
        self.weights = weights.astype("float32")
        self.logits, self.fail_at, self.asked = logits, fail_at, 0

    def rows(self, x):
        logits = x @ self.weights
        return logits if self.logits else softmax(logits)

    def __call__(self, x):
        if self.fail_at is not None and self.asked >= self.fail_at:
            raise ConnectionError("no route to teacher")
        self.asked += len(x)
        return self.rows(x)


class Batches(keras.utils.PyDataset):
    def __init__(self, *arrays, size=8):
        super().__init__()
        self.arrays, self.size, self.loaded = arrays, size, []

    def __len__(self):
        return -(-len(self.arrays[0]) // self.size)

    def __getitem__(self, index):
        self.loaded.append(index)
        low = index * self.size
        return tuple(array[low : low + self.size] for array in self.arrays)


def tf_dataset(*arrays, size=8):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(arrays).batch(size)


def write(path, teacher=None, dataset=None, **kwargs):
    spec = SoftLabelSpec(**kwargs)
    dataset = features() if dataset is None else dataset
    return SoftLabels.write(
        teacher or Teacher(logits=spec.from_logits),
        dataset,
        path,
        spec=spec,
        batch_size=8,
        verbose=0,
    )


def weights_of(model):
    # Through a tensor: NumPy deprecates how Keras 3.15 converts variables.
    return [keras.ops.convert_to_numpy(1.0 * w) for w in model.weights]
