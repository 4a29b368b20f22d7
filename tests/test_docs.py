"""The site's sources: what can be seen without building it."""

import pathlib
import re

import numpy as np
import pytest
from test_api import SURFACE

from keras_ptloss.soft_labels import SoftLabels, SoftLabelSpec

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


def test_shards_of_the_page_on_many_devices(tmp_path, monkeypatch):
    """The lines that each host runs, on `tf.data`, which the page wants."""
    tf = pytest.importorskip("tensorflow")
    page = (DOCS / "how_to" / "many_devices.md").read_text()
    lines = re.search(r"# on host.*?(?=\n\n# then)", page, re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    count = int(re.search(r"num_examples=([\d_]+)", lines)[1])
    x = np.arange(count, dtype="float32")
    dataset = tf.data.Dataset.from_tensor_slices(x).batch(5_000)

    def teacher(batch):
        return np.stack([batch / count, 1 - batch / count], axis=-1)

    names = {"SoftLabels": SoftLabels, "SoftLabelSpec": SoftLabelSpec}
    for rank in range(2):
        host = {"teacher": teacher, "dataset": dataset, "rank": rank}
        exec(lines, {**names, **host, "hosts": 2})
    labels = SoftLabels.open("teacher.softlabels")
    np.testing.assert_allclose(labels[:], teacher(x), atol=1e-3)
