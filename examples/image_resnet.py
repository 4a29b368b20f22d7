"""Distil image classifiers on CIFAR-10 and CIFAR-100.

ResNet-18, GoogLeNet and DenseNet-121 in their CIFAR form, trained by the usual
recipe: 200 epochs of SGD with Nesterov momentum 0.9 at a rate of 0.1, divided
by 5 at epochs 60, 120 and 160, batches of 128, weight decay 5e-4, random crops
and flips.

    python examples/image_resnet.py --dataset cifar100 --teacher resnet18

trains a teacher, keeping 1,000 labelled images for the search, then distils
students from it without labels and prints the test accuracies. `--teacher` is
the name of a model, which is trained first, or a `.keras` file that ends in
logits. With `--teacher-probs FILE` there is no teacher, only its stored
probabilities: an `.npy` array, or an `.npz` file with one array, a row for each
training image in the order of the data set.

The images come from TensorFlow Datasets, or from `--data FILE.npz` with
`x_train` (N, 32, 32, 3) uint8, `y_train` (N,) integers, `x_test` and `y_test`.
Several GPUs share each batch. On two CPU cores, in minutes:

    python examples/image_resnet.py --data FILE.npz --subset 5000 \
        --teacher resnet8 --student resnet8 --epochs 5
"""

import argparse
import contextlib
import functools
import pathlib

import keras
import numpy as np
from keras import layers, ops
from sklearn.model_selection import train_test_split

from keras_ptloss import Distiller, ProxyTeacherSearch, PTLoss

CLASSES = {"cifar10": 10, "cifar100": 100}
BATCH = 128
# Mean and standard deviation of CIFAR-100's channels; CIFAR-10's are alike.
MEAN, DEVIATION = (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)
# As in the recipe, decay is part of the gradient: half the weight decay times
# the squared weights. `SGD(weight_decay=...)` acts past the momentum, and is
# ten times weaker.
DECAY = keras.regularizers.L2(5e-4 / 2)


def load_images(name, data=None, subset=None):
    """Load CIFAR-10 or CIFAR-100.

    Args:
        name: `"cifar10"` or `"cifar100"`.
        data: path of an `.npz` file with the images; None takes TensorFlow
            Datasets, which downloads them.
        subset: number of training images, the first ones; None for all.

    Returns:
        `{"train": (images, labels), "test": (images, labels)}`, images
        `(N, H, W, 3)` from 0 to 255 and integer labels `(N,)`.

    Raises:
        ValueError: if an argument or the file is not of this form.
    """
    if name not in CLASSES:
        raise ValueError(
            f"`name` must be one of {sorted(CLASSES)}. Received: name={name!r}"
        )
    splits = _from_tfds(name) if data is None else _from_npz(data)
    for split, (images, labels) in splits.items():
        if images.ndim != 4 or len(images) != len(labels):
            raise ValueError(
                "`data` must hold images (N, H, W, 3) and as many labels. "
                f"Received: {split} images {images.shape}, labels "
                f"{labels.shape} in data={str(data)!r}"
            )
        if labels.min() < 0 or labels.max() >= CLASSES[name]:
            raise ValueError(
                f"`data` must have labels from 0 to {CLASSES[name] - 1}, as "
                f"{name} has. Received: {labels.min()} to {labels.max()} in "
                f"data={str(data)!r}"
            )
    splits["train"] = tuple(array[:subset] for array in splits["train"])
    return splits


def _from_tfds(name):
    # Imported here: it takes seconds, and local files do without it.
    import tensorflow_datasets as tfds

    splits = {}
    for split in ("train", "test"):
        batches = tfds.load(
            name, split=split, batch_size=1000, as_supervised=True
        )
        images, labels = zip(*tfds.as_numpy(batches), strict=True)
        splits[split] = np.concatenate(images), np.concatenate(labels)
    return splits


def _from_npz(path):
    with np.load(path) as file:
        names = {
            f"{kind}_{part}" for kind in "xy" for part in ("train", "test")
        }
        if missing := sorted(names - set(file)):
            raise ValueError(
                f"`data` must be an .npz file with {sorted(names)}. Received: "
                f"data={str(path)!r} without {missing}"
            )
        return {
            part: (file[f"x_{part}"], file[f"y_{part}"])
            for part in ("train", "test")
        }


def load_probabilities(path, count, classes):
    """Load a teacher's probabilities of the first `count` training images.

    Args:
        path: an `.npy` file, or an `.npz` file with one array.
        count: number of training images in use.
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
            f"each of {count} training images. Received: {str(path)!r} of "
            f"shape {loaded.shape}"
        )
    return loaded[:count].astype("float32")


@keras.saving.register_keras_serializable(package="image_resnet")
class CropAndFlip(layers.Layer):
    """Shift each image at random, and mirror every second one, in training.

    The crop of an image padded with black by `padding` pixels on all sides.
    `keras.layers.RandomCrop` cuts a whole batch at one place, and as
    `RandomTranslation` it keeps the step that it is in from being compiled.
    """

    def __init__(self, padding=4, **kwargs):
        """Set how many pixels an image is shifted at most."""
        super().__init__(**kwargs)
        self.padding = padding
        self.seed_generator = keras.random.SeedGenerator()

    def call(self, images, training=False):
        """Return images `(N, H, W, 3)` of the same shape."""
        if not training:
            return images
        count, height, width, _ = ops.shape(images)
        rows = self._shift(count) + ops.arange(height)
        columns = self._shift(count) + ops.arange(width)
        mirrored = self._draw(count, 2) == 1
        columns = ops.where(mirrored, columns[:, ::-1], columns)
        pad = (self.padding, self.padding)
        images = ops.pad(images, ((0, 0), pad, pad, (0, 0)))
        images = ops.take_along_axis(images, rows[:, :, None, None], axis=1)
        return ops.take_along_axis(images, columns[:, None, :, None], axis=2)

    def _shift(self, count):
        return self._draw(count, 2 * self.padding + 1)

    def _draw(self, count, stop):
        return keras.random.randint(
            (count, 1), 0, stop, seed=self.seed_generator
        )

    def get_config(self):
        """Return the arguments."""
        return {**super().get_config(), "padding": self.padding}


def make_model(name, classes, *, image_size=32, augment=True):
    """Build an untrained classifier.

    Args:
        name: `"resnet18"`, `"googlenet"`, `"densenet121"`, or `"resnet8"`,
            which is small enough for a CPU.
        classes: number of classes.
        image_size: height and width of the images.
        augment: whether images are cropped and flipped at random in training.

    Returns:
        A model that takes images `(N, H, W, 3)` from 0 to 255, of any dtype,
        and ends in logits.

    Raises:
        ValueError: if there is no such model.
    """
    if name not in BODIES:
        raise ValueError(
            f"`name` must be one of {sorted(BODIES)}. Received: name={name!r}"
        )
    images = keras.Input((image_size, image_size, 3), name="images")
    x = CropAndFlip(dtype="float32")(images) if augment else images
    x = layers.Normalization(
        mean=MEAN, variance=np.square(DEVIATION), dtype="float32"
    )(x)
    x = BODIES[name](x)
    x = layers.GlobalAveragePooling2D()(x)
    logits = layers.Dense(
        classes,
        kernel_regularizer=DECAY,
        bias_regularizer=DECAY,
        dtype="float32",
        name="logits",
    )(x)
    return keras.Model(images, logits, name=name)


def convolve(x, filters, size=3, stride=1):
    """Convolve without a bias; the image shrinks by the stride."""
    # Keras's "same" pads a strided 3x3 convolution at the end only.
    if stride > 1 and size == 3:
        x = layers.ZeroPadding2D(1)(x)
    return layers.Conv2D(
        filters,
        size,
        stride,
        padding="valid" if stride > 1 else "same",
        use_bias=False,
        kernel_initializer="he_normal",
        kernel_regularizer=DECAY,
    )(x)


def normalise(x):
    """Normalise over the batch, with the epsilon and momentum of PyTorch."""
    return layers.BatchNormalization(
        momentum=0.9,
        epsilon=1e-5,
        gamma_regularizer=DECAY,
        beta_regularizer=DECAY,
    )(x)


def convolve_relu(x, filters, size=3):
    """Convolve, normalise, rectify."""
    return ops.relu(normalise(convolve(x, filters, size)))


def resnet(x, widths, blocks):
    """Stages of basic blocks (He et al. 2016), halving the image between."""
    x = convolve_relu(x, widths[0])
    for stage, width in enumerate(widths):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            y = ops.relu(normalise(convolve(x, width, stride=stride)))
            y = normalise(convolve(y, width))
            if y.shape != x.shape:
                x = normalise(convolve(x, width, size=1, stride=stride))
            x = ops.relu(x + y)
    return x


# For each inception module: 1x1; 3x3 after 1x1; two 3x3 after 1x1; 1x1 after
# pooling. None halves the image.
INCEPTIONS = (
    (64, (96, 128), (16, 32), 32),
    (128, (128, 192), (32, 96), 64),
    None,
    (192, (96, 208), (16, 48), 64),
    (160, (112, 224), (24, 64), 64),
    (128, (128, 256), (24, 64), 64),
    (112, (144, 288), (32, 64), 64),
    (256, (160, 320), (32, 128), 128),
    None,
    (256, (160, 320), (32, 128), 128),
    (384, (192, 384), (48, 128), 128),
)


def googlenet(x):
    """GoogLeNet (Szegedy et al. 2015) with batch normalisation."""
    x = convolve_relu(x, 192)
    for module in INCEPTIONS:
        if module is None:
            x = layers.MaxPooling2D(3, 2, padding="same")(x)
            continue
        one, (before_three, three), (before_five, five), pooled = module
        y = convolve_relu(convolve_relu(x, before_five, 1), five)
        x = ops.concatenate(
            [
                convolve_relu(x, one, 1),
                convolve_relu(convolve_relu(x, before_three, 1), three),
                convolve_relu(y, five),
                convolve_relu(
                    layers.MaxPooling2D(3, 1, padding="same")(x), pooled, 1
                ),
            ],
            axis=-1,
        )
    return x


def densenet(x, blocks, growth):
    """DenseNet-BC (Huang et al. 2017), which halves channels between blocks."""
    x = convolve(x, 2 * growth)
    for index, size in enumerate(blocks):
        if index:
            x = convolve(ops.relu(normalise(x)), x.shape[-1] // 2, 1)
            x = layers.AveragePooling2D(2)(x)
        for _ in range(size):
            y = convolve(ops.relu(normalise(x)), 4 * growth, 1)
            y = convolve(ops.relu(normalise(y)), growth)
            x = ops.concatenate([x, y], axis=-1)
    return ops.relu(normalise(x))


BODIES = {
    "resnet8": functools.partial(resnet, widths=(16, 32, 64), blocks=1),
    "resnet18": functools.partial(resnet, widths=(64, 128, 256, 512), blocks=2),
    "googlenet": googlenet,
    "densenet121": functools.partial(
        densenet, blocks=(6, 12, 24, 16), growth=32
    ),
}


class Recipe(keras.optimizers.schedules.LearningRateSchedule):
    """One epoch of warm-up, then a fifth after 30, 60 and 80 % of the epochs.

    At 200 epochs: after 60, 120 and 160.
    """

    def __init__(self, epochs, steps_per_epoch, rate=0.1):
        """Set the length of the training and the highest rate."""
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch
        self.rate = rate

    def __call__(self, step):
        """Return the learning rate of a step, the first being 0."""
        epoch = ops.cast(step, "float32") / self.steps_per_epoch
        rate = self.rate * ops.minimum(epoch + 1 / self.steps_per_epoch, 1.0)
        for share in (0.3, 0.6, 0.8):
            rate = ops.where(epoch < share * self.epochs, rate, 0.2 * rate)
        return rate


def train(model, images, targets=None, *, loss, epochs):
    """Train by the recipe, in whole batches: devices share these evenly."""
    steps = len(images) // BATCH
    if not steps:
        raise ValueError(
            f"`images` must fill a batch of {BATCH}. Received: {len(images)} "
            "images to train on"
        )
    model.compile(
        keras.optimizers.SGD(
            Recipe(epochs, steps), momentum=0.9, nesterov=True
        ),
        loss=loss,
    )
    images = images[: steps * BATCH]
    targets = None if targets is None else targets[: steps * BATCH]
    model.fit(images, targets, batch_size=BATCH, epochs=epochs, verbose=2)


def predict(model, images):
    """Return the logits, computed in whole batches."""
    filled = np.resize(
        images, (len(images) + -len(images) % BATCH, *images.shape[1:])
    )
    return model.predict(filled, batch_size=BATCH, verbose=0)[: len(images)]


def accuracy(model, data):
    """Return the share of right answers on the test images."""
    images, labels = data["test"]
    return float(np.mean(predict(model, images).argmax(axis=1) == labels))


def get_teacher(teacher, classes, images, labels, *, epochs):
    """Train the teacher of this name, or load it from its file."""
    if teacher not in BODIES:
        model = keras.saving.load_model(teacher, compile=False)
        if model.output_shape != (None, classes):
            raise ValueError(
                f"`--teacher` must end in {classes} logits. Received: "
                f"{teacher!r} with outputs {model.output_shape}"
            )
        return model
    model = make_model(teacher, classes)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    train(model, images, labels, loss=loss, epochs=epochs)
    return model


def save(model, name, path):
    """Save without the augmentation: any Keras loads it, without this file."""
    size, classes = model.input_shape[1], model.output_shape[-1]
    plain = make_model(name, classes, image_size=size, augment=False)
    plain.set_weights(model.get_weights())
    plain.save(path)


def all_devices():
    """Return a scope in which all GPUs (or simulated CPUs) share a batch."""
    if len(keras.distribution.list_devices()) == 1:
        return contextlib.nullcontext()
    if keras.config.backend() == "jax":
        return keras.distribution.DataParallel().scope()
    # Keras has no distribution of its own on this backend.
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(
        tf.config.list_logical_devices("GPU")
        or tf.config.list_logical_devices("CPU")
    ).scope()


def distil(arguments):
    """Run the whole example."""
    data = load_images(arguments.dataset, arguments.data, arguments.subset)
    images, labels = data["train"]
    classes = CLASSES[arguments.dataset]
    if not classes <= arguments.labelled <= len(labels) - BATCH:
        raise ValueError(
            f"`--labelled` must be at least {classes} and leave a batch of "
            f"{BATCH} to distil from. Received: --labelled "
            f"{arguments.labelled} of {len(labels)} training images"
        )
    # The labels of `rest` are for the teacher alone, those of `few` for the
    # search: on what it was trained on, a teacher looks better than it is.
    rest, few = train_test_split(
        np.arange(len(labels)),
        test_size=arguments.labelled,
        stratify=labels,
        random_state=0,
    )

    keras.utils.set_random_seed(arguments.seed)
    live = arguments.teacher_probs is None
    if live:
        teacher = get_teacher(
            arguments.teacher,
            classes,
            images[rest],
            labels[rest],
            epochs=arguments.epochs,
        )
        outputs = predict(teacher, images[few])
        rows = {"teacher": accuracy(teacher, data)}
    else:
        probabilities = load_probabilities(
            arguments.teacher_probs, len(images), classes
        )
        outputs = probabilities[few]
        right = outputs.argmax(axis=1) == labels[few]
        rows = {"teacher, on the images of the search": np.mean(right)}

    result = ProxyTeacherSearch().search(outputs, labels[few], from_logits=live)
    result.summary()

    for name, loss in {
        "kl": PTLoss(0.0, from_logits=True, teacher_from_logits=live),
        "ptloss": result.loss(from_logits=True),
    }.items():
        keras.utils.set_random_seed(arguments.seed)
        student = make_model(arguments.student, classes)
        # A live teacher sees the images as they are, as a stored one did.
        train(
            Distiller(student, teacher) if live else student,
            images[rest],
            None if live else probabilities[rest],
            loss=loss,
            epochs=arguments.epochs,
        )
        rows[f"student, {name}"] = accuracy(student, data)
        path = arguments.output / f"student_{name}.keras"
        save(student, arguments.student, path)

    print(f"\nTest accuracy, {arguments.dataset} ({keras.config.backend()})")
    for name, value in rows.items():
        print(f"  {name:40s} {100 * value:5.1f} %")
    print(f"\nStudents: {arguments.output}")


def main(arguments=None):
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--dataset", choices=CLASSES, default="cifar100")
    parser.add_argument("--data", type=pathlib.Path, help="local .npz file")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--teacher", help="name of a model, or .keras file")
    source.add_argument(
        "--teacher-probs", type=pathlib.Path, help="stored probabilities"
    )
    parser.add_argument("--student", choices=BODIES, default="resnet18")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--labelled", type=int, default=1000)
    parser.add_argument("--subset", type=int, help="first N training images")
    parser.add_argument("--mixed-precision", choices=("bfloat16", "float16"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, default="image-output")
    arguments = parser.parse_args(arguments)
    for file in (arguments.data, arguments.teacher_probs):
        if file and not file.is_file():
            parser.error(f"no such file: {file}")
    teacher = arguments.teacher
    if (
        teacher
        and teacher not in BODIES
        and not pathlib.Path(teacher).is_file()
    ):
        parser.error(
            f"--teacher must be one of {', '.join(BODIES)}, or a file. "
            f"Received: --teacher {teacher}"
        )
    for name in ("epochs", "subset"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1. Received: {value}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.mixed_precision:
        keras.config.set_dtype_policy(f"mixed_{arguments.mixed_precision}")
    with all_devices():
        distil(arguments)


if __name__ == "__main__":
    main()
