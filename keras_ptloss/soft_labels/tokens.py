"""Log-probabilities of tokens from the answers of language models.

Each position of a text has the ids and log-probabilities of the k most likely
tokens, and the remaining probability of all other tokens. Servers write tokens
as ids, as text or as raw pieces of a vocabulary. All tokens of a file are read
in the same way.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_ptloss._progress import Verbose
from keras_ptloss._validation import check_count
from keras_ptloss.soft_labels.layout import NO_ENTRY, REST
from keras_ptloss.soft_labels.responses import (
    UNKNOWN_LOGPROB,
    Key,
    Missing,
    NoAnswer,
    Paths,
    Position,
    Responses,
    as_logprob,
    field,
    only_choice,
    positions,
    read_responses,
)
from keras_ptloss.soft_labels.soft_labels import SoftLabels

# A text may have this many end-of-turn tokens after its answer.
_MAX_END_TOKENS = 2

TokenIds = Mapping[Key, int | None]


@dataclasses.dataclass(eq=False, kw_only=True)
class TokenAnswers(Responses):
    """Log-probabilities of tokens, read from a file of answers.

    Attributes:
        sequences: The token ids of each text.
        targets: For each text `(time, top_k + 1, 2)` float32, as `TopKPTLoss`
            takes them: ids and log-probabilities of the tokens that may follow
            each token. The last entry, of id -1, is all other tokens together.
            An id of -2 means that there is no entry.
        rows: As in `Answers`, like `ids` and `failed`.
        unknown_mass: Mean probability of the listed tokens that are not in the
            vocabulary. It is part of the probability of all other tokens.
    """

    sequences: list[np.ndarray]
    targets: list[np.ndarray]
    unknown_mass: float

    def store(
        self, path: str | os.PathLike[str] | None, **options: Any
    ) -> SoftLabels:
        """Store the targets; warn if answers were left out.

        The store finds each text by its token ids. It appears only when it is
        complete. If the process is killed, read and store the file again.

        Args:
            path: Directory of the new store; None keeps it in memory.
            **options: `dtype`, `teacher_name`, `overwrite` and `verbose` of
                `SoftLabels.from_array`.
        """
        inputs = [sequence.tolist() for sequence in self.sequences]
        return self._store(self.targets, path, inputs=inputs, **options)


def read_tokens(
    files: Paths,
    *,
    top_k: int,
    sequences: Sequence[Sequence[int]],
    tokenizer: Any = None,
    ids: Sequence[str] | None = None,
    missing: Missing = "error",
    verbose: Verbose = "auto",
) -> TokenAnswers:
    """Read the most likely tokens at each position in the texts.

    These are the tokens of the answers (from `logprobs`; with `echo`, the
    prompt tokens are included too), or the prompt tokens from vLLM's
    `prompt_logprobs`. If a server lists fewer tokens than `top_k`, all of them
    are kept.

    Args:
        files: As in `read_answers`.
        top_k: How many tokens to keep at each position.
        sequences: The token ids of each text, in the order of the lines, or of
            `ids`. A text must end with its answer, followed by at most two
            end-of-turn tokens.
        tokenizer: The vocabulary: a dictionary that maps each token to its id,
            or a tokenizer from Hugging Face or KerasHub. Not needed if the
            responses have token ids.
        ids: The `custom_id` of each sequence, if the lines have one.
        missing: As in `read_answers`.
        verbose: As in `read_answers`.

    Raises:
        ValueError: If a line cannot be read, or if its tokens are not those of
            its sequence.

    Example:
        >>> import json, tempfile
        >>> from keras_ptloss.soft_labels import read_tokens
        >>> yes = {"token": " yes", "logprob": -0.7}
        >>> no = {"token": " no", "logprob": -1.4}
        >>> logprobs = {"content": [{**yes, "top_logprobs": [yes, no]}]}
        >>> path = tempfile.mkdtemp() + "/answers.jsonl"
        >>> with open(path, "w") as file:
        ...     json.dump({"choices": [{"logprobs": logprobs}]}, file)
        >>> answers = read_tokens(
        ...     path,
        ...     top_k=2,
        ...     sequences=[[0, 1]],
        ...     tokenizer={"Well": 0, "Ġyes": 1, "Ġno": 2},
        ... )
        >>> print(answers.targets[0][0].round(2))
        [[ 1.   -0.7 ]
         [ 2.   -1.4 ]
         [-1.   -1.36]]
    """
    check_count("top_k", top_k)
    keys: set[Key] = set()
    _, seen = read_responses(
        files, lambda body, _: keys.update(_keys(body)), missing, ids, verbose
    )
    seen.check_order("sequences", len(sequences))
    arrays = [np.array(sequence, int) for sequence in sequences]
    token_ids = _token_ids(keys, tokenizer)
    unknown: list[float] = []
    targets, responses = read_responses(
        files,
        lambda body, row: _targets(
            body, arrays[row], token_ids, top_k, unknown
        ),
        *(missing, ids, verbose),
    )
    return TokenAnswers(
        sequences=[arrays[row] for row in responses.rows],
        targets=targets,
        unknown_mass=float(np.mean(unknown)) if unknown else 0.0,
        **vars(responses),
    )


def _targets(
    response: dict[str, Any],
    sequence: np.ndarray,
    token_ids: TokenIds,
    top_k: int,
    unknown: list[float],
) -> np.ndarray:
    """Return the targets at the positions of a text, `(time, top_k + 1, 2)`."""
    choice = only_choice(response)
    listed = _prompt_logprobs(response, choice)
    if listed is not None:
        start = 0
        entries = _prompt_entries(listed, sequence)
    else:
        found = positions(choice)
        # An empty token at the end means the end of the text.
        if found and not found[-1].token.text:
            del found[-1]
        if not found:
            raise NoAnswer("`logprobs` has no tokens")
        start = _start([token_ids[one.token.key] for one in found], sequence)
        entries = [_entries(one, token_ids, unknown) for one in found]
    targets = np.zeros((len(sequence), top_k + 1, 2), "float32")
    targets[..., 0] = NO_ENTRY
    for place, one in enumerate(entries, start - 1):
        if place >= 0 and one:  # no position predicts a text's first token
            targets[place] = _target(one, top_k)
    return targets


def _prompt_logprobs(
    response: dict[str, Any], choice: dict[str, Any]
) -> list[Any] | None:
    """Return vLLM's `prompt_logprobs` or None."""
    listed = field(response, "prompt_logprobs", list) or field(
        choice, "prompt_logprobs", list
    )
    if listed is not None and choice.get("logprobs") is not None:
        raise ValueError(
            "the response has `prompt_logprobs` and `logprobs`, which are about"
            " different texts; ask for only one of them"
        )
    return listed


def _prompt_entries(
    listed: list[Any], sequence: np.ndarray
) -> list[dict[int, float]]:
    """Read vLLM's `prompt_logprobs`: null, then one object for each token."""
    if len(sequence) != len(listed):
        raise ValueError(
            "`prompt_logprobs` must have one entry for each token of the"
            f" sequence. Received: {len(listed)} for {len(sequence)} tokens"
        )
    entries: list[dict[int, float]] = []
    for token, one in zip(sequence.tolist(), listed, strict=True):
        found: dict[int, float] = {}
        listing = field({"prompt_logprobs": one}, "prompt_logprobs", dict) or {}
        for key in listing:
            if not key.isdecimal():
                raise ValueError(f"`prompt_logprobs` has {key!r} as an id")
            entry = field(listing, key, dict) or {}
            found[int(key)] = as_logprob(entry.get("logprob"), key)
        if (entries and not found) or (found and token not in found):
            raise ValueError(
                f"`prompt_logprobs` has no entry for token {token} at position"
                f" {len(entries)} of its sequence; it belongs to another text"
                " or tokenizer"
            )
        entries.append(found)
    return entries


def _entries(
    position: Position, token_ids: TokenIds, unknown: list[float]
) -> dict[int, float]:
    """Return the log-probability of each token id at a position."""
    found: dict[int, float] = {}
    missed = 0.0
    for token in position.entries:
        number = token_ids[token.key]
        if not token.logprob > UNKNOWN_LOGPROB:
            continue  # servers write this for a probability of 0
        if number is None:
            missed += token.probability
        elif (
            abs(found.setdefault(number, token.logprob) - token.logprob) > 0.01
        ):
            raise ValueError(
                f"`top_logprobs` lists {token.text!r} with two"
                " log-probabilities: the server writes two tokens in the same"
                " way. Ask for tokens by id or bytes"
            )
    unknown.append(missed)
    return found


def _target(entries: dict[int, float], top_k: int) -> np.ndarray:
    """Return `(top_k + 1, 2)`: the most likely tokens, then all others."""
    kept = sorted(entries.items(), key=lambda pair: -pair[1])[:top_k]
    rest = 1.0 - float(np.exp([logprob for _, logprob in kept]).sum())
    target = np.zeros((top_k + 1, 2))
    target[:, 0] = NO_ENTRY
    target[: len(kept)] = kept
    with np.errstate(divide="ignore"):
        target[top_k] = REST, np.log(max(rest, 0.0))
    return target


def _start(own: list[int | None], sequence: np.ndarray) -> int:
    """Return the position in a text at which the answer at its end begins.

    Tokens that are not in the vocabulary match any token.
    """
    said = np.array([-1 if one is None else one for one in own], int)
    if not (said >= 0).any():
        raise ValueError("no token of the answer is in the tokenizer")
    last = len(sequence) - len(said)
    for start in range(last, max(last - _MAX_END_TOKENS, 0) - 1, -1):
        if ((said < 0) | (said == sequence[start : start + len(said)])).all():
            return start
    raise ValueError(
        "a text must end with its answer, followed by at most two tokens. Check"
        " that the sequence has the same text and tokenizer as the answer. If"
        " the server leaves out spaces, ask for tokens by id. Received: the"
        f" answer {np.array2string(said, threshold=8)} for the text"
        f" {np.array2string(sequence, threshold=8)}"
    )


def _keys(response: dict[str, Any]) -> set[Key]:
    """Return all tokens of a response."""
    choice = only_choice(response)
    if _prompt_logprobs(response, choice) is not None:
        return set()
    return {
        token.key
        for position in positions(choice)
        for token in (position.token, *position.alternatives)
    }


def _token_ids(keys: set[Key], tokenizer: Any) -> TokenIds:
    """Return the id of each token of a file, or None if the id is unknown.

    A server gives ids, or text and its bytes, or raw pieces of the vocabulary.
    Many tokens look the same as pieces and as text, so all tokens of a file are
    read in the way that finds more of them in the vocabulary.
    """
    # vLLM's `return_tokens_as_token_ids` writes the ids as text.
    by_id = {
        key: int(key[0][9:])
        if re.fullmatch(r"token_id:\d+", key[0])
        else key[2]
        for key in keys
    }
    if None not in by_id.values():
        return by_id
    if tokenizer is None:
        raise ValueError(
            "The file has tokens without ids. Pass `tokenizer`, the vocabulary."
            f" Received: the token {next(iter(keys))[0]!r}"
        )
    pieces = vocabulary(tokenizer)
    by_bytes = bytes_to_ids(pieces)
    as_text = {
        # A replacement character means that the bytes are unknown.
        key: None
        if "\ufffd" in key[0] and key[1] in (None, key[0].encode())
        else by_bytes.get(key[0].encode() if key[1] is None else key[1])
        for key in keys
    }
    as_pieces = {key: pieces.get(key[0]) for key in keys}
    known_text, known_pieces = (
        sum(one is not None for one in found.values())
        for found in (as_text, as_pieces)
    )
    if not known_text + known_pieces:
        raise ValueError(
            "No token of the file is in the tokenizer. Received: the tokens"
            f" {sorted(key[0] for key in keys)[:10]}"
        )
    differ = [key[0] for key in keys if as_text[key] != as_pieces[key]]
    if known_text == known_pieces and differ:
        raise ValueError(
            "It is not clear whether the tokens of the file are text or raw"
            " pieces of the vocabulary. Ask the server for token ids. Received:"
            f" {sorted(differ)[:10]}"
        )
    return as_text if known_text > known_pieces else as_pieces


def vocabulary(tokenizer: Any) -> dict[Any, int]:
    """Return a dictionary that maps each token of a tokenizer to its id."""
    if isinstance(tokenizer, Mapping):
        return dict(tokenizer)
    if hasattr(tokenizer, "get_vocab"):  # Hugging Face
        return dict(tokenizer.get_vocab())
    if hasattr(tokenizer, "id_to_token"):  # KerasHub
        size = tokenizer.vocabulary_size()
        return {tokenizer.id_to_token(i): i for i in range(size)}
    raise ValueError(
        "`tokenizer` must be a dictionary that maps each token to its id, or a"
        f" tokenizer from Hugging Face or KerasHub. Received: {tokenizer!r}"
    )


def bytes_to_ids(pieces: Mapping[Any, int]) -> dict[bytes, int]:
    """Decode the tokens of a vocabulary to bytes.

    Byte-level BPE (GPT-2, Llama 3, Qwen) writes each byte as a character and a
    space as Ġ; SentencePiece (Llama 2, Gemma) writes a space as ▁ and bytes
    that are not text as <0xE2>.
    """
    texts = [piece for piece in pieces if isinstance(piece, str)]
    is_byte_level = sum("Ġ" in text for text in texts) > sum(
        "▁" in text for text in texts
    )
    alphabet = _byte_alphabet()
    found: dict[bytes, int] = {}
    single: dict[bytes, int] = {}
    for piece, number in pieces.items():
        if not isinstance(piece, str):
            found[bytes(piece)] = number  # tiktoken's
        elif is_byte_level:
            # Tokens added to the vocabulary later may be plain text.
            is_plain = not alphabet.keys() >= set(piece)
            codes = (
                piece.encode() if is_plain else [alphabet[one] for one in piece]
            )
            found[bytes(codes)] = number
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            single[bytes.fromhex(piece[3:5])] = number
        else:
            found[piece.replace("▁", " ").encode()] = number
    return {**single, **found}


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character of byte-level BPE.

    Printable bytes are the same characters. The others are the characters from
    U+0100 on, in order.
    """
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }
