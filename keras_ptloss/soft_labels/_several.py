"""The stored outputs of several teachers, attached to data side by side."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_ptloss._checks import fail
from keras_ptloss.soft_labels._attach import attach
from keras_ptloss.soft_labels._match import Matcher
from keras_ptloss.soft_labels._soft_labels import SoftLabels

Tensor = Any


def attach_several(
    labels: Sequence[SoftLabels],
    dataset: Any,
    *,
    ids: Any = None,
    batch_size: int = 32,
    shuffle: bool = False,
    seed: int | None = None,
    preprocessor: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """Pair a data set with the stored rows of several teachers, for `fit`.

    As `SoftLabels.attach`, with the teachers' rows side by side,
    `(..., C_1 + C_2 + ...)`: what the loss of a search among these teachers,
    in this order, takes as `y_true`.

    Args:
        labels: stores of the same examples in the same order, one a teacher.
        dataset: as in `SoftLabels.attach`.
        ids: as in `SoftLabels.attach`.
        batch_size: as in `SoftLabels.attach`.
        shuffle: as in `SoftLabels.attach`.
        seed: as in `SoftLabels.attach`.
        preprocessor: as in `SoftLabels.attach`.

    Returns:
        `(inputs, soft labels)` batches, as `SoftLabels.attach`.

    Raises:
        ValueError: if the stores are of other examples, or as
            `SoftLabels.attach`.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from keras_ptloss import SoftLabels
        >>> def teacher(batch):
        ...     return np.stack([batch / 4, 1 - batch / 4], axis=-1)
        >>> x, path = np.array([0.0, 1.0, 2.0]), tempfile.mkdtemp()
        >>> one = SoftLabels.write(teacher, x, path + "/1", verbose=0)
        >>> two = SoftLabels.write(teacher, x, path + "/2", verbose=0)
        >>> inputs, rows = attach_several([one, two], x)[0]
        >>> print(rows[1])
        [0.25 0.75 0.25 0.75]
    """
    return attach(
        Matcher(_SideBySide(labels), ids),
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        preprocessor=preprocessor,
    )


class _SideBySide:
    """Several stores of the same examples, read as one."""

    def __init__(self, labels: Sequence[SoftLabels]) -> None:
        several = isinstance(labels, (list, tuple)) and len(labels) > 0
        if not several or not all(isinstance(s, SoftLabels) for s in labels):
            fail("labels", "a list of SoftLabels", labels)
        self._stores = list(labels)
        self.fingerprints = first = labels[0].fingerprints
        self.ordered = all(store.ordered for store in labels)
        self.shape = (len(first), sum(store.shape[1] for store in labels))
        for k, store in enumerate(labels):
            if len(store) != len(first):
                raise ValueError(
                    "`labels` must be of the same examples. Received: "
                    f"labels[{k}] of {len(store)} examples, labels[0] of "
                    f"{len(first)}"
                )
            differ = np.flatnonzero(store.fingerprints != first)
            if len(differ):
                raise ValueError(
                    "`labels` must be of the same examples in the same order. "
                    f"Received: labels[{k}], of which {len(differ)} rows are "
                    f"of other examples than those of labels[0], the first "
                    f"of them row {differ[0]}"
                )

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        return np.concatenate([s[index] for s in self._stores], axis=-1)
