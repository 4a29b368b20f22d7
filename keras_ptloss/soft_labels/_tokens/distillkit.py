"""Parquet files as DistillKit writes them: lists of tokens, also compressed.

Of each sequence `input_ids`, and of each of its tokens what follows it:

    token_ids, top_values           lists of ids and of log-probabilities, or
    bytepacked_indices,             ids packed to ceil(log2(d)) bits, and bytes
    compressed_logprobs             of what `compression_config.yaml` says

Compressed are, after one another: the `exact_k` largest; the coefficients of a
polynomial in the place of the others; and bins of what it leaves, each a scale
and whole numbers of some bits. The polynomial is all that is lost.
"""

import collections
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from keras_ptloss._checks import fail
from keras_ptloss.soft_labels._parquet import import_pyarrow, read_batches
from keras_ptloss.soft_labels._store import is_of_the_machine
from keras_ptloss.soft_labels._tokens.answers import Answer
from keras_ptloss.soft_labels._tokens.packing import (
    bits_of,
    packed_size,
    unpack,
)
from keras_ptloss.soft_labels._tokens.spec import PADDING

_PLAIN = ("token_ids", "top_values")
_PACKED = ("bytepacked_indices", "compressed_logprobs")
_CONFIG = "compression_config.yaml"
_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class ParquetLists:
    """Reads the files.

    Args:
        files: Their paths.
    """

    def __init__(self, files: list[Path]) -> None:
        self._pa, self._files = import_pyarrow(), files
        self._where: Path = files[0]
        self.unknown: collections.Counter[str] = collections.Counter()
        self.unknown_mass, self.renormalised = 0.0, 0

    def fail(self, where: str, problem: str) -> NoReturn:
        """Raise the error for a row."""
        raise ValueError(
            "`source` must be intact Parquet files of DistillKit's columns."
            f" Received: {where} of {self._where} {problem}"
        )

    def read(self) -> Iterator[Answer]:
        """Yield the rows in the order of the files."""
        for path in self._files:
            self._where = path
            try:
                file = self._pa.parquet.ParquetFile(path)
                names = file.schema_arrow.names
            except (OSError, self._pa.ArrowException) as error:
                if is_of_the_machine(error):
                    raise
                self.fail("the footer", f"is unreadable ({error})")
            found = [p for p in (_PLAIN, _PACKED) if set(p) <= set(names)]
            if not found or "input_ids" not in names:
                self.fail(
                    "the schema",
                    f"has the columns {names}: it must have input_ids, and"
                    f" {_PLAIN} or {_PACKED}",
                )
            compression = None if found[0] == _PLAIN else _config(path.parent)
            row = 0
            damaged = functools.partial(self.fail, "a page")
            columns = ["input_ids", *found[0]]
            for batch in read_batches(file, 64, columns, damaged):
                for index in range(len(batch)):
                    yield self._answer(batch, index, f"row {row}", compression)
                    row += 1

    def _answer(
        self, batch: Any, index: int, where: str, compression: Any
    ) -> Answer:
        tokens, ids, logs = (batch.column(n)[index].values for n in range(3))
        if tokens is None or ids is None or logs is None:
            self.fail(where, "has a null")
        sequence = self._numbers(tokens, where)
        ids, logs = self._lists(ids, where), self._lists(logs, where)
        if ids.dtype.kind not in "iu":
            self.fail(where, f"has ids in {ids.dtype}, not whole numbers")
        if len(ids) != len(logs) or not 0 <= len(sequence) - len(ids) <= 1:
            self.fail(
                where,
                f"has {len(ids)} and {len(logs)} lists of {len(sequence)}"
                " tokens: one each, or one fewer",
            )
        if compression is not None:
            ids, logs = self._unpacked(ids, logs, compression, where)
        if ids.shape != logs.shape:
            self.fail(where, f"has lists of {ids.shape} and {logs.shape}")
        # Its writer leaves such where there is nothing.
        ids = np.where(np.isneginf(logs), PADDING, ids.astype("int64"))
        if compression is not None:
            # The polynomial may raise them above 1 in all.
            over = np.maximum(np.exp(logs).sum(-1, keepdims=True), 1)
            self.renormalised += int((over > 1).sum())
            logs = logs - np.log(over)
        return Answer(where, sequence=sequence, ids=ids, logs=logs)

    def _numbers(self, column: Any, where: str) -> Any:
        if column.null_count:
            self.fail(where, "has a null")
        numbers = column.to_numpy(zero_copy_only=False)
        if numbers.dtype.kind not in "iuf":
            self.fail(where, f"has {column.type}, not numbers")
        return numbers

    def _lists(self, column: Any, where: str) -> Any:
        """The lists of a sequence as `(tokens, width)`."""
        if not hasattr(column.type, "value_type"):
            self.fail(where, f"has {column.type}, not lists of lists")
        if column.null_count:
            self.fail(where, "has a null")
        lengths = self._pa.compute.list_value_length(column)
        lengths = set(lengths.to_numpy(zero_copy_only=False))
        if len(lengths) > 1:
            self.fail(
                where, f"has lists of {sorted(map(int, lengths))} numbers"
            )
        width = int(lengths.pop()) if lengths else 0
        flat = self._numbers(column.flatten(), where)
        return flat.reshape(len(column), width)

    def _unpacked(
        self, ids: Any, logs: Any, compression: dict[str, Any], where: str
    ) -> tuple[Any, Any]:
        k, bits = compression["k"], bits_of(compression["d"])
        sizes = packed_size(k, bits), compressed_size(compression)
        if (ids.shape[1], logs.shape[1]) != sizes:
            self.fail(
                where,
                f"has {ids.shape[1]} and {logs.shape[1]} bytes a token where"
                f" {_CONFIG} says {sizes[0]} and {sizes[1]}",
            )
        return (
            unpack(ids.astype("uint8"), bits, k),
            decompress(logs.astype("uint8"), compression),
        )


def _config(folder: Path) -> dict[str, Any]:
    """What is beside the files."""
    path = folder / _CONFIG
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"{path} needs PyYAML: pip install pyyaml") from error
    if not path.exists():
        raise FileNotFoundError(
            f"No {path}, which says how log-probabilities are compressed"
        )
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
        config = dict(config.get("logprob_compressor", config))
        compressed_size(config)
        bits_of(config["d"])
    except (
        yaml.YAMLError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        fail("source", f"beside a valid {_CONFIG} ({error!r})", str(path))
    if bits_of(config["d"]) > 24:
        fail("source", "of a vocabulary of at most 2**24", str(path))
    return config


def compressed_size(config: dict[str, Any]) -> int:
    """Bytes of a token's log-probabilities."""
    exact = config["exact_k"] * _SIZES[config.get("exact_dtype", "float32")]
    terms = len(config.get("polynomial_terms") or ())
    size = exact + terms * _SIZES[config.get("term_dtype", "float32")]
    for part in config.get("residual_bins") or ():
        size += _SIZES[part["scale_dtype"]]
        size += packed_size(part["num_elements"], part["element_bits"])
    return int(size)


def decompress(data: Any, config: dict[str, Any]) -> Any:
    """Log-probabilities `(n, k)` float64 of bytes `(n, compressed_size)`."""
    offset = 0

    def take(count: int) -> Any:
        nonlocal offset
        offset += count
        return np.ascontiguousarray(data[:, offset - count : offset])

    def floats(count: int, dtype: str) -> Any:
        found = take(count * _SIZES[dtype])
        if dtype == "bfloat16":  # the upper half of a float32
            return (found.view("<u2").astype("<u4") << 16).view("<f4")
        return found.view(f"<f{_SIZES[dtype]}")

    k, exact_k = config["k"], config["exact_k"]
    out = np.zeros((len(data), k))
    out[:, :exact_k] = floats(exact_k, config.get("exact_dtype", "float32"))
    terms = config.get("polynomial_terms") or ()
    if terms:
        count = k - exact_k
        place = np.arange(count, dtype="float64")
        if config.get("normalize_t", False):
            place = np.linspace(0, 1, count)
        named = {"sqrt": np.sqrt, "exp": np.exp}
        powers = np.stack(
            [named[t](place) if t in named else place**t for t in terms]
        )
        coefficients = floats(len(terms), config.get("term_dtype", "float32"))
        out[:, exact_k:] = coefficients @ powers
    place = exact_k
    for part in config.get("residual_bins") or ():
        count, bits = part["num_elements"], part["element_bits"]
        scale = floats(1, part["scale_dtype"])
        whole = unpack(take(packed_size(count, bits)), bits, count)
        signed = 2 * whole - 1 if bits == 1 else whole - (1 << (bits - 1))
        out[:, place : place + count] += signed * scale
        place += count
    if config.get("delta_encoding", True):
        out = np.cumsum(out, axis=-1)
    return out
