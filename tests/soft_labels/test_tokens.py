"""Stored tokens: what is written is read, of whatever sequences."""

import pickle

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import Batches, tf_dataset
from token_stores import Teacher, V, texts, top, write

from keras_ptloss.losses import TopKPTLoss
from keras_ptloss.soft_labels import TokenLabels, TokenLabelSpec, fingerprint
from keras_ptloss.soft_labels._tokens.packing import pack, packed_size, unpack

HALF = 2.0**-11  # of float16, relative
LEAST = 2.0**-25  # of its smallest numbers, absolute


def assert_stored(found, expected):
    """Ids exact, log-probabilities within float16's rounding (and 1e-6)."""
    np.testing.assert_array_equal(found[..., 0], expected[..., 0])
    np.testing.assert_allclose(
        found[..., 1], expected[..., 1], rtol=1.01 * HALF, atol=LEAST + 1e-6
    )


@pytest.mark.parametrize("bits", range(1, 25))
def test_packing_is_exact(bits):
    random = np.random.default_rng(bits)
    for k in (1, 2, 3, 16, 21):
        numbers = random.integers(0, 1 << bits, (50, k))
        numbers[0], numbers[1] = 0, (1 << bits) - 1
        packed = pack(numbers, bits)
        assert packed.shape == (50, packed_size(k, bits))
        np.testing.assert_array_equal(unpack(packed, bits, k), numbers)
        # An oracle: the digits, written one after the other.
        digits = "".join(f"{n:0{bits}b}" for n in numbers[2])
        digits += "0" * (-len(digits) % 8)
        assert packed[2].tobytes() == int(digits, 2).to_bytes(len(digits) // 8)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_packing_of_any_numbers(data):
    size = data.draw(st.integers(2, 2**24))
    bits = max(1, int(np.ceil(np.log2(size))))
    numbers = np.array(
        [data.draw(st.lists(st.integers(0, size - 1), min_size=1))]
    )
    packed = pack(numbers, bits)
    np.testing.assert_array_equal(
        unpack(packed, bits, numbers.shape[1]), numbers
    )


@pytest.mark.parametrize(
    ("logits", "k"), [(True, 1), (True, 4), (True, V), (False, 4)]
)
def test_round_trip(path, logits, k):
    teacher = Teacher(logits=logits)
    labels = write(path, teacher, k=k)
    assert len(labels) == 12 and labels.vocabulary_size == V
    assert labels.num_tokens == sum(map(len, texts()))
    for row, tokens in enumerate(texts()):
        assert_stored(labels[row], top(teacher.rows(tokens), k))
        (found,) = fingerprint(np.array([tokens], "int32"))
        assert labels.fingerprints[row] == found
    with pytest.raises(IndexError):
        labels[12]
    assert len(list(labels)) == 12
    assert "12 sequences" in repr(labels)


def test_error_of_storing_is_measured(path):
    teacher = Teacher()
    labels = write(path, teacher)
    distances = []
    for row, tokens in enumerate(texts()):
        one, two = (
            np.exp(t[..., 1].astype("float64"))
            for t in (labels[row], top(teacher.rows(tokens), 4))
        )
        one, two = (m / m.sum(-1, keepdims=True) for m in (one, two))
        distances.append(0.5 * np.abs(one - two).sum(-1))
    distances = np.concatenate(distances)
    assert labels.mean_total_variation == pytest.approx(
        distances.mean(), rel=0.02
    )
    assert labels.max_total_variation == pytest.approx(
        distances.max(), rel=0.02
    )
    assert 0 < labels.max_total_variation < 1e-3


def test_keras_model_of_a_vocabulary(path):
    """The likeliest are taken where the model runs; padding is not stored."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            keras.layers.Embedding(V, 8),
            keras.layers.Dropout(0.9),
            keras.layers.Dense(V),
        ]
    )
    x = np.random.default_rng(0).integers(0, V, (7, 6))
    labels = write(path, model, x, k=3)
    expected = top(keras.ops.convert_to_numpy(model(x, training=False)), 3)
    for row in range(7):
        assert_stored(labels[row], expected[row])


def test_tail_that_is_next_to_nothing(path):
    """`1 - sum` has no digits of a tail of exp(-30)."""
    rows = np.full((1, 2, V), -34.0)
    rows[..., 3] = 0.0
    labels = write(path, lambda x: rows, np.array([[1, 2]]), k=1)
    assert labels[0][0, 1, 1] == pytest.approx(np.log(V - 1) - 34, rel=HALF)


def test_loss_on_what_is_read_is_that_on_what_was_given(path):
    teacher, k = Teacher(), 4
    labels = write(path, teacher, k=k)
    x, y_true, weight = labels.attach(texts(), batch_size=12)[0]
    given = top(teacher.rows(x["token_ids"]), k)
    student = np.random.default_rng(3).normal(size=(*weight.shape, V))
    loss = TopKPTLoss([0.3, 0.1], from_logits=True, reduction=None)
    one, two = (
        keras.ops.convert_to_numpy(
            loss(y.astype("float32"), student.astype("float32"))
        )
        for y in (y_true, given)
    )
    real = x["padding_mask"] == 1
    np.testing.assert_array_equal(weight, real)
    # The gradient of the loss to log t is at most some nats.
    logs = np.abs(given[..., 1])
    bound = 10 * HALF * (np.exp(-logs) * logs).sum(-1) + 1e-5
    assert (np.abs(one - two)[real] <= bound[real]).all()
    assert (one[~real] == 0).all()


def test_entries_of_a_teacher_that_gives_no_rows(path):
    rows = np.log([0.4, 0.3, 0.2])
    entries = np.stack([[5, 36, 0], rows], axis=-1)
    padded = np.array([[2, np.log(0.9)], [-2, 7.0], [-5, 0.0]])
    with_tail = np.array(
        [[4, np.log(0.5)], [-1, np.log(0.3)], [9, np.log(0.2)]]
    )

    def api(batch):
        return np.array([[entries, padded, with_tail]])

    labels = write(path, api, [[1, 2, 3]], k=2, vocabulary_size=V)
    tail = np.log([0.3, 0.1, 0.3])
    expected = np.zeros((3, 3, 2))
    expected[0] = [[5, rows[0]], [36, rows[1]], [-1, tail[0]]]
    expected[1] = [[2, np.log(0.9)], [-2, 0], [-1, tail[1]]]
    expected[2] = [[4, np.log(0.5)], [9, np.log(0.2)], [-1, tail[2]]]
    assert_stored(labels[0], expected)


def test_weights_say_what_is_stored(path):
    x = {
        "token_ids": np.arange(18).reshape(3, 6) % V,
        "padding_mask": np.array([[1] * 6, [0, 0, 1, 1, 1, 1], [1] * 6]),
    }
    weight = np.array([[0, 0, 1, 2, 0, 1], [1] * 6, [0] * 6])
    teacher = Teacher(entries=2)
    labels = write(path, teacher, x, sample_weight=weight, k=2)
    assert labels.counts.tolist() == [3, 4, 0]
    assert labels.lengths.tolist() == [6, 4, 6]
    kept = (weight > 0) & (x["padding_mask"] > 0)
    _, y_true, found = labels.attach(x, batch_size=3)[0]
    np.testing.assert_array_equal(found, kept)
    expected = top(teacher.rows(x["token_ids"]), 2)
    assert_stored(y_true[kept], expected[kept])
    assert (y_true[~kept][..., 0] == -2).all()
    # The batches' own weights count too.
    _, _, found = labels.attach(
        Batches(x["token_ids"][:1], weight[:1], weight[:1])
    )[0]
    np.testing.assert_array_equal(found, weight[:1])


@pytest.mark.parametrize("fail_at", [None, 5])
def test_weights_of_what_is_stored_stay(path, fail_at):
    """In a complete store, and in one that is gone on with; 10 to 17 bits."""
    rows = [[n, *range(n + 9)] for n in range(8)]
    weight = np.ones((8, 17), "float32")
    weight[:, [0, 3]] = 0
    teacher = Teacher(entries=4, fail_at=fail_at)
    try:
        write(path, teacher, rows, sample_weight=weight)
    except RuntimeError:
        assert teacher.asked == fail_at
    teacher.fail_at = None
    asked = teacher.asked
    for row, token in ((0, 0), (3, 11), (4, 1)):
        other = np.array(weight)
        other[row, token] = 1 - other[row, token]
        for wrong in (other, None):
            number = 0 if wrong is None else row
            with pytest.raises(
                ValueError,
                match="`sample_weight` must be 0 for the tokens that it was 0"
                f".*sequence {number}, of which other",
            ):
                write(path, teacher, rows, sample_weight=wrong, batch_size=3)
    assert teacher.asked == asked
    # What lies beyond a sequence, and how much a token weighs, is not stored.
    weight[2, 14:] = 0
    weight[1, 2] = 0.5
    labels = write(path, teacher, rows, sample_weight=weight, batch_size=3)
    assert teacher.asked == 8
    assert labels.counts.tolist() == [8 + n for n in range(8)]


def test_any_order_part_and_padding(path):
    teacher = Teacher(entries=4)
    labels = write(path, teacher)
    some = [texts()[i] for i in (7, 0, 3)]
    width = max(map(len, some)) + 2
    ids, mask = np.zeros((2, 3, width), "int64")
    for row, tokens in enumerate(some):  # padded on the left
        ids[row, width - len(tokens) :] = tokens
        mask[row, width - len(tokens) :] = 1
    x = {"input_ids": ids, "attention_mask": mask}
    assert labels.rows_of(x).tolist() == [7, 0, 3]
    _, y_true, weight = labels.attach(x, batch_size=3)[0]
    np.testing.assert_array_equal(weight, mask)
    for row, number in enumerate((7, 0, 3)):
        np.testing.assert_array_equal(
            y_true[row][mask[row] == 1], labels[number]
        )


def test_equal_sequences_keep_their_own_weights(path):
    x, weight = (
        np.tile(np.arange(4), (2, 1)),
        np.array([[1, 1, 0, 0], [0, 0, 1, 1]]),
    )
    labels = write(path, Teacher(entries=4), x, sample_weight=weight)
    np.testing.assert_array_equal(labels.attach(x)[0][2], weight)


def test_missing_and_foreign_sequences_are_told(path):
    labels = write(path)
    changed = [*texts()[3:], [36, 36], [35]]
    rows = labels.rows_of(changed)
    assert rows.tolist() == [*range(3, 12), -1, -1]
    assert np.setdiff1d(np.arange(len(labels)), rows).tolist() == [0, 1, 2]
    with pytest.raises(
        ValueError,
        match=r"Received: sequence 9, \[36 36\] of 2 tokens, which is not"
        r" \(2 of the 11 compared are not; `rows_of`",
    ):
        labels.attach(changed)


@pytest.mark.parametrize("form", ["array", "pydataset", "tf", "grain"])
def test_forms_of_a_data_set(path, form):
    x = np.random.default_rng(0).integers(0, V, (10, 6)).astype("int32")
    y = np.zeros_like(x)
    weight = np.ones(x.shape, "float32")
    weight[:, -1] = 0
    if form == "grain":
        grain = pytest.importorskip("grain")
        dataset = grain.MapDataset.source(
            [(x[i], y[i], weight[i]) for i in range(10)]
        ).batch(4)
    elif form == "array":
        dataset = x
    else:
        make = {"pydataset": Batches, "tf": tf_dataset}[form]
        dataset = make(x, y, weight, size=4)
    options = {"sample_weight": weight} if form == "array" else {}
    teacher = Teacher(entries=4)
    labels = write(path, teacher, dataset, **options)
    assert teacher.asked == 10 and labels.num_tokens == 50
    write(path, teacher, dataset, **options)
    assert teacher.asked == 10
    attached = labels.attach(dataset)
    expected = top(teacher.rows(x), 4)
    for number, batch in enumerate(attached):
        inputs, y_true, found = map(np.asarray, batch)
        low = number * len(inputs)
        np.testing.assert_array_equal(found, weight[low : low + len(inputs)])
        assert_stored(y_true[:, :-1], expected[low : low + len(inputs), :-1])
        if number == 1:
            break


def test_fit(path):
    """The lines of the docstring, on texts of different lengths."""
    labels = write(path)
    student = keras.Sequential(
        [keras.layers.Embedding(V, 4), keras.layers.Dense(V)]
    )
    names = ("token_ids", "padding_mask")
    x = {name: keras.Input((None,), name=name) for name in names}
    # Keras 3.12 refuses an input that no output comes from.
    logits = student(x["token_ids"]) + 0.0 * x["padding_mask"][..., None]
    student = keras.Model(x, logits)
    student.compile("adam", loss=TopKPTLoss(0.0, from_logits=True))
    attached = labels.attach(texts(), batch_size=6)
    fit = student.fit(attached, epochs=2, shuffle=False, verbose=0)
    assert fit.history["loss"][1] < fit.history["loss"][0]


def test_shuffled_and_preprocessed(path):
    labels = write(path)
    seen = []
    attached = labels.attach(
        texts(),
        shuffle=True,
        seed=1,
        batch_size=4,
        preprocessor=lambda x: x["token_ids"],
    )
    for index in range(len(attached)):
        ids, y_true, weight = attached[index]
        for row in range(len(ids)):
            number = int(ids[row, 0])  # `texts` begin with their number
            seen.append(number)
            np.testing.assert_array_equal(
                y_true[row][weight[row] == 1], labels[number]
            )
    assert sorted(seen) == list(range(12)) and seen != sorted(seen)


def test_pickle(path):
    labels = write(path)
    again = pickle.loads(pickle.dumps(labels))
    np.testing.assert_array_equal(again[3], labels[3])


def test_sizes(path):
    """Two bytes a value and the tail, 18 bits an id: DistillKit's ids."""
    spec = TokenLabelSpec(top_k=128, vocabulary_size=152_000)
    assert spec.token_bytes == 288 + 256 + 2
    assert TokenLabelSpec(top_k=16).token_bytes is None
    labels = write(path, k=16)
    size = np.load(path / "shard-00000-of-00001" / "ids.npy").nbytes
    assert size == labels.num_tokens * 16 * 6 / 8


def test_ids_of_16_million(path):
    last = 2**24 - 1
    entries = np.array([[last, np.log(0.5)], [last - 1, np.log(0.25)]])
    labels = write(
        path, lambda x: np.tile(entries, (1, 2, 1, 1)), [[last, 1]], k=2,
        vocabulary_size=2**24,
    )  # fmt: skip
    assert labels[0][0, :, 0].tolist() == [last, last - 1, -1]
    assert isinstance(TokenLabels.open(path), TokenLabels)
