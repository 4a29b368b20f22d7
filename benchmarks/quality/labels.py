"""How many labels does a search need? The proxy, and a student, against N.

    KERAS_BACKEND=jax python -m benchmarks.quality.labels \
        --data ../shared/data --output benchmarks/results/labels.md

Two ResNet-50s of CIFAR-10, one trained on labels of which 60 % are noise, one
mildly biased. For each N and subset, the corrections are searched on N labelled
rows and judged on 20,000 others. `--students 1` also trains the study's student
with the default search of the first subset, seed 0. Results are appended to a
CSV beside the output; a stopped run goes on where it was, and `--report` draws
and writes what is there.
"""

import argparse
import csv
import itertools
import pathlib
import warnings

import matplotlib
import numpy as np

from benchmarks.quality.proxy import choice, judge, machine, spread
from benchmarks.quality.teachers import JUDGED, load
from keras_ptloss import ProxyTeacherSearch
from keras_ptloss.search import CalibrationSearch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUMBERS = (100, 300, 1000, 3000)
TEACHERS = {
    "resnet50_symfrac0_6_noise0_6": "60 % noise",
    "resnet50_symfrac0_4_noise0_2": "mildly biased",
}
METHODS = {
    "teacher": None,
    "temperature": CalibrationSearch("temperature"),
    "matrix, penalty 1": CalibrationSearch("matrix"),
    "default search": "cross_validation",
}
STUDENT = "student, default search"
COLUMNS = ("teacher", "labels", "seed", "method", "nll", "accuracy", "note")
PICTURE = pathlib.Path(__file__).parents[2] / "docs" / "figures" / "labels.png"


def read(path):
    """Return the rows so far."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append(path, row):
    """Add a row; the first one brings the header."""
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(*row.values(), flush=True)


def run(arguments, path):
    """Search and judge what is missing."""
    done = {tuple(r[c] for c in COLUMNS[:4]) for r in read(path)}
    teachers, labels = load(arguments.data)
    for seed in range(arguments.subsets):
        order = np.random.default_rng(seed).permutation(len(labels))
        judged = order[-JUDGED:]
        for name, number, method in itertools.product(
            TEACHERS, NUMBERS, METHODS
        ):
            key = (name, str(number), str(seed), method)
            if key in done:
                continue
            few, q, note = order[:number], teachers[name][judged], ""
            if METHODS[method] is not None:
                search = ProxyTeacherSearch(METHODS[method], seed=seed)
                found = search.search(
                    teachers[name][few], labels[few], verbose=False
                )
                q, note = found.proxy_teacher(q).probabilities, choice(found)
            values = judge(q, labels[judged])
            numbers = (f"{values[m]:.5f}" for m in ("nll", "accuracy"))
            row = zip(COLUMNS, (*key, *numbers, note), strict=True)
            append(path, dict(row))


def run_students(arguments, path):
    """Train the study's student on the default search of each N."""
    from benchmarks.quality.study import harness, methods, tasks

    done = {tuple(r[c] for c in COLUMNS[:4]) for r in read(path)}
    searched = next(m for m in methods.all_methods() if m.name == "searched")
    for name in list(TEACHERS)[: arguments.students]:
        for number in NUMBERS:
            key = (name, str(number), "0", STUDENT)
            if key in done:
                continue
            task = tasks.cifar10(
                "labels", name, data=arguments.data, search_rows=number
            )
            row = harness.run_one(task, searched, None, 0)
            values = (row["nll"], row["accuracy_last"], row["note"])
            append(path, dict(zip(COLUMNS, (*key, *values), strict=True)))


def collected(rows, teacher, method, metric):
    """Return `{N: values}` over the subsets."""
    values = {}
    for row in rows:
        if row["teacher"] == teacher and row["method"] == method:
            values.setdefault(int(row["labels"]), []).append(float(row[metric]))
    return {n: np.array(values[n]) for n in sorted(values)}


def draw(rows, path):
    """Draw NLL above, accuracy below, a teacher a column."""
    figure, axes = plt.subplots(
        2, 2, figsize=(9, 6.5), layout="constrained", sharex=True
    )
    for column, (teacher, title) in enumerate(TEACHERS.items()):
        for axis, metric, scale in zip(
            axes[:, column], ("nll", "accuracy"), (1, 100), strict=True
        ):
            for method in METHODS:
                values = collected(rows, teacher, method, metric)
                axis.errorbar(
                    list(values),
                    [scale * v.mean() for v in values.values()],
                    [scale * spread(v) for v in values.values()],
                    marker="o",
                    capsize=3,
                    label=method,
                )
            axis.set_xscale("log")
            axis.set_xticks(NUMBERS, [f"{n:,}" for n in NUMBERS], minor=False)
            axis.minorticks_off()
        students = collected(rows, teacher, STUDENT, "accuracy")
        if students:
            axes[1, column].plot(
                list(students),
                [100 * v.mean() for v in students.values()],
                "k^--",
                label="its student, test set",
            )
        axes[0, column].set_title(f"teacher: {title}")
        axes[1, column].set_xlabel("labelled examples N")
    axes[0, 0].set_ylabel("NLL of the proxy, held out")
    axes[1, 0].set_ylabel("accuracy, %")
    axes[1, 1].legend(fontsize="small", loc="center")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def tables(rows):
    """Return the lines of the tables."""
    lines = []
    for teacher, title in TEACHERS.items():
        lines += [
            "",
            f"## {title[0].upper()}{title[1:]}: `{teacher}`",
            "",
            "| | " + " | ".join(f"N = {n:,}" for n in NUMBERS) + " |",
            "|---" * (len(NUMBERS) + 1) + "|",
        ]
        for metric, scale, digits, unit in (
            ("nll", 1, 3, "NLL"),
            ("accuracy", 100, 1, "accuracy %"),
        ):
            for method in (*METHODS, STUDENT):
                values = collected(rows, teacher, method, metric)
                if not values:
                    continue
                cells = [
                    f"{scale * values[n].mean():.{digits}f}"
                    + (
                        f" ± {scale * spread(values[n]):.{digits}f}"
                        if len(values[n]) > 1
                        else ""
                    )
                    if n in values
                    else ""
                    for n in NUMBERS
                ]
                lines.append(f"| {method}, {unit} | {' | '.join(cells)} |")
        lines += [
            "",
            "Chosen by the default search, a subset after another:",
            "",
        ]
        for n in NUMBERS:
            notes = [
                row["note"]
                for row in rows
                if row["method"] == "default search"
                and (row["teacher"], row["labels"]) == (teacher, str(n))
            ]
            lines.append(f"* N = {n:,}: {'; '.join(notes)}")
    return lines


def main():
    """Run what is missing, then write the tables and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, default="../shared/data")
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--picture", type=pathlib.Path, default=PICTURE)
    parser.add_argument("--subsets", type=int, default=5)
    parser.add_argument(
        "--students", type=int, default=0, help="of how many teachers"
    )
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    path = arguments.output.with_suffix(".csv")
    # Few labels a class: the warning is right, and known here.
    warnings.filterwarnings("ignore", message=".*labelled examples")
    warnings.filterwarnings("ignore", message=".*worse than a constant")
    if not arguments.report:
        run(arguments, path)
        if arguments.students:
            run_students(arguments, path)
    rows = read(path)
    head = [
        "# How many labels",
        "",
        "`KERAS_BACKEND=jax python -m benchmarks.quality.labels --data "
        "../shared/data --output benchmarks/results/labels.md --subsets "
        f"{arguments.subsets} --students {arguments.students}`",
        "",
        machine(),
        "",
        f"Searched on N labelled rows, judged on {JUDGED:,} others; mean ± "
        f"standard deviation over {arguments.subsets} subsets. The student: "
        "the study's, on 16,000 unlabelled images, one seed, on the CIFAR-10 "
        "test set. The picture is `docs/figures/labels.png`.",
    ]
    report = "\n".join(head + tables(rows)) + "\n"
    arguments.output.write_text(report)
    draw(rows, arguments.picture)
    print(report)


if __name__ == "__main__":
    main()
