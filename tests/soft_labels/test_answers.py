"""Class probabilities from answers of language models."""

import math
import re

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from responses_of import batch, chat, completion, position, token, write

from keras_ptloss.soft_labels import SoftLabels, read_answers

SETTINGS = settings(max_examples=60, deadline=None)
NO_YES = ["no", "yes"]
YES = position(("yes", 0.6), ("no", 0.2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("answers")


@pytest.fixture(scope="module")
def read(folder):
    """Read records with `read_answers`."""

    def run(*records, class_names=NO_YES, **options):
        path = write(folder / "answers.jsonl", *records)
        return read_answers(path, class_names, **options)

    return run


def share(*probabilities):
    return np.array(probabilities) / sum(probabilities)


# What comes out is what the model's distribution says.


@st.composite
def answered(draw):
    """A distribution over tokens, an answer drawn from it, what is listed."""
    num_classes = draw(st.integers(2, 6))
    classes = draw(st.permutations("ABCDEF"))[:num_classes]
    others = ["a", "The", "\n", " B.", "\ufffd", "é", "AB", "<|end|>"]
    texts = [draw(st.sampled_from(["", " "])) + name for name in classes]
    texts += others[: draw(st.integers(1, len(others)))]
    weights = draw(
        st.lists(st.floats(1e-6, 1), min_size=len(texts), max_size=len(texts))
    )
    p = share(*weights)
    chosen = draw(st.integers(0, num_classes - 1))
    # Distinct, so that the k likeliest are well defined.
    order = np.argsort(-p, kind="stable")
    k = draw(st.integers(1, len(texts)))
    return classes, texts, p, chosen, order[:k].tolist()


def oracle(p, num_classes, chosen, listed):
    """The contract in NumPy: masses of the classes and what is filled in."""
    known = sorted({*listed, chosen})
    left = 1 - p[known].sum()
    absent = [c for c in range(num_classes) if c not in known]
    fill = min(p[listed].min(), left / max(len(absent), 1))
    mass = np.array([fill if c in absent else p[c] for c in range(num_classes)])
    return mass / mass.sum(), 1 - mass.sum()


@SETTINGS
@given(
    answered(),
    st.sampled_from(["chat", "bytes", "completion"]),
    st.sampled_from(["", "Is it A? ", "I say"]),
    st.sampled_from([None, "<|im_end|>"]),
)
def test_probabilities_are_those_of_the_model(
    folder, answered, form, before, end
):
    classes, texts, p, chosen, listed = answered
    text = texts[chosen]
    if before and not before.endswith(" "):
        before += " "
    content = before + text
    if form == "completion":
        top = {texts[i]: p[i] for i in listed}
        lines = [(one, 1.0, {one: 1.0}) for one in [before] if one]
        lines += [(text, p[chosen], top)]
        lines += [(one, 1.0, {one: 1.0}) for one in [end] if one]
        record = completion(content, *lines)
    else:
        with_bytes = form == "bytes"
        own = token(text, p[chosen], text.encode() if with_bytes else None)
        top = [(texts[i], p[i]) for i in listed]
        record = chat(
            *[position((one, 1.0)) for one in [before] if one],
            position(*top, chosen=own, with_bytes=with_bytes),
            *[position((one, 1.0)) for one in [end] if one],
            content=content,
        )
    # All classes must occur in the file: one more answer lists them.
    other = chat(position(*[(name, 1 / len(classes)) for name in classes]))
    path = write(folder / "drawn.jsonl", record, other)
    answers = read_answers(path, classes)
    row, mass = oracle(p, len(classes), chosen, listed)
    np.testing.assert_allclose(answers.probabilities[0], row, atol=1e-9)
    np.testing.assert_allclose(answers.other_mass[0], mass, atol=1e-9)


def test_missing_class_is_no_likelier_than_the_least_listed(read):
    row = position(("d", 0.02), ("a", 0.04), ("b", 0.003), ("none", 0.93))
    all_classes = position(*[(name, 0.25) for name in "abcd"])
    answers = read(chat(row), chat(all_classes), class_names=list("abcd"))
    wanted = share(0.04, 0.003, 0.003, 0.02)
    np.testing.assert_allclose(answers.probabilities[0], wanted)
    np.testing.assert_allclose(answers.other_mass[0], 1 - 0.066)


def test_missing_classes_share_what_is_left(read):
    row = position(("a", 0.97), ("none", 0.02))
    all_classes = position(*[(name, 0.25) for name in "abcd"])
    answers = read(chat(row), chat(all_classes), class_names=list("abcd"))
    third = 0.01 / 3
    wanted = share(0.97, third, third, third)
    np.testing.assert_allclose(answers.probabilities[0], wanted)


def test_spellings_of_a_class_are_added(read):
    row = position(("Yes", 0.5), (" yes", 0.2), ("no", 0.1), ("YES", 0.05))
    spellings = {"no": ["no"], "yes": ["yes", "Yes"]}
    answers = read(chat(row), class_names=spellings)
    np.testing.assert_allclose(answers.probabilities, [share(0.1, 0.7)])
    np.testing.assert_allclose(answers.other_mass, [0.2])


# Where the class stands.


def test_reasoning_before_the_answer_does_not_count(read):
    thoughts = [
        position(("<think>", 1.0)),
        position((" yes", 0.6), (" no", 0.1)),
        position(("</think>", 1.0)),
    ]
    last = position(("no", 0.9), ("yes", 0.05))
    record = chat(*thoughts, last, content="no", reasoning_content=" yes")
    wanted = [share(0.9, 0.05)]
    np.testing.assert_allclose(read(record).probabilities, wanted)
    np.testing.assert_allclose(read(record, after="").probabilities, wanted)


def score_and_reason():
    """A judge's JSON, with digits in the reason before the score."""
    texts = ['{"', "reason", '":"', " 8", " of", " 9", '","', "score", '":']
    score = position(("8", 0.5), ("9", 0.45), ("7", 0.05))
    return chat(
        *[position((text, 1.0)) for text in texts],
        score,
        position(("}", 1.0)),
        content='{"reason":" 8 of 9","score":8}',
    )


def test_first_token_after_a_text(read):
    names = ["7", "8", "9"]
    answers = read(score_and_reason(), class_names=names, after='"score":')
    np.testing.assert_allclose(answers.probabilities, [[0.05, 0.5, 0.45]])


def test_spaces_differ_between_tokens_and_content(read):
    # Tokens of SentencePiece, decoded one by one, lose the space before them.
    texts = [position(("I", 1.0)), position(("say", 1.0))]
    record = chat(*texts, YES, content=" I say yes\n")
    np.testing.assert_allclose(read(record).probabilities, [[0.25, 0.75]])


def test_letters_cut_into_bytes(read):
    data = "\U0001f600".encode()
    cut = [
        {**token("\ufffd", 1.0, part), "top_logprobs": []}
        for part in (data[:2], data[2:])
    ]
    record = chat(*cut, position((" yes", 0.6), (" no", 0.2), with_bytes=True))
    record["choices"][0]["message"]["content"] = "\U0001f600 yes"
    np.testing.assert_allclose(read(record).probabilities, [[0.25, 0.75]])


def prose(*words, content=None):
    """An answer whose tokens are these, each with "no" among the others."""
    positions = [position((word, 0.9), ("no", 0.05)) for word in words]
    return chat(*positions, content=content or "".join(words))


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        (prose("It", " is", " a", " B", "."), {}, "last token is '.'"),
        (prose("4", ".", "1"), {}, "'1', ends a longer word"),
        (prose("-", "1"), {}, "'1', ends a longer word"),
        (prose("1", ".", "5"), {"after": ""}, "'1', begins a longer word"),
        (prose("no", "thing"), {"after": ""}, "'no', begins a longer word"),
        (prose("no", "_way"), {"after": ""}, "'no', begins a longer word"),
        (prose("fav", "or"), {}, "'favor' is more than one token"),
        (prose("fav", "or"), {"after": ""}, "'favor' is more than one token"),
        (prose("1", "0"), {}, "'10' is more than one token"),
        (prose("very", " good"), {}, "'very good' is more than one token"),
        (prose("no"), {"after": "Answer:"}, "not contain 'Answer:'"),
        (prose("A", ":", "A", ":", "no"), {"after": "A:"}, "occurs 2 times"),
        (prose("Answer", ":no"), {"after": "Answer:"}, "inside the token"),
        (prose("Answer:"), {"after": "Answer:"}, "nothing follows"),
        (prose("\u0120yes", content="yes"), {}, "do not spell the content"),
        (prose("token_id:9", content="yes"), {}, "do not spell the content"),
    ],
)
def test_no_class_at_the_stated_position(read, record, options, message):
    names = ["no", "yes", "1", "10", "favor", "good", "very good"]
    with pytest.raises(ValueError, match=message):
        read(record, class_names=names, **options)


PIECES = st.sampled_from(
    ["a", " a", "b", " b", "c", " no", "no", "t", " 1", "1", "0", ".", " ", "-"]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, min_size=1, max_size=5), st.booleans())
def test_only_a_whole_word_is_a_class(folder, pieces, is_first):
    names = ["a", "b", "no", "1", "10", "a b"]
    content = "".join(pieces)
    words = content.split()
    visible = [piece.strip() for piece in pieces if piece.strip()]
    other = chat(position(*[(name, 1 / len(names)) for name in names]))
    other["choices"][0]["message"]["content"] = "a"
    record = chat(*[position((p, 0.7), ("b ", 0.1)) for p in pieces])
    record["choices"][0]["message"]["content"] = content
    path = write(folder / "words.jsonl", other, record)
    if is_first:
        is_class = (
            words != []
            and re.match(r"(a|b|no|1)(?![-.,]?\w)", words[0]) is not None
            and re.match(r"\w+", words[0])[0] == visible[0]
            and not content.strip().startswith("a b")
        )
        word = visible[0] if visible else None
    else:
        word = words[-1] if words else None
        is_class = (
            word in names
            and visible[-1] == word
            and not content.strip().endswith("a b")
        )
    try:
        answers = read_answers(path, names, after="" if is_first else None)
    except ValueError:
        assert not is_class, content
    else:
        assert is_class, content
        assert answers.probabilities[1].argmax() == names.index(word)


# What is refused.


@pytest.mark.parametrize(
    ("record", "message"),
    [
        # A dictionary has the rarer of two tokens of one text.
        (
            completion("yes", ("yes", 0.6, {"yes": 0.05, "no": 0.3})),
            "token_logprobs.*top_logprobs",
        ),
        (
            chat(position(("yes", 0.1), ("no", 0.3), chosen=token("yes", 0.6))),
            "'yes' has the log-probability",
        ),
        (
            chat(position(("yes", 0.6), ("no", 0.2), ("no", 0.1))),
            "two tokens with the text 'no'",
        ),
        # Byte-level pieces, with and without their bytes.
        (
            chat(position(("yes", 0.6), ("\u0120yes", 0.2), ("no", 0.1))),
            "'\u0120yes' .*raw piece",
        ),
        (
            chat(
                {
                    **token("yes", 0.6, b"yes"),
                    "top_logprobs": [
                        token("yes", 0.6, b"yes"),
                        token("no", 0.3, b"yes"),
                    ],
                }
            ),
            "'no' .*contradicts its bytes",
        ),
        # Probabilities in place of their logarithms.
        (
            chat({"token": "yes", "logprob": 0.6, "top_logprobs": []}),
            "'yes' must be a number of at most 0.* 0.6",
        ),
        (chat(position(("yes", 0.9), ("no", 0.9))), "add up to 1.800"),
        (chat({**token("yes", 0.6)}), "`top_logprobs` is empty"),
        (chat({"logprob": -1.0}), "`token` is missing"),
        (chat({"token": "yes"}), "'yes' must be a number.* None"),
        (completion("yes", ("yes", 0.6, {})), "`top_logprobs` is empty"),
        (
            chat(YES, content=[{"type": "text"}]),
            "`content` must be a JSON string",
        ),
    ],
)
def test_contradictions_are_refused(read, record, message):
    with pytest.raises(ValueError, match=message):
        read(record)


def test_echo_is_refused(read):
    record = completion("yes", ("Q", 1.0, {}), ("yes", 0.6, {"yes": 0.6}))
    record["choices"][0]["logprobs"]["token_logprobs"][0] = None
    with pytest.raises(ValueError, match="`echo`"):
        read(record)


def test_one_token_under_two_spellings_counts_once(read):
    both = {"yes": 0.3, "no": 0.2, " yes": 0.3}
    for top in (both, {"yes": 0.3, "no": 0.2}):
        record = completion(" yes", (" yes", 0.3, top))
        np.testing.assert_allclose(read(record).probabilities, [[0.4, 0.6]])


def test_a_repeated_token_counts_once(read):
    record = chat(position(("yes", 0.6), ("no", 0.2), ("yes", 0.6)))
    with pytest.raises(ValueError, match="add up to 1.4"):
        read(chat(position(("yes", 0.6), ("no", 0.2), ("no ", 0.6))))
    np.testing.assert_allclose(read(record).probabilities, [[0.25, 0.75]])


def test_all_classes_must_occur_in_the_file(read):
    digits = chat(position(("9", 0.5), ("1", 0.3), ("8", 0.15)))
    names = ["1", "8", "9", "10"]
    with pytest.raises(ValueError, match=r"\['10'\].*'9', '1', '8'"):
        read(digits, class_names=names)


@pytest.mark.parametrize(
    "names",
    [
        "no",
        ["no"],
        ["no", "no "],
        ["", "no"],
        [0, 1],
        {"no": "no", "yes": "yes"},
        {"no": ["no", "x"], "yes": ["yes", "x"]},
    ],
)
def test_class_names_must_differ(read, names):
    with pytest.raises(ValueError, match="class_names"):
        read(chat(YES), class_names=names)


# Answers that are missing.

FAILURES = [
    ("content_filter", {"choices": [{"finish_reason": "content_filter"}]}),
    ("`logprobs` is null", {"choices": [{"message": {}, "logprobs": None}]}),
    ("refusal", chat(message={}, refusal="I cannot")),
    ("content` is ''", chat(YES, content="")),
    ("content` is None", chat(YES, content=None)),
    ("`choices` is empty", {"choices": []}),
    ("status_code 429", batch(None, {"error": {"code": 7}}, status=429)),
    ("expired", batch(None, None, error={"code": "expired"})),
    ("`response` is null", batch(None, None)),
    ("none of the classes", chat(position(("maybe", 0.5), ("no", 0.4)))),
    (
        "lists none of",
        chat(position(("x", 1.0), chosen=token("yes", 0.0)), content="yes"),
    ),
]


@pytest.mark.parametrize(("reason", "record"), FAILURES)
def test_a_row_without_an_answer(read, reason, record):
    with pytest.raises(ValueError, match=reason):
        read(chat(YES), record)
    with pytest.raises(ValueError, match=reason):
        read(record, missing="skip")  # nothing is left
    answers = read(record, chat(YES), missing="skip")
    np.testing.assert_allclose(answers.probabilities, [[0.25, 0.75]])
    assert answers.rows.tolist() == [1]
    assert list(answers.failed) == [0]
    assert reason in answers.failed[0]


def test_a_contradiction_is_never_skipped(read):
    bad = completion("yes", ("yes", 0.6, {"yes": 0.05, "no": 0.3}))
    with pytest.raises(ValueError, match="line 2 of answers.jsonl"):
        read(chat(YES), bad, missing="skip")


# Real responses.


def test_openai_chat(read):
    # https://platform.openai.com/docs/api-reference/chat/create, "Logprobs";
    # the first two of nine tokens.
    def entry(text, logprob):
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    hello, hi = entry("Hello", -0.31725305), entry("Hi", -1.3190403)
    mark, there = entry("!", -0.02380986), entry(" there", -3.787621)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "Hello!"},
        "logprobs": {
            "content": [
                {**hello, "top_logprobs": [hello, hi]},
                {**mark, "top_logprobs": [mark, there]},
            ]
        },
        "finish_reason": "stop",
    }
    record = {"id": "chatcmpl-123", "object": "chat.completion"}
    answers = read(
        {**record, "choices": [choice]}, class_names=["Hello", "Hi"], after=""
    )
    wanted = share(math.exp(-0.31725305), math.exp(-1.3190403))
    np.testing.assert_allclose(answers.probabilities, [wanted])
    np.testing.assert_allclose(answers.other_mass, [0.00446], atol=1e-5)


def test_vllm_completion(read):
    # vLLM 0.16, https://github.com/ggml-org/llama.cpp/pull/15189
    top = {
        "7": -0.000024199192921514623,
        "3": -11.37502384185791,
        "1": -11.93752384185791,
        "2": -12.37502384185791,
        "9": -14.18752384185791,
    }
    logprobs = {
        "text_offset": [46],
        "token_logprobs": [-0.000024199192921514623],
        "tokens": ["7"],
        "top_logprobs": [top],
    }
    choice = {
        "index": 0,
        "text": "7",
        "logprobs": logprobs,
        "finish_reason": "length",
        "stop_reason": None,
        "prompt_token_ids": None,
        "token_ids": None,
    }
    record = {"id": "cmpl-b1992ed829abc554", "choices": [choice]}
    answers = read(record, class_names=list("12379"))
    wanted = share(*[math.exp(top[name]) for name in "12379"])
    np.testing.assert_allclose(answers.probabilities, [wanted])


def test_llama_cpp_python_chat(read):
    # https://github.com/abetlen/llama-cpp-python/pull/1788, its first token.
    logprobs = {
        "The": -0.008244173601269722,
        "Paris": -5.3227219581604,
        "Sure": -5.770838260650635,
        "Answer": -9.54023265838623,
    }
    top = [
        {"token": text, "logprob": value, "bytes": None}
        for text, value in logprobs.items()
    ]
    record = chat({**top[0], "top_logprobs": top}, content="The")
    answers = read(record, class_names=["Paris", "The"])
    wanted = share(math.exp(-5.3227219581604), math.exp(-0.008244173601269722))
    np.testing.assert_allclose(answers.probabilities, [wanted])


def test_together_gives_no_alternatives(read):
    # https://docs.together.ai/docs/logprobs, the first two of ten tokens.
    logprobs = {"tokens": ["1", "."], "token_logprobs": [-1.0029, -0.07861]}
    choice = {
        "finish_reason": "length",
        "logprobs": logprobs,
        "index": 0,
        "message": {"role": "assistant", "content": "1."},
    }
    with pytest.raises(ValueError, match="`top_logprobs` is empty"):
        read({"choices": [choice]}, class_names=["1", "2"], after="")


def test_lmdeploy_gives_raw_pieces(read):
    # https://github.com/InternLM/lmdeploy/issues/2802
    def entry(text, logprob):
        return {"token": text, "bytes": list(text.encode()), "logprob": logprob}

    top = [entry("Hi", -9.852066040039062), entry("\u0120Hello", -12.1985)]
    item = {**entry("Hello", -0.00005777091791969724), "top_logprobs": top}
    with pytest.raises(ValueError, match="'\u0120Hello' .*raw piece"):
        read(chat(item, content="Hello"), class_names=["Hello", "Hi"])


def test_json_of_other_servers(read):
    gemini = {"candidates": [{"logprobsResult": {"topCandidates": []}}]}
    llama_cpp = {"completion_probabilities": [YES]}
    anthropic = batch("a", {"content": [], "type": "message"})
    wrapped = {"status": "", "response": gemini}
    part = {"choices": [{"delta": {"content": "a"}}]}
    for record, field in [
        (gemini, "candidates"),
        (llama_cpp, "completion_probabilities"),
        (anthropic, "content"),
        (wrapped, "candidates"),
        ({"yes": math.log(0.8), "idx": 0}, "idx"),
        ({"top_logprobs": {"yes": -0.5}}, "top_logprobs"),
    ]:
        with pytest.raises(ValueError, match=f"'{field}'"):
            read(record, missing="skip")
    part["choices"][0]["logprobs"] = {"content": [YES]}
    with pytest.raises(ValueError, match="'delta'"):
        read(part)


# Into a store.


def yes(probability):
    return chat(position(("yes", probability), ("no", 1 - probability)))


def first_last(leaf):
    return leaf[[0, 2]]


@pytest.mark.parametrize(
    "inputs",
    [np.array(["b", "a", "c"]), np.array([2.0, 1.0, 3.0]), {"x": np.eye(3)}],
    ids=["texts", "array", "dictionary"],
)
def test_store_by_inputs(tmp_path, inputs):
    lines = [yes(0.25), {"error": "busy"}, yes(0.75)]
    path = write(tmp_path / "a.jsonl", *lines)
    with pytest.raises(ValueError, match="busy"):
        read_answers(path, NO_YES)
    answers = read_answers(path, NO_YES, missing="skip")
    with pytest.warns(UserWarning, match="1 of 3 answers .* busy"):
        labels = answers.store(tmp_path / "store", inputs=inputs)
    with pytest.raises(ValueError, match="first is at position 1"):
        labels.find(inputs)
    rows = labels.read(
        labels.find(keras.tree.map_structure(first_last, inputs))
    )
    np.testing.assert_allclose(rows, [[0.75, 0.25], [0.25, 0.75]], atol=1e-3)
    again = SoftLabels.open(tmp_path / "store")
    assert again.layout.class_names == ("no", "yes")
    with pytest.warns(UserWarning, match="1 of 3"):  # changes nothing
        answers.store(tmp_path / "store", inputs=inputs)


def test_store_by_custom_id(tmp_path):
    lines = [batch("b", yes(0.25)), batch("a", yes(0.75))]
    path = write(tmp_path / "a.jsonl", *lines)
    labels = read_answers(path, NO_YES).store(None, dtype="float32")
    assert labels.find(ids=["a", "b"]).tolist() == [1, 0]
    inputs = ["text a", "text b"]
    with pytest.raises(ValueError, match="Read them with `ids`"):
        read_answers(path, NO_YES).store(None, inputs=inputs)
    answers = read_answers(path, NO_YES, ids=["a", "b"])
    labels = answers.store(None, inputs=inputs)
    found = labels.read(labels.find(["text b", "text a"]))
    np.testing.assert_allclose(found[:, 1], [0.25, 0.75], atol=1e-3)


def test_store_needs_inputs_or_ids(tmp_path):
    answers = read_answers(write(tmp_path / "a.jsonl", yes(0.25)), NO_YES)
    with pytest.raises(ValueError, match="Pass `inputs`"):
        answers.store(None)
    with pytest.raises(ValueError, match="1 answers for 2 inputs"):
        answers.store(None, inputs=["a", "b"])
