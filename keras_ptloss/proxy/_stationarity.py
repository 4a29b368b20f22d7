"""The equation that a proxy teacher solves (Eq. 8-10), and its derivative.

The proxy teacher `q` of a row `t` minimises PTLoss over the simplex. With
`h(q)` the slope of the perturbation (`_perturbation.py`) it is stationary
where, for a multiplier `nu`,

    w_c = t_c r_c(q_c) = nu q_c,    r_c(q) = 1 + q h_c(q),    nu = sum_c w_c.

The classes of a row may span hundreds of magnitudes, and at the lower bound of
the convex domain, `epsilon_m = -1/m`, `r(q) = (1 - q)^M`: `1 + q h` cancels.
With `s = 1 - q` and `a_m = 1 + m epsilon_m` it is

    r(q) = s^M + q A(s),    A(s) = sum_m a_m s^(m-1),
    r - q r' = s^M + M q s^(M-1) + q^2 A'(s),

sums of positive terms wherever the loss is convex (`a_m >= 0`), so that every
class keeps its digits. `s` has its own where it is small: of a class above one
half it is the sum of the others.

The classes may be the first or the last axis of all arrays: see `Layout`.
Shapes are written with them last.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops
from keras.backend import standardize_dtype

from keras_ptloss._backend import maximum, on_numpy
from keras_ptloss._perturbation import horner, perturbation
from keras_ptloss._xla import column_sum, log, row_sum

Tensor = Any

# Below this share of its terms, d is 0 but for rounding, where the loss is not
# convex: there the Newton step is shortened.
HESSIAN_FLOOR = 1e-3

# An `a_m` of fewer than so many units of rounding is 0: -1/m has no exact
# float, and t^(1/(M+1)) would feel the difference.
ROUNDING = 8

# Up to so many classes they are the first axis.
FEW = 16


class Terms(NamedTuple):
    """What the equation is made of at `q`, each `(..., C)`.

    Attributes:
        w: `t r(q)`.
        b: `t r'(q) = dw/dq`.
        d: `w - q b`; `d / q` is `q` times the Hessian `H = t (1/q^2 + k)`.
    """

    w: Tensor
    b: Tensor
    d: Tensor


class Distance(NamedTuple):
    """How far a point is from the solution, by the Newton step there.

    Attributes:
        rate: the step over `q`, class by class, `(..., C)`.
        nu: the multiplier, `(..., 1)`.
        residual: the largest relative step of a class, `(...)`.
    """

    rate: Tensor
    nu: Tensor
    residual: Tensor


def smallest(x: Tensor) -> float:
    """Return the smallest normal number of the tensor's dtype."""
    return float(np.finfo(standardize_dtype(x.dtype)).tiny)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axis the classes are.

    Elementwise loops run over the last axis: with up to FEW classes they are
    long only where it is the rows'. With many, a row stays in the cache. The
    sums are products with ones, see `row_sum`.

    Attributes:
        axis: 0 or -1.
    """

    axis: int

    @classmethod
    def of(cls, classes: int | None) -> "Layout":
        """Return the faster one."""
        return cls(0 if classes is not None and classes <= FEW else -1)

    def enter(self, x: Tensor, rank: int) -> Tensor:
        """Take an array `(..., C)`, with so many axes, into this layout."""
        missing = rank - len(x.shape)
        if missing:
            x = ops.expand_dims(x, tuple(range(missing)))
        return ops.moveaxis(x, -1, 0) if self.axis == 0 else x

    def leave(self, x: Tensor) -> Tensor:
        """Take an array out of this layout, back to `(..., C)`."""
        return ops.moveaxis(x, 0, -1) if self.axis == 0 else x

    def row(self, x: Tensor) -> Tensor:
        """Return numbers of rows, `(..., 1)`, as `(...)`."""
        return ops.squeeze(x, self.axis)

    def by_class(self, x: Tensor) -> Tensor:
        """Return numbers of rows, `(...)`, as `(..., 1)`."""
        return ops.expand_dims(x, self.axis)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the classes: `(..., C)` to `(..., 1)`."""
        if self.axis == 0:
            return column_sum(x)
        return row_sum(x)

    def max(self, x: Tensor) -> Tensor:
        """Return the largest of the classes: `(..., C)` to `(..., 1)`."""
        return ops.max(x, axis=self.axis, keepdims=True)

    def all(self, x: Tensor) -> Tensor:
        """Return whether all classes are so: `(..., C)` to `(..., 1)`."""
        return ops.all(x, axis=self.axis, keepdims=True)


def shares(coefficients: Sequence[Tensor]) -> list[Tensor]:
    """Return `a_m = 1 + m epsilon_m`, 0 where it is 0 but for rounding."""
    values = []
    for m, epsilon in enumerate(coefficients, start=1):
        a = 1.0 + m * epsilon
        rounding = ROUNDING * np.finfo(standardize_dtype(a.dtype)).eps
        # 0, with the derivative of `a`: a compiler may round `a - a`, if it
        # computes the two in different ways.
        zero = m * (epsilon - ops.stop_gradient(epsilon))
        values.append(ops.where(ops.abs(a) <= float(rounding), zero, a))
    return values


def complement(layout: Layout, q: Tensor) -> Tensor:
    """Return `1 - q` with all its digits: of a class above 1/2, the others."""
    large = q > 0.5
    rest = layout.sum(ops.where(large, 0.0, q))
    return ops.where(large, rest, 1.0 - q)


def stationarity(
    layout: Layout, teacher: Tensor, q: Tensor, coefficients: Sequence[Tensor]
) -> Terms:
    """Return `w`, `b` and `d` at `q`, without cancellation in `w` and `d`.

    Args:
        layout: of all arrays.
        teacher: `(..., C)`.
        q: `(..., C)`, rows on the simplex.
        coefficients: M arrays, each broadcastable to `q`.
    """
    s = complement(layout, q)
    order = len(coefficients)
    a = shares(coefficients)
    q_slope = q * horner(s, [m * a_m for m, a_m in enumerate(a)][1:])
    value = horner(s, a)
    power = ops.ones_like(s)  # s^(M-1), by products: XLA's power is slow
    for _ in range(order - 1):
        power = power * s
    return Terms(
        w=teacher * (s * power + q * value),
        b=teacher * (value - order * power - q_slope),
        d=teacher * (power * (s + order * q) + q * q_slope),
    )


def floored(layout: Layout, q: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Return a positive `d`, `(..., C)`, and which rows have one, `(...)`.

    Where the loss is not convex it is `|d|`, and a share of the others' terms
    at least.
    """
    w, _, d = terms
    convex = layout.all((d >= 0) & (w >= 0))
    floor = HESSIAN_FLOOR * layout.sum(ops.abs(w)) * q
    d = ops.where(convex, d, maximum(ops.abs(d), floor))
    return d, layout.row(convex)


def distance(layout: Layout, q: Tensor, w: Tensor, d: Tensor) -> Distance:
    """Return the Newton step of `w = nu q` on the simplex, relative to `q`.

    With gradient `-w / q` and Hessian `d / q^2`:

        nu     = sum(w q / d) / sum(q^2 / d)
        rate_c = (w_c - nu q_c) / d_c

    A class above one half takes what the others leave: its own difference may
    cancel (`d` is small there at `epsilon = (10, -1/2, -1/3, ..)`), and its
    relative step is smaller than the largest of theirs.
    """
    tiny = smallest(q)
    # At most 1e35 in float32: sums of q times it do not overflow.
    weight = q / maximum(d, 1e3 * tiny)
    nu = layout.sum(w * weight) / layout.sum(q * weight)
    large = q > 0.5
    rate = ops.where(large, 0.0, (w - nu * q) / maximum(d, tiny))
    residual = layout.row(layout.max(ops.abs(rate)))
    taken = layout.sum(q * rate)
    rate = ops.where(large, -taken / maximum(q, 0.5), rate)
    return Distance(rate, nu, residual)


def derivative_step(
    layout: Layout, teacher: Tensor, q: Tensor, coefficients: Sequence[Tensor]
) -> Tensor:
    """Return the Newton step at a solution `q` for its derivative, `(..., C)`.

    Its derivative with respect to `teacher` and `coefficients`, `q` held fixed,
    is the solution's (implicit function theorem).
    """
    w, _, _ = terms = stationarity(layout, teacher, q, coefficients)
    hessian = ops.stop_gradient(scaled_hessian(layout, q, terms))
    nu = layout.sum(w / hessian) / layout.sum(q / hessian)
    large = q > 0.5
    step = ops.where(large, 0.0, (w - nu * q) / hessian)
    return ops.where(large, -layout.sum(step), step)


def scaled_hessian(layout: Layout, q: Tensor, terms: Terms) -> Tensor:
    """Return `D = q H = d / q`, `(..., C)`; where `q` is 0, its limit `nu`."""
    floor = 1e6 * smallest(q)
    present = q > 0
    d = ops.where(
        present,
        terms.d / ops.where(present, q, 1.0),
        layout.sum(terms.w),
    )
    # At epsilon_m = -1/m a one-hot row has D = 0.
    # By a tensor: Keras makes float32, and so 0, of the number on PyTorch.
    return ops.where(ops.abs(d) < floor, ops.zeros_like(d) + floor, d)


def adjoint(
    teacher: Tensor, q: Tensor, coefficients: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """Differentiate through the proxy teacher by the implicit function theorem.

    With `u = dJ/dq`, `D = q H` and `ubar = sum(u q / D) / sum(q / D)`:

        dJ/depsilon_{c,m} = sum_n t_c m (1 - q_c)^(m-1) (u_c - ubar) q_c / D_c
        dJ/dt_c           = (u_c - ubar) r_c / D_c

    Args:
        teacher: `(N, C)`.
        q: the proxy teachers, converged, `(N, C)`.
        coefficients: `(M, C)`.
        upstream: `u`, `(N, C)`.

    Returns:
        `(dJ/depsilon, dJ/dt)`: `(M, C)` and `(N, C)`.
    """
    layout = Layout.of(q.shape[-1])
    teacher, q, upstream = (layout.enter(x, 2) for x in (teacher, q, upstream))
    coefficients = [layout.enter(one, 2) for one in ops.unstack(coefficients)]
    # r without the teacher: its derivative is wanted at t = 0, too.
    r = stationarity(layout, ops.ones_like(q), q, coefficients).w
    terms = stationarity(layout, teacher, q, coefficients)
    d = scaled_hessian(layout, q, terms)
    # Relative to a class above one half, whose own difference would cancel.
    upstream = upstream - layout.sum(ops.where(q > 0.5, upstream, 0.0))
    ubar = layout.sum(upstream * q / d) / layout.sum(q / d)
    v = (upstream - ubar) / d
    s = complement(layout, q)
    power = teacher * q * v
    by_epsilon = []
    for m in range(1, len(coefficients) + 1):
        by_epsilon.append(m * ops.sum(layout.leave(power), axis=0))
        power = power * s
    return ops.stack(by_epsilon), layout.leave(v * r)


def loss_of(
    layout: Layout, teacher: Tensor, q: Tensor, coefficients: Sequence[Tensor]
) -> Tensor:
    """Return `sum_c t_c (-log q_c + P_c(1 - q_c))`, `(...)`; `0 log 0 = 0`."""
    terms = perturbation(complement(layout, q), coefficients)
    terms = terms - log(maximum(q, smallest(q)))
    return layout.row(layout.sum(teacher * terms))


def not_above(loss: Tensor, own: Tensor, slack: float = 1e-9) -> Tensor:
    """Return whether a loss is no higher than the teacher's own, `(...)`."""
    return loss <= own + slack * (1.0 + ops.abs(own))


def judged(residual: Tensor, loss: Tensor, own: Tensor) -> Tensor:
    """Return the residual, infinite where the loss is above the teacher's.

    So that "converged" is one comparison, `residual <= tolerance`.
    """
    return ops.where(not_above(loss, own), residual, np.inf)


def judge(teacher: Tensor, q: Tensor, coefficients: Tensor) -> Any:
    """Return loss and residual `(N,)` of points `(N, C)`, as `newton` would."""
    layout = Layout.of(q.shape[-1])
    teacher, q = layout.enter(teacher, 2), layout.enter(q, 2)
    coefficients = [layout.enter(one, 2) for one in ops.unstack(coefficients)]
    loss = loss_of(layout, teacher, q, coefficients)
    own = loss_of(layout, teacher, teacher, coefficients)
    terms = stationarity(layout, teacher, q, coefficients)
    d, _ = floored(layout, q, terms)
    residual = distance(layout, q, terms.w, d).residual
    return loss, judged(residual, loss, own)


numpy_adjoint = on_numpy(adjoint, rows=(0, 1, 3))
numpy_judge = on_numpy(judge, compile=False)
