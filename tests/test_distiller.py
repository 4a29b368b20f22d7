"""Distiller: its losses by NumPy, its training as Keras's of the student."""

import os
import subprocess
import sys
import weakref

import keras
import numpy as np
import pytest
import scipy.special
from keras import layers, ops

from keras_ptloss import Distiller, PTLoss
from keras_ptloss.losses import Flooding, TeacherLoss
from keras_ptloss.metrics import (
    BrierScore,
    ExpectedCalibrationError,
    KLToTeacher,
    TeacherAgreement,
)

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 4)).astype("float32")
Y = RNG.integers(0, 3, size=16)
RUN = {"batch_size": 8, "verbose": 0}
FIT = {**RUN, "shuffle": False}


def network(classes=3, activation=None, *, seed=0, regularizer=None):
    """Return a model of one dense layer, with probabilities or logits."""
    init = keras.initializers.GlorotUniform(seed=seed)
    dense = layers.Dense(
        classes,
        activation,
        kernel_initializer=init,
        kernel_regularizer=regularizer,
    )
    return keras.Sequential([keras.Input((4,)), dense])


def distil(
    student, teacher, loss=None, *, optimizer="sgd", graph=False, **arguments
):
    """Return a compiled distiller; eager steps take a fraction of the time."""
    distiller = Distiller(student=student, teacher=teacher, **arguments)
    loss = PTLoss(0.5, from_logits=True) if loss is None else loss
    distiller.compile(optimizer, loss=loss, run_eagerly=not graph)
    return distiller


def still():
    """Return an optimizer that changes nothing."""
    return keras.optimizers.SGD(0.0)


def outputs(model, x=X):
    return model.predict(x, verbose=0)


def probs(model, x=X):
    """Return what a model of logits says, as probabilities."""
    return scipy.special.softmax(outputs(model, x).astype("float64"), axis=-1)


def pt_losses(t, p, epsilon=0.5):
    """Return Eq. 7 of order 1, one value per row."""
    kl = scipy.special.rel_entr(t, p).sum(-1)
    return kl + epsilon * (t * (1.0 - p)).sum(-1)


def nll(p, labels=Y):
    return -np.log(np.take_along_axis(p, labels[..., None], -1))[..., 0]


def hard_loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def evaluate(distiller, *data, **options):
    options = {**RUN, **options}
    return distiller.evaluate(*data, return_dict=True, **options)


def run(distiller, call, *data, **options):
    """Return the logs of one call."""
    if call == "fit":
        history = distiller.fit(*data, **FIT, **options).history
        return {name: values[-1] for name, values in history.items()}
    if call == "evaluate":
        return evaluate(distiller, *data, **options)
    return getattr(distiller, call)(*data, return_dict=True, **options)


# ---- The same training as Keras's own of the student. ----


def deep(kind, seed):
    """Return a model in which training and inference differ."""
    init = keras.initializers.GlorotUniform(seed=seed)
    steps = [
        layers.Dense(8, "tanh", kernel_initializer=init),
        layers.BatchNormalization(momentum=0.5),
        layers.Dropout(0.5, seed=seed),
        layers.Dense(3, kernel_initializer=init, kernel_regularizer="l2"),
    ]
    if kind == "deferred":
        return keras.Sequential(steps)
    if kind == "subclassed":
        return Subclassed(steps)
    inputs = x = keras.Input((4,))
    for step in steps:
        x = step(x)
    return keras.Model(inputs, x)


class Subclassed(keras.Model):
    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def call(self, x, training=None):
        for step in self.steps:
            x = step(x, training=training)
        return x


@pytest.fixture
def policy(request):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize(
    "kind, policy",
    [
        ("functional", "float32"),
        pytest.param("functional", "mixed_float16", marks=pytest.mark.ci),
        pytest.param("deferred", "float32", marks=pytest.mark.ci),
        pytest.param("subclassed", "float32", marks=pytest.mark.ci),
        pytest.param("functional", "mixed_bfloat16", marks=pytest.mark.ci),
    ],
    indirect=["policy"],
)
def test_trains_as_the_student_alone(kind, policy):
    """Dropout, batch norm, regularisers, loss scaling; also on batches."""
    student, alone = deep(kind, 1), deep(kind, 1)
    teacher = deep("functional", 2)
    targets = probs(teacher).astype("float32")
    distiller = Distiller(student=student, teacher=teacher)
    for model in (distiller, alone):
        model.compile(
            keras.optimizers.SGD(0.1), loss=PTLoss(0.5, from_logits=True)
        )
    before = teacher.get_weights()
    close = {"rtol": 1e-5 if policy == "float32" else 1e-2, "atol": 1e-6}
    ours = distiller.fit(X, **FIT, epochs=2).history["loss"]
    its = alone.fit(X, targets, **FIT, epochs=2).history["loss"]
    np.testing.assert_allclose(ours, its, **close)
    ours = evaluate(distiller, X)["loss"]
    its = evaluate(alone, X, targets)["loss"]
    np.testing.assert_allclose(ours, its, **close)
    for a, b in zip(student.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=close["rtol"], atol=1e-4)
    for a, b in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert type(distiller.optimizer) is type(alone.optimizer)
    assert outputs(distiller).dtype == outputs(alone).dtype
    assert teacher.trainable


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's tape")
def test_tape_keeps_nothing_of_the_teacher():
    """Its activations are gone when the student starts."""
    kept, alive = [], []

    class Record(layers.Layer):
        def call(self, x):
            x = 1.0 * x
            kept.append(weakref.ref(x))
            return x

    class Watch(layers.Layer):
        def call(self, x):
            alive.append(sum(reference() is not None for reference in kept))
            return x

    inputs = keras.Input((4,))
    teacher = keras.Sequential([inputs, Record(), layers.Dense(3)])
    student = keras.Sequential([inputs, Watch(), layers.Dense(3)])
    distiller = Distiller(student=student, teacher=teacher)
    loss = PTLoss(0.5, from_logits=True)
    distiller.compile("sgd", loss=loss, run_eagerly=True)
    kept.clear(), alive.clear()
    distiller.train_on_batch(X)
    assert len(kept) == 1 and alive == [0]


@pytest.mark.parametrize("kind", ["tf.data", "PyDataset"])
def test_pipelines_train_as_arrays_do(kind):
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return (X[8 * index : 8 * index + 8],)

    data = Batches()
    if kind == "tf.data":
        tf = pytest.importorskip("tensorflow")
        data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
    one, two = (distil(network(seed=1), network()) for _ in range(2))
    ours = one.fit(data, shuffle=False, verbose=0).history["loss"]
    np.testing.assert_allclose(ours, two.fit(X, **FIT).history["loss"], 1e-5)


def test_models_of_different_inputs():
    student, teacher = network(), network(seed=1)
    distiller = distil(
        student, teacher, student_inputs="small", teacher_inputs="large"
    )
    data = {"small": X[::-1].copy(), "large": X}
    expected = pt_losses(probs(teacher), probs(student, X[::-1])).mean()
    np.testing.assert_allclose(
        evaluate(distiller, data)["loss"], expected, 1e-5
    )
    assert distiller.predict({"small": X}, verbose=0).shape == (16, 3)


def test_sample_weights_and_class_weights():
    student, teacher = network(), network(seed=1)
    distiller = distil(student, teacher, optimizer=still())
    values = pt_losses(probs(teacher), probs(student))
    weight = np.arange(16.0)
    logs = evaluate(distiller, X, Y, sample_weight=weight)
    np.testing.assert_allclose(logs["loss"], (values * weight).mean(), 1e-5)
    weights = np.array([1.0, 3.0, 0.0])
    by_class = dict(enumerate(weights))
    logs = run(distiller, "fit", X, Y, class_weight=by_class)
    np.testing.assert_allclose(logs["loss"], (values * weights[Y]).mean(), 1e-5)


def test_masks_reach_the_loss():
    """Padded tokens do not count."""
    tokens = np.array([[1, 2, 0, 0], [3, 0, 0, 0]])

    def tagger(seed):
        init = keras.initializers.RandomNormal(seed=seed)
        embed = layers.Embedding(
            5, 6, mask_zero=True, embeddings_initializer=init
        )
        model = keras.Sequential([embed, layers.Dense(3, None)])
        model.build((None, 4))
        return model

    student, teacher = tagger(1), tagger(2)
    loss = evaluate(distil(student, teacher), tokens)["loss"]
    values = pt_losses(probs(teacher, tokens), probs(student, tokens))
    np.testing.assert_allclose(loss, values[tokens > 0].mean(), rtol=1e-5)


def test_compile_without_a_loss():
    """The student's own losses are minimised, as in Keras."""
    dense = layers.Dense(3, use_bias=False, kernel_regularizer="l2")
    student = keras.Sequential([keras.Input((4,)), dense])
    distiller = Distiller(student=student, teacher=network(seed=1))
    distiller.compile("sgd")
    history = distiller.fit(X, epochs=2, verbose=0).history
    assert history["loss"][1] < history["loss"][0]


# ---- What models give, and what the loss compares. ----


HEADS = {
    "softmax": (3, "softmax"),
    "logits": (3, None),
    "sigmoid": (1, "sigmoid"),
    "logit": (1, None),
    "two": (2, "softmax"),
}


def head_probs(model, activation):
    """Return a head's probabilities, two columns for one."""
    z = outputs(model).astype("float64")
    if z.shape[-1] == 1:
        p = scipy.special.expit(z) if activation is None else z
        return np.concatenate([1 - p, p], axis=-1)
    return z if activation else scipy.special.softmax(z, axis=-1)


@pytest.mark.parametrize(
    "student_head, teacher_heads",
    [
        ("softmax", ["softmax"]),
        ("softmax", ["logits"]),
        ("logits", ["softmax", "logits"]),
        ("sigmoid", ["logit"]),
        ("logit", ["sigmoid", "two"]),
        ("two", ["logit", "sigmoid"]),
    ],
)
def test_mean_of_probabilities(student_head, teacher_heads):
    """Whatever form they have; the weights are 3 : 1."""
    student = network(*HEADS[student_head])
    teachers = [
        network(*HEADS[head], seed=1 + k)
        for k, head in enumerate(teacher_heads)
    ]
    weights = [3, 1][: len(teachers)]
    from_logits = HEADS[student_head][1] is None
    distiller = distil(
        student,
        teachers,
        PTLoss(0.5, from_logits=from_logits),
        teacher_weights=weights,
        teacher_metrics=[
            KLToTeacher(from_logits=from_logits),
            TeacherAgreement(from_logits=from_logits),
        ],
    )
    t = np.average(
        [
            head_probs(teacher, HEADS[head][1])
            for teacher, head in zip(teachers, teacher_heads, strict=True)
        ],
        axis=0,
        weights=weights,
    )
    p = head_probs(student, HEADS[student_head][1])
    logs = evaluate(distiller, X)
    np.testing.assert_allclose(logs["loss"], pt_losses(t, p).mean(), 1e-5)
    kl = scipy.special.rel_entr(t, p).sum(-1).mean()
    np.testing.assert_allclose(logs["kl_to_teacher"], kl, rtol=1e-4)
    same = np.mean(t.argmax(-1) == p.argmax(-1))
    np.testing.assert_allclose(logs["teacher_agreement"], same)


def test_a_loss_of_keras_for_binary_heads():
    """It takes one column for one column."""
    student, teacher = network(1, "sigmoid"), network(2, seed=1)
    distiller = distil(student, teacher, keras.losses.BinaryCrossentropy())
    p, t = head_probs(student, "sigmoid"), probs(teacher)
    expected = -(t * np.log(p)).sum(-1).mean()
    np.testing.assert_allclose(evaluate(distiller, X)["loss"], expected, 1e-5)


def test_a_teacher_of_weight_zero_is_not_run():
    """Its logits may be -inf."""
    student, teacher = network(), network(seed=1)
    broken = network(seed=2)
    broken.set_weights([np.full((4, 3), -np.inf), np.full(3, -np.inf)])
    both = distil(student, [teacher, broken], teacher_weights=[1.0, 0.0])
    expected = pt_losses(probs(teacher), probs(student)).mean()
    np.testing.assert_allclose(evaluate(both, X)["loss"], expected, rtol=1e-5)


class SideBySide(TeacherLoss):
    """Squared distance to the teachers' probabilities, corrected: the sum."""

    def __init__(self):
        super().__init__({}, from_logits=True, name="side_by_side")
        self.correction = self

    @property
    def teacher_classes(self):
        return (3, 2)

    def apply(self, teacher_probs):
        """Return a teacher of the student's classes."""
        of_student = ops.array([0.0, 1.0, 1.0], dtype="float32")
        return teacher_probs[..., 2:] * of_student

    def call(self, y_true, y_pred):
        weights = ops.arange(1.0, 6.0, dtype="float32")
        return ops.sum(y_true * weights, -1) + 0.0 * ops.sum(y_pred, -1)


@pytest.mark.parametrize("wrap", [lambda loss: loss, lambda loss: [loss]])
def test_teachers_side_by_side(wrap):
    """In the order of the loss; metrics see the corrected teacher."""
    teachers = [network(3, seed=1), network(1, "sigmoid", seed=2)]
    student = network()
    distiller = distil(student, teachers, wrap(SideBySide()))
    logs = evaluate(distiller, X)
    t = np.concatenate(
        [probs(teachers[0]), head_probs(teachers[1], "sigmoid")], axis=-1
    )
    np.testing.assert_allclose(logs["loss"], (t @ np.arange(1, 6)).mean(), 1e-5)
    same = (t[:, 3:].argmax(-1) + 1 == outputs(student).argmax(-1)).mean()
    np.testing.assert_allclose(logs["teacher_agreement"], same)
    distiller.teacher = teachers[::-1]
    with pytest.raises(ValueError, match=r"`teacher`.*\(3, 2\).*\(2, 3\)"):
        evaluate(distiller, X)
    distiller.teacher = teachers[0]
    with pytest.raises(ValueError, match=r"`teacher`.*\(3, 2\).*\(3,\)"):
        evaluate(distiller, X)
    distiller.teacher = teachers
    distiller.teacher_weights = [1, 1]
    with pytest.raises(ValueError, match="`teacher_weights` must be None"):
        evaluate(distiller, X)


def test_a_flooded_loss_is_for_the_same_teachers():
    distiller = distil(
        network(),
        [network(3, seed=1), network(2, seed=2)],
        Flooding(SideBySide(), 0.0),
    )
    assert np.isfinite(evaluate(distiller, X)["loss"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.Softmax(),
        lambda: layers.Activation("softmax"),
        lambda: layers.Activation(ops.softmax),
        lambda: keras.Sequential([layers.Softmax()]),
    ],
)
def test_softmax_by_another_name(make):
    inputs = keras.Input((4,))
    teacher = keras.Model(inputs, make()(layers.Dense(3)(inputs)))
    student = network()
    loss = evaluate(distil(student, teacher), X)["loss"]
    expected = pt_losses(outputs(teacher), probs(student)).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_head_that_does_not_show_what_it_gives():
    inputs = keras.Input((4,))
    teacher = keras.Model(inputs, ops.softmax(layers.Dense(3)(inputs)))
    student = network()
    with pytest.raises(ValueError, match="`teacher_from_logits` must be True"):
        evaluate(distil(student, teacher), X)
    asked = distil(student, [teacher] * 2, teacher_from_logits=[False, False])
    expected = pt_losses(outputs(teacher), probs(student)).mean()
    np.testing.assert_allclose(evaluate(asked, X)["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "teacher, student, flag, match",
    [
        ((3, "log_softmax"), (3, "softmax"), None, "log_softmax.*teacher_from"),
        ((3, "relu"), (3, "softmax"), None, "`teacher`.*probabilities.*relu"),
        ((3, "relu"), (3, "softmax"), False, "`teacher`.*probabilities.*relu"),
        ((3, "softmax"), (3, "log_softmax"), None, "`student`.*log_softmax"),
        ((3, "softmax"), (3, "tanh"), None, "`student`.*tanh"),
        ((3, "softmax"), (3, None), None, "`from_logits` must be True"),
        ((5, "sigmoid"), (5, "softmax"), None, "5 independent sigmoids"),
        ((5, "sigmoid"), (5, "softmax"), True, "5 independent sigmoids"),
        ((5, "softmax"), (5, "sigmoid"), None, "`student`.*5 independent"),
        ((3, "softmax"), (3, "softmax"), True, "`teacher_from_logits` must"),
    ],
)
def test_heads_that_are_no_distribution(teacher, student, flag, match):
    distiller = distil(
        network(*student),
        network(*teacher, seed=1),
        PTLoss(0.0),
        graph=True,
        teacher_from_logits=flag,
    )
    with pytest.raises(ValueError, match=match):
        distiller.fit(X, verbose=0)


@pytest.mark.parametrize("part", ["loss", "hard_label_loss", "metric"])
def test_logits_taken_for_probabilities(part):
    """In the loss, the hard-label loss or a metric: a student of softmax."""
    loss = PTLoss(0.0, from_logits=part == "loss")
    hard = keras.losses.SparseCategoricalCrossentropy(part == "hard_label_loss")
    distiller = Distiller(
        student=network(activation="softmax"),
        teacher=network(seed=1),
        hard_label_loss=hard,
        hard_label_weight=0.5,
    )
    metric = BrierScore(from_logits=part == "metric")
    distiller.compile("sgd", loss=loss, metrics=[metric])
    with pytest.raises(ValueError, match="`from_logits` must be False"):
        distiller.fit(X, Y, verbose=0)


def test_log_softmax_and_logits_told():
    """Log-probabilities are logits."""
    student, teacher = network(activation="log_softmax"), network(seed=1)
    told = network(activation="log_softmax", seed=1)
    told.set_weights(teacher.get_weights())
    one = distil(student, teacher)
    two = distil(student, told, teacher_from_logits=True)
    np.testing.assert_allclose(
        evaluate(one, X)["loss"], evaluate(two, X)["loss"], rtol=1e-5
    )


# ---- True labels. ----


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_hard_labels(weight):
    student = network(regularizer=keras.regularizers.L2(0.01))
    teacher = network(seed=1)
    distiller = distil(
        student, teacher, hard_label_loss=hard_loss(), hard_label_weight=weight
    )
    soft = pt_losses(probs(teacher), probs(student)).mean()
    own = keras.ops.convert_to_numpy(sum(student.losses))
    expected = weight * nll(probs(student)).mean() + (1 - weight) * soft + own
    np.testing.assert_allclose(
        evaluate(distiller, X, Y)["loss"], expected, 1e-5
    )
    if weight:
        with pytest.raises(ValueError, match="`y` must be labels"):
            distiller.fit(X, verbose=0)
    else:
        np.testing.assert_allclose(evaluate(distiller, X)["loss"], soft + own)


def test_hard_labels_alone_need_no_teacher():
    distiller = distil(
        network(), None, hard_label_loss=hard_loss(), hard_label_weight=1.0
    )
    assert list(distiller.fit(X, Y, verbose=0).history) == ["loss"]
    distiller.hard_label_weight = 0.5
    with pytest.raises(ValueError, match="`teacher` must be a model"):
        distiller.fit(X, Y, verbose=0)


@pytest.mark.parametrize("loss", ["ours", "keras"])
@pytest.mark.parametrize("length", [4, 6])
def test_weights_of_sequences(length, loss):
    """One weight holds for a whole sequence; 6 tokens are not 6 sequences."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, length, 4)).astype("float32")
    y = rng.integers(0, 3, (6, length))
    weight = np.arange(1.0, 7.0)

    def tagger(seed, activation):
        init = keras.initializers.GlorotUniform(seed)
        dense = layers.Dense(3, activation, kernel_initializer=init)
        return keras.Sequential([keras.Input((length, 4)), dense])

    student, teacher = tagger(0, "softmax"), tagger(1, None)
    distiller = Distiller(
        student=student,
        teacher=teacher,
        hard_label_loss=keras.losses.SparseCategoricalCrossentropy(),
        hard_label_weight=0.5,
    )
    distiller.compile(
        still(),
        loss=PTLoss(0.0) if loss == "ours" else keras.losses.KLDivergence(),
        weighted_metrics=["accuracy"],
        run_eagerly=True,
    )
    options = {"sample_weight": weight, "batch_size": 6, "verbose": 0}
    logs = distiller.fit(x, y, **options).history
    p = outputs(student, x).astype("float64")
    values = 0.5 * nll(p, y) + 0.5 * pt_losses(probs(teacher, x), p, 0.0)
    expected = (weight[:, None] * values).mean()
    np.testing.assert_allclose(logs["loss"], [expected], rtol=1e-4)
    accuracy = np.average((p.argmax(-1) == y).mean(-1), weights=weight)
    np.testing.assert_allclose(logs["accuracy"], [accuracy], rtol=1e-5)


def labelled_distiller():
    distiller = Distiller(student=network(), teacher=network(seed=1))
    distiller.compile(
        still(),
        loss=PTLoss(0.5, from_logits=True),
        metrics=["accuracy", BrierScore(from_logits=True)],
    )
    return distiller


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("call", ["evaluate", "train_on_batch"])
def test_a_metric_without_labels_is_absent(call, first):
    """Whichever comes first, with labels or without."""
    distiller = labelled_distiller()
    p, t = probs(distiller.student), probs(distiller.teacher)
    accuracy = np.mean(p.argmax(-1) == Y)
    for labelled in (first, not first, first):
        distiller.reset_metrics()
        logs = run(distiller, call, *((X, Y) if labelled else (X,)))
        np.testing.assert_allclose(logs["loss"], pt_losses(t, p).mean(), 1e-5)
        assert ("brier_score" in logs) == ("accuracy" in logs) == labelled
        assert "teacher_agreement" in logs
        if labelled:
            np.testing.assert_allclose(logs["accuracy"], accuracy)


@pytest.mark.parametrize("train, test", [((X,), (X, Y)), ((X, Y), (X,))])
def test_validation_of_the_other_kind(train, test):
    distiller = labelled_distiller()
    history = distiller.fit(*train, validation_data=test, epochs=3, **FIT)
    history = history.history
    labelled, other = "accuracy", "val_accuracy"
    if len(test) > 1:
        labelled, other = other, labelled
    assert other not in history
    right = np.mean(outputs(distiller.student).argmax(-1) == Y)
    np.testing.assert_allclose(history[labelled], [right] * 3)


@pytest.mark.parametrize("one_hot", [False, True])
def test_evaluate_on_true_labels(one_hot):
    """Also where the loss takes other rows than one per class."""
    student = network()
    distiller = Distiller(
        student=student, teacher=[network(seed=1), network(2, seed=2)]
    )
    metrics = ["accuracy", ExpectedCalibrationError(from_logits=True)]
    distiller.compile("sgd", loss=SideBySide(), metrics=metrics)
    y = np.eye(3)[Y] if one_hot else Y
    logs = evaluate(distiller, X, y)
    np.testing.assert_allclose(
        logs["accuracy"], np.mean(outputs(student).argmax(-1) == Y)
    )
    measured = ExpectedCalibrationError(from_logits=True)
    measured.update_state(Y, outputs(student))
    np.testing.assert_allclose(
        logs["expected_calibration_error"], measured.result(), atol=1e-6
    )


def test_callbacks_know_the_direction_of_teacher_metrics():
    stop = keras.callbacks.EarlyStopping("val_teacher_agreement")
    distil(network(), network(seed=1)).fit(
        X, validation_split=0.25, verbose=0, callbacks=[stop]
    )
    assert stop.monitor_op(0.2, 0.1)


# ---- Settings that change. ----


def both(weight):
    """Return a distiller with hard labels, and its loss at a weight of 0.9."""
    student, teacher = network(), network(seed=1)
    distiller = distil(
        student,
        teacher,
        optimizer=still(),
        graph=True,
        hard_label_loss=hard_loss(),
        hard_label_weight=weight,
    )
    soft = pt_losses(probs(teacher), probs(student)).mean()
    return distiller, 0.9 * nll(probs(student)).mean() + 0.1 * soft


@pytest.mark.parametrize("call, before", [("fit", 0.1), ("test_on_batch", 0.0)])
def test_hard_label_weight(call, before):
    distiller, expected = both(before)
    run(distiller, call, X, Y)
    distiller.hard_label_weight = 0.9
    distiller.reset_metrics()
    loss = run(distiller, call, X, Y)["loss"]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_hard_label_weight_needs_no_new_step_between_0_and_1():
    distiller, _ = both(0.1)
    distiller.fit(X, Y, **FIT)
    step = distiller.train_function
    distiller.hard_label_weight = 0.9
    assert distiller.train_function is step


@pytest.mark.parametrize(
    "setting, when", [("teacher", "epoch"), ("teacher_weights", "batch")]
)
def test_settings_change_in_a_callback(setting, when):
    teachers = [network(seed=2), network(seed=3)]
    student = network()
    before, after = teachers
    if setting == "teacher_weights":
        before, after = [1.0, 0.0], [0.0, 1.0]
    distiller = distil(student, teachers, optimizer=still(), graph=True)
    setattr(distiller, setting, before)

    class Change(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1 and when == "epoch":
                setattr(self.model, setting, after)

        def on_train_batch_end(self, batch, logs=None):
            if batch == 1 and when == "batch":
                setattr(self.model, setting, after)

    losses = distiller.fit(X, epochs=2, callbacks=[Change()], **FIT)
    first, second = (
        pt_losses(probs(teacher), probs(student)).mean() for teacher in teachers
    )
    np.testing.assert_allclose(losses.history["loss"], [first, second], 1e-5)
    assert np.all(np.isfinite(outputs(teachers[0])))


def test_settings_that_are_fixed():
    distiller = distil(network(), network(seed=1))
    for name in (
        "student",
        "student_inputs",
        "teacher_inputs",
        "teacher_from_logits",
        "teacher_metrics",
        "hard_label_loss",
    ):
        with pytest.raises(AttributeError, match=f"`{name}` of a Distiller"):
            setattr(distiller, name, True)


def test_variables_as_settings():
    """They would be compiled into the step."""
    with pytest.raises(ValueError, match="`hard_label_weight` must be a num"):
        both(keras.Variable(0.1))
    distiller = Distiller(student=network(), teacher=network(seed=1))
    weights = [keras.Variable(0.5)]
    with pytest.raises(ValueError, match="`loss_weights` must be a number"):
        distiller.compile("sgd", ["mse"], loss_weights=weights)


def test_new_weights_of_the_teacher_are_used():
    student, teacher, other = network(), network(seed=1), network(seed=2)
    distiller = distil(student, teacher, optimizer=still(), graph=True)
    distiller.fit(X, **FIT)
    teacher.set_weights(other.get_weights())
    expected = pt_losses(probs(other), probs(student)).mean()
    loss = run(distiller, "fit", X)["loss"]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


# ---- Saving, and runs that are interrupted. ----


def test_save_reload_and_continue(tmp_path):
    teacher = keras.Sequential(
        [keras.Input((4,)), layers.Dense(20_000), layers.Dense(3)]
    )
    distiller = Distiller(
        student=network(seed=1),
        teacher=[teacher],
        teacher_from_logits=[True],
        teacher_weights=[2.0],
        hard_label_loss=hard_loss(),
        hard_label_weight=0.25,
        teacher_metrics=[KLToTeacher(from_logits=True)],
    )
    loss = PTLoss([0.5, 0.1], from_logits=True)
    distiller.compile("adam", loss=loss, metrics=["accuracy"])
    distiller.fit(X, Y, **FIT)
    distiller.save(tmp_path / "distiller.keras")
    distiller.save_weights(tmp_path / "distiller.weights.h5")
    for file in tmp_path.iterdir():  # without the teacher
        assert file.stat().st_size < 100_000
    loaded = keras.saving.load_model(tmp_path / "distiller.keras")
    assert loaded.teacher is None
    with pytest.raises(ValueError, match=r"distiller.teacher = model"):
        loaded.fit(X, Y, verbose=0)
    loaded.teacher = teacher
    for key, value in distiller.get_config().items():
        assert key == "student" or loaded.get_config()[key] == value
    logs = [model.fit(X, Y, **FIT).history for model in (distiller, loaded)]
    assert set(logs[0]) == {"loss", "accuracy", "kl_to_teacher"}
    for name, values in logs[0].items():
        np.testing.assert_allclose(values, logs[1][name], rtol=1e-4)
    np.testing.assert_allclose(outputs(distiller), outputs(loaded), atol=1e-5)


def test_backup_and_restore(tmp_path):
    def backup(**options):
        return keras.callbacks.BackupAndRestore(tmp_path, **options)

    first = distil(network(seed=1), network())
    callbacks = [backup(delete_checkpoint=False)]
    first.fit(X, epochs=2, verbose=0, callbacks=callbacks)
    again = distil(network(seed=3), network())
    history = again.fit(X, epochs=3, verbose=0, callbacks=[backup()])
    assert history.epoch == [2]


@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
def test_an_interrupted_run_gives_the_weights_back(method):
    """On JAX a run holds the only copy of them."""

    class Interrupt(keras.callbacks.Callback):
        def stop(self, batch, logs=None):
            raise KeyboardInterrupt

        on_train_batch_end = on_test_batch_end = on_predict_batch_end = stop

    teacher = network(seed=1)
    distiller = distil(network(), teacher, graph=True)
    before = outputs(teacher)
    with pytest.raises(KeyboardInterrupt):
        getattr(distiller, method)(X, verbose=0, callbacks=[Interrupt()])
    np.testing.assert_array_equal(before, outputs(teacher))
    distiller.fit(X, verbose=0)


def test_an_error_in_the_first_step_gives_the_weights_back():
    class Broken(keras.losses.Loss):
        def call(self, y_true, y_pred):
            raise RuntimeError("broken")

    student, teacher = network(), network(seed=1)
    before = [outputs(student), outputs(teacher)]
    distiller = distil(student, teacher, Broken(), graph=True)
    with pytest.raises(RuntimeError, match="broken"):
        distiller.fit(X, verbose=0)
    for model, values in zip((student, teacher), before, strict=True):
        np.testing.assert_array_equal(outputs(model), values)


# ---- Errors. ----


def test_sample_weights_without_labels():
    """Keras drops them."""
    distiller = distil(network(), network(seed=1))
    for call in ("fit", "evaluate", "train_on_batch", "test_on_batch"):
        with pytest.raises(ValueError, match="`sample_weight` must come with"):
            getattr(distiller, call)(X, sample_weight=np.ones(16))


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"student": "bert"}, "`student` must be a Keras model"),
        ({"teacher": lambda x: x}, "`teacher` must be.*SoftLabels"),
        ({"teacher": keras.Sequential([layers.Dense(3)])}, "must be built"),
        ({"teacher_weights": [-1]}, "`teacher_weights`.*-1"),
        ({"teacher_weights": [0, 0]}, "`teacher_weights`.*not all 0"),
        ({"hard_label_weight": 0.5}, "`hard_label_weight`.*`hard_label_loss`"),
        ({"hard_label_loss": hard_loss()}, "`hard_label_weight`.*together"),
        (
            {"hard_label_loss": hard_loss(), "hard_label_weight": 1.5},
            "`hard_label_weight` must be .*at most 1",
        ),
    ],
)
def test_arguments(arguments, match):
    arguments = {"student": network(), "teacher": network(seed=1), **arguments}
    with pytest.raises(ValueError, match=match):
        Distiller(**arguments)


def test_arguments_are_keywords():
    """Keras's Distiller takes the teacher first."""
    with pytest.raises(TypeError):
        Distiller(network(), network())


def test_student_as_its_own_teacher():
    student = network()
    with pytest.raises(ValueError, match="other than the student"):
        Distiller(student=student, teacher=student)


@pytest.mark.parametrize("method", ["train_step", "compute_loss"])
def test_a_student_with_a_step_of_its_own(method):
    own = type("Own", (keras.Model,), {method: lambda self, *args: None})
    with pytest.raises(ValueError, match=f"not have its own `{method}`"):
        Distiller(student=own(), teacher=network())


def test_teacher_metrics_among_those_of_labels():
    distiller = Distiller(student=network(), teacher=network(seed=1))
    with pytest.raises(ValueError, match=r"teacher_metrics=\[\.\.\.\]"):
        distiller.compile("sgd", "mse", metrics=[["accuracy", KLToTeacher()]])


@pytest.mark.parametrize("name", ["teacher_weights", "teacher_from_logits"])
def test_lists_of_another_length(name):
    distiller = distil(network(), network(seed=1), **{name: [True, True]})
    with pytest.raises(ValueError, match=f"`{name}`.* one for each"):
        distiller.fit(X, verbose=0)


def test_class_counts_that_differ():
    with pytest.raises(ValueError, match="same number of classes.*5.*3"):
        distil(network(), network(5, seed=1)).fit(X, verbose=0)


def test_shared_trainable_weights():
    shared = layers.Dense(8)
    inputs = keras.Input((4,))
    teacher = keras.Sequential([inputs, shared, layers.Dense(3)])
    student = keras.Sequential([shared, layers.Dense(3)])
    distiller = distil(student, teacher)
    with pytest.raises(ValueError, match="not share trainable weights"):
        distiller.fit(X, verbose=0)
    shared.trainable = False
    before = outputs(teacher)
    student = keras.Sequential([shared, layers.Dense(3)])
    distil(student, [teacher, teacher]).fit(X, verbose=0)
    np.testing.assert_array_equal(before, outputs(teacher))


# ---- Models of KerasHub. ----


def test_raw_texts():
    """Models of KerasHub preprocess texts in `fit`, which is not called."""
    student = network()
    student.preprocessor = lambda texts: texts
    distiller = distil(student, network(seed=1))
    for texts in (np.array(["good", "bad"]), ["good", "bad"], {"a": ["good"]}):
        with pytest.raises(ValueError, match="preprocessor"):
            distiller.fit(texts, verbose=0)


def causal_lm(hub, seed):
    """Return a small language model whose logits are not near 0."""
    keras.utils.set_random_seed(seed)
    backbone = hub.GPT2Backbone(
        vocabulary_size=11,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        dropout=0.0,
        max_sequence_length=16,
    )
    model = hub.GPT2CausalLM(backbone, preprocessor=None)
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(weight + rng.normal(size=weight.shape, scale=0.3))
    return model


@pytest.mark.ci
def test_causal_lm_with_lora():
    """Padding does not count, and only the adapters move."""
    hub = pytest.importorskip("keras_hub.models")
    student, teacher = causal_lm(hub, 0), causal_lm(hub, 1)
    ids = np.random.default_rng(0).integers(1, 11, size=(4, 8))
    mask = (np.arange(8) < [[8], [5], [3], [6]]).astype("int32")
    x = {"token_ids": ids, "padding_mask": mask}
    student.backbone.enable_lora(rank=2)
    for weight in student.trainable_weights:
        weight.trainable = "lora" in weight.path
    distiller = Distiller(
        student=student, teacher=teacher, teacher_from_logits=True
    )
    loss = PTLoss(0.1, from_logits=True, reduction="mean_with_sample_weight")
    distiller.compile(keras.optimizers.SGD(0.5), loss=loss)
    before = {w.path: ops.convert_to_numpy(w) for w in student.weights}
    z_t, z_s = (ops.convert_to_numpy(model(x)) for model in (teacher, student))
    t, p = (scipy.special.softmax(z.astype("float64"), -1) for z in (z_t, z_s))
    expected = pt_losses(t, p, 0.1)[mask > 0].mean()
    options = {"sample_weight": mask.astype("float32"), "verbose": 0}
    losses = distiller.fit(x, ids, epochs=5, **options).history["loss"]
    np.testing.assert_allclose(losses[0], expected, rtol=1e-4)
    assert losses[-1] < losses[0]
    moved = {
        w.path
        for w in student.weights
        if not np.array_equal(before[w.path], ops.convert_to_numpy(w))
    }
    assert moved == {path for path in before if "lora" in path}


# ---- Several devices, in processes of their own. ----


ON_DEVICES = """
import contextlib, os, keras, numpy as np
from keras_ptloss import Distiller, PTLoss

rng = np.random.default_rng(0)
x = rng.normal(size=(64, 4)).astype("float32")
y = rng.integers(0, 3, size=64)

def linear(seed):
    init = keras.initializers.GlorotUniform(seed=seed)
    options = dict(kernel_initializer=init, kernel_regularizer="l2")
    dense = keras.layers.Dense(3, **options)
    return keras.Sequential([keras.Input((4,)), dense])

def results(weight, scope):
    with scope:
        hard = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        distiller = Distiller(
            student=linear(1), teacher=[linear(2), linear(3)],
            hard_label_loss=hard, hard_label_weight=weight,
        )
        distiller.compile(
            keras.optimizers.SGD(0.1), loss=PTLoss(0.5, from_logits=True),
            metrics=["accuracy"],
        )
    options = dict(batch_size=16, shuffle=False, verbose=0)
    logs = distiller.fit(x, y, epochs=2, **options).history
    found = {name: np.array(values) for name, values in logs.items()}
    if weight == 0:  # labels come and go
        options = dict(batch_size=16, verbose=0, return_dict=True)
        other = distiller.evaluate(x, **options)
        assert set(other) == {"loss", "teacher_agreement"}, other
        found |= {f"test_{name}": value for name, value in other.items()}
    return found | dict(enumerate(distiller.student.get_weights()))

def scope():
    return contextlib.nullcontext()

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * 2
    )
one = [results(weight, scope()) for weight in (0.0, 0.5, 1.0)]
if keras.backend.backend() == "tensorflow":
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    assert strategy.num_replicas_in_sync == 2
    scope = strategy.scope
else:
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    mesh = keras.distribution.distribution().device_mesh
    assert mesh.devices.size == 2
two = [results(weight, scope()) for weight in (0.0, 0.5, 1.0)]
for a, b in zip(one, two, strict=True):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=1e-5, err_msg=name)
print("the same on two devices")
"""


@pytest.mark.ci
@pytest.mark.skipif(BACKEND == "torch", reason="Keras has one device there")
def test_two_devices_train_as_one():
    """MirroredStrategy on TensorFlow, keras.distribution on JAX."""
    devices = "--xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": devices}
    done = subprocess.run(
        [sys.executable, "-c", ON_DEVICES],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the same on two devices" in done.stdout
