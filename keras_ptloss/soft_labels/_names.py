"""The one rule by which tokens, JSON keys and CSV columns name classes."""

import re
import unicodedata
from collections.abc import Callable, Iterable

# What tokenizers write before a word for a space or a newline (byte-level BPE,
# as in GPT-2), and before a word's rest (WordPiece).
_PREFIXES = re.compile("^(?:##|[\\s\u0120\u010a])+")
# SentencePiece writes it for every space.
_SPACE_MARK = "\u2581"


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
        self._steps = [
            (fold, self._unique(fold)) for fold in (str, _bare, _folded)
        ]

    def find(self, text: str) -> int | None:
        """Return the index of the class; None if no class is meant."""
        for fold, classes in self._steps:
            index = classes.get(fold(text))
            if index is not None:
                return index
        return None

    def _unique(self, fold: Callable[[str], str]) -> dict[str, int]:
        classes: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            classes.setdefault(fold(name), []).append(index)
        return {
            key: indices[0]
            for key, indices in classes.items()
            # A class of marks only is found by its exact name.
            if len(indices) == 1 and (key or fold is str)
        }


def _bare(text: str) -> str:
    """Without spaces at the ends and without marks."""
    text = unicodedata.normalize("NFC", text).replace(_SPACE_MARK, " ")
    return " ".join(_PREFIXES.sub("", text).split())


def _folded(text: str) -> str:
    return _bare(text).casefold()


def shorten(items: Iterable[str], limit: int = 8) -> str:
    """List names for an error: the first few, and how many more there are."""
    shown = [repr(item) for item in items]
    more = len(shown) - limit
    return ", ".join(shown[:limit]) + (f" and {more} more" if more > 0 else "")
