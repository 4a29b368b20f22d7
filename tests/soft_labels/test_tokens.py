"""Log-probabilities of tokens from answers of language models."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from responses_of import batch, chat, completion, position, token, write

from keras_ptloss.soft_labels import read_tokens
from keras_ptloss.soft_labels.tokens import bytes_to_ids

SETTINGS = settings(max_examples=40, deadline=None)
# Byte-level BPE writes a space as U+0120, SentencePiece as U+2581.
BPE = {
    "\u0120": 0,
    "Hi": 1,
    "\u0120yes": 2,
    "\u0120no": 3,
    "<|im_end|>": 4,
    "\u00b4": 5,  # the byte B4
    "\u00c2\u00b4": 6,  # the letter U+00B4
    "\u00ef\u00bf\u00bd": 7,  # the replacement character
}
PIECES = {"\u2581": 0, "Hi": 1, "</s>": 3, "<0xC3>": 5, "yes": 7, "no": 8}
YES = position((" yes", 0.6), (" no", 0.2), with_bytes=True)


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Read records with `read_tokens`; return a dictionary for each token.

    It maps ids to probabilities; the id -1 is all other tokens together.
    """
    folder = tmp_path_factory.mktemp("tokens")

    def run(*records, top_k=2, **options):
        path = write(folder / "answers.jsonl", *records)
        answers = read_tokens(path, top_k=top_k, **options)
        for ids, targets in zip(
            answers.sequences, answers.targets, strict=True
        ):
            assert targets.shape == (len(ids), top_k + 1, 2)
        return [
            [
                {int(i): math.exp(log) for i, log in one if i >= -1}
                for one in targets
            ]
            for targets in answers.targets
        ]

    return run


def close(one, other):
    return one.keys() == other.keys() and all(
        math.isclose(one[key], other[key], abs_tol=1e-5) for key in one
    )


@st.composite
def texts(draw):
    """A vocabulary of bytes, a text of it, and a distribution at each token."""
    words = draw(
        st.lists(
            st.text("aé\u4e2d \U0001f600", min_size=1, max_size=3).map(
                str.encode
            ),
            min_size=4,
            max_size=8,
            unique=True,
        )
    )
    words += [bytes([byte]) for byte in (0xC3, 0xA9, 0xF0)]
    length = draw(st.integers(1, 4))
    ids = st.integers(0, len(words) - 1)
    answer = draw(st.lists(ids, min_size=length, max_size=length))
    p = draw(
        st.lists(
            st.lists(
                st.floats(0.01, 1), min_size=len(words), max_size=len(words)
            ),
            min_size=length,
            max_size=length,
        )
    )
    prompt = draw(st.lists(ids, min_size=1, max_size=3))
    return words, prompt, answer, [np.array(q) / sum(q) for q in p]


def spell_bytes(data):
    """Byte-level BPE by GPT-2's table, written independently."""
    table, extra = {}, 0
    for byte in range(256):
        if chr(byte).isprintable() and byte not in (32, 0xA0, 0xAD):
            table[byte] = chr(byte)
        else:
            table[byte] = chr(256 + extra)
            extra += 1
    return "".join(table[byte] for byte in data)


@SETTINGS
@given(texts(), st.integers(1, 12), st.sampled_from(["bytes", "pieces", "ids"]))
def test_targets_are_those_of_the_model(read, drawn, top_k, form):
    words, prompt, answer, probabilities = drawn

    def item(number, p):
        data = words[number]
        if form == "pieces":
            return token(spell_bytes(data), p)
        text = data.decode(errors="replace")
        if form == "ids":
            return {**token(text, p), "id": number}
        return token(text, p, data)

    items = []
    for own, p in zip(answer, probabilities, strict=True):
        order = np.argsort(-p, kind="stable")[:top_k]
        top = [item(i, p[i]) for i in order.tolist()]
        items.append({**item(own, p[own]), "top_logprobs": top})
    vocabulary = {spell_bytes(word): i for i, word in enumerate(words)}
    # A space must occur for byte-level BPE to be recognised.
    vocabulary.setdefault("\u0120", len(words))
    (targets,) = read(
        chat(*items),
        top_k=top_k,
        sequences=[prompt + answer],
        tokenizer=None if form == "ids" else vocabulary,
    )
    assert targets[: len(prompt) - 1] == [{}] * (len(prompt) - 1)
    assert targets[-1] == {}  # nothing follows the last token
    for found, own, p in zip(
        targets[len(prompt) - 1 : -1], answer, probabilities, strict=True
    ):
        kept = np.argsort(-p, kind="stable")[:top_k].tolist()
        wanted = {i: p[i] for i in kept}
        if len(kept) < top_k:
            wanted.setdefault(own, p[own])
        wanted[-1] = 1 - sum(wanted.values())
        assert close(found, wanted)


# The shapes of responses.


def test_prompt_log_probabilities(read):
    # vLLM's `prompt_logprobs`: the prompt's own token may be one more.
    def one(logprob, rank, text):
        return {"logprob": logprob, "rank": rank, "decoded_token": text}

    listed = [
        None,
        {"2": one(-0.5, 1, "a"), "7": one(-1.5, 2, "b")},
        {
            "9": one(-4.0, 9, "c"),
            "1": one(-0.25, 1, "d"),
            "7": one(-2.0, 2, "b"),
        },
    ]
    record = {"choices": [{"text": "", "prompt_logprobs": listed}]}
    record["choices"][0] |= {"logprobs": None}
    e = math.exp
    wanted = [
        {2: e(-0.5), 7: e(-1.5), -1: 1 - e(-0.5) - e(-1.5)},
        {1: e(-0.25), 7: e(-2.0), -1: 1 - e(-0.25) - e(-2.0)},
        {},
    ]
    chat_record = {"choices": [{"message": {}}], "prompt_logprobs": listed}
    for one_record in (record, chat_record):
        (found,) = read(one_record, sequences=[[5, 2, 9]])
        assert all(map(close, found, wanted))
    with pytest.raises(ValueError, match="no entry for token 3 at position 2"):
        read(chat_record, sequences=[[5, 2, 3]])
    with pytest.raises(ValueError, match="3 for 2 tokens"):
        read(chat_record, sequences=[[5, 2]])
    chat_record["choices"][0]["logprobs"] = {"content": [YES]}
    with pytest.raises(ValueError, match="`prompt_logprobs` and `logprobs`"):
        read(chat_record, sequences=[[5, 2, 9]])


def test_ids_in_the_response(read):
    # vLLM's `return_tokens_as_token_ids`.
    record = chat(position(("token_id:2", 0.6), ("token_id:3", 0.2)))
    (found,) = read(record, sequences=[[1, 2]])
    assert close(found[0], {2: 0.6, 3: 0.2, -1: 0.2})


def test_echo(read):
    # https://github.com/ggml-org/llama.cpp/pull/15189, vLLM 0.16; the first
    # three tokens.
    logprobs = {
        "text_offset": [0, 3, 8],
        "token_logprobs": [None, -8.818763732910156, -1.552642822265625],
        "tokens": ["The", " step", " of"],
        "top_logprobs": [
            None,
            {
                " step": -8.818763732910156,
                " is": -0.7875133752822876,
                " ": -1.9750133752822876,
            },
            {" of": -1.552642822265625, " in": -1.740142822265625},
        ],
    }
    vocabulary = {"The": 4, "\u0120step": 5, "\u0120of": 6, "\u0120": 7}
    vocabulary |= {"\u0120is": 8, "\u0120in": 9}
    record = {"choices": [{"text": "The step of", "logprobs": logprobs}]}
    (found,) = read(record, sequences=[[4, 5, 6]], tokenizer=vocabulary)
    p = [math.exp(-0.7875133752822876), math.exp(-1.9750133752822876)]
    assert close(found[0], {8: p[0], 7: p[1], -1: 1 - sum(p)})
    p = [math.exp(-1.552642822265625), math.exp(-1.740142822265625)]
    assert close(found[1], {6: p[0], 9: p[1], -1: 1 - sum(p)})


def test_openai_completions(read):
    # text-davinci-003's answer in
    # https://github.com/abetlen/llama-cpp-python/issues/2, its first token.
    top = {
        "\n": -0.028534053,
        "\n\n": -5.3414392,
        " (": -6.8118296,
        " in": -4.9322805,
        ":": -5.6061873,
    }
    probabilities = {text: math.exp(value) for text, value in top.items()}
    record = completion("\n", ("\n", probabilities["\n"], probabilities))
    vocabulary = {"\u010a": 1, "\u010a\u010a": 2, "\u0120in": 3, ":": 4}
    options = {"sequences": [[0, 1]], "tokenizer": vocabulary}
    (found,) = read(record, top_k=5, **options)
    p = {
        key: probabilities[text]
        for text, key in {"\n": 1, "\n\n": 2, " in": 3, ":": 4}.items()
    }
    assert close(found[0], {**p, -1: 1 - sum(p.values())})  # " (" is unknown


# Tokens and ids.


def test_raw_pieces_are_not_read_as_their_letters(read):
    # A server gives raw pieces, and their UTF-8 as bytes.
    record = chat(
        position(("\u0120yes", 0.6), ("\u00b4", 0.3), with_bytes=True)
    )
    (found,) = read(record, sequences=[[1, 2]], tokenizer=BPE)
    assert close(found[0], {2: 0.6, 5: 0.3, -1: 0.1})


def test_a_file_of_text_or_of_pieces(read):
    # Nothing in this file tells the letter U+00B4 from the byte B4.
    record = chat(position(("Hi", 0.6), ("\u00b4", 0.3), with_bytes=True))
    with pytest.raises(ValueError, match="text or raw pieces.*\u00b4"):
        read(record, sequences=[[2, 1]], tokenizer=BPE)


def test_replacement_characters_are_unknown(read):
    # vLLM writes part of a letter so, and GPT-2 has a token for it.
    record = chat(position((" yes", 0.6), ("\ufffd", 0.3), with_bytes=True))
    (found,) = read(record, sequences=[[1, 2]], tokenizer=BPE)
    assert close(found[0], {2: 0.6, -1: 0.4})


def test_two_tokens_written_alike(read):
    record = chat(position(("yes", 0.6), ("yes", 0.1), ("no", 0.1)))
    with pytest.raises(ValueError, match="'yes' with two log-probabilities"):
        read(record, sequences=[[1, 7]], tokenizer=PIECES)


def test_bytes_of_sentencepiece():
    found = bytes_to_ids(PIECES)
    assert found == {
        b" ": 0,
        b"Hi": 1,
        b"</s>": 3,
        b"\xc3": 5,
        b"yes": 7,
        b"no": 8,
    }


class HuggingFaceTokenizer:
    def get_vocab(self):
        return dict(BPE)

    def __call__(self, text):
        return {"input_ids": [BPE.get(text, 0)]}


class KerasHubTokenizer:
    def vocabulary_size(self):
        return len(BPE)

    def id_to_token(self, number):
        return list(BPE)[number]


@pytest.mark.parametrize("kind", [HuggingFaceTokenizer, KerasHubTokenizer])
def test_tokenizers(read, kind):
    (found,) = read(chat(YES), sequences=[[1, 2]], tokenizer=kind())
    assert close(found[0], {2: 0.6, 3: 0.2, -1: 0.2})


def test_tokenizers_library(read):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.BPE(vocab=BPE, merges=[])
    (found,) = read(
        chat(YES), sequences=[[1, 2]], tokenizer=tokenizers.Tokenizer(model)
    )
    assert close(found[0], {2: 0.6, 3: 0.2, -1: 0.2})


# Where the answer stands, and what it lacks.


def test_fewer_alternatives(read):
    record = chat(position((" yes", 0.99), with_bytes=True))
    (found,) = read(record, sequences=[[1, 2]], tokenizer=BPE)
    assert close(found[0], {2: 0.99, -1: 0.01})


def test_an_empty_last_token(read):
    end = {"token": "", "logprob": -9999.0, "bytes": [], "top_logprobs": []}
    (found,) = read(chat(YES, end), sequences=[[1, 2]], tokenizer=BPE)
    assert close(found[0], {2: 0.6, 3: 0.2, -1: 0.2})


def test_the_end_of_the_turn(read):
    for tail in ([4], [4, 0]):
        sequence = [1, 2, *tail]
        (found,) = read(chat(YES), sequences=[sequence], tokenizer=BPE)
        assert close(found[0], {2: 0.6, 3: 0.2, -1: 0.2})
        assert found[1:] == [{}] * (1 + len(tail))


def test_the_last_token_more_than_k_are_listed(read):
    own = token(" no", 0.05)
    record = chat(position((" yes", 0.6), ("Hi", 0.2), chosen=own))
    (found,) = read(record, sequences=[[1, 3]], tokenizer=BPE)
    assert close(found[0], {2: 0.6, 1: 0.2, -1: 0.2})


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        (chat(YES), {"sequences": [[1, 3]]}, "must end with its answer"),
        (chat(YES), {"sequences": [[2, 1, 1, 1]]}, "must end with its answer"),
        (chat(YES), {"sequences": [[]]}, "must end with its answer"),
        (chat(YES), {"sequences": [[1, 2]] * 2}, "1 answers for 2 sequences"),
        (chat(YES), {"sequences": [[1, 2]], "top_k": 0}, "`top_k`"),
        (chat(YES), {"tokenizer": None}, "Pass `tokenizer`"),
        (chat(YES), {"tokenizer": BPE.get}, "`tokenizer` must be a dictionary"),
        (chat(YES), {"tokenizer": {"a": 1}}, "No token of the file is in the"),
        (batch("a", chat(YES)), {"sequences": [[1, 2]]}, "with `ids`"),
        (chat(), {"sequences": [[1, 2]], "tokenizer": None}, "has no tokens"),
        (
            chat(position(("\ufffd", 0.6), ("no", 0.3), with_bytes=True)),
            {"sequences": [[1, 9, 3]], "tokenizer": PIECES},
            "no token of the answer is in the",
        ),
    ],
)
def test_refused(read, record, options, message):
    with pytest.raises(ValueError, match=message):
        read(record, **{"tokenizer": BPE, "sequences": [[1, 2]], **options})


def test_answers_of_a_batch_job_are_found_by_id(read):
    records = [batch("b", chat(YES)), batch("a", None)]
    options = {"sequences": [[0, 2], [1, 2]], "ids": ["a", "b"]}
    with pytest.raises(ValueError, match="`response` is null"):
        read(*records, tokenizer=BPE, **options)
    (found,) = read(*records, tokenizer=BPE, missing="skip", **options)
    assert close(found[0], {2: 0.6, 3: 0.2, -1: 0.2})


def test_store(tmp_path):
    path = write(tmp_path / "a.jsonl", chat(YES), {"error": "busy"}, chat(YES))
    sequences = [[1, 0, 2], [1], [0, 2, 4, 0]]
    options = {"top_k": 3, "sequences": sequences, "tokenizer": BPE}
    with pytest.raises(ValueError, match="busy"):
        read_tokens(path, **options)
    answers = read_tokens(path, missing="skip", **options)
    with pytest.warns(UserWarning, match="1 of 3 answers .* busy"):
        labels = answers.store(tmp_path / "store")
    assert labels.find(sequences[::2]).tolist() == [0, 1]
    stored = labels.read([0, 1])
    entry = {int(i): math.exp(p) for i, p in stored[0, 1] if i >= -1}
    assert entry.keys() == {2, 3, -1}
    wanted = {2: 0.6, 3: 0.2, -1: 0.2}
    np.testing.assert_allclose(
        [entry[key] for key in wanted], list(wanted.values()), rtol=2e-3
    )
    np.testing.assert_allclose(stored[1, 0, :, 0], [2, 3, -2, -1])
    assert (stored[0, 0, :, 0] == -2).all()
