"""What the small studies of students share: command line, cells, a report."""

import argparse
import pathlib

import numpy as np

from benchmarks.quality.proxy import machine
from benchmarks.quality.study.report import column

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"


def arguments_of(doc, seeds, *, tasks=()):
    """Read the command line: seeds, the report alone, where to, the task."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    if tasks:
        parser.add_argument("task", choices=tasks)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--pictures", type=pathlib.Path, default=FIGURES)
    return parser.parse_args()


def standard_error(values):
    """Return the standard error of the mean; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def cell(rows, key="accuracy_last", scale=100, digits=2):
    """Return `mean ± standard error` of a column; `-` without rows."""
    if not rows:
        return "-"
    values = scale * column(rows, key)
    text = f"{values.mean():.{digits}f}"
    if len(values) > 1:
        text += f" ± {standard_error(values):.{digits}f}"
    return text


def named(rows, method):
    """Return the rows of a method, by seed."""
    found = [row for row in rows if row["method"] == method]
    return sorted(found, key=lambda row: int(row["seed"]))


def note(row):
    """Return the numbers of a note `a=1 b=2`."""
    parts = (part.split("=") for part in row["note"].split())
    return {key: float(value) for key, value in parts}


def write(path, title, command, lines):
    """Write a report: its command, the machine, the lines."""
    head = [
        f"# {title}",
        "",
        f"`KERAS_BACKEND=jax python -m benchmarks.quality.{command}`",
        "",
        machine(),
        "",
    ]
    text = "\n".join([*head, *lines]) + "\n"
    path.write_text(text)
    print(text)
