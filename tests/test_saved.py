"""Files that an earlier version wrote load, and mean what they meant.

`saved/` was written before the modules moved into rooms, so that registered
names are all that holds; `corrections.json` and `corrected_teachers.keras` when
corrections had come.
"""

import io
import json
import pathlib
import re
import zipfile

import h5py
import helpers
import keras
import numpy as np
import pytest

import keras_ptloss
from keras_ptloss import layers, losses, metrics, proxy

SAVED = pathlib.Path(__file__).parent / "saved"
CORRECTIONS = json.loads((SAVED / "corrections.json").read_text())
OBJECTS = json.loads((SAVED / "objects.json").read_text()) | CORRECTIONS


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
        config["teacher_bias"] = config.get("teacher_bias") or 0.0
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


def test_every_registered_class_is_there():
    """A class that comes gets a file, in a `.keras` or in the JSON."""
    kept = {saved["registered_name"] for saved in OBJECTS.values()}
    for path in SAVED.glob("*.keras"):
        with zipfile.ZipFile(path) as archive:
            config = archive.read("config.json").decode()
        kept |= set(re.findall(r'"(keras_ptloss>\w+)"', config))
    public = [
        thing
        for room in (keras_ptloss, layers, losses, metrics, proxy)
        for thing in vars(room).values()
        if isinstance(thing, type)
    ]
    names = {keras.saving.get_registered_name(thing) for thing in public}
    registered = {name for name in names if name.startswith("keras_ptloss>")}
    assert len(registered) >= 16
    assert registered - kept == set()
    for name in kept:
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

    def corrected(self, config):
        """`softmax(A' log q + b')` of the fixed point `q` of `softmax(A z)`."""
        teacher = helpers.softmax(np.log(self.teacher) * config["scale"])
        q = proxy.proxy_teacher(teacher, config["epsilon"]).probabilities
        np.testing.assert_allclose(
            helpers.fixed_point(teacher, q, config["epsilon"]), q, atol=1e-9
        )
        matrix = np.array(config["proxy_scale"])
        return helpers.softmax(np.log(q) @ matrix.T + config["proxy_bias"])

    def test_correction(self):
        saved = CORRECTIONS["Correction"]
        correction = keras.saving.deserialize_keras_object(saved)
        np.testing.assert_allclose(
            correction.proxy(self.teacher).probabilities,
            self.corrected(saved["config"]),
            rtol=1e-9,
        )

    @pytest.mark.parametrize("name", ["ProxyKLDivergence", "CorrectedTeacher"])
    def test_with_a_correction(self, name):
        saved = CORRECTIONS[name]
        target = self.corrected(saved["config"]["correction"]["config"])
        thing = keras.saving.deserialize_keras_object(saved)
        if name == "CorrectedTeacher":
            got = np.asarray(thing(self.teacher.astype("float32")))
            np.testing.assert_allclose(got, target, rtol=1e-4)
            return
        rows = helpers.pt_loss_of_logits(target, self.logits, 0.0)
        np.testing.assert_allclose(self.value(name), rows.mean(), rtol=1e-5)

    def test_matrix(self):
        """Of a teacher whose rows are logits, as the student's are."""
        config = CORRECTIONS["PTLoss_matrix"]["config"]
        z = self.teacher @ np.array(config["teacher_scale"]).T
        rows = helpers.pt_loss_of_logits(
            helpers.softmax(z + config["teacher_bias"]),
            self.logits,
            config["epsilon"],
        )
        np.testing.assert_allclose(
            self.value("PTLoss_matrix"), rows.mean(), rtol=1e-5
        )

    def test_top_k(self):
        """Of three classes two are kept; the third is the rest."""
        loss = keras.saving.deserialize_keras_object(CORRECTIONS["TopKPTLoss"])
        epsilon = CORRECTIONS["TopKPTLoss"]["config"]["epsilon"]
        ids = np.tile([2, 0], (len(self.teacher), 1))
        kept = np.log(self.teacher[:, [2, 0]])
        rows = helpers.pt_loss_of_logits(self.teacher, self.logits, epsilon)
        value = loss(np.stack([ids, kept], axis=-1), self.logits)
        np.testing.assert_allclose(float(value), rows.mean(), rtol=1e-5)


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


def test_corrected_teachers(inputs):
    """Two live teachers of 3 and 5 classes, side by side, and a matrix."""
    model = keras.saving.load_model(SAVED / "corrected_teachers.keras")
    beside, corrected = model.layers
    rows = [
        np.log(helpers.softmax(teacher.predict(inputs, verbose=0)))
        for teacher in beside.teachers
    ]
    correction = corrected.correction
    assert correction.scale.shape == (3, 8)
    z = np.concatenate(rows, axis=1) @ correction.scale.T + correction.bias
    outputs = model.predict(inputs, verbose=0)
    np.testing.assert_allclose(outputs, helpers.softmax(z), rtol=1e-4)
    np.testing.assert_allclose(
        outputs, np.load(SAVED / "corrected_teachers_outputs.npy"), rtol=1e-5
    )
