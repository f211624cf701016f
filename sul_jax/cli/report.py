"""The report of `sul-jax cluster`: one HTML file with everything in it."""

import base64
import contextlib
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from sul_jax.cli import figures, measures
from sul_jax.cli.duplicates import LISTED, Pair
from sul_jax.cli.images import Images, kinds_left_out
from sul_jax.cli.listing import Places
from sul_jax.cli.pictures import PictureError, Scale, eight_bits, picture

if TYPE_CHECKING:
    from sul_jax.cli.cluster import Report

# Thumbnails of each kind in a cluster's gallery and in all of them, and their side in pixels.
_SHOWN, _ALL_SHOWN, _THUMBNAIL = 12, 400, 72
# Rows and columns of a confusion matrix that can still be read, and files in a list.
_MAX_TABLE, _LISTED = 30, 200
# Where near duplicates and the map are put when they are there.
_DUPLICATES, _MAP = "<!-- duplicates -->", "<!-- map -->"
# Pairs of near duplicates that are shown.
_PAIRS = 24
_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.2rem; margin-top: 2rem; }
h3 { font-size: 1rem; margin: .8rem 0 .2rem; }
.gallery { display: flex; flex-wrap: wrap; gap: 3px; }
.gallery img { width: 56px; height: 56px; object-fit: cover; image-rendering: pixelated; border-radius: 3px; }
.pairs { display: flex; flex-wrap: wrap; gap: 12px; }
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


class About(NamedTuple):
    """What the report says of the run.

    Attributes:
      name: of the folder, without its place.
      what: was clustered.
      method: how was learned.
      seeds: of the networks.
      seconds: that the run took.
    """

    name: str
    what: str
    method: str
    seeds: Sequence[int]
    seconds: float


def render(
    about: About,
    images: Images,
    report: "Report",
    *,
    places: Places,
    between_seeds: np.ndarray,
    named: Sequence[str] | None = None,
) -> str:
    """The report as HTML, still without the map of the codes; see `with_map`.

    Args:
      about: the run.
      images: what was clustered.
      report: the clusters.
      places: where the codes lie in the clusters.
      between_seeds: `[seeds, seeds]`, adjusted Rand index in percent.
      named: what to call the clusters, beside their numbers.
    """
    title = _text(about.name)
    sizes = np.bincount(report.labels, minlength=report.num_clusters)
    parts = [
        f"<h1>Clusters of {title}</h1>",
        _what_was_done(about, images, report),
        _scores(images, report),
        _agreement(about, report, between_seeds),
        "<h2>Clusters</h2>",
        _empty(sizes),
        '<p class="note">Nearest: the most typical. Borderline: almost as near to another cluster. Outlying: '
        "farthest from the centre of their own.</p>",
        *(_cluster(images, report, places, k, sizes, named) for k in range(report.num_clusters)),
        _DUPLICATES,
        _MAP,
        _learned(report.model),
        _confusion(images, report),
        _left_out(images),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Clusters of {title}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def with_duplicates(report: str, images: Images, pairs: Sequence[Pair]) -> str:
    """The report with the nearest pairs.

    Args:
      report: from `render`.
      images: what was clustered.
      pairs: of them, the nearest first.
    """
    if not pairs:
        return report
    shown = "".join(
        f"<figure>{_gallery(images, [pair.first, pair.second])}"
        f'<figcaption class="note">{pair.cosine:.3f}</figcaption></figure>'
        for pair in pairs[:_PAIRS]
    )
    words = f"{len(pairs):,}" if len(pairs) < LISTED else f"The {LISTED:,} nearest"
    text = (
        f"<h2>Near duplicates</h2><p>{words} pairs of one cluster have nearly the same code, see "
        f"duplicates.csv. The nearest, with the cosine of their codes:</p>"
        f'<div class="pairs">{shown}</div>'
    )
    return report.replace(_DUPLICATES, text, 1)


def with_map(report: str, codes: np.ndarray, labels: np.ndarray) -> str:
    """The report with a map of the codes, or words where they do not vary.

    Args:
      report: from `render`.
      codes: finite `[num_images, num_codes]`.
      labels: `[num_images]`, clusters.
    """
    figure = figures.codes_map(codes, labels)
    if figure is None:
        shown = "<p>All images have the same code: the network tells none from another.</p>"
    else:
        shown = _figure(figure, "Images near each other in the map have similar codes (t-SNE)")
    return report.replace(_MAP, f"<h2>Map of the codes</h2>\n{shown}", 1)


def _what_was_done(about: About, images: Images, report: "Report") -> str:
    notes = "".join(f'<p class="note">{_text(note)}.</p>' for note in images.notes)
    return (
        f"<p>{len(images.names):,} {_text(about.what)}, in {report.num_clusters} clusters by the method "
        f"<b>{_text(about.method)}</b>; {len(about.seeds)} seeds, {about.seconds:.0f} seconds.</p>{notes}"
    )


def _empty(sizes: np.ndarray) -> str:
    number = np.count_nonzero(sizes)
    if number == len(sizes):
        return ""
    return f"<p><b>Of {len(sizes)} clusters only {number} have images.</b></p>"


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_text(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _scores(images: Images, report: "Report") -> str:
    if not report.scores:
        return '<p class="note">No labels: look at the galleries, and at how well the seeds agree.</p>'
    rows = [
        (
            name.replace("_", " "),
            *(f"{values[name]:.1f}" for values in (report.scores, report.baseline) if values),
        )
        for name in report.scores
    ]
    header = ["%", "this method", "k-means on pixels"][: len(rows[0])]
    return f"<h2>Against the {len(images.classes)} labels</h2>" + _table(header, rows)


def _agreement(about: About, report: "Report", between_seeds: np.ndarray) -> str:
    if len(between_seeds) < 2:
        return ""
    header = ["ARI in %", *(f"seed {seed}" for seed in about.seeds)]
    rows = [[header[i + 1], *(f"{v:.0f}" for v in row)] for i, row in enumerate(between_seeds)]
    mean = report.agreement[report.num_clusters]
    text = (
        "<h2>Agreement between seeds</h2><p>Networks learned from different seeds should find the same "
        f"clusters. Mean agreement: <b>{mean:.1f} %</b> (100 % for equal clusterings, 0 % for chance).</p>"
    )
    text += _table(header, rows)
    if report.measures:
        text += (
            "<p>By the number of clusters; * marks what each column would choose. The most stable was taken, "
            "which is not always right; look at the others too:</p>"
        )
        text += _table(*measures.table(report.measures))
        figure = figures.measures_grid({"": report.measures}, report.num_clusters)
        text += _figure(figure, "Measures without labels; the line marks the number that was taken")
    return text


def _cluster(images: Images, report: "Report", places: Places, k: int, sizes: np.ndarray, named: Any) -> str:
    members = np.flatnonzero(report.labels == k)
    if np.count_nonzero(sizes > sizes[k]) >= _ALL_SHOWN:
        shown = f"<p>The images of the {_ALL_SHOWN} largest clusters are shown.</p>"
    else:
        number = max(1, min(_SHOWN, _ALL_SHOWN // report.num_clusters))
        orders = _orders(places, members)
        shown = "".join(
            f"<h3>{name}</h3>" + _gallery(images, members[order[:number]]) for name, order in orders.items()
        )
    opened = " open" if k < 3 else ""
    width = 12 * len(members) / max(1, sizes.max())
    return (
        f'<details class="cluster"{opened}><summary>{_text(_title(images, report, k, members, named))} '
        f'<span class="bar" style="width:{width:.2f}rem"></span></summary>{shown}</details>'
    )


def _title(images: Images, report: "Report", k: int, members: np.ndarray, named: Any) -> str:
    share = 100 * len(members) / len(report.labels)
    name = f"Cluster {k}" if named is None else f"Cluster {k}, {named[k]}"
    title = f"{name}: {len(members):,} images ({share:.1f} %)"
    if images.labels is None or not len(members):
        return title
    counts = np.bincount(images.labels[members], minlength=len(images.classes))
    most = int(counts.argmax())
    return f"{title}, {100 * counts[most] / len(members):.0f} % {images.classes[most]}"


def _orders(places: Places, members: np.ndarray) -> dict[str, np.ndarray]:
    """A cluster's images, those first that each gallery shows."""
    own, margins = places.distances[members], places.margins[members]
    return {"nearest": np.argsort(own), "borderline": np.argsort(margins), "outlying": np.argsort(-own)}


def _gallery(images: Images, chosen: Sequence[int] | np.ndarray) -> str:
    if images.pixels is None and not images.files:
        return f"<p>{', '.join(_text(images.names[index]) for index in chosen)}</p>"
    tags = []
    for index in chosen:
        name = _text(images.names[index])
        source = _thumbnail(images, int(index))
        tags.append(f'<img src="{source}" alt="{name}" title="{name}" loading="lazy">')
    return f'<div class="gallery">{"".join(tags)}</div>'


def _thumbnail(images: Images, index: int) -> str:
    """As it is in its file where there is one, so that more can be seen than the network saw."""
    shown = None
    if images.files:
        with contextlib.suppress(PictureError):  # moved or changed since it was read
            shown = picture(images.files[index], images.scale, side=_THUMBNAIL)
    if shown is None and images.pixels is None:
        shown = Image.new("L", (_THUMBNAIL, _THUMBNAIL), 128)
    if shown is None:
        pixels = images.pixels[index]
        if pixels.dtype != np.uint8:
            pixels = eight_bits(pixels, Scale(float(pixels.min()), float(pixels.max())))
        shown = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    shown.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    shown.save(buffer, "WEBP", quality=75)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _figure(figure: Figure, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    content = base64.b64encode(buffer.getvalue()).decode()
    words = _text(caption)
    image = f'<img src="data:image/png;base64,{content}" alt="{words}">'
    return f'<figure>{image}<figcaption class="note">{words}</figcaption></figure>'


def _learned(model: Any) -> str:
    """First-layer kernels, where the method has patches of the image to show."""
    kernels = getattr(model, "first_kernels", lambda: None)()
    if kernels is None or not np.isfinite(kernels).all():
        return ""
    return "<h2>What was learned</h2>" + _figure(figures.kernels_grid(kernels), "Kernels of the first layer")


def _confusion(images: Images, report: "Report") -> str:
    if images.labels is None or max(report.num_clusters, len(images.classes)) > _MAX_TABLE:
        return ""
    table = np.zeros((len(images.classes), report.num_clusters), int)
    np.add.at(table, (images.labels, report.labels), 1)
    rows = [[name, *row] for name, row in zip(images.classes, table, strict=True)]
    header = ["label", *map(str, range(report.num_clusters))]
    return "<h2>Labels (rows) and clusters (columns)</h2>" + _table(header, rows)


def _left_out(images: Images) -> str:
    if not images.left_out:
        return ""
    kinds = "".join(f"<li>{_text(line)}</li>" for line in kinds_left_out(images.left_out))
    rest = len(images.left_out) - _LISTED
    more = f"<p>… and {rest:,} more.</p>" if rest > 0 else ""
    listed = _table(["file", "why"], images.left_out[:_LISTED])
    return f"<h2>Left out: {len(images.left_out):,} files</h2><ul>{kinds}</ul>{listed}{more}"
