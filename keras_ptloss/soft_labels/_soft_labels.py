"""Stored teacher outputs: bought once, used for every student."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from keras_ptloss._checks import check_choice, check_count, check_flag, fail
from keras_ptloss.soft_labels import _data as data
from keras_ptloss.soft_labels import _store as store
from keras_ptloss.soft_labels._ask import ask
from keras_ptloss.soft_labels._attach import attach
from keras_ptloss.soft_labels._loaders import check_order
from keras_ptloss.soft_labels._match import Matcher
from keras_ptloss.soft_labels._parquet import write_parquet
from keras_ptloss.soft_labels._parquet_table import find_files, open_table
from keras_ptloss.soft_labels._rows import StoredRows
from keras_ptloss.soft_labels._spec import SoftLabelSpec, check_spec
from keras_ptloss.soft_labels._writer import ShardWriter, with_num_examples

Tensor = Any


class SoftLabels(StoredRows):
    """Teacher outputs on disk, read like an array of shape `(N, C)`.

    `labels[i]`, `labels[i:j]`, `labels[rows]` and `np.asarray(labels)` give
    float32 rows: probabilities that add up to 1, or logits if the teacher gave
    logits. Only the rows asked for are read from disk, but of Parquet files,
    which are read into memory. Make a store with `SoftLabels.write`, read it
    again with `SoftLabels.open`.

    Attributes:
        spec: The store's `SoftLabelSpec`.
        from_logits: Whether the rows are logits, not probabilities.
        shape: `(N, C)`.
        dtype: float32, the dtype of what is read.
        fingerprints: `(N,)` uint64, a hash of each labelled example.
        top_k_targets: Of stores with `top_k`: the k classes and the remaining
            mass, `(N, k + 1, 2)`, for `TopKPTLoss`, also read like an array.
        mean_total_variation: Mean over the rows of the error of storing.
        max_total_variation: The largest error of storing of a row.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from keras_ptloss import SoftLabels
        >>> x = np.arange(12.0).reshape(6, 2)
        >>> def teacher(batch):
        ...     return np.tile([0.5, 0.25, 0.25], (len(batch), 1))
        >>> path = tempfile.mkdtemp() + "/teacher.softlabels"
        >>> labels = SoftLabels.write(teacher, x, path, verbose=0)
        >>> labels.shape
        (6, 3)
        >>> print(labels[0])
        [0.5  0.25 0.25]

    Reference:
        Zhang et al., "Do Not Blindly Imitate the Teacher: Using Perturbed Loss
        for Knowledge Distillation", arXiv:2305.05010.
    """

    @classmethod
    def write(
        cls,
        teacher: keras.Model | Callable[[Tensor], Tensor],
        dataset: Any,
        path: str | os.PathLike[str],
        *,
        spec: SoftLabelSpec | None = None,
        batch_size: int = 32,
        verbose: int = 1,
    ) -> "SoftLabels":
        """Label a data set batch by batch, or go on where an earlier call was.

        The call may be killed at any moment. Repeated, it checks that the
        stored rows belong to `dataset` and asks the teacher for the others
        only. Whatever goes wrong, the stored rows stay good. For another
        teacher choose another `path`.

        Args:
            teacher: A `keras.Model`, run frozen by `predict_on_batch`, or a
                callable from a batch to a `(batch, C)` array; see
                `with_retries` for one that may fail. One column, `(batch, 1)`,
                is a binary head: `p` (or its logit `z`) of the second of two
                classes, stored as `[1 - p, p]` (or `[0, z]`).
            dataset: Array, pytree of arrays, list of texts, or what gives
                single examples by number, as a Grain `RandomAccessDataSource`;
                or a batched, finite `tf.data.Dataset`, `keras.utils.PyDataset`
                or loader of Grain or PyTorch. Of `(inputs, targets)` the
                inputs are used. Its order must be the same in each pass.
            path: Directory of the store. It is made if absent.
            spec: What is stored. Defaults to float16 probabilities.
            batch_size: Examples per call of the teacher; arrays only.
            verbose: 0 silent, 1 progress bar, 2 a line at the end, as in Keras.

        Returns:
            The store, opened.

        Raises:
            ValueError: If an argument is out of its range, the data set or
                `spec` is not that of the stored rows, or the teacher returns
                NaN, negative or unnormalised rows, or another shape.
            RuntimeError: If the teacher raises (its exception is the cause),
                or another process writes the same store.
            OSError: If the disk is full; the space is reserved at the start.

        Example:
            >>> import tempfile
            >>> import numpy as np
            >>> from keras_ptloss import SoftLabels
            >>> from keras_ptloss.soft_labels import SoftLabelSpec
            >>> def api(texts):
            ...     return np.tile([2.0, -1.0], (len(texts), 1))
            >>> labels = SoftLabels.write(
            ...     api,
            ...     ["a fine film", "a bore"],
            ...     tempfile.mkdtemp() + "/api.softlabels",
            ...     spec=SoftLabelSpec(from_logits=True),
            ...     verbose=0,
            ... )
            >>> print(labels[1])
            [ 2. -1.]
        """
        cls.write_shard(
            teacher,
            dataset,
            path,
            shard=(0, 1),
            spec=spec,
            batch_size=batch_size,
            verbose=verbose,
        )
        return cls.open(path)

    @classmethod
    def write_shard(
        cls,
        teacher: keras.Model | Callable[[Tensor], Tensor],
        dataset: Any,
        path: str | os.PathLike[str],
        *,
        shard: tuple[int, int],
        spec: SoftLabelSpec | None = None,
        batch_size: int = 32,
        verbose: int = 1,
    ) -> None:
        """Label one of several ranges of a data set, one a process or host.

        Shard `i` of `n` holds the rows `N * i // n` to `N * (i + 1) // n`. Once
        all are written to one directory, `SoftLabels.open` reads them as one.

        Args:
            teacher: As in `write`.
            dataset: As in `write`: the whole data set, not the shard's part.
            path: As in `write`, the same for all shards.
            shard: `(index, count)`.
            spec: As in `write`, the same for all shards.
            batch_size: As in `write`.
            verbose: As in `write`.

        Raises:
            ValueError: As in `write`.
            RuntimeError: As in `write`.
            OSError: As in `write`.

        Example:
            >>> import tempfile
            >>> import numpy as np
            >>> from keras_ptloss import SoftLabels
            >>> def teacher(batch):
            ...     return np.full((len(batch), 2), 0.5)
            >>> path, x = tempfile.mkdtemp() + "/two.softlabels", np.arange(5)
            >>> for index in range(2):
            ...     SoftLabels.write_shard(
            ...         teacher, x, path, shard=(index, 2), verbose=0
            ...     )
            >>> len(SoftLabels.open(path))
            5
        """
        if not callable(teacher):
            fail("teacher", "a keras.Model or a callable", teacher)
        run = teacher
        if isinstance(teacher, keras.Model):
            run = teacher.predict_on_batch
        check_count("batch_size", batch_size)
        check_choice("verbose", str(verbose), ("0", "1", "2"))
        dataset = data.as_dataset(dataset)
        check_order(dataset)
        spec = SoftLabelSpec() if spec is None else spec
        check_spec(spec, SoftLabelSpec)
        spec = with_num_examples(spec, dataset)
        with ShardWriter(Path(path), spec, shard) as writer:
            bar = keras.utils.Progbar(
                writer.stop - writer.start - writer.stored,
                unit_name="example",
                verbose=verbose,
            )
            resumed = writer.stored
            for row, x, fingerprints in writer.missing(dataset, batch_size):
                writer.append(fingerprints, ask(run, x, row, writer))
                bar.update(writer.stored - resumed)
            writer.finish()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        verify: bool = True,
        spec: SoftLabelSpec | None = None,
    ) -> "SoftLabels":
        """Open a complete store, all shards as one, or Parquet files.

        Parquet files, of `to_parquet` or of another tool, are read into
        memory. Their rows have no order: `attach` finds each example's by its
        fingerprint. Rows of one example count once if they are equal, and a
        warning tells how many.

        Args:
            path: Directory of the store, or of `*.parquet` files with a column
                `fingerprint`; docs/storage.md lists the others.
            verify: Whether to compare the checksums: of each file, which reads
                the whole store once, or of Parquet's pages. Lengths and dtypes
                are always compared.
            spec: Of Parquet files only: what the rows are, where the files'
                metadata do not say. Fields left at their defaults are the
                metadata's; others must agree, but for `dtype="float32"`.

        Returns:
            The store, memory-mapped if it is one.

        Raises:
            FileNotFoundError: If there is no store at `path`.
            OSError: As the system has it, such as where too many files are
                open: of a store one a shard; with `top_k`, three.
            ValueError: If shards are missing, unfinished or damaged, or rows
                of one example differ. The message says which, and what to do.

        Example:
            >>> from keras_ptloss import SoftLabels
            >>> SoftLabels.open("absent.softlabels")
            Traceback (most recent call last):
                ...
            FileNotFoundError: No soft labels at absent.softlabels
        """
        check_flag("verify", verify)
        if spec is not None:
            check_spec(spec, SoftLabelSpec)
        files = find_files(path) if Path(path).is_dir() else None
        if files is not None and store.shard_count(Path(path)) is None:
            return cls(path, [open_table(files, spec=spec, verify=verify)])
        if spec is not None:
            fail("spec", "None: a store has its own", spec)
        return cls(path, store.open_shards(Path(path), verify=verify))

    def to_parquet(
        self,
        directory: str | os.PathLike[str],
        *,
        ids: Any = None,
        rows_per_file: int = 1_000_000,
    ) -> int:
        """Write the rows to Parquet files, for other tools and for `open`.

        The columns are `fingerprint` and `probabilities` or `logits`, lists
        of C float32; or, with `top_k`, `top_ids`, `top_log_probabilities` and
        `log_tail`. The spec is in the files' metadata.

        Args:
            directory: A new directory. It gets its name once it is whole.
            ids: A name of each example, text, UUID or integer, in the order
                of the rows, for a column `id`. Without, examples that are the
                same are written once.
            rows_per_file: Rows in a file, at most.

        Returns:
            How many rows were written.

        Raises:
            ValueError: If `directory` exists, `ids` are not one name a row, or
                without them the rows of one example differ.
            ImportError: If pyarrow is not installed (the extra `parquet`).

        Example:
            >>> import tempfile
            >>> import numpy as np
            >>> from keras_ptloss import SoftLabels
            >>> def teacher(batch):
            ...     return np.stack([batch / 4, 1 - batch / 4], axis=-1)
            >>> x, folder = np.array([0.0, 1.0, 2.0]), tempfile.mkdtemp()
            >>> labels = SoftLabels.write(
            ...     teacher, x, folder + "/store", verbose=0
            ... )
            >>> labels.to_parquet(folder + "/parquet")
            3
            >>> again = SoftLabels.open(folder + "/parquet")
            >>> inputs, soft = again.attach(x)[0]
            >>> print(soft[:, 0])
            [0.   0.25 0.5 ]
        """
        check_count("rows_per_file", rows_per_file)
        return write_parquet(
            self, Path(directory), ids=ids, rows_per_file=rows_per_file
        )

    def attach(
        self,
        dataset: Any,
        *,
        ids: Any = None,
        batch_size: int = 32,
        shuffle: bool = False,
        seed: int | None = None,
        preprocessor: Callable[[Tensor], Tensor] | None = None,
        targets: str = "rows",
    ) -> Any:
        """Pair the labelled data set with its stored rows, for `fit`.

        Every example's fingerprint is compared with that of its row: arrays
        when attaching, the others batch by batch. So attach to the examples as
        they were labelled, and shuffle, augment and tokenize after it.

        Args:
            dataset: What was given to `write`, in any of its forms; also one
                whose order differs, with `ids`.
            ids: Which stored row belongs to each example, in the order of
                `dataset`: None for all rows in order, integers, or `"content"`
                to find each example by its fingerprint, which suits a data
                set that is shuffled or a part of the whole, and is the default
                for Parquet.
            batch_size: Examples in a batch of arrays; batches stay as they are.
            shuffle: Whether to draw a new order in every epoch; arrays only.
            seed: Seed of that order; unused where nothing is shuffled.
            preprocessor: Called on the inputs of a batch, after the check, for
                students that need other inputs than the teacher. On `tf.data`
                it is applied by `map`, so it must consist of TensorFlow ops.
            targets: `"rows"`, `(batch, C)`; or, of stores with `top_k`,
                `"top_k"`, `(batch, k + 1, 2)`: ids and log-probabilities, for
                `TopKPTLoss`. Its last entry, of id -1, is the remaining mass.

        Returns:
            `(inputs, soft labels)` batches, with the sample weights of
            batches if it has any; its own targets are replaced. What `fit`
            takes: a `tf.data.Dataset` or loader of the same library for one
            (its workers load; rows are read in this process, but of a
            `grain.MapDataset` in the workers that follow), else a
            `keras.utils.PyDataset`.

        Raises:
            ValueError: If an example is not the one that was labelled, or the
                length differs; names the example. TensorFlow raises it inside
                of `tf.errors.InvalidArgumentError` while iterating.

        Example:
            >>> import tempfile
            >>> import numpy as np
            >>> from keras_ptloss import SoftLabels
            >>> def teacher(batch):
            ...     return np.stack([batch / 4, 1 - batch / 4], axis=-1)
            >>> x = np.array([0.0, 1.0, 2.0])
            >>> path = tempfile.mkdtemp() + "/teacher.softlabels"
            >>> labels = SoftLabels.write(teacher, x, path, verbose=0)
            >>> inputs, soft = labels.attach(x[::-1], ids="content")[0]
            >>> print(soft[:, 0])
            [0.5  0.25 0.  ]
        """
        check_choice("targets", targets, ("rows", "top_k"))
        labels = self.top_k_targets if targets == "top_k" else self
        return attach(
            Matcher(labels, ids),
            dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            preprocessor=preprocessor,
        )

    def __reduce__(self) -> Any:
        """Pickle as a path, not as the rows: for worker processes."""
        spec = None if self.ordered else self.spec
        reopen = functools.partial(SoftLabels.open, verify=False, spec=spec)
        return reopen, (self.path,)
