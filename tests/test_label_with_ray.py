"""`examples/label_with_ray.py`, whose workers are killed by SIGKILL."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
import uuid

import keras
import numpy as np
import pytest

from keras_ptloss import SoftLabels

SCRIPT = pathlib.Path(__file__).parent.parent / "examples/label_with_ray.py"
SECONDS = 300  # whoever takes longer has failed

pytestmark = pytest.mark.ci


class Run:
    """A run of the script, with all processes that Ray starts for it."""

    def __init__(self, folder):
        self.folder, self.mark = folder, f"TEST_RUN={uuid.uuid4()}"
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, folder],
            env={**os.environ, **dict([self.mark.split("=")])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def processes(self, name=""):
        """Return the processes of the run whose command has the name."""
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                environment = (path / "environ").read_bytes()
                command = (path / "cmdline").read_bytes()
            except OSError:
                continue
            if self.mark.encode() in environment and name.encode() in command:
                found.append(int(path.name))
        return found

    def wait_for_rows(self):
        """Wait until a part has some rows, and not all are done."""
        deadline = time.monotonic() + SECONDS
        while not any(
            journal.stat().st_size
            for journal in self.folder.glob("part-*/journal-*")
        ):
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.02)

    def kill(self):
        """Kill all processes of the run; return how many."""
        killed = self.processes()
        for number in (signal.SIGSTOP, signal.SIGKILL):  # none sees another die
            for process in killed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)
        self.process.wait()
        self.process.stdout.close()
        return len(killed)

    def finish(self):
        """Wait for the end, and compare the store with the teacher."""
        text = self.process.communicate(timeout=SECONDS)[0]
        assert self.process.returncode == 0, text
        assert "1797 of 1797 images are labelled" in text
        labels = SoftLabels.open(self.folder / "labels")
        load_digits = pytest.importorskip("sklearn.datasets").load_digits
        images = (load_digits().data / 16.0).astype("float32")
        np.testing.assert_array_equal(labels.find(images), np.arange(1797))
        teacher = keras.saving.load_model(self.folder / "teacher.keras")
        right = teacher.predict(images, verbose=0)
        np.testing.assert_allclose(labels, right, atol=1e-3)


@pytest.fixture
def run(tmp_path):
    """Start the script; kill what is left of it after the test."""
    pytest.importorskip("ray")
    runs = []

    def start():
        runs.append(Run(tmp_path))
        return runs[-1]

    yield start
    for one in runs:
        one.kill()


def test_a_killed_worker(run):
    first = run()
    first.wait_for_rows()
    worker = first.processes("ray::label")[0]
    os.kill(worker, signal.SIGKILL)
    first.finish()


def test_all_killed_and_begun_again(run):
    first = run()
    first.wait_for_rows()
    assert first.kill() > 3
    run().finish()
