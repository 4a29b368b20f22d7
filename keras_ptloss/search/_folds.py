"""Cross-validation: scores of candidates on held-out folds, and the choice."""

import numpy as np


def random_folds(
    examples: int, folds: int, seed: int | list[int]
) -> np.ndarray:
    """Return the fold of each example, `(N,)`, dealt out at random.

    Not stratified: then each held-out fold would have the class frequencies of
    the rows that were fitted, and a fit of mere chance in these frequencies
    would look good (at 6 labels a class it was taken for a gain of .04 nats).
    """
    fold = np.arange(examples) % folds
    np.random.default_rng(seed).shuffle(fold)
    return fold


# Held-out rows that are scored at least, and the most deals it is done in.
ENOUGH, MOST_DEALS = 300, 5


def parts_of(
    examples: int, folds: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the rows that are fitted and those held out, part by part.

    Of few examples the folds are dealt out several times: one deal of 100 is a
    lottery (`benchmarks/results/choice.md`).

    Args:
        examples: N.
        folds: parts of one deal.
        seed: of the deals.
    """
    deals = min(MOST_DEALS, max(1, -(-ENOUGH // examples)))
    parts = []
    for deal in range(deals):
        fold = random_folds(examples, folds, [seed, deal] if deal else seed)
        parts += [
            (np.flatnonzero(fold != k), np.flatnonzero(fold == k))
            for k in range(folds)
        ]
    return parts


def choose(
    losses: np.ndarray, kinds: np.ndarray, parameters: np.ndarray
) -> int:
    """Choose a candidate: the simplest kind that may as well be the best.

    Each kind stands with its best penalty. Among the kinds whose mean loss is
    within one standard error of the lowest, that of their paired difference,
    the one with the fewest parameters is chosen: Breiman's rule of one
    standard error (1984) on the differences of single examples, of which there
    are many, and not on the means of some folds.

    Args:
        losses: held-out losses, `(candidates, N)`.
        kinds: the kind of each candidate, `(candidates,)`.
        parameters: numbers fitted by each candidate, `(candidates,)`.

    Returns:
        The candidate.
    """
    mean = losses.mean(axis=1)
    best_of_kind = [
        min(np.flatnonzero(kinds == kind), key=lambda i: mean[i])
        for kind in np.unique(kinds)
    ]
    best = int(np.argmin(mean))
    behind = standard_error(losses - losses[best])
    within = [i for i in best_of_kind if mean[i] - mean[best] <= behind[i]]
    return int(min(within, key=lambda i: parameters[i]))


def standard_error(differences: np.ndarray) -> np.ndarray:
    """Return the standard error of the mean over the last axis."""
    count = differences.shape[-1]
    return np.asarray(differences.std(axis=-1, ddof=1) / np.sqrt(count))
