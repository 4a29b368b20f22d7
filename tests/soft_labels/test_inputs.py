"""Inputs of every form, and their fingerprints."""

import hashlib

import keras
import numpy as np
import pytest

from keras_ptloss.soft_labels import SoftLabels, fingerprint, inputs


def padded(name, ids, mask_name, mask):
    """Return token ids as KerasHub or Hugging Face have them."""
    return {name: np.array(ids), mask_name: np.array(mask)}


def test_known_values():
    """They are on disk, so they must not change between versions."""
    parts = [b"float32(2,)", (8).to_bytes(8, "little")]
    parts.append(np.array([1, 2], "<f4").tobytes())
    digest = hashlib.blake2b(b"".join(parts), digest_size=8).digest()
    found = fingerprint(np.array([[1, 2]], "float32"))
    assert found.tobytes() == digest
    assert fingerprint(["a"]).tolist() == [14976307512181631790]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.array([[1, 2]], "int32"), np.array([[1, 2]], "int64")),
        (np.array([[1, 2]], "int32"), [[1, 2]]),
        (np.array([[1.5]], ">f4"), np.array([[1.5]], "<f4")),
        (["\u00e9"], np.array(["\u00e9".encode()])),
        (
            {"b": np.ones(1), "a": np.zeros(1)},
            {"a": np.zeros(1), "b": np.ones(1)},
        ),
        (
            padded("token_ids", [[5, 6, 0]], "padding_mask", [[1, 1, 0]]),
            padded("input_ids", [[9, 5, 6]], "attention_mask", [[0, 1, 1]]),
        ),
        (
            [[5, 6], [7]],
            padded(
                "token_ids", [[5, 6], [7, 0]], "padding_mask", [[1, 1], [1, 0]]
            ),
        ),
    ],
)
def test_what_is_the_same(one, other):
    np.testing.assert_array_equal(fingerprint(one), fingerprint(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.zeros((1, 2), "float32"), np.zeros((1, 2), "float64")),
        (np.zeros((1, 2, 3)), np.zeros((1, 3, 2))),
        (np.array([["ab", "c"]]), np.array([["a", "bc"]])),
        (
            {"a": np.array([1.0]), "b": np.array([2.0])},
            {"a": np.array([2.0]), "b": np.array([1.0])},
        ),
        ([[5, 6]], [[5, 6, 0]]),
    ],
)
def test_what_differs(one, other):
    assert (fingerprint(one) != fingerprint(other)).all()


class Batches(keras.utils.PyDataset):
    def __init__(self, x):
        super().__init__()
        self.x = x

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.x[2 * index : 2 * index + 2], np.zeros(2)


def as_tf(x):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((x, x)).batch(2)


def as_grain(x):
    grain = pytest.importorskip("grain")
    source = [(row, 0) for row in x]
    return grain.MapDataset.source(source).batch(2)


def as_torch(x):
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(x))
    return torch.utils.data.DataLoader(data, batch_size=2)


ARRAY = np.repeat(np.arange(7, dtype="float32")[:, None], 3, 1)


@pytest.mark.parametrize(
    "make",
    [lambda x: x, Batches, as_tf, as_grain, as_torch],
    ids=["array", "PyDataset", "tf.data", "Grain", "PyTorch"],
)
def test_every_form_is_labelled_and_attached(make, tmp_path):
    def teacher(batch):
        batch = np.asarray(batch)
        return np.stack([batch[:, 0] / 8, 1 - batch[:, 0] / 8], axis=-1)

    labels = SoftLabels.write(
        teacher, make(ARRAY), tmp_path / "a", batch_size=2, verbose=0
    )
    np.testing.assert_array_equal(labels.find(ARRAY), np.arange(7))
    pairs = labels.attach(make(ARRAY), batch_size=2)
    found = np.concatenate([np.asarray(y)[:, 0] for _, y in pairs])
    np.testing.assert_array_equal(found, np.arange(7) / 8)


def test_a_shuffled_data_set_resumes(tmp_path):
    """Rows are matched; no example is asked for twice."""
    asked = []
    failures = [TimeoutError()]

    def teacher(batch):
        if len(asked) == 4 and failures:
            raise failures.pop()
        asked.extend((batch[:, 0]).astype(int).tolist())
        return np.full((len(batch), 2), 0.5)

    options = {"verbose": 0, "teacher_name": "t"}
    with pytest.raises(RuntimeError):
        SoftLabels.write(teacher, Batches(ARRAY), tmp_path / "a", **options)
    order = np.array([6, 1, 0, 5, 2, 4, 3])
    labels = SoftLabels.write(
        teacher, Batches(ARRAY[order]), tmp_path / "a", **options
    )
    assert sorted(asked) == list(range(7))
    np.testing.assert_array_equal(np.sort(labels.find(ARRAY)), range(7))


def test_a_changed_data_set_is_refused_before_the_teacher_is_asked(tmp_path):
    count = 0

    def teacher(batch):
        nonlocal count
        count += 1
        if count == 3:
            raise TimeoutError
        return np.full((len(batch), 2), 0.5)

    options = {"verbose": 0, "teacher_name": "t"}
    with pytest.raises(RuntimeError):
        SoftLabels.write(teacher, Batches(ARRAY), tmp_path / "a", **options)
    with pytest.raises(ValueError, match="lack 4 of 4 stored"):
        SoftLabels.write(
            teacher, Batches(ARRAY + 0.5), tmp_path / "a", **options
        )
    assert count == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: as_tf(ARRAY).repeat(),
        lambda: as_grain(ARRAY).repeat(),
    ],
    ids=["tf.data", "Grain"],
)
def test_an_endless_data_set_is_refused(make, tmp_path):
    with pytest.raises(ValueError, match="repeat"):
        SoftLabels.write(len, make(), tmp_path / "a", verbose=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((np.zeros(3), np.zeros(4)), "same length"),
        (np.ma.masked_invalid([1.0, np.nan]), "mask"),
        ([[1, 2], [0.5]], "token ids"),
        (3, "same length"),
        (range(3), "data set of batches"),
    ],
)
def test_what_holds_no_examples_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        inputs.as_inputs(given)
