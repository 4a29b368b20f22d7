"""Distil a student from a biased teacher: handwritten digits, end to end.

A teacher has seen many of the digits 0-4 and few of 5-9, and favours the
former. There are 300 labelled images, and 700 without labels to distil from; a
student of the true labels of these 700 shows what is possible.

    python examples/digits.py --output demo-output

prints the students' test accuracies, draws what the search did to the teacher
and exports a student. On scikit-learn's digits, which need no download.
"""

import argparse
import pathlib

import keras
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from keras_ptloss import Distiller, ProxyTeacherSearch, PTLoss, export_student
from keras_ptloss.losses import ProxyKLDivergence
from keras_ptloss.search import CalibrationSearch, GradientSearch

CLASSES = 10
SPLIT_SEED = 0


def load_data():
    """Split 1,797 images, each class in proportion.

    Returns:
        For each of `"teacher"`, `"search"`, `"unlabelled"` and `"test"` the
        images `(N, 64)`, from 0 to 1, and labels `(N,)`. The teacher's part is
        then thinned: 5 images of each of the digits 5-9 are left.
    """
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype("float32")
    parts, rest = {}, (images, labels)
    for name, size in (("teacher", 400), ("search", 300), ("unlabelled", 700)):
        x, rest_x, y, rest_y = train_test_split(
            *rest, train_size=size, stratify=rest[1], random_state=SPLIT_SEED
        )
        parts[name], rest = (x, y), (rest_x, rest_y)
    parts["test"] = rest
    x, y = parts["teacher"]
    rank = np.array([np.sum(y[:i] == y[i]) for i in range(len(y))])
    kept = (y < 5) | (rank < 5)
    parts["teacher"] = x[kept], y[kept]
    return parts


def make_teacher(seed):
    """Build an untrained teacher, which ends in probabilities."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(256, "relu"),
            keras.layers.Dense(CLASSES, "softmax"),
        ]
    )


def make_student(seed):
    """Build an untrained student, which ends in logits."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(32, "relu"),
            keras.layers.Dense(CLASSES, name="logits"),
        ]
    )


def train_teacher(data):
    """Train the teacher on its unbalanced images."""
    teacher = make_teacher(seed=0)
    teacher.compile("adam", loss="sparse_categorical_crossentropy")
    teacher.fit(*data["teacher"], epochs=40, batch_size=16, verbose=0)
    return teacher


def search_losses(teacher, data):
    """Find the losses to compare, each from the same 300 labelled images.

    Returns:
        For each method its loss; and the result of the last search.
    """
    x, y = data["search"]
    kl = PTLoss(0.0, from_logits=True, teacher_from_logits=False)
    losses = {"plain KL": kl}
    for name, method in {
        "the paper's search": "random",
        "epsilon per class": GradientSearch(per_class=True, penalty=0.01),
        "matrix scaling": CalibrationSearch("matrix"),
        "the default search": "cross_validation",
    }.items():
        result = ProxyTeacherSearch(method).search(teacher, y, inputs=x)
        result.summary()
        losses[name] = result.correction.loss(from_logits=True)
        # `result.loss()` is KL to the proxy. Both lead there, unless epsilon is
        # 0 (then they are one and the same) or a matrix follows it, which
        # PTLoss cannot carry.
        if result.correction.is_pt_loss and np.any(result.epsilon):
            losses[f"{name}, KL to its proxy"] = ProxyKLDivergence(
                result.correction, from_logits=True
            )
    return losses, result


def distil(teacher, loss, data, seed, epochs):
    """Distil one student from the unlabelled images."""
    distiller = Distiller(make_student(seed), teacher)
    distiller.compile(keras.optimizers.Adam(3e-3), loss=loss)
    distiller.fit(
        data["unlabelled"][0], epochs=epochs, batch_size=32, verbose=0
    )
    return distiller.student


def train_on_labels(images, labels, seed, epochs):
    """Train a student on true labels, without a teacher."""
    student = make_student(seed)
    student.compile(
        keras.optimizers.Adam(3e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    student.fit(images, labels, epochs=epochs, batch_size=32, verbose=0)
    return student


def accuracy(model, data):
    """Return the share of right answers on the test images."""
    x, y = data["test"]
    return float(np.mean(model.predict(x, verbose=0).argmax(axis=1) == y))


def draw(teacher, result, data, path):
    """Draw how often each digit is predicted, and how often it is there."""
    x, y = data["test"]
    probabilities = teacher.predict(x, verbose=0)
    proxies = result.proxy_teacher(probabilities).probabilities
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    digits = np.arange(CLASSES)
    bars = {
        "truth": (np.bincount(y, minlength=CLASSES) / len(y), "0.75"),
        "teacher": (probabilities.mean(axis=0), "tab:orange"),
        "proxy teacher": (proxies.mean(axis=0), "tab:blue"),
    }
    for shift, (name, (share, color)) in zip(
        (-0.27, 0.0, 0.27), bars.items(), strict=True
    ):
        axes[0].bar(digits + shift, share, 0.27, label=name, color=color)
    axes[0].set(
        title="Mean probability of each digit, test images",
        xlabel="digit",
        ylabel="share",
        xticks=digits,
    )
    axes[0].legend()
    for name, rows in (("teacher", probabilities), ("proxy teacher", proxies)):
        right = [np.mean(rows[y == c].argmax(axis=1) == c) for c in digits]
        shift = -0.2 if name == "teacher" else 0.2
        axes[1].bar(digits + shift, right, 0.4, label=name, color=bars[name][1])
    axes[1].set(
        title="Accuracy on each digit",
        xlabel="digit",
        ylim=(0, 1.02),
        xticks=digits,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    """Run the whole example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default="demo-output")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    data = load_data()
    teacher = train_teacher(data)
    losses, result = search_losses(teacher, data)

    rows = {"(teacher)": [accuracy(teacher, data)]}
    for name, loss in losses.items():
        students = [
            distil(teacher, loss, data, seed, arguments.epochs)
            for seed in range(arguments.seeds)
        ]
        rows[name] = [accuracy(student, data) for student in students]
    for name, part in {
        "(the 300 labels alone)": "search",
        "(true labels on all 700)": "unlabelled",
    }.items():
        rows[name] = [
            accuracy(train_on_labels(*data[part], seed, arguments.epochs), data)
            for seed in range(arguments.seeds)
        ]

    print(
        f"\nTest accuracy, {arguments.seeds} seeds ({keras.config.backend()})"
    )
    for name, values in rows.items():
        spread = f" +- {100 * np.std(values):.1f}" if len(values) > 1 else ""
        print(f"  {name:40s} {100 * np.mean(values):5.1f} %{spread}")

    picture = arguments.output / "digits.png"
    draw(teacher, result, data, picture)
    exported = export_student(
        students[-1], arguments.output / "student", from_logits=True
    )
    check_export(exported, students[-1], data)
    print(f"\nPicture: {picture}\nExported student: {exported}")


def check_export(path, student, data):
    """Reload the SavedModel and compare its predictions."""
    # TensorFlow reads SavedModels on either backend.
    import tensorflow as tf

    x = data["test"][0]
    served = tf.saved_model.load(str(path)).signatures["serving_default"]
    (name,) = served.structured_input_signature[1]
    probabilities = served(**{name: tf.constant(x)})["probabilities"].numpy()
    logits = student.predict(x, verbose=0)
    expected = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)


if __name__ == "__main__":
    main()
