"""Stored rows and the data they belong to."""

import keras
import numpy as np
import pytest
from stores import (
    Batches,
    C,
    N,
    Teacher,
    features,
    tf_dataset,
    weights_of,
    write,
)


def forms(*arrays):
    yield arrays[0]
    yield Batches(*arrays)
    yield tf_dataset(*arrays)


def pairs(dataset):
    batches = [
        [np.asarray(part) for part in batch]
        for batch in (
            dataset
            if not isinstance(dataset, keras.utils.PyDataset)
            else (dataset[i] for i in range(dataset.num_batches))
        )
    ]
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


def test_attach_in_order(path):
    labels, x = write(path), features()
    for dataset in forms(x, np.zeros(N)):
        inputs, soft = pairs(labels.attach(dataset))
        np.testing.assert_array_equal(inputs, x)
        np.testing.assert_array_equal(soft, labels[:])


def test_shuffling_cannot_misalign(path):
    labels, x = write(path), features()
    order = np.random.default_rng(3).permutation(N)[:30]
    for ids in (order, "content"):
        for dataset in forms(x[order]):
            inputs, soft = pairs(labels.attach(dataset, ids=ids))
            np.testing.assert_array_equal(inputs, x[order])
            np.testing.assert_array_equal(soft, labels[order])
    shuffled = tf_dataset(x).unbatch().shuffle(N).batch(7)
    inputs, soft = pairs(labels.attach(shuffled, ids="content"))
    np.testing.assert_allclose(soft, Teacher().rows(inputs), atol=1e-3)
    epochs = labels.attach(x, shuffle=True, seed=1)
    first, soft = pairs(epochs)
    np.testing.assert_allclose(soft, Teacher().rows(first), atol=1e-3)
    epochs.on_epoch_end()
    second, soft = pairs(epochs)
    np.testing.assert_allclose(soft, Teacher().rows(second), atol=1e-3)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(
        first, pairs(labels.attach(x, shuffle=True, seed=1))[0]
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: np.where(x == x[20, 1], 9, x), "example 20 is in no stored"),
        (lambda x: x[::-1], "example 0 is that of stored row 49, not of row 0"),
        (lambda x: x[:40], "hold 50 examples. Received: 40 examples|batches"),
        (lambda x: np.concatenate([x, x]), "must hold 50 examples"),
        (lambda x: x.astype("float64"), "example 0 is in no stored row"),
    ],
)
def test_a_wrong_data_set_is_an_error(path, change, match):
    labels, x = write(path), change(features())
    for number, dataset in enumerate(forms(x)):
        errors = (ValueError,)
        if number == 2:
            tf = pytest.importorskip("tensorflow")
            errors = (tf.errors.InvalidArgumentError,)
        with pytest.raises(errors, match=match):
            pairs(labels.attach(dataset))


def test_unknown_content_is_an_error(path):
    labels = write(path)
    with pytest.raises(ValueError, match="example 2 is in no stored row"):
        labels.attach(
            np.concatenate([features()[:2], features(1, 9)]), ids="content"
        )


def test_attach_keeps_weights_and_preprocesses(path):
    labels, x = write(path), features()
    weights = np.arange(N, dtype="float32")
    for dataset in (
        Batches(x, np.zeros(N), weights),
        tf_dataset(x, np.zeros(N), weights),
    ):
        inputs, soft, found = pairs(
            labels.attach(dataset, preprocessor=lambda batch: batch * 2)
        )
        np.testing.assert_array_equal(inputs, x * 2)
        np.testing.assert_array_equal(soft, labels[:])
        np.testing.assert_array_equal(found, weights)
    two = labels.attach(x, preprocessor=lambda b: {"a": b, "b": b[:, :1]})
    assert two[0][0]["b"].shape == (32, 1)


def small_student():
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(8, "relu"),
            keras.layers.Dense(C),
        ]
    )
    softmax_then_kl = keras.losses.KLDivergence()
    model.compile(
        keras.optimizers.Adam(0.01),
        loss=lambda t, z: softmax_then_kl(t, keras.ops.softmax(z)),
    )
    return model


def test_stored_equals_live(path):
    """Distilling from a store is distilling with the live teacher."""
    keras.utils.set_random_seed(0)
    teacher = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(C, activation="softmax")]
    )
    x = features()
    live = small_student()
    for _ in range(3):
        for low in range(0, N, 8):
            batch = x[low : low + 8]
            live.train_on_batch(batch, teacher.predict_on_batch(batch))
    labels = write(path, teacher, dtype="float32")
    for dataset in forms(x):
        stored = small_student()
        attached = labels.attach(dataset, batch_size=8)
        stored.fit(attached, epochs=3, shuffle=False, verbose=0)
        for a, b in zip(weights_of(live), weights_of(stored), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("form", [list, tuple])
@pytest.mark.parametrize("of", ["arrays", "pydataset", "preprocessor"])
def test_fit_of_several_inputs(path, of, form):
    """In a list, as Keras's `fit` takes them, the student learns the same."""
    x = features()
    two = form([x, x[:, :1]])

    def fitted(*data):
        keras.utils.set_random_seed(3)
        inputs = [keras.Input((3,)), keras.Input((1,))]
        logits = keras.layers.Dense(C)(keras.layers.Concatenate()(inputs))
        student = keras.Model(inputs, logits)
        student.compile(keras.optimizers.SGD(0.1), "mse")
        student.fit(*data, batch_size=8, shuffle=False, verbose=0)
        return weights_of(student)

    class Pairs(Batches):
        def __getitem__(self, index):
            return form(super().__getitem__(index)), np.zeros(8)

    if of == "preprocessor":
        attached = write(path).attach(
            x, batch_size=8, preprocessor=lambda x: form([x, x[:, :1]])
        )
    else:
        dataset = two if of == "arrays" else Pairs(*two)
        teacher = Teacher()
        labels = write(path, lambda x: teacher(x[0]), dataset, num_examples=N)
        attached = labels.attach(dataset, batch_size=8)
    soft = np.concatenate([attached[i][1] for i in range(7)])
    both = fitted(attached), fitted(list(two), soft)
    for a, b in zip(*both, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="others have no texts"
)
@pytest.mark.parametrize("preprocessor", [None, lambda x: {"text": x}])
def test_fit_of_texts(path, preprocessor):
    """A student that takes strings: the layer sees each with its own row."""
    texts = [f"film {i}" for i in range(N)]
    seen = []

    class Length(keras.layers.Layer):
        def call(self, x):
            import tensorflow as tf

            tf.py_function(lambda t: seen.extend(t.numpy().tolist()), [x], [])
            return tf.cast(tf.strings.length(x), "float32")[:, None]

    labels = write(path, lambda x: Teacher().rows(features(len(x))), texts)
    x = keras.Input((), dtype="string", name="text")
    student = keras.Model(
        x if preprocessor is None else {"text": x},
        keras.layers.Dense(C)(Length()(x)),
    )
    student.compile("sgd", "mse")
    attached = labels.attach(texts, batch_size=8, preprocessor=preprocessor)
    student.fit(attached, shuffle=False, verbose=0)
    assert seen == [text.encode() for text in texts]


def test_attach_arguments(path):
    labels, x = write(path), features()
    for ids in ("rows", [0.5], [[0]]):
        with pytest.raises(ValueError, match="`ids` must be"):
            labels.attach(x, ids=ids)
    with pytest.raises(ValueError, match="`ids` must be rows from 0 to 49"):
        labels.attach(x, ids=[50])
    with pytest.raises(ValueError, match="`shuffle` must be False"):
        labels.attach(Batches(x), shuffle=True)
    with pytest.raises(ValueError, match="`batch_size` must be"):
        labels.attach(x, batch_size=0)


def test_batches_end(path):
    """`list()` asks for batches until an IndexError, on every Keras."""
    labels, x = write(path), features()
    for dataset in (x, Batches(x, np.zeros(N))):
        attached = labels.attach(dataset, batch_size=8)
        for index in (7, 8, -1):
            with pytest.raises(IndexError, match=f"Batch {index} of 7 batches"):
                attached[index]
