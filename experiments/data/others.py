"""Data sets that are bundled with scikit-learn, in files of their own, prepared by tfds, or the user's."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from experiments.data import originals
from experiments.data.originals import Arrays, DataError, NotFoundError, Sourced
from sul_jax.cli import images as user_images
from sul_jax.cli.arrays import check_images, read_arrays

# Columbia's object images, gray, 64×64: all of them serve as training and as test images.
COIL = {"coil20": "coil20_64.npz", "coil100": "coil100_gray64.npz"}
# CIFAR-10 in its original order, as losslessly compressed strips of 500 images and arrays of labels.
CIFAR10 = {"train": 50_000, "test": 10_000}
# Read from tfds's prepared data: tfds's name and the feature that is the label.
PREPARED = {
    "cifar10": ("cifar10", "label"),
    "cifar20": ("cifar100", "coarse_label"),
    "stl10": ("stl10", "label"),
    "svhn_cropped": ("svhn_cropped", "label"),
    "imagenet32": ("imagenet_resized/32x32", "label"),
}


def both_splits(images: np.ndarray, labels: np.ndarray | None) -> Arrays:
    """All of them to train on and all of them to test on."""
    return {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}


def digits() -> Sourced:
    """Scikit-learn's bundled digits."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = np.round(digits.images * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(i).resize((28, 28), Image.Resampling.BICUBIC)) for i in small]
    source = "scikit-learn's bundled 8×8 digits, bicubic to 28×28; all of them for training and test"
    return source, both_splits(np.stack(large)[..., None], digits.target.astype(np.int32))


def photographs() -> Sourced:
    """Scikit-learn's bundled photographs."""
    from sklearn.datasets import load_sample_images

    tiles = []
    for photograph in load_sample_images().images:
        height, width = (side // 32 for side in photograph.shape[:2])
        cut = photograph[: 32 * height, : 32 * width].reshape(height, 32, width, 32, 3)
        tiles.append(cut.transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3))
    source = "scikit-learn's two sample photographs, cut into tiles of 32×32 pixels"
    return source, both_splits(np.concatenate(tiles).astype(np.uint8), None)


BUNDLED: dict[str, Callable[[], Sourced]] = {"digits": digits, "photographs": photographs}


def coil(name: str, directory: Path | None) -> Sourced:
    """COIL, arrays in one file."""
    path = _in_directory(name, COIL[name], directory, "with arrays images [num, 64, 64] and labels [num]")
    return COIL[name], both_splits(*read_arrays(path))


def usps(name: str, directory: Path | None) -> Sourced:
    """USPS's digits, in HDF5."""
    groups = "with groups train and test of data [num, 256] and target [num]"
    path = _in_directory(name, "usps.h5", directory, groups)
    h5py = originals.imported("h5py")
    arrays: Arrays = {}
    try:
        with h5py.File(path) as file:
            for split in ("train", "test"):
                images, labels = (np.asarray(file[split][name]) for name in ("data", "target"))
                arrays[f"{split}_images"] = check_images(images.reshape(-1, 16, 16), str(path))
                arrays[f"{split}_labels"] = labels.astype(np.int32)
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{path} is not a readable USPS file ({error})") from None
    return "usps.h5", arrays


def prepared(name: str, directory: Path | None) -> Sourced:
    """Data that tfds has prepared, or CIFAR-10's strips."""
    theirs, label = PREPARED[name]
    version = originals.prepared_in(theirs, directory)
    if version is not None:
        key = originals.fingerprint(sorted(version.iterdir()))
        read = partial(originals.read_prepared, theirs, version, label)
        return "prepared tfds data", originals.decoded(f"{name}-{key}", read)
    if name == "cifar10" and directory is not None:
        folder = directory / name
        files = sorted([*folder.glob("*.webp"), *folder.glob("*_labels.npy")])
        if files:
            lossy = sum(len(np.load(path)) for path in folder.glob("*_lossy_indices.npy"))
            source = "strips of 500 images" + (f", {lossy} images not exact (JPEG)" if lossy else "")
            key = originals.fingerprint(files)
            return source, originals.decoded(f"{name}-{key}", lambda: _cifar10_strips(folder))
    or_strips = ", or train_00000.webp … with train_labels.npy there" if name == "cifar10" else ""
    raise _not_found(name, f"tfds's prepared array_record data in {theirs}/{or_strips}")


def folder_of_images(folder: Path, size: int | None) -> Sourced:
    """Pictures of a folder or of its sub-folders, the classes: shorter side to `size`, the middle square."""
    if not folder.is_dir():
        raise DataError(f"dataset {str(folder)!r} is not a folder")
    if size is None:
        raise DataError(
            f"dataset {str(folder)!r} is a folder: nmce_images takes it with --image-size, "
            "sul-jax cluster takes it directly; the other experiments take FILE.npz"
        )
    pictures = user_images.read(folder, size, colour=True)
    if len({file.parent == folder for file in pictures.files}) == 2:
        raise DataError(f"{str(folder)!r} holds both images and sub-folders: put all images in sub-folders")
    print("\n".join(user_images.summary(pictures)))
    return f"a folder, the middle {size}×{size}", both_splits(pictures.pixels, pictures.labels)


def _in_directory(name: str, file: str, directory: Path | None, content: str) -> Path:
    """A file of the data directory."""
    path = None if directory is None else directory / name / file
    if path is None or not path.exists():
        raise _not_found(name, f"{name}/{file} {content}")
    return path


def _not_found(name: str, missing: str) -> NotFoundError:
    where = "the data directory (--data-dir or SUL_JAX_DATA)"
    return NotFoundError(f"{name} is not in {where}; expected there: {missing}")


def _cifar10_strips(folder: Path) -> Arrays:
    arrays: Arrays = {}
    for split, number in CIFAR10.items():
        strips = [_strip(path) for path in sorted(folder.glob(f"{split}_*.webp"))]
        labels = folder / f"{split}_labels.npy"
        classes = np.load(labels).astype(np.int32) if labels.exists() else np.zeros(0, np.int32)
        images = sum(map(len, strips))
        if (images, classes.shape) != (number, (number,)):
            raise DataError(f"{folder} holds {images} {split} images, {len(classes)} labels, not {number}")
        arrays |= {f"{split}_images": np.concatenate(strips), f"{split}_labels": classes}
    return arrays


def _strip(path: Path) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.width != 32:
                raise ValueError(f"its width is {image.width}")
            return np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3)
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise DataError(f"{path} is not a readable strip of 32×32 images ({error})") from None
