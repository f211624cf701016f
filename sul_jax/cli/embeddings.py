"""Embeddings of a user: vectors in files, perhaps with the pictures that they are of."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.preprocessing import normalize

from sul_jax import estimators, vectors
from sul_jax.cli import processes
from sul_jax.cli.duplicates import MOST
from sul_jax.cli.images import Images, find, of_folders, of_values, readable
from sul_jax.cli.listing import Places
from sul_jax.cli.networks import Fit
from sul_jax.cli.options import ConfigError
from sul_jax.estimators import KMeans, KSubspaces, RateReductionClustering

METHODS = ("k_means", "k_subspaces", "rate_reduction")
# What files may call the names and the labels of their vectors.
_WORDS = {"names": ("names", "name", "files", "file", "paths", "path"), "labels": ("labels", "label")}
# Vectors read at a time.
_CHUNK = 2**14
# Vectors up to which a report is made of all of them, and bytes of them; of more it is made of some.
_LOOKED_AT, _LOOKED_AT_BYTES = MOST, 2**30


class Embeddings(NamedTuple):
    """Vectors, and what they are of.

    Attributes:
      paths: of the files.
      source: their vectors.
      examples: names, labels and, where they are given, the files of pictures.
      named: whether the files, or pictures, give the names.
    """

    paths: list[Path]
    source: vectors.Vectors
    examples: Images
    named: bool


def read(path: Path, pictures: Path | None = None, *, without: Path | None = None) -> Embeddings:
    """Opens vectors, of which only those of a chunk are in memory.

    Args:
      path: a file or a folder of files, see `vectors.read`. An `.npz` file may hold `names` and `labels`
        beside its `embeddings`, a `.parquet` file columns of those names.
      pictures: folder of what the vectors are of: the files named by `names`, or all of them in their order,
        but for the vectors' own.
      without: a folder in it that is not searched.

    Raises:
      ConfigError: files that cannot be read, or other pictures than vectors.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> import numpy as np
      >>> from sul_jax.cli import embeddings
      >>> file = Path(tempfile.mkdtemp()) / "mine.npz"
      >>> np.savez(file, embeddings=np.ones((3, 512)), names=["a.png", "b.png", "c.png"])
      >>> embeddings.read(file).examples.names
      ['a.png', 'b.png', 'c.png']
    """
    try:
        paths = vectors.files(path)
        source = vectors.read(paths)
        extras = [_beside(one) for one in paths]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"embeddings={str(path)!r}: {error}") from None
    names, values = (_of_all(path, kind, extras, source) for kind in ("names", "labels"))
    files: list[Path] = []
    labels, classes = of_values(None if values is None else np.asarray(values))
    if pictures is not None:
        pictures = pictures.resolve()
        files = _files(pictures, names, len(source), {one.resolve() for one in paths}, without)
        names = [readable(str(file.relative_to(pictures))) for file in files]
        if labels is None:
            labels, classes = of_folders([file.relative_to(pictures) for file in files])
    shown = names if names is not None else _numbered(source)
    examples = Images(None, shown, labels, classes, [], files, None, [])
    return Embeddings(paths, source, examples, names is not None)


def estimator(method: str, num_clusters: int, seed: int, metric: Any, rank: int) -> Any:
    """An estimator of vectors that is not fitted yet.

    Args:
      method: one of `METHODS`.
      num_clusters: clusters.
      seed: of the starts.
      metric: of k-means.
      rank: of the subspaces.
    """
    if method == "k_means":
        return KMeans(num_clusters, metric=metric, random_state=seed, verbose=True)
    if method == "rate_reduction":
        return RateReductionClustering(num_clusters, random_state=seed, verbose=True)
    return KSubspaces(num_clusters, rank=rank, random_state=seed, verbose=True)


def learn(folder: Path, models: Sequence[tuple[int, Any]], given: Embeddings) -> list[Fit]:
    """Fits of several seeds and numbers of clusters, each stored as soon as it is there, and then read.

    Args:
      folder: of the run.
      models: seeds and estimators.
      given: the vectors.

    Raises:
      ConfigError: vectors that cannot be read, or a stored model that is not of this run.
    """
    fits = []
    for seed, model in models:
        path = folder / f"network-seed{seed}-{model.n_clusters}"
        stored = _stored(path, model, given) if processes.of_first(path.exists()) else None
        if stored is None:
            print(f"seed {seed}: {model.n_clusters} clusters")
            try:
                model.set_params(verbose=processes.is_first()).fit(given.paths)
            except ValueError as error:
                raise ConfigError(str(error)) from None
            model.save(path)
        fits.append(Fit(seed, model if stored is None else stored, None))
    return fits


def _stored(path: Path, model: Any, given: Embeddings) -> Any:
    """The model of an earlier run, which must have been like this one."""
    stored = estimators.load(path)
    if repr(stored) != repr(model) or len(stored.labels_) != len(given.source):
        raise ConfigError(f"{str(path)!r} does not belong to this run; remove it, or give another --workdir")
    return stored


def identity(given: Embeddings) -> dict[str, Any]:
    """What tells vectors apart from others; reads some of them.

    Args:
      given: the vectors.

    Raises:
      ConfigError: vectors that are not finite.
    """
    try:
        return given.source.identity()
    except ValueError as error:
        raise ConfigError(str(error)) from None


def places(model: Any, given: Embeddings) -> Places:
    """Where the vectors lie in their clusters.

    Args:
      model: fitted.
      given: the vectors.
    """
    return Places(*model.places(given.paths))


class Drawn(NamedTuple):
    """Some vectors, and which of all they are."""

    vectors: np.ndarray
    rows: np.ndarray


def some(given: Embeddings) -> Drawn:
    """Vectors to look at, all where they are not too many.

    Args:
      given: the vectors.
    """
    few = min(_LOOKED_AT, _LOOKED_AT_BYTES // (4 * given.source.num_features))
    return Drawn(*given.source.sample(few))


class Words(NamedTuple):
    """Words to call clusters by.

    Attributes:
      names: the words.
      directions: their embeddings at unit norm, `[num_words, num_features]`.
    """

    names: list[str]
    directions: np.ndarray


def read_words(path: Path, given: Embeddings) -> Words:
    """Words and their embeddings.

    Args:
      path: a file or a folder of files that hold `names` beside their `embeddings`.
      given: vectors of the same network.

    Raises:
      ConfigError: a file that cannot be read, without names, or of another width.
    """
    words = read(path)
    if words.source.num_features != given.source.num_features:
        raise ConfigError(
            f"words={str(path)!r} holds embeddings of {words.source.num_features} features, but the "
            f"embeddings to cluster have {given.source.num_features}"
        )
    if not words.named:
        raise ConfigError(f"words={str(path)!r} has no 'names' beside its embeddings")
    try:
        every = np.concatenate([normalize(chunk) for chunk in words.source.chunks(_CHUNK)])
    except ValueError as error:
        raise ConfigError(f"words={str(path)!r}: {error}") from None
    return Words(words.examples.names, every)


def named(given: Embeddings, model: Any, words: Words) -> list[str]:
    """The word nearest to each cluster: of largest cosine with the mean of its vectors at unit norm; or "–".

    Args:
      given: the vectors.
      model: fitted to them.
      words: from `read_words`.
    """
    sums, start = np.zeros((model.n_clusters, given.source.num_features)), 0
    for chunk in given.source.chunks(_CHUNK):
        labels = model.labels_[start : start + len(chunk)]
        np.add.at(sums, labels, normalize(chunk))
        start += len(chunk)
    nearest = (normalize(sums) @ words.directions.T).argmax(axis=1)
    return [words.names[index] if sums[k].any() else "–" for k, index in enumerate(nearest)]


def _beside(path: Path) -> dict[str, list[str]]:
    """Names and labels that a file holds beside its vectors, as text."""
    found: dict[str, Any] = {}
    if path.suffix.lower() == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            for kind, words in _WORDS.items():
                for word in [word for word in words if word in arrays.files][:1]:
                    try:
                        found[kind] = np.ravel(arrays[word]).tolist()
                    except ValueError:
                        raise ValueError(f"{path.name}: {word!r} must be text or numbers") from None
    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        there = parquet.ParquetFile(path).schema_arrow.names
        for kind, words in _WORDS.items():
            for word in [word for word in words if word in there][:1]:
                found[kind] = parquet.read_table(path, columns=[word]).column(word).to_pylist()
    return {kind: [_text(value) for value in values] for kind, values in found.items()}


def _text(value: Any) -> str:
    return readable(value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value))


def _of_all(
    path: Path, kind: str, extras: Sequence[dict[str, list[str]]], source: vectors.Vectors
) -> list[str] | None:
    """Names or labels of all files one after the other; None where there are none."""
    if not any(kind in own for own in extras):
        return None
    for (name, number), own in zip(source.parts, extras, strict=True):
        there = len(own.get(kind, ()))
        if there != number:
            raise ConfigError(f"embeddings={str(path)!r}: {name} holds {there} {kind} for {number} vectors")
    return [value for own in extras for value in own[kind]]


def _files(
    folder: Path, names: Sequence[str] | None, number: int, own: set[Path], without: Path | None
) -> list[Path]:
    """A picture for each vector."""
    if not folder.is_dir():
        raise ConfigError(f"images={str(folder)!r} is not a folder")
    if names is None:
        files = [file for file in find(folder, without)[0] if file.resolve() not in own]
        if len(files) != number:
            raise ConfigError(
                f"images={str(folder)!r} holds {len(files)} files, but there are {number} embeddings; an "
                ".npz or .parquet file may give the file of each one, as 'names'"
            )
        return files
    files = [Path(os.path.normpath(folder / name)) for name in names]
    for name, file in zip(names, files, strict=True):
        if not file.is_relative_to(folder):
            raise ConfigError(
                f"names: {name!r} of the embeddings is outside images={str(folder)!r}; names must be "
                "paths inside that folder"
            )
    missing = [name for name, file in zip(names, files, strict=True) if not file.is_file()]
    if missing:
        raise ConfigError(
            f"images={str(folder)!r} lacks {len(missing)} of the {number} files that the embeddings name, "
            f"the first one is {missing[0]!r}"
        )
    return files


def _numbered(source: vectors.Vectors) -> list[str]:
    if len(source.parts) == 1:
        return [str(row) for row in range(len(source))]
    return [f"{name}:{row}" for name, number in source.parts for row in range(number)]
