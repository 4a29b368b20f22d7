"""Two CausalLMs of KerasHub, whose sequences are padded."""

import distillers
import helpers
import keras
import numpy as np
import pytest

from keras_ptloss import Distiller, PTLoss, export_student

models = pytest.importorskip("keras_hub.models")

WORDS = ["the", "cat", "dog", "sat", "ran"]
TEXTS = ["the cat sat", "the dog ran and ran", "dog", "cat and dog sat"]
LENGTH = 12


@pytest.fixture(scope="module")
def preprocessor():
    """Byte-pair encoding of a made-up vocabulary."""
    letters = sorted(set("".join(TEXTS)) - {" "})
    merges, tokens = [], ["<|endoftext|>", *letters, "Ġ"]
    for word in WORDS:
        for end in range(2, len(word) + 1):
            merges.append(f"{word[: end - 1]} {word[end - 1]}")
            tokens.append(word[:end])
    tokens = list(dict.fromkeys(tokens))
    tokenizer = models.GPT2Tokenizer(
        vocabulary={token: number for number, token in enumerate(tokens)},
        merges=list(dict.fromkeys(merges)),
    )
    return models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=LENGTH)


def writer(preprocessor, seed, width=8, layers=1):
    keras.utils.set_random_seed(seed)
    backbone = models.GPT2Backbone(
        vocabulary_size=preprocessor.tokenizer.vocabulary_size(),
        num_layers=layers,
        num_heads=2,
        hidden_dim=width,
        intermediate_dim=2 * width,
        dropout=0.0,
        max_sequence_length=32,
    )
    model = models.GPT2CausalLM(backbone, preprocessor)
    rng = np.random.default_rng(seed)
    for weight in model.weights:  # its own are nearly 0, and so are logits
        weight.assign(weight + rng.normal(size=weight.shape, scale=0.3))
    return model


@pytest.fixture
def student(preprocessor):
    return writer(preprocessor, 0)


@pytest.fixture
def teacher(preprocessor):
    return writer(preprocessor, 1, width=12, layers=2)


def batch(preprocessor, length=LENGTH):
    """Token ids with their mask, next tokens and weights."""
    x, y, weight = preprocessor(TEXTS, sequence_length=length)
    x = {name: np.asarray(ids) for name, ids in x.items()}
    return x, np.asarray(y), np.asarray(weight, "float32")


def distil(student, teacher, rate=0.5, **arguments):
    distiller = Distiller(student, teacher, **arguments)
    loss = PTLoss(0.1, from_logits=True, reduction="mean_with_sample_weight")
    distiller.compile(keras.optimizers.SGD(rate), loss=loss)
    return distiller


def values(model):
    return [np.asarray(w) for w in model.weights]


def expected_loss(student, teacher, x, weight):
    """Eq. 7 over the tokens of weight 1, by NumPy."""
    losses = helpers.pt_loss_of_logits(
        helpers.softmax(teacher(x)), student(x), 0.1
    )
    return losses[weight > 0].mean()


class TestPadding:
    def test_is_there(self, preprocessor):
        _, _, weight = batch(preprocessor)
        assert 0 < weight.sum() < 0.8 * weight.size

    def test_loss_is_the_mean_over_tokens(self, preprocessor, student, teacher):
        x, y, weight = batch(preprocessor)
        loss, _ = distil(student, teacher).evaluate(
            x, y, sample_weight=weight, verbose=0
        )
        expected = expected_loss(student, teacher, x, weight)
        np.testing.assert_allclose(loss, expected, rtol=1e-4)

    @pytest.mark.parametrize("other", ["longer", "of other tokens"])
    def test_never_counts(self, preprocessor, teacher, other):
        """Neither its amount nor what it consists of."""
        x, y, weight = batch(preprocessor)
        if other == "longer":
            changed = batch(preprocessor, LENGTH + 9)
        else:
            changed = dict(x), y, weight
            changed[0]["token_ids"] = np.where(
                x["padding_mask"], x["token_ids"], 3
            )
        after = []
        for inputs, labels, counts in ((x, y, weight), changed):
            student = writer(preprocessor, 0)
            history = distil(student, teacher).fit(
                inputs,
                labels,
                sample_weight=counts,
                batch_size=2,
                epochs=2,
                verbose=0,
            )
            after.append((history.history, values(student)))
        (one, weights), (two, others) = after
        np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-4)
        np.testing.assert_allclose(
            one["teacher_agreement"], two["teacher_agreement"], rtol=1e-4
        )
        for a, b in zip(weights, others, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)

    def test_weights_of_ones_own(self, preprocessor, student, teacher):
        """A prompt is left out, as in instruction tuning."""
        x, y, weight = batch(preprocessor)
        weight[:, :3] = 0.0
        history = distil(student, teacher, rate=0.0).fit(
            x, y, sample_weight=weight, verbose=0
        )
        expected = expected_loss(student, teacher, x, weight)
        (loss,) = history.history["loss"]
        np.testing.assert_allclose(loss, expected, rtol=1e-4)

    def test_data_set_of_the_preprocessor(self, preprocessor, student, teacher):
        tf = pytest.importorskip("tensorflow")
        x, y, weight = batch(preprocessor)
        data = tf.data.Dataset.from_tensor_slices((x, y, weight)).batch(4)
        history = distil(student, teacher, rate=0.0).fit(
            data, shuffle=False, verbose=0
        )
        expected = expected_loss(student, teacher, x, weight)
        np.testing.assert_allclose(
            history.history["loss"], [expected], rtol=1e-4
        )

    def test_weights_without_labels(self, preprocessor, student, teacher):
        """Keras would drop them, and count the padding."""
        x, y, weight = batch(preprocessor)
        distiller = distil(student, teacher)
        for method in (
            distiller.fit,
            distiller.evaluate,
            distiller.train_on_batch,
            distiller.test_on_batch,
        ):
            with pytest.raises(ValueError, match="`sample_weight` must come"):
                method(x, sample_weight=weight)
        value = distiller.test_on_batch(x, y, weight, return_dict=True)["loss"]
        expected = expected_loss(student, teacher, x, weight)
        np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_student_learns_and_the_teacher_stays(preprocessor, student, teacher):
    x, y, weight = batch(preprocessor)
    before = values(teacher)
    history = distil(student, teacher).fit(
        x, y, sample_weight=weight, epochs=20, verbose=0
    )
    losses = history.history["loss"]
    assert losses[-1] < 0.5 * losses[0]
    for a, b in zip(before, values(teacher), strict=True):
        np.testing.assert_array_equal(a, b)


def test_lora(preprocessor, student, teacher):
    """Of the student only the adapters move, and they learn."""
    x, y, weight = batch(preprocessor)
    student.backbone.enable_lora(rank=2)
    adapters = [w for w in student.trainable_weights if "lora" in w.path]
    assert adapters
    for frozen in student.trainable_weights:
        if "lora" not in frozen.path:
            frozen.trainable = False
    before = {w.path: np.asarray(w) for w in student.weights}
    history = distil(student, teacher).fit(
        x, y, sample_weight=weight, epochs=10, verbose=0
    )
    moved = {
        w.path
        for w in student.weights
        if not np.array_equal(before[w.path], np.asarray(w))
    }
    assert moved == {w.path for w in adapters}
    assert history.history["loss"][-1] < history.history["loss"][0]


class TestAfterwards:
    @pytest.fixture
    def distilled(self, preprocessor, student, teacher):
        x, y, weight = batch(preprocessor)
        distil(student, teacher).fit(
            x, y, sample_weight=weight, epochs=2, verbose=0
        )
        return student

    def test_generate(self, preprocessor, distilled):
        """As the same weights do that were never near a distiller."""
        fresh = writer(preprocessor, 5)
        fresh.set_weights(distilled.get_weights())
        written = []
        for model in (distilled, fresh):
            model.compile(sampler="greedy")
            written.append(
                model.generate(
                    ["the cat", "dog"], max_length=9, stop_token_ids=None
                )
            )
        assert written[0] == written[1]
        assert written[0][0].startswith("the cat")
        # And greedily, token by token, by the logits of all tokens.
        ids = np.asarray(preprocessor.tokenizer("dog")).tolist()
        ids = [preprocessor.tokenizer.start_token_id, *ids]
        while len(ids) < 9:
            x = {"token_ids": [ids], "padding_mask": [[1] * len(ids)]}
            x = {name: np.array(value, "int32") for name, value in x.items()}
            ids.append(int(np.asarray(distilled(x))[0, -1].argmax()))
        assert written[0][1] == preprocessor.tokenizer.detokenize(ids[1:])

    def test_export(self, preprocessor, distilled, tmp_path):
        tf = pytest.importorskip("tensorflow")
        x, *_ = batch(preprocessor)
        path = export_student(distilled, tmp_path, from_logits=True)
        serve = tf.saved_model.load(path).signatures["serving_default"]
        for rows in (2, 3):
            for length in (5, LENGTH):
                part = {n: v[:rows, :length] for n, v in x.items()}
                tensors = {
                    name: tf.constant(
                        part[name],
                        serve.structured_input_signature[1][name].dtype,
                    )
                    for name in part
                }
                np.testing.assert_allclose(
                    serve(**tensors)["probabilities"],
                    helpers.softmax(distilled(part)),
                    atol=1e-5,
                )

    @pytest.mark.filterwarnings(
        # KerasHub's models compile with a sampler, which loading leaves out.
        "ignore:`compile\\(\\)` was not called as part of model loading"
    )
    def test_saving(self, preprocessor, distilled, tmp_path):
        distilled.compile(sampler="greedy")
        distilled.save(tmp_path / "student.keras")
        again = keras.saving.load_model(tmp_path / "student.keras")
        again.compile(sampler="greedy")
        distillers.assert_same_weights(again, distilled)
        one, two = (m.generate("the", max_length=9) for m in (again, distilled))
        assert one == two

    def test_predict_takes_ids_without_a_preprocessor(
        self, preprocessor, distilled
    ):
        """With one, `predict` takes texts, as `fit` of KerasHub does."""
        x, *_ = batch(preprocessor)
        bare = models.GPT2CausalLM(distilled.backbone, preprocessor=None)
        np.testing.assert_allclose(
            bare.predict(x, verbose=0), distilled(x), atol=1e-5
        )
