"""Log-probabilities of tokens from the answers of language models.

Each position of a text has the ids and log-probabilities of the k most likely
tokens, and the remaining probability of all other tokens.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_ptloss._progress import Verbose
from keras_ptloss._validation import check_count, fail
from keras_ptloss.soft_labels.answers import (
    UNKNOWN_LOGPROB,
    Missing,
    NoAnswer,
    Paths,
    Position,
    Responses,
    Token,
    as_logprob,
    field,
    only_choice,
    positions,
    read_responses,
)
from keras_ptloss.soft_labels.outputs import NO_ENTRY, REST
from keras_ptloss.soft_labels.soft_labels import PathLike, SoftLabels

_MAX_END_TOKENS = 2  # end-of-turn tokens that may follow the answer

TokenIds = Mapping[Token, int | None]  # by `Token.key`


@dataclasses.dataclass(eq=False, kw_only=True)
class TokenAnswers(Responses):
    """Log-probabilities of tokens, read from a file of answers.

    Attributes:
        sequences: The token ids of each text.
        targets: For each text `(time, top_k + 1, 2)` float32, events (see
            `SoftLabels`) of the tokens that may follow each token.
        rows: As in `Answers`, like `ids` and `failed`.
        unknown_mass: Mean probability of the listed tokens that are not in the
            vocabulary. It is part of the probability of all other tokens.
    """

    sequences: list[np.ndarray]
    targets: list[np.ndarray]
    unknown_mass: float

    def store(self, path: PathLike | None, **options: Any) -> SoftLabels:
        """Store the targets; warn if answers were left out.

        The store finds each text by its token ids. The arguments are those of
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

    These are the tokens of the answers (`logprobs`, with `echo` also of the
    prompt), or of the prompt (vLLM's `prompt_logprobs`). If a server lists
    fewer than `top_k` tokens, all of them are kept.

    Args:
        files: As in `read_answers`.
        top_k: How many tokens to keep at each position.
        sequences: The token ids of each text, in the order of the lines, or of
            `ids`. A text must end with its answer, followed by at most two
            end-of-turn tokens.
        tokenizer: A dictionary that maps each token to its id, or a tokenizer
            from Hugging Face or KerasHub. Not needed if the responses have
            token ids.
        ids: The `custom_id` of each sequence, if the lines have one.
        missing: As in `read_answers`.
        verbose: As in `read_answers`.

    Raises:
        ValueError: As in `read_answers`, or if the tokens of an answer are not
            those of its sequence.

    Example:
        >>> import json, tempfile
        >>> from keras_ptloss.soft_labels import read_tokens
        >>> yes = {"token": " yes", "logprob": -0.7}
        >>> no = {"token": " no", "logprob": -1.4}
        >>> logprobs = {"content": [{**yes, "top_logprobs": [yes, no]}]}
        >>> path = tempfile.mkdtemp() + "/answers.jsonl"
        >>> with open(path, "w") as file:
        ...     json.dump({"choices": [{"logprobs": logprobs}]}, file)
        >>> vocabulary = {"Well": 0, "Ġyes": 1, "Ġno": 2}
        >>> answers = read_tokens(
        ...     path, top_k=2, sequences=[[0, 1]], tokenizer=vocabulary
        ... )
        >>> print(answers.targets[0][0].round(2))
        [[ 1.   -0.7 ]
         [ 2.   -1.4 ]
         [-1.   -1.36]]
    """
    check_count("top_k", top_k)
    keys: set[Token] = set()
    _, seen = read_responses(
        files, lambda body, _: keys.update(_keys(body)), missing, ids, verbose
    )
    seen.check_order("sequences", len(sequences))
    arrays = [np.array(sequence, int) for sequence in sequences]
    token_ids = _token_ids(keys, tokenizer)
    unknown: list[float] = []

    def read(response: dict[str, Any], row: int) -> np.ndarray:
        return _targets(response, arrays[row], token_ids, top_k, unknown)

    targets, responses = read_responses(files, read, missing, ids, verbose)
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
        if place < 0 or not one:
            continue  # No position predicts the first token of a text.
        kept = sorted(one.items(), key=lambda pair: -pair[1])[:top_k]
        rest = 1.0 - float(np.exp([logprob for _, logprob in kept]).sum())
        targets[place, : len(kept)] = kept
        with np.errstate(divide="ignore"):
            targets[place, top_k] = REST, np.log(max(rest, 0.0))
    return targets


def _prompt_logprobs(
    response: dict[str, Any], choice: dict[str, Any]
) -> list[Any] | None:
    """Return vLLM's `prompt_logprobs` or None."""
    listed = field(response, "prompt_logprobs", list)
    listed = listed or field(choice, "prompt_logprobs", list)
    if listed is not None and choice.get("logprobs") is not None:
        raise ValueError(
            "the response has `prompt_logprobs` and `logprobs`; ask for one"
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
            entry = field(listing, key, dict) or {}
            found[int(key)] = as_logprob(entry.get("logprob"), key)
        # Only the first position may have no entries.
        if token not in found and (found or entries):
            raise ValueError(
                f"`prompt_logprobs` has no entry for token {token} at position"
                f" {len(entries)} of its sequence"
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
        number, logprob = token_ids[token.key], token.logprob
        if not logprob > UNKNOWN_LOGPROB:
            continue  # servers write this for a probability of 0
        if number is None:
            missed += token.probability
        elif abs(found.setdefault(number, logprob) - logprob) > 0.01:
            raise ValueError(
                f"`top_logprobs` lists {token.text!r} with two"
                " log-probabilities: the server writes two tokens in the same"
                " way. Ask for tokens by id or bytes"
            )
    unknown.append(missed)
    return found


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
    text, answer = (np.array2string(a, threshold=8) for a in (sequence, said))
    raise ValueError(
        "a text must end with its answer, followed by at most two tokens. If"
        " both have the same tokenizer, ask the server for tokens by id."
        f" Received: the answer {answer} for the text {text}"
    )


def _keys(response: dict[str, Any]) -> set[Token]:
    """Return all tokens of a response, without their probabilities."""
    choice = only_choice(response)
    if _prompt_logprobs(response, choice) is not None:
        return set()
    return {
        token.key
        for position in positions(choice)
        for token in (position.token, *position.alternatives)
    }


def _token_ids(keys: set[Token], tokenizer: Any) -> TokenIds:
    """Return the id of each token of a file, or None if the id is unknown.

    A server gives ids, or text and its bytes, or raw pieces of the vocabulary.
    Many tokens look the same as pieces and as text, so all tokens of a file are
    read in the way that finds more of them in the vocabulary.
    """
    by_id = {key: key.id for key in keys}
    for key in keys:
        if re.fullmatch(r"token_id:\d+", key.text):  # an option of vLLM
            by_id[key] = int(key.text[9:])
    if None not in by_id.values():
        return by_id
    pieces = vocabulary(tokenizer)
    as_pieces = {key: pieces.get(key.text) for key in keys}
    by_bytes = bytes_to_ids(pieces)
    as_text = {key: by_bytes.get(key.utf8) for key in keys}
    for key in keys:
        # A replacement character in place of bytes says nothing about them.
        if "\ufffd" in key.text and key.utf8 == key.text.encode():
            as_text[key] = None
    unknown_text = list(as_text.values()).count(None)
    unknown_pieces = list(as_pieces.values()).count(None)
    if unknown_text == unknown_pieces == len(keys):
        raise ValueError(
            "No token of the file is in the tokenizer. Received:"
            f" {sorted(key.text for key in keys)[:10]}"
        )
    differ = [key.text for key in keys if as_text[key] != as_pieces[key]]
    if unknown_text == unknown_pieces and differ:
        raise ValueError(
            "It is not clear whether the tokens of the file are text or raw"
            " pieces of the vocabulary. Ask the server for token ids. Received:"
            f" {sorted(differ)[:10]}"
        )
    return as_text if unknown_text < unknown_pieces else as_pieces


def vocabulary(tokenizer: Any) -> dict[Any, int]:
    """Return a dictionary that maps each token of a tokenizer to its id."""
    if isinstance(tokenizer, Mapping):
        return dict(tokenizer)
    if hasattr(tokenizer, "get_vocab"):  # Hugging Face
        return dict(tokenizer.get_vocab())
    if hasattr(tokenizer, "id_to_token"):  # KerasHub
        size = tokenizer.vocabulary_size()
        return {tokenizer.id_to_token(i): i for i in range(size)}
    # The file has tokens without ids.
    expected = "a dictionary that maps each token to its id, or a tokenizer"
    fail("tokenizer", f"{expected} from Hugging Face or KerasHub", tokenizer)


def bytes_to_ids(pieces: Mapping[str, int]) -> dict[bytes, int]:
    """Decode the tokens of a vocabulary to bytes.

    Byte-level BPE (GPT-2, Qwen) writes each byte as a character and a space as
    Ġ; SentencePiece (Gemma) a space as ▁ and bytes without text as <0xE2>.
    """
    spaces = Counter(character for piece in pieces for character in piece)
    is_byte_level = spaces["Ġ"] > spaces["▁"]
    alphabet = _byte_alphabet()
    found: dict[bytes, int] = {}
    single: dict[bytes, int] = {}
    for piece, number in pieces.items():
        if is_byte_level:
            if alphabet.keys() >= set(piece):
                found[bytes(alphabet[one] for one in piece)] = number
            else:  # a token that was added to the vocabulary as plain text
                found[piece.encode()] = number
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            single[bytes.fromhex(piece[3:5])] = number
        else:
            found[piece.replace("▁", " ").encode()] = number
    return {**single, **found}


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character of byte-level BPE."""
    # Bytes that are not printable are the characters from U+0100 on, in order.
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }
