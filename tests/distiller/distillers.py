"""Models to distil, and what their losses should be, by NumPy."""

import helpers
import keras
import numpy as np

from keras_ptloss import Distiller, PTLoss

CLASSES, FEATURES = 3, 4


def inputs():
    return np.random.default_rng(0).normal(size=(32, FEATURES)).astype("f")


def labels():
    return np.random.default_rng(1).integers(0, CLASSES, size=32)


def make_model(classes=CLASSES, *, seed=0, dtype=None, regularizer=None):
    """Dropout and batch norm tell training from inference."""
    init = keras.initializers.GlorotUniform(seed=seed)
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(8, "relu", kernel_initializer=init, dtype=dtype),
            keras.layers.BatchNormalization(dtype=dtype),
            keras.layers.Dropout(0.5, seed=seed, dtype=dtype),
            keras.layers.Dense(
                classes,
                kernel_initializer=init,
                kernel_regularizer=regularizer,
                dtype=dtype,
            ),
        ]
    )


def make_linear(classes=CLASSES, activation=None, *, seed=0, regularizer=None):
    init = keras.initializers.GlorotUniform(seed=seed)
    dense = keras.layers.Dense(
        classes,
        activation,
        kernel_initializer=init,
        kernel_regularizer=regularizer,
    )
    return keras.Sequential([keras.Input((FEATURES,)), dense])


def logits_loss(epsilon=0.5):
    return PTLoss(epsilon, from_logits=True)


def distil(student, teacher, **arguments):
    distiller = Distiller(student, teacher, **arguments)
    distiller.compile("sgd", loss=logits_loss())
    return distiller


def pt_losses(teacher_logits, student_logits, epsilon=0.5):
    """Eq. 7 of logits, one value a row, by NumPy."""
    return helpers.pt_loss_of_logits(
        helpers.softmax(teacher_logits), student_logits, epsilon
    )


def logits(model, x):
    return model.predict(x, verbose=0)


def assert_same_weights(one, two, **tolerance):
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)
