"""Sources whose records have lists, as Hugging Face's data sets do."""

import numpy as np
import pytest
from records import Records
from stores import N, Teacher, features, write

from keras_ptloss.soft_labels import TokenLabels, TokenLabelSpec, fingerprint


def hugging_face(**columns):
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


def dictionaries(**columns):
    rows = zip(*columns.values(), strict=True)
    return Records([dict(zip(columns, row, strict=True)) for row in rows])


sources = pytest.mark.parametrize("source", [hugging_face, dictionaries])


@sources
def test_lists_in_records_are_arrays(path, source):
    """A list of numbers is an input, whatever its depth, not each number."""
    x = features().astype("float64")
    columns = {"x": x, "deep": x.reshape(N, 1, 3), "whole": np.arange(N)}
    labels = write(
        path,
        lambda batch: Teacher().rows(batch["x"]),
        source(**{name: rows.tolist() for name, rows in columns.items()}),
    )
    np.testing.assert_allclose(labels[:], Teacher().rows(x), atol=1e-3)
    np.testing.assert_array_equal(labels.fingerprints, fingerprint(columns))
    inputs, _ = labels.attach(columns, batch_size=N)[0]
    for name, rows in columns.items():
        np.testing.assert_array_equal(inputs[name], rows)
    words = [["a", "film"], ["of", "two"]]
    two = write(
        path.with_name("words"),
        lambda batch: np.full((len(batch["words"]), 2), 0.5),
        source(words=words),
    )
    expected = fingerprint({"words": np.array(words, object)})
    np.testing.assert_array_equal(two.fingerprints, expected)


@sources
def test_ragged_lists_in_records(path, source):
    for ragged, shapes in (
        ([[1], [2, 3]], r"\(1,\), \(2,\)"),
        ([[[1], [2, 3]]], r"\(1,\), \(2,\)"),
        ([[[[1], [2, 3]], [[1]]]], r"\(1, 1\), \(2,\)"),
    ):
        with pytest.raises(ValueError, match=f"of one shape.*{shapes}"):
            write(path, dataset=source(x=ragged))


@sources
def test_sequences_in_records(path, source):
    """A column of lists is a list of sequences, of any lengths."""
    texts = [[3, 1, 2], [2], [0, 3]]
    spec = TokenLabelSpec(top_k=1)

    def teacher(x):
        ids = x["token_ids"]
        assert x["padding_mask"].shape == ids.shape
        return np.eye(4)[ids]

    for name, rows in (("ragged", texts), ("even", [t[:1] for t in texts])):
        column = source(input_ids=rows)
        column = (
            column["input_ids"]
            if source is hugging_face
            else Records([record["input_ids"] for record in column])
        )
        stored = TokenLabels.write(
            teacher, column, path.with_name(name), spec=spec, verbose=0
        )
        assert stored.rows_of(rows).tolist() == [0, 1, 2]
        assert stored.lengths.tolist() == list(map(len, rows))
        assert [s[:, 0, 0].tolist() for s in stored] == rows
        _, _, weight = stored.attach(column)[0]
        assert weight.sum(-1).tolist() == list(map(len, rows))
