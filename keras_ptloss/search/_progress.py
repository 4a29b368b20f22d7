"""A progress bar for runs of more than some seconds."""

import sys
import time
from typing import Any

import keras


class Progress:
    """Shows a bar on a terminal once a run takes more than some seconds.

    Args:
        verbose: True shows it at once, False never, None on a terminal.
        patience: seconds before it appears.
    """

    def __init__(self, verbose: bool | None, patience: float = 3.0) -> None:
        self._verbose = verbose
        self._patience = patience
        self._start = time.perf_counter()
        self._bar: Any = None

    def update(self, done: int, total: int) -> None:
        """Say that `done` of `total` steps are done."""
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
