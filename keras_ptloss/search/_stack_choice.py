"""The correction of several teachers, chosen by cross-validation.

The candidates: the teachers together as they are, their pool, and a vector or
a matrix scaling of all at several penalties (`_stack.py`). Epsilon is 0: what
it bends before a matrix, the confidence of one teacher, the others' outputs
tell better, and each would need its own.
"""

from keras_ptloss._correction import Correction
from keras_ptloss.search._examples import Examples
from keras_ptloss.search._folds import parts_of
from keras_ptloss.search._objectives import Objective
from keras_ptloss.search._progress import Progress
from keras_ptloss.search._stack import Stack
from keras_ptloss.search._standings import (
    PENALTIES,
    Candidate,
    Standings,
)
from keras_ptloss.search._strategy import Found


def choose_stack(
    examples: Examples,
    objective: Objective,
    *,
    calibrations: list[str],
    folds: int,
    seed: int,
    progress: Progress,
    notes: tuple[str, ...],
) -> Found:
    """Score all candidates on held-out folds; fit the chosen to all examples.

    Args:
        examples: what is fitted to.
        objective: what is minimised.
        calibrations: of `"vector"` and `"matrix"`.
        folds: number of folds.
        seed: of the folds.
        progress: the bar.
        notes: of the result, put before what is found here.
    """
    parts = parts_of(len(examples.labels), folds, seed)
    stacks = [Stack.of(examples[train], objective) for train, _ in parts]
    kinds = ["none", *(["temperature"] if examples.alike else [])]
    kinds += [c for c in calibrations if examples.alike or c == "matrix"]
    standings = Standings(
        objective,
        examples.targets,
        parts,
        progress,
        most=2 + len(calibrations) * len(PENALTIES),
    )
    held_out = [examples.logits[test] for _, test in parts]
    for kind in kinds:
        candidate = Candidate("zero", kind)
        numbers = _parameters(examples, kind)
        if kind in calibrations:
            fits = [stack.fit for stack in stacks]
            standings.climb(candidate, numbers, fits, held_out)
        else:
            maps = [stack.fit(kind).calibration for stack in stacks]
            rows = zip(maps, held_out, strict=True)
            standings.add(
                candidate, numbers, [a(z, from_logits=True) for a, z in rows]
            )
    chosen = standings.chosen()
    found = standings.candidates[chosen]
    stack = Stack.of(examples, objective)
    map_ = stack.fit(found.calibration, found.penalty).calibration
    return Found(
        correction=Correction(
            scale=map_.scale, bias=map_.bias, teachers=examples.teachers
        ),
        trials=standings.columns(chosen),
        per_class=found.calibration in calibrations,
        notes=notes,
    )


def _parameters(examples: Examples, kind: str) -> int:
    """Return how many numbers are fitted."""
    classes, teachers = examples.classes, len(examples.alike)
    return {
        "none": 0 if teachers else classes,
        "temperature": teachers,
        "vector": teachers + (teachers + 1) * classes,
        "matrix": teachers + classes * (examples.logits.shape[1] + 1),
    }[kind]
