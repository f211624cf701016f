"""Data sets as NumPy arrays: `load("mnist")`.

Data sets are read with TensorFlow Datasets but without TensorFlow. Data that tfds has prepared are
read in place; the original files of MNIST and Fashion-MNIST, found in the data directory or fetched,
are turned into tfds data once, by builders that only need NumPy and Pillow; decoded arrays are kept
in the cache, so that the next start takes a fraction of a second.

The data directory is `data_dir` or `$SUL_JAX_DATA`; it is never written to. The cache is
`$SUL_JAX_CACHE`, by default `~/.cache/sul_jax`.
"""

import dataclasses
import gzip
import hashlib
import http.client
import os
import struct
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sul_jax._files import atomic_path as atomic_path
from sul_jax.cli import images as user_images
from sul_jax.cli.arrays import check_images as check_images
from sul_jax.cli.arrays import read_arrays
from sul_jax.cli.options import ConfigError

# Data that cannot be used are an error of one line, as options are.
DataError = ConfigError


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


class _Original(NamedTuple):
    """The original files of a data set: split → (images, labels), each with its sha256."""

    version: str
    url: str
    shape: tuple[int, int, int]
    num_classes: int
    files: dict[str, tuple[tuple[str, str], tuple[str, str]]]


ORIGINALS = {
    "mnist": _Original(
        "3.0.1",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        (28, 28, 1),
        10,
        {
            "train": (
                (
                    "train-images-idx3-ubyte.gz",
                    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                ),
                (
                    "train-labels-idx1-ubyte.gz",
                    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                ),
            ),
            "test": (
                (
                    "t10k-images-idx3-ubyte.gz",
                    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                ),
                (
                    "t10k-labels-idx1-ubyte.gz",
                    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
                ),
            ),
        },
    ),
    "fashion_mnist": _Original(
        "3.0.1",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        (28, 28, 1),
        10,
        {
            "train": (
                (
                    "train-images-idx3-ubyte.gz",
                    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                ),
                (
                    "train-labels-idx1-ubyte.gz",
                    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                ),
            ),
            "test": (
                (
                    "t10k-images-idx3-ubyte.gz",
                    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                ),
                (
                    "t10k-labels-idx1-ubyte.gz",
                    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
                ),
            ),
        },
    ),
}
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
NAMES = ("auto", *ORIGINALS, "usps", *COIL, *PREPARED, "digits", "photographs")
# What `auto` may mean: the data set that is wanted, and the bundled one that stands in for it.
GRAY, COLOUR = ("mnist", "digits"), ("cifar10", "photographs")


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
    if str(name).endswith(".npz"):
        return _load_npz(Path(name))
    if os.sep in str(name):
        return _load_folder(Path(name), image_size)
    if name not in NAMES:
        accepted = f"{', '.join(NAMES)}, FILE.npz, or (nmce_images) a folder as ./FOLDER"
        raise DataError(f"dataset {name!r} is unknown; accepted: {accepted}")
    if name in _BUNDLED:
        return _BUNDLED[name]()
    directory = data_dir if data_dir is not None else os.environ.get("SUL_JAX_DATA")
    if directory is not None and not Path(directory).is_dir():
        raise DataError(f"data_dir={str(directory)!r} is not a folder")
    if name in COIL:
        return _coil(name, directory)
    if name == "usps":
        return _usps(directory)
    if name in PREPARED:
        return _prepared_data(name, directory)
    if name == "auto":
        wanted, bundled = auto
        try:
            if wanted in ORIGINALS:
                return _from_tfds(wanted, directory, patience=10.0)
            return load(wanted, directory)
        except _NotFoundError:
            print(
                f"{_TITLES[wanted]} is neither on disk (--data-dir or SUL_JAX_DATA) nor quickly fetched: "
                f"running on scikit-learn's {_TITLES[bundled]}."
            )
            return load(bundled)
    return _from_tfds(name, directory, patience=300.0)


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
    return dataclasses.replace(
        dataset, train_images=images, train_labels=labels, test_images=images, test_labels=labels
    )


def read_idx(path: Path) -> np.ndarray:
    """Reads a gzipped IDX file of unsigned bytes.

    Raises:
      DataError: the file is truncated, corrupt or of another kind.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a complete gzip file ({error})") from None
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise DataError(f"{path} is not an IDX file of unsigned bytes: it starts with {raw[:4]!r}")
    axes = raw[3]
    header = 4 + 4 * axes
    if len(raw) < header:
        raise DataError(f"{path} is truncated: {len(raw)} bytes do not hold its {header} of header")
    shape = struct.unpack(f">{axes}I", raw[4:header])
    if len(raw) - header != np.prod(shape, dtype=np.int64):
        raise DataError(
            f"{path} is truncated or corrupt: its header announces shape {shape}, "
            f"but {len(raw) - header} values follow"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def cache_dir() -> Path:
    """`$SUL_JAX_CACHE`, by default `sul_jax` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sul_jax"
    return Path(os.environ.get("SUL_JAX_CACHE", default))


class _NotFoundError(DataError):
    """Neither on disk nor fetched."""


def _from_tfds(name: str, directory: str | Path | None, *, patience: float) -> Dataset:
    original = ORIGINALS[name]
    prepared = _prepared_in(name, directory)
    raw = None if directory is None else Path(directory) / name
    if raw is not None and not any((raw / file).exists() for file in _file_names(original)):
        raw = None
    # The cache entry of a folder holds for the files that were in it when it was made.
    if prepared is not None:
        source = "prepared tfds data"
        key = _fingerprint(sorted(prepared.iterdir()))
    elif raw is not None:
        source = "original files, sha256 verified"
        key = _fingerprint([raw / file for file in _file_names(original)])
    else:
        source, key = "original files, fetched, sha256 verified", "fetched"

    def read() -> dict[str, np.ndarray]:
        found = prepared
        if found is None:
            if raw is not None:
                _read_originals(name, raw)  # corrupt files are an error even where good data are cached
            found = _prepared_in(name, cache_dir() / "tfds")
        if found is None:
            found = _prepare(name, raw if raw is not None else _fetch(name, patience))
        return _read_prepared(name, found)

    return _decoded(name, f"{original.version}-{key}", source, read)


def _decoded(name: str, key: str, source: str, read: Callable[[], dict[str, np.ndarray]]) -> Dataset:
    """What `read` gives, kept in the cache under `key`."""
    cached = cache_dir() / "decoded" / f"{name}-{key}.npz"
    if cached.exists():
        try:
            with np.load(cached) as arrays:
                return Dataset(name, source=source, **{k: arrays[k] for k in arrays.files})
        except (OSError, ValueError, TypeError, KeyError, EOFError, zlib.error, zipfile.BadZipFile):
            cached.unlink(missing_ok=True)  # a damaged cache is made again
    arrays = read()
    with atomic_path(cached) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]
    return Dataset(name, source=source, **arrays)


def _fingerprint(files: list[Path]) -> str:
    """Changes when a file does; cheap, unlike hashing what is in them."""
    facts = [(str(f.absolute()), *_size_and_time(f)) for f in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def _size_and_time(file: Path) -> tuple[int, int]:
    try:
        stat = file.stat()
    except FileNotFoundError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def _file_names(original: _Original) -> list[str]:
    return [file for pair in original.files.values() for file, _ in pair]


def _prepared_in(name: str, directory: str | Path | None) -> Path | None:
    """The folder of tfds data prepared as array_record, if there is one."""
    if directory is None:
        return None
    for version in sorted((Path(directory) / name).glob("[0-9]*.[0-9]*.[0-9]*"), reverse=True):
        if (version / "dataset_info.json").exists() and list(version.glob("*.array_record*")):
            return version
    return None


def _read_originals(name: str, raw: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {
        split: (_verified(raw / images, image_digest), _verified(raw / labels, label_digest))
        for split, ((images, image_digest), (labels, label_digest)) in ORIGINALS[name].files.items()
    }


def _prepare(name: str, raw: Path) -> Path:
    """Turns the original files into tfds data in the cache."""
    original = ORIGINALS[name]
    arrays = _read_originals(name, raw)
    print(f"Preparing {name} with TensorFlow Datasets, once …", flush=True)
    tfds = _import_tfds()
    from PIL import Image

    # Registration would clash with tfds's own builder of the same name, which needs TensorFlow.
    with tfds.core.registered.skip_registration():

        class Builder(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc, name-defined]
            VERSION = tfds.core.Version(original.version)
            pkg_dir_path = Path(__file__).parent

            def _info(self) -> Any:
                features = tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=original.shape),
                        "label": tfds.features.ClassLabel(num_classes=original.num_classes),
                    }
                )
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=features,
                    supervised_keys=("image", "label"),
                    disable_shuffling=True,
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                return {split: self._generate_examples(split) for split in arrays}

            def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
                for index, (image, label) in enumerate(zip(*arrays[split], strict=True)):
                    yield index, {"image": Image.fromarray(image), "label": int(label)}

    Builder.name = name
    builder = Builder(data_dir=str(cache_dir() / "tfds"), file_format="array_record")
    with _quiet_progress(tfds):
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=str(raw), try_download_gcs=False)
        )
    prepared = _prepared_in(name, cache_dir() / "tfds")
    if prepared is None:
        raise DataError(f"tfds prepared no array_record data of {name} in {cache_dir() / 'tfds'}")
    return prepared


def _read_prepared(name: str, prepared: Path, label: str = "label") -> dict[str, np.ndarray]:
    tfds = _import_tfds()
    directory = prepared.parents[1 + name.count("/")]
    sources = tfds.data_source(f"{name}:{prepared.name}", data_dir=str(directory), split=None)
    arrays: dict[str, np.ndarray] = {}
    for split in ("train", "test"):
        source = sources[split if split in sources else "validation"]
        images: list[np.ndarray] = []
        labels: list[int] = []
        for start in range(0, len(source), 5000):
            for record in source.__getitems__(range(start, min(start + 5000, len(source)))):
                images.append(record["image"])
                labels.append(record[label])
        arrays[f"{split}_images"] = np.stack(images)
        arrays[f"{split}_labels"] = np.asarray(labels, np.int32)
    return arrays


def _import_tfds() -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"reading this data set needs tensorflow-datasets ({error}); "
            "install it with: pip install -e '.[experiments]'"
        ) from None
    return tfds


@contextmanager
def _quiet_progress(tfds: Any) -> Iterator[None]:
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        tfds.enable_progress_bar()


def _verified(path: Path, digest: str) -> np.ndarray:
    if not path.exists():
        raise DataError(f"{path} is missing; the folder must hold all four original files")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != digest:
        # Say what is wrong with the content where that can be told.
        read_idx(path)
        raise DataError(f"{path} is corrupt: its sha256 is {found}, expected {digest}")
    return read_idx(path)


def _fetch(name: str, patience: float) -> Path:
    """Downloads the original files into the cache; `patience` bounds the whole time in seconds."""
    original = ORIGINALS[name]
    folder = cache_dir() / "originals" / name
    deadline = time.monotonic() + patience
    for pair in original.files.values():
        for file, digest in pair:
            path = folder / file
            if path.exists():
                continue
            try:
                with (
                    urllib.request.urlopen(original.url + file, timeout=min(3.0, patience)) as reply,
                    atomic_path(path) as temporary,
                    open(temporary, "wb") as out,
                ):
                    while block := reply.read(2**16):
                        if time.monotonic() > deadline:
                            raise TimeoutError(f"not done within {patience:.0f} s")
                        out.write(block)
                    out.flush()
                    if hashlib.sha256(temporary.read_bytes()).hexdigest() != digest:
                        raise OSError("its sha256 is not the expected one")
            except (OSError, http.client.HTTPException) as error:
                raise _NotFoundError(
                    f"{name} is not in the data directory (--data-dir or SUL_JAX_DATA, which would "
                    f"hold {name}/{file}) and could not be fetched from {original.url}: {error}"
                ) from None
    return folder


def _digits() -> Dataset:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.stack(
        [np.asarray(Image.fromarray(i).resize((28, 28), Image.Resampling.BICUBIC)) for i in small]
    )[..., None]
    labels = digits.target.astype(np.int32)
    source = "scikit-learn's bundled 8×8 digits, bicubic to 28×28; all of them for training and test"
    return Dataset("digits", images, labels, images, labels, source)


def _photographs() -> Dataset:
    from sklearn.datasets import load_sample_images

    tiles = []
    for photograph in load_sample_images().images:
        height, width = (side // 32 for side in photograph.shape[:2])
        cut = photograph[: 32 * height, : 32 * width].reshape(height, 32, width, 32, 3)
        tiles.append(cut.transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3))
    images = np.concatenate(tiles).astype(np.uint8)
    source = "scikit-learn's two sample photographs, cut into tiles of 32×32 pixels"
    return Dataset("photographs", images, None, images, None, source)


_BUNDLED: dict[str, Callable[[], Dataset]] = {"digits": _digits, "photographs": _photographs}
_TITLES = {
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
    "imagenet32": "ImageNet at 32×32 pixels",
    "digits": "bundled digits",
    "photographs": "bundled photographs",
}


def _coil(name: str, directory: str | Path | None) -> Dataset:
    path = None if directory is None else Path(directory) / name / COIL[name]
    if path is None or not path.exists():
        raise _NotFoundError(
            f"{name} is not in the data directory (--data-dir or SUL_JAX_DATA), which would hold "
            f"{name}/{COIL[name]} with arrays images [num, 64, 64] and labels [num]"
        )
    return dataclasses.replace(_load_npz(path), name=name, source=COIL[name])


def _usps(directory: str | Path | None) -> Dataset:
    path = None if directory is None else Path(directory) / "usps" / "usps.h5"
    if path is None or not path.exists():
        raise _NotFoundError(
            "usps is not in the data directory (--data-dir or SUL_JAX_DATA), which would hold usps/usps.h5 "
            "with groups train and test of data [num, 256] and target [num]"
        )
    try:
        import h5py
    except ImportError as error:
        raise DataError(f"reading USPS needs h5py ({error}); install it with: pip install h5py") from None

    arrays = {}
    try:
        with h5py.File(path) as file:
            for split in ("train", "test"):
                images, labels = (np.asarray(file[split][name]) for name in ("data", "target"))
                arrays[f"{split}_images"] = check_images(images.reshape(-1, 16, 16), str(path))
                arrays[f"{split}_labels"] = labels.astype(np.int32)
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{path} is not a readable USPS file ({error})") from None
    return Dataset("usps", source="usps.h5", **arrays)


def _prepared_data(name: str, directory: str | Path | None) -> Dataset:
    theirs, label = PREPARED[name]
    prepared = _prepared_in(theirs, directory)
    if prepared is not None:
        return _decoded(
            name, _fingerprint(sorted(prepared.iterdir())), "prepared tfds data",
            lambda: _read_prepared(theirs, prepared, label),
        )  # fmt: skip
    if name == "cifar10" and directory is not None:
        folder = Path(directory) / name
        files = sorted([*folder.glob("*.webp"), *folder.glob("*_labels.npy")])
        if files:
            lossy = sum(len(np.load(path)) for path in folder.glob("*_lossy_indices.npy"))
            source = "strips of 500 images" + (f", {lossy} images not exact (JPEG)" if lossy else "")
            return _decoded(name, _fingerprint(files), source, lambda: _cifar10_strips(folder))
    raise _NotFoundError(
        f"{name} is not in the data directory (--data-dir or SUL_JAX_DATA), which would hold tfds's "
        f"prepared array_record data in {theirs}/"
        + (", or train_00000.webp … with train_labels.npy there" if name == "cifar10" else "")
    )


def _cifar10_strips(folder: Path) -> dict[str, np.ndarray]:
    arrays = {}
    for split, number in CIFAR10.items():
        strips = [_strip(path) for path in sorted(folder.glob(f"{split}_*.webp"))]
        labels = folder / f"{split}_labels.npy"
        found = np.load(labels).astype(np.int32) if labels.exists() else np.zeros(0, np.int32)
        if (sum(map(len, strips)), found.shape) != (number, (number,)):
            raise DataError(
                f"{folder} holds {sum(map(len, strips))} {split} images and {len(found)} labels, not "
                f"{number} of each"
            )
        arrays[f"{split}_images"] = np.concatenate(strips)
        arrays[f"{split}_labels"] = found
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


def _load_folder(folder: Path, size: int | None) -> Dataset:
    """Pictures of a folder or of its sub-folders, the classes: shorter side to `size`, the middle square."""
    if not folder.is_dir():
        raise DataError(f"dataset {str(folder)!r} is not a folder")
    if size is None:
        raise DataError(
            f"dataset {str(folder)!r} is a folder: nmce_images takes it with --image-size, "
            "sul-jax cluster as it is; the other experiments take FILE.npz"
        )
    found = user_images.read(folder, size, colour=True)
    tops = {file.parent == folder for file in found.files}
    if len(tops) == 2:
        raise DataError(f"{str(folder)!r} holds images beside sub-folders: put them all into classes or none")
    print("\n".join(user_images.summary(found)))
    source = f"a folder, the middle {size}×{size}"
    # With a separator the name can't be taken for that of a published data set.
    name = folder.resolve().name + os.sep
    return Dataset(name, found.pixels, found.labels, found.pixels, found.labels, source)


def _load_npz(path: Path) -> Dataset:
    images, labels = read_arrays(path)
    # With its suffix the name can't be taken for that of a published data set.
    return Dataset(path.name, images, labels, images, labels, str(path))


def check_unit_range(images: np.ndarray) -> None:
    """Raises `DataError` where floating pixels leave [0, 1], in which colours are changed."""
    if images.dtype != np.uint8 and not (images.min() >= 0 and images.max() <= 1):
        raise DataError(
            f"floating images must be in [0, 1], got values from {images.min():.4g} to {images.max():.4g}"
        )
