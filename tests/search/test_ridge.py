"""RidgeSearch against independent fits, and on data with a known answer."""

import numpy as np
import pytest
import scipy.optimize
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression

from keras_ptloss import proxy_teacher
from keras_ptloss.search import Examples, RidgeSearch, ridge

# ---- Helpers


def search(
    teacher_probs,
    labels,
    *,
    num_classes=None,
    sample_weight=None,
    random_sample=False,
    seed=0,
    steps=2,
):
    """Return what `RidgeSearch` finds, and the corrected probabilities."""
    teachers = (
        teacher_probs if isinstance(teacher_probs, list) else [teacher_probs]
    )
    weight = np.ones(len(labels)) if sample_weight is None else sample_weight
    examples = Examples(
        teacher_probs=teachers,
        labels=labels,
        sample_weight=weight / weight.mean(),
        num_classes=num_classes or teachers[0].shape[1],
        random_sample=random_sample,
        seed=seed,
    )
    return RidgeSearch(steps=steps).run(examples, lambda done, total: None)


def nll(probs, labels):
    return -np.mean(np.log(probs[np.arange(len(labels)), labels]))


def draw(probs, seed):
    """Draw a label from each row."""
    below = np.random.default_rng(seed).random((len(probs), 1))
    return np.minimum(
        (probs.cumsum(axis=1) < below).sum(axis=1), probs.shape[1] - 1
    )


def calibrated(number, classes, seed=0):
    """Return a calibrated teacher, and labels drawn from it."""
    rng = np.random.default_rng(seed)
    probs = softmax(2.0 * rng.normal(size=(number, classes)), axis=1)
    return probs, draw(probs, seed + 1000)


def numerical_gradient(function, x, step=1e-6):
    def slope(i):
        ends = [x + sign * step * np.eye(len(x))[i] for sign in (1.0, -1.0)]
        return (function(ends[0]) - function(ends[1])) / (2.0 * step)

    return np.array([slope(i) for i in range(len(x))])


@pytest.fixture(scope="module")
def step_1_case():
    """Two teachers, of whose five classes three have labels; weights."""
    rng = np.random.default_rng(0)
    z = [log_softmax(rng.normal(size=(30, 5)), axis=1) for _ in range(2)]
    learned = np.array([0, 2, 3])
    weight = rng.uniform(0.5, 2.0, size=30)
    return z, rng.integers(3, size=30), weight, learned


@pytest.fixture(scope="module")
def step_2_case():
    rng = np.random.default_rng(1)
    r = log_softmax(rng.normal(size=(40, 3)), axis=1)
    x = np.concatenate([rng.normal(size=(40, 2)), np.ones((40, 1))], axis=1)
    weight = rng.uniform(0.5, 2.0, size=40)
    return r, np.exp(r), x, rng.integers(3, size=40), weight


# ---- Step 1


def test_step_1_is_the_proxy_teacher():
    probs, _ = calibrated(20, 4)
    t, u, log_q = ridge.step_1(
        [np.log(probs)], np.array([np.log(0.5), np.log(4.0)])
    )
    tempered = softmax(0.5 * np.log(probs), axis=1)
    expected = proxy_teacher(tempered, 3.0, solver="fsolve").probabilities
    assert np.exp(log_q) == pytest.approx(expected, abs=1e-6)
    assert u * t == pytest.approx(np.exp(log_q), abs=1e-9)


def test_step_1_gradient(step_1_case):
    z, labels, weight, learned = step_1_case
    for confidence in ([0.3, -0.5, 0.9], [0.0, 0.7, -1.5]):
        x = np.array(confidence)
        value, gradient = ridge.step_1_objective(x, z, labels, weight, learned)
        log_q = ridge.step_1(z, x)[2][:, learned]
        expected = nll(softmax(log_q, axis=1), labels)
        assert isinstance(value, float)
        assert gradient == pytest.approx(
            numerical_gradient(
                lambda c: ridge.step_1_objective(c, z, labels, weight, learned)[
                    0
                ],
                x,
            ),
            abs=1e-5,
        )
        plain = ridge.step_1_objective(x, z, labels, np.ones(30) / 30, learned)
        assert plain[0] == pytest.approx(expected + 0.5 * x @ x)


def test_step_1_recovers_a_temperature_and_epsilon():
    rng = np.random.default_rng(0)
    teacher = softmax(4.0 * rng.normal(size=(5_000, 3)), axis=1)
    tempered = softmax(np.log(teacher) / 2.0, axis=1)
    truth = proxy_teacher(tempered, 1.5).probabilities
    found = search(teacher, draw(truth, 1), steps=1)
    assert found.chosen == "temperature and epsilon"
    # Different pairs are nearly the same map: the map is what is recovered.
    corrected = found.correction.correct(teacher)
    assert corrected == pytest.approx(truth, abs=0.04)
    assert found.correction.temperature == pytest.approx(2.0, rel=0.3)
    assert found.correction.matrix is None


# ---- Step 2


def test_step_2_gradient(step_2_case):
    classes, features = 3, step_2_case[2].shape[1]
    rng = np.random.default_rng(2)
    parameters = rng.normal(size=classes * features + 2)
    penalties = rng.uniform(0.5, 2.0, size=len(parameters))
    _, gradient = ridge.step_2_objective(parameters, *step_2_case, penalties)
    assert gradient == pytest.approx(
        numerical_gradient(
            lambda p: ridge.step_2_objective(p, *step_2_case, penalties)[0],
            parameters,
        ),
        abs=1e-5,
    )


def test_step_2_is_logistic_regression(step_2_case):
    """Without an offset, scikit-learn fits the same."""
    r, _, x, labels, weight = step_2_case
    r = np.zeros_like(r)
    penalties = np.full(r.shape[1] * x.shape[1] + 2, 0.7)
    found = scipy.optimize.minimize(
        ridge.step_2_objective,
        np.zeros(len(penalties)),
        (r, r, x, labels, weight, penalties),
        jac=True,
    ).x
    expected = LogisticRegression(C=1 / 0.7, fit_intercept=False, tol=1e-8)
    expected.fit(x, labels, sample_weight=weight)
    assert found[:-2].reshape(3, -1) == pytest.approx(expected.coef_, abs=1e-4)


def test_weights_are_repeated_rows(step_2_case, step_1_case):
    r, exp_r, x, labels, _ = step_2_case
    times = np.arange(len(labels)) % 3
    penalties = np.full(r.shape[1] * x.shape[1] + 2, 0.7)
    parameters = np.linspace(-1.0, 1.0, len(penalties))
    weighted = ridge.step_2_objective(
        parameters, r, exp_r, x, labels, times.astype(float), penalties
    )
    rows = np.repeat(np.arange(len(labels)), times)
    repeated = ridge.step_2_objective(
        parameters,
        r[rows],
        exp_r[rows],
        x[rows],
        labels[rows],
        np.ones(len(rows)),
        penalties,
    )
    assert weighted[0] == pytest.approx(repeated[0])
    assert weighted[1] == pytest.approx(repeated[1])


def test_whitening_halves_the_spread():
    """The covariance of the features is S^(1/2), scaled to mean variance 1."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(500, 4)) * [1.0, 2.0, 3.0, 4.0] + 5.0
    mean, a = ridge.whiten([z], np.ones(500))
    features = (z - mean) @ a.T
    spread = np.linalg.eigvalsh(np.cov(z.T, bias=True)) ** 0.5
    found = np.linalg.eigvalsh(np.cov(features.T, bias=True))
    assert found == pytest.approx(4.0 * spread / spread.sum())


# ---- Whole searches


def test_out_of_fold_probabilities_do_not_see_their_label():
    """Without an example its own out-of-fold probabilities are the same."""
    probs, labels = calibrated(100, 3)
    one = search(probs, labels)
    other = np.flatnonzero(labels == labels[0])[-1]
    changed = labels.copy()
    changed[other] = (labels[other] + 1) % 3
    two = search(probs, changed)
    name = "temperature and epsilon"
    assert one.out_of_fold[name][:, other] == pytest.approx(
        two.out_of_fold[name][:, other], abs=1e-3
    )
    assert np.all(
        np.abs(one.out_of_fold["corrected"].sum(axis=-1) - 1.0) < 1e-9
    )


def test_trials_and_scores():
    probs, labels = calibrated(60, 3)
    found = search(probs, labels)
    assert set(found.out_of_fold) == {
        "teacher", "temperature and epsilon", "corrected",
    }  # fmt: skip
    assert found.trials["candidate"][:2] == [
        "teacher",
        "temperature and epsilon",
    ]
    assert found.trials["score"][0] == pytest.approx(nll(probs, labels))
    assert np.all(np.diff(found.trials["penalty"][2:]) < 0)


@pytest.mark.parametrize(
    ("number", "classes", "most"), [(15, 3, 0.1), (30, 6, 0.05)]
)
def test_calibrated_teachers_stay_as_they_are(number, classes, most):
    """Few labels of a calibrated teacher cost little."""
    excess = []
    for draw_ in range(6):
        probs, labels = calibrated(number, classes, seed=draw_)
        new, _ = calibrated(500, classes, seed=100 + draw_)
        q = search(probs, labels).correction.correct(new)
        excess.append(np.mean(np.sum(new * (np.log(new) - np.log(q)), axis=1)))
    assert np.mean(excess) < most


def test_confused_classes_are_repaired():
    truth, labels = calibrated(600, 4)
    teacher = truth @ [
        [0.2, 0.8, 0, 0],
        [0.8, 0.2, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1.0],
    ]
    found = search(teacher[:300], labels[:300])
    assert found.chosen == "corrected"
    corrected = found.correction.correct(teacher[300:])
    assert nll(corrected, labels[300:]) < nll(teacher[300:], labels[300:]) - 0.2


def test_binary_teacher_with_a_bias():
    truth, labels = calibrated(600, 2)
    teacher = truth * [1.0, 0.1]
    teacher /= teacher.sum(axis=1, keepdims=True)
    found = search(teacher[:300], labels[:300])
    best = nll(truth[300:], labels[300:])
    assert (
        nll(found.correction.correct(teacher[300:]), labels[300:]) < best + 0.03
    )


def absent_classes(number):
    """A teacher that gives half of the mass to two of six classes."""
    rng = np.random.default_rng(0)
    inside = softmax(2.0 * rng.normal(size=(number, 4)), axis=1)
    outside = softmax(rng.normal(size=(number, 2)), axis=1)
    teacher = np.concatenate([0.5 * inside, 0.5 * outside], axis=1)
    return teacher, draw(inside, 1), nll(inside, draw(inside, 1))


def test_classes_without_labels_keep_the_teachers_probabilities():
    teacher, labels, _ = absent_classes(300)
    # The labelled classes are confused, so that there is something to learn.
    teacher = teacher[:, [1, 0, 2, 3, 4, 5]]
    found = search(teacher, labels)
    assert found.chosen == "corrected"
    assert found.correction.kept_classes == (4, 5)
    corrected = found.correction.correct(teacher)
    assert corrected[:, 4:] == pytest.approx(teacher[:, 4:])
    assert corrected.sum(axis=1) == pytest.approx(1.0)


def test_classes_without_labels_in_a_random_sample_are_learned():
    teacher, labels, best = absent_classes(1000)
    found = search(teacher[:600], labels[:600], random_sample=True)
    corrected = found.correction.correct(teacher[600:])
    assert found.correction.kept_classes == ()
    assert nll(corrected, labels[600:]) < best + 0.08
    assert nll(teacher[600:], labels[600:]) > best + 0.6


def test_two_labels_per_class_of_thirty():
    rng = np.random.default_rng(0)
    labels = np.arange(600) % 30
    z = 2.0 * rng.normal(size=(600, 30)) + 4.0 * np.eye(30)[labels]
    teacher = softmax(2.0 * z, axis=1)  # overconfident
    found = search(teacher[:60], labels[:60])
    corrected = found.correction.correct(teacher[60:])
    assert nll(corrected, labels[60:]) < nll(teacher[60:], labels[60:])


def test_one_label_class_only():
    """Nothing can be learned from labels of one class."""
    probs, _ = calibrated(20, 3)
    found = search(probs, np.zeros(20, "int64"))
    assert np.isfinite(found.correction.correct(probs)).all()


def test_weights_undo_balanced_labels():
    """Labels that are even by class, weighted by the shares of the classes."""
    rng = np.random.default_rng(0)
    share = np.array([0.9, 0.05, 0.05])
    labels = rng.choice(3, p=share, size=20_000)
    x = rng.normal(size=(20_000, 3)) + 2.0 * np.eye(3)[labels]
    teacher = softmax(2.0 * np.log(share) + 4.0 * x, axis=1)  # overconfident
    few = np.concatenate(
        [np.flatnonzero(labels[:10_000] == c)[:100] for c in range(3)]
    )
    found = search(teacher[few], labels[few], sample_weight=share[labels[few]])
    held_out = teacher[10_000:], labels[10_000:]
    best = nll(softmax(np.log(share) + 2.0 * x, axis=1)[10_000:], held_out[1])
    assert nll(found.correction.correct(held_out[0]), held_out[1]) < best + 0.02
    assert nll(*held_out) > best + 0.04


def test_examples_of_weight_zero_do_not_count():
    probs, labels = calibrated(40, 3)
    weight = np.r_[np.ones(20), np.zeros(20)]
    both = Examples([probs], labels, 2.0 * weight, 3)
    half = Examples([probs[:20]], labels[:20], np.ones(20), 3)
    one = ridge._Fit(both, np.ones(40, bool))
    two = ridge._Fit(half, np.ones(20, bool))
    assert one.confidence == pytest.approx(two.confidence, abs=1e-4)


def test_hard_answers():
    """A teacher of one-hot rows, so that few of its rows differ."""
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=400)
    answers = np.where(rng.random(400) < 0.7, labels, (labels + 1) % 3)
    teacher = np.eye(3)[answers]
    found = search(teacher[:60], labels[:60])
    corrected = found.correction.correct(np.eye(3))
    # The best correction says 70 % and 30 %: .61.
    assert nll(corrected[answers[60:]], labels[60:]) < 0.75
    constant = search(np.tile([0.5, 0.3, 0.2], (60, 1)), labels[:60])
    assert np.isfinite(constant.correction.correct(teacher)).all()


def test_several_teachers_err_differently():
    """Each of two teachers confuses another pair; together they know all."""
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=900)
    x = 2.0 * rng.normal(size=(900, 4)) + 6.0 * np.eye(4)[labels]
    first, second = x.copy(), x.copy()
    first[:, :2] = first[:, :2].max(axis=1, keepdims=True)
    second[:, 2:] = second[:, 2:].max(axis=1, keepdims=True)
    other = np.stack([x[:, 0], x[:, 1:].max(axis=1)], axis=1)  # other classes
    teachers = [softmax(z, axis=1) for z in (first, second, other)]
    found = search([t[:300] for t in teachers], labels[:300])
    assert found.chosen == "corrected"
    assert np.isinf(found.correction.temperature[2])
    held_out = [t[300:] for t in teachers]
    together = nll(found.correction.correct(held_out), labels[300:])
    for k in range(2):
        alone = search(teachers[k][:300], labels[:300]).correction
        assert together < nll(alone.correct(held_out[k]), labels[300:]) - 0.1


def test_the_best_of_several_teachers_is_a_candidate():
    probs, labels = calibrated(60, 3)
    noise = np.full_like(probs, 1 / 3)
    found = search([noise, probs], labels)
    assert found.out_of_fold["teacher 1"][0] == pytest.approx(probs)
    if found.chosen == "teacher 1":
        assert found.correction.correct([noise, probs]) == pytest.approx(probs)


def test_a_useless_teacher_does_not_harm_a_good_one():
    probs, labels = calibrated(1500, 3)
    noise = np.random.default_rng(7).dirichlet([1.0] * 3, size=1500)
    found = search([probs[:300], noise[:300]], labels[:300])
    corrected = found.correction.correct([probs[300:], noise[300:]])
    best = nll(probs[300:], labels[300:])
    assert nll(corrected, labels[300:]) < best + 0.03


def test_teacher_of_other_classes_alone():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=300)
    teacher = softmax(
        3.0 * np.eye(5)[labels] + rng.normal(size=(300, 5)), axis=1
    )
    found = search(teacher, labels, num_classes=3)
    assert (
        np.mean(found.correction.correct(teacher).argmax(axis=1) == labels)
        > 0.8
    )
    with pytest.raises(
        ValueError, match="no teacher has the student's classes"
    ):
        search(teacher, labels, num_classes=3, steps=1)


def test_low_rank_with_many_classes(monkeypatch):
    monkeypatch.setattr(ridge, "MAX_FEATURES", 3)
    rng = np.random.default_rng(0)
    truth = softmax(rng.normal(size=(300, 6)), axis=1)
    labels = draw(truth, 1)
    teacher = truth[:, [1, 0, 2, 3, 4, 5]] ** 2
    teacher /= teacher.sum(axis=1, keepdims=True)
    found = search(teacher, labels)
    assert np.linalg.matrix_rank(found.correction.matrix) <= 3
    assert any("rank 3" in note for note in found.notes)


def test_notes():
    labels = np.arange(60) % 3
    perfect = softmax(5.0 * np.eye(3)[labels], axis=1)
    assert any("no mistakes" in note for note in search(perfect, labels).notes)
    rng = np.random.default_rng(0)
    unrelated = softmax(20.0 * rng.normal(size=(3000, 3)), axis=1)
    found = search(unrelated, rng.integers(3, size=3000), steps=1)
    assert any("bound" in note for note in found.notes)


def test_steps_is_checked():
    with pytest.raises(ValueError, match="`steps` must be 1 or 2"):
        RidgeSearch(steps=3)
