"""Writers that are killed, and disks that fill up: real processes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import helpers
import numpy as np
import pytest
from forker import asked_rows, forking
from stores import (
    ENVIRONMENT,
    N,
    Teacher,
    features,
    write,
)

from keras_ptloss.soft_labels import SoftLabels

pytestmark = helpers.slow_but_on_one()

CODE = """
    from keras_ptloss.soft_labels import SoftLabels, SoftLabelSpec

    def write_store(path, answer, size):
        def teacher(batch):
            rows = (batch[:, :1] / 2).astype(int)
            answer(rows[:, 0])
            return np.concatenate([rows, -rows, rows * 2], axis=-1)

        x = np.arange(120.0).reshape(60, 2)
        spec = SoftLabelSpec(from_logits=True)
        SoftLabels.write(
            teacher, x, path, spec=spec, batch_size=size, verbose=0
        )
"""


@pytest.fixture(scope="module")
def forker():
    yield from forking(CODE)


@pytest.mark.parametrize(
    "times", [20, pytest.param(100, marks=pytest.mark.slow)]
)
def test_killed_at_random_points(path, tmp_path, forker, times):
    random = np.random.default_rng()
    kills, stores = 0, 0
    while kills < times:
        store = path.with_suffix(f".{stores}")
        log = tmp_path / f"asked-{stores}"
        killed_here, stored = 0, 0
        while True:
            known, asked_before = stored, len(asked_rows(log))
            seconds = random.uniform(0, 0.12)
            status = forker.killed_after(seconds, store, log, pause=0.004)
            # The teacher was not asked for any row stored when it started.
            assert all(row >= known for row in asked_rows(log)[asked_before:])
            if status == 0:
                break
            assert status == -signal.SIGKILL
            kills, killed_here = kills + 1, killed_here + 1
            stored = check_incomplete(store, stored)
        check_complete(store, log, 5 * killed_here)
        stores += 1


def check_incomplete(store, stored_before):
    """No rows got lost, those counted are right, and it is not readable."""
    if (store / "shard-00000-of-00001").exists():
        return 60
    with pytest.raises((ValueError, FileNotFoundError)):
        SoftLabels.open(store)
    partial = store / "shard-00000-of-00001.partial"
    if not (partial / "manifest.json").exists():
        return 0
    stored = json.loads((partial / "manifest.json").read_text())["stored"]
    assert stored >= stored_before
    rows = np.load(partial / "labels.npy")[:stored, 0]
    np.testing.assert_array_equal(rows, np.arange(stored))
    return stored


def check_complete(store, log, lost):
    rows = np.arange(60)[:, None]
    expected = np.concatenate([rows, -rows, 2 * rows], -1)
    np.testing.assert_array_equal(SoftLabels.open(store)[:], expected)
    asked = asked_rows(log)
    assert set(asked) == set(range(60))
    # At most the batch in flight is asked twice.
    assert len(asked) - 60 <= lost


def test_killed_at_every_system_call(path, tmp_path, forker):
    """Kill before the k-th call that changes the disk, for each k."""
    crash_at, status = 0, -signal.SIGKILL
    while status:
        crash_at += 1
        store = path.with_suffix(f".{crash_at}")
        log = tmp_path / f"asked-{crash_at}"
        forker.start(store, log, crash_at=crash_at, size=20)
        status = forker.wait()
        stored = check_incomplete(store, 0)
        asked_before = len(asked_rows(log))
        forker.start(store, log, size=20)
        assert forker.wait() == 0
        assert asked_rows(log)[asked_before:] == list(range(stored, 60))
        check_complete(store, log, 20)
    assert crash_at > 30


def test_two_writers_of_a_shard_are_refused(path, tmp_path, forker):
    log = tmp_path / "asked"
    pid = forker.start(path, log, pause=0.2)
    while not log.exists() or not log.read_text():
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match=f"another process .pid {pid} "):
        write(path, dataset=features(60))
    os.kill(pid, signal.SIGKILL)
    forker.wait()
    # The kernel has dropped the lock of the killed process.
    forker.start(path, log)
    assert forker.wait() == 0


def test_full_disk(path):
    """A limit on file size stands for a full disk: both are an OSError."""
    code = """
        import resource, sys
        import numpy as np
        from keras_ptloss.soft_labels import SoftLabels
        asked = 0
        def teacher(x):
            global asked
            asked += len(x)
            return np.full((len(x), 500), 0.002)
        x, path = np.arange(1000), sys.argv[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))
        try:
            SoftLabels.write(teacher, x, path, verbose=0)
        except OSError as error:
            assert "make room and call again" in str(error), error
        else:
            raise AssertionError("no error")
        assert asked == 32, asked
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        assert len(SoftLabels.write(teacher, x, path, verbose=0)) == 1000
        assert asked == 1032, asked
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), path],
        env=ENVIRONMENT,
        check=True,
    )


def test_disk_full_midway_keeps_the_stored_rows(path, monkeypatch):
    pwrite, teacher = os.pwrite, Teacher()

    def full(descriptor, data, offset):
        if teacher.asked > 24:
            raise OSError(28, "No space left on device")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space.*The 24 rows.*stay good"):
        write(path, teacher)
    monkeypatch.undo()
    write(path, teacher)
    assert teacher.asked == N + 8
