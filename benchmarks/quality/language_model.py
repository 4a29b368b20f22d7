"""Students of a language model: BERT-tiny and MiniLM on TREC.

    KERAS_BACKEND=jax python benchmarks/quality/language_model.py

The teacher is SmolLM2-135M-Instruct, whose probabilities of the six class names
are in `--data`, on 2,650 questions. The script trains the students of 100 and
300 labels, appends them to benchmarks/results/language_model.csv and prints
language_model.md beside it. A stopped run continues where it was; `--report`
only prints the table.
"""

import pathlib

import numpy as np
from text_students import bert_tiny, frozen_minilm, main

PATH = pathlib.Path("benchmarks/results/language_model.csv")
COUNTS = (100, 300)


def trec(folder):
    """Return the tasks by student."""
    data = np.load(folder / "trec_smollm2" / "trec.npz")
    new = ~np.isin(data["test_texts"], data["texts"])
    teacher = data["probs"].astype("float64")
    teacher /= teacher.sum(axis=1, keepdims=True)
    labels = data["labels"].astype("int64")
    train = data["texts"], labels, teacher
    test = data["test_texts"][new], data["test_labels"][new]
    return {
        "MiniLM, frozen": frozen_minilm(*train, *test),
        "BERT-tiny": bert_tiny(
            *train, *test, folder=folder, epochs=3, length=24
        ),
    }


if __name__ == "__main__":
    main(PATH, "Students of a language model", trec, COUNTS)
