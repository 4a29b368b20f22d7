"""Parquet files beside, and from, others: nothing lost, no raw errors."""

import errno
import json
import os
import pickle
import re
import shutil

import helpers
import numpy as np
import pytest
from stores import N, features, write

from keras_ptloss.soft_labels import (
    SoftLabels,
    SoftLabelSpec,
    import_soft_labels,
)

pytestmark = helpers.slow_but_on_one()

pq = pytest.importorskip("pyarrow.parquet")
KEY = b"keras_ptloss.soft_labels"


@pytest.fixture
def exported(path, tmp_path):
    write(path).to_parquet(tmp_path / "rows")
    return tmp_path / "rows"


@pytest.mark.parametrize(
    "name", ["notes.txt", "part-1.parquet", "folder/part-00000.parquet"]
)
def test_what_others_have_put_there_stays(path, tmp_path, name):
    """Beside leftovers of a killed process, which stay too."""
    partial = tmp_path / "rows.partial"
    (partial / name).parent.mkdir(parents=True)
    for file in (name, "part-00000.parquet", "_checksums.json"):
        (partial / file).write_text("mine")
    before = sorted(partial.rglob("*"))
    with pytest.raises(ValueError, match=r"rows\.partial has no files of oth"):
        write(path).to_parquet(tmp_path / "rows")
    assert sorted(partial.rglob("*")) == before
    assert (partial / name).read_text() == "mine"
    assert not (tmp_path / "rows").exists()


@pytest.mark.parametrize("kind", ["a link", "a file", "a link in it"])
def test_links_are_not_followed(path, tmp_path, kind):
    target, partial = tmp_path / "mine", tmp_path / "rows.partial"
    target.mkdir()
    (target / "part-00000.parquet").write_text("mine")
    if kind == "a link":
        partial.symlink_to(target)
    elif kind == "a file":
        partial.write_text("mine")
    else:
        partial.mkdir()
        link = partial / "part-00000.parquet"
        link.symlink_to(target / "part-00000.parquet")
    with pytest.raises(ValueError, match=r"`directory` must be one .*partial"):
        write(path).to_parquet(tmp_path / "rows")
    assert (target / "part-00000.parquet").read_text() == "mine"
    assert os.path.lexists(partial) and not (tmp_path / "rows").exists()


def test_what_is_put_there_meanwhile_stays(path, tmp_path, monkeypatch):
    def checksum(file):
        (file.parent / "notes.txt").write_text("mine")
        raise OSError(errno.EIO, "the disk is broken")

    labels = write(path)
    module = "keras_ptloss.soft_labels._parquet.checksum"
    monkeypatch.setattr(module, checksum)
    with pytest.raises(OSError, match="the disk is broken"):
        labels.to_parquet(tmp_path / "rows")
    assert (tmp_path / "rows.partial" / "notes.txt").read_text() == "mine"


def test_two_exports_at_once(path, tmp_path, monkeypatch):
    """The other ends between the look at the directory and the lock."""
    import fcntl

    labels, real = write(path), fcntl.flock

    def flock(*args):
        monkeypatch.setattr(fcntl, "flock", real)
        shutil.copytree(path, tmp_path / "rows")
        return real(*args)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ValueError, match="`directory` must be a new directory"):
        labels.to_parquet(tmp_path / "rows")
    assert len(SoftLabels.open(tmp_path / "rows")) == N


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(k, None) for k in ("format", "spec", "rows", "num_classes")],
        ("total_variation", None),
        ("format", ["x"]),
        ("rows", "50"),
        ("rows", True),
        ("spec", 5),
        ("spec", {"colour": 1}),
        ("spec", {"dtype": "float128"}),
        ("num_classes", "4"),
        ("num_classes", [4]),
        ("total_variation", 5),
        ("total_variation", {"sum": "0", "max": 0}),
        ("total_variation", {"sum": 0}),
        ("total_variation", {"sum": float("nan"), "max": 0}),
    ],
)
def test_metadata_from_elsewhere(exported, field, value):
    """None takes a field away."""
    file = exported / "part-00000.parquet"
    table = pq.read_table(file)
    record = json.loads(table.schema.metadata[KEY])
    record[field] = value
    if value is None:
        del record[field]
    spoil(exported, table, json.dumps(record))
    match = rf"`path` must be .*{file.name}, which is unreadable \(its metad"
    with pytest.raises(ValueError, match=match):
        SoftLabels.open(exported)


@pytest.fixture(params=["open", "import"])
def read(request, tmp_path):
    """A function of a directory and a spec, that reads stored rows."""
    if request.param == "open":
        return lambda folder, spec: SoftLabels.open(folder, spec=spec)
    return lambda folder, spec: (
        import_soft_labels(
            folder, features(), tmp_path / "again", spec=spec
        ).labels
    )


NOTES = {
    "class_names": ("a", "b", "c", "d"),
    "temperature": 2.0,
    "teacher_name": "it",
}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"class_names": ("b", "a", "c", "d")},
        {"temperature": 3.0},
        {"teacher_name": "another"},
        {"from_logits": True},
        {"top_k": 1},
        {"top_k": 2, "num_classes": 5},
        {"top_k": 2, "num_classes": 5, "class_names": tuple("abcde")},
    ],
)
def test_a_spec_that_contradicts_the_metadata(path, tmp_path, read, kwargs):
    notes = {} if "num_classes" in kwargs else NOTES
    top_k = 2 if "top_k" in kwargs else None
    write(path, top_k=top_k, **notes).to_parquet(tmp_path / "rows")
    (name, value), *_ = reversed(kwargs.items())
    match = f"{name}` must be .*{re.escape(repr(value))}|has 4 classes, not 5"
    with pytest.raises(ValueError, match=match):
        read(tmp_path / "rows", SoftLabelSpec(**kwargs))


@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_a_spec_adds_to_the_metadata(path, tmp_path, read, stored):
    """And what it leaves open stays, of logits too."""
    known = {"from_logits": True, "temperature": 2.0, "dtype": stored}
    labels = write(path, **known)
    labels.to_parquet(tmp_path / "rows")
    added = {"teacher_name": "it", "class_names": NOTES["class_names"]}
    again = read(tmp_path / "rows", SoftLabelSpec(**added))
    expected = SoftLabelSpec(num_examples=N, **known, **added)
    assert again.spec == pickle.loads(pickle.dumps(again)).spec == expected
    np.testing.assert_array_equal(again[:], labels[:])


def test_a_dtype_that_loses_nothing_and_the_k_largest(path, tmp_path):
    labels = write(path, **NOTES)
    labels.to_parquet(tmp_path / "rows")
    again = SoftLabels.open(
        tmp_path / "rows", spec=SoftLabelSpec(dtype="float32")
    )
    expected = SoftLabelSpec(num_examples=N, dtype="float32", **NOTES)
    assert again.spec == expected
    np.testing.assert_allclose(again[:], labels[:], atol=1e-7)
    top = SoftLabels.open(tmp_path / "rows", spec=SoftLabelSpec(top_k=1))
    lost = 0.5 * np.abs(top[:] - labels[:]).sum(-1)
    assert top.max_total_variation == pytest.approx(lost.max(), abs=1e-3)


def test_a_table_that_was_filtered(path, tmp_path):
    """The error says how to have a part on purpose, which then works."""
    labels = write(path, dtype="float32")
    labels.to_parquet(tmp_path / "rows")
    part = tmp_path / "part"
    part.mkdir()
    table = pq.read_table(tmp_path / "rows").slice(10, 20)
    pq.write_table(table, part / "a.parquet")
    match = r"50 rows were .*`table\.replace_schema_metadata\(\)`.* 20 rows"
    with pytest.raises(ValueError, match=match):
        SoftLabels.open(part)
    pq.write_table(table.replace_schema_metadata(), part / "a.parquet")
    again = SoftLabels.open(part, spec=SoftLabelSpec(dtype="float32"))
    np.testing.assert_array_equal(again[:], labels[10:30])


@pytest.mark.parametrize("text", ["5", "[]", "[" * 100_000, b"\xff"])
def test_metadata_that_are_no_object(exported, text):
    table = pq.read_table(exported / "part-00000.parquet")
    spoil(exported, table, text)
    with pytest.raises(ValueError, match=r"is unreadable \(its metadata are"):
        SoftLabels.open(exported)


def spoil(folder, table, text):
    text = text.encode() if isinstance(text, str) else text
    table = table.replace_schema_metadata({KEY: text})
    pq.write_table(table, folder / "part-00000.parquet")
    (folder / "_checksums.json").unlink()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("null", "an object of JSON.*_checksums.json"),
        ("[1, 2]", "an object of JSON.*_checksums.json"),
        ('[["part-00000.parquet", "x"]]', "an object of JSON"),
        ("[" * 100_000, "`path` must be JSON.*_checksums.json"),
        ('{"../part-00000.parquet": "x"}', "intact file, but its checksum"),
        ('{"part-00000.parquet": ["x"]}', "intact file, but its checksum"),
    ],
)
def test_checksums_from_elsewhere(exported, text, match):
    (exported / "_checksums.json").write_text(text)
    with pytest.raises(ValueError, match=match):
        SoftLabels.open(exported)


def test_checksums_of_files_elsewhere_and_links(exported, tmp_path):
    """Names in the record open nothing; a link is the file that it means."""
    record = exported / "_checksums.json"
    known = {**json.loads(record.read_text()), "../../etc/passwd": "x"}
    record.write_text(json.dumps(known))
    file, moved = exported / "part-00000.parquet", tmp_path / "moved.parquet"
    file.rename(moved)
    file.symlink_to(moved)
    assert len(SoftLabels.open(exported)) == N
    moved.unlink()
    with pytest.raises(FileNotFoundError, match=r"part-00000\.parquet"):
        SoftLabels.open(exported)
