"""What the tests of stores share."""

import numpy as np
import pytest

pytest.importorskip("pyarrow")


@pytest.fixture(scope="session")
def probabilities():
    """Draw 300 rows of 4 classes."""
    return np.random.default_rng(0).dirichlet(np.ones(4), 300)


@pytest.fixture(scope="session")
def x():
    """Make 300 examples that all differ."""
    return np.arange(600, dtype="float32").reshape(300, 2)


@pytest.fixture
def teacher(probabilities):
    """Make a teacher that knows the examples of `x`, and counts its rows."""

    def answer(batch):
        answer.rows += len(batch)
        return probabilities[(batch[:, 0] / 2).astype(int)]

    answer.rows = 0
    return answer
