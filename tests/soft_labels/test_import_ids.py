"""Import of rows that bear ids, such as a batch job's output."""

import shutil

import helpers
import numpy as np
import pytest
from imports import lines, run, top

from keras_ptloss.soft_labels import fingerprint

pytestmark = helpers.slow_but_on_one()

NAMES = ("no", "yes")


def batch(custom_id, yes, **changes):
    """A line of a batch job's output."""
    content = [
        {"token": "Yes", "logprob": -1.0, "top_logprobs": top(Yes=yes, no=1e-9)}
    ]
    content[0]["top_logprobs"][1]["logprob"] = float(np.log(1 - yes))
    body = {"choices": [{"index": 0, "logprobs": {"content": content}}]}
    response = {"status_code": 200, "request_id": "r", "body": body}
    record = {"id": "b", "custom_id": custom_id, "response": response}
    return {**record, "error": None, **changes}


def failed(custom_id, status=429):
    body = {"error": {"message": "too many requests", "code": "rate"}}
    response = {"status_code": status, "body": body}
    return batch(custom_id, 0.5, response=response)


def test_rows_are_matched_by_id(tmp_path):
    content = lines(batch("b", 0.75), batch("c", 0.5), batch("a", 0.125))
    report = run(tmp_path, "a.jsonl", content, names=NAMES, ids=["a", "b", "c"])
    expected = [[0.875, 0.125], [0.25, 0.75], [0.5, 0.5]]
    np.testing.assert_allclose(report.labels[:], expected, atol=1e-6)
    assert report.failed == () and report.num_repaired == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "custom_id,yes,no\n1,0.75,0.25\n0,0.125,0.875\n"),
        (
            "a.jsonl",
            lines(
                {"custom_id": 1, "Yes": 0.75, "No": 0.25},
                {"custom_id": "0", "Yes": 0.125, "No": 0.875},
            ),
        ),
    ],
)
def test_tables_with_ids(tmp_path, name, content):
    """The numbers 0 and 1 and the texts "0" and "1" are the same ids."""
    for ids in (np.arange(2), ("0", "1")):
        report = run(
            tmp_path / str(type(ids)), name, content, names=NAMES, ids=ids, n=2
        )
        expected = [[0.875, 0.125], [0.25, 0.75]]
        np.testing.assert_allclose(report.labels[:], expected, atol=1e-6)
        assert report.ignored == ()
    names = run(
        tmp_path / "header", "a.csv", "custom_id,a,b\n0,1,0\n", names=None,
        ids=[0],
    ).labels.spec.class_names  # fmt: skip
    assert names == ("a", "b")


@pytest.mark.parametrize("key", ["id", " ID", "fingerprint", "custom_id"])
@pytest.mark.parametrize(
    ("name", "names"), [("a.csv", NAMES), ("a.csv", None), ("a.jsonl", NAMES)]
)
def test_the_names_of_rows(tmp_path, name, names, key):
    """As in Parquet; they are no class, nor is a second one."""
    x = np.arange(3)
    ids = fingerprint(x) if key == "fingerprint" else x
    second = {} if key == "fingerprint" else {"Fingerprint": 7}
    yes = [0.125, 0.25, 0.75]
    found = [
        {key: int(ids[row]), **second, "no": 1 - yes[row], "yes": yes[row]}
        for row in (2, 0, 1)
    ]
    content = lines(*found)
    if name == "a.csv":
        table = [found[0], *(row.values() for row in found)]
        content = "".join(",".join(map(str, row)) + "\n" for row in table)
    with pytest.raises(ValueError, match="`ids` must be given, .*any order"):
        run(tmp_path, name, content, names=names)
    report = run(tmp_path, name, content, names=names, ids=ids)
    np.testing.assert_allclose(report.labels[:][:, 1], yes, atol=1e-6)
    assert report.labels.spec.class_names == NAMES and report.ignored == ()


def test_names_that_are_classes(tmp_path):
    """Such as Indonesian, among languages."""
    names = ("en", "ID")
    for name, content in (
        ("a.csv", "id,en\n0.25,0.75\n"),
        ("a.jsonl", lines({"id": 0.25, "en": 0.75})),
    ):
        report = run(tmp_path / name, name, content, names=names)
        np.testing.assert_allclose(report.labels[0], [0.75, 0.25], atol=1e-6)
        assert report.num_repaired == 0


def test_the_names_of_answers_are_the_apis(tmp_path):
    """Unless what the API said is a column of a table."""
    answer = batch("a", 0.75)["response"]["body"]
    for record in (
        {"id": "chatcmpl-1", **answer},
        {"id": "batch_1", "response": {"body": answer}},
    ):
        report = run(tmp_path, "a.jsonl", lines(record), names=NAMES)
        np.testing.assert_allclose(report.labels[0], [0.25, 0.75], atol=1e-6)
        shutil.rmtree(report.labels.path)
    record = {"id": 3, "response": "Yes!", "no": 0.25, "yes": 0.75}
    with pytest.raises(ValueError, match="`ids` must be given, .*'3' on line"):
        run(tmp_path, "a.jsonl", lines(record), names=NAMES)
    record = {"fingerprint": 3, **answer}
    report = run(tmp_path, "a.jsonl", lines(record), names=NAMES, ids=[3])
    np.testing.assert_allclose(report.labels[0], [0.25, 0.75], atol=1e-6)


def test_failed_requests_are_reported_by_id(tmp_path):
    content = lines(
        failed("d"),
        batch("a", 0.75),
        batch("c", 0.5, response=None, error={"code": "batch_expired"}),
        batch("b", 0.5, response=None),
        {"error": {"message": "overloaded"}, "custom_id": "e"},
    )
    kwargs = {"names": NAMES, "ids": list("abcde")}
    with pytest.raises(
        ValueError,
        match="4 failed .*: 'b', 'c', 'd', 'e' .the first: no response",
    ):
        run(tmp_path, "a.jsonl", content, **kwargs)
    with pytest.raises(ValueError, match="status 429, too many requests"):
        run(tmp_path, "a.jsonl", lines(failed("a")), names=NAMES, ids=["a"])
    report = run(tmp_path, "a.jsonl", content, empty_rows="uniform", **kwargs)
    np.testing.assert_allclose(
        report.labels[:], [[0.25, 0.75], *[[0.5, 0.5]] * 4], atol=1e-6
    )
    assert report.failed == ("b", "c", "d", "e")
    np.testing.assert_array_equal(report.empty, [False] + [True] * 4)


def test_failed_requests_without_ids_are_reported_by_line(tmp_path):
    content = lines([0.5, 0.5], {"error": {"message": "overloaded"}})
    with pytest.raises(ValueError, match="1 failed .*: 'line 2' .*overl"):
        run(tmp_path, "a.jsonl", content, names=NAMES)
    with pytest.raises(ValueError, match="1 failed of its requests: 'line 1'"):
        # A store of nothing but failures would be one of no teacher.
        run(
            tmp_path, "b.jsonl", content.splitlines()[1], names=None,
            empty_rows="uniform",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "ids", "match"),
    [
        ("ab", None, "`ids` must be given, .*'a' on line 1.* any order"),
        ("ab", ["a", "b", "c"], "has no row of 'c' .*error file.*append it.$"),
        ("abc", ["a", "b"], "has rows of 'c', which are not among them"),
        ("ab", ["a", "c"], "no row of 'c' .* and rows of 'b', which are not"),
        ("aba", ["a", "b"], "line 1 and line 3 of .* have the id 'a' both"),
        ("ab", ["a", "b", "a"], "`ids` must be different: 'a' stands twice"),
        ("ab", [1, "1"], "`ids` must be different: '1' stands twice"),
        ("ab", "ab", "`ids` must be a sequence of ids"),
        ("ab", 3, "`ids` must be a sequence of ids"),
        ("ab", [["a", "b"]], "`ids` must be a sequence of ids"),
    ],
)
def test_ids_that_do_not_fit(tmp_path, rows, ids, match):
    content = lines(*(batch(name, 0.5) for name in rows))
    with pytest.raises(ValueError, match=match):
        run(tmp_path, "a.jsonl", content, names=NAMES, ids=ids)
    assert not (tmp_path / "out.softlabels").exists()


def test_rows_without_ids(tmp_path):
    content = lines(batch("a", 0.5), [0.5, 0.5])
    match = (
        "line 2 of .* has no custom_id or id or finger.*, and `ids` are given"
    )
    with pytest.raises(ValueError, match=match):
        run(tmp_path, "a.jsonl", content, names=NAMES, ids=["a", "b"])
    with pytest.raises(ValueError, match="row 0 of .* has no custom_id"):
        run(tmp_path, "a.npy", np.ones((1, 2)) / 2, names=NAMES, ids=["a"])
    with pytest.raises(ValueError, match="has the custom_id True, not a text"):
        content = lines({"custom_id": True, "yes": 1.0})
        run(tmp_path, "b.jsonl", content, names=NAMES, ids=["a"])


def test_a_data_set_of_another_length(tmp_path):
    content = lines(batch("a", 0.5), batch("b", 0.5))
    with pytest.raises(ValueError, match="`ids` must be 3 ids, one an example"):
        run(tmp_path, "a.jsonl", content, names=NAMES, ids=["a", "b"], n=3)
