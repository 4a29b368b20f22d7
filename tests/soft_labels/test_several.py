"""Stored outputs of several teachers, side by side."""

import helpers
import keras
import numpy as np
import pytest

from keras_ptloss import Correction, SoftLabels
from keras_ptloss.soft_labels import SoftLabelSpec, attach_several

X = np.random.default_rng(0).normal(size=(20, 5)).astype("float32")


@pytest.fixture
def stores(tmp_path):
    """Three classes as probabilities, five as logits."""
    spec = SoftLabelSpec(from_logits=True)
    three = helpers.linear_model(3, seed=1, activation="softmax")
    five = helpers.linear_model(5, seed=2)
    return [
        SoftLabels.write(three, X, tmp_path / "three", verbose=0),
        SoftLabels.write(five, X, tmp_path / "five", spec=spec, verbose=0),
    ]


def test_rows(stores):
    both = np.concatenate([np.asarray(s) for s in stores], axis=1)
    x, rows = attach_several(stores, X, batch_size=20)[0]
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(rows, both)
    x, rows = attach_several(stores, X[::-1], ids="content", batch_size=5)[0]
    np.testing.assert_array_equal(rows, both[::-1][:5])


def test_tf_data(stores):
    tf = pytest.importorskip("tensorflow")
    both = np.concatenate([np.asarray(s) for s in stores], axis=1)
    batches = tf.data.Dataset.from_tensor_slices(X).batch(8)
    rows = [y.numpy() for _, y in attach_several(stores, batches)]
    np.testing.assert_array_equal(np.concatenate(rows), both)


def test_fit(stores):
    correction = Correction(
        scale=np.random.default_rng(0).normal(size=(3, 8)),
        teachers=(3, 5),
        teacher_from_logits=(False, True),
    )
    student = helpers.linear_model(3)
    student.compile(
        keras.optimizers.Adam(0.05), loss=correction.loss(from_logits=True)
    )
    data = attach_several(stores, X, shuffle=True, seed=0, batch_size=10)
    losses = student.fit(data, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_another_example_than_labelled(stores):
    with pytest.raises(ValueError, match="xample"):
        attach_several(stores, X + 1.0)


def test_other_examples(stores, tmp_path):
    moved = X.copy()
    moved[[4, 7]] += 1.0
    other = SoftLabels.write(
        helpers.linear_model(3), moved, tmp_path / "other",
        spec=SoftLabelSpec(from_logits=True), verbose=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"labels\[2\].*2 rows.*row 4"):
        attach_several([*stores, other], X)


def test_fewer_examples(stores, tmp_path):
    spec = SoftLabelSpec(from_logits=True)
    few = SoftLabels.write(
        helpers.linear_model(3), X[:5], tmp_path / "few", spec=spec, verbose=0
    )
    with pytest.raises(ValueError, match=r"labels\[1\] of 5 examples.*of 20"):
        attach_several([stores[0], few], X)


@pytest.mark.parametrize("labels", [[], "stores", [np.zeros((20, 3))]])
def test_no_stores(labels):
    with pytest.raises(ValueError, match="`labels` must be a list of Soft"):
        attach_several(labels, X)
