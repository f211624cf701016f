"""Numbers reach TensorBoard's files, and Weights & Biases as its package wants them."""

import json
import struct
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import nmce_manifolds
from sul_jax import tracking


def _sent(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All numbers in TensorBoard's files, by name."""
    from tensorboardX.proto import event_pb2

    def events() -> Iterator[Any]:
        for path in folder.glob("events.*"):
            content, place = path.read_bytes(), 0
            while place < len(content):  # length and its checksum, the event and its checksum
                (length,) = struct.unpack_from("<Q", content, place)
                yield event_pb2.Event.FromString(content[place + 12 : place + 12 + length])
                place += length + 16

    numbers: dict[str, list[tuple[int, float]]] = {}
    for event in events():
        for value in event.summary.value:
            if value.HasField("simple_value"):
                numbers.setdefault(value.tag, []).append((event.step, value.simple_value))
    return numbers


def test_numbers_reach_tensorboard(tmp_path: Path) -> None:
    with tracking.Tracker("tensorboard", tmp_path, about={"rank": 3}) as tracker:
        tracker.log({"loss": np.float32(0.5), "wins": np.ones(4), "name": "three"}, step=10)
        tracker.log({"loss": 0.25, "epochs": 2}, step=20)
        tracker.log({"accuracy": 98})
    assert _sent(tmp_path) == {
        "loss": [(10, 0.5), (20, 0.25)],
        "epochs": [(20, 2.0)],
        "accuracy": [(20, 98.0)],
    }


def test_numbers_reach_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[Any] = []
    package = types.ModuleType("wandb")

    def init(**options: Any) -> types.SimpleNamespace:
        lines.append(options)
        return types.SimpleNamespace(log=lines.append, finish=lambda: lines.append("the end"))

    vars(package)["init"] = init
    monkeypatch.setitem(sys.modules, "wandb", package)
    with tracking.Tracker("wandb", tmp_path / "new", about={"rank": 3}) as tracker:
        tracker.log({"loss": 0.5}, step=10)
        tracker.log({"accuracy": 98})
    assert lines[0] == {"project": "sul_jax", "dir": str(tmp_path / "new"), "config": {"rank": 3}}
    assert lines[1:] == [{"loss": 0.5, "step": 10}, {"accuracy": 98.0, "step": 10}, "the end"]
    assert (tmp_path / "new").is_dir()


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="service='mlflow' is not accepted"):
        tracking.Tracker("mlflow", tmp_path)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb needs wandb: pip install 'sul_jax\[tracking\]'"):
        tracking.Tracker("wandb", tmp_path)


def test_an_experiment_sends_what_it_logs(tmp_path: Path) -> None:
    config = nmce_manifolds.Config(
        workdir=tmp_path, steps=2, tcr_steps=1, batch_size=64, hidden_size=16, num_layers=1, num_test=100,
        seeds=2, track="tensorboard",
    )  # fmt: skip
    nmce_manifolds.run(config)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    sent = _sent(tmp_path / "tensorboard")
    last = logged[-1]
    assert sent[f"seed{last['seed']}/clustering_accuracy"][-1][1] == pytest.approx(
        last["clustering_accuracy"]
    )
    assert len({name.split("/")[0] for name in sent}) >= 2
