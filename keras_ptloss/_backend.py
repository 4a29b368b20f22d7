"""What differs between backends, and what Keras has no public way for."""

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

        # If code fails on "meta", Keras tries again with ones and without
        # gradients. Ones are no probabilities, and there is no public sign.
        # Neither a tensor on "meta" nor a compiled one can be asked.
        symbolic = (
            has_no_values(x)
            or torch.compiler.is_compiling()
            or (not torch.is_grad_enabled() and bool((x == 1).all()))
        )
    return None if symbolic else as_array(x)


def has_no_values(x: Tensor) -> bool:
    """Return whether a tensor is on PyTorch's device "meta": a shape alone."""
    return keras.backend.backend() == "torch" and bool(x.is_meta)


def as_array(x: Any) -> np.ndarray:
    """Return numbers or a tensor of any backend as a NumPy array.

    NumPy refuses PyTorch's tensors that are recorded for a gradient, or in
    bfloat16.
    """
    if isinstance(x, keras.Variable):
        x = keras.ops.convert_to_tensor(x)
    if hasattr(x, "detach"):  # PyTorch's, whatever Keras's backend
        if str(x.dtype) == "torch.bfloat16":
            return x.float().numpy(force=True).astype("bfloat16")
        return x.numpy(force=True)
    tensor = keras.ops.is_tensor(x)
    return keras.ops.convert_to_numpy(x) if tensor else np.asarray(x)


def maximum(x: Tensor, least: Any) -> Tensor:
    """Return the larger of a tensor and a number or tensor, in its dtype.

    On PyTorch `keras.ops.maximum` of float64 gives float32 (Keras 3.15).
    """
    if keras.backend.backend() == "torch":
        return x.clamp(min=least)
    return keras.ops.maximum(x, least)


def minimum(x: Tensor, most: Any) -> Tensor:
    """Return the smaller of the two, like `maximum`."""
    if keras.backend.backend() == "torch":
        return x.clamp(max=most)
    return keras.ops.minimum(x, most)


def no_gradient() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which PyTorch records nothing for a gradient."""
    if keras.backend.backend() == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()


def compiled_on_jax(
    function: Callable[..., Any], *, settings: list[str]
) -> Callable[..., Any]:
    """Compile a function of tensors on JAX; `settings` are its static keywords.

    Outside of a compiled function, JAX would compile its loops at each call.
    """

    @functools.cache
    def compiled() -> Callable[..., Any]:
        import jax

        return jax.jit(function, static_argnames=settings)

    @functools.wraps(function)
    def run(*tensors: Tensor, **values: Any) -> Any:
        jax_runs = keras.backend.backend() == "jax"
        return (compiled() if jax_runs else function)(*tensors, **values)

    return run


def on_numpy(
    function: Callable[..., tuple[Tensor, ...]],
) -> Callable[..., tuple[np.ndarray, ...]]:
    """Make a function of tensors one of NumPy arrays in float64.

    XLA compiles it once for each set of shapes. PyTorch runs it as it is.
    """

    @functools.cache
    def compiled() -> Callable[..., Any]:
        if keras.backend.backend() == "jax":
            import jax

            return jax.jit(function)
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            return tf.function(function, jit_compile=True, autograph=False)
        return function

    @functools.wraps(function)
    def run(*arrays: Any) -> tuple[np.ndarray, ...]:
        tensors = [np.asarray(array, "float64") for array in arrays]
        if keras.backend.backend() == "jax":
            import jax

            with jax.enable_x64(True):
                return tuple(map(as_array, compiled()(*tensors)))
        tensors = [keras.ops.convert_to_tensor(array) for array in tensors]
        return tuple(map(as_array, compiled()(*tensors)))

    return run


def replicas() -> int:
    """Return by how many replicas a TensorFlow strategy splits the batch.

    Keras divides compiled losses by it; a loss added beside them has to be.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return int(tf.distribute.get_strategy().num_replicas_in_sync)
    return 1


def outside_of_step(function: Callable[[], None]) -> None:
    """Call a function that creates variables while a step may be traced.

    A compiled function of TensorFlow lets variables be created on its first
    call only, `tf.init_scope` or not; a thread of its own is in no call. Under
    a strategy Keras builds before it traces, and there is nothing to create.
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
    """Give a model's weights back to it when a run of JAX is interrupted.

    A run takes the values out of their variables. Keras puts them back at the
    end of an epoch; an error or an interruption before that would leave
    variables without a value.
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
    # `predict_on_batch` leaves a copy of the state. Keras would put it back
    # after an error in the first step of the next run, when another model with
    # the same layers may have given its arrays away.
    model._jax_state = None
    before = [(v, v.value) for v in variables if _has_value(v)]
    try:
        yield
    finally:
        model.jax_state_sync()
        for variable, value in before:
            if not _has_value(variable):
                variable.assign(value)  # No step was made.


def _has_value(variable: keras.Variable) -> bool:
    try:
        return variable.value is not None
    except TypeError:  # Keras asks the initializer, which is gone.
        return False


def supports_jit(model: keras.Model) -> bool:
    """Return whether XLA can compile every layer, also layers inside layers."""
    return all(layer.supports_jit for layer in model._flatten_layers())


def compute_dtypes(model: keras.Model) -> set[str]:
    """Return the dtypes that a model's layers compute in."""
    return {layer.compute_dtype for layer in model._flatten_layers()}


def set_direction(metric: keras.metrics.Metric, better: str) -> None:
    """Tell `mode="auto"` of Keras's callbacks whether "up" or "down" is better.

    They read this private attribute, and `EarlyStopping` refuses without it.
    """
    metric._direction = better


@contextlib.contextmanager
def no_retracing_warning() -> Iterator[None]:
    """Do not let TensorFlow warn that many functions were traced.

    It counts those of all models as one, and warns at the fifth `predict`.
    """

    def other(record: logging.LogRecord) -> bool:
        return "triggered tf.function retracing" not in record.getMessage()

    logger = logging.getLogger("tensorflow")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
