"""Checkpoints of modules: Orbax folders that name the module and its sizes."""

import os
import shutil
from pathlib import Path
from typing import Any, Self

import jax
from flax import nnx
from orbax.checkpoint import v1 as ocp


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
        """
        write(path, type(self).__name__, _named(nnx.state(self)), dict(self.arguments))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Builds what `save` wrote, with `eval()` in effect.

        Raises:
          ValueError: no such checkpoint, or one of another module.
        """
        folder = Path(path).absolute()
        stored, sizes = metadata(folder, cls.__name__)
        network = cls._build({name: value for name, value in sizes.items() if name != "module"})
        state = nnx.state(network)
        found = arrays(folder, stored)
        if found.keys() != (names := _named(state)).keys():
            raise ValueError(f"path={str(folder)!r} was written by another version: its arrays differ")
        leaves = [found[name] for name in names]
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
    """Writes a checkpoint folder; an existing one of the same module is replaced.

    Raises:
      ValueError: there is something else at `path`.
    """
    target = Path(path).absolute()
    if target.exists():
        metadata(target, module)  # never replace what is not ours
    # Complete under another name first: there is a whole checkpoint on disk at every moment.
    new, old = (target.with_name(f".{target.name}.{word}") for word in ("new", "old"))
    ocp.save(new, arrays, overwrite=True, custom_metadata={"module": module, **sizes})
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def metadata(folder: Path, *modules: str) -> tuple[Any, dict[str, Any]]:
    """Orbax's description of a checkpoint of one of some modules, and our own.

    Raises:
      ValueError: no such checkpoint, or one of another module.
    """
    if not folder.is_dir():
        raise ValueError(f"path={str(folder)!r} is not a folder")
    try:
        stored = ocp.metadata(folder)
    except Exception as error:  # Orbax raises several types for a folder that is not its own
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"path={str(folder)!r} is not a checkpoint: {first}") from None
    found = stored.custom_metadata
    if not isinstance(found, dict) or found.get("module") not in modules:
        names = " or ".join(modules)
        article = "an" if names[0] in "AEIOU" else "a"
        raise ValueError(f"path={str(folder)!r} is not a checkpoint of {article} {names}")
    return stored, found


def arrays(folder: Path, stored: Any) -> Any:
    """The arrays of a checkpoint, on the first device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return ocp.load(
        folder,
        jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), stored.metadata
        ),
    )
