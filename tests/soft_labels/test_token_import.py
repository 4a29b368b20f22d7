"""Import of tokens from the files of servers and of other tools."""

import json

import helpers
import numpy as np
import pytest
from token_stores import Teacher, V, softmax, texts, top

from keras_ptloss.soft_labels import TokenLabelSpec, import_token_labels

pytestmark = helpers.slow_but_on_one()

HALF = 2.0**-11


def run(tmp_path, lines, *, k=2, size=V, format="vllm", **options):
    source = tmp_path / "answers.jsonl"
    if not isinstance(lines, str):
        lines = "\n".join(json.dumps(line) for line in lines)
    source.write_text(lines, encoding="utf-8")
    return import_token_labels(
        source,
        tmp_path / "store",
        spec=TokenLabelSpec(top_k=k, vocabulary_size=size),
        format=format,
        **options,
    )


def check(labels, row, tokens, first=0, k=2, atol=1e-4):
    """The stored targets are those of the teacher's rows, from `first` on."""
    expected = top(Teacher().rows(tokens), k)[first:-1]
    found = labels[row]
    assert (found[:first, :, 0] == -2).all() and (found[-1, :, 0] == -2).all()
    found = found[first:-1]
    np.testing.assert_array_equal(found[..., 0], expected[..., 0])
    np.testing.assert_allclose(
        found[..., 1], expected[..., 1], rtol=1.1 * HALF, atol=atol
    )


def prompt_logprobs(tokens, k):
    """vLLM's: null, then the k likeliest and the prompt's own token."""
    logs = np.log(softmax(Teacher().rows(tokens)))
    lists = [None]
    for place, own in enumerate(tokens[1:]):
        order = np.argsort(-logs[place])
        chosen = dict.fromkeys([own, *order[:k].tolist()])
        lists.append(
            {
                str(token): {
                    "logprob": logs[place, token],
                    "rank": int(np.flatnonzero(order == token)[0]) + 1,
                    "decoded_token": f"<{token}>",
                }
                for token in chosen
            }
        )
    return lists


def vllm(tokens, k=2):
    return {
        "prompt_token_ids": tokens,
        "prompt_logprobs": prompt_logprobs(tokens, k),
    }


LONG = [text for text in texts() if len(text) > 1]


@pytest.mark.parametrize("form", ["dump", "completion", "chat", "batch"])
def test_vllm(tmp_path, form):
    lines = [vllm(tokens) for tokens in LONG]
    if form == "completion":
        lines = [{"choices": [{"index": 0, "text": "", **r}]} for r in lines]
    elif form == "chat":
        lines = [{"choices": [{"index": 0}], **r} for r in lines]
    elif form == "batch":
        lines = [
            {
                "custom_id": str(n),
                "response": {"status_code": 200, "body": {"choices": [r]}},
            }
            for n, r in enumerate(lines)
        ]
    report = run(tmp_path, lines)
    for row, tokens in enumerate(LONG):
        check(report.labels, row, tokens)
    assert report.padded == report.foreign == report.duplicates == 0
    _, y_true, weight = report.labels.attach(LONG, batch_size=20)[0]
    assert weight.sum() == sum(len(t) - 1 for t in LONG)
    assert (y_true[weight == 0][..., 0] == -2).all()


def test_vllm_without_ids_of_its_tokens(tmp_path):
    """Lines are of the data set's sequences in order, or by their names."""
    lines = [prompt_logprobs(tokens, 3) for tokens in LONG]
    report = run(tmp_path, lines, dataset=LONG)
    check(report.labels, 3, LONG[3])
    order = [2, 0, 1]
    named = [
        {
            "custom_id": f"text {row}",
            "response": {
                "status_code": 200,
                "body": {"choices": [{"prompt_logprobs": lines[row]}]},
            },
        }
        for row in order
    ]
    named.append({"custom_id": "text 3", "response": None, "error": "late"})
    names = [f"text {row}" for row in range(4)]
    (tmp_path / "named").mkdir()
    report = run(tmp_path / "named", named, dataset=LONG[:4], ids=names)
    assert report.failed == ("text 3",) and report.missing == (3,)
    for row, number in enumerate(order):
        check(report.labels, row, LONG[number])
    (tmp_path / "no").mkdir()
    with pytest.raises(ValueError, match="`ids` must be given.*'text 2' on"):
        run(tmp_path / "no", named, dataset=LONG[:4])
    with pytest.raises(ValueError, match="custom_id 'text 2', which is not am"):
        run(tmp_path / "no", named, dataset=LONG[:1], ids=["text 0"])
    with pytest.raises(ValueError, match="4 different ids, one a sequence"):
        run(tmp_path / "no", named, dataset=LONG[:4], ids=["text 0"] * 4)
    with pytest.raises(ValueError, match="`ids` must be None without `data"):
        run(tmp_path / "no", named, ids=names)


def test_missing_foreign_and_twice(tmp_path):
    lines = [vllm(tokens) for tokens in [*LONG[:3], LONG[0]]]
    report = run(tmp_path, lines, dataset=[LONG[4], LONG[2]])
    assert report.missing == (0,)
    assert report.foreign == 3 and report.duplicates == 1


def changed(change, tokens=(5, 6, 7)):
    record = vllm(list(tokens))
    change(record)
    return [vllm([1, 2]), record]


def drop(record):
    entries = record["prompt_logprobs"][2]
    for key in [key for key, value in entries.items() if value["rank"] == 2]:
        del entries[key]


def put(place, key, value):
    def change(record):
        record["prompt_logprobs"][place][key] = {"logprob": value, "rank": 1}

    return change


def tokens_of(tokens):
    return lambda record: record.update(prompt_token_ids=tokens)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            drop,
            "line 2 of .* has 1 of the 2 likeliest tokens at position 2",
        ),
        (
            put(1, "37", -1.0),
            "line 2 .*id 37, and vocabulary_size is 37, of",
        ),
        (put(1, "x", -1.0), "has the token 'x', not an id"),
        (put(1, "36", 0.5), "log-probability of 0.5, above 0, of token 0"),
        (put(2, "36", float("nan")), "line 2 .*has nan, not a number"),
        (put(1, "36", -0.001), "line 2 .*add up to"),
        (tokens_of([5, 6, 7, 8]), "has 3 tokens where its sequence has 4"),
        (tokens_of([5, 6, 30]), "no log-probability of the token 30, which st"),
        (tokens_of("567"), "has prompt_token_ids that are no list of integers"),
        (tokens_of(None), "has no `prompt_token_ids`: pass the sequences"),
        (lambda r: r.update(prompt_logprobs=None), "no list `prompt_logprobs`"),
        (lambda r: r["prompt_logprobs"].pop(0), "of its first token, which no"),
        (
            lambda r: r["prompt_logprobs"].__setitem__(2, None),
            "line 2 .*has None at position 2, no tokens",
        ),
    ],
)
def test_lines_of_vllm_that_are_refused(tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        run(tmp_path, changed(change))
    # Nothing stays in the way of the corrected file.
    run(tmp_path, [vllm([1, 2])])


@pytest.mark.parametrize(
    ("lines", "options", "match"),
    [
        ("[1, ", {}, "line 1 of .* is no JSON in UTF-8"),
        ("", {}, "`source` must be a file with at least one answer"),
        ([vllm([1, 2])], {"format": "hf"}, "`format` must be one of 'distillk"),
        ([vllm([1, 2])], {"tokenizer": {}}, "`tokenizer` must be given with f"),
        ([vllm([1, 2])], {"format": "openai"}, "`tokenizer` must be given wi"),
        ([vllm([1, 2])], {"size": None}, "`vocabulary_size` must be given in"),
        ([vllm([1, 2])], {"format": "distillkit"}, "must be Parquet files"),
        (
            [prompt_logprobs([1, 2], 2)] * 2,
            {"dataset": [[1, 2]]},
            "line 2 .*one more than the 1 sequences",
        ),
    ],
)
def test_imports_that_are_refused(tmp_path, lines, options, match):
    with pytest.raises(ValueError, match=match):
        run(tmp_path, lines, **options)


def test_an_import_does_not_resume(tmp_path):
    run(tmp_path, [vllm([1, 2])])
    with pytest.raises(ValueError, match="`path` must be a new directory"):
        run(tmp_path, [vllm([1, 2])])


# A byte-level vocabulary: the characters of GPT-2's, a space being U+0120.
WORDS = ["<|end|>", "the", "\u0120the", "\u0120", "\u010a", "\u00c3\u00a9"]
WORDS += [f"w{n}" for n in range(len(WORDS), V)]
SHOWN = ["<|end|>", "the", " the", " ", "\n", "é", *WORDS[6:]]


def chat(tokens, k=3, unknown=(), shown=SHOWN):
    """A chat completion that says the tokens from the third on."""
    logs = np.log(softmax(Teacher().rows(tokens)))
    content = []
    for place, own in list(enumerate(tokens[1:]))[1:]:
        items = [
            {
                "token": "??" if token in unknown else shown[token],
                "logprob": logs[place, token],
                "bytes": None
                if token in unknown
                else list(shown[token].encode()),
            }
            for token in [own, *np.argsort(-logs[place])[:k].tolist()]
        ]
        content.append({**items[0], "top_logprobs": items[1:]})
    return {"choices": [{"index": 0, "logprobs": {"content": content}}]}


class Tokenizer:
    """As KerasHub's: raises for what it does not know."""

    def token_to_id(self, token):
        return WORDS.index(token)

    def id_to_token(self, index):
        return WORDS[index]


@pytest.mark.parametrize(
    "tokenizer",
    [
        Tokenizer(),
        {word: index for index, word in enumerate(WORDS)},
        lambda text: SHOWN.index(text),
    ],
)
def test_openai(tmp_path, tokenizer):
    rows = [tokens for tokens in LONG if len(tokens) > 3]
    # What ends an answer is in the sequence, and not in the answer.
    ended = [[*tokens, 0] for tokens in rows]
    lines = [chat(tokens) for tokens in rows]
    report = run(
        tmp_path, lines, k=3, format="openai", dataset=ended,
        tokenizer=tokenizer,
    )  # fmt: skip
    assert report.unknown == () and report.padded == 0
    assert report.missing == () and report.foreign == 0
    for row, tokens in enumerate(rows):
        found = report.labels[row]
        assert (found[len(tokens) - 1 :, :, 0] == -2).all()
        expected = top(Teacher().rows(tokens), 3)[1:-1]
        np.testing.assert_array_equal(
            found[1 : len(tokens) - 1, :, 0], expected[..., 0]
        )
        np.testing.assert_allclose(
            found[1 : len(tokens) - 1, :, 1],
            expected[..., 1],
            rtol=1.1 * HALF,
            atol=1e-4,
        )


def test_openai_with_tokens_that_are_unknown(tmp_path):
    tokens = [1, 2, 3, 4]
    order = np.argsort(-Teacher().rows(tokens)[1])
    first = int(order[0])
    assert first not in tokens
    line = chat(tokens, k=2, unknown={first})
    report = run(
        tmp_path, [line], format="openai", dataset=[tokens],
        tokenizer=Tokenizer(),
    )  # fmt: skip
    ((name, count),) = report.unknown
    assert name == "??" and count >= 1
    p = softmax(Teacher().rows(tokens))
    ids, logs = np.moveaxis(report.labels[0][1], -1, 0)
    # The token that came is known too, and fills the place.
    assert ids.tolist() == [order[1], 3, -1]
    expected = 1 - p[1, order[1]] - p[1, 3]
    assert np.exp(logs[-1]) == pytest.approx(expected, rel=2e-3)
    assert report.unknown_mass >= p[1, first] / 2 * 0.99


def test_openai_with_ids_of_the_server(tmp_path):
    """vLLM's `return_token_ids` and `return_tokens_as_token_ids`."""
    tokens = [1, 2, 30, 4]
    line = chat(tokens, shown=[f"token_id:{n}" for n in range(V)])
    line["prompt_token_ids"] = [1, 2]
    report = run(tmp_path, [line], format="openai", tokenizer={})
    check(report.labels, 0, tokens, first=1)


def test_openai_of_a_sentencepiece_vocabulary(tmp_path):
    words = ["<s>", "\u2581the", "\u2581", "<0x0A>", "cat"]
    words += [f"w{n}" for n in range(5, V)]
    shown = ["<s>", " the", " ", "\n", *words[4:]]
    tokens = [0, 4, 1, 3, 2]
    report = run(
        tmp_path,
        [chat(tokens, shown=shown)],
        format="openai",
        dataset=[tokens],
        tokenizer={word: index for index, word in enumerate(words)},
    )
    check(report.labels, 0, tokens, first=1)
    assert report.unknown == ()


@pytest.mark.parametrize(
    ("change", "options", "match"),
    [
        (lambda c: c.clear(), {}, "no `choices.0..logprobs.content` .ask for"),
        (
            lambda c: c[1]["top_logprobs"].pop(),
            {},
            "2 tokens in `top_logprobs`",
        ),
        (lambda c: c[1].pop("logprob"), {}, "has None, not a number"),
        (lambda c: c[1].update(token=3), {}, "at its token 1, no token"),
        (lambda c: c[1].update(bytes="x"), {}, "has the bytes 'x' of"),
        (
            lambda c: None,
            {"dataset": [[9, 9, 9, 9]]},
            r"says 2 tokens, \[3 4\], which do not occur .* another tokenizer",
        ),
        (lambda c: None, {"tokenizer": 3}, "`tokenizer` must be a tokenizer"),
    ],
)
def test_lines_of_openai_that_are_refused(tmp_path, change, options, match):
    line = chat([1, 2, 3, 4])
    change(line["choices"][0]["logprobs"]["content"])
    options = {"dataset": [[1, 2, 3, 4]], "tokenizer": Tokenizer(), **options}
    with pytest.raises(ValueError, match=match):
        run(tmp_path, [line], k=3, format="openai", **options)


@pytest.mark.slow  # to import
def test_a_tokenizer_of_kerashub(tmp_path):
    keras_hub = pytest.importorskip("keras_hub")
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = keras_hub.tokenizers.BytePairTokenizer(
        vocabulary=vocabulary,
        merges=["\u0120 the"],
        unsplittable_tokens=["<|end|>"],
    )
    tokens = [5, 1, 2, 3, 4]
    report = run(
        tmp_path, [chat(tokens, unknown=())], format="openai",
        dataset=[tokens], tokenizer=tokenizer,
    )  # fmt: skip
    check(report.labels, 0, tokens, first=1)
