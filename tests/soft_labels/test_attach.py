"""Data sets with stored rows as targets, and what `fit` makes of them."""

import keras
import numpy as np
import pytest

from keras_ptloss import SoftLabels
from keras_ptloss.soft_labels import attach_several


@pytest.fixture(scope="module")
def x():
    return np.arange(120, dtype="float32").reshape(60, 2) / 120


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).dirichlet(np.ones(3), 60).astype("f")


@pytest.fixture(scope="module")
def labels(x, rows):
    return SoftLabels.from_array(rows, inputs=x, dtype="float32")


def concatenated(pairs):
    """Return inputs and targets of all batches."""
    batches = [pair[:2] for pair in pairs]
    return [
        np.concatenate([np.asarray(a) for a in s])
        for s in zip(*batches, strict=True)
    ]


def check(pairs, x, rows, order):
    found_x, found_y = concatenated(pairs)
    np.testing.assert_array_equal(found_x, x[order])
    np.testing.assert_allclose(found_y, rows[order], 1e-6)


class TestArrays:
    def test_in_another_order(self, labels, x, rows):
        order = np.random.default_rng(1).permutation(60)
        check(labels.attach(x[order], batch_size=7), x, rows, order)

    def test_shuffled_in_each_epoch(self, labels, x, rows):
        pairs = labels.attach(x, batch_size=7, shuffle=True, seed=0)
        orders = []
        for _ in range(2):
            found = concatenated(pairs)[0]
            orders.append(np.round(found[:, 0] * 60).astype(int))
            check(pairs, x, rows, orders[-1])
            pairs.on_epoch_end()
        assert sorted(orders[0]) == list(range(60))
        assert (orders[0] != orders[1]).any()

    def test_by_ids(self, x, rows):
        """Also of inputs that the teacher did not have."""
        names = [str(i) for i in range(60)]
        labels = SoftLabels.from_array(rows, ids=names, dtype="float32")
        pairs = labels.attach(-x[::-1], ids=names[::-1])
        check(pairs, -x, rows, np.arange(60)[::-1])
        with pytest.raises(ValueError, match="for each of 60"):
            labels.attach(x, ids=names[:9], allow_subset=True)

    def test_a_subset_only_where_asked(self, labels, x, rows):
        with pytest.raises(ValueError, match="allow_subset.* 50 of 60"):
            labels.attach(x[:50])
        pairs = labels.attach(x[:50], allow_subset=True)
        check(pairs, x, rows, np.arange(50))

    def test_a_changed_example_is_refused(self, labels, x):
        with pytest.raises(ValueError, match="1 of 60 .* position 3"):
            labels.attach(np.where(np.arange(60)[:, None] == 3, 9, x))

    def test_fit_on_texts_of_a_dictionary(self, rows):
        texts = {"a": [f"t{i}" for i in range(60)], "b": np.arange(60.0)}
        texts = {name: np.asarray(leaf) for name, leaf in texts.items()}
        labels = SoftLabels.from_array(rows, inputs=texts)
        found, _ = labels.attach(texts)[0]
        assert set(found) == {"a", "b"}


class TestDataSets:
    def test_tf_data(self, labels, x, rows):
        tf = pytest.importorskip("tensorflow")
        data = tf.data.Dataset.from_tensor_slices((x, x)).shuffle(60).batch(8)
        pairs = labels.attach(data)
        assert pairs.element_spec[1].shape.as_list() == [None, 3]
        assert int(pairs.cardinality()) == 8
        for _ in range(2):
            found, y = concatenated(pairs.as_numpy_iterator())
            order = np.round(found[:, 0] * 60).astype(int)
            np.testing.assert_allclose(y, rows[order], 1e-6)

    def test_tf_data_with_weights_and_dictionaries(self, rows):
        tf = pytest.importorskip("tensorflow")
        texts = {"a": [f"t{i}" for i in range(60)], "b": np.arange(60.0)}
        texts = {name: np.asarray(leaf) for name, leaf in texts.items()}
        labels = SoftLabels.from_array(rows, inputs=texts, dtype="float32")
        data = tf.data.Dataset.from_tensor_slices(
            (texts, np.zeros(60), np.arange(60.0))
        )
        for found, y, weight in labels.attach(data.batch(8)):
            index = np.asarray(weight).astype(int)
            np.testing.assert_array_equal(found["b"], index)
            np.testing.assert_allclose(y, rows[index], 1e-6)

    def test_a_changed_example_is_refused(self, labels, x):
        tf = pytest.importorskip("tensorflow")
        data = tf.data.Dataset.from_tensor_slices(x + 1).batch(8)
        with pytest.raises(
            tf.errors.InvalidArgumentError, match="8 of 8 examples"
        ):
            list(labels.attach(data))

    def test_a_subset_only_where_asked(self, labels, x):
        tf = pytest.importorskip("tensorflow")
        data = tf.data.Dataset.from_tensor_slices(x[:50]).batch(5)
        with pytest.raises(ValueError, match="at most 50 of 60"):
            labels.attach(data)
        assert len(list(labels.attach(data, allow_subset=True))) == 10

    def test_grain(self, labels, x, rows):
        grain = pytest.importorskip("grain")
        data = grain.MapDataset.source([(row, 0) for row in x])
        order = np.arange(60)
        check(labels.attach(data.batch(8)), x, rows, order)
        stream = data.to_iter_dataset().batch(8)
        check(labels.attach(stream), x, rows, order)

    # JAX warns of the loader's workers if another test has imported it.
    @pytest.mark.filterwarnings("ignore:os.fork")
    def test_torch(self, labels, x, rows):
        torch = pytest.importorskip("torch")
        data = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(x))
        for workers in (0, 2):
            loader = torch.utils.data.DataLoader(
                data, batch_size=8, num_workers=workers
            )
            pairs = labels.attach(loader)
            assert isinstance(pairs, torch.utils.data.DataLoader)
            assert len(pairs) == 8
            for _ in range(2):
                check(pairs, x, rows, np.arange(60))

    def test_arguments_of_arrays_are_refused(self, labels, x):
        tf = pytest.importorskip("tensorflow")
        data = tf.data.Dataset.from_tensor_slices(x).batch(8)
        for name, value in (("ids", ["a"]), ("shuffle", True)):
            with pytest.raises(ValueError, match=name):
                labels.attach(data, **{name: value})


class TestSeveral:
    def test_side_by_side_though_orders_differ(self, labels, x, rows):
        other = SoftLabels.from_array(
            rows[::-1, ::-1], inputs=x[::-1], dtype="float32"
        )
        pairs = attach_several([labels, other], x)
        both = np.concatenate([rows, rows[:, ::-1]], axis=-1)
        check(pairs, x, both, np.arange(60))

    def test_classes_in_another_order_are_refused(self, x, rows):
        stores = [
            SoftLabels.from_array(rows, inputs=x, class_names=list(names))
            for names in ("abc", "acb")
        ]
        with pytest.raises(ValueError, match="same order"):
            attach_several(stores, x)

    def test_token_stores_are_refused(self, labels):
        tokens = SoftLabels.from_array([[[1, 0.0]]], inputs=np.zeros(1))
        with pytest.raises(ValueError, match="stores of probabilities"):
            attach_several([labels, tokens], np.zeros(1))


class TestTokens:
    def make(self):
        """Return a store of three sequences."""
        lists = [[3, 4, 5], [6], [7, 8]]
        events = [
            np.array([[[i + 10, np.log(0.75)]] for i in row]) for row in lists
        ]
        events[2][0, 0, 0] = -2  # nothing is stored there
        return SoftLabels.from_array(events, inputs=lists)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_events_stand_at_their_tokens(self, side):
        labels = self.make()
        rows = [[7, 8], [3, 4, 5], [6]]
        ids, mask = np.zeros((3, 4), int), np.zeros((3, 4), int)
        for number, row in enumerate(rows):
            where = (
                slice(4 - len(row), 4) if side == "left" else slice(len(row))
            )
            ids[number, where], mask[number, where] = row, 1
        x = {"token_ids": ids, "padding_mask": mask}
        _, y_true, weight = labels.attach(x)[0]
        assert y_true.shape == (3, 4, 2, 2)
        stored = mask.astype(bool) & (ids != 7)
        np.testing.assert_array_equal(weight, stored)
        np.testing.assert_array_equal(y_true[stored][:, 0, 0], ids[stored] + 10)
        np.testing.assert_array_equal(y_true[stored][:, 1, 0], -1)
        np.testing.assert_allclose(
            np.exp(y_true[stored][..., 1]), [[0.75, 0.25]] * 5, 1e-3
        )
        assert (y_true[~stored][..., 0] == -2).all()

    def test_tf_data_with_weights(self):
        tf = pytest.importorskip("tensorflow")
        x = {
            "token_ids": np.array([[3, 4, 5], [6, 0, 0], [7, 8, 0]]),
            "padding_mask": np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0]]),
        }
        weight = np.array([[1, 0, 2], [3, 9, 9], [4, 5, 9]], "float32")
        data = tf.data.Dataset.from_tensor_slices((x, np.zeros(3), weight))
        pairs = self.make().attach(data.batch(2))
        assert pairs.element_spec[1].shape.as_list() == [None, 3, 2, 2]
        found = np.concatenate([w for _, _, w in pairs.as_numpy_iterator()])
        np.testing.assert_array_equal(found, [[1, 0, 2], [3, 0, 0], [0, 5, 0]])


def test_fit(labels, x, rows):
    """The mean loss of an epoch is that of the whole arrays."""
    inputs = keras.Input((2,))
    student = keras.Model(inputs, keras.layers.Dense(3, "softmax")(inputs))
    student.compile("sgd", keras.losses.KLDivergence())
    found = student.evaluate(labels.attach(x, batch_size=10), verbose=0)
    right = student.evaluate(x, rows, verbose=0)
    assert found == pytest.approx(right, rel=1e-5)
    student.fit(labels.attach(x, shuffle=True, seed=1), epochs=2, verbose=0)
