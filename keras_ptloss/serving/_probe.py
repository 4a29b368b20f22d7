"""Does a model answer with probabilities, as it is said to?"""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ptloss._binary import two_events
from keras_ptloss._checks import check_output_form, on_simplex

Tensor = Any

ROWS = 8
FREE_SIZE = 32  # of axes whose size is free: a power of two, for U-Nets


def check_answers(model: Any, inputs: Any, from_logits: bool) -> None:
    """Compare what a model gives with what is said of it.

    Its last activation tells as a rule; where it does not, its answers to
    random inputs do. Models that cannot take such inputs (strings, other
    sizes) are believed.

    Args:
        model: a built model with one output, `(batch, ..., C)`.
        inputs: its symbolic inputs, in their structure.
        from_logits: whether it is said to give logits.

    Raises:
        ValueError: if it gives logits and probabilities were promised, or the
            other way round.
    """
    if from_logits:
        check_output_form("model", model, True, "from_logits")
    answers = _answers(model, inputs)
    if answers is None:
        return
    rows = two_events(answers, from_logits=False)
    rows = rows.reshape(-1, rows.shape[-1])
    rows = rows[np.all(np.isfinite(rows), axis=-1)]
    good = on_simplex(rows)
    if not from_logits and not good.all():
        shown = np.array2string(
            rows[int(np.argmin(good))], precision=4, threshold=6
        )
        raise ValueError(
            "`from_logits` must be True for a model that gives logits, and "
            "this one gives no probabilities: rows that are non-negative and "
            f"sum to 1. Received: from_logits=False, with model={model.name!r}"
            f" that answers {shown} to noise"
        )
    # A logit may well be between 0 and 1; several seldom sum to 1.
    if from_logits and answers.shape[-1] > 1 and len(good) and good.all():
        raise ValueError(
            "`from_logits` must be False for a model that gives probabilities:"
            " rows that are non-negative and sum to 1. Received: "
            f"from_logits=True, with model={model.name!r}"
        )


def _answers(model: Any, inputs: Any) -> np.ndarray | None:
    """Return float64 answers to random inputs, or None where it takes none."""
    generator = np.random.default_rng(0)

    def noise(tensor: Tensor) -> Tensor:
        batch, *shape = tensor.shape
        shape = [batch or ROWS, *(size or FREE_SIZE for size in shape)]
        if "int" in tensor.dtype or tensor.dtype == "bool":
            return ops.cast(generator.integers(0, 2, shape), tensor.dtype)
        return ops.cast(generator.normal(size=shape), tensor.dtype)

    try:
        answers = model(keras.tree.map_structure(noise, inputs), training=False)
    except Exception:  # whatever a layer may say of inputs that it cannot take
        return None
    [answers] = keras.tree.flatten(answers)
    return ops.convert_to_numpy(ops.cast(answers, "float32")).astype("float64")
