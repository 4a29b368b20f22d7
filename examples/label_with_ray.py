"""Ask a teacher on many machines with Ray, then distil a student.

Ray Data reads the inputs, its actors load the teacher once each and label
blocks of rows, and each block becomes a Parquet file. If an actor or its
machine dies, Ray asks another one. If all of it dies, run the same command
again: rows that are there already are not asked for.

    python examples/label_with_ray.py --output ray-output --workers 2

Each row carries its example's fingerprint, by which the student's inputs find
it: Ray keeps no order. The files are plain lists of numbers, which machines
without Ray read: `SoftLabels.open("ray-output/labels")`. On scikit-learn's
digits, which need no download; `--address auto` uses a running cluster, whose
machines must share the output folder.
"""

import argparse
import collections
import os
import pathlib
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits

CLASSES = 10


def write_inputs(folder, count_of_files):
    """Write the digits as Parquet files, for Ray to read.

    Returns:
        Images `(1797, 64)`, from 0 to 1, and their labels.
    """
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype("float32")
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(np.array_split(images, count_of_files)):
        table = pa.table({"image": as_lists(part)})
        pq.write_table(table, folder / f"{number:05d}.parquet")
    return images, labels


def as_lists(rows):
    """Rows as lists of one length: an array would become Ray's own type."""
    flat = pa.array(np.ascontiguousarray(rows).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])


def as_rows(column):
    """Undo `as_lists`, for a column of a table."""
    column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    return column.flatten().to_numpy().reshape(len(column), -1)


def train_teacher(images, labels, path):
    """Train a small network and save it, if that is not done."""
    import keras

    if path.exists():
        return
    keras.utils.set_random_seed(0)
    layers = keras.layers
    teacher = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(128, "relu"),
            layers.Dense(CLASSES, "softmax"),
        ]
    )
    teacher.compile("adam", "sparse_categorical_crossentropy")
    teacher.fit(images, labels, epochs=30, batch_size=32, verbose=0)
    teacher.save(path)


class Unlabelled:
    """Leaves out the examples that are labelled; names the others.

    Args:
        done: Their fingerprints, sorted.
    """

    def __init__(self, done):
        self.done = done

    def __call__(self, table):
        """Add fingerprints to a table of images and drop what is done."""
        from keras_ptloss.soft_labels import fingerprint

        prints = fingerprint(as_rows(table["image"]))
        table = table.append_column("fingerprint", pa.array(prints))
        return table.filter(pa.array(~np.isin(prints, self.done)))


class Teacher:
    """An actor: loads the model once, then labels one table after another."""

    def __init__(self, path, seconds_a_batch):
        """Load the model.

        Args:
            path: A `.keras` file.
            seconds_a_batch: Time to wait, as a large teacher would take.
        """
        import keras

        self.model = keras.saving.load_model(path)
        self.seconds_a_batch = seconds_a_batch
        print(f"teacher loaded in process {os.getpid()}", flush=True)

    def __call__(self, table):
        """Label a table of images and fingerprints."""
        if not len(table):
            return table.drop_columns("image").append_column(
                "probabilities", as_lists(np.empty((0, CLASSES), "float32"))
            )
        time.sleep(self.seconds_a_batch)
        outputs = self.model.predict_on_batch(as_rows(table["image"]))
        return pa.table(
            {
                "fingerprint": table["fingerprint"],
                "probabilities": as_lists(np.asarray(outputs, "float32")),
            }
        )


def read_done(folder):
    """Return the fingerprints that are stored, of every row.

    A file that a killed process left without its end is removed: it has no
    rows that could be read.
    """
    done = [np.empty(0, "uint64")]
    for path in sorted(folder.glob("*.parquet")):
        try:
            table = pq.read_table(path, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            print(f"removed {path.name}, which is not whole: {error}")
            path.unlink()
            continue
        done.append(table["fingerprint"].to_numpy())
    return np.concatenate(done)


def start(arguments):
    """Start a cluster on this machine, or join one.

    Before Keras is imported: Ray starts processes by forking.
    """
    import ray

    if arguments.address:
        ray.init(arguments.address)
    else:
        # A core an actor, and two for reading and writing.
        ray.init(num_cpus=arguments.workers + 2, include_dashboard=False)


def label(inputs, teacher, labels, arguments):
    """Label what is not labelled."""
    import ray

    done = read_done(labels)
    print(f"labelled before: {len(done)} rows", flush=True)
    images = ray.data.read_parquet(str(inputs))
    rows = images.map_batches(
        Unlabelled(np.unique(done)).__call__, batch_format="pyarrow"
    )
    # Small blocks: a block is a file, and what a crash can cost.
    rows = rows.repartition(target_num_rows_per_block=arguments.rows_per_file)
    rows = rows.map_batches(
        Teacher,
        fn_constructor_args=(str(teacher), arguments.seconds_a_batch),
        compute=ray.data.ActorPoolStrategy(size=arguments.workers),
        batch_format="pyarrow",
        batch_size=arguments.batch_size,
        num_cpus=1,
    )
    # Appended to what is there: a file a block, checksums in its pages.
    rows.write_parquet(str(labels), write_page_checksum=True)


def distil(images, truth, labels):
    """Train a student on the stored rows; return its accuracy."""
    import keras

    from keras_ptloss import PTLoss, SoftLabels

    stored = SoftLabels.open(labels)
    keras.utils.set_random_seed(1)
    student = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(32, "relu"),
            keras.layers.Dense(CLASSES),
        ]
    )
    loss = PTLoss(0.0, from_logits=True, teacher_from_logits=False)
    student.compile(keras.optimizers.Adam(3e-3), loss=loss)
    pairs = stored.attach(images, shuffle=True, seed=0)
    student.fit(pairs, epochs=20, verbose=0)
    found = student.predict(images, verbose=0).argmax(axis=1)
    return float(np.mean(found == truth))


def main():
    """Run the whole example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default="ray-output")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--address", help="of a cluster, such as auto")
    parser.add_argument("--files", type=int, default=24)
    parser.add_argument("--rows-per-file", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seconds-a-batch", type=float, default=0.0)
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    labels = output / "labels"
    labels.mkdir(parents=True, exist_ok=True)
    start(arguments)
    images, truth = write_inputs(output / "inputs", arguments.files)
    train_teacher(images, truth, output / "teacher.keras")
    label(output / "inputs", output / "teacher.keras", labels, arguments)
    counts = collections.Counter(read_done(labels).tolist())
    twice = sum(count > 1 for count in counts.values())
    print(f"rows stored: {len(counts)} of {len(images)}, twice: {twice}")
    accuracy = distil(images, truth, labels)
    print(f"student, accuracy on these images: {100 * accuracy:.1f} %")


if __name__ == "__main__":
    main()
