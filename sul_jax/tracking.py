"""A training's numbers in TensorBoard or Weights & Biases (`pip install 'sul_jax[tracking]'`)."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np

from sul_jax._check import check_choice

Service = Literal["tensorboard", "wandb"]


class Tracker:
    """Sends a training's numbers to a service, until `close` or the end of a `with` block.

    TensorBoard reads them from files (`tensorboard --logdir FOLDER`). Weights & Biases gets a run of the
    project `sul_jax`, online or, as its own settings say (`WANDB_MODE=offline`), on disk.
    """

    def __init__(self, service: Service, folder: str | Path, *, about: Mapping[str, Any] | None = None):
        """Opens the service.

        Args:
          service: `"tensorboard"` or `"wandb"`.
          folder: where its files go.
          about: what the run computes, such as its options.

        Raises:
          ValueError: another service, or its package is not installed.

        Example:
          >>> from sul_jax import tracking
          >>> tracker = tracking.Tracker("tensorboard", "runs/tracked")  # doctest: +SKIP
          >>> def callback(done, state, infos):  # of `training.train`
          ...     tracker.log({"loss": infos.loss[-1]}, step=done)
        """
        check_choice("service", service, get_args(Service))
        package = {"tensorboard": "tensorboardX", "wandb": "wandb"}[service]
        try:
            module = importlib.import_module(package)
        except ImportError:
            raise ValueError(f"{service} needs {package}: pip install 'sul_jax[tracking]'") from None
        self._step = 0
        described = dict(about or {})
        self._writer: Any = None
        self._run: Any = None
        if service == "tensorboard":
            self._writer = module.SummaryWriter(logdir=str(folder), flush_secs=10)
            self._writer.add_text(
                "about", "\n".join(f"- {name}: {value}" for name, value in described.items())
            )
        else:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._run = module.init(project="sul_jax", dir=str(folder), config=described)

    def log(self, values: Mapping[str, Any], *, step: int | None = None) -> None:
        """Sends numbers; what is not one number is left out.

        Args:
          values: by name.
          step: steps done; by default as many as at the last call.
        """
        self._step = self._step if step is None else step
        numbers = {name: float(value) for name, value in values.items() if _is_number(value)}
        if self._run is not None:
            self._run.log(numbers | {"step": self._step})
            return
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, self._step)

    def close(self) -> None:
        """Sends what is waiting; at the end of a `with` block by itself."""
        if self._run is not None:
            self._run.finish()
        else:
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_number(value: Any) -> bool:
    array = np.asarray(value)
    return array.ndim == 0 and array.dtype.kind in "iuf"
