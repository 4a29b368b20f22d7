"""Metrics against their definitions, written in NumPy."""

import keras
import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras import ops

from keras_ptloss.metrics._metrics import (
    BrierScore,
    ExpectedCalibrationError,
    KLToTeacher,
    TeacherAgreement,
    TotalVariationDistance,
)

TEACHER = {
    "agreement": TeacherAgreement,
    "total_variation": TotalVariationDistance,
    "kl": KLToTeacher,
}
LABELS = {"brier": BrierScore, "ece": ExpectedCalibrationError}
ALL = {**TEACHER, **LABELS}


def reference(name, truth, p, weight=None, num_bins=15):
    """The metric by its definition in float64; `truth` is `t` or labels."""
    p = np.asarray(p, "float64").reshape(-1, np.shape(p)[-1])
    if weight is None:
        weight = np.ones(len(p))
    weight = np.asarray(weight, "float64").reshape(-1)
    if name in TEACHER:
        t = np.asarray(truth, "float64").reshape(p.shape)
    else:
        labels = np.asarray(truth).reshape(-1)
    if name == "agreement":
        values = np.argmax(t, -1) == np.argmax(p, -1)
    elif name == "total_variation":
        values = np.sum(np.maximum(t - p, 0), -1)
    elif name == "kl":
        values = scipy.special.rel_entr(t, p).sum(-1)
    elif name == "brier":
        values = 1 - 2 * p[np.arange(len(p)), labels] + (p**2).sum(-1)
    else:
        return reference_ece(labels, p, weight, num_bins)
    return np.average(values, weights=weight)


def reference_ece(labels, p, weight, num_bins):
    confidence = p.max(-1)
    right = p.argmax(-1) == labels
    bins = scipy.stats.binned_statistic(
        confidence, confidence, "count", bins=num_bins, range=(0, 1)
    ).binnumber
    error = 0.0
    for index in np.unique(bins):
        inside = bins == index
        share = weight[inside].sum() / weight.sum()
        if share:
            accuracy = np.average(right[inside], weights=weight[inside])
            mean = np.average(confidence[inside], weights=weight[inside])
            error += share * abs(accuracy - mean)
    return error


def softmax(z):
    return scipy.special.softmax(np.asarray(z, "float64"), axis=-1)


def data(name, shape=(64, 5), seed=0):
    """Truth (teacher or labels) and student logits."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=shape).astype("float32") * 2
    if name in TEACHER:
        truth = softmax(rng.normal(size=shape) * 2).astype("float32")
    else:
        truth = rng.integers(0, shape[-1], size=shape[:-1])
    return truth, logits


def build(metric, from_logits=True, **kwargs):
    if metric == "agreement":
        return TeacherAgreement(**kwargs)
    if metric in TEACHER:
        kwargs["teacher_from_logits"] = False
    return ALL[metric](from_logits=from_logits, **kwargs)


def value(metric, *batches):
    for batch in batches:
        metric.update_state(*batch)
    return float(metric.result())


every_metric = pytest.mark.parametrize("name", list(ALL))
every_teacher_metric = pytest.mark.parametrize("name", list(TEACHER))
every_label_metric = pytest.mark.parametrize("name", list(LABELS))


@every_metric
def test_config(name):
    kwargs = {"name": "mine", "dtype": "bfloat16"}
    if name != "agreement":
        kwargs["from_logits"] = True
    if name in ("kl", "total_variation"):
        kwargs["teacher_from_logits"] = False
    if name == "ece":
        kwargs["num_bins"] = 7
    metric = ALL[name](**kwargs)
    assert metric.get_config() == kwargs
    copy = ALL[name].from_config(metric.get_config())
    assert copy.get_config() == kwargs
    stored = keras.saving.serialize_keras_object(metric)
    assert stored["registered_name"].startswith("keras_ptloss>")
    again = keras.saving.deserialize_keras_object(stored)
    assert type(again) is ALL[name]
    assert again.get_config() == kwargs


@pytest.mark.parametrize("name", ["kl", "total_variation"])
@pytest.mark.parametrize("from_logits", [False, True])
def test_teacher_defaults_to_the_students_form(name, from_logits):
    metric = ALL[name](from_logits=from_logits)
    assert metric.teacher_from_logits is from_logits


@every_metric
def test_unweighted(name):
    truth, logits = data(name)
    p = softmax(logits)
    expected = reference(name, truth, p)
    assert value(build(name), (truth, logits)) == pytest.approx(
        expected, abs=1e-6
    )
    probabilities = build(name, from_logits=False)
    assert value(probabilities, (truth, p.astype("float32"))) == pytest.approx(
        expected, abs=1e-6
    )


@pytest.mark.parametrize("name", ["kl", "total_variation", "agreement"])
def test_teacher_logits(name):
    truth, logits = data(name)
    metric = ALL[name]() if name == "agreement" else ALL[name](from_logits=True)
    teacher_logits = np.log(truth) + 3
    assert value(metric, (teacher_logits, logits)) == pytest.approx(
        reference(name, truth, softmax(logits)), abs=1e-6
    )


@every_metric
def test_sample_weighted(name):
    truth, logits = data(name)
    weight = np.random.default_rng(1).uniform(size=64).astype("float32")
    expected = reference(name, truth, softmax(logits), weight)
    assert value(build(name), (truth, logits, weight)) == pytest.approx(
        expected, abs=1e-6
    )
    assert value(
        build(name), (truth, logits, weight[:, None])
    ) == pytest.approx(expected, abs=1e-6)


@every_metric
def test_zero_weighted(name):
    truth, logits = data(name)
    assert value(build(name), (truth, logits, np.zeros(64))) == 0.0
    weight = np.repeat([1.0, 0.0], 32)
    assert value(build(name), (truth, logits, weight)) == pytest.approx(
        reference(name, truth[:32], softmax(logits[:32])), abs=1e-6
    )


@every_metric
def test_batches_equal_the_whole(name):
    truth, logits = data(name)
    weight = np.random.default_rng(1).uniform(size=64).astype("float32")
    cuts = [slice(0, 1), slice(1, 30), slice(30, 64)]
    batches = [(truth[cut], logits[cut], weight[cut]) for cut in cuts]
    assert value(build(name), *batches) == pytest.approx(
        value(build(name), (truth, logits, weight)), abs=1e-6
    )


@every_metric
def test_reset(name):
    truth, logits = data(name)
    metric = build(name)
    first = value(metric, (truth, logits))
    value(metric, (truth[:3], logits[:3]))
    metric.reset_state()
    assert float(metric.result()) == 0.0
    assert value(metric, (truth, logits)) == first


@every_metric
@pytest.mark.parametrize("weighted", ["none", "example", "position"])
def test_every_position_of_leading_axes_is_a_case(name, weighted):
    truth, logits = data(name, shape=(8, 6, 4))
    rng = np.random.default_rng(2)
    weight = {
        "none": None,
        "example": rng.uniform(size=8).astype("float32"),
        "position": rng.uniform(size=(8, 6)).astype("float32"),
    }[weighted]
    full = weight
    if weighted == "example":
        full = np.repeat(weight[:, None], 6, axis=1)
    assert value(build(name), (truth, logits, weight)) == pytest.approx(
        reference(name, truth, softmax(logits), full), abs=1e-6
    )


@every_metric
def test_keras_masks_hide_positions(name):
    """As `Embedding(mask_zero=True)` leaves them on a student's outputs."""
    tokens = np.array([[1, 2, 0, 0], [3, 1, 2, 0]])
    table = np.random.default_rng(0).normal(size=(4, 5)).astype("float32")
    student = keras.Sequential(
        [keras.layers.Embedding(4, 5, mask_zero=True, weights=[table])]
    )
    truth, _ = data(name, shape=(2, 4, 5))
    student.compile("sgd", loss=no_loss, metrics=[build(name)])
    logs = student.evaluate(tokens, truth, verbose=0, return_dict=True)
    assert logs[build(name).name] == pytest.approx(
        reference(name, truth, softmax(table[tokens]), tokens > 0), abs=1e-6
    )


def no_loss(y_true, y_pred):
    return keras.ops.sum(y_pred, axis=-1) * 0


@every_metric
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(name, dtype):
    """Half-precision students are measured in float32."""
    truth, logits = data(name, shape=(3000, 5))
    half = keras.ops.cast(logits, dtype)
    seen = keras.ops.convert_to_numpy(keras.ops.cast(half, "float32"))
    metric = build(name)
    metric.update_state(truth, half)
    assert keras.backend.standardize_dtype(metric.result().dtype) == "float32"
    # 3,000 exceeds what float16 and bfloat16 can count one by one.
    assert float(metric.result()) == pytest.approx(
        reference(name, truth, softmax(seen)), abs=1e-5
    )


@every_metric
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_model_fit(name, policy):
    """`fit` and `evaluate` compile the update (jit_compile=True)."""
    truth, _ = data(name, shape=(64, 3))
    x = np.random.default_rng(3).normal(size=(64, 4)).astype("float32")
    keras.utils.set_random_seed(0)
    student = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, dtype=policy)]
    )
    student.compile(
        "sgd",
        loss=no_loss,
        metrics=[build(name)],
        weighted_metrics=[build(name, name="weighted")],
        jit_compile=True,
    )
    weight = np.random.default_rng(4).uniform(size=64).astype("float32")
    history = student.fit(x, truth, batch_size=24, verbose=0, epochs=1)
    logs = student.evaluate(
        x,
        truth,
        sample_weight=weight,
        batch_size=24,
        verbose=0,
        return_dict=True,
    )
    logits = np.asarray(student.predict(x, verbose=0), "float32")
    p = softmax(logits)
    # Two compiled functions round bfloat16 differently.
    close = {"abs": 1e-5 if policy == "float32" else 1e-2}
    plain = build(name).name
    expected = reference(name, truth, p)
    assert logs[plain] == pytest.approx(expected, **close)
    assert history.history[plain][0] == pytest.approx(expected, **close)
    assert logs["weighted"] == pytest.approx(
        reference(name, truth, p, weight), **close
    )


@every_metric
def test_save_and_reload(name, tmp_path):
    truth, _ = data(name, shape=(16, 3))
    x = np.ones((16, 4), "float32")
    student = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    student.compile("sgd", loss="mse", metrics=[build(name)])
    labels = truth if name in TEACHER else np.eye(3)[truth]
    before = student.evaluate(x, labels, verbose=0, return_dict=True)
    student.save(tmp_path / "student.keras")
    again = keras.saving.load_model(tmp_path / "student.keras")
    after = again.evaluate(x, labels, verbose=0, return_dict=True)
    assert after == pytest.approx(before)


@every_metric
def test_early_stopping_knows_the_direction(name):
    truth, _ = data(name, shape=(16, 3))
    student = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    student.compile("sgd", loss=no_loss, metrics=[build(name)])
    stopping = keras.callbacks.EarlyStopping(monitor=build(name).name)
    student.fit(
        np.ones((16, 4)), truth, verbose=0, epochs=1, callbacks=[stopping]
    )
    better = stopping.monitor_op(0.2, 0.1)
    assert bool(better) == (name == "agreement")


@every_label_metric
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "float32"])
def test_labels_may_be_indices_columns_or_one_hot(name, dtype):
    labels, logits = data(name, shape=(32, 4))
    expected = reference(name, labels, softmax(logits))
    for form in (labels, labels[:, None], np.eye(4)[labels]):
        assert value(
            build(name), (form.astype(dtype), logits)
        ) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (1, 1, 2)])
@every_label_metric
def test_label_forms_are_told_by_shape(name, shape):
    """Also where examples, positions and classes have the same count."""
    labels, logits = data(name, shape=shape)
    expected = reference(name, labels, softmax(logits))
    for form in (labels, labels[..., None], np.eye(shape[-1])[labels]):
        assert value(build(name), (form, logits)) == pytest.approx(
            expected, abs=1e-6
        )


def test_brier_is_sklearns():
    labels, logits = data("brier", shape=(200, 4))
    p = softmax(logits)
    assert value(build("brier"), (labels, logits)) == pytest.approx(
        sklearn.metrics.brier_score_loss(
            np.eye(4)[labels], p, scale_by_half=False
        ),
        abs=1e-6,
    )
    two = p[:, :2] / p[:, :2].sum(-1, keepdims=True)
    assert value(
        BrierScore(), (labels % 2, two.astype("float32"))
    ) == pytest.approx(
        2 * sklearn.metrics.brier_score_loss(labels % 2, two[:, 1]), abs=1e-6
    )


def test_kl_is_the_log_loss_less_the_teachers_entropy():
    """And Keras's KLDivergence, on probabilities."""
    labels, logits = data("brier", shape=(200, 4))
    p = softmax(logits)
    one_hot = np.eye(4, dtype="float32")[labels]
    assert value(build("kl"), (one_hot, logits)) == pytest.approx(
        sklearn.metrics.log_loss(labels, p), abs=1e-5
    )
    teacher, _ = data("kl", shape=(200, 4))
    p = p.astype("float32")
    assert value(KLToTeacher(), (teacher, p)) == pytest.approx(
        value(keras.metrics.KLDivergence(), (teacher, p)), abs=1e-5
    )


def test_agreement_is_the_accuracy_against_the_teachers_labels():
    teacher, logits = data("agreement", shape=(200, 4))
    assert value(TeacherAgreement(), (teacher, logits)) == pytest.approx(
        sklearn.metrics.accuracy_score(teacher.argmax(-1), logits.argmax(-1))
    )


def test_ece_of_a_calibrated_student_is_near_zero():
    rng = np.random.default_rng(5)
    p = rng.dirichlet(np.ones(3), size=50_000)
    labels = (p.cumsum(-1) < rng.uniform(size=(50_000, 1))).sum(-1)
    student = p.astype("float32")
    assert value(ExpectedCalibrationError(), (labels, student)) < 0.01
    sure = np.eye(3, dtype="float32")[p.argmax(-1)]
    assert value(ExpectedCalibrationError(), (labels, sure)) == pytest.approx(
        np.mean(p.argmax(-1) != labels), abs=1e-6
    )


def test_ece_bins_hold_their_upper_edge():
    metric = ExpectedCalibrationError(num_bins=4)
    # 0.5 falls in (0.25, 0.5], 0.75 in (0.5, 0.75], 1.0 in (0.75, 1].
    metric.update_state(
        np.array([1, 1, 1]),
        np.array([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]], "float32"),
    )
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(metric.gaps.value), [0, -0.5, -0.75, -1]
    )


@every_metric
def test_extreme_logits_stay_finite(name):
    truth, logits = data(name, shape=(8, 3))
    assert np.isfinite(value(build(name), (truth, logits * 1e4)))


def test_disjoint_distributions():
    teacher = np.array([[1.0, 0.0]], "float32")
    student = np.array([[0.0, 1.0]], "float32")
    assert value(TotalVariationDistance(), (teacher, student)) == 1.0
    assert value(KLToTeacher(), (teacher, student)) == pytest.approx(
        -np.log(keras.config.epsilon()), rel=1e-5
    )


rows = hnp.arrays(
    "float64",
    st.sampled_from([(1, 2), (12, 3)]),  # few shapes, few compilations
    elements=st.floats(-20, 20),
)


@settings(deadline=None, max_examples=30)
@given(rows, st.integers(0, 2**32 - 1))
def test_bounds_and_pinsker(logits, seed):
    """TV in [0, 1], KL >= 0, TV^2 <= KL / 2; ECE <= 1, Brier <= 2."""
    teacher = np.random.default_rng(seed).normal(size=logits.shape) * 3
    agreement = value(TeacherAgreement(), (teacher, logits))
    distance = value(
        TotalVariationDistance(from_logits=True), (teacher, logits)
    )
    divergence = value(KLToTeacher(from_logits=True), (teacher, logits))
    assert 0 <= agreement <= 1
    assert 0 <= distance <= 1 + 1e-6
    assert divergence >= -1e-6
    assert distance**2 <= divergence / 2 + 1e-5
    labels = teacher.argmax(-1)
    score = value(BrierScore(from_logits=True), (labels, logits))
    error = value(ExpectedCalibrationError(from_logits=True), (labels, logits))
    assert 0 <= score <= 2 + 1e-6
    assert 0 <= error <= 1 + 1e-6


@settings(deadline=None, max_examples=30)
@given(rows, st.sampled_from([1, 2, 15]))
def test_ece_of_any_bin_count(logits, num_bins):
    """At most the mean gap of single cases, at least the gap of the mean."""
    labels = np.zeros(len(logits), "int32")
    p = np.asarray(ops.softmax(logits.astype("float32")))  # ties and all
    gaps = (p.argmax(-1) == labels) - p.max(-1)
    metric = ExpectedCalibrationError(num_bins=num_bins, from_logits=True)
    error = value(metric, (labels, logits))
    assert abs(gaps.mean()) - 1e-5 <= error <= np.abs(gaps).mean() + 1e-5


@pytest.mark.parametrize("outside", [-1, 3])
def test_labels_must_be_classes(outside):
    labels = np.array([0, outside, 1])
    match = rf"`y_true` must be class indices in \[0, 3\).*{outside}"
    for metric in (BrierScore(), ExpectedCalibrationError()):
        with pytest.raises(ValueError, match=match):
            metric.update_state(labels, np.full((3, 3), 1 / 3, "float32"))


@pytest.mark.parametrize("num_bins", [0, -1, 2.5, True, "15", None])
def test_num_bins_must_be_a_positive_integer(num_bins):
    with pytest.raises(
        ValueError, match=r"`num_bins` must be an integer of at least 1.*Rec"
    ):
        ExpectedCalibrationError(num_bins=num_bins)


@every_metric
def test_class_counts_must_match(name):
    truth = np.full((4, 2), 0.5, "float32")
    student = np.full((4, 3), 1 / 3, "float32")
    with pytest.raises(ValueError, match="same number of classes.*Received"):
        build(name).update_state(truth, student)


@every_metric
@pytest.mark.parametrize("shape", [(4, 1), (3, 4, 1)])
def test_one_column_is_no_distribution(name, shape):
    with pytest.raises(ValueError, match="`y_pred` must have at least 2"):
        build(name).update_state(np.ones(shape), np.ones(shape))


@pytest.mark.parametrize("name", ["total_variation", "kl", "brier", "ece"])
def test_forgotten_from_logits(name):
    truth, logits = data(name)
    with pytest.raises(ValueError, match="`y_pred` must hold prob.*from_log"):
        build(name, from_logits=False).update_state(truth, logits)


@pytest.mark.parametrize("name", ["total_variation", "kl"])
def test_forgotten_teacher_from_logits(name):
    _, logits = data(name)
    with pytest.raises(
        ValueError, match="`y_true` must hold prob.*teacher_from_logits=True"
    ):
        build(name).update_state(logits, logits)
