"""Teachers that are asked again."""

import time

import pytest

from keras_ptloss.soft_labels import with_retries


def test_retries(monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    calls = []

    def client(x):
        calls.append(x)
        raise TimeoutError

    kwargs = {"retry_on": (TimeoutError,), "retries": 4, "max_delay": 3.0}
    with pytest.raises(TimeoutError):
        with_retries(client, **kwargs)(1)
    assert len(calls) == 5
    for wait, longest in zip(waits, (1, 2, 3, 3), strict=True):
        assert longest / 2 <= wait <= longest
    with pytest.raises(TimeoutError):
        with_retries(client, retry_on=(OSError,), retries=0)(1)
    for wrong in ((), TimeoutError, ("x",)):
        with pytest.raises(ValueError, match="`retry_on` must be a tuple"):
            with_retries(client, retry_on=wrong)
    with pytest.raises(ValueError, match="`retries` must be"):
        with_retries(client, retry_on=(OSError,), retries=-1)
    with pytest.raises(ValueError, match="`first_delay` must be"):
        with_retries(client, retry_on=(OSError,), first_delay=-1)
    for name, wrong in (("first_delay", "1"), ("max_delay", None)):
        match = f"`{name}` must be a number of seconds.*{name}={wrong!r}"
        with pytest.raises(ValueError, match=match):
            with_retries(client, retry_on=(OSError,), **{name: wrong})
    with pytest.raises(ValueError, match="`teacher` must be a callable"):
        with_retries(3, retry_on=(OSError,))
