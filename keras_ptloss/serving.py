"""Export a trained student for TensorFlow Serving, ONNX Runtime or LiteRT."""

import contextlib
import fcntl
import importlib
import inspect
import json
import os
import pathlib
import re
import shutil
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from keras_ptloss._backend import compute_dtypes
from keras_ptloss._math import model_probs, two_events
from keras_ptloss._progress import Progress, Verbose
from keras_ptloss._validation import (
    check_count,
    check_head,
    fail,
    on_simplex,
)

__all__ = ["export_student"]

Tensor = Any

# The file name of each format, and the backends on which Keras can write it.
_FORMATS = {
    "tf_saved_model": ("", ("tensorflow", "jax")),
    "litert": ("model.tflite", ("tensorflow",)),
    "onnx": ("model.onnx", ("tensorflow", "jax")),
}


def export_student(
    model: keras.Model,
    directory: str | os.PathLike[str],
    *,
    version: int | None = None,
    class_names: Sequence[str] | None = None,
    from_logits: bool = False,
    preprocessor: Callable[..., Any] | None = None,
    format: Literal["tf_saved_model", "litert", "onnx"] = "tf_saved_model",
    verbose: Verbose = 1,
) -> pathlib.Path:
    """Write a trained student as the next version of a served model.

    The layout is that of TensorFlow Serving: `directory` is the model and
    `directory/1`, `directory/2`, ... are its versions. A new version appears
    only when it is complete, so a server may watch the folder. Before a version
    appears, it is loaded once, and its answers are compared with the model's.

    A version returns

        probabilities   float32, (batch, ..., num_classes)
        label           int32, (batch, ...), the most probable class
        class_name      string, (batch, ...); SavedModel with `class_names`

    The inputs have the names of the model's `keras.Input`s. Characters other
    than letters, digits and `_` become `_`. A single input without a name is
    called `inputs`; several are called `inputs_0`, `inputs_1`, ... The batch
    may have any size, including 0. A SavedModel has the signature
    `serving_default`, and `serve` for `keras.layers.TFSMLayer`.

    A SavedModel from JAX runs on CPU and CUDA. If several inputs have an axis
    of free size, such as tokens and their mask, the sizes must be equal.

    Args:
        model: the student, a Functional or Sequential model with one output
            `(batch, ..., num_classes)`. A binary head with one output is
            served with two classes.
        directory: local folder for all versions; created if necessary.
        version: number of the version, at least 1. None takes the highest
            existing number plus one.
        class_names: names of the classes, in order; two for a binary head. They
            are also written to `assets.extra/class_names.json`.
        from_logits: whether the model's output is logits. The export gives
            probabilities in either case.
        preprocessor: a function, a `tf.Module` or, on TensorFlow, a Keras layer
            that turns strings into the model's inputs. It runs inside the
            SavedModel, so it must use TensorFlow operations. Each required
            argument becomes an input of strings, `(batch,)`, with that name.
            Lookup tables must be attributes of a `tf.Module` or a layer.
        format: `"tf_saved_model"`, or `"litert"` (from TensorFlow only) or
            `"onnx"` for one file, `model.tflite` or `model.onnx`.
        verbose: 1 shows what is exported and a progress bar, 0 does not.

    Returns:
        The path of the new version's folder, `directory/<version>`.

    Raises:
        ValueError: if the version exists; if the backend or the format does not
            support the student; or if `from_logits` contradicts the model.
        ImportError: if a package that the format needs is missing:
            `pip install "keras_ptloss[export]"`.

    Example:
        >>> import keras, tempfile
        >>> student = keras.Sequential(
        ...     [keras.Input((4,), name="pixels"), keras.layers.Dense(2)]
        ... )
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = export_student(
        ...         student,
        ...         directory,
        ...         from_logits=True,
        ...         class_names=["cat", "dog"],
        ...         verbose=0,
        ...     )
        ...     path.name, (path / "saved_model.pb").exists()
        ('1', True)

    Reference:
        Olston et al. 2017, TensorFlow-Serving: Flexible, High-Performance ML
        Serving (https://arxiv.org/abs/1712.06139).
    """
    backend = keras.backend.backend()
    file_name, backends = _FORMATS.get(format, ("", ()))
    if backend not in backends:
        raise ValueError(
            "`format` must be one of 'tf_saved_model', 'onnx' and, with the "
            "TensorFlow backend, 'litert'; export from PyTorch with "
            f"KERAS_BACKEND=tensorflow. Received: format={format!r} with the "
            f"{backend} backend"
        )
    if preprocessor is not None and format != "tf_saved_model":
        fail("preprocessor", "None except in a SavedModel", preprocessor)
    inputs, num_classes = _inputs_and_classes(model)
    names = None if class_names is None else list(class_names)
    if names is not None and not (len(names) == len(set(names)) == num_classes):
        expected = f"{num_classes} different strings, one for each class"
        fail("class_names", expected, class_names)
    directory = pathlib.Path(directory)
    if version is not None and check_count("version", version) in (
        _versions(directory)
    ):
        raise ValueError(
            f"`version` must be a number that does not exist in {directory}. "
            "Leave it out to write the next version, or delete that folder to "
            f"overwrite it. Received: version={version}"
        )
    if format != "tf_saved_model" and "bfloat16" in compute_dtypes(model):
        raise ValueError(
            f"`model` must not compute in bfloat16 with format={format!r}, "
            "whose runtimes do not support it. Build the student again with "
            "dtype='float32', copy the weights with "
            "float32_model.set_weights(model.get_weights()), and export the "
            f"new model. Received: model={model.name!r}"
        )
    check_head("model", model, from_logits, "from_logits")
    signature = _signature(inputs)
    example = _random_inputs(signature)
    probs = _example_probabilities(model, signature, example, from_logits)
    student = _serving_model(model, inputs, from_logits)

    progress = Progress(
        f"Exporting {model.name!r} to {directory} as {format}",
        2,  # Write the model, then load it once.
        unit="step",
        verbose=verbose,
    )
    with _temporary_folder(directory) as written:
        path = written / file_name
        if format == "tf_saved_model":
            _write_saved_model(student, signature, path, names, preprocessor)
        elif format == "onnx" and backend == "jax":
            _write_onnx_from_jax(student, signature, path)
        else:
            student.export(
                path, format=format, verbose=False, input_signature=[signature]
            )
        if names is not None:
            names_file = written / "assets.extra" / "class_names.json"
            names_file.parent.mkdir(exist_ok=True)
            names_file.write_text(
                json.dumps(names, ensure_ascii=False), encoding="utf-8"
            )
        progress.update(1)
        _load_once(path, example, None if preprocessor else probs)
        progress.update(2)
        progress.close()
        while True:
            number = version or max(_versions(directory), default=0) + 1
            try:
                return written.rename(directory / str(number))
            except OSError:
                # Another export may have taken this number in the meantime.
                if version or number not in _versions(directory):
                    raise


def _inputs_and_classes(model: Any) -> tuple[Any, int]:
    """Return the model's symbolic inputs, with their nesting, and C."""
    try:
        sequential = isinstance(model, keras.Sequential)
        inputs = model.inputs[0] if sequential else model.input
        shapes = [tuple(output.shape) for output in model.outputs]
    except (AttributeError, TypeError):
        raise ValueError(
            "`model` must be a built Functional or Sequential keras.Model. "
            "Export the `student` of a Distiller. Wrap a subclassed model: "
            f"keras.Model(inputs, model(inputs)). Received: model={model!r}"
        ) from None
    if len(shapes) != 1 or len(shapes[0]) < 2 or not shapes[0][-1]:
        raise ValueError(
            "`model` must have one output of shape (batch, ..., num_classes). "
            f"Received: outputs of shape {shapes}"
        )
    return inputs, max(shapes[0][-1], 2)


def _signature(inputs: Any) -> Any:
    """Return a named `keras.InputSpec` for each input, nested as `inputs`."""
    flat = keras.tree.flatten(inputs)
    specs = []
    for index, tensor in enumerate(flat):
        # TensorFlow only accepts letters, digits and `_`.
        name = re.sub(r"\W", "_", tensor.name, flags=re.ASCII)
        # Keras gives unnamed inputs different numbers in each process.
        if re.fullmatch(r"keras_tensor(_\d+)?", name):
            name = "inputs" if len(flat) == 1 else f"inputs_{index}"
        shape = (None, *tensor.shape[1:])
        specs.append(keras.InputSpec(tensor.dtype, shape, name=name))
    return keras.tree.pack_sequence_as(inputs, specs)


def _random_inputs(signature: Any) -> dict[str, np.ndarray]:
    """Return random inputs by name, or {} if the model takes strings."""
    generator = np.random.default_rng(0)
    inputs = {}
    for spec in keras.tree.flatten(signature):
        if spec.dtype == "string":
            return {}
        # A free size becomes 32: U-Nets halve their images up to five times.
        shape = [8, *(size or 32 for size in spec.shape[1:])]
        values: Any = generator.integers(0, 2, shape)
        if "float" in spec.dtype:
            values = generator.normal(size=shape)
        inputs[spec.name] = values.astype(spec.dtype)
    return inputs


def _example_probabilities(
    model: Any, signature: Any, example: dict[str, Any], from_logits: bool
) -> np.ndarray | None:
    """Return the student's probabilities for the example, or None if it fails.

    Raises a `ValueError` if the outputs contradict `from_logits`.
    """
    inputs = [ops.convert_to_tensor(value) for value in example.values()]
    try:
        inputs = keras.tree.pack_sequence_as(signature, inputs)
        outputs = model(inputs, training=False)
    except Exception:  # A layer may refuse inputs of this size or value.
        return None
    [outputs] = keras.tree.flatten(outputs)
    outputs = ops.cast(outputs, "float32")
    rows = ops.convert_to_numpy(two_events(outputs, from_logits=False))
    rows = rows.reshape(-1, rows.shape[-1])
    rows = rows[np.isfinite(rows).all(axis=-1)]
    logits = not on_simplex(rows).all()
    # The logits of a binary head may be between 0 and 1.
    binary = outputs.shape[-1] == 1 and from_logits
    if len(rows) and logits != from_logits and not binary:
        shown = np.array2string(rows[0], precision=4, threshold=6)
        raise ValueError(
            f"`from_logits` must be {logits}, because the model gives "
            f"{'logits' if logits else 'probabilities'} for random inputs. "
            f"Received: from_logits={from_logits} with model={model.name!r}, "
            f"which gives {shown}"
        )
    probs = model_probs(outputs, from_logits=from_logits)
    return ops.convert_to_numpy(probs)


def _serving_model(model: Any, inputs: Any, from_logits: bool) -> keras.Model:
    """Return a model whose output is a dict of probabilities and label."""
    # Without training=False, random layers would change each request.
    [outputs] = keras.tree.flatten(model(inputs, training=False))
    probs = model_probs(outputs, from_logits=from_logits)
    # `ops.argmax` uses operations that LiteRT and ONNX Runtime do not have, and
    # `ops.top_k` on JAX uses one that TensorFlow 2.21 does not have.
    classes = np.arange(probs.shape[-1], dtype="int32")
    largest = ops.max(probs, axis=-1, keepdims=True)
    label = ops.where(probs < largest, len(classes), classes)
    label = ops.min(label, axis=-1)
    return keras.Model(inputs, {"probabilities": probs, "label": label})


# Writing.


def _write_saved_model(
    student: keras.Model,
    signature: Any,
    path: pathlib.Path,
    class_names: list[str] | None,
    preprocessor: Callable[..., Any] | None,
) -> None:
    """Write a SavedModel whose only endpoint is `serve`."""
    import tensorflow as tf

    from_jax = keras.backend.backend() == "jax"
    predict = _function_from_jax(student, signature) if from_jax else student
    specs = keras.tree.map_structure(
        lambda spec: tf.TensorSpec(spec.shape, spec.dtype, name=spec.name),
        signature,
    )
    taken = specs
    if preprocessor is not None:
        strings = _required_arguments(preprocessor)
        taken = {
            name: tf.TensorSpec((None,), tf.string, name=name)
            for name in strings
        }
        if len(strings) == 1:  # TFSMLayer can then take a single tensor.
            [taken] = taken.values()

    def convert(spec: Any, x: Any) -> Any:
        return tf.ensure_shape(tf.cast(x, spec.dtype), spec.shape)

    def answer(inputs: Any) -> dict[str, Any]:
        if preprocessor is not None:
            texts = {strings[0]: inputs} if len(strings) == 1 else inputs
            made = preprocessor(**texts)
            inputs = keras.tree.map_structure(convert, specs, made)
        outputs = dict(predict(inputs))
        if class_names is not None:
            outputs["class_name"] = tf.gather(class_names, outputs["label"])
        return outputs

    serve = tf.function(answer, input_signature=[taken], autograph=False)
    serve.get_concrete_function()  # Builds layers before they are tracked.
    archive = keras.export.ExportArchive()
    if not from_jax:
        archive.track(student)
    if isinstance(preprocessor, (keras.layers.Layer, tf.Module)):
        archive.track(preprocessor)
    archive.add_endpoint("serve", serve)
    archive.write_out(os.fspath(path), verbose=False)
    if from_jax:
        _rewrite_for_older_readers(path / "saved_model.pb")


def _required_arguments(preprocessor: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments without a default."""
    if isinstance(preprocessor, keras.layers.Layer):
        preprocessor = preprocessor.call
    return [
        name
        for name, p in inspect.signature(preprocessor).parameters.items()
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]


def _write_onnx_from_jax(
    student: keras.Model, signature: Any, file: pathlib.Path
) -> None:
    """Export like `keras.Model.export`, but with names for the outputs."""
    names = ["probabilities", "label"]
    specs = keras.tree.flatten(signature)

    def predict(*flat: Tensor) -> tuple[Tensor, ...]:
        inputs = keras.tree.pack_sequence_as(signature, flat)
        outputs = student(inputs, training=False)
        return tuple(outputs[name] for name in names)

    importlib.import_module("jax2onnx").to_onnx(
        predict,
        inputs=[
            types.SimpleNamespace(
                shape=tuple(_symbolic_shape(spec)), dtype=np.dtype(spec.dtype)
            )
            for spec in specs
        ],
        input_names=[spec.name for spec in specs],
        output_names=names,
        return_mode="file",
        output_path=file,
    )


def _symbolic_shape(spec: Any) -> list[int | str]:
    """Return a shape for JAX, with a name for each free size.

    Keras gives each free size a different name. JAX then does not know that
    tokens and mask have the same length.
    """
    return [
        "batch" if axis == 0 else size or f"axis{axis}"
        for axis, size in enumerate(spec.shape)
    ]


def _function_from_jax(student: keras.Model, signature: Any) -> Any:
    """Return a TensorFlow function of a JAX student, for any batch size."""
    import tensorflow as tf

    traced = _trace_jax(student, signature)

    def predict(inputs: Any) -> dict[str, Any]:
        # JAX's symbolic sizes are at least 1, so add a row to an empty batch.
        size = tf.shape(keras.tree.flatten(inputs)[0])[0]
        missing = [tf.cast(size == 0, "int32")]

        def pad(x: Any) -> Any:
            shape = tf.concat([missing, tf.shape(x)[1:]], axis=0)
            return tf.concat([x, tf.zeros(shape, x.dtype)], axis=0)

        outputs = traced(keras.tree.map_structure(pad, inputs))
        return {name: value[:size] for name, value in outputs.items()}

    return predict


def _trace_jax(student: keras.Model, signature: Any) -> Any:
    """Trace a JAX student with free sizes.

    A student may compare a size with the length of its position table. JAX
    refuses a comparison that depends on the size, so such a comparison becomes
    a constraint.
    """
    shapes = keras.tree.map_structure(
        lambda spec: ", ".join(map(str, _symbolic_shape(spec))), signature
    )
    constraints: list[str] = []
    while True:
        try:
            with warnings.catch_warnings():
                # Keras 3.15 sets an option that JAX 0.10 no longer reads.
                warnings.filterwarnings(
                    "ignore", ".*native_serialization", DeprecationWarning
                )
                function = keras.export.ExportArchive().track_and_add_endpoint(
                    "serve",
                    student,
                    [signature],
                    jax2tf_kwargs={
                        "polymorphic_shapes": [shapes],
                        "polymorphic_constraints": constraints,
                        # Students may be trained on a GPU and served on a CPU.
                        "native_serialization_platforms": ("cpu", "cuda"),
                        "with_gradient": False,
                    },
                )
                function.get_concrete_function()
                return function
        except Exception as error:
            # The comparison is only in the text of the error.
            undecided = re.search(
                r"comparison '(.+?)' (<=|>=|==) '(.+?)' is inconclusive",
                str(error),
            )
            constraint = " ".join(undecided.groups()) if undecided else None
            if constraint is None or constraint in constraints:
                error.add_note(
                    "If JAX cannot leave a size of `model` free, fix that size "
                    "with keras.Input(shape=...), or export with "
                    "KERAS_BACKEND=tensorflow."
                )
                raise
            constraints.append(constraint)


def _rewrite_for_older_readers(file: pathlib.Path) -> None:
    """Rewrite a SavedModel's StableHLO in the version of 2024.

    JAX writes StableHLO for readers that are four weeks older than itself.
    Releases of TensorFlow are months behind, and servers even more. A module
    with newer operations is left unchanged.
    """
    from jax.extend.mlir.dialects import stablehlo
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    for graph in saved.meta_graphs:
        for function in graph.graph_def.library.function:
            for node in function.node_def:
                if node.op != "XlaCallModule":
                    continue
                module = node.attr["module"]
                with contextlib.suppress(ValueError):
                    module.s = stablehlo.serialize_portable_artifact_str(
                        stablehlo.deserialize_portable_artifact_str(module.s),
                        "1.7.0",  # TensorFlow 2.18, the oldest we support
                    )
    file.write_bytes(saved.SerializeToString())


# Loading the export.


def _load_once(
    path: pathlib.Path, inputs: dict[str, Any], expected: np.ndarray | None
) -> None:
    """Load an export; warn if its answers differ from the model's."""
    try:
        predict = _load(path)
    except RuntimeError as error:
        if "Flex" not in str(error):
            raise
        # TensorFlow's Python package has no Flex delegate, so skip the test.
        warnings.warn(
            "model.tflite needs the Flex delegate of LiteRT. The file was "
            "written but could not be tested.",
            stacklevel=3,
        )
        return
    if expected is None:
        return
    difference = float(np.max(np.abs(predict(inputs) - expected)))
    if not difference < 0.05:  # Half precision may differ by some hundredths.
        warnings.warn(
            "The probabilities of the export differ from the model's by up to "
            f"{difference:.2g} for random inputs. Unless inference is random, "
            "the converter of this format has an error: try another format.",
            stacklevel=3,
        )


def _load(path: pathlib.Path) -> Callable[[dict[str, Any]], np.ndarray]:
    """Return a function from inputs by name to an export's probabilities."""
    if path.suffix == ".onnx":
        session = importlib.import_module("onnxruntime").InferenceSession(path)
        return lambda inputs: session.run(["probabilities"], inputs)[0]
    import tensorflow as tf

    if path.suffix == ".tflite":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # It will move to a new package.
            interpreter = tf.lite.Interpreter(str(path))
        serve = interpreter.get_signature_runner("serving_default")
        return lambda inputs: serve(**inputs)["probabilities"]
    model = tf.saved_model.load(os.fspath(path))

    def predict(inputs: dict[str, Any]) -> np.ndarray:
        tensors = {name: tf.constant(x) for name, x in inputs.items()}
        serve = model.signatures["serving_default"]
        return serve(**tensors)["probabilities"].numpy()

    return predict


# Folders.


def _versions(directory: pathlib.Path) -> list[int]:
    """Return the versions that a server finds: 7 and 0007, but not 7.old."""
    names = os.listdir(directory) if directory.is_dir() else []
    return [int(name) for name in names if re.fullmatch("[0-9]+", name)]


@contextlib.contextmanager
def _temporary_folder(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a new folder on the same disk, and delete it at the end.

    First, delete the folders of killed exports. Each export holds a shared
    lock on `directory`, which the system releases when the process ends. An
    exclusive lock therefore shows that no other export is running.
    """
    directory.mkdir(parents=True, exist_ok=True)
    prefix = ".exporting-"  # Servers skip folders that are not numbers.
    lock = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # Locked, or a disk without locks.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for folder in directory.glob(f"{prefix}*"):
                shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=directory) as name:
            # Only this user may read the temporary folder. The folder inside
            # it has the usual permissions, so a server can read it later.
            folder = pathlib.Path(name, "version")
            folder.mkdir()
            yield folder
    finally:
        os.close(lock)
