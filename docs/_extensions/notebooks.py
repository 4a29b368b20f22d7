"""Offer each executed page as a notebook, for download and for Colab.

A notebook starts with a cell that installs the package. Then come the page's
cells, and its text in plain Markdown. GitHub Actions sets `GITHUB_REPOSITORY`;
then pages also link to Colab, which reads `notebooks/` from the branch of the
site.
"""

import os
import re
from pathlib import Path

import jupytext
import nbformat

SITE_BRANCH = "gh-pages"


def is_executed(text):
    """Return whether a page has code cells."""
    return text.startswith("---\nfile_format: mystnb")


def plain(text):
    """Return text without the markup that only Sphinx knows."""
    text = re.sub(r"\{[\w:]+\}`([^`<]+?) <[^`]*>`", r"`\1`", text)
    text = re.sub(r"\{[\w:]+\}`~(?:\w+\.)*(\w+)`", r"`\1`", text)
    text = re.sub(r"\{[\w:]+\}`([^`]+)`", r"`\1`", text)
    return re.sub(r"\[([^\]]+)\]\((?!https?://)[^)]*\)", r"\1", text)


def install(text, repository):
    """Return the code that installs what a page needs."""
    package = "keras_ptloss[tensorflow,demo,arrow]"
    if repository:
        package += f" @ git+https://github.com/{repository}"
    packages = [f'"{package}"']
    if "tensorflow_serving" in text:
        packages.append("tensorflow-serving-api")
    if "from tenacity" in text:
        packages.append("tenacity")
    return f"%pip install --quiet {' '.join(packages)}"


def make_notebook(text, repository=None):
    """Return a page as a notebook."""
    notebook = jupytext.reads(text, fmt="md:myst")
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = plain(cell.source)
        cell.metadata.pop("tags", None)
    first = nbformat.v4.new_code_cell(install(text, repository))
    notebook.cells.insert(0, first)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # the same in every build
    return notebook


def links(name, repository=None):
    """Return the links below a page's title, in HTML."""
    up = "../" * name.count("/")
    line = (
        f'<a href="{up}notebooks/{name}.ipynb" download>'
        "Download this page as a notebook</a>"
    )
    if repository:
        path = f"{repository}/blob/{SITE_BRANCH}/notebooks/{name}.ipynb"
        line += (
            f' or <a href="https://colab.research.google.com/github/{path}">'
            "open it in Colab</a>"
        )
    return f'<p class="notebook-links">{line}.</p>'


def write_notebooks(app):
    """Write all notebooks to a folder that Sphinx copies to the site."""
    folder = Path(app.confdir) / "_build" / "extra"
    folder.mkdir(parents=True, exist_ok=True)
    app.config.html_extra_path = [str(folder)]
    # Not env.found_docs, which may list pages that have been deleted since.
    for name in app.project.discover(app.config.exclude_patterns):
        source = Path(app.env.doc2path(name))
        if source.suffix == ".md" and is_executed(source.read_text()):
            target = folder / "notebooks" / f"{name}.ipynb"
            target.parent.mkdir(parents=True, exist_ok=True)
            notebook = make_notebook(
                source.read_text(), os.environ.get("GITHUB_REPOSITORY")
            )
            nbformat.write(notebook, target)


def add_links(app, name, source):
    """Put the links below the title of a page that has a notebook."""
    if is_executed(source[0]):
        line = links(name, os.environ.get("GITHUB_REPOSITORY"))
        source[0] = re.sub(
            r"^(# .*)$", rf"\1\n\n{line}", source[0], count=1, flags=re.M
        )


def setup(app):
    """Register these functions with Sphinx."""
    app.connect("builder-inited", write_notebooks)
    app.connect("source-read", add_links)
    return {"parallel_read_safe": True}
