"""Calibration and epsilon chosen by cross-validation: the default search.

    q = softmax(A log proxy(softmax(s z), epsilon) + b)

In two stages. The base: the teacher at its best temperature `1 / s`, with
epsilon = 0 or with shared coefficients, which bend its confidence as no linear
map can. Then the ladder on either base: nothing, a vector or a matrix `A`, with
`b`, at ever weaker penalties.
"""

import dataclasses
import functools
from collections.abc import Collection

import numpy as np

from keras_ptloss._calibration import Calibration, log_probabilities
from keras_ptloss._checks import check_count, check_number, fail
from keras_ptloss._correction import Correction
from keras_ptloss.search._examples import Examples
from keras_ptloss.search._fit import (
    SCALES,
    UPPER,
    Form,
    Point,
    fit,
    proxy,
)
from keras_ptloss.search._folds import parts_of
from keras_ptloss.search._linear import (
    LinearFit,
    all_right,
    bounds_of_scale,
    fit_linear,
    fit_temperature,
)
from keras_ptloss.search._notes import (
    notes_on_epsilon,
    notes_on_right,
    notes_on_scale,
)
from keras_ptloss.search._objectives import Objective
from keras_ptloss.search._progress import Progress
from keras_ptloss.search._stack_choice import choose_stack
from keras_ptloss.search._standings import (
    PENALTIES,
    Candidate,
    Standings,
)
from keras_ptloss.search._strategy import Found

# A matrix of more numbers than this for each example is left out: it could
# not be told from noise, and at C = 1000 would take hours.
NUMBERS_PER_EXAMPLE = 40


@dataclasses.dataclass(frozen=True)
class CrossValidatedSearch:
    """Choose calibration and epsilon on held-out folds; the default search.

    The candidates: the teacher as it is (plain KL); at a temperature; that
    with shared coefficients epsilon; and each of the latter two followed by a
    vector or a matrix scaling at several penalties (`CalibrationSearch`). The
    simplest kind within one standard error of the best is chosen, so that the
    result is not worse than plain KL or temperature scaling by more than what
    so few labels leave open: by .017 nats at most in 134 cases of 300 or 1,000
    labels (`benchmarks/results/choice.md`).

    Of several teachers, candidates are their geometric mean, as they are and
    with a weight each (in the place of a temperature), and a vector or a matrix
    scaling of all together, without epsilon. Of teachers whose classes are not
    the labels', the labels' frequencies and a matrix.

    `trials` of the result has a row a candidate: `epsilon` (`"zero"` or
    `"shared"`), `calibration`, `penalty`, `parameters` (their number), `score`
    and its `gain` over plain KL on the held-out folds, the gain's
    `standard_error`, whether `chosen`.

    Args:
        order: number of coefficients M.
        penalty: weight of the squared coefficients.
        calibrations: what may stand on a base: of `"vector"` and `"matrix"`.
        folds: number of folds; below 300 examples they are dealt out several
            times.

    Raises:
        ValueError: if an argument is not of this form.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> truth = rng.dirichlet([1.0, 1.0, 1.0], size=300)
        >>> labels = np.array([rng.choice(3, p=row) for row in truth])
        >>> confused = truth @ [[0.6, 0.4, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1]]
        >>> result = ProxyTeacherSearch(CrossValidatedSearch(order=2)).search(
        ...     confused, labels
        ... )
        >>> result.score < result.score_at_zero
        True

    Reference:
        Berta et al. 2025 (https://arxiv.org/abs/2511.03685) for the ridge;
        Breiman et al. 1984, Classification and Regression Trees, for the rule.
    """

    order: int = 5
    penalty: float = 0.001
    calibrations: tuple[str, ...] = ("vector", "matrix")
    folds: int = 5

    name = "cross_validation"
    objective = "nll"
    several = True
    by_class = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_count("order", self.order)
        check_number("penalty", self.penalty, at_least=0.0)
        names, known = self.calibrations, ["vector", "matrix"]
        several = isinstance(names, Collection) and not isinstance(names, str)
        if not several or not all(name in known for name in names):
            fail("calibrations", 'of "vector" and "matrix"', names)
        check_count("folds", self.folds, at_least=2)

    def run(
        self,
        examples: Examples,
        objective: Objective,
        *,
        seed: int,
        progress: Progress,
    ) -> Found:
        """Search on the examples."""
        count = len(examples.labels)
        if count < 2 * self.folds:
            fail("folds", f"at most half the {count} examples", self.folds)
        calibrations, notes = self._fitting(examples)
        if examples.teachers is not None:
            return choose_stack(
                examples,
                objective,
                calibrations=calibrations,
                folds=self.folds,
                seed=seed,
                progress=progress,
                notes=tuple(notes),
            )
        race = _Race(self, examples, objective, seed, progress)
        if _nothing_to_tell(examples):
            notes.append(
                f"the teacher is right on all {count} rows, as it says it "
                "should be: they cannot tell what to correct, more rows might"
            )
            race.run((), [])
        else:
            notes += notes_on_right(examples)
            race.run(("zero", "shared"), calibrations)
        chosen = race.standings.chosen()
        candidate = race.standings.candidates[chosen]
        correction = race.refit(candidate)
        return Found(
            correction=correction,
            trials=race.standings.columns(chosen),
            per_class=candidate.calibration in ("vector", "matrix"),
            solves=race.solves,
            unconverged=race.unconverged,
            notes=(*notes, *_notes_on_bounds(candidate, correction)),
        )

    def _fitting(self, examples: Examples) -> tuple[list[str], list[str]]:
        """Return the calibrations that the examples can tell, and a note."""
        calibrations = list(self.calibrations)
        count, columns = examples.logits.shape
        numbers = examples.classes * columns
        if numbers <= NUMBERS_PER_EXAMPLE * count or (
            "matrix" not in calibrations
        ):
            return calibrations, []
        calibrations.remove("matrix")
        note = (
            f"no matrix of {examples.classes} x {columns} was tried: {count} "
            "examples are too few for it"
        )
        return calibrations, [note]


def _notes_on_bounds(
    candidate: Candidate, found: Correction
) -> tuple[str, ...]:
    """Say what of the chosen candidate ended at a bound."""
    notes: tuple[str, ...] = ()
    last = found.scale
    if candidate.epsilon == "shared":
        notes += notes_on_scale(found.scale, SCALES)
        notes += notes_on_epsilon(found.epsilon, UPPER, calibrated=True)
        last = found.proxy_scale
    if candidate.calibration != "matrix":
        bounds = bounds_of_scale(candidate.calibration)
        notes += notes_on_scale(last, bounds)
    return notes


def _nothing_to_tell(examples: Examples) -> bool:
    """Return whether the teacher made no error, nor was due to.

    Any sharpening then looks good on all folds, and bad on the first error to
    come. None is seen of N rows with a probability of 5 % where 3 are due.
    """
    due = np.sum(1.0 - examples.probabilities.max(axis=1))
    return all_right(examples.logits, examples.labels) and bool(due <= 3.0)


class _Base:
    """The teacher at its temperature, with or without epsilon."""

    def __init__(
        self,
        search: CrossValidatedSearch,
        examples: Examples,
        objective: Objective,
        epsilon: str,
    ) -> None:
        self.examples, self.objective = examples, objective
        scale = fit_temperature(examples.logits, examples.targets, objective)
        self.scale, self.epsilon = np.asarray(scale), np.zeros(1)
        self.solves = self.unconverged = 0
        self.bent = epsilon == "shared" and not all_right(
            examples.logits, examples.labels
        )
        if self.bent:
            form = Form("temperature", False, search.order, search.penalty)
            begin = Point.start(form, examples.classes, scale)
            fitted = fit(form, examples, objective, begin=begin, precise=False)
            self.scale, self.epsilon = fitted.point.scale, fitted.point.epsilon
            self.solves = fitted.evaluations * len(examples.labels)
            self.unconverged = fitted.unconverged

    def apply(self, examples: Examples) -> np.ndarray:
        """Return the base's distributions, `(N, C)`."""
        t = examples.calibrated(Calibration(self.scale))
        return proxy(t, self.epsilon)[0]

    def logits(self, examples: Examples) -> np.ndarray:
        """Return what the ladder stands on, `(N, C)`."""
        if self.bent:
            return log_probabilities(self.apply(examples))
        return examples.logits

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """What the ladder stands on, of the base's own examples."""
        return self.logits(self.examples)

    def fit(
        self, calibration: str, penalty: float, begin: np.ndarray | None = None
    ) -> LinearFit:
        """Fit what follows the base, to the base's own examples."""
        return fit_linear(
            self.rows,
            self.examples.targets,
            self.objective,
            calibration=calibration,
            penalty=penalty,
            scale=1.0 if self.bent else float(self.scale),
            begin=begin,
        )


class _Race:
    """Held-out losses of all candidates, and the one that is chosen."""

    def __init__(
        self,
        search: CrossValidatedSearch,
        examples: Examples,
        objective: Objective,
        seed: int,
        progress: Progress,
    ) -> None:
        self.search, self.examples = search, examples
        self.objective = objective
        self.parts = parts_of(len(examples.labels), search.folds, seed)
        self.standings = Standings(
            objective,
            examples.targets,
            self.parts,
            progress,
            most=3 + 2 * len(search.calibrations) * len(PENALTIES),
        )
        self.solves = self.unconverged = 0

    def run(self, epsilons: tuple[str, ...], calibrations: list[str]) -> None:
        """Score the candidates in stages: plain KL, then base by base."""
        tests = [self.examples[test] for _, test in self.parts]
        self.standings.add(
            *self._candidate("zero", "none"), [e.probabilities for e in tests]
        )
        for epsilon in epsilons:
            bases = [
                _Base(
                    self.search, self.examples[train], self.objective, epsilon
                )
                for train, _ in self.parts
            ]
            self.solves += sum(base.solves for base in bases)
            self.unconverged += sum(base.unconverged for base in bases)
            pairs = list(zip(bases, tests, strict=True))
            self.standings.add(
                *self._candidate(epsilon, "temperature"),
                [base.apply(test) for base, test in pairs],
            )
            fits = [base.fit for base in bases]
            rows = [base.logits(test) for base, test in pairs]
            for calibration in calibrations:
                self.standings.climb(
                    *self._candidate(epsilon, calibration), fits, rows
                )

    def _candidate(
        self, epsilon: str, calibration: str
    ) -> tuple[Candidate, int]:
        """Return a candidate, and how many numbers it fits."""
        candidate = Candidate(epsilon, calibration)
        classes, order = self.examples.classes, self.search.order
        return candidate, candidate.parameters(classes, order)

    def refit(self, chosen: Candidate) -> Correction:
        """Fit the chosen candidate to all examples."""
        if chosen.calibration == "none":
            return Correction()
        base = _Base(self.search, self.examples, self.objective, chosen.epsilon)
        self.solves += base.solves
        if chosen.calibration == "temperature":
            return Correction(base.epsilon, scale=base.scale)
        map_ = base.fit(chosen.calibration, chosen.penalty).calibration
        if not base.bent:
            return Correction(scale=map_.scale, bias=map_.bias)
        return Correction(
            base.epsilon,
            scale=base.scale,
            proxy_scale=map_.scale,
            proxy_bias=map_.bias,
        )
