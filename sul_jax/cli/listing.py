"""`clusters.csv`: the cluster of every image."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sul_jax._files import atomic_path

HEADER = ("file", "cluster", "distance", "margin")
# What spreadsheets take for the beginning of a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_clusters(path: Path, names: Sequence[str], labels: np.ndarray, distances: np.ndarray) -> None:
    """Writes file, cluster, distance to its centre, and margin: how much farther the next centre is.

    Args:
      path: the file.
      names: of the images; one that begins like a formula gets an apostrophe before it.
      labels: `[num_images]`.
      distances: `[num_images, num_clusters]`, to the centres.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> import numpy as np
      >>> from sul_jax.cli.listing import write_clusters
      >>> file = Path(tempfile.mkdtemp()) / "clusters.csv"
      >>> write_clusters(file, ["=1.png"], np.array([1]), np.array([[3.0, 1.0]]))
      >>> print(file.read_text(encoding="utf-8"))
      file,cluster,distance,margin
      '=1.png,1,1,2
      <BLANKLINE>
    """
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for name, label, row in zip(names, labels, distances, strict=True):
            others = np.delete(row, label)
            margin = others.min() - row[label] if others.size else np.inf
            cell = f"'{name}" if name.startswith(_FORMULA) else name
            writer.writerow([cell, int(label), f"{row[label]:.6g}", f"{margin:.6g}"])
