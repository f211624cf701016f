"""What the estimators share: reading images, learning several at once, codes in batches, k-means on them."""

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike
from sklearn.base import ClusterMixin
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.utils.validation import check_is_fitted, validate_data

from sul_jax import k_means, training
from sul_jax._check import check_integer, check_number, check_vectors, on_host
from sul_jax.estimators import _saved
from sul_jax.estimators._estimator import Estimator, warn_of_few
from sul_jax.estimators._images import Images, shape_of
from sul_jax.seeds import of_seed

# Images that a compiled program encodes at a time, and bytes of them and of a network's maps.
ENCODED, _IMAGE_BYTES, _MAP_BYTES = 256, 2**26, 2**30
# Products of a number by a number in a step of k-means' starts: many codes and clusters get fewer starts.
_CLUSTERING_PRODUCTS = 2**36
# Codes that the last k-means sees at most.
_CLUSTERED_BYTES = 2**29
# Folded into the seed for it.
_CLUSTERING = 2**31 - 1
_AT_LEAST = {
    "n_clusters": 1, "image_size": 4, "batch_size": 1, "max_steps": 1, "epochs": 1, "cycles": 0,
    "steps_per_cycle": 1, "num_filters": 1, "num_features": 1, "nodes_per_parent": 1, "cluster_rank": 1,
}  # fmt: skip

_NOT_NEGATIVE, _POSITIVE = ("learning_rate", "invariance_weight"), ("code_power", "eps_squared")

# Compiled once for each shape: called as it is, its loops would be compiled anew every time.
_k_means = jax.jit(k_means.fit, static_argnames=("num_clusters", "num_init"))


class ImageClustering(ClusterMixin, Estimator):  # type: ignore[misc]  # scikit-learn is untyped
    """What the estimators share: reading images, codes in batches, k-means on them."""

    n_clusters: int
    image_shape: tuple[int, ...] | None
    image_size: int
    learns_clusters = False  # whether what is learned depends on their number

    def fit(self, X: ArrayLike, y: object = None) -> Self:  # noqa: N803
        """Learns from images and clusters them.

        Args:
          X: `[num_images, height, width]`, `[num_images, height, width, channels]` or, with `image_shape`,
            `[num_images, features]`; uint8, equal to floats in [0, 1], or floats on a scale of their own.
          y: ignored.

        Returns:
          The estimator itself.

        Raises:
          ValueError: images that are not finite, do not fit `image_shape` or have their channels first, or
            fewer than clusters; a network that diverged.

        Warns:
          ConvergenceWarning: fewer clusters than asked for.
        """
        next(fit_together([self], X))
        return self

    def fit_transform(self, X: ArrayLike, y: object = None) -> np.ndarray:  # noqa: N803
        """Learns from images, clusters them, and returns their codes; see `fit` and `transform`."""
        return next(fit_together([self], X))

    def _begin(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
        """Checks options and images before learning; returns the images as rows."""
        for name, low in _AT_LEAST.items():
            check_integer(name, getattr(self, name, low), low=low)
        for name in _NOT_NEGATIVE:
            check_number(name, getattr(self, name, 1), low=0)
        for name in _POSITIVE:
            check_number(name, getattr(self, name, 1), above=0)
        rows = self._rows(X, reset=True)
        if self.n_clusters > len(rows):
            raise ValueError(f"n_clusters={self.n_clusters} exceeds n_samples={len(rows)}")
        self.is_uint8_ = rows.dtype == np.uint8
        # Bytes count as [0, 1], and so do floating images there, unless a byte would show nothing of them.
        # Others have a scale of their own.
        largest = 1.0 if self.is_uint8_ else float(np.abs(rows).max())
        self.scale_ = 1.0 if 1 / 256 <= largest <= 1 or largest == 0 else largest
        self._check_memory(len(rows))
        return rows

    def _num_maps(self) -> int:
        """Of the network's layer that has most, by the images' number of pixels: what memory goes by."""
        return self.image_shape_[2]

    def _check_memory(self, number: int) -> None:
        """Raises where the maps of a minibatch alone are more than the machine holds."""
        if not hasattr(os, "sysconf"):
            return
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        batch = max(1, min(number, getattr(self, "batch_size", 1)))
        needed = 2 * 4 * batch * self.image_size**2 * self._num_maps()
        if needed > memory:
            raise ValueError(
                f"image_size={self.image_size} is too large for this machine: maps of {batch} images need "
                f"{needed / 2**30:.0f} GiB of {memory / 2**30:.0f}; a smaller batch_size may help"
            )

    def _finish(self, rows: np.ndarray) -> np.ndarray:
        """Clusters what has been learned; returns the images' codes."""
        codes = self._codes(rows, self.learned_)
        self._cluster(codes)
        return self._shown(codes)

    def transform(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
        """Codes of images, float32 `[num_images, num_codes]`."""
        check_is_fitted(self)
        return self._shown(self._codes(self._rows(X, reset=False), self.learned_))

    def predict(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
        """The cluster of each image, int32 `[num_images]`."""
        return self.assign(X)[0]

    def distances(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
        """Distance of each image's code to the centre of every cluster, `[num_images, n_clusters]`."""
        return self.assign(X)[1]

    def assign(self, X: ArrayLike) -> tuple[np.ndarray, np.ndarray]:  # noqa: N803
        """The cluster of each image and its distances to all centres: `predict` and `distances` at once."""
        check_is_fitted(self)
        codes = self._codes(self._rows(X, reset=False), self.learned_)
        distances = self.distances_of(self._shown(codes))
        return self._labels(codes, distances), distances

    def distances_of(self, codes: np.ndarray) -> np.ndarray:
        """Distance of each code, from `transform`, to the centre of every cluster."""
        # In float64 by parts: there the products' cancellation is below float32's rounding.
        known = np.isfinite(self.cluster_centers_).all(axis=1)
        distances = np.full((len(codes), len(known)), np.inf, np.float32)
        distances[:, known] = euclidean_distances(codes, self.cluster_centers_[known])
        return distances

    def with_clusters(self, codes: np.ndarray, n_clusters: int) -> Self:
        """A copy with another number of clusters, on the codes of the images learned from.

        Args:
          codes: from `fit_transform`, or anything that NumPy makes an array of.
          n_clusters: clusters.

        Raises:
          ValueError: what is learned depends on the clusters; other codes, or fewer than clusters.
        """
        if self.learns_clusters:
            raise ValueError(
                f"{type(self).__name__} learns its clusters; make a new one with n_clusters={n_clusters}"
            )
        given = np.asarray(check_vectors("codes", codes, features=self._n_features_out))
        check_integer("n_clusters", n_clusters, low=1, high=len(given), why=", the number of codes")
        other = copy.copy(self).set_params(n_clusters=n_clusters)
        other._cluster(given)
        return other

    def _shown(self, codes: np.ndarray) -> np.ndarray:
        return codes

    def _cluster(self, codes: np.ndarray) -> None:
        key = jax.random.fold_in(jax.random.key(self.seed_), _CLUSTERING)
        # k-means holds its inputs several times over: the centres of very many codes are those of a part.
        most = max(self.n_clusters, _CLUSTERED_BYTES // codes[0].nbytes)
        some = codes
        if len(codes) > most:
            some = codes[np.random.default_rng(self.seed_).permutation(len(codes))[:most]]
        if self.verbose:
            print(f"clustering {len(some)} codes, {self.n_clusters} clusters")
        products, size = some.size * self.n_clusters, self.n_clusters * some[0].nbytes
        starts = max(1, min(10, _CLUSTERING_PRODUCTS // products, _CLUSTERED_BYTES // size))
        self.cluster_centers_ = np.asarray(self._centers(key, jnp.asarray(some), starts))
        self._set_labels(self._labels(codes, self.distances_of(codes)))

    def _centers(self, key: Array, codes: Array, starts: int) -> Array:
        """What `distances_of` measures from, learned from codes."""
        return _k_means(key, codes, num_clusters=self.n_clusters, num_init=starts).centroids

    def _set_labels(self, labels: np.ndarray) -> None:
        self.labels_ = labels
        why = "images, or their codes, differ too little"
        warn_of_few(len(np.unique(labels)), self.n_clusters, why)

    def _labels(self, codes: np.ndarray, distances: np.ndarray) -> np.ndarray:
        """The nearest centre's number."""
        return np.argmin(distances, axis=1).astype(np.int32)

    @property
    def _n_features_out(self) -> int:
        return int(self.cluster_centers_.shape[-1])

    def _rows(self, X: Any, *, reset: bool) -> np.ndarray:  # noqa: N803
        shape = None
        if X is None or isinstance(X, str | list | tuple):
            X = on_host("X", X)  # noqa: N806
        if getattr(X, "ndim", 0) in (3, 4):
            shape = tuple(X.shape[1:]) + ((1,) if X.ndim == 3 else ())
            X = np.asarray(X).reshape(len(X), math.prod(shape))  # noqa: N806
        dtype = np.uint8 if np.asarray(X).dtype == np.uint8 else np.float32
        rows: np.ndarray = validate_data(
            self, X, reset=reset, dtype=dtype, ensure_min_samples=2 if reset else 1
        )
        if reset:
            self.image_shape_ = shape_of(self.image_shape, shape, rows.shape[1])
            return rows
        if shape is not None and shape != self.image_shape_:
            raise ValueError(
                f"images have shape {shape}, but the model learned from shape {self.image_shape_}"
            )
        self._check_scale(rows)
        return rows

    def _check_scale(self, rows: np.ndarray) -> None:
        """Raises where images are on another scale than those learned from; all zeros are on any."""
        kind = "uint8" if self.is_uint8_ else f"floating, on a scale up to {self.scale_:.3g}"
        if rows.dtype == np.uint8:
            if self.scale_ != 1:
                raise ValueError(f"images are uint8, but the model learned from images that were {kind}")
            return
        largest = float(np.abs(rows).max())
        # Between bytes, [0, 1] and wider integers lie factors of 255 and more.
        low, high = (1 / 256, 2 - self.is_uint8_) if self.scale_ == 1 else (1 / 128, 128)
        if largest and not low <= largest / self.scale_ <= high:
            raise ValueError(
                f"floating images go up to {largest:.3g}, not on the scale of the training images, "
                f"which were {kind}"
            )

    def _images(self, rows: np.ndarray) -> Images:
        scale = 255.0 if rows.dtype == np.uint8 else self.scale_
        return Images(rows, self.image_shape_, self.image_size, scale)

    def _codes(self, rows: np.ndarray, learned: Any) -> np.ndarray:
        images = self._images(rows)
        number = len(rows)
        every = None
        encode, batch = self._encoder(learned), self._encoded_together()
        for start in self._progress(range(0, number, batch), "codes"):
            chosen = np.minimum(np.arange(start, start + batch), number - 1)
            codes = np.asarray(encode(images.take(chosen)))
            if every is None:  # filled in place: many codes are not held twice
                every = np.empty((number, codes.shape[1]), codes.dtype)
            every[start : start + len(codes)] = codes[: number - start]
        assert every is not None
        if not np.isfinite(every).all():
            raise ValueError(
                f"{type(self).__name__} diverged: its codes are not finite; a smaller learning_rate may help"
            )
        return every

    def _encoded_together(self) -> int:
        """Images that a program takes at a time: of their size and the network alone, not of their number."""
        pixels = 4 * self.image_size**2
        most = min(_IMAGE_BYTES // (pixels * self.image_shape_[2]), _MAP_BYTES // (pixels * self._num_maps()))
        return max(1, min(ENCODED, most))

    def _progress(self, steps: Sequence[Any] | np.ndarray, title: str) -> Iterable[Any]:
        if not self.verbose:
            return steps
        from tqdm import tqdm

        return tqdm(steps, desc=title, leave=False)

    @contextmanager
    def _shown_steps(self, num_steps: int, title: str) -> Iterator[training.Callback]:
        """A callback of `training.train` that moves a progress bar."""
        from tqdm import tqdm

        with tqdm(total=num_steps, desc=title, leave=False, disable=not self.verbose) as bar:
            yield lambda done, state, infos: bar.update(done - bar.n)

    def _arrays(self) -> dict[str, Any]:
        return _saved.leaves(self) | {"centers": self.cluster_centers_, "labels": self.labels_}

    def _restore(self, arrays: dict[str, np.ndarray], path: str | Path) -> None:
        self.cluster_centers_, self.labels_ = arrays.pop("centers"), arrays.pop("labels")
        self.learned_ = _saved.tree(self, arrays, path)

    def _template(self) -> Any:
        """A tree of the structure of `learned_`; its leaves are of no account."""
        raise NotImplementedError

    def _learn(self, keys: Array, images: Images) -> Any:
        """What the network of each key learns, along the first axis of all arrays."""
        raise NotImplementedError

    def _encoder(self, learned: Any) -> Callable[[Array], Array]:
        """From images to codes, by what was learned."""
        raise NotImplementedError


def fit_together(
    models: Sequence[ImageClustering],
    X: ArrayLike,  # noqa: N803
    *,
    keep: Sequence[Path | None] | None = None,
) -> Iterator[np.ndarray]:
    """Learns the networks of estimators that differ in `random_state` alone at once, by vmap.

    On an accelerator that takes less time than one after the other; on a CPU a single network keeps all cores
    busy. All networks are learned by the call; each estimator's images are clustered, and it is fitted, when
    its codes are taken.

    Args:
      models: the estimators; they are fitted in place.
      X: images, as for `fit`.
      keep: a folder a model, in which what it learned is kept as soon as it is there: a fit that was stopped
        goes on from there. Folders of other images or options are an error.

    Returns:
      An iterator over the codes of the estimators, as from `fit_transform`.

    Raises:
      ValueError: as `fit`, no estimators, estimators that differ in more than `random_state`, or something
        else in a folder of `keep`.

    Example:
      >>> import numpy as np
      >>> from sul_jax.estimators import PixelClustering, fit_together
      >>> models = [PixelClustering(2, random_state=seed) for seed in range(3)]
      >>> codes = list(fit_together(models, np.random.default_rng(0).random((10, 4, 4))))
      >>> [model.labels_.shape for model in models]
      [(10,), (10,), (10,)]
    """
    if not models:
        raise ValueError("models is empty; at least one estimator is needed")
    first = models[0]
    for model in models[1:]:
        if type(model) is not type(first) or _options(model) != _options(first):
            raise ValueError(f"models: {model} differs from {first} in more than random_state")
    folders = [None] * len(models) if keep is None else list(keep)
    if len(folders) != len(models):
        raise ValueError(f"keep has {len(folders)} folders for {len(models)} models")
    rows = first._begin(X)
    about = {name: value for name, value in vars(first).items() if name in _saved.OF_IMAGES}
    missing = []
    for model, folder in zip(models, folders, strict=True):
        model.__dict__.update(about)
        model._draw_seed()
        if folder is not None and folder.exists():
            model.learned_ = _saved.kept(model, folder, rows)
        else:
            missing.append((model, folder))
    if missing:
        keys = jnp.stack([jax.random.key(model.seed_) for model, _ in missing])
        learned = first._learn(keys, first._images(rows))
        for index, (model, folder) in enumerate(missing):
            model.learned_ = jax.device_get(of_seed(learned, index))
            if folder is not None:
                _saved.keep(model, folder, rows)
    return (model._finish(rows) for model in models)


def _options(model: ImageClustering) -> str:
    chosen = model.get_params() | {"random_state": None, "verbose": None}
    return repr(sorted(chosen.items()))
