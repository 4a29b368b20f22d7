"""Stores of tokens that are killed, damaged, or gone on with."""

import json
import os
import signal

import helpers
import keras
import numpy as np
import pytest
from forker import asked_rows, forking
from stores import Batches, flipped, spoilt
from token_stores import Teacher, V, texts, write

from keras_ptloss.soft_labels import SoftLabels, TokenLabels
from keras_ptloss.soft_labels._tokens.spec import (
    KEPT_FORMATS,
    SEQUENCE_FORMATS,
    token_formats,
)

pytestmark = helpers.slow_but_on_one()

N = 12
FOLDER = "shard-00000-of-00001"

# Sequence `row` has `row % 5 + 1` tokens, all of them `row`, and its teacher
# gives the id `row` with the log-probability -1.
CODE = """
    from keras_ptloss.soft_labels import TokenLabels, TokenLabelSpec

    def write_store(path, answer, size):
        def teacher(batch):
            ids = batch["token_ids"]
            answer(ids[:, 0])
            return np.stack([ids, -np.ones(ids.shape)], axis=-1)[:, :, None]

        TokenLabels.write(
            teacher,
            [[row] * (row % 5 + 1) for row in range(30)],
            path,
            spec=TokenLabelSpec(top_k=1, vocabulary_size=50),
            batch_size=size,
            verbose=0,
        )
"""


@pytest.fixture(scope="module")
def forker():
    yield from forking(CODE)


def test_killed_at_random_points(path, tmp_path, forker):
    random = np.random.default_rng()
    kills, stores, times = 0, 0, 10
    while kills < times:
        store = path.with_suffix(f".{stores}")
        log = tmp_path / f"asked-{stores}"
        before, stored, status = kills, 0, -signal.SIGKILL
        while status and kills < times:
            asked = len(asked_rows(log))
            seconds = random.uniform(0.02, 0.12)
            status = forker.killed_after(
                seconds, store, log, pause=0.01, size=3
            )
            # The teacher was not asked for what was stored when it started.
            assert all(row >= stored for row in asked_rows(log)[asked:])
            if status:
                assert status == -signal.SIGKILL
                kills, stored = kills + 1, check_incomplete(store, stored)
        if status:
            forker.start(store, log, size=3)
            assert forker.wait() == 0
        check_complete(store, log, 3 * (kills - before))
        stores += 1


def test_two_writers_are_refused(path):
    """While the first writes, and it is not disturbed."""
    teacher = Teacher(entries=4)

    def while_writing(batch):
        other = f"another process .pid {os.getpid()} on "
        with pytest.raises(RuntimeError, match=other):
            write(path)
        return teacher(batch)

    while_writing.entries = 4
    labels = write(path, while_writing)
    assert len(labels) == teacher.asked == N
    np.testing.assert_array_equal(
        labels[3], write(path.with_suffix(".alone"))[3]
    )


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_system_call(path, tmp_path, forker, step):
    """Kill before the k-th call that changes the disk, for each k."""
    crash_at, status = -np.random.default_rng().integers(step), -signal.SIGKILL
    while status:
        crash_at += step
        store = path.with_suffix(f".{crash_at}")
        log = tmp_path / f"asked-{crash_at}"
        forker.start(store, log, crash_at=crash_at, size=20)
        status = forker.wait()
        stored = check_incomplete(store, 0)
        before = len(asked_rows(log))
        # In batches of another size: what was written and not counted stands
        # in the way of the next.
        forker.start(store, log, size=7)
        assert forker.wait() == 0
        assert asked_rows(log)[before:] == list(range(stored, 30))
        check_complete(store, log, 20)
    assert crash_at > 40


def check_incomplete(store, stored_before):
    if (store / FOLDER).exists():
        return 30
    with pytest.raises((ValueError, FileNotFoundError)):
        TokenLabels.open(store)
    manifest = store / f"{FOLDER}.partial" / "manifest.json"
    if not manifest.exists():
        return 0
    stored = json.loads(manifest.read_text())["stored"]["sequences"]
    assert stored >= stored_before
    return stored


def check_complete(store, log, lost):
    labels = TokenLabels.open(store)
    assert len(labels) == 30
    for row in range(30):
        assert labels[row].shape == (row % 5 + 1, 2, 2)
        assert (labels[row][:, 0] == (row, -1)).all()
    asked = asked_rows(log)
    assert set(asked) == set(range(30))
    # At most the batch in flight is asked twice.
    assert len(asked) - 30 <= lost


def test_goes_on_after_a_teacher_that_fails(path):
    teacher = Teacher(fail_at=5, entries=4)
    with pytest.raises(
        RuntimeError,
        match="sequences 5 to 9. The 5 before are.*no route",
    ):
        write(path, teacher)
    with pytest.raises(ValueError, match="this has 5 sequences only: call"):
        TokenLabels.open(path)
    teacher.fail_at = None
    write(path, teacher, batch_size=4)
    assert teacher.asked == N
    with pytest.raises(ValueError, match="top_k.*4 as in the stored"):
        write(path, k=5)
    with pytest.raises(ValueError, match="sequence 2, which is another"):
        write(path, dataset=[*texts()[:2], [7], *texts()[3:]])
    with pytest.raises(ValueError, match="hold 12 examples. Received: 11"):
        write(path, dataset=texts()[:-1])
    with pytest.raises(ValueError, match="hold 12 examples. Received: at l"):
        write(path, teacher, dataset=[*texts(), [1, 1]], batch_size=20)
    assert teacher.asked == N


def test_goes_on_with_batches(path):
    x = np.random.default_rng(0).integers(0, V, (10, 3))
    teacher = Teacher(fail_at=4, entries=4)
    with pytest.raises(RuntimeError):
        write(path, teacher, Batches(x, size=4))
    teacher.fail_at = None
    # Batches of another size: the first is stored in part.
    labels = write(path, teacher, Batches(x, size=6))
    assert teacher.asked == 10 and labels.rows_of(x).tolist() == list(range(10))


@pytest.mark.parametrize(
    "name",
    [
        "fingerprints",
        "lengths",
        "counts",
        "ids",
        "log_values",
        "log_tail",
        "kept",
    ],
)
def test_any_damaged_file_is_named(path, name):
    write(path)
    file = path / FOLDER / f"{name}.npy"
    good = file.read_bytes()
    for bad in spoilt(good, range(0, 128, 9), 10):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=f"intact store.*{name}.npy"):
            TokenLabels.open(path)
    file.write_bytes(good)
    assert len(TokenLabels.open(path)) == N


def test_a_flipped_bit_of_the_manifest_changes_nothing(path):
    rows = write(path)[3]
    file = path / FOLDER / "manifest.json"
    good = file.read_bytes()
    for place in range(len(good)):
        file.write_bytes(flipped(good, place, place % 8))
        try:
            found = TokenLabels.open(path)[3]
        except ValueError as error:
            assert "`path` must be" in str(error)
        else:
            np.testing.assert_array_equal(found, rows)


def test_a_store_of_another_kind(path, tmp_path):
    write(path)
    with pytest.raises(ValueError, match="opened by TokenLabels"):
        SoftLabels.open(path)
    other = tmp_path / "other"
    SoftLabels.write(
        lambda x: np.full((3, 2), 0.5), np.arange(3), other, verbose=0
    )
    with pytest.raises(ValueError, match="opened by SoftLabels"):
        TokenLabels.open(other)


def test_disk_full_midway_keeps_what_is_stored(path, monkeypatch):
    pwrite, teacher = os.pwrite, Teacher(entries=4)

    def full(descriptor, data, offset):
        if teacher.asked > 5:
            raise OSError(28, "No space left on device")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="The 5 sequences that are stored stay"):
        write(path, teacher)
    monkeypatch.undo()
    assert len(write(path, teacher)) == N


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"top_k": 0},
            "`top_k` must be an integer of at least 1. R.*top_k=0",
        ),
        ({"top_k": 5, "vocabulary_size": 4}, "`top_k` must be at most the voc"),
        (
            {"vocabulary_size": 2**24 + 1},
            "vocabulary_size. must be at most 16",
        ),
        ({"vocabulary_size": 1}, "vocabulary_size. must be an integer of at"),
        ({"from_logits": 1}, "from_logits=1"),
        ({"temperature": 0}, "temperature=0"),
    ],
)
def test_spec_errors(options, match):
    from keras_ptloss.soft_labels import TokenLabelSpec

    with pytest.raises(ValueError, match=match):
        TokenLabelSpec(**{"top_k": 2, **options})


def entries(*pairs):
    return lambda x: np.array([[pairs] * 3], "float64")


def rows(value):
    return lambda x: np.full((1, 3, 4), value)


@pytest.mark.parametrize(
    ("teacher", "match"),
    [
        (
            entries((V, -1.0), (2, -1.0)),
            "id 37, and vocabulary_size is 37, at",
        ),
        (entries((2, -1.0), (2, -1.5)), "has the id 2 twice, at position 0 of"),
        (entries((2, 0.5), (3, -1.5)), "log-probability of 0.5, above 0"),
        (entries((2, np.nan), (3, -1.5)), "log-probability of nan"),
        (entries((2, -0.1), (3, -0.1)), "add up to 1.80967"),
        (entries((2.5, -1), (3, -1.0)), r"no whole int64, \[2.5 3. \]"),
        (entries((2, -1.0), (np.inf, -1.0)), r"no whole int64, \[ 2. inf\]"),
        (entries((-np.inf, -1.0), (3, -1.0)), "no whole int64"),
        (entries((np.nan, -1.0), (3, -1.0)), "no whole int64"),
        (entries((2, -1.0), (1e30, -1.0)), "no whole int64"),
        (entries((2, -1.0), (-1, -9.0)), "with their tail .id -1. add up to"),
        (lambda x: np.ones((1, 3, 2, 3)), "one that returns shape"),
        (lambda x: np.ones((1, 2, 2, 2)), "returned shape .1, 2, '...'. where"),
        (rows(0.2), "vocabulary_size. must be the teacher's 4"),
        ("teacher", "`teacher` must be a keras.Model or a callable"),
    ],
)
def test_answers_that_are_refused(path, teacher, match):
    with pytest.raises(ValueError, match=match):
        write(path, teacher, [[1, 2, 3]], k=2, vocabulary_size=V)


@pytest.mark.parametrize("model", [False, True])
@pytest.mark.parametrize(
    ("dtype", "first"), [("float16", 2049), ("bfloat16", 257)]
)
def test_ids_that_a_dtype_rounds(path, dtype, first, model):
    """Every id below `first` is exact in it, and `first` is not."""

    def api(x):
        found = [[[[first - 1, -1.0], [3, -2.0]]] * 3]
        return keras.ops.convert_to_tensor(found, dtype)

    teacher, x = api, np.array([[1, 2, 3]])
    if model:
        layer = keras.layers.Lambda(lambda x: api(x), dtype=dtype)
        teacher = keras.Sequential([keras.Input((3,), dtype="int32"), layer])
    with pytest.raises(
        ValueError,
        match="`teacher` must be one whose dtype has all ids below"
        f" vocabulary_size={first + 1}.*returns {dtype}, which rounds {first}",
    ):
        write(path, teacher, x, k=2, vocabulary_size=first + 1)
    labels = write(path, teacher, x, k=2, vocabulary_size=first)
    assert labels[0][0].tolist()[:2] == [[first - 1, -1.0], [3, -2.0]]


@pytest.mark.parametrize(
    ("value", "logits", "match"),
    [
        (np.nan, True, "has NaN or infinity, at position 0 of sequence 0"),
        (np.inf, True, "has NaN or infinity"),
        (0.5, False, "add up to 2 .are they logits"),
        (-0.5, False, "NaN, or negative numbers .are they logits"),
    ],
)
def test_rows_that_are_refused(path, value, logits, match):
    teacher = rows(value)
    teacher.logits = logits
    with pytest.raises(ValueError, match=match):
        write(path, teacher, [[1, 2, 3]], k=2)


@pytest.mark.parametrize(
    ("dataset", "options", "match"),
    [
        ([[1], []], {}, r"\[\] as its sequence 1"),
        ([[1.5]], {}, "sequences of one or more integers"),
        (np.ones((2, 3)), {}, "float64 of shape .2, 3."),
        (np.ones((2, 3, 1), int), {}, "int64 of shape .2, 3, 1."),
        (-np.ones((2, 3), int), {}, "ids from 0 to 2"),
        ({"ids": np.ones((2, 3), int)}, {}, "has them as 'token_ids'"),
        (
            np.ones((2, 3), int),
            {"sample_weight": np.ones((2, 4))},
            "`sample_weight`",
        ),
        (np.ones((2, 3), int), {"sample_weight": np.ones(3)}, "of 2 sequences"),
        (np.ones((2, 3), int), {"batch_size": 0}, "`batch_size`"),
        (np.ones((2, 3), int), {"verbose": 5}, "`verbose`"),
    ],
)
def test_data_sets_that_are_refused(path, dataset, options, match):
    with pytest.raises(ValueError, match=match):
        write(path, dataset=dataset, **options)


@pytest.mark.parametrize(
    "change",
    [
        {"stored": ["sequences", "tokens", "kept"]},
        {"stored": None},
        {"checksums": [*SEQUENCE_FORMATS, *KEPT_FORMATS, *token_formats(4, V)]},
        {"total_variation": 3},
        {"spec": [["top_k", 4]]},
        {"vocabulary_size": "37"},
    ],
)
def test_manifests_from_elsewhere(path, change):
    write(path)
    file = path / FOLDER / "manifest.json"
    manifest = {**json.loads(file.read_text()), **change}
    del manifest["checksum"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="an intact store, but its manifest"):
        TokenLabels.open(path)
