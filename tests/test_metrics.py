"""Metrics against their definitions, written in NumPy."""

import helpers
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

from keras_ptloss.metrics import (
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


def data(name, shape=(32, 4), seed=0):
    """Truth (teacher or labels) and student logits.

    Of one shape wherever it does not matter: JAX compiles for each.
    """
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
    kwargs = {"name": "mine", "dtype": "bfloat16", "from_logits": True}
    if name in TEACHER:
        kwargs["teacher_from_logits"] = False
    else:
        kwargs["ignore_class"] = -100
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


@every_teacher_metric
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
    weight = np.random.default_rng(1).uniform(size=32).astype("float32")
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
    assert value(build(name), (truth, logits, np.zeros(32))) == 0.0
    weight = np.repeat([1.0, 0.0], 16)
    assert value(build(name), (truth, logits, weight)) == pytest.approx(
        reference(name, truth[:16], softmax(logits[:16])), abs=1e-6
    )


@every_metric
def test_batches_equal_the_whole(name):
    truth, logits = data(name)
    weight = np.random.default_rng(1).uniform(size=32).astype("float32")
    cuts = [slice(0, 1), slice(1, 32)]
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
        jit_compile=helpers.jit(),
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
    labels, logits = data(name)
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
    labels, logits = data("brier")
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
    labels, logits = data("brier")
    p = softmax(logits)
    one_hot = np.eye(4, dtype="float32")[labels]
    assert value(build("kl"), (one_hot, logits)) == pytest.approx(
        sklearn.metrics.log_loss(labels, p), abs=1e-5
    )
    teacher, _ = data("kl")
    p = p.astype("float32")
    assert value(KLToTeacher(), (teacher, p)) == pytest.approx(
        value(keras.metrics.KLDivergence(), (teacher, p)), abs=1e-5
    )


def test_agreement_is_the_accuracy_against_the_teachers_labels():
    teacher, logits = data("agreement")
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


# Cases that are not looked at.


def compiled_value(metric, truth, logits, weight=None):
    """The metric as `evaluate` computes it, compiled."""
    model = keras.Sequential(
        [keras.Input(logits.shape[1:]), keras.layers.Identity()]
    )
    place = "metrics" if weight is None else "weighted_metrics"
    model.compile(loss=no_loss, **{place: [metric]}, jit_compile=helpers.jit())
    logs = model.evaluate(
        logits, truth, sample_weight=weight, verbose=0, return_dict=True
    )
    return logs[metric.name]


def eager_value(metric, *batch):
    return value(metric, batch)


everywhere = pytest.mark.parametrize("run", [eager_value, compiled_value])


@everywhere
@every_label_metric
@pytest.mark.parametrize(("ignored", "column"), [(-100, False), (255, True)])
def test_ignore_class(name, run, ignored, column):
    labels, logits = data(name)
    expected = reference(name, labels[:20], softmax(logits[:20]))
    labels = labels.copy()
    labels[20:] = ignored
    logits[25:] = np.nan
    truth = labels[:, None] if column else labels
    metric = build(name, ignore_class=ignored)
    assert run(metric, truth, logits) == pytest.approx(expected, abs=1e-6)


@everywhere
@every_label_metric
@pytest.mark.parametrize("hidden", [False, True])
def test_ignore_class_beside_weights(name, run, hidden):
    """An ignored class has no weight, whatever weights it is given."""
    labels, logits = data(name)
    weight = np.random.default_rng(1).uniform(0.5, 2, size=32)
    labels[10:16] = -100  # of these weights
    kept = labels != -100
    if hidden:  # of weight 0, some of them ignored as well
        kept[13:20] = False
        weight[13:20] = 0.0
        logits[13:20] = np.nan
    expected = reference(
        name, labels[kept], softmax(logits[kept]), weight[kept]
    )
    metric = build(name, ignore_class=-100)
    found = run(metric, labels, logits, weight.astype("float32"))
    assert found == pytest.approx(expected, abs=1e-6)


@everywhere
@every_label_metric
def test_ignore_class_of_pixels(name, run):
    """As `keras.losses.SparseCategoricalCrossentropy` ignores them."""
    labels, logits = data(name, shape=(2, 3, 5, 4))
    kept = np.random.default_rng(1).uniform(size=labels.shape) < 0.6
    expected = reference(name, labels[kept], softmax(logits[kept]))
    metric = build(name, ignore_class=255)
    truth = np.where(kept, labels, 255)
    assert run(metric, truth, logits) == pytest.approx(expected, abs=1e-6)


@everywhere
@every_label_metric
def test_a_class_can_be_ignored(name, run):
    labels, logits = data(name)
    kept = labels != 2
    expected = reference(name, labels[kept], softmax(logits[kept]))
    metric = build(name, ignore_class=2)
    assert run(metric, labels, logits) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("run", "anything"),
    [(eager_value, -100), (eager_value, np.nan), (compiled_value, np.nan)],
)
@every_label_metric
def test_labels_of_weight_zero_may_be_anything(name, run, anything):
    labels, logits = data(name)
    weight = np.random.default_rng(1).uniform(0.5, 1, size=32)
    expected = reference(name, labels[:20], softmax(logits[:20]), weight[:20])
    truth, weight = labels.astype("float32"), weight.astype("float32")
    truth[20:], weight[20:] = anything, 0.0
    assert run(build(name), truth, logits, weight) == pytest.approx(
        expected, abs=1e-6
    )


@pytest.mark.parametrize(
    ("run", "anything"),
    [(eager_value, np.nan), (eager_value, np.inf), (compiled_value, np.nan)],
)
@every_metric
def test_rows_of_weight_zero_may_be_anything(name, run, anything):
    truth, logits = data(name)
    weight = np.repeat(np.array([1.0, 0.0], "float32"), 16)
    expected = reference(name, truth[:16], softmax(logits[:16]))
    logits[16:] = anything
    if name in TEACHER:
        truth[16:] = anything
    assert run(build(name), truth, logits, weight) == pytest.approx(
        expected, abs=1e-6
    )
    if run is eager_value and name != "agreement":
        p = np.full(logits.shape, anything, "float32")
        p[:16] = softmax(logits[:16])
        metric = build(name, from_logits=False)
        assert run(metric, truth, p, weight) == pytest.approx(
            expected, abs=1e-6
        )


@every_label_metric
@pytest.mark.parametrize("outside", [-1, 3, 0.5, np.nan])
def test_labels_must_be_classes(name, outside):
    labels = np.array([0, outside, 1])
    logits = np.zeros((3, 3), "float32")
    match = rf"`y_true` must be class indices in \[0, 3\).*{outside}"
    with pytest.raises(ValueError, match=match):
        build(name).update_state(labels, logits)
    if keras.backend.backend() == "torch":
        return  # which compiles nothing
    # Nothing can be raised here; a class 0 in its place would not be seen.
    assert np.isnan(compiled_value(build(name), labels, logits))
    # The next epoch is not touched by it.
    metric = build(name)
    helpers.compiled(lambda y, z: metric.update_state(y, z))
    metric.reset_state()
    assert np.isfinite(value(metric, (np.array([0, 2, 1]), logits)))


@every_label_metric
def test_one_hot_rows_must_be_rows(name):
    rows = np.array([[1, 0, 0], [0, 0, 0]], "float32")
    logits = np.zeros((2, 3), "float32")
    with pytest.raises(ValueError, match="`y_true` must be.*one-hot rows"):
        build(name).update_state(rows, logits)
    if keras.backend.backend() != "torch":  # which compiles nothing
        assert np.isnan(compiled_value(build(name), rows, logits))


@pytest.mark.parametrize("metric", LABELS.values())
@pytest.mark.parametrize("ignored", [0.5, "none", True, [1]])
def test_ignore_class_must_be_an_integer(metric, ignored):
    match = "`ignore_class` must be an integer, or None.*ignore_class="
    with pytest.raises(ValueError, match=match):
        metric(ignore_class=ignored)


@every_label_metric
@pytest.mark.parametrize("shape", [(3,), (1,), (4, 4), (4, 3, 1)])
def test_one_label_a_case(name, shape):
    with pytest.raises(ValueError, match=r"`y_true` must hold one.*Received"):
        build(name).update_state(np.zeros(shape), np.zeros((4, 2, 3)))


# Binary heads.


def binary(name, from_logits):
    """Truth and student with one column, and with the two it stands for."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(32, 1)) * 2
    one = z if from_logits else scipy.special.expit(z)
    two = softmax(np.concatenate([np.zeros_like(z), z], axis=-1))
    if name in LABELS:
        truth = rng.integers(0, 2, size=32)
        return truth, truth, one.astype("float32"), two
    t = rng.uniform(size=(32, 1))
    both = np.concatenate([1 - t, t], axis=-1)
    return t.astype("float32"), both, one.astype("float32"), two


@everywhere
@every_metric
@pytest.mark.parametrize("from_logits", [False, True])
def test_one_column_is_two_events(name, run, from_logits):
    truth, both, one, two = binary(name, from_logits)
    expected = reference(name, both, two)
    kwargs = {"from_logits": from_logits}
    if name in TEACHER:
        kwargs["teacher_from_logits"] = False
    for form in (truth, truth.reshape(-1, 1)):
        if name in TEACHER and form.ndim == 1:
            continue
        assert run(ALL[name](**kwargs), form, one) == pytest.approx(
            expected, abs=1e-6
        )
    if run is eager_value:  # in the form that the others are in
        metric = build(name, from_logits=False)
        assert run(metric, both, two.astype("float32")) == pytest.approx(
            expected, abs=1e-6
        )


@every_metric
def test_one_column_beside_two(name):
    """A teacher of two classes, a student of one output; one-hot labels."""
    _, both, one, two = binary(name, from_logits=True)
    if name in LABELS:
        both = np.eye(2, dtype="float32")[both]
    kwargs = {"teacher_from_logits": False} if name in TEACHER else {}
    metric = ALL[name](from_logits=True, **kwargs)
    truth = both if name in TEACHER else both.argmax(-1)
    assert value(metric, (both, one)) == pytest.approx(
        reference(name, truth, two), abs=1e-6
    )


def test_closed_forms_of_one_column():
    t, p = np.array([[0.9], [0.2]]), np.array([[0.6], [0.7]])
    labels = np.array([1, 0])
    kl = t * np.log(t / p) + (1 - t) * np.log((1 - t) / (1 - p))
    assert value(KLToTeacher(), (t, p)) == pytest.approx(kl.mean(), abs=1e-6)
    assert value(TotalVariationDistance(), (t, p)) == pytest.approx(0.4)
    assert value(TeacherAgreement(), (t, p)) == 0.5
    # 2 (p - y)^2, as it is the sum over both classes.
    assert value(BrierScore(), (labels, p)) == pytest.approx(0.16 + 0.49)
    # One bin: accuracy 1/2 and confidences 0.6 and 0.7.
    one_bin = ExpectedCalibrationError(num_bins=1)
    assert value(one_bin, (labels, p)) == pytest.approx(0.15)


def test_agreement_of_one_column_needs_the_form():
    """A logit of 0.3 is above a half, a probability of 0.3 below it."""
    teacher, student = np.array([[0.9]]), np.array([[0.3]])
    assert value(TeacherAgreement(), (teacher, student)) == 0.0
    logit = TeacherAgreement(from_logits=True, teacher_from_logits=False)
    assert value(logit, (teacher, student)) == 1.0
    with pytest.raises(ValueError, match="`y_pred` must hold.*from_logits"):
        TeacherAgreement().update_state(teacher, np.array([[1.5]]))
    with pytest.raises(ValueError, match="`y_true`.*teacher_from_logits=True"):
        TeacherAgreement().update_state(np.array([[-2.0]]), student)


# Class axes of unknown size.


@every_metric
@pytest.mark.parametrize("form", ["rows", "column", "one_column_student"])
def test_unknown_class_axis(name, form):
    """`tf.data` generators leave it open: TensorFlow's graphs see None."""
    tf = pytest.importorskip("tensorflow")

    truth, logits = data(name, shape=(12, 3))
    expected = reference(name, truth, softmax(logits))
    if form == "one_column_student":
        truth, both, logits, two = binary(name, from_logits=True)
        expected = reference(name, both, two)
    if name in LABELS and form == "rows":
        truth = np.eye(3)[truth]
    elif name in LABELS:
        truth = truth[:, None]
    batches = tf.data.Dataset.from_generator(
        lambda: iter([(logits, truth.astype("float32"))]),
        output_signature=(
            tf.TensorSpec((None, logits.shape[-1])),
            tf.TensorSpec((None, None)),
        ),
    ).apply(tf.data.experimental.assert_cardinality(1))
    kwargs = {"teacher_from_logits": False} if name in TEACHER else {}
    metric = ALL[name](from_logits=True, **kwargs)
    model = keras.Sequential(
        [keras.Input(logits.shape[1:]), keras.layers.Identity()]
    )
    model.compile(loss=no_loss, metrics=[metric])
    logs = model.evaluate(batches, verbose=0, return_dict=True)
    assert logs[metric.name] == pytest.approx(expected, abs=1e-6)


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
