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
    """Return a hash of each example. It is the same on every machine.

    Stored soft labels are found by this hash. The dtype of arrays matters, but
    for integers of rank 1 or 2. Padding is ignored for lists of token ids, and
    for token ids with a mask (a dictionary with `"token_ids"` and
    `"padding_mask"`, or with `"input_ids"` and `"attention_mask"`). Two
    different examples have the same fingerprint with probability 2^-64.

    Args:
        inputs: as in `SoftLabels.write`.
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
    total = None if library_of(inputs) else -(-num_examples(inputs) // size)
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
        else:
            data, size = array.tobytes(), array.nbytes // max(len(array), 1)
            starts = [size * row for row in range(len(array))]
            rows.append([data[low : low + size] for low in starts])
    digests = [
        hashlib.blake2b(
            header
            + b"".join([len(p).to_bytes(8, "little") + p for p in parts]),
            digest_size=8,
        ).digest()
        for parts in zip(*rows, strict=True)
    ]
    return np.frombuffer(b"".join(digests), "<u8")


def _text_bytes(row: Any) -> bytes:
    """Return the texts of an example as bytes, each preceded by its length."""
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
    if grain is not None and isinstance(
        data, (grain.MapDataset, grain.IterDataset, grain.DataLoader)
    ):
        return "grain"
    return None


def as_inputs(inputs: Any) -> Any:
    """Return inputs as a pytree of arrays, or as a data set of batches.

    A list of texts becomes an array. A list of sequences of token ids becomes a
    dictionary of padded ids and their mask. Data sets of batches (see
    `library_of`) are not changed.
    """
    if library_of(inputs):
        if _is_endless(inputs):
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
    leaves = keras.tree.flatten(inputs)
    lengths = {
        np.shape(leaf)[:1] if hasattr(leaf, "__array__") else ()
        for leaf in leaves
    }
    masked = any(isinstance(leaf, np.ma.MaskedArray) for leaf in leaves)
    if masked or len(lengths) != 1 or () in lengths:
        fail(
            "inputs",
            "arrays of the same length and without a mask, a list of texts, or "
            "a data set of batches (for PyTorch, a DataLoader)",
            f"{type(inputs).__name__} of lengths {lengths}",
        )
    return keras.tree.map_structure(as_array, inputs)


def _is_endless(data: Any) -> bool:
    """Return whether a data set of batches is known to have no end."""
    library = library_of(data)
    if library == "tensorflow":
        return int(data.cardinality()) == -1
    if library == "keras":
        return data.num_batches is None
    sized = library == "grain" and hasattr(data, "__len__")
    return sized and len(data) >= sys.maxsize


def pad(sequences: Any) -> dict[str, np.ndarray]:
    """Return sequences of token ids, padded on the right with 0."""
    arrays = [np.asarray(sequence) for sequence in sequences]
    for number, array in enumerate(arrays):
        if array.ndim != 1 or array.dtype.kind not in "iu":
            fail(
                "inputs",
                "texts, or sequences of token ids",
                f"{sequences[number]!r} in position {number}",
            )
    lengths = np.array([len(array) for array in arrays])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(mask.shape, "int32")
    ids[mask] = np.concatenate(arrays)
    return {"token_ids": ids, "padding_mask": mask.astype("int32")}


def num_examples(x: Any) -> int:
    """Return the number of examples in arrays or in a batch."""
    leaf = keras.tree.flatten(x)[0]
    if not np.ndim(leaf):
        fail("inputs", "batched", f"an element of shape {np.shape(leaf)}")
    return len(leaf)


def take(x: Any, index: Any) -> Any:
    """Return the examples of a slice or of an array of indices."""
    return keras.tree.map_structure(lambda leaf: leaf[index], x)


def batches(inputs: Any, batch_size: int) -> Iterator[tuple[Any, Any]]:
    """Yield `(inputs, sample weights)` of each batch; weights may be None.

    Args:
        inputs: as `as_inputs` returns them.
        batch_size: batch size for arrays. Data sets have their own batches.
    """
    library = library_of(inputs)
    if library is None:
        for low in range(0, num_examples(inputs), batch_size):
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
    inputs: Any,
    batch_size: int,
    stored: np.ndarray,
    path: Any,
    verbose: Verbose,
) -> Iterator[tuple[Any, Any, np.ndarray, np.ndarray]]:
    """Yield inputs, weights, fingerprints and indices of new examples.

    If rows are stored, all inputs are first read once and must contain the
    stored ones, so that nobody pays a teacher for the wrong inputs. Only data
    sets may have another order, because users rely on that of arrays.
    """
    left = collections.Counter(stored.tolist())
    if left:
        prints = fingerprint(inputs, verbose=verbose)
        gone = (left - collections.Counter(prints.tolist())).total()
        if gone:
            how = f"lack {gone} of {len(stored)} stored examples"
            raise other_inputs(path, how)
        if not library_of(inputs) and (prints[: len(stored)] != stored).any():
            raise other_inputs(path, "are in another order")
    first = 0
    for x, weight in batches(inputs, batch_size):
        prints, new = fingerprint(x, verbose=0), []
        for position, one in enumerate(prints.tolist()):
            if left.get(one):
                left[one] -= 1
            else:
                new.append(position)
        indices = first + np.array(new, int)
        first += len(prints)
        if 0 < len(new) < len(prints):
            weight = None if weight is None else take(weight, new)
            x, prints = take(x, np.array(new)), prints[new]
        if new:
            yield x, weight, prints, indices


def other_inputs(path: Any, how: str) -> ValueError:
    """Return the error to raise for inputs that do not belong to a store."""
    return ValueError(
        f"`inputs` must be the examples of the soft labels at {path}. Choose "
        "another path, or pass overwrite=True. Received: inputs that "
        f"{how}"
    )
