"""Figures 3b, 4a and 4b of the paper, on its Gaussians.

    KERAS_BACKEND=jax python benchmarks/quality/gaussians_figures.py

appends students to benchmarks/results/gaussians_figures.csv and prints
gaussians_figures.md beside it. A stopped run continues where it was;
`--report` only prints the tables. Data, teachers and students are those of
gaussians.py. Figures 4a and 4b are from BoolQ and MNLI with T5 teachers in the
paper; here the same is done on the Gaussians.
"""

import argparse
import pathlib
import warnings

import numpy as np
from gaussians import mean_and_error
from gaussians_task import (
    accuracy,
    append,
    distance,
    load,
    predict,
    read,
    train,
)

from keras_ptloss import ProxyTeacherSearch, proxy_teacher
from keras_ptloss.search import RandomSearch

PATH = pathlib.Path("benchmarks/results/gaussians_figures.csv")
SEEDS = range(5)
ORDERS = range(1, 6)
TEACHER_EPOCHS = (1, 3, 10, 30, 100)


def students(task):
    """Return `(figure, setting, distance, targets, epsilon)` of each student.

    The distance is the mean L2 distance of the proxy teacher to the truth on
    the training rows; for Figure 4a it is the teacher's mean total variation
    distance to it on validation rows.
    """
    t = predict(task.path[-1], task.x)
    held_out = predict(task.path[-1], task.few_x)
    rng = np.random.default_rng(task.seed)

    def search(order):
        method = RandomSearch(order=order)
        return ProxyTeacherSearch(method, seed=task.seed).search(
            held_out, task.few_labels, verbose=0
        )

    def student(figure, setting, epsilon):
        apart = distance(proxy_teacher(t, epsilon).probabilities, task.truth)
        return figure, setting, apart, t, epsilon

    trials = search(3).trials
    ranks = np.linspace(0, len(trials["score"]) - 1, 8).round().astype(int)
    for rank, trial in zip(
        ranks, np.argsort(trials["score"])[ranks], strict=True
    ):
        yield student("3b", f"rank {rank + 1}", trials["epsilon"][trial])
    for epoch in TEACHER_EPOCHS:
        weights = task.path[epoch - 1]
        apart = predict(weights, task.validation[0]) - task.validation_truth
        tvd = np.abs(apart).sum(axis=1).mean() / 2
        yield "4a", f"epoch {epoch}", tvd, predict(weights, task.x), np.zeros(1)
    yield student("4b", "KL", np.zeros(1))
    for order in ORDERS:
        yield student("4b", f"order {order}, found", search(order).epsilon)
        epsilon = rng.uniform(-1, 10, size=order)
        yield student("4b", f"order {order}, random", epsilon)


def run(seed):
    """Append the missing students of a seed."""
    done = {(row["method"], row["setting"]) for row in read(PATH, seed)}
    task = load(seed)
    for figure, setting, apart, t, epsilon in students(task):
        if (figure, setting) in done:
            continue
        path, best, validation = train(task, task.x, t, None, epsilon)
        test = accuracy(task, path[best])
        scores = validation, test, apart
        append(PATH, seed, figure, setting, best + 1, *scores)


# --- Report ------------------------------------------------------------------


def table(figure, names):
    """Return distances and accuracies, `(seeds, settings)` each."""
    rows = [row for row in read(PATH) if row["method"] == figure]
    cells = {(row["seed"], row["setting"]): row for row in rows}
    seeds = dict.fromkeys(row["seed"] for row in rows)
    return [
        np.array(
            [[float(cells[s, name][column]) for name in names] for s in seeds]
        )
        for column in ("distance", "test")
    ]


def scatter(figure, kind):
    """Return the table and the correlation of a scatter plot."""
    names = [row["setting"] for row in read(PATH, 0) if row["method"] == figure]
    apart, test = table(figure, names)
    correlations = [
        np.corrcoef(a, b)[0, 1] for a, b in zip(apart, test, strict=True)
    ]
    error = np.std(correlations, ddof=1) / np.sqrt(len(correlations))
    lines = [f"| {kind} | distance | student's accuracy |", "|---|---|---|"]
    for k, name in enumerate(names):
        cell = mean_and_error(test[:, k])
        lines.append(f"| {name} | {apart[:, k].mean():.3f} | {cell} |")
    return "\n".join(lines) + (
        "\n\nCorrelation of distance and accuracy, mean over the seeds: "
        f"{np.mean(correlations):.2f} ± {error:.2f}.\n"
    )


def orders():
    """Return the table of Figure 4b."""
    lines = ["| order | found | random | found less KL | random less KL |"]
    lines.append("|---|---|---|---|---|")
    kl = table("4b", ["KL"])[1][:, 0]
    for order in ORDERS:
        found = table("4b", [f"order {order}, found"])[1][:, 0]
        drawn = table("4b", [f"order {order}, random"])[1][:, 0]
        columns = found, drawn, found - kl, drawn - kl
        cells = " | ".join(map(mean_and_error, columns))
        lines.append(f"| {order} | {cells} |")
    return "\n".join(lines) + f"\n\nKL: {mean_and_error(kl)}.\n"


def main():
    """Run what is missing, then print the tables."""
    warnings.simplefilter("ignore")  # notes on teacher and labels
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="run nothing")
    for seed in [] if parser.parse_args().report else SEEDS:
        run(seed)
    text = (
        "# Figures 3b, 4a and 4b on the paper's Gaussians\n\n"
        "`KERAS_BACKEND=jax python benchmarks/quality/gaussians_figures.py`\n\n"
        "Test accuracy in %, mean and standard error over five draws of the "
        "data. The teacher of 3b and 4b is that of the last epoch.\n\n"
        "### Figure 3b: eight proxy teachers of a search of order 3\n\n"
        "By the rank of their score (Eq. 11) among 100 draws.\n\n"
        f"{scatter('3b', 'proxy teacher')}\n"
        "### Figure 4a: teachers of different epochs\n\n"
        "Distance: total variation distance to the truth on validation "
        f"rows.\n\n{scatter('4a', 'teacher')}\n"
        "### Figure 4b: coefficients found by the search and random ones\n\n"
        f"Random: uniform draws from [-1, 10].\n\n{orders()}"
    )
    PATH.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
