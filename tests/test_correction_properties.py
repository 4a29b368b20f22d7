"""Corrections of random teachers, against arithmetic of extended precision."""

import json

import hypothesis.extra.numpy as hnp
import keras
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_ptloss import Correction

ROWS = 3


def exact_softmax(z):
    """Softmax in extended precision, from its definition."""
    z = np.asarray(z, "longdouble")
    parts = np.exp(z - z.max(-1, keepdims=True))
    return (parts / parts.sum(-1, keepdims=True)).astype("float64")


@st.composite
def teachers(draw, largest):
    """Rows, as logits of up to `largest` or as probabilities with zeros."""
    classes = draw(st.integers(2, 6))
    from_logits = draw(st.booleans())
    dtype = draw(st.sampled_from(["float32", "float64"]))
    if from_logits:
        width = 32 if dtype == "float32" else 64
        whole = st.sampled_from([0.0, 0.0, largest, -largest])
        elements = whole | st.floats(-largest, largest, width=width)
        rows = draw(hnp.arrays(dtype, (ROWS, classes), elements=elements))
    else:
        weights = st.sampled_from([0.0, 1.0, 1.0, 3.0, 1e-12])
        rows = draw(hnp.arrays(dtype, (ROWS, classes), elements=weights))
        rows[rows.sum(-1) == 0, 0] = 1
        rows = rows / rows.sum(-1, keepdims=True)
    return rows, from_logits


@st.composite
def calibrations(draw, inputs):
    """`A` and `b` of any form that takes `inputs` classes, and C."""
    form = draw(st.sampled_from(["number", "vector", "matrix", "rectangle"]))
    classes = draw(st.integers(2, 6)) if form == "rectangle" else inputs
    shapes = {
        "number": (),
        "vector": (inputs,),
        "matrix": (inputs, inputs),
        "rectangle": (classes, inputs),
    }
    low = -3.0 if len(shapes[form]) == 2 else 0.01
    shape = shapes[form]
    scale = draw(hnp.arrays("float64", shape, elements=st.floats(low, 3.0)))
    bias = draw(hnp.arrays("float64", classes, elements=st.floats(-5, 5)))
    return scale, bias, classes


def calibrated(rows, from_logits, scale, bias):
    z = np.asarray(rows, "longdouble")
    if not from_logits:
        z /= z.sum(-1, keepdims=True)
        if scale.ndim < 2 and np.all(scale == 1) and np.ptp(bias) == 0:
            return z  # as it is, with its zeros
        z = np.log(np.maximum(z, np.longdouble(keras.config.epsilon())))
    moved = [
        [sum(a * x for a, x in zip(line, row, strict=True)) for line in scale]
        if scale.ndim == 2
        else scale * row
        for row in z
    ]
    return exact_softmax(np.asarray(moved) + bias)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from([30.0, 2.0**13, 2.0**40]))
def test_calibrated_teachers(data, largest):
    rows, from_logits = data.draw(teachers(largest))
    scale, bias, classes = data.draw(calibrations(rows.shape[1]))
    correction = Correction(
        scale=scale, bias=bias, teacher_from_logits=from_logits
    )
    found = correction.teacher(rows)
    assert found.shape == (ROWS, classes) and correction.classes(9) == classes
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-12)
    # The exponent is known to the last bit of the largest logit.
    tolerance = 1e-12 + 1e-15 * (largest if from_logits else 30)
    if tolerance < 1e-6:
        np.testing.assert_allclose(
            found,
            calibrated(rows, from_logits, scale, bias),
            rtol=1e3 * tolerance,
            atol=1e-300,
        )


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from([30.0, 2.0**100]))
def test_configs_and_tensors(data, largest):
    """The same correction through JSON; finite rows as tensors."""
    rows, from_logits = data.draw(teachers(largest))
    scale, bias, _ = data.draw(calibrations(rows.shape[1]))
    if scale.ndim == 2 and largest > 30:
        scale = np.array(1.0)
        bias = np.array(0.0)
    correction = Correction(
        scale=scale, bias=bias, teacher_from_logits=from_logits
    )
    config = json.loads(json.dumps(correction.get_config()))
    again = Correction.from_config(config)
    expected = correction.teacher(rows)
    np.testing.assert_array_equal(again.teacher(rows), expected)
    found = ops.convert_to_numpy(
        correction.target(ops.convert_to_tensor(rows.astype("float32")))
    )
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    if largest == 30:
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-5)
    else:
        assert np.isfinite(found).all()
