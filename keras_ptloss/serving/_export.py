"""Write a trained student as the next version of a served model."""

import contextlib
import importlib
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ptloss._binary import two_events
from keras_ptloss._checks import check_choice, check_count, check_flag, fail
from keras_ptloss.serving._onnx import write_onnx_from_jax
from keras_ptloss.serving._probe import check_answers
from keras_ptloss.serving._saved_model import (
    required_arguments,
    write_saved_model,
)
from keras_ptloss.serving._versions import check_is_new, publish

Tensor = Any

# What must be installed for each format, by backend. No entry: impossible.
_NEEDS = {
    "tf_saved_model": {"tensorflow": "tensorflow", "jax": "tensorflow"},
    "litert": {"tensorflow": "tensorflow"},
    "onnx": {"tensorflow": "tf2onnx", "jax": "jax2onnx"},
}
_FILES = {"litert": "model.tflite", "onnx": "model.onnx"}


def export_student(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    version: int | None = None,
    class_names: Sequence[str] | None = None,
    from_logits: bool = False,
    preprocessor: Callable[..., Any] | None = None,
    format: str = "tf_saved_model",
) -> pathlib.Path:
    """Write a trained student as the next version of a served model.

    The layout is TensorFlow Serving's: `directory` is the model, each version
    a folder with a number for a name, `directory/1`, and a server that
    watches `directory` loads a new one as it appears. It appears whole or not
    at all: it is written beside, under a name that servers skip, and then
    renamed.

    A version answers with

        probabilities   float32, (batch, ..., C)
        label           int32, (batch, ...), the most probable class
        class_name      string, (batch, ...); a SavedModel with `class_names`

    to inputs that have the names of the model's `keras.Input`s; one without a
    name is `inputs`, or `inputs_0`, `inputs_1`, ... of several. The batch
    size is free. In a SavedModel all of it is the signature
    `serving_default`, and `serve` to `keras.layers.TFSMLayer`. Other formats
    hold one file, `model.tflite` or `model.onnx`. (Layers whose operations
    LiteRT lacks become TensorFlow's, which its Flex delegate runs.)

    Both backends write every format, but LiteRT needs TensorFlow's. A
    SavedModel from JAX is compiled for CPU and for CUDA. Of its inputs, axes
    of free size other than the batch must agree in size (the tokens and their
    mask), and sizes that do not fit the student's layers (longer than its
    table of positions, not divisible as often as a U-Net halves them) are
    refused when it is served.

    Args:
        model: the student: a Functional or Sequential `keras.Model` with one
            output `(batch, ..., C)`. A binary head's single output is served
            as the two events that it stands for, C = 2.
        directory: local folder of all versions. It is made if it is not there.
        version: number of this version, at least 1; None is the highest
            number there plus one.
        class_names: C names, the model's classes in order; two for a binary
            head, whose output is of the second. They are also
            written to `assets.extra/class_names.json`.
        from_logits: whether the model's output is logits; the version answers
            with probabilities all the same.
        preprocessor: makes the model's inputs from strings, inside the
            SavedModel, in TensorFlow ops on either backend: a function, a
            `tf.Module` or, with the TensorFlow backend, a Keras layer. Each
            argument that it requires is one input `(batch,)` of strings, by
            its name. Lookup tables must be attributes of it: a function
            cannot hold any.
        format: `"tf_saved_model"`, `"litert"` or `"onnx"`.

    Returns:
        The folder of the version, `directory/<version>`.

    Raises:
        ValueError: if an argument is not of this form, the version is there
            already, the backend cannot write the format, JAX cannot leave a
            size free, or the model answers noise with logits where
            probabilities were promised (or the other way round).
        ImportError: if a package that the format needs is not installed.

    Example:
        >>> import keras, tempfile
        >>> student = keras.Sequential(
        ...     [keras.Input((4,), name="pixels"), keras.layers.Dense(2)]
        ... )
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     first = export_student(
        ...         student,
        ...         directory,
        ...         from_logits=True,
        ...         class_names=["cat", "dog"],
        ...     )
        ...     second = export_student(student, directory, from_logits=True)
        ...     first.name, second.name, (first / "saved_model.pb").exists()
        ('1', '2', True)

    Reference:
        Olston et al. 2017, TensorFlow-Serving: Flexible, High-Performance ML
        Serving (https://arxiv.org/abs/1712.06139).
    """
    _check_format(format, preprocessor)
    check_flag("from_logits", from_logits)
    inputs, classes = _ends(model)
    if class_names is not None:
        class_names = _check_class_names(class_names, classes)
    directory = pathlib.Path(directory)
    if version is not None:
        version = check_count("version", version)
        check_is_new(directory, version)
    _import_for(format)
    check_answers(model, inputs, from_logits)

    student = _with_answers(model, inputs, from_logits)
    signature = _signature(inputs)

    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=".exporting-", dir=directory
    ) as beside:
        # A folder of its own in it: temporary folders are closed to others,
        # the server among them.
        written = pathlib.Path(beside) / "version"
        written.mkdir()
        if format == "tf_saved_model":
            write_saved_model(
                student, signature, written, class_names, preprocessor
            )
        elif format == "onnx" and keras.backend.backend() == "jax":
            write_onnx_from_jax(student, signature, written / _FILES[format])
        else:
            student.export(
                written / _FILES[format],
                format=format,
                verbose=False,
                input_signature=[signature],
            )
        if class_names is not None:
            names_file = written / "assets.extra" / "class_names.json"
            names_file.parent.mkdir(exist_ok=True)
            names_file.write_text(
                json.dumps(class_names, ensure_ascii=False), encoding="utf-8"
            )
        return publish(written, directory, version)


def _check_format(format: str, preprocessor: Any) -> None:
    check_choice("format", format, _NEEDS)
    backend = keras.backend.backend()
    if backend not in _NEEDS[format]:
        fail(
            "format",
            f"one that Keras can write with the {backend} backend; "
            f"{format!r} needs KERAS_BACKEND="
            + " or ".join(sorted(_NEEDS[format])),
            format,
        )
    if preprocessor is None:
        return
    if format != "tf_saved_model":
        fail(
            "preprocessor",
            f"None with format={format!r}: only a SavedModel can hold one",
            preprocessor,
        )
    if not callable(preprocessor):
        fail("preprocessor", "a callable or None", preprocessor)
    if backend != "tensorflow" and isinstance(preprocessor, keras.layers.Layer):
        fail(
            "preprocessor",
            "a function of TensorFlow ops or a tf.Module with the "
            f"{backend} backend, whose layers TensorFlow cannot save",
            preprocessor,
        )
    if not required_arguments(preprocessor):
        fail(
            "preprocessor",
            "callable with at least one required argument",
            preprocessor,
        )


def _ends(model: Any) -> tuple[Any, int]:
    """Return the student's inputs, in their structure, and its class count."""
    outputs = None
    with contextlib.suppress(AttributeError):  # subclassed, or not yet built
        if isinstance(model, keras.Sequential):
            inputs, outputs = model.inputs[0], model.outputs
        elif isinstance(model, keras.Model):
            inputs, outputs = model.input, keras.tree.flatten(model.output)
    if outputs is None:
        fail(
            "model",
            "a built Functional or Sequential keras.Model (of a Distiller, "
            "its `student`; a subclassed model by way of "
            "keras.Model(inputs, model(inputs)))",
            model,
        )
    shapes = [tuple(output.shape) for output in outputs]
    if len(shapes) != 1 or len(shapes[0]) < 2 or not shapes[0][-1]:
        raise ValueError(
            "`model` must have one output, (batch, ..., classes). Received: "
            f"outputs of shape {shapes}"
        )
    return inputs, max(shapes[0][-1], 2)


def _with_answers(model: Any, inputs: Any, from_logits: bool) -> Any:
    """Return the student that answers as the version does."""
    # Random layers augment unless they are told that nothing is trained.
    [output] = keras.tree.flatten(model(inputs, training=False))
    output = two_events(ops.cast(output, "float32"), from_logits=from_logits)
    probabilities = ops.softmax(output, axis=-1) if from_logits else output
    # Neither `ops.argmax` (bit casts for negative zeros: not in LiteRT, not in
    # ONNX Runtime) nor `ops.top_k` (from JAX: not in TensorFlow 2.21).
    classes = probabilities.shape[-1]
    highest = ops.max(probabilities, axis=-1, keepdims=True)
    label = ops.min(
        ops.where(
            probabilities < highest, classes, np.arange(classes, dtype="int32")
        ),
        axis=-1,
    )
    return keras.Model(inputs, {"probabilities": probabilities, "label": label})


def _check_class_names(class_names: Any, classes: int) -> list[str]:
    several = isinstance(class_names, Iterable)
    several &= not isinstance(class_names, str)
    names = list(class_names) if several else []
    texts = all(isinstance(name, str) for name in names)
    if not texts or not len(names) == len(set(names)) == classes:
        fail("class_names", f"{classes} different strings", class_names)
    return names


def _import_for(format: str) -> None:
    """Import what writes the format; say what to install if it is missing."""
    package = _NEEDS[format][keras.backend.backend()]
    extra = "tensorflow" if package == "tensorflow" else "export"
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"format={format!r} with the {keras.backend.backend()} backend "
            f"needs {package}: pip install 'keras_ptloss[{extra}]'"
        ) from error


def _signature(inputs: Any) -> Any:
    """Return the specification of the inputs, in their structure, named."""
    flat = keras.tree.flatten(inputs)
    specs = []
    for index, tensor in enumerate(flat):
        name = tensor.name
        # Keras's own numbering differs from one process to the next.
        if re.fullmatch(r"keras_tensor(_\d+)?", name):
            name = "inputs" if len(flat) == 1 else f"inputs_{index}"
        shape = (None, *tensor.shape[1:])
        spec = keras.InputSpec(shape=shape, dtype=tensor.dtype, name=name)
        specs.append(spec)
    return keras.tree.pack_sequence_as(inputs, specs)
