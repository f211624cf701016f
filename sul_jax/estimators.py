"""Scikit-learn estimators: each method learns from unlabelled images and clusters them.

They hold what was learned and compile what they run; all mathematics is in the functions of this package.
An image's code and cluster do not depend on the batch it comes in: programs take batches of one size.
"""

import copy
import json
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from sul_jax import LearningRule, augment, coding_rate, deep_cluster, energy, gar, k_means, stack, whitening
from sul_jax.nn import ACOL, NMCE, EnergyNet, LeNet5, ResNet, _checkpoint
from sul_jax.seeds import of_seed, over_seeds, stacked

# Images that a compiled program encodes at a time.
_ENCODED = 256
# Images that whitening is learned from.
_WHITENED_FROM = 2048
# Codes that the last k-means sees at most.
_CLUSTERED_BYTES = 2**29
# Folded into the seed for it.
_CLUSTERING = 2**31 - 1
# Values from which on a row is taken for an image.
_IMAGE = 64
_AT_LEAST = {
    "n_clusters": 1, "image_size": 4, "batch_size": 1, "max_steps": 1, "epochs": 1, "cycles": 0,
    "steps_per_cycle": 1, "num_filters": 1, "num_features": 1, "nodes_per_parent": 1,
}  # fmt: skip
# Components of the codes kept where they are whitened.
_CODE_COMPONENTS = 20


# Compiled once for each shape: called as they are, their loops would be compiled anew every time.
_k_means = jax.jit(k_means.fit, static_argnames="num_clusters")
_pseudo_labels = jax.jit(deep_cluster.pseudo_labels, static_argnames="num_clusters")
_preprocess = jax.jit(deep_cluster.preprocess)
_balanced_indices = jax.jit(deep_cluster.balanced_indices, static_argnames=("num_clusters", "num_samples"))


class _Images(NamedTuple):
    """Flattened images of any type, and how they are to be seen."""

    rows: np.ndarray  # [num_images, features]
    shape: tuple[int, int, int]
    size: int
    scale: float

    def take(self, indices: np.ndarray) -> Array:
        """Images `[*indices.shape, size, size, channels]` in float32."""
        return _seen(jnp.asarray(self.rows[indices]), self.scale, shape=self.shape, size=self.size)


@partial(jax.jit, static_argnames=("shape", "size"))
def _seen(rows: Array, scale: float, *, shape: tuple[int, int, int], size: int) -> Array:
    missing = int(np.prod(shape)) - rows.shape[-1]
    flat = rows.reshape(-1, rows.shape[-1])
    images = jnp.pad(flat.astype(jnp.float32) / scale, ((0, 0), (0, missing))).reshape(-1, *shape)
    seen = jax.image.resize(images, (len(flat), size, size, shape[2]), "linear")
    return seen.reshape(*rows.shape[:-1], *seen.shape[1:])


def _warn_of_rows(num_features: int, side: int) -> None:
    """Warns that rows are no square image and how they are read."""
    hint, colour = "", int(np.sqrt(num_features // 3))
    if 3 * colour**2 == num_features:
        hint = f"; flattened colour images need image_shape=({colour}, {colour}, 3)"
    # At the first function up the stack that is neither this package's nor scikit-learn's.
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("sul_jax.", "sklearn.")):
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"rows of {num_features} values are no square image and are read as the first pixels of a gray one "
        f"of {side}×{side}: give image_shape{hint}",
        stacklevel=level,
    )


class _ImageClustering(  # type: ignore[misc]  # scikit-learn is untyped
    ClassNamePrefixFeaturesOutMixin,  # type: ignore[misc]
    TransformerMixin,  # type: ignore[misc]
    ClusterMixin,  # type: ignore[misc]
    BaseEstimator,  # type: ignore[misc]
):
    """What the estimators share: reading images, codes in batches, k-means on them."""

    n_clusters: int
    image_shape: tuple[int, ...] | None
    image_size: int
    random_state: Any
    verbose: bool
    learns_clusters = False  # whether what is learned depends on their number

    def fit(self, X: ArrayLike, y: object = None) -> Self:  # noqa: N803
        """Learns from images and clusters them.

        Args:
          X: `[num_images, height, width]`, `[num_images, height, width, channels]` or, flattened,
            `[num_images, features]`; uint8, equal to floats in [0, 1], or floats on a scale of their own.
          y: ignored.

        Returns:
          The estimator itself.

        Raises:
          ValueError: images that are not finite, do not fit `image_shape` or have their channels first, or
            fewer than clusters.

        Warns:
          UserWarning: rows of 64 values or more that are no square image, without `image_shape`.
        """
        next(fit_together([self], X))
        return self

    def fit_transform(self, X: ArrayLike, y: object = None) -> np.ndarray:  # noqa: N803
        """Learns from images, clusters them, and returns their codes; see `fit` and `transform`."""
        return next(fit_together([self], X))

    def _begin(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
        """Checks options and images before learning; returns the images as rows."""
        for name, low in _AT_LEAST.items():
            value = getattr(self, name, low)
            if not isinstance(value, int | np.integer) or value < low:
                raise ValueError(f"{name}={value!r} is not accepted: it must be an integer of at least {low}")
        rows = self._rows(X, reset=True)
        if self.n_clusters > len(rows):
            raise ValueError(f"n_clusters={self.n_clusters} exceeds n_samples={len(rows)}")
        self.is_uint8_ = rows.dtype == np.uint8
        # Bytes count as [0, 1], and so do floating images there; others have a scale of their own.
        self.scale_ = 1.0 if self.is_uint8_ else max(1.0, float(np.abs(rows).max()))
        return rows

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
        # A part at a time: no array of images × clusters × codes, and no cancellation as in expanded squares.
        parts = [
            np.stack([np.linalg.norm(part - one, axis=1) for one in self.cluster_centers_], axis=1)
            for part in np.array_split(codes, -(-len(codes) // 4096))
        ]
        return np.concatenate(parts)

    def with_clusters(self, codes: np.ndarray, n_clusters: int) -> Self:
        """A copy with another number of clusters, on the codes of the images learned from.

        Args:
          codes: from `fit_transform`.
          n_clusters: clusters.

        Raises:
          ValueError: what is learned depends on the clusters.
        """
        if self.learns_clusters:
            raise ValueError(
                f"{type(self).__name__} learns its clusters; make another with n_clusters={n_clusters}"
            )
        other = copy.copy(self).set_params(n_clusters=n_clusters)
        other._cluster(codes)
        return other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the fitted estimator as an Orbax checkpoint folder; see `load`.

        Args:
          path: the folder, new or an earlier checkpoint of the same kind of estimator. It is complete, or
            it is not there.

        Raises:
          ValueError: there is something else at `path`, or an option is not for JSON.
        """
        check_is_fitted(self)
        fitted = {n: v for n, v in vars(self).items() if n.endswith("_") and n not in _APART}
        arrays = {n: v for n, v in fitted.items() if isinstance(v, np.ndarray) and v.dtype != object}
        others = {n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in fitted.items()
                  if n not in arrays}  # fmt: skip
        leaves = {f"learned_{i:03d}": leaf for i, leaf in enumerate(jax.tree.leaves(self.learned_))}
        about = {"params": _params(self), "fitted": json.dumps(others)}
        _checkpoint.write(path, type(self).__name__, arrays | leaves, about)

    def _template(self) -> Any:
        """The structure of what is learned, without values."""
        raise NotImplementedError

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
            print(f"k-means of {len(some)} codes, {self.n_clusters} clusters")
        found = _k_means(key, jnp.asarray(some), num_clusters=self.n_clusters)
        self.cluster_centers_ = np.asarray(found.centroids)
        self.labels_ = self._labels(codes, self.distances_of(codes))

    def _labels(self, codes: np.ndarray, distances: np.ndarray) -> np.ndarray:
        """The nearest centre's number."""
        return np.argmin(distances, axis=1).astype(np.int32)

    @property
    def _n_features_out(self) -> int:
        return int(self.cluster_centers_.shape[1])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def _rows(self, X: Any, *, reset: bool) -> np.ndarray:  # noqa: N803
        shape = None
        if isinstance(X, list | tuple):
            X = np.asarray(X)  # noqa: N806
        if getattr(X, "ndim", 0) in (3, 4):
            shape = tuple(X.shape[1:]) + ((1,) if X.ndim == 3 else ())
            X = np.asarray(X).reshape(len(X), -1)  # noqa: N806
        kept = np.asarray(X).dtype if hasattr(X, "dtype") else None
        dtype = np.uint8 if kept == np.uint8 else np.float32
        rows: np.ndarray = validate_data(
            self, X, reset=reset, dtype=dtype, ensure_min_samples=2 if reset else 1
        )
        if reset:
            self.image_shape_ = self._shape(shape, rows.shape[1])
            return rows
        if shape is not None and shape != self.image_shape_:
            raise ValueError(
                f"images of shape {shape} were given, but those learned from had {self.image_shape_}"
            )
        if rows.dtype == np.uint8 and self.scale_ != 1:
            raise ValueError("uint8 images were given, but those learned from were floating, beyond [0, 1]")
        if rows.dtype != np.uint8 and self.is_uint8_ and np.abs(rows).max() > 1:
            raise ValueError("floating images beyond [0, 1] were given, but those learned from were uint8")
        return rows

    def _shape(self, found: tuple[int, ...] | None, num_features: int) -> tuple[int, int, int]:
        """The images' height, width and channels."""
        given = self.image_shape
        if given is None and found is None:  # the smallest square that holds the features, row by row
            side = int(np.ceil(np.sqrt(num_features)))
            if side**2 != num_features >= _IMAGE:
                _warn_of_rows(num_features, side)
            return side, side, 1
        shape = tuple(int(n) for n in (given if given is not None else found or ()))
        shape += (1,) * (len(shape) == 2)
        if given is None and shape[0] in (1, 3, 4) and min(shape[1:]) > 4:
            raise ValueError(
                f"images of shape {shape} seem to have their channels first; they come last here. "
                f"If they do, give image_shape={shape}"
            )
        if given is not None and found is not None and shape != found:
            raise ValueError(f"image_shape={given} does not fit images of shape {found}")
        if len(shape) != 3 or int(np.prod(shape)) != num_features:
            raise ValueError(
                f"image_shape={given} does not fit images of {num_features} values; it must be "
                "(height, width) or (height, width, channels)"
            )
        return shape[0], shape[1], shape[2]

    def _images(self, rows: np.ndarray) -> _Images:
        scale = 255.0 if rows.dtype == np.uint8 else self.scale_
        return _Images(rows, self.image_shape_, self.image_size, scale)

    def _codes(self, rows: np.ndarray, learned: Any) -> np.ndarray:
        images = self._images(rows)
        number = len(rows)
        found = None
        encode = self._encoder(learned)
        for start in self._progress(range(0, number, _ENCODED), "codes"):
            chosen = np.minimum(np.arange(start, start + _ENCODED), number - 1)
            codes = np.asarray(encode(images.take(chosen)))
            if found is None:  # filled in place: many codes are not held twice
                found = np.empty((number, codes.shape[1]), codes.dtype)
            found[start : start + len(codes)] = codes[: number - start]
        assert found is not None
        return found

    def _progress(self, steps: Sequence[Any] | np.ndarray, title: str) -> Iterable[Any]:
        if not self.verbose:
            return steps
        from tqdm import tqdm

        return tqdm(steps, desc=title, leave=False)

    def _learn(self, keys: Array, images: _Images) -> Any:
        """What the network of each key learns, along the first axis of all arrays."""
        raise NotImplementedError

    def _encoder(self, learned: Any) -> Callable[[Array], Array]:
        """From images to codes, by what was learned."""
        raise NotImplementedError


def fit_together(
    models: Sequence[_ImageClustering],
    X: ArrayLike,  # noqa: N803
    *,
    keep: Sequence[str | os.PathLike[str] | None] | None = None,
) -> Iterator[np.ndarray]:
    """Learns the networks of estimators that differ in `random_state` alone at once, by vmap.

    On an accelerator that takes less time than one after the other; on a CPU a single network keeps all cores
    busy. All networks are learned by the call; each estimator's images are clustered, and it is fitted, when
    its codes are taken.

    Args:
      models: the estimators; they are fitted in place.
      X: images, as for `fit`.
      keep: of each estimator a folder, or None. What the network learned is kept there, for a fit that is
        stopped before its end; a folder that is there is read, and its network is not learned anew.

    Returns:
      An iterator over the codes of the estimators, as from `fit_transform`.

    Raises:
      ValueError: as `fit`, no estimators, estimators that differ in more than `random_state`, or a folder
        to keep that holds something else: of other images, options or seeds.

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
    folders = [None] * len(models) if keep is None else [None if f is None else Path(f) for f in keep]
    if len(folders) != len(models):
        raise ValueError(f"keep has {len(folders)} folders for {len(models)} models")
    rows = first._begin(X)
    about = {name: value for name, value in vars(first).items() if name in _OF_IMAGES}
    crc32 = zlib.crc32(rows.tobytes()) if any(folders) else 0
    missing = []
    for model, folder in zip(models, folders, strict=True):
        model.__dict__.update(about)
        model.seed_ = int(check_random_state(model.random_state).randint(2**31 - 1))
        if folder is not None and folder.exists():
            model.learned_ = _read_kept(model, folder, crc32)
        else:
            missing.append((model, folder))
    if missing:
        keys = jnp.stack([jax.random.key(model.seed_) for model, _ in missing])
        learned = first._learn(keys, first._images(rows))
        for index, (model, folder) in enumerate(missing):
            model.learned_ = jax.device_get(of_seed(learned, index))
            if folder is not None:
                _write_kept(model, folder, crc32)
    return (model._finish(rows) for model in models)


def load(path: str | os.PathLike[str]) -> Any:
    """Reads what an estimator's `save` wrote.

    Args:
      path: the folder.

    Returns:
      The fitted estimator. A `random_state` that was no integer is None.

    Raises:
      ValueError: no such checkpoint, or one of something else.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> from sul_jax import estimators
      >>> images = np.random.default_rng(0).random((10, 4, 4))
      >>> model = estimators.PixelClustering(2, random_state=0).fit(images)
      >>> folder = tempfile.mkdtemp() + "/model"
      >>> model.save(folder)
      >>> bool(np.all(estimators.load(folder).predict(images) == model.labels_))
      True
    """
    folder = Path(path).absolute()
    kinds = (PixelClustering, EnergyClustering, ACOLClustering, NMCEClustering, DeepClustering)
    stored, sizes = _checkpoint.metadata(folder, *(kind.__name__ for kind in kinds))
    (kind,) = (kind for kind in kinds if kind.__name__ == sizes["module"])
    params = json.loads(sizes["params"])
    if isinstance(params.get("architecture"), dict):
        architecture = params["architecture"]
        layers = tuple(energy.EnergyLayer(**layer) for layer in architecture.pop("layers"))
        params["architecture"] = energy.EnergyArchitecture(**architecture, layers=layers)
    if params.get("image_shape") is not None:
        params["image_shape"] = tuple(params["image_shape"])
    model = kind(**params)
    arrays = {name: np.asarray(value) for name, value in _checkpoint.arrays(folder, stored).items()}
    fitted = json.loads(sizes["fitted"])
    fitted["image_shape_"] = tuple(fitted["image_shape_"])
    if "feature_names_in_" in fitted:
        fitted["feature_names_in_"] = np.array(fitted["feature_names_in_"], object)
    model.__dict__.update(fitted, **{n: v for n, v in arrays.items() if not n.startswith("learned_")})
    model.learned_ = _restored(model, folder, arrays)
    return model


# Fitted attributes that are stored leaf by leaf.
_APART = ("learned_",)


def _params(model: _ImageClustering) -> str:
    """An estimator's options as JSON."""
    params = model.get_params(deep=False)
    if isinstance(params.get("architecture"), energy.EnergyArchitecture):
        params["architecture"] = params["architecture"].to_dict()
    if not isinstance(params["random_state"], int | np.integer):
        params["random_state"] = None  # a generator; the seed that was drawn is `seed_`
    try:
        return json.dumps(params, sort_keys=True, default=lambda value: value.item())  # NumPy's scalars
    except (TypeError, ValueError, AttributeError):
        raise ValueError(f"{model} has options that cannot be stored as JSON") from None


def _restored(model: _ImageClustering, folder: Path, arrays: dict[str, np.ndarray]) -> Any:
    """What was learned, from its leaves."""
    template = model._template()
    leaves = [arrays[name] for name in sorted(arrays) if name.startswith("learned_")]
    expected = [leaf.shape for leaf in jax.tree.leaves(template)]
    if [leaf.shape for leaf in leaves] != expected:
        raise ValueError(f"path={str(folder)!r} was written by another version: its arrays differ")
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _kept_about(model: _ImageClustering, crc32: int) -> dict[str, Any]:
    params = json.loads(_params(model)) | {"random_state": None, "verbose": None}
    if not model.learns_clusters:
        params["n_clusters"] = None
    described = json.dumps(params, sort_keys=True)
    return {"params": described, "images": crc32, "seed": model.seed_, "shape": list(model.image_shape_)}


def _write_kept(model: _ImageClustering, folder: Path, crc32: int) -> None:
    leaves = {f"learned_{i:03d}": leaf for i, leaf in enumerate(jax.tree.leaves(model.learned_))}
    # Orbax stores no empty trees.
    arrays = {"seed": np.asarray(model.seed_, np.uint32)} | leaves
    _checkpoint.write(folder, f"{type(model).__name__}'s network", arrays, _kept_about(model, crc32))


def _read_kept(model: _ImageClustering, folder: Path, crc32: int) -> Any:
    stored, sizes = _checkpoint.metadata(folder, f"{type(model).__name__}'s network")
    about = _kept_about(model, crc32)
    differs = [name for name, value in about.items() if sizes.get(name) != value]
    if differs:
        raise ValueError(f"keep: {str(folder)!r} belongs to a fit that differs in {', '.join(differs)}")
    arrays = {name: np.asarray(value) for name, value in _checkpoint.arrays(folder, stored).items()}
    return _restored(model, folder, arrays)


# What an estimator knows of the images it was fitted to.
_OF_IMAGES = ("n_features_in_", "feature_names_in_", "image_shape_", "is_uint8_", "scale_")


def _options(model: _ImageClustering) -> str:
    chosen = model.get_params() | {"random_state": None, "verbose": None}
    return repr(sorted(chosen.items()))


def _minibatches(keys: Array, number: int, batch_size: int, steps: int) -> np.ndarray:
    """Indices `[steps, seeds, batch_size]`: passes in random order, one running into the next."""
    passes = -(-steps * batch_size // number)
    found = []
    for key in keys:
        generator = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
        order = np.concatenate([generator.permutation(number) for _ in range(passes)])
        found.append(order[: steps * batch_size].reshape(steps, batch_size))
    return np.stack(found, axis=1)


class PixelClustering(_ImageClustering):
    """k-means on the pixels, the baseline.

    Args:
      n_clusters: clusters.
      image_shape: height, width and perhaps channels of flattened images; by default the smallest square.
      image_size: side to which images are resized.
      random_state: an integer for the same result every time.
      verbose: show progress.

    Example:
      >>> import numpy as np
      >>> from sul_jax.estimators import PixelClustering
      >>> images = np.repeat(np.eye(2), 5, axis=0).reshape(10, 2, 1)
      >>> PixelClustering(2, random_state=0).fit_predict(images)[[0, 5]].tolist() in ([0, 1], [1, 0])
      True
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        image_shape: tuple[int, ...] | None = None,
        image_size: int = 28,
        random_state: Any = None,
        verbose: bool = False,
    ):
        self.n_clusters = n_clusters
        self.image_shape = image_shape
        self.image_size = image_size
        self.random_state = random_state
        self.verbose = verbose

    def _learn(self, keys: Array, images: _Images) -> Any:
        return ()

    def _template(self) -> Any:
        return ()

    def _encoder(self, learned: Any) -> Callable[[Array], Array]:
        return lambda images: images.reshape(len(images), -1)


class EnergyClustering(_ImageClustering):
    """Stacked convolutional energy layers learned by K-Subspaces, then k-means (paper 000).

    Args:
      n_clusters: clusters.
      architecture: a name in `energy.ARCHITECTURES` or an `EnergyArchitecture`, for images of `image_size`.
      image_shape: height, width and perhaps channels of flattened images; by default the smallest square.
      image_size: side to which images are resized.
      batch_size: images in a minibatch.
      max_steps: minibatches that each layer learns from, at most; the paper takes 118 of 512.
      code_power: power of the pooled codes before clustering.
      code_whitening: if positive, codes are normalised and their 20 leading components divided by their
        variance to this power, at most 0.5. Of what helped on MNIST's training images, 0.2 is a cautious
        value; README says what was tried.
      random_state: an integer for the same result every time.
      verbose: show progress.

    Attributes:
      labels_: int32 `[num_images]`, clusters of the images learned from.
      cluster_centers_: `[n_clusters, num_codes]`.

    Example:
      >>> import numpy as np
      >>> from sul_jax import energy
      >>> from sul_jax.estimators import EnergyClustering
      >>> small = energy.EnergyArchitecture(3, 2, (energy.EnergyLayer(8, 2, 2, 5, 0),))
      >>> images = np.random.default_rng(0).random((30, 12, 12))
      >>> model = EnergyClustering(3, architecture=small, image_size=12, max_steps=3, random_state=0)
      >>> model.fit(images).transform(images[:2]).shape
      (2, 20)
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        architecture: str | energy.EnergyArchitecture = "3layer",
        image_shape: tuple[int, ...] | None = None,
        image_size: int = 28,
        batch_size: int = 128,
        max_steps: int = 120,
        code_power: float = 1.0,
        code_whitening: float = 0.2,
        random_state: Any = None,
        verbose: bool = False,
    ):
        self.n_clusters = n_clusters
        self.architecture = architecture
        self.image_shape = image_shape
        self.image_size = image_size
        self.batch_size = batch_size
        self.max_steps = max_steps
        self.code_power = code_power
        self.code_whitening = code_whitening
        self.random_state = random_state
        self.verbose = verbose

    def _sizes(self) -> energy.EnergyArchitecture:
        if isinstance(self.architecture, str):
            if self.architecture not in energy.ARCHITECTURES:
                accepted = ", ".join(energy.ARCHITECTURES)
                raise ValueError(f"architecture={self.architecture!r} is unknown; accepted: {accepted}")
            return energy.ARCHITECTURES[self.architecture]
        return self.architecture

    def _learn(self, keys: Array, images: _Images) -> Any:
        if not 0 <= self.code_whitening <= 0.5:
            raise ValueError(f"code_whitening={self.code_whitening} is not accepted: it must be 0 to 0.5")
        architecture = self._sizes()
        least = _least_side(architecture)
        if self.image_size < least:
            raise ValueError(
                f"image_size={self.image_size} is too small for the architecture: it must be at least {least}"
            )
        rules = energy.network_rules(architecture)
        number = len(images.rows)
        keys = jnp.stack([jax.random.split(key, len(rules) + 1) for key in keys], axis=1)
        some = _minibatches(keys[-1], number, _WHITENED_FROM, 1)[0]
        states: tuple[Any, ...] = (_learn_whitening(architecture, images.take(some)),)
        # One pass; three where images are few.
        steps = min(
            self.max_steps, max(-(-number // self.batch_size), min(40, -(-3 * number // self.batch_size)))
        )
        for index in range(1, len(rules)):
            chosen = _minibatches(_folded(keys[index], 0), number, self.batch_size, steps)
            state = _begin_layer(architecture, index, keys[index], states, images.take(chosen[0]))
            for step, indices in enumerate(self._progress(chosen, f"layer {index}")):
                state = _energy_step(architecture, index, state, states, images.take(indices), step < 10)
            states = (*states, state)
        whitener = None
        if self.code_whitening:
            parts = _minibatches(keys[-1], number, _ENCODED, -(-min(number, _WHITENED_FROM) // _ENCODED))
            whitener = stacked(
                [
                    self._learn_code_whitening(of_seed(states, seed), images, parts[:, seed])
                    for seed in range(parts.shape[1])
                ]
            )
        return states, whitener

    def _learn_code_whitening(self, states: Any, images: _Images, parts: np.ndarray) -> Any:
        net = EnergyNet(states, self._sizes(), code_power=self.code_power)
        some_codes = np.concatenate([np.asarray(net(images.take(part))) for part in parts])
        normal = whitening.normalize(jnp.asarray(some_codes))
        components = min(_CODE_COMPONENTS, normal.shape[1])
        return whitening.pca(normal, num_components=components, exponent=self.code_whitening)

    def _template(self) -> Any:
        architecture = self._sizes()
        rules = energy.network_rules(architecture)
        side = self.image_size
        images = jax.ShapeDtypeStruct((1, side, side, self.image_shape_[2]), jnp.float32)

        def learned(images: Array) -> Any:
            states = stack(*rules).init(jax.random.key(0), images)
            if not self.code_whitening:
                return states, None
            codes = EnergyNet(states, architecture, code_power=self.code_power)(images)
            components = min(_CODE_COMPONENTS, codes.shape[1])
            several = jnp.zeros((components, codes.shape[1]))
            return states, whitening.pca(several, num_components=components, exponent=self.code_whitening)

        return jax.eval_shape(learned, images)

    def _encoder(self, learned: Any) -> Callable[[Array], Array]:
        states, whitener = learned
        return EnergyNet(states, self._sizes(), code_power=self.code_power, whitening=whitener)

    def first_kernels(self) -> np.ndarray:
        """Directions of the first layer's subspaces, `[num, kernel_size, kernel_size, channels]`."""
        check_is_fitted(self)
        size = self._sizes().layers[0].kernel_size
        bases = self.learned_[0][1].bases
        return np.asarray(bases).reshape(-1, size, size, self.image_shape_[2])


def _least_side(architecture: energy.EnergyArchitecture) -> int:
    """Of images whose last maps can still be cut into quadrants."""
    side = 2
    for layer in reversed(architecture.layers):
        side += layer.kernel_size - 1 - 2 * layer.padding
    return max(side, architecture.zca_kernel_size)


@partial(jax.jit, static_argnums=0)
def _learn_whitening(architecture: energy.EnergyArchitecture, images: Array) -> Any:
    rule = energy.network_rules(architecture)[0]
    return over_seeds(lambda own: rule.init(jax.random.key(0), own))(images)


@partial(jax.jit, static_argnums=(0, 1))
def _begin_layer(
    architecture: energy.EnergyArchitecture, index: int, keys: Array, below: tuple[Any, ...], images: Array
) -> Any:
    rules = energy.network_rules(architecture)

    def one(key: Array, below: tuple[Any, ...], images: Array) -> Any:
        return rules[index].init(key, stack(*rules).encode(below, images))

    return over_seeds(one)(keys, below, images)


@partial(jax.jit, static_argnums=(0, 1))
def _energy_step(
    architecture: energy.EnergyArchitecture,
    index: int,
    state: Any,
    below: tuple[Any, ...],
    images: Array,
    warmup: bool | Array,
) -> Any:
    rules: Sequence[LearningRule] = energy.network_rules(architecture)

    def one(state: Any, below: tuple[Any, ...], images: Array) -> Any:
        return rules[index].update(state, stack(*rules).encode(below, images), warmup=warmup)[0]

    return over_seeds(one)(state, below, images)


class ACOLClustering(_ImageClustering):
    """Pseudo supervision with an auto-clustering output layer, then k-means on F (paper 002).

    A convolutional network learns to tell how an image was flipped or turned; Graph-based Activity
    Regularization spreads the images over several nodes for each way. For images whose classes look different
    from each other however they are turned.

    Args:
      n_clusters: clusters.
      image_shape: height, width and perhaps channels of flattened images; by default the smallest square.
      image_size: side to which images are resized.
      nodes_per_parent: k_s, softmax nodes for each way.
      num_features: size of F.
      num_filters: of the first two convolutions; the next have twice as many.
      batch_size: images in a minibatch.
      max_steps: minibatches, in at most `epochs` passes.
      epochs: passes over the images, in at most `max_steps` minibatches.
      learning_rate: of Adam.
      random_state: an integer for the same result every time.
      verbose: show progress.

    Attributes:
      labels_: int32 `[num_images]`, clusters of the images learned from.
      cluster_centers_: `[n_clusters, num_features]`.

    Example:
      >>> import numpy as np
      >>> from sul_jax.estimators import ACOLClustering
      >>> images = np.random.default_rng(0).random((20, 8, 8))
      >>> model = ACOLClustering(2, image_size=8, num_filters=4, num_features=16, batch_size=10, epochs=1)
      >>> model.fit(images).transform(images).shape
      (20, 16)
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        image_shape: tuple[int, ...] | None = None,
        image_size: int = 16,
        nodes_per_parent: int = 20,
        num_features: int = 2048,
        num_filters: int = 32,
        batch_size: int = 100,
        max_steps: int = 1500,
        epochs: int = 100,
        learning_rate: float = 1e-3,
        random_state: Any = None,
        verbose: bool = False,
    ):
        self.n_clusters = n_clusters
        self.image_shape = image_shape
        self.image_size = image_size
        self.nodes_per_parent = nodes_per_parent
        self.num_features = num_features
        self.num_filters = num_filters
        self.batch_size = batch_size
        self.max_steps = max_steps
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.random_state = random_state
        self.verbose = verbose

    def _network(self, seed: int) -> ACOL:
        return ACOL(
            (self.image_size, self.image_size, self.image_shape_[2]),
            num_parents=len(augment.FLIPS_AND_ROTATIONS),
            nodes_per_parent=self.nodes_per_parent,
            num_features=self.num_features,
            num_filters=self.num_filters,
            rngs=nnx.Rngs(seed),
        )

    def _learn(self, keys: Array, images: _Images) -> Any:
        graph, params, _ = _networks(self, keys)
        loss = partial(_acol_loss, graph)
        return _descend(self, keys, images, loss, params, (), self.learning_rate, _steps(self, images))[0]

    def _template(self) -> Any:
        return _abstract(self)[0]

    def _encoder(self, learned: Any) -> Callable[[Array], Array]:
        return partial(_features, _graph(self._network), learned)

    def first_kernels(self) -> np.ndarray:
        """The first layer's, `[num, 3, 3, channels]`."""
        check_is_fitted(self)
        return _as_images(self.learned_["convolutions"][0]["kernel"])


def _acol_loss(graph: Any, params: Any, statistics: Any, key: Array, images: Array) -> tuple[Array, Any]:
    turn_key, dropout_key = jax.random.split(key)
    ways = len(augment.FLIPS_AND_ROTATIONS)
    turned, parents = augment.random_transformation(turn_key, images)
    logits = nnx.merge(graph, params)(turned, key=dropout_key)
    regularization = gar.gar_loss(logits, num_parents=ways)
    return regularization + gar.parent_loss(logits, parents, num_parents=ways), statistics


class NMCEClustering(_ImageClustering):
    """Neural manifold clustering and embedding: coding rates of two random views (paper 003).

    A small ResNet first learns an embedding by the total coding rate, then embedding and clusters together.

    Args:
      n_clusters: clusters.
      image_shape: height, width and perhaps channels of flattened images; by default the smallest square.
      image_size: side to which images are resized.
      num_filters: of the ResNet's first stage.
      num_features: of the embedding.
      batch_size: images in a minibatch, of which two views are taken.
      max_steps: minibatches, in at most `epochs` passes; the first two thirds learn the embedding.
      epochs: passes over the images, in at most `max_steps` minibatches.
      learning_rate: of Adam.
      eps_squared: squared distortion of the coding rates.
      invariance_weight: weight λ of the views' similarity.
      random_state: an integer for the same result every time.
      verbose: show progress.

    Attributes:
      labels_: int32 `[num_images]`, clusters of the images learned from.
      cluster_centers_: `[n_clusters, num_features]`, means of the embeddings, infinite where a cluster is
        empty. `predict` and `labels_` come from the network's own cluster head, as the method has it, so that
        another centre may be nearer.

    Example:
      >>> import numpy as np
      >>> from sul_jax.estimators import NMCEClustering
      >>> images = np.random.default_rng(0).random((20, 8, 8))
      >>> model = NMCEClustering(2, image_size=8, num_filters=2, num_features=4, batch_size=10, epochs=1)
      >>> model.fit(images).transform(images).shape
      (20, 4)
    """

    learns_clusters = True

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        image_shape: tuple[int, ...] | None = None,
        image_size: int = 28,
        num_filters: int = 16,
        num_features: int = 64,
        batch_size: int = 256,
        max_steps: int = 300,
        epochs: int = 60,
        learning_rate: float = 1e-3,
        eps_squared: float = 0.2,
        invariance_weight: float = 20.0,
        random_state: Any = None,
        verbose: bool = False,
    ):
        self.n_clusters = n_clusters
        self.image_shape = image_shape
        self.image_size = image_size
        self.num_filters = num_filters
        self.num_features = num_features
        self.batch_size = batch_size
        self.max_steps = max_steps
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.eps_squared = eps_squared
        self.invariance_weight = invariance_weight
        self.random_state = random_state
        self.verbose = verbose

    def _network(self, seed: int) -> NMCE:
        rngs = nnx.Rngs(seed)
        backbone = ResNet(
            10,
            channels=self.image_shape_[2],
            num_filters=self.num_filters,
            stem="5x5",
            num_pre_features=None,
            rngs=rngs,
        )
        return NMCE(
            backbone,
            backbone.num_features,
            num_features=self.num_features,
            num_clusters=self.n_clusters,
            rngs=rngs,
        )

    def _learn(self, keys: Array, images: _Images) -> Any:
        graph, params, statistics = _networks(self, keys)
        total = _steps(self, images)
        first = 2 * total // 3
        for clustering, steps in ((False, first), (True, total - first)):
            loss = partial(_nmce_loss, graph, self.eps_squared, self.invariance_weight, clustering)
            keys = _folded(keys, clustering)
            if not steps:  # of a single one
                continue
            params, statistics = _descend(
                self, keys, images, loss, params, statistics, self.learning_rate, steps
            )
        return params, statistics

    def _template(self) -> Any:
        return _abstract(self)

    def _encoder(self, learned: Any) -> Callable[[Array], Array]:
        # Embedding and logits side by side: `_codes` is asked for either.
        return partial(_nmce_outputs, _graph(self._network), learned)

    def first_kernels(self) -> np.ndarray:
        """The stem's, `[num_filters, 5, 5, channels]`."""
        check_is_fitted(self)
        return _as_images(self.learned_[0]["backbone"]["stem"]["kernel"])

    def _shown(self, codes: np.ndarray) -> np.ndarray:
        return codes[:, : self.num_features]

    def _labels(self, codes: np.ndarray, distances: np.ndarray) -> np.ndarray:
        """The cluster head's choice."""
        return np.argmax(codes[:, self.num_features :], axis=1).astype(np.int32)

    def _cluster(self, codes: np.ndarray) -> None:
        self.labels_ = self._labels(codes, np.empty(0))
        one_hot = (self.labels_ == np.arange(self.n_clusters)[:, None]).astype(np.float32)
        sums = one_hot @ self._shown(codes)
        number = one_hot.sum(axis=1, keepdims=True)
        self.cluster_centers_ = np.where(number > 0, sums / np.maximum(number, 1), np.float32(np.inf))


def _nmce_loss(
    graph: Any,
    eps_squared: float,
    invariance_weight: float,
    clustering: bool,
    params: Any,
    statistics: Any,
    key: Array,
    images: Array,
) -> tuple[Array, Any]:
    view_keys, member_key = jax.random.split(key), jax.random.fold_in(key, 2)
    both = jnp.concatenate([_view(k, images) for k in view_keys])
    net = nnx.merge(graph, params, statistics, copy=True)
    net.train()
    features, logits = (v.reshape(2, len(images), -1) for v in net(both))
    common: dict[str, Any] = {"eps_squared": eps_squared, "invariance_weight": invariance_weight}
    if clustering:
        memberships = coding_rate.gumbel_softmax(member_key, logits)
        loss = coding_rate.nmce_loss(features, memberships, **common)
    else:
        loss = coding_rate.tcr_loss(features, average_views=False, **common)
    return loss, nnx.state(net, nnx.BatchStat)


def _view(key: Array, images: Array) -> Array:
    """A random crop; in colour, flipped and with changed colours as well."""
    if images.shape[-1] == 3:
        return augment.random_view(key, images, scale=(0.5, 1.0))
    keys = jax.random.split(key, 4)
    changed = augment.random_resized_crop(keys[0], images, scale=(0.5, 1.0))
    return augment.gaussian_noise(keys[1], changed, scale=0.05)


@partial(jax.jit, static_argnums=0)
def _nmce_outputs(graph: Any, learned: Any, images: Array) -> Array:
    net = nnx.merge(graph, *learned)
    net.eval()
    return jnp.concatenate(net(images), axis=1)


class DeepClustering(_ImageClustering):
    """DeepCluster: a LeNet-5 learns its own features' clusters as classes, again and again (paper 004).

    Args:
      n_clusters: clusters, of the pseudo-labels and of the last k-means.
      image_shape: height, width and perhaps channels of flattened images; by default the smallest square.
      cycles: times the features are clustered, each followed by learning the clusters.
      steps_per_cycle: minibatches of a cycle, at most one pass over the images.
      batch_size: images in a minibatch.
      learning_rate: of the descent with momentum 0.9.
      random_state: an integer for the same result every time.
      verbose: show progress.

    Attributes:
      labels_: int32 `[num_images]`, clusters of the images learned from.
      cluster_centers_: `[n_clusters, num_features]`.

    Example:
      >>> import numpy as np
      >>> from sul_jax.estimators import DeepClustering
      >>> images = np.random.default_rng(0).random((20, 8, 8))
      >>> DeepClustering(2, cycles=1, batch_size=10).fit(images).transform(images).shape
      (20, 84)
    """

    image_size = 32  # LeNet-5's
    learns_clusters = True

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        image_shape: tuple[int, ...] | None = None,
        cycles: int = 10,
        steps_per_cycle: int = 100,
        batch_size: int = 128,
        learning_rate: float = 0.02,
        random_state: Any = None,
        verbose: bool = False,
    ):
        self.n_clusters = n_clusters
        self.image_shape = image_shape
        self.cycles = cycles
        self.steps_per_cycle = steps_per_cycle
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state
        self.verbose = verbose

    def _network(self, seed: int) -> LeNet5:
        return LeNet5(channels=self.image_shape_[2], rngs=nnx.Rngs(seed))

    def _learn(self, keys: Array, images: _Images) -> Any:
        graph, params, statistics = _networks(self, keys)
        number, clusters, seeds = len(images.rows), self.n_clusters, range(len(keys))
        num_features = nnx.merge(graph, *of_seed((params, statistics), 0)).num_features
        steps = max(1, min(self.steps_per_cycle, number // self.batch_size))
        for cycle in self._progress(range(self.cycles), "cycle"):
            heads, orders, labels = [], [], []
            for seed in seeds:
                own = jax.random.split(jax.random.fold_in(keys[seed], cycle), 4)
                codes = self._codes(images.rows, of_seed((params, statistics), seed))
                features = _preprocess(jnp.asarray(codes))
                found = _pseudo_labels(own[0], features, num_clusters=clusters)
                order = _balanced_indices(
                    own[1], found, num_clusters=clusters, num_samples=steps * self.batch_size
                )
                orders.append(np.asarray(order).reshape(steps, self.batch_size))
                labels.append(np.asarray(found))
                kernel = 0.01 * jax.random.normal(own[2], (num_features, clusters))
                heads.append((kernel, jnp.zeros(clusters)))
            weights, memory, classes = (params, stacked(heads)), None, np.stack(labels)
            for indices in np.stack(orders, axis=1):
                chosen = np.take_along_axis(classes, indices, axis=1)
                weights, statistics, memory = _classify(
                    graph, weights, statistics, memory, images.take(indices), chosen, self.learning_rate
                )
            params = weights[0]
        return params, statistics

    def _template(self) -> Any:
        return _abstract(self)

    def _encoder(self, learned: Any) -> Callable[[Array], Array]:
        return partial(_evaluated, _graph(self._network), learned)

    def first_kernels(self) -> np.ndarray:
        """The first layer's, `[6, 5, 5, channels]`."""
        check_is_fitted(self)
        return _as_images(self.learned_[0]["convolutions"][0]["kernel"])


@partial(jax.jit, static_argnums=0)
def _classify(
    graph: Any, weights: Any, statistics: Any, memory: Any, images: Array, labels: Array, rate: float
) -> tuple[Any, Any, Any]:
    optimizer = optax.sgd(rate, momentum=0.9)

    def loss(weights: Any, statistics: Any, images: Array, labels: Array) -> tuple[Array, Any]:
        params, (kernel, bias) = weights
        net = nnx.merge(graph, params, statistics, copy=True)
        net.train()
        logits = jax.nn.relu(net(images)) @ kernel + bias
        value = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        return value, nnx.state(net, nnx.BatchStat)

    def one(weights: Any, statistics: Any, memory: Any, images: Array, labels: Array) -> tuple[Any, Any, Any]:
        gradients, statistics = jax.grad(loss, has_aux=True)(weights, statistics, images, labels)
        memory = optimizer.init(weights) if memory is None else memory
        changes, memory = optimizer.update(gradients, memory)
        return optax.apply_updates(weights, changes), statistics, memory

    found: tuple[Any, Any, Any] = over_seeds(one)(weights, statistics, memory, images, labels)
    return found


@partial(jax.jit, static_argnums=0)
def _evaluated(graph: Any, learned: Any, images: Array) -> Array:
    net = nnx.merge(graph, *learned)
    net.eval()
    return net(images)


@partial(jax.jit, static_argnums=0)
def _features(graph: Any, params: Any, images: Array) -> Array:
    return nnx.merge(graph, params).features(images)


def _as_images(kernel: nnx.Variable[Any]) -> np.ndarray:
    """A convolution's kernel with its filters first."""
    return np.moveaxis(np.asarray(kernel[...]), -1, 0)


def _graph(network: Callable[[int], nnx.Module]) -> Any:
    """The structure alone; no weights are made."""
    return nnx.graphdef(nnx.eval_shape(lambda: network(0)))


def _networks(estimator: Any, keys: Array) -> tuple[Any, Any, Any]:
    """Untrained networks: their structure, parameters and statistics."""
    parts: list[Any] = [
        nnx.split(
            estimator._network(int(jax.random.randint(key, (), 0, 2**31 - 1))), nnx.Param, nnx.BatchStat
        )  # type: ignore[misc]
        for key in keys
    ]
    return parts[0][0], stacked([p[1] for p in parts]), stacked([p[2] for p in parts])


def _abstract(estimator: Any) -> tuple[Any, Any]:
    """Parameters and statistics of an estimator's network, without values."""
    parts: Any = nnx.split(nnx.eval_shape(lambda: estimator._network(0)), nnx.Param, nnx.BatchStat, ...)  # type: ignore[misc]
    return parts[1], parts[2]


def _folded(keys: Array, number: int) -> Array:
    return jnp.stack([jax.random.fold_in(key, number) for key in keys])


def _steps(estimator: Any, images: _Images) -> int:
    """Of the estimator's epochs, but at most its `max_steps`."""
    steps: int = min(estimator.max_steps, estimator.epochs * -(-len(images.rows) // estimator.batch_size))
    return steps


def _descend(
    estimator: Any,
    keys: Array,
    images: _Images,
    loss: "partial[tuple[Array, Any]]",
    params: Any,
    statistics: Any,
    learning_rate: float,
    steps: int,
) -> tuple[Any, Any]:
    """Adam on minibatches of images."""
    number, batch_size = len(images.rows), estimator.batch_size
    memory = jax.vmap(optax.adam(learning_rate).init)(params)
    chosen = _minibatches(_folded(keys, 0), number, batch_size, steps)
    keys = _folded(keys, 1)
    for step, indices in enumerate(estimator._progress(chosen, "learning")):
        params, statistics, memory = _adam_step(
            loss.func, loss.args, params, statistics, memory, keys, step, images.take(indices), learning_rate
        )
    return params, statistics


@partial(jax.jit, static_argnums=(0, 1))
def _adam_step(
    loss: Callable[..., tuple[Array, Any]],
    bound: tuple[Any, ...],
    params: Any,
    statistics: Any,
    memory: Any,
    keys: Array,
    step: int | Array,
    images: Array,
    learning_rate: float,
) -> tuple[Any, Any, Any]:
    optimizer = optax.adam(learning_rate)
    objective = partial(loss, *bound)

    def one(params: Any, statistics: Any, memory: Any, key: Array, images: Array) -> tuple[Any, Any, Any]:
        own = jax.random.fold_in(key, step)
        gradients, statistics = jax.grad(objective, has_aux=True)(params, statistics, own, images)
        changes, memory = optimizer.update(gradients, memory)
        return optax.apply_updates(params, changes), statistics, memory

    found: tuple[Any, Any, Any] = over_seeds(one)(params, statistics, memory, keys, images)
    return found
