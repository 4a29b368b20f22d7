"""The one rule by which tokens, JSON keys and CSV columns name classes."""

import collections
import re
import unicodedata
from collections.abc import Callable, Iterable

# Columns and keys that name the example; of several, the first counts.
KEYS = ("custom_id", "id", "fingerprint")
# Tokenizers write a space as U+2581 (SentencePiece) or U+0120, and a newline as
# U+010A (byte-level BPE, as in GPT-2).
_SPACES = re.compile("[\\s\u2581\u0120\u010a]+")
# And this before a word's rest (WordPiece).
_REST = "##"


class ClassNames:
    """Finds the class that a text names.

    Letter case, spaces at the ends and tokenizers' marks do not matter, except
    where two classes would become one: between `"US"` and `"us"` the text has
    to decide, and `"Us"` is neither.

    Args:
        names: One different name per class.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self._found: dict[str, int | None] = {}
        self._steps = [
            (fold, self._unique(fold)) for fold in (str, _bare, _folded)
        ]

    def find(self, text: str) -> int | None:
        """Return the index of the class; None if no class is meant."""
        # The same few texts are asked for on every row.
        if text not in self._found:
            steps = (classes.get(fold(text)) for fold, classes in self._steps)
            known = (index for index in steps if index is not None)
            self._found[text] = next(known, None)
        return self._found[text]

    def nested(self) -> bool:
        """Whether a class's name is a part of another's."""
        names = [_folded(name) for name in self.names]
        joined = "\n".join(names)
        return any(joined.count(name) > 1 for name in names)

    def _unique(self, fold: Callable[[str], str]) -> dict[str, int]:
        keys = [fold(name) for name in self.names]
        counts = collections.Counter(keys)
        return {
            key: index
            for index, key in enumerate(keys)
            # A class of marks only is found by its exact name.
            if counts[key] == 1 and (key or fold is str)
        }


def _bare(text: str) -> str:
    """Without spaces at the ends and without marks."""
    text = _SPACES.sub(" ", unicodedata.normalize("NFC", text)).strip()
    return text.removeprefix(_REST).strip()


def _folded(text: str) -> str:
    return _bare(text).casefold()


def key_of(name: str) -> str:
    """A column's or key's name as it would stand in `KEYS`."""
    return name.strip().casefold()


def shorten(items: Iterable[str], limit: int = 8) -> str:
    """List names for an error: the first few, and how many more there are."""
    shown = [repr(item) for item in items]
    more = len(shown) - limit
    return ", ".join(shown[:limit]) + (f" and {more} more" if more > 0 else "")


def repeated(names: Iterable[str]) -> list[str]:
    """Names that occur more than once, in the order of the first."""
    counts = collections.Counter(names)
    return [name for name, count in counts.items() if count > 1]
