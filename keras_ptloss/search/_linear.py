"""Calibration alone: temperature, vector and matrix scaling.

    q = softmax(A z + b),    A = s I + u D

First `s`, the inverse temperature; then `D` (its diagonal alone for
`"vector"`) and `b`, drawn to zero by a ridge:

    ridge = penalty C / N (sum_c D_cc^2 + b_c^2
                           + (C - 1) sum_{c != k} D_ck^2)

It is that of structured matrix scaling (Berta et al. 2025,
https://arxiv.org/abs/2511.03685) at `penalty = 1`: a prior whose weight beside
N examples falls as 1 / N, of a width that falls with the classes as the
examples of a class do, and stronger off the diagonal, of which there are C - 1
times as many. `u` is `s`, as there, unless the best temperature makes the
teacher all but uniform: then it is what gives `u z` a spread of 1 within the
rows, so that a teacher that is consistently wrong can be turned round.

The negative log-likelihood of `q` is convex in `D` and `b`, and
no proxy teacher has to be solved for.
"""

import dataclasses

import numpy as np
import scipy.optimize

from keras_ptloss._calibration import Calibration
from keras_ptloss.search._objectives import OBJECTIVES, Objective, one_hot

# Inverse temperatures that are searched: temperatures from 1/20 to 50.
SCALES = (0.02, 20.0)

MAX_ITERATIONS = 200


def bounds_of_scale(calibration: str) -> tuple[float, float]:
    """Return the bounds of `s`; a class's own has no upper one."""
    return SCALES if calibration == "temperature" else (SCALES[0], np.inf)


@dataclasses.dataclass(frozen=True, eq=False)
class LinearFit:
    """A fitted calibration.

    Attributes:
        calibration: `A` and `b`.
        parameters: `D` and `b` in one vector, to start another fit from.
    """

    calibration: Calibration
    parameters: np.ndarray


def fit_temperature(
    logits: np.ndarray, targets: np.ndarray, objective: Objective
) -> float:
    """Return the inverse temperature `s` at which `softmax(s z)` is best.

    Where the teacher is right on every row, that is as sharp as can be,
    whatever the next row says: then it is left as it is.
    """
    if all_right(logits, targets):
        return 1.0
    low, high = np.log(SCALES)

    def score(log_scale: float) -> float:
        return objective_of_logits(
            np.exp(log_scale) * logits, targets, objective
        )[0]

    # Objectives may have several minima: the best of a grid, then Brent.
    grid = np.linspace(low, high, 29)
    best = int(np.argmin([score(point) for point in grid]))
    found = scipy.optimize.minimize_scalar(
        score,
        bounds=(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]),
        method="bounded",
        options={"xatol": 1e-7},
    )
    # As it is, unless another temperature is better.
    return float(np.exp(found.x)) if found.fun < score(0.0) else 1.0


def all_right(logits: np.ndarray, targets: np.ndarray) -> bool:
    """Return whether every row has its label for its largest logit."""
    if targets.ndim > 1:
        return False
    rows = np.arange(len(targets))
    return bool(np.all(logits[rows, targets] >= logits.max(axis=1)))


def fit_linear(
    logits: np.ndarray,
    targets: np.ndarray,
    objective: Objective,
    *,
    calibration: str,
    penalty: float,
    scale: float,
    begin: np.ndarray | None = None,
) -> LinearFit:
    """Fit `D` and `b` by SciPy's L-BFGS-B.

    Args:
        logits: `z`, `(N, C)`.
        targets: labels, `(N,)`, or rows, `(N, C)`.
        objective: what is minimised, plus the ridge.
        calibration: `"vector"` or `"matrix"`.
        penalty: weight of the ridge, at least 0.
        scale: `s`, from `fit_temperature`.
        begin: parameters to start from; None is the temperature alone.

    Returns:
        A `LinearFit`.
    """
    examples, classes = logits.shape
    spread = float(np.mean(np.std(logits, axis=1)))
    unit = max(scale, 1.0 / spread) if spread else scale
    # Columns in one piece: sums over a row's classes then add whole columns.
    logits = np.asfortranarray(logits)
    if objective is OBJECTIVES["nll"]:
        targets = np.asfortranarray(one_hot(logits, targets))
    fixed, x = scale * logits, unit * logits
    matrix = calibration == "matrix"
    shape = (classes, classes) if matrix else (classes,)
    weight = penalty * classes / examples
    ridge = np.full(shape, weight)
    if matrix:
        ridge[~np.eye(classes, dtype=bool)] *= classes - 1
    size = int(np.prod(shape))

    def unpack(vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return vector[:size].reshape(shape), vector[size:]

    def function(vector: np.ndarray) -> tuple[float, np.ndarray]:
        d, b = unpack(vector)
        moved = fixed + ((d @ x.T).T if matrix else x * d) + b
        value, slope = objective_of_logits(moved, targets, objective)
        by_d = slope.T @ x if matrix else np.einsum("nc,nc->c", slope, x)
        value += float(np.sum(ridge * d * d) + weight * b @ b)
        by_b = slope.sum(axis=0) + 2.0 * weight * b
        return value, np.concatenate([(by_d + 2.0 * ridge * d).ravel(), by_b])

    # A class's own scale stays positive: a matrix may turn classes round.
    lowest = None if matrix else (SCALES[0] - scale) / unit
    found = scipy.optimize.minimize(
        function,
        np.zeros(size + classes) if begin is None else begin,
        jac=True,
        method="L-BFGS-B",
        bounds=[(lowest, None)] * size + [(None, None)] * classes,
        options={"maxiter": MAX_ITERATIONS, "ftol": 1e-9, "gtol": 1e-6},
    )
    d, b = unpack(found.x)
    a = (scale * np.eye(classes) if matrix else scale) + unit * d
    return LinearFit(Calibration(a, b), found.x)


def objective_of_logits(
    logits: np.ndarray, targets: np.ndarray, objective: Objective
) -> tuple[float, np.ndarray]:
    """Return the objective of `softmax(logits)` and its slope, `(N, C)`.

    The negative log-likelihood is taken from the logits themselves, where it
    is convex, and has no floor.
    """
    shifted = logits - logits.max(axis=1, keepdims=True)
    q = np.exp(shifted)
    total = q.sum(axis=1, keepdims=True)
    q /= total
    if objective is OBJECTIVES["nll"]:
        rows = one_hot(q, targets)
        log_q = shifted - np.log(total)
        value = -float(np.einsum("nc,nc->", rows, log_q)) / len(q)
        return value, (q - rows) / len(q)
    value, by_q = objective.evaluate(q, targets)
    slope = q * (by_q - np.sum(q * by_q, axis=1, keepdims=True))
    return float(value), slope
