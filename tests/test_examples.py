"""The examples run, in their small settings, on data made here."""

import pathlib
import runpy
import sys

import keras
import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"

pytestmark = [
    pytest.mark.ci,
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="once is enough"
    ),
]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Return a function that runs an example; it returns what was printed."""
    monkeypatch.chdir(tmp_path)

    def run(name):
        monkeypatch.setattr(sys, "argv", [name, "--quick"])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def accuracies(printed):
    """Return the numbers of lines that end in a percentage."""
    ends = (line.split()[-2:] for line in printed.splitlines())
    return [float(end[0]) for end in ends if len(end) == 2 and end[1] == "%"]


def test_serve_student(run):
    pytest.importorskip("tensorflow_serving")
    printed = run("serve_student.py")
    difference = float(printed.split("at most ")[1].split()[0])
    assert difference < 1e-5


def test_images_cifar100(run, monkeypatch):
    rng = np.random.default_rng(0)

    def load_data():
        images = rng.integers(0, 256, (3200, 32, 32, 3), "uint8")
        labels = rng.integers(0, 100, (3200, 1))
        return (images[:3000], labels[:3000]), (images[3000:], labels[3000:])

    monkeypatch.setattr(keras.datasets.cifar100, "load_data", load_data)
    assert len(accuracies(run("images_cifar100.py"))) >= 2


def test_language_model(run):
    pytest.importorskip("pyarrow")
    alone, plain, ours = accuracies(run("language_model.py"))
    assert ours > max(alone, plain)


def test_text_sst2(run, monkeypatch):
    keras_hub = pytest.importorskip("keras_hub")
    tfds = pytest.importorskip("tensorflow_datasets")
    tf = pytest.importorskip("tensorflow")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "a"]
    rng = np.random.default_rng(0)

    def sentences(count):
        labels = rng.integers(0, 2, count)
        texts = [
            " ".join(rng.permutation(["a", "bad" if y == 0 else "good", "a"]))
            + f" a{i}"
            for i, y in enumerate(labels)
        ]
        return {"sentence": tf.constant(texts), "label": tf.constant(labels)}

    def load(name, split, batch_size):
        assert (name, batch_size) == ("glue/sst2", -1)
        return [sentences(1000), sentences(50)]

    def from_preset(preset, **options):
        tokenizer = keras_hub.models.BertTokenizer(
            vocabulary=words, lowercase=True
        )
        return keras_hub.models.BertTextClassifier(
            keras_hub.models.BertBackbone(len(words), 1, 2, 8, 16),
            preprocessor=keras_hub.models.BertTextClassifierPreprocessor(
                tokenizer, sequence_length=8
            ),
            **options,
        )

    monkeypatch.setattr(tfds, "load", load)
    monkeypatch.setattr(
        keras_hub.models.BertTextClassifier, "from_preset", from_preset
    )
    assert len(accuracies(run("text_sst2.py"))) >= 2
