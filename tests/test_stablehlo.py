"""What JAX writes is rewritten for TensorFlow releases that lag behind."""

import re

import keras
import numpy as np
import pytest

from keras_ptloss import export_student

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="StableHLO is JAX's"
)


def modules(folder):
    """Return the StableHLO in a SavedModel; its header names its version."""
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel.FromString(
        (folder / "saved_model.pb").read_bytes()
    )
    return [
        node.attr["module"].s
        for graph in saved.meta_graphs
        for function in graph.graph_def.library.function
        for node in function.node_def
        if node.op == "XlaCallModule"
    ]


def export(student, folder):
    folder = export_student(student, folder)
    module, *_ = modules(folder)
    version = re.search(rb"StableHLO_v([\d.]+)", module)[1].decode()
    return folder, tuple(map(int, version.split(".")))


def test_in_a_form_of_2024(tmp_path):
    import tensorflow as tf

    x = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
    inputs = keras.Input((4,), name="x")
    outputs = keras.layers.Dense(2, "softmax")(keras.ops.tan(inputs))
    student = keras.Model(inputs, outputs)
    folder, version = export(student, tmp_path)
    assert version == (1, 7, 0)
    served = tf.saved_model.load(str(folder)).signatures["serving_default"]
    np.testing.assert_allclose(
        served(x=tf.constant(x))["probabilities"],
        student.predict(x, verbose=0),
        atol=1e-6,
    )


def test_younger_operations_stay_as_they_are(tmp_path, monkeypatch):
    """`tan` entered StableHLO in 1.4."""
    monkeypatch.setattr("keras_ptloss.serving._stablehlo.VERSION", "1.0.0")
    inputs = keras.Input((4,), name="x")
    outputs = keras.layers.Dense(2, "softmax")(keras.ops.tan(inputs))
    _, version = export(keras.Model(inputs, outputs), tmp_path)
    assert version > (1, 4, 0)
