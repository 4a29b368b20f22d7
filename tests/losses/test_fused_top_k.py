"""The fused head, against NumPy in float64 and the loss on plain logits."""

import helpers
import keras
import numpy as np
import pytest
import scipy.special
from keras import ops

from keras_ptloss._backend import as_array
from keras_ptloss.losses import (
    _events,
    fused_top_k_pt_loss,
    top_k_pt_loss,
)
from keras_ptloss.losses._events import read_events

TOKENS, SIZE, CLASSES, K = 6, 5, 23, 3
EPSILON = [0.5, -0.2, 0.3]
TAILS = ["event", "renormalize", "teacher_only"]
CHUNKS = [1, 7, 22, 23, 24, 4096]  # of 23 classes


def draw(seed=0, tokens=TOKENS, classes=CLASSES, k=K):
    """Targets, hidden states, weights (H, C) and bias."""
    rng = np.random.default_rng(seed)
    teacher = helpers.dirichlet(seed, tokens, classes, 0.5)
    ids = np.argsort(-teacher, axis=-1)[:, :k]
    y_true = np.stack(
        [ids, np.log(np.take_along_axis(teacher, ids, axis=-1))], axis=-1
    )
    arrays = (
        y_true,
        rng.normal(size=(tokens, SIZE)),
        rng.normal(size=(SIZE, classes)),
        rng.normal(size=classes),
    )
    return tuple(a.astype("float32") for a in arrays)


def reference(y_true, hidden, weights, bias, epsilon=EPSILON):
    """Eq. 7 of the merged distributions, in float64, one token at a time."""
    y_true, hidden, weights, bias = (
        np.asarray(a, "float64") for a in (y_true, hidden, weights, bias)
    )
    out = []
    for entries, state in zip(y_true, hidden, strict=True):
        log_p = scipy.special.log_softmax(state @ weights + bias)
        ids = entries[:, 0].astype(int)
        others = scipy.special.logsumexp(np.delete(log_p, ids))
        log_p = np.append(log_p[ids], others)
        t = np.exp(entries[:, 1])
        t = np.append(t, 1 - t.sum())
        kl = scipy.special.xlogy(t, t) - t * log_p
        perturbation = helpers.perturbation(np.exp(log_p), epsilon)
        out.append(np.sum(kl + t * perturbation))
    return np.array(out)


def plain(y_true, hidden, weights, bias, epsilon=EPSILON, **own):
    logits = ops.add(ops.matmul(hidden, weights), bias)
    return top_k_pt_loss(y_true, logits, epsilon, from_logits=True, **own)


def fused(y_true, hidden, weights, bias, epsilon=EPSILON, **own):
    return fused_top_k_pt_loss(
        y_true, hidden, weights, epsilon, bias=bias, **own
    )


class TestValue:
    @pytest.mark.parametrize("chunk", CHUNKS)
    def test_is_eq_7(self, chunk):
        rows = draw()
        np.testing.assert_allclose(
            fused(*rows, chunk=chunk), reference(*rows), rtol=1e-5
        )

    @pytest.mark.parametrize("tail", TAILS)
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_is_the_plain_loss(self, tail, temperature):
        rows = draw(1)
        own = {"tail": tail, "teacher_temperature": temperature}
        np.testing.assert_allclose(
            fused(*rows, chunk=7, **own), plain(*rows, **own), rtol=1e-5
        )

    def test_without_bias(self):
        y_true, hidden, weights, bias = draw()
        np.testing.assert_allclose(
            fused(y_true, hidden, weights, None, chunk=7),
            reference(y_true, hidden, weights, 0.0 * bias),
            rtol=1e-5,
        )

    def test_of_embeddings(self):
        """Weights `(C, H)`, of a head that is tied."""
        y_true, hidden, weights, bias = draw()
        np.testing.assert_allclose(
            fused(y_true, hidden, weights.T, bias, chunk=7),
            reference(y_true, hidden, weights, bias),
            rtol=1e-5,
        )

    @pytest.mark.parametrize("k", [1, CLASSES])
    def test_one_class_and_all(self, k):
        rows = draw(2, k=k)
        np.testing.assert_allclose(
            fused(*rows, chunk=7), plain(*rows), rtol=1e-4, atol=1e-5
        )

    def test_rest_and_padding(self):
        y_true, *head = draw()
        rest = np.log1p(-np.exp(y_true[..., 1].astype("float64")).sum(-1))
        rest = np.stack([np.full(TOKENS, -1.0), rest], -1)[:, None]
        padding = np.full((TOKENS, 2, 2), -2.0)
        longer = np.concatenate([padding, rest, y_true], 1)
        np.testing.assert_allclose(
            fused(longer, *head, chunk=7), reference(y_true, *head), rtol=1e-5
        )
        empty = np.full((TOKENS, 2, 2), -2.0)
        assert not np.asarray(fused(empty, *head, chunk=7)).any()

    def test_leading_axes(self):
        y_true, hidden, weights, bias = draw()
        value = fused(
            y_true.reshape(2, 3, K, 2),
            hidden.reshape(2, 3, SIZE),
            weights,
            bias,
            chunk=7,
        )
        expected = reference(y_true, hidden, weights, bias).reshape(2, 3)
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    def test_large_logits(self):
        """The largest may come in any chunk; none overflows."""
        y_true, hidden, weights, bias = draw()
        for class_ in (0, 10, CLASSES - 1):
            high = bias.copy()
            high[class_] = 1e4
            np.testing.assert_allclose(
                fused(y_true, hidden, weights, high, chunk=7),
                reference(y_true, hidden, weights, high),
                rtol=1e-5,
            )


class TestGradient:
    @pytest.mark.parametrize("chunk", [7, 23])
    @pytest.mark.parametrize("argument", [1, 2, 3])
    def test_differences(self, argument, chunk):
        rows = draw()

        def total(x):
            changed = [*rows[:argument], x, *rows[argument + 1 :]]
            return reference(*changed).sum()

        gradient = helpers.gradient_of(
            lambda *rows: fused(*rows, chunk=chunk), *rows, argument=argument
        )
        expected = helpers.numerical_gradient(total, rows[argument])
        np.testing.assert_allclose(gradient, expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("argument", [1, 2])
    @pytest.mark.parametrize(
        "tail, tied",
        [("event", True), ("renormalize", False), ("teacher_only", True)],
    )
    def test_is_that_of_the_plain_loss(self, tail, argument, tied):
        """Each position with a factor of its own, as weights make it."""
        factors = np.arange(TOKENS, dtype="float32")

        def of_fused(y_true, hidden, weights, bias):
            if tied:
                weights = ops.transpose(weights)
            values = fused(y_true, hidden, weights, bias, tail=tail, chunk=7)
            return ops.multiply(factors, values)

        gradients = [
            helpers.gradient_of(function, *draw(3), argument=argument)
            for function in (
                of_fused,
                lambda *rows: ops.multiply(factors, plain(*rows, tail=tail)),
            )
        ]
        np.testing.assert_allclose(*gradients, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_of_small_floats(self, dtype):
        """Hidden states of a mixed policy, weights in float32."""
        y_true, hidden, weights, bias = draw(4)
        hidden = ops.cast(hidden, dtype)
        narrow = as_array(ops.cast(hidden, "float32"))
        exact = (y_true, narrow, weights, bias)
        for argument in (1, 2):
            gradient = helpers.gradient_of(
                lambda *rows: fused(*rows, chunk=7),
                *(y_true, hidden, weights, bias),
                argument=argument,
            )
            expected = helpers.gradient_of(plain, *exact, argument=argument)
            np.testing.assert_allclose(gradient, expected, atol=0.05)


class TestCompiled:
    def test_value_and_gradient(self):
        rows = draw()
        compiled = helpers.compiled(lambda *rows: fused(*rows, chunk=7))
        np.testing.assert_allclose(compiled(*rows), reference(*rows), rtol=1e-5)

    @pytest.mark.skipif(
        keras.backend.backend() != "jax", reason="JAX compiles it"
    )
    def test_once_outside_of_compiled_functions(self, monkeypatch):
        traced = []

        def counted(*args, **settings):
            traced.append(args)
            return read_events(*args, **settings)

        monkeypatch.setattr(_events, "read_events", counted)
        rows = draw(tokens=13)
        for _ in range(3):
            fused(*rows, chunk=7)
        assert len(traced) == 1

    def test_no_array_of_tokens_and_vocabulary(self):
        """What XLA plans for value and gradients, in bytes of temporaries."""
        if keras.backend.backend() != "jax":
            pytest.skip("JAX alone says what a compiled function takes")
        import jax

        rows = draw(tokens=512, classes=4096)

        def planned(function):
            gradient = jax.grad(
                lambda *rows: function(*rows).sum(), argnums=(1, 2, 3)
            )
            compiled = jax.jit(gradient).lower(*rows).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        logits = 4 * 512 * 4096
        # The logits, their gradient and one more, and numbers of tokens.
        assert logits <= planned(plain) <= 3.1 * logits
        assert planned(lambda *rows: fused(*rows, chunk=256)) < logits / 4

    def test_unknown_number_of_tokens(self):
        if keras.backend.backend() != "tensorflow":
            pytest.skip("TensorFlow's graphs alone have unknown sizes")
        import tensorflow as tf

        rows = draw()
        spec = [
            tf.TensorSpec((None, None, 2), "float32"),
            tf.TensorSpec((None, SIZE), "float32"),
        ]
        for compiled in (False, True):
            graph = tf.function(
                lambda y, h: fused(y, h, *rows[2:], chunk=7),
                input_signature=spec,
                jit_compile=compiled,
            )
            np.testing.assert_allclose(
                graph(*rows[:2]), reference(*rows), rtol=1e-5
            )


@keras.saving.register_keras_serializable(package="tests")
class Writer(keras.Model):
    """A model of one embedding, which is its head; logits or the fused loss."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        self.embed = keras.layers.ReversibleEmbedding(
            CLASSES, SIZE, embeddings_initializer="glorot_uniform"
        )
        self.middle = keras.layers.Dense(SIZE, activation="tanh")

    def call(self, x):
        return self.middle(self.embed(x))

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        if self.fused:
            values = fused_top_k_pt_loss(
                y, y_pred, self.embed.embeddings, 0.1, chunk=7
            )
        else:
            logits = self.embed(y_pred, reverse=True)
            values = top_k_pt_loss(y, logits, 0.1, from_logits=True)
        return ops.sum(values * sample_weight) / ops.sum(sample_weight)


@pytest.mark.parametrize("jit_compile", [True, False])
def test_fit_is_that_of_the_plain_loss(jit_compile):
    """With a tied head, whose embeddings get two gradients."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, CLASSES, (8, 6))
    y_true, *_ = draw(5, tokens=48)
    y_true = y_true.reshape(8, 6, K, 2)
    weight = (np.arange(6) < 4) * np.ones((8, 1), "float32")
    losses, embeddings = [], []
    for is_fused in (True, False):
        keras.utils.set_random_seed(0)
        model = Writer(is_fused)
        model.compile(
            keras.optimizers.SGD(0.5),
            loss=None,
            jit_compile=helpers.jit(jit_compile),
        )
        history = model.fit(
            x,
            y_true,
            sample_weight=weight,
            batch_size=4,
            epochs=3,
            verbose=0,
        )
        losses.append(history.history["loss"])
        embeddings.append(np.asarray(model.embed.embeddings))
    np.testing.assert_allclose(*losses, rtol=1e-4)
    np.testing.assert_allclose(*embeddings, atol=1e-4)
    assert losses[0][-1] < losses[0][0]


class TestErrors:
    @pytest.mark.parametrize(
        "arguments, match",
        [
            ({"tail": "spread"}, "`tail` must be one of"),
            ({"chunk": 0}, "`chunk` must be"),
            ({"epsilon": [[1.0], [2.0]]}, "shared by the classes"),
            ({"teacher_temperature": 0.0}, "above 0"),
            ({"bias": np.zeros(5)}, r"`bias` must be of shape \(23,\)"),
            ({"weights": np.zeros((4, 23))}, r"\(5, C\) or \(C, 5\)"),
            ({"weights": np.zeros((5, 5))}, "another number of classes"),
            ({"y_true": np.ones((6, 23))}, r"\(\.\.\., k, 2\)"),
            ({"y_true": np.full((1, 1, 2), -1.0)}, r"k, 2\).*hidden of shape"),
            (
                {
                    "y_true": np.full((3, 2, 1, 2), -1.0),
                    "hidden": np.zeros((2, 3, 5), "float32"),
                },
                r"k, 2\).*\(3, 2, 1, 2\), hidden of shape \(2, 3, 5\)",
            ),
            ({"y_true": np.full((6, 1, 2), 23.0)}, "at most 22"),
        ],
    )
    def test_arguments(self, arguments, match):
        y_true, hidden, weights, bias = draw()
        given = {
            "y_true": y_true,
            "hidden": hidden,
            "weights": weights,
            "epsilon": 0.0,
            "bias": bias,
        }
        with pytest.raises(ValueError, match=match):
            fused_top_k_pt_loss(**(given | arguments))
