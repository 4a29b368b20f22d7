"""Distillers of a loss that corrects several teachers together."""

import helpers
import keras
import numpy as np
import pytest
from distillers import CLASSES, labels, logits, make_linear

from keras_ptloss import Correction, Distiller, ProxyTeacherSearch, PTLoss
from keras_ptloss.losses import Flooding
from keras_ptloss.search import CalibrationSearch

RNG = np.random.default_rng(0)
COUNTS = (3, 5)
CORRECTION = Correction(
    scale=RNG.normal(size=(CLASSES, 8)) / 2,
    bias=RNG.normal(size=CLASSES),
    teachers=COUNTS,
    teacher_from_logits=(True, False),
)


def make_teachers():
    return [make_linear(3, seed=5), make_linear(5, "softmax", seed=6)]


def make(correction=CORRECTION, teachers=None, student=None, **arguments):
    student = student or make_linear(seed=1)
    teachers = teachers or make_teachers()
    distiller = Distiller(student, teachers, **arguments)
    distiller.compile("sgd", loss=correction.loss(from_logits=True))
    return distiller


def kl(q, student_logits):
    log_p = np.log(helpers.softmax(student_logits))
    return np.mean(np.sum(q * (np.log(q) - log_p), axis=1))


def corrected(teachers, x):
    return CORRECTION.teacher([t.predict(x, verbose=0) for t in teachers])


def test_loss_and_agreement(x):
    teachers, student = make_teachers(), make_linear(seed=1)
    distiller = make(teachers=teachers, student=student)
    logs = distiller.evaluate(x, verbose=0, return_dict=True)
    q, outputs = corrected(teachers, x), logits(student, x)
    np.testing.assert_allclose(logs["loss"], kl(q, outputs), rtol=1e-4)
    same = np.mean(q.argmax(axis=1) == outputs.argmax(axis=1))
    np.testing.assert_allclose(logs["teacher_agreement"], same)


@pytest.mark.parametrize(
    "wrap", [lambda loss: [loss], lambda loss: Flooding(loss, 0.0)]
)
def test_the_same_in_a_list_and_flooded(x, wrap):
    """`|L - 0| + 0` is `L`; both were refused."""
    logs = []
    for loss in (CORRECTION.loss(from_logits=True),) * 2:
        distiller = Distiller(make_linear(seed=1), make_teachers())
        distiller.compile("sgd", wrap(loss) if logs else loss)
        found = distiller.evaluate(x, verbose=0, return_dict=True)
        logs.append({name: float(value) for name, value in found.items()})
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)


def test_fit_is_that_on_stored_outputs(x):
    teachers = make_teachers()
    live, stored = make_linear(seed=1), make_linear(seed=1)
    loss = CORRECTION.loss(from_logits=True)
    make(teachers=teachers, student=live).fit(
        x, batch_size=8, epochs=2, shuffle=False, verbose=0
    )
    stored.compile("sgd", loss=loss)
    outputs = [teacher.predict(x, verbose=0) for teacher in teachers]
    stored.fit(
        x,
        np.concatenate(outputs, axis=1),
        batch_size=8,
        epochs=2,
        shuffle=False,
        verbose=0,
    )
    for one, two in zip(live.get_weights(), stored.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def test_from_search_to_training(x):
    """What the README says of one teacher, with a list of two."""
    teachers = [make_linear(seed=5), make_linear(5, seed=6)]
    search = ProxyTeacherSearch(CalibrationSearch("matrix"))
    with pytest.warns(UserWarning):
        result = search.search(
            teachers, labels(), inputs=x, from_logits=True, classes=CLASSES
        )
    student = make_linear(seed=1)
    distiller = Distiller(student, teachers)
    distiller.compile("adam", loss=result.loss(from_logits=True))
    history = distiller.fit(x, epochs=3, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]


def test_hard_labels_and_metrics(x):
    teachers, student = make_teachers(), make_linear(seed=1)
    hard = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    distiller = make(
        teachers=teachers,
        student=student,
        hard_label_loss=hard,
        hard_label_weight=0.25,
    )
    logs = distiller.evaluate(x, labels(), verbose=0, return_dict=True)
    outputs = logits(student, x)
    soft = kl(corrected(teachers, x), outputs)
    nll = helpers.nll(helpers.softmax(outputs), labels())
    np.testing.assert_allclose(
        logs["loss"], 0.75 * soft + 0.25 * nll, rtol=1e-4
    )


def test_save_reload_and_continue(x, tmp_path):
    teachers = make_teachers()
    distiller = make(teachers=teachers)
    distiller.fit(x, shuffle=False, verbose=0)
    distiller.save(tmp_path / "distiller.keras")
    loaded = keras.saving.load_model(tmp_path / "distiller.keras")
    with pytest.raises(ValueError, match="must be the 2 teachers"):
        loaded.teacher = teachers[0]
    loaded.teacher = teachers
    for model in (distiller, loaded):
        model.fit(x, shuffle=False, verbose=0)
    np.testing.assert_allclose(
        distiller.predict(x, verbose=0),
        loaded.predict(x, verbose=0),
        rtol=1e-5,
    )


def test_teachers_that_are_not_built(x):
    late = [
        keras.Sequential([keras.layers.Dense(3)]),
        keras.Sequential([keras.layers.Dense(5, "softmax")]),
    ]
    distiller = make(teachers=late)
    history = distiller.fit(x, epochs=2, verbose=0).history
    assert np.all(np.isfinite(history["loss"]))


def test_binary_head_beside_another(x):
    correction = Correction(
        scale=RNG.normal(size=(CLASSES, 5)), teachers=(3, 2)
    )
    teachers = [make_linear(3, "softmax", seed=5), make_linear(1, "sigmoid")]
    student = make_linear(seed=1)
    distiller = make(correction, teachers, student)
    logs = distiller.evaluate(x, verbose=0, return_dict=True)
    q = correction.teacher([t.predict(x, verbose=0) for t in teachers])
    np.testing.assert_allclose(logs["loss"], kl(q, logits(student, x)), 1e-4)


@pytest.mark.parametrize("kind", ["pt_loss", "correction"])
def test_one_teacher_of_other_classes(x, kind):
    """Two such teachers are one, their mean."""
    scale, teacher = RNG.normal(size=(CLASSES, 5)), make_linear(5, seed=5)
    if kind == "pt_loss":
        loss = PTLoss(0.5, from_logits=True, teacher_scale=scale)
    else:
        loss = Correction(
            scale=scale, teachers=(5,), teacher_from_logits=True
        ).loss(from_logits=True)
    student = make_linear(seed=1)
    values = []
    for teachers in (teacher, [teacher, teacher]):
        distiller = Distiller(student, teachers)
        distiller.compile("sgd", loss=loss)
        logs = distiller.evaluate(x, verbose=0, return_dict=True)
        values.append(logs["loss"])
    z = logits(teacher, x)
    t = helpers.softmax(z @ scale.T)
    if kind == "pt_loss":
        expected = np.mean(
            helpers.pt_loss_of_logits(t, logits(student, x), 0.5)
        )
    else:  # of log-probabilities: their shift counts in a matrix
        z = np.log(helpers.softmax(z))
        expected = kl(helpers.softmax(z @ scale.T), logits(student, x))
        t = helpers.softmax(z @ scale.T)
    np.testing.assert_allclose(values, [expected] * 2, rtol=1e-4)
    same = np.mean(t.argmax(axis=1) == logits(student, x).argmax(axis=1))
    np.testing.assert_allclose(logs["teacher_agreement"], same)


class TestErrors:
    def test_number_of_teachers(self):
        match = "must be the 2 teachers that the loss.*Received: 1 teachers"
        with pytest.raises(ValueError, match=match):
            make(teachers=make_teachers()[:1])

    def test_classes_of_a_teacher(self):
        teachers = [make_linear(3, seed=5), make_linear(4, "softmax")]
        with pytest.raises(ValueError, match="the 5 classes.*with 4 outputs"):
            make(teachers=teachers)

    def test_classes_seen_on_the_first_batch(self, x):
        late = keras.Sequential([keras.layers.Dense(4, "softmax")])
        distiller = make(teachers=[make_linear(3, seed=5), late])
        with pytest.raises(ValueError, match=r"`teacher\[1\]`.*5 classes"):
            distiller.fit(x, verbose=0)

    def test_form_of_a_teacher(self):
        teachers = [make_linear(3, "softmax"), make_linear(5, "softmax")]
        with pytest.raises(ValueError, match="must be False for a model"):
            make(teachers=teachers)

    def test_weights(self):
        with pytest.raises(ValueError, match="`teacher_weights` must be None"):
            make(teacher_weights=[0.5, 0.5])

    def test_student_of_other_classes(self, x):
        with pytest.raises(ValueError, match="same number of classes"):
            make(student=make_linear(4)).fit(x, verbose=0)

    def test_a_plain_loss_needs_the_students_classes(self):
        distiller = Distiller(make_linear(), make_teachers())
        with pytest.raises(ValueError, match="same number of classes.*with 5"):
            distiller.compile("sgd", loss=PTLoss(0.5, from_logits=True))
