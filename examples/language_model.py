"""Distil the answers of a language model into a small text classifier.

The task is to tell which part of Python's standard library a sentence is about.
A language model answers with a letter, and its server lists the probabilities
of the most likely letters. We correct the teacher's probabilities using 100
labels, then distil a student from the corrected probabilities.

    pip install 'keras_ptloss[examples]'
    python examples/language_model.py
    python examples/language_model.py --quick   # fewer sentences

The script writes requests.jsonl in the format of OpenAI's batch API. To use
your own model, let it answer these requests and run the script again:

    vllm run-batch -i requests.jsonl -o answers.jsonl --model MODEL

Without answers.jsonl, the script simulates a model that prefers one topic.
"""

import json
import pathlib
import pydoc
import re
import sys

import keras
import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from keras_ptloss import distillation_targets
from keras_ptloss.soft_labels import read_answers

# --- Setup ---

QUICK = "--quick" in sys.argv
PER_TOPIC, NUM_LABELS = (300, 100) if QUICK else (600, 100)
ANSWERS = pathlib.Path("answers.jsonl")
TOPICS = {
    "files": "shutil pathlib tempfile zipfile tarfile fileinput io",
    "network": "http.client http.server urllib.request socket ssl ftplib "
    "imaplib http.cookiejar socketserver",
    "numbers": "math decimal fractions statistics random datetime calendar",
    "code": "ast dis inspect pdb unittest doctest symtable traceback typing",
}
LETTERS = "ABCD"
QUESTION = (
    "Which part of Python's standard library is the sentence about? Answer "
    "with one letter: A for files, B for network, C for numbers, D for code. "
    "Sentence: "
)
rng = np.random.default_rng(0)

# --- Data ---


def sentences(modules):
    """Return the sentences in the documentation of some modules."""
    pages = [pydoc.plain(pydoc.render_doc(name)) for name in modules.split()]
    text = " ".join(" ".join(pages).replace("|", " ").split())
    return sorted(set(re.findall(r"[A-Z][^.>=\[\]`]{30,160}\.", text)))


texts, true_labels = [], []
for topic, modules in enumerate(TOPICS.values()):
    texts += rng.permutation(sentences(modules))[:PER_TOPIC].tolist()
    true_labels += [topic] * (len(texts) - len(true_labels))
order = rng.permutation(len(texts))
texts, true_labels = np.array(texts)[order], np.array(true_labels)[order]
train, test, other = np.array_split(np.arange(len(texts)), 3)

# --- Ask ---

print(f"Writing {len(train)} requests to requests.jsonl")
with open("requests.jsonl", "w") as file:
    for number, text in enumerate(texts[train]):
        body = {
            "model": "my-model",
            "messages": [{"role": "user", "content": QUESTION + text}],
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": 20,
        }
        request = {"method": "POST", "url": "/v1/chat/completions"}
        request |= {"custom_id": str(number), "body": body}
        print(json.dumps(request), file=file)

# --- Without answers, simulate a model that prefers A to D ---

if not ANSWERS.exists():
    print("There is no answers.jsonl, so a simulated model answers")
    ANSWERS = pathlib.Path("simulated.jsonl")
    model = make_pipeline(TfidfVectorizer(), LogisticRegression(C=10.0))
    model.fit(texts[other], true_labels[other])
    scores = model.decision_function(texts[train]) + [2.0, 0.0, 0.0, -1.0]
    scores -= np.logaddexp.reduce(scores, axis=1, keepdims=True)
    with open(ANSWERS, "w") as file:
        for number, row in enumerate(scores.tolist()):
            pairs = sorted(zip(row, LETTERS, strict=True), reverse=True)
            top = [{"token": letter, "logprob": p} for p, letter in pairs]
            token = top[0] | {"top_logprobs": top}
            choice = {
                "message": {"content": token["token"]},
                "logprobs": {"content": [token]},
            }
            response = {"status_code": 200, "body": {"choices": [choice]}}
            line = {"custom_id": str(number), "response": response}
            print(json.dumps(line), file=file)

# --- Correct ---

ids = [str(number) for number in range(len(train))]
teacher = read_answers(ANSWERS, list(LETTERS), ids=ids, missing="skip")
print(f"Mean probability of other tokens: {teacher.other_mass.mean():.3f}")
train = train[teacher.rows]  # the sentences whose answer is a letter
labels = np.full(len(train), -1)  # -1: the label is unknown
labels[:NUM_LABELS] = true_labels[train][:NUM_LABELS]
vectorizer = TfidfVectorizer(min_df=2, sublinear_tf=True).fit(texts[train])
x, x_test = (vectorizer.transform(texts[i]).toarray() for i in (train, test))
targets = distillation_targets(
    teacher.probabilities,
    labels,
    x=x,
    build_model=lambda: LogisticRegression(C=10.0),
    class_names=list(TOPICS),
)
targets.summary()

# --- Distil and compare ---


def test_accuracy(values, sample_weight=None):
    """Train a student and return its accuracy on the test sentences."""
    keras.utils.set_random_seed(1)
    student = keras.Sequential(
        [keras.Input((x.shape[1],)), keras.layers.Dense(4, "softmax")]
    )
    student.compile(keras.optimizers.Adam(0.01), "categorical_crossentropy")
    student.fit(x, values, sample_weight=sample_weight, epochs=20, verbose=0)
    predicted = student.predict(x_test, verbose=0).argmax(axis=1)
    return 100 * np.mean(predicted == true_labels[test])


few = LogisticRegression(C=10.0).fit(x[:NUM_LABELS], labels[:NUM_LABELS])
alone = 100 * few.score(x_test, true_labels[test])
plain = test_accuracy(teacher.probabilities)
ours = test_accuracy(targets.values, targets.sample_weight)
print(f"labels alone                     {alone:.1f} %")
print(f"student of the answers           {plain:.1f} %")
print(f"student of distillation_targets  {ours:.1f} %")
