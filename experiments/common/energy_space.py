"""The space in which `tune_energy` searches: whitening, and sizes of every energy layer (paper 000)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import optuna

from sul_jax import energy, patches
from sul_jax.energy import EnergyArchitecture

VERSION = 2  # changes with the parameters' names and meaning
MAX_SUBSPACES = 64
_MAX_RANK, _MAX_ZCA = 16, 11
# What each preset changes (table 5).
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "no_zca": {"zca": False},
    "no_rescale": {"rescale": False},
    "neither": {"zca": False, "rescale": False},
    "rank_one": {"max_rank": 1},
    "random_subspaces": {"random_subspaces": True},
}


class Space(NamedTuple):
    """Networks for images of one shape.

    Attributes:
      preset: the whole space, or an ablation; a name in `PRESETS`.
      num_layers: of energy.
      shape: of an image, height, width and channels.
      batch_size: images in a minibatch, which must hold a patch for every subspace; None for any.
    """

    preset: str
    num_layers: int
    shape: tuple[int, ...]
    batch_size: int | None = None

    def propose(self, trial: optuna.trial.BaseTrial) -> EnergyArchitecture:
        """Sizes chosen by a trial: whitening, and of every layer k, r, w, kernel and padding.

        Raises:
          optuna.TrialPruned: too little is left of the image to be pooled.
        """
        return self._sizes(partial(_suggest, trial))

    def parameters(self, architecture: EnergyArchitecture) -> dict[str, float]:
        """What `propose` would have to be given to propose this architecture.

        Raises:
          optuna.TrialPruned: it is not in the space.
        """
        values = architecture._asdict()
        for index, layer in enumerate(architecture.layers, 1):
            values |= {f"layer{index}_{name}": value for name, value in layer._asdict().items()}
        parameters: dict[str, float] = {}

        def note(name: str, low: int, high: int) -> int:
            size = name.removesuffix("_share")
            value = values.get(size)  # None of a layer too many
            if value is None or not low <= value <= high:
                allowed = f"images of shape {self.shape} allow {low} to {high}"
                raise optuna.TrialPruned(f"has {size}={value}, but {allowed}")
            parameters[name] = value if size == name else (value - low + 0.5) / (high - low + 1)
            return value

        if self._sizes(note) != architecture:
            raise optuna.TrialPruned(f"is outside num_layers={self.num_layers}, preset={self.preset}")
        return parameters

    def _sizes(self, choose: Callable[[str, int, int], int]) -> EnergyArchitecture:
        """An architecture whose sizes are chosen by name, each from a lowest to a highest value."""
        preset = PRESETS[self.preset]
        side, channels = min(self.shape[:2]), self.shape[2]
        kernel, components = 1, 0
        if preset.get("zca", True):
            kernel = choose("zca_kernel_size", 1, min(_MAX_ZCA, side))
            components = choose("zca_num_components_share", 0, kernel**2 * channels)
        layers = []
        for index in range(1, self.num_layers + 1):
            name = f"layer{index}"
            num_subspaces = choose(f"{name}_num_subspaces", 2, MAX_SUBSPACES)
            winners = choose(f"{name}_num_winners_share", 1, num_subspaces)
            # The images of the layers above are as large as those below make them.
            size = choose(f"{name}_kernel_size" if index == 1 else f"{name}_kernel_size_share", 1, side)
            padding = choose(f"{name}_padding_share", 0, size // 2)
            rank = min(choose(f"{name}_rank", 1, preset.get("max_rank", _MAX_RANK)), size**2 * channels)
            layers.append(energy.EnergyLayer(num_subspaces, rank, winners, size, padding))
            side, channels = patches.output_size(side, kernel_size=size, padding=padding), num_subspaces
            if side < 2:
                raise optuna.TrialPruned(f"layer {index} leaves {side}×{side} positions, too few to pool")
            if self.batch_size is not None and side**2 * self.batch_size < num_subspaces:
                raise optuna.TrialPruned("more subspaces than patches in a minibatch, too few to pool")
        return EnergyArchitecture(kernel, components, tuple(layers))


def _suggest(trial: optuna.trial.BaseTrial, name: str, low: int, high: int) -> int:
    """A size; where its range depends on other sizes the search sees its share of the range, in [0, 1].

    Optuna compares values of one fixed range only, in what it proposes as in what it calls important.
    """
    if not name.endswith("_share"):
        return trial.suggest_int(name, low, high)
    return min(low + int(trial.suggest_float(name, 0, 1) * (high - low + 1)), high)


def cost(architecture: EnergyArchitecture, shape: tuple[int, ...], *, num_images: int) -> tuple[float, float]:
    """Million operations for the codes of an image, and GiB that learning one network holds.

    Args:
      architecture: the sizes.
      shape: of an image, height, width and channels.
      num_images: to learn from, whose codes are held.
    """
    height, width, channels = shape
    operations, held, below = 0, 0, height * width * channels
    for layer in architecture.layers:
        window = {"kernel_size": layer.kernel_size, "padding": layer.padding}
        height, width = (patches.output_size(side, **window) for side in (height, width))
        patch = layer.kernel_size**2 * channels
        operations += 2 * height * width * patch * layer.num_subspaces * layer.rank
        channels = layer.num_subspaces
        above = height * width * channels
        # Codes of the layer below and above, bases, their scatter in a few chunks, and patches of chunks.
        bases = patch * layer.num_subspaces * layer.rank
        chunk = max(patches.chunk_bytes(), 4 * height * width * (patch + layer.num_subspaces * layer.rank))
        layer_bytes = 4 * (num_images * (below + above) + 10 * bases) + 4 * chunk
        held, below = max(held, layer_bytes), above
    return operations / 1e6, held / 2**30
