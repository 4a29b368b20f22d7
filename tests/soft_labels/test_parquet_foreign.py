"""Parquet files beside, and from, others: nothing lost, no raw errors."""

import errno
import json
import os
import shutil

import helpers
import pytest
from stores import N, write

from keras_ptloss.soft_labels import SoftLabels

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
