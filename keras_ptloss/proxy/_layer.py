"""The proxy teacher as a Keras layer."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ptloss._backend import compiled_on_jax, has_no_values
from keras_ptloss._binary import two_events
from keras_ptloss._calibration import teacher_calibration
from keras_ptloss._checks import (
    check_constant_epsilon,
    check_count,
    check_flag,
    check_probabilities,
)
from keras_ptloss.proxy._newton import newton
from keras_ptloss.proxy._stationarity import Layout, derivative_step

Tensor = Any

# Relative, class by class; the step after it leaves float32 digits.
TOLERANCE = 1e-5


def proxy_tensor(
    teacher: Tensor, epsilon: Tensor, *, max_steps: int = 30
) -> Tensor:
    """Return proxy teachers `(..., C)` of tensors, differentiable.

    Args:
        teacher: probabilities, `(..., C)`.
        epsilon: `(M,)` or `(C, M)`.
        max_steps: most Newton steps.
    """
    teacher = teacher / ops.sum(teacher, axis=-1, keepdims=True)
    epsilon = ops.cast(epsilon, teacher.dtype)
    if has_no_values(teacher):
        return teacher
    return _proxy_tensor(teacher, epsilon, max_steps=max_steps)


def _solve(teacher: Tensor, epsilon: Tensor, *, max_steps: int) -> Tensor:
    coefficients = ops.moveaxis(epsilon, -1, 0)  # (M,) or (M, C)
    rank = len(teacher.shape)
    solution = newton(
        ops.stop_gradient(teacher),
        ops.stop_gradient(coefficients),
        tolerance=TOLERANCE,
        max_steps=max_steps,
    )
    q = ops.stop_gradient(solution.q)
    layout = Layout.of(teacher.shape[-1])
    step = layout.leave(
        derivative_step(
            layout,
            layout.enter(teacher, rank),
            layout.enter(q, rank),
            [layout.enter(one, rank) for one in ops.unstack(coefficients)],
        )
    )
    # Of a row that did not converge only the derivative is taken: the value of
    # an undamped step may be far off.
    done = ops.expand_dims(solution.residual <= TOLERANCE, -1)
    off = ops.where(done, 0.0, ops.stop_gradient(step))
    return q + (step - off)


_proxy_tensor = compiled_on_jax(_solve, settings=["max_steps"])


@keras.saving.register_keras_serializable(package="keras_ptloss")
class ProxyTeacher(keras.layers.Layer):
    """Turn a teacher's outputs into its proxy teacher's probabilities.

    `keras.Sequential([teacher, ProxyTeacher(epsilon)])` is the proxy teacher
    as a model, for any distiller and loss: distilling from it with plain KL
    has the optimum of distilling from `teacher` with `PTLoss(epsilon)`.
    `SearchResult.proxy_model` builds it of what a search found.

    Differentiable by the implicit function theorem: the solution `q` is held
    fixed and one Newton step is taken from it, whose value is zero and whose
    derivative is the solution's. With `trainable=True` (the default) `epsilon`
    is a weight, which `fit` may train on labels; `epsilon_m` is kept in
    `[-1/m, inf)`, where the loss is convex.

    Args:
        epsilon: starting coefficients: a number (order 1), `(M,)` shared by
            the classes, or `(C, M)` per class.
        teacher_from_logits: whether the inputs are logits.
        teacher_temperature: calibration of the teacher ahead of epsilon,
            `t = softmax(A z / teacher_temperature + b)`; a number above 0 or
            one a class, `(C,)`. The calibration is not trained.
        teacher_scale: `A`: a number, one a class, `(C,)`, or a matrix,
            `(C, C_in)`.
        teacher_bias: `b`: a number, or one a class, `(C,)`.
        max_steps: most Newton steps.
        **kwargs: passed on to `keras.layers.Layer`: `name`, `trainable`, ...

    Input and output shape: `(..., C)`; the outputs are on the simplex.

    Raises:
        ValueError: if an argument is not of this form, has another class count
            than the input, or (seen outside compiled functions) rows that
            should be probabilities are not.

    Example:
        >>> import numpy as np
        >>> layer = ProxyTeacher([2.0, 0.5])
        >>> np.asarray(layer(np.array([[0.7, 0.2, 0.1]]))).round(3)
        array([[0.838, 0.113, 0.049]], dtype=float32)

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), §4.2; Guo et al.
        2017 for the calibration.
    """

    def __init__(
        self,
        epsilon: Any,
        *,
        teacher_from_logits: bool = False,
        teacher_temperature: Any = 1.0,
        teacher_scale: Any = 1.0,
        teacher_bias: Any = 0.0,
        max_steps: int = 30,
        **kwargs: Any,
    ) -> None:
        # Bits below float32's would be lost in the solver.
        kwargs.setdefault("dtype", "float32")
        super().__init__(**kwargs)
        self._start = check_constant_epsilon(epsilon)
        self.teacher_from_logits = check_flag(
            "teacher_from_logits", teacher_from_logits
        )
        self._calibration = teacher_calibration(
            teacher_temperature, teacher_scale, teacher_bias
        )
        self.max_steps = check_count("max_steps", max_steps)

    def build(self, input_shape: Any) -> None:
        """Make `epsilon` a weight of the layer."""
        self._calibration.check_input("inputs", max(input_shape[-1], 2))
        check_constant_epsilon(
            self._start, classes=self.compute_output_shape(input_shape)[-1]
        )
        self.epsilon = self.add_weight(
            name="epsilon",
            shape=self._start.shape,
            initializer=keras.initializers.Constant(self._start),
            constraint=Convex(),
        )

    def call(self, inputs: Tensor) -> Tensor:
        """Return the proxy teachers of rows `(..., C)`."""
        inputs = two_events(inputs, from_logits=self.teacher_from_logits)
        if not self.teacher_from_logits:
            advice = "say teacher_from_logits=True"
            check_probabilities("inputs", inputs, advice)
        teacher = self._calibration(
            inputs, from_logits=self.teacher_from_logits
        )
        return proxy_tensor(
            teacher,
            ops.convert_to_tensor(self.epsilon),
            max_steps=self.max_steps,
        )

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return `(..., C)`, with 2 classes for a binary head's one."""
        classes = self._calibration.classes or max(input_shape[-1], 2)
        return (*input_shape[:-1], classes)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the layer; weights are kept apart."""
        return {
            **super().get_config(),
            "epsilon": self._start.tolist(),
            "teacher_from_logits": self.teacher_from_logits,
            "teacher_scale": self._calibration.scale.tolist(),
            "teacher_bias": self._calibration.bias.tolist(),
            "max_steps": self.max_steps,
        }


@keras.saving.register_keras_serializable(package="keras_ptloss")
class Convex(keras.constraints.Constraint):
    """Keep `epsilon_m >= -1/m`, where PTLoss is convex in the student."""

    def __call__(self, value: Tensor) -> Tensor:
        """Clip coefficients `(..., M)` from below."""
        lower = -1.0 / np.arange(1, value.shape[-1] + 1)
        return ops.maximum(value, ops.cast(lower, value.dtype))
