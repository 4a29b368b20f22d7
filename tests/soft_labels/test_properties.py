"""Random stores and random files, against loops over their rows."""

import csv
import io
import json
import math
import pathlib
import tempfile

import helpers
import hypothesis
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import strategies as st

from keras_ptloss.soft_labels import (
    SoftLabels,
    SoftLabelSpec,
    import_soft_labels,
)
from keras_ptloss.soft_labels._readers import Reader

pytestmark = helpers.slow_but_on_one()

# Every example writes files, whose time the disk decides.
settings = hypothesis.settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)


@pytest.fixture(scope="module", autouse=True)
def folder_of_stores(tmp_path_factory):
    """Where `tempfile` makes them, so that pytest clears them away."""
    tempfile.tempdir = str(tmp_path_factory.mktemp("stores"))
    yield
    tempfile.tempdir = None


@st.composite
def distributions(draw):
    """Rows with zeros, ties, certain rows and classes of 1e-30."""
    shape = draw(st.tuples(st.integers(1, 9), st.integers(2, 12)))
    weights = st.sampled_from([0.0, 1.0, 1.0, 3.0, 1e-3, 1e-30])
    rows = draw(hnp.arrays("float64", shape, elements=weights))
    rows[rows.sum(-1) == 0, 0] = 1.0
    return rows / rows.sum(-1, keepdims=True)


def store(rows, **kwargs):
    return SoftLabels.write(
        lambda positions: rows[positions],
        np.arange(len(rows)),
        tempfile.mkdtemp() + "/s",
        spec=SoftLabelSpec(**kwargs),
        batch_size=4,
        verbose=0,
    )


@settings
@hypothesis.given(
    distributions(), st.sampled_from(["float16", "float32"]), st.data()
)
def test_stored_probabilities(rows, dtype, data):
    n, classes = rows.shape
    k = data.draw(st.none() | st.integers(1, classes - 1))
    labels = store(rows, dtype=dtype, top_k=k)
    found = labels[:].astype("float64")
    tolerance = {"float16": 5e-4, "float32": 1e-6}[dtype]
    for row, read in zip(rows, found, strict=True):
        assert read.sum() == pytest.approx(1, abs=1e-6) and read.min() >= 0
        # What is not stored is spread evenly over its classes.
        expected = row.copy()
        if k is not None:
            rest = sorted(range(classes), key=lambda c: (-row[c], c))[k:]
            expected[rest] = row[rest].mean()
        assert 0.5 * np.abs(read - expected).sum() <= tolerance
    distances = 0.5 * np.abs(found - rows).sum(-1)
    assert labels.max_total_variation == pytest.approx(
        distances.max(), abs=1e-6
    )
    assert labels.mean_total_variation * n == pytest.approx(
        distances.sum(), abs=1e-6 * n
    )


@settings
@hypothesis.given(
    hnp.arrays(
        "float32",
        st.tuples(st.integers(1, 9), st.integers(1, 6)),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    )
)
def test_stored_logits(rows):
    """Of any size, to the last bit; one column is the second of two."""
    labels = store(rows, from_logits=True, dtype="float32")
    expected = rows
    if rows.shape[1] == 1:
        expected = np.concatenate([np.zeros_like(rows), rows], -1)
    np.testing.assert_array_equal(labels[:], expected)


def as_file(form, table, names, extra):
    """Write a table, None where missing, in one of the forms."""
    if form == "csv":
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow([*names, "note"])
        for row in table:
            cells = ["" if p is None else repr(p) for p in row]
            writer.writerow([*cells, "x"])
        return text.getvalue(), "csv"
    records = []
    for row, other in zip(table, extra, strict=True):
        if form == "list":
            records.append(row)
        elif form == "object":
            records.append(dict(zip(names, row, strict=True)))
        else:
            tokens = [*zip(names, row, strict=True), ("none of them", other)]
            listed = [
                {"token": f" {name}".upper(), "logprob": math.log(p)}
                for name, p in tokens
                if p
            ]
            records.append({"top_logprobs": listed})
    return "".join(json.dumps(record) + "\n" for record in records), "jsonl"


def repaired(row, other, tokens):
    """One row, filled and divided by its sum; None if it is empty."""
    if tokens:
        row = [p if p else None for p in row]
    known = [p for p in row if p is not None]
    if not known:
        return None
    rest = max(1 - sum(known) - other, 0)
    share = rest / max(len(row) - len(known), 1)
    if tokens:
        share = min(share, *known, *([other] if other else []), 1)
    row = [share if p is None else p for p in row]
    return [p / sum(row) for p in row] if sum(row) else None


@settings
@hypothesis.given(
    distributions(),
    st.sampled_from(["csv", "list", "object", "tokens"]),
    st.randoms(use_true_random=False),
)
def test_imported_rows(rows, form, random):
    names = tuple(f"class {index}" for index in range(rows.shape[1]))
    other = [random.choice([0.0, 0.25]) for _ in rows]
    if form != "tokens":
        other = [0.0] * len(rows)
    table = [
        [None if random.random() < 0.3 else p * (1 - o) for p in row]
        for row, o in zip(rows.tolist(), other, strict=True)
    ]
    text, suffix = as_file(form, table, names, other)
    folder = tempfile.mkdtemp()
    with open(f"{folder}/a.{suffix}", "w", encoding="utf-8") as file:
        file.write(text)
    report = import_soft_labels(
        f"{folder}/a.{suffix}",
        np.arange(len(rows)),
        folder + "/s",
        spec=SoftLabelSpec(class_names=names, dtype="float32"),
        empty_rows="uniform",
    )
    for index, (row, o) in enumerate(zip(table, other, strict=True)):
        expected = repaired(row, o, form == "tokens")
        assert report.empty[index] == (expected is None)
        if expected is None:
            expected = [1 / len(row)] * len(row)
        np.testing.assert_allclose(
            report.labels[index], expected, rtol=1e-5, atol=1e-6
        )


KEYS = """choices logprobs content top_logprobs token logprob tokens type output
token_logprobs custom_id response body status_code error yes no decoded_token
message output_text id fingerprint""".split()
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-2, 500)
    | st.floats(-2, 2)
    | st.sampled_from([*KEYS, "", float("nan"), float("-inf"), 200, 10**400])
)
anything = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)


@hypothesis.settings(settings, max_examples=300)
@hypothesis.given(anything, st.booleans())
def test_any_json_is_read_or_refused(record, log):
    """With a `ValueError` that names the line, and with nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "a.jsonl")
        source.write_text(json.dumps(record) + "\n")
        try:
            (row,) = Reader(source, ("yes", "no"), log=log).read()
        except ValueError as error:
            assert "line 1 of" in str(error)
            return
    assert row.failure or np.isnan(row.values[:]).sum() + np.sum(
        (row.values >= 0) & (row.values <= 1.02)
    ) == len(row.values)


@pytest.fixture(scope="module")
def stored():
    rows = np.array([[0.5, 0.3, 0.2], [0.1, 0.0, 0.9]])
    return store(rows, top_k=2, dtype="float32")


def fields(manifest):
    """The places of a manifest where a value stands."""
    for key, value in manifest.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, inner) for inner in value)


numbers = st.sampled_from([0, 1, 2, 2.0, 3.0, -1, 10**30, 1e308, float("nan")])
scalars = leaves | numbers | st.sampled_from(["float32", "../../x", "2"])
values = (
    scalars
    | st.lists(scalars, max_size=3)
    | st.dictionaries(st.sampled_from(["sum", "max", "../x"]), scalars)
)


@hypothesis.settings(settings, max_examples=200)
@hypothesis.given(st.data(), values)
def test_any_manifest_is_refused_or_changes_no_row(stored, data, value):
    file = stored.path / "shard-00000-of-00001" / "manifest.json"
    good = file.read_text()
    manifest = json.loads(good)
    *outer, key = data.draw(st.sampled_from(list(fields(manifest))))
    (manifest[outer[0]] if outer else manifest)[key] = value
    file.write_text(json.dumps(manifest))
    try:
        found = SoftLabels.open(stored.path)[:]
    except ValueError as error:
        assert "intact store" in str(error)
    else:
        np.testing.assert_array_equal(found, stored[:])
    finally:
        file.write_text(good)
