"""Students from JAX whose inputs have axes of free size.

JAX traces a function once, with words for the sizes that are free. What it has
to know of them to do so (that a length is within a table of positions, that
halves of an image fit when they are doubled again) is found here by trying.
"""

import itertools
import re
import warnings
from typing import Any

import keras

# U-Nets halve their images up to five times.
MULTIPLES = (1, 2, 4, 8, 16, 32)


def symbolic_shape(spec: Any, multiple: int = 1) -> list[int | str]:
    """Return the shape for JAX, with words for the sizes that are free.

    By Keras, each would be a word of its own, and JAX then cannot tell that
    there is one mask entry a token.
    """
    factor = "" if multiple == 1 else f"{multiple}*"
    return [
        "batch" if axis == 0 else size or f"{factor}axis{axis}"
        for axis, size in enumerate(spec.shape)
    ]


def with_free_sizes(student: Any, signature: Any) -> Any:
    """Make a student from JAX a TensorFlow function of free sizes.

    Sizes are left as free as the student allows: any; those that satisfy the
    comparisons that it makes (at most the length of its table of positions);
    or multiples of a power of two. The function refuses others.

    Args:
        student: a Functional model.
        signature: its inputs' `keras.InputSpec`s, in their structure.

    Returns:
        A `tf.function`, traced.

    Raises:
        ValueError: if JAX cannot leave the sizes free.
    """
    first: Exception | None = None
    for multiple in MULTIPLES:
        constraints: list[str] = []
        while True:
            try:
                return _traced(student, signature, multiple, constraints)
            except Exception as error:
                if not _free_axes(signature):
                    raise
                first = first or error
                comparison = _comparison(error)
            if comparison is None or comparison in constraints:
                break
            constraints.append(comparison)
    lines = filter(None, str(first).splitlines())
    raise ValueError(
        "`model` must have inputs of fixed size, but for the batch, where JAX "
        "cannot leave it free: fix it by keras.Input(shape=...), or export "
        "with KERAS_BACKEND=tensorflow. Received: inputs of shape "
        + ", ".join(f"{name} {shape}" for name, shape in _free_axes(signature))
        + f"; JAX says: {' '.join(itertools.islice(lines, 2))}"
    ) from first


def _traced(
    student: Any, signature: Any, multiple: int, constraints: list[str]
) -> Any:
    shapes = keras.tree.map_structure(
        lambda spec: ", ".join(map(str, symbolic_shape(spec, multiple))),
        signature,
    )
    archive = keras.export.ExportArchive()
    with warnings.catch_warnings():
        # Keras 3.15 sets an option that JAX 0.10 no longer reads.
        warnings.filterwarnings(
            "ignore", ".*native_serialization", DeprecationWarning
        )
        function = archive.track_and_add_endpoint(
            "serve",
            student,
            [signature],
            jax2tf_kwargs={
                "polymorphic_shapes": [shapes],
                "polymorphic_constraints": constraints,
                # Students are trained on GPUs and served on CPUs.
                "native_serialization_platforms": ("cpu", "cuda"),
                "with_gradient": False,
            },
        )
        function.get_concrete_function()
    return function


def _free_axes(signature: Any) -> list[tuple[str, tuple[int | None, ...]]]:
    """Return the inputs with a free size other than the batch."""
    return [
        (spec.name, tuple(spec.shape))
        for spec in keras.tree.flatten(signature)
        if None in spec.shape[1:]
    ]


def _comparison(error: Exception) -> str | None:
    """Return the comparison of sizes that JAX could not decide.

    There is no public attribute for it; the message has it word for word.
    """
    found = re.search(
        r"dimension comparison '(.+?)' (<=|>=|==) '(.+?)' is inconclusive",
        str(error),
    )
    return " ".join(found.groups()) if found else None
