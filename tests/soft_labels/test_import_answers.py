"""Import of language models' answers, in the forms in which APIs give them.

The expected rows are written down from the probabilities that go in.
"""

import copy
import json
import math

import helpers
import numpy as np
import pytest
from imports import lines, run, top, top_of

from keras_ptloss.soft_labels._numbers import RowProblem
from keras_ptloss.soft_labels._responses import positions

pytestmark = helpers.slow_but_on_one()

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


BY_ID = {"9642": math.log(0.6), "2822": math.log(0.3), "13": math.log(0.05)}


@pytest.mark.parametrize(
    "record",
    [
        BY_ID,
        {"logprobs": BY_ID},
        {"top_logprobs": BY_ID},
        {"top_logprobs": [BY_ID]},
    ],
)
class TestBareNumbersById:
    """`{"9642": -0.5}`: an id is a text like any other."""

    def run(self, folder, record, names, values="log_probabilities"):
        content = lines(record)
        return run(folder, "a.jsonl", content, names=names, values=values)

    def test_classes_of_these_names(self, tmp_path, record):
        report = self.run(tmp_path, record, ("2822", "9642"))
        np.testing.assert_allclose(report.labels[0], [1 / 3, 2 / 3], atol=1e-6)
        assert report.other[0] == pytest.approx(0.05)
        assert report.ignored == ("13",)

    def test_other_classes(self, tmp_path, record):
        match = "it has '9642', '2822', '13'; the classes are 'no', 'yes'"
        with pytest.raises(ValueError, match=match):
            self.run(tmp_path, record, NAMES)

    def test_taken_for_probabilities(self, tmp_path, record):
        if record is not BY_ID:  # keys say that these are logarithms
            return
        match = "probability of -1.20.* .or is it values=.log_prob"
        with pytest.raises(ValueError, match=match):
            self.run(tmp_path, record, ("2822", "9642"), "probabilities")


def forms_of_a_row(row):
    """A row of numbers by name: tokens, an object, a table."""
    logs = {name: math.log(p) for name, p in row.items()}
    header = ",".join(f'"{name}"' for name in row)
    return {
        "tokens": ("a.jsonl", lines(top_of(row)), "probabilities"),
        "object": ("a.jsonl", lines(row), "probabilities"),
        "logs": ("a.jsonl", lines(logs), "log_probabilities"),
        "table": (
            "a.csv",
            f"{header}\n{','.join(map(str, row.values()))}\n",
            "probabilities",
        ),
    }


names_of = pytest.mark.parametrize(
    "form", ["tokens", "object", "logs", "table"]
)


@names_of
@pytest.mark.parametrize(
    ("row", "names", "expected", "ignored"),
    [
        (
            {" Yes ": 0.72, "\u2581NO": 0.24, "Maybe": 0.04},
            NAMES,
            [0.25, 0.75],
            ("Maybe",),
        ),
        (
            {"\u0120yes": 0.72, "##no": 0.24, "##ye": 0.04},
            NAMES,
            [0.25, 0.75],
            ("##ye",),
        ),
        (
            {"\u010aYes": 0.72, "\u00a0no": 0.24, "y es": 0.04},
            NAMES,
            [0.25, 0.75],
            ("y es",),
        ),
        # Two classes that differ in case: the text decides.
        (
            {"US": 0.24, "us": 0.72, "Us": 0.04},
            ("US", "us"),
            [0.25, 0.75],
            ("Us",),
        ),
        (
            {"\u0120us": 0.72, " US": 0.24, "\u2581Us": 0.04},
            ("US", "us"),
            [0.25, 0.75],
            ("\u2581Us",),
        ),
    ],
)
def test_one_rule_of_names(tmp_path, form, row, names, expected, ignored):
    name, content, values = forms_of_a_row(row)[form]
    report = run(tmp_path, name, content, names=names, values=values)
    np.testing.assert_allclose(report.labels[0], expected, atol=1e-6)
    assert report.ignored == ignored
    other = 0.04 if form in ("tokens", "logs") else 0.0
    assert report.other[0] == pytest.approx(other)


@names_of
@pytest.mark.parametrize(
    ("one", "two"), [("Yes", "\u2581yes"), ("##YES", " yes"), ("yes", "YES")]
)
def test_two_texts_of_one_class(tmp_path, form, one, two):
    """Tokens add up; two keys or columns are an error."""
    name, content, values = forms_of_a_row({one: 0.5, two: 0.25, "no": 0.25})[
        form
    ]
    if form == "tokens":
        report = run(tmp_path, name, content, names=NAMES)
        np.testing.assert_allclose(report.labels[0], [0.25, 0.75], atol=1e-6)
        return
    match = f"{one!r} and {two!r}.* are one class"
    with pytest.raises(ValueError, match=match):
        run(tmp_path, name, content, names=NAMES, values=values)


@names_of
def test_what_is_found_is_shown_beside_what_is_wanted(tmp_path, form):
    name, content, values = forms_of_a_row({"oui": 0.5, "non": 0.25})[form]
    match = "it has 'oui', 'non'; the classes are 'no', 'yes'"
    if form == "table":
        match = r"a table of \('no', 'yes'\).*Received: .*'oui', 'non'"
    with pytest.raises(ValueError, match=match):
        run(tmp_path, name, content, names=NAMES, values=values)


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
