"""A pytest plugin: in CI, a missing package is an error.

With KERAS_PTLOSS_REQUIRE_ALL=1, which `.ci/run` sets, `pytest.importorskip`
fails instead of skipping.
"""

import importlib
import os

import pytest


def pytest_configure():
    if os.environ.get("KERAS_PTLOSS_REQUIRE_ALL") == "1":
        pytest.importorskip = import_or_fail


def import_or_fail(modname, minversion=None, reason=None, **kwargs):
    try:
        return importlib.import_module(modname)
    except ImportError as error:
        if modname == "torch":
            pytest.skip("PyTorch is tested in an environment of its own")
        raise RuntimeError(
            f"{reason or modname} is missing, and KERAS_PTLOSS_REQUIRE_ALL=1"
            " turns a test that would be skipped into an error"
        ) from error
