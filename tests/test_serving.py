"""Exported students against the models they were written from."""

import concurrent.futures
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request

import keras
import numpy as np
import pytest
import scipy.special
from keras import layers

from keras_ptloss import export_student, serving
from keras_ptloss._math import model_probs

tf = pytest.importorskip("tensorflow")

BACKEND = keras.backend.backend()
CLOSE = {"rtol": 0, "atol": 1e-5}
NAMES = ["cat", "dog", "Vögel"]

on_tensorflow = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="Keras does it with TensorFlow only"
)
on_jax = pytest.mark.skipif(BACKEND != "jax", reason="about JAX")


def image_student():
    """Random layers, Dropout and BatchNormalization differ in training."""
    return keras.Sequential(
        [
            keras.Input((6, 6, 1), name="image"),
            layers.RandomFlip(seed=0),
            layers.Conv2D(4, 3),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(3),
        ]
    )


def text_student():
    """As KerasHub's: a dict of inputs, whose free lengths must agree."""
    inputs = {
        name: keras.Input((None,), name=name, dtype="int32")
        for name in ("token_ids", "padding_mask")
    }
    mask = keras.ops.cast(inputs["padding_mask"], "float32")
    vectors = layers.Embedding(20, 8)(inputs["token_ids"])
    vectors = vectors * keras.ops.expand_dims(mask, axis=-1)
    pooled = layers.GlobalAveragePooling1D()(vectors)
    return keras.Model(inputs, layers.Dense(3)(pooled))


def list_student():
    """Names that TensorFlow does not take as they are, and none."""
    inputs = [
        keras.Input((4,), name="Left-pixel values.0"),
        keras.Input((2,)),
    ]
    return keras.Model(inputs, layers.Dense(3)(layers.Concatenate()(inputs)))


def tagging_student():
    inputs = keras.Input((5, 4))
    return keras.Model(inputs, layers.Dense(3)(inputs))


STUDENTS = {
    "image": (image_student, {"image": (6, 6, 1)}),
    "text": (text_student, {"token_ids": (7,), "padding_mask": (7,)}),
    "list": (list_student, {"Left_pixel_values_0": (4,), "inputs_1": (2,)}),
    "tagging": (tagging_student, {"inputs": (5, 4)}),
}


@pytest.fixture(scope="module")
def students():
    """One student of each kind, none of whose weights is 0 or 1."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    made = {kind: make() for kind, (make, _) in STUDENTS.items()}
    for student in made.values():
        for weight in student.weights:
            if "float" in keras.backend.standardize_dtype(weight.dtype):
                weight.assign(rng.uniform(0.1, 1, size=weight.shape))
    return made


@pytest.fixture(scope="module")
def saved(students, tmp_path_factory):
    """The path of a SavedModel of each kind."""
    folder = tmp_path_factory.mktemp("saved")
    return {
        kind: export(student, folder / kind, class_names=NAMES)
        for kind, student in students.items()
    }


@pytest.fixture(scope="module")
def small():
    return keras.Sequential([keras.Input((4,), name="x"), layers.Dense(3)])


def export(student, directory, **arguments):
    return export_student(
        student, directory, **({"from_logits": True} | arguments)
    )


def batch(kind, size):
    """Return inputs by the names in the export, and as the model takes them."""
    rng = np.random.default_rng(size)
    named = {}
    for name, shape in STUDENTS[kind][1].items():
        if kind == "text":
            high = 20 if name == "token_ids" else 2
            named[name] = rng.integers(0, high, (size, *shape)).astype("int32")
        else:
            named[name] = rng.normal(size=(size, *shape)).astype("float32")
    values = list(named.values())
    return named, (
        named if kind == "text" else values if len(values) > 1 else values[0]
    )


def probabilities(student, inputs):
    """The student's probabilities, from its logits by SciPy."""
    logits = keras.ops.convert_to_numpy(student(inputs, training=False))
    return scipy.special.softmax(logits.astype("float64"), axis=-1)


def load(path):
    """Return the signature that servers call, as a function of arrays."""
    model = tf.saved_model.load(str(path))
    serve = model.signatures["serving_default"]

    def call(**inputs):
        outputs = serve(**{k: tf.constant(v) for k, v in inputs.items()})
        return {name: value.numpy() for name, value in outputs.items()}

    call.model = model  # It owns the variables.
    call.specs = serve.structured_input_signature[1]
    return call


def listing(path):
    return sorted(str(file.relative_to(path)) for file in path.rglob("*"))


# What is served.


@pytest.mark.parametrize("kind", STUDENTS)
def test_served_as_trained(kind, students, saved):
    """Any number of rows, none too; `TFSMLayer` takes what the student does."""
    serve = load(saved[kind])
    assert set(serve.model.signatures) == {"serve", "serving_default"}
    assert set(serve.specs) == set(STUDENTS[kind][1])
    for size in (0, 1, 7):
        named, inputs = batch(kind, size)
        served = serve(**named)
        assert served["probabilities"].dtype == np.float32
        assert served["label"].dtype == np.int32
        if not size:
            rows = (0, 5) if kind == "tagging" else (0,)
            assert served["probabilities"].shape == (*rows, 3)
            assert served["label"].shape == served["class_name"].shape == rows
            continue
        expected = probabilities(students[kind], inputs)
        np.testing.assert_allclose(served["probabilities"], expected, **CLOSE)
        labels = expected.argmax(-1)
        np.testing.assert_array_equal(served["label"], labels)
        names = np.array([name.encode() for name in NAMES], object)
        np.testing.assert_array_equal(served["class_name"], names[labels])
    if BACKEND == "tensorflow":
        layer = layers.TFSMLayer(str(saved[kind]))
        again = layer(keras.tree.map_structure(tf.constant, inputs))
        np.testing.assert_allclose(again["probabilities"], expected, **CLOSE)


def test_requests_at_once(students, saved):
    """From JAX, each request also writes Dropout's random state back."""
    serve = load(saved["image"])
    named, inputs = batch("image", 200)
    images = named["image"]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        served = pool.map(
            lambda i: serve(image=images[i : i + 1])["probabilities"],
            range(200),
        )
        np.testing.assert_allclose(
            np.concatenate(list(served)),
            probabilities(students["image"], inputs),
            **CLOSE,
        )


@pytest.mark.ci
def test_bert_of_free_length(tmp_path):
    """KerasHub's, whose position table ends at 128."""
    models = pytest.importorskip("keras_hub.models")
    backbone = models.BertBackbone(30, 1, 2, 16, 32, max_sequence_length=128)
    student = models.BertTextClassifier(backbone, num_classes=2)
    serve = load(export(student, tmp_path))
    for length in (2, 128):
        named = {name: np.ones((1, length), "int32") for name in serve.specs}
        np.testing.assert_allclose(
            serve(**named)["probabilities"],
            probabilities(student, named),
            **CLOSE,
        )
    with pytest.raises(tf.errors.InvalidArgumentError):
        serve(**{name: np.ones((1, 129), "int32") for name in serve.specs})


@on_jax
def test_sizes_that_jax_cannot_leave_free(tmp_path):
    inputs = keras.Input((None, 3), name="x")
    halves = keras.ops.reshape(inputs, (-1, 2, 3))
    student = keras.Model(inputs, layers.Dense(3)(halves))
    with pytest.raises(Exception) as error:
        export(student, tmp_path)
    assert (
        "fix that size with keras.Input(shape=...)" in error.value.__notes__[-1]
    )
    assert listing(tmp_path) == []


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision(policy, tmp_path):
    student = keras.Sequential(
        [keras.Input((4,), name="x"), layers.Dense(3, dtype=policy)]
    )
    serve = load(export(student, tmp_path))
    x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    np.testing.assert_allclose(
        serve(x=x)["probabilities"], probabilities(student, x), atol=1e-2
    )


@pytest.mark.parametrize("from_logits", [False, True])
def test_binary_head(from_logits, tmp_path):
    """One output is served as two classes."""
    student = keras.Sequential(
        [
            keras.Input((4,), name="x"),
            layers.Dense(1, None if from_logits else "sigmoid"),
        ]
    )
    names = ["ham", "spam"]
    path = export(student, tmp_path, from_logits=from_logits, class_names=names)
    x = np.random.default_rng(0).normal(size=(9, 4)).astype("float32")
    kernel, bias = student.get_weights()
    p = scipy.special.expit(x.astype("float64") @ kernel + bias)
    assert 0 < (p > 0.5).sum() < 9
    served = load(path)(x=x)
    np.testing.assert_allclose(
        served["probabilities"], np.concatenate([1 - p, p], axis=-1), **CLOSE
    )
    np.testing.assert_array_equal(
        served["class_name"], np.where(p[:, 0] > 0.5, b"spam", b"ham")
    )


def test_names_ties_and_permissions(tmp_path):
    """Of equal probabilities the first class wins; the batch size is freed."""
    inputs = keras.Input(batch_shape=(2, 4), name="x")
    dense = layers.Dense(3, "softmax", kernel_initializer="ones")
    student = keras.Model(inputs, dense(inputs))
    before = os.umask(0o022)
    try:
        path = export(student, tmp_path, from_logits=False, class_names=NAMES)
    finally:
        os.umask(before)
    served = load(path)(x=np.ones((5, 4), "float32"))
    np.testing.assert_allclose(served["probabilities"], 1 / 3, rtol=1e-6)
    assert served["label"].tolist() == [0] * 5
    file = path / "assets.extra" / "class_names.json"
    assert json.loads(file.read_text("utf-8")) == NAMES
    for entry in [path, *path.rglob("*")]:
        assert entry.stat().st_mode & 0o044 == 0o044, entry


# Folders.


def test_versions(small, tmp_path):
    """The next number by default; an existing one is never overwritten."""
    for stray in ("0012", "13.old", "notes", "-20"):
        (tmp_path / stray).mkdir()
    assert export(small, tmp_path).name == "13"
    assert export(small, tmp_path, version=3).name == "3"
    before = listing(tmp_path)
    with pytest.raises(
        ValueError, match="not exist.*next version.*overwrite.*version=12"
    ):
        export(small, tmp_path, version=12)
    assert listing(tmp_path) == before


def test_a_version_made_meanwhile_is_kept(small, tmp_path, monkeypatch):
    """Another export takes the number between the check and the rename."""
    rename = pathlib.Path.rename

    def late(self, target):
        if target.name == "1" and not target.exists():
            target.mkdir()
            (target / "theirs").touch()
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", late)
    assert export(small, tmp_path).name == "2"
    assert listing(tmp_path / "1") == ["theirs"]


@pytest.mark.parametrize("damage", ["write", "load"])
def test_a_failure_leaves_nothing(small, tmp_path, monkeypatch, damage):
    write = serving._write_saved_model

    def fail(student, signature, path, *args):
        if damage == "write":
            (path / "half").touch()
            raise OSError("saved_model.pb: disk full")
        write(student, signature, path, *args)
        (path / "saved_model.pb").write_bytes(b"no model")

    monkeypatch.setattr(serving, "_write_saved_model", fail)
    with pytest.raises(OSError, match=r"saved_model\.pb"):
        export(small, tmp_path)
    assert listing(tmp_path) == []


def test_only_abandoned_folders_are_cleared(tmp_path):
    (tmp_path / ".exporting-abandoned").mkdir()
    with serving._temporary_folder(tmp_path) as first:
        with serving._temporary_folder(tmp_path) as second:
            folders = {first.parent, second.parent}
            assert set(tmp_path.iterdir()) == folders
        assert list(tmp_path.iterdir()) == [first.parent]
    assert list(tmp_path.iterdir()) == []


KILLED = """
import keras, os, signal, sys
from keras_ptloss import serving

def die(student, signature, path, *args):
    (path / "half").touch()
    print("writing", flush=True)
    sys.stdin.read()  # until it is killed

serving._write_saved_model = die
student = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
serving.export_student(student, sys.argv[1], from_logits=True, verbose=0)
"""


@pytest.mark.ci
def test_a_killed_export_is_cleared_by_the_next(small, tmp_path):
    """While it still runs, the next export leaves its folder alone."""
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"writing\n"
        export(small, tmp_path)
        [temporary] = tmp_path.glob(".exporting-*")
        assert (temporary / "version" / "half").exists()
        process.kill()
    export(small, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


# Strings in.


def test_preprocessor_of_pairs(students, tmp_path):
    """Every required argument is an input, such as MNLI's two sentences."""

    def preprocess(premise, hypothesis, length=6):
        joined = tf.strings.join([premise, hypothesis], " ")
        pieces = tf.strings.bytes_split(joined).to_tensor(
            "", shape=(None, length)
        )
        ids = tf.strings.to_hash_bucket_fast(pieces, 20)  # int64, to be cast
        return {"token_ids": ids, "padding_mask": pieces != ""}

    serve = load(export(students["text"], tmp_path, preprocessor=preprocess))
    pair = {"premise": ["a", "bcd"], "hypothesis": ["e", "fghij"]}
    assert {spec.dtype for spec in serve.specs.values()} == {tf.string}
    made = preprocess(**{k: tf.constant(v) for k, v in pair.items()})
    made = {k: tf.cast(v, "int32").numpy() for k, v in made.items()}
    np.testing.assert_allclose(
        serve(**pair)["probabilities"],
        probabilities(students["text"], made),
        **CLOSE,
    )


def test_preprocessor_with_a_lookup_table(small, tmp_path):
    class Lookup(tf.Module):
        def __init__(self):
            super().__init__()
            self.table = tf.lookup.StaticHashTable(
                tf.lookup.KeyValueTensorInitializer(["a", "b"], [1.0, 2.0]), 0.0
            )

        def __call__(self, word):
            return tf.tile(self.table.lookup(word)[:, None], (1, 4))

    serve = load(export(small, tmp_path, preprocessor=Lookup()))
    np.testing.assert_allclose(
        serve(word=["b", "?"])["probabilities"],
        probabilities(small, np.array([[2.0] * 4, [0.0] * 4], "float32")),
        **CLOSE,
    )


@pytest.fixture(scope="module")
def vectorizer():
    layer = layers.TextVectorization(
        output_mode="int", output_sequence_length=7
    )
    layer.adapt(np.array(["good film", "bad film"]))
    inputs = keras.Input((7,), name="token_ids", dtype="int32")
    x = layers.Embedding(layer.vocabulary_size(), 4)(inputs)
    outputs = layers.Dense(2)(layers.GlobalAveragePooling1D()(x))
    return layer, keras.Model(inputs, outputs)


@on_tensorflow
def test_layer_as_preprocessor_and_inside_the_model(vectorizer, tmp_path):
    layer, student = vectorizer
    inputs = keras.Input((), name="text", dtype="string")
    whole = keras.Model(inputs, student(layer(inputs)))
    texts = tf.constant(["good film", "a bad one"])
    expected = probabilities(student, layer(texts))
    path = export(student, tmp_path / "preprocessor", preprocessor=layer)
    for answer in (
        load(path)(inputs=texts),
        layers.TFSMLayer(str(path))(texts),
        load(export(whole, tmp_path / "whole"))(text=texts),
    ):
        np.testing.assert_allclose(answer["probabilities"], expected, **CLOSE)


# Other formats.


@on_tensorflow
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize("kind", ["image", "text", "list"])
def test_litert(kind, students, tmp_path):
    path = export(students[kind], tmp_path, class_names=NAMES, format="litert")
    assert "model.tflite" in listing(path)
    interpreter = tf.lite.Interpreter(str(path / "model.tflite"))
    run = interpreter.get_signature_runner("serving_default")
    for size in (1, 7):
        named, inputs = batch(kind, size)
        expected = probabilities(students[kind], inputs)
        served = run(**named)
        np.testing.assert_allclose(served["probabilities"], expected, **CLOSE)
        np.testing.assert_array_equal(served["label"], expected.argmax(-1))


@pytest.mark.filterwarnings("ignore:.*np.object:FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "kind", ["text", "list", pytest.param("image", marks=pytest.mark.ci)]
)
def test_onnx(kind, students, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    path = export(students[kind], tmp_path, format="onnx")
    session = runtime.InferenceSession(path / "model.onnx")
    named, _ = batch(kind, 0)
    assert session.run(["probabilities"], named)[0].shape == (0, 3)
    for size in (1, 7):
        named, inputs = batch(kind, size)
        served = session.run(["probabilities", "label"], named)
        expected = probabilities(students[kind], inputs)
        np.testing.assert_allclose(served[0], expected, **CLOSE)
        np.testing.assert_array_equal(served[1], expected.argmax(-1))


@pytest.mark.parametrize(
    "format", ["onnx", pytest.param("litert", marks=on_tensorflow)]
)
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
def test_bfloat16_needs_a_saved_model(format, policy, tmp_path):
    """Also where a layer inside a layer computes in it."""
    inner = keras.Sequential([layers.Dense(8, dtype=policy), layers.Dense(3)])
    student = keras.Sequential([keras.Input((4,)), inner])
    with pytest.raises(ValueError, match="`model` must not.*bfloat16.*float32"):
        export(student, tmp_path, format=format)
    assert listing(tmp_path) == []


def test_an_export_with_other_answers_is_reported(small, tmp_path, monkeypatch):
    def other(model, inputs, from_logits):
        outputs = -1.0 * model(inputs)
        probs = model_probs(outputs, from_logits=from_logits)
        label = keras.ops.argmax(outputs, axis=-1)
        return keras.Model(inputs, {"probabilities": probs, "label": label})

    monkeypatch.setattr(serving, "_serving_model", other)
    with pytest.warns(UserWarning, match="differ from the model's by up to"):
        export(small, tmp_path)


# Wrong arguments.


@pytest.mark.parametrize(
    "model",
    ["a path", keras.Sequential([layers.Dense(2)]), layers.Dense(2)],
)
def test_wrong_model(model, tmp_path):
    with pytest.raises(
        ValueError, match="`model` must be a built.*`student` of a Distiller"
    ):
        export(model, tmp_path / "new")


def test_wrong_output(tmp_path):
    inputs = keras.Input((4,))
    two = [layers.Dense(2)(inputs), layers.Dense(3)(inputs)]
    for outputs in (two, keras.ops.sum(inputs, axis=-1)):
        with pytest.raises(ValueError, match="`model` must have one output"):
            export(keras.Model(inputs, outputs), tmp_path)


@pytest.mark.parametrize(
    ("head", "from_logits"),
    [
        ([layers.Dense(3)], False),
        ([layers.Dense(1)], False),
        ([layers.Dense(3), layers.Lambda(lambda x: 2 * x)], False),
        ([layers.Dense(3, "softmax")], True),
        ([layers.Dense(3), layers.Lambda(keras.ops.softmax)], True),
        ([layers.Dense(1, "sigmoid")], True),
    ],
)
def test_from_logits_that_contradicts_the_model(head, from_logits, tmp_path):
    """The last layer shows it, or else the outputs for random inputs."""
    student = keras.Sequential([keras.Input((4,)), *head])
    match = (
        f"`from_logits` must be {not from_logits}.*from_logits={from_logits}"
    )
    with pytest.raises(ValueError, match=match):
        export(student, tmp_path / "new", from_logits=from_logits)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"format": "savedmodel"}, "one of 'tf_saved_model', 'onnx'"),
        ({"version": 0}, "an integer of at least 1"),
        ({"class_names": ["a", "b"]}, "3 different strings"),
        ({"class_names": ["a", "b", "b"]}, "3 different strings"),
        ({"preprocessor": len, "format": "onnx"}, "None except in a SavedM"),
    ],
)
def test_wrong_arguments(small, tmp_path, arguments, expected):
    name = next(iter(arguments))
    with pytest.raises(ValueError, match=f"`{name}` must .*{expected}"):
        export(small, tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


# Over the wire.


@pytest.mark.ci
def test_grpc(students, saved):
    """PredictionService answers as the student; bad requests are refused."""
    service = pytest.importorskip(
        "tensorflow_serving.apis.prediction_service_pb2_grpc",
        reason="tensorflow-serving-api",
    )
    import grpc
    from tensorflow_serving.apis import predict_pb2

    serve = load(saved["image"])

    class Servicer(service.PredictionServiceServicer):
        def Predict(self, request, context):
            inputs = {k: tf.make_ndarray(v) for k, v in request.inputs.items()}
            try:
                outputs = serve(**inputs)
            except (TypeError, ValueError, tf.errors.OpError) as error:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            response = predict_pb2.PredictResponse()
            for name, value in outputs.items():
                response.outputs[name].CopyFrom(tf.make_tensor_proto(value))
            return response

    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    service.add_PredictionServiceServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    named, inputs = batch("image", 50)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = service.PredictionServiceStub(channel)

        def ask(**arrays):
            request = predict_pb2.PredictRequest()
            for name, value in arrays.items():
                request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
            outputs = stub.Predict(request, timeout=60).outputs
            return {k: tf.make_ndarray(v) for k, v in outputs.items()}

        served = ask(**named)
        expected = probabilities(students["image"], inputs)
        np.testing.assert_allclose(served["probabilities"], expected, **CLOSE)
        names = np.array([name.encode() for name in NAMES], object)
        np.testing.assert_array_equal(
            served["class_name"], names[expected.argmax(-1)]
        )
        for bad in ({}, {"image": named["image"][:, :3]}, {"other": [1.0]}):
            with pytest.raises(grpc.RpcError) as error:
                ask(**bad)
            assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    server.stop(None)


KSERVE = """
import sys, kserve, tensorflow as tf

serve = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]

class Student(kserve.Model):
    def __init__(self):
        super().__init__("student")
        self.ready = True

    def predict(self, payload, headers=None, response_headers=None):
        rows = payload["instances"]
        columns = {k: tf.constant([row[k] for row in rows]) for k in rows[0]}
        outputs = {k: v.numpy() for k, v in serve(**columns).items()}
        return {
            "predictions": [
                {
                    "probabilities": outputs["probabilities"][i].tolist(),
                    "class_name": outputs["class_name"][i].decode(),
                }
                for i in range(len(rows))
            ]
        }

kserve.ModelServer(http_port=int(sys.argv[2]), enable_grpc=False).start(
    [Student()]
)
"""


@pytest.mark.nightly
def test_kserve(students, saved):
    """TensorFlow Serving's REST form, in an environment without Keras."""
    python = os.environ.get("KSERVE_PYTHON")
    if python is None:
        pytest.skip("KSERVE_PYTHON must be a python with kserve and tensorflow")
    named, inputs = batch("list", 20)
    rows = [
        {name: values[i].tolist() for name, values in named.items()}
        for i in range(20)
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/models/student:predict",
        json.dumps({"instances": rows}).encode(),
        {"Content-Type": "application/json"},
    )
    command = [python, "-c", KSERVE, str(saved["list"]), str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(120):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(1)
            with urllib.request.urlopen(request, timeout=60) as response:
                answers = json.load(response)["predictions"]
        finally:
            process.terminate()
    expected = probabilities(students["list"], inputs)
    served = [answer["probabilities"] for answer in answers]
    np.testing.assert_allclose(served, expected, **CLOSE)
    names = [NAMES[label] for label in expected.argmax(-1)]
    assert [answer["class_name"] for answer in answers] == names
