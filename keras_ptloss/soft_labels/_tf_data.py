"""`tf.data` in and out: the only file here that knows TensorFlow.

Only `tf.data` itself can build a `tf.data.Dataset`, so `keras.ops` cannot
serve. Nothing is imported: who has such an object has imported TensorFlow,
and users of JAX need not wait for it.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from keras_ptloss._checks import fail

Tensor = Any


def is_tf_dataset(dataset: Any) -> bool:
    """Whether `dataset` is a `tf.data.Dataset`."""
    tf = sys.modules.get("tensorflow")
    return tf is not None and isinstance(dataset, tf.data.Dataset)


def is_infinite(dataset: Any) -> bool:
    """Whether a `tf.data.Dataset` is known to have no end."""
    tf = sys.modules["tensorflow"]
    return bool(dataset.cardinality() == tf.data.INFINITE_CARDINALITY)


def as_input(x: Any) -> Any:
    """Return texts as a tensor of strings, which TensorFlow alone has.

    `fit` makes one of an array of texts, but of none in a batch.
    """
    texts = isinstance(x, np.ndarray) and x.dtype.kind in "OSU"
    if texts and keras.backend.backend() == "tensorflow":
        return keras.ops.convert_to_tensor(x, "string")
    return x


def with_targets(
    dataset: Any,
    batches: Callable[[], Iterator[tuple[Any, ...]]],
    shapes: Callable[[Any, Any], tuple[Any, Any]],
    preprocessor: Callable[[Tensor], Tensor] | None,
) -> Any:
    """Make a `tf.data.Dataset` of the batches of another with new targets.

    Args:
        dataset: The other one.
        batches: Yields its `(inputs, targets)` or `(inputs, targets,
            weights)`, the targets float32.
        shapes: Gives the shapes of targets and weights; see `Matcher.shapes`.
        preprocessor: Mapped over the inputs, if given.
    """
    tf = sys.modules["tensorflow"]
    x_spec, _, weight_spec = keras.utils.unpack_x_y_sample_weight(
        dataset.element_spec
    )
    for spec in keras.tree.flatten(x_spec):
        if not isinstance(spec, tf.TensorSpec):
            fail("dataset", "made of dense tensors", spec)
    weight_shape = None if weight_spec is None else weight_spec.shape
    target_shape, shape = shapes(x_spec, weight_shape)
    targets = tf.TensorSpec(target_shape, tf.float32)
    if shape is not weight_shape:
        weight_spec = tf.TensorSpec(shape, tf.float32)
    paired = tf.data.Dataset.from_generator(
        batches,
        output_signature=keras.utils.pack_x_y_sample_weight(
            x_spec, targets, weight_spec
        ),
    )
    # `fit` shows its progress by it; a negative number means unknown.
    if (cardinality := int(dataset.cardinality())) >= 0:
        paired = paired.apply(
            tf.data.experimental.assert_cardinality(cardinality)
        )
    if preprocessor is not None:
        paired = paired.map(
            lambda x, *rest: (preprocessor(x), *rest),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
    return paired.prefetch(tf.data.AUTOTUNE)
