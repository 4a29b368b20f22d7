"""Labels that come and go, callbacks, what is built, errors in a first step."""

import inspect
import itertools

import keras
import numpy as np
import pytest
from distillers import (
    CLASSES,
    distil,
    logits,
    logits_loss,
    make_linear,
    make_model,
    pt_losses,
)

from keras_ptloss import Distiller
from keras_ptloss.metrics import (
    KLToTeacher,
    TeacherAgreement,
    TotalVariationDistance,
)

BACKEND = keras.backend.backend()
CALLS = ["fit", "evaluate", "train_on_batch", "test_on_batch"]


def run(distiller, call, data):
    """Return the logs of one call, as `evaluate` names them."""
    method = getattr(distiller, call)
    if call.endswith("batch"):
        return method(*data, return_dict=True)
    if call == "evaluate":
        return method(*data, verbose=0, return_dict=True)
    fit = method(*data, validation_data=data, batch_size=32, verbose=0)
    return {
        name.removeprefix("val_"): values[-1]
        for name, values in fit.history.items()
        if name.startswith("val_")
    }


class TestLabelsInOneCallAndNoneInTheOther:
    @pytest.mark.parametrize(
        "first, second, labels_first",
        [(*pair, True) for pair in itertools.product(CALLS, repeat=2)]
        + [(call, call, False) for call in CALLS],
    )
    def test_every_order(self, x, y, first, second, labels_first):
        distiller = Distiller(make_linear(seed=1), make_model())
        distiller.compile(
            keras.optimizers.SGD(0.0), loss=logits_loss(), metrics=["accuracy"]
        )
        student, teacher = distiller.student, distiller.teacher
        loss = pt_losses(logits(teacher, x), logits(student, x)).mean()
        accuracy = np.mean(logits(student, x).argmax(axis=1) == y)
        calls = [(first, (x, y)), (second, (x,)), (first, (x, y))]
        if not labels_first:
            calls = [(first, (x,)), (second, (x, y)), (first, (x,))]
        for call, data in calls:
            logs = run(distiller, call, data)
            np.testing.assert_allclose(logs["loss"], loss, rtol=1e-5)
            assert "teacher_agreement" in logs
            if len(data) > 1:
                np.testing.assert_allclose(logs["accuracy"], accuracy)

    @pytest.mark.parametrize("train, test", [((0, 1), (0,)), ((0,), (0, 1))])
    def test_validation_of_the_other_kind(self, x, y, train, test):
        data = (x, y)
        distiller = Distiller(make_linear(seed=1), make_model())
        distiller.compile("sgd", loss=logits_loss(), metrics=["accuracy"])
        history = distiller.fit(
            *(data[i] for i in train),
            validation_data=tuple(data[i] for i in test),
            epochs=2,
            verbose=0,
        ).history
        assert len(history["val_loss"]) == 2
        labelled = history["accuracy" if len(train) > 1 else "val_accuracy"]
        right = np.mean(logits(distiller.student, x).argmax(axis=1) == y)
        if len(test) > 1:
            np.testing.assert_allclose(labelled[-1], right, atol=1e-6)
        assert len(labelled) == 2

    @pytest.mark.skipif(BACKEND != "tensorflow", reason="a TensorFlow strategy")
    def test_under_a_strategy(self, x, y):
        tf = pytest.importorskip("tensorflow")
        with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
            distiller = Distiller(make_linear(seed=1), make_linear(seed=2))
            distiller.compile("sgd", loss=logits_loss(), metrics=["accuracy"])
        distiller.fit(x, validation_data=(x,), batch_size=16, verbose=0)
        logs = distiller.evaluate(
            x, y, batch_size=16, verbose=0, return_dict=True
        )
        accuracy = np.mean(logits(distiller.student, x).argmax(axis=1) == y)
        np.testing.assert_allclose(logs["accuracy"], accuracy)


METRICS = {
    "loss": (None, "down"),
    "teacher_agreement": (TeacherAgreement(), "up"),
    "total_variation_distance": (
        TotalVariationDistance(from_logits=True),
        "down",
    ),
    "kl_to_teacher": (KLToTeacher(from_logits=True), "down"),
    "mine": (KLToTeacher(from_logits=True, name="mine"), "down"),
    "agree": (TeacherAgreement(name="agree"), "up"),
}


class TestMonitors:
    """`mode="auto"` knows which way a metric is better."""

    def series(self, x, name, callback, values):
        """Fit while `val_{name}` takes the given values, by a callback."""

        class Overwrite(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                assert f"val_{name}" in logs
                logs[f"val_{name}"] = values[epoch]

        metric, _ = METRICS[name]
        metrics = (
            None
            if metric is None
            else [type(metric).from_config(metric.get_config())]
        )
        distiller = Distiller(
            make_linear(seed=1), make_linear(seed=2), teacher_metrics=metrics
        )
        distiller.compile("sgd", loss=logits_loss())
        return distiller, distiller.fit(
            x,
            validation_split=0.25,
            epochs=len(values),
            verbose=0,
            callbacks=[Overwrite(), callback],
        )

    @pytest.mark.parametrize("name", METRICS)
    def test_early_stopping(self, x, name):
        rising = [0.1, 0.2, 0.3, 0.4]
        stop = keras.callbacks.EarlyStopping(f"val_{name}", patience=1)
        _, history = self.series(x, name, stop, rising)
        better = METRICS[name][1] == "up"
        assert len(history.epoch) == (4 if better else 2)

    @pytest.mark.parametrize("name", ["teacher_agreement", "mine"])
    def test_model_checkpoint_and_plateau(self, x, name, tmp_path):
        path = str(tmp_path / "{epoch}.weights.h5")
        keep = keras.callbacks.ModelCheckpoint(
            path,
            monitor=f"val_{name}",
            save_best_only=True,
            save_weights_only=True,
        )
        self.series(x, name, keep, [0.1, 0.2, 0.3])
        better = METRICS[name][1] == "up"
        saved = sorted(file.name[0] for file in tmp_path.iterdir())
        assert saved == (["1", "2", "3"] if better else ["1"])
        slow = keras.callbacks.ReduceLROnPlateau(f"val_{name}", patience=1)
        distiller, _ = self.series(x, name, slow, [0.1, 0.2])
        rate = float(distiller.optimizer.learning_rate)
        assert np.isclose(rate, 0.01 if better else 0.001)


class TestBuilt:
    def test_backup_and_restore(self, x, tmp_path):
        backup = keras.callbacks.BackupAndRestore(
            tmp_path, delete_checkpoint=False
        )
        distiller = distil(make_linear(seed=1), make_model())
        distiller.fit(x, epochs=2, verbose=0, callbacks=[backup])
        again = distil(make_linear(seed=3), make_model())
        history = again.fit(
            x,
            epochs=3,
            verbose=0,
            callbacks=[keras.callbacks.BackupAndRestore(tmp_path)],
        )
        assert history.epoch == [2]  # and not 0 and 1 once more

    def test_weights_load_before_the_first_batch(self, x, tmp_path):
        one = distil(make_linear(seed=1), make_model())
        one.save_weights(tmp_path / "d.weights.h5")
        two = distil(make_linear(seed=2), make_model())
        two.load_weights(tmp_path / "d.weights.h5")
        np.testing.assert_array_equal(
            one.predict(x, verbose=0), two.predict(x, verbose=0)
        )

    def test_summary_counts_the_student_alone(self):
        lines = []
        distiller = distil(make_linear(), make_model())
        distiller.summary(print_fn=lines.append)
        assert "Total params: 15 " in "".join(lines)

    def test_of_an_unbuilt_student_is_unbuilt(self):
        student = keras.Sequential([keras.layers.Dense(CLASSES)])
        assert not distil(student, make_model()).built

    def test_unbuilt_teacher_after_a_fit(self, x):
        """No compiled step can make its weights."""
        distiller = distil(make_linear(), make_model())
        distiller.fit(x, verbose=0)
        distiller.teacher = keras.Sequential([keras.layers.Dense(CLASSES)])
        logs = distiller.evaluate(x, verbose=0, return_dict=True)
        values = pt_losses(
            logits(distiller.teacher, x), logits(distiller.student, x)
        )
        np.testing.assert_allclose(logs["loss"], values.mean(), rtol=1e-5)
        distiller.fit(x, verbose=0)


class TestErrorInTheFirstStep:
    def test_models_keep_their_weights(self, x):
        """On JAX a step holds them, and this one ends before it returns."""

        class Broken(keras.losses.Loss):
            fail = False

            def call(self, y_true, y_pred):
                if self.fail:
                    raise RuntimeError("broken")
                return y_pred[..., 0]

        loss = Broken()
        student, teacher = make_linear(), make_model()
        before = [logits(student, x), logits(teacher, x)]
        distiller = Distiller(student, teacher)
        distiller.compile(keras.optimizers.SGD(0.0), loss=loss)
        distiller.evaluate(x, verbose=0)  # builds all, traces no training
        loss.fail = True
        with pytest.raises(RuntimeError, match="broken"):
            distiller.fit(x, verbose=0)
        for model, outputs in zip((student, teacher), before, strict=True):
            np.testing.assert_array_equal(logits(model, x), outputs)
        loss.fail = False
        distiller.fit(x, verbose=0)


def test_unknown_class_axis():
    """A pipeline that does not say how wide its rows are."""
    tf = pytest.importorskip("tensorflow")

    class Given(keras.Model):
        def call(self, inputs):
            return inputs

    rows = np.random.default_rng(0).normal(size=(8, CLASSES)).astype("f")
    data = tf.data.Dataset.from_generator(
        lambda: iter([(rows,)]), output_signature=(tf.TensorSpec((None, None)),)
    )
    student = keras.Sequential(
        [keras.Input((CLASSES,)), keras.layers.Dense(CLASSES)]
    )
    distiller = distil(student, Given())
    logs = distiller.evaluate(data, steps=1, verbose=0, return_dict=True)
    values = pt_losses(rows, logits(student, rows))
    np.testing.assert_allclose(logs["loss"], values.mean(), rtol=1e-5)


@pytest.mark.parametrize(
    "method", ["fit", "train_on_batch", "evaluate", "test_on_batch", "predict"]
)
def test_arguments_are_shown_as_keras_has_them(method):
    """In `help` and where a notebook completes them; the text is our own."""
    ours, kerass = getattr(Distiller, method), getattr(keras.Model, method)
    assert inspect.signature(ours) == inspect.signature(kerass)
    assert ours.__name__ == method
    assert ours.__doc__ != kerass.__doc__
