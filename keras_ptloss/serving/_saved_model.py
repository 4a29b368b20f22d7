"""SavedModels: a student as a TensorFlow function, strings in front of it."""

import inspect
import os
import pathlib
from collections.abc import Callable
from typing import Any

import keras

from keras_ptloss._checks import fail
from keras_ptloss.serving._free_sizes import with_free_sizes
from keras_ptloss.serving._stablehlo import for_older_readers


def write_saved_model(
    student: Any,
    signature: Any,
    path: pathlib.Path,
    class_names: list[str] | None,
    preprocessor: Callable[..., Any] | None,
) -> None:
    """Write a SavedModel with the signature `serving_default`.

    Args:
        student: a Functional model that returns a dict of its answers.
        signature: its inputs' `keras.InputSpec`s, in their structure.
        path: folder to write to.
        class_names: the classes' names, for `class_name` among the answers.
        preprocessor: as in `export_student`.
    """
    # Strings exist in TensorFlow alone, and TensorFlow runs what is saved,
    # from either backend.
    import tensorflow as tf

    # Keras makes the student a TensorFlow function. It goes through an archive
    # of its own, since every endpoint of the one that is written is served.
    if keras.backend.backend() == "jax":
        predict = with_free_sizes(student, signature)
    else:
        own = keras.export.ExportArchive()
        predict = own.track_and_add_endpoint("serve", student, [signature])
    specs = keras.tree.map_structure(
        lambda spec: tf.TensorSpec(spec.shape, spec.dtype, name=spec.name),
        signature,
    )

    def answer(inputs: Any) -> dict[str, Any]:
        outputs = dict(predict(inputs))
        if class_names is not None:
            outputs["class_name"] = tf.gather(class_names, outputs["label"])
        return outputs

    function, taken = answer, specs
    if preprocessor is not None:
        names = required_arguments(preprocessor)
        taken = {
            name: tf.TensorSpec((None,), tf.string, name=name) for name in names
        }
        if len(names) == 1:  # then also a single tensor, as Keras calls layers
            taken = taken[names[0]]

        def from_strings(inputs: Any) -> dict[str, Any]:
            texts = {names[0]: inputs} if len(names) == 1 else inputs
            return answer(_fit_to(specs, preprocessor(**texts)))

        function = from_strings
    serve = tf.function(function, input_signature=[taken], autograph=False)
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


def required_arguments(preprocessor: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments that have no default."""
    if isinstance(preprocessor, keras.layers.Layer):
        preprocessor = preprocessor.call
    return [
        name
        for name, p in inspect.signature(preprocessor).parameters.items()
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
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
