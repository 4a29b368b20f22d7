"""What a search says of the teacher and of its own result."""

import numpy as np
import scipy.optimize

from keras_ptloss._correction import Correction
from keras_ptloss.search._examples import Examples
from keras_ptloss.search._fit import UPPER
from keras_ptloss.search._folds import standard_error
from keras_ptloss.search._linear import SCALES
from keras_ptloss.search._objectives import nll, nll_per_example

# Classes with fewer labels than this carry parameters of their own badly.
FEW = 10

# A permutation is named if it makes so many more of the rows right.
GAIN_OF_PERMUTATION = 0.2


def notes_on_teacher(examples: Examples) -> list[str]:
    """Say if the teacher is worse than a constant, or its classes permuted."""
    teacher, labels = examples.probabilities, examples.labels
    notes = []
    # Laplace's rule: of classes without labels a constant would know nothing.
    frequencies = np.broadcast_to(examples.frequencies(), teacher.shape)
    constant = nll(frequencies, labels)
    own = nll(teacher, labels)
    behind = nll_per_example(teacher, labels)
    behind = behind - nll_per_example(frequencies, labels)
    if len(labels) > 1 and np.mean(behind) > 2.0 * standard_error(behind):
        notes.append(
            f"the teacher is worse than a constant: its NLL is {own:.4g}, that "
            f"of the labels' frequencies {constant:.4g}. Are the labels its "
            "classes, in its order?"
        )
    counts = np.zeros((teacher.shape[1],) * 2)
    np.add.at(counts, (teacher.argmax(axis=1), labels), 1)
    rows, columns = scipy.optimize.linear_sum_assignment(-counts)
    right = np.trace(counts) / len(labels)
    permuted = counts[rows, columns].sum() / len(labels)
    # A permutation of C classes explains C answers whatever they are.
    explained = (permuted - right) * len(labels) - teacher.shape[1]
    if explained > GAIN_OF_PERMUTATION * len(labels) and permuted > 0.5:
        moved = ", ".join(
            f"{a} is {b}"
            for a, b in zip(rows, columns, strict=True)
            if a != b and counts[a, b]
        )
        notes.append(
            "the teacher's classes seem permuted: "
            f"{100 * right:.0f} % of its answers are right, and "
            f"{100 * permuted:.0f} % if its class {moved}"
        )
    return notes


def notes_on_bounds(correction: Correction) -> list[str]:
    """Say what ended at a bound of the search."""
    notes = []
    scale = correction.scale
    if scale.ndim < 2 and (
        np.any(scale <= SCALES[0] * 1.01) or np.any(scale >= SCALES[1] * 0.99)
    ):
        notes.append(
            "the teacher's temperature ended at a bound of the search, "
            f"{1 / SCALES[1]:g} to {1 / SCALES[0]:g}: it can hardly be trusted"
        )
    if np.any(correction.epsilon >= UPPER * 0.999):
        notes.append(
            f"epsilon of the teacher ended at its upper bound, {UPPER:g}: more "
            "labels or a penalty would hold it"
        )
    return notes


def notes_on_few(labels: np.ndarray, classes: int, advice: str) -> list[str]:
    """Say which classes have too few labels for parameters of their own."""
    counts = np.bincount(labels, minlength=classes)
    few = np.flatnonzero(counts < FEW)
    if not len(few):
        return []
    return [
        f"{len(few)} of {classes} classes have fewer than {FEW} labelled "
        f"examples (class {few[0]} has {counts[few[0]]}), too few for "
        f"parameters per class. {advice}"
    ]
