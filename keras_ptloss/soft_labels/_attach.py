"""The pairing of a data set with its stored soft labels, checked."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from keras_ptloss._checks import check_count, fail
from keras_ptloss.soft_labels._data import (
    Batch,
    as_dataset,
    check_size,
    is_streamed,
    length,
    numbered_batches,
    take,
    wrong_length,
)
from keras_ptloss.soft_labels._match import Matcher, Stored
from keras_ptloss.soft_labels._tf_data import is_tf_dataset, with_targets

Tensor = Any


def attach(
    labels: Stored,
    dataset: Any,
    *,
    ids: Any,
    batch_size: int,
    shuffle: bool,
    seed: int | None,
    preprocessor: Callable[[Tensor], Tensor] | None,
) -> Any:
    """Pair the data set with rows; see `SoftLabels.attach`."""
    match = Matcher(labels, ids)
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
        return with_targets(
            dataset,
            functools.partial(_pairs, match, dataset),
            labels.shape[1:],
            preprocessor,
        )
    return _AttachedBatches(match, dataset, preprocessor)


def _check_index(index: int, count: int) -> None:
    # Without it, `list()` of the batches never ends.
    if not 0 <= index < count:
        raise IndexError(f"Batch {index} of {count} batches")


class _AttachedArrays(keras.utils.PyDataset):
    """Batches of arrays, all checked once, shuffled anew in each epoch."""

    def __init__(
        self,
        match: Matcher,
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
        _check_index(index, len(self))
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
        match: Matcher,
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
        _check_index(index, self.num_batches)
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


def _pairs(match: Matcher, dataset: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the batches of a `tf.data.Dataset` with their stored rows."""
    end = 0
    for first, (x, _, weight) in numbered_batches(dataset.as_numpy_iterator()):
        end = first + length(x)
        targets = match.labels[match(x, first)]
        yield keras.utils.pack_x_y_sample_weight(x, targets, weight)
    match.finish(end)
