"""Every method on the same images, judged in the same way.

    python -m experiments.compare                              # MNIST's test images if available, or digits
    python -m experiments.compare --dataset digits --seeds 2   # and how well two seeds agree
    python -m experiments.compare --dataset usps --methods energy acol pixels
    python -m experiments.compare --methods pixels energy+k_subspaces energy+rate_reduction

Each method learns from the images without their labels, in its own process, with the defaults of its
estimator in `sul_jax.estimators`. If umap-learn is installed, UMAP with a Gaussian mixture is compared too.
The codes of a method can also be clustered by an estimator for vectors: `energy+k_subspaces`.
"""

import dataclasses
import importlib.util
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tqdm import tqdm

from experiments import data
from experiments.common.options import ConfigError, check_options, command_line
from experiments.common.runs import Outcome, peak_gib, record, write_json
from experiments.common.tables import comparison
from sul_jax import metrics, probes
from sul_jax.cli import embeddings
from sul_jax.cli.networks import METHODS
from sul_jax.cli.ranges import NonNegativeInt, PositiveInt, Range

EXPERIMENT = "compare"
UMAP = "umap"


@dataclass(frozen=True)
class Config:
    """Options of the comparison."""

    dataset: str = "auto"
    """As in mnist_energy; the test images are clustered."""
    data_dir: Path | None = None
    """Folder of data sets; by default $SUL_JAX_DATA."""
    methods: tuple[str, ...] = ()
    """energy, acol, nmce, deepcluster, pixels, umap; each may be followed by + and k_means (by cosine),
    k_subspaces or rate_reduction. By default all that can run, without +."""
    num_clusters: tuple[Annotated[int, Range(2)], ...] = ()
    """More numbers of clusters, besides the number of classes. They give the rank correlation between the
    seeds' agreement and the accuracy, for methods that learn without a number of clusters."""
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
    available = [*METHODS, *([UMAP] if importlib.util.find_spec(UMAP) else [])]
    behind = ["", *(f"+{name}" for name in embeddings.METHODS)]
    for method in config.methods:
        if method not in [first + second for first in available for second in behind]:
            hint = "; umap needs the package umap-learn" if method == UMAP else ""
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
    config = dataclasses.replace(config, dataset=dataset.name, methods=config.methods or tuple(available))
    print(f"{dataset.name}: {len(images)} images ({dataset.source})")
    results: dict[str, list[dict[str, float]]] = {}
    with tqdm(total=len(config.methods) * config.seeds, desc="comparing", unit="run") as bar:
        for method in config.methods:
            runs: list[tuple[dict[str, float], dict[int, np.ndarray]]] = []
            for seed in range(config.seed, config.seed + config.seeds):
                bar.set_postfix_str(f"{method}, seed {seed}")
                # A process of its own: its memory is its own peak, and nothing is compiled already.
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    runs.append(
                        process.submit(judge, method, seed, images, labels, config.num_clusters).result()
                    )
                bar.update()
            alike = {}
            for number in runs[0][1] if len(runs) > 1 else ():
                table = 100 * metrics.agreement([clusters[number] for _, clusters in runs])
                alike[_name("agreement", number, classes)] = round(metrics.mean_agreement(table), 3)
            results[method] = [values | alike for values, _ in runs]
            write_json(config.workdir / "results.json", results)
            for index, values in enumerate(results[method] if config.record else ()):
                one = dataclasses.replace(config, methods=(method,))
                outcome = Outcome(values, dataset, len(images), len(images), values["seconds"])
                record(EXPERIMENT, one, config.seed + index, outcome)
    print("\n" + comparison(results))
    return results


def _name(metric: str, number: int, classes: int) -> str:
    return metric if number == classes else f"{metric}_{number}_clusters"


def judge(
    method: str, seed: int, images: np.ndarray, labels: np.ndarray, further: Sequence[int] = ()
) -> tuple[dict[str, float], dict[int, np.ndarray]]:
    """Learns, clusters and compares with the labels; meant for a process of its own.

    Args:
      method: as in `Config.methods`.
      seed: of the method.
      images: `[num_images, height, width, channels]`.
      labels: `[num_images]`.
      further: numbers of clusters beside that of the classes.

    Returns:
      The metrics, and the clusters by their number.
    """
    number = len(np.unique(labels))
    others: dict[int, np.ndarray] = {}
    method, _, by = method.partition("+")
    if method == UMAP:
        importlib.import_module("umap")  # takes longer than what it does here
    began = time.perf_counter()
    if method == UMAP:
        codes, clusters = _umap(seed, images, number)
    else:
        model: Any = METHODS[method](number, random_state=seed)
        codes = model.fit_transform(images)
        clusters = model.labels_
    if by:
        clusters = embeddings.estimator(by, number, seed, "cosine", rank=4).fit_predict(codes)
    seconds, peak = time.perf_counter() - began, peak_gib()
    if not by and method != UMAP and not model.learns_clusters:
        others = {n: model.with_clusters(codes, n).labels_ for n in further if n != number}
    half = np.random.default_rng(0).permutation(len(labels))
    known, asked = half[: len(half) // 2], half[len(half) // 2 :]
    knn = probes.classifiers(codes[known], labels[known], codes[asked], labels[asked], names=["knn"])
    values = metrics.in_percent(labels, clusters)
    values |= {"knn_accuracy": knn["knn"], "seconds": seconds, "peak_gib": peak}
    for n, other in others.items():
        accuracy = 100 * metrics.clustering_accuracy(labels, other)
        values[_name("clustering_accuracy", n, number)] = accuracy
    return {name: round(value, 3) for name, value in values.items()}, {number: clusters} | others


def _umap(seed: int, images: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.mixture import GaussianMixture
    from umap import UMAP as Reducer  # noqa: N811

    codes = Reducer(random_state=seed, n_jobs=1).fit_transform(images.reshape(len(images), -1))
    clusters = GaussianMixture(number, n_init=5, random_state=seed).fit_predict(codes)
    return np.asarray(codes), np.asarray(clusters)


main = partial(command_line, run, Config, description=__doc__)


if __name__ == "__main__":
    main()
