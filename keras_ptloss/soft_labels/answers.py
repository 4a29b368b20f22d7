"""Read the answers of language models, and the class that each one names.

A file has one JSON object per line: a response of the chat or the completions
endpoint of an OpenAI-compatible server, or a line of a batch job's output. A
class is one token, and the server lists the most likely tokens at its position.
The page "Check a file of answers" states the rules. A response of any other
shape is an error, and so is an ambiguous one.
"""

import dataclasses
import itertools
import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from keras_ptloss._progress import Verbose, track
from keras_ptloss._validation import check_choice, fail
from keras_ptloss.soft_labels.inputs import as_inputs, num_examples, take
from keras_ptloss.soft_labels.soft_labels import PathLike, SoftLabels

T = TypeVar("T")
Paths = PathLike | Sequence[PathLike]
ClassNames = Sequence[str] | Mapping[str, Sequence[str]]
Missing = Literal["error", "skip"]

# OpenAI's log-probability of a chosen token that is not among the most likely.
UNKNOWN_LOGPROB = -9999.0

_WHITESPACE = " \t\r\n\v\f"
_JSON = {dict: "object", list: "array", str: "string", int: "integer"}


# Read responses.


class NoAnswer(Exception):
    """Why a response has no answer. A `ValueError` says that it is wrong."""


class Token(NamedTuple):
    """A token and its log-probability, as the server writes them."""

    text: str
    logprob: float
    data: bytes | None
    id: int | None

    @property
    def key(self) -> "Token":
        """The token without its probability."""
        return Token(self.text, 0.0, self.data, self.id)

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

    @property
    def _num_answers(self) -> int:
        return len(self.rows) + len(self.failed)

    def check_order(self, argument: str, count: int) -> None:
        """Check that row i belongs to example i of an argument."""
        if self.in_any_order:
            raise ValueError(
                "The lines have a `custom_id`, so they may be in any order."
                f" Read them with `ids`, the custom_ids of the `{argument}`, in"
                " order. Received: ids=None, and custom_ids such as"
                f" {(self.ids or [''])[0]!r}"
            )
        if self._num_answers != count:
            raise ValueError(
                f"Each of the `{argument}` must have one answer. Received:"
                f" {self._num_answers} answers for {count} {argument}"
            )

    def _store(self, values: Any, path: Any, **options: Any) -> SoftLabels:
        if self.failed:
            warnings.warn(
                f"{len(self.failed)} of {self._num_answers} answers cannot be"
                " used and are not stored, for example"
                f" {next(iter(self.failed.values()))}",
                stacklevel=3,
            )
        return SoftLabels.from_array(values, path, ids=self.ids, **options)


def read_responses(
    files: Paths,
    read: Callable[[dict[str, Any], int], Any],
    missing: Missing,
    ids: Sequence[str] | None,
    verbose: Verbose,
) -> tuple[list[Any], Responses]:
    """Return `read(response, row)` for each answer, and the `Responses`.

    If a failed request was repeated, two lines have the same `custom_id`; the
    line with an answer is used.
    """
    check_choice("missing", missing, ("error", "skip"))
    row_of = {name: row for row, name in enumerate(ids or ())}
    if len(row_of) < len(ids or ()):
        raise ValueError("`ids` must be unique. Received: a repeated id")
    found: dict[str | int, tuple[int, Any]] = {}
    failed: dict[str | int, str] = {}
    has_ids: set[bool] = set()
    lines, total = _lines(files), len(row_of) or None
    what = "Reading the answers"
    lines = track(lines, what, total, unit="line", verbose=verbose)
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
        fail(name, "a field of a JSON object", parent)
    value = parent.get(name)
    if value is not None and type(value) is not kind:
        fail(name, f"a JSON {_JSON[kind]}", value)
    return value


def unknown_shape(value: dict[str, Any], expected: str) -> ValueError:
    """Return the error to raise for a response of an unknown shape."""
    return ValueError(
        f"`{expected}` is missing. Only responses of OpenAI's chat and"
        ' completions endpoints can be read; the page "Use other answers" shows'
        f" what to do with others. Received: the fields {list(value)}"
    )


def _response(record: dict[str, Any]) -> dict[str, Any]:
    """Return the response of a line, also if a batch job has wrapped it."""
    if record.get("error"):
        raise NoAnswer(f"error: {record['error']}")
    body: dict[str, Any] | None = record
    if "response" in record:
        if "choices" in record:
            raise ValueError("it has `choices` and `response`; keep only one")
        batch = field(record, "response", dict)
        if batch is None:
            raise NoAnswer("`response` is null")
        if "body" not in batch:
            raise unknown_shape(batch, "response.body")
        status = batch.get("status_code", 200)
        if status != 200:
            raise NoAnswer(f"status_code {status}: {batch['body']}")
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
        finish = f"(finish_reason {choice.get('finish_reason')!r})"
        raise NoAnswer(f"`logprobs` is null {finish}; ask for it")
    items = field(logprobs, "content", list)
    texts = field(logprobs, "tokens", list)
    if items is not None and texts is not None:
        raise ValueError("`logprobs` has `content` and `tokens`; keep only one")
    if texts is not None:
        items = _as_chat(logprobs, texts)
    if items is None:
        if "content" in logprobs or "tokens" in logprobs:
            raise NoAnswer("`logprobs.content` is null")
        raise unknown_shape(logprobs, "logprobs.content")
    return [_position(item) for item in items]


def _as_chat(logprobs: dict[str, Any], texts: list[Any]) -> list[Any]:
    """Return the tokens of a completion as a chat response has them."""
    own = field(logprobs, "token_logprobs", list)
    top = field(logprobs, "top_logprobs", list) or [None] * len(texts)
    if own is None or not len(texts) == len(own) == len(top):
        lists = "`tokens`, `token_logprobs` and `top_logprobs`"
        raise ValueError(f"{lists} must have the same length")
    items = []
    for text, logprob, likeliest in zip(texts, own, top, strict=True):
        if logprob is None:  # the first token of a prompt
            logprob = UNKNOWN_LOGPROB
        listed = field({"top_logprobs": likeliest}, "top_logprobs", dict) or {}
        alternatives = []
        for key, one in listed.items():
            # llama-cpp-python adds the chosen token again, in another spelling.
            if one == logprob and key.strip() == str(text).strip():
                key = text
            alternatives.append({"token": key, "logprob": one})
        item = {"token": text, "logprob": logprob, "top_logprobs": alternatives}
        items.append(item)
    return items


def _position(item: Any) -> Position:
    """Read a token and its alternatives, which must agree on the token."""
    token = _token(item)
    listed = map(_token, field(item, "top_logprobs", list) or [])
    alternatives = tuple(dict.fromkeys(listed))
    same = [one.logprob for one in alternatives if one.key == token.key]
    agree = [
        # Servers write different numbers for a probability of 0.
        max(one, token.logprob) < -30 or abs(one - token.logprob) < 0.01
        for one in same
    ]
    if same and not any(agree):
        raise ValueError(
            f"the answer's token {token.text!r} has the log-probability"
            f" {token.logprob} in `token_logprobs` or `logprob`, but {same[0]}"
            " in `top_logprobs`; maybe two tokens have the same text. Ask the"
            " server for tokens by id or bytes"
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


def as_logprob(value: Any, text: str) -> float:
    """Check a log-probability, which may be minus infinity."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or math.isnan(value) or value > 1e-3:
        raise ValueError(
            f"the log-probability of {text!r} must be a number of at most 0."
            f" Received: {value!r}"
        )
    return min(float(value), 0.0)


# Find the class.


@dataclasses.dataclass(eq=False, kw_only=True)
class Answers(Responses):
    """Class probabilities read from a file of answers.

    Attributes:
        probabilities: `(N, num_classes)` float64; every row sums to 1.
        other_mass: `(N,)`, the total probability of all tokens that are not a
            class. If it is large, the answer says little about the classes.
        class_names: The names of the classes, in order.
        rows: `(N,)`, the line number of each answer, counted from 0, or its
            position in `ids`.
        ids: The `custom_id` of each answer, or None if the lines have none.
        failed: Why answers were left out, by `custom_id` or line number.
    """

    probabilities: np.ndarray
    other_mass: np.ndarray
    class_names: list[str]

    def store(
        self, path: PathLike | None, *, inputs: Any = None, **options: Any
    ) -> SoftLabels:
        """Store the probabilities; warn if answers were left out.

        Args:
            path: As in `SoftLabels.from_array`.
            inputs: The examples that the answers are about, in the order of the
                lines, or of `ids`. Not needed if the lines have a `custom_id`,
                which is then the id of a row.
            **options: Other arguments of `SoftLabels.from_array`.
        """
        if inputs is not None:
            inputs = as_inputs(inputs)
            self.check_order("inputs", num_examples(inputs))
            inputs = take(inputs, self.rows)
        elif self.ids is None:
            expected = "the examples that the answers are about, because the"
            fail("inputs", f"{expected} lines have no `custom_id`", inputs)
        options |= {"inputs": inputs, "class_names": self.class_names}
        return self._store(self.probabilities, path, **options)


def read_answers(
    files: Paths,
    class_names: ClassNames,
    *,
    after: str | None = None,
    ids: Sequence[str] | None = None,
    missing: Missing = "error",
    verbose: Verbose = "auto",
) -> Answers:
    """Read the class probabilities of each answer in a file.

    The class is one token of the answer: the last one that has text, or the
    first one after the text `after`. The probabilities are those of the
    alternatives that the server lists for this token. A class that is not
    listed gets the lowest listed probability, or if it is smaller, an equal
    share of the probability that is left after all listed tokens.

    Args:
        files: A file with one JSON response per line, or a list of files.
        class_names: The name of each class, as the model writes it. If a class
            has several spellings, pass a dictionary that maps each name to a
            list of spellings: `{"no": ["no", "No"], "yes": ["yes", "Yes"]}`.
        after: The class is the first token after this text, which must occur
            once in the answer; `""` is the start of the answer. By default the
            class is the last token of the answer.
        ids: The `custom_id` of each example. The answers are returned in this
            order, by default in the order of the lines.
        missing: `"error"` or `"skip"`: whether an answer without class
            probabilities, for example after a failed request, is an error or is
            left out. It never becomes a uniform row.
        verbose: As in `SoftLabels.from_array`.

    Raises:
        ValueError: If a line cannot be read, if a class is not a single token,
            or if a class does not occur in the file.

    Example:
        >>> import json, tempfile
        >>> from keras_ptloss.soft_labels import read_answers
        >>> yes = {"token": "yes", "logprob": -0.5}
        >>> no = {"token": "no", "logprob": -1.6}
        >>> logprobs = {"content": [{**yes, "top_logprobs": [yes, no]}]}
        >>> choice = {"message": {"content": "yes"}, "logprobs": logprobs}
        >>> path = tempfile.mkdtemp() + "/answers.jsonl"
        >>> with open(path, "w") as file:
        ...     json.dump({"choices": [choice]}, file)
        >>> answers = read_answers(path, ["no", "yes"])
        >>> print(answers.probabilities.round(2), answers.other_mass.round(2))
        [[0.25 0.75]] [0.19]
    """
    spellings = _spellings(class_names)
    found: set[int] = set()
    tokens: Counter[str] = Counter()

    def read(response: dict[str, Any], _: int) -> tuple[np.ndarray, float]:
        position = _class_position(response, spellings, after)
        listed = _listed_masses(position, spellings)
        found.update(listed)
        tokens.update(token.text for token in position.entries)
        return _class_probabilities(listed, position, len(class_names))

    values, responses = read_responses(files, read, missing, ids, verbose)
    absent = [name for c, name in enumerate(class_names) if c not in found]
    if absent:
        common = [text for text, _ in tokens.most_common(20)]
        raise ValueError(
            f"No answer lists a token for the classes {absent}. Each class name"
            " must be a single token, spelled as the model writes it. Received:"
            f" class_names={list(class_names)}, and answers whose most frequent"
            f" tokens are {common}"
        )
    return Answers(
        probabilities=np.stack([row for row, _ in values]),
        other_mass=np.array([mass for _, mass in values]),
        class_names=list(class_names),
        **vars(responses),
    )


def _spellings(class_names: ClassNames) -> dict[str, int]:
    """Return a dictionary that maps each spelling to the index of its class."""
    of_classes: Iterable[Any] = class_names
    if isinstance(class_names, Mapping):
        of_classes = class_names.values()
    pairs = [
        (text, label)
        for label, one in enumerate(of_classes)
        for text in (one if isinstance(one, (list, tuple)) else [one])
    ]
    spellings = {str(text).strip(): label for text, label in pairs}
    are_texts = all(isinstance(text, str) for text, _ in pairs)
    differ = len(spellings) == len(pairs) and "" not in spellings
    valid = are_texts and differ and len(class_names) > 1
    if isinstance(class_names, str) or not valid:
        expected = "two or more different texts, or a dictionary that maps each"
        fail("class_names", f"{expected} to its spellings", class_names)
    return spellings


def _class_position(
    response: dict[str, Any], spellings: dict[str, int], after: str | None
) -> Position:
    """Return the position at which an answer names its class."""
    choice = only_choice(response)
    found = positions(choice)
    # The first token of a prompt has no log-probability.
    if None in (field(choice["logprobs"], "token_logprobs", list) or []):
        raise ValueError("the answer repeats the prompt; ask without `echo`")
    text = _answer_text(choice, found)
    spelled = _tokens_of(text, found)
    if after is None:
        position, place, rest = spelled[-1], "the last token", ""
    else:
        position, rest = _first_after(after.rstrip(), text, spelled)
        place = "the first token" + (f" after {after!r}" if after else "")
    word = position.token.utf8.decode(errors="replace").strip()
    received = f"Received: the content {_tail(text)}"
    for name in spellings:
        named = text.endswith(name) if after is None else rest.startswith(name)
        if named and len(name) > len(word):
            raise ValueError(
                f"the class {name!r} is more than one token here; let the model"
                f" answer with one letter or digit per class. {received}"
            )
    if word not in spellings:
        raise NoAnswer(
            f"{place} is {word!r}, none of the classes {list(spellings)}; if"
            f" the class is elsewhere, use `after` to say where. {received}"
        )
    before = text.removesuffix(word)
    if after is None and before and not before[-1].isspace():
        raise NoAnswer(f"{place}, {word!r}, ends a longer word. {received}")
    if re.match(r"[-.,'’]?\w", rest.removeprefix(word)):
        raise NoAnswer(f"{place}, {word!r}, begins a longer word. {received}")
    return position


def _tail(shown: Any) -> str:
    """Return the last part of a text or a list, for an error message."""
    return repr(shown) if len(shown) <= 40 else f"... {shown[-40:]!r}"


def _answer_text(choice: dict[str, Any], found: list[Position]) -> str:
    """Return the text of an answer, without the model's reasoning."""
    message, text = field(choice, "message", dict), field(choice, "text", str)
    if message is not None and text is not None:
        raise ValueError("the choice has `message` and `text`; keep only one")
    if message is None and "text" not in choice:
        raise unknown_shape(choice, "choices[0].message")
    name, content = "text", text
    if message is not None:
        name, content = "message.content", field(message, "content", str)
        if "content" not in message:
            joined = b"".join(position.token.utf8 for position in found)
            content = joined.decode(errors="replace")
    if not content or not content.strip():
        finish = choice.get("finish_reason")
        raise NoAnswer(f"`{name}` is {content!r} (finish_reason {finish!r})")
    return content.rstrip(_WHITESPACE)


def _tokens_of(text: str, found: list[Position]) -> list[Position]:
    """Return the tokens that spell the answer, without those of spaces only.

    Reasoning may come before them, and the end of the turn after them. If
    several runs of tokens spell the answer, the last run is used. Spaces are
    not compared, because servers treat them in different ways.
    """
    found = [one for one in found if _visible(one.token.utf8)]
    pieces = [_visible(one.token.utf8) for one in found]
    everything, wanted = b"".join(pieces), _visible(text.encode())
    # The ends of the tokens; token i begins at `ends[i]`.
    ends = [0, *itertools.accumulate(map(len, pieces))]
    for stop in reversed(ends):
        start = stop - len(wanted)
        if everything[start:stop] == wanted and start in ends:
            return found[ends.index(start) : ends.index(stop)]
    raise NoAnswer(
        "the tokens of `logprobs` do not spell the content of the answer; the"
        " server may return raw vocabulary pieces or ids instead of text."
        f" Received: {_tail([one.token.text for one in found])} for the content"
        f" {_tail(text)}"
    )


def _visible(data: bytes) -> bytes:
    return data.translate(None, _WHITESPACE.encode())


def _first_after(
    after: str, text: str, spelled: list[Position]
) -> tuple[Position, str]:
    """Return the first token after a text, and the answer from there on."""
    count = text.count(after) if after else 1  # every text begins with ""
    if count > 1:
        raise ValueError(
            f"{after!r} occurs {count} times in the content; pass a longer text"
        )
    if not count:
        raise NoAnswer(f"the content {_tail(text)} does not contain {after!r}")
    end = text.index(after) + len(after)
    before = len(_visible(text[:end].encode()))
    for position in spelled:
        if before == 0:
            return position, text[end:].lstrip()
        before -= len(_visible(position.token.utf8))
        if before < 0:
            token = position.token.text
            raise ValueError(f"{after!r} ends inside the token {token!r}")
    raise NoAnswer(f"nothing follows {after!r} in the content")


def _listed_masses(
    position: Position, spellings: dict[str, int]
) -> dict[int, float]:
    """Return the probability of each listed class."""
    if not position.alternatives:
        raise NoAnswer("`top_logprobs` is empty; ask with top_logprobs=20")
    masses: dict[int, float] = {}
    texts: set[str] = set()
    for token in position.entries:
        label = spellings.get(token.text.strip())
        as_bytes = token.utf8.decode(errors="replace").strip()
        is_raw = token.text[:1] in ("Ġ", "▁") and token.text[1:] in spellings
        if is_raw or spellings.get(as_bytes) != label:
            raise ValueError(
                f"the token {token.text!r} (bytes {token.data!r}) is a raw"
                " piece of a vocabulary, or its text contradicts its bytes"
            )
        if label is None:
            continue
        if token.text in texts:
            raise ValueError(
                f"`top_logprobs` lists two tokens with the text {token.text!r}"
                " and different log-probabilities; ask the server for bytes"
            )
        texts.add(token.text)
        masses[label] = masses.get(label, 0.0) + token.probability
    if not sum(masses.values()) > 0:
        raise NoAnswer(f"`top_logprobs` lists none of {list(spellings)}")
    return masses


def _class_probabilities(
    listed: dict[int, float], position: Position, num_classes: int
) -> tuple[np.ndarray, float]:
    """Return the classes' probabilities and that of all other tokens."""
    least = min(token.probability for token in position.alternatives)
    left = max(1.0 - sum(token.probability for token in position.entries), 0.0)
    absent = max(num_classes - len(listed), 1)
    masses = np.full(num_classes, min(least, left / absent))
    masses[list(listed)] = list(listed.values())
    total = float(masses.sum())
    return masses / total, max(1.0 - total, 0.0)
