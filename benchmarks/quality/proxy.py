"""Proxy teachers of real teachers: does the search bring them nearer to truth?

    KERAS_BACKEND=jax python -m benchmarks.quality.proxy \
        --data ../shared/data --output benchmarks/results/proxy.md

Each of 14 real teachers (13 ResNet-50 on CIFAR-10 with noisy labels, one
CIFAR-100 network) is searched on 1,000 labelled rows and judged on all others,
for several random choices of the 1,000. Results are appended to a CSV beside
the output as they come; a stopped run goes on where it was, and `--report`
writes the tables of what is there. Subsets in which a method is missing are
left out of the tables.
"""

import argparse
import csv
import pathlib
import time
import warnings

import keras
import numpy as np

from benchmarks.quality import rivals
from benchmarks.speed.machine import machine as sentence
from keras_ptloss import ProxyTeacherSearch
from keras_ptloss.search import CalibrationSearch, GradientSearch, RandomSearch
from keras_ptloss.search._objectives import OBJECTIVES

ROWS = 1000
NOISE = 0.002  # NLL below which a difference is none
RESULTS = pathlib.Path(__file__).parents[1] / "results"
METRICS = ("accuracy", "nll", "brier", "ece", "l2")

# Calibration alone, epsilon = 0. Structured matrix scaling is the package's
# own matrix at its penalty of 1.
CALIBRATIONS = {
    "temperature scaling": CalibrationSearch("temperature"),
    "vector scaling": CalibrationSearch("vector"),
    "structured matrix scaling": CalibrationSearch("matrix"),
}
RIVALS = {
    "Dirichlet, ODIR": rivals.dirichlet,
    "confusion matrix": rivals.confusion_matrix,
    "Gold Loss Correction": rivals.gold_loss_correction,
}
PENALTY = 0.01
OURS = "cross-validated"
SEARCHES = {
    "Algorithm 1, shared": RandomSearch(),
    "Algorithm 1, per class": RandomSearch(per_class=True),
    "gradient, shared": GradientSearch(penalty=PENALTY),
    "gradient, per class": GradientSearch(per_class=True, penalty=PENALTY),
    "temperature + per class": GradientSearch(
        per_class=True, calibration="temperature", penalty=PENALTY
    ),
    "vector + per class": GradientSearch(
        per_class=True, calibration="vector", penalty=PENALTY
    ),
    "matrix, then per class": GradientSearch(
        per_class=True, calibration="matrix", penalty=PENALTY
    ),
    OURS: "cross_validation",
}
METHODS = ("teacher", *CALIBRATIONS, *RIVALS, *SEARCHES)


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


def choice(result):
    """Say what cross-validation chose; nothing where there was none."""
    if "chosen" not in result.trials:
        return ""
    chosen = result.trials["chosen"].index(True)
    row = {key: values[chosen] for key, values in result.trials.items()}
    return "{calibration}, epsilon {epsilon}, penalty {penalty:g}".format(**row)


def run_method(method, rows, rows_labels, held_out, seed):
    """Search on `rows`; return the proxy teachers of `held_out`, and a note."""
    if method == "teacher":
        return held_out, ""
    if method in RIVALS:
        return RIVALS[method](rows, rows_labels, held_out, seed), ""
    search = ProxyTeacherSearch((CALIBRATIONS | SEARCHES)[method], seed=seed)
    result = search.search(rows, rows_labels, verbose=False)
    return result.proxy_teacher(held_out).probabilities, choice(result)


def run(arguments, path):
    """Append a row a teacher, subset and method to the CSV at `path`."""
    done = set()
    if path.exists():
        with open(path, newline="") as file:
            done = {
                (r["teacher"], r["seed"], r["method"])
                for r in csv.DictReader(file)
            }
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(
                ["teacher", "seed", "method", "bias"]
                + [*METRICS, "seconds", "note"]
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


def read(path, arguments):
    """Return the whole subsets: `{metric: {teacher: {method: values}}}`.

    Also the teachers' biases, and what cross-validation chose.
    """
    whole = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            wanted = not arguments.teachers or (
                row["teacher"] in arguments.teachers
            )
            if wanted and int(row["seed"]) < arguments.subsets:
                key = row["teacher"], row["seed"]
                whole.setdefault(key, {})[row["method"]] = row
    values, bias, notes = {m: {} for m in (*METRICS, "seconds")}, {}, {}
    for (teacher, _), rows in whole.items():
        if len(rows) < len(METHODS):
            continue
        bias[teacher] = float(rows["teacher"]["bias"])
        notes.setdefault(teacher, []).append(rows[OURS]["note"])
        for metric, of_teacher in values.items():
            of_method = of_teacher.setdefault(teacher, {})
            for method in METHODS:
                value = float(rows[method][metric])
                of_method.setdefault(method, []).append(value)
    return values, bias, notes


def spread(values):
    """Return the standard deviation over subsets; 0 for a single one."""
    return np.std(values, ddof=1) if len(values) > 1 else 0.0


def gain_of(nll, teacher, better, worse):
    """Return the NLL saved and its standard error, paired over subsets."""
    saved = np.subtract(nll[teacher][worse], nll[teacher][better])
    return saved.mean(), spread(saved) / np.sqrt(len(saved))


def tables(values, bias, notes):
    """Return the report as Markdown lines."""
    teachers = list(values["nll"])
    lines = []
    for metric, scale, digits, title in (
        ("nll", 1, 3, "Held-out NLL (nats)"),
        ("accuracy", 100, 1, "Held-out accuracy of the proxy teacher (%)"),
    ):
        lines += [
            "",
            f"## {title}",
            "",
            "Mean ± standard deviation over the subsets.",
            "",
            "| teacher | subsets | bias | " + " | ".join(METHODS) + " |",
            "|---" * (len(METHODS) + 3) + "|",
        ]
        for teacher in teachers:
            cells = [teacher, len(notes[teacher]), f"{bias[teacher]:.3f}"]
            for method in METHODS:
                v = scale * np.array(values[metric][teacher][method])
                cells.append(f"{v.mean():.{digits}f} ± {spread(v):.{digits}f}")
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        means = [
            scale * np.mean([np.mean(values[metric][t][m]) for t in teachers])
            for m in METHODS
        ]
        cells = " | ".join(f"**{mean:.{digits}f}**" for mean in means)
        lines.append(f"| **average** | | | {cells} |")
    lines += [
        "",
        "## Averages over the teachers",
        "",
        "| method | " + " | ".join(METRICS) + " | seconds |",
        "|---" * (len(METRICS) + 2) + "|",
    ]
    for method in METHODS:
        cells = [
            np.mean([np.mean(values[metric][t][method]) for t in teachers])
            for metric in (*METRICS, "seconds")
        ]
        numbers = " | ".join(f"{cell:.4f}" for cell in cells[:-1])
        lines.append(f"| {method} | {numbers} | {cells[-1]:.1f} |")
    lines += [
        "",
        "## What was chosen by cross-validation",
        "",
        "Calibration, epsilon, penalty of the ridge; subset by subset.",
        "",
    ]
    for teacher in teachers:
        lines.append(f"* {teacher}: {'; '.join(notes[teacher])}")
    nll = values["nll"]
    return lines + claims(nll, bias) + contributions(nll) + [rivals.AUTHORS]


def claims(nll, bias):
    """Return the lines that compare with each rival."""
    teachers = list(nll)
    against = ("teacher", *CALIBRATIONS, *RIVALS)
    gains = {
        rival: {t: gain_of(nll, t, OURS, rival) for t in teachers}
        for rival in against
    }
    lines = [
        "",
        f"## NLL that {OURS} saves over each rival",
        "",
        "Paired subset by subset, ± its standard error over the subsets (whose "
        "held-out rows overlap: it tells of the choice of the 1,000 rows, and "
        "of few subsets little).",
        "",
        "| teacher | " + " | ".join(against) + " |",
        "|---" * (len(against) + 1) + "|",
    ]
    for t in teachers:
        cells = ("{:+.4f} ± {:.4f}".format(*gains[r][t]) for r in against)
        lines.append(f"| {t} | " + " | ".join(cells) + " |")
    lines.append("")
    for rival, of_teacher in gains.items():
        saved = np.array([gain for gain, _ in of_teacher.values()])
        behind = [
            f"{t} ({gain:+.4f})"
            for t, (gain, error) in of_teacher.items()
            if -gain > max(2 * error, NOISE)
        ]
        lines.append(
            f"* {rival}: {saved.mean():+.4f} on average (median "
            f"{np.median(saved):+.4f}), ahead on "
            f"{np.sum(saved > 0)} of {len(saved)}; behind by more than two "
            f"standard errors and {NOISE}: {', '.join(behind) or 'nowhere'}."
        )
    return lines


def contributions(nll):
    """Return the lines that say what each part adds."""
    lines = [
        "",
        "## What each part adds, and where it does not",
        "",
        "| with | without | NLL saved, average | median | teachers on which it "
        "saves | by more than 2 standard errors | worse by more than 2 | worst "
        "|",
        "|---|---|---|---|---|---|---|---|",
    ]
    for better, worse in (
        (OURS, "structured matrix scaling"),
        ("matrix, then per class", "structured matrix scaling"),
        ("vector + per class", "vector scaling"),
        ("temperature + per class", "temperature scaling"),
        ("temperature + per class", "vector scaling"),
        ("gradient, per class", "teacher"),
        ("gradient, shared", "teacher"),
        ("gradient, shared", "temperature scaling"),
        ("Algorithm 1, shared", "teacher"),
        ("Algorithm 1, per class", "teacher"),
    ):
        gains = {t: gain_of(nll, t, better, worse) for t in nll}
        saved = np.array([g for g, _ in gains.values()])
        errors = np.array([error for _, error in gains.values()])
        worst = min(gains, key=gains.get)
        lines.append(
            f"| {better} | {worse} | {saved.mean():+.4f} "
            f"| {np.median(saved):+.4f} | {np.sum(saved > 0)} of {len(gains)} "
            f"| {np.sum(saved > 2 * errors)} | {np.sum(saved < -2 * errors)} "
            f"| {saved.min():+.4f} ({worst}) |"
        )
    return lines


def machine():
    """Return a sentence on the processor, the versions and the day."""
    names = ("keras", keras.backend.backend(), "numpy", "scipy")
    return sentence(names, "shared with other jobs, which the seconds show")


def main():
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, default="../shared/data")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--teachers", nargs="*", default=[])
    parser.add_argument("--subsets", type=int, default=5)
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    path = (arguments.output or RESULTS / "proxy.md").with_suffix(".csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    # CIFAR-100: 10 rows a class. The warning is right, and known here.
    warnings.filterwarnings("ignore", message=".*labelled examples")
    if not arguments.report:
        run(arguments, path)
    head = [
        "# Proxy teachers of real teachers",
        "",
        "`KERAS_BACKEND=jax python -m benchmarks.quality.proxy --data "
        "../shared/data --output benchmarks/results/proxy.md --subsets "
        f"{arguments.subsets}`",
        "",
        machine(),
        "",
        f"{ROWS} labelled rows for the search, a subset a seed, from 0 on; "
        "judged on the rest. Bias: total variation between the teacher's mean "
        "prediction and the label frequencies. M = 5; penalty "
        f"{PENALTY} in the gradient methods. CIFAR-100 has "
        "10 labelled rows a class: the search's warning about that is silenced "
        "here.",
    ]
    report = "\n".join(head + tables(*read(path, arguments))) + "\n"
    if arguments.output:
        arguments.output.write_text(report)
    print(report)


if __name__ == "__main__":
    main()
