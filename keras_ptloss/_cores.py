"""Rows shared out to the cores of a CPU, block by block."""

import concurrent.futures
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_ptloss._backend import on_cpu, replicas


def block_elements() -> int:
    """Return how many float64 elements one compiled call should work on.

    A block of 192 KiB on a CPU: the solver's arrays then stay near a core, XLA
    does not share loops so short out to threads, which costs more time of all
    than it saves, and starting each loop costs little. Enough to fill an
    accelerator, whose arrays then take some 32 MiB each.
    """
    return 3 * 2**13 if on_cpu() else 2**22


def by_blocks(
    function: Callable[..., Any], blocks: Sequence[tuple[Any, ...]]
) -> list[Any]:
    """Return `function(*block)` for each block of rows.

    A compiled block keeps one core of a CPU busy (`block_elements`), so that
    the blocks are shared out to threads, one a core. The first goes ahead: it
    may have to be compiled. In turn on an accelerator, on PyTorch, which
    shares out each operation, and wherever something is set for this thread
    alone, a `keras.distribution` or a strategy of TensorFlow.
    """
    first = [function(*block) for block in blocks[:1]]
    alone = (
        keras.backend.backend() == "torch"
        or not on_cpu()
        or keras.distribution.distribution() is not None
        or replicas() > 1
    )
    if alone or len(blocks) < 3:
        return first + [function(*block) for block in blocks[1:]]
    return first + list(_threads().map(lambda b: function(*b), blocks[1:]))


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    """Return one thread for each core that this process may use.

    They are kept: new ones for each call would each leave memory behind.
    """
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count()
    return concurrent.futures.ThreadPoolExecutor(cores)


if hasattr(os, "register_at_fork"):
    # A forked process has none of them, and would wait for them.
    os.register_at_fork(after_in_child=_threads.cache_clear)
