import keras
import numpy as np
import pytest
import scipy.special
import tensorflow as tf
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline

from keras_ptloss import distillation_targets
from keras_ptloss.targets import (
    BOTH,
    CORRECTED,
    LABELS_ONLY,
    TEACHER,
    _geometric_mean,
    _is_level,
    _LabelsOnly,
)

NUM_ROWS, NUM_CLASSES = 300, 3


@pytest.fixture(scope="module")
def task():
    """Three clusters; the teacher takes half of class 1 for class 0."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, NUM_CLASSES, NUM_ROWS)
    x = np.eye(NUM_CLASSES)[y] * 2.5 + rng.normal(size=(NUM_ROWS, NUM_CLASSES))
    seen = np.where((y == 1) & (rng.random(NUM_ROWS) < 0.7), 0, y)
    logits = 3 * np.eye(NUM_CLASSES)[seen] + rng.normal(size=x.shape)
    labels = np.where(np.arange(NUM_ROWS) < 60, y, -1)
    return {
        "x": x.astype("float32"),
        "y": y,
        "labels": labels,
        "teacher": scipy.special.softmax(logits, axis=1),
        "logits": logits,
    }


def accuracy(targets, task):
    unknown = task["labels"] < 0
    right = targets.values.argmax(axis=1) == task["y"]
    return right[unknown].mean()


def build_keras(activation="softmax", units=NUM_CLASSES):
    dense = keras.layers.Dense(units, activation, kernel_initializer="zeros")
    return keras.Sequential([keras.Input((NUM_CLASSES,)), dense])


def test_without_a_model(task):
    targets = distillation_targets(
        task["teacher"], task["labels"], label_weight=3.0
    )
    known = task["labels"] >= 0
    expected = targets.result.correct(task["teacher"])
    np.testing.assert_allclose(
        targets.values[~known], expected[~known], rtol=1e-5
    )
    onehot = np.eye(NUM_CLASSES)[task["labels"][known]]
    np.testing.assert_array_equal(targets.values[known], onehot)
    np.testing.assert_array_equal(
        targets.sample_weight, np.where(known, 3.0, 1.0)
    )
    assert list(targets.scores) == [TEACHER, CORRECTED]
    assert targets.averaged == (targets.chosen,) == (CORRECTED,)
    assert targets.scores[CORRECTED] == targets.result.score
    assert targets.values.dtype == targets.sample_weight.dtype == "float32"


def test_logits_give_the_same_targets(task):
    a = distillation_targets(task["teacher"], task["labels"])
    b = distillation_targets(task["logits"], task["labels"], from_logits=True)
    np.testing.assert_allclose(a.values, b.values, atol=1e-4)


def test_a_good_labels_only_model_wins(task):
    alone = distillation_targets(task["teacher"], task["labels"])
    targets = distillation_targets(
        task["teacher"],
        task["labels"],
        x=task["x"],
        build_model=LogisticRegression,
    )
    assert targets.chosen in (BOTH, LABELS_ONLY)
    assert targets.scores[targets.chosen] == min(targets.scores.values())
    assert accuracy(targets, task) > accuracy(alone, task)
    assert targets.model.score(task["x"], task["y"]) > 0.8


def test_a_model_that_learns_nothing_does_not_count(task):
    # On its own training rows this model is always right.
    noise = np.random.default_rng(1).normal(size=(NUM_ROWS, 5))
    targets = distillation_targets(
        task["teacher"],
        task["labels"],
        x=noise,
        build_model=lambda: KNeighborsClassifier(1),
    )
    alone = distillation_targets(task["teacher"], task["labels"])
    assert targets.scores[LABELS_ONLY] > 0.9 * np.log(NUM_CLASSES)
    assert targets.scores[BOTH] > 0.95 * targets.scores[CORRECTED]
    assert accuracy(targets, task) > accuracy(alone, task) - 0.05


def test_level_means_within_a_standard_error():
    # A mean excess of 0.05 with the standard error 0.07, then 0.04.
    excess = 0.05 + 0.7 * np.tile([-1.0, 1.0], 200)
    lowest = np.linspace(0, 1, 400)
    assert _is_level(lowest[:100] + excess[:100], lowest[:100])
    assert not _is_level(lowest + excess, lowest)
    assert _is_level(lowest, lowest)


def test_level_candidates_are_averaged(task, monkeypatch):
    given = []

    def mean(candidates):
        given.extend(candidates)
        return _geometric_mean(candidates)

    monkeypatch.setattr("keras_ptloss.targets._geometric_mean", mean)
    monkeypatch.setattr("keras_ptloss.targets._is_level", lambda a, b: True)
    targets = distillation_targets(
        task["teacher"],
        task["labels"],
        x=task["x"],
        build_model=LogisticRegression,
    )
    assert targets.averaged == (CORRECTED, LABELS_ONLY, BOTH)
    product = np.prod(np.maximum(given, 1e-7), axis=0) ** (1 / 3)
    geometric_mean = product / product.sum(axis=1, keepdims=True)
    unknown = task["labels"] < 0
    np.testing.assert_allclose(
        targets.values[unknown],
        geometric_mean[unknown],
        rtol=1e-4,
    )


@pytest.mark.parametrize(
    "form", ["indices", "one-hot", "softmax", "logits", "sigmoid"]
)
def test_forms_of_keras_models(task, form):
    binary = form == "sigmoid"
    labels = np.minimum(task["y"], 1) if binary else task["y"]
    classes = 2 if binary else NUM_CLASSES

    def build():
        if binary:
            model = build_keras("sigmoid", units=1)
        else:
            model = build_keras(None if form == "logits" else "softmax")
        loss = {
            "indices": "sparse_categorical_crossentropy",
            "one-hot": keras.losses.CategoricalCrossentropy(),
        }.get(form)
        if loss:
            model.compile(keras.optimizers.Adam(0.1), loss)
        return model

    recipe = _LabelsOnly(build, classes, epochs=10, batch_size=16)
    stop = np.arange(50)
    model, epoch = recipe.fit(task["x"], labels, np.arange(NUM_ROWS), stop)
    probs = recipe.predict(model, task["x"], NUM_ROWS)
    assert 1 <= epoch <= 10
    assert probs.shape == (NUM_ROWS, classes)
    np.testing.assert_allclose(probs.sum(axis=1), 1, atol=1e-5)
    # The model starts with equal probabilities.
    nll = -np.log(probs[np.arange(NUM_ROWS), labels]).mean()
    assert nll < np.log(classes)


def test_early_stopping_restores_the_best_epoch(task):
    def build():
        model = build_keras()
        # So large a step makes the model worse at once.
        model.compile(
            keras.optimizers.SGD(1e4), "sparse_categorical_crossentropy"
        )
        return model

    recipe = _LabelsOnly(build, NUM_CLASSES, epochs=10, batch_size=8)
    rows, stop = np.arange(60), np.arange(10)
    model, epoch = recipe.fit(task["x"], task["y"], rows, stop)
    loss = model.evaluate(task["x"][stop], task["y"][stop], verbose=0)
    losses = model.history.history["val_loss"]
    np.testing.assert_allclose(loss, min(losses), rtol=1e-4)
    assert epoch == np.argmin(losses) + 1


def test_keras_model_with_dict_inputs_and_live_teacher(task):
    def build():
        a, b = (keras.Input((n,), name=k) for k, n in (("a", 1), ("b", 2)))
        joined = keras.layers.Concatenate()([a, b])
        outputs = keras.layers.Dense(NUM_CLASSES, "softmax")(joined)
        return keras.Model({"a": a, "b": b}, outputs)

    teacher = build()
    teacher.set_weights([2 * np.eye(NUM_CLASSES), np.zeros(NUM_CLASSES)])
    x = {"a": task["x"][:, :1], "b": task["x"][:, 1:]}
    targets = distillation_targets(
        teacher, task["labels"], x=x, build_model=build, epochs=3
    )
    expected = distillation_targets(
        teacher.predict(x, verbose=0), task["labels"]
    )
    assert targets.scores[TEACHER] == pytest.approx(expected.scores[TEACHER])
    assert len(targets.scores) == 4
    assert isinstance(targets.model, keras.Model)


def test_a_data_set_gives_what_its_arrays_give(task):
    data = tf.data.Dataset.from_tensor_slices(task["x"]).batch(64)
    teacher = build_keras()
    a, b = (
        distillation_targets(
            [teacher, task["teacher"]],
            task["labels"],
            x=x,
            build_model=LogisticRegression,
        )
        for x in (task["x"], data)
    )
    assert a.chosen == b.chosen
    np.testing.assert_allclose(a.values, b.values, atol=1e-4)


def test_several_teachers(task):
    teachers = [task["teacher"], np.sqrt(task["teacher"])]
    teachers[1] /= teachers[1].sum(axis=1, keepdims=True)
    targets = distillation_targets(teachers, task["labels"])
    expected = targets.result.correct(teachers)
    unknown = task["labels"] < 0
    np.testing.assert_allclose(
        targets.values[unknown], expected[unknown], rtol=1e-5
    )


def test_texts(task):
    words = np.array(["red", "green", "blue"])
    texts = [f"it is {word}" for word in words[task["y"]]]
    targets = distillation_targets(
        task["teacher"],
        task["labels"],
        x=texts,
        build_model=lambda: make_pipeline(
            CountVectorizer(), LogisticRegression()
        ),
    )
    assert accuracy(targets, task) == 1.0


@pytest.mark.filterwarnings("ignore:1 of 3 classes have no label")
def test_a_class_without_labels_keeps_the_teachers_probability(task):
    labels = np.where(task["labels"] == 2, -1, task["labels"])
    unknown = labels < 0
    kept, learned = (
        distillation_targets(
            task["teacher"],
            labels,
            x=task["x"],
            build_model=LogisticRegression,
            random_sample=random_sample,
        )
        for random_sample in (False, True)
    )
    assert kept.chosen in (BOTH, LABELS_ONLY)
    mean = task["teacher"][unknown, 2].mean()
    assert kept.values[unknown, 2].mean() == pytest.approx(mean, rel=0.1)
    assert learned.values[unknown, 2].mean() < 0.5 * mean


def test_a_classifier_that_has_not_seen_a_class(task):
    rows = np.flatnonzero(task["y"] != 1)
    recipe = _LabelsOnly(LogisticRegression, NUM_CLASSES, 1, 32)
    model, _ = recipe.fit(task["x"], task["y"], rows)
    probs = recipe.predict(model, task["x"], num_rows=len(rows))
    np.testing.assert_allclose(probs.sum(axis=1), 1)
    np.testing.assert_allclose(probs[:, 1], 1 / (len(rows) + NUM_CLASSES))


def test_fifteen_labels(task):
    labels = np.where(np.arange(NUM_ROWS) < 15, task["y"], -1)
    targets = distillation_targets(
        task["teacher"], labels, x=task["x"], build_model=LogisticRegression
    )
    assert np.isfinite(targets.values).all()
    teacher = task["teacher"].argmax(axis=1) == task["y"]
    assert accuracy(targets, task) > teacher.mean() - 0.05


def test_all_rows_labelled(task):
    targets = distillation_targets(task["teacher"], task["y"])
    np.testing.assert_array_equal(
        targets.values, np.eye(NUM_CLASSES)[task["y"]]
    )


def test_summary(task, capsys):
    targets = distillation_targets(task["teacher"], task["labels"])
    capsys.readouterr()
    targets.summary()
    printed = capsys.readouterr().out.splitlines()
    assert [CORRECTED in line for line in printed] == [False, False, True]
    assert printed[2].endswith("<- chosen")
    assert repr(targets).splitlines() == printed


def shuffled(x):
    return tf.data.Dataset.from_tensor_slices(x).shuffle(300).batch(64)


def infinite(x):
    return tf.data.Dataset.from_tensor_slices(x).batch(64).repeat()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.full(NUM_ROWS, -1)}, "Label some rows first"),
        ({"labels": np.full(NUM_ROWS, -2)}, "integers of shape"),
        ({"labels": np.full(NUM_ROWS, 0.5)}, "integers of shape"),
        ({"labels": np.zeros((NUM_ROWS, 2), int)}, "integers of shape"),
        ({"labels": np.zeros(NUM_ROWS - 1, int)}, "one row"),
        ({"labels": np.full(NUM_ROWS, NUM_CLASSES)}, "labels"),
        ({"x": None}, "`x` must hold the inputs"),
        ({"x": np.zeros((NUM_ROWS - 1, 2))}, "one row for each label"),
        ({"x": shuffled}, "same order"),
        ({"x": infinite}, "more rows"),
        ({"x": iter}, "same order"),
    ],
)
def test_errors(task, change, message):
    arguments = {"labels": task["labels"], "x": task["x"]} | change
    if callable(arguments["x"]):
        arguments["x"] = arguments["x"](task["x"])
    with pytest.raises(ValueError, match=message):
        distillation_targets(
            task["teacher"], build_model=LogisticRegression, **arguments
        )
