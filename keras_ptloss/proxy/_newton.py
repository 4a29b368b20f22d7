"""Newton's method for proxy teachers, all rows together.

The loss is separable, so that its Hessian is diagonal and a step on the
simplex costs O(C). `init`, `step` and `unfinished` work on one record, `State`;
`newton` loops over them, compiled.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops
from keras.backend import standardize_dtype

from keras_ptloss._backend import maximum, minimum
from keras_ptloss.proxy._stationarity import (
    Layout,
    Terms,
    distance,
    loss_of,
    not_above,
    smallest,
    stationarity,
)

Tensor = Any

# Relative steps below which Newton's own step is worth what it costs.
NEAR = 0.05

# How far above `w / nu` the tangent may carry a class in one step.
REACH = 4.0


class Problem(NamedTuple):
    """What is to be solved, in which layout, and when to stop."""

    layout: Layout
    teacher: Tensor
    coefficients: Sequence[Tensor]
    tolerance: float
    max_steps: int


class Point(NamedTuple):
    """Where each row is: `q` and `terms` are `(..., C)`, `loss` `(...)`."""

    q: Tensor
    loss: Tensor
    terms: Terms


class State(NamedTuple):
    """What goes round the loop.

    Attributes:
        count: steps of the loop.
        point: the best point so far.
        trial: where to look next, `(..., C)`.
        residual: relative distance of `point` from the solution, `(...)`.
        damping: length of the next step; 1 unless the last failed, `(...)`.
        steps: evaluations of each row, `(...)`.
    """

    count: Tensor
    point: Point
    trial: Tensor
    residual: Tensor
    damping: Tensor
    steps: Tensor


class Solution(NamedTuple):
    """Proxy teachers and how each row went.

    A row has converged where `residual <= tolerance`, and nowhere else.

    Attributes:
        q: the proxy teachers, `(..., C)`.
        loss: `sum_c t_c (-log q_c + P_c(1 - q_c))`, `(...)`.
        residual: relative Newton step of the class that is farthest off,
            `(...)`; of fsolve's, infinite where the loss is above the teacher's
            own, as that of `newton` never is.
        steps: evaluations of the row's loss and derivatives, `(...)`.
    """

    q: Tensor
    loss: Tensor
    residual: Tensor
    steps: Tensor


def newton(
    teacher: Tensor,
    coefficients: Tensor,
    *,
    tolerance: float,
    max_steps: int,
) -> Solution:
    """Solve for proxy teachers by a feasible, damped Newton method.

    Args:
        teacher: `(..., C)`, rows on the simplex.
        coefficients: `(M, ...)`, each order broadcastable to `teacher`.
        tolerance: residual at which a row is left alone.
        max_steps: most steps a row.
    """
    orders = ops.unstack(coefficients)
    rank = max(len(x.shape) for x in (teacher, *orders))
    layout = Layout.of(teacher.shape[-1])
    problem = Problem(
        layout,
        layout.enter(teacher, rank),
        [layout.enter(epsilon, rank) for epsilon in orders],
        tolerance,
        max_steps,
    )
    state = init(problem)
    (state,) = ops.while_loop(
        lambda state: unfinished(problem, state),
        lambda state: (step(problem, state),),
        (state,),
    )
    _, point, _, residual, _, steps = state
    return Solution(layout.leave(point.q), point.loss, residual, steps)


def init(problem: Problem) -> State:
    """Return where to begin.

    That is one step of the fixed-point map, `w / sum w` at the teacher, where
    it lowers the loss: cheaper than a Newton step, it spares the slowest rows
    several. Else, and where it would not move, the teacher itself.
    """
    layout, teacher = problem.layout, problem.teacher
    # Trials share the teacher's rows: broadcast `q` to all of them.
    own = evaluate(problem, teacher + 0.0 * sum(problem.coefficients))
    w = own.terms.w
    # No class is lost: one at 0 would stay there.
    trial = normalised(layout, maximum(w, 1e-3 * teacher))
    there = evaluate(problem, trial)
    gap = ops.abs(w - own.q * layout.sum(w)) - problem.tolerance * w
    moves = ~layout.row(layout.all(gap <= 0))
    point = choose(layout, moves & (there.loss <= own.loss), there, own)
    damping = ops.ones_like(own.loss)
    trial, residual = plan(problem, point, damping)
    steps = ops.cast(moves, "int32")
    return State(1, point, trial, residual, damping, steps)


def unfinished(problem: Problem, state: State) -> Tensor:
    """Return whether a row may still be improved."""
    open_rows = ~(state.residual <= problem.tolerance)
    return (state.count < problem.max_steps) & ops.any(open_rows)


def step(problem: Problem, state: State) -> State:
    """Move unconverged rows whose loss is not higher at their trial."""
    there = evaluate(problem, state.trial)
    # Losses that differ by rounding count as equal.
    dtype = standardize_dtype(problem.teacher.dtype)
    slack = 100 * float(np.finfo(dtype).eps)
    lower = not_above(there.loss, state.point.loss, slack)
    open_rows = ~(state.residual <= problem.tolerance)
    point = choose(problem.layout, lower & open_rows, there, state.point)
    damping = ops.where(
        lower, ops.ones_like(state.damping), 0.5 * state.damping
    )
    trial, residual = plan(problem, point, damping)
    return State(
        state.count + 1,
        point,
        trial,
        residual,
        damping,
        state.steps + ops.cast(open_rows, "int32"),
    )


def evaluate(problem: Problem, q: Tensor) -> Point:
    """Return the point at `q`."""
    loss = loss_of(problem.layout, problem.teacher, q, problem.coefficients)
    terms = stationarity(
        problem.layout, problem.teacher, q, problem.coefficients
    )
    return Point(q, loss, terms)


def choose(layout: Layout, rows: Tensor, there: Point, here: Point) -> Point:
    """Take `there` in some rows, `here` in the others."""
    by_class = layout.by_class(rows)
    return Point(
        ops.where(by_class, there.q, here.q),
        ops.where(rows, there.loss, here.loss),
        Terms(
            *(
                ops.where(by_class, one, two)
                for one, two in zip(there.terms, here.terms, strict=True)
            )
        ),
    )


def normalised(layout: Layout, q: Tensor) -> Tensor:
    """Divide rows by their sums."""
    return q / layout.sum(q)


def plan(
    problem: Problem, point: Point, damping: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the next trial `(..., C)`, and the residual `(...)` of `point`.

    Far from the solution the trial is `leap`'s. Close to it, where the last
    trial failed, and where the loss is not convex, it is Newton's own, a
    direction of descent, cut before it leaves the simplex.
    """
    layout, (q, _, terms) = problem.layout, point
    rate, nu, residual = distance(layout, q, terms)
    # Each class keeps a twentieth at least.
    most = maximum(layout.max(-rate), 0.95)
    length = minimum(2.0 * layout.by_class(damping), 1.0) * 0.95 / most
    newton = q * (1.0 + length * rate)
    convex = layout.row(layout.all((terms.d >= 0) & (terms.w >= 0)))
    far = convex & (damping == 1.0) & (residual > NEAR)
    start = ops.where(layout.by_class(residual < 0.5), nu, layout.sum(terms.w))
    # The last steps of a block, where no row needs it, are half as long.
    trial = ops.cond(
        ops.any(far),
        lambda: ops.where(
            layout.by_class(far),
            leap(layout, q, terms, start, len(problem.coefficients)),
            newton,
        ),
        lambda: newton,
    )
    return normalised(layout, trial), residual


def leap(
    layout: Layout, q: Tensor, terms: Terms, nu: Tensor, order: int
) -> Tensor:
    """Return a step that may change classes by many magnitudes, `(..., C)`.

    Given `nu`, the tangent of `w` at `q` solves a class alone:

        q_c(nu) = d_c / (nu - b_c)

    exactly where the class is small. A class above one half is followed by its
    rest `s` instead, whose logarithm is nearly linear in that of `nu`: at
    `epsilon_m = -1/m`, `nu = t s^M / q`. The two agree at

        log sum_c q_c(nu) = log s + (log nu - log(w/q)) / e,    e = d s / (w q)

    which two Newton steps in `log nu` solve from the `nu` given. Without a
    class above one half the sum is over all and equals 1.
    """
    w, b, d = terms
    tiny = smallest(q)
    large = q > 0.5

    def of_large(x: Tensor) -> Tensor:
        return layout.sum(ops.where(large, x, 0.0))

    def classes(nu: Tensor) -> tuple[Tensor, Tensor]:
        """Return `q_c(nu)` and the share of it that moves with `nu`."""
        free = nu - b
        # Below 1, and within reach: the tangent has a pole.
        least = maximum(d, d / maximum(w, tiny) * nu / REACH)
        size = d / maximum(maximum(free, least), tiny)
        return size, ops.where(free >= least, size * nu / free, 0.0)

    s = layout.sum(ops.where(large, 0.0, q))
    exists = s < 0.75
    q_large = maximum(of_large(q), 0.5)
    w_large = of_large(w)
    log_s = ops.log(maximum(s, tiny))
    # s^M may be too small for a float, where the start is far too small.
    lost = w_large < 1e3 * tiny
    log_w = ops.where(lost, order * log_s, ops.log(maximum(w_large, tiny)))
    elasticity = ops.where(
        lost,
        order + s / q_large,
        of_large(d) * s / maximum(w_large * q_large, tiny),
    )
    target = ops.where(exists, log_w - ops.log(q_large), 0.0)
    elasticity = ops.where(exists, elasticity, 1e20)

    log_nu = ops.log(maximum(nu, tiny))
    for _ in range(2):
        size, moving = classes(ops.exp(log_nu))
        total = maximum(layout.sum(ops.where(large, 0.0, size)), tiny)
        share = layout.sum(ops.where(large, 0.0, moving)) / total
        gap = ops.log(total) - log_s + share * log_nu
        log_nu = (target + elasticity * gap) / (1.0 + elasticity * share)
    size, _ = classes(ops.exp(log_nu))
    total = layout.sum(ops.where(large, 0.0, size))
    return ops.where(large, maximum(1.0 - total, 0.05 * q), size)
