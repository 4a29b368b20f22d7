"""Distiller: Keras's own training, with the teacher's outputs as targets.

The class `TestDefectsOfKerasDistillation` goes through what Keras 3.15's
`keras.distillation` gets wrong, one test a defect.
"""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ptloss import Distiller, PTLoss, SoftLabels, pt_loss
from keras_ptloss.metrics import ExpectedCalibrationError, KLToTeacher
from keras_ptloss.soft_labels import SoftLabelSpec

BACKEND = keras.backend.backend()
CLASSES, FEATURES = 3, 4


def make_model(classes=CLASSES, *, seed=0, dtype=None, regularizer=None):
    """Dropout and batch norm tell training from inference."""
    init = keras.initializers.GlorotUniform(seed=seed)
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(8, "relu", kernel_initializer=init, dtype=dtype),
            keras.layers.BatchNormalization(dtype=dtype),
            keras.layers.Dropout(0.5, seed=seed, dtype=dtype),
            keras.layers.Dense(
                classes,
                kernel_initializer=init,
                kernel_regularizer=regularizer,
                dtype=dtype,
            ),
        ]
    )


def make_linear(*, seed=0, regularizer=None):
    init = keras.initializers.GlorotUniform(seed=seed)
    dense = keras.layers.Dense(
        CLASSES, kernel_initializer=init, kernel_regularizer=regularizer
    )
    return keras.Sequential([keras.Input((FEATURES,)), dense])


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(32, FEATURES)).astype("f")


@pytest.fixture
def y():
    return np.random.default_rng(1).integers(0, CLASSES, size=32)


def logits_loss(epsilon=0.5):
    return PTLoss(epsilon, from_logits=True)


def distil(student, teacher, **arguments):
    distiller = Distiller(student, teacher, **arguments)
    distiller.compile("sgd", loss=logits_loss())
    return distiller


def test_three_lines(x):
    distiller = Distiller(make_linear(seed=1), make_model())
    distiller.compile("adam", loss=logits_loss())
    history = distiller.fit(x, epochs=20, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert set(history) == {"loss", "teacher_agreement"}


def test_loss_is_pt_loss_of_teacher_and_student(x):
    student, teacher = make_model(seed=1), make_model()
    distiller = distil(student, teacher)
    logs = distiller.evaluate(x, verbose=0, return_dict=True)
    expected = pt_loss(
        teacher.predict(x, verbose=0),
        student.predict(x, verbose=0),
        0.5,
        from_logits=True,
    )
    np.testing.assert_allclose(logs["loss"], np.mean(expected), rtol=1e-5)


def test_agreement_is_logged(x):
    teacher = make_model()
    distiller = distil(make_model(seed=1), teacher)
    logs = distiller.evaluate(x, verbose=0, return_dict=True)
    same = distiller.predict(x, verbose=0).argmax(1) == teacher.predict(
        x, verbose=0
    ).argmax(1)
    np.testing.assert_allclose(logs["teacher_agreement"], same.mean())


def test_equals_fit_on_stored_soft_labels(x, tmp_path):
    """The live teacher and its stored outputs train the same student."""
    teacher = make_model()
    live, stored = make_linear(seed=1), make_linear(seed=1)
    distil(live, teacher).fit(
        x, epochs=3, batch_size=8, shuffle=False, verbose=0
    )
    store = SoftLabels.write(
        teacher,
        x,
        tmp_path / "teacher.softlabels",
        spec=SoftLabelSpec(from_logits=True, dtype="float32"),
        verbose=0,
    )
    stored.compile("sgd", loss=logits_loss())
    stored.fit(
        store.attach(x, batch_size=8), epochs=3, shuffle=False, verbose=0
    )
    for a, b in zip(live.get_weights(), stored.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


class TestData:
    def test_labels_feed_metrics_only(self, x, y):
        students = [make_linear(seed=1), make_linear(seed=1)]
        for student, data in zip(students, [(x,), (x, y)], strict=True):
            distiller = Distiller(student, make_model())
            distiller.compile(
                "sgd",
                loss=logits_loss(),
                metrics=["sparse_categorical_accuracy"],
            )
            history = distiller.fit(
                *data, shuffle=False, epochs=2, verbose=0
            ).history
            assert ("sparse_categorical_accuracy" in history) == (len(data) > 1)
        for a, b in zip(*(s.get_weights() for s in students), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)

    def test_unlabelled_training_with_labelled_validation(self, x, y):
        distiller = Distiller(make_model(seed=1), make_model())
        distiller.compile(
            "sgd", loss=logits_loss(), metrics=["sparse_categorical_accuracy"]
        )
        history = distiller.fit(
            x, validation_data=(x, y), epochs=3, verbose=0
        ).history
        accuracy = np.mean(distiller.predict(x, verbose=0).argmax(axis=1) == y)
        np.testing.assert_allclose(
            history["val_sparse_categorical_accuracy"][-1], accuracy, atol=1e-6
        )

    def test_tf_data(self, x, y):
        tf = pytest.importorskip("tensorflow")
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
        distil(make_model(seed=1), make_model()).fit(
            data, shuffle=False, verbose=0
        )

    def test_py_dataset(self, x):
        class Batches(keras.utils.PyDataset):
            def __len__(self):
                return 4

            def __getitem__(self, index):
                return (x[index * 8 : (index + 1) * 8],)

        distil(make_model(seed=1), make_model()).fit(Batches(), verbose=0)

    def test_callbacks_see_the_logs(self, x):
        seen = []
        callback = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: seen.append(dict(logs))
        )
        stop = keras.callbacks.EarlyStopping(monitor="loss", patience=3)
        distil(make_model(seed=1), make_model()).fit(
            x, epochs=2, callbacks=[callback, stop], verbose=0
        )
        assert len(seen) == 2 and "teacher_agreement" in seen[0]

    def test_different_inputs(self, x):
        teacher, student = make_model(), make_linear(seed=1)
        distiller = distil(
            student, teacher, student_inputs="small", teacher_inputs="large"
        )
        data = {"small": x[::-1].copy(), "large": x}
        logs = distiller.evaluate(data, verbose=0, return_dict=True)
        expected = pt_loss(
            teacher.predict(x, verbose=0),
            student.predict(x[::-1], verbose=0),
            0.5,
            from_logits=True,
        )
        np.testing.assert_allclose(logs["loss"], np.mean(expected), rtol=1e-5)
        distiller.fit(data, verbose=0)

    def test_masks_reach_the_loss(self):
        """Padded tokens of a token-level student do not count."""
        tokens = np.array([[1, 2, 0, 0], [3, 0, 0, 0]])

        def tagger(seed):
            init = keras.initializers.RandomNormal(seed=seed)
            return keras.Sequential(
                [
                    keras.layers.Embedding(
                        5, 6, mask_zero=True, embeddings_initializer=init
                    ),
                    keras.layers.Dense(CLASSES, kernel_initializer=init),
                ]
            )

        student, teacher = tagger(1), tagger(2)
        distiller = distil(student, teacher)
        logs = distiller.evaluate(tokens, verbose=0, return_dict=True)
        values = np.asarray(
            pt_loss(teacher(tokens), student(tokens), 0.5, from_logits=True)
        )
        np.testing.assert_allclose(
            logs["loss"], values[tokens > 0].mean(), rtol=1e-5
        )


class TestTeacherIsFrozen:
    def test_weights_never_change(self, x):
        teacher = make_model()
        before = [w.copy() for w in teacher.get_weights()]
        distil(make_model(seed=1), teacher).fit(x, epochs=3, verbose=0)
        for a, b in zip(before, teacher.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_is_not_in_the_optimizer(self, x):
        distiller = distil(make_model(seed=1), make_model())
        distiller.fit(x, verbose=0)
        student = {id(v) for v in distiller.student.trainable_variables}
        assert {id(v) for v in distiller.trainable_variables} == student

    def test_user_s_model_is_left_as_it_was(self, x):
        teacher = make_model()
        distil(make_model(seed=1), teacher).fit(x, verbose=0)
        assert teacher.trainable

    def test_runs_in_inference_mode(self, x):
        """In training mode dropout would make the loss random."""
        student, teacher = make_linear(seed=1), make_model()
        distiller = Distiller(student, teacher)
        distiller.compile(keras.optimizers.SGD(0.0), loss=logits_loss())
        losses = distiller.fit(x, epochs=3, batch_size=32, verbose=0).history[
            "loss"
        ]
        np.testing.assert_allclose(losses, losses[0], rtol=1e-6)

    def test_survives_an_interrupted_fit(self, x):
        teacher = make_model()
        before = teacher.predict(x, verbose=0)

        def interrupt(batch, logs):
            if batch == 2:
                raise KeyboardInterrupt

        distiller = distil(make_model(seed=1), teacher)
        with pytest.raises(KeyboardInterrupt):
            distiller.fit(
                x,
                batch_size=4,
                verbose=0,
                callbacks=[
                    keras.callbacks.LambdaCallback(on_train_batch_end=interrupt)
                ],
            )
        np.testing.assert_array_equal(before, teacher.predict(x, verbose=0))
        distiller.fit(x, verbose=0)


class TestSeveralTeachers:
    def test_weighted_mean_of_outputs(self, x):
        teachers = [make_model(seed=2), make_model(seed=3)]
        student = make_linear(seed=1)
        distiller = distil(student, teachers, teacher_weights=[3, 1])
        logs = distiller.evaluate(x, verbose=0, return_dict=True)
        mean = 0.75 * teachers[0].predict(x, verbose=0) + 0.25 * teachers[
            1
        ].predict(x, verbose=0)
        expected = pt_loss(
            mean, student.predict(x, verbose=0), 0.5, from_logits=True
        )
        np.testing.assert_allclose(logs["loss"], np.mean(expected), rtol=1e-5)

    def test_default_is_the_plain_mean(self, x):
        teacher = make_model()
        student = make_linear(seed=1)
        one = distil(student, teacher).evaluate(x, verbose=0)
        two = distil(student, [teacher, teacher]).evaluate(x, verbose=0)
        np.testing.assert_allclose(one, two, rtol=1e-6)


class TestHardLabels:
    @pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
    def test_weighted_sum(self, x, y, weight):
        student = make_linear(seed=1, regularizer=keras.regularizers.L2(0.01))
        teacher = make_model()
        hard = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        distiller = distil(
            student, teacher, hard_label_loss=hard, hard_label_weight=weight
        )
        logs = distiller.evaluate(x, y, verbose=0, return_dict=True)
        logits = student.predict(x, verbose=0)
        soft = np.mean(
            pt_loss(
                teacher.predict(x, verbose=0), logits, 0.5, from_logits=True
            )
        )
        expected = (
            weight * float(hard(y, logits))
            + (1 - weight) * soft
            + float(sum(student.losses))
        )
        np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)

    def test_all_hard_needs_no_teacher(self, x, y):
        distiller = distil(
            make_linear(seed=1),
            None,
            hard_label_loss=keras.losses.SparseCategoricalCrossentropy(
                from_logits=True
            ),
            hard_label_weight=1.0,
        )
        history = distiller.fit(x, y, verbose=0).history
        assert list(history) == ["loss"]  # and no agreement with nobody


class TestTeacherMetrics:
    @pytest.mark.parametrize("labelled", [False, True])
    def test_compare_student_and_teacher(self, x, y, labelled):
        teacher, student = make_model(), make_linear(seed=1)
        distiller = distil(
            student, teacher, teacher_metrics=[KLToTeacher(from_logits=True)]
        )
        logs = distiller.evaluate(
            x, y if labelled else None, verbose=0, return_dict=True
        )
        expected = pt_loss(
            teacher.predict(x, verbose=0),
            student.predict(x, verbose=0),
            0.0,
            from_logits=True,
        )
        assert sorted(logs) == ["kl_to_teacher", "loss"]
        np.testing.assert_allclose(
            logs["kl_to_teacher"], np.mean(expected), rtol=1e-4
        )

    def test_are_saved(self, x, tmp_path):
        distiller = distil(
            make_linear(seed=1),
            make_model(),
            teacher_metrics=[KLToTeacher(from_logits=True)],
        )
        distiller.fit(x, verbose=0)
        distiller.save(tmp_path / "d.keras")
        loaded = keras.saving.load_model(tmp_path / "d.keras")
        loaded.teacher = make_model()
        logs = loaded.evaluate(x, verbose=0, return_dict=True)
        assert sorted(logs) == ["kl_to_teacher", "loss"]

    def test_do_not_take_labels(self, x, y):
        distiller = Distiller(make_linear(seed=1), make_model())
        distiller.compile(
            "sgd", loss=logits_loss(), metrics=[KLToTeacher(from_logits=True)]
        )
        for run in (distiller.fit, distiller.evaluate):
            with pytest.raises(ValueError, match=r"teacher_metrics=\[\.\.\."):
                run(x, y, verbose=0)

    def test_that_are_none(self):
        with pytest.raises(ValueError, match="`teacher_metrics`.*'kl'"):
            Distiller(make_model(), make_model(seed=1), teacher_metrics=["kl"])


class TestSaving:
    def test_save_reload_and_continue(self, x, tmp_path):
        path = tmp_path / "distiller.keras"
        teacher = make_model()
        distiller = Distiller(make_linear(seed=1), teacher)
        distiller.compile("adam", loss=logits_loss([0.5, 0.1]))
        distiller.fit(x, shuffle=False, verbose=0)
        distiller.save(path)

        loaded = keras.saving.load_model(path)
        assert loaded.teacher is None
        np.testing.assert_array_equal(
            distiller.predict(x, verbose=0), loaded.predict(x, verbose=0)
        )
        loaded.teacher = teacher
        for model in (distiller, loaded):  # the optimizer goes on as well
            model.fit(x, shuffle=False, verbose=0)
        np.testing.assert_allclose(
            distiller.predict(x, verbose=0),
            loaded.predict(x, verbose=0),
            atol=1e-6,
        )

    def test_file_holds_no_teacher(self, x, tmp_path):
        teacher = keras.Sequential(
            [
                keras.Input((FEATURES,)),
                keras.layers.Dense(20_000),
                keras.layers.Dense(CLASSES),
            ]
        )
        distiller = distil(make_linear(seed=1), teacher)
        distiller.fit(x, verbose=0)
        distiller.save(tmp_path / "distiller.keras")
        distiller.save_weights(tmp_path / "distiller.weights.h5")
        for file in tmp_path.iterdir():
            assert file.stat().st_size < 100_000, file

    def test_student_is_a_plain_model(self, x, tmp_path):
        distiller = distil(make_linear(seed=1), make_model())
        distiller.fit(x, verbose=0)
        distiller.student.save(tmp_path / "student.keras")
        loaded = keras.saving.load_model(tmp_path / "student.keras")
        np.testing.assert_array_equal(
            loaded.predict(x, verbose=0), distiller.predict(x, verbose=0)
        )

    def test_config_round_trip(self):
        distiller = Distiller(
            make_linear(seed=1),
            [make_model(), make_model(seed=3)],
            teacher_weights=[1, 2],
            student_inputs="a",
            teacher_inputs="b",
            hard_label_loss=keras.losses.SparseCategoricalCrossentropy(),
            hard_label_weight=0.25,
        )
        copy = Distiller.from_config(distiller.get_config())
        ours, its = distiller.get_config(), copy.get_config()
        for key in ours:
            if key != "student":
                assert ours[key] == its[key], key


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
        values = np.asarray(
            pt_loss(
                teacher.predict(x, verbose=0),
                student.predict(x, verbose=0),
                0.5,
                from_logits=True,
            )
        )
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
        student.fit(x, soft_labels, verbose=0)

    def test_agreement_and_calibration_metrics(self, x, y):
        distiller = Distiller(make_model(seed=1), make_model())
        distiller.compile(
            "sgd",
            loss=logits_loss(),
            metrics=[ExpectedCalibrationError(from_logits=True)],
        )
        logs = distiller.evaluate(x, y, verbose=0, return_dict=True)
        assert {"teacher_agreement", "expected_calibration_error"} <= set(logs)


class TestWrongInput:
    def test_softmax_taken_for_logits(self, x):
        teacher = keras.Sequential([keras.layers.Dense(CLASSES, "softmax")])
        distiller = distil(make_linear(seed=1), teacher)
        for run in (distiller.fit, distiller.evaluate):
            with pytest.raises(ValueError, match="`teacher_from_logits` must"):
                run(x, verbose=0)
        inputs = keras.Input((FEATURES,))
        dense = keras.layers.Dense(CLASSES)(inputs)
        student = keras.Model(inputs, keras.layers.Softmax()(dense))
        with pytest.raises(ValueError, match="`from_logits` must be False"):
            distil(student, make_model()).fit(x, verbose=0)

    def test_logits_taken_for_probabilities(self, x):
        teacher = keras.Sequential([keras.layers.Dense(CLASSES, "softmax")])
        distiller = Distiller(make_linear(seed=1), teacher)
        distiller.compile("sgd", loss=PTLoss(0.5))
        with pytest.warns(UserWarning, match="`student`.*logits") as record:
            distiller.fit(x, verbose=0)
        assert record[0].filename == __file__

    @pytest.mark.parametrize("built", [False, True])
    def test_student_on_layers_of_the_teacher(self, x, built):
        shared = keras.layers.Dense(8)
        teacher = keras.Sequential(
            [keras.Input((FEATURES,)), shared, keras.layers.Dense(CLASSES)]
        )
        student = keras.Sequential([shared, keras.layers.Dense(CLASSES)])
        if built:
            student.build((None, FEATURES))
        with pytest.raises(ValueError, match="share no trainable weight"):
            distil(student, teacher).fit(x, verbose=0)
        shared.trainable = False
        before = teacher.predict(x, verbose=0)
        distil(student, teacher).fit(x, verbose=0)
        np.testing.assert_array_equal(before, teacher.predict(x, verbose=0))

    @pytest.mark.parametrize("several", ["dict", "list", "late list"])
    def test_teacher_of_several_outputs(self, x, several):
        inputs = keras.Input((FEATURES,))
        outputs = [keras.layers.Dense(CLASSES)(inputs) for _ in range(2)]
        if several == "dict":
            outputs = {"a": outputs[0], "b": outputs[1]}
        teacher = keras.Model(inputs, outputs)
        late = keras.Sequential([keras.layers.Dense(CLASSES)])
        student = late if several == "late list" else make_linear(seed=1)
        with pytest.raises(ValueError, match="`teacher` must give one tensor"):
            distil(student, teacher).fit(x, verbose=0)

    def test_student_of_several_outputs(self, x):
        inputs = keras.Input((FEATURES,))
        outputs = [keras.layers.Dense(CLASSES)(inputs) for _ in range(2)]
        with pytest.raises(ValueError, match="`student` must give one tensor"):
            distil(keras.Model(inputs, outputs), make_model())

    def test_one_output_unit(self, x):
        student = keras.Sequential([keras.layers.Dense(1, "sigmoid")])
        teacher = keras.Sequential([keras.layers.Dense(1, "sigmoid")])
        distiller = Distiller(student, teacher)
        distiller.compile("sgd", loss=PTLoss(0.5))
        with pytest.raises(ValueError, match="at least 2 classes"):
            distiller.fit(x, verbose=0)

    def test_student_as_its_own_teacher(self):
        model = make_model()
        with pytest.raises(ValueError, match="`teacher` must be another model"):
            Distiller(model, model)

    def test_class_counts_differ(self):
        with pytest.raises(ValueError, match="same number of classes.*with 5"):
            Distiller(make_model(), make_model(5))

    def test_class_counts_differ_seen_on_the_first_batch(self, x):
        late = keras.Sequential([keras.layers.Dense(5)])
        distiller = Distiller(make_model(), late)
        distiller.compile("sgd", loss=logits_loss())
        with pytest.raises(ValueError, match="same number of classes"):
            distiller.fit(x, verbose=0)

    def test_teacher_that_is_no_model(self):
        with pytest.raises(ValueError, match="behind an API"):
            Distiller(make_model(), lambda x: x)

    def test_student_that_is_no_model(self):
        with pytest.raises(ValueError, match="`student` must be a Keras model"):
            Distiller("bert", make_model())

    def test_weights_of_another_length(self):
        with pytest.raises(ValueError, match="`teacher_weights`.*1 teachers"):
            Distiller(make_model(), make_model(seed=1), teacher_weights=[1, 2])

    def test_negative_weights(self):
        with pytest.raises(ValueError, match="`teacher_weights`.*-1"):
            Distiller(make_model(), make_model(seed=1), teacher_weights=[-1])

    @pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan")])
    def test_hard_label_weight_out_of_range(self, weight):
        with pytest.raises(ValueError, match="`hard_label_weight`"):
            Distiller(
                make_model(),
                make_model(seed=1),
                hard_label_loss=keras.losses.MeanSquaredError(),
                hard_label_weight=weight,
            )

    def test_hard_label_weight_without_a_loss(self):
        with pytest.raises(ValueError, match="`hard_label_loss`"):
            Distiller(make_model(), make_model(seed=1), hard_label_weight=0.5)

    def test_hard_label_loss_that_is_no_loss(self):
        with pytest.raises(ValueError, match="`hard_label_loss`.*'mse'"):
            Distiller(
                make_model(),
                make_model(seed=1),
                hard_label_loss="mse",
                hard_label_weight=0.5,
            )

    def test_hard_labels_missing(self, x):
        distiller = distil(
            make_model(),
            make_model(seed=1),
            hard_label_loss=keras.losses.MeanSquaredError(),
            hard_label_weight=0.5,
        )
        with pytest.raises(ValueError, match="`y` must hold labels"):
            distiller.fit(x, verbose=0)

    def test_inputs_without_the_key(self, x):
        distiller = distil(
            make_model(),
            make_model(seed=1),
            student_inputs="a",
            teacher_inputs="b",
        )
        with pytest.raises(ValueError, match=r"`teacher_inputs`.*\['a'\]"):
            distiller.fit({"a": x}, verbose=0)

    def test_no_teacher(self, x):
        with pytest.raises(ValueError, match="`teacher` must be set"):
            distil(make_model(), None).fit(x, verbose=0)


@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_interrupted_run_gives_the_teacher_back(x, method):
    class Interrupt(keras.callbacks.Callback):
        def stop(self, batch, logs=None):
            raise KeyboardInterrupt

        on_test_batch_end = on_predict_batch_end = stop

    teacher = make_model()
    distiller = distil(make_linear(seed=1), teacher)
    before = teacher.predict(x, verbose=0)
    with pytest.raises(KeyboardInterrupt):
        getattr(distiller, method)(x, verbose=0, callbacks=[Interrupt()])
    np.testing.assert_array_equal(before, teacher.predict(x, verbose=0))


def test_teacher_that_xla_cannot_compile_is_asked_of():
    class Words(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.supports_jit = False

    teacher = keras.Sequential([Words(), keras.layers.Dense(CLASSES)])
    assert not Distiller(make_model(), teacher).supports_jit
    assert Distiller(make_model(), make_model(seed=1)).supports_jit
