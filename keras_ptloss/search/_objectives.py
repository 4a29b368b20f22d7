"""What a search minimises: scores of proxy teachers against labels.

Each is a pair of pure NumPy functions, the score and its derivative with
respect to the probabilities. Probabilities are `(..., N, C)`, labels `(N,)`;
leading axes are trials, each with a score of its own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

# A class at 0 costs as much as one at 1e-7, as in Keras's own losses.
FLOOR = 1e-7


@dataclasses.dataclass(frozen=True)
class Objective:
    """A score, lower being better, and its derivative.

    Attributes:
        name: how results call it.
        score: `(probabilities, labels) -> (...)`.
        derivative: `(probabilities, labels) -> (..., N, C)`; None where the
            score cannot be differentiated.
    """

    name: str
    score: Callable[[np.ndarray, np.ndarray], Any]
    derivative: Callable[[np.ndarray, np.ndarray], np.ndarray] | None


def risk(q: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Score by the bound on the student's risk (Eq. 11), `(...)`.

    `Q = (mean_n ||q_n - y_n||_2)^2 + mean_n (q_n . log q_n)^2`
    """
    distance = np.sqrt(_squared_distance(q, labels))
    return np.mean(distance, -1) ** 2 + np.mean(_negentropy(q) ** 2, -1)


def risk_derivative(q: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Differentiate `risk` with respect to `q`."""
    n = len(labels)
    distance = np.sqrt(_squared_distance(q, labels))[..., None]
    mean = np.mean(distance, axis=-2, keepdims=True)
    unit = (q - _one_hot(q, labels)) / np.where(distance > 0, distance, 1.0)
    log_q = np.log(np.maximum(q, np.finfo("float64").tiny))
    entropy_part = _negentropy(q)[..., None] * (log_q + 1.0)
    return 2.0 / n * (mean * unit + entropy_part)


def nll(q: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Score by the negative log-likelihood, in nats: `mean_n -log q_{n,y}`."""
    return np.mean(-np.log(np.maximum(_of_label(q, labels), FLOOR)), -1)


def nll_derivative(q: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Differentiate `nll` with respect to `q`; 0 for a label at the floor."""
    of_label = _of_label(q, labels)[..., None]
    inverse = np.where(of_label > FLOOR, 1.0 / np.maximum(of_label, FLOOR), 0.0)
    return -inverse * _one_hot(q, labels) / len(labels)


def brier(q: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Score by Brier's: `mean_n ||q_n - y_n||_2^2`, from 0 to 2."""
    return np.mean(_squared_distance(q, labels), -1)


def brier_derivative(q: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Differentiate `brier` with respect to `q`."""
    return 2.0 / len(labels) * (q - _one_hot(q, labels))


OBJECTIVES = {
    "risk": Objective("risk", risk, risk_derivative),
    "nll": Objective("nll", nll, nll_derivative),
    "brier": Objective("brier", brier, brier_derivative),
}


def _of_label(q: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the probability of each row's label, `(..., N)`."""
    return q[..., np.arange(len(labels)), labels]


def _one_hot(q: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.eye(q.shape[-1])[labels]


def _squared_distance(q: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return `||q_n - y_n||^2`, `(..., N)`, from the differences.

    `sum q^2 - 2 q_y + 1` would cancel to 0 for confident, right rows.
    """
    difference = q - _one_hot(q, labels)
    return np.einsum("...c,...c->...", difference, difference)


def _negentropy(q: np.ndarray) -> np.ndarray:
    """Return `q_n . log q_n`, `(..., N)`, with `0 log 0 = 0`."""
    log_q = np.log(np.maximum(q, np.finfo("float64").tiny))
    return np.einsum("...c,...c->...", q, log_q)
