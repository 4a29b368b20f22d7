"""Loaders of other libraries: the only file here that knows Grain and PyTorch.

As with `tf.data`, nothing is imported: who has such an object has imported its
library.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from keras_ptloss._backend import as_array
from keras_ptloss._checks import fail

Tensor = Any


def is_torch_loader(dataset: Any) -> bool:
    """Whether `dataset` is a `torch.utils.data.DataLoader`."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(
        dataset, torch.utils.data.DataLoader
    )


def is_grain_map(dataset: Any) -> bool:
    """Whether `dataset` is a `grain.MapDataset`, which has random access."""
    grain = sys.modules.get("grain")
    return grain is not None and isinstance(dataset, grain.MapDataset)


def is_loader(dataset: Any) -> bool:
    """Whether `dataset` is one of Grain's or PyTorch's that `fit` takes."""
    grain = sys.modules.get("grain")
    if grain is None:
        return is_torch_loader(dataset)
    kinds = (grain.MapDataset, grain.IterDataset, grain.DataLoader)
    return isinstance(dataset, kinds) or is_torch_loader(dataset)


def check_finite(dataset: Any) -> None:
    """Refuse a loader that is known to have no end."""
    if is_grain_map(dataset) and len(dataset) >= sys.maxsize:
        fail("dataset", "finite (without `repeat()`)", dataset)


def check_order(dataset: Any) -> None:
    """Refuse a loader that is known to have another order in each pass."""
    if is_torch_loader(dataset):
        sampler = sys.modules["torch"].utils.data.RandomSampler
        if isinstance(dataset.sampler, sampler):
            fail(
                "dataset",
                "of the same order in each pass (with shuffle=False)",
                dataset,
            )


def elements(loader: Any) -> Iterator[Any]:
    """Yield a loader's batches, as NumPy arrays."""
    for element in loader:
        yield keras.tree.map_structure(_as_numpy, element)


def _as_numpy(leaf: Tensor) -> Any:
    return as_array(leaf) if hasattr(leaf, "detach") else leaf


class Source:
    """Single records, by number, in the form of an array of records.

    Args:
        records: Has a length, and records by integers, as a Grain
            `RandomAccessDataSource` or a PyTorch map-style data set. Of a
            tuple, `(inputs, targets)`, the inputs are taken. A list of values
            is one array, as Hugging Face's data sets have them.
    """

    ndim = 1

    def __init__(self, records: Any) -> None:
        self._records = records
        self.shape = (len(records),)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        """Stack the inputs of a slice, or of an array of positions."""
        if isinstance(index, slice):
            index = range(*index.indices(len(self)))
        found = [
            keras.tree.traverse(_as_leaf, self.inputs(int(position)))
            for position in index
        ]
        return keras.tree.map_structure(_stack, *found)

    def inputs(self, position: int) -> Any:
        """The inputs of a record, as they are."""
        record = self._records[position]
        return record[0] if isinstance(record, tuple) else record


def _as_leaf(part: Any) -> Any:
    """Make one array of a list of values; None for what is looked into."""
    if isinstance(part, list) and _is_values(part):
        return _joined(np.array, part)
    return _as_numpy(part) if hasattr(part, "detach") else None


def _is_values(part: Any) -> bool:
    if isinstance(part, list):
        return all(map(_is_values, part))
    return part is None or np.isscalar(part)


def _stack(*leaves: Any) -> Any:
    if isinstance(leaves[0], (str, bytes)):
        return np.array(leaves, dtype=object)
    return _joined(np.stack, leaves)


def _joined(join: Callable[[Any], Any], parts: Any) -> Any:
    try:
        return join(parts)
    except ValueError:
        fail(
            "dataset",
            "made of examples of one shape, so pad them (of token ids,"
            " `TokenLabels` pads a list of sequences)",
            "examples of the shapes"
            f" {sorted({np.array(p, dtype=object).shape for p in parts})}",
        )


def is_source(dataset: Any) -> bool:
    """Whether `dataset` holds single records by number, and is no container."""
    known = isinstance(dataset, (list, tuple, dict, str, bytes, Source))
    return (
        not known
        and not keras.ops.is_tensor(dataset)
        and not hasattr(dataset, "__array__")
        and hasattr(dataset, "__len__")
        and hasattr(dataset, "__getitem__")
    )


def grain_pairs(batches: Callable[[], Iterator[Any]]) -> Any:
    """Make a `grain.IterDataset` of what `batches` yields in each pass."""
    grain = sys.modules["grain"]

    class Pairs(grain.IterDataset):  # type: ignore[name-defined]
        def __iter__(self) -> Any:
            return PairsIterator()

    class PairsIterator(grain.DatasetIterator):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self._batches, self._given = batches(), 0

        def __next__(self) -> Any:
            batch = next(self._batches)
            self._given += 1
            return batch

        def get_state(self) -> dict[str, int]:
            return {"given": self._given}

        def set_state(self, state: dict[str, int]) -> None:
            self._batches, self._given = batches(), 0
            for _ in range(state["given"]):
                next(self)

    return Pairs()


def _without_bfloat16(leaf: Any) -> Any:
    """Make float32 of what PyTorch does not take from NumPy."""
    bfloat16 = str(getattr(leaf, "dtype", "")) == "bfloat16"
    return leaf.astype("float32") if bfloat16 else leaf


def torch_pairs(dataset: Any, batches: Callable[[], Iterator[Any]]) -> Any:
    """Make a `DataLoader` of what `batches` yields in each pass.

    Args:
        dataset: The loader whose batches they are, and whose workers load.
        batches: Yields them.
    """
    torch = sys.modules["torch"]

    class Pairs(torch.utils.data.IterableDataset):  # type: ignore[name-defined]
        def __iter__(self) -> Iterator[Any]:
            for batch in batches():
                yield keras.tree.map_structure(_without_bfloat16, batch)

    class SizedPairs(Pairs):
        def __len__(self) -> int:
            return len(dataset)

    sized = hasattr(dataset.dataset, "__len__")
    return torch.utils.data.DataLoader(
        SizedPairs() if sized else Pairs(),
        batch_size=None,
        pin_memory=dataset.pin_memory,
    )
