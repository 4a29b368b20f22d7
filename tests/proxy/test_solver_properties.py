"""Newton's method on random problems, against the paper's equations."""

import helpers
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_ptloss import proxy_teacher

pytestmark = pytest.mark.newest

ROWS = 4
# Few shapes, since each is compiled anew.
SHAPES = [(1, 2), (2, 1), (3, 2), (12, 5)]


@st.composite
def problems(draw):
    """Teachers with zeros, ties, certain and tiny classes; epsilon; order."""
    classes, order = draw(st.sampled_from(SHAPES))
    dtype = draw(st.sampled_from(["float16", "float32", "float64"]))
    weights = st.sampled_from([0.0, 1.0, 1.0, 2.0, 7.0, 1e-3, 1e-9, 1e-30])
    teacher = draw(hnp.arrays("float64", (ROWS, classes), elements=weights))
    if classes == 1:  # the second of two events
        teacher = np.minimum(teacher, 1.0)
    else:
        teacher[teacher.sum(-1) == 0, 0] = 1.0
        teacher /= teacher.sum(-1, keepdims=True)
    per_class = draw(st.booleans())
    shape = (max(classes, 2), order) if per_class else (order,)
    # At least -0.95/m: test_hard_rows goes to -1/m.
    share = draw(hnp.arrays("float64", shape, elements=st.floats(-0.95, 10)))
    lowest = 1.0 / np.arange(1, order + 1)
    epsilon = np.where(share < 0, share * lowest, share)
    return teacher.astype(dtype), epsilon


@settings(max_examples=50, deadline=None)
@given(problems())
def test_solutions(problem):
    """Convex: what fulfils the equations of Eq. 9 is the one solution."""
    given_teacher, epsilon = problem
    result = proxy_teacher(given_teacher, epsilon)
    q, t = result.probabilities, given_teacher.astype("float64")
    if t.shape[-1] == 1:
        t = np.concatenate([1 - t, t], -1)
    t /= t.sum(-1, keepdims=True)
    assert result.converged.all(), result.residual
    assert q.shape == t.shape and q.dtype == "float64"
    np.testing.assert_allclose(q.sum(-1), 1, rtol=1e-12)
    np.testing.assert_array_equal(q == 0, t == 0)
    np.testing.assert_allclose(
        helpers.fixed_point(t, q, epsilon), q, rtol=1e-7, atol=0
    )
    best = helpers.pt_loss(t, q, epsilon)
    near = 0.99 * q + 0.01 * t
    for other in (t, near, np.where(t > 0, 1.0, 0.0)):
        other = other / other.sum(-1, keepdims=True)
        worse = helpers.pt_loss(t, other, epsilon)
        assert (best <= worse + 1e-9 * (1 + np.abs(worse))).all()


@settings(max_examples=40, deadline=None)
@given(problems())
def test_equal_classes_stay_equal_and_ranks_stay(problem):
    """With shared epsilon >= 0, which changes confidence, never the label."""
    teacher, epsilon = problem
    if epsilon.ndim == 2:
        epsilon = epsilon[0]
    q = proxy_teacher(teacher, np.abs(epsilon)).probabilities
    t = teacher.astype("float64")
    if t.shape[-1] == 1:
        t = np.concatenate([1 - t, t], -1)
    for row, proxy in zip(t, q, strict=True):
        order = np.argsort(row, kind="stable")
        steps = np.diff(proxy[order])
        assert (steps >= -1e-12 * proxy[order][1:]).all()
        same = np.diff(row[order]) == 0
        np.testing.assert_allclose(
            proxy[order][1:][same], proxy[order][:-1][same], rtol=1e-9
        )
