"""Images as arrays: their check, and .npz files of them."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from sul_jax.cli.options import ConfigError


def read_arrays(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Images and labels of an .npz file.

    Args:
      path: a file with an array `images`, see `check_images`, and perhaps integers `labels`.

    Raises:
      ConfigError: no such file, or arrays that cannot be used.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> import numpy as np
      >>> from sul_jax.cli import arrays
      >>> file = Path(tempfile.mkdtemp()) / "mine.npz"
      >>> np.savez(file, images=np.zeros((5, 8, 8), np.uint8))
      >>> arrays.read_arrays(file)[0].shape
      (5, 8, 8, 1)
    """
    try:
        with np.load(path) as arrays:
            stored = {key: arrays[key] for key in arrays.files if key in ("images", "labels")}
    except FileNotFoundError:
        raise ConfigError(f"{str(path)!r} does not exist") from None
    except (OSError, ValueError, TypeError, EOFError, MemoryError, zlib.error, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is not a readable .npz file ({error})") from None
    if "images" not in stored:
        raise ConfigError(f"{path} has no array named 'images'")
    images = check_images(stored["images"], str(path))
    labels = stored.get("labels")
    if labels is None:
        return images, None
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ConfigError(
            f"labels in {path} must be {images.shape[0]} integers, one for each image, "
            f"got shape {labels.shape} of {labels.dtype}"
        )
    if labels.min() < -(2**31) or labels.max() >= 2**31:  # they would become others
        raise ConfigError(f"labels in {path} go from {labels.min()} to {labels.max()}, beyond 32 bits")
    return images, labels.astype(np.int32)


def check_images(images: np.ndarray, where: str) -> np.ndarray:
    """Images as `[num, height, width, channels]`, uint8 or float32.

    Args:
      images: with or without channels, uint8 or floating.
      where: they come from, for errors.

    Raises:
      ConfigError: wrong shape or type, no images, NaN or infinite pixels.

    Example:
      >>> import numpy as np
      >>> from sul_jax.cli import arrays
      >>> arrays.check_images(np.zeros((5, 8, 8)), "a test").dtype
      dtype('float32')
    """
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or 0 in images.shape:
        raise ConfigError(
            f"images in {where} must have shape [num, height, width] or [num, height, width, "
            f"channels], none of them zero; got {images.shape}"
        )
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind != "f":
        raise ConfigError(f"images in {where} must be uint8 or floating, got {images.dtype}")
    with np.errstate(over="ignore"):
        images = images.astype(np.float32)
    bad = np.count_nonzero(~np.isfinite(images))
    if bad:
        raise ConfigError(f"images in {where} hold {bad} NaN or infinite pixels; all must be finite")
    return images
