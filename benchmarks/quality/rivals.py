"""Other corrections of a teacher from the same labels, in NumPy and SciPy.

Each takes the teacher's rows `(N, C)`, their labels `(N,)` and other rows of
the teacher, and returns these corrected.
"""

import numpy as np
import scipy.optimize
import scipy.special

from keras_ptloss._calibration import log_probabilities
from keras_ptloss.search._folds import random_folds
from keras_ptloss.search._objectives import nll

# Weights of ODIR that are tried off the diagonal; then, beside the best, those
# of the intercept, as its shares; then half a power of ten around the best.
WEIGHTS = tuple(10.0**power for power in range(5, -2, -1))
SHARES = (0.1, 0.01, 0.001, 0.0001)
FOLDS = 5

# Steps of the EM of Gold Loss Correction; its likelihood stands still by then.
STEPS = 300

# Measured apart: their package needs PyTorch and Numba.
AUTHORS = """
## Structured matrix scaling by its authors

`get_calibrator("sms")` of probmetrics 1.3.0, on the same 1,000 rows (subset 0,
1): held-out NLL on `resnet50_symfrac0_6_noise0_4` .6921, .6911 (here .6866,
.6870), on `resnet50_symfrac0_0_noise0_0` .4514, .4512 (here .4511, .4514), on
CIFAR-100 1.1473 (here 1.1481). It differs in the temperature before the matrix:
theirs is fitted with a share of the uniform distribution mixed in. From their
temperature-scaled logits `fit_linear` at a penalty of 1 finds their matrix to
.004 and .0005, and their NLL to .0001."""


def dirichlet(
    rows: np.ndarray, labels: np.ndarray, held_out: np.ndarray, seed: int
) -> np.ndarray:
    """Dirichlet calibration with ODIR (Kull et al. 2019).

    `softmax(W log t + b)` from `W = I`, on the negative log-likelihood plus

        weight mean_{c != k} W_ck^2 + share weight mean_c b_c^2

    the off-diagonal and intercept regularisation, both weights chosen by 5-fold
    cross-validation (https://arxiv.org/abs/1910.12656).
    """
    z = log_probabilities(rows)
    fold = random_folds(len(labels), FOLDS, seed)
    scores: dict[tuple[float, float], float] = {}
    begins: list[np.ndarray | None] = [None] * FOLDS

    def best_of(pairs: list[tuple[float, float]]) -> tuple[float, float]:
        for pair in pairs:
            held = np.empty_like(rows)
            for k in range(FOLDS):
                inside = fold != k
                begins[k] = _odir(z[inside], labels[inside], pair, begins[k])
                held[~inside] = _linear(begins[k], z[~inside])
            scores[pair] = float(nll(held, labels))
        return min(scores, key=scores.__getitem__)

    weight, share = best_of([(weight, 1.0) for weight in WEIGHTS])
    weight, share = best_of([(weight, share) for share in SHARES])
    best = best_of([(weight * 10**0.5, share), (weight / 10**0.5, share)])
    return _linear(_odir(z, labels, best), log_probabilities(held_out))


def _odir(
    z: np.ndarray,
    labels: np.ndarray,
    weights: tuple[float, float],
    begin: np.ndarray | None = None,
) -> np.ndarray:
    """Fit `W` and `b` at a weight and share; return them in one vector."""
    count, classes = z.shape
    weight, share = weights
    of_bias = weight * share / classes
    one_hot = np.eye(classes)[labels]
    ridge = np.full((classes, classes), weight / (classes * (classes - 1)))
    np.fill_diagonal(ridge, 0.0)

    def function(vector: np.ndarray) -> tuple[float, np.ndarray]:
        w = vector[:-classes].reshape(classes, classes)
        b = vector[-classes:]
        log_q = scipy.special.log_softmax(z @ w.T + b, axis=1)
        slope = (np.exp(log_q) - one_hot) / count
        value = -np.sum(one_hot * log_q) / count + np.sum(ridge * w * w)
        value += of_bias * b @ b
        by_w = slope.T @ z + 2.0 * ridge * w
        by_b = slope.sum(axis=0) + 2.0 * of_bias * b
        return value, np.concatenate([by_w.ravel(), by_b])

    if begin is None:
        begin = np.concatenate([np.eye(classes).ravel(), np.zeros(classes)])
    options = {"maxiter": 500, "ftol": 1e-9, "gtol": 1e-6}
    found = scipy.optimize.minimize(
        function, begin, jac=True, method="L-BFGS-B", options=options
    )
    return np.asarray(found.x)


def _linear(vector: np.ndarray, z: np.ndarray) -> np.ndarray:
    classes = z.shape[1]
    w = vector[:-classes].reshape(classes, classes)
    return scipy.special.softmax(z @ w.T + vector[-classes:], axis=1)


def confusion_matrix(
    rows: np.ndarray, labels: np.ndarray, held_out: np.ndarray, seed: int
) -> np.ndarray:
    """`q_c = sum_k t_k P(c | k)`: what the teacher's classes are in truth.

    `P(c | k)` is the share of label `c` among the rows, weighed by `t_k`; a
    class that the teacher never names stands for itself.
    """
    classes = np.eye(rows.shape[1])
    joint = rows.T @ classes[labels] + 1e-12 * classes
    return held_out @ (joint / joint.sum(axis=1, keepdims=True))


def gold_loss_correction(
    rows: np.ndarray, labels: np.ndarray, held_out: np.ndarray, seed: int
) -> np.ndarray:
    """Gold Loss Correction (Hendrycks et al. 2018), for soft labels.

    `P(k | c)` is the teacher's mean row among the labels `c`; the student `p`
    minimises `-sum_k t_k log (sum_c p_c P(k | c))`, and ends, row by row, at
    the `p` that is returned: the maximum of a likelihood, found by EM
    (https://arxiv.org/abs/1802.05300). A class without a label is taken for
    itself.
    """
    classes = rows.shape[1]
    of_label = np.eye(classes)
    for c in np.unique(labels):
        of_label[c] = rows[labels == c].mean(axis=0)
    p = np.full_like(held_out, 1.0 / classes)
    for _ in range(STEPS):
        # A class that the teacher never names has a share of 0 in `t` too.
        ratio = held_out / np.maximum(p @ of_label, 1e-300)
        p *= ratio @ of_label.T
    return p / p.sum(axis=1, keepdims=True)
