"""Every example runs, from the command line, as a user would run it."""

import os
import pathlib
import subprocess
import sys

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run(script, *arguments):
    out = subprocess.run(
        [sys.executable, EXAMPLES / script, *arguments],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    return out.stdout


def test_digits(tmp_path):
    """With one epoch and one seed: it runs, draws, exports and reloads."""
    out = run(
        "digits.py", "--output", tmp_path, "--epochs", "1", "--seeds", "1"
    )
    for line in ("(teacher)", "plain KL", "PTLoss, cross-validated"):
        assert line in out
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    assert (tmp_path / "student" / "1" / "saved_model.pb").exists()
