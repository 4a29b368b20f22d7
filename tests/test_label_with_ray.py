"""`examples/label_with_ray.py`, on a cluster of two workers that are killed.

First one of them, then all there is: the driver, Ray's own processes, and both
actors, by SIGKILL and at once, which leaves none of them time to clean up.
"""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from sklearn.datasets import load_digits

from keras_ptloss.soft_labels import fingerprint

SCRIPT = pathlib.Path(__file__).parent.parent / "examples/label_with_ray.py"
ROWS = 1797
# Whoever waits longer has failed.
SECONDS = 300

pytestmark = pytest.mark.slow


@pytest.fixture
def begin(tmp_path):
    """Start the example; what is left of it is killed after the test."""
    pytest.importorskip("ray")
    started = []

    def start(*arguments):
        process = subprocess.Popen(
            [
                *(sys.executable, SCRIPT, "--output", tmp_path),
                *("--seconds-a-batch", "0.5", *arguments),
            ],
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            kill_all(process)


def parents():
    """The parent of each process there is, but of those that have ended."""
    found = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # After the name, which may have spaces in it.
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                found[int(path.parent.name)] = int(parent)
    return found


def kill_all(driver):
    """Kill a process with all that it has started, at once.

    Returns:
        The names of what was killed, by process.
    """
    stopped = {}
    while True:
        of = parents()
        new = {
            process
            for process in of
            if process not in stopped
            and (process == driver.pid or of[process] in stopped)
        }
        if not new:
            break
        for process in new:
            # Nobody sees another die, starts a new one, or cleans up.
            os.kill(process, signal.SIGSTOP)
            line = pathlib.Path(f"/proc/{process}/cmdline").read_bytes()
            stopped[process] = line.replace(b"\0", b" ").decode()
    for process in stopped:
        os.kill(process, signal.SIGKILL)
    driver.communicate()
    deadline = time.monotonic() + SECONDS
    while stopped.keys() & parents().keys():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return stopped


def until(process, pattern, said):
    """Read on until a line has the pattern."""
    for line in process.stdout:
        said.append(line)
        if found := re.search(pattern, line):
            return found
    raise AssertionError("".join(said))


def wait_for_files(folder, count):
    deadline = time.monotonic() + SECONDS
    while len(list(folder.glob("*.parquet"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def finish(process, said):
    """Wait for its end; check what it says."""
    said += process.communicate(timeout=SECONDS)[0].splitlines(keepends=True)
    text = "".join(said)
    assert process.returncode == 0, text
    print(text)
    assert f"rows stored: {ROWS} of {ROWS}, twice: 0" in text
    accuracy = re.search("accuracy on these images: ([0-9.]+) %", text)
    assert float(accuracy[1]) > 80
    return text


def check_rows(output):
    """All rows are there once, and are what the teacher says."""
    pq = pytest.importorskip("pyarrow.parquet")
    files = sorted((output / "labels").glob("*.parquet"))
    tables = [pq.ParquetFile(file).read() for file in files]
    found = np.concatenate([t["fingerprint"].to_numpy() for t in tables])
    rows = np.array(sum((t["probabilities"].to_pylist() for t in tables), []))
    images = (load_digits().data / 16.0).astype("float32")
    prints = fingerprint(images)
    assert len(found) == len(set(prints.tolist())) == ROWS
    by_print, by_image = np.argsort(found), np.argsort(prints)
    np.testing.assert_array_equal(found[by_print], prints[by_image])
    teacher = keras.saving.load_model(output / "teacher.keras")
    said = teacher.predict(images, verbose=0)
    np.testing.assert_allclose(rows[by_print], said[by_image], atol=1e-5)


def test_a_killed_worker(tmp_path, begin):
    said = []
    process = begin()
    pattern = r"teacher loaded in process (\d+)"
    worker = int(until(process, pattern, said)[1])
    wait_for_files(tmp_path / "labels", 2)
    assert process.poll() is None
    os.kill(worker, signal.SIGKILL)
    files = len(list((tmp_path / "labels").glob("*.parquet")))
    said.append(f"TEST: killed worker {worker} after {files} files\n")
    text = finish(process, said)
    # It was midway: another process has loaded the teacher since.
    assert files < 24 and text.count("teacher loaded in process") > 1
    check_rows(tmp_path)


def test_all_killed_and_begun_again(tmp_path, begin):
    labels = tmp_path / "labels"
    first = begin()
    wait_for_files(labels, 3)
    killed = kill_all(first)
    actors = [name for name in killed.values() if "Teacher" in name]
    print(f"TEST: killed {len(killed)} processes, {len(actors)} teachers:")
    print("\n".join(name[:70] for name in killed.values()))
    assert len(actors) == 2
    # Whatever moment it was, one file is not whole.
    (labels / "cut.parquet").write_bytes(b"PAR1")
    there = {file: file.read_bytes() for file in labels.glob("*.parquet")}
    text = finish(begin(), [])
    before = int(re.search(r"labelled before: (\d+) rows", text)[1])
    assert 0 < before < ROWS
    assert not (labels / "cut.parquet").exists()
    for file, content in there.items():
        removed = f"removed {file.name}, which is not whole" in text
        assert removed or file.read_bytes() == content
    check_rows(tmp_path)
