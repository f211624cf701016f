"""Pictures sorted into a folder for each cluster."""

import os
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sul_jax.cli.images import Images
from sul_jax.cli.options import ConfigError


def check_new(folder: Path) -> None:
    """Raises `ConfigError` where there is something already.

    Args:
      folder: to be made.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"copy_to={str(folder)!r} is there already; give a new folder")


def sort_into(folder: Path, images: Images, labels: np.ndarray) -> None:
    """Links to the pictures, or copies where links cannot be made, one folder a cluster.

    Args:
      folder: made here.
      images: with their files.
      labels: `[num_images]`, clusters.

    Raises:
      OSError: a picture that cannot be copied.
    """
    width = len(str(int(labels.max())))
    for file, label in zip(tqdm(images.files, desc="sorting", unit="file"), labels, strict=True):
        inside = folder / f"{label:0{width}}"
        inside.mkdir(parents=True, exist_ok=True)
        target, number = inside / file.name, 2
        while target.is_symlink() or target.exists():  # one of another folder
            target, number = inside / f"{file.stem}-{number}{file.suffix}", number + 1
        try:
            os.symlink(file.resolve(), target)
        except (OSError, NotImplementedError):
            shutil.copy2(file, target)
