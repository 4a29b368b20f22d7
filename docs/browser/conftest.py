"""A local server for the built site, and a browser."""

import functools
import http.server
import os
import pathlib
import shutil
import sys
import threading

import pytest
from playwright.sync_api import sync_playwright

DOCS = pathlib.Path(__file__).parent.parent
SITE = DOCS / "_build" / "html"
sys.path.append(str(DOCS.parent / "tests"))  # test_api.py, helpers.py


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server that logs nothing."""

    def log_message(self, format, *args):
        """Log nothing."""


@pytest.fixture(scope="session")
def address():
    """Return the address of the site."""
    if not (SITE / "index.html").exists():
        pytest.fail("There is no site. Run `make docs` first.")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=SITE)
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def browser():
    """Start Chromium."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if path is None:
        pytest.fail(
            "Chromium is missing: apt-get install chromium, or set CHROMIUM."
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


class Visit:
    """A browser page that records errors."""

    def __init__(self, browser, address):
        """Open a page."""
        self.address = address
        self.errors = []
        self.page = browser.new_page(viewport={"width": 1280, "height": 900})
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._request)
        self.page.on("response", self._response)

    def _console(self, message):
        if message.type in ("error", "warning"):
            self.errors.append(f"{message.type}: {message.text}")

    def _request(self, request):
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.errors.append(f"request to another host: {request.url}")

    def _response(self, response):
        if response.status >= 400:
            self.errors.append(f"{response.status}: {response.url}")

    def go(self, name):
        """Load a page of the site and wait for its formulas."""
        self.page.goto(f"{self.address}/{name}", wait_until="load")
        self.page.evaluate("window.MathJax?.startup?.promise")
        return self.page


@pytest.fixture
def visit(browser, address):
    """Open a new page."""
    visit = Visit(browser, address)
    yield visit
    visit.page.close()
