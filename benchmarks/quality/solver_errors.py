"""The solver's errors where a class is tiny: a picture against a closed form.

    KERAS_BACKEND=jax python benchmarks/quality/solver_errors.py \
        --before benchmarks/results/solver_errors_before.csv \
        --output benchmarks/results/solver_errors

At epsilon_m = -1/m, m = 1..M, two classes end at `q2 / q1 =
(t2 / t1)^(1/(M+1))`. `--write FILE.csv` writes the errors of the installed
package: so were those of commit 660a0d8 made, which are drawn beside.
"""

import argparse
import csv
import pathlib

import numpy as np

from keras_ptloss import ProxyTeacher, proxy_teacher

ORDER = 5


def errors():
    """Yield `(solver, t2, relative error of q2, whether called converged)`."""
    epsilon = -1.0 / np.arange(1, ORDER + 1)
    for decade in np.arange(1.0, 31.0, 0.5):
        small = 10.0**-decade
        ratio = (small / (1.0 - small)) ** (1.0 / (ORDER + 1))
        right = ratio / (1.0 + ratio)
        rows = np.array([[1.0 - small, small]])
        solved = proxy_teacher(rows, epsilon)
        off = abs(solved.probabilities[0, 1] / right - 1.0)
        yield "newton, float64", small, off, bool(solved.converged[0])
        q = np.asarray(ProxyTeacher(epsilon)(rows.astype("float32")))
        yield "layer, float32", small, abs(q[0, 1] / right - 1.0), ""


def draw(path, now, before):
    """Draw both versions' errors, log-log."""
    import matplotlib.pyplot as plt

    _, ax = plt.subplots(figsize=(7, 4.5))
    colors = {"newton, float64": "C0", "layer, float32": "C1"}
    for rows, style, when in ((before, "--", "before"), (now, "-", "now")):
        for solver, color in colors.items():
            points = [(t, e) for name, t, e, _ in rows if name == solver]
            if points:
                t, off = np.array(points).T
                off = np.maximum(off, 1e-17)
                ax.loglog(t, off, style, color=color, label=f"{solver}, {when}")
    ax.axhline(1e-12, color="gray", linewidth=0.8)
    ax.annotate("tolerance", (1e-29, 1.5e-12), color="gray")
    ax.set(
        xlabel="the teacher's probability of the small class",
        ylabel="relative error of the proxy teacher's",
        title=r"$\epsilon_m = -1/m$, M = 5, two classes",
    )
    ax.legend(loc="center left", bbox_to_anchor=(0, 0.66), fontsize="small")
    plt.tight_layout()
    plt.savefig(path, dpi=110)


def read(path):
    """Read what `--write` wrote."""
    with open(path, newline="") as file:
        return [
            (r["solver"], float(r["t"]), float(r["error"]), r["converged"])
            for r in csv.DictReader(file)
        ]


def main():
    """Measure; write a CSV, or draw and tabulate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=pathlib.Path)
    parser.add_argument("--before", type=pathlib.Path)
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    now = list(errors())
    if arguments.write:
        with open(arguments.write, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["solver", "t", "error", "converged"])
            writer.writerows(now)
    if arguments.output:
        before = read(arguments.before) if arguments.before else []
        draw(arguments.output.with_suffix(".png"), now, before)
    for name in ("newton, float64", "layer, float32"):
        off = [error for solver, _, error, _ in now if solver == name]
        print(f"{name}: largest relative error {max(off):.2g}")


if __name__ == "__main__":
    main()
