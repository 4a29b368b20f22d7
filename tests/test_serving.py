"""Exported students against the models they were written from."""

import concurrent.futures
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import threading

import helpers
import keras
import numpy as np
import pytest
import scipy.special

from keras_ptloss.serving import _export, export_student

tf = pytest.importorskip("tensorflow")

BACKEND = keras.backend.backend()
ROOT = pathlib.Path(__file__).parents[1]
CLOSE = {"rtol": 0, "atol": 1e-5}
layers = keras.layers

on_tensorflow = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="Keras does it with TensorFlow only"
)
on_jax = pytest.mark.skipif(BACKEND != "jax", reason="about JAX")


def image_student():
    """All but convolution and head behave otherwise in training."""
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
    """As keras-hub's: inputs in a dict, of free length, that must agree."""
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
    inputs = [keras.Input((4,), name="left"), keras.Input((2,), name="right")]
    return keras.Model(inputs, layers.Dense(3)(layers.Concatenate()(inputs)))


def unnamed_student():
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Dense(3)(inputs))


def unnamed_pair():
    inputs = [keras.Input((4,)), keras.Input((2,))]
    return keras.Model(inputs, layers.Dense(3)(layers.Concatenate()(inputs)))


def tagging_student():
    inputs = keras.Input((5, 4), name="sequence")
    return keras.Model(inputs, layers.Dense(3)(inputs))


STUDENTS = {
    "image": (image_student, {"image": (6, 6, 1)}),
    "text": (text_student, {"token_ids": (7,), "padding_mask": (7,)}),
    "list": (list_student, {"left": (4,), "right": (2,)}),
    "unnamed": (unnamed_student, {"inputs": (4,)}),
    "unnamed_pair": (unnamed_pair, {"inputs_0": (4,), "inputs_1": (2,)}),
    "tagging": (tagging_student, {"sequence": (5, 4)}),
}
every_student = pytest.mark.parametrize("kind", list(STUDENTS))


def build(kind):
    """Return a student with weights of its own, and its input shapes."""
    keras.utils.set_random_seed(0)
    make, shapes = STUDENTS[kind]
    student = make()
    rng = np.random.default_rng(0)
    for weight in student.weights:
        if "float" in keras.backend.standardize_dtype(weight.dtype):
            weight.assign(rng.uniform(0.1, 1, size=weight.shape))
    return student, shapes


def batch(shapes, size, seed=0):
    """Return named inputs, and the same in the form that the model takes."""
    rng = np.random.default_rng(seed)
    named = {}
    for name, shape in shapes.items():
        if name in ("token_ids", "padding_mask"):
            high = 20 if name == "token_ids" else 2
            values = rng.integers(0, high, (size, *shape)).astype("int32")
        else:
            values = rng.normal(size=(size, *shape)).astype("float32")
        named[name] = values
    if "token_ids" in named:
        return named, named
    values = list(named.values())
    return named, values[0] if len(values) == 1 else values


def probabilities(student, inputs):
    """What the student says, by NumPy from its logits."""
    logits = keras.ops.convert_to_numpy(student(inputs, training=False))
    return scipy.special.softmax(logits.astype("float64"), axis=-1)


def signature(path):
    """The signature that TensorFlow Serving calls, kept with its model."""
    model = tf.saved_model.load(str(path))
    return model, model.signatures["serving_default"]


@pytest.fixture
def small():
    student, _ = build("unnamed")
    return student


# What is written.


@every_student
def test_reload_by_tensorflow(kind, tmp_path):
    student, shapes = build(kind)
    names = ["cat", "dog", "Vögel"]
    path = export_student(
        student, tmp_path / "student", from_logits=True, class_names=names
    )
    assert path == tmp_path / "student" / "1"
    model, serve = signature(path)
    assert set(model.signatures) == {"serve", "serving_default"}
    specs = serve.structured_input_signature[1]
    assert set(specs) == set(shapes)
    for size in (1, 7):
        named, inputs = batch(shapes, size, seed=size)
        expected = probabilities(student, inputs)
        served = serve(
            **{name: tf.constant(value) for name, value in named.items()}
        )
        assert set(served) == {"probabilities", "label", "class_name"}
        assert served["probabilities"].dtype == tf.float32
        assert served["label"].dtype == tf.int32
        np.testing.assert_allclose(served["probabilities"], expected, **CLOSE)
        labels = expected.argmax(-1)
        np.testing.assert_array_equal(served["label"], labels)
        np.testing.assert_array_equal(
            served["class_name"],
            np.array([name.encode() for name in names], object)[labels],
        )


@on_tensorflow
@every_student
def test_reload_by_keras(kind, tmp_path):
    """`TFSMLayer` takes what the student takes."""
    student, shapes = build(kind)
    path = export_student(student, tmp_path, from_logits=True)
    layer = keras.layers.TFSMLayer(str(path))
    for size in (1, 7):
        _, inputs = batch(shapes, size, seed=size)
        inputs = keras.tree.map_structure(tf.constant, inputs)
        np.testing.assert_allclose(
            layer(inputs)["probabilities"],
            probabilities(student, inputs),
            **CLOSE,
        )


def test_free_length(tmp_path):
    student, shapes = build("text")
    _, serve = signature(export_student(student, tmp_path, from_logits=True))
    for length in (1, 30):
        named, inputs = batch(dict.fromkeys(shapes, (length,)), 2)
        np.testing.assert_allclose(
            serve(**{k: tf.constant(v) for k, v in named.items()})[
                "probabilities"
            ],
            probabilities(student, inputs),
            **CLOSE,
        )


def test_probabilities_are_left_alone(tmp_path):
    inputs = keras.Input((4,), name="x")
    student = keras.Model(inputs, layers.Dense(3, activation="softmax")(inputs))
    _, serve = signature(export_student(student, tmp_path))
    x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    np.testing.assert_allclose(
        serve(x=tf.constant(x))["probabilities"], student(x), **CLOSE
    )


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy, tmp_path):
    inputs = keras.Input((4,), name="x")
    student = keras.Model(inputs, layers.Dense(3, dtype=policy)(inputs))
    _, serve = signature(export_student(student, tmp_path, from_logits=True))
    x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    logits = keras.ops.cast(student(x), "float32")
    np.testing.assert_allclose(
        serve(x=tf.constant(x))["probabilities"],
        keras.ops.softmax(logits),
        rtol=0,
        atol=1e-2,  # two compiled products of half precision
    )


def test_ties_go_to_the_first_class(tmp_path):
    student = keras.Sequential(
        [keras.Input((2,), name="x"), layers.Dense(3, "softmax", False, "ones")]
    )
    _, serve = signature(export_student(student, tmp_path))
    assert serve(x=tf.zeros((1, 2)))["label"].numpy().tolist() == [0]


def test_a_fixed_batch_size_is_freed(tmp_path):
    inputs = keras.Input(batch_shape=(2, 4), name="x")
    student = keras.Model(inputs, layers.Dense(3)(inputs))
    _, serve = signature(export_student(student, tmp_path, from_logits=True))
    specs = serve.structured_input_signature[1]
    assert specs["x"].shape.as_list() == [None, 4]
    x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    np.testing.assert_allclose(
        serve(x=tf.constant(x))["probabilities"],
        scipy.special.softmax(x @ student.get_weights()[0], axis=-1),
        **CLOSE,
    )


def test_requests_at_once(tmp_path):
    """From JAX, each request also writes the state of Dropout back."""
    student, shapes = build("image")
    _, serve = signature(export_student(student, tmp_path, from_logits=True))
    named, inputs = batch(shapes, 400)
    images = tf.constant(named["image"])
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        served = list(
            pool.map(
                lambda i: serve(image=images[i : i + 1])["probabilities"],
                range(400),
            )
        )
    np.testing.assert_allclose(
        np.concatenate(served), probabilities(student, inputs), **CLOSE
    )


def test_after_training_and_subclassing(tmp_path):
    """A student that was fit, and one that is wrapped as the error advises."""

    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            return self.dense(x)

    student = Subclassed()
    student.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    student.fit(x, np.zeros((8, 3), "float32"), verbose=0)
    inputs = keras.Input((4,), name="x")
    wrapped = keras.Model(inputs, student(inputs))
    _, serve = signature(export_student(wrapped, tmp_path, from_logits=True))
    np.testing.assert_allclose(
        serve(x=tf.constant(x))["probabilities"],
        probabilities(student, x),
        **CLOSE,
    )


def test_class_names_file(small, tmp_path):
    names = ("non-entailment", "entailment", "widersprüchlich")
    path = export_student(small, tmp_path, from_logits=True, class_names=names)
    file = path / "assets.extra" / "class_names.json"
    assert json.loads(file.read_text("utf-8")) == list(names)
    bare = export_student(small, tmp_path, from_logits=True)
    assert not (bare / "assets.extra").exists()
    _, serve = signature(bare)
    assert set(serve.structured_outputs) == {"probabilities", "label"}


@pytest.mark.slow
def test_stands_alone(small, tmp_path):
    """TensorFlow reads it in a process that can import neither package."""
    path = export_student(small, tmp_path, from_logits=True)
    code = (
        "import sys; sys.modules['keras'] = sys.modules['jax'] = None\n"
        "sys.modules['keras_ptloss'] = None\n"
        "import tensorflow as tf\n"
        f"model = tf.saved_model.load({str(path)!r})\n"
        "out = model.signatures['serving_default'](inputs=tf.ones((2, 4)))\n"
        "print(out['probabilities'].numpy().tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    np.testing.assert_allclose(
        json.loads(done.stdout),
        probabilities(small, np.ones((2, 4), "float32")),
        **CLOSE,
    )


# Versions.


def test_versions_count_up(small, tmp_path):
    def export(**kwargs):
        return export_student(small, tmp_path, from_logits=True, **kwargs).name

    assert [export(), export(), export(version=7), export()] == list("1278")
    (tmp_path / "0012").mkdir()  # 12, to a server
    for stray in ("13.old", ".exporting-x", "notes", "-20"):
        (tmp_path / stray).mkdir()
    assert export() == "13"
    assert export(version=3) == "3"
    assert export() == "14"


@pytest.mark.parametrize("there", ["5", "0005"])
def test_existing_version(small, tmp_path, there):
    (tmp_path / there).mkdir()
    (tmp_path / there / "mine").write_text("kept")
    with pytest.raises(
        ValueError, match="`version` must be a number that is not yet in.*=5"
    ):
        export_student(small, tmp_path, from_logits=True, version=5)
    assert listing(tmp_path) == [there, f"{there}/mine"]


def listing(path):
    return sorted(str(file.relative_to(path)) for file in path.rglob("*"))


@pytest.mark.parametrize("version", [None, 1])
def test_a_version_made_meanwhile_is_never_overwritten(
    small, tmp_path, monkeypatch, version
):
    """Another export comes between the last look and the rename."""
    rename = pathlib.Path.rename

    def late(self, target):
        monkeypatch.undo()
        target.mkdir()
        (target / "theirs").touch()
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", late)
    if version is None:
        assert export_student(small, tmp_path, from_logits=True).name == "2"
    else:
        with pytest.raises(ValueError, match="not yet in"):
            export_student(small, tmp_path, from_logits=True, version=version)
    assert listing(tmp_path / "1") == ["theirs"]
    assert not list(tmp_path.glob(".exporting-*"))


def test_other_errors_of_the_rename_are_raised(small, tmp_path, monkeypatch):
    def rename(self, target):
        raise PermissionError("read-only")

    monkeypatch.setattr(pathlib.Path, "rename", rename)
    with pytest.raises(PermissionError, match="read-only"):
        export_student(small, tmp_path, from_logits=True)
    assert listing(tmp_path) == []


def test_a_failing_export_leaves_nothing(small, tmp_path):
    """TensorFlow refuses, while writing, a table that a function holds."""
    table = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(["a"], [1.0]), 0.0
    )

    def preprocess(text):
        return tf.tile(table.lookup(text)[:, None], (1, 4))

    export_student(small, tmp_path, from_logits=True)
    before = listing(tmp_path)
    with pytest.raises(AssertionError, match="untracked"):
        export_student(
            small, tmp_path, from_logits=True, preprocessor=preprocess
        )
    assert listing(tmp_path) == before


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_after_half_the_files_leaves_nothing(
    small, tmp_path, monkeypatch, error
):
    def half(student, signature, path, *args):
        (path / "saved_model.pb").touch()
        raise error

    monkeypatch.setattr(_export, "write_saved_model", half)
    with pytest.raises(type(error)):
        export_student(small, tmp_path, from_logits=True)
    assert listing(tmp_path) == []


def test_a_watcher_sees_whole_versions_only(small, tmp_path):
    """As a server that polls the folder."""
    seen, stop = {}, threading.Event()

    def watch():
        while not stop.is_set():
            for entry in os.listdir(tmp_path):
                if entry.isdigit() and entry not in seen:
                    seen[entry] = listing(tmp_path / entry)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(3):
            export_student(
                small, tmp_path, from_logits=True, class_names=["a", "b", "c"]
            )
    finally:
        stop.set()
        watcher.join()
    assert seen
    for version, files in seen.items():
        assert files == listing(tmp_path / version)


def test_others_may_read_it(small, tmp_path):
    before = os.umask(0o022)
    try:
        path = export_student(
            small, tmp_path, from_logits=True, class_names=["a", "b", "c"]
        )
    finally:
        os.umask(before)
    for entry in [path, *path.rglob("*")]:
        assert entry.stat().st_mode & 0o044 == 0o044, entry


# Strings in.


def test_preprocessor_function(small, tmp_path):
    def preprocess(text):
        length = tf.cast(tf.strings.length(text), "float32")
        return tf.stack([length, length, length, -length], axis=-1)

    path = export_student(
        small, tmp_path, from_logits=True, preprocessor=preprocess
    )
    _, serve = signature(path)
    assert serve.structured_input_signature[1]["text"].dtype == tf.string
    lengths = np.array([[0.0], [3.0], [12.0]], "float32")
    np.testing.assert_allclose(
        serve(text=tf.constant(["", "abc", "x" * 12]))["probabilities"],
        probabilities(small, lengths * [1, 1, 1, -1]),
        **CLOSE,
    )


def test_preprocessor_of_pairs(tmp_path):
    """Every required argument is an input: MNLI's two sentences."""
    student, _ = build("text")

    def preprocess(premise, hypothesis, length=6):
        joined = tf.strings.join([premise, hypothesis], " ")
        pieces = tf.strings.bytes_split(joined).to_tensor(
            "", shape=(None, length)
        )
        ids = tf.strings.to_hash_bucket_fast(pieces, 20)  # int64: is cast
        return {"token_ids": ids, "padding_mask": pieces != ""}

    path = export_student(
        student,
        tmp_path,
        from_logits=True,
        preprocessor=preprocess,
        class_names=["a", "b", "c"],
    )
    _, serve = signature(path)
    pair = {"premise": ["a", "bcd"], "hypothesis": ["e", "fghij"]}
    pair = {name: tf.constant(texts) for name, texts in pair.items()}
    made = preprocess(**pair)
    made = {k: tf.cast(v, "int32").numpy() for k, v in made.items()}
    np.testing.assert_allclose(
        serve(**pair)["probabilities"], probabilities(student, made), **CLOSE
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

    path = export_student(
        small, tmp_path, from_logits=True, preprocessor=Lookup()
    )
    _, serve = signature(path)
    np.testing.assert_allclose(
        serve(word=tf.constant(["b", "?"]))["probabilities"],
        probabilities(small, np.array([[2.0] * 4, [0.0] * 4], "float32")),
        **CLOSE,
    )


def vectorizer():
    layer = layers.TextVectorization(
        output_mode="int", output_sequence_length=7
    )
    layer.adapt(np.array(["good film", "bad film"]))
    return layer


def embedding_student(layer):
    inputs = keras.Input((7,), name="token_ids", dtype="int32")
    x = layers.Embedding(layer.vocabulary_size(), 4)(inputs)
    return keras.Model(
        inputs, layers.Dense(2)(layers.GlobalAveragePooling1D()(x))
    )


@on_tensorflow
def test_preprocessor_layer(tmp_path):
    layer = vectorizer()
    student = embedding_student(layer)
    path = export_student(
        student, tmp_path, from_logits=True, preprocessor=layer
    )
    texts = tf.constant(["good film", "a bad one"])
    _, serve = signature(path)
    expected = probabilities(student, layer(texts))
    np.testing.assert_allclose(
        serve(inputs=texts)["probabilities"], expected, **CLOSE
    )
    # Also as the layer is called.
    again = keras.layers.TFSMLayer(str(path))
    np.testing.assert_allclose(again(texts)["probabilities"], expected, **CLOSE)


@on_tensorflow
def test_strings_into_the_model_itself(tmp_path):
    layer = vectorizer()
    inputs = keras.Input((), name="text", dtype="string")
    student = keras.Model(inputs, embedding_student(layer)(layer(inputs)))
    _, serve = signature(export_student(student, tmp_path, from_logits=True))
    texts = tf.constant(["good film", "a bad one"])
    np.testing.assert_allclose(
        serve(text=texts)["probabilities"],
        probabilities(student, texts),
        **CLOSE,
    )


@on_jax
def test_preprocessor_layer_needs_tensorflow(tmp_path):
    layer = vectorizer()
    with pytest.raises(
        ValueError, match="`preprocessor` must be a function of TensorFlow ops"
    ):
        export_student(embedding_student(layer), tmp_path, preprocessor=layer)


def test_preprocessor_must_return_the_models_inputs(small, tmp_path):
    def preprocess(text):
        return {"token_ids": tf.strings.length(text)}

    with pytest.raises(
        ValueError, match="`preprocessor` must be.*the model's inputs, inputs"
    ):
        export_student(
            small, tmp_path, from_logits=True, preprocessor=preprocess
        )
    assert listing(tmp_path) == []


# Other formats.


@on_tensorflow
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize("kind", ["image", "text", "list"])
def test_litert(kind, tmp_path):
    student, shapes = build(kind)
    path = export_student(
        student,
        tmp_path,
        from_logits=True,
        class_names=["a", "b", "c"],
        format="litert",
    )
    assert listing(path) == [
        "assets.extra",
        "assets.extra/class_names.json",
        "model.tflite",
    ]
    interpreter = tf.lite.Interpreter(str(path / "model.tflite"))
    run = interpreter.get_signature_runner("serving_default")
    for size in (1, 7):
        named, inputs = batch(shapes, size)
        served = run(**named)
        expected = probabilities(student, inputs)
        np.testing.assert_allclose(served["probabilities"], expected, **CLOSE)
        np.testing.assert_array_equal(served["label"], expected.argmax(-1))


@on_jax
def test_litert_needs_tensorflow(small, tmp_path):
    with pytest.raises(
        ValueError, match="'litert' needs KERAS_BACKEND=tensorflow.*Received"
    ):
        export_student(small, tmp_path, from_logits=True, format="litert")


@pytest.mark.filterwarnings("ignore:.*np.object:FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["image", "text", "list"])
def test_onnx(kind, tmp_path):
    pytest.importorskip(_export._NEEDS["onnx"][BACKEND])
    runtime = pytest.importorskip("onnxruntime")
    student, shapes = build(kind)
    path = export_student(student, tmp_path, from_logits=True, format="onnx")
    session = runtime.InferenceSession(path / "model.onnx")
    assert {i.name for i in session.get_inputs()} == set(shapes)
    for size in (1, 7):
        named, inputs = batch(shapes, size)
        served = session.run(["probabilities", "label"], named)
        expected = probabilities(student, inputs)
        np.testing.assert_allclose(served[0], expected, **CLOSE)
        np.testing.assert_array_equal(served[1], expected.argmax(-1))


def test_missing_package(small, tmp_path, monkeypatch):
    package = _export._NEEDS["onnx"][BACKEND]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError,
        match=rf"needs {package}: pip install 'keras_ptloss\[export\]'",
    ):
        export_student(small, tmp_path / "new", format="onnx")
    assert not (tmp_path / "new").exists()


# Wrong arguments.


class Distiller(keras.Model):
    """A stand-in: a subclassed model that holds a student."""

    def __init__(self, student):
        super().__init__()
        self.student = student


@pytest.mark.parametrize(
    "model",
    [
        "a path",
        keras.Sequential([keras.layers.Dense(2)]),
        Distiller(None),
        keras.layers.Dense(2),
    ],
)
def test_wrong_model(model, tmp_path):
    with pytest.raises(
        ValueError, match="`model` must be a built.*Distiller, its `student`"
    ):
        export_student(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("outputs", ["two", "no class axis"])
def test_wrong_output(outputs, tmp_path):
    inputs = keras.Input((4,))
    tensors = {
        "two": lambda: [layers.Dense(2)(inputs), layers.Dense(3)(inputs)],
        "no class axis": lambda: keras.ops.sum(inputs, axis=-1),
    }[outputs]()
    with pytest.raises(ValueError, match="`model` must have one output.*Rece"):
        export_student(keras.Model(inputs, tensors), tmp_path)


# Logits and probabilities.


def ending_in(ending, units=3):
    """A model with the same logits, whatever it ends in."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,), name="x")
    logits = layers.Dense(units)(inputs)
    return keras.Model(inputs, ending(logits))


def some_format(name):
    if name == "onnx":
        pytest.importorskip(_export._NEEDS["onnx"][BACKEND])
    return {"format": name}


formats = pytest.mark.parametrize("format", ["tf_saved_model", "onnx"])


@formats
@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize(
    "ending", [lambda z: z, layers.Identity(), keras.ops.tanh]
)
def test_forgotten_from_logits(tmp_path, ending, units, format):
    """Also where the last layer does not tell."""
    form, student = some_format(format), ending_in(ending, units)
    match = r"`from_logits` must be True.*Received: from_logits=False.*noise"
    with pytest.raises(ValueError, match=match):
        export_student(student, tmp_path / "new", **form)
    assert not (tmp_path / "new").exists()


@pytest.mark.filterwarnings("ignore:.*np.object:FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@formats
@pytest.mark.parametrize(
    ("ending", "units"),
    [
        (layers.Softmax(), 3),
        (layers.Activation("softmax"), 3),
        (keras.ops.softmax, 3),
        (layers.Activation("sigmoid"), 1),
    ],
)
def test_from_logits_of_probabilities(tmp_path, ending, units, format):
    form, student = some_format(format), ending_in(ending, units)
    if units == 1:  # the last activation of a dense layer tells
        student = keras.Sequential(
            [keras.Input((4,)), layers.Dense(1, "sigmoid")]
        )
    match = "`from_logits` must be False.*Received: from_logits=True"
    with pytest.raises(ValueError, match=match):
        export_student(student, tmp_path / "new", from_logits=True, **form)
    assert not (tmp_path / "new").exists()
    assert export_student(student, tmp_path, **form).name == "1"


def test_a_model_that_takes_no_noise_is_believed(tmp_path):
    class Strict(layers.Layer):
        def call(self, x):
            if x.shape[1] == 32:
                raise ValueError("not 32")
            return keras.ops.mean(x, axis=1)

    inputs = keras.Input((None, 3), name="x")
    student = keras.Model(inputs, Strict()(inputs))
    assert export_student(student, tmp_path).name == "1"


# Binary heads.


@pytest.mark.parametrize("from_logits", [False, True])
def test_binary_head(tmp_path, from_logits):
    """One output is served as the two events that it stands for."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,), name="x")
    dense = layers.Dense(1, None if from_logits else "sigmoid")
    student = keras.Model(inputs, dense(inputs))
    _, serve = signature(
        export_student(
            student,
            tmp_path,
            from_logits=from_logits,
            class_names=["ham", "spam"],
        )
    )
    x = np.random.default_rng(0).normal(size=(9, 4)).astype("float32")
    served = serve(x=tf.constant(x))
    kernel, bias = student.get_weights()
    p = scipy.special.expit(x.astype("float64") @ kernel + bias)
    expected = np.concatenate([1 - p, p], axis=-1)
    assert 0 < (p > 0.5).sum() < 9
    np.testing.assert_allclose(served["probabilities"], expected, **CLOSE)
    np.testing.assert_array_equal(served["label"], p[:, 0] > 0.5)
    np.testing.assert_array_equal(
        served["class_name"], np.where(p[:, 0] > 0.5, b"spam", b"ham")
    )


def test_binary_head_has_two_names(tmp_path):
    student = ending_in(lambda z: z, 1)
    with pytest.raises(ValueError, match="`class_names` must be 2 different"):
        export_student(
            student, tmp_path, from_logits=True, class_names=["spam"]
        )


# Free sizes with conditions of their own.


def unet():
    """Two halvings: images whose sides are multiples of 4."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((None, None, 1), name="image")
    conv = {"kernel_size": 3, "padding": "same"}
    fine = layers.Conv2D(2, activation="relu", **conv)(inputs)
    half = layers.Conv2D(2, **conv)(layers.MaxPooling2D()(fine))
    quarter = layers.Conv2D(2, **conv)(layers.MaxPooling2D()(half))
    half = layers.Concatenate()([layers.UpSampling2D()(quarter), half])
    up = layers.Conv2DTranspose(2, 3, 2, padding="same")(half)
    fine = layers.Concatenate()([up, fine])
    return keras.Model(inputs, layers.Conv2D(3, 1)(fine))


def test_unet_of_free_size(tmp_path):
    student = unet()
    _, serve = signature(export_student(student, tmp_path, from_logits=True))
    for shape in ((2, 8, 12, 1), (1, 4, 4, 1), (1, 40, 8, 1)):
        x = np.random.default_rng(0).normal(size=shape).astype("float32")
        np.testing.assert_allclose(
            serve(image=tf.constant(x))["probabilities"],
            probabilities(student, x),
            **CLOSE,
        )
    with pytest.raises(tf.errors.InvalidArgumentError):
        serve(image=tf.zeros((1, 9, 12, 1)))


def test_bert_of_free_length(tmp_path):
    """KerasHub's, whose table of positions ends at 128."""
    models = pytest.importorskip("keras_hub.models")
    preset = helpers.save_tiny_bert(str(tmp_path / "preset"))
    student = models.BertTextClassifier.from_preset(preset, num_classes=2)
    path = export_student(student, tmp_path / "served", from_logits=True)
    _, serve = signature(path)
    rng = np.random.default_rng(0)
    for size, length in ((1, 2), (3, 7), (1, 128)):
        named = {
            "token_ids": rng.integers(0, 9, (size, length)),
            "padding_mask": np.ones((size, length)),
            "segment_ids": np.zeros((size, length)),
        }
        named = {name: v.astype("int32") for name, v in named.items()}
        np.testing.assert_allclose(
            serve(**{k: tf.constant(v) for k, v in named.items()})[
                "probabilities"
            ],
            probabilities(student, named),
            **CLOSE,
        )
    with pytest.raises(tf.errors.InvalidArgumentError):
        serve(**{k: tf.ones((1, 129), "int32") for k in named})


@on_jax
def test_sizes_that_jax_cannot_leave_free(tmp_path):
    class Odd(layers.Layer):
        def call(self, x):
            return keras.ops.reshape(x, (-1, 3))[:, None] * x[:, :, :1]

        def compute_output_shape(self, shape):
            return (None, None, 3)

    inputs = keras.Input((None, 3), name="x")
    student = keras.Model(inputs, Odd()(inputs))
    with pytest.raises(
        ValueError,
        match=r"`model` must have inputs of fixed size.*keras.Input\(shape=.*"
        r"KERAS_BACKEND=tensorflow.*Received.*x \(None, None, 3\).*JAX says",
    ):
        export_student(student, tmp_path / "new", from_logits=True)
    assert not list(tmp_path.rglob("saved_model.pb"))


# Wrong values of arguments.


WRONG = {
    "format": [("savedmodel", "one of 'litert', 'onnx', 'tf_saved_model'")],
    "version": [
        (0, "an integer of at least 1"),
        (True, "an integer of at least 1"),
        ("2", "an integer of at least 1"),
    ],
    "class_names": [
        (["a", "b"], "3 different strings"),
        (["a", "b", "b"], "3 different strings"),
        (["a", "b", 3], "3 different strings"),
        ("abc", "3 different strings"),
    ],
    "preprocessor": [
        ("lower", "a callable or None"),
        (lambda: 0, "at least one required argument"),
    ],
}


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [(key, *case) for key, cases in WRONG.items() for case in cases],
)
def test_wrong_arguments(small, tmp_path, argument, value, expected):
    with pytest.raises(ValueError, match=f"`{argument}` must .*{expected}"):
        export_student(small, tmp_path / "new", **{argument: value})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "format",
    ["onnx", pytest.param("litert", marks=on_tensorflow)],
)
def test_preprocessor_needs_a_saved_model(small, tmp_path, format):
    with pytest.raises(
        ValueError, match=f"`preprocessor` must be None with format='{format}'"
    ):
        export_student(
            small, tmp_path, format=format, preprocessor=tf.strings.lower
        )


# Over the wire.


@pytest.fixture(scope="module")
def serving():
    path = ROOT / "benchmarks" / "speed" / "serving.py"
    spec = importlib.util.spec_from_file_location("serving", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_grpc(serving, tmp_path):
    """A hundred requests to PredictionService; bad ones are client errors."""
    pytest.importorskip("tensorflow_serving", reason="tensorflow-serving-api")
    import grpc

    student, shapes = build("image")
    export_student(
        student, tmp_path, from_logits=True, class_names=["a", "b", "c"]
    )
    named, inputs = batch(shapes, 1000)
    expected = probabilities(student, inputs)
    with (
        serving.server("grpc", str(tmp_path)) as (process, port),
        serving.grpc_client(port) as predict,
    ):
        images = named["image"]
        _, answers = serving.latency(
            predict, [{"image": images[i : i + 10]} for i in range(0, 1000, 10)]
        )
        served = np.concatenate([a["probabilities"] for a in answers])
        np.testing.assert_allclose(served, expected, **CLOSE)
        assert answers[0]["class_name"].tolist() == [
            b"abc"[label : label + 1] for label in answers[0]["label"]
        ]

        bad = {
            "missing input": {},
            "unknown input": {"image": images[:1], "more": images[:1]},
            "wrong rank": {"image": images[0, 0]},
            "wrong shape": {"image": images[:1, :3]},
            "wrong dtype": {"image": images[:1].astype("float64")},
            "strings": {"image": np.array(["a"])},
        }
        for request in bad.values():
            with pytest.raises(grpc.RpcError) as error:
                predict(request)
            status = error.value.code()
            assert status == grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as error:
            predict({"image": images[:1]}, model="other")
        assert error.value.code() == grpc.StatusCode.NOT_FOUND

        assert process.poll() is None
        again = predict({"image": images})
        np.testing.assert_allclose(again["probabilities"], expected, **CLOSE)


@pytest.mark.rest
def test_rest(serving, tmp_path):
    """TensorFlow Serving's REST form, by KServe."""
    python = os.environ.get("KSERVE_PYTHON")
    if python is None:
        pytest.skip(
            "KSERVE_PYTHON must be a python with kserve and tensorflow: "
            "`make test-rest` makes one"
        )
    student, _ = build("list")
    export_student(
        student, tmp_path, from_logits=True, class_names=["a", "b", "c"]
    )
    named, inputs = batch({"left": (4,), "right": (2,)}, 20)
    rows = [
        {name: values[i].tolist() for name, values in named.items()}
        for i in range(20)
    ]
    with serving.server("rest", str(tmp_path), python) as (process, port):
        status, answer = serving.rest_predict(port, rows)
        assert status == 200
        served = [row["probabilities"] for row in answer["predictions"]]
        expected = probabilities(student, inputs)
        np.testing.assert_allclose(served, expected, **CLOSE)
        assert [row["class_name"] for row in answer["predictions"]] == [
            "abc"[label] for label in expected.argmax(-1)
        ]

        bad = {
            "missing input": [{"left": rows[0]["left"]}],
            "unknown input": [{**rows[0], "more": 1}],
            "wrong shape": [{**rows[0], "left": [1.0]}],
            "ragged": [rows[0], {**rows[0], "left": [1.0]}],
            "no number": [{**rows[0], "left": "four"}],
            "nothing": [],
            "unnamed": [[1.0, 2.0]],
        }
        for name, request in bad.items():
            status, answer = serving.rest_predict(port, request)
            assert (status, "error" in answer) == (400, True), name
        assert serving.rest_predict(port, rows, model="other")[0] == 404

        assert process.poll() is None
        assert serving.rest_predict(port, rows)[0] == 200
