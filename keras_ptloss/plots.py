"""Figures of the paper, from the user's own data; they need Matplotlib."""

from typing import Any, Protocol

import numpy as np
from keras import ops

from keras_ptloss._checks import (
    as_floats,
    check_constant_epsilon,
    check_count,
    check_labels,
    check_real,
    fail,
    on_simplex,
)
from keras_ptloss.losses._pt_loss import pt_loss
from keras_ptloss.metrics import confidence_bins
from keras_ptloss.proxy._proxy_teacher import proxy_teacher

__all__ = [
    "plot_classes",
    "plot_distance_accuracy",
    "plot_loss_curve",
    "plot_proxy_teacher",
    "plot_reliability",
    "plot_search",
]

Axes = Any  # matplotlib.axes.Axes

# More classes than this are drawn as lines, and not as bars.
BARS = 30


class Searched(Protocol):
    """What is drawn of a `SearchResult`."""

    @property
    def trials(self) -> dict[str, list[Any]]:
        """What was tried, column by column."""

    @property
    def classes(self) -> dict[str, np.ndarray]:
        """Mean probabilities of each class."""

    @property
    def score_at_zero(self) -> float:
        """The score of plain KL."""

    @property
    def objective(self) -> str:
        """The name of the score."""


def plot_loss_curve(
    epsilon: Any, teacher_prob: float = 0.7, *, ax: Axes = None
) -> Axes:
    """Plot PTLoss of a two-class teacher against the student (Figure 2).

    KL is least where the student equals the teacher; the mark on the curve of
    PTLoss shows the proxy teacher, where it is least.

    Args:
        epsilon: coefficients: a number (order 1), `(M,)` shared by the two
            classes, or `(2, M)`.
        teacher_prob: the teacher's probability of the first class, above 0
            and below 1.
        ax: Matplotlib axes to draw on; None makes a figure.

    Returns:
        The axes.

    Raises:
        ValueError: if an argument is not of this form.
        ImportError: if Matplotlib is absent.

    Example:
        >>> ax = plot_loss_curve([2.0], teacher_prob=0.7)
        >>> [line.get_label() for line in ax.lines]
        ['KL', 'PTLoss', 'teacher 0.7', 'proxy teacher 0.82']

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), Figure 2.
    """
    expected = "above 0 and below 1"
    teacher_prob = check_real("teacher_prob", teacher_prob, expected)
    if not 0.0 < teacher_prob < 1.0:
        fail("teacher_prob", expected, teacher_prob)
    epsilon = check_constant_epsilon(epsilon, classes=2)
    teacher = np.array([[teacher_prob, 1.0 - teacher_prob]])
    proxy = proxy_teacher(teacher, epsilon).probabilities[0, 0]

    def loss(p: np.ndarray, coefficients: Any) -> np.ndarray:
        rows = np.repeat(teacher, len(p), axis=0)
        student = np.stack([p, 1.0 - p], axis=1)
        return ops.convert_to_numpy(pt_loss(rows, student, coefficients))

    ax = _axes(ax)
    p = np.linspace(0.01, 0.99, 197)
    ax.plot(p, loss(p, 0.0), "--", color="gray", label="KL")
    (line,) = ax.plot(p, loss(p, epsilon), label="PTLoss")
    ax.axvline(
        teacher_prob,
        color="gray",
        linewidth=0.5,
        label=f"teacher {teacher_prob:g}",
    )
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
    """Plot the proxy teacher's probabilities against the teacher's.

    Points off the diagonal are what PTLoss makes of the teacher: steeper than
    the diagonal is more confident, and classes apart from each other are a
    bias taken off.

    Args:
        teacher_probs: `(N, C)`.
        proxy_probs: their proxy teachers, `(N, C)`: the `probabilities` of
            `proxy_teacher` or of a search result's `proxy_teacher`.
        ax: Matplotlib axes to draw on; None makes a figure.

    Returns:
        The axes, with one line of points a class.

    Raises:
        ValueError: if the arrays are not rows of probabilities of one shape.
        ImportError: if Matplotlib is absent.

    Example:
        >>> teacher = [[0.7, 0.3], [0.2, 0.8]]
        >>> proxies = proxy_teacher(teacher, [2.0]).probabilities
        >>> ax = plot_proxy_teacher(teacher, proxies)
        >>> ax.lines[0].get_xdata().tolist()
        [0.7, 0.2]
    """
    teacher = _probabilities("teacher_probs", teacher_probs)
    proxy = _probabilities("proxy_probs", proxy_probs)
    if teacher.shape != proxy.shape:
        raise ValueError(
            "`teacher_probs` and `proxy_probs` must have the same shape. "
            f"Received: {teacher.shape} and {proxy.shape}"
        )
    ax = _axes(ax)
    classes = teacher.shape[1]
    for c in range(classes):
        ax.plot(teacher[:, c], proxy[:, c], ".", label=f"class {c}")
    _diagonal(ax)
    ax.set(xlabel="teacher's probability", ylabel="proxy teacher's probability")
    if classes <= 10:  # as many colours as Matplotlib tells apart
        ax.legend()
    return ax


def plot_reliability(
    probs: Any, labels: Any, *, num_bins: int = 15, ax: Axes = None
) -> Axes:
    """Plot accuracy against confidence: a reliability diagram.

    Bars below the diagonal are over-confident. Bins are those of
    `ExpectedCalibrationError`, whose value stands in the legend.

    Args:
        probs: a teacher's, proxy's or student's probabilities, `(N, C)`.
        labels: true classes, integers, `(N,)`.
        num_bins: number of bins of confidence, of equal width.
        ax: Matplotlib axes to draw on; None makes a figure.

    Returns:
        The axes, with one bar for every bin that has examples.

    Raises:
        ValueError: if an argument is not of this form.
        ImportError: if Matplotlib is absent.

    Example:
        >>> ax = plot_reliability([[0.9, 0.1], [0.8, 0.2]], [0, 1], num_bins=5)
        >>> ax.get_legend().get_texts()[0].get_text()
        'accuracy (ECE 0.450)'

    Reference:
        Guo et al. 2017, On Calibration of Modern Neural Networks, Figure 1
        (https://arxiv.org/abs/1706.04599).
    """
    probs = _probabilities("probs", probs)
    labels = check_labels(labels, examples=len(probs), classes=probs.shape[1])
    num_bins = check_count("num_bins", num_bins)
    # In float32, so that examples at an edge fall as the metric's do.
    confidence = probs.max(axis=1).astype("float32")
    right = probs.argmax(axis=1) == labels
    bins = ops.convert_to_numpy(confidence_bins(confidence, num_bins))
    count = np.bincount(bins, minlength=num_bins)
    gap = np.bincount(bins, weights=right - confidence, minlength=num_bins)
    error = np.sum(np.abs(gap)) / len(probs)

    ax = _axes(ax)
    filled = np.flatnonzero(count)
    accuracy = np.bincount(bins, weights=right)[filled] / count[filled]
    ax.bar(
        filled / num_bins,
        accuracy,
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

    The claim behind the search is that students do better the nearer their
    proxy teacher is to the truth: a correlation near -1.

    Args:
        distances: distance of each proxy teacher to the truth, such as the
            mean of `||q_n - y_n||_2`, `(K,)`.
        accuracies: accuracy of each student, `(K,)`.
        ax: Matplotlib axes to draw on; None makes a figure.

    Returns:
        The axes, with Pearson's correlation in the title.

    Raises:
        ValueError: if the vectors are not finite, of one length of at least
            2, and each of more than one value.
        ImportError: if Matplotlib is absent.

    Example:
        >>> ax = plot_distance_accuracy([0.3, 0.5, 0.6], [0.8, 0.7, 0.6])
        >>> ax.get_title()
        'correlation -0.98'

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), Figure 3.
    """
    distances = _vector("distances", distances)
    accuracies = _vector("accuracies", accuracies)
    if len(distances) != len(accuracies):
        raise ValueError(
            "`distances` and `accuracies` must have the same length. "
            f"Received: {len(distances)} and {len(accuracies)}"
        )
    ax = _axes(ax)
    ax.plot(distances, accuracies, "o")
    correlation = np.corrcoef(distances, accuracies)[0, 1]
    ax.set_title(f"correlation {correlation:.2f}")
    ax.set_xlabel("distance of the proxy teacher to the truth")
    ax.set_ylabel("student's accuracy")
    return ax


def plot_search(result: Searched, *, ax: Axes = None) -> Axes:
    """Plot the best score so far against trials, one line an order (Figure 4).

    It tells whether more trials, or a higher order, would still pay.

    Args:
        result: of a `ProxyTeacherSearch(RandomSearch(...))`.
        ax: Matplotlib axes to draw on; None makes a figure.

    Returns:
        The axes, with plain KL's score as a dashed line.

    Raises:
        ValueError: if `result` is not of a random search.
        ImportError: if Matplotlib is absent.

    Example:
        >>> from keras_ptloss.search import RandomSearch
        >>> search = ProxyTeacherSearch(RandomSearch(order=2, trials=10))
        >>> result = search.search([[0.7, 0.3], [0.4, 0.6]], [0, 1])
        >>> ax = plot_search(result)
        >>> [line.get_label() for line in ax.lines]
        ['order 1', 'order 2', 'plain KL']

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), Algorithm 1 and
        Figure 4.
    """
    if "best_of_order" not in getattr(result, "trials", ()):
        fail("result", "a SearchResult of a RandomSearch", result)
    ax = _axes(ax)
    orders = np.asarray(result.trials["order"])
    scores = np.asarray(result.trials["score"])
    for order in np.unique(orders):
        best = np.minimum.accumulate(scores[orders == order])
        ax.plot(
            np.arange(1, len(best) + 1),
            best,
            drawstyle="steps-post",
            label=f"order {order}",
        )
    ax.axhline(
        result.score_at_zero, linestyle="--", color="gray", label="plain KL"
    )
    ax.set(xlabel="trials", ylabel=f"best {result.objective} so far")
    ax.legend()
    return ax


def plot_classes(result: Searched, *, ax: Axes = None) -> Axes:
    """Plot how often each class occurs: labels, teacher, corrected teacher.

    Of the teachers it is the mean probability over the search's examples. It
    shows which classes a teacher neglects, and what the correction does to it.

    Args:
        result: of a `ProxyTeacherSearch`.
        ax: Matplotlib axes to draw on; None makes a figure.

    Returns:
        The axes.

    Raises:
        ValueError: if `result` is no result of a search.
        ImportError: if Matplotlib is absent.

    Example:
        >>> result = ProxyTeacherSearch("random").search(
        ...     [[0.7, 0.3], [0.4, 0.6]], [0, 1]
        ... )
        >>> ax = plot_classes(result)
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['labels', 'teacher', 'corrected']

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), §4.2.
    """
    if not isinstance(getattr(result, "classes", None), dict):
        fail("result", "a SearchResult", result)
    ax = _axes(ax)
    for index, (name, shares) in enumerate(result.classes.items()):
        position = np.arange(len(shares))
        if len(shares) > BARS:
            ax.plot(position, shares, label=name)
        else:
            ax.bar(position + 0.27 * (index - 1), shares, 0.27, label=name)
    ax.set(xlabel="class", ylabel="share")
    # Above the axes: bars may stand anywhere in them.
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncol=3, fontsize=8)
    return ax


def _axes(ax: Axes) -> Axes:
    if ax is not None:
        if not hasattr(ax, "axvline"):
            fail("ax", "Matplotlib axes, or None", ax)
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Plots need Matplotlib: pip install matplotlib"
        ) from error
    return plt.subplots()[1]


def _diagonal(ax: Axes) -> None:
    ax.plot([0.0, 1.0], [0.0, 1.0], "--", color="gray", linewidth=1.0)
    ax.set_aspect("equal")


def _probabilities(argument: str, rows: Any) -> np.ndarray:
    expected = "probabilities, (examples, classes), not logits"
    array = as_floats(argument, rows, expected)
    if array.ndim != 2 or 0 in array.shape or not on_simplex(array).all():
        fail(argument, expected, rows)
    return array


def _vector(argument: str, values: Any) -> np.ndarray:
    expected = "a vector of finite values that differ"
    array = as_floats(argument, values, expected)
    if (
        array.ndim != 1
        or not np.all(np.isfinite(array))
        or len(np.unique(array)) < 2
    ):
        fail(argument, expected, values)
    return array
