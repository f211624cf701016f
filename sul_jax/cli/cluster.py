"""Clusters your own images: one command, one report.

    sul-jax cluster FOLDER --num-clusters 10
    sul-jax cluster FILE.npz --num-clusters 5 8 10 12 --method acol

Reads the pictures in a folder, of any sizes and kinds, or the arrays `images` and perhaps `labels` of an
.npz file. Learns from them without labels, and writes `report.html` (one file that opens anywhere),
`clusters.csv` and the model. Several networks are learned from different seeds: how well they agree tells
whether a clustering is stable, and which number of clusters is, without any label. Stable need not be
right. An image belongs to the nearest centre, but with `--method nmce` where its network says: a margin may
then be negative. Names of sub-folders serve as labels for the report alone. Nothing in the folder is
changed; files that cannot be read are counted and left out.
"""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro

from sul_jax import __version__, metrics
from sul_jax._files import atomic_path, write_json
from sul_jax.cli import report as page
from sul_jax.cli.images import Images, read, readable, summary
from sul_jax.cli.listing import write_clusters
from sul_jax.cli.networks import Fit, Networks, estimator
from sul_jax.cli.options import ConfigError, as_path, check_options
from sul_jax.cli.ranges import NonNegativeInt, PositiveInt, Range
from sul_jax.cli.tables import format_table
from sul_jax.cli.workdir import Workdir, identity, make_workdir
from sul_jax.estimators import PixelClustering

_WRITTEN = ("results.json", "model", "reading.json", "report.html", "clusters.csv")
_STATE = ("network-seed*",)


@dataclass(frozen=True)
class Config:
    """Options of the command."""

    images: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FOLDER")]]
    """Folder of pictures (sub-folders are their classes), or an .npz file with `images` and perhaps
    `labels`."""
    num_clusters: tuple[Annotated[int, Range(2)], ...] = ()
    """Clusters; of several numbers the one on which the seeds agree best is taken, which is the most stable,
    not always that of the kinds of images. By default the number of classes, where there are labels."""
    method: Literal["energy", "acol", "nmce", "deepcluster", "pixels"] = "energy"
    """How to learn; pixels is plain k-means."""
    image_size: Annotated[int, Range(4, 4096)] | None = None
    """Side of the square to which pictures are resized (the shorter side, then the middle); by default what
    the method's network is made for: 28, for acol 16, for deepcluster 32."""
    seeds: PositiveInt = 3
    """Networks learned from different seeds."""
    seed: NonNegativeInt = 0
    """The first of them."""
    seeds_together: PositiveInt | None = None
    """Networks that learn at once, by vmap; by default four on an accelerator and one on a CPU, where one
    keeps all cores busy."""
    workdir: Path = Path("runs/cluster")
    """Where everything is written; an earlier run there is set aside, not lost."""
    resume: bool = False
    """Go on with an interrupted run: what was learned is read, not learned again."""


class Report(NamedTuple):
    """What a run gave.

    Attributes:
      labels: `[num_images]`, clusters.
      num_clusters: the number taken.
      agreement: for each number of clusters, the mean ARI between seeds in percent; empty with one seed.
      scores: accuracy, NMI and ARI against labels in percent, where there are any.
      baseline: the same of k-means on the pixels.
      model: the estimator.
    """

    labels: np.ndarray
    num_clusters: int
    agreement: dict[int, float]
    scores: dict[str, float]
    baseline: dict[str, float]
    model: Any


def run(config: Config) -> Report:
    """Clusters images; see the module's docstring.

    Args:
      config: the options.

    Returns:
      The clusters, how good they are, and the model.

    Raises:
      ValueError: images or options that cannot be used.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> import numpy as np
      >>> from sul_jax.cli import cluster
      >>> folder = Path(tempfile.mkdtemp())
      >>> np.savez(folder / "mine.npz", images=np.eye(9, dtype=np.uint8).reshape(9, 3, 3))
      >>> options = {"method": "pixels", "seeds": 1, "image_size": 4, "workdir": folder / "run"}
      >>> cluster.run(cluster.Config(folder / "mine.npz", 2, **options)).num_clusters
      ... # doctest: +ELLIPSIS
      9 images of 3×3×1, no labels
      ...
      2
    """
    config, began = _checked(config), time.perf_counter()
    size = estimator(config.method, 2, 0, config.image_size).image_size
    make_workdir(config.workdir)  # before anything takes time
    _refuse_what_is_not_ours(config.workdir)
    images = read(config.images, size, without=config.workdir)
    config = dataclasses.replace(config, num_clusters=_numbers_of_clusters(config, images), image_size=size)
    with _opened(config, images) as workdir:
        print("\n".join(summary(images)))
        reading = {"sul_jax": __version__, "image_size": size, "scale": images.scale}
        write_json(config.workdir / "reading.json", reading)
        seeds = range(config.seed, config.seed + config.seeds)
        networks = Networks(config.workdir, config.method, size, images.pixels)
        fits = networks.learn(seeds, config.num_clusters, config.seeds_together)
        report, fit, table = _judge(images, fits)
        report = report._replace(baseline=_baseline(config, images, report))
        _write(config, images, report, fit, table, began)
        numbers = {"num_clusters": report.num_clusters, "agreement": report.agreement}
        baseline = {f"pixels_{name}": value for name, value in report.baseline.items()}
        left_out = {"num_images": len(images.pixels), "left_out": len(images.left_out)}
        workdir.results.append(numbers | left_out | report.scores | baseline)
    _print(config, report)
    return report


def _checked(config: Config) -> Config:
    """The options with their types, as a caller in Python may not have given them."""
    numbers = config.num_clusters
    config = dataclasses.replace(
        config,
        images=as_path("images", config.images),
        workdir=as_path("workdir", config.workdir),
        num_clusters=tuple(numbers) if isinstance(numbers, Iterable) else (numbers,),
    )
    check_options(config)
    if config.workdir.resolve() == config.images.resolve():
        raise ConfigError(f"workdir={str(config.workdir)!r} is the folder of images; give another")
    return config


def _refuse_what_is_not_ours(workdir: Path) -> None:
    if not (workdir / "config.json").exists():
        for name in _WRITTEN:
            if (workdir / name).exists():
                raise ConfigError(f"workdir={str(workdir)!r} holds a {name} of something else")


def _opened(config: Config, images: Images) -> Workdir:
    """The run's folder; where the images are does not matter, what they are does."""
    chosen = ("num_clusters", "method", "image_size", "seeds", "seed", "seeds_together")
    about = {name: getattr(config, name) for name in chosen}
    return Workdir(
        config.workdir,
        "sul-jax cluster",
        {"images": readable(config.images.resolve().name), "data": identity(images.pixels), **about},
        files=(*_WRITTEN, *_STATE),
        state=_STATE,
        resume=config.resume,
        may_differ=("images", "seeds_together"),
    )


def _numbers_of_clusters(config: Config, images: Images) -> tuple[int, ...]:
    numbers = config.num_clusters or ((len(images.classes),) if images.labels is not None else ())
    if not numbers:
        raise ConfigError("num_clusters is needed: there are no labels (sub-folders) to count")
    if len(numbers) > 1 and config.seeds == 1:
        raise ConfigError(
            "several num_clusters are compared by how well seeds agree: seeds must be at least 2"
        )
    different: set[bytes] = set()
    for image in images.pixels:
        different.add(image.tobytes())
        if len(different) >= max(numbers):
            return tuple(dict.fromkeys(numbers))
    raise ConfigError(
        f"num_clusters={max(numbers)} exceeds the {len(different)} images that differ from each other"
    )


def _judge(images: Images, fits: Sequence[Fit]) -> tuple[Report, Fit, np.ndarray]:
    """The number of clusters and the seed that agree best with the others, and the seeds' agreement."""
    tables = {}
    for number in dict.fromkeys(fit.model.n_clusters for fit in fits):
        labels = [fit.model.labels_ for fit in fits if fit.model.n_clusters == number]
        tables[number] = 100 * metrics.agreement(labels)
    means = {number: metrics.mean_agreement(table) for number, table in tables.items()}
    number = max(means, key=lambda n: means[n])
    table = tables[number]
    of_number = [fit for fit in fits if fit.model.n_clusters == number]
    chosen = of_number[int(np.argmax(table.sum(axis=1)))]
    scores = {} if images.labels is None else _scores(images.labels, chosen.model.labels_)
    several = {n: round(value, 3) for n, value in means.items()} if len(table) > 1 else {}
    return Report(chosen.model.labels_, number, several, scores, {}, chosen.model), chosen, table


def _scores(labels: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """Agreement with labels, in percent."""
    return {name: round(value, 3) for name, value in metrics.in_percent(labels, clusters).items()}


def _baseline(config: Config, images: Images, report: Report) -> dict[str, float]:
    if images.labels is None or config.method == "pixels":
        return {}
    print("k-means on the pixels, for comparison")
    pixels = PixelClustering(
        report.num_clusters, image_size=config.image_size or 28, random_state=config.seed, verbose=True
    )
    return _scores(images.labels, pixels.fit_predict(images.pixels))


def _write(config: Config, images: Images, report: Report, fit: Fit, table: np.ndarray, began: float) -> None:
    """The table, the model and the report; the map last, for it takes longest and is needed least."""
    print("writing the report")
    codes = np.load(fit.codes)
    distances = fit.model.distances_of(codes)
    write_clusters(config.workdir / "clusters.csv", images.names, fit.model.labels_, distances)
    fit.model.save(config.workdir / "model")
    about = page.About(
        name=readable(config.images.resolve().name),
        method=config.method,
        seeds=range(config.seed, config.seed + config.seeds),
        seconds=time.perf_counter() - began,
    )
    html = page.render(about, images, report, distances=distances, between_seeds=table)
    _write_text(config.workdir / "report.html", html)
    _write_text(config.workdir / "report.html", page.with_map(html, codes, report.labels))


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _print(config: Config, report: Report) -> None:
    if len(report.agreement) > 1:
        rows = [[str(number), f"{value:.1f}"] for number, value in report.agreement.items()]
        print("\n" + format_table(["clusters", "agreement between seeds (ARI, %)"], rows))
        print(f"taken: {report.num_clusters} clusters, on which the seeds agree best")
    elif report.agreement:
        print(f"agreement between seeds (ARI): {next(iter(report.agreement.values())):.1f} %")
    filled = len(np.unique(report.labels))
    if filled < report.num_clusters:
        print(f"warning: of {report.num_clusters} clusters only {filled} have images")
    for name, value in report.scores.items():
        beside = f" (k-means on pixels: {report.baseline[name]:.2f} %)" if report.baseline else ""
        print(f"{name.replace('_', ' ')}: {value:.2f} %{beside}")
    print(f"report: {config.workdir / 'report.html'}")
