"""A trained student as versioned files that a server loads."""

import importlib
import inspect
import json
import os
import pathlib
import re
import tempfile
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ptloss._checks import check_choice, check_count, fail
from keras_ptloss._stablehlo import for_older_readers

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
    SavedModel from JAX is compiled for CPU and for CUDA; of its inputs, axes
    of free size other than the batch must agree in size (the tokens and their
    mask).

    Args:
        model: the student: a Functional or Sequential `keras.Model` with one
            output `(batch, ..., C)`, C at least 2.
        directory: local folder of all versions. It is made if it is not there.
        version: number of this version, at least 1; None is the highest
            number there plus one.
        class_names: C names, the model's classes in order. They are also
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
            already, or the backend cannot write the format.
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
    inputs, output = _ends(model)
    if class_names is not None:
        class_names = _check_class_names(class_names, output.shape[-1])
    directory = pathlib.Path(directory)
    if version is not None:
        version = check_count("version", version)
        _check_is_new(directory, version)
    _import_for(format)

    output = ops.cast(output, "float32")
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
    student = keras.Model(
        inputs, {"probabilities": probabilities, "label": label}
    )
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
            _write_saved_model(
                student, signature, written, class_names, preprocessor
            )
        elif format == "onnx" and keras.backend.backend() == "jax":
            _write_onnx_from_jax(student, signature, written / _FILES[format])
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
        return _publish(written, directory, version)


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
    if not _required_arguments(preprocessor):
        fail(
            "preprocessor",
            "callable with at least one required argument",
            preprocessor,
        )


def _ends(model: Any) -> tuple[Any, Tensor]:
    """Return the student's inputs, in their structure, and its output."""
    try:
        if isinstance(model, keras.Sequential):
            inputs, outputs = model.inputs[0], model.outputs
        elif isinstance(model, keras.Model):
            inputs, outputs = model.input, keras.tree.flatten(model.output)
        else:
            outputs = None
    except AttributeError:  # subclassed models, models not yet built
        outputs = None
    if outputs is None:
        fail(
            "model",
            "a built Functional or Sequential keras.Model (of a Distiller, "
            "its `student`; a subclassed model by way of "
            "keras.Model(inputs, model(inputs)))",
            model,
        )
    shapes = [tuple(output.shape) for output in outputs]
    if len(shapes) != 1 or len(shapes[0]) < 2 or (shapes[0][-1] or 0) < 2:
        raise ValueError(
            "`model` must have one output, (batch, ..., classes), of at least "
            f"2 classes. Received: outputs of shape {shapes}"
        )
    return inputs, outputs[0]


def _check_class_names(class_names: Any, classes: int) -> list[str]:
    several = isinstance(class_names, Iterable)
    several &= not isinstance(class_names, str)
    names = list(class_names) if several else []
    if (
        len(names) != classes
        or len(set(names)) != classes
        or not all(isinstance(name, str) for name in names)
    ):
        fail("class_names", f"{classes} different strings", class_names)
    return names


def _check_is_new(directory: pathlib.Path, version: int) -> None:
    if version in _versions(directory):
        fail("version", f"a number that is not yet in {directory}", version)


def _versions(directory: pathlib.Path) -> list[int]:
    """Return the versions that a server would find: 7, 0007, not 7.old."""
    if not directory.is_dir():
        return []
    return [
        int(entry.name)
        for entry in directory.iterdir()
        if re.fullmatch("[0-9]+", entry.name)
    ]


def _import_for(format: str) -> Any:
    """Import what writes the format; say what to install if it is missing."""
    package = _NEEDS[format][keras.backend.backend()]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"format={format!r} with the {keras.backend.backend()} backend "
            f"needs {package}: pip install {package}"
        ) from error


def _signature(inputs: Any) -> Any:
    """Return the specification of the inputs, in their structure, named."""
    flat = keras.tree.flatten(inputs)
    names = [
        ("inputs" if len(flat) == 1 else f"inputs_{index}")
        # Keras's own numbering differs from one process to the next.
        if re.fullmatch(r"keras_tensor(_\d+)?", tensor.name)
        else tensor.name
        for index, tensor in enumerate(flat)
    ]
    specs = [
        keras.InputSpec(
            shape=(None, *tensor.shape[1:]), dtype=tensor.dtype, name=name
        )
        for tensor, name in zip(flat, names, strict=True)
    ]
    return keras.tree.pack_sequence_as(inputs, specs)


def _write_saved_model(
    student: Any,
    signature: Any,
    path: pathlib.Path,
    class_names: list[str] | None,
    preprocessor: Callable[..., Any] | None,
) -> None:
    # Strings exist in TensorFlow alone, and TensorFlow runs what is saved,
    # from either backend.
    import tensorflow as tf

    # Keras makes the student a TensorFlow function. It goes through an archive
    # of its own, since every endpoint of the one that is written is served.
    predict = _tensorflow_function(student, signature)
    specs = keras.tree.map_structure(
        lambda spec: tf.TensorSpec(spec.shape, spec.dtype, name=spec.name),
        signature,
    )

    def answer(inputs: Any) -> dict[str, Any]:
        outputs = dict(predict(inputs))
        if class_names is not None:
            outputs["class_name"] = tf.gather(class_names, outputs["label"])
        return outputs

    if preprocessor is None:
        serve = tf.function(answer, input_signature=[specs], autograph=False)
    else:

        def from_strings(texts: dict[str, Any]) -> dict[str, Any]:
            return answer(_fit_to(specs, preprocessor(**texts)))

        texts = {
            name: tf.TensorSpec((None,), tf.string, name=name)
            for name in _required_arguments(preprocessor)
        }
        if len(texts) == 1:  # then also a single tensor, as Keras calls layers
            [(name, text)] = texts.items()
            serve = tf.function(
                lambda inputs: from_strings({name: inputs}),
                input_signature=[text],
                autograph=False,
            )
        else:
            serve = tf.function(
                from_strings, input_signature=[texts], autograph=False
            )

    serve.get_concrete_function()  # traced, and layers built, before tracking
    archive = keras.export.ExportArchive()
    if keras.backend.backend() == "tensorflow":
        archive.track(student)  # for lookup tables of its layers
    if isinstance(preprocessor, (keras.layers.Layer, tf.Module)):
        archive.track(preprocessor)
    archive.add_endpoint("serve", serve)
    archive.write_out(os.fspath(path), verbose=False)
    if keras.backend.backend() == "jax":
        for_older_readers(path)


def _tensorflow_function(student: Any, signature: Any) -> Any:
    archive = keras.export.ExportArchive()
    if keras.backend.backend() != "jax":
        return archive.track_and_add_endpoint("serve", student, [signature])
    shapes = keras.tree.map_structure(
        lambda spec: ", ".join(map(str, _symbolic_shape(spec))), signature
    )
    with warnings.catch_warnings():
        # Keras 3.15 sets an option that JAX 0.10 no longer reads.
        warnings.filterwarnings(
            "ignore", ".*native_serialization", DeprecationWarning
        )
        return archive.track_and_add_endpoint(
            "serve",
            student,
            [signature],
            jax2tf_kwargs={
                "polymorphic_shapes": [shapes],
                # Students are trained on GPUs and served on CPUs.
                "native_serialization_platforms": ("cpu", "cuda"),
                "with_gradient": False,
            },
        )


def _symbolic_shape(spec: Any) -> list[int | str]:
    """Return the shape for JAX, with words for the sizes that are free.

    By Keras, each would be a word of its own, and JAX then cannot tell that
    there is one mask entry a token.
    """
    return [
        "batch" if axis == 0 else size or f"axis{axis}"
        for axis, size in enumerate(spec.shape)
    ]


def _write_onnx_from_jax(
    student: Any, signature: Any, path: pathlib.Path
) -> None:
    """Do what `student.export` does, which leaves the outputs unnamed."""
    specs = keras.tree.flatten(signature)
    _import_for("onnx").to_onnx(
        lambda *flat: tuple(
            student(
                keras.tree.pack_sequence_as(signature, flat), training=False
            )[name]
            for name in ("probabilities", "label")
        ),
        inputs=[
            types.SimpleNamespace(
                shape=tuple(_symbolic_shape(spec)), dtype=np.dtype(spec.dtype)
            )
            for spec in specs
        ],
        input_names=[spec.name for spec in specs],
        output_names=["probabilities", "label"],
        return_mode="file",
        output_path=path,
    )


def _required_arguments(preprocessor: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments that have no default."""
    call = (
        preprocessor.call
        if isinstance(preprocessor, keras.layers.Layer)
        else preprocessor
    )
    positional = (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    return [
        name
        for name, parameter in inspect.signature(call).parameters.items()
        if parameter.default is parameter.empty and parameter.kind in positional
    ]


def _fit_to(specs: Any, values: Any) -> Any:
    """Cast what the preprocessor made to what the model takes."""
    import tensorflow as tf

    try:
        keras.tree.assert_same_structure(specs, values)
    except (TypeError, ValueError):
        fail(
            "preprocessor",
            "a function that returns the model's inputs, "
            f"{keras.tree.map_structure(lambda spec: spec.name, specs)}",
            values,
        )
    return keras.tree.map_structure(
        lambda spec, value: tf.ensure_shape(
            tf.cast(value, spec.dtype), spec.shape
        ),
        specs,
        values,
    )


def _publish(
    written: pathlib.Path, directory: pathlib.Path, version: int | None
) -> pathlib.Path:
    """Give the written folder its number, in one step."""
    while True:
        number = version or max(_versions(directory), default=0) + 1
        _check_is_new(directory, number)
        target = directory / str(number)
        try:
            # A folder that is there, made meanwhile by another export, is an
            # error here and stays as it is.
            return written.rename(target)
        except OSError:
            if not target.exists():
                raise
