"""`clusters.csv`: the cluster of every image, and where in it the image lies."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sul_jax._files import atomic_path

HEADER = ("file", "cluster", "distance", "margin")
# What spreadsheets take for the beginning of a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Places(NamedTuple):
    """Where images lie in their clusters.

    Attributes:
      distances: `[num_images]`, to the centre of their own.
      margins: `[num_images]`, how much farther the next centre is.
    """

    distances: np.ndarray
    margins: np.ndarray


def places(labels: np.ndarray, distances: np.ndarray) -> Places:
    """From distances to all centres.

    Args:
      labels: `[num_images]`, clusters.
      distances: `[num_images, num_clusters]`; margins to no other centre are infinite.

    Example:
      >>> import numpy as np
      >>> from sul_jax.cli.listing import places
      >>> places(np.array([1]), np.array([[3.0, 1.0]])).margins.tolist()
      [2.0]
    """
    rows = np.arange(len(labels))
    own, others = distances[rows, labels], distances.copy()
    others[rows, labels] = np.inf
    return Places(own, others.min(axis=1) - own)


def write_clusters(path: Path, names: Sequence[str], labels: np.ndarray, places: Places) -> None:
    """Writes file, cluster, distance to its centre, and margin: how much farther the next centre is.

    Args:
      path: the file.
      names: of the images; one that begins like a formula gets an apostrophe before it.
      labels: `[num_images]`.
      places: of the images.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> import numpy as np
      >>> from sul_jax.cli.listing import Places, write_clusters
      >>> file = Path(tempfile.mkdtemp()) / "clusters.csv"
      >>> write_clusters(file, ["=1.png"], np.array([1]), Places(np.array([1.0]), np.array([2.0])))
      >>> print(file.read_text(encoding="utf-8"))
      file,cluster,distance,margin
      '=1.png,1,1,2
      <BLANKLINE>
    """
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for name, label, distance, margin in zip(names, labels, *places, strict=True):
            writer.writerow([cell(name), int(label), f"{distance:.6g}", f"{margin:.6g}"])


def cell(name: str) -> str:
    """A name as a cell that no spreadsheet takes for a formula.

    Args:
      name: of an image.
    """
    return f"'{name}" if name.startswith(_FORMULA) else name
