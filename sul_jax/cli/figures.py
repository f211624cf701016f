"""Figures of the report."""

import numpy as np
from matplotlib.figure import Figure

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


def kernels_grid(kernels: np.ndarray) -> Figure:
    """First-layer kernels as small pictures, each on its own scale.

    Args:
      kernels: `[num_kernels, height, width, channels]`, 1 or 3 channels.
    """
    columns = 16
    rows = -(-len(kernels) // columns)
    figure = Figure(figsize=(8, 0.5 * rows + 0.2))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    for axes, kernel in zip(grid.ravel(), kernels, strict=False):
        limit = max(float(np.abs(kernel).max()), 1e-12)
        axes.imshow((0.5 + 0.5 * kernel / limit).squeeze(), cmap="gray", vmin=0, vmax=1)
    return figure
