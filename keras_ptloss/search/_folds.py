"""Choose calibration, shape of epsilon and penalty by cross-validation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_ptloss._checks import fail
from keras_ptloss.search._fit import (
    CALIBRATIONS,
    SHAPES,
    Form,
    Teacher,
    fit,
    proxy,
)
from keras_ptloss.search._objectives import Objective

PENALTIES = (0.1, 0.01, 0.001)


@dataclasses.dataclass(frozen=True)
class Selection:
    """The chosen form, and all candidates column by column."""

    chosen: Form
    columns: dict[str, list[Any]]
    unconverged: int
    solves: int


def candidate_forms(order: int) -> list[Form]:
    """Return {calibration} x {zero, shared, per class} x {penalty}.

    Forms that a penalty does not touch stand once. The first is plain KL.
    """
    forms = []
    for calibration in CALIBRATIONS:
        for shape in SHAPES:
            untouched = shape == "zero" and calibration != "vector"
            for penalty in (0.0,) if untouched else PENALTIES:
                forms.append(Form(calibration, shape, order, penalty))
    return forms


def stratified_folds(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return the fold of each example, `(N,)`, every class dealt out evenly."""
    shuffle = np.random.default_rng(seed).random(len(labels))
    fold = np.empty(len(labels), dtype="int64")
    fold[np.lexsort((shuffle, labels))] = np.arange(len(labels)) % folds
    return fold


def cross_validate(
    teacher: Teacher,
    labels: np.ndarray,
    objective: Objective,
    *,
    order: int,
    upper: float,
    folds: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> Selection:
    """Score every candidate on held-out folds and choose one.

    The one-standard-error rule (Breiman et al. 1984) on paired differences:
    among the candidates whose mean score is within one standard error of the
    best's, the standard error being that of their difference over the folds,
    the one with the fewest parameters is chosen, at its best penalty. Plain KL,
    with none, is always a candidate; the choice never scores worse than it on
    the held-out folds.

    Returns:
        A `Selection`.
    """
    if len(labels) < 2 * folds:
        fail("folds", f"at most half the {len(labels)} examples", folds)
    classes = teacher.logits.shape[1]
    forms = candidate_forms(order)
    fold = stratified_folds(labels, folds, seed)
    scores = np.empty((len(forms), folds))
    unconverged = solves = 0
    for k in range(folds):
        train, held_out = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        train_rows, held_out_rows = teacher.rows(train), teacher.rows(held_out)
        begin = None
        for index, form in enumerate(forms):
            # From the strongest penalty on, each starts where the last ended.
            if form.penalty in (0.0, PENALTIES[0]):
                begin = None
            fitted = fit(
                form,
                train_rows,
                labels[train],
                objective,
                upper=upper,
                begin=begin,
                precise=False,
            )
            begin = fitted.parameters
            q, missed = proxy(
                held_out_rows.calibrated(fitted.parameters),
                fitted.parameters.epsilon,
            )
            scores[index, k] = objective.score(q, labels[held_out])
            unconverged += fitted.unconverged + missed
            solves += fitted.evaluations * len(train) + len(held_out)
            progress(k * len(forms) + index + 1, folds * len(forms))

    parameters = np.array([form.parameters(classes) for form in forms])
    chosen = choose(scores, parameters)
    mean = scores.mean(axis=1)
    gains = scores[0] - scores
    return Selection(
        chosen=forms[chosen],
        columns={
            "calibration": [form.calibration for form in forms],
            "shape": [form.shape for form in forms],
            "order": [
                0 if form.shape == "zero" else form.order for form in forms
            ],
            "penalty": [form.penalty for form in forms],
            "parameters": parameters.tolist(),
            "score": mean.tolist(),
            "gain": gains.mean(axis=1).tolist(),
            "standard_error": standard_error(gains).tolist(),
            "chosen": [index == chosen for index in range(len(forms))],
        },
        unconverged=unconverged,
        solves=solves,
    )


def choose(scores: np.ndarray, parameters: np.ndarray) -> int:
    """Choose a candidate by the one-standard-error rule.

    Args:
        scores: `(candidates, folds)`, lower being better; plain KL first.
        parameters: numbers fitted by each candidate, `(candidates,)`.

    Returns:
        The candidate with the fewest parameters, then the lowest mean score,
        among those within a standard error of the best and not above plain KL.
    """
    mean = scores.mean(axis=1)
    best = int(np.argmin(mean))
    behind = standard_error(scores - scores[best])
    within = (mean - mean[best] <= behind) & (mean <= mean[0])
    fewest = parameters[within].min()
    eligible = np.flatnonzero(within & (parameters == fewest))
    return int(eligible[np.argmin(mean[eligible])])


def standard_error(differences: np.ndarray) -> np.ndarray:
    """Return the standard error of the mean over the last axis."""
    count = differences.shape[-1]
    return differences.std(axis=-1, ddof=1) / np.sqrt(count)
