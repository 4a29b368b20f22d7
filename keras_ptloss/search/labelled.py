"""Read teacher outputs and labels, in every form that a search accepts."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ptloss._backend import as_array, weights_given_back
from keras_ptloss._progress import Verbose, predict, track
from keras_ptloss._validation import (
    as_floats,
    as_probabilities,
    as_rows,
    check_class_indices,
    check_count,
    check_flag,
    check_ignore_class,
    check_label_range,
    fail,
    one_flag_each,
    one_tensor,
    refuse_masked,
)
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
    verbose: Verbose = 0,
) -> tuple[Examples, tuple[bool, ...]]:
    """Read and check the arguments of `ProxyTeacherSearch.search`.

    Returns:
        The examples, without those that are ignored or have weight 0; and for
        each teacher, whether it gave logits.
    """
    teachers = list(teacher) if _is_several(teacher) else [teacher]
    flags = []
    for one, flag in zip(
        teachers, one_flag_each(from_logits, len(teachers)), strict=True
    ):
        stored = getattr(one, "from_logits", None)
        if None not in (flag, stored) and flag != stored:
            fail("from_logits", f"{stored}, as in the stored outputs", flag)
        flags.append(bool(stored if flag is None else flag))
    ignore_class = check_ignore_class(ignore_class)
    check_flag("random_sample", random_sample)
    if num_classes is not None:
        num_classes = check_count("num_classes", num_classes, at_least=2)

    if inputs is None and any(isinstance(t, keras.Model) for t in teachers):
        outputs, labels, weights = _predict_batches(
            teachers, labels, sample_weight, verbose
        )
    else:
        outputs = _outputs(teachers, inputs, verbose)
        labels, weights = _flat(outputs[0], labels, sample_weight)
    used = weights > 0.0
    if ignore_class is not None:
        used &= labels != ignore_class
    labels, weights = labels[used].astype("int64"), weights[used]
    if len(labels) < 2:
        raise ValueError(
            "`labels` must have at least two examples, not counting those with "
            "`ignore_class` or a weight of 0. Received: "
            f"{len(labels)} of {len(used)} examples"
        )
    counts = {max(array.shape[-1], 2) for array in outputs}
    if num_classes is None and len(counts) > 1:
        raise ValueError(
            "`num_classes` must be the number of classes of the labels, if the "
            "teachers differ. Received: num_classes=None, teachers with "
            f"{', '.join(map(str, sorted(counts)))} classes"
        )
    num_classes = num_classes or counts.pop()
    check_label_range(
        labels,
        num_classes,
        "the classes. To leave examples out, pass `ignore_class`. If the "
        "teacher has other classes than the labels, pass `num_classes`",
    )
    probs = []
    for k, (array, flag) in enumerate(zip(outputs, flags, strict=True)):
        name = "teacher" if len(outputs) == 1 else f"teacher[{k}]"
        if array.shape[:-1] != outputs[0].shape[:-1]:
            raise ValueError(
                f"`{name}` must have outputs for the same examples as "
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
    return examples, tuple(flags)


def _is_several(teacher: Any) -> bool:
    """Return whether `teacher` is a list of teachers, not a list of outputs."""
    return isinstance(teacher, (list, tuple)) and any(
        isinstance(one, keras.Model)
        or (hasattr(one, "__array__") and len(getattr(one, "shape", ())) > 1)
        for one in teacher
    )


def _is_data_set(data: Any) -> bool:
    """Return whether `data` yields batches, unlike an array or a list."""
    array = hasattr(data, "__array__") or hasattr(data, "shape")
    sequence = isinstance(data, (str, bytes, list, tuple, dict))
    return isinstance(data, keras.utils.PyDataset) or (
        isinstance(data, Iterable) and not array and not sequence
    )


def _outputs(
    teachers: list[Any], inputs: Any, verbose: Verbose
) -> list[np.ndarray]:
    """Return the outputs of each teacher, `(N, ..., C)`."""
    if _is_data_set(inputs):
        raise ValueError(
            "`inputs` must be arrays. Pass a data set of (inputs, labels) as "
            "`labels`, because a shuffled data set has a new order when it is "
            f"read again. Received: inputs of type {type(inputs).__name__}"
        )
    outputs = []
    for k, one in enumerate(teachers):
        name = "teacher" if len(teachers) == 1 else f"teacher[{k}]"
        if isinstance(one, keras.Model):
            with weights_given_back(one):
                one = predict(one, inputs, verbose=verbose)
            one = one_tensor(name, one)
        refuse_masked(name, one)
        array = as_rows(name, one)
        if array.ndim < 2:
            fail(name, "outputs of shape (N, ..., num_classes)", array)
        outputs.append(array)
    return outputs


def _predict_batches(
    teachers: list[Any], data: Any, sample_weight: Any, verbose: Verbose
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Read a data set once, and call all teachers on each batch.

    Returns:
        The outputs `(N, C)` of each teacher, the labels `(N,)` and the weights
        `(N,)`. Each position is an example, because batches may have different
        lengths.
    """
    models = all(isinstance(one, keras.Model) for one in teachers)
    if not _is_data_set(data) or not models or sample_weight is not None:
        raise ValueError(
            "`inputs` must hold the labelled examples if a teacher is a Keras "
            "model. If all teachers are models, `labels` can be a data set of "
            "(inputs, labels) or (inputs, labels, sample_weight) instead. "
            f"Received: inputs=None, labels of type {type(data).__name__}"
        )
    parts = []
    with contextlib.ExitStack() as stack:
        for model in teachers:
            stack.enter_context(weights_given_back(model))
        batches = track(
            _batches(data),
            "Running the teacher on the labelled examples",
            None,
            unit="step",
            verbose=verbose,
        )
        for x, y, weight in batches:
            outputs = [
                one_tensor("teacher", model.predict_on_batch(x))
                for model in teachers
            ]
            flat = [array.reshape(-1, array.shape[-1]) for array in outputs]
            parts.append((*flat, *_flat(outputs[0], y, weight)))
    if not parts:
        fail("labels", "a data set of at least one batch", data)
    *found, labels, weights = map(np.concatenate, zip(*parts, strict=True))
    return found, labels, weights


def _batches(data: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield the inputs, labels and weights (or None) of each batch."""
    cardinality = getattr(data, "cardinality", None)
    if callable(cardinality) and int(cardinality()) == -1:
        raise ValueError(
            "`labels` must be a finite data set; leave out `.repeat()`. "
            "Received: a data set of infinite cardinality"
        )
    batches = iter(data)
    if isinstance(data, keras.utils.PyDataset):
        batches = (data[index] for index in range(len(data)))
    for batch in batches:
        x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
        if y is None:
            expected = "(inputs, labels) or (inputs, labels, sample_weight)"
            fail("labels", f"a data set of {expected}", batch)
        # On JAX and PyTorch, a model does not accept tensors of tf.data.
        x = keras.tree.map_structure(
            lambda leaf: (
                as_array(leaf)
                if hasattr(leaf, "numpy") and not ops.is_tensor(leaf)
                else leaf
            ),
            x,
        )
        yield x, y, weight


def _flat(
    outputs: np.ndarray, labels: Any, sample_weight: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and weights, `(N,)`, for each row of the outputs."""
    leading = outputs.shape[:-1]
    refuse_masked("labels", labels)
    labels = as_rows("labels", labels)
    check_class_indices(labels)
    if labels.shape not in (leading, (*leading, 1)):
        raise ValueError(
            "`labels` must have one class for each output of the teacher, with "
            f"shape {leading}. Received: labels of shape {labels.shape}, "
            f"teacher outputs of shape {outputs.shape}"
        )
    if sample_weight is None:
        return labels.ravel(), np.ones(labels.size)
    expected = "finite numbers of at least 0"
    weights = as_floats("sample_weight", sample_weight, expected)
    if not np.isfinite(weights).all() or (weights < 0.0).any():
        fail("sample_weight", expected, sample_weight)
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
