"""Correct a teacher with 50 labels, and distil a better student.

The teacher has learned to confuse four pairs of handwritten digits: it takes
most 4s for 9s, 3s for 8s, 1s for 7s and 5s for 6s. We have its probabilities
on 750 images, and the true labels of 50 of these images.

    python examples/digits.py

The script takes less than a minute. It prints the students' test accuracies
and plots them in demo-output/digits.png. The images come with scikit-learn.
"""

import logging
import pathlib
import sys

import keras
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import keras_ptloss

# Setup

logging.getLogger("tensorflow").setLevel(logging.ERROR)
QUICK = "--quick" in sys.argv
EPOCHS = 3 if QUICK else 40
CONFUSED = {4: 9, 3: 8, 1: 7, 5: 6}


def build_student(units=32):
    """Build a small classifier that ends in a softmax."""
    hidden = keras.layers.Dense(units, "relu")
    model = keras.Sequential([hidden, keras.layers.Dense(10, "softmax")])
    model.compile(keras.optimizers.Adam(1e-2), "categorical_crossentropy")
    return model


class Bar(keras.callbacks.Callback):
    """Show one progress bar for all epochs."""

    def on_train_begin(self, logs=None):
        """Draw an empty bar."""
        self.bar = keras.utils.Progbar(self.params["epochs"], unit_name="epoch")

    def on_epoch_end(self, epoch, logs=None):
        """Move the bar."""
        self.bar.update(epoch + 1)


# Data

x, y = load_digits(return_X_y=True)
x, onehot = (x / 16).astype("float32"), np.eye(10, dtype="float32")
order = np.random.default_rng(0).permutation(len(x))
teachers_rows, train, test = np.split(order, [300, 1050])
labels = np.full(len(train), -1)
labels[:50] = y[train[:50]]

# Teacher

print("1. Train a teacher that confuses four pairs of digits")
taught = y[teachers_rows].copy()
for digit, taken_for in CONFUSED.items():
    rows = np.flatnonzero(taught == digit)
    taught[rows[len(rows) // 5 :]] = taken_for  # four fifths of them
keras.utils.set_random_seed(0)
teacher = build_student(units=256)
options = {"batch_size": 64, "verbose": 0}
teacher.fit(
    x[teachers_rows],
    onehot[taught],
    epochs=EPOCHS,
    callbacks=[Bar()],
    **options,
)
teacher_probs = teacher.predict(x[train], verbose=0)

# Correct

print("2. Correct it with 50 labels and a model trained on these labels alone")
targets = keras_ptloss.distillation_targets(
    teacher_probs,
    labels,
    x=x[train],
    build_model=lambda: LogisticRegression(C=10, max_iter=500),
    verbose=1,
)
targets.summary()

# Distil

known = labels >= 0
students = {
    "the teacher as it is (KL)": (train, teacher_probs, None),
    "the 50 labels alone": (train[known], onehot[labels[known]], None),
    "distillation_targets": (train, targets.values, targets.sample_weight),
    "all 750 true labels": (train, onehot[y[train]], None),
}
accuracy = {}
predicted = {}
for step, (name, (rows, values, weight)) in enumerate(students.items(), 3):
    print(f"{step}. Train a student on {name}")
    keras.utils.set_random_seed(0)
    student = build_student()
    student.fit(
        x[rows],
        values,
        sample_weight=weight,
        epochs=EPOCHS if len(rows) == len(train) else 5 * EPOCHS,
        callbacks=[Bar()],
        **options,
    )
    predicted[name] = student.predict(x[test], verbose=0).argmax(axis=1)
    accuracy[name] = 100 * np.mean(predicted[name] == y[test])

# Compare

print("\nTest accuracy of the students")
for name, value in accuracy.items():
    print(f"  {name:28}{value:5.1f} %")

figure, axes = plt.subplot_mosaic(
    [list("abcd"), ["bars"] * 4], figsize=(8, 5), height_ratios=(1, 1.3)
)
before, after = (predicted[name] for name in list(students)[:3:2])
for axis, digit in zip("abcd", CONFUSED, strict=True):
    # An image that shows the difference, if there is one.
    fixed = (y[test] == digit) & (before != digit) & (after == digit)
    row = np.argmax(fixed) if fixed.any() else np.argmax(y[test] == digit)
    axes[axis].imshow(x[test[row]].reshape(8, 8), cmap="gray_r")
    axes[axis].set_title(f"KL student: {before[row]}\nours: {after[row]}")
    axes[axis].axis("off")
bars = axes["bars"].barh(
    list(accuracy),
    list(accuracy.values()),
    color=["tab:gray", "tab:gray", "tab:blue", "lightgray"],
)
axes["bars"].bar_label(bars, fmt="%.0f %%", padding=4)
axes["bars"].set(xlim=(0, 108), xlabel="test accuracy of the student, %")
axes["bars"].invert_yaxis()
figure.tight_layout()
pathlib.Path("demo-output").mkdir(exist_ok=True)
figure.savefig("demo-output/digits.png", dpi=120)
print("\nPicture: demo-output/digits.png")
