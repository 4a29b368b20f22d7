"""Numbers in the forms that XLA's CPU compiler makes fast programs of.

What is said of it holds for JAX 0.10 and TensorFlow 2.21. On accelerators, and
on PyTorch, all of this is `keras.ops`.
"""

import math
from typing import Any

import keras

from keras_ptloss._backend import on_cpu

Tensor = Any

# The float64 next to sqrt(1/2), its bits as an integer.
_BITS_OF_SQRT_HALF = 0x3FE6A09E667F3BCD


def _may_be_xla() -> bool:
    """Return whether XLA's CPU compiler may be at work."""
    return keras.backend.backend() != "torch" and on_cpu()


def _xla_on_cpu() -> bool:
    """Return whether XLA's CPU compiler is at work for certain, JAX's."""
    return keras.backend.backend() == "jax" and on_cpu()


def row_sum(x: Tensor) -> Tensor:
    """Sum over the last axis: `(..., C)` to `(..., 1)`.

    XLA's CPU compiler fuses neighbouring row sums into one loop that is
    neither vectorised nor parallel (JAX 0.10: 3 to 6 times slower); a product
    with a vector of ones stays out of it. Not on accelerators, whose matrix
    units round float32; and not on PyTorch, where there is no XLA.
    """
    if _may_be_xla() and x.shape[-1] is not None:
        return keras.ops.matmul(x, keras.ops.ones((x.shape[-1], 1), x.dtype))
    return keras.ops.sum(x, axis=-1, keepdims=True)


def column_sum(x: Tensor) -> Tensor:
    """Sum over the first axis: `(C, ...)` to `(1, ...)`; as `row_sum`."""
    if _may_be_xla() and x.shape[0] is not None and len(x.shape) == 2:
        return keras.ops.matmul(keras.ops.ones((1, x.shape[0]), x.dtype), x)
    return keras.ops.sum(x, axis=0, keepdims=True)


def log(x: Tensor) -> Tensor:
    """Return the logarithm of normal, finite, positive numbers.

    XLA's CPU compiler (JAX 0.10, TensorFlow 2.21) does not vectorise that of
    float64, which takes 5 times as long as this one does. With `x = 2^e m` and
    `f = (m - 1) / (m + 1)`, `m` within `[sqrt(1/2), sqrt(2))`, it is

        log x = e log 2 + 2 (f + f^3 / 3 + f^5 / 5 + ...)

    to two units of rounding. No derivative is defined.
    """
    wide = keras.backend.standardize_dtype(x.dtype) == "float64"
    if not (wide and _may_be_xla()):
        return keras.ops.log(x)
    bits = _bitcast(x, "int64")
    exponent = keras.ops.right_shift(bits - _BITS_OF_SQRT_HALF, 52)
    m = _bitcast(bits - keras.ops.left_shift(exponent, 52), "float64")
    f = (m - 1.0) / (m + 1.0)
    square = f * f
    series = square * (2.0 / 17)
    for k in range(15, 2, -2):
        series = (series + 2.0 / k) * square
    whole = keras.ops.cast(exponent, "float64") * math.log(2.0)
    return whole + (2.0 * f + f * series)


def _bitcast(x: Tensor, dtype: str) -> Tensor:
    """Read the bits of numbers as those of a dtype as wide."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.lax.bitcast_convert_type(x, dtype)
    import tensorflow as tf

    return tf.bitcast(x, dtype)


def _values(x: Tensor) -> float:
    """Return how many values `x` has, infinitely many where a size is open."""
    known = all(isinstance(size, int) for size in x.shape)
    return math.prod(x.shape) if known else math.inf


def threads_by_operations(x: Tensor) -> bool:
    """Return whether loops of many operations over `x` go to several threads.

    XLA's CPU compiler (JAX 0.10) shares out loops of more operations than
    bytes from some thousand values on, which takes longer than they do; from
    2^17 on it shares out all.
    """
    return _xla_on_cpu() and 1000 <= _values(x) < 2**17


def fuses_shift(x: Tensor) -> bool:
    """Return whether a softmax's shift is in the loops that read it.

    XLA's CPU compiler (JAX 0.10) leaves it to a library from 4,096 values on.
    """
    return _xla_on_cpu() and _values(x) < 4096


def exponential(x: Tensor) -> Tensor:
    """Return `exp(x)` of numbers of at most 0, `(..., C)`.

    XLA's CPU compiler (JAX 0.10) takes a third of the time for it in a loop
    with another operation, if rows are long: such as this bound, below which
    `exp` is 0 in float64 as well.
    """
    if _xla_on_cpu() and x.shape[-1] >= 40:
        x = keras.ops.maximum(x, -1000.0)
    return keras.ops.exp(x)
