"""Stored tokens: bytes, speed and memory, beside Parquet's lists.

    python benchmarks/speed/token_storage.py
    python benchmarks/speed/token_storage.py --top-k 16 --output FILE

`ours` is `TokenLabels`: packed ids, float16 log-probabilities, fingerprints,
checksums, brought to the disk batch by batch, verified on opening, and read by
`attach`. `parquet lists` are the same ids and numbers as lists of lists, uint32
and float16; `parquet bytes` the packed ids as lists of bytes, which is how
DistillKit has them; both compressed (zstd), without fingerprints, and read into
memory, as a row of them cannot be read alone. Each step runs in a process of
its own; memory is its peak above what it had after its imports, in batches of
16 sequences. The system's file cache is warm. Ids are random and values fall as
in texts, so ids do not compress.
"""

import argparse
import json
import pathlib
import tempfile

import numpy as np
from machine import (
    in_a_process,
    load_average,
    machine,
    measured,
    publish,
    written,
)

BATCH = 16
FORMATS = ("ours", "parquet lists", "parquet bytes")
STEPS = ("write", "in order", "shuffled")
OPTIONS = ("sequences", "longest", "top_k", "vocabulary")
# What DistillKit's documentation recommends for new captures.
RECOMMENDED = {
    "exact_k": 16,
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
    "term_dtype": "float32",
}


def texts(arguments):
    """Sequences of ids, of 1 to `longest` tokens."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, arguments.longest + 1, arguments.sequences)
    size = arguments.vocabulary
    return [random.integers(0, size, n).astype("int32") for n in lengths]


def entries(count, arguments):
    """A teacher's `(count, k, 2)`: ids and log-probabilities."""
    random = np.random.default_rng(count)
    k, size = arguments.top_k, arguments.vocabulary
    # Distinct within a row: each in a part of the vocabulary of its own.
    part = size // k
    ids = random.integers(0, part, (count, k)) + np.arange(k) * part
    ids = random.permuted(ids, axis=-1)
    logits = -1.2 * np.log(np.arange(1, k + 1) + random.random((count, k)))
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True) / 0.9)
    return np.stack([ids, logs], axis=-1)


def ours(path, arguments):
    """Write, or attach and read all batches."""
    from keras_ptloss.soft_labels import TokenLabels, TokenLabelSpec

    rows = texts(arguments)
    if arguments.step == "write":
        longest = max(map(len, rows))
        answer = entries(BATCH * longest, arguments)
        answer = answer.reshape(BATCH, longest, *answer.shape[1:])
        spec = TokenLabelSpec(
            top_k=arguments.top_k, vocabulary_size=arguments.vocabulary
        )
        yield
        TokenLabels.write(
            lambda x: answer[: len(x["token_ids"])],
            rows,
            path,
            spec=spec,
            batch_size=BATCH,
            verbose=0,
        )
        return
    yield
    shuffle = arguments.step == "shuffled"
    labels = TokenLabels.open(path)
    attached = labels.attach(rows, batch_size=BATCH, shuffle=shuffle, seed=0)
    for index in range(len(attached)):
        attached[index]


def parquet(path, arguments, packed):
    """Write lists of lists, or read them all, and lay them out in batches."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from keras_ptloss.soft_labels._tokens.packing import bits_of, pack, unpack

    bits, k = bits_of(arguments.vocabulary), arguments.top_k
    lengths = [len(row) for row in texts(arguments)]

    def nested(rows, dtype):
        flat = pa.array(np.ascontiguousarray(rows, dtype).reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])

    def table(some, answer):
        ids = answer[..., 0].astype("uint32")
        ids = nested(pack(ids, bits), "uint8") if packed else nested(ids, "u4")
        ends = np.concatenate([[0], np.cumsum(some)]).astype("int32")
        lists = [ids, nested(answer[..., 1], "float16")]
        columns = [pa.ListArray.from_arrays(pa.array(ends), x) for x in lists]
        return pa.table(columns, names=["ids", "log_values"])

    if arguments.step == "write":
        answer = entries(BATCH * max(lengths), arguments)
        yield
        writer = None
        for low in range(0, len(lengths), BATCH):
            some = lengths[low : low + BATCH]
            found = table(some, answer[: sum(some)])
            writer = writer or pq.ParquetWriter(
                path, found.schema, compression="zstd"
            )
            writer.write_table(found)
        writer.close()
        return
    yield
    found = pq.read_table(path).combine_chunks()
    columns = [found.column(n).chunk(0) for n in ("ids", "log_values")]
    order = np.arange(len(lengths))
    if arguments.step == "shuffled":
        order = np.random.default_rng(0).permutation(order)
    longest = max(lengths)
    for low in range(0, len(lengths), BATCH):
        y_true = np.zeros((BATCH, longest, k + 1, 2), "float32")
        for place, row in enumerate(order[low : low + BATCH]):
            ids, logs = (
                c[int(row)].values.flatten().to_numpy(zero_copy_only=False)
                for c in columns
            )
            ids = ids.reshape(lengths[row], -1)
            ids = unpack(ids, bits, k) if packed else ids
            y_true[place, : lengths[row], :k, 0] = ids
            y_true[place, : lengths[row], :k, 1] = logs.reshape(-1, k)


def measure(arguments):
    """One step of one format, in this process; prints JSON."""
    import keras_ptloss  # noqa: F401  before the clock starts

    path = arguments.folder / arguments.format.replace(" ", "_")
    if arguments.format == "ours":
        steps = ours(path, arguments)
    else:
        packed = arguments.format.endswith("bytes")
        steps = parquet(path, arguments, packed)
    print(json.dumps({**measured(steps), "size": written(path)}))


def run(arguments):
    """Measure all; return the table's lines."""
    tokens = sum(map(len, texts(arguments)))
    lines = [
        "| format | bytes a token | write, tokens/s | in order, tokens/s |"
        " shuffled, tokens/s | memory, MiB: write | in order | shuffled |",
        "|---|---|---|---|---|---|---|---|",
    ]
    options = {name: getattr(arguments, name) for name in OPTIONS}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name in FORMATS:
            found = []
            for step in STEPS:
                options |= {"folder": folder, "format": name, "step": step}
                found.append(in_a_process(__file__, options))
            cells = [f"{found[0]['size'] / tokens:.1f}"]
            cells += [f"{tokens / step['seconds']:,.0f}" for step in found]
            cells += [f"{step['memory']:.0f}" for step in found]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    return lines


def formats(arguments):
    """What a token has by the formats alone."""
    from keras_ptloss.soft_labels import TokenLabelSpec
    from keras_ptloss.soft_labels._tokens.distillkit import compressed_size
    from keras_ptloss.soft_labels._tokens.packing import bits_of, packed_size

    k, size = arguments.top_k, arguments.vocabulary
    own = TokenLabelSpec(top_k=k, vocabulary_size=size).token_bytes
    ids = packed_size(k, bits_of(size))
    theirs = ids + compressed_size(RECOMMENDED)
    text = (
        f"By the formats: {own} bytes a token here, {ids} of them ids and"
        f" {own - ids} numbers"
    )
    kept = RECOMMENDED["exact_k"]
    if k > kept:
        text += (
            f"; {theirs} in DistillKit's recommended configuration,"
            f" {theirs - ids} of them numbers: {kept} are kept, and the others"
            " are a polynomial's"
        )
    return f"{text}."


def main():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=400)
    parser.add_argument("--longest", type=int, default=512, help="tokens")
    parser.add_argument("--top-k", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=152_000)
    parser.add_argument("--folder", type=pathlib.Path)
    parser.add_argument("--output", type=pathlib.Path, help="to append to")
    parser.add_argument("--format", choices=FORMATS, help=argparse.SUPPRESS)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.format:
        measure(arguments)
        return
    load = load_average("at the start")
    lines = run(arguments)
    tokens = sum(map(len, texts(arguments)))
    title = f"## {tokens:,} tokens, top {arguments.top_k} of"
    title += f" {arguments.vocabulary:,}"
    note = machine(["keras", "numpy", "pyarrow"], load)
    publish(
        [title, "", note, "", *lines, "", formats(arguments)], arguments.output
    )


if __name__ == "__main__":
    main()
