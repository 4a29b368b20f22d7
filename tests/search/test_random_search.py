"""The paper's Algorithm 1."""

import helpers
import numpy as np
import pytest

from keras_ptloss import proxy_teacher
from keras_ptloss.search import Examples, RandomSearch
from keras_ptloss.search.random_search import risk


def silent(done, total):
    pass


def make_examples(classes=3, count=80, **options):
    rng = np.random.default_rng(0)
    truth = rng.dirichlet(np.ones(classes), size=count)
    labels = helpers.draw_labels(truth, seed=1)
    teacher = helpers.softmax(0.4 * np.log(truth))  # not confident enough
    return Examples([teacher], labels, np.ones(count), classes, **options)


@pytest.mark.parametrize("case", helpers.golden_parameters())
def test_golden_risk(case):
    labels = np.array(case["labels"])
    found = risk(np.array(case["proxy_teacher"]), labels, np.ones(len(labels)))
    np.testing.assert_allclose(found, case["risk_eq11"], rtol=1e-5)


def test_weighted_risk_is_of_repeated_rows():
    q = np.random.default_rng(0).dirichlet(np.ones(3), size=4)
    labels, counts = np.array([0, 1, 2, 0]), np.array([1, 3, 0, 2])
    found = risk(q, labels, counts / counts.mean())
    expected = helpers.risk(np.repeat(q, counts, 0), np.repeat(labels, counts))
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("per_class", [False, True])
def test_keeps_the_best_draw(per_class):
    examples = make_examples()
    method = RandomSearch(num_trials=20, order=(1, 2), per_class=per_class)
    found = method.run(examples, silent)
    trials = found.trials
    assert trials["order"] == [1] * 20 + [2] * 20
    best = int(np.argmin(trials["score"]))
    assert found.chosen == "epsilon"
    np.testing.assert_array_equal(
        found.correction.epsilon, trials["epsilon"][best]
    )
    q = proxy_teacher(examples.teacher_probs[0], trials["epsilon"][best])
    np.testing.assert_allclose(
        trials["score"][best], helpers.risk(q.probabilities, examples.labels)
    )
    assert trials["best_of_order"][best]
    assert sum(trials["best_of_order"]) == 2
    every = np.concatenate([np.ravel(e) for e in trials["epsilon"]])
    assert -1.0 <= every.min() < 0.0 < 9.0 < every.max() <= 10.0


def test_order_means_exactly_this_order_and_seed_repeats():
    runs = [
        RandomSearch(num_trials=5, order=3).run(make_examples(seed=s), silent)
        for s in (7, 7, 8)
    ]
    assert set(runs[0].trials["order"]) == {3}
    scores = [run.trials["score"] for run in runs]
    assert scores[0] == scores[1] != scores[2]


def test_teacher_stays_if_no_draw_is_better():
    classes = 3
    labels = np.arange(30) % classes
    teacher = np.eye(classes)[labels]  # always right
    examples = Examples([teacher], labels, np.ones(30), classes)
    found = RandomSearch(num_trials=5, order=1).run(examples, silent)
    assert found.chosen == "teacher"
    np.testing.assert_array_equal(np.ravel(found.correction.epsilon), 0.0)


def test_class_without_a_label_keeps_the_teachers_probability():
    given = make_examples()
    labels = np.where(given.labels == 2, 0, given.labels)
    for random_sample, kept in ((False, (2,)), (True, ())):
        examples = Examples(
            given.teacher_probs, labels, np.ones(80), 3, random_sample
        )
        method = RandomSearch(num_trials=20, order=1, per_class=True)
        found = method.run(examples, silent)
        assert tuple(found.correction.kept_classes) == kept


def test_fsolve_agrees_with_newton():
    examples = make_examples(count=10)
    scores = [
        RandomSearch(num_trials=3, order=1, low=0.0, high=2.0, solver=solver)
        .run(examples, silent)
        .trials["score"]
        for solver in ("newton", "fsolve")
    ]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)


def test_progress_reaches_its_end():
    calls = []
    RandomSearch(num_trials=4, order=1).run(
        make_examples(), lambda done, total: calls.append((done, total))
    )
    assert calls[-1] == (4, 4)


def test_several_teachers_are_refused():
    t = np.full((2, 3), 1 / 3)
    for teachers, classes in (([t, t], 3), ([t], 4)):
        examples = Examples(teachers, np.array([0, 1]), np.ones(2), classes)
        with pytest.raises(ValueError, match="takes one teacher"):
            RandomSearch().run(examples, silent)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_trials": 0}, "`num_trials` must be"),
        ({"order": 0}, "`order` must be"),
        ({"order": (3, 1)}, "`order` must be"),
        ({"low": 2.0, "high": 1.0}, "`low` must be"),
        ({"per_class": "yes"}, "`per_class` must be"),
        ({"solver": "bisection"}, "`solver` must be"),
    ],
)
def test_wrong_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        RandomSearch(**arguments)
