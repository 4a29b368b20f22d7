"""Correction: the formula in NumPy, tensors, files and models."""

import dataclasses
import json

import helpers
import keras
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_ptloss import Correction
from keras_ptloss.correction import CorrectedTeacher, TeachersSideBySide

CLASSES = 3
INF = float("inf")


def draw(seed, *shape, concentration=0.5):
    generator = np.random.default_rng(seed)
    return generator.dirichlet(np.full(shape[-1], concentration), shape[:-1])


def arguments(seed, counts):
    """All arguments of a correction of teachers with these classes."""
    generator = np.random.default_rng(seed)
    return {
        "epsilon": generator.uniform(-0.9, 10.0),
        "temperature": tuple(
            generator.uniform(0.3, 3.0) if count == CLASSES else INF
            for count in counts
        ),
        "matrix": generator.normal(size=(CLASSES, sum(counts))),
        "bias": generator.normal(size=CLASSES),
        "log_prob_weight": generator.normal(),
        "prob_weight": generator.normal(),
        "teacher_classes": counts,
    }


def proxy(t, epsilon):
    """`q_c = t_c / (nu - eps t_c)` with nu by bisection, one row."""
    low = max((1 + epsilon) * t.max(), 1 + min(epsilon, 0))
    nu = scipy.optimize.brentq(
        lambda nu: (t / (nu - epsilon * t)).sum() - 1,
        low * (1 - 1e-12) - 1e-12,
        1 + max(epsilon, 0) + 1e-9,
        xtol=1e-15,
        rtol=1e-14,
    )
    return t / (nu - epsilon * t)


def by_the_formula(teachers, a, kept=()):
    """The class docstring's formula, row by row."""
    rows = []
    for row in zip(*teachers, strict=True):
        z = [np.log(np.maximum(t, 1e-7)) for t in row]
        pooled = np.zeros(CLASSES)
        for z_k, temperature in zip(z, a["temperature"], strict=True):
            if temperature != INF:
                pooled += z_k / temperature
        r = np.log(proxy(helpers.softmax(pooled), a["epsilon"]))
        logits = (1 + a["log_prob_weight"]) * r + a["bias"]
        logits += a["prob_weight"] * helpers.softmax(r)
        logits += a["matrix"] @ np.concatenate(z)
        q = np.exp(logits)
        q /= q.sum()
        if kept:
            alike = [z_k for z_k in z if len(z_k) == CLASSES]
            t = helpers.softmax(np.mean(alike, axis=0))
            others = [c for c in range(CLASSES) if c not in kept]
            rest = 1 - t[list(kept)].sum()
            new = t.copy()
            new[others] = q[others] / q[others].sum() * rest
            q = new
        rows.append(q)
    return np.array(rows)


@pytest.mark.parametrize(
    ("counts", "kept"),
    [
        ((3,), ()),
        ((3,), (1,)),
        ((3, 3), (0, 2)),
        ((4, 3, 3), ()),
        ((4, 3, 3), (1,)),
        ((2, 5), ()),
    ],
)
def test_correct_and_apply_are_the_formula(counts, kept):
    teachers = [draw(k, 20, count) for k, count in enumerate(counts)]
    a = arguments(7, counts)
    correction = Correction(**a, kept_classes=kept)
    expected = by_the_formula(teachers, a, kept)
    q = correction.correct(teachers if len(counts) > 1 else teachers[0])
    np.testing.assert_allclose(q, expected, rtol=1e-8, atol=1e-12)
    side_by_side = np.concatenate(teachers, axis=-1)
    np.testing.assert_array_equal(correction.correct(side_by_side), q)
    tensor = ops.convert_to_tensor(side_by_side, "float32")
    np.testing.assert_allclose(
        ops.convert_to_numpy(correction.apply(tensor)), expected, atol=3e-6
    )


@settings(max_examples=30, deadline=None)
@given(
    temperature=st.floats(0.02, 50.0),
    epsilon=st.floats(-0.99, 50.0),
    seed=st.integers(0, 1000),
)
def test_step_1_stays_finite_and_is_the_proxy(temperature, epsilon, seed):
    """Small temperatures underflow softmax(z / temperature)."""
    t = draw(seed, 3, CLASSES, concentration=0.05)
    step_1 = Correction(epsilon, temperature)
    expected = [
        proxy(
            helpers.softmax(np.log(np.maximum(row, 1e-7)) / temperature),
            epsilon,
        )
        for row in t
    ]
    if temperature != 1.0:
        np.testing.assert_allclose(
            step_1.correct(t), expected, rtol=1e-6, atol=1e-9
        )
    with_step_2 = Correction(epsilon, temperature, log_prob_weight=-0.5)
    assert np.isfinite(with_step_2.correct(t)).all()


def test_log_of_the_proxy_where_it_underflows():
    """r = log q by the temperature, also where q itself is 0."""
    t = np.array([[0.999, 1e-3 - 1e-9, 1e-9]])
    correction = Correction(0.5, 0.02, log_prob_weight=-0.99)
    z = np.log(np.maximum(t, 1e-7)) / 0.02
    # q_c = t_c / (nu - 0.5 t_c), with t = (1, 0, 0) and nu = 1.5.
    r = z - np.log(1.5 - 0.5 * np.array([1.0, 0.0, 0.0]))
    expected = helpers.softmax(0.01 * (r - r.max()))
    np.testing.assert_allclose(correction.correct(t), expected, rtol=1e-3)
    tensor = ops.convert_to_tensor(t, "float32")
    q = ops.convert_to_numpy(correction.apply(tensor))
    np.testing.assert_allclose(q, expected, rtol=1e-3)


@pytest.mark.parametrize("log_prob_weight", [0.0, 1e-9])
def test_coefficients_per_class_and_of_higher_order(log_prob_weight):
    """With step 1 alone, and with a step 2 that changes next to nothing."""
    epsilon = [[1.0, 0.2], [0.0, 0.1], [-0.5, 0.3]]
    t = draw(0, 20, CLASSES, concentration=2.0)
    correction = Correction(epsilon, 2.0, log_prob_weight=log_prob_weight)
    q = correction.correct(t)
    moved = helpers.softmax(np.log(t) / 2.0)
    np.testing.assert_allclose(
        helpers.fixed_point(moved, q, epsilon), q, atol=1e-7
    )
    tensor = ops.convert_to_tensor(t, "float32")
    found = ops.convert_to_numpy(correction.apply(tensor))
    np.testing.assert_allclose(found, q, atol=1e-5)


def test_identity_keeps_exact_zeros():
    assert Correction().is_identity
    assert not Correction(0.1).is_identity
    t = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    np.testing.assert_array_equal(Correction().correct(t), t)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(Correction().apply(ops.convert_to_tensor(t))), t
    )
    assert Correction(0.5).correct(t)[1, 2] == 0.0


def test_step_1_where_teachers_have_other_classes():
    """Without a teacher that has them r is uniform: the matrix does it all."""
    correction = Correction(temperature=INF, matrix=np.eye(2)[[0, 1, 1]])
    q = correction.correct([[0.8, 0.2]])
    np.testing.assert_allclose(q, [[0.8 / 1.2, 0.2 / 1.2, 0.2 / 1.2]])
    teachers = [draw(0, 20, 4), draw(1, 20, CLASSES)]
    correction = Correction(
        temperature=(INF, 2.0), teacher_classes=(4, CLASSES)
    )
    assert correction.num_classes == CLASSES
    z = np.log(np.maximum(teachers[1], 1e-7))
    np.testing.assert_allclose(
        correction.correct(teachers), helpers.softmax(z / 2.0)
    )


def test_leading_axes():
    t = draw(0, 4, 5, CLASSES)
    correction = Correction(**arguments(1, (CLASSES,)))
    flat = correction.correct(t.reshape(-1, CLASSES))
    np.testing.assert_allclose(correction.correct(t), flat.reshape(t.shape))
    np.testing.assert_allclose(correction.correct(t[0, 0]), flat[0])


def test_sigmoid_head_is_two_classes():
    p = np.linspace(0.1, 0.9, 5)[:, None]
    correction = Correction(0.5, 2.0)
    expected = correction.correct(np.concatenate([1 - p, p], axis=1))
    np.testing.assert_allclose(correction.correct(p), expected)
    of_logits = Correction(0.5, 2.0, from_logits=True)
    np.testing.assert_allclose(of_logits.correct(np.log(p / (1 - p))), expected)
    tensor = correction.apply(ops.convert_to_tensor(p))
    np.testing.assert_allclose(
        ops.convert_to_numpy(tensor), expected, atol=1e-6
    )


def test_logits_are_their_softmax():
    t = draw(0, 20, CLASSES)
    a = arguments(1, (CLASSES, CLASSES))
    mixed = Correction(**a, from_logits=(True, False))
    found = mixed.correct([np.log(t) + 3.0, t])
    np.testing.assert_allclose(found, Correction(**a).correct([t, t]))


@pytest.mark.parametrize(
    ("outputs", "from_logits", "match"),
    [
        ([[2.0, -1.0, 0.0]], False, "probabilities.*take their softmax first"),
        ([[0.2, 0.8, 0.0]] * 2, True, "`from_logits` must be False"),
        ([[20.0, 80.0, 0.0]], False, "percentages: divide them by 100"),
        ([[0.2, 0.8, np.nan]], False, "must not contain NaN"),
        ([[0.2, 0.8, np.inf]], True, "finite logits"),
        ([[0.2, 0.8]], False, r"as many classes as the correction, 3"),
        ([["a", "b", "c"]], False, "must be numbers"),
        (np.ma.masked_array([[0.2, 0.8, 0.0]]), False, "a masked array"),
    ],
)
def test_other_outputs_are_refused(outputs, from_logits, match):
    correction = Correction(bias=[0.0, 1.0, 0.0], from_logits=from_logits)
    with pytest.raises(ValueError, match=match):
        correction.correct(outputs)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"temperature": 0.0}, "`temperature` must be a positive number"),
        ({"temperature": [1.0, 2.0]}, "one for each of 1 teachers"),
        ({"matrix": [1.0, 2.0]}, "`matrix` must be finite numbers with 2"),
        ({"bias": [np.nan]}, "`bias` must be finite"),
        ({"matrix": np.eye(3), "bias": [1.0, 2.0]}, "must agree on"),
        ({"matrix": np.eye(3), "teacher_classes": (3, 3)}, "must agree on"),
        ({"matrix": np.ones((2, 3))}, "must have temperature=inf"),
        ({"bias": [1.0, 2.0], "kept_classes": (2,)}, "`kept_classes` are"),
        (
            {
                "matrix": np.ones((2, 3)),
                "temperature": INF,
                "kept_classes": (1,),
            },
            "cannot keep classes",
        ),
        ({"from_logits": "yes"}, "`from_logits` must be True or False"),
        ({"epsilon": np.nan}, "`epsilon` must be finite"),
    ],
)
def test_arguments_that_disagree(arguments, match):
    with pytest.raises(ValueError, match=match):
        Correction(**arguments)


def full():
    return Correction(
        **arguments(3, (3, 4, 3)),
        kept_classes=(2,),
        from_logits=(True, False, False),
    )


def test_json(tmp_path):
    correction = full()
    correction.save(tmp_path / "correction.json")
    loaded = Correction.load(tmp_path / "correction.json")
    assert loaded == correction
    assert loaded != Correction()
    config = json.loads(json.dumps(Correction([0.5, 0.1], 2.0).get_config()))
    assert Correction.from_config(config) == Correction([0.5, 0.1], 2.0)


def test_it_is_a_value():
    correction = full()
    with pytest.raises(dataclasses.FrozenInstanceError):
        correction.epsilon = 0.0
    with pytest.raises(ValueError, match="read-only"):
        correction.matrix[0, 0] = 1.0


def network(classes, seed, activation="softmax"):
    init = keras.initializers.GlorotUniform(seed)
    dense = keras.layers.Dense(classes, activation, kernel_initializer=init)
    return keras.Sequential([keras.Input((5,)), dense])


def test_layers_inside_a_saved_model(tmp_path):
    x = np.random.default_rng(0).normal(size=(8, 5)).astype("float32")
    teachers = [network(3, 0, None), network(4, 1), network(3, 2)]
    correction = full()
    model = keras.Sequential(
        [
            TeachersSideBySide(teachers, from_logits=correction.from_logits),
            CorrectedTeacher(correction),
        ]
    )
    found = model.predict(x, verbose=0)
    outputs = [teacher.predict(x, verbose=0) for teacher in teachers]
    expected = correction.correct(outputs)
    np.testing.assert_allclose(found, expected, atol=3e-6)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), found, atol=1e-6)
    assert loaded.layers[-1].correction == correction
    assert not loaded.layers[-1].weights


def test_layer_takes_a_list_of_teachers():
    """Also under a policy of half precision."""
    a = arguments(0, (3, 2))
    t, p = draw(0, 6, 3), draw(1, 6, 2)[:, 1:]
    both = np.concatenate([1 - p, p], axis=1)
    expected = Correction(**a).correct([t, both])
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        found = CorrectedTeacher(Correction(**a))([t, p])
    finally:
        keras.config.set_dtype_policy(before)
    np.testing.assert_allclose(found, expected, atol=3e-6)


def test_layer_on_logits():
    """Eagerly an error, and NaN in a compiled function."""
    layer = CorrectedTeacher(Correction(0.5))
    logits = np.array([[2.0, -1.0, 0.0], [0.2, 0.3, 0.5]], "float32")
    with pytest.raises(ValueError, match="probabilities.*apply a softmax"):
        layer(logits)
    if keras.backend.backend() == "torch":
        return  # Keras compiles no step on PyTorch unless asked.
    model = keras.Sequential([keras.Input((3,)), layer])
    found = model.predict(logits, verbose=0)
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()


def test_layers_of_something_else():
    with pytest.raises(ValueError, match="`correction` must be a keras_ptloss"):
        CorrectedTeacher(0.5)
    with pytest.raises(ValueError, match="`from_logits` must be one flag"):
        TeachersSideBySide([network(3, 0)], from_logits=[True, False])
