"""A progress bar for runs of more than some seconds."""

import sys
import time
from typing import Any

import keras

from keras_ptloss._checks import fail


class Progress:
    """Shows a bar on a terminal once a run takes more than some seconds.

    Args:
        verbose: as in Keras: 1 or True shows it at once, 0 or False never,
            "auto" or None on a terminal.
        patience: seconds before it appears.

    Raises:
        ValueError: if `verbose` is none of these.
    """

    def __init__(self, verbose: Any, patience: float = 3.0) -> None:
        on_terminal = verbose is None or verbose == "auto"
        if not on_terminal and verbose not in (0, 1):
            fail("verbose", '0, 1, True, False, "auto" or None', verbose)
        self._verbose = None if on_terminal else bool(verbose)
        self._patience = patience
        self._start = time.perf_counter()
        self._bar: Any = None
        self._done = self._total = 0

    def update(self, done: int, total: int) -> None:
        """Say that `done` of `total` steps are done."""
        self._done, self._total = done, total
        if self._verbose is False:
            return
        waited = time.perf_counter() - self._start
        wanted = self._verbose or (
            waited > self._patience and sys.stdout.isatty()
        )
        if self._bar is None and wanted:
            self._bar = keras.utils.Progbar(total, unit_name="trial")
        if self._bar is not None:
            self._bar.update(done, finalize=done == total)

    def close(self) -> None:
        """End the line of a bar whose run needed fewer steps than it might."""
        if self._bar is not None and self._done < self._total:
            self._bar.update(self._done, finalize=True)
