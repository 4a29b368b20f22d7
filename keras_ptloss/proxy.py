"""The proxy teacher, to which a student converges under PTLoss (Eq. 8).

For each example the proxy teacher `q` minimises PTLoss over the student. With
`h` the slope of the perturbation, it is the solution of

    w_c = t_c (1 + q_c h_c(q_c)),    q_c = w_c / nu,    sum_c q_c = 1.
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import keras
import numpy as np
import scipy.optimize
import scipy.special
from keras import ops

from keras_ptloss._backend import (
    compiled_on_jax,
    has_no_values,
    maximum,
    minimum,
    on_numpy,
)
from keras_ptloss._math import (
    curvature,
    perturbation,
    shared_proxy,
    slope,
    two_events,
)
from keras_ptloss._progress import Verbose, track
from keras_ptloss._validation import (
    as_probabilities,
    check_choice,
    check_constant_epsilon,
    fail,
    valid_probs,
)

__all__ = ["ProxyTeacher", "ProxyTeacherResult", "proxy_teacher"]

Tensor = Any

MAX_STEPS = 60
ROWS_AT_ONCE = 1024  # A fixed size, so that the solver is compiled only once.
FSOLVE_TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class ProxyTeacherResult:
    """Proxy teachers, and whether the solver converged on each row.

    Attributes:
        probabilities: the proxy teachers, `(N, ..., C)`, float64.
        converged: whether the solver converged, `(N, ...)`. If not, the row
            holds the best point found. With Newton's method, the loss at this
            point is never above the loss at the teacher itself.
        steps: number of steps of the solver, `(N, ...)`; 0 for the closed form.
        solver: `"newton"` or `"fsolve"`.
    """

    probabilities: np.ndarray
    converged: np.ndarray
    steps: np.ndarray
    solver: str

    def __str__(self) -> str:
        """Return one line: whether the solver converged and, if not, advice."""
        text = f"{self.converged.size} proxy teachers by {self.solver}"
        if self.converged.all():
            return f"{text}, all converged"
        advice = {
            "fsolve": 'use solver="newton"',
            "newton": "use epsilon_m >= -1/m, where the loss is convex",
        }
        missed = np.count_nonzero(~self.converged)
        return f"{text}, {missed} did not converge: {advice[self.solver]}"


def proxy_teacher(
    teacher_probs: Any,
    epsilon: Any,
    *,
    solver: Literal["newton", "fsolve"] = "newton",
    verbose: Verbose = "auto",
) -> ProxyTeacherResult:
    """Compute the distribution to which a student converges under PTLoss.

        q = argmin_q sum_c t_c (-log q_c + sum_m epsilon_{c,m} (1 - q_c)^m)

    If `epsilon_m >= -1/m` for every m, the loss is convex and has one minimum.
    Otherwise, the solver returns a minimum that it can reach from the teacher.

    Args:
        teacher_probs: the teacher's probabilities, `(N, ..., C)`, or
            `(N, ..., 1)` for the probability of the second of two classes.
        epsilon: coefficients: a number (order 1), `(M,)` shared by the classes,
            or `(C, M)` per class.
        solver: `"newton"` solves all rows together in float64, by Newton's
            method or, for one shared coefficient, by a closed form.
            `"fsolve"` is the paper's solver (Appendix A.3), one call of
            `scipy.optimize.fsolve` per row. It is slow and fails on some rows;
            use it as a reference.
        verbose: 1 shows a progress bar, 0 does not; "auto" shows it after two
            seconds.

    Returns:
        A `ProxyTeacherResult`.

    Example:
        >>> result = proxy_teacher([[0.7, 0.2, 0.1]], [2.0, 0.5])
        >>> result.probabilities.round(3)
        array([[0.838, 0.113, 0.049]])
        >>> bool(result.converged.all())
        True

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), §4.2.
    """
    check_choice("solver", solver, ("newton", "fsolve"))
    name, advice = "teacher_probs", "apply a softmax to them first"
    t = as_probabilities(name, teacher_probs, False, advice)
    if t.ndim < 2:
        fail(name, "of shape (examples, ..., classes)", teacher_probs)
    epsilon = check_constant_epsilon(epsilon, classes=t.shape[-1])
    rows = t.reshape(-1, t.shape[-1])
    solve = _solve_fsolve if solver == "fsolve" else solve_rows
    q, converged, steps = solve(rows, epsilon, verbose)
    return ProxyTeacherResult(
        probabilities=q.reshape(t.shape),
        converged=converged.reshape(t.shape[:-1]),
        steps=steps.reshape(t.shape[:-1]),
        solver=solver,
    )


def solve_rows(
    t: np.ndarray, epsilon: np.ndarray, verbose: Verbose = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return proxy teachers `(N, C)`, converged `(N,)` and steps `(N,)`.

    Args:
        t: probabilities `(N, C)`, float64.
        epsilon: `(M,)` or `(C, M)`, float64.
        verbose: as in `proxy_teacher`.
    """
    what = f"Solving for the proxy teachers of {len(t)} rows"
    num_blocks = -(-len(t) // ROWS_AT_ONCE)
    options: Any = {"unit": "block", "verbose": verbose}
    if _has_closed_form(epsilon):
        blocks = np.array_split(t, num_blocks)
        found = [
            shared_proxy(block, float(epsilon[0]))
            for block in track(blocks, what, num_blocks, **options)
        ]
        done = np.ones(len(t), bool)
        return np.concatenate(found), done, np.zeros(len(t), int)
    # The last block is filled with rows of zeros, which converge at once.
    padded = np.zeros((num_blocks, ROWS_AT_ONCE, t.shape[1]))
    padded.reshape(-1, t.shape[1])[: len(t)] = t
    solved = [
        _newton_on_numpy(block, epsilon)
        for block in track(padded, what, num_blocks, **options)
    ]
    q, converged, steps = (
        np.concatenate(part)[: len(t)] for part in zip(*solved, strict=True)
    )
    return q, converged.astype(bool), steps.astype(int)


def _has_closed_form(epsilon: Any) -> bool:
    """Return whether `shared_proxy` applies: one known shared coefficient."""
    known = isinstance(epsilon, np.ndarray) and epsilon.shape == (1,)
    return known and float(epsilon[0]) >= -0.9999


# ---- Newton's method. Classes are the first axis, so that sums over them are
# ---- vectorised over the rows.


def newton(teacher_probs: Tensor, epsilon: Tensor) -> tuple[Tensor, ...]:
    """Solve for proxy teachers of any order, shared or per class.

    Args:
        teacher_probs: `(..., C)`.
        epsilon: `(M,)` or `(C, M)`.

    Returns:
        Proxy teachers `(..., C)`, converged `(...)` and steps `(...)`.
    """
    given = ops.moveaxis(teacher_probs, -1, 0)
    tiny = _tiny(given)
    t = maximum(given, tiny)
    ones = (1,) * (len(t.shape) - 1)
    coefficients = [
        ops.reshape(epsilon[..., m], (-1, *ones))
        for m in range(epsilon.shape[-1])
    ]
    # A row is done after a step this small, because a step squares the error.
    tolerance, rounding = (1e-8, 1e-14) if tiny < 1e-100 else (1e-3, 1e-5)
    # One step of the fixed-point map is a better start than the teacher.
    w, _ = _w_and_d(t, 1.0 - t, coefficients)
    start = maximum(w, 1e-3) * t
    q, residual, steps = _newton_loop(t, start, coefficients, tolerance)

    highest = _loss(t, t, coefficients)
    highest = highest + rounding * (1.0 + ops.abs(highest))

    def good(q: Tensor, residual: Tensor) -> Tensor:
        lower = _loss(t, q, coefficients) <= highest
        return (residual <= tolerance) & lower & _is_minimum(t, q, coefficients)

    done = good(q, residual)

    def restart() -> tuple[Tensor, ...]:
        low = _descend(t, coefficients)
        again, residual, more = _newton_loop(t, low, coefficients, tolerance)
        better = good(again, residual)
        best = ops.where(done, q, ops.where(better, again, low))
        return best, done | better, ops.where(done, steps, steps + more)

    # Outside the convex region, Newton's method may fail or end at a maximum.
    # If so, `_descend` lowers the loss, and Newton's method starts again there.
    q, done, steps = ops.cond(ops.all(done), lambda: (q, done, steps), restart)
    q = ops.where(given > 0, q, 0.0)
    total = ops.sum(q, axis=0, keepdims=True)
    q = q / ops.where(total > 0, total, 1.0)
    return ops.moveaxis(q, 0, -1), done[0], steps[0]


_newton_on_numpy = on_numpy(newton)
_newton_on_tensors = compiled_on_jax(newton)


def _tiny(x: Tensor) -> float:
    """Return a number to replace zeros with; its inverse is finite."""
    dtype = keras.backend.standardize_dtype(x.dtype)
    return 1e-300 if dtype == "float64" else 1e-30


def _w_and_d(
    q: Tensor, s: Tensor, coefficients: Sequence[Tensor], xp: Any = ops
) -> tuple[Tensor, Tensor]:
    """Return `1 + q h(s)` and `1 + q^2 h'(s)` with `s = 1 - q`, `(C, ...)`.

    The formulas use `a_m = 1 + m epsilon_m`. All terms are then positive in the
    convex region, so no precision is lost near `epsilon_m = -1/m`.
    """
    order = len(coefficients)
    a = [1.0 + m * e for m, e in enumerate(coefficients, start=1)]
    rounding = np.finfo(keras.backend.standardize_dtype(q.dtype)).eps
    a = [xp.where(xp.abs(x) < rounding, 0.0, x) for x in a]
    a = [x / m for m, x in enumerate(a, start=1)]
    power = math.prod([s] * (order - 1), start=1.0)
    w = s * power + q * slope(s, a)
    d = power * (1.0 + (order - 1) * q) + q * q * curvature(s, a)
    return w, d


def _loss(t: Tensor, q: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
    """Return PTLoss at `q` without the teacher's entropy, `(1, ...)`."""
    values = perturbation(1.0 - q, coefficients) - ops.log(q)
    return ops.sum(t * values, axis=0, keepdims=True)


def _is_minimum(t: Tensor, q: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
    """Return whether the Hessian on the simplex is positive, `(1, ...)`.

    Its diagonal is `t d / q^2`; one entry may be negative.
    """
    _, d = _w_and_d(q, 1.0 - q, coefficients)
    negative = ops.sum(ops.cast(d < 0, q.dtype), axis=0, keepdims=True)
    safe = ops.where(d == 0, 1.0, d)
    inverse = ops.sum(q * (q / t) / safe, axis=0, keepdims=True)
    return (negative == 0) | ((negative == 1) & (inverse < 0))


def _newton_loop(
    t: Tensor,
    start: Tensor,
    coefficients: Sequence[Tensor],
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run Newton's method in `u = logit(q)`.

    Returns:
        `q`, `(C, ...)`, the last step's largest change of `u`, `(1, ...)`, and
        the number of steps, `(1, ...)`.
    """
    log_t = ops.log(t)
    top = _largest(start)
    q = start / ops.sum(start, axis=0, keepdims=True)
    others = ops.sum(ops.where(top, 0.0, q), axis=0, keepdims=True)
    u = ops.log(q) - ops.log(ops.where(top, others, 1.0 - q))

    def unfinished(count: Tensor, *state: Tensor) -> Tensor:
        _, residual, _ = state
        return (count < MAX_STEPS) & ops.any(~(residual <= tolerance))

    def step(
        count: Tensor, u: Tensor, residual: Tensor, steps: Tensor
    ) -> tuple[Tensor, ...]:
        going = ~(residual <= tolerance)
        change = _newton_step(log_t, u, coefficients)
        largest = ops.max(ops.abs(change), axis=0, keepdims=True)
        return (
            count + 1,
            ops.where(going, u + change, u),
            ops.where(going, largest, residual),
            steps + ops.cast(going, "int32"),
        )

    residual = ops.full_like(u[:1], float("inf"))
    steps = ops.zeros_like(residual, dtype="int32")
    _, u, residual, steps = ops.while_loop(
        unfinished, step, (0, u, residual, steps)
    )
    q = ops.sigmoid(u)
    # Rows that failed may hold NaN.
    q = ops.where(residual <= tolerance, maximum(q, _tiny(q)), t)
    return q / ops.sum(q, axis=0, keepdims=True), residual, steps


def _newton_step(
    log_t: Tensor, u: Tensor, coefficients: Sequence[Tensor]
) -> Tensor:
    """Return the change of `u = logit(q)`, `(C, ...)`.

    The equations are `log t_c + log((1 + q_c h_c) / q_c) = log nu` and the
    logarithm of `sum_c q_c = 1`, written for the largest class: `log sum_{c !=
    top} q_c = log(1 - q_top)`. They are linear in `log nu`, which is
    eliminated.
    """
    order = len(coefficients)
    e = ops.exp(-ops.abs(u))
    q = ops.where(u > 0, 1.0, e) / (1.0 + e)
    s = ops.where(u > 0, e, 1.0) / (1.0 + e)
    w, d = _w_and_d(q, s, coefficients)
    # s^M may underflow at epsilon_m = -1/m; then w is s^M.
    lost = w < _tiny(u)
    w = ops.where(lost, 1.0, w)
    log_w_over_q = ops.where(lost, -order * u, ops.log(w * (1.0 + e)))
    gap = log_t + log_w_over_q - minimum(u, 0.0)
    pull = ops.where(lost, 1.0 + (order - 1) * q, d * s / w)  # -d gap / du
    pull = ops.where(pull == 0.0, s, pull)

    top = _largest(u)

    def of_top(x: Tensor) -> Tensor:
        return ops.sum(ops.where(top, x, 0.0), axis=0, keepdims=True)

    def of_others(x: Tensor) -> Tensor:
        return ops.sum(ops.where(top, 0.0, x), axis=0, keepdims=True)

    rest = of_others(q)
    excess = ops.log(rest / of_top(s))
    share = q * s / rest
    weight = of_top(pull / q)
    log_nu = of_top(gap) + weight * (excess + of_others(share * gap / pull))
    log_nu = log_nu / (1.0 + weight * of_others(share / pull))
    change = (gap - log_nu) / pull
    # gap - log_nu loses all precision for a class with nearly all probability.
    change_of_top = -(excess + of_others(share * change)) / q
    return ops.where(top, change_of_top, change)


def _largest(x: Tensor) -> Tensor:
    """Return a mask of the largest entry along the first axis."""
    index = ops.argmax(x, axis=0)
    return ops.one_hot(index, x.shape[0], axis=0, dtype="bool")


def _descend(t: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
    """Return points with a loss no higher than the teacher's, `(C, ...)`.

    This is a damped Newton method on the simplex with a modified, positive
    Hessian. The loss never increases.
    """

    def unfinished(count: Tensor, *state: Tensor) -> Tensor:
        return (count < MAX_STEPS) & ops.any(state[-1] > 1e-3)

    def step(
        count: Tensor, q: Tensor, loss: Tensor, length: Tensor, _: Tensor
    ) -> tuple[Tensor, ...]:
        w, d = _w_and_d(q, 1.0 - q, coefficients)
        d = maximum(ops.abs(d), 0.05)
        share = q / t / d
        nu = ops.sum(q * w / d, axis=0, keepdims=True)
        nu = nu / ops.sum(q * share, axis=0, keepdims=True)
        rate = w / d - nu * share
        # Each class keeps at least a twentieth of its probability.
        fall = maximum(ops.max(-rate, axis=0, keepdims=True), 0.95)
        trial = q * (1.0 + length * 0.95 / fall * rate)
        trial_loss = _loss(t, trial, coefficients)
        lower = trial_loss <= loss
        residual = ops.max(ops.abs(rate), axis=0, keepdims=True)
        return (
            count + 1,
            ops.where(lower, trial, q),
            ops.where(lower, trial_loss, loss),
            ops.where(lower, minimum(2.0 * length, 1.0), 0.5 * length),
            residual,
        )

    q = t / ops.sum(t, axis=0, keepdims=True)
    loss = _loss(t, q, coefficients)
    state = (0, q, loss, ops.ones_like(loss), ops.ones_like(loss))
    return ops.while_loop(unfinished, step, state)[1]


# ---- Derivatives, by the implicit function theorem. At the proxy teacher,
# ---- f_c = t_c (1/q_c + h_c) is the same for all classes, and the diagonal of
# ---- the Hessian is H_c = t_c d_c / q_c^2.


def epsilon_gradient(
    t: np.ndarray, q: np.ndarray, epsilon: np.ndarray, upstream: np.ndarray
) -> np.ndarray:
    """Return the derivative of `J(q)` by `epsilon`, in the shape of `epsilon`.

    Args:
        t: teacher probabilities, `(N, C)`.
        q: the proxy teachers of t, `(N, C)`.
        epsilon: `(M,)` or `(C, M)`.
        upstream: `dJ / dq`, `(N, C)`.
    """
    inverse = _inverse_hessian(t, q, list(np.moveaxis(epsilon, -1, 0)), np)
    mean = np.sum(upstream * inverse, -1) / np.sum(inverse, -1)
    v = t * (upstream - mean[:, None]) * inverse
    orders = range(1, epsilon.shape[-1] + 1)
    by_order = [np.sum(m * (1.0 - q) ** (m - 1) * v, axis=0) for m in orders]
    gradient = np.stack(by_order, axis=-1)
    return gradient if epsilon.ndim == 2 else gradient.sum(axis=0)


def _inverse_hessian(
    t: Tensor, q: Tensor, coefficients: Sequence[Tensor], xp: Any
) -> Tensor:
    """Return `1 / H_c`, or 0 where `q_c = 0`; the shape is `(..., C)`."""
    _, d = _w_and_d(q, 1.0 - q, coefficients, xp)
    ratio = q / xp.where(t > 0, t, 1.0)
    return q * ratio / xp.where(d == 0, 1.0, d)


def proxy_tensor(teacher_probs: Tensor, epsilon: Any) -> Tensor:
    """Return proxy teachers `(..., C)` of tensors, with exact derivatives.

    Args:
        teacher_probs: `(..., C)`, rows that sum to one. Rows of zeros are
            returned unchanged.
        epsilon: `(M,)` or `(C, M)`, a NumPy array or a tensor.
    """
    t = ops.convert_to_tensor(teacher_probs)
    if has_no_values(t):
        return t
    closed_form = _has_closed_form(epsilon)
    epsilon = ops.cast(epsilon, t.dtype)
    fixed_t, fixed_epsilon = ops.stop_gradient(t), ops.stop_gradient(epsilon)
    if closed_form:
        # A row of zeros has no multiplier.
        total = ops.sum(fixed_t, axis=-1, keepdims=True)
        full = ops.where(total > 0, fixed_t, ops.ones_like(fixed_t))
        q = shared_proxy(full, fixed_epsilon[0], ops) * total
    else:
        q, _, _ = _newton_on_tensors(fixed_t, fixed_epsilon)
    q = ops.stop_gradient(q)
    # A Newton step from q has the value zero and the derivative of q.
    orders = range(epsilon.shape[-1])
    fixed = [fixed_epsilon[..., m] for m in orders]
    inverse = _inverse_hessian(fixed_t, q, fixed, ops)
    h = slope(1.0 - q, [epsilon[..., m] for m in orders])
    f = t * (1.0 / ops.where(q > 0, q, 1.0) + h)
    total = ops.sum(inverse, axis=-1, keepdims=True)
    mean = ops.sum(f * inverse, axis=-1, keepdims=True)
    mean = mean / ops.where(total > 0, total, 1.0)
    step = (f - mean) * inverse
    return q + (step - ops.stop_gradient(step))


# ---- The paper's solver.


def _solve_fsolve(
    t: np.ndarray, epsilon: np.ndarray, verbose: Verbose
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return proxy teachers `(N, C)`, converged `(N,)` and calls `(N,)`.

    The unknowns are the logits of q, starting from `log t`. Softmax ignores a
    shift, so the Jacobian of all C logits is singular. Therefore the logit of
    the teacher's largest class is fixed.
    """
    coefficients = list(np.moveaxis(epsilon, -1, 0))
    q, steps = np.empty_like(t), np.empty(len(t), int)
    what = f"Solving for the proxy teachers of {len(t)} rows"
    rows = track(t, what, len(t), unit="row", verbose=verbose)
    for n, row in enumerate(rows):
        q[n], steps[n] = _fsolve_row(row, coefficients)
    w = t * _w_and_d(q, 1.0 - q, coefficients, np)[0]
    excess = w - q * w.sum(axis=-1, keepdims=True)
    solved = np.abs(excess) <= FSOLVE_TOLERANCE * w
    loss, at_teacher = (
        np.sum(
            t * perturbation(1.0 - x, coefficients) - scipy.special.xlogy(t, x),
            axis=-1,
        )
        for x in (q, t)
    )
    converged = solved.all(axis=-1) & (loss <= at_teacher + 1e-12)
    return q, converged, steps


def _fsolve_row(
    t: np.ndarray, coefficients: Sequence[np.ndarray]
) -> tuple[np.ndarray, int]:
    """Return one proxy teacher `(C,)` and the number of function calls."""
    start = np.log(np.maximum(t, np.finfo("float64").tiny))
    free = np.arange(len(t)) != np.argmax(t)

    def equations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the gradient of the loss by the logits, and its Jacobian."""
        z = start.copy()
        z[free] = x
        q = scipy.special.softmax(z)
        h = slope(1.0 - q, coefficients)
        w = t * (1.0 + q * h)
        by_q = t * (h - q * curvature(1.0 - q, coefficients))  # dw / dq
        of_q = np.diag(w.sum() - by_q) + np.outer(q, by_q)
        jacobian = of_q * q - np.outer(of_q @ q, q)
        return (q * w.sum() - w)[free], jacobian[np.ix_(free, free)]

    with warnings.catch_warnings():
        # The caller checks the solution itself.
        warnings.simplefilter("ignore", RuntimeWarning)
        x, info, _, _ = scipy.optimize.fsolve(
            lambda x: equations(x)[0],
            start[free],
            fprime=lambda x: equations(x)[1],
            xtol=1e-8,
            full_output=True,
        )
    z = start.copy()
    z[free] = x
    q = scipy.special.softmax(z)
    return (q if np.all(np.isfinite(q)) else t), int(info["nfev"])


# ---- The layer.


@keras.saving.register_keras_serializable(package="keras_ptloss")
class ProxyTeacher(keras.layers.Layer):
    """Turn a teacher's probabilities into those of its proxy teacher.

    `keras.Sequential([teacher, ProxyTeacher(epsilon)])` gives you the proxy
    teacher as a Keras model. `epsilon` is a weight of the layer. Unless
    `trainable=False`, `fit` trains it on labels with its exact derivative, and
    keeps `epsilon_m >= -1/m`, where the loss is convex.

    Args:
        epsilon: starting coefficients: a number (order 1), `(M,)` shared by the
            classes, or `(C, M)` per class.
        **kwargs: `name`, `trainable` and other arguments of
            `keras.layers.Layer`. The default dtype is float32.

    Input: probabilities, `(..., C)`, or `(..., 1)` for the probability of the
    second of two classes. Output: `(..., C)`. Rows that are not probabilities
    raise a ValueError, or become NaN in compiled functions.

    Example:
        >>> import numpy as np
        >>> layer = ProxyTeacher([2.0, 0.5])
        >>> np.asarray(layer(np.array([[0.7, 0.2, 0.1]]))).round(3)
        array([[0.838, 0.113, 0.049]], dtype=float32)

    Reference:
        Zhang et al. 2023 (https://arxiv.org/abs/2305.05010), §4.2.
    """

    def __init__(self, epsilon: Any, **kwargs: Any) -> None:
        # The solver needs at least float32, also under mixed precision.
        kwargs.setdefault("dtype", "float32")
        super().__init__(**kwargs)
        self._start = check_constant_epsilon(epsilon)

    def build(self, input_shape: Any) -> None:
        """Create the weight `epsilon`."""
        classes = self.compute_output_shape(input_shape)[-1]
        check_constant_epsilon(self._start, classes=classes)
        self.epsilon = self.add_weight(
            name="epsilon",
            shape=self._start.shape,
            initializer=keras.initializers.Constant(self._start),
            constraint=Convex(),
        )

    def call(self, inputs: Tensor) -> Tensor:
        """Return the proxy teachers of probabilities `(..., C)`."""
        t = two_events(inputs, from_logits=False)
        t = valid_probs("inputs", t, "apply a softmax to them first")
        return proxy_tensor(t, ops.convert_to_tensor(self.epsilon))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return `(..., C)`; a single column is expanded to two classes."""
        return (*input_shape[:-1], max(input_shape[-1], 2))

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that build the layer."""
        return {**super().get_config(), "epsilon": self._start.tolist()}


@keras.saving.register_keras_serializable(package="keras_ptloss")
class Convex(keras.constraints.Constraint):
    """Keep `epsilon_m >= -1/m`, where PTLoss is convex in the student."""

    def __call__(self, value: Tensor) -> Tensor:
        """Return coefficients `(..., M)` clipped from below."""
        lower = -1.0 / np.arange(1, value.shape[-1] + 1)
        return ops.maximum(value, ops.cast(lower, value.dtype))
