"""The paper's Gaussians (section 5.1), in the set-up of Ren et al. (2022).

    KERAS_BACKEND=jax python benchmarks/quality/gaussians.py

trains teachers and students for five seeds, appends them to
benchmarks/results/gaussians.csv and prints gaussians.md beside it. A stopped
run continues where it was. Needs JAX.

A seed draws the centres of three classes, 5,000 training, 5,000 validation and
90,000 test rows. The first 1,000 validation rows are the labelled rows of the
searches; the others choose each student's best epoch and, as in the paper, the
settings of the baselines. Teacher and students are the same MLP. KD's teacher
is that of the last epoch, ESKD's that of its best epoch.
"""

import itertools
import pathlib
import warnings

import keras
import numpy as np
from gaussians_task import (
    EPOCHS,
    KL,
    MODEL,
    accuracy,
    append,
    build,
    load,
    predict,
    read,
    train,
)
from scipy.special import softmax

from keras_ptloss import (
    ProxyTeacherSearch,
    PTLoss,
    distillation_targets,
    proxy_teacher,
)
from keras_ptloss.callbacks import FilteredTeacher
from keras_ptloss.losses import Flooding, FocalLoss, LabelSmoothingLoss
from keras_ptloss.search import RandomSearch

PATH = pathlib.Path("benchmarks/results/gaussians.csv")
PUBLISHED = {
    "one-hot labels": 0.83391,
    "label smoothing": 0.83221,
    "KD": 0.83273,
    "ESKD": 0.83647,
    "true probabilities": 0.84024,
}
SEEDS = range(5)
SMOOTHING = [
    LabelSmoothingLoss(d, from_logits=True, name=f"delta {d}")
    for d in (0.02, 0.05, 0.1, 0.15, 0.2)
]
TEMPERATURES = [
    PTLoss(0.0, teacher_temperature=tau, from_logits=True, name=f"tau {tau}")
    for tau in (0.1, 0.2, 0.5, 2.0, 5.0, 10.0)
]
FOCAL = [
    FocalLoss(gamma, from_logits=True, name=f"gamma {gamma}")
    for gamma in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
]
FLOODING = [
    Flooding(KL, level, name=f"level {level}")
    for level in (0.01, 0.02, 0.05, 0.1, 0.2)
]

# --- Methods -----------------------------------------------------------------


def students(task):
    """Return `(method, setting, targets, options of train)` of each student."""
    last, best = task.path[-1], task.path[task.best]
    teacher, early = predict(last, task.x), predict(best, task.x)
    filtered = FilteredTeacher(task.x, from_logits=True, batch_size=5000)
    filtered.set_model(MODEL)
    for epoch, weights in enumerate(task.path):
        MODEL.set_weights(weights)
        filtered.on_epoch_end(epoch)
    found = [
        ("one-hot labels", "", task.onehot, {}),
        ("KD", "", teacher, {}),
        ("ESKD", "", early, {}),
        ("FilterKD", "", filtered.probabilities, {}),
        ("true probabilities", "", task.truth, {}),
    ]
    for method, t, losses in (
        ("label smoothing", task.onehot, SMOOTHING),
        ("KD, label smoothing", teacher, SMOOTHING),
        ("KD, temperature", teacher, [KL, *TEMPERATURES]),
        ("KD, focal loss", teacher, FOCAL),
        ("KD, Flooding", teacher, FLOODING),
    ):
        found += [(method, loss.name, t, {"loss": loss}) for loss in losses]
    # The loss of Tf-KD_self is KL to this mixture, but for a constant.
    for share, tau in itertools.product((0.1, 0.5, 0.9), (1.0, 2.0, 5.0)):
        softened = softmax(np.log(early) / tau, axis=1)
        mixed = share * softened + (1 - share) * task.onehot
        found.append(("Tf-KD_self", f"share {share}, tau {tau}", mixed, {}))
    few = np.eye(3)[task.few_labels]
    found.append(("1,000 labelled rows", "", few, {"x": task.few_x}))
    for name, weights in (("KD", last), ("ESKD", best)):
        found += with_labels(task, name, weights)
    return found


def with_labels(task, name, weights):
    """Return the students for which 1,000 labelled rows correct a teacher."""
    t, held_out = predict(weights, task.x), predict(weights, task.few_x)
    labels, found = task.few_labels, []
    for order in (3, (1, 5)):
        method = RandomSearch(order=order)
        search = ProxyTeacherSearch(method, seed=task.seed)
        epsilon = search.search(held_out, labels, verbose=0).epsilon
        title = f"{name}, PTLoss of order {str(order).strip('()')}"
        options = {"loss": None, "epsilon": epsilon}
        found.append((title, " ".join(f"{e:.2f}" for e in epsilon), t, options))
    x = np.concatenate([task.x, task.few_x])
    every = np.concatenate([t, held_out])
    known = np.r_[np.full(len(task.x), -1), labels]
    options = {"random_sample": True, "seed": task.seed, "verbose": 0}
    plain = distillation_targets(every, known, **options)
    keras.utils.set_random_seed(task.seed)
    model = distillation_targets(
        every, known, x=x, build_model=build, **options
    )
    corrected = plain.result.correct(t)
    mixed = np.concatenate([t, np.eye(3)[labels]])
    title = f"{name}, `distillation_targets`"
    return [
        *found,
        (f"{name}, corrected", plain.chosen, corrected, {}),
        (f"{name} and labelled rows", "", mixed, {"x": x}),
        (title, plain.chosen, plain.values, {"x": x}),
        (f"{title} with `build_model`", model.chosen, model.values, {"x": x}),
    ]


def minimum(t, loss=KL, epsilon=()):
    """Return the probabilities at which a loss is lowest, or NaN."""
    if loss is None:
        return proxy_teacher(t, epsilon).probabilities
    if isinstance(loss, LabelSmoothingLoss):
        return (1 - loss.delta) * t + loss.delta / 3
    if isinstance(loss, PTLoss):
        log_t = np.log(np.maximum(t, 1e-7))
        return softmax(log_t / loss.teacher_temperature, axis=1)
    return np.full_like(t, np.nan)


def distance(task, t):
    """Return the mean L2 distance of training rows' targets to the truth."""
    if len(t) < len(task.x):
        return np.nan
    return np.linalg.norm(t[: len(task.x)] - task.truth, axis=1).mean()


def run(seed):
    """Append the missing students of a seed."""
    done = {(r["method"], r["setting"]) for r in read(PATH, seed)}
    task = load(seed)
    if not done:
        append(PATH, seed, "Bayes classifier", "", 0, np.nan, task.bayes, 0.0)
        for name, epoch in (("KD's", EPOCHS - 1), ("ESKD's", task.best)):
            weights = task.path[epoch]
            test, apart = accuracy(task, weights), predict(weights, task.x)
            scores = np.nan, test, distance(task, apart)
            append(PATH, seed, f"{name} teacher", "", epoch + 1, *scores)
    for method, setting, t, options in students(task):
        if (method, setting) in done:
            continue
        x = options.pop("x", task.x)
        path, best, validation = train(task, x, t, **options)
        test = accuracy(task, path[best])
        apart = distance(task, minimum(t, **options))
        scores = validation, test, apart
        append(PATH, seed, method, setting, best + 1, *scores)


# --- Report ------------------------------------------------------------------


def mean_and_error(values):
    """Return `mean ± standard error` in percent."""
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{100 * np.mean(values):.2f} ± {100 * error:.2f}"


def report():
    """Return the table as Markdown."""
    # The setting with the best validation accuracy, by method and seed.
    best = {}
    for row in read(PATH):
        key = row["method"], row["seed"]
        if key not in best or row["validation"] > best[key]["validation"]:
            best[key] = row
    methods = dict.fromkeys(method for method, _ in best)
    seeds = [seed for method, seed in best if method == "KD"]
    lines = [
        "| method | distance | epoch | accuracy | less KD | less ESKD "
        "| published |",
        "|---|---|---|---|---|---|---|",
    ]

    def column(method, name):
        return np.array([float(best[method, seed][name]) for seed in seeds])

    for method in methods:
        test = column(method, "test")
        apart = column(method, "distance").mean()
        cells = (
            method,
            "" if np.isnan(apart) else f"{apart:.3f}",
            f"{column(method, 'epoch').mean():.0f}",
            mean_and_error(test),
            mean_and_error(test - column("KD", "test")),
            mean_and_error(test - column("ESKD", "test")),
            f"{100 * PUBLISHED[method]:.2f}" if method in PUBLISHED else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    """Run what is missing, then print the table."""
    warnings.simplefilter("ignore")  # notes on teacher and labels
    for seed in SEEDS:
        run(seed)
    text = (
        "# The paper's Gaussians\n\n"
        "`KERAS_BACKEND=jax python benchmarks/quality/gaussians.py`\n\n"
        "Test accuracy in %, mean and standard error over five draws of the "
        "data; differences are paired. Distance: mean L2 distance on the "
        "training rows from the true probabilities to those that the loss "
        "asks for. Epoch: the mean best epoch.\n\n"
        f"{report()}\n"
    )
    PATH.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
