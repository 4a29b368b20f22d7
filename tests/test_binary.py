"""One column as two events, and class axes of unknown size."""

import keras
import numpy as np
import pytest
import scipy.special
from keras import ops

from keras_ptloss._binary import of_classes, two_events

BACKEND = keras.backend.backend()
on_tensorflow = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="no other backend has unknown sizes"
)


@pytest.mark.parametrize("convert", [np.asarray, ops.convert_to_tensor])
@pytest.mark.parametrize("shape", [(1,), (5, 1), (2, 3, 1)])
@pytest.mark.parametrize("from_logits", [False, True])
def test_one_column(convert, shape, from_logits):
    z = np.random.default_rng(0).normal(size=shape).astype("float32")
    p = scipy.special.expit(z)
    rows = two_events(convert(z if from_logits else p), from_logits=from_logits)
    assert isinstance(rows, np.ndarray) == (convert is np.asarray)
    rows = np.asarray(rows)
    if from_logits:
        rows = scipy.special.softmax(rows, axis=-1)
    np.testing.assert_allclose(
        rows, np.concatenate([1 - p, p], axis=-1), rtol=1e-6
    )


@pytest.mark.parametrize("rows", [np.float32(0.5), np.ones((4, 3)), []])
def test_others_stay(rows):
    assert two_events(np.asarray(rows), from_logits=False).shape == np.shape(
        rows
    )


def test_symbolic():
    inputs = keras.KerasTensor((None, 1))
    assert two_events(inputs, from_logits=True).shape == (None, 2)
    inputs = keras.KerasTensor((None, None))
    assert two_events(inputs, from_logits=True) is inputs


@on_tensorflow
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("classes", [1, 2, 3])
def test_unknown_size_is_read_when_the_graph_runs(
    classes, from_logits, jit_compile
):
    tf = pytest.importorskip("tensorflow")

    rows = np.random.default_rng(0).uniform(size=(4, classes))

    @tf.function(
        input_signature=[tf.TensorSpec((None, None), "float64")],
        jit_compile=jit_compile,
    )
    def graph(x):
        assert x.shape[-1] is None
        return two_events(x, from_logits=from_logits)

    np.testing.assert_array_equal(
        graph(rows), two_events(rows, from_logits=from_logits)
    )


@on_tensorflow
def test_of_classes():
    tf = pytest.importorskip("tensorflow")

    @tf.function(input_signature=[tf.TensorSpec((None, None))])
    def graph(x):
        known = of_classes(x, 3)
        assert known.shape[-1] == 3
        assert of_classes(x, None) is x
        return known

    rows = np.ones((4, 3), "float32")
    np.testing.assert_array_equal(graph(rows), rows)
    # (6, 2) holds as many numbers as (4, 3).
    for shape in ((4, 1), (6, 2), (2, 6)):
        with pytest.raises(tf.errors.InvalidArgumentError):
            graph(np.ones(shape, "float32"))
    assert of_classes(rows, 3) is rows
