"""Calibration alone, and what may follow epsilon."""

import dataclasses

import numpy as np

from keras_ptloss._calibration import Calibration
from keras_ptloss._checks import check_choice, check_number, fail
from keras_ptloss._correction import Correction
from keras_ptloss.search._examples import Examples
from keras_ptloss.search._linear import (
    bounds_of_scale,
    fit_linear,
    fit_temperature,
)
from keras_ptloss.search._notes import notes_on_right, notes_on_scale
from keras_ptloss.search._objectives import Objective
from keras_ptloss.search._progress import Progress
from keras_ptloss.search._stack import Stack
from keras_ptloss.search._strategy import Found

CALIBRATIONS = ("temperature", "vector", "matrix")


@dataclasses.dataclass(frozen=True)
class CalibrationSearch:
    """Calibrate the teacher, and leave epsilon at 0.

        q = softmax(A z + b)

    `"temperature"` has one number, `"vector"` a scale and a bias a class,
    `"matrix"` a full `A`, which alone can undo that a teacher takes one class
    for another. The latter two start from the temperature `1 / s` and are drawn
    to it by the ridge

        penalty C / N (sum_c D_cc^2 + b_c^2 + (C - 1) sum_{c != k} D_ck^2)

    with `A = s (I + D)`: `"matrix"` at `penalty=1` is structured matrix
    scaling (of a teacher whose logits hardly vary `D` counts in their spread,
    which is kinder to it). Of several teachers, `"temperature"` is a weight a
    teacher, and the others start from the geometric mean of all. `trials` of
    the result has one row: `calibration`, `penalty`, `score`.

    Args:
        calibration: `"temperature"`, `"vector"` or `"matrix"`.
        penalty: weight of the ridge, at least 0; None is 1, or none for a
            temperature, which has no ridge.

    Raises:
        ValueError: if an argument is not of this form.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> truth = rng.dirichlet([1.0, 1.0, 1.0], size=300)
        >>> labels = np.array([rng.choice(3, p=row) for row in truth])
        >>> confused = truth @ [[0.6, 0.4, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1]]
        >>> search = ProxyTeacherSearch(CalibrationSearch("matrix"))
        >>> result = search.search(confused, labels)
        >>> result.correction.scale.shape
        (3, 3)

    Reference:
        Guo et al. 2017, On Calibration of Modern Neural Networks; Kull et al.
        2019 (https://arxiv.org/abs/1910.12656); Berta et al. 2025
        (https://arxiv.org/abs/2511.03685).
    """

    calibration: str = "matrix"
    penalty: float | None = None

    name = "calibration"
    objective = "nll"
    several = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_choice("calibration", self.calibration, CALIBRATIONS)
        if self.penalty is None:
            return
        if not self.by_class:
            expected = "None for a temperature, which has no ridge"
            fail("penalty", expected, self.penalty)
        check_number("penalty", self.penalty, at_least=0.0)

    @property
    def ridge(self) -> float:
        """The weight of the ridge."""
        default = 1.0 if self.by_class else 0.0
        return default if self.penalty is None else self.penalty

    @property
    def by_class(self) -> bool:
        """Whether it fits numbers of single classes."""
        return self.calibration != "temperature"

    def run(
        self,
        examples: Examples,
        objective: Objective,
        *,
        seed: int,
        progress: Progress,
    ) -> Found:
        """Search on the examples."""
        calibration = self.fit(examples, objective)
        q = examples.calibrated(calibration)
        one = examples.teachers is None
        return Found(
            correction=Correction(
                scale=calibration.scale,
                bias=calibration.bias,
                teachers=examples.teachers,
            ),
            trials={
                "calibration": [self.calibration],
                "penalty": [self.ridge],
                "score": [float(objective.score(q, examples.targets))],
            },
            per_class=self.by_class,
            notes=(
                *notes_on_right(examples),
                *self.notes_on(calibration.scale),
            )
            if one
            else (),
        )

    def notes_on(self, scale: np.ndarray) -> tuple[str, ...]:
        """Say what of one teacher's scale ended at a bound."""
        if self.calibration == "matrix":
            return ()
        return notes_on_scale(scale, bounds_of_scale(self.calibration))

    def fit(self, examples: Examples, objective: Objective) -> Calibration:
        """Fit the calibration to the examples."""
        if examples.teachers is not None:
            return self._of_several(examples, objective)
        logits, targets = examples.logits, examples.targets
        scale = fit_temperature(logits, targets, objective)
        if self.calibration == "temperature":
            return Calibration(scale)
        return fit_linear(
            logits,
            targets,
            objective,
            calibration=self.calibration,
            penalty=self.ridge,
            scale=scale,
        ).calibration

    def _of_several(
        self, examples: Examples, objective: Objective
    ) -> Calibration:
        if not examples.alike and self.calibration != "matrix":
            fail(
                "calibration",
                '"matrix" where no teacher has the classes of the labels',
                self.calibration,
            )
        stack = Stack.of(examples, objective)
        found = stack.fit(self.calibration, self.ridge).calibration
        # No fit starts at the teachers as they are: it may end above them.
        return min(
            (found, stack.fit("none").calibration),
            key=lambda one: float(
                objective.score(examples.calibrated(one), examples.targets)
            ),
        )
