"""Calibration of several teachers, side by side.

    q = softmax(sum_k A_k z_k + b),    A_k = s_k / K I + u_k D_k

`z_k` are the logarithms of teacher k's probabilities, `s_k` its best inverse
temperature by itself: from the geometric mean of the K teachers, each at its
temperature, `D_k` (its diagonal alone for `"vector"`) and `b` are drawn away
against a ridge:

    ridge = penalty C / N (sum_c b_c^2 + K sum_k (sum_c D_kcc^2
                           + (C - 1) sum_{c != j} D_kcj^2))

It is that of `_linear.py`, which this is for K = 1. The factor K makes it mean
the same for every K: a teacher that is given twice is corrected as when given
once. A teacher whose classes are not the student's has `s_k = 0`, no diagonal,
and the weight `C_k` on all of its `D_k`: as off a diagonal, the numbers of a
row may together move as much as one on a diagonal may.

`"temperature"` is a weight a teacher, `A_k = a_k I` with `a_k >= 0`, fitted
together: the pool, in which a teacher may be left out; `"none"` the geometric
mean of the teachers as they are.
"""

import dataclasses

import numpy as np
import scipy.optimize

from keras_ptloss._calibration import Calibration
from keras_ptloss.search._examples import Examples
from keras_ptloss.search._linear import (
    MAX_ITERATIONS,
    SCALES,
    LinearFit,
    fit_temperature,
    objective_of_logits,
)
from keras_ptloss.search._objectives import Objective


@dataclasses.dataclass(frozen=True, eq=False)
class Stack:
    """What the fits of several teachers start from.

    Attributes:
        examples: what is fitted to.
        objective: what is minimised.
        scales: `s_k`, 0 for a teacher of other classes.
        units: `u`, one a column, `(C_in,)`.
    """

    examples: Examples
    objective: Objective
    scales: np.ndarray
    units: np.ndarray

    @classmethod
    def of(cls, examples: Examples, objective: Objective) -> "Stack":
        """Fit each teacher's temperature by itself."""
        scales, units = [], []
        for k, columns in enumerate(examples.columns):
            z = examples.logits[:, columns]
            scale = 0.0
            if k in examples.alike:
                scale = fit_temperature(z, examples.targets, objective)
            # As for one teacher: it may have to be turned round.
            spread = float(np.mean(np.std(z, axis=1)))
            unit = max(scale, 1.0 / spread) if spread else (scale or 1.0)
            scales.append(scale)
            units.append(np.full(z.shape[1], unit))
        return cls(examples, objective, np.array(scales), np.concatenate(units))

    def weighted(self, weights: np.ndarray) -> np.ndarray:
        """Return `A` with `A_k = weight_k I`, `(C, C_in)`."""
        classes = self.examples.classes
        a = np.zeros((classes, len(self.units)))
        for k in self.examples.alike:
            a[:, self.examples.columns[k]] = weights[k] * np.eye(classes)
        return a

    def pool(self) -> np.ndarray:
        """Return the best weights `a_k`, `(K,)`."""
        examples = self.examples
        alike = examples.alike
        z = np.stack([examples.logits[:, examples.columns[k]] for k in alike])

        def function(weights: np.ndarray) -> tuple[float, np.ndarray]:
            value, slope = objective_of_logits(
                np.einsum("k,knc->nc", weights, z),
                examples.targets,
                self.objective,
            )
            return value, np.einsum("nc,knc->k", slope, z)

        found = scipy.optimize.minimize(
            function,
            self.scales[alike] / len(alike),
            jac=True,
            method="L-BFGS-B",
            bounds=[(0.0, SCALES[1])] * len(alike),
            options={"maxiter": MAX_ITERATIONS, "ftol": 1e-10, "gtol": 1e-7},
        )
        weights = np.zeros(len(self.scales))
        weights[alike] = found.x
        return weights

    def fit(
        self,
        calibration: str,
        penalty: float = 0.0,
        begin: np.ndarray | None = None,
    ) -> LinearFit:
        """Fit `A` and `b`.

        Args:
            calibration: `"none"`, `"temperature"`, `"vector"` or `"matrix"`.
            penalty: weight of the ridge, at least 0.
            begin: parameters to start from; None is the temperatures alone.
        """
        examples, nothing = self.examples, np.zeros(0)
        if not examples.alike and calibration != "matrix":
            frequencies = examples.frequencies()
            a = self.weighted(self.scales)
            return LinearFit(Calibration(a, np.log(frequencies)), nothing)
        alike = len(examples.alike) or 1
        if calibration == "none":
            even = np.full(len(self.scales), 1.0 / alike)
            return LinearFit(Calibration(self.weighted(even)), nothing)
        if calibration == "temperature":
            a = self.weighted(self.pool())
            return LinearFit(Calibration(a), nothing)
        return self._descend(calibration, penalty, begin)

    def _descend(
        self, calibration: str, penalty: float, begin: np.ndarray | None
    ) -> LinearFit:
        """Fit `D` and `b` by SciPy's L-BFGS-B."""
        examples = self.examples
        a = self.weighted(self.scales / (len(examples.alike) or 1))
        fixed, x = examples.logits @ a.T, examples.logits * self.units
        weight = penalty * examples.classes / len(x)
        free, ridge = self._ridge(calibration)
        ridge, size = weight * ridge[free], int(free.sum())

        def matrix(vector: np.ndarray) -> np.ndarray:
            d = np.zeros(free.shape)
            d[free] = vector[:size]
            return d

        def function(vector: np.ndarray) -> tuple[float, np.ndarray]:
            d, b = vector[:size], vector[size:]
            value, slope = objective_of_logits(
                fixed + x @ matrix(vector).T + b,
                examples.targets,
                self.objective,
            )
            value += float(np.sum(ridge * d * d) + weight * b @ b)
            by_d = (slope.T @ x)[free] + 2.0 * ridge * d
            by_b = slope.sum(axis=0) + 2.0 * weight * b
            return value, np.concatenate([by_d, by_b])

        found = scipy.optimize.minimize(
            function,
            np.zeros(size + len(a)) if begin is None else begin,
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": MAX_ITERATIONS, "ftol": 1e-9, "gtol": 1e-6},
        )
        a = a + self.units * matrix(found.x)
        return LinearFit(Calibration(a, found.x[size:]), found.x)

    def _ridge(self, calibration: str) -> tuple[np.ndarray, np.ndarray]:
        """Return which numbers of `D` are fitted, and their weights."""
        examples = self.examples
        free = np.full((examples.classes, len(self.units)), False)
        ridge = np.ones(free.shape)
        diagonal = np.eye(examples.classes, dtype=bool)
        for k, columns in enumerate(examples.columns):
            if k in examples.alike:
                free[:, columns] = diagonal | (calibration == "matrix")
                ridge[:, columns][~diagonal] = examples.classes - 1
            else:
                free[:, columns] = calibration == "matrix"
                ridge[:, columns] = columns.stop - columns.start
        return free, ridge * len(examples.columns)
