"""Import of teacher outputs from CSV, JSONL and NumPy files."""

import json
import math

import numpy as np
import pytest

from keras_ptloss.soft_labels._import import import_soft_labels
from keras_ptloss.soft_labels._soft_labels import SoftLabels
from keras_ptloss.soft_labels._spec import SoftLabelSpec

NAMES = ("negative", "neutral", "positive")


def run(tmp_path, name, content, *, names=NAMES, n=None, **kwargs):
    source = tmp_path / name
    if isinstance(content, str):
        source.write_text(content, encoding="utf-8")
        n = n or len(content.strip().splitlines()) - name.endswith(".csv")
    else:
        np.save(source, content)
        n = n or len(content)
    return import_soft_labels(
        source,
        np.arange(n),
        tmp_path / "out.softlabels",
        spec=SoftLabelSpec(class_names=names, dtype="float32"),
        **kwargs,
    )


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_csv(tmp_path):
    report = run(
        tmp_path,
        "api.csv",
        "id,positive,negative,neutral\n"
        '"a,1",0.7,0.1,0.2\n'
        "b,0.9,,\n"
        "c,60e-2,0.2,0.4\n",
    )
    expected = [[0.1, 0.2, 0.7], [0.05, 0.05, 0.9], [1 / 6, 1 / 3, 1 / 2]]
    np.testing.assert_allclose(report.labels[:], expected, atol=1e-6)
    np.testing.assert_array_equal(report.filled, [False, True, False])
    np.testing.assert_array_equal(report.renormalised, [False, False, True])
    assert not report.empty.any() and report.num_repaired == 2
    assert report.ignored == ("id",)
    assert SoftLabels.open(report.labels.path).spec.class_names == NAMES


def test_csv_header_names_the_classes(tmp_path):
    report = run(tmp_path, "api.csv", "a,b\n0.5,0.5\n", names=None)
    assert report.labels.spec.class_names == ("a", "b")


def test_csv_without_a_class_fills_it(tmp_path):
    report = run(tmp_path, "api.csv", "positive,negative\n0.7,0.1\n")
    np.testing.assert_allclose(report.labels[0], [0.1, 0.2, 0.7], atol=1e-6)


@pytest.mark.parametrize("logs", [False, True])
def test_jsonl_lists_and_objects(tmp_path, logs):
    def number(p):
        return math.log(p) if logs else p

    report = run(
        tmp_path,
        "api.jsonl",
        lines(
            [number(0.25), number(0.25), number(0.5)],
            {"positive": number(0.6), "neutral": None, "note": "x"},
        ),
        values="log_probabilities" if logs else "probabilities",
    )
    expected = [[0.25, 0.25, 0.5], [0.2, 0.2, 0.6]]
    np.testing.assert_allclose(report.labels[:], expected, atol=1e-6)
    assert report.ignored == ("note",) and report.num_repaired == 1


def test_top_logprobs(tmp_path):
    def top(**probabilities):
        return [
            {"token": token, "logprob": math.log(p)}
            for token, p in probabilities.items()
        ]

    report = run(
        tmp_path,
        "llm.jsonl",
        lines(
            top(positive=0.5, neutral=0.25, negative=0.25),
            # Two tokens of one class, one that is none: 0.1 is left over.
            [*top(Positive=0.5, The=0.2), *top(**{" positive": 0.2})],
            # 0.3 is left over, but what is not listed has 0.1 at most.
            {"top_logprobs": top(positive=0.6, neutral=0.1)},
        ),
    )
    second = np.array([0.05, 0.05, 0.7]) / 0.8
    third = np.array([0.1, 0.1, 0.6]) / 0.8
    np.testing.assert_allclose(
        report.labels[:], [[0.25, 0.25, 0.5], second, third], atol=1e-6
    )
    np.testing.assert_array_equal(report.filled, [False, True, True])
    np.testing.assert_array_equal(report.renormalised, [False, True, True])
    assert report.ignored == ("The",)


def test_npy(tmp_path):
    table = np.array([[0.2, 0.3, 0.5], [0.2, np.nan, 0.5]])
    report = run(tmp_path, "api.npy", table)
    np.testing.assert_allclose(report.labels[1], [0.2, 0.3, 0.5], atol=1e-6)
    np.testing.assert_array_equal(report.filled, [False, True])


def test_empty_rows(tmp_path):
    content = lines([{"token": "I", "logprob": -0.1}], [0.2, 0.3, 0.5])
    with pytest.raises(ValueError, match="line 1 of .* tells nothing of any"):
        run(tmp_path, "llm.jsonl", content)
    report = run(tmp_path, "llm.jsonl", content, empty_rows="uniform")
    np.testing.assert_allclose(report.labels[0], 1 / 3, atol=1e-6)
    np.testing.assert_array_equal(report.empty, [True, False])
    assert report.num_repaired == 1


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.csv", "negative\nx\n", "line 2 of .* has 'x', not a number"),
        ("a.csv", "negative,b\n1\n", "line 2 of .* has 1 of 2 cells"),
        ("a.csv", "x,y\n0,1\n", "`source` must be a table of"),
        ("a.csv", "", "`source` must be a table of"),
        ("a.csv", "negative\n", "at least one row"),
        ("a.jsonl", "[1, 0, 0]\n[1, 0]\n", "line 2 of .* has 2 classes, not 3"),
        ("a.jsonl", "\n[2, 0, 0]\n", "line 2 of .* a probability of 2"),
        ("a.jsonl", "[-0.1, 1, 0]\n", "line 1 of .* a probability of -0.1"),
        ("a.jsonl", "[\n", "line 1 of .* is no JSON"),
        ("a.jsonl", "3\n", "line 1 of .* is no list or object"),
        ("a.jsonl", '[{"token": "x"}]\n', 'has no "token" and "logprob"'),
        (
            "a.jsonl",
            '[{"token": "x", "logprob": null}]\n',
            "line 1 of .* has no log-probability",
        ),
        ("a.npy", np.zeros(3), "an array of floats of shape"),
        ("a.npy", np.full((2, 3), np.inf), "row 0 of .* probability of inf"),
        ("a.txt", "0.5", "`source` must be one of '.csv', '.jsonl', '.npy'"),
    ],
)
def test_unreadable_files(tmp_path, name, content, match):
    with pytest.raises(ValueError, match=match):
        run(tmp_path, name, content)
    assert not (tmp_path / "out.softlabels").exists()


def test_arguments(tmp_path):
    content = lines([0.5, 0.25, 0.25])
    with pytest.raises(ValueError, match="file of 2 rows, one an example"):
        run(tmp_path, "a.jsonl", content, n=2)
    with pytest.raises(ValueError, match="`values` must be one of"):
        run(tmp_path, "a.jsonl", content, values="logits")
    with pytest.raises(ValueError, match="`empty_rows` must be one of"):
        run(tmp_path, "a.jsonl", content, empty_rows="drop")
    with pytest.raises(ValueError, match="`class_names` must be given"):
        run(tmp_path, "b.jsonl", lines({"a": 1.0}), names=None)
    with pytest.raises(ValueError, match="`from_logits` must be False"):
        import_soft_labels(
            tmp_path / "a.jsonl",
            np.arange(1),
            tmp_path / "out",
            spec=SoftLabelSpec(from_logits=True),
        )
    run(tmp_path, "a.jsonl", content)
    with pytest.raises(ValueError, match="`path` must be a new directory"):
        run(tmp_path, "a.jsonl", content)
