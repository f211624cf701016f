"""The report of `cluster_images`: one HTML file with everything in it."""

import base64
import contextlib
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from experiments import data

if TYPE_CHECKING:
    from experiments.cluster_images import Config, Images, Report

# Thumbnails of each kind in a cluster's gallery and in all of them, and their side in pixels.
_SHOWN, _ALL_SHOWN, _THUMBNAIL = 12, 400, 72
# Images in the two-dimensional map, and rows and columns of a confusion matrix that can still be read.
_MAPPED, _MAX_TABLE = 1500, 30
_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.2rem; margin-top: 2rem; }
h3 { font-size: 1rem; margin: .8rem 0 .2rem; }
.gallery { display: flex; flex-wrap: wrap; gap: 3px; }
.gallery img { width: 56px; height: 56px; object-fit: cover; image-rendering: pixelated; border-radius: 3px; }
figure { margin: 0; } figure img { max-width: 100%; height: auto; background: white; }
table { border-collapse: collapse; font-size: .85rem; }
td, th { padding: .2rem .5rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr:nth-child(even) { background: #8882; }
.scroll { overflow-x: auto; }
.bar { background: #4477aa; height: .8rem; display: inline-block; border-radius: 2px; }
details { margin: .6rem 0; border: 1px solid #8886; border-radius: 6px; padding: .5rem .8rem; }
summary { cursor: pointer; font-weight: 600; }
.note { color: #777; font-size: .9rem; }
"""


def render(
    images: "Images",
    config: "Config",
    report: "Report",
    *,
    codes: np.ndarray,
    distances: np.ndarray,
    between_seeds: np.ndarray,
    seconds: float,
) -> str:
    """The report as HTML.

    Args:
      images: what was clustered.
      config: of the run.
      report: what it found.
      codes: `[num_images, num_codes]`.
      distances: `[num_images, num_clusters]`, of codes to the clusters' centres.
      between_seeds: `[seeds, seeds]`, adjusted Rand index in percent.
      seconds: that the run took.
    """
    title = _text(data.readable(config.images.resolve().name))
    sizes = np.bincount(report.labels, minlength=report.num_clusters)
    shape = "×".join(map(str, images.pixels.shape[1:]))
    parts = [
        f"<h1>Clusters of {title}</h1>",
        f"<p>{len(images.pixels):,} images, seen as {shape}, in {report.num_clusters} clusters by the method "
        f"<b>{_text(config.method)}</b>; {config.seeds} seeds, {seconds:.0f} seconds.</p>",
        _scores(images, report),
        _agreement(config, report, between_seeds),
        "<h2>Clusters</h2>",
        '<p class="note">Nearest: the most typical. Borderline: almost as near to another cluster. Outlying: '
        "farthest from the centre of their own.</p>",
        *(_cluster(images, report, distances, k, sizes) for k in range(report.num_clusters)),
        "<h2>Map of the codes</h2>",
        _figure(_map(codes, report.labels), "Images near each other in the map have similar codes (t-SNE)"),
        _learned(report.model),
        _confusion(images, report),
        _skipped(images),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Clusters of {title}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_text(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _scores(images: "Images", report: "Report") -> str:
    if not report.scores:
        return '<p class="note">No labels: look at the galleries, and at how well the seeds agree.</p>'
    rows = [
        (
            name.replace("_", " "),
            *(f"{found[name]:.1f}" for found in (report.scores, report.baseline) if found),
        )
        for name in report.scores
    ]
    header = ["%", "this method", "k-means on pixels"][: len(rows[0])]
    return f"<h2>Against the {len(images.classes)} labels</h2>" + _table(header, rows)


def _agreement(config: "Config", report: "Report", between_seeds: np.ndarray) -> str:
    if len(between_seeds) < 2:
        return ""
    header = ["ARI in %", *(f"seed {config.seed + i}" for i in range(len(between_seeds)))]
    rows = [[header[i + 1], *(f"{v:.0f}" for v in row)] for i, row in enumerate(between_seeds)]
    mean = report.agreement[report.num_clusters]
    text = (
        "<h2>Agreement between seeds</h2><p>Networks learned from different seeds should find the same "
        f"clusters. Mean agreement: <b>{mean:.1f} %</b> (100 % for equal clusterings, 0 % for chance).</p>"
    )
    text += _table(header, rows)
    if len(report.agreement) > 1:
        several = [(number, f"{value:.1f} %") for number, value in report.agreement.items()]
        text += "<p>By the number of clusters. The most stable was taken; look at the others too:</p>"
        text += _table(["clusters", "ARI"], several)
    return text


def _cluster(images: "Images", report: "Report", distances: np.ndarray, k: int, sizes: np.ndarray) -> str:
    members = np.flatnonzero(report.labels == k)
    share = 100 * len(members) / len(report.labels)
    width = 12 * len(members) / max(1, sizes.max())
    title = f"Cluster {k}: {len(members):,} images ({share:.1f} %)"
    if images.labels is not None and len(members):
        counts = np.bincount(images.labels[members], minlength=len(images.classes))
        most = int(counts.argmax())
        title += f", {100 * counts[most] / len(members):.0f} % {images.classes[most]}"
    own = distances[members, k]
    others = np.delete(distances[members], k, axis=1)
    margins = others.min(axis=1) - own if others.shape[1] else np.zeros(len(members))
    kinds = {"nearest": np.argsort(own), "borderline": np.argsort(margins), "outlying": np.argsort(-own)}
    number = max(1, min(_SHOWN, _ALL_SHOWN // report.num_clusters))
    shown = "".join(
        f"<h3>{name}</h3>" + _gallery(images, members[order[:number]]) for name, order in kinds.items()
    )
    if np.count_nonzero(sizes > sizes[k]) >= _ALL_SHOWN:
        shown = f"<p>The images of the {_ALL_SHOWN} largest clusters are shown.</p>"
    opened = " open" if k < 3 else ""
    return (
        f'<details class="cluster"{opened}><summary>{_text(title)} '
        f'<span class="bar" style="width:{width:.2f}rem"></span></summary>{shown}</details>'
    )


def _gallery(images: "Images", chosen: np.ndarray) -> str:
    tags = []
    for index in chosen:
        name = _text(images.names[index])
        source = _thumbnail(images, int(index))
        tags.append(f'<img src="{source}" alt="{name}" title="{name}" loading="lazy">')
    return f'<div class="gallery">{"".join(tags)}</div>'


def _thumbnail(images: "Images", index: int) -> str:
    """As it is in its file where there is one, so that more can be seen than the network saw."""
    buffer = io.BytesIO()
    shown = None
    if images.files:
        with contextlib.suppress(Exception):  # moved or changed since it was read
            shown = data.picture(images.files[index])
    if shown is None:
        pixels = images.pixels[index]
        if pixels.dtype != np.uint8:
            low, high = float(pixels.min()), float(pixels.max())
            pixels = np.uint8(255 * (pixels - low) / max(high - low, 1e-12))
        shown = Image.fromarray(pixels.squeeze())
    shown.thumbnail((_THUMBNAIL, _THUMBNAIL))
    shown.save(buffer, "WEBP", quality=75)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _figure(figure: Figure, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    data = base64.b64encode(buffer.getvalue()).decode()
    words = _text(caption)
    image = f'<img src="data:image/png;base64,{data}" alt="{words}">'
    return f'<figure>{image}<figcaption class="note">{words}</figcaption></figure>'


def _map(codes: np.ndarray, labels: np.ndarray) -> Figure:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    chosen = np.random.default_rng(0).permutation(len(codes))[:_MAPPED]
    some = codes[chosen]
    some = PCA(min(30, *some.shape), random_state=0).fit_transform(some)
    perplexity = min(30.0, max(1.0, (len(some) - 1) / 3))
    places = some[:, :2] if some.shape[1] > 1 else np.column_stack([some, np.zeros(len(some))])
    if len(some) > 5:
        places = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(some)
    figure = Figure(figsize=(6, 6))
    axes = figure.add_subplot()
    axes.scatter(places[:, 0], places[:, 1], c=labels[chosen], s=7, cmap="tab20")
    for k in np.unique(labels[chosen]):
        middle = np.median(places[labels[chosen] == k], axis=0)
        axes.annotate(
            str(k), middle, ha="center", va="center", weight="bold", bbox={"fc": "white", "alpha": 0.7}
        )
    axes.set_axis_off()
    return figure


def _learned(model: Any) -> str:
    """First-layer kernels, where the method has patches of the image to show."""
    kernels = getattr(model, "first_kernels", lambda: None)()
    if kernels is None:
        return ""
    columns = 16
    rows = -(-len(kernels) // columns)
    figure = Figure(figsize=(8, 0.5 * rows + 0.2))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    for axes, kernel in zip(grid.ravel(), kernels, strict=False):
        limit = max(float(np.abs(kernel).max()), 1e-12)
        axes.imshow((0.5 + 0.5 * kernel / limit).squeeze(), cmap="gray", vmin=0, vmax=1)
    return "<h2>What was learned</h2>" + _figure(figure, "Kernels of the first layer")


def _confusion(images: "Images", report: "Report") -> str:
    if images.labels is None or max(report.num_clusters, len(images.classes)) > _MAX_TABLE:
        return ""
    table = np.zeros((len(images.classes), report.num_clusters), int)
    np.add.at(table, (images.labels, report.labels), 1)
    rows = [[name, *row] for name, row in zip(images.classes, table, strict=True)]
    header = ["label", *map(str, range(report.num_clusters))]
    return "<h2>Labels (rows) and clusters (columns)</h2>" + _table(header, rows)


def _skipped(images: "Images") -> str:
    if not images.skipped:
        return ""
    rows = images.skipped[:200]
    more = f"<p>… and {len(images.skipped) - 200:,} more.</p>" if len(images.skipped) > 200 else ""
    return f"<h2>Left out: {len(images.skipped):,} files</h2>" + _table(["file", "why"], rows) + more
