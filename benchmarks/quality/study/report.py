"""Tables and figures of what a study has so far."""

import pathlib
from typing import Any

import matplotlib
import numpy as np
import scipy.stats

from benchmarks.quality.study.harness import Method, chosen_setting, read
from benchmarks.quality.study.methods import CEILING
from keras_ptloss.plots import plot_distance_accuracy

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RIVALS = (
    "KL",
    "temperature scaling",
    "label smoothing",
    "vector scaling",
    "matrix scaling",
)
OURS = "searched"

# Points of accuracy between KL and the true labels below which there is no way
# to have a share of.
LEAST_WAY = 0.01

# Of each study what its table cannot say. SST-2 ran on TensorFlow, which is
# three times as fast as JAX at its embeddings.
SST2_TASKS = ("sst2", "sst2_imbalanced", "sst2_full", "sst2_imbalanced_full")
BACKENDS = dict.fromkeys(SST2_TASKS, "tensorflow")
GAUSSIAN = (
    "Ren et al.'s three Gaussians in 30 dimensions, their data draw by draw "
    "(NumPy seed 1): 5,000 points to train on, 5,000 to choose the epoch, "
    "89,000 to test (1,000 of the published 90,000 are the search's), 100 "
    "epochs of SGD at 5e-4. "
)
CIFAR = (
    "A ResNet-50 trained on CIFAR-10, its out-of-fold outputs stored; a "
    "ResNet-8 on images halved to 16 x 16 as the student; "
    "1,000 labelled images for the search, 16,000 others without labels, 8 "
    "epochs; the CIFAR-10 test set. The teacher is {}. The validation rows "
    "are the search's: the best epoch of `labels alone` means nothing. "
)
SST2 = (
    "MiniLM-L6, fine-tuned on a tenth of SST-2{}; BERT-tiny as the student, "
    "{} other sentences without labels, {}; the labelled test "
    "set, 1,821 sentences. The validation rows are the search's 1,000: the "
    "best epoch of `labels alone` means nothing. "
)
IMBALANCED = ", of whose negative sentences it saw one in ten"
ABOUT = {
    "gaussian": GAUSSIAN
    + "The teacher is the student's network, trained on the labels. "
    "Published, best epoch: OHT 83.39, LS 83.22, KD 83.27, ESKD 83.65, GT "
    "84.02 (here true labels on all, LS, KL, ESKD, GT).",
    "gaussian_imbalanced": GAUSSIAN
    + "The teacher saw a tenth of the classes 1 and 2; students have no "
    "labels but the search's.",
    "cifar10_strong": CIFAR.format(
        "`resnet50_symfrac0_6_noise0_4`, trained on noisy labels, strongly "
        "biased between classes"
    ),
    "cifar10_mild": CIFAR.format(
        "`resnet50_symfrac0_4_noise0_2`, trained on noisy labels, mildly "
        "biased between classes"
    ),
    "cifar10_noise60": CIFAR.format(
        "`resnet50_symfrac0_6_noise0_6`, trained on labels of which 60 % are "
        "noise: 34 % of its answers are right"
    ),
    "cifar10_four": CIFAR.format(
        "a list of four, `resnet50_symfrac0_{0,2,4,6}_noise0_6`, trained on "
        "labels of which 60 % are noise: 33 to 38 % of their answers are "
        "right. KL is to the mean of their probabilities, which agreement is "
        "with too"
    ),
    "cifar10_clean": CIFAR.format(
        "`resnet50_symfrac0_0_noise0_0`, trained on the true labels"
    ),
    "sst2": SST2.format("", "10,000", "two epochs"),
    "sst2_imbalanced": SST2.format(IMBALANCED, "10,000", "two epochs"),
    "sst2_full": SST2.format("", "all the", "one epoch"),
    "sst2_imbalanced_full": SST2.format(IMBALANCED, "all the", "one epoch"),
}

HEADER = """# Study: {task}

`KERAS_BACKEND={backend} python -m benchmarks.quality.study {task} {options}`

{about}

Test accuracy in % of the last epoch and of the epoch that is best on the
validation rows, mean and standard deviation over the seeds; `*` and `**` where
it differs from KL's by a two-tailed paired t-test at 90 and 95 %.
Of the way: (method - KL) / (true labels on all - KL), last epoch, over the
seeds that all three have; `-` where the true labels bring less than a point.
Agreement: how often student and teacher choose the same class, on the
validation rows. NLL and ECE on the test rows, last epoch. Seconds of the search
and of a student's training, one CPU core, other work beside it. Settings were
chosen by the first seed's validation accuracy.

| method | setting | seeds | last epoch | best epoch | of the way % | agreement | NLL | ECE | search s | train s |
|---|---|---|---|---|---|---|---|---|---|---|
"""  # noqa: E501


def write(task: str, path: pathlib.Path, methods: list[Method]) -> None:
    """Write the Markdown report beside the CSV at `path`."""
    rows = chosen_rows(read(path), methods)
    proxies = {n: r for n, r in rows.items() if n.startswith("proxy ")}
    tabled = {n: r for n, r in rows.items() if n not in proxies}
    seeds = max(len(found) for found in rows.values())
    order = " --order 3" if task.startswith("gaussian") else ""
    text = HEADER.format(
        task=task,
        backend=BACKENDS.get(task, "jax"),
        options=f"--seeds {seeds}{order}",
        about=ABOUT.get(task, "As `tasks.py` says."),
    )
    for name, found in tabled.items():
        way = share_of_the_way(found, rows.get("KL", []), rows.get(CEILING, []))
        text += table_row(name, found, rows.get("KL", []), way) + "\n"
    text += "\n" + tests(rows) + notes(tabled)
    if proxies:
        text += proxy_report(proxies, path)
    path.with_suffix(".md").write_text(text)


def chosen_rows(
    rows: list[dict[str, str]], methods: list[Method]
) -> dict[str, list[dict[str, str]]]:
    """Return each method's rows by seed, of its chosen setting."""
    chosen = {}
    for method in methods:
        try:
            setting = chosen_setting(rows, method)
        except LookupError:
            continue
        chosen[method.name] = sorted(
            (
                row
                for row in rows
                if (row["method"], row["setting"]) == (method.name, setting)
            ),
            key=lambda row: int(row["seed"]),
        )
    return chosen


def column(rows: list[dict[str, str]], name: str) -> np.ndarray:
    """Return a column as numbers."""
    return np.array([float(row[name]) for row in rows])


def paired(
    first: list[dict[str, str]], second: list[dict[str, str]], key: str
) -> tuple[float, float] | None:
    """Return the mean difference of a column and p, over common seeds.

    None with fewer than two seeds, or without any difference.
    """
    by_seed = {r["seed"]: float(r[key]) for r in second}
    both = [
        (float(r[key]), by_seed[r["seed"]])
        for r in first
        if r["seed"] in by_seed
    ]
    differences = np.array([a - b for a, b in both])
    if len(both) < 2 or not np.ptp(differences):
        return None
    p = scipy.stats.ttest_rel(*np.array(both).T).pvalue
    return float(differences.mean()), float(p)


def share_of_the_way(
    rows: list[dict[str, str]],
    kl: list[dict[str, str]],
    ceiling: list[dict[str, str]],
) -> str:
    """Return how much of the way from KL to the true labels a method makes.

    Returns:
        Per cent, or `-` where there is no such way.
    """
    found = [
        {row["seed"]: float(row["accuracy_last"]) for row in some}
        for some in (rows, kl, ceiling)
    ]
    seeds = set.intersection(*map(set, found))
    if not seeds:
        return "-"
    own, low, high = (np.mean([f[s] for s in seeds]) for f in found)
    if high - low < LEAST_WAY:
        return "-"
    return f"{100 * (own - low) / (high - low):.0f}"


def table_row(name: str, rows: list[dict], kl: list[dict], way: str) -> str:
    """Return one line of the table."""

    def spread(key: str) -> str:
        values = 100 * column(rows, key)
        text = f"{values.mean():.2f}"
        if len(values) > 1:
            text += f" ± {values.std(ddof=1):.2f}"
        test = paired(rows, kl, key)
        if name != "KL" and test and test[1] < 0.1:
            text += r" \*\*" if test[1] < 0.05 else r" \*"
        return text

    cells = [
        name,
        rows[0]["setting"] or "-",
        str(len(rows)),
        spread("accuracy_last"),
        spread("accuracy_best"),
        way,
        f"{column(rows, 'agreement').mean():.3f}",
        f"{column(rows, 'nll').mean():.3f}",
        f"{column(rows, 'ece').mean():.3f}",
        f"{column(rows, 'search_seconds').mean():.1f}",
        f"{column(rows, 'train_seconds').mean():.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def tests(rows: dict[str, list[dict]]) -> str:
    """Compare ours with each rival, in words."""
    text = ""
    for key in ("last", "best"):
        found = {
            rival: paired(
                rows.get(OURS, []), rows.get(rival, []), f"accuracy_{key}"
            )
            for rival in RIVALS
        }
        parts = [
            f"{rival} {100 * test[0]:+.2f} (p = {test[1]:.4f})"
            for rival, test in found.items()
            if test
        ]
        if parts:
            text += f"{OURS} less, {key} epoch: {'; '.join(parts)}.\n\n"
    return text


def notes(rows: dict[str, list[dict]]) -> str:
    """List what the searches found, alike seeds in one line."""
    lines = []
    for name, found in rows.items():
        seeds: dict[str, list[str]] = {}
        for row in found:
            seeds.setdefault(row["note"], []).append(row["seed"])
        lines += [
            f"* {name}, seed {', '.join(which)}: {note}"
            for note, which in seeds.items()
            if note
        ]
    return "What the searches found:\n\n" + "\n".join(lines) + "\n"


def proxy_report(proxies: dict[str, list[dict]], path: pathlib.Path) -> str:
    """Draw Fig. 3, and tell how well each score predicts distance and student.

    Returns:
        Markdown with the picture, which lies beside the report.
    """
    first = [found[0]["note"] for found in proxies.values()]
    distances = [
        {k: float(v) for k, v in (part.split("=") for part in note.split())}
        for note in first
    ]
    table = {key: np.array([d[key] for d in distances]) for key in distances[0]}
    accuracy = {
        key: np.array(
            [
                column(found, f"accuracy_{key}").mean()
                for found in proxies.values()
            ]
        )
        for key in ("last", "best")
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key in zip(axes, accuracy, strict=True):
        plot_distance_accuracy(table["l2"], accuracy[key], ax=axis)
        axis.set_ylabel(f"student's test accuracy, {key} epoch")
    picture = path.with_name(path.stem + "_proxies.png")
    figure.savefig(picture, dpi=110)
    plt.close(figure)

    def correlation(a: Any, b: Any) -> str:
        return f"{np.corrcoef(a, b)[0, 1]:+.2f}"

    text = (
        f"\n## Ten random proxies (Fig. 3)\n\n![L2 distance to the truth and "
        f"the student's accuracy]({picture.name})\n\nCorrelation over the "
        "proxies, scores on the search's rows:\n\n| | with L2 to the truth | "
        "with accuracy, last epoch | best epoch |\n|---|---|---|---|\n"
    )
    label = {"l2": "L2 to the truth", "risk": "risk (Eq. 11)"}
    for name, values in table.items():
        text += (
            f"| {label.get(name, name)} | {correlation(values, table['l2'])} | "
            f"{correlation(values, accuracy['last'])} | "
            f"{correlation(values, accuracy['best'])} |\n"
        )
    return text
