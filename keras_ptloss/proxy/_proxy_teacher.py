"""The proxy teacher: where a student trained with PTLoss ends (Eq. 8-10).

For one teacher row `t`, the proxy teacher is the minimiser of PTLoss over the
simplex. With `h(q)` and `k(q)` the slope and curvature of the perturbation
(`_perturbation.py`), it is stationary where, for a multiplier `nu`,

    w_c = t_c (1 + q_c h_c(q_c)),    w_c = nu q_c,    nu = sum_c w_c.

No division by `q` or `t` is needed anywhere, so that classes at zero stay
there. This module knows no labels.
"""

import dataclasses
import time
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.special
from keras import ops
from keras.backend import standardize_dtype

from keras_ptloss._backend import block_elements, on_numpy
from keras_ptloss._checks import (
    check_choice,
    check_constant_epsilon,
    check_count,
    check_number,
    check_probabilities,
    fail,
)
from keras_ptloss._perturbation import curvature, perturbation, slope

Tensor = Any

SOLVERS = ("newton", "fsolve")

# `newton`'s, wherever the caller does not ask for others.
TOLERANCE = 1e-12
MAX_STEPS = 100

# The least value of the scaled Hessian D, as a share of sum |w|. On the convex
# domain D is of the order of sum w; far outside it D may vanish.
HESSIAN_FLOOR = 1e-3

# Below this share of its terms, D is 0 but for rounding: see `adjoint`.
SINGULAR = 1e-8


@dataclasses.dataclass(frozen=True, eq=False)
class ProxyTeacherResult:
    """Proxy teachers, with what the solver can say of every row.

    Attributes:
        probabilities: the proxy teachers, `(N, C)`.
        loss: PTLoss of each row at its proxy teacher less the teacher's
            negative entropy, `sum_c t_c (-log q_c + P_c(1 - q_c))`, `(N,)`.
        residual: distance from stationarity, `max_c |w_c - q_c sum w|` over
            `sum_c t_c (1 + |q_c h_c|)`, `(N,)`.
        converged: whether `residual` is within the tolerance and `loss` not
            above the teacher's own, `(N,)`.
        steps: evaluations of the row's loss and derivatives, `(N,)`.
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
        rows = len(self.converged)
        text = (
            f"{rows} proxy teachers by {self.solver} in {self.seconds:.3g} s, "
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
        teacher_probs: teacher's probabilities, `(N, C)`; rows are normalised.
        epsilon: coefficients: a number (order 1), `(M,)` shared by the
            classes, or `(C, M)` per class.
        solver: `"newton"` or `"fsolve"`.
        tolerance: largest residual of a converged row; None is 1e-12 for
            `"newton"` and 1e-6 for `"fsolve"`.
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
    epsilon = check_constant_epsilon(epsilon, classes=teacher.shape[1])
    if max_steps is None:
        max_steps = MAX_STEPS if solver == "newton" else 100 * teacher.shape[1]
    check_count("max_steps", max_steps)
    start = time.perf_counter()
    solve = solve_newton if solver == "newton" else solve_fsolve
    q, loss, residual, steps = solve(
        teacher, epsilon, tolerance=tolerance, max_steps=max_steps
    )
    own_loss = numpy_loss(teacher, teacher, np.stack(orders(epsilon)))
    within = loss <= own_loss + 1e-9 * (1.0 + np.abs(own_loss))
    return ProxyTeacherResult(
        probabilities=q,
        loss=loss,
        residual=residual,
        converged=(residual <= tolerance) & within,
        steps=steps,
        seconds=time.perf_counter() - start,
        solver=solver,
    )


def normalised_teacher(teacher_probs: Any) -> np.ndarray:
    """Check probabilities `(N, C)`; return them normalised, in float64."""
    teacher = np.asarray(teacher_probs)
    if teacher.ndim != 2 or 0 in teacher.shape or teacher.shape[1] < 2:
        fail(
            "teacher_probs",
            "of shape (examples, classes), with two classes or more",
            teacher_probs,
        )
    check_probabilities("teacher_probs", teacher, "take their softmax")
    teacher = teacher.astype("float64")
    return teacher / teacher.sum(axis=1, keepdims=True)


def orders(epsilon: np.ndarray) -> list[np.ndarray]:
    """Split `(..., M)` coefficients into M arrays, each for `(..., C)`."""
    return [epsilon[..., m] for m in range(epsilon.shape[-1])]


# --- Newton ------------------------------------------------------------------


class _Point(NamedTuple):
    """Where each row is: `q, w, b` are `(..., C)`, the others `(...)`."""

    q: Tensor
    loss: Tensor
    w: Tensor
    b: Tensor
    residual: Tensor


def newton(
    teacher: Tensor,
    coefficients: Tensor,
    *,
    tolerance: float,
    max_steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve for proxy teachers by a feasible, damped Newton method.

    The loss is separable, so that its Hessian `H` is diagonal and a step on
    the simplex costs O(C). The step is taken in the scaled form
    `D = q H`, in which the stationarity condition is nearly linear even where
    `q` is small: see `newton_step`. A step that would leave the simplex is cut,
    and one that does not lower the loss is halved. All rows go together;
    converged ones are masked. The start is the teacher, or `w / sum w` there,
    one step of the fixed-point map, where that lowers the loss: cheaper than a
    Newton step, it spares the slowest rows three of eight.

    Args:
        teacher: `(..., C)`, rows on the simplex.
        coefficients: `(M, ...)`, each order broadcastable to `teacher`.
        tolerance: residual at which a row is left alone.
        max_steps: most steps a row.

    Returns:
        `(q, loss, residual, steps)`: `(..., C)`, `(...)`, `(...)`, `(...)`.
    """
    coefficients = ops.unstack(coefficients)
    # Losses that differ by rounding count as equal.
    slack = 100 * float(np.finfo(standardize_dtype(teacher.dtype)).eps)

    def at(q: Tensor) -> _Point:
        loss = loss_of(teacher, q, coefficients)
        return _Point(q, loss, *stationarity(teacher, q, coefficients))

    def move(point: _Point, trial: Tensor) -> tuple[_Point, Tensor]:
        """Move unconverged rows whose loss is lower at `trial`."""
        trial = ops.maximum(trial, 0.0)
        there = at(trial / ops.sum(trial, axis=-1, keepdims=True))
        lower = there.loss <= point.loss + slack * (1.0 + ops.abs(point.loss))
        accept = lower & (point.residual > tolerance)
        by_class = ops.expand_dims(accept, -1)
        moved = _Point(
            q=ops.where(by_class, there.q, point.q),
            loss=ops.where(accept, there.loss, point.loss),
            w=ops.where(by_class, there.w, point.w),
            b=ops.where(by_class, there.b, point.b),
            residual=ops.where(accept, there.residual, point.residual),
        )
        return moved, lower

    def not_done(step, point, damping, steps):  # type: ignore
        return (step < max_steps) & ops.any(point.residual > tolerance)

    def iterate(step, point, damping, steps):  # type: ignore
        direction = newton_step(point.q, point.w, point.b)
        inside = ops.min(
            ops.where(direction < 0, -point.q / direction, np.inf), axis=-1
        )
        length = damping * ops.minimum(1.0, 0.95 * inside)
        trial = point.q + ops.expand_dims(length, -1) * direction
        moved, lower = move(point, trial)
        return (
            step + 1,
            moved,
            ops.where(lower, ops.ones_like(damping), 0.5 * damping),
            steps + ops.cast(point.residual > tolerance, "int32"),
        )

    # Trials share the teacher's rows: broadcast `q` to all of them.
    own = at(teacher + 0.0 * sum(coefficients))
    start, _ = move(own, own.w / ops.sum(own.w, axis=-1, keepdims=True))
    state = (
        1,
        start,
        ops.ones_like(own.residual),
        ops.cast(own.residual > tolerance, "int32"),
    )
    _, point, _, steps = ops.while_loop(not_done, iterate, state)
    return point.q, point.loss, point.residual, steps


def newton_step(q: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Return the Newton step at `q`, which keeps the sum of `q`, `(..., C)`.

    With `w` and `b` of `stationarity`, gradient `-w / q`, and `D = q H`:

        D_c  = nu - b_c
        nu   = sum(w / D) / sum(q / D)
        step = (w - nu q) / D

    At the solution this `D` is `q` times the Hessian `H = t (1/q^2 + k)`, so
    that convergence is quadratic; away from it, it takes the multiplier's word
    (`nu`) for `t / q + t h`, so that a class far too large or too small comes
    right in one step, where the Newton step on `t / q` itself needs several.
    `nu` appears in `D`: it is taken twice, from `sum w` on.
    """
    floor = HESSIAN_FLOOR * ops.sum(ops.abs(w), axis=-1, keepdims=True)
    floor = ops.maximum(floor, 1e-12)
    nu = ops.sum(w, axis=-1, keepdims=True)
    for _ in range(2):
        d = ops.maximum(ops.abs(nu - b), floor)
        nu = ops.sum(w / d, axis=-1, keepdims=True) / ops.sum(
            q / d, axis=-1, keepdims=True
        )
    return (w - nu * q) / d


def adjoint(
    teacher: Tensor, q: Tensor, coefficients: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """Differentiate through the proxy teacher by the implicit function theorem.

    With `u = dJ/dq`, `D = q H` and `ubar = sum(u q / D) / sum(q / D)`:

        dJ/depsilon_{c,m} = sum_n t_c m (1 - q_c)^(m-1) (u_c - ubar) q_c / D_c
        dJ/dt_c           = (u_c - ubar) (1 + q_c h_c) / D_c

    Args:
        teacher: `(N, C)`.
        q: the proxy teachers, converged, `(N, C)`.
        coefficients: `(M, C)`.
        upstream: `u`, `(N, C)`.

    Returns:
        `(dJ/depsilon, dJ/dt)`: `(M, C)` and `(N, C)`.
    """
    coefficients = ops.unstack(coefficients)
    s = 1.0 - q
    q_h = q * slope(s, coefficients)
    w, b, _ = stationarity(teacher, q, coefficients)
    d = ops.sum(w, axis=-1, keepdims=True) - b
    # At epsilon_m = -1/m, where the loss is barely convex, D is 0 at q = 1.
    scale = ops.sum(teacher * (1.0 + ops.abs(q_h)), axis=-1, keepdims=True)
    floor = SINGULAR * scale
    d = ops.where(ops.abs(d) < floor, floor, d)
    ubar = ops.sum(upstream * q / d, axis=-1, keepdims=True) / ops.sum(
        q / d, axis=-1, keepdims=True
    )
    v = (upstream - ubar) / d
    power = teacher * q * v
    by_epsilon = []
    for m in range(1, len(coefficients) + 1):
        by_epsilon.append(m * ops.sum(power, axis=0))
        power = power * s
    return ops.stack(by_epsilon), v * (1.0 + q_h)


def loss_of(
    teacher: Tensor, q: Tensor, coefficients: Sequence[Tensor]
) -> Tensor:
    """Return `sum_c t_c (-log q_c + P_c(1 - q_c))`, `(...)`; `0 log 0 = 0`."""
    tiny = float(np.finfo(standardize_dtype(q.dtype)).tiny)
    terms = perturbation(1.0 - q, coefficients) - ops.log(ops.maximum(q, tiny))
    return ops.sum(teacher * terms, axis=-1)


def stationarity(
    teacher: Tensor, q: Tensor, coefficients: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the stationarity condition `w = q sum w` is made of.

        w_c = t_c (1 + q_c h_c),    b_c = t_c (h_c - q_c k_c) = dw_c / dq_c
        residual = max_c |w_c - q_c sum w| / sum_c t_c (1 + |q_c h_c|)

    The residual's scale is that of the terms of `w`, which may cancel, so that
    rounding stays below the tolerance.

    Returns:
        `(w, b, residual)`: `(..., C)`, `(..., C)`, `(...)`.
    """
    s = 1.0 - q
    t_h = teacher * slope(s, coefficients)
    w = teacher + q * t_h
    b = t_h - teacher * q * curvature(s, coefficients)
    gap = ops.abs(w - q * ops.sum(w, axis=-1, keepdims=True))
    scale = ops.sum(teacher + ops.abs(q * t_h), axis=-1)
    return w, b, ops.max(gap, axis=-1) / scale


numpy_newton = on_numpy(newton, rows=(0,))
numpy_adjoint = on_numpy(adjoint, rows=(0, 1, 3))
numpy_loss = on_numpy(loss_of, compile=False)
numpy_stationarity = on_numpy(stationarity, compile=False)


def solve_newton(
    teacher: np.ndarray,
    epsilon: np.ndarray,
    *,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Run `newton` on blocks of rows of one compiled shape.

    Args:
        teacher: `(N, C)`.
        epsilon: `(M,)`, `(C, M)`, or several of them: `(K, 1, M)`,
            `(K, C, M)`.
        tolerance: as in `newton`.
        max_steps: as in `newton`.

    Returns:
        `(q, loss, residual, steps)`: `(N, C)`, `(N,)`, `(N,)`, `(N,)`; with
        several epsilon `(K, N, C)`, `(K, N)`, `(K, N)`, `(K, N)`.
    """
    coefficients = np.stack(orders(epsilon))  # (M,), (M, C), (M, K, 1 or C)
    if coefficients.ndim == 3:
        coefficients = coefficients[:, :, None, :]
    else:
        coefficients = coefficients.reshape(len(coefficients), 1, -1)
    parts = [
        numpy_newton(
            rows, coefficients, tolerance=tolerance, max_steps=max_steps
        )
        for rows in row_blocks(teacher)
    ]
    axis = 1 if epsilon.ndim == 3 else 0
    unfilled = (slice(None),) * axis + (slice(len(teacher)),)
    return tuple(  # type: ignore[return-value]
        np.concatenate(part, axis=axis)[unfilled]
        for part in zip(*parts, strict=True)
    )


def row_blocks(*arrays: np.ndarray) -> list[Any]:
    """Cut arrays `(N, C)` into blocks of rows, all of one shape.

    A compiled function serves one shape; sizes are therefore rounded up, and
    the last block is filled with uniform rows, which are solved in no step.

    Returns:
        One block a list entry: an array, or a tuple of them for several.
    """
    examples, classes = arrays[0].shape
    size = min(
        -(-examples // 64) * 64, max(64, block_elements() // classes // 64 * 64)
    )
    missing = -examples % size
    filled = [
        np.concatenate([a, np.full((missing, classes), 1.0 / classes)])
        for a in arrays
    ]
    cuts = [
        tuple(a[start : start + size] for a in filled)
        for start in range(0, examples, size)
    ]
    return [cut[0] for cut in cuts] if len(arrays) == 1 else cuts


# --- The paper's solver ------------------------------------------------------


def solve_fsolve(
    teacher: np.ndarray,
    epsilon: np.ndarray,
    *,
    tolerance: float,
    max_steps: int,
    fix_gauge: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
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
        `(q, loss, residual, steps)` of `(N, C)`, `(N,)`, `(N,)`, `(N,)`.
    """
    coefficients = orders(epsilon)
    rows = [
        _fsolve_row(t, coefficients, 0.01 * tolerance, max_steps, fix_gauge)
        for t in teacher
    ]
    solved = np.stack([q for q, _ in rows])
    return (
        solved,
        numpy_loss(teacher, solved, np.stack(coefficients)),
        numpy_stationarity(teacher, solved, np.stack(coefficients))[-1],
        np.array([steps for _, steps in rows], dtype="int32"),
    )


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
