"""Fit calibration and epsilon together, through the proxy teacher.

The model is the proxy teacher `q(t, epsilon)` of the calibrated teacher
`t = softmax(A z + b)`; its derivative is exact (`adjoint` of the proxy room).
SciPy's L-BFGS-B descends from the teacher as it is, inside the region where
the loss is convex.
"""

import dataclasses

import numpy as np
import scipy.optimize

from keras_ptloss._calibration import Calibration
from keras_ptloss._cores import by_blocks
from keras_ptloss.proxy._blocks import TOLERANCE, row_blocks, solve_newton
from keras_ptloss.proxy._stationarity import numpy_adjoint
from keras_ptloss.search._examples import Examples
from keras_ptloss.search._objectives import Objective

# Bounds of the inverse temperature: temperatures from 1/20 to 20.
SCALES = (0.05, 20.0)

# Highest epsilon, that of the paper's search space.
UPPER = 10.0

# What is fitted, by calibration: fields of `Point`.
CALIBRATIONS = {
    "none": ["epsilon"],
    "temperature": ["scale", "epsilon"],
    "vector": ["scale", "bias", "epsilon"],
}

# Where L-BFGS-B stops: when the parameters stand still, or the objective.
PRECISE = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-14, "gtol": 1e-8}
COARSE = {"maxiter": 200, "ftol": 1e-8, "gtol": 1e-5}


@dataclasses.dataclass(frozen=True)
class Form:
    """What is fitted.

    Attributes:
        calibration: `"none"`, `"temperature"` (one number) or `"vector"` (one
            temperature and bias a class).
        per_class: whether each class has an epsilon of its own.
        order: M.
        penalty: weight of the squared parameters, see `penalty_of`.
    """

    calibration: str
    per_class: bool
    order: int
    penalty: float

    @property
    def free(self) -> list[str]:
        """The names of what is fitted."""
        return CALIBRATIONS[self.calibration]


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """Values of what is fitted, or the derivatives with respect to them.

    Attributes:
        scale: `A`, `()` or `(C,)`.
        bias: `b`, `()` or `(C,)`.
        epsilon: `(M,)` or `(C, M)`.
    """

    scale: np.ndarray
    bias: np.ndarray
    epsilon: np.ndarray

    @classmethod
    def start(cls, form: Form, classes: int, scale: float = 1.0) -> "Point":
        """Return the teacher at a temperature `1 / scale`: epsilon = 0."""
        vector = (classes,) if form.calibration == "vector" else ()
        rows = (classes,) if form.per_class else ()
        return cls(
            np.full(vector, np.clip(scale, *SCALES)),
            np.zeros(vector),
            np.zeros((*rows, form.order)),
        )

    @property
    def calibration(self) -> Calibration:
        """The calibration ahead of epsilon."""
        return Calibration(self.scale, self.bias)

    def bounds(self) -> tuple["Point", "Point"]:
        """Return the least values, which keep the loss convex, and the most."""
        lower = -1.0 / np.arange(1, self.epsilon.shape[-1] + 1)
        least = Point(
            np.full_like(self.scale, SCALES[0]),
            np.full_like(self.bias, -np.inf),
            np.broadcast_to(lower, self.epsilon.shape),
        )
        most = Point(
            np.full_like(self.scale, SCALES[1]),
            np.full_like(self.bias, np.inf),
            np.full_like(self.epsilon, UPPER),
        )
        return least, most

    def pack(self, names: list[str]) -> np.ndarray:
        """Return these values as one vector."""
        return np.concatenate([getattr(self, name).ravel() for name in names])

    def unpack(self, names: list[str], vector: np.ndarray) -> "Point":
        """Return the point with these values taken from a vector."""
        sizes = [getattr(self, name).size for name in names]
        parts = np.split(vector, np.cumsum(sizes)[:-1])
        return dataclasses.replace(
            self,
            **{
                name: part.reshape(getattr(self, name).shape)
                for name, part in zip(names, parts, strict=True)
            },
        )


def proxy(teacher: np.ndarray, epsilon: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the proxy teachers `(N, C)` and the count of unconverged rows."""
    q, _, residual, _ = solve_newton(teacher, epsilon)
    return q, int(np.count_nonzero(residual > TOLERANCE))


def penalty_of(point: Point, weight: float) -> tuple[float, Point]:
    """Return the L2 penalty and its derivative.

    `weight * mean_c (sum_m epsilon_{c,m}^2 + (scale_c - mean scale)^2
    + bias_c^2)`: a vector scaling is drawn towards the single temperature.
    Means over the classes, since a class's own parameters are seen by a share
    of the examples only.
    """
    scale = point.scale - np.mean(point.scale)
    rows = point.epsilon.size // point.epsilon.shape[-1]
    value = np.mean(scale**2) + np.mean(point.bias**2)
    value += np.sum(point.epsilon**2) / rows
    derivative = Point(
        2 * weight * scale / scale.size,
        2 * weight * point.bias / point.bias.size,
        2 * weight * point.epsilon / rows,
    )
    return weight * float(value), derivative


def value_and_gradient(
    examples: Examples, objective: Objective, point: Point
) -> tuple[float, Point, int]:
    """Return the objective at the proxy teacher, its gradient, bad rows."""
    t = examples.calibrated(point.calibration)
    q, unconverged = proxy(t, point.epsilon)
    value, upstream = objective.evaluate(q, examples.targets)
    coefficients = np.ascontiguousarray(
        np.broadcast_to(point.epsilon, (t.shape[1], point.epsilon.shape[-1])).T
    )
    parts = by_blocks(
        lambda t, q, upstream: numpy_adjoint(t, q, coefficients, upstream),
        row_blocks(t, q, upstream),
    )
    by_epsilon = sum(part[0] for part in parts)
    by_t = np.concatenate([part[1] for part in parts])[: len(t)]
    by_logits = t * (by_t - np.sum(t * by_t, axis=1, keepdims=True))
    by_scale = np.einsum("nc,nc->c", by_logits, examples.logits)
    gradient = Point(
        _of_shape(by_scale, point.scale),
        _of_shape(by_logits.sum(axis=0), point.bias),
        _of_shape(by_epsilon.T, point.epsilon),
    )
    return float(value), gradient, unconverged


def _of_shape(per_class: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Sum over the classes the derivatives of what classes share."""
    shared = per_class.ndim > like.ndim
    return np.asarray(per_class.sum(axis=0) if shared else per_class)


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """What a fit found and what it cost.

    Attributes:
        point: the fitted values.
        value: objective plus penalty at them.
        evaluations: solves of all rows.
        unconverged: rows not converged, over all evaluations.
    """

    point: Point
    value: float
    evaluations: int
    unconverged: int


def fit(
    form: Form,
    examples: Examples,
    objective: Objective,
    *,
    starts: int = 1,
    seed: int = 0,
    begin: Point | None = None,
    precise: bool = True,
) -> Fit:
    """Minimise the objective plus penalty by SciPy's L-BFGS-B.

    Bounds keep the loss convex: `epsilon_m` in `[-1/m, UPPER]`. The first
    start is the teacher as it is, so that the result is never worse than plain
    KL on these examples; further ones draw epsilon at random.

    Args:
        form: what is fitted.
        examples: what it is fitted to.
        objective: what is minimised.
        starts: number of starts; the best end is kept.
        seed: of the random starts.
        begin: where to start instead of at the teacher as it is.
        precise: whether to go on until the parameters stand still, or only
            until the objective does.

    Returns:
        The best `Fit`, with the cost of all.
    """
    initial = Point.start(form, examples.logits.shape[1])
    cost = {"evaluations": 0, "unconverged": 0}

    def function(vector: np.ndarray) -> tuple[float, np.ndarray]:
        point = initial.unpack(form.free, vector)
        value, gradient, unconverged = value_and_gradient(
            examples, objective, point
        )
        added, its_gradient = penalty_of(point, form.penalty)
        cost["evaluations"] += 1
        cost["unconverged"] += unconverged
        slope = gradient.pack(form.free) + its_gradient.pack(form.free)
        return value + added, slope

    least, most = initial.bounds()
    generator = np.random.default_rng(seed)
    points = [begin or initial]
    for _ in range(1, starts):
        random = generator.uniform(least.epsilon, 1.0)
        points.append(dataclasses.replace(initial, epsilon=random))
    ends = [
        scipy.optimize.minimize(
            function,
            point.pack(form.free),
            jac=True,
            method="L-BFGS-B",
            bounds=scipy.optimize.Bounds(
                least.pack(form.free), most.pack(form.free)
            ),
            options=PRECISE if precise else COARSE,
        )
        for point in points
    ]
    best = min(ends, key=lambda end: end.fun)
    if not np.isfinite(best.fun):
        raise ValueError(
            "`objective` must return finite scores. Received: "
            f"{objective.name} = {best.fun}, at the end of the descent"
        )
    return Fit(initial.unpack(form.free, best.x), float(best.fun), **cost)
