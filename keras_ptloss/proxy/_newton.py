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
from keras_ptloss._xla import log
from keras_ptloss.proxy._stationarity import (
    Distance,
    Layout,
    Terms,
    distance,
    floored,
    loss_of,
    not_above,
    shares,
    smallest,
    stationarity,
)
from keras_ptloss.proxy._table import Table, proxies_by_table

Tensor = Any

# Relative steps below which Newton's own step is worth what it costs.
NEAR = 0.05

# The order up to which such a step cannot raise a convex loss.
SURE = 10

# How far above `w / nu` the tangent may carry a class in one step.
REACH = 4.0


class Problem(NamedTuple):
    """What is to be solved, in which layout, and when to stop.

    `convex` says whether the loss of all rows is, by their coefficients.
    """

    layout: Layout
    teacher: Tensor
    coefficients: Sequence[Tensor]
    convex: Tensor
    tolerance: float
    max_steps: int


class State(NamedTuple):
    """What goes round the loop.

    Attributes:
        count: steps of the loop.
        q: the best point so far, `(..., C)`.
        loss: not less than that of `q`, nor more than the teacher's, `(...)`.
        trial: where to look next, `(..., C)`.
        sure: whether no row's loss can be higher there.
        residual: relative distance of `q` from the solution, `(...)`.
        damping: length of the next step; 1 unless the last failed, `(...)`.
        steps: evaluations of each row, `(...)`.
    """

    count: Tensor
    q: Tensor
    loss: Tensor
    trial: Tensor
    sure: Tensor
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
    *table: Tensor,
    tolerance: float,
    max_steps: int,
) -> Solution:
    """Solve for proxy teachers by a feasible, damped Newton method.

    Args:
        teacher: `(..., C)`, rows on the simplex.
        coefficients: `(M, ...)`, each order broadcastable to `teacher`.
        *table: the fields of a `Table`, or nothing; `teacher` is then `(R, C)`,
            and the classes share the coefficients.
        tolerance: residual at which a row is left alone.
        max_steps: most steps a row.
    """
    orders = ops.unstack(coefficients)
    rank = max(len(x.shape) for x in (teacher, *orders))
    layout = Layout.of(teacher.shape[-1])
    orders = [layout.enter(epsilon, rank) for epsilon in orders]
    problem = Problem(
        layout,
        layout.enter(teacher, rank),
        orders,
        ops.all(ops.stack([ops.all(a >= 0) for a in shares(orders)])),
        tolerance,
        max_steps,
    )
    state = init(problem, *table)
    (state,) = ops.while_loop(
        lambda state: unfinished(problem, state),
        lambda state: (step(problem, state),),
        (state,),
    )
    q = normalised(layout, state.q)
    return Solution(
        layout.leave(q), loss_at(problem, q), state.residual, state.steps
    )


def loss_at(problem: Problem, q: Tensor) -> Tensor:
    """Return the loss at `q`, `(...)`."""
    return loss_of(problem.layout, problem.teacher, q, problem.coefficients)


def init(problem: Problem, *table: Tensor) -> State:
    """Return the teacher itself, and where to look first.

    That is where the table says, if there is one and the loss is convex, or
    else one step of the fixed-point map, `w / sum w` at the teacher: cheaper
    than a Newton step, either spares several.
    """
    layout, teacher = problem.layout, problem.teacher
    # Trials share the teacher's rows: broadcast `q` to all of them.
    q = teacher + 0.0 * sum(problem.coefficients)
    w = stationarity(layout, teacher, q, problem.coefficients).w
    total = layout.sum(w)
    gap = ops.abs(w - q * total) - problem.tolerance * w
    moves = ~layout.row(layout.all(gap <= 0))

    def fixed_point() -> Tensor:
        # No class is lost: one at 0 would stay there.
        return normalised(layout, maximum(w, 1e-3 * teacher))

    if table:
        trial = ops.cond(
            problem.convex,
            lambda: proxies_by_table(layout, teacher, total, Table(*table)),
            fixed_point,
        )
    else:
        trial = fixed_point()
    trial = ops.where(layout.by_class(moves), trial, q)
    loss = loss_at(problem, q)
    return State(
        count=0,
        q=q,
        loss=loss,
        trial=trial,
        sure=False,
        residual=ops.full_like(loss, np.inf),
        # Where it is no better, Newton's steps begin at the teacher, whole.
        damping=ops.full_like(loss, 2.0),
        # To look where one is takes none.
        steps=ops.cast(moves, "int32") - 1,
    )


def unfinished(problem: Problem, state: State) -> Tensor:
    """Return whether a row may still be improved."""
    open_rows = ~(state.residual <= problem.tolerance)
    return (state.count < problem.max_steps) & ops.any(open_rows)


def step(problem: Problem, state: State) -> State:
    """Move unconverged rows whose loss is not higher at their trial."""
    open_rows = ~(state.residual <= problem.tolerance)
    # Losses that differ by rounding count as equal.
    dtype = standardize_dtype(problem.teacher.dtype)
    slack = 100 * float(np.finfo(dtype).eps)
    loss = ops.cond(
        state.sure,
        lambda: state.loss,
        lambda: loss_at(problem, state.trial),
    )
    lower = not_above(loss, state.loss, slack)
    moved = lower & open_rows
    q = ops.where(problem.layout.by_class(moved), state.trial, state.q)
    damping = ops.where(
        lower, ops.ones_like(state.damping), 0.5 * state.damping
    )
    trial, sure, residual = plan(problem, q, damping)
    return State(
        state.count + 1,
        q,
        ops.where(moved, loss, state.loss),
        trial,
        sure,
        residual,
        damping,
        state.steps + ops.cast(open_rows, "int32"),
    )


def normalised(layout: Layout, q: Tensor) -> Tensor:
    """Divide rows by their sums."""
    return q / layout.sum(q)


def plan(
    problem: Problem, q: Tensor, damping: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the next trial `(..., C)`, whether it is sure, and the residual.

    Close to the solution of a convex loss Newton's step is sure not to raise
    it: `d` is a sum of positive terms, products of up to M + 1 factors `q` and
    `s`; where these change by a twentieth, the Hessian, `d / q^2`, changes by
    less than 1.05^(M + 1) / .95^2, below 2 up to `SURE`. Then no loss is
    evaluated, and the step is neither cut nor normalised.
    """
    layout = problem.layout
    terms = stationarity(layout, problem.teacher, q, problem.coefficients)
    d, convex = ops.cond(
        problem.convex,
        lambda: (terms.d, damping > 0),
        lambda: floored(layout, q, terms),
    )
    found = distance(layout, q, terms.w, d)
    close = (found.residual <= NEAR) & (damping == 1.0)
    short = len(problem.coefficients) <= SURE
    sure = problem.convex & ops.all(close) & short
    trial = ops.cond(
        sure,
        lambda: q * (1.0 + found.rate),  # q times the rate may underflow
        lambda: careful(problem, q, convex, found, damping),
    )
    return trial, sure, found.residual


def careful(
    problem: Problem,
    q: Tensor,
    convex: Tensor,
    found: Distance,
    damping: Tensor,
) -> Tensor:
    """Return a trial whose loss is to be judged, `(..., C)`.

    Far from the solution it is `leap`'s. Close to it, where the last trial
    failed, and where the loss is not convex, it is Newton's own, a direction
    of descent, cut before it leaves the simplex.

    Args:
        problem: the problem.
        q: `(..., C)`.
        convex: whether the loss is at `q`, `(...)`.
        found: Newton's step at `q`.
        damping: of the step, `(...)`.
    """
    layout = problem.layout
    rate, nu, residual = found
    # Each class keeps a twentieth at least.
    most = maximum(layout.max(-rate), 0.95)
    length = minimum(2.0 * layout.by_class(damping), 1.0) * 0.95 / most
    newton = q * (1.0 + length * rate)
    far = convex & (damping == 1.0) & (residual > NEAR)

    def leaps() -> Tensor:
        terms = stationarity(layout, problem.teacher, q, problem.coefficients)
        near = layout.by_class(residual < 0.5)
        start = ops.where(near, nu, layout.sum(terms.w))
        trial = leap(layout, q, terms, start, len(problem.coefficients))
        return ops.where(layout.by_class(far), trial, newton)

    trial = ops.cond(ops.any(far), leaps, lambda: newton)
    return normalised(layout, trial)


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

    inverse = 1.0 / maximum(d, tiny)
    own = b * inverse
    present = ops.where(q > 0, ops.ones_like(q), 0.0)
    reach = 1.0 / (REACH * maximum(w, tiny))

    def classes(nu: Tensor) -> tuple[Tensor, Tensor]:
        """Return `q_c(nu)` and the share of it that moves with `nu`."""
        moving = nu * inverse
        free = moving - own
        # Below 1, and within reach: the tangent has a pole.
        least = maximum(nu * reach, 1.0)
        size = present / maximum(free, least)
        return size, ops.where(free >= least, size * (size * moving), 0.0)

    s = layout.sum(ops.where(large, 0.0, q))
    exists = s < 0.75
    q_large = maximum(of_large(q), 0.5)
    w_large = of_large(w)
    log_s = log(maximum(s, tiny))
    # s^M may be too small for a float, where the start is far too small.
    lost = w_large < 1e3 * tiny
    log_w = ops.where(lost, order * log_s, log(maximum(w_large, tiny)))
    elasticity = ops.where(
        lost,
        order + s / q_large,
        of_large(d) * s / maximum(w_large * q_large, tiny),
    )
    target = ops.where(exists, log_w - log(q_large), 0.0)
    elasticity = ops.where(exists, elasticity, 1e20)

    log_nu = log(maximum(nu, tiny))
    for _ in range(2):
        size, moving = classes(ops.exp(log_nu))
        total = maximum(layout.sum(ops.where(large, 0.0, size)), tiny)
        share = layout.sum(ops.where(large, 0.0, moving)) / total
        gap = log(total) - log_s + share * log_nu
        log_nu = (target + elasticity * gap) / (1.0 + elasticity * share)
    size, _ = classes(ops.exp(log_nu))
    total = layout.sum(ops.where(large, 0.0, size))
    return ops.where(large, maximum(1.0 - total, 0.05 * q), size)
