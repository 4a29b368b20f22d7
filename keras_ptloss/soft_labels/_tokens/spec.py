"""What a store of tokens holds, and how a token is put on disk."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from keras_ptloss._checks import check_count, fail
from keras_ptloss.losses._events import LARGEST_ID, REST
from keras_ptloss.soft_labels._spec import Format, check_notes, log_distance
from keras_ptloss.soft_labels._tokens.packing import (
    bits_of,
    pack,
    packed_size,
    unpack,
)

# The id of entries that are none, as `TopKPTLoss` has it.
PADDING = REST - 1


@dataclasses.dataclass(frozen=True)
class TokenLabelSpec:
    """What a store of tokens holds; kept in it.

    Of each token `top_k` ids, packed to `ceil(log2(vocabulary_size))` bits and
    exact, their natural log-probabilities and that of all other tokens
    together, in float16. So rounded, `log p` is off by `|log p| / 2048` at most
    (or 3e-8), a distribution by 5e-4 times its entropy in nats, as total
    variation; `TokenLabels` has what was measured while writing.

    Args:
        top_k: How many tokens are kept at each position, the likeliest.
        vocabulary_size: Number of token ids, at most 2**24. Needed only where
            the teacher does not give rows of all of them.
        from_logits: Whether the teacher gives logits, not probabilities.
            Log-probabilities are stored of either.
        temperature: Temperature that the teacher's outputs already contain. A
            note for the reader; nothing is rescaled.
        teacher_name: A name for the teacher, checked on resuming.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from keras_ptloss.soft_labels import TokenLabelSpec
        >>> TokenLabelSpec(top_k=128, vocabulary_size=152_000).token_bytes
        546
    """

    top_k: int
    vocabulary_size: int | None = None
    from_logits: bool = False
    temperature: float = 1.0
    teacher_name: str | None = None

    def __post_init__(self) -> None:
        """Check the fields; keep what JSON has, not NumPy's numbers."""
        found = {**check_notes(self), "top_k": check_count("top_k", self.top_k)}
        if self.vocabulary_size is not None:
            self.check_vocabulary(self.vocabulary_size)
            found["vocabulary_size"] = int(self.vocabulary_size)
        for field, value in found.items():
            object.__setattr__(self, field, value)

    def check_vocabulary(self, size: int) -> None:
        """Require a number of ids that fits the other fields."""
        check_count("vocabulary_size", size, at_least=2)
        if size > LARGEST_ID:
            fail("vocabulary_size", f"at most {LARGEST_ID}", size)
        if self.vocabulary_size not in (None, size):
            fail(
                "vocabulary_size", f"the teacher's {size}", self.vocabulary_size
            )
        if self.top_k > size:
            fail("top_k", f"at most the vocabulary's {size}", self.top_k)

    @property
    def token_bytes(self) -> int | None:
        """Bytes of a token on disk; None without `vocabulary_size`."""
        if self.vocabulary_size is None:
            return None
        formats = token_formats(self.top_k, self.vocabulary_size)
        return sum(
            np.dtype(dtype).itemsize * (columns or 1)
            for dtype, columns in formats.values()
        )


class Tokens(NamedTuple):
    """What a teacher says of n tokens.

    Attributes:
        ids: `(n, k)` ints; `PADDING` where there are fewer than k.
        log_values: `(n, k)` natural log-probabilities, 0 where padding.
        log_tail: `(n,)` log of the mass of all other ids.
    """

    ids: Any
    log_values: Any
    log_tail: Any


def token_formats(k: int, vocabulary_size: int) -> dict[str, Format]:
    """Name, dtype and columns of the arrays that have a row a token."""
    size = packed_size(k, bits_of(vocabulary_size))
    return {
        "ids": ("|u1", size),
        "log_values": ("<f2", k),
        "log_tail": ("<f2", None),
    }


# Those that have a row a sequence: its fingerprint, how many tokens it has, and
# how many of them are stored; and which, a bit a token, a byte a row.
SEQUENCE_FORMATS: dict[str, Format] = {
    "fingerprints": ("<u8", None),
    "lengths": ("<u4", None),
    "counts": ("<u4", None),
}
KEPT_FORMATS: dict[str, Format] = {"kept": ("|u1", None)}


def encode_tokens(
    tokens: Tokens, vocabulary_size: int
) -> tuple[dict[str, Any], Any]:
    """The arrays of n tokens, and their total variation `(n,)` from these."""
    absent = tokens.ids < 0
    ids = np.where(absent, 0, tokens.ids)
    # NaN is no logarithm: it says that there is no such entry.
    logs = np.where(absent, np.nan, tokens.log_values)
    with np.errstate(over="ignore"):  # below -65504 is -inf
        arrays = {
            "ids": pack(ids, bits_of(vocabulary_size)),
            "log_values": logs.astype("<f2"),
            "log_tail": tokens.log_tail.astype("<f2"),
        }
    given = {"log_values": tokens.log_values, "log_tail": tokens.log_tail}
    given, read = (
        {**rows, "log_values": np.where(absent, -np.inf, rows["log_values"])}
        for rows in (given, arrays)
    )
    return arrays, log_distance(given, read)


def decode_tokens(arrays: dict[str, Any], vocabulary_size: int) -> Any:
    """Rows `(n, k + 1, 2)` float32, as `TopKPTLoss` takes them."""
    logs = arrays["log_values"].astype("float32")
    count, k = logs.shape
    out = np.empty((count, k + 1, 2), "float32")
    out[:, :k, 0] = unpack(arrays["ids"], bits_of(vocabulary_size), k)
    out[:, :k, 1] = logs
    absent = np.isnan(logs)
    if absent.any():
        out[:, :k][absent] = PADDING, 0
    out[:, k, 0] = REST
    out[:, k, 1] = arrays["log_tail"]
    return out
