"""The paper's Algorithm 1: draw epsilon at random, and keep the best draw."""

import concurrent.futures
import dataclasses
import os
from typing import Any, Literal

import numpy as np
import scipy.special

from keras_ptloss._validation import check_choice, check_count, check_flag, fail
from keras_ptloss.correction import Correction
from keras_ptloss.proxy import proxy_teacher, solve_rows
from keras_ptloss.search.method import Examples, Found


@dataclasses.dataclass(frozen=True)
class RandomSearch:
    """Draw coefficients at random and keep the best: the paper's Algorithm 1.

    For each order, `num_trials` values of epsilon are drawn from a uniform
    distribution. Eq. 11 scores the proxy teachers of each draw against the
    labels. The teacher itself, `epsilon = 0`, is always one of the candidates.

    The result's `trials` has one entry per draw in the columns `order`,
    `score`, `unconverged` (rows on which the solver did not converge),
    `epsilon` and `best_of_order`.

    Args:
        num_trials: number of draws for each order.
        order: number of coefficients M, or `(lowest, highest)` to try each
            order in between.
        low: lower bound of the draws.
        high: upper bound of the draws.
        per_class: whether each class has its own coefficients. Classes without
            a label then keep the teacher's probabilities, unless the labels are
            a random sample.
        solver: `"newton"`; or `"fsolve"`, the paper's solver, which is slow.

    Raises:
        ValueError: if an argument is invalid.

    Example:
        >>> from keras_ptloss import ProxyTeacherSearch
        >>> search = ProxyTeacherSearch(RandomSearch(num_trials=10, order=2))
        >>> result = search.search([[0.7, 0.3], [0.4, 0.6]], [0, 1], verbose=0)
        >>> len(result.trials["score"])
        10

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), Algorithm 1.
    """

    num_trials: int = 100
    order: int | tuple[int, int] = (1, 5)
    low: float = -1.0
    high: float = 10.0
    per_class: bool = False
    solver: Literal["newton", "fsolve"] = "newton"

    name = "random"

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_count("num_trials", self.num_trials)
        orders = np.atleast_1d(self.order).tolist()
        for order in orders:
            check_count("order", order)
        if len(orders) > 2 or orders[0] > orders[-1]:
            fail("order", "an integer, or (lowest, highest)", self.order)
        if not -np.inf < self.low < self.high < np.inf:
            fail("low", f"below high={self.high}, both finite", self.low)
        check_flag("per_class", self.per_class)
        check_choice("solver", self.solver, ("newton", "fsolve"))

    def run(self, examples: Examples, progress: Any) -> Found:
        """Search on the examples."""
        t = one_teacher(examples, self.name)
        kept = kept_classes(examples) if self.per_class else ()
        weight = examples.sample_weight

        def score(q: np.ndarray) -> float:
            q = keep_classes(q, t, kept)
            return risk(q, examples.labels, weight)

        def trial(epsilon: np.ndarray) -> tuple[float, int]:
            if self.solver == "newton":
                q, converged, _ = solve_rows(t, epsilon)
            else:
                result = proxy_teacher(t, epsilon, solver="fsolve", verbose=0)
                q, converged = result.probabilities, result.converged
            return score(q), int(np.count_nonzero(~converged))

        epsilons = self._draws(t.shape[1], examples.seed)
        scores, unconverged = [], []
        # A thread that runs a compiled solver releases Python's lock.
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for value, missed in pool.map(trial, epsilons):
                scores.append(value)
                unconverged.append(missed)
                progress(len(scores), len(epsilons))
        of_order = np.reshape(scores, (-1, self.num_trials))
        is_best = np.zeros(of_order.shape, dtype=bool)
        is_best[np.arange(len(of_order)), of_order.argmin(axis=1)] = True
        best = int(np.argmin(scores))
        correction, chosen = Correction(), "teacher"
        if scores[best] < score(t):
            correction = Correction(epsilons[best], kept_classes=kept)
            chosen = "epsilon"
        return Found(
            correction=correction,
            trials={
                "order": [epsilon.shape[-1] for epsilon in epsilons],
                "score": scores,
                "unconverged": unconverged,
                "epsilon": epsilons,
                "best_of_order": is_best.ravel().tolist(),
            },
            chosen=chosen,
        )

    def _draws(self, num_classes: int, seed: int) -> list[np.ndarray]:
        """For each order, return `num_trials` values of epsilon."""
        generator = np.random.default_rng(seed)
        lowest, highest = np.broadcast_to(self.order, 2)
        rows = (num_classes,) if self.per_class else ()
        return [
            epsilon
            for order in range(lowest, highest + 1)
            for epsilon in generator.uniform(
                self.low, self.high, size=(self.num_trials, *rows, order)
            )
        ]


def risk(q: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> float:
    """Return Eq. 11, the bound on the student's risk.

    `Q = (mean_n ||q_n - y_n||_2)^2 + mean_n (q_n . log q_n)^2`

    Args:
        q: proxy teachers, `(N, C)`.
        labels: true classes, `(N,)`.
        weight: weights of the examples, `(N,)`, mean 1.
    """
    difference = q - np.eye(q.shape[1])[labels]
    distance = np.sqrt(np.sum(difference**2, axis=1))
    negentropy = np.sum(scipy.special.xlogy(q, q), axis=1)
    mean_distance = np.mean(weight * distance)
    return float(mean_distance**2 + np.mean(weight * negentropy**2))


def one_teacher(examples: Examples, name: str) -> np.ndarray:
    """Return the probabilities of the only teacher, `(N, C)`."""
    shapes = [t.shape for t in examples.teacher_probs]
    if len(shapes) != 1 or shapes[0][1] != examples.num_classes:
        counts = [shape[1] for shape in shapes]
        raise ValueError(
            f'The search method "{name}" takes one teacher with the classes '
            'of the labels. Use method="ridge". Received: '
            f"{len(shapes)} teacher(s) with {counts} classes, labels with "
            f"{examples.num_classes} classes"
        )
    return examples.teacher_probs[0]


def kept_classes(examples: Examples) -> tuple[int, ...]:
    """Return the classes that should keep the teacher's probabilities."""
    if examples.random_sample:
        return ()
    counts = np.bincount(examples.labels, minlength=examples.num_classes)
    return tuple(np.flatnonzero(counts == 0).tolist())


def keep_classes(
    q: np.ndarray, t: np.ndarray, kept: tuple[int, ...]
) -> np.ndarray:
    """Return `q`, normalized, with the kept classes as in `t`, `(N, C)`."""
    if not kept:
        return q
    q = q.copy()
    q[:, kept] = 0.0
    total = q.sum(axis=1, keepdims=True)
    q *= (1.0 - t[:, kept].sum(axis=1, keepdims=True)) / np.maximum(
        total, np.finfo("float64").tiny
    )
    q[:, kept] = t[:, kept]
    return q
