"""SearchResult: its numbers by NumPy, its texts, its file."""

import json

import helpers
import keras
import numpy as np
import pytest

from keras_ptloss import Correction, ProxyTeacherSearch, PTLoss, SearchResult
from keras_ptloss.losses import CorrectedKLDivergence
from keras_ptloss.search import Found

ROWS, CLASSES = 300, 3
STEP_1 = "temperature and epsilon"


class Returns:
    """A method that finds what it is told."""

    name = "returns"

    def __init__(self, found):
        self.found = found

    def run(self, examples, progress):
        return self.found


@pytest.fixture(scope="module")
def data():
    """A teacher that is biased to its first class."""
    truth = helpers.dirichlet(0, ROWS, CLASSES, 0.5)
    teacher = helpers.skewed(truth, [1.0, 0.3, 0.1])
    return teacher, helpers.draw_labels(truth, seed=1)


BIAS = np.log([1.0, 3.0, 10.0])
TRIALS = {"nll": [0.9, 0.8], "epsilon": [np.zeros(1), np.ones(1)]}


def found(data, chosen="corrected", **keywords):
    """Candidates, with probabilities that stand for those of two splits."""
    teacher, _ = data
    candidates = {
        "teacher": Correction(),
        STEP_1: Correction(0.2, 1.3),
        "corrected": Correction(0.2, 1.3, bias=BIAS),
    }
    out_of_fold = {
        name: np.stack(
            [a * correction.correct(teacher) + (1 - a) / 3 for a in (0.9, 0.7)]
        )
        for name, correction in candidates.items()
    }
    return Found(
        **{
            "correction": candidates[chosen],
            "trials": TRIALS,
            "out_of_fold": out_of_fold,
            "chosen": chosen,
            **keywords,
        }
    )


def search(data, what, **keywords):
    return ProxyTeacherSearch(Returns(what)).search(*data, **keywords)


@pytest.fixture(scope="module")
def result(data):
    return search(data, found(data), class_names=["cat", "dog", "owl"])


def ece(probs, labels, weights=None):
    """Fifteen bins of the confidence, one by one."""
    weights = np.ones(len(labels)) if weights is None else weights
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == labels
    total = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        inside |= (low > 0.93) & (confidence == 1.0)
        gap = weights[inside] @ (right[inside] - confidence[inside])
        total += abs(gap) / weights.sum()
    return total


class TestNumbers:
    def test_out_of_fold(self, data, result):
        teacher, labels = data
        probs = {**found(data).out_of_fold, "teacher": teacher[None]}
        assert list(result.scores) == ["teacher", STEP_1, "corrected"]
        for name, splits in probs.items():
            row = result.scores[name]
            nlls = [helpers.nll(p, labels) for p in splits]
            assert row["nll"] == pytest.approx(np.mean(nlls))
            right = np.mean(splits.argmax(axis=-1) == labels)
            assert row["accuracy"] == pytest.approx(right)
            eces = [ece(p, labels) for p in splits]
            assert row["ece"] == pytest.approx(np.mean(eces))
        assert result.score == result.scores["corrected"]["nll"]
        assert result.baseline_score == result.scores["teacher"]["nll"]
        q = probs["corrected"][:, np.arange(ROWS), labels]
        assert result.losses == pytest.approx(-np.log(q).mean(axis=0))
        assert result.out_of_fold
        shares = result.class_shares
        counts = np.bincount(labels) / ROWS
        assert shares["labels"] == pytest.approx(counts)
        assert shares["teacher"] == pytest.approx(teacher.mean(axis=0))
        corrected = probs["corrected"].mean(axis=(0, 1))
        assert shares["corrected"] == pytest.approx(corrected)

    def test_fitted(self, data):
        """Without folds they are those of the rows that were fitted."""
        teacher, labels = data
        what = found(data, out_of_fold={})
        result = search(data, what)
        q = what.correction.correct(teacher)
        assert list(result.scores) == ["teacher", "corrected"]
        assert result.score == pytest.approx(helpers.nll(q, labels))
        assert not result.out_of_fold

    def test_weights(self, data):
        teacher, labels = data
        weights = np.random.default_rng(0).uniform(0.1, 5.0, ROWS)
        result = search(data, found(data), sample_weight=weights)
        own = -np.log(teacher[np.arange(ROWS), labels])
        expected = np.average(own, weights=weights)
        assert result.baseline_score == pytest.approx(expected)
        assert result.scores["teacher"]["ece"] == pytest.approx(
            ece(teacher, labels, weights)
        )
        shares = np.bincount(labels, weights) / weights.sum()
        assert result.class_shares["labels"] == pytest.approx(shares)

    def test_several_teachers(self, data):
        """The best of those with the labels' classes is the baseline."""
        teacher, labels = data
        flat = (teacher + 1.0) / 4.0
        two = helpers.dirichlet(3, ROWS, 2)
        correction = Correction(
            temperature=(2.0, 2.0, np.inf), teacher_classes=(3, 3, 2)
        )
        result = ProxyTeacherSearch(Returns(Found(correction, TRIALS))).search(
            [flat, teacher, two], labels, num_classes=3
        )
        nlls = [helpers.nll(t, labels) for t in (flat, teacher)]
        assert result.baseline_score == pytest.approx(min(nlls))
        best = f"teacher {int(np.argmin(nlls))}, the best"
        assert list(result.scores) == [best, "corrected"]
        logs = np.log(flat) + np.log(np.maximum(teacher, 1e-7))
        mean = helpers.softmax(logs / 2)
        assert result.correct([flat, teacher, two]) == pytest.approx(mean)
        assert result.temperature == (2.0, 2.0, np.inf)

    def test_no_teacher_has_the_classes(self, data):
        """Then the shares of the labels are, by Laplace's rule."""
        two, labels = helpers.dirichlet(3, ROWS, 2), data[1]
        correction = Correction(temperature=np.inf, matrix=np.ones((3, 2)))
        result = ProxyTeacherSearch(Returns(Found(correction, TRIALS))).search(
            two, labels, num_classes=3
        )
        shares = (np.bincount(labels) + 1.0) / (ROWS + 3.0)
        expected = -np.log(shares[labels]).mean()
        assert result.baseline_score == pytest.approx(expected)


class TestVerdict:
    def test_more_are_right(self, data, result):
        teacher, labels = data
        before = 100 * np.mean(teacher.argmax(axis=1) == labels)
        right = found(data).out_of_fold["corrected"].argmax(axis=-1) == labels
        right = right.mean(axis=0)
        error = 100 * right.std() / np.sqrt(ROWS)
        assert result.verdict == (
            f"Out of fold on your 300 labels, {100 * right.mean():.1f} % "
            f"(± {error:.1f}) are right instead of {before:.1f} %."
        )

    def test_confidence_alone(self, data):
        teacher, labels = data
        result = search(data, found(data, chosen=STEP_1))
        nlls = [
            -np.log(p[..., np.arange(ROWS), labels])
            for p in (teacher, found(data).out_of_fold[STEP_1])
        ]
        gain = nlls[0] - nlls[1].mean(axis=0)
        mean, error = abs(gain.mean()), gain.std() / np.sqrt(ROWS)
        word = "lower" if gain.mean() > 0 else "higher"
        assert result.verdict.startswith(
            "Out of fold on your 300 labels, the NLL is "
            f"{mean:.3f} (± {error:.3f}) {word}"
        )
        assert result.verdict.endswith("are right as before.")

    def test_nothing_better(self, data):
        result = search(data, found(data, chosen="teacher"))
        assert result.verdict == (
            "The teacher could not be improved with these 300 labels; use it "
            "as it is."
        )
        assert result.score == result.baseline_score
        assert result.correct(data[0]) == pytest.approx(data[0])

    def test_one_of_several_teachers(self, data):
        teacher, labels = data
        what = Found(
            Correction(temperature=(1.0, np.inf), teacher_classes=(3, 3)),
            TRIALS,
            {"teacher 0": teacher[None], "teacher 1": teacher[None, ::-1]},
            "teacher 0",
        )
        result = ProxyTeacherSearch(Returns(what)).search(
            [teacher, teacher[::-1]], labels
        )
        assert result.verdict == (
            "The teachers could not be improved with these 300 labels; use "
            "teacher 0, the best, as it is."
        )
        assert list(result.scores) == [result.chosen] == ["teacher 0, the best"]

    def test_fitted_numbers_are_marked(self, data):
        result = search(data, found(data, out_of_fold={}))
        text = repr(result)
        assert text.startswith("On the 300 labels that were fitted, ")
        assert "NLL*" in text
        assert "accuracy*" in text
        assert "* on the labels that were fitted" in text
        assert "*" not in repr(search(data, found(data)))


class TestText:
    def test_summary_prints_it(self, result, capsys):
        assert result.summary() is None
        text = capsys.readouterr().out
        assert text.strip() == repr(result) == str(result)
        for expected in ("cat", "owl", "<- chosen", "epsilon [0.2], temperat"):
            assert expected in text

    def test_one_screen(self):
        """With 150 classes, long names and many notes."""
        classes = 150
        truth = helpers.dirichlet(0, ROWS, classes)
        labels = helpers.draw_labels(truth, 0)
        what = Found(
            Correction(bias=np.linspace(0.0, 3.0, classes)),
            TRIALS,
            notes=("something to know " * 20,) * 2,
        )
        names = [f"{c}_is_a_class_with_a_very_long_name" for c in range(150)]
        with pytest.warns(UserWarning):
            result = search((truth, labels), what, class_names=names)
        lines = repr(result).splitlines()
        assert len(lines) <= 40
        assert max(map(len, lines)) <= 120
        assert "(the 10 of 150 classes that change most)" in lines
        assert any(
            line.startswith("149_is_a_class_with_a_v…") for line in lines
        )

    def test_plot(self, result):
        pytest.importorskip("matplotlib").use("agg")
        import matplotlib.pyplot as plt

        ax = result.plot()
        heights = [bar.get_height() for bar in ax.containers[2]]
        assert heights == pytest.approx(result.class_shares["corrected"])
        assert result.plot(ax=ax) is ax
        plt.close("all")


class TestUse:
    def test_loss_of_a_live_teacher(self, data, result):
        loss = result.loss(from_logits=True, name="mine")
        assert isinstance(loss, CorrectedKLDivergence)
        assert loss.name == "mine"
        logits = np.zeros((ROWS, CLASSES), "float32")
        q = result.correct(data[0])
        expected = np.mean(np.sum(q * np.log(q), axis=1) + np.log(CLASSES))
        found = float(loss(data[0].astype("float32"), logits))
        assert found == pytest.approx(expected, rel=1e-5)

    def test_step_1_as_pt_loss(self, data):
        """PTLoss with epsilon and temperature ends at the same teacher."""
        result = search(data, found(data, chosen=STEP_1))
        loss = PTLoss(
            result.epsilon,
            teacher_temperature=result.temperature,
            reduction="none",
        )
        teacher = data[0][:20].astype("float32")
        q = result.correct(teacher).astype("float32")
        best = keras.ops.convert_to_numpy(loss(teacher, q))
        for seed in range(5):
            other = 0.97 * q + 0.03 * helpers.dirichlet(seed, 20, CLASSES)
            values = keras.ops.convert_to_numpy(loss(teacher, other))
            assert (values > best - 1e-6).all()

    def test_file(self, data, result, tmp_path):
        result.save(tmp_path / "result.json")
        json.loads((tmp_path / "result.json").read_text())
        loaded = SearchResult.load(tmp_path / "result.json")
        assert repr(loaded) == repr(result)
        assert loaded.correction == result.correction
        assert loaded.notes == result.notes
        assert loaded.trials["nll"] == TRIALS["nll"]
        assert loaded.correct(data[0]) == pytest.approx(result.correct(data[0]))
