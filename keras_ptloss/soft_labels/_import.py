"""Import of teacher outputs that others have written to files.

What an API or an annotation tool gives is seldom a full row: a language model
returns the log-probabilities of its likeliest tokens only. Such rows are
repaired, and a report tells how many.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from keras_ptloss._checks import check_choice, fail
from keras_ptloss.soft_labels import _data as data
from keras_ptloss.soft_labels._import_parquet import import_parquet
from keras_ptloss.soft_labels._journal import at_once, refuse_old
from keras_ptloss.soft_labels._names import KEYS, repeated, shorten
from keras_ptloss.soft_labels._numbers import ROUNDING
from keras_ptloss.soft_labels._parquet_table import find_files
from keras_ptloss.soft_labels._readers import Reader, Row
from keras_ptloss.soft_labels._report import ImportReport
from keras_ptloss.soft_labels._soft_labels import SoftLabels
from keras_ptloss.soft_labels._spec import SoftLabelSpec, check_spec
from keras_ptloss.soft_labels._store import shard_count
from keras_ptloss.soft_labels._writer import ShardWriter, with_num_examples

_BATCH = 4096


def import_soft_labels(
    source: str | os.PathLike[str],
    dataset: Any,
    path: str | os.PathLike[str],
    *,
    spec: SoftLabelSpec | None = None,
    values: str = "probabilities",
    empty_rows: str = "error",
    ids: Sequence[str | int] | None = None,
) -> ImportReport:
    r"""Make a store from a file of teacher outputs, one row an example.

    A `.jsonl` file has one of these on each line, and may mix them:

    * a list of numbers, or an object from class name to number (null is
      missing; texts and what else is beside the classes is ignored);
    * what the API of a language model returned: a chat completion, a
      completion or a response of OpenAI's form, its `choices[0]`, `logprobs`
      or `content`, or vLLM's dictionary from token id to `Logprob`. Of several
      tokens, the first that names a class is the answer;
    * the alternatives to one token,
      `[{"token": "yes", "logprob": -0.1}, ...]`, bare or as `"top_logprobs"`;
    * a line of a batch job's output, `{"custom_id": ..., "response": ...}`.

    Columns, keys and tokens name classes alike: letter case, spaces at the
    ends and tokenizers' marks do not matter, unless two classes differ in them
    only. Tokens of one class add up; two columns or keys of one are an error.

    A missing class gets an even share of the probability that its row leaves
    over; in a list of the likeliest tokens at most the smallest one listed,
    since the list would hold a larger one. Then rows are divided by their sum,
    which must be below 1.5.
    One number a row is a binary head, the probability of the second class.
    The whole table is read into memory, as float32.

    Rows of Parquet files are found by a column `fingerprint`, of
    `soft_labels.fingerprint`, or with `ids` by a column `id` (or `custom_id`),
    never by position. They have lists `probabilities`, `log_probabilities` or
    `logits`, or `top_ids` and `top_log_probabilities`, with or without
    `log_tail`. Rows of one example that are equal count once; if they differ
    it is an error. Rows of no example are left out. The report tells both.

    Args:
        source: A `.jsonl` file as above; a `.csv` file whose header names the
            classes (empty cells are missing, other columns ignored); a
            `.npy` file of floats `(N, C)` (NaN is missing); or a `.parquet`
            file, a pattern (`"part-*.parquet"`) or a directory of them.
        dataset: The examples that the rows belong to, in their order; as in
            `SoftLabels.write`.
        path: Directory of the store, which must not hold one yet.
        spec: As in `SoftLabels.write`. `class_names` are needed for JSON
            objects and tokens; a CSV file's columns serve if there are none.
            Of Parquet as in `SoftLabels.open`.
        values: `"probabilities"` or `"log_probabilities"` (natural), what the
            numbers are. Those of tokens are always the latter; of Parquet a
            column's name says it, and this must be left out.
        empty_rows: `"error"`, or `"uniform"` to give equal probabilities to
            rows in which no class occurs, to requests that failed, and to
            examples that Parquet files lack.
        ids: The name of each example, in the order of `dataset`. Needed where
            the rows have a key or column `custom_id`, else `id` (not that of
            an API's answer), else `fingerprint` (give `fingerprint(batch)`),
            unless that is a class, since they may then be in any order. Each
            must occur exactly once, but for Parquet, of which see above.

    Returns:
        An `ImportReport` with the opened store.

    Raises:
        ValueError: If a line cannot be read, a number is no probability, a
            row is empty, a request failed, the numbers of rows and examples
            differ, or ids are missing, repeated or unknown; the message names
            the line or the ids.

    Example:
        >>> import tempfile
        >>> from keras_ptloss.soft_labels import (
        ...     SoftLabelSpec,
        ...     import_soft_labels,
        ... )
        >>> folder = tempfile.mkdtemp()
        >>> with open(folder + "/llm.jsonl", "w") as file:
        ...     _ = file.write('[{"token": " Yes", "logprob": -0.2231}]\n')
        >>> report = import_soft_labels(
        ...     folder + "/llm.jsonl",
        ...     ["Is water wet?"],
        ...     folder + "/llm.softlabels",
        ...     spec=SoftLabelSpec(class_names=("yes", "no")),
        ... )
        >>> print(report.labels[0].round(2))
        [0.8 0.2]
    """
    check_choice("values", values, ("probabilities", "log_probabilities"))
    check_choice("empty_rows", empty_rows, ("error", "uniform"))
    if spec is not None:
        check_spec(spec, SoftLabelSpec)
    if shard_count(Path(path)) is not None:
        refuse_old(Path(path))
    files = find_files(source)
    if files is not None:
        if values != "probabilities":
            fail("values", "left out for Parquet: a column says it", values)
        return import_parquet(
            files,
            data.as_dataset(dataset),
            Path(path),
            spec=spec,
            uniform=empty_rows == "uniform",
            ids=_checked_ids(ids),
        )
    spec = spec or SoftLabelSpec()
    if spec.from_logits:
        fail("from_logits", "False: probabilities are imported", True)
    reader = Reader(
        Path(source), spec.class_names, log=values == "log_probabilities"
    )
    rows = _ordered(reader, _checked_ids(ids))
    if not rows:
        fail("source", "a file with at least one row", str(source))
    failed = [row for row in rows if row.failure is not None]
    if failed and (empty_rows == "error" or len(failed) == len(rows)):
        _refuse_failed(failed, str(source))
    table, filled, renormalised, empty = _repair(rows, reader.names)
    if empty_rows == "error" and empty.any():
        _refuse_empty(reader, rows[int(np.argmax(empty))])
    dataset = data.as_dataset(dataset)
    spec = dataclasses.replace(spec, class_names=reader.names)
    spec = _with_count(spec, dataset, len(table), str(source), ids)
    with at_once(ShardWriter(Path(path), spec, (0, 1))) as writer:
        for first, _, hashes in writer.missing(dataset, _BATCH):
            block = table[first : first + len(hashes)]
            writer.append(hashes, block.astype("float64"))
        writer.finish()
    return ImportReport(
        labels=SoftLabels.open(path),
        filled=filled,
        renormalised=renormalised,
        empty=empty,
        other=np.array([row.other for row in rows]),
        ignored=tuple(sorted(reader.ignored)),
        failed=tuple(row.custom_id or row.where for row in failed),
    )


def _with_count(
    spec: SoftLabelSpec, dataset: Any, rows: int, source: str, ids: Any
) -> SoftLabelSpec:
    """Complete the spec by the number of examples, which is that of rows."""
    if data.is_streamed(dataset) and spec.num_examples is None:
        return dataclasses.replace(spec, num_examples=rows)
    spec = with_num_examples(spec, dataset)
    count = spec.num_examples
    if count != rows and ids is not None:
        fail("ids", f"{count} ids, one an example", f"{rows} ids")
    if count != rows:
        wanted = f"a file of {count} rows, one an example"
        fail("source", wanted, f"{source}, {rows} rows")
    return spec


def _checked_ids(ids: Any) -> list[str] | None:
    if ids is None:
        return None
    if isinstance(ids, str) or np.ndim(ids) != 1:
        fail("ids", "a sequence of ids, one an example", ids)
    # APIs give texts back, whatever the request had.
    found = [str(name) for name in ids]
    if twice := repeated(found):
        wanted = f"different: {shorten(twice)} stands twice"
        fail("ids", wanted, f"{len(found)} ids")
    return found


def _ordered(reader: Reader, ids: list[str] | None) -> list[Row]:
    """Read the rows in the order of the data set."""
    rows = list(reader.read())
    named = [row for row in rows if row.custom_id]
    if ids is None:
        if named:
            fail(
                "ids",
                "given, the custom_id, id or fingerprint (that of"
                f" `soft_labels.fingerprint`) of each example: {reader.source}"
                f" has such names ({named[0].custom_id!r} on"
                f" {named[0].where}), so its rows may be in any order",
                None,
            )
        return rows
    by_id = {row.custom_id: row for row in named}
    for row in rows:
        if not row.custom_id:
            problem = f"has no {' or '.join(KEYS)}, and `ids` are given"
            reader.fail(row.where, problem)
        if by_id[row.custom_id] is not row:
            where = f"{row.where} and {by_id[row.custom_id].where}"
            reader.fail(where, f"have the id {row.custom_id!r} both")
    wanted = set(ids)
    missing = [name for name in ids if name not in by_id]
    foreign = [str(name) for name in by_id if name not in wanted]
    found = []
    if missing:
        found.append(
            f"no row of {shorten(missing)} (requests that failed may be in an"
            " error file of the batch job: append it)"
        )
    if foreign:
        found.append(f"rows of {shorten(foreign)}, which are not among them")
    if found:
        raise ValueError(
            f"`ids` must be those of the rows. Received: {reader.source}, which"
            f" has {' and '.join(found)}"
        )
    return [by_id[name] for name in ids]


def _refuse_failed(failed: list[Row], source: str) -> NoReturn:
    names = shorten(row.custom_id or row.where for row in failed)
    raise ValueError(
        "`source` must hold an answer an example, unless"
        f' empty_rows="uniform". Received: {source}, with {len(failed)} failed'
        f" of its requests: {names} (the first: {failed[0].failure})"
    )


def _refuse_empty(reader: Reader, row: Row) -> None:
    has = f", it has {shorten(row.found)}" if row.found else ""
    wanted = f"; the classes are {shorten(reader.names or ())}"
    reader.fail(
        row.where,
        f"tells nothing of any class{has}{wanted if reader.names else ''}",
    )


def _repair(
    rows: list[Row], names: tuple[str, ...] | None
) -> tuple[Any, Any, Any, Any]:
    """Fill and renormalise rows; also say which were, and which are empty."""
    widths = [len(row.values) for row in rows if row.values is not None]
    failed = np.full(len(names) if names else widths[0], np.nan)
    table = np.stack(
        [failed if row.values is None else row.values for row in rows]
    ).astype("float32")
    other = np.array([row.other for row in rows])
    most = np.array([row.most for row in rows])
    missing = np.isnan(table)
    known = np.where(missing, 0, table)
    rest = np.maximum(1 - known.sum(-1, dtype="float64") - other, 0)
    share = np.minimum(rest / np.maximum(missing.sum(-1), 1), most)
    full = np.where(missing, share[:, None], known)
    sums = full.sum(-1, dtype="float64")
    empty = missing.all(-1) | (sums == 0)
    renormalised = ~empty & (np.abs(sums - 1) > ROUNDING)
    full[empty], sums[empty] = 1, table.shape[1]
    filled = missing.any(-1) & ~empty
    return full / sums[:, None], filled, renormalised, empty
