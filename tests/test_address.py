"""The repository's address and the version: said once, and the same wherever they must be written out."""

import json
import re
import tomllib
from pathlib import Path

import pytest

import sul_jax

ROOT = Path(__file__).parents[1]
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
REPOSITORY = URLS["Repository"]
COLAB = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [
    path
    for pattern in ("*.md", "*.cff", "docs/**/*.md", "docs/conf.py", "notebooks/*.ipynb", "pyproject.toml")
    for path in sorted(ROOT.glob(pattern))
]
_ADDRESS = re.compile(
    r"https://(?:colab\.research\.google\.com/)?github(?:\.com)?/[^/\s]+/sul_jax|https://[^/\s]+\.github\.io/sul_jax"
)


def _cells(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_address_is_that_of_pyproject(page: Path) -> None:
    found = set(_ADDRESS.findall(page.read_text()))
    assert found <= {REPOSITORY, COLAB, URLS["Documentation"]}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_begin_with_their_badge_and_the_install_cell(path: Path) -> None:
    badge, install, *others = _cells(path)
    assert f"({COLAB}/blob/main/notebooks/{path.name})" in badge
    assert f'"sul_jax[experiments] @ git+{REPOSITORY}"' in install
    assert install == _cells(NOTEBOOKS[0])[1]
    assert not any("pip install" in cell for cell in others)


def test_readme_links_every_notebook_in_colab() -> None:
    text = (ROOT / "README.md").read_text()
    assert [path.name for path in NOTEBOOKS if f"({COLAB}/blob/main/notebooks/{path.name})" not in text] == []


def test_citation_has_the_version() -> None:
    assert f"\nversion: {sul_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {sul_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()
