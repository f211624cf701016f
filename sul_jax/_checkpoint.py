"""Orbax folders of arrays: written whole or not at all, and read only as they were written."""

import glob
import os
import shutil
import signal
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from sul_jax._files import first_line, read_json, write_json
from sul_jax._parallel import wait_for_all

_CHECKSUMS = "checksums.json"
# What Orbax needs beside the arrays themselves.
_SPARE_BYTES = 2**20
_NO_SPACE = "No space left on device"


def local(path: str | os.PathLike[str]) -> Path:
    """The folder that a path names, behind links.

    Raises:
      ValueError: it is on no local disk.
    """
    if "://" in os.fspath(path):
        raise ValueError(f"path={os.fspath(path)!r} is not accepted: it must be a folder on a local disk")
    return Path(path).resolve()


def save(folder: Path, tree: Any, about: dict[str, Any] | None = None) -> None:
    """Writes a tree of arrays; whatever is in the folder is replaced.

    An interruption is raised when all is written: Orbax's threads would go on, and fail, without us. Of
    several processes all must call it, with the same folder; the first one writes.

    Args:
      folder: absolute; it appears when it is complete.
      tree: nested dicts and lists of arrays.
      about: what JSON can hold, stored beside them.

    Raises:
      OSError: the folder cannot be written.
    """
    with _uninterrupted():
        _save(folder, tree, about)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Keeps Ctrl-C until the block has ended."""
    earlier = signal.getsignal(signal.SIGINT)
    # Elsewhere Python raises none, and a handler of another language cannot be put back.
    if threading.current_thread() is not threading.main_thread() or earlier is None:
        yield
        return
    pending: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: pending.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)
        if pending:
            signal.raise_signal(signal.SIGINT)


def _save(folder: Path, tree: Any, about: dict[str, Any] | None) -> None:
    new, old = (folder.with_name(f".{folder.name}.{word}") for word in ("new", "old"))
    first = jax.process_index() == 0
    tree = jax.tree.map(_storable, tree)
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) + _SPARE_BYTES
    try:
        if first:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _clear(new)  # of a process that was killed
            # Orbax's own words for a full disk are hundreds of lines, some of them printed at exit.
            if (free := shutil.disk_usage(folder.parent).free) < needed:
                raise OSError(
                    f"{needed / 2**20:.0f} MiB are needed, but the disk has {free / 2**20:.0f} MiB left"
                )
        wait_for_all()
        ocp.save(new, tree, custom_metadata=about)
        if first:
            write_json(new / _CHECKSUMS, _checksums(new))
    except Exception as error:  # of Orbax and TensorStore, of several types
        _clear(new)
        raise OSError(f"{str(folder)!r} cannot be written: {_in_a_line(error)}") from None
    if first:
        # There is a whole checkpoint on disk at every moment.
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    wait_for_all()


def _storable(leaf: Any) -> Any:
    """Numbers become arrays, which Orbax reads back as what they were; so does what one process holds."""
    if isinstance(leaf, jax.Array) and (jax.process_count() == 1 or not leaf.is_fully_addressable):
        return leaf
    return np.asarray(leaf)


def _clear(new: Path) -> None:
    """Removes what was being written, under our name or Orbax's."""
    for part in new.parent.glob(glob.escape(new.name) + "*"):
        shutil.rmtree(part, ignore_errors=True)


def is_complete(folder: Path) -> bool:
    """Whether `save` has written it."""
    return (folder / _CHECKSUMS).is_file()


def about(folder: Path) -> dict[str, Any]:
    """What was stored beside the arrays.

    Raises:
      ValueError: no checkpoint, or not as it was written.
    """
    return dict(_metadata(folder).custom_metadata or {})


def load(folder: Path) -> Any:
    """The tree of arrays, on this process's first device.

    Raises:
      ValueError: no checkpoint, or not as it was written.
    """
    return read(folder)[1]


def read(folder: Path) -> tuple[dict[str, Any], Any]:
    """`about` and `load` at once: the folder's checksums are taken once."""
    stored = _metadata(folder)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        stored.metadata,
    )
    return dict(stored.custom_metadata or {}), ocp.load(folder, like)


class Checkpoints:
    """Checkpoints of a training run; a new one is complete before the old one goes."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()

    def newest(self) -> tuple[tuple[int, ...], Any] | None:
        """Position and tree of the last complete checkpoint, as nested dicts and lists of arrays."""
        stored = self.folder.iterdir() if self.folder.exists() else ()
        complete = [p for p in stored if is_complete(p) and not p.name.startswith(".")]
        if not complete:
            return None
        path = max(complete)
        return tuple(int(part) for part in path.name.split("-")), load(path)

    def save(self, position: tuple[int, ...], tree: Any) -> None:
        """Writes a tree of arrays under a position that grows, such as (layer, step)."""
        new = self.folder / "-".join(f"{number:06d}" for number in position)
        save(new, tree)
        for path in self.folder.iterdir():  # what a killed run was writing goes too
            if path != new:
                shutil.rmtree(path)


def _metadata(folder: Path) -> Any:
    """Orbax's description; it is asked of no folder that is not whole, where it fails in many ways."""
    if not folder.exists() and is_complete(old := folder.with_name(f".{folder.name}.old")):
        old.rename(folder)  # `_save` was killed between its two renames
    if not folder.is_dir():
        raise ValueError(f"path={str(folder)!r} is not a folder")
    if not is_complete(folder):
        raise ValueError(f"path={str(folder)!r} is not a checkpoint: it has no {_CHECKSUMS}")
    written, there = read_json(folder / _CHECKSUMS), _checksums(folder)
    if damaged := sorted(name for name in written if written[name] != there.get(name)):
        raise ValueError(
            f"path={str(folder)!r} is damaged: {damaged[0]!r} is changed or missing; remove the folder"
        )
    return ocp.metadata(folder)


def _checksums(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _CHECKSUMS)
    return {path.relative_to(folder).as_posix(): zlib.crc32(path.read_bytes()) for path in files}


def _in_a_line(error: Exception) -> str:
    if _NO_SPACE in str(error):  # at the end of a line of paths
        return _NO_SPACE
    return first_line(error)
