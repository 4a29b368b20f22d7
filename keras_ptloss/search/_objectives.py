"""What a search minimises: scores of proxy teachers against labels.

Each is a pair of pure NumPy functions, the score and its derivative with
respect to the probabilities. Probabilities are `(..., N, C)`; leading axes are
trials, each with a score of its own. Labels are classes, `(N,)`, or
distributions, `(N, C)`, where a label tells a row in part only: see
`_labels.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_ptloss._checks import check_choice, fail

# A class at 0 costs as much as one at 1e-7, as in Keras's own losses.
FLOOR = 1e-7


@dataclasses.dataclass(frozen=True)
class Objective:
    """A score, lower being better, alone and with its derivative.

    Attributes:
        name: how results call it.
        score: `(probabilities, labels) -> (...)`.
        evaluate: `(probabilities, labels) -> (score, derivative)`, the latter
            `(N, C)`.
        per_example: `(probabilities, labels) -> (..., N)`, whose mean is the
            score; None where the score is no mean over examples.
    """

    name: str
    score: Callable[[np.ndarray, np.ndarray], Any]
    evaluate: Callable[[np.ndarray, np.ndarray], tuple[Any, np.ndarray]]
    per_example: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None


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
    unit = (q - one_hot(q, labels)) / np.where(distance > 0, distance, 1.0)
    log_q = np.log(np.maximum(q, np.finfo("float64").tiny))
    entropy_part = _negentropy(q)[..., None] * (log_q + 1.0)
    return 2.0 / n * (mean * unit + entropy_part)


def nll(q: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Score by the negative log-likelihood, in nats: `mean_n -log q_{n,y}`."""
    return np.mean(nll_per_example(q, labels), -1)


def nll_per_example(q: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return `-log q_{n,y}`, `(..., N)`."""
    if labels.ndim == 1:
        of_label = q[..., np.arange(len(labels)), labels]
        return -np.log(np.maximum(of_label, FLOOR))
    log_q = np.log(np.maximum(q, FLOOR))
    return -np.einsum("...nc,nc->...n", log_q, labels)


def nll_derivative(q: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Differentiate `nll` with respect to `q`; 0 for a label at the floor."""
    inverse = np.where(q > FLOOR, 1.0 / np.maximum(q, FLOOR), 0.0)
    return -inverse * one_hot(q, labels) / len(labels)


def brier(q: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Score by Brier's: `mean_n ||q_n - y_n||_2^2`, from 0 to 2."""
    return np.mean(_squared_distance(q, labels), -1)


def brier_derivative(q: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Differentiate `brier` with respect to `q`."""
    return 2.0 / len(labels) * (q - one_hot(q, labels))


def one_hot(q: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return labels as rows `(N, C)`."""
    return labels if labels.ndim == 2 else np.eye(q.shape[-1])[labels]


def _built_in(
    score: Callable[..., Any],
    derivative: Callable[..., np.ndarray],
    per_example: Callable[..., np.ndarray] | None = None,
) -> Objective:
    return Objective(
        score.__name__,
        score,
        lambda q, labels: (score(q, labels), derivative(q, labels)),
        per_example,
    )


def _squared_distance(q: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return `||q_n - y_n||^2`, `(..., N)`, from the differences.

    `sum q^2 - 2 q_y + 1` would cancel to 0 for confident, right rows.
    """
    difference = q - one_hot(q, labels)
    return np.einsum("...c,...c->...", difference, difference)


OBJECTIVES = {
    "risk": _built_in(risk, risk_derivative),
    "nll": _built_in(nll, nll_derivative, nll_per_example),
    "brier": _built_in(brier, brier_derivative, _squared_distance),
}


def as_objective(objective: Any) -> Objective:
    """Return the objective of a name, or of a function of the user's."""
    if not callable(objective):
        check_choice("objective", objective, OBJECTIVES)
        return OBJECTIVES[objective]

    def score(q: np.ndarray, labels: np.ndarray) -> Any:
        value = objective(q, labels)
        return _number(value[0] if isinstance(value, tuple) else value)

    def evaluate(q: np.ndarray, labels: np.ndarray) -> tuple[Any, np.ndarray]:
        value = objective(q, labels)
        if not isinstance(value, tuple) or np.shape(value[1]) != np.shape(q):
            fail(
                "objective",
                "a function that returns (score, derivative (N, C)) for a "
                "search by gradient",
                objective,
            )
        return _number(value[0]), np.asarray(value[1])

    name = getattr(objective, "__name__", type(objective).__name__)
    return Objective(name, score, evaluate)


def _number(score: Any) -> float:
    """Return the score that a function of the user's gave, one number."""
    try:
        if np.ndim(score) == 0:
            return float(score)
    except (TypeError, ValueError):
        pass
    fail("objective", "a function whose score is one number", score)


def _negentropy(q: np.ndarray) -> np.ndarray:
    """Return `q_n . log q_n`, `(..., N)`, with `0 log 0 = 0`."""
    log_q = np.log(np.maximum(q, np.finfo("float64").tiny))
    return np.einsum("...c,...c->...", q, log_q)
