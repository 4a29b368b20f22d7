"""Fit a teacher's calibration and epsilon by L-BFGS-B.

The model is the proxy teacher `q(t, epsilon)` of the calibrated teacher
`t = softmax(z / temperature + bias)`; its derivative is exact (`adjoint` in
`_proxy_teacher.py`). It is fitted in the inverse temperature, in which the
logits are linear.
"""

import dataclasses
from typing import Any

import keras
import numpy as np
import scipy.optimize
import scipy.special

from keras_ptloss.proxy._proxy_teacher import (
    TOLERANCE,
    numpy_adjoint,
    row_blocks,
    solve_newton,
)
from keras_ptloss.search._objectives import Objective

# Bounds of the inverse temperature: temperatures from 1/20 to 20.
INVERSE_TEMPERATURES = (0.05, 20.0)

CALIBRATIONS = ("none", "temperature", "vector")
SHAPES = ("zero", "shared", "per_class")


@dataclasses.dataclass(frozen=True)
class Form:
    """What may be fitted: the candidates of a selection.

    Attributes:
        calibration: `"none"`, `"temperature"` (one number) or `"vector"` (one
            temperature and bias a class).
        shape: epsilon is `"zero"`, `"shared"` by the classes or `"per_class"`.
        order: M.
        penalty: weight of the squared parameters, see `penalty_of`.
    """

    calibration: str
    shape: str
    order: int
    penalty: float

    def parameters(self, classes: int) -> int:
        """Return the number of fitted numbers."""
        calibration = {"none": 0, "temperature": 1, "vector": 2 * classes}
        epsilon = {"zero": 0, "shared": 1, "per_class": classes}
        return calibration[self.calibration] + epsilon[self.shape] * self.order


@dataclasses.dataclass(frozen=True, eq=False)
class Parameters:
    """Fitted values: `scale` = 1 / temperature, `bias`, `epsilon`.

    Attributes:
        scale: inverse temperatures, `(1,)` or `(C,)`.
        bias: `(1,)` or `(C,)`.
        epsilon: `(1, M)` shared or `(C, M)`.
    """

    scale: np.ndarray
    bias: np.ndarray
    epsilon: np.ndarray

    @classmethod
    def start(cls, form: Form, classes: int) -> "Parameters":
        """Return the teacher as it is: no calibration, epsilon = 0."""
        width = classes if form.calibration == "vector" else 1
        rows = classes if form.shape == "per_class" else 1
        return cls(
            np.ones(width), np.zeros(width), np.zeros((rows, form.order))
        )


class Teacher:
    """The teacher's rows on the search's examples, in float64.

    Args:
        probabilities: `(N, C)`; None takes them from the logits.
        logits: `(N, C)`; None takes them from the probabilities.
    """

    def __init__(
        self, probabilities: np.ndarray | None, logits: np.ndarray | None
    ) -> None:
        if probabilities is None:
            probabilities = scipy.special.softmax(logits, axis=1)
        if logits is None:
            # The floor of `teacher_distribution` in `_losses.py`.
            floor = keras.config.epsilon()
            logits = np.log(np.maximum(probabilities, floor))
        self.probabilities = probabilities
        self.logits = logits

    def rows(self, index: np.ndarray) -> "Teacher":
        """Return the teacher on some of the examples."""
        return Teacher(self.probabilities[index], self.logits[index])

    def calibrated(self, parameters: Parameters) -> np.ndarray:
        """Return `softmax(z * scale + bias)`, `(N, C)`."""
        if np.all(parameters.scale == 1) and not np.any(parameters.bias):
            return self.probabilities
        return scipy.special.softmax(
            self.logits * parameters.scale + parameters.bias, axis=1
        )


def proxy(teacher: np.ndarray, epsilon: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the proxy teachers `(N, C)` and the count of unconverged rows."""
    if not np.any(epsilon):
        return teacher, 0
    q, _, residual, _ = solve_newton(teacher, epsilon)
    return q, int(np.count_nonzero(residual > TOLERANCE))


def penalty_of(
    parameters: Parameters, weight: float
) -> tuple[float, Parameters]:
    """Return the L2 penalty and its derivative.

    `weight * mean_c (sum_m epsilon_{c,m}^2 + (scale_c - mean scale)^2
    + bias_c^2)`: a vector scaling is drawn towards the single temperature.
    Means over the classes, since a class's own parameters are seen by a share
    of the examples only.
    """
    scale = parameters.scale - parameters.scale.mean()
    bias, epsilon = parameters.bias, parameters.epsilon
    value = np.mean(scale**2) + np.mean(bias**2)
    value += np.sum(epsilon**2) / len(epsilon)
    derivative = Parameters(
        2 * weight * scale / len(scale),
        2 * weight * bias / len(bias),
        2 * weight * epsilon / len(epsilon),
    )
    return weight * float(value), derivative


def value_and_gradient(
    teacher: Teacher,
    labels: np.ndarray,
    objective: Objective,
    parameters: Parameters,
) -> tuple[float, Parameters, int]:
    """Return the objective at the proxy teacher, its gradient, bad rows."""
    t = teacher.calibrated(parameters)
    epsilon = parameters.epsilon
    q, unconverged = proxy(t, epsilon)
    assert objective.derivative is not None  # noqa: S101 - checked at entry
    upstream = objective.derivative(q, labels)
    coefficients = np.ascontiguousarray(
        np.broadcast_to(epsilon, (t.shape[1], epsilon.shape[1])).T
    )
    by_epsilon = np.zeros_like(coefficients)
    by_t = np.empty_like(t)
    start = 0
    for rows in row_blocks(t, q, upstream):
        block_epsilon, block_t = numpy_adjoint(
            rows[0], rows[1], coefficients, rows[2]
        )
        by_epsilon += block_epsilon
        stop = min(start + len(block_t), len(t))
        by_t[start:stop] = block_t[: stop - start]
        start = stop
    by_logits = t * (by_t - np.sum(t * by_t, axis=1, keepdims=True))
    by_scale = np.einsum("nc,nc->c", by_logits, teacher.logits)
    by_bias = by_logits.sum(axis=0)
    gradient = Parameters(
        by_scale if len(parameters.scale) > 1 else by_scale.sum(keepdims=True),
        by_bias if len(parameters.bias) > 1 else by_bias.sum(keepdims=True),
        by_epsilon.T
        if len(epsilon) > 1
        else by_epsilon.T.sum(axis=0, keepdims=True),
    )
    return float(objective.score(q, labels)), gradient, unconverged


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """What a fit found and what it cost.

    Attributes:
        parameters: the fitted values.
        value: objective plus penalty at them.
        evaluations: solves of all rows.
        unconverged: rows not converged, over all evaluations.
    """

    parameters: Parameters
    value: float
    evaluations: int
    unconverged: int


def fit(
    form: Form,
    teacher: Teacher,
    labels: np.ndarray,
    objective: Objective,
    *,
    upper: float,
    starts: int = 1,
    seed: int = 0,
    begin: Parameters | None = None,
    precise: bool = True,
) -> Fit:
    """Minimise the objective plus penalty by SciPy's L-BFGS-B.

    Bounds keep the loss convex: `epsilon_m` in `[-1/m, upper]`. The first
    start is the teacher as it is, so that the result is never worse than plain
    KL on these examples; further ones draw epsilon at random.

    Args:
        form: what is fitted.
        teacher: the teacher's rows.
        labels: `(N,)`.
        objective: with a derivative.
        upper: highest epsilon.
        starts: number of starts; the best end is kept.
        seed: of the random starts.
        begin: where to start instead of at the teacher as it is.
        precise: whether to go on until the parameters stand still, or only
            until the objective does.

    Returns:
        The best `Fit`, with the cost of all.
    """
    classes = teacher.logits.shape[1]
    initial = Parameters.start(form, classes)
    free = {
        "scale": form.calibration != "none",
        "bias": form.calibration == "vector",
        "epsilon": form.shape != "zero",
    }
    lower = np.broadcast_to(
        -1.0 / np.arange(1, form.order + 1), initial.epsilon.shape
    )
    bounds = {
        "scale": np.tile(INVERSE_TEMPERATURES, (initial.scale.size, 1)),
        "bias": np.tile((-np.inf, np.inf), (initial.bias.size, 1)),
        "epsilon": np.stack(
            [lower.ravel(), np.full(lower.size, upper)], axis=1
        ),
    }
    names = [name for name in free if free[name]]
    cost = {"evaluations": 0, "unconverged": 0}

    def pack(parameters: Parameters) -> np.ndarray:
        parts = [getattr(parameters, name).ravel() for name in names]
        return np.concatenate(parts)

    def unpack(vector: np.ndarray) -> Parameters:
        values, start = {}, 0
        for name in names:
            old = getattr(initial, name)
            part = vector[start : start + old.size]
            values[name] = part.reshape(old.shape)
            start += old.size
        return dataclasses.replace(initial, **values)

    def function(vector: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = unpack(vector)
        value, gradient, unconverged = value_and_gradient(
            teacher, labels, objective, parameters
        )
        added, its_gradient = penalty_of(parameters, form.penalty)
        cost["evaluations"] += 1
        cost["unconverged"] += unconverged
        return value + added, pack(gradient) + pack(its_gradient)

    options = (
        {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-14, "gtol": 1e-8}
        if precise
        else {"maxiter": 200, "ftol": 1e-8, "gtol": 1e-5}
    )
    if not names:
        value = float(objective.score(teacher.probabilities, labels))
        return Fit(initial, value, 0, 0)

    generator = np.random.default_rng(seed)
    best: Any = None
    for index in range(starts):
        point = begin or initial
        if index:
            random = generator.uniform(lower, min(upper, 1.0))
            point = dataclasses.replace(initial, epsilon=random)
        result = scipy.optimize.minimize(
            function,
            pack(point),
            jac=True,
            method="L-BFGS-B",
            bounds=np.concatenate([bounds[name] for name in names]),
            options=options,
        )
        if best is None or result.fun < best.fun:
            best = result
    if not np.isfinite(best.fun):
        raise ValueError(
            "`objective` must return finite scores. Received: "
            f"{objective.name} = {best.fun}, at the end of the descent"
        )
    return Fit(unpack(best.x), float(best.fun), **cost)
