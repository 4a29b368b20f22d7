"""A teacher's k + 1 events as rows that a search takes."""

from typing import Any

import numpy as np
from keras import ops

from keras_ptloss._backend import float64
from keras_ptloss._checks import as_floats, fail
from keras_ptloss.losses._events import (
    LARGEST_ID,
    REST,
    check_targets,
    read_events,
)

LEFT_OUT = -1  # the label of positions that do not count


def top_k_events(y_true: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return a teacher's k + 1 events as a search's outputs and labels.

    The labels of text are its next tokens, so a search on it costs nothing but
    what the teacher says of it. The k tokens given and all others together are
    k + 1 classes, the label's is which of these occurred:

        rows, events = top_k_events(y_true, next_tokens)
        search = ProxyTeacherSearch(GradientSearch(calibration="temperature"))
        result = search.search(rows, events, ignore_class=-1)
        loss = TopKPTLoss(
            result.epsilon, teacher_temperature=1 / result.correction.scale
        )

    Only what the events share can be carried over so: a temperature, and
    epsilon shared by the classes. Of `result.score` the part within the rest,
    `-log p` of the label among the tokens not given, is no part.

    Args:
        y_true: ids and natural log-probabilities, `(..., k, 2)`, as
            `TopKPTLoss` takes them.
        labels: the tokens that came, integers, `(...)`. Positions of a negative
            one are left out.

    Returns:
        Probabilities `(N, k + 1)`, the last that of the rest; and the events,
        `(N,)`, -1 at positions that are left out or consist of padding: search
        with `ignore_class=-1`.

    Raises:
        ValueError: if an argument is not of this form.

    Example:
        >>> import numpy as np
        >>> y_true = [[[7, np.log(0.5)], [4, np.log(0.3)]]] * 2
        >>> rows, events = top_k_events(y_true, [4, 9])
        >>> rows.round(2).tolist(), events.tolist()
        ([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]], [1, 2])
    """
    y_true = as_floats("y_true", y_true, "numbers of shape (..., k, 2)")
    check_targets(y_true, None, None)
    labels = np.asarray(labels)
    if labels.shape != y_true.shape[:-2] or labels.dtype.kind not in "iu":
        fail(
            "labels",
            f"integers of shape {y_true.shape[:-2]}, one a position of y_true",
            f"{labels.dtype} of shape {labels.shape}",
        )
    y_true = y_true.reshape(-1, *y_true.shape[-2:])
    labels = labels.reshape(-1).astype("int64")
    with float64():
        read = read_events(
            ops.convert_to_tensor(y_true), LARGEST_ID, tail="event"
        )
        ids, known, log_t, log_rest = map(ops.convert_to_numpy, read)
    # The rest's own entry, as stores of tokens have it, is no class beside it.
    used = known.any(axis=0) | ~(y_true[..., 0] == REST).any(axis=0)
    ids, known, log_t = ids[:, used], known[:, used], log_t[:, used]
    rows = np.exp(np.concatenate([log_t, log_rest], axis=-1))
    given = (ids == labels[:, None]) & known
    events = np.where(given.any(-1), given.argmax(-1), rows.shape[-1] - 1)
    padding = (y_true[..., 0] < REST).all(axis=-1)
    return rows, np.where(padding | (labels < 0), LEFT_OUT, events)
