"""The search for a correction on a small labelled set."""

import dataclasses
import time
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from threadpoolctl import threadpool_limits

from keras_ptloss._checks import check_choice, check_count, fail
from keras_ptloss._teacher import LabelledOutputs, read_labelled
from keras_ptloss.search._cross_validated import CrossValidatedSearch
from keras_ptloss.search._examples import Examples
from keras_ptloss.search._gradient import GradientSearch
from keras_ptloss.search._labels import left_to_the_teacher
from keras_ptloss.search._notes import (
    notes_on_few,
    notes_on_teacher,
)
from keras_ptloss.search._objectives import OBJECTIVES, as_objective
from keras_ptloss.search._progress import Progress
from keras_ptloss.search._random import RandomSearch
from keras_ptloss.search._result import SearchResult
from keras_ptloss.search._strategy import Strategy

METHODS: dict[str, Callable[[], Strategy]] = {
    "cross_validation": CrossValidatedSearch,
    "gradient": GradientSearch,
    "random": RandomSearch,
}


class ProxyTeacherSearch:
    """Find the correction of a teacher on a small labelled set.

    PTLoss with coefficients epsilon trains a student towards a *proxy
    teacher*. The search looks for the calibration and the epsilon whose proxy
    is best by `objective` on some hundred to a thousand labelled examples.
    Labels are needed here only, never on the data that the student is
    distilled from; the teacher must not have been trained on these examples.

    Several teachers, and teachers whose classes are not the student's, are
    corrected together by one matrix (`teacher` a list, `classes`): weak
    teachers that err differently make a better one.

    Plain KL stands for election whatever the method, so that the result is
    never worse than it on what is fitted to. That is the labels, and of classes
    with fewer than 5 of them, together too, what the teacher says: on all
    labels, `score` may then be above `score_at_zero`.

    Args:
        method: how: `CrossValidatedSearch(...)`, which chooses the form on
            held-out folds; `GradientSearch(...)` and `CalibrationSearch(...)`,
            which fit a given form; `RandomSearch(...)`, the paper's Algorithm
            1. The strings `"cross_validation"`, `"gradient"` and `"random"` are
            these with their defaults.
        objective: `"nll"`, `"brier"`, `"risk"` (Eq. 11, rewards sharp
            teachers), or a function `(probabilities (N, C), labels (N,)) ->
            (score, derivative (N, C))`, lower being better; for a random
            search the score alone will do. None is `"nll"`, and the paper's
            `"risk"` for a random search.
        seed: of draws, starts and folds.

    Raises:
        ValueError: if an argument is not of this form.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> truth = rng.dirichlet([1.0, 1.0, 1.0], size=300)
        >>> labels = np.array([rng.choice(3, p=row) for row in truth])
        >>> teacher = truth * [1.0, 0.2, 0.2]  # biased to class 0
        >>> teacher /= teacher.sum(axis=1, keepdims=True)
        >>> result = ProxyTeacherSearch().search(teacher, labels)
        >>> result.score < result.score_at_zero
        True
        >>> loss = result.loss(from_logits=True)

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), Algorithm 1 and
        Eq. 11.
    """

    def __init__(
        self,
        method: Strategy | str = "cross_validation",
        *,
        objective: str | Callable[..., Any] | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(method, str):
            check_choice("method", method, METHODS)
            method = METHODS[method]()
        if isinstance(method, type) or not isinstance(method, Strategy):
            choices = ", ".join(map(repr, METHODS))
            fail("method", f"a search, as RandomSearch(), or {choices}", method)
        self.method = method
        self.objective = as_objective(
            method.objective if objective is None else objective
        )
        self.seed = check_count("seed", seed, at_least=0)

    def search(
        self,
        teacher: Any,
        labels: Any,
        *,
        inputs: Any = None,
        from_logits: Any = None,
        ignore_class: int | None = None,
        classes: int | None = None,
        verbose: bool | int | str | None = None,
    ) -> SearchResult:
        """Search on labelled examples that the teacher was not trained on.

        On its own training examples a teacher is better than it is, and what
        is found there makes it worse elsewhere.

        Classes with fewer than 5 labels are left as the teacher has them, but
        for what all classes share. Where such classes have 5 labels together,
        these tell how much falls to all of them, and the teacher divides it.

        Args:
            teacher: the teacher's outputs, `(N, ..., C)`, or a Keras model
                that gives them. One column, `(N, 1)`, is a binary head. Or a
                list of several teachers, arrays, models and `SoftLabels`
                alike, each with an answer to every example.
            labels: true classes, integers, `(N, ...)`; or, with a model, a
                data set of `(inputs, labels)`, which is gone through once.
            inputs: the examples, as arrays, with a model and an array of
                labels.
            from_logits: whether the teacher's outputs are logits, of several
                teachers one flag for all or one each; None is what
                `SoftLabels` say of themselves, and False of others.
            ignore_class: a label that marks positions to leave out, as in
                `keras.losses.SparseCategoricalCrossentropy`; the teacher's
                outputs there may be anything.
            classes: C, the number of classes of labels and student. None is
                the teacher's; it must be said where a teacher has others.
            verbose: whether to show a progress bar, 0 or 1, as in Keras; None
                and "auto" show it on a terminal, on runs of more than some
                seconds.

        Returns:
            A `SearchResult`.

        Raises:
            ValueError: if outputs or labels are not of this form.

        Warns:
            UserWarning: if the teacher is worse than a constant, its classes
                seem permuted, or classes have too few labels. The result's
                `notes` have these, and what ended at a bound.
        """
        begin = time.perf_counter()
        progress = Progress(verbose)
        self._check_list(teacher)
        read = read_labelled(
            teacher,
            labels,
            inputs=inputs,
            from_logits=from_logits,
            ignore_class=ignore_class,
            classes=classes,
        )
        self._check_row(read)
        examples = Examples.of(read)
        if self.objective in OBJECTIVES.values() and self.method.by_class:
            examples = left_to_the_teacher(examples)
        # L-BFGS-B calls BLAS on small matrices: on a busy machine its threads
        # cost more than half of the search.
        with threadpool_limits(limits=1, user_api="blas"):
            found = self.method.run(
                examples, self.objective, seed=self.seed, progress=progress
            )
        progress.close()
        notes = self._notes(examples, read.labels, found.per_class)
        for note in notes:
            warnings.warn(note, stacklevel=2)
        correction = dataclasses.replace(
            found.correction, teacher_from_logits=read.from_logits
        )
        q = correction.proxy(read.outputs).probabilities
        return SearchResult(
            correction=correction,
            score=float(self.objective.score(q, read.labels)),
            score_at_zero=float(
                self.objective.score(examples.probabilities, read.labels)
            ),
            objective=self.objective.name,
            method=self.method.name,
            trials=found.trials,
            unconverged=found.unconverged,
            solves=found.solves,
            seconds=time.perf_counter() - begin,
            classes={
                "labels": np.bincount(read.labels, minlength=q.shape[1])
                / len(q),
                "teacher": examples.probabilities.mean(axis=0),
                "corrected": q.mean(axis=0),
            },
            notes=(*notes, *found.notes),
        )

    def _check_list(self, teacher: Any) -> None:
        """Refuse several teachers before they are asked."""
        several = isinstance(teacher, (list, tuple)) and len(teacher) > 1
        if several and any(isinstance(one, keras.Model) for one in teacher):
            self._check_several(f"a list of {len(teacher)}")

    def _check_row(self, read: LabelledOutputs) -> None:
        """Refuse teachers of other classes, which their answers show."""
        if read.row is not None:
            counts = ", ".join(map(str, read.row.counts))
            self._check_several(
                f"teachers of {counts} classes, with labels of {read.classes}"
            )

    def _check_several(self, received: str) -> None:
        """Require a method that takes several teachers, or other classes."""
        if not self.method.several:
            raise ValueError(
                "`teacher` must be one teacher of the labels' classes for "
                f"method={self.method.name!r}; CrossValidatedSearch and "
                f"CalibrationSearch take others. Received: {received}"
            )

    def _notes(
        self, examples: Examples, labels: np.ndarray, per_class: bool
    ) -> list[str]:
        """Return what a user should know of the teacher and the labels."""
        notes = [
            name + note
            for name, teacher in examples.alone()
            for note in notes_on_teacher(teacher)
        ]
        if per_class:
            notes += notes_on_few(
                labels,
                examples.classes,
                "Label more."
                if isinstance(self.method, CrossValidatedSearch)
                else "Label more, raise `penalty`, or choose by "
                "CrossValidatedSearch().",
            )
        return notes
