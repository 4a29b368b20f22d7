"""The input and the output of a search method."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import numpy as np

from keras_ptloss.correction import Correction


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Labelled examples, checked: one row each.

    Attributes:
        teacher_probs: one array `(N, C_k)` per teacher, float64, rows sum to 1.
        labels: true classes, `(N,)`, int64.
        sample_weight: `(N,)`, float64, mean 1.
        num_classes: the number of classes C of labels and student.
        random_sample: whether classes without a label are evidence that they
            are rare. If not, they keep the teacher's probabilities.
        seed: of folds and draws.
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
        trials: everything that was tried, column by column.
        out_of_fold: for each candidate by name, its probabilities on every
            row, fitted without that row, `(splits, N, C)`: once for each way to
            split the rows into folds. Empty for methods that do not
            cross-validate.
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
    """The interface of a search method, whose attributes are its settings."""

    name: str

    def run(self, examples: Examples, progress: Any) -> Found:
        """Search on the examples.

        Args:
            examples: the labelled examples.
            progress: `progress(done, total)` is called as the search goes on.
        """
