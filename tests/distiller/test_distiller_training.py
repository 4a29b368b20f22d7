"""Training: Keras's own, with the teacher's outputs as targets."""

import contextlib

import helpers
import keras
import numpy as np
import pytest
from distillers import (
    CLASSES,
    assert_same_weights,
    distil,
    logits,
    logits_loss,
    make_linear,
    make_model,
    pt_losses,
)

from keras_ptloss import Correction, Distiller, SoftLabels
from keras_ptloss.metrics import (
    KLToTeacher,
    TeacherAgreement,
    TotalVariationDistance,
)
from keras_ptloss.soft_labels import SoftLabelSpec

BACKEND = keras.backend.backend()


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
    expected = pt_losses(logits(teacher, x), logits(student, x))
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

    @pytest.mark.parametrize("kind", ["arrays", "tf.data", "PyDataset"])
    def test_pipelines_train_alike(self, x, y, kind):
        class Batches(keras.utils.PyDataset):
            def __len__(self):
                return 4

            def __getitem__(self, index):
                return (x[index * 8 : (index + 1) * 8],)

        data = x
        options = {"batch_size": 8}
        if kind == "tf.data":
            tf = pytest.importorskip("tensorflow")
            data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
            options = {}
        elif kind == "PyDataset":
            data, options = Batches(), {}
        teacher, student = make_model(), make_linear(seed=1)
        history = (
            distil(student, teacher)
            .fit(data, shuffle=False, verbose=0, **options)
            .history
        )
        alone = make_linear(seed=1)
        alone.compile("sgd", loss=logits_loss())
        expected = alone.fit(
            x, logits(teacher, x), batch_size=8, shuffle=False, verbose=0
        ).history
        np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-5)
        assert_same_weights(student, alone, atol=1e-6)

    def test_callbacks_see_the_logs(self, x):
        seen = []
        callback = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: seen.append(dict(logs))
        )
        distil(make_model(seed=1), make_model()).fit(
            x, epochs=2, callbacks=[callback], verbose=0
        )
        assert len(seen) == 2 and "teacher_agreement" in seen[0]

    def test_different_inputs(self, x):
        teacher, student = make_model(), make_linear(seed=1)
        distiller = distil(
            student, teacher, student_inputs="small", teacher_inputs="large"
        )
        data = {"small": x[::-1].copy(), "large": x}
        logs = distiller.evaluate(data, verbose=0, return_dict=True)
        expected = pt_losses(logits(teacher, x), logits(student, x[::-1]))
        np.testing.assert_allclose(logs["loss"], np.mean(expected), rtol=1e-5)
        trained = distiller.fit(data, batch_size=32, verbose=0).history
        np.testing.assert_allclose(trained["loss"], logs["loss"], rtol=1e-5)

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
        values = pt_losses(
            *(keras.ops.convert_to_numpy(m(tokens)) for m in (teacher, student))
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
        expected = pt_losses(mean, logits(student, x))
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
        outputs = logits(student, x)
        soft = np.mean(pt_losses(logits(teacher, x), outputs))
        rows = np.arange(len(y))
        nll = -np.mean(np.log(helpers.softmax(outputs)[rows, y]))
        own = keras.ops.convert_to_numpy(sum(student.losses))
        expected = weight * nll + (1 - weight) * soft + own
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
        expected = pt_losses(logits(teacher, x), logits(student, x), 0.0)
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

    @pytest.mark.parametrize("argument", ["metrics", "weighted_metrics"])
    def test_do_not_take_labels(self, argument):
        distiller = Distiller(make_linear(seed=1), make_model())
        metrics = {argument: [["accuracy", KLToTeacher(from_logits=True)]]}
        with pytest.raises(ValueError, match=r"teacher_metrics=\[\.\.\.\]"):
            distiller.compile("sgd", loss=logits_loss(), **metrics)

    def test_are_known_once_compiled(self):
        kl = KLToTeacher(from_logits=True)
        distiller = Distiller(
            make_linear(seed=1), make_model(), teacher_metrics=[kl]
        )
        distiller.compile("sgd", loss=logits_loss())
        assert distiller.teacher_metrics == [kl]

    @pytest.mark.parametrize("flag", ["from_logits", "teacher_from_logits"])
    @pytest.mark.parametrize("metric", [KLToTeacher, TotalVariationDistance])
    def test_are_told_what_the_loss_is(self, metric, flag):
        """What stands under `fit`, where values are not seen."""
        said = {"from_logits": True, "teacher_from_logits": True, flag: False}
        wrong = metric(name="far", **said)
        distiller = Distiller(
            make_linear(seed=1), make_linear(), teacher_metrics=[wrong]
        )
        with pytest.raises(ValueError, match=f"have {flag}=True.*far with"):
            distiller.compile("sgd", loss=logits_loss())
        assert not distiller.compiled

    def test_see_a_corrected_teacher_in_probabilities(self):
        kl = KLToTeacher(from_logits=True)
        distiller = Distiller(
            make_linear(seed=1), make_linear(4), teacher_metrics=[kl]
        )
        correction = Correction(scale=np.eye(3, 4), teacher_from_logits=True)
        loss = correction.loss(from_logits=True)
        with pytest.raises(ValueError, match="teacher_from_logits=False"):
            distiller.compile("sgd", loss=loss)

    def test_of_agreement_are_told_of_one_column(self):
        """It would be above a half, where a logit is above 0."""
        students = make_linear(1, seed=1), make_linear(2, seed=1)
        for student, refused in zip(students, (True, False), strict=True):
            distiller = Distiller(
                student,
                make_linear(student.output_shape[-1]),
                teacher_metrics=[TeacherAgreement()],
            )
            with (
                pytest.raises(ValueError, match="must have from_logits=True")
                if refused
                else contextlib.nullcontext()
            ):
                distiller.compile("sgd", loss=logits_loss())

    def test_that_are_none(self):
        with pytest.raises(ValueError, match="`teacher_metrics`.*'kl'"):
            Distiller(make_model(), make_model(seed=1), teacher_metrics=["kl"])


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
