"""Clustering by energy layers (paper 000)."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from sklearn.utils.validation import check_is_fitted

from sul_jax import energy, k_subspaces, training, whitening
from sul_jax._check import check_choice, check_number
from sul_jax.estimators import _learning
from sul_jax.estimators._base import ImageClustering
from sul_jax.estimators._images import Images
from sul_jax.nn import EnergyNet
from sul_jax.seeds import of_seed, over_seeds, stacked

# Images that whitening is learned from, and bytes of them at most.
_WHITENED_FROM, _WHITENED_BYTES = 2048, 2**30
# Minibatches of few images: with half of them digits cluster four to seven points worse.
_LEAST_STEPS = 40
# Components of the codes kept where they are whitened.
_CODE_COMPONENTS = 20

_k_subspaces = jax.jit(k_subspaces.fit, static_argnames=("num_subspaces", "rank", "num_init"))


class EnergyClustering(ImageClustering):
    """Stacked convolutional energy layers, then k-means or, as the layers learn, K-Subspaces (paper 000).

    Args:
      n_clusters: clusters.
      architecture: a name in `energy.ARCHITECTURES` or an `EnergyArchitecture`, for images of `image_size`.
      image_shape: height, width and perhaps channels of images given as rows, which need it.
      image_size: side to which images are resized.
      batch_size: images in a minibatch. Every subspace of the last layer wants hundreds of patches a step:
        fewer images cost much accuracy (of 4,000 digits of MNIST, 40 steps of 128 cluster 80 %, of 512 93 %).
      max_steps: minibatches that each layer learns from, at most: one pass, and 40 at least. The paper takes
        118 of 512.
      code_power: power of the pooled codes before clustering.
      code_whitening: if positive, codes are normalised and their 20 leading components divided by their
        variance to this power, at most 0.5. 0, as in the paper, leaves them as they are.
      cluster_by: `"k_means"`, as in the paper, or `"k_subspaces"`, its own local rule on codes of unit norm,
        which finds digits better (of those 4,000, 96 %) and clothes no better.
      cluster_rank: rank of the subspaces of that rule, one for each cluster.
      random_state: an integer for the same result every time, on one machine with as many threads.
      verbose: show progress.

    Attributes:
      labels_: int32 `[num_images]`, clusters of the images learned from.
      cluster_centers_: `[n_clusters, num_codes]`; of subspaces the bases,
        `[n_clusters, cluster_rank, num_codes]`.

    Example:
      >>> import numpy as np
      >>> from sul_jax import energy
      >>> from sul_jax.estimators import EnergyClustering
      >>> small = energy.EnergyArchitecture(3, 2, (energy.EnergyLayer(8, 2, 2, 5, 0),))
      >>> images = np.random.default_rng(0).random((30, 12, 12))
      >>> model = EnergyClustering(3, architecture=small, image_size=12, max_steps=3, random_state=0)
      >>> model.fit(images).transform(images[:2]).shape
      (2, 32)
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        architecture: str | energy.EnergyArchitecture = "3layer",
        image_shape: tuple[int, ...] | None = None,
        image_size: int = 28,
        batch_size: int = 512,
        max_steps: int = 120,
        code_power: float = 1.0,
        code_whitening: float = 0.0,
        cluster_by: Literal["k_means", "k_subspaces"] = "k_means",
        cluster_rank: int = 3,
        random_state: Any = None,
        verbose: bool = False,
    ):
        self.n_clusters = n_clusters
        self.architecture = architecture
        self.image_shape = image_shape
        self.image_size = image_size
        self.batch_size = batch_size
        self.max_steps = max_steps
        self.code_power = code_power
        self.code_whitening = code_whitening
        self.cluster_by = cluster_by
        self.cluster_rank = cluster_rank
        self.random_state = random_state
        self.verbose = verbose

    def _sizes(self) -> energy.EnergyArchitecture:
        if isinstance(self.architecture, str):
            if self.architecture not in energy.ARCHITECTURES:
                accepted = ", ".join(energy.ARCHITECTURES)
                raise ValueError(f"architecture={self.architecture!r} is unknown; accepted: {accepted}")
            return energy.ARCHITECTURES[self.architecture]
        if not isinstance(self.architecture, energy.EnergyArchitecture):
            kind = type(self.architecture).__name__
            raise ValueError(f"architecture is a {kind}; it must be a name or an energy.EnergyArchitecture")
        return self.architecture

    def _num_maps(self) -> int:
        return max(layer.num_subspaces for layer in self._sizes().layers)

    def _learn(self, keys: Array, images: Images) -> Any:
        check_number("code_whitening", self.code_whitening, low=0, high=0.5)
        check_choice("cluster_by", self.cluster_by, ("k_means", "k_subspaces"))
        architecture = self._sizes()
        least = _least_side(architecture)
        if self.image_size < least:
            raise ValueError(
                f"image_size={self.image_size} is too small for the architecture: it must be at least {least}"
            )
        number, programs = len(images.rows), _programs(architecture)
        keys = jnp.stack([jax.random.split(key, len(architecture.layers) + 2) for key in keys], axis=1)
        most = _WHITENED_BYTES // (4 * self.image_size**2 * self.image_shape_[2])
        some = _learning.orders(keys[-1], number, max(1, min(_WHITENED_FROM, most)), 1)[0]
        whitened = _learn_whitening(architecture, images.take(some))
        steps = min(self.max_steps, max(-(-number // self.batch_size), _LEAST_STEPS))

        def plan(layer: int) -> training.LayerTraining:
            chosen = _learning.orders(_learning.folded(keys[layer], 0), number, self.batch_size, steps)
            return training.LayerTraining(
                lambda first, end: images.take(chosen[first:end]), steps, keys[layer]
            )

        with self._shown_steps(steps * len(architecture.layers), "steps of all layers") as callback:
            states = training.train_layers(
                energy.network_rules(architecture),
                (whitened,),
                plan,
                hyperparameters=lambda steps: {"warmup": steps < 10},
                programs=programs,
                callback=lambda layer, done, *_: callback((layer - 1) * steps + done, None, None),
            )
        if not self.code_whitening:
            return states, None
        together = self._encoded_together()
        parts = _learning.orders(keys[-1], number, together, -(-min(number, _WHITENED_FROM) // together))
        whiteners = [
            self._learn_code_whitening(of_seed(states, seed), images, parts[:, seed])
            for seed in range(parts.shape[1])
        ]
        return states, stacked(whiteners)

    def _centers(self, key: Array, codes: Array, starts: int) -> Array:
        if self.cluster_by == "k_means":
            return super()._centers(key, codes, starts)
        sizes = {"num_subspaces": self.n_clusters, "rank": self.cluster_rank, "num_init": starts}
        return _k_subspaces(key, whitening.normalize(codes), **sizes).bases

    def distances_of(self, codes: np.ndarray) -> np.ndarray:
        """Distance of each code to every centre; of subspaces, that of the code at unit norm."""
        if self.cluster_by == "k_means":
            return super().distances_of(codes)
        wide = np.asarray(codes, np.float64)
        squares = np.sum(wide**2, axis=1)
        captured = [np.sum((wide @ basis.T) ** 2, axis=1) for basis in self.cluster_centers_]
        shares = np.stack(captured, axis=1) / np.where(squares > 0, squares, 1)[:, None]
        return np.sqrt(np.maximum(1 - shares, 0)).astype(np.float32)

    def _template(self) -> Any:
        leaf = jnp.zeros(())
        layers = (k_subspaces.KSubspacesState(leaf),) * len(self._sizes().layers)
        whitener = whitening.PCAState(leaf, leaf) if self.code_whitening else None
        return (whitening.ConvZCAState(leaf), *layers), whitener

    def _learn_code_whitening(self, states: Any, images: Images, parts: np.ndarray) -> Any:
        net = EnergyNet(states, self._sizes(), code_power=self.code_power)
        some_codes = np.concatenate([np.asarray(net(images.take(part))) for part in parts])
        normal = whitening.normalize(jnp.asarray(some_codes))
        components = min(_CODE_COMPONENTS, normal.shape[1])
        return whitening.pca(normal, num_components=components, exponent=self.code_whitening)

    def _encoder(self, learned: Any) -> Callable[[Array], Array]:
        states, whitener = learned
        return EnergyNet(states, self._sizes(), code_power=self.code_power, whitening=whitener)

    def first_kernels(self) -> np.ndarray:
        """Directions of the first layer's subspaces, `[num, kernel_size, kernel_size, channels]`."""
        check_is_fitted(self)
        size = self._sizes().layers[0].kernel_size
        bases = self.learned_[0][1].bases
        return np.asarray(bases).reshape(-1, size, size, self.image_shape_[2])


def _least_side(architecture: energy.EnergyArchitecture) -> int:
    """Of images whose last maps can still be cut into quadrants."""
    side = 2
    for layer in reversed(architecture.layers):
        side += layer.kernel_size - 1 - 2 * layer.padding
    return max(side, architecture.zca_kernel_size)


@lru_cache(maxsize=4)  # of one layer after the other, and of estimators alike
def _programs(architecture: energy.EnergyArchitecture) -> training.LayerPrograms:
    return training.LayerPrograms(energy.network_rules(architecture))


@partial(jax.jit, static_argnums=0)
def _learn_whitening(architecture: energy.EnergyArchitecture, images: Array) -> Any:
    rule = energy.network_rules(architecture)[0]
    return over_seeds(lambda own: rule.init(jax.random.key(0), own))(images)
