"""Read the tokens in files of responses of OpenAI-compatible servers.

A file has one JSON object per line: a response of the chat or the completions
endpoint as OpenAI, vLLM, SGLang or llama.cpp's server return it, or a line of a
batch job's output, which holds such a response under `response.body`. A
response of any other shape is an error, and so is an ambiguous one.
"""

import dataclasses
import itertools
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from keras_ptloss._progress import Verbose, track
from keras_ptloss._validation import check_choice
from keras_ptloss.soft_labels.soft_labels import SoftLabels

T = TypeVar("T")
Key = tuple[str, bytes | None, int | None]  # text, bytes and id of a token
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Missing = Literal["error", "skip"]

# OpenAI's log-probability of a chosen token that is not among the most likely.
UNKNOWN_LOGPROB = -9999.0

_JSON = {dict: "object", list: "array", str: "string", int: "integer"}


class NoAnswer(Exception):
    """The reason why a response has no answer that can be read."""


class Token(NamedTuple):
    """A token and its log-probability, as the server writes them."""

    text: str
    logprob: float  # natural; NaN for the first token of a prompt
    data: bytes | None = None
    id: int | None = None

    @property
    def key(self) -> "Key":
        """A key that differs between different tokens."""
        return self.text, self.data, self.id

    @property
    def utf8(self) -> bytes:
        """The bytes of the token, or of its text if they are not given."""
        return self.text.encode() if self.data is None else self.data

    @property
    def probability(self) -> float:
        """The exponential of `logprob`."""
        return math.exp(self.logprob)


class Position(NamedTuple):
    """A token of an answer and its alternatives."""

    token: Token
    alternatives: tuple[Token, ...]  # the most likely tokens
    entries: tuple[Token, ...]  # those, and `token` if its probability is known


@dataclasses.dataclass(eq=False, kw_only=True)
class Responses:
    """Which answers of a file were read; see `Answers`."""

    rows: np.ndarray
    ids: list[str] | None
    failed: dict[str | int, str]
    in_any_order: bool  # The lines have custom_ids, and the user gave no `ids`.

    def check_order(self, argument: str, count: int) -> None:
        """Check that row i belongs to example i of an argument."""
        if self.in_any_order:
            raise ValueError(
                "The lines have a `custom_id`, so they may be in any order."
                f" Read them with `ids`, the custom_ids of the `{argument}`, in"
                f" order. Received: ids=None, and custom_ids such as"
                f" {(self.ids or [''])[0]!r}"
            )
        num_answers = len(self.rows) + len(self.failed)
        if num_answers != count:
            raise ValueError(
                f"Each of the `{argument}` must have one answer. Received:"
                f" {num_answers} answers for {count} {argument}"
            )

    def _store(self, values: Any, path: Any, **options: Any) -> SoftLabels:
        if self.failed:
            num_answers = len(self.rows) + len(self.failed)
            warnings.warn(
                f"{len(self.failed)} of {num_answers} answers cannot be used"
                " and are not stored, for example"
                f" {next(iter(self.failed.values()))}",
                stacklevel=3,
            )
        return SoftLabels.from_array(values, path, ids=self.ids, **options)


def read_responses(
    files: Paths,
    read: Callable[[dict[str, Any], int], Any],
    missing: Missing,
    ids: Sequence[str] | None = None,
    verbose: Verbose = 0,
) -> tuple[list[Any], Responses]:
    """Return `read(response, row)` for each answer, and the `Responses`.

    `read` raises `NoAnswer` if the response has no answer, and ValueError if it
    cannot be read. A request that failed and was repeated may have two lines
    with the same `custom_id`. The line with an answer is used. The other
    arguments are those of `read_answers`.
    """
    check_choice("missing", missing, ("error", "skip"))
    row_of = {name: row for row, name in enumerate(ids or ())}
    if len(row_of) < len(ids or ()):
        raise ValueError("`ids` must be unique. Received: a repeated id")
    found: dict[str | int, tuple[int, Any]] = {}
    failed: dict[str | int, str] = {}
    has_ids: set[bool] = set()
    lines = track(
        _lines(files),
        "Reading the answers",
        None if ids is None else len(ids),
        unit="line",
        verbose=verbose,
    )
    for row, (where, line) in enumerate(lines):
        key: str | int = row
        try:
            record = json.loads(line)
            custom_id = field(record, "custom_id", str)
            has_ids.add(custom_id is not None)
            if len(has_ids) > 1:
                raise ValueError("only some of the lines have a `custom_id`")
            if ids is not None and custom_id not in row_of:
                raise ValueError(f"the custom_id {custom_id!r} is not in `ids`")
            if custom_id is not None:
                key, row = custom_id, row_of.get(custom_id, row)
            value = read(_response(record), row)
            if key in found:
                raise ValueError(f"a second answer to the request {key!r}")
            found[key] = row, value
        except NoAnswer as reason:
            failed[key] = f"{where}: {reason}"
        except (ValueError, RecursionError) as error:
            raise ValueError(f"Cannot read {where}: {error}") from None
    for name in row_of:
        failed.setdefault(name, f"{name!r} has no line")
    failed = {key: why for key, why in failed.items() if key not in found}
    if not found or (failed and missing == "error"):
        reasons = "; ".join(list(failed.values())[:3]) or "files without lines"
        skip = ', or pass missing="skip"' if found else ""
        raise ValueError(
            f"{len(failed)} of {len(failed) + len(found)} answers cannot be "
            f"used. Repeat the requests{skip}. Received: {reasons}"
        )
    answers = sorted(found.items(), key=lambda item: item[1][0])
    return [value for _, (_, value) in answers], Responses(
        rows=np.array([row for _, (row, _) in answers]),
        ids=[str(key) for key, _ in answers] if True in has_ids else None,
        failed=failed,
        in_any_order=True in has_ids and ids is None,
    )


def _lines(files: Paths) -> Iterator[tuple[str, bytes]]:
    """Yield where each line is, for errors, and its bytes."""
    for path in [files] if isinstance(files, (str, os.PathLike)) else files:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"line {number} of {Path(path).name}", line


def field(parent: Any, name: str, kind: type[T]) -> T | None:
    """Return a field of a JSON object; None if it is absent or null."""
    if not isinstance(parent, dict):
        raise ValueError(
            f"an object with the field `{name}` was expected. Received:"
            f" {parent!r}"
        )
    value = parent.get(name)
    if value is not None and type(value) is not kind:
        raise ValueError(
            f"`{name}` must be a JSON {_JSON[kind]}. Received: {value!r}"
        )
    return value


def unknown_shape(value: dict[str, Any], expected: str) -> ValueError:
    """Return the error to raise for a response of an unknown shape."""
    return ValueError(
        f"`{expected}` is missing. Only responses of OpenAI's chat and"
        ' completions endpoints can be read. The page "Use other answers" shows'
        " how to build an array from other responses. Received: the fields"
        f" {', '.join(map(repr, value)) or '(none)'}"
    )


def _response(record: dict[str, Any]) -> dict[str, Any]:
    """Return the response of a line, also if a batch job has wrapped it."""
    if record.get("error"):
        raise NoAnswer(f"error: {record['error']}")
    body: dict[str, Any] | None = record
    if "response" in record:
        batch = field(record, "response", dict)
        if "choices" in record:
            raise ValueError("it has `choices` and `response`; keep only one")
        if batch is None:
            raise NoAnswer("`response` is null")
        if "body" not in batch:
            raise unknown_shape(batch, "response.body")
        if batch.get("status_code", 200) != 200:
            raise NoAnswer(
                f"status_code {batch['status_code']}: {batch['body']}"
            )
        body = field(batch, "body", dict)
    if not body or body.get("error"):
        raise NoAnswer(f"error: {body and body['error']}")
    if "choices" not in body:
        raise unknown_shape(body, "choices")
    return body


def only_choice(response: dict[str, Any]) -> dict[str, Any]:
    """Return the only choice of a response; raise `NoAnswer` without one."""
    choices = field(response, "choices", list)
    if not choices:
        raise NoAnswer("`choices` is empty")
    if len(choices) > 1:
        raise ValueError("`choices` must have one entry; ask with n=1")
    choice = choices[0]
    message = field(choice, "message", dict) or {}
    if choice.get("error"):
        raise NoAnswer(f"error: {choice['error']}")
    if choice.get("finish_reason") == "content_filter":
        raise NoAnswer("finish_reason is 'content_filter'")
    if message.get("refusal"):
        raise NoAnswer(f"`message.refusal` is {message['refusal']!r}")
    return choice


def positions(choice: dict[str, Any]) -> list[Position]:
    """Return the tokens of a choice, from either form of `logprobs`."""
    logprobs = field(choice, "logprobs", dict)
    if logprobs is None:
        finish = choice.get("finish_reason")
        raise NoAnswer(
            f"`logprobs` is null (finish_reason {finish!r}); ask for"
            " log-probabilities"
        )
    chat = field(logprobs, "content", list)
    texts = field(logprobs, "tokens", list)
    if chat is not None and texts is not None:
        raise ValueError(
            "`logprobs` has `content` and `tokens`, which is ambiguous; keep"
            " only one"
        )
    if chat is not None:
        return [
            _position(
                _token(item),
                map(_token, field(item, "top_logprobs", list) or []),
            )
            for item in chat
        ]
    if texts is not None:
        return _completion_positions(logprobs, texts)
    if "content" in logprobs or "tokens" in logprobs:
        raise NoAnswer("`logprobs.content` is null")
    raise unknown_shape(logprobs, "logprobs.content")


def _token(item: Any) -> Token:
    """Read `{"token": ..., "logprob": ..., "bytes": [...]}`."""
    text, data = field(item, "token", str), field(item, "bytes", list)
    if text is None:
        raise ValueError(f"`token` is missing. Received: {item!r}")
    if not all(type(byte) is int and 0 <= byte < 256 for byte in data or []):
        raise ValueError(f"`bytes` must be bytes. Received: {item!r}")
    return Token(
        text,
        as_logprob(item.get("logprob"), text),
        None if data is None else bytes(data),
        field(item, "id", int),
    )


def _completion_positions(
    logprobs: dict[str, Any], texts: list[str]
) -> list[Position]:
    """Read the lists `tokens`, `token_logprobs` and `top_logprobs`."""
    own = field(logprobs, "token_logprobs", list)
    top = field(logprobs, "top_logprobs", list) or [None] * len(texts)
    if own is None or not len(texts) == len(own) == len(top):
        raise ValueError(
            "`tokens`, `token_logprobs` and `top_logprobs` differ in length"
        )
    found = []
    for text, value, likeliest in zip(texts, own, top, strict=True):
        pair = {"tokens": text, "top_logprobs": likeliest}
        text = field(pair, "tokens", str) or ""
        # The first token of a prompt has no log-probability.
        logprob = math.nan if value is None else as_logprob(value, text)
        alternatives = {
            key: as_logprob(one, key)
            for key, one in (field(pair, "top_logprobs", dict) or {}).items()
        }
        # llama-cpp-python adds the chosen token again, in another spelling.
        twins = [
            key
            for key, one in alternatives.items()
            if key != text and key.strip() == text.strip() and one == logprob
        ]
        for twin in twins:
            del alternatives[twin]
            alternatives[text] = logprob
        listed = itertools.starmap(Token, alternatives.items())
        found.append(_position(Token(text, logprob), listed))
    return found


def _position(token: Token, listed: Iterable[Token]) -> Position:
    """Return a position of a token and its alternatives.

    If the token is also an alternative, it must have the same log-probability.
    """
    alternatives = tuple(dict.fromkeys(listed))
    same = [one.logprob for one in alternatives if one.key == token.key]
    if same and not any(_agree(one, token.logprob) for one in same):
        raise ValueError(
            f"the answer's token {token.text!r} has the log-probability"
            f" {token.logprob} in `token_logprobs` or `logprob`, but {same[0]}"
            " in `top_logprobs`. Either two tokens have the same text, or the"
            " server computes the two numbers in different ways. Ask the server"
            " for tokens by id or bytes"
        )
    known = not same and token.logprob > UNKNOWN_LOGPROB
    entries = (*alternatives, token) if known else alternatives
    total = sum(one.probability for one in entries)
    if total > 1.01:
        raise ValueError(
            f"the probabilities in `top_logprobs` at {token.text!r} add up to"
            f" {total:.3f}, more than 1. Received: {entries}"
        )
    return Position(token, alternatives, entries)


def _agree(one: float, other: float) -> bool:
    # Servers write different numbers for a probability of 0.
    return max(one, other) < -30 or abs(one - other) < 0.01


def as_logprob(value: Any, text: str) -> float:
    """Check a log-probability, which may be minus infinity."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or math.isnan(value) or value > 1e-3:
        raise ValueError(
            f"the log-probability of {text!r} must be a number of at most 0."
            f" Received: {value!r}"
        )
    return min(float(value), 0.0)
