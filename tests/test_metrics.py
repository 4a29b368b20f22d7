"""Metrics against their definitions, written in NumPy."""

import keras
import numpy as np
import pytest
import scipy.special
import sklearn.metrics
from helpers import softmax
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_ptloss.metrics import (
    BrierScore,
    ExpectedCalibrationError,
    KLToTeacher,
    TeacherAgreement,
    TotalVariationDistance,
)

OF_TEACHER = [TeacherAgreement, TotalVariationDistance, KLToTeacher]
OF_LABELS = [BrierScore, ExpectedCalibrationError]
# Keras compiles no step on PyTorch unless asked.
COMPILED = keras.backend.backend() != "torch"
every_metric = pytest.mark.parametrize("metric", OF_TEACHER + OF_LABELS)
# Reading outputs, weights and masks is the same code for all metrics.
metric_of_each_kind = pytest.mark.parametrize(
    "metric", [KLToTeacher, BrierScore]
)


def reference(metric, truth, p, weight=None):
    """Compute a metric by its definition; `truth` is `t` or class indices."""
    p = np.asarray(p, "float64").reshape(-1, p.shape[-1])
    weight = np.ones(len(p)) if weight is None else np.ravel(weight)
    if metric in OF_TEACHER:
        t = np.asarray(truth, "float64").reshape(p.shape)
    else:
        labels = np.ravel(truth)
    if metric is TeacherAgreement:
        values = t.argmax(-1) == p.argmax(-1)
    elif metric is TotalVariationDistance:
        values = np.maximum(t - p, 0).sum(-1)
    elif metric is KLToTeacher:
        values = scipy.special.rel_entr(t, p).sum(-1)
    elif metric is BrierScore:
        values = 1 - 2 * p[np.arange(len(p)), labels] + (p**2).sum(-1)
    else:
        confidence, right = p.max(-1), p.argmax(-1) == labels
        error = 0.0
        for m in range(15):
            inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
            gap = (weight * (right - confidence))[inside].sum()
            error += abs(gap) / weight.sum()
        return error
    return np.average(values, weights=weight)


def data(metric, shape=(8, 4), seed=0):
    """Return the truth (probabilities or labels) and student logits."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=shape).astype("float32")
    if metric in OF_TEACHER:
        return softmax(2 * rng.normal(size=shape)).astype("float32"), logits
    return rng.integers(0, shape[-1], size=shape[:-1]), logits


def value(metric, *batches):
    for batch in batches:
        metric.update_state(*batch)
    return float(metric.result())


@every_metric
@settings(deadline=None, max_examples=10)
@given(st.integers(0, 99))
def test_value(metric, seed):
    """In two batches, from logits and from probabilities."""
    truth, logits = data(metric, seed=seed)
    p = softmax(logits)
    expected = reference(metric, truth, p)
    halves = [(truth[:4], logits[:4]), (truth[4:], logits[4:])]
    assert value(metric(from_logits=True), *halves) == pytest.approx(
        expected, abs=1e-6
    )
    assert value(metric(), (truth, p.astype("float32"))) == pytest.approx(
        expected, abs=1e-6
    )


@metric_of_each_kind
@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 5), (6, 5, 1)])
def test_weights_of_sequences(metric, shape):
    """Of examples or of positions; 5 positions cannot be taken for 6."""
    truth, logits = data(metric, (6, 5, 4))
    weight = np.random.default_rng(1).uniform(size=shape).astype("float32")
    whole = weight.reshape(6, -1) * np.ones((6, 5))
    assert value(
        metric(from_logits=True), (truth, logits, weight)
    ) == pytest.approx(
        reference(metric, truth, softmax(logits), whole), abs=1e-6
    )


@metric_of_each_kind
def test_weight_zero_hides_anything(metric):
    truth, logits = data(metric)
    expected = reference(metric, truth[:6], softmax(logits[:6]))
    truth = np.array(truth, "float32")
    truth[6:], logits[6:] = np.nan, np.nan
    weight = np.repeat([1.0, 0.0], [6, 2])
    assert value(
        metric(from_logits=True), (truth, logits, weight)
    ) == pytest.approx(expected, abs=1e-6)
    assert value(metric(from_logits=True), (truth, logits, 0 * weight)) == 0.0


def test_rows_of_zeros_are_padding():
    truth, logits = data(KLToTeacher)
    expected = reference(KLToTeacher, truth[:6], softmax(logits[:6]))
    truth[6:] = 0.0
    measured = KLToTeacher(from_logits=True)
    assert value(measured, (truth, logits)) == pytest.approx(expected, abs=1e-6)


def test_keras_masks_hide_positions():
    tokens = np.array([[1, 2, 0, 0], [3, 1, 2, 0]])
    table = np.random.default_rng(0).normal(size=(4, 5)).astype("float32")
    student = keras.Sequential(
        [keras.layers.Embedding(4, 5, mask_zero=True, weights=[table])]
    )
    labels, _ = data(BrierScore, (2, 4, 5))
    logs = evaluated(student, tokens, np.eye(5)[labels])
    for metric, came in logs.items():
        truth = np.eye(5)[labels] if metric in OF_TEACHER else labels
        expected = reference(metric, truth, softmax(table[tokens]), tokens > 0)
        assert came == pytest.approx(expected, abs=1e-6)


def evaluated(student, x, y, metrics=None, *, from_logits=True):
    """Return what a compiled `evaluate` gives for each metric."""
    metrics = OF_TEACHER + OF_LABELS if metrics is None else metrics
    measured = {metric: metric(from_logits=from_logits) for metric in metrics}
    student.compile("sgd", loss=no_loss, metrics=list(measured.values()))
    logs = student.evaluate(x, y, batch_size=8, verbose=0, return_dict=True)
    return {metric: logs[own.name] for metric, own in measured.items()}


def no_loss(y_true, y_pred):
    return keras.ops.sum(y_pred, axis=-1) * 0


@metric_of_each_kind
def test_half_precision_is_measured_in_float32(metric):
    """3,000 is more than bfloat16 can count one by one."""
    truth, logits = data(metric, (3000, 5))
    half = keras.ops.cast(logits, "bfloat16")
    seen = keras.ops.convert_to_numpy(keras.ops.cast(half, "float32"))
    measured = metric(from_logits=True)
    assert value(measured, (truth, half)) == pytest.approx(
        reference(metric, truth, softmax(seen)), abs=1e-5
    )


@pytest.fixture(scope="module")
def student():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])


def test_compiled_and_saved(student, tmp_path):
    """One-hot labels are also a teacher."""
    labels, _ = data(BrierScore, (16, 3))
    x = np.random.default_rng(3).normal(size=(16, 4)).astype("float32")
    p = softmax(student.predict(x, verbose=0))
    for metric, came in evaluated(student, x, np.eye(3)[labels]).items():
        truth = np.eye(3)[labels] if metric in OF_TEACHER else labels
        assert came == pytest.approx(reference(metric, truth, p), abs=1e-5)
    student.compile(
        "sgd",
        loss="mse",
        metrics=[metric(from_logits=True) for metric in OF_TEACHER + OF_LABELS],
    )
    before = student.evaluate(x, np.eye(3)[labels], verbose=0)
    student.save(tmp_path / "student.keras")
    again = keras.saving.load_model(tmp_path / "student.keras")
    after = again.evaluate(x, np.eye(3)[labels], verbose=0)
    assert after == pytest.approx(before)


@every_metric
def test_config(metric):
    settings = {"name": "mine", "dtype": "bfloat16", "from_logits": True}
    if metric is ExpectedCalibrationError:
        settings["num_bins"] = 7
    stored = keras.saving.serialize_keras_object(metric(**settings))
    assert stored["registered_name"].startswith("keras_ptloss>")
    again = keras.saving.deserialize_keras_object(stored)
    assert type(again) is metric and again.get_config() == settings


def test_early_stopping_knows_the_direction(student):
    stops = {
        metric: keras.callbacks.EarlyStopping(monitor=metric().name)
        for metric in OF_TEACHER + OF_LABELS
    }
    student.compile(
        "sgd",
        loss=no_loss,
        metrics=[metric(from_logits=True) for metric in stops],
    )
    x, y = np.ones((16, 4)), np.eye(3)[np.zeros(16, int)]
    student.fit(x, y, verbose=0, callbacks=list(stops.values()))
    for metric, stop in stops.items():
        better = bool(stop.monitor_op(0.2, 0.1))
        assert better == (metric is TeacherAgreement)


@every_metric
@pytest.mark.parametrize("from_logits", [False, True])
def test_binary_head(metric, from_logits):
    """One column is the second of two classes, on either side."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(8, 1)).astype("float32")
    p = scipy.special.expit(z)
    t = rng.uniform(size=(8, 1)).astype("float32")
    both = np.concatenate([1 - p, p], -1)
    truth = t if metric in OF_TEACHER else (t > 0.5).astype("int32")
    whole = np.concatenate([1 - t, t], -1) if metric in OF_TEACHER else truth
    assert value(
        metric(from_logits=from_logits), (truth, z if from_logits else p)
    ) == pytest.approx(reference(metric, whole, both), abs=1e-6)


@pytest.mark.parametrize("shape", [(8, 4), (4, 4, 4)])
def test_label_forms_are_told_by_shape(shape):
    labels, logits = data(BrierScore, shape)
    expected = reference(BrierScore, labels, softmax(logits))
    one_hot = np.eye(shape[-1])[labels]
    for form in (labels, labels[..., None], labels.astype("float32"), one_hot):
        measured = BrierScore(from_logits=True)
        assert value(measured, (form, logits)) == pytest.approx(
            expected, abs=1e-6
        )


@pytest.fixture(scope="module")
def identity():
    return keras.Sequential([keras.Input((4,)), keras.layers.Identity()])


@pytest.mark.parametrize("wrong", [-1, 4])
def test_a_label_that_is_no_class(identity, wrong):
    """An error in an eager call, NaN in a compiled one."""
    labels, logits = data(BrierScore)
    labels[3] = wrong
    for metric in OF_LABELS:
        with pytest.raises(ValueError, match=rf"`y_true`.*, 4\).*={wrong}"):
            metric(from_logits=True).update_state(labels, logits)
    if COMPILED:
        logs = evaluated(identity, logits, labels, OF_LABELS)
        assert np.all(np.isnan(list(logs.values())))


def test_logits_taken_for_probabilities(identity):
    """An error in an eager call, NaN in a compiled one."""
    t, logits = data(KLToTeacher)
    for metric in OF_TEACHER + OF_LABELS:
        with pytest.raises(ValueError, match="`y_pred`.*from_logits=True"):
            metric().update_state(t, logits)
    if COMPILED:
        logs = evaluated(identity, logits, t, from_logits=False)
        assert np.all(np.isnan(list(logs.values())))
    for metric in OF_TEACHER:
        with pytest.raises(ValueError, match="`y_true` must hold prob"):
            metric(from_logits=True).update_state(logits, logits)
    if COMPILED:
        logs = evaluated(identity, logits, logits, OF_TEACHER)
        assert np.all(np.isnan(list(logs.values())))


def test_values_of_scikit_learn():
    labels, logits = data(BrierScore, (32, 4))
    p, one_hot = softmax(logits), np.eye(4)[labels]
    assert value(BrierScore(), (labels, p.astype("float32"))) == pytest.approx(
        sklearn.metrics.brier_score_loss(one_hot, p, scale_by_half=False),
        abs=1e-6,
    )
    assert value(
        KLToTeacher(from_logits=True), (one_hot, logits)
    ) == pytest.approx(sklearn.metrics.log_loss(labels, p), abs=1e-5)


def test_disjoint_distributions():
    teacher, student = np.eye(2, dtype="float32")[:, None]
    assert value(TotalVariationDistance(), (teacher, student)) == 1.0
    assert value(KLToTeacher(), (teacher, student)) == pytest.approx(
        -np.log(keras.config.epsilon()), rel=1e-5
    )


def test_calibration_bins_hold_their_upper_edge():
    """0.5 falls into (0.25, 0.5], 0.75 into (0.5, 0.75], 1 into the last."""
    metric = ExpectedCalibrationError(num_bins=4)
    student = np.array([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]], "float32")
    metric.update_state(np.array([1, 1, 1]), student)
    gaps = keras.ops.convert_to_numpy(metric.sums.value)
    np.testing.assert_allclose(gaps, [0, -0.5, -0.75, -1])
