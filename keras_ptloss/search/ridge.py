"""The default search: temperature and epsilon, then a ridge between classes.

    z_k    = log max(t_k, 1e-7)                            of teacher k
    r      = log proxy(softmax(sum_k z_k / temperature_k), epsilon)     step 1
    logits = r + W [1, A_1 (z_1 - mu_1), A_2 (z_2 - mu_2), ...]         step 2

Step 1 has one parameter per teacher and epsilon. Step 2 is a multinomial
logistic regression on the teachers' half-whitened log probabilities, with r as
its offset and an L2 penalty on all of W. Cross-validation chooses the penalty,
and whether the teacher as it is, step 1 or both steps are best.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import scipy.optimize
import scipy.special

from keras_ptloss._math import log_teacher_probs, shared_proxy
from keras_ptloss.correction import Correction
from keras_ptloss.search.method import Examples, Found

# Bounds of log(scale) and of log(1 + epsilon) in step 1.
SCALE_BOUNDS = (-4.0, 4.0)
EPSILON_BOUNDS = (-5.0, 4.0)

# L2 penalties of step 2, strong ones first: each fit starts from the one before.
PENALTIES = tuple(10.0**power for power in np.arange(3.0, -2.0, -0.5))

# Above this number of parameters step 2 has one scale and bias per class.
MAX_PARAMETERS = 250_000

TEACHER, STEP_1, BOTH = "teacher", "temperature and epsilon", "corrected"


@dataclasses.dataclass(frozen=True)
class RidgeSearch:
    """Correct the teacher's confidence, then its confusions between classes.

    Args:
        steps: 1 stops after temperature and epsilon, so that `PTLoss` itself
            is all that is needed. 2 also corrects each class.

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
        >>> search.search(overconfident, labels).temperature > 1.5
        True
    """

    steps: Literal[1, 2] = 2

    name = "ridge"

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.steps not in (1, 2):
            raise ValueError(f"`steps` must be 1 or 2. Received: steps={self.steps!r}")

    def run(self, examples: Examples, progress: Any) -> Found:
        """Search on the examples.

        Args:
            examples: the labelled examples.
            progress: `progress(done, total)` is called after each penalty.

        Returns:
            What was found. `out_of_fold` has the candidates: each teacher as it
            is, step 1, and both steps with the best penalty.
        """
        labels, classes = examples.labels, examples.num_classes
        number = len(labels)
        everything = _Fit(examples, np.ones(number, bool))
        folds = _folds(number, examples.seed)
        fits = [
            _Fit(examples, folds != k, start=everything.confidence)
            for k in range(folds.max() + 1)
        ]

        def out_of_fold(
            corrections: Callable[[_Fit], Correction],
        ) -> np.ndarray:
            probs = np.empty((number, classes))
            for k, fit in enumerate(fits):
                held_out = folds == k
                probs[held_out] = _correct(
                    corrections(fit),
                    [t[held_out] for t in examples.teacher_probs],
                )
            return probs

        several = len(examples.teacher_probs) > 1
        corrections = {
            f"{TEACHER} {k}" if several else TEACHER: _one_teacher(examples, k)
            for k in _pooled(examples)
        }
        candidates = {
            name: _correct(correction, examples.teacher_probs)
            for name, correction in corrections.items()
        }
        total = 1 + len(PENALTIES)
        if corrections:
            candidates[STEP_1] = out_of_fold(_Fit.step_1)
            corrections[STEP_1] = everything.step_1()
        progress(1, total)

        nll = {name: _nll(q, examples) for name, q in candidates.items()}
        trials = {"candidate": list(nll), "penalty": [np.nan] * len(nll)}
        if self.steps == 2 or not corrections:
            path: list[tuple[float, np.ndarray]] = []
            for done, penalty in enumerate(PENALTIES, start=2):
                for fit in fits:
                    fit.fit(penalty)
                q = out_of_fold(_Fit.both_steps)
                path.append((_nll(q, examples), q))
                progress(done, total)
                losses = [loss for loss, _ in path]
                if len(losses) > 2 and min(losses[-2:]) > min(losses[:-2]):
                    break
            best = _typical(np.array(losses))
            for penalty in PENALTIES[: best + 1]:
                everything.fit(penalty)
            corrections[BOTH] = everything.both_steps()
            nll[BOTH], candidates[BOTH] = path[best]
            trials["candidate"] += [BOTH] * len(path)
            trials["penalty"] += PENALTIES[: len(path)]
            trials["score"] = [*list(nll.values())[:-1], *losses]
        else:
            trials["score"] = list(nll.values())
        progress(total, total)
        chosen = _choose(nll)
        return Found(
            correction=corrections[chosen],
            trials=trials,
            out_of_fold=candidates,
            chosen=chosen,
            notes=(),
        )


class _Fit:
    """Both steps, fitted to some rows of the examples."""

    def __init__(self, examples: Examples, rows: np.ndarray, start: Any = None):
        self.examples = examples
        self.probs = [t[rows] for t in examples.teacher_probs]
        self.z = [log_teacher_probs(t) for t in self.probs]
        self.labels = examples.labels[rows]
        self.weight = examples.sample_weight[rows]
        self.pool = _pooled(examples)
        classes = np.arange(examples.num_classes)
        self.learned = (
            classes if examples.random_sample else np.unique(examples.labels)
        )
        z = [self.z[k] for k in self.pool]
        x0 = np.zeros(len(z) + 1) if start is None else start
        bounds = [SCALE_BOUNDS] * len(z) + [EPSILON_BOUNDS]
        self.confidence = x0
        if z:
            self.confidence = scipy.optimize.minimize(
                _confidence_loss,
                x0,
                (z, self.labels, self.weight, self.learned),
                jac=True,
                method="L-BFGS-B",
                bounds=bounds,
            ).x
        self.white = [_whitening(z_k, self.weight) for z_k in self.z]
        self.coefficients = None

    def step_1(self):
        n = len(self.pool)
        s = np.exp(self.confidence[:-1]) / max(n, 1)
        temperature = np.full(len(self.z), np.inf)
        temperature[self.pool] = 1 / s
        kept = np.setdiff1d(
            np.arange(self.examples.num_classes), self.learned
        )
        counts = tuple(t.shape[1] for t in self.probs)
        return Correction(
            epsilon=np.exp(self.confidence[-1]) - 1.0,
            temperature=temperature if len(temperature) > 1 else temperature[0],
            kept_classes=tuple(kept) if self.pool else (),
            teacher_classes=counts,
            bias=None if self.pool else np.zeros(self.examples.num_classes),
        )

    def fit(self, penalty: float) -> None:
        step_1 = dataclasses.replace(self.step_1(), kept_classes=())
        r = np.log(np.maximum(_correct(step_1, self.probs), 1e-300))
        offset = r[:, self.learned]
        index = np.full(self.examples.num_classes, -1)
        index[self.learned] = np.arange(len(self.learned))
        x = np.concatenate(
            [np.ones((len(r), 1))]
            + [(z - mu) @ a for z, (mu, a) in zip(self.z, self.white, strict=True)],
            axis=1,
        )
        shape = (len(self.learned), x.shape[1])
        scale = 1 / np.sqrt(penalty)
        y = index[self.labels]

        def loss(u):
            w = u.reshape(shape) * scale
            logits = offset + x @ w.T
            log_q = logits - scipy.special.logsumexp(logits, 1, keepdims=True)
            g = np.exp(log_q) * self.weight[:, None]
            g[np.arange(len(y)), y] -= self.weight
            value = -self.weight @ log_q[np.arange(len(y)), y]
            return value + 0.5 * u @ u, (g.T @ x * scale).ravel() + u

        start = (
            np.zeros(shape) if self.coefficients is None else self.coefficients
        )
        self.coefficients = (
            scipy.optimize.minimize(
                loss,
                start.ravel() / scale,
                jac=True,
                method="L-BFGS-B",
                options={"ftol": 1e-7, "maxiter": 300},
            ).x.reshape(shape)
            * scale
        )

    def both_steps(self):
        classes = self.examples.num_classes
        w = np.zeros((classes, self.coefficients.shape[1]))
        w[self.learned] = self.coefficients
        matrix, bias, start = [], w[:, 0].copy(), 1
        for mu, a in self.white:
            block = w[:, start : start + a.shape[1]] @ a.T
            bias -= block @ mu
            matrix.append(block)
            start += a.shape[1]
        return dataclasses.replace(
            self.step_1(), matrix=np.concatenate(matrix, axis=1), bias=bias
        )


def _pooled(examples):
    return [
        k
        for k, t in enumerate(examples.teacher_probs)
        if t.shape[1] == examples.num_classes
    ]


def _one_teacher(examples, k):
    several = len(examples.teacher_probs) > 1
    temperature = np.full(len(examples.teacher_probs), np.inf)
    temperature[k] = 1.0
    return Correction(
        temperature=temperature if several else 1.0,
        teacher_classes=tuple(t.shape[1] for t in examples.teacher_probs),
    )


def _correct(correction, probs):
    return correction.correct(probs if len(probs) > 1 else probs[0])


def _nll(q, examples):
    own = q[np.arange(len(q)), examples.labels]
    return float(
        -examples.sample_weight @ np.log(np.maximum(own, 1e-7)) / len(q)
    )


def _folds(number, seed):
    folds = np.arange(number) % min(10 if number <= 200 else 5, number)
    return np.random.default_rng(seed).permutation(folds)


def _typical(losses):
    return int(np.argmin(losses))


def _choose(nll):
    return min(nll, key=nll.__getitem__)


def _confidence_loss(theta, z, labels, weight, learned):
    s = np.exp(theta[:-1]) / len(z)
    epsilon = np.exp(theta[-1]) - 1.0

    def value(theta):
        s = np.exp(theta[:-1]) / len(z)
        t = scipy.special.softmax(sum(a * b for a, b in zip(s, z)), axis=1)
        q = shared_proxy(t, np.exp(theta[-1]) - 1.0)
        own = q[np.arange(len(q)), labels] / q[:, learned].sum(axis=1)
        return -weight @ np.log(own) + theta @ theta / 2

    base = value(theta)
    gradient = np.array(
        [
            (value(theta + 1e-5 * e) - value(theta - 1e-5 * e)) / 2e-5
            for e in np.eye(len(theta))
        ]
    )
    return base, gradient


def _whitening(z, weight, floor=1e-3):
    p = weight / weight.sum()
    mu = p @ z
    c = z - mu
    s = (c * p[:, None]).T @ c
    values, vectors = np.linalg.eigh(s)
    if values[-1] < 1e-9:
        return mu, np.zeros((z.shape[1], 0))
    a = (vectors * np.maximum(values, floor * values[-1]) ** -0.25) @ vectors.T
    return mu, a / np.sqrt(np.sum((a @ s) * a) / len(values))
