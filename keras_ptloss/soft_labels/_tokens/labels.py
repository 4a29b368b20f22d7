"""Stored log-probabilities of tokens: bought once, used for every student."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_ptloss._checks import check_choice, check_count, check_flag
from keras_ptloss.soft_labels import _data as data
from keras_ptloss.soft_labels._attach import attach
from keras_ptloss.soft_labels._loaders import check_order
from keras_ptloss.soft_labels._spec import check_spec
from keras_ptloss.soft_labels._tokens.ask import ask_tokens, asked
from keras_ptloss.soft_labels._tokens.match import TokenMatcher
from keras_ptloss.soft_labels._tokens.sequences import (
    as_token_dataset,
    sequences_of,
    token_batches,
    token_fingerprints,
)
from keras_ptloss.soft_labels._tokens.spec import (
    PADDING,
    TokenLabelSpec,
    decode_tokens,
)
from keras_ptloss.soft_labels._tokens.store import TokenFiles
from keras_ptloss.soft_labels._tokens.writer import TokenWriter

Tensor = Any


class TokenLabels:
    """The likeliest tokens of a teacher at each position of texts, on disk.

    From a teacher to a student in training:

        spec = TokenLabelSpec(top_k=16, from_logits=True)
        labels = TokenLabels.write(teacher, token_ids, path, spec=spec)
        student.compile("adam", loss=TopKPTLoss(0.0, from_logits=True))
        student.fit(labels.attach(token_ids))

    `labels[i]` gives sequence i's targets as `TopKPTLoss` takes them, `(time,
    k + 1, 2)`: ids and natural log-probabilities; the last entry, of id -1, is
    all other tokens together. Only what is asked for is read from disk. Where
    nothing is stored, all ids are -2.

    Sequences are found by their tokens, in any order, whatever their padding:
    `soft_labels.fingerprint(np.array([tokens], "int32"))`.

    Attributes:
        spec: The store's `TokenLabelSpec`.
        vocabulary_size: Number of token ids.
        fingerprints: `(N,)` uint64, a hash of each sequence's tokens.
        lengths: `(N,)`, how many tokens each has.
        counts: `(N,)`, of how many of them something is stored.
        mean_total_variation: Mean over the tokens of the error of storing.
        max_total_variation: The largest of a token.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from keras_ptloss.soft_labels import TokenLabels, TokenLabelSpec
        >>> def teacher(batch):
        ...     shape = (*batch["token_ids"].shape, 1)
        ...     return np.tile([0.5, 0.25, 0.125, 0.125], shape)
        >>> texts = [[3, 1, 2], [2, 2, 0, 1, 3]]
        >>> labels = TokenLabels.write(
        ...     teacher,
        ...     texts,
        ...     tempfile.mkdtemp() + "/teacher.tokens",
        ...     spec=TokenLabelSpec(top_k=2),
        ...     verbose=0,
        ... )
        >>> print(np.exp(labels[1][0, :, 1]).round(2))
        [0.5  0.25 0.25]
        >>> x, y_true, weight = labels.attach(texts)[0]
        >>> y_true.shape, weight[0].tolist()
        ((2, 5, 3, 2), [1.0, 1.0, 1.0, 0.0, 0.0])
    """

    def __init__(self, path: str | os.PathLike[str], files: TokenFiles) -> None:
        """Use `TokenLabels.open`."""
        self.path, self._files = Path(path), files
        self.spec, self.vocabulary_size = files.spec, files.vocabulary_size
        self.fingerprints = files.fingerprints
        self.lengths, self.counts = files.lengths, files.counts
        error = files.manifest["total_variation"]
        self.mean_total_variation = error["sum"] / max(self.num_tokens, 1)
        self.max_total_variation: float = error["max"]

    @classmethod
    def write(
        cls,
        teacher: keras.Model | Callable[[Tensor], Tensor],
        dataset: Any,
        path: str | os.PathLike[str],
        *,
        spec: TokenLabelSpec,
        sample_weight: Any = None,
        batch_size: int = 32,
        verbose: int = 1,
    ) -> "TokenLabels":
        """Ask a teacher about texts, or go on where an earlier call was.

        The call may be killed at any moment. Repeated, it checks that the
        stored sequences are the first of `dataset`, and that the same tokens
        count, and asks the teacher for the others only. For another teacher
        choose another `path`.

        Args:
            teacher: A `keras.Model`, run frozen by `predict_on_batch`, or a
                callable, from a batch to `(batch, time, V)`: of each token
                what follows it. Or a callable to the likeliest only, `(batch,
                time, entries, 2)`, as `TopKPTLoss` takes them, with at least k
                entries or padding (ids below -1), in float32 where ids are
                above 2048, which float16 rounds (bfloat16: 256).
            dataset: Token ids: an array `(N, time)` of integers; a dictionary
                with `"token_ids"` and `"padding_mask"`, as KerasHub has them
                (or `"input_ids"` and `"attention_mask"`); a list of sequences
                of any lengths (or a column of lists, as Hugging Face's data
                sets have), which becomes such a dictionary, padded with 0 on
                the right; or batches of these, in any form that
                `SoftLabels.write` takes.
            path: Directory of the store. It is made if absent.
            spec: What is stored.
            sample_weight: `(N, time)` or `(N,)`, of arrays and lists; batches
                have their own. Tokens of weight 0, and padding, are not stored.
            batch_size: Sequences per call of the teacher; not of batches.
            verbose: 0 silent, 1 progress bar, 2 a line at the end, as in Keras.

        Returns:
            The store, opened.

        Raises:
            ValueError: If an argument is out of its range, the data set,
                `spec` or `sample_weight` is not that of what is stored, or the
                teacher returns NaN, ids that are none, or no probabilities.
            RuntimeError: If the teacher raises (its exception is the cause),
                or another process writes the same store.
            OSError: If the disk is full; what is stored stays good.

        Example:
            >>> import tempfile
            >>> import numpy as np
            >>> from keras_ptloss.soft_labels import TokenLabels, TokenLabelSpec
            >>> def api(batch):
            ...     entries = [[7, np.log(0.5)], [42, np.log(0.3)]]
            ...     return np.tile(entries, (*batch["token_ids"].shape, 1, 1))
            >>> labels = TokenLabels.write(
            ...     api,
            ...     [[5, 6], [1, 2, 3]],
            ...     tempfile.mkdtemp() + "/api.tokens",
            ...     spec=TokenLabelSpec(top_k=2, vocabulary_size=50_000),
            ...     verbose=0,
            ... )
            >>> labels.num_tokens
            5
        """
        check_spec(spec, TokenLabelSpec)
        check_count("batch_size", batch_size)
        check_choice("verbose", str(verbose), ("0", "1", "2"))
        run = asked(teacher, spec)
        dataset = as_token_dataset(dataset)
        check_order(dataset)
        total = None if data.is_streamed(dataset) else data.length(dataset)
        with TokenWriter(Path(path), spec) as writer:
            resumed = writer.stored
            bar = keras.utils.Progbar(
                None if total is None else total - resumed,
                unit_name="sequence",
                verbose=verbose,
            )
            missing = writer.missing(dataset, sample_weight, batch_size)
            for row, x, batch in missing:
                tokens, size = ask_tokens(run, x, row, batch.kept, writer)
                if writer.vocabulary_size not in (None, size):
                    raise ValueError(
                        f"The teacher returned {size} tokens where"
                        f" {writer.vocabulary_size} are stored"
                    )
                writer.append(batch, tokens, size)
                bar.update(writer.stored - resumed)
            writer.finish()
        return cls.open(path)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, verify: bool = True
    ) -> "TokenLabels":
        """Open a complete store.

        Args:
            path: Directory of the store.
            verify: Whether to compare the checksums of the files, which reads
                them all once. Lengths and dtypes are always compared.

        Returns:
            The store, memory-mapped.

        Raises:
            FileNotFoundError: If there is no store at `path`.
            ValueError: If it is unfinished, or a file damaged; names it.

        Example:
            >>> from keras_ptloss.soft_labels import TokenLabels
            >>> TokenLabels.open("absent.tokens")
            Traceback (most recent call last):
                ...
            FileNotFoundError: No token labels at absent.tokens
        """
        check_flag("verify", verify)
        return cls(path, TokenFiles(Path(path), verify=verify))

    @property
    def num_tokens(self) -> int:
        """How many tokens are stored."""
        return int(self.counts.sum())

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.fingerprints)

    def __getitem__(self, index: int) -> Any:
        """Return the targets of one sequence, `(time, k + 1, 2)` float32."""
        row = range(len(self))[index]  # of Python's rules, IndexError too
        found = decode_tokens(self._files.tokens([row]), self.vocabulary_size)
        rows = np.zeros((self.lengths[row], *found.shape[1:]), "float32")
        rows[..., 0] = PADDING
        rows[self._files.kept(np.array([row]))] = found
        return rows

    def __repr__(self) -> str:
        """Return path, sizes and spec."""
        return (
            f"TokenLabels({str(self.path)!r}, {len(self)} sequences,"
            f" {self.num_tokens} tokens, {self.spec})"
        )

    def rows_of(self, dataset: Any) -> Any:
        """Find each sequence of a data set in the store.

        Sequences that are missing have -1; stored rows that do not occur,
        `np.setdiff1d(np.arange(len(labels)), rows)`, belong to no sequence of
        the data set.

        Args:
            dataset: As in `write`.

        Returns:
            `(N,)` integers, the stored row of each sequence.

        Raises:
            ValueError: If these are no token ids.

        Example:
            >>> import tempfile
            >>> import numpy as np
            >>> from keras_ptloss.soft_labels import TokenLabels, TokenLabelSpec
            >>> def teacher(batch):
            ...     return np.full((*batch["token_ids"].shape, 4), 0.25)
            >>> labels = TokenLabels.write(
            ...     teacher,
            ...     [[3, 1], [2], [1, 1]],
            ...     tempfile.mkdtemp() + "/teacher.tokens",
            ...     spec=TokenLabelSpec(top_k=2),
            ...     verbose=0,
            ... )
            >>> print(labels.rows_of([[1, 1], [0, 1], [3, 1]]))
            [ 2 -1  0]
        """
        match = TokenMatcher(self._files)
        dataset = as_token_dataset(dataset)
        found = [
            match.find(token_fingerprints(sequences_of(x)), first)
            for first, x, _ in token_batches(dataset, None, 4096)
        ]
        return np.concatenate(found)

    def attach(
        self,
        dataset: Any,
        *,
        batch_size: int = 32,
        shuffle: bool = False,
        seed: int | None = None,
        preprocessor: Callable[[Tensor], Tensor] | None = None,
    ) -> Any:
        """Pair texts with what is stored of them, for `fit`.

        Every sequence is found by its tokens: the order may be any, the data
        set a part of the whole, the padding of another width or side.

        Args:
            dataset: Token ids, in any of the forms of `write`.
            batch_size: Sequences in a batch of arrays and lists; batches stay
                as they are.
            shuffle: Whether to draw a new order in every epoch; arrays and
                lists only.
            seed: Seed of that order; unused where nothing is shuffled.
            preprocessor: Called on the inputs of a batch, after the check, for
                students that need other inputs than the teacher. On `tf.data`
                it is applied by `map`, so it must consist of TensorFlow ops.

        Returns:
            Batches `(inputs, targets, sample weights)`: targets `(batch, time,
            k + 1, 2)`, as `TopKPTLoss` takes them; weights `(batch, time)`, 0
            where nothing is stored, else 1, or those of the batches. What
            `fit` takes, as of `SoftLabels.attach`.

        Raises:
            ValueError: If a sequence is not stored; names it. TensorFlow
                raises it inside of `tf.errors.InvalidArgumentError` while
                iterating.

        Example:
            >>> import tempfile
            >>> import numpy as np
            >>> from keras_ptloss.soft_labels import TokenLabels, TokenLabelSpec
            >>> def teacher(batch):
            ...     return np.full((*batch.shape, 4), 0.25)
            >>> x = np.array([[3, 1, 1], [2, 0, 1]])
            >>> labels = TokenLabels.write(
            ...     teacher,
            ...     x,
            ...     tempfile.mkdtemp() + "/teacher.tokens",
            ...     spec=TokenLabelSpec(top_k=2),
            ...     sample_weight=[[1, 1, 0], [1, 1, 0]],
            ...     verbose=0,
            ... )
            >>> inputs, targets, weight = labels.attach(x[::-1])[0]
            >>> print(weight)
            [[1. 1. 0.]
             [1. 1. 0.]]
        """
        return attach(
            TokenMatcher(self._files),
            as_token_dataset(dataset),
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            preprocessor=preprocessor,
        )

    def __reduce__(self) -> Any:
        """Pickle as a path, not as the rows: for worker processes."""
        reopen = functools.partial(TokenLabels.open, verify=False)
        return reopen, (self.path,)
