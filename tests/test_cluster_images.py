"""One command from a folder of images to a report, bad folders included."""

import csv
import dataclasses
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from experiments import cluster_images
from experiments.cluster_images import Config


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
    report = cluster_images.run(config)
    assert report.num_clusters == 3
    assert report.scores["clustering_accuracy"] > 80
    assert not report.baseline
    assert report.agreement[3] > 50
    html = (tmp_path / "report.html").read_text()
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
    again = cluster_images.run(Config(some, predict=tmp_path / "model.pkl", workdir=tmp_path / "predicted"))
    chosen = [i for i, row in enumerate(rows) if row["file"].startswith("class 1")]
    np.testing.assert_array_equal(again.labels, report.labels[chosen])
    np.savez(tmp_path / "other.npz", images=np.zeros((4, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="do not fit the model"):
        cluster_images.run(
            Config(tmp_path / "other.npz", predict=tmp_path / "model.pkl", workdir=tmp_path / "predicted")
        )
    with pytest.raises(ValueError, match="not a model"):
        cluster_images.run(Config(some, predict=tmp_path / "results.json", workdir=tmp_path))


def test_the_number_of_clusters_on_which_seeds_agree(folder: Path, tmp_path: Path) -> None:
    config = Config(folder, num_clusters=(2, 3, 9), method="pixels", workdir=tmp_path, image_size=16)
    report = cluster_images.run(config)
    assert set(report.agreement) == {2, 3, 9}
    assert report.agreement[report.num_clusters] == max(report.agreement.values())
    # Finished seeds are read, not learned again.
    stored = {p: p.stat().st_mtime_ns for p in tmp_path.glob("network-*")}
    resumed = cluster_images.run(
        Config(folder, num_clusters=(2, 3, 9), method="pixels", workdir=tmp_path, image_size=16, resume=True)
    )
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("network-*")} == stored
    np.testing.assert_array_equal(resumed.labels, report.labels)


def test_agreement_without_labels_is_that_of_the_arrays(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((30, 9, 9, 3))
    np.savez(tmp_path / "mine.npz", images=images)
    report = cluster_images.run(
        Config(tmp_path / "mine.npz", num_clusters=(2,), method="pixels", seeds=1, workdir=tmp_path / "run")
    )
    assert report.scores == {}
    assert report.agreement == {}
    assert "No labels" in (tmp_path / "run" / "report.html").read_text()


def test_all_kinds_of_files(tmp_path: Path) -> None:
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
    (tmp_path / "empty.png").touch()
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff" + bytes(50))
    whole = (tmp_path / "plain.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "notes.txt").write_text("not an image")
    images = cluster_images.read_images(tmp_path, 16)
    assert len(images.pixels) == 7
    assert images.pixels.shape[1:] == (16, 16, 3)
    assert sorted(name for name, _ in images.skipped) == ["broken.jpg", "cut.png", "empty.png"]
    # The 16-bit image spans the whole range.
    deep = images.pixels[images.names.index("16 bits.png")]
    assert deep.max() > 180
    report = cluster_images.run(
        Config(tmp_path, num_clusters=(2,), method="pixels", seeds=2, workdir=tmp_path / "o")
    )
    assert len(report.labels) == 7
    assert "Left out: 3 files" in (tmp_path / "o" / "report.html").read_text()


@pytest.mark.parametrize(
    ("number", "options", "message"),
    [
        (0, {}, "holds no .png"),
        (1, {}, "num_clusters=2 exceeds the 1 images"),
        (3, {"num_clusters": (4,)}, "num_clusters=4 exceeds the 3 images"),
        (3, {"num_clusters": ()}, "num_clusters is needed"),
        (3, {"num_clusters": (1,)}, "num_clusters=1"),
        (3, {"seeds": 0}, "seeds=0"),
        (-3, {}, "num_clusters=2 exceeds the 1 images that differ"),
    ],
)
def test_bad_folders(number: int, options: dict[str, object], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(abs(number)):
        shade = 10 * index if number > 0 else 7  # less than 0: all images are identical
        Image.new("L", (9, 9), shade).save(folder / f"{index}.png")
    with pytest.raises(ValueError, match=re.escape(message)):
        cluster_images.run(
            Config(
                folder, **({"num_clusters": (2,), "method": "pixels", "workdir": tmp_path / "o"} | options)
            )
        )


def test_what_is_no_folder_and_what_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a folder"):
        cluster_images.run(Config(tmp_path / "nowhere", num_clusters=(2,)))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        cluster_images.run(Config(folder, method="pixels", workdir=tmp_path / "file" / "inside"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").touch()
    with pytest.raises(ValueError, match="none of the 1 files"):
        cluster_images.run(Config(tmp_path / "bad", num_clusters=(2,), workdir=tmp_path / "run"))


def test_the_users_own_files_are_left_alone(tmp_path: Path) -> None:
    """Pictures and results of something else in the folder that is written to; files of other programs."""
    images = tmp_path / "photos" / "a"
    (images / ".thumbnails").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in [*(f"{i}.png" for i in range(6)), ".thumbnails/0.png", "../mine.png"]:
        Image.fromarray(np.uint8(generator.integers(0, 256, (9, 9)))).save(images / name)
    run = Config(images, num_clusters=(2,), method="pixels", workdir=images.parent, image_size=9)
    assert len(cluster_images.run(run).labels) == 6
    cluster_images.run(run)
    assert (images.parent / "mine.png").exists()
    assert not (images.parent / "previous-001" / "mine.png").exists()
    with pytest.raises(ValueError, match="image_size=7 is not accepted: the model was made for 9"):
        cluster_images.run(
            Config(images, predict=images.parent / "model.pkl", image_size=7, workdir=tmp_path)
        )
    other = tmp_path / "other"
    other.mkdir()
    (other / "clusters.csv").write_text("of something else")
    with pytest.raises(ValueError, match=r"holds a clusters.csv of something else"):
        cluster_images.run(Config(images, num_clusters=(2,), workdir=other))


def test_interrupted_and_resumed(folder: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "experiments.cluster_images", "--images", str(folder), "--method", "pixels",
        "--workdir", str(tmp_path), "--seeds", "40",
    ]  # fmt: skip
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 180
    while not list(tmp_path.glob("network-seed1-*.pkl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert "--resume" in output
    assert "Traceback" not in output
    stored = {p: p.stat().st_mtime_ns for p in tmp_path.glob("network-*.pkl")}
    assert 2 <= len(stored) < 40
    config = Config(folder, method="pixels", workdir=tmp_path, seeds=40, resume=True)
    report = cluster_images.run(config)
    assert len(list(tmp_path.glob("network-*.pkl"))) == 40
    assert {p: p.stat().st_mtime_ns for p in stored} == stored
    assert len(report.labels) == 90


def test_stopped_while_encoding(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(folder, method="pixels", workdir=tmp_path / "run", seeds=1, image_size=16)
    whole = cluster_images.run(dataclasses.replace(config, workdir=tmp_path / "whole"))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cluster_images.PixelClustering, "_codes", stop)
        with pytest.raises(KeyboardInterrupt):
            cluster_images.run(config)
    monkeypatch.setattr(cluster_images.PixelClustering, "_learn", stop)  # not again
    resumed = cluster_images.run(dataclasses.replace(config, resume=True))
    np.testing.assert_array_equal(resumed.labels, whole.labels)
    assert not list((tmp_path / "run").glob("*.learned"))


def test_seeds_that_are_there_already(folder: Path, tmp_path: Path) -> None:
    """Of three networks that learned together one is stored, one has learned, and one is missing."""
    config = Config(folder, method="deepcluster", workdir=tmp_path, seeds_together=3)
    cluster_images.run(config)
    models = [tmp_path / f"network-seed{seed}-3.pkl" for seed in range(3)]
    whole = [pickle.loads(path.read_bytes()) for path in models]
    for path in models[:2]:
        path.unlink()
        path.with_suffix(".npy").unlink()
    models[0].with_suffix(".learned").write_bytes(pickle.dumps(whole[0].learned_))
    before = models[2].stat().st_mtime_ns
    cluster_images.run(dataclasses.replace(config, seeds_together=2, resume=True))
    assert models[2].stat().st_mtime_ns == before
    for path, expected in zip(models, whole, strict=True):
        np.testing.assert_array_equal(pickle.loads(path.read_bytes()).labels_, expected.labels_)


def test_names_that_are_not_utf8_and_other_colours(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    generator = np.random.default_rng(0)
    for index in range(8):
        name = os.fsdecode(b"caf\xe9 %d.png" % index)
        Image.fromarray(np.uint8(generator.integers(0, 256, (12, 12)))).save(images / name)
    run = Config(images, num_clusters=(2,), method="pixels", workdir=tmp_path / "run", image_size=12)
    report = cluster_images.run(run)
    assert "caf\ufffd" in (tmp_path / "run" / "clusters.csv").read_text(encoding="utf-8")
    # A gray model takes colour images for gray ones.
    Image.fromarray(np.uint8(generator.integers(0, 256, (12, 12, 3)))).save(images / "colour.png")
    predict = Config(images, predict=tmp_path / "run" / "model.pkl", workdir=tmp_path / "predicted")
    again = cluster_images.run(predict)
    np.testing.assert_array_equal(again.labels[:8], report.labels)
    # An earlier run is set aside.
    cluster_images.run(run)
    assert (tmp_path / "run" / "previous-001" / "model.pkl").exists()
    with pytest.raises(ValueError, match="is the folder of images"):
        cluster_images.run(Config(images, num_clusters=(2,), workdir=images))
    np.savez(tmp_path / "five.npz", images=np.zeros((4, 8, 8, 5), np.uint8))
    with pytest.raises(ValueError, match="5 channels"):
        cluster_images.run(Config(tmp_path / "five.npz", num_clusters=(2,), workdir=tmp_path / "run"))
    with pytest.raises(ValueError, match="seeds must be at least 2"):
        cluster_images.run(Config(images, num_clusters=(2, 3), seeds=1, workdir=tmp_path / "run"))
    with pytest.raises(ValueError, match="image_size=64"):
        cluster_images.run(Config(images, method="deepcluster", image_size=64, workdir=tmp_path / "run"))


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_report_in_a_browser(folder: Path, tmp_path: Path) -> None:
    webdriver = pytest.importorskip("selenium.webdriver")
    cluster_images.run(Config(folder, method="pixels", workdir=tmp_path, seeds=2, image_size=16))
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver_path = shutil.which("chromedriver")
    service = webdriver.ChromeService(executable_path=driver_path) if driver_path else None
    browser = webdriver.Chrome(options=options, service=service)
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
