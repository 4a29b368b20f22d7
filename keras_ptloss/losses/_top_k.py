"""PTLoss from a teacher that gives k log-probabilities and nothing else."""

from typing import Any

import keras
from keras import ops

from keras_ptloss._calibration import LOWEST, TINY
from keras_ptloss._checks import (
    check_choice,
    check_constant_epsilon,
    check_flag,
    check_number,
    fail,
)
from keras_ptloss.losses._base import TeacherLoss, read_student
from keras_ptloss.losses._events import (
    TAILS,
    Events,
    check_targets,
    loss_of_events,
    pick,
    put,
    read_events,
)
from keras_ptloss.losses._pt_loss import pt_loss

Tensor = Any


def top_k_pt_loss(
    y_true: Tensor,
    y_pred: Tensor,
    epsilon: Any,
    *,
    tail: str = "event",
    teacher_temperature: float = 1.0,
    from_logits: bool = False,
) -> Tensor:
    """Compute PTLoss on k + 1 events; see `TopKPTLoss`.

    Args:
        y_true: ids and natural log-probabilities, `(..., k, 2)`.
        y_pred: the student, `(..., C)`: probabilities, or logits with
            `from_logits`.
        epsilon: coefficients: a number (order 1), or `(M,)`.
        tail: `"event"`, `"renormalize"`, `"teacher_only"` or `"spread"`.
        teacher_temperature: of the teacher's events, a number above 0.
        from_logits: whether `y_pred` holds logits.

    Returns:
        One loss a position, shape `(...)`, in nats.

    Raises:
        ValueError: if an argument is not of this form, or (seen outside
            compiled functions) an id is no class or comes twice, or the rows
            are not log-probabilities.

    Example:
        >>> import numpy as np
        >>> y_true = np.array([[[2, np.log(0.7)], [0, np.log(0.2)]]])
        >>> student = np.array([[0.25, 0.0, 0.6, 0.15]], "float32")
        >>> [round(float(v), 4) for v in top_k_pt_loss(y_true, student, 0.0)]
        [0.0227]

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), Eq. 7.
    """
    check_flag("from_logits", from_logits)
    own = check_arguments(epsilon, tail, teacher_temperature)
    student = read_student(y_pred, from_logits=from_logits)
    if not from_logits:
        student = ops.log(ops.maximum(student, TINY))
    y_true = ops.cast(ops.convert_to_tensor(y_true), student.dtype)
    classes = student.shape[-1]
    check_targets(y_true, classes, student.shape)
    leading = ops.shape(student)[:-1]
    if classes is None:
        classes = ops.shape(student)[-1]
    logits = ops.reshape(student, (-1, classes))
    targets = ops.reshape(y_true, (-1, ops.shape(y_true)[-2], 2))
    temperature = own["teacher_temperature"]
    if tail == "spread":
        loss = pt_loss(
            spread(targets, logits, temperature),
            logits,
            own["epsilon"],
            from_logits=True,
            teacher_from_logits=False,
        )
    else:

        def project(events: Events, z: Tensor) -> tuple[Tensor, Tensor]:
            if tail == "renormalize":  # nothing is asked of the others
                return pick(z, events), ops.zeros_like(events.log_rest)
            return pick(z, events), log_of_others(z, events)

        loss = loss_of_events(
            targets,
            (logits,),
            project,
            lambda of_logits, events, z: (of_logits(z, events),),
            classes=classes,
            epsilon=[float(e) for e in own["epsilon"]],
            tail=tail,
            temperature=temperature,
        )
    return ops.reshape(loss, leading)


def check_arguments(
    epsilon: Any, tail: str, temperature: Any
) -> dict[str, Any]:
    """Return the loss's own arguments, checked."""
    values = check_constant_epsilon(epsilon)
    if values.ndim > 1:
        fail("epsilon", "shared by the classes: a number or (order,)", epsilon)
    check_choice("tail", tail, TAILS)
    temperature = check_number("teacher_temperature", temperature, at_least=0.0)
    if not temperature:
        fail("teacher_temperature", "above 0", temperature)
    return {
        "epsilon": values,
        "tail": tail,
        "teacher_temperature": temperature,
    }


def spread(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Return the teacher's rows `(N, C)`, its rest spread over the others."""
    classes = ops.shape(logits)[-1]
    events = read_events(
        targets, classes, tail="spread", temperature=temperature
    )
    given = ops.sum(ops.cast(events.known, "int32"), axis=-1, keepdims=True)
    others = ops.cast(ops.maximum(classes - given, 1), logits.dtype)
    each = ops.exp(events.log_rest) / others
    rows = ops.broadcast_to(each, ops.shape(logits))
    return put(rows, events.ids, events.known, ops.exp(events.log_t))


def log_of_others(logits: Tensor, events: Events) -> Tensor:
    """Return `L_r`, the log-sum-exp over the classes not given, `(N, 1)`."""
    nothing = ops.zeros_like(events.log_t) - float("inf")
    others = put(logits, events.ids, events.known, nothing)
    largest = ops.maximum(ops.max(others, axis=-1, keepdims=True), LOWEST)
    total = ops.sum(ops.exp(others - largest), axis=-1, keepdims=True)
    return largest + ops.log(ops.maximum(total, TINY))


@keras.saving.register_keras_serializable(package="keras_ptloss")
class TopKPTLoss(TeacherLoss):
    """PTLoss from a teacher of whom k log-probabilities are known.

    What language models' APIs give: the likeliest k tokens at each position.
    `y_true` is one float tensor `(..., k, 2)`, so that `fit`, masks,
    `sample_weight` and `tf.data` take it as any other:

        y_true = np.stack([ids, log_probabilities], axis=-1)

    All other classes together are one more event, of the probability that is
    left. On these k + 1 events

        loss = sum_e t_e (log t_e - log p_e)
             + sum_e t_e sum_m epsilon_m (1 - p_e)^m               (Eq. 7)

    At `epsilon = 0` it is at least 0, at most the KL of the full
    distributions, and equal to it where k is the number of classes.

    An entry of id -1 is the rest itself, with the logarithm of its
    probability: stored so, it survives rounding and k near 1. Lower ids are
    padding, where positions have fewer than k classes; a position of padding
    alone has loss 0. Positions are divided by their sum.

    Targets drawn from a teacher at random are entries as well: each id once,
    with the logarithm of its weight, the weights summing to 1.

    `tail` is what becomes of the probability that is left:

    * `"event"`: as above. Nothing is made up.
    * `"renormalize"`: both are divided by their sum over the k (Tunix,
      MaxText). The student's probability of all else is then free.
    * `"teacher_only"`: the teacher alone is (DistillKit). The student is drawn
      to more on the k than the teacher has. Targets drawn at random need no
      other form.
    * `"spread"`: evenly over the other classes, which draws the student's tail
      flat. It makes the teacher's full rows, `(..., C)`.

    Pre-training with the k largest and no tail cost 0.13 nats over full
    distributions elsewhere (k = 12, arXiv 2503.16870), targets drawn at random
    none.

    Args:
        epsilon: coefficients: a number (order 1), or `(M,)`.
        tail: `"event"`, `"renormalize"`, `"teacher_only"` or `"spread"`.
        teacher_temperature: of the teacher alone: its events become
            `softmax(log t_e / teacher_temperature)`; a number above 0.
        from_logits: whether the student's outputs are logits.
        name: name of the loss.
        **kwargs: `reduction` and `dtype`, as in `keras.losses.Loss`. With
            `reduction="mean_with_sample_weight"` positions of weight 0 do not
            count in the mean.

    Raises:
        ValueError: if an argument is not of this form, or `dtype` too small
            for ids.

    Example:
        >>> import keras, numpy as np
        >>> student = keras.Sequential([keras.layers.Dense(1000)])
        >>> loss = TopKPTLoss(0.0, from_logits=True)
        >>> student.compile("adam", loss=loss)
        >>> ids = np.tile([7, 42, 999], (8, 5, 1))
        >>> log_probabilities = np.log(np.tile([0.5, 0.3, 0.1], (8, 5, 1)))
        >>> y_true = np.stack([ids, log_probabilities], axis=-1)
        >>> history = student.fit(np.ones((8, 5, 4)), y_true, verbose=0)

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), Eq. 7; Anshumann
        et al. 2025, Sparse Logit Sampling (https://arxiv.org/abs/2503.16870).
    """

    _padding = -2.0

    def __init__(
        self,
        epsilon: Any,
        *,
        tail: str = "event",
        teacher_temperature: float = 1.0,
        from_logits: bool = False,
        name: str | None = "top_k_pt_loss",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            self._of_targets,
            check_arguments(epsilon, tail, teacher_temperature),
            from_logits=from_logits,
            teacher_from_logits=False,
            name=name,
            **kwargs,
        )
        if self.dtype not in ("float32", "float64"):
            fail("dtype", "'float32' or 'float64', which hold ids", self.dtype)

    def _of_targets(
        self,
        y_true: Tensor,
        y_pred: Tensor,
        epsilon: Any,
        *,
        teacher_from_logits: bool,
        **own: Any,
    ) -> Tensor:
        """Return the loss; the teacher's are log-probabilities always."""
        return top_k_pt_loss(y_true, y_pred, epsilon, **own)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the same loss again."""
        config = super().get_config()
        del config["teacher_from_logits"]
        return config
