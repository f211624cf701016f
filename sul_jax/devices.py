"""What JAX computes on, and whether an accelerator of this machine is left unused."""

import os
import shutil
import subprocess

import jax


def report() -> str:
    """The devices that JAX uses; with a warning where the machine has an accelerator and JAX does not use it.

    JAX falls back to the CPU without an error when its plugin for the accelerator is missing or of another
    version than jax itself. On Colab this happens when a newer jax is installed over the one that is there.

    Returns:
      One line of devices; three more where an accelerator was expected and is not used.

    Example:
      >>> from sul_jax import devices
      >>> print(devices.report())  # doctest: +SKIP
      JAX computes on: [CudaDevice(id=0)]
    """
    lines = [f"JAX computes on: {jax.devices()}"]
    expected = _expected()
    if expected and jax.default_backend() == "cpu":
        lines += [
            f"WARNING: this machine has {expected}, but JAX uses the CPU. Everything works, only slower.",
            f"The plugin of JAX {jax.__version__} for it is missing or has another version. On Colab: choose",
            "Runtime > Disconnect and delete runtime, then run the first cell again, without installing jax.",
        ]
    return "\n".join(lines)


def _expected() -> str | None:
    """The accelerator that this machine has, in words."""
    if _has_nvidia_gpu() or os.environ.get("COLAB_GPU", "0") not in ("", "0"):
        return "an NVIDIA GPU"
    if any(os.environ.get(name) for name in ("COLAB_TPU_ADDR", "TPU_ACCELERATOR_TYPE")):
        return "a TPU"
    return None


def _has_nvidia_gpu() -> bool:
    """Whether the driver's own command lists one."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        listed = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return "GPU" in listed.stdout
