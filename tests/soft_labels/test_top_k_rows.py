"""The k largest of each row: stored as logarithms, read back as such."""

import json
import pathlib
import shutil

import keras
import numpy as np
import pytest
from stores import Batches, N, Teacher, features, tf_dataset, write

from keras_ptloss.losses import TopKPTLoss
from keras_ptloss.soft_labels import SoftLabels, _store

WIDE = 40


def expected_targets(rows, k):
    """From full rows: ids, their logarithms, and the rest's."""
    ids = np.argsort(-rows, axis=-1, kind="stable")
    logs = np.log(np.take_along_axis(rows, ids[:, :k], -1))
    rest = np.log(np.take_along_axis(rows, ids[:, k:], -1).sum(-1))
    ids = np.concatenate([ids[:, :k], np.full((len(rows), 1), -1)], axis=1)
    return np.stack([ids, np.concatenate([logs, rest[:, None]], 1)], axis=-1)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float16", 4e-3), ("float32", 1e-5)]
)
def test_targets(path, dtype, tolerance):
    teacher = Teacher(classes=WIDE)
    labels = write(path, teacher, top_k=5, dtype=dtype)
    rows = teacher.rows(features()).astype("float64")
    targets, expected = labels.top_k_targets, expected_targets(rows, 5)
    assert targets.shape == (N, 6, 2) and targets.dtype == "float32"
    np.testing.assert_array_equal(targets[:][..., 0], expected[..., 0])
    np.testing.assert_allclose(targets[:], expected, rtol=1e-3, atol=tolerance)
    np.testing.assert_array_equal(targets[3:5], targets[:][3:5])
    np.testing.assert_array_equal(targets[-1], targets[:][-1])
    np.testing.assert_array_equal(
        SoftLabels.open(path).top_k_targets[:], targets[:]
    )
    with pytest.raises(ValueError, match="`top_k` must be given"):
        _ = write(path.with_name("dense")).top_k_targets


def test_small_probabilities_do_not_vanish(path):
    """As float16, a probability below 6e-8 is 0; its logarithm is not."""
    row = np.array([1 - 1e-9 - 1e-12, 1e-9, 7e-13, 3e-13])

    def teacher(batch):
        return np.tile(row, (len(batch), 1))

    labels = write(path, teacher, top_k=2)
    logs = labels.top_k_targets[0]
    np.testing.assert_allclose(logs[1:, 1], np.log([1e-9, 1e-12]), rtol=1e-3)
    np.testing.assert_allclose(labels[0], row, rtol=1e-2, atol=5e-13)


@pytest.mark.parametrize("form", ["array", "batches", "tf.data"])
def test_attached_for_the_loss(path, form):
    """The loss is that of targets computed from the teacher's full rows."""
    teacher, x = Teacher(classes=WIDE), features()
    labels = write(path, teacher, top_k=5, dtype="float32")
    data = {"array": x, "batches": Batches(x)}.get(form)
    data = tf_dataset(x) if data is None else data
    attached = labels.attach(data, batch_size=8, targets="top_k")
    keras.utils.set_random_seed(0)
    student = keras.Sequential([keras.Input((3,)), keras.layers.Dense(WIDE)])
    loss = TopKPTLoss([0.5], from_logits=True, teacher_temperature=2.0)
    student.compile(keras.optimizers.SGD(0.1), loss=loss)
    expected = loss(
        expected_targets(teacher.rows(x), 5).astype("float32"),
        student.predict(x, verbose=0),
    )
    expected = float(expected)
    found = student.evaluate(attached, verbose=0)
    assert found == pytest.approx(expected, rel=1e-4)
    history = student.fit(attached, epochs=3, shuffle=False, verbose=0).history[
        "loss"
    ]
    assert history[-1] < expected


def test_arguments(path):
    labels = write(path)
    with pytest.raises(ValueError, match="`targets` must be one of"):
        labels.attach(features(), targets="top-k")
    with pytest.raises(ValueError, match="`top_k` must be given"):
        labels.attach(features(), targets="top_k")


@pytest.mark.parametrize("name", ["v1_top_k", "v1_top_k_unfinished"])
def test_stores_of_format_1(path, name):
    """Written by version 0.1, with probabilities: read, and gone on with."""
    saved = pathlib.Path(__file__).parents[1] / "saved"
    shutil.copytree(saved / f"{name}.softlabels", path)
    teacher = Teacher()
    labels = write(path, teacher, top_k=2, dtype="float32")
    assert teacher.asked == (0 if name == "v1_top_k" else N - 24)
    (manifest,) = path.glob("*/manifest.json")
    assert json.loads(manifest.read_text())["format"] == _store.FORMATS[0]
    assert (manifest.parent / "values.npy").exists()
    expected = expected_targets(Teacher().rows(features()), 2)
    np.testing.assert_allclose(labels.top_k_targets[:], expected, atol=1e-5)
    now = write(path.with_name("now"), top_k=2, dtype="float32")
    np.testing.assert_allclose(labels[:], now[:], atol=1e-6)
    labels.to_parquet(path.with_name("rows"))
    again = SoftLabels.open(path.with_name("rows"))
    np.testing.assert_allclose(again[:], now[:], atol=1e-6)
