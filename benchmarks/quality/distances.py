"""The paper's Fig. 4a as students: distance to the truth against the student.

    KERAS_BACKEND=jax python -m benchmarks.quality.distances --seeds 1

The ResNet-50s of CIFAR-10, each as it is and as the default search corrects it
by 1,000 labelled images. Distance: the mean total variation of the rows that
the student sees to their true labels, 1 - q(label). The students are the
study's on a reduced budget: 6,000 images, 4 epochs. Rows are appended to a CSV;
a stopped run goes on where it was.
"""

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import scipy.stats

from benchmarks.quality import students
from benchmarks.quality.study import harness, methods
from benchmarks.quality.study.tasks import DATA, cifar10
from benchmarks.quality.teachers import load
from keras_ptloss import ProxyTeacherSearch

IMAGES, EPOCHS = 6000, 4
KINDS = ("as it is", "corrected")


def method_of(name, number, kind):
    """KL to one of the task's teachers, corrected or not."""

    def prepare(task, setting, seed):
        q, text = task.distill.several[number], ""
        if kind == "corrected":
            found = ProxyTeacherSearch(seed=seed).search(
                task.search.several[number], task.search.labels, verbose=False
            )
            q = found.proxy_teacher(q).probabilities
            text = methods.describe(found)
        labels = task.distill.labels
        tv = 1 - q[np.arange(len(labels)), labels].mean()
        right = np.mean(q.argmax(axis=1) == labels)
        return harness.Training(
            task.distill.x,
            q.astype("float32"),
            methods.KL,
            note=f"tv={tv:.5f} right={right:.5f} {text}".strip(),
        )

    return harness.Method(f"{name}, {kind}", prepare)


def numbers(row):
    """Return total variation and accuracy of the teacher in a row's note."""
    parts = row["note"].split()[:2]
    return [float(part.split("=")[1]) for part in parts]


def table(rows):
    """Return `{teacher: {kind: (tv, right, student)}}`, means over seeds."""
    found = {}
    for row in rows:
        name, kind = row["method"].split(", ")
        values = (*numbers(row), float(row["accuracy_last"]))
        found.setdefault(name, {}).setdefault(kind, []).append(values)
    return {
        name: {kind: np.mean(v, axis=0) for kind, v in kinds.items()}
        for name, kinds in found.items()
    }


def correlation(points):
    """Return Spearman's and Pearson's correlation of distance and student."""
    tv, _, student = np.array(points).T
    rank = scipy.stats.spearmanr(tv, student)
    line = scipy.stats.pearsonr(tv, student)
    return (
        f"{rank.statistic:+.2f} (p = {rank.pvalue:.1g}) | "
        f"{line.statistic:+.2f} (p = {line.pvalue:.1g})"
    )


def lines_of(rows):
    """Return the tables."""
    found = table(rows)
    lines = [
        "",
        "| teacher | TV | right | student | TV, corrected | right | student |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, kinds in sorted(found.items()):
        cells = [f"`{name}`"]
        for kind in KINDS:
            if kind in kinds:
                tv, right, student = kinds[kind]
                cells += [f"{tv:.3f}", f"{100 * right:.1f}"]
                cells.append(f"{100 * student:.1f}")
            else:
                cells += ["-"] * 3
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Correlation of total variation and the student's accuracy:",
        "",
        "| teachers | number | Spearman | Pearson |",
        "|---|---|---|---|",
    ]
    groups = {k: [f[k] for f in found.values() if k in f] for k in KINDS}
    for name, points in (groups | {"both": sum(groups.values(), [])}).items():
        if len(points) > 2:
            lines.append(f"| {name} | {len(points)} | {correlation(points)} |")
    return lines


def draw(rows, path):
    """Draw students against distance; a line joins a teacher's two."""
    figure, axis = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    found = table(rows)
    for kinds in found.values():
        ends = np.array(list(kinds.values()))
        axis.plot(ends[:, 0], 100 * ends[:, 2], color="0.85", zorder=0)
    for kind, marker in zip(KINDS, "o^", strict=True):
        points = np.array([k[kind] for k in found.values() if kind in k])
        axis.plot(points[:, 0], 100 * points[:, 2], marker, label=kind)
    axis.set_xlabel("total variation of the teacher to the true labels")
    axis.set_ylabel("student's test accuracy, %")
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


ABOUT = f"""\
A ResNet-8 on images halved to 16 x 16, {IMAGES:,} images without labels, \
{EPOCHS} epochs (the studies: 16,000 and 8), KL to the teacher's stored \
outputs or to what the default search makes of them by 1,000 other, labelled \
images; the CIFAR-10 test set, last epoch. TV: mean total variation of the \
outputs that the student sees to their true labels; right: their accuracy, %. \
`symfrac0_a_noise0_b`: trained on labels of which .b are wrong, a share .a of \
them symmetric.

![distance and student](../../docs/figures/distances.png)"""


def main():
    """Run what is missing, then write the table and the picture."""
    arguments = students.arguments_of(__doc__, 1)
    path = arguments.output / "distances.csv"
    if not arguments.report:
        names = sorted(load(DATA)[0])
        task = cifar10("distances", *names)
        task = dataclasses.replace(
            task, distill=task.distill.take(slice(0, IMAGES)), epochs=EPOCHS
        )
        chosen = [
            method_of(name, number, kind)
            for number, name in enumerate(names)
            for kind in KINDS
        ]
        harness.run(task, chosen, arguments.seeds, path)
    rows = harness.read(path)
    draw(rows, arguments.pictures / "distances.png")
    students.write(
        path.with_suffix(".md"),
        "Total variation to the truth and the student (Fig. 4a)",
        f"distances --seeds {arguments.seeds}",
        [ABOUT, *lines_of(rows)],
    )


if __name__ == "__main__":
    main()
