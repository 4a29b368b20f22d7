"""Crash-safe writing of a store: a journal that is sealed into Arrow files.

A store is a directory:

    000000-1f3870be.arrow      one Arrow record batch, named by its CRC-32
    000001-be9a80c1-end.arrow  the last one of a complete store
    journal-000001             rows that are not in an Arrow file yet
    .lock                      locked by the process that writes

A journal has records: the length and CRC-32 of Arrow bytes, then the bytes. The
first record is the schema; each append adds a record batch. A full journal
becomes an Arrow file, which has a temporary name until it is on the disk. If a
process is killed, the next process cuts off the incomplete record and continues
from there.
"""

import contextlib
import fcntl
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
    r"\.lock|sealing|journal-\d+|\d+-[0-9a-f]{8}(-end)?\.arrow"
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
        names = set(os.listdir(path)) - {".lock"}
        foreign = [name for name in names if not OWN_NAMES.fullmatch(name)]
        if foreign:
            raise ValueError(
                "`path` must be a new directory or a store of soft labels. "
                f"Received: path={str(path)!r}, which holds {foreign[0]!r}"
            )
        if overwrite:
            # The last file first, so that what is left is never complete.
            for name in sorted(names, reverse=True):
                (path / name).unlink()
        yield StoreWriter(path, fsync)


class StoreWriter:
    """Appends record batches to the store in a locked directory.

    The `layout` is None before the first `append`. `fingerprints` are those of
    the rows that were stored before.
    """

    def __init__(self, path: Path, fsync: bool) -> None:
        self.path, self._fsync = path, fsync
        self._files, self.complete = files_of(path)
        # The rows of all other journals are in Arrow files.
        for journal in path.glob("journal-*"):
            if self.complete or journal != self._journal:
                journal.unlink()
        in_journal, self._end = self._journal_batches()
        if self._journal.exists():
            os.truncate(self._journal, self._end)
        stored = [open_file(path / name) for name in self._files] + in_journal
        self.layout = Layout.of_schema(stored[0].schema) if stored else None
        self.num_rows = sum(batch.num_rows for batch in stored)
        self.fingerprints = np.empty(0, "uint64")
        if self.layout is not None and self.layout.has_fingerprints:
            columns = [one.column("fingerprint").to_numpy() for one in stored]
            self.fingerprints = np.concatenate(columns)

    @property
    def _journal(self) -> Path:
        """The journal whose rows will be the next Arrow file."""
        return self.path / f"journal-{len(self._files):06d}"

    def _journal_batches(self) -> tuple[list[Any], int]:
        """Return the journal's memory-mapped record batches and their end."""
        pa = pyarrow()
        file, schema = self._journal, None
        found: list[Any] = []
        end = position = 0
        if not file.exists() or not file.stat().st_size:
            return found, end  # An empty file cannot be mapped.
        data = pa.memory_map(str(file)).read_buffer()
        while position + HEADER.size <= data.size:
            begin = position + HEADER.size
            length, checksum = HEADER.unpack(data[position:begin])
            record = data[begin : begin + length]
            if record.size < length or zlib.crc32(record) != checksum:
                break
            position = begin + length
            if schema is None:
                schema = pa.ipc.read_schema(record)
            else:
                found.append(pa.ipc.read_record_batch(record, schema))
                end = position
        return found, end

    def append(self, batch: Any) -> None:
        """Add the rows of a record batch, which must have the same layout.

        If this fails because the disk is full, earlier rows stay stored.
        """
        layout = Layout.of_schema(batch.schema)
        self.layout = self.layout or layout
        check_same(self.layout, vars(layout), self.path)
        data = batch.serialize()
        try:
            if self._end and self._end + data.size > FILE_BYTES:
                self._seal()
            records = [data] if self._end else [batch.schema.serialize(), data]
            with self._journal.open("ab") as file:
                for record in records:
                    file.write(HEADER.pack(record.size, zlib.crc32(record)))
                    file.write(record)
                if self._fsync:
                    file.flush()
                    os.fsync(file.fileno())
                end = file.tell()
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}, writing soft labels to {self.path}. "
                f"{self.num_rows} rows are stored. Free some disk space and "
                "run the same call again to continue",
            ) from error
        self._end = end
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
            name = f"{len(self._files):06d}-{checksum_of(temporary)}.arrow"
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
        last = self.path / self._files[-1]
        last.rename(last.with_stem(f"{last.stem}-end"))
        sync(self.path)
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


def files_of(path: Path) -> tuple[list[str], bool]:
    """Return a store's Arrow files, and whether the store is complete."""
    names = sorted(file.name for file in path.glob("*.arrow"))
    for number, name in enumerate(names):
        if not name.startswith(f"{number:06d}-"):
            raise damaged(path / f"{number:06d}-*.arrow")
    return names, bool(names) and names[-1].endswith("-end.arrow")


def open_file(file: Path, *, verify: bool = True) -> Any:
    """Return the record batch of a store's Arrow file, memory-mapped."""
    if verify and checksum_of(file) != file.stem.split("-")[1]:
        raise damaged(file)
    pa = pyarrow()
    return pa.ipc.open_file(pa.memory_map(str(file))).get_batch(0)


def checksum_of(file: Path) -> str:
    """Return the CRC-32 of a file, as it is in the file's name."""
    return f"{zlib.crc32(pyarrow().memory_map(str(file)).read_buffer()):08x}"


def damaged(file: Path) -> ValueError:
    """Return the error to raise for a file that is missing or has changed."""
    return ValueError(
        f"The soft labels in {file.parent} are damaged: {file.name} is missing "
        "or has changed since it was written. Restore the directory from a "
        "copy, or write it again with overwrite=True."
    )


def sync(path: Path) -> None:
    """Wait until a file or a directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """Delete what a killed process left, unless another process writes it."""
    if path.exists():
        with (
            contextlib.suppress(RuntimeError, ValueError),
            writing(path, overwrite=True),
        ):
            shutil.rmtree(path)
