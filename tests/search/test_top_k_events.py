"""A search on a teacher's k + 1 events, and the loss that carries it."""

import numpy as np
import pytest

from keras_ptloss import ProxyTeacherSearch
from keras_ptloss.losses import TopKPTLoss
from keras_ptloss.search import GradientSearch, top_k_events

CLASSES, K, ROWS = 40, 4, 3000


def softmax(z):
    z = np.exp(z - z.max(axis=-1, keepdims=True))
    return z / z.sum(axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def text():
    """Targets of an over-confident teacher, what came, and the truth."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(ROWS, CLASSES)) * 3
    truth, teacher = softmax(logits), softmax(1.6 * logits)
    labels = (truth.cumsum(-1) < rng.random((ROWS, 1))).sum(-1)
    ids = np.argsort(-teacher, axis=-1)[:, :K]
    t = np.take_along_axis(teacher, ids, axis=-1)
    return np.stack([ids, np.log(t)], axis=-1), labels, teacher


class TestRows:
    def test_merge_all_others(self, text):
        y_true, labels, teacher = text
        rows, events = top_k_events(y_true, labels)
        for n in range(200):
            given = y_true[n, :, 0].astype(int)
            others = np.delete(teacher[n], given).sum()
            np.testing.assert_allclose(
                rows[n], [*teacher[n, given], others], atol=1e-9
            )
            position = [*given, labels[n]].index(labels[n])
            assert events[n] == position

    def test_rest_padding_and_what_is_left_out(self):
        log = np.log
        y_true = [
            [[3, log(0.5)], [-1, log(0.2)], [5, log(0.3)]],
            [[3, log(0.5)], [-2, 0.0], [5, log(0.3)]],
            [[-2, 0.0], [-2, 0.0], [-2, 0.0]],
            [[3, log(0.5)], [2, log(0.1)], [5, log(0.3)]],
        ]
        rows, events = top_k_events(y_true, np.array([5, 2, 5, -100]))
        np.testing.assert_allclose(
            rows,
            [
                [0.5, 0.0, 0.3, 0.2],
                [0.5, 0.0, 0.3, 0.2],
                [0.0, 0.0, 0.0, 1.0],
                [0.5, 0.1, 0.3, 0.1],
            ],
            atol=1e-12,
        )
        assert events.tolist() == [2, 3, -1, -1]

    def test_the_rest_as_the_last_entry(self, text):
        """As `TokenLabels` gives it, also beside padding: one column of it."""
        y_true, labels, _ = text
        tail = np.log(1 - np.exp(y_true[..., 1]).sum(-1))
        own = np.stack([np.full(ROWS, -1.0), tail], axis=-1)[:, None]
        with_rest = np.concatenate([y_true, own], axis=1)
        with_rest[0] = -2, 0
        rows, events = top_k_events(with_rest, labels)
        expected = top_k_events(y_true, labels)
        assert rows.shape == (ROWS, K + 1) and events[0] == -1
        np.testing.assert_allclose(rows[1:], expected[0][1:], atol=1e-9)
        np.testing.assert_array_equal(events[1:], expected[1][1:])

    def test_leading_axes(self, text):
        y_true, labels, _ = text
        rows, events = top_k_events(
            y_true[:6].reshape(2, 3, K, 2), labels[:6].reshape(2, 3)
        )
        flat = top_k_events(y_true[:6], labels[:6])
        np.testing.assert_array_equal(rows, flat[0])
        np.testing.assert_array_equal(events, flat[1])

    @pytest.mark.parametrize(
        "labels, match",
        [(np.zeros(3, int), r"shape \(2,\)"), (np.zeros(2), "float64 of")],
    )
    def test_labels(self, labels, match):
        y_true = np.log(np.full((2, 1, 2), 0.5))
        y_true[..., 0] = 1.0
        with pytest.raises(ValueError, match=match):
            top_k_events(y_true, labels)

    @pytest.mark.parametrize(
        "y_true, match",
        [
            ([[[1, -1.0], [1, -2.0]]], "each id once"),
            (None, r"`y_true` must hold ids.*y_true of shape \(\)$"),
            (3.0, r"`y_true` must hold ids.*y_true of shape \(\)$"),
            ("a", "`y_true` must be numbers.*y_true='a'"),
        ],
    )
    def test_targets(self, y_true, match):
        with pytest.raises(ValueError, match=match):
            top_k_events(y_true, np.zeros(1, int))


def test_search_finds_the_temperature_and_the_loss_takes_it(text):
    """Of the k + 1 events the best temperature is near the truth's."""
    y_true, labels, _ = text
    rows, events = top_k_events(y_true, labels)
    search = ProxyTeacherSearch(
        GradientSearch(order=2, calibration="temperature", penalty=0.001)
    )
    result = search.search(rows, events, ignore_class=-1)
    assert result.score < result.score_at_zero - 0.02
    loss = TopKPTLoss(
        result.epsilon,
        teacher_temperature=1 / float(result.correction.scale),
        from_logits=True,
    )
    # At the proxy the loss is least: students on the events end there.
    proxy = result.proxy_teacher(rows[:50]).probabilities
    rest = proxy[:, -1:] / (CLASSES - K)
    students = np.repeat(rest, CLASSES, axis=1)
    ids = y_true[:50, :, 0].astype(int)
    np.put_along_axis(students, ids, proxy[:, :-1], axis=-1)
    logits = np.log(students).astype("float32")
    least = float(loss(y_true[:50], logits))
    rng = np.random.default_rng(0)
    for _ in range(5):
        other = logits + 0.1 * rng.normal(size=logits.shape)
        assert float(loss(y_true[:50], other.astype("float32"))) > least
