"""Texts and teachers for the tests of stored tokens."""

import numpy as np

from keras_ptloss.soft_labels import TokenLabels, TokenLabelSpec

V = 37


def texts(count=12, seed=0, longest=9):
    """Sequences of 1 to `longest` tokens, all different."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, count)
    lengths[0] = longest
    return [
        [number % V, *random.integers(0, V, length - 1).tolist()]
        for number, length in enumerate(lengths)
    ]


class Teacher:
    """Rows that depend on each token and its place; counts what it is asked.

    With `entries`, only so many of the likeliest: of arrays alone, for which
    no backend compiles anything.
    """

    def __init__(self, logits=True, fail_at=None, entries=None):
        self.table = 3 * np.random.default_rng(1).normal(size=(V, V))
        self.logits, self.fail_at, self.asked = logits, fail_at, 0
        self.entries = entries

    def rows(self, ids):
        ids = np.asarray(ids)
        places = np.arange(ids.shape[-1])[..., None] / 10
        return self.table[ids] * (1 + places)

    def __call__(self, x):
        if self.fail_at is not None and self.asked >= self.fail_at:
            raise ConnectionError("no route to teacher")
        ids = x["token_ids"] if isinstance(x, dict) else x
        self.asked += len(ids)
        rows = self.rows(ids)
        if self.entries:
            return top(rows, self.entries)
        return rows if self.logits else softmax(rows)


def softmax(rows):
    rows = np.exp(rows - rows.max(-1, keepdims=True))
    return rows / rows.sum(-1, keepdims=True)


def top(rows, k):
    """An oracle: targets of rows of logits, `(..., k + 1, 2)` float64."""
    p = softmax(np.asarray(rows, "float64"))
    order = np.argsort(-p, axis=-1, kind="stable")
    values = np.take_along_axis(p, order, -1)
    with np.errstate(divide="ignore"):
        tail = np.log(values[..., k:].sum(-1))
    logs = np.concatenate([np.log(values[..., :k]), tail[..., None]], -1)
    ids = np.concatenate(
        [order[..., :k], np.full((*p.shape[:-1], 1), -1)], axis=-1
    )
    return np.stack([ids, logs], axis=-1)


def write(path, teacher=None, dataset=None, k=4, **kwargs):
    options = {
        name: kwargs.pop(name)
        for name in ("vocabulary_size", "teacher_name")
        if name in kwargs
    }
    teacher = teacher or Teacher(entries=k)
    if getattr(teacher, "entries", None):
        options["vocabulary_size"] = V
    spec = TokenLabelSpec(
        top_k=k, from_logits=getattr(teacher, "logits", True), **options
    )
    dataset = texts() if dataset is None else dataset
    kwargs = {"batch_size": 5, "verbose": 0, **kwargs}
    return TokenLabels.write(teacher, dataset, path, spec=spec, **kwargs)
