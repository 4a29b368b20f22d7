"""A pytest plugin: in CI no test is skipped for want of a package.

With KERAS_PTLOSS_REQUIRE_ALL=1, as `.ci/run` sets it, `pytest.importorskip`
fails where it would skip.
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
        raise RuntimeError(
            f"{reason or modname} is missing, and KERAS_PTLOSS_REQUIRE_ALL=1"
            " lets no test be skipped for want of a package"
        ) from error
