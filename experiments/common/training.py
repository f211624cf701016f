"""Training that shows its progress, keeps checkpoints and goes on from them."""

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.common.options import ConfigError
from experiments.common.runs import Workdir
from sul_jax import training
from sul_jax._checkpoint import Checkpoints as Checkpoints

# Time between two checkpoints of a training run.
CHECKPOINT_SECONDS = 20.0


class Timer:
    """Seconds of a training, earlier parts of a resumed one included, and when to save it again."""

    def __init__(self, before: float = 0.0):
        self._last = time.monotonic()
        self._began = self._last - before

    def seconds(self) -> float:
        """So far."""
        return time.monotonic() - self._began

    def is_due(self) -> bool:
        """Whether the last checkpoint is old."""
        return time.monotonic() - self._last >= CHECKPOINT_SECONDS

    def saved(self) -> None:
        """Says that there is a new checkpoint."""
        self._last = time.monotonic()


class Trained(NamedTuple):
    """What `run_steps` gave.

    Attributes:
      state: after all steps.
      snapshots: (step, what `snapshot` took of the state) at the steps asked for.
      seconds: of training, earlier parts of a resumed run included.
    """

    state: Any
    snapshots: list[tuple[int, Any]]
    seconds: float


def seeds_name(seeds: range) -> str:
    """Of seeds trained together: `3`, or `0-to-3`."""
    return f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]}-to-{seeds[-1]}"


def run_steps(
    steps: training.Step,
    state: Any,
    inputs: training.Inputs = lambda first, end: first,
    *arrays: Any,
    num_steps: int,
    workdir: Workdir,
    name: str,
    title: str = "",
    stride: int = 1,
    unit: str = "step",
    value_name: str = "loss",
    about: Mapping[str, Any] | None = None,
    snapshot_at: Collection[int] = (),
    snapshot: Callable[[Any], Any] = lambda state: state,
    snapshot_like: Any = None,
) -> Trained:
    """Takes steps with a progress bar; goes on from the newest checkpoint in `folder`.

    Args:
      steps: as in `training.train`, to the new state and the losses, or the infos of a gradient rule's steps.
      state: a tree of arrays; it is not used again where `steps` donates it.
      inputs: as in `training.train`; by default the number of the first step.
      *arrays: handed to every step.
      num_steps: how many.
      workdir: of the run, where checkpoints and the log are kept.
      name: of the checkpoints.
      title: of the progress bar; by default the seed, which `name` is.
      stride: steps of one call of `steps`.
      unit: what a step is called there.
      value_name: what the loss is called there.
      about: what the log says at each checkpoint beside the step, the loss and its terms; None for no log.
      snapshot_at: steps at which `snapshot` looks at the state.
      snapshot: what it keeps.
      snapshot_like: a tree like what it keeps, where taking one is expensive.

    Raises:
      ConfigError: the loss is not finite, or the checkpoint has gone further than `num_steps`.
    """
    checkpoints = Checkpoints(workdir.path / f"checkpoints-{name}")
    (done,), stored = checkpoints.newest() or ((0,), None)
    if done > num_steps:
        raise ConfigError(
            f"{str(checkpoints.folder)!r} holds a training of {done} {unit}s, but only {num_steps} are asked "
            f"for; give at least {done} or another --workdir"
        )
    timer = Timer(0.0 if stored is None else float(stored["seconds"]))
    snapshots: list[tuple[int, Any]] = []
    if stored is not None:
        like = snapshot(state) if snapshot_like is None else snapshot_like
        state, snapshots = _restored(stored, state, like)
    elif 0 in snapshot_at:
        snapshots.append((0, jax.device_get(snapshot(state))))

    def look(done: int, state: Any, infos: Any) -> None:
        values = {value_name: _last(getattr(infos, "loss", infos))}
        values |= {term: _last(own) for term, own in dict(getattr(infos, "terms", ())).items()}
        if not np.isfinite(values[value_name]):
            raise ConfigError(f"the loss is not finite at {unit} {done}; lower the learning rate")
        bar.update(done - bar.n)
        bar.set_postfix({value_name: f"{values[value_name]:.4g}"})
        if done in snapshot_at:
            snapshots.append((done, jax.device_get(snapshot(state))))
        if timer.is_due() or done == num_steps:
            checkpoints.save((done,), _stored(state, snapshots, timer.seconds()))
            timer.saved()
            if about is not None:
                workdir.log(**about, step=done, **values)

    with tqdm(total=num_steps, initial=done, desc=title or f"seed {name}", unit=unit) as bar:
        plan: dict[str, Any] = {"num_steps": num_steps, "start": done, "stride": stride, "stops": snapshot_at}
        state = training.train(steps, state, inputs, *arrays, callback=look, **plan)
    return Trained(state, snapshots, timer.seconds())


def _last(values: Any) -> float:
    """The last step's, the mean of its seeds."""
    array = np.asarray(values)
    return float(array if array.ndim == 0 else np.mean(array[-1]))


def _restored(stored: Any, state: Any, like: Any) -> tuple[Any, list[tuple[int, Any]]]:
    """State and snapshots of a checkpoint, with the structure of the first state and of a snapshot."""
    leaves = [jnp.asarray(leaf) for leaf in stored["state"]]
    taken = zip(stored.get("steps", ()), stored.get("snapshots", ()), strict=True)
    kept_tree = jax.tree.structure(like)
    snapshots = [(int(step), jax.tree.unflatten(kept_tree, kept)) for step, kept in taken]
    return jax.tree.unflatten(jax.tree.structure(state), leaves), snapshots


def _stored(state: Any, snapshots: list[tuple[int, Any]], seconds: float) -> dict[str, Any]:
    tree: dict[str, Any] = {"state": jax.tree.leaves(state), "seconds": np.float64(seconds)}
    if snapshots:  # Orbax stores no empty arrays
        tree["steps"] = np.array([step for step, _ in snapshots])
        tree["snapshots"] = [jax.tree.leaves(kept) for _, kept in snapshots]
    return tree
