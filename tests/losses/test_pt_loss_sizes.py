"""pt_loss at the sizes where the compiled program changes its form."""

import helpers
import numpy as np
import pytest
import scipy.special

from keras_ptloss import pt_loss

# Fewer than 1,000 values, fewer than 4,096, more; rows of 40 classes or more.
SHAPES = [(5, 3), (300, 7), (45, 40), (60, 90)]
TEMPERATURE = 1.7


def draw(rows, classes, order, per_class):
    """Logits of teacher and student, coefficients."""
    generator = np.random.default_rng(rows + classes + order)
    logits = 3.0 * generator.normal(size=(2, rows, classes))
    low = -1.0 / np.arange(1, order + 1)
    shape = (classes, order) if per_class else (order,)
    return *logits.astype("float32"), generator.uniform(low, 5.0, size=shape)


def written_out(teacher, logits, epsilon):
    """Value, and derivatives by teacher and logits, in float64."""
    epsilon = np.broadcast_to(epsilon, (logits.shape[1], np.shape(epsilon)[-1]))
    powers = np.arange(1, epsilon.shape[1] + 1)
    log_p = scipy.special.log_softmax(logits.astype("float64"), axis=1)
    p = np.exp(log_p)
    s = -np.expm1(log_p)[..., None]
    terms = np.sum(epsilon * s**powers, axis=-1) - log_p
    slope = np.sum(epsilon * powers * s ** (powers - 1), axis=-1)
    log_t = np.log(teacher)
    w = teacher * (1.0 + p * slope)
    return (
        np.sum(teacher * (log_t + terms), axis=1),
        log_t + 1.0 + terms,
        p * w.sum(axis=1, keepdims=True) - w,
    )


def assert_near(found, wanted):
    scale = np.max(np.abs(wanted))
    np.testing.assert_allclose(found, wanted, atol=5e-6 * scale, rtol=5e-6)


@pytest.mark.newest
@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("order", [1, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
class TestSizes:
    def test_probabilities(self, shape, order, per_class):
        outputs, logits, epsilon = draw(*shape, order, per_class)
        teacher = scipy.special.softmax(outputs, axis=1)
        # Rows that sum to 1 as float16 would have it are taken as they are.
        teacher = teacher * np.linspace(0.995, 1.0, len(teacher))[:, None]
        teacher = teacher.astype("float32")

        def loss(teacher, logits):
            return pt_loss(
                teacher,
                logits,
                epsilon,
                from_logits=True,
                teacher_from_logits=False,
            )

        value, by_teacher, by_logits = written_out(
            teacher.astype("float64"), logits, epsilon
        )
        assert_near(helpers.compiled(loss)(teacher, logits), value)
        found = helpers.gradient_of(loss, teacher, logits, argument=1)
        assert_near(found, by_logits)
        found = helpers.gradient_of(loss, teacher, logits, argument=0)
        assert_near(found, by_teacher)

    def test_calibrated_logits(self, shape, order, per_class):
        outputs, logits, epsilon = draw(*shape, order, per_class)

        def loss(outputs, logits):
            return pt_loss(
                outputs,
                logits,
                epsilon,
                from_logits=True,
                teacher_temperature=TEMPERATURE,
            )

        teacher = scipy.special.softmax(
            outputs.astype("float64") / TEMPERATURE, axis=1
        )
        value, by_teacher, by_logits = written_out(teacher, logits, epsilon)
        mean = np.sum(teacher * by_teacher, axis=1, keepdims=True)
        by_outputs = teacher * (by_teacher - mean) / TEMPERATURE
        assert_near(helpers.compiled(loss)(outputs, logits), value)
        found = helpers.gradient_of(loss, outputs, logits, argument=1)
        assert_near(found, by_logits)
        found = helpers.gradient_of(loss, outputs, logits, argument=0)
        assert_near(found, by_outputs)
