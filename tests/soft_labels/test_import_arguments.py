"""Imports of what is there already, and arguments that would be ignored."""

import fcntl
import json

import helpers
import numpy as np
import pytest
import stores
import token_stores
from imports import lines

from keras_ptloss.soft_labels import (
    SoftLabels,
    TokenLabels,
    TokenLabelSpec,
    attach_several,
    fingerprint,
    import_soft_labels,
    import_token_labels,
)

pytestmark = helpers.slow_but_on_one()

TEXTS = ["a", "b"]


def import_rows(path, p):
    source = path.with_name(f"{p}.jsonl")
    source.write_text(lines([p, 1 - p], [0.5, 0.5]))
    return import_soft_labels(source, TEXTS, path).labels[0][0]


def import_parquet(path, p):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    source = path.with_name(f"{p}.parquet")
    columns = {
        "fingerprint": fingerprint(TEXTS),
        "probabilities": [[p, 1 - p], [0.5, 0.5]],
    }
    pq.write_table(pa.table(columns), source)
    return import_soft_labels(source, TEXTS, path).labels[0][0]


def import_tokens(path, p):
    source = path.with_name(f"{p}.tokens.jsonl")
    said = {"7": {"logprob": float(np.log(p)), "rank": 1}}
    record = {"prompt_token_ids": [5, 7], "prompt_logprobs": [None, said]}
    source.write_text(json.dumps(record))
    spec = TokenLabelSpec(top_k=1, vocabulary_size=10)
    report = import_token_labels(source, path, spec=spec, format="vllm")
    return np.exp(report.labels[0][0, 0, 1])


@pytest.mark.parametrize("run", [import_rows, import_parquet, import_tokens])
def test_two_imports_at_once(path, monkeypatch, run):
    """The first ends after the second has looked, before it has the lock."""
    real = fcntl.flock

    def flock(*args):
        monkeypatch.setattr(fcntl, "flock", real)
        assert run(path, 0.75) == pytest.approx(0.75, abs=1e-3)
        return real(*args)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ValueError, match="new directory: imports do not res"):
        run(path, 0.25)
    kind = TokenLabels if run is import_tokens else SoftLabels
    found = np.asarray(kind.open(path)[0])
    found = np.exp(found[0, 0, 1]) if run is import_tokens else found[0]
    assert found == pytest.approx(0.75, abs=1e-3)


def test_rows_of_another_are_not_removed(path, monkeypatch):
    """Nor are those that it has stored before it was killed."""
    real = fcntl.flock

    def flock(*args):
        monkeypatch.setattr(fcntl, "flock", real)
        with pytest.raises(RuntimeError):
            stores.write(path, stores.Teacher(fail_at=24))
        return real(*args)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ValueError, match="new directory: imports do not res"):
        import_rows(path, 0.25)
    teacher = stores.Teacher()
    assert len(stores.write(path, teacher)) == stores.N
    assert teacher.asked == stores.N - 24


def test_values_are_not_of_parquet(path, tmp_path):
    pytest.importorskip("pyarrow")
    stores.write(path).to_parquet(tmp_path / "rows")
    match = "`values` must be left out for Parquet.*'log_probabilities'"
    with pytest.raises(ValueError, match=match):
        import_soft_labels(
            tmp_path / "rows",
            stores.features(),
            tmp_path / "out",
            values="log_probabilities",
        )
    assert not (tmp_path / "out").exists()


def test_a_directory_without_parquet(path):
    path.mkdir()
    match = rf"\.parquet files. Received: source='.*{path.name}'"
    with pytest.raises(ValueError, match=match):
        import_soft_labels(path, TEXTS, path.with_name("out"))


@pytest.mark.parametrize("verify", ["no", None, 0])
@pytest.mark.parametrize("kind", [SoftLabels, TokenLabels])
def test_verify_is_a_flag(path, kind, verify):
    with pytest.raises(ValueError, match=f"`verify` must be .*={verify!r}"):
        kind.open(path, verify=verify)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"shuffle": "no"}, "`shuffle` must be True or False.*='no'"),
        ({"shuffle": 1}, "`shuffle` must be True or False.*=1"),
        ({"batch_size": "3"}, "`batch_size` must be an integer"),
        ({"preprocessor": 5}, "`preprocessor` must be a callable, or None"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_arguments_of_attach(path, kwargs, match, streamed):
    labels, x = stores.write(path), stores.features()
    x = stores.Batches(x) if streamed else x
    tokens = token_stores.write(path.with_name("tokens"))
    for call in (
        lambda: labels.attach(x, **kwargs),
        lambda: attach_several([labels], x, **kwargs),
        lambda: tokens.attach(token_stores.texts(), **kwargs),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_numpy_flags_are_flags(path):
    labels = stores.write(path)
    labels = SoftLabels.open(path, verify=np.bool_(True))
    batches = labels.attach(stores.features(), shuffle=np.bool_(False))
    np.testing.assert_array_equal(batches[0][1], labels[:32])
