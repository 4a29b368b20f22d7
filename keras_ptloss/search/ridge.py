"""The default search: temperature and epsilon, then a ridge between classes.

    z_k    = log max(t_k, 1e-7)                            of teacher k
    r      = log proxy(softmax(sum_k z_k / temperature_k), epsilon)     step 1
    x      = [A_1 (z_1 - mu_1), A_2 (z_2 - mu_2), ..., 1]
    logits = (1 + a_1) r + a_2 softmax(r) + W x                         step 2

Step 1 fits one temperature per teacher and epsilon. Step 2 is a multinomial
logistic regression that starts from r: its features x are half-whitened, and
one L2 penalty holds all its parameters (W, a_1, a_2) near zero.
Cross-validation chooses the penalty, and decides between the teacher as it is,
step 1 alone and both steps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import scipy.optimize
from scipy.special import log_softmax, softmax

from keras_ptloss._validation import fail
from keras_ptloss._math import log_teacher_probs, shared_proxy
from keras_ptloss.correction import Correction
from keras_ptloss.search.method import Examples, Found

# Bounds of log(scale) and log(1 + epsilon) in step 1.
SCALE_BOUNDS = (-4.0, 4.0)
EPSILON_BOUNDS = (-5.0, 4.0)

# From strong to weak: each fit starts from the one before.
PENALTIES = tuple(10.0 ** (power / 2.0) for power in range(6, -5, -1))

# With more classes than this, a teacher enters step 2 by as many linear
# combinations of its z, those that vary most: a matrix of low rank.
MAX_FEATURES = 200

STEP_1, BOTH_STEPS = "temperature and epsilon", "corrected"


@dataclasses.dataclass(frozen=True)
class RidgeSearch:
    """Correct the teacher's confidence, then what it confuses between classes.

    `trials` has one row per candidate: the teachers as they are, step 1, and
    both steps at each `penalty` that was tried, with the out-of-fold `score`.

    Args:
        steps: 1 stops after temperature and epsilon, so that `PTLoss` alone
            can use the result. 2 also corrects single classes.

    Raises:
        ValueError: if `steps` is neither 1 nor 2.

    Example:
        >>> import numpy as np
        >>> from keras_ptloss import ProxyTeacherSearch
        >>> rng = np.random.default_rng(0)
        >>> truth = rng.dirichlet([1.0, 1.0, 1.0], size=300)
        >>> labels = np.array([rng.choice(3, p=row) for row in truth])
        >>> overconfident = truth**3 / np.sum(truth**3, axis=1, keepdims=True)
        >>> search = ProxyTeacherSearch(RidgeSearch(steps=1))
        >>> bool(search.search(overconfident, labels).temperature > 1.0)
        True
    """

    steps: Literal[1, 2] = 2

    name = "ridge"

    def __post_init__(self) -> None:
        """Check the argument."""
        if self.steps not in (1, 2):
            fail("steps", "1 or 2", self.steps)

    def run(self, examples: Examples, progress: Any) -> Found:
        """Search on the examples.

        Args:
            examples: the labelled examples.
            progress: `progress(done, total)` is called as the search goes on.

        Returns:
            The chosen correction. `out_of_fold` holds the teachers as they are,
            step 1, and both steps at the chosen penalty.
        """
        number = len(examples.labels)
        folds = _folds(number, examples.seed)
        on_all = _Fit(examples, np.ones(number, bool))
        in_folds = [
            _Fit(examples, folds != k, on_all.confidence)
            for k in range(folds.max() + 1)
        ]

        def out_of_fold(step: Callable[[_Fit], Correction]) -> np.ndarray:
            probs = np.empty((number, examples.num_classes))
            for k, fit in enumerate(in_folds):
                teacher_probs = [t[folds == k] for t in examples.teacher_probs]
                probs[folds == k] = _correct(step(fit), teacher_probs)
            return probs

        corrections, candidates = _teachers_as_they_are(examples)
        total = len(candidates) + 1 + len(PENALTIES)
        if candidates:
            corrections[STEP_1] = on_all.step_1()
            candidates[STEP_1] = out_of_fold(_Fit.step_1)
        scores = {n: _losses(q, examples).mean() for n, q in candidates.items()}
        tried = [(name, np.nan, score) for name, score in scores.items()]
        progress(len(tried), total)

        notes: tuple[str, ...] = ()
        if self.steps == 2 or not candidates:
            path: list[np.ndarray] = []  # out-of-fold probabilities
            losses: list[np.ndarray] = []
            for penalty in PENALTIES:
                for fit in in_folds:
                    fit.fit_classes(penalty)
                path.append(out_of_fold(_Fit.both_steps))
                losses.append(_losses(path[-1], examples))
                tried.append((BOTH_STEPS, penalty, losses[-1].mean()))
                progress(len(tried), total)
                if _rises(losses):
                    break
            best = _strongest_within_one_error(np.array(losses))
            for penalty in PENALTIES[: best + 1]:
                on_all.fit_classes(penalty)
            corrections[BOTH_STEPS] = on_all.both_steps()
            candidates[BOTH_STEPS] = path[best]
            scores[BOTH_STEPS] = losses[best].mean()
            notes = _notes_on_rank(examples)
        progress(total, total)
        chosen = min(scores, key=lambda name: scores[name])
        names, penalties, values = zip(*tried, strict=True)
        return Found(
            correction=corrections[chosen],
            trials={
                "candidate": list(names),
                "penalty": list(penalties),
                "score": [float(value) for value in values],
            },
            out_of_fold=candidates,
            chosen=chosen,
            notes=_notes(examples, corrections[chosen], on_all) + notes,
        )


class _Fit:
    """Both steps, fitted to some of the examples.

    Attributes:
        confidence: the parameters of step 1, see `fit_confidence`.
    """

    def __init__(
        self,
        examples: Examples,
        rows: np.ndarray,
        start: np.ndarray | None = None,
    ) -> None:
        """Fit step 1, and compute the features of step 2.

        Args:
            examples: all labelled examples.
            rows: which of them are fitted, `(N,)`, bool.
            start: where the fit of step 1 starts.
        """
        self.examples = examples
        labels = examples.labels[rows]
        weight = _effective_weight(examples)[rows]
        z = [log_teacher_probs(t[rows]) for t in examples.teacher_probs]
        pooled = [z[k] for k in _pooled(examples)]
        learned = np.ones(examples.num_classes, bool)
        if pooled and not examples.random_sample:
            learned = np.isin(np.arange(examples.num_classes), labels)
        self.learned = np.flatnonzero(learned)

        self.confidence, r = np.zeros(0), np.zeros((len(labels), len(learned)))
        if pooled:
            self.confidence = fit_confidence(
                pooled, labels, weight, self.learned, start
            )
            r = np.log(np.maximum(step_1_probs(pooled, self.confidence), 1e-30))
        self.whitening = [whiten(z_k, weight) for z_k in z]
        x = [
            (z_k - mean) @ a.T
            for z_k, (mean, a) in zip(z, self.whitening, strict=True)
        ]
        self.problem = (
            r[:, self.learned],
            np.concatenate([*x, np.ones((len(labels), 1))], axis=1),
            np.searchsorted(self.learned, labels),
            weight,
        )
        size = len(self.learned) * self.problem[1].shape[1] + 2
        self.parameters = np.zeros(size)

    def fit_classes(self, penalty: float) -> None:
        """Fit step 2, from where the last fit ended."""
        self.parameters = fit_classes(*self.problem, penalty, self.parameters)

    def step_1(self) -> Correction:
        """Return the correction by temperature and epsilon alone."""
        pooled = _pooled(self.examples)
        temperature = np.full(len(self.examples.teacher_probs), np.inf)
        temperature[pooled] = len(pooled) / np.exp(self.confidence[:-1])
        epsilon = np.expm1(self.confidence[-1]) if pooled else 0.0
        return _correction(self.examples, temperature, epsilon=epsilon)

    def both_steps(self) -> Correction:
        """Return the correction by both steps."""
        classes = self.examples.num_classes
        w = self.parameters[:-2].reshape(len(self.learned), -1)
        matrix = np.zeros((classes, 0))
        bias = np.zeros(classes)
        bias[self.learned] = w[:, -1]
        first = 0
        for mean, a in self.whitening:
            block = np.zeros((classes, len(mean)))
            block[self.learned] = w[:, first : first + len(a)] @ a
            bias -= block @ mean
            matrix = np.concatenate([matrix, block], axis=1)
            first += len(a)
        kept = np.setdiff1d(np.arange(classes), self.learned)
        return dataclasses.replace(
            self.step_1(),
            matrix=matrix,
            bias=bias,
            log_prob_weight=self.parameters[-2],
            prob_weight=self.parameters[-1],
            kept_classes=tuple(kept.tolist()),
        )


# ---- Step 1


def step_1_probs(z: list[np.ndarray], confidence: np.ndarray) -> np.ndarray:
    """Return `proxy(softmax(sum_k s_k z_k), epsilon)`.

    Args:
        z: of each teacher, `(N, C)`.
        confidence: `log(K s_k)` of each of K teachers, then `log(1 + epsilon)`.
            Zeros are the geometric mean of the teachers as they are.
    """
    scales = np.exp(confidence[:-1]) / len(z)
    pooled = sum(s * z_k for s, z_k in zip(scales, z, strict=True))
    return shared_proxy(softmax(pooled, axis=1), np.expm1(confidence[-1]))


def fit_confidence(
    z: list[np.ndarray],
    labels: np.ndarray,
    weight: np.ndarray,
    learned: np.ndarray,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """Fit the temperatures and epsilon; see `step_1_probs`.

    Args:
        z: of each teacher, `(N, C)`.
        labels: `(N,)`.
        weight: of each example, `(N,)`.
        learned: the classes that the labels are among. What step 1 gives to
            others is left out, as it says nothing about their confidence.
        start: where to start.

    Returns:
        The parameters, `(K + 1,)`.
    """
    found = scipy.optimize.minimize(
        confidence_objective,
        np.zeros(len(z) + 1) if start is None else start,
        (z, labels, weight, learned),
        jac=True,
        method="L-BFGS-B",
        bounds=[SCALE_BOUNDS] * len(z) + [EPSILON_BOUNDS],
    )
    return np.asarray(found.x)


def confidence_objective(
    confidence: np.ndarray,
    z: list[np.ndarray],
    labels: np.ndarray,
    weight: np.ndarray,
    learned: np.ndarray,
) -> tuple[float, np.ndarray]:
    """Return the NLL of step 1 plus a standard normal prior, and its gradient.

    With `q_c = t_c / (nu - epsilon t_c)` and nu set by `sum_c q_c = 1`,

        d log q_c = (1 + epsilon q_c) d log t_c + u_c (t_c d epsilon - d nu),
        u_c = 1 / (nu - epsilon t_c).
    """
    rows, epsilon = np.arange(len(labels)), np.expm1(confidence[-1])
    scales = np.exp(confidence[:-1]) / len(z)
    pooled = sum(s * z_k for s, z_k in zip(scales, z, strict=True))
    t = softmax(pooled, axis=1)
    q = shared_proxy(t, epsilon)
    largest = t.max(axis=1, keepdims=True)
    nu = largest / q.max(axis=1, keepdims=True) + epsilon * largest
    u = 1.0 / (nu - epsilon * t)

    # log q without an underflow, within the learned classes
    log_q = log_softmax(pooled, axis=1) + np.log(u)
    log_q = log_softmax(log_q[:, learned], axis=1)
    by_log_q = np.zeros_like(q)
    by_log_q[:, learned] = np.exp(log_q)
    by_log_q[rows, labels] -= 1.0
    by_log_q *= weight[:, None]
    own = log_q[rows, np.searchsorted(learned, labels)]

    by_nu = np.sum(by_log_q * u, axis=1, keepdims=True)
    by_log_q -= q * by_nu / np.sum(q * u, axis=1, keepdims=True)
    by_epsilon = np.sum(by_log_q * u * t)
    by_log_t = by_log_q * (1.0 + epsilon * q)
    by_pooled = by_log_t - t * by_log_t.sum(axis=1, keepdims=True)
    gradient = confidence.copy()
    gradient[:-1] += scales * [np.vdot(by_pooled, z_k) for z_k in z]
    gradient[-1] += by_epsilon * (1.0 + epsilon)
    value = -weight @ own + 0.5 * confidence @ confidence
    return float(value), gradient


# ---- Step 2


def whiten(z: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and matrix A of the half-whitened features `A (z - mean)`.

    `A = S^(-1/4)` up to a rotation, with S the covariance of z, its eigenvalues
    at least 1e-3 of the largest. Directions without variance are left out. The
    features' variances sum to the number of classes.

    Args:
        z: log probabilities of one teacher, `(N, C_k)`.
        weight: of each example, `(N,)`.
    """
    share = weight / weight.sum()
    mean = share @ z
    variance, directions = np.linalg.eigh((z - mean).T * share @ (z - mean))
    top = variance[-1]
    kept = np.flatnonzero(variance > max(1e-9 * top, 1e-12))[-MAX_FEATURES:]
    variance = variance[kept]
    scale = np.maximum(variance, 1e-3 * top) ** -0.25
    size = np.sum(scale**2 * variance) / z.shape[1]
    return mean, scale[:, None] * directions[:, kept].T / np.sqrt(size or 1.0)


def fit_classes(
    r: np.ndarray,
    x: np.ndarray,
    labels: np.ndarray,
    weight: np.ndarray,
    penalty: float,
    start: np.ndarray,
) -> np.ndarray:
    """Fit W, a_1 and a_2 of step 2.

    Args:
        r: log probabilities after step 1, `(N, C)`.
        x: the features, `(N, D)`.
        labels: `(N,)`.
        weight: of each example, `(N,)`.
        penalty: the L2 penalty.
        start: where to start.

    Returns:
        W, `(C, D)`, flat, then a_1 and a_2.
    """
    found = scipy.optimize.minimize(
        classes_objective,
        start,
        (r, np.exp(r), x, labels, weight, penalty),
        jac=True,
        method="L-BFGS-B",
        options={"ftol": 1e-6, "gtol": 1e-4, "maxiter": 300},
    )
    return np.asarray(found.x)


def classes_objective(
    parameters: np.ndarray,
    r: np.ndarray,
    exp_r: np.ndarray,
    x: np.ndarray,
    labels: np.ndarray,
    weight: np.ndarray,
    penalty: float,
) -> tuple[float, np.ndarray]:
    """Return the NLL of step 2 plus the penalty, and its gradient."""
    rows = np.arange(len(labels))
    w = parameters[:-2].reshape(r.shape[1], x.shape[1])
    a_1, a_2 = parameters[-2:]
    logits = x @ w.T
    logits += (1.0 + a_1) * r
    logits += a_2 * exp_r
    logits -= logits.max(axis=1, keepdims=True)
    own = logits[rows, labels]
    by_logits = np.exp(logits, out=logits)
    total = by_logits.sum(axis=1)
    by_logits *= (weight / total)[:, None]
    by_logits[rows, labels] -= weight
    gradient = np.concatenate(
        [
            (by_logits.T @ x).ravel(),
            [np.vdot(by_logits, r), np.vdot(by_logits, exp_r)],
        ]
    )
    value = weight @ (np.log(total) - own)
    value += 0.5 * penalty * parameters @ parameters
    return float(value), gradient + penalty * parameters


# ---- Cross-validation


def _folds(number: int, seed: int) -> np.ndarray:
    """Return the fold of each example: 5 folds, 10 of fewer than 300 examples.

    They are not stratified: with few labels, equal shares of the classes inside
    and outside of a fold would make biases look better than they are.
    """
    count = min(5 if number >= 300 else 10, number)
    return np.random.default_rng(seed).permutation(number) % count


def _effective_weight(examples: Examples) -> np.ndarray:
    """Return weights whose sum is the effective number of examples.

    That is `(sum w)^2 / sum w^2`: N equal weights count as N examples, and
    examples of weight zero do not count.
    """
    w = examples.sample_weight
    return w * (w.sum() / np.sum(w**2))


def _losses(probs: np.ndarray, examples: Examples) -> np.ndarray:
    """Return the NLL of each example times its weight, `(N,)`."""
    own = probs[np.arange(len(probs)), examples.labels]
    return -examples.sample_weight * np.log(np.maximum(own, 1e-7))


def _rises(losses: list[np.ndarray]) -> bool:
    """Return whether the last two penalties were worse than the best one."""
    means = [loss.mean() for loss in losses]
    return len(means) > 2 and min(means[-2:]) > min(means[:-2])


def _strongest_within_one_error(losses: np.ndarray) -> int:
    """Return the strongest penalty within one standard error of the best.

    The standard error is that of the difference. With few labels the lowest
    mean would often be a penalty that is too weak.

    Args:
        losses: `(penalties, N)`, from the strongest penalty on.
    """
    excess = losses - losses[np.argmin(losses.mean(axis=1))]
    error = excess.std(axis=1) / np.sqrt(losses.shape[1])
    return int(np.argmax(excess.mean(axis=1) <= error))


# ---- Teachers and notes


def _pooled(examples: Examples) -> list[int]:
    """Return the teachers that take part in step 1: those with C classes."""
    return [
        k
        for k, t in enumerate(examples.teacher_probs)
        if t.shape[1] == examples.num_classes
    ]


def _correction(
    examples: Examples, temperature: np.ndarray, **kwargs: Any
) -> Correction:
    """Return a correction with a temperature for each teacher."""
    counts = tuple(t.shape[1] for t in examples.teacher_probs)
    return Correction(
        temperature=temperature if len(counts) > 1 else temperature[0],
        teacher_classes=counts if len(counts) > 1 else None,
        **kwargs,
    )


def _correct(
    correction: Correction, teacher_probs: list[np.ndarray]
) -> np.ndarray:
    several = len(teacher_probs) > 1
    return correction.correct(teacher_probs if several else teacher_probs[0])


def _teachers_as_they_are(
    examples: Examples,
) -> tuple[dict[str, Correction], dict[str, np.ndarray]]:
    """Return each teacher with C classes: its correction, its probabilities."""
    several = len(examples.teacher_probs) > 1
    corrections, probs = {}, {}
    for k in _pooled(examples):
        name = f"teacher {k}" if several else "teacher"
        temperature = np.full(len(examples.teacher_probs), np.inf)
        temperature[k] = 1.0
        corrections[name] = _correction(examples, temperature)
        probs[name] = examples.teacher_probs[k]
    return corrections, probs


def _notes(
    examples: Examples, correction: Correction, fit: _Fit
) -> tuple[str, ...]:
    """Return notes on parameters at their bounds, and on perfect teachers."""
    notes = []
    for k in _pooled(examples):
        right = examples.teacher_probs[k].argmax(axis=1) == examples.labels
        if right.all():
            notes.append(
                "The teacher makes no mistakes on these examples, so they say "
                "little about what to correct. Label more examples."
            )
            break
    if correction.is_identity or not len(fit.confidence):
        return tuple(notes)
    bounds = [SCALE_BOUNDS] * (len(fit.confidence) - 1) + [EPSILON_BOUNDS]
    names = ["The temperature"] * (len(bounds) - 1) + ["Epsilon"]
    for name, value, (low, high) in zip(
        names, fit.confidence, bounds, strict=True
    ):
        if not low < value < high:
            notes.append(
                f"{name} ended at a bound of the search. The teacher's "
                "probabilities may say nothing about the labels: check the "
                "order of the classes, and that teacher outputs and labels are "
                "of the same examples."
            )
    return tuple(notes)


def _notes_on_rank(examples: Examples) -> tuple[str, ...]:
    """Return a note if the matrix of step 2 is restricted."""
    classes = max(t.shape[1] for t in examples.teacher_probs)
    if classes <= MAX_FEATURES:
        return ()
    return (
        f"A teacher has {classes} classes, so the matrix of the correction was "
        f"restricted to rank {MAX_FEATURES}.",
    )
