"""Read teacher outputs and labels, in all the forms that a search takes."""

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
    check_count,
    check_flag,
    check_ignore_class,
    check_label_range,
    fail,
    one_tensor,
)
from keras_ptloss.correction import as_probabilities
from keras_ptloss.search.method import Examples


def read_labelled(
    teacher: Any,
    labels: Any,
    *,
    inputs: Any = None,
    sample_weight: Any = None,
    from_logits: Any = None,
    num_classes: int | None = None,
    ignore_class: int | None = None,
    random_sample: bool = False,
    seed: int = 0,
) -> tuple[Examples, tuple[bool, ...]]:
    """Read and check what `ProxyTeacherSearch.search` is given.

    Args:
        teacher: see `ProxyTeacherSearch.search`, as all other arguments.
        labels: see there.
        inputs: see there.
        sample_weight: see there.
        from_logits: see there.
        num_classes: see there.
        ignore_class: see there.
        random_sample: see there.
        seed: goes into the examples.

    Returns:
        The examples, without those that are ignored or have weight 0, and for
        each teacher whether it gave logits.
    """
    teachers = list(teacher) if _is_several(teacher) else [teacher]
    flags = _flags(teachers, from_logits)
    ignore_class = check_ignore_class(ignore_class)
    if num_classes is not None:
        num_classes = check_count("num_classes", num_classes, at_least=2)
    outputs, labels, weights = _outputs(teachers, labels, inputs, sample_weight)

    labels, weights = _aligned(outputs[0], labels, weights)
    used = np.ones(len(labels), bool) if weights is None else weights > 0.0
    if ignore_class is not None:
        used &= labels != ignore_class
    labels = labels[used].astype("int64")
    if len(labels) < 2:
        raise ValueError(
            "`labels` must have at least two examples, without those that "
            "`ignore_class` or a weight of 0 leaves out. Received: "
            f"{len(labels)} of {len(used)} examples"
        )
    counts = [max(array.shape[-1], 2) for array in outputs]
    num_classes = _num_classes(num_classes, counts)
    check_label_range(
        labels,
        num_classes,
        "the classes. `ignore_class` leaves examples out; `num_classes` is "
        "the number of classes if the teacher has others",
    )
    probs = []
    for k, (array, flag) in enumerate(zip(outputs, flags, strict=True)):
        name = "teacher" if len(outputs) == 1 else f"teacher[{k}]"
        if array.shape[:-1] != outputs[0].shape[:-1]:
            raise ValueError(
                f"`{name}` must have an output for the same examples as "
                f"teacher[0]. Received: {name} of shape {array.shape}, "
                f"teacher[0] of shape {outputs[0].shape}"
            )
        rows = array.reshape(len(used), -1)[used]
        probs.append(as_probabilities(name, rows, from_logits=flag))
    weights = np.ones(len(labels)) if weights is None else weights[used]
    examples = Examples(
        teacher_probs=probs,
        labels=labels,
        sample_weight=weights / weights.mean(),
        num_classes=num_classes,
        random_sample=check_flag("random_sample", random_sample),
        seed=seed,
    )
    return examples, flags


def _is_several(teacher: Any) -> bool:
    """Whether it is a list of teachers, and not a list with one's rows."""
    return isinstance(teacher, (list, tuple)) and any(
        isinstance(one, keras.Model)
        or (hasattr(one, "__array__") and len(getattr(one, "shape", ())) > 1)
        for one in teacher
    )


def _flags(teachers: list[Any], from_logits: Any) -> tuple[bool, ...]:
    """Return for each teacher whether it gives logits.

    Stored outputs may say it themselves, by an attribute `from_logits`.
    """
    given = from_logits
    if not isinstance(given, (list, tuple)):
        given = [given] * len(teachers)
    if len(given) != len(teachers):
        fail("from_logits", "one flag, or one for each teacher", from_logits)
    flags = []
    for one, flag in zip(teachers, given, strict=True):
        if flag is not None:
            check_flag("from_logits", flag)
        stored = None
        if not isinstance(one, keras.Model):
            stored = getattr(one, "from_logits", None)
        if flag is not None and stored is not None and flag != stored:
            fail("from_logits", f"{stored}, as the stored outputs say", flag)
        flags.append(bool(flag if flag is not None else stored))
    return tuple(flags)


def _num_classes(num_classes: int | None, counts: list[int]) -> int:
    if num_classes is None and len(set(counts)) > 1:
        raise ValueError(
            "`num_classes` must say how many classes the labels have if the "
            "teachers differ. Received: num_classes=None, teachers with "
            f"{', '.join(map(str, counts))} classes"
        )
    return counts[0] if num_classes is None else num_classes


def _outputs(
    teachers: list[Any], labels: Any, inputs: Any, sample_weight: Any
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray | None]:
    """Return the outputs of each teacher, the labels and the weights."""
    models = [one for one in teachers if isinstance(one, keras.Model)]
    if inputs is not None and not models:
        raise ValueError(
            "`inputs` is used only if a teacher is a Keras model. Received: "
            f"inputs, and a teacher of type {type(teachers[0]).__name__}"
        )
    if inputs is None and models:
        if not _is_data_set(labels):
            raise ValueError(
                "`inputs` must hold the labelled examples if the teacher is a "
                "Keras model, unless `labels` is a data set of (inputs, "
                "labels). Received: inputs=None"
            )
        if len(models) < len(teachers):
            raise ValueError(
                "`inputs` must hold the labelled examples if there are models "
                "and stored outputs: a data set may have another order than "
                "the stored outputs. Received: inputs=None"
            )
        if sample_weight is not None:
            raise ValueError(
                "`sample_weight` must be None with a data set: let it give "
                "(inputs, labels, sample_weight). Received: sample_weight"
            )
        return _predict_batches(models, labels)
    labels = _as_labels(labels)
    weights = _as_weights(sample_weight)
    if models:
        _check_inputs(inputs, labels)
    outputs = []
    for k, one in enumerate(teachers):
        if isinstance(one, keras.Model):
            with weights_given_back(one):
                one = one_tensor("teacher", one.predict(inputs, verbose=0))
        if isinstance(one, np.ma.MaskedArray):
            as_probabilities("teacher", one, from_logits=False)  # refuses it
        name = "teacher" if len(teachers) == 1 else f"teacher[{k}]"
        array = as_rows(name, one)
        if array.ndim < 2:
            fail(name, "outputs of shape (N, ..., num_classes)", array)
        outputs.append(array)
    return outputs, labels, weights


def _check_inputs(inputs: Any, labels: np.ndarray) -> None:
    """Require arrays with as many examples as labels."""
    if _is_data_set(inputs):
        raise ValueError(
            "`inputs` must be arrays. Pass a data set of (inputs, labels) as "
            "`labels`: a second pass over a shuffled data set has another "
            f"order. Received: inputs of type {type(inputs).__name__}"
        )
    leaves = [inputs]
    if isinstance(inputs, dict) or (
        isinstance(inputs, (list, tuple))
        and any(hasattr(leaf, "shape") for leaf in inputs)
    ):
        leaves = keras.tree.flatten(inputs)
    for leaf in leaves:
        count = leaf.shape[0] if hasattr(leaf, "shape") else len(leaf)
        if count != len(labels):
            raise ValueError(
                f"`labels` must have one entry for each of the {count} "
                f"inputs. Received: labels of length {len(labels)}"
            )


def _is_data_set(data: Any) -> bool:
    """Whether `data` gives batches, and is not an array or a list."""
    if isinstance(data, keras.utils.PyDataset):
        return True
    array = hasattr(data, "__array__") or hasattr(data, "shape")
    sequence = isinstance(data, (str, bytes, list, tuple, dict))
    return isinstance(data, Iterable) and not array and not sequence


def _predict_batches(
    models: list[keras.Model], data: Any
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray | None]:
    """Go through a data set once, and call all models on each batch."""
    outputs: list[list[np.ndarray]] = [[] for _ in models]
    labels, weights = [], []
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(weights_given_back(model))
        for x, y, weight in _batches(data):
            arrays = [
                as_rows(
                    "teacher",
                    one_tensor("teacher", model.predict_on_batch(x)),
                )
                for model in models
            ]
            # Batches may be padded to different lengths, so that each position
            # becomes an example.
            y, w = _aligned(arrays[0], _as_labels(y), _as_weights(weight))
            labels.append(y)
            weights.append(np.ones(len(y)) if w is None else w)
            for parts, array in zip(outputs, arrays, strict=True):
                parts.append(array.reshape(-1, array.shape[-1]))
    if not labels:
        fail("labels", "a data set of at least one batch", data)
    return (
        [np.concatenate(parts) for parts in outputs],
        np.concatenate(labels),
        np.concatenate(weights),
    )


def _batches(data: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Go once through batches of `(inputs, labels)`, maybe with weights."""
    cardinality = getattr(data, "cardinality", None)
    if callable(cardinality) and int(cardinality()) == -1:
        raise ValueError(
            "`labels` must be a data set that ends. Received: a data set of "
            "infinite cardinality; leave out `.repeat()`"
        )
    if isinstance(data, keras.utils.PyDataset):
        batches = (data[index] for index in range(len(data)))
    else:
        batches = iter(data)
    for batch in batches:
        if not isinstance(batch, (list, tuple)) or len(batch) not in (2, 3):
            raise ValueError(
                "`labels` must be a data set of (inputs, labels) or (inputs, "
                f"labels, sample_weight). Received: {type(batch).__name__} of "
                f"length {len(batch)} as a batch"
            )
        x, y, *weight = batch
        # On JAX and PyTorch a model does not take tensors of tf.data.
        x = keras.tree.map_structure(
            lambda leaf: (
                as_array(leaf)
                if hasattr(leaf, "numpy") and not ops.is_tensor(leaf)
                else leaf
            ),
            x,
        )
        yield x, y, weight[0] if weight else None


def _as_labels(labels: Any) -> np.ndarray:
    """Require class indices, `(N, ...)`."""
    if isinstance(labels, np.ma.MaskedArray):
        raise ValueError(
            "`labels` must not be a masked array: leave the masked examples "
            "out, of the teacher too, or mark them by `ignore_class`. "
            f"Received: labels of shape {labels.shape} with a mask"
        )
    array = as_rows("labels", labels)
    if not array.size or not array.ndim:
        fail("labels", "a class for each example, not empty", array)
    check_class_indices(array)
    return array


def _as_weights(weights: Any) -> np.ndarray | None:
    """Require finite weights of at least 0."""
    if weights is None:
        return None
    array = as_rows("sample_weight", weights)
    if array.dtype.kind not in "fiub" or not array.ndim:
        fail("sample_weight", "one number for each label", weights)
    array = array.astype("float64")
    if not np.isfinite(array).all() or (array < 0.0).any():
        fail("sample_weight", "finite and not negative", weights)
    return array


def _aligned(
    outputs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return labels and weights `(N,)`, one for each row of the outputs."""
    leading = outputs.shape[:-1]
    if labels.shape == (*leading, 1):
        labels = labels[..., 0]
    if labels.shape != leading:
        raise ValueError(
            "`labels` must have one class for each output of the teacher, "
            f"shape {leading}. Received: labels of shape {labels.shape}, "
            f"teacher outputs of shape {outputs.shape}"
        )
    if weights is None:
        return labels.ravel(), None
    if weights.shape == (*leading, 1):
        weights = weights[..., 0]
    if weights.shape != leading[: weights.ndim]:
        raise ValueError(
            "`sample_weight` must have one weight for each label, or for each "
            f"example. Received: sample_weight of shape {weights.shape}, "
            f"labels of shape {labels.shape}"
        )
    axes = (1,) * (len(leading) - weights.ndim)
    weights = np.broadcast_to(weights.reshape(*weights.shape, *axes), leading)
    return labels.ravel(), weights.ravel()
