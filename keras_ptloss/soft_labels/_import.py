"""Import of teacher outputs that others have written to CSV, JSONL or `.npy`.

What an API or an annotation tool gives is seldom a full row: a language model
returns the log-probabilities of its likeliest tokens only. Such rows are
repaired, and a report tells how many.
"""

import csv
import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keras_ptloss._checks import check_choice, fail
from keras_ptloss.soft_labels import _data as data
from keras_ptloss.soft_labels import _store as store
from keras_ptloss.soft_labels._soft_labels import SoftLabels
from keras_ptloss.soft_labels._spec import SoftLabelSpec
from keras_ptloss.soft_labels._writer import ShardWriter, with_num_examples

# Decimals cut by the exporting tool change a sum by less than this.
_ROUNDING = 1e-3
_BATCH = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class ImportReport:
    r"""The imported store, and what was done to each row.

    Args:
        labels: The store, opened.
        filled: `(N,)` bool, whether classes were missing and filled.
        renormalised: `(N,)` bool, whether the row, filled if need be, did not
            add up to 1 within 0.001 and was divided by its sum.
        empty: `(N,)` bool, whether the row told nothing of any class and
            became uniform (`empty_rows="uniform"` only).
        ignored: Columns, keys or tokens that are no class, sorted.

    Example:
        >>> import tempfile
        >>> from keras_ptloss.soft_labels import (
        >>>     SoftLabelSpec,
        >>>     import_soft_labels,
        >>> )
        >>> folder = tempfile.mkdtemp()
        >>> with open(folder + "/api.jsonl", "w") as file:
        ...     _ = file.write('{"no": 0.75, "yes": 0.25}\n{"no": 0.9}\n')
        >>> report = import_soft_labels(
        ...     folder + "/api.jsonl",
        ...     ["a bore", "a flop"],
        ...     folder + "/api.softlabels",
        ...     spec=SoftLabelSpec(class_names=("no", "yes"), dtype="float32"),
        ... )
        >>> report.num_repaired
        1
        >>> print(report.labels[:].round(2))
        [[0.75 0.25]
         [0.9  0.1 ]]
    """

    labels: SoftLabels
    filled: Any
    renormalised: Any
    empty: Any
    ignored: tuple[str, ...]

    @property
    def num_repaired(self) -> int:
        """How many rows are not as they were in the file."""
        repaired = self.filled | self.renormalised | self.empty
        return int(np.count_nonzero(repaired))


@dataclasses.dataclass(frozen=True)
class _Row:
    """Probabilities as read: NaN for missing classes."""

    values: Any
    # Probability of what is no class, and the most a missing class can have.
    other: float = 0.0
    most: float = 1.0


def import_soft_labels(
    source: str | os.PathLike[str],
    dataset: Any,
    path: str | os.PathLike[str],
    *,
    spec: SoftLabelSpec | None = None,
    values: str = "probabilities",
    empty_rows: str = "error",
) -> ImportReport:
    r"""Make a store from a file of teacher outputs, one row an example.

    A missing class gets an even share of the probability that its row leaves
    over; in a list of the likeliest tokens at most the smallest one listed,
    since the list would hold a larger one. Then rows are divided by their sum.
    The whole table is read into memory, as float32.

    Args:
        source: A `.csv` file whose header names the classes (empty cells are
            missing); a `.jsonl` file whose lines are a list of numbers, an
            object from class name to number, or top log-probabilities
            `[{"token": "yes", "logprob": -0.1}, ...]`, bare or under the key
            `"top_logprobs"`, where a token counts for the class of its name,
            spaces and letter case aside; or a `.npy` file `(N, C)` (NaN is
            missing).
        dataset: The examples that the rows belong to, in their order; as in
            `SoftLabels.write`.
        path: Directory of the store, which must not hold one yet.
        spec: As in `SoftLabels.write`. `class_names` are needed for JSON
            objects; a CSV file's columns serve if there are none.
        values: `"probabilities"` or `"log_probabilities"` (natural), what the
            numbers are. Top log-probabilities are always the latter.
        empty_rows: `"error"`, or `"uniform"` to give rows in which no class
            occurs equal probabilities.

    Returns:
        An `ImportReport` with the opened store.

    Raises:
        ValueError: If a line cannot be read, a number is no probability, a
            row is empty, or the numbers of rows and examples differ; the
            message names the line.

    Example:
        >>> import tempfile
        >>> from keras_ptloss.soft_labels import (
        >>>     SoftLabelSpec,
        >>>     import_soft_labels,
        >>> )
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
    if store.shard_count(Path(path)) is not None:
        # A corrected file must not silently keep the rows of the first one.
        fail("path", "a new directory: imports do not resume", str(path))
    spec = spec or SoftLabelSpec()
    if spec.from_logits:
        fail("from_logits", "False: probabilities are imported", True)
    reader = _Reader(Path(source), spec.class_names, values)
    rows = list(reader.read())
    if not rows:
        fail("source", "a file with at least one row", str(source))
    table = np.stack([row.values for row in rows]).astype("float32")
    other = np.array([row.other for row in rows])
    most = np.array([row.most for row in rows])
    table, filled, renormalised, empty = _repair(table, other, most)
    if empty_rows == "error" and empty.any():
        reader.fail(int(np.argmax(empty)), "tells nothing of any class")
    dataset = data.as_dataset(dataset)
    spec = dataclasses.replace(spec, class_names=reader.names)
    if data.is_streamed(dataset) and spec.num_examples is None:
        spec = dataclasses.replace(spec, num_examples=len(table))
    spec = with_num_examples(spec, dataset)
    if spec.num_examples != len(table):
        fail(
            "source",
            f"a file of {spec.num_examples} rows, one an example",
            f"{source}, {len(table)} rows",
        )
    with ShardWriter(Path(path), spec, (0, 1)) as writer:
        for first, _, hashes in writer.missing(dataset, _BATCH):
            block = table[first : first + len(hashes)]
            writer.append(hashes, block.astype("float64"))
        writer.finish()
    return ImportReport(
        labels=SoftLabels.open(path),
        filled=filled,
        renormalised=renormalised,
        empty=empty,
        ignored=tuple(sorted(reader.ignored)),
    )


def _repair(table: Any, other: Any, most: Any) -> tuple[Any, Any, Any, Any]:
    """Fill and renormalise rows; also say which were filled, which not."""
    missing = np.isnan(table)
    known = np.where(missing, 0, table)
    rest = np.maximum(1 - known.sum(-1, dtype="float64") - other, 0)
    share = np.minimum(rest / np.maximum(missing.sum(-1), 1), most)
    rows = np.where(missing, share[:, None], known)
    sums = rows.sum(-1, dtype="float64")
    empty = missing.all(-1) | (sums == 0)
    renormalised = ~empty & (np.abs(sums - 1) > _ROUNDING)
    rows[empty], sums[empty] = 1, table.shape[1]
    filled = missing.any(-1) & ~empty
    return rows / sums[:, None], filled, renormalised, empty


class _Reader:
    """Reads a file row by row and keeps what is said in errors."""

    def __init__(
        self, source: Path, names: tuple[str, ...] | None, values: str
    ) -> None:
        self.source, self.names = source, names
        self.ignored: set[str] = set()
        self._log = values == "log_probabilities"
        self._folded: dict[str, int] = {}
        for index, name in enumerate(names or ()):
            self._folded.setdefault(_fold(name), index)
        # Line of each row, for errors; `.npy` has rows only.
        self._lines: list[int] = []

    def fail(self, row: int, problem: str) -> Any:
        """Raise the error for a row."""
        where = (
            f"line {self._lines[row]}" if self._lines else f"row {row}"
        ) + f" of {self.source}"
        raise ValueError(
            "`source` must hold one distribution over the classes a row."
            f" Received: {where} {problem}"
        )

    def read(self) -> Iterator[_Row]:
        kind = self.source.suffix
        check_choice("source", kind, (".csv", ".jsonl", ".npy"))
        rows = {".csv": self._csv, ".jsonl": self._jsonl, ".npy": self._npy}
        width = len(self.names) if self.names else None
        for number, row in enumerate(rows[kind]()):
            width = width or len(row.values)
            if len(row.values) != width:
                self.fail(number, f"has {len(row.values)} classes, not {width}")
            # NaN, for a missing class, passes.
            wrong = (row.values < 0) | (row.values > 1 + _ROUNDING)
            if wrong.any():
                bad = row.values[np.argmax(wrong)]
                self.fail(number, f"has a probability of {bad:.6g}")
            yield row

    def _npy(self) -> Iterator[_Row]:
        table = np.load(self.source, mmap_mode="r", allow_pickle=False)
        if table.ndim != 2 or table.dtype.kind != "f":
            fail(
                "source",
                "an array of floats of shape (N, C)",
                f"{table.dtype}{table.shape}",
            )
        for row in table:
            yield _Row(self._linear(np.array(row, "float64")))

    def _csv(self) -> Iterator[_Row]:
        with self.source.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            header = next(lines, [])
            self.names = self.names or tuple(header)
            self.ignored = set(header) - set(self.names)
            if set(self.names).isdisjoint(header):
                fail("source", f"a table of {self.names}", header)
            for cells in lines:
                self._lines.append(lines.line_num)
                if len(cells) != len(header):
                    self._fail_here(f"has {len(cells)} of {len(header)} cells")
                cell = dict(zip(header, cells, strict=True))
                row = [self._number(cell.get(name)) for name in self.names]
                yield _Row(self._linear(np.array(row)))

    def _jsonl(self) -> Iterator[_Row]:
        with self.source.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                self._lines.append(number)
                try:
                    record = json.loads(line)
                except ValueError:
                    self._fail_here("is no JSON")
                if isinstance(record, dict) and "top_logprobs" in record:
                    record = record["top_logprobs"]
                if isinstance(record, dict):
                    yield self._named(record)
                elif not isinstance(record, list):
                    self._fail_here("is no list or object")
                elif any(isinstance(item, dict) for item in record):
                    yield self._tokens(record)
                else:
                    row = [self._number(item) for item in record]
                    yield _Row(self._linear(np.array(row, "float64")))

    def _named(self, record: dict[str, Any]) -> _Row:
        names = self._known_names()
        self.ignored |= set(record) - set(names)
        row = [self._number(record.get(name)) for name in names]
        return _Row(self._linear(np.array(row)))

    def _tokens(self, record: list[Any]) -> _Row:
        row = np.full(len(self._known_names()), np.nan)
        other, smallest = 0.0, 1.0
        for item in record:
            if not isinstance(item, dict) or not {"token", "logprob"} <= set(
                item
            ):
                self._fail_here(f'has no "token" and "logprob" in {item}')
            number = self._number(item["logprob"])
            if math.isnan(number):
                self._fail_here(f"has no log-probability in {item}")
            probability = math.exp(min(number, 1.0))
            smallest = min(smallest, probability)
            index = self._folded.get(_fold(str(item["token"])))
            if index is None:
                other += probability
                self.ignored.add(str(item["token"]))
            else:
                # " yes" and "Yes" are two tokens of one class.
                row[index] = np.nansum([row[index], probability])
        return _Row(row, other, smallest)

    def _known_names(self) -> tuple[str, ...]:
        if self.names is None:
            fail(
                "class_names",
                "given, as spec=SoftLabelSpec(class_names=...), to read"
                " records that name their classes",
                None,
            )
        return self.names

    def _number(self, cell: Any) -> float:
        if cell is None or cell == "":
            return math.nan
        try:
            return float(cell)
        except (TypeError, ValueError):
            return float(self._fail_here(f"has {cell!r}, not a number"))

    def _linear(self, row: Any) -> Any:
        return np.exp(np.minimum(row, 1.0)) if self._log else row

    def _fail_here(self, problem: str) -> Any:
        self.fail(len(self._lines) - 1, problem)


def _fold(name: str) -> str:
    return name.strip().casefold()
