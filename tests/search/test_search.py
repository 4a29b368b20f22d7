"""ProxyTeacherSearch: Algorithm 1 redone in NumPy, and what surrounds it."""

import dataclasses
import re
import warnings

import helpers
import keras
import numpy as np
import pytest

from keras_ptloss import (
    Distiller,
    ProxyTeacherSearch,
    PTLoss,
    SoftLabels,
    proxy_teacher,
)
from keras_ptloss.layers import CorrectedTeacher
from keras_ptloss.losses import ProxyKLDivergence
from keras_ptloss.search import (
    CalibrationSearch,
    CrossValidatedSearch,
    GradientSearch,
    RandomSearch,
)
from keras_ptloss.search._objectives import OBJECTIVES, brier_derivative
from keras_ptloss.search._progress import Progress
from keras_ptloss.soft_labels import SoftLabelSpec

ROWS, CLASSES = 60, 3


class OnlyRuns:
    """Has no objective, and all else that a way to search says of itself."""

    def run(self, examples, objective, **arguments):
        raise NotImplementedError


@pytest.fixture(scope="module")
def data():
    """A teacher biased towards the first class, and labels of the truth."""
    truth = helpers.dirichlet(0, ROWS, CLASSES)
    teacher = helpers.skewed(truth, [1.0, 0.4, 0.2])
    return teacher, helpers.draw_labels(truth, seed=1)


def run(data, *, objective=None, seed=0, **arguments):
    """Algorithm 1, on few trials unless more are asked for."""
    method = RandomSearch(**{"order": 2, "trials": 8, **arguments})
    search = ProxyTeacherSearch(method, objective=objective, seed=seed)
    return search.search(*data, verbose=False)


def run_gradient(data, *, objective="nll", seed=0, **arguments):
    method = GradientSearch(**{"order": 2, "per_class": True, **arguments})
    search = ProxyTeacherSearch(method, objective=objective, seed=seed)
    return search.search(*data, verbose=False)


def small_random_search(**arguments):
    return ProxyTeacherSearch(
        RandomSearch(**{"order": 2, "trials": 5, **arguments})
    )


@pytest.fixture(scope="module")
def result(data):
    return run(data, order=3, trials=20, objective="nll", seed=1)


@pytest.fixture(scope="module")
def vector(data):
    return run_gradient(data, calibration="vector", penalty=0.01)


def algorithm_1(teacher, labels, score, *, order, trials, space, seed, rows):
    """The paper's loop over orders and draws; one proxy at a time."""
    generator = np.random.default_rng(seed)
    scores, epsilons, unconverged = [], [], []
    for m in range(1, order + 1):
        draws = generator.uniform(*space, size=(trials, *rows, m))
        for epsilon in draws:
            solved = proxy_teacher(teacher, epsilon)
            scores.append(score(solved.probabilities, labels))
            epsilons.append(epsilon)
            unconverged.append(np.count_nonzero(~solved.converged))
    return scores, epsilons, unconverged


class TestAlgorithm1:
    @pytest.mark.parametrize("per_class", [False, True])
    @pytest.mark.parametrize("objective", ["risk", "nll"])
    @pytest.mark.parametrize("space", [(-1.0, 10.0), (-0.3, 2.0)])
    def test_redone_in_numpy(self, data, per_class, objective, space):
        order, trials, seed = 3, 10, 7
        found = run(
            data,
            order=order,
            trials=trials,
            space=space,
            per_class=per_class,
            objective=objective,
            seed=seed,
        )
        scores, epsilons, unconverged = algorithm_1(
            *data,
            getattr(helpers, objective),
            order=order,
            trials=trials,
            space=space,
            seed=seed,
            rows=(CLASSES,) if per_class else (),
        )
        np.testing.assert_allclose(found.trials["score"], scores, atol=1e-8)
        assert found.trials["unconverged"] == unconverged
        for ours, theirs in zip(found.trials["epsilon"], epsilons, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-8)
        best_of_order = [
            m * trials + int(np.argmin(scores[m * trials : (m + 1) * trials]))
            for m in range(order)
        ]
        assert np.flatnonzero(found.trials["best_of_order"]).tolist() == (
            best_of_order
        )
        at_zero = getattr(helpers, objective)(*data)
        np.testing.assert_allclose(found.score_at_zero, at_zero, atol=1e-8)
        np.testing.assert_allclose(
            found.score, min([*scores, at_zero]), atol=1e-8
        )
        if min(scores) < at_zero:
            best = int(np.argmin(scores))
            np.testing.assert_allclose(found.epsilon, epsilons[best], atol=1e-8)

    def test_more_trials_than_a_block(self, data):
        """Trials are solved some at a time; the draws do not show it."""
        many = np.tile(data[0], (40, 1)), np.tile(data[1], 40)
        found = run(many, order=2, trials=6, seed=2)
        few = run(data, order=2, trials=6, seed=2)
        np.testing.assert_allclose(
            found.trials["score"], few.trials["score"], rtol=1e-9
        )

    def test_deterministic(self, data):
        first, second = run(data, seed=3), run(data, seed=3)
        np.testing.assert_array_equal(first.epsilon, second.epsilon)
        assert first.trials["score"] == second.trials["score"]

    def test_seeds_differ(self, data):
        first, second = run(data, seed=3), run(data, seed=4)
        assert first.trials["score"] != second.trials["score"]

    def test_draws_lie_in_the_space(self, data):
        found = run(data, space=(2.0, 3.0), trials=20)
        drawn = np.concatenate(found.trials["epsilon"])
        assert drawn.min() >= 2.0
        assert drawn.max() <= 3.0

    def test_lower_order_is_not_padded(self, data):
        found = run(data, order=3, trials=4)
        lengths = [len(epsilon) for epsilon in found.trials["epsilon"]]
        assert lengths == [1] * 4 + [2] * 4 + [3] * 4
        assert found.trials["order"] == lengths

    def test_fsolve(self, data):
        teacher, labels = data[0][:12], data[1][:12]
        arguments = {"trials": 3, "space": (-0.2, 1.0), "seed": 5}
        newton = run((teacher, labels), **arguments)
        fsolve = run((teacher, labels), solver="fsolve", **arguments)
        assert fsolve.unconverged == 0
        np.testing.assert_allclose(
            fsolve.trials["score"], newton.trials["score"], atol=1e-6
        )
        np.testing.assert_array_equal(fsolve.epsilon, newton.epsilon)

    def test_zero_is_kept_when_nothing_is_better(self, data):
        """A teacher that is right about all labels cannot be beaten."""
        one_hot = np.eye(CLASSES)[data[1]]
        found = run((one_hot, data[1]))
        np.testing.assert_array_equal(found.epsilon, 0.0)
        assert found.score == found.score_at_zero == 0.0
        assert "this is plain KL" in str(found)

    def test_cost(self, data):
        found = run(data, order=3, trials=5)
        assert found.solves == 15 * ROWS
        assert found.seconds > 0
        assert found.unconverged == sum(found.trials["unconverged"])
        assert found.method == "random"
        assert found.objective == "risk"


class TestPerClass:
    def test_random(self, data):
        found = run(data, per_class=True, trials=30, objective="nll")
        shapes = {epsilon.shape for epsilon in found.trials["epsilon"]}
        assert shapes == {(CLASSES, 1), (CLASSES, 2)}
        assert found.epsilon.shape in shapes

    @pytest.mark.parametrize("per_class", [False, True])
    def test_gradient(self, data, per_class):
        found = run_gradient(data, per_class=per_class)
        assert found.epsilon.shape == ((CLASSES, 2) if per_class else (2,))


class TestGradient:
    @pytest.mark.parametrize("objective", sorted(OBJECTIVES))
    def test_score_is_that_of_the_proxy(self, data, objective):
        teacher, labels = data
        found = run_gradient(data, objective=objective)
        q = proxy_teacher(teacher, found.epsilon).probabilities
        np.testing.assert_allclose(
            found.score, OBJECTIVES[objective].score(q, labels)
        )
        assert found.score < found.score_at_zero
        assert found.method == "gradient"
        assert found.trials["score"] == pytest.approx([found.score])
        assert found.unconverged == 0
        assert found.solves % ROWS == 0

    def test_beats_random_draws(self, data):
        """Inside the region where it searches."""
        gradient = run_gradient(data, per_class=False)
        random = run(data, space=(-0.5, 10.0), trials=50, objective="nll")
        assert gradient.score <= random.score + 1e-6

    def test_calibrations_are_nested(self, data):
        scores = [
            run_gradient(data, calibration=calibration, per_class=False).score
            for calibration in ("none", "temperature", "vector")
        ]
        assert scores[0] >= scores[1] - 1e-6 >= scores[2] - 2e-6

    @pytest.mark.filterwarnings("ignore:the teacher is worse")
    @pytest.mark.parametrize("margin", [None, 25.0])
    @pytest.mark.parametrize("calibration", ["temperature", "vector"])
    def test_a_teacher_that_is_surely_wrong(self, calibration, margin):
        """Its wrong rows are at the floor of the NLL, where no slope is."""
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 3, 300)
        wrong = rng.random(300) < 0.2
        teacher = np.eye(3)[np.where(wrong, (labels + 1) % 3, labels)]
        if margin is not None:
            teacher = margin * teacher + 0.1 * rng.normal(size=(300, 3))
        method = GradientSearch(order=2, calibration=calibration)
        found = ProxyTeacherSearch(method).search(
            teacher, labels, from_logits=margin is not None
        )
        # What the best of two numbers, of the right ones and the others, gives.
        share = wrong.mean()
        best = -share * np.log(share / 2) - (1 - share) * np.log(1 - share)
        assert found.score < best + 0.01 < found.score_at_zero

    @pytest.mark.filterwarnings("ignore:the teacher is worse")
    def test_says_that_it_did_not_move(self):
        labels = np.arange(300) % 3
        teacher = np.eye(3)[np.where(np.arange(300) < 60, 0, labels)]
        found = run_gradient((teacher, labels))
        assert not found.epsilon.any()
        assert any("stayed at 0" in note for note in found.notes)

    @pytest.mark.parametrize("per_class", [False, True])
    def test_matrix_first(self, data, per_class):
        """The matrix alone, then epsilon of the teacher that it makes."""
        teacher, labels = data
        search = CalibrationSearch("matrix", penalty=0.3)
        matrix = ProxyTeacherSearch(search).search(teacher, labels)
        after = matrix.correction.proxy(teacher).probabilities
        epsilon = run_gradient((after, labels), per_class=per_class).epsilon
        found = run_gradient(data, calibration=search, per_class=per_class)
        for name in ("scale", "bias"):
            np.testing.assert_array_equal(
                getattr(found.correction, name),
                getattr(matrix.correction, name),
            )
        np.testing.assert_allclose(found.epsilon, epsilon, atol=1e-6)
        assert np.any(epsilon != 0)
        assert found.score < matrix.score < found.score_at_zero
        assert type(found.correction.loss()) is PTLoss

    def test_matrix_by_name(self, data):
        by_name = run_gradient(data, calibration="matrix")
        named = run_gradient(data, calibration=CalibrationSearch("matrix"))
        assert by_name.correction == named.correction

    def test_temperature_is_a_number(self, data):
        found = run_gradient(data, calibration="temperature").correction
        assert found.scale.shape == found.bias.shape == ()
        assert found.bias == 0.0

    def test_vector_is_one_a_class(self, vector):
        assert vector.correction.scale.shape == (CLASSES,)
        assert vector.correction.bias.shape == (CLASSES,)

    def test_deterministic(self, data):
        first, second = (run_gradient(data, starts=2, seed=5) for _ in range(2))
        np.testing.assert_array_equal(first.epsilon, second.epsilon)


class TestTeacherForms:
    def test_logits_are_their_softmax(self, data):
        logits = np.log(data[0]) + 3.0
        found = small_random_search().search(logits, data[1], from_logits=True)
        assert found.correction.teacher_from_logits
        np.testing.assert_allclose(
            found.trials["score"], run(data, trials=5).trials["score"]
        )

    @pytest.mark.filterwarnings("ignore:the teacher")
    @pytest.mark.parametrize("from_logits", [False, True])
    def test_keras_model(self, data, from_logits):
        keras.utils.set_random_seed(0)
        x = np.random.default_rng(0).normal(size=(ROWS, 4)).astype("float32")
        activation = None if from_logits else "softmax"
        model = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(CLASSES, activation=activation),
                keras.layers.Dropout(0.5),
            ]
        )
        searcher = small_random_search()
        found = searcher.search(
            model, data[1], inputs=x, from_logits=from_logits
        )
        expected = searcher.search(
            model.predict(x, verbose=0), data[1], from_logits=from_logits
        )
        assert found.trials["score"] == expected.trials["score"]

    def test_soft_labels_say_what_they_are(self, data, tmp_path):
        store = SoftLabels.write(
            lambda rows: np.log(np.asarray(rows)),
            data[0],
            tmp_path / "api.softlabels",
            spec=SoftLabelSpec(from_logits=True, dtype="float32"),
            verbose=0,
        )
        searcher = small_random_search(order=1, trials=2)
        found = searcher.search(store, data[1])
        assert found.correction.teacher_from_logits
        with pytest.raises(ValueError, match="`from_logits` must be True, as"):
            searcher.search(store, data[1], from_logits=False)

    def test_probabilities_are_no_logits(self, data):
        searcher = small_random_search(order=1, trials=2)
        with pytest.raises(ValueError, match="`from_logits` must be False for"):
            searcher.search(*data, from_logits=True)
        model = keras.Sequential([keras.layers.Dense(3, "softmax")])
        with pytest.raises(ValueError, match="ends in a softmax"):
            searcher.search(
                model, data[1], inputs=np.ones((ROWS, 2)), from_logits=True
            )

    def test_column_of_labels(self, data):
        found = run((data[0], data[1][:, None]))
        assert found.score == run(data).score


class TestResult:
    def test_frozen(self, result):
        with pytest.raises(dataclasses.FrozenInstanceError):
            result.score = 0.0

    def test_epsilon_goes_into_pt_loss(self, result):
        np.testing.assert_array_equal(
            PTLoss(result.epsilon).epsilon, result.epsilon
        )

    @pytest.mark.parametrize("from_logits", [False, True])
    def test_loss(self, vector, from_logits):
        """With an epsilon it leads to the proxy itself."""
        loss = vector.loss(
            from_logits=from_logits, reduction="sum", name="mine"
        )
        assert isinstance(loss, ProxyKLDivergence)
        config = loss.get_config()
        assert config["correction"]["config"] == vector.correction.get_config()
        assert config["from_logits"] is from_logits
        assert config["reduction"] == "sum"
        assert config["name"] == "mine"

    def test_loss_without_epsilon(self, data):
        """A PTLoss of epsilon 0: KL to the calibrated teacher."""
        found = ProxyTeacherSearch(CalibrationSearch("vector")).search(
            *data, verbose=False
        )
        loss = found.loss(from_logits=True, reduction="none")
        assert isinstance(loss, PTLoss)
        logits = np.random.default_rng(0).normal(size=data[0].shape)
        correction = found.correction
        teacher = helpers.softmax(
            np.log(data[0]) * correction.scale + correction.bias
        )
        np.testing.assert_allclose(
            np.asarray(loss(data[0].astype("float32"), logits)),
            helpers.pt_loss_of_logits(teacher, logits, 0.0),
            rtol=1e-4,
            atol=1e-6,
        )

    def test_loss_knows_that_the_teacher_gave_logits(self, data):
        found = small_random_search(order=1, trials=2).search(
            np.log(data[0]), data[1], from_logits=True
        )
        loss = found.loss()
        assert loss.correction.teacher_from_logits
        assert not loss.from_logits

    @pytest.mark.parametrize("kind", ["result", "vector"])
    def test_proxy_teacher_is_the_optimum_of_the_loss(
        self, request, data, kind
    ):
        """The gradient on the student's logits vanishes there."""
        found = request.getfixturevalue(kind)
        q = found.proxy_teacher(data[0]).probabilities
        loss = found.loss(from_logits=True, reduction=None)
        assert np.any(np.abs(q - data[0]) > 1e-2)
        teacher = data[0].astype("float32")
        at_optimum = loss(teacher, np.log(q).astype("float32"))
        gradient = helpers.gradient_of(
            lambda z: loss(teacher, z), np.log(q).astype("float32")
        )
        np.testing.assert_allclose(gradient, 0.0, atol=1e-5)
        for seed in range(3):
            noise = np.random.default_rng(seed).normal(0, 0.1, q.shape)
            moved = loss(teacher, (np.log(q) + noise).astype("float32"))
            assert np.all(np.asarray(moved) >= np.asarray(at_optimum) - 1e-6)

    def test_proxy_teacher_reproduces_the_score(self, data, vector):
        q = vector.proxy_teacher(data[0]).probabilities
        np.testing.assert_allclose(vector.score, helpers.nll(q, data[1]))

    def test_proxy_teacher_of_logits(self, data):
        searcher = ProxyTeacherSearch(
            GradientSearch(order=2, calibration="vector")
        )
        logits = 2.0 * np.log(data[0])
        found = searcher.search(logits, data[1], from_logits=True)
        calibrated = helpers.calibrate(
            logits, 1.0 / found.correction.scale, found.correction.bias
        )
        np.testing.assert_allclose(
            found.proxy_teacher(logits).probabilities,
            proxy_teacher(calibrated, found.epsilon).probabilities,
            atol=1e-10,
        )

    @pytest.mark.filterwarnings("ignore:the teacher")
    @pytest.mark.parametrize("from_logits", [False, True])
    def test_proxy_model(self, data, from_logits):
        """The live teacher's proxy is that of its stored outputs."""
        x = np.random.default_rng(0).normal(size=(ROWS, 4)).astype("float32")
        activation = None if from_logits else "softmax"
        teacher = keras.Sequential(
            [keras.layers.Dense(CLASSES, activation=activation)]
        )
        found = ProxyTeacherSearch(
            GradientSearch(order=2, calibration="vector", per_class=True)
        ).search(teacher, data[1], inputs=x, from_logits=from_logits)
        assert np.any(found.epsilon)
        proxy = found.proxy_model(teacher)
        stored = found.proxy_teacher(teacher.predict(x, verbose=0))
        np.testing.assert_allclose(
            proxy.predict(x, verbose=0), stored.probabilities, atol=5e-6
        )
        student = keras.Sequential([keras.layers.Dense(CLASSES)])
        distiller = Distiller(student, proxy)
        distiller.compile(
            keras.optimizers.Adam(0.1),
            loss=PTLoss(0.0, from_logits=True, teacher_from_logits=False),
        )
        history = distiller.fit(x, epochs=3, verbose=0).history
        assert history["loss"][-1] < history["loss"][0]
        assert isinstance(proxy.layers[-1], CorrectedTeacher)
        assert not proxy.layers[-1].weights  # what was found is not trained

    def test_proxy_model_of_several_inputs(self, data, vector):
        a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
        outputs = keras.layers.Softmax()(keras.layers.Add()([a, b]))
        teacher = keras.Model({"a": a, "b": b}, outputs)
        rows = np.log(data[0]).astype("float32") / 2
        np.testing.assert_allclose(
            vector.proxy_model(teacher).predict(
                {"a": rows, "b": rows}, verbose=0
            ),
            vector.proxy_teacher(data[0]).probabilities,
            atol=5e-6,
        )

    def test_proxy_teacher_of_logits_by_mistake(self, data, vector):
        match = "take their softmax, or say teacher_from_logits=True"
        with pytest.raises(ValueError, match=match):
            vector.proxy_teacher(np.log(data[0]))

    def test_proxy_model_of_logits_by_mistake(self, vector):
        teacher = keras.Sequential([keras.layers.Dense(CLASSES)])
        with pytest.warns(UserWarning, match="read as probabilities") as record:
            vector.proxy_model(teacher)
        assert record[0].filename == __file__

    def test_floor_is_the_loss_s(self, data, vector):
        """`keras.config.epsilon()`, wherever it is set."""
        teacher = np.array([[1.0, 0.0, 0.0]])
        floor = keras.config.epsilon()
        keras.config.set_epsilon(1e-3)
        try:
            q = vector.proxy_teacher(teacher).probabilities
            gradient = helpers.gradient_of(
                lambda z: vector.loss(from_logits=True)(teacher, z),
                np.log(q).astype("float32"),
            )
        finally:
            keras.config.set_epsilon(floor)
        np.testing.assert_allclose(gradient, 0.0, atol=1e-5)

    def test_proxy_model_needs_a_model(self, data, vector):
        with pytest.raises(ValueError, match="stored outputs.*ndarray"):
            vector.proxy_model(data[0])

    def test_data_frame(self, result):
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame(result.trials)
        assert list(frame) == [
            "order",
            "score",
            "unconverged",
            "epsilon",
            "best_of_order",
        ]
        assert len(frame) == 60
        best = frame.groupby("order")["score"].min()
        np.testing.assert_array_equal(
            best, frame["score"][frame["best_of_order"]]
        )

    def test_summary(self, result, capsys):
        result.summary()
        text = capsys.readouterr().out
        assert text.strip() == str(result).strip()
        assert "correction: random, objective nll" in text
        assert f"{result.score:.5g}" in text
        assert f"plain KL: {result.score_at_zero:.5g}" in text
        for order in (1, 2, 3):
            assert f"best of order {order}" in text
        assert "60 trials" in text
        assert f"{result.unconverged} rows not converged" in text

    def test_classes(self, data, vector):
        q = vector.proxy_teacher(data[0]).probabilities
        counts = [np.mean(data[1] == c) for c in range(CLASSES)]
        np.testing.assert_allclose(vector.classes["labels"], counts)
        np.testing.assert_allclose(vector.classes["teacher"], data[0].mean(0))
        np.testing.assert_allclose(vector.classes["corrected"], q.mean(0))
        change = q.mean(0) - data[0].mean(0)
        gains = f"{np.argmax(change)} ({100 * change.max():+.1f} %)"
        assert f"  classes  {gains}" in str(vector)

    def test_plot(self, vector):
        pytest.importorskip("matplotlib").use("Agg")
        ax = vector.plot()
        heights = [bar.get_height() for bar in ax.patches]
        np.testing.assert_allclose(
            heights, np.concatenate(list(vector.classes.values()))
        )

    def test_notebook(self, vector):
        pytest.importorskip("matplotlib")
        page = vector._repr_html_()
        assert page.startswith("<table>")
        assert f"{vector.score:.5g}" in page
        assert '<img src="data:image/png;base64,' in page

    # As many orders as classes make no matrix of classes.
    @pytest.mark.parametrize("order, classes", [(5, 20), (20, 20), (2, 100)])
    def test_summary_fits_a_screen(self, order, classes):
        """At many classes it says what stands out, and not every number."""
        teacher = helpers.dirichlet(0, 400, classes)
        labels = helpers.draw_labels(teacher, 1)
        search = ProxyTeacherSearch(
            GradientSearch(
                order=order, per_class=True, calibration="vector", penalty=0.1
            )
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few labels
            result = search.search(teacher, labels)
        lines = str(result).splitlines()
        assert len(result.trials["score"]) == 1
        assert lines[-1].startswith("  cost     1 trial, ")
        assert len(lines) < 20
        assert max(map(len, lines)) <= 100
        shown = f"per class, ({classes}, {order}), from"
        assert any(shown in line for line in lines)
        page = result._repr_html_()
        assert all(note in page for note in result.notes)

    def test_summary_shows_the_calibration(self, vector):
        assert "  scale " in str(vector)
        assert "  bias " in str(vector)


class TestProgress:
    def test_verbose(self, data, capsys):
        searcher = small_random_search()
        searcher.search(*data, verbose=True)
        assert "10/10" in capsys.readouterr().out

    @pytest.mark.parametrize("verbose", [None, "auto", False, 0])
    def test_silent(self, data, capsys, verbose):
        small_random_search().search(*data, verbose=verbose)
        assert not capsys.readouterr().out

    @pytest.mark.parametrize(
        "verbose, shown",
        [(0, ""), (False, ""), (1, "2/2"), (None, "2/2"), ("auto", "2/2")],
    )
    def test_on_a_terminal(self, capsys, monkeypatch, verbose, shown):
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        bar = Progress(verbose, patience=0.0)
        bar.update(1, 2)
        bar.update(2, 2)
        out = capsys.readouterr().out
        assert shown in out
        assert bool(out) == bool(shown)

    @pytest.mark.parametrize("verbose", ["no", 2, -1])
    def test_wrong(self, data, verbose):
        with pytest.raises(ValueError, match="`verbose` must be.*verbose="):
            small_random_search().search(*data, verbose=verbose)


class TestCallableObjective:
    @staticmethod
    def error_rate(q, labels):
        return np.mean(q.argmax(axis=1) != labels)

    @staticmethod
    def brier_pair(q, labels):
        return OBJECTIVES["brier"].score(q, labels), brier_derivative(q, labels)

    def test_random(self, data):
        found = run(data, objective=self.error_rate, per_class=True, trials=20)
        q = found.proxy_teacher(data[0]).probabilities
        assert found.score == self.error_rate(q, data[1])
        assert found.objective == "error_rate"

    def test_random_takes_a_pair_too(self, data):
        found = run(data, objective=self.brier_pair)
        expected = run(data, objective="brier")
        np.testing.assert_allclose(
            found.trials["score"], expected.trials["score"]
        )

    def test_gradient(self, data):
        found = run_gradient(data, objective=self.brier_pair)
        expected = run_gradient(data, objective="brier")
        np.testing.assert_allclose(found.epsilon, expected.epsilon, atol=1e-9)
        assert found.objective == "brier_pair"

    def test_gradient_needs_a_derivative(self, data):
        match = r"`objective` must be.*\(score, derivative.*error_rate"
        with pytest.raises(ValueError, match=match):
            run_gradient(data, objective=self.error_rate)


class TestSettings:
    @pytest.mark.parametrize(
        "method, argument, value",
        [
            (RandomSearch, "order", 0),
            (RandomSearch, "order", 2.0),
            (RandomSearch, "per_class", "no"),
            (RandomSearch, "trials", 0),
            (RandomSearch, "trials", True),
            (RandomSearch, "solver", "bfgs"),
            (GradientSearch, "order", 0),
            (GradientSearch, "per_class", 1),
            (GradientSearch, "calibration", "beta"),
            (GradientSearch, "penalty", -0.1),
            (GradientSearch, "penalty", np.nan),
            (GradientSearch, "starts", 0),
            (CalibrationSearch, "calibration", "none"),
            (CalibrationSearch, "penalty", -1.0),
            (GradientSearch, "calibration", ["vector"]),
            (CrossValidatedSearch, "order", 0),
            (CrossValidatedSearch, "penalty", -1.0),
            (CrossValidatedSearch, "calibrations", "matrix"),
            (CrossValidatedSearch, "calibrations", ("matrix", "beta")),
            (CrossValidatedSearch, "calibrations", 5),
            (CrossValidatedSearch, "calibrations", None),
            (CrossValidatedSearch, "calibrations", [["matrix"]]),
            (CrossValidatedSearch, "folds", 1),
            (ProxyTeacherSearch, "method", "grid"),
            (ProxyTeacherSearch, "method", OnlyRuns()),
            (ProxyTeacherSearch, "method", None),
            (ProxyTeacherSearch, "method", RandomSearch),
            (ProxyTeacherSearch, "objective", "accuracy"),
            (ProxyTeacherSearch, "seed", -1),
            (ProxyTeacherSearch, "seed", 0.5),
        ],
    )
    def test_wrong(self, method, argument, value):
        shown = re.escape(f"Received: {argument}={value!r}")
        with pytest.raises(ValueError, match=f"`{argument}` must be.*{shown}"):
            method(**{argument: value})

    @pytest.mark.parametrize(
        "space",
        [(10.0, -1.0), (1.0, 1.0), (0.0, np.inf), (np.nan, 1.0), (1, 2, 3), 5],
    )
    def test_space(self, space):
        with pytest.raises(ValueError, match="`space` must be two") as error:
            RandomSearch(space=space)
        assert f"Received: space={space!r}" in str(error.value)

    @pytest.mark.parametrize(
        "name, method, objective",
        [
            ("cross_validation", CrossValidatedSearch(), "nll"),
            ("gradient", GradientSearch(), "nll"),
            ("random", RandomSearch(), "risk"),
        ],
    )
    def test_names_mean_defaults(self, name, method, objective):
        searcher = ProxyTeacherSearch(name)
        assert searcher.method == method
        assert searcher.method.name == name
        assert searcher.objective.name == objective

    def test_default(self):
        assert ProxyTeacherSearch().method == CrossValidatedSearch()


class TestInputs:
    SEARCH = ProxyTeacherSearch(RandomSearch(order=1, trials=1))
    TEACHER = np.full((4, 3), 1 / 3)
    LABELS = np.array([0, 1, 2, 0])

    @pytest.mark.parametrize(
        "labels, match",
        [
            ([0, 1, 2, 3], r"in \[0, 3\).*labels\[3\]=3"),
            ([0, -1, 2, 0], r"in \[0, 3\).*labels\[1\]=-1"),
            ([], r"non-empty.*shape \(0,\)"),
            ([0, 1, 2], r"one entry for each.*\(4,\).*shape \(3,\)"),
            ([0.0, 1.0, 2.0, 0.0], r"integers.*dtype float64"),
            ([True, False, True, False], r"integers.*dtype bool"),
            (np.eye(3, dtype=int)[[0, 1, 2, 0]], r"one class.*shape \(4, 3\)"),
        ],
    )
    def test_labels(self, labels, match):
        with pytest.raises(ValueError, match="`labels` must .*" + match):
            self.SEARCH.search(self.TEACHER, labels)

    @pytest.mark.parametrize(
        "row, shown",
        [
            ([2.0, -1.0, 0.5], "-1"),
            ([-0.1, 0.6, 0.5], "-0.1"),
            ([np.nan, 0.5, 0.5], "nan"),
            ([0.3, 0.3, 0.3], "0.9"),
        ],
    )
    def test_teacher_is_not_probabilities(self, row, shown):
        teacher = self.TEACHER.copy()
        teacher[2] = row
        match = rf"`teacher` must hold probabilities.*teacher\[2\]=.*{shown}"
        with pytest.raises(ValueError, match=match):
            self.SEARCH.search(teacher, self.LABELS)

    @pytest.mark.parametrize(
        "teacher, labels, name",
        [
            ([[0.5, 0.5], [0.3]], [0, 1], "teacher"),
            ([np.ones((2, 2)) / 2, [[0.5, 0.5], [0.3]]], [0, 1], "teacher"),
            ([[0.5, 0.5], [0.3, 0.7]], [[0], [1, 1]], "labels"),
        ],
    )
    def test_rows_of_different_lengths(self, teacher, labels, name):
        match = f"`{name}` must have rows of the same length.*list of 2"
        with pytest.raises(ValueError, match=match):
            self.SEARCH.search(teacher, labels)

    def test_error_points_to_from_logits(self):
        with pytest.raises(ValueError, match="say from_logits=True"):
            self.SEARCH.search(self.TEACHER * 9, self.LABELS)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_logits_are_finite(self, value):
        teacher = self.TEACHER.copy()
        teacher[0, 0] = value
        match = f"`teacher` must be finite logits.*{value}"
        with pytest.raises(ValueError, match=match):
            self.SEARCH.search(teacher, self.LABELS, from_logits=True)

    @pytest.mark.parametrize(
        "teacher",
        [
            np.ones(4),
            np.ones((0, 3)),
            np.array([["a", "b"]] * 4),
        ],
    )
    def test_teacher_of_other_form(self, teacher):
        match = r"`teacher` must give numbers.*Received: teacher.*shape \("
        with pytest.raises(ValueError, match=match):
            self.SEARCH.search(teacher, self.LABELS)

    def test_model_needs_inputs(self):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
        with pytest.raises(ValueError, match="`inputs` must hold.*inputs=None"):
            self.SEARCH.search(model, self.LABELS)
        for inputs in (3, "a"):
            match = f"`inputs` must be arrays.*Received: inputs={inputs!r}"
            with pytest.raises(ValueError, match=match):
                self.SEARCH.search(model, self.LABELS, inputs=inputs)

    def test_inputs_need_a_model(self):
        match = "`inputs` goes with a Keras model.*ndarray"
        with pytest.raises(ValueError, match=match):
            self.SEARCH.search(self.TEACHER, self.LABELS, inputs=np.ones(4))

    def test_proxy_teacher_checks_its_teacher(self, result):
        with pytest.raises(ValueError, match="`outputs` must hold prob"):
            result.proxy_teacher([[3.0, 1.0, 2.0]])

    @pytest.mark.parametrize("classes", [2, 4])
    def test_proxy_teacher_of_other_class_count(self, vector, classes):
        rows = np.full((4, classes), 1 / classes)
        with pytest.raises(ValueError, match="`outputs`.*Received"):
            vector.proxy_teacher(rows)


def test_objective_that_is_not_finite():
    """One NaN would win every argmin."""
    rows = np.full((4, 3), 1 / 3)
    search = ProxyTeacherSearch(
        RandomSearch(trials=3, order=1),
        objective=lambda q, labels: float("nan"),
    )
    with pytest.raises(ValueError, match="`objective` must return finite"):
        search.search(rows, [0, 1, 2, 0])


@pytest.mark.parametrize("score", [np.zeros(3), np.zeros(1), None, "low"])
@pytest.mark.parametrize("method", ["random", "gradient", "cross_validation"])
def test_objective_that_is_no_number(data, method, score):
    search = ProxyTeacherSearch(
        method, objective=lambda q, labels: (score, np.zeros_like(q))
    )
    with pytest.raises(ValueError, match="`objective` must be a.*one number"):
        search.search(*data)


def test_a_temperature_has_no_penalty(data):
    """None is given: one that is would be ignored."""
    search = ProxyTeacherSearch(CalibrationSearch("temperature"))
    assert search.search(*data).trials["penalty"] == [0.0]
    with pytest.raises(ValueError, match="`penalty` must be None.*penalty=5.0"):
        CalibrationSearch("temperature", penalty=5.0)


def test_objective_that_is_not_a_number_in_a_descent(data):
    with pytest.raises(ValueError, match="finite scores.*broken = nan"):

        def broken(q, labels):
            return np.nan, np.zeros_like(q)

        run_gradient(data, objective=broken)


def test_descent_on_risk_is_not_stopped_by_confident_rows():
    """Rows within rounding of their label once gave an infinite slope."""
    rng = np.random.default_rng(0)
    truth = rng.dirichlet([0.5, 0.5, 0.5], size=400)
    labels = np.array([rng.choice(3, p=row) for row in truth])
    teacher = truth * [4.0, 1.0, 1.0]
    sure = np.arange(400) < 60
    teacher[sure] = 1e-9 + np.eye(3)[labels[sure]]
    teacher /= teacher.sum(axis=1, keepdims=True)
    search = ProxyTeacherSearch(
        GradientSearch(per_class=True, order=2), objective="risk"
    )
    result = search.search(teacher, labels)
    assert result.score < result.score_at_zero - 0.01
