"""PTLoss against KL to its proxy, as the student's capacity grows.

    KERAS_BACKEND=jax python -m benchmarks.quality.capacity --seeds 5

One correction, two losses. Eq. 8-10 hold example by example: a student that can
answer each example by itself ends at the proxies by either. One that cannot
gives one answer for many: by PTLoss the proxy of their mean teacher, by KL to
the proxies the mean of them. If so, the gap closes as networks grow. The task
is the study's `gaussian_imbalanced`, students are 30-w-w-3 networks trained by
Adam, 1e-3 to 0 on a cosine, so that the wide ones fit what they are given.
Rows are appended to a CSV; a stopped run goes on where it was.
"""

import csv
import dataclasses
import itertools

import keras
import matplotlib.pyplot as plt
import numpy as np
from keras import layers

from benchmarks.quality import students
from benchmarks.quality.proxy import judge
from benchmarks.quality.study import harness, report
from benchmarks.quality.study.tasks import CLASSES, DIMENSIONS, gaussian
from keras_ptloss import ProxyTeacherSearch, PTLoss, proxy_teacher
from keras_ptloss.losses import ProxyKLDivergence
from keras_ptloss.search import GradientSearch, RandomSearch

WIDTHS = (4, 16, 64, 256)
ORDER = 3
# A repair with a bend of its own, and a bend that repairs nothing: Algorithm 1
# draws coefficients near 10, for which the two optima are furthest apart.
CORRECTIONS = {
    "vector + per class": GradientSearch(
        order=ORDER, per_class=True, calibration="vector", penalty=0.01
    ),
    "Algorithm 1": RandomSearch(order=ORDER),
}
LOSSES = ("PTLoss", "KL to the proxy")
SHORT = ("ptloss", "proxy")
APART = ("apart_train", "apart_test", "seeds_apart")
COLUMNS = (
    "correction",
    "width",
    "seed",
    *(f"{m}_{s}" for s in SHORT for m in ("accuracy", "nll", "to_proxy")),
    *APART,
)


def network(width):
    """Build a student with two hidden layers."""
    return keras.Sequential(
        [
            keras.Input((DIMENSIONS,)),
            layers.Dense(width, "relu"),
            layers.Dense(width, "relu"),
            layers.Dense(CLASSES),
        ]
    )


def adam(steps):
    """Adam, from 1e-3 down to 0."""
    rate = keras.optimizers.schedules.CosineDecay(1e-3, steps)
    return keras.optimizers.Adam(rate)


def total_variation(first, second):
    """Return the mean total variation distance of rows `(N, C)`."""
    return 0.5 * np.abs(first - second).sum(axis=1).mean()


def corrected_losses(kind, task):
    """Return a correction's two losses, and its proxies of the train rows."""
    found = ProxyTeacherSearch(CORRECTIONS[kind], seed=0).search(
        task.search.teacher, task.search.labels, verbose=False
    )
    loss = found.correction.loss(from_logits=True)
    if not isinstance(loss, PTLoss):
        raise TypeError(f"{kind}: PTLoss cannot carry it. Received: {loss}")
    to_proxy = ProxyKLDivergence(found.correction, from_logits=True)
    return dict(zip(LOSSES, (loss, to_proxy), strict=True)), found


def run_pair(task, kind, width, seed, before):
    """Train a student by each loss; return a row, and what they answer."""
    losses, found = corrected_losses(kind, task)
    proxies = found.proxy_teacher(task.distill.teacher).probabilities
    task = dataclasses.replace(
        task,
        make_student=lambda: network(width),
        make_optimizer=adam,
        # No epoch is chosen: the fewest rows for the callback that would.
        validation=task.search.take(slice(0, 100)),
    )
    row = {"correction": kind, "width": width, "seed": seed}
    train, test = {}, {}
    for loss, short in zip(LOSSES, SHORT, strict=True):
        training = harness.Training(
            task.distill.x, task.distill.teacher, losses[loss]
        )
        student, _ = harness.train(task, training, seed)
        train[loss], test[loss] = (
            harness.softmax(harness.predict(student, rows.x))
            for rows in (task.distill, task.test)
        )
        judged = judge(test[loss], task.test.labels)
        row[f"accuracy_{short}"] = f"{judged['accuracy']:.5f}"
        row[f"nll_{short}"] = f"{judged['nll']:.5f}"
        row[f"to_proxy_{short}"] = (
            f"{total_variation(train[loss], proxies):.5f}"
        )
    row["apart_train"] = f"{total_variation(*train.values()):.5f}"
    row["apart_test"] = f"{total_variation(*test.values()):.5f}"
    # What two seeds are apart by the same loss: the noise.
    row["seeds_apart"] = ""
    if before is not None:
        apart = [total_variation(test[k], before[k]) for k in LOSSES]
        row["seeds_apart"] = f"{np.mean(apart):.5f}"
    return row, test


def run(seeds, path):
    """Append the rows that are missing; Algorithm 1's of three seeds."""
    rows = harness.read(path)
    done = {(r["correction"], r["width"], r["seed"]) for r in rows}
    task = gaussian("gaussian_imbalanced", share=0.1)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not rows:
            writer.writeheader()
            for kind in CORRECTIONS:
                writer.writerow(constant(task, kind))
        for kind, width in itertools.product(CORRECTIONS, WIDTHS):
            before = None
            for seed in range(seeds if kind != "Algorithm 1" else 3):
                if (kind, str(width), str(seed)) in done:
                    continue
                row, before = run_pair(task, kind, width, seed, before)
                writer.writerow(row)
                file.flush()
                print(*row.values(), flush=True)


def constant(task, kind):
    """A student of one answer for all rows: computed, not trained."""
    _, found = corrected_losses(kind, task)
    outputs = task.distill.teacher
    mean = found.correction.teacher(outputs).mean(axis=0, keepdims=True)
    answers = {
        LOSSES[0]: proxy_teacher(mean, found.epsilon).probabilities,
        LOSSES[1]: found.proxy_teacher(outputs).probabilities.mean(
            axis=0, keepdims=True
        ),
    }
    apart = f"{total_variation(*answers.values()):.5f}"
    row = {"correction": kind, "width": 0, "seed": 0}
    for loss, short in zip(LOSSES, SHORT, strict=True):
        rows = np.repeat(answers[loss], len(task.test.labels), axis=0)
        judged = judge(rows, task.test.labels)
        row[f"accuracy_{short}"] = f"{judged['accuracy']:.5f}"
        row[f"nll_{short}"] = f"{judged['nll']:.5f}"
    return row | {"apart_train": apart, "apart_test": apart}


def group(rows, kind, width):
    """Return the rows of a correction and a width."""
    return [
        r for r in rows if (r["correction"], r["width"]) == (kind, str(width))
    ]


def gap(rows, metric):
    """Return KL to the proxy less PTLoss, a seed after another."""
    both = (report.column(rows, f"{metric}_{short}") for short in SHORT)
    pt_loss, to_proxy = both
    return to_proxy - pt_loss


def lines_of(rows):
    """Return the tables, a correction after another."""
    lines = []
    for kind in CORRECTIONS:
        lines += [
            "",
            f"## {kind}",
            "",
            "| width | seeds | PTLoss | KL to the proxy | gap | NLL, PTLoss | "
            "KL to the proxy | gap | to the proxies, PTLoss | KL to the proxy "
            "| apart, train | test | two seeds |",
            "|---" * 13 + "|",
        ]
        for width in (0, *WIDTHS):
            found = group(rows, kind, width)
            if not found:
                continue
            cells = [str(width), str(len(found)) if width else "computed"]
            for metric, scale, digits in (("accuracy", 100, 2), ("nll", 1, 3)):
                cells += [
                    students.cell(found, f"{metric}_{s}", scale, digits)
                    for s in SHORT
                ]
                values = scale * gap(found, metric)
                text = f"{values.mean():+.{digits}f}"
                if len(values) > 1:
                    error = students.standard_error(values)
                    text += f" ± {error:.{digits}f}"
                cells.append(text)
            for key in (*(f"to_proxy_{s}" for s in SHORT), *APART):
                kept = [row for row in found if row[key]]
                cells.append(students.cell(kept, key, 1, 3))
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(rows, path):
    """Draw the students' distance and the gap in NLL and accuracy."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for kind in CORRECTIONS:
        found = {w: group(rows, kind, w) for w in WIDTHS}
        found = {width: some for width, some in found.items() if some}
        for axis, values in zip(
            axes,
            (
                [report.column(r, "apart_train") for r in found.values()],
                [100 * gap(r, "accuracy") for r in found.values()],
                [gap(r, "nll") for r in found.values()],
            ),
            strict=True,
        ):
            axis.errorbar(
                list(found),
                [v.mean() for v in values],
                [students.standard_error(v) for v in values],
                marker="o",
                capsize=3,
                label=kind,
            )
            axis.set_xscale("log", base=2)
            axis.set_xticks(WIDTHS, WIDTHS)
            axis.set_xlabel("width of the student")
            axis.axhline(0, color="0.8", zorder=0)
    axes[0].set_ylabel("TV between the two students, train rows")
    axes[1].set_ylabel("accuracy: KL to the proxy - PTLoss, points")
    axes[2].set_ylabel("NLL: KL to the proxy - PTLoss")
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


ABOUT = """\
Task `gaussian_imbalanced`, order 3, students 30-w-w-3, 100 epochs of Adam \
from 1e-3 to 0, batch 32. One correction, found once, by both losses, from the \
same initial weights and the same order of the rows. Test accuracy in % and \
NLL, last epoch, mean ± standard error over the seeds; gap: KL to the proxy \
less PTLoss, paired. To the proxies: mean total variation between the \
student's answers and the proxies it was trained towards, train rows. Apart: \
between the two students, train and test rows; two seeds: between students of \
the same loss and of other seeds, test rows. Width 0 is a student that gives \
one answer for all, computed: the proxy of the mean teacher, and the mean of \
the proxies.

![gap against width](../../docs/figures/capacity.png)"""


def main():
    """Run what is missing, then write the tables and the picture."""
    arguments = students.arguments_of(__doc__, 5)
    path = arguments.output / "capacity.csv"
    if not arguments.report:
        run(arguments.seeds, path)
    rows = harness.read(path)
    draw(rows, arguments.pictures / "capacity.png")
    students.write(
        path.with_suffix(".md"),
        "PTLoss against KL to its proxy, by the student's capacity",
        f"capacity --seeds {arguments.seeds}",
        [ABOUT, *lines_of(rows)],
    )


if __name__ == "__main__":
    main()
