"""Eight virtual CPU devices and the folder of real data, before jax starts."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Programs run for moments here, in notebooks and commands of their own too: compiling them takes longest.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest
from hypothesis import settings

# The first example compiles; time says nothing here.
settings.register_profile("default", deadline=None)
settings.load_profile("default")

_NEIGHBOUR = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def _caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests leave the user's cache alone; programs that recur are compiled once."""
    os.environ.setdefault("SUL_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    # Beside the folders of parallel workers, so that they share it.
    shared = tmp_path_factory.getbasetemp().parent / "compiled"
    # Commands and notebooks that tests start take theirs from here too.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(shared)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    jax.config.update("jax_compilation_cache_dir", str(shared))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """Compiled programs hold memory maps, of which a process may have 65,530: XLA crashes beyond."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def optimized() -> Iterator[None]:
    """Programs as users run them."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def data_dir(optimized: None) -> Path:
    """The folder of real data sets; skips the test where there is none."""
    found = Path(os.environ.get("SUL_JAX_DATA", _NEIGHBOUR))
    if not found.is_dir():
        pytest.skip("no real data: set SUL_JAX_DATA to a folder of data sets")
    return found
