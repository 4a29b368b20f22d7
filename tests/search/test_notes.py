"""What a search says of bad teachers, and of what ended at a bound."""

import re
import warnings

import helpers
import numpy as np
import pytest

from keras_ptloss import ProxyTeacherSearch
from keras_ptloss.search import (
    CalibrationSearch,
    CrossValidatedSearch,
    GradientSearch,
    RandomSearch,
)


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

    @pytest.mark.parametrize("order", [[1, 0, 2, 3], [1, 2, 0, 3]])
    def test_permuted_classes(self, order):
        """Its class c is what the labels call order[c]."""
        truth = helpers.dirichlet(0, 400, 4, 0.3)
        labels = helpers.draw_labels(truth, 1)
        with pytest.warns(UserWarning) as record:
            ProxyTeacherSearch(CalibrationSearch("temperature")).search(
                truth[:, order], labels
            )
        text = " ".join(str(r.message) for r in record)
        assert "classes seem permuted" in text
        moved = [f"{c} is {of}" for c, of in enumerate(order) if c != of]
        assert text.endswith("if its class " + ", ".join(moved))

    @pytest.mark.filterwarnings("ignore:the teacher")
    @pytest.mark.parametrize(
        ("method", "said"),
        [
            (CalibrationSearch("temperature"), ["0.05 to 50"]),
            (CalibrationSearch("vector", penalty=0.1), ["0 to 50"]),
            (
                GradientSearch(calibration="temperature"),
                ["0.05 to 20", "epsilon ended at its lower bound.*mend$"],
            ),
            (
                CrossValidatedSearch(calibrations=()),
                ["0.05 to 20", "epsilon ended at its lower bound.*mend$"],
            ),
            (GradientSearch(), ["lower bound, -1/m, .*a temperature ahead"]),
            (GradientSearch(order=2, per_class=True), ["at its lower bound"]),
            (RandomSearch(order=1, trials=20), []),
        ],
    )
    def test_what_ended_at_a_bound_of_the_search(self, method, said):
        """A teacher that is wrong can be made no flatter."""
        z = np.random.default_rng(0).normal(0, 3, (400, 4))
        found = ProxyTeacherSearch(method, objective="nll").search(
            helpers.softmax(z), np.argmin(z, axis=1)
        )
        notes = [note for note in found.notes if "ended at" in note]
        assert len(notes) == len(said), notes
        for note, match in zip(notes, said, strict=True):
            assert re.search(match, note)

    @pytest.mark.parametrize(
        ("method", "said"),
        [
            (GradientSearch(order=1), True),
            (GradientSearch(order=2, penalty=0.01), False),
            # One coefficient of one class is there.
            (GradientSearch(order=2, per_class=True), False),
            (RandomSearch(order=1, trials=20, space=(0.0, 30.0)), False),
        ],
    )
    def test_upper_bound_of_epsilon(self, method, said):
        truth = helpers.dirichlet(0, 400, 4)
        power = 0.05 if said else 0.4
        teacher = truth**power / (truth**power).sum(axis=1, keepdims=True)
        found = ProxyTeacherSearch(method, objective="nll").search(
            teacher, helpers.draw_labels(truth, 1)
        )
        assert np.any(found.epsilon > 9.99) or not said
        notes = [note for note in found.notes if "ended at" in note]
        assert len(notes) == said, notes
        assert all("at its upper bound, 10" in note for note in notes)

    @pytest.mark.parametrize(
        "method",
        [
            CalibrationSearch("temperature"),
            CalibrationSearch("vector"),
            CrossValidatedSearch(),
        ],
    )
    def test_right_on_all_rows(self, method):
        """How sure it may be, of which it says too little, nothing tells."""
        labels = np.random.default_rng(0).integers(0, 3, 100)
        teacher = np.where(np.eye(3)[labels] > 0, 0.4, 0.3)
        found = ProxyTeacherSearch(method).search(teacher, labels)
        assert found.notes[0].startswith("the teacher is right on all 100 rows")

    def test_nothing_is_said_of_a_good_one(self):
        truth = helpers.dirichlet(0, 400, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = ProxyTeacherSearch().search(
                truth, helpers.draw_labels(truth, 1)
            )
        assert found.notes == ()
