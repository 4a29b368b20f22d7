"""The fit of PTLoss's own coefficients."""

import helpers
import numpy as np
import pytest
import scipy.optimize

from keras_ptloss import proxy_teacher
from keras_ptloss.search import Examples, GradientSearch


def silent(done, total):
    pass


@pytest.fixture(scope="module")
def examples():
    """A teacher of three classes that is biased to class 0."""
    truth = helpers.dirichlet(0, 300, 3)
    labels = helpers.draw_labels(truth, seed=1)
    teacher = helpers.skewed(truth, [1.0, 0.2, 0.2])
    return Examples([teacher], labels, np.ones(300), 3)


def nll(examples, epsilon):
    q = proxy_teacher(examples.teacher_probs[0], epsilon).probabilities
    return helpers.nll(q, examples.labels)


def test_order_one_is_the_minimum_of_a_scalar_search(examples):
    timid = helpers.softmax(0.3 * np.log(examples.teacher_probs[0]))
    timid = Examples([timid], examples.labels, np.ones(300), 3)
    found = GradientSearch().run(timid, silent)
    best = scipy.optimize.minimize_scalar(
        lambda e: nll(timid, e), bounds=(-0.999, 10), method="bounded"
    )
    assert 0.0 < best.x < 9.0
    np.testing.assert_allclose(found.trials["score"], best.fun, rtol=1e-6)
    np.testing.assert_allclose(
        nll(timid, found.correction.epsilon), best.fun, rtol=1e-6
    )


def test_per_class_repairs_a_bias(examples):
    found = GradientSearch(order=2, per_class=True).run(examples, silent)
    shared = GradientSearch(order=2).run(examples, silent)
    epsilon = found.correction.epsilon
    assert epsilon.shape == (3, 2)
    assert np.all(epsilon >= [-1.0, -0.5])
    assert np.all(epsilon <= 10.0)
    np.testing.assert_allclose(found.trials["score"], nll(examples, epsilon))
    assert found.trials["score"][0] < shared.trials["score"][0] - 0.01
    assert found.trials["unconverged"] == [0]


def test_penalty_draws_epsilon_to_zero(examples):
    norms = [
        np.linalg.norm(
            GradientSearch(penalty=penalty)
            .run(examples, silent)
            .correction.epsilon
        )
        for penalty in (0.0, 0.1, 100.0)
    ]
    assert norms[0] > norms[1] > norms[2]
    assert norms[2] < 0.01


def test_weights_are_repetitions(examples):
    counts = np.arange(300) % 3
    weighted = Examples(
        examples.teacher_probs, examples.labels, counts / counts.mean(), 3
    )
    repeated = Examples(
        [np.repeat(examples.teacher_probs[0], counts, axis=0)],
        np.repeat(examples.labels, counts),
        np.ones(counts.sum()),
        3,
    )
    found, expected = (
        GradientSearch().run(e, silent).correction.epsilon
        for e in (weighted, repeated)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_class_without_a_label_is_kept_and_ignored(examples):
    """The fit of the others is that of a teacher without the class."""
    labels = np.where(examples.labels == 2, 0, examples.labels)
    rare = Examples(examples.teacher_probs, labels, np.ones(300), 3)
    found = GradientSearch(per_class=True).run(rare, silent)
    assert tuple(found.correction.kept_classes) == (2,)
    q = proxy_teacher(examples.teacher_probs[0], found.correction.epsilon)
    others = q.probabilities[:, :2]
    others = others / others.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(
        found.trials["score"], helpers.nll(others, labels), rtol=1e-9
    )


def test_note_on_bounds():
    labels = np.arange(60) % 3
    teacher = np.full((60, 3), 0.3)
    teacher[np.arange(60), labels] = 0.4  # always right, never sure
    examples = Examples([teacher], labels, np.ones(60), 3)
    found = GradientSearch().run(examples, silent)
    assert "ended at a bound" in found.notes[0]


def test_several_teachers_are_refused(examples):
    both = Examples(
        2 * examples.teacher_probs, examples.labels, np.ones(300), 3
    )
    with pytest.raises(ValueError, match='"gradient" takes one teacher'):
        GradientSearch().run(both, silent)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": 0}, "`order` must be"),
        ({"per_class": 1}, "`per_class` must be"),
        ({"penalty": -1.0}, "`penalty` must be"),
    ],
)
def test_wrong_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradientSearch(**arguments)
