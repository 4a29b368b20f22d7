"""Tokens as APIs write them, and a tokenizer's ids of them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from keras_ptloss._checks import fail

# How byte-level BPE (GPT-2's, Llama 3's) and SentencePiece write a space.
_BYTE_LEVEL, _PIECE = "\u0120", "\u2581"
# vLLM's, with `return_tokens_as_token_ids`.
_ID = "token_id:"


@functools.cache
def _byte_characters() -> list[str]:
    """The character of each byte in byte-level vocabularies.

    Bytes that print are themselves; the others, in order, those from U+0100 on.
    """
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printing]
    return [
        chr(byte) if byte in printing else chr(256 + others.index(byte))
        for byte in range(256)
    ]


class Vocabulary:
    """Finds the id of a token's text, or that there is none.

    Args:
        tokenizer: A tokenizer of KerasHub (it has `token_to_id`), a dictionary
            from token to id, both with the spelling of byte-level BPE or of
            SentencePiece, or a callable from the API's text to an id or None.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._known: dict[tuple[str, bytes | None], int | None] = {}
        self._spell: Callable[[str, bytes], list[str]] = _as_it_is
        self._lookup: Callable[[str], int | None]
        if isinstance(tokenizer, Mapping):
            self._lookup = tokenizer.get
        elif hasattr(tokenizer, "token_to_id"):
            self._lookup = functools.partial(_token_to_id, tokenizer)
        elif callable(tokenizer):
            self._lookup = tokenizer
            return
        else:
            fail(
                "tokenizer",
                "a tokenizer with `token_to_id`, a dictionary, or a callable",
                tokenizer,
            )
        if self._lookup(_BYTE_LEVEL) is not None:
            self._spell = _byte_level
        elif self._lookup(_PIECE) is not None:
            self._spell = _piece

    def find(self, token: str, data: bytes | None) -> int | None:
        """Return the id of a token.

        Args:
            token: As the API shows it.
            data: Its bytes, which say more where they are no text.
        """
        key = (token, data)
        if key not in self._known:  # the same few come again and again
            self._known[key] = self._find(token, data)
        return self._known[key]

    def _find(self, token: str, data: bytes | None) -> int | None:
        if token.startswith(_ID) and token[len(_ID) :].isdecimal():
            return int(token[len(_ID) :])
        for spelling in self._spell(token, data or token.encode()):
            found = self._lookup(spelling)
            if found is not None:
                return int(found)
        return None


def _token_to_id(tokenizer: Any, token: str) -> int | None:
    """The id; None for what the tokenizer does not know."""
    try:
        found = tokenizer.token_to_id(token)
    except (KeyError, ValueError):
        return None
    if found is None or int(found) < 0:
        return None
    # Some have an id for all that is unknown.
    back = getattr(tokenizer, "id_to_token", None)
    if back is not None and back(int(found)) != token:
        return None
    return int(found)


def _as_it_is(token: str, data: bytes) -> list[str]:
    return [token]


def _byte_level(token: str, data: bytes) -> list[str]:
    """A character a byte."""
    characters = _byte_characters()
    return ["".join(characters[byte] for byte in data), token]


def _piece(token: str, data: bytes) -> list[str]:
    spellings = [token.replace(" ", _PIECE)]
    return spellings + [f"<0x{data[0]:02X}>"] * (len(data) == 1)
