"""The teacher asked for a batch, and its answer checked before it is stored."""

from collections.abc import Callable
from typing import Any

import numpy as np

from keras_ptloss._binary import two_events
from keras_ptloss._checks import SUM_TOLERANCE, as_rows
from keras_ptloss.soft_labels._data import length
from keras_ptloss.soft_labels._writer import ShardWriter

Tensor = Any


def ask(
    run: Callable[[Tensor], Tensor], x: Tensor, row: int, writer: ShardWriter
) -> Any:
    """Call the teacher and check what it returns.

    Args:
        run: The teacher.
        x: A batch of inputs.
        row: Position of its first example in the data set.
        writer: What its answer is for.

    Returns:
        `(batch, C)` float64, C at least 2.

    Raises:
        RuntimeError: If the teacher raises.
        ValueError: If what it returns cannot be stored.
    """
    count, from_logits = length(x), writer.spec.from_logits
    where = (
        f"on the examples {row} to {row + count - 1}. The {writer.stored} rows"
        " before are stored: call again to go on"
    )
    try:
        outputs = as_rows("teacher", run(x))
    except Exception as error:
        raise RuntimeError(
            f"The teacher failed {where}: {type(error).__name__}: {error}"
        ) from error
    problem = _problem(outputs, count, writer.num_classes)
    if problem is None:
        rows = two_events(outputs.astype("float64"), from_logits=from_logits)
        found = invalid_row(rows, from_logits)
        if found is None:
            return rows
        problem = f"{found[1]} for example {row + found[0]}"
    raise ValueError(f"The teacher returned {problem}, {where}")


def _problem(outputs: Any, count: int, num_classes: int | None) -> str | None:
    """Say what is wrong with the form of the outputs; None if nothing is."""
    columns = num_classes or "2 or more"
    if outputs.ndim != 2 or len(outputs) != count or not outputs.shape[1]:
        return f"shape {outputs.shape}, not ({count}, {columns})"
    # One column is a binary head, two classes.
    classes = max(outputs.shape[1], 2)
    if num_classes not in (None, classes):
        return f"{classes} classes, not {columns}"
    if outputs.dtype.kind not in "biuf":
        return f"dtype {outputs.dtype}, not numbers"
    return None


def invalid_row(outputs: Any, from_logits: bool) -> tuple[int, str] | None:
    """Position and description of the first row that cannot be stored."""
    checks = [(~np.isfinite(outputs), "NaN or infinity")]
    if not from_logits:
        off = np.abs(outputs.sum(-1, keepdims=True) - 1) > SUM_TOLERANCE
        hint = " (are they logits? Then spec=SoftLabelSpec(from_logits=True))"
        checks += [
            (outputs < 0, "negative probabilities" + hint),
            (off, "probabilities that do not add up to 1" + hint),
        ]
    for wrong, what in checks:
        if wrong.any():
            return int(np.argmax(wrong.any(-1))), what
    return None
