"""What an import says of itself."""

import dataclasses
from typing import Any

import numpy as np

from keras_ptloss.soft_labels._soft_labels import SoftLabels


@dataclasses.dataclass(frozen=True, eq=False)
class ImportReport:
    r"""The imported store, and what was done to each row.

    Args:
        labels: The store, opened.
        filled: `(N,)` bool, whether classes were missing and filled.
        renormalised: `(N,)` bool, whether the row, filled if need be, did not
            add up to 1 within 0.001 and was divided by its sum.
        empty: `(N,)` bool, whether the row told nothing of any class and
            became uniform (`empty_rows="uniform"` only).
        other: `(N,)` probability that the row gives to tokens that are no
            class. Rows in which it is large say little of the classes.
        ignored: Columns, keys or tokens that are no class, sorted.
        failed: Ids (or lines) of requests that failed, in the order of the
            data set (`empty_rows="uniform"` only); they are `empty` too. Of
            Parquet files, the ids or positions of examples without a row.
        duplicates: How many rows of Parquet files were of an example that had
            an equal one already, and left out.
        foreign: How many rows of Parquet files belong to no example.

    Example:
        >>> import tempfile
        >>> from keras_ptloss.soft_labels import (
        ...     SoftLabelSpec,
        ...     import_soft_labels,
        ... )
        >>> folder = tempfile.mkdtemp()
        >>> with open(folder + "/api.jsonl", "w") as file:
        ...     _ = file.write('{"no": 0.75, "yes": 0.25}\n{"no": 0.9}\n')
        >>> report = import_soft_labels(
        ...     folder + "/api.jsonl",
        ...     ["a bore", "a flop"],
        ...     folder + "/api.softlabels",
        ...     spec=SoftLabelSpec(class_names=("no", "yes"), dtype="float32"),
        ... )
        >>> report.num_repaired
        1
        >>> print(report.labels[:].round(2))
        [[0.75 0.25]
         [0.9  0.1 ]]
    """

    labels: SoftLabels
    filled: Any
    renormalised: Any
    empty: Any
    other: Any
    ignored: tuple[str, ...]
    failed: tuple[str, ...]
    duplicates: int = 0
    foreign: int = 0

    @property
    def num_repaired(self) -> int:
        """How many rows are not as they were in the file."""
        repaired = self.filled | self.renormalised | self.empty
        return int(np.count_nonzero(repaired))
