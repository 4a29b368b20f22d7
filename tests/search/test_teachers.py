"""Teachers and labels as users have them, and what is said of bad ones."""

import warnings

import helpers
import keras
import numpy as np
import pytest
import scipy.special

from keras_ptloss import ProxyTeacherSearch
from keras_ptloss.search import CalibrationSearch, GradientSearch

TEMPERATURE = ProxyTeacherSearch(CalibrationSearch("temperature"))
ROWS, CLASSES = 90, 3


@pytest.fixture(scope="module")
def live():
    """A teacher that is right, with labels drawn from it."""
    x = np.random.default_rng(0).normal(size=(ROWS, 4)).astype("float32")
    init = keras.initializers.RandomNormal(stddev=1.5, seed=1)
    teacher = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(CLASSES, "softmax", kernel_initializer=init),
        ]
    )
    outputs = teacher.predict(x, verbose=0)
    return teacher, x, helpers.draw_labels(outputs, 1), outputs


class Shuffled(keras.utils.PyDataset):
    """Batches of 32 in an order that changes with every pass."""

    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y
        self.rng = np.random.default_rng(0)
        self.order = np.arange(len(x))
        self.passes = 0

    def __len__(self):
        return -(-len(self.x) // 32)

    def __getitem__(self, index):
        if index == 0:
            self.rng.shuffle(self.order)
            self.passes += 1
        rows = self.order[32 * index : 32 * index + 32]
        return self.x[rows], self.y[rows]


class TestDataSets:
    def test_pairs_in_one_pass(self, live):
        teacher, x, labels, outputs = live
        data = Shuffled(x, labels)
        found = TEMPERATURE.search(teacher, data)
        assert data.passes == 1
        assert found.score_at_zero == pytest.approx(
            helpers.nll(outputs, labels), rel=1e-5
        )

    def test_generator(self, live):
        teacher, x, labels, outputs = live
        batches = ((x[i : i + 30], labels[i : i + 30]) for i in (0, 30, 60))
        found = TEMPERATURE.search(teacher, batches)
        assert found.score_at_zero == pytest.approx(
            helpers.nll(outputs, labels), rel=1e-5
        )

    def test_tf_data(self, live):
        tf = pytest.importorskip("tensorflow")
        teacher, x, labels, outputs = live
        data = tf.data.Dataset.from_tensor_slices((x, labels)).batch(32)
        found = TEMPERATURE.search(teacher, data)
        assert found.score_at_zero == pytest.approx(
            helpers.nll(outputs, labels), rel=1e-5
        )

    def test_labels_of_another_pass_are_refused(self, live):
        teacher, x, labels, _ = live
        match = "`inputs` must be arrays.*another pass of a shuffled"
        with pytest.raises(ValueError, match=match):
            TEMPERATURE.search(teacher, labels, inputs=Shuffled(x, labels))

    @pytest.mark.parametrize(
        "batch, match",
        [
            (lambda x, y: (x, y, np.ones(len(x))), "without sample weights"),
            (lambda x, y: x, "data set of .inputs, labels"),
        ],
    )
    def test_no_pairs(self, live, batch, match):
        teacher, x, labels, _ = live
        with pytest.raises(ValueError, match=match):
            TEMPERATURE.search(teacher, iter([batch(x, labels)]))

    def test_empty(self, live):
        with pytest.raises(ValueError, match="`labels` must be a data set of"):
            TEMPERATURE.search(live[0], iter(()))


class TestNothingIsPredictedInVain:
    """Labels and flags are looked at before the teacher is asked."""

    class Asked(keras.Model):
        def predict(self, *args, **kwargs):
            raise AssertionError("asked")

    @pytest.mark.parametrize(
        "labels, match",
        [
            (np.zeros(3), "must be integers"),
            (np.zeros(3, int), "one entry for each of the inputs, 4"),
        ],
    )
    def test_labels(self, labels, match):
        with pytest.raises(ValueError, match=match):
            TEMPERATURE.search(self.Asked(), labels, inputs=np.ones((4, 2)))

    def test_teacher_survives_a_mistake(self, live):
        teacher, x, labels, outputs = live
        # Whatever the backend raises.
        with pytest.raises(Exception, match="shape|ncompatible"):
            TEMPERATURE.search(teacher, labels, inputs=x[:, :2])
        np.testing.assert_array_equal(teacher.predict(x, verbose=0), outputs)


class TestShapes:
    def test_dense_prediction(self):
        rows = helpers.dirichlet(0, 6 * 5 * 4, CLASSES)
        labels = helpers.draw_labels(rows, 1)
        flat = TEMPERATURE.search(rows, labels)
        for shape in ((6, 5, 4), (6, 20)):
            found = TEMPERATURE.search(
                rows.reshape(*shape, CLASSES), labels.reshape(shape)
            )
            assert found.score == pytest.approx(flat.score)
            found = TEMPERATURE.search(
                rows.reshape(*shape, CLASSES), labels.reshape(*shape, 1)
            )
            assert found.score == pytest.approx(flat.score)

    @pytest.mark.parametrize("ignored", [-100, 255])
    def test_ignore_class(self, ignored):
        rows = helpers.dirichlet(0, 80, CLASSES)
        labels = helpers.draw_labels(rows, 1)
        marked = np.where(np.arange(80) % 4 == 0, ignored, labels)
        found = TEMPERATURE.search(rows, marked, ignore_class=ignored)
        kept = marked != ignored
        alone = TEMPERATURE.search(rows[kept], labels[kept])
        assert found.score == alone.score
        with pytest.raises(ValueError, match=r"`ignore_class` leaves rows"):
            TEMPERATURE.search(rows, marked)
        with pytest.raises(ValueError, match="`ignore_class` must be a label"):
            TEMPERATURE.search(rows, np.full(80, ignored), ignore_class=ignored)

    @pytest.mark.parametrize("from_logits", [False, True])
    def test_binary_head(self, from_logits):
        z = np.random.default_rng(0).normal(0, 2, (300, 1))
        p = scipy.special.expit(z)
        labels = (np.random.default_rng(1).random((300, 1)) < p).astype(int)
        one = z * 2 if from_logits else scipy.special.expit(z * 2)
        two = np.concatenate([0 * z if from_logits else 1 - one, one], axis=1)
        found, expected = (
            TEMPERATURE.search(rows, labels, from_logits=from_logits)
            for rows in (one, two)
        )
        assert found.score == pytest.approx(expected.score)
        np.testing.assert_allclose(
            found.proxy_teacher(one).probabilities,
            expected.proxy_teacher(two).probabilities,
        )


class TestRareClasses:
    @pytest.mark.parametrize("few", [0, 3])
    @pytest.mark.parametrize(
        "search",
        [
            ProxyTeacherSearch(),
            ProxyTeacherSearch(CalibrationSearch("vector", penalty=0.1)),
            ProxyTeacherSearch(CalibrationSearch("matrix", penalty=0.1)),
            ProxyTeacherSearch(GradientSearch(order=2, per_class=True)),
        ],
        ids=["default", "vector", "matrix", "per class"],
    )
    def test_are_left_as_the_teacher_has_them(self, search, few):
        """Labels without class 4; new data with it."""
        truth = helpers.dirichlet(0, 3000, 5, 0.8)
        labels = helpers.draw_labels(truth, 1)
        teacher = np.sqrt(truth) / np.sqrt(truth).sum(axis=1, keepdims=True)
        rows = np.arange(1000)
        common = rows[labels[:1000] != 4][:400]
        rare = rows[labels[:1000] == 4][:few]
        shown = np.concatenate([common, rare])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = search.search(teacher[shown], labels[shown])
        new = slice(1000, None)
        q = found.proxy_teacher(teacher[new]).probabilities
        assert helpers.nll(q, labels[new]) < helpers.nll(
            teacher[new], labels[new]
        )
        assert 0.7 < q[:, 4].mean() / teacher[new][:, 4].mean() < 1.2


class TestTeachersToBeWarnedOf:
    def test_worse_than_a_constant(self):
        z = np.random.default_rng(0).normal(0, 3, (400, 4))
        with pytest.warns(UserWarning, match="worse than a constant") as record:
            found = ProxyTeacherSearch().search(
                helpers.softmax(z), np.argmin(z, axis=1)
            )
        assert record[0].filename == __file__
        assert "worse than a constant" in str(found)
        assert found.score < np.log(4)

    def test_permuted_classes(self):
        truth = helpers.dirichlet(0, 400, 4, 0.3)
        labels = helpers.draw_labels(truth, 1)
        with pytest.warns(UserWarning) as record:
            TEMPERATURE.search(truth[:, [1, 0, 2, 3]], labels)
        text = " ".join(str(r.message) for r in record)
        assert "classes seem permuted" in text
        assert "0 is 1, 1 is 0" in text

    def test_a_result_at_a_bound(self):
        z = np.random.default_rng(0).normal(0, 3, (400, 4))
        with pytest.warns(UserWarning, match="worse than"):
            found = TEMPERATURE.search(helpers.softmax(z), np.argmin(z, axis=1))
        assert any("ended at a bound" in note for note in found.notes)

    def test_nothing_is_said_of_a_good_one(self):
        truth = helpers.dirichlet(0, 400, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = ProxyTeacherSearch().search(
                truth, helpers.draw_labels(truth, 1)
            )
        assert found.notes == ()
