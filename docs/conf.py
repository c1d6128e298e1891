"""The site: ``python -m sphinx -W --keep-going -b html docs docs/_build/html``.

Pages are Markdown that GitHub shows too, notebooks, and an API reference made from the docstrings.
"""

import inspect
from pathlib import Path
from typing import Any

from docutils import nodes
from flax import linen, nnx
from sphinx import addnodes
from sphinx.application import Sphinx

project = "l1inf-optax"
html_title = project
author = "the l1inf-optax contributors"
copyright = author

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_argparse_cli",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "figures", "**/.ipynb_checkpoints"]
html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "navbar_persistent": [],  # the sidebar has a search field
    "use_download_button": False,
    "use_fullscreen_button": False,
}

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_timeout = 300
nb_merge_streams = True
nb_execution_raise_on_error = True
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

# What a docstring has in single backticks is a name, linked where it is known, or else code.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more than the annotations: shapes and dtypes
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# The names of other libraries that docstrings link to, in Sphinx's readable first inventory format:
# a build needs no network. A name that is missing there is shown as code, without a link.
intersphinx_mapping = {
    name: (url, f"inventories/{name}.inv")
    for name, url in {
        "flax": "https://flax.readthedocs.io/en/latest/",
        "jax": "https://docs.jax.dev/en/latest/",
        "linen": "https://flax-linen.readthedocs.io/en/latest/",
        "optax": "https://optax.readthedocs.io/en/latest/",
        "sklearn": "https://scikit-learn.org/stable/",
    }.items()
}

NOTEBOOKS = Path(__file__).parent / "notebooks"  # a link to those at the top of the repository

# The site has a page about these files of the repository, to which pages link for GitHub's readers.
PAGES = {
    "README": "index",
    **{f"l1inf_optax/{name}.py": f"api/{name}" for name in ("bounds", "linen", "nnx")},
    **{f"notebooks/{path.stem}": f"notebooks/{path.stem}" for path in NOTEBOOKS.glob("*.ipynb")},
}


def link_to_pages(app: Sphinx, document: nodes.document) -> None:
    """Turns links to the repository's files into links to the pages that stand for them."""
    for kind in (addnodes.download_reference, addnodes.pending_xref):
        for link in list(document.findall(kind)):
            for file, page in PAGES.items():
                if link.get("reftype") == "myst" and link["reftarget"].endswith(file):
                    target = {"reftargetid": None, **link.attributes}
                    target |= {"refdomain": "doc", "reftarget": page}
                    link.replace_self(addnodes.pending_xref("", *link.children, **target))


class Dots:
    """Stands for a default that is no number or name."""

    def __repr__(self) -> str:
        return "..."


def module_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """The arguments of a Flax module as its ``__init__`` has them, without functions' addresses."""
    if what != "class" or not issubclass(obj, (linen.Module, nnx.Module)):
        return None
    _, *arguments = inspect.signature(obj.__init__).parameters.values()
    plain = (bool, int, str, type(None))
    shown = [
        a.replace(
            annotation=a.empty,
            default=a.default if a.default is a.empty or isinstance(a.default, plain) else Dots(),
        )
        for a in arguments
        if a.name not in ("parent", "name")  # Linen's own
    ]
    return str(inspect.Signature(shown)), returns


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("doctree-read", link_to_pages, priority=100)  # before downloads are collected
    app.connect("autodoc-process-signature", module_signature)
    return {"parallel_read_safe": True}
