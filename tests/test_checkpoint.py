"""Checkpoints are whole or not there, and damage is told in one line."""

import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import mnist_energy
from experiments.common import runs, training
from sul_jax import _checkpoint, _files, estimators
from sul_jax.nn import MLP

TREE = {"a": jnp.arange(100.0), "b": [np.arange(3), {"seconds": np.float64(2.0)}]}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    _checkpoint.save(tmp_path / "saved", TREE, {"kind": "tree"})
    return tmp_path / "saved"


def test_round_trip(saved: Path) -> None:
    assert _checkpoint.about(saved) == {"kind": "tree"}
    jax.tree.map(np.testing.assert_array_equal, _checkpoint.load(saved), TREE)
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_every_damaged_file_is_named_in_one_line(saved: Path) -> None:
    files = [p for p in saved.rglob("*") if p.is_file() and p.stat().st_size and p.name != "checksums.json"]
    assert len(files) > 5
    for path in files:
        whole = path.read_bytes()
        middle = len(whole) // 2
        for content in (
            whole[:middle],
            whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        ):
            path.write_bytes(content)
            for read in (_checkpoint.load, _checkpoint.about):
                with pytest.raises(ValueError, match="is damaged") as error:
                    read(saved)
                assert path.name in str(error.value)
                assert "\n" not in str(error.value)
        path.unlink()
        with pytest.raises(ValueError, match="is damaged"):
            _checkpoint.load(saved)
        path.write_bytes(whole)
    (saved / "checksums.json").write_text('{"_METADATA": 1')
    with pytest.raises(ValueError, match="checksums.json' is damaged or not JSON"):
        _checkpoint.load(saved)


class Usage(NamedTuple):
    free: int


def test_a_full_disk_is_told_in_one_line(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(1000))
        with pytest.raises(OSError, match="cannot be written: 1 MiB are needed, but the disk has 0 MiB left"):
            _checkpoint.save(saved, TREE)

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\n" + "a source line\n" * 200)

    monkeypatch.setattr("orbax.checkpoint.v1.save", fail)
    with pytest.raises(OSError, match="cannot be written: No space left on device$"):
        _checkpoint.save(saved, TREE)
    assert _checkpoint.about(saved) == {"kind": "tree"}  # the earlier one is still there


def test_an_interruption_waits_for_the_end_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orbax.checkpoint import v1 as ocp

    save = ocp.save

    def interrupted(*arguments: Any, **options: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        save(*arguments, **options)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ocp, "save", interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            _checkpoint.save(tmp_path / "saved", TREE)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)
    jax.tree.map(np.testing.assert_array_equal, _checkpoint.load(tmp_path / "saved"), TREE)


def test_a_training_keeps_one_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = training.Checkpoints(tmp_path / "training")
    assert checkpoints.newest() is None
    checkpoints.save((1, 20), {"step": np.array(20)})

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # after Orbax has written, before it counts
        patch.setattr(_checkpoint, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save((1, 40), {"step": np.array(40)})
    assert checkpoints.newest() == ((1, 20), {"step": 20})
    checkpoints.save((2, 0), {"step": np.array(60)})
    assert checkpoints.newest() == ((2, 0), {"step": 60})
    assert [path.name for path in checkpoints.folder.iterdir()] == ["000002-000000"]


def mlp() -> MLP:
    return MLP(2, 3, num_layers=1, rngs=nnx.Rngs(0))


def test_saved_through_a_link_and_into_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "behind").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "behind")
    for _ in range(3):
        mlp().save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["behind", "link"]
    MLP.load(tmp_path / "link")
    (tmp_path / "behind" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        mlp().save(tmp_path)


def test_what_is_written_may_be_read_by_whom_new_files_may(tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    _files.write_json(tmp_path / "written", {})
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_no_path_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for use in (mlp().save, MLP.load, estimators.load):
        with pytest.raises(
            ValueError, match="path='gs://bucket/net' is not accepted: it must be a folder on a"
        ):
            use("gs://bucket/net")
    assert not any(tmp_path.iterdir())


def test_a_result_that_is_cut_off_is_named(tmp_path: Path) -> None:
    with runs.Workdir("mnist_energy", mnist_energy.Config(workdir=tmp_path), data={}) as workdir:
        assert workdir.finished(0) is None
        (tmp_path / "seed0.json").write_text('{"config": {')
        with pytest.raises(ValueError, match=r"seed0\.json' is damaged or not JSON: .* line 1"):
            workdir.finished(0)


def test_a_whole_checkpoint_is_there_while_the_new_one_takes_its_place(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path.name == ".saved.new":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            _checkpoint.save(saved, {"a": jnp.zeros(3)})
    assert not saved.exists()
    jax.tree.map(np.testing.assert_array_equal, _checkpoint.load(saved), TREE)
    _checkpoint.save(saved, {"a": jnp.zeros(3)})
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]
