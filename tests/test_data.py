import gzip
import hashlib
import queue
import shutil
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import data
from experiments.data import DataError, originals


def write_idx(path: Path, array: np.ndarray) -> None:
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def small_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory with twelve random images as MNIST's original files."""
    monkeypatch.setenv("SUL_JAX_CACHE", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    digests = []
    for name, shape in zip(originals.FILES, ((8, 28, 28), (8,), (4, 28, 28), (4,)), strict=True):
        path = tmp_path / "data" / "mnist" / name
        write_idx(path, generator.integers(0, 256 if len(shape) == 3 else 10, shape))
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    changed = data.ORIGINALS["mnist"]._replace(digests=tuple(digests))
    monkeypatch.setitem(data.ORIGINALS, "mnist", changed)
    return tmp_path / "data"


@pytest.mark.parametrize("damage", [b"not an archive", b""])
def test_originals_through_tfds_and_cache(damage: bytes, small_mnist: Path, tmp_path: Path) -> None:
    first = data.load("mnist", small_mnist)
    assert first.train_images.shape == (8, 28, 28, 1)
    assert first.train_images.dtype == np.uint8
    expected = data.read_idx(small_mnist / "mnist" / "t10k-images-idx3-ubyte.gz")
    np.testing.assert_array_equal(first.test_images[..., 0], expected)  # in the original order
    # What tfds prepared is plain tfds data, usable as a data directory of its own.
    again = data.load("mnist", tmp_path / "cache" / "tfds")
    np.testing.assert_array_equal(again.train_images, first.train_images)
    np.testing.assert_array_equal(again.train_labels, first.train_labels)
    # The decoded cache serves later calls, and a damaged one is made again.
    for entry in (tmp_path / "cache" / "decoded").iterdir():
        entry.write_bytes(damage)
    np.testing.assert_array_equal(data.load("mnist", small_mnist).train_images, first.train_images)
    assert data.load("auto", small_mnist).name == "mnist"


@pytest.mark.parametrize("damage", ["truncated", "corrupt", "missing"])
def test_damaged_originals(small_mnist: Path, damage: str) -> None:
    data.load("mnist", small_mnist)  # even where good data are cached
    path = small_mnist / "mnist" / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-100] if damage == "truncated" else content[:-1] + b"x" * 9)
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz"):
        data.load("mnist", small_mnist)
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz"):
        data.load("auto", small_mnist)


def test_read_idx_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 5) + b"abc"))
    with pytest.raises(DataError, match=r"gives shape \(5,\), but 3 values follow"):
        data.read_idx(path)
    path.write_bytes(gzip.compress(b"PNG!"))
    with pytest.raises(DataError, match="not an IDX file"):
        data.read_idx(path)
    path.write_bytes(b"plain")
    with pytest.raises(DataError, match="not a complete gzip file"):
        data.read_idx(path)


def test_auto_falls_back_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SUL_JAX_CACHE", str(tmp_path))
    monkeypatch.delenv("SUL_JAX_DATA", raising=False)
    monkeypatch.setitem(data.ORIGINALS, "mnist", data.ORIGINALS["mnist"]._replace(url="http://127.0.0.1:9/"))
    start = time.monotonic()
    assert data.load("auto").name == "digits"
    assert time.monotonic() - start < 10
    assert capsys.readouterr().out.count("\n") == 1
    with pytest.raises(DataError, match="mnist is not in the data directory .* could not be fetched"):
        data.load("mnist")


class _Server(BaseHTTPRequestHandler):
    """Serves `small_mnist`, well or badly; nothing that it sends takes more than five seconds."""

    folder: Path
    manner: str

    def do_GET(self) -> None:
        content = (self.folder / self.path.lstrip("/")).read_bytes()
        if self.manner == "headers drip":
            self._drip(b"HTTP/1.0 200 OK\r\nX: " + b"x" * 100)
            return
        self.send_response(200)
        self.end_headers()
        if self.manner == "body drips":
            self._drip(content)
        elif self.manner == "another file":
            self.wfile.write(content[::-1])
        elif self.manner == "endless":
            with suppress(ConnectionError):
                for _ in range(1000):
                    self.wfile.write(bytes(2**16))
        else:
            self.wfile.write(content)

    def _drip(self, content: bytes) -> None:
        with suppress(ConnectionError):
            for byte in content[:50]:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.1)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def serve(small_mnist: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Serves MNIST's files on this machine, in the manner asked for, while the test runs."""
    handler = type("Handler", (_Server,), {"folder": small_mnist / "mnist"})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setitem(data.ORIGINALS, "mnist", data.ORIGINALS["mnist"]._replace(url=url))
        yield partial(setattr, handler, "manner")
        server.shutdown()
        thread.join(5)


def test_originals_are_fetched_once(serve: Callable[[str], None], small_mnist: Path) -> None:
    serve("well")
    found = originals.load("mnist", None, patience=60)
    assert found[0] == "original files, fetched, sha256 verified"
    expected = data.read_idx(small_mnist / "mnist" / originals.FILES[2])
    np.testing.assert_array_equal(found[1]["test_images"][..., 0], expected)
    serve("another file")  # not asked again
    assert originals.load("mnist", None)[1].keys() == found[1].keys()


@pytest.mark.parametrize(
    ("manner", "message"),
    [
        ("headers drip", "not done within 1 s"),
        ("body drips", "not done within 1 s"),
        ("another file", "its sha256 is not the expected one"),
        ("endless", "larger than 100000 bytes"),
    ],
)
def test_bad_servers(
    manner: str, message: str, serve: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server holds nobody up beyond the deadline, nor fills memory or disk."""
    monkeypatch.setattr(originals, "_MOST", 100_000)
    serve(manner)
    start = time.monotonic()
    with pytest.raises(originals.NotFoundError, match=f"could not be fetched from http.*: .*{message}"):
        originals.load("mnist", None, patience=1.0)
    assert time.monotonic() - start < 3
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_part_that_came_by_the_deadline_is_nothing(
    serve: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the one who waits for it is late himself."""
    serve("body drips")
    url = data.ORIGINALS["mnist"].url + originals.FILES[0]

    class Late(queue.Queue[bytes | None | Exception]):
        def get(self, block: bool = True, timeout: float | None = None) -> bytes | Exception | None:
            return super().get(timeout=10)

    monkeypatch.setattr(originals.queue, "SimpleQueue", Late)
    assert originals._downloaded(url, time.monotonic() + 0.3) is None


def test_archives_are_unpacked_to_what_their_header_announces(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    header = b"\0\0\x08\x01" + struct.pack(">I", 5)
    path.write_bytes(gzip.compress(header + bytes(2**26)))  # a thousandth of that in the file
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"gives shape \(5,\), but more values follow"):
            data.read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 2**22
        path.write_bytes(gzip.compress(b"\0\0\x08\x02" + struct.pack(">II", 2**20, 2**20)))
        with pytest.raises(DataError, match=r"has a header with shape \(1048576, 1048576\), more than"):
            data.read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
    write_idx(path, np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(data.read_idx(path), [[0, 1, 2], [3, 4, 5]])


def test_digits() -> None:
    digits = data.load("digits")
    assert digits.train_images.shape == (1797, 28, 28, 1)
    assert digits.train_images.dtype == np.uint8
    assert sorted(set(digits.train_labels.tolist())) == list(range(10))


def test_own_npz(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    np.savez(path, images=np.zeros((5, 6, 7), np.float64), labels=np.arange(5))
    mine = data.load(str(path))
    assert mine.name == "mine.npz"
    assert mine.train_images.shape == (5, 6, 7, 1)
    assert mine.train_images.dtype == np.float32
    np.savez(path, images=np.zeros((5, 6, 7, 3), np.uint8))
    assert data.load(str(path)).train_labels is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": np.zeros((2, 3, 3))}, "no array named 'images'"),
        ({"images": np.zeros((2, 3))}, r"got \(2, 3\)"),
        ({"images": np.zeros((0, 3, 3))}, r"none of them zero; got \(0, 3, 3, 1\)"),
        ({"images": np.full((2, 3, 3), np.nan)}, "18 NaN or infinite pixels"),
        ({"images": np.full((2, 3, 3), 1e300)}, "18 NaN or infinite pixels"),
        ({"images": np.full((2, 3, 3), np.inf)}, "18 NaN or infinite pixels"),
        ({"images": np.zeros((2, 3, 3), np.int64)}, "uint8 or floating, got int64"),
        ({"images": np.zeros((2, 3, 3)), "labels": np.zeros(3, int)}, "must be 2 integers"),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict, message: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=message):
        data.load(str(path))


def test_unusable_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'imagenet' is unknown; accepted: auto, mnist"):
        data.load("imagenet")
    with pytest.raises(DataError, match="does not exist"):
        data.load(str(tmp_path / "none.npz"))
    (tmp_path / "text.npz").write_text("")
    with pytest.raises(DataError, match="not a readable"):
        data.load(str(tmp_path / "text.npz"))
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(DataError, match="not a readable"):
        data.load(str(tmp_path / "text.npz"))
    (tmp_path / "mixed" / "a").mkdir(parents=True)
    (tmp_path / "mixed" / ".thumbnails").mkdir()
    for name in ("a/a.png", "b.png", ".thumbnails/b.png"):
        Image.new("L", (4, 4)).save(tmp_path / "mixed" / name)
    with pytest.raises(DataError, match="holds both images and sub-folders"):
        data.load(str(tmp_path / "mixed"), image_size=8)
    (tmp_path / "mixed" / "a" / "a.png").unlink()
    assert data.load(str(tmp_path / "mixed"), image_size=8).name == "mixed/"
    with pytest.raises(DataError, match="is not a folder"):
        data.load("mnist", tmp_path / "nowhere")


def test_atomic_path_leaves_nothing_half_written(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def interrupted() -> None:
        with data.atomic_path(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.data
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_real_originals_are_verified(data_dir: Path, name: str, tmp_path: Path) -> None:
    folder = data_dir / name
    if not folder.is_dir():
        pytest.skip(f"no {name} in {data_dir}")
    arrays = originals.read_originals(name, folder)
    assert arrays["train"][0].shape == (60_000, 28, 28)
    assert arrays["test"][1].shape == (10_000,)
    copy = tmp_path / name
    copy.mkdir()
    for file in folder.iterdir():
        shutil.copyfile(file, copy / file.name)
    first = originals.FILES[0]
    with open(copy / first, "ab") as file:
        file.write(b"\0")
    with pytest.raises(DataError, match=first):
        originals.read_originals(name, copy)


def test_folder_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sub-folders are classes; the middle square of any size, mode and suffix, in a stated order."""
    for index, (name, size, mode) in enumerate(
        [("b/1.PNG", (30, 20), "RGBA"), ("b/2.jpg", (8, 8), "CMYK"), ("a/x ü.webp", (5, 9), "L")]
    ):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        suffix = path.suffix[1:].lower().replace("jpg", "jpeg")
        Image.new(mode, size, 40 * index).save(path, format=suffix)
    (tmp_path / "photos" / "a" / "notes.txt").write_text("not an image")
    found = data.load(str(tmp_path / "photos"), image_size=8)
    assert found.train_images.shape == (3, 8, 8, 3)
    assert found.train_labels is not None
    assert found.train_labels.tolist() == [0, 1, 1]
    flat = data.load(str(tmp_path / "photos" / "b"), image_size=4)
    assert (flat.train_images.shape, flat.train_labels) == ((2, 4, 4, 3), None)
    with pytest.raises(DataError, match="nmce_images takes it with --image-size"):
        data.load(str(tmp_path / "photos"))
    (tmp_path / "photos" / "b" / "3.png").write_bytes(b"")
    assert len(data.load(str(tmp_path / "photos"), image_size=8).train_images) == 3
    assert "left out: 1 × .png (empty)" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        data.load(str(tmp_path / "empty"), image_size=8)
    (tmp_path / "mixed" / "a").mkdir(parents=True)
    (tmp_path / "mixed" / ".thumbnails").mkdir()
    for name in ("a/a.png", "b.png", ".thumbnails/b.png"):
        Image.new("L", (4, 4)).save(tmp_path / "mixed" / name)
    with pytest.raises(DataError, match="holds both images and sub-folders"):
        data.load(str(tmp_path / "mixed"), image_size=8)
    (tmp_path / "mixed" / "a" / "a.png").unlink()
    assert data.load(str(tmp_path / "mixed"), image_size=8).name == "mixed/"
    with pytest.raises(DataError, match="is not a folder"):
        data.load(str(tmp_path / "missing"), image_size=8)


def test_usps(tmp_path: Path) -> None:
    import h5py

    (tmp_path / "usps").mkdir()
    with h5py.File(tmp_path / "usps" / "usps.h5", "w") as file:
        for split, number in (("train", 3), ("test", 2)):
            file[f"{split}/data"] = np.full((number, 256), 0.5, np.float32)
            file[f"{split}/target"] = np.arange(number)
    found = data.load("usps", tmp_path)
    assert (found.train_images.shape, found.test_images.shape) == ((3, 16, 16, 1), (2, 16, 16, 1))
    (tmp_path / "usps" / "usps.h5").write_bytes(b"not HDF5")
    with pytest.raises(DataError, match="is not a readable USPS file"):
        data.load("usps", tmp_path)
    with pytest.raises(DataError, match="usps is not in the data directory"):
        data.load("usps", tmp_path / "usps")


@pytest.mark.parametrize("name", ["cifar20", "stl10", "svhn_cropped"])
def test_prepared_data_are_needed(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{name} is not in the data directory"):
        data.load(name, tmp_path)


def test_coarse_labels_of_prepared_data(prepared: Callable[..., Path]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    labels = {"label": (100, np.arange(90, 96)), "coarse_label": (20, np.arange(6))}
    found = data.load("cifar20", prepared("cifar100", images, labels, num_train=4))
    np.testing.assert_array_equal(found.train_images, images[:4])
    assert found.test_labels is not None
    assert found.test_labels.tolist() == [4, 5]


def test_originals_of_another_content_are_refused(small_mnist: Path) -> None:
    path = small_mnist / "mnist" / originals.FILES[0]
    write_idx(path, 255 - data.read_idx(path))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz is corrupt: its sha256 is"):
        data.load("mnist", small_mnist)
