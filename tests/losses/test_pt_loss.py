"""PTLoss and the rules of its base class, against NumPy, Keras and Optax."""

import helpers
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_ptloss import PTLoss, proxy_teacher, pt_loss

BACKEND = keras.backend.backend()
NOT_COMPILED = "Keras compiles no step on PyTorch unless asked"
EPSILON = np.array([2.0, -0.4, 1.5])
PER_CLASS = np.array([[1.0, -0.3], [0.0, 3.0], [-0.9, 0.2], [5.0, 1.0]])


def rows(count=6, classes=4, seed=0):
    """Return a teacher's probabilities and a student's logits."""
    rng = np.random.default_rng(seed)
    teacher = rng.dirichlet(np.ones(classes), size=count)
    logits = 2.0 * rng.normal(size=(count, classes))
    return teacher.astype("float32"), logits.astype("float32")


def as_numpy(x):
    return ops.convert_to_numpy(ops.cast(x, "float32"))


def gradient_on_logits(teacher, logits, epsilon):
    """`p sum_c w_c - w` with `w_c = t_c (1 + p_c h_c)`, in float64."""
    teacher = np.asarray(teacher, "float64")
    p = helpers.softmax(logits)
    epsilon = helpers.per_class(epsilon, p.shape[-1])
    h = sum(
        m * epsilon[..., m - 1] * (1 - p) ** (m - 1)
        for m in range(1, epsilon.shape[-1] + 1)
    )
    w = teacher * (1 + p * h)
    return p * w.sum(axis=-1, keepdims=True) - w


def gradient(teacher, logits, epsilon):
    def loss(z):
        return pt_loss(teacher, z, epsilon, from_logits=True)

    return helpers.gradient_of(loss, logits)


@pytest.mark.parametrize("case", helpers.golden_parameters())
def test_golden_values(case):
    value = pt_loss(case["teacher"], case["student"], case["epsilon"])
    np.testing.assert_allclose(value, case["pt_loss"], rtol=1e-5, atol=1e-5)


@settings(max_examples=12, deadline=None)
@given(
    classes=st.sampled_from([2, 5]),
    order=st.sampled_from([1, 3, 6]),
    per_class=st.booleans(),
    scale=st.sampled_from([1.0, 30.0, 1e4]),
    one_hot=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_value_and_gradient_from_logits(
    classes, order, per_class, scale, one_hot, seed
):
    teacher, logits = rows(5, classes, seed)
    rng = np.random.default_rng(seed)
    if one_hot:
        teacher = np.eye(classes)[rng.integers(0, classes, 5)].astype("float32")
    logits = (scale * logits).astype("float32")
    shape = (classes, order) if per_class else (order,)
    epsilon = rng.uniform(-1, 10, shape)
    # The loss divides the teacher's float32 rows by their sums.
    exact = teacher.astype("float64")
    exact /= exact.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(
        pt_loss(teacher, logits, epsilon, from_logits=True),
        helpers.pt_loss_of_logits(exact, logits, epsilon),
        rtol=1e-5,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        gradient(teacher, logits, epsilon),
        gradient_on_logits(exact, logits, epsilon),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2)]
)
def test_half_precision_student(dtype, tolerance):
    teacher, logits = rows()
    logits[0] = [1e4, -1e4, 0.0, 50.0]
    logits = ops.cast(logits, dtype)
    exact = as_numpy(logits)
    value = pt_loss(teacher, logits, EPSILON, from_logits=True)
    expected = helpers.pt_loss_of_logits(teacher, exact, EPSILON)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        gradient(teacher, logits, EPSILON),
        gradient_on_logits(teacher, exact, EPSILON),
        rtol=tolerance,
        atol=tolerance,
    )


def test_value_and_gradient_of_probabilities():
    teacher, logits = rows()
    student = helpers.softmax(logits).astype("float32")
    value = pt_loss(teacher, student, PER_CLASS)
    expected = helpers.pt_loss(teacher, student, PER_CLASS)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)

    def reference(p):  # The loss divides by the sum.
        p = p / p.sum(axis=-1, keepdims=True)
        return helpers.pt_loss(teacher, p, PER_CLASS).sum()

    np.testing.assert_allclose(
        helpers.gradient_of(lambda p: pt_loss(teacher, p, PER_CLASS), student),
        helpers.numerical_gradient(reference, student),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.parametrize("from_logits", [True, False])
def test_certain_student_is_finite(from_logits):
    teacher = np.eye(3, dtype="float32")
    student = np.roll(teacher, 1, axis=1)
    student = 1e4 * student if from_logits else student

    def loss(student):
        return pt_loss(teacher, student, EPSILON, from_logits=from_logits)

    assert np.isfinite(as_numpy(loss(student))).all()
    assert np.isfinite(helpers.gradient_of(loss, student)).all()


def test_gradient_on_the_teacher():
    teacher, logits = rows()
    p = helpers.softmax(logits)
    expected = np.log(teacher) + 1 - np.log(p)
    expected += helpers.perturbation(p, EPSILON)
    # The loss divides the teacher by its sum.
    expected -= (teacher * expected).sum(axis=-1, keepdims=True)
    found = helpers.gradient_of(
        lambda t: pt_loss(t, logits, EPSILON, from_logits=True), teacher
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_gradient_on_epsilon():
    teacher, logits = rows()
    s = 1 - helpers.softmax(logits)
    expected = [(teacher * s**m).sum() for m in (1, 2, 3)]
    found = helpers.gradient_of(
        lambda e: pt_loss(teacher, logits, e, from_logits=True),
        EPSILON.astype("float32"),
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_epsilon_per_example_holds_at_all_positions():
    rng = np.random.default_rng(0)
    teacher = rng.dirichlet(np.ones(4), size=(3, 5)).astype("float32")
    logits = rng.normal(size=(3, 5, 4)).astype("float32")
    epsilon = rng.uniform(-1, 3, size=(3, 4, 2))
    found = pt_loss(teacher, logits, epsilon, from_logits=True)
    expected = [
        helpers.pt_loss_of_logits(*row, own)
        for *row, own in zip(teacher, logits, epsilon, strict=True)
    ]
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", None])
def test_epsilon_zero_is_keras_kl_divergence(reduction):
    teacher, logits = rows()
    student = helpers.softmax(logits).astype("float32")
    weight = np.array([0.0, 1.0, 2.0, 0.5, 1.0, 3.0], "float32")
    np.testing.assert_allclose(
        PTLoss(0.0, reduction=reduction)(teacher, student, weight),
        keras.losses.KLDivergence(reduction)(teacher, student, weight),
        rtol=1e-5,
        atol=1e-6,
    )


def test_one_hot_teacher_is_optax_poly_loss():
    optax = pytest.importorskip("optax")
    _, logits = rows()
    one_hot = np.eye(4, dtype="float32")[[0, 1, 2, 3, 0, 1]]
    np.testing.assert_allclose(
        pt_loss(one_hot, logits, 1.7, from_logits=True),
        optax.losses.poly_loss_cross_entropy(logits, one_hot, epsilon=1.7),
        rtol=1e-5,
    )


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature_starts_from_the_floored_logarithm(temperature):
    teacher, logits = rows()
    teacher[0] = [1.0, 0.0, 0.0, 0.0]
    z = np.log(np.maximum(teacher.astype("float64"), 1e-7))
    found = pt_loss(
        teacher,
        logits,
        EPSILON,
        teacher_temperature=temperature,
        from_logits=True,
    )
    expected = helpers.pt_loss_of_logits(
        helpers.softmax(z / temperature), logits, EPSILON
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


class TestMinimum:
    """The student that minimises PTLoss is the proxy teacher."""

    @pytest.mark.parametrize(
        ("epsilon", "temperature", "dtype", "tolerance"),
        [
            ([-0.5, 1.0, 3.0], 1.0, "float32", 2e-3),
            (PER_CLASS, 1.0, "float32", 2e-3),
            ([2.0, 0.5], 2.5, "float16", 5e-3),
        ],
    )
    def test_is_the_proxy_teacher(self, epsilon, temperature, dtype, tolerance):
        teacher, _ = rows(4)
        teacher[0] = [0.7, 0.3, 0.0, 0.0]
        teacher[1] = [0.0, 1.0, 0.0, 0.0]
        loss = PTLoss(
            epsilon, teacher_temperature=temperature, from_logits=True
        )
        # One free row of logits for each example.
        policy = "mixed_float16" if dtype == "float16" else dtype
        dense = keras.layers.Dense(4, use_bias=False, dtype=policy)
        student = keras.Sequential([keras.Input((4,)), dense])
        steps = 400
        schedule = keras.optimizers.schedules.CosineDecay(0.3, steps)
        student.compile(
            keras.optimizers.Adam(schedule),
            loss=loss,
            jit_compile=helpers.jit(),
        )
        x = np.tile(np.eye(4, dtype="float32"), (steps, 1))
        y = np.tile(teacher, (steps, 1))
        student.fit(x, y, batch_size=4, shuffle=False, verbose=0)
        t = np.asarray(teacher, "float64")
        if temperature != 1.0:
            t = helpers.softmax(np.log(np.maximum(t, 1e-7)) / temperature)
        np.testing.assert_allclose(
            helpers.softmax(student.predict(np.eye(4), verbose=0)),
            proxy_teacher(t, epsilon).probabilities,
            atol=tolerance,
        )


class TestRows:
    """What `y_true` may hold."""

    WRONG = {
        "sum": [0.5, 0.6, 0.0, 0.0],
        "logits": [2.0, -1.0, 0.5, -0.5],
        "negative": [1.1, -0.1, 0.0, 0.0],
        "nan": [np.nan, 0.5, 0.5, 0.0],
    }

    @pytest.mark.parametrize("wrong", WRONG)
    def test_wrong_row_is_an_error_eagerly(self, wrong):
        teacher, logits = rows()
        teacher[2] = self.WRONG[wrong]
        with pytest.raises(
            ValueError, match=r"`y_true` must hold.*y_true\[2\]"
        ):
            PTLoss(1.0, from_logits=True)(teacher, logits)

    @pytest.mark.skipif(BACKEND == "torch", reason=NOT_COMPILED)
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_wrong_rows_are_nan_in_a_compiled_step(self, temperature):
        teacher, logits = rows()
        teacher[:4] = list(self.WRONG.values())
        loss = PTLoss(
            EPSILON,
            teacher_temperature=temperature,
            from_logits=True,
            reduction=None,
        )
        value = as_numpy(helpers.compiled(loss)(teacher, logits))
        assert np.isnan(value[:4]).all()
        assert np.isfinite(value[4:]).all()

    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_row_of_zeros_costs_nothing(self, temperature):
        teacher, logits = rows()
        teacher[1] = 0.0

        def loss(z):
            return pt_loss(
                teacher,
                z,
                EPSILON,
                teacher_temperature=temperature,
                from_logits=True,
            )

        assert as_numpy(loss(logits))[1] == 0.0
        assert not helpers.gradient_of(loss, logits)[1].any()

    def test_rows_are_divided_by_their_sum(self):
        teacher, logits = rows()
        np.testing.assert_allclose(
            pt_loss(1.005 * teacher, logits, EPSILON, from_logits=True),
            pt_loss(teacher, logits, EPSILON, from_logits=True),
            rtol=1e-5,
        )

    def test_student_that_is_no_distribution(self):
        teacher, logits = rows()
        sigmoids = 1 / (1 + np.exp(-logits))
        with pytest.raises(ValueError, match="`y_pred` must hold.*from_logits"):
            PTLoss(1.0)(teacher, sigmoids)

    @pytest.mark.skipif(BACKEND == "torch", reason=NOT_COMPILED)
    def test_student_that_is_no_distribution_in_a_compiled_step(self):
        teacher, logits = rows()
        sigmoids = 1 / (1 + np.exp(-logits))
        value = helpers.compiled(PTLoss(1.0, reduction=None))(teacher, sigmoids)
        assert np.isnan(as_numpy(value)).all()

    @pytest.mark.parametrize("eagerly", [True, False])
    def test_masked_positions_may_hold_anything(self, eagerly):
        tokens = np.array([[1, 2, 0], [3, 0, 0], [1, 1, 2]])
        teacher = rows(9)[0].reshape(3, 3, 4)
        weights = []
        for hidden in (0.25, np.nan):
            teacher[tokens == 0] = hidden
            model = keras.Sequential(
                [
                    keras.Input((3,)),
                    keras.layers.Embedding(4, 4, mask_zero=True),
                ]
            )
            model.set_weights([rows(4)[1]])
            model.compile(
                "sgd",
                PTLoss(EPSILON, from_logits=True),
                run_eagerly=eagerly,
                jit_compile=helpers.jit(not eagerly),
            )
            model.train_on_batch(tokens, teacher)
            weights.append(model.get_weights()[0])
        assert np.isfinite(weights[0]).all()
        assert np.any(weights[0] != rows(4)[1])
        np.testing.assert_array_equal(weights[0], weights[1])

    def test_rows_of_weight_zero_may_hold_anything(self):
        teacher, logits = rows()
        weight = np.array([1, 0, 1, 0, 2, 1], "float32")
        loss = PTLoss(EPSILON, from_logits=True)
        expected = loss(teacher, logits, weight)
        teacher[1], teacher[3] = np.nan, 50.0
        assert float(loss(teacher, logits, weight)) == float(expected)
        slope = helpers.gradient_of(lambda z: loss(teacher, z, weight), logits)
        assert np.isfinite(slope).all()


@pytest.mark.parametrize("shape", ["(N,)", "(N, 1)", "(N, T)", "(N, T, 1)"])
@pytest.mark.parametrize("reduction", ["sum", "mean_with_sample_weight"])
def test_weights_of_sequences(shape, reduction):
    """With N = T, Keras would take weights (N,) for the positions'."""
    teacher, logits = (x.reshape(3, 3, 4) for x in rows(9))
    weight = np.array([1.0, 0.0, 5.0], "float32")
    whole = np.tile(weight[:, None], (1, 3))
    each = helpers.pt_loss_of_logits(teacher, logits, 0.0)
    expected = (whole * each).sum()
    if reduction != "sum":
        expected = expected / whole.sum()
    given_weight = {
        "(N,)": weight,
        "(N, 1)": weight[:, None],
        "(N, T)": whole,
        "(N, T, 1)": whole[..., None],
    }[shape]
    loss = PTLoss(0.0, from_logits=True, reduction=reduction)
    np.testing.assert_allclose(
        loss(teacher, logits, given_weight), expected, rtol=1e-5
    )


@pytest.mark.parametrize("from_logits", [True, False])
def test_binary_head_is_two_classes(from_logits):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(6, 1)).astype("float32")
    t = rng.uniform(size=(6, 1)).astype("float32")
    expected = helpers.pt_loss_of_logits(
        np.concatenate([1 - t, t], axis=1),
        np.concatenate([0 * z, z], axis=1),
        [[3.0], [0.5]],
    )
    student = z if from_logits else 1 / (1 + np.exp(-z))
    found = pt_loss(t, student, [[3.0], [0.5]], from_logits=from_logits)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="about graphs")
def test_sizes_that_a_graph_does_not_know():
    import tensorflow as tf

    teacher, logits = rows()
    loss = PTLoss(EPSILON, from_logits=True)
    graph = tf.function(
        loss,
        input_signature=[
            tf.TensorSpec((None, None)),
            tf.TensorSpec((None, 4)),
        ],
    )
    expected = loss(teacher, logits)
    np.testing.assert_allclose(graph(teacher, logits), expected, rtol=1e-6)
    with pytest.raises(tf.errors.InvalidArgumentError):
        graph(rows(6, 3)[0], logits)


class TestSettings:
    def test_cannot_be_changed(self):
        loss = PTLoss(0.5, teacher_temperature=2.0)
        for name in ("epsilon", "teacher_temperature", "from_logits"):
            with pytest.raises(AttributeError, match="Create a new loss"):
                setattr(loss, name, 1.0)
        with pytest.raises(ValueError, match="read-only"):
            loss.epsilon[0] = 1.0

    @pytest.mark.parametrize(
        "arguments",
        [
            {"epsilon": lambda: keras.Variable([0.5])},
            {"teacher_temperature": lambda: keras.Variable(2.0)},
        ],
    )
    def test_variable_is_refused(self, arguments):
        made = {name: make() for name, make in arguments.items()}
        with pytest.raises(ValueError, match="no effect"):
            PTLoss(**{"epsilon": 0.5, **made})

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"epsilon": [np.nan]}, "`epsilon` must be finite"),
            ({"epsilon": np.zeros((2, 2, 2))}, "`epsilon` must be of shape"),
            ({"epsilon": "high"}, "`epsilon` must be"),
            ({"teacher_temperature": 0.0}, "`teacher_temperature` must be"),
            ({"teacher_temperature": [1.0, 2.0]}, "`teacher_temperature`"),
            ({"from_logits": "yes"}, "`from_logits` must be"),
        ],
    )
    def test_wrong_argument(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            PTLoss(**{"epsilon": 0.5, **arguments})

    @pytest.mark.parametrize(
        ("teacher", "epsilon", "message"),
        [
            ((6, 3), 0.5, "same number of classes"),
            ((5, 4), 0.5, "same shape"),
            ((6, 4), np.ones((3, 1)), r"shape \(4, None\)"),
            ((6, 4), np.ones((5, 4, 1)), r"shape \(6, 4, None\)"),
        ],
    )
    def test_shapes_that_differ(self, teacher, epsilon, message):
        teacher = np.full(teacher, 1 / teacher[1], "float32")
        with pytest.raises(ValueError, match=message):
            pt_loss(teacher, rows()[1], epsilon, from_logits=True)

    def test_weights_do_not_broadcast_one_row(self):
        with pytest.raises(ValueError, match="one row for each row"):
            PTLoss(0.0)(
                np.full((1, 4), 0.25), np.full((3, 4), 0.25), np.ones(3)
            )


class TestKeras:
    @pytest.mark.parametrize("dtype", ["float16", "float64"])
    def test_config_round_trip(self, dtype):
        loss = PTLoss(
            PER_CLASS,
            teacher_temperature=2.0,
            from_logits=True,
            reduction="sum",
            name="mine",
            dtype=dtype,
        )
        again = keras.saving.deserialize_keras_object(
            keras.saving.serialize_keras_object(loss)
        )
        assert again.get_config() == loss.get_config()
        assert again.dtype == dtype
        np.testing.assert_array_equal(again.epsilon, PER_CLASS)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_dtype_of_the_result(self, dtype):
        teacher, logits = rows()
        value = PTLoss(EPSILON, from_logits=True, dtype=dtype)(teacher, logits)
        assert keras.backend.standardize_dtype(value.dtype) == dtype
        expected = helpers.pt_loss_of_logits(teacher, logits, EPSILON).mean()
        np.testing.assert_allclose(as_numpy(value), expected, rtol=2e-2)

    def test_fit_and_reload(self, tmp_path):
        x, soft_labels = helpers.soft_labelled(3)
        student = helpers.linear_model(3)
        loss = PTLoss(EPSILON, from_logits=True)
        student.compile("sgd", loss=loss, jit_compile=helpers.jit())
        history = student.fit(x, soft_labels, epochs=3, verbose=0)
        assert history.history["loss"][-1] < history.history["loss"][0]
        student.save(tmp_path / "student.keras")
        again = keras.saving.load_model(tmp_path / "student.keras")
        np.testing.assert_allclose(
            again.evaluate(x, soft_labels, verbose=0),
            student.evaluate(x, soft_labels, verbose=0),
            rtol=1e-6,
        )

    def test_lists(self):
        value = PTLoss(0.0)([[0.5, 0.5]], [[0.4, 0.6]], sample_weight=[2.0])
        expected = 2 * helpers.pt_loss([[0.5, 0.5]], [[0.4, 0.6]], 0.0)
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
