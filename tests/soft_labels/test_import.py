"""Import of teacher outputs from CSV, JSONL and NumPy files."""

import math

import helpers
import numpy as np
import pytest
from imports import NAMES, lines, run, top

from keras_ptloss.soft_labels import (
    SoftLabels,
    SoftLabelSpec,
    import_soft_labels,
)

pytestmark = helpers.slow_but_on_one()


def test_csv(tmp_path):
    report = run(
        tmp_path,
        "api.csv",
        "note,positive,negative,neutral\n"
        '"a,1",0.7,0.1,0.2\n'
        "b,0.9,,\n"
        "c,60e-2,0.2,0.4\n",
    )
    expected = [[0.1, 0.2, 0.7], [0.05, 0.05, 0.9], [1 / 6, 1 / 3, 1 / 2]]
    np.testing.assert_allclose(report.labels[:], expected, atol=1e-6)
    np.testing.assert_array_equal(report.filled, [False, True, False])
    np.testing.assert_array_equal(report.renormalised, [False, False, True])
    assert not report.empty.any() and report.num_repaired == 2
    assert report.ignored == ("note",)
    assert SoftLabels.open(report.labels.path).spec.class_names == NAMES


def test_csv_header_names_the_classes(tmp_path):
    report = run(tmp_path, "api.csv", "a,b\n0.5,0.5\n", names=None)
    assert report.labels.spec.class_names == ("a", "b")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (",neg,pos\n0,0.2,0.8\n1,0.9,0.1\n", "class_names` must be given"),
        ("neg,pos,\n0.2,0.8,\n", "`class_names` must be given.* no name"),
        ("neg,pos,label\n0.9,0.1,0\n0.2,0.8,1\n", "line 3 .* add up to 2"),
        ("neg,pos,sure\n0.5,0.5,0.5\n", "line 2 .* add up to 1.5 .*class_n"),
    ],
)
def test_csv_with_columns_that_are_no_class(tmp_path, content, match):
    """Of pandas' index, labels, confidences: names tell the classes."""
    with pytest.raises(ValueError, match=match):
        run(tmp_path, "a.csv", content, names=None)
    report = run(tmp_path, "a.csv", content, names=("neg", "pos"))
    np.testing.assert_array_equal(report.renormalised, False)
    assert len(report.ignored) == 1


@pytest.mark.parametrize("logs", [False, True])
@pytest.mark.parametrize("name", ["a.npy", "a.jsonl", "b.jsonl"])
def test_rows_that_add_up_to_far_more_than_1(tmp_path, name, logs):
    """As sigmoids do, of classes that do not exclude each other."""
    rows = np.array([[0.5, 0.3, 0.4], [0.9, 0.1, 0.8]])
    table = np.log(rows) if logs else rows
    content = {
        "a.npy": table,
        "a.jsonl": lines(*table.tolist()),
        "b.jsonl": lines(
            *(dict(zip(NAMES, row.tolist(), strict=True)) for row in table)
        ),
    }[name]
    values = "log_probabilities" if logs else "probabilities"
    with pytest.raises(ValueError, match=r"(line 2|row 1) .* add up to 1\.8"):
        run(tmp_path, name, content, values=values)


def test_csv_without_a_class_fills_it(tmp_path):
    report = run(tmp_path, "api.csv", "positive,negative\n0.7,0.1\n")
    np.testing.assert_allclose(report.labels[0], [0.1, 0.2, 0.7], atol=1e-6)


READ = r"`source` must be a file .csv, .jsonl, .npy or .parquet, or a dir.*"


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
    np.testing.assert_allclose(report.other, [0, 0.2, 0], atol=1e-12)


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
        (
            "a.csv",
            "negative,note\n,x\n",
            "line 2 of .* tells nothing of any class; the classes are 'neg",
        ),
        ("a.csv", "negative\nx\n", "line 2 of .* has 'x', not a number"),
        ("a.csv", "negative,b\n1\n", "line 2 of .* has 1 of 2 cells"),
        ("a.csv", "x,y\n0,1\n", "`source` must be a table of"),
        ("a.csv", "", r"`source` must be a table of .*a\.csv, with \[\]"),
        ("a.csv", "no,negative,no\n1,2,3\n", "'no' stands twice"),
        (
            "a.csv",
            "Negative,negative\n0,1\n",
            "'Negative' and 'negative' are one class",
        ),
        ("a.csv", "negative\nnan\n", "line 2 of .* has 'nan', not a number"),
        ("a.csv", "negative\n-inf\n", "line 2 of .* probability of -inf"),
        ("a.csv", 'negative\n"' + "1" * 200_000, "line 2 of .* is no CSV"),
        ("a.csv", b"negative\n\xff\n", "`source` must be text in UTF-8"),
        ("a.csv", "negative\n", "at least one row"),
        ("a.jsonl", "[1, 0, 0]\n[1, 0]\n", "line 2 of .* has 2 classes, not 3"),
        ("a.jsonl", "\n[2, 0, 0]\n", "line 2 of .* a probability of 2"),
        ("a.jsonl", "[-0.1, 1, 0]\n", "line 1 of .* a probability of -0.1"),
        ("a.jsonl", "[\n", "line 1 of .* is no JSON"),
        ("a.jsonl", "[" * 100_000, "line 1 of .* is no JSON"),
        ("a.jsonl", "[true, 0, 0]\n", "line 1 of .* has True, not a number"),
        ("a.jsonl", '["1", 0, 0]\n', "line 1 of .* has '1', not a number"),
        ("a.jsonl", "[NaN, 0, 0]\n", "line 1 of .* has nan, not a number"),
        ("a.jsonl", "[1e999, 0, 0]\n", "line 1 of .* a probability of inf"),
        ("a.jsonl", f"[{10**400}, 0, 0]\n", "line 1 of .* probability of inf"),
        (
            "a.jsonl",
            '{"neutral": 0.1, "neutral": 0.2}\n',
            "line 1 of .* has 'neutral' twice",
        ),
        (
            "a.jsonl",
            '{"Neutral": 0.1, " neutral": 0.2}\n',
            "has 'Neutral' and ' neutral', which are one class",
        ),
        ("a.jsonl", '{"neutral": false}\n', "has False, not a number"),
        ("a.jsonl", '{"neutral": -0.5}\n', "values=.log_probabilities"),
        (
            "a.jsonl",
            '{"neutre": 1, "negatif": 0}\n',
            "tells nothing of any class, it has 'neutre', 'negatif'; the"
            " classes are 'negative', 'neutral', 'positive'",
        ),
        ("a.jsonl", "3\n", "line 1 of .* is no list or object"),
        ("a.jsonl", '[{"token": "x"}]\n', 'has no "token" and "logprob"'),
        (
            "a.jsonl",
            '[{"token": "x", "logprob": null}]\n',
            "line 1 of .* has no log-probability",
        ),
        ("a.npy", np.zeros(3), "an array of floats of shape"),
        ("a.npy", np.full((2, 3), np.inf), "row 0 of .* probability of inf"),
        ("a.npy", np.array([[{}]]), "a readable .npy file"),
        ("a.npy", b"", "a readable .npy file"),
        ("a.npy", b"\x93NUMPY\x01\x00\x02\x00({", "a readable .npy file"),
        ("a.txt", "0.5", READ + r"Received: source='.*a\.txt'"),
        ("a.CSV", "x,y\n0,1\n", READ + r"Received: source='.*a\.CSV'"),
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


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ([0.5, -1, -1], "has a log-probability of 0.5, above 0"),
        ({"neutral": 0.5}, "has a log-probability of 0.5, above 0"),
        ({"neutral": -1, "?": 0.5}, "has a log-probability of 0.5, above 0"),
        ([{"token": "?", "logprob": 0.5}], "of 0.5, above 0 for '?'"),
        ([{"token": "neutral", "logprob": 0.5}], "of 0.5, above 0 for 'neu"),
        ([{"token": "neutral", "logprob": True}], "has True, not a number"),
        ([{"token": "?", "logprob": float("nan")}], "has nan, not a number"),
        ([{"token": "?", "logprob": "-1"}], "has '-1', not a number"),
        ([{"token": 5, "logprob": -1}], "has the token 5, not a text"),
        ({"top_logprobs": {"?": 0.5}}, "of 0.5, above 0 for '?'"),
        ({"top_logprobs": [{"?": 0.5}]}, "of 0.5, above 0 for '?'"),
        ({"1": {"logprob": 0.5}}, "of 0.5, above 0 for '1'"),
        ({"logprobs": [-1, -2]}, r"has \[-1, -2\] where tokens were expected"),
        ({"top_logprobs": [3]}, "has 3 where tokens were expected"),
        (
            [{"token": "neutral", "logprob": -1, "top_logprobs": 3}],
            "has 3 where a list was expected",
        ),
        (
            # Positions of an answer, not alternatives to one token.
            [
                {"token": "neutral", "logprob": -0.1},
                {"token": ".", "logprob": -0.1},
            ],
            "add up to 1.80967: they are no alternatives",
        ),
    ],
)
def test_log_probabilities_are_checked(tmp_path, record, match):
    with pytest.raises(ValueError, match=match):
        run(
            tmp_path,
            "a.jsonl",
            lines(record),
            values="log_probabilities",
            empty_rows="uniform",
        )


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.csv", "negative,neutral,positive\n-1,-1,-1\n0.5,,-1\n", "line 3"),
        ("a.npy", np.array([[-1, -1, -1], [-9, np.nan, 0.5]]), "row 1"),
        ("a.jsonl", lines([-1, -1, -1], [-9, None, 0.5]), "line 2"),
    ],
)
def test_log_probabilities_of_tables_are_checked(
    tmp_path, name, content, where
):
    match = f"{where} of .* has a log-probability of 0.5, above 0"
    with pytest.raises(ValueError, match=match):
        run(tmp_path, name, content, n=2, values="log_probabilities")
    assert not (tmp_path / "out.softlabels").exists()


@pytest.mark.parametrize("header", ["a, a,b", "a,b,a ", ' a,"a",b'])
def test_csv_header_whose_names_are_one_class(tmp_path, header):
    with pytest.raises(ValueError, match="`(source|class_names)` must be"):
        run(tmp_path, "a.csv", f"{header}\n0.5,0.25,0.25\n", names=None)


def test_impossible_tokens_have_probability_zero(tmp_path):
    """As APIs write log(0): -9999, and -Infinity from Python's JSON."""
    report = run(
        tmp_path,
        "a.jsonl",
        lines([-9999.0, -math.inf, 0.0], {"negative": 0.0, "neutral": -9999}),
        values="log_probabilities",
    )
    np.testing.assert_array_equal(report.labels[:], [[0, 0, 1], [1, 0, 0]])


def test_an_object_of_log_probabilities_may_hold_other_tokens(tmp_path):
    record = {"Positive": 0.5, "The": 0.3, "neutral": 0.1}
    record = {token: math.log(p) for token, p in record.items()}
    report = run(
        tmp_path,
        "a.jsonl",
        lines({**record, "note": "x"}),
        values="log_probabilities",
    )
    # What is left over, 0.1, is the third class's.
    expected = np.array([0.1, 0.1, 0.5]) / 0.7
    np.testing.assert_allclose(report.labels[0], expected, atol=1e-6)
    assert report.other[0] == pytest.approx(0.3)
    assert report.ignored == ("The", "note")


@pytest.mark.parametrize("logs", [False, True])
@pytest.mark.parametrize("name", ["a.npy", "a.jsonl"])
def test_one_number_is_a_binary_head(tmp_path, name, logs):
    p = np.array([[0.2], [1.0], [0.75]])
    table = np.log(p) if logs else p
    report = run(
        tmp_path,
        name,
        table if name == "a.npy" else lines(*table.tolist()),
        names=("no", "yes"),
        values="log_probabilities" if logs else "probabilities",
    )
    expected = [[0.8, 0.2], [0.0, 1.0], [0.25, 0.75]]
    np.testing.assert_allclose(report.labels[:], expected, atol=1e-6)
    assert report.num_repaired == 0


def test_one_number_among_rows_of_two(tmp_path):
    with pytest.raises(ValueError, match="line 2 of .* has 1 classes, not 2"):
        run(tmp_path, "a.jsonl", "[0.5, 0.5]\n[0.5]\n", names=("a", "b"))
    with pytest.raises(ValueError, match="line 2 of .* has 2 classes, not 1"):
        run(tmp_path, "b.jsonl", "[0.5]\n[0.5, 0.5]\n", names=None)
