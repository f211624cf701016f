"""Eight virtual CPU devices and the folder of real data, before jax starts."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Three files run at a time: threads that wait for a core of their own spin, in t-SNE for most of its time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Programs run for moments here, in notebooks and commands of their own too: compiling them takes longest.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "XLA_FLAGS" not in os.environ:  # parallel workers find what the first process set
    # Five times as fast to compile on a CPU. A version of XLA that does not know a flag ends the process.
    _FLAGS = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
    _TRY = [sys.executable, "-c", "import jax; jax.devices()"]
    _KNOWN = [
        flag
        for flag in _FLAGS
        if not subprocess.run(_TRY, env={**os.environ, "XLA_FLAGS": flag}, capture_output=True).returncode
    ]
    os.environ["XLA_FLAGS"] = " ".join(_KNOWN)

import jax
import numpy as np
import pytest
from hypothesis import settings

# Tracing makes many objects and few cycles.
gc.set_threshold(50_000)

# The first example compiles; time says nothing here.
settings.register_profile("default", deadline=None)
settings.load_profile("default")

_NEIGHBOUR = Path(__file__).parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: parallel workers then end together."""
    longest = (
        "contract", "mnist_energy", "estimators", "cli", "k_means", "vector_estimators", "gar",
        "deep_cluster", "hebbian_experiments", "nmce", "tune_energy", "nn", "embeddings", "inputs",
        "distributed", "docs", "benchmark", "training", "energy", "k_subspaces", "results", "notebooks",
        "soft_hebb", "compare", "loss_contract", "augment", "real_data",
    )  # fmt: skip
    place = {f"test_{name}.py": index for index, name in enumerate(longest)}
    items.sort(key=lambda item: place.get(item.path.name, len(longest)))


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


@pytest.fixture(autouse=True, scope="session")
def _coarse_pictures() -> None:
    """A fifth of the time that runs of seconds take is drawing."""
    from experiments.common import figures

    figures.matplotlib.rcParams["savefig.dpi"] = 40


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """Compiled programs hold memory maps, of which a process may have 65,530: XLA crashes beyond."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 20_000:
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


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Prepares images and their labels, of so many classes, as tfds does; returns the folder."""
    monkeypatch.setenv("SUL_JAX_CACHE", str(tmp_path / "cache"))

    def prepare(
        dataset: str, images: np.ndarray, labels: Mapping[str, tuple[int, np.ndarray]], *, num_train: int
    ) -> Path:
        import tensorflow_datasets as tfds
        from PIL import Image

        with tfds.core.registered.skip_registration():

            class Builder(tfds.core.GeneratorBasedBuilder):
                VERSION = tfds.core.Version("3.0.2")
                name = dataset
                pkg_dir_path = Path(__file__).parent

                def _info(self) -> tfds.core.DatasetInfo:
                    image = {"image": tfds.features.Image(shape=images.shape[1:])}
                    kinds = {k: tfds.features.ClassLabel(num_classes=n) for k, (n, _) in labels.items()}
                    features = tfds.features.FeaturesDict(image | kinds)
                    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

                def _split_generators(self, dl_manager: object) -> dict:
                    splits = {"train": range(num_train), "test": range(num_train, len(images))}
                    return {name: self._generate_examples(split) for name, split in splits.items()}

                def _generate_examples(self, split: range) -> Iterator[tuple[int, dict]]:
                    for i in split:
                        own = {name: int(values[i]) for name, (_, values) in labels.items()}
                        yield i, {"image": Image.fromarray(images[i])} | own

        builder = Builder(data_dir=str(tmp_path / "data"), file_format="array_record")
        # Without a look at the cloud, which needs TensorFlow.
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        return tmp_path / "data"

    return prepare


@pytest.fixture
def street_numbers(prepared: Callable[..., Path]) -> Path:
    """Thirty small pictures of noise in the place of SVHN."""
    images = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), np.uint8)
    return prepared("svhn_cropped", images, {"label": (10, np.arange(30) % 3)}, num_train=20)
