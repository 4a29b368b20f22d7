"""Files of teacher outputs, read row by row: CSV, JSON lines, `.npy`."""

import csv
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keras_ptloss._binary import two_events
from keras_ptloss._checks import SUM_TOLERANCE, fail
from keras_ptloss.soft_labels._names import (
    KEYS,
    ClassNames,
    key_of,
    repeated,
    shorten,
)
from keras_ptloss.soft_labels._numbers import (
    RowProblem,
    number,
    parse,
    probabilities,
    probability,
)
from keras_ptloss.soft_labels._responses import (
    Position,
    positions,
    unpack_batch,
)

# Judges that write their numbers out are off by less; a label or the confidence
# in one of two classes, taken for a third, adds half or more.
_TOO_MUCH = 1.5


@dataclasses.dataclass(frozen=True)
class Row:
    """What the file says of one example.

    Args:
        values: `(C,)` probabilities, NaN where missing; None if it failed.
        other: Probability of what is no class.
        most: The most that a missing class can have.
        found: The tokens or keys that the row has, for errors.
        custom_id: The example's name.
        failure: Why there is no answer.
        where: Line or row.
    """

    values: Any
    other: float = 0.0
    most: float = 1.0
    found: tuple[str, ...] = ()
    custom_id: str | None = None
    failure: str | None = None
    where: str = ""


class Reader:
    """Reads a file and keeps what is said in errors.

    Args:
        source: The file.
        names: The classes; None to take those of a CSV file's header.
        log: Whether the numbers are log-probabilities.

    Attributes:
        names: The classes, as far as known.
        ignored: Columns, keys and tokens that are no class.
    """

    def __init__(
        self, source: Path, names: tuple[str, ...] | None, *, log: bool
    ) -> None:
        self.source, self.names = source, names
        self.ignored: set[str] = set()
        self._log = log
        self._classes = ClassNames(names or ())
        self._nested = self._classes.nested()
        self._keys = tuple(k for k in KEYS if self._classes.find(k) is None)
        self._where = ""

    def fail(self, where: str, problem: str) -> Any:
        """Raise the error for a row."""
        raise ValueError(
            "`source` must hold one distribution over the classes a row."
            f" Received: {where} of {self.source} {problem}"
        )

    def read(self) -> Iterator[Row]:
        """Yield the rows in the order of the file."""
        kind = self.source.suffix
        read = {".csv": self._csv, ".jsonl": self._jsonl, ".npy": self._npy}
        if kind not in read:
            wanted = "a file .csv, .jsonl, .npy or .parquet, or a directory of"
            fail("source", f"{wanted} .parquet files", str(self.source))
        width = None
        try:
            for row in read[kind]():
                if row.values is not None:
                    width = width or self._width(len(row.values))
                    row = self._complete(row, width)
                yield dataclasses.replace(row, where=self._where)
        except RowProblem as problem:
            self.fail(self._where, str(problem))
        except UnicodeDecodeError as error:
            fail("source", f"text in UTF-8 ({error})", str(self.source))

    def _width(self, found: int) -> int:
        """How many numbers a row must have: one stands for two classes."""
        wanted = len(self.names) if self.names else found
        return 1 if found == 1 and wanted <= 2 else wanted

    def _complete(self, row: Row, width: int) -> Row:
        if len(row.values) != width:
            raise RowProblem(f"has {len(row.values)} classes, not {width}")
        # One number is a binary head; what rounding adds to 1 goes.
        values = row.values
        total = np.nansum(values)
        if total >= _TOO_MUCH:
            raise RowProblem(
                f"has probabilities that add up to {total:.6g} (is there a"
                " column that is no class? `class_names` tell the classes)"
            )
        if width == 1:
            values = two_events(np.minimum(values, 1), from_logits=False)
        return dataclasses.replace(row, values=values)

    def _npy(self) -> Iterator[Row]:
        try:
            # Reads arrays of numbers only: no pickle, which could run code.
            table = np.lib.format.open_memmap(self.source, mode="r")
        except OSError:
            raise
        except Exception as error:
            # A damaged header makes NumPy raise what its parser raises.
            fail("source", f"a readable .npy file ({error})", str(self.source))
        if table.ndim != 2 or table.dtype.kind != "f":
            fail(
                "source",
                "an array of floats of shape (N, C)",
                f"{table.dtype}{table.shape}",
            )
        for index, row in enumerate(table):
            self._where = f"row {index}"
            yield Row(probabilities(np.array(row), log=self._log))

    def _csv(self) -> Iterator[Row]:
        with self.source.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            try:
                header = next(lines, [])
                columns = self._columns(header)
                for cells in lines:
                    self._where = f"line {lines.line_num}"
                    if len(cells) != len(header):
                        raise RowProblem(
                            f"has {len(cells)} of {len(header)} cells"
                        )
                    yield self._cells(cells, columns)
            except csv.Error as error:
                self.fail(f"line {lines.line_num}", f"is no CSV ({error})")

    def _columns(self, header: list[str]) -> dict[int | str, int]:
        """Find the column of each class, and of the ids."""
        if twice := repeated(header):
            fail(
                "source",
                f"a table whose columns differ: {shorten(twice)} stands twice",
                header,
            )
        named = [key_of(name) for name in header]
        if self.names is None:
            self.names = tuple(
                name.strip()
                for name, key in zip(header, named, strict=True)
                if key not in self._keys
            )
            self._classes = ClassNames(self.names)
            if not all(self.names):
                fail(
                    "class_names",
                    f"given: a column of {self.source} has no name",
                    None,
                )
        ids = [named.index(key) for key in self._keys if key in named]
        columns: dict[int | str, int] = {"id": ids[0]} if ids else {}
        for column, name in enumerate(header):
            if named[column] in self._keys:
                continue
            key = self._find(name)
            if key in columns:
                fail(
                    "source",
                    f"a table with one column a class: {header[columns[key]]!r}"
                    f" and {name!r} are one class",
                    header,
                )
            if key is not None:
                columns[key] = column
        if not columns.keys() - {"id"}:
            wanted = f"a table of {self.names}"
            if not self.names:
                wanted = "a table whose first line names the classes"
            fail("source", wanted, f"{self.source}, with {header}")
        return columns

    def _cells(self, cells: list[str], columns: dict[int | str, int]) -> Row:
        values = np.full(len(self._known_names()), np.nan)
        for key, column in columns.items():
            if isinstance(key, int):
                values[key] = parse(cells[column])
        name = cells[columns["id"]] if "id" in columns else None
        values = probabilities(values, log=self._log)
        return Row(values, custom_id=name)

    def _jsonl(self) -> Iterator[Row]:
        with self.source.open(encoding="utf-8-sig") as file:
            for index, line in enumerate(file, 1):
                if line.strip():
                    self._where = f"line {index}"
                    yield self._record(line)

    def _record(self, line: str) -> Row:
        try:
            record = json.loads(line, object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError):
            raise RowProblem("is no JSON") from None
        if not isinstance(record, (dict, list)):
            raise RowProblem("is no list or object")
        custom_id, record, failure = unpack_batch(record, self._keys)
        if failure is not None:
            return Row(None, custom_id=custom_id, failure=failure)
        answer = positions(record)
        if answer is not None:
            row = self._answer(answer)
        elif isinstance(record, dict):
            row = self._named(record)
        else:
            numbers = [_or_missing(item) for item in record]
            row = Row(probabilities(numbers, log=self._log))
        return dataclasses.replace(row, custom_id=custom_id)

    def _named(self, record: dict[str, Any]) -> Row:
        """Read an object from class name to number."""
        values = np.full(len(self._known_names()), np.nan)
        keys: dict[int, str] = {}
        other = 0.0
        for key, value in record.items():
            index = self._find(key)
            if index is not None:
                if index in keys:
                    raise RowProblem(
                        f"has {keys[index]!r} and {key!r}, which are one class"
                        " (tokens of one class add up in `top_logprobs`)"
                    )
                keys[index], values[index] = key, _or_missing(value)
            elif self._log and type(value) in (int, float):
                # Log-probabilities of tokens; texts are notes of the row.
                other += probability(number(value))
        values = probabilities(values, log=self._log)
        return Row(values, other, found=tuple(record))

    def _answer(self, answer: list[Position]) -> Row:
        """Read the position at which the answer names a class."""
        values = np.full(len(self._known_names()), np.nan)
        if not answer:
            return Row(values)
        position = self._decisive(answer)
        tokens, other = position.tokens(), 0.0
        for token, share in tokens:
            index = self._find(token)
            if index is None:
                other += share
            elif np.isnan(values[index]):
                values[index] = share
            else:
                # " yes" and "Yes" are two tokens of one class.
                values[index] += share
        total = np.nansum(values) + other
        if total > 1 + SUM_TOLERANCE:
            raise RowProblem(
                f"has tokens whose probabilities add up to {total:.6g}: they"
                " are no alternatives of one another"
            )
        most = min([1.0, *(share for _, share in position.listed)])
        return Row(values, other, most, found=tuple(dict(tokens)))

    def _decisive(self, answer: list[Position]) -> Position:
        # The model may begin with a space or a quotation mark, and end with a
        # full stop; an answer of one token may name no class at all.
        find = self._classes.find
        for index, position in enumerate(answer):
            if position.token and find(position.token) is not None:
                if self._nested:
                    self._check_whole(answer, index)
                return position
        possible = (
            p for p in answer if any(find(t) is not None for t, _ in p.listed)
        )
        return next(possible, answer[0])

    def _check_whole(self, answer: list[Position], index: int) -> None:
        """Refuse "toxic" where the answer is "non", "-", "toxic"."""
        tokens = [position.token or "" for position in answer]
        found = self._classes.find(tokens[index])
        # More tokens than that make no name of a class.
        for start in range(max(index - 8, 0), index + 1):
            for stop in range(index + 1, min(index + 9, len(tokens)) + 1):
                text = "".join(tokens[start:stop])
                if self._classes.find(text) not in (None, found):
                    raise RowProblem(
                        f"answers {text!r}, a class of several tokens, whose"
                        " probability no token has (ask for one letter a class)"
                    )

    def _find(self, name: str) -> int | None:
        index = self._classes.find(name)
        if index is None:
            self.ignored.add(name)
        return index

    def _known_names(self) -> tuple[str, ...]:
        if self.names is None:
            fail(
                "class_names",
                "given, as spec=SoftLabelSpec(class_names=...), to read"
                " records that name their classes",
                None,
            )
        return self.names


def _or_missing(value: Any) -> float:
    return float("nan") if value is None else number(value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        twice = repeated(key for key, _ in pairs)
        raise RowProblem(f"has {shorten(twice)} twice")
    return record
