"""Stored soft labels: writing, crashes, reading, attaching."""

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import keras
import numpy as np
import pytest

from keras_ptloss.soft_labels._data import fingerprints
from keras_ptloss.soft_labels._retries import with_retries
from keras_ptloss.soft_labels._soft_labels import SoftLabels
from keras_ptloss.soft_labels._spec import SoftLabelSpec

N, C = 50, 4


def features(n=N, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 3)).astype("float32")


def softmax(logits):
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


class Teacher:
    """A known function of the inputs that records what it was asked."""

    def __init__(self, logits=False, fail_at=None, classes=C):
        weights = np.random.default_rng(1).normal(size=(3, classes))
        self.weights = weights.astype("float32")
        self.logits, self.fail_at, self.asked = logits, fail_at, 0

    def rows(self, x):
        logits = x @ self.weights
        return logits if self.logits else softmax(logits)

    def __call__(self, x):
        if self.fail_at is not None and self.asked >= self.fail_at:
            raise ConnectionError("no route to teacher")
        self.asked += len(x)
        return self.rows(x)


class Batches(keras.utils.PyDataset):
    def __init__(self, *arrays, size=8):
        super().__init__()
        self.arrays, self.size, self.loaded = arrays, size, []

    def __len__(self):
        return -(-len(self.arrays[0]) // self.size)

    def __getitem__(self, index):
        self.loaded.append(index)
        low = index * self.size
        return tuple(array[low : low + self.size] for array in self.arrays)


def tf_dataset(*arrays, size=8):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(arrays).batch(size)


def write(path, teacher=None, dataset=None, **kwargs):
    spec = SoftLabelSpec(**kwargs)
    dataset = features() if dataset is None else dataset
    return SoftLabels.write(
        teacher or Teacher(logits=spec.from_logits),
        dataset,
        path,
        spec=spec,
        batch_size=8,
        verbose=0,
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "teacher.softlabels"


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
    np.testing.assert_array_equal(hashes, fingerprints(features()))
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


def test_retries(monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    calls = []

    def client(x):
        calls.append(x)
        raise TimeoutError

    kwargs = {"retry_on": (TimeoutError,), "retries": 4, "max_delay": 3.0}
    with pytest.raises(TimeoutError):
        with_retries(client, **kwargs)(1)
    assert len(calls) == 5
    for wait, longest in zip(waits, (1, 2, 3, 3), strict=True):
        assert longest / 2 <= wait <= longest
    with pytest.raises(TimeoutError):
        with_retries(client, retry_on=(OSError,), retries=0)(1)
    for wrong in ((), TimeoutError, ("x",)):
        with pytest.raises(ValueError, match="`retry_on` must be a tuple"):
            with_retries(client, retry_on=wrong)
    with pytest.raises(ValueError, match="`retries` must be"):
        with_retries(client, retry_on=(OSError,), retries=-1)
    with pytest.raises(ValueError, match="`first_delay` must be"):
        with_retries(client, retry_on=(OSError,), first_delay=-1)
    with pytest.raises(ValueError, match="`teacher` must be a callable"):
        with_retries(3, retry_on=(OSError,))


# Crashes: real processes

# One process imports the package; each line from stdin makes it fork a writer,
# whose pid it prints. So twenty writers cost one import. JAX is the backend
# that imports fastest; nothing is computed with it.
FORKER = textwrap.dedent(
    """
    import os, signal, sys, time
    import numpy as np
    from keras_ptloss.soft_labels._spec import SoftLabelSpec
    from keras_ptloss.soft_labels._soft_labels import SoftLabels

    def write(path, log, pause, crash_at, size):
        x = np.arange(120.0).reshape(60, 2)
        calls = 0

        def counted(function):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == crash_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return call

        if crash_at:
            for name in ("fsync", "replace", "rename", "pwrite", "mkdir"):
                setattr(os, name, counted(getattr(os, name)))

        def teacher(batch):
            time.sleep(pause)
            rows = (batch[:, :1] / 2).astype(int)
            os.write(log_file, b"".join(b"%d " % r[0] for r in rows))
            return np.concatenate([rows, -rows, rows * 2], axis=-1)

        log_file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        spec = SoftLabelSpec(from_logits=True)
        SoftLabels.write(
            teacher, x, path, spec=spec, batch_size=size, verbose=0
        )

    while line := sys.stdin.readline():
        path, log, pause, crash_at, size = line.split()
        pid = os.fork()
        if pid == 0:
            write(path, log, float(pause), int(crash_at), int(size))
            os._exit(0)
        print(pid, flush=True)
        # Not before it is asked to, so that the pid stays the writer's.
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    """
)


class Forker:
    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKER],
            env={**os.environ, "KERAS_BACKEND": "jax"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, path, log, pause=0.0, crash_at=0, size=5):
        self.process.stdin.write(f"{path} {log} {pause} {crash_at} {size}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self):
        self.process.stdin.write("wait\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def forker():
    forker = Forker()
    yield forker
    forker.process.communicate()
    assert forker.process.returncode == 0


def test_killed_at_random_points_20_times(path, tmp_path, forker):
    random = np.random.default_rng()
    kills, stores = 0, 0
    while kills < 20:
        store = path.with_suffix(f".{stores}")
        log = tmp_path / f"asked-{stores}"
        killed_here, stored = 0, 0
        while True:
            known, asked_before = stored, len(asked_rows(log))
            pid = forker.start(store, log, pause=0.004)
            time.sleep(random.uniform(0, 0.12))
            os.kill(pid, signal.SIGKILL)
            status = forker.wait()
            # The teacher was not asked for any row stored when it started.
            assert all(row >= known for row in asked_rows(log)[asked_before:])
            if status == 0:
                break
            assert status == -signal.SIGKILL
            kills, killed_here = kills + 1, killed_here + 1
            stored = check_incomplete(store, stored)
        check_complete(store, log, 5 * killed_here)
        stores += 1


def asked_rows(log):
    return [int(row) for row in log.read_text().split()] if log.exists() else []


def check_incomplete(store, stored_before):
    """No rows got lost, those counted are right, and it is not readable."""
    if (store / "shard-00000-of-00001").exists():
        return 60
    with pytest.raises((ValueError, FileNotFoundError)):
        SoftLabels.open(store)
    partial = store / "shard-00000-of-00001.partial"
    if not (partial / "manifest.json").exists():
        return 0
    stored = json.loads((partial / "manifest.json").read_text())["stored"]
    assert stored >= stored_before
    rows = np.load(partial / "labels.npy")[:stored, 0]
    np.testing.assert_array_equal(rows, np.arange(stored))
    return stored


def check_complete(store, log, lost):
    rows = np.arange(60)[:, None]
    expected = np.concatenate([rows, -rows, 2 * rows], -1)
    np.testing.assert_array_equal(SoftLabels.open(store)[:], expected)
    asked = asked_rows(log)
    assert set(asked) == set(range(60))
    # At most the batch in flight is asked twice.
    assert len(asked) - 60 <= lost


def test_killed_at_every_system_call(path, tmp_path, forker):
    """Kill before the k-th call that changes the disk, for each k."""
    crash_at, status = 0, -signal.SIGKILL
    while status:
        crash_at += 1
        store = path.with_suffix(f".{crash_at}")
        log = tmp_path / f"asked-{crash_at}"
        forker.start(store, log, crash_at=crash_at, size=20)
        status = forker.wait()
        stored = check_incomplete(store, 0)
        asked_before = len(asked_rows(log))
        forker.start(store, log, size=20)
        assert forker.wait() == 0
        assert asked_rows(log)[asked_before:] == list(range(stored, 60))
        check_complete(store, log, 20)
    assert crash_at > 30


def test_two_writers_of_a_shard_are_refused(path, tmp_path, forker):
    log = tmp_path / "asked"
    pid = forker.start(path, log, pause=0.2)
    while not log.exists() or not log.read_text():
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match=f"another process .pid {pid} "):
        write(path, dataset=features(60))
    os.kill(pid, signal.SIGKILL)
    forker.wait()
    # The kernel has dropped the lock of the killed process.
    forker.start(path, log)
    assert forker.wait() == 0


def test_full_disk(path):
    """A limit on file size stands for a full disk: both are an OSError."""
    code = """
        import resource, sys
        import numpy as np
        from keras_ptloss.soft_labels._soft_labels import SoftLabels
        asked = 0
        def teacher(x):
            global asked
            asked += len(x)
            return np.full((len(x), 500), 0.002)
        x, path = np.arange(1000), sys.argv[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))
        try:
            SoftLabels.write(teacher, x, path, verbose=0)
        except OSError as error:
            assert "make room and call again" in str(error), error
        else:
            raise AssertionError("no error")
        assert asked == 32, asked
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        assert len(SoftLabels.write(teacher, x, path, verbose=0)) == 1000
        assert asked == 1032, asked
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), path],
        env={**os.environ, "KERAS_BACKEND": "jax"},
        check=True,
    )


def test_disk_full_midway_keeps_the_stored_rows(path, monkeypatch):
    pwrite, teacher = os.pwrite, Teacher()

    def full(descriptor, data, offset):
        if teacher.asked > 24:
            raise OSError(28, "No space left on device")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space.*The 24 rows.*stay good"):
        write(path, teacher)
    monkeypatch.undo()
    write(path, teacher)
    assert teacher.asked == N + 8


# Integrity


def test_damage_is_found(path):
    write(path)
    folder = path / "shard-00000-of-00001"
    file = folder / "labels.npy"
    good = file.read_bytes()
    file.write_bytes(good[:-9] + b"\x01" + good[-8:])
    with pytest.raises(ValueError, match="checksum of labels.npy differs"):
        SoftLabels.open(path)
    assert len(SoftLabels.open(path, verify=False)) == N
    file.write_bytes(good[:-8])
    with pytest.raises(ValueError, match="labels.npy is unreadable"):
        SoftLabels.open(path)
    np.save(file, np.zeros((N, C + 1), "float16"))
    with pytest.raises(ValueError, match=r"holds float16\(50, 5\) where"):
        SoftLabels.open(path)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest is no JSON"):
        SoftLabels.open(path)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="format is not"):
        SoftLabels.open(path)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no manifest"):
        SoftLabels.open(path)
    with pytest.raises(FileNotFoundError, match="No soft labels at"):
        SoftLabels.open(path / "elsewhere")


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
    with pytest.raises(ValueError, match="`shard` must be of the store's 3"):
        write(path)


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


# Attaching


def forms(*arrays):
    yield arrays[0]
    yield Batches(*arrays)
    yield tf_dataset(*arrays)


def pairs(dataset):
    batches = [
        [np.asarray(part) for part in batch]
        for batch in (
            dataset
            if not isinstance(dataset, keras.utils.PyDataset)
            else (dataset[i] for i in range(dataset.num_batches))
        )
    ]
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


def test_attach_in_order(path):
    labels, x = write(path), features()
    for dataset in forms(x, np.zeros(N)):
        inputs, soft = pairs(labels.attach(dataset))
        np.testing.assert_array_equal(inputs, x)
        np.testing.assert_array_equal(soft, labels[:])


def test_shuffling_cannot_misalign(path):
    labels, x = write(path), features()
    order = np.random.default_rng(3).permutation(N)[:30]
    for ids in (order, "content"):
        for dataset in forms(x[order]):
            inputs, soft = pairs(labels.attach(dataset, ids=ids))
            np.testing.assert_array_equal(inputs, x[order])
            np.testing.assert_array_equal(soft, labels[order])
    shuffled = tf_dataset(x).unbatch().shuffle(N).batch(7)
    inputs, soft = pairs(labels.attach(shuffled, ids="content"))
    np.testing.assert_allclose(soft, Teacher().rows(inputs), atol=1e-3)
    epochs = labels.attach(x, shuffle=True, seed=1)
    first, soft = pairs(epochs)
    np.testing.assert_allclose(soft, Teacher().rows(first), atol=1e-3)
    epochs.on_epoch_end()
    second, soft = pairs(epochs)
    np.testing.assert_allclose(soft, Teacher().rows(second), atol=1e-3)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(
        first, pairs(labels.attach(x, shuffle=True, seed=1))[0]
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: np.where(x == x[20, 1], 9, x), "example 20 is in no stored"),
        (lambda x: x[::-1], "example 0 is that of stored row 49, not of row 0"),
        (lambda x: x[:40], "hold 50 examples. Received: 40 examples|batches"),
        (lambda x: np.concatenate([x, x]), "must hold 50 examples"),
        (lambda x: x.astype("float64"), "example 0 is in no stored row"),
    ],
)
def test_a_wrong_data_set_is_an_error(path, change, match):
    labels, x = write(path), change(features())
    for number, dataset in enumerate(forms(x)):
        errors = (ValueError,)
        if number == 2:
            tf = pytest.importorskip("tensorflow")
            errors = (tf.errors.InvalidArgumentError,)
        with pytest.raises(errors, match=match):
            pairs(labels.attach(dataset))


def test_unknown_content_is_an_error(path):
    labels = write(path)
    with pytest.raises(ValueError, match="example 2 is in no stored row"):
        labels.attach(
            np.concatenate([features()[:2], features(1, 9)]), ids="content"
        )


def test_attach_keeps_weights_and_preprocesses(path):
    labels, x = write(path), features()
    weights = np.arange(N, dtype="float32")
    for dataset in (
        Batches(x, np.zeros(N), weights),
        tf_dataset(x, np.zeros(N), weights),
    ):
        inputs, soft, found = pairs(
            labels.attach(dataset, preprocessor=lambda batch: batch * 2)
        )
        np.testing.assert_array_equal(inputs, x * 2)
        np.testing.assert_array_equal(soft, labels[:])
        np.testing.assert_array_equal(found, weights)
    two = labels.attach(x, preprocessor=lambda b: {"a": b, "b": b[:, :1]})
    assert two[0][0]["b"].shape == (32, 1)


def weights_of(model):
    # Through a tensor: NumPy deprecates how Keras 3.15 converts variables.
    return [keras.ops.convert_to_numpy(1.0 * w) for w in model.weights]


def small_student():
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(8, "relu"),
            keras.layers.Dense(C),
        ]
    )
    softmax_then_kl = keras.losses.KLDivergence()
    model.compile(
        keras.optimizers.Adam(0.01),
        loss=lambda t, z: softmax_then_kl(t, keras.ops.softmax(z)),
    )
    return model


def test_stored_equals_live(path):
    """Distilling from a store is distilling with the live teacher."""
    keras.utils.set_random_seed(0)
    teacher = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(C, activation="softmax")]
    )
    x = features()
    live = small_student()
    for _ in range(3):
        for low in range(0, N, 8):
            batch = x[low : low + 8]
            live.train_on_batch(batch, teacher.predict_on_batch(batch))
    labels = write(path, teacher, dtype="float32")
    for dataset in forms(x):
        stored = small_student()
        attached = labels.attach(dataset, batch_size=8)
        stored.fit(attached, epochs=3, shuffle=False, verbose=0)
        for a, b in zip(weights_of(live), weights_of(stored), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


# Arguments


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"num_examples": 0}, "`num_examples` must be an integer"),
        ({"class_names": ("a",)}, "`class_names` must be at least two"),
        ({"class_names": ("a", "a")}, "`class_names` must be at least two"),
        ({"class_names": "ab"}, "`class_names` must be at least two"),
        ({"from_logits": 1}, "`from_logits` must be True or False"),
        ({"temperature": 0}, "`temperature` must be a positive number"),
        ({"dtype": "int8"}, "`dtype` must be one of 'float16', 'float32'"),
        ({"top_k": 0}, "`top_k` must be an integer"),
        ({"top_k": 2, "from_logits": True}, "`top_k` must be None for logits"),
    ],
)
def test_spec_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        SoftLabelSpec(**kwargs)


def test_write_arguments(path):
    with pytest.raises(ValueError, match="`teacher` must be"):
        write(path, 3)
    with pytest.raises(ValueError, match="`batch_size` must be"):
        SoftLabels.write(Teacher(), features(), path, batch_size=0)
    with pytest.raises(ValueError, match="`verbose` must be"):
        SoftLabels.write(Teacher(), features(), path, verbose=3)
    with pytest.raises(ValueError, match="`num_examples` must be given"):
        write(path, dataset=Batches(features()))
    with pytest.raises(ValueError, match="`num_examples` must be the data"):
        write(path, num_examples=3)
    for n in (N - 1, N + 1):
        with pytest.raises(ValueError, match=f"must hold {n} examples"):
            write(
                path.with_suffix(f".{n}"),
                None,
                Batches(features()),
                num_examples=n,
            )
    with pytest.raises(ValueError, match="`dataset` must be finite"):
        write(path, dataset=tf_dataset(features()).repeat(), num_examples=N)
    for wrong in (3.0, {"a": features(), "b": features(3)}, np.zeros((0, 3))):
        with pytest.raises(ValueError, match="`dataset` must be a tf.data"):
            write(path, dataset=wrong)
    for shard in (1, (1, 1), (-1, 2), (0, N + 1), (0, 0)):
        with pytest.raises(ValueError, match="`shard` must be"):
            SoftLabels.write_shard(Teacher(), features(), path, shard=shard)
    with pytest.raises(ValueError, match="`top_k` must be below the 4"):
        write(path, top_k=C)
    with pytest.raises(ValueError, match="4 classes, not 2"):
        write(path.with_suffix(".names"), class_names=("a", "b"))


def test_attach_arguments(path):
    labels, x = write(path), features()
    for ids in ("rows", [0.5], [[0]]):
        with pytest.raises(ValueError, match="`ids` must be"):
            labels.attach(x, ids=ids)
    with pytest.raises(ValueError, match="`ids` must be rows from 0 to 49"):
        labels.attach(x, ids=[50])
    with pytest.raises(ValueError, match="`shuffle` must be False"):
        labels.attach(Batches(x), shuffle=True)
    with pytest.raises(ValueError, match="`batch_size` must be"):
        labels.attach(x, batch_size=0)
