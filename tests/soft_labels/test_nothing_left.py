"""What fails before anything is stored leaves nothing, and no lock."""

import fcntl
import json
import os

import helpers
import numpy as np
import pytest
import stores
import token_stores
from imports import lines
from stores import Batches, features

from keras_ptloss.soft_labels import (
    SoftLabelSpec,
    TokenLabelSpec,
    fingerprint,
    import_soft_labels,
    import_token_labels,
)
from keras_ptloss.soft_labels._journal import OWN
from keras_ptloss.soft_labels._spec import array_formats
from keras_ptloss.soft_labels._tokens.spec import (
    KEPT_FORMATS,
    SEQUENCE_FORMATS,
    token_formats,
)

pytestmark = helpers.slow_but_on_one()


class BrokenBatches(Batches):
    """Its third batch cannot be loaded; the two before can be stored."""

    def __getitem__(self, index):
        if index == 2:
            raise OSError("no such file")
        return super().__getitem__(index)


def ask_rows(path):
    stores.write(path, stores.Teacher(fail_at=0))


def store_rows(path):
    stores.write(path, lambda x: np.full((len(x), 3), np.nan))


def ask_tokens(path):
    token_stores.write(path, token_stores.Teacher(fail_at=0, entries=4))


def store_tokens(path):
    token_stores.write(path, lambda x: np.ones((1, 2, 3, 4, 5)))


def import_rows(path):
    source = path.with_suffix(".jsonl")
    source.write_text(lines(*[[0.5, 0.5]] * 50))
    spec = SoftLabelSpec(num_examples=50)
    import_soft_labels(source, BrokenBatches(features()), path, spec=spec)


def import_parquet(path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    source = path.with_suffix(".parquet")
    rows = [[0.5, 0.5]] * 50
    prints = fingerprint(features())
    parquet.write_table(
        pa.table({"fingerprint": prints, "probabilities": rows}), source
    )
    import_soft_labels(source, BrokenBatches(features()), path)


def import_tokens(path, good=70):
    """More sequences than are stored at a time, then no JSON."""
    source = path.with_suffix(".jsonl")
    record = {
        "prompt_token_ids": [5, 7],
        "prompt_logprobs": [None, {"7": {"logprob": -1.5, "rank": 1}}],
    }
    source.write_text((json.dumps(record) + "\n") * good + "[")
    import_token_labels(
        source,
        path,
        spec=TokenLabelSpec(top_k=1, vocabulary_size=10),
        format="vllm",
    )


def import_no_tokens(path):
    import_tokens(path, good=0)


FAILING = [
    ask_rows,
    store_rows,
    ask_tokens,
    store_tokens,
    import_rows,
    import_parquet,
    import_tokens,
    import_no_tokens,
]


@pytest.mark.parametrize("fail", FAILING)
@pytest.mark.parametrize("there", [False, True])
def test_nothing_is_left(path, fail, there):
    """A directory that was there stays, as it was."""
    if there:
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    with pytest.raises((RuntimeError, ValueError, OSError)):
        fail(path)
    assert path.exists() == there
    if there:
        assert [file.name for file in path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("fail", [ask_rows, store_rows, ask_tokens])
@pytest.mark.parametrize("linked", [False, True])
def test_what_others_have_put_there_stays(path, fail, linked):
    """In the very directory that is removed, or in one that it links to."""
    partial = path / "shard-00000-of-00001.partial"
    mine = path.with_name("mine") if linked else partial
    mine.mkdir(parents=True)
    if linked:
        path.mkdir()
        partial.symlink_to(mine)
    (mine / "notes.txt").write_text("mine")
    (mine / "mine.npy").write_text("mine")
    with pytest.raises((RuntimeError, ValueError)):
        fail(path)
    assert {file.name for file in mine.iterdir()} == {"notes.txt", "mine.npy"}


@pytest.mark.parametrize(
    "write",
    [
        stores.write,
        lambda path: stores.write(path, top_k=2),
        token_stores.write,
    ],
)
def test_all_files_of_a_shard_are_known_as_own(path, write):
    write(path)
    (shard,) = path.glob("shard-*-of-00001")
    assert {file.name for file in shard.iterdir()} <= set(OWN)


@pytest.mark.parametrize(
    ("kind", "options"), [(stores, {}), (token_stores, {"entries": 4})]
)
def test_what_is_stored_stays(path, kind, options):
    teacher = kind.Teacher(fail_at=5, **options)
    with pytest.raises(RuntimeError, match="no route to teacher"):
        kind.write(path, teacher)
    (partial,) = path.glob("*.partial")
    assert (partial / "manifest.json").exists()
    asked, teacher.fail_at = teacher.asked, None
    assert len(kind.write(path, teacher)) == teacher.asked > asked > 0


def test_a_lock_that_was_removed_meanwhile(path, monkeypatch):
    """Between its opening and its locking: whoever has it has nothing."""
    lock, calls = path / "shard-00000-of-00001.lock", []

    def flock(file, operation):
        if not calls:
            lock.unlink()
            path.rmdir()
        calls.append(operation)
        return real(file, operation)

    def teacher(x):
        with pytest.raises(RuntimeError, match=f"pid {os.getpid()} on"):
            stores.write(path)
        return stores.Teacher()(x)

    real = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    assert len(stores.write(path, teacher)) == stores.N
    assert len(calls) == 2 + 7  # 7 batches, each with another writer


def test_own_files_are_all_that_writers_make():
    """What `discard` does not know it would leave behind."""
    formats = [
        array_formats(SoftLabelSpec(top_k=k), 5, logs=logs)
        for k in (None, 2)
        for logs in (True, False)
    ]
    formats += [token_formats(2, 100), SEQUENCE_FORMATS, KEPT_FORMATS]
    arrays = {f"{name}.npy" for arrays in formats for name in arrays}
    manifest = {"manifest.json", "manifest.json.new"}
    assert set(OWN) == arrays | manifest
