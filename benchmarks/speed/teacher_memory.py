"""Peak memory of eager training steps beside a deep teacher.

    KERAS_BACKEND=tensorflow python benchmarks/speed/teacher_memory.py

A gradient tape that is open while the teacher runs keeps the activations of
all its layers until the step is over. Of a teacher that is asked before, they
are gone when the student starts; a subclassed one frees them layer by layer,
while a Sequential holds its own until it is done.

Each figure is that of a process of its own, which has one peak: what the
teacher adds to the student alone.
"""

import argparse
import subprocess
import sys
from typing import Any

from machine import resident

KINDS = ("none", "subclassed", "sequential")


def teacher_of(kind: str, layers: int, width: int) -> Any:
    """Build a teacher of `layers` dense layers and ten classes."""
    import keras

    deep = [keras.layers.Dense(width, "tanh") for _ in range(layers)]
    deep.append(keras.layers.Dense(10, "softmax"))
    if kind == "sequential":
        return keras.Sequential([keras.Input((width,)), *deep])

    class Teacher(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.deep = deep

        def call(self, x: Any) -> Any:
            for layer in self.deep:
                x = layer(x)
            return x

    return Teacher()


def peak_of_training(
    kind: str, layers: int, width: int, batch: int, student_layers: int
) -> float:
    """Return the process's peak in MiB after three eager steps."""
    import keras
    import numpy as np

    from keras_ptloss import Distiller, PTLoss

    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(width, "tanh") for _ in range(student_layers)]
    student = keras.Sequential(
        [keras.Input((width,)), *hidden, keras.layers.Dense(10)]
    )
    x = np.random.default_rng(0).normal(size=(batch, width)).astype("float32")
    loss = PTLoss(0.5, from_logits=True, teacher_from_logits=False)
    if kind == "none":
        model, data = student, (x, np.full((batch, 10), 0.1, "float32"))
    else:
        teacher = teacher_of(kind, layers, width)
        teacher(x[:1])
        model, data = Distiller(student, teacher), (x,)
    model.compile("sgd", loss=loss, run_eagerly=True)
    for _ in range(3):
        model.train_on_batch(*data)
    return resident("VmHWM")


def main() -> None:
    """Print what each kind of teacher adds to students of two depths."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=100)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16384)
    parser.add_argument("--kind", choices=KINDS, help="one, in this process")
    parser.add_argument("--student-layers", type=int, default=0)
    args = parser.parse_args()
    if args.kind:
        print(peak_of_training(**vars(args)))
        return

    def peak(kind: str, student_layers: int) -> float:
        command = [sys.executable, __file__, f"--kind={kind}"]
        command += [f"--student-layers={student_layers}"]
        for name in ("layers", "width", "batch"):
            command.append(f"--{name}={getattr(args, name)}")
        out = subprocess.run(command, capture_output=True, text=True)
        if out.returncode:
            sys.exit(out.stderr)
        return float(out.stdout.split()[-1])

    one = args.batch * args.width * 4 / 2**20
    print(f"a teacher of {args.layers} layers, {one:.0f} MiB of activations")
    print(f"each, {one * args.layers:.0f} MiB in all")
    for student_layers in (0, args.layers):
        alone = peak("none", student_layers)
        print(f"student of {student_layers} hidden layers: {alone:.0f} MiB")
        for kind in KINDS[1:]:
            added = peak(kind, student_layers) - alone
            print(f"  a {kind} teacher adds {added:.0f} MiB")


if __name__ == "__main__":
    main()
