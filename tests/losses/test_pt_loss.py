"""pt_loss and PTLoss: Eq. 7 against NumPy, Keras and Optax."""

import functools

import helpers
import keras
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_ptloss import PTLoss, pt_loss

BACKEND = keras.backend.backend()
REDUCTIONS = ["sum_over_batch_size", "sum", "mean", "mean_with_sample_weight"]
EPSILONS = {
    "zero": np.zeros(2),
    "scalar": 0.7,
    "shared": np.array([2.0, -0.4, 1.5]),
    "per_class": np.array([[1.0, -0.3], [0.0, 3.0], [-0.9, 0.2], [5.0, 1.0]]),
}
CLASSES = 4


def make_rows(rows=6, classes=CLASSES, seed=0):
    """The teacher's probabilities and the student's logits."""
    generator = np.random.default_rng(seed)
    teacher = generator.dirichlet(np.ones(classes), size=rows)
    logits = 2.0 * generator.normal(size=(rows, classes))
    return teacher.astype("float32"), logits.astype("float32")


@pytest.fixture
def rows():
    return make_rows()


def numpy_of(x):
    return ops.convert_to_numpy(ops.cast(x, "float32"))


def from_logits_loss(epsilon, **arguments):
    arguments.setdefault("teacher_from_logits", False)
    return PTLoss(epsilon, from_logits=True, **arguments)


def some_epsilon():
    return pytest.mark.parametrize(
        "epsilon", EPSILONS.values(), ids=EPSILONS.keys()
    )


class TestConfig:
    def test_defaults(self):
        loss = PTLoss([0.5])
        assert loss.name == "pt_loss"
        assert loss.reduction == "sum_over_batch_size"
        assert not loss.from_logits
        assert not loss.teacher_from_logits

    @pytest.mark.parametrize("from_logits", [False, True])
    def test_teacher_is_of_the_students_form_by_default(self, from_logits):
        loss = PTLoss(0.5, from_logits=from_logits)
        assert loss.teacher_from_logits is from_logits

    def test_round_trip(self):
        loss = PTLoss(
            EPSILONS["per_class"],
            from_logits=True,
            teacher_from_logits=False,
            teacher_temperature=[1.0, 2.0, 0.5, 3.0],
            teacher_bias=[0.1, -0.2, 0.0, 0.3],
            reduction="sum",
            name="mine",
            dtype="float16",
        )
        again = PTLoss.from_config(loss.get_config())
        assert again.get_config() == loss.get_config()
        assert again.dtype == "float16"
        np.testing.assert_array_equal(again.epsilon, EPSILONS["per_class"])

    def test_config_is_json(self):
        loss = PTLoss(0.5, teacher_bias=0.1)
        text = keras.saving.serialize_keras_object(loss)
        again = keras.saving.deserialize_keras_object(text)
        assert again.get_config() == loss.get_config()

    def test_scalar_is_order_one(self, rows):
        teacher, logits = rows
        np.testing.assert_array_equal(
            pt_loss(teacher, logits, 0.7, from_logits=True,
                    teacher_from_logits=False),
            pt_loss(teacher, logits, [0.7], from_logits=True,
                    teacher_from_logits=False),
        )  # fmt: skip
        assert PTLoss(0.7).epsilon.shape == (1,)


class TestValue:
    @some_epsilon()
    def test_unweighted_from_logits(self, rows, epsilon):
        teacher, logits = rows
        expected = helpers.pt_loss_of_logits(teacher, logits, epsilon)
        value = from_logits_loss(epsilon)(teacher, logits)
        np.testing.assert_allclose(value, expected.mean(), rtol=1e-5)

    @some_epsilon()
    def test_unweighted_probabilities(self, rows, epsilon):
        teacher, logits = rows
        student = helpers.softmax(logits)
        value = PTLoss(epsilon)(teacher, student)
        expected = helpers.pt_loss(teacher, student, epsilon).mean()
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    def test_one_value_an_example(self):
        generator = np.random.default_rng(0)
        teacher = generator.dirichlet(np.ones(3), size=(2, 5))
        student = generator.dirichlet(np.ones(3), size=(2, 5))
        value = pt_loss(teacher, student, [0.5, 1.0])
        assert value.shape == (2, 5)
        np.testing.assert_allclose(
            value, helpers.pt_loss(teacher, student, [0.5, 1.0]), rtol=1e-5
        )

    @pytest.mark.parametrize("from_logits", [False, True])
    def test_without_the_teachers_entropy(self, rows, from_logits):
        teacher, logits = rows
        teacher[0] = [1.0, 0.0, 0.0, 0.0]
        student = logits if from_logits else helpers.softmax(logits)
        arguments = {"from_logits": from_logits, "teacher_from_logits": False}
        value = pt_loss(teacher, student, [2.0, 0.5], **arguments)
        without = pt_loss(
            teacher, student, [2.0, 0.5], entropy=False, **arguments
        )
        expected = scipy.special.xlogy(teacher, teacher).sum(axis=-1)
        np.testing.assert_allclose(value - without, expected, atol=1e-5)

    def test_entropy_has_no_gradient(self, rows):
        teacher, logits = rows
        gradients = [
            helpers.gradient_of(
                from_logits_loss([2.0, 0.5], entropy=entropy),
                teacher,
                logits,
                argument=1,
            )
            for entropy in (True, False)
        ]
        np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-7)

    def test_coefficients_per_example(self, rows):
        teacher, logits = rows
        epsilon = np.random.default_rng(1).uniform(-1, 10, (6, CLASSES, 3))
        value = pt_loss(
            teacher,
            logits,
            epsilon,
            from_logits=True,
            teacher_from_logits=False,
        )
        np.testing.assert_allclose(
            value,
            helpers.pt_loss_of_logits(teacher, logits, epsilon),
            rtol=1e-5,
        )

    @pytest.mark.parametrize("reduction", [*REDUCTIONS, None, "none"])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_zero_epsilon_is_keras_kl_divergence(
        self, rows, reduction, weighted
    ):
        teacher, logits = rows
        student = helpers.softmax(logits).astype("float32")
        weight = np.array([0.0, 1.0, 2.0, 0.5, 1.0, 3.0], "float32")
        weight = weight if weighted else None
        ours = PTLoss(0.0, reduction=reduction)
        kl = keras.losses.KLDivergence(reduction=reduction)
        np.testing.assert_allclose(
            ours(teacher, student, sample_weight=weight),
            kl(teacher, student, sample_weight=weight),
            rtol=1e-5,
            atol=1e-6,
        )

    def test_one_hot_order_one_is_optax_poly_loss(self, rows):
        optax = pytest.importorskip("optax")
        _, logits = rows
        one_hot = np.eye(CLASSES, dtype="float32")[[0, 1, 2, 3, 0, 1]]
        value = pt_loss(
            one_hot, logits, 1.7, from_logits=True, teacher_from_logits=False
        )
        expected = optax.losses.poly_loss_cross_entropy(
            logits, one_hot, epsilon=1.7
        )
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    @pytest.mark.parametrize("case", helpers.golden_parameters())
    def test_golden(self, case):
        value = pt_loss(case["teacher"], case["student"], case["epsilon"])
        np.testing.assert_allclose(value, case["pt_loss"], rtol=1e-5, atol=1e-5)


class TestReduction:
    @pytest.fixture
    def weight(self):
        return np.array([0.0, 1.0, 2.0, 0.5, 1.0, 3.0], "float32")

    @pytest.fixture
    def values(self, rows):
        return helpers.pt_loss_of_logits(*rows, EPSILONS["shared"])

    def test_no_reduction(self, rows, values):
        value = from_logits_loss(EPSILONS["shared"], reduction=None)(*rows)
        np.testing.assert_allclose(value, values, rtol=1e-5)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_unweighted(self, rows, values, reduction):
        loss = from_logits_loss(EPSILONS["shared"], reduction=reduction)
        expected = values.sum() if reduction == "sum" else values.mean()
        np.testing.assert_allclose(loss(*rows), expected, rtol=1e-5)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_sample_weighted(self, rows, values, weight, reduction):
        loss = from_logits_loss(EPSILONS["shared"], reduction=reduction)
        total = np.sum(values * weight)
        expected = {
            "sum": total,
            "mean": total / 6,
            "sum_over_batch_size": total / 6,
            "mean_with_sample_weight": total / weight.sum(),
        }[reduction]
        value = loss(*rows, sample_weight=weight)
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_zero_weighted(self, rows, reduction):
        loss = from_logits_loss(EPSILONS["shared"], reduction=reduction)
        value = loss(*rows, sample_weight=np.zeros(6, "float32"))
        np.testing.assert_array_equal(value, 0.0)


class TestTeacher:
    """`t = softmax(z / temperature + bias)`, from logits or probabilities."""

    SETTINGS = {
        "scalar": (2.0, 0.0),
        "temperature_per_class": (np.array([0.5, 1.0, 2.0, 4.0]), 0.0),
        "bias_per_class": (1.0, np.array([0.3, -1.0, 0.0, 2.0])),
        "vector": (
            np.array([0.5, 1.0, 2.0, 4.0]),
            np.array([0.3, -1.0, 0.0, 2.0]),
        ),
    }

    @pytest.mark.parametrize("name", SETTINGS)
    @pytest.mark.parametrize("teacher_from_logits", [False, True])
    def test_calibrated(self, rows, name, teacher_from_logits):
        temperature, bias = self.SETTINGS[name]
        _, logits = rows
        teacher_logits = make_rows(seed=5)[1]
        if not teacher_from_logits:
            # The logarithms of probabilities are logits of their own.
            teacher_logits = np.log(helpers.softmax(teacher_logits))
        expected = helpers.pt_loss_of_logits(
            helpers.calibrate(teacher_logits, temperature, bias),
            logits,
            EPSILONS["shared"],
        )
        teacher = (
            teacher_logits
            if teacher_from_logits
            else helpers.softmax(teacher_logits).astype("float32")
        )
        value = pt_loss(
            teacher,
            logits,
            EPSILONS["shared"],
            from_logits=True,
            teacher_from_logits=teacher_from_logits,
            teacher_temperature=temperature,
            teacher_bias=bias,
        )
        np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-6)

    def test_scalar_bias_changes_nothing(self, rows):
        teacher, logits = rows
        value = from_logits_loss(0.5, teacher_bias=3.0)(teacher, logits)
        plain = from_logits_loss(0.5)(teacher, logits)
        np.testing.assert_allclose(value, plain, rtol=1e-5)

    def test_student_is_not_calibrated(self, rows):
        """At the calibrated teacher's own logits KL is zero."""
        teacher_logits = rows[1]
        value = pt_loss(
            teacher_logits,
            teacher_logits / 2.0,
            0.0,
            from_logits=True,
            teacher_temperature=2.0,
        )
        np.testing.assert_allclose(value, np.zeros(6), atol=1e-6)

    def test_calibrated_zero_probability_is_finite(self):
        teacher = np.array([[1.0, 0.0, 0.0]], "float32")
        value = pt_loss(
            teacher,
            np.zeros((1, 3), "float32"),
            0.5,
            from_logits=True,
            teacher_from_logits=False,
            teacher_temperature=2.0,
        )
        clipped = np.log(np.maximum(teacher, keras.config.epsilon()))
        expected = helpers.pt_loss_of_logits(
            helpers.calibrate(clipped, 2.0, 0.0), np.zeros((1, 3)), 0.5
        )
        np.testing.assert_allclose(value, expected, rtol=1e-5)


class TestDtype:
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_computes_in_float32_whatever_the_student(self, rows, dtype):
        teacher, logits = rows
        low = ops.cast(logits, dtype)
        value = pt_loss(
            teacher,
            low,
            EPSILONS["shared"],
            from_logits=True,
            teacher_from_logits=False,
        )
        assert keras.backend.standardize_dtype(value.dtype) == "float32"
        expected = helpers.pt_loss_of_logits(
            teacher, numpy_of(low), EPSILONS["shared"]
        )
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_gradient_has_the_students_dtype(self, rows, dtype):
        teacher, logits = rows
        low = ops.cast(logits, dtype)
        gradient = helpers.gradient_of(
            lambda z: pt_loss(
                teacher,
                z,
                EPSILONS["shared"],
                from_logits=True,
                teacher_from_logits=False,
            ),
            low,
        )
        expected = helpers.numerical_gradient(
            lambda z: np.sum(
                helpers.pt_loss_of_logits(teacher, z, EPSILONS["shared"])
            ),
            numpy_of(low),
        )
        np.testing.assert_allclose(gradient, expected, rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_dtype_of_the_loss(self, rows, dtype):
        """Keras casts what it hands in: half precision of the input too."""
        teacher, logits = rows
        value = from_logits_loss(EPSILONS["shared"], dtype=dtype)(
            teacher, logits
        )
        assert keras.backend.standardize_dtype(value.dtype) == dtype
        expected = helpers.pt_loss_of_logits(
            teacher, logits, EPSILONS["shared"]
        ).mean()
        np.testing.assert_allclose(numpy_of(value), expected, rtol=2e-2)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    @pytest.mark.parametrize("classes", [1000])
    def test_half_precision_probabilities_are_accepted(self, dtype, classes):
        """Rounding to 8 bits is not taken for logits."""
        teacher, logits = make_rows(classes=classes, rows=16)
        student = helpers.softmax(logits).astype("float32")
        value = PTLoss(0.5, dtype=dtype)(teacher, student)
        expected = helpers.pt_loss(teacher, student, 0.5).mean()
        np.testing.assert_allclose(numpy_of(value), expected, rtol=3e-2)


class TestGradient:
    @some_epsilon()
    def test_student_logits(self, rows, epsilon):
        """The gradient written out."""
        teacher, logits = rows
        gradient = helpers.gradient_of(
            lambda z: pt_loss(
                teacher,
                z,
                epsilon,
                from_logits=True,
                teacher_from_logits=False,
            ),
            logits,
        )
        expected = helpers.numerical_gradient(
            lambda z: np.sum(helpers.pt_loss_of_logits(teacher, z, epsilon)),
            logits,
        )
        np.testing.assert_allclose(gradient, expected, atol=1e-5)

    @some_epsilon()
    def test_student_probabilities(self, rows, epsilon):
        teacher, logits = rows
        student = helpers.softmax(logits).astype("float32")
        gradient = helpers.gradient_of(
            lambda p: pt_loss(teacher, p, epsilon), student
        )
        expected = helpers.numerical_gradient(
            lambda p: np.sum(
                teacher * (helpers.perturbation(p, epsilon) - np.log(p))
            ),
            student,
            step=1e-7,
        )
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)

    @some_epsilon()
    def test_teacher_probabilities(self, rows, epsilon):
        teacher, logits = rows
        gradient = helpers.gradient_of(
            lambda t: pt_loss(
                t,
                logits,
                epsilon,
                from_logits=True,
                teacher_from_logits=False,
            ),
            teacher,
        )
        expected = helpers.numerical_gradient(
            lambda t: np.sum(helpers.pt_loss_of_logits(t, logits, epsilon)),
            teacher,
            step=1e-7,
        )
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)

    def test_teacher_logits(self, rows):
        teacher_logits, logits = make_rows(seed=5)[1], rows[1]
        gradient = helpers.gradient_of(
            lambda z: pt_loss(
                z,
                logits,
                EPSILONS["shared"],
                from_logits=True,
                teacher_temperature=[0.5, 1.0, 2.0, 4.0],
            ),
            teacher_logits,
        )
        expected = helpers.numerical_gradient(
            lambda z: np.sum(
                helpers.pt_loss_of_logits(
                    helpers.softmax(z / np.array([0.5, 1.0, 2.0, 4.0])),
                    logits,
                    EPSILONS["shared"],
                )
            ),
            teacher_logits,
        )
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", ["shared", "per_class"])
    @pytest.mark.parametrize("from_logits", [False, True])
    def test_epsilon_as_a_tensor(self, rows, name, from_logits):
        teacher, logits = rows
        student = helpers.softmax(logits)
        given = logits if from_logits else student.astype("float32")
        epsilon = EPSILONS[name].astype("float32")
        gradient = helpers.gradient_of(
            lambda e: pt_loss(
                teacher,
                given,
                e,
                from_logits=from_logits,
                teacher_from_logits=False,
            ),
            epsilon,
        )
        expected = helpers.numerical_gradient(
            lambda e: np.sum(helpers.pt_loss(teacher, student, e)), epsilon
        )
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)

    def test_epsilon_as_a_traced_tensor(self, rows):
        teacher, logits = rows
        epsilon = EPSILONS["shared"].astype("float32")
        gradient = helpers.gradient_of(
            helpers.compiled(
                lambda e: pt_loss(
                    teacher,
                    logits,
                    e,
                    from_logits=True,
                    teacher_from_logits=False,
                )
            ),
            epsilon,
        )
        expected = helpers.numerical_gradient(
            lambda e: np.sum(helpers.pt_loss_of_logits(teacher, logits, e)),
            epsilon,
        )
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)

    def test_upstream_gradient_is_multiplied_in(self, rows):
        teacher, logits = rows
        weight = np.array([0.0, 1.0, 2.0, 0.5, -1.0, 3.0], "float32")

        def weighted(scale):
            return helpers.gradient_of(
                lambda z: ops.multiply(
                    scale,
                    pt_loss(
                        teacher,
                        z,
                        EPSILONS["shared"],
                        from_logits=True,
                        teacher_from_logits=False,
                    ),
                ),
                logits,
            )

        np.testing.assert_allclose(
            weighted(weight),
            weight[:, None] * weighted(np.ones(6, "float32")),
            atol=1e-6,
        )


class TestEdgeCases:
    @pytest.mark.parametrize("classes", [2, 1000])
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_huge_logits(self, classes, dtype):
        teacher, _ = make_rows(classes=classes)
        sign = np.random.default_rng(0).choice([-1.0, 1.0], (6, classes))
        sign[0], sign[1], sign[2, 1:] = 1.0, -1.0, -1.0
        logits = ops.cast(1e4 * sign, dtype)

        def loss(z):
            return pt_loss(
                teacher,
                z,
                EPSILONS["shared"],
                from_logits=True,
                teacher_from_logits=False,
            )

        expected = helpers.pt_loss_of_logits(
            teacher, numpy_of(logits), EPSILONS["shared"]
        )
        np.testing.assert_allclose(loss(logits), expected, rtol=1e-4, atol=1e-3)
        assert np.all(np.isfinite(helpers.gradient_of(loss, logits)))

    @pytest.mark.parametrize("from_logits", [False, True])
    def test_one_hot_teacher(self, from_logits):
        teacher = np.eye(3, dtype="float32")
        logits = np.random.default_rng(0).normal(size=(3, 3)).astype("float32")
        student = helpers.softmax(logits)
        given = logits if from_logits else student.astype("float32")

        def loss(s):
            return pt_loss(
                teacher,
                s,
                [0.5, 2.0],
                from_logits=from_logits,
                teacher_from_logits=False,
            )

        expected = helpers.pt_loss(teacher, student, [0.5, 2.0])
        np.testing.assert_allclose(loss(given), expected, rtol=1e-5)
        assert np.all(np.isfinite(helpers.gradient_of(loss, given)))

    def test_zero_probabilities_of_the_student(self):
        """Clipped at `keras.config.epsilon()`, as Keras's KL is."""
        teacher = np.array([[0.5, 0.5, 0.0]], "float32")
        student = np.array([[1.0, 0.0, 0.0]], "float32")
        value = pt_loss(teacher, student, 0.0)
        kl = keras.losses.kl_divergence(teacher, student)
        np.testing.assert_allclose(value, kl, rtol=1e-4)
        gradient = helpers.gradient_of(
            lambda p: pt_loss(teacher, p, 0.5), student
        )
        assert np.all(np.isfinite(gradient))

    def test_teacher_logits_of_infinite_confidence(self):
        teacher = np.array([[1e4, -1e4, -1e4]], "float32")
        student = np.array([[-1e4, 1e4, 0.0]], "float32")

        def loss(z):
            return pt_loss(teacher, z, [1.0, 1.0], from_logits=True)

        np.testing.assert_allclose(loss(student), [2e4 + 2.0], rtol=1e-6)
        gradient = helpers.gradient_of(loss, student)
        np.testing.assert_allclose(gradient, [[-1.0, 1.0, 0.0]], atol=1e-6)

    def test_digits_near_a_certain_student(self):
        """`1 - p` keeps its digits: compared with float64 at p = 1 - 1e-6."""
        teacher = np.array([[1.0, 0.0]], "float32")
        logits = np.array([[13.8, 0.0]], "float32")
        with_epsilon = pt_loss(
            teacher, logits, 1e4, from_logits=True, teacher_from_logits=False
        )
        expected = helpers.pt_loss_of_logits(teacher, logits, 1e4)
        np.testing.assert_allclose(with_epsilon, expected, rtol=0.1)


class TestHypothesis:
    finite = st.floats(-20, 20, width=32)
    logits = st.lists(finite, min_size=3, max_size=3)

    @settings(max_examples=30, deadline=None)
    @given(teacher=logits, student=logits)
    def test_zero_epsilon_is_not_negative(self, teacher, student):
        value = pt_loss([teacher], [student], 0.0, from_logits=True)
        assert float(value[0]) >= -1e-5

    @settings(max_examples=30, deadline=None)
    @given(teacher=logits, student=logits, shift=st.floats(-50, 50, width=32))
    def test_shift_of_logits(self, teacher, student, shift):
        first = pt_loss([teacher], [student], [0.5, 2.0], from_logits=True)
        moved = pt_loss(
            [[z + shift for z in teacher]],
            [[z - shift for z in student]],
            [0.5, 2.0],
            from_logits=True,
        )
        np.testing.assert_allclose(first, moved, rtol=1e-4, atol=1e-4)


make_student = functools.partial(helpers.linear_model, CLASSES)


@pytest.fixture
def data():
    return helpers.soft_labelled(CLASSES)


class TestModelFit:
    @pytest.mark.parametrize("jit_compile", [False, True])
    @pytest.mark.parametrize("name", ["shared", "per_class"])
    def test_fit(self, data, name, jit_compile):
        x, soft_labels = data
        student = make_student()
        student.compile(
            keras.optimizers.Adam(0.05),
            loss=from_logits_loss(EPSILONS[name]),
            jit_compile=helpers.jit(jit_compile),
        )
        history = student.fit(x, soft_labels, epochs=15, verbose=0).history
        assert history["loss"][-1] < history["loss"][0]
        expected = helpers.pt_loss_of_logits(
            soft_labels, student.predict(x, verbose=0), EPSILONS[name]
        )
        value = student.evaluate(x, soft_labels, verbose=0)
        np.testing.assert_allclose(value, expected.mean(), rtol=1e-4)

    def test_sample_weight(self, data):
        x, soft_labels = data
        weight = np.random.default_rng(1).uniform(0, 2, 32).astype("float32")
        student = make_student()
        student.compile("sgd", loss=from_logits_loss(EPSILONS["shared"]))
        value = student.evaluate(
            x, soft_labels, sample_weight=weight, batch_size=32, verbose=0
        )
        values = helpers.pt_loss_of_logits(
            soft_labels, student.predict(x, verbose=0), EPSILONS["shared"]
        )
        np.testing.assert_allclose(value, np.mean(values * weight), rtol=1e-4)

    def test_zero_weights_leave_the_student_alone(self, data):
        x, soft_labels = data
        student = make_student()
        before = student.get_weights()
        student.compile("sgd", loss=from_logits_loss(EPSILONS["shared"]))
        student.fit(x, soft_labels, sample_weight=np.zeros(32), verbose=0)
        for a, b in zip(before, student.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_token_level_with_mask(self):
        """(B, T, C): padded tokens count neither in the sum nor in n."""
        generator = np.random.default_rng(0)
        tokens = generator.integers(1, 7, size=(4, 6))
        tokens[:, 4:], tokens[0, 2:] = 0, 0
        teacher = generator.dirichlet(np.ones(3), (4, 6)).astype("float32")
        student = keras.Sequential(
            [
                keras.Input((6,), dtype="int32"),
                keras.layers.Embedding(7, 5, mask_zero=True),
                keras.layers.Dense(3),
            ]
        )
        student.compile("sgd", loss=from_logits_loss([1.0, 0.5]))
        value = student.evaluate(tokens, teacher, verbose=0)
        values = helpers.pt_loss_of_logits(
            teacher, student.predict(tokens, verbose=0), [1.0, 0.5]
        )
        np.testing.assert_allclose(value, values[tokens > 0].mean(), rtol=1e-4)
        assert np.isfinite(
            student.fit(tokens, teacher, verbose=0).history["loss"]
        )

    def test_mixed_precision_student(self, data):
        x, soft_labels = data
        student = keras.Sequential(
            [
                keras.Input((5,)),
                keras.layers.Dense(CLASSES, dtype="mixed_bfloat16"),
            ]
        )
        student.compile("adam", loss=from_logits_loss(EPSILONS["shared"]))
        history = student.fit(x, soft_labels, epochs=3, verbose=0).history
        assert np.all(np.isfinite(history["loss"]))

    def test_epsilon_of_other_class_count(self, data):
        x, soft_labels = data
        student = make_student()
        student.compile("sgd", loss=from_logits_loss(np.ones((3, 2))))
        with pytest.raises(ValueError, match="one row a class.*4 classes"):
            student.fit(x, soft_labels, verbose=0)


class TestSerialization:
    def test_model_with_loss_compiled(self, data, tmp_path):
        x, soft_labels = data
        student = make_student()
        student.compile(
            "sgd",
            loss=from_logits_loss(
                EPSILONS["per_class"],
                teacher_temperature=[1.0, 2.0, 0.5, 3.0],
                teacher_bias=[0.1, -0.2, 0.0, 0.3],
                dtype="float32",
            ),
        )
        student.fit(x, soft_labels, verbose=0)
        student.save(tmp_path / "student.keras")
        again = keras.models.load_model(tmp_path / "student.keras")
        assert again.loss.get_config() == student.loss.get_config()
        np.testing.assert_allclose(
            again.evaluate(x, soft_labels, verbose=0),
            student.evaluate(x, soft_labels, verbose=0),
            rtol=1e-6,
        )
        again.fit(x, soft_labels, verbose=0)

    def test_dtype_survives(self, tmp_path):
        student = make_student()
        student.compile("sgd", loss=from_logits_loss(0.5, dtype="bfloat16"))
        student.save(tmp_path / "student.keras")
        again = keras.models.load_model(tmp_path / "student.keras")
        assert again.loss.dtype == "bfloat16"


class TestKerasDistillation:
    """`keras.distillation` hands over logits / T for both arguments."""

    @pytest.fixture
    def distiller(self):
        strategy = keras.distillation.LogitsDistillation(
            temperature=3.0,
            loss=PTLoss(
                EPSILONS["shared"], from_logits=True, teacher_from_logits=True
            ),
        )
        distiller = keras.distillation.Distiller(
            teacher=make_student(seed=1),
            student=make_student(seed=2),
            distillation_losses=strategy,
            distillation_loss_weights=1.0,
            student_loss_weight=0.5,
        )
        distiller.compile(
            "sgd", loss=keras.losses.SparseCategoricalCrossentropy(True)
        )
        return distiller

    def test_value(self, rows):
        strategy = keras.distillation.LogitsDistillation(
            temperature=3.0, loss=PTLoss(EPSILONS["shared"], from_logits=True)
        )
        teacher, student = make_rows(seed=5)[1], rows[1]
        value = strategy.compute_loss(
            ops.convert_to_tensor(teacher), ops.convert_to_tensor(student)
        )
        expected = helpers.pt_loss_of_logits(
            helpers.softmax(teacher / 3.0), student / 3.0, EPSILONS["shared"]
        )
        np.testing.assert_allclose(value, expected.mean(), rtol=1e-5)

    def test_fit(self, distiller, data):
        y = np.random.default_rng(0).integers(0, CLASSES, 32)
        history = distiller.fit(data[0], y, epochs=2, verbose=0).history
        assert np.all(np.isfinite(history["total_loss"]))


class TestErrors:
    @pytest.mark.parametrize(
        "epsilon, match",
        [
            (np.nan, r"`epsilon` must be finite.*epsilon=nan"),
            ([0.1, np.inf], r"`epsilon` must be finite.*inf"),
            ([], r"`epsilon` must be of shape.*epsilon=\[\]"),
            (np.ones((1, 2, 2)), r"`epsilon` must be of shape"),
            ("half", r"`epsilon` must be numbers.*epsilon=.*'half'"),
            ([[1.0], [1.0, 2.0]], r"`epsilon` must be numbers.*1\.0.*2\.0"),
            (None, r"`epsilon` must be.*epsilon=None"),
        ],
    )
    def test_epsilon(self, epsilon, match):
        with pytest.raises(ValueError, match=match):
            PTLoss(epsilon)

    @pytest.mark.parametrize("epsilon", [np.nan, np.ones((1, 1, 3, 2))])
    def test_epsilon_of_the_function(self, epsilon):
        rows = np.full((1, 3), 1 / 3)
        with pytest.raises(ValueError, match="`epsilon` must be"):
            pt_loss(rows, rows, epsilon)

    def test_epsilon_for_other_classes(self):
        rows = np.full((1, 3), 1 / 3)
        match = r"`epsilon` must have one row a class.*\(4, 2\) with 3 classes"
        with pytest.raises(ValueError, match=match):
            pt_loss(rows, rows, np.ones((4, 2)))

    @pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, "hot", None])
    def test_teacher_temperature(self, value):
        match = f"`teacher_temperature` must be.*Received.*{value!r}"
        with pytest.raises(ValueError, match=match):
            PTLoss(0.5, teacher_temperature=value)

    @pytest.mark.parametrize("value", [np.nan, np.inf, "much"])
    def test_teacher_bias(self, value):
        match = f"`teacher_bias` must be.*Received.*{value!r}"
        with pytest.raises(ValueError, match=match):
            PTLoss(0.5, teacher_bias=value)

    @pytest.mark.parametrize(
        "argument", ["teacher_temperature", "teacher_bias"]
    )
    def test_calibration_of_other_rank(self, argument):
        with pytest.raises(ValueError, match=f"`{argument}` must be"):
            PTLoss(0.5, **{argument: np.ones((2, 2))})

    def test_class_counts_differ(self):
        match = r"`y_true` and `y_pred`.*\(1, 2\).*\(1, 3\)"
        with pytest.raises(ValueError, match=match):
            pt_loss(np.full((1, 2), 0.5), np.full((1, 3), 1 / 3), 0.5)

    def test_no_class_axis(self):
        with pytest.raises(ValueError, match="must have a class axis"):
            pt_loss(0.5, 0.5, 0.5)

    BAD_ROWS = {
        "logits": [2.0, -1.0, 0.5],
        "negative": [-0.1, 0.6, 0.5],
        "nan": [np.nan, 0.5, 0.5],
        "sum": [0.3, 0.3, 0.3],
    }

    @pytest.mark.parametrize("name", BAD_ROWS)
    def test_teacher_is_not_probabilities(self, name):
        good = np.full((1, 3), 1 / 3)
        match = r"`y_true` must hold probabilities.*teacher_from_logits=True"
        with pytest.raises(ValueError, match=match + r".*y_true\[0\]=\["):
            pt_loss([self.BAD_ROWS[name]], good, 0.5)

    @pytest.mark.parametrize("name", BAD_ROWS)
    def test_student_is_not_probabilities(self, name):
        good = np.full((1, 3), 1 / 3)
        match = r"`y_pred` must hold probabilities.* from_logits=True"
        with pytest.raises(ValueError, match=match + r".*y_pred\[0\]=\["):
            pt_loss(good, [self.BAD_ROWS[name]], 0.5)

    def test_bad_row_is_named(self):
        rows = np.full((4, 2), 0.5)
        bad = rows.copy()
        bad[2] = [0.9, 0.9]
        match = r"y_true\[2\]=\[0\.9 0\.9\].*1\.8 \(1 of 4 rows"
        with pytest.raises(ValueError, match=match):
            pt_loss(bad, rows, 0.5)


def test_masked_classes():
    """A logit of -inf, where the teacher has 0, does not count."""
    teacher = np.array([[0.6, 0.0, 0.4]], "float32")
    logits = np.array([[1.0, -np.inf, 0.0]], "float32")
    value = pt_loss(
        teacher, logits, [0.5, 0.1], from_logits=True, teacher_from_logits=False
    )
    two = pt_loss(
        teacher[:, [0, 2]],
        logits[:, [0, 2]],
        [0.5, 0.1],
        from_logits=True,
        teacher_from_logits=False,
    )
    np.testing.assert_allclose(value, two, rtol=1e-6)


def test_ranks_that_would_broadcast():
    rows = np.full((3, 3), 1 / 3, "float32")
    with pytest.raises(ValueError, match=r"same shape.*\(1, 3, 3\)"):
        pt_loss(rows, rows[None], 0.5)


def test_batches_of_other_sizes():
    rows = np.full((5, 3), 1 / 3, "float32")
    for fewer in (2, 1):
        with pytest.raises(ValueError, match="same shape.*5, 3"):
            pt_loss(rows, rows[:fewer], 0.5)
