"""The search for epsilon on a small labelled set (Algorithm 1, and beyond)."""

import dataclasses
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from threadpoolctl import threadpool_limits

from keras_ptloss._backend import block_elements
from keras_ptloss._checks import (
    check_choice,
    check_count,
    check_labels,
    check_number,
    check_output_form,
    check_probabilities,
    fail,
    on_simplex,
)
from keras_ptloss.losses._pt_loss import PTLoss
from keras_ptloss.proxy._layer import ProxyTeacher
from keras_ptloss.proxy._proxy_teacher import (
    SOLVERS,
    TOLERANCE,
    ProxyTeacherResult,
    proxy_teacher,
    solve_newton,
)
from keras_ptloss.search._fit import (
    CALIBRATIONS,
    Form,
    Parameters,
    Teacher,
    fit,
    proxy,
)
from keras_ptloss.search._folds import cross_validate
from keras_ptloss.search._objectives import OBJECTIVES, Objective
from keras_ptloss.soft_labels._soft_labels import SoftLabels

# Fewer labelled examples of a class than this do not carry its parameters.
ROWS_PER_CLASS = 10


@dataclasses.dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found, every trial, and what it cost.

    Attributes:
        epsilon: the coefficients, `(M,)` or `(C, M)`; zeros where nothing
            better than plain KL was found. Goes into `PTLoss`.
        teacher_temperature: the teacher's calibration, 1.0 where none was
            asked for; a number or `(C,)`.
        teacher_bias: None, or `(C,)`.
        score: the objective at the proxy teacher, on the search's examples.
        score_at_zero: the objective at the teacher itself: plain KL.
        objective: its name.
        method: `"random"` or `"gradient"`.
        from_logits: whether the teacher was given as logits.
        trials: every trial, column by column (`pandas.DataFrame(trials)`):
            `order`, `score`, `unconverged` rows, `epsilon`. With
            `selection="cross_validation"` every candidate instead:
            `calibration`, `shape` of epsilon, `order`, `penalty`, `parameters`
            (their number), `score` and its `gain` over plain KL on the
            held-out folds, the gain's `standard_error`, whether `chosen`.
        best_per_order: the best trial of each order, in the same columns.
        unconverged: rows whose proxy teacher did not converge, all solves
            together.
        solves: proxy teachers computed, one a row and trial.
        seconds: time of the search, compilation included.
    """

    epsilon: np.ndarray
    teacher_temperature: Any
    teacher_bias: Any
    score: float
    score_at_zero: float
    objective: str
    method: str
    from_logits: bool
    trials: dict[str, list[Any]]
    best_per_order: dict[str, list[Any]]
    unconverged: int
    solves: int
    seconds: float

    def loss(self, *, from_logits: bool = False, **arguments: Any) -> PTLoss:
        """Build the `PTLoss` of this result.

        Args:
            from_logits: whether the student's outputs are logits.
            **arguments: further arguments of `PTLoss`. `teacher_from_logits`
                is what the search was told of the teacher, unless given here.

        Returns:
            A `PTLoss` with the epsilon and the calibration found.
        """
        arguments.setdefault("teacher_from_logits", self.from_logits)
        return PTLoss(
            self.epsilon,
            from_logits=from_logits,
            teacher_temperature=self.teacher_temperature,
            teacher_bias=self.teacher_bias,
            **arguments,
        )

    def proxy_teacher(self, teacher: Any) -> ProxyTeacherResult:
        """Return what students distilled with `loss()` end at.

        Args:
            teacher: the teacher's outputs, `(N, C)`, in the form in which the
                search was given them.

        Returns:
            The proxy teachers of the calibrated teacher's rows.

        Raises:
            ValueError: if `teacher` is not of this form.
        """
        parameters = Parameters(
            scale=1.0 / np.atleast_1d(self.teacher_temperature),
            bias=np.atleast_1d(
                0.0 if self.teacher_bias is None else self.teacher_bias
            ),
            epsilon=np.atleast_2d(self.epsilon),
        )
        outputs = _teacher_outputs(teacher, None)
        rows = _as_teacher(
            outputs,
            self.from_logits,
            "take their softmax: the search was given probabilities",
        )
        per_class = max(
            len(parameters.scale), len(parameters.bias), len(parameters.epsilon)
        )
        if per_class not in (1, rows.logits.shape[1]):
            raise ValueError(
                f"`teacher` must have the search's {per_class} classes. "
                f"Received: teacher outputs of shape {rows.logits.shape}"
            )
        return proxy_teacher(rows.calibrated(parameters), self.epsilon)

    def proxy_model(self, teacher: keras.Model) -> keras.Model:
        """Build the proxy teacher of a live teacher, for a `Distiller`.

        KL to it has the optimum of `loss()` on the teacher, example by
        example, and is the better target for a small student, which gives one
        answer to many examples (docs/results.md):

            distiller = Distiller(student, result.proxy_model(teacher))
            distiller.compile(
                "adam",
                loss=PTLoss(0.0, from_logits=True, teacher_from_logits=False),
            )

        Args:
            teacher: a Keras model whose outputs, `(N, C)`, are in the form in
                which the search was given them.

        Returns:
            A model of the teacher's inputs that gives probabilities, `(N, C)`.
            It holds the teacher, and does not train what the search found.

        Raises:
            ValueError: if `teacher` is not a Keras model, or ends in a softmax
                where the search was given logits. On the first call, if it has
                another class count than the search's.
        """
        if not isinstance(teacher, keras.Model):
            raise ValueError(
                "`teacher` must be a Keras model; for stored outputs there is "
                f"`proxy_teacher`. Received: teacher={type(teacher).__name__}"
            )
        check_output_form("teacher", teacher, self.from_logits, "from_logits")
        layer = ProxyTeacher(
            self.epsilon,
            teacher_from_logits=self.from_logits,
            teacher_temperature=self.teacher_temperature,
            teacher_bias=self.teacher_bias,
            trainable=False,
        )
        return keras.Sequential([teacher, layer], name="proxy_teacher")

    def summary(self) -> None:
        """Print what was found and what it cost."""
        print(self)

    def __str__(self) -> str:
        """Return the text that `summary` prints."""
        shape = "per class" if self.epsilon.ndim == 2 else "shared"
        with np.printoptions(precision=4, suppress=True, threshold=60):
            lines = [
                f"PTLoss search: {self.method}, objective {self.objective}",
                f"  score    {self.score:.5g} (plain KL: "
                f"{self.score_at_zero:.5g})",
                f"  epsilon  {shape}, order {self.epsilon.shape[-1]}: "
                f"{np.array2string(self.epsilon, prefix=' ' * 30)}",
            ]
            if np.any(np.asarray(self.teacher_temperature) != 1.0):
                lines.append(
                    f"  teacher temperature {self.teacher_temperature}"
                )
            if self.teacher_bias is not None:
                lines.append(f"  teacher bias        {self.teacher_bias}")
        if "chosen" in self.trials:
            chosen = self.trials["chosen"].index(True)
            lines.append(
                "  chosen   {calibration} calibration, {shape} epsilon, "
                "penalty {penalty:g}: {gain:.4g} +- {standard_error:.2g} below "
                "plain KL on held-out folds".format(
                    **{k: v[chosen] for k, v in self.trials.items()}
                )
            )
        for order, score in zip(
            self.best_per_order["order"],
            self.best_per_order["score"],
            strict=True,
        ):
            lines.append(f"  best of order {order}: {score:.5g}")
        lines.append(
            f"  cost     {len(self.trials['score'])} trials, {self.solves} "
            f"solves, {self.unconverged} rows not converged, "
            f"{self.seconds:.3g} s"
        )
        if not np.any(self.epsilon):
            lines.append(
                "  epsilon = 0: this is plain KL from the teacher"
                + ("" if self.score == self.score_at_zero else ", calibrated")
            )
        return "\n".join(lines)


class ProxyTeacherSearch:
    """Find the coefficients of PTLoss on a small labelled set.

    PTLoss with coefficients epsilon trains a student towards a *proxy
    teacher*. The search computes proxy teachers for many epsilon on some
    hundred to a thousand labelled examples, and keeps the epsilon whose proxy
    is best by `objective`. Labels are needed here only, never on the data that
    the student is distilled from; the teacher must not have been trained on
    these examples.

    `method="gradient"` descends along the exact derivative (L-BFGS-B), from
    the teacher as it is, inside the region where the loss is convex. Unless
    one of them is given, calibration, shape of epsilon and penalty are chosen
    by cross-validation. `method="random"` is the paper's Algorithm 1: for each
    order up to `order`, `trials` sets of coefficients are drawn uniformly from
    `space`. In both, epsilon = 0 (plain KL) stands for election, so that the
    result never scores worse than it.

    Args:
        order: highest number of coefficients M.
        trials: random draws for each order (random only); None is 100.
        space: bounds of the draws, `(low, high)`; `method="gradient"` uses
            `[-1/m, high]`.
        per_class: whether each class has its own coefficients. Only these can
            move probability between classes, that is, repair a biased teacher.
        method: `"gradient"` or `"random"`.
        objective: `"nll"`, `"brier"`, `"risk"` (Eq. 11, rewards sharp
            teachers), or a function `(probabilities (N, C), labels (N,)) ->
            score`, lower being better; for `method="gradient"` it returns
            `(score, derivative (N, C))`. None is `"nll"` with
            `method="gradient"` and the paper's `"risk"` with `"random"`.
        solver: `"newton"`, or `"fsolve"`, the paper's (random only).
        calibration: of the teacher, ahead of epsilon (gradient only):
            `"none"`, `"temperature"` or `"vector"` (a temperature and a bias a
            class).
        penalty: weight of the squared parameters (gradient only).
        starts: starts of the descent: the teacher as it is, and random ones.
        selection: `"cross_validation"`: calibration, shape of epsilon and
            penalty are chosen on held-out folds, by the one-standard-error
            rule towards fewer parameters (gradient only). None: they are as
            given, or else `per_class=False`, `calibration="none"` and
            `penalty=0`. `"auto"`: cross-validation for `method="gradient"`
            where none of the three is given. On 1,000 examples it takes some
            ten seconds for 10 classes, a minute for 100.
        folds: number of folds.
        seed: of the draws, the starts and the folds.

    Raises:
        ValueError: if an argument is not of this form.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> truth = rng.dirichlet([1.0, 1.0, 1.0], size=300)
        >>> labels = np.array([rng.choice(3, p=row) for row in truth])
        >>> teacher = truth * [1.0, 0.2, 0.2]  # biased to class 0
        >>> teacher /= teacher.sum(axis=1, keepdims=True)
        >>> search = ProxyTeacherSearch(order=2)
        >>> result = search.search(teacher, labels)
        >>> result.score < result.score_at_zero
        True
        >>> loss = result.loss(from_logits=True)

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), Algorithm 1 and
        Eq. 11; Guo et al. 2017 for the calibrations.
    """

    def __init__(
        self,
        order: int = 5,
        trials: int | None = None,
        space: tuple[float, float] = (-1.0, 10.0),
        per_class: bool | None = None,
        method: str = "gradient",
        objective: str | Callable[..., Any] | None = None,
        solver: str = "newton",
        *,
        calibration: str | None = None,
        penalty: float | None = None,
        starts: int = 1,
        selection: str | None = "auto",
        folds: int = 5,
        seed: int = 0,
    ) -> None:
        self.order = check_count("order", order)
        self.trials = check_count("trials", 100 if trials is None else trials)
        self.space = _check_space(space)
        self.per_class = bool(per_class)
        check_choice("method", method, ("gradient", "random"))
        self.method = method
        if objective is None:
            objective = "nll" if method == "gradient" else "risk"
        self.objective = _as_objective(objective, method)
        check_choice("solver", solver, SOLVERS)
        self.solver = solver
        self.calibration = "none" if calibration is None else calibration
        check_choice("calibration", self.calibration, CALIBRATIONS)
        self.penalty = check_number(
            "penalty", 0.0 if penalty is None else penalty, at_least=0.0
        )
        self.starts = check_count("starts", starts)
        form = (per_class, calibration, penalty)
        given = any(part is not None for part in form)
        if selection == "auto":
            by_folds = method == "gradient" and not given
            selection = "cross_validation" if by_folds else None
        elif selection is not None:
            check_choice("selection", selection, ("cross_validation", "auto"))
            if given:
                raise ValueError(
                    "`per_class`, `calibration` and `penalty` are chosen by "
                    "cross-validation: leave them out, or set selection=None. "
                    f"Received: selection={selection!r}, "
                    f"per_class={per_class!r}, calibration={calibration!r}, "
                    f"penalty={penalty!r}"
                )
        self.selection = selection
        self.folds = check_count("folds", folds, at_least=2)
        self.seed = check_count("seed", seed, at_least=0)
        if method == "random" and (
            self.calibration != "none"
            or self.penalty
            or selection
            or starts != 1
        ):
            raise ValueError(
                "`calibration`, `penalty`, `starts` and `selection` need "
                'method="gradient". Received: method="random", '
                f"calibration={calibration!r}, penalty={penalty!r}, "
                f"starts={starts!r}, selection={selection!r}"
            )
        if method == "gradient":
            if trials is not None:
                fail("trials", 'left out, or used with method="random"', trials)
            if solver != "newton":
                fail("solver", '"newton" with method="gradient"', solver)
            if self.space[1] < 0.0:
                fail(
                    "space", 'such that high >= 0 with method="gradient"', space
                )

    def search(
        self,
        teacher: Any,
        labels: Any,
        *,
        inputs: Any = None,
        from_logits: bool | None = None,
        verbose: bool | None = None,
    ) -> SearchResult:
        """Search on labelled examples that the teacher was not trained on.

        On its own training examples a teacher is better than it is, and what
        is found there makes it worse elsewhere.

        Args:
            teacher: the teacher's outputs, `(N, C)`, or a Keras model that
                gives them for `inputs`.
            labels: true classes, integers, `(N,)`.
            inputs: the examples, in any form that `teacher.predict` takes;
                with a model only.
            from_logits: whether the teacher's outputs are logits; None is what
                `SoftLabels` say of themselves, and False of others.
            verbose: whether to show a progress bar; None shows it on a
                terminal, on runs of more than some seconds.

        Returns:
            A `SearchResult`.

        Raises:
            ValueError: if outputs or labels are not of this form.
        """
        begin = time.perf_counter()
        outputs = _teacher_outputs(teacher, inputs)
        from_logits = _says_logits(teacher, from_logits)
        rows = _as_teacher(outputs, from_logits, "say from_logits=True")
        labels = check_labels(
            labels, examples=len(outputs), classes=outputs.shape[1]
        )
        progress = _Progress(verbose)
        at_zero = float(self.objective.score(rows.probabilities, labels))
        # L-BFGS-B calls BLAS on matrices of 20 x 20 at most: on a busy machine
        # its threads cost more than half of the search.
        with threadpool_limits(limits=1, user_api="blas"):
            form = None
            if self.method == "random":
                found = self._random(
                    rows.probabilities, labels, at_zero, progress
                )
            elif self.selection is None:
                form = Form(
                    self.calibration,
                    "per_class" if self.per_class else "shared",
                    self.order,
                    self.penalty,
                )
                found = self._gradient(form, rows, labels)
            else:
                form, found = self._cross_validation(rows, labels, progress)
        if form is not None:
            self._warn_of_few_rows(form, rows, labels)
        return SearchResult(
            **found,
            score_at_zero=at_zero,
            objective=self.objective.name,
            method=self.method,
            from_logits=bool(from_logits),
            seconds=time.perf_counter() - begin,
        )

    # --- Algorithm 1 ---------------------------------------------------------

    def _random(
        self,
        teacher: np.ndarray,
        labels: np.ndarray,
        at_zero: float,
        progress: "_Progress",
    ) -> dict[str, Any]:
        examples, classes = teacher.shape
        generator = np.random.default_rng(self.seed)
        epsilons: list[np.ndarray] = []
        for m in range(1, self.order + 1):
            shape = (classes, m) if self.per_class else (m,)
            epsilons.extend(
                generator.uniform(*self.space, size=(self.trials, *shape))
            )
        scores: list[float] = []
        unconverged: list[int] = []
        # Trials differ in their steps: few together waste few.
        at_once = max(1, block_elements() // 4 // teacher.size)
        for start in range(0, len(epsilons), at_once):
            chunk = epsilons[start : start + at_once]
            q, missed = self._proxies(teacher, chunk, at_once)
            scores.extend(float(self.objective.score(row, labels)) for row in q)
            unconverged.extend(int(count) for count in missed)
            progress.update(start + len(chunk), len(epsilons))
        if not np.all(np.isfinite(scores)):
            bad = int(np.argmin(np.isfinite(scores)))
            raise ValueError(
                "`objective` must return finite scores. Received: "
                f"{self.objective.name} = {scores[bad]} in trial {bad}, "
                f"epsilon={epsilons[bad].tolist()}"
            )

        trials: dict[str, list[Any]] = {
            "order": [epsilon.shape[-1] for epsilon in epsilons],
            "score": scores,
            "unconverged": unconverged,
            "epsilon": epsilons,
        }
        best_of = [
            first + int(np.argmin(scores[first : first + self.trials]))
            for first in range(0, len(epsilons), self.trials)
        ]
        best = int(np.argmin(scores))
        epsilon, score = epsilons[best], scores[best]
        if not score < at_zero:
            epsilon, score = np.zeros_like(epsilon), at_zero
        return {
            "epsilon": epsilon,
            "teacher_temperature": 1.0,
            "teacher_bias": None,
            "score": score,
            "trials": trials,
            "best_per_order": {
                name: [column[k] for k in best_of]
                for name, column in trials.items()
            },
            "unconverged": sum(unconverged),
            "solves": len(epsilons) * examples,
        }

    def _proxies(
        self, teacher: np.ndarray, epsilons: list[np.ndarray], at_once: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return proxies `(K, N, C)` of K trials and their unconverged rows."""
        if self.solver == "fsolve":
            results = [
                proxy_teacher(teacher, epsilon, solver="fsolve")
                for epsilon in epsilons
            ]
            return (
                np.stack([result.probabilities for result in results]),
                np.array([np.sum(~result.converged) for result in results]),
            )
        # One compiled shape: lower orders and absent trials are zeros.
        rows = teacher.shape[1] if self.per_class else 1
        padded = np.zeros((at_once, rows, self.order))
        for k, epsilon in enumerate(epsilons):
            padded[k, :, : epsilon.shape[-1]] = epsilon
        q, _, residual, _ = solve_newton(teacher, padded)
        missed = np.sum(residual > TOLERANCE, axis=1)
        return q[: len(epsilons)], missed[: len(epsilons)]

    # --- Descent -------------------------------------------------------------

    def _gradient(
        self, form: Form, teacher: Teacher, labels: np.ndarray
    ) -> dict[str, Any]:
        fitted = fit(
            form,
            teacher,
            labels,
            self.objective,
            upper=self.space[1],
            starts=self.starts,
            seed=self.seed,
        )
        found = self._found(form, fitted.parameters, teacher, labels)
        trial = {
            "order": [self.order],
            "score": [found["score"]],
            "unconverged": [fitted.unconverged],
            "epsilon": [found["epsilon"]],
        }
        return {
            **found,
            "trials": trial,
            "best_per_order": trial,
            "unconverged": fitted.unconverged,
            "solves": fitted.evaluations * len(labels),
        }

    def _cross_validation(
        self, teacher: Teacher, labels: np.ndarray, progress: "_Progress"
    ) -> tuple[Form, dict[str, Any]]:
        candidates = cross_validate(
            teacher,
            labels,
            self.objective,
            order=self.order,
            upper=self.space[1],
            folds=self.folds,
            seed=self.seed,
            progress=progress.update,
        )
        found = self._gradient(candidates.chosen, teacher, labels)
        found["trials"] = candidates.columns
        found["unconverged"] += candidates.unconverged
        found["solves"] += candidates.solves
        return candidates.chosen, found

    def _found(
        self,
        form: Form,
        parameters: Parameters,
        teacher: Teacher,
        labels: np.ndarray,
    ) -> dict[str, Any]:
        q, _ = proxy(teacher.calibrated(parameters), parameters.epsilon)
        epsilon = parameters.epsilon
        temperature = 1.0 / parameters.scale
        return {
            "epsilon": epsilon if form.shape == "per_class" else epsilon[0],
            "teacher_temperature": (
                temperature
                if form.calibration == "vector"
                else float(temperature[0])
            ),
            "teacher_bias": (
                parameters.bias if form.calibration == "vector" else None
            ),
            "score": float(self.objective.score(q, labels)),
        }

    def _warn_of_few_rows(
        self, form: Form, teacher: Teacher, labels: np.ndarray
    ) -> None:
        if form.shape != "per_class" and form.calibration != "vector":
            return
        classes = teacher.logits.shape[1]
        counts = np.bincount(labels, minlength=classes)
        few = np.flatnonzero(counts < ROWS_PER_CLASS)
        if len(few):
            advice = (
                "Label more."
                if self.selection
                else "Label more, raise `penalty`, or choose by "
                'selection="cross_validation".'
            )
            warnings.warn(
                f"{len(few)} of {classes} classes have fewer than "
                f"{ROWS_PER_CLASS} labelled examples (class {few[0]} has "
                f"{counts[few[0]]}), too few for parameters per class. "
                f"{advice}",
                stacklevel=3,
            )


class _Progress:
    """A progress bar that appears on runs of more than some seconds."""

    def __init__(self, verbose: bool | None, patience: float = 3.0) -> None:
        self._verbose = verbose
        self._patience = patience
        self._start = time.perf_counter()
        self._bar: Any = None

    def update(self, done: int, total: int) -> None:
        if self._verbose is False:
            return
        waited = time.perf_counter() - self._start
        wanted = self._verbose or (
            waited > self._patience and sys.stdout.isatty()
        )
        if self._bar is None and wanted:
            self._bar = keras.utils.Progbar(total, unit_name="trial")
        if self._bar is not None:
            self._bar.update(done, finalize=done == total)


def _check_space(space: Any) -> tuple[float, float]:
    try:
        low, high = (float(bound) for bound in space)
    except (TypeError, ValueError):
        fail("space", "two numbers, (low, high)", space)
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        fail("space", "two finite numbers, the lower one first", space)
    return low, high


def _as_objective(objective: Any, method: str) -> Objective:
    if not callable(objective):
        check_choice("objective", objective, OBJECTIVES)
        return OBJECTIVES[objective]
    name = getattr(objective, "__name__", type(objective).__name__)
    if method == "random":

        def score(q: np.ndarray, labels: np.ndarray) -> Any:
            value = objective(q, labels)
            return value[0] if isinstance(value, tuple) else value

        return Objective(name, score, None)

    def pair(q: np.ndarray, labels: np.ndarray) -> Any:
        value = objective(q, labels)
        if not isinstance(value, tuple) or np.shape(value[1]) != np.shape(q):
            fail(
                "objective",
                "a function that returns (score, derivative (N, C)) with "
                'method="gradient"',
                objective,
            )
        return value

    return Objective(
        name,
        lambda q, labels: pair(q, labels)[0],
        lambda q, labels: np.asarray(pair(q, labels)[1]),
    )


def _says_logits(teacher: Any, from_logits: bool | None) -> bool:
    """Return whether the teacher's outputs are logits, by the one who knows."""
    if isinstance(teacher, keras.Model) and from_logits:
        check_output_form("teacher", teacher, True, "from_logits")
    if not isinstance(teacher, SoftLabels):
        return bool(from_logits)
    own = teacher.spec.from_logits
    if from_logits is not None and bool(from_logits) != own:
        fail("from_logits", f"{own}, as these soft labels say", from_logits)
    return own


def _as_teacher(
    outputs: np.ndarray, from_logits: bool, if_logits: str
) -> Teacher:
    if from_logits:
        if not np.all(np.isfinite(outputs)):
            fail("teacher", "finite logits", outputs)
        if len(outputs) > 1 and on_simplex(outputs).all():
            raise ValueError(
                "`from_logits` must be False for probabilities: all rows of "
                "the teacher are non-negative and sum to 1. Received: "
                f"from_logits=True, teacher[0]={outputs[0]}"
            )
        return Teacher(None, outputs)
    check_probabilities("teacher", outputs, if_logits)
    return Teacher(outputs / outputs.sum(axis=1, keepdims=True), None)


def _teacher_outputs(teacher: Any, inputs: Any) -> np.ndarray:
    """Return the teacher's outputs on the examples, `(N, C)`, in float64."""
    if isinstance(teacher, keras.Model):
        if inputs is None:
            raise ValueError(
                "`inputs` must hold the labelled examples when `teacher` is a "
                "Keras model. Received: inputs=None"
            )
        outputs = teacher.predict(inputs, verbose=0)
    elif inputs is not None:
        raise ValueError(
            "`inputs` goes with a Keras model. Received: inputs, with a "
            f"teacher of type {type(teacher).__name__}"
        )
    else:
        outputs = teacher
    outputs = np.asarray(outputs)
    if (
        outputs.dtype.kind not in "fiu"
        or outputs.ndim != 2
        or 0 in outputs.shape
        or outputs.shape[1] < 2
    ):
        raise ValueError(
            "`teacher` must give numbers of shape (examples, classes), two "
            "classes or more. Received: teacher outputs of shape "
            f"{outputs.shape} and dtype {outputs.dtype}"
        )
    return outputs.astype("float64")
