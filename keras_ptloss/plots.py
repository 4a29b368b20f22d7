"""Plots of a search, a proxy teacher and its calibration, with Matplotlib.

Each function draws on the Matplotlib axes `ax`, or on those of a new figure if
`ax` is None, and returns the axes.
"""

from typing import Any

import numpy as np
from keras import ops

from keras_ptloss._validation import on_simplex
from keras_ptloss.losses import pt_loss
from keras_ptloss.proxy import proxy_teacher

__all__ = [
    "plot_classes",
    "plot_distance_accuracy",
    "plot_loss_curve",
    "plot_proxy_teacher",
    "plot_reliability",
    "plot_search",
]

Axes = Any  # matplotlib.axes.Axes

# More classes than this are drawn without bars side by side.
MAX_BARS = 30


def plot_classes(result: Any, *, ax: Axes = None) -> Axes:
    """Plot how often each class occurs: labels, teacher, corrected teacher.

    The teachers' shares are mean probabilities over the searched examples. They
    show which classes a teacher neglects, and what the correction changes.

    Args:
        result: what a `ProxyTeacherSearch` returned.
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
    # About twenty of many classes have a tick. Long names stand upright.
    shown = position[:: -(-len(position) // 20)] if many else position
    names = [result.class_names[c] for c in shown]
    names = [n if len(n) < 25 else f"{n[:23]}…" for n in names]
    rotation = 90 if max(map(len, names)) * len(names) > 50 else 0
    ax.set_xticks(shown, names, rotation=rotation)
    ax.set(xlabel="class", ylabel="share")
    # Above the axes, where it hides no bar.
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncol=3, fontsize=8)
    return ax


def plot_search(result: Any, *, ax: Axes = None) -> Axes:
    """Plot the best score so far of a random search, by order (Figure 4).

    The plot shows whether more trials or a higher order would still pay. A
    trial of order 0, which is plain KL, is a dashed line.

    Args:
        result: what a `ProxyTeacherSearch(RandomSearch(...))` returned.
        ax: Matplotlib axes, or None for a new figure.

    Example:
        >>> from keras_ptloss import ProxyTeacherSearch
        >>> from keras_ptloss.plots import plot_search
        >>> from keras_ptloss.search import RandomSearch
        >>> search = ProxyTeacherSearch(RandomSearch(num_trials=10, order=2))
        >>> teacher_probs = [[0.7, 0.3], [0.4, 0.6], [0.8, 0.2]]
        >>> result = search.search(teacher_probs, [0, 1, 1], verbose=0)
        >>> ax = plot_search(result)

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), Algorithm 1 and
        Figure 4.
    """
    if "best_of_order" not in result.trials:
        raise ValueError(
            "`result` must come from a search with RandomSearch. Received: "
            f"trials with columns {list(result.trials)}"
        )
    ax = _axes(ax)
    orders = np.asarray(result.trials["order"])
    scores = np.asarray(result.trials["score"])
    for order in np.unique(orders):
        best = np.minimum.accumulate(scores[orders == order])
        if order == 0:
            ax.axhline(best[-1], linestyle="--", color="gray", label="plain KL")
            continue
        trials = np.arange(1, len(best) + 1)
        ax.plot(trials, best, drawstyle="steps-post", label=f"order {order}")
    ax.set(xlabel="trials", ylabel="best score so far")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend()
    return ax


def plot_loss_curve(
    epsilon: Any, teacher_prob: float = 0.7, *, ax: Axes = None
) -> Axes:
    """Plot PTLoss of a two-class teacher against the student (Figure 2).

    KL is lowest where the student equals the teacher. The dot on the curve of
    PTLoss is the proxy teacher, where PTLoss is lowest.

    Args:
        epsilon: coefficients: a number (order 1), `(M,)` shared by the two
            classes, or `(2, M)`.
        teacher_prob: the teacher's probability of the first class, above 0
            and below 1.
        ax: Matplotlib axes, or None for a new figure.

    Example:
        >>> ax = plot_loss_curve([2.0], teacher_prob=0.7)
        >>> [line.get_label() for line in ax.lines]
        ['KL', 'PTLoss', 'teacher 0.7', 'proxy teacher 0.82']

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), Figure 2.
    """
    teacher = np.array([[teacher_prob, 1.0 - teacher_prob]])
    proxy = proxy_teacher(teacher, epsilon).probabilities[0, 0]

    def loss(p: np.ndarray, epsilon: Any) -> np.ndarray:
        student = np.stack([p, 1.0 - p], axis=1)
        teachers = np.repeat(teacher, len(p), axis=0)
        return ops.convert_to_numpy(pt_loss(teachers, student, epsilon))

    ax = _axes(ax)
    p = np.linspace(0.01, 0.99, 197)
    ax.plot(p, loss(p, 0.0), "--", color="gray", label="KL")
    (line,) = ax.plot(p, loss(p, epsilon), label="PTLoss")
    label = f"teacher {teacher_prob:g}"
    ax.axvline(teacher_prob, color="gray", linewidth=0.5, label=label)
    ax.plot(
        [proxy],
        loss(np.array([proxy]), epsilon),
        "o",
        color=line.get_color(),
        label=f"proxy teacher {proxy:.2f}",
    )
    ax.set(xlabel="student's probability", ylabel="loss (nats)")
    ax.legend()
    return ax


def plot_proxy_teacher(
    teacher_probs: Any, proxy_probs: Any, *, ax: Axes = None
) -> Axes:
    """Plot proxy or corrected probabilities against the teacher's.

    A curve steeper than the diagonal is a more confident teacher. Classes with
    different curves are a bias that was removed.

    Args:
        teacher_probs: `(N, C)`.
        proxy_probs: `(N, C)`, of `proxy_teacher` or of `result.correct`.
        ax: Matplotlib axes, or None for a new figure.

    Example:
        >>> teacher = [[0.7, 0.3], [0.2, 0.8]]
        >>> proxies = proxy_teacher(teacher, [2.0]).probabilities
        >>> ax = plot_proxy_teacher(teacher, proxies)
        >>> ax.lines[0].get_xdata().tolist()
        [0.7, 0.2]
    """
    teacher = _probabilities("teacher_probs", teacher_probs)
    proxy = _probabilities("proxy_probs", proxy_probs)
    ax = _axes(ax)
    for c in range(teacher.shape[1]):
        ax.plot(teacher[:, c], proxy[:, c], ".", label=f"class {c}")
    _diagonal(ax)
    ax.set(xlabel="teacher's probability", ylabel="proxy teacher's probability")
    if teacher.shape[1] <= 10:  # Matplotlib has ten colours.
        ax.legend()
    return ax


def plot_reliability(
    probs: Any, labels: Any, *, num_bins: int = 15, ax: Axes = None
) -> Axes:
    """Plot accuracy against confidence: a reliability diagram.

    Bars below the diagonal mean overconfidence. The bins are those of
    `ExpectedCalibrationError`, whose value is in the legend.

    Args:
        probs: probabilities of a teacher or a student, `(N, C)`.
        labels: true classes, integers, `(N,)`.
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
    probs = _probabilities("probs", probs)
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
    _diagonal(ax)
    ax.set(xlabel="confidence", ylabel="accuracy")
    ax.legend()
    return ax


def plot_distance_accuracy(
    distances: Any, accuracies: Any, *, ax: Axes = None
) -> Axes:
    """Plot students' accuracy against their proxies' distance (Figure 3).

    Students should do better the closer their proxy teacher is to the truth:
    Pearson's correlation, in the title, should be near -1.

    Args:
        distances: distance of each proxy teacher to the truth, such as the
            mean of `||q_n - y_n||_2`, `(K,)`.
        accuracies: accuracy of each student, `(K,)`.
        ax: Matplotlib axes, or None for a new figure.

    Example:
        >>> ax = plot_distance_accuracy([0.3, 0.5, 0.6], [0.8, 0.7, 0.6])
        >>> ax.get_title()
        'correlation -0.98'

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), Figure 3.
    """
    ax = _axes(ax)
    ax.plot(distances, accuracies, "o")
    correlation = np.corrcoef(distances, accuracies)[0, 1]
    ax.set(
        title=f"correlation {correlation:.2f}",
        xlabel="distance of the proxy teacher to the truth",
        ylabel="student's accuracy",
    )
    return ax


def _axes(ax: Axes) -> Axes:
    """Return `ax`, or the axes of a new figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def _diagonal(ax: Axes) -> None:
    ax.plot([0.0, 1.0], [0.0, 1.0], "--", color="gray", linewidth=1.0)
    ax.set_aspect("equal")


def _probabilities(argument: str, probs: Any) -> np.ndarray:
    array = np.asarray(probs, "float64")
    if array.ndim != 2 or not on_simplex(array).all():
        raise ValueError(
            f"`{argument}` must be probabilities of shape (N, num_classes), "
            f"not logits. Received: {argument}={probs!r}"
        )
    return array
