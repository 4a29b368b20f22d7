"""What every way of searching is given, and what it returns."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

from keras_ptloss._correction import Correction
from keras_ptloss.search._examples import Examples
from keras_ptloss.search._objectives import Objective
from keras_ptloss.search._progress import Progress


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """What a strategy found.

    Attributes:
        correction: of the teacher; the search says whether it gives logits.
        trials: what was tried, column by column.
        per_class: whether it fitted parameters of single classes.
        solves: proxy teachers computed, one a row and trial.
        unconverged: those that did not converge.
        notes: what the user should know of it.
    """

    correction: Correction
    trials: dict[str, list[Any]]
    per_class: bool
    solves: int = 0
    unconverged: int = 0
    notes: tuple[str, ...] = ()


@runtime_checkable
class Strategy(Protocol):
    """A way to search: an object that holds its own arguments only."""

    @property
    def name(self) -> str:
        """How results call it."""

    @property
    def objective(self) -> str:
        """The objective that it minimises unless another is given."""

    @property
    def several(self) -> bool:
        """Whether it takes several teachers, and other classes."""

    @property
    def by_class(self) -> bool:
        """Whether it fits numbers of single classes, which may be rare."""

    def run(
        self,
        examples: Examples,
        objective: Objective,
        *,
        seed: int,
        progress: Progress,
    ) -> Found:
        """Search on the examples."""
