"""What labels tell of every class; the rare ones are left to the teacher.

Of a class that labels show never, or a few times, they say next to nothing:
the best fit to them takes its probability away, and is wrong wherever the
class does occur. There the teacher's word is taken instead. With `R` the rare
classes and `t` the teacher at the temperature that fits the others, the target
of a row is

    (1 - t_R) one_hot(label) + t restricted to R      label not in R
    t                                                 label in R

so that a fit keeps the rare classes' share as the teacher, up to what all
classes share, has it. Where they have labels enough together, these tell their
share, and the teacher how it is divided:

    one_hot(label)                                    label not in R
    t restricted to R, over t_R                       label in R

A fit of what all classes share takes the labels as they
are: it cannot take a single class away.
"""

import dataclasses

import numpy as np
import scipy.special

from keras_ptloss.search._examples import Examples
from keras_ptloss.search._linear import fit_temperature
from keras_ptloss.search._objectives import OBJECTIVES, one_hot

# Classes with fewer labels than this are left to the teacher, one by one; and
# all of them, where they have fewer together.
RARE = 5


def rare_classes(labels: np.ndarray, classes: int) -> np.ndarray:
    """Return the classes with fewer than `RARE` labels."""
    counts = np.bincount(labels, minlength=classes)
    return np.flatnonzero(counts < RARE)


def targets(
    labels: np.ndarray, teacher: np.ndarray, rare: np.ndarray
) -> np.ndarray:
    """Return what rows are fitted to: the labels, or rows `(N, C)`.

    Args:
        labels: classes, `(N,)`.
        teacher: the teacher, as far as all classes share it, `(N, C)`.
        rare: the rare classes.
    """
    if not len(rare):
        return labels
    is_rare = np.isin(labels, rare)[:, None]
    of_rare = np.zeros_like(teacher)
    of_rare[:, rare] = teacher[:, rare]
    share = of_rare.sum(1, keepdims=True)
    exact = one_hot(teacher, labels)
    if np.count_nonzero(is_rare) < RARE:
        return np.where(is_rare, teacher, exact * (1.0 - share) + of_rare)
    told = is_rare & (share > 0.0)
    return np.where(told, of_rare / np.where(told, share, 1.0), exact)


def left_to_the_teacher(examples: Examples) -> Examples:
    """Return the examples with targets that leave rare classes as they are."""
    classes = examples.classes
    rare = rare_classes(examples.labels, classes)
    if not len(rare):
        return examples
    common = np.setdiff1d(np.arange(classes), rare)
    logits, labels = examples.shared_logits, examples.labels
    if len(common) > 1:  # given that the class is a common one
        rows = np.isin(labels, common)
        logits = logits[rows][:, common]
        labels = np.searchsorted(common, labels[rows])
    scale = fit_temperature(logits, labels, OBJECTIVES["nll"])
    teacher = scipy.special.softmax(scale * examples.shared_logits, axis=1)
    return dataclasses.replace(
        examples, targets=targets(examples.labels, teacher, rare)
    )
