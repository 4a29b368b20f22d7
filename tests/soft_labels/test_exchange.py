"""Stores and Parquet files in the hands of other tools."""

import numpy as np
import pytest

from keras_ptloss import SoftLabels
from keras_ptloss.soft_labels import read_table

NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).dirichlet(np.ones(3), 50)


@pytest.fixture(scope="module", params=["probabilities", "top_k", "tokens"])
def labels(request, rows, tmp_path_factory):
    """Make a store of each kind."""
    path = tmp_path_factory.mktemp("stores") / request.param
    options = {"ids": [f"n{i}" for i in range(50)], "class_names": NAMES}
    if request.param == "tokens":
        ids = np.arange(200).reshape(50, 4)
        mask = np.arange(4) < np.arange(50)[:, None] % 4 + 1
        x = {"token_ids": ids, "padding_mask": mask.astype(int)}
        values = np.repeat(rows[:, None], 4, 1)
        return SoftLabels.from_array(values, path, inputs=x, top_k=2, **options)
    top_k = 2 if request.param == "top_k" else None
    return SoftLabels.from_array(
        rows, path, inputs=np.arange(50), top_k=top_k, **options
    )


def check_same(found, labels):
    np.testing.assert_array_equal(found.read(), labels.read())
    one, other = (one.to_arrow().read_all() for one in (found, labels))
    assert one["fingerprint"].equals(other["fingerprint"])
    assert one["id"].equals(other["id"])
    assert found.layout == labels.layout


@pytest.mark.parametrize("in_memory", [True, False])
def test_parquet_loses_nothing(labels, in_memory, tmp_path):
    labels.to_parquet(tmp_path / "a.parquet")
    path = None if in_memory else tmp_path / "a"
    check_same(SoftLabels.from_parquet(tmp_path / "a.parquet", path), labels)


def test_a_failed_export_leaves_nothing(labels, tmp_path, monkeypatch):
    from pyarrow import parquet

    def fails(*_):
        raise OSError("full")

    with monkeypatch.context() as patch:
        patch.setattr(parquet.ParquetWriter, "write_batch", fails)
        with pytest.raises(OSError):
            labels.to_parquet(tmp_path / "a.parquet")
    assert not list(tmp_path.iterdir())


def test_parquet_of_others_is_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"a": [0.5]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"read_table.*\['a'\]"):
        SoftLabels.from_parquet(tmp_path / "a.parquet")


def first_column(labels):
    """Return name and values of the first column of numbers, as lists."""
    kind = labels.layout.kind
    if kind == "probabilities":
        return "probabilities", labels.read()
    found = labels.read()
    if kind == "top_k":
        return "log_probs", found[:, :2, 1]
    return "log_probs", [row[row[:, 0, 0] >= 0, :2, 1] for row in found]


def check_column(column, labels):
    for found, right in zip(column, first_column(labels)[1], strict=True):
        found = np.array([list(f) if np.ndim(f) else f for f in found])
        np.testing.assert_array_equal(found.astype("float32"), right)


class TestFilesAsTheyAre:
    def test_polars(self, labels):
        pl = pytest.importorskip("polars")
        table = pl.read_ipc(labels.path / "*.arrow")
        check_column(table[first_column(labels)[0]].to_list(), labels)
        assert table["id"].to_list() == [f"n{i}" for i in range(50)]

    def test_pandas(self, labels):
        pd = pytest.importorskip("pandas")
        (file,) = labels.path.glob("*.arrow")
        table = pd.read_feather(file)
        check_column(table[first_column(labels)[0]], labels)

    def test_hugging_face(self, labels, tmp_path):
        datasets = pytest.importorskip("datasets")
        data = datasets.load_dataset(
            "arrow",
            data_files=str(labels.path / "*.arrow"),
            cache_dir=str(tmp_path),
            split="train",
        )
        check_column(data[first_column(labels)[0]], labels)

    def test_duckdb_takes_the_float32_reader(self, labels):
        duckdb = pytest.importorskip("duckdb")
        reader = labels.to_arrow()  # noqa: F841 DuckDB finds it by name
        name = first_column(labels)[0]
        found = duckdb.sql(f"select {name} from reader").fetchall()
        check_column([row[0] for row in found], labels)


def write_polars(columns, file):
    pytest.importorskip("polars").DataFrame(columns).write_parquet(file)


def write_pandas(columns, file):
    pytest.importorskip("pandas").DataFrame(columns).to_parquet(file)


def write_duckdb(columns, file):
    duckdb = pytest.importorskip("duckdb")
    columns_ = pytest.importorskip("pyarrow").table(columns)  # noqa: F841
    duckdb.sql("select * from columns_").write_parquet(str(file))


def write_hugging_face(columns, file):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(columns).to_parquet(str(file))


@pytest.mark.parametrize(
    "write", [write_polars, write_pandas, write_duckdb, write_hugging_face]
)
def test_parquet_written_by_others(write, rows, tmp_path):
    columns = dict(zip(NAMES, rows.T.tolist(), strict=True))
    columns["id"] = [f"n{i}" for i in range(50)]
    write(columns, tmp_path / "a.parquet")
    table = read_table(tmp_path / "a.parquet", NAMES)
    labels = SoftLabels.from_array(
        table.probabilities, ids=table.ids, class_names=NAMES, dtype="float32"
    )
    np.testing.assert_allclose(labels, rows, 1e-6)
    np.testing.assert_array_equal(labels.find(ids=columns["id"]), range(50))
