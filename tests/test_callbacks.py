"""FilteredTeacher against averages of its epochs' outputs, by NumPy."""

import keras
import numpy as np
import pytest
import scipy.special

from keras_ptloss.callbacks import FilteredTeacher

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 5)).astype("float32")
LABELS = RNG.integers(0, 2, size=16)


class Recorder(keras.callbacks.Callback):
    """Keeps the weights at the end of every epoch."""

    def on_train_begin(self, logs=None):
        self.weights = []

    def on_epoch_end(self, epoch, logs=None):
        self.weights.append(self.model.get_weights())


def train(callbacks, columns=2, activation="softmax", *, epochs=3, seed=0):
    """Train a teacher of one dense layer; return it."""
    init = keras.initializers.GlorotUniform(seed)
    dense = keras.layers.Dense(columns, activation, kernel_initializer=init)
    model = keras.Sequential([keras.Input((5,)), dense])
    if columns == 1:
        loss = keras.losses.BinaryCrossentropy(from_logits=activation is None)
    else:
        loss = keras.losses.SparseCategoricalCrossentropy(activation is None)
    model.compile(keras.optimizers.Adam(0.1), loss)
    options = {"epochs": epochs, "shuffle": False, "verbose": 0}
    model.fit(X, LABELS, callbacks=callbacks, **options)
    return model


@pytest.mark.parametrize(
    "columns, activation",
    [(2, "softmax"), (2, None), (1, "sigmoid"), (1, None)],
)
def test_average(columns, activation):
    """Of all epochs; one output is the second of two classes."""
    recorder = Recorder()
    filtered = FilteredTeacher(X[:6], rate=0.3, from_logits=activation is None)
    assert filtered.probabilities is None
    train([recorder, filtered], columns, activation)
    outputs = [X[:6] @ kernel + bias for kernel, bias in recorder.weights]
    if columns == 1:
        p = scipy.special.expit(outputs)
        epochs = np.concatenate([1 - p, p], axis=-1)
    else:
        epochs = scipy.special.softmax(outputs, axis=-1)
    expected = epochs[0]
    for p in epochs[1:]:
        expected = 0.7 * expected + 0.3 * p
    assert filtered.probabilities.dtype == np.float32
    np.testing.assert_allclose(filtered.probabilities, expected, atol=1e-5)


def test_training_is_not_disturbed_and_each_fit_starts_again():
    filtered = FilteredTeacher(X)
    with_it, without = train([filtered]), train([])
    for a, b in zip(with_it.get_weights(), without.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    other = train([filtered], epochs=1, seed=5)
    np.testing.assert_allclose(
        filtered.probabilities, other.predict(X, verbose=0), atol=1e-6
    )


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, np.nan])
def test_rate(rate):
    with pytest.raises(ValueError, match="`rate` must be.*Received: rate="):
        FilteredTeacher(X, rate=rate)


def test_outputs_that_are_no_probabilities():
    with pytest.raises(ValueError, match="probabilities.*from_logits=True"):
        train([FilteredTeacher(X)], activation=None)
