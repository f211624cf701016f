"""Assigns new images, or vectors, to the clusters of a model; learns nothing.

    sul-jax assign runs/cluster NEW
    sul-jax assign runs/cluster NEW.npy
    sul-jax assign runs/cluster/network-seed1-10 NEW --output of_seed_1.csv

The images are read like those of the training: the same size, and the same scale for pictures of more than 8
bits. Writes the file, cluster, distance and margin of each image. A model file is data, not code.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from sul_jax import estimators
from sul_jax._files import read_json
from sul_jax.cli import embeddings
from sul_jax.cli.images import Images, read, summary
from sul_jax.cli.listing import HEADER, Places, places, write_clusters
from sul_jax.cli.options import ConfigError, as_path
from sul_jax.cli.pictures import Scale
from sul_jax.estimators._vectors import VectorClustering


@dataclass(frozen=True)
class Config:
    """Options of the command."""

    model: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="MODEL")]]
    """The folder of a run of `sul-jax cluster`, or a network in it."""
    images: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="NEW")]]
    """Folder of pictures, or an .npz file with `images`; for a model of embeddings, a file or folder of
    embeddings."""
    output: Path = Path("assigned.csv")
    """The table to write; an earlier one is replaced."""


class Assigned(NamedTuple):
    """The clusters of new images.

    Attributes:
      names: of the images.
      labels: `[num_images]`, clusters.
      places: where in them they lie.
    """

    names: list[str]
    labels: np.ndarray
    places: Places


def run(config: Config) -> Assigned:
    """Assigns images; see the module's docstring.

    Args:
      config: the options.

    Returns:
      The clusters.

    Raises:
      ValueError: no model, images that cannot be used, or an output that is something else.
    """
    names = ("model", "images", "output")
    folder, path, output = (as_path(name, getattr(config, name)) for name in names)
    _refuse_what_is_not_ours(output)
    model, scale = load(folder)
    if isinstance(model, VectorClustering):
        return _vectors(model, path, output)
    height, width, channels = model.image_shape_
    images = read(path, height, scale=scale)
    pixels = _with_channels(images.pixels, channels)
    if pixels.shape[1:] != (height, width, channels):
        given, wanted = ("×".join(map(str, s)) for s in (pixels.shape[1:], model.image_shape_))
        raise ConfigError(f"images of {given} do not fit the model: it learned from images of {wanted}")
    print("\n".join(summary(_known(images, scale))))
    model.verbose = True
    labels, distances = model.assign(pixels)
    return _written(output, images.names, labels, places(labels, distances))


def _vectors(model: Any, path: Path, output: Path) -> Assigned:
    given = embeddings.read(path)
    print(f"{len(given.source)} vectors of {given.source.num_features} features")
    model.verbose = True
    labels = model.predict(given.paths)
    return _written(output, given.examples.names, labels, embeddings.places(model, given))


def _written(output: Path, names: list[str], labels: np.ndarray, where: Places) -> Assigned:
    write_clusters(output, names, labels, where)
    print(f"clusters: {output}")
    return Assigned(names, labels, where)


def load(folder: Path) -> tuple[Any, Scale | None]:
    """The model of a run, and how it reads pictures of more than 8 bits.

    Args:
      folder: of the run, or of a network in it.

    Raises:
      ConfigError: nothing that `sul-jax cluster` wrote.
    """
    of_run = (folder / "model").is_dir()
    stored, reading = (folder / "model", folder) if of_run else (folder, folder.parent)
    try:
        about = read_json(reading / "reading.json")
        scale = None if about["scale"] is None else Scale(*map(float, about["scale"]))
        return estimators.load(stored), scale
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ConfigError(
            f"model={str(folder)!r} is not a model that sul-jax cluster wrote ({error})"
        ) from None


def _refuse_what_is_not_ours(output: Path) -> None:
    if not output.exists():
        return
    with open(output, encoding="utf-8", errors="replace") as file:
        if file.readline().strip() != ",".join(HEADER):
            raise ConfigError(
                f"output={str(output)!r} exists and is not a table of sul-jax assign; give another"
            )


def _known(images: Images, scale: Scale | None) -> Images:
    """Says where the scale of deep pictures is not the model's."""
    if scale is not None or images.scale is None:
        return images
    note = "the model has seen no pictures of more than 8 bits: the new ones give the scale"
    return images._replace(notes=[*images.notes, note])


def _with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Gray images three times over for a model of colours; the lightness of colours for a gray one."""
    if pixels.shape[-1] < channels:
        return np.repeat(pixels, 3, axis=-1)
    if pixels.shape[-1] == channels:
        return pixels
    gray = np.empty((*pixels.shape[:3], 1), pixels.dtype)
    for index, image in enumerate(pixels):
        values = image @ np.array([0.299, 0.587, 0.114])
        gray[index, ..., 0] = np.round(values) if pixels.dtype == np.uint8 else values
    return gray
