"""Every notebook runs from top to bottom, and is stored without outputs."""

from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client import KernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# The first is looked at every time.
CASES = [NOTEBOOKS[0], *(pytest.param(path, marks=pytest.mark.slow) for path in NOTEBOOKS[1:])]


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelManager]:
    """One process for all of them: imports and small programs of JAX take longest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUL_JAX_QUICK", "1")
        patch.setenv("MPLBACKEND", "agg")
        manager = KernelManager()
        manager.start_kernel(cwd=str(ROOT))
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", CASES, ids=lambda p: p.name)
def test_notebook(path: Path, kernel: KernelManager) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    # Each begins without the names of the one before.
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    NotebookClient(notebook, timeout=300, km=kernel).execute()
