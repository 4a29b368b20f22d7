"""Stored soft labels: writing, resuming, reading."""

import json
import pathlib
import pickle

import keras
import numpy as np
import pytest
from stores import (
    Batches,
    C,
    N,
    Teacher,
    features,
    softmax,
    tf_dataset,
    weights_of,
    write,
)

from keras_ptloss.soft_labels import SoftLabels, SoftLabelSpec, fingerprint

# Storing and reading


@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_are_the_teachers(path, dtype, from_logits):
    labels = write(path, dtype=dtype, from_logits=from_logits)
    expected = Teacher(logits=from_logits).rows(features())
    assert labels.shape == (N, C) and len(labels) == N
    assert labels[:].dtype == "float32"
    atol = {"float16": 2e-3, "float32": 1e-6}[dtype]
    np.testing.assert_allclose(labels[:], expected, atol=atol)
    if not from_logits:
        np.testing.assert_allclose(labels[:].sum(-1), 1, atol=1e-6)
    # The bounds that SoftLabelSpec states.
    bound = {"float16": 5e-4, "float32": 1e-6}[dtype]
    if from_logits and dtype == "float16":
        bound = np.abs(expected).max() / 4096
    p = softmax(expected) if from_logits else expected
    q = softmax(labels[:]) if from_logits else labels[:]
    distance = 0.5 * np.abs(p.astype("float64") - q).sum(-1)
    assert labels.max_total_variation <= bound
    assert distance.max() == pytest.approx(labels.max_total_variation, abs=2e-7)
    assert distance.mean() == pytest.approx(
        labels.mean_total_variation, abs=2e-7
    )


def test_indexing_is_numpys(path):
    labels = write(path)
    full = np.asarray(labels)
    mask = np.arange(N) % 3 == 0
    for index in (0, -1, np.int64(7), slice(3, 9), slice(None, None, -7)):
        np.testing.assert_array_equal(labels[index], full[index])
    for index in ([4, 4, -2], mask, np.array([], int), np.array([49, 0])):
        np.testing.assert_array_equal(labels[index], full[index])
    assert labels[[]].shape == (0, C)
    assert np.asarray(labels, "float64").dtype == "float64"
    for index in (N, -N - 1, [0, N], 1.5, np.zeros((2, 2), int)):
        with pytest.raises(IndexError):
            labels[index]
    # Before NumPy 2 it meant: where it is needed.
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        with pytest.raises(ValueError, match="copied"):
            np.array(labels, copy=False)


def test_top_k_spreads_the_rest(path):
    labels = write(path, top_k=2, dtype="float32")
    expected = Teacher().rows(features()).astype("float64")
    order = np.argsort(-expected, -1)
    for row, o in zip(expected, order, strict=True):
        row[o[2:]] = row[o[2:]].mean()
    np.testing.assert_allclose(labels[:], expected, atol=1e-6)
    full = Teacher().rows(features())
    distance = 0.5 * np.abs(full - expected).sum(-1)
    assert labels.max_total_variation == pytest.approx(distance.max(), abs=1e-6)
    tails = np.sort(full, -1)[:, :-2].sum(-1)
    assert labels.max_total_variation <= tails.max()


def test_numpy_reads_the_files_without_us(path):
    labels = write(path, dtype="float32")
    folder = path / "shard-00000-of-00001"
    rows = np.load(folder / "labels.npy", mmap_mode="r")
    np.testing.assert_allclose(rows, labels[:], atol=1e-6)
    hashes = np.load(folder / "fingerprints.npy")
    np.testing.assert_array_equal(hashes, fingerprint(features()))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["stored"] == N


def test_spec_and_pickle_survive(path):
    names = ("a", "b", "c", "d")
    labels = write(
        path, class_names=list(names), temperature=2.0, teacher_name="t5"
    )
    for read in (SoftLabels.open(path), pickle.loads(pickle.dumps(labels))):
        assert read.spec == SoftLabelSpec(
            num_examples=N,
            class_names=names,
            temperature=2.0,
            teacher_name="t5",
        )
        np.testing.assert_array_equal(read[:], labels[:])
    assert "teacher.softlabels" in repr(labels)


def test_every_form_of_data_set_gives_the_same_store(path, tmp_path):
    x = features()
    expected = write(path, dataset=x)
    forms = {
        "pytree": {"inputs": x},
        "pydataset": Batches(x, np.zeros(N)),
        "backend": keras.ops.convert_to_tensor(x),
        "tf": tf_dataset(x, np.zeros(N)),
    }
    for name, dataset in forms.items():
        teacher = Teacher()
        labels = write(
            tmp_path / name,
            (lambda b: Teacher()(b["inputs"])) if name == "pytree" else teacher,
            dataset,
            num_examples=N,
        )
        np.testing.assert_array_equal(labels[:], expected[:])
        np.testing.assert_array_equal(
            labels.fingerprints, expected.fingerprints
        )


def test_texts_have_one_fingerprint_in_numpy_and_tf(path):
    texts = ["a film", "ein Stück", ""]
    labels = write(path, lambda b: np.full((len(b), 2), 0.5), texts)
    for same in (np.array(texts), np.array(texts, object), tf_dataset(texts)):
        assert len(list(labels.attach(same))) == 1
    with pytest.raises(ValueError, match="example 1 is in no stored row"):
        labels.attach(["a film", "ein Stueck", ""])


def test_keras_teacher_runs_frozen(path):
    keras.utils.set_random_seed(0)
    teacher = keras.Sequential(
        [
            keras.layers.Dropout(0.5),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(C, activation="softmax"),
        ]
    )
    teacher.build((None, 3))
    before = weights_of(teacher)
    labels = write(path, teacher, dtype="float32")
    expected = keras.ops.convert_to_numpy(teacher(features(), training=False))
    np.testing.assert_allclose(labels[:], expected, atol=1e-6)
    for old, new in zip(before, weights_of(teacher), strict=True):
        np.testing.assert_array_equal(old, new)


def test_progress_bar(path, capsys):
    SoftLabels.write(Teacher(), features(), path, verbose=1)
    assert f"{N}/{N}" in capsys.readouterr().out


@pytest.mark.parametrize("from_logits", [False, True])
def test_one_column_is_two_events(path, tmp_path, from_logits):
    """A sigmoid head gives the same store as its two-class form."""
    z = np.array([[-3.0], [0.0], [0.25], [8.0]])
    p = 1 / (1 + np.exp(-z))
    one, two = p, np.concatenate([1 - p, p], -1)
    if from_logits:
        one, two = z, np.concatenate([0 * z, z], -1)
    kwargs = {
        "dataset": np.arange(4),
        "from_logits": from_logits,
        "dtype": "float32",
        "class_names": ("no", "yes"),
    }
    labels = write(path, lambda x: one[x], **kwargs)
    np.testing.assert_array_equal(
        labels[:], write(tmp_path / "two", lambda x: two[x], **kwargs)[:]
    )
    np.testing.assert_allclose(labels[:], two, atol=1e-6)
    assert labels.from_logits is from_logits
    # A Keras model, and rows that are no probabilities.
    head = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    labels = write(tmp_path / "model", head, from_logits=True, dtype="float32")
    np.testing.assert_array_equal(labels[:][:, 0], np.zeros(N))
    np.testing.assert_allclose(
        labels[:][:, 1:], head.predict(features(), verbose=0), atol=1e-5
    )
    with pytest.raises(ValueError, match="negative probabilities.*example 0"):
        write(tmp_path / "bad", lambda x: 2 + 0 * z[x], dataset=np.arange(4))
    with pytest.raises(ValueError, match="2 classes, not 3"):
        write(
            tmp_path / "three",
            lambda x: p[x],
            dataset=np.arange(4),
            class_names=("a", "b", "c"),
        )


def test_a_store_of_the_previous_version_opens():
    saved = pathlib.Path(__file__).parents[1] / "saved"
    labels = SoftLabels.open(saved / "v1.softlabels")
    rows = np.load(
        saved / "v1.softlabels" / "shard-00000-of-00001" / "labels.npy"
    ).astype("float32")
    assert labels.shape == (16, 3) and not labels.from_logits
    assert labels.spec == SoftLabelSpec(num_examples=16)
    expected = rows / rows.sum(-1, keepdims=True)
    np.testing.assert_allclose(labels[:], expected, atol=1e-7)
    # Fingerprints have not changed either.
    inputs = np.load(saved / "inputs.npy")
    soft = labels.attach(inputs[::-1], ids="content")[0][1]
    np.testing.assert_array_equal(soft, labels[::-1])


# Resuming


def test_resume_asks_for_missing_rows_only(path):
    with pytest.raises(RuntimeError, match="examples 24 to 31.*ConnectionErr"):
        write(path, Teacher(fail_at=24))
    with pytest.raises(ValueError, match=r"shard 0 of 1 \(24 rows stored\)"):
        SoftLabels.open(path)
    teacher = Teacher()
    # Another batch size cuts the stored part inside of a batch.
    labels = SoftLabels.write(
        teacher, features(), path, batch_size=7, verbose=0
    )
    assert teacher.asked == N - 24
    np.testing.assert_allclose(labels[:], teacher.rows(features()), atol=1e-3)
    again = Teacher()
    write(path, again)
    assert again.asked == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"teacher_name": "b"}, "`teacher_name` must be None as in"),
        ({"dtype": "float32"}, "`dtype` must be 'float16' as in"),
    ],
)
def test_resume_refuses_another_spec(path, change, match):
    write(path)
    with pytest.raises(ValueError, match=match):
        write(path, **change)


def test_resume_refuses_other_data(path):
    with pytest.raises(RuntimeError):
        write(path, Teacher(fail_at=24))
    x = features()
    x[3] += 1
    with pytest.raises(ValueError, match="example 3 is in no stored row"):
        write(path, dataset=x)
    with pytest.raises(ValueError, match="`num_examples` must be 50 as in"):
        write(path, dataset=features()[:30])


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (lambda p: np.where(p == p[-1, -1], np.nan, p), "NaN.*example 31"),
        (lambda p: p - 0.5, "negative probabilities.*from_logits"),
        (lambda p: p * 2, "do not add up to 1.*from_logits"),
        (lambda p: p[:, :3], "3 classes, not 4"),
        (lambda p: p[:5], r"shape \(5, 4\), not \(8, 4\)"),
        (lambda p: p[0], r"shape \(4,\)"),
        (lambda p: p.astype(str), "not numbers"),
    ],
)
def test_bad_outputs_leave_the_stored_rows_good(path, bad, match):
    teacher = Teacher()

    def moody(x):
        rows = teacher(x)
        return bad(rows) if teacher.asked > 24 else rows

    with pytest.raises(ValueError, match=match):
        write(path, moody)
    assert teacher.asked == 32
    write(path, teacher)
    assert teacher.asked == N + 8


def test_float16_overflow_is_an_error(path):
    with pytest.raises(ValueError, match="`dtype` must be 'float32' for"):
        write(path, lambda x: Teacher(True)(x) * 1e6, from_logits=True)


# Shards


def test_shards_are_read_as_one(path, tmp_path):
    expected = write(tmp_path / "whole")
    teacher = Teacher()
    for index, dataset in ((2, Batches(features())), (0, features())):
        SoftLabels.write_shard(
            teacher,
            dataset,
            path,
            shard=(index, 3),
            spec=SoftLabelSpec(num_examples=N),
            verbose=0,
        )
    with pytest.raises(ValueError, match=r"shard 1 of 3 \(not begun\)"):
        SoftLabels.open(path)
    SoftLabels.write_shard(
        teacher,
        tf_dataset(features()),
        path,
        shard=(1, 3),
        spec=SoftLabelSpec(num_examples=N),
        verbose=0,
    )
    assert teacher.asked == N
    labels = SoftLabels.open(path)
    np.testing.assert_array_equal(labels[:], expected[:])
    rows = np.random.default_rng(0).permutation(N)
    np.testing.assert_array_equal(labels[rows], expected[:][rows])
    # The teacher's own rounding differs with the size of its batches.
    assert labels.mean_total_variation == pytest.approx(
        expected.mean_total_variation, abs=1e-7
    )
    files = sorted(path.iterdir())
    with pytest.raises(ValueError, match="`shard` must be of the store's 3"):
        write(path)
    assert sorted(path.iterdir()) == files


def test_a_shard_loads_its_own_batches_only(path):
    dataset = Batches(features())
    spec = SoftLabelSpec(num_examples=N)
    SoftLabels.write_shard(
        Teacher(), dataset, path, shard=(2, 3), spec=spec, verbose=0
    )
    assert sorted(set(dataset.loaded)) == [0, 4, 5, 6]


def test_shards_must_agree(path):
    for index, names in enumerate([None, ("a", "b", "c", "d")]):
        SoftLabels.write_shard(
            Teacher(),
            features(),
            path,
            shard=(index, 2),
            spec=SoftLabelSpec(class_names=names),
            verbose=0,
        )
    with pytest.raises(ValueError, match="contradicts shard 0"):
        SoftLabels.open(path)
