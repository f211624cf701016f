"""The networks of a run: learned seed by seed or together, stored, and read when a run goes on."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sul_jax import estimators
from sul_jax._files import atomic_path
from sul_jax.cli.options import ConfigError
from sul_jax.estimators import (
    ACOLClustering,
    DeepClustering,
    EnergyClustering,
    NMCEClustering,
    PixelClustering,
)

METHODS: dict[str, Any] = {
    "energy": EnergyClustering,
    "acol": ACOLClustering,
    "nmce": NMCEClustering,
    "deepcluster": DeepClustering,
    "pixels": PixelClustering,
}


class Fit(NamedTuple):
    """One seed's network with one number of clusters.

    Attributes:
      seed: of the network.
      model: the fitted estimator.
      codes: a file with the codes of the images, `[num_images, num_codes]`; None of vectors, which have none.
    """

    seed: int
    model: Any
    codes: Path | None


def estimator(method: str, num_clusters: int, seed: int, image_size: int | None = None) -> Any:
    """An estimator that is not fitted yet.

    Args:
      method: a key of `METHODS`.
      num_clusters: clusters.
      seed: of the network.
      image_size: side to which images are resized; by default what the method's network is made for.

    Raises:
      ConfigError: an unknown method, or one whose network is made for another size.

    Example:
      >>> from sul_jax.cli import networks
      >>> networks.estimator("pixels", 10, 0).image_size
      28
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r} is not accepted: it must be one of {', '.join(METHODS)}")
    model = METHODS[method](num_clusters, random_state=seed, verbose=True)
    if image_size in (None, model.image_size):
        return model
    if "image_size" not in model.get_params():
        raise ConfigError(
            f"image_size={image_size} is not accepted: the network of {method} is made for {model.image_size}"
        )
    return model.set_params(image_size=image_size)


class Networks:
    """Learns the networks of a run in its folder.

    What is in the folder is read: the caller has set aside what is not of this run.
    """

    def __init__(self, folder: Path, method: str, image_size: int, pixels: np.ndarray):
        """Says what is learned from.

        Args:
          folder: of the run.
          method: a key of `METHODS`.
          image_size: side to which images are resized.
          pixels: `[num_images, height, width, channels]`.
        """
        self._folder, self._method, self._size, self._pixels = folder, method, image_size, pixels

    def learn(self, seeds: Sequence[int], numbers: Sequence[int], together: int | None = None) -> list[Fit]:
        """Every seed with every number of clusters.

        Args:
          seeds: of the networks.
          numbers: of clusters.
          together: networks that learn at once; by default one on a CPU and four on an accelerator.

        Raises:
          ConfigError: a network that diverged, or a stored one that is not of this run.
          ValueError: a stored network that cannot be read.
        """
        fits: list[Fit] = []
        at_once = together or (1 if jax.default_backend() == "cpu" else 4)
        for first in range(0, len(seeds), at_once):
            group = seeds[first : first + at_once]
            learned = self._group(group, numbers[0])
            fits += learned
            for number in numbers[1:]:
                if learned[0].model.learns_clusters:
                    fits += self._group(group, number)
                else:
                    for fit in learned:
                        fits.append(fit._replace(model=fit.model.with_clusters(codes_of(fit), number)))
        return fits

    def _group(self, seeds: Sequence[int], number: int) -> list[Fit]:
        """Networks of some seeds, read where they are stored, else learned together."""
        stored = [self._folder / f"network-seed{seed}-{number}" for seed in seeds]
        missing = [index for index, path in enumerate(stored) if not path.exists()]
        models = {index: estimator(self._method, number, seeds[index], self._size) for index in missing}
        if models:
            names = ", ".join(str(seeds[index]) for index in missing)
            print(f"{'seed' if len(missing) == 1 else 'seeds'} {names}: {number} clusters")
            kept = [_beside(stored[index], ".learned") for index in missing]
            fitted = estimators.fit_together(list(models.values()), self._pixels, keep=kept)
            for (index, model), learned in zip(models.items(), kept, strict=True):
                _store(model, next(fitted), stored[index], seeds[index])
                shutil.rmtree(learned)
        every = [models[i] if i in models else self._read(path, number) for i, path in enumerate(stored)]
        codes = [_beside(path, ".npy") for path in stored]
        return [Fit(*one) for one in zip(seeds, every, codes, strict=True)]

    def _read(self, path: Path, number: int) -> Any:
        """A stored network, if it is one of this run."""
        model = estimators.load(path)
        codes = np.load(_beside(path, ".npy"), mmap_mode="r")
        about = (type(model), model.n_clusters, model.image_size, len(model.labels_), len(codes))
        images = len(self._pixels)
        if about != (METHODS[self._method], number, self._size, images, images):
            raise ConfigError(
                f"{str(path)!r} does not belong to this run; remove it, or give another --workdir"
            )
        model.verbose = True
        return model


def codes_of(fit: Fit) -> np.ndarray:
    """The codes of a fit of images.

    Args:
      fit: from `Networks.learn`.
    """
    assert fit.codes is not None
    codes: np.ndarray = np.load(fit.codes)
    return codes


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _store(model: Any, codes: np.ndarray, path: Path, seed: int) -> None:
    """Codes first: a network that is there is a whole one."""
    bad = np.count_nonzero(~np.isfinite(codes).all(axis=1))
    if bad:
        raise ConfigError(
            f"seed {seed}: the codes of {bad} of {len(codes)} images are not finite, so the network has "
            "diverged; try other seeds or another method"
        )
    with atomic_path(_beside(path, ".npy")) as temporary, open(temporary, "wb") as file:
        np.save(file, codes)
    model.save(path)
