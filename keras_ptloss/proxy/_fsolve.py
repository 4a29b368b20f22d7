"""The paper's solver (Appendix A.3): SciPy's `fsolve`, row by row."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special

from keras_ptloss._perturbation import curvature, slope
from keras_ptloss.proxy._newton import Solution
from keras_ptloss.proxy._stationarity import numpy_judge


def solve_fsolve(
    teacher: np.ndarray,
    epsilon: np.ndarray,
    *,
    tolerance: float,
    max_steps: int,
    fix_gauge: bool = True,
) -> Solution:
    """Solve row by row with SciPy's `fsolve`, as the paper's Appendix A.3 does.

    The unknowns are the logits `z`, from `log t`; the equations are the loss's
    gradient with respect to them, with its Jacobian in closed form:

        F(z) = q sum(w) - w,    q = softmax(z)

    Softmax does not feel a shift, so that the Jacobian in all C logits, as
    published, is singular. With `fix_gauge` the logit of the teacher's largest
    class is held at its start and its equation dropped.

    Args:
        teacher: `(N, C)`.
        epsilon: `(M,)` or `(C, M)`.
        tolerance: a hundredth of it is fsolve's `xtol`.
        max_steps: most function calls a row.
        fix_gauge: False is the published form.

    Returns:
        A `Solution` of `(N, C)`, `(N,)`, `(N,)`, `(N,)`.
    """
    coefficients = np.moveaxis(epsilon, -1, 0)
    terms, xtol = list(coefficients), 0.01 * tolerance
    rows = [_fsolve_row(t, terms, xtol, max_steps, fix_gauge) for t in teacher]
    solved = np.stack([q for q, _ in rows])
    steps = np.array([count for _, count in rows], dtype="int32")
    loss, residual = numpy_judge(teacher, solved, coefficients)
    return Solution(solved, loss, residual, steps)


def _fsolve_row(
    t: np.ndarray,
    coefficients: Sequence[Any],
    xtol: float,
    max_steps: int,
    fix_gauge: bool,
) -> tuple[np.ndarray, int]:
    """Return one row's solution, `(C,)`, and its evaluations."""
    start = np.log(np.maximum(t, np.finfo("float64").tiny))
    free = np.ones(len(t), dtype=bool)
    if fix_gauge:
        free[np.argmax(t)] = False

    def logits(x: np.ndarray) -> np.ndarray:
        z = start.copy()
        z[free] = x
        return z

    def equations(x: np.ndarray) -> np.ndarray:
        return _logit_equations(logits(x), t, coefficients)[0][free]

    def jacobian(x: np.ndarray) -> np.ndarray:
        whole = _logit_equations(logits(x), t, coefficients)[1]
        return whole[np.ix_(free, free)]

    with warnings.catch_warnings():
        # Judged by residual and loss, not by fsolve's own word.
        warnings.simplefilter("ignore", RuntimeWarning)
        x, info, _, _ = scipy.optimize.fsolve(
            equations,
            start[free],
            fprime=jacobian,
            xtol=max(xtol, 1e-14),
            maxfev=max_steps,
            full_output=True,
        )
    q = scipy.special.softmax(logits(x))
    steps = int(info["nfev"] + info["njev"])
    return (q if np.all(np.isfinite(q)) else t), steps


def _logit_equations(
    z: np.ndarray, t: np.ndarray, coefficients: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss's gradient on the logits, and its Jacobian `(C, C)`."""
    q = scipy.special.softmax(z)
    s = 1.0 - q
    h = slope(s, coefficients)
    w = t * (1.0 + q * h)
    dw = t * (h - q * curvature(s, coefficients))
    total = w.sum()
    by_q = np.diag(total - dw) + np.outer(q, dw)
    # Times dq/dz = diag(q) - q q^T, in O(C^2).
    return q * total - w, by_q * q - np.outer(by_q @ q, q)
