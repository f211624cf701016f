"""Pairs of images that are nearly the same: what a data set has twice."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sul_jax._files import atomic_path
from sul_jax.cli.listing import cell

# Images up to which all pairs of a cluster are compared, and rows at a time.
MOST, _BLOCK = 50_000, 1024
# Cosine from which on a pair is listed, and pairs at most.
_LEAST, LISTED = 0.98, 1000


class Pair(NamedTuple):
    """Two images of one cluster.

    Attributes:
      first: the one that comes first.
      second: the other.
      cosine: of their codes, less the codes' mean.
    """

    first: int
    second: int
    cosine: float


def near_duplicates(codes: np.ndarray, labels: np.ndarray) -> list[Pair]:
    """The nearest pairs within clusters, the nearest first.

    Args:
      codes: `[num_images, num_codes]`, of at most `MOST` images.
      labels: `[num_images]`, clusters.

    Example:
      >>> import numpy as np
      >>> from sul_jax.cli.duplicates import near_duplicates
      >>> codes = np.array([[3.0, 0.0], [0.0, 3.0], [-3.0, -3.0], [3.0, 0.01]])
      >>> [pair[:2] for pair in near_duplicates(codes, np.zeros(4, int))]
      [(0, 3)]
    """
    centred = codes - codes.mean(axis=0, dtype=np.float64).astype(codes.dtype)
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    # What lies at the mean itself has no direction there.
    unit = centred / np.where(norms > 1e-6 * max(float(norms.max()), 1e-30), norms, np.inf)
    pairs: list[Pair] = []
    for k in np.unique(labels):
        members = np.flatnonzero(labels == k)
        own = unit[members]
        for start in range(0, len(members), _BLOCK):
            cosines = np.triu(own[start : start + _BLOCK] @ own[start:].T, 1)
            rows, columns = np.nonzero(cosines >= _LEAST)
            nearest = np.argsort(-cosines[rows, columns])[:LISTED]
            for row, column in zip(rows[nearest], columns[nearest], strict=True):
                first, second = members[start + row], members[start + column]
                pairs.append(Pair(int(first), int(second), min(1.0, float(cosines[row, column]))))
    return sorted(pairs, key=lambda pair: (-pair.cosine, pair.first, pair.second))[:LISTED]


def write_pairs(path: Path, names: Sequence[str], pairs: Sequence[Pair]) -> None:
    """Writes the two files and the cosine of each pair.

    Args:
      path: the file.
      names: of the images.
      pairs: of them.
    """
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "other", "cosine"))
        for pair in pairs:
            writer.writerow([cell(names[pair.first]), cell(names[pair.second]), f"{pair.cosine:.6f}"])
