"""Lists of tokens and log-probabilities, checked and cut to the likeliest."""

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from keras_ptloss._checks import SUM_TOLERANCE
from keras_ptloss.losses._events import REST
from keras_ptloss.soft_labels._numbers import ROUNDING
from keras_ptloss.soft_labels._tokens.spec import (
    PADDING,
    TokenLabelSpec,
    Tokens,
)

Refuse = Callable[[int, str], NoReturn]


def tokens_of_entries(
    ids: Any, logs: Any, spec: TokenLabelSpec, refuse: Refuse
) -> Tokens:
    """Keep the k likeliest of each position's entries; the rest is the tail.

    Args:
        ids: `(n, entries)` ints; -1 is the tail itself, lower ids padding.
        logs: `(n, entries)` natural log-probabilities.
        spec: Of the store, with `vocabulary_size`: how many are kept. Positions
            that have fewer are padded.
        refuse: Raises the error for a position.

    Raises:
        ValueError: By `refuse`, if a position is no part of a distribution.
    """
    k = spec.top_k
    wide = ((0, 0), (0, max(k - ids.shape[1], 0)))
    ids = np.pad(ids, wide, constant_values=PADDING)
    logs, known, given = np.pad(logs, wide), ids >= 0, ids == REST
    logs = np.where(known | given, logs, -np.inf).astype("float64")
    _check(ids, logs, int(spec.vocabulary_size or 0), refuse)
    logs = np.minimum(logs, 0.0)  # what rounding has added to 1
    keys = np.where(known, logs, -np.inf)
    # Among those of no probability, entries are before what is none.
    order = np.lexsort((~known, -keys), axis=-1)
    ids, keys, known, mine = (
        np.take_along_axis(rows, order, axis=-1)
        for rows in (ids, keys, known, np.where(given, logs, -np.inf))
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        left = np.log(np.maximum(1 - np.exp(keys[:, :k]).sum(-1), 0))
        others = np.concatenate([keys[:, k:], mine], axis=-1)
        summed = np.logaddexp.reduce(others, axis=-1, initial=-np.inf)
    tail = np.where(given.any(-1), summed, left)
    if k == spec.vocabulary_size:
        tail = np.where(known[:, :k].all(-1), -np.inf, tail)
    return Tokens(
        np.where(known, ids, PADDING)[:, :k],
        np.where(known, keys, 0.0)[:, :k],
        tail,
    )


def _check(ids: Any, logs: Any, vocabulary_size: int, refuse: Refuse) -> None:
    """Refuse what is no part of a distribution."""
    order = np.sort(np.where(ids < REST, PADDING, ids), axis=-1)
    twice = np.zeros(ids.shape, bool)
    twice[:, 1:] = (order[:, 1:] == order[:, :-1]) & (order[:, 1:] >= REST)
    with np.errstate(over="ignore"):
        mass = np.exp(logs).sum(-1, keepdims=True)
    whole = (ids == REST).any(-1, keepdims=True)
    for wrong, values, what in (
        (np.isnan(logs), logs, "a log-probability of {}"),
        (logs > ROUNDING, logs, "a log-probability of {:.6g}, above 0"),
        (
            ids >= vocabulary_size,
            ids,
            f"the id {{}}, and vocabulary_size is {vocabulary_size}",
        ),
        (twice, order, "the id {} twice"),
        (mass > 1 + SUM_TOLERANCE, mass, "probabilities that add up to {:.6g}"),
        (
            whole & (1 - mass > SUM_TOLERANCE),
            mass,
            "probabilities that with their tail (id -1) add up to {:.6g}",
        ),
    ):
        if wrong.any():
            value = values[wrong][0]
            refuse(int(np.argmax(wrong.any(-1))), "has " + what.format(value))
