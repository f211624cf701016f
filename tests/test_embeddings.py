"""`sul-jax` on embeddings: files of vectors, with and without the pictures that they are of."""

import csv
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from sul_jax import cli, estimators
from sul_jax.cli import assign, cluster
from sul_jax.cli.cluster import Config


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 digits of three classes, as pictures and as vectors in three shards, in the order of the files."""
    root = tmp_path_factory.mktemp("embedded")
    all_digits = load_digits()
    chosen = np.concatenate([np.flatnonzero(all_digits.target == label)[:30] for label in range(3)])
    vectors = all_digits.data[chosen]
    for index, image in enumerate(all_digits.images[chosen]):
        path = root / "pictures" / f"class {index // 30}" / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(image * 15)).save(path)
    (root / "shards").mkdir()
    for number, part in enumerate(np.array_split(vectors, 3)):
        np.save(root / "shards" / f"{number}.npy", part.astype(np.float16))
    names = [str(p.relative_to(root / "pictures")) for p in sorted((root / "pictures").rglob("*.png"))]
    order = np.random.default_rng(0).permutation(90)
    labels = np.array(["zero", "one", "two"])[order // 30]
    np.savez(root / "named.npz", embeddings=vectors[order], names=np.array(names)[order], labels=labels)
    return root


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_shards_with_their_pictures(digits: Path, tmp_path: Path) -> None:
    sorted_into = tmp_path / "sorted"
    config = Config(
        digits / "pictures",
        embeddings=digits / "shards",
        workdir=tmp_path / "run",
        seeds=2,
        copy_to=sorted_into,
    )
    report = cluster.run(config)
    assert report.num_clusters == 3  # of the folders
    assert report.scores["clustering_accuracy"] > 85
    html = (tmp_path / "run" / "report.html").read_text()
    for words in ("90 vectors of 64 features", "data:image/webp", "class 1", "Map of the codes", "k_means"):
        assert words in html
    rows = table(tmp_path / "run" / "clusters.csv")
    assert [int(row["cluster"]) for row in rows] == report.labels.tolist()
    assert rows[40]["file"] == str(Path("class 1") / "040.png")
    links = sorted(path.relative_to(sorted_into) for path in sorted_into.rglob("*.png"))
    assert links == sorted(Path(row["cluster"]) / Path(row["file"]).name for row in rows)
    assert (sorted_into / links[0]).resolve().parent.parent == digits / "pictures"
    # New vectors go into its clusters, where they are read from makes no difference.
    again = assign.run(assign.Config(tmp_path / "run", digits / "shards", tmp_path / "new.csv"))
    np.testing.assert_array_equal(again.labels, report.labels)
    assert table(tmp_path / "new.csv")[31]["file"] == "1.npy:1"
    part = assign.run(assign.Config(tmp_path / "run", digits / "shards" / "1.npy", tmp_path / "new.csv"))
    np.testing.assert_array_equal(part.labels, report.labels[30:60])
    np.testing.assert_allclose(part.places.margins, [float(r["margin"]) for r in rows[30:60]], rtol=1e-4)


def test_sorted_once_and_whole(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on finds its sorted pictures, and one that stops in the middle leaves none."""
    sorted_into = tmp_path / "sorted"
    config = Config(
        digits / "pictures",
        embeddings=digits / "shards",
        workdir=tmp_path / "run",
        seeds=1,
        copy_to=sorted_into,
    )
    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cluster.run(config)
    assert not sorted_into.exists()
    assert not list(tmp_path.glob(".sorted*"))
    report = cluster.run(replace(config, resume=True))
    assert len(list(sorted_into.rglob("*.png"))) == 90
    (sorted_into / "0" / "mine.txt").write_text("a note")
    np.testing.assert_array_equal(cluster.run(replace(config, resume=True)).labels, report.labels)
    assert (sorted_into / "0" / "mine.txt").exists()
    with pytest.raises(ValueError, match="exists already; give a new folder"):
        cluster.run(config)


@pytest.mark.slow
def test_a_run_inside_the_folder_of_pictures(digits: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    shutil.copytree(digits / "pictures", pictures)
    shutil.copytree(digits / "shards", pictures / "shards")
    config = Config(
        pictures, embeddings=pictures / "shards", workdir=pictures / "run", seeds=1, num_clusters=3
    )
    report = cluster.run(config)
    np.testing.assert_array_equal(cluster.run(replace(config, resume=True)).labels, report.labels)
    full = [str(path.resolve()) for path in sorted((digits / "pictures").rglob("*.png"))]
    with np.load(digits / "named.npz") as arrays:
        named = write(tmp_path / "full.npz", embeddings=arrays["embeddings"], names=full)
    whole = cluster.run(Config(digits / "pictures", embeddings=named, workdir=tmp_path / "other", seeds=1))
    assert table(tmp_path / "other" / "clusters.csv")[0]["file"] == str(Path("class 0") / "000.png")
    assert whole.num_clusters == 3


def test_names_and_labels_of_the_file(digits: Path, tmp_path: Path) -> None:
    config = Config(digits / "pictures", embeddings=digits / "named.npz", workdir=tmp_path, seeds=2)
    report = cluster.run(config)
    assert report.scores["clustering_accuracy"] > 85
    rows = table(tmp_path / "clusters.csv")
    with np.load(digits / "named.npz") as arrays:
        assert [row["file"] for row in rows] == arrays["names"].tolist()
    assert "zero" in (tmp_path / "report.html").read_text()
    alone = cluster.run(Config(embeddings=digits / "named.npz", workdir=tmp_path / "alone", seeds=2))
    np.testing.assert_array_equal(alone.labels, report.labels)
    html = (tmp_path / "alone" / "report.html").read_text()
    assert "<img" in html  # the map
    assert html.count("data:image/webp") == 0
    assert rows[0]["file"] in html


@pytest.mark.slow
def test_subspaces_several_numbers_and_resume(digits: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "embeddings": digits / "shards",
        "method": "k_subspaces",
        "rank": 2,
        "num_clusters": (2, 3),
        "seeds": 2,
    }
    report = cluster.run(Config(workdir=tmp_path, **options))
    assert set(report.agreement) == {2, 3}
    model = estimators.load(tmp_path / "model")
    assert model.bases_.shape == (report.num_clusters, 2, 64)
    stored = {p: p.stat().st_mtime_ns for p in tmp_path.glob("network-*")}
    assert len(stored) == 4
    resumed = cluster.run(Config(workdir=tmp_path, resume=True, **options))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("network-*")} == stored
    np.testing.assert_array_equal(resumed.labels, report.labels)
    with pytest.raises(ValueError, match="cannot be resumed with rank=3"):
        cluster.run(Config(workdir=tmp_path, resume=True, **(options | {"rank": 3})))
    assert json.loads((tmp_path / "config.json").read_text())["data"]["num_vectors"] == 90


@pytest.mark.slow
def test_rate_reduction(digits: Path, tmp_path: Path) -> None:
    config = Config(embeddings=digits / "named.npz", method="rate_reduction", seeds=1, workdir=tmp_path)
    report = cluster.run(config)
    assert report.scores["clustering_accuracy"] > 90
    again = assign.run(assign.Config(tmp_path, digits / "named.npz", tmp_path / "new.csv"))
    np.testing.assert_array_equal(again.labels, report.labels)


def test_near_duplicates_and_names_of_clusters(digits: Path, tmp_path: Path) -> None:
    with np.load(digits / "named.npz") as arrays:
        vectors, names = arrays["embeddings"], arrays["names"].tolist()
    vectors = np.concatenate([vectors, 2.5 * vectors[:2] + 1e-3, vectors[:1]])
    write(tmp_path / "twice.npz", embeddings=vectors, names=[*names, "=copy", "other", "same"])
    means = np.stack([load_digits().data[load_digits().target == k].mean(axis=0) for k in (7, 1, 0, 2)])
    words = write(tmp_path / "words.npz", embeddings=3 * means, names=["seven", "one", "zero", "two"])
    config = Config(
        embeddings=tmp_path / "twice.npz", words=words, num_clusters=(3,), seeds=1, workdir=tmp_path / "run"
    )
    report = cluster.run(config)
    rows = table(tmp_path / "run" / "duplicates.csv")
    found = {(row["file"], row["other"]) for row in rows if float(row["cosine"]) > 0.999}
    assert (names[0], "same") in found
    assert all(report.labels[i] == report.labels[j] for i, j in ((0, 92), (0, 90), (1, 91)))
    html = (tmp_path / "run" / "report.html").read_text()
    assert all(f", {name}: " in html for name in ("zero", "one", "two"))
    assert "Near duplicates" in html


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def words_of(folder: Path, vectors: np.ndarray) -> Path:
    return write(folder / "words.npz", embeddings=vectors, names=["a", "b"])


def two_shards(folder: Path) -> Path:
    write(folder / "a.npz", embeddings=np.ones((12, 4)), names=[str(n) for n in range(12)])
    write(folder / "b.npz", embeddings=np.ones((12, 4)), names=[str(n) for n in range(14)])
    return folder


two = {"num_clusters": 2}
BAD: dict[str, tuple[Any, str]] = {
    "nothing": (lambda f, d: {}, "images is needed: a folder of pictures, or --embeddings"),
    "pictures' method": (
        lambda f, d: {"embeddings": d / "shards", "method": "energy"},
        "method='energy' learns from pictures; with --embeddings it must be one of k_means, k_subspaces",
    ),
    "vectors' method": (
        lambda f, d: {"images": d / "pictures", "method": "k_means"}, "clusters vectors: give --embeddings"
    ),
    "fewer files": (
        lambda f, d: {"images": d / "pictures" / "class 1", "embeddings": d / "shards"},
        "holds 30 files, but there are 90 embeddings",
    ),
    "missing files": (
        lambda f, d: {"images": d / "shards", "embeddings": d / "named.npz"},
        "lacks 90 of the 90 files that the embeddings name",
    ),
    "names": (
        lambda f, d: {"embeddings": write(f / "a.npz", embeddings=np.ones((5, 4)), names=["a", "b"])},
        "a.npz holds 2 names for 5 vectors",
    ),
    "names of one shard": (
        lambda f, d: {"embeddings": two_shards(f)}, "b.npz holds 14 names for 12 vectors"
    ),
    "names outside": (
        lambda f, d: {
            "images": d / "shards",
            "embeddings": write(f / "a.npz", embeddings=np.ones((1, 4)), names=["../out.png"]),
        },
        "'../out.png' of the embeddings is outside images=",
    ),
    "words of NaN": (
        lambda f, d: {"embeddings": d / "shards", "words": words_of(f, np.full((2, 64), np.nan))} | two,
        "words=.*words.npz, row 0: NaN",
    ),
    "sorted among the pictures": (
        lambda f, d: {"images": d, "embeddings": d / "shards", "copy_to": d / "pictures" / "new"},
        "is inside the folder of images",
    ),
    "sorted into the workdir": (
        lambda f, d: {"images": d / "pictures", "embeddings": d / "shards", "copy_to": f / "run"},
        "copy_to=.* is the workdir",
    ),
    "NaN": (
        lambda f, d: {"embeddings": write(f / "a.npz", embeddings=np.full((5, 4), np.nan))} | two,
        "a.npz, row 0: NaN, infinite or beyond float32",
    ),
    "norm 0": (
        lambda f, d: {"embeddings": write(f / "a.npz", embeddings=np.diag([1.0, 1, 0, 1]))} | two,
        "a.npz, row 2: norm 0; cosines need norms above 0",
    ),
    "clusters": (
        lambda f, d: {"embeddings": write(f / "a.npz", embeddings=np.ones((5, 4))), "num_clusters": 9},
        "num_clusters=9 exceeds the 5 vectors",
    ),
    "rank": (
        lambda f, d: {"embeddings": d / "shards", "method": "k_subspaces", "rank": 65, "num_clusters": 2},
        "rank=65 is not accepted: it must be between 1 and 64: X has 64 features",
    ),
    "missing": (lambda f, d: {"embeddings": f / "no.npy", "num_clusters": 2}, "neither a file nor a folder"),
    "words alone": (lambda f, d: {"images": d / "pictures", "words": f / "w.npz"}, "give --embeddings too"),
    "words of another network": (
        lambda f, d: {"embeddings": d / "shards", "words": words_of(f, np.ones((2, 3)))} | two,
        "holds embeddings of 3 features, but the embeddings to cluster have 64",
    ),
    "words without names": (
        lambda f, d: {"embeddings": d / "shards", "words": d / "shards"} | two,
        "has no 'names' beside its embeddings",
    ),
    "no pictures to sort": (
        lambda f, d: {"embeddings": d / "shards", "num_clusters": 2, "copy_to": f / "sorted"},
        "copy_to needs pictures: images must be their folder",
    ),
    "something there": (
        lambda f, d: {"images": d / "pictures", "embeddings": d / "shards", "copy_to": d},
        "copy_to=.* exists already; give a new folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_one_line(case: str, digits: Path, tmp_path: Path) -> None:
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message) as raised:
        cluster.run(Config(workdir=tmp_path / "run", **make(tmp_path, digits)))
    assert "\n" not in str(raised.value)


def test_a_model_of_vectors_takes_no_pictures(digits: Path, tmp_path: Path) -> None:
    cluster.run(Config(embeddings=digits / "shards", num_clusters=2, seeds=1, workdir=tmp_path))
    with pytest.raises(ValueError, match="holds no vectors"):
        assign.run(assign.Config(tmp_path, digits / "pictures", tmp_path / "new.csv"))
    np.save(tmp_path / "wide.npy", np.ones((3, 9)))
    with pytest.raises(ValueError, match="X has 9 features, but KMeans is expecting 64"):
        assign.run(assign.Config(tmp_path, tmp_path / "wide.npy", tmp_path / "new.csv"))


def test_the_command_line(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sul-jax", "cluster", "--embeddings", str(digits / "named.npz"), "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--workdir", str(tmp_path)])
    cli.main()
    assert "90 vectors of 64 features, 3 classes" in capsys.readouterr().out
