"""What all writers of stores share: files whose writing may be cut anywhere."""

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, Self, TextIO, TypeVar

import numpy as np

from keras_ptloss._checks import fail
from keras_ptloss.soft_labels._spec import read_spec
from keras_ptloss.soft_labels._store import (
    checksum,
    manifest_checksum,
    partial_path,
    shard_count,
    shard_path,
)

Writer = TypeVar("Writer", bound="Journal")


# All that is ever in the directory of a shard; first what makes the rest count.
OWN = (
    "manifest.json",
    "manifest.json.new",
    *(
        f"{name}.npy"
        for name in (
            *("fingerprints", "labels", "classes", "values"),
            *("log_values", "log_tail", "ids", "lengths", "counts", "kept"),
        )
    ),
)


def refuse_old(store: Path) -> NoReturn:
    """Raise the error of imports to a store that is there.

    A corrected file must not silently keep the rows of the first one.
    """
    fail("path", "a new directory: imports do not resume", str(store))


def sync(path: Path) -> None:
    """Bring a file, or a directory's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Journal:
    """Writes one shard's directory, one process at a time.

    Rows go to their place in the files and reach the disk; then the manifest,
    replaced in one step, counts them. Rows that it does not count are never
    trusted. The finished directory gets its final name last. Where an error
    comes before the first row, nothing is left behind.

    Subclasses say what the files are, and write.

    Args:
        store: Directory of the store.
        shard: Index and count.
        spec: What is stored.
    """

    # Of subclasses: what is counted, for errors; and the function that returns
    # the manifest in a directory, or None.
    rows: str
    read: Any

    def __init__(self, store: Path, shard: tuple[int, int], spec: Any) -> None:
        self._store, self._final = store, shard_path(store, shard)
        self._lock_path = self._final.with_name(self._final.name + ".lock")
        self._made, self.resumes = False, True
        self.shard, self.spec = shard, spec
        # Empty until something is stored, or may be.
        self.manifest: dict[str, Any] = {}
        self.fingerprints: Any = np.empty(0, "<u8")
        self._files = contextlib.ExitStack()
        self.descriptors: dict[str, int] = {}

    def __enter__(self) -> Self:
        try:
            self._lock()
            self._find()
            self._resume()
        except BaseException:
            self._files.close()
            raise
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if error is not None and not self.complete and not self.stored:
            # Nothing is left of it; the directory is, if it was there.
            self.discard()
            self._lock_path.unlink(missing_ok=True)
            if self._made:
                with contextlib.suppress(OSError):  # others write there
                    self._store.rmdir()
        self._files.close()

    @property
    def stored(self) -> int:
        """How many rows are stored."""
        raise NotImplementedError

    def _resume(self) -> None:
        """Read what there is of an earlier call, and require the same spec."""
        # Under the lock: another import may just have finished.
        if not self.resumes and (self.directory / "manifest.json").exists():
            refuse_old(self._store)
        self.manifest = self.read(self.directory) or {}
        if not self.manifest:
            return
        stored = read_spec(type(self.spec), self.manifest["spec"])
        for field in dataclasses.fields(self.spec):
            before, now = (getattr(s, field.name) for s in (stored, self.spec))
            if now != before:
                fail(
                    field.name,
                    f"{before!r} as in the stored rows (or choose another"
                    " `path`)",
                    now,
                )
        self.fingerprints = self._stored_fingerprints()
        if not self.complete:
            self._open_files()

    def _stored_fingerprints(self) -> Any:
        """Those that the manifest counts."""
        raise NotImplementedError

    def _open_files(self) -> None:
        """Open the files of all arrays by `open_file`."""
        raise NotImplementedError

    def _lock(self) -> None:
        # A lock of the kernel's, which ends with its process however that
        # ends. Here, so that stores can be read where fcntl is missing.
        import fcntl

        while True:
            file = self._files.enter_context(self._open_lock())
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise RuntimeError(
                    f"Shard {self.shard[0]} of {self.shard[1]} of {self._store}"
                    f" is being written by another process ({file.read()})"
                ) from None
            # Whoever had it may have removed it, having written nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(
                    os.fstat(file.fileno()), self._lock_path.stat()
                ):
                    break
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {os.uname().nodename}")
        file.flush()

    def _open_lock(self) -> TextIO:
        while True:
            self._made = not self._store.is_dir()
            self._store.mkdir(parents=True, exist_ok=True)
            # Another writer may remove what it made, before it is opened.
            with contextlib.suppress(FileNotFoundError):
                return self._lock_path.open("a+", encoding="utf-8")

    def _find(self) -> None:
        count = shard_count(self._store)
        if count not in (None, self.shard[1]):
            self._lock_path.unlink()  # of a shard that there is not to be
            fail("shard", f"of the store's {count} shards", self.shard)
        complete = self._final.is_dir()
        self.directory = self._final if complete else partial_path(self._final)
        self.directory.mkdir(exist_ok=True)
        sync(self._store)

    @property
    def complete(self) -> bool:
        """Whether the directory has its final name."""
        return self.directory == self._final

    @contextlib.contextmanager
    def disk(self) -> Iterator[None]:
        """Say in errors of the disk what became of the rows."""
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror or error}, writing to {self._final}. The"
                f" {self.stored} {self.rows} that are stored stay good: make"
                " room and call again to go on",
            ) from error

    def path(self, name: str) -> Path:
        """The file of an array."""
        return self.directory / f"{name}.npy"

    def open_file(self, name: str) -> None:
        """Open the file of an array for writing."""
        # Written to as a file: through a memory map, a full disk would be a
        # SIGBUS instead of an OSError.
        descriptor = os.open(self.path(name), os.O_RDWR)
        self._files.callback(os.close, descriptor)
        self.descriptors[name] = descriptor

    def write_at(self, name: str, data: bytes, offset: int) -> None:
        """Write to an open file, and bring it to the disk."""
        descriptor = self.descriptors[name]
        while data:
            written = os.pwrite(descriptor, data, offset)
            data, offset = data[written:], offset + written
        os.fsync(descriptor)

    def put_manifest(self, manifest: dict[str, Any]) -> None:
        """Replace the manifest, in one step."""
        path = self.directory / "manifest.json"
        new = path.with_suffix(".json.new")
        with new.open("w", encoding="utf-8") as file:
            signed = {**manifest, "checksum": manifest_checksum(manifest)}
            json.dump(signed, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        sync(self.directory)
        self.manifest = manifest

    def count(self, stored: Any, distance: Any) -> None:
        """Put a manifest that counts what has been written.

        Args:
            stored: How many rows there now are.
            distance: Total variation of the new ones from the teacher's.
        """
        error = self.manifest["total_variation"]
        error = {
            "sum": error["sum"] + float(distance.sum()),
            "max": float(max(error["max"], distance.max(initial=0.0))),
        }
        self.put_manifest(
            {**self.manifest, "stored": stored, "total_variation": error}
        )

    def discard(self) -> None:
        """Remove what is written of a shard that is not complete.

        What others have put there stays.
        """
        if self.complete:
            return
        if not self.directory.is_symlink():
            with contextlib.suppress(OSError):
                for name in OWN:
                    (self.directory / name).unlink(missing_ok=True)
                self.directory.rmdir()
        self.manifest = {}

    def finish(self) -> None:
        """Add the checksums and give the directory its final name."""
        if self.complete or not self.manifest:
            return
        with self.disk():
            self._close_files()
            checksums = {
                name: checksum(self.path(name)) for name in self.descriptors
            }
            self.put_manifest({**self.manifest, "checksums": checksums})
            self.directory.rename(self._final)
            sync(self._store)

    def _close_files(self) -> None:
        """What the files still need before their checksums are taken."""


@contextlib.contextmanager
def at_once(writer: Writer) -> Iterator[Writer]:
    """Write a store whole or not at all, for no later call goes on with it.

    Raises:
        ValueError: If there is one already.
    """
    writer.resumes = False
    with writer:
        try:
            yield writer
        except BaseException:
            writer.discard()
            raise


def reserve(path: Path) -> None:
    """Take a file's space on the disk.

    Sparse files would meet a full disk after the teacher has been paid; file
    systems without the call meet it in write().
    """
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except AttributeError:
            pass
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
