"""Keras callbacks for the training of a teacher."""

from typing import Any

import keras
import numpy as np

from keras_ptloss._validation import (
    as_probabilities,
    check_flag,
    check_number,
)

__all__ = ["FilteredTeacher"]


class FilteredTeacher(keras.callbacks.Callback):
    """Average the teacher's probabilities over its training (Filter-KD).

    A network's output for an example fluctuates during training. The average is
    often closer to the truth than the last output. Pass this callback to the
    teacher's `fit`, then train the student on the callback's `probabilities`.
    After each epoch, the teacher predicts p_n for each example, in inference
    mode, and

        average_n <- (1 - rate) average_n + rate p_n

    The average starts with the predictions after the first epoch, as in the
    authors' code. Each call of `fit` starts a new average.

    Args:
        x: the student's examples, in any form that `predict` takes, always in
            the same order.
        rate: weight of an epoch's outputs, above 0 and at most 1.
        from_logits: whether the teacher gives logits.
        batch_size: as in `keras.Model.predict`.

    Attributes:
        probabilities: the averages, `(N, ..., C)`, in float32; None before the
            end of the first epoch. For a binary head with one output, C is 2.

    Example:
        >>> import keras, numpy as np
        >>> x = np.random.default_rng(0).normal(size=(32, 4))
        >>> labels = (x[:, 0] > 0).astype(int)
        >>> teacher = keras.Sequential([keras.layers.Dense(2, "softmax")])
        >>> teacher.compile("sgd", "sparse_categorical_crossentropy")
        >>> filtered = FilteredTeacher(x)
        >>> history = teacher.fit(
        ...     x, labels, epochs=3, callbacks=[filtered], verbose=0
        ... )
        >>> filtered.probabilities.shape
        (32, 2)

    Reference:
        Ren et al. 2022, Better Supervisory Signals by Observing Learning Paths
        (https://arxiv.org/abs/2203.02485).
    """

    def __init__(
        self,
        x: Any,
        *,
        rate: float = 0.05,
        from_logits: bool = False,
        batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.x = x
        self.rate = check_number("rate", rate, above=0.0, at_most=1.0)
        self.from_logits = check_flag("from_logits", from_logits)
        self.batch_size = batch_size
        self.probabilities: np.ndarray | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Start a new average."""
        self.probabilities = None

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Add the predictions after this epoch to the average."""
        outputs = self.model.predict(
            self.x, batch_size=self.batch_size, verbose=0
        )
        probs = as_probabilities(
            "outputs", outputs, self.from_logits, "set from_logits=True"
        ).astype("float32")
        if self.probabilities is None:
            self.probabilities = probs
        self.probabilities += self.rate * (probs - self.probabilities)
