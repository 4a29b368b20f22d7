"""Errors of the machine: never called damage, for damage is deleted."""

import contextlib
import errno
import gc
import os
import re
import resource

import helpers
import numpy as np
import pytest
import stores
import token_stores

from keras_ptloss.soft_labels import (
    SoftLabels,
    fingerprint,
    import_soft_labels,
)
from keras_ptloss.soft_labels._tokens.distillkit import ParquetLists

pytestmark = helpers.slow_but_on_one()


@contextlib.contextmanager
def files_left(count):
    """Let this process open so many files more."""
    gc.collect()  # what is open no more, and would be closed meanwhile
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        # The lowest that are free: what is below the next one.
        for _ in range(count + 1):
            limit = stack.enter_context(open(os.devnull)).fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_many_files(path):
    teacher, x = stores.Teacher(), stores.features()
    for index in range(10):
        SoftLabels.write_shard(teacher, x, path, shard=(index, 10), verbose=0)
    before = sorted(path.rglob("*"))
    with files_left(6), pytest.raises(OSError) as error:
        SoftLabels.open(path)
    assert error.value.errno == errno.EMFILE
    assert re.match(r"While mapping \w+\.npy of ", error.value.__notes__[0])
    with files_left(14):  # one a shard, and what is open for a moment
        labels = SoftLabels.open(path)
    np.testing.assert_allclose(labels[:], teacher.rows(x), atol=1e-3)
    np.testing.assert_array_equal(labels.fingerprints, fingerprint(x))
    assert sorted(path.rglob("*")) == before
    assert len(SoftLabels.open(path)) == stores.N


@pytest.mark.parametrize(
    "error",
    [
        *[
            OSError(getattr(errno, name), "told by the system")
            for name in (
                "EMFILE",
                "ENFILE",
                "EACCES",
                "EIO",
                "ENOMEM",
                "ESTALE",
            )
        ],
        MemoryError("told by the system"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("kind", [stores, token_stores])
def test_errors_of_the_system_pass(path, monkeypatch, kind, error):
    labels = kind.write(path)

    def refuse(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(np, "memmap", refuse)
        with pytest.raises(type(error), match="told by the system") as found:
            type(labels).open(path)
    assert found.value is error
    assert len(type(labels).open(path)) == len(labels)


@pytest.mark.parametrize("kind", ["rows", "tokens"])
def test_too_many_files_of_parquet(path, kind):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    file = path.with_suffix(".parquet")
    columns = {
        "input_ids": [[1, 2]] * stores.N,
        "token_ids": [[[3]]] * stores.N,
        "top_values": [[[-1.0]]] * stores.N,
        "fingerprint": fingerprint(stores.features()),
        "probabilities": [[0.5, 0.5]] * stores.N,
    }
    pq.write_table(pa.table(columns), file)

    def read():
        if kind == "tokens":
            return list(ParquetLists([file]).read())
        return import_soft_labels(file, stores.features(), path).labels

    with files_left(0), pytest.raises(OSError, match=r"\.parquet") as error:
        read()
    assert error.value.errno == errno.EMFILE
    assert len(read()) == stores.N


@pytest.mark.parametrize("verify", [True, False])
def test_an_archive_is_damage(path, verify):
    stores.write(path)
    file = path / "shard-00000-of-00001" / "labels.npy"
    with file.open("wb") as opened:
        np.savez(opened, labels=np.zeros((stores.N, stores.C), "float16"))
    with pytest.raises(ValueError, match="intact store, but labels.npy is unr"):
        SoftLabels.open(path, verify=verify)
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match="intact store, but labels.npy is unr"):
        SoftLabels.open(path, verify=verify)
    file.rmdir()
    with pytest.raises(ValueError, match="intact store, but labels.npy is unr"):
        SoftLabels.open(path, verify=verify)


def test_another_array_of_an_unfinished_shard(path):
    """Its rows would go to another place."""
    with pytest.raises(RuntimeError):
        stores.write(path, stores.Teacher(fail_at=24))
    folder = path / "shard-00000-of-00001.partial"
    np.save(folder / "labels.npy", np.zeros((stores.N, 1), "float16"))
    teacher = stores.Teacher()
    with pytest.raises(ValueError, match="labels.npy holds float16"):
        stores.write(path, teacher)
    assert not teacher.asked
