"""The default search: its objectives, and what it finds on made-up teachers."""

import numpy as np
import pytest
import scipy.optimize
from scipy.special import log_softmax, softmax

from keras_ptloss.search import Examples, RidgeSearch
from keras_ptloss.search import ridge as ridge_module


def draw(probs, seed):
    """Draw a label from each row."""
    uniform = np.random.default_rng(seed).random((len(probs), 1))
    return (probs.cumsum(axis=1) > uniform).argmax(axis=1)


def true_probs(count, classes=3, seed=0):
    """Return distributions `(count, classes)` that labels are drawn from."""
    logits = 2 * np.random.default_rng(seed).normal(size=(count, classes))
    return softmax(logits, axis=1)


def search(teachers, labels, steps=2, **options):
    """Run the search on arrays."""
    options = {
        "sample_weight": np.ones(len(labels)),
        "num_classes": teachers[0].shape[1],
        **options,
    }
    examples = Examples(
        [t / t.sum(axis=1, keepdims=True) for t in teachers], labels, **options
    )
    return RidgeSearch(steps=steps).run(examples, lambda done, total: None)


def nll(probs, labels):
    """Return the mean negative log-likelihood."""
    own = probs[np.arange(len(labels)), labels]
    return -np.log(np.maximum(own, 1e-12)).mean()


@pytest.fixture(scope="module")
def data():
    """Two teachers' z, labels and weights."""
    probs = true_probs(40, seed=1)
    z = [np.log(probs), np.log(true_probs(40, seed=2))]
    weight = np.random.default_rng(0).uniform(0.5, 2.0, 40)
    return z, draw(probs, seed=3), weight


def test_gradient_of_step_1(data):
    z, labels, weight = data
    arguments = (z, labels, weight, np.arange(3))
    for epsilon in (-0.8, 0.3, 5.0):
        at = np.array([0.2, -0.4, np.log1p(epsilon)])
        _, gradient = ridge_module.step_1_objective(at, *arguments)
        expected = scipy.optimize.approx_fprime(
            at, lambda x: ridge_module.step_1_objective(x, *arguments)[0], 1e-6
        )
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def test_gradient_of_step_2(data):
    z, labels, weight = data
    r = log_softmax(z[0], axis=1)
    x = np.concatenate([z[1], np.ones((40, 1))], axis=1)
    arguments = (r, np.exp(r), x, labels, weight, 0.7)
    at = np.random.default_rng(4).normal(size=3 * 4 + 2)
    _, gradient = ridge_module.step_2_objective(at, *arguments)
    expected = scipy.optimize.approx_fprime(
        at, lambda p: ridge_module.step_2_objective(p, *arguments)[0], 1e-6
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def test_step_1_finds_a_temperature():
    """A teacher that is sharpened by a known power is softened again."""
    truth = true_probs(4000)
    found = search([truth**3], draw(truth, seed=1), steps=1)
    new = true_probs(500, seed=5)
    corrected = found.correction.correct(
        new**3 / np.sum(new**3, axis=1, keepdims=True)
    )
    np.testing.assert_allclose(corrected, new, atol=0.04)
    assert not found.correction.has_step_2


def test_step_2_finds_a_confusion():
    """What a teacher takes for the next class is given back."""
    truth = true_probs(3000)
    confusion = 0.6 * np.eye(3) + 0.4 * np.roll(np.eye(3), 1, axis=1)
    found = search([truth @ confusion], draw(truth, seed=1))
    new = true_probs(2000, seed=5)
    labels = draw(new, seed=6)
    corrected = found.correction.correct(new @ confusion)
    assert nll(corrected, labels) < nll(new, labels) + 0.05
    assert nll(corrected, labels) < nll(new @ confusion, labels) - 0.2
    assert found.chosen == "corrected"


@pytest.mark.parametrize(
    ("count", "classes", "draws", "most"), [(15, 3, 10, 0.1), (30, 6, 8, 0.05)]
)
def test_few_labels_hardly_harm_a_calibrated_teacher(
    count, classes, draws, most
):
    excess = []
    for seed in range(draws):
        probs = true_probs(count + 1000, classes, seed)
        labels = draw(probs, seed + 1000)
        found = search([probs[:count]], labels[:count])
        corrected = found.correction.correct(probs[count:])
        new = labels[count:]
        excess.append(nll(corrected, new) - nll(probs[count:], new))
    # A draw's standard deviation is about 0.2, so allow for the error.
    error = np.std(excess) / np.sqrt(draws)
    assert np.mean(excess) < most + 2 * error


def test_weights_are_repetitions():
    truth = true_probs(120)
    teacher, labels = truth**2, draw(truth, seed=1)
    weight = np.repeat([1.0, 3.0], 60)
    confidence = [
        ridge_module.fit_step_1([np.log(rows)], y, w, np.arange(3), np.zeros(2))
        for rows, y, w in (
            (teacher, labels, weight),
            (
                np.concatenate([teacher, teacher[60:], teacher[60:]]),
                np.concatenate([labels, labels[60:], labels[60:]]),
                np.ones(240),
            ),
        )
    ]
    np.testing.assert_allclose(*confidence, atol=1e-4)


def test_two_labels_for_each_of_thirty_classes():
    truth = true_probs(2000, classes=30)
    labels = np.tile(np.arange(30), 2)
    rows = [np.flatnonzero(draw(truth, 1) == c)[:2] for c in range(30)]
    few = np.stack(rows, axis=1).ravel()
    found = search([truth[few]], labels)
    new = draw(truth, seed=2)
    assert nll(found.correction.correct(truth), new) < nll(truth, new) + 0.1


def test_hard_answers():
    """Teachers of few distinct rows have a singular covariance."""
    truth = true_probs(300)
    answers = np.eye(3)[draw(truth, seed=1)]
    labels = draw(truth, seed=2)
    found = search([answers], labels)
    corrected = found.correction.correct(answers)
    assert np.isfinite(corrected).all()
    # The best answer to each class is the share of the labels there.
    given = answers.argmax(axis=1)
    best = np.stack(
        [np.bincount(labels[given == c], minlength=3) for c in given]
    )
    best = best / best.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(corrected, best, atol=0.1)


def test_teachers_that_err_differently_are_better_together():
    truth = true_probs(3000, classes=4)
    one = truth @ (np.eye(4) + np.eye(4)[[1, 0, 2, 3]])
    other = truth @ (np.eye(4) + np.eye(4)[[0, 1, 3, 2]])
    labels = draw(truth, seed=1)
    few, new = slice(0, 500), slice(500, None)

    def score(teachers):
        found = search([t[few] for t in teachers], labels[few])
        rows = [t[new] / t[new].sum(axis=1, keepdims=True) for t in teachers]
        corrected = found.correction.correct(rows if len(rows) > 1 else rows[0])
        return nll(corrected, labels[new])

    together = score([one, other])
    assert together < min(score([one]), score([other])) - 0.1


def test_a_useless_teacher_does_not_harm_a_good_one():
    truth = true_probs(1500)
    noise = np.random.default_rng(7).dirichlet([1.0] * 3, size=1500)
    labels = draw(truth, seed=1)
    found = search([truth[:300], noise[:300]], labels[:300])
    corrected = found.correction.correct([truth[300:], noise[300:]])
    assert nll(corrected, labels[300:]) < nll(truth[300:], labels[300:]) + 0.03


def test_a_teacher_of_other_classes_enters_step_2():
    truth = true_probs(2000)
    # Five groups that tell the classes apart, in an order of their own.
    groups = truth @ np.random.default_rng(3).dirichlet([0.3] * 5, size=3)
    labels = draw(truth, seed=1)
    found = search([groups[:500]], labels[:500], num_classes=3)
    assert found.correction.teacher_classes == (5,)
    corrected = found.correction.correct(groups[500:])
    shares = np.bincount(labels[:500], minlength=3) / 500
    constant = np.tile(shares, (1500, 1))
    assert nll(corrected, labels[500:]) < nll(constant, labels[500:]) - 0.1


def test_classes_without_labels_keep_the_teachers_probability():
    truth = true_probs(400, classes=4)
    seen = truth[:, :3] / truth[:, :3].sum(axis=1, keepdims=True)
    labels = draw(seen, seed=1)
    teacher = truth * [5.0, 1.0, 0.3, 1.0]
    teacher /= teacher.sum(axis=1, keepdims=True)
    found = search([teacher], labels)
    corrected = found.correction.correct(teacher)
    assert found.correction.kept_classes == (3,)
    np.testing.assert_allclose(corrected[:, 3], teacher[:, 3], atol=1e-6)
    learned = search([teacher], labels, random_sample=True)
    assert learned.correction.correct(teacher)[:, 3].mean() < 0.03
