"""The paper's Algorithm 1: random draws of epsilon."""

import dataclasses
from typing import Any

import numpy as np

from keras_ptloss._checks import check_choice, check_count, check_flag, fail
from keras_ptloss._cores import block_elements
from keras_ptloss._correction import Correction
from keras_ptloss.proxy._blocks import TOLERANCE, solve_newton
from keras_ptloss.proxy._proxy_teacher import SOLVERS, proxy_teacher
from keras_ptloss.search._examples import Examples
from keras_ptloss.search._labels import rare_classes
from keras_ptloss.search._objectives import Objective
from keras_ptloss.search._progress import Progress
from keras_ptloss.search._strategy import Found


@dataclasses.dataclass(frozen=True)
class RandomSearch:
    """Draw epsilon at random and keep the best: the paper's Algorithm 1.

    For each order up to `order`, `trials` sets of coefficients are drawn
    uniformly from `space`. epsilon = 0, plain KL, stands for election too.
    `trials` of the result has the columns `order`, `score`, `unconverged`
    rows, `epsilon`, and whether it is the `best_of_order`.

    Args:
        order: highest number of coefficients M.
        trials: draws for each order.
        space: bounds of the draws, `(low, high)`.
        per_class: whether each class has its own coefficients; one of fewer
            than 5 labels takes the mean of the others', by built-in objectives
            (what is best by "risk" may be worse for it than the teacher is).
        solver: `"newton"`, or `"fsolve"`, the paper's.

    Raises:
        ValueError: if an argument is not of this form.

    Example:
        >>> search = ProxyTeacherSearch(RandomSearch(order=2, trials=10))
        >>> result = search.search([[0.7, 0.3], [0.4, 0.6]], [0, 1])
        >>> len(result.trials["score"])
        20

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), Algorithm 1.
    """

    order: int = 5
    trials: int = 100
    space: tuple[float, float] = (-1.0, 10.0)
    per_class: bool = False
    solver: str = "newton"

    name = "random"
    objective = "risk"
    several = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_count("order", self.order)
        check_flag("per_class", self.per_class)
        check_count("trials", self.trials)
        object.__setattr__(self, "space", _check_space(self.space))
        check_choice("solver", self.solver, SOLVERS)

    @property
    def by_class(self) -> bool:
        """Whether it fits numbers of single classes."""
        return self.per_class

    def run(
        self,
        examples: Examples,
        objective: Objective,
        *,
        seed: int,
        progress: Progress,
    ) -> Found:
        """Search on the examples."""
        teacher, targets = examples.probabilities, examples.targets
        epsilons = self._draws(teacher.shape[1], seed)
        if self.per_class and targets.ndim > 1:
            # Of the rare ones the best of some draws is a draw by chance.
            rare = rare_classes(examples.labels, examples.classes)
            epsilons = [as_the_others(epsilon, rare) for epsilon in epsilons]
        scores: list[float] = []
        unconverged: list[int] = []
        # Trials differ in their steps: few together waste few.
        at_once = max(1, block_elements() // 2 // teacher.size)
        # Those whose blocks are shared out together, within 32 MiB.
        size = at_once * max(1, min(16, 2**22 // (at_once * teacher.size)))
        for start in range(0, len(epsilons), size):
            chunk = epsilons[start : start + size]
            q, missed = self._proxies(teacher, chunk, at_once)
            scores.extend(float(objective.score(row, targets)) for row in q)
            unconverged.extend(int(count) for count in missed)
            progress.update(start + len(chunk), len(epsilons))
        if not np.all(np.isfinite(scores)):
            bad = int(np.argmin(np.isfinite(scores)))
            raise ValueError(
                "`objective` must return finite scores. Received: "
                f"{objective.name} = {scores[bad]} in trial {bad}, "
                f"epsilon={epsilons[bad].tolist()}"
            )
        best_of_order = [
            first + int(np.argmin(scores[first : first + self.trials]))
            for first in range(0, len(epsilons), self.trials)
        ]
        best = int(np.argmin(scores))
        epsilon = epsilons[best]
        if not scores[best] < objective.score(teacher, targets):
            epsilon = np.zeros_like(epsilon)
        return Found(
            correction=Correction(epsilon),
            trials={
                "order": [epsilon.shape[-1] for epsilon in epsilons],
                "score": scores,
                "unconverged": unconverged,
                "epsilon": epsilons,
                "best_of_order": [
                    index in best_of_order for index in range(len(epsilons))
                ],
            },
            solves=len(epsilons) * len(teacher),
            unconverged=sum(unconverged),
            per_class=self.per_class,
        )

    def _draws(self, classes: int, seed: int) -> list[np.ndarray]:
        draw = np.random.default_rng(seed).uniform
        rows = (self.trials, classes) if self.per_class else (self.trials,)
        return [
            epsilon
            for m in range(1, self.order + 1)
            for epsilon in draw(*self.space, size=(*rows, m))
        ]

    def _proxies(
        self, teacher: np.ndarray, epsilons: list[np.ndarray], at_once: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return proxies `(K, N, C)` of K trials and their unconverged rows."""
        if self.solver == "fsolve":
            results = [
                proxy_teacher(teacher, epsilon, solver="fsolve")
                for epsilon in epsilons
            ]
            return (
                np.stack([result.probabilities for result in results]),
                np.array([np.sum(~result.converged) for result in results]),
            )
        # One compiled shape: lower orders and absent trials are zeros.
        rows = teacher.shape[1] if self.per_class else 1
        missing = -len(epsilons) % at_once
        padded = np.zeros((len(epsilons) + missing, rows, self.order))
        for k, epsilon in enumerate(epsilons):
            padded[k, :, : epsilon.shape[-1]] = epsilon
        q, _, residual, _ = solve_newton(teacher, padded, at_once=at_once)
        missed = np.sum(residual > TOLERANCE, axis=1)
        return q[: len(epsilons)], missed[: len(epsilons)]


def as_the_others(epsilon: np.ndarray, rare: np.ndarray) -> np.ndarray:
    """Return `(C, M)` with the mean of the other classes for the rare ones."""
    if len(rare) == len(epsilon):
        return np.zeros_like(epsilon)
    epsilon = epsilon.copy()
    epsilon[rare] = np.delete(epsilon, rare, axis=0).mean(axis=0)
    return epsilon


def _check_space(space: Any) -> tuple[float, float]:
    try:
        low, high = (float(bound) for bound in space)
    except (TypeError, ValueError):
        fail("space", "two numbers, (low, high)", space)
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        fail("space", "two finite numbers, the lower one first", space)
    return low, high
