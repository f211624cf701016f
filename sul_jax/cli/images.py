"""The images of a user: a folder of pictures of any kinds, or the arrays of an .npz file."""

import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from sul_jax.cli.arrays import read_arrays
from sul_jax.cli.options import ConfigError
from sul_jax.cli.pictures import PictureError, Scale, eight_bits, open_picture, quietly

# Folders of this kind are parts of a data set; their sub-folders are the classes.
_SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev"})


class LeftOut(NamedTuple):
    """A file that was not read.

    Attributes:
      name: its place in the folder.
      reason: in a few words.
    """

    name: str
    reason: str


class Images(NamedTuple):
    """The images of a user.

    Attributes:
      pixels: uint8 or float32 `[num_images, height, width, channels]`, 1 or 3 channels; None where what is
        clustered is no images.
      names: of each.
      labels: int32 `[num_images]`, or None.
      classes: names of the labels.
      left_out: files that were not read.
      files: where each image is; empty for arrays.
      scale: of pictures of more than 8 bits, or None where there are none.
      notes: what else is to be said of the files, a line each.
    """

    pixels: Any
    names: list[str]
    labels: np.ndarray | None
    classes: list[str]
    left_out: list[LeftOut]
    files: list[Path]
    scale: Scale | None
    notes: list[str]


def read(
    path: Path,
    size: int,
    *,
    scale: Scale | None = None,
    colour: bool = False,
    without: Path | None = None,
) -> Images:
    """A folder's images, or an `.npz` file's.

    Args:
      path: the folder, searched with all its sub-folders, which are the classes; or the file, with an array
        `images` and perhaps `labels`.
      size: side of the square to which a folder's pictures are resized: the shorter side, then the middle.
      scale: of pictures of more than 8 bits; by default the range of all of them together.
      colour: keep three channels where all pictures are gray.
      without: a folder inside that is not searched.

    Raises:
      ConfigError: nothing that can be read.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from PIL import Image
      >>> from sul_jax.cli import images
      >>> folder = Path(tempfile.mkdtemp())
      >>> for name in ("cat", "dog"):
      ...     (folder / name).mkdir()
      ...     Image.new("L", (40, 30)).save(folder / name / "1.tif")
      >>> pictures = images.read(folder, 8)
      >>> pictures.pixels.shape, pictures.classes, pictures.labels.tolist()
      ((2, 8, 8, 1), ['cat', 'dog'], [0, 1])
    """
    if path.suffix.lower() == ".npz" and not path.is_dir():
        return _of_arrays(path)
    if not path.is_dir():
        raise ConfigError(f"images={str(path)!r} is neither a folder nor an .npz file")
    files, left_out = find(path, without)
    if not files:
        raise ConfigError(f"images={str(path)!r} holds no pictures")
    pixels, read, scale, damaged, notes = _decoded(path, files, size, scale)
    if not read:
        reasons = Counter(one.reason for one in damaged)
        raise ConfigError(f"none of the {len(files)} files in {str(path)!r} can be read: {_counted(reasons)}")
    if not colour and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., :1].copy()
    labels, classes = of_folders([file.relative_to(path) for file in read])
    names = [readable(str(file.relative_to(path))) for file in read]
    return Images(pixels, names, labels, classes, left_out + damaged, read, scale, notes)


def hidden(name: str) -> bool:
    """Of programs rather than of the user: thumbnails, checkpoints, what archives add.

    Example:
      >>> from sul_jax.cli import images
      >>> images.hidden(".thumbnails"), images.hidden("__MACOSX"), images.hidden("__1.png")
      (True, True, False)
    """
    return name.startswith(".") or name == "__MACOSX"


def readable(name: str) -> str:
    """Names on disk are bytes, and not always UTF-8.

    Example:
      >>> from sul_jax.cli import images
      >>> images.readable("caf\\udce9")
      'caf\ufffd'
    """
    return os.fsencode(name).decode("utf-8", "replace")


def summary(images: Images) -> list[str]:
    """What was read and what was left out, in lines.

    Args:
      images: as read.
    """
    shape = "×".join(map(str, images.pixels.shape[1:]))
    classes = f", {len(images.classes)} classes" if images.labels is not None else ", no labels"
    lines = [f"{len(images.pixels)} images of {shape}{classes}", *images.notes]
    return lines + [f"left out: {line}" for line in kinds_left_out(images.left_out)]


def kinds_left_out(left_out: Sequence[LeftOut], most: int = 8) -> list[str]:
    """Files that were not read, counted by their ending and the reason.

    Args:
      left_out: the files.
      most: lines; what is beyond is counted in the last one.

    Example:
      >>> from sul_jax.cli import images
      >>> images.kinds_left_out([images.LeftOut("a.txt", "not a picture")] * 2)
      ['2 × .txt (not a picture)']
    """
    kinds = Counter((Path(name).suffix.lower() or "no ending", reason) for name, reason in left_out)
    lines = [f"{number} × {kind} ({reason})" for (kind, reason), number in kinds.most_common(most)]
    rest = len(left_out) - sum(number for _, number in kinds.most_common(most))
    return lines + ([f"{rest} more for other reasons, listed in the report"] if rest else [])


def _of_arrays(path: Path) -> Images:
    pixels, labels = read_arrays(path)
    if pixels.shape[-1] not in (1, 3):
        raise ConfigError(f"images in {str(path)!r} have {pixels.shape[-1]} channels; 1 or 3 are accepted")
    labels, classes = of_values(labels)
    return Images(pixels, [str(i) for i in range(len(pixels))], labels, classes, [], [], None, [])


def of_values(values: np.ndarray | None) -> tuple[np.ndarray | None, list[str]]:
    """Labels from 0, and what they stand for.

    Args:
      values: `[num_images]` of any kind, or None.
    """
    if values is None:
        return None, []
    kinds, labels = np.unique(values, return_inverse=True)
    return labels.astype(np.int32), [str(kind) for kind in kinds]


def find(folder: Path, without: Path | None = None) -> tuple[list[Path], list[LeftOut]]:
    """All files that are not hidden, links followed; each folder once, so that no loop of links matters.

    Args:
      folder: to be searched.
      without: a folder inside that is not.

    Returns:
      The files, sorted, and what could not be searched.
    """
    excluded = without.resolve() if without is not None else None
    files: list[Path] = []
    left_out: list[LeftOut] = []
    visited: set[tuple[int, int]] = set()

    def blame(name: str, reason: str) -> None:
        left_out.append(LeftOut(readable(os.path.relpath(name, folder)), reason))

    def unlistable(error: OSError) -> None:
        blame(error.filename, f"a folder that cannot be listed: {error.strerror}")

    walk = os.walk(folder, onerror=unlistable, followlinks=True)
    for place, inside, names in walk:
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in visited:
            blame(place, "a link to a folder that was read already")
            inside.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        inside[:] = sorted(
            name for name in inside if not hidden(name) and (Path(place) / name).resolve() != excluded
        )
        files += [Path(place) / name for name in names if not hidden(name)]
    return sorted(files), left_out


class _Decoded(NamedTuple):
    """Pictures of a folder, their files, their scale, what is damaged, and what is to be said."""

    pixels: np.ndarray
    files: list[Path]
    scale: Scale | None
    damaged: list[LeftOut]
    notes: list[str]


def _decoded(folder: Path, files: Sequence[Path], size: int, scale: Scale | None) -> _Decoded:
    pixels = np.empty((len(files), size, size, 3), np.uint8)
    deep: dict[int, np.ndarray] = {}
    bounds: list[float] = []
    read: list[Path] = []
    damaged: list[LeftOut] = []
    seen: Counter[str] = Counter()
    for file, fitted in zip(files, _each(files, size), strict=True):
        if isinstance(fitted, PictureError):
            damaged.append(LeftOut(readable(str(file.relative_to(folder))), str(fitted)))
            continue
        if fitted.range is not None:
            deep[len(read)] = fitted.pixels
            bounds += fitted.range
        else:
            pixels[len(read)] = fitted.pixels
        seen["several"] += fitted.frames > 1
        seen["cut"] += fitted.cut
        read.append(file)
    if deep and scale is None:
        scale = Scale(float(min(bounds)), float(max(bounds)))
    for index, values in deep.items():
        assert scale is not None
        pixels[index] = eight_bits(values, scale)[..., None]
    return _Decoded(pixels[: len(read)], read, scale, damaged, _notes(seen, len(deep), scale))


class _Fitted(NamedTuple):
    """A picture as it is clustered.

    Attributes:
      pixels: uint8 `[size, size, 3]`, or float32 `[size, size]` of more than 8 bits.
      range: of the whole picture where it has more than 8 bits.
      frames: as in `pictures.Opened`, as is `cut`.
    """

    pixels: np.ndarray
    range: tuple[float, float] | None
    frames: int
    cut: bool


def _each(files: Sequence[Path], size: int) -> Iterator[_Fitted | PictureError]:
    """All files in order, read by several threads, a few of them ahead."""
    ahead = 4 * (os.cpu_count() or 1)
    with quietly(), ThreadPoolExecutor(os.cpu_count()) as threads:
        coming: deque[Future[_Fitted | PictureError]] = deque()
        for file in tqdm(files, desc="reading", unit="file"):
            coming.append(threads.submit(_fitted, file, size))
            if len(coming) > ahead:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _fitted(file: Path, size: int) -> _Fitted | PictureError:
    try:
        image, frames, cut = open_picture(file, side=size)
    except PictureError as error:
        return error
    pixels = np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))
    bounds: Any = image.getextrema() if image.mode == "F" else None  # of a single band
    return _Fitted(pixels, bounds, frames, cut)


def _notes(seen: Counter[str], num_deep: int, scale: Scale | None) -> list[str]:
    notes = []
    if num_deep and scale is not None:
        notes.append(
            f"pictures of more than 8 bits: {num_deep}; {scale.low:g} is black, {scale.high:g} white in all"
        )
    if seen["several"]:
        notes.append(f"files with several pictures: {seen['several']}; the first of each is read")
    if seen["cut"]:
        notes.append(f"colour pictures of 16 bits: {seen['cut']}; the upper 8 bits are read")
    return notes


def of_folders(places: Sequence[Path]) -> tuple[np.ndarray | None, list[str]]:
    """Labels by the first folder in the way to each file, if all have one, and their names; splits are none.

    Args:
      places: of the files in the folder.
    """
    ways = [place.parts[:-1] for place in places]
    if all(way and way[0].lower() in _SPLITS for way in ways):
        ways = [way[1:] for way in ways]
    if not all(ways):
        return None, []
    classes = sorted({way[0] for way in ways})
    if len(classes) < 2:
        return None, []
    number = {name: index for index, name in enumerate(classes)}
    return np.array([number[way[0]] for way in ways], np.int32), [readable(name) for name in classes]


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason} ({number})" for reason, number in reasons.most_common(3))
