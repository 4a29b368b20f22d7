"""Files to import, written by the tests."""

import json

import numpy as np

from keras_ptloss.soft_labels import SoftLabelSpec, import_soft_labels

NAMES = ("negative", "neutral", "positive")


def run(tmp_path, name, content, *, names=NAMES, n=None, **kwargs):
    tmp_path.mkdir(exist_ok=True)
    source = tmp_path / name
    if isinstance(content, str):
        source.write_text(content, encoding="utf-8")
        n = n or len(content.strip().splitlines()) - name.endswith(".csv")
    elif isinstance(content, bytes):
        source.write_bytes(content)
        n = n or 1
    else:
        np.save(source, content)
        n = n or len(content)
    return import_soft_labels(
        source,
        np.arange(n),
        tmp_path / "out.softlabels",
        spec=SoftLabelSpec(class_names=names, dtype="float32"),
        **kwargs,
    )


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def top(**probabilities):
    """Top log-probabilities from probabilities."""
    return top_of(probabilities)


def top_of(probabilities):
    return [
        {"token": token, "logprob": float(np.log(p))}
        for token, p in probabilities.items()
    ]
