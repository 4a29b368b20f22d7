"""What users of other tools reported, tried here: OUTSIDE_CASES.md.

The right values are from NumPy (`helpers`), written out, or Keras alone.
"""

import copy
import pickle

import helpers
import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_ptloss import Distiller, ProxyTeacherSearch, PTLoss, pt_loss
from keras_ptloss.metrics import ExpectedCalibrationError, KLToTeacher

EPSILON = [0.5, 0.1]


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def make_distiller(*, learning_rate=0.1, spe=1, **arguments):
    distiller = Distiller(
        helpers.linear_model(3, seed=1), helpers.linear_model(3, seed=2)
    )
    distiller.compile(
        keras.optimizers.SGD(learning_rate, **arguments),
        loss=PTLoss(EPSILON, from_logits=True),
        steps_per_execution=spe,
    )
    return distiller


class TestSuppressedTokens:
    """Classes at -inf in teacher and student: as if they were not there."""

    kept, hidden = [0, 2, 3, 5], [1, 4]

    @pytest.fixture
    def logits(self):
        teacher, student = rows(4, 6), rows(4, 6, seed=1)
        teacher[:, self.hidden] = student[:, self.hidden] = -np.inf
        return teacher, student

    @pytest.mark.parametrize("side", [0, 1])
    def test_loss_and_gradients(self, logits, side):
        def loss(teacher, student):
            return pt_loss(teacher, student, EPSILON, from_logits=True)

        teacher, student = (side[:, self.kept] for side in logits)
        np.testing.assert_allclose(
            loss(*logits),
            helpers.pt_loss_of_logits(
                helpers.softmax(teacher), student, EPSILON
            ),
            rtol=1e-5,
        )
        gradient = helpers.gradient_of(loss, *logits, argument=side)
        assert np.all(np.isfinite(gradient))
        np.testing.assert_array_equal(gradient[:, self.hidden], 0.0)

    @pytest.mark.parametrize(
        "calibration",
        [
            {"teacher_temperature": 2.5},
            {"teacher_scale": np.linspace(0.5, 2.0, 6)},
            {"teacher_bias": np.linspace(-1.0, 3.0, 6)},
            {
                "teacher_scale": np.linspace(2.0, 0.25, 6),
                "teacher_bias": np.linspace(1.0, -2.0, 6),
            },
        ],
        ids=lambda calibration: "+".join(calibration),
    )
    def test_calibration(self, logits, calibration):
        """As that of the four classes alone; a number of one class is its."""

        def loss(teacher, student):
            return pt_loss(
                teacher, student, EPSILON, from_logits=True, **calibration
            )

        scale = calibration.get("teacher_scale", np.ones(6))
        scale = scale / calibration.get("teacher_temperature", 1.0)
        z = scale * logits[0] + calibration.get("teacher_bias", 0.0)
        expected = helpers.pt_loss_of_logits(
            helpers.softmax(z[:, self.kept]), logits[1][:, self.kept], EPSILON
        )
        for outputs in (logits[0], ops.convert_to_tensor(logits[0])):
            got = loss(outputs, logits[1])
            np.testing.assert_allclose(got, expected, rtol=1e-5)
        for side in (0, 1):
            gradient = helpers.gradient_of(loss, *logits, argument=side)
            assert np.all(np.isfinite(gradient))
            np.testing.assert_array_equal(gradient[:, self.hidden], 0.0)

    def test_metric(self, logits):
        metric = KLToTeacher(from_logits=True)
        metric.update_state(*logits)
        teacher, student = (side[:, self.kept] for side in logits)
        expected = helpers.pt_loss_of_logits(
            helpers.softmax(teacher), student, 0.0
        )
        np.testing.assert_allclose(metric.result(), expected.mean(), rtol=1e-5)

    def test_matrix(self, logits):
        """As the probabilities 0 that they are, held at Keras's epsilon."""
        teacher, student = logits[0], rows(4, 6, seed=1)
        matrix = 0.5 * np.eye(6) + 0.05
        z = np.where(
            np.isinf(teacher),
            teacher.max(-1, keepdims=True) + np.log(keras.config.epsilon()),
            teacher,
        )
        expected = helpers.pt_loss_of_logits(
            helpers.softmax(z @ matrix.T), student, EPSILON
        )
        for outputs in (teacher, ops.convert_to_tensor(teacher)):
            got = pt_loss(
                outputs,
                student,
                EPSILON,
                from_logits=True,
                teacher_scale=matrix,
            )
            np.testing.assert_allclose(got, expected, rtol=1e-4)


class TestPadding:
    """Rows at weight 0 hold what padding holds, and count for nothing."""

    @pytest.mark.parametrize("padding", [-np.inf, np.nan, -100.0])
    @pytest.mark.parametrize("teacher_from_logits", [True, False])
    @pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean"])
    def test_loss(self, padding, teacher_from_logits, reduction):
        """Eagerly too, where rows that are no probabilities are refused."""
        teacher, student = helpers.dirichlet(0, 8, 3), rows(8, 3)
        outputs = np.log(teacher) if teacher_from_logits else teacher.copy()
        outputs[4:] = padding
        weight = np.repeat([1.0, 0.0], 4)
        loss = PTLoss(
            EPSILON,
            from_logits=True,
            teacher_from_logits=teacher_from_logits,
            reduction=reduction,
        )
        expected = helpers.pt_loss_of_logits(teacher, student, EPSILON)
        np.testing.assert_allclose(
            loss(outputs, student, sample_weight=weight),
            (weight * expected).mean(),
            rtol=1e-5,
        )

    def test_student_learns_from_the_rest(self):
        """Tokens: weights `(batch, time)`."""
        x, teacher = rows(4, 6, 5), rows(4, 6, 3, seed=1)
        weight = np.ones((4, 6), "float32")
        weight[:, 4:] = 0.0
        padded = np.where(weight[..., None] == 0, -np.inf, teacher)
        found = []
        for outputs in (teacher, padded):
            student = keras.Sequential(
                [
                    keras.Input((6, 5)),
                    layers.Dense(3, kernel_initializer="ones"),
                ]
            )
            student.compile("sgd", PTLoss(EPSILON, from_logits=True))
            student.fit(x, outputs, sample_weight=weight, verbose=0)
            found.append(student.get_weights())
        for whole, with_padding in zip(*found, strict=True):
            np.testing.assert_allclose(whole, with_padding, atol=1e-6)

    @pytest.mark.parametrize(
        "reduction", ["sum_over_batch_size", "mean_with_sample_weight"]
    )
    def test_batch_of_padding_alone(self, reduction):
        x, teacher = rows(32, 5), helpers.dirichlet(0, 32, 3)
        weight = np.repeat([1.0, 0.0], 16).astype("float32")
        student = helpers.linear_model(3)
        student.compile(
            keras.optimizers.SGD(0.1),
            PTLoss(
                EPSILON,
                from_logits=True,
                teacher_from_logits=False,
                reduction=reduction,
            ),
        )
        before = student.get_weights()
        padding = (x[16:], teacher[16:], weight[16:])
        loss = student.train_on_batch(*padding)
        assert np.ravel(loss)[0] == 0.0
        for old, new in zip(before, student.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)
        history = student.fit(
            x,
            teacher,
            sample_weight=weight,
            batch_size=16,
            validation_data=padding,
            verbose=0,
        ).history
        assert history["val_loss"] == [0.0]
        assert np.isfinite(history["loss"][0])


class TestCalibrationError:
    @pytest.mark.parametrize(
        ("labels", "probabilities", "expected"),
        [
            # One bin, of confidence .975 and accuracy 1/2.
            ([1, 0], [[0.05, 0.95], [0.0, 1.0]], 0.475),
            ([1, 0], [[0.0, 1.0], [1.0, 0.0]], 0.0),
            ([0, 1], [[0.0, 1.0], [1.0, 0.0]], 1.0),
            # The second class never occurs.
            ([0, 0], [[0.95, 0.05], [0.85, 0.15]], 0.1),
        ],
    )
    def test_certain_predictions_and_absent_classes(
        self, labels, probabilities, expected
    ):
        metric = ExpectedCalibrationError(num_bins=10)
        metric.update_state(np.array(labels), np.array(probabilities))
        np.testing.assert_allclose(metric.result(), expected, atol=1e-6)


class TestHalfPrecision:
    @pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
    def test_logits_that_overflow(self, temperature):
        """In float16, 300 / .01 and sums of 60,000 are infinite."""
        student = np.full((2, 4), 6e4, "float16")
        student[:, 1] = -6e4
        teacher = np.full((2, 4), 300.0, "float16")
        teacher[:, 2] = -300.0

        def loss(teacher, student):
            return pt_loss(
                teacher,
                student,
                EPSILON,
                from_logits=True,
                teacher_temperature=temperature,
            )

        expected = helpers.pt_loss_of_logits(
            helpers.softmax(teacher.astype("float64") / temperature),
            student,
            EPSILON,
        )
        np.testing.assert_allclose(loss(teacher, student), expected, rtol=1e-5)
        gradient = helpers.gradient_of(loss, teacher, student, argument=1)
        assert np.all(np.isfinite(gradient))

    def test_no_distance_to_itself_over_a_vocabulary(self):
        """Compiled, where XLA may round one side and not the other."""
        logits = ops.cast(20 * rows(2, 150_000), "bfloat16")
        function = helpers.compiled(
            lambda one, two: pt_loss(one, two, 0.0, from_logits=True)
        )
        distance = ops.convert_to_numpy(function(logits, logits))
        np.testing.assert_allclose(distance, 0.0, atol=1e-5)

    def test_rows_whose_sum_is_rounded(self):
        """1,000 probabilities in float16 are off by some 2e-4."""
        exact = helpers.dirichlet(0, 64, 1000, concentration=0.01)
        student = rows(64, 1000)
        stored = exact.astype("float16")
        assert np.abs(stored.astype("float64").sum(-1) - 1.0).max() > 1e-4
        loss = PTLoss(EPSILON, from_logits=True, teacher_from_logits=False)
        expected = helpers.pt_loss_of_logits(exact, student, EPSILON).mean()
        np.testing.assert_allclose(loss(stored, student), expected, rtol=1e-3)


class TestScaleOfTheLoss:
    def test_temperature_needs_no_square(self):
        """It is the teacher's alone: the gradient stays `p - t`."""
        teacher, student = 3 * rows(4, 5), rows(4, 5, seed=1)
        gradient = helpers.gradient_of(
            lambda one, two: pt_loss(
                one, two, 0.0, from_logits=True, teacher_temperature=4.0
            ),
            teacher,
            student,
            argument=1,
        )
        np.testing.assert_allclose(
            gradient,
            helpers.softmax(student) - helpers.softmax(teacher / 4.0),
            atol=1e-6,
        )

    def test_classes_are_summed(self):
        """Classes that neither side ever gives change nothing."""
        teacher, student = (
            helpers.dirichlet(0, 8, 5),
            helpers.dirichlet(1, 8, 5),
        )
        wide = [np.pad(side, ((0, 0), (0, 95))) for side in (teacher, student)]
        expected = helpers.pt_loss(teacher, student, EPSILON).mean()
        np.testing.assert_allclose(PTLoss(EPSILON)(*wide), expected, rtol=1e-5)


class TestDistillerInKeras:
    def test_accumulated_gradients(self):
        """Four batches of 4, one step: the step of their 16 rows."""
        x, found = rows(64, 5), []
        for batch_size, steps in ((16, None), (4, 4)):
            distiller = make_distiller(gradient_accumulation_steps=steps)
            distiller.fit(
                x, batch_size=batch_size, epochs=2, shuffle=False, verbose=0
            )
            found.append(distiller.student.get_weights())
        for whole, accumulated in zip(*found, strict=True):
            np.testing.assert_allclose(whole, accumulated, atol=1e-6)

    @pytest.mark.parametrize("steps_per_execution", [1, 3])
    def test_epoch_loss_counts_every_row_once(self, steps_per_execution):
        """40 rows in batches of 16, 16 and 8: not the last batch's mean."""
        x = rows(40, 5)
        distiller = make_distiller(learning_rate=0.0, spe=steps_per_execution)
        history = distiller.fit(x, batch_size=16, verbose=0).history
        logs = distiller.evaluate(x, batch_size=16, verbose=0, return_dict=True)
        expected = helpers.pt_loss_of_logits(
            helpers.softmax(distiller.teacher.predict(x, verbose=0)),
            distiller.student.predict(x, verbose=0),
            EPSILON,
        ).mean()
        np.testing.assert_allclose(history["loss"], [expected], rtol=1e-5)
        np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)

    @pytest.mark.parametrize(
        "copied",
        [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
        ids=["deepcopy", "pickle"],
    )
    def test_copies(self, copied):
        """As a loaded distiller: without a teacher, and compiled."""
        x, distiller = rows(32, 5), make_distiller()
        distiller.fit(x, verbose=0)
        outputs = distiller.predict(x, verbose=0)
        other = copied(distiller)
        np.testing.assert_array_equal(other.predict(x, verbose=0), outputs)
        other.teacher = distiller.teacher
        other.fit(x, epochs=2, verbose=0)
        assert np.abs(other.predict(x, verbose=0) - outputs).max() > 1e-4
        np.testing.assert_array_equal(distiller.predict(x, verbose=0), outputs)


def test_search_takes_rows_by_position():
    """Whatever their index in pandas, and however small their integers."""
    pandas = pytest.importorskip("pandas")
    truth = helpers.dirichlet(0, 120, 3)
    teacher, labels = (
        helpers.skewed(truth, [1.0, 0.3, 0.1]),
        helpers.draw_labels(truth, 1),
    )
    order = np.random.default_rng(0).permutation(120)
    search = ProxyTeacherSearch("gradient", objective="nll")
    expected = search.search(teacher, labels)
    for outputs, classes in (
        (pandas.DataFrame(teacher, index=order), pandas.Series(labels)),
        (teacher, pandas.Series(labels, index=order)),
        (teacher, labels.astype("uint8")),
    ):
        assert search.search(outputs, classes).score == expected.score
