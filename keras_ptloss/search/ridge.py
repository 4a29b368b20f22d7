"""The default search: temperature and epsilon, then a ridge regression.

    z_k    = log max(t_k, 1e-7)                            of teacher k
    r      = log proxy(softmax(sum_k z_k / temperature_k), epsilon)     step 1
    x      = [A_1 (z_1 - mean_1), A_2 (z_2 - mean_2), ..., 1]
    logits = (1 + a_1) r + a_2 softmax(r) + W x                         step 2

Step 1 fits one temperature per teacher and epsilon. Step 2 is a multinomial
logistic regression that starts from r. Its features x are half-whitened, and
an L2 penalty keeps all its parameters (W, a_1, a_2) near zero. Cross-validation
chooses the penalty, and chooses between the uncorrected teacher, only step 1,
and both steps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import scipy.linalg
import scipy.optimize
from scipy.special import log_softmax, softmax

from keras_ptloss._math import (
    log_teacher_probs,
    negative_log_likelihood,
    shared_proxy,
)
from keras_ptloss._validation import fail
from keras_ptloss.correction import Correction
from keras_ptloss.search.method import Examples, Found

# Bounds of the parameters of step 1, log(scale) and log(1 + epsilon).
SCALE_BOUNDS = (-4.0, 4.0)
EPSILON_BOUNDS = (-5.0, 4.0)

# From strong to weak: each fit starts where the previous fit ended.
PENALTIES = tuple(10.0 ** (power / 2.0) for power in range(6, -5, -1))

# The search takes the strongest penalty whose NLL is within this many standard
# errors of the lowest. With few labels, the penalty with the lowest NLL is
# often too weak. With 50 labels, 1.25 made fewer real teachers much worse than
# 1 did; the mean NLL was .003 higher.
ERRORS_ALLOWED = 1.25

# If a teacher has more classes than this, step 2 uses only this many directions
# of its z: those with the largest variance. The matrix then has low rank.
MAX_FEATURES = 200

STEP_1, BOTH_STEPS = "temperature and epsilon", "corrected"


@dataclasses.dataclass(frozen=True)
class RidgeSearch:
    """Correct the teacher's confidence, then its confusions between classes.

    The candidates are the uncorrected teacher, only step 1, and both steps. The
    search chooses the candidate with the lowest negative log-likelihood (NLL)
    on held-out folds. For step 2, it takes the strongest penalty whose NLL is
    within 1.25 standard errors of the lowest. `trials` has a row for each
    candidate and penalty, with its `score`.

    Args:
        steps: 1 stops after temperature and epsilon, so `PTLoss` can use the
            result directly. 2 also corrects confusions between classes.

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
            progress: the search calls `progress(done, total)` while it runs.

        Returns:
            The chosen correction. `out_of_fold` has the uncorrected teachers,
            only step 1, and both steps with the chosen penalty.

        Raises:
            ValueError: if `steps` is 1 and no teacher has the student's
                classes.
        """
        number = len(examples.labels)

        def tick(*_: Any) -> None:
            progress(0, len(PENALTIES))

        on_all = _Fit(examples, np.ones(number, bool), tick=tick)
        splits = _folds(examples)
        # A fit without each fold of each split: (split, held out, fit).
        parts = []
        for i, folds in enumerate(splits):
            for k in range(folds.max() + 1):
                fit = _Fit(examples, folds != k, on_all.confidence, tick)
                parts.append((i, folds == k, fit))

        def out_of_fold(step: Callable[[_Fit], Correction]) -> np.ndarray:
            probs = np.empty((len(splits), number, examples.num_classes))
            for i, held_out, fit in parts:
                teacher_probs = [t[held_out] for t in examples.teacher_probs]
                probs[i, held_out] = _correct(step(fit), teacher_probs)
            return probs

        corrections = _teachers_as_they_are(examples)
        candidates = {
            name: _correct(correction, examples.teacher_probs)[None]
            for name, correction in corrections.items()
        }
        if corrections:
            corrections[STEP_1] = on_all.step_1()
            candidates[STEP_1] = out_of_fold(_Fit.step_1)
        elif self.steps == 1:
            fail("steps", "2 if no teacher has the student's classes", 1)
        scores = {n: _losses(q, examples).mean() for n, q in candidates.items()}
        trials = [(name, np.nan, np.nan, scores[name]) for name in scores]

        # If the labels are a random sample, the shares of the classes in the
        # labels are evidence. The search then also tries a weak bias penalty.
        ratios = (1.0, 1e-3) if examples.random_sample else (1.0,)
        total = len(scores) + len(ratios) * len(PENALTIES)
        for ratio in ratios if self.steps == 2 else ():
            path: list[np.ndarray] = []
            losses: list[np.ndarray] = []
            for penalty in PENALTIES:
                for done, (_, _, fit) in enumerate(parts):
                    fit.fit_step_2(penalty, ratio * penalty)
                    # A penalty may take long, so the bar moves with each part.
                    progress(len(trials) + done / len(parts), total)
                path.append(out_of_fold(_Fit.both_steps))
                losses.append(_losses(path[-1], examples))
                means = [loss.mean() for loss in losses]
                trials.append((BOTH_STEPS, penalty, ratio * penalty, means[-1]))
                if len(means) > 2 and min(means[-2:]) > min(means[:-2]):
                    break  # The last two penalties were worse: too weak.
            best = _strongest(np.array(losses))
            if means[best] < scores.get(BOTH_STEPS, np.inf):
                on_all.fit_step_2(PENALTIES[best], ratio * PENALTIES[best])
                corrections[BOTH_STEPS] = on_all.both_steps()
                candidates[BOTH_STEPS] = path[best]
                scores[BOTH_STEPS] = means[best]

        chosen = min(scores, key=lambda name: scores[name])
        columns = ("candidate", "penalty", "bias_penalty", "score")
        return Found(
            correction=corrections[chosen],
            trials=dict(
                zip(columns, map(list, zip(*trials, strict=True)), strict=True)
            ),
            out_of_fold=candidates,
            chosen=chosen,
            notes=_notes(examples, chosen, on_all.confidence),
        )


class _Fit:
    """Both steps, fitted to some of the examples.

    Attributes:
        confidence: the parameters of step 1, see `fit_step_1`.
    """

    def __init__(
        self,
        examples: Examples,
        rows: np.ndarray,
        start: np.ndarray | None = None,
        tick: Callable[..., None] | None = None,
    ) -> None:
        """Fit step 1, and prepare step 2.

        Args:
            examples: all labelled examples.
            rows: which of the examples are fitted, `(N,)`, bool.
            start: start parameters for the fit of step 1.
            tick: called after each iteration of the fit of step 1.
        """
        self.examples = examples
        labels = examples.labels[rows]
        weight = _effective_weight(examples)[rows]
        z = [log_teacher_probs(t[rows]) for t in examples.teacher_probs]
        pooled = [z[k] for k in _pooled(examples)]
        # Classes without a label keep the teacher's probabilities, unless the
        # labels are a random sample.
        self.learned = np.arange(examples.num_classes)
        if pooled and not examples.random_sample:
            self.learned = np.unique(labels)
        classes = np.searchsorted(self.learned, labels)

        self.confidence = np.zeros(1)
        r = np.zeros((len(labels), len(self.learned)))
        if pooled:
            self.confidence = fit_step_1(
                pooled, classes, weight, self.learned, start, tick
            )
            r = step_1(pooled, self.confidence)[-1][:, self.learned]
        self.mean, self.whitening = whiten(z, weight)
        x = (np.concatenate(z, axis=1) - self.mean) @ self.whitening.T
        x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        self.problem = (r, np.exp(r), x, classes, weight)
        self.parameters = np.zeros(len(self.learned) * x.shape[1] + 2)

    def fit_step_2(self, penalty: float, bias_penalty: float) -> None:
        """Fit step 2, starting from the parameters of the previous fit.

        Args:
            penalty: the L2 penalty of all parameters but the biases.
            bias_penalty: the L2 penalty of the biases, the last column of W.
        """
        penalties = np.full(len(self.parameters), penalty)
        penalties[:-2].reshape(len(self.learned), -1)[:, -1] = bias_penalty
        self.parameters = scipy.optimize.minimize(
            step_2_objective,
            self.parameters,
            (*self.problem, penalties),
            jac=True,
            method="L-BFGS-B",
            options={"ftol": 1e-6, "gtol": 1e-4, "maxiter": 300},
        ).x

    def step_1(self) -> Correction:
        """Return the correction by temperature and epsilon only.

        It also changes classes without a label. With 50 to 100 labels of 100
        classes, keeping the probabilities of such classes cost .15 to .2 in
        NLL, because most of them are as over-confident as the other classes.
        """
        pooled = _pooled(self.examples)
        scales = np.exp(self.confidence[:-1]) / max(len(pooled), 1)
        return _correction(
            self.examples,
            dict(zip(pooled, scales, strict=True)),
            epsilon=np.expm1(self.confidence[-1]),
        )

    def both_steps(self) -> Correction:
        """Return the correction by both steps."""
        number = self.examples.num_classes
        w = np.zeros((number, len(self.whitening) + 1))
        w[self.learned] = self.parameters[:-2].reshape(len(self.learned), -1)
        matrix = w[:, :-1] @ self.whitening
        return dataclasses.replace(
            self.step_1(),
            matrix=matrix,
            bias=w[:, -1] - matrix @ self.mean,
            log_prob_weight=self.parameters[-2],
            prob_weight=self.parameters[-1],
            kept_classes=tuple(np.setdiff1d(np.arange(number), self.learned)),
        )


# ---- Step 1: temperatures and epsilon


def step_1(
    z: list[np.ndarray], confidence: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `t = softmax(sum_k s_k z_k)` and its proxy `q = u t`.

    Here `u_c = 1 / (nu - epsilon t_c)`, with nu the multiplier of the proxy
    teacher, as in `shared_proxy`.

    Args:
        z: the z of each of K teachers, `(N, C)`.
        confidence: `log(K s_k)` of each teacher, then `log(1 + epsilon)`. Zeros
            give the geometric mean of the uncorrected teachers.

    Returns:
        t, u and log q, each `(N, C)`.
    """
    scales = np.exp(confidence[:-1]) / len(z)
    pooled = np.tensordot(scales, np.stack(z), axes=1)
    epsilon = np.expm1(confidence[-1])
    t = softmax(pooled, axis=1)
    largest = t.max(axis=1, keepdims=True)
    q = shared_proxy(t, epsilon)
    nu = largest / q.max(axis=1, keepdims=True) + epsilon * largest
    u = 1.0 / (nu - epsilon * t)
    return t, u, log_softmax(log_softmax(pooled, axis=1) + np.log(u), axis=1)


def fit_step_1(
    z: list[np.ndarray],
    labels: np.ndarray,
    weight: np.ndarray,
    learned: np.ndarray,
    start: np.ndarray | None = None,
    tick: Callable[..., None] | None = None,
) -> np.ndarray:
    """Fit temperatures and epsilon; return `confidence`, see `step_1`.

    Args:
        z: the z of each teacher, `(N, C)`.
        labels: `(N,)`, indices of `learned`.
        weight: the weight of each example, `(N,)`.
        learned: the classes that have labels. The likelihood is conditional on
            these, because nothing is known about the other classes.
        start: the start parameters.
        tick: called after each iteration.
    """
    return scipy.optimize.minimize(
        step_1_objective,
        np.zeros(len(z) + 1) if start is None else start,
        (z, labels, weight, learned),
        jac=True,
        method="L-BFGS-B",
        bounds=[SCALE_BOUNDS] * len(z) + [EPSILON_BOUNDS],
        callback=tick,
    ).x


def step_1_objective(
    confidence: np.ndarray,
    z: list[np.ndarray],
    labels: np.ndarray,
    weight: np.ndarray,
    learned: np.ndarray,
) -> tuple[float, np.ndarray]:
    """Return the NLL of step 1 plus a standard normal prior, and its gradient.

    From `q_c = u_c t_c` and `sum_c q_c = 1`:

        d log q_c = (1 + epsilon q_c) d log t_c + u_c (t_c d epsilon - d nu)
    """
    t, u, log_q = step_1(z, confidence)
    q, epsilon = np.exp(log_q), np.expm1(confidence[-1])
    value, by_learned = _nll(log_q[:, learned], labels, weight)
    by_log_q = np.zeros_like(q)
    by_log_q[:, learned] = by_learned
    by_nu = np.sum(by_log_q * u, axis=1, keepdims=True)
    by_log_q -= q * by_nu / np.sum(q * u, axis=1, keepdims=True)
    by_log_t = by_log_q * (1.0 + epsilon * q)
    by_pooled = by_log_t - t * by_log_t.sum(axis=1, keepdims=True)
    scales = np.exp(confidence[:-1]) / len(z)
    gradient = confidence.copy()
    gradient[:-1] += scales * [np.vdot(by_pooled, z_k) for z_k in z]
    gradient[-1] += (1.0 + epsilon) * np.sum(by_log_q * u * t)
    return value + 0.5 * confidence @ confidence, gradient


# ---- Step 2: a ridge between classes


def whiten(
    z: list[np.ndarray], weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of z and A, for half-whitened features `A (z - mean)`.

    A has one block per teacher. The block is `S^(-1/4)` up to a rotation, where
    S is the covariance of the teacher's z, with eigenvalues raised to at least
    1e-3 of the largest. It is scaled so that the variances of a teacher's
    features sum to the teacher's number of classes. Directions without variance
    are left out; for example, a teacher may always give the same answer.

    Args:
        z: the z of each teacher, `(N, C_k)`.
        weight: the weight of each example, `(N,)`.
    """
    share = weight / weight.sum()
    means, blocks = [], []
    for z_k in z:
        mean = share @ z_k
        variance, axes = np.linalg.eigh((z_k - mean).T * share @ (z_k - mean))
        top = variance[-1]
        used = np.flatnonzero(variance > max(1e-9 * top, 1e-12))[-MAX_FEATURES:]
        scale = np.maximum(variance[used], 1e-3 * top) ** -0.25
        size = np.sum(scale**2 * variance[used]) / len(mean)
        means.append(mean)
        blocks.append((axes[:, used] * scale / np.sqrt(size or 1.0)).T)
    return np.concatenate(means), scipy.linalg.block_diag(*blocks)


def step_2_objective(
    parameters: np.ndarray,
    r: np.ndarray,
    exp_r: np.ndarray,
    x: np.ndarray,
    labels: np.ndarray,
    weight: np.ndarray,
    penalties: np.ndarray,
) -> tuple[float, np.ndarray]:
    """Return the NLL of step 2 plus its L2 penalty, and its gradient.

    Args:
        parameters: W, `(C, D)`, flat; then a_1 and a_2.
        r: log probabilities after step 1, `(N, C)`.
        exp_r: the probabilities after step 1, `(N, C)`.
        x: the features, `(N, D)`.
        labels: the true classes, `(N,)`.
        weight: the weight of each example, `(N,)`.
        penalties: L2 penalties, one per parameter.
    """
    w = parameters[:-2].reshape(r.shape[1], x.shape[1])
    a_1, a_2 = parameters[-2:]
    logits = x @ w.T
    logits += (1.0 + a_1) * r
    logits += a_2 * exp_r
    value, by_logits = _nll(logits, labels, weight)
    gradient = penalties * parameters
    value += 0.5 * gradient @ parameters
    gradient[:-2] += (by_logits.T @ x).ravel()
    gradient[-2:] += np.vdot(by_logits, r), np.vdot(by_logits, exp_r)
    return value, gradient


def _nll(
    logits: np.ndarray, labels: np.ndarray, weight: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return the weighted NLL of `softmax(logits)`, and its gradient."""
    rows = np.arange(len(labels))
    logits = logits - logits.max(axis=1, keepdims=True)
    own = logits[rows, labels]
    exp = np.exp(logits, out=logits)
    total = exp.sum(axis=1)
    value = weight @ (np.log(total) - own)
    exp *= (weight / total)[:, None]
    exp[rows, labels] -= weight
    return float(value), exp


# ---- Cross-validation


def _folds(examples: Examples) -> list[np.ndarray]:
    """Return splits: for each split, the fold of every example, `(N,)`.

    There are 5 folds, or 10 for fewer than 300 examples. If there are fewer
    than 200 examples, the cross-validation split is repeated two to four times,
    because with so few examples the score depends on the split. The folds are
    not stratified: if all folds had the same shares of the classes, biases
    fitted to few labels would look too good.
    """
    number = len(examples.labels)
    count = 5 if number >= 300 else min(10, number)
    repeats = min(4, -(-200 // number))
    seeds = range(examples.seed, examples.seed + repeats)
    return [np.random.default_rng(s).permutation(number) % count for s in seeds]


def _effective_weight(examples: Examples) -> np.ndarray:
    """Return weights whose sum is the effective number of examples.

    This number is `(sum w)^2 / sum w^2`; for equal weights, it is N.
    """
    w = examples.sample_weight
    return w * (w.sum() / np.sum(w**2))


def _losses(probs: np.ndarray, examples: Examples) -> np.ndarray:
    """Return the NLL of each example times its weight, `(N,)`.

    Args:
        probs: `(N, C)`, or `(splits, N, C)` to average over splits.
        examples: the labelled examples.
    """
    nll = negative_log_likelihood(probs, examples.labels)
    splits = nll.reshape(-1, len(examples.labels))
    return examples.sample_weight * splits.mean(axis=0)


def _strongest(losses: np.ndarray) -> int:
    """Return the index of the first row with a mean close to the lowest mean.

    Close means within `ERRORS_ALLOWED` standard errors of the difference, as
    in Breiman et al. (1984).

    Args:
        losses: `(penalties, N)`, strong penalties first.
    """
    excess = losses - losses[np.argmin(losses.mean(axis=1))]
    error = excess.std(axis=1) / np.sqrt(losses.shape[1])
    return int(np.argmax(excess.mean(axis=1) <= ERRORS_ALLOWED * error))


# ---- Teachers and notes


def _pooled(examples: Examples) -> list[int]:
    """Return the teachers in step 1: those that have the student's classes."""
    return [
        k
        for k, t in enumerate(examples.teacher_probs)
        if t.shape[1] == examples.num_classes
    ]


def _correction(
    examples: Examples, scales: dict[int, float], epsilon: float = 0.0
) -> Correction:
    """Return a correction with these scales, 1 / temperature, of teachers."""
    counts = tuple(t.shape[1] for t in examples.teacher_probs)
    temperature = [
        1.0 / scales[k] if k in scales else np.inf for k in range(len(counts))
    ]
    if len(counts) == 1:
        return Correction(epsilon, temperature[0])
    return Correction(epsilon, temperature, teacher_classes=counts)


def _correct(
    correction: Correction, teacher_probs: list[np.ndarray]
) -> np.ndarray:
    one = len(teacher_probs) == 1
    outputs = teacher_probs[0] if one else teacher_probs
    return correction.correct(outputs, verbose=0)


def _teachers_as_they_are(examples: Examples) -> dict[str, Correction]:
    """Return corrections that use one teacher unchanged, the best one first."""
    best_first = sorted(
        _pooled(examples),
        key=lambda k: _losses(examples.teacher_probs[k], examples).mean(),
    )
    several = len(examples.teacher_probs) > 1
    return {
        f"teacher {k}" if several else "teacher": _correction(
            examples, {k: 1.0}
        )
        for k in best_first
    }


def _notes(
    examples: Examples, chosen: str, confidence: np.ndarray
) -> tuple[str, ...]:
    """Return notes for the user about the result."""
    notes = []
    if any(
        np.all(examples.teacher_probs[k].argmax(axis=1) == examples.labels)
        for k in _pooled(examples)
    ):
        notes.append(
            "The teacher makes no mistakes on these examples, so there is "
            "little to learn from. Label more examples."
        )
    if not chosen.startswith("teacher"):
        low, high = np.transpose(
            [SCALE_BOUNDS] * (len(confidence) - 1) + [EPSILON_BOUNDS]
        )
        at_bound = (confidence <= low) | (confidence >= high)
        names = [
            name
            for name, at in (
                ("temperature", at_bound[:-1].any()),
                ("epsilon", at_bound[-1]),
            )
            if at
        ]
        if names:
            notes.append(
                f"{' and '.join(names).capitalize()} ended at a bound of the "
                "search. Check the order of the classes, and check that the "
                "teacher outputs and labels belong to the same examples."
            )
    if (
        chosen == BOTH_STEPS
        and max(t.shape[1] for t in examples.teacher_probs) > MAX_FEATURES
    ):
        notes.append(
            "The correction between classes was restricted to a matrix of rank "
            f"{MAX_FEATURES}, because a teacher has more than {MAX_FEATURES} "
            "classes."
        )
    return tuple(notes)
