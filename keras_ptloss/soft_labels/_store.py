"""The files of a store of soft labels: what they hold, how they are read.

A store is a directory of NumPy arrays (`.npy`) and JSON, one subdirectory a
shard. NumPy's memory map was chosen over Parquet, TFRecord and ArrayRecord
because it needs no new dependency, gives random access by row without an
index, and is read by every tool: `np.load(file, mmap_mode="r")`.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from keras_ptloss._checks import fail
from keras_ptloss.soft_labels._spec import (
    Format,
    SoftLabelSpec,
    array_formats,
    read_spec,
)

# Format 1 stored the k largest as probabilities, not as their logarithms.
FORMATS = ("keras_ptloss.soft_labels/1", "keras_ptloss.soft_labels/2")
TOKEN_FORMATS = ("keras_ptloss.tokens/1",)
# Who reads a format.
KNOWN = {
    **dict.fromkeys(FORMATS, "SoftLabels"),
    **dict.fromkeys(TOKEN_FORMATS, "TokenLabels"),
}
_digest = functools.partial(hashlib.blake2b, digest_size=16)


def shard_path(store: Path, shard: tuple[int, int]) -> Path:
    """Directory of a complete shard."""
    return store / f"shard-{shard[0]:05d}-of-{shard[1]:05d}"


def partial_path(final: Path) -> Path:
    # Only a complete shard bears the final name, so no tool that looks for
    # arrays there takes an unfinished one for a complete one.
    return final.with_name(final.name + ".partial")


def shard_count(store: Path) -> int | None:
    """The number of shards that the store is made of; None if none."""
    counts = {
        int(match[1])
        for entry in (store.iterdir() if store.is_dir() else ())
        if (
            match := re.fullmatch(r"shard-\d+-of-(\d+)(\.partial)?", entry.name)
        )
    }
    if len(counts) > 1:
        fail("path", f"a store of one shard count, not {counts}", str(store))
    return counts.pop() if counts else None


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The JSON record of a shard; None if there is none yet."""
    return read_record(directory, FORMATS, _plausible)


def read_record(
    directory: Path,
    formats: tuple[str, ...],
    plausible: Callable[[dict[str, Any]], bool],
) -> dict[str, Any] | None:
    """Read a manifest of one of the formats whose numbers fit together.

    Args:
        directory: Of the shard.
        formats: The known ones, the newest last.
        plausible: Whether the numbers fit.
    """
    try:
        text = (directory / "manifest.json").read_bytes()
    except FileNotFoundError:
        return None
    try:
        manifest: dict[str, Any] = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        damaged(directory, "its manifest is no JSON")
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found not in formats:
        if isinstance(found, str) and found in KNOWN:
            wanted = f"opened by {KNOWN[found]}, which reads {found}"
            fail("path", wanted, str(directory))
        damaged(directory, f"its manifest's format is not {formats[-1]}")
    try:
        off = manifest["total_variation"]
        finite = all(0 <= off[name] < float("inf") for name in ("sum", "max"))
        fits = finite and plausible(manifest)
    except (KeyError, TypeError, ValueError) as error:
        damaged(directory, f"its manifest is wrong ({error!r})")
    if not fits:
        damaged(directory, "its manifest contradicts itself")
    # Stores of version 0.1.0 have none.
    known = manifest.pop("checksum", None)
    if known not in (None, manifest_checksum(manifest)):
        damaged(directory, "the checksum of its manifest differs")
    return manifest


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """Digest of a manifest without its own; JSON gives numbers back exactly."""
    text = json.dumps(manifest, sort_keys=True)
    return _digest(text.encode()).hexdigest()


def _plausible(manifest: dict[str, Any]) -> bool:
    """Whether the numbers of a manifest fit together."""
    spec, (index, count) = spec_of(manifest), manifest["shard"]
    rows, names = manifest["rows"], spec.class_names
    known = len(names) if names else spec.num_classes
    classes = known or max(manifest["num_classes"], 2)
    counts = [index, count, *rows, manifest["num_classes"], manifest["stored"]]
    return bool(
        # 4.0 and True are equal to whole numbers, and serve as such nowhere.
        all(type(number) is int for number in counts)
        and 0 <= index < count
        and rows == shard_rows(spec, index, count)
        and manifest["num_classes"] == classes > (spec.top_k or 0)
        and 0 <= manifest["stored"] <= rows[1] - rows[0]
        and check_sums(manifest["checksums"], formats_of(manifest))
    )


def check_sums(checksums: Any, names: Iterable[str]) -> bool:
    """Whether there is one of each array; there are none before the end."""
    return checksums is None or (
        isinstance(checksums, dict) and set(checksums) == set(names)
    )


def shard_rows(spec: SoftLabelSpec, index: int, count: int) -> list[int]:
    """First row of a shard and the row after its last."""
    total = spec.num_examples or 0
    return [total * index // count, total * (index + 1) // count]


def progress(final: Path) -> str:
    """How far the writing of a shard has come, in words."""
    manifest = read_manifest(partial_path(final))
    return f"{manifest['stored']} rows stored" if manifest else "not begun"


def damaged(directory: Path, why: str) -> NoReturn:
    fail(
        "path",
        f"an intact store, but {why}. Delete that directory and write it again",
        str(directory),
    )


def is_of_the_machine(error: Exception) -> bool:
    """Whether an error says nothing of what a file holds.

    Too many files are open, the disk fails, or reading is forbidden. What
    pyarrow finds wrong in a file is an OSError too, but without a number.
    """
    if isinstance(error, (FileNotFoundError, IsADirectoryError)):
        return False
    numbered = isinstance(error, OSError) and error.errno is not None
    return numbered or isinstance(error, MemoryError)


def load(directory: Path, name: str) -> Any:
    """Map one of a shard's arrays; never a pickle, which could run code."""
    try:
        # Not np.load, which takes archives too.
        return np.lib.format.open_memmap(directory / f"{name}.npy", mode="r")
    except Exception as error:
        if is_of_the_machine(error):
            error.add_note(f"While mapping {name}.npy of {directory}")
            raise
        # A damaged header makes NumPy raise what its parser raises: EOFError,
        # SyntaxError, tokenize.TokenError.
        damaged(directory, f"{name}.npy is unreadable ({error!r})")


def spec_of(manifest: dict[str, Any]) -> SoftLabelSpec:
    return read_spec(SoftLabelSpec, manifest["spec"])


def has_logs(manifest: dict[str, Any]) -> bool:
    """Whether the k largest are stored as logarithms."""
    return bool(manifest["format"] != FORMATS[0])


def formats_of(manifest: dict[str, Any]) -> dict[str, Format]:
    """Name, dtype and columns of each of a shard's arrays."""
    return array_formats(
        spec_of(manifest), manifest["num_classes"], logs=has_logs(manifest)
    )


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _digest).hexdigest()


def map_array(
    directory: Path,
    name: str,
    form: Format,
    rows: int,
    checksums: dict[str, str] | None,
) -> Any:
    """Map an array of a complete directory, and compare it.

    Args:
        directory: Of the shard.
        name: Of the array.
        form: Its dtype and columns.
        rows: How many it has.
        checksums: Of the shard's arrays; None compares none.
    """
    dtype, columns = form
    shape = (rows,) if columns is None else (rows, columns)
    array = load(directory, name)
    if array.shape != shape or array.dtype != np.dtype(dtype):
        damaged(
            directory,
            f"{name}.npy holds {array.dtype}{array.shape} where"
            f" {np.dtype(dtype)}{shape} was written",
        )
    if checksums is not None and checksum(
        directory / f"{name}.npy"
    ) != checksums.get(name):
        damaged(directory, f"the checksum of {name}.npy differs")
    return array


class Shard:
    """The arrays of a shard's directory, mapped and compared."""

    ordered = True

    def __init__(self, directory: Path, *, verify: bool) -> None:
        manifest = read_manifest(directory)
        if manifest is None:
            damaged(directory, "it has no manifest")
        self.directory, self.manifest = directory, manifest
        self.start, self.stop = manifest["rows"]
        if manifest["stored"] != self.stop - self.start:
            damaged(directory, f"it has {manifest['stored']} rows only")
        known = manifest["checksums"] or {} if verify else None
        rows = self.stop - self.start
        self.arrays = {
            name: map_array(directory, name, form, rows, known)
            for name, form in formats_of(manifest).items()
        }
        # Read whole anyway. What is mapped keeps its file open, and a process
        # may open 1024, as a rule.
        self.fingerprints = np.array(self.arrays.pop("fingerprints"))

    def read(self, rows: Any) -> dict[str, Any]:
        """Read rows, counted from the start of the data set, as stored."""
        return {
            name: np.array(array[rows - self.start])
            for name, array in self.arrays.items()
        }


def open_shards(path: Path, *, verify: bool) -> list[Shard]:
    """Open all shards of a complete store; see `SoftLabels.open`."""
    count = shard_count(path)
    if count is None:
        raise FileNotFoundError(f"No soft labels at {path}")
    if not count:
        fail("path", "a store of at least one shard", str(path))
    # Few are looked for: a name alone can promise billions.
    absent = (
        (index, directory)
        for index in range(count)
        if not (directory := shard_path(path, (index, count))).is_dir()
    )
    missing = [
        f"shard {index} of {count} ({progress(directory)})"
        for index, directory in itertools.islice(absent, 8)
    ]
    if missing:
        more = " and others" if next(absent, None) else ""
        fail(
            "path",
            f"a complete store, but {', '.join(missing)}{more} must be written"
            " first: call `write` (or `write_shard`) again as before, it"
            " resumes",
            str(path),
        )
    shards = [
        Shard(shard_path(path, (index, count)), verify=verify)
        for index in range(count)
    ]
    for index, shard in enumerate(shards):
        first, this = shards[0].manifest, shard.manifest
        same = all(first[k] == this[k] for k in ("spec", "num_classes"))
        if not same or this["shard"] != [index, count]:
            damaged(shard.directory, "it contradicts shard 0")
    return shards
