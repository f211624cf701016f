"""Every method on the same images, judged in the same way.

    python -m experiments.compare                              # MNIST's test images if available, or digits
    python -m experiments.compare --dataset digits --seeds 2   # and how well two seeds agree
    python -m experiments.compare --dataset usps --methods energy acol pixels
    python -m experiments.compare --methods energy energy+k_subspaces energy+rate_reduction energy+hdbscan
    python -m experiments.compare --methods pixels energy --seeds 2 --num-clusters 5 8 12 15

Each method learns from the images without their labels, in its own process, with the defaults of its
estimator in `sul_jax.estimators`. If umap-learn is installed, UMAP with a Gaussian mixture is compared too.
The codes of a method can also be clustered by what clusters embeddings: `energy+k_subspaces`. With
--num-clusters, a picture shows which number measures without labels would choose.
"""

import dataclasses
import importlib.util
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from sklearn import cluster
from sklearn.mixture import GaussianMixture
from tqdm import tqdm

from experiments import data
from experiments.common import figures
from experiments.common.options import ConfigError, check_options, command_line
from experiments.common.runs import Outcome, peak_gib, record, write_json
from experiments.common.tables import comparison
from sul_jax import metrics, probes
from sul_jax.cli import embeddings, measures
from sul_jax.cli.figures import measures_grid
from sul_jax.cli.networks import METHODS
from sul_jax.cli.ranges import NonNegativeInt, PositiveInt, Range

EXPERIMENT = "compare"
UMAP, HDBSCAN = "umap", "hdbscan"


@dataclass(frozen=True)
class Config:
    """Options of the comparison."""

    dataset: str = "auto"
    """As in mnist_energy; the test images are clustered."""
    data_dir: Path | None = None
    """Folder of data sets; by default $SUL_JAX_DATA."""
    methods: tuple[str, ...] = ()
    """energy, acol, nmce, deepcluster, pixels, umap; each may be followed by + and k_means (by cosine),
    k_subspaces, rate_reduction or hdbscan (after UMAP; it finds its own number). Codes are learned once if
    their method comes first. By default all that can run, without +."""
    num_clusters: tuple[Annotated[int, Range(2)], ...] = ()
    """More numbers of clusters, besides the number of classes, for the picture of what measures without
    labels would choose; of methods without + that learn without a number of clusters."""
    num_images: Annotated[int, Range(20)] | None = None
    """Use only this many images, the first ones."""
    seeds: PositiveInt = 1
    """Number of seeds: seed, seed + 1, …; with two or more, also how well they agree."""
    seed: NonNegativeInt = 0
    """First seed."""
    workdir: Path = Path("runs/compare")
    """Where the table is written."""
    record: bool = False
    """Append the results to experiments/results/compare.json."""


def run(config: Config) -> dict[str, list[dict[str, float]]]:
    """Compares; see the module's docstring.

    Returns:
      The metrics of every seed of every method: accuracies and agreements in percent, seconds, and GiB of
      memory at the peak.

    Raises:
      ValueError: options or data that cannot be used.
    """
    check_options(config)
    there = importlib.util.find_spec(UMAP) is not None
    available = [*METHODS, *([UMAP] if there else [])]
    behind = ["", *(f"+{name}" for name in (*embeddings.METHODS, *([HDBSCAN] if there else [])))]
    for method in config.methods:
        if method not in [first + second for first in available for second in behind]:
            wanted = not there and (UMAP in method or HDBSCAN in method)
            hint = "; umap and hdbscan need the package umap-learn" if wanted else ""
            raise ConfigError(
                f"methods: {method!r} is not one of {', '.join(available)}, alone or with one of "
                f"{', '.join(behind[1:])}{hint}"
            )
    dataset = data.load(config.dataset, config.data_dir)
    test = dataset.test[: config.num_images]
    images, labels = test.images, test.labels
    if labels is None:
        raise ConfigError(f"dataset={config.dataset!r} has no labels to compare with")
    classes = len(np.unique(labels))
    numbers = tuple(dict.fromkeys((classes, *config.num_clusters)))
    config = dataclasses.replace(config, dataset=dataset.name, methods=config.methods or tuple(available))
    print(f"{dataset.name}: {len(images)} images ({dataset.source})")
    results: dict[str, list[dict[str, float]]] = {}
    measured: dict[str, dict[int, dict[str, float]]] = {}
    total = len(config.methods) * config.seeds
    with tempfile.TemporaryDirectory() as kept, tqdm(total=total, desc="comparing", unit="run") as bar:
        for method in config.methods:
            runs = []
            for seed in range(config.seed, config.seed + config.seeds):
                bar.set_postfix_str(f"{method}, seed {seed}")
                # A process of its own: its memory is its own peak, and nothing is compiled already.
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    judged = process.submit(judge, method, seed, images, labels, numbers, Path(kept))
                    runs.append(judged.result())
                bar.update()
            own = _together(runs)
            alike = {name: value for name, value in own[classes].items() if name == "agreement"}
            if len(own) > 1:
                measured[method] = own
            results[method] = [run.scores | alike for run in runs]
            write_json(config.workdir / "results.json", results)
            for index, values in enumerate(results[method] if config.record else ()):
                one = dataclasses.replace(config, methods=(method,))
                outcome = Outcome(values, dataset, len(images), len(images), values["seconds"])
                record(EXPERIMENT, one, config.seed + index, outcome)
    if measured:
        write_json(config.workdir / "measures.json", measured)
        figures.save(measures_grid(measured, classes), config.workdir / "measures.png")
    print("\n" + comparison(results))
    return results


class Judged(NamedTuple):
    """What one seed of a method gave.

    Attributes:
      scores: as in `run`.
      clusters: by their number.
      measures: `measures.label_free` of them, where there are several numbers.
    """

    scores: dict[str, float]
    clusters: dict[int, np.ndarray]
    measures: dict[int, dict[str, float]]


def _together(runs: Sequence[Judged]) -> dict[int, dict[str, float]]:
    """By the number of clusters, means of the measures, and how well seeds agree."""
    found: dict[int, dict[str, float]] = {}
    for n in sorted(runs[0].clusters):
        found[n] = {}
        if len(runs) > 1:
            table = 100 * metrics.agreement([run.clusters[n] for run in runs])
            found[n]["agreement"] = round(metrics.mean_agreement(table), 3)
        for name in runs[0].measures.get(n, ()):
            found[n][name] = round(float(np.mean([run.measures[n][name] for run in runs])), 4)
    return found


def judge(
    method: str, seed: int, images: np.ndarray, labels: np.ndarray, numbers: Sequence[int], kept: Path
) -> Judged:
    """Learns, clusters and compares with the labels; meant for a process of its own.

    Args:
      method: as in `Config.methods`.
      seed: of the method.
      images: `[num_images, height, width, channels]`.
      labels: `[num_images]`.
      numbers: of clusters, that of the classes first; the others where they need no other learning.
      kept: folder in which codes are left for other ways to cluster them.
    """
    first, _, by = method.partition("+")
    file = kept / f"{first}-{seed}.npz"
    if first == UMAP or by == HDBSCAN:
        importlib.import_module("umap")  # takes longer than what it does here
    began, before, peak = time.perf_counter(), 0.0, 0.0
    model: Any = (METHODS | {UMAP: _Umap})[first](numbers[0], random_state=seed)
    if by and file.exists():
        with np.load(file) as stored:
            codes, before, peak = stored["codes"], float(stored["seconds"]), float(stored["peak"])
    else:
        codes = model.fit_transform(images)
        np.savez(file, codes=codes, seconds=time.perf_counter() - began, peak=peak_gib())

    def clustered(number: int) -> np.ndarray:
        if by == HDBSCAN:  # on UMAP for clustering, as its authors advise; noise is cluster 0
            reduced = _reduced(codes, seed, n_neighbors=30, min_dist=0.0, n_components=10)
            return 1 + cluster.HDBSCAN(max(5, len(codes) // 100), copy=True).fit_predict(reduced)
        if by:
            return np.asarray(embeddings.estimator(by, number, seed, "cosine", 4).fit_predict(codes))
        own = model if number == numbers[0] else model.with_clusters(codes, number)
        return np.asarray(own.labels_)

    clusters = {numbers[0]: clustered(numbers[0])}
    seconds, peak = before + time.perf_counter() - began, max(peak, peak_gib())
    if not by and not model.learns_clusters:
        clusters |= {number: clustered(number) for number in numbers[1:]}
    half = np.random.default_rng(0).permutation(len(labels))
    known, asked = half[: len(half) // 2], half[len(half) // 2 :]
    knn = probes.classifiers(codes[known], labels[known], codes[asked], labels[asked], names=["knn"])
    values = metrics.in_percent(labels, clusters[numbers[0]])
    values |= {"knn_accuracy": knn["knn"], "seconds": seconds, "peak_gib": peak}
    if by == HDBSCAN:
        values["clusters_found"] = float(clusters[numbers[0]].max())  # cluster 0 is what it calls noise
    scores = {name: round(value, 3) for name, value in values.items()}
    return Judged(scores, clusters, measures.label_free(codes, clusters) if len(clusters) > 1 else {})


class _Umap:
    """UMAP with a Gaussian mixture, as one of our estimators."""

    learns_clusters = False

    def __init__(self, n_clusters: int, random_state: int):
        self.n_clusters, self.seed = n_clusters, random_state

    def fit_transform(self, images: np.ndarray) -> np.ndarray:
        codes = _reduced(images.reshape(len(images), -1), self.seed)
        self.with_clusters(codes, self.n_clusters)
        return codes

    def with_clusters(self, codes: np.ndarray, number: int) -> "_Umap":
        self.labels_ = GaussianMixture(number, n_init=5, random_state=self.seed).fit_predict(codes)
        return self


def _reduced(codes: np.ndarray, seed: int, **options: Any) -> np.ndarray:
    from umap import UMAP as Reducer  # noqa: N811

    return np.asarray(Reducer(random_state=seed, n_jobs=1, **options).fit_transform(codes))


main = partial(command_line, run, Config, description=__doc__)


if __name__ == "__main__":
    main()
