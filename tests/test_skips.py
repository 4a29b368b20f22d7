"""What is skipped for want of a package is shown, and in CI is an error."""

import os
import pathlib
import subprocess
import sys

import pytest

WANTING = """
import pytest

def test_missing():
    pytest.importorskip("no_such_package")

def test_present():
    assert pytest.importorskip("os.path").join
"""


@pytest.mark.parametrize(
    ("require", "shown"),
    [
        ("0", ("1 passed, 1 skipped", "could not import 'no_such_package'")),
        ("1", ("1 failed, 1 passed", "no_such_package is missing, and KERAS")),
    ],
)
def test_missing_package(tmp_path, require, shown):
    (tmp_path / "test_wanting.py").write_text(WANTING)
    environment = {
        **os.environ,
        "PYTHONPATH": str(pathlib.Path(__file__).parent),
        "KERAS_PTLOSS_REQUIRE_ALL": require,
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-ra"),
            *("-p", "required_packages", "--rootdir", tmp_path),
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == int(require), done.stdout
    for text in shown:
        assert text in done.stdout
