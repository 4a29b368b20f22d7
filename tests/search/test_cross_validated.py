"""Cross-validation: repairs what is planted, leaves a perfect teacher alone."""

import warnings

import helpers
import numpy as np
import pytest
import scipy.special

from keras_ptloss import ProxyTeacherSearch
from keras_ptloss.search import (
    CalibrationSearch,
    CrossValidatedSearch,
    GradientSearch,
)
from keras_ptloss.search._folds import (
    choose,
    parts_of,
    random_folds,
    standard_error,
)
from keras_ptloss.search._objectives import OBJECTIVES, as_objective, nll
from keras_ptloss.search._progress import Progress
from keras_ptloss.search._standings import PENALTIES, Candidate, Standings

pytestmark = pytest.mark.newest

ROWS, FRESH, CLASSES, ORDER = 300, 4000, 3, 2
COLUMNS = {
    "calibration",
    "epsilon",
    "penalty",
    "parameters",
    "score",
    "gain",
    "standard_error",
    "chosen",
}


def search(teacher, labels, *, objective=None, seed=0, **arguments):
    method = CrossValidatedSearch(**{"order": ORDER, "folds": 3, **arguments})
    return ProxyTeacherSearch(method, objective=objective, seed=seed).search(
        teacher, labels, verbose=False
    )


def make(seed, factors):
    truth = helpers.dirichlet(seed, ROWS + FRESH, CLASSES)
    teacher = helpers.skewed(truth, factors)
    return teacher, helpers.draw_labels(truth, seed + 100)


def fresh_gain(result, teacher, labels, rows=ROWS):
    """NLL of the teacher less the corrected one's, on rows not searched."""
    held_out = slice(rows, None)
    q = result.proxy_teacher(teacher[held_out]).probabilities
    at = (np.arange(len(q)), labels[held_out])
    gain = np.log(np.maximum(q[at], 1e-7))
    gain -= np.log(np.maximum(teacher[held_out][at], 1e-7))
    return gain.mean(), gain.std(ddof=1) / np.sqrt(len(gain))


@pytest.fixture(scope="module")
def biased():
    teacher, labels = make(0, [1.0, 0.3, 0.1])
    return teacher, labels, search(teacher[:ROWS], labels[:ROWS])


@pytest.fixture(scope="module")
def perfect():
    teacher, labels = make(1, [1.0, 1.0, 1.0])
    return teacher, labels, search(teacher[:ROWS], labels[:ROWS], order=1)


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
    def test_rule_of_one_standard_error(self, request, kind):
        """No kind with fewer parameters is within an error of the best."""
        trials = request.getfixturevalue(kind)[2].trials
        chosen = trials["chosen"].index(True)
        best = int(np.argmin(trials["score"]))
        assert trials["parameters"][chosen] <= trials["parameters"][best]

    def test_deterministic(self):
        teacher, labels = make(0, [1.0, 0.3, 0.1])
        first, second = (
            search(teacher[:90], labels[:90], order=1, folds=2, seed=3)
            for _ in range(2)
        )
        assert first.trials == second.trials
        np.testing.assert_array_equal(
            first.correction.scale, second.correction.scale
        )

    @pytest.mark.parametrize("objective", ["risk", "brier"])
    def test_other_objectives(self, objective):
        teacher, labels = make(0, [1.0, 0.3, 0.1])
        result = search(
            teacher[:ROWS], labels[:ROWS], objective=objective, folds=2
        )
        assert result.score < result.score_at_zero
        gain = fresh_gain(result, teacher, labels)
        assert objective == "risk" or gain[0] > 0.05


LABELLED = {
    "unbiased": 500,
    "confused": 500,
    "over-confident": 500,
    "nearly perfect": 1000,
}


def softmax_teacher(kind, classes, seed):
    """A teacher of one kind, and labels drawn from the truth."""
    rng = np.random.default_rng(seed)
    rows = LABELLED[kind] + FRESH
    if kind == "nearly perfect":  # on 98 to 98.5 % of the rows
        labels = rng.integers(0, classes, rows)
        shift = {2: 3.1, 3: 3.4, 10: 3.9, 50: 4.3}[classes]
        logits = rng.normal(size=(rows, classes))
        logits[np.arange(rows), labels] += shift
        truth = scipy.special.softmax(shift * logits, axis=1)
        return (
            scipy.special.softmax(1.5 * shift * logits, axis=1),
            labels,
            truth,
        )
    truth = scipy.special.softmax(2 * rng.normal(size=(rows, classes)), axis=1)
    labels = helpers.draw_labels(truth, seed + 1)
    teacher = truth
    if kind == "confused":
        mix = rng.dirichlet(np.full(classes, 0.3), classes)
        teacher = truth @ (0.5 * np.eye(classes) + 0.5 * mix)
    if kind == "over-confident":
        teacher = truth**3 / np.sum(truth**3, axis=1, keepdims=True)
    return teacher, labels, truth


@pytest.mark.parametrize("classes", [2, 3, 10, 50])
@pytest.mark.parametrize("kind", LABELLED)
def test_never_worse_than_plain_kl_and_temperature(kind, classes):
    """The promise, on rows that the search has not seen."""
    teacher, labels, truth = softmax_teacher(kind, classes, seed=classes)
    n = LABELLED[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes with few labels
        chosen = search(teacher[:n], labels[:n], order=3, folds=5)
        temperature = ProxyTeacherSearch(
            CalibrationSearch("temperature")
        ).search(teacher[:n], labels[:n])
    # Against the truth itself, not against drawn labels: little noise.
    truth, rows = truth[n:], teacher[n:]

    def cross_entropy(q):
        return -np.sum(truth * np.log(np.maximum(q, 1e-7)), axis=1)

    own = cross_entropy(chosen.proxy_teacher(rows).probabilities)
    for rival in (rows, temperature.proxy_teacher(rows).probabilities):
        theirs = cross_entropy(rival)
        # What a temperature's own fit to as many labels may cost; of a small
        # loss, a share of it.
        assert np.mean(own - theirs) < min(0.01, 0.15 * np.mean(theirs))
    if kind == "confused" and classes in (3, 10):
        assert np.mean(own) < np.mean(cross_entropy(rows)) - 0.02


class TestColumns:
    def test_names_and_lengths(self, biased):
        trials = biased[2].trials
        assert set(trials) == COLUMNS
        assert len({len(column) for column in trials.values()}) == 1

    def test_one_is_chosen(self, biased):
        assert sum(biased[2].trials["chosen"]) == 1

    def test_candidates(self, biased):
        """All kinds stand, penalties from the strongest on."""
        trials = biased[2].trials
        kinds = list(zip(trials["epsilon"], trials["calibration"], strict=True))
        assert set(kinds) == {
            ("zero", "none"),
            *((e, c) for e in ("zero", "shared") for c in LADDERS),
        }
        of_matrix = [
            penalty
            for kind, penalty in zip(kinds, trials["penalty"], strict=True)
            if kind == ("zero", "matrix")
        ]
        assert of_matrix == list(PENALTIES[: len(of_matrix)])

    def test_first_is_plain_kl(self, biased):
        """Its held-out score: the NLL of the teacher itself."""
        teacher, labels, result = biased
        trials = result.trials
        assert trials["calibration"][0] == "none"
        assert trials["epsilon"][0] == "zero"
        assert trials["parameters"][0] == 0
        assert trials["gain"][0] == trials["standard_error"][0] == 0
        np.testing.assert_allclose(
            trials["score"][0], helpers.nll(teacher[:ROWS], labels[:ROWS])
        )

    def test_gain_is_over_plain_kl(self, biased):
        trials = biased[2].trials
        np.testing.assert_allclose(
            trials["gain"],
            trials["score"][0] - np.array(trials["score"]),
            atol=1e-12,
        )

    def test_parameters(self, biased):
        trials = biased[2].trials
        expected = {
            ("zero", "temperature"): 1,
            ("shared", "temperature"): 1 + ORDER,
            ("zero", "vector"): 7,
            ("shared", "matrix"): 13 + ORDER,
        }
        for e, c, count in zip(
            trials["epsilon"],
            trials["calibration"],
            trials["parameters"],
            strict=True,
        ):
            assert expected.get((e, c), count) == count

    def test_data_frame(self, biased):
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame(biased[2].trials)
        assert frame["gain"].max() > 0.05

    def test_summary_names_the_choice(self, biased, capsys):
        biased[2].summary()
        text = capsys.readouterr().out
        assert "chosen" in text
        assert "below plain KL, held out" in text

    def test_cost(self, biased):
        result = biased[2]
        assert result.unconverged == 0
        assert result.solves > ROWS
        assert result.seconds > 0


LADDERS = ("temperature", "vector", "matrix")


def test_a_matrix_too_large_is_left_out():
    teacher = helpers.dirichlet(0, 40, 60)
    labels = helpers.draw_labels(teacher, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = search(teacher, labels, order=1, folds=2)
    assert "matrix" not in result.trials["calibration"]
    assert any("60 x 60" in note for note in result.notes)
    assert "40 examples are too few" in str(result)


class TestFolds:
    @pytest.mark.parametrize("folds", [2, 3, 5])
    def test_sizes(self, folds):
        fold = random_folds(57, folds, seed=0)
        sizes = np.bincount(fold, minlength=folds)
        assert sizes.max() - sizes.min() <= 1

    def test_deterministic(self):
        first, same, other = (random_folds(57, 5, s) for s in (0, 0, 1))
        np.testing.assert_array_equal(first, same)
        assert np.any(first != other)

    def test_folds_need_rows(self):
        teacher = helpers.dirichlet(0, 9, CLASSES)
        match = r"`folds` must be at most half the 9 examples.*folds=5"
        with pytest.raises(ValueError, match=match):
            search(teacher, np.arange(9) % 3, folds=5)


class TestParts:
    @pytest.mark.parametrize(
        ("examples", "deals"), [(10, 5), (100, 3), (299, 2), (300, 1)]
    )
    def test_few_rows_are_dealt_out_again(self, examples, deals):
        parts = parts_of(examples, 5, seed=0)
        assert len(parts) == 5 * deals
        held_out = [test for _, test in parts]
        for deal in range(deals):
            once = np.concatenate(held_out[5 * deal : 5 * deal + 5])
            np.testing.assert_array_equal(np.sort(once), np.arange(examples))
        for train, test in parts:
            both = np.sort(np.concatenate([train, test]))
            np.testing.assert_array_equal(both, np.arange(examples))
        assert deals == 1 or np.any(held_out[0] != held_out[5])

    def test_losses_are_means_over_the_deals(self):
        q, labels = helpers.dirichlet(0, 20, CLASSES), np.arange(20) % CLASSES
        parts = parts_of(20, 4, seed=0)
        for name in ("nll", "own"):
            standings = Standings(
                OBJECTIVES["nll"]
                if name == "nll"
                else as_objective(lambda q, y: (nll(q, y), q)),
                labels,
                parts,
                Progress(verbose=False),
                most=1,
            )
            held_out = [q[test] for _, test in parts]
            mean = standings.add(Candidate("zero", "none"), 0, held_out)
            assert mean == pytest.approx(nll(q, labels))
            assert len(standings.losses[0]) == (20 if name == "nll" else 4)


class TestTeacherWithoutAnError:
    """Each row would have it as sharp as can be, whatever the next one says."""

    @pytest.mark.parametrize("rows", [40, 100])
    def test_is_left_as_it_is(self, rows):
        generator = np.random.default_rng(0)
        labels = generator.integers(3, size=rows)
        teacher = (
            0.02 * helpers.dirichlet(1, rows, 3) + 0.98 * np.eye(3)[labels]
        )
        result = search(teacher, labels)
        proxy = result.proxy_teacher(teacher).probabilities
        np.testing.assert_allclose(proxy, teacher, rtol=1e-12)
        assert any("cannot tell what to" in note for note in result.notes)

    def test_a_timid_one_is_sharpened(self):
        """Of 100 rows 30 errors were due, and none was seen."""
        labels = np.arange(100) % 3
        teacher = np.full((100, 3), 0.15) + 0.55 * np.eye(3)[labels]
        result = search(teacher, labels)
        assert result.score < 0.5 * result.score_at_zero

    def test_one_error_is_enough(self):
        labels = np.arange(60) % 3
        teacher = np.full((60, 3), 0.1) + 0.7 * np.eye(3)[labels]
        teacher[0] = [0.2, 0.7, 0.1]
        result = search(teacher, labels)
        assert result.score < result.score_at_zero
        assert not any("cannot tell" in note for note in result.notes)


def test_standard_error():
    scipy_stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).normal(size=(4, 7))
    np.testing.assert_allclose(
        standard_error(values), scipy_stats.sem(values, axis=-1)
    )


class TestFewRows:
    @staticmethod
    def data():
        truth = helpers.dirichlet(0, 200, CLASSES)
        teacher = helpers.skewed(truth, [1.0, 1.0, 0.02])
        labels = helpers.draw_labels(teacher, 3)
        return teacher, labels, np.sum(labels == 2)

    @pytest.mark.parametrize(
        "method",
        [
            GradientSearch(order=1, per_class=True, penalty=0.1),
            GradientSearch(order=1, calibration="vector", penalty=0.1),
            CalibrationSearch("matrix"),
        ],
    )
    def test_warns(self, method):
        teacher, labels, count = self.data()
        searcher = ProxyTeacherSearch(method, objective="brier")
        match = rf"1 of 3 classes have fewer than 10.*class 2 has {count}"
        with pytest.warns(UserWarning, match=match) as record:
            result = searcher.search(teacher, labels)
        few = record[0]
        assert few.filename == __file__
        assert "raise `penalty`" in str(few.message)
        assert str(few.message) in result.notes

    @pytest.mark.parametrize(
        ("method", "gain"),
        [(CalibrationSearch("temperature"), 0.02), (GradientSearch(), 0.005)],
    )
    def test_shared_parameters_are_fitted_to_all_labels(self, method, gain):
        """Of 60 classes most are rare: they tell of a temperature, too."""
        truth = helpers.dirichlet(0, 200, 60)
        teacher = truth**1.5 / np.sum(truth**1.5, axis=1, keepdims=True)
        labels = helpers.draw_labels(truth, 1)
        searcher = ProxyTeacherSearch(method, objective="nll")
        result = searcher.search(teacher, labels, verbose=False)
        assert result.score < result.score_at_zero - gain

    @pytest.mark.parametrize("calibration", ["none", "temperature"])
    def test_shared_parameters_do_not_warn(self, calibration):
        teacher, labels, count = self.data()
        assert 0 < count < 10
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ProxyTeacherSearch(
                GradientSearch(order=1, calibration=calibration)
            ).search(teacher, labels)


class TestChoose:
    """Losses of plain KL, of a simple and of a rich kind, four examples."""

    kinds = np.array(["none", "simple", "rich"])
    parameters = np.array([0, 1, 9])

    def choose(self, *losses):
        return choose(np.array(losses), self.kinds, self.parameters)

    def test_simple_within_a_standard_error(self):
        losses = [1.0] * 4, [0.7, 0.8, 0.7, 0.7], [0.8, 0.6, 0.7, 0.7]
        assert self.choose(*losses) == 1

    def test_rich_where_it_is_clearly_better(self):
        assert self.choose([1.0] * 4, [0.9] * 4, [0.5, 0.5, 0.5, 0.6]) == 2

    def test_plain_kl_within_a_standard_error(self):
        losses = [1.0] * 4, [0.8, 1.1, 0.8, 1.1], [0.7, 1.2, 0.7, 1.3]
        assert self.choose(*losses) == 0

    def test_a_kind_stands_with_its_best_penalty(self):
        losses = np.array([[1.0] * 4, [0.9] * 4, [0.6] * 4, [0.5, 0.7] * 2])
        kinds = np.array(["none", "vector", "vector", "matrix"])
        assert choose(losses, kinds, np.array([0, 3, 3, 9])) == 2
