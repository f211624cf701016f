import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import data, mnist_energy
from experiments.common import energy_curve, runs
from experiments.mnist_energy import Config
from sul_jax import metrics
from sul_jax.nn import EnergyNet

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run of seconds: one layer, a hundred digits."""
    return Config(
        dataset="digits",
        workdir=tmp_path / "run",
        architecture="1layer",
        num_train=128,
        num_test=100,
        batch_size=32,
        passes=1,
        warmup_steps=2,
        num_train_evaluated=100,
        evaluate_layers=False,
        learning_curve=False,
    )


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than learning here."""
    monkeypatch.setattr(mnist_energy, "draw", lambda *_: None)


def bases(result: runs.SeedResult) -> np.ndarray:
    return np.asarray(result.network.learned_states()[0][1].bases)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_run_leaves_everything_behind(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy_curve, "NUM_STEPS", 2)
    (result,) = mnist_energy.run(replace(config, learning_curve=True, evaluate_layers=True, seed=3))
    folder = config.workdir
    for name in (
        "figure3_kernels", "figure4_feature_maps", "figure5_learning_curve", "figure6_zca_kernel",
        "clusters", "confusion", "energies",
    ):  # fmt: skip
        assert (folder / f"{name}.png").stat().st_size > 1000, name
    stored = json.loads((folder / "results.json").read_text())
    assert stored == [{"seed": 3, "metrics": result.metrics}]
    test = data.load("digits").test[: config.num_test]
    clusters = result.network.predict(test.images / np.float32(255))
    error = 100 * metrics.clustering_error(test.labels, clusters)
    assert result.metrics["test_clustering_error"] == pytest.approx(error, abs=1)
    assert json.loads((folder / "config.json").read_text())["architecture"] == "1layer"
    network = EnergyNet.load(folder / "network-seed3")
    np.testing.assert_array_equal(np.asarray(network.learned_states()[0][1].bases), bases(result))
    # Same seed, same result; the first run is set aside, not lost.
    assert {"pixels", "zca", "layer1"} <= {name.removesuffix("_clustering_error") for name in result.metrics}
    # Stopped while drawing: the resumed run draws.
    with monkeypatch.context() as patch:
        patch.setattr(mnist_energy.figures, "zca_kernel", interrupt)
        with pytest.raises(KeyboardInterrupt):
            mnist_energy.run(replace(config, seed=3))
    (again,) = mnist_energy.run(replace(config, seed=3, resume=True))
    assert (folder / "clusters.png").exists()
    np.testing.assert_array_equal(bases(again), bases(result))
    assert (folder / "previous-001" / "results.json").exists()


@pytest.mark.usefixtures("no_pictures")
def test_seeds_together_are_the_seeds_alone(config: Config) -> None:
    together = mnist_energy.run(replace(config, seeds=2, seeds_together=2))
    alone = mnist_energy.run(replace(config, seeds=2, seeds_together=1))
    for one, other in zip(together, alone, strict=True):
        projectors = [np.einsum("krd,kre->kde", bases(r), bases(r)) for r in (one, other)]
        assert np.abs(projectors[0] - projectors[1]).mean() < 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_networks_side_by_side(config: Config) -> None:
    """A run resumed with a second network keeps its first; codes are clustered together."""
    (one,) = mnist_energy.run(config)
    (both,) = mnist_energy.run(replace(config, networks=2, code_whitening=0.3, resume=True))
    (first, second) = both.network.learned_states()
    np.testing.assert_array_equal(np.asarray(first[1].bases), bases(one))
    assert not np.allclose(first[1].bases, second[1].bases)
    assert both.network.centroids is not None
    assert both.network.centroids[...].shape == (10, 20)


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_devices_split_the_batch(config: Config) -> None:
    (one,) = mnist_energy.run(config)
    (eight,) = mnist_energy.run(replace(config, devices=8))
    projectors = [np.einsum("krd,kre->kde", bases(r), bases(r)) for r in (one, eight)]
    assert np.abs(projectors[0] - projectors[1]).mean() < 1e-3


@pytest.mark.parametrize(
    "change", [{"zca": False}, {"rescale": False}, {"rank_one": True}, {"random_subspaces": True}]
)
def test_ablations(config: Config, change: dict) -> None:
    (result,) = mnist_energy.run(replace(config, **change))
    assert np.isfinite(result.metrics["test_clustering_error"])
    if "rank_one" in change:
        assert bases(result).shape[1] == 1
    if "zca" in change:
        np.testing.assert_allclose(result.metrics["zca_dc_ratio"], 1, atol=1e-3)


@pytest.mark.usefixtures("no_pictures")
def test_killed_and_resumed(config: Config) -> None:
    """SIGKILL in the middle of training; the resumed run ends in the same bases, bit for bit."""
    (whole,) = mnist_energy.run(replace(config, passes=10))
    workdir = config.workdir.with_name("killed")
    code = (
        "from pathlib import Path; from experiments import mnist_energy as m\n"
        "from experiments.common import training; training.CHECKPOINT_SECONDS = 0.0\n"
        f"m.run(m.Config(dataset='digits', workdir=Path({str(workdir)!r}), architecture='1layer',"
        "num_train=128, num_test=100, batch_size=32, passes=10, warmup_steps=2,"
        "num_train_evaluated=100, evaluate_layers=False, learning_curve=False))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    checkpoints = workdir / "checkpoints-0-0"
    while time.monotonic() < deadline and process.poll() is None:
        if checkpoints.exists() and any(p.name >= "000000-000005" for p in checkpoints.iterdir()):
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (workdir / "results.json").exists()
    (resumed,) = mnist_energy.run(replace(config, passes=10, workdir=workdir, resume=True))
    np.testing.assert_array_equal(bases(resumed), bases(whole))
    with pytest.raises(ValueError, match="holds a run with rescale=True, .* rescale=False"):
        mnist_energy.run(replace(config, passes=10, workdir=workdir, resume=True, rescale=False))


@pytest.mark.usefixtures("no_pictures")
def test_record(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    mnist_energy.run(replace(config, record=True, seeds=2))
    records = json.loads((tmp_path / "mnist_energy.json").read_text())
    assert [r["seed"] for r in records] == [0, 1]
    assert records[0]["dataset"]["name"] == "digits"
    assert records[0]["config"]["architecture"] == "1layer"
    assert not any(str(tmp_path) in json.dumps(r) for r in records)
    # Nothing is recorded twice, and what was not recorded can be afterwards.
    mnist_energy.run(replace(config, record=True, seeds=2, resume=True))
    assert len(json.loads((tmp_path / "mnist_energy.json").read_text())) == 2


def test_a_folder_in_use_or_of_something_else(config: Config) -> None:
    config.workdir.mkdir()
    (config.workdir / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json that is not a run of mnist_energy"):
        mnist_energy.run(config)
    (config.workdir / "config.json").unlink()
    thesis = config.workdir / "thesis.txt"
    thesis.write_text("years of work")
    with (
        runs.Workdir("mnist_energy", config, data={}),
        pytest.raises(ValueError, match="is in use by another run"),
    ):
        mnist_energy.run(config)
    mnist_energy.run(config)
    assert thesis.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "300"], "batch_size=300 exceeds the 256 training images"),
        (["--seeds", "0"], "seeds=0 is not accepted"),
        (["--num-clusters", "2000"], "num_clusters=2000 exceeds the 1797 test images"),
        (["--seed", str(2**32)], "the last seed, 4294967296, is beyond 2³² − 1"),
        (
            ["--devices", "2", "--seeds-together", "2", "--seeds", "2"],
            "not accepted on a CPU with devices > 1",
        ),
        (["--devices", "99"], "devices=99 is not accepted"),
        (["--dataset", "nothing"], "dataset 'nothing' is unknown"),
        (
            ["--dataset", "tiny.npz", "--batch-size", "4"],
            "kernel_size=5 is larger than the padded",
        ),
        (["--dataset", "nan.npz"], "NaN or infinite pixels"),
        (["--workdir", "/proc/nowhere"], "workdir='/proc/nowhere' cannot be written"),
    ],
)
def test_bad_options_are_one_line(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    np.savez("tiny.npz", images=np.zeros((12, 1, 1), np.uint8))
    np.savez("nan.npz", images=np.full((300, 28, 28), np.nan))
    defaults = ["--dataset", "digits", "--architecture", "1layer", "--num-train", "256"]
    monkeypatch.setattr(sys, "argv", ["mnist_energy", *defaults, *options])
    with pytest.raises(SystemExit) as stop:
        mnist_energy.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("runs/**/*.json"))


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mnist_energy", "--help"])
    with pytest.raises(SystemExit):
        mnist_energy.main()
    text = capsys.readouterr().out
    for field in Config.__dataclass_fields__:
        assert field.replace("_", "-") in text
    assert jax.device_count() == 8  # the virtual devices of conftest.py


def test_networks_of_a_seed_have_minibatches_of_their_own() -> None:
    own = SimpleNamespace(config=SimpleNamespace(batch_size=8, random_subspaces=False), number=64, steps=8)
    members = [mnist_energy.Member(3, 0), mnist_energy.Member(3, 1), mnist_energy.Member(4, 0)]
    first, second = (mnist_energy.Trainer._plan(own, members, place).inputs(0, 8) for place in (0, 1))
    orders = [*np.moveaxis(first, 1, 0), *np.moveaxis(second, 1, 0)]
    assert len({order.tobytes() for order in orders}) == 6
    for order in orders:  # each is a pass over all images
        np.testing.assert_array_equal(np.sort(order, axis=None), np.arange(64))


def test_images_whose_labels_the_search_saw_are_not_tested(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist_energy, "run_seeds", lambda workdir, learn, *_, **__: learn.args)
    images = data.load("digits").test_images
    for architecture, number in (("digits", 898), ("1layer", 0)):
        *_, test = mnist_energy.run(replace(config, architecture=architecture, num_test=None))
        np.testing.assert_array_equal(test.images, images[number:])
