"""Students of a MiniLM teacher that saw few labels: BERT-tiny on SST-2.

    KERAS_BACKEND=jax python benchmarks/quality/sst2.py

The teacher is logistic regression on MiniLM's sentence vectors. It learned from
300 phrases, two positive for each negative one, and so takes too many phrases
for positive. It labels 2,000 others. The script trains students of 50, 100 and
300 labels, appends them to benchmarks/results/sst2.csv and prints sst2.md
beside it. A stopped run continues where it was; `--report` only prints the
table.
"""

import pathlib

import numpy as np
from sklearn.linear_model import LogisticRegression
from text_students import bert_tiny, main, minilm_vectors

PATH = pathlib.Path("benchmarks/results/sst2.csv")
COUNTS = (50, 100, 300)
ROWS = 2000


def read(path):
    """Return texts and labels of a file."""
    lines = path.read_text().splitlines()[1:]
    labels, texts = zip(*(line.split("\t", 1) for line in lines), strict=True)
    return np.array(texts, dtype=object), np.array(labels, dtype="int64")


def sst2(folder):
    """Return the task by student."""
    texts, labels = read(folder / "sst2" / "train.tsv")
    order = np.random.default_rng(0).permutation(len(texts))
    rows, others = order[:ROWS], order[ROWS:]
    positive = others[labels[others] == 1][:200]
    negative = others[labels[others] == 0][:100]
    taught = np.concatenate([positive, negative])
    vectors = minilm_vectors(np.concatenate([texts[rows], texts[taught]]))
    teacher = LogisticRegression(C=100, max_iter=1000)
    teacher.fit(vectors[ROWS:], labels[taught])
    probs = teacher.predict_proba(vectors[:ROWS])
    task = bert_tiny(
        *(texts[rows], labels[rows], probs),
        *read(folder / "sst2" / "test.tsv"),
        folder=folder,
        epochs=2,
        length=40,
    )
    answers = probs.argmax(axis=1)
    right = np.mean(answers == labels[rows])
    print(
        f"The teacher has {right:.1%} of the rows right, and takes "
        f"{answers.mean():.1%} for positive; {labels[rows].mean():.1%} are."
    )
    return {"BERT-tiny": task}


if __name__ == "__main__":
    main(PATH, "SST-2 with a teacher of few labels", sst2, COUNTS)
