"""What language models' servers say of tokens, line by line of a file."""

import collections
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from keras_ptloss.soft_labels._numbers import RowProblem, number
from keras_ptloss.soft_labels._responses import unpack_batch
from keras_ptloss.soft_labels._tokens.spec import PADDING
from keras_ptloss.soft_labels._tokens.vocabulary import Vocabulary


@dataclasses.dataclass
class Answer:
    """What is said of one sequence.

    Args:
        where: Its line or row.
        custom_id: The sequence's name; None if it has none.
        failure: Why there is nothing; None if there is.
        sequence: The sequence's ids; None if the answer does not tell.
        kind: `"prompt"`, of all tokens but the first, their own among the
            entries; `"answer"`, of the tokens `said`; or `"lists"`, of what
            follows each token.
        said: Ids of an answer's tokens; None where unknown.
        ids: `(positions, entries)` ids, `PADDING` where there are fewer.
        logs: Their log-probabilities.
    """

    where: str
    custom_id: str | None = None
    failure: str | None = None
    sequence: Any = None
    kind: str = "lists"
    said: tuple[int | None, ...] = ()
    ids: Any = None
    logs: Any = None


class Lines:
    """Reads a `.jsonl` file of answers.

    Args:
        source: The file.
        k: How many tokens a position must have.
        vocabulary: Finds ids of texts; None for vLLM's, which has ids.
    """

    def __init__(
        self, source: Path, k: int, vocabulary: Vocabulary | None
    ) -> None:
        self.source, self._k, self._vocabulary = source, k, vocabulary
        self.unknown: collections.Counter[str] = collections.Counter()
        self.unknown_mass, self.renormalised = 0.0, 0

    def fail(self, where: str, problem: str) -> NoReturn:
        """Raise the error for a line."""
        raise ValueError(
            "`source` must hold log-probabilities of one sequence a line."
            f" Received: {where} of {self.source} {problem}"
        )

    def read(self) -> Iterator[Answer]:
        """Yield the answers in the order of the file."""
        parse = self._vllm if self._vocabulary is None else self._openai
        with self.source.open("rb") as file:
            for count, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"line {count}"
                try:
                    record = json.loads(line.decode("utf-8"))
                    name, record, failure = unpack_batch(record)
                    answer = Answer(where, name, failure)
                    if failure is None:
                        parse(record, answer)
                    yield answer
                except RowProblem as problem:
                    self.fail(where, str(problem))
                except (json.JSONDecodeError, UnicodeError) as error:
                    self.fail(where, f"is no JSON in UTF-8 ({error})")

    def _vllm(self, record: Any, answer: Answer) -> None:
        """Read `prompt_logprobs`: null, then a dictionary a token."""
        choice = _choice(record)
        lists = record if isinstance(record, list) else None
        for place in (record, choice):
            if isinstance(place, dict):
                lists = place.get("prompt_logprobs", lists)
                found = _ids(place, "prompt_token_ids")
                answer.sequence = answer.sequence or found
        if not isinstance(lists, list) or len(lists) < 2:
            raise RowProblem(
                "has no list `prompt_logprobs` of two or more tokens (ask for"
                f" prompt_logprobs={self._k})"
            )
        if lists[0] is not None:
            raise RowProblem(
                "has log-probabilities of its first token, which nothing"
                " precedes: `prompt_logprobs` begins with null"
            )
        positions = [
            self._ranked(entries, place)
            for place, entries in enumerate(lists[1:], 1)
        ]
        answer.kind = "prompt"
        answer.ids, answer.logs = _side_by_side(positions)

    def _ranked(self, entries: Any, place: int) -> dict[int, float]:
        """The entries of a position; the prompt's own token may be one more."""
        if not isinstance(entries, dict):
            raise RowProblem(f"has {entries!r} at position {place}, no tokens")
        found, ranked = {}, 0
        for key, value in entries.items():
            if not key.isdecimal():
                raise RowProblem(f"has the token {key!r}, not an id")
            inner = value if isinstance(value, dict) else {"logprob": value}
            found[int(key)] = number(inner.get("logprob"))
            rank = inner.get("rank")
            ranked += rank is None or rank <= self._k
        if ranked < self._k:
            raise RowProblem(
                f"has {ranked} of the {self._k} likeliest tokens at position"
                f" {place} (top_k={self._k}; ask for prompt_logprobs={self._k})"
            )
        return found

    def _openai(self, record: Any, answer: Answer) -> None:
        """Read `choices[0].logprobs.content`, the tokens of the answer."""
        choice = _choice(record)
        content = choice.get("logprobs") if choice else None
        if isinstance(content, dict):
            content = content.get("content")
        if not isinstance(content, list) or not content:
            raise RowProblem(
                "has no `choices[0].logprobs.content` (ask for logprobs=True"
                f" and top_logprobs={self._k})"
            )
        positions = [self._item(item, n) for n, item in enumerate(content)]
        answer.ids, answer.logs = _side_by_side([p for _, p in positions])
        answer.said = tuple(own for own, _ in positions)
        answer.kind = "answer"
        prompt = _ids(record, "prompt_token_ids")
        if prompt is not None:
            said = _ids(choice, "token_ids") or answer.said
            if None in said:
                raise RowProblem(
                    "has tokens that `tokenizer` does not know, and no"
                    " `token_ids`"
                )
            answer.sequence = [*prompt, *said]

    def _item(
        self, item: Any, place: int
    ) -> tuple[int | None, dict[int, float]]:
        """A token's own id, and the known ids with their log-probabilities."""
        top = item.get("top_logprobs") if isinstance(item, dict) else None
        if not isinstance(top, list) or len(top) < self._k:
            count = len(top) if isinstance(top, list) else 0
            raise RowProblem(
                f"has {count} tokens in `top_logprobs` at its token {place},"
                f" fewer than top_k={self._k}"
            )
        found: dict[int, float] = {}
        seen = set()
        for one in [*top, item]:
            text, data, log = _token(one, place)
            if (text, data) in seen:
                continue
            seen.add((text, data))
            index = self._find(text, data)
            if index is None:
                self.unknown[text] += 1
                self.unknown_mass += math.exp(min(log, 0.0))
            elif index in found:  # two spellings of one token
                found[index] = float(np.logaddexp(found[index], log))
            else:
                found[index] = log
        return self._find(*_token(item, place)[:2]), found

    def _find(self, text: str, data: bytes | None) -> int | None:
        return self._vocabulary.find(text, data) if self._vocabulary else None


def _choice(record: Any) -> dict[str, Any] | None:
    choices = record.get("choices") if isinstance(record, dict) else None
    if choices is None:
        return None
    if not isinstance(choices, list) or len(choices) != 1:
        raise RowProblem("has not one choice (ask for n=1)")
    if not isinstance(choices[0], dict):
        raise RowProblem(f"has the choice {choices[0]!r}")
    return choices[0]


def _ids(record: Any, name: str) -> list[int] | None:
    found = record.get(name) if isinstance(record, dict) else None
    if found is None:
        return None
    if not isinstance(found, list) or any(type(i) is not int for i in found):
        raise RowProblem(f"has {name} that are no list of integers")
    return found


def _token(item: Any, place: int) -> tuple[str, bytes | None, float]:
    """Text, bytes and log-probability of `{"token", "bytes", "logprob"}`."""
    if not isinstance(item, dict) or not isinstance(item.get("token"), str):
        raise RowProblem(f"has {item!r} at its token {place}, no token")
    data = item.get("bytes")
    try:
        data = None if data is None else bytes(data)
    except (TypeError, ValueError):
        text = item["token"]
        raise RowProblem(f"has the bytes {data!r} of {text!r}") from None
    return item["token"], data, number(item.get("logprob"))


def _side_by_side(positions: list[dict[int, float]]) -> tuple[Any, Any]:
    """Ids and log-probabilities, `(positions, entries)`, padded."""
    width = max(map(len, positions), default=0)
    ids = np.full((len(positions), width), PADDING, "int64")
    logs = np.zeros(ids.shape)
    for row, entries in enumerate(positions):
        ids[row, : len(entries)] = list(entries)
        logs[row, : len(entries)] = list(entries.values())
    return ids, logs
