"""Distil a ResNet on CIFAR-100 with a live teacher and augmented images.

A ResNet-56 teacher is trained on some of the images; a third of their labels
are wrong. We correct the teacher with 1,000 true labels, and distil a ResNet-20
from the corrected teacher. Teacher and student see the same augmented images.

    pip install 'keras_ptloss[examples]'
    python examples/images_cifar100.py           # needs a GPU
    python examples/images_cifar100.py --quick   # a small setting for a CPU

Keras downloads the data.
"""

import sys

import keras
import numpy as np
from keras import layers

from keras_ptloss import Distiller, ProxyTeacherSearch, PTLoss

# --- Setup ---

QUICK = "--quick" in sys.argv
EPOCHS = 1 if QUICK else 100
BATCH_SIZE = 128
TEACHER_BLOCKS, STUDENT_BLOCKS = (1, 1) if QUICK else (9, 3)
NUM_TEACHER = 1_000 if QUICK else 25_000  # images that the teacher learns from
NUM_STUDENT = 1_000 if QUICK else 24_000  # unlabelled images for the student
NUM_LABELS = 1_000  # labelled images that correct the teacher
keras.utils.set_random_seed(0)


def residual_block(x, filters, strides):
    """Add two convolutions and a shortcut."""
    y = layers.Conv2D(filters, 3, strides, "same", use_bias=False)(x)
    y = layers.ReLU()(layers.BatchNormalization()(y))
    y = layers.Conv2D(filters, 3, 1, "same", use_bias=False)(y)
    y = layers.BatchNormalization()(y)
    if strides > 1 or x.shape[-1] != filters:
        x = layers.Conv2D(filters, 1, strides, use_bias=False)(x)
    return layers.ReLU()(layers.Add()([x, y]))


def resnet(blocks):
    """Build a ResNet with 6 * blocks + 2 layers that ends in logits."""
    image = x = keras.Input((32, 32, 3))
    x = layers.Conv2D(16, 3, padding="same", activation="relu")(x)
    for filters in (16, 32, 64):
        for block in range(blocks):
            strides = 2 if block == 0 and filters > 16 else 1
            x = residual_block(x, filters, strides)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(100)(x))


def optimizer(num_images):
    """Build SGD with a cosine schedule."""
    steps = EPOCHS * -(-num_images // BATCH_SIZE)
    rate = keras.optimizers.schedules.CosineDecay(0.1, steps)
    return keras.optimizers.SGD(rate, momentum=0.9, weight_decay=5e-4)


# --- Data ---

print("Loading CIFAR-100")
(images, true_labels), (x_test, y_test) = keras.datasets.cifar100.load_data()
images = ((images - 127.5) / 64).astype("float32")
x_test = ((x_test - 127.5) / 64).astype("float32")
true_labels, y_test = true_labels.ravel(), y_test.ravel()
ends = np.cumsum([NUM_TEACHER, NUM_LABELS, NUM_STUDENT])
order = np.random.default_rng(0).permutation(len(images))
for_teacher, labelled, unlabelled = np.split(order, ends)[:3]


def augmented(indices):
    """Return shifted and mirrored copies of images."""
    rng = np.random.default_rng(0)
    padded = np.pad(images[indices], ((0, 0), (4, 4), (4, 4), (0, 0)))
    for i, (dy, dx) in enumerate(rng.integers(0, 9, (len(indices), 2))):
        image = padded[i, dy : dy + 32, dx : dx + 32]
        padded[i, :32, :32] = image[:, :: rng.choice([-1, 1])]
    return padded[:, :32, :32]


# --- Teacher ---

print("Training the teacher; a third of its labels are wrong")
rng = np.random.default_rng(1)
wrong = rng.random(NUM_TEACHER) < 1 / 3
noisy_labels = (true_labels[for_teacher] + wrong) % 100
teacher = resnet(TEACHER_BLOCKS)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
teacher.compile(optimizer(NUM_TEACHER), loss)
teacher.fit(
    augmented(for_teacher), noisy_labels, batch_size=BATCH_SIZE, epochs=EPOCHS
)

# --- Correct ---

result = ProxyTeacherSearch().search(
    teacher,
    true_labels[labelled],
    inputs=images[labelled],
    from_logits=True,
    num_classes=100,
)
result.summary()

# --- Distil ---


def distil(loss):
    """Train a student; return its accuracy on the test images."""
    keras.utils.set_random_seed(1)
    distiller = Distiller(student=resnet(STUDENT_BLOCKS), teacher=teacher)
    distiller.compile(optimizer(NUM_STUDENT), loss=loss)
    distiller.fit(augmented(unlabelled), batch_size=BATCH_SIZE, epochs=EPOCHS)
    logits = distiller.student.predict(x_test, batch_size=BATCH_SIZE)
    return np.mean(logits.argmax(axis=1) == y_test)


plain = distil(PTLoss(0.0, from_logits=True))
ours = distil(result.loss(from_logits=True))

# --- Compare ---

print(f"student of the teacher             {100 * plain:.1f} %")
print(f"student of the corrected teacher   {100 * ours:.1f} %")
