"""Data sets of token ids: which entries are tokens, and their names."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from keras_ptloss._backend import as_array
from keras_ptloss._checks import fail
from keras_ptloss.soft_labels import _data as data
from keras_ptloss.soft_labels._loaders import Source, is_source

Tensor = Any

# Names of ids and of their mask: KerasHub's, and Hugging Face's.
_NAMES = {"token_ids": "padding_mask", "input_ids": "attention_mask"}


class Sequences(NamedTuple):
    """The tokens of a batch.

    Attributes:
        ids: `(batch, time)` ints.
        real: `(batch, time)` bool, which of them are tokens, not padding.
    """

    ids: Any
    real: Any


def as_token_dataset(dataset: Any) -> Any:
    """Give lists of sequences the form that KerasHub's models take.

    Args:
        dataset: A list of sequences of ids, of any lengths, or a source of
            lists, or what `soft_labels._data.as_dataset` takes.
    """
    if not data.is_streamed(dataset) and is_source(dataset):
        source = Source(dataset)
        if len(source) and isinstance(source.inputs(0), list):
            dataset = [source.inputs(row) for row in range(len(source))]
    if isinstance(dataset, (list, tuple)) and all(
        np.ndim(row) == 1 or isinstance(row, (list, tuple)) for row in dataset
    ):
        return data.as_dataset(padded(dataset))
    return data.as_dataset(dataset)


def padded(rows: Any) -> dict[str, Any]:
    """Sequences side by side, padded with zeros on the right."""
    arrays = [np.asarray(row) for row in rows]
    for number, array in enumerate(arrays):
        if array.ndim != 1 or array.dtype.kind not in "iu" or not array.size:
            fail(
                "dataset",
                "a list of sequences of one or more integers",
                f"{rows[number]!r} as its sequence {number}",
            )
    shape = (len(arrays), max(map(len, arrays), default=0))
    ids, real = np.zeros(shape, "int32"), np.zeros(shape, "int32")
    for number, array in enumerate(arrays):
        ids[number, : len(array)] = array
        real[number, : len(array)] = 1
    return {"token_ids": ids, "padding_mask": real}


def leaves(x: Any) -> tuple[Any, Any]:
    """Return the ids of inputs and their padding mask, None without one."""
    if isinstance(x, Mapping):
        for name, mask in _NAMES.items():
            if name in x:
                return x[name], x.get(mask)
        fail(
            "dataset",
            "token ids, or a dictionary that has them as 'token_ids' (and"
            " 'padding_mask')",
            sorted(map(str, x)),
        )
    if isinstance(x, (list, tuple)):
        fail("dataset", "made of token ids alone", f"{len(x)} inputs")
    return x, None


def sequences_of(x: Tensor) -> Sequences:
    """Read the tokens of a batch of inputs."""
    ids, mask = leaves(x)
    ids = as_array(ids)
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        fail(
            "dataset",
            "integers of shape (batch, time)",
            f"{ids.dtype} of shape {ids.shape}",
        )
    real = np.ones(ids.shape, bool)
    if mask is not None:
        real = as_array(mask).astype(bool)
    if real.shape != ids.shape:
        fail("padding_mask", f"of the ids' shape {ids.shape}", real.shape)
    wrong = real & ((ids < 0) | (ids > np.iinfo("int32").max))
    if wrong.any():
        fail("dataset", "made of ids from 0 to 2**31 - 1", ids[wrong][0])
    return Sequences(ids, real)


def token_fingerprints(sequences: Sequences) -> Any:
    """Hash each sequence's tokens, as int32, without its padding; `(batch,)`.

    So the same text has one name, however wide its batch.
    """
    found = [
        data.fingerprint(row[real].astype("int32")[None])
        for row, real in zip(*sequences, strict=True)
    ]
    return np.concatenate([*found, np.empty(0, "<u8")]).astype("<u8")


def kept_of(sequences: Sequences, weight: Any) -> Any:
    """Which entries are stored, `(batch, time)` bool: those that count.

    Args:
        sequences: Of a batch.
        weight: Its sample weights, `(batch, time)`, `(batch,)` or None.
    """
    if weight is None:
        return sequences.real
    weight = as_array(weight)
    shape = sequences.real.shape
    if weight.ndim == 1 and len(weight) == shape[0]:
        weight = np.broadcast_to(weight[:, None], shape)
    if weight.shape != shape:
        fail("sample_weight", f"of the ids' shape {shape}", weight.shape)
    return sequences.real & (weight != 0)


def token_batches(
    dataset: Any, sample_weight: Any, batch_size: int
) -> Iterator[tuple[int, Any, Any]]:
    """Yield `(first position, inputs, sample weights)` of each batch.

    Args:
        dataset: What `as_token_dataset` returned.
        sample_weight: Of arrays; streams have their own.
        batch_size: Of arrays.
    """
    if data.is_streamed(dataset):
        if sample_weight is not None:
            fail("sample_weight", "None: batches have their own", "an array")
        for row, (x, _, weight) in data.streamed(dataset):
            yield row, x, weight
        return
    count = data.length(dataset)
    if sample_weight is not None and len(sample_weight) != count:
        fail("sample_weight", f"of {count} sequences", len(sample_weight))
    for row in range(0, count, batch_size):
        part = slice(row, min(row + batch_size, count))
        weight = None if sample_weight is None else sample_weight[part]
        yield row, data.take(dataset, part), weight
