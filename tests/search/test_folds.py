"""Cross-validation: repairs a planted bias, leaves a perfect teacher alone."""

import dataclasses
import warnings

import helpers
import numpy as np
import pytest

from keras_ptloss import ProxyTeacherSearch
from keras_ptloss.search import _folds
from keras_ptloss.search._folds import (
    PENALTIES,
    candidate_forms,
    choose,
    standard_error,
    stratified_folds,
)

ROWS, FRESH, CLASSES, ORDER = 300, 4000, 3, 2
COLUMNS = {
    "calibration",
    "shape",
    "order",
    "penalty",
    "parameters",
    "score",
    "gain",
    "standard_error",
    "chosen",
}


def search(teacher, labels, **arguments):
    arguments = {"objective": "nll", "order": ORDER, "folds": 2, **arguments}
    return ProxyTeacherSearch(
        method="gradient", selection="cross_validation", **arguments
    ).search(teacher, labels, verbose=False)


def make(seed, factors):
    truth = helpers.dirichlet(seed, ROWS + FRESH, CLASSES)
    teacher = helpers.skewed(truth, factors)
    return teacher, helpers.draw_labels(truth, seed + 100)


def fresh_gain(result, teacher, labels):
    """NLL of the teacher less the proxy's, on rows not searched; its s.e."""
    rows = slice(ROWS, None)
    q = result.proxy_teacher(teacher[rows]).probabilities
    at = (np.arange(FRESH), labels[rows])
    gain = np.log(q[at]) - np.log(teacher[rows][at])
    return gain.mean(), gain.std(ddof=1) / np.sqrt(FRESH)


@pytest.fixture(scope="module")
def biased():
    teacher, labels = make(0, [1.0, 0.3, 0.1])
    return teacher, labels, search(teacher[:ROWS], labels[:ROWS])


@pytest.fixture(scope="module")
def perfect():
    teacher, labels = make(1, [1.0, 1.0, 1.0])
    found = search(teacher[:ROWS], labels[:ROWS], order=1, folds=2)
    return teacher, labels, found


class TestChoice:
    def test_planted_bias_is_repaired(self, biased):
        teacher, labels, result = biased
        gain, error = fresh_gain(result, teacher, labels)
        assert gain > 0.05
        assert gain > 5 * error

    def test_accuracy_rises(self, biased):
        teacher, labels, result = biased
        q = result.proxy_teacher(teacher[ROWS:]).probabilities
        before = np.mean(teacher[ROWS:].argmax(1) == labels[ROWS:])
        after = np.mean(q.argmax(1) == labels[ROWS:])
        assert after > before + 0.02

    def test_perfect_teacher_is_not_made_worse(self, perfect):
        teacher, labels, result = perfect
        gain, error = fresh_gain(result, teacher, labels)
        assert gain >= -2 * error

    @pytest.mark.parametrize("kind", ["biased", "perfect"])
    def test_never_above_plain_kl_on_held_out_folds(self, request, kind):
        _, _, result = request.getfixturevalue(kind)
        trials = result.trials
        chosen = trials["chosen"].index(True)
        assert trials["score"][chosen] <= trials["score"][0]
        assert trials["gain"][chosen] >= 0

    def test_rule_of_one_standard_error(self, biased):
        """No admissible candidate has fewer parameters than the chosen."""
        trials = biased[2].trials
        chosen = trials["chosen"].index(True)
        best = int(np.argmin(trials["score"]))
        assert trials["parameters"][chosen] <= trials["parameters"][best]

    def test_deterministic(self, monkeypatch):
        # One penalty: a third of the candidates.
        monkeypatch.setattr(_folds, "PENALTIES", (0.1,))
        teacher, labels = make(0, [1.0, 0.3, 0.1])
        first, second = (
            search(teacher[:90], labels[:90], order=1, folds=2, seed=3)
            for _ in range(2)
        )
        assert first.trials == second.trials
        np.testing.assert_array_equal(first.epsilon, second.epsilon)


class TestColumns:
    def test_names_and_lengths(self, biased):
        trials = biased[2].trials
        assert set(trials) == COLUMNS
        assert {len(column) for column in trials.values()} == {
            len(candidate_forms(ORDER))
        }

    def test_one_is_chosen(self, biased):
        assert sum(biased[2].trials["chosen"]) == 1

    def test_first_is_plain_kl(self, biased):
        """Its held-out score: the NLL of the teacher itself, fold by fold."""
        teacher, labels, result = biased
        trials = result.trials
        assert trials["calibration"][0] == "none"
        assert trials["shape"][0] == "zero"
        assert trials["order"][0] == trials["parameters"][0] == 0
        assert trials["gain"][0] == trials["standard_error"][0] == 0
        fold = stratified_folds(labels[:ROWS], 2, 0)
        scores = [
            helpers.nll(teacher[:ROWS][fold == k], labels[:ROWS][fold == k])
            for k in range(2)
        ]
        np.testing.assert_allclose(trials["score"][0], np.mean(scores))

    def test_gain_is_over_plain_kl(self, biased):
        trials = biased[2].trials
        np.testing.assert_allclose(
            trials["gain"],
            trials["score"][0] - np.array(trials["score"]),
            atol=1e-12,
        )

    def test_data_frame(self, biased):
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame(biased[2].trials)
        assert len(frame) == len(candidate_forms(ORDER))

    def test_summary_names_the_choice(self, biased, capsys):
        biased[2].summary()
        text = capsys.readouterr().out
        assert "chosen" in text
        assert "below plain KL on held-out folds" in text

    def test_cost(self, biased):
        result = biased[2]
        assert result.unconverged == 0
        assert result.solves > ROWS
        assert result.seconds > 0

    def test_loss_carries_the_choice(self, biased):
        result = biased[2]
        config = result.loss(from_logits=True).get_config()
        assert config["epsilon"] == result.epsilon.tolist()
        np.testing.assert_array_equal(
            config["teacher_temperature"], result.teacher_temperature
        )


class TestCandidates:
    def test_forms(self):
        forms = candidate_forms(ORDER)
        # 3 calibrations x 3 shapes x 3 penalties; where there is nothing to
        # penalise (twice) once.
        assert len(forms) == 3 * 3 * len(PENALTIES) - 2 * (len(PENALTIES) - 1)
        rows = [dataclasses.astuple(form) for form in forms]
        assert len(set(rows)) == len(rows)


class TestFolds:
    LABELS = np.repeat([0, 1, 2], [40, 13, 4])

    @pytest.mark.parametrize("folds", [2, 3, 5])
    def test_stratified(self, folds):
        fold = stratified_folds(self.LABELS, folds, seed=0)
        for label in range(3):
            counts = np.bincount(fold[self.LABELS == label], minlength=folds)
            assert counts.max() - counts.min() <= 1
        sizes = np.bincount(fold, minlength=folds)
        assert sizes.max() - sizes.min() <= 1

    def test_deterministic(self):
        first, same, other = (
            stratified_folds(self.LABELS, 5, seed) for seed in (0, 0, 1)
        )
        np.testing.assert_array_equal(first, same)
        assert np.any(first != other)


def test_standard_error():
    scipy_stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).normal(size=(4, 7))
    np.testing.assert_allclose(
        standard_error(values), scipy_stats.sem(values, axis=-1)
    )


class TestFewRows:
    @pytest.mark.parametrize(
        "arguments", [{"per_class": True}, {"calibration": "vector"}]
    )
    def test_warns(self, arguments):
        teacher = helpers.dirichlet(0, 40, CLASSES)
        labels = np.repeat([0, 1, 2], [20, 17, 3])
        searcher = ProxyTeacherSearch(
            order=1, method="gradient", objective="brier", **arguments
        )
        match = r"1 of 3 classes have fewer than 10.*class 2 has 3"
        with pytest.warns(UserWarning, match=match) as record:
            searcher.search(teacher, labels)
        assert record[0].filename == __file__
        assert "raise `penalty`" in str(record[0].message)

    def test_advice_after_cross_validation(self):
        """Which it has just done: more labels are what remains."""
        teacher = helpers.dirichlet(0, 200, CLASSES)
        teacher = helpers.skewed(teacher, [1.0, 0.02, 0.02])
        labels = np.repeat([0, 1, 2], [105, 90, 5])
        with pytest.warns(UserWarning, match="class 2 has 5") as record:
            ProxyTeacherSearch(order=1).search(teacher, labels)
        assert record[0].filename == __file__
        assert str(record[0].message).endswith("Label more.")

    @pytest.mark.parametrize("calibration", ["none", "temperature"])
    def test_shared_parameters_do_not_warn(self, calibration):
        teacher = helpers.dirichlet(0, 40, CLASSES)
        labels = np.repeat([0, 1, 2], [20, 17, 3])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ProxyTeacherSearch(
                order=1, method="gradient", calibration=calibration
            ).search(teacher, labels)

    def test_folds_need_rows(self):
        teacher = helpers.dirichlet(0, 9, CLASSES)
        match = r"`folds` must be at most half the 9 examples.*folds=5"
        with pytest.raises(ValueError, match=match):
            search(teacher, np.arange(9) % 3, folds=5)


class TestChoose:
    """Scores of plain KL, of a simple and of a rich candidate, two folds."""

    parameters = np.array([0, 1, 9])

    def test_simple_within_a_standard_error(self):
        scores = np.array([[1.0, 1.0], [0.7, 0.8], [0.75, 0.7]])
        assert choose(scores, self.parameters) == 1

    def test_rich_where_it_is_clearly_better(self):
        scores = np.array([[1.0, 1.0], [0.9, 0.9], [0.5, 0.51]])
        assert choose(scores, self.parameters) == 2

    def test_plain_kl_within_a_standard_error(self):
        scores = np.array([[1.0, 1.0], [0.8, 1.1], [0.7, 1.2]])
        assert choose(scores, self.parameters) == 0

    def test_never_above_plain_kl(self):
        """However noisy: here the simple one is within its own error."""
        scores = np.array([[1.0, 1.0], [0.7, 1.4], [0.9, 0.9]])
        assert choose(scores, self.parameters) == 2
