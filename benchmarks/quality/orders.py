"""The paper's Fig. 4b as students: searched coefficients against random ones.

    KERAS_BACKEND=jax python -m benchmarks.quality.orders --seeds 3

For each order M from 1 to 5, a student by PTLoss with the coefficients that a
search found, and one with coefficients drawn as Algorithm 1 draws them, a draw
a seed; shared by the classes and per class. Algorithm 1 keeps the best of 100
draws of just that order. Task `gaussian_imbalanced`. Rows are appended to a
CSV; a stopped run goes on where it was.
"""

import dataclasses

import keras
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats

from benchmarks.quality import students
from benchmarks.quality.study import harness, methods, report
from benchmarks.quality.study.tasks import TASKS
from keras_ptloss import ProxyTeacherSearch, PTLoss, proxy_teacher
from keras_ptloss.search import GradientSearch, RandomSearch
from keras_ptloss.search._objectives import OBJECTIVES

ORDERS = (1, 2, 3, 4, 5)
SPACE = (-1.0, 10.0)


def random_draw(task, order, seed, per_class):
    """One draw of the space."""
    shape = (task.classes, order) if per_class else (order,)
    return np.random.default_rng(100 + seed).uniform(*SPACE, size=shape)


def algorithm_1(task, order, seed, per_class):
    """The best of 100 draws of this order, by Eq. 11."""
    search = RandomSearch(order=order, per_class=per_class, space=SPACE)
    trials = run_search(task, search, seed).trials
    best = [
        k
        for k, kept in enumerate(trials["best_of_order"])
        if kept and trials["order"][k] == order
    ]
    return trials["epsilon"][best[0]]


def gradient(task, order, seed, per_class):
    """NLL by the gradient, the study's penalty."""
    search = GradientSearch(order=order, per_class=per_class, penalty=0.01)
    return run_search(task, search, seed).epsilon


def run_search(task, method, seed):
    """Search on the task's labelled rows."""
    return ProxyTeacherSearch(method, seed=seed).search(
        task.search.teacher, task.search.labels, verbose=False
    )


FINDERS = {
    "random": random_draw,
    "Algorithm 1": algorithm_1,
    "gradient, NLL": gradient,
}
KINDS = {"shared": False, "per class": True}
# The shared coefficients of least NLL are left out: time, and they only bend
# the confidence.
RUN = tuple(
    (finder, kind)
    for kind in KINDS
    for finder in FINDERS
    if (finder, kind) != ("gradient, NLL", "shared")
)


def method_of(finder, kind, order):
    """A method: coefficients, and PTLoss of them."""

    def prepare(task, setting, seed):
        epsilon = FINDERS[finder](task, order, seed, KINDS[kind])
        q = proxy_teacher(task.distill.teacher, epsilon).probabilities
        distance = 0.5 * np.abs(q - task.truth).sum(axis=1).mean()
        few = proxy_teacher(task.search.teacher, epsilon).probabilities
        scores = {
            name: float(OBJECTIVES[name].score(few, task.search.labels))
            for name in ("risk", "nll")
        }
        scores["tv"] = float(distance)
        return harness.Training(
            task.distill.x,
            task.distill.teacher,
            PTLoss(epsilon, **methods.PROBABILITIES),
            note=" ".join(f"{k}={v:.5f}" for k, v in scores.items()),
        )

    return harness.Method(name_of(finder, kind, order), prepare)


def faster(steps):
    """SGD of the study, for batches four times as large."""
    return keras.optimizers.SGD(2e-3, momentum=0.9)


def name_of(finder, kind, order):
    """The name in the CSV."""
    return f"{finder}, {kind}, {order}"


def lines_of(rows, kl):
    """Return the tables: accuracy, and the proxies' distance to the truth."""
    lines = []
    titles = {
        "accuracy_last": "Test accuracy, last epoch",
        "tv": "Total variation of the proxies to the truth, train rows",
    }
    for key, title in titles.items():
        head = " | ".join(f"M = {order}" for order in ORDERS)
        lines += ["", f"## {title}", "", f"| | {head} |", "|---" * 6 + "|"]
        for finder, kind in RUN:
            cells = []
            for order in ORDERS:
                found = students.named(rows, name_of(finder, kind, order))
                if key == "tv":
                    values = [students.note(row)["tv"] for row in found]
                    text = f"{np.mean(values):.3f}" if values else "-"
                else:
                    text = students.cell(found, key)
                cells.append(text)
            lines.append(f"| {finder}, {kind} | {' | '.join(cells)} |")
        if key != "tv":
            lines.append(
                f"| KL | {students.cell(kl, key)}" + " |" * len(ORDERS)
            )
    lines += ["", "Algorithm 1 less random, over all orders and seeds:", ""]
    lines += [f"* {kind}: {searched_less_random(rows, kind)}" for kind in KINDS]
    return lines + ["", *correlations(rows)]


def searched_less_random(rows, kind):
    """Return the mean difference of accuracy, and its test."""
    searched, drawn = (
        np.concatenate(
            [
                report.column(
                    students.named(rows, name_of(finder, kind, order)),
                    "accuracy_last",
                )
                for order in ORDERS
            ]
        )
        for finder in ("Algorithm 1", "random")
    )
    points = 100 * (searched - drawn)
    p = scipy.stats.ttest_rel(searched, drawn).pvalue
    return (
        f"{points.mean():+.2f} ± {students.standard_error(points):.2f} points, "
        f"{np.sum(points > 0)} of {len(points)} pairs above 0, p = {p:.3f}"
    )


def correlations(rows):
    """Return how a proxy's scores go with its student, over all of them."""
    rows = [row for row in rows if row["method"] != "KL"]
    accuracy = report.column(rows, "accuracy_last")
    shared = np.array([", shared, " in row["method"] for row in rows])
    titles = {
        "tv": "total variation to the truth",
        "nll": "NLL on the search's rows",
        "risk": "Eq. 11 on the search's rows",
    }
    lines = [
        "Spearman's correlation with the student's accuracy:",
        "",
        f"| | all {len(rows)} | {shared.sum()} shared | "
        f"{(~shared).sum()} per class |",
        "|---|---|---|---|",
    ]
    for key, title in titles.items():
        values = np.array([students.note(row)[key] for row in rows])
        cells = [
            f"{scipy.stats.spearmanr(values[k], accuracy[k]).statistic:+.2f}"
            for k in (np.full(len(rows), True), shared, ~shared)
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def draw(rows, kl, path):
    """Draw accuracy against order, shared and per class."""
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 4), layout="constrained", sharey=True
    )
    for axis, kind in zip(axes, KINDS, strict=True):
        for finder in [f for f, k in RUN if k == kind]:
            found = {
                order: students.named(rows, name_of(finder, kind, order))
                for order in ORDERS
            }
            values = {
                order: 100 * report.column(some, "accuracy_last")
                for order, some in found.items()
                if some
            }
            axis.errorbar(
                list(values),
                [v.mean() for v in values.values()],
                [students.standard_error(v) for v in values.values()],
                marker="o",
                capsize=3,
                label=finder,
            )
        level = 100 * report.column(kl, "accuracy_last").mean()
        axis.axhline(level, color="0.6", linestyle="--", label="KL")
        axis.set(title=kind, xlabel="order M", xticks=ORDERS)
    axes[0].set_ylabel("student's test accuracy, %")
    axes[1].legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


ABOUT = """\
Task `gaussian_imbalanced`; the student of the study, 100 epochs, but in \
batches of 128 at a rate of .002 (the study: 32 and .0005). Accuracy in %, \
mean ± standard error over the seeds; a seed has a draw or a search of its \
own. Random: uniform on [-1, 10]. Algorithm 1: the best of 100 such draws by \
Eq. 11, of this order alone. Gradient: NLL on the same 1,000 labelled rows, \
penalty .01, no calibration.

![accuracy against order](../../docs/figures/orders.png)"""


def main():
    """Run what is missing, then write the tables and the picture."""
    arguments = students.arguments_of(__doc__, 3)
    path = arguments.output / "orders.csv"
    if not arguments.report:
        chosen = [methods.distil("KL", lambda setting: methods.KL)]
        chosen += [
            method_of(finder, kind, order)
            for order in ORDERS
            for finder, kind in RUN
        ]
        task = TASKS["gaussian_imbalanced"]()
        task = dataclasses.replace(
            task,
            batch_size=128,
            make_optimizer=faster,
            # No epoch is chosen: the fewest rows for the callback that would.
            validation=task.search.take(slice(0, 100)),
        )
        harness.run(task, chosen, arguments.seeds, path)
    rows = harness.read(path)
    kl = students.named(rows, "KL")
    draw(rows, kl, arguments.pictures / "orders.png")
    students.write(
        path.with_suffix(".md"),
        "Searched and random coefficients by order (Fig. 4b)",
        f"orders --seeds {arguments.seeds}",
        [ABOUT, *lines_of(rows, kl)],
    )


if __name__ == "__main__":
    main()
