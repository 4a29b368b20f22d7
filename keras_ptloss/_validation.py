"""Argument errors, in one wording.

Every check names the argument, says what was expected and shows what came:
``ValueError: `order` must be an integer of at least 1. Received: order=0``.
"""

import warnings
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

import keras
import numpy as np
from keras import ops

from keras_ptloss._backend import as_array, visible_values

Tensor = Any

# How far a row of probabilities may be from summing to one: rounding in
# bfloat16 (8 bits) stays below it, a row of logits hardly ever does.
SUM_TOLERANCE = 1e-2


def fail(argument: str, expected: str, received: Any) -> NoReturn:
    """Raise the `ValueError` that all checks of the package raise."""
    raise ValueError(
        f"`{argument}` must be {expected}. Received: {argument}={received!r}"
    )


def check_choice(argument: str, value: Any, choices: Collection[str]) -> None:
    """Require `value` to be one of the strings in `choices`."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in sorted(choices))
        fail(argument, f"one of {listed}", value)


def check_flag(argument: str, value: Any) -> bool:
    """Require True or False: a string would be True, whatever it says."""
    if not isinstance(value, (bool, np.bool_)):
        fail(argument, "True or False", value)
    return bool(value)


def check_count(argument: str, value: Any, *, at_least: int = 1) -> int:
    """Require an integer of at least `at_least`, and return it."""
    integral = isinstance(value, (int, np.integer)) and not isinstance(
        value, bool
    )
    if not integral or value < at_least:
        fail(argument, f"an integer of at least {at_least}", value)
    return int(value)


def check_real(argument: str, value: Any, expected: str) -> float:
    """Require one real number, which a text or a flag is not; return it."""
    known = (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, known):
        fail(argument, expected, value)
    try:
        return float(value)
    except OverflowError:
        fail(argument, expected, value)


def check_ignore_class(ignore_class: Any) -> int | None:
    """Require an integer, of any sign, or None."""
    if ignore_class is None:
        return None
    integral = isinstance(ignore_class, (int, np.integer))
    if not integral or isinstance(ignore_class, bool):
        fail("ignore_class", "an integer, or None", ignore_class)
    return int(ignore_class)


def check_number(argument: str, value: Any, *, at_least: float) -> float:
    """Require a finite number of at least `at_least`, and return it."""
    array = as_floats(argument, value, "a number")
    if array.ndim or not np.isfinite(array) or array < at_least:
        fail(argument, f"a finite number of at least {at_least}", value)
    return float(array)


def check_epsilon(
    epsilon: Any,
    *,
    max_rank: int,
    classes: int | None = None,
    examples: int | None = None,
) -> Any:
    """Require coefficients `(M,)`, `(C, M)` or, at rank 3, `(N, C, M)`.

    Args:
        epsilon: a number (order 1), an array or a tensor.
        max_rank: the highest rank taken.
        classes: the model's class count, where it is known.
        examples: the batch size, where it is known.

    Returns:
        A float64 NumPy array of rank 1 or more; a tensor where a tensor or a
        variable was given.
    """
    forms = "a number, (order,) or (classes, order)" + (
        " or (examples, classes, order)" if max_rank == 3 else ""
    )
    if isinstance(epsilon, keras.Variable) or ops.is_tensor(epsilon):
        # Stays a tensor: it may be differentiated.
        values = ops.convert_to_tensor(epsilon)
        if not len(values.shape):
            values = ops.reshape(values, (1,))
        seen = visible_values(values)
    else:
        values = as_floats("epsilon", epsilon, f"numbers of shape {forms}")
        values = seen = np.atleast_1d(values)
    if seen is not None and not np.all(np.isfinite(seen)):
        fail("epsilon", "finite", epsilon)
    shape = tuple(values.shape)
    if not 1 <= len(shape) <= max_rank or 0 in shape:
        fail("epsilon", f"of shape {forms}, none of them empty", epsilon)
    if classes is not None and len(shape) > 1 and shape[-2] != classes:
        raise ValueError(
            f"`epsilon` must have one row per class, (..., {classes}, order). "
            f"Received: epsilon of shape {shape} with {classes} classes"
        )
    if examples is not None and len(shape) == 3 and shape[0] != examples:
        raise ValueError(
            f"`epsilon` must have one entry per example, ({examples}, classes, "
            f"order). Received: epsilon of shape {shape} with {examples} "
            "examples"
        )
    return values


def check_constant_epsilon(
    epsilon: Any, *, classes: int | None = None
) -> np.ndarray:
    """Require `(M,)` or `(C, M)` whose values are known; return an array."""
    values = check_epsilon(epsilon, max_rank=2, classes=classes)
    return as_array(values).astype("float64")


def check_class_axis(argument: str, rows: Tensor) -> None:
    """Require a tensor with a class axis, `(..., C)`."""
    if len(rows.shape) == 0:
        raise ValueError(
            f"`{argument}` must have a class axis, (..., classes). Received: "
            f"{argument} of shape {tuple(rows.shape)}"
        )


def check_classes(
    first_name: str, first: Tensor, second_name: str, second: Tensor
) -> None:
    """Require two tensors `(..., C)` of the same shape, as far as is known."""
    check_class_axis(first_name, first)
    check_class_axis(second_name, second)
    one, two = tuple(first.shape), tuple(second.shape)
    received = (
        f"Received: {first_name} of shape {one}, {second_name} of shape {two}"
    )
    if differ(one[-1], two[-1]):
        raise ValueError(
            f"`{first_name}` and `{second_name}` must have the same number of "
            f"classes on their last axis. {received}"
        )
    if shapes_differ(one, two):
        raise ValueError(
            f"`{first_name}` and `{second_name}` must have the same shape. "
            f"{received}"
        )


def differ(one: int | None, two: int | None) -> bool:
    """Return whether two sizes differ; an unknown one, None, fits any."""
    return one is not None and two is not None and one != two


def shapes_differ(one: Sequence[int | None], two: Sequence[int | None]) -> bool:
    """Return whether two shapes differ; an unknown size, None, fits any."""
    return len(one) != len(two) or any(map(differ, one, two))


def on_simplex(rows: np.ndarray) -> np.ndarray:
    """Return which rows `(N, C)` are probabilities, `(N,)`; NaN is not."""
    near_one = np.abs(rows.sum(axis=-1) - 1) <= SUM_TOLERANCE
    return np.all(rows >= 0, axis=-1) & near_one


def check_probabilities(argument: str, rows: Tensor, if_logits: str) -> None:
    """Require rows on the simplex, where their values can be seen.

    Args:
        argument: name of the argument.
        rows: `(..., C)`.
        if_logits: what to do if these are logits after all: "say X=True".
    """
    values = visible_values(rows)
    if values is None or not values.size:
        return
    values = values.astype("float64").reshape(-1, values.shape[-1])
    good = on_simplex(values)
    if not good.all():
        row = int(np.argmin(good))
        shown = np.array2string(values[row], precision=4, threshold=6)
        raise ValueError(
            f"`{argument}` must hold probabilities: non-negative rows that sum "
            f"to 1. If these are logits, {if_logits}. Received: "
            f"{argument}[{row}]={shown}, which sums to {values[row].sum():.4g} "
            f"({np.count_nonzero(~good)} of {len(good)} rows are bad)"
        )


def valid_probs(argument: str, probs: Tensor, advice: str) -> Tensor:
    """Return rows `(..., C)` divided by their sums; NaN for invalid rows.

    A row of zeros stays. Where values can be seen, invalid rows are an error.

    Args:
        argument: name of the argument, for the error.
        probs: `(..., C)`, in float32 or better.
        advice: what to do if these are logits.
    """
    total = ops.sum(probs, axis=-1, keepdims=True)
    lowest = ops.min(probs, axis=-1, keepdims=True)
    valid = (lowest >= 0.0) & (ops.abs(total - 1.0) <= SUM_TOLERANCE)
    padding = (lowest == 0.0) & (total == 0.0)
    if visible_values(probs) is not None:
        seen = ops.convert_to_numpy(valid | padding)
        if not seen.all():
            _raise_invalid(argument, probs, seen, advice)
    divisor = ops.where(valid, total, ops.where(padding, 1.0, float("nan")))
    return probs / divisor


def _raise_invalid(
    argument: str, probs: Tensor, valid: np.ndarray, advice: str
) -> None:
    rows = ops.convert_to_numpy(probs).reshape(-1, probs.shape[-1])
    row = int(np.argmin(valid))
    shown = np.array2string(rows[row], precision=4, threshold=6)
    raise ValueError(
        f"`{argument}` must hold probabilities: each row non-negative with sum "
        f"1, or all zeros for padding. If these are logits, {advice}. "
        f"Received: {argument}[{row}]={shown}, which sums to "
        f"{rows[row].sum():.4g} ({np.count_nonzero(~valid)} of {valid.size} "
        "rows are invalid)"
    )


def check_output_form(
    argument: str,
    model: keras.Model,
    from_logits: bool,
    flag: str,
    *,
    stacklevel: int = 3,
) -> None:
    """Compare a model's last activation with what is said of its outputs.

    Under `fit` the values are not seen; the model's last layer often is.

    Args:
        argument: name of the argument that is the model.
        model: a Keras model, built or not.
        from_logits: whether its outputs are said to be logits.
        flag: name of the argument that says so.
        stacklevel: of the warning; 3 is the caller's caller.

    Raises:
        ValueError: if it ends in a softmax, or in one sigmoid output, and
            logits are promised.

    Warns:
        UserWarning: if it ends in a linear dense layer, and probabilities are.
    """
    layer = _output_layer(model)
    activation = getattr(layer, "activation", None)
    if isinstance(layer, keras.layers.Softmax):
        activation = keras.activations.softmax
    one_output = getattr(layer, "units", None) == 1
    if from_logits and (
        activation is keras.activations.softmax
        or (activation is keras.activations.sigmoid and one_output)
    ):
        raise ValueError(
            f"`{flag}` must be False for a model that ends in a "
            f"{activation.__name__}, which gives probabilities. Received: "
            f"{flag}=True, with {argument}={model.name!r}"
        )
    linear = isinstance(layer, keras.layers.Dense) and (
        activation is keras.activations.linear
    )
    if linear and not from_logits:
        warnings.warn(
            f"`{argument}` {model.name!r} ends in a dense layer without an "
            "activation. Its outputs are taken as probabilities, but are "
            f"probably logits. If they are, say {flag}=True.",
            stacklevel=stacklevel,
        )


def _output_layer(model: Any) -> Any:
    """Return the layer of a model's only output, or None where unknown."""
    while isinstance(model, keras.Model):
        if isinstance(model, keras.Sequential):
            model = model.layers[-1] if model.layers else None
            continue
        names = getattr(model, "output_names", None)
        if not names or len(names) != 1:
            return None
        try:
            model = model.get_layer(names[0])
        except ValueError:
            return None  # an operation, which is no layer
    return model


def check_class_indices(labels: np.ndarray) -> None:
    """Require integers, of any shape."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            "`labels` must be integers (class indices, not one-hot rows or "
            f"scores). Received: labels of dtype {labels.dtype}"
        )


def check_examples(argument: str, value: Any) -> None:
    """Require what may hold inputs: no text, no number and not None."""
    if value is None or np.isscalar(value):
        fail(argument, "arrays of examples", value)


def check_labels(labels: Any, *, examples: int, classes: int) -> np.ndarray:
    """Require one integer class an example; return an int64 array."""
    array = as_array(labels)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            "`labels` must be a non-empty vector, one class per example. "
            f"Received: labels of shape {array.shape}"
        )
    check_class_indices(array)
    if len(array) != examples:
        raise ValueError(
            "`labels` must have one entry for each of the teacher's rows, "
            f"{examples}. Received: labels of length {len(array)}"
        )
    check_label_range(array, classes, "the teacher's classes")
    return array.astype("int64")


def check_label_range(labels: np.ndarray, classes: int, whose: str) -> None:
    """Require class indices `(N,)` below C; `whose` classes, for the error."""
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        index = int(np.argmax(outside))
        raise ValueError(
            f"`labels` must be in [0, {classes}), {whose}. "
            f"Received: labels[{index}]={labels[index]}"
        )


def one_tensor(argument: str, outputs: Any) -> Any:
    """Require what a model of one output gives: one tensor, not several."""
    if isinstance(outputs, (list, tuple, dict)):
        raise ValueError(
            f"`{argument}` must give one tensor, (..., classes); choose one by "
            "keras.Model(model.inputs, model.outputs[0]). Received: outputs in "
            f"a {type(outputs).__name__} of {len(outputs)}"
        )
    return outputs


def output_shape(argument: str, model: keras.Model) -> tuple[Any, ...] | None:
    """Return the shape of a model's one output; None until it is built."""
    try:
        shape = model.output_shape
    except (AttributeError, ValueError):
        return None
    if not isinstance(shape, tuple) or isinstance(shape[-1], tuple):
        one_tensor(argument, shape)
    return tuple(shape)


def as_rows(argument: str, value: Any) -> np.ndarray:
    """Return an array of a list, an array or a tensor; its rows are alike.

    bfloat16, which NumPy does not count among the floats, becomes float32.
    """
    try:
        array = as_array(value)
        half = array.dtype.name == "bfloat16"
        return array.astype("float32") if half else array
    except ValueError:
        raise ValueError(
            f"`{argument}` must have rows of the same length. Received: "
            f"{argument}, a {type(value).__name__} of {len(value)} that differ"
        ) from None


def as_floats(argument: str, value: Any, expected: str) -> np.ndarray:
    """Require real numbers; return them as a float64 array of its own."""
    try:
        array = as_array(value)
        if array.dtype.kind not in "cUSmM":  # NumPy would convert these
            return np.array(array, dtype="float64")
    except (TypeError, ValueError):
        pass
    fail(argument, expected, value)
