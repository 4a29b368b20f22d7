"""The stored rows of the examples at hand, proven to be theirs."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_ptloss._checks import fail
from keras_ptloss.soft_labels._data import (
    check_differing,
    fingerprint,
    wrong_length,
)

Tensor = Any


class Contents:
    """Stored rows, by their fingerprints (or ids)."""

    def __init__(self, stored: Any) -> None:
        self._sorter = np.argsort(stored, kind="stable")
        self._sorted = stored[self._sorter]

    def nearest(self, found: Any) -> Any:
        """Return the first row of each fingerprint; any, where none has it."""
        place = np.searchsorted(self._sorted, found)
        return self._sorter[np.minimum(place, len(self._sorter) - 1)]


class Matcher:
    """Finds the stored rows of examples and checks that they are theirs.

    Args:
        labels: `SoftLabels`, or what has their fingerprints, order and shape,
            and is read like them.
        ids: As in `SoftLabels.attach`.
    """

    # Called on the inputs of a batch, after the check.
    preprocessor: Callable[[Tensor], Tensor] | None = None

    def __init__(self, labels: Any, ids: Any) -> None:
        self.labels = labels
        self.stored = labels.fingerprints
        # Rows in the order of the data set; None: found by content.
        self.rows: Any = None
        if ids is None and not labels.ordered:
            ids = "content"
        if isinstance(ids, str):
            if ids != "content":
                fail("ids", "None, integers, or 'content'", ids)
            self._contents = Contents(self.stored)
            return
        self.rows = np.arange(len(labels)) if ids is None else np.asarray(ids)
        if self.rows.ndim != 1 or self.rows.dtype.kind not in "iu":
            fail("ids", "a list of integers", ids)
        if np.any((self.rows < 0) | (self.rows >= len(labels))):
            fail("ids", f"rows from 0 to {len(labels) - 1}", ids)

    def __call__(self, x: Tensor, first: int) -> Any:
        """Return the rows of the examples `x`, which begin at `first`."""
        found = fingerprint(x)
        if self.rows is not None:
            if first + len(found) > len(self.rows):
                wrong_length(f"at least {first + len(found)}", len(self.rows))
            rows = self.rows[first : first + len(found)]
        else:
            rows = self._contents.nearest(found)
        check_differing(self.stored, found, rows, first)
        return rows

    def batch(self, rows: Any, x: Tensor, weight: Any) -> tuple[Any, ...]:
        """Return what `fit` takes of a batch that is checked; see `targets`."""
        targets, weight = self.targets(rows, x, weight)
        if self.preprocessor is not None:
            x = self.preprocessor(x)
        # As `fit` itself has several inputs: in TensorFlow's data sets a list
        # is one tensor.
        x = keras.tree.lists_to_tuples(x)
        return keras.utils.pack_x_y_sample_weight(x, targets, weight)

    def targets(self, rows: Any, x: Tensor, weight: Any) -> tuple[Any, Any]:
        """Return what `fit` takes beside a batch: targets, sample weights.

        Args:
            rows: Those of its examples.
            x: Its inputs.
            weight: Its own weights; None if it has none.
        """
        return self.labels[rows], weight

    def shapes(self, x_shapes: Any, weight_shape: Any) -> tuple[Any, Any]:
        """Shapes of what `targets` returns, of batches of unknown size.

        Args:
            x_shapes: Of the inputs, a pytree of things with `shape`.
            weight_shape: Of the batch's own weights; None if it has none.
        """
        return (None, *self.labels.shape[1:]), weight_shape

    def finish(self, end: int) -> None:
        """Check that the data set ended where it should."""
        if self.rows is not None and end != len(self.rows):
            wrong_length(end, len(self.rows))
