"""Distil a text classifier: SST-2, MNLI, BoolQ or ANLI, by KerasHub models.

A tenth of the training set, with labels, trains the teacher. From the rest come
1,000 examples with labels for the search (a tenth of BoolQ has no more, and on
what it was trained on a teacher looks better than it is); on what is left the
teacher labels, and the student never sees a true label.

    python examples/text_bert.py --task sst2 --teacher bert_base_en_uncased \
        --student bert_tiny_en_uncased

Teacher and student are any KerasHub preset, or a directory: a saved preset, or
a Hugging Face model with its safetensors. What the teacher said is stored in
the output directory, and used again by the next run. With `--teacher-probs
FILE` there is no teacher, only its probabilities: an `.npy` array, or an `.npz`
file with one array, a row for each training example in their order.

Texts come from TensorFlow Datasets, or from `--data DIRECTORY` with `train.tsv`
and `test.tsv` (for MNLI `test_matched.tsv` and `test_mismatched.tsv`): a label,
which is a number, then the text, or two texts, separated by tabs; a header is
passed over. The tests of SST-2, MNLI and BoolQ have no public labels, so their
validation sets are the tests here, as in papers.
"""

import argparse
import dataclasses
import functools
import math
import pathlib

import keras
import keras_hub
import numpy as np
from sklearn.model_selection import train_test_split

from keras_ptloss import ProxyTeacherSearch, PTLoss, SoftLabels
from keras_ptloss.search import RandomSearch
from keras_ptloss.soft_labels import SoftLabelSpec

BATCH = 32


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a task is in TensorFlow Datasets, and of what form it is."""

    name: str
    texts: tuple[str, ...]
    classes: int
    sequence_length: int
    tests: dict[str, str] = dataclasses.field(
        default_factory=lambda: {"test": "validation"}
    )


NLI = functools.partial(
    Source, texts=("context", "hypothesis"), classes=3, sequence_length=256
)
TASKS = {
    "sst2": Source("glue/sst2", ("sentence",), 2, 64),
    "mnli": Source(
        "glue/mnli",
        ("premise", "hypothesis"),
        3,
        128,
        {
            "test_matched": "validation_matched",
            "test_mismatched": "validation_mismatched",
        },
    ),
    "boolq": Source("super_glue/boolq", ("question", "passage"), 2, 256),
    "anli_r1": NLI("anli/r1", tests={"test": "test"}),
    "anli_r2": NLI("anli/r2", tests={"test": "test"}),
    "anli_r3": NLI("anli/r3", tests={"test": "test"}),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A task's examples.

    Attributes:
        classes: number of classes.
        splits: for `"train"` and each test set the texts and labels `(N,)`. The
            name of a test set begins with `"test"`. Texts are a list, or for
            tasks on pairs a tuple of two lists.
    """

    classes: int
    splits: dict[str, tuple]


def load_task(name, data=None, subset=None):
    """Load a task.

    Args:
        name: a key of `TASKS`.
        data: directory with the task's TSV files; None takes TensorFlow
            Datasets, which downloads it.
        subset: number of training examples, the first ones; None for all.

    Returns:
        A `Task`.

    Raises:
        ValueError: if there is no such task, or a file is not of this form.
        FileNotFoundError: if a file is missing.
    """
    if name not in TASKS:
        raise ValueError(
            f"`name` must be one of {sorted(TASKS)}. Received: name={name!r}"
        )
    source = TASKS[name]
    splits = {}
    for split, stored in {"train": "train", **source.tests}.items():
        if data is None:
            rows = _from_tfds(source, stored)
        else:
            rows = _from_tsv(source, pathlib.Path(data) / f"{split}.tsv")
        rows = rows[: subset if split == "train" else None]
        *columns, labels = map(list, zip(*rows, strict=True))
        texts = columns[0] if len(columns) == 1 else tuple(columns)
        splits[split] = texts, np.array(labels)
    return Task(source.classes, splits)


def _from_tfds(source, split):
    # Imported here: it takes seconds, and local files do without it.
    import tensorflow_datasets as tfds

    return [
        (*(row[key].decode() for key in source.texts), int(row["label"]))
        for row in tfds.as_numpy(tfds.load(source.name, split=split))
    ]


def _from_tsv(source, path):
    rows = []
    with open(path, encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            label, *texts = line.rstrip("\r\n").split("\t")
            if number == 1 and not label.isdecimal():
                continue  # a header
            if (
                len(texts) != len(source.texts)
                or not label.isdecimal()
                or int(label) >= source.classes
            ):
                raise ValueError(
                    "`data` must have lines of a label below "
                    f"{source.classes} and {len(source.texts)} texts, "
                    f"separated by tabs. Received: {line!r} in line {number} "
                    f"of {path}"
                )
            rows.append((*texts, int(label)))
    if not rows:
        raise ValueError(f"`data` must have examples. Received: none in {path}")
    return rows


def load_probabilities(path, count, classes):
    """Load a teacher's probabilities of the first `count` training examples.

    Args:
        path: an `.npy` file, or an `.npz` file with one array.
        count: number of training examples in use.
        classes: number of classes.

    Returns:
        float32 rows `(count, classes)`.

    Raises:
        ValueError: if the file is not of this form.
    """
    loaded = np.load(path)
    if isinstance(loaded, np.lib.npyio.NpzFile):
        if len(loaded) != 1:
            raise ValueError(
                "`--teacher-probs` must be a file with one array. Received: "
                f"{str(path)!r} with {list(loaded)}"
            )
        (loaded,) = loaded.values()
    if loaded.ndim != 2 or loaded.shape[1] != classes or len(loaded) < count:
        raise ValueError(
            f"`--teacher-probs` must have a row of {classes} probabilities for "
            f"each of {count} training examples. Received: {str(path)!r} of "
            f"shape {loaded.shape}"
        )
    return loaded[:count].astype("float32")


def make_classifier(preset, classes, *, sequence_length):
    """Build a classifier from a pretrained encoder.

    Args:
        preset: name of a KerasHub preset, or path of a directory with one or
            with a Hugging Face model.
        classes: number of classes.
        sequence_length: number of tokens to which texts are cut or filled.

    Returns:
        The model, from tokens to logits, and a function from texts (a list, or
        a tuple of two) to the tokens, a dict of integer arrays. So texts are
        tokenised once, and not in every epoch.
    """
    classifier = keras_hub.models.TextClassifier.from_preset(
        str(preset),
        num_classes=classes,
        preprocessor=None,
        dtype=keras.config.dtype_policy(),
    )
    preprocessor = keras_hub.models.TextClassifierPreprocessor.from_preset(
        str(preset), sequence_length=sequence_length
    )

    # A plain model: KerasHub's own does not shuffle arrays in `fit`, and adds
    # an accuracy that expects integer labels.
    model = keras.Model(classifier.input, classifier.output)

    def tokenise(texts):
        # Without `y`, KerasHub takes the second of two texts for the labels.
        tokens = preprocessor(texts, y=None)
        return {key: np.asarray(t, "int32") for key, t in tokens.items()}

    return model, tokenise


def train(model, tokens, targets, *, loss, epochs, rate):
    """Train by AdamW; the rate rises for a tenth of the steps, then falls."""
    steps = epochs * math.ceil(len(targets) / BATCH)
    warmup = steps // 10
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, warmup_target=rate, warmup_steps=warmup
    )
    optimizer = keras.optimizers.AdamW(
        schedule, weight_decay=0.01, global_clipnorm=1.0
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    model.compile(optimizer, loss=loss)
    model.fit(tokens, targets, batch_size=BATCH, epochs=epochs, verbose=2)


def split_rows(labels, labelled):
    """Split the training set, each class in proportion.

    Returns:
        The rows of `"teacher"` (a tenth), `"search"` (`labelled` rows) and
        `"unlabelled"` (the others).
    """
    rest, teacher = train_test_split(
        np.arange(len(labels)), test_size=0.1, stratify=labels, random_state=0
    )
    unlabelled, search = train_test_split(
        rest, test_size=labelled, stratify=labels[rest], random_state=0
    )
    return {"teacher": teacher, "search": search, "unlabelled": unlabelled}


def take(texts, rows):
    """Take rows of a list, or of each list in a tuple."""
    if isinstance(texts, tuple):
        return tuple(take(column, rows) for column in texts)
    return [texts[row] for row in rows]


def ask_teacher(arguments, parts, classes):
    """Store the teacher's logits of each part but its own, or read them.

    It is trained when the first row is missing: not if all are there.
    """
    model, tokenise = make_classifier(
        arguments.teacher, classes, sequence_length=arguments.sequence_length
    )

    @functools.cache
    def trained():
        texts, labels = parts["teacher"]
        train(
            model,
            tokenise(texts),
            labels,
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            epochs=arguments.epochs,
            rate=arguments.teacher_rate,
        )
        return model

    name = (
        f"{arguments.teacher}, {arguments.epochs} epochs at "
        f"{arguments.teacher_rate} on {len(parts['teacher'][1])} examples, "
        f"seed {arguments.seed}"
    )
    return {
        part: np.asarray(
            SoftLabels.write(
                lambda tokens: trained().predict_on_batch(tokens),
                tokenise(texts),
                arguments.output / f"teacher_{part}.softlabels",
                spec=SoftLabelSpec(from_logits=True, teacher_name=name),
                batch_size=8 * BATCH,
                verbose=2,
            )
        )
        for part, (texts, _) in parts.items()
        if part != "teacher"
    }


def distil(arguments):
    """Run the whole example."""
    task = load_task(arguments.task, arguments.data, arguments.subset)
    texts, labels = task.splits["train"]
    if not task.classes <= arguments.labelled <= 0.9 * len(labels) - BATCH:
        raise ValueError(
            f"`--labelled` must be at least {task.classes} and leave {BATCH} "
            "examples to distil from. Received: --labelled "
            f"{arguments.labelled} of {len(labels)} training examples"
        )
    rows = split_rows(labels, arguments.labelled)
    parts = {
        part: (take(texts, chosen), labels[chosen])
        for part, chosen in rows.items()
    }
    tests = [split for split in task.splits if split != "train"]
    parts |= {test: task.splits[test] for test in tests}

    make_student = functools.partial(
        make_classifier,
        arguments.student,
        task.classes,
        sequence_length=arguments.sequence_length,
    )
    _, tokenise = make_student()
    tokens = {part: tokenise(parts[part][0]) for part in ("unlabelled", *tests)}

    def share_right(part, outputs):
        return float(np.mean(outputs.argmax(axis=1) == parts[part][1]))

    keras.utils.set_random_seed(arguments.seed)
    asked = arguments.teacher_probs is None
    if asked:
        outputs = ask_teacher(arguments, parts, task.classes)
        seen = tests
    else:
        probabilities = load_probabilities(
            arguments.teacher_probs, len(labels), task.classes
        )
        outputs = {part: probabilities[rows[part]] for part in rows}
        seen = ["search"]
    results = {
        "teacher": {part: share_right(part, outputs[part]) for part in seen}
    }

    losses = {"kl": PTLoss(0.0, from_logits=True, teacher_from_logits=asked)}
    for name, method in {
        # The space and the highest order of the paper's Table 5.
        "ptloss_paper": RandomSearch(order=5, space=(-1.0, 10.0)),
        "ptloss": "cross_validation",
    }.items():
        result = ProxyTeacherSearch(method).search(
            outputs["search"], parts["search"][1], from_logits=asked
        )
        result.summary()
        # The paper's is PTLoss itself.
        by = result.correction if name == "ptloss_paper" else result
        losses[name] = by.loss(from_logits=True)

    for name, loss in losses.items():
        keras.utils.set_random_seed(arguments.seed)
        student, _ = make_student()
        train(
            student,
            tokens["unlabelled"],
            outputs["unlabelled"],
            loss=loss,
            epochs=arguments.epochs,
            rate=arguments.student_rate,
        )
        results[f"student, {name}"] = {
            test: share_right(
                test, student.predict(tokens[test], batch_size=256, verbose=0)
            )
            for test in tests
        }
        student.save(arguments.output / f"student_{name}.keras")

    print(f"\nAccuracy on {arguments.task} ({keras.config.backend()})")
    for name, shares in results.items():
        values = ", ".join(f"{s} {100 * v:.1f} %" for s, v in shares.items())
        print(f"  {name:24s} {values}")
    print(f"\nStudents and the teacher's outputs: {arguments.output}")


def main(arguments=None):
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="sst2")
    parser.add_argument("--data", type=pathlib.Path, help="local TSV files")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--teacher", help="preset or directory")
    source.add_argument(
        "--teacher-probs", type=pathlib.Path, help="stored probabilities"
    )
    parser.add_argument("--student", default="bert_tiny_en_uncased")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--teacher-rate", type=float, default=5e-5)
    parser.add_argument("--student-rate", type=float, default=2e-4)
    parser.add_argument("--sequence-length", type=int, help="tokens")
    parser.add_argument(
        "--labelled", type=int, default=1000, help="examples for the search"
    )
    parser.add_argument("--subset", type=int, help="first N training examples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("text-output")
    )
    arguments = parser.parse_args(arguments)
    if arguments.data and not arguments.data.is_dir():
        parser.error(f"--data must be a directory. Received: {arguments.data}")
    probabilities = arguments.teacher_probs
    if probabilities and not probabilities.is_file():
        parser.error(f"--teacher-probs: no such file: {probabilities}")
    if arguments.sequence_length is None:
        arguments.sequence_length = TASKS[arguments.task].sequence_length
    for name in ("epochs", "sequence_length", "subset"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be at least 1. Received: {value}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    if keras.distribution.list_devices()[0].startswith("gpu"):
        keras.config.set_dtype_policy("mixed_bfloat16")
    distil(arguments)


if __name__ == "__main__":
    main()
