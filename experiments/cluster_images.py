"""Clusters your own images: one command, one report.

    python -m experiments.cluster_images --images FOLDER --num-clusters 10
    python -m experiments.cluster_images --images FILE.npz --num-clusters 5 8 10 12 --method acol
    python -m experiments.cluster_images --predict runs/cluster_images/model.pkl --images NEW

Reads a folder of PNG, JPEG or WebP images of any sizes (or the arrays `images` and perhaps `labels` of an
.npz file), learns from them without labels, and writes `report.html` (one file that opens anywhere),
`clusters.csv` and the model. Several networks are learned from different seeds: how well they agree tells
whether a clustering is stable, and which number of clusters is, without any label. Stable need not be
right: README.md has an example. An image belongs to the nearest centre, but with `--method nmce` where its
network says: a margin may then be negative. Names of sub-folders serve as labels for the report alone.
Nothing in the folder is changed; files that cannot be read are listed and left out.
"""

import csv
import dataclasses
import itertools
import os
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from experiments import data, html_report
from experiments.common import evaluation
from experiments.common.options import ConfigError, check_options, command_line
from experiments.common.runs import Outcome, Workdir, identity, make_workdir, peak_gib, record
from experiments.common.tables import format_table
from experiments.data import atomic_path
from sul_jax import __version__, metrics
from sul_jax.estimators import (
    ACOLClustering,
    DeepClustering,
    EnergyClustering,
    NMCEClustering,
    PixelClustering,
    fit_together,
)

EXPERIMENT = "cluster_images"
ESTIMATORS: dict[str, Any] = {
    "energy": EnergyClustering,
    "acol": ACOLClustering,
    "nmce": NMCEClustering,
    "deepcluster": DeepClustering,
    "pixels": PixelClustering,
}
_WRITTEN = ("results.json", "model.pkl", "report.html", "clusters.csv")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Config:
    """Options of the command."""

    images: Path
    """Folder of images (sub-folders are their classes), or a .npz file with `images` and perhaps `labels`."""
    num_clusters: tuple[int, ...] = ()
    """Clusters; of several numbers the one on which the seeds agree best is taken, which is the most stable,
    not always that of the kinds of images. By default the number of classes, where there are labels."""
    method: Literal["energy", "acol", "nmce", "deepcluster", "pixels"] = "energy"
    """How to learn; pixels is plain k-means."""
    image_size: int | None = None
    """Side of the square to which images are resized (the shorter side, then the middle); by default what the
    method's network is made for: 28, for acol 16, for deepcluster 32."""
    predict: Path | None = None
    """A model.pkl of an earlier run: assign the images to its clusters, learn nothing. A model file can run
    code when it is read: take none from strangers."""
    seeds: int = 3
    """Networks learned from different seeds."""
    seed: int = 0
    """The first of them."""
    seeds_together: int | None = None
    """Networks that learn at once, by vmap; by default four on an accelerator and one on a CPU, where one
    keeps all cores busy."""
    workdir: Path = Path("runs/cluster_images")
    """Where everything is written; an earlier run there is set aside, not lost."""
    resume: bool = False
    """Go on with an interrupted run: what was learned is read, not learned again."""
    record: bool = False
    """Append the results to experiments/results/cluster_images.json, with the folder's name but not where it
    is."""


class Images(NamedTuple):
    """The images of a user.

    Attributes:
      pixels: uint8 or floating `[num_images, height, width, channels]`, 1 or 3 channels.
      names: of each.
      labels: `[num_images]`, or None.
      classes: names of the labels.
      skipped: files that could not be read, each with the reason.
      files: where each is; empty for arrays.
    """

    pixels: np.ndarray
    names: list[str]
    labels: np.ndarray | None
    classes: list[str]
    skipped: list[tuple[str, str]]
    files: list[Path]


class Report(NamedTuple):
    """What a run found.

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

    Raises:
      ValueError: images or options that cannot be used.
    """
    check_options(config, at_least={"image_size": 4, "seeds": 1, "seed": 0, "seeds_together": 1})
    for number in config.num_clusters:
        if number < 2:
            raise ConfigError(f"num_clusters={number} is not accepted: it must be at least 2")
    if config.workdir.resolve() == config.images.resolve():
        raise ConfigError(f"workdir={str(config.workdir)!r} is the folder of images; give another")
    if config.predict is not None:
        return _predict(config, config.predict)
    began = time.perf_counter()
    size = _estimator(config, 2, 0).image_size
    make_workdir(config.workdir)  # before anything takes time
    if not (config.workdir / "config.json").exists():
        for name in _WRITTEN:
            if (config.workdir / name).exists():
                raise ConfigError(f"workdir={str(config.workdir)!r} holds a {name} of something else")
    images = read_images(config.images, size)
    config = dataclasses.replace(config, num_clusters=_numbers_of_clusters(config, images), image_size=size)
    files = (*_WRITTEN, "network-seed*.pkl", "network-seed*.npy", "network-seed*.learned")
    about, own = identity(images.pixels), ("seeds_together",)
    with Workdir(EXPERIMENT, config, data=about, files=files, may_differ=own) as workdir:
        _say_what_was_read(images)
        fits = _learn(config, images, workdir.seeds)
        report, fit, table = _judge(images, fits)
        if images.labels is not None and config.method != "pixels":
            print("k-means on the pixels, for comparison")
            pixels = PixelClustering(report.num_clusters, image_size=size, random_state=config.seed)
            pixels.verbose = True
            report = report._replace(baseline=_scores(images.labels, pixels.fit_predict(images.pixels)))
        print("writing the report")
        codes = np.load(fit.codes)
        found = fit.model.distances_of(codes)
        _write_clusters(config.workdir / "clusters.csv", images.names, fit.model.labels_, found)
        _write_model(config, images, fit.model)
        html = html_report.render(
            images,
            config,
            report,
            codes=codes,
            distances=found,
            between_seeds=table,
            seconds=time.perf_counter() - began,
        )
        with atomic_path(config.workdir / "report.html") as temporary:
            temporary.write_text(html, encoding="utf-8")
        numbers = {"num_clusters": report.num_clusters, "agreement": report.agreement}
        baseline = {f"pixels_{name}": value for name, value in report.baseline.items()}
        workdir.results.append(numbers | report.scores | baseline)
    if config.record:
        values = report.scores | baseline | {"seeds": config.seeds, "peak_gib": round(peak_gib(), 3)}
        if report.agreement:
            values["agreement"] = report.agreement[report.num_clusters]
        one = dataclasses.replace(config, images=Path(config.images.resolve().name))
        dataset = data.Dataset(
            one.images.name, images.pixels, images.labels, images.pixels, images.labels,
            f"{len(images.files)} files" if images.files else "arrays",
        )  # fmt: skip
        number = len(images.pixels)
        outcome = Outcome(values, dataset, number, number, time.perf_counter() - began)
        record(EXPERIMENT, one, config.seed, outcome)
    _print(config, report)
    return report


class _Fit(NamedTuple):
    """One seed's network with one number of clusters."""

    seed: int
    model: Any
    codes: Path  # of the images' codes


def read_images(path: Path, size: int) -> Images:
    """A folder's images, or an `.npz` file's.

    Args:
      path: the folder, searched with all its sub-folders, or the file.
      size: side to which a folder's images are resized.

    Raises:
      ValueError: nothing that can be read.
    """
    if path.suffix.lower() == ".npz":
        dataset = data.load(str(path))
        labels = dataset.train_labels
        classes = [] if labels is None else [str(c) for c in np.unique(labels)]
        if labels is not None:
            labels = np.unique(labels, return_inverse=True)[1]
        if dataset.train_images.shape[-1] not in (1, 3):
            raise ConfigError(
                f"images in {str(path)!r} have {dataset.train_images.shape[-1]} channels; 1 or 3 are accepted"
            )
        names = [str(index) for index in range(len(dataset.train_images))]
        return Images(dataset.train_images, names, labels, classes, [], [])
    if not path.is_dir():
        raise ConfigError(f"images={str(path)!r} is neither a folder nor an .npz file")
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES and not _hidden(p, path))
    if not files:
        raise ConfigError(f"images={str(path)!r} holds no {', '.join(_SUFFIXES)} files")
    pixels = np.empty((len(files), size, size, 3), np.uint8)
    read: list[Path] = []
    skipped: list[tuple[str, str]] = []
    for file in tqdm(files, desc="reading", unit="image"):
        try:
            pixels[len(read)] = _decoded(file, size)
            read.append(file)
        except Exception as error:  # Pillow's decoders raise many types for what is corrupt
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            skipped.append((_name(file, path), reason[:200]))
    if not read:
        raise ConfigError(f"none of the {len(files)} files in {str(path)!r} can be read: {skipped[0][1]}")
    pixels = pixels[: len(read)]
    if np.array_equal(pixels[..., 0], pixels[..., 1]) and np.array_equal(pixels[..., 0], pixels[..., 2]):
        pixels = pixels[..., :1].copy()
    names = [_name(file, path) for file in read]
    tops = [file.relative_to(path).parts[0] if file.parent != path else None for file in read]
    classes = sorted({top for top in tops if top is not None})
    labels = None
    if None not in tops and len(classes) > 1:
        number = {name: index for index, name in enumerate(classes)}
        labels = np.array([number[top] for top in tops if top is not None])
        classes = [data.readable(name) for name in classes]
    return Images(pixels, names, labels, classes if labels is not None else [], skipped, read)


def _hidden(file: Path, folder: Path) -> bool:
    return any(data.hidden(part) for part in file.relative_to(folder).parts) or os.path.isdir(file)


def _name(file: Path, folder: Path) -> str:
    return data.readable(str(file.relative_to(folder)))


def _decoded(file: Path, size: int) -> np.ndarray:
    from PIL import Image, ImageOps

    return np.asarray(ImageOps.fit(data.picture(file), (size, size), Image.Resampling.BICUBIC))


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


def _say_what_was_read(images: Images) -> None:
    shape = "×".join(map(str, images.pixels.shape[1:]))
    classes = f", {len(images.classes)} classes" if images.labels is not None else ", no labels"
    print(f"{len(images.pixels)} images of {shape}{classes}")
    for name, reason in images.skipped[:5]:
        print(f"  left out: {name} ({reason})")
    if len(images.skipped) > 5:
        print(f"  … and {len(images.skipped) - 5} more, listed in the report")


def _learn(config: Config, images: Images, seeds: Sequence[int]) -> list[_Fit]:
    """Every seed with every number of clusters."""
    fits: list[_Fit] = []
    together = config.seeds_together or (1 if jax.default_backend() == "cpu" else 4)
    for first in range(0, len(seeds), together):
        group = seeds[first : first + together]
        learned = _fits(config, images, group, config.num_clusters[0])
        fits += learned
        for number in config.num_clusters[1:]:
            if learned[0].model.learns_clusters:
                fits += _fits(config, images, group, number)
            else:
                for seed, model, codes in learned:
                    fits.append(_Fit(seed, model.with_clusters(np.load(codes), number), codes))
    return fits


def _fits(config: Config, images: Images, seeds: Sequence[int], number: int) -> list[_Fit]:
    """Networks of some seeds, read where they are stored, else learned together."""
    stored = [config.workdir / f"network-seed{seed}-{number}.pkl" for seed in seeds]
    codes = [path.with_suffix(".npy") for path in stored]
    missing = [index for index, path in enumerate(stored) if not path.exists()]
    models = {index: _estimator(config, number, seeds[index]) for index in missing}
    for index, model in models.items():
        model.kept = stored[index].with_suffix(".learned")
    if models:
        names = ", ".join(str(seeds[index]) for index in missing)
        print(f"{'seed' if len(missing) == 1 else 'seeds'} {names}: {number} clusters")
        fitted = fit_together(list(models.values()), images.pixels)
        for index, model in models.items():
            with atomic_path(codes[index]) as temporary, open(temporary, "wb") as file:
                np.save(file, next(fitted))
            learned = model.kept
            del model.kept
            with atomic_path(stored[index]) as temporary, open(temporary, "wb") as file:
                pickle.dump(model, file)
            learned.unlink()
    found = [models[i] if i in models else pickle.loads(path.read_bytes()) for i, path in enumerate(stored)]
    return [_Fit(*one) for one in zip(seeds, found, codes, strict=True)]


def _estimator(config: Config, number: int, seed: int) -> Any:
    model = ESTIMATORS[config.method](number, random_state=seed, verbose=True)
    if config.image_size in (None, model.image_size):
        return model
    if "image_size" not in model.get_params():
        raise ConfigError(
            f"image_size={config.image_size} is not accepted: the network of {config.method} is made for "
            f"{model.image_size}"
        )
    return model.set_params(image_size=config.image_size)


def _judge(images: Images, fits: Sequence[_Fit]) -> tuple[Report, _Fit, np.ndarray]:
    """The number of clusters and the seed that agree best with the others, and the seeds' agreement."""
    tables = {}
    for number in dict.fromkeys(fit.model.n_clusters for fit in fits):
        labels = [fit.model.labels_ for fit in fits if fit.model.n_clusters == number]
        tables[number] = agreement(labels)
    means = {number: mean_agreement(table) for number, table in tables.items()}
    number = max(means, key=lambda n: means[n])
    table = tables[number]
    of_number = [fit for fit in fits if fit.model.n_clusters == number]
    chosen = of_number[int(np.argmax(table.sum(axis=1)))]
    scores = {} if images.labels is None else _scores(images.labels, chosen.model.labels_)
    several = {n: round(value, 3) for n, value in means.items()} if len(table) > 1 else {}
    return Report(chosen.model.labels_, number, several, scores, {}, chosen.model), chosen, table


def _scores(labels: np.ndarray, found: np.ndarray) -> dict[str, float]:
    return {name: round(value, 3) for name, value in evaluation.scores(labels, found).items()}


def agreement(labels: Sequence[np.ndarray]) -> np.ndarray:
    """Adjusted Rand index in percent between every two clusterings of the same images.

    Example:
      >>> import numpy as np
      >>> from experiments import cluster_images
      >>> one = np.array([0, 0, 1, 1])
      >>> cluster_images.agreement([one, 1 - one]).tolist()
      [[100.0, 100.0], [100.0, 100.0]]
    """
    table = np.full((len(labels), len(labels)), 100.0)
    for (i, one), (j, other) in itertools.combinations(enumerate(labels), 2):
        table[i, j] = table[j, i] = 100 * metrics.adjusted_rand_index(one, other)
    return table


def mean_agreement(table: np.ndarray) -> float:
    """Of all pairs in a table of `agreement`; 0 where there is a single clustering."""
    between = table[~np.eye(len(table), dtype=bool)]
    return float(between.mean()) if between.size else 0.0


def _write_clusters(path: Path, names: Sequence[str], labels: np.ndarray, distances: np.ndarray) -> None:
    """`clusters.csv`: file, cluster, distance to its centre, margin to the next centre."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "cluster", "distance", "margin"])
        for name, label, row in zip(names, labels, distances, strict=True):
            others = np.delete(row, label)
            margin = others.min() - row[label] if others.size else np.inf
            writer.writerow([name, int(label), f"{row[label]:.6g}", f"{margin:.6g}"])


def _write_model(config: Config, images: Images, model: Any) -> None:
    stored = {
        "sul_jax": __version__,
        "image_size": config.image_size,
        "shape": images.pixels.shape[1:],
        "model": model,
    }
    with atomic_path(config.workdir / "model.pkl") as temporary:
        temporary.write_bytes(pickle.dumps(stored))


def _predict(config: Config, path: Path) -> Report:
    """Assigns images to the clusters of a stored model."""
    try:
        stored = pickle.loads(path.read_bytes())
        model, size, shape = stored["model"], stored["image_size"], tuple(stored["shape"])
    except Exception as error:  # whatever else is in the file
        raise ConfigError(
            f"predict={str(path)!r} is not a model that cluster_images wrote ({error})"
        ) from None
    make_workdir(config.workdir)
    if shape[0] == shape[1]:
        size = shape[0]
    if config.image_size not in (None, size):
        raise ConfigError(f"image_size={config.image_size} is not accepted: the model was made for {size}")
    images = read_images(config.images, size)
    pixels = images.pixels
    if pixels.shape[-1] < shape[-1]:
        pixels = np.repeat(pixels, 3, axis=-1)
    elif pixels.shape[-1] > shape[-1]:
        gray = np.empty((*pixels.shape[:3], 1), pixels.dtype)
        for index, image in enumerate(pixels):
            values = image @ np.array([0.299, 0.587, 0.114])
            gray[index, ..., 0] = np.round(values) if pixels.dtype == np.uint8 else values
        pixels = gray
    if pixels.shape[1:] != shape:
        given, wanted = ("×".join(map(str, s)) for s in (pixels.shape[1:], shape))
        raise ConfigError(f"images of {given} do not fit the model, which learned from images of {wanted}")
    _say_what_was_read(images)
    model.verbose = True
    labels, distances = model.assign(pixels)
    _write_clusters(config.workdir / "predicted.csv", images.names, labels, distances)
    print(f"clusters: {config.workdir / 'predicted.csv'}")
    return Report(labels, model.n_clusters, {}, {}, {}, model)


def _print(config: Config, report: Report) -> None:
    if len(report.agreement) > 1:
        rows = [[str(number), f"{value:.1f}"] for number, value in report.agreement.items()]
        print("\n" + format_table(["clusters", "agreement between seeds (ARI, %)"], rows))
        print(f"taken: {report.num_clusters} clusters, on which the seeds agree best")
    elif report.agreement:
        print(f"agreement between seeds (ARI): {next(iter(report.agreement.values())):.1f} %")
    for name, value in report.scores.items():
        beside = f" (k-means on pixels: {report.baseline[name]:.2f} %)" if report.baseline else ""
        print(f"{name.replace('_', ' ')}: {value:.2f} %{beside}")
    print(f"report: {config.workdir / 'report.html'}")


def main() -> None:
    """The command line."""
    command_line(run, Config, description=__doc__)


if __name__ == "__main__":
    main()
