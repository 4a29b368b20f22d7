"""Do the search's labels pay a second time, in the student's training?

    KERAS_BACKEND=jax python -m benchmarks.quality.doubly_robust \
        gaussian_imbalanced --seeds 5

The doubly robust loss (Zhu et al. 2023, https://arxiv.org/abs/2306.00265)

    L(corrected, all) + lambda (L(labels, few) - L(corrected, few))

is, of a cross-entropy, that of a target: on the few rows that have labels

    corrected + lambda N / n (label - corrected),

N rows in all, n of them few. The few are corrected by searches that did not see
their labels, in five folds; "in sample" is the search of all of them. At
lambda = n / N the target is the label; above, it has negative entries, and the
loss no lower bound. Beside it the plain mix, labels and corrected teacher
weighed together. Rows are appended to a CSV; a stopped run goes on where it
was.
"""

import keras
import numpy as np

from benchmarks.quality import students
from benchmarks.quality.study import harness, methods, report
from benchmarks.quality.study.tasks import TASKS
from keras_ptloss import ProxyTeacherSearch
from keras_ptloss.search import CrossValidatedSearch

FOLDS = 5
CROSS_ENTROPY = keras.losses.CategoricalCrossentropy(from_logits=True)
# The study's own rows, from its table.
STUDY = ("KL", "searched", methods.CEILING, "labels alone", "hard-label mix")
# At lambda 0, the corrected teacher on the few rows too and nothing else.
CONTROL = "doubly robust, 0"


def find(order, seed, rows):
    """Search on rows, as the study's `searched` does."""
    search = ProxyTeacherSearch(CrossValidatedSearch(order=order), seed=seed)
    return search.search(rows.outputs, rows.labels, verbose=False)


def out_of_fold(task, order, seed):
    """Return the few rows as corrected by searches on the other folds."""
    few = task.search
    random = np.random.default_rng(seed)
    fold = random.permutation(len(few.labels)) % FOLDS
    corrected = np.empty((len(few.labels), task.classes))
    for k in range(FOLDS):
        found = find(order, seed, few.take(fold != k))
        proxies = found.proxy_teacher(few.take(fold == k).outputs)
        corrected[fold == k] = proxies.probabilities
    return corrected


def training(task, order, seed, *, factor, weights=None, in_sample=False):
    """Targets: corrected ones, the few moved to the labels by a factor."""
    found = find(order, seed, task.search)
    many = found.proxy_teacher(task.distill.outputs).probabilities
    if in_sample:
        few = found.proxy_teacher(task.search.outputs).probabilities
    else:
        few = out_of_fold(task, order, seed)
    labels = methods.one_hot(task.search.labels, task.classes)
    few = few + factor * (labels - few)
    return harness.Training(
        methods.join(task.search.x, task.distill.x),
        np.concatenate([few, many]).astype("float32"),
        CROSS_ENTROPY,
        weights=weights,
        note=methods.describe(found),
    )


def doubly_robust(strength, order, *, in_sample=False):
    """The method at a lambda."""

    def prepare(task, setting, seed):
        few = len(task.search.labels)
        ratio = (few + len(task.distill.labels)) / few
        return training(
            task, order, seed, factor=strength * ratio, in_sample=in_sample
        )

    name = f"doubly robust, {strength:g}" + ", in sample" * in_sample
    return harness.Method(name, prepare)


def mix(share, order):
    """Labels on the few and the corrected teacher on the many.

    `share` is the labels' part of the weight.
    """

    def prepare(task, setting, seed):
        few, many = len(task.search.labels), len(task.distill.labels)
        parts = np.array([share / few, (1 - share) / many])
        weights = np.repeat(parts * (few + many), [few, many])
        return training(
            task,
            order,
            seed,
            factor=1.0,
            weights=weights.astype("float32"),
            in_sample=True,
        )

    return harness.Method(f"mix, {share:g}", prepare)


def all_methods(order, *, cheap):
    """Return the methods; where students are cheap, more of them."""
    found = [doubly_robust(s, order) for s in (0.0, 0.3)]
    found.append(mix(0.1, order))
    if cheap:
        found += [doubly_robust(s, order) for s in (0.05, 0.1, 1.0)]
        found += [mix(0.03, order), mix(0.3, order)]
        found += [doubly_robust(s, order, in_sample=True) for s in (0.3, 1.0)]
    return found


def lines_of(rows):
    """Return the table: accuracies, and differences to the control."""
    lines = [
        "Test accuracy in %, mean ± standard error over the seeds. The "
        "difference is of the last epoch, to lambda = 0 (the corrected teacher "
        "on the few rows too), over the seeds that both have, p by a paired "
        "t-test. The first rows are the study's. Rows of one seed: the run was "
        "stopped for time, and goes on there.",
        "",
        "| method | seeds | last epoch | best epoch | NLL | ECE | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    control = students.named(rows, CONTROL)
    for name in dict.fromkeys(row["method"] for row in rows):
        found = students.named(rows, name)
        test = report.paired(found, control, "accuracy_last")
        said = f"{100 * test[0]:+.2f} (p = {test[1]:.3f})" if test else "-"
        cells = [
            name,
            str(len(found)),
            students.cell(found),
            students.cell(found, "accuracy_best"),
            students.cell(found, "nll", 1, 3),
            students.cell(found, "ece", 1, 3),
            said,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main():
    """Run what is missing, then write the table."""
    arguments = students.arguments_of(__doc__, 2, tasks=TASKS)
    name = arguments.task
    cheap = name.startswith("gaussian")
    order = 3 if cheap else 5
    path = arguments.output / f"doubly_robust_{name}.csv"
    if not arguments.report:
        harness.run(
            TASKS[name](),
            all_methods(order, cheap=cheap),
            arguments.seeds,
            path,
        )
    study = harness.read(students.RESULTS / f"study_{name}.csv")
    chosen = report.chosen_rows(study, methods.all_methods(order))
    rows = [row for method in STUDY for row in chosen.get(method, [])]
    students.write(
        path.with_suffix(".md"),
        f"Doubly robust: {name}",
        f"doubly_robust {name} --seeds {arguments.seeds}",
        lines_of(rows + harness.read(path)),
    )


if __name__ == "__main__":
    main()
