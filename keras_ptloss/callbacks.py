"""Keras callbacks for the training of a teacher."""

from typing import Any

import keras
import numpy as np
import scipy.special

from keras_ptloss._binary import two_events
from keras_ptloss._checks import (
    check_count,
    check_examples,
    check_flag,
    check_number,
    check_probabilities,
    fail,
)

__all__ = ["FilteredTeacher"]


class FilteredTeacher(keras.callbacks.Callback):
    """Average the teacher's outputs along its training (Filter-KD).

    A network's outputs on an example swing during training; their average
    along the way is often nearer to the truth than the last of them. Give
    this callback to the teacher's `fit`, and the student the result:

        average_n <- (1 - rate) average_n + rate p_n

    after every epoch, with the weights at its end and in inference mode. The
    average starts at the outputs of the first epoch, as in the authors' code
    (which takes the outputs of the training step itself); each `fit` starts
    anew.

    Args:
        x: the examples that the student will see, in any form that `predict`
            takes, always in the same order.
        rate: weight of an epoch's outputs, above 0 and at most 1 (the last
            epoch's outputs alone).
        from_logits: whether the teacher gives logits; probabilities are
            averaged.
        batch_size: as in `keras.Model.predict`.

    Attributes:
        probabilities: the averages, `(N, C)` in float32, C = 2 for a binary
            head of one output; None before the end of the first epoch.

    Raises:
        ValueError: if an argument is not of this form; during `fit`, if the
            teacher's outputs are not rows of probabilities `(N, C)`.

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
        check_examples("x", x)
        self.x = x
        self.rate = check_number("rate", rate, at_least=0.0)
        if not 0.0 < self.rate <= 1.0:
            fail("rate", "above 0 and at most 1", rate)
        self.from_logits = check_flag("from_logits", from_logits)
        if batch_size is not None:
            batch_size = check_count("batch_size", batch_size)
        self.batch_size = batch_size
        self.probabilities: np.ndarray | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Forget an earlier training."""
        self.probabilities = None

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Add the outputs of this epoch's weights."""
        outputs = self.model.predict(
            self.x, batch_size=self.batch_size, verbose=0
        )
        if len(np.shape(outputs)) != 2:
            raise ValueError(
                "The teacher must give one array (examples, classes). "
                f"Received: outputs of shape {np.shape(outputs)}"
            )
        outputs = two_events(
            np.asarray(outputs, "float32"), from_logits=self.from_logits
        )
        if self.from_logits:
            outputs = scipy.special.softmax(outputs, axis=-1)
        else:
            check_probabilities("outputs", outputs, "say from_logits=True")
        if self.probabilities is None:
            self.probabilities = outputs
        else:
            self.probabilities = (
                1.0 - self.rate
            ) * self.probabilities + self.rate * outputs
