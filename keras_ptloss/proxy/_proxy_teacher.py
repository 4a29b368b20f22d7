"""Proxy teachers of NumPy arrays: the public function and its result."""

import dataclasses
import time
from typing import Any

import numpy as np

from keras_ptloss._backend import as_array
from keras_ptloss._binary import two_events
from keras_ptloss._checks import (
    check_choice,
    check_constant_epsilon,
    check_count,
    check_number,
    check_probabilities,
    fail,
)
from keras_ptloss.proxy._blocks import MAX_STEPS, TOLERANCE, solve_newton
from keras_ptloss.proxy._fsolve import solve_fsolve

SOLVERS = ("newton", "fsolve")


@dataclasses.dataclass(frozen=True, eq=False)
class ProxyTeacherResult:
    """Proxy teachers, with what the solver can say of every row.

    Attributes:
        probabilities: the proxy teachers, `(N, ..., C)`.
        loss: PTLoss of each row at its proxy teacher less the teacher's
            negative entropy, `sum_c t_c (-log q_c + P_c(1 - q_c))`,
            `(N, ...)`.
        residual: how far the class that is farthest off is from the solution,
            as a share of its own probability, to first order; infinite where
            `loss` is above the teacher's own, `(N, ...)`.
        converged: whether `residual` is within the tolerance, `(N, ...)`.
        steps: evaluations of the row's loss and derivatives, `(N, ...)`.
        seconds: time of the solve, compilation included.
        solver: `"newton"` or `"fsolve"`.
    """

    probabilities: np.ndarray
    loss: np.ndarray
    residual: np.ndarray
    converged: np.ndarray
    steps: np.ndarray
    seconds: float
    solver: str

    def __str__(self) -> str:
        """Say in one line how the solve went, and what to do if it did not."""
        rows = self.converged.size
        text = (
            f"{rows} proxy teacher{'s' * (rows != 1)} by {self.solver} in "
            f"{self.seconds:.3g} s, "
            f"{self.steps.mean():.1f} steps a row"
        )
        missed = int(np.count_nonzero(~self.converged))
        if not missed:
            return text + ", all converged"
        advice = (
            'use solver="newton"'
            if self.solver == "fsolve"
            else "raise max_steps, or keep epsilon_m >= -1/m, where the loss "
            "is convex"
        )
        return f"{text}; {missed} of {rows} did not converge: {advice}"


def proxy_teacher(
    teacher_probs: Any,
    epsilon: Any,
    *,
    solver: str = "newton",
    tolerance: float | None = None,
    max_steps: int | None = None,
) -> ProxyTeacherResult:
    """Compute the distribution that a student trained with `epsilon` ends at.

        q = argmin_q sum_c t_c (-log q_c + sum_m epsilon_{c,m} (1 - q_c)^m)

    `"newton"` solves all rows together by a damped Newton method (see
    `newton`), in float64, compiled. `"fsolve"` is the paper's: one call of
    SciPy's `fsolve` a row, on the logits, from the teacher; it is kept as the
    reference and fails on many rows.

    Args:
        teacher_probs: teacher's probabilities, `(N, ..., C)`; rows are
            normalised. One column, `(N, ..., 1)`, is the second of two events.
        epsilon: coefficients: a number (order 1), `(M,)` shared by the
            classes, or `(C, M)` per class.
        solver: `"newton"` or `"fsolve"`.
        tolerance: largest residual of a converged row, relative class by
            class; None is 1e-12 for `"newton"` and 1e-6 for `"fsolve"`.
            `epsilon_m` that is -1/m but for rounding is taken as -1/m.
        max_steps: most steps a row; None is 100 for `"newton"`, and
            `100 C` calls of the function (SciPy's limit) for `"fsolve"`.

    Returns:
        A `ProxyTeacherResult`. Rows that did not converge hold the best point
        found, whose loss is never above the teacher's own for `"newton"`.

    Raises:
        ValueError: if an argument is not of this form.

    Example:
        >>> result = proxy_teacher([[0.7, 0.2, 0.1]], [2.0, 0.5])
        >>> result.probabilities.round(3)
        array([[0.838, 0.113, 0.049]])
        >>> bool(result.converged.all())
        True

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), §4.2 and
        Appendix A.3.
    """
    check_choice("solver", solver, SOLVERS)
    if tolerance is None:
        tolerance = TOLERANCE if solver == "newton" else 1e-6
    check_number("tolerance", tolerance, at_least=0.0)
    teacher = normalised_teacher(teacher_probs)
    *leading, classes = teacher.shape
    epsilon = check_constant_epsilon(epsilon, classes=classes)
    if max_steps is None:
        max_steps = MAX_STEPS if solver == "newton" else 100 * classes
    check_count("max_steps", max_steps)
    start = time.perf_counter()
    solve = solve_newton if solver == "newton" else solve_fsolve
    solution = solve(
        teacher.reshape(-1, classes),
        epsilon,
        tolerance=tolerance,
        max_steps=max_steps,
    )
    return ProxyTeacherResult(
        probabilities=solution.q.reshape(teacher.shape),
        loss=solution.loss.reshape(leading),
        residual=solution.residual.reshape(leading),
        converged=(solution.residual <= tolerance).reshape(leading),
        steps=solution.steps.reshape(leading),
        seconds=time.perf_counter() - start,
        solver=solver,
    )


def normalised_teacher(teacher_probs: Any) -> np.ndarray:
    """Check probabilities `(N, ..., C)`; return them normalised, in float64."""
    teacher = as_array(teacher_probs)
    if teacher.ndim < 2 or 0 in teacher.shape:
        fail(
            "teacher_probs",
            "of shape (examples, ..., classes), none of them empty",
            teacher_probs,
        )
    if teacher.shape[-1] == 1:
        # Before 1 - t is taken: in float16 it loses what a small t has.
        teacher = teacher.astype("float64")
    teacher = two_events(teacher, from_logits=False)
    check_probabilities("teacher_probs", teacher, "take their softmax")
    teacher = teacher.astype("float64")
    return teacher / teacher.sum(axis=-1, keepdims=True)
