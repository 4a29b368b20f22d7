"""The stored tokens of the sequences at hand, laid where they belong."""

from typing import Any

import numpy as np

from keras_ptloss._backend import as_array
from keras_ptloss.soft_labels._match import Contents, Matcher
from keras_ptloss.soft_labels._tokens.sequences import (
    kept_of,
    leaves,
    sequences_of,
    token_fingerprints,
)
from keras_ptloss.soft_labels._tokens.spec import PADDING, decode_tokens
from keras_ptloss.soft_labels._tokens.store import TokenFiles

Tensor = Any


class TokenMatcher(Matcher):
    """Finds sequences by their tokens, wherever they stand."""

    def __init__(self, files: TokenFiles) -> None:
        self._files, self.stored = files, files.fingerprints
        self.rows = None
        self._contents = Contents(self.stored)

    def find(self, found: Any, first: int) -> Any:
        """Return the row of each fingerprint, -1 where there is none.

        Of equal sequences each has its own row as long as the data set is in
        the order of the store; they may differ in which tokens count.

        Args:
            found: `(n,)` fingerprints.
            first: Position of the first of them in the data set.
        """
        last = len(self.stored) - 1
        rows = self._contents.nearest(found)
        own = np.minimum(np.arange(first, first + len(found)), last)
        rows = np.where(self.stored[own] == found, own, rows)
        return np.where(self.stored[rows] == found, rows, -1)

    def __call__(self, x: Tensor, first: int) -> Any:
        """Return the rows of the sequences `x`, which begin at `first`."""
        sequences = sequences_of(x)
        rows = self.find(token_fingerprints(sequences), first)
        absent = np.flatnonzero(rows < 0)
        if len(absent):
            row = absent[0]
            shown = sequences.ids[row][sequences.real[row]]
            text = np.array2string(shown, threshold=8)
            raise ValueError(
                "`dataset` must hold sequences that are stored. Received:"
                f" sequence {first + row}, {text} of"
                f" {len(shown)} tokens, which is not ({len(absent)} of the"
                f" {len(rows)} compared are not; `rows_of` tells which)"
            )
        return rows

    def targets(self, rows: Any, x: Tensor, weight: Any) -> tuple[Any, Any]:
        """Return `y_true` of `TopKPTLoss`, and weights 0 where it has none."""
        sequences = sequences_of(x)
        # The tokens of a sequence in their order, one sequence after another:
        # so are the bits that say which are stored, and those that are.
        kept = np.zeros(sequences.real.shape, bool)
        kept[sequences.real] = self._files.kept(rows)
        found = decode_tokens(
            self._files.tokens(rows), self._files.vocabulary_size
        )
        y_true = np.zeros((*kept.shape, *found.shape[1:]), "float32")
        y_true[..., 0] = PADDING
        y_true[kept] = found
        weights = kept.astype("float32")
        if weight is not None:
            weight = as_array(weight).astype("float32")
            kept_of(sequences, weight)  # its shape
            weights *= weight[:, None] if weight.ndim == 1 else weight
        return y_true, weights

    def shapes(self, x_shapes: Any, weight_shape: Any) -> tuple[Any, Any]:
        """Shapes of targets and weights, of batches of unknown size."""
        shape = tuple(leaves(x_shapes)[0].shape)
        return (*shape, self._files.spec.top_k + 1, 2), shape
