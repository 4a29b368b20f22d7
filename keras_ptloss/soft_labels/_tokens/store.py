"""The files of a store of tokens, read: sequences of different lengths.

Tokens stand one after the other, a row each, in the order of their sequences;
how many of them a sequence has says where the next begins.
"""

from pathlib import Path
from typing import Any

import numpy as np

from keras_ptloss.soft_labels import _store
from keras_ptloss.soft_labels._spec import Format, read_spec
from keras_ptloss.soft_labels._tokens.spec import (
    KEPT_FORMATS,
    SEQUENCE_FORMATS,
    TokenLabelSpec,
    token_formats,
)

# A store is one shard; the name leaves room for several.
SHARD = (0, 1)


def read_token_manifest(directory: Path) -> dict[str, Any] | None:
    """The JSON record of a store's directory; None if there is none yet."""
    return _store.read_record(directory, _store.TOKEN_FORMATS, _plausible)


def spec_of(manifest: dict[str, Any]) -> TokenLabelSpec:
    """The spec that was written."""
    return read_spec(TokenLabelSpec, manifest["spec"])


def formats_of(manifest: dict[str, Any]) -> dict[str, dict[str, Format]]:
    """The arrays' formats, by what a row of them is: as in `stored`."""
    spec = spec_of(manifest)
    return {
        "sequences": SEQUENCE_FORMATS,
        "tokens": token_formats(spec.top_k, manifest["vocabulary_size"]),
        "kept": KEPT_FORMATS,
    }


def _plausible(manifest: dict[str, Any]) -> bool:
    """Whether the numbers of a manifest fit together."""
    spec, stored = spec_of(manifest), manifest["stored"]
    size = manifest["vocabulary_size"]
    spec.check_vocabulary(size)
    formats = formats_of(manifest)
    names = {name for unit in formats.values() for name in unit}
    return bool(
        isinstance(stored, dict)
        and set(stored) == set(formats)
        # True is equal to a whole number, and serves as such nowhere.
        and all(type(n) is int for n in (*stored.values(), size))
        and all(n >= 0 for n in stored.values())
        and manifest["shard"] == list(SHARD)
        and _store.check_sums(manifest["checksums"], names)
    )


class TokenFiles:
    """The arrays of a complete store, mapped and compared."""

    def __init__(self, path: Path, *, verify: bool) -> None:
        directory = _complete(path)
        manifest = read_token_manifest(directory)
        if manifest is None:
            _store.damaged(directory, "it has no manifest")
        self.manifest, self.spec = manifest, spec_of(manifest)
        self.vocabulary_size: int = manifest["vocabulary_size"]
        known = manifest["checksums"] or {} if verify else None
        self._arrays = {
            name: _store.map_array(
                directory, name, form, manifest["stored"][unit], known
            )
            for unit, arrays in formats_of(manifest).items()
            for name, form in arrays.items()
        }
        self.fingerprints, lengths, counts = (
            np.array(self._arrays.pop(name)) for name in SEQUENCE_FORMATS
        )
        self.lengths, self.counts = lengths.astype(int), counts.astype(int)
        self._ends = {
            "tokens": np.concatenate([[0], np.cumsum(self.counts)]),
            "kept": np.concatenate([[0], np.cumsum(-(-self.lengths // 8))]),
        }
        stored = manifest["stored"]
        if any(stored[unit] != ends[-1] for unit, ends in self._ends.items()):
            _store.damaged(
                directory, "lengths.npy and counts.npy contradict it"
            )

    def kept(self, rows: Any) -> Any:
        """Which tokens of the sequences are stored: bool, one after another."""
        bits = np.unpackbits(self._read("kept", "kept", rows))
        lengths = self.lengths[rows]
        # Each begins with a byte of its own; behind the last is nothing.
        *pieces, rest = np.split(bits, np.cumsum(8 * -(-lengths // 8)))
        pieces = [p[:n] for p, n in zip(pieces, lengths, strict=True)]
        return np.concatenate([*pieces, rest]).astype(bool)

    def tokens(self, rows: Any) -> dict[str, Any]:
        """The stored arrays of the tokens of the sequences, in their order."""
        names = token_formats(self.spec.top_k, self.vocabulary_size)
        return {name: self._read(name, "tokens", rows) for name in names}

    def _read(self, name: str, unit: str, rows: Any) -> Any:
        array, ends = self._arrays[name], self._ends[unit]
        pieces = [array[ends[row] : ends[row + 1]] for row in rows]
        return np.concatenate([*pieces, array[:0]])


def _complete(path: Path) -> Path:
    """The directory of a complete store."""
    if _store.shard_count(path) is None:
        raise FileNotFoundError(f"No token labels at {path}")
    directory = _store.shard_path(path, SHARD)
    if not directory.is_dir():
        begun = read_token_manifest(_store.partial_path(directory))
        count = begun["stored"]["sequences"] if begun else 0
        raise ValueError(
            f"`path` must be a complete store, but this has {count} sequences"
            " only: call `write` again as before, it resumes. Received:"
            f" path={str(path)!r}"
        )
    return directory
