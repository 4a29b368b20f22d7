"""Patience with teachers that sometimes fail, such as APIs."""

import functools
from collections.abc import Callable
from typing import Any

import tenacity

from keras_ptloss._checks import check_count, check_real, fail

Tensor = Any


def with_retries(
    teacher: Callable[[Tensor], Tensor],
    *,
    retry_on: tuple[type[BaseException], ...],
    retries: int = 5,
    first_delay: float = 1.0,
    max_delay: float = 60.0,
) -> Callable[[Tensor], Tensor]:
    """Repeat the calls of an unreliable teacher, waiting longer each time.

    The k-th wait is `first_delay * 2**k` seconds, at most `max_delay`, cut by
    a random factor of up to 2 so that many processes do not return at once.

    Args:
        teacher: A callable from a batch to an array, such as an API client.
        retry_on: The exceptions that are worth another call.
        retries: How often a batch is tried again; then its exception passes.
        first_delay: Seconds before the first repetition.
        max_delay: Longest wait in seconds.

    Returns:
        A callable for `SoftLabels.write` and `TokenLabels.write`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import numpy as np
        >>> from keras_ptloss.soft_labels import with_retries
        >>> answers = [TimeoutError(), np.array([[0.5, 0.5]])]
        >>> def client(batch):
        ...     answer = answers.pop(0)
        ...     if isinstance(answer, Exception):
        ...         raise answer
        ...     return answer
        >>> teacher = with_retries(
        ...     client, retry_on=(TimeoutError,), first_delay=0.01
        ... )
        >>> print(teacher(["a text"]))
        [[0.5 0.5]]
    """
    if not callable(teacher):
        fail("teacher", "a callable", teacher)
    if not isinstance(retry_on, tuple) or not retry_on:
        fail("retry_on", "a tuple of exception types", retry_on)
    for kind in retry_on:
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            fail("retry_on", "a tuple of exception types", retry_on)
    check_count("retries", retries, at_least=0)
    first = check_real("first_delay", first_delay, "a number of seconds")
    longest = check_real("max_delay", max_delay, "a number of seconds")
    if not 0 <= first <= longest:
        fail("first_delay", "between 0 and `max_delay`", first_delay)

    # Half of each wait is certain, half is random.
    half = {"multiplier": first / 2, "max": longest / 2}
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(retry_on),
        stop=tenacity.stop_after_attempt(retries + 1),
        wait=tenacity.wait_exponential(**half)
        + tenacity.wait_random_exponential(**half),
        reraise=True,
    )
    return functools.partial(retrying, teacher)
