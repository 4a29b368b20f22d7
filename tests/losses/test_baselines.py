"""The paper's other losses and teachers, against NumPy, Keras and Optax."""

import functools

import helpers
import keras
import numpy as np
import pytest
import scipy.special
from keras import ops

from keras_ptloss import Distiller, PTLoss
from keras_ptloss.losses import (
    Flooding,
    FocalLoss,
    LabelPerturbedLoss,
    LabelSmoothingLoss,
    focal_epsilon,
    label_smoothing_epsilon,
)

CLASSES = 4
WEIGHT = np.array([0.0, 1.0, 2.0, 0.5, 1.0, 3.0], "float32")


def kl(target, log_p):
    cross_entropy = -np.sum(target * log_p, axis=-1)
    return cross_entropy + scipy.special.xlogy(target, target).sum(axis=-1)


def numpy_label_smoothing(teacher, log_p):
    return kl(0.8 * teacher + 0.2 / teacher.shape[-1], log_p)


def numpy_focal(teacher, log_p):
    return -np.sum(teacher * (1 - np.exp(log_p)) ** 1.5 * log_p, axis=-1)


def numpy_label_perturbed(y_true, log_p):
    teacher, label = y_true[..., 0, :], y_true[..., 1, :]
    p_label = np.sum(label * np.exp(log_p), axis=-1)
    return kl(teacher, log_p) + 0.3 * (1 - p_label)


LOSSES = {
    "label_smoothing": (LabelSmoothingLoss, 0.2, numpy_label_smoothing),
    "focal": (FocalLoss, 1.5, numpy_focal),
    "label_perturbed": (LabelPerturbedLoss, 0.3, numpy_label_perturbed),
}


@pytest.fixture(params=LOSSES, ids=LOSSES.keys())
def case(request):
    return Case(request.param)


class Case:
    """A loss, its reference in float64, and rows for both."""

    def __init__(self, name):
        self.loss, self.number, self.reference = LOSSES[name]
        generator = np.random.default_rng(0)
        logits = 2.0 * generator.normal(size=(6, CLASSES))
        self.logits = logits.astype("float32")
        self.stacked = name == "label_perturbed"
        self.labels = np.eye(CLASSES, dtype="float32")[[0, 1, 2, 3, 1, 1]]
        self.teacher_logits = self.logits[::-1].copy()
        teacher = helpers.softmax(self.teacher_logits).astype("float32")
        self.y_true = self.with_labels(teacher)

    def with_labels(self, teacher):
        """Return what the loss takes for `y_true`."""
        labels = self.labels[np.arange(len(teacher)) % 6]
        if not self.stacked:
            return teacher
        return np.stack([teacher, labels], axis=-2)

    def build(self, **arguments):
        arguments.setdefault("from_logits", True)
        arguments.setdefault("teacher_from_logits", False)
        return self.loss(self.number, **arguments)

    def values(self, y_true, logits):
        """Return the reference's values, one a row."""
        log_p = scipy.special.log_softmax(
            np.asarray(logits, "float64"), axis=-1
        )
        return self.reference(np.asarray(y_true, "float64"), log_p)

    @property
    def expected(self):
        return self.values(self.y_true, self.logits)


class TestConfig:
    @pytest.mark.parametrize("from_logits", [False, True])
    def test_defaults(self, case, from_logits):
        loss = case.loss(case.number, from_logits=from_logits)
        assert loss.reduction == "sum_over_batch_size"
        assert loss.teacher_from_logits is from_logits

    def test_round_trip(self, case):
        loss = case.build(reduction="sum", name="mine", dtype="float16")
        serialized = keras.saving.serialize_keras_object(loss)
        assert serialized["registered_name"].startswith("keras_ptloss>")
        again = keras.saving.deserialize_keras_object(serialized)
        assert type(again) is case.loss
        assert again.get_config() == loss.get_config()
        assert again.dtype == "float16"

    @pytest.mark.parametrize(
        "loss, argument, value, match",
        [
            (LabelSmoothingLoss, "delta", -0.1, "at least 0"),
            (LabelSmoothingLoss, "delta", 1.1, "at most 1"),
            (LabelSmoothingLoss, "delta", "much", "a number"),
            (FocalLoss, "gamma", -1.0, "at least 0"),
            (FocalLoss, "gamma", np.nan, "finite"),
            (LabelPerturbedLoss, "epsilon", -1.5, "at least -1"),
            (LabelPerturbedLoss, "epsilon", [0.1, 0.2], "a finite number"),
        ],
    )
    def test_errors(self, loss, argument, value, match):
        with pytest.raises(
            ValueError, match=f"`{argument}`.*{match}.*Received: {argument}="
        ):
            loss(value)


class TestValue:
    def test_unweighted(self, case):
        value = case.build()(case.y_true, case.logits)
        np.testing.assert_allclose(value, case.expected.mean(), rtol=1e-5)

    def test_student_probabilities(self, case):
        student = helpers.softmax(case.logits).astype("float32")
        value = case.build(from_logits=False)(case.y_true, student)
        np.testing.assert_allclose(value, case.expected.mean(), rtol=1e-5)

    def test_teacher_logits(self, case):
        y_true = case.with_labels(case.teacher_logits)
        value = case.build(teacher_from_logits=True)(y_true, case.logits)
        np.testing.assert_allclose(value, case.expected.mean(), rtol=1e-5)

    def test_sample_weighted(self, case):
        value = case.build()(case.y_true, case.logits, sample_weight=WEIGHT)
        expected = np.mean(case.expected * WEIGHT)
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    def test_zero_weighted(self, case):
        value = case.build()(
            case.y_true, case.logits, sample_weight=np.zeros(6, "float32")
        )
        assert float(value) == 0.0

    def test_no_reduction(self, case):
        value = case.build(reduction=None)(case.y_true, case.logits)
        np.testing.assert_allclose(value, case.expected, rtol=1e-5, atol=1e-6)

    def test_leading_axes(self, case):
        """Tokens: `(B, T, C)`, or `(B, T, 2, C)`."""
        value = case.build(reduction=None)(
            case.y_true.reshape(2, 3, *case.y_true.shape[1:]),
            case.logits.reshape(2, 3, CLASSES),
        )
        expected = case.expected.reshape(2, 3)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)

    def test_jit(self, case):
        value = helpers.compiled(case.build())(case.y_true, case.logits)
        np.testing.assert_allclose(value, case.expected.mean(), rtol=1e-5)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_dtype(self, case, dtype):
        value = case.build(dtype=dtype)(case.y_true, case.logits)
        assert keras.backend.standardize_dtype(value.dtype) == dtype
        np.testing.assert_allclose(
            float(ops.cast(value, "float32")), case.expected.mean(), rtol=2e-2
        )

    def test_float64_teacher(self, case):
        value = case.build().call(
            np.asarray(case.y_true, "float64"), ops.cast(case.logits, "float16")
        )
        np.testing.assert_allclose(value, case.expected, rtol=2e-2, atol=1e-2)


class TestGradient:
    def test_against_differences(self, case):
        loss = case.build(reduction="sum")
        gradient = helpers.gradient_of(
            lambda z: loss(case.y_true, z), case.logits
        )
        expected = helpers.numerical_gradient(
            lambda z: case.values(case.y_true, z).sum(), case.logits
        )
        np.testing.assert_allclose(gradient, expected, atol=1e-5)

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("from_logits", [False, True])
    def test_certain_students(self, case, from_logits, dtype):
        """Logits of +-1e4, probabilities of 0 and 1, one-hot teachers."""
        one_hot = np.eye(CLASSES, dtype="float32")
        y_true = case.with_labels(one_hot)
        student = np.roll(one_hot, 1, axis=0)
        student[0] = one_hot[0]
        if from_logits:
            student = 1e4 * (2.0 * student - 1.0)
        student = ops.cast(student, dtype)
        loss = case.build(reduction=None, from_logits=from_logits)
        assert np.all(np.isfinite(ops.convert_to_numpy(loss(y_true, student))))
        gradient = helpers.gradient_of(lambda z: loss(y_true, z), student)
        assert np.all(np.isfinite(gradient))

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
    def test_focal_of_a_right_and_certain_student(self, gamma):
        loss = FocalLoss(gamma, from_logits=True, teacher_from_logits=False)
        logits = np.array([[200.0, 0.0, 0.0]], "float32")
        teacher = np.array([[1.0, 0.0, 0.0]], "float32")
        np.testing.assert_array_equal(loss(teacher, logits), 0.0)
        gradient = helpers.gradient_of(lambda z: loss(teacher, z), logits)
        np.testing.assert_array_equal(gradient, 0.0)


def test_masked_classes(case):
    """A logit of -inf, where teacher and label have 0, does not count."""
    if case.loss is LabelSmoothingLoss:
        pytest.skip("every class has a share")
    y_true, logits = case.y_true[:3].copy(), case.logits[:3].copy()
    y_true[..., 3], logits[:, 3] = 0.0, -np.inf
    y_true /= y_true.sum(axis=-1, keepdims=True)
    value = case.build(reduction=None)(y_true, logits)
    expected = case.values(y_true[..., :3], logits[:, :3])
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


class TestErrors:
    def test_rows_that_are_not_probabilities(self, case):
        student = helpers.softmax(case.logits).astype("float32")
        logits = case.with_labels(case.teacher_logits)
        loss = case.build(from_logits=False)
        with pytest.raises(
            ValueError, match="`y_true` must hold.*teacher_from_logits"
        ):
            loss(logits, student)
        with pytest.raises(ValueError, match="`y_pred` must hold.*from_logits"):
            loss(case.y_true, case.logits)

    def test_class_counts_differ(self, case):
        with pytest.raises(ValueError, match="same number of classes"):
            case.build()(case.y_true, case.logits[:, :3])

    def test_no_label_in_y_true(self, case):
        if not case.stacked:
            pytest.skip("takes the teacher alone")
        loss = case.build()
        for y_true in (case.y_true[:, 0], np.repeat(case.y_true, 2, axis=1)):
            with pytest.raises(
                ValueError, match=r"`y_true`.*np.stack.*Received: y_true of"
            ):
                loss(y_true, case.logits)

    @pytest.mark.parametrize(
        "label",
        [[0, 0, 0, 0], [0, 5, 0, 0], [0, 1, 1, 0], [0.1, 0.7, 0.1, 0.1]],
    )
    def test_no_label_in_the_second_row(self, label):
        """Seen where it counts: at weight 0 there may be anything."""
        case = Case("label_perturbed")
        y_true = case.y_true.copy()
        y_true[2, 1] = label
        with pytest.raises(
            ValueError, match=r"`y_true`.*one-hot.*y_true\[2, 1\]=.*1 of 6"
        ):
            case.build()(y_true, case.logits)
        weight = np.array([1, 1, 0, 1, 1, 1], "float32")
        value = case.build()(y_true, case.logits, sample_weight=weight)
        expected = np.mean(case.expected * weight)
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    def test_rows_in_the_other_order(self):
        case = Case("label_perturbed")
        with pytest.raises(ValueError, match="`y_true`.*one-hot.*6 of 6"):
            case.build()(case.y_true[:, ::-1], case.logits)


class TestConventions:
    """What each loss is, by losses that others wrote."""

    @pytest.fixture
    def rows(self):
        case = Case("focal")
        student = helpers.softmax(case.logits).astype("float32")
        return case.y_true, student

    @pytest.mark.parametrize("delta", [0.0, 0.1, 1.0])
    def test_label_smoothing_is_kerass_up_to_entropy(self, rows, delta):
        teacher, student = rows
        ours = LabelSmoothingLoss(delta, reduction=None)(teacher, student)
        kerass = keras.losses.CategoricalCrossentropy(
            label_smoothing=delta, reduction=None
        )(teacher, student)
        target = (1 - delta) * teacher + delta / CLASSES
        entropy = scipy.special.entr(target).sum(axis=-1)
        ours = ops.convert_to_numpy(ours)
        np.testing.assert_allclose(ours + entropy, kerass, rtol=1e-5)

    def test_label_smoothing_is_pt_loss_in_the_limit(self):
        teacher = np.array([[0.7, 0.2, 0.1]])
        logits = np.array([[0.5, 0.2, 0.0]], "float32")
        epsilon = label_smoothing_epsilon(teacher, 0.1, order=200)[0]
        gradients = [
            helpers.gradient_of(lambda z, loss=loss: loss(teacher, z), logits)
            for loss in (
                LabelSmoothingLoss(
                    0.1, from_logits=True, teacher_from_logits=False
                ),
                PTLoss(epsilon, from_logits=True, teacher_from_logits=False),
            )
        ]
        np.testing.assert_allclose(*gradients, atol=1e-5)

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
    def test_focal_is_kerass(self, rows, gamma):
        """On one-hot teachers, and on soft ones."""
        one_hot = np.eye(CLASSES, dtype="float32")[[0, 1, 2, 3, 0, 1]]
        for teacher in (one_hot, rows[0]):
            np.testing.assert_allclose(
                FocalLoss(gamma, reduction=None)(teacher, rows[1]),
                keras.losses.CategoricalFocalCrossentropy(
                    alpha=1.0, gamma=gamma, reduction=None
                )(teacher, rows[1]),
                rtol=1e-4,
                atol=1e-6,
            )

    @pytest.mark.parametrize("gamma", [0, 1, 2])
    def test_focal_is_pt_loss_in_the_limit(self, gamma):
        """The gradient is the same; the value less the teacher's entropy."""
        teacher = np.array([[0.7, 0.2, 0.1]])
        logits = np.array([[0.5, 0.2, 0.0]], "float32")
        settings = {"from_logits": True, "teacher_from_logits": False}
        focal = FocalLoss(gamma, **settings)
        perturbed = PTLoss(focal_epsilon(gamma, order=200), **settings)
        np.testing.assert_allclose(
            *(
                helpers.gradient_of(lambda z, f=f: f(teacher, z), logits)
                for f in (focal, perturbed)
            ),
            atol=1e-5,
        )
        entropy = scipy.special.entr(teacher).sum()
        np.testing.assert_allclose(
            focal(teacher, logits),
            perturbed(teacher, logits) + entropy,
            atol=1e-4,
        )

    def test_focal_gamma_zero_is_crossentropy(self, rows):
        np.testing.assert_allclose(
            FocalLoss(0.0)(*rows),
            keras.losses.CategoricalCrossentropy()(*rows),
            rtol=1e-5,
        )

    def test_label_perturbed_is_optax_poly_loss_of_labels(self):
        optax = pytest.importorskip("optax")
        case = Case("label_perturbed")
        y_true = np.stack([case.labels, case.labels], axis=-2)
        np.testing.assert_allclose(
            case.build(reduction=None)(y_true, case.logits),
            optax.losses.poly_loss_cross_entropy(
                case.logits, case.labels, epsilon=0.3
            ),
            rtol=1e-5,
        )

    def test_label_perturbed_is_not_eq_7(self):
        """Where the teacher differs from the label."""
        case = Case("label_perturbed")
        eq_7 = PTLoss(0.3, from_logits=True, teacher_from_logits=False)
        ours = float(case.build()(case.y_true, case.logits))
        theirs = float(eq_7(case.y_true[:, 0], case.logits))
        assert abs(ours - theirs) > 1e-3

    def test_one_hot_labels(self, rows):
        """OHT: PTLoss(0) of one-hot labels is the crossentropy of labels."""
        labels = np.array([0, 3, 2, 1, 0, 1])
        np.testing.assert_allclose(
            PTLoss(0.0)(keras.utils.to_categorical(labels, CLASSES), rows[1]),
            keras.losses.SparseCategoricalCrossentropy()(labels, rows[1]),
            rtol=1e-5,
        )


make_model = functools.partial(helpers.linear_model, CLASSES)


@pytest.fixture
def data():
    return helpers.soft_labelled(CLASSES)


class TestModel:
    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_model_fit(self, case, data, jit_compile):
        x, soft_labels = data
        y_true = case.with_labels(soft_labels)
        student = make_model()
        student.compile(
            keras.optimizers.Adam(0.05),
            loss=case.build(),
            jit_compile=helpers.jit(jit_compile),
        )
        losses = student.fit(x, y_true, epochs=8, verbose=0).history["loss"]
        assert losses[-1] < losses[0]
        np.testing.assert_allclose(
            student.evaluate(x, y_true, verbose=0),
            case.values(y_true, student.predict(x, verbose=0)).mean(),
            rtol=1e-5,
        )

    def test_live_teacher(self, case, data):
        if case.stacked:
            pytest.skip("needs labels beside the teacher")
        teacher = make_model(seed=3, activation="softmax")
        distiller = Distiller(make_model(), teacher)
        distiller.compile("sgd", loss=case.build())
        value = distiller.evaluate(data[0], verbose=0, return_dict=True)["loss"]
        expected = case.values(
            teacher.predict(data[0], verbose=0),
            distiller.student.predict(data[0], verbose=0),
        )
        np.testing.assert_allclose(value, expected.mean(), rtol=1e-5)

    @pytest.mark.parametrize("flooded", [False, True])
    def test_serialization(self, case, data, tmp_path, flooded):
        x, soft_labels = data
        y_true = case.with_labels(soft_labels)
        loss = case.build()
        student = make_model()
        student.compile("sgd", loss=Flooding(loss, 0.3) if flooded else loss)
        student.fit(x, y_true, verbose=0)
        student.save(tmp_path / "student.keras")
        again = keras.saving.load_model(tmp_path / "student.keras")
        assert again.loss.get_config() == student.loss.get_config()
        np.testing.assert_allclose(
            again.evaluate(x, y_true, verbose=0),
            student.evaluate(x, y_true, verbose=0),
            rtol=1e-6,
        )
        again.fit(x, y_true, verbose=0)


class Recorder(keras.callbacks.Callback):
    """Keeps the weights of every epoch's end."""

    def on_train_begin(self, logs=None):
        self.weights = []

    def on_epoch_end(self, epoch, logs=None):
        self.weights.append(self.model.get_weights())


class TestRecipes:
    """The module's docstring: what needs no class."""

    def test_early_stopped_teacher(self, data):
        """ESKD: the weights of the best epoch, though no epoch is left out."""
        x, soft_labels = data
        labels = soft_labels.argmax(axis=1)
        recorder = Recorder()
        teacher = make_model()
        teacher.compile(
            keras.optimizers.SGD(3.0),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        history = teacher.fit(
            x[:16],
            labels[:16],
            validation_data=(x[16:], labels[16:]),
            epochs=6,
            callbacks=[
                recorder,
                keras.callbacks.EarlyStopping(
                    "val_accuracy", patience=6, restore_best_weights=True
                ),
            ],
            verbose=0,
        ).history["val_accuracy"]
        best = int(np.argmax(history))
        assert len(history) == 6 and best < 5
        for a, b in zip(
            teacher.get_weights(), recorder.weights[best], strict=True
        ):
            np.testing.assert_array_equal(a, b)

    def test_teacher_free_self_distillation(self, data):
        """Tf-KD_self: the student learns from a copy of itself and labels."""
        x, soft_labels = data
        labels = soft_labels.argmax(axis=1)
        crossentropy = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True
        )
        teacher = make_model()
        teacher.compile(keras.optimizers.Adam(0.05), crossentropy)
        teacher.fit(x, labels, epochs=10, verbose=0)
        pretrained = teacher.get_weights()

        student = keras.models.clone_model(teacher)
        distiller = Distiller(
            student,
            teacher,
            hard_label_loss=crossentropy,
            hard_label_weight=0.1,
        )
        distiller.compile(
            keras.optimizers.Adam(0.05),
            loss=PTLoss(0.0, from_logits=True, teacher_temperature=6.0),
        )
        before = distiller.evaluate(x, labels, verbose=0, return_dict=True)
        distiller.fit(x, labels, epochs=10, verbose=0)
        after = distiller.evaluate(x, labels, verbose=0, return_dict=True)

        assert after["loss"] < before["loss"]
        log_p = scipy.special.log_softmax(
            student.predict(x, verbose=0).astype("float64"), axis=-1
        )
        target = helpers.softmax(teacher.predict(x, verbose=0) / 6.0)
        hard = -log_p[np.arange(len(x)), labels]
        np.testing.assert_allclose(
            after["loss"],
            np.mean(0.1 * hard + 0.9 * kl(target, log_p)),
            rtol=1e-5,
        )
        for a, b in zip(pretrained, teacher.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
