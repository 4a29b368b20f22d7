"""The default search on real teachers, beside rivals and its predecessor.

    KERAS_BACKEND=jax OMP_NUM_THREADS=1 python benchmarks/quality/search.py

corrects each teacher with 50 to 1,000 labels, scores it on other rows, appends
the results to benchmarks/results/search.csv and writes search.md beside it. A
stopped run continues where it was; `--report` only writes the tables.

The teachers are those of `--data`: 13 of CIFAR-10 that were trained on noisy
labels, one of CIFAR-100, sentence vectors of CLINC150 and Banking77, and a
language model on TREC. Seed s permutes the rows of a data set by
`numpy.random.default_rng(s)`. The first N rows are labelled, rows 1,000 to
11,000 are held out for the scores. "Old default" is the search at commit
d6edf03, run from a Git worktree in a process of its own.

Then groups of CIFAR-10 teachers are corrected together, and compared with the
best of them corrected alone: the best on the held-out rows, which favours it.
"""

import argparse
import collections
import csv
import itertools
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import warnings

import numpy as np
from rivals import structured_matrix_scaling, temperature_scaling

RESULTS = pathlib.Path("benchmarks/results")
OLD_COMMIT = "d6edf03"
COUNTS = (50, 100, 300, 1000)
SEEDS = (0, 1, 2)
BINS = 15

# --- Methods: (probabilities, labels, held-out probabilities) -> corrected ----


def new(teacher_probs, labels, held_out):
    """Return what the default search makes of the held-out rows."""
    from keras_ptloss import ProxyTeacherSearch

    result = ProxyTeacherSearch().search(teacher_probs, labels, verbose=0)
    return result.correct(held_out)


def old_default(teacher_probs, labels, held_out):
    """Return what the default search of the old commit makes of them."""
    from keras_ptloss import ProxyTeacherSearch

    result = ProxyTeacherSearch().search(teacher_probs, labels, verbose=0)
    return result.proxy_teacher(held_out).probabilities


def as_it_is(_teacher_probs, _labels, held_out):
    """Return the held-out rows."""
    return held_out


METHODS = {
    "teacher": as_it_is,
    "temperature": temperature_scaling,
    "structured matrix scaling": structured_matrix_scaling,
    "old default": old_default,
    "new": new,
}

# --- Data ---------------------------------------------------------------------


def read_teachers(folder):
    """Return `(probabilities, labels)` of each teacher by name."""
    teachers = {}
    cifar10 = np.load(folder / "cifar10/teachers_train.npz")
    for key in cifar10.files:
        if key.endswith("__probs"):
            name = key.removeprefix("resnet50_").removesuffix("__probs")
            teachers[f"CIFAR-10 {name}"] = (cifar10[key], cifar10["labels"])
    cifar100 = np.load(folder / "cifar100/teacher_test.npz")
    teachers["CIFAR-100"] = (cifar100["probs"], cifar100["labels"])
    for name in ("clinc150", "banking77"):
        data = np.load(folder / name / f"{name}.npz")
        similarity = np.exp(20.0 * data["cosines"].astype("float64"))
        teachers[name] = (similarity, data["labels"])
    trec = np.load(folder / "trec_smollm2/trec.npz")
    teachers["TREC"] = (trec["probs"], trec["labels"])
    return {
        name: (normalized(probs), labels.astype("int64"))
        for name, (probs, labels) in teachers.items()
    }


def normalized(probs):
    """Return rows of float64 that sum to one."""
    probs = probs.astype("float64")
    return probs / probs.sum(axis=1, keepdims=True)


# --- Run ----------------------------------------------------------------------


def nll(probs, labels):
    """Return the negative log-likelihood of each row."""
    return -np.log(np.maximum(probs[np.arange(len(labels)), labels], 1e-7))


def scores(corrected, teacher_probs, labels):
    """Return the scores of corrected rows, and of their excess NLL."""
    losses = nll(corrected, labels)
    excess = losses - nll(teacher_probs, labels)
    confidence = corrected.max(axis=1)
    right = corrected.argmax(axis=1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, right - confidence, minlength=BINS)
    return {
        "nll": losses.mean(),
        "accuracy": right.mean(),
        "ece": np.abs(gaps).sum() / len(labels),
        "excess": excess.mean(),
        "excess_error": excess.std() / np.sqrt(len(labels)),
    }


def run(method, teachers, output):
    """Append the rows of a method that `output` does not have yet."""
    done = {tuple(row.values())[:4] for row in read_results(output)}
    for seed in SEEDS:
        for count in COUNTS:
            for name, (probs, labels) in teachers.items():
                key = (name, method, str(count), str(seed))
                if key in done:
                    continue
                order = np.random.default_rng(seed).permutation(len(labels))
                few, others = order[:count], order[1000:11000]
                begin = time.process_time()
                corrected = METHODS[method](
                    probs[few], labels[few], probs[others]
                )
                seconds = time.process_time() - begin
                row = scores(corrected, probs[others], labels[others])
                append(output, key, row, seconds)


def run_old(arguments):
    """Run the old default from a worktree of its commit."""
    with tempfile.TemporaryDirectory() as folder:
        worktree = pathlib.Path(folder, "old")
        git = ["git", "worktree"]
        subprocess.run([*git, "add", worktree, OLD_COMMIT], check=True)
        command = [sys.executable, __file__, "--methods", "old default"]
        command += ["--data", arguments.data, "--output", arguments.output]
        environment = {**os.environ, "PYTHONPATH": str(worktree)}
        try:
            subprocess.run(
                command, env=environment, check=True, stdout=subprocess.DEVNULL
            )
        finally:
            subprocess.run([*git, "remove", "-f", worktree], check=True)


# --- Several teachers ---------------------------------------------------------


def groups(teachers):
    """Return by name: teachers of CIFAR-10 that are corrected together."""
    good = teachers["CIFAR-10 symfrac0_0_noise0_0"][0]
    middling = teachers["CIFAR-10 symfrac0_0_noise0_4"][0]
    bad = [f"CIFAR-10 symfrac0_{share}_noise0_6" for share in (0, 2, 4, 6)]
    # Each of these three cannot tell two pairs of classes apart.
    blind = []
    for pairs in (((0, 8), (3, 5)), ((1, 9), (4, 7)), ((2, 6), (3, 5))):
        blind.append(good.copy())
        for pair in pairs:
            blind[-1][:, pair] = good[:, pair].mean(axis=1, keepdims=True)
    # This one knows only vehicles, cats, dogs and other animals.
    kinds = [[0, 1, 8, 9], [3], [5], [2, 4, 6, 7]]
    coarse = np.stack([good[:, kind].sum(axis=1) for kind in kinds], axis=1)
    return {
        "four bad ones": [teachers[name][0] for name in bad],
        "three with other confusions": blind,
        "one with other classes": [middling, coarse],
    }


def run_several(teachers, output):
    """Append the rows of teachers corrected together, and of the best alone."""
    from keras_ptloss import ProxyTeacherSearch

    done = {tuple(row.values())[:4] for row in read_results(output)}
    labels = teachers["CIFAR-10 symfrac0_0_noise0_0"][1]
    tasks = itertools.product(SEEDS, COUNTS, groups(teachers).items())
    for seed, count, (name, members) in tasks:
        if (name, "together", str(count), str(seed)) in done:
            continue
        order = np.random.default_rng(seed).permutation(len(labels))
        few, others = order[:count], order[1000:11000]
        corrected, seconds = [], []
        for some in (members, *([member] for member in members)):
            begin = time.process_time()
            result = ProxyTeacherSearch().search(
                [p[few] for p in some], labels[few], num_classes=10, verbose=0
            )
            seconds.append(time.process_time() - begin)
            outputs = [p[others] for p in some]
            corrected.append(
                result.correct(outputs if len(some) > 1 else outputs[0])
            )
        together, *alone = corrected
        best = min(alone, key=lambda q: nll(q, labels[others]).mean())
        for method, q, cost in (
            ("best alone", best, sum(seconds[1:])),
            ("together", together, seconds[0]),
        ):
            row = scores(q, best, labels[others])
            append(output, (name, method, count, seed), row, cost)


def append(output, key, row, seconds):
    """Append a row to the CSV file."""
    with output.open("a", encoding="utf-8") as file:
        numbers = [f"{value:.6f}" for value in row.values()]
        csv.writer(file).writerow([*key, *numbers, f"{seconds:.3f}"])


# --- Report -------------------------------------------------------------------


def read_results(output):
    """Return the rows of the CSV file."""
    if not output.exists():
        output.write_text(
            "teacher,method,labels,seed,nll,accuracy,ece,excess,excess_error,"
            "seconds\n"
        )
    with output.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def report(output):
    """Write the tables of the CSV file beside it."""
    results = collections.defaultdict(list)
    for row in read_results(output):
        results[row["method"], int(row["labels"])].append(row)

    def rows_of(method, count, teacher):
        rows = results[method, count]
        return [row for row in rows if row["teacher"] == teacher]

    lines = [
        "# The default search on 17 real teachers",
        "",
        "`KERAS_BACKEND=jax OMP_NUM_THREADS=1 python "
        "benchmarks/quality/search.py`",
        "",
        "Means over 17 teachers and 3 subsets of labelled rows (seeds 0, 1, 2) "
        "on 1,650 to 10,000 other rows. CPU: seconds of the process, its first "
        "compilations included. Worse: runs whose NLL is above the teacher's "
        "by more than two standard errors; then the largest excess of all.",
        "",
        table_header(
            "labels", "method", "NLL", "accuracy", "ECE", "CPU", "worse"
        ),
    ]
    for count in COUNTS:
        for method in METHODS:
            rows = results[method, count]
            if not rows:
                continue
            excess = values(rows, "excess")
            worse = np.sum(excess > 2.0 * values(rows, "excess_error"))
            lines.append(
                f"| {count} | {method} | {mean(rows, 'nll'):.3f} "
                f"| {100 * mean(rows, 'accuracy'):.1f} % "
                f"| {mean(rows, 'ece'):.3f} "
                f"| {mean(rows, 'seconds'):.2f} "
                f"| {worse} of {len(rows)}, {excess.max():+.3f} |"
            )
    lines += [
        "",
        "## NLL by teacher: old default / new",
        "",
        table_header("teacher", "as it is", *(f"{n} labels" for n in COUNTS)),
    ]
    for name in dict.fromkeys(row["teacher"] for row in results["teacher", 50]):
        cells = [
            " / ".join(
                f"{mean(rows_of(method, count, name), 'nll'):.3f}"
                for method in ("old default", "new")
            )
            for count in COUNTS
        ]
        teacher = mean(rows_of("teacher", COUNTS[0], name), "nll")
        lines.append(f"| {name} | {teacher:.3f} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Several teachers: the best corrected alone / together",
        "",
        "NLL, the difference with its standard error on 10,000 rows (mean of "
        "three subsets), and accuracy.",
        "",
        table_header("teachers", "labels", "NLL", "difference", "accuracy"),
    ]
    names = dict.fromkeys(row["teacher"] for row in results["together", 50])
    for name, count in itertools.product(names, COUNTS):
        alone, both = (
            rows_of(method, count, name)
            for method in ("best alone", "together")
        )
        lines.append(
            f"| {name} | {count} "
            f"| {mean(alone, 'nll'):.3f} / {mean(both, 'nll'):.3f} "
            f"| {mean(both, 'excess'):+.3f} "
            f"± {mean(both, 'excess_error'):.3f} "
            f"| {100 * mean(alone, 'accuracy'):.1f} % / "
            f"{100 * mean(both, 'accuracy'):.1f} % |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    output.with_suffix(".md").write_text(text)


def values(rows, column):
    """Return a column of rows as numbers."""
    return np.array([float(row[column]) for row in rows])


def mean(rows, column):
    """Return the mean of a column."""
    return values(rows, column).mean()


def table_header(*names):
    """Return the first two lines of a Markdown table."""
    return "| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|"


def main():
    """Run what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--output", default=str(RESULTS / "search.csv"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    output = pathlib.Path(arguments.output)
    if not arguments.report:
        warnings.simplefilter("ignore")
        teachers = read_teachers(pathlib.Path(arguments.data))
        for method in arguments.methods:
            if method == "old default" and len(arguments.methods) > 1:
                run_old(arguments)
            else:
                run(method, teachers, output)
        if "new" in arguments.methods:
            run_several(teachers, output)
    report(output)


if __name__ == "__main__":
    main()
