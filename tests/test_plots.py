"""What the plots draw: the data of lines and bars, not pixels."""

import types

import keras
import numpy as np
import pytest

from keras_ptloss.metrics import ExpectedCalibrationError
from keras_ptloss.plots import plot_classes, plot_reliability

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


def test_reliability(ax, probs):
    """Bars are accuracies; the legend has the metric's value."""
    labels = np.random.default_rng(1).integers(0, 3, 200)
    assert plot_reliability(probs, labels, num_bins=10, ax=ax) is ax
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
    filled = np.flatnonzero(keras.ops.convert_to_numpy(metric.sums))
    assert round(bar.get_x() * 5) == filled[0]


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


def test_logits_are_refused():
    with pytest.raises(ValueError, match="`probs` must hold probabilities"):
        plot_reliability([[2.0, -1.0]], [0])


def test_makes_a_figure(ax, probs):
    assert plot_reliability(probs, np.zeros(200)) is not ax
