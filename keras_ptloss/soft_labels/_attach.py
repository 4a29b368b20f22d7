"""The pairing of a data set with its stored soft labels, checked."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from keras_ptloss._checks import check_count, check_flag, fail
from keras_ptloss.soft_labels import _data as data
from keras_ptloss.soft_labels import _loaders as loaders
from keras_ptloss.soft_labels._match import Matcher
from keras_ptloss.soft_labels._tf_data import (
    as_input,
    is_tf_dataset,
    with_targets,
)

Tensor = Any


def attach(
    match: Matcher,
    dataset: Any,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int | None,
    preprocessor: Callable[[Tensor], Tensor] | None,
) -> Any:
    """Pair the data set with rows; see `SoftLabels.attach`."""
    batch_size = check_count("batch_size", batch_size)
    shuffle = check_flag("shuffle", shuffle)
    if preprocessor is not None and not callable(preprocessor):
        fail("preprocessor", "a callable, or None", preprocessor)
    dataset = data.as_dataset(dataset)
    if not is_tf_dataset(dataset):  # which maps it over its own tensors
        match.preprocessor = preprocessor
    if not data.is_streamed(dataset):
        return _AttachedArrays(
            match,
            dataset,
            batch_size=batch_size,
            order=np.random.default_rng(seed) if shuffle else None,
        )
    if shuffle:
        fail("shuffle", "False where the data set has its own order", shuffle)
    batches = functools.partial(_pairs, match, dataset)
    if is_tf_dataset(dataset):
        return with_targets(dataset, batches, match.shapes, preprocessor)
    if isinstance(dataset, keras.utils.PyDataset):
        return _AttachedBatches(match, dataset)
    if loaders.is_grain_map(dataset):
        pairs = _Pairs(match, len(dataset), dataset[0])
        return dataset.map_with_index(pairs)
    if loaders.is_torch_loader(dataset):
        return loaders.torch_pairs(dataset, batches)
    return loaders.grain_pairs(batches)


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
    ) -> None:
        super().__init__()
        match.finish(data.length(x))
        self._rows = np.concatenate(
            [match(part, first) for first, part in data.pieces(x)]
        )
        self._match, self._x = match, x
        self._batch_size, self._generator = batch_size, order
        self._order = np.arange(data.length(x))
        self.on_epoch_end()

    def on_epoch_end(self) -> None:
        if self._generator is not None:
            self._order = self._generator.permutation(len(self._rows))

    def __len__(self) -> int:
        return math.ceil(len(self._rows) / self._batch_size)

    def __getitem__(self, index: int) -> Any:
        _check_index(index, len(self))
        low = index * self._batch_size
        chosen = self._order[low : low + self._batch_size]
        x = data.take(self._x, chosen)
        x, *rest = self._match.batch(self._rows[chosen], x, None)
        return keras.tree.map_structure(as_input, x), *rest


class _Pairs:
    """Pairs a batch that is known by its number with its stored rows.

    Args:
        match: Finds the rows.
        count: How many batches there are.
        first: The first of them.
    """

    def __init__(self, match: Matcher, count: int, first: Any) -> None:
        self._match, self.num_batches = match, count
        batch = keras.utils.unpack_x_y_sample_weight(first)
        self._size = data.length(batch[0])
        if match.rows is not None:
            total = len(match.rows)
            if count != math.ceil(total / self._size):
                data.wrong_length(f"{count} batches of {self._size}", total)
        self(0, first)

    def __call__(self, index: int, element: Any) -> tuple[Any, ...]:
        x, _, weight = keras.utils.unpack_x_y_sample_weight(element)
        first = index * self._size
        if self._match.rows is not None:
            data.check_size(data.length(x), self._size, index, self.num_batches)
            if index == self.num_batches - 1:
                self._match.finish(first + data.length(x))
        return self._match.batch(self._match(x, first), x, weight)


class _AttachedBatches(keras.utils.PyDataset):
    """A `PyDataset` with its targets replaced by the stored rows."""

    def __init__(self, match: Matcher, dataset: keras.utils.PyDataset) -> None:
        super().__init__(
            workers=dataset.workers,
            use_multiprocessing=dataset.use_multiprocessing,
            max_queue_size=dataset.max_queue_size,
        )
        self._dataset = dataset
        self._pair = _Pairs(match, dataset.num_batches, dataset[0])

    @property
    def num_batches(self) -> int:
        return int(self._dataset.num_batches)

    def on_epoch_begin(self) -> None:
        self._dataset.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._dataset.on_epoch_end()

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        _check_index(index, self.num_batches)
        return self._pair(index, self._dataset[index])


def _pairs(match: Matcher, dataset: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the batches of a stream with their stored rows."""
    end = 0
    for first, (x, _, weight) in data.streamed(dataset):
        end = first + data.length(x)
        yield match.batch(match(x, first), x, weight)
    match.finish(end)
