"""Proxy teachers of real teachers: does the search bring them nearer to truth?

    KERAS_BACKEND=jax python benchmarks/quality/proxy.py \
        --data ../shared/data --output benchmarks/results/proxy.md

Each of 14 real teachers (13 ResNet-50 on CIFAR-10 with noisy labels, one
CIFAR-100 network) is searched on 1,000 labelled rows and judged on all others,
for several random choices of the 1,000. Results are appended to a CSV beside
the output as they come; a stopped run goes on where it was.
"""

import argparse
import csv
import datetime
import pathlib
import platform
import time
import warnings

import keras
import numpy as np

from keras_ptloss import ProxyTeacherSearch
from keras_ptloss._gradient import Form, Teacher, fit
from keras_ptloss._objectives import OBJECTIVES

ROWS = 1000
METRICS = ("accuracy", "nll", "brier", "ece", "l2")

GRADIENT = {"method": "gradient", "objective": "nll", "penalty": 0.01}
SEARCHES = {
    "Algorithm 1, shared": {},
    "Algorithm 1, per class": {"per_class": True},
    "gradient NLL, shared": {**GRADIENT},
    "gradient NLL, per class": {**GRADIENT, "per_class": True},
    "temperature + per class": {
        **GRADIENT, "per_class": True, "calibration": "temperature",
    },
    "vector + per class": {
        **GRADIENT, "per_class": True, "calibration": "vector",
    },
    "cross-validated": {
        "method": "gradient",
        "objective": "nll",
        "selection": "cross_validation",
    },
}  # fmt: skip
# Calibration alone, epsilon = 0: the rivals.
CALIBRATIONS = {
    "temperature scaling": Form("temperature", "zero", 1, 0.0),
    "vector scaling": Form("vector", "zero", 1, 0.01),
}
METHODS = ("teacher", *CALIBRATIONS, *SEARCHES)


def load_teachers(data):
    """Yield `(name, probabilities (N, C), labels (N,))`."""
    file = np.load(data / "cifar10" / "teachers_train.npz")
    for key in sorted(file.files):
        if key.endswith("__probs"):
            yield key[: -len("__probs")], file[key], file["labels"]
    file = np.load(data / "cifar100" / "teacher_test.npz")
    key = next(k for k in file.files if file[k].ndim == 2)
    yield "cifar100", file[key], file["labels"]


def judge(q, labels):
    """Return the metrics of probabilities `(N, C)` against labels."""
    one_hot = np.eye(q.shape[1])[labels]
    distance = np.linalg.norm(q - one_hot, axis=1)
    right = q.argmax(axis=1) == labels
    confidence = q.max(axis=1)
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [
        abs(np.sum(right[bins == b]) - np.sum(confidence[bins == b]))
        for b in range(15)
    ]
    return {
        "accuracy": right.mean(),
        "nll": float(OBJECTIVES["nll"].score(q, labels)),
        "brier": np.mean(distance**2),
        "ece": np.sum(gaps) / len(labels),
        "l2": distance.mean(),
    }


def bias_of(probabilities, labels):
    """Return the total variation of mean prediction and label frequencies."""
    frequencies = np.bincount(labels, minlength=probabilities.shape[1])
    frequencies = frequencies / len(labels)
    return 0.5 * np.abs(probabilities.mean(axis=0) - frequencies).sum()


def run_method(method, rows, rows_labels, held_out, seed):
    """Search on `rows`; return the proxy teachers of `held_out`, and a note."""
    if method == "teacher":
        return held_out, ""
    if method in CALIBRATIONS:
        fitted = fit(
            CALIBRATIONS[method],
            Teacher(rows, None),
            rows_labels,
            OBJECTIVES["nll"],
            upper=10.0,
        )
        return Teacher(held_out, None).calibrated(fitted.parameters), ""
    result = ProxyTeacherSearch(seed=seed, **SEARCHES[method]).search(
        rows, rows_labels
    )
    note = f"unconverged={result.unconverged}"
    if "chosen" in result.trials:
        chosen = result.trials["chosen"].index(True)
        note += " " + "/".join(
            str(result.trials[key][chosen])
            for key in ("calibration", "shape", "penalty")
        )
    return result.proxy_teacher(held_out).probabilities, note


def run(arguments, path):
    """Append a row a teacher, subset and method to the CSV at `path`."""
    done = set()
    if path.exists():
        with open(path, newline="") as file:
            done = {
                (r["teacher"], r["seed"], r["method"])
                for r in csv.DictReader(file)
            }
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if not done:
            writer.writerow(
                [
                    "teacher",
                    "seed",
                    "method",
                    "bias",
                    *METRICS,
                    "seconds",
                    "note",
                ]
            )
        for name, probabilities, labels in load_teachers(arguments.data):
            if arguments.teachers and name not in arguments.teachers:
                continue
            probabilities = probabilities.astype("float64")
            probabilities /= probabilities.sum(axis=1, keepdims=True)
            labels = labels.astype("int64")
            for seed in range(arguments.subsets):
                order = np.random.default_rng(seed).permutation(len(labels))
                inside, outside = order[:ROWS], order[ROWS:]
                for method in METHODS:
                    if (name, str(seed), method) in done:
                        continue
                    start = time.perf_counter()
                    q, note = run_method(
                        method,
                        probabilities[inside],
                        labels[inside],
                        probabilities[outside],
                        seed,
                    )
                    seconds = time.perf_counter() - start
                    values = judge(q, labels[outside])
                    writer.writerow(
                        [
                            name, seed, method,
                            f"{bias_of(probabilities, labels):.4f}",
                            *(f"{values[m]:.6f}" for m in METRICS),
                            f"{seconds:.2f}", note,
                        ]
                    )  # fmt: skip
                    file.flush()
                    print(name, seed, method, f"{values['nll']:.4f}", note)


def read(path):
    """Return `{metric: {teacher: {method: values over subsets}}}`, biases."""
    values, bias, notes = {}, {}, {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            bias[row["teacher"]] = float(row["bias"])
            for metric in (*METRICS, "seconds"):
                values.setdefault(metric, {}).setdefault(
                    row["teacher"], {}
                ).setdefault(row["method"], []).append(float(row[metric]))
            if row["method"] == "cross-validated":
                notes.setdefault(row["teacher"], []).append(row["note"])
    return values, bias, notes


def tables(values, bias, notes):
    """Return the report as Markdown lines."""
    teachers = list(values["nll"])
    lines = []
    for metric, scale, digits, title in (
        (
            "nll",
            1,
            3,
            "Held-out NLL (nats; mean ± standard deviation over subsets)",
        ),
        ("accuracy", 100, 1, "Held-out accuracy of the proxy teacher (%)"),
    ):
        lines += ["", f"## {title}", ""]
        lines.append("| teacher | bias | " + " | ".join(METHODS) + " |")
        lines.append("|---" * (len(METHODS) + 2) + "|")
        for teacher in teachers:
            cells = []
            for method in METHODS:
                v = scale * np.array(values[metric][teacher][method])
                cells.append(f"{v.mean():.{digits}f} ± {v.std():.{digits}f}")
            lines.append(
                f"| {teacher} | {bias[teacher]:.3f} | {' | '.join(cells)} |"
            )
    lines += ["", "## Averages over the teachers", ""]
    lines.append("| method | " + " | ".join(METRICS) + " | seconds |")
    lines.append("|---" * (len(METRICS) + 2) + "|")
    for method in METHODS:
        cells = []
        for metric in (*METRICS, "seconds"):
            mean = np.mean(
                [np.mean(values[metric][t][method]) for t in teachers]
            )
            cells.append(
                f"{mean:.2f}" if metric == "seconds" else f"{mean:.4f}"
            )
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += ["", "## What the cross-validated choice was", ""]
    for teacher in teachers:
        lines.append(f"* {teacher}: {'; '.join(notes.get(teacher, []))}")
    return lines + claims(values, bias, teachers)


def claims(values, bias, teachers):
    """Check what is promised, teacher by teacher."""
    nll = {
        t: {m: np.array(v) for m, v in values["nll"][t].items()}
        for t in teachers
    }
    lines = ["", "## Claims", ""]

    def gain(teacher, better, worse):
        """Mean and standard error of NLL saved, paired over the subsets."""
        difference = nll[teacher][worse] - nll[teacher][better]
        count = max(len(difference), 2)
        return difference.mean(), difference.std(ddof=1) / np.sqrt(count)

    above = [
        t
        for t in teachers
        if -gain(t, "cross-validated", "teacher")[0]
        > gain(t, "cross-validated", "teacher")[1]
    ]
    lines.append(
        "* Cross-validated NLL above the teacher's by more than its standard "
        f"error: {', '.join(above) or 'none'} of {len(teachers)}."
    )
    biased = [t for t in teachers if bias[t] > 0.02]
    wins = [
        t
        for t in biased
        if gain(t, "cross-validated", "temperature scaling")[0] > 0
    ]
    lines.append(
        f"* Better than temperature scaling on {len(wins)} of {len(biased)} "
        "teachers that are biased across classes (bias above 0.02); not on: "
        f"{', '.join(t for t in biased if t not in wins) or 'none'}."
    )
    for better, worse in (
        ("cross-validated", "temperature scaling"),
        ("cross-validated", "vector scaling"),
        ("vector + per class", "vector scaling"),
        ("temperature + per class", "temperature scaling"),
        ("gradient NLL, per class", "teacher"),
        ("Algorithm 1, shared", "teacher"),
        ("Algorithm 1, per class", "teacher"),
    ):
        gains = [gain(t, better, worse)[0] for t in teachers]
        worst = teachers[int(np.argmin(gains))]
        lines.append(
            f"* {better} against {worse}: NLL lower by {np.mean(gains):.4f} on "
            f"average, lower on {np.sum(np.array(gains) > 0)} of "
            f"{len(teachers)} teachers; worst {min(gains):+.4f} ({worst})."
        )
    return lines


def main():
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--teachers", nargs="*", default=[])
    parser.add_argument("--subsets", type=int, default=5)
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    path = arguments.output.with_suffix(".csv")
    # CIFAR-100: 10 rows a class. The warning is right, and known here.
    warnings.filterwarnings("ignore", message=".*labelled examples")
    run(arguments, path)
    head = [
        "# Proxy teachers of real teachers",
        "",
        "`KERAS_BACKEND=jax python benchmarks/quality/proxy.py --data "
        "../shared/data --output benchmarks/results/proxy.md`",
        "",
        f"{ROWS} labelled rows for the search, seeds 0 to "
        f"{arguments.subsets - 1}; judged on the rest. Bias: total variation "
        "between the teacher's mean prediction and the label frequencies. "
        f"{datetime.date.today()}, 2 cores ({platform.machine()}), keras "
        f"{keras.__version__}, backend {keras.config.backend()}.",
    ]
    report = "\n".join(head + tables(*read(path))) + "\n"
    arguments.output.write_text(report)
    print(report)


if __name__ == "__main__":
    main()
