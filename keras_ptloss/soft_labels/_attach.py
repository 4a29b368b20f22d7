"""The pairing of a data set with its stored soft labels, checked."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_ptloss._checks import check_count, fail
from keras_ptloss.soft_labels._data import (
    Batch,
    as_dataset,
    check_differing,
    check_size,
    fingerprints,
    is_streamed,
    is_tf_dataset,
    length,
    numbered_batches,
    take,
    wrong_length,
)

if TYPE_CHECKING:
    from keras_ptloss.soft_labels._soft_labels import SoftLabels

Tensor = Any


def attach(
    labels: "SoftLabels",
    dataset: Any,
    *,
    ids: Any,
    batch_size: int,
    shuffle: bool,
    seed: int | None,
    preprocessor: Callable[[Tensor], Tensor] | None,
) -> Any:
    """Pair the data set with `labels`; see `SoftLabels.attach`."""
    match = _Matcher(labels, ids)
    dataset = as_dataset(dataset)
    if not is_streamed(dataset):
        return _AttachedArrays(
            match,
            dataset,
            batch_size=check_count("batch_size", batch_size),
            order=np.random.default_rng(seed) if shuffle else None,
            preprocessor=preprocessor,
        )
    if shuffle:
        fail("shuffle", "False where the data set has its own order", shuffle)
    if is_tf_dataset(dataset):
        return _attach_tf(match, dataset, preprocessor)
    return _AttachedBatches(match, dataset, preprocessor)


class _Matcher:
    """Finds the stored rows of examples and checks that they are theirs."""

    def __init__(self, labels: "SoftLabels", ids: Any) -> None:
        self.labels = labels
        self.stored = labels.fingerprints
        # Rows in the order of the data set; None: found by content.
        self.rows: Any = None
        if isinstance(ids, str):
            if ids != "content":
                fail("ids", "None, integers, or 'content'", ids)
            self._sorter = np.argsort(self.stored, kind="stable")
            self._sorted = self.stored[self._sorter]
            return
        self.rows = np.arange(len(labels)) if ids is None else np.asarray(ids)
        if self.rows.ndim != 1 or self.rows.dtype.kind not in "iu":
            fail("ids", "a list of integers", ids)
        if np.any((self.rows < 0) | (self.rows >= len(labels))):
            fail("ids", f"rows from 0 to {len(labels) - 1}", ids)

    def __call__(self, x: Tensor, first: int) -> Any:
        """Return the rows of the examples `x`, which begin at `first`."""
        found = fingerprints(x)
        if self.rows is not None:
            if first + len(found) > len(self.rows):
                wrong_length(f"at least {first + len(found)}", len(self.rows))
            rows = self.rows[first : first + len(found)]
        else:
            place = np.searchsorted(self._sorted, found)
            rows = self._sorter[np.minimum(place, len(self._sorter) - 1)]
        check_differing(self.stored, found, rows, first)
        return rows

    def finish(self, end: int) -> None:
        """Check that the data set ended where it should."""
        if self.rows is not None and end != len(self.rows):
            wrong_length(end, len(self.rows))


class _AttachedArrays(keras.utils.PyDataset):
    """Batches of arrays, all checked once, shuffled anew in each epoch."""

    def __init__(
        self,
        match: _Matcher,
        x: Tensor,
        *,
        batch_size: int,
        order: np.random.Generator | None,
        preprocessor: Callable[[Tensor], Tensor] | None,
    ) -> None:
        super().__init__()
        match.finish(length(x))
        # Hashed piece by piece: texts and copies of views stay small.
        step = 4096
        self._rows = np.concatenate(
            [
                match(take(x, slice(first, first + step)), first)
                for first in range(0, length(x), step)
            ]
        )
        self._labels, self._x = match.labels, x
        self._batch_size, self._preprocessor = batch_size, preprocessor
        self._generator = order
        self._order = np.arange(length(x))
        self.on_epoch_end()

    def on_epoch_end(self) -> None:
        if self._generator is not None:
            self._order = self._generator.permutation(len(self._rows))

    def __len__(self) -> int:
        return math.ceil(len(self._rows) / self._batch_size)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        low = index * self._batch_size
        chosen = self._order[low : low + self._batch_size]
        x = take(self._x, chosen)
        if self._preprocessor is not None:
            x = self._preprocessor(x)
        return x, self._labels[self._rows[chosen]]


class _AttachedBatches(keras.utils.PyDataset):
    """A `PyDataset` with its targets replaced by the stored rows."""

    def __init__(
        self,
        match: _Matcher,
        dataset: keras.utils.PyDataset,
        preprocessor: Callable[[Tensor], Tensor] | None,
    ) -> None:
        super().__init__(
            workers=dataset.workers,
            use_multiprocessing=dataset.use_multiprocessing,
            max_queue_size=dataset.max_queue_size,
        )
        self._match, self._dataset = match, dataset
        self._preprocessor = preprocessor
        first = keras.utils.unpack_x_y_sample_weight(dataset[0])
        self._size = length(first[0])
        if match.rows is not None:
            total, number = len(match.rows), dataset.num_batches
            if number != math.ceil(total / self._size):
                wrong_length(f"{number} batches of {self._size}", total)
        self._pair(0, first)

    @property
    def num_batches(self) -> int:
        return int(self._dataset.num_batches)

    def on_epoch_begin(self) -> None:
        self._dataset.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._dataset.on_epoch_end()

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        element = self._dataset[index]
        return self._pair(index, keras.utils.unpack_x_y_sample_weight(element))

    def _pair(self, index: int, batch: Batch) -> tuple[Any, ...]:
        x, _, weight = batch
        first = index * self._size
        if self._match.rows is not None:
            check_size(length(x), self._size, index, self._dataset)
            if index == self.num_batches - 1:
                self._match.finish(first + length(x))
        targets = self._match.labels[self._match(x, first)]
        if self._preprocessor is not None:
            x = self._preprocessor(x)
        return x, targets, *(() if weight is None else (weight,))


def _attach_tf(
    match: _Matcher,
    dataset: Any,
    preprocessor: Callable[[Tensor], Tensor] | None,
) -> Any:
    # Only tf.data itself can build a tf.data.Dataset; its owner has already
    # imported TensorFlow.
    import tensorflow as tf

    x_spec, _, weight_spec = keras.utils.unpack_x_y_sample_weight(
        dataset.element_spec
    )
    for spec in keras.tree.flatten(x_spec):
        if not isinstance(spec, tf.TensorSpec):
            fail("dataset", "made of dense tensors", spec)
    targets = tf.TensorSpec((None, match.labels.shape[1]), tf.float32)
    signature = keras.utils.pack_x_y_sample_weight(x_spec, targets, weight_spec)

    def pairs() -> Iterator[tuple[Any, ...]]:
        end = 0
        for first, (x, _, weight) in numbered_batches(
            dataset.as_numpy_iterator()
        ):
            end = first + length(x)
            rows = match(x, first)
            yield keras.utils.pack_x_y_sample_weight(
                x, match.labels[rows], weight
            )
        match.finish(end)

    paired = tf.data.Dataset.from_generator(pairs, output_signature=signature)
    # `fit` shows its progress by it; a negative number means unknown.
    if (cardinality := int(dataset.cardinality())) >= 0:
        paired = paired.apply(
            tf.data.experimental.assert_cardinality(cardinality)
        )
    if preprocessor is not None:
        paired = paired.map(
            lambda x, *rest: (preprocessor(x), *rest),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
    return paired.prefetch(tf.data.AUTOTUNE)
