"""Data sets that pair inputs with stored teacher outputs, for `fit`."""

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_ptloss._validation import fail, refuse
from keras_ptloss.soft_labels.inputs import (
    as_inputs,
    fingerprint,
    library_of,
    num_batches,
    num_examples,
    sequence_mask,
    take,
    unpack,
    weights_of_positions,
)
from keras_ptloss.soft_labels.outputs import NO_ENTRY

if TYPE_CHECKING:
    from keras_ptloss.soft_labels.soft_labels import SoftLabels


def attach_several(
    stores: Sequence["SoftLabels"], data: Any, **options: Any
) -> Any:
    """Pair a data set with the stored probabilities of several teachers.

    This is like `SoftLabels.attach`, but the soft labels are the probabilities
    of all teachers side by side, `(batch, C_1 + C_2 + ...)`, as losses for
    several teachers take them.

    Args:
        stores: one store for each teacher, with rows in any order. If the
            class names are the same, their order must be the same too.
        data: as in `SoftLabels.attach`.
        **options: the other arguments of `SoftLabels.attach`.

    Example:
        >>> import numpy as np
        >>> from keras_ptloss import SoftLabels
        >>> from keras_ptloss.soft_labels import attach_several
        >>> x = np.array([0.0, 1.0])
        >>> one = SoftLabels.from_array([[0.5, 0.5], [1, 0]], inputs=x)
        >>> two = SoftLabels.from_array([[0.25, 0.75], [0, 1]], inputs=x)
        >>> inputs, y_true = attach_several([one, two], x)[0]
        >>> print(y_true[0])
        [0.5  0.5  0.25 0.75]
    """
    first = stores[0].layout.class_names
    for store in stores:
        if store.layout.kind != "probabilities":
            fail("stores", "stores of probabilities", store)
        names = store.layout.class_names
        if first and names and names != first and set(names) == set(first):
            fail("stores", f"of classes in the same order, {first}", store)
    return attach(stores, data, **options)


def attach(
    stores: Sequence["SoftLabels"],
    data: Any,
    ids: Any = None,
    allow_subset: bool = False,
    batch_size: int = 32,
    shuffle: bool = False,
    seed: int | None = None,
) -> Any:
    """Pair a data set with the rows of stores; see `SoftLabels.attach`."""
    data = as_inputs(data)
    pairs = _Pairs(stores)
    library = library_of(data)
    if library is None:
        rows = pairs.find(data, ids, verbose="auto")
        if len(rows[0]) != num_examples(data):
            expected = f"one for each of {num_examples(data)} examples"
            refuse("ids", expected, f"{len(ids)} ids")
        if not allow_subset:
            by = "inputs" if ids is None else "ids"
            for store, found in zip(stores, rows, strict=True):
                _check_all_used(store, by, len(np.unique(found)))
        generator = np.random.default_rng(seed) if shuffle else None
        return _Arrays(pairs, data, rows, batch_size, generator)
    if ids is not None:
        fail("ids", "None for a data set, which may be shuffled", ids)
    if shuffle:
        fail("shuffle", "False for a data set, which has its own order", True)
    count = num_batches(data)
    if not allow_subset and count is not None:
        x, _, _ = unpack(next(iter(data)))
        for store in stores:
            _check_all_used(store, "inputs", count * num_examples(x))
    if library == "tensorflow":
        return _tf_pairs(pairs, data)
    if library == "torch":
        return _torch_pairs(pairs, data)
    if library == "keras":
        return _Batches(pairs, data)
    return data.map(pairs)


def _check_all_used(store: "SoftLabels", by: str, most: float) -> None:
    """Require at least as many examples as the store has different ones."""
    stored = len(store._index(by)[0])
    if most < stored:
        raise ValueError(
            "`data` must contain every example that is stored, unless you pass "
            f"allow_subset=True. Received: at most {most} of {stored} examples"
        )


class _Pairs:
    """Adds targets to batches: the rows of one store or of several stores."""

    def __init__(self, stores: Sequence["SoftLabels"]) -> None:
        self.stores = list(stores)
        self.tokens = stores[0].layout.kind == "tokens"

    def __call__(self, element: Any) -> tuple[Any, ...]:
        """Return a batch with the stored targets."""
        x, _, weight = unpack(element)
        y_true, weight = self.targets(x, weight)
        return keras.utils.pack_x_y_sample_weight(x, y_true, weight)

    def find(self, x: Any, ids: Any = None, verbose: Any = 0) -> list[Any]:
        """Return, for each store, the row of each example."""
        if ids is not None:
            return [store.find(ids=ids) for store in self.stores]
        prints = fingerprint(x, verbose=verbose)
        return [store._find("inputs", prints) for store in self.stores]

    def targets(
        self, x: Any, weight: Any, rows: list[np.ndarray] | None = None
    ) -> tuple[Any, Any]:
        """Return `y_true` and weights; `rows` are those in each store."""
        if rows is None:
            rows = self.find(x)
        found = [s.read(r) for s, r in zip(self.stores, rows, strict=True)]
        if self.tokens:
            return _at_tokens(found[0], x, weight)
        many = len(found) > 1
        return np.concatenate(found, axis=-1) if many else found[0], weight


def _at_tokens(
    found: np.ndarray, x: Any, weight: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return events and weights at the positions of the inputs' tokens."""
    mask = sequence_mask(x)
    number = np.cumsum(mask, axis=1) - 1  # index of a token in its sequence
    sequence, position = np.nonzero(mask & (number < found.shape[1]))
    y_true = np.zeros((*mask.shape, *found.shape[2:]), "float32")
    y_true[..., 0] = NO_ENTRY
    y_true[sequence, position] = found[sequence, number[sequence, position]]
    stored = y_true[..., 0, 0] != NO_ENTRY
    return y_true, stored * weights_of_positions(weight, mask.shape)


def _as_tensor(x: Any) -> Any:
    """Return texts as a tensor on TensorFlow: it refuses NumPy objects."""
    if keras.backend.backend() == "tensorflow" and x.dtype.kind in "OSU":
        return keras.ops.convert_to_tensor(x, "string")
    return x


class _Arrays(keras.utils.PyDataset):
    """Batches of arrays with their targets, in a new order in each epoch."""

    def __init__(
        self, pairs: _Pairs, x: Any, rows: Any, batch_size: int, generator: Any
    ) -> None:
        super().__init__()
        self._pairs, self._x, self._rows = pairs, x, rows
        self._batch_size, self._generator = batch_size, generator
        self._order = np.arange(num_examples(x))
        self.on_epoch_end()

    def on_epoch_end(self) -> None:
        if self._generator is not None:
            self._order = self._generator.permutation(len(self._order))

    def __len__(self) -> int:
        return math.ceil(len(self._order) / self._batch_size)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        if not 0 <= index < len(self):  # so that a loop over the batches ends
            raise IndexError(f"Batch {index} of {len(self)}")
        low = index * self._batch_size
        chosen = self._order[low : low + self._batch_size]
        x = take(self._x, chosen)
        rows = [of_store[chosen] for of_store in self._rows]
        y_true, weight = self._pairs.targets(x, None, rows)
        x = keras.tree.map_structure(_as_tensor, x)
        return keras.utils.pack_x_y_sample_weight(x, y_true, weight)


class _Batches(keras.utils.PyDataset):
    """The batches of a `PyDataset` with their targets."""

    def __init__(self, pairs: _Pairs, data: keras.utils.PyDataset) -> None:
        super().__init__(
            workers=data.workers,
            use_multiprocessing=data.use_multiprocessing,
            max_queue_size=data.max_queue_size,
        )
        self._pairs, self._data = pairs, data

    def on_epoch_begin(self) -> None:
        self._data.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._data.on_epoch_end()

    def __len__(self) -> int:
        return int(self._data.num_batches)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        if not 0 <= index < len(self):
            raise IndexError(f"Batch {index} of {len(self)}")
        return self._pairs(self._data[index])


def _tf_pairs(pairs: _Pairs, data: Any) -> Any:
    """Return a `tf.data.Dataset` of the same batches with stored targets."""
    tf = sys.modules["tensorflow"]
    shape = pairs.stores[0].shape

    def pair(*element: Any) -> Any:
        x, _, weight = keras.utils.unpack_x_y_sample_weight(element)
        leaves = keras.tree.flatten(x)
        if not all(isinstance(leaf, tf.Tensor) for leaf in leaves):
            fail("data", "made of dense tensors", x)
        given = () if weight is None else (weight,)

        def look_up(*arrays: Any) -> Any:
            x_ = keras.tree.pack_sequence_as(x, list(arrays[: len(leaves)]))
            found = pairs.targets(x_, arrays[-1] if given else None)
            return found if pairs.tokens else found[0]

        kinds = [tf.float32, tf.float32] if pairs.tokens else tf.float32
        y_true = tf.numpy_function(look_up, [*leaves, *given], kinds)
        if pairs.tokens:
            y_true, weight = y_true
            ids = next(leaf for leaf in leaves if leaf.shape.rank == 2)
            weight.set_shape(ids.shape)
            y_true.set_shape((*ids.shape, *shape[2:]))
        else:
            width = sum(store.shape[1] for store in pairs.stores)
            y_true.set_shape((leaves[0].shape[0], width, *shape[2:]))
        return keras.utils.pack_x_y_sample_weight(x, y_true, weight)

    return data.map(pair).prefetch(tf.data.AUTOTUNE)


def _torch_pairs(pairs: _Pairs, loader: Any) -> Any:
    """Return a `DataLoader` of another loader's batches with stored targets."""
    torch = sys.modules["torch"]

    class Pairs(torch.utils.data.IterableDataset):  # type: ignore[name-defined]
        def __iter__(self) -> Any:
            return map(pairs, loader)

    class SizedPairs(Pairs):
        def __len__(self) -> int:
            return len(loader)

    data = SizedPairs() if hasattr(loader.dataset, "__len__") else Pairs()
    return torch.utils.data.DataLoader(
        data, batch_size=None, pin_memory=loader.pin_memory
    )
