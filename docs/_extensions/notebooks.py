"""Each executed page as a notebook, for Colab and for download.

Of the page's own source: an installing cell first, then its cells, with the
text in the Markdown that notebooks understand. On GitHub's machines, where
`GITHUB_REPOSITORY` names the repository, pages link to Colab, which reads
`notebooks/` of the branch that holds the site.
"""

import os
import re
from pathlib import Path

import jupytext
import nbformat

SITE_BRANCH = "gh-pages"


def is_executed(text):
    """Whether a page has cells."""
    return text.startswith("---\nfile_format: mystnb")


def plain(text):
    """Return text without what only Sphinx understands."""
    text = re.sub(r"\{[\w:]+\}`([^`<]+?) <[^`]*>`", r"`\1`", text)
    text = re.sub(r"\{[\w:]+\}`~(?:\w+\.)*(\w+)`", r"`\1`", text)
    text = re.sub(r"\{[\w:]+\}`([^`]+)`", r"`\1`", text)
    return re.sub(r"\[([^\]]+)\]\((?!https?://)[^)]*\)", r"\1", text)


def install(text, repository):
    """Return the cell that installs what the page needs."""
    package = "keras_ptloss[jax,demo]"
    if repository:
        package += f" @ git+https://github.com/{repository}"
    packages = [f'"{package}"']
    if "tensorflow_serving" in text:
        packages.append("tensorflow-serving-api")
    return f"%pip install --quiet {' '.join(packages)}"


def make_notebook(text, repository=None):
    """Return the notebook of a page's source."""
    notebook = jupytext.reads(text, fmt="md:myst")
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = plain(cell.source)
        cell.metadata.pop("tags", None)
    first = nbformat.v4.new_code_cell(install(text, repository))
    notebook.cells.insert(0, first)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # the same in each build
    return notebook


def links(name, repository=None):
    """Return the line of links below a page's title, in HTML."""
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
    """Write all notebooks where the site takes further files from."""
    folder = Path(app.confdir) / "_build" / "extra"
    folder.mkdir(parents=True, exist_ok=True)
    app.config.html_extra_path = [str(folder)]
    for name in app.env.found_docs or app.project.discover():
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
    """Connect the above to the build."""
    app.connect("builder-inited", write_notebooks)
    app.connect("source-read", add_links)
    return {"parallel_read_safe": True}
