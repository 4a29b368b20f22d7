"""Crash-safe writing of a store: a journal that is sealed into Arrow files.

A store is a directory:

    info.json              what it holds and, once complete, its files
    000000-1f3870be.arrow  rows: one Arrow record batch, named by its CRC-32
    journal-000001         rows that are in no file yet
    .lock                  locked by the process that writes

Each append adds a record to the journal: length and CRC-32 of the Arrow bytes,
then these bytes. A full journal becomes an Arrow file, which has a temporary
name until it is on the disk. If a process is killed, the next one cuts off an
incomplete record and continues from there.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any, Self

import numpy as np

from keras_ptloss.soft_labels.layout import Layout, pyarrow

FILE_BYTES = 256 * 2**20
HEADER = struct.Struct("<QI")  # length and CRC-32 of a journal's record
CLOSED = -1
OWN_NAMES = re.compile(
    r"\.lock|info\.json(\.new)?|sealing|journal-\d+|\d+-[0-9a-f]{8}\.arrow"
)


class StoreWriter:
    """Appends record batches to the store in a directory; a context manager.

    Args:
        path: the directory; it is made if absent.
        fsync: whether each append waits until its rows are on the disk, so
            that a power cut cannot lose them.
        overwrite: whether to delete the store that is there.

    Attributes:
        layout: what the store holds; None before `begin`.
        complete: whether the store is complete.
        num_rows: how many rows are stored.

    Raises:
        RuntimeError: if another process writes to the directory.
        ValueError: if the directory holds anything but a store.
    """

    def __init__(
        self, path: Path, *, fsync: bool = False, overwrite: bool = False
    ) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path, self._fsync = path, fsync
        self._lock = (path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise RuntimeError(
                f"Another process is writing soft labels to {path}. Wait until "
                "it has ended, or choose another path."
            ) from None
        self._journal = CLOSED
        try:
            self._resume(overwrite)
        except BaseException:
            self.close()
            raise

    def _resume(self, overwrite: bool) -> None:
        """Find out what is stored."""
        names = set(os.listdir(self.path))
        foreign = [name for name in names if not OWN_NAMES.fullmatch(name)]
        if foreign:
            raise ValueError(
                "`path` must be a new directory or a store of soft labels. "
                f"Received: path={str(self.path)!r}, which holds {foreign[0]!r}"
            )
        if overwrite or "info.json" not in names:
            # The description goes first: without it, the rest is no store.
            for name in sorted(names - {".lock"}, key="info.json".__ne__):
                (self.path / name).unlink()
        info = read_info(self.path)
        self.layout = None if info is None else info.layout
        self.complete = info is not None and info.complete
        self._files = sorted(file.name for file in self.path.glob("*.arrow"))
        if info is not None and info.complete:
            self._files = info.files
            self._remove_journals(but=None)
        self.num_rows = sum(
            open_file(self.path / name).num_rows for name in self._files
        )
        if self.layout is not None and not self.complete:
            self._open_journal()

    def begin(self, layout: Layout) -> None:
        """Record what the store will hold."""
        self.layout = layout
        write_info(self.path, Info(layout))
        self._open_journal()

    def _open_journal(self) -> None:
        """Open the journal of the next file, and cut off what is not whole."""
        name = f"journal-{len(self._files):06d}"
        self._remove_journals(but=name)
        if self._journal != CLOSED:
            os.close(self._journal)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        self._journal = os.open(self.path / name, flags, 0o666)
        batches, self._end = self._journal_batches()
        os.ftruncate(self._journal, self._end)
        self.num_rows += sum(batch.num_rows for batch in batches)

    def _journal_batches(self) -> tuple[list[Any], int]:
        """Return the journal's record batches, mapped, and where they end."""
        pa = pyarrow()
        path = self.path / f"journal-{len(self._files):06d}"
        found: list[Any] = []
        end = 0
        if not path.stat().st_size:
            return found, end
        schema = self.layout.schema() if self.layout else None
        data = pa.memory_map(str(path)).read_buffer()
        while end + HEADER.size <= data.size:
            length, checksum = HEADER.unpack(data[end : end + HEADER.size])
            record = data.slice(end + HEADER.size, length)
            if record.size < length or zlib.crc32(record) != checksum:
                break
            found.append(pa.ipc.read_record_batch(record, schema))
            end += HEADER.size + length
        return found, end

    def fingerprints(self) -> np.ndarray:
        """Return the fingerprint of each stored row."""
        batches = [open_file(self.path / name) for name in self._files]
        if self._journal != CLOSED:
            batches += self._journal_batches()[0]
        columns = [batch.column("fingerprint").to_numpy() for batch in batches]
        return np.concatenate([*columns, np.empty(0, "uint64")])

    def append(self, batch: Any) -> None:
        """Add the rows of a record batch.

        Raises:
            OSError: if it cannot be written, because the disk is full for
                example. The rows before stay stored.
        """
        data = batch.serialize()
        record = HEADER.pack(len(data), zlib.crc32(data)) + data.to_pybytes()
        try:
            if self._end and self._end + len(record) > FILE_BYTES:
                self._seal()
                self._open_journal()
            left = memoryview(record)
            while left:
                left = left[os.write(self._journal, left) :]
            if self._fsync:
                os.fsync(self._journal)
        except OSError as error:
            os.ftruncate(self._journal, self._end)
            raise OSError(
                error.errno,
                f"{error.strerror}, writing soft labels to {self.path}. "
                f"{self.num_rows} rows are stored: make room and run the same "
                "call again to continue",
            ) from error
        self._end += len(record)
        self.num_rows += batch.num_rows

    def _seal(self) -> None:
        """Make an Arrow file of the journal's rows."""
        pa = pyarrow()
        batches, _ = self._journal_batches()
        table = pa.Table.from_batches(batches).combine_chunks()
        temporary = self.path / "sealing"
        try:
            with pa.ipc.new_file(str(temporary), table.schema) as file:
                file.write_table(table)
            name = f"{len(self._files):06d}-{checksum_of(temporary):08x}.arrow"
            sync(temporary)
            temporary.rename(self.path / name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(self.path)
        self._files.append(name)

    def finish(self) -> None:
        """Seal the last rows and declare the store complete."""
        if self._end:
            self._seal()
        if self.layout is None:
            raise RuntimeError("`begin` comes before `finish`.")
        write_info(self.path, Info(self.layout, self._files, complete=True))
        self._remove_journals(but=None)
        self.complete = True

    def _remove_journals(self, but: str | None) -> None:
        """Remove the journals whose rows are in files."""
        for journal in self.path.glob("journal-*"):
            if journal.name != but:
                journal.unlink()

    def close(self) -> None:
        """Unlock the store."""
        if self._journal != CLOSED:
            os.close(self._journal)
            self._journal = CLOSED
        self._lock.close()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Unlock the store, complete or not."""
        self.close()


@dataclasses.dataclass(frozen=True)
class Info:
    """The content of a store's `info.json`.

    Args:
        layout: what the rows are.
        files: names of the Arrow files in the order of their rows.
        complete: whether these are all rows.
    """

    layout: Layout
    files: list[str] = dataclasses.field(default_factory=list)
    complete: bool = False


def read_info(path: Path) -> Info | None:
    """Return what a directory's `info.json` says; None if there is none."""
    file = path / "info.json"
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_bytes())
        store = found["store"]
        if found["checksum"] != _checksum_of_info(store):
            raise damaged(file)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(file) from error
    try:
        return Info(Layout(**store.pop("layout")), **store)
    except TypeError as error:
        raise ValueError(
            f"The soft labels in {path} were written by another version of "
            f"keras_ptloss, which this one cannot read: {error}."
        ) from error


def write_info(path: Path, info: Info) -> None:
    """Write `info.json`, whole or not at all."""
    store = dataclasses.asdict(info)
    text = {"store": store, "checksum": _checksum_of_info(store)}
    temporary = path / "info.json.new"
    temporary.write_text(json.dumps(text, indent=1), encoding="utf-8")
    sync(temporary)
    temporary.rename(path / "info.json")
    sync(path)


def _checksum_of_info(store: Any) -> int:
    return zlib.crc32(json.dumps(store, sort_keys=True).encode())


def sync(path: Path) -> None:
    """Wait until a file or a directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum_of(path: Path) -> int:
    """Return the CRC-32 of a file."""
    return zlib.crc32(pyarrow().memory_map(str(path)).read_buffer())


def damaged(file: Path) -> ValueError:
    """Return the error about a file that is not as it was written."""
    return ValueError(
        f"The soft labels in {file.parent} are damaged: {file.name} is missing "
        "or not as it was written. Restore the directory from a copy, or write "
        "it again with overwrite=True."
    )


def open_file(file: Path, *, verify: bool = True) -> Any:
    """Return the record batch of a store's Arrow file, memory-mapped."""
    pa = pyarrow()
    if not file.exists():
        raise damaged(file)
    if verify and f"{checksum_of(file):08x}" != file.stem.partition("-")[2]:
        raise damaged(file)
    return pa.ipc.open_file(pa.memory_map(str(file))).get_batch(0)


def discard(path: Path) -> None:
    """Delete what a killed process has left, unless another one writes it."""
    if path.exists():
        with contextlib.suppress(RuntimeError), StoreWriter(path):
            shutil.rmtree(path)
