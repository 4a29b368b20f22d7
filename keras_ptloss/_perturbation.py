"""The perturbation polynomial of PTLoss and its derivatives.

With `s = 1 - p_c` and one class's coefficients `eps_1 .. eps_M`:

    perturbation   P(s) = sum_m eps_m s^m                  (Eq. 7)
    slope          h(s) = sum_m m eps_m s^(m-1)            = -dP/dp
    curvature      k(s) = sum_m m (m-1) eps_m s^(m-2)      = -dh/dp

All three are evaluated by Horner's rule on arrays of `s`'s shape: no
`(..., C, M)` array is ever made. `coefficients` is the sequence of the M
arrays (or numbers) `eps_m`, each broadcastable to `s`. Plain arithmetic, so
that NumPy arrays and the tensors of every backend are served alike.
"""

from collections.abc import Sequence
from typing import Any

Tensor = Any


def perturbation(s: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
    """Return `P(s) = sum_m eps_m s^m`, in the shape of `s`."""
    return s * horner(s, coefficients)


def slope(s: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
    """Return `h(s) = sum_m m eps_m s^(m-1)`, in the shape of `s`."""
    return horner(s, [m * e for m, e in enumerate(coefficients, start=1)])


def curvature(s: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
    """Return `k(s) = sum_m m (m-1) eps_m s^(m-2)`, in the shape of `s`."""
    terms = [m * (m - 1) * e for m, e in enumerate(coefficients, start=1)]
    return horner(s, terms[1:])


def horner(s: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """Return `terms[0] + terms[1] s + ...` in the shape of `s`."""
    if len(terms) < 2:
        return 0.0 * s + sum(terms)
    *terms, last = terms
    value = s * last + terms[-1]  # two loops over `s` less than from 0
    for term in reversed(terms[:-1]):
        value = value * s + term
    return value
