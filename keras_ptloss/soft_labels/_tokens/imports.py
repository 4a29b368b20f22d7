"""Import of what language models have said of tokens, from files."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from keras_ptloss._checks import check_choice, fail
from keras_ptloss.soft_labels._journal import at_once, refuse_old
from keras_ptloss.soft_labels._parquet_table import find_files
from keras_ptloss.soft_labels._spec import check_spec
from keras_ptloss.soft_labels._store import shard_count
from keras_ptloss.soft_labels._tokens.answers import Lines
from keras_ptloss.soft_labels._tokens.distillkit import ParquetLists
from keras_ptloss.soft_labels._tokens.entries import tokens_of_entries
from keras_ptloss.soft_labels._tokens.labels import TokenLabels
from keras_ptloss.soft_labels._tokens.place import Placed, Places
from keras_ptloss.soft_labels._tokens.sequences import (
    as_token_dataset,
    padded,
    sequences_of,
    token_batches,
    token_fingerprints,
)
from keras_ptloss.soft_labels._tokens.spec import TokenLabelSpec, Tokens
from keras_ptloss.soft_labels._tokens.vocabulary import Vocabulary
from keras_ptloss.soft_labels._tokens.writer import Batch, TokenWriter

# Sequences stored at a time.
_BATCH = 64


@dataclasses.dataclass(frozen=True, eq=False)
class TokenImportReport:
    """The imported store, and what was left out.

    Args:
        labels: The store, opened.
        unknown: `(token, how often)` of the tokens that the tokenizer does not
            know, the most frequent first. Their probability is in the tail.
        unknown_mass: Their probability, a mean over the stored tokens.
        padded: How many stored tokens have fewer than k entries.
        renormalised: How many had more than 1 in all by DistillKit's
            polynomial, and were divided by it.
        failed: Names (or lines) of requests that failed; nothing is stored of
            these.
        missing: Positions in `dataset` of which nothing is stored.
        foreign: How many stored sequences are not in `dataset`.
        duplicates: How many sequences had been there before; the first counts.
    """

    labels: TokenLabels
    unknown: tuple[tuple[str, int], ...] = ()
    unknown_mass: float = 0.0
    padded: int = 0
    renormalised: int = 0
    failed: tuple[str, ...] = ()
    missing: tuple[int, ...] = ()
    foreign: int = 0
    duplicates: int = 0


def import_token_labels(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    spec: TokenLabelSpec,
    format: str,
    dataset: Any = None,
    ids: Sequence[str | int] | None = None,
    tokenizer: Any = None,
) -> TokenImportReport:
    r"""Make a store of tokens from a file of what language models said.

    `format="vllm"`: a `.jsonl` file of completions of vLLM's server (or lines
    of a batch job's output, or `{"prompt_token_ids": ..., "prompt_logprobs":
    ...}`), asked with `prompt_logprobs=k`. At each position there are the k
    likeliest tokens and the prompt's own, which is left to the tail where it is
    not among them.

    `format="openai"`: a `.jsonl` file of chat completions, asked with
    `logprobs=True, top_logprobs=k`. Their tokens are texts, which `tokenizer`
    knows; what it does not know goes to the tail, and is reported. The tokens
    of the answer must be the end of the sequence, what ends it excepted.

    `format="distillkit"`: Parquet files with `input_ids`, and `token_ids` and
    `top_values` or `bytepacked_indices` and `compressed_logprobs`, with
    `compression_config.yaml` beside (which needs PyYAML).

    Args:
        source: The file; of Parquet also a pattern or a directory.
        path: Directory of the store, a new one.
        spec: Of the store, with `vocabulary_size`. `top_k` may be less than
            what the file has.
        format: `"vllm"`, `"openai"` or `"distillkit"`.
        dataset: The sequences, as in `TokenLabels.write`, in the order of the
            lines, or of `ids`. Needed where lines have no `prompt_token_ids`;
            where they do, it is for the report.
        ids: The `custom_id` of each sequence of `dataset`, since batch jobs
            give them in any order.
        tokenizer: Of `"openai"`: a tokenizer of KerasHub (it has
            `token_to_id`); a dictionary from token to id; or a callable from
            the API's text to an id, or None.

    Returns:
        A `TokenImportReport` with the opened store.

    Raises:
        ValueError: If a line cannot be read, has fewer than k tokens at a
            position, no log-probabilities, ids that are none, or those of
            another sequence or tokenizer; the message names the line.

    Example:
        >>> import json, tempfile
        >>> import numpy as np
        >>> from keras_ptloss.soft_labels import (
        ...     TokenLabelSpec,
        ...     import_token_labels,
        ... )
        >>> folder = tempfile.mkdtemp()
        >>> line = {
        ...     "prompt_token_ids": [5, 7],
        ...     "prompt_logprobs": [
        ...         None,
        ...         {
        ...             "7": {"logprob": -1.6094, "rank": 2},
        ...             "3": {"logprob": -0.2231, "rank": 1},
        ...         },
        ...     ],
        ... }
        >>> with open(folder + "/prompts.jsonl", "w") as file:
        ...     _ = file.write(json.dumps(line))
        >>> report = import_token_labels(
        ...     folder + "/prompts.jsonl",
        ...     folder + "/store",
        ...     spec=TokenLabelSpec(top_k=1, vocabulary_size=10),
        ...     format="vllm",
        ... )
        >>> print(np.exp(report.labels[0][0, :, 1]).round(2))
        [0.8 0.2]
    """
    reader = _reader(Path(source), spec, format, tokenizer)
    if shard_count(Path(path)) is not None:
        refuse_old(Path(path))
    sequences = None if dataset is None else _sequences(dataset)
    places = Places(reader, sequences, ids)
    padding = 0
    with at_once(TokenWriter(Path(path), spec)) as writer:
        for placed in places.batches(reader.read(), _BATCH):
            parts = [_tokens(one, spec, reader) for one in placed]
            tokens = Tokens(*map(np.concatenate, zip(*parts, strict=True)))
            padding += int((tokens.ids < 0).any(-1).sum())
            writer.append(_batch(placed), tokens, spec.vocabulary_size or 0)
        if not writer.stored:
            fail("source", "a file with at least one answer", str(source))
        writer.finish()
    labels = TokenLabels.open(path)
    return TokenImportReport(
        labels,
        padded=padding,
        failed=tuple(places.failed),
        duplicates=len(labels) - len(np.unique(labels.fingerprints)),
        unknown=tuple(reader.unknown.most_common()),
        unknown_mass=reader.unknown_mass / max(labels.num_tokens, 1),
        renormalised=reader.renormalised,
        **_compared(labels, sequences),
    )


def _reader(
    source: Path, spec: TokenLabelSpec, format: str, tokenizer: Any
) -> Lines | ParquetLists:
    check_spec(spec, TokenLabelSpec)
    if spec.vocabulary_size is None:
        fail("vocabulary_size", "given in the spec of an import", None)
    if spec.from_logits:
        fail("from_logits", "False: log-probabilities are imported", True)
    check_choice("format", format, ("distillkit", "openai", "vllm"))
    if (tokenizer is not None) != (format == "openai"):
        fail(
            "tokenizer", "given with format='openai', and only there", tokenizer
        )
    if format != "distillkit":
        vocabulary = None if tokenizer is None else Vocabulary(tokenizer)
        return Lines(source, spec.top_k, vocabulary)
    files = find_files(source)
    if files is None:
        fail("source", "Parquet files, for format='distillkit'", str(source))
    return ParquetLists(files)


def _sequences(dataset: Any) -> list[Any]:
    """The tokens of each sequence of a data set, without its padding."""
    found = []
    for _, x, _ in token_batches(as_token_dataset(dataset), None, 4096):
        ids, real = sequences_of(x)
        found += [row[mask] for row, mask in zip(ids, real, strict=True)]
    return found


def _tokens(
    placed: Placed, spec: TokenLabelSpec, reader: Lines | ParquetLists
) -> Tokens:
    """The likeliest of what is said of a sequence, checked."""
    fewer = (placed.ids >= 0).sum(-1) < spec.top_k
    if isinstance(reader, ParquetLists) and fewer.all() and len(fewer):
        count = placed.ids.shape[-1]
        fail("top_k", f"at most the {count} that the files have", spec.top_k)

    def refuse(row: int, problem: str) -> NoReturn:
        reader.fail(placed.where, f"{problem}, of token {placed.first + row}")

    return tokens_of_entries(placed.ids, placed.logs, spec, refuse)


def _batch(placed: list[Placed]) -> Batch:
    """Sequences side by side, and which of their tokens are said of."""
    sequences = sequences_of(padded([one.sequence for one in placed]))
    kept = np.zeros(sequences.real.shape, bool)
    for row, one in enumerate(placed):
        kept[row, one.first : one.first + len(one.ids)] = True
    return Batch(sequences, kept, token_fingerprints(sequences))


def _compared(
    labels: TokenLabels, sequences: list[Any] | None
) -> dict[str, Any]:
    if sequences is None:
        return {}
    rows = labels.rows_of(sequences)
    found = np.unique(labels.fingerprints[rows[rows >= 0]])
    # By sorting: the tables of NumPy 2.0 overflow on the largest uint64.
    known = np.isin(labels.fingerprints, found, kind="sort")
    return {
        "missing": tuple(np.flatnonzero(rows < 0).tolist()),
        "foreign": int((~known).sum()),
    }
