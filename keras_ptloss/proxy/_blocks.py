"""The solver on NumPy arrays: blocks of rows, all of one compiled shape."""

from typing import Any

import numpy as np
import scipy.special

from keras_ptloss._backend import on_numpy
from keras_ptloss._cores import block_elements, by_blocks
from keras_ptloss.proxy._newton import SURE, Solution, newton
from keras_ptloss.proxy._stationarity import Layout
from keras_ptloss.proxy._table import table_of

# `newton`'s, wherever the caller does not ask for others.
TOLERANCE = 1e-12
MAX_STEPS = 100

# Fewer numbers side by side than this take longer each: in the first layout
# rows, in the last one classes, so that fewer rows do.
LEAST_ROWS = {0: 128, -1: 64}

numpy_newton = on_numpy(newton, rows=(0,))


def solve_newton(
    teacher: np.ndarray,
    epsilon: np.ndarray,
    *,
    at_once: int | None = None,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
) -> Solution:
    """Run `newton` on blocks of rows of one compiled shape.

    Args:
        teacher: `(N, C)`.
        epsilon: `(M,)`, `(C, M)`, or several of them: `(K, 1, M)`,
            `(K, C, M)`.
        at_once: of several, how many a block is solved for; a divisor of K,
            which is meant by None.
        tolerance: as in `newton`.
        max_steps: as in `newton`.

    Returns:
        A `Solution` of `(N, C)`, `(N,)`, `(N,)`, `(N,)`; with several epsilon
        `(K, N, C)`, `(K, N)`, `(K, N)`, `(K, N)`.
    """
    if not np.any(epsilon):
        return unperturbed(teacher, epsilon.shape[: max(epsilon.ndim - 2, 0)])
    several = epsilon.ndim == 3
    coefficients = np.moveaxis(epsilon, -1, 0)  # (M,), (M, C), (M, K, 1 or C)
    if not several:
        coefficients = coefficients.reshape(len(coefficients), 1, -1)
    times = (at_once or len(epsilon)) if several else 1
    groups = np.split(coefficients, coefficients.shape[1] // times, axis=1)
    blocks = row_blocks(teacher, times=times)
    shared = coefficients.shape[2] == 1
    table = shared and len(coefficients) <= SURE
    tables = [table_of(g[:, :, 0].T) if table else () for g in groups]
    parts = by_blocks(
        lambda *block: _solve_block(
            *block, tolerance=tolerance, max_steps=max_steps
        ),
        [
            (*block, *group)
            for group in zip(groups, tables, strict=True)
            for block in blocks
        ],
    )
    solved = [
        [
            np.concatenate(part, axis=1)[:, : len(teacher)]
            for part in zip(*parts[first : first + len(blocks)], strict=True)
        ]
        for first in range(0, len(parts), len(blocks))
    ]
    fields = [np.concatenate(field) for field in zip(*solved, strict=True)]
    return Solution(*(field if several else field[0] for field in fields))


def _solve_block(
    rows: np.ndarray,
    coefficients: np.ndarray,
    table: tuple[np.ndarray, ...],
    **settings: Any,
) -> list[np.ndarray]:
    """Solve rows `(N, C)` for K epsilon, `(M, K, 1 or C)`: `(K, N, ...)`.

    All of them are rows to the compiled function: with axes of their own XLA's
    CPU compiler would not vectorise it.
    """
    times = coefficients.shape[1]
    every = np.tile(rows, (times, 1))
    if times > 1:
        coefficients = np.repeat(coefficients, len(rows), axis=1)
    solution = numpy_newton(every, coefficients, *table, **settings)
    return [x.reshape(times, len(rows), *x.shape[1:]) for x in solution]


def unperturbed(teacher: np.ndarray, several: tuple[int, ...]) -> Solution:
    """Return the solution at epsilon = 0, the teacher: nothing is compiled."""
    q = np.broadcast_to(teacher, (*several, *teacher.shape)).copy()
    loss = scipy.special.entr(q).sum(axis=-1)
    return Solution(q, loss, np.zeros_like(loss), np.zeros(loss.shape, "int32"))


def row_blocks(
    *arrays: np.ndarray, times: int = 1
) -> list[tuple[np.ndarray, ...]]:
    """Cut arrays `(N, C)` into blocks of rows, all of one shape.

    A compiled function serves one shape, and compiling takes longer than most
    solves. Sizes are therefore equal parts of powers of two from 1,024 on, so
    that the folds of a search have that of the whole; the last block is filled
    with uniform rows, which are solved soon.

    Args:
        *arrays: `(N, C)` each.
        times: of how many epsilon each row is worked on at once.

    Returns:
        One block a list entry, a part of each array.
    """
    examples, classes = arrays[0].shape
    least = max(16, -(-LEAST_ROWS[Layout.of(classes).axis] // times))
    most = max(least, block_elements() // (classes * times) // 16 * 16)
    whole = max(1024, 2 ** (examples - 1).bit_length())
    parts = -(-whole // most)
    size = -(-whole // parts // 16) * 16
    missing = -examples % size
    filled = [
        np.concatenate([a, np.full((missing, classes), 1.0 / classes)])
        for a in arrays
    ]
    return [
        tuple(a[start : start + size] for a in filled)
        for start in range(0, examples, size)
    ]
