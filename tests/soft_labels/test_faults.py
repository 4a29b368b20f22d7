"""Full disks, folders that cannot be written, other clocks and locales."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap

import helpers
import numpy as np
import pytest
from stores import ENVIRONMENT, N, Teacher, features, write

from keras_ptloss.soft_labels import SoftLabels, import_soft_labels

pytestmark = helpers.slow_but_on_one()

IN_A_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def run(code, *arguments, command=(), **environment):
    return subprocess.run(
        [*command, sys.executable, "-c", textwrap.dedent(code), *arguments],
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
    )


def test_a_disk_that_is_full(tmp_path):
    """A tmpfs of 256 KiB: the error comes before the teacher has been paid."""
    mount = "mount -t tmpfs -o size=256k none"
    probe = [*IN_A_NAMESPACE, "sh", "-c", f"{mount} {tmp_path}"]
    if not shutil.which("unshare") or subprocess.run(probe).returncode:
        pytest.skip("needs a mount namespace (unshare --user --mount)")
    done = run(
        """
        import os, subprocess, sys
        import numpy as np
        from keras_ptloss.soft_labels import SoftLabels

        disk = sys.argv[1]
        subprocess.run([*sys.argv[2].split(), disk], check=True)
        asked = 0

        def teacher(x):
            global asked
            asked += len(x)
            return np.full((len(x), 100), 0.01)

        x, path = np.arange(1000), disk + "/s"
        ballast = open(disk + "/ballast", "wb")
        ballast.write(bytes(100_000))
        ballast.flush()
        for _ in range(2):
            try:
                SoftLabels.write(teacher, x, path, verbose=0)
            except OSError as error:
                assert error.errno == 28, error
                assert "make room and call again" in str(error), error
            else:
                raise AssertionError("no error")
        assert asked == 64, asked
        ballast.truncate(0)
        labels = SoftLabels.write(teacher, x, path, verbose=0)
        assert len(labels) == 1000 and asked == 1064, asked
        """,
        str(tmp_path),
        mount,
        command=IN_A_NAMESPACE,
    )
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def read_only(folder):
    """Others may read the folder only; root gives up its rights."""
    for name, _, files in os.walk(folder):
        os.chmod(name, 0o555)
        for file in files:
            os.chmod(f"{name}/{file}", 0o444)
    user = os.geteuid()
    if not user:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        for name, _, _ in os.walk(folder):
            os.chmod(name, 0o755)


@pytest.fixture
def open_folder():
    """pytest's own are closed to other users."""
    folder = tempfile.mkdtemp()
    yield folder
    shutil.rmtree(folder)


def test_a_folder_that_cannot_be_written(open_folder):
    write(f"{open_folder}/whole")
    with pytest.raises(RuntimeError):
        write(f"{open_folder}/begun", Teacher(fail_at=24))
    table = f"{open_folder}/table.npy"
    np.save(table, np.full((N, 4), 0.25))
    teacher = Teacher()
    with read_only(open_folder):
        for name in ("new", "begun", "whole/inside"):
            with pytest.raises(PermissionError, match=open_folder):
                write(f"{open_folder}/{name}", teacher)
        with pytest.raises(PermissionError, match=open_folder):
            import_soft_labels(table, features(), f"{open_folder}/new")
        # To read takes no right to write.
        assert len(SoftLabels.open(f"{open_folder}/whole")[:]) == N
        with pytest.raises(ValueError, match="24 rows stored"):
            SoftLabels.open(f"{open_folder}/begun")
    assert teacher.asked == 0
    assert sorted(os.listdir(open_folder)) == ["begun", "table.npy", "whole"]
    write(f"{open_folder}/begun", teacher)
    assert teacher.asked == N - 24


def test_another_clock_and_another_locale(tmp_path):
    """Begun in one, gone on with in another: no time or text depends on it."""
    path = tmp_path / "\u017bubr\u00f3wka s"
    names = ("I", "\u0131", "\u4e00", "c")
    with pytest.raises(RuntimeError):
        write(path, Teacher(fail_at=24), class_names=names)
    for name, folders, files in os.walk(path):
        for entry in (*folders, *files):
            os.utime(os.path.join(name, entry), (4e9, 4e9))  # in 2096
    done = run(
        """
        import sys
        from stores import N, Teacher, write

        teacher = Teacher()
        names = ("I", "\\u0131", "\\u4e00", "c")
        write(sys.argv[1], teacher, class_names=names)
        assert teacher.asked == N - 24, teacher.asked
        """,
        str(path),
        LC_ALL="C",
        PYTHONCOERCECLOCALE="0",
        PYTHONUTF8="0",
        TZ="Etc/GMT+12",
        PYTHONPATH=os.pathsep.join(p for p in sys.path if p),
    )
    assert done.returncode == 0, done.stderr
    labels = SoftLabels.open(path)
    assert labels.spec.class_names == names
    np.testing.assert_allclose(labels[:], Teacher().rows(features()), atol=1e-3)
