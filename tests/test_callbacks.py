"""FilteredTeacher against averages of its epochs' outputs, by NumPy."""

import functools

import helpers
import keras
import numpy as np
import pytest
import scipy.special

from keras_ptloss import PTLoss
from keras_ptloss.callbacks import FilteredTeacher

CLASSES = 4

make_model = functools.partial(helpers.linear_model, CLASSES)


@pytest.fixture
def data():
    return helpers.soft_labelled(CLASSES)


class Recorder(keras.callbacks.Callback):
    """Keeps the weights of every epoch's end."""

    def on_train_begin(self, logs=None):
        self.weights = []

    def on_epoch_end(self, epoch, logs=None):
        self.weights.append(self.model.get_weights())


class TestFilteredTeacher:
    @pytest.fixture
    def labels(self, data):
        return data[1].argmax(axis=1)

    def fit(
        self, model, data, labels, callbacks, *, epochs=4, from_logits=True
    ):
        keras.utils.set_random_seed(0)
        model.compile(
            keras.optimizers.Adam(0.1),
            keras.losses.SparseCategoricalCrossentropy(from_logits),
        )
        model.fit(
            data[0],
            labels,
            epochs=epochs,
            batch_size=8,
            callbacks=callbacks,
            verbose=0,
        )

    def outputs(self, x, weights):
        kernel, bias = weights
        return helpers.softmax(x @ kernel + bias)

    @pytest.mark.parametrize("from_logits", [False, True])
    @pytest.mark.parametrize("rate", [0.05, 0.5, 1.0])
    def test_average(self, data, labels, from_logits, rate):
        recorder = Recorder()
        filtered = FilteredTeacher(
            data[0][:10], rate=rate, from_logits=from_logits
        )
        self.fit(
            make_model(activation=None if from_logits else "softmax"),
            data,
            labels,
            [recorder, filtered],
            from_logits=from_logits,
        )
        first, *others = recorder.weights
        expected = self.outputs(data[0][:10], first)
        for weights in others:
            new = self.outputs(data[0][:10], weights)
            expected = (1 - rate) * expected + rate * new
        assert filtered.probabilities.dtype == np.float32
        np.testing.assert_allclose(filtered.probabilities, expected, atol=1e-5)

    def test_training_is_not_disturbed(self, data, labels):
        weights = []
        for callbacks in ([], [FilteredTeacher(data[0], from_logits=True)]):
            model = make_model()
            self.fit(model, data, labels, callbacks)
            weights.append(model.get_weights())
        for a, b in zip(*weights, strict=True):
            np.testing.assert_array_equal(a, b)

    def test_each_fit_starts_anew(self, data, labels):
        filtered = FilteredTeacher(data[0], from_logits=True)
        assert filtered.probabilities is None
        self.fit(make_model(seed=5), data, labels, [filtered])
        recorder = Recorder()
        model = make_model()
        self.fit(model, data, labels, [recorder, filtered], epochs=1)
        np.testing.assert_allclose(
            filtered.probabilities,
            self.outputs(data[0], recorder.weights[0]),
            atol=1e-5,
        )

    def test_distils(self, data, labels):
        filtered = FilteredTeacher(data[0], from_logits=True)
        self.fit(make_model(), data, labels, [filtered])
        student = make_model(seed=1)
        student.compile(
            keras.optimizers.Adam(0.05),
            PTLoss(0.0, from_logits=True, teacher_from_logits=False),
        )
        student.fit(data[0], filtered.probabilities, epochs=20, verbose=0)

        def distance(model):
            return helpers.pt_loss_of_logits(
                filtered.probabilities, model.predict(data[0], verbose=0), 0.0
            ).mean()

        assert distance(student) < 0.5 * distance(make_model(seed=1))

    @pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, np.nan])
    def test_rate(self, data, rate):
        with pytest.raises(ValueError, match="`rate` must be.*Received: rate="):
            FilteredTeacher(data[0], rate=rate)

    @pytest.mark.parametrize(
        "argument, value",
        [
            ("x", None),
            ("x", "a"),
            ("x", 3.0),
            ("batch_size", "a"),
            ("batch_size", 0),
            ("batch_size", 2.5),
        ],
    )
    def test_arguments(self, data, argument, value):
        match = f"`{argument}` must be.*Received: {argument}={value!r}"
        with pytest.raises(ValueError, match=match):
            FilteredTeacher(**{"x": data[0], argument: value})

    def test_outputs_that_are_not_probabilities(self, data, labels):
        filtered = FilteredTeacher(data[0])
        with pytest.raises(ValueError, match="probabilities.*from_logits=True"):
            self.fit(make_model(), data, labels, [filtered])

    def test_outputs_of_other_rank(self, data):
        model = keras.Sequential(
            [make_model(), keras.layers.Reshape((2, CLASSES // 2))]
        )
        model.compile("sgd", "mse")
        with pytest.raises(ValueError, match=r"one array.*\(32, 2, 2\)"):
            model.fit(
                data[0],
                np.zeros((32, 2, 2)),
                callbacks=[FilteredTeacher(data[0])],
                verbose=0,
            )

    @pytest.mark.parametrize("from_logits", [False, True])
    def test_binary_head(self, data, labels, from_logits):
        """One output is averaged as the two events that it stands for."""
        recorder = Recorder()
        filtered = FilteredTeacher(data[0], rate=0.3, from_logits=from_logits)
        activation = None if from_logits else "sigmoid"
        teacher = helpers.linear_model(1, activation=activation)
        teacher.compile(
            keras.optimizers.Adam(0.1),
            keras.losses.BinaryCrossentropy(from_logits),
        )
        teacher.fit(
            data[0],
            labels[:, None] % 2,
            epochs=2,
            callbacks=[recorder, filtered],
            verbose=0,
        )
        first, last = (
            scipy.special.expit(data[0] @ kernel + bias)
            for kernel, bias in recorder.weights
        )
        p = 0.7 * first + 0.3 * last
        np.testing.assert_allclose(
            filtered.probabilities,
            np.concatenate([1 - p, p], axis=-1),
            atol=1e-5,
        )
        student = helpers.linear_model(1, seed=1)
        student.compile(
            "sgd", PTLoss(0.0, from_logits=True, teacher_from_logits=False)
        )
        student.fit(data[0], filtered.probabilities, verbose=0)

    def test_a_mistake_leaves_the_teacher_usable(self, data, labels):
        teacher = make_model()
        with pytest.raises(ValueError, match="shape"):
            self.fit(
                teacher,
                data,
                labels,
                [FilteredTeacher(data[0][:, :3], from_logits=True)],
            )
        assert np.all(np.isfinite(teacher.predict(data[0], verbose=0)))

    @pytest.mark.parametrize("during", ["its predict", "the next epoch"])
    def test_an_interruption_leaves_the_teacher_usable(
        self, data, labels, during
    ):
        """With the weights of the steps that were made."""

        class Interrupt(Recorder):
            def on_train_batch_end(self, batch, logs=None):
                if self.weights:
                    raise KeyboardInterrupt

        class Examples(keras.utils.PyDataset):
            def __len__(self):
                return 2

            def __getitem__(self, index):
                if index and during == "its predict":
                    raise KeyboardInterrupt
                return (data[0],)

        recorder, teacher = Interrupt(), make_model()
        filtered = FilteredTeacher(Examples(), from_logits=True)
        with pytest.raises(KeyboardInterrupt):
            self.fit(teacher, data, labels, [recorder, filtered])
        outputs = teacher.predict(data[0], verbose=0)
        if during == "its predict":
            kernel, bias = recorder.weights[0]
            np.testing.assert_allclose(
                outputs, data[0] @ kernel + bias, atol=1e-5
            )
        assert np.all(np.isfinite(outputs))
        self.fit(teacher, data, labels, [])
