"""Fit the coefficients of PTLoss to labels, with the exact gradient."""

import dataclasses
from typing import Any

import numpy as np
import scipy.optimize

from keras_ptloss._validation import check_count, check_flag, check_number
from keras_ptloss.correction import Correction
from keras_ptloss.proxy import epsilon_gradient, solve_rows
from keras_ptloss.search.method import Examples, Found
from keras_ptloss.search.random_search import kept_classes, one_teacher

# The upper bound of epsilon, as in the paper's search space.
HIGHEST = 10.0


@dataclasses.dataclass(frozen=True)
class GradientSearch:
    """Minimise the negative log-likelihood of the labels over epsilon.

    The likelihood is that of the proxy teacher's probabilities. Its gradient
    with respect to epsilon is exact. SciPy's L-BFGS-B starts at `epsilon = 0`,
    which is the teacher itself, with bounds `-1/m <= epsilon_m <= 10`.

    Unlike the default search, this search does not fit a temperature and does
    not cross-validate. Use it to find the best coefficients of a given order.

    The result's `trials` has one entry in the columns `order`, `score`,
    `unconverged` (rows on which the solver did not converge) and `epsilon`.

    Args:
        order: number of coefficients M.
        per_class: whether each class has its own coefficients. Only such
            coefficients can move probability from one class to another, so only
            they can correct a teacher that is biased towards a class. Classes
            without a label then keep the teacher's probabilities, unless the
            labels are a random sample.
        penalty: weight of the sum of squares of epsilon, at least 0. With
            `per_class`, the sum is divided by the number of classes.

    Raises:
        ValueError: if an argument is invalid.

    Example:
        >>> import numpy as np
        >>> from keras_ptloss import ProxyTeacherSearch
        >>> rng = np.random.default_rng(0)
        >>> truth = rng.dirichlet([1.0, 1.0, 1.0], size=300)
        >>> labels = np.array([rng.choice(3, p=row) for row in truth])
        >>> teacher_probs = truth * [1.0, 0.6, 0.6]  # biased to class 0
        >>> teacher_probs /= teacher_probs.sum(axis=1, keepdims=True)
        >>> search = ProxyTeacherSearch(GradientSearch(order=1, per_class=True))
        >>> result = search.search(teacher_probs, labels, verbose=0)
        >>> result.score < result.baseline_score
        True

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), §4.2.
    """

    order: int = 1
    per_class: bool = False
    penalty: float = 0.0

    name = "gradient"

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_count("order", self.order)
        check_flag("per_class", self.per_class)
        check_number("penalty", self.penalty, at_least=0.0)

    def run(self, examples: Examples, progress: Any) -> Found:
        """Search on the examples."""
        t = one_teacher(examples, self.name)
        num_classes = t.shape[1]
        kept = kept_classes(examples) if self.per_class else ()
        shape = (num_classes, self.order) if self.per_class else (self.order,)
        weight = examples.sample_weight / len(t)
        one_hot = np.eye(num_classes)[examples.labels]
        fitted = np.ones(num_classes)
        fitted[list(kept)] = 0.0
        penalty = self.penalty / (num_classes if self.per_class else 1)
        unconverged = evaluations = 0

        def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
            nonlocal unconverged, evaluations
            epsilon = x.reshape(shape)
            q, converged, _ = solve_rows(t, epsilon)
            unconverged = int(np.count_nonzero(~converged))
            evaluations += 1
            progress(evaluations, max(evaluations + 1, 20))
            # Kept classes do not depend on epsilon. The likelihood is therefore
            # conditional on the label being one of the other classes.
            q_label = np.maximum(np.sum(q * one_hot, axis=1), 1e-7)
            total = np.maximum(q @ fitted, 1e-7)
            value = np.sum(weight * (np.log(total) - np.log(q_label)))
            by_q = fitted / total[:, None] - one_hot / q_label[:, None]
            gradient = epsilon_gradient(t, q, epsilon, weight[:, None] * by_q)
            gradient += 2.0 * penalty * epsilon
            return value + penalty * np.sum(x**2), gradient.ravel()

        lower = np.broadcast_to(-1.0 / np.arange(1, self.order + 1), shape)
        end = scipy.optimize.minimize(
            value_and_gradient,
            np.zeros(lower.size),
            jac=True,
            method="L-BFGS-B",
            bounds=scipy.optimize.Bounds(lower.ravel(), HIGHEST),
            options={"maxiter": 2000, "ftol": 1e-14, "gtol": 1e-8},
        )
        score, _ = value_and_gradient(end.x)
        epsilon = end.x.reshape(shape)
        return Found(
            correction=Correction(epsilon, kept_classes=kept),
            trials={
                "order": [self.order],
                "score": [score],
                "unconverged": [unconverged],
                "epsilon": [epsilon],
            },
            chosen="epsilon",
            notes=_notes(epsilon),
        )


def _notes(epsilon: np.ndarray) -> tuple[str, ...]:
    """Return a note on coefficients that ended at a bound."""
    lower = -1.0 / np.arange(1, epsilon.shape[-1] + 1)
    at_bound = np.isclose(epsilon, lower) | np.isclose(epsilon, HIGHEST)
    if not at_bound.any():
        return ()
    return (
        f"{np.count_nonzero(at_bound)} of {epsilon.size} coefficients ended at "
        f"a bound, -1/m or {HIGHEST:g}: epsilon alone cannot correct this "
        'teacher. The default method, "ridge", also fits a temperature and a '
        "correction between classes.",
    )
