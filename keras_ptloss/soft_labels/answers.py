"""Class probabilities from the answers of language models.

The model names a class by one token, and the server lists the most likely
tokens at this position. The page "Check a file of answers" states the rules.
Any ambiguous answer is an error.
"""

import dataclasses
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_ptloss._progress import Verbose
from keras_ptloss.soft_labels.inputs import as_inputs, num_examples, take
from keras_ptloss.soft_labels.responses import (
    Missing,
    NoAnswer,
    Paths,
    Position,
    Responses,
    field,
    only_choice,
    positions,
    read_responses,
    unknown_shape,
)
from keras_ptloss.soft_labels.soft_labels import SoftLabels

ClassNames = Sequence[str] | Mapping[str, Sequence[str]]

_WHITESPACE = b" \t\r\n\v\f"


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
        ids: The `custom_id` of each answer, or None if the file has no
            custom_ids.
        failed: Why answers were left out: a reason for each `custom_id` or
            line number.
    """

    probabilities: np.ndarray
    other_mass: np.ndarray
    class_names: list[str]

    def store(
        self,
        path: str | os.PathLike[str] | None,
        *,
        inputs: Any = None,
        **options: Any,
    ) -> SoftLabels:
        """Store the probabilities; warn if answers were left out.

        The store appears only when it is complete. If the process is killed,
        read and store the file again.

        Args:
            path: Directory of the new store; None keeps it in memory.
            inputs: The examples that the answers are about, in the order of the
                lines, or of `ids`. Not needed if the lines have a `custom_id`;
                the store then finds its rows by these ids.
            **options: Other arguments of `SoftLabels.from_array`.

        Raises:
            ValueError: If the number of inputs is not that of the answers.
        """
        if inputs is not None:
            inputs = as_inputs(inputs)
            self.check_order("inputs", num_examples(inputs))
            inputs = take(inputs, self.rows)
        elif self.ids is None:
            raise ValueError(
                "Pass `inputs`, the examples that the answers are about,"
                " because the lines have no `custom_id`. Received: inputs=None"
            )
        names = self.class_names
        return self._store(
            self.probabilities,
            path,
            inputs=inputs,
            class_names=names,
            **options,
        )


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
    listed gets the smaller of two numbers: the lowest listed probability, or an
    equal share of the probability that is left after all listed tokens.

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
        verbose: 1 shows a progress bar, 0 does not; "auto" shows it after two
            seconds.

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
            f" class_names={list(class_names)}. The most frequent tokens in"
            f" the answers are {common}"
        )
    return Answers(
        probabilities=np.stack([row for row, _ in values]),
        other_mass=np.array([mass for _, mass in values]),
        class_names=list(class_names),
        **vars(responses),
    )


def _spellings(class_names: ClassNames) -> dict[str, int]:
    """Return a dictionary that maps each spelling to the index of its class."""
    if isinstance(class_names, Mapping):
        texts = list(class_names.values())
    else:
        texts = [[name] for name in class_names]
    pairs = [
        (text.strip() if isinstance(text, str) else "", label)
        for label, row in enumerate(texts)
        for text in row
    ]
    spellings = dict(pairs)
    is_text = isinstance(class_names, str) or any(
        isinstance(row, str) for row in texts
    )
    if (
        is_text
        or len(texts) < 2
        or "" in spellings
        or len(spellings) < len(pairs)
    ):
        raise ValueError(
            "`class_names` must be a list of two or more different texts, or a"
            " dictionary that maps each name to a list of spellings. Received:"
            f" {class_names=}"
        )
    return spellings


def _class_position(
    response: dict[str, Any], spellings: dict[str, int], after: str | None
) -> Position:
    """Return the position at which an answer names its class."""
    choice = only_choice(response)
    found = positions(choice)
    if any(math.isnan(position.token.logprob) for position in found):
        raise ValueError("the answer repeats the prompt; ask without `echo`")
    text = _answer_text(choice, found)
    spans = _spans(found, text)
    if after is None:
        index = max(spans)
    else:
        index = _first_after(spans, text, after.encode().rstrip(_WHITESPACE))
    start, stop = spans[index]
    parts = (text[:start], text[start:stop], text[stop:])
    before, word, following = (p.decode(errors="replace") for p in parts)
    _check_word(before, word, following, spellings, after)
    return found[index]


def _check_word(
    before: str,
    word: str,
    following: str,
    spellings: dict[str, int],
    after: str | None,
) -> None:
    """Check that a token of the answer is a class and a whole word."""
    received = f"Received: the content {_tail(before + word + following)}"
    if after is None:
        place = "the last token"
        named = [name for name in spellings if (before + word).endswith(name)]
    else:
        place = "the first token" + (f" after {after!r}" if after else "")
        all_from = word + following
        named = [name for name in spellings if all_from.startswith(name)]
    for name in named:
        if len(name) > len(word):
            raise ValueError(
                f"the class {name!r} is more than one token here; let the model"
                f" answer with one letter or digit per class. {received}"
            )
    if word not in spellings:
        raise NoAnswer(
            f"{place} is {word!r}, none of the classes {list(spellings)}; if"
            f" the class is elsewhere, use `after` to say where. {received}"
        )
    if after is None and before and not before[-1].isspace():
        raise NoAnswer(f"{place}, {word!r}, ends a longer word. {received}")
    if re.match(r"[-.,'’]?\w", following):
        raise NoAnswer(f"{place}, {word!r}, begins a longer word. {received}")


def _tail(shown: Any) -> str:
    """Return the last part of a text or a list, for an error message."""
    return repr(shown) if len(shown) <= 40 else f"... {shown[-40:]!r}"


def _answer_text(choice: dict[str, Any], found: list[Position]) -> bytes:
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
    return content.encode().rstrip(_WHITESPACE)


def _spans(found: list[Position], text: bytes) -> dict[int, tuple[int, int]]:
    """Return where each token that has text starts and ends in the answer.

    The tokens may include the reasoning before the answer and the end of the
    turn after the answer. If several runs of tokens spell the answer, the last
    run is used. Spaces are not compared, because servers treat them in
    different ways.
    """
    pieces = [_visible(position.token.utf8) for position in found]
    ends = np.cumsum([len(piece) for piece in pieces], dtype=int).tolist()
    starts = [0, *ends]  # has one element more than `pieces`
    everything, wanted = b"".join(pieces), _visible(text)
    begin = everything.rfind(wanted)
    while begin >= 0 and not (begin in starts and begin + len(wanted) in ends):
        begin = everything.rfind(wanted, 0, begin + len(wanted) - 1)
    if begin < 0:
        raise NoAnswer(
            "the tokens of `logprobs` do not spell the content of the answer;"
            " the server may return raw vocabulary pieces or ids instead of"
            " text. Received:"
            f" the tokens {_tail([p.token.text for p in found])} for the"
            f" content {_tail(text.decode(errors='replace'))}"
        )
    where = [i for i, byte in enumerate(text) if byte not in _WHITESPACE]
    return {
        index: (where[first - begin], where[last - begin - 1] + 1)
        for index, (first, last) in enumerate(itertools.pairwise(starts))
        if begin <= first < last <= begin + len(wanted)
    }


def _visible(data: bytes) -> bytes:
    return data.translate(None, _WHITESPACE)


def _first_after(
    spans: dict[int, tuple[int, int]], text: bytes, after: bytes
) -> int:
    """Return the index of the first token after a text."""
    end = 0
    if after:
        count = text.count(after)
        if count > 1:
            raise ValueError(
                f"the text {after.decode()!r} occurs {count} times in the"
                " content of the answer; pass a longer text as `after`"
            )
        if not count:
            raise NoAnswer(
                f"the content does not contain {after.decode()!r}. Received:"
                " the content"
                f" {_tail(text.decode(errors='replace'))}"
            )
        end = text.index(after) + len(after)
    for index, (start, stop) in spans.items():
        if start < end < stop:
            raise ValueError(
                f"the text {after.decode()!r} ends inside the token"
                f" {text[start:stop].decode(errors='replace')!r}"
            )
        if start >= end:
            return index
    raise NoAnswer(f"nothing follows {after.decode()!r} in the content")


def _listed_masses(
    position: Position, spellings: dict[str, int]
) -> dict[int, float]:
    """Return the probability of each listed class."""
    if not position.alternatives:
        raise NoAnswer(
            "`top_logprobs` is empty; ask for the most likely tokens, for"
            " example with top_logprobs=20"
        )
    masses: dict[int, float] = {}
    texts: set[str] = set()
    for token in position.entries:
        label = spellings.get(token.text.strip())
        as_bytes = token.utf8.decode(errors="replace").strip()
        is_raw = token.text[:1] in ("Ġ", "▁") and token.text[1:] in spellings
        if is_raw or spellings.get(as_bytes) != label:
            raise ValueError(
                f"the token {token.text!r} (bytes {token.data!r}) is a raw"
                " piece of a vocabulary, or its text contradicts its bytes; ask"
                " the server for text"
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
