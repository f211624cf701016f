"""Inference with a learned energy network."""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from sul_jax import energy, k_means, k_subspaces
from sul_jax._check import check_finite, check_images
from sul_jax.k_subspaces import KSubspacesState
from sul_jax.learning_rule import stack
from sul_jax.nn import _saved
from sul_jax.whitening import ConvZCAState, PCAState, normalize, pca_whiten


class Learned(nnx.Variable):  # type: ignore[misc, type-arg]
    """An array that a learning rule found; not a parameter for gradient descent."""


class EnergyNet(nnx.Module):
    """A learned energy network: ConvZCA, energy layers, average pooling.

    Holds learned states and calls the library's functions on them. Several networks of one
    architecture may stand side by side, their maps one after the other.

    Attributes:
      architecture: the sizes.
      rescale: whether the layers rescale to the norm of their input patch.
      code_power: power of the pooled codes.
      whitening: of the codes, or None.
      centroids: of the clusters, or None.
      subspaces: those of the clusters, or None.
    """

    def __init__(
        self,
        states: Sequence[Any],
        architecture: energy.EnergyArchitecture,
        *,
        rescale: bool = True,
        code_power: float = 1.0,
        whitening: PCAState | None = None,
        centroids: Array | None = None,
        subspaces: KSubspacesState | None = None,
    ):
        """Wraps learned states.

        Args:
          states: a `ConvZCAState` and one `KSubspacesState` a layer, as
            `stack(*energy.network_rules(architecture))` has them; or a list of such, one for each
            of several networks side by side.
          architecture: the sizes that the states were learned with.
          rescale: as in `energy.energy_layer`.
          code_power: as in `energy.pooled_codes`.
          whitening: of the normalised codes, from `whitening.pca`.
          centroids: `[num_clusters, features]` of the codes, for `predict`.
          subspaces: of the codes, one a cluster, from `k_subspaces.fit`, in the place of centroids.

        Raises:
          ValueError: the states do not fit the architecture, or there are centroids and subspaces.

        Example:
          >>> import jax
          >>> from sul_jax import energy, nn, stack
          >>> architecture = energy.EnergyArchitecture(3, 2, (energy.EnergyLayer(6, 2, 3, 5, 0),))
          >>> images = jax.random.uniform(jax.random.key(0), (20, 8, 8, 1))
          >>> rule = stack(*energy.network_rules(architecture))
          >>> states = jax.jit(rule.init)(jax.random.key(1), images)
          >>> net = nn.EnergyNet(states, architecture)
          >>> net(images).shape
          (20, 24)
        """
        if not states:
            raise ValueError("states is empty: a network or a list of networks is needed")
        # States are tuples too; a list of networks holds plain tuples of states.
        several = not hasattr(states[0], "_fields")
        if centroids is not None and subspaces is not None:
            raise ValueError("centroids and subspaces are both given: give only one of them")
        networks = list(states) if several else [states]
        for one in networks:
            _check_states(one, architecture)
        self.architecture = architecture
        self.rescale = rescale
        self.code_power = code_power
        self.networks = nnx.data([jax.tree.map(Learned, tuple(one)) for one in networks])
        self.whitening = nnx.data(None if whitening is None else jax.tree.map(Learned, whitening))
        self.centroids = nnx.data(None if centroids is None else Learned(centroids))
        self.subspaces = nnx.data(None if subspaces is None else jax.tree.map(Learned, subspaces))

    def __call__(self, images: Array) -> Array:
        """Pooled codes, whitened if the network has a whitening.

        Args:
          images: floating `[batch, height, width, channels]`, on the scale learned from: that of the
            experiments is [0, 1].

        Returns:
          `[batch, 4 * num_networks * num_subspaces]` of the last layer, or `[batch, num_components]`.
        """
        images = check_images("images", images)
        check_finite("images", images)
        codes = _codes(images, self.learned_states(), self.code_power, self.architecture, self.rescale)
        if self.whitening is None:
            return codes
        return pca_whiten(normalize(codes), self._arrays(self.whitening))

    def feature_maps(self, images: Array, *, num_layers: int | None = None) -> Array:
        """Maps of an energy layer, the last by default; 0 gives the whitened images.

        Args:
          images: floating `[batch, height, width, channels]`.
          num_layers: energy layers to go through.

        Returns:
          `[batch, height, width, num_networks * num_subspaces]`.
        """
        images = check_images("images", images)
        depth = len(self.architecture.layers)
        if num_layers is not None and not 0 <= num_layers <= depth:
            raise ValueError(f"num_layers={num_layers} is not accepted: it must be 0 to {depth}")
        used = [
            states[: (depth if num_layers is None else num_layers) + 1] for states in self.learned_states()
        ]
        return _maps(images, used, self.architecture, self.rescale)

    def predict(self, images: Array) -> Array:
        """The cluster of each image, int32 `[batch]`; images are on the scale learned from, as for codes.

        Raises:
          ValueError: the network has no clusters.
        """
        if self.subspaces is not None:
            return k_subspaces.assign(self._arrays(self.subspaces), self(images))
        if self.centroids is None:
            raise ValueError(
                "predict needs centroids or subspaces: give them to EnergyNet(..., centroids=...)"
            )
        return k_means.assign(self.centroids[...], self(images))

    def learned_states(self) -> list[tuple[Any, ...]]:
        """The states of each network as the library's functions take them."""
        return self._arrays(list(self.networks))

    @staticmethod
    def _arrays(variables: Any) -> Any:
        is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
        return jax.tree.map(lambda v: v[...], variables, is_leaf=is_variable)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an Orbax checkpoint folder; an existing one is replaced.

        Args:
          path: the folder, new or an earlier checkpoint of an EnergyNet.

        Raises:
          ValueError: there is something else at `path`.
        """
        arrays: dict[str, Any] = {
            "networks": [
                {"kernel": zca.kernel, "bases": [layer.bases for layer in layers]}
                for zca, *layers in self.learned_states()
            ]
        }
        if self.whitening is not None:
            arrays["whitening"] = self._arrays(self.whitening)._asdict()
        if self.centroids is not None:
            arrays["centroids"] = self.centroids[...]
        if self.subspaces is not None:
            arrays["subspaces"] = self._arrays(self.subspaces).bases
        sizes = {
            "architecture": self.architecture.to_dict(),
            "rescale": self.rescale,
            "code_power": self.code_power,
        }
        _saved.write(path, "EnergyNet", arrays, sizes)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        architecture: energy.EnergyArchitecture | None = None,
    ) -> Self:
        """Reads what `save` wrote.

        Args:
          path: the folder.
          architecture: if given, the sizes that the checkpoint must have.

        Raises:
          ValueError: no such checkpoint, one of another module or architecture, or not as it was written.
        """
        sizes, arrays = _saved.read(path, "EnergyNet")
        stored = energy.EnergyArchitecture.from_dict(sizes["architecture"])
        if architecture is not None and stored != architecture:
            raise ValueError(
                f"path={os.fspath(path)!r} holds another architecture: {stored}, expected {architecture}"
            )
        networks = [
            (ConvZCAState(one["kernel"]), *map(KSubspacesState, one["bases"])) for one in arrays["networks"]
        ]
        return cls(
            networks,
            stored,
            rescale=sizes["rescale"],
            code_power=sizes["code_power"],
            whitening=PCAState(**arrays["whitening"]) if "whitening" in arrays else None,
            centroids=arrays.get("centroids"),
            subspaces=KSubspacesState(arrays["subspaces"]) if "subspaces" in arrays else None,
        )


# A module is called as it is: without this, every eager call would compile its loops anew.
@partial(jax.jit, static_argnames=("architecture", "rescale"))
def _maps(
    images: Array,
    networks: list[tuple[Any, ...]],
    architecture: energy.EnergyArchitecture,
    rescale: bool,
) -> Array:
    encode = stack(*energy.network_rules(architecture, rescale=rescale)).encode
    if len(networks) == 1:
        return encode(networks[0], images)
    # A loop, so that what all networks share is compiled once.
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *networks)
    return jnp.concatenate(list(lax.map(lambda states: encode(states, images), together)), axis=-1)


@partial(jax.jit, static_argnames=("architecture", "rescale"))
def _codes(
    images: Array,
    networks: list[tuple[Any, ...]],
    power: float,
    architecture: energy.EnergyArchitecture,
    rescale: bool,
) -> Array:
    return energy.pooled_codes(_maps(images, networks, architecture, rescale), power=power)


def _check_states(states: Sequence[Any], architecture: energy.EnergyArchitecture) -> None:
    expected = 1 + len(architecture.layers)
    if len(states) != expected or not isinstance(states[0], ConvZCAState):
        raise ValueError(
            f"states holds {len(states)} states ({', '.join(type(s).__name__ for s in states)}), but "
            f"the architecture has ConvZCA and {expected - 1} energy layers"
        )
    channels = states[0].kernel.shape[-1]
    for index, (state, layer) in enumerate(zip(states[1:], architecture.layers, strict=True), 1):
        shape = (layer.num_subspaces, layer.rank, layer.kernel_size**2 * channels)
        if tuple(state.bases.shape) != shape:
            raise ValueError(
                f"the bases of layer {index} have shape {tuple(state.bases.shape)}, "
                f"but the architecture asks for {shape}"
            )
        channels = layer.num_subspaces
