"""Every page loads without errors, its links work, and it fits its window."""

import html.parser
import os
import pathlib
import re
import urllib.parse

import pytest
from conftest import SITE
from sphinx.util.inventory import InventoryFile
from test_api import public_objects

PAGES = sorted(
    path.relative_to(SITE).as_posix()
    for path in SITE.rglob("*.html")
    if "_static" not in path.parts
)
# A folder for pictures of all pages, to look at.
SCREENSHOTS = os.environ.get("SCREENSHOTS")

TOO_WIDE = """() => {
    const width = document.documentElement.clientWidth;
    if (document.documentElement.scrollWidth <= width) return [];
    return [...document.querySelectorAll("body *")]
        .filter(e => e.getBoundingClientRect().right > width + 1)
        .map(e => e.outerHTML.slice(0, 120));
}"""

# Contrast between text and background, as WCAG defines it.
LOW_CONTRAST = """() => {
    const channels = c => c.match(/[\\d.]+/g).map(Number);
    const luminance = c => channels(c).slice(0, 3)
        .map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = e => {
        for (; e; e = e.parentElement) {
            const color = getComputedStyle(e).backgroundColor;
            const alpha = channels(color)[3];
            if (alpha === undefined || alpha > 0.9) return color;
        }
        return "rgb(255, 255, 255)";
    };
    return [...document.querySelectorAll(
            ".bd-article :is(p, li, td, th, h1, h2, pre span, code, a, " +
            "caption)")]
        .filter(e => e.textContent.trim() && e.getClientRects().length)
        .map(e => {
            const a = luminance(getComputedStyle(e).color);
            const b = luminance(behind(e));
            const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            return [ratio, e.outerHTML.slice(0, 120)];
        })
        .filter(([ratio]) => ratio < 4.5)
        .slice(0, 5);
}"""


def shoot(page, name, kind):
    """Save a picture if SCREENSHOTS is set."""
    if SCREENSHOTS:
        folder = pathlib.Path(SCREENSHOTS)
        folder.mkdir(parents=True, exist_ok=True)
        file = f"{name.removesuffix('.html').replace('/', '-')}-{kind}.png"
        page.screenshot(path=folder / file, full_page=True)


@pytest.mark.parametrize("name", PAGES)
def test_page(visit, name):
    page = visit.go(name)
    assert visit.errors == []
    broken = page.evaluate(
        "[...document.images].filter(i => i.complete && !i.naturalWidth)"
        ".map(i => i.src)"
    )
    assert broken == []
    assert page.locator("[data-mjx-error]").count() == 0
    assert page.locator(".math:not(:has(mjx-container))").count() == 0
    assert page.title().strip()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function(
            f"document.documentElement.dataset.theme === '{scheme}'"
        )
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate(TOO_WIDE) == [], width
            assert page.evaluate(LOW_CONTRAST) == [], (scheme, width)
            shoot(page, name, f"{width}-{scheme}")
    assert visit.errors == []


class Links(html.parser.HTMLParser):
    """Collects the links and the anchors of a page."""

    def __init__(self):
        """Start without links."""
        super().__init__()
        self.targets, self.anchors = set(), set()

    def handle_starttag(self, tag, attributes):
        """Store addresses and anchors."""
        for key, value in attributes:
            if key in ("href", "src") and tag != "link":
                self.targets.add(value)
            elif key in ("id", "name"):
                self.anchors.add(value)


def read(name, seen={}):  # noqa: B006 (a cache)
    """Return the links of a page, read once."""
    if name not in seen:
        seen[name] = Links()
        seen[name].feed((SITE / name).read_text())
    return seen[name]


@pytest.mark.parametrize("name", PAGES)
def test_links(name):
    broken = []
    for target in read(name).targets:
        parts = urllib.parse.urlsplit(target or "")
        if parts.scheme or parts.netloc:
            continue
        path = urllib.parse.unquote(parts.path)
        file = (SITE / name).parent / path if path else SITE / name
        if file.is_dir():
            file /= "index.html"
        inside = file.resolve().is_relative_to(SITE.resolve())
        if not inside or not file.exists():
            broken.append(target)
        elif parts.fragment and file.suffix == ".html":
            page = file.resolve().relative_to(SITE.resolve()).as_posix()
            anchor = urllib.parse.unquote(parts.fragment)
            if anchor not in read(page).anchors:
                broken.append(target)
    assert broken == []


def test_every_public_name_is_in_the_reference():
    with (SITE / "objects.inv").open("rb") as file:
        data = InventoryFile.loads(file.read(), uri="").data
    documented = {
        name
        for kind, names in data.items()
        if kind in ("py:class", "py:function", "py:module", "py:exception")
        for name in names
    }
    missing = [
        name
        for name in public_objects()
        if not any(known.endswith(f".{name}") for known in documented)
    ]
    assert missing == []


def test_search_finds(visit):
    page = visit.go("search.html?q=PTLoss")
    link = page.locator("#search-results a", has_text="PTLoss").first
    link.wait_for()
    found = page.locator("#search-results a").all_text_contents()
    assert any(re.search(r"\bPTLoss\b", text) for text in found)
    page.locator("#search-results a[href*='losses.PTLoss.html']").first.click()
    page.wait_for_load_state()
    assert page.locator("h1").inner_text().startswith("PTLoss")
    assert visit.errors == []


def test_search_from_the_header(visit):
    """Click the button, type a word and press Enter."""
    page = visit.go("index.html")
    page.locator("button.search-button__button:visible").first.click()
    page.keyboard.type("ProxyTeacherSearch")
    page.keyboard.press("Enter")
    page.locator("#search-results a").first.wait_for()
    assert "ProxyTeacherSearch" in page.locator("#search-results").inner_text()


def test_theme_can_be_switched(visit):
    page = visit.go("index.html")
    for theme in ("dark", "light"):
        page.locator(".theme-switch-button:visible").first.click()
        page.locator(f".dropdown-menu.show [data-mode='{theme}']").click()
        shown = page.evaluate("document.documentElement.dataset.theme")
        assert shown == theme
