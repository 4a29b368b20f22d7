"""Crash-safe writing of a store: a journal that is sealed into Arrow files.

A store is a directory:

    info.json              the layout and, once complete, the file names
    000000-1f3870be.arrow  rows: one Arrow record batch, named by its CRC-32
    journal-000001         rows that are not in an Arrow file yet
    .lock                  locked by the process that writes

Each append adds a record to the journal: the length and CRC-32 of the Arrow
bytes, then the bytes. A full journal becomes an Arrow file, which has a
temporary name until it is on the disk. If a process is killed, the next process
cuts off the incomplete record and continues from there.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keras_ptloss.soft_labels.outputs import Layout, pyarrow

FILE_BYTES = 256 * 2**20
HEADER = struct.Struct("<QI")  # length and CRC-32 of a record in a journal
OWN_NAMES = re.compile(
    r"\.lock|info\.json(\.new)?|sealing|journal-\d+|\d+-[0-9a-f]{8}\.arrow"
)


@contextlib.contextmanager
def writing(
    path: Path, *, fsync: bool = False, overwrite: bool = False
) -> Iterator["StoreWriter"]:
    """Lock a directory, which is made if it is missing, and yield a writer.

    With `fsync`, each append waits until its rows are on the disk. `overwrite`
    deletes an existing store.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"Another process is writing soft labels to {path}. Wait until "
                "it has ended, or choose another path."
            ) from None
        names = set(os.listdir(path))
        foreign = [name for name in names if not OWN_NAMES.fullmatch(name)]
        if foreign:
            raise ValueError(
                "`path` must be a new directory or a store of soft labels. "
                f"Received: path={str(path)!r}, which holds {foreign[0]!r}"
            )
        if overwrite or "info.json" not in names:
            # Delete info.json first: without it, a directory is not a store.
            for name in sorted(names - {".lock"}, key="info.json".__ne__):
                (path / name).unlink()
        yield StoreWriter(path, fsync)


class StoreWriter:
    """Appends record batches to the store in a locked directory.

    Attributes:
        layout: the layout of the rows; None before the first `append`.
        complete: whether the store is complete.
        num_rows: how many rows are stored.
    """

    def __init__(self, path: Path, fsync: bool) -> None:
        self.path, self._fsync = path, fsync
        info = read_info(path)
        self.layout = None if info is None else info.layout
        files = None if info is None else info.files
        self.complete = files is not None
        if files is None:
            files = sorted(file.name for file in path.glob("*.arrow"))
        self._files = files
        # The rows of all other journals are in Arrow files.
        for journal in path.glob("journal-*"):
            if self.complete or journal != self._journal:
                journal.unlink()
        in_journal, self._end = self._journal_batches()
        if self._journal.exists():
            os.truncate(self._journal, self._end)
        in_files = [open_file(path / name) for name in self._files]
        self.num_rows = sum(batch.num_rows for batch in in_files + in_journal)

    @property
    def _journal(self) -> Path:
        """The journal whose rows will be the next Arrow file."""
        return self.path / f"journal-{len(self._files):06d}"

    def _journal_batches(self) -> tuple[list[Any], int]:
        """Return the journal's memory-mapped record batches and their end."""
        pa = pyarrow()
        found: list[Any] = []
        end = 0
        file = self._journal
        # An empty file cannot be mapped.
        if self.layout is None or not file.exists() or not file.stat().st_size:
            return found, end
        schema = self.layout.schema()
        data = pa.memory_map(str(file)).read_buffer()
        while end + HEADER.size <= data.size:
            begin = end + HEADER.size
            length, checksum = HEADER.unpack(data[end:begin])
            record = data[begin : begin + length]
            if record.size < length or zlib.crc32(record) != checksum:
                break
            found.append(pa.ipc.read_record_batch(record, schema))
            end = begin + length
        return found, end

    def fingerprints(self) -> np.ndarray:
        """Return the fingerprint of each stored row."""
        batches = [open_file(self.path / name) for name in self._files]
        batches += self._journal_batches()[0]
        columns = [batch.column("fingerprint").to_numpy() for batch in batches]
        return np.concatenate([*columns, np.empty(0, "uint64")])

    def append(self, batch: Any) -> None:
        """Add the rows of a record batch, which must have the same layout.

        If this fails because the disk is full, earlier rows stay stored.
        """
        layout = Layout.of_schema(batch.schema)
        if self.layout is None:
            self.layout = layout
            write_info(self.path, Info(layout))
        check_same(self.layout, vars(layout), self.path)
        data = batch.serialize()
        try:
            if self._end and self._end + data.size > FILE_BYTES:
                self._seal()
            with self._journal.open("ab") as file:
                file.write(HEADER.pack(data.size, zlib.crc32(data)))
                file.write(data)
                if self._fsync:
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}, writing soft labels to {self.path}. "
                f"{self.num_rows} rows are stored. Free some disk space and "
                "run the same call again to continue",
            ) from error
        self._end += HEADER.size + data.size
        self.num_rows += batch.num_rows

    def _seal(self) -> None:
        """Move the journal's rows to a new Arrow file."""
        pa = pyarrow()
        batches, _ = self._journal_batches()
        table = pa.Table.from_batches(batches).combine_chunks()
        temporary, journal = self.path / "sealing", self._journal
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
        journal.unlink()
        self._end = 0

    def finish(self) -> None:
        """Move the last rows to a file and mark the store as complete."""
        if self.layout is None:
            raise ValueError("There must be at least one example to store.")
        if self._end:
            self._seal()
        write_info(self.path, Info(self.layout, self._files))
        self.complete = True


def check_same(stored: Any, expected: dict[str, Any], path: Any) -> None:
    """Require a stored layout to have the expected values."""
    for name, value in expected.items():
        found = getattr(stored, name)
        if found != value:
            raise ValueError(
                f"The soft labels at {path} were written with another {name}, "
                f"{found!r}. Choose another path, or pass overwrite=True. "
                f"Received: {name}={value!r}"
            )


@dataclasses.dataclass
class Info:
    """The content of a store's `info.json`."""

    layout: Layout
    files: list[str] | None = None  # in the order of the rows, once complete


def read_info(path: Path) -> Info | None:
    """Return the content of a directory's `info.json`, or None."""
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
            f"keras_ptloss, and this version cannot read them: {error}."
        ) from error


def write_info(path: Path, info: Info) -> None:
    """Write `info.json`; if this fails, leave the old file unchanged."""
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


def open_file(file: Path, *, verify: bool = True) -> Any:
    """Return the record batch of a store's Arrow file, memory-mapped."""
    pa = pyarrow()
    if not file.exists():
        raise damaged(file)
    if verify and f"{checksum_of(file):08x}" != file.stem.partition("-")[2]:
        raise damaged(file)
    return pa.ipc.open_file(pa.memory_map(str(file))).get_batch(0)


def damaged(file: Path) -> ValueError:
    """Return the error to raise for a file that is missing or has changed."""
    return ValueError(
        f"The soft labels in {file.parent} are damaged: {file.name} is missing "
        "or has changed since it was written. Restore the directory from a "
        "copy, or write it again with overwrite=True."
    )


def discard(path: Path) -> None:
    """Delete what a killed process left, unless another process writes it."""
    if path.exists():
        with contextlib.suppress(RuntimeError, ValueError), writing(path):
            shutil.rmtree(path)
