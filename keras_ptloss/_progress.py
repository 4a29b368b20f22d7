"""A progress bar for calls that may be slow, drawn by Keras."""

import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeVar

import keras

from keras_ptloss._validation import fail

T = TypeVar("T")
Verbose = Literal["auto"] | bool | int

QUIET_SECONDS = 2.0  # No call should be silent for more than three seconds.


class Progress:
    """A line that says what is being done, with Keras's bar below it.

    With "auto", both appear after two seconds, so that quick calls print
    nothing. After `keras.config.disable_interactive_logging()`, they never
    appear.

    Args:
        what: the text of the line.
        total: number of units; None if unknown.
        unit: name of a unit.
        verbose: "auto", 1 to show the bar at once, or 0.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        *,
        unit: str,
        verbose: Verbose = "auto",
    ) -> None:
        if verbose not in ("auto", 0, 1):
            fail("verbose", '0, 1 or "auto"', verbose)
        self.what, self.verbose = what, verbose
        self.begin = time.perf_counter()
        self.bar = keras.utils.Progbar(total, unit_name=unit)
        self.shown = False
        self.done = 0.0
        self.update(0)

    def update(
        self, done: float, total: int | None = None, *, at_once: bool = False
    ) -> None:
        """Show how much is done.

        Args:
            done: number of units.
            total: the new total, or None to keep the old one.
            at_once: whether "auto" shows the bar without waiting.
        """
        self.done = max(done, self.done)
        if total is not None:
            self.bar.target = total
        if not self.shown:
            slow = time.perf_counter() - self.begin > QUIET_SECONDS or at_once
            useful = slow and self.done != self.bar.target
            logging = keras.config.is_interactive_logging_enabled()
            if not (self.verbose == 1 or (self.verbose and useful and logging)):
                return
            print(self.what, flush=True)
            self.shown = True
        self.bar.update(self.done, finalize=False)

    def close(self) -> None:
        """Draw the full bar, and end its line."""
        if self.shown:
            # The work may have had fewer units than expected.
            self.bar.target = self.done
            self.bar.update(self.done, finalize=True)


def track(
    items: Iterable[T],
    what: str,
    total: int | None,
    *,
    unit: str = "part",
    verbose: Verbose = "auto",
) -> Iterator[T]:
    """Yield items while a `Progress` counts them."""
    progress = Progress(what, total, unit=unit, verbose=verbose)
    for done, item in enumerate(items, 1):
        yield item
        progress.update(done)
    progress.close()


def predict(model: keras.Model, x: Any, *, verbose: Verbose = "auto") -> Any:
    """Return `model.predict(x)`, and show a `Progress`."""
    callback = _Batches(verbose)
    return model.predict(x, verbose=0, callbacks=[callback])


class _Batches(keras.callbacks.Callback):
    """Shows how many batches `predict` has finished."""

    def __init__(self, verbose: Verbose) -> None:
        super().__init__()
        self.verbose = verbose

    def on_predict_begin(self, logs: Any = None) -> None:
        """Start the bar."""
        self.progress = Progress(
            f"Running the model {self.model.name!r}",
            self.params["steps"],
            unit="step",
            verbose=self.verbose,
        )

    def on_predict_batch_end(self, batch: int, logs: Any = None) -> None:
        """Update the bar."""
        self.progress.update(batch + 1)

    def on_predict_end(self, logs: Any = None) -> None:
        """End the bar."""
        self.progress.close()


class Epochs(keras.callbacks.Callback):
    """Counts the training of a model as one unit, updated after each epoch."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self.progress = progress

    def on_train_begin(self, logs: Any = None) -> None:
        """Show the bar, because compiling a model may take some seconds."""
        self.before = self.progress.done
        self.progress.update(self.before, at_once=True)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Update the bar."""
        share = (epoch + 1) / self.params["epochs"]
        self.progress.update(self.before + share)
