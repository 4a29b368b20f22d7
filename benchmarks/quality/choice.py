"""How should a search choose? Rules against the best that could be chosen.

    python -m benchmarks.quality.choice --data ../shared/data

Candidates are calibrations of a teacher at several penalties, as in
`CrossValidatedSearch` without epsilon. They are scored on five held-out folds
of N labelled rows, a rule chooses one from these scores, and what it chose is
judged on up to 9,000 other rows: 14 real teachers, and synthetic ones of every
kind. Of 100 rows, the folds are also dealt out three times, as the package
does. Writes `benchmarks/results/choice.md`; takes minutes on one core.
"""

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator

import numpy as np
import scipy.special
from threadpoolctl import threadpool_limits

from benchmarks.quality.proxy import RESULTS, load_teachers, machine
from keras_ptloss._calibration import Calibration, log_probabilities
from keras_ptloss.search._folds import (
    choose,
    parts_of,
    random_folds,
    standard_error,
)
from keras_ptloss.search._linear import fit_linear, fit_temperature
from keras_ptloss.search._objectives import OBJECTIVES
from keras_ptloss.search._standings import PENALTIES, Candidate

NLL = OBJECTIVES["nll"]
FOLDS = 5
SIZES = (300, 1000)
SEEDS = 2
FEW, SEEDS_OF_FEW = 100, 5
HELD_OUT = 9000

GROUPS = (
    "real",
    "unbiased",
    "over-confident",
    "confused",
    "skewed",
    "nearly perfect",
)

CANDIDATES = (
    Candidate("zero", "none"),
    Candidate("zero", "temperature"),
    *(Candidate("zero", "vector", penalty) for penalty in PENALTIES),
    *(Candidate("zero", "matrix", penalty) for penalty in PENALTIES),
)
KINDS = np.array([candidate.kind for candidate in CANDIDATES])
# Of simple to complex; of one kind, the stronger penalty is the simpler.
ORDER = ("none", "temperature", "vector", "matrix")


# --- Teachers ----------------------------------------------------------------


def synthetic(
    kind: str, classes: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a teacher of a kind and the true labels of its rows.

    Args:
        kind: `"unbiased"`: the true distribution. `"over-confident"`: at a
            temperature of 0.4. `"confused"`: it takes classes for others.
            `"skewed"`: it favours some classes. `"nearly perfect"`: 98.5 % of
            its answers are right, calibrated (even seeds) or over-confident
            (odd ones).
        classes: C.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    shape = (max(SIZES) + HELD_OUT, classes)
    if kind == "nearly perfect":
        labels = rng.integers(classes, size=shape[0])
        noise = rng.normal(size=shape)
        one_hot = np.eye(classes)[labels]
        shift = _shift_of_accuracy(0.985, noise, labels)
        # Unit Gaussians at `shift`: the true logits are shift times the point.
        sharpness = shift * (2.0 if seed % 2 else 1.0)
        points = noise + shift * one_hot
        return scipy.special.softmax(sharpness * points, axis=1), labels
    truth = scipy.special.softmax(2.0 * rng.normal(size=shape), axis=1)
    labels = np.argmax(np.log(truth) + rng.gumbel(size=shape), axis=1)
    if kind == "over-confident":
        truth = truth**2.5
    elif kind == "confused":
        other = rng.dirichlet(np.full(classes, 0.3), size=classes)
        truth = truth @ (0.6 * np.eye(classes) + 0.4 * other)
    elif kind == "skewed":
        truth = truth * np.exp(rng.normal(size=classes))
    return truth / truth.sum(axis=1, keepdims=True), labels


def _shift_of_accuracy(
    accuracy: float, noise: np.ndarray, labels: np.ndarray
) -> float:
    """Return by how much classes must lie apart to be told so well."""
    rows = np.arange(len(labels))
    others = noise.copy()
    others[rows, labels] = -np.inf
    behind = others.max(axis=1) - noise[rows, labels]
    return float(np.quantile(behind, accuracy))


def teachers(
    data: pathlib.Path, seed: int
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield `(group, rows (N, C), labels (N,))` of all teachers."""
    for _, rows, labels in load_teachers(data):
        rows = rows.astype("float64")
        rows /= rows.sum(axis=1, keepdims=True)
        yield "real", rows, labels.astype("int64")
    for kind in GROUPS[1:]:
        for classes in (2, 3, 10, 50):
            yield kind, *synthetic(kind, classes, seed)


# --- Scores ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One teacher, one set of labelled rows.

    Attributes:
        group: of the teacher.
        examples: N.
        classes: C.
        losses: held-out losses by folds, `{"random": (K, N), ...}`.
        folds: the fold of each example, likewise, `(N,)`.
        judged: NLL of each candidate, fitted to all N, on other rows, `(K,)`.
    """

    group: str
    examples: int
    classes: int
    losses: dict[str, np.ndarray]
    folds: dict[str, np.ndarray]
    judged: np.ndarray


def stratified_folds(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return folds among which each class is dealt out evenly, `(N,)`."""
    shuffled = np.random.default_rng(seed).random(len(labels))
    fold = np.empty(len(labels), dtype=int)
    fold[np.lexsort((shuffled, labels))] = np.arange(len(labels)) % folds
    return fold


def losses_of(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
) -> np.ndarray:
    """Fit all candidates to `train`; return their losses `(K, N)` on `test`.

    The rows are logits.
    """
    scale = fit_temperature(train, labels, NLL)
    begin: dict[str, np.ndarray] = {}
    losses = []
    for candidate in CANDIDATES:
        if candidate.calibration == "none":
            calibration = Calibration()
        elif candidate.calibration == "temperature":
            calibration = Calibration(scale)
        else:
            fitted = fit_linear(
                train,
                labels,
                NLL,
                calibration=candidate.calibration,
                penalty=candidate.penalty,
                scale=scale,
                begin=begin.get(candidate.calibration),
            )
            begin[candidate.calibration] = fitted.parameters
            calibration = fitted.calibration
        q = calibration(test, from_logits=True)
        losses.append(NLL.per_example(q, test_labels))
    return np.stack(losses)


def _parts(fold: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the rows fitted and those held out, of one deal of folds."""
    return [
        (np.flatnonzero(fold != k), np.flatnonzero(fold == k))
        for k in range(FOLDS)
    ]


def run_case(
    group: str, rows: np.ndarray, labels: np.ndarray, examples: int, seed: int
) -> Case:
    """Score the candidates on one set of `examples` rows."""
    z = log_probabilities(rows)
    order = np.random.default_rng(seed).permutation(len(labels))
    few, rest = order[:examples], order[examples : examples + HELD_OUT]
    folds = {"random": random_folds(examples, FOLDS, seed)}
    if examples > FEW:
        folds["stratified"] = stratified_folds(labels[few], FOLDS, seed)
    deals = {name: _parts(fold) for name, fold in folds.items()}
    if examples == FEW:
        folds["several deals"] = folds["random"]
        deals["several deals"] = parts_of(examples, FOLDS, seed)
    losses = {name: np.zeros((len(CANDIDATES), examples)) for name in deals}
    for name, parts in deals.items():
        for train, test in parts:
            losses[name][:, test] += losses_of(
                z[few[train]], labels[few[train]],
                z[few[test]], labels[few[test]],
            ) * (FOLDS / len(parts))  # fmt: skip
    judged = losses_of(z[few], labels[few], z[rest], labels[rest]).mean(axis=1)
    return Case(group, examples, rows.shape[1], losses, folds, judged)


# --- Rules -------------------------------------------------------------------

Rule = Callable[[np.ndarray, np.ndarray, int], int]


def parameters(classes: int) -> np.ndarray:
    """Return how many numbers each candidate fits."""
    return np.array([c.parameters(classes, 0) for c in CANDIDATES])


def lowest(losses: np.ndarray, fold: np.ndarray, classes: int) -> int:
    """The lowest mean."""
    return int(losses.mean(axis=1).argmin())


def of_fold_means(losses: np.ndarray, fold: np.ndarray, classes: int) -> int:
    """One standard error of the differences of the five fold means."""
    scores = np.stack(
        [losses[:, fold == k].mean(axis=1) for k in range(FOLDS)], axis=1
    )
    return choose(scores, KINDS, parameters(classes))


def of_examples(losses: np.ndarray, fold: np.ndarray, classes: int) -> int:
    """One standard error of paired examples, per kind: the package's."""
    return choose(losses, KINDS, parameters(classes))


def of_examples_twice(
    losses: np.ndarray, fold: np.ndarray, classes: int
) -> int:
    """Two standard errors of paired examples, per kind."""
    mean = losses.mean(axis=1)
    best_of_kind = [
        min(np.flatnonzero(kind == KINDS), key=lambda i: mean[i])
        for kind in np.unique(KINDS)
    ]
    behind = losses - losses[mean.argmin()]
    within = behind.mean(axis=1) <= 2.0 * standard_error(behind)
    few = parameters(classes)
    return int(
        min((i for i in best_of_kind if within[i]), key=lambda i: few[i])
    )


def simplest(losses: np.ndarray, fold: np.ndarray, classes: int) -> int:
    """One standard error of paired examples, strongest penalty within it."""
    best = losses.mean(axis=1).argmin()
    behind = losses - losses[best]
    within = behind.mean(axis=1) <= standard_error(behind)
    # Candidates stand from simple to complex, strong to weak penalties.
    return int(np.flatnonzero(within)[0])


def forward(losses: np.ndarray, fold: np.ndarray, classes: int) -> int:
    """From simple to complex, to what gains more than a standard error."""
    mean, current = losses.mean(axis=1), 0
    for calibration in ORDER[1:]:
        of_kind = np.flatnonzero(f"zero {calibration}" == KINDS)
        best = int(of_kind[mean[of_kind].argmin()])
        gain = losses[current] - losses[best]
        if gain.mean() > standard_error(gain):
            current = best
    return current


def always(index: int) -> Rule:
    """Return a rule that looks at nothing."""
    return lambda losses, fold, classes: index


PACKAGES = "one SE, paired examples, per kind (the package's)"
RULES: dict[str, Rule] = {
    "lowest mean": lowest,
    "one SE, fold means": of_fold_means,
    PACKAGES: of_examples,
    "two SE, paired examples, per kind": of_examples_twice,
    "one SE, paired examples, strongest penalty": simplest,
    "forward, one SE, paired examples": forward,
    "always temperature": always(1),
    "always structured matrix scaling": always(
        CANDIDATES.index(Candidate("zero", "matrix", 1.0))
    ),
}


# --- Report ------------------------------------------------------------------


def regrets(
    cases: list[Case], rule: Rule, folds: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return NLL above the best candidate, and above plain KL / temperature.

    The latter is above the better of the two; both `(cases,)`, in 0.001 nats.
    """
    chosen = [rule(c.losses[folds], c.folds[folds], c.classes) for c in cases]
    values = np.array(
        [
            (c.judged[k] - c.judged.min(), c.judged[k] - c.judged[:2].min())
            for c, k in zip(cases, chosen, strict=True)
        ]
    )
    return 1000.0 * values[:, 0], 1000.0 * values[:, 1]


def cell(cases: list[Case], rule: Rule, folds: str) -> str:
    """Return mean regret / the worst case above the better simple one."""
    best, simple = regrets(cases, rule, folds)
    return f"{best.mean():.1f} / {simple.max():+.1f}"


def cells_of_groups(cases: list[Case], rule: Rule, folds: str) -> str:
    """Return the cells of all groups, and of all cases."""
    groups = [[c for c in cases if c.group == group] for group in GROUPS]
    return " | ".join(cell(some, rule, folds) for some in (*groups, cases))


def table(cases: list[Case]) -> list[str]:
    """Return the rules by groups, on random folds."""
    lines = [
        "",
        "| rule | " + " | ".join(GROUPS) + " | all |",
        "|---" * (len(GROUPS) + 2) + "|",
    ]
    for name, rule in RULES.items():
        cells = cells_of_groups(cases, rule, "random")
        lines.append(f"| {name} | {cells} |")
    return lines


def table_of_few(cases: list[Case]) -> list[str]:
    """Return one deal of folds against several, of few rows, by groups."""
    lines = [
        "",
        "| rule | folds | " + " | ".join(GROUPS) + " | all |",
        "|---" * (len(GROUPS) + 3) + "|",
    ]
    for name in ("lowest mean", PACKAGES):
        for folds in ("random", "several deals"):
            cells = cells_of_groups(cases, RULES[name], folds)
            lines.append(f"| {name} | {folds} | {cells} |")
    return lines


def table_of_folds(cases: list[Case]) -> list[str]:
    """Return random against stratified folds by labels a class."""
    ranges = {
        "6 to 10": (0, 11),
        "20 to 30": (11, 31),
        "100": (31, 101),
        "more": (101, np.inf),
    }
    lines = [
        "",
        "| rule | folds | " + " | ".join(ranges) + " |",
        "|---" * (len(ranges) + 2) + "|",
    ]
    names = list(RULES)[:6]
    for name in names:
        for folds in ("random", "stratified"):
            cells = []
            for low, high in ranges.values():
                some = [
                    c for c in cases if low <= c.examples / c.classes < high
                ]
                cells.append(cell(some, RULES[name], folds))
            lines.append(f"| {name} | {folds} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Run all cases, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, default="../shared/data")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    begin = time.process_time()
    cases, of_few = [], []
    with threadpool_limits(limits=1, user_api="blas"):
        for seed in range(SEEDS):
            for group, rows, labels in teachers(arguments.data, seed):
                for examples in SIZES:
                    if examples < 5 * rows.shape[1]:
                        continue  # the package leaves rare classes alone
                    case = run_case(group, rows, labels, examples, seed)
                    cases.append(case)
                    print(
                        group, case.classes, examples, seed,
                        np.round(case.judged, 3),
                        flush=True,
                    )  # fmt: skip
        for seed in range(SEEDS_OF_FEW):
            for group, rows, labels in teachers(arguments.data, seed):
                if rows.shape[1] in (3, 10):
                    of_few.append(run_case(group, rows, labels, FEW, seed))
    lines = [
        "# The choice rule",
        "",
        "`KERAS_BACKEND=jax python -m benchmarks.quality.choice --data "
        "../shared/data`",
        "",
        machine(),
        f"{time.process_time() - begin:.0f} s of one core.",
        "",
        f"{len(cases)} cases: 14 real teachers, and synthetic ones of 2, 3, 10 "
        f"and 50 classes; {' and '.join(map(str, SIZES))} labelled rows (where "
        f"there are 5 a class or more), {SEEDS} draws of them. Nearly perfect: "
        "98.5 % of the teacher's answers are right, calibrated or "
        "over-confident. Each cell, in 0.001 nats of NLL on up to "
        f"{HELD_OUT:,} other rows: mean above the best candidate (regret) / "
        "the worst case above the better of plain KL and temperature scaling "
        "(below 0: better than both in all cases).",
        "",
        "## Rules, on random folds",
        *table(cases),
        "",
        "## Random against stratified folds, by labels a class",
        *table_of_folds(cases),
        "",
        f"## {FEW} rows: the folds dealt out once, or three times",
        "",
        f"{len(of_few)} cases, {SEEDS_OF_FEW} draws of each teacher. Among the "
        "nearly perfect are teachers without an error in their rows, which the "
        "search leaves as they are.",
        *table_of_few(of_few),
    ]
    report = "\n".join(lines) + "\n"
    (arguments.output / "choice.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
