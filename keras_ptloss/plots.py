"""Matplotlib plots of a search's result and of calibration.

Each function draws on the Matplotlib axes `ax`, or on the axes of a new figure
if `ax` is None, and returns the axes.
"""

from typing import Any

import numpy as np

from keras_ptloss._validation import as_probabilities

__all__ = ["plot_classes", "plot_reliability"]

Axes = Any  # matplotlib.axes.Axes

# More classes than this are drawn without bars side by side.
MAX_BARS = 30


def plot_classes(result: Any, *, ax: Axes = None) -> Axes:
    """Plot how often each class occurs: labels, teacher, corrected teacher.

    The shares of the teacher and the corrected teacher are mean probabilities
    over the labelled examples. They show which classes the teacher predicts too
    rarely, and what the correction changes.

    Args:
        result: the result of a `ProxyTeacherSearch`.
        ax: Matplotlib axes, or None for a new figure.

    Example:
        >>> from keras_ptloss import ProxyTeacherSearch
        >>> from keras_ptloss.plots import plot_classes
        >>> teacher_probs = [[0.7, 0.3], [0.4, 0.6], [0.8, 0.2]]
        >>> result = ProxyTeacherSearch().search(teacher_probs, [0, 1, 1])
        >>> ax = plot_classes(result)
    """
    ax = _axes(ax)
    position = np.arange(len(result.class_names))
    many = len(position) > MAX_BARS
    for index, (name, shares) in enumerate(result.class_shares.items()):
        if not many:
            ax.bar(position + 0.27 * (index - 1), shares, 0.27, label=name)
        elif index == 0:
            ax.bar(position, shares, 0.9, color="0.8", label=name)
        else:
            ax.plot(position, shares, "ox"[index - 1], markersize=4, label=name)
    # If there are many classes, about twenty have a tick. Long names are
    # written vertically.
    shown = position[:: -(-len(position) // 20)] if many else position
    names = [result.class_names[c] for c in shown]
    names = [n if len(n) < 25 else f"{n[:23]}…" for n in names]
    rotation = 90 if max(map(len, names)) * len(names) > 50 else 0
    ax.set_xticks(shown, names, rotation=rotation)
    ax.set(xlabel="class", ylabel="share")
    # Above the axes, the legend does not hide any bars.
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncol=3, fontsize=8)
    return ax


def plot_reliability(
    probs: Any, labels: Any, *, num_bins: int = 15, ax: Axes = None
) -> Axes:
    """Plot accuracy against confidence: a reliability diagram.

    Bars below the diagonal mean overconfidence. The bins are the same as in
    `ExpectedCalibrationError`. The legend shows the value of this error.

    Args:
        probs: the probabilities of a teacher or a student, `(N, C)`.
        labels: the true classes, as integers, `(N,)`.
        num_bins: number of bins of equal width.
        ax: Matplotlib axes, or None for a new figure.

    Example:
        >>> ax = plot_reliability([[0.9, 0.1], [0.8, 0.2]], [0, 1], num_bins=5)
        >>> ax.get_legend().get_texts()[0].get_text()
        'accuracy (ECE 0.450)'

    Reference:
        Guo et al. 2017, On Calibration of Modern Neural Networks, Figure 1
        (https://arxiv.org/abs/1706.04599).
    """
    probs = as_probabilities("probs", probs, False, "take their softmax first")
    # In float32, as in the metric, so that edges fall into the same bins.
    confidence = probs.max(axis=1).astype("float32")
    bins = np.ceil(confidence * np.float32(num_bins)).astype(int) - 1
    bins = np.clip(bins, 0, num_bins - 1)
    correct = probs.argmax(axis=1) == np.asarray(labels)
    count = np.bincount(bins, minlength=num_bins)
    gap = np.bincount(bins, weights=correct - confidence, minlength=num_bins)
    error = np.sum(np.abs(gap)) / len(probs)

    ax = _axes(ax)
    filled = np.flatnonzero(count)
    ax.bar(
        filled / num_bins,
        np.bincount(bins, weights=correct)[filled] / count[filled],
        width=1.0 / num_bins,
        align="edge",
        edgecolor="white",
        label=f"accuracy (ECE {error:.3f})",
    )
    ax.plot([0.0, 1.0], [0.0, 1.0], "--", color="gray", linewidth=1.0)
    ax.set_aspect("equal")
    ax.set(xlabel="confidence", ylabel="accuracy")
    ax.legend()
    return ax


def _axes(ax: Axes) -> Axes:
    """Return `ax`, or the axes of a new figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]
