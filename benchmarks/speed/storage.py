"""Stored soft labels in four formats: size, speed and memory, in one run.

    python benchmarks/speed/storage.py --output benchmarks/results/storage.md
    python benchmarks/speed/storage.py --rows 1000000
    python benchmarks/speed/storage.py --rows 1000000 --top-k 16
    python benchmarks/speed/storage.py --rows 1000000 --formats ours parquet

Ours, Parquet (`to_parquet`, `open`), ArrayRecord as Grain reads it (left out
where Grain is not installed), and bare `.npy` memory maps without fingerprints
or checksums. Rows are random softmaxes, kept as float16, or as the k largest.
Each format is written, read in order, and read shuffled, in batches of float32
rows, each step in a process of its own, whose peak memory above what it had
after its imports is measured. The system's file cache is warm.
"""

import argparse
import json
import os
import pathlib
import platform
import tempfile

import numpy as np
from machine import in_a_process, measured, publish, written

BATCH = 1024
BLOCK = 4096
FORMATS = ("ours", "parquet", "array_record", "npy")
STEPS = ("write", "sequential", "shuffled")


def block(low, arguments):
    """The rows from `low` on, `(n, C)` float64, the same in every process."""
    count = min(BLOCK, arguments.rows - low)
    generator = np.random.default_rng(low)
    logits = 2 * generator.standard_normal(
        (count, arguments.classes), "float32"
    )
    rows = np.exp(logits.astype("float64"))
    return rows / rows.sum(-1, keepdims=True)


def spec_of(arguments):
    """What is stored."""
    from keras_ptloss.soft_labels import SoftLabelSpec

    return SoftLabelSpec(num_examples=arguments.rows, top_k=arguments.top_k)


def encoded(low, arguments):
    """The arrays that a block is stored as."""
    from keras_ptloss.soft_labels._spec import encode

    return encode(spec_of(arguments), block(low, arguments))


def decoded(arrays, arguments):
    """Float32 rows of stored arrays."""
    from keras_ptloss.soft_labels._spec import decode

    return decode(spec_of(arguments), arrays, arguments.classes)


def batches(arguments):
    """Yield the positions of each batch, in order or shuffled."""
    order = np.arange(arguments.rows)
    if arguments.step == "shuffled":
        order = np.random.default_rng(1).permutation(arguments.rows)
    for low in range(0, arguments.rows, BATCH):
        yield order[low : low + BATCH]


def numbers(arguments):
    """Examples made on the fly, so that they take no memory."""
    import keras

    class Numbers(keras.utils.PyDataset):
        def __len__(self):
            return -(-arguments.rows // BLOCK)

        def __getitem__(self, index):
            low = index * BLOCK
            return (np.arange(low, min(low + BLOCK, arguments.rows)),)

    return Numbers()


def ours(path, arguments):
    """`SoftLabels.write` and `open`, with fingerprints and checksums."""
    from keras_ptloss import SoftLabels

    if arguments.step == "write":
        yield
        SoftLabels.write(
            lambda x: block(int(x[0]), arguments),
            numbers(arguments),
            path,
            spec=spec_of(arguments),
            verbose=0,
        )
        return
    yield
    read_store(path, arguments)


def read_store(path, arguments):
    """Open what `SoftLabels` opens, and read its rows."""
    from keras_ptloss import SoftLabels

    labels = SoftLabels.open(path)
    for positions in batches(arguments):
        labels[positions]


def parquet(path, arguments):
    """`to_parquet`, of a store of ours, and `open`, which reads it whole."""
    import pyarrow.parquet  # noqa: F401

    from keras_ptloss import SoftLabels

    if arguments.step == "write":
        labels = SoftLabels.open(path.with_name("ours"), verify=False)
        yield
        labels.to_parquet(path)
        return
    yield
    read_store(path, arguments)


def array_record(path, arguments):
    """One record a row, the bytes of its arrays, as Grain's source reads it."""
    import grain
    from array_record.python.array_record_module import ArrayRecordWriter

    file = str(path) + ".array_record"
    arrays = encoded(0, argparse.Namespace(**{**vars(arguments), "rows": 2}))
    kinds = [
        (name, array.dtype, array.shape[1:]) for name, array in arrays.items()
    ]
    kind = np.dtype(kinds)
    if arguments.step == "write":
        yield
        writer = ArrayRecordWriter(file, "group_size:1")
        for low in range(0, arguments.rows, BLOCK):
            arrays = encoded(low, arguments)
            count = len(next(iter(arrays.values())))
            records = np.empty(count, kind)
            for name, array in arrays.items():
                records[name] = array
            for record in records:
                writer.write(record.tobytes())
        writer.close()
        return
    yield
    source = grain.sources.ArrayRecordDataSource(file)
    for positions in batches(arguments):
        records = b"".join(source.__getitems__(positions.tolist()))
        records = np.frombuffer(records, kind)
        decoded({name: records[name] for name in kind.names}, arguments)


def npy(path, arguments):
    """A memory map an array, and nothing else."""
    path.mkdir(exist_ok=True)
    if arguments.step == "write":
        yield
        files = {}
        for low in range(0, arguments.rows, BLOCK):
            for name, array in encoded(low, arguments).items():
                if name not in files:
                    files[name] = np.lib.format.open_memmap(
                        path / f"{name}.npy",
                        mode="w+",
                        dtype=array.dtype,
                        shape=(arguments.rows, *array.shape[1:]),
                    )
                files[name][low : low + len(array)] = array
        for file in files.values():
            file.flush()
        return
    yield
    files = {f.stem: np.load(f, mmap_mode="r") for f in path.iterdir()}
    for positions in batches(arguments):
        rows = {name: file[positions] for name, file in files.items()}
        decoded(rows, arguments)


def measure(arguments):
    """One step of one format, in this process; prints JSON."""
    import keras_ptloss  # noqa: F401  before the clock starts, in every step

    path = arguments.folder / arguments.format
    steps = globals()[arguments.format](path, arguments)
    print(json.dumps(measured(steps)))


def installed():
    """The formats that can be measured here."""
    try:
        import array_record  # noqa: F401
        import grain  # noqa: F401
    except ImportError:
        return [name for name in FORMATS if name != "array_record"]
    return list(FORMATS)


def run(arguments):
    """Measure all; return the table's lines."""
    lines = [
        "| format | MB | write, rows/s | in order, rows/s | shuffled, rows/s |"
        " memory, MiB: write | in order | shuffled |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name in arguments.formats or installed():
            found = {}
            for step in STEPS:
                found[step] = in_a_process(
                    __file__,
                    {
                        "folder": folder,
                        "rows": arguments.rows,
                        "format": name,
                        "classes": arguments.classes,
                        "step": step,
                        "top_k": arguments.top_k,
                    },
                )
            rates = [arguments.rows / found[s]["seconds"] for s in STEPS]
            size = written(*pathlib.Path(folder).glob(f"{name}*"))
            cells = [f"{size / 1e6:.1f}"]
            cells += [f"{rate:,.0f}" for rate in rates]
            cells += [f"{found[step]['memory']:.0f}" for step in STEPS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    return lines


def main():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--folder", type=pathlib.Path)
    parser.add_argument("--output", type=pathlib.Path, help="to append to")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, help="or all")
    parser.add_argument("--format", choices=FORMATS, help=argparse.SUPPRESS)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.format:
        measure(arguments)
        return
    lines = run(arguments)
    kept = f"top-{arguments.top_k} of " if arguments.top_k else ""
    title = f"## {arguments.rows:,} rows, {kept}{arguments.classes} classes"
    load = ", ".join(f"{value:.0f}" for value in os.getloadavg())
    note = (
        f"{os.cpu_count()} cores, load {load}; Python"
        f" {platform.python_version()}, NumPy {np.__version__}."
    )
    publish([title, "", note, "", *lines], arguments.output)


if __name__ == "__main__":
    main()
