"""What a fit sees of the labelled examples."""

import dataclasses

import numpy as np
import scipy.special

from keras_ptloss._calibration import Calibration, log_probabilities
from keras_ptloss._teacher import LabelledOutputs


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """A teacher's rows and what they are fitted to, in float64.

    Attributes:
        logits: `z`, the teacher's logits or the logarithms of its
            probabilities, `(N, C)`.
        probabilities: the teacher as it is, `(N, C)`.
        labels: classes, `(N,)`.
        targets: what rows are fitted to: `labels`, or rows `(N, C)` where some
            classes are left to the teacher (`_labels.py`).
    """

    logits: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(cls, read: LabelledOutputs) -> "Examples":
        """Return the examples of a teacher's outputs and their labels."""
        outputs, labels = read.outputs, read.labels
        if read.from_logits:
            rows = scipy.special.softmax(outputs, axis=-1)
            return cls(outputs, rows, labels, labels)
        return cls(log_probabilities(outputs), outputs, labels, labels)

    def __getitem__(self, index: np.ndarray) -> "Examples":
        """Return some of the examples."""
        return Examples(
            *(getattr(self, f.name)[index] for f in dataclasses.fields(self))
        )

    def calibrated(self, calibration: Calibration) -> np.ndarray:
        """Return `softmax(A z + b)`, `(N, C)`."""
        if calibration.is_identity:
            return self.probabilities
        return calibration(self.logits, from_logits=True)
