"""Asks models what they say of labelled examples.

Outputs and labels of a data set come from one and the same pass over it.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ptloss._backend import as_array, weights_given_back
from keras_ptloss._checks import (
    as_rows,
    check_class_indices,
    fail,
    one_tensor,
)


def answers(
    teachers: list[Any], labels: Any, inputs: Any
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return each teacher's outputs, and the labels of the same examples."""
    models = [one for one in teachers if isinstance(one, keras.Model)]
    if not models:
        if inputs is not None:
            raise ValueError(
                "`inputs` goes with a Keras model. Received: inputs, with a "
                f"teacher of type {type(teachers[0]).__name__}"
            )
        labels = as_labels(labels)
        return [_stored(one) for one in teachers], labels
    if inputs is None and len(models) < len(teachers):
        raise ValueError(
            "`inputs` must hold the labelled examples where models stand "
            "beside stored outputs, whose order a data set need not have. "
            "Received: inputs=None"
        )
    predicted, labels = _predict(models, labels, inputs)
    of_models = iter(predicted)
    return [
        next(of_models) if isinstance(one, keras.Model) else _stored(one)
        for one in teachers
    ], labels


def _stored(outputs: Any) -> np.ndarray:
    """Return rows that stand beside labels, in their order."""
    if not getattr(outputs, "ordered", True):
        fail(
            "teacher",
            "outputs in the order of the labels; rows of Parquet files have "
            "none: import_soft_labels(files, x, path) puts them into that of x",
            outputs,
        )
    return as_rows("teacher", outputs)


def _one_output(outputs: Any) -> np.ndarray:
    """Return what a model said of some examples, one array."""
    return as_rows("teacher", one_tensor("teacher", outputs))


def _predict(
    teachers: list[keras.Model], labels: Any, inputs: Any
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the models' outputs and the labels of the same examples."""
    if inputs is None:
        if not is_data_set(labels):
            raise ValueError(
                "`inputs` must hold the labelled examples when `teacher` is a "
                "Keras model, unless the second argument is a data set of "
                "(inputs, labels). Received: inputs=None"
            )
        return _predict_batches(teachers, labels)
    if is_data_set(inputs):
        raise ValueError(
            "`inputs` must be arrays. Give a data set as "
            "search(teacher, dataset), of (inputs, labels): labels gathered in "
            "another pass of a shuffled data set belong to other rows. "
            f"Received: inputs of type {type(inputs).__name__}"
        )
    labels = as_labels(labels)
    for leaf in keras.tree.flatten(inputs) if _is_tree(inputs) else [inputs]:
        if len(leaf) != len(labels):
            raise ValueError(
                "`labels` must have one entry for each of the inputs, "
                f"{len(leaf)}. Received: labels of length {len(labels)}"
            )
    outputs = []
    for model in teachers:
        with weights_given_back(model):
            outputs.append(_one_output(model.predict(inputs, verbose=0)))
    return outputs, labels


def _predict_batches(
    teachers: list[keras.Model], labels: Any
) -> tuple[list[np.ndarray], np.ndarray]:
    """Go once through a data set, asking all models of each batch."""
    outputs: list[list[np.ndarray]] = [[] for _ in teachers]
    parts = []
    with contextlib.ExitStack() as stack:
        for model in teachers:
            stack.enter_context(weights_given_back(model))
        for x, y in _pairs(labels):
            for of_model, model in zip(outputs, teachers, strict=True):
                of_model.append(_one_output(model.predict_on_batch(_as_own(x))))
            parts.append(as_labels(y))
    if not parts:
        fail("labels", "a data set of at least one batch", labels)
    if len({part.shape[1:] for part in parts}) > 1:
        # Padded to other lengths batch by batch: every position is a row.
        outputs = [
            [rows.reshape(-1, rows.shape[-1]) for rows in of_model]
            for of_model in outputs
        ]
        parts = [part.reshape(-1) for part in parts]
    return [np.concatenate(rows) for rows in outputs], np.concatenate(parts)


def _is_tree(inputs: Any) -> bool:
    """Whether inputs are several arrays, and not one list of texts."""
    if isinstance(inputs, dict):
        return True
    return isinstance(inputs, (list, tuple)) and any(
        isinstance(leaf, np.ndarray) or ops.is_tensor(leaf) for leaf in inputs
    )


def is_data_set(data: Any) -> bool:
    """Whether `data` is a data set: batches, and not an array or a list."""
    if isinstance(data, keras.utils.PyDataset):
        return True
    array = hasattr(data, "__array__") or hasattr(data, "shape")
    sequence = isinstance(data, (str, bytes, list, tuple, dict))
    return isinstance(data, Iterable) and not array and not sequence


def _pairs(data: Any) -> Iterator[tuple[Any, Any]]:
    """Go once through batches of `(inputs, labels)`."""
    batches = (
        (data[index] for index in range(len(data)))
        if isinstance(data, keras.utils.PyDataset)
        else data
    )
    for batch in batches:
        x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
        if y is None or weight is not None:
            raise ValueError(
                "`labels` must be a data set of (inputs, labels), without "
                f"sample weights. Received: a batch of {len(batch)} parts"
                if isinstance(batch, tuple)
                else "`labels` must be a data set of (inputs, labels). "
                f"Received: a batch of type {type(batch).__name__}"
            )
        yield x, y


def _as_own(x: Any) -> Any:
    """Return inputs as the backend takes them: on JAX no `tf.Tensor`."""
    return keras.tree.map_structure(
        lambda leaf: (
            as_array(leaf)
            if hasattr(leaf, "numpy") and not ops.is_tensor(leaf)
            else leaf
        ),
        x,
    )


def as_labels(labels: Any) -> np.ndarray:
    """Require class indices, of any shape."""
    array = as_rows("labels", labels)
    if not array.size or not array.ndim:
        raise ValueError(
            "`labels` must be non-empty, one class an example. Received: "
            f"labels of shape {array.shape}"
        )
    check_class_indices(array)
    return array
