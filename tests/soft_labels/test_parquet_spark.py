"""Parquet that Spark writes, which has no unsigned integers, and reads."""

import shutil

import numpy as np
import pytest
from stores import C, N, Teacher, features, write

from keras_ptloss.soft_labels import (
    SoftLabels,
    SoftLabelSpec,
    fingerprint,
    import_soft_labels,
)

pa = pytest.importorskip("pyarrow")
# Of the tools.
pytestmark = pytest.mark.filterwarnings("default")
IDS = [f"film {i}" for i in range(N)]


@pytest.fixture(scope="module")
def spark():
    sql = pytest.importorskip("pyspark.sql")
    if not shutil.which("java"):
        pytest.skip("Spark needs a Java runtime")
    builder = sql.SparkSession.builder.master("local[1]")
    session = builder.config("spark.ui.enabled", "false").getOrCreate()
    yield session
    session.stop()


@pytest.mark.slow
class TestSpark:
    # As the same 64 bits, or as the numbers they are.
    @pytest.mark.parametrize("kind", ["bigint", "decimal(20, 0)"])
    @pytest.mark.parametrize("dtype", ["float", "double"])
    def test_what_it_writes(self, spark, tmp_path, kind, dtype):
        x = features()
        rows = Teacher().rows(x)
        prints = fingerprint(x)
        if kind == "bigint":
            prints = prints.view("int64")
        frame = spark.createDataFrame(
            [
                (str(key), name, row)
                for key, name, row in zip(
                    prints, IDS, rows.tolist(), strict=True
                )
            ],
            f"text string, id string, probabilities array<{dtype}>",
        )
        frame = frame.selectExpr(
            f"cast(text as {kind}) as fingerprint", "id", "probabilities"
        )
        frame.repartition(3).write.parquet(str(tmp_path / "rows"))
        self.check(tmp_path, x, rows)

    def check(self, folder, x, rows):
        names = [file.name for file in (folder / "rows").iterdir()]
        assert "_SUCCESS" in names and "._SUCCESS.crc" in names
        assert sum(name.endswith(".snappy.parquet") for name in names) == 3
        labels = SoftLabels.open(folder / "rows")
        assert labels.shape == (N, C)
        soft = labels.attach(x, batch_size=N)[0][1]
        np.testing.assert_allclose(soft, rows, atol=1e-6)
        for ids in (None, IDS):
            report = import_soft_labels(
                folder / "rows", x, folder / f"store {ids is None}", ids=ids
            )
            np.testing.assert_allclose(report.labels[:], rows, atol=1e-6)

    def test_its_top_k(self, spark, tmp_path):
        x = features()
        rows = Teacher().rows(x)
        ids = np.argsort(-rows)[:, :2]
        logs = np.log(np.take_along_axis(rows, ids, -1))
        frame = spark.createDataFrame(
            list(
                zip(
                    fingerprint(x).view("int64").tolist(),
                    ids.tolist(),
                    logs.tolist(),
                    strict=True,
                )
            ),
            "fingerprint bigint, top_ids array<int>,"
            " top_log_probabilities array<float>",
        )
        frame.write.parquet(str(tmp_path / "rows"))
        spec = SoftLabelSpec(num_classes=C, dtype="float32")
        labels = SoftLabels.open(tmp_path / "rows", spec=spec)
        found = labels.attach(x, batch_size=N, targets="top_k")[0][1]
        np.testing.assert_array_equal(found[:, :2, 0], ids)
        np.testing.assert_allclose(found[:, :2, 1], logs, atol=1e-6)

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_it_reads_what_is_written(self, spark, path, tmp_path, dtype):
        labels = write(path, dtype=dtype)
        labels.to_parquet(tmp_path / "rows")
        found = spark.read.parquet(str(tmp_path / "rows")).collect()
        prints = [int(row["fingerprint"]) for row in found]
        np.testing.assert_array_equal(
            np.array(prints, "uint64"), labels.fingerprints
        )
        rows = np.array([row["probabilities"] for row in found])
        np.testing.assert_allclose(
            rows / rows.sum(-1, keepdims=True), labels[:], atol=1e-6
        )


def test_a_directory_of_its_shape(tmp_path):
    """The same without Spark: names, lists, integers and files beside."""
    import pyarrow.parquet as pq

    x = features()
    rows = Teacher().rows(x)
    folder = tmp_path / "rows"
    folder.mkdir()
    for part, some in enumerate(np.array_split(np.arange(N), 3)):
        table = pa.table(
            {
                "fingerprint": fingerprint(x)[some].view("int64"),
                "id": [IDS[i] for i in some],
                "probabilities": pa.array(
                    rows[some].tolist(), pa.list_(pa.float32())
                ),
            }
        )
        name = f"part-{part:05d}-c000.snappy.parquet"
        pq.write_table(table, folder / name, compression="snappy")
        (folder / f".{name}.crc").write_bytes(b"crc\0\0\0\2\0")
    (folder / "_SUCCESS").touch()
    (folder / "._SUCCESS.crc").write_bytes(b"crc\0\0\0\2\0")
    # Of an attempt that did not end.
    (folder / "_temporary" / "0").mkdir(parents=True)
    TestSpark().check(tmp_path, x, rows)
