"""Whole numbers packed to the bits they need, the highest bit first."""

from typing import Any

import numpy as np


def bits_of(vocabulary_size: int) -> int:
    """Bits of an id: `ceil(log2(vocabulary_size))`, at least 1."""
    return max(1, (vocabulary_size - 1).bit_length())


def packed_size(k: int, bits: int) -> int:
    """Bytes of `k` numbers."""
    return -(-k * bits // 8)


def pack(numbers: Any, bits: int) -> Any:
    """Pack rows of numbers.

    Args:
        numbers: `(n, k)` integers below `2**bits`.
        bits: Of each, at most 32.

    Returns:
        `(n, packed_size(k, bits))` uint8; the last bits of a row are 0.
    """
    rows = np.ascontiguousarray(numbers, dtype=">u4")
    count, k = rows.shape
    each = np.unpackbits(rows.view(np.uint8), axis=-1)
    each = each.reshape(count, k, 32)[..., 32 - bits :]
    return np.packbits(each.reshape(count, k * bits), axis=-1)


def unpack(packed: Any, bits: int, k: int) -> Any:
    """Undo `pack`.

    Args:
        packed: `(n, packed_size(k, bits))` uint8.
        bits: Of each number, at most 24.
        k: Numbers in a row.

    Returns:
        `(n, k)` int32.
    """
    # A number and the bits before it, at most 7, are within four bytes.
    padded = np.pad(packed, ((0, 0), (0, 3)))
    first = np.arange(k) * bits
    word = np.zeros((len(packed), k), np.uint32)
    for byte in range(4):
        word = (word << np.uint32(8)) | padded[:, first // 8 + byte]
    shift = (32 - bits - first % 8).astype(np.uint32)
    return ((word >> shift) & np.uint32((1 << bits) - 1)).astype(np.int32)
