"""Data sets of Grain and PyTorch, with several workers: the order is proved.

Each example's row of the teacher is known, so a row of another one is seen.
"""

import importlib.util

import keras
import numpy as np
import pytest
from records import Records
from stores import C, N, Teacher, features, weights_of, write

from keras_ptloss import PTLoss
from keras_ptloss.soft_labels import (
    SoftLabels,
    SoftLabelSpec,
    TokenLabels,
    TokenLabelSpec,
    fingerprint,
)


def import_grain():
    grain = pytest.importorskip("grain")
    # Its workers ask for flags, which a program without `absl.app` has not
    # parsed.
    import absl.flags

    absl.flags.FLAGS.mark_as_parsed()
    return grain


def import_torch():
    if importlib.util.find_spec("torch") is None:
        pytest.skip("`make test-torch` runs it, which has PyTorch")
    import torch

    return torch


def torch_loader(*arrays, workers=0, **kwargs):
    data = import_torch().utils.data
    return data.DataLoader(
        Records(*arrays),
        batch_size=8,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        **kwargs,
    )


def grain_map(*arrays):
    grain = import_grain()
    return grain.MapDataset.source(Records(*arrays)).batch(8)


def grain_iter(*arrays, workers=0):
    grain = import_grain()
    options = grain.MultiprocessingOptions(num_workers=workers)
    data = grain_map(*arrays).to_iter_dataset()
    return data.mp_prefetch(options) if workers else data


def grain_loader(*arrays, workers=0):
    grain = import_grain()
    return grain.DataLoader(
        data_source=Records(*arrays),
        sampler=grain.samplers.SequentialSampler(len(arrays[0])),
        operations=[grain.transforms.Batch(8)],
        worker_count=workers,
    )


LOADERS = (torch_loader, grain_map, grain_iter, grain_loader)
loaders = pytest.mark.parametrize("loader", LOADERS)
# Of the libraries, about forks of processes with threads.
pytestmark = pytest.mark.filterwarnings("default")


def read(dataset):
    found = [tuple(np.asarray(part) for part in batch) for batch in dataset]
    return [np.concatenate(part) for part in zip(*found, strict=True)]


@loaders
def test_written_and_attached(path, loader):
    """As from the array; labels and weights beside the inputs are no inputs."""
    x, weights = features(), np.arange(N, dtype="float32")
    teacher = Teacher()
    data = loader(x, np.zeros(N), weights)
    labels = write(path, teacher, data, num_examples=N)
    np.testing.assert_array_equal(
        labels[:], write(path.with_name("array"), dtype="float16")[:]
    )
    assert teacher.asked == N
    attached = labels.attach(data, preprocessor=lambda batch: batch * 2)
    for _ in range(2):  # epochs
        inputs, soft, found = read(attached)
        np.testing.assert_array_equal(inputs, x * 2)
        np.testing.assert_array_equal(soft, labels[:])
        np.testing.assert_array_equal(found, weights)


@pytest.mark.parametrize("loader", [torch_loader, grain_iter, grain_loader])
def test_several_workers(path, loader):
    """Their batches come in one order, and rows are those of each example."""
    data = loader(features(), np.zeros(N), workers=2)
    labels = write(path, dataset=data, num_examples=N)
    inputs, soft = read(labels.attach(data, ids="content"))
    np.testing.assert_allclose(soft, Teacher().rows(inputs), atol=1e-3)
    assert len(np.unique(labels.fingerprints)) == len(inputs) == N
    inputs, soft = read(labels.attach(data))
    np.testing.assert_array_equal(soft, labels[:])
    np.testing.assert_allclose(soft, Teacher().rows(inputs), atol=1e-3)
    if loader is not grain_loader:  # each of its workers makes its own batches
        np.testing.assert_array_equal(inputs, features())


@loaders
def test_a_killed_write_goes_on(path, loader):
    with pytest.raises(RuntimeError, match="no route to teacher"):
        write(path, Teacher(fail_at=24), loader(features()), num_examples=N)
    teacher = Teacher()
    labels = write(path, teacher, loader(features()), num_examples=N)
    assert teacher.asked == N - 24
    order = labels.attach(loader(features()))
    inputs, soft = read(order)
    np.testing.assert_allclose(soft, teacher.rows(inputs), atol=1e-3)


@loaders
def test_another_order_is_an_error_or_found_by_content(path, loader):
    labels, x = write(path), features()
    order = np.random.default_rng(3).permutation(N)
    with pytest.raises(ValueError, match="the data set is reordered"):
        read(labels.attach(loader(x[order])))
    inputs, soft = read(labels.attach(loader(x[order]), ids="content"))
    np.testing.assert_allclose(soft, Teacher().rows(inputs), atol=1e-3)
    assert len(inputs) == N
    with pytest.raises(ValueError, match="example 0 is in no stored row"):
        read(labels.attach(loader(features(seed=9)), ids="content"))
    with pytest.raises(ValueError, match="must hold 50 examples"):
        read(labels.attach(loader(x[:40])))


@loaders
def test_fit(path, loader):
    labels, x = write(path), features()
    weights = []
    for data in (x, loader(x)):
        keras.utils.set_random_seed(3)
        student = keras.Sequential([keras.Input((3,)), keras.layers.Dense(C)])
        loss = PTLoss(0.0, from_logits=True, teacher_from_logits=False)
        student.compile(keras.optimizers.SGD(0.1), loss=loss)
        attached = labels.attach(data, batch_size=8)
        student.fit(attached, epochs=2, shuffle=False, verbose=0)
        weights.append(weights_of(student))
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_teachers(path, dtype):
    """Recorded for a gradient, and in what NumPy has not, on any backend."""
    torch = import_torch()
    rows = Teacher().rows(features())
    given = torch.tensor(rows, requires_grad=True).to(getattr(torch, dtype))
    labels = write(path, lambda x: given[: len(x)], features(8))
    atol = {"float32": 1e-3, "bfloat16": 2.0**-8}[dtype]
    np.testing.assert_allclose(labels[:], rows[:8], atol=atol)

    def tokens(x):
        ids = torch.tensor(x["token_ids"])
        return (ids[..., None] == torch.arange(4)).to(given) + 0 * given[0]

    spec = TokenLabelSpec(top_k=1)
    store = path.with_name("tokens")
    texts = [[1, 2], [3, 0, 1]]
    stored = TokenLabels.write(tokens, texts, store, spec=spec, verbose=0)
    assert [stored[i][:, 0, 0].tolist() for i in (0, 1)] == texts

    def entries(x):
        return torch.stack([given[0, :1] * 0 + 3, given[0, :1] * 0 - 1], -1)[
            None, None
        ].tile((*x["token_ids"].shape, 1, 1))

    spec = TokenLabelSpec(top_k=1, vocabulary_size=5)
    store = path.with_name("entries")
    stored = TokenLabels.write(entries, texts, store, spec=spec, verbose=0)
    assert stored[1][:, 0].tolist() == [[3, -1]] * 3


def test_torch_in_bfloat16(path):
    """Arrays, loaders and weights, found by the same fingerprints."""
    torch = import_torch()
    x = torch.tensor(features(16)).bfloat16()
    weight = torch.linspace(0, 1, 16).bfloat16()
    exact = x.float().numpy()
    expected = fingerprint(exact.astype("bfloat16"))
    data = torch_loader(x, torch.zeros(16), weight)
    for kind in (x, Records(x), data):
        teacher = Teacher()
        labels = write(
            path.with_name(type(kind).__name__),
            lambda x, t=teacher: t(x.astype("float32")),
            kind,
            num_examples=16,
        )
        np.testing.assert_array_equal(labels.fingerprints, expected)
        np.testing.assert_allclose(labels[:], teacher.rows(exact), atol=1e-3)
    inputs, soft, found = read(labels.attach(data))
    np.testing.assert_array_equal(inputs, exact)
    np.testing.assert_array_equal(soft, labels[:])
    np.testing.assert_array_equal(found, weight.float().numpy())
    student = keras.Sequential([keras.Input((3,)), keras.layers.Dense(C)])
    student.compile("sgd", "mse")
    for kind in (x, data):
        student.fit(labels.attach(kind), shuffle=False, verbose=0)


def test_shuffled_torch_loaders(path):
    data = torch_loader(features(), shuffle=True)
    with pytest.raises(ValueError, match="the same order in each pass"):
        write(path, dataset=data, num_examples=N)
    labels = write(path)
    attached = labels.attach(data, ids="content")
    assert len(attached) == 7
    inputs, soft = read(attached)
    assert not np.array_equal(inputs, features())
    np.testing.assert_allclose(soft, Teacher().rows(inputs), atol=1e-3)


def test_shuffled_grain(path):
    """With workers after attaching: they read the rows."""
    grain = import_grain()
    source = grain.MapDataset.source(Records(features()))
    labels = write(path)
    attached = labels.attach(source.shuffle(seed=1).batch(8), ids="content")
    options = grain.MultiprocessingOptions(num_workers=0)
    inputs, soft = read(attached.to_iter_dataset().mp_prefetch(options))
    assert len(inputs) == N and not np.array_equal(inputs, features())
    np.testing.assert_allclose(soft, Teacher().rows(inputs), atol=1e-3)
    with pytest.raises(ValueError, match="finite"):
        labels.attach(source.batch(8).repeat())


def test_state_of_a_grain_iterator(path):
    """Saved and restored, as checkpoints of a run do it."""
    labels = write(path)
    iterator = iter(labels.attach(grain_iter(features(), workers=0)))
    next(iterator)
    state = iterator.get_state()
    second = next(iterator)
    iterator.set_state(state)
    np.testing.assert_array_equal(next(iterator)[1], second[1])
    np.testing.assert_array_equal(second[1], labels[8:16])


def grain_range():
    return import_grain().sources.RangeDataSource(start=0, stop=N, step=1)


def grain_shared_memory():
    source = import_grain().sources.SharedMemoryDataSource
    return source([f"film {i}" for i in range(N)])


def grain_array_record(folder):
    module = pytest.importorskip("array_record.python.array_record_module")
    file = str(folder / "films.array_record")
    writer = module.ArrayRecordWriter(file, "group_size:1")
    for i in range(N):
        writer.write(b"film %d" % i)
    writer.close()
    return import_grain().sources.ArrayRecordDataSource(file)


@pytest.mark.parametrize("kind", ["range", "shared memory", "array record"])
def test_grains_own_sources(path, kind, tmp_path):
    """Those that Grain has: whole numbers, texts, bytes."""
    source = {
        "range": grain_range,
        "shared memory": grain_shared_memory,
        "array record": lambda: grain_array_record(tmp_path),
    }[kind]()
    protocol = import_grain().sources.RandomAccessDataSource
    assert isinstance(source, protocol)

    def teacher(batch):
        numbers = [int(one if kind == "range" else one[5:]) for one in batch]
        shares = np.array(numbers) / N
        return np.stack([shares, 1 - shares], axis=-1)

    spec = SoftLabelSpec(dtype="float32")
    labels = SoftLabels.write(
        teacher, source, path, spec=spec, batch_size=7, verbose=0
    )
    np.testing.assert_allclose(labels[:][:, 0], np.arange(N) / N, atol=1e-6)
    attached = labels.attach(source, batch_size=8, shuffle=True, seed=0)
    inputs, soft = read(attached[i] for i in range(len(attached)))
    np.testing.assert_allclose(soft, teacher(inputs), atol=1e-6)
    assert len(set(inputs.tolist())) == N
    assert inputs.tolist() != [source[i] for i in range(N)]
    if kind == "shared memory":
        source.close(), source.unlink()


def test_a_source_of_records(path):
    """Without a library; of `(inputs, targets)` the inputs count."""
    x = features()
    labels = write(path, dataset=Records(x, np.zeros(N)))
    np.testing.assert_array_equal(labels.fingerprints, write(path).fingerprints)
    attached = labels.attach(
        Records(x, np.zeros(N)), batch_size=8, shuffle=True, seed=0
    )
    inputs, soft = read(attached[i] for i in range(len(attached)))
    assert not np.array_equal(inputs, x)
    np.testing.assert_allclose(soft, Teacher().rows(inputs), atol=1e-3)
    texts = Records(np.array([f"film {i}" for i in range(N)], object))

    def teacher(batch):
        numbers = np.array([int(text.split()[1]) for text in batch])
        return np.stack([numbers / N, 1 - numbers / N], axis=-1)

    named = SoftLabels.write(
        teacher, texts, path.with_name("texts"), verbose=0, batch_size=7
    )
    inputs, soft = named.attach(texts, batch_size=N)[0]
    np.testing.assert_allclose(soft[:, 0], np.arange(N) / N, atol=1e-3)
    records = [{"a": row, "b": row[:1]} for row in x]

    class Dictionaries(Records):
        def __getitem__(self, index):
            return records[index]

    def of_dictionaries(batch):
        return Teacher().rows(batch["a"])

    both = SoftLabels.write(
        of_dictionaries,
        Dictionaries(x),
        path.with_name("both"),
        spec=SoftLabelSpec(dtype="float32"),
        verbose=0,
    )
    np.testing.assert_allclose(both[:], Teacher().rows(x), atol=1e-6)
