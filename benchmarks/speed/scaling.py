"""How the solver's time grows with classes and rows, beside what it could be.

    KERAS_BACKEND=jax python benchmarks/speed/scaling.py \
        --output benchmarks/results/scaling.md

Proxy teachers of Dirichlet(0.3) teachers, M = 5: `solve_newton`, compiled;
the paper's fsolve, one logit held; and the least that any solver can take, the
time to read the teachers and to write the answers once at the bandwidth of this
machine's memory. Writes a Markdown report and `docs/figures/scaling.png`.
"""

import argparse
import pathlib
import time

import matplotlib
import numpy as np
from machine import load_average, machine

from keras_ptloss.proxy._blocks import solve_newton
from keras_ptloss.proxy._fsolve import _fsolve_row

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ORDER = 5
CLASSES = (2, 3, 10, 30, 100, 300, 1000)
ROWS = (16, 64, 256, 1024, 4096, 16384, 65536)
AT_ROWS, AT_CLASSES = 1000, 10
PICTURE = pathlib.Path(__file__).parents[2] / "docs" / "figures" / "scaling.png"
NAMES = ("Newton", "fsolve", "memory")

HEADER = """# How the solver's time grows

`KERAS_BACKEND=jax python benchmarks/speed/scaling.py --output {output}`

{machine}
Proxy teachers of Dirichlet(0.3) rows, M = 5, epsilon uniform in [-0.2, 10]
and shared by the classes, float64. Microseconds a row, the least of {repeats}
runs: other work on the machine only adds to them. fsolve is timed on {few}
rows (fewer where they take over {budget:.0f} s), to which its time is
proportional. "Memory": 16 C bytes a row, the teacher read and the answer
written, at the {bandwidth:.1f} GB/s at which NumPy copies 128 MB here.

![time against classes and rows](../../docs/figures/scaling.png)
"""


def bandwidth():
    """Return the bytes a second that a copy reads and writes."""
    source = np.ones(2**24)
    target = np.empty_like(source)
    return 2 * source.nbytes / least(lambda: np.copyto(target, source), 10)


def least(run, repeats):
    """Return the least time of a call, in seconds."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def fsolve_row(teacher, epsilon, few, budget):
    """Return fsolve's time of a row, in seconds; one logit is held."""
    done, begin = 0, time.perf_counter()
    for row in teacher[:few]:
        _fsolve_row(row, list(epsilon), 1e-8, 100 * len(row), True)
        done += 1
        if time.perf_counter() - begin > budget:
            break
    return (time.perf_counter() - begin) / done


def point(classes, rows, speed, arguments):
    """Return `{name: microseconds a row}`."""
    generator = np.random.default_rng(0)
    teacher = generator.dirichlet(np.full(classes, 0.3), size=rows)
    epsilon = generator.uniform(-0.2, 10.0, size=ORDER)
    solve_newton(teacher, epsilon)
    ours = least(lambda: solve_newton(teacher, epsilon), arguments.repeats)
    theirs = fsolve_row(teacher, epsilon, arguments.few, arguments.budget)
    found = (ours / rows, theirs, 16 * classes / speed)
    print(classes, rows, found, flush=True)
    return {n: 1e6 * value for n, value in zip(NAMES, found, strict=True)}


def table(title, points):
    """Return the Markdown lines of `{size: {name: microseconds}}`."""
    lines = [
        "",
        f"| {title} | Newton, µs a row | fsolve | memory | fsolve / Newton "
        "| Newton / memory |",
        "|---|---|---|---|---|---|",
    ]
    for size, p in points.items():
        ours, theirs, bound = (p[name] for name in NAMES)
        lines.append(
            f"| {size:,} | {ours:.3g} | {theirs:,.0f} | {bound:.2g} "
            f"| {theirs / ours:,.0f} | {ours / bound:,.0f} |"
        )
    return lines


def draw(by_classes, by_rows, path):
    """Draw both, log-log."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    labels = ("Newton (ours)", "fsolve (the paper's)", "memory: read and write")
    for name, label, style in zip(
        NAMES, labels, ("o-", "s-", "k:"), strict=True
    ):
        axes[0].loglog(
            list(by_classes),
            [1e-3 * AT_ROWS * p[name] for p in by_classes.values()],
            style,
            label=label,
        )
        axes[1].loglog(
            list(by_rows),
            [1e-3 * n * p[name] for n, p in by_rows.items()],
            style,
        )
    axes[0].set(xlabel="classes C", title=f"N = {AT_ROWS:,} rows")
    axes[1].set(xlabel="rows N", title=f"C = {AT_CLASSES} classes")
    axes[0].set_ylabel("milliseconds for all rows")
    axes[1].legend(handles=axes[0].lines, fontsize="small")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    """Measure, draw, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--few", type=int, default=16)
    parser.add_argument("--budget", type=float, default=15.0)
    arguments = parser.parse_args()
    speed = bandwidth()
    by_classes = {c: point(c, AT_ROWS, speed, arguments) for c in CLASSES}
    by_rows = {n: point(AT_CLASSES, n, speed, arguments) for n in ROWS}
    draw(by_classes, by_rows, PICTURE)
    header = HEADER.format(
        output=arguments.output,
        machine=machine(
            ("keras", "jax", "numpy", "scipy"), load_average("at the end")
        ),
        repeats=arguments.repeats,
        few=arguments.few,
        budget=arguments.budget,
        bandwidth=speed / 1e9,
    )
    lines = [
        *table(f"C, at N = {AT_ROWS:,}", by_classes),
        *table(f"N, at C = {AT_CLASSES}", by_rows),
    ]
    arguments.output.write_text(header + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
