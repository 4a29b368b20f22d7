"""Searches with several teachers, and with teachers of other classes."""

import helpers
import keras
import numpy as np
import pytest
import scipy.optimize

from keras_ptloss import ProxyTeacherSearch, SoftLabels
from keras_ptloss._teacher import read_labelled
from keras_ptloss.search import CalibrationSearch
from keras_ptloss.search._examples import Examples
from keras_ptloss.search._linear import fit_linear, fit_temperature
from keras_ptloss.search._objectives import OBJECTIVES
from keras_ptloss.search._stack import Stack

pytestmark = pytest.mark.newest

NLL = OBJECTIVES["nll"]
CLASSES, ROWS = 3, 400
# Each teacher is blind in its own place.
BLIND = [
    [[1.0, 0.0, 0.0], [0.7, 0.3, 0.0], [0.0, 0.0, 1.0]],
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.7, 0.3]],
]


def noisy(truth, confusion, seed):
    """What a confused teacher gives, with noise of its own in its logits."""
    t = truth @ np.asarray(confusion)
    noise = np.random.default_rng(seed).normal(size=t.shape)
    return helpers.softmax(np.log(np.maximum(t, 1e-6)) + 0.5 * noise)


@pytest.fixture(scope="module")
def problem():
    """Two teachers and labels: the first half to search, the other to judge."""
    truth = helpers.dirichlet(0, 2 * ROWS, CLASSES, 0.3)
    teachers = [noisy(truth, m, seed) for seed, m in enumerate(BLIND)]
    labels = helpers.draw_labels(truth, 1)
    return (
        [t[:ROWS] for t in teachers],
        labels[:ROWS],
        [t[ROWS:] for t in teachers],
        labels[ROWS:],
    )


def fine(seed, rows):
    """A teacher of 5 classes of which 0, 1 and 2, 3 are the same of 3."""
    truth = helpers.dirichlet(seed, rows, 5, 0.3)
    of_fine = np.array([0, 0, 1, 1, 2])
    return truth, of_fine[helpers.draw_labels(truth, seed + 1)]


def stack_of(teachers, labels, classes=None):
    read = read_labelled(teachers, labels, classes=classes)
    return Stack.of(Examples.of(read), NLL)


class TestFit:
    @pytest.mark.parametrize("counts", ["alike", "other"])
    @pytest.mark.parametrize("penalty", [0.1, 3.0])
    def test_is_the_optimum(self, problem, counts, penalty):
        """Against SciPy's BFGS on the formula, with its own differences."""
        teachers, labels = [t[:100] for t in problem[0]], problem[1][:100]
        if counts == "other":
            teachers[1] = fine(0, 100)[0]
        z = [np.log(np.maximum(t, 1e-7)) for t in teachers]
        stack = stack_of(teachers, labels, CLASSES)
        found = stack.fit("matrix", penalty).calibration
        eye, alike = np.eye(CLASSES), [True, counts == "alike"]
        starts, units, weights = [], [], []
        for x, same in zip(z, alike, strict=True):
            s = fit_temperature(x, labels, NLL) if same else 0.0
            width = x.shape[1]
            start = s / sum(alike) * eye if same else np.zeros((3, width))
            starts.append(start)
            spread = np.mean([np.std(row) for row in x])
            units.append(max(s, 1.0 / spread))
            off = (CLASSES - 1) * (1 - eye) + eye
            weights.append(off if same else np.full((3, width), width))
        width = sum(x.shape[1] for x in z)

        def loss(vector):
            d = vector[: 3 * width].reshape(3, width)
            b = vector[3 * width :]
            moved, ridge, first = b, np.sum(b * b), 0
            for x, a, u, w in zip(z, starts, units, weights, strict=True):
                part = d[:, first : first + x.shape[1]]
                first += x.shape[1]
                moved = moved + x @ (a + u * part).T
                ridge += 2 * np.sum(w * part * part)
            nll = helpers.nll(helpers.softmax(moved), labels)
            return nll + penalty * CLASSES / len(labels) * ridge

        best = scipy.optimize.minimize(loss, np.zeros(3 * width + 3))
        scale = np.repeat(units, [x.shape[1] for x in z])
        d = (found.scale - np.concatenate(starts, axis=1)) / scale
        vector = np.concatenate([d.ravel(), found.bias])
        assert loss(vector) <= best.fun + 1e-5

    @pytest.mark.parametrize("calibration", ["vector", "matrix"])
    @pytest.mark.parametrize("penalty", [0.1, 1.0])
    def test_a_teacher_given_twice_is_as_given_once(
        self, problem, calibration, penalty
    ):
        teacher, labels = problem[0][0], problem[1]
        z = np.log(np.maximum(teacher, 1e-7))
        once = fit_linear(
            z,
            labels,
            NLL,
            calibration=calibration,
            penalty=penalty,
            scale=fit_temperature(z, labels, NLL),
        ).calibration
        stack = stack_of([teacher, teacher], labels)
        twice = stack.fit(calibration, penalty).calibration
        np.testing.assert_allclose(
            twice(np.tile(z, 2), from_logits=True),
            once(z, from_logits=True),
            atol=2e-3,
        )

    def test_pool_leaves_out_a_teacher_that_knows_nothing(self, problem):
        nothing = helpers.dirichlet(9, ROWS, CLASSES)
        labels = problem[1]
        stack = stack_of([problem[0][0], nothing], labels)
        weights = stack.pool()
        z = np.log(problem[0][0])
        alone = fit_temperature(z, labels, NLL)
        assert weights[0] == pytest.approx(alone, rel=0.05)
        assert 0.0 <= weights[1] < 0.1

    def test_pool_is_the_optimum(self, problem):
        z = [np.log(np.maximum(t, 1e-7)) for t in problem[0]]
        labels = problem[1]
        found = stack_of(problem[0], labels).pool()
        best = scipy.optimize.minimize(
            lambda a: helpers.nll(
                helpers.softmax(a[0] * z[0] + a[1] * z[1]), labels
            ),
            [0.5, 0.5],
            method="Nelder-Mead",
        )
        np.testing.assert_allclose(found, best.x, atol=2e-3)


class TestSearch:
    def test_together_beyond_the_best_alone(self, problem):
        teachers, labels, others, judged = problem
        result = ProxyTeacherSearch().search(teachers, labels)
        q = result.proxy_teacher(others).probabilities
        alone = [
            ProxyTeacherSearch().search(t, labels).proxy_teacher(o)
            for t, o in zip(teachers, others, strict=True)
        ]
        best = min(helpers.nll(a.probabilities, judged) for a in alone)
        mean = helpers.nll(np.mean(others, axis=0), judged)
        assert helpers.nll(q, judged) < min(best, mean) - 0.02
        assert result.correction.teachers == (3, 3)
        assert result.trials["chosen"].count(True) == 1

    def test_scores(self, problem):
        teachers, labels = problem[:2]
        result = ProxyTeacherSearch().search(teachers, labels)
        q = result.proxy_teacher(np.concatenate(teachers, 1)).probabilities
        assert result.score == pytest.approx(helpers.nll(q, labels))
        product = np.sqrt(teachers[0] * teachers[1])
        product /= product.sum(axis=1, keepdims=True)
        assert result.score_at_zero == pytest.approx(
            helpers.nll(product, labels), abs=1e-5
        )
        text = str(result)
        assert "the teachers' mean" in text
        assert "teachers 3 classes" in text

    def test_nearly_perfect_teachers_are_left_in_peace(self):
        """No candidate of many numbers makes good teachers worse."""
        truth = helpers.dirichlet(0, 4 * ROWS, CLASSES, 0.02)
        teachers = [noisy(truth, np.eye(3), seed) for seed in (1, 2)]
        labels = helpers.draw_labels(truth, 3)
        few = [t[:ROWS] for t in teachers]
        result = ProxyTeacherSearch().search(few, labels[:ROWS])
        rest = [t[ROWS:] for t in teachers]
        q = result.proxy_teacher(rest).probabilities
        mean = np.mean(rest, axis=0)
        behind = helpers.nll(q, labels[ROWS:]) - helpers.nll(
            mean, labels[ROWS:]
        )
        assert behind < 0.01

    def test_other_classes(self):
        rows, labels = fine(0, 1000)
        search = ProxyTeacherSearch()
        result = search.search(rows[:500], labels[:500], classes=CLASSES)
        q = result.proxy_teacher(rows[500:]).probabilities
        assert q.shape == (500, 3)
        best = np.stack(
            [rows[:, :2].sum(1), rows[:, 2:4].sum(1), rows[:, 4]], axis=1
        )[500:]
        assert np.mean(q.argmax(1) == best.argmax(1)) > 0.75
        frequencies = np.bincount(labels[:500]) / 500
        constant = np.tile(frequencies, (500, 1))
        judged = labels[500:]
        gap = helpers.nll(constant, judged) - helpers.nll(best, judged)
        gain = helpers.nll(constant, judged) - helpers.nll(q, judged)
        # A sum of classes is no linear map of their logarithms.
        assert gain > 0.6 * gap
        assert "the labels' frequencies" in str(result)
        assert result.correction.teachers == (5,)

    def test_one_of_other_classes_helps(self, problem):
        teachers, labels, others, judged = problem
        # Told apart by the second teacher: what the first one confuses.
        two = [np.stack([t[:, 1], 1 - t[:, 1]], 1) for t in (teachers[1],)]
        two_others = np.stack([others[1][:, 1], 1 - others[1][:, 1]], 1)
        search = ProxyTeacherSearch()
        alone = search.search(teachers[0], labels).proxy_teacher(others[0])
        both = search.search([teachers[0], *two], labels, classes=CLASSES)
        q = both.proxy_teacher([others[0], two_others]).probabilities
        assert (
            helpers.nll(q, judged)
            < helpers.nll(alone.probabilities, judged) - 0.02
        )

    def test_an_uninformative_teacher_of_other_classes(self, problem):
        """Noise is not taken for more than the labels' frequencies."""
        rng = np.random.default_rng(5)
        rows, labels = rng.dirichlet(np.ones(4), 600), rng.integers(0, 3, 600)
        search = ProxyTeacherSearch()
        result = search.search(rows, labels, classes=3)
        assert result.trials["calibration"][0] == "none"
        assert result.trials["chosen"][0]
        q = result.proxy_teacher(rows[:5]).probabilities
        frequencies = (np.bincount(labels) + 1) / 603
        np.testing.assert_allclose(q, np.tile(frequencies, (5, 1)))

    @pytest.mark.parametrize("calibration", ["temperature", "vector", "matrix"])
    def test_calibration_search(self, problem, calibration):
        teachers, labels = problem[:2]
        search = ProxyTeacherSearch(CalibrationSearch(calibration))
        result = search.search(teachers, labels)
        q = result.proxy_teacher(teachers).probabilities
        assert result.score == pytest.approx(helpers.nll(q, labels))
        assert result.score < result.score_at_zero
        blocks = result.correction.scale.reshape(3, 2, 3).swapaxes(0, 1)
        off = blocks[:, ~np.eye(3, dtype=bool)]
        assert np.any(off) == (calibration == "matrix")

    @pytest.mark.parametrize("seed", [20, 48, 61, 62])
    @pytest.mark.parametrize("objective", ["nll", "brier"])
    @pytest.mark.parametrize("calibration", ["vector", "matrix"])
    def test_never_worse_than_the_teachers_as_they_are(
        self, calibration, objective, seed
    ):
        """A strong ridge holds a fit where it begins, which is not there."""
        rng = np.random.default_rng(seed)
        truth = helpers.dirichlet(seed, 60, 3, 0.5)
        labels = helpers.draw_labels(truth, seed + 1)
        power, factors = rng.uniform(0.3, 3), rng.uniform(0.3, 1, 3)
        one = helpers.skewed(truth**power, factors)
        other = 0.7 * one + 0.3 * one[::-1]
        method = CalibrationSearch(calibration, penalty=1000.0)
        search = ProxyTeacherSearch(method, objective=objective)
        found = search.search([one, other], labels)
        assert found.score <= found.score_at_zero + 1e-12

    def test_logits_and_probabilities_are_the_same_teacher(self, problem):
        teachers, labels = problem[:2]
        logits = np.log(teachers[0]) + 7.0
        search = ProxyTeacherSearch(CalibrationSearch("matrix"))
        one = search.search(teachers, labels)
        two = search.search(
            [logits, teachers[1]], labels, from_logits=[True, False]
        )
        assert two.correction.teacher_from_logits == (True, False)
        np.testing.assert_allclose(
            one.correction.scale, two.correction.scale, atol=1e-6
        )

    def test_sequences_and_ignored_labels(self, problem):
        teachers, labels = problem[:2]
        search = ProxyTeacherSearch(CalibrationSearch("matrix"))
        plain = search.search([t[:200] for t in teachers], labels[:200])
        marked = np.where(np.arange(ROWS) < 200, labels, -1)
        shaped = [t.reshape(100, 4, 3) for t in teachers]
        result = search.search(shaped, marked.reshape(100, 4), ignore_class=-1)
        np.testing.assert_allclose(
            plain.correction.scale, result.correction.scale
        )

    @pytest.mark.filterwarnings("ignore:.*worse than a constant")
    def test_a_class_without_labels_keeps_its_share(self, problem):
        teachers, labels = problem[:2]
        kept = labels != 2
        with pytest.warns(UserWarning, match="fewer than 10"):
            result = ProxyTeacherSearch(CalibrationSearch("matrix")).search(
                [t[kept] for t in teachers], labels[kept]
            )
        q = result.proxy_teacher([t[kept] for t in teachers]).probabilities
        assert q[:, 2].mean() > 0.02

    def test_list_of_one_is_that_teacher(self, problem):
        search = ProxyTeacherSearch(CalibrationSearch("matrix"))
        result = search.search(problem[0][:1], problem[1])
        assert result.correction.teachers is None

    def test_note_names_the_teacher(self, problem):
        teachers, labels = problem[:2]
        turned = teachers[1][:, [1, 2, 0]]
        search = ProxyTeacherSearch(CalibrationSearch("matrix"))
        with pytest.warns(UserWarning, match=r"teacher\[1\]: the teacher"):
            search.search([teachers[0], turned], labels)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(60, 5)).astype("float32")


@pytest.fixture(scope="module")
def models():
    return [
        helpers.linear_model(3, seed=1, activation="softmax"),
        helpers.linear_model(3, seed=2),
    ]


@pytest.fixture(scope="module")
def labels(x):
    return np.argmax(x[:, :3], axis=1)


@pytest.mark.filterwarnings("ignore:.*(worse than a constant|permuted)")
class TestTeachers:
    """Models, arrays and stored labels, in one list."""

    def test_of_all_kinds(self, x, models, labels, tmp_path):
        stored = SoftLabels.write(models[0], x, tmp_path / "s", verbose=0)
        outputs = [model.predict(x, verbose=0) for model in models]
        search = ProxyTeacherSearch(CalibrationSearch("matrix"))
        flags = [False, True, False]
        mixed = search.search(
            [models[0], models[1], stored],
            labels,
            inputs=x,
            from_logits=[None, True, None],
        )
        arrays = search.search(
            [*outputs, np.asarray(stored)], labels, from_logits=flags
        )
        np.testing.assert_allclose(
            mixed.correction.scale, arrays.correction.scale, atol=1e-5
        )
        assert mixed.correction.teacher_from_logits == tuple(flags)

    def test_data_set(self, x, models, labels):
        class Batches(keras.utils.PyDataset):
            def __len__(self):
                return 3

            def __getitem__(self, i):
                part = slice(20 * i, 20 * i + 20)
                return x[part], labels[part]

        search = ProxyTeacherSearch(CalibrationSearch("matrix"))
        arguments = {"from_logits": [False, True]}
        one = search.search(models, Batches(), **arguments)
        two = search.search(models, labels, inputs=x, **arguments)
        np.testing.assert_allclose(
            one.correction.scale, two.correction.scale, atol=1e-4
        )

    def test_proxy_model(self, x, models, labels, tmp_path):
        search = ProxyTeacherSearch(CalibrationSearch("matrix"))
        result = search.search(
            models, labels, inputs=x, from_logits=[False, True]
        )
        proxy = result.proxy_model(models)
        outputs = [model.predict(x, verbose=0) for model in models]
        np.testing.assert_allclose(
            proxy.predict(x, verbose=0),
            result.proxy_teacher(outputs).probabilities,
            rtol=1e-3,
            atol=1e-6,
        )
        proxy.save(tmp_path / "proxy.keras")
        again = keras.saving.load_model(tmp_path / "proxy.keras")
        np.testing.assert_allclose(
            again.predict(x, verbose=0), proxy.predict(x, verbose=0), rtol=1e-6
        )
        with pytest.raises(ValueError, match="outputs of 2 teachers"):
            result.proxy_model(models[0])
        with pytest.raises(ValueError, match="must be False for a model"):
            result.proxy_model([models[0], models[0]])


class TestErrors:
    def test_classes_must_be_said(self, problem):
        teachers = [problem[0][0], np.full((ROWS, 5), 0.2)]
        match = "`classes` must say.*with teachers of 3, 5 classes"
        with pytest.raises(ValueError, match=match):
            ProxyTeacherSearch().search(teachers, problem[1])

    def test_label_outside_of_the_classes(self, problem):
        match = r"`labels` must be in \[0, 2\), the classes.*=2"
        with pytest.raises(ValueError, match=match):
            ProxyTeacherSearch().search(*problem[:2], classes=2)

    def test_label_outside_hints_at_classes(self, problem):
        with pytest.raises(ValueError, match="`classes` says how many"):
            ProxyTeacherSearch().search(problem[0][0], problem[1] + 1)

    @pytest.mark.parametrize("classes", [1, 2.5, "3"])
    def test_classes(self, problem, classes):
        with pytest.raises(ValueError, match="`classes` must be an integer"):
            ProxyTeacherSearch().search(*problem[:2], classes=classes)

    @pytest.mark.parametrize("method", ["random", "gradient"])
    def test_methods_of_one_teacher(self, problem, method):
        match = f"`teacher` must be one teacher.*method='{method}'.*3, 3"
        with pytest.raises(ValueError, match=match):
            ProxyTeacherSearch(method).search(*problem[:2])

    @pytest.mark.parametrize("method", ["random", "gradient"])
    def test_methods_of_one_teacher_ask_none_of_several(self, problem, method):
        asked = []

        class Asked(keras.Model):
            def call(self, x):
                asked.append(x)
                return x

        with pytest.raises(ValueError, match="`teacher` must be one teacher"):
            ProxyTeacherSearch(method).search(
                [Asked(), Asked()], problem[1], inputs=problem[0][0]
            )
        assert not asked

    @pytest.mark.parametrize("method", ["random", "gradient"])
    def test_methods_of_the_labels_classes(self, problem, method):
        match = "must be one teacher.*teachers of 3 classes, with labels of 4"
        with pytest.raises(ValueError, match=match):
            ProxyTeacherSearch(method).search(
                problem[0][0], problem[1], classes=4
            )

    def test_missing_answers(self, problem):
        teachers = [problem[0][0], problem[0][1].copy()]
        teachers[1][[3, 7]] = np.nan
        match = r"`teacher\[1\]` must answer.*NaN in 2 of 400.*\[1\]\[3\]"
        with pytest.raises(ValueError, match=match):
            ProxyTeacherSearch().search(teachers, problem[1])

    def test_other_number_of_examples(self, problem):
        teachers = [problem[0][0], problem[0][1][:-1]]
        with pytest.raises(ValueError, match=r"`teacher\[1\]` must be of the"):
            ProxyTeacherSearch().search(teachers, problem[1])

    def test_logits_name_the_teacher(self, problem):
        teachers = [problem[0][0], np.log(problem[0][1])]
        with pytest.raises(ValueError, match=r"`teacher\[1\]` must hold"):
            ProxyTeacherSearch().search(teachers, problem[1])

    def test_flags(self, problem):
        match = "`from_logits` must be one flag, or one for each of 2"
        with pytest.raises(ValueError, match=match):
            ProxyTeacherSearch().search(*problem[:2], from_logits=[True])

    def test_stored_outputs_beside_a_data_set(self, problem):
        models = [helpers.linear_model(3), problem[0][0]]
        with pytest.raises(ValueError, match="models stand beside stored"):
            ProxyTeacherSearch().search(models, iter([]))

    def test_temperature_of_other_classes(self):
        rows, labels = fine(0, 100)
        search = ProxyTeacherSearch(CalibrationSearch("temperature"))
        with pytest.raises(ValueError, match='`calibration` must be "matrix"'):
            search.search(rows, labels, classes=3)

    def test_one_searched_two_given(self, problem):
        search = ProxyTeacherSearch(CalibrationSearch("matrix"))
        result = search.search(problem[0][0], problem[1])
        two = [helpers.linear_model(3), helpers.linear_model(3)]
        with pytest.raises(ValueError, match="the one teacher that was"):
            result.proxy_model(two)
