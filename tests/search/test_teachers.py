"""Teachers and labels as users have them, and what is said of bad ones."""

import warnings

import helpers
import keras
import numpy as np
import pytest
import scipy.special

from keras_ptloss import ProxyTeacherSearch
from keras_ptloss.search import (
    CalibrationSearch,
    GradientSearch,
    RandomSearch,
)

pytestmark = pytest.mark.newest

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

    @pytest.mark.parametrize("shuffled", [False, True])
    def test_tf_data(self, live, shuffled):
        tf = pytest.importorskip("tensorflow")
        teacher, x, labels, outputs = live
        data = tf.data.Dataset.from_tensor_slices((x, labels))
        if shuffled:
            data = data.shuffle(ROWS, seed=0, reshuffle_each_iteration=True)
        found = TEMPERATURE.search(teacher, data.batch(32))
        assert found.score_at_zero == pytest.approx(
            helpers.nll(outputs, labels), rel=1e-5
        )

    def test_positions_to_leave_out(self, live):
        """Labels `(N, H, W)` beside inputs `(N, H, W, 4)`."""
        teacher, x, labels, outputs = live
        dense = keras.Sequential([keras.Input((3, 5, 4)), *teacher.layers])
        kept = np.arange(ROWS) % 4 != 0
        marked = np.where(kept, labels, 255).reshape(6, 3, 5)
        batches = zip(
            np.split(x.reshape(6, 3, 5, 4), 3), np.split(marked, 3), strict=True
        )
        found = TEMPERATURE.search(dense, batches, ignore_class=255)
        alone = TEMPERATURE.search(outputs[kept], labels[kept])
        assert found.score_at_zero == pytest.approx(
            helpers.nll(outputs[kept], labels[kept]), rel=1e-5
        )
        assert found.score == pytest.approx(alone.score, rel=1e-5)

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

    @pytest.mark.parametrize(
        "labels, arguments, match",
        [
            ([0, 1, 2, 3], {}, r"in \[0, 3\).*labels\[3\]=3"),
            ([0, -1, 2, 0], {}, r"in \[0, 3\).*labels\[1\]=-1"),
            ([0, 1, 5, 0], {"classes": 5}, r"in \[0, 5\).*labels\[2\]=5"),
            ([0, 1, -1, 3], {"ignore_class": -1}, r"in \[0, 3\)"),
            (np.zeros((4, 2), int), {}, r"one class a row.*\(4, 2\)"),
            ([0] * 4, {"ignore_class": 0}, "`ignore_class` must be"),
            ([0] * 4, {"classes": 1}, "`classes` must be.*classes=1"),
            ([0] * 4, {"classes": "x"}, "`classes` must be.*classes='x'"),
        ],
    )
    def test_labels_of_a_teacher_that_is_built(self, labels, arguments, match):
        ends = keras.Input((2,)), keras.layers.Dense(3, "softmax")
        teacher = self.Asked(ends[0], ends[1](ends[0]))
        with pytest.raises(ValueError, match=match):
            TEMPERATURE.search(
                teacher, labels, inputs=np.ones((4, 2)), **arguments
            )

    def test_several_outputs(self):
        x = keras.Input((2,))
        heads = [keras.layers.Dense(3, "softmax")(x) for _ in range(2)]
        with pytest.raises(ValueError, match="`teacher` must give one tensor"):
            TEMPERATURE.search(
                self.Asked(x, heads), [0] * 4, inputs=np.ones((4, 2))
            )

    def test_teacher_survives_a_mistake(self, live):
        teacher, x, labels, outputs = live
        # Whatever the backend raises.
        with pytest.raises(Exception, match="shape|ncompatible"):
            TEMPERATURE.search(teacher, labels, inputs=x[:, :2])
        np.testing.assert_array_equal(teacher.predict(x, verbose=0), outputs)

    def test_teacher_of_shared_layers_survives_a_mistake(self, live):
        """JAX's predictions give away the arrays of the other model."""
        _, x, labels, outputs = live
        teacher = keras.models.clone_model(live[0])
        teacher.set_weights(live[0].get_weights())
        other = keras.Sequential([keras.Input((4,)), *teacher.layers])
        for model in (teacher, other):
            TEMPERATURE.search(model, iter([(x, labels)]))
        with pytest.raises(Exception, match="shape|ncompatible"):
            TEMPERATURE.search(teacher, labels, inputs=x[:, :2])
        np.testing.assert_array_equal(teacher.predict(x, verbose=0), outputs)

    @pytest.mark.parametrize("call", [0, 1])
    @pytest.mark.parametrize("as_data_set", [False, True])
    def test_teacher_survives_an_interruption(self, live, as_data_set, call):
        """In a batch, when JAX has the weights and the model has not."""
        x, labels, outputs = live[1:]
        teacher = keras.models.clone_model(live[0])
        teacher.set_weights(live[0].get_weights())
        teacher.predict(x, verbose=0)
        ask, calls = teacher.predict_function, []

        def interrupted(*args):
            calls.append(args)
            if len(calls) > call:
                raise KeyboardInterrupt
            return ask(*args)

        teacher.predict_function = interrupted
        with pytest.raises(KeyboardInterrupt):
            if as_data_set:
                TEMPERATURE.search(teacher, Shuffled(x, labels))
            else:
                TEMPERATURE.search(teacher, labels, inputs=x)
        teacher.predict_function = ask
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

    def test_dense_prediction_with_positions_to_leave_out(self):
        rows = helpers.dirichlet(0, 6 * 5 * 4, CLASSES)
        labels = helpers.draw_labels(rows, 1)
        kept = np.arange(len(rows)) % 4 != 0
        search = ProxyTeacherSearch(GradientSearch(order=2, penalty=0.01))
        alone = search.search(rows[kept], labels[kept])
        cube = rows.reshape(6, 5, 4, CLASSES)
        marked = np.where(kept, labels, 255).reshape(6, 5, 4)
        found = search.search(cube, marked, ignore_class=255)
        assert found.score == alone.score
        np.testing.assert_allclose(
            found.proxy_teacher(cube).probabilities.reshape(-1, CLASSES)[kept],
            alone.proxy_teacher(rows[kept]).probabilities,
            rtol=1e-12,
        )

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

    @pytest.mark.parametrize("padding", [np.nan, -np.inf, 7.0])
    @pytest.mark.parametrize("from_logits", [False, True])
    @pytest.mark.parametrize("columns", [1, 3])
    @pytest.mark.parametrize("teachers", [1, 2])
    def test_rows_of_ignored_labels_may_be_anything(
        self, padding, from_logits, columns, teachers
    ):
        """They are found as if they were not there."""
        truth = helpers.dirichlet(0, 80, max(columns, 2))
        labels = helpers.draw_labels(truth, 1).reshape(20, 4)
        rows = np.log(truth) if from_logits else truth
        if columns == 1:
            rows = rows[:, 1:] - (rows[:, :1] if from_logits else 0.0)
        rows = rows.reshape(20, 4, columns)
        labels[:, 3], padded = -1, rows.copy()
        padded[:, 3] = padding
        results = [
            TEMPERATURE.search(
                [one] * teachers, y, from_logits=from_logits, ignore_class=-1
            )
            for one, y in ((padded, labels), (rows[:, :3], labels[:, :3]))
        ]
        assert results[0].score == results[1].score
        assert results[0].correction == results[1].correction

    def test_a_row_that_is_looked_at_keeps_its_place(self):
        rows = np.full((4, 3), 1 / 3)
        rows[[0, 2]] = np.nan
        with pytest.raises(ValueError, match=r"teacher\[2\]=\[nan"):
            TEMPERATURE.search(rows, [-1, 0, 1, 2], ignore_class=-1)

    @pytest.mark.parametrize("ignored", [1.5, "1", True, [0, 1], np.arange(3)])
    def test_ignore_class_is_an_integer(self, ignored):
        rows = np.full((3, 3), 1 / 3)
        match = "`ignore_class` must be an integer, or None.*ignore_class="
        with pytest.raises(ValueError, match=match):
            TEMPERATURE.search(rows, [0, 1, 2], ignore_class=ignored)

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


def random_per_class(objective):
    method = RandomSearch(order=2, trials=60, per_class=True)
    return ProxyTeacherSearch(method, objective=objective)


def gradient_per_class(objective):
    method = GradientSearch(order=2, per_class=True)
    return ProxyTeacherSearch(method, objective=objective)


VECTOR = ProxyTeacherSearch(CalibrationSearch("vector", penalty=0.1))
SEARCHES = {
    "default": ProxyTeacherSearch(),
    "default brier": ProxyTeacherSearch(objective="brier"),
    "vector": VECTOR,
    "matrix": ProxyTeacherSearch(CalibrationSearch("matrix", penalty=0.1)),
    "per class": gradient_per_class("nll"),
    "per class brier": gradient_per_class("brier"),
    "random": random_per_class("nll"),
    "random brier": random_per_class("brier"),
}


class TestRareClasses:
    """Labels with none or a few of some classes; new data with them.

    Not "risk", which rises and falls with the NLL of no class.
    """

    @staticmethod
    def check(search, classes, rare, few, *, shown, power=0.5, seed=0):
        truth = helpers.dirichlet(seed, shown + 2000, classes, 0.8)
        labels = helpers.draw_labels(truth, seed + 1)
        teacher = truth**power / (truth**power).sum(axis=1, keepdims=True)
        rows = np.flatnonzero(~np.isin(labels[:shown], rare))
        for c in rare:
            of_class = np.flatnonzero(labels[:shown] == c)
            rows = np.append(rows, of_class[:few])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = search.search(teacher[rows], labels[rows])
        t, y = teacher[shown:], labels[shown:]
        q = found.proxy_teacher(t).probabilities
        assert helpers.nll(q, y) <= helpers.nll(t, y) + 1e-9
        occurs = np.flatnonzero(np.isin(y, rare))
        of_label = occurs, y[occurs]
        rise = np.log(t[of_label]) - np.log(q[of_label])
        noise = rise.std() / np.sqrt(len(rise))
        assert rise.mean() <= 2 * noise + 1e-9
        assert 0.9 < q[:, rare].mean() / t[:, rare].mean() < 1.1

    @pytest.mark.parametrize("few", [0, 3])
    @pytest.mark.parametrize("name", SEARCHES)
    @pytest.mark.parametrize("power", [0.5, 2.0])
    def test_are_left_as_the_teacher_has_them(self, name, few, power):
        self.check(SEARCHES[name], 5, [4], few, shown=500, power=power)

    @pytest.mark.parametrize("name", ["vector", "per class", "random"])
    @pytest.mark.parametrize("seed", range(10, 40, 10))
    def test_two_of_ten(self, name, seed):
        self.check(SEARCHES[name], 10, [8, 9], 0, shown=600, seed=seed)

    @pytest.mark.parametrize("seed", [1, 3])
    @pytest.mark.parametrize("name", ["default", "vector", "matrix"])
    def test_labels_enough_together(self, name, seed):
        """Seven classes of 1 to 4 labels each, 20 in all, of a teacher that
        gives them 94 % where they have 10 %."""
        rng = np.random.default_rng(seed)
        shown, rare = 200, np.arange(10) > 2
        labels = rng.choice(10, shown + 5000, p=np.where(rare, 0.1 / 7, 0.3))
        logits = rng.normal(size=(len(labels), 10)) + 2.5 * rare
        logits[np.arange(len(labels)), labels] += 1.0
        counts = np.bincount(labels[:shown], minlength=10)[rare]
        assert 1 <= counts.min() and counts.max() < 5
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = SEARCHES[name].search(
                logits[:shown], labels[:shown], from_logits=True
            )
        t, y = logits[shown:], labels[shown:]
        q = found.proxy_teacher(t).probabilities
        share = np.log(np.where(rare, 0.1 / 7, 0.3))
        exact = helpers.softmax(t - 2.5 * rare + share)
        assert helpers.nll(q, y) <= helpers.nll(exact, y) + 0.15
        assert helpers.nll(helpers.softmax(t), y) > helpers.nll(q, y) + 1.0

    @pytest.mark.parametrize("name", ["vector", "random"])
    def test_half_of_a_hundred(self, name):
        rare = list(range(50, 100))
        self.check(SEARCHES[name], 100, rare, 0, shown=1200)
