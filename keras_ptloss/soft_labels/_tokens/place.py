"""Which tokens of which sequence an answer is about."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from keras_ptloss._checks import fail
from keras_ptloss.soft_labels._names import shorten
from keras_ptloss.soft_labels._numbers import RowProblem
from keras_ptloss.soft_labels._tokens.answers import Answer, Lines
from keras_ptloss.soft_labels._tokens.distillkit import ParquetLists


class Placed(NamedTuple):
    """What is stored of one sequence.

    Attributes:
        where: Its line or row, for errors.
        sequence: Its ids, `(time,)`.
        first: Of which token the first entries say what follows.
        ids: `(n, entries)` of the tokens from there on.
        logs: Their log-probabilities.
    """

    where: str
    sequence: Any
    first: int
    ids: Any
    logs: Any


class Places:
    """Finds the sequence of each answer, and the place in it.

    Args:
        reader: Whose answers they are; raises errors.
        sequences: Those of the data set, in order; None without one.
        ids: Their names; None where the answers are in their order.
    """

    def __init__(
        self,
        reader: Lines | ParquetLists,
        sequences: list[Any] | None,
        ids: Any,
    ) -> None:
        self._reader, self._sequences = reader, sequences
        self._names: dict[str, int] | None = None
        self.failed: list[str] = []
        if ids is None:
            return
        if sequences is None:
            fail("ids", "None without `dataset`", ids)
        if isinstance(ids, str) or np.ndim(ids) != 1:
            fail("ids", "a sequence of ids, one a sequence", ids)
        self._names = {str(name): row for row, name in enumerate(ids)}
        if not len(self._names) == len(ids) == len(sequences):
            wanted = f"{len(sequences)} different ids, one a sequence"
            fail("ids", wanted, f"{len(ids)} ids")

    def batches(
        self, answers: Iterable[Answer], size: int
    ) -> Iterator[list[Placed]]:
        """Yield what is stored, `size` sequences at a time."""
        found = self._all(answers)
        while batch := list(itertools.islice(found, size)):
            yield batch

    def _all(self, answers: Iterable[Answer]) -> Iterator[Placed]:
        for number, answer in enumerate(answers):
            if answer.failure is not None:
                self.failed.append(answer.custom_id or answer.where)
                continue
            try:
                sequence = np.asarray(self._sequence(answer, number))
                first, part = self._place(answer, sequence)
            except RowProblem as problem:
                self._reader.fail(answer.where, str(problem))
            ids, logs = answer.ids[part:], answer.logs[part:]
            yield Placed(answer.where, sequence, first, ids, logs)

    def _sequence(self, answer: Answer, number: int) -> Any:
        if answer.sequence is not None:
            return answer.sequence
        if self._sequences is None:
            raise RowProblem(
                "has no `prompt_token_ids`: pass the sequences as `dataset`"
            )
        if self._names is not None:
            name = answer.custom_id or ""
            if name not in self._names:
                raise RowProblem(
                    f"has the custom_id {answer.custom_id!r}, which is not"
                    f" among the `ids` {shorten(self._names)}"
                )
            return self._sequences[self._names[name]]
        if answer.custom_id is not None:
            fail(
                "ids",
                "given, the custom_id of each sequence: the lines have such"
                f" names ({answer.custom_id!r} on {answer.where}), so they may"
                " be in any order",
                None,
            )
        if number >= len(self._sequences):
            raise RowProblem(
                f"is one more than the {len(self._sequences)} sequences of"
                " `dataset`"
            )
        return self._sequences[number]

    def _place(self, answer: Answer, sequence: Any) -> tuple[int, int]:
        """Of which token the entries are, and which are left out before."""
        if answer.kind == "answer":
            start = self._find(answer, sequence)
            return max(start - 1, 0), int(start == 0)
        count = len(answer.ids)
        if answer.kind == "prompt":
            if count != len(sequence) - 1:
                raise RowProblem(
                    f"has {count + 1} tokens where its sequence has"
                    f" {len(sequence)}"
                )
            found = (answer.ids == sequence[1:, None]).any(-1)
            if not found.all():
                place = int(np.argmin(found)) + 1
                raise RowProblem(
                    f"has no log-probability of the token {sequence[place]},"
                    f" which stands at position {place} of its sequence: it is"
                    " of another text, or another tokenizer"
                )
        return 0, 0

    def _find(self, answer: Answer, sequence: Any) -> int:
        """Where the answer begins, as near to the sequence's end as may be.

        Tokens that the tokenizer does not know may be any.
        """
        said = np.array([-1 if one is None else one for one in answer.said])
        for start in range(len(sequence) - len(said), -1, -1):
            part = sequence[start : start + len(said)]
            if ((part == said) | (said < 0)).all():
                return start
        raise RowProblem(
            f"says {len(said)} tokens, {np.array2string(said, threshold=8)},"
            " which do not occur in its sequence: it is of another text, or"
            " another tokenizer"
        )
