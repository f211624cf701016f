"""Pictures sorted into a folder for each cluster."""

import os
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sul_jax._files import read_json, write_json
from sul_jax.cli.images import Images
from sul_jax.cli.options import ConfigError

SORTED = "sorted.json"
"""In a run's folder: where its pictures have been sorted to."""


def check_place(folder: Path, images: Path, workdir: Path) -> None:
    """Raises `ConfigError` where sorted pictures would be taken for others, or for a run's files.

    Args:
      folder: to be made.
      images: of the pictures.
      workdir: of the run.
    """
    target = folder.resolve()
    if target.is_relative_to(images.resolve()):
        raise ConfigError(f"copy_to={str(folder)!r} is inside the folder of images; give another folder")
    if target == workdir.resolve():
        raise ConfigError(f"copy_to={str(folder)!r} is the workdir; give another folder")


def check_new(folder: Path) -> None:
    """Raises `ConfigError` where there is something already.

    Args:
      folder: to be made.
    """
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise ConfigError(f"copy_to={str(folder)!r} exists already; give a new folder")


def is_sorted(folder: Path, workdir: Path) -> bool:
    """Whether the run has sorted its pictures into the folder.

    Args:
      folder: that may be there.
      workdir: of the run.
    """
    try:
        return folder.is_dir() and read_json(workdir / SORTED) == {"copy_to": str(folder.resolve())}
    except (OSError, ValueError):
        return False


def sort_into(folder: Path, images: Images, labels: np.ndarray, workdir: Path) -> None:
    """Links to the pictures, or copies where links cannot be made, one folder a cluster.

    Args:
      folder: new; it appears when all is in it.
      images: with their files.
      labels: `[num_images]`, clusters.
      workdir: of the run, which notes where they are.

    Raises:
      OSError: a picture that cannot be copied.
    """
    width = len(str(int(labels.max())))
    temporary = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        temporary.mkdir(parents=True)
        for file, label in zip(tqdm(images.files, desc="sorting", unit="file"), labels, strict=True):
            inside = temporary / f"{label:0{width}}"
            inside.mkdir(parents=True, exist_ok=True)
            target, number = inside / file.name, 2
            while target.is_symlink() or target.exists():  # one of another folder
                target, number = inside / f"{file.stem}-{number}{file.suffix}", number + 1
            try:
                os.symlink(file.resolve(), target)
            except (OSError, NotImplementedError):
                shutil.copy2(file, target)
        if folder.is_dir():  # empty
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    write_json(workdir / SORTED, {"copy_to": str(folder.resolve())})
