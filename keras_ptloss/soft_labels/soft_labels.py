"""Teacher outputs that are stored once and read for every student."""

import contextlib
import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import keras
import numpy as np

from keras_ptloss._progress import Verbose, track
from keras_ptloss._validation import check_count, fail
from keras_ptloss.soft_labels.attach import attach_several
from keras_ptloss.soft_labels.inputs import (
    as_inputs,
    fingerprint,
    is_stream,
    not_stored,
    num_examples,
    other_inputs,
    sequence_mask,
    take,
)
from keras_ptloss.soft_labels.journal import (
    StoreWriter,
    damaged,
    discard,
    open_file,
    read_info,
    sync,
)
from keras_ptloss.soft_labels.layout import (
    ENTRIES,
    NO_ENTRY,
    Columns,
    Layout,
    Values,
    events,
    from_entries,
    in_sequences,
    pyarrow,
    views,
)
from keras_ptloss.soft_labels.teacher import (
    asked,
    columns,
    teacher_identity,
)

T = TypeVar("T")
Tensor = Any
PathLike = str | os.PathLike[str]
CHUNK = 4096  # rows that are handled at once
PARTIAL = ".partial"  # after the name of a store that is not whole yet
EXPORTED = 65_536  # rows in a record batch or row group for other tools


class SoftLabels:
    """Teacher outputs in Arrow files, memory-mapped.

    A store holds rows of one of three kinds, which `read` returns as float32:

    * probabilities, `(n, C)`;
    * the k likeliest classes, as events `(n, k + 1, 2)`: ids and natural
      log-probabilities, the last one with id -1 for all other classes;
    * the same for each position of token sequences, `(n, time, k + 1, 2)`.

    The last two are what `TopKPTLoss` takes as `y_true`; an id of -2 means that
    there is no entry. Make a store with `SoftLabels.write`, from arrays with
    `from_array` or `from_top_k`, and read it again with `SoftLabels.open`.

    Rows are found by the fingerprints of their inputs, or by your ids. If two
    examples are equal, the row that was stored first is used.

    Attributes:
        layout: kind of rows, dtype, number and names of classes, teacher.
        path: directory of the store; None in memory.
        shape: of all rows; of token sequences, the time is None.

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
        """Use `write`, `open`, `from_array` or `from_top_k`."""
        self.layout, self.path = layout, path
        self._batches = list(stored)
        self._values = [views(batch) for batch in self._batches]
        rows = [batch.num_rows for batch in self._batches]
        self._ends = np.cumsum(rows, dtype="int64")

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
        teacher only on the other inputs.

        Args:
            teacher: a Keras model, or a function from a batch of inputs to an
                array `(batch, C)`. A binary classifier may return `(batch, 1)`,
                the probability (or logit) of the second class. For token
                sequences, the array is `(batch, time, C)`, and `top_k` is
                needed. A teacher that knows only the likeliest classes returns
                events `(batch, k + 1, 2)` or `(batch, time, k + 1, 2)`.
            inputs: arrays, a list of texts, lists of token ids, a pytree of
                arrays, what gives single examples by number (a PyTorch
                `Dataset`, a Grain data source), or what gives batches: a
                `tf.data.Dataset`, a `keras.utils.PyDataset`, a PyTorch
                `DataLoader`, a Grain data set. If it gives `(inputs, targets,
                sample_weight)`, the targets are ignored, and positions of
                sequences whose weight is 0 are not stored.
            path: directory of the store.
            batch_size: batch size for arrays. Data sets keep their batches.
            from_logits: whether the teacher returns logits. They are converted
                to probabilities before they are stored.
            class_names: names of the classes, in the teacher's order.
            top_k: store only the k likeliest classes.
            dtype: dtype of the stored numbers.
            ids: your own name for each example, in the same order. Rows can
                then be found by ids as well as by inputs.
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
            OSError: if the disk is full. What is stored stays.
        """
        check_count("batch_size", batch_size)
        if top_k is not None:
            check_count("top_k", top_k)
        run = asked(teacher, top_k, from_logits)
        inputs = as_inputs(inputs)
        streamed = is_stream(inputs)
        total = None if streamed else num_examples(inputs)
        if ids is not None and (total is None or len(ids) != total):
            fail("ids", f"one for each of {total} examples in arrays", ids)
        about: dict[str, Any] = {
            "dtype": dtype,
            "class_names": None if class_names is None else tuple(class_names),
            "teacher": teacher_name or teacher_identity(teacher),
            "from_logits": from_logits,
            "has_fingerprints": True,
            "has_ids": ids is not None,
        }
        path = Path(path)
        with StoreWriter(path, fsync=fsync, overwrite=overwrite) as writer:
            if writer.layout is not None:
                known = {} if top_k is None else {"top_k": top_k}
                _check_same(writer.layout, about | known, path)
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
            for x, weight, prints in not_stored(
                inputs, batch_size, stored, path, "auto" if verbose else 0
            ):
                first = writer.num_rows
                if writer.complete:
                    raise other_inputs(path, f"are more than {first}")
                try:
                    outputs = run(x)
                except Exception as error:
                    raise RuntimeError(
                        f"The teacher failed on the examples from {first} on: "
                        f"{error}. {first} rows are stored. Run the same call "
                        "again to continue."
                    ) from error
                found = columns(
                    outputs,
                    top_k=top_k,
                    from_logits=from_logits,
                    dtype=dtype,
                    x=x,
                    weight=weight,
                    first=first,
                )
                layout = found.layout(**about)
                if writer.layout is None:
                    writer.begin(layout)
                _check_same(writer.layout, vars(layout), path)
                named = (
                    None if ids is None else ids[first : first + len(prints)]
                )
                writer.append(layout.encode(found.values, prints, named))
                bar.add(len(prints))
            if writer.layout is None:
                fail("inputs", "at least one example", inputs)
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

        Returns:
            The store, memory-mapped.

        Raises:
            FileNotFoundError: if there is no store at `path`.
            ValueError: if it is unfinished or damaged, or its classes differ.
        """
        path = Path(path)
        info = read_info(path)
        if info is None:
            raise FileNotFoundError(f"There are no soft labels at {path}")
        if not info.complete:
            raise ValueError(
                f"The soft labels at {path} are unfinished. Run the same "
                "call of `write` again; it continues where it stopped."
            )
        if class_names is not None:
            expected = {"class_names": tuple(class_names)}
            _check_same(info.layout, expected, path)
        what = f"Checking the soft labels at {path}"
        files = track(info.files, what, None, unit="file", verbose=verbose)
        found = [open_file(path / f, verify=verify) for f in files]
        if not all(batch.schema == info.layout.schema() for batch in found):
            raise damaged(path / "info.json")
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
            values: probabilities or logits, `(N, C)`; events `(N, k + 1, 2)`
                or `(N, time, k + 1, 2)`; or, with `top_k`, `(N, time, C)`. It
                may be a memory map, of which only parts are in memory.
            path: directory of the new store; None keeps it in memory.
            ids: your names of the examples, in the order of `values`.
            inputs: the examples in that order, as in `write`. Without inputs
                and ids, `attach` cannot find the rows.
            class_names: as in `write`.
            from_logits: whether `values` are logits.
            top_k: store only the k likeliest classes.
            dtype: as in `write`.
            teacher_name: name of the teacher.
            overwrite: whether to replace another store at `path`.
            verbose: 1 shows a progress bar, 0 does not; "auto" shows it after
                two seconds.

        Returns:
            The store.

        Raises:
            ValueError: if the values are not probabilities, if the numbers of
                values, inputs and ids differ, or if `path` has another store.

        Example:
            >>> from keras_ptloss import SoftLabels
            >>> labels = SoftLabels.from_array(
            ...     [[0.9, 0.1], [0.2, 0.8]], inputs=["good", "bad"]
            ... )
            >>> print(labels.read(labels.find(["bad"])).round(3))
            [[0.2 0.8]]
        """
        if not hasattr(values, "shape"):
            values = np.asarray(values)
        if not len(values):
            fail("values", "at least one row", values)

        def convert(part: slice, x: Any) -> Columns:
            return columns(
                values[part],
                top_k=top_k,
                from_logits=from_logits,
                dtype=dtype,
                x=x,
                first=part.start,
            )

        about = {
            "dtype": dtype,
            "class_names": class_names,
            "teacher": teacher_name,
            "from_logits": from_logits,
        }
        found = _in_parts(len(values), inputs, ids, about, convert)
        parts = _tracked(found, "Storing", len(values), verbose)
        return cls._from_parts(parts, path, overwrite, verbose)

    @classmethod
    def from_top_k(
        cls,
        top_ids: Any,
        log_probs: Any,
        log_rest: Any = None,
        path: PathLike | None = None,
        *,
        ids: Sequence[Any] | None = None,
        inputs: Any = None,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        dtype: Literal["float16", "float32"] = "float16",
        teacher_name: str | None = None,
        overwrite: bool = False,
        verbose: Verbose = "auto",
    ) -> "SoftLabels":
        """Store the k likeliest classes of examples, or of token sequences.

        Args:
            top_ids: `(N, k)` ids of classes; or, of token sequences, a list of
                `(time, k)`, one for each. -2 where there are fewer than k, or
                none at this position.
            log_probs: their natural log-probabilities, in the same form.
            log_rest: log-probability of all other classes, `(N,)` or a list of
                `(time,)`. None takes what the k leave of 1.
            path: as in `from_array`.
            ids: as in `from_array`.
            inputs: as in `from_array`: of token sequences, their token ids, a
                position of which belongs to each position of `top_ids`.
            num_classes: number of classes or of token ids.
            class_names: as in `from_array`.
            dtype: as in `from_array`.
            teacher_name: as in `from_array`.
            overwrite: as in `from_array`.
            verbose: as in `from_array`.

        Returns:
            The store.

        Raises:
            ValueError: if these are not log-probabilities; and as `from_array`.

        Example:
            >>> import numpy as np
            >>> from keras_ptloss import SoftLabels
            >>> labels = SoftLabels.from_top_k(
            ...     [[[7, 4], [4, 2]], [[1, 0]]],
            ...     np.log([[[0.6, 0.3], [0.5, 0.4]]]).tolist()
            ...     + np.log([[[0.9, 0.05]]]).tolist(),
            ...     inputs=[[3, 7], [2]],
            ... )
            >>> print(np.exp(labels.read([0])[0, 1, :, 1]).round(2))
            [0.5 0.4 0.1]
        """
        if not len(top_ids):
            fail("top_ids", "at least one row", top_ids)
        sequences = np.ndim(top_ids[0]) == 2

        def convert(part: slice, x: Any) -> Columns:
            names, probs = top_ids[part], log_probs[part]
            rest = None if log_rest is None else log_rest[part]
            lengths = [len(row) for row in names]
            if sequences:
                if x is not None:
                    _check_lengths(lengths, x, part.start)
                # All positions of all sequences, one after the other.
                names, probs = np.concatenate(names), np.concatenate(probs)
                rest = None if rest is None else np.concatenate(rest)
            found = from_entries(names, probs, rest, num_classes, part.start)
            if not sequences:
                return Columns("top_k", num_classes, found)
            found = in_sequences(found, lengths)
            return Columns("tokens", num_classes, found)

        about = {
            "dtype": dtype,
            "class_names": class_names,
            "teacher": teacher_name,
        }
        found = _in_parts(len(top_ids), inputs, ids, about, convert)
        parts = _tracked(found, "Storing", len(top_ids), verbose)
        return cls._from_parts(parts, path, overwrite, verbose)

    @classmethod
    def _from_parts(
        cls,
        parts: Iterable[tuple[Layout, Any]],
        path: PathLike | None,
        overwrite: bool,
        verbose: Verbose,
    ) -> "SoftLabels":
        """Make a store of record batches, whole or not at all."""
        if path is None:
            layouts, found = zip(*parts, strict=True)
            table = pyarrow().Table.from_batches(found).combine_chunks()
            return cls(layouts[0], table.to_batches())
        path = Path(path)
        # Only a store that is whole gets the name `path`.
        temporary = path.with_name(path.name + PARTIAL)
        with (
            StoreWriter(temporary, overwrite=True) as writer,
            _removed_on_error(temporary),
        ):
            for layout, batch in parts:
                if writer.layout is None:
                    writer.begin(layout)
                _check_same(layout, vars(writer.layout), path)
                writer.append(batch)
            writer.finish()
            if path.exists():
                with StoreWriter(path, overwrite=overwrite) as old:
                    if old.layout is None:
                        shutil.rmtree(path)
                    elif read_info(path) == read_info(temporary):
                        # The same rows, as files are named by checksums.
                        shutil.rmtree(temporary)
                        return cls.open(path, verbose=verbose)
                    else:
                        state = "a" if old.complete else "an unfinished"
                        raise ValueError(
                            "`path` must be new, or say overwrite=True. "
                            f"Received: path={str(path)!r}, {state} store of "
                            f"the teacher {old.layout.teacher!r} with "
                            f"{old.num_rows} rows"
                        )
            temporary.rename(path)
            sync(path.parent)
        return cls.open(path, verbose=verbose)

    # ---- Read ----

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._ends[-1])

    @property
    def shape(self) -> tuple[Any, ...]:
        """Return the shape of all rows; the time of sequences is None."""
        layout = self.layout
        if layout.kind == "probabilities":
            return len(self), layout.num_classes
        k = layout.top_k or 0
        time = (None,) if layout.kind == "tokens" else ()
        return len(self), *time, k + 1, 2

    def read(self, indices: Any = slice(None)) -> np.ndarray:
        """Return rows as float32, in the order of the indices.

        Args:
            indices: an integer array, or a slice.

        Returns:
            Probabilities `(n, C)`; events `(n, k + 1, 2)`; or events of
            sequences `(n, time, k + 1, 2)`, padded to the longest.
        """
        if isinstance(indices, slice):
            indices = np.arange(len(self))[indices]
        indices = np.asarray(indices)
        if not indices.size:
            indices = indices.astype("int64")
        if indices.ndim != 1 or indices.dtype.kind not in "iu":
            fail("indices", "a list of integers or a slice", indices)
        if len(indices) and not (
            0 <= indices.min() and indices.max() < len(self)
        ):
            fail("indices", f"from 0 to {len(self) - 1}", indices)
        if self.layout.kind == "tokens":
            found = list(self.sequences(indices))
            ends = [start + len(rows["top_ids"]) for start, rows in found]
            shape = (len(found), max(ends, default=0), *self.shape[2:])
            out = np.zeros(shape, "float32")
            out[..., 0] = NO_ENTRY
            for row, end, (start, rows) in zip(out, ends, found, strict=True):
                events(rows, row[start:end])
            return out
        out = np.empty((len(indices), *self.shape[1:]), "float32")
        for values, where, local in self._by_file(indices):
            if self.layout.kind == "probabilities":
                out[where] = values["probabilities"][local]
            else:
                rows = {name: values[name][local] for name in ENTRIES}
                out[where] = events(rows)
        return out

    def _by_file(
        self, indices: np.ndarray
    ) -> Iterator[tuple[Values, Any, Any]]:
        """Yield each file's columns, positions in `indices`, and rows there."""
        files = np.searchsorted(self._ends, indices, side="right")
        for file in np.unique(files):
            where: Any = np.flatnonzero(files == file)
            begin = self._ends[file] - self._batches[file].num_rows
            local = indices[where] - begin
            if len(local) == len(indices):  # a slice is assigned faster
                where = slice(None)
            yield self._values[file], where, local

    def sequences(self, indices: np.ndarray) -> Iterator[tuple[int, Values]]:
        """Yield each sequence's first stored position, and columns of events.

        Args:
            indices: rows of a store of token sequences.
        """
        files = np.searchsorted(self._ends, indices, side="right")
        for file, index in zip(files, indices, strict=True):
            values = self._values[file]
            row = index - self._ends[file] + self._batches[file].num_rows
            low, high = values["offsets"][row : row + 2]
            rows = {name: values[name][low:high] for name in ENTRIES}
            yield int(values["start"][row]), rows

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """Return all rows, `np.asarray(labels)`."""
        if copy is False:
            raise ValueError("Stored rows cannot be read without a copy.")
        return self.read().astype(dtype or "float32", copy=False)

    def __repr__(self) -> str:
        """Return path, size and layout."""
        return f"SoftLabels({self.path}, {len(self)} rows, {self.layout})"

    def __reduce__(self) -> Any:
        """Pickle a store on disk as its path."""
        if self.path is None:
            return SoftLabels, (self.layout, self._batches)
        return functools.partial(SoftLabels.open, verify=False), (self.path,)

    # ---- Find the rows of examples ----

    fingerprint = staticmethod(fingerprint)

    @property
    def fingerprints(self) -> np.ndarray | None:
        """Return the fingerprint of each row's input, None if unknown."""
        return self._column("fingerprint", self.layout.has_fingerprints)

    @property
    def ids(self) -> np.ndarray | None:
        """Return the id of each row, None if there are none."""
        return self._column("id", self.layout.has_ids)

    def _column(self, name: str, present: bool) -> np.ndarray | None:
        if not present:
            return None
        return np.concatenate([values[name] for values in self._values])

    @functools.cached_property
    def _by_fingerprint(self) -> tuple[np.ndarray, np.ndarray]:
        """Return sorted fingerprints, and the first row of each."""
        stored = self.fingerprints
        if stored is None:
            raise ValueError(
                "These soft labels were stored without inputs. Pass `inputs` "
                "to `from_array`, or find rows by `ids`."
            )
        return np.unique(stored, return_index=True)

    @functools.cached_property
    def _by_id(self) -> dict[str, int]:
        """Return the first row of each id."""
        names = [] if self.ids is None else self.ids.tolist()
        return dict(zip(names[::-1], range(len(names))[::-1], strict=True))

    def find(self, inputs: Any = None, *, ids: Any = None) -> np.ndarray:
        """Return the row of each example, for `read`.

        Args:
            inputs: the examples, as in `write`.
            ids: or their ids.

        Returns:
            `(n,)` integers. If an example is stored twice, its first row.

        Raises:
            ValueError: if the row of an example is not stored.
        """
        if ids is None:
            return self.find_fingerprints(fingerprint(inputs))
        if self.ids is None:
            raise ValueError(
                "These soft labels have no ids. Pass `ids` when you store them."
            )
        rows = self._by_id
        missing = [str(i) for i in ids if str(i) not in rows]
        if missing:
            raise ValueError(
                "`ids` must be ids of stored rows. Received: "
                f"{missing[0]!r}, which is not stored ({len(missing)} of "
                f"{len(ids)} are not)"
            )
        return np.array([rows[str(i)] for i in ids], "int64")

    def find_fingerprints(self, prints: np.ndarray) -> np.ndarray:
        """Return the row of each fingerprint; see `find`."""
        known, first = self._by_fingerprint
        place = np.minimum(np.searchsorted(known, prints), len(known) - 1)
        missing = np.flatnonzero(known[place] != prints)
        if len(missing):
            raise ValueError(
                "`inputs` must be examples whose soft labels are stored. "
                f"Received: {len(missing)} of {len(prints)} examples that are "
                f"not, the first in position {missing[0]}. They are new, or "
                "their values, dtype or shape have changed"
            )
        return first[place]

    @property
    def num_examples(self) -> int:
        """Return the number of different examples."""
        if not self.layout.has_fingerprints:
            return len(self)
        return len(self._by_fingerprint[0])

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
            data: as in `write`, or other arrays or batches of the same
                examples. Its own targets are replaced.
            ids: find the rows by these ids instead, for arrays.
            allow_subset: whether some stored examples may be missing from
                `data`. For data sets, only the number of batches is checked.
            batch_size: batch size for arrays. Data sets keep their batches.
            shuffle: whether to draw a new order in each epoch; arrays only.
            seed: seed of that order.

        Returns:
            Batches `(inputs, soft labels)`, with sample weights if the data
            have them: a data set of the same library, or a
            `keras.utils.PyDataset` for arrays. Of token sequences `(inputs,
            events, sample weights)`, whose weights are 0 where nothing is
            stored.

        Raises:
            ValueError: if the row of an example is not stored, or examples are
                missing. In a data set, when the example is read.

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
        return attach_several(
            [self],
            data,
            ids=ids,
            allow_subset=allow_subset,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
        )

    # ---- Other tools ----

    def to_arrow(
        self, dtype: Literal["float16", "float32"] | None = "float32"
    ) -> Any:
        """Return a `pyarrow.RecordBatchReader` of all rows.

        DuckDB takes it as a table; it cannot read float16. Polars, pandas and
        Hugging Face Datasets read the store's `.arrow` files as they are.

        Args:
            dtype: dtype of the numbers; None for the stored one.
        """
        layout = dataclasses.replace(
            self.layout, dtype=dtype or self.layout.dtype
        )

        def parts() -> Iterator[Any]:
            for batch in self._batches:
                for low in range(0, batch.num_rows, EXPORTED):
                    found = views(batch.slice(low, EXPORTED))
                    prints = found.get("fingerprint")
                    yield layout.encode(found, prints, found.get("id"))

        schema = layout.schema()
        return pyarrow().RecordBatchReader.from_batches(schema, parts())

    def to_parquet(
        self,
        file: PathLike,
        *,
        dtype: Literal["float16", "float32"] | None = None,
        verbose: Verbose = "auto",
    ) -> None:
        """Write all rows to one Parquet file, whole or not at all.

        Args:
            file: its name.
            dtype: dtype of the numbers; None for the stored one.
            verbose: as in `from_array`.
        """
        pyarrow()
        from pyarrow import parquet

        file = Path(file)
        temporary = file.with_name(file.name + ".partial")
        reader = self.to_arrow(dtype)
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
        """Make a store of a Parquet file that `to_parquet` wrote.

        Files of other tools are read by `soft_labels.read_table`.

        Args:
            file: its name.
            path: directory of the new store; None keeps it in memory.
            overwrite: whether to replace another store at `path`.
            verbose: as in `from_array`.

        Returns:
            The store.

        Raises:
            ValueError: if the file has no description of a store.
        """
        pyarrow()
        from pyarrow import parquet

        table = parquet.ParquetFile(file)
        layout = Layout.of_schema(table.schema_arrow)
        if layout is None:
            raise ValueError(
                "`file` must be a Parquet file that `to_parquet` wrote. Give "
                "the columns of other files to `read_table` or `from_array`. "
                f"Received: {file} with the columns {table.schema_arrow.names}"
            )
        found = (
            (layout, batch.cast(layout.schema()))
            for batch in table.iter_batches(CHUNK)
        )
        parts = _tracked(found, "Reading", table.metadata.num_rows, verbose)
        return cls._from_parts(parts, path, overwrite, verbose)

    @classmethod
    def join(
        cls,
        parts: Iterable[PathLike],
        path: PathLike,
        *,
        overwrite: bool = False,
        verbose: Verbose = "auto",
    ) -> "SoftLabels":
        """Join stores into one, when several machines have labelled parts.

        Args:
            parts: directories of complete stores of the same teacher and the
                same classes, in the order of the rows.
            path: directory of the new store. The parts stay.
            overwrite: whether to replace another store at `path`.
            verbose: as in `from_array`.

        Returns:
            The store.

        Raises:
            ValueError: if the parts differ in what they hold, or as `open`.

        Example:
            >>> import tempfile
            >>> import numpy as np
            >>> from keras_ptloss import SoftLabels
            >>> folder, x = tempfile.mkdtemp(), np.arange(6.0)
            >>> def teacher(batch):
            ...     return np.stack([batch / 5, 1 - batch / 5], axis=-1)
            >>> parts = [f"{folder}/part-{i}" for i in range(2)]
            >>> for i, part in enumerate(parts):  # each on its own machine
            ...     _ = SoftLabels.write(
            ...         teacher, np.split(x, 2)[i], part, verbose=0
            ...     )
            >>> len(SoftLabels.join(parts, folder + "/labels"))
            6
        """
        stores = [cls.open(part) for part in parts]
        if not stores:
            fail("parts", "at least one store", stores)
        for store in stores:
            _check_same(store.layout, vars(stores[0].layout), store.path)
        found = (
            (store.layout, batch.slice(low, CHUNK))
            for store in stores
            for batch in store._batches
            for low in range(0, batch.num_rows, CHUNK)
        )
        total = sum(map(len, stores))
        joined = _tracked(found, "Joining", total, verbose)
        return cls._from_parts(joined, path, overwrite, verbose)


@contextlib.contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    """Delete a directory if an error is raised."""
    try:
        yield
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def _tracked(
    parts: Iterable[T], what: str, num_rows: int, verbose: Verbose
) -> Iterator[T]:
    """Yield parts of `CHUNK` rows while a progress bar counts them."""
    total = -(-num_rows // CHUNK)
    return track(parts, f"{what} {num_rows} rows", total, verbose=verbose)


def _in_parts(
    total: int,
    inputs: Any,
    ids: Any,
    about: dict[str, Any],
    convert: Callable[[slice, Any], Columns],
) -> Iterator[tuple[Layout, Any]]:
    """Yield layout and record batch of each part of arrays.

    Args:
        total: the number of rows.
        inputs: their inputs or None.
        ids: their ids or None.
        about: further fields of the layout.
        convert: returns the columns of a part, given it and its inputs.
    """
    if inputs is not None:
        inputs = as_inputs(inputs)
        if is_stream(inputs):
            fail("inputs", "arrays, or a source of single examples", inputs)
    for name, length in (
        ("inputs", total if inputs is None else num_examples(inputs)),
        ("ids", total if ids is None else len(ids)),
    ):
        if length != total:
            raise ValueError(
                f"`{name}` must have one entry for each of {total} rows. "
                f"Received: {name} of length {length}"
            )
    for low in range(0, total, CHUNK):
        part = slice(low, low + CHUNK)
        x = None if inputs is None else take(inputs, part)
        found = convert(part, x)
        layout = found.layout(
            **about, has_fingerprints=x is not None, has_ids=ids is not None
        )
        prints = None if x is None else fingerprint(x, verbose=0)
        named = None if ids is None else ids[part]
        yield layout, layout.encode(found.values, prints, named)


def _check_lengths(lengths: list[int], x: Any, low: int) -> None:
    """Require a stored position for each token."""
    tokens = sequence_mask(x).sum(axis=1)
    differ = np.flatnonzero(tokens != lengths)
    if len(differ):
        row = differ[0]
        raise ValueError(
            "`top_ids` must have a position for each token of `inputs` (ids of "
            f"-2 where there is no entry). Received: {lengths[row]} positions "
            f"for the {tokens[row]} tokens of sequence {low + row}"
        )


def _check_same(stored: Any, expected: dict[str, Any], path: Any) -> None:
    """Require a stored layout to have the expected values."""
    for name, value in expected.items():
        found = getattr(stored, name)
        if found != value:
            raise ValueError(
                f"The soft labels at {path} were written with another {name}, "
                f"{found!r}. Choose another path, or say overwrite=True. "
                f"Received: {name}={value!r}"
            )
