"""Probabilities in CSV, JSON lines and Parquet."""

import json

import numpy as np
import pytest

from keras_ptloss.soft_labels import read_table

NAMES = ["negative", "neutral", "positive"]
ROWS = [[0.2, 0.1, 0.7], [0.6, 0.3, 0.1]]


def write(folder, columns, kind):
    """Write columns by a library that is not pyarrow's reader for the kind."""
    file = folder / f"table.{kind}"
    rows = list(zip(*columns.values(), strict=True))
    if kind == "csv":
        lines = [",".join(columns)]
        lines += [
            ",".join("" if v is None else str(v) for v in r) for r in rows
        ]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif kind == "jsonl":
        lines = [
            {k: v for k, v in zip(columns, r, strict=True) if v is not None}
            for r in rows
        ]
        file.write_text("\n".join(map(json.dumps, lines)))
    else:
        pd = pytest.importorskip("pandas")
        pd.DataFrame(columns).to_parquet(file)
    return file


@pytest.fixture(params=["csv", "jsonl", "parquet"])
def table(request, tmp_path):
    return lambda **columns: write(tmp_path, columns, request.param)


def columns(rows=ROWS, names=NAMES):
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def test_order_is_that_of_the_names(table):
    file = table(model=["m", "n"], **columns(), id=["007", "1"])
    found = read_table(file, NAMES[::-1])
    np.testing.assert_array_equal(found.probabilities, np.array(ROWS)[:, ::-1])
    assert found.ids == ["007", "1"]


def test_custom_id_counts_before_id(table):
    file = table(id=["r1", "r2"], custom_id=["b", "a"], **columns())
    assert read_table(file, NAMES).ids == ["b", "a"]


def test_several_files(table, tmp_path):
    file = table(**columns())
    found = read_table([file, file], NAMES)
    np.testing.assert_array_equal(found.probabilities, ROWS * 2)
    assert found.ids is None


def test_whole_numbers(table):
    file = table(**columns([[1, 0, 0], [0, 1, 0]]))
    np.testing.assert_array_equal(
        read_table(file, NAMES).probabilities, [[1, 0, 0], [0, 1, 0]]
    )


def test_misnamed_columns(table):
    names = ["negative", "neutral_score", "positive_score"]
    with pytest.raises(
        ValueError,
        match=r"\['neutral', 'positive'\] are missing.*neutral_score",
    ):
        read_table(table(**columns(names=names)), NAMES)


def test_an_empty_cell(table):
    """Not what the others leave: the column `other` has that."""
    file = table(
        question=["x", "y"],
        a=[0.04, 0.9],
        b=[0.003, 0.05],
        c=[None, 0.05],
        other=[0.957, 0.0],
    )
    with pytest.raises(ValueError, match="empty cell in column 'c', row 0"):
        read_table(file, ["a", "b", "c"])


def test_other_outcomes(table):
    file = table(**columns([[0.2, 0.1, 0.2], [0.6, 0.3, 0.1]]), none=[0.5, 0])
    with pytest.raises(ValueError, match=r"'none'.* sums to 0.5"):
        read_table(file, NAMES)
    file = table(**columns([[20, 10, 70], [60, 30, 10]]))
    with pytest.raises(ValueError, match="sum to one"):
        read_table(file, NAMES)


def test_texts_in_cells(table):
    with pytest.raises(ValueError, match="(?i)low|column|conversion"):
        read_table(table(**columns() | {"negative": ["low", "high"]}), NAMES)


def test_lists_of_probabilities(tmp_path):
    """Names no class, so it cannot be read: the error names all columns."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names = {"id": ["1", "2"], "custom_id": ["b", "a"]}
    some = pa.table(names | {"probabilities": [[0.3, 0.7], [0.2, 0.8]]})
    parquet.write_table(some, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="'custom_id', 'probabilities'"):
        read_table(tmp_path / "a.parquet", ["no", "yes"])


def test_other_kinds_of_files(tmp_path):
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(ValueError, match=r"\.csv, \.jsonl or \.parquet"):
        read_table(tmp_path / "a.xlsx", NAMES)
