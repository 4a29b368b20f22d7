"""Import of language models' answers, in the forms in which APIs give them.

The expected rows are written down from the probabilities that go in.
"""

import copy
import json
import math

import numpy as np
import pytest
from imports import lines, run, top, top_of

from keras_ptloss.soft_labels._numbers import RowProblem
from keras_ptloss.soft_labels._responses import positions

NAMES = ("no", "yes")
FIRST = top(Yes=0.6, No=0.3, Maybe=0.05)


def item(token, probability, alternatives=()):
    """An element of `logprobs.content`, with what else OpenAI puts there."""
    return {
        "token": token,
        "logprob": math.log(probability),
        "bytes": list(token.encode()),
        "top_logprobs": [{**other, "bytes": None} for other in alternatives],
    }


def chat(content, choices=1):
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "Yes.", "refusal": None},
        "logprobs": {"content": content, "refusal": None},
        "finish_reason": "stop",
    }
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [choice] * choices,
        "usage": {"total_tokens": 9},
    }


CONTENT = [item("Yes", 0.6, FIRST), item(".", 0.9, top_of({".": 0.9}))]
COMPLETION = {
    "tokens": ["\n", " yes", "."],
    "token_logprobs": [math.log(0.5), math.log(0.6), -0.1],
    "top_logprobs": [
        {"\n": math.log(0.5), " no": math.log(0.4)},
        {" yes": math.log(0.6), " no": math.log(0.3), "?": math.log(0.05)},
        {".": -0.1},
    ],
    "text_offset": [0, 1, 5],
}
VLLM = {
    str(9642 + k): {"logprob": math.log(p), "rank": k + 1, "decoded_token": t}
    for k, (t, p) in enumerate({" yes": 0.6, "No": 0.3, "Maybe": 0.05}.items())
}
RESPONSE = {
    "object": "response",
    "error": None,
    "output": [
        {"type": "reasoning", "content": [], "summary": []},
        {
            "type": "message",
            "content": [
                {
                    "type": "output_text",
                    "text": "Yes.",
                    "annotations": [],
                    "logprobs": CONTENT,
                }
            ],
        },
    ],
}


FORMS = [
    chat(CONTENT),
    chat(CONTENT)["choices"][0],
    chat(CONTENT)["choices"][0]["logprobs"],
    {"content": CONTENT},
    CONTENT,
    # The model begins with a quotation mark.
    chat([item('"', 0.5, top_of({'"': 0.5, "No": 0.4})), *CONTENT]),
    CONTENT[0],
    {"top_logprobs": FIRST},
    {"choices": [{"text": "\n yes.", "logprobs": COMPLETION}]},
    {"logprobs": COMPLETION},
    COMPLETION,
    {"top_logprobs": COMPLETION["top_logprobs"][1:2]},
    {"top_logprobs": COMPLETION["top_logprobs"][1]},
    {"logprobs": COMPLETION["top_logprobs"][1]},
    VLLM,
    [VLLM, {"13": {"logprob": -0.1, "decoded_token": "."}}],
    {"logprobs": [VLLM]},
    RESPONSE,
]


@pytest.mark.parametrize("record", FORMS)
def test_forms(tmp_path, record):
    report = run(tmp_path, "a.jsonl", lines(record), names=NAMES)
    np.testing.assert_allclose(report.labels[0], [1 / 3, 2 / 3], atol=1e-6)
    assert report.other[0] == pytest.approx(0.05)
    assert not report.filled[0] and report.renormalised[0]


def test_lines_may_be_of_several_forms(tmp_path):
    records = (chat(CONTENT), [0.25, 0.75], {"Yes": 0.75, "NO": 0.25}, VLLM)
    report = run(tmp_path, "a.jsonl", lines(*records), names=NAMES)
    expected = [[1 / 3, 2 / 3], [0.25, 0.75], [0.25, 0.75], [1 / 3, 2 / 3]]
    np.testing.assert_allclose(report.labels[:], expected, atol=1e-6)


def test_the_answers_token_counts_though_it_is_not_listed(tmp_path):
    """A sampled token may be less likely than those listed."""
    content = [item("yes", 0.02, top(no=0.6, maybe=0.3))]
    report = run(tmp_path, "a.jsonl", lines(content), names=NAMES)
    expected = np.array([0.6, 0.02]) / 0.62
    np.testing.assert_allclose(report.labels[0], expected, atol=1e-6)
    # The bound on missing classes is the least of the listed ones, not it.
    names = ("no", "yes", "never")
    report = run(tmp_path / "2", "a.jsonl", lines(content), names=names)
    expected = np.array([0.6, 0.02, 0.08]) / 0.7
    np.testing.assert_allclose(report.labels[0], expected, atol=1e-6)


def test_an_answer_that_names_no_class(tmp_path):
    """Where no token does, the first list that holds a class is read."""
    content = [
        item("Well", 0.9, top(Well=0.9)),
        item("Maybe", 0.6, top(Maybe=0.6, no=0.3, yes=0.1)),
        item("yes!", 0.6, top(yes=0.9)),
    ]
    report = run(tmp_path, "a.jsonl", lines(content), names=NAMES)
    np.testing.assert_allclose(report.labels[0], [0.75, 0.25], atol=1e-6)
    assert report.other[0] == pytest.approx(0.6)
    assert report.ignored == ("Maybe",)


def test_without_top_logprobs(tmp_path):
    """The answer's token alone: the rest is the other class's."""
    completion = {**COMPLETION, "top_logprobs": None}
    report = run(
        tmp_path,
        "a.jsonl",
        lines(chat([item("Yes", 0.6)]), completion),
        names=NAMES,
    )
    np.testing.assert_allclose(report.labels[:], [[0.4, 0.6]] * 2, atol=1e-6)
    assert report.filled.all()


def test_pieces_and_marks(tmp_path):
    pieces = {"\u2581yes": 0.8, "yes": 0.02, "\u2581no": 0.1, "\u0120No": 0.05}
    report = run(tmp_path, "a.jsonl", lines(top_of(pieces)), names=NAMES)
    expected = np.array([0.15, 0.82]) / 0.97
    np.testing.assert_allclose(report.labels[0], expected, atol=1e-6)


def test_classes_that_differ_in_case(tmp_path):
    report = run(
        tmp_path,
        "a.jsonl",
        lines(top_of({"US": 0.2, "us": 0.6, " Us": 0.1})),
        names=("US", "us"),
    )
    np.testing.assert_allclose(report.labels[0], [0.25, 0.75], atol=1e-6)
    assert report.ignored == (" Us",) and report.other[0] == pytest.approx(0.1)


def test_csv_columns_are_matched_like_tokens(tmp_path):
    report = run(tmp_path, "a.csv", " Yes ,NO,id\n0.75,0.25,7\n", names=NAMES)
    np.testing.assert_allclose(report.labels[0], [0.25, 0.75], atol=1e-6)
    assert report.ignored == ("id",)


def test_a_model_that_refused(tmp_path):
    content = lines(chat(None), chat(CONTENT))
    with pytest.raises(ValueError, match="line 1 of .* tells nothing of any"):
        run(tmp_path, "a.jsonl", content, names=NAMES)
    report = run(
        tmp_path, "a.jsonl", content, names=NAMES, empty_rows="uniform"
    )
    np.testing.assert_array_equal(report.empty, [True, False])


def tokens(*texts):
    return [item(text, 0.9, top_of({text: 0.9})) for text in texts]


@pytest.mark.parametrize("answer", [("non", "-", "toxic"), ("toxic", " waste")])
def test_a_class_of_several_tokens_is_refused(tmp_path, answer):
    """The token "toxic" is not the answer where "non-toxic" is."""
    names = ("toxic", "non-toxic", "Toxic waste")
    with pytest.raises(ValueError, match="a class of several tokens"):
        run(tmp_path, "a.jsonl", lines(tokens(*answer)), names=names)


def test_nested_classes_of_one_token(tmp_path):
    content = tokens('"', " Toxic", ".", "It", " is")
    report = run(
        tmp_path, "a.jsonl", lines(content), names=("non-toxic", "toxic")
    )
    np.testing.assert_allclose(report.labels[0], [0.1, 0.9], atol=1e-6)


@pytest.mark.parametrize(
    ("record", "match"),
    [
        (chat(CONTENT, choices=2), "has 2 choices, not 1"),
        ({"choices": []}, "has 0 choices, not 1"),
        ({"choices": [{"logprobs": None}]}, "no log-probabilities .ask the"),
        (
            {**RESPONSE, "output": [{**RESPONSE["output"][1], "content": []}]},
            "tells nothing of any class",
        ),
        (
            json.loads(json.dumps(RESPONSE).replace('"logprobs"', '"l"')),
            "no log-probabilities .ask the",
        ),
        (
            {**COMPLETION, "token_logprobs": [None, -1, -1]},
            "holds its prompt too .ask without `echo`",
        ),
        ({**COMPLETION, "tokens": ["yes"]}, "of two lengths"),
        ({**COMPLETION, "tokens": 3}, "has 3 where a list was expected"),
        (chat(0.5), "has 0.5 where a list was expected"),
        ({"content": ["yes"]}, 'no "token" and "logprob" in yes'),
    ],
)
def test_unreadable_answers(tmp_path, record, match):
    with pytest.raises(ValueError, match=f"line 1 of .* {match}"):
        run(tmp_path, "a.jsonl", lines(record), names=NAMES)


def test_class_names_are_needed(tmp_path):
    with pytest.raises(ValueError, match="`class_names` must be given"):
        run(tmp_path, "a.jsonl", lines(chat(CONTENT)), names=None)


def parts(record, path=()):
    """The path to every part of a JSON value."""
    if path:
        yield path
    if isinstance(record, (dict, list)):
        keys = record if isinstance(record, dict) else range(len(record))
        for key in keys:
            yield from parts(record[key], (*path, key))


def changed(record, path, value):
    record = copy.copy(record)
    record[path[0]] = (
        changed(record[path[0]], path[1:], value) if path[1:] else value
    )
    return record


@pytest.mark.parametrize(
    "value", [None, True, 3, -0.5, "x", [], {}, [None], {"yes": -1.0}]
)
def test_any_part_may_be_of_any_kind(value):
    """Then the record is read or refused, and nothing else happens."""
    for record in FORMS:
        for path in parts(record):
            try:
                positions(changed(record, path, value))
            except RowProblem as problem:
                assert str(problem)
