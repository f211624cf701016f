from functools import cache
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from experiments import benchmark
from experiments.benchmark import Config
from sul_jax.nn import backbones


@pytest.mark.slow
def test_benchmark_prints_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backbones.RESNET_BLOCKS, 18, (1,))
    monkeypatch.setattr(benchmark, "matmul_rate", cache(benchmark.matmul_rate))
    np.savez(tmp_path / "some.npz", images=load_digits().images[:20] / 16)
    text = benchmark.run(
        Config(
            dataset=str(tmp_path / "some.npz"),
            batch_size=2,
            repetitions=1,
            image_batch=2,
            acol_batch=2,
            features=300,
            tables=(
                "energy",
                "k_subspaces",
                "k_means",
                "deep_cluster",
                "coding_rate",
                "resnet",
                "hebbian",
                "acol",
            ),
            workdir=tmp_path,
        )
    )
    assert "3layer, training on 60,000" in text
    assert "k-means on one layer's codes" in text
    assert "20 iterations of k-means on 300 × 256, k = 300" in text
    assert "small AlexNet, step" in text
    assert "batch 1024" not in text  # growth was not asked for
    assert (tmp_path / "benchmark.md").read_text() == text + "\n"


def test_least_operations() -> None:
    """Layer 3 of the published network: 361 million operations for an image."""
    layer = benchmark.energy.ARCHITECTURES["3layer"].layers[2]
    inference, step = benchmark.layer_operations(layer, (1, 23, 23, 9))
    assert inference == pytest.approx(361e6, rel=0.01)
    assert step / inference == pytest.approx(1 + 1 / 58)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="repetitions=0 is not accepted"):
        benchmark.run(Config(repetitions=0))
    with pytest.raises(ValueError, match="tables is empty"):
        benchmark.run(Config(tables=()))
