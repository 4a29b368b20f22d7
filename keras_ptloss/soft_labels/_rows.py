"""Stored rows, read like arrays: whole, or as the k classes kept of them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keras_ptloss._checks import fail
from keras_ptloss.soft_labels._spec import decode, top_k_of
from keras_ptloss.soft_labels._store import spec_of

# Rows decoded at a time, in what fits the processor's cache.
_CHUNK = 512
# The id of all other classes together, as `TopKPTLoss` has it.
_REST = -1


class Rows:
    """Float32 rows of a list of shards, decoded as they are read.

    Args:
        shards: The shards, in order.
        row_shape: Shape of a decoded row.
    """

    dtype = np.dtype("float32")

    def __init__(self, shards: list[Any], row_shape: tuple[int, ...]) -> None:
        self._shards = shards
        self.shape: tuple[int, ...] = (shards[-1].stop, *row_shape)
        self.fingerprints = np.concatenate([s.fingerprints for s in shards])
        for shard in shards:  # instead of another copy
            shard.fingerprints = self.fingerprints[shard.start : shard.stop]
        # Whether the rows have an order; else they are found by content only.
        self.ordered = all(shard.ordered for shard in shards)

    def __len__(self) -> int:
        """Return the number of examples."""
        return int(self.shape[0])

    def __getitem__(self, index: Any) -> Any:
        """Return the float32 rows of an int, a slice, or an array of rows."""
        if isinstance(index, slice):
            rows = np.arange(*index.indices(len(self)))
        else:
            rows = np.asarray(index)
            if rows.dtype == bool and rows.shape == (len(self),):
                rows = np.flatnonzero(rows)
            elif not rows.size:
                rows = rows.astype(int)
            if rows.dtype.kind not in "iu" or rows.ndim > 1:
                raise IndexError(
                    "Soft labels are indexed by one int, slice, or 1-D array"
                    f" of rows. Received: index={index!r}"
                )
        outside = (rows < -len(self)) | (rows >= len(self))
        if np.any(outside):
            bad = np.atleast_1d(rows)[np.atleast_1d(outside)][0]
            raise IndexError(f"Row {bad} of {len(self)} soft labels")
        rows = np.where(rows < 0, rows + len(self), rows)
        read = self._read(np.atleast_1d(rows))
        return read if rows.ndim else read[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """Return all rows; `np.asarray(labels)`."""
        if copy is False:
            raise ValueError("Soft labels are decoded, hence always copied.")
        return self[:].astype(dtype or self.dtype, copy=False)

    def _read(self, rows: Any) -> Any:
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for low in range(0, len(rows), _CHUNK):
            chunk = rows[low : low + _CHUNK]
            for mine, stored in self._by_shard(chunk):
                out[low : low + _CHUNK][mine] = self._decode(stored)
        return out

    def stored(self, rows: Any) -> dict[str, Any]:
        """The arrays of an array of rows, as they are stored."""
        out: dict[str, Any] = {}
        for mine, arrays in self._by_shard(rows):
            for name, part in arrays.items():
                if name not in out:
                    shape = (len(rows), *part.shape[1:])
                    out[name] = np.empty(shape, part.dtype)
                out[name][mine] = part
        return out

    def _by_shard(self, rows: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yield `(mask, arrays)`, what each shard holds of the rows."""
        starts = [shard.start for shard in self._shards]
        owner = np.searchsorted(starts, rows, side="right") - 1
        for number in np.unique(owner):
            mine = owner == number
            yield mine, self._shards[number].read(rows[mine])

    def _decode(self, stored: dict[str, Any]) -> Any:
        raise NotImplementedError


class TopKTargets(Rows):
    """The k classes kept of each row, as `TopKPTLoss` takes them.

    `(N, k + 1, 2)`: ids and natural log-probabilities. The last entry, of id
    -1, is the mass of all other classes.
    """

    def _decode(self, stored: dict[str, Any]) -> Any:
        classes, log_values, log_tail = top_k_of(stored)
        rest = np.full_like(classes[:, :1], _REST)
        ids = np.concatenate([classes, rest], axis=1)
        logs = np.concatenate([log_values, log_tail[:, None]], axis=1)
        return np.stack([ids.astype("float32"), logs], axis=-1)


class StoredRows(Rows):
    """Full rows `(N, C)`; what `SoftLabels` is without files."""

    def __init__(self, path: str | os.PathLike[str], shards: list[Any]):
        """Use `SoftLabels.open`."""
        first = shards[0].manifest
        super().__init__(shards, (first["num_classes"],))
        self.path = Path(path)
        self.spec = spec_of(first)
        errors = [shard.manifest["total_variation"] for shard in shards]
        self.mean_total_variation = sum(e["sum"] for e in errors) / len(self)
        self.max_total_variation = max(e["max"] for e in errors)

    @property
    def from_logits(self) -> bool:
        """Whether the rows are logits; else they are probabilities."""
        return self.spec.from_logits

    @property
    def top_k_targets(self) -> TopKTargets:
        """What is stored with `top_k`, unspread: `y_true` of `TopKPTLoss`.

        Read like an array of shape `(N, k + 1, 2)`; see `attach`.
        """
        if self.spec.top_k is None:
            fail("top_k", "given in the store's spec", None)
        return TopKTargets(self._shards, (self.spec.top_k + 1, 2))

    def __repr__(self) -> str:
        """Return path, shape and spec."""
        return f"SoftLabels({str(self.path)!r}, {self.shape}, {self.spec})"

    def _decode(self, stored: dict[str, Any]) -> Any:
        return decode(self.spec, stored, self.shape[1])
