"""What a search says of the teacher and of its own result."""

import numpy as np
import scipy.optimize

from keras_ptloss.search._examples import Examples
from keras_ptloss.search._folds import standard_error
from keras_ptloss.search._linear import all_right
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


def notes_on_right(examples: Examples) -> tuple[str, ...]:
    """Say if the teacher made no error, of which a temperature could tell."""
    if not all_right(examples.logits, examples.labels):
        return ()
    return (
        f"the teacher is right on all {len(examples.labels)} rows: they do not "
        "tell how sure it may be, more rows might",
    )


def notes_on_scale(
    scale: np.ndarray, bounds: tuple[float, float]
) -> tuple[str, ...]:
    """Say if an inverse temperature ended at a bound.

    Args:
        scale: `s`, `()` or `(C,)`.
        bounds: those of the search that found it.
    """
    low, high = bounds
    if np.all(scale > low * 1.01) and np.all(scale < high * 0.99):
        return ()
    return (
        "the teacher's temperature ended at a bound of the search, "
        f"{1 / high:g} to {1 / low:g}: it can hardly be trusted",
    )


def notes_on_descent(
    epsilon: np.ndarray, *, calibrated: bool
) -> tuple[str, ...]:
    """Say if a descent along epsilon did not move.

    Args:
        epsilon: where it ended, `(M,)` or `(C, M)`.
        calibrated: whether a calibration stands ahead of it.
    """
    if epsilon.any() or calibrated:
        return ()
    return (
        "epsilon stayed at 0: no small change of it makes this teacher better; "
        "a temperature ahead of epsilon can",
    )


def notes_on_epsilon(
    epsilon: np.ndarray, upper: float, *, calibrated: bool
) -> tuple[str, ...]:
    """Say if `epsilon_1` ended at a bound, in all classes.

    It is what a class of probability near 1 feels, `w -> t (1 + epsilon_1)`: at
    its bound epsilon can make the teacher no flatter, or no sharper. Bounds of
    higher orders, or of single classes, are often met and cost little.

    Args:
        epsilon: `(M,)` or `(C, M)`, fitted within `-1/m` and `upper`.
        upper: the upper bound.
        calibrated: whether a temperature was fitted ahead of it.
    """
    first = epsilon[..., 0]
    advice = "" if calibrated else "; a temperature ahead of epsilon can"
    if np.all(first <= -0.999):
        return (
            "epsilon ended at its lower bound, -1/m, below which the loss is "
            "not convex: the teacher is surer than epsilon can mend" + advice,
        )
    if np.all(first >= 0.999 * upper):
        return (
            f"epsilon ended at its upper bound, {upper:g}: the teacher is less "
            "sure than epsilon can mend" + advice,
        )
    return ()


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
