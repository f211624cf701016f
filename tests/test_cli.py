"""One command from a folder of images to a report, bad folders included."""

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from sul_jax import cli, estimators
from sul_jax.cli import assign, cluster, figures, images, networks, pictures
from sul_jax.cli.cluster import Config
from sul_jax.estimators import energy


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Energy layers learn a few minibatches from the few pictures."""
    monkeypatch.setattr(energy, "_LEAST_STEPS", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 digits of three classes as PNG files of mixed sizes, in sub-folders."""
    root = tmp_path_factory.mktemp("data") / "my digits é"
    digits = load_digits()
    generator = np.random.default_rng(0)
    for label in range(3):
        (root / f"class {label}").mkdir(parents=True)
        for index, image in enumerate(digits.images[digits.target == label][:30]):
            side = int(generator.integers(20, 60))
            picture = Image.fromarray(np.uint8(image * 15)).resize((side, side))
            picture.save(root / f"class {label}" / f"image {index} ü.png")
    return root


def test_from_a_folder_to_a_report(folder: Path, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    config = Config(folder, method="pixels", workdir=tmp_path, seeds=2, image_size=16, seeds_together=2)
    report = cluster.run(config)
    assert report.num_clusters == 3
    assert report.scores["clustering_accuracy"] > 80
    assert not report.baseline
    assert report.agreement[3] > 50
    html = (tmp_path / "report.html").read_text()
    assert "Map of the codes" in html
    assert str(tmp_path) not in html
    assert str(folder) not in html
    assert "<script" not in html
    assert not re.search(r'(src|href)="(?!data:)', html)
    with open(tmp_path / "clusters.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 90
    assert [int(row["cluster"]) for row in rows] == report.labels.tolist()
    assert all(float(row["margin"]) >= 0 for row in rows)
    assert json.loads((tmp_path / "results.json").read_text())[0]["num_clusters"] == 3
    assert len(html) < 5e6
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before

    some = tmp_path / "new"
    shutil.copytree(folder / "class 1", some)
    output = tmp_path / "predicted" / "assigned.csv"
    again = assign.run(assign.Config(tmp_path, some, output))
    chosen = [i for i, row in enumerate(rows) if row["file"].startswith("class 1")]
    np.testing.assert_array_equal(again.labels, report.labels[chosen])
    with open(output, newline="") as file:
        assert [int(row["cluster"]) for row in csv.DictReader(file)] == again.labels.tolist()
    # A single network too, and the table is replaced, but nothing that is no such table.
    network = tmp_path / "network-seed1-3"
    of_seed = assign.run(assign.Config(network, folder, output)).labels
    np.testing.assert_array_equal(of_seed, estimators.load(network).labels_)
    with pytest.raises(ValueError, match="exists and is not a table of sul-jax assign"):
        assign.run(assign.Config(tmp_path, some, tmp_path / "report.html"))
    np.savez(tmp_path / "other.npz", images=np.zeros((4, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="do not fit the model"):
        assign.run(assign.Config(tmp_path, tmp_path / "other.npz", output))
    for wrong in ("results.json", "predicted", "nowhere"):
        with pytest.raises(ValueError, match="not a model"):
            assign.run(assign.Config(tmp_path / wrong, some, output))


def test_the_number_of_clusters_on_which_seeds_agree(folder: Path, tmp_path: Path) -> None:
    config = Config(folder, num_clusters=(2, 3, 9), method="pixels", workdir=tmp_path, image_size=16)
    report = cluster.run(config)
    assert set(report.agreement) == {2, 3, 9}
    assert report.agreement[report.num_clusters] == max(report.agreement.values())
    assert set(report.measures[9]) == {"agreement", "silhouette", "gap", "coding_length"}
    html = (tmp_path / "report.html").read_text()
    assert all(name in html for name in ("gap statistic", "coding length", f"{report.agreement[9]:.1f}"))
    stated = json.loads((tmp_path / "results.json").read_text())[0]["measures"]
    assert {int(n): own for n, own in stated.items()} == report.measures
    # Finished seeds are read, not learned again.
    stored = {p: p.stat().st_mtime_ns for p in tmp_path.glob("network-*")}
    assert stored
    resumed = cluster.run(
        Config(folder, num_clusters=(2, 3, 9), method="pixels", workdir=tmp_path, image_size=16, resume=True)
    )
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("network-*")} == stored
    np.testing.assert_array_equal(resumed.labels, report.labels)


def test_the_seed_that_agrees_most_is_taken() -> None:
    """And not the first, the last, or the one that agrees least."""
    clusterings = ([0, 1, 0, 1, 0, 1], [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1])
    fits = [
        networks.Fit(seed, SimpleNamespace(n_clusters=2, labels_=np.array(labels)), Path())
        for seed, labels in enumerate(clusterings)
    ]
    found = images.Images(np.zeros((6, 4, 4, 1), np.uint8), [], None, [], [], [], None, [])
    report, best, table = cluster._judge(found, fits)
    assert best[2].seed == 2
    assert table.shape == (4, 4)
    assert report.agreement == {2: round(table[~np.eye(4, dtype=bool)].mean(), 3)}


def test_agreement_without_labels_is_that_of_the_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", images=np.random.default_rng(0).random((30, 9, 9, 3)))
    report = cluster.run(
        Config(tmp_path / "mine.npz", num_clusters=(2,), method="pixels", seeds=1, workdir=tmp_path / "run")
    )
    assert report.scores == {}
    assert report.agreement == {}
    assert "No labels" in (tmp_path / "run" / "report.html").read_text()


def test_all_kinds_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    pixels = np.uint8(generator.integers(0, 256, (20, 30, 3)))
    rgb = Image.fromarray(pixels)
    rgb.save(tmp_path / "plain.png")
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    rgb.convert("RGBA").save(tmp_path / "alpha.png")
    rgb.convert("P").save(tmp_path / "palette.png")
    rgb.save(tmp_path / "photo.webp")
    Image.fromarray(np.uint16(generator.integers(0, 65536, (20, 20)))).save(tmp_path / "16 bits.png")
    rgb.save(tmp_path / "moving.webp", save_all=True, append_images=[rgb.rotate(90)])
    for ending in ("tif", "bmp", "gif", "jpe", "tga", "ppm"):
        rgb.save(tmp_path / f"plain.{ending}")
    rgb.save(tmp_path / "a photo without an ending", format="JPEG")
    rgb.save(tmp_path / "drawing.eps")  # a program for a printer
    rgb.save(tmp_path / "__1.png")
    rgb.save(tmp_path / "half an exif.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x02\0")
    (tmp_path / "empty.png").touch()
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff" + bytes(50))
    whole = (tmp_path / "plain.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "notes.txt").write_text("not an image")
    bad = ["broken.jpg", "cut.png", "drawing.eps", "empty.png", "notes.txt"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
        bad = sorted([*bad, "pipe.png"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's, of details that do not matter, are kept from the user
        found = images.read(tmp_path, 16)
    assert len(found.pixels) == 16
    assert found.pixels.shape[1:] == (16, 16, 3)
    assert sorted(name for name, _ in found.left_out) == bad
    assert all(str(tmp_path) not in reason for _, reason in found.left_out)
    # The 16-bit image spans the whole range.
    deep = found.pixels[found.names.index("16 bits.png")]
    assert deep.max() > 180
    run = Config(tmp_path, num_clusters=(2,), method="pixels", seeds=2, workdir=tmp_path / "o")
    assert len(cluster.run(run).labels) == 16
    html = (tmp_path / "o" / "report.html").read_text()
    assert f"Left out: {len(bad)} files" in html
    assert "1 × .txt (not a picture)" in html
    printed = capsys.readouterr().out
    assert "left out: 1 × .txt (not a picture)" in printed
    assert "files with several pictures: 1;" in printed
    # What a run wrote inside the folder is no part of it.
    assert len(cluster.run(run).labels) == 16


def test_one_scale_for_pictures_of_many_bits(tmp_path: Path) -> None:
    """Twelve bits are seen, comparable within the folder, and seen in the same way by the model later."""
    folder = tmp_path / "deep"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(6):
        low = 100 if index < 3 else 2000
        values = generator.integers(low, low + 200, (12, 12))
        values[0, 0] = 100 + 2400 * (index == 5)
        if index % 2:
            Image.fromarray(values.astype(np.uint16)).save(folder / f"{index}.png")
        else:
            Image.fromarray(values.astype(np.int32)).save(folder / f"{index}.tiff")
    alone = np.asarray(pictures.picture(folder / "5.png"))  # on its own scale
    shares = (values - values.min()) / np.ptp(values)
    np.testing.assert_array_equal(alone, np.round(255 * shares)[..., None].repeat(3, axis=-1))
    found = images.read(folder, 12)
    assert found.scale == (100, 2500)
    assert found.pixels.shape == (6, 12, 12, 1)
    means = found.pixels.mean(axis=(1, 2, 3))
    assert means[:3].max() < 30
    assert means[3:].min() > 180
    run = Config(folder, num_clusters=(2,), method="pixels", seeds=1, image_size=12, workdir=tmp_path / "run")
    report = cluster.run(run)
    assert report.labels[0] != report.labels[5]
    some = tmp_path / "some"  # on their own these would span another range
    some.mkdir()
    for name in ("0.tiff", "1.png"):
        shutil.copy(folder / name, some / name)
    again = assign.run(assign.Config(tmp_path / "run", some, tmp_path / "some.csv"))
    np.testing.assert_array_equal(again.labels, report.labels[:2])
    assert assign.load(tmp_path / "run")[1] == (100, 2500)


def test_drawings_on_a_transparent_ground(tmp_path: Path) -> None:
    for name, shade in (("white", 255), ("black", 0)):
        drawing = np.zeros((20, 20, 4), np.uint8)
        drawing[5:15, 8:12] = shade, shade, shade, 255
        Image.fromarray(drawing).save(tmp_path / f"{name}.png")
    found = images.read(tmp_path, 20)
    assert all(image.min() == 0 and image.max() == 255 for image in found.pixels)
    light = found.pixels[found.names.index("white.png")]
    assert light[0, 0, 0] == 0


def test_colours_of_16_bits_are_mentioned(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + b"\x40\0" * 12 for _ in range(4))
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    body = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in parts]
    (tmp_path / "colour.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))
    found = images.read(tmp_path, 4)
    assert found.notes == ["colour pictures of 16 bits: 1; the upper 8 bits are read"]
    assert found.pixels.max() == 64


def test_pictures_that_are_turned_large_or_not_finite(tmp_path: Path) -> None:
    upright = Image.new("RGB", (4100, 8200))
    upright.paste((255, 0, 0), (0, 0, 4100, 4100))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned to the left: it is to be seen turned to the right
    for ending in ("png", "tif", "webp"):
        turned = upright.rotate(90, expand=True)
        turned = turned.resize((82, 41)) if ending == "webp" else turned
        turned.save(tmp_path / f"turned.{ending}", exif=exif)
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    found = images.read(tmp_path, 8)
    assert found.left_out == [("nan.tiff", "holds values that are not finite")]
    for pixels in found.pixels:
        assert pixels[:3, :, 0].min() > 250
        assert pixels[5:, :, 0].max() < 5


def test_files_left_out_are_counted() -> None:
    left_out = [images.LeftOut(name, "damaged") for name in ("a.png", "b.png", "c.png", "d.jpg", "e", "f")]
    counted = ["3 × .png (damaged)", "2 × no ending (damaged)", "1 × .jpg (damaged)"]
    assert images.kinds_left_out(left_out) == counted
    more = ["1 more for other reasons, listed in the report"]
    assert images.kinds_left_out(left_out, most=2) == counted[:2] + more


def test_folders_of_classes(tmp_path: Path) -> None:
    """Splits are no classes; links are followed, once."""
    picture = Image.fromarray(np.uint8(np.random.default_rng(0).integers(0, 256, (9, 9))))
    for way in ("train/cat", "train/dog", "test/cat", "Val/dog"):
        (tmp_path / "set" / way).mkdir(parents=True)
        picture.save(tmp_path / "set" / way / "1.png")
    found = images.read(tmp_path / "set", 8)
    assert found.classes == ["cat", "dog"]
    assert found.labels is not None
    assert found.labels.tolist() == [1, 0, 0, 1]
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "a").symlink_to(tmp_path / "set" / "train" / "cat", target_is_directory=True)
    (linked / "b").symlink_to(tmp_path / "set" / "train" / "dog", target_is_directory=True)
    (tmp_path / "set" / "train" / "dog" / "loop").symlink_to(linked, target_is_directory=True)
    found = images.read(linked, 8)
    assert found.names == ["a/1.png", "b/1.png"]
    assert found.classes == ["a", "b"]
    assert [reason for _, reason in found.left_out] == ["a link to a folder that was read already"]


@pytest.mark.parametrize(
    ("number", "options", "message"),
    [
        (0, {}, "holds no pictures"),
        (1, {}, "num_clusters=2 exceeds the 1 images"),
        (3, {"num_clusters": (4,)}, "num_clusters=4 exceeds the 3 images"),
        (3, {"num_clusters": ()}, "num_clusters is needed"),
        (3, {"num_clusters": (1,)}, "num_clusters=(1,)"),
        (3, {"num_clusters": 1}, "num_clusters=(1,)"),
        (3, {"seeds": 0}, "seeds=0"),
        (3, {"method": "magic"}, "method='magic' is not accepted: it must be one of energy"),
        (3, {"workdir": "images/../images"}, "is the folder of images"),
        (-3, {}, "num_clusters=2 exceeds the 1 images that differ"),
    ],
)
def test_bad_folders(
    number: int, options: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(abs(number)):
        shade = 10 * index if number > 0 else 7  # less than 0: all images are identical
        Image.new("L", (9, 9), shade).save(folder / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    defaults = {"num_clusters": (2,), "method": "pixels", "workdir": tmp_path / "o"}
    with pytest.raises(ValueError, match=re.escape(message)):
        cluster.run(Config(str(folder), **(defaults | options)))


def test_what_is_no_folder_and_what_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a folder"):
        cluster.run(Config(tmp_path / "nowhere", num_clusters=(2,)))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        cluster.run(Config(folder, method="pixels", workdir=tmp_path / "file" / "inside"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").touch()
    with pytest.raises(ValueError, match="none of the 1 files"):
        cluster.run(Config(tmp_path / "bad", num_clusters=(2,), workdir=tmp_path / "run"))


def test_the_users_own_files_are_left_alone(tmp_path: Path) -> None:
    """Pictures and results of something else in the folder that is written to; files of other programs."""
    photos = tmp_path / "photos" / "a"
    (photos / ".thumbnails").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in [*(f"{i}.png" for i in range(6)), ".thumbnails/0.png", "../mine.png"]:
        Image.fromarray(np.uint8(generator.integers(0, 256, (9, 9)))).save(photos / name)
    run = Config(photos, num_clusters=(2,), method="pixels", workdir=photos.parent, image_size=9)
    assert len(cluster.run(run).labels) == 6
    cluster.run(run)
    assert (photos.parent / "mine.png").exists()
    assert not (photos.parent / "previous-001" / "mine.png").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "clusters.csv").write_text("of something else")
    with pytest.raises(ValueError, match=r"holds a clusters.csv that this command did not write"):
        cluster.run(Config(photos, num_clusters=(2,), workdir=other))


def test_interrupted_and_resumed(folder: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-c", "import sul_jax.cli; sul_jax.cli.main()", "cluster", str(folder),
        "--method", "pixels", "--workdir", str(tmp_path), "--seeds", "20",
    ]  # fmt: skip
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # Where tests run in the background of a shell, children ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 180
    while not (tmp_path / "network-seed1-3").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert "--resume" in output
    assert "Traceback" not in output
    stored = {p: p.stat().st_mtime_ns for p in tmp_path.glob("network-seed*-3")}
    assert 2 <= len(stored) < 20
    (tmp_path / ".clusters.csv.abcdefgh.csv").touch()  # as a run that was killed leaves it
    config = Config(folder, method="pixels", workdir=tmp_path, seeds=20, resume=True)
    report = cluster.run(config)
    assert len(list(tmp_path.glob("network-seed*-3"))) == 20
    assert [p.name for p in tmp_path.glob(".*")] in ([".lock"], [])
    assert {p: p.stat().st_mtime_ns for p in stored} == stored
    assert len(report.labels) == 90


def test_stopped_while_encoding(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(folder, method="pixels", workdir=tmp_path / "run", seeds=1, image_size=16)
    whole = cluster.run(dataclasses.replace(config, workdir=tmp_path / "whole"))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(estimators.PixelClustering, "_codes", stop)
        with pytest.raises(KeyboardInterrupt):
            cluster.run(config)
    monkeypatch.setattr(estimators.PixelClustering, "_learn", stop)  # not again
    resumed = cluster.run(dataclasses.replace(config, resume=True))
    np.testing.assert_array_equal(resumed.labels, whole.labels)
    assert not list((tmp_path / "run").glob("*.learned"))


@pytest.mark.slow
def test_seeds_that_are_there_already(folder: Path, tmp_path: Path) -> None:
    """Of three networks that learned together one is stored, one has learned, and one is missing."""
    config = Config(folder, method="deepcluster", workdir=tmp_path, seeds_together=3)
    cluster.run(config)
    stored = [tmp_path / f"network-seed{seed}-3" for seed in range(3)]
    whole = [estimators.load(path) for path in stored]
    pixels = images.read(folder, 32).pixels
    for path in stored[:2]:
        shutil.rmtree(path)
        path.with_name(f"{path.name}.npy").unlink()
    kept = stored[0].with_name(f"{stored[0].name}.learned")
    estimators.fit_together([networks.estimator("deepcluster", 3, 0)], pixels, keep=[kept])
    before = stored[2].stat().st_mtime_ns
    cluster.run(dataclasses.replace(config, seeds_together=2, resume=True))
    assert stored[2].stat().st_mtime_ns == before
    assert not kept.exists()
    for path, expected in zip(stored, whole, strict=True):
        np.testing.assert_array_equal(estimators.load(path).labels_, expected.labels_)


def test_a_fresh_run_reads_nothing_of_an_earlier_one(folder: Path, tmp_path: Path) -> None:
    """Networks of other images, a stranger's files, and a lock that is a link."""
    other = tmp_path / "other.npz"
    np.savez(other, images=np.random.default_rng(0).random((90, 8, 8)))
    run = tmp_path / "run"
    options = {"num_clusters": 3, "method": "pixels", "workdir": run, "seeds": 1, "image_size": 16}
    cluster.run(Config(other, **options))
    (run / "config.json").unlink()
    for name in ("model", "network-seed0-3.learned"):
        shutil.rmtree(run / name, ignore_errors=True)
    for name in ("results.json", "reading.json", "report.html", "clusters.csv", "duplicates.csv"):
        (run / name).unlink()
    (run / "network-seed1-3.pkl").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    report = cluster.run(Config(folder, resume=True, **options))  # there is nothing that is known to be its
    assert report.scores["clustering_accuracy"] > 80
    aside = {path.name for path in (run / "previous-001").iterdir()}
    assert aside == {"network-seed0-3", "network-seed0-3.npy", "network-seed1-3.pkl"}
    with pytest.raises(ValueError, match="cannot be resumed with data="):
        cluster.run(Config(other, resume=True, **options))
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    (run / ".lock").unlink(missing_ok=True)
    (run / ".lock").symlink_to(precious)
    with pytest.raises(ValueError, match=r"a .lock that is a link"):
        cluster.run(Config(folder, **options))
    assert precious.read_text() == "years of work"


def test_a_network_that_is_not_of_the_run(folder: Path, tmp_path: Path) -> None:
    config = Config(folder, method="pixels", workdir=tmp_path, seeds=1, image_size=16)
    cluster.run(config)
    stranger = estimators.PixelClustering(2, image_size=16).fit(images.read(folder, 16).pixels)
    shutil.rmtree(tmp_path / "network-seed0-3")
    stranger.save(tmp_path / "network-seed0-3")
    with pytest.raises(ValueError, match="does not belong to this run"):
        cluster.run(dataclasses.replace(config, resume=True))


def test_a_network_that_tells_nothing_apart(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report is written and says so; t-SNE would end the process. NaN is an error before."""
    config = Config(folder, method="pixels", workdir=tmp_path, seeds=1, image_size=16)

    def codes(value: float) -> Callable[..., np.ndarray]:
        return lambda self, rows, learned: np.full((len(rows), 4), value, np.float32)

    monkeypatch.setattr(estimators.PixelClustering, "_codes", codes(0.3))
    report = cluster.run(config)
    assert len(np.unique(report.labels)) == 1
    assert "only 1 of the 3 clusters have images" in capsys.readouterr().out
    html = (tmp_path / "report.html").read_text()
    assert "Of 3 clusters only 1 have images" in html
    assert "All images have the same code" in html
    monkeypatch.setattr(estimators.PixelClustering, "_codes", codes(np.nan))
    monkeypatch.setattr(estimators.PixelClustering, "_cluster", lambda *_: None)
    with pytest.raises(ValueError, match="seed 0: the codes of 90 of 90 images are not finite"):
        cluster.run(config)
    assert not (tmp_path / "network-seed0-3").exists()


@pytest.mark.parametrize("number", [1, 3, 6, 40])
def test_the_map_of_codes_that_hardly_vary(number: int) -> None:
    codes = np.repeat(np.random.default_rng(0).random((number, 5), np.float32), 40 // number + 1, axis=0)
    labels = np.arange(len(codes)) % 2
    assert (figures.codes_map(codes, labels) is None) == (number == 1)
    assert figures.codes_map(np.float32(1e-30) * codes + 1, labels) is None


def test_a_map_that_fails_leaves_the_report(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(figures, "codes_map", fail)
    with pytest.raises(KeyboardInterrupt):
        cluster.run(Config(folder, method="pixels", workdir=tmp_path, seeds=1, image_size=16))
    assert "Cluster 2" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "model").is_dir()


def test_names_of_files_are_text_everywhere(tmp_path: Path) -> None:
    """Neither a formula for a spreadsheet nor HTML for a browser."""
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in ("=1+1.png", "@SUM(1).png", "<b>.png", "plain.png"):
        Image.fromarray(np.uint8(generator.integers(0, 256, (9, 9)))).save(folder / name)
    cluster.run(Config(folder, num_clusters=(2,), method="pixels", seeds=1, workdir=tmp_path / "run"))
    with open(tmp_path / "run" / "clusters.csv", newline="") as file:
        names = [row["file"] for row in csv.DictReader(file)]
    assert names == ["<b>.png", "'=1+1.png", "'@SUM(1).png", "plain.png"]
    html = (tmp_path / "run" / "report.html").read_text()
    assert "<b>.png" not in html
    assert "&lt;b&gt;.png" in html


def test_the_command_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["sul-jax", *words])
        cli.main()

    call("cluster", str(folder), "--num-clusters", "2", "3", "--method", "pixels", "--seeds", "2")
    assert (tmp_path / "runs" / "cluster" / "report.html").exists()
    call("assign", "runs/cluster", str(folder))
    assert "clusters: assigned.csv" in capsys.readouterr().out
    assert len((tmp_path / "assigned.csv").read_text().splitlines()) == 91
    for words, message in (
        (("cluster", "nowhere"), "error: images='nowhere' is neither"),
        (("clsuter", "nowhere"), "error: 'clsuter' is not a command; there are cluster and assign"),
    ):
        with pytest.raises(SystemExit) as stop:
            call(*words)
        assert stop.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(message)
    call("--help")
    assert "sul-jax assign" in capsys.readouterr().out
    monkeypatch.setattr(cli, "_NEEDED", ("no_such_package",))
    with pytest.raises(SystemExit):
        call("cluster", str(folder))
    assert "pip install 'sul_jax[cli]'" in capsys.readouterr().err


def test_a_terminal_that_is_not_utf8(folder: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-c", "import sul_jax.cli; sul_jax.cli.main()", "cluster", str(folder),
        "--method", "pixels", "--workdir", str(tmp_path / "é"), "--seeds", "1",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert b"90 images of 28?28?1" in done.stdout


def test_the_command_needs_nothing_of_the_experiments() -> None:
    code = (
        "import sys; sys.modules['experiments'] = sys.modules['fcntl'] = sys.modules['resource'] = None\n"
        "import sul_jax.cli.assign, sul_jax.cli.cluster, sul_jax.cli.workdir"
    )
    if sys.platform != "win32":  # where filelock itself needs fcntl
        code = code.replace("sys.modules['fcntl'] = ", "")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_names_that_are_not_utf8_and_other_colours(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(8):
        name = os.fsdecode(b"caf\xe9 %d.png" % index)
        Image.fromarray(np.uint8(generator.integers(0, 256, (12, 12)))).save(folder / name)
    run = Config(folder, num_clusters=(2,), method="pixels", workdir=tmp_path / "run", image_size=12)
    report = cluster.run(run)
    assert "caf\ufffd" in (tmp_path / "run" / "clusters.csv").read_text(encoding="utf-8")
    # A gray model takes colour images for gray ones.
    Image.fromarray(np.uint8(generator.integers(0, 256, (12, 12, 3)))).save(folder / "colour.png")
    again = assign.run(assign.Config(tmp_path / "run", folder, tmp_path / "assigned.csv"))
    np.testing.assert_array_equal(again.labels[:8], report.labels)
    colours = np.uint8(np.diag([100, 200, 250]).reshape(1, 1, 3, 3))
    assert assign._with_channels(colours, 1).ravel().tolist() == [30, 117, 28]  # their luma
    # An earlier run is set aside.
    cluster.run(run)
    assert (tmp_path / "run" / "previous-001" / "model").exists()
    with pytest.raises(ValueError, match="is the folder of images"):
        cluster.run(Config(folder, num_clusters=(2,), workdir=folder))
    np.savez(tmp_path / "five.npz", images=np.zeros((4, 8, 8, 5), np.uint8))
    with pytest.raises(ValueError, match="5 channels"):
        cluster.run(Config(tmp_path / "five.npz", num_clusters=(2,), workdir=tmp_path / "run"))
    with pytest.raises(ValueError, match="seeds must be at least 2"):
        cluster.run(Config(folder, num_clusters=(2, 3), seeds=1, workdir=tmp_path / "run"))
    with pytest.raises(ValueError, match="image_size=64"):
        cluster.run(Config(folder, method="deepcluster", image_size=64, workdir=tmp_path / "run"))


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its chromedriver on this machine")
def test_the_report_in_a_browser(folder: Path, tmp_path: Path) -> None:
    webdriver = pytest.importorskip("selenium.webdriver")
    cluster.run(Config(folder, method="pixels", workdir=tmp_path, seeds=2, image_size=16))
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    try:
        browser.set_window_size(390, 800)
        browser.get((tmp_path / "report.html").as_uri())
        assert browser.title == "Clusters of my digits é"
        clusters = browser.find_elements("css selector", "details.cluster")
        assert len(clusters) == 3
        assert all(cluster.find_elements("css selector", ".gallery img") for cluster in clusters)
        decode = "Promise.all([...document.images].map(i => (i.loading = 'eager', i.decode())))"
        done = "const done = arguments[0];"
        loaded = browser.execute_async_script(f"{done} {decode}.then(() => done(true), e => done(String(e)))")
        assert loaded is True
        # Nothing is wider than a phone's screen.
        width, screen = browser.execute_script(
            "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert width <= screen
        assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []
    finally:
        browser.quit()


def test_large_photographs_are_read_at_a_part_of_their_size(tmp_path: Path) -> None:
    """As good as whole, upright, in the order of their names, with what is damaged between them."""
    generator = np.random.default_rng(0)
    for number in range(3):
        small = Image.fromarray(generator.integers(0, 256, (6, 8, 3), np.uint8))
        photograph = small.resize((400, 300), Image.Resampling.BICUBIC)
        turned = Image.Exif()
        turned[0x0112] = 1 + 5 * (number // 2)  # the last one lies on its side
        photograph.save(tmp_path / f"{number}.jpg", exif=turned)
        photograph.save(tmp_path / f"{number}.png", exif=turned)
    (tmp_path / "1.jpg").write_bytes(b"\xff\xd8\xff\xe0 damaged")
    read = images.read(tmp_path, 16)
    assert [one.name for one in read.left_out] == ["1.jpg"]
    assert read.names == [
        f"{n}.{kind}" for n in range(3) for kind in ("jpg", "png") if (n, kind) != (1, "jpg")
    ]
    jpeg, png = (read.pixels[[read.names.index(f"{n}.{kind}") for n in (0, 2)]] for kind in ("jpg", "png"))
    assert np.abs(jpeg.astype(float) - png).mean() < 5
