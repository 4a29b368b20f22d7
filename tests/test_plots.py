"""What the plots draw: the data of lines and bars, not pixels."""

import types

import keras
import numpy as np
import pytest
import scipy.special

from keras_ptloss import proxy_teacher
from keras_ptloss.metrics import ExpectedCalibrationError
from keras_ptloss.plots import (
    plot_classes,
    plot_distance_accuracy,
    plot_loss_curve,
    plot_proxy_teacher,
    plot_reliability,
    plot_search,
)

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


@pytest.fixture
def ax():
    import matplotlib.pyplot as plt

    yield plt.subplots()[1]
    plt.close("all")


@pytest.fixture(scope="module")
def probs():
    return np.random.default_rng(0).dirichlet(np.ones(3), 200)


def lines(ax):
    return {line.get_label(): line.get_xydata() for line in ax.lines}


def searched(class_names):
    """Return what is drawn of a result, with a mean share for each class."""
    rng = np.random.default_rng(0)
    shares = {
        name: rng.dirichlet(np.ones(len(class_names)))
        for name in ("labels", "teacher", "corrected")
    }
    return types.SimpleNamespace(
        class_names=class_names, class_shares=shares, trials={}
    )


def test_loss_curve(ax):
    """Eq. 7 and its lowest point, the proxy teacher."""
    assert plot_loss_curve([0.5, 3.0], teacher_prob=0.6, ax=ax) is ax
    drawn = lines(ax)
    p = drawn["KL"][:, 0]
    kl = scipy.special.rel_entr(0.6, p) + scipy.special.rel_entr(0.4, 1 - p)
    s = 1 - p
    perturbed = kl + 0.6 * (0.5 * s + 3.0 * s**2) + 0.4 * (0.5 * p + 3.0 * p**2)
    np.testing.assert_allclose(drawn["KL"][:, 1], kl, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(drawn["PTLoss"][:, 1], perturbed, rtol=1e-4)
    [label] = (name for name in drawn if name.startswith("proxy"))
    [(x, y)] = drawn[label]
    lowest = perturbed.argmin()
    np.testing.assert_allclose(
        [x, y], [p[lowest], perturbed[lowest]], atol=5e-3
    )
    assert label == f"proxy teacher {x:.2f}"


def test_proxy_teacher(ax, probs):
    proxies = proxy_teacher(probs, [2.0, 0.5]).probabilities
    assert plot_proxy_teacher(probs, proxies, ax=ax) is ax
    for c in range(3):
        np.testing.assert_array_equal(
            lines(ax)[f"class {c}"], np.stack([probs, proxies], axis=2)[:, c]
        )


def test_reliability(ax, probs):
    """Bars are accuracies; the legend has the metric's value."""
    labels = np.random.default_rng(1).integers(0, 3, 200)
    plot_reliability(probs, labels, num_bins=10, ax=ax)
    bars = {round(bar.get_x() * 10): bar.get_height() for bar in ax.patches}
    confidence, correct = probs.max(axis=1), probs.argmax(axis=1) == labels
    for m in range(10):
        inside = (m / 10 < confidence) & (confidence <= (m + 1) / 10)
        assert (m in bars) == inside.any()
        if inside.any():
            np.testing.assert_allclose(bars[m], correct[inside].mean())
    metric = ExpectedCalibrationError(num_bins=10)
    metric.update_state(labels, probs.astype("float32"))
    text = ax.get_legend().get_texts()[0].get_text()
    assert text == f"accuracy (ECE {float(metric.result()):.3f})"


def test_reliability_at_the_edge_of_a_bin(ax):
    """0.6 in float32 is above 3/5: the bin may not depend on the dtype."""
    probs = np.tile([[0.6, 0.4]], (4, 1))
    plot_reliability(probs, [0, 0, 0, 1], num_bins=5, ax=ax)
    metric = ExpectedCalibrationError(num_bins=5)
    metric.update_state(np.array([0, 0, 0, 1]), probs.astype("float32"))
    [bar] = ax.patches
    filled = np.flatnonzero(keras.ops.convert_to_numpy(metric.gaps))
    assert round(bar.get_x() * 5) == filled[0]


def test_distance_accuracy(ax):
    plot_distance_accuracy([0.2, 0.5, 0.3, 0.9], [0.8, 0.6, 0.75, 0.3], ax=ax)
    assert ax.get_title() == "correlation -1.00"


def test_search(ax):
    """The best score so far, by order; order 0 is plain KL."""
    result = searched(("a", "b"))
    result.trials = {
        "order": [0, 1, 1, 1, 2, 2, 2],
        "score": [0.5, 0.9, 0.4, 0.6, 0.3, 0.7, 0.2],
        "best_of_order": [True, False, True, False, False, False, True],
    }
    plot_search(result, ax=ax)
    drawn = lines(ax)
    np.testing.assert_array_equal(
        drawn["order 1"], [[1, 0.9], [2, 0.4], [3, 0.4]]
    )
    np.testing.assert_array_equal(
        drawn["order 2"], [[1, 0.3], [2, 0.3], [3, 0.2]]
    )
    assert np.all(drawn["plain KL"][:, 1] == 0.5)
    assert all(tick == round(tick) for tick in ax.get_xticks())


def test_search_of_another_method(ax):
    with pytest.raises(ValueError, match="`result` must.*RandomSearch"):
        plot_search(searched(("a", "b")), ax=ax)


@pytest.mark.parametrize(
    "names",
    [
        ("no", "yes"),
        tuple(map(str, range(10))),
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog"),
        tuple(map(str, range(100))),
        tuple(f"name of class {c}" for c in range(100)),
    ],
)
def test_classes(names):
    """Ticks are classes with their names, and no two of them overlap."""
    result = searched(names)
    figure = matplotlib.figure.Figure(layout="constrained")
    ax = plot_classes(result, ax=figure.subplots())
    figure.canvas.draw()
    for tick, label in zip(ax.get_xticks(), ax.get_xticklabels(), strict=True):
        assert label.get_text() == names[int(tick)]
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    for left, right in zip(boxes[:-1], boxes[1:], strict=True):
        assert left.x1 <= right.x0
    legend = ax.get_legend().get_window_extent()
    assert legend.y0 >= ax.get_window_extent().y1
    heights = [bar.get_height() for bar in ax.patches[: len(names)]]
    np.testing.assert_allclose(heights, result.class_shares["labels"])


def test_long_class_names_leave_room_for_the_bars():
    names = [f"card_payment_wrong_exchange_rate_{c}_" * 3 for c in range(10)]
    figure = matplotlib.figure.Figure(layout="constrained")
    ax = plot_classes(searched(names), ax=figure.subplots())
    figure.canvas.draw()
    assert ax.get_window_extent().height > 0.4 * figure.bbox.height
    assert ax.get_xticklabels()[0].get_text() == "card_payment_wrong_exch…"


@pytest.mark.parametrize("bad", [[[2.0, -1.0]], [0.5, 0.5], [[0.3, 0.3]]])
def test_logits_are_refused(bad):
    with pytest.raises(ValueError, match="`probs` must be probabilities"):
        plot_reliability(bad, [0])


def test_makes_a_figure(ax):
    assert plot_distance_accuracy([1, 2], [2, 1]) is not ax
