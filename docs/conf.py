"""How the site is built: `make docs`."""

import hashlib
import importlib.metadata
import os
import re
import shutil
import sys
import urllib.request
from pathlib import Path

from sphinx.ext import autosummary

import keras_ptloss

HERE = Path(__file__).parent
sys.path.append(str(HERE / "_extensions"))


def hash_of(package):
    """Return a hash of a package's sources."""
    folder = Path(package.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


project = "keras_ptloss"
author = "The keras_ptloss authors"
copyright = author
version = release = keras_ptloss.__version__

extensions = [
    "myst_nb",
    "notebooks",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_extensions", "_templates", "browser"]

# Broken references are errors, with two exceptions: single backticks in
# docstrings, which link to public names and otherwise mark code, and names of
# other projects in annotations.
nitpicky = True
default_role = "py:obj"
nitpick_ignore_regex = [
    ("py:obj", "(?s).*"),
    ("py:.*", r"(?!keras_ptloss\b).*"),
    (
        "py:class",
        r"keras_ptloss\.(metrics\..*Metric|.*\.(Layout|Responses))",
    ),
]

# Pages ---------------------------------------------------------------------

source_suffix = {".rst": "restructuredtext", ".md": "myst-nb"}
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
# The cache knows a page by its cells only. When the package changes, all pages
# must be executed again.
nb_execution_cache_path = str(
    HERE / "_build" / "jupyter_cache" / hash_of(keras_ptloss)
)
nb_execution_in_temp = True  # pages write files
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_execution_show_tb = True
nb_merge_streams = True  # one block for all that a cell prints
nb_output_stderr = "remove"  # TensorFlow's remarks on the machine

# Reference -----------------------------------------------------------------

autodoc_member_order = "bysource"
toc_object_entries_show_parents = "hide"  # write() for SoftLabels.write()
autodoc_typehints = "signature"
autosummary_generate = True
python_maximum_signature_line_length = 72
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_custom_sections = [("Reference", "notes_style")]
# A summary does not end at this full stop.
autosummary.WELL_KNOWN_ABBREVIATIONS += ("Eq.",)

# Address of the pages, and of the list of their names if it is elsewhere.
INVENTORIES = {
    "python": ("https://docs.python.org/3", None),
    "keras": ("https://keras.io/api", None),
    "numpy": ("https://numpy.org/doc/stable", None),
    "scipy": ("https://docs.scipy.org/doc/scipy", None),
    "jax": ("https://docs.jax.dev/en/latest", None),
    # TensorFlow publishes no list; this one is from GPflow.
    "tensorflow": (
        "https://www.tensorflow.org/api_docs/python",
        "https://github.com/GPflow/tensorflow-intersphinx/raw/master/"
        "tf2_py_objects.inv",
    ),
}

# HTML ----------------------------------------------------------------------

html_theme = "pydata_sphinx_theme"
html_title = "keras_ptloss"
html_favicon = "_static/favicon.svg"
html_context = {"default_mode": "auto"}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_domain_indices = False
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": f"keras_ptloss {version}"},
    "navbar_end": ["theme-switcher"],
    "navbar_persistent": ["search-button"],  # a search field is too wide
    "header_links_before_dropdown": 8,
    "secondary_sidebar_items": {"**": ["page-toc"], "index": []},
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "show_toc_level": 2,
}
html_sidebars = {
    page: []
    for page in (
        "index",
        "get_started",
        "which",
        "method",
        "storage",
        "interactive",
        "results/index",
        "changelog",
        "contributing",
    )
}
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

# One file from the package `django-static-mathjax` is copied into the site, so
# that formulas need no network.
MATHJAX = "mathjax/static/mathjax/es5/tex-svg.js"
mathjax_path = "mathjax/tex-svg.js"
# Only the menu would load more of MathJax.
mathjax3_config = {"options": {"enableMenu": False}}


def reachable(inventories):
    """Return the inventories that can be downloaded now.

    Without a network, links to other projects become plain code.
    """
    mapping = {}
    for name, (address, inventory) in inventories.items():
        request = urllib.request.Request(
            inventory or f"{address}/objects.inv",
            headers={"User-Agent": "Sphinx"},
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                if answer.read(9) == b"# Sphinx ":
                    mapping[name] = (address, inventory)
        except OSError:
            continue
    return mapping


# INTERSPHINX=0 builds as on a machine without a network.
intersphinx_mapping = (
    reachable(INVENTORIES) if os.environ.get("INTERSPHINX") != "0" else {}
)


def mark_formulas(app, what, name, thing, options, lines):
    """Show blocks that are indented by four spaces as code, as in Markdown."""
    marked = []
    section = "\n"
    for line in lines:
        if line and not line.startswith(" "):
            section = line
        elif (
            line.startswith("    ")
            and len(marked) > 1
            and not marked[-1].strip()
            and section
        ):
            marked += ["::", ""]
            section = ""
        marked.append(line)
        if re.fullmatch(r"[A-Z]\w+:", line):
            section = ""  # the lines of Args, Returns, ... are always indented
    lines[:] = marked


def leave_out_any(app, what, name, thing, options, signature, returns):
    """Leave out the annotation `Any`, which stands for tensors."""
    if signature is None:
        return None
    any_ = r"(~?typing\.)?Any"
    if returns and re.fullmatch(any_, returns):
        returns = None
    return re.sub(rf": {any_}\b", "", signature), returns


def find_public(app, env, node, contnode):
    """Link a public name to its page, however it is written.

    Docstrings have `SoftLabels.write`, annotations have
    `keras_ptloss.soft_labels.soft_labels.SoftLabels`.
    """
    path = re.fullmatch(r"(keras_ptloss\.)?((?:\w+\.)*\w+)", node["reftarget"])
    if node.get("refdomain") != "py" or path is None:
        return None
    name = re.sub(r"^([a-z_]\w*\.)+(?=\w)", "", path[2])
    domain = env.get_domain("py")
    for known in domain.objects:
        if re.fullmatch(rf"keras_ptloss\.([a-z_]+\.)?{name}", known):
            return domain.resolve_xref(
                env, node["refdoc"], app.builder, "obj", known, node, contnode
            )
    return None


def copy_mathjax(app, exception):
    """Copy MathJax to `mathjax_path`."""
    if exception is None and app.builder.format == "html":
        package = importlib.metadata.distribution("django-static-mathjax")
        target = Path(app.outdir) / "_static" / mathjax_path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(package.locate_file(MATHJAX), target)


def setup(app):
    """Register these functions with Sphinx."""
    # This must run before napoleon splits Google's sections.
    app.connect("autodoc-process-docstring", mark_formulas, priority=400)
    app.connect("autodoc-process-signature", leave_out_any)
    app.connect("missing-reference", find_public)
    app.connect("build-finished", copy_mathjax)
