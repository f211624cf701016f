"""Checkpoints of modules: Orbax folders that name the module and its sizes."""

import os
from pathlib import Path
from typing import Any, Self

import jax
from flax import nnx

from sul_jax import _checkpoint


class Saved(nnx.Module):
    """A module that is saved with the arguments it was built with.

    Attributes:
      arguments: names and values, but for `rngs`.
    """

    arguments: tuple[tuple[str, Any], ...]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an Orbax checkpoint folder; an existing one is replaced.

        Args:
          path: the folder, new or an earlier checkpoint of the same kind of module.

        Raises:
          ValueError: there is something else at `path`.
          OSError: the folder cannot be written.
        """
        write(path, type(self).__name__, _named(nnx.state(self)), dict(self.arguments))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Builds what `save` wrote, with `eval()` in effect.

        Raises:
          ValueError: no such checkpoint, one of another module, or not as it was written.
        """
        sizes, arrays = read(path, cls.__name__)
        arguments = {name: value for name, value in sizes.items() if name != "module"}
        network = nnx.eval_shape(lambda: cls._build(arguments))  # without drawing what is replaced below
        state = nnx.state(network)
        if arrays.keys() != (names := _named(state)).keys():
            raise ValueError(
                f"path={os.fspath(path)!r} was written by another version of sul_jax: load it there, or "
                "train again"
            )
        leaves = [arrays[name] for name in names]
        nnx.update(network, jax.tree.unflatten(jax.tree.structure(state), leaves))
        network.eval()  # type: ignore[no-untyped-call]
        return network

    @classmethod
    def _build(cls, arguments: dict[str, Any]) -> Self:
        return cls(**arguments, rngs=nnx.Rngs(0))  # type: ignore[call-arg]  # of the subclasses


def _named(state: Any) -> dict[str, Any]:
    """The arrays of a state by their places, in its order."""
    leaves = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(place, simple=True, separator="."): leaf for place, leaf in leaves}


def write(path: str | os.PathLike[str], module: str, arrays: Any, sizes: dict[str, Any]) -> None:
    """Writes a checkpoint folder; an empty folder or one of the same module is replaced.

    Raises:
      ValueError: there is something else at `path`.
      OSError: the folder cannot be written.
    """
    target = _checkpoint.local(path)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        _check_module(target, _checkpoint.about(target), module)  # never replace what is not ours
    _checkpoint.save(target, arrays, {"module": module, **sizes})


def read(path: str | os.PathLike[str], *modules: str) -> tuple[dict[str, Any], Any]:
    """Sizes and arrays of the checkpoint of one of some modules; its name is among the sizes.

    Raises:
      ValueError: no such checkpoint, one of another module, or not as it was written.
    """
    folder = _checkpoint.local(path)
    about, arrays = _checkpoint.read(folder)
    _check_module(folder, about, *modules)
    return about, arrays


def _check_module(folder: Path, about: dict[str, Any], *modules: str) -> None:
    if about.get("module") not in modules:
        words = " or ".join(f"{'an' if name[0] in 'AEIOU' else 'a'} {name}" for name in modules)
        raise ValueError(f"path={str(folder)!r} is not a checkpoint of {words}")
