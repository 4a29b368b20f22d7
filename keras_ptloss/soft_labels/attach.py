"""Data sets that pair inputs with stored teacher outputs, for `fit`."""

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_ptloss._validation import check_count, fail
from keras_ptloss.soft_labels.inputs import (
    as_inputs,
    fingerprint,
    is_grain,
    is_stream,
    is_tf_dataset,
    is_torch_loader,
    num_examples,
    sequence_mask,
    take,
    weights_of_positions,
)
from keras_ptloss.soft_labels.layout import NO_ENTRY, events

if TYPE_CHECKING:
    from keras_ptloss.soft_labels.soft_labels import SoftLabels

Tensor = Any


def attach_several(
    stores: Sequence["SoftLabels"],
    data: Any,
    *,
    ids: Any = None,
    allow_subset: bool = False,
    batch_size: int = 32,
    shuffle: bool = False,
    seed: int | None = None,
) -> Any:
    """Pair a data set with the stored probabilities of several teachers.

    It is like `SoftLabels.attach`, with the teachers' probabilities side by
    side, `(batch, C_1 + C_2 + ...)`, as losses for several teachers take them.

    Args:
        stores: one for each teacher. The order of their rows may differ.
        data: as in `SoftLabels.attach`, like the other arguments.
        ids: as in `SoftLabels.attach`.
        allow_subset: as in `SoftLabels.attach`.
        batch_size: as in `SoftLabels.attach`.
        shuffle: as in `SoftLabels.attach`.
        seed: as in `SoftLabels.attach`.

    Returns:
        As `SoftLabels.attach`.

    Raises:
        ValueError: as `SoftLabels.attach`, or if two stores have the same
            classes in another order.

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
    check_count("batch_size", batch_size)
    pairs = _Pairs(stores)
    data = as_inputs(data)
    if not is_stream(data):
        found = pairs.find(None if ids is not None else data, ids)
        _check_count(found[0], num_examples(data), "`data` and `ids`")
        if not allow_subset:
            pairs.check_all_used(found)
        generator = np.random.default_rng(seed) if shuffle else None
        return _Arrays(pairs, data, found, batch_size, generator)
    if ids is not None:
        fail("ids", "None for a data set, which may be shuffled", ids)
    if shuffle:
        fail("shuffle", "False for a data set, which has its own order", True)
    if not allow_subset:
        pairs.check_length(data)
    if is_tf_dataset(data):
        return _tf_pairs(pairs, data)
    if is_torch_loader(data):
        return _torch_pairs(pairs, data)
    if is_grain(data):
        if not hasattr(data, "map"):
            fail("data", "a grain.MapDataset or grain.IterDataset", data)
        return data.map(pairs)
    return _Batches(pairs, data)


def _check_count(found: Any, count: int, what: str) -> None:
    if len(found) != count:
        raise ValueError(
            f"{what} must have the same length. Received: {len(found)} and "
            f"{count}"
        )


class _Pairs:
    """Gives a batch its targets: the rows of one store, or of several."""

    def __init__(self, stores: Sequence["SoftLabels"]) -> None:
        self.stores = list(stores)
        self.tokens = stores[0].layout.kind == "tokens"
        if len(stores) > 1:
            _check_several(self.stores)

    def find(self, x: Any, ids: Any = None) -> list[np.ndarray]:
        """Return the rows of examples, for each store."""
        if ids is not None:
            return [store.find(ids=ids) for store in self.stores]
        prints = fingerprint(x)
        return [store.find_fingerprints(prints) for store in self.stores]

    def targets(
        self, rows: list[np.ndarray], x: Any, weight: Any
    ) -> tuple[Any, Any]:
        """Return `y_true` and sample weights of a batch."""
        if self.tokens:
            return _of_sequences(self.stores[0], rows[0], x, weight)
        found = [s.read(r) for s, r in zip(self.stores, rows, strict=True)]
        return (
            found[0] if len(found) == 1 else np.concatenate(found, axis=-1)
        ), weight

    def __call__(self, element: Any) -> tuple[Any, ...]:
        """Return a batch `(inputs, targets)` with the stored targets."""
        if isinstance(element, list):  # as PyTorch collates tuples
            element = tuple(element)
        x, _, weight = keras.utils.unpack_x_y_sample_weight(element)
        y_true, weight = self.targets(self.find(x), x, weight)
        return keras.utils.pack_x_y_sample_weight(x, y_true, weight)

    def check_all_used(self, found: list[np.ndarray]) -> None:
        """Require that arrays hold every stored example."""
        for store, rows in zip(self.stores, found, strict=True):
            used = len(np.unique(rows))
            if used < store.num_examples:
                _refuse_subset(str(used), store.num_examples)

    def check_length(self, data: Any) -> None:
        """Require as many batches as the stored examples need, if known."""
        try:
            count, first = _num_batches(data), next(iter(data))
        except TypeError:
            return
        x, _, _ = keras.utils.unpack_x_y_sample_weight(
            tuple(first) if isinstance(first, list) else first
        )
        most = count * num_examples(x)
        for store in self.stores:
            if 0 <= most < store.num_examples:
                _refuse_subset(f"at most {most}", store.num_examples)


def _num_batches(data: Any) -> int:
    """Return the number of batches; below 0, or a TypeError, if unknown."""
    if is_tf_dataset(data):
        return int(data.cardinality())
    return len(data)


def _refuse_subset(found: str, stored: int) -> None:
    raise ValueError(
        "`data` must hold every example whose soft labels are stored, unless "
        f"you say allow_subset=True. Received: {found} of {stored} examples"
    )


def _check_several(stores: list["SoftLabels"]) -> None:
    """Require probabilities, and one order of classes that are the same."""
    first = stores[0].layout.class_names
    for store in stores:
        if store.layout.kind != "probabilities":
            fail("stores", "stores of probabilities", store)
        names = store.layout.class_names
        if first and names and names != first and set(names) == set(first):
            raise ValueError(
                "Stores of the same classes must have them in the same order. "
                f"Received: class_names {first} and {names}"
            )


def _of_sequences(
    store: "SoftLabels", rows: np.ndarray, x: Any, weight: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return events and weights of sequences, at the tokens of the inputs."""
    mask = sequence_mask(x)
    y_true = np.zeros((*mask.shape, *store.shape[2:]), "float32")
    y_true[..., 0] = NO_ENTRY
    for target, real, (start, found) in zip(
        y_true, mask, store.sequences(rows), strict=True
    ):
        of_tokens = events(found)
        positions = np.flatnonzero(real)[start : start + len(of_tokens)]
        target[positions] = of_tokens
    stored = y_true[..., 0, 0] != NO_ENTRY
    return y_true, stored * weights_of_positions(weight, mask.shape)


def _as_tensor(x: Any) -> Any:
    """Return texts as a tensor on TensorFlow, which takes no NumPy objects."""
    if keras.backend.backend() == "tensorflow" and x.dtype.kind in "OSU":
        return keras.ops.convert_to_tensor(x, "string")
    return x


class _Arrays(keras.utils.PyDataset):
    """Batches of arrays with their targets, in a new order in each epoch."""

    def __init__(
        self,
        pairs: _Pairs,
        x: Any,
        rows: list[np.ndarray],
        batch_size: int,
        generator: np.random.Generator | None,
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
        if not 0 <= index < len(self):  # so that a loop over it ends
            raise IndexError(f"Batch {index} of {len(self)}")
        low = index * self._batch_size
        chosen = self._order[low : low + self._batch_size]
        x = take(self._x, chosen)
        rows = [of_store[chosen] for of_store in self._rows]
        y_true, weight = self._pairs.targets(rows, x, None)
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
    """Map a `tf.data.Dataset` of batches to the same with stored targets."""
    tf = sys.modules["tensorflow"]

    def pair(*element: Any) -> Any:
        x, _, weight = keras.utils.unpack_x_y_sample_weight(element)
        leaves = keras.tree.flatten(x)
        if not all(isinstance(leaf, tf.Tensor) for leaf in leaves):
            fail("data", "made of dense tensors", x)
        given = () if weight is None else (weight,)

        def look_up(*arrays: Any) -> Any:
            x_ = keras.tree.pack_sequence_as(x, list(arrays[: len(leaves)]))
            weight_ = arrays[-1] if given else None
            return pairs.targets(pairs.find(x_), x_, weight_)

        store = pairs.stores[0]
        if pairs.tokens:
            kinds = [tf.float32, tf.float32]
            y_true, weight = tf.numpy_function(
                look_up, [*leaves, *given], kinds
            )
            ids = next(leaf for leaf in leaves if leaf.shape.rank == 2)
            y_true.set_shape((*ids.shape, *store.shape[2:]))
            weight.set_shape(ids.shape)
        else:
            y_true = tf.numpy_function(
                lambda *arrays: look_up(*arrays)[0],
                [*leaves, *given],
                tf.float32,
            )
            width = sum(s.shape[1] or 0 for s in pairs.stores)
            shape = (width, *store.shape[2:])
            y_true.set_shape((leaves[0].shape[0], *shape))
        return keras.utils.pack_x_y_sample_weight(x, y_true, weight)

    return data.map(pair).prefetch(tf.data.AUTOTUNE)


def _torch_pairs(pairs: _Pairs, loader: Any) -> Any:
    """Return a PyTorch `DataLoader` of a loader's batches with targets."""
    torch = sys.modules["torch"]

    class Pairs(torch.utils.data.IterableDataset):  # type: ignore[name-defined]
        def __iter__(self) -> Any:
            return map(pairs, loader)

    class SizedPairs(Pairs):
        def __len__(self) -> int:
            return len(loader)

    sized = hasattr(loader.dataset, "__len__")
    return torch.utils.data.DataLoader(
        SizedPairs() if sized else Pairs(),
        batch_size=None,
        pin_memory=loader.pin_memory,
    )
