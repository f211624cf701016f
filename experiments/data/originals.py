"""The original files of MNIST and Fashion-MNIST, and data that TensorFlow Datasets has prepared.

The files are verified, turned into tfds data once, by a builder that only needs NumPy and Pillow, and read
through tfds from then on. What is decoded is kept in the cache.
"""

import gzip
import hashlib
import http.client
import importlib
import math
import os
import queue
import struct
import threading
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sul_jax._files import atomic_path
from sul_jax.cli.options import ConfigError

# Data that cannot be used are an error of one line, as options are.
DataError = ConfigError
# The arrays of a `Dataset` by name; and where they came from, in words, with them.
Arrays = dict[str, Any]
Sourced = tuple[str, Arrays]
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


class NotFoundError(DataError):
    """Neither on disk nor fetched."""


class Original(NamedTuple):
    """Where the original files of a data set are, and the sha256 of each of `FILES`."""

    url: str
    digests: tuple[str, ...]


# Images and labels to train on, images and labels to test on.
FILES = tuple(f"{part}-ubyte.gz" for part in (
    "train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"
))  # fmt: skip
ORIGINALS = {
    "mnist": Original("https://storage.googleapis.com/cvdf-datasets/mnist/", (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    )),
    # Without https: websites in S3 do not offer it. What comes counts only if its sha256 is right.
    "fashion_mnist": Original("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    )),
}  # fmt: skip
_VERSION = "3.0.1"  # tfds's, of both
# Bytes of a file: no original has as many, packed (26 million) or unpacked (47 million).
_MOST = 2**26


def load(name: str, directory: Path | None, patience: float = 300.0) -> Sourced:
    """Prepared data or original files in `directory`, otherwise files fetched within `patience` seconds."""
    prepared = prepared_in(name, directory)
    raw = None if directory is None else directory / name
    if raw is not None and not any((raw / file).exists() for file in FILES):
        raw = None
    # The cache entry of a folder holds for the files that were in it when it was made.
    if prepared is not None:
        source, key = "prepared tfds data", fingerprint(sorted(prepared.iterdir()))
    elif raw is not None:
        source, key = "original files, sha256 verified", fingerprint([raw / file for file in FILES])
    else:
        source, key = "original files, fetched, sha256 verified", "fetched"

    def read() -> Arrays:
        version = prepared
        if version is None:
            if raw is not None:
                read_originals(name, raw)  # corrupt files are an error even where good data are cached
            version = prepared_in(name, cache_dir() / "tfds")
        return read_prepared(name, version or _prepare(name, raw or _fetch(name, patience)))

    return source, decoded(f"{name}-{_VERSION}-{key}", read)


def cache_dir() -> Path:
    """`$SUL_JAX_CACHE`, by default `sul_jax` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sul_jax"
    return Path(os.environ.get("SUL_JAX_CACHE", default))


def decoded(key: str, read: Callable[[], Arrays]) -> Arrays:
    """What `read` gives, kept in the cache under `key`."""
    cached = cache_dir() / "decoded" / f"{key}.npz"
    if cached.exists():
        try:
            with np.load(cached) as arrays:
                return {name: arrays[name] for name in _ARRAYS}
        except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile):
            cached.unlink(missing_ok=True)  # a damaged cache is made again
    arrays = read()
    with atomic_path(cached) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]
    return arrays


def fingerprint(files: list[Path]) -> str:
    """Changes when a file does; cheap, unlike hashing what is in them."""
    stats = [file.stat() if file.exists() else None for file in files]
    sizes = [(0, 0) if stat is None else (stat.st_size, stat.st_mtime_ns) for stat in stats]
    facts = [(str(file.absolute()), *size) for file, size in zip(files, sizes, strict=True)]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def imported(package: str) -> Any:
    """A package that only some data sets need."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DataError(
            f"reading this data set needs {package.replace('_', '-')} ({error}); "
            "install it with: pip install -e '.[experiments]'"
        ) from None


def prepared_in(name: str, directory: Path | None) -> Path | None:
    """The folder of tfds data prepared as array_record, if there is one."""
    if directory is None:
        return None
    for version in sorted((directory / name).glob("[0-9]*.[0-9]*.[0-9]*"), reverse=True):
        if (version / "dataset_info.json").exists() and list(version.glob("*.array_record*")):
            return version
    return None


def read_prepared(name: str, prepared: Path, label: str = "label") -> Arrays:
    """The arrays of data that tfds has prepared."""
    directory = prepared.parents[1 + name.count("/")]
    sources = imported("tensorflow_datasets").data_source(
        f"{name}:{prepared.name}", data_dir=str(directory), split=None
    )
    arrays: Arrays = {}
    for split in ("train", "test"):
        source = sources[split if split in sources else "validation"]
        images: list[np.ndarray] = []
        labels: list[int] = []
        for start in range(0, len(source), 5000):
            for record in source.__getitems__(range(start, min(start + 5000, len(source)))):
                images.append(record["image"])
                labels.append(record[label])
        arrays |= {f"{split}_images": np.stack(images), f"{split}_labels": np.asarray(labels, np.int32)}
    return arrays


def read_originals(name: str, raw: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and labels of each split, verified."""
    pairs = zip(FILES, ORIGINALS[name].digests, strict=True)
    train_x, train_y, test_x, test_y = (_verified(raw / file, digest) for file, digest in pairs)
    return {"train": (train_x, train_y), "test": (test_x, test_y)}


def _verified(path: Path, digest: str) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"{path} is missing; the folder must hold all four original files")
    with open(path, "rb") as file:
        own = hashlib.file_digest(file, "sha256").hexdigest()
    values = read_idx(path)  # first: it says what is wrong with the content where that can be told
    if own != digest:
        raise DataError(f"{path} is corrupt: its sha256 is {own}, expected {digest}")
    return values


def read_idx(path: Path) -> np.ndarray:
    """Reads a gzipped IDX file of unsigned bytes, unpacking no more than its header announces.

    Raises:
      DataError: the file is truncated, corrupt, of another kind or larger than any original file.
    """
    try:
        with gzip.open(path) as file:
            start = file.read(4)
            if len(start) < 4 or start[:3] != b"\0\0\x08":
                raise DataError(f"{path} is not an IDX file of unsigned bytes: it starts with {start!r}")
            axes = start[3]
            header = file.read(4 * axes)
            if len(header) < 4 * axes:
                raise DataError(f"{path} is truncated: its header has {len(header)} of {4 * axes} bytes")
            shape = struct.unpack(f">{axes}I", header)
            size = math.prod(shape)
            if size > _MOST:
                raise DataError(f"{path} has a header with shape {shape}, more than {_MOST} values")
            values = file.read(size + 1)  # one more shows that there are more
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a complete gzip file ({error})") from None
    if len(values) != size:
        raise DataError(
            f"{path} is truncated or corrupt: its header gives shape {shape}, "
            f"but {'more' if len(values) > size else len(values)} values follow"
        )
    return np.frombuffer(values, np.uint8).reshape(shape)


def _prepare(name: str, raw: Path) -> Path:
    """Turns the original files into tfds data in the cache."""
    arrays = read_originals(name, raw)
    print(f"Preparing {name} with TensorFlow Datasets, once …", flush=True)
    tfds = imported("tensorflow_datasets")
    image, label = tfds.features.Image(shape=(28, 28, 1)), tfds.features.ClassLabel(num_classes=10)

    # Registration would clash with tfds's own builder of the same name; both need TensorFlow for the splits.
    class Builder(tfds.dataset_builders.AdhocBuilder, skip_registration=True):  # type: ignore[call-arg, misc, name-defined]
        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: _examples(*of_split) for split, of_split in arrays.items()}

    builder = Builder(
        name=name,
        version=_VERSION,
        features=tfds.features.FeaturesDict({"image": image, "label": label}),
        split_datasets=arrays,
        data_dir=str(cache_dir() / "tfds"),
        file_format="array_record",
        disable_shuffling=True,
    )
    options = tfds.download.DownloadConfig(manual_dir=str(raw), try_download_gcs=False)
    tfds.disable_progress_bar()
    try:
        builder.download_and_prepare(download_config=options)
    finally:
        tfds.enable_progress_bar()
    prepared = prepared_in(name, cache_dir() / "tfds")
    if prepared is None:
        raise DataError(f"tfds prepared no array_record data of {name} in {cache_dir() / 'tfds'}")
    return prepared


def _examples(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
    from PIL import Image

    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield index, {"image": Image.fromarray(image), "label": int(label)}


def _fetch(name: str, patience: float) -> Path:
    """Downloads the original files into the cache; `patience` bounds the whole time in seconds."""
    url, digests = ORIGINALS[name]
    folder = cache_dir() / "originals" / name
    deadline = time.monotonic() + patience
    for file, digest in zip(FILES, digests, strict=True):
        if (folder / file).exists():
            continue
        try:
            content = _downloaded(url + file, deadline)
            if content is None:
                raise TimeoutError(f"not done within {patience:.0f} s")
            if hashlib.sha256(content).hexdigest() != digest:
                raise OSError("its sha256 is not the expected one")
            with atomic_path(folder / file) as temporary:
                temporary.write_bytes(content)
        except (OSError, http.client.HTTPException) as error:
            raise NotFoundError(
                f"{name} is not in the data directory (--data-dir or SUL_JAX_DATA; expected there: "
                f"{name}/{file}) and could not be fetched from {url}: {error}"
            ) from None
    return folder


def _downloaded(url: str, deadline: float) -> bytes | None:
    """What is at `url`, or None where it has not come by the deadline.

    The limits of sockets bound each wait alone: a server that drips its headers, or a name that is not
    resolved, would hold the caller for ever. So a thread waits for them, which nobody waits for.
    """
    answers: queue.SimpleQueue[bytes | Exception | None] = queue.SimpleQueue()

    def download() -> None:
        content = bytearray()
        try:
            with urllib.request.urlopen(url, timeout=3.0) as reply:
                # `read1` returns what has come, `read` waits until a block is full.
                while time.monotonic() < deadline and (block := reply.read1(2**16)):
                    content += block
                    if len(content) > _MOST:
                        raise OSError(f"it is larger than {_MOST} bytes")
            answers.put(None if time.monotonic() >= deadline else bytes(content))  # a part is nothing
        except Exception as error:
            answers.put(error)

    threading.Thread(target=download, daemon=True).start()
    try:
        result = answers.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        return None
    if isinstance(result, Exception):
        raise result
    return result
