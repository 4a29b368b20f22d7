"""A table of the proxy teacher, where all classes share epsilon.

The equation of a class, `t r(q) = nu q`, is then the same for all of them:

    q_c = Q(log nu - log t_c),    Q the inverse of y(q) = log r(q) - log q,

and `y` falls as `q` grows where the loss is convex. `Q` is kept at equal
distances of `y`, down to `q = e^-18`, below which `r` is 1 and `q = t / nu`.
What is left is one number a row, `nu`, at which the classes sum to 1.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_ptloss._backend import maximum, minimum
from keras_ptloss.proxy._stationarity import Layout, smallest

Tensor = Any

NODES = 2048
SPAN = 18.0  # -log of the smallest q
STEPS = 2  # for nu: classes then sum to 1 within 1e-3


class Table(NamedTuple):
    """`Q` of K epsilon.

    Attributes:
        values: `Q` at `first + i width`, `(K, NODES)`.
        first: `y` at `q = 1`, `(K,)`.
        width: `(K,)`.
    """

    values: Tensor
    first: Tensor
    width: Tensor


@functools.cache
def _grid() -> tuple[np.ndarray, np.ndarray]:
    """Return `1 - q` and `log q`, dense where `q` is near 1, and near 0."""
    s = np.concatenate([np.geomspace(1e-12, 0.1, 400), np.linspace(0.1, 0.9)])
    small = np.linspace(np.log(0.1), -SPAN, 600)
    log_q = np.concatenate([[0.0], np.log1p(-s), small[1:]])
    return -np.expm1(log_q), log_q


def table_of(epsilon: np.ndarray) -> Table:
    """Return the table of K epsilon, `(K, M)`, in float64.

    Its values mean nothing where the loss is not convex.
    """
    s, log_q = _grid()
    q = np.exp(log_q)
    order = epsilon.shape[1]
    # As in `_stationarity`: sums of positive terms, if the loss is convex.
    a = np.maximum(1.0 + np.arange(1, order + 1) * epsilon, 0.0)
    value = s[:, None] ** np.arange(order) @ a.T
    r = s[:, None] ** order + q[:, None] * value
    r[0] = np.where(r[0] > 0, r[0], r[1])
    y = np.log(r) - log_q[:, None]
    width = (y[-1] - y[0]) / (NODES - 1)
    nodes = y[0] + np.arange(NODES)[:, None] * width
    values = [
        np.interp(at, one, q) for at, one in zip(nodes.T, y.T, strict=True)
    ]
    return Table(np.stack(values), y[0], width)


def proxies_by_table(
    layout: Layout, teacher: Tensor, nu: Tensor, table: Table
) -> Tensor:
    """Return proxy teachers, right to 1e-3 or so, in a layout.

    Args:
        layout: of the arrays.
        teacher: `(R, C)`, R / K rows for each epsilon.
        nu: where to begin, `(R, 1)`.
        table: of K epsilon.
    """
    epsilons = table.values.shape[0]
    values = ops.reshape(table.values, (-1,))
    rows = layout.row(nu).shape[0] // epsilons

    def by_row(x: Tensor) -> Tensor:
        return layout.by_class(ops.repeat(x, rows))

    first = ops.log(teacher) + by_row(table.first)  # of t = 0 -inf, below
    density = by_row(1.0 / table.width)
    begin = by_row(ops.arange(epsilons, dtype="int32") * NODES)

    def classes(log_nu: Tensor) -> tuple[Tensor, Tensor]:
        """Return `q_c(nu)`, and its derivative by `log nu`."""
        place = (log_nu - first) * density
        node = minimum(maximum(place, 0.0), NODES - 2.0)
        node = ops.cast(node, "int32")
        share = place - ops.cast(node, place.dtype)
        low = ops.take(values, begin + node)
        rise = ops.take(values, begin + node + 1) - low
        small = teacher * ops.exp(-log_nu)
        below = place > NODES - 1.0
        return (
            ops.where(below, small, maximum(low + share * rise, 0.0)),
            ops.where(below, -small, rise * density),
        )

    log_nu = ops.log(maximum(nu, smallest(nu)))
    for _ in range(STEPS):
        q, slope = classes(log_nu)
        log_nu = log_nu - (layout.sum(q) - 1.0) / layout.sum(slope)
        # A place that is no number would be none in the table.
        log_nu = ops.where(ops.isfinite(log_nu), log_nu, 0.0 * nu)
    q, _ = classes(log_nu)
    q = maximum(q, 1e-6 * teacher)  # no class is lost, whatever nu is
    return q / layout.sum(q)
