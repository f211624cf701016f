"""Figures of the report."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from sul_jax.cli.measures import TITLES, best

# Images in the map.
_MAPPED = 1500
# Different codes from which on t-SNE is drawn; with fewer, their leading components say as much.
_DIFFERENT = 6


def codes_map(codes: np.ndarray, labels: np.ndarray) -> Figure | None:
    """Codes in two dimensions, by t-SNE; None where all codes are equal, so that there is nothing to see.

    Args:
      codes: finite `[num_images, num_codes]`; some are taken where they are many.
      labels: `[num_images]`, clusters.

    Example:
      >>> import numpy as np
      >>> from sul_jax.cli import figures
      >>> figures.codes_map(np.ones((9, 3)), np.zeros(9, int)) is None
      True
    """
    chosen = np.random.default_rng(0).permutation(len(codes))[:_MAPPED]
    places = _places(codes[chosen])
    if places is None:
        return None
    figure = Figure(figsize=(6, 6))
    axes = figure.add_subplot()
    axes.scatter(places[:, 0], places[:, 1], c=labels[chosen], s=7, cmap="tab20")
    for k in np.unique(labels[chosen]):
        middle = np.median(places[labels[chosen] == k], axis=0)
        box = {"fc": "white", "alpha": 0.7}
        axes.annotate(str(k), middle, ha="center", va="center", weight="bold", bbox=box)
    axes.set_axis_off()
    return figure


def _places(codes: np.ndarray) -> np.ndarray | None:
    """Two coordinates of each code."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    centred = codes.astype(np.float64) - codes.mean(axis=0, dtype=np.float64)
    spread, largest = float(np.abs(centred).max()), float(np.abs(codes).max())
    # What is left of equal codes is rounding; t-SNE divides by their variance and ends the process.
    if spread <= 1e-6 * max(largest, 1e-38):
        return None
    leading = PCA(min(30, *codes.shape), random_state=0).fit_transform(centred / spread)
    different = len(np.unique(leading.round(6), axis=0))
    if different >= _DIFFERENT:
        perplexity = min(30.0, max(1.0, (len(codes) - 1) / 3))
        mapped = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(leading)
        if np.isfinite(mapped).all():
            return np.asarray(mapped)
    return leading[:, :2] if leading.shape[1] > 1 else np.column_stack([leading, np.zeros(len(leading))])


def measures_grid(of: Mapping[str, Mapping[int, Mapping[str, float]]], marked: int) -> Figure:
    """Measures of clusters against their number, a row for each set of vectors.

    Args:
      of: by the name of the vectors, what `cli.measures.best` takes.
      marked: number of clusters at which a line is drawn.

    Example:
      >>> from sul_jax.cli import figures
      >>> len(figures.measures_grid({"mine": {2: {"gap": 0.1}, 3: {"gap": 0.2}}}, 3).axes)
      1
    """
    names = list(next(iter(next(iter(of.values())).values())))
    figure = Figure(figsize=(2.6 * len(names), 0.6 + 1.7 * len(of)), layout="constrained")
    grid = figure.subplots(len(of), len(names), squeeze=False, sharex="col")
    for row, (title, measured) in zip(grid, of.items(), strict=True):
        numbers, chosen = sorted(measured), best(measured)
        for axes, name in zip(row, names, strict=True):
            axes.axvline(marked, color="0.8", linewidth=3)
            axes.plot(numbers, [measured[n][name] for n in numbers], marker=".")
            axes.plot(chosen[name], measured[chosen[name]][name], marker="o", color="C3")
            axes.tick_params(labelsize=8)
        row[0].set_ylabel(title)
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(TITLES[name][0].partition(" (")[0], fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("clusters")
    return figure


def mosaic(tiles: np.ndarray, columns: int, *, gap: int = 1, empty: float = 1.0) -> np.ndarray:
    """Tiles in rows, as one picture.

    Args:
      tiles: `[num, height, width, …]`.
      columns: tiles in a row.
      gap: pixels on the right of each tile and below it.
      empty: what gaps, and places without a tile, are filled with.

    Example:
      >>> import numpy as np
      >>> from sul_jax.cli import figures
      >>> figures.mosaic(np.zeros((3, 2, 2)), 2).shape
      (6, 6)
    """
    rows = -(-len(tiles) // columns)
    missing = [(0, rows * columns - len(tiles)), (0, gap), (0, gap)] + [(0, 0)] * (tiles.ndim - 3)
    whole = np.pad(np.asarray(tiles, np.float64), missing, constant_values=empty)
    height, width, *channels = whole.shape[1:]
    grid = whole.reshape(rows, columns, height, width, *channels).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, *channels)


def kernels_grid(kernels: np.ndarray) -> Figure:
    """First-layer kernels as small pictures, each on its own scale.

    Args:
      kernels: `[num_kernels, height, width, channels]`, 1 or 3 channels.
    """
    limits = np.maximum(np.abs(kernels).max(axis=(1, 2, 3), keepdims=True), 1e-12)
    canvas = mosaic(0.5 + 0.5 * kernels / limits, 16)
    figure = Figure(figsize=(8, 8 * canvas.shape[0] / canvas.shape[1]))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(canvas.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    return figure
