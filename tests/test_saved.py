"""Files that an earlier version wrote load, and mean what they meant.

`saved/` was written before the modules moved into rooms, so that registered
names are all that holds.
"""

import io
import json
import pathlib
import zipfile

import h5py
import helpers
import keras
import numpy as np
import pytest

import keras_ptloss  # noqa: F401  registers the classes

SAVED = pathlib.Path(__file__).parent / "saved"
OBJECTS = json.loads((SAVED / "objects.json").read_text())


@pytest.fixture(scope="module")
def inputs():
    return np.load(SAVED / "inputs.npy")


def meaning(config):
    """Write a config in one way, whatever version wrote it.

    A temperature is a scale of 1 / temperature; no bias is one of zeros;
    modules move.
    """
    if not isinstance(config, dict):
        return config
    config = {key: meaning(value) for key, value in config.items()}
    if config.get("registered_name"):
        del config["module"]
    if {"teacher_temperature", "teacher_bias"} & set(config):
        temperature = np.array(config.pop("teacher_temperature", 1.0))
        scale = np.array(config.pop("teacher_scale", 1.0)) / temperature
        config["teacher_scale"] = scale.tolist()
        config["teacher_bias"] = config["teacher_bias"] or 0.0
    return config


def known_then(now, saved):
    """Leave out what a config has that one of then has not."""
    if not isinstance(saved, dict):
        return now
    return {key: known_then(now[key], value) for key, value in saved.items()}


@pytest.mark.parametrize("name", OBJECTS)
def test_config(name):
    loaded = keras.saving.deserialize_keras_object(OBJECTS[name])
    saved = meaning(OBJECTS[name]["config"])
    now = meaning(loaded.get_config())
    # An argument that was added since stands at its default.
    assert known_then(now, saved) == saved
    default = type(loaded).from_config(OBJECTS[name]["config"])
    assert meaning(default.get_config()) == now


def test_every_registered_class_of_then_is_here():
    names = {saved["registered_name"] for saved in OBJECTS.values()}
    assert len(names) == 11
    for name in names:
        assert keras.saving.get_registered_object(name) is not None, name


class TestValuesOfObjects:
    """Against the formulas, on a teacher and a student of three classes."""

    teacher = helpers.dirichlet(0, 8, 3)
    logits = np.random.default_rng(1).normal(size=(8, 3))

    def value(self, name):
        loss = keras.saving.deserialize_keras_object(OBJECTS[name])
        return float(loss(self.teacher, self.logits))

    def test_pt_loss(self):
        config = OBJECTS["PTLoss"]["config"]
        calibrated = helpers.calibrate(
            np.log(self.teacher),
            np.array(config["teacher_temperature"]),
            np.array(config["teacher_bias"]),
        )
        rows = helpers.pt_loss_of_logits(
            calibrated, self.logits, config["epsilon"]
        )
        assert config["reduction"] == "sum"
        np.testing.assert_allclose(self.value("PTLoss"), rows.sum(), rtol=1e-5)

    def test_flooding(self):
        loss = keras.saving.deserialize_keras_object(OBJECTS["Flooding"])
        student = helpers.softmax(self.logits)
        mean = helpers.pt_loss(self.teacher, student, [0.5, 0.1]).mean()
        np.testing.assert_allclose(
            float(loss(self.teacher, student)),
            abs(mean - 0.25) + 0.25,
            rtol=1e-5,
        )

    def test_proxy_teacher(self):
        """A fixed point, for the calibrated teacher."""
        config = OBJECTS["ProxyTeacher"]["config"]
        layer = keras.saving.deserialize_keras_object(OBJECTS["ProxyTeacher"])
        calibrated = helpers.calibrate(
            np.log(self.teacher),
            config["teacher_temperature"],
            np.array(config["teacher_bias"]),
        )
        q = np.asarray(layer(self.teacher.astype("float32")), "float64")
        np.testing.assert_allclose(
            helpers.fixed_point(calibrated, q, config["epsilon"]), q, atol=1e-5
        )


class TestStudent:
    """A student that was trained with PTLoss, on TensorFlow or on JAX."""

    @pytest.fixture
    def student(self):
        return keras.saving.load_model(SAVED / "student.keras")

    @pytest.fixture
    def logits(self, inputs):
        """From the file's own numbers: it is one dense layer."""
        with zipfile.ZipFile(SAVED / "student.keras") as archive:
            weights = io.BytesIO(archive.read("model.weights.h5"))
        with h5py.File(weights) as file:
            kernel, bias = (file[f"layers/dense/vars/{i}"][:] for i in range(2))
        return inputs.astype("float64") @ kernel + bias

    def test_predicts(self, student, inputs, logits):
        outputs = student.predict(inputs, verbose=0)
        np.testing.assert_allclose(outputs, logits, atol=1e-6)

    def test_keeps_its_loss(self, student, inputs, logits):
        teacher = helpers.dirichlet(0, len(inputs), 3)
        calibrated = helpers.calibrate(np.log(teacher), 2.0, 0.0)
        rows = helpers.pt_loss_of_logits(
            calibrated, logits, [[0.5], [0.1], [0.2]]
        )
        got = student.evaluate(inputs, teacher, verbose=0, return_dict=True)
        np.testing.assert_allclose(got["loss"], rows.mean(), rtol=1e-5)

    def test_trains_on(self, student, inputs):
        teacher = helpers.dirichlet(0, len(inputs), 3)
        history = student.fit(inputs, teacher, epochs=20, verbose=0).history
        assert history["loss"][-1] < history["loss"][0]


# Keras says it of every model that was compiled, saved, and never trained.
@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
def test_proxy_model(inputs):
    model = keras.saving.load_model(SAVED / "proxy_model.keras")
    np.testing.assert_allclose(
        model.predict(inputs, verbose=0),
        np.load(SAVED / "proxy_model_outputs.npy"),
        atol=1e-6,
    )
    teacher = helpers.dirichlet(0, len(inputs), 3)
    proxies = model.predict(inputs, verbose=0)
    np.testing.assert_allclose(
        model.evaluate(inputs, teacher, verbose=0),
        helpers.pt_loss(teacher, proxies, 0.1).mean(),
        rtol=1e-5,
    )
