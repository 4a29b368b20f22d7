"""Rivals: calibrations of the teacher, and losses that expect wrong labels."""

import jax
import numpy as np
import scipy.optimize
from keras import ops
from scipy.special import log_softmax, softmax


def temperature_scaling(teacher_probs, labels, held_out):
    """Return `softmax(z / T)` of other rows (Guo et al. 2017)."""
    s = _inverse_temperature(np.log(np.maximum(teacher_probs, 1e-7)), labels)
    return softmax(s * np.log(np.maximum(held_out, 1e-7)), axis=1)


def structured_matrix_scaling(teacher_probs, labels, held_out):
    """Return `softmax(s (I + D) z + b)` of other rows (Berta et al. 2025).

    s is temperature scaling. D and b minimise the mean NLL plus

        C / N (sum_c D_cc^2 + b_c^2 + (C - 1) sum_{c != k} D_ck^2)

    (https://arxiv.org/abs/2511.03685). get_calibrator("sms") of probmetrics
    1.3.0 gave the same NLL to .001 on two of the CIFAR-10 teachers with 1,000
    labels; the package needs PyTorch.
    """
    z = np.log(np.maximum(teacher_probs, 1e-7))
    number, classes = z.shape
    s = _inverse_temperature(z, labels)
    z = s * z
    ridge = np.full((classes, classes + 1), classes * (classes - 1) / number)
    ridge[:, -1] = ridge[range(classes), range(classes)] = classes / number
    features = np.concatenate([z, np.ones((number, 1))], axis=1)

    def objective(flat):
        d = flat.reshape(classes, classes + 1)
        log_q = log_softmax(z + features @ d.T, axis=1)
        slope = np.exp(log_q)
        slope[range(number), labels] -= 1.0
        value = -log_q[range(number), labels].mean() + np.sum(ridge * d**2)
        return value, (slope.T @ features / number + 2 * ridge * d).ravel()

    flat = scipy.optimize.minimize(
        objective, np.zeros(ridge.size), jac=True, method="L-BFGS-B"
    ).x
    d = flat.reshape(classes, classes + 1)
    z = s * np.log(np.maximum(held_out, 1e-7))
    return softmax(z + z @ d[:, :-1].T + d[:, -1], axis=1)


def _inverse_temperature(z, labels):
    def nll(log_s):
        log_q = log_softmax(np.exp(log_s) * z, axis=1)
        return -log_q[range(len(z)), labels].mean()

    bounds = np.log([0.02, 20.0])
    found = scipy.optimize.minimize_scalar(
        nll, bounds=bounds, method="bounded", options={"xatol": 1e-6}
    )
    return np.exp(found.x)


def students(teacher_probs, labels, labels_only):
    """Yield `(method, targets, loss)` of students; loss None is cross-entropy.

    Labelled rows have their true label as target.

    Args:
        teacher_probs: `(N, C)`.
        labels: `(N,)`, -1 where unknown.
        labels_only: probabilities `(N, C)` of a model of the labels alone.
    """
    known = labels >= 0
    few, true = teacher_probs[known], labels[known]
    onehot = np.eye(teacher_probs.shape[1])

    def with_labels(targets):
        return np.where(known[:, None], onehot[labels], targets)

    matrix = structured_matrix_scaling(few, true, teacher_probs)
    yield "matrix", with_labels(matrix), None
    yield "pseudo", with_labels(onehot[labels_only.argmax(axis=1)]), None
    # Li et al. 2017 (https://arxiv.org/abs/1703.02391).
    yield "mixture", with_labels((teacher_probs + labels_only) / 2), None
    hard = with_labels(onehot[teacher_probs.argmax(axis=1)])
    yield "generalized", hard, generalized_cross_entropy
    yield "symmetric", hard, symmetric_cross_entropy
    of_teacher = teacher_probs * ~known[:, None]
    of_labels = onehot[labels] * known[:, None]
    both = np.concatenate([of_teacher, of_labels], axis=1)
    yield "forward", both, forward_correction(few, true)


# --- Losses that expect wrong labels -----------------------------------------
#
# `loss(targets, probs)` is one value per row; both are (N, C).


def generalized_cross_entropy(targets, probs):
    """Return `(1 - p_y^q) / q` with q = 0.7 (Zhang and Sabuncu 2018)."""
    own = ops.sum(targets * probs, axis=-1)
    return (1 - (own + 1e-9) ** 0.7) / 0.7


def symmetric_cross_entropy(targets, probs):
    """Return a cross-entropy and its reverse, log 0 = -4 (Wang et al. 2019).

    The weights are the paper's for CIFAR-10 and, with many classes, CIFAR-100.
    """
    alpha, beta = (0.1, 1.0) if targets.shape[-1] < 50 else (6.0, 0.1)
    forward = -ops.sum(targets * ops.log(probs + 1e-9), axis=-1)
    backward = 4 * (1 - ops.sum(targets * probs, axis=-1))
    return alpha * forward + beta * backward


def forward_correction(teacher_probs, labels):
    """Return a loss whose targets are the teacher's outputs and true labels.

    Row c of the transition matrix is the mean output of the teacher on the
    labelled rows of class c (Patrini et al. 2017; Hendrycks et al. 2018), or
    one-hot for a class without labels. The targets are `(N, 2 C)`: the
    teacher's outputs where the label is unknown, then the one-hot labels where
    it is known; zeros elsewhere.
    """
    transition = np.eye(teacher_probs.shape[1])
    for c in np.unique(labels):
        transition[c] = teacher_probs[labels == c].mean(axis=0)

    def loss(targets, probs):
        of_teacher, true = ops.split(targets, 2, axis=-1)
        moved = ops.matmul(probs, ops.cast(transition, probs.dtype))
        return -ops.sum(
            of_teacher * ops.log(moved + 1e-9) + true * ops.log(probs + 1e-9),
            axis=-1,
        )

    return loss


def value_and_slope(loss, targets, weight):
    """Return `f(logits)`: the weighted sum of a loss, and its gradient."""

    def total(logits):
        probs = ops.softmax(logits, axis=-1)
        return ops.sum(weight * loss(targets, probs))

    compiled = jax.jit(jax.value_and_grad(total))

    def in_float64(logits):
        with jax.enable_x64(True):
            value, slope = compiled(logits)
        return float(value), np.asarray(slope)

    return in_float64
