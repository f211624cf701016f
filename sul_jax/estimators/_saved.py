"""Estimators on disk: Orbax folders of arrays, and what they were made with in words."""

import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sul_jax import energy
from sul_jax.nn import _saved

# What an estimator knows of the images it was fitted to.
OF_IMAGES = ("n_features_in_", "feature_names_in_", "image_shape_", "is_uint8_", "scale_")
# Of vectors, and how learning ended.
_OTHERS = ("offset_", "n_iter_", "inertia_", "energy_", "rate_reduction_")


def save(model: Any, path: str | Path) -> None:
    """Writes a fitted estimator; see `Estimator.save`."""
    about = {name: _plain(getattr(model, name)) for name in (*OF_IMAGES, *_OTHERS) if hasattr(model, name)}
    options = {name: _plain(value) for name, value in model.get_params().items()}
    written = {"options": options, "images": about, "seed": model.seed_}
    _saved.write(path, type(model).__name__, model._arrays(), written)


def load(path: str | Path) -> Any:
    """A fitted estimator as its `save` wrote it.

    Args:
      path: the folder.

    Raises:
      ValueError: no folder of an estimator, or not as it was written.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> from sul_jax import estimators
      >>> images = np.random.default_rng(0).random((10, 4, 4))
      >>> model = estimators.PixelClustering(2, random_state=0).fit(images)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     model.save(f"{folder}/model")
      ...     same = estimators.load(f"{folder}/model")
      >>> bool((same.predict(images) == model.labels_).all())
      True
    """
    from sul_jax import estimators

    about, stored = _saved.read(path, *(name for name in estimators.__all__ if name[0].isupper()))
    options = {name: _from_plain(value) for name, value in about["options"].items()}
    model = getattr(estimators, about["module"])(**options)
    for name, value in about["images"].items():
        read = _ARRAYS.get(name, _from_plain)
        setattr(model, name, read(value))
    model.seed_ = about["seed"]
    model._restore({name: np.asarray(value) for name, value in stored.items()}, path)
    return model


def keep(model: Any, folder: Path, rows: np.ndarray) -> None:
    """Writes what an estimator has learned before it has clustered."""
    # Orbax stores no empty trees, and pixels are all that there is to learn of them.
    arrays = leaves(model) | {"seed": np.array(model.seed_)}
    _saved.write(folder, _kind(model), arrays, _identity(model, rows))


def kept(model: Any, folder: Path, rows: np.ndarray) -> Any:
    """What `keep` wrote of the same estimator and images.

    Raises:
      ValueError: it was another estimator, or learned from other images.
    """
    about, stored = _saved.read(folder, _kind(model))
    for name, value in _identity(model, rows).items():
        if about.get(name) != value:
            raise ValueError(
                f"keep={str(folder)!r} holds what was learned with {name}={about.get(name)!r}, not "
                f"{value!r}; remove it or name another folder"
            )
    arrays = {name: np.asarray(value) for name, value in stored.items()}
    del arrays["seed"]
    return tree(model, arrays, folder)


def _kind(model: Any) -> str:
    return f"learned {type(model).__name__}"


def _identity(model: Any, rows: np.ndarray) -> dict[str, Any]:
    """Tells a fit apart; not by its clusters where they are no part of the learning."""
    others = {"verbose", "random_state"} | (set() if model.learns_clusters else {"n_clusters"})
    options = {name: _plain(value) for name, value in model.get_params().items() if name not in others}
    images = {"shape": list(rows.shape), "crc32": zlib.crc32(np.ascontiguousarray(rows).tobytes())}
    return {"options": options, "images": images, "seed": model.seed_}


def leaves(model: Any) -> dict[str, Any]:
    """Arrays of what a network learned, by their places."""
    return {f"{place:04d}": leaf for place, leaf in enumerate(jax.tree.leaves(model.learned_))}


def tree(model: Any, arrays: dict[str, np.ndarray], path: str | Path) -> Any:
    """What a network learned from `leaves`."""
    places, structure = jax.tree.flatten(model._template())
    if len(places) != len(arrays):
        raise ValueError(
            f"path={str(path)!r} was written by another version of sul_jax: load it there, or fit again"
        )
    return jax.tree.unflatten(structure, [arrays[name] for name in sorted(arrays)])


def _array(kind: Any) -> Any:
    return lambda value: None if value is None else np.array(value, kind)


# Of what JSON holds as lists: names, and numbers that float32 would round.
_ARRAYS = {"feature_names_in_": _array(object), "offset_": _array(np.float64)}


def _plain(value: Any) -> Any:
    """For JSON."""
    if isinstance(value, energy.EnergyArchitecture):
        return {"architecture": value.to_dict()}
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, bool | int | float | str | list | None) else repr(value)


def _from_plain(value: Any) -> Any:
    if isinstance(value, dict):
        return energy.EnergyArchitecture.from_dict(value["architecture"])
    return tuple(value) if isinstance(value, list) else value
