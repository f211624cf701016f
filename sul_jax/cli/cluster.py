"""Clusters your own images, or embeddings of them: one command, one report.

    sul-jax cluster FOLDER --num-clusters 10
    sul-jax cluster FILE.npz --num-clusters 5 8 10 12 --method acol
    sul-jax cluster --embeddings FILE.npy --num-clusters 10
    sul-jax cluster FOLDER --embeddings SHARDS --num-clusters 10 --copy-to sorted

Reads the pictures in a folder, of any sizes and kinds, or the array `images`, and `labels` if there are any,
of an .npz file. Learns from them without labels, and writes `report.html` (one file that opens anywhere),
`clusters.csv` and the model. Several networks are learned from different seeds. How well they agree shows,
without any label, whether a clustering is stable, and which number of clusters is the most stable. A stable
clustering is not always right. An image belongs to the nearest centre; with `--method nmce` its network
decides, and a margin may be negative. Names of sub-folders are labels, used only in the report. Nothing in
the folder is changed; files that cannot be read are counted and left out.

Embeddings are vectors that your own network made, in a .npy, .npz or .parquet file, or in a folder of such
files. Their number has no limit: they are read in chunks. Pictures are then only shown. Besides its
`embeddings`, an .npz or .parquet file may hold `names`, the files of the pictures, and `labels`.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro

from sul_jax import __version__, metrics
from sul_jax._files import atomic_path, write_json
from sul_jax.cli import embeddings, measures, processes
from sul_jax.cli import report as page
from sul_jax.cli.duplicates import MOST, near_duplicates, write_pairs
from sul_jax.cli.images import Images, read, readable, summary
from sul_jax.cli.listing import Places, places, write_clusters
from sul_jax.cli.networks import Fit, Networks, codes_of, estimator
from sul_jax.cli.options import ConfigError, as_path, check_at_most, check_options
from sul_jax.cli.ranges import NonNegativeInt, PositiveInt, Range
from sul_jax.cli.sorting import SORTED, check_new, check_place, is_sorted, sort_into
from sul_jax.cli.tables import format_table
from sul_jax.cli.workdir import Workdir, identity, make_workdir
from sul_jax.estimators import PixelClustering

_WRITTEN = ("results.json", "model", "reading.json", "report.html", "clusters.csv", "duplicates.csv", SORTED)
_STATE = ("network-seed*",)


@dataclass(frozen=True)
class Config:
    """Options of the command."""

    images: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")]] = None
    """Folder of pictures (sub-folders are their classes), or an .npz file with `images` and perhaps
    `labels`."""
    num_clusters: tuple[Annotated[int, Range(2)], ...] = ()
    """Number of clusters. Of several, the one on which the seeds agree best is taken: the most stable number,
    which is not always the number of kinds of images. By default the number of classes, if there are
    labels."""
    embeddings: Path | None = None
    """File or folder of vectors to cluster instead of pictures."""
    method: (
        Literal["energy", "acol", "nmce", "deepcluster", "pixels", "k_means", "k_subspaces", "rate_reduction"]
        | None
    ) = None
    """How to learn. From pictures: energy (the default), acol, nmce, deepcluster, or pixels (plain k-means).
    From embeddings: k_means (the default), k_subspaces or rate_reduction."""
    metric: Literal["cosine", "euclidean"] = "cosine"
    """Metric of k-means on embeddings."""
    rank: PositiveInt = 4
    """Rank of the subspaces of k_subspaces."""
    image_size: Annotated[int, Range(4, 4096)] | None = None
    """Side of the square to which pictures are resized (the shorter side is resized, then the middle is cut
    out); by default the size for which the method's network is made: 28, for acol 16, for deepcluster 32."""
    seeds: PositiveInt = 3
    """Number of networks, each learned from its own seed."""
    seed: NonNegativeInt = 0
    """The first seed."""
    seeds_together: PositiveInt | None = None
    """Networks that learn at once, by vmap; by default four on an accelerator and one on a CPU, where one
    network keeps all cores busy."""
    workdir: Path = Path("runs/cluster")
    """Where everything is written; a folder previous-… in it keeps an earlier run."""
    words: Path | None = None
    """An .npz or .parquet file with the `embeddings` of words, and the words as `names`, by the same network:
    each cluster is called by its nearest word."""
    copy_to: Path | None = None
    """A new folder with one sub-folder for each cluster, of links to the pictures (copies if links are not
    possible)."""
    distributed: bool = False
    """Share the work with other processes, which srun, mpirun or a similar launcher starts. Give all of them
    the same files and the same workdir; each reads its part of the vectors, and the first one writes."""
    resume: bool = False
    """Continue an interrupted run: what it has learned is read, not learned again."""


class Report(NamedTuple):
    """What a run gave.

    Attributes:
      labels: `[num_images]`, clusters.
      num_clusters: the number taken.
      agreement: for each number of clusters, the mean ARI between seeds in percent; empty with one seed.
      measures: for each of several numbers, `agreement` and `cli.measures.label_free` of the seed that agrees
        best with the others.
      scores: accuracy, NMI and ARI against labels in percent, where there are any.
      baseline: the same of k-means on the pixels.
      model: the estimator.
    """

    labels: np.ndarray
    num_clusters: int
    agreement: dict[int, float]
    measures: dict[int, dict[str, float]]
    scores: dict[str, float]
    baseline: dict[str, float]
    model: Any


class _Subject(NamedTuple):
    """What is clustered, pictures or embeddings, and how."""

    path: Path
    images: Images
    method: str
    what: str
    summary: list[str]
    about: dict[str, Any]  # what makes a run with them this run
    reading: dict[str, Any]  # what assigning others needs to know
    learn: Callable[[Config], list[Fit]]
    baseline: Callable[[Config, Report], dict[str, float]]
    places: Callable[[Fit], Places]
    codes: Callable[[Fit], tuple[np.ndarray, np.ndarray]]  # of all or of some, with their clusters
    directions: bool  # whether codes are clustered by their directions alone
    names_of_clusters: Callable[[Fit], list[str] | None]


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
    config = _checked(config)
    with processes.together() if config.distributed else contextlib.nullcontext():
        return _run(config) if processes.is_first() else _help(config)


def _run(config: Config) -> Report:
    began = time.perf_counter()
    make_workdir(config.workdir)  # before anything takes time
    _refuse_what_is_not_ours(config.workdir)
    subject = _of_pictures(config) if config.embeddings is None else _of_embeddings(config)
    config = dataclasses.replace(config, num_clusters=_numbers_of_clusters(config, subject))
    with _opened(config, subject) as workdir:
        print("\n".join(subject.summary))
        write_json(config.workdir / "reading.json", {"sul_jax": __version__, **subject.reading})
        report, fits, table = _judge(subject.images, subject.learn(config))
        fit = fits[report.num_clusters]
        measured = _measured(subject, report, fits) if len(fits) > 1 else {}
        report = report._replace(baseline=subject.baseline(config, report), measures=measured)
        _write(config, subject, report, fit, table, began)
        numbers = {"num_clusters": report.num_clusters, "agreement": report.agreement}
        numbers |= {"measures": measured} if measured else {}
        baseline = {f"pixels_{name}": value for name, value in report.baseline.items()}
        left_out = {"num_images": len(subject.images.names), "left_out": len(subject.images.left_out)}
        workdir.results.append(numbers | left_out | report.scores | baseline)
    _print(config, report)
    return report


def _help(config: Config) -> Report:
    """What a process does that is not the first: all that takes all of them."""
    subject = _of_embeddings(config)
    config = dataclasses.replace(config, num_clusters=_numbers_of_clusters(config, subject))
    report, fits, _ = _judge(subject.images, subject.learn(config))
    fit = fits[report.num_clusters]
    subject.places(fit)
    fit.model.save(config.workdir / "model")
    return report


def _of_pictures(config: Config) -> _Subject:
    assert config.images is not None
    path, method = config.images, config.method or "energy"
    if method in embeddings.METHODS:
        raise ConfigError(f"method={method!r} clusters vectors: give --embeddings, or use --method pixels")
    size = estimator(method, 2, 0, config.image_size).image_size
    images = read(path, size, without=config.workdir)

    def learn(config: Config) -> list[Fit]:
        networks = Networks(config.workdir, method, size, images.pixels)
        seeds = range(config.seed, config.seed + config.seeds)
        return networks.learn(seeds, config.num_clusters, config.seeds_together)

    def baseline(config: Config, report: Report) -> dict[str, float]:
        if images.labels is None or method == "pixels":
            return {}
        print("k-means on the pixels, for comparison")
        pixels = PixelClustering(report.num_clusters, image_size=size, random_state=config.seed, verbose=True)
        return _scores(images.labels, pixels.fit_predict(images.pixels))

    return _Subject(
        path=path,
        images=images,
        method=method,
        what=f"images, seen as {'×'.join(map(str, images.pixels.shape[1:]))}",
        summary=summary(images),
        about={"image_size": size, "data": identity(images.pixels)},
        reading={"image_size": size, "scale": images.scale},
        learn=learn,
        baseline=baseline,
        places=lambda fit: places(fit.model.labels_, fit.model.distances_of(codes_of(fit))),
        codes=lambda fit: (codes_of(fit), fit.model.labels_),
        directions=False,
        names_of_clusters=lambda fit: None,
    )


def _of_embeddings(config: Config) -> _Subject:
    assert config.embeddings is not None
    method = config.method or embeddings.METHODS[0]
    if method not in embeddings.METHODS:
        accepted = f"one of {', '.join(embeddings.METHODS)}"
        raise ConfigError(f"method={method!r} learns from pictures; with --embeddings it must be {accepted}")
    given = embeddings.read(config.embeddings, config.images, without=config.workdir)
    words = None if config.words is None else embeddings.read_words(config.words, given)
    images, source = given.examples, given.source
    labels = f", {len(images.classes)} classes" if images.labels is not None else ", no labels"
    drawn = functools.cache(lambda: embeddings.some(given))  # once, for all numbers of clusters

    def learn(config: Config) -> list[Fit]:
        models = [
            (seed, embeddings.estimator(method, number, seed, config.metric, config.rank))
            for seed in range(config.seed, config.seed + config.seeds)
            for number in config.num_clusters
        ]
        return embeddings.learn(config.workdir, models, given)

    return _Subject(
        path=config.embeddings,
        images=images,
        method=method,
        what=f"vectors of {source.num_features} features",
        summary=[f"{len(source)} vectors of {source.num_features} features{labels}"],
        about={"metric": config.metric, "rank": config.rank, "data": embeddings.identity(given)},
        reading={"scale": None},
        learn=learn,
        baseline=lambda config, report: {},
        places=lambda fit: embeddings.places(fit.model, given),
        codes=lambda fit: (drawn().vectors, fit.model.labels_[drawn().rows]),
        directions=method != "k_means" or config.metric == "cosine",
        names_of_clusters=lambda fit: None if words is None else embeddings.named(given, fit.model, words),
    )


def _checked(config: Config) -> Config:
    """The options with their types, as a caller in Python may not have given them."""
    numbers = config.num_clusters
    given = {name: getattr(config, name) for name in ("images", "embeddings", "words", "copy_to")}
    paths: dict[str, Any] = {n: None if value is None else as_path(n, value) for n, value in given.items()}
    config = dataclasses.replace(
        config,
        workdir=as_path("workdir", config.workdir),
        num_clusters=tuple(numbers) if isinstance(numbers, Iterable) else (numbers,),
        **paths,
    )
    check_options(config)
    for name in ("images", "embeddings"):
        if paths[name] is not None and config.workdir.resolve() == paths[name].resolve():
            raise ConfigError(f"workdir={str(config.workdir)!r} is the folder of {name}; give another folder")
    if config.images is None and config.embeddings is None:
        raise ConfigError("images is needed: a folder of pictures, or --embeddings")
    if config.distributed and config.embeddings is None:
        raise ConfigError("distributed shares vectors among processes: give --embeddings")
    if config.words is not None and config.embeddings is None:
        raise ConfigError("words need embeddings to compare with: give --embeddings too")
    if config.copy_to is not None:
        if config.images is None or not config.images.is_dir():
            raise ConfigError("copy_to needs pictures: images must be their folder")
        check_place(config.copy_to, config.images, config.workdir)
        if not (config.resume and is_sorted(config.copy_to, config.workdir)):
            check_new(config.copy_to)
    return config


def _refuse_what_is_not_ours(workdir: Path) -> None:
    if not (workdir / "config.json").exists():
        for name in _WRITTEN:
            if (workdir / name).exists():
                raise ConfigError(f"workdir={str(workdir)!r} holds a {name} that this command did not write")


def _opened(config: Config, subject: _Subject) -> Workdir:
    """The run's folder; where the images are does not matter, what they are does."""
    about = {name: getattr(config, name) for name in ("num_clusters", "seeds", "seed", "seeds_together")}
    return Workdir(
        config.workdir,
        "sul-jax cluster",
        {"images": readable(subject.path.resolve().name), "method": subject.method, **subject.about, **about},
        files=(*_WRITTEN, *_STATE),
        state=_STATE,
        resume=config.resume,
        may_differ=("images", "seeds_together"),
    )


def _numbers_of_clusters(config: Config, subject: _Subject) -> tuple[int, ...]:
    images = subject.images
    numbers = config.num_clusters or ((len(images.classes),) if images.labels is not None else ())
    if not numbers:
        raise ConfigError("num_clusters is needed: there are no labels (sub-folders) to count")
    if len(numbers) > 1 and config.seeds == 1:
        raise ConfigError(
            "several num_clusters are compared by how well the seeds agree: seeds must be at least 2"
        )
    number, what = _different(images, max(numbers))
    check_at_most("num_clusters", max(numbers), number, what)
    return tuple(dict.fromkeys(numbers))


def _different(images: Images, enough: int) -> tuple[int, str]:
    """How many images differ from each other, counted up to what is enough; of vectors how many there are."""
    if images.pixels is None:
        return len(images.names), "vectors"
    different: set[bytes] = set()
    for image in images.pixels:
        different.add(image.tobytes())
        if len(different) >= enough:
            break
    return len(different), "images that differ from each other"


def _judge(images: Images, fits: Sequence[Fit]) -> tuple[Report, dict[int, Fit], np.ndarray]:
    """The number of clusters on which seeds agree best, of each number the seed that agrees best with the
    others, and the seeds' agreement on the one taken."""
    tables, best = {}, {}
    for number in dict.fromkeys(fit.model.n_clusters for fit in fits):
        own = [fit for fit in fits if fit.model.n_clusters == number]
        tables[number] = 100 * metrics.agreement([fit.model.labels_ for fit in own])
        best[number] = own[int(np.argmax(tables[number].sum(axis=1)))]
    means = {number: metrics.mean_agreement(table) for number, table in tables.items()}
    number = max(means, key=lambda n: means[n])
    model = best[number].model
    scores = {} if images.labels is None else _scores(images.labels, model.labels_)
    several = {n: round(value, 3) for n, value in means.items()} if len(tables[number]) > 1 else {}
    return Report(model.labels_, number, several, {}, scores, {}, model), best, tables[number]


def _measured(subject: _Subject, report: Report, fits: Mapping[int, Fit]) -> dict[int, dict[str, float]]:
    """What can be said of each number of clusters without labels."""
    found = {}
    for number, fit in fits.items():
        codes, labels = subject.codes(fit)
        own = measures.label_free(codes, {number: labels}, directions=subject.directions)[number]
        own = {name: round(value, 4) for name, value in own.items()}
        found[number] = {"agreement": report.agreement[number]} | own
    return found


def _scores(labels: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """Agreement with labels, in percent."""
    return {name: round(value, 3) for name, value in metrics.in_percent(labels, clusters).items()}


def _write(
    config: Config, subject: _Subject, report: Report, fit: Fit, table: np.ndarray, began: float
) -> None:
    """The table, the model and the report; the map last, for it takes longest and is needed least."""
    print("writing the report")
    images, where = subject.images, subject.places(fit)
    write_clusters(config.workdir / "clusters.csv", images.names, fit.model.labels_, where)
    fit.model.save(config.workdir / "model")
    if config.copy_to is not None and not is_sorted(config.copy_to, config.workdir):
        sort_into(config.copy_to, images, report.labels, config.workdir)
    about = page.About(
        name=readable(subject.path.resolve().name),
        what=subject.what,
        method=subject.method,
        seeds=range(config.seed, config.seed + config.seeds),
        seconds=time.perf_counter() - began,
    )
    names = subject.names_of_clusters(fit)
    html = page.render(about, images, report, places=where, between_seeds=table, named=names)
    _write_text(config.workdir / "report.html", html)
    codes, labels = subject.codes(fit)
    if len(codes) == len(images.names) <= MOST:
        pairs = near_duplicates(codes, labels)
        write_pairs(config.workdir / "duplicates.csv", images.names, pairs)
        html = page.with_duplicates(html, images, pairs)
        _write_text(config.workdir / "report.html", html)
    _write_text(config.workdir / "report.html", page.with_map(html, codes, labels))


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _print(config: Config, report: Report) -> None:
    if report.measures:
        print("\n" + format_table(*measures.table(report.measures)))
        print(f"chosen: {report.num_clusters} clusters, on which the seeds agree best")
    elif report.agreement:
        print(f"agreement between seeds (ARI): {next(iter(report.agreement.values())):.1f} %")
    filled = len(np.unique(report.labels))
    if filled < report.num_clusters:
        print(f"warning: only {filled} of the {report.num_clusters} clusters have images")
    for name, value in report.scores.items():
        beside = f" (k-means on pixels: {report.baseline[name]:.2f} %)" if report.baseline else ""
        print(f"{name.replace('_', ' ')}: {value:.2f} %{beside}")
    print(f"report: {config.workdir / 'report.html'}")
