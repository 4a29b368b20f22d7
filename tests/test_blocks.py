"""Blocks of rows: shared out to threads, with results in their order."""

import multiprocessing
import threading

import keras
import numpy as np
import pytest
from keras.distribution import DataParallel, set_distribution

from keras_ptloss._cores import by_blocks
from keras_ptloss.proxy import _blocks


def where(row):
    return row, threading.current_thread()


class TestByBlocks:
    @pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
    def test_order(self, count):
        found = by_blocks(where, [(row,) for row in range(count)])
        assert [row for row, _ in found] == list(range(count))
        if count:
            assert found[0][1] is threading.current_thread()

    @pytest.mark.skipif(
        keras.backend.backend() == "torch", reason="shares out operations"
    )
    def test_others_are_in_threads(self):
        others = by_blocks(where, [(row,) for row in range(5)])[1:]
        assert threading.current_thread() not in [t for _, t in others]

    @pytest.mark.skipif(
        "fork" not in multiprocessing.get_all_start_methods(),
        reason="no forked processes here",
    )
    @pytest.mark.filterwarnings("ignore:.*fork")
    def test_in_a_forked_process(self):
        """Its parent's threads are not there: it must not wait for them."""
        by_blocks(where, [(row,) for row in range(5)])
        child = multiprocessing.get_context("fork").Process(
            target=by_blocks, args=(where, [(row,) for row in range(5)])
        )
        child.start()
        child.join(timeout=60)
        if child.is_alive():
            child.kill()
        assert child.exitcode == 0

    @pytest.mark.parametrize("bad", [0, 1, 4])
    def test_an_error_is_raised(self, bad):
        def fails(row):
            if row == bad:
                raise FloatingPointError(f"row {row}")

        with pytest.raises(FloatingPointError, match=f"row {bad}"):
            by_blocks(fails, [(row,) for row in range(5)])

    @pytest.mark.skipif(
        keras.backend.backend() != "jax", reason="keras.distribution needs JAX"
    )
    def test_under_a_distribution_in_turn(self):
        """It is set for one thread; in others the rows would stay whole."""
        set_distribution(DataParallel())
        try:
            found = by_blocks(where, [(row,) for row in range(5)])
        finally:
            set_distribution(None)
        assert {thread for _, thread in found} == {threading.current_thread()}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("classes", [3, 40])
def test_blocks_are_as_the_whole(classes, several, monkeypatch):
    rng = np.random.default_rng(0)
    teacher = rng.dirichlet(np.full(classes, 0.3), 500)
    shape = (4, 1, 2) if several else (classes, 2)
    epsilon = rng.uniform(-0.2, 5.0, shape)
    whole = None
    for elements in (2**22, 1):
        monkeypatch.setattr(_blocks, "block_elements", lambda n=elements: n)
        q = _blocks.solve_newton(teacher, epsilon).q
        whole = q if whole is None else whole
    np.testing.assert_allclose(q, whole, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("at_once", [1, 2, 6])
def test_several_epsilon_in_groups(at_once):
    teacher = np.random.default_rng(0).dirichlet(np.full(3, 0.3), 50)
    epsilon = np.random.default_rng(1).uniform(-0.2, 5.0, (6, 1, 2))
    epsilon[3] = 0.0
    q = _blocks.solve_newton(teacher, epsilon, at_once=at_once).q
    alone = [_blocks.solve_newton(teacher, one[0]).q for one in epsilon]
    np.testing.assert_allclose(q, alone, rtol=1e-9)
