"""Teacher outputs that are stored once and read for every student."""

import functools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np

from keras_ptloss._progress import Progress, Verbose, track
from keras_ptloss._validation import check_count, fail, refuse
from keras_ptloss.soft_labels import journal
from keras_ptloss.soft_labels.attach import attach
from keras_ptloss.soft_labels.inputs import (
    as_inputs,
    fingerprint,
    library_of,
    not_stored,
    num_examples,
    other_inputs,
    take,
)
from keras_ptloss.soft_labels.outputs import (
    NO_ENTRY,
    Layout,
    asked,
    cut,
    events,
    in_float32,
    pyarrow,
    record_batch,
    teacher_identity,
    views,
)

PathLike = str | os.PathLike[str]
CHUNK = 4096  # rows that are handled at once
PARTIAL = ".partial"  # suffix of the name of a store that is not complete yet
EXPORTED = 65_536  # rows in a record batch or row group for other tools


class SoftLabels:
    """Teacher outputs in Arrow files, memory-mapped.

    A store holds rows of one of three kinds, which `read` returns as float32:

    * probabilities, `(n, C)`;
    * the k most likely classes, as events `(n, k + 1, 2)`, which `TopKPTLoss`
      takes: ids and natural log-probabilities. The last event, of id -1, is all
      other classes. An id of -2 means that there is no entry;
    * such events for each position of token sequences, `(n, time, k + 1, 2)`.

    Rows are found by the fingerprints of their inputs, or by your ids. If two
    examples are equal, the row that was stored first is used.

    Attributes:
        layout: the kind of rows, their dtype, the classes and the teacher.
        path: directory of the store; None for a store in memory.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from keras_ptloss import SoftLabels
        >>> x = np.arange(12.0).reshape(6, 2)
        >>> def teacher(batch):
        ...     return np.tile([0.5, 0.25, 0.25], (len(batch), 1))
        >>> path = tempfile.mkdtemp() + "/labels"
        >>> labels = SoftLabels.write(teacher, x, path, verbose=0)
        >>> labels.shape
        (6, 3)
        >>> print(labels.read([0]))
        [[0.5  0.25 0.25]]
    """

    def __init__(
        self, layout: Layout, stored: Sequence[Any], path: Path | None = None
    ) -> None:
        """Use `write`, `open` or `from_array`."""
        self.layout, self.path = layout, path
        self._batches = list(stored)
        self._values = [views(batch) for batch in self._batches]
        rows = [batch.num_rows for batch in self._batches]
        # File i has the rows from `_bounds[i]` to `_bounds[i + 1]`.
        self._bounds = np.cumsum([0, *rows], dtype="int64")
        self._indexes: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    # ---- Make and open stores ----

    @classmethod
    def write(
        cls,
        teacher: keras.Model | Callable[[Any], Any],
        inputs: Any,
        path: PathLike,
        *,
        batch_size: int = 32,
        from_logits: bool = False,
        class_names: Sequence[str] | None = None,
        top_k: int | None = None,
        dtype: Literal["float16", "float32"] = "float16",
        ids: Sequence[Any] | None = None,
        teacher_name: str | None = None,
        verbose: Verbose = "auto",
        fsync: bool = False,
        overwrite: bool = False,
    ) -> "SoftLabels":
        """Run a teacher on all inputs and store its outputs.

        If the process is killed, run the same call again. It checks that the
        stored rows belong to these inputs and this teacher, and runs the
        teacher only on inputs that are not stored yet.

        Args:
            teacher: a Keras model, or a function from a batch of inputs to an
                array `(batch, C)`, or for token sequences `(batch, time, C)`.
                `(batch, 1)` is the probability (or logit) of the second of two
                classes. If only the most likely classes are known, events
                `(batch, k + 1, 2)` or `(batch, time, k + 1, 2)`.
            inputs: a pytree of arrays, a list of texts or of token ids, an
                object that returns single examples by index (a PyTorch
                `Dataset`), or a data set of batches: `tf.data.Dataset`,
                `keras.utils.PyDataset`, PyTorch's `DataLoader`, Grain. Targets
                are ignored, and positions of sample weight 0 are not stored.
            path: directory of the store.
            batch_size: batch size for arrays. Data sets keep their batches.
            from_logits: whether the teacher returns logits, to be converted.
            class_names: names of the classes, in the teacher's order.
            top_k: store only the k most likely classes, as for sequences.
            dtype: dtype of the stored numbers.
            ids: your own name for each example of arrays, to find its row.
            teacher_name: identifies the teacher when you resume or join. The
                default is a hash of the model's configuration and weights, or
                the name of the function.
            verbose: 1 or "auto" shows a progress bar, 0 prints nothing.
            fsync: whether to wait for the disk after each batch. Otherwise a
                power cut may lose the last second.
            overwrite: whether to replace an existing store.

        Raises:
            ValueError: if the outputs are not probabilities, or if the stored
                rows have other inputs, another teacher or other arguments.
            RuntimeError: if the teacher fails, or another process writes.
            OSError: if the disk is full. Rows that are already stored are kept.
        """
        check_count("batch_size", batch_size)
        run = asked(teacher, top_k, from_logits)
        path, inputs = Path(path), as_inputs(inputs)
        total = None if library_of(inputs) else num_examples(inputs)
        if ids is not None and len(ids) != total:
            expected = f"one for each of {total} examples in arrays"
            refuse("ids", expected, f"{len(ids)} ids")
        about: dict[str, Any] = {
            "dtype": dtype,
            "class_names": None if class_names is None else tuple(class_names),
            "teacher": teacher_name or teacher_identity(teacher),
            "from_logits": from_logits,
        }
        with journal.writing(path, fsync=fsync, overwrite=overwrite) as writer:
            if writer.layout is not None:
                call = about | {"has_fingerprints": True}
                call["has_ids"] = ids is not None
                if top_k is not None:
                    call["top_k"] = top_k
                journal.check_same(writer.layout, call, path)
            stored = writer.fingerprints
            what = f"Asking the teacher; {len(stored)} examples are stored at"
            left = None if total is None else total - len(stored)
            progress = Progress(
                f"{what} {path}", left, unit="example", verbose=verbose
            )
            progress.update(0, at_once=True)
            for x, weight, prints, indices in not_stored(
                inputs, batch_size, stored, path, verbose
            ):
                if writer.complete:
                    other_inputs(path, f"are more than {writer.num_rows}")
                try:
                    outputs = run(x)
                except Exception as error:
                    raise RuntimeError(
                        f"The teacher failed at example {indices[0]}: {error}. "
                        f"{writer.num_rows} rows are stored. Run the same call "
                        "again to continue."
                    ) from error
                names = None if ids is None else [ids[i] for i in indices]
                batch = record_batch(
                    outputs, about, indices[0], x, prints, names, weight
                )
                writer.append(batch)
                progress.update(progress.done + len(prints))
            if not writer.complete:
                writer.finish()
            progress.close()
        journal.discard(path.with_name(path.name + PARTIAL))
        return cls.open(path, verbose=verbose)

    @classmethod
    def open(
        cls,
        path: PathLike,
        verify: bool = True,
        *,
        class_names: Sequence[str] | None = None,
        verbose: Verbose = "auto",
    ) -> "SoftLabels":
        """Open a complete store.

        Args:
            path: its directory.
            verify: whether to read the files and compare their checksums. If
                not, a damaged file can give wrong numbers or end the process.
            class_names: the classes that you expect, in their order.
            verbose: as in `from_array`.

        Raises:
            FileNotFoundError: if there is no store at `path`.
            ValueError: if the store is unfinished or damaged, or has other
                classes.
        """
        path = Path(path)
        files, complete = journal.files_of(path)
        if not files and not any(path.glob("journal-*")):
            raise FileNotFoundError(f"There are no soft labels at {path}")
        if not complete:
            raise ValueError(
                f"The soft labels at {path} are unfinished. Run the same call "
                "of `write` again to complete them."
            )
        what = f"Checking the soft labels at {path}"
        shown = track(files, what, None, unit="file", verbose=verbose)
        found = [
            journal.open_file(path / name, verify=verify) for name in shown
        ]
        layout = Layout.of_schema(found[0].schema)
        if class_names is not None:
            expected = {"class_names": tuple(class_names)}
            journal.check_same(layout, expected, path)
        return cls(layout, found, path)

    @classmethod
    def from_array(
        cls,
        values: Any,
        path: PathLike | None = None,
        *,
        ids: Sequence[Any] | None = None,
        inputs: Any = None,
        class_names: Sequence[str] | None = None,
        from_logits: bool = False,
        top_k: int | None = None,
        dtype: Literal["float16", "float32"] = "float16",
        teacher_name: str | None = None,
        overwrite: bool = False,
        verbose: Verbose = "auto",
    ) -> "SoftLabels":
        """Store outputs that you already have.

        The store appears only when it is complete. If the call is killed, run
        it again.

        Args:
            values: probabilities or logits, `(N, C)`, or with `top_k` also
                `(N, time, C)`. If only the k most likely classes are known,
                events, such as `np.stack([ids, log_probs], axis=-1)`: `(N, k,
                2)`, `(N, time, k, 2)`, or a list of `(time, k, 2)` with one
                position for each token of `inputs`. Without a last event of
                all other classes, these get the remaining probability. A
                memory map is read in parts.
            path: directory of the new store; None keeps it in memory.
            ids: your own name for each example, in the order of `values`.
            inputs: the examples in the same order, not as a data set. `attach`
                needs inputs or ids to find the rows.
            class_names: as in `write`.
            from_logits: whether `values` are logits.
            top_k: as in `write`.
            dtype: as in `write`.
            teacher_name: as in `write`.
            overwrite: as in `write`.
            verbose: 1 shows a progress bar, 0 does not; "auto" shows it after
                two seconds.

        Raises:
            ValueError: if the values are not probabilities, or if there is
                another store at `path`.

        Example:
            >>> from keras_ptloss import SoftLabels
            >>> labels = SoftLabels.from_array(
            ...     [[0.9, 0.1], [0.2, 0.8]], inputs=["good", "bad"]
            ... )
            >>> print(labels.read(labels.find(["bad"])).round(3))
            [[0.2 0.8]]
        """
        if not len(values):
            fail("values", "at least one row", values)
        if not hasattr(values, "shape") and np.ndim(values[0]) < 3:
            values = np.asarray(values)
        total = len(values)
        if inputs is not None:
            inputs = as_inputs(inputs)
            if library_of(inputs):
                fail("inputs", "arrays, not a data set", inputs)
            if num_examples(inputs) != total:
                received = f"{num_examples(inputs)} examples"
                refuse("inputs", f"{total} examples, as `values`", received)
        if ids is not None and len(ids) != total:
            refuse("ids", f"one for each of {total} values", f"{len(ids)} ids")
        about = {
            "dtype": dtype,
            "class_names": class_names,
            "teacher": teacher_name,
            "from_logits": from_logits,
        }

        def batches() -> Iterator[Any]:
            for low in range(0, total, CHUNK):
                part = slice(low, low + CHUNK)
                outputs = values[part]
                if top_k is not None:
                    outputs = cut(outputs, top_k, from_logits)
                x = None if inputs is None else take(inputs, part)
                prints = None if x is None else fingerprint(x, verbose=0)
                names = None if ids is None else ids[part]
                yield record_batch(outputs, about, low, x, prints, names)

        return cls._from_batches(batches(), total, path, overwrite, verbose)

    @classmethod
    def _from_batches(
        cls,
        batches: Iterable[Any],
        num_rows: int,
        path: PathLike | None,
        overwrite: bool,
        verbose: Verbose,
    ) -> "SoftLabels":
        """Make a store from batches of `CHUNK` rows, or nothing if it fails."""
        what, total = f"Storing {num_rows} rows", -(-num_rows // CHUNK)
        batches = track(batches, what, total, verbose=verbose)
        if path is None:
            table = pyarrow().Table.from_batches(batches).combine_chunks()
            return cls(Layout.of_schema(table.schema), table.to_batches())
        path = Path(path)
        # Only a complete store gets the name `path`.
        temporary = path.with_name(path.name + PARTIAL)
        with journal.writing(temporary, overwrite=True) as writer:
            try:
                for batch in batches:
                    writer.append(batch)
                writer.finish()
                _rename(temporary, path, overwrite)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        journal.sync(path.parent)
        return cls.open(path, verbose=verbose)

    # ---- Read ----

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._bounds[-1])

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape of all rows. The time of sequences is None."""
        layout = self.layout
        if layout.kind == "probabilities":
            return len(self), layout.num_classes
        time = (None,) if layout.kind == "tokens" else ()
        return len(self), *time, (layout.top_k or 0) + 1, 2

    def read(self, indices: Any = slice(None)) -> np.ndarray:
        """Return the rows of integer indices or a slice, in this order.

        Events of sequences are padded to the longest of them.
        """
        if isinstance(indices, slice):
            indices = range(*indices.indices(len(self)))
        indices = np.asarray(indices)
        if not indices.size:
            indices = indices.astype("int64")
        elif indices.ndim != 1 or indices.dtype.kind not in "iu":
            fail("indices", "a slice, or a list of integers", indices)
        elif indices.min() < 0 or indices.max() >= len(self):
            fail("indices", f"from 0 to {len(self) - 1}", indices)
        files = np.searchsorted(self._bounds, indices, side="right") - 1
        rows = indices - self._bounds[files]
        if self.layout.kind == "tokens":
            return self._read_sequences(files, rows)
        out = np.empty((len(indices), *self.shape[1:]), "float32")
        for file in np.unique(files):
            values = self._values[file]
            where: Any = np.flatnonzero(files == file)
            if len(where) == len(indices):  # a slice is assigned faster
                where = slice(None)
            if self.layout.kind == "probabilities":
                out[where] = values["probabilities"][rows[where]]
            else:
                out[where] = events(values, rows[where])
        return out

    def _read_sequences(self, files: np.ndarray, rows: np.ndarray) -> Any:
        """Return events of token sequences, padded to the longest sequence."""
        found = []
        for file, row in zip(files, rows, strict=True):
            values = self._values[file]
            low, high = values["offsets"][row : row + 2]
            start = values["start"][row]
            positions = slice(start, start + high - low)
            found.append((values, slice(low, high), positions))
        time = max((positions.stop for *_, positions in found), default=0)
        out = np.zeros((len(found), time, *self.shape[2:]), "float32")
        out[..., 0] = NO_ENTRY
        for target, (values, stored, positions) in zip(out, found, strict=True):
            events(values, stored, target[positions])
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """Return all rows, `np.asarray(labels)`."""
        if copy is False:
            raise ValueError("Stored rows cannot be read without a copy.")
        return self.read().astype(dtype or "float32", copy=False)

    def __repr__(self) -> str:
        """Return the path, the number of rows and the layout."""
        return f"SoftLabels({self.path}, {len(self)} rows, {self.layout})"

    def __reduce__(self) -> Any:
        """Pickle a store: only the path, if it is on disk."""
        if self.path is None:
            return SoftLabels, (self.layout, self._batches)
        return functools.partial(SoftLabels.open, verify=False), (self.path,)

    # ---- Find which row each example is stored in ----

    def find(self, inputs: Any = None, *, ids: Any = None) -> np.ndarray:
        """Return the first row of each example, `(n,)` integers for `read`.

        Examples are given as inputs, as in `write`, or by their ids. It is an
        error if one has no stored row.
        """
        if ids is None:
            return self._find("inputs", fingerprint(inputs))
        return self._find("ids", np.array([str(i) for i in ids], object))

    def _find(self, argument: str, wanted: np.ndarray) -> np.ndarray:
        """Return the row of each fingerprint or id; see `find`."""
        known, first = self._index(argument)
        place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        new = np.flatnonzero(known[place] != wanted)
        if len(new):
            which = f": {wanted[new[0]]!r}" if argument == "ids" else ""
            raise ValueError(
                f"`{argument}` must have only examples with stored soft labels."
                f" Received: {len(new)} of {len(wanted)} examples are new, or "
                "their values, dtype or shape have changed; the first is at "
                f"position {new[0]}{which}"
            )
        return first[place]

    def _index(self, argument: str) -> tuple[np.ndarray, np.ndarray]:
        """Return sorted fingerprints or ids, and the first row of each."""
        if argument not in self._indexes:
            name = "id" if argument == "ids" else "fingerprint"
            if name not in self._values[0]:
                raise ValueError(
                    f"These soft labels were stored without {argument}. Pass "
                    f"`{argument}` when you store them."
                )
            column = np.concatenate([values[name] for values in self._values])
            self._indexes[argument] = np.unique(column, return_index=True)
        return self._indexes[argument]

    def attach(
        self,
        data: Any,
        *,
        ids: Any = None,
        allow_subset: bool = False,
        batch_size: int = 32,
        shuffle: bool = False,
        seed: int | None = None,
    ) -> Any:
        """Pair a data set with its stored rows, for `fit`.

        Examples may come in any order, because each is found by its
        fingerprint. Attach to the same inputs that the teacher saw, and augment
        or tokenize afterwards.

        Args:
            data: the same examples, as in `write`. Targets are replaced.
            ids: find the rows by these ids instead; only for arrays.
            allow_subset: whether some stored examples may be missing from
                `data`. For data sets, only the number of batches is checked.
            batch_size: batch size for arrays. Data sets keep their batches.
            shuffle: whether to draw a new order in each epoch; only for arrays.
            seed: seed of the random order.

        Returns:
            Batches `(inputs, soft labels)`, with sample weights if `data` has
            them: a `keras.utils.PyDataset` for arrays, otherwise a data set of
            the same library. Token sequences always have weights, which are 0
            where nothing is stored.

        Raises:
            ValueError: if an example has no stored row (for data sets, when it
                is read), or if stored examples are missing from `data`.

        Example:
            >>> import numpy as np
            >>> from keras_ptloss import SoftLabels
            >>> x = np.array([0.0, 1.0, 2.0])
            >>> labels = SoftLabels.from_array(
            ...     [[0, 1], [0.25, 0.75], [0.5, 0.5]], inputs=x
            ... )
            >>> inputs, y_true = labels.attach(x[::-1])[0]
            >>> print(y_true[:, 0])
            [0.5  0.25 0.  ]
        """
        return attach(
            [self], data, ids, allow_subset, batch_size, shuffle, seed
        )

    # ---- Other tools ----

    def to_arrow(self) -> Any:
        """Return a `pyarrow.RecordBatchReader` of all rows, in float32.

        DuckDB, which cannot read float16, takes the reader as a table.
        """
        schema = in_float32(self._batches[0].schema)
        parts = (part.cast(schema) for part in self._parts(EXPORTED))
        return pyarrow().RecordBatchReader.from_batches(schema, parts)

    def _parts(self, num_rows: int) -> Iterator[Any]:
        """Yield all rows in record batches of at most `num_rows` rows."""
        for batch in self._batches:
            for low in range(0, batch.num_rows, num_rows):
                yield batch.slice(low, num_rows)

    def to_parquet(self, file: PathLike, *, verbose: Verbose = "auto") -> None:
        """Write all rows to one Parquet file, or nothing if this fails."""
        pyarrow()
        from pyarrow import parquet

        file = Path(file)
        temporary = file.with_name(file.name + PARTIAL)
        what = f"Writing {len(self)} rows to {file}"
        parts = track(self._parts(EXPORTED), what, None, verbose=verbose)
        schema = self._batches[0].schema
        try:
            with parquet.ParquetWriter(temporary, schema) as writer:
                for part in parts:
                    writer.write_batch(part)
            temporary.rename(file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def from_parquet(
        cls,
        file: PathLike,
        path: PathLike | None = None,
        *,
        overwrite: bool = False,
        verbose: Verbose = "auto",
    ) -> "SoftLabels":
        """Make a store from a Parquet file that `to_parquet` wrote.

        The arguments are those of `from_array`. `read_table` reads files from
        other tools.
        """
        pyarrow()
        from pyarrow import parquet

        table = parquet.ParquetFile(file)
        schema = table.schema_arrow
        if b"keras_ptloss" not in (schema.metadata or {}):
            raise ValueError(
                "`file` must be a Parquet file that `to_parquet` wrote; see "
                "`read_table` for others. Received: "
                f"{file} with the columns {schema.names}"
            )
        found, total = table.iter_batches(CHUNK), table.metadata.num_rows
        return cls._from_batches(found, total, path, overwrite, verbose)

    @classmethod
    def join(
        cls,
        parts: Iterable[PathLike],
        path: PathLike,
        *,
        overwrite: bool = False,
        verbose: Verbose = "auto",
    ) -> "SoftLabels":
        """Join stores into one, for example parts written by several machines.

        `parts` are the directories of complete stores, in the order of the
        rows. They must have the same teacher and arguments, and are kept. The
        other arguments are those of `from_array`.
        """
        stores = [cls.open(part) for part in parts]
        for store in stores:
            journal.check_same(store.layout, vars(stores[0].layout), store.path)
        found = (part for store in stores for part in store._parts(CHUNK))
        total = sum(map(len, stores))
        return cls._from_batches(found, total, path, overwrite, verbose)


def _rename(new: Path, path: Path, overwrite: bool) -> None:
    """Rename a complete store to `path`, or delete it if `path` is the same."""
    if path.exists():
        with journal.writing(path, overwrite=overwrite) as old:
            # Files are named by checksums: equal names mean equal rows.
            same = journal.files_of(path) == journal.files_of(new)
            if old.layout is not None and not same:
                state = "a complete" if old.complete else "an unfinished"
                raise ValueError(
                    "`path` must be new, or pass overwrite=True. Received: "
                    f"path={str(path)!r}, {state} store of the teacher "
                    f"{old.layout.teacher!r} with {old.num_rows} rows"
                )
            # A kill in `rmtree` must not leave a part of the store at `path`.
            shutil.rmtree(new if same else path)
    if new.exists():
        new.rename(path)
