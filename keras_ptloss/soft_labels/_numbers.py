"""The numbers of imported rows: what counts as one, and their range."""

import math
from typing import Any

import numpy as np

# Decimals cut by the exporting tool change a number by less than this.
ROUNDING = 1e-3


class RowProblem(Exception):
    """What is wrong with a row; its reader adds where the row stands."""


def number(value: Any) -> float:
    """Require a JSON number; NaN is none, since null means missing."""
    # Not isinstance: True and False are integers to Python.
    if type(value) not in (int, float) or value != value:
        raise RowProblem(f"has {value!r}, not a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def parse(cell: str) -> float:
    """Read the number in a CSV file's cell; an empty one gives NaN."""
    if not cell.strip():
        return math.nan
    try:
        return number(float(cell))
    except (ValueError, RowProblem):
        raise RowProblem(f"has {cell!r}, not a number") from None


def probability(logprob: float) -> float:
    """Check the range of a log-probability, and undo the logarithm."""
    if logprob > ROUNDING:
        raise RowProblem(f"has a log-probability of {logprob:.6g}, above 0")
    return math.exp(logprob)


def probabilities(values: Any, *, log: bool) -> Any:
    """Check the range of numbers, NaN excepted, and undo the logarithm."""
    values = np.asarray(values, "float64")
    if log:
        if values.size:
            probability(np.fmax.reduce(values))
        return np.exp(values)
    wrong = (values < 0) | (values > 1 + ROUNDING)
    if wrong.any():
        bad = values[wrong][0]
        hint = ' (or is it values="log_probabilities"?)' if bad < 0 else ""
        raise RowProblem(f"has a probability of {bad:.6g}{hint}")
    return values
