"""The writing of a store of tokens, in steps that may be cut anywhere."""

import dataclasses
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keras_ptloss.soft_labels._data import take, wrong_length
from keras_ptloss.soft_labels._journal import Journal, sync
from keras_ptloss.soft_labels._store import TOKEN_FORMATS, damaged
from keras_ptloss.soft_labels._tokens.sequences import (
    Sequences,
    kept_of,
    sequences_of,
    token_batches,
    token_fingerprints,
)
from keras_ptloss.soft_labels._tokens.spec import (
    TokenLabelSpec,
    Tokens,
    encode_tokens,
)
from keras_ptloss.soft_labels._tokens.store import (
    SHARD,
    formats_of,
    read_token_manifest,
)

# Bytes before the data of a `.npy` file, whatever its length.
_HEADER = 128


class Batch(NamedTuple):
    """Sequences to be stored.

    Attributes:
        sequences: Their tokens.
        kept: `(batch, time)` bool, those that count.
        fingerprints: `(batch,)`.
    """

    sequences: Sequences
    kept: Any
    fingerprints: Any


class TokenWriter(Journal):
    """Writes sequences to the ends of files that grow.

    How many tokens there will be is not known, so nothing is reserved; what
    the files have beyond the counts of the manifest is written over.
    """

    rows, read = "sequences", staticmethod(read_token_manifest)

    def __init__(self, store: Path, spec: TokenLabelSpec) -> None:
        super().__init__(store, SHARD, spec)

    @property
    def stored(self) -> int:
        """How many sequences are stored."""
        return self.manifest["stored"]["sequences"] if self.manifest else 0

    @property
    def vocabulary_size(self) -> int | None:
        """The number of ids, as far as known."""
        if self.manifest:
            return int(self.manifest["vocabulary_size"])
        return self.spec.vocabulary_size

    def _stored_fingerprints(self) -> Any:
        # Their header is the last that is written.
        found = np.fromfile(
            self.path("fingerprints"), "<u8", count=self.stored, offset=_HEADER
        )
        if len(found) != self.stored:
            damaged(self.directory, "fingerprints.npy is too short")
        return found

    def _open_files(self) -> None:
        for arrays in formats_of(self.manifest).values():
            for name in arrays:
                self.open_file(name)

    def missing(
        self, dataset: Any, sample_weight: Any, batch_size: int
    ) -> Iterator[tuple[int, Any, Batch]]:
        """Yield `(position, inputs, batch)` of what is not stored.

        The stored sequences are compared with `dataset` on the way, as is
        which of their tokens count.
        """
        end = place = 0
        for row, x, weight in token_batches(dataset, sample_weight, batch_size):
            sequences = sequences_of(x)
            kept = kept_of(sequences, weight)
            found = token_fingerprints(sequences)
            end = row + len(found)
            known = max(0, min(len(found), self.stored - row))
            wrong = self.fingerprints[row : row + known] != found[:known]
            if wrong.any():
                raise ValueError(
                    "`dataset` must hold the stored sequences first, in their"
                    f" order. Received: sequence {row + np.argmax(wrong)},"
                    " which is another than the stored one (or choose another"
                    " `path`)"
                )
            if known:
                bits = _bits(kept[:known], sequences.real[:known])
                place = self._compare(bits, row, place)
            if known < len(found) and self.complete:
                wrong_length(f"at least {end}", self.stored)
            if known < len(found):
                rest = slice(known, None)
                batch = Batch(
                    Sequences(*(part[rest] for part in sequences)),
                    kept[rest],
                    found[rest],
                )
                yield row + known, take(x, rest), batch
        if end < self.stored or not end:
            wrong_length(end, max(self.stored, 1))

    def _compare(self, bits: list[Any], row: int, place: int) -> int:
        """Require that the same tokens count as are stored.

        Args:
            bits: What `_bits` returns of stored sequences.
            row: Position of the first of them.
            place: Where their bytes begin in the file.

        Returns:
            Where they end.
        """
        flat = np.concatenate(bits)
        stored = np.fromfile(
            self.path("kept"), "|u1", count=len(flat), offset=_HEADER + place
        )
        if len(stored) != len(flat):
            damaged(self.directory, "kept.npy is too short")
        rows = np.repeat(np.arange(row, row + len(bits)), list(map(len, bits)))
        wrong = rows[stored != flat]
        if len(wrong):
            raise ValueError(
                "`sample_weight` must be 0 for the tokens that it was 0 for in"
                f" the stored sequences. Received: sequence {wrong[0]}, of"
                " which other tokens count (or choose another `path`)"
            )
        return place + len(flat)

    def append(
        self, batch: Batch, tokens: Tokens, vocabulary_size: int
    ) -> None:
        """Store the next sequences.

        Args:
            batch: What they are.
            tokens: Of all that count, one sequence after the other.
            vocabulary_size: Number of ids.
        """
        encoded, distance = encode_tokens(tokens, vocabulary_size)
        kept, real = batch.kept, batch.sequences.real
        arrays = {
            "sequences": {
                "fingerprints": batch.fingerprints,
                "lengths": real.sum(-1).astype("<u4"),
                "counts": kept.sum(-1).astype("<u4"),
            },
            "tokens": encoded,
            "kept": {"kept": np.concatenate(_bits(kept, real))},
        }
        with self.disk():
            if not self.manifest:
                self._create(vocabulary_size)
            stored = dict(self.manifest["stored"])
            for unit, named in arrays.items():
                for name, rows in named.items():
                    size = rows.dtype.itemsize * int(np.prod(rows.shape[1:]))
                    offset = _HEADER + stored[unit] * size
                    self.write_at(name, rows.tobytes(), offset)
                stored[unit] += len(rows)
            self.count(stored, distance)

    def _create(self, vocabulary_size: int) -> None:
        """Make empty files; the manifest that counts their rows is last."""
        manifest = {
            "format": TOKEN_FORMATS[-1],
            "spec": dataclasses.asdict(self.spec),
            "vocabulary_size": vocabulary_size,
            "shard": list(SHARD),
            "stored": {"sequences": 0, "tokens": 0, "kept": 0},
            "total_variation": {"sum": 0.0, "max": 0.0},
            "checksums": None,
        }
        for arrays in formats_of(manifest).values():
            for name in arrays:
                self.path(name).write_bytes(b"\0" * _HEADER)
                sync(self.path(name))
        self.put_manifest(manifest)
        self._open_files()

    def _close_files(self) -> None:
        """Cut what is not counted, and write the headers."""
        for unit, arrays in formats_of(self.manifest).items():
            for name, (dtype, columns) in arrays.items():
                rows = self.manifest["stored"][unit]
                shape = (rows,) if columns is None else (rows, columns)
                size = np.dtype(dtype).itemsize * int(np.prod(shape))
                os.ftruncate(self.descriptors[name], _HEADER + size)
                self.write_at(name, _header(dtype, shape), 0)


def _bits(kept: Any, real: Any) -> list[Any]:
    """Which tokens of each sequence count, a bit each, in whole bytes."""
    return [np.packbits(k[r]) for k, r in zip(kept, real, strict=True)]


def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The first bytes of a `.npy` file, as NumPy writes them."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    header = file.getvalue()
    if len(header) != _HEADER:
        raise RuntimeError(f"NumPy's header has {len(header)} bytes")
    return header
