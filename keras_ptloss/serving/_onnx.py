"""ONNX, from JAX: what `keras.Model.export` does, with outputs named."""

import importlib
import pathlib
import types
from typing import Any

import keras
import numpy as np

from keras_ptloss.serving._free_sizes import symbolic_shape


def write_onnx_from_jax(
    student: Any, signature: Any, path: pathlib.Path
) -> None:
    """Write one file, with the outputs `probabilities` and `label`.

    Args:
        student: a Functional model that returns a dict of its answers.
        signature: its inputs' `keras.InputSpec`s, in their structure.
        path: the file.
    """
    specs = keras.tree.flatten(signature)
    importlib.import_module("jax2onnx").to_onnx(
        lambda *flat: tuple(
            student(
                keras.tree.pack_sequence_as(signature, flat), training=False
            )[name]
            for name in ("probabilities", "label")
        ),
        inputs=[
            types.SimpleNamespace(
                shape=tuple(symbolic_shape(spec)), dtype=np.dtype(spec.dtype)
            )
            for spec in specs
        ],
        input_names=[spec.name for spec in specs],
        output_names=["probabilities", "label"],
        return_mode="file",
        output_path=path,
    )
