"""Several teachers, corrected together: against averages and the best alone.

    KERAS_BACKEND=jax python -m benchmarks.quality.teachers \
        --data ../shared/data --output benchmarks/results/teachers.md

Groups of ResNet-50s trained on noisy CIFAR-10 labels; 1,000 labelled rows for
the search, a subset a seed, judged on 20,000 others. And one teacher of other
classes: the ten of CIFAR-10 where the student is to tell animals from vehicles
in five kinds.
"""

import argparse
import pathlib
import time

import numpy as np
import scipy.optimize

from benchmarks.quality.proxy import judge, machine, spread
from keras_ptloss import ProxyTeacherSearch
from keras_ptloss.search import CalibrationSearch
from keras_ptloss.search._objectives import nll

ROWS, JUDGED = 1000, 20_000
NAME = "resnet50_symfrac0_{}_noise0_{}"
GROUPS = {
    "four, 33 to 38 % right": [(0, 6), (2, 6), (4, 6), (6, 6)],
    "four, 72 to 76 % right": [(0, 4), (2, 4), (4, 4), (6, 4)],
    "four, 80 to 84 % right": [(0, 2), (2, 2), (4, 2), (6, 2)],
    "33 % beside 82 %": [(6, 6), (6, 2)],
    "86 % beside 84 %": [(0, 0), (4, 2)],
    "86 % beside four of 33 to 38 %": [(0, 0), (0, 6), (2, 6), (4, 6), (6, 6)],
}
# Kinds: plane, ship; car, truck; bird; cat, dog; deer, horse, frog.
KINDS = np.array([0, 1, 2, 3, 4, 3, 4, 4, 0, 1])


def mean(few, labels, rows, seed):
    """The mean of the teachers' probabilities."""
    return np.mean(rows, axis=0)


def weighted_mean(few, labels, rows, seed):
    """Their mean at the weights that are best by NLL on the labelled rows."""
    few = np.stack(few)

    def score(logits):
        weights = np.exp(logits - logits.max())
        return nll(np.einsum("k,knc->nc", weights / weights.sum(), few), labels)

    found = scipy.optimize.minimize(score, np.zeros(len(few)), method="BFGS")
    weights = np.exp(found.x - found.x.max())
    return np.einsum("k,knc->nc", weights / weights.sum(), np.stack(rows))


def best_single(few, labels, rows, seed):
    """The teacher that is best by NLL on the labelled rows, as it is."""
    return rows[int(np.argmin([nll(one, labels) for one in few]))]


def corrected(few, labels, rows, seed):
    """A teacher by the default search; also its score."""
    found = ProxyTeacherSearch(seed=seed).search(few, labels, verbose=False)
    return found.proxy_teacher(rows).probabilities, found.score


def corrected_mean(few, labels, rows, seed):
    """The default search on the teachers' mean, as one teacher."""
    search = ProxyTeacherSearch(seed=seed)
    found = search.search(np.mean(few, axis=0), labels, verbose=False)
    return found.proxy_teacher(np.mean(rows, axis=0)).probabilities


def together(method):
    """A search of all teachers at once."""

    def run(few, labels, rows, seed):
        search = ProxyTeacherSearch(method, seed=seed)
        found = search.search(few, labels, verbose=False)
        return found.proxy_teacher(rows).probabilities, chosen(found)

    return run


def chosen(found):
    """Say what cross-validation chose; nothing where there was none."""
    trials = found.trials
    if "chosen" not in trials:
        return ""
    row = trials["chosen"].index(True)
    return f"{trials['calibration'][row]}, penalty {trials['penalty'][row]:g}"


METHODS = {
    "mean": mean,
    "weighted mean": weighted_mean,
    "best single": best_single,
    "best single, corrected": None,
    "mean of corrected ones": None,
    "mean, corrected": corrected_mean,
    "pool (a weight each)": together(CalibrationSearch("temperature")),
    "together, default search": together("cross_validation"),
}
OURS = "together, default search"


def load(data):
    """Return the teachers' probabilities by name, and the labels."""
    file = np.load(data / "cifar10" / "teachers_train.npz")
    teachers = {}
    for key in file.files:
        if key.endswith("__probs"):
            rows = file[key].astype("float64")
            rows /= rows.sum(axis=1, keepdims=True)
            teachers[key.removesuffix("__probs")] = rows
    return teachers, file["labels"].astype("int64")


def split(labels, seed):
    """Return the rows of the search and those to judge on."""
    order = np.random.default_rng(seed).permutation(len(labels))
    return order[:ROWS], order[ROWS : ROWS + JUDGED]


def run_group(names, teachers, labels, seed, alone):
    """Return `{method: metrics}` of a group of teachers.

    Args:
        names: of the teachers.
        teachers: probabilities by name.
        labels: of all rows.
        seed: of the subset.
        alone: what `corrected` returned by name and seed, kept.
    """
    few, many = split(labels, seed)
    inside = [teachers[name][few] for name in names]
    outside = [teachers[name][many] for name in names]
    for name, one, rows in zip(names, inside, outside, strict=True):
        if (name, seed) not in alone:
            alone[name, seed] = corrected(one, labels[few], rows, seed)
    q, scores = zip(*(alone[name, seed] for name in names), strict=True)
    known = {
        "best single, corrected": q[int(np.argmin(scores))],
        "mean of corrected ones": np.mean(q, axis=0),
    }
    values = {}
    for name, method in METHODS.items():
        begin = time.perf_counter()
        found = known.get(name)
        if found is None:
            found = method(inside, labels[few], outside, seed)
        found, note = found if isinstance(found, tuple) else (found, "")
        seconds = f"{time.perf_counter() - begin:.1f}"
        values[name] = judge(found, labels[many])
        values[name]["seconds"] = "" if name in known else seconds
        values[name]["note"] = note
    return values


def run_kinds(teacher, labels, seed):
    """Return `{method: metrics}` of ten classes, judged by five kinds."""
    few, many = split(labels, seed)
    kinds = KINDS[labels]
    of_kind = np.eye(5)[KINDS]
    summed = teacher @ of_kind
    search = ProxyTeacherSearch(seed=seed)
    other = search.search(teacher[few], kinds[few], classes=5, verbose=False)
    same = search.search(summed[few], kinds[few], verbose=False)
    rows = {
        "classes summed by hand": summed[many],
        "summed by hand, then the default search": same.proxy_teacher(
            summed[many]
        ).probabilities,
        "the default search, told nothing": other.proxy_teacher(
            teacher[many]
        ).probabilities,
    }
    values = {name: judge(q, kinds[many]) for name, q in rows.items()}
    values["the default search, told nothing"]["note"] = chosen(other)
    return values


def table(of_seed):
    """Return the lines of a table, means and deviations over the subsets."""
    lines = [
        "| method | NLL | accuracy % | ECE | seconds |",
        "|---|---|---|---|---|",
    ]
    for name in of_seed[0]:
        cells = []
        for metric, scale, digits in (
            ("nll", 1, 3),
            ("accuracy", 100, 1),
            ("ece", 1, 3),
        ):
            v = scale * np.array([values[name][metric] for values in of_seed])
            cells.append(f"{v.mean():.{digits}f} ± {spread(v):.{digits}f}")
        seconds = [values[name].get("seconds", "") for values in of_seed]
        cells.append(", ".join(filter(None, seconds)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def paired(of_seed):
    """Say where the search of all together is behind a rival."""
    lines = []
    for rival in of_seed[0]:
        saved = np.array([v[rival]["nll"] - v[OURS]["nll"] for v in of_seed])
        if rival != OURS:
            lines.append(f"{rival} {saved.mean():+.4f} ± {spread(saved):.4f}")
    return "NLL saved over: " + "; ".join(lines) + "."


def main():
    """Run, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, default="../shared/data")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--subsets", type=int, default=2)
    arguments = parser.parse_args()
    teachers, labels = load(arguments.data)
    lines = [
        "# Several teachers, and a teacher with other classes",
        "",
        "`KERAS_BACKEND=jax python -m benchmarks.quality.teachers --data "
        "../shared/data --output benchmarks/results/teachers.md --subsets "
        f"{arguments.subsets}`",
        "",
        machine(),
        "",
        f"{ROWS} labelled rows for the search, a subset a seed, from 0 on; "
        f"judged on {JUDGED} others. Mean ± standard deviation over the "
        "subsets. The teachers are `resnet50_symfrac0_<s>_noise0_<n>`, out of "
        "fold. Corrected: by the default search, of one teacher or of the mean "
        "as one.",
    ]
    alone = {}
    for title, names in GROUPS.items():
        group = [NAME.format(*name) for name in names]
        of_seed = []
        for seed in range(arguments.subsets):
            of_seed.append(run_group(group, teachers, labels, seed, alone))
            print(title, seed, of_seed[-1][OURS], flush=True)
        shown = ", ".join(f"`{s}, {n}`" for s, n in names)
        lines += ["", f"## {title.capitalize()}", "", f"s, n: {shown}.", ""]
        lines += [*table(of_seed), "", paired(of_seed), ""]
        notes = "; ".join(values[OURS]["note"] for values in of_seed)
        lines.append(f"Chosen: {notes}.")
    lines += [
        "",
        "## Ten classes, five kinds",
        "",
        "Labels are kinds: plane or ship; car or truck; bird; cat or dog; "
        "deer, horse or frog. By hand: someone who knows which class is of "
        "which kind adds their probabilities.",
    ]
    for name in ((6, 4), (4, 2)):
        teacher = teachers[NAME.format(*name)]
        of_seed = [
            run_kinds(teacher, labels, seed)
            for seed in range(arguments.subsets)
        ]
        lines += ["", f"`{NAME.format(*name)}`:", "", *table(of_seed)]
    report = "\n".join(lines) + "\n"
    if arguments.output:
        arguments.output.write_text(report)
    print(report)


if __name__ == "__main__":
    main()
