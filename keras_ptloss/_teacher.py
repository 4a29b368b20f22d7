"""Reads what a teacher says of labelled examples, and checks it once.

Labels and flags are checked before anything is predicted; outputs and labels
of a data set come from one and the same pass over it.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import keras
import numpy as np
from keras import ops

from keras_ptloss._backend import weights_given_back
from keras_ptloss._binary import two_events
from keras_ptloss._checks import (
    check_output_form,
    check_probabilities,
    fail,
    on_simplex,
)
from keras_ptloss._several import SideBySide


@runtime_checkable
class StoredOutputs(Protocol):
    """Outputs that say of themselves whether they are logits."""

    @property
    def from_logits(self) -> bool:
        """Whether the rows are logits."""

    def __array__(self) -> np.ndarray:
        """Return the rows."""


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledOutputs:
    """A teacher's outputs on labelled examples.

    Attributes:
        outputs: `(N, C)` in float64, checked; probabilities are normalised.
        labels: classes, `(N,)` in int64.
        from_logits: whether `outputs` are logits.
    """

    outputs: np.ndarray
    labels: np.ndarray
    from_logits: bool


def read_labelled(
    teacher: Any,
    labels: Any,
    *,
    inputs: Any = None,
    from_logits: bool | None = None,
    ignore_class: int | None = None,
) -> LabelledOutputs:
    """Read a teacher's outputs beside their labels.

    Args:
        teacher: outputs, `(N, ..., C)`, or a Keras model.
        labels: classes, `(N, ...)`; or, with a model, batches of
            `(inputs, labels)`.
        inputs: the examples, with a model and an array of labels.
        from_logits: whether the outputs are logits; None is what
            `StoredOutputs` say of themselves, and False of others.
        ignore_class: a label that marks positions to leave out.

    Returns:
        `LabelledOutputs`, every position of the leading axes a row.

    Raises:
        ValueError: if an argument is not of this form.
    """
    from_logits = _says_logits(teacher, from_logits)
    if isinstance(teacher, keras.Model):
        outputs, labels = _predict(teacher, labels, inputs)
    elif inputs is not None:
        raise ValueError(
            "`inputs` goes with a Keras model. Received: inputs, with a "
            f"teacher of type {type(teacher).__name__}"
        )
    else:
        labels = _integers(labels)
        outputs = np.asarray(teacher)
    rows = read_outputs(outputs, from_logits=from_logits)
    labels = _aligned(labels, rows.shape)
    rows = rows.reshape(-1, rows.shape[-1])
    if ignore_class is not None:
        kept = labels != ignore_class
        rows, labels = rows[kept], labels[kept]
        if not len(labels):
            fail("ignore_class", "a label that some rows lack", ignore_class)
    _check_range(labels, rows.shape[-1])
    return LabelledOutputs(rows, labels.astype("int64"), from_logits)


def read_outputs(
    outputs: Any,
    *,
    from_logits: bool,
    if_logits: str = "say from_logits=True",
    argument: str = "teacher",
) -> np.ndarray:
    """Check a teacher's outputs, `(..., C)`; return them in float64.

    A binary head's one column becomes two; probabilities are normalised.

    Raises:
        ValueError: if they are not numbers of this form, or not logits or
            probabilities as `from_logits` says.
    """
    rows = np.asarray(outputs)
    if rows.dtype.kind not in "fiu" or rows.ndim < 2 or not rows.size:
        raise ValueError(
            f"`{argument}` must give numbers of shape (examples, ..., classes). "
            f"Received: {argument} outputs of shape {rows.shape} and dtype "
            f"{rows.dtype}"
        )
    rows = two_events(rows.astype("float64"), from_logits=from_logits)
    if not from_logits:
        check_probabilities(argument, rows, if_logits)
        return np.asarray(rows / rows.sum(axis=-1, keepdims=True))
    if not np.all(np.isfinite(rows)):
        fail(argument, "finite logits", rows)
    if rows.size > rows.shape[-1] and on_simplex(rows).all():
        raise ValueError(
            f"`from_logits` must be False for probabilities: all rows of "
            f"`{argument}` are non-negative and sum to 1. Received: "
            f"from_logits=True, {argument}[0]={rows[0]}"
        )
    return rows


def read_row(row: SideBySide, outputs: Any) -> np.ndarray:
    """Check the outputs of several teachers; return them side by side.

    Args:
        row: which columns are whose.
        outputs: a list of one array a teacher, or one array of all.

    Returns:
        `(..., C_1 + C_2 + ...)`, in float64; probabilities are normalised.

    Raises:
        ValueError: as `read_outputs`, naming the teacher; if one did not answer
            all examples (a row with NaN), or other examples than the first.
    """
    if isinstance(outputs, (list, tuple)):
        row.check_number("teacher", len(outputs))
    else:
        whole = row.join("teacher", np.asarray(outputs))
        outputs = [whole[..., columns] for columns in row.columns]
    parts = [
        read_answers(f"teacher[{k}]", output, flag)
        for k, (output, flag) in enumerate(
            zip(outputs, row.from_logits, strict=True)
        )
    ]
    return np.asarray(row.join("teacher", parts))


def read_answers(argument: str, outputs: Any, from_logits: bool) -> np.ndarray:
    """Check one of several teachers' outputs, `(..., C_k)`, all answered."""
    rows = np.asarray(outputs)
    if rows.dtype.kind == "f" and rows.ndim:
        missing = np.isnan(rows).any(axis=-1).ravel()
        if missing.any():
            raise ValueError(
                f"`{argument}` must answer every example (leave out, of all "
                "teachers, those that it did not). Received: NaN in "
                f"{np.count_nonzero(missing)} of {missing.size} rows, first in "
                f"{argument}[{int(np.argmax(missing))}]"
            )
    return read_outputs(rows, from_logits=from_logits, argument=argument)


def _says_logits(teacher: Any, from_logits: bool | None) -> bool:
    """Return whether the teacher's outputs are logits, by the one who knows."""
    if isinstance(teacher, keras.Model):
        if from_logits:
            check_output_form("teacher", teacher, True, "from_logits")
        return bool(from_logits)
    if not isinstance(teacher, StoredOutputs):
        return bool(from_logits)
    own = bool(teacher.from_logits)
    if from_logits is not None and bool(from_logits) != own:
        fail("from_logits", f"{own}, as these soft labels say", from_logits)
    return own


def _predict(
    teacher: keras.Model, labels: Any, inputs: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return the model's outputs and the labels of the same examples."""
    if inputs is None:
        if not _is_batches(labels):
            raise ValueError(
                "`inputs` must hold the labelled examples when `teacher` is a "
                "Keras model, unless the second argument is a data set of "
                "(inputs, labels). Received: inputs=None"
            )
        with weights_given_back(teacher):
            pairs = [
                (teacher.predict_on_batch(x), _integers(y))
                for x, y in _pairs(labels)
            ]
        if not pairs:
            fail("labels", "a data set of at least one batch", labels)
        outputs, parts = zip(*pairs, strict=True)
        return np.concatenate(outputs), np.concatenate(parts)
    if _is_batches(inputs):
        raise ValueError(
            "`inputs` must be arrays. Give a data set as "
            "search(teacher, dataset), of (inputs, labels): labels gathered in "
            "another pass of a shuffled data set belong to other rows. "
            f"Received: inputs of type {type(inputs).__name__}"
        )
    labels = _integers(labels)
    for leaf in keras.tree.flatten(inputs) if _is_tree(inputs) else [inputs]:
        if len(leaf) != len(labels):
            raise ValueError(
                "`labels` must have one entry for each of the inputs, "
                f"{len(leaf)}. Received: labels of length {len(labels)}"
            )
    with weights_given_back(teacher):
        return np.asarray(teacher.predict(inputs, verbose=0)), labels


def _is_tree(inputs: Any) -> bool:
    """Whether inputs are several arrays, and not one list of texts."""
    if isinstance(inputs, dict):
        return True
    return isinstance(inputs, (list, tuple)) and any(
        isinstance(leaf, np.ndarray) or ops.is_tensor(leaf) for leaf in inputs
    )


def _is_batches(data: Any) -> bool:
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


def _integers(labels: Any) -> np.ndarray:
    array = np.asarray(
        ops.convert_to_numpy(labels) if ops.is_tensor(labels) else labels
    )
    if not array.size or not array.ndim:
        raise ValueError(
            "`labels` must be non-empty, one class an example. Received: "
            f"labels of shape {array.shape}"
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            "`labels` must be integers (class indices, not one-hot rows or "
            f"scores). Received: labels of dtype {array.dtype}"
        )
    return array


def _aligned(labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return one label a row of outputs of `shape`, in one axis."""
    if labels.shape == (*shape[:-1], 1):
        labels = labels[..., 0]
    if labels.ndim != len(shape) - 1:
        raise ValueError(
            "`labels` must have one class a row of the teacher, shape "
            f"{shape[:-1]}. Received: labels of shape {labels.shape}"
        )
    if labels.shape != shape[:-1]:
        raise ValueError(
            "`labels` must have one entry for each of the teacher's rows, "
            f"{shape[:-1]}. Received: labels of shape {labels.shape}"
        )
    return labels.ravel()


def _check_range(labels: np.ndarray, classes: int) -> None:
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        index = int(np.argmax(outside))
        raise ValueError(
            f"`labels` must be in [0, {classes}), the teacher's classes "
            "(`ignore_class` leaves rows out). Received: "
            f"labels[{index}]={labels[index]}"
        )
