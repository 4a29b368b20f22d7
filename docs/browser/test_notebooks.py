"""Each executed page is also offered as a notebook with the same cells."""

import re
import sys

import nbclient
import nbformat
import pytest
from conftest import DOCS, SITE

sys.path.append(str(DOCS / "_extensions"))
import notebooks

PAGES = sorted(
    path.relative_to(DOCS).with_suffix("").as_posix()
    for path in DOCS.rglob("*.md")
    if "_build" not in path.parts and notebooks.is_executed(path.read_text())
)
TUTORIALS = {
    "get_started",
    "tutorials/images",
    "tutorials/serving",
    "tutorials/text_teacher",
}


def test_tutorials_are_executed():
    assert set(PAGES) >= TUTORIALS


@pytest.mark.parametrize("name", PAGES)
def test_notebook(name):
    notebook = nbformat.read(SITE / "notebooks" / f"{name}.ipynb", 4)
    nbformat.validate(notebook)
    first, *cells = notebook.cells
    assert first.source.startswith("%pip install")
    source = (DOCS / f"{name}.md").read_text()
    code = re.findall(
        r"```\{code-cell\} ipython3\n((?::[^\n]*\n)*)(.*?)```", source, re.S
    )
    assert [c.source.strip() for c in cells if c.cell_type == "code"] == [
        body.strip() for _, body in code
    ]
    for cell in cells:
        if cell.cell_type == "markdown":
            assert not re.search(r"\{[\w:]+\}`|\]\((?!https?:)", cell.source)
    page = (SITE / f"{name}.html").read_text()
    assert f'notebooks/{name}.ipynb" download' in page


def test_notebook_runs_as_a_reader_runs_it(tmp_path):
    """Run a notebook with a harmless magic in place of the installation."""
    notebook = nbformat.read(SITE / "notebooks/tutorials/images.ipynb", 4)
    notebook.cells[0].source = "%pip --version"
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    printed = "".join(o.text for o in notebook.cells[-1].outputs)
    assert "backend: tensorflow" in printed
    assert "student of the search's loss" in printed


def test_colab():
    """If the repository is known, pages link to Colab and install from it."""
    line = notebooks.links("tutorials/serving", "owner/name")
    assert (
        "colab.research.google.com/github/owner/name/blob/gh-pages/"
        "notebooks/tutorials/serving.ipynb" in line
    )
    source = (DOCS / "tutorials" / "serving.md").read_text()
    cell = notebooks.make_notebook(source, "owner/name").cells[0].source
    assert "git+https://github.com/owner/name" in cell
    assert "tensorflow-serving-api" in cell
