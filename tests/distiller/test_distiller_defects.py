"""What Keras 3.15's `keras.distillation` gets wrong, one test a defect."""

import helpers
import keras
import numpy as np
import pytest
from distillers import (
    CLASSES,
    FEATURES,
    distil,
    logits,
    logits_loss,
    make_linear,
    make_model,
    pt_losses,
)
from keras import ops

from keras_ptloss import Distiller, PTLoss
from keras_ptloss.metrics import ExpectedCalibrationError

BACKEND = keras.backend.backend()


class TestDefectsOfKerasDistillation:
    """DESIGN.md §5: what keras.distillation gets wrong."""

    def test_default_compares_distributions_not_raw_logits(self, x):
        """A student that copies the teacher has no loss."""
        teacher = make_model()
        student = keras.models.clone_model(teacher)
        student.set_weights(teacher.get_weights())
        distiller = Distiller(student, teacher)
        distiller.compile("sgd", loss=logits_loss(0.0))
        assert abs(distiller.evaluate(x, verbose=0)[0]) < 1e-6

    def test_sample_weight_counts(self, x, y):
        student, teacher = make_linear(seed=1), make_model()
        distiller = distil(student, teacher)
        weight = np.where(np.arange(32) < 8, 1.0, 0.0)
        logs = distiller.evaluate(
            x, y, sample_weight=weight, verbose=0, return_dict=True
        )
        values = pt_losses(logits(teacher, x), logits(student, x))
        np.testing.assert_allclose(
            logs["loss"], np.mean(values * weight), rtol=1e-5
        )

    def test_regularisers_and_add_loss_count(self, x):
        class Extra(keras.layers.Layer):
            def call(self, inputs):
                self.add_loss(7.0 + 0.0 * ops.mean(inputs))
                return inputs

        teacher = make_model()
        plain = make_linear(seed=1)
        student = keras.Sequential(
            [
                keras.Input((FEATURES,)),
                Extra(),
                keras.layers.Dense(
                    CLASSES, kernel_regularizer=keras.regularizers.L2(0.1)
                ),
            ]
        )
        student.set_weights(plain.get_weights())
        without = distil(plain, teacher).evaluate(x, verbose=0)[0]
        with_losses = distil(student, teacher).evaluate(x, verbose=0)[0]
        kernel = student.get_weights()[0]
        np.testing.assert_allclose(
            with_losses - without, 7.0 + 0.1 * np.sum(kernel**2), rtol=1e-5
        )

    def test_evaluate_runs_the_student_in_inference_mode(self, x):
        distiller = distil(make_model(seed=1), make_model())
        before = distiller.get_weights()
        losses = [distiller.evaluate(x, verbose=0)[0] for _ in range(3)]
        assert losses[0] == losses[1] == losses[2]
        for a, b in zip(before, distiller.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
    def test_mixed_precision_student_of_a_float32_teacher(self, x, policy):
        student = make_model(seed=1, dtype=policy)
        distiller = distil(student, make_model())
        history = distiller.fit(x, epochs=5, verbose=0).history
        assert np.all(np.isfinite(history["loss"]))
        assert student.layers[0].compute_dtype == policy[6:]

    def test_loaded_file_can_fit_without_the_teacher_inside(self, x, tmp_path):
        distiller = distil(make_linear(seed=1), make_model())
        distiller.fit(x, verbose=0)
        distiller.save(tmp_path / "d.keras")
        loaded = keras.saving.load_model(tmp_path / "d.keras")
        with pytest.raises(ValueError, match=r"distiller.teacher = model"):
            loaded.fit(x, verbose=0)
        loaded.teacher = make_model()
        loaded.fit(x, verbose=0)

    def test_compile_without_a_loss(self, x):
        """As in Keras: the student's own losses alone are minimised."""
        dense = keras.layers.Dense(
            CLASSES, use_bias=False, kernel_regularizer="l2"
        )
        student = keras.Sequential([keras.Input((FEATURES,)), dense])
        distiller = Distiller(student, make_model())
        distiller.compile("sgd")
        history = distiller.fit(x, epochs=2, verbose=0).history
        assert history["loss"][1] < history["loss"][0]

    @pytest.mark.skipif(BACKEND != "tensorflow", reason="a TensorFlow strategy")
    @pytest.mark.parametrize("hard_weight", [0.0, 0.5, 1.0])
    def test_same_losses_under_a_mirrored_strategy(self, x, y, hard_weight):
        tf = pytest.importorskip("tensorflow")
        if len(tf.config.list_logical_devices("CPU")) < 2:
            pytest.skip("needs two logical devices: see conftest.py")
        results = []
        for devices in (["CPU:0"], ["CPU:0", "CPU:1"]):
            with tf.distribute.MirroredStrategy(devices).scope():
                distiller = Distiller(
                    make_linear(seed=1, regularizer="l2"),
                    make_linear(seed=2),
                    hard_label_loss=(
                        keras.losses.SparseCategoricalCrossentropy(True)
                    ),
                    hard_label_weight=hard_weight,
                )
                distiller.compile(keras.optimizers.SGD(0.1), loss=logits_loss())
            history = distiller.fit(
                x, y, batch_size=16, epochs=2, shuffle=False, verbose=0
            ).history
            results.append((history["loss"], distiller.student.get_weights()))
        np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
        for a, b in zip(results[0][1], results[1][1], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)

    def test_stored_teacher_outputs_need_no_distiller(self, x):
        soft_labels = np.full((32, CLASSES), 1 / CLASSES, "f")
        student = make_model(seed=1)
        student.compile(
            "sgd",
            loss=PTLoss(0.5, from_logits=True, teacher_from_logits=False),
        )
        loss = student.evaluate(x, soft_labels, verbose=0)
        expected = pt_losses(np.zeros((32, CLASSES)), logits(student, x))
        np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)

    def test_agreement_and_calibration_metrics(self, x, y):
        distiller = Distiller(make_model(seed=1), make_model())
        distiller.compile(
            "sgd",
            loss=logits_loss(),
            metrics=[ExpectedCalibrationError(from_logits=True)],
        )
        logs = distiller.evaluate(x, y, verbose=0, return_dict=True)
        outputs = logits(distiller.student, x)
        same = outputs.argmax(1) == logits(distiller.teacher, x).argmax(1)
        np.testing.assert_allclose(logs["teacher_agreement"], same.mean())
        metric = ExpectedCalibrationError()
        metric.update_state(y, helpers.softmax(outputs))
        np.testing.assert_allclose(
            logs["expected_calibration_error"], metric.result(), atol=1e-6
        )
