"""The answers of language models, in the forms in which their APIs give them.

An answer is a row of tokens, its positions; each has a list of the tokens that
were likeliest there. Read are chat completions, completions and responses of
OpenAI and of those who follow it, whole or in parts, lines of a batch job's
output, and dictionaries from token id to `Logprob` as vLLM writes them.
"""

import dataclasses
from typing import Any

from keras_ptloss.soft_labels._names import KEYS, key_of
from keras_ptloss.soft_labels._numbers import RowProblem, number, probability


@dataclasses.dataclass(frozen=True)
class Position:
    """The likeliest tokens at one position of an answer.

    Args:
        listed: `(token, probability)` of each; no other token is likelier
            than the least of them.
        token: The token that the answer has here; None if unknown.
        probability: Its probability.
    """

    listed: tuple[tuple[str, float], ...]
    token: str | None = None
    probability: float = 0.0

    def tokens(self) -> tuple[tuple[str, float], ...]:
        """All tokens; the answer's own may be less likely than the listed."""
        if self.token is None or self.token in dict(self.listed):
            return self.listed
        return (*self.listed, (self.token, self.probability))


def unpack_batch(
    record: Any, keys: tuple[str, ...] = KEYS[:1]
) -> tuple[str | None, Any, str | None]:
    """Return a line's id, what else it holds, and how it failed if so.

    Args:
        record: The line.
        keys: Those of `KEYS` that are no class.
    """
    if not isinstance(record, dict):
        return None, record, None
    answers = (record.get(key) for key in ("choices", "output", "response"))
    if any(isinstance(answer, (list, dict)) for answer in answers):
        # The API's own name of what it returned.
        keys = tuple(key for key in keys if key != "id")
    held = {k: value for k, value in record.items() if key_of(k) not in keys}
    names = {key_of(k): value for k, value in record.items() if k not in held}
    named = (key for key in keys if names.get(key) is not None)
    custom_id, key = None, next(named, None)
    if key is not None:
        custom_id = names[key]
        if isinstance(custom_id, bool) or not isinstance(custom_id, (str, int)):
            raise RowProblem(f"has the {key} {custom_id!r}, not a text")
        custom_id = str(custom_id)
    error, response = record.get("error"), record.get("response")
    if error and isinstance(error, (dict, str)):
        return custom_id, None, _reason(error)
    if not isinstance(response, dict):
        # Where a request has never run, its response is null.
        failed = "response" in record and response is None
        return custom_id, held, "no response" if failed else None
    status, body = response.get("status_code", 200), response.get("body")
    error = body.get("error") if isinstance(body, dict) else "no body"
    if status != 200 or error:
        return custom_id, None, f"status {status}, {_reason(error)}"
    return custom_id, body, None


def _reason(error: Any) -> str:
    if isinstance(error, dict):
        error = error.get("message") or error.get("code")
    return str(error)[:200] if error else "no reason given"


def positions(record: Any) -> list[Position] | None:
    """Read the positions of an answer; None if the record is of no such form.

    Raises:
        RowProblem: If it is of one, but cannot be read.
    """
    if isinstance(record, list):
        return _of_list(record)
    if not isinstance(record, dict):
        return None
    if isinstance(choices := record.get("choices"), list):
        if len(choices) != 1 or not isinstance(choices[0], dict):
            raise RowProblem(f"has {len(choices)} choices, not 1 (ask for n=1)")
        return _of_logprobs(choices[0].get("logprobs"))
    if isinstance(output := record.get("output"), list):
        return _of_responses(output)
    if isinstance(logprobs := record.get("logprobs"), (dict, list)):
        return _of_logprobs(logprobs)
    if isinstance(record.get("token"), str):
        return [_content(record)]
    if any(
        isinstance(record.get(key), (list, dict))
        for key in ("content", "top_logprobs", "token_logprobs")
    ):
        return _of_logprobs(record)
    if _is_by_id(record):
        return [_by_id(record)]
    return None


def _of_list(items: list[Any]) -> list[Position] | None:
    if not any(isinstance(item, dict) for item in items):
        return None
    if all(isinstance(item, dict) for item in items):
        if any("top_logprobs" in item for item in items):
            return [_content(item) for item in items]
        if all(map(_is_by_id, items)):
            return [_by_id(item) for item in items]
    return [Position(tuple(_pair(item) for item in items))]


def _of_logprobs(logprobs: Any) -> list[Position]:
    """Read what stands under the key `logprobs`."""
    if isinstance(logprobs, list):
        found = _of_list(logprobs)
        if found is None and logprobs:
            raise RowProblem(f"has {logprobs!r} where tokens were expected")
        return found or []
    if not isinstance(logprobs, dict):
        raise RowProblem(
            "has no log-probabilities (ask the API for `logprobs` and"
            " `top_logprobs`)"
        )
    if "content" in logprobs:
        # Null where the model refused to answer.
        return [_content(item) for item in _list(logprobs["content"])]
    top = logprobs.get("top_logprobs")
    if isinstance(top, dict):
        return [Position(_pairs(top))]
    if "tokens" in logprobs:
        return _completion(logprobs)
    if not isinstance(top, list):
        return [Position(_pairs(logprobs))]
    if any(isinstance(item, dict) and "token" in item for item in top):
        return _of_list(top) or []
    return [Position(_pairs(item)) for item in top]


def _completion(logprobs: dict[str, Any]) -> list[Position]:
    """Read the older form: a list each of tokens, numbers, dictionaries."""
    tokens, own = (
        _list(logprobs.get(key)) for key in ("tokens", "token_logprobs")
    )
    top = _list(logprobs.get("top_logprobs")) or [{}] * len(tokens)
    if not len(tokens) == len(own) == len(top):
        raise RowProblem("has `tokens` and `token_logprobs` of two lengths")
    if None in own:
        # Class names in the prompt would be taken for the answer.
        raise RowProblem("holds its prompt too (ask without `echo`)")
    return [
        Position(_pairs(alternatives or {}), *_pair_of(token, logprob))
        for token, logprob, alternatives in zip(tokens, own, top, strict=True)
    ]


def _of_responses(output: list[Any]) -> list[Position]:
    """Read the messages of a response; others are calls and reasoning."""
    parts = [
        part
        for item in output
        if isinstance(item, dict) and item.get("type") == "message"
        for part in _list(item.get("content"))
        if isinstance(part, dict) and part.get("type") == "output_text"
    ]
    if parts and not any(part.get("logprobs") for part in parts):
        return _of_logprobs(None)
    return [
        _content(item) for part in parts for item in _list(part.get("logprobs"))
    ]


def _content(item: Any) -> Position:
    """Read `{"token": ..., "logprob": ..., "top_logprobs": [...]}`."""
    top = item.get("top_logprobs") if isinstance(item, dict) else None
    return Position(tuple(_pair(other) for other in _list(top)), *_pair(item))


def _by_id(record: dict[str, Any]) -> Position:
    """Read `{"9642": {"logprob": ..., "decoded_token": ...}, ...}`."""
    pairs = []
    for key, value in record.items():
        token = value.get("decoded_token")
        token = token if isinstance(token, str) else key
        pairs.append(_pair_of(token, value["logprob"]))
    return Position(tuple(pairs))


def _list(value: Any) -> list[Any]:
    """Require a list; null is an empty one."""
    if value is not None and not isinstance(value, list):
        raise RowProblem(f"has {value!r} where a list was expected")
    return value or []


def _is_by_id(record: dict[str, Any]) -> bool:
    found = [isinstance(v, dict) and "logprob" in v for v in record.values()]
    return bool(found) and all(found)


def _pairs(record: Any) -> tuple[tuple[str, float], ...]:
    if not isinstance(record, dict):
        raise RowProblem(f"has {record!r} where tokens were expected")
    return tuple(_pair_of(token, number) for token, number in record.items())


def _pair(item: Any) -> tuple[str, float]:
    if not isinstance(item, dict) or not {"token", "logprob"} <= set(item):
        raise RowProblem(f'has no "token" and "logprob" in {item}')
    return _pair_of(item["token"], item["logprob"])


def _pair_of(token: Any, value: Any) -> tuple[str, float]:
    if not isinstance(token, str):
        raise RowProblem(f"has the token {token!r}, not a text")
    if value is None:
        raise RowProblem(f"has no log-probability of {token!r}")
    try:
        return token, probability(number(value))
    except RowProblem as problem:
        raise RowProblem(f"{problem} for {token!r}") from None
