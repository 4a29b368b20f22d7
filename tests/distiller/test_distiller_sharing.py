"""What student and teacher may share: nothing that training moves."""

import keras
import numpy as np
import pytest
from distillers import CLASSES, FEATURES, distil, logits


def around(layer, *, built=True):
    """Return student and teacher on one layer, heads of their own."""
    models = [
        keras.Sequential([keras.Input((FEATURES,)), layer]) for _ in range(2)
    ]
    for model in models:
        model.add(keras.layers.Dense(CLASSES))
    student, teacher = models
    if not built:
        student = keras.Sequential([layer, keras.layers.Dense(CLASSES)])
    return student, teacher


def batch_norm(**arguments):
    return keras.layers.BatchNormalization(
        center=False, scale=False, momentum=0.5, **arguments
    )


def spectral():
    layer = keras.layers.SpectralNormalization(keras.layers.Dense(5))
    layer.trainable = False
    return layer


def normalization(x):
    layer = keras.layers.Normalization()
    layer.adapt(x)
    return layer


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("layer", [batch_norm, spectral])
@pytest.mark.parametrize("method", ["fit", "train_on_batch"])
def test_state_that_training_moves(x, layer, built, method):
    """Spectral normalisation moves even where `trainable` is False."""
    student, teacher = around(layer(), built=built)
    before = logits(teacher, x)
    distiller = distil(student, teacher)
    with pytest.raises(ValueError, match="`teacher` must share no state.*shar"):
        getattr(distiller, method)(x)
    np.testing.assert_array_equal(logits(teacher, x), before)
    if not built:
        return  # weights of an interrupted first step: Keras loses them
    logits(student, x)
    # Nothing moves without training.
    distiller.evaluate(x, verbose=0)
    np.testing.assert_array_equal(logits(teacher, x), before)


@pytest.mark.parametrize(
    "layer",
    [
        lambda x: batch_norm(trainable=False),
        normalization,
        lambda x: keras.layers.Dropout(0.5, seed=0),
        lambda x: keras.layers.GaussianNoise(0.5, seed=0),
        lambda x: keras.layers.Dense(5, trainable=False),
    ],
    ids=["BatchNormalization", "Normalization", "Dropout", "noise", "Dense"],
)
def test_what_stands_still(x, layer):
    """Seeds move, which inference does not look at."""
    student, teacher = around(layer(x))
    before, start = logits(teacher, x), logits(student, x)
    distiller = distil(student, teacher)
    distiller.fit(x, epochs=2, verbose=0)
    np.testing.assert_array_equal(logits(teacher, x), before)
    assert np.abs(logits(student, x) - start).max() > 1e-4


def test_batch_norm_that_is_thawed(x):
    """The check is made anew for what is compiled anew."""
    layer = batch_norm(trainable=False)
    distiller = distil(*around(layer))
    distiller.fit(x, verbose=0)
    layer.trainable = True
    distiller.compile("sgd", loss=distiller.loss)
    with pytest.raises(ValueError, match="`teacher` must share no state"):
        distiller.fit(x, verbose=0)


def test_one_teacher_twice(x):
    """Each of its variables is handed to a step of JAX once."""
    student, teacher = around(keras.layers.Dense(5, trainable=False))
    distiller = distil(student, [teacher, teacher])
    variables = distiller.non_trainable_variables
    assert len({id(v) for v in variables}) == len(variables)
    distiller.fit(x, verbose=0)
