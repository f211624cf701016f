"""One picture of any kind: what Pillow opens, upright, on a ground that shows it, in a few words if not."""

import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Lightness from which on a drawing on a transparent ground is put on black: three quarters of white.
_LIGHT = 191
# The shorter side of a picture, of which half is more than anyone clusters.
_LARGE = 2048
# PostScript is a program, which Ghostscript would run; the others name kinds that only other programs read.
_NOT_READ = frozenset({"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"})
# Without a signature in the file: nearly anything could be one, so the ending decides.
_BY_ENDING = frozenset({"TGA", "SPIDER", "PCD", "IMT", "XVTHUMB", "IPTC"})


class Scale(NamedTuple):
    """The values that become black and white in pictures of more than 8 bits.

    Attributes:
      low: black.
      high: white.
    """

    low: float
    high: float


class PictureError(ValueError):
    """A file that is no picture or a damaged one, said in a few words without its place."""


class Opened(NamedTuple):
    """A picture as it is in its file.

    Attributes:
      image: upright and opaque, in mode RGB, or in F if it has more than 8 bits.
      frames: pictures in the file, of which this is the first.
      cut: whether Pillow has cut colours of 16 bits to 8.
    """

    image: Image.Image
    frames: int
    cut: bool


@contextmanager
def quietly() -> Iterator[None]:
    """Without Pillow's warnings: of many pixels, which are made fewer, and of details of no matter here.

    Filters of warnings are the process's: to be entered by one thread around all that others do.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_picture(file: Path, *, side: int | None = None) -> Opened:
    """A file's first picture; to be called within `quietly`.

    Args:
      file: told by its content, not by its ending.
      side: of the square that the picture will be made to fit: a JPEG is decoded at a part of its size, still
        at least twice that.

    Raises:
      PictureError: no picture, a damaged one, or values that are not finite.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # reading a pipe would wait without end
            raise PictureError("not a regular file")
        with Image.open(file, formats=_formats()) as image:
            if image.format in _BY_ENDING and Image.EXTENSION.get(file.suffix.lower()) != image.format:
                raise PictureError("not a picture")
            frames = int(getattr(image, "n_frames", 1))
            cut = image.mode != "I;16" and any("16" in str(tile[3]) for tile in image.tile)
            cut = cut and not image.mode.startswith(("I", "F"))
            if side is not None:
                image.draft(None, (2 * side, 2 * side))
            ImageOps.exif_transpose(image, in_place=True)
            return Opened(_plain(_no_larger_than_needed(image)), frames, cut)
    except PictureError:
        raise
    except UnidentifiedImageError:
        empty = "empty" if file.stat().st_size == 0 else "not a picture"
        raise PictureError(empty) from None
    except Image.DecompressionBombError:
        raise PictureError("too many pixels") from None
    except MemoryError:
        raise PictureError("does not fit into memory") from None
    except Exception as error:  # Pillow's decoders raise many types for what is damaged
        words = str(getattr(error, "strerror", None) or error) or type(error).__name__
        raise PictureError(words.splitlines()[0].replace(str(file), file.name)[:200]) from None


def picture(file: Path, scale: Scale | None = None, *, side: int | None = None) -> Image.Image:
    """A file's first picture, upright and opaque, in RGB with 8 bits a channel.

    Args:
      file: the file.
      scale: of pictures of more than 8 bits; by default the range of this one.
      side: as in `open_picture`.

    Raises:
      PictureError: as `open_picture`.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> import numpy as np
      >>> from PIL import Image
      >>> from sul_jax.cli.pictures import Scale, picture
      >>> file = Path(tempfile.mkdtemp()) / "depth.png"
      >>> Image.fromarray(np.array([[0, 500, 1000]], np.uint16)).save(file)
      >>> picture(file, Scale(0, 1000)).getpixel((1, 0))
      (128, 128, 128)
    """
    with quietly():
        image = open_picture(file, side=side).image
    if image.mode != "F":
        return image
    values = np.asarray(image)
    own = scale if scale is not None else Scale(float(values.min()), float(values.max()))
    return Image.fromarray(eight_bits(values, own)).convert("RGB")


def eight_bits(values: np.ndarray, scale: Scale) -> np.ndarray:
    """Values on a scale as uint8.

    Args:
      values: of any shape.
      scale: what becomes 0 and 255; values beyond it are clipped.

    Example:
      >>> import numpy as np
      >>> from sul_jax.cli.pictures import Scale, eight_bits
      >>> eight_bits(np.array([10.0, 20.0, 99.0]), Scale(10, 30)).tolist()
      [0, 128, 255]
    """
    width = scale.high - scale.low
    shares = (values.astype(np.float64) - scale.low) / (width if width > 0 else 1.0)
    return np.round(255 * np.clip(shares, 0, 1)).astype(np.uint8)


def _no_larger_than_needed(image: Image.Image) -> Image.Image:
    """Very large pictures at a part of their size: all that follows holds them several times."""
    factor = min(image.size) // _LARGE
    if factor < 2 or image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
        return image
    return image.reduce(factor)


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in Image.OPEN if name not in _NOT_READ]


def _plain(image: Image.Image) -> Image.Image:
    """In mode RGB, or in F with finite values."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float32)
        if not np.isfinite(values).all():
            raise PictureError("holds values that are not finite")
        return Image.fromarray(values)
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("P", "LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, _ground(image)), image).convert("RGB")
    return image.convert("RGB")


def _ground(image: Image.Image) -> str:
    """White, but black below a drawing that is light itself."""
    small = image if max(image.size) <= 256 else image.resize((256, 256), Image.Resampling.BOX)
    opacity = np.asarray(small.getchannel("A"), np.float64)
    if opacity.min() == 255 or opacity.max() == 0:
        return "white"
    lightness = np.asarray(small.convert("RGB").convert("L"), np.float64)
    return "black" if np.average(lightness, weights=opacity) >= _LIGHT else "white"
