"""The documentation: python -m sphinx -W --keep-going docs build/docs, with the extra `docs`."""

import os
import shutil
import tomllib
from pathlib import Path

import sul_jax

_ROOT = Path(__file__).parents[1]
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]

project = "sul_jax"
author = _PROJECT["authors"][0]["name"]
copyright = author
version = release = sul_jax.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "myst_nb",  # with MyST's Markdown
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

# Notebooks are kept without outputs. SUL_JAX_DOCS_RUN=1 runs them for their pages, which takes half an hour
# on two cores; otherwise the pages show the code alone. SUL_JAX_QUICK=1 shortens the trainings.
shutil.copytree(_ROOT / "notebooks", Path(__file__).parent / "notebooks", dirs_exist_ok=True)
nb_execution_mode = "force" if os.environ.get("SUL_JAX_DOCS_RUN") else "off"
nb_execution_timeout = 1800
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars

# Docstrings write names as `name` and options as **options.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80


def _skip_fields(app, what, name, member, skip, options):
    """Fields of named tuples are explained by their class, and scikit-learn's routing by scikit-learn."""
    routing = name.startswith("set_") and name.endswith("_request")
    return True if routing or type(member).__name__ == "_tuplegetter" else None


def setup(app):
    """Sphinx calls this first."""
    app.connect("autodoc-skip-member", _skip_fields)


html_theme = "furo"
html_title = f"sul_jax {version}"
html_theme_options = {
    "source_repository": _PROJECT["urls"]["Repository"],
    "source_branch": "main",
    "source_directory": "docs/",
}
