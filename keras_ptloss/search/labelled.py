"""Read teacher outputs and labels, in all the forms that a search takes."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ptloss._backend import as_array, weights_given_back
from keras_ptloss._validation import (
    as_rows,
    check_class_indices,
    check_count,
    check_flag,
    check_ignore_class,
    check_label_range,
    fail,
    one_tensor,
)
from keras_ptloss.correction import as_probabilities, refuse_masked
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

    Returns:
        The examples, without those that are ignored or have weight 0, and for
        each teacher whether it gave logits.
    """
    teachers = list(teacher) if _is_several(teacher) else [teacher]
    flags = _flags(teachers, from_logits)
    ignore_class = check_ignore_class(ignore_class)
    check_flag("random_sample", random_sample)
    if num_classes is not None:
        num_classes = check_count("num_classes", num_classes, at_least=2)

    outputs, labels, weights = _outputs(teachers, labels, inputs, sample_weight)
    labels, weights = _aligned(outputs[0], labels, weights)
    used = weights > 0.0
    if ignore_class is not None:
        used &= labels != ignore_class
    labels, weights = labels[used].astype("int64"), weights[used]
    if len(labels) < 2:
        raise ValueError(
            "`labels` must have at least two examples, without those that "
            "`ignore_class` or a weight of 0 leaves out. Received: "
            f"{len(labels)} of {len(used)} examples"
        )
    counts = {max(array.shape[-1], 2) for array in outputs}
    if num_classes is None and len(counts) > 1:
        raise ValueError(
            "`num_classes` must say how many classes the labels have if the "
            "teachers differ. Received: num_classes=None, teachers with "
            f"{', '.join(map(str, sorted(counts)))} classes"
        )
    num_classes = num_classes or counts.pop()
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
        probs.append(
            as_probabilities(name, rows, flag, "pass from_logits=True")
        )
    examples = Examples(
        teacher_probs=probs,
        labels=labels,
        sample_weight=weights / weights.mean(),
        num_classes=num_classes,
        random_sample=bool(random_sample),
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
        stored = getattr(one, "from_logits", None)
        if flag is None:
            flag = bool(stored)
        elif check_flag("from_logits", flag) and stored is False:
            fail("from_logits", "False, as the stored outputs say", flag)
        elif not flag and stored:
            fail("from_logits", "True, as the stored outputs say", flag)
        flags.append(bool(flag))
    return tuple(flags)


def _outputs(
    teachers: list[Any], labels: Any, inputs: Any, sample_weight: Any
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray | None]:
    """Return the outputs of each teacher, the labels and the weights."""
    models = [one for one in teachers if isinstance(one, keras.Model)]
    if models and inputs is None:
        if (
            not _is_data_set(labels)
            or len(models) < len(teachers)
            or sample_weight is not None
        ):
            raise ValueError(
                "`inputs` must hold the labelled examples if a teacher is a "
                "Keras model. If all teachers are models, `labels` can be a "
                "data set of (inputs, labels) or (inputs, labels, "
                "sample_weight) instead. Received: inputs=None, labels of type "
                f"{type(labels).__name__}"
            )
        return _predict_batches(models, labels)
    if _is_data_set(inputs):
        raise ValueError(
            "`inputs` must be arrays. Pass a data set of (inputs, labels) as "
            "`labels`: a second pass over a shuffled data set has another "
            f"order. Received: inputs of type {type(inputs).__name__}"
        )
    labels, weights = _as_labels(labels), _as_weights(sample_weight)
    outputs = []
    for k, one in enumerate(teachers):
        name = "teacher" if len(teachers) == 1 else f"teacher[{k}]"
        if isinstance(one, keras.Model):
            with weights_given_back(one):
                one = one_tensor(name, one.predict(inputs, verbose=0))
        refuse_masked(name, one)
        array = as_rows(name, one)
        if array.ndim < 2:
            fail(name, "outputs of shape (N, ..., num_classes)", array)
        outputs.append(array)
    return outputs, labels, weights


def _is_data_set(data: Any) -> bool:
    """Whether `data` gives batches, and is not an array or a list."""
    if isinstance(data, keras.utils.PyDataset):
        return True
    array = hasattr(data, "__array__") or hasattr(data, "shape")
    sequence = isinstance(data, (str, bytes, list, tuple, dict))
    return isinstance(data, Iterable) and not array and not sequence


def _predict_batches(
    models: list[keras.Model], data: Any
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Go through a data set once, and call all models on each batch."""
    outputs: list[list[np.ndarray]] = [[] for _ in models]
    labels, weights = [], []
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(weights_given_back(model))
        for x, y, weight in _batches(data):
            arrays = [
                as_rows(
                    "teacher", one_tensor("teacher", model.predict_on_batch(x))
                )
                for model in models
            ]
            # Batches may be padded to different lengths, so that each position
            # becomes an example.
            y, weight = _aligned(arrays[0], _as_labels(y), _as_weights(weight))
            labels.append(y)
            weights.append(weight)
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
    batches = iter(data)
    if isinstance(data, keras.utils.PyDataset):
        batches = (data[index] for index in range(len(data)))
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
            f"Received: a masked array of shape {labels.shape}"
        )
    array = as_rows("labels", labels)
    if not array.size or not array.ndim:
        fail("labels", "a class for each example, not empty", array)
    check_class_indices(array)
    return array


def _as_weights(weights: Any) -> np.ndarray | None:
    """Require finite weights of at least 0, or None."""
    if weights is None:
        return None
    array = as_rows("sample_weight", weights)
    if (
        array.dtype.kind not in "fiub"
        or not np.isfinite(array).all()
        or (array < 0.0).any()
    ):
        fail("sample_weight", "finite numbers of at least 0", weights)
    return array.astype("float64")


def _aligned(
    outputs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
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
        return labels.ravel(), np.ones(labels.size)
    if weights.shape == (*leading, 1):
        weights = weights[..., 0]
    if not weights.ndim or weights.shape != leading[: weights.ndim]:
        raise ValueError(
            "`sample_weight` must have one weight for each label, or for each "
            f"example. Received: sample_weight of shape {weights.shape}, "
            f"labels of shape {labels.shape}"
        )
    axes = (1,) * (len(leading) - weights.ndim)
    weights = np.broadcast_to(weights.reshape(*weights.shape, *axes), leading)
    return labels.ravel(), weights.ravel()
