"""Time Algorithm 1: Newton's method beside SciPy's fsolve.

    KERAS_BACKEND=jax python benchmarks/speed/search.py [--before CHECKOUT]

`--before` is another checkout of this project, whose random search is run on
the same examples in a process of its own. The times are CPU times of the
process after compilation, medians over the repeats. fsolve runs on a share of
the draws, and its time is scaled up.
"""

import argparse
import os
import subprocess
import sys
import time

import numpy as np

FSOLVE_DRAWS = 5


def examples(classes, rows):
    """Return teacher probabilities and labels."""
    rng = np.random.default_rng(0)
    teacher = rng.dirichlet(np.full(classes, 0.3), size=rows)
    return teacher, rng.integers(0, classes, size=rows)


def random_search(classes, rows, draws, solver="newton"):
    """Return a function that runs Algorithm 1 with orders 1 to 5."""
    from keras_ptloss.search import RandomSearch

    teacher, labels = examples(classes, rows)
    per_order = max(1, draws // 5)
    try:
        from keras_ptloss.search import Examples

        method = RandomSearch(num_trials=per_order, order=(1, 5), solver=solver)
        data = Examples([teacher], labels, np.ones(rows), classes)
        return lambda: method.run(data, lambda done, total: None)
    except ImportError:  # before the interfaces were settled
        from keras_ptloss import ProxyTeacherSearch

        method = RandomSearch(trials=per_order, order=5, solver=solver)
        search = ProxyTeacherSearch(method)
        return lambda: search.search(teacher, labels, verbose=0)


def seconds(function, repeats):
    """Return the median CPU time of a call."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return float(np.median(times))


def newton_seconds(classes, arguments):
    """Return the CPU time of the search with Newton's method."""
    search = random_search(classes, arguments.rows, arguments.draws)
    search()  # compile
    return seconds(search, arguments.repeats)


def before_seconds(classes, arguments):
    """Return what `newton_seconds` returns in another checkout."""
    command = [sys.executable, "-W", "ignore", __file__, "--only", str(classes)]
    for name in ("rows", "draws", "repeats"):
        command += [f"--{name}", str(getattr(arguments, name))]
    environment = os.environ | {"PYTHONPATH": arguments.before}
    run = subprocess.run(
        command,
        env=environment,
        cwd=arguments.before,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(run.stdout.split()[-1])


def main():
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before")
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 10, 100])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(newton_seconds(arguments.only, arguments))
        return
    print(
        "| classes | Newton, s | fsolve, s | fsolve / Newton | now / before |"
    )
    print("|---|---|---|---|---|")
    for classes in arguments.classes:
        newton = newton_seconds(classes, arguments)
        few = random_search(classes, 20, FSOLVE_DRAWS, solver="fsolve")
        scale = arguments.rows / 20 * arguments.draws / FSOLVE_DRAWS
        fsolve = scale * seconds(few, 1)
        ratio = "-"
        if arguments.before:
            ratio = f"{newton / before_seconds(classes, arguments):.2f}"
        print(
            f"| {classes} | {newton:.2f} | {fsolve:.0f} "
            f"| {fsolve / newton:.0f} | {ratio} |"
        )


if __name__ == "__main__":
    main()
