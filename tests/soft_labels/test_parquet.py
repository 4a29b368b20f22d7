"""Soft labels as Parquet: written, read, and refused where they are wrong."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import uuid

import helpers
import numpy as np
import pytest
from stores import (
    ENVIRONMENT,
    C,
    N,
    Teacher,
    features,
    softmax,
    tf_dataset,
    write,
)

from keras_ptloss.soft_labels import (
    SoftLabels,
    SoftLabelSpec,
    fingerprint,
    import_soft_labels,
)

pytestmark = helpers.slow_but_on_one()

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    return folder


def rows(n=N):
    return Teacher().rows(features(n))


def lists(values, kind=None):
    """Rows as Arrow lists of one length."""
    values = np.asarray(values)
    flat = pa.array(values.reshape(-1), kind)
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def put(folder, columns, name="a.parquet", **kwargs):
    pq.write_table(pa.table(columns), folder / name, **kwargs)


def columns(n=N, **others):
    columns = {"fingerprint": fingerprint(features(n))}
    return {**columns, "probabilities": lists(rows(n)), **others}


def top_k(values, k):
    ids = np.argsort(-values, axis=-1)[:, :k]
    logs = np.log(np.take_along_axis(values, ids, -1))
    return {
        "top_ids": lists(ids.astype("int32")),
        "top_log_probabilities": lists(logs),
    }


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"dtype": "float32", "class_names": ("a", "b", "c", "d")},
        {"from_logits": True, "temperature": 2.0},
        {"top_k": 2, "teacher_name": "t5"},
    ],
)
def test_there_and_back(path, tmp_path, spec):
    labels = write(path, **spec)
    assert labels.to_parquet(tmp_path / "rows", rows_per_file=20) == N
    files = sorted(file.name for file in (tmp_path / "rows").iterdir())
    parts = [f"part-0000{i}.parquet" for i in range(3)]
    assert files == ["_checksums.json", *parts]
    again = SoftLabels.open(tmp_path / "rows")
    np.testing.assert_array_equal(again[:], labels[:])
    np.testing.assert_array_equal(again.fingerprints, labels.fingerprints)
    assert again.spec == labels.spec and again.shape == labels.shape
    assert again.mean_total_variation == pytest.approx(
        labels.mean_total_variation
    )
    # As other processes get it.
    copy = pickle.loads(pickle.dumps(again))
    np.testing.assert_array_equal(copy[:], labels[:])
    report = import_soft_labels(
        tmp_path / "rows" / "*.parquet", features(), tmp_path / "again"
    )
    np.testing.assert_array_equal(report.labels[:], labels[:])
    assert report.labels.spec == labels.spec
    assert report.num_repaired == report.foreign == report.duplicates == 0


def test_rows_are_found_by_content(folder):
    """Shuffled, in two files, with rows of other data sets."""
    order = np.random.default_rng(1).permutation(N)
    table = pa.table(columns()).take(order)
    others = pa.table(columns()).slice(0, 3)
    others = others.set_column(0, "fingerprint", pa.array([1, 2, 3], "uint64"))
    pq.write_table(table.slice(0, 20), folder / "b.parquet")
    pq.write_table(
        pa.concat_tables([others, table.slice(20)]), folder / "a.parquet"
    )
    labels = SoftLabels.open(folder)
    assert len(labels) == N + 3
    inputs, soft = labels.attach(features(), batch_size=N)[0]
    np.testing.assert_allclose(soft, rows(), atol=1e-6)
    pairs = list(labels.attach(tf_dataset(features()[::-1])))
    soft = np.concatenate([np.asarray(batch[1]) for batch in pairs])
    np.testing.assert_allclose(soft, rows()[::-1], atol=1e-6)
    with pytest.raises(ValueError, match="example 0 is in no stored row"):
        labels.attach(features(seed=5))
    report = import_soft_labels(folder, features(), folder / "out")
    np.testing.assert_allclose(report.labels[:], rows(), atol=1e-6)
    assert report.foreign == 3 and report.ignored == ()


@pytest.mark.parametrize(
    "ids", [[f"film {i}" for i in range(N)], list(range(N))]
)
def test_rows_are_found_by_id(folder, ids):
    order = np.random.default_rng(1).permutation(N)
    table = pa.table({"id": ids, "note": ids, "probabilities": lists(rows())})
    pq.write_table(table.take(order), folder / "a.parquet")
    report = import_soft_labels(folder, features(), folder / "out", ids=ids)
    np.testing.assert_allclose(report.labels[:], rows(), atol=1e-6)
    assert report.ignored == ("note",)
    with pytest.raises(ValueError, match=r"no column 'fingerprint' but 'id'"):
        import_soft_labels(folder, features(), folder / "other")
    with pytest.raises(ValueError, match="50 ids, one an example"):
        import_soft_labels(folder, features(), folder / "other", ids=ids[:9])


class TestRowsById:
    """Rows of a user's ids: of one id, of none, of others."""

    ids = [f"film {i}" for i in range(N)]

    def run(self, folder, ids, values, **kwargs):
        table = pa.table({"id": ids, "probabilities": lists(values)})
        order = np.random.default_rng(1).permutation(len(ids))
        pq.write_table(table.take(order), folder / "a.parquet")
        return import_soft_labels(
            folder, features(), folder / "out", ids=self.ids, **kwargs
        )

    def test_equal_rows_count_once(self, folder):
        again = slice(10, 15)
        values = np.concatenate([rows(), rows()[again]])
        report = self.run(folder, self.ids + self.ids[again], values)
        np.testing.assert_allclose(report.labels[:], rows(), atol=1e-6)
        assert (report.duplicates, report.foreign) == (5, 0)

    def test_rows_that_differ_are_refused(self, folder):
        values = np.concatenate([rows(), rows()[12:13, ::-1]])
        with pytest.raises(ValueError, match="contradict .*'film 12'"):
            self.run(folder, [*self.ids, "film 12"], values)
        assert not (folder / "out").exists()

    def test_missing_rows(self, folder):
        ids, values = self.ids[:48], rows()[:48]
        with pytest.raises(ValueError, match="lack 2: 'film 48', 'film 49'"):
            self.run(folder, ids, values)
        assert not (folder / "out").exists()
        report = self.run(folder, ids, values, empty_rows="uniform")
        np.testing.assert_allclose(report.labels[:48], values, atol=1e-6)
        np.testing.assert_allclose(report.labels[48:], 1 / C)
        assert report.failed == ("film 48", "film 49")
        np.testing.assert_array_equal(np.flatnonzero(report.empty), [48, 49])

    def test_foreign_rows_are_left_out(self, folder):
        values = np.concatenate([rows()[::-1][:3], rows()])
        report = self.run(folder, ["a", "film", "film 50", *self.ids], values)
        np.testing.assert_allclose(report.labels[:], rows(), atol=1e-6)
        assert (report.duplicates, report.foreign) == (0, 3)
        (folder / "b").mkdir()
        with pytest.raises(ValueError, match="lack 50: 'film 0', 'film 1'"):
            self.run(folder / "b", list("abc"), values[:3])


def test_ids_are_written(path, tmp_path):
    labels, ids = write(path), [f"film {i}" for i in range(N)]
    labels.to_parquet(tmp_path / "rows", ids=ids)
    report = import_soft_labels(
        tmp_path / "rows", features(), tmp_path / "again", ids=ids
    )
    np.testing.assert_array_equal(report.labels[:], labels[:])
    for wrong in (ids[:-1], ids[:-1] + ids[:1], [1.5] * N, [1, "a"] * (N // 2)):
        with pytest.raises(ValueError, match="`ids` must be"):
            labels.to_parquet(tmp_path / "other", ids=wrong)
    assert not list(tmp_path.glob("other*"))


def uuids(n=N):
    return [uuid.UUID(int=i << 64 | i) for i in range(n)]


def series(kind):
    """Ids in pandas."""
    pandas = pytest.importorskip("pandas")
    return getattr(pandas, kind)([f"film {i}" for i in range(N)])


@pytest.mark.parametrize(
    "ids",
    [
        lambda: series("Series"),
        lambda: series("Index"),
        lambda: series("Series").astype("category"),
        lambda: series("CategoricalIndex"),
        lambda: np.array([f"film {i}" for i in range(N)]),
        lambda: pa.array([f"film {i}" for i in range(N)], pa.large_string()),
        lambda: np.arange(N, dtype="int32"),
        lambda: [2**63 + i for i in range(N)],
        lambda: np.arange(N, dtype="uint64") + np.uint64(2**63),
        uuids,
        lambda: np.array(uuids()),
    ],
)
def test_forms_of_ids(path, tmp_path, ids):
    labels, ids = write(path), ids()
    labels.to_parquet(tmp_path / "rows", ids=ids)
    stored = pq.read_table(tmp_path / "rows")["id"]
    assert stored.type in (pa.string(), pa.int32(), pa.uint64())
    assert [str(name) for name in stored.to_pylist()] == [str(i) for i in ids]
    report = import_soft_labels(
        tmp_path / "rows", features(), tmp_path / "again", ids=ids
    )
    np.testing.assert_array_equal(report.labels[:], labels[:])


@pytest.mark.parametrize(
    "ids",
    [5, [2**63, *range(-1, N - 2)], [2**64] * N, [None] * N, [b"a"] * N],
)
def test_ids_of_other_kinds(path, tmp_path, ids):
    with pytest.raises(ValueError, match="`ids` must be"):
        write(path).to_parquet(tmp_path / "other", ids=ids)
    assert not list(tmp_path.glob("other*"))


def test_ids_of_several_columns_and_uuids(folder):
    """One file has `id`, the other `custom_id`: 16 bytes, as DuckDB writes."""
    found = pa.array([name.bytes for name in uuids()], pa.binary(16))
    table = pa.table({"id": found, "probabilities": lists(rows())})
    pq.write_table(table.slice(20), folder / "a.parquet")
    table = table.rename_columns(["custom_id", "probabilities"])
    table = table.append_column("note", pa.nulls(N, pa.string()))
    pq.write_table(table.slice(0, 20), folder / "b.parquet")
    report = import_soft_labels(folder, features(), folder / "out", ids=uuids())
    np.testing.assert_allclose(report.labels[:], rows(), atol=1e-6)
    assert report.ignored == ("note",)


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
@pytest.mark.parametrize("form", [pa.list_, pa.large_list, None])
def test_forms_of_lists(folder, kind, form):
    values = rows().astype(kind)
    # PyArrow 16 takes no Python floats for float16.
    column = lists(values) if form is None else [list(row) for row in values]
    kind = pa.from_numpy_dtype(kind)
    column = pa.array(column, pa.list_(kind, C) if form is None else form(kind))
    put(folder, columns(probabilities=column))
    np.testing.assert_allclose(SoftLabels.open(folder)[:], rows(), atol=5e-4)


def test_log_probabilities_and_logits(folder, tmp_path):
    table = columns()
    del table["probabilities"]
    logs = np.log(rows()).astype("float64")
    put(folder, {**table, "log_probabilities": lists(logs)})
    np.testing.assert_allclose(SoftLabels.open(folder)[:], rows(), atol=1e-6)
    put(folder, {**table, "logits": lists(logs + 3)})
    labels = SoftLabels.open(folder)
    assert labels.from_logits
    np.testing.assert_allclose(softmax(labels[:]), rows(), atol=1e-6)
    with pytest.raises(ValueError, match="`from_logits` must be True"):
        import_soft_labels(
            folder, features(), tmp_path / "out", spec=SoftLabelSpec()
        )
    put(folder, {**table, "logits": lists(logs * 1e6)})
    with pytest.raises(ValueError, match="`dtype` must be 'float32'"):
        SoftLabels.open(folder, spec=SoftLabelSpec(from_logits=True))
    # One column is a binary head.
    put(folder, {**table, "probabilities": lists(rows()[:, :1])})
    expected = np.stack([1 - rows()[:, 0], rows()[:, 0]], axis=-1)
    np.testing.assert_allclose(SoftLabels.open(folder)[:], expected, atol=1e-6)


@pytest.mark.parametrize("name", ["log_probabilities", "logits"])
def test_log_probabilities_above_0(folder, name):
    """They are refused; logits may be anything."""
    values = np.log(rows())
    values[7, 2] = 0.5
    table = {"fingerprint": fingerprint(features()), name: lists(values)}
    put(folder, table)
    if name == "logits":
        np.testing.assert_allclose(SoftLabels.open(folder)[7][2], 0.5)
        return
    match = "log-probability of 0.5.* in row 7|row 7.*log-probability of 0.5"
    with pytest.raises(ValueError, match=match):
        SoftLabels.open(folder)


def test_the_k_largest(folder, tmp_path):
    table = {"fingerprint": fingerprint(features()), **top_k(rows(), 2)}
    put(folder, table)
    with pytest.raises(ValueError, match="`num_classes` must be given"):
        SoftLabels.open(folder)
    spec = SoftLabelSpec(num_classes=C, dtype="float32")
    labels = SoftLabels.open(folder, spec=spec)
    expected = write(tmp_path / "out", top_k=2, dtype="float32")
    np.testing.assert_allclose(labels[:], expected[:], atol=1e-6)
    tail = np.log(np.sort(rows(), -1)[:, :2].sum(-1))
    put(folder, {**table, "log_tail": tail})
    labels = SoftLabels.open(folder, spec=spec)
    np.testing.assert_allclose(labels[:], expected[:], atol=1e-6)
    targets = labels.top_k_targets[:]
    np.testing.assert_allclose(targets[:, 2, 1], tail, atol=1e-5)
    for change, match in (
        ({"log_tail": tail - 3}, "with their tail add up to"),
        (top_k(rows() * 1.5, 2), "that add up to|log-probability of"),
        ({"top_ids": lists(np.full((N, 2), 1))}, "a class twice in row 0"),
        ({"top_ids": lists(np.tile([0, C], (N, 1)))}, "no class of 4 in row 0"),
        ({"top_ids": lists(np.tile([0.0, 1], (N, 1)))}, "not integers"),
        ({"top_ids": lists(np.tile([0], (N, 1)))}, "has 2 numbers in row 0"),
    ):
        put(folder, {**table, **change})
        with pytest.raises(ValueError, match=match):
            SoftLabels.open(folder, spec=spec)


def test_duplicates(folder, path):
    """Equal rows count once, of a store too; others are an error."""
    table = pa.table(columns())
    twice = pa.concat_tables([table, table.slice(10, 5)])
    pq.write_table(twice, folder / "a.parquet")
    with pytest.warns(UserWarning, match="has 5 more rows than examples"):
        assert len(SoftLabels.open(folder)) == N
    report = import_soft_labels(folder, features(), folder / "out")
    assert report.duplicates == 5 and len(report.labels) == N
    other = rows()
    other[12] = other[12, ::-1]
    put(folder, columns(probabilities=lists(other)), "b.parquet")
    prints = fingerprint(features())
    with pytest.raises(ValueError, match=f"contradict .*'{prints[12]}'"):
        SoftLabels.open(folder)
    x = np.concatenate([features(), features()[:7]])
    assert write(path, dataset=x).to_parquet(folder / "new") == N
    np.testing.assert_array_equal(
        SoftLabels.open(folder / "new").attach(x, batch_size=99)[0][1],
        SoftLabels.open(path)[:],
    )


def test_missing_rows(folder):
    put(folder, columns(n=40))
    with pytest.raises(ValueError, match="lack 10: 'example 40', 'example 41'"):
        import_soft_labels(folder, features(), folder / "out")
    assert not (folder / "out").exists()
    report = import_soft_labels(
        folder, features(), folder / "out", empty_rows="uniform"
    )
    np.testing.assert_allclose(report.labels[40:], 0.25)
    np.testing.assert_allclose(report.labels[:40], rows()[:40], atol=1e-6)
    assert report.empty.sum() == 10 and report.failed[0] == "example 40"
    with pytest.raises(ValueError, match="must hold 40 examples"):
        import_soft_labels(
            folder,
            features(),
            folder / "more",
            spec=SoftLabelSpec(num_examples=40),
        )


def test_a_missing_file_of_ours_is_missed(path, tmp_path):
    write(path).to_parquet(tmp_path / "rows", rows_per_file=20)
    (tmp_path / "rows" / "part-00001.parquet").unlink()
    with pytest.raises(ValueError, match="50 rows were .* 30 rows in 2 files"):
        SoftLabels.open(tmp_path / "rows")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"probabilities": lists(np.full((N, C), np.nan))}, "NaN .* in row 0"),
        ({"probabilities": lists(np.full((N, C), 0.3))}, "not add up .*row 0"),
        ({"probabilities": lists(rows() * [1, 1, 1, -1])}, "negative prob"),
        ({"probabilities": [[0.5, 0.5], [1.0]] * 25}, "1 numbers in row 1 of"),
        ({"probabilities": [[0.5, None]] * N}, "has a null in row 0"),
        ({"probabilities": [None, [1.0]] * 25}, "no probabilities in row 0"),
        ({"probabilities": [[]] * N}, "0 numbers in row 0 .*, not one"),
        ({"probabilities": [0.5] * N}, "double, not lists"),
        ({"probabilities": [["a"]] * N}, "string, not floats"),
        ({"logits": lists(rows())}, "must have one of"),
        ({"top_ids": lists(rows())}, "must have one of"),
        ({"fingerprint": [None] * N}, "has no fingerprint in row 0|of null"),
        ({"fingerprint": [0.5] * N}, "fingerprints of double, not uint64"),
    ],
)
def test_wrong_columns(folder, change, match):
    put(folder, columns(**change))
    with pytest.raises(ValueError, match=rf"a\.parquet, which .*{match}"):
        SoftLabels.open(folder)


def test_fingerprints_of_signed_integers(folder):
    signed = fingerprint(features()).view("int64")
    put(folder, columns(fingerprint=signed))
    soft = SoftLabels.open(folder).attach(features(), batch_size=N)[0][1]
    np.testing.assert_allclose(soft, rows(), atol=1e-6)
    exact = pa.array(fingerprint(features())).cast(pa.decimal128(20, 0))
    put(folder, columns(fingerprint=exact))
    labels = SoftLabels.open(folder)
    np.testing.assert_array_equal(labels.fingerprints, fingerprint(features()))


def test_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="No soft labels at"):
        SoftLabels.open(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No Parquet files at .*\*"):
        import_soft_labels(tmp_path / "*.parquet", features(), tmp_path / "out")
    put(tmp_path, columns(n=1), "_notes.parquet")
    with pytest.raises(FileNotFoundError, match="No soft labels at"):
        SoftLabels.open(tmp_path)
    pq.write_table(pa.table(columns()).slice(0, 0), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="at least one row"):
        SoftLabels.open(tmp_path)


@pytest.mark.parametrize("name", ["0.parquet", "b.parquet"])
@pytest.mark.parametrize("typed", [True, False])
def test_a_file_without_rows(folder, name, typed):
    """First or last; pandas does not know what lists would have been in it."""
    table = pa.table(columns()).slice(0, 0)
    if not typed:
        table = pa.table({key: pa.nulls(0) for key in columns()})
    pq.write_table(table, folder / name)
    put(folder, columns())
    labels = SoftLabels.open(folder)
    np.testing.assert_allclose(labels[:], rows(), atol=1e-6)
    report = import_soft_labels(folder, features(), folder / "out")
    np.testing.assert_allclose(report.labels[:], rows(), atol=1e-6)


@pytest.mark.parametrize("deeper", ["more", "a=1/b=2"])
def test_files_in_folders(folder, deeper):
    """Are missed nowhere; what other tools note is in `_folders`."""
    (folder / deeper).mkdir(parents=True)
    (folder / "_temporary").mkdir()
    table = pa.table(columns())
    pq.write_table(table.slice(0, 20), folder / "a.parquet")
    (folder / "_temporary" / "x.parquet").write_bytes(b"")
    assert len(SoftLabels.open(folder)) == 20
    pq.write_table(table.slice(20), folder / deeper / "a.parquet")
    match = f"`source` must be .* in its folders.*rows, with {deeper}/a.parq"
    with pytest.raises(ValueError, match=match):
        SoftLabels.open(folder)
    with pytest.raises(ValueError, match=match):
        import_soft_labels(folder, features(), folder / "out")
    (folder / "_temporary" / "x.parquet").unlink()
    report = import_soft_labels(
        folder / "**" / "*.parquet", features(), folder / "out"
    )
    np.testing.assert_allclose(report.labels[:], rows(), atol=1e-6)


def test_arguments(path, tmp_path):
    labels = write(path)
    with pytest.raises(ValueError, match="`spec` must be None"):
        SoftLabels.open(path, spec=SoftLabelSpec())
    with pytest.raises(ValueError, match="`rows_per_file` must be an integer"):
        labels.to_parquet(tmp_path / "rows", rows_per_file=0)
    labels.to_parquet(tmp_path / "rows")
    with pytest.raises(ValueError, match="`directory` must be a new directory"):
        labels.to_parquet(tmp_path / "rows")


def flipped(file, places):
    """Flip a bit in each of the places, one at a time."""
    good = file.read_bytes()
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        file.write_bytes(bad)
        yield place
    file.write_bytes(good)


def test_any_flipped_byte_is_found(path, tmp_path):
    write(path).to_parquet(tmp_path / "rows", rows_per_file=30)
    for name in ("part-00000.parquet", "part-00001.parquet"):
        file = tmp_path / "rows" / name
        for _ in flipped(file, range(0, file.stat().st_size, 7)):
            with pytest.raises(ValueError, match=f"Received: .*{name}"):
                SoftLabels.open(tmp_path / "rows")
    record = tmp_path / "rows" / "_checksums.json"
    for _ in flipped(record, range(record.stat().st_size)):
        try:
            labels = SoftLabels.open(tmp_path / "rows")
        except ValueError as error:
            assert str(tmp_path) in str(error)
        else:  # a space became another one
            np.testing.assert_array_equal(labels[:], SoftLabels.open(path)[:])


def test_flipped_bytes_of_rows_without_our_record(path, tmp_path):
    """By the checksums of pages, which other tools write and read too."""
    labels = write(path)
    labels.to_parquet(tmp_path / "rows")
    file = tmp_path / "rows" / "part-00000.parquet"
    (file.parent / "_checksums.json").unlink()
    footer = file.stat().st_size - 8
    footer -= int.from_bytes(file.read_bytes()[-8:-4], "little")
    noticed = 0
    for _ in flipped(file, range(4, footer)):
        try:
            found = SoftLabels.open(file.parent)
        except ValueError as error:
            assert str(file) in str(error)
            noticed += 1
        else:  # of a page's header, and without effect
            np.testing.assert_array_equal(found[:], labels[:])
            prints = labels.fingerprints
            np.testing.assert_array_equal(found.fingerprints, prints)
    # PyArrow 16 has longer headers.
    assert noticed > 0.8 * (footer - 4)
    file = tmp_path / "foreign" / "a.parquet"
    file.parent.mkdir()
    put(file.parent, columns(), write_page_checksum=True)
    for _ in flipped(file, [100]):
        with pytest.raises(ValueError, match="a.parquet, which is damaged"):
            SoftLabels.open(file.parent)


KILLED = textwrap.dedent(
    """
    import os, signal, sys
    import pyarrow.parquet as pq
    from keras_ptloss import SoftLabels

    written, real = 0, pq.ParquetWriter.write_table
    def write_table(self, *args, **kwargs):
        global written
        real(self, *args, **kwargs)
        written += 1
        if written == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    pq.ParquetWriter.write_table = write_table
    SoftLabels.open(sys.argv[1]).to_parquet(sys.argv[2], rows_per_file=20)
    """
)


def test_a_killed_writer_leaves_nothing_that_looks_whole(path, tmp_path):
    labels = write(path)
    process = subprocess.run(
        [sys.executable, "-c", KILLED, path, tmp_path / "rows"],
        env=ENVIRONMENT,
    )
    assert process.returncode == -signal.SIGKILL
    left = tmp_path / "rows.partial"
    assert left.is_dir() and list(left.iterdir())
    with pytest.raises(FileNotFoundError):
        SoftLabels.open(tmp_path / "rows")
    labels.to_parquet(tmp_path / "rows", rows_per_file=20)
    assert not left.exists()
    assert len(SoftLabels.open(tmp_path / "rows")) == N


def test_two_writers(path, tmp_path):
    import fcntl

    left = tmp_path / "rows.partial"
    left.mkdir()
    descriptor = os.open(left, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(RuntimeError, match="written by another process"):
        write(path).to_parquet(tmp_path / "rows")
    os.close(descriptor)
    SoftLabels.open(path).to_parquet(tmp_path / "rows")
