"""Binary heads: one sigmoid output, or one logit, and two columns alike."""

import helpers
import keras
import numpy as np
import pytest
from distillers import logits, make_linear

from keras_ptloss import Distiller, PTLoss
from keras_ptloss.metrics import KLToTeacher

# Columns, activation.
HEADS = {
    "sigmoid": (1, "sigmoid"),
    "logit": (1, None),
    "softmax": (2, "softmax"),
    "logits": (2, None),
}


def events(outputs, head):
    """Write outputs out as `[1 - p, p]`, in float64."""
    outputs = np.asarray(outputs, "float64")
    columns, activation = HEADS[head]
    if columns == 1:
        p = outputs if activation else 1 / (1 + np.exp(-outputs))
        return np.concatenate([1 - p, p], axis=1)
    return outputs if activation else helpers.softmax(outputs)


def distiller_of(student_head, *teacher_heads, epsilon=0.5):
    flags = {
        "from_logits": HEADS[student_head][1] is None,
        "teacher_from_logits": HEADS[teacher_heads[0]][1] is None,
    }
    student = make_linear(*HEADS[student_head], seed=1)
    teachers = [
        make_linear(*HEADS[head], seed=2 + i)
        for i, head in enumerate(teacher_heads)
    ]
    distiller = Distiller(student, teachers)
    distiller.compile(keras.optimizers.SGD(0.1), loss=PTLoss(epsilon, **flags))
    return distiller, student, teachers


@pytest.mark.parametrize("teacher_head", HEADS)
@pytest.mark.parametrize("student_head", HEADS)
def test_loss_and_agreement(x, student_head, teacher_head):
    distiller, student, (teacher,) = distiller_of(student_head, teacher_head)
    logs = distiller.evaluate(x, verbose=0, return_dict=True)
    p = events(logits(student, x), student_head)
    t = events(logits(teacher, x), teacher_head)
    expected = helpers.pt_loss(t, p, 0.5).mean()
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)
    agreement = np.mean((p[:, 1] > 0.5) == (t[:, 1] > 0.5))
    np.testing.assert_allclose(logs["teacher_agreement"], agreement)
    history = distiller.fit(x, epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]


@pytest.mark.parametrize(
    "heads", [("sigmoid", "sigmoid"), ("sigmoid", "softmax")]
)
def test_mean_of_probabilities(x, heads):
    distiller, student, teachers = distiller_of("logit", *heads)
    logs = distiller.evaluate(x, verbose=0, return_dict=True)
    rows = [
        events(logits(teacher, x), head)
        for teacher, head in zip(teachers, heads, strict=True)
    ]
    p = events(logits(student, x), "logit")
    expected = helpers.pt_loss(np.mean(rows, axis=0), p, 0.5).mean()
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)


def test_mean_of_logits_in_one_and_two_columns(x):
    """`[0, z]` and `[a, b]`: the log-odds are averaged."""
    distiller, student, teachers = distiller_of("logit", "logit", "logits")
    logs = distiller.evaluate(x, verbose=0, return_dict=True)
    one, two = (logits(teacher, x) for teacher in teachers)
    odds = (one + two[:, 1:] - two[:, :1]) / 2
    t, p = events(odds, "logit"), events(logits(student, x), "logit")
    expected = helpers.pt_loss(t, p, 0.5).mean()
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)


def test_a_loss_of_keras(x):
    """It takes one column for one column, and the teacher for labels."""
    student, teacher = (make_linear(1, "sigmoid", seed=seed) for seed in (1, 2))
    distiller = Distiller(student, teacher, teacher_metrics=[KLToTeacher()])
    distiller.compile("sgd", loss=keras.losses.BinaryCrossentropy())
    logs = distiller.evaluate(x, verbose=0, return_dict=True)
    p, t = (events(logits(m, x), "sigmoid") for m in (student, teacher))
    expected = -np.sum(t * np.log(p), axis=1).mean()
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)
    kl = helpers.pt_loss(t, p, 0.0).mean()
    np.testing.assert_allclose(logs["kl_to_teacher"], kl, rtol=1e-4)


def test_a_loss_of_keras_does_not_know_one_column_for_two(x):
    distiller = Distiller(make_linear(1, "sigmoid"), make_linear(2, "softmax"))
    distiller.compile("sgd", loss="mse")
    with pytest.raises(ValueError, match="same number of classes"):
        distiller.fit(x, verbose=0)
    mixed = [make_linear(1, "sigmoid"), make_linear(2, "softmax")]
    distiller = Distiller(make_linear(1, "sigmoid", seed=1), mixed)
    distiller.compile("sgd", loss="mse")
    with pytest.raises(ValueError, match="same number of classes"):
        distiller.fit(x, verbose=0)
