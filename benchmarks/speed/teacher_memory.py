"""Peak memory of an eager training step beside a deep teacher.

A gradient tape that is open while the teacher runs keeps the activations of
all its layers; a teacher that is asked before has them freed one by one. The
peak above what the student needs alone is printed, so that it can be laid
beside the sizes of the teacher's activations and of one of them.

    KERAS_BACKEND=tensorflow python benchmarks/speed/teacher_memory.py

Each figure is that of a process of its own, which has one peak.
"""

import argparse
import resource
import subprocess
import sys


def peak_of_training(layers: int, width: int, batch: int) -> float:
    """Return the process's peak in MiB after three eager steps.

    Args:
        layers: depth of the teacher; 0 trains the student without one.
        width: units of each of its layers.
        batch: examples a step.
    """
    import keras
    import numpy as np

    from keras_ptloss import Distiller, PTLoss

    keras.utils.set_random_seed(0)
    student = keras.Sequential([keras.Input((width,)), keras.layers.Dense(10)])
    x = np.random.default_rng(0).normal(size=(batch, width)).astype("float32")
    loss = PTLoss(0.5, from_logits=True, teacher_from_logits=False)
    if layers:
        deep = [keras.layers.Dense(width, "tanh") for _ in range(layers)]
        head = keras.layers.Dense(10, "softmax")
        teacher = keras.Sequential([keras.Input((width,)), *deep, head])
        model, data = Distiller(student, teacher), (x,)
    else:
        model, data = student, (x, np.full((batch, 10), 0.1, "float32"))
    model.compile("sgd", loss=loss, run_eagerly=True)
    for _ in range(3):
        model.train_on_batch(*data)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=100)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16384)
    parser.add_argument("--alone", action="store_true", help="one process")
    args = parser.parse_args()
    if args.alone:
        print(peak_of_training(args.layers, args.width, args.batch))
        return

    def peak(layers: int) -> float:
        command = [sys.executable, __file__, "--alone", f"--layers={layers}"]
        command += [f"--width={args.width}", f"--batch={args.batch}"]
        out = subprocess.run(command, capture_output=True, text=True)
        if out.returncode:
            sys.exit(out.stderr)
        return float(out.stdout.split()[-1])

    weights = args.layers * args.width * (args.width + 1) * 4 / 2**20
    one = args.batch * args.width * 4 / 2**20
    student, both = peak(0), peak(args.layers)
    print(f"teacher: {args.layers} layers, weights {weights:.0f} MiB")
    print(f"activations: {one:.0f} MiB a layer, {one * args.layers:.0f} in all")
    print(f"peak: student alone {student:.0f} MiB, distilled {both:.0f} MiB")
    print(f"the teacher adds {both - student:.0f} MiB")


if __name__ == "__main__":
    main()
