"""Methods side by side on a few digits."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from experiments import compare, data
from experiments.common import runs
from experiments.compare import Config


def test_a_table_of_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    config = Config(
        "digits", methods=("pixels",), num_images=200, seeds=2, num_clusters=(5, 8, 10),
        workdir=tmp_path / "run", record=True,
    )  # fmt: skip
    found = compare.run(config)
    assert len(found["pixels"]) == 2
    assert 50 < found["pixels"][0]["clustering_accuracy"] <= 100
    assert found["pixels"][0]["knn_accuracy"] > 70
    assert found["pixels"][0]["peak_gib"] > 0.1
    text = capsys.readouterr().out
    assert "pixels" in text
    measured = json.loads((tmp_path / "run" / "measures.json").read_text())["pixels"]
    assert list(measured) == ["5", "8", "10"]
    assert list(measured["5"]) == ["agreement", "silhouette", "gap", "coding_length"]
    assert measured["10"]["agreement"] == found["pixels"][0]["agreement"] > 0
    assert (tmp_path / "run" / "measures.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == found
    recorded = json.loads((tmp_path / "results" / "compare.json").read_text())
    assert [(r["seed"], r["config"]["methods"]) for r in recorded] == [(0, ["pixels"]), (1, ["pixels"])]


@pytest.mark.slow
def test_codes_clustered_by_an_estimator_of_vectors(tmp_path: Path) -> None:
    config = Config(
        "digits", methods=("pixels", "pixels+k_means"), num_images=200, num_clusters=(5,), workdir=tmp_path
    )
    found = compare.run(config)
    assert found["pixels"][0]["knn_accuracy"] == found["pixels+k_means"][0]["knn_accuracy"]
    assert 50 < found["pixels+k_means"][0]["clustering_accuracy"] <= 100
    assert list(json.loads((tmp_path / "measures.json").read_text())) == ["pixels"]


@pytest.mark.slow
def test_umap_and_density(tmp_path: Path) -> None:
    """In this process, on codes that an earlier method left."""
    pytest.importorskip("umap")
    digits = data.load("digits", None).test[:300]
    assert digits.labels is not None
    codes = digits.images.reshape(300, -1).astype(np.float32)
    np.savez(tmp_path / "pixels-0.npz", codes=codes, seconds=100.0, peak=1000.0)
    one = compare.judge("pixels+hdbscan", 0, digits.images, digits.labels, (10, 5), tmp_path)
    assert one.scores["seconds"] > 100
    assert one.scores["peak_gib"] == 1000
    assert one.scores["clusters_found"] == one.clusters[10].max() > 3
    assert one.scores["clustering_accuracy"] > 50
    assert not one.measures


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("pixels+magic",)}, "'pixels+magic' is not one of energy"),
        ({"methods": ("magic",)}, "'magic' is not one of energy"),
        ({"seeds": 0}, "seeds=0"),
        ({"num_clusters": (1,)}, "num_clusters=(1,)"),
    ],
)
def test_bad_options(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        compare.run(Config(**({"dataset": "digits", "workdir": tmp_path} | options)))


def test_data_without_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "plain.npz", images=np.zeros((30, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="no labels"):
        compare.run(Config(str(tmp_path / "plain.npz"), workdir=tmp_path))
