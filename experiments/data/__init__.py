"""Data sets as NumPy arrays: `load("mnist")`.

Data sets are read with TensorFlow Datasets but without TensorFlow. Data that tfds has prepared are
read in place; the original files of MNIST and Fashion-MNIST, found in the data directory or fetched,
are turned into tfds data once; decoded arrays are kept in the cache, so that the next start takes a
fraction of a second. `originals` reads these, `others` all else.

The data directory is `data_dir` or `$SUL_JAX_DATA`; it is never written to. The cache is
`$SUL_JAX_CACHE`, by default `~/.cache/sul_jax`.
"""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data import originals, others
from experiments.data.originals import ORIGINALS as ORIGINALS
from experiments.data.originals import DataError as DataError
from experiments.data.originals import NotFoundError, Sourced
from experiments.data.originals import cache_dir as cache_dir
from experiments.data.originals import read_idx as read_idx
from experiments.data.others import BUNDLED, COIL, PREPARED, both_splits
from sul_jax._files import atomic_path as atomic_path
from sul_jax.cli.arrays import check_images as check_images
from sul_jax.cli.arrays import read_arrays


@dataclass(frozen=True)
class Split:
    """Images and their labels; `split[:100]`, `split[mask]` and `split[indices]` are some of them.

    Attributes:
      images: `[num, height, width, channels]`.
      labels: int32 `[num]` or None.

    Example:
      >>> import numpy as np
      >>> from experiments.data import Split
      >>> some = Split(np.zeros((5, 4, 4, 1)), np.array([0, 0, 1, 2, 2]))[:3]
      >>> len(some), some.num_classes
      (3, 2)
    """

    images: Any
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, chosen: Any) -> "Split":
        return Split(self.images[chosen], None if self.labels is None else self.labels[chosen])

    @property
    def num_classes(self) -> int | None:
        """Of the labels, if there are any."""
        return None if self.labels is None else len(np.unique(self.labels))


@dataclass(frozen=True)
class Dataset:
    """Images and, where there are any, labels.

    Attributes:
      name: tfds's name where tfds has the data set.
      train_images: `[num_train, height, width, channels]`, uint8 or finite float32.
      train_labels: int32 `[num_train]` or None.
      test_images: as `train_images`.
      test_labels: int32 `[num_test]` or None.
      source: where the data came from, in words.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray | None
    test_images: np.ndarray
    test_labels: np.ndarray | None
    source: str

    @property
    def train(self) -> Split:
        """To learn from."""
        return Split(self.train_images, self.train_labels)

    @property
    def test(self) -> Split:
        """To judge by."""
        return Split(self.test_images, self.test_labels)

    @property
    def is_one_set(self) -> bool:
        """Whether all images are training and test images at once."""
        return self.train_images is self.test_images


def split(
    dataset: Dataset, num_train: int | None, num_test: int | None
) -> tuple[np.ndarray, dict[str, Split], int]:
    """Training images; where there are labels, training and test sets and the number of classes, else 1.

    Of data that come as one set, every fifth is a test image.
    """
    train, test = dataset.train, dataset.test
    if train.labels is None or test.labels is None:
        return train.images[:num_train], {}, 1
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    if dataset.is_one_set:
        held = np.arange(len(train)) % 5 == 4
        train, test = train[~held], train[held]
    train, test = train[:num_train], test[:num_test]
    return train.images, {"train": train, "test": test}, classes


_READERS: dict[str, Callable[[str, Path | None], Sourced]] = {
    **dict.fromkeys(ORIGINALS, originals.load),
    "usps": others.usps,
    **dict.fromkeys(COIL, others.coil),
    **dict.fromkeys(PREPARED, others.prepared),
}
NAMES = ("auto", *_READERS, *BUNDLED)
# What `auto` may mean: the data set that is wanted, and the bundled one that stands in for it.
GRAY, COLOUR = ("mnist", "digits"), ("cifar10", "photographs")
_TITLES = {
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
    "imagenet32": "ImageNet at 32×32 pixels",
    "digits": "bundled digits",
    "photographs": "bundled photographs",
}


def load(
    name: str = "auto",
    data_dir: str | Path | None = None,
    *,
    image_size: int | None = None,
    auto: tuple[str, str] = GRAY,
) -> Dataset:
    """Loads a data set by name, or a user's own `.npz` file or folder of images.

    Args:
      name: `mnist`, `fashion_mnist`, `usps` (16×16 digits, `usps/usps.h5`), `coil20`, `coil100` (gray 64×64
        images of objects: the data directory's `coil20/coil20_64.npz` and `coil100/coil100_gray64.npz`),
        `cifar10` (tfds's prepared data, or strips of 500 images one below the other,
        `cifar10/train_00000.webp` …), `cifar20` (CIFAR-100's 20 coarse classes), `stl10`, `svhn_cropped` and
        `imagenet32` (tfds's prepared data; of the last `imagenet_resized/32x32`), `digits` (scikit-learn's
        bundled 8×8 digits, enlarged to 28×28; all 1,797 serve as training and as test images), `photographs`
        (scikit-learn's two sample photographs, cut into 520 tiles of 32×32 pixels; no labels), a path that
        ends in `.npz` (`images` `[num, height, width]` or `[num, height, width, channels]`, uint8 or
        floating; optionally `labels` `[num]`), a folder with a separator in its name (`./photos`; its
        sub-folders, where there are any, are the classes), or `auto`: MNIST if it is on disk or can be
        fetched within seconds, otherwise `digits`, which is said in one line. A name is never replaced by
        another data set.
      data_dir: folder of data sets: tfds's own, or `<name>/` with the original files.
      image_size: side of the square in the middle of a folder's images, which are RGB; needed there, and
        without effect elsewhere.
      auto: the data set that `auto` looks for, and the bundled one that it takes instead.

    Returns:
      A `Dataset`.

    Raises:
      DataError: unknown name, nothing found, corrupt files or unusable arrays.

    Example:
      >>> from experiments import data
      >>> data.load("digits").train_images.shape
      (1797, 28, 28, 1)
    """
    # With its suffix or separator the name of a user's own data can't be taken for a published one's.
    if str(name).endswith(".npz"):
        path = Path(name)
        return _dataset(path.name, (str(path), both_splits(*read_arrays(path))))
    if os.sep in str(name):
        path = Path(name)
        return _dataset(path.resolve().name + os.sep, others.folder_of_images(path, image_size))
    if name not in NAMES:
        accepted = f"{', '.join(NAMES)}, FILE.npz, or (nmce_images) a folder as ./FOLDER"
        raise DataError(f"dataset {name!r} is unknown; accepted: {accepted}")
    if name in BUNDLED:
        return _dataset(name, BUNDLED[name]())
    given = data_dir if data_dir is not None else os.environ.get("SUL_JAX_DATA")
    directory = None if given is None else Path(given)
    if directory is not None and not directory.is_dir():
        raise DataError(f"data_dir={str(given)!r} is not a folder")
    return _auto(directory, *auto) if name == "auto" else _dataset(name, _READERS[name](name, directory))


def _dataset(name: str, sourced: Sourced) -> Dataset:
    source, arrays = sourced
    return Dataset(name, source=source, **arrays)


def _auto(directory: Path | None, wanted: str, bundled: str) -> Dataset:
    """The data set that is wanted where it is near, otherwise the bundled one, which is said."""
    read = partial(originals.load, patience=10.0) if wanted in ORIGINALS else _READERS[wanted]
    try:
        return _dataset(wanted, read(wanted, directory))
    except NotFoundError:
        print(
            f"{_TITLES[wanted]} is not on disk (--data-dir or SUL_JAX_DATA) and was not fetched quickly: "
            f"using scikit-learn's {_TITLES[bundled]}."
        )
        return load(bundled)


def joined(dataset: Dataset) -> Dataset:
    """Both splits of a labelled data set as one, to learn from and to be judged on.

    Example:
      >>> import numpy as np
      >>> from experiments import data
      >>> part = np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int32)
      >>> data.joined(data.Dataset("name", *part, *part, "source")).test_images.shape
      (4, 4, 4, 1)
    """
    assert dataset.train_labels is not None
    assert dataset.test_labels is not None
    images = np.concatenate([dataset.train_images, dataset.test_images])
    labels = np.concatenate([dataset.train_labels, dataset.test_labels])
    return dataclasses.replace(dataset, **both_splits(images, labels))


def check_unit_range(images: np.ndarray) -> None:
    """Raises `DataError` where floating pixels leave [0, 1], in which colours are changed."""
    if images.dtype != np.uint8 and not (images.min() >= 0 and images.max() <= 1):
        raise DataError(f"floating images must be in [0, 1], not {images.min():.4g} to {images.max():.4g}")
