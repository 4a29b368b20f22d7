"""Candidates of a cross-validation, their held-out losses, and the choice."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_ptloss.search._folds import choose, standard_error
from keras_ptloss.search._linear import LinearFit
from keras_ptloss.search._objectives import Objective
from keras_ptloss.search._progress import Progress

# Penalties of the ladder, in units of structured matrix scaling's ridge.
PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What stands for election.

    Attributes:
        epsilon: `"zero"` or `"shared"`.
        calibration: `"none"`, `"temperature"`, `"vector"` or `"matrix"`; the
            latter two follow epsilon where there is one.
        penalty: of the ridge.
    """

    epsilon: str
    calibration: str
    penalty: float = 0.0

    @property
    def kind(self) -> str:
        """What it is, its penalty apart."""
        return f"{self.epsilon} {self.calibration}"

    def parameters(self, classes: int, order: int) -> int:
        """Return how many numbers are fitted, of one teacher."""
        calibration = {
            "none": 0,
            "temperature": 1,
            "vector": 1 + 2 * classes,
            "matrix": 1 + classes + classes**2,
        }
        return calibration[self.calibration] + order * (
            self.epsilon == "shared"
        )


class Standings:
    """Held-out losses of all candidates, and the one that is chosen.

    Args:
        objective: what is judged by.
        targets: of all examples, `(N,)` or `(N, C)`.
        parts: the rows fitted and held out, part by part.
        progress: the bar.
        most: how many candidates there are at most.
    """

    def __init__(
        self,
        objective: Objective,
        targets: np.ndarray,
        parts: list[tuple[np.ndarray, np.ndarray]],
        progress: Progress,
        most: int,
    ) -> None:
        self.objective, self.targets = objective, targets
        self.held_out = [test for _, test in parts]
        self.progress, self.most = progress, most
        self.candidates: list[Candidate] = []
        self.parameters: list[int] = []
        self.losses: list[np.ndarray] = []

    def add(
        self, candidate: Candidate, parameters: int, held_out: list[np.ndarray]
    ) -> float:
        """Keep a candidate's losses; return their mean.

        They are `(N,)`, or `(folds,)` of an objective of the user's, which may
        be no mean over the examples; means over the deals.

        Args:
            candidate: the candidate.
            parameters: how many numbers it fits.
            held_out: its distributions on each part's held-out rows.
        """
        per_example = self.objective.per_example
        parts = list(zip(held_out, self.held_out, strict=True))
        deals = sum(len(i) for _, i in parts) // len(self.targets)
        if per_example is None:
            scores = [
                self.objective.score(q, self.targets[i]) for q, i in parts
            ]
            losses = np.reshape(scores, (deals, -1)).mean(axis=0)
        else:
            losses = np.zeros(len(self.targets))
            for q, i in parts:
                losses[i] += per_example(q, self.targets[i]) / deals
        self.candidates.append(candidate)
        self.parameters.append(parameters)
        self.losses.append(losses)
        self.progress.update(len(self.candidates), self.most)
        return float(self.losses[-1].mean())

    def climb(
        self,
        candidate: Candidate,
        parameters: int,
        fits: Sequence[Callable[[str, float, Any], LinearFit]],
        rows: Sequence[np.ndarray],
    ) -> None:
        """Add a candidate at ever weaker penalties, until two made it worse.

        Args:
            candidate: the candidate, without a penalty.
            parameters: how many numbers it fits.
            fits: of each part, `(calibration, penalty, begin)` to a fit;
                `begin` are the parameters of the part's last fit, or None.
            rows: each part's held-out logits.
        """
        begins: list[Any] = [None] * len(fits)
        scores: list[float] = []
        for penalty in PENALTIES:
            held_out = []
            for k, (fit, z) in enumerate(zip(fits, rows, strict=True)):
                fitted = fit(candidate.calibration, penalty, begins[k])
                begins[k] = fitted.parameters
                held_out.append(fitted.calibration(z, from_logits=True))
            rung = dataclasses.replace(candidate, penalty=penalty)
            scores.append(self.add(rung, parameters, held_out))
            if len(scores) > 2 and min(scores[-2:]) > min(scores[:-2]):
                return

    def chosen(self) -> int:
        """Return the index of the candidate that is chosen."""
        losses = np.stack(self.losses)
        if not np.all(np.isfinite(losses)):
            raise ValueError(
                "`objective` must return finite scores. Received: "
                f"{self.objective.name} = {losses[~np.isfinite(losses)][0]}, "
                "on a held-out fold"
            )
        return choose(
            losses,
            np.array([candidate.kind for candidate in self.candidates]),
            np.array(self.parameters),
        )

    def columns(self, chosen: int) -> dict[str, list[Any]]:
        """Return the candidates column by column."""
        losses = np.stack(self.losses)
        gains = losses[0] - losses
        return {
            "epsilon": [c.epsilon for c in self.candidates],
            "calibration": [c.calibration for c in self.candidates],
            "penalty": [c.penalty for c in self.candidates],
            "parameters": self.parameters,
            "score": losses.mean(axis=1).tolist(),
            "gain": gains.mean(axis=1).tolist(),
            "standard_error": standard_error(gains).tolist(),
            "chosen": [i == chosen for i in range(len(self.candidates))],
        }
