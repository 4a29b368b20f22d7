"""A batch and its labels."""

import distillers
import pytest


@pytest.fixture
def x():
    return distillers.inputs()


@pytest.fixture
def y():
    return distillers.labels()
