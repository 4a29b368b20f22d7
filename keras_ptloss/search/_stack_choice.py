"""The correction of several teachers, chosen by cross-validation.

The candidates: the teachers together as they are, their pool, and a vector or
a matrix scaling of all at several penalties (`_stack.py`). Epsilon is 0: what
it bends before a matrix, the confidence of one teacher, the others' outputs
tell better, and each would need its own.
"""

from typing import Any

import numpy as np

from keras_ptloss._correction import Correction
from keras_ptloss.search._examples import Examples
from keras_ptloss.search._folds import choose, random_folds, standard_error
from keras_ptloss.search._objectives import Objective
from keras_ptloss.search._progress import Progress
from keras_ptloss.search._stack import Stack
from keras_ptloss.search._strategy import Found


def choose_stack(
    examples: Examples,
    objective: Objective,
    *,
    calibrations: list[str],
    penalties: tuple[float, ...],
    folds: int,
    from_logits: Any,
    seed: int,
    progress: Progress,
    notes: tuple[str, ...],
) -> Found:
    """Score all candidates on held-out folds; fit the chosen to all examples.

    Args:
        examples: what is fitted to.
        objective: what is minimised.
        calibrations: of `"vector"` and `"matrix"`.
        penalties: of the ladder, the strongest first.
        folds: number of folds.
        from_logits: whether each teacher's outputs are logits.
        seed: of the folds.
        progress: the bar.
        notes: of the result, put before what is found here.
    """
    fold = random_folds(len(examples.labels), folds, seed)
    parts = [(fold != k, fold == k) for k in range(folds)]
    stacks = [Stack.of(examples[train], objective) for train, _ in parts]
    kinds = ["none", *(["temperature"] if examples.alike else [])]
    kinds += [c for c in calibrations if examples.alike or c == "matrix"]
    candidates: list[tuple[str, float]] = []
    losses: list[np.ndarray] = []
    for kind in kinds:
        begins: list[Any] = [None] * folds
        scores: list[float] = []
        for penalty in penalties if kind in calibrations else (0.0,):
            held_out = []
            for k, (_, test) in enumerate(parts):
                fitted = stacks[k].fit(kind, penalty, begins[k])
                begins[k] = fitted.parameters if kind in calibrations else None
                q = fitted.calibration(examples.logits[test], from_logits=True)
                held_out.append(_losses(objective, q, examples.targets[test]))
            candidates.append((kind, penalty))
            losses.append(np.concatenate(held_out))
            progress.update(
                len(candidates), 2 + len(calibrations) * len(penalties)
            )
            scores.append(float(losses[-1].mean()))
            # As the ladder of one teacher: until two have made it worse.
            if len(scores) > 2 and min(scores[-2:]) > min(scores[:-2]):
                break
    parameters = [_parameters(examples, kind) for kind, _ in candidates]
    chosen = _choice(np.stack(losses), candidates, parameters, objective)
    map_ = Stack.of(examples, objective).fit(*candidates[chosen]).calibration
    return Found(
        correction=Correction(
            scale=map_.scale,
            bias=map_.bias,
            teachers=examples.teachers,
            teacher_from_logits=from_logits,
        ),
        trials=_columns(candidates, parameters, np.stack(losses), chosen),
        solves=0,
        unconverged=0,
        per_class=candidates[chosen][0] in calibrations,
        notes=notes,
    )


def _losses(
    objective: Objective, q: np.ndarray, targets: np.ndarray
) -> np.ndarray:
    """Return the losses of a fold, `(N,)`, or `(1,)` of one without examples.

    An objective of the user's may be no mean over the examples.
    """
    if objective.per_example is None:
        return np.array([float(objective.score(q, targets))])
    return objective.per_example(q, targets)


def _parameters(examples: Examples, kind: str) -> int:
    """Return how many numbers are fitted."""
    classes, teachers = examples.classes, len(examples.alike)
    return {
        "none": 0 if teachers else classes,
        "temperature": teachers,
        "vector": teachers + (teachers + 1) * classes,
        "matrix": teachers + classes * (examples.logits.shape[1] + 1),
    }[kind]


def _choice(
    losses: np.ndarray,
    candidates: list[tuple[str, float]],
    parameters: list[int],
    objective: Objective,
) -> int:
    if not np.all(np.isfinite(losses)):
        raise ValueError(
            "`objective` must return finite scores. Received: "
            f"{objective.name} = {losses[~np.isfinite(losses)][0]}, on a "
            "held-out fold"
        )
    kinds = np.array([kind for kind, _ in candidates])
    return choose(losses, kinds, np.array(parameters))


def _columns(
    candidates: list[tuple[str, float]],
    parameters: list[int],
    losses: np.ndarray,
    chosen: int,
) -> dict[str, list[Any]]:
    """Return the candidates column by column, as those of one teacher."""
    gains = losses[0] - losses
    return {
        "epsilon": ["zero"] * len(candidates),
        "calibration": [kind for kind, _ in candidates],
        "penalty": [penalty for _, penalty in candidates],
        "parameters": parameters,
        "score": losses.mean(axis=1).tolist(),
        "gain": gains.mean(axis=1).tolist(),
        "standard_error": standard_error(gains).tolist(),
        "chosen": [i == chosen for i in range(len(candidates))],
    }
