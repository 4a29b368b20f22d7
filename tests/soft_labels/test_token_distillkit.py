"""Parquet files as DistillKit writes them, plain and compressed."""

import helpers
import numpy as np
import pytest
from token_stores import Teacher, V, softmax, texts, top

from keras_ptloss.soft_labels import TokenLabelSpec, import_token_labels

pytestmark = helpers.slow_but_on_one()

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
yaml = pytest.importorskip("yaml")

K = 8
CONFIG = {
    "d": V,
    "k": K,
    "exact_k": 3,
    "exact_dtype": "float32",
    "polynomial_terms": [0, 1, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
    "error_diffusion": False,
    "normalize_t": False,
}


def likeliest(tokens):
    logs = np.log(softmax(Teacher().rows(tokens)))
    ids = np.argsort(-logs, axis=-1)[:, :K]
    return ids, np.take_along_axis(logs, ids, -1)


def save(folder, rows, names, name="data_0.parquet"):
    folder.mkdir(exist_ok=True)
    columns = {
        name: [row[place] for row in rows] for place, name in enumerate(names)
    }
    pq.write_table(pa.table(columns), folder / name)


def read(folder, store, k=4, **options):
    return import_token_labels(
        folder,
        store,
        spec=TokenLabelSpec(top_k=k, vocabulary_size=V),
        format="distillkit",
        **options,
    )


def check(labels, row, tokens, k=4, last=-1, atol=1e-4):
    expected = top(Teacher().rows(tokens), k)[:last]
    found = labels[row]
    if last is not None:
        assert (found[-1, :, 0] == -2).all()
    np.testing.assert_array_equal(found[:last, :, 0], expected[..., 0])
    np.testing.assert_allclose(
        found[:last, :, 1], expected[..., 1], rtol=1e-3, atol=atol
    )


PLAIN = ("input_ids", "token_ids", "top_values")


@pytest.mark.parametrize("last", [-1, None])
def test_plain_lists(tmp_path, path, last):
    rows = [
        (tokens, *(a[:last].tolist() for a in likeliest(tokens)))
        for tokens in texts()
    ]
    save(tmp_path / "files", rows[:5], PLAIN, "data_0.parquet")
    save(tmp_path / "files", rows[5:], PLAIN, "data_1.parquet")
    report = read(tmp_path / "files", path, dataset=texts())
    assert report.missing == () and report.foreign == 0
    for row, tokens in enumerate(texts()):
        check(report.labels, row, tokens, last=last)


def digits(numbers, bits):
    """The bytes of numbers written in binary, one after the other."""
    text = "".join(f"{n:0{bits}b}" for n in numbers)
    text += "0" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8)


def half_of(values):
    """bfloat16: the upper half of float32, rounded."""
    words = np.asarray(values, "<f4").view("<u4")
    return ((words + 0x8000) >> 16).astype("<u2")


def compress(logs, config):
    """As DistillKit's documentation has it, a token at a time."""
    kinds = {"float32": "<f4", "float16": "<f2", "float64": "<f8"}

    def data(values, dtype):
        if dtype == "bfloat16":
            return half_of(values).tobytes()
        return np.asarray(values, kinds[dtype]).tobytes()

    if config["delta_encoding"]:
        logs = np.diff(logs, prepend=0.0)
    exact = config["exact_k"]
    out = data(logs[:exact], config["exact_dtype"])
    rest = logs[exact:]
    places = np.arange(len(rest), dtype=float)
    if config["normalize_t"]:
        places = np.linspace(0, 1, len(rest))
    columns = [
        np.sqrt(places) if term == "sqrt" else places**term
        for term in config["polynomial_terms"]
    ]
    if columns:
        a = np.stack(columns, -1)
        coefficients = np.linalg.lstsq(a, rest, rcond=None)[0]
        out += data(coefficients, config["term_dtype"])
        rest = rest - a @ coefficients
    place = 0
    for part in config["residual_bins"]:
        bits, count = part["element_bits"], part["num_elements"]
        values = rest[place : place + count]
        largest = 1 if bits == 1 else 2 ** (bits - 1)
        scale = max(np.abs(values).max() / largest, 1e-6)
        whole = np.round(values / scale)
        if bits == 1:
            whole = np.clip(whole, 0, 1)
        else:
            whole = np.clip(whole, -largest, largest - 1) + largest
        out += data([scale], part["scale_dtype"])
        out += digits(whole.astype(int), bits)
        place += count
    return list(out)


BINS = [
    {"scale_dtype": "float32", "element_bits": 12, "num_elements": 3},
    {"scale_dtype": "float16", "element_bits": 10, "num_elements": 2},
]


@pytest.mark.parametrize(
    ("change", "atol"),
    [
        ({"exact_k": K, "polynomial_terms": []}, 1e-4),
        ({"polynomial_terms": [0, 1, 2, 3, 4]}, 1e-3),
        ({"exact_dtype": "bfloat16", "residual_bins": BINS}, 0.03),
        ({"polynomial_terms": [], "residual_bins": BINS}, 0.02),
        ({"normalize_t": True, "residual_bins": BINS}, 0.02),
        (
            {
                "exact_k": 0,
                "delta_encoding": True,
                "polynomial_terms": list(range(8)),
                "term_dtype": "float64",
                "normalize_t": True,
            },
            1e-3,
        ),
    ],
)
def test_compressed(tmp_path, path, change, atol):
    config = {**CONFIG, **change}
    rows = []
    for tokens in texts():
        ids, logs = likeliest(tokens)
        rows.append(
            (
                tokens,
                [list(digits(row, 6)) for row in ids],
                [compress(row, config) for row in logs],
            )
        )
    names = ("input_ids", "bytepacked_indices", "compressed_logprobs")
    save(tmp_path / "files", rows, names)
    with pytest.raises(FileNotFoundError, match="compression_config.yaml"):
        read(tmp_path / "files", path)
    file = tmp_path / "files" / "compression_config.yaml"
    file.write_text(yaml.safe_dump(config))
    report = read(tmp_path / "files", path, k=K)
    for row, tokens in enumerate(texts()):
        found = report.labels[row]
        ids, logs = likeliest(tokens)
        for place in range(len(tokens)):
            order = np.argsort(found[place, :K, 0])
            mine = np.argsort(ids[place])
            np.testing.assert_array_equal(
                found[place, order, 0], ids[place][mine]
            )
            np.testing.assert_allclose(
                found[place, order, 1], logs[place][mine], rtol=6e-4, atol=atol
            )
    file.write_text(
        yaml.safe_dump({**config, "exact_k": config["exact_k"] + 1})
    )
    with pytest.raises(ValueError, match="row 0 of .*bytes a token where comp"):
        read(tmp_path / "files", tmp_path / "again")
    file.write_text("k: [")
    with pytest.raises(ValueError, match="`source` must be beside a valid"):
        read(tmp_path / "files", tmp_path / "again")


GOOD = ([3, 4], [[1, 2]], [[-1.0, -2.0]])


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (
            ([3, 4], [[1, 2]], [[-1.0, 0.5]]),
            "row 1 of .*data_0.*0.5, above 0",
        ),
        (([3, 4], [[1, 37]], GOOD[2]), "the id 37, and vocabulary_size is 37"),
        (([3, 4], [[1, 1]], GOOD[2]), "row 1 of .* has the id 1 twice, of tok"),
        (([3, 4, 5], *GOOD[1:]), "has 1 and 1 lists of 3 tokens: one each"),
        (([3, 4], [[1, 2, 3]], GOOD[2]), r"has lists of .1, 3. and .1, 2."),
        (
            ([3, 4], [[1, 2], [1]], [[-1.0, -2.0], [-1.0]]),
            r"lists of \[1, 2\] num",
        ),
        (([3, 4], None, GOOD[2]), "row 1 of .* has a null"),
        (([3, 4], [[1, None]], GOOD[2]), "row 1 of .* has a null"),
        (([3, 4], [[1, 2.5]], GOOD[2]), "has ids in float64, not whole"),
    ],
)
def test_rows_that_are_refused(tmp_path, path, row, match):
    save(tmp_path / "files", [GOOD, row], PLAIN)
    with pytest.raises(ValueError, match=match):
        read(tmp_path / "files", path, k=2)


def test_files_that_are_refused(tmp_path, path):
    folder = tmp_path / "files"
    save(folder, [GOOD], PLAIN)
    with pytest.raises(ValueError, match="`top_k` must be at most the 2 that"):
        read(folder, path, k=3)
    file = folder / "data_0.parquet"
    good = file.read_bytes()
    file.write_bytes(good[:-9])
    with pytest.raises(ValueError, match="data_0.parquet is unreadable"):
        read(folder, path)
    save(folder, [GOOD], ("input_ids", "token_ids", "values"))
    with pytest.raises(ValueError, match=r"has the columns \['input_ids'"):
        read(folder, path)


def test_entries_of_nothing(tmp_path, path):
    """DistillKit leaves -inf, and any id, where its server gave too few."""
    row = ([3, 4, 5], [[1, 2], [7, 7]], [[-1.0, -2.0], [-1.0, -np.inf]])
    save(tmp_path / "files", [row], PLAIN)
    report = read(tmp_path / "files", path, k=2)
    assert report.padded == 1
    assert report.labels[0][1, :, 0].tolist() == [7, -2, -1]
