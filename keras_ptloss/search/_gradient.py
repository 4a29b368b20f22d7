"""Descent along the exact gradient, for calibration and epsilon together."""

import dataclasses

import numpy as np

from keras_ptloss._checks import (
    check_count,
    check_flag,
    check_number,
    fail,
)
from keras_ptloss._correction import Correction
from keras_ptloss.search._calibration_search import CalibrationSearch
from keras_ptloss.search._examples import Examples
from keras_ptloss.search._fit import (
    CALIBRATIONS,
    SCALES,
    UPPER,
    Form,
    Point,
    fit,
    proxy,
)
from keras_ptloss.search._linear import fit_temperature
from keras_ptloss.search._notes import (
    notes_on_descent,
    notes_on_epsilon,
    notes_on_scale,
)
from keras_ptloss.search._objectives import Objective
from keras_ptloss.search._progress import Progress
from keras_ptloss.search._strategy import Found


@dataclasses.dataclass(frozen=True)
class GradientSearch:
    """Descend along the exact gradient, from the teacher or its temperature.

    Calibration and epsilon are fitted together, or one after the other, epsilon
    inside the region where the loss is convex, `epsilon_m >= -1/m`. What it
    finds is a PTLoss, whatever the calibration: it is ahead of epsilon.
    `trials` of the result has one row: `order`, `score`, `unconverged` rows,
    `epsilon`.

    Args:
        order: number of coefficients M.
        per_class: whether each class has its own coefficients. Only these can
            move probability between classes, that is, repair a biased teacher.
        calibration: ahead of epsilon: `"none"`, `"temperature"` or `"vector"`
            (a scale and a bias a class), fitted together with it; or a
            `CalibrationSearch(...)`, which is run first, alone. `"matrix"` is
            `CalibrationSearch("matrix")`.
        penalty: weight of the squared parameters, at least 0; a
            `CalibrationSearch` has its own.
        starts: starts of the descent: the teacher as it is (at its best
            temperature, where that is fitted too), and random ones.

    Raises:
        ValueError: if an argument is not of this form.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> truth = rng.dirichlet([1.0, 1.0, 1.0], size=300)
        >>> labels = np.array([rng.choice(3, p=row) for row in truth])
        >>> teacher = truth * [1.0, 0.2, 0.2]  # biased to class 0
        >>> teacher /= teacher.sum(axis=1, keepdims=True)
        >>> search = ProxyTeacherSearch(GradientSearch(order=2, per_class=True))
        >>> result = search.search(teacher, labels)
        >>> result.score < result.score_at_zero
        True

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), §4.2, for the
        proxy teacher; Guo et al. 2017 for the calibrations.
    """

    order: int = 5
    per_class: bool = False
    calibration: str | CalibrationSearch = "none"
    penalty: float = 0.0
    starts: int = 1

    name = "gradient"
    objective = "nll"
    several = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_count("order", self.order)
        check_flag("per_class", self.per_class)
        if self.calibration == "matrix":
            object.__setattr__(self, "calibration", CalibrationSearch("matrix"))
        if not isinstance(self.calibration, CalibrationSearch):
            known = (*CALIBRATIONS, "matrix")
            if self.calibration not in known:
                names = ", ".join(map(repr, known))
                expected = f"{names}, or a CalibrationSearch"
                fail("calibration", expected, self.calibration)
        check_number("penalty", self.penalty, at_least=0.0)
        check_count("starts", self.starts)

    @property
    def by_class(self) -> bool:
        """Whether it fits numbers of single classes."""
        if isinstance(self.calibration, CalibrationSearch):
            return self.per_class or self.calibration.by_class
        return self.per_class or self.calibration == "vector"

    def run(
        self,
        examples: Examples,
        objective: Objective,
        *,
        seed: int,
        progress: Progress,
    ) -> Found:
        """Search on the examples."""
        together, first = self.calibration, None
        if isinstance(together, CalibrationSearch):
            first = together.fit(examples, objective)
            examples, together = examples.after(first), "none"
        form = Form(together, self.per_class, self.order, self.penalty)
        scale = 1.0
        if together != "none":
            # Rows that are surely wrong have no slope left at the teacher.
            scale = fit_temperature(
                examples.logits, examples.targets, objective
            )
        fitted = fit(
            form,
            examples,
            objective,
            starts=self.starts,
            seed=seed,
            begin=Point.start(form, examples.classes, scale),
        )
        point = fitted.point
        q, _ = proxy(examples.calibrated(point.calibration), point.epsilon)
        calibration = first or point.calibration
        calibrated = self.calibration != "none"
        return Found(
            correction=Correction(
                point.epsilon, scale=calibration.scale, bias=calibration.bias
            ),
            trials={
                "order": [self.order],
                "score": [float(objective.score(q, examples.targets))],
                "unconverged": [fitted.unconverged],
                "epsilon": [point.epsilon],
            },
            solves=fitted.evaluations * len(q),
            unconverged=fitted.unconverged,
            per_class=self.by_class,
            notes=(
                *self._notes_on_scale(calibration.scale),
                *notes_on_descent(point.epsilon, calibrated=calibrated),
                *notes_on_epsilon(point.epsilon, UPPER, calibrated=calibrated),
            ),
        )

    def _notes_on_scale(self, scale: np.ndarray) -> tuple[str, ...]:
        if isinstance(self.calibration, CalibrationSearch):
            return self.calibration.notes_on(scale)
        return notes_on_scale(scale, SCALES)
