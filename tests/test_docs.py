"""The site's sources: what can be seen without building it."""

import pathlib
import re

import pytest
from test_api import SURFACE

DOCS = pathlib.Path(__file__).parent.parent / "docs"
ROOMS = sorted(room for room in SURFACE if room != "keras_ptloss")


def listed(page):
    """Return the names that a page of the reference makes pages of."""
    text = (DOCS / "api" / page).read_text()
    table = text.partition(":toctree: generated")[2]
    return re.findall(r"^   (\w+)$", table, re.MULTILINE)


@pytest.mark.parametrize("room", ROOMS)
def test_reference_has_every_public_name(room):
    assert listed(f"{room.removeprefix('keras_ptloss.')}.rst") == SURFACE[room]


def test_reference_says_what_the_package_itself_has():
    text = (DOCS / "api" / "index.rst").read_text()
    of_rooms = {name for room in ROOMS for name in SURFACE[room]}
    for name in SURFACE["keras_ptloss"]:
        if f"keras_ptloss.{name}" in ROOMS:
            assert f"   {name}\n" in text
        elif name in of_rooms:
            assert re.search(rf"`~keras_ptloss\.\w+\.{name}`", text)
        else:
            assert name in listed("index.rst") or f"``{name}``" in text
