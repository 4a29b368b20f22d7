"""The writing of a store of soft labels, in steps that may be cut anywhere."""

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from keras_ptloss._checks import check_count, fail
from keras_ptloss.soft_labels._data import (
    batches,
    check_differing,
    fingerprint,
    is_streamed,
    length,
    take,
)
from keras_ptloss.soft_labels._spec import (
    SoftLabelSpec,
    array_formats,
    decode,
    encode,
    probabilities_of,
)
from keras_ptloss.soft_labels._store import (
    FORMATS,
    checksum,
    formats_of,
    has_logs,
    load,
    manifest_checksum,
    partial_path,
    read_manifest,
    shard_count,
    shard_path,
    shard_rows,
    spec_of,
)


def with_num_examples(spec: SoftLabelSpec, dataset: Any) -> SoftLabelSpec:
    """Complete `spec` by the length of the data set."""
    if not is_streamed(dataset):
        found = length(dataset)
        if spec.num_examples not in (None, found):
            fail("num_examples", f"the data set's {found}", spec.num_examples)
        return dataclasses.replace(spec, num_examples=found)
    if spec.num_examples is None:
        fail(
            "num_examples",
            "given, as spec=SoftLabelSpec(num_examples=...), because such a"
            " data set does not tell its length",
            None,
        )
    return spec


def _write(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _sync(path: Path) -> None:
    """Bring a file, or a directory's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ShardWriter:
    """Writes one shard, in steps that may be cut anywhere.

    Rows go to their place in preallocated files and reach the disk; then the
    manifest, replaced in one step, counts them. Rows that it does not count
    are never trusted. The finished directory gets its final name last.
    """

    def __init__(
        self, store: Path, spec: SoftLabelSpec, shard: tuple[int, int]
    ) -> None:
        total = check_count("num_examples", spec.num_examples)
        self._total = total
        if not isinstance(shard, tuple) or len(shard) != 2:
            fail("shard", "a tuple (index, count)", shard)
        index = check_count("shard", shard[0], at_least=0)
        count = check_count("shard", shard[1])
        if index >= count or count > total:
            fail(
                "shard",
                f"(index, count) with index < count <= {total} examples",
                shard,
            )
        self.spec, self._shard = spec, (index, count)
        self._store, self._final = store, shard_path(store, self._shard)
        self.start, self.stop = shard_rows(spec, index, count)
        self._manifest: dict[str, Any] | None = None
        self._files = contextlib.ExitStack()
        self._open: dict[str, tuple[int, int]] = {}
        self._fingerprints: Any = np.empty(0, "<u8")

    def __enter__(self) -> "ShardWriter":
        try:
            self._store.mkdir(parents=True, exist_ok=True)
            self._lock()
            self._resume()
        except BaseException:
            self._files.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._files.close()

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Say in errors of the disk what became of the rows."""
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror or error}, writing to {self._final}. The"
                f" {self.stored} rows that are stored stay good: make room and"
                " call again to go on",
            ) from error

    @property
    def stored(self) -> int:
        """How many rows of the shard are stored."""
        return self._manifest["stored"] if self._manifest else 0

    @property
    def num_classes(self) -> int | None:
        """The number of classes, as far as known."""
        if self._manifest:
            return int(self._manifest["num_classes"])
        names = self.spec.class_names
        return len(names) if names else self.spec.num_classes

    def _lock(self) -> None:
        # A lock of the kernel's, which ends with its process however that
        # ends. Here, so that stores can be read where fcntl is missing.
        import fcntl

        path = self._final.with_name(self._final.name + ".lock")
        file = self._files.enter_context(path.open("a+", encoding="utf-8"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RuntimeError(
                f"Shard {self._shard[0]} of {self._shard[1]} of {self._store}"
                f" is being written by another process ({file.read()})"
            ) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {os.uname().nodename}")
        file.flush()

    def _resume(self) -> None:
        count = shard_count(self._store)
        if count not in (None, self._shard[1]):
            fail("shard", f"of the store's {count} shards", self._shard)
        complete = self._final.is_dir()
        self._directory = self._final if complete else partial_path(self._final)
        self._directory.mkdir(exist_ok=True)
        _sync(self._store)
        self._manifest = read_manifest(self._directory)
        if self._manifest is None:
            return
        stored = spec_of(self._manifest)
        for field in dataclasses.fields(SoftLabelSpec):
            before = getattr(stored, field.name)
            if getattr(self.spec, field.name) != before:
                fail(
                    field.name,
                    f"{before!r} as in the stored rows (or choose another"
                    " `path`)",
                    getattr(self.spec, field.name),
                )
        hashes = load(self._directory, "fingerprints")
        self._fingerprints = np.array(hashes[: self.stored])
        if not complete:
            self._open_arrays()

    def _create(self, num_classes: int) -> dict[str, Any]:
        """Preallocate the arrays; the manifest that counts them is last."""
        rows = self.stop - self.start
        arrays = array_formats(self.spec, num_classes)
        for name, (dtype, columns) in arrays.items():
            path = self._directory / f"{name}.npy"
            np.lib.format.open_memmap(
                path,
                mode="w+",
                dtype=np.dtype(dtype),
                shape=(rows,) if columns is None else (rows, columns),
            )
            with path.open("r+b") as file:
                # Sparse files would meet a full disk after the teacher has
                # been paid; file systems without the call meet it in write().
                try:
                    size = path.stat().st_size
                    os.posix_fallocate(file.fileno(), 0, size)
                except AttributeError:
                    pass
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                        raise
            _sync(path)
        manifest = {
            "format": FORMATS[-1],
            "spec": dataclasses.asdict(self.spec),
            "num_classes": num_classes,
            "shard": list(self._shard),
            "rows": [self.start, self.stop],
            "stored": 0,
            "total_variation": {"sum": 0.0, "max": 0.0},
            "checksums": None,
        }
        self._put_manifest(manifest)
        self._open_arrays()
        return manifest

    def _open_arrays(self) -> None:
        for name in formats_of(self._manifest or {}):
            path = self._directory / f"{name}.npy"
            offset = np.load(path, mmap_mode="r").offset
            # Written to as a file: through a memory map, a full disk would be
            # a SIGBUS instead of an OSError.
            descriptor = os.open(path, os.O_RDWR)
            self._files.callback(os.close, descriptor)
            self._open[name] = (descriptor, offset)

    def _put_manifest(self, manifest: dict[str, Any]) -> None:
        path = self._directory / "manifest.json"
        new = path.with_suffix(".json.new")
        with new.open("w", encoding="utf-8") as file:
            signed = {**manifest, "checksum": manifest_checksum(manifest)}
            json.dump(signed, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        _sync(self._directory)
        self._manifest = manifest

    def missing(
        self, dataset: Any, batch_size: int
    ) -> Iterator[tuple[int, Any, Any]]:
        """Yield `(position, inputs, fingerprints)` of what is not stored.

        The stored rows are compared with `dataset` on the way.
        """
        for row, x in batches(
            dataset,
            batch_size=batch_size,
            start=self.start,
            stop=self.stop,
            total=self._total,
        ):
            found, first = fingerprint(x), row - self.start
            known = max(0, min(len(found), self.stored - first))
            if known:
                rows = np.arange(first, first + known)
                check_differing(self._fingerprints, found[:known], rows, row)
            if known < len(found):
                x = take(x, slice(known, None))
                yield row + known, x, found[known:]

    def append(self, hashes: Any, outputs: Any) -> None:
        """Store the next rows, `(n, C)` float64."""
        num_classes = outputs.shape[1]
        self._check_top_k(num_classes)
        logs = self._manifest is None or has_logs(self._manifest)
        encoded = encode(self.spec, outputs, logs=logs)
        with np.errstate(invalid="ignore"):
            decoded = decode(self.spec, encoded, num_classes)
        if not np.isfinite(decoded).all():
            if self.spec.dtype == "float32":
                fail("teacher", "one whose outputs float32 can hold", outputs)
            fail("dtype", "'float32' for outputs so extreme", self.spec.dtype)
        logits = self.spec.from_logits
        distance = 0.5 * np.abs(
            probabilities_of(decoded, logits)
            - probabilities_of(outputs, logits)
        ).sum(-1)
        self.append_encoded(hashes, encoded, num_classes, distance)

    def append_encoded(
        self,
        hashes: Any,
        encoded: dict[str, Any],
        num_classes: int,
        distance: Any,
    ) -> None:
        """Store the next rows, as `encode` gives them.

        Args:
            hashes: Their fingerprints, `(n,)`.
            encoded: Their arrays.
            num_classes: C.
            distance: Their total variation from the teacher's rows, `(n,)`.
        """
        self._check_top_k(num_classes)
        with self._disk():
            manifest = dict(self._manifest or self._create(num_classes))
            for name, rows in {**encoded, "fingerprints": hashes}.items():
                descriptor, offset = self._open[name]
                offset += self.stored * (rows.nbytes // len(rows))
                _write(descriptor, rows.tobytes(), offset)
                os.fsync(descriptor)
            error = manifest["total_variation"]
            manifest["total_variation"] = {
                "sum": error["sum"] + float(distance.sum()),
                "max": max(error["max"], float(distance.max())),
            }
            manifest["stored"] += len(hashes)
            self._put_manifest(manifest)

    def _check_top_k(self, num_classes: int) -> None:
        k = self.spec.top_k
        if k is not None and k >= num_classes:
            fail("top_k", f"below the {num_classes} classes", k)

    def finish(self) -> None:
        """Add the checksums and give the directory its final name."""
        if self._directory == self._final or self._manifest is None:
            return
        with self._disk():
            checksums = {
                name: checksum(self._directory / f"{name}.npy")
                for name in self._open
            }
            self._put_manifest({**self._manifest, "checksums": checksums})
            self._directory.rename(self._final)
            _sync(self._store)
