"""Files of responses: lines, batch jobs, and which row is whose."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from responses_of import batch, chat, completion, position, write

from keras_ptloss.soft_labels import read_answers, read_tokens

NAMES = ["no", "yes"]


def answer(yes):
    return chat(position(("yes", yes), ("no", 1 - yes)))


def read(path, *records, **options):
    return read_answers(write(path / "a.jsonl", *records), NAMES, **options)


def test_batch_lines_come_in_the_order_of_ids(tmp_path):
    lines = [batch("b", answer(0.25)), batch("a", answer(0.75))]
    answers = read(tmp_path, *lines)
    assert answers.ids == ["b", "a"]
    answers = read(tmp_path, *lines, ids=["a", "b"])
    assert answers.ids == ["a", "b"]
    np.testing.assert_allclose(answers.probabilities[:, 1], [0.75, 0.25])


def test_a_repeated_request_counts_once_it_is_answered(tmp_path):
    failed = batch("a", {"error": "busy"}, status=503)
    first = write(tmp_path / "1.jsonl", failed, batch("b", answer(0.25)))
    second = write(tmp_path / "2.jsonl", batch("a", answer(0.75)))
    answers = read_answers([first, second], NAMES, ids=["a", "b"])
    np.testing.assert_allclose(answers.probabilities[:, 1], [0.75, 0.25])
    assert not answers.failed


def test_requests_without_a_line(tmp_path):
    line = batch("a", answer(0.75))
    with pytest.raises(ValueError, match="'b' has no line"):
        read(tmp_path, line, ids=["b", "a"])
    answers = read(tmp_path, line, ids=["b", "a"], missing="skip")
    assert answers.rows.tolist() == [1]
    assert list(answers.failed) == ["b"]


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([batch("a", answer(0.5))] * 2, {}, "second answer to the request 'a'"),
        ([batch("a", answer(0.5)), answer(0.5)], {}, "only some of the lines"),
        ([batch("c", answer(0.5))], {"ids": ["a"]}, "'c' is not in `ids`"),
        ([answer(0.5)], {"ids": ["a"]}, "None is not in `ids`"),
        ([answer(0.5)], {"ids": ["a", "a"]}, "must be unique"),
        ([batch(3, answer(0.5))], {}, "`custom_id` must be a JSON string"),
        ([{**answer(0.5), "response": {}}], {}, "`choices` and `response`"),
        ([{"choices": answer(0.5)["choices"] * 2}], {}, "ask with n=1"),
        ([[1, 2]], {}, "must be a field of a JSON object"),
        ([answer(0.5)], {"missing": "uniform"}, "missing='uniform'"),
        ([], {}, "files without lines"),
    ],
)
def test_files_that_can_be_read_in_two_ways(
    tmp_path, records, options, message
):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, *records, **options)


def test_two_forms_of_log_probabilities(tmp_path):
    record = answer(0.5)
    record["choices"][0]["logprobs"]["tokens"] = ["yes"]
    with pytest.raises(ValueError, match="`content` and `tokens`"):
        read(tmp_path, record)


def test_a_line_cut_off(tmp_path):
    path = write(tmp_path / "a.jsonl", answer(0.5), answer(0.5))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="line 2 of a.jsonl"):
        read_answers(path, NAMES, missing="skip")


@pytest.mark.parametrize(
    "line", [b"[" * 100_000, b"\xff\xfe{}", b"{", b'{"a": 1} {"b": 2}']
)
def test_lines_that_are_no_json(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line)
    with pytest.raises(ValueError, match="line 1 of a.jsonl"):
        read_answers(path, NAMES)


def test_empty_lines_are_ignored(tmp_path):
    path = write(tmp_path / "a.jsonl", answer(0.25))
    path.write_bytes(b"\n" + path.read_bytes() + b"\n\n")
    assert read_answers(path, NAMES).rows.tolist() == [0]


def paths(value, path=()):
    """All places in a JSON value."""
    yield path
    items = []
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, one in items:
        yield from paths(one, (*path, key))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.floats() | st.text(),
    lambda one: (
        st.lists(one, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                ["token", "logprob", "content", "body", "choices", "error"]
            ),
            one,
            max_size=2,
        )
    ),
    max_leaves=4,
)
WHOLE = {
    "chat": {**batch("a", answer(0.75)), "custom_id": None},
    "completion": completion("yes", ("yes", 0.75, {"yes": 0.75, "no": 0.25})),
    "prompt": {
        "choices": [{"text": "", "prompt_token_ids": [5, 2], "token_ids": []}],
        "prompt_logprobs": [None, {"2": {"logprob": -0.5}}],
    },
}


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(sorted(WHOLE)), JSON)
def test_damaged_responses_give_a_readable_error(
    tmp_path_factory, data, form, new
):
    record = copy.deepcopy(WHOLE[form])
    *path, last = data.draw(st.sampled_from([*paths(record)][1:]))
    holder = record
    for key in path:
        holder = holder[key]
    holder[last] = new
    file = write(tmp_path_factory.getbasetemp() / "damaged.jsonl", record)
    try:
        answers = read_answers(file, NAMES)
        np.testing.assert_allclose(answers.probabilities.sum(), 1)
    except ValueError as error:
        assert "Received" in str(error) or "line 1" in str(error)
    try:
        vocabulary = {"yes": 2, "no": 3}
        found = read_tokens(
            file, top_k=2, sequences=[[5, 2]], tokenizer=vocabulary
        )
        assert found.targets[0].shape == (2, 3, 2)
    except ValueError as error:
        assert "Received" in str(error) or "line 1" in str(error)
