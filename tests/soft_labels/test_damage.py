"""Stores whose files have changed: an error, never other rows."""

import json

import helpers
import numpy as np
import pytest
from stores import C, N, Teacher, features, flipped, spoilt, write

from keras_ptloss.soft_labels import SoftLabels

pytestmark = helpers.slow_but_on_one()


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


@pytest.mark.parametrize("name", ["labels.npy", "fingerprints.npy"])
def test_any_flipped_bit_of_an_array_is_found(path, name):
    write(path)
    file = path / "shard-00000-of-00001" / name
    good = file.read_bytes()
    for bad in spoilt(good, range(128), 40):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="`path` must be an intact store"):
            SoftLabels.open(path)
    file.write_bytes(good)
    assert len(SoftLabels.open(path)) == N


@pytest.mark.parametrize("k", [None, 2])
def test_a_flipped_bit_of_the_manifest_changes_no_row(path, k):
    rows = write(path, top_k=k)[:]
    file = path / "shard-00000-of-00001" / "manifest.json"
    good = file.read_bytes()
    for place in range(len(good)):
        file.write_bytes(flipped(good, place, place % 8))
        try:
            found = SoftLabels.open(path)[:]
        except ValueError as error:
            assert "intact store" in str(error)
        else:
            np.testing.assert_array_equal(found, rows)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "keras_ptloss.soft_labels/3"}, "format is not"),
        ({"spec": None}, "manifest is wrong"),
        ({"spec": {"num_examples": N, "colour": 1}}, "manifest is wrong"),
        ({"spec": {"num_examples": N, "dtype": "../../x"}}, "is wrong"),
        ({"num_classes": "4"}, "manifest is wrong"),
        ({"num_classes": -4}, "contradicts itself"),
        ({"num_classes": 4.0}, "contradicts itself"),
        ({"stored": float(N)}, "contradicts itself"),
        ({"rows": [0, N + 1]}, "contradicts itself"),
        ({"shard": [1, 2]}, "contradicts itself"),
        ({"stored": N + 1}, "contradicts itself"),
        ({"stored": N - 1}, "has 49 rows only"),
        ({"checksums": {"../../labels": "x"}}, "contradicts itself"),
        ({"checksums": None}, "checksum of labels.npy differs"),
        ({"checksums": ["labels", "fingerprints"]}, "contradicts itself"),
        ({"checksums": "x"}, "contradicts itself"),
        ({"total_variation": {"sum": -1, "max": 0}}, "contradicts itself"),
    ],
)
def test_manifests_from_elsewhere(path, change, match):
    write(path)
    file = path / "shard-00000-of-00001" / "manifest.json"
    manifest = {**json.loads(file.read_text()), **change}
    # Who writes a manifest writes no checksum, as version 0.1.0 did, or his.
    del manifest["checksum"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"an intact store, but .*{match}"):
        SoftLabels.open(path)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"format": "\xff"}'])
def test_manifests_that_no_parser_reads(path, text):
    write(path)
    (path / "shard-00000-of-00001" / "manifest.json").write_bytes(text)
    with pytest.raises(ValueError, match="intact store.*manifest is no JSON"):
        SoftLabels.open(path)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("shard-00000-of-00000", "at least one shard"),
        ("shard-00000-of-99999999999", r"shard 8 of \d+ \(not begun\) and oth"),
    ],
)
def test_names_that_promise_no_or_billions_of_shards(path, name, match):
    (path / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=match):
        SoftLabels.open(path)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_no_pickle_is_run(path):
    write(path)
    file = path / "shard-00000-of-00001" / "labels.npy"
    np.save(file, np.array([[Bomb()] * C] * N, object), allow_pickle=True)
    for verify in (True, False):
        with pytest.raises(ValueError, match="labels.npy is unreadable"):
            SoftLabels.open(path, verify=verify)


def test_a_damaged_unfinished_shard_is_not_gone_on_with(path):
    with pytest.raises(RuntimeError):
        write(path, Teacher(fail_at=24))
    folder = path / "shard-00000-of-00001.partial"
    (folder / "fingerprints.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="fingerprints.npy is unreadable"):
        write(path)
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="manifest's format is not"):
        write(path)


def test_paths_with_spaces_and_letters_of_all_kinds(tmp_path):
    path = tmp_path / "my teachers" / "\u017bubr\u00f3wka \U0001f43b.softlabels"
    path.parent.mkdir()
    labels = write(path, class_names=("\u00e4", "\u4e00", "c c", "\U0001f43b"))
    again = SoftLabels.open(path)
    assert again.spec == labels.spec
    assert len(labels.attach(features())) == 2
