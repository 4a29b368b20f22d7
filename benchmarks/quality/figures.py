"""The paper's figures 2 and 4 on a real teacher; figure 3 is the study's.

    python -m benchmarks.quality.figures --data ../shared/data

draws `docs/figures/*.png` of the ResNet-50 on CIFAR-10 that is strongly biased
between classes: 1,000 labelled rows to search on, judged on the others.
"""

import argparse
import pathlib

import matplotlib
import numpy as np

from keras_ptloss import ProxyTeacherSearch
from keras_ptloss.plots import (
    plot_loss_curve,
    plot_proxy_teacher,
    plot_reliability,
    plot_search,
)
from keras_ptloss.search import RandomSearch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TEACHER = "resnet50_symfrac0_6_noise0_4"
ROWS = 1000
DOCS = pathlib.Path(__file__).parents[2] / "docs"


def save(figure, path):
    """Write a figure and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def row_of_two():
    """Return a figure with two axes side by side."""
    return plt.subplots(1, 2, figsize=(10, 4), layout="constrained")


def loss_curves(path):
    """Figures 2a and 2b: where the loss has its minimum, by epsilon."""
    figure, axes = row_of_two()
    for axis, epsilon in zip(axes, ([2.0], [-0.8, 1.0]), strict=True):
        plot_loss_curve(epsilon, teacher_prob=0.7, ax=axis)
    save(figure, path)


def search_and_reliability(data, folder):
    """Figures 4a and 4b, and what the search did to the teacher."""
    file = np.load(data / "cifar10" / "teachers_train.npz")
    probabilities = file[f"{TEACHER}__probs"].astype("float64")
    probabilities /= probabilities.sum(axis=1, keepdims=True)  # were float16
    labels = file["labels"]
    shuffled = np.random.default_rng(0).permutation(len(labels))
    few, rest = shuffled[:ROWS], shuffled[ROWS:]

    figure, axes = row_of_two()
    for axis, per_class in zip(axes, (False, True), strict=True):
        search = ProxyTeacherSearch(RandomSearch(per_class=per_class))
        found = search.search(probabilities[few], labels[few])
        plot_search(found, ax=axis)
        axis.set_title("per class" if per_class else "shared by the classes")
    save(figure, folder / "search.png")

    chosen = ProxyTeacherSearch().search(probabilities[few], labels[few])
    chosen.summary()
    teacher = probabilities[rest]
    proxy = chosen.proxy_teacher(teacher).probabilities
    figure, axes = row_of_two()
    for axis, rows, name in zip(
        axes, (teacher, proxy), ("teacher", "proxy teacher"), strict=True
    ):
        plot_reliability(rows, labels[rest], ax=axis)
        accuracy = np.mean(rows.argmax(axis=1) == labels[rest])
        axis.set_title(f"{name}, accuracy {accuracy:.3f}")
    save(figure, folder / "reliability.png")

    figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
    plot_proxy_teacher(teacher[:300], proxy[:300], ax=axis)
    save(figure, folder / "proxy.png")


def main():
    """Draw all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, default=DOCS / "figures")
    arguments = parser.parse_args()
    loss_curves(arguments.output / "loss.png")
    search_and_reliability(arguments.data, arguments.output)


if __name__ == "__main__":
    main()
