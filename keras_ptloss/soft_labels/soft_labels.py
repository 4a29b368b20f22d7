"""Teacher outputs that are stored once and read for every student."""

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np

from keras_ptloss._progress import Verbose, track
from keras_ptloss._validation import check_count, fail
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
from keras_ptloss.soft_labels.journal import (
    check_same,
    discard,
    open_file,
    read_info,
    sync,
    writing,
)
from keras_ptloss.soft_labels.layout import (
    NO_ENTRY,
    Layout,
    events,
    pyarrow,
    views,
)
from keras_ptloss.soft_labels.teacher import (
    asked,
    cut,
    record_batch,
    teacher_identity,
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
        layout: the kind of rows, their dtype, the number and names of the
            classes, and the teacher.
        path: directory of the store; None for a store in memory.
        shape: shape of all rows. For token sequences, the time is None.

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
        self._ends = np.cumsum(rows, dtype="int64")
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
        verbose: int | str = "auto",
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
                classes. A function that knows only the most likely classes
                returns events `(batch, k + 1, 2)` or `(batch, time, k + 1, 2)`.
            inputs: a pytree of arrays, a list of texts or of token ids, or a
                data set of batches: a `tf.data.Dataset`, a
                `keras.utils.PyDataset`, a PyTorch `DataLoader`, a Grain data
                set. Its targets are ignored, and positions of sequences whose
                sample weight is 0 are not stored.
            path: directory of the store.
            batch_size: batch size for arrays. Data sets keep their batches.
            from_logits: whether the teacher returns logits. Their probabilities
                are stored.
            class_names: names of the classes, in the teacher's order.
            top_k: store only the k most likely classes. Token sequences need
                it.
            dtype: dtype of the stored numbers.
            ids: your own name for each example of arrays. Rows can then be
                found by ids as well as by inputs.
            teacher_name: a name that identifies the teacher when you resume or
                join. The default is a hash of the model's configuration and
                weights, or the name of the function.
            verbose: 0 prints nothing, 1 or "auto" shows a progress bar, 2
                prints a line at the end.
            fsync: whether to wait for the disk after each batch. Otherwise a
                power cut may lose the last second.
            overwrite: whether to replace an existing store.

        Returns:
            The store.

        Raises:
            ValueError: if the inputs, the teacher or the arguments differ from
                those of the stored rows, or if the outputs are not
                probabilities.
            RuntimeError: if another process writes to the store, or the
                teacher fails.
            OSError: if the disk is full. Rows that are already stored are kept.
        """
        check_count("batch_size", batch_size)
        run = asked(teacher, top_k, from_logits)
        path, inputs = Path(path), as_inputs(inputs)
        total = None if library_of(inputs) else num_examples(inputs)
        if ids is not None and (total is None or len(ids) != total):
            fail("ids", f"one for each of {total} examples in arrays", ids)
        about: dict[str, Any] = {
            "dtype": dtype,
            "class_names": None if class_names is None else tuple(class_names),
            "teacher": teacher_name or teacher_identity(teacher),
            "from_logits": from_logits,
        }
        with writing(path, fsync=fsync, overwrite=overwrite) as writer:
            if writer.layout is not None:
                call = about | {"has_fingerprints": True}
                call |= {"has_ids": ids is not None}
                call |= {} if top_k is None else {"top_k": top_k}
                check_same(writer.layout, call, path)
            stored = writer.fingerprints()
            bar = keras.utils.Progbar(
                None if total is None else total - len(stored),
                unit_name="example",
                verbose=1 if verbose == "auto" else int(verbose),
            )
            if verbose:
                print(
                    f"Asking the teacher; {len(stored)} examples are stored "
                    f"at {path}",
                    flush=True,
                )
            for x, weight, prints, indices in not_stored(
                inputs, batch_size, stored, path, "auto" if verbose else 0
            ):
                if writer.complete:
                    raise other_inputs(path, f"are more than {writer.num_rows}")
                try:
                    outputs = run(x)
                except Exception as error:
                    raise RuntimeError(
                        "The teacher failed on the batch that starts at example"
                        f" {indices[0]}: {error}. {writer.num_rows} rows are "
                        "stored. Run the same call again to continue."
                    ) from error
                writer.append(
                    record_batch(
                        *(outputs, about, indices[0], x, prints),
                        None if ids is None else [ids[i] for i in indices],
                        weight,
                    )
                )
                bar.add(len(prints))
            if not writer.complete:
                writer.finish()
        discard(path.with_name(path.name + PARTIAL))
        return cls.open(path, verbose="auto" if verbose else 0)

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
            verify: whether to compare the files with their checksums, which
                reads them once. Without this check, a damaged file can give
                wrong numbers or crash the process.
            class_names: the classes that you expect, in their order.
            verbose: as in `from_array`.

        Raises:
            FileNotFoundError: if there is no store at `path`.
            ValueError: if the store is unfinished or damaged, or if its classes
                differ from `class_names`.
        """
        path = Path(path)
        info = read_info(path)
        if info is None:
            raise FileNotFoundError(f"There are no soft labels at {path}")
        if info.files is None:
            raise ValueError(
                f"The soft labels at {path} are unfinished. Run the same "
                "call of `write` again; it continues where it stopped."
            )
        if class_names is not None:
            expected = {"class_names": tuple(class_names)}
            check_same(info.layout, expected, path)
        what = f"Checking the soft labels at {path}"
        files = track(info.files, what, None, unit="file", verbose=verbose)
        found = [open_file(path / f, verify=verify) for f in files]
        return cls(info.layout, found, path)

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
                position for each token of `inputs`. An id of -2 means that
                there is no entry. All other ids share the entry of a last id
                of -1 or, without it, the remaining probability. A memory map
                is read in parts.
            path: directory of the new store; None keeps it in memory.
            ids: your own name for each example, in the order of `values`.
            inputs: the examples in the same order, as in `write`. `attach`
                needs inputs or ids to find the rows.
            class_names: as in `write`.
            from_logits: whether `values` are logits.
            top_k: as in `write`.
            dtype: as in `write`.
            teacher_name: as in `write`.
            overwrite: whether to replace another store at `path`.
            verbose: 1 shows a progress bar, 0 does not; "auto" shows it after
                two seconds.

        Returns:
            The store.

        Raises:
            ValueError: if the values are not probabilities, if the numbers of
                values, inputs and ids differ, or if there is another store at
                `path`.

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
                fail("inputs", "arrays, or a source of single examples", inputs)
            _check_length("inputs", num_examples(inputs), total)
        if ids is not None:
            _check_length("ids", len(ids), total)
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
                named = None if ids is None else ids[part]
                yield record_batch(outputs, about, low, x, prints, named)

        return cls._from_batches(
            batches(), f"Storing {total} rows", total, path, overwrite, verbose
        )

    @classmethod
    def _from_batches(
        cls,
        batches: Iterable[Any],
        what: str,
        num_rows: int,
        path: PathLike | None,
        overwrite: bool,
        verbose: Verbose,
    ) -> "SoftLabels":
        """Make a store from record batches, or nothing if this fails.

        Args:
            batches: record batches of up to `CHUNK` rows.
            what: what to print above the progress bar.
            num_rows: number of rows in all batches.
            path: as in `from_array`.
            overwrite: as in `from_array`.
            verbose: as in `from_array`.
        """
        total = -(-num_rows // CHUNK)
        batches = track(batches, what, total, verbose=verbose)
        if path is None:
            table = pyarrow().Table.from_batches(batches).combine_chunks()
            return cls(Layout.of_schema(table.schema), table.to_batches())
        path = Path(path)
        # Only a complete store gets the name `path`.
        temporary = path.with_name(path.name + PARTIAL)
        with writing(temporary, overwrite=True) as writer:
            try:
                for batch in batches:
                    writer.append(batch)
                writer.finish()
                if path.exists():
                    _make_way(path, temporary, overwrite)
                temporary.rename(path)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        sync(path.parent)
        return cls.open(path, verbose=verbose)

    # ---- Read ----

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._ends[-1])

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape of all rows. The time of sequences is None."""
        layout = self.layout
        if layout.kind == "probabilities":
            return len(self), layout.num_classes
        time = (None,) if layout.kind == "tokens" else ()
        return len(self), *time, (layout.top_k or 0) + 1, 2

    def read(self, indices: Any = slice(None)) -> np.ndarray:
        """Return rows as float32, in the order of the indices.

        Events of sequences are padded to the longest of them.

        Args:
            indices: an integer array, or a slice.
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
        if self.layout.kind == "tokens":
            return self._read_sequences(indices)
        out = np.empty((len(indices), *self.shape[1:]), "float32")
        files = np.searchsorted(self._ends, indices, side="right")
        for file in np.unique(files):
            values = self._values[file]
            where: Any = np.flatnonzero(files == file)
            rows = indices[where] - self._begin(file)
            if len(rows) == len(indices):  # a slice is assigned faster
                where = slice(None)
            if self.layout.kind == "probabilities":
                out[where] = values["probabilities"][rows]
            else:
                out[where] = events(values, rows)
        return out

    def _read_sequences(self, indices: np.ndarray) -> np.ndarray:
        """Return events of token sequences, padded to the longest sequence."""
        found = []
        files = np.searchsorted(self._ends, indices, side="right")
        for file, index in zip(files, indices, strict=True):
            values, row = self._values[file], index - self._begin(file)
            low, high = values["offsets"][row : row + 2]
            start = values["start"][row]
            positions = slice(start, start + high - low)
            found.append((values, slice(low, high), positions))
        time = max((positions.stop for *_, positions in found), default=0)
        out = np.zeros((len(found), time, *self.shape[2:]), "float32")
        out[..., 0] = NO_ENTRY
        for target, (values, rows, positions) in zip(out, found, strict=True):
            events(values, rows, target[positions])
        return out

    def _begin(self, file: int) -> Any:
        """Return the index of the first row in a file."""
        return self._ends[file] - self._batches[file].num_rows

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

    @property
    def fingerprints(self) -> np.ndarray | None:
        """The fingerprint of each row's input, or None if unknown."""
        return self._column("fingerprint")

    @property
    def ids(self) -> np.ndarray | None:
        """The id of each row, or None if the rows have no ids."""
        return self._column("id")

    def _column(self, name: str) -> np.ndarray | None:
        """Return a column of all rows, or None if it is not stored."""
        if name not in self._values[0]:
            return None
        return np.concatenate([values[name] for values in self._values])

    def find(self, inputs: Any = None, *, ids: Any = None) -> np.ndarray:
        """Return the first row of each example, `(n,)` integers for `read`.

        Args:
            inputs: the examples, as in `write`.
            ids: the ids of the examples, instead of `inputs`.

        Raises:
            ValueError: if an example has no stored row.
        """
        if ids is None:
            return self._find("inputs", fingerprint(inputs))
        return self._find("ids", np.array([str(i) for i in ids], object))

    def _find(self, argument: str, wanted: np.ndarray) -> np.ndarray:
        """Return the row of each fingerprint or id; see `find`."""
        known, first = self._index(argument)
        place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        missing = np.flatnonzero(known[place] != wanted)
        if len(missing):
            why = f"{wanted[missing[0]]!r}"
            if argument == "inputs":
                why = "new, or its values, dtype or shape have changed"
            raise ValueError(
                f"`{argument}` must contain only examples that have stored "
                f"soft labels. Received: {len(missing)} of {len(wanted)} "
                "examples have none; the first is at position "
                f"{missing[0]}: {why}"
            )
        return first[place]

    def _index(self, argument: str) -> tuple[np.ndarray, np.ndarray]:
        """Return sorted fingerprints or ids, and the first row of each.

        Args:
            argument: `"inputs"` for fingerprints, or `"ids"`.
        """
        if argument not in self._indexes:
            stored = self.ids if argument == "ids" else self.fingerprints
            if stored is None:
                raise ValueError(
                    f"These soft labels were stored without {argument}. Pass "
                    f"`{argument}` when you store them."
                )
            self._indexes[argument] = np.unique(stored, return_index=True)
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
            data: the same examples as arrays or as a data set of batches, see
                `write`. Its targets are replaced.
            ids: find the rows by these ids instead; only for arrays.
            allow_subset: whether some stored examples may be missing from
                `data`. For data sets, only the number of batches is checked.
            batch_size: batch size for arrays. Data sets keep their batches.
            shuffle: whether to draw a new order in each epoch; only for arrays.
            seed: seed of the random order.

        Returns:
            A `keras.utils.PyDataset` for arrays, otherwise a data set of the
            same library: batches `(inputs, soft labels)`, with sample weights
            if `data` has them. Token sequences always have weights, which are 0
            where nothing is stored.

        Raises:
            ValueError: if an example has no stored row, or if stored examples
                are missing from `data`. For data sets, an example without a row
                raises the error when it is read.

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

        DuckDB takes the reader as a table; it cannot read float16. Polars,
        pandas and Hugging Face Datasets can read the store's `.arrow` files.
        """
        return self._reader("float32")

    def _reader(self, dtype: str) -> Any:
        schema = dataclasses.replace(self.layout, dtype=dtype).schema()
        parts = (
            batch.slice(low, EXPORTED).cast(schema)
            for batch in self._batches
            for low in range(0, batch.num_rows, EXPORTED)
        )
        return pyarrow().RecordBatchReader.from_batches(schema, parts)

    def to_parquet(self, file: PathLike, *, verbose: Verbose = "auto") -> None:
        """Write all rows to one Parquet file, or nothing if this fails."""
        pyarrow()
        from pyarrow import parquet

        file = Path(file)
        temporary = file.with_name(file.name + PARTIAL)
        reader = self._reader(self.layout.dtype)
        try:
            with parquet.ParquetWriter(temporary, reader.schema) as writer:
                what = f"Writing {len(self)} rows to {file}"
                for batch in track(reader, what, None, verbose=verbose):
                    writer.write_batch(batch)
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

        `read_table` reads files from other tools. The arguments are those of
        `from_array`.

        Raises:
            ValueError: if `to_parquet` did not write the file.
        """
        pyarrow()
        from pyarrow import parquet

        table = parquet.ParquetFile(file)
        schema = table.schema_arrow
        if b"keras_ptloss" not in (schema.metadata or {}):
            raise ValueError(
                "`file` must be a Parquet file that `to_parquet` wrote. Give "
                "the columns of other files to `read_table` or `from_array`. "
                f"Received: {file} with the columns {schema.names}"
            )
        schema = Layout.of_schema(schema).schema()
        found = (batch.cast(schema) for batch in table.iter_batches(CHUNK))
        total = table.metadata.num_rows
        return cls._from_batches(
            found, f"Reading {total} rows", total, path, overwrite, verbose
        )

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

        Args:
            parts: directories of complete stores of the same teacher and the
                same classes, in the order of the rows. They are kept.
            path: directory of the new store.
            overwrite: whether to replace another store at `path`.
            verbose: as in `from_array`.

        Raises:
            ValueError: if the layouts of the parts differ, or as in `open`.
        """
        stores = [cls.open(part) for part in parts]
        for store in stores:
            check_same(store.layout, vars(stores[0].layout), store.path)
        found = (
            batch.slice(low, CHUNK)
            for store in stores
            for batch in store._batches
            for low in range(0, batch.num_rows, CHUNK)
        )
        total = sum(map(len, stores))
        return cls._from_batches(
            found, f"Joining {total} rows", total, path, overwrite, verbose
        )


def _make_way(path: Path, new: Path, overwrite: bool) -> None:
    """Delete the store at `path`, if it equals the new one or as asked."""
    with writing(path, overwrite=overwrite) as old:
        # Files are named by checksums, so that equal names mean equal rows.
        if old.layout is not None and read_info(path) != read_info(new):
            state = "a complete" if old.complete else "an unfinished"
            raise ValueError(
                "`path` must be new, or pass overwrite=True. Received: path="
                f"{str(path)!r}, {state} store of the teacher "
                f"{old.layout.teacher!r} with {old.num_rows} rows"
            )
        shutil.rmtree(path)


def _check_length(name: str, length: int, total: int) -> None:
    if length != total:
        raise ValueError(
            f"`{name}` must have one entry for each of {total} rows. "
            f"Received: {name} of length {length}"
        )
