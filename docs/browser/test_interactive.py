"""The interactive page computes the same numbers as the package."""

import json

import numpy as np
import pytest
from helpers import pt_loss  # in NumPy, in float64

from keras_ptloss import proxy_teacher

CLOSE = {"rtol": 0, "atol": 1e-6}

SET = """([root, values]) => {
    for (const [name, value] of Object.entries(values)) {
        const input = document.querySelector(`${root} input[name="${name}"]`);
        input.value = value;
        input.dispatchEvent(new Event("input", { bubbles: true }));
    }
}"""


@pytest.fixture
def page(visit):
    yield visit.go("interactive.html")
    assert visit.errors == []


def shown(page, root):
    """Return the numbers below a drawing, unrounded."""
    return json.loads(
        page.locator(f"{root} .readout").get_attribute("data-values")
    )


def proxy(t, epsilon):
    result = proxy_teacher([t], epsilon)
    assert result.converged.all()
    return result.probabilities[0]


def settings():
    """Yield positions of the sliders: extremes and random ones."""
    rng = np.random.default_rng(0)
    yield 0.7, (2.0, 0.0, 0.0)
    yield 0.7, (-0.8, 1.0, 0.0)
    yield 0.01, (10.0, 10.0, 10.0)
    yield 0.99, (-1.0, -0.5, -0.33)
    yield 0.3, (-1.0, 10.0, -0.33)
    for _ in range(20):
        low, high = [-1.0, -0.5, -0.33], [10.0, 10.0, 10.0]
        yield (
            round(float(rng.uniform(0.01, 0.99)), 2),
            tuple(rng.uniform(low, high).round(2).tolist()),
        )


def test_sliders_move_the_proxy_to_the_right_number(page):
    for t, epsilon in settings():
        names = dict(zip(("t", "e1", "e2", "e3"), (t, *epsilon), strict=True))
        page.evaluate(SET, ["#ptloss-curves", names])
        found = shown(page, "#ptloss-curves")
        assert (found["t"], found["epsilon"]) == (t, list(epsilon))
        expected = proxy([t, 1 - t], epsilon)
        np.testing.assert_allclose(found["q"], expected, **CLOSE)
        least = pt_loss([[t, 1 - t]], expected[None], epsilon)
        np.testing.assert_allclose(found["least"], least[0], **CLOSE)
        text = page.locator("#ptloss-curves .readout").inner_text()
        assert f"proxy q = {expected[0]:.3f}" in text


def test_a_key_moves_a_slider(page):
    before = shown(page, "#ptloss-curves")
    page.locator('#ptloss-curves input[name="e1"]').focus()
    for _ in range(25):
        page.keyboard.press("ArrowRight")
    after = shown(page, "#ptloss-curves")
    assert after["epsilon"][0] == pytest.approx(before["epsilon"][0] + 0.25)
    expected = proxy([after["t"], 1 - after["t"]], after["epsilon"])
    np.testing.assert_allclose(after["q"], expected, **CLOSE)
    # The dots agree with the numbers.
    for kind, value in (("teacher", after["t"]), ("proxy", expected[0])):
        dot = page.locator(f"#ptloss-curves circle.{kind}")
        x = float(dot.get_attribute("cx"))
        assert x == pytest.approx(46 + 364 * value, abs=0.01)


def test_function_for_any_teacher(page):
    """The page's function agrees where no slider reaches."""
    rng = np.random.default_rng(1)
    low = -1.0 / np.arange(1, 4)
    for classes in (2, 3, 5):
        for _ in range(20):
            t = rng.dirichlet(np.full(classes, 0.5))
            t[rng.integers(classes)] *= rng.integers(2)  # some exact zeros
            t /= t.sum()
            epsilon = rng.uniform(low, 10.0, (classes, 3))
            found = page.evaluate(
                "([t, e]) => ptloss.proxyTeacher(t, e)",
                [t.tolist(), epsilon.tolist()],
            )
            np.testing.assert_allclose(found, proxy(t, epsilon), **CLOSE)


def per_class(found):
    return proxy(found["t"], np.array(found["epsilon"]))


def test_the_teacher_is_dragged(page):
    root = "#ptloss-triangle"
    svg = page.locator(f"{root} svg")
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    scale = box["width"] / 420

    def at(x, y):
        return box["x"] + scale * x, box["y"] + scale * y

    handle = page.locator(f"{root} .handle").bounding_box()
    page.mouse.move(
        handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
    )
    page.mouse.down()
    target = np.array([0.2, 0.2, 0.6])
    corners = np.array([[210, 30], [30, 330], [390, 330]])
    page.mouse.move(*at(*(target @ corners)), steps=5)
    page.mouse.up()
    found = shown(page, root)
    np.testing.assert_allclose(found["t"], target, atol=0.01)
    np.testing.assert_allclose(found["q"], per_class(found), **CLOSE)
    # After the button is released, it stays.
    page.mouse.move(*at(210, 100))
    assert shown(page, root) == found


def test_outside_of_the_triangle(page):
    """A teacher moved beyond an edge keeps all probabilities positive."""
    page.locator("#ptloss-triangle .handle").focus()
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    found = shown(page, "#ptloss-triangle")
    assert min(found["t"]) > 0
    assert sum(found["t"]) == pytest.approx(1.0)
    np.testing.assert_allclose(found["q"], per_class(found), **CLOSE)


def test_coefficients_of_classes(page):
    rng = np.random.default_rng(2)
    for _ in range(10):
        values = rng.uniform(-1, 10, 3).round(2).tolist()
        names = dict(zip(("c1", "c2", "c3"), values, strict=True))
        page.evaluate(SET, ["#ptloss-triangle", names])
        found = shown(page, "#ptloss-triangle")
        assert found["epsilon"] == [[value] for value in values]
        np.testing.assert_allclose(found["q"], per_class(found), **CLOSE)
