"""What the plots draw: the data of lines and bars, not pixels."""

import functools
import subprocess
import sys
import types

import helpers
import keras
import numpy as np
import pytest

from keras_ptloss import ProxyTeacherSearch, proxy_teacher
from keras_ptloss.metrics import ExpectedCalibrationError
from keras_ptloss.plots import (
    plot_classes,
    plot_distance_accuracy,
    plot_loss_curve,
    plot_proxy_teacher,
    plot_reliability,
    plot_search,
)
from keras_ptloss.search import RandomSearch

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

BACKEND = keras.backend.backend()


@pytest.fixture
def ax():
    import matplotlib.pyplot as plt

    yield plt.subplots()[1]
    plt.close("all")


@pytest.fixture(scope="module")
def truth():
    return helpers.dirichlet(0, rows=200, classes=3)


@pytest.fixture(scope="module")
def labels(truth):
    return helpers.draw_labels(truth, seed=1)


@pytest.fixture(scope="module")
def random_search(truth, labels):
    search = ProxyTeacherSearch(RandomSearch(order=3, trials=20))
    return search.search(truth, labels)


def lines(ax):
    return {line.get_label(): line.get_xydata() for line in ax.lines}


class TestLossCurve:
    @pytest.mark.parametrize(
        "epsilon", [2.0, [0.5, -0.3, 3.0], [[2.0, 0.0], [0.0, 1.0]]]
    )
    def test_curves(self, ax, epsilon):
        assert plot_loss_curve(epsilon, teacher_prob=0.6, ax=ax) is ax
        drawn = lines(ax)
        for label, coefficients in (("KL", 0.0), ("PTLoss", epsilon)):
            p, loss = drawn[label].T
            student = np.stack([p, 1 - p], axis=1)
            teacher = np.broadcast_to([0.6, 0.4], student.shape)
            expected = helpers.pt_loss(teacher, student, coefficients)
            np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("epsilon", [2.0, [0.5, 3.0]])
    def test_mark_is_the_proxy_teacher(self, ax, epsilon):
        plot_loss_curve(epsilon, teacher_prob=0.6, ax=ax)
        drawn = lines(ax)
        (label,) = (name for name in drawn if name.startswith("proxy"))
        ((x, y),) = drawn[label]
        expected = proxy_teacher([[0.6, 0.4]], epsilon).probabilities[0, 0]
        np.testing.assert_allclose(x, expected)
        assert label == f"proxy teacher {expected:.2f}"
        # It is the minimum of what is drawn.
        curve = drawn["PTLoss"]
        assert y <= curve[:, 1].min() + 1e-6
        assert abs(x - curve[curve[:, 1].argmin(), 0]) <= 0.005

    def test_kl_is_least_at_the_teacher(self, ax):
        plot_loss_curve(2.0, teacher_prob=0.6, ax=ax)
        curve = lines(ax)["KL"]
        np.testing.assert_allclose(curve[curve[:, 1].argmin()], [0.6, 0.0],
                                   atol=1e-6)  # fmt: skip

    @pytest.mark.parametrize("teacher_prob", [0.0, 1.0, np.nan, "a", None])
    def test_error(self, teacher_prob):
        with pytest.raises(ValueError, match="`teacher_prob` must be above 0"):
            plot_loss_curve(1.0, teacher_prob)

    def test_epsilon_of_other_class_count(self):
        with pytest.raises(ValueError, match="`epsilon` must have one row"):
            plot_loss_curve(np.ones((3, 2)))


class TestProxyTeacher:
    def test_points(self, ax, truth):
        proxies = proxy_teacher(truth, [2.0, 0.5]).probabilities
        assert plot_proxy_teacher(truth, proxies, ax=ax) is ax
        drawn = lines(ax)
        for c in range(3):
            np.testing.assert_array_equal(
                drawn[f"class {c}"], np.stack([truth, proxies], axis=2)[:, c]
            )

    def test_diagonal(self, ax, truth):
        plot_proxy_teacher(truth, truth, ax=ax)
        np.testing.assert_array_equal(
            ax.lines[-1].get_xydata(), [[0, 0], [1, 1]]
        )

    def test_shapes_differ(self, truth):
        with pytest.raises(ValueError, match=r"same shape.*\(200, 3\) and"):
            plot_proxy_teacher(truth, truth[:10])

    @pytest.mark.parametrize(
        "bad", [[[2.0, -1.0]], [0.5, 0.5], [[0.3, 0.3]], [["a"]], [[1], []]]
    )
    def test_not_probabilities(self, bad):
        with pytest.raises(ValueError, match="`teacher_probs` must be prob"):
            plot_proxy_teacher(bad, [[0.5, 0.5]])


class TestReliability:
    @pytest.mark.parametrize("num_bins", [1, 10, 15])
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_bars(self, ax, truth, labels, num_bins, dtype):
        probs = truth.astype(dtype)
        assert plot_reliability(probs, labels, num_bins=num_bins, ax=ax) is ax
        bars = {round(bar.get_x() * num_bins): bar for bar in ax.patches}
        confidence = probs.max(axis=1)
        right = probs.argmax(axis=1) == labels
        for m in range(num_bins):
            inside = (m / num_bins < confidence) & (
                confidence <= (m + 1) / num_bins
            )
            assert (m in bars) == inside.any()
            if inside.any():
                np.testing.assert_allclose(
                    bars[m].get_height(), right[inside].mean()
                )

    def test_error_in_the_legend_is_the_metrics(self, ax, truth, labels):
        plot_reliability(truth, labels, num_bins=10, ax=ax)
        metric = ExpectedCalibrationError(num_bins=10)
        metric.update_state(labels, truth.astype("float32"))
        text = ax.get_legend().get_texts()[0].get_text()
        assert text == f"accuracy (ECE {float(metric.result()):.3f})"

    def test_edges_fall_as_in_the_metric(self, ax):
        """0.6 in float32 is above 3/5: the bin may not depend on the dtype."""
        probs, labels = np.tile([[0.6, 0.4]], (4, 1)), np.array([0, 0, 0, 1])
        plot_reliability(probs, labels, num_bins=5, ax=ax)
        metric = ExpectedCalibrationError(num_bins=5)
        metric.update_state(labels, probs.astype("float32"))
        (bar,) = ax.patches
        bins = np.flatnonzero(keras.ops.convert_to_numpy(metric.gaps))
        assert round(bar.get_x() * 5) == bins[0]

    def test_errors(self, truth, labels):
        with pytest.raises(ValueError, match="`probs` must be probabilities"):
            plot_reliability(10 * truth, labels)
        with pytest.raises(ValueError, match="`labels` must be in"):
            plot_reliability(truth, labels + 1)
        with pytest.raises(ValueError, match="`num_bins` must be an integer"):
            plot_reliability(truth, labels, num_bins=0)


class TestDistanceAccuracy:
    def test_points_and_correlation(self, ax):
        distances = [0.2, 0.5, 0.3, 0.9]
        accuracies = [0.8, 0.6, 0.75, 0.3]
        assert plot_distance_accuracy(distances, accuracies, ax=ax) is ax
        (line,) = ax.lines
        np.testing.assert_array_equal(
            line.get_xydata(), np.stack([distances, accuracies], axis=1)
        )
        expected = np.corrcoef(distances, accuracies)[0, 1]
        assert ax.get_title() == f"correlation {expected:.2f}"

    @pytest.mark.parametrize(
        "bad", [[0.5], [0.5, 0.5], [0.1, np.nan], [[0.1, 0.2]], [], "a", None]
    )
    def test_no_correlation(self, bad):
        with pytest.raises(ValueError, match="`distances` must be a vector"):
            plot_distance_accuracy(bad, [0.1, 0.2])
        with pytest.raises(ValueError, match="`accuracies` must be a vector"):
            plot_distance_accuracy([0.1, 0.2], bad)

    def test_lengths_differ(self):
        with pytest.raises(ValueError, match="same length. Received: 3 and 2"):
            plot_distance_accuracy([1, 2, 3], [1, 2])


class TestSearch:
    def test_best_so_far(self, ax, random_search):
        assert plot_search(random_search, ax=ax) is ax
        drawn = lines(ax)
        for order in (1, 2, 3):
            trials, best = drawn[f"order {order}"].T
            np.testing.assert_array_equal(trials, np.arange(1, 21))
            scores = random_search.trials["score"][20 * (order - 1) :]
            expected = [min(scores[:k]) for k in range(1, 21)]
            np.testing.assert_array_equal(best, expected)
        of_order = np.flatnonzero(random_search.trials["best_of_order"])
        for order, index in enumerate(of_order, 1):
            best = drawn[f"order {order}"][-1, 1]
            assert best == random_search.trials["score"][index]
        assert np.all(drawn["plain KL"][:, 1] == random_search.score_at_zero)
        assert ax.get_ylabel() == "best risk so far"

    def test_other_results(self, truth, labels):
        result = ProxyTeacherSearch("gradient").search(truth, labels)
        for bad in (result, result.trials):
            with pytest.raises(ValueError, match="`result`.*a RandomSearch"):
                plot_search(bad)


class TestClasses:
    @pytest.mark.parametrize("classes", [3, 8, 100])
    @pytest.mark.parametrize("width", [3.0, 6.4, 12.0])
    def test_legend_hides_nothing(self, classes, width):
        """It stands beside the axes, and within the figure."""
        shares = np.full(classes, 1 / classes)
        names = ("labels", "teacher", "corrected")
        result = types.SimpleNamespace(classes=dict.fromkeys(names, shares))
        figure = matplotlib.figure.Figure(figsize=(width, 3.0))
        ax = plot_classes(result, ax=figure.subplots())
        figure.canvas.draw()
        legend = ax.get_legend().get_window_extent()
        drawn = ax.get_window_extent()
        assert legend.y0 >= drawn.y1
        assert legend.x0 >= 0 and legend.x1 <= figure.bbox.x1
        assert legend.y1 <= figure.bbox.y1


class TestAxes:
    @pytest.mark.parametrize(
        "plot, arguments",
        [
            (plot_loss_curve, (1.0,)),
            (plot_proxy_teacher, ([[0.4, 0.6]], [[0.5, 0.5]])),
            (plot_reliability, ([[0.4, 0.6]], [1])),
            (plot_distance_accuracy, ([1, 2], [2, 1])),
        ],
    )
    def test_are_none(self, plot, arguments):
        with pytest.raises(ValueError, match="`ax` must be Matpl.*ax='x'"):
            plot(*arguments, ax="x")

    def test_of_a_result_are_none(self, random_search):
        for plot in (
            random_search.plot,
            functools.partial(plot_search, random_search),
        ):
            with pytest.raises(ValueError, match="`ax` must be Matpl.*ax='x'"):
                plot(ax="x")

    def test_makes_a_figure(self, ax):
        made = plot_distance_accuracy([1, 2], [2, 1])
        assert made is not ax

    def test_matplotlib_is_absent(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
        with pytest.raises(ImportError, match="pip install matplotlib"):
            plot_distance_accuracy([1, 2], [2, 1])

    def test_import_of_the_package_needs_none(self, tmp_path):
        absent = "import sys; sys.modules['matplotlib'] = None"
        subprocess.run(
            [sys.executable, "-c", f"{absent}; import keras_ptloss"],
            env={"KERAS_BACKEND": BACKEND, "PATH": "", "HOME": str(tmp_path)},
            capture_output=True,
            check=True,
        )
