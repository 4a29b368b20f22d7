"""The only place that knows which backend runs.

`keras.ops` has no just-in-time compiler and no switch for 64-bit numbers;
both are needed by the proxy-teacher solver, which is called some ten thousand
times in a search and whose result should not depend on the backend.
"""

import concurrent.futures
import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_ptloss._keras import forget_jax_state

Tensor = Any


def visible_values(x: Tensor) -> np.ndarray | None:
    """Return the values of `x`, or None while it has none.

    Checks of values run where values exist (eager calls, NumPy input) and cost
    nothing inside compiled functions, nor where Keras infers shapes by tensors
    that are but symbols (`keras.KerasTensor`, PyTorch's device "meta").
    """
    if isinstance(x, keras.KerasTensor):
        return None
    backend = keras.backend.backend()
    if keras.ops.is_tensor(x):
        if backend == "jax":
            import jax

            symbol = isinstance(x, jax.core.Tracer)
        elif backend == "tensorflow":
            import tensorflow as tf

            symbol = tf.is_symbolic_tensor(x)
        else:
            symbol = _stands_for_a_shape(x)
        if symbol:
            return None
    return as_array(x)


def has_no_values(x: Tensor) -> bool:
    """Return whether a tensor is on PyTorch's device "meta": a shape alone.

    Keras infers shapes by such tensors. Code that asks for a value, as loops
    do, cannot run on them.
    """
    return keras.backend.backend() == "torch" and bool(x.is_meta)


def _stands_for_a_shape(x: Tensor) -> bool:
    """Return whether a tensor of PyTorch has values that mean nothing.

    Where code fails on the device "meta", were it by an error of the user,
    Keras tries again with ones, which are no probabilities; without gradients,
    and without a public sign of it.
    """
    import torch

    if has_no_values(x) or torch.compiler.is_compiling():
        return True
    return not torch.is_grad_enabled() and bool((x == 1).all())


def as_array(x: Any) -> np.ndarray:
    """Return numbers or a tensor of any backend as a NumPy array.

    NumPy itself refuses PyTorch's tensors that are recorded for a gradient, or
    in bfloat16, and warns of how Keras 3.15 hands it others.
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
    """Return the larger of two, in the dtype of `x`.

    On PyTorch `keras.ops.maximum` makes float32 of float64 (Keras 3.15).

    Args:
        x: a tensor.
        least: a number, or a tensor of its dtype.
    """
    if keras.backend.backend() == "torch":
        return x.clamp(min=least)
    return keras.ops.maximum(x, least)


def minimum(x: Tensor, most: Any) -> Tensor:
    """Return the smaller of two, in the dtype of `x`; as `maximum`."""
    if keras.backend.backend() == "torch":
        return x.clamp(max=most)
    return keras.ops.minimum(x, most)


def no_gradient() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which PyTorch records nothing for a gradient.

    The other backends record what they are asked to, where they are asked.
    """
    if keras.backend.backend() == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()


def float64() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which `keras.ops` computes in float64.

    TensorFlow and PyTorch always can; JAX has to be told.
    """
    if keras.backend.backend() == "jax":
        import jax

        return jax.enable_x64(True)
    return contextlib.nullcontext()


def compiled_on_jax(
    function: Callable[..., Any], *, settings: Sequence[str]
) -> Callable[..., Any]:
    """Make a function of tensors one that is compiled once on JAX.

    Called outside of a compiled function, JAX compiles a loop at each call
    anew, and each operation apart. Elsewhere the function stays as it is.

    Args:
        function: takes tensors, and hashable settings by keyword.
        settings: the names of these.
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
    function: Callable[..., Any],
    *,
    rows: Collection[int] = (),
    compile: bool = True,
) -> Callable[..., Any]:
    """Make a function written in `keras.ops` one of NumPy arrays, in float64.

    Args:
        function: takes arrays, and hashable settings by keyword; returns an
            array or a tuple of arrays.
        rows: positions of the arrays whose first axis are examples. Under a
            `keras.distribution.DataParallel` (JAX) they are spread over its
            devices.
        compile: whether to compile it by XLA, once for each set of shapes and
            settings. PyTorch runs it as it is.

    Returns:
        A function of NumPy arrays that returns NumPy arrays.
    """

    @functools.lru_cache(maxsize=64)
    def with_settings(**settings: Any) -> Callable[..., Any]:
        bound = functools.partial(function, **settings)
        backend = keras.backend.backend()
        if compile and backend == "jax":
            import jax

            return jax.jit(bound)
        if compile and backend == "tensorflow":
            import tensorflow as tf

            return tf.function(bound, jit_compile=True, autograph=False)
        return bound

    @functools.wraps(function)
    def run(*arrays: Any, **settings: Any) -> Any:
        tensors = [np.asarray(a, "float64") for a in arrays]
        with float64():
            # Compiled functions of JAX take NumPy arrays at a tenth of the cost
            # of making tensors of them first.
            if not (compile and keras.backend.backend() == "jax"):
                tensors = [keras.ops.convert_to_tensor(a) for a in tensors]
            for position in rows:
                tensors[position] = _spread(tensors[position])
            out = with_settings(**settings)(*tensors)
            if isinstance(out, tuple):
                return tuple(as_array(o) for o in out)
            return as_array(out)

    return run


def _spread(rows: Tensor) -> Tensor:
    """Spread examples over the devices of a `DataParallel`, if one is set.

    Not over several processes: each has all the examples, and computes alike.
    """
    distribution = keras.distribution.distribution()
    if not isinstance(distribution, keras.distribution.DataParallel):
        return rows
    check_distribution()
    import jax

    if jax.process_count() > 1:
        return rows
    layout = distribution.get_data_layout(rows.shape)
    return keras.distribution.distribute_tensor(rows, layout)


def check_distribution() -> None:
    """Refuse a `keras.distribution` where it would be passed over in silence.

    Raises:
        ValueError: if one is set, on another backend than JAX.
    """
    distribution = keras.distribution.distribution()
    backend = keras.backend.backend()
    if distribution is not None and backend != "jax":
        raise ValueError(
            "`keras.distribution` must be left unset with another backend than "
            "JAX: keras.distribution.set_distribution(None). Received: a "
            f"{type(distribution).__name__} with the {backend} backend"
        )


@functools.cache
def on_cpu() -> bool:
    """Return whether the backend computes on the CPU."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return bool(jax.default_backend() == "cpu")
    if backend == "tensorflow":
        import tensorflow as tf

        # The physical devices: asking for logical ones would fix them.
        return len(tf.config.list_physical_devices()) == len(
            tf.config.list_physical_devices("CPU")
        )
    import torch

    return not torch.accelerator.is_available()


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
    forget_jax_state(model)
    before = [(v, v.value) for v in variables if _has_value(v)]
    try:
        yield
    finally:
        model.jax_state_sync()
        for variable, value in before:
            if not _has_value(variable):
                variable.assign(value)  # not a step was made


def _has_value(variable: keras.Variable) -> bool:
    try:
        return variable.value is not None
    except TypeError:  # Keras asks the initializer, which is gone
        return False
