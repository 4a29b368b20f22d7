"""Differences between backends, and uses of Keras's private attributes."""

import concurrent.futures
import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

Tensor = Any


def visible_values(x: Tensor) -> np.ndarray | None:
    """Return the values of `x`, or None inside a compiled function.

    Keras also infers shapes from tensors without values: `keras.KerasTensor`,
    and PyTorch's device "meta".
    """
    if isinstance(x, keras.KerasTensor):
        return None
    backend = keras.backend.backend()
    if not keras.ops.is_tensor(x):
        return as_array(x)
    if backend == "jax":
        import jax

        symbolic = isinstance(x, jax.core.Tracer)
    elif backend == "tensorflow":
        import tensorflow as tf

        symbolic = tf.is_symbolic_tensor(x)
    else:
        import torch

        # To infer shapes, Keras calls the code on "meta" and, if that fails, on
        # tensors of ones, without gradients. No public function distinguishes
        # such tensors from real values. The test for ones is last, because it
        # needs values.
        symbolic = (
            has_no_values(x)
            or torch.compiler.is_compiling()
            or (not torch.is_grad_enabled() and bool((x == 1).all()))
        )
    return None if symbolic else as_array(x)


def has_no_values(x: Tensor) -> bool:
    """Return whether a tensor is on PyTorch's device "meta", without values."""
    return keras.backend.backend() == "torch" and bool(x.is_meta)


def as_array(x: Any) -> np.ndarray:
    """Return numbers or a tensor of any backend as a NumPy array.

    NumPy cannot convert PyTorch tensors that require a gradient or are
    bfloat16.
    """
    if isinstance(x, keras.Variable):
        x = keras.ops.convert_to_tensor(x)
    if hasattr(x, "detach"):  # a PyTorch tensor, on any backend of Keras
        if str(x.dtype) == "torch.bfloat16":
            return x.float().numpy(force=True).astype("bfloat16")
        return x.numpy(force=True)
    tensor = keras.ops.is_tensor(x)
    return keras.ops.convert_to_numpy(x) if tensor else np.asarray(x)


def maximum(x: Tensor, least: Any) -> Tensor:
    """Return the elementwise maximum, in the dtype of the first tensor.

    On PyTorch `keras.ops.maximum` of float64 gives float32 (Keras 3.15).
    """
    if keras.backend.backend() == "torch":
        return x.clamp(min=least)
    return keras.ops.maximum(x, least)


def minimum(x: Tensor, most: Any) -> Tensor:
    """Return the elementwise minimum; see `maximum`."""
    if keras.backend.backend() == "torch":
        return x.clamp(max=most)
    return keras.ops.minimum(x, most)


def custom_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call `keras.ops.custom_gradient`, in the same way for all backends.

    On PyTorch, Keras calls the gradient function with the tensors, and passes
    the upstream gradient by keyword.

    Args:
        function: returns its value, and a function that takes the upstream
            gradient and returns the gradients with respect to its arguments.
    """

    @keras.ops.custom_gradient
    def run(*tensors: Tensor) -> Any:
        value, gradient = function(*tensors)

        def with_upstream(*args: Tensor, upstream: Tensor = None) -> Any:
            return gradient(args[0] if upstream is None else upstream)

        return value, with_upstream

    return run


def no_gradient() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which PyTorch computes no gradients."""
    if keras.backend.backend() == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()


def compiled_on_jax(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of tensors on JAX; other backends run it uncompiled.

    If the function were not compiled, JAX would compile its loops in each call.
    """

    @functools.cache
    def compiled() -> Callable[..., Any]:
        import jax

        return jax.jit(function)

    @functools.wraps(function)
    def run(*tensors: Tensor) -> Any:
        jax_runs = keras.backend.backend() == "jax"
        return (compiled() if jax_runs else function)(*tensors)

    return run


def on_numpy(
    function: Callable[..., tuple[Tensor, ...]],
) -> Callable[..., tuple[np.ndarray, ...]]:
    """Make a function of tensors work on NumPy arrays in float64.

    XLA compiles the function once for each set of shapes. PyTorch runs it
    uncompiled.
    """

    @functools.cache
    def compiled() -> Callable[..., Any]:
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            return tf.function(function, jit_compile=True, autograph=False)
        return compiled_on_jax(function)

    @functools.wraps(function)
    def run(*arrays: Any) -> tuple[np.ndarray, ...]:
        wide = contextlib.nullcontext()
        if keras.backend.backend() == "jax":
            import jax

            wide = jax.enable_x64(True)
        with wide:
            tensors = [
                keras.ops.convert_to_tensor(array, "float64")
                for array in arrays
            ]
            return tuple(map(as_array, compiled()(*tensors)))

    return run


def replicas() -> int:
    """Return the number of replicas in the current TensorFlow strategy.

    Keras divides compiled losses by this number. Other losses must do the same.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return int(tf.distribute.get_strategy().num_replicas_in_sync)
    return 1


def outside_of_step(function: Callable[[], None]) -> None:
    """Call a function that creates variables while a step may be traced.

    Inside a compiled function, TensorFlow allows new variables only in the
    first call, even under `tf.init_scope`. In another thread, it always allows
    them. Under a strategy, Keras creates the variables before it traces the
    step.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if tf.inside_function() and not tf.distribute.has_strategy():
            with concurrent.futures.ThreadPoolExecutor(1) as threads:
                threads.submit(function).result()
            return
    function()


@contextlib.contextmanager
def weights_given_back(model: keras.Model) -> Iterator[None]:
    """Restore a model's weights if training on JAX is interrupted.

    On JAX, `fit` takes the values out of the variables, and Keras puts them
    back at the end of an epoch. An error before that would leave variables
    without values.
    """
    if keras.backend.backend() != "jax":
        yield
        return
    optimizer = getattr(model, "optimizer", None)
    variables = [
        *model.trainable_variables,
        *model.non_trainable_variables,
        *model.metrics_variables,
        *(optimizer.variables if optimizer is not None else ()),
    ]
    model.jax_state_sync()
    # `predict_on_batch` leaves a copy of the state in the model. Keras would
    # restore that copy after an error in the first step of the next run. By
    # then, a model that shares the layers may have deleted its arrays.
    model._jax_state = None
    before = [(v, v.value) for v in variables if _has_value(v)]
    try:
        yield
    finally:
        model.jax_state_sync()
        for variable, value in before:
            if not _has_value(variable):
                variable.assign(value)  # The error came before the first step.


def _has_value(variable: keras.Variable) -> bool:
    try:
        return variable.value is not None
    except TypeError:  # Keras calls the initializer, which is deleted by then.
        return False


def supports_jit(model: keras.Model) -> bool:
    """Return whether XLA can compile every layer, including nested layers."""
    return all(layer.supports_jit for layer in model._flatten_layers())


def compute_dtypes(model: keras.Model) -> set[str]:
    """Return the compute dtypes of a model's layers."""
    return {layer.compute_dtype for layer in model._flatten_layers()}


def set_direction(metric: keras.metrics.Metric, better: str) -> None:
    """Set whether "up" or "down" is better, for callbacks with `mode="auto"`.

    Keras's callbacks read this private attribute; `EarlyStopping` requires it.
    """
    metric._direction = better


@contextlib.contextmanager
def no_retracing_warning() -> Iterator[None]:
    """Do not let TensorFlow warn that many functions were traced.

    TensorFlow counts the functions of all models together, and warns at the
    fifth `predict`.
    """

    def other(record: logging.LogRecord) -> bool:
        return "triggered tf.function retracing" not in record.getMessage()

    logger = logging.getLogger("tensorflow")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
