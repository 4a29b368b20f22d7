"""The top-k losses, against merged distributions in NumPy float64."""

import keras
import numpy as np
import pytest
import scipy.special
from helpers import compiled, gradient_of, numerical_gradient, pt_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_ptloss.losses import (
    TopKPTLoss,
    fused_top_k_pt_loss,
    top_k_events,
    top_k_pt_loss,
)

BACKEND = keras.backend.backend()
CLASSES, K, ROWS, UNITS = 12, 3, 6, 5
EPSILON = [0.5, -0.2, 0.3]


def reference(y_true, logits, epsilon, tail="event"):
    """Eq. 7 of distributions that are merged one row at a time."""
    values = []
    student = scipy.special.softmax(np.asarray(logits, "float64"), axis=-1)
    for row, p in zip(np.asarray(y_true, "float64"), student, strict=True):
        ids, t = row[:, 0].astype(int), np.exp(row[:, 1])
        others = np.setdiff1d(np.arange(len(p)), ids)
        p_k, p_rest = p[ids], p[others].sum()
        if tail == "renormalize":
            t, p = t / t.sum(), p_k / p_k.sum()
        else:
            t_rest = max(1.0 - t.sum(), 0.0) if len(others) else 0.0
            t, p = np.append(t, t_rest), np.append(p_k, p_rest)
            t = t / t.sum()
        values.append(pt_loss(t, p, epsilon))
    return np.array(values)


def largest(teacher, k):
    """The k largest of rows `(N, C)`, as a loss's `y_true`."""
    ids = np.argsort(-teacher, axis=-1)[:, :k]
    logs = np.log(np.take_along_axis(teacher, ids, axis=-1))
    return np.stack([ids, logs], axis=-1).astype("float32")


def draw(seed=0, k=K, scale=3.0):
    """Return targets, a student's logits, and the teacher."""
    rng = np.random.default_rng(seed)
    teacher = rng.dirichlet(np.full(CLASSES, 0.5), ROWS)
    logits = rng.normal(size=(ROWS, CLASSES), scale=scale).astype("float32")
    return largest(teacher, k), logits, teacher


def draw_head(seed=0):
    """Return targets, hidden states, weights and bias."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(ROWS, UNITS)).astype("float32")
    weights = rng.normal(size=(UNITS, CLASSES)).astype("float32")
    bias = rng.normal(size=CLASSES).astype("float32")
    return draw(seed)[0], hidden, weights, bias


def with_rest(y_true):
    """Add the logarithm of what is left of 1, as an entry -1."""
    rest = np.log(1 - np.exp(y_true[..., 1].astype("float64")).sum(-1))
    rest = np.stack([np.full(ROWS, -1.0), rest], axis=-1)[:, None]
    return np.concatenate([y_true, rest], axis=1)


@pytest.fixture(scope="module")
def in_step():
    """The loss of logits, compiled as in `fit`."""
    if BACKEND == "torch":
        pytest.skip("PyTorch does not compile")
    return compiled(lambda y, z: top_k_pt_loss(y, z, 0.3, from_logits=True))


# Values.


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.sampled_from([1, CLASSES - 1, CLASSES]),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    epsilon=st.lists(st.floats(-0.3, 3.0), min_size=2, max_size=2),
    tail=st.sampled_from(["event", "renormalize"]),
)
def test_is_eq_7_of_the_merged_distributions(seed, k, scale, epsilon, tail):
    y_true, logits, _ = draw(seed, k, scale)
    np.testing.assert_allclose(
        top_k_pt_loss(y_true, logits, epsilon, tail=tail, from_logits=True),
        reference(y_true, logits, epsilon, tail),
        rtol=2e-5,
        atol=2e-5,
    )


def test_probabilities_and_leading_axes():
    y_true, logits, _ = draw()
    student = scipy.special.softmax(logits, axis=-1)
    value = top_k_pt_loss(
        y_true.reshape(2, 3, K, 2), student.reshape(2, 3, CLASSES), EPSILON
    )
    expected = reference(y_true, logits, EPSILON).reshape(2, 3)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("tail", ["event", "renormalize"])
def test_teacher_temperature(temperature, tail):
    """The events' logarithms are divided, padding's are not."""
    y_true, logits, _ = draw()
    t = np.exp(y_true[..., 1].astype("float64"))
    if tail == "event":
        t = np.concatenate([t, 1 - t.sum(-1, keepdims=True)], axis=-1)
    t = t ** (1 / temperature)
    t = t / t.sum(-1, keepdims=True)
    scaled = np.stack([y_true[..., 0], np.log(t[:, :K])], axis=-1)
    padding = np.full((ROWS, 2, 2), -2.0)
    value = top_k_pt_loss(
        np.concatenate([padding, y_true], axis=1),
        logits,
        EPSILON,
        tail=tail,
        teacher_temperature=temperature,
        from_logits=True,
    )
    np.testing.assert_allclose(
        value, reference(scaled, logits, EPSILON, tail), rtol=1e-4
    )


def test_extreme_logits_and_half_precision():
    y_true, logits, _ = draw()
    for dtype in ("float16", "bfloat16"):
        narrow = ops.cast(logits, dtype)
        exact = ops.convert_to_numpy(ops.cast(narrow, "float32"))
        value = top_k_pt_loss(y_true, narrow, EPSILON, from_logits=True)
        np.testing.assert_allclose(
            value, reference(y_true, exact, EPSILON), rtol=1e-5
        )
    for size in (1e4, -1e4):
        extreme = np.where(np.arange(CLASSES) % 2, size, logits)
        extreme = extreme.astype("float32")
        gradient = gradient_of(
            lambda z: top_k_pt_loss(y_true, z, EPSILON, from_logits=True),
            extreme,
        )
        assert np.isfinite(gradient).all()


def test_a_tiny_rest_keeps_its_digits():
    """1 - 0.9999999999 is 0 in float32. Its logarithm is not."""
    t = np.array([0.7, 0.3 - 1e-10, np.exp(-23.0)])
    y_true = np.stack([[4, 2, -1], np.log(t)], axis=-1)[None]
    logits = np.zeros((1, CLASSES), "float32")
    logits[0, [4, 2]] = 60.0  # The other classes have 1e-25.
    log_p = np.array([np.log(0.5), np.log(0.5), np.log(10) - np.log(2) - 60.0])
    np.testing.assert_allclose(
        top_k_pt_loss(y_true, logits, 0.0, from_logits=True),
        [np.sum(t * (np.log(t) - log_p))],
        rtol=1e-5,
    )


# Targets.


def test_explicit_rest_and_padding():
    """An entry -1 is the rest, lower ones are nothing, whatever they hold."""
    y_true, logits, _ = draw()
    padding = np.tile([[[-2.0, np.nan], [-2.0, 5.0]]], (ROWS, 1, 1))
    longer = np.concatenate([padding, with_rest(y_true)[:, ::-1]], axis=1)
    np.testing.assert_allclose(
        top_k_pt_loss(longer, logits, EPSILON, from_logits=True),
        reference(y_true, logits, EPSILON),
        rtol=1e-5,
    )


@pytest.mark.parametrize("tail", ["event", "renormalize"])
def test_padding_alone_costs_nothing(tail):
    empty, logits = np.full((ROWS, K, 2), -2.0), draw()[1]

    def loss(z):
        return top_k_pt_loss(empty, z, 0.3, tail=tail, from_logits=True)

    np.testing.assert_allclose(loss(logits), 0.0, atol=1e-6)
    np.testing.assert_allclose(gradient_of(loss, logits), 0.0, atol=1e-6)


def test_zero_probabilities_and_rounded_sums():
    """A class of no mass is not in the rest; sums up to 1.01 are divided."""
    y_true = np.array(
        [
            [[1, np.log(0.6)], [3, -np.inf]],
            [[1, np.log(0.503)], [0, np.log(0.501)]],
        ]
    )
    logits = np.array([[9.0, 1.0, -3.0, 2.0]] * 2, "float32")
    p = scipy.special.softmax(logits[0].astype("float64"))
    expected = [
        pt_loss(
            np.array([0.6, 0.0, 0.4]), np.array([p[1], p[3], p[0] + p[2]]), 0.5
        ),
        pt_loss(
            np.array([0.503, 0.501, 0.0]) / 1.004,
            np.array([p[1], p[0], p[2] + p[3]]),
            0.5,
        ),
    ]
    np.testing.assert_allclose(
        top_k_pt_loss(y_true, logits, 0.5, from_logits=True),
        expected,
        rtol=1e-5,
    )


INVALID = [
    [[1, -0.5], [1, -2.0]],
    [[-1, -0.5], [-1, -2.0]],
    [[1.5, -0.5], [1, -2.0]],
    [[0, 0.7], [1, 0.3]],
    [[0, np.nan], [1, -0.3]],
]


def test_invalid_targets(in_step):
    """An error where values are seen; else NaN, at that position alone."""
    y_true = np.array([[[0, -0.5], [1, -2.0]], *INVALID], "float32")
    logits = np.zeros((ROWS, CLASSES), "float32")
    for row in y_true[1:]:
        with pytest.raises(ValueError, match="must hold whole ids below 12"):
            top_k_pt_loss(row[None], logits[:1], 0.0, from_logits=True)
    value = ops.convert_to_numpy(in_step(y_true, logits))
    assert np.isnan(value).tolist() == [False] + 5 * [True]


@pytest.mark.parametrize("explicit", [False, True])
def test_ids_beyond_the_vocabulary(explicit, in_step):
    """An error where ids are seen; else they belong to the rest."""
    y_true, logits, _ = draw()
    y_true[:, 0, 0] = CLASSES + 2
    longer = with_rest(y_true).astype("float32") if explicit else y_true
    with pytest.raises(ValueError, match=r"`y_true`.*below 12.*14\.0"):
        top_k_pt_loss(longer, logits, 0.3, from_logits=True)
    np.testing.assert_allclose(
        in_step(longer, logits),
        reference(y_true[:, 1:], logits, 0.3),
        rtol=1e-5,
    )


# Gradients.


@pytest.mark.parametrize("tail", ["event", "renormalize"])
def test_gradient(tail):
    y_true, logits, _ = draw()
    gradient = gradient_of(
        lambda z: top_k_pt_loss(
            y_true, z, EPSILON, tail=tail, from_logits=True
        ),
        logits,
    )
    expected = numerical_gradient(
        lambda z: reference(y_true, z, EPSILON, tail).sum(), logits
    )
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


# The fused head.


@pytest.mark.parametrize("chunk", [5, 4096])
def test_fused_is_the_plain_loss(chunk):
    y_true, hidden, weights, bias = draw_head()
    expected = reference(y_true, hidden @ weights + bias, EPSILON)
    fused = compiled(
        lambda y, h, w, b: fused_top_k_pt_loss(
            y, h, w, EPSILON, bias=b, chunk=chunk
        )
    )
    np.testing.assert_allclose(
        fused(y_true, hidden, weights, bias), expected, rtol=1e-4
    )
    tied = fused_top_k_pt_loss(
        y_true.reshape(2, 3, K, 2),
        hidden.reshape(2, 3, UNITS),
        weights.T,
        EPSILON,
        chunk=chunk,
    )
    expected = reference(y_true, hidden @ weights, EPSILON)
    np.testing.assert_allclose(tied, expected.reshape(2, 3), rtol=1e-4)
    for dtype in ("float16", "bfloat16"):
        half = fused_top_k_pt_loss(
            y_true, ops.cast(hidden, dtype), weights, EPSILON, chunk=chunk
        )
        np.testing.assert_allclose(half, expected, atol=0.2)


@pytest.mark.parametrize("argument", [1, 2, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_fused_gradient(argument, tied):
    """Each position with a factor of its own, as weights make it."""
    inputs = draw_head(1)
    factors = np.arange(ROWS, dtype="float32")

    def fused(y, h, w, b):
        w = ops.transpose(w) if tied else w
        loss = fused_top_k_pt_loss(y, h, w, EPSILON, bias=b, chunk=5)
        return loss * ops.convert_to_tensor(factors)

    def exact(x):
        y, h, w, b = (*inputs[:argument], x, *inputs[argument + 1 :])
        return np.sum(factors * reference(y, h @ w + b, EPSILON))

    np.testing.assert_allclose(
        gradient_of(fused, *inputs, argument=argument),
        numerical_gradient(exact, inputs[argument]),
        atol=2e-4,
        rtol=1e-3,
    )


@pytest.mark.skipif(BACKEND != "jax", reason="Only JAX tells the memory")
def test_fused_makes_no_array_of_positions_and_vocabulary():
    import jax

    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(512, UNITS)).astype("float32")
    weights = rng.normal(size=(UNITS, 4096)).astype("float32")
    y_true = np.tile([[[7.0, np.log(0.6)], [42.0, np.log(0.3)]]], (512, 1, 1))

    def planned(function):
        gradient = jax.grad(lambda h, w: function(h, w).sum(), (0, 1))
        plan = jax.jit(gradient).lower(hidden, weights).compile()
        return plan.memory_analysis().temp_size_in_bytes

    fused = planned(
        lambda h, w: fused_top_k_pt_loss(y_true, h, w, 0.1, chunk=256)
    )
    plain = planned(
        lambda h, w: top_k_pt_loss(y_true, h @ w, 0.1, from_logits=True)
    )
    logits = 4 * 512 * 4096
    assert fused < logits / 2 < plain < 2.1 * logits


@pytest.mark.skipif(BACKEND != "tensorflow", reason="about graphs")
def test_fused_with_an_unknown_number_of_positions():
    import tensorflow as tf

    y_true, hidden, weights, _ = draw_head()
    graph = tf.function(
        lambda y, h: fused_top_k_pt_loss(y, h, weights, 0.1, chunk=5),
        input_signature=[
            tf.TensorSpec((None, None, 2)),
            tf.TensorSpec((None, UNITS)),
        ],
    )
    np.testing.assert_allclose(
        graph(y_true, hidden),
        reference(y_true, hidden @ weights, 0.1),
        rtol=1e-4,
    )


# Training.


@pytest.fixture(scope="module")
def sequences():
    """Inputs, targets and weights of which some are padding with NaN."""
    y_true, _, _ = draw()
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    y_true = y_true.reshape(2, 3, K, 2).copy()
    y_true[0, 2] = np.nan
    weight = np.array([[1.0, 2.0, 0.0], [0.5, 1.0, 1.0]], "float32")
    return x, y_true, weight


def build(reduction="sum_over_batch_size", masked=False):
    keras.utils.set_random_seed(0)
    mask = [keras.layers.Masking()] if masked else []
    student = keras.Sequential(
        [keras.Input((3, 4)), *mask, keras.layers.Dense(CLASSES)]
    )
    loss = TopKPTLoss(EPSILON, from_logits=True, reduction=reduction)
    student.compile(keras.optimizers.SGD(0.1), loss=loss)
    return student


def test_fit_with_weights_and_a_mask(sequences):
    """Positions of weight 0, or masked, may hold anything."""
    x, y_true, weight = sequences
    student = build("mean_with_sample_weight")
    logits = student.predict(x, verbose=0).reshape(-1, CLASSES)
    good = np.where(weight.reshape(-1) > 0)[0]
    values = reference(y_true.reshape(-1, K, 2)[good], logits[good], EPSILON)
    expected = np.average(values, weights=weight.reshape(-1)[good])
    history = student.fit(x, y_true, sample_weight=weight, verbose=0)
    np.testing.assert_allclose(history.history["loss"], [expected], rtol=1e-5)
    assert all(np.isfinite(w).all() for w in student.get_weights())

    masked = x.copy()
    masked[0, 2] = 0.0
    student = build(masked=True)
    history = student.fit(masked, y_true, verbose=0)
    # Keras divides a masked loss by the number of unmasked positions.
    np.testing.assert_allclose(
        history.history["loss"], [values.mean()], rtol=1e-5
    )


@pytest.mark.skipif(BACKEND == "torch", reason="Its eager steps raise an error")
def test_fit_on_ids_beyond_the_vocabulary(sequences):
    """They belong to the rest, and no weight becomes NaN."""
    x, y_true, _ = sequences
    y_true = y_true.copy()
    y_true[0, 2] = y_true[0, 1]
    y_true[..., 0, 0] = CLASSES + 5
    student = build()
    logits = student.predict(x, verbose=0).reshape(-1, CLASSES)
    known = y_true.reshape(-1, K, 2)[:, 1:]
    history = student.fit(x, y_true, verbose=0)
    np.testing.assert_allclose(
        history.history["loss"],
        [reference(known, logits, EPSILON).mean()],
        rtol=1e-5,
    )
    assert all(np.isfinite(w).all() for w in student.get_weights())


def test_config_and_settings():
    loss = TopKPTLoss(
        EPSILON,
        tail="renormalize",
        teacher_temperature=2.0,
        from_logits=True,
        reduction="sum",
        dtype="float64",
    )
    config = keras.saving.serialize_keras_object(loss)
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == loss.get_config()
    assert (again.dtype, again.tail) == ("float64", "renormalize")
    with pytest.raises(AttributeError, match="`tail`.*cannot be changed"):
        loss.tail = "event"


# Correcting a language model with its next tokens.


def test_events_of_next_tokens():
    y_true = [
        [[3, np.log(0.5)], [-1, np.log(0.2)], [5, np.log(0.3)]],
        [[3, np.log(0.5)], [-2, np.nan], [5, np.log(0.3)]],
        [[-2, 0.0], [-2, 0.0], [-2, 0.0]],
        [[3, np.log(0.5)], [2, np.log(0.1)], [5, np.log(0.3)]],
    ]
    probs, events = top_k_events(y_true, np.array([5, 2, 5, -100]))
    expected = [
        [0.5, 0.0, 0.3, 0.2],
        [0.5, 0.0, 0.3, 0.2],
        [0.0, 0.0, 0.0, 1.0],
        [0.5, 0.1, 0.3, 0.1],
    ]
    np.testing.assert_allclose(probs, expected, atol=1e-12)
    assert events.tolist() == [2, 3, -1, -1]


def test_events_of_stored_labels():
    """The column of the rest, which stores have, is the last event."""
    y_true, _, teacher = draw()
    stored = with_rest(y_true).reshape(2, 3, K + 1, 2)
    labels = teacher.argmax(-1).reshape(2, 3)
    probs, events = top_k_events(stored, labels)
    others = np.sort(teacher, axis=-1)[:, :-K].sum(-1)
    assert probs.shape == (ROWS, K + 1)
    np.testing.assert_allclose(probs[:, -1], others, atol=1e-6)
    assert not events.any()  # The largest comes first.


# Wrong arguments.


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"tail": "spread"}, "`tail` must be one of"),
        ({"epsilon": [[1.0], [2.0]]}, "shared by the classes"),
        ({"teacher_temperature": 0.0}, "above 0"),
        ({"dtype": "bfloat16"}, "which hold ids"),
        ({"epsilon": keras.Variable(1.0)}, "no effect"),
    ],
)
def test_wrong_settings(arguments, match):
    with pytest.raises(ValueError, match=match):
        TopKPTLoss(**({"epsilon": 0.0} | arguments))


def test_wrong_shapes():
    student = np.full((6, 4), 0.25)
    for shape in [(6, 12), (1, 3, 2), (6, 2, 3), (6, 0, 2)]:
        with pytest.raises(ValueError, match="`y_true` must have shape"):
            top_k_pt_loss(np.full(shape, -1.0), student, 0.0)
    y_true, hidden, *_ = draw_head()
    for shape in [(4, 12), (UNITS, UNITS), (UNITS,)]:
        with pytest.raises(ValueError, match=r"`weights` .*shape \(5, C\)"):
            fused_top_k_pt_loss(y_true, hidden, np.zeros(shape), 0.0)
    for labels in (np.zeros(3, int), np.zeros(ROWS)):
        with pytest.raises(ValueError, match="`labels` must be integers of"):
            top_k_events(y_true, labels)
