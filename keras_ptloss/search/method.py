"""The input and the output of a search method."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import numpy as np

from keras_ptloss.correction import Correction


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Checked labelled examples, with one row for each example.

    Attributes:
        teacher_probs: one array `(N, C_k)` per teacher, float64, with rows that
            sum to 1.
        labels: true classes, `(N,)`, int64.
        sample_weight: `(N,)`, float64, mean 1.
        num_classes: the number of classes C of labels and student.
        random_sample: whether the labels are a random sample, so that classes
            without a label must be rare. If not, such classes keep the
            teacher's probabilities.
        seed: the random seed of folds and draws.
    """

    teacher_probs: list[np.ndarray]
    labels: np.ndarray
    sample_weight: np.ndarray
    num_classes: int
    random_sample: bool = False
    seed: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """The output of a search method.

    Attributes:
        correction: the chosen correction.
        trials: everything that was tried, as a dictionary of columns.
        out_of_fold: a dictionary from the name of each candidate to its
            probabilities, `(splits, N, C)`. Each row is predicted without
            fitting to that row, once for each split of the rows into folds.
            Empty for methods that do not cross-validate.
        chosen: name of the chosen candidate.
        notes: warnings for the user about the teacher, labels or result.
    """

    correction: Correction
    trials: dict[str, list[Any]]
    out_of_fold: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    chosen: str = ""
    notes: tuple[str, ...] = ()


@runtime_checkable
class SearchMethod(Protocol):
    """The interface of a search method. Its attributes are its settings."""

    name: str

    def run(self, examples: Examples, progress: Any) -> Found:
        """Search on the examples.

        Args:
            examples: the labelled examples.
            progress: the method calls `progress(done, total)` while it runs.
        """
