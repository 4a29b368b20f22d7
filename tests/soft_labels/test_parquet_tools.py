"""Parquet files written and read by the tools that people have."""

import helpers
import numpy as np
import pytest
from stores import C, N, Teacher, features, softmax, write

from keras_ptloss.soft_labels import (
    SoftLabels,
    SoftLabelSpec,
    fingerprint,
    import_soft_labels,
)

pytestmark = helpers.slow_but_on_one()

pa = pytest.importorskip("pyarrow")


# Writers take columns of numbers `(N,)`, texts, and rows `(N, width)`.


def pandas(folder, columns):
    tool = pytest.importorskip("pandas")
    lists = {
        name: list(column) if np.ndim(column) == 2 else column
        for name, column in columns.items()
    }
    tool.DataFrame(lists).to_parquet(folder / "a.parquet")


def pandas_reads(file):
    tool = pytest.importorskip("pandas")
    frame = tool.read_parquet(file)
    return frame["fingerprint"], np.stack(frame["probabilities"])


def polars(folder, columns):
    tool = pytest.importorskip("polars")
    tool.DataFrame(columns).write_parquet(folder / "a.parquet")


def polars_reads(file):
    tool = pytest.importorskip("polars")
    frame = tool.read_parquet(file)
    return frame["fingerprint"], np.stack(frame["probabilities"].to_list())


def polars_lists(folder, columns):
    tool = pytest.importorskip("polars")
    lists = {
        name: column.tolist() if np.ndim(column) == 2 else column
        for name, column in columns.items()
    }
    frame = tool.DataFrame(lists)
    frame.write_parquet(folder / "a.parquet", use_pyarrow=False)


DUCKDB_TYPES = {
    "fingerprint": "ubigint",
    "id": "varchar",
    "probabilities": "float[]",
    "top_ids": "integer[]",
    "top_log_probabilities": "float[]",
    "log_tail": "double",
}


def duckdb(folder, columns):
    tool = pytest.importorskip("duckdb")
    types = ", ".join(f"{name} {DUCKDB_TYPES[name]}" for name in columns)
    marks = ", ".join("?" * len(columns))
    with tool.connect() as connection:
        connection.execute(f"create table t ({types})")
        for low in range(0, N, 20):
            some = [
                np.asarray(column)[low : low + 20].tolist()
                for column in columns.values()
            ]
            connection.executemany(
                f"insert into t values ({marks})",
                list(zip(*some, strict=True)),
            )
        connection.execute(
            f"copy (from t order by id desc) to '{folder}/a.parquet'"
        )


def test_uuids_of_duckdb(tmp_path):
    tool = pytest.importorskip("duckdb")
    source = tmp_path / "a.parquet"
    with tool.connect() as connection:
        connection.execute(
            "create table t as select uuid() as id, [x / 5, 1 - x / 5]::float[]"
            " as probabilities from range(5) r(x)"
        )
        connection.execute(f"copy (from t order by id) to '{source}'")
        found = connection.execute("from t").fetchall()
    ids, rows = zip(*found, strict=True)
    x = np.arange(5)
    report = import_soft_labels(source, x, tmp_path / "store", ids=ids)
    np.testing.assert_allclose(report.labels[:], rows, atol=1e-3)


def duckdb_reads(file):
    tool = pytest.importorskip("duckdb")
    with tool.connect() as connection:
        found = connection.execute(
            f"select fingerprint, probabilities from '{file}'"
        ).fetchall()
    prints, rows = zip(*found, strict=True)
    return prints, np.array(rows)


def hf_datasets(folder, columns):
    tool = pytest.importorskip("datasets")
    data = tool.Dataset.from_dict(columns)
    data.shuffle(seed=0).to_parquet(str(folder / "a.parquet"))


def hf_datasets_reads(file):
    tool = pytest.importorskip("datasets")
    cache = str(file.parent / "cache")
    data = tool.Dataset.from_parquet(str(file), cache_dir=cache)
    data = data.with_format("numpy")[:]
    return data["fingerprint"], np.stack(data["probabilities"])


WRITERS = (pandas, polars, polars_lists, duckdb, hf_datasets)
READERS = (pandas_reads, polars_reads, duckdb_reads, hf_datasets_reads)


@pytest.mark.filterwarnings("default")  # of the tools
@pytest.mark.parametrize("tool", WRITERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_they_write_is_attached(tmp_path, tool, dtype):
    x = features()
    rows = Teacher().rows(x).astype(dtype)
    ids = [f"film {i}" for i in range(N)]
    (tmp_path / "rows").mkdir()
    columns = {"fingerprint": fingerprint(x), "id": ids, "probabilities": rows}
    tool(tmp_path / "rows", columns)
    labels = SoftLabels.open(tmp_path / "rows")
    assert labels.shape == (N, C)
    inputs, soft = labels.attach(x, batch_size=N)[0]
    np.testing.assert_array_equal(inputs, x)
    np.testing.assert_allclose(soft, rows, atol=1e-6)
    report = import_soft_labels(
        tmp_path / "rows", x, tmp_path / "store", ids=ids
    )
    np.testing.assert_allclose(report.labels[:], rows, atol=1e-6)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("tool", WRITERS)
@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("with_tail", [False, True])
def test_the_k_largest_that_they_write(tmp_path, tool, dtype, with_tail):
    """By fingerprint and by id, as rows and as targets of a loss."""
    x, k = features(), 2
    rows = Teacher().rows(x).astype("float64")
    top = np.argsort(-rows, axis=-1)[:, :k]
    shares = np.take_along_axis(rows, top, -1)
    rest = 1 - shares.sum(-1, keepdims=True)
    columns = {
        "fingerprint": fingerprint(x),
        "id": [f"film {i}" for i in range(N)],
        "top_ids": top.astype(dtype),
        "top_log_probabilities": np.log(shares),
    }
    if with_tail:
        columns["log_tail"] = np.log(rest[:, 0])
    (tmp_path / "rows").mkdir()
    tool(tmp_path / "rows", columns)
    spec = SoftLabelSpec(num_classes=C, dtype="float32")
    labels = SoftLabels.open(tmp_path / "rows", spec=spec)
    expected = np.repeat(rest / (C - k), C, axis=-1)
    np.put_along_axis(expected, top, shares, -1)
    attached = labels.attach(x, batch_size=N)[0][1]
    np.testing.assert_allclose(attached, expected, atol=1e-5)
    report = import_soft_labels(
        tmp_path / "rows",
        x,
        tmp_path / "store",
        spec=spec,
        ids=columns["id"],
    )
    np.testing.assert_allclose(report.labels[:], expected, atol=1e-5)
    targets = report.labels.top_k_targets[:]
    np.testing.assert_array_equal(targets[:, :k, 0], top)
    logs = np.log(np.concatenate([shares, rest], axis=-1))
    np.testing.assert_allclose(targets[..., 1], logs, atol=1e-4)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("tool", READERS)
def test_they_read_what_is_written(path, tmp_path, tool):
    labels = write(path)
    labels.to_parquet(tmp_path / "rows")
    prints, rows = tool(tmp_path / "rows" / "part-00000.parquet")
    np.testing.assert_array_equal(
        np.asarray(prints, "uint64"), labels.fingerprints
    )
    # Stored as float16, which is why they are divided by their sum when read.
    np.testing.assert_allclose(
        rows / rows.sum(-1, keepdims=True), labels[:], atol=1e-6
    )


def ray_tensors(rows):
    """What Ray Data writes of arrays, as a machine without Ray sees it."""
    storage = pa.array(rows.tolist(), pa.large_list(pa.float32()))

    class Tensors(pa.ExtensionType):
        def __init__(self):
            super().__init__(storage.type, "tests.tensors")

        def __arrow_ext_serialize__(self):
            return b"[4]"

        @classmethod
        def __arrow_ext_deserialize__(cls, storage_type, serialized):
            return cls()

    return Tensors, pa.ExtensionArray.from_storage(Tensors(), storage)


@pytest.mark.parametrize("known", [True, False])
def test_extension_types(tmp_path, known):
    rows = softmax(features() @ Teacher().weights)
    kind, column = ray_tensors(rows)
    table = pa.table(
        {"fingerprint": fingerprint(features()), "probabilities": column}
    )
    import pyarrow.parquet as pq

    pq.write_table(table, tmp_path / "a.parquet")
    if known:
        pa.register_extension_type(kind())
    try:
        labels = SoftLabels.open(tmp_path)
    finally:
        if known:
            pa.unregister_extension_type("tests.tensors")
    np.testing.assert_allclose(labels[:], rows, atol=1e-6)
