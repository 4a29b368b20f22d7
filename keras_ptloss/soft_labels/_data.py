"""Data sets seen as numbered examples, each with a fingerprint.

An example's number is its position in the data set that was labelled, and its
fingerprint is a hash of its content. Everything that pairs an example with a
stored row checks the second against the first.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_ptloss._backend import as_array
from keras_ptloss._checks import fail
from keras_ptloss.soft_labels._loaders import (
    Source,
    check_finite,
    elements,
    is_loader,
    is_source,
)
from keras_ptloss.soft_labels._tf_data import is_infinite, is_tf_dataset

Tensor = Any
# (inputs, targets, sample weights); the last two are None where absent.
Batch = tuple[Tensor, Tensor, Tensor]


def is_streamed(dataset: Any) -> bool:
    """Whether `dataset` comes in batches of its own, not as arrays."""
    return (
        isinstance(dataset, keras.utils.PyDataset)
        or is_tf_dataset(dataset)
        or is_loader(dataset)
    )


def as_dataset(dataset: Any) -> Any:
    """Give lists of texts and other array-likes the form of NumPy arrays."""
    if isinstance(dataset, keras.utils.PyDataset):
        if dataset.num_batches is None:
            fail("dataset", "finite", dataset)
        return dataset
    if is_tf_dataset(dataset):
        if is_infinite(dataset):
            fail("dataset", "finite (without `repeat()`)", dataset)
        return dataset
    if is_loader(dataset):
        check_finite(dataset)
        return dataset
    if is_source(dataset):
        dataset = Source(dataset)
    if isinstance(dataset, list) and dataset and np.isscalar(dataset[0]):
        dataset = np.asarray(dataset, dtype=_list_dtype(dataset))
    arrays = keras.tree.map_structure(_as_array, dataset)
    lengths = {
        len(array) if np.ndim(array) else None
        for array in keras.tree.flatten(arrays)
    }
    if len(lengths) != 1 or lengths <= {None, 0}:
        fail(
            "dataset",
            "a tf.data.Dataset, a keras.utils.PyDataset, a loader of Grain or"
            " PyTorch, or arrays of one length",
            f"{type(dataset).__name__} of lengths {lengths}",
        )
    return arrays


def _list_dtype(items: list[Any]) -> Any:
    return object if isinstance(items[0], (str, bytes)) else None


def _as_array(leaf: Tensor) -> Any:
    if isinstance(leaf, (np.ndarray, Source)):
        return leaf
    return as_array(leaf)


def length(x: Tensor) -> int:
    """The number of examples in a batch or in a pytree of arrays."""
    leaf = keras.tree.flatten(x)[0]
    if not np.ndim(leaf):
        fail("dataset", "batched", f"an element of shape {np.shape(leaf)}")
    return len(leaf)


def take(x: Tensor, index: Any) -> Tensor:
    """Index every array of the pytree `x` along its first axis."""
    return keras.tree.map_structure(lambda leaf: leaf[index], x)


def fingerprint(batch: Tensor) -> Any:
    """Hash every example: 8 bytes of BLAKE2b of its values, dtype and shape.

    By it soft labels find the examples that they belong to. Store it beside
    teacher outputs that are made elsewhere, in a column `fingerprint`.

    Two different examples share a fingerprint with probability 2^-64; among
    a million examples some pair does with probability 3e-8.

    Args:
        batch: The inputs of the teacher, as they will be when labels are
            attached: an array `(n, ...)`, a list of texts, or a pytree of
            arrays (dictionaries in the order of their keys). The dtype counts.

    Returns:
        `(n,)` uint64, the same on every machine.

    Raises:
        ValueError: If an array is of neither numbers nor texts, or the
            batch is a single example.

    Example:
        >>> import numpy as np
        >>> from keras_ptloss.soft_labels import fingerprint
        >>> x = np.array([[0.0, 1.0], [2.0, 3.0], [0.0, 1.0]])
        >>> prints = fingerprint(x)
        >>> bool(prints[0] == prints[2]), bool(prints[0] == prints[1])
        (True, False)
    """
    if isinstance(batch, list) and batch and np.isscalar(batch[0]):
        batch = np.asarray(batch, dtype=_list_dtype(batch))
    length(batch)
    header, rows = b"", list[Any]()
    for leaf in keras.tree.flatten(batch):
        array = _as_array(leaf)
        if array.dtype.kind in "OUS":
            # Texts count as UTF-8: tf.data gives bytes where NumPy has str.
            header += f"text{array.shape[1:]}".encode()
            rows.append([_text_bytes(row) for row in array])
        else:
            header += f"{array.dtype.name}{array.shape[1:]}".encode()
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            flat = np.ascontiguousarray(little).reshape(len(array), -1)
            rows.append(flat.view(np.uint8))
    digests = []
    for parts in zip(*rows, strict=True):
        digest = hashlib.blake2b(header, digest_size=8)
        for part in parts:
            digest.update(part)
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), dtype="<u8")


def _text_bytes(row: Any) -> bytes:
    encoded = b""
    for text in np.ravel(np.asarray(row, dtype=object)):
        if not isinstance(text, (str, bytes)):
            fail("dataset", "made of dense arrays of numbers or texts", text)
        data = text if isinstance(text, bytes) else text.encode()
        encoded += len(data).to_bytes(8, "little") + data
    return encoded


def check_differing(stored: Any, found: Any, rows: Any, first: int) -> None:
    """Raise if the examples from `first` on are not the stored `rows`.

    Args:
        stored: Fingerprints of all stored rows.
        found: `(n,)` fingerprints of the examples at hand.
        rows: `(n,)` the stored rows that they should be.
        first: Position of the first of them in the data set at hand.
    """
    wrong = np.flatnonzero(stored[rows] != found)
    if not len(wrong):
        return
    k = wrong[0]
    elsewhere = np.flatnonzero(stored == found[k])
    if len(elsewhere):
        what = (
            f"example {first + k} is that of stored row {elsewhere[0]}, not of"
            f" row {rows[k]}: the data set is reordered, so pass the row of"
            " each example as `ids`, or ids='content'"
        )
    else:
        what = (
            f"example {first + k} is in no stored row: its values, dtype or"
            " shape have changed, or it is new"
        )
    raise ValueError(
        "`dataset` must hold the examples that were labelled. Received: "
        f"{what} ({len(wrong)} of the {len(found)} examples compared differ)"
    )


def batches(
    dataset: Any, *, batch_size: int, start: int, stop: int, total: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield the batches `(first position, inputs)` of a range of positions.

    Args:
        dataset: What `as_dataset` returned.
        batch_size: Examples in a batch; arrays only, others are batched.
        start: First position.
        stop: Position after the last.
        total: Length that the whole data set must have.

    Raises:
        ValueError: If the data set ends before `stop`, or goes on after
            `total` where `stop` is `total`.
    """
    if not is_streamed(dataset):
        if length(dataset) != total:
            wrong_length(length(dataset), total)
        yield from pieces(dataset, batch_size, start, stop)
        return
    end = start
    for row, batch in streamed(dataset, start):
        end = row + length(batch[0])
        if end > total:
            wrong_length(f"at least {end}", total)
        low, high = max(row, start), min(end, stop)
        if low < high:
            yield low, take(batch[0], slice(low - row, high - row))
        if end >= stop and stop < total:
            return
    if end < stop:
        wrong_length(end, total)


def pieces(
    x: Tensor, size: int = 4096, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Yield `(first position, part)` of arrays.

    So hashed, texts and copies of views stay small.
    """
    stop = length(x) if stop is None else stop
    for row in range(start, stop, size):
        yield row, take(x, slice(row, min(row + size, stop)))


def streamed(dataset: Any, start: int = 0) -> Iterator[tuple[int, Batch]]:
    """Yield `(first position, batch)` of what comes in batches of its own.

    Batches before the one of `start` are left out where that saves loading
    them.
    """
    if isinstance(dataset, keras.utils.PyDataset):
        yield from _numbered_pydataset(dataset, start)
        return
    tf = is_tf_dataset(dataset)
    row = 0
    for element in dataset.as_numpy_iterator() if tf else elements(dataset):
        batch = keras.utils.unpack_x_y_sample_weight(element)
        yield row, batch
        row += length(batch[0])


def all_fingerprints(dataset: Any) -> Any:
    """The fingerprint of each example of what `as_dataset` returned."""
    if is_streamed(dataset):
        found = [fingerprint(batch[0]) for _, batch in streamed(dataset)]
    else:
        found = [fingerprint(x) for _, x in pieces(dataset)]
    return np.concatenate(found)


def wrong_length(found: int | str, expected: int) -> None:
    raise ValueError(
        f"`dataset` must hold {expected} examples. Received: {found} examples"
    )


def _numbered_pydataset(
    dataset: keras.utils.PyDataset, start: int
) -> Iterator[tuple[int, Batch]]:
    """Jump to the batch of `start`: a shard loads no other shard's data."""
    size = length(keras.utils.unpack_x_y_sample_weight(dataset[0])[0])
    for index in range(start // size, dataset.num_batches):
        batch = keras.utils.unpack_x_y_sample_weight(dataset[index])
        check_size(length(batch[0]), size, index, dataset.num_batches)
        yield index * size, batch


def check_size(found: int, size: int, index: int, count: int) -> None:
    last = index == count - 1
    if found != size and not (last and found < size):
        raise ValueError(
            "`dataset` must give batches of one size, the last one excepted,"
            " because a batch's position tells which examples it holds."
            f" Received: {found} examples in batch {index}, {size} in batch 0"
        )
