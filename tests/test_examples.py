"""Every example runs, as a user would run it, on made-up data."""

import contextlib
import functools
import importlib
import math
import os
import pathlib
import subprocess
import sys

import helpers
import keras
import numpy as np
import pytest

import keras_ptloss
from keras_ptloss.search import CrossValidatedSearch
from keras_ptloss.soft_labels import TokenLabels

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run(script, *arguments):
    out = subprocess.run(
        [sys.executable, EXAMPLES / script, *arguments],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    return out.stdout


def example(name, monkeypatch):
    """Import an example, to call its parts."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(name)


@helpers.slow_beyond("jax")
def test_digits(tmp_path):
    """With one epoch and one seed: it runs, draws, exports and reloads."""
    out = run(
        "digits.py", "--output", tmp_path, "--epochs", "1", "--seeds", "1"
    )
    for line in (
        "(teacher)",
        "plain KL",
        "the default search",
        "(true labels on all 700)",
    ):
        assert line in out
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    assert (tmp_path / "student" / "1" / "saved_model.pb").exists()


def call(module, *arguments):
    """Run an example in this process, where warnings are errors."""
    module.main([str(argument) for argument in arguments])


@pytest.fixture
def short_search(monkeypatch):
    """Make the searches short: they have tests of their own."""

    def of_one_coefficient(method="cross_validation"):
        if method == "cross_validation":
            method = CrossValidatedSearch(order=1, calibrations=())
        return keras_ptloss.ProxyTeacherSearch(method)

    return lambda module: monkeypatch.setattr(
        module, "ProxyTeacherSearch", of_one_coefficient
    )


def refuses(module, message, capsys, *arguments):
    """Check that a command line is refused at once, with this message."""
    with pytest.raises(SystemExit):
        call(module, *arguments)
    assert message in capsys.readouterr().err


# The search says that these made-up sets are small and that their teachers,
# which are noise, are not to be trusted; it is right.
few_rows = pytest.mark.filterwarnings(
    "ignore:.*(few|worse than a constant|at a bound).*:UserWarning"
)


class TestImage:
    @pytest.fixture
    def image_resnet(self, monkeypatch, short_search):
        """The example, with a model that compiles in seconds."""
        module = example("image_resnet", monkeypatch)
        short_search(module)
        tiny = functools.partial(module.resnet, widths=(4,), blocks=1)
        monkeypatch.setitem(module.BODIES, "tiny", tiny)
        # One device: after other tests' strategies in the same process,
        # TensorFlow mixes up their collective operations.
        monkeypatch.setattr(module, "all_devices", contextlib.nullcontext)
        yield module
        keras.config.set_dtype_policy("float32")

    @pytest.fixture
    def images(self, tmp_path):
        """A file of 240 images, dark to bright with the class."""
        rng = np.random.default_rng(0)

        def draw(count):
            labels = np.arange(count) % 10
            noise = rng.integers(0, 56, (count, 32, 32, 3))
            return 20 * labels[:, None, None, None] + noise, labels

        (x_train, y_train), (x_test, y_test) = draw(240), draw(130)
        path = tmp_path / "images.npz"
        np.savez(
            path,
            x_train=x_train.astype("uint8"),
            y_train=y_train,
            x_test=x_test.astype("uint8"),
            y_test=y_test,
        )
        return path

    @pytest.fixture
    def probabilities(self, tmp_path):
        path = tmp_path / "probabilities.npy"
        rng = np.random.default_rng(0)
        np.save(path, rng.dirichlet(np.ones(10), 240).astype("float16"))
        return path

    @helpers.slow_beyond("tensorflow")
    @few_rows
    def test_from_a_teacher(self, images, image_resnet, tmp_path, capsys):
        """Trained here; then one of the students is the next teacher."""
        for teacher in ("tiny", tmp_path / "student_kl.keras"):
            call(
                image_resnet,
                *("--dataset", "cifar10", "--data", images),
                *("--teacher", teacher, "--student", "tiny"),
                *("--epochs", 1, "--labelled", 50, "--output", tmp_path),
            )
            out = capsys.readouterr().out
            for line in ("teacher  ", "student, kl", "student, ptloss"):
                assert line in out
        student = keras.saving.load_model(tmp_path / "student_ptloss.keras")
        assert student.output_shape == (None, 10)

    @helpers.slow_beyond("jax")
    @few_rows
    def test_from_stored_probabilities(
        self, images, probabilities, image_resnet, tmp_path, capsys
    ):
        call(
            image_resnet,
            *("--dataset", "cifar10", "--data", images, "--subset", 200),
            *("--teacher-probs", probabilities, "--student", "tiny"),
            *("--epochs", 1, "--labelled", 50, "--output", tmp_path),
            *("--mixed-precision", "bfloat16"),
        )
        out = capsys.readouterr().out
        assert "teacher, on the images of the search" in out
        student = keras.saving.load_model(tmp_path / "student_kl.keras")
        assert student.layers[2].compute_dtype == "bfloat16"
        assert student.layers[-1].compute_dtype == "float32"

    @pytest.mark.parametrize(
        ("name", "count"),
        [
            # The counts of kuangliu/pytorch-cifar, whose GoogLeNet has a bias
            # in front of each batch normalisation, 7,904 in all.
            ("resnet18", 11_173_962),
            pytest.param(
                "googlenet", 6_166_250 - 7_904, marks=pytest.mark.slow
            ),
            pytest.param("densenet121", 6_956_298, marks=pytest.mark.slow),
        ],
    )
    def test_models_have_the_published_size(self, image_resnet, name, count):
        model = image_resnet.make_model(name, 10)
        sizes = [math.prod(v.shape) for v in model.trainable_variables]
        assert sum(sizes) == count

    def test_model_takes_integers_and_other_sizes(self, image_resnet):
        model = image_resnet.make_model("resnet8", 7, image_size=16)
        images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3))
        logits = model(images.astype("uint8"))
        assert logits.shape == (3, 7)
        np.testing.assert_allclose(
            logits, model(images.astype("float32")), atol=1e-5
        )

    def test_crop_and_flip(self, image_resnet):
        """Each image is one of the 162 crops of itself, and all occur."""
        rng = np.random.default_rng(0)
        images = rng.integers(1, 256, (400, 8, 8, 1)).astype("float32")
        layer = image_resnet.CropAndFlip(padding=4)
        np.testing.assert_array_equal(layer(images, training=False), images)
        padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
        found = []
        for before, after in zip(
            padded, np.asarray(layer(images, training=True)), strict=True
        ):
            crops = {
                (row, column, mirror): before[
                    row : row + 8, column : column + 8
                ][:, ::mirror]
                for row in range(9)
                for column in range(9)
                for mirror in (1, -1)
            }
            found.append(
                next(k for k, c in crops.items() if np.array_equal(c, after))
            )
        rows, columns, mirrors = map(set, zip(*found, strict=True))
        assert rows == columns == set(range(9))
        assert mirrors == {1, -1}

    def test_recipe(self, image_resnet):
        rate = image_resnet.Recipe(epochs=200, steps_per_epoch=10)
        epochs = [0, 0.4, 0.9, 1, 59.9, 60, 119.9, 120, 159.9, 160, 199.9]
        expected = [
            *(0.01, 0.05, 0.1, 0.1, 0.1),
            *(0.02, 0.02, 0.004, 0.004, 0.0008, 0.0008),
        ]
        found = [float(rate(round(10 * epoch))) for epoch in epochs]
        np.testing.assert_allclose(found, expected, rtol=1e-5)

    def test_tensorflow_datasets(self, image_resnet):
        tfds = pytest.importorskip("tensorflow_datasets")
        with tfds.testing.mock_data(num_examples=7):
            splits = image_resnet.load_images("cifar100", subset=5)
        for split, count in (("train", 5), ("test", 7)):
            images, labels = splits[split]
            assert images.shape == (count, 32, 32, 3)
            assert images.dtype == "uint8"
            assert labels.shape == (count,)

    def test_wrong_names(self, image_resnet):
        with pytest.raises(ValueError, match="Received: name='resnet9'"):
            image_resnet.make_model("resnet9", 10)
        with pytest.raises(ValueError, match="Received: name='svhn'"):
            image_resnet.load_images("svhn")

    def test_wrong_images(self, images, image_resnet, tmp_path):
        arrays = dict(np.load(images))
        path = tmp_path / "wrong.npz"
        for change, message in (
            ({"y_train": arrays["y_train"][:9]}, r"labels \(9,\) in data="),
            ({"y_test": arrays["y_test"] + 1}, "Received: 1 to 10 in data="),
        ):
            np.savez(path, **(arrays | change))
            with pytest.raises(ValueError, match=message):
                image_resnet.load_images("cifar10", path)
        np.savez(path, x_train=arrays["x_train"])
        with pytest.raises(ValueError, match=r"without \['x_test', 'y_test'"):
            image_resnet.load_images("cifar10", path)

    def test_wrong_probabilities(self, probabilities, image_resnet):
        with pytest.raises(ValueError, match="each of 241 training images"):
            image_resnet.load_probabilities(probabilities, 241, 10)
        with pytest.raises(ValueError, match=r"of shape \(240, 10\)"):
            image_resnet.load_probabilities(probabilities, 240, 100)

    def test_wrong_command_lines(self, images, image_resnet, capsys):
        teacher = ("--teacher", "resnet8")
        for message, arguments in (
            ("Received: --teacher resnet9", ("--teacher", "resnet9")),
            ("no such file: absent", (*teacher, "--data", "absent")),
            ("--epochs must be at least 1", (*teacher, "--epochs", "0")),
            ("is required", ()),
        ):
            refuses(image_resnet, message, capsys, *arguments)
        with pytest.raises(ValueError, match="--labelled 300 of 240"):
            call(
                image_resnet,
                *(*teacher, "--data", images, "--dataset", "cifar10"),
                *("--labelled", 300, "--output", images.parent),
            )


class TestText:
    @pytest.fixture
    def text_bert(self, monkeypatch, short_search):
        pytest.importorskip("keras_hub")
        module = example("text_bert", monkeypatch)
        short_search(module)
        return module

    @pytest.fixture
    def preset(self, text_bert, tmp_path):
        return helpers.save_tiny_bert(tmp_path / "preset")

    @helpers.slow_beyond("tensorflow")
    @few_rows
    def test_from_a_teacher(self, text_bert, preset, tmp_path, capsys):
        """Run twice: the second time no teacher is trained."""
        data = helpers.write_tsv(tmp_path / "data", ("train", "test"), 2)
        output = tmp_path / "output"
        command = (
            *("--task", "sst2", "--data", data, "--output", output),
            *("--teacher", preset, "--student", preset),
            *("--labelled", 44, "--sequence-length", 8),
        )
        call(text_bert, *command, "--epochs", 1)
        first = capsys.readouterr().out
        call(text_bert, *command, "--epochs", 1)
        second = capsys.readouterr().out
        assert first.count("step - loss") == 4
        assert second.count("step - loss") == 3
        # From the same labels come the same students.
        results = [out.partition("Accuracy on sst2") for out in (first, second)]
        assert "student, ptloss_paper" in results[0][2]
        assert results[0][2] == results[1][2]
        student = keras.saving.load_model(output / "student_ptloss.keras")
        assert student.output_shape == (None, 2)
        with pytest.raises(ValueError, match="`teacher_name` must be"):
            call(text_bert, *command, "--epochs", 2)

    @helpers.slow_beyond("jax")
    @few_rows
    def test_from_stored_probabilities(
        self, text_bert, preset, tmp_path, capsys
    ):
        """On pairs of texts, with two test sets."""
        tests = ("test_matched", "test_mismatched")
        data = helpers.write_tsv(
            tmp_path / "data", ("train", *tests), 3, columns=2, count=130
        )
        probabilities = tmp_path / "probabilities.npz"
        rng = np.random.default_rng(0)
        np.savez(probabilities, rng.dirichlet(np.ones(3), 130))
        call(
            text_bert,
            *("--task", "mnli", "--data", data, "--student", preset),
            *("--teacher-probs", probabilities, "--subset", 120),
            *("--epochs", 1, "--labelled", 44, "--sequence-length", 12),
            *("--output", tmp_path / "output"),
        )
        lines = capsys.readouterr().out.splitlines()
        (last,) = (line for line in lines if "student, ptloss " in line)
        assert all(test in last for test in tests)

    def test_tokens(self, text_bert, preset):
        """Of one text, and of two in a row with segments."""
        model, tokenise = text_bert.make_classifier(
            preset, 2, sequence_length=8
        )
        one = tokenise(["good film", "bad"])
        assert one["token_ids"].tolist() == [
            [2, 5, 7, 3, 0, 0, 0, 0],
            [2, 6, 3, 0, 0, 0, 0, 0],
        ]
        assert one["padding_mask"].sum(axis=1).tolist() == [4, 3]
        two = tokenise((["good film"], ["bad book"]))
        assert two["token_ids"].tolist() == [[2, 5, 7, 3, 6, 8, 3, 0]]
        assert two["segment_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 0]]
        assert model.predict(one, verbose=0).shape == (2, 2)

    @pytest.mark.parametrize(
        ("name", "classes", "tests", "pairs"),
        [
            ("sst2", 2, {"test"}, False),
            ("mnli", 3, {"test_matched", "test_mismatched"}, True),
            ("boolq", 2, {"test"}, True),
            ("anli_r1", 3, {"test"}, True),
            ("anli_r3", 3, {"test"}, True),
        ],
    )
    def test_tensorflow_datasets(self, text_bert, name, classes, tests, pairs):
        tfds = pytest.importorskip("tensorflow_datasets")
        with tfds.testing.mock_data(num_examples=7):
            task = text_bert.load_task(name, subset=5)
        assert task.classes == classes
        assert set(task.splits) == {"train", *tests}
        for split, (texts, labels) in task.splits.items():
            count = 5 if split == "train" else 7
            assert labels.shape == (count,)
            assert set(labels) <= set(range(classes))
            for column in texts if pairs else [texts]:
                assert len(column) == count
                assert all(type(text) is str for text in column)

    def test_wrong_data(self, text_bert, tmp_path):
        with pytest.raises(ValueError, match="Received: name='cola'"):
            text_bert.load_task("cola")
        data = helpers.write_tsv(tmp_path / "data", ("train", "test"), 3)
        with pytest.raises(ValueError, match="label below 2 .* in line 3 of"):
            text_bert.load_task("sst2", data)
        with pytest.raises(ValueError, match="2 texts, .* in line 1 of"):
            text_bert.load_task("anli_r1", data)
        (data / "train.tsv").write_text("label\ttext\n")
        with pytest.raises(ValueError, match="Received: none in"):
            text_bert.load_task("sst2", data)
        with pytest.raises(FileNotFoundError, match=r"train\.tsv"):
            text_bert.load_task("sst2", tmp_path)

    def test_wrong_probabilities(self, text_bert, tmp_path):
        path = tmp_path / "two.npz"
        np.savez(path, np.ones((3, 2)), np.ones((3, 2)))
        with pytest.raises(ValueError, match=r"with \['arr_0', 'arr_1'\]"):
            text_bert.load_probabilities(path, 3, 2)
        np.savez(path, np.ones((3, 2)))
        with pytest.raises(ValueError, match="each of 4 training examples"):
            text_bert.load_probabilities(path, 4, 2)

    def test_wrong_command_lines(self, text_bert, preset, tmp_path, capsys):
        teacher = ("--teacher", preset)
        for message, arguments in (
            ("Received: absent", (*teacher, "--data", "absent")),
            ("no such file: absent", ("--teacher-probs", "absent")),
            ("--subset must be at least 1", (*teacher, "--subset", 0)),
            ("not allowed with", (*teacher, "--teacher-probs", "absent")),
        ):
            refuses(text_bert, message, capsys, *arguments)
        data = helpers.write_tsv(tmp_path / "data", ("train", "test"), 2)
        with pytest.raises(ValueError, match="--labelled 1000 of 120"):
            call(text_bert, *teacher, "--data", data, "--output", tmp_path)


class TestGeneration:
    @pytest.fixture
    def generation(self, monkeypatch):
        pytest.importorskip("keras_hub")
        module = example("text_generation", monkeypatch)
        shape = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8}
        monkeypatch.setattr(
            module, "SHAPES", dict.fromkeys(module.SHAPES, shape)
        )
        monkeypatch.setattr(module, "VOCABULARY", 280)
        return module

    @pytest.fixture
    def texts(self, tmp_path):
        """Forty documents of four words."""
        rng = np.random.default_rng(0)
        folder = tmp_path / "texts"
        folder.mkdir()
        for number in range(40):
            words = rng.choice(["good", "bad", "film", "book"], 30)
            (folder / f"{number}.txt").write_text(" ".join(words))
        return folder

    @pytest.mark.slow
    @few_rows
    def test_from_nothing_and_from_presets(
        self, generation, texts, tmp_path, capsys
    ):
        """The student of the first run is teacher and student of the second."""
        from keras_hub.models import CausalLM

        output = tmp_path / "output"
        command = ("--data", texts, "--sequence-length", 8, "--epochs", 1)
        call(generation, *command, "--output", output, "--teacher-epochs", 1)
        first = capsys.readouterr().out
        methods = ("the teacher", "cross-entropy alone", "full KL")
        kinds = ("the rest an event", "no tail", "PTLoss searched")
        for name in (*methods, *(f"top 16, {kind}" for kind in kinds)):
            assert f"| {name} | " in first
        stored = TokenLabels.open(output / "student.tokens")
        assert stored[0].shape == (8, 17, 2)
        assert (np.diff(stored[0][:, :-1, 1]) <= 0).all()

        preset = output / "student"
        student = CausalLM.from_preset(str(preset))
        student.compile(sampler="greedy")
        written = student.generate("good film", max_length=8)
        assert written.startswith("good film")
        table = tmp_path / "table.md"
        call(
            generation,
            *(*command, "--output", tmp_path / "again", "--table", table),
            *("--teacher", preset, "--student", preset),
        )
        assert table.read_text().strip() in capsys.readouterr().out

    def test_targets_are_the_largest(self, generation, texts, tmp_path):
        parts = generation.split_documents(generation.load_documents(texts))
        found = [set(part) for part in parts.values()]
        assert sum(map(len, found)) == len(set.union(*found)) == 40
        preprocessor = generation.make_preprocessor(None, parts["teacher"], 8)
        x, labels = generation.cut(parts["test"], preprocessor)
        np.testing.assert_array_equal(
            x["token_ids"].ravel()[1:], labels.ravel()[:-1]
        )
        teacher = generation.plain(
            generation.make_writer("teacher", None, preprocessor)
        )
        y_true = generation.store_top_k(teacher, x, tmp_path / "stored", "t")
        rest, y_true = y_true[..., -1, :], y_true[..., :-1, :]
        probabilities = helpers.softmax(teacher.predict(x, verbose=0))
        order = np.sort(probabilities, axis=-1)[..., ::-1]
        np.testing.assert_allclose(
            np.exp(y_true[..., 1]), order[..., :16], rtol=4e-3
        )
        assert (rest[..., 0] == -1).all()
        np.testing.assert_allclose(
            np.exp(rest[..., 1]), order[..., 16:].sum(-1), rtol=4e-3
        )
        np.testing.assert_allclose(
            np.take_along_axis(
                probabilities, y_true[..., 0].astype(int), axis=-1
            ),
            order[..., :16],
            rtol=1e-5,
        )

    def test_docstrings(self, generation, tmp_path):
        path = tmp_path / "module.py"
        path.write_text('"""One.\n\nMore."""\ndef f():\n    """Short."""\n')
        assert generation._docstrings(path) == "One.\n\nMore."
        path.write_text("print 1")
        assert generation._docstrings(path) == ""

    def test_wrong_command_lines(self, generation, texts, tmp_path, capsys):
        for message, arguments in (
            ("both, or neither", ("--teacher", "gpt2_base_en")),
            ("Received: absent", ("--data", "absent")),
            ("--seeds must be at least 1", ("--seeds", 0)),
        ):
            refuses(generation, message, capsys, *arguments)
        output = ("--output", tmp_path / "output")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="Received: 0 in .*empty"):
            call(generation, "--data", tmp_path / "empty", *output)
        with pytest.raises(ValueError, match="--sequence-length 9999"):
            call(
                generation,
                *("--data", texts, "--sequence-length", 9999, *output),
            )
