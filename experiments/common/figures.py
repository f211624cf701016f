"""Figures, written as PNG."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import matplotlib
import matplotlib.axes
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter
from numpy.typing import ArrayLike

from experiments.data import atomic_path
from sul_jax import metrics, whitening
from sul_jax.cli.figures import mosaic

matplotlib.rcParams.update(
    {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 150}
)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG; figures are made without pyplot, which has global state and windows."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight", format="png")


@contextmanager
def _panels(
    path: Path, size: tuple[float, float], rows: int = 1, columns: int = 1, **options: Any
) -> Iterator[np.ndarray]:
    """Axes `[rows, columns]` of a figure that is saved when the block ends."""
    figure = Figure(size, layout=options.pop("layout", "constrained"))
    yield figure.subplots(rows, columns, squeeze=False, **options)
    save(figure, path)


@contextmanager
def _wrapped(path: Path, size: tuple[float, float], number: int, most: int) -> Iterator[list[Any]]:
    """Axes without frames, each of this size, at most so many in a row."""
    columns = min(number, most)
    rows = -(-number // columns)
    with _panels(path, (size[0] * columns, size[1] * rows), rows, columns) as grid:
        for axes in grid.flat:
            axes.set_axis_off()
        yield list(grid.flat[:number])


@contextmanager
def _axes(
    path: Path, size: tuple[float, float] = (4.5, 3), *, layout: str | None = "constrained", **labels: Any
) -> Iterator[matplotlib.axes.Axes]:
    """Axes alone in a figure that is saved when the block ends; with a legend where there is a choice."""
    with _panels(path, size, layout=layout) as panels:
        axes = panels[0, 0]
        axes.set(**labels)
        yield axes
        number = len(axes.get_legend_handles_labels()[1])
        if axes.get_legend() is None and number > 1:
            axes.legend(frameon=False, loc="best" if number <= 4 else (1.02, 0))


def _show(axes: matplotlib.axes.Axes, image: np.ndarray, **options: Any) -> None:
    axes.imshow(image.squeeze(), **options)
    axes.set_axis_off()


def _show_signed(axes: matplotlib.axes.Axes, values: np.ndarray) -> None:
    """A matrix in red and blue, zero in white."""
    limit = max(float(np.abs(values).max()), 1e-12)
    drawn = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes.figure.colorbar(drawn, shrink=0.8)


def _rgb(images: np.ndarray) -> np.ndarray:
    """Images of other than three channels are drawn as their mean."""
    return images if images.shape[-1] == 3 else np.repeat(images.mean(-1, keepdims=True), 3, axis=-1)


def _log_axis(axes: matplotlib.axes.Axes) -> None:
    """A logarithmic axis of positions with plain numbers at 1, 2, 5, 10, …"""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def zca_kernel(kernel: np.ndarray, path: Path) -> None:
    """Figure 6: the whitening kernel with its centre left out."""
    shown = kernel[:, :, 0, 0].copy()
    centre = shown.shape[0] // 2
    value = shown[centre, centre]
    shown[centre, centre] = 0
    ratio = float(whitening.dc_ratio(jnp.asarray(kernel)))
    title = f"ConvZCA kernel; centre {value:.2f} left out\nDC ratio {ratio:.3f}"
    with _axes(path, (3.6, 3), layout=None, title=title, xticks=[], yticks=[]) as axes:
        _show_signed(axes, shown)


def kernels(bases: np.ndarray, kernel_size: int, channels: int, path: Path) -> None:
    """Figure 3: the first layer's kernels, those of one subspace side by side."""
    num_subspaces, rank = bases.shape[:2]
    images = bases.reshape(num_subspaces, rank, kernel_size, kernel_size, channels).mean(-1)
    images = images / np.abs(images).max((2, 3), keepdims=True)
    subspaces = np.stack([mosaic(subspace, rank, empty=np.nan) for subspace in images])
    canvas = mosaic(subspaces, max(1, 16 // rank), gap=2, empty=np.nan)
    title = f"{num_subspaces} subspaces of rank {rank}, {kernel_size}×{kernel_size} kernels"
    with _axes(path, (8, 8 * canvas.shape[0] / canvas.shape[1] + 0.4), layout=None, title=title) as axes:
        _show(axes, canvas, cmap="gray", vmin=-1, vmax=1)


def feature_maps(images: np.ndarray, maps: Sequence[np.ndarray], path: Path) -> None:
    """Figure 4: the maps of each layer (a column) for a few images (rows)."""
    size = (2 + 3 * len(maps), 3 * len(images))
    ratios = [1.0] + [2.0] * len(maps)
    with _panels(path, size, len(images), 1 + len(maps), layout=None, width_ratios=ratios) as grid:
        for index, row in enumerate(grid):
            _show(row[0], images[index].mean(-1), cmap="gray")
            for axes, layer in zip(row[1:], maps, strict=True):
                columns = int(np.ceil(np.sqrt(layer.shape[-1])))
                _show(axes, mosaic(np.moveaxis(layer[index], -1, 0), columns, empty=np.nan), cmap="magma")
        for index, (axes, layer) in enumerate(zip(grid[0][1:], maps, strict=True), 1):
            axes.set_title(f"layer {index}: {float((layer > 0).mean()):.0%} active")


def energies(curves: Sequence[np.ndarray], path: Path) -> None:
    """Energy of every layer over the steps of its training."""
    with _panels(path, (3 * len(curves), 2.4), 1, len(curves)) as grid:
        for index, (axes, curve) in enumerate(zip(grid[0], curves, strict=True), 1):
            axes.plot(curve, color="tab:blue")
            axes.set(title=f"layer {index}", xlabel="step", ylabel="energy per patch" if index == 1 else "")


def learning_curve(
    train: np.ndarray, steps: np.ndarray, test: np.ndarray, warmup_steps: int, path: Path
) -> None:
    """Figure 5: energy of the minibatches and of held-out images."""
    with _axes(path, layout=None, xlabel="step", ylabel="energy per patch") as axes:
        axes.plot(train, color="tab:blue", alpha=0.6, label="training minibatch")
        axes.plot(steps, test, color="tab:orange", marker=".", label="test images")
        axes.axvline(warmup_steps, color="gray", linestyle=":", label="end of warm-up")


def gallery(
    images: np.ndarray,
    clusters: np.ndarray,
    labels: np.ndarray | None,
    path: Path,
    *,
    per_cluster: int = 24,
) -> None:
    """Random members of every cluster; those of another class than the cluster's have a red frame.

    A cluster's class is the one matched to it or, where there are more clusters than classes, its commonest.
    """
    matched = {} if labels is None else metrics.match_clusters(labels, clusters)
    if labels is not None and len(np.unique(clusters)) > len(np.unique(labels)):
        for cluster in np.unique(clusters):
            values, counts = np.unique(labels[clusters == cluster], return_counts=True)
            matched[int(cluster)] = int(values[np.argmax(counts)])
    order = sorted((int(c) for c in np.unique(clusters)), key=lambda c: (matched.get(c, 10**9), c))
    generator = np.random.default_rng(0)
    height, width = images.shape[1:3]
    scale = 255 if images.dtype == np.uint8 else max(float(images.max()), 1e-12)
    tiles = np.ones((len(order), per_cluster, height + 4, width + 4, 3))
    for row, cluster in enumerate(order):
        members = generator.permutation(np.flatnonzero(clusters == cluster))[:per_cluster]
        for tile, member in zip(tiles[row], members, strict=False):
            if labels is not None and matched.get(cluster) != labels[member]:
                tile[1:-1, 1:-1] = (0.9, 0.1, 0.1)
            tile[2:-2, 2:-2] = np.clip(_rgb(images[member]) / scale, 0, 1)
    with _axes(path, (per_cluster * 0.36, len(order) * 0.4), layout=None, xticks=[]) as axes:
        axes.imshow(mosaic(tiles.reshape(-1, *tiles.shape[2:]), per_cluster, gap=0))
        names = [str(matched.get(cluster, "–")) for cluster in order]
        axes.set_yticks((np.arange(len(order)) + 0.5) * (height + 4), names)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)


def confusion(labels: np.ndarray, clusters: np.ndarray, path: Path) -> None:
    """Examples of each class (row) in the cluster matched to each class (column)."""
    matched = metrics.match_clusters(labels, clusters)
    classes = np.unique(labels)
    order = [c for k in classes for c, m in matched.items() if m == k]
    order += [int(c) for c in np.unique(clusters) if int(c) not in matched]
    table = np.array([[np.sum((labels == k) & (clusters == c)) for c in order] for k in classes])
    xlabel = "cluster, by its matched class"
    with _axes(path, (5, 4.6), layout=None, xlabel=xlabel, ylabel="class") as axes:
        axes.imshow(np.log1p(table), cmap="Blues")
        for (row, column), count in np.ndenumerate(table):
            color = "white" if np.log1p(count) > 0.6 * np.log1p(table.max()) else "black"
            axes.text(column, row, f"{count}", ha="center", va="center", color=color, fontsize=7)
        axes.set_xticks(range(len(order)), [str(matched.get(c, "–")) for c in order])
        axes.set_yticks(range(len(classes)), [str(k) for k in classes])


def manifolds(
    points: np.ndarray,
    labels: np.ndarray,
    states: Sequence[tuple[int, np.ndarray, np.ndarray]],
    path: Path,
    *,
    shown: int = 1500,
) -> None:
    """Points of the plane and their embedding (its first three principal components) while learning.

    Args:
      points: `[num, 2]`.
      labels: `[num]`, true clusters; wrong ones are marked in the plane.
      states: for every column (step, features `[num, features]`, clusters `[num]`).
      path: where the figure goes.
      shown: points drawn.
    """
    chosen = np.random.default_rng(0).permutation(len(points))[:shown]
    figure = Figure(figsize=(2.4 * len(states), 4.9))
    for column, (step, features, clusters) in enumerate(states, 1):
        matched = metrics.match_clusters(labels, clusters)
        classes = np.array([matched.get(int(c), -1) for c in clusters])
        colors = np.array(["tab:blue", "tab:orange", "0.5"])[classes][chosen]
        plane = figure.add_subplot(2, len(states), column)
        x, y = points[chosen].T
        plane.scatter(x, y, c=colors, s=2)
        plane.set(aspect="equal", title=f"step {step}: {np.mean(classes == labels):.1%}")
        plane.set_axis_off()
        centred = features - features.mean(0)
        axes = np.linalg.svd(centred, full_matrices=False)[2][:3]
        space = figure.add_subplot(2, len(states), len(states) + column, projection="3d")
        embedded = centred[chosen] @ axes.T
        x, y, z = np.pad(embedded, ((0, 0), (0, 3 - embedded.shape[1]))).T
        space.scatter(x, y, z, c=colors, s=2)  # type: ignore[misc]
        space.set(xticklabels=[], yticklabels=[], zticklabels=[])
    save(figure, path)


def singular_values(features: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """Figure A.3: singular values of each cluster's features; how many stand out is its dimension."""
    groups, ylabel = np.unique(labels), "singular value, of the largest"
    title = f"{len(groups)} clusters"
    with _axes(path, layout=None, title=title, xlabel="index", ylabel=ylabel) as axes:
        for label in groups:
            values = np.linalg.svd(features[labels == label], compute_uv=False)
            axes.plot(np.arange(1, len(values) + 1), values / values[0], alpha=0.5, linewidth=0.8)
        axes.set(yscale="log", ylim=(1e-4, 1.2))


def embeddings(codes: Mapping[str, np.ndarray], colours: np.ndarray, path: Path) -> None:
    """t-SNE of several representations of the same examples, `[num, features]` by name, four in a row."""
    from sklearn.manifold import TSNE

    with _wrapped(path, (2.8, 3), len(codes), 4) as panels:
        for axes, (name, values) in zip(panels, codes.items(), strict=True):
            perplexity = min(30.0, (len(values) - 1) / 3)
            plane = TSNE(perplexity=perplexity, init="random", random_state=0).fit_transform(values)
            axes.scatter(*plane.T, c=colours, cmap="tab10", s=2)
            axes.set_title(name)


def activity(codes: Mapping[str, np.ndarray], norms: Mapping[str, np.ndarray], path: Path) -> None:
    """Mean of every dimension of several representations, largest first, and the norms of their weights."""
    with _panels(path, (3.4 * len(codes), 2.4), 1, len(codes)) as grid:
        for axes, (name, values) in zip(grid[0], codes.items(), strict=True):
            means = values.mean(axis=0)
            order = np.argsort(means)[::-1]
            axes.bar(np.arange(len(means)), means[order], width=1.0, color="tab:blue")
            axes.set(title=name, xlabel="dimension")
            axes.tick_params(axis="y", colors="tab:blue")
            if name in norms:
                beside = axes.twinx()
                beside.plot(norms[name][order], ".", markersize=1, color="tab:orange")
                beside.set_ylim(bottom=0)
                beside.set_ylabel("norm of the weights", color="tab:orange")
                beside.tick_params(axis="y", colors="tab:orange")


def example_graphs(
    probabilities: np.ndarray, activations: np.ndarray, labels: np.ndarray, path: Path
) -> None:
    """Figure 6: the graphs YYᵀ of the classes taught and BBᵀ of the nodes, examples in order of their labels.

    Args:
      probabilities: Y, `[num, num_parents]`.
      activations: B, `[num, num_nodes]`.
      labels: `[num]`.
      path: of the PNG.
    """
    order = np.argsort(labels, kind="stable")
    borders = np.flatnonzero(np.diff(labels[order])) + 0.5
    with _panels(path, (7, 3.4), 1, 2) as grid:
        for axes, name, values in zip(grid[0], ("YYᵀ", "BBᵀ"), (probabilities, activations), strict=True):
            norms = np.linalg.norm(values, axis=1, keepdims=True)
            unit = (values / np.where(norms > 0, norms, 1))[order]
            axes.imshow(unit @ unit.T, cmap="magma", vmin=0, vmax=1)
            axes.set(title=f"{name}, by cosine", xticks=borders, yticks=borders)
            axes.tick_params(labelbottom=False, labelleft=False)


def covariance(features: np.ndarray, path: Path) -> None:
    """Figure A.2: the features' second moments; spread over all directions they are a diagonal."""
    title = "second moments of the features"
    with _axes(path, (3.8, 3.2), xlabel="feature", ylabel="feature", title=title) as axes:
        _show_signed(axes, features.T @ features / len(features))


def principal_components(
    images: np.ndarray, features: np.ndarray, clusters: np.ndarray, path: Path, *, components: int = 10
) -> None:
    """Figure 2: for each cluster (a panel), the images most aligned with its principal components (rows).

    Args:
      images: `[num, height, width, channels]`, uint8 or in [0, 1].
      features: `[num, features]` of unit norm.
      clusters: `[num]`.
      path: of the PNG.
      components: rows of a panel, and images in a row.
    """
    shown = np.unique(clusters)
    scale = 255 if images.dtype == np.uint8 else 1
    with _wrapped(path, (2.6, 2.8), len(shown), 5) as panels:
        for axes, cluster in zip(panels, shown, strict=True):
            members = np.flatnonzero(clusters == cluster)
            directions = np.linalg.svd(features[members], full_matrices=False)[2][:components]
            tiles = np.ones((len(directions), components, *images.shape[1:]))
            for row, direction in zip(tiles, directions, strict=True):
                aligned = features[members] @ direction
                aligned = aligned if aligned.sum() > 0 else -aligned  # a component has no sign
                chosen = members[np.argsort(-aligned)[:components]]
                row[: len(chosen)] = images[chosen] / scale
            canvas = mosaic(tiles.reshape(-1, *images.shape[1:]), components)
            axes.imshow(np.clip(canvas, 0, 1).squeeze(), cmap="gray")
            axes.set_title(f"cluster {cluster}: {len(members)} images")


def accuracies(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]], xlabel: str, path: Path, *, log: bool
) -> None:
    """Mean accuracies in percent, with standard deviations where there are several.

    Args:
      curves: by name, positions `[num]` and values `[num, seeds]`.
      xlabel: what the positions are.
      path: of the PNG.
      log: whether positions are on a logarithmic axis.
    """
    with _axes(path, xlabel=xlabel, ylabel="accuracy, %") as axes:
        for name, (positions, values) in curves.items():
            several = np.asarray(values)
            spreads = np.std(several, axis=1, ddof=1) if several.shape[1] > 1 else np.zeros(len(several))
            axes.errorbar(np.asarray(positions), several.mean(1), spreads, marker=".", capsize=2, label=name)
        if log:
            _log_axis(axes)


def distributions(values: Mapping[str, np.ndarray], xlabel: str, ylabel: str, path: Path) -> None:
    """Figure 6: how values spread, a violin with its median for each of several settings."""
    with _axes(path, xlabel=xlabel, ylabel=ylabel) as axes:
        axes.violinplot([*values.values()], showmedians=True)
        axes.set_xticks(range(1, len(values) + 1), [*values])


def alignment_and_accuracy(pairs: Mapping[str, np.ndarray], path: Path) -> None:
    """Figure 3: initial alignment against accuracy in percent, `[networks, 2]` by name."""
    named = {"xlabel": "initial alignment", "ylabel": "accuracy of the linear probe, %"}
    with _axes(path, (4.5, 3.2), **named) as axes:
        for name, points in pairs.items():
            axes.plot(*np.asarray(points).T, "o", markersize=4, label=name)
        if len(pairs) > 1:
            axes.legend(frameon=False, fontsize="small")


class Course(NamedTuple):
    """How a seed of DeepCluster went.

    Attributes:
      seed: its number.
      history: `[cycles, 3]`, mutual information with the cycle before and with the classes, and the loss.
      probes: accuracies in percent by name, `probe_accuracy` among them, after a number of cycles.
      untrained: those of the untrained network; none without labels.
    """

    seed: int
    history: np.ndarray
    probes: Mapping[int, Mapping[str, float]]
    untrained: Mapping[str, float]


def cycles(courses: Sequence[Course], halt: int | None, path: Path) -> None:
    """DeepCluster over its cycles: agreement with the cycle before and the classes, and linear probes.

    Args:
      courses: one a seed.
      halt: cycle from which on the clusters stayed.
      path: of the PNG.
    """
    several = len(courses) > 1
    with _panels(path, (8, 2.8), 1, 2) as ((left, right),):
        for index, course in enumerate(courses):
            numbers = np.arange(len(course.history))  # a cycle clusters before it trains
            agreement = np.array(course.history[:, :2])
            if halt is not None:
                agreement[halt:, 0] = np.nan  # the same by construction
            style = {"marker": "." if len(numbers) < 40 else None, "alpha": 0.6 if several else 1}
            for column, name in enumerate(("with the cycle before", "with the classes")):
                label = None if index else name
                left.plot(numbers, agreement[:, column], color=f"C{column}", label=label, **style)
            colour = f"C{index % 10}"
            if course.probes:
                name = f"seed {course.seed}" if several else "DeepCluster"
                values = [probe["probe_accuracy"] for probe in course.probes.values()]
                right.plot([*course.probes], values, "o-", color=colour, label=name)
            if course.untrained:
                last = index == len(courses) - 1
                name = "untrained networks" if several else "untrained network"
                colour = colour if several else "gray"
                value = course.untrained["probe_accuracy"]
                right.axhline(value, color=colour, linestyle="--", label=name if last else None)
        left.set(ylabel="normalised mutual information")
        left.set_ylim(bottom=0)
        right.set(ylabel="accuracy of the linear probe, %", xlim=(0, len(courses[0].history) * 1.05))
        for axes in (left, right):
            axes.set_xlabel("cycles of training")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if axes.get_legend_handles_labels()[1]:
                axes.legend(frameon=False)
            if halt is not None:
                axes.axvline(halt, color="gray", linestyle=":")


def alignments(values: np.ndarray, title: str, paper: Sequence[float], path: Path) -> None:
    """Figure 6: the distribution of the initial alignment over untrained networks."""
    named = {"xlabel": "normalised mutual information with the classes", "ylabel": "networks", "title": title}
    with _axes(path, (4.5, 2.8), **named) as axes:
        axes.hist(values, bins=min(20, max(5, len(values) // 4)), color="tab:blue", alpha=0.7)
        axes.axvline(float(values.mean()), color="tab:blue", label=f"mean {values.mean():.3f}")
        for bound in sorted(set(paper)):
            axes.axvline(bound, color="black", linestyle="--", label=f"paper {bound:.3f}")
        axes.legend(framealpha=0.9, edgecolor="none")  # it may lie over a line


def filters(weights: np.ndarray, channels: int, path: Path) -> None:
    """Figures 1 and 3: filters side by side, similar ones near each other.

    Args:
      weights: `[num_units, pixels · channels]` of square windows.
      channels: 1 or 3 are drawn as they are, others as their mean.
      path: of the PNG.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage

    unit = weights / np.maximum(np.linalg.norm(weights, axis=1, keepdims=True), 1e-12)
    order = leaves_list(linkage(unit, "average", optimal_ordering=len(unit) <= 500))
    size = round((weights.shape[1] / channels) ** 0.5)
    tiles = _rgb(weights[order].reshape(-1, size, size, channels))
    tiles = np.clip(tiles / np.maximum(tiles.max(axis=(1, 2, 3), keepdims=True), 1e-12), 0, 1)
    canvas = mosaic(tiles, int(np.ceil((1.6 * len(tiles)) ** 0.5)))
    canvas = np.pad(canvas, ((1, 0), (1, 0), (0, 0)), constant_values=1)
    title = f"{len(tiles)} filters of {size}×{size} pixels, similar ones near each other"
    with _axes(path, (8, 8 * canvas.shape[0] / canvas.shape[1]), layout=None, title=title) as axes:
        _show(axes, canvas, interpolation="nearest")


def separation(shares: np.ndarray, path: Path) -> None:
    """Section 5: units of gray gratings on the left, of even colours on the right."""
    title = f"{np.mean(shares < 0.2):.0%} orientation, {np.mean(shares > 0.8):.0%} colour"
    xlabel = "share of colour in the filter's pattern (0 orientation, 1 colour)"
    with _axes(path, xlabel=xlabel, ylabel="units", title=title) as axes:
        axes.hist(shares, bins=[index / 40 for index in range(41)], color="tab:blue")


def errors(curves: Mapping[str, Sequence[float]], path: Path) -> None:
    """Figures 2 and 6: test errors in percent against the time of supervised training, `seconds`."""
    with _axes(path, (5, 3.2), xlabel="supervised training, s", ylabel="error, %") as axes:
        for name in (name for name in curves if name != "seconds"):
            axes.plot(curves["seconds"], curves[name], ".-", label=f"{name}: {curves[name][-1]:.1f} %")
        axes.legend(frameon=False)


def rows_of_images(rows: Sequence[np.ndarray], path: Path) -> None:
    """Images side by side, a row below the other; uint8 or in [0, 1]."""
    canvas = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    figure = Figure(figsize=(8, 8 * canvas.shape[0] / canvas.shape[1]))
    _show(figure.add_axes((0, 0, 1, 1)), canvas, cmap="gray", interpolation="nearest")
    save(figure, path)


def of_axes(axes: matplotlib.axes.Axes, path: Path) -> None:
    """A plot that another package drew; its figure is closed."""
    from matplotlib import pyplot

    figure = axes.figure
    assert isinstance(figure, Figure)
    save(figure, path)
    pyplot.close(figure)


def error_against_cost(mflop: Sequence[float], errors: Sequence[float], path: Path) -> None:
    """Trials of a search, and those that no cheaper one equals."""
    named = {"xlabel": "million operations an image", "ylabel": "clustering error in %"}
    with _axes(path, (5, 3.5), **named) as axes:
        axes.scatter(mflop, errors, s=14, alpha=0.6, label="trials")
        order = np.argsort(mflop, kind="stable")
        cost, lowest = np.asarray(mflop)[order], np.minimum.accumulate(np.asarray(errors)[order])
        axes.step(cost, lowest, where="post", color="C1", label="best up to this cost")
        _log_axis(axes)
