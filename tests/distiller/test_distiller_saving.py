"""What is saved, and what is not."""

import pathlib

import helpers
import keras
import numpy as np
import pytest
from distillers import (
    CLASSES,
    FEATURES,
    distil,
    logits_loss,
    make_linear,
    make_model,
)

from keras_ptloss import Distiller

BACKEND = keras.backend.backend()


class TestSaving:
    def test_save_reload_and_continue(self, x, tmp_path):
        path = tmp_path / "distiller.keras"
        teacher = make_model()
        distiller = Distiller(make_linear(seed=1), teacher)
        distiller.compile("adam", loss=logits_loss([0.5, 0.1]))
        distiller.fit(x, shuffle=False, verbose=0)
        distiller.save(path)

        loaded = keras.saving.load_model(path)
        assert loaded.teacher is None
        np.testing.assert_array_equal(
            distiller.predict(x, verbose=0), loaded.predict(x, verbose=0)
        )
        loaded.teacher = teacher
        for model in (distiller, loaded):  # the optimizer goes on as well
            model.fit(x, shuffle=False, verbose=0)
        np.testing.assert_allclose(
            distiller.predict(x, verbose=0),
            loaded.predict(x, verbose=0),
            atol=1e-6,
        )

    def test_file_holds_no_teacher(self, x, tmp_path):
        teacher = keras.Sequential(
            [
                keras.Input((FEATURES,)),
                keras.layers.Dense(20_000),
                keras.layers.Dense(CLASSES),
            ]
        )
        distiller = distil(make_linear(seed=1), teacher)
        distiller.fit(x, verbose=0)
        distiller.save(tmp_path / "distiller.keras")
        distiller.save_weights(tmp_path / "distiller.weights.h5")
        for file in tmp_path.iterdir():
            assert file.stat().st_size < 100_000, file

    def test_student_is_a_plain_model(self, x, tmp_path):
        distiller = distil(make_linear(seed=1), make_model())
        distiller.fit(x, verbose=0)
        distiller.student.save(tmp_path / "student.keras")
        loaded = keras.saving.load_model(tmp_path / "student.keras")
        np.testing.assert_array_equal(
            loaded.predict(x, verbose=0), distiller.predict(x, verbose=0)
        )

    def test_config_round_trip(self):
        distiller = Distiller(
            make_linear(seed=1),
            [make_model(), make_model(seed=3)],
            teacher_weights=[1, 2],
            student_inputs="a",
            teacher_inputs="b",
            hard_label_loss=keras.losses.SparseCategoricalCrossentropy(),
            hard_label_weight=0.25,
        )
        copy = Distiller.from_config(distiller.get_config())
        ours, its = distiller.get_config(), copy.get_config()
        for key in ours:
            if key != "student":
                assert ours[key] == its[key], key


class TestFileOfThePreviousVersion:
    saved = pathlib.Path(__file__).parents[1] / "saved"

    @pytest.mark.skipif(
        BACKEND == "torch", reason="compiled: PyTorch's compiler takes minutes"
    )
    @pytest.mark.skipif(
        tuple(map(int, keras.__version__.split(".")[:2])) < (3, 15),
        reason="Keras 3.15 wrote the file: older ones know fewer arguments",
    )
    def test_predicts_what_it_did_and_trains(self):
        loaded = keras.saving.load_model(self.saved / "distiller.keras")
        inputs = np.load(self.saved / "inputs.npy")
        expected = np.load(self.saved / "distiller_outputs.npy")
        outputs = loaded.predict(inputs, verbose=0)
        np.testing.assert_allclose(outputs, expected, atol=1e-6)
        assert loaded.teacher is None
        features, classes = inputs.shape[1], expected.shape[1]
        loaded.teacher = keras.Sequential(
            [keras.Input((features,)), keras.layers.Dense(classes, "softmax")]
        )
        labels = np.arange(len(inputs)) % classes
        logs = loaded.evaluate(inputs, labels, verbose=0, return_dict=True)
        soft = helpers.pt_loss_of_logits(
            loaded.teacher.predict(inputs, verbose=0), expected, [0.5, 0.1]
        )
        hard = helpers.nll(helpers.softmax(expected), labels)
        np.testing.assert_allclose(
            logs["loss"], 0.25 * hard + 0.75 * soft.mean(), rtol=1e-5
        )
        assert {"kl_to_teacher", "teacher_agreement"} <= set(logs)
        loaded.fit(inputs, labels, verbose=0)  # the optimizer came along
