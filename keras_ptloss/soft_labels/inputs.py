"""Batches of inputs, and the fingerprints by which stored rows are found."""

import collections
import hashlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from keras_ptloss._backend import as_array
from keras_ptloss._progress import Verbose, track
from keras_ptloss._validation import fail

Tensor = Any
# Names of token ids and of their padding mask in KerasHub and Hugging Face.
MASKS = {"token_ids": "padding_mask", "input_ids": "attention_mask"}


def fingerprint(inputs: Any, *, verbose: Verbose = "auto") -> np.ndarray:
    """Return a hash of each example, the same on every machine.

    Soft labels find their examples by it. Texts count as UTF-8. Integers up to
    rank 2 (`(N,)` or `(N, T)`) count by their values, whatever their dtype; of
    all else the dtype counts. Of token ids with a mask (a dictionary with
    `"token_ids"` and `"padding_mask"`, or `"input_ids"` and
    `"attention_mask"`), and of lists of token ids, only the tokens count,
    whatever the padding.

    Two different examples have the same fingerprint with probability 2^-64.

    Args:
        inputs: an array `(N, ...)`, a list of texts, a list of sequences of
            token ids, a pytree of arrays, or a source of single examples.
        verbose: 1 shows a progress bar, 0 does not; "auto" shows it after two
            seconds.

    Returns:
        `(N,)` uint64.

    Example:
        >>> import numpy as np
        >>> from keras_ptloss.soft_labels import fingerprint
        >>> a, b, c = fingerprint(["good", "bad", "good"])
        >>> bool(a == c), bool(a == b)
        (True, False)
    """
    inputs, size = as_inputs(inputs), 1024
    total = None if is_stream(inputs) else -(-num_examples(inputs) // size)
    what = "Computing the fingerprints of the examples"
    found = track(batches(inputs, size), what, total, verbose=verbose)
    return np.concatenate(
        [_fingerprint(x) for x, _ in found] or [np.empty(0, "uint64")]
    )


def _fingerprint(x: Tensor) -> np.ndarray:
    """Return the fingerprints of one batch."""
    mask = padding_mask(x)
    if mask is not None:
        masked = [name for name in MASKS.values() if name in x]
        x = {name: leaf for name, leaf in x.items() if name not in masked}
    rows = []
    header = b""
    for leaf in keras.tree.flatten(x):
        array = as_array(leaf)
        if array.dtype.kind in "OUS":
            header += f"text{array.shape[1:]}".encode()
            rows.append([_text_bytes(row) for row in array])
            continue
        if array.dtype.kind in "iu" and array.ndim <= 2:
            array = array.astype("int64")
            header += b"integers"
        else:
            header += f"{array.dtype.name}{array.shape[1:]}".encode()
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        if mask is not None and array.shape == mask.shape:
            rows.append(
                [row[m].tobytes() for row, m in zip(array, mask, strict=True)]
            )
            continue
        data = array.tobytes()
        size = len(data) // max(len(array), 1)
        starts = range(0, size * len(array), size) if size else [0] * len(array)
        rows.append([data[low : low + size] for low in starts])
    return np.frombuffer(
        b"".join(
            hashlib.blake2b(
                header
                + b"".join([len(p).to_bytes(8, "little") + p for p in parts]),
                digest_size=8,
            ).digest()
            for parts in zip(*rows, strict=True)
        ),
        "<u8",
    )


def _text_bytes(row: Any) -> bytes:
    """Return the texts of an example as bytes, each after its length."""
    encoded = b""
    for text in np.ravel(np.asarray(row, object)):
        if not isinstance(text, (str, bytes)):
            fail("inputs", "dense arrays of numbers or texts", text)
        data = text if isinstance(text, bytes) else text.encode()
        encoded += len(data).to_bytes(8, "little") + data
    return encoded


def padding_mask(x: Tensor) -> np.ndarray | None:
    """Return the padding mask of a batch of token ids as bool, or None."""
    if isinstance(x, Mapping):
        for name, mask in MASKS.items():
            if name in x and mask in x:
                return as_array(x[mask]).astype(bool)
    return None


def sequence_mask(x: Tensor) -> np.ndarray:
    """Return which entries of a batch are tokens, `(batch, time)` bool."""
    mask = padding_mask(x)
    if mask is not None:
        return mask
    if isinstance(x, Mapping):
        x = next((x[name] for name in MASKS if name in x), None)
    ids = None if x is None or isinstance(x, (list, tuple)) else as_array(x)
    if ids is None or ids.ndim != 2 or ids.dtype.kind not in "iu":
        fail(
            "inputs",
            "token ids: integers of shape (batch, time), or a dictionary with "
            "'token_ids' and 'padding_mask'",
            x,
        )
    return np.ones(ids.shape, bool)


def weights_of_positions(weight: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return sample weights `(batch, time)`; of None, ones."""
    if weight is None:
        return np.ones(shape, "float32")
    weight = as_array(weight).astype("float32")
    if weight.shape == shape[:1]:
        weight = np.broadcast_to(weight[:, None], shape)
    if weight.shape != shape:
        fail("sample_weight", f"of the shape of the ids, {shape}", weight.shape)
    return weight


def as_inputs(inputs: Any) -> Any:
    """Return inputs in one of three forms: arrays, a source, or a stream.

    A list of texts becomes an array, a list of sequences of token ids a
    dictionary of padded ids and their mask. What is indexed by example, as a
    Grain data source or a PyTorch `Dataset`, becomes a `Source`. A stream gives
    batches: `tf.data.Dataset`, `keras.utils.PyDataset`, a Grain data set, a
    PyTorch `DataLoader`.
    """
    if is_stream(inputs):
        _check_finite(inputs)
        return inputs
    if isinstance(inputs, (list, tuple)) and len(inputs):
        first = inputs[0]
        if isinstance(first, (str, bytes)):
            return np.array(inputs, object)
        if isinstance(first, (list, tuple)) or (
            isinstance(inputs, list) and np.ndim(first) == 1
        ):
            return pad(inputs)
        if np.isscalar(first):
            return np.asarray(inputs)
    known = isinstance(inputs, (list, tuple, dict, str, bytes, Source))
    if (
        not known
        and not keras.ops.is_tensor(inputs)
        and not hasattr(inputs, "__array__")
        and hasattr(inputs, "__len__")
        and hasattr(inputs, "__getitem__")
    ):
        return Source(inputs)
    arrays = keras.tree.map_structure(
        lambda leaf: leaf if isinstance(leaf, Source) else as_array(leaf),
        inputs,
    )
    if any(
        isinstance(a, np.ma.MaskedArray) for a in keras.tree.flatten(inputs)
    ):
        fail("inputs", "arrays without a mask", type(inputs))
    lengths = {
        len(leaf) if np.ndim(leaf) else None
        for leaf in keras.tree.flatten(arrays)
    }
    if len(lengths) != 1 or None in lengths:
        fail(
            "inputs",
            "arrays of the same length, a list of texts, or a data set of "
            "batches",
            f"{type(inputs).__name__} of lengths {lengths}",
        )
    return arrays


def pad(sequences: Any) -> dict[str, np.ndarray]:
    """Return sequences of token ids side by side, padded on the right by 0."""
    arrays = [np.asarray(sequence) for sequence in sequences]
    for number, array in enumerate(arrays):
        if array.ndim != 1 or array.dtype.kind not in "iu":
            fail(
                "inputs",
                "texts, or sequences of token ids",
                f"{sequences[number]!r} in position {number}",
            )
    shape = (len(arrays), max(map(len, arrays)))
    ids, mask = np.zeros(shape, "int32"), np.zeros(shape, "int32")
    for number, array in enumerate(arrays):
        ids[number, : len(array)] = array
        mask[number, : len(array)] = 1
    return {"token_ids": ids, "padding_mask": mask}


class Source:
    """Single examples, read by number, in the form of an array.

    Args:
        examples: has a length and an example for each integer. Of a tuple,
            `(inputs, targets)`, the inputs are used.
    """

    ndim = 1

    def __init__(self, examples: Any) -> None:
        self._examples = examples
        self.shape = (len(examples),)

    def __len__(self) -> int:
        """Return the number of examples."""
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        """Return a batch: the examples of a slice or of an array of numbers."""
        if isinstance(index, slice):
            index = range(*index.indices(len(self)))
        found = [self._examples[int(number)] for number in index]
        found = [x[0] if isinstance(x, tuple) else x for x in found]
        if isinstance(found[0], list):
            return pad(found)
        return keras.tree.map_structure(_stack, *found)


def _stack(*leaves: Any) -> np.ndarray:
    if isinstance(leaves[0], (str, bytes)):
        return np.array(leaves, object)
    return np.stack([as_array(leaf) for leaf in leaves])


def num_examples(x: Any) -> int:
    """Return the number of examples in arrays, a source or a batch."""
    leaf = keras.tree.flatten(x)[0]
    if not np.ndim(leaf):
        fail("inputs", "batched", f"an element of shape {np.shape(leaf)}")
    return len(leaf)


def take(x: Any, index: Any) -> Any:
    """Return the examples of a slice or of an array of numbers."""
    return keras.tree.map_structure(lambda leaf: leaf[index], x)


def batches(
    inputs: Any, batch_size: int, start: int = 0
) -> Iterator[tuple[Any, Any]]:
    """Yield `(inputs, sample weights)` of each batch; weights may be None.

    Args:
        inputs: see `as_inputs`.
        batch_size: of arrays and sources; streams have their own.
        start: number of the first example, of arrays and sources.
    """
    inputs = as_inputs(inputs)
    if not is_stream(inputs):
        for low in range(start, num_examples(inputs), batch_size):
            yield take(inputs, slice(low, low + batch_size)), None
        return
    if isinstance(inputs, keras.utils.PyDataset):
        elements = (inputs[i] for i in range(inputs.num_batches))
    elif is_tf_dataset(inputs):
        elements = inputs.as_numpy_iterator()
    else:
        elements = iter(inputs)
    for element in elements:
        element = keras.tree.map_structure(_as_numpy, element)
        if isinstance(element, list):  # PyTorch's way to collate tuples
            element = tuple(element)
        x, _, weight = keras.utils.unpack_x_y_sample_weight(element)
        yield x, weight


def _as_numpy(leaf: Any) -> Any:
    return as_array(leaf) if hasattr(leaf, "detach") else leaf


def not_stored(
    inputs: Any,
    batch_size: int,
    stored: np.ndarray,
    path: Any,
    verbose: Verbose,
) -> Iterator[tuple[Any, Any, np.ndarray]]:
    """Yield inputs, weights and fingerprints of what is not stored yet.

    If something is stored, the inputs are first read once and compared with it,
    so that nobody pays a teacher for the wrong inputs. Arrays must be in the
    order of the stored rows; a data set may be shuffled.
    """
    left: collections.Counter[int] = collections.Counter()
    start = 0
    if len(stored):
        prints = fingerprint(inputs, verbose=verbose)
        if is_stream(inputs):
            left.update(stored.tolist())
            gone = (left - collections.Counter(prints.tolist())).total()
            if gone:
                how = f"lack {gone} of {len(stored)} examples"
                raise other_inputs(path, how)
        else:
            start, common = len(stored), min(len(prints), len(stored))
            same = np.append(prints[:common] == stored[:common], False)
            which = int(np.argmin(same))
            if which < len(stored):
                raise other_inputs(path, f"differ from example {which} on")
    for x, weight in batches(inputs, batch_size, start):
        prints = fingerprint(x, verbose=0)
        if not left:
            yield x, weight, prints
            continue
        new = []
        for position, one in enumerate(prints.tolist()):
            if left[one] > 0:
                left[one] -= 1
            else:
                new.append(position)
        if new:
            weight = None if weight is None else take(weight, new)
            yield take(x, np.array(new)), weight, prints[new]


def other_inputs(path: Any, how: str) -> ValueError:
    """Return the error about inputs that are not those of a store."""
    return ValueError(
        f"`inputs` must be those of the soft labels at {path}, in their order. "
        "Choose another path, or say overwrite=True. Received: inputs which "
        f"{how}"
    )


def is_tf_dataset(data: Any) -> bool:
    """Return whether this is a `tf.data.Dataset`, without an import."""
    tf = sys.modules.get("tensorflow")
    return tf is not None and isinstance(data, tf.data.Dataset)


def is_torch_loader(data: Any) -> bool:
    """Return whether this is a PyTorch `DataLoader`, without an import."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(data, torch.utils.data.DataLoader)


def is_grain(data: Any) -> bool:
    """Return whether this is a Grain data set, without an import."""
    grain = sys.modules.get("grain")
    return grain is not None and isinstance(
        data, (grain.MapDataset, grain.IterDataset, grain.DataLoader)
    )


def is_stream(data: Any) -> bool:
    """Return whether data come in batches of their own."""
    return (
        isinstance(data, keras.utils.PyDataset)
        or is_tf_dataset(data)
        or is_torch_loader(data)
        or is_grain(data)
    )


def _check_finite(stream: Any) -> None:
    """Refuse a stream that is known to have no end."""
    infinite = False
    if is_tf_dataset(stream):
        infinite = int(stream.cardinality()) == -1
    elif isinstance(stream, keras.utils.PyDataset):
        infinite = stream.num_batches is None
    elif hasattr(stream, "__len__") and is_grain(stream):
        infinite = len(stream) >= sys.maxsize
    if infinite:
        fail("inputs", "finite: leave out `repeat()`", stream)
