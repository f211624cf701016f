"""The words about an accelerator that is there and not used."""

from pathlib import Path

import jax
import pytest

from sul_jax import devices


@pytest.fixture(autouse=True)
def _bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("COLAB_GPU", "COLAB_TPU_ADDR", "TPU_ACCELERATOR_TYPE"):
        monkeypatch.delenv(name, raising=False)


def _install_nvidia_smi(folder: Path, script: str) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)


def test_cpu_alone_is_no_reason_to_warn() -> None:
    assert devices.report() == f"JAX computes on: {jax.devices()}"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("COLAB_GPU", "1", "an NVIDIA GPU"),
        ("COLAB_GPU", "0", None),
        ("COLAB_GPU", "", None),
        ("COLAB_TPU_ADDR", "10.0.0.2:8470", "a TPU"),
        ("TPU_ACCELERATOR_TYPE", "v5e-1", "a TPU"),
    ],
)
def test_hosts_that_promise_one(
    name: str, value: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    text = devices.report()
    assert ("WARNING" in text) == (expected is not None)
    assert expected is None or f"this machine has {expected}, but JAX uses the CPU" in text


@pytest.mark.parametrize(
    ("script", "warns"),
    [
        ("echo 'GPU 0: Tesla T4'", True),
        ("echo 'No devices were found'", False),
        ("echo 'NVIDIA-SMI has failed: no GPU' && exit 9", False),
    ],
)
def test_nvidia_driver(script: str, warns: bool, tmp_path: Path) -> None:
    _install_nvidia_smi(tmp_path, script)
    assert ("WARNING" in devices.report()) == warns


def test_accelerator_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLAB_GPU", "1")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "WARNING" not in devices.report()
