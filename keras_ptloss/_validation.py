"""Checks of arguments. All their errors have the same form.

An error names the argument, says what was expected and shows the value:
``ValueError: `order` must be an integer of at least 1. Received: order=0``.
"""

from collections.abc import Collection, Sequence
from typing import Any, NoReturn

import keras
import numpy as np
import scipy.special
from keras import ops

from keras_ptloss._backend import as_array, visible_values
from keras_ptloss._math import two_events

Tensor = Any

# How far the sum of probabilities may be from one: more than rounding in
# bfloat16 (8 bits), and less than the sums of nearly all logits.
SUM_TOLERANCE = 1e-2

# Activations whose outputs are probabilities.
PROBABILITIES = ("softmax", "sparsemax", "sigmoid", "hard_sigmoid")


def fail(argument: str, expected: str, received: Any) -> NoReturn:
    """Raise the `ValueError` that all checks of the package raise."""
    refuse(argument, expected, f"{argument}={received!r}")


def refuse(argument: str, expected: str, received: str) -> NoReturn:
    """Raise the same error, with a description of the value in its place."""
    raise ValueError(f"`{argument}` must be {expected}. Received: {received}")


# Settings.


def check_choice(argument: str, value: Any, choices: Collection[str]) -> None:
    """Require `value` to be one of the strings in `choices`."""
    if value not in list(choices):
        listed = ", ".join(repr(choice) for choice in sorted(choices))
        fail(argument, f"one of {listed}", value)


def check_flag(argument: str, value: Any) -> bool:
    """Require a bool, because Python treats any non-empty string as true."""
    if not isinstance(value, (bool, np.bool_)):
        fail(argument, "True or False", value)
    return bool(value)


def check_count(argument: str, value: Any, *, at_least: int = 1) -> int:
    """Require an integer of at least `at_least`, and return it."""
    integer = isinstance(value, (int, np.integer))
    if not integer or isinstance(value, bool) or value < at_least:
        fail(argument, f"an integer of at least {at_least}", value)
    return int(value)


def check_ignore_class(ignore_class: Any) -> int | None:
    """Require an integer, of any sign, or None."""
    if ignore_class is None:
        return None
    integer = isinstance(ignore_class, (int, np.integer))
    if not integer or isinstance(ignore_class, bool):
        fail("ignore_class", "an integer, or None", ignore_class)
    return int(ignore_class)


def refuse_variable(argument: str, value: Any) -> None:
    """Raise a `ValueError` for a `keras.Variable` as a setting."""
    if isinstance(value, keras.Variable):
        fail(
            argument,
            "a number or an array. It is compiled into the training step, so "
            "a variable that changes later has no effect",
            value,
        )


def check_number(
    argument: str,
    value: Any,
    *,
    at_least: float = -np.inf,
    above: float = -np.inf,
    at_most: float = np.inf,
) -> float:
    """Require a finite number within the bounds, and return it."""
    refuse_variable(argument, value)
    array = as_floats(argument, value, "a number")
    inside = np.isfinite(array) & (array >= at_least) & (array <= at_most)
    if array.ndim or not inside or array <= above:
        bounds = {"above": above, "of at least": at_least, "at most": at_most}
        texts = [f"{k} {v:g}" for k, v in bounds.items() if np.isfinite(v)]
        fail(argument, f"a finite number {' and '.join(texts)}".strip(), value)
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
        max_rank: the highest rank allowed.
        classes: number of classes, if it is known.
        examples: number of examples, if it is known.

    Returns:
        A float64 NumPy array of rank 1 or more. Tensors and variables, which
        may be differentiated, are returned as tensors.
    """
    forms = "a number, (order,) or (classes, order)" + (
        " or (examples, classes, order)" if max_rank == 3 else ""
    )
    if isinstance(epsilon, keras.Variable) or ops.is_tensor(epsilon):
        values = ops.convert_to_tensor(epsilon)
        if not len(values.shape):
            values = ops.reshape(values, (1,))
    else:
        values = as_floats("epsilon", epsilon, f"numeric: {forms}")
        values = np.atleast_1d(values)
    seen = visible_values(values)
    if seen is not None and not np.all(np.isfinite(seen)):
        fail("epsilon", "finite", epsilon)
    shape = tuple(values.shape)
    if not 1 <= len(shape) <= max_rank or 0 in shape:
        fail("epsilon", f"of shape {forms}, none of them empty", epsilon)
    expected = (examples, classes, None)[-len(shape) :]
    if shapes_differ(shape, expected):
        raise ValueError(
            f"`epsilon` must have shape {expected}, where None is any number. "
            f"Received: epsilon of shape {shape}"
        )
    return values


def check_constant_epsilon(
    epsilon: Any, *, classes: int | None = None
) -> np.ndarray:
    """Require `(M,)` or `(C, M)` with known values; return an array."""
    values = check_epsilon(epsilon, max_rank=2, classes=classes)
    return as_array(values).astype("float64")


# Arrays and tensors.


def check_classes(
    first_name: str, first: Tensor, second_name: str, second: Tensor
) -> None:
    """Require two tensors `(..., C)` of the same shape, as far as known."""
    one, two = tuple(first.shape), tuple(second.shape)
    if not shapes_differ(one, two):
        return
    same = "shape"
    if shapes_differ(one[-1:], two[-1:]):
        same = "number of classes on their last axis"
    raise ValueError(
        f"`{first_name}` and `{second_name}` must have the same {same}. "
        f"Received: {first_name} of shape {one}, {second_name} of shape {two}"
    )


def shapes_differ(one: Sequence[int | None], two: Sequence[int | None]) -> bool:
    """Return whether two shapes differ; None (unknown) equals any size."""
    return len(one) != len(two) or any(
        None not in (a, b) and a != b for a, b in zip(one, two, strict=True)
    )


def on_simplex(rows: np.ndarray) -> np.ndarray:
    """Return which rows of `(N, C)` are probabilities, `(N,)`."""
    near_one = np.abs(rows.sum(axis=-1) - 1) <= SUM_TOLERANCE
    return np.all(rows >= 0, axis=-1) & near_one


def valid_probs(argument: str, probs: Tensor, advice: str) -> Tensor:
    """Return probabilities `(..., C)` divided by their sums over the classes.

    A row of zeros is returned unchanged. An invalid row raises an error. In
    compiled functions, where values cannot be checked, it becomes NaN.

    Args:
        argument: name of the argument, for the error.
        probs: `(..., C)`, in float32 or better.
        advice: what to do if these are logits.
    """
    total = ops.sum(probs, axis=-1, keepdims=True)
    lowest = ops.min(probs, axis=-1, keepdims=True)
    valid = (lowest >= 0.0) & (ops.abs(total - 1.0) <= SUM_TOLERANCE)
    padding = (lowest == 0.0) & (total == 0.0)
    seen = visible_values(probs)
    if seen is not None:
        good = ops.convert_to_numpy(valid | padding)
        _refuse_invalid(argument, seen, good, advice)
    divisor = ops.where(valid, total, ops.where(padding, 1.0, float("nan")))
    return probs / divisor


def _refuse_invalid(
    argument: str, rows: np.ndarray, valid: np.ndarray, advice: str
) -> None:
    """If any row is invalid, raise a `ValueError` that names the first one."""
    if valid.all():
        return
    rows, valid = rows.reshape(-1, rows.shape[-1]), valid.reshape(-1)
    row = int(np.argmin(valid))
    shown = np.array2string(rows[row], precision=4, threshold=6)
    if on_simplex(rows / 100.0).all():
        advice = "These are percentages: divide them by 100"
    else:
        advice = f"If these are logits, {advice}"
    raise ValueError(
        f"`{argument}` must hold probabilities: non-negative rows that sum to "
        f"1. {advice}. Received: {argument}[{row}]="
        f"{shown}, which sums to {rows[row].sum():.4g} "
        f"({np.count_nonzero(~valid)} of {len(valid)} rows are invalid)"
    )


def check_class_indices(labels: np.ndarray) -> None:
    """Require integers, of any shape."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            "`labels` must be integers (class indices, not one-hot rows or "
            f"scores). Received: labels of dtype {labels.dtype}"
        )


def check_label_range(labels: np.ndarray, classes: int, whose: str) -> None:
    """Require class indices `(N,)` below C; `whose` explains the range."""
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        index = int(np.argmax(outside))
        raise ValueError(
            f"`labels` must be in [0, {classes}), {whose}. "
            f"Received: labels[{index}]={labels[index]}"
        )


def as_rows(argument: str, value: Any) -> np.ndarray:
    """Convert a list, array or tensor to a NumPy array.

    NumPy has no bfloat16, so bfloat16 becomes float32.
    """
    try:
        array = as_array(value)
    except ValueError:
        raise ValueError(
            f"`{argument}` must have rows of the same length. Received: "
            f"{argument}, a {type(value).__name__} of {len(value)} rows that "
            "differ in length"
        ) from None
    half = array.dtype.name == "bfloat16"
    return array.astype("float32") if half else array


def as_floats(argument: str, value: Any, expected: str) -> np.ndarray:
    """Require real numbers; return them as a new float64 array."""
    try:
        array = as_array(value)
        if array.dtype.kind not in "cUSmM":  # NumPy would convert these.
            return np.array(array, dtype="float64")
    except (TypeError, ValueError):
        pass
    fail(argument, expected, value)


def as_probabilities(
    argument: str, outputs: Any, from_logits: bool, advice: str
) -> np.ndarray:
    """Return one teacher's outputs as probabilities `(..., C)`, float64.

    Errors name the `argument`, and contain `advice` for users who passed logits
    as probabilities.
    """
    refuse_masked(argument, outputs)
    expected = "numbers of shape (..., num_classes), not empty"
    array = as_floats(argument, outputs, expected)
    if not array.ndim or not array.size:
        fail(argument, expected, outputs)
    array = two_events(array, from_logits=from_logits)
    missing = np.isnan(array).any(axis=-1)
    if missing.any():
        raise ValueError(
            f"`{argument}` must not contain NaN. Leave examples without an "
            "answer out of all teachers and the labels. Received: NaN "
            f"in {np.count_nonzero(missing)} of {missing.size} rows, the first "
            f"at index {int(np.argmax(missing))}"
        )
    if from_logits:
        if np.isinf(array).any():
            fail(argument, "finite logits", array)
        if array.size > array.shape[-1] and on_simplex(array).all():
            raise ValueError(
                f"`from_logits` must be False for probabilities: all rows of "
                f"`{argument}` are non-negative and sum to 1. Received: "
                f"from_logits=True, {argument}[0]={array[0]}"
            )
        return np.asarray(scipy.special.softmax(array, axis=-1))
    _refuse_invalid(argument, array, on_simplex(array), advice)
    return np.asarray(array / array.sum(axis=-1, keepdims=True))


def refuse_masked(argument: str, values: Any) -> None:
    """Raise a `ValueError` for a masked array, whose mask NumPy would drop."""
    if isinstance(values, np.ma.MaskedArray):
        raise ValueError(
            f"`{argument}` must not be a masked array. Remove the masked rows "
            "from both labels and teacher outputs. Received: a masked array "
            f"of shape {values.shape}"
        )


# Models.


def one_flag_each(
    from_logits: Any, teachers: int, argument: str = "from_logits"
) -> tuple[Any, ...]:
    """Return one flag per teacher: True, False or None."""
    flags = from_logits
    if not isinstance(flags, (list, tuple)):
        flags = (flags,) * teachers
    if len(flags) != teachers:
        fail(argument, "one flag, or one for each teacher", from_logits)
    return tuple(
        flag if flag is None else check_flag(argument, flag) for flag in flags
    )


def one_tensor(argument: str, outputs: Any) -> Any:
    """Require that a model has a single output, and return it."""
    if isinstance(outputs, (list, tuple, dict)):
        raise ValueError(
            f"`{argument}` must return a single tensor, (..., classes). Choose "
            "one output with keras.Model(model.inputs, model.outputs[0]). "
            f"Received: outputs in a {type(outputs).__name__} of {len(outputs)}"
        )
    return outputs


def last_layer(model: Any) -> tuple[str | None, int | None, bool | None]:
    """Return what a model's last layer shows about its outputs.

    Returns:
        The name of the activation, if it is one of Keras's; the number of
        outputs; and whether they are logits. Unknown values are None.
    """
    layer = model
    while isinstance(layer, keras.Model):
        if isinstance(layer, keras.Sequential):
            layer = layer.layers[-1] if layer.layers else None
        else:
            # The output may also come from an operation, not a layer.
            names = list(getattr(layer, "output_names", []))
            layers = {each.name: each for each in layer.layers}
            layer = layers.get(names[0]) if len(names) == 1 else None
    columns = getattr(layer, "units", None)
    if columns is None and isinstance(model, keras.Model) and model.built:
        columns = getattr(model, "output_shape", [None])[-1]
    # Layers such as Softmax and ReLU have no attribute `activation`.
    activation = getattr(layer, "activation", None)
    name = getattr(activation, "__name__", type(layer).__name__.lower())
    if name == "linear":
        layers = keras.layers
        dense = (layers.Dense, layers.EinsumDense, layers.Conv1D, layers.Conv2D)
        return None, columns, isinstance(layer, dense) or None
    name = name if name in dir(keras.activations) else None
    return name, columns, False if name in PROBABILITIES else None


def check_head(
    argument: str, model: keras.Model, from_logits: bool | None, flag: str
) -> bool | None:
    """Check a model's last layer; return whether the model gives logits.

    Returns None if the last layer does not show this. Raises a `ValueError` if
    the outputs are not a distribution over classes, or if the layer contradicts
    `from_logits`. In the error, `from_logits` is called `flag`.
    """
    name, columns, shown = last_layer(model)
    received = f"Received: {argument}={model.name!r}, {flag}={from_logits}"
    if name in ("sigmoid", "hard_sigmoid") and columns not in (1, None):
        raise ValueError(
            f"`{argument}` must output a probability distribution over "
            f"mutually exclusive classes, but it ends in {columns} independent "
            "sigmoids. To distil a multi-label teacher like this, fit the "
            "student on the teacher's outputs with "
            f"keras.losses.BinaryCrossentropy(). {received}"
        )
    if shown is not None and from_logits is not None and shown != from_logits:
        raise ValueError(
            f"`{flag}` must be {shown}, because the last layer of `{argument}` "
            f"gives {'logits' if shown else 'probabilities'}. {received}"
        )
    if shown is None and name is not None and not from_logits:
        raise ValueError(
            f"`{argument}` must give probabilities or logits, but {name} does "
            "not give probabilities. End the model with a softmax or with a "
            f"dense layer without activation, or set {flag}=True if the "
            f"outputs are logits. {received}"
        )
    return shown
