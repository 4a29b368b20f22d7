"""Batches of inputs, and the fingerprints by which stored rows are found."""

import collections
import hashlib
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import keras
import numpy as np

from keras_ptloss._backend import as_array
from keras_ptloss._progress import Verbose, track
from keras_ptloss._validation import fail, refuse, refuse_masked

# Names of token ids and of their padding mask in KerasHub and Hugging Face.
MASKS = {"token_ids": "padding_mask", "input_ids": "attention_mask"}


def fingerprint(inputs: Any, *, verbose: Verbose = "auto") -> np.ndarray:
    """Return a hash of each example. It is the same on every machine.

    The dtype of arrays matters, except for integers of rank 1 or 2. Padding is
    ignored for lists of token ids, and for token ids with a mask (a dictionary
    with `"token_ids"` and `"padding_mask"`, or `"input_ids"` and
    `"attention_mask"`). Two different examples have the same fingerprint with
    probability 2^-64.

    Args:
        inputs: as in `SoftLabels.write`.
        verbose: as in `SoftLabels.from_array`.

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
    total = None if library_of(inputs) else -(-num_examples(inputs) // size)
    what = "Computing the fingerprints of the examples"
    found = track(batches(inputs, size), what, total, verbose=verbose)
    return np.concatenate(
        [_fingerprint(x) for x, _ in found] or [np.empty(0, "uint64")]
    )


def _fingerprint(x: Any) -> np.ndarray:
    """Return the fingerprints of one batch."""
    mask = padding_mask(x)
    if mask is not None:
        x = {n: leaf for n, leaf in x.items() if n not in MASKS.values()}
    rows = []
    header = b""
    for leaf in keras.tree.flatten(x):
        array = as_array(leaf)
        if array.dtype.kind in "OUS":
            header += f"text{array.shape[1:]}".encode()
            rows.append([_sized(_text_bytes(row)) for row in array])
            continue
        if array.dtype.kind in "iu" and array.ndim <= 2:
            array = array.astype("int64")
            header += b"integers"
        else:
            header += f"{array.dtype.name}{array.shape[1:]}".encode()
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        if mask is not None and array.shape == mask.shape:
            some = zip(array, mask, strict=True)
            rows.append([_sized(row[kept].tobytes()) for row, kept in some])
        else:
            data, size = array.tobytes(), array.nbytes // max(len(array), 1)
            prefix = size.to_bytes(8, "little")  # as `_sized` adds it
            starts = [size * row for row in range(len(array))]
            rows.append([prefix + data[low : low + size] for low in starts])
    digests = [
        hashlib.blake2b(header + b"".join(parts), digest_size=8).digest()
        for parts in zip(*rows, strict=True)
    ]
    return np.frombuffer(b"".join(digests), "<u8")


def _sized(data: bytes) -> bytes:
    """Return data after its length, so that two parts cannot be confused."""
    return len(data).to_bytes(8, "little") + data


def _text_bytes(row: Any) -> bytes:
    """Return the texts of an example as bytes."""
    encoded = b""
    for text in np.ravel(np.asarray(row, object)):
        if not isinstance(text, (str, bytes)):
            fail("inputs", "dense arrays of numbers or texts", text)
        encoded += _sized(text if isinstance(text, bytes) else text.encode())
    return encoded


def padding_mask(x: Any) -> np.ndarray | None:
    """Return the padding mask of a batch of token ids as bool, or None."""
    for name, mask in MASKS.items():
        if isinstance(x, Mapping) and name in x and mask in x:
            return as_array(x[mask]).astype(bool)
    return None


def sequence_mask(x: Any) -> np.ndarray:
    """Return which entries of a batch are tokens, `(batch, time)` bool."""
    mask = padding_mask(x)
    if mask is not None:
        return mask
    if isinstance(x, Mapping):
        x = next((x[name] for name in MASKS if name in x), None)
    ids = as_array(x)
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        expected = "token ids of shape (batch, time), or a dictionary with "
        fail("inputs", expected + "'token_ids' and 'padding_mask'", x)
    return np.ones(ids.shape, bool)


def weights_of_positions(weight: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return sample weights `(batch, time)`; ones if `weight` is None."""
    if weight is None:
        return np.ones(shape, "float32")
    weight = as_array(weight).astype("float32")
    if weight.shape == shape[:1]:
        weight = np.broadcast_to(weight[:, None], shape)
    if weight.shape != shape:
        fail("sample_weight", f"of the shape of the ids, {shape}", weight.shape)
    return weight


def library_of(data: Any) -> str | None:
    """Return the library of a data set of batches; None for other data."""
    if isinstance(data, keras.utils.PyDataset):
        return "keras"
    # A data set exists only if its library has been imported.
    tf, torch, grain = map(sys.modules.get, ("tensorflow", "torch", "grain"))
    if tf is not None and isinstance(data, tf.data.Dataset):
        return "tensorflow"
    if torch is not None and isinstance(data, torch.utils.data.DataLoader):
        return "torch"
    if grain is not None:
        kinds = (grain.MapDataset, grain.IterDataset, grain.DataLoader)
        return "grain" if isinstance(data, kinds) else None
    return None


def as_inputs(inputs: Any) -> Any:
    """Return inputs as a pytree of arrays, `Examples`, or a set of batches."""
    if library_of(inputs):
        if num_batches(inputs) == math.inf:
            fail("inputs", "finite: leave out `repeat()`", inputs)
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
    if isinstance(inputs, Examples):
        return inputs
    by_index = hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__")
    if by_index and not (
        isinstance(inputs, (list, tuple, dict, str, bytes, range))
        or hasattr(inputs, "__array__")
    ):
        return Examples(inputs)
    shapes = set()
    for leaf in keras.tree.flatten(inputs):
        refuse_masked("inputs", leaf)
        is_array = hasattr(leaf, "__array__")
        shapes.add(np.shape(leaf) if is_array else ())
    lengths = {shape[:1] for shape in shapes}
    if len(lengths) != 1 or () in lengths:
        expected = "arrays of the same length, texts, or a data set of batches"
        found = f"inputs of type {type(inputs).__name__}"
        refuse("inputs", expected, f"{found} of shapes {sorted(shapes)}")
    return keras.tree.map_structure(as_array, inputs)


class Examples:
    """An object that returns single examples, indexed like an array of them.

    Such are PyTorch's `Dataset` and Grain's data sources. If an example is a
    tuple `(inputs, targets)`, only its inputs are used.
    """

    ndim = 1

    def __init__(self, source: Any) -> None:
        self._source = source

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        """Return the examples of a slice or of an array, as a batch."""
        found = [self._source[int(i)] for i in np.arange(len(self))[index]]
        found = [one[0] if isinstance(one, tuple) else one for one in found]
        if isinstance(found[0], list):
            return pad(found)
        return keras.tree.map_structure(_stack, *found)


def _stack(*leaves: Any) -> np.ndarray:
    if isinstance(leaves[0], (str, bytes)):
        return np.array(leaves, object)
    return np.stack([as_array(leaf) for leaf in leaves])


def num_batches(data: Any) -> float | None:
    """Return the number of batches of a data set, or None if it is unknown."""
    library = library_of(data)
    if library == "keras":
        return math.inf if data.num_batches is None else data.num_batches
    if library == "tensorflow":
        count = int(data.cardinality())
        return {-1: math.inf, -2: None}.get(count, count)
    try:
        count = len(data)
    except TypeError:
        return None
    return math.inf if count >= sys.maxsize else count  # Grain's `repeat`


def pad(sequences: Any) -> dict[str, np.ndarray]:
    """Return lists of token ids as padded ids and their mask."""
    arrays = [np.asarray(sequence) for sequence in sequences]
    for array in arrays:
        if array.ndim != 1 or array.dtype.kind not in "iu":
            fail("inputs", "texts, or sequences of token ids", array)
    lengths = np.array([len(array) for array in arrays])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(mask.shape, "int32")
    ids[mask] = np.concatenate(arrays)
    return {"token_ids": ids, "padding_mask": mask.astype("int32")}


def num_examples(x: Any) -> int:
    """Return the number of examples in arrays or in a batch."""
    leaf = keras.tree.flatten(x)[0]
    if not np.ndim(leaf):
        refuse("inputs", "batched", f"an element of shape {np.shape(leaf)}")
    return len(leaf)


def take(x: Any, index: Any) -> Any:
    """Return the examples of a slice or of an array of indices."""
    return keras.tree.map_structure(lambda leaf: leaf[index], x)


def batches(
    inputs: Any, batch_size: int, start: int = 0
) -> Iterator[tuple[Any, Any]]:
    """Yield `(inputs, sample weights)` of each batch; weights may be None.

    The arguments are for arrays; data sets have batches of their own.
    """
    library = library_of(inputs)
    if library is None:
        for low in range(start, num_examples(inputs), batch_size):
            yield take(inputs, slice(low, low + batch_size)), None
        return
    if library == "keras":
        elements = (inputs[i] for i in range(inputs.num_batches))
    elif library == "tensorflow":
        elements = inputs.as_numpy_iterator()
    else:
        elements = iter(inputs)
    for element in elements:
        x, _, weight = unpack(keras.tree.map_structure(_as_numpy, element))
        yield x, weight


def unpack(element: Any) -> tuple[Any, Any, Any]:
    """Return inputs, targets and sample weights of a batch of a data set."""
    if isinstance(element, list):  # PyTorch's way to collate tuples
        element = tuple(element)
    return keras.utils.unpack_x_y_sample_weight(element)


def _as_numpy(leaf: Any) -> Any:
    return as_array(leaf) if hasattr(leaf, "detach") else leaf


def not_stored(
    inputs: Any, batch_size: int, stored: np.ndarray, path: Any, verbose: Any
) -> Iterator[tuple[Any, Any, np.ndarray, np.ndarray]]:
    """Yield inputs, weights, fingerprints and indices of new examples.

    All inputs are first read once and must contain the stored ones, so that
    nobody pays a teacher for the wrong inputs. Arrays must keep their order.
    """
    left = collections.Counter(stored.tolist())
    first = 0
    if left:
        prints = fingerprint(inputs, verbose=verbose)
        gone = (left - collections.Counter(prints.tolist())).total()
        if gone:
            other_inputs(path, f"lack {gone} of {len(stored)} stored examples")
        if not library_of(inputs):
            if (prints[: len(stored)] != stored).any():
                other_inputs(path, "are in another order")
            first = len(stored)
            left.clear()
    for x, weight in batches(inputs, batch_size, first):
        prints = fingerprint(x, verbose=0)
        indices = np.arange(first, first + len(prints))
        first += len(prints)
        if left:
            is_new = np.ones(len(prints), bool)
            for position, one in enumerate(prints.tolist()):
                if left.get(one):
                    left[one] -= 1
                    is_new[position] = False
            if not is_new.any():
                continue
            new = np.flatnonzero(is_new)
            x, prints, indices = take(x, new), prints[new], indices[new]
            weight = None if weight is None else take(weight, new)
        yield x, weight, prints, indices


def other_inputs(path: Any, how: str) -> NoReturn:
    """Raise an error for inputs that do not belong to a store."""
    expected = f"the examples of the soft labels at {path}. Choose another path"
    refuse(
        "inputs", f"{expected}, or pass overwrite=True", f"inputs that {how}"
    )
