"""Run a teacher on many machines with Ray, then distil a student.

Each Ray task stores the teacher's outputs for one part of the inputs. If a
worker dies, Ray starts its task again, and the task continues where it stopped.
If the script stops too, run it again: it also continues where it stopped.

    pip install keras_ptloss pyarrow ray scikit-learn jax
    KERAS_BACKEND=jax python examples/label_with_ray.py ray-output

To use a cluster, set RAY_ADDRESS, to `auto` on one of its machines. The output
folder must be on a disk that all machines share.
"""

## Setup

import pathlib
import sys
import time

import keras
import numpy as np
import ray
from sklearn.datasets import load_digits

from keras_ptloss import PTLoss, SoftLabels

NUM_PARTS = 8
SECONDS_PER_BATCH = 0.1  # Simulates a teacher that is large and slow.

folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "ray-output")
folder = folder.resolve()
folder.mkdir(parents=True, exist_ok=True)

## Data: scikit-learn's digits, which are part of the package

images, labels = load_digits(return_X_y=True)
images = (images / 16.0).astype("float32")

## Teacher: a small network, saved where all workers can load it

teacher_file = folder / "teacher.keras"
if not teacher_file.exists():
    keras.utils.set_random_seed(0)
    teacher = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(128, "relu"),
            keras.layers.Dense(10, "softmax"),
        ]
    )
    teacher.compile("adam", "sparse_categorical_crossentropy")
    teacher.fit(images, labels, epochs=30, verbose=0)
    teacher.save(folder / "teacher.new.keras")
    (folder / "teacher.new.keras").rename(teacher_file)

## Label: one task for each part


@ray.remote(num_cpus=1, max_retries=-1)
def label(number, part):
    """Store the teacher's outputs for one part of the images."""
    model = keras.saving.load_model(teacher_file)

    def slow_teacher(batch):
        time.sleep(SECONDS_PER_BATCH)
        return model.predict_on_batch(batch)

    SoftLabels.write(
        slow_teacher,
        part,
        folder / f"part-{number:03d}",
        teacher_name="digits, 30 epochs",
        verbose=0,
    )
    return number


ray.init(include_dashboard=False)
parts = np.array_split(images, NUM_PARTS)
tasks = [label.remote(number, part) for number, part in enumerate(parts)]
while tasks:
    done, tasks = ray.wait(tasks)
    print(f"part {ray.get(done[0])} is labelled", flush=True)
ray.shutdown()

soft_labels = SoftLabels.join(
    [folder / f"part-{number:03d}" for number in range(NUM_PARTS)],
    folder / "labels",
)
print(f"{len(soft_labels)} of {len(images)} images are labelled")

## Distil: `attach` finds the soft label of each image, in any order

keras.utils.set_random_seed(1)
student = keras.Sequential(
    [
        keras.Input((64,)),
        keras.layers.Dense(32, "relu"),
        keras.layers.Dense(10),
    ]
)
student.compile(keras.optimizers.Adam(3e-3), PTLoss(0.0, from_logits=True))
pairs = soft_labels.attach(images, shuffle=True, seed=0)
student.fit(pairs, epochs=20, verbose=0)

## Compare

predicted = student.predict(images, verbose=0).argmax(axis=1)
print(f"student, accuracy on these images: {np.mean(predicted == labels):.3f}")
