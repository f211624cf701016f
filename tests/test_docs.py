"""The documentation: examples run, the reference has every public name. Sphinx itself checks the rest."""

import inspect
import re
import types
from pathlib import Path
from typing import Any

import pytest

import sul_jax

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if "```python\n" in page.read_text()]
SLOW = ("embeddings", "rate_reduction")
REFERENCE = "".join(page.read_text() for page in sorted((DOCS / "reference").glob("*.md")))
MODULES = [getattr(sul_jax, name) for name in sul_jax.__all__]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page.stem in SLOW)) for page in PAGES],
    ids=lambda page: page.stem,
)
def test_examples_run(page: Path) -> None:
    names: dict[str, Any] = {}
    for block in page.read_text().split("```python\n")[1:]:
        exec(block.split("```")[0], names)


@pytest.mark.parametrize(
    "module", [m for m in MODULES if isinstance(m, types.ModuleType)], ids=lambda module: module.__name__
)
def test_reference_has_every_name(module: types.ModuleType) -> None:
    """Sphinx takes what belongs to a module and has a docstring."""
    assert re.search(rf"^\.\. automodule:: {module.__name__}$", REFERENCE, re.MULTILINE)
    for name in getattr(module, "__all__", vars(module)):
        member = getattr(module, name)
        own = hasattr(module, "__all__") or getattr(member, "__module__", None) == module.__name__
        if own and not name.startswith("_") and (inspect.isfunction(member) or inspect.isclass(member)):
            assert (member.__doc__ or "").strip(), name


def test_names_of_the_package_belong_to_its_modules() -> None:
    for member in MODULES:
        if not isinstance(member, types.ModuleType):
            assert f".. automodule:: {member.__module__}\n" in REFERENCE
