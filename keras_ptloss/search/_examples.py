"""What a fit sees of the labelled examples."""

import dataclasses

import numpy as np
import scipy.special

from keras_ptloss._calibration import Calibration, log_probabilities
from keras_ptloss._several import SideBySide
from keras_ptloss._teacher import LabelledOutputs


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """A teacher's rows and what they are fitted to, in float64.

    Attributes:
        logits: `z`, the teacher's logits or the logarithms of its
            probabilities, `(N, C)`; of several teachers the logarithms of each
            one's probabilities, side by side, `(N, C_1 + C_2 + ...)`.
        probabilities: the teacher as it is, `(N, C)`; of several the geometric
            mean of those with the labels' classes, or, if there are none, the
            labels' frequencies.
        labels: classes, `(N,)`.
        targets: what rows are fitted to: `labels`, or rows `(N, C)` where some
            classes are left to the teacher (`_labels.py`).
        teachers: class counts of several teachers, or of one with other
            classes than the labels; else None.
    """

    logits: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray
    targets: np.ndarray
    teachers: tuple[int, ...] | None = None

    @classmethod
    def of(cls, read: LabelledOutputs) -> "Examples":
        """Return the examples of a teacher's outputs and their labels."""
        outputs, labels = read.outputs, read.labels
        if read.row is not None:
            return cls._of_several(read, read.row)
        if read.from_logits:
            rows = scipy.special.softmax(outputs, axis=-1)
            return cls(outputs, rows, labels, labels)
        return cls(log_probabilities(outputs), outputs, labels, labels)

    @classmethod
    def _of_several(cls, read: LabelledOutputs, row: SideBySide) -> "Examples":
        z, labels = row.logarithms("teacher", read.outputs), read.labels
        alike = [
            z[:, columns]
            for columns, count in zip(row.columns, row.counts, strict=True)
            if count == read.classes
        ]
        if alike:
            together = scipy.special.softmax(np.mean(alike, axis=0), axis=-1)
        else:
            frequencies = laplace(labels, read.classes)
            together = np.tile(frequencies, (len(z), 1))
        return cls(z, together, labels, labels, row.counts)

    @property
    def classes(self) -> int:
        """C, the number of classes of the labels."""
        return int(self.probabilities.shape[1])

    @property
    def columns(self) -> list[slice]:
        """The columns of each of several teachers."""
        return SideBySide(self.teachers or (self.classes,)).columns

    @property
    def alike(self) -> list[int]:
        """The teachers that have the labels' classes."""
        counts = self.teachers or (self.classes,)
        return [k for k, count in enumerate(counts) if count == self.classes]

    @property
    def shared_logits(self) -> np.ndarray:
        """The logarithms of `probabilities`, up to a constant, `(N, C)`."""
        if self.teachers is None:
            return self.logits
        return log_probabilities(self.probabilities)

    def frequencies(self) -> np.ndarray:
        """Return the labels' frequencies, `(C,)`, none of them 0."""
        return laplace(self.labels, self.classes)

    def alone(self) -> list[tuple[str, "Examples"]]:
        """Return each teacher of the labels' classes by itself, named."""
        if self.teachers is None:
            return [("", self)]
        parts = []
        for k in self.alike:
            z = self.logits[:, self.columns[k]]
            t = scipy.special.softmax(z, axis=1)
            one = Examples(z, t, self.labels, self.targets)
            parts.append((f"teacher[{k}]: ", one))
        return parts

    def __getitem__(self, index: np.ndarray) -> "Examples":
        """Return some of the examples."""
        return Examples(
            self.logits[index],
            self.probabilities[index],
            self.labels[index],
            self.targets[index],
            self.teachers,
        )

    def after(self, calibration: Calibration) -> "Examples":
        """Return the examples of one teacher once it is calibrated."""
        rows = self.calibrated(calibration)
        return dataclasses.replace(
            self, logits=log_probabilities(rows), probabilities=rows
        )

    def calibrated(self, calibration: Calibration) -> np.ndarray:
        """Return `softmax(A z + b)`, `(N, C)`."""
        if calibration.is_identity:
            return self.probabilities
        return calibration(self.logits, from_logits=True)


def laplace(labels: np.ndarray, classes: int) -> np.ndarray:
    """Return frequencies by Laplace's rule, `(classes,)`: none is 0."""
    counted = np.bincount(labels, minlength=classes) + 1.0
    return np.asarray(counted / counted.sum())
