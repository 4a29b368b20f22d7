"""The tasks: synthetic Gaussians, CIFAR-10, and those of examples/."""

import functools
import pathlib
from typing import Any

import keras
import numpy as np
import scipy.special
from keras import layers

from benchmarks.quality.study.harness import Rows, Task, predict, softmax
from examples import image_resnet
from keras_ptloss import FilteredTeacher

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


def cifar10(name: str, teacher: str, data: pathlib.Path = DATA) -> Task:
    """Distil a ResNet-50 that was trained on noisy labels, without labels.

    1,000 labelled training images for the search, 16,000 others to distil
    from, the test set to judge on. Teachers' outputs are out of fold.

    Args:
        name: the task's.
        teacher: as in `teachers_train.npz`.
        data: folder with `cifar10/`.
    """
    folder = data / "cifar10"
    images, index = read_jpegs(folder / "train_jpeg.npz")
    images = images[np.argsort(index)]
    file = np.load(folder / "teachers_train.npz")
    probabilities = file[f"{teacher}__probs"].astype("float32")
    rows = Rows(images, file["labels"], probabilities)
    shuffled = np.random.default_rng(0).permutation(len(images))
    test_images, test_index = read_jpegs(folder / "test_jpeg.npz")
    test_labels = np.load(folder / "test_jpeg.npz")["labels"]
    return Task(
        name=name,
        search=rows.take(shuffled[:SEARCH_ROWS]),
        distill=rows.take(shuffled[SEARCH_ROWS : SEARCH_ROWS + 16_000]),
        test=Rows(test_images, test_labels),
        make_student=small_resnet,
        make_optimizer=warm_cosine,
        epochs=8,
        batch_size=128,
    )


TASKS = {
    "gaussian": functools.partial(gaussian, "gaussian"),
    "gaussian_imbalanced": functools.partial(
        gaussian, "gaussian_imbalanced", share=0.1
    ),
    "cifar10_clean": functools.partial(
        cifar10, "cifar10_clean", "resnet50_symfrac0_0_noise0_0"
    ),
    "cifar10_mild": functools.partial(
        cifar10, "cifar10_mild", "resnet50_symfrac0_4_noise0_2"
    ),
    "cifar10_strong": functools.partial(
        cifar10, "cifar10_strong", "resnet50_symfrac0_6_noise0_4"
    ),
}
