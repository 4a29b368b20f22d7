"""Does the student get better? One study: a task, all methods, the seeds.

    KERAS_BACKEND=jax python -m benchmarks.quality.study gaussian --seeds 5

from the repository's folder. Rows are appended to
`benchmarks/results/study_<task>.csv` as they come; a stopped study goes on
where it was.
"""

import argparse
import os
import pathlib

from benchmarks.quality.study.harness import run
from benchmarks.quality.study.methods import all_methods, check_names
from benchmarks.quality.study.tasks import TASKS

RESULTS = pathlib.Path(__file__).parents[2] / "results"


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--order", type=int, default=5)
    parser.add_argument("--methods", nargs="*", help="these alone")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    methods = all_methods(arguments.order)
    if arguments.methods:
        check_names(arguments.methods, methods)
        methods = [m for m in methods if m.name in arguments.methods]
    task = TASKS[arguments.task]()
    methods = [m for m in methods if m.fits(task)]
    path = arguments.output / f"study_{task.name}.csv"
    run(task, methods, arguments.seeds, path)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
