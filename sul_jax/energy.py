"""Convolutional energy layers and networks (Luther & Seung 2022, sections 3 and 4, tables 1 and 6).

An energy layer projects every image patch onto k subspaces of rank r and outputs the k norms,
thresholded to w winners, normalised, and rescaled by the patch's own norm. Its subspaces are learned
by K-Subspaces on the patches of the layer below, one layer after the other.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from sul_jax import k_subspaces, patches, whitening
from sul_jax._check import check_array, check_floating, check_integer
from sul_jax._linalg import at_least_float32, root
from sul_jax.k_subspaces import KSubspacesInfo, KSubspacesState
from sul_jax.learning_rule import LearningRule

# Above this many comparisons a position, unrolled registers compile long and are no faster than a loop.
_MAX_UNROLLED = 400


class EnergyLayer(NamedTuple):
    """Sizes of one energy layer, a column of table 6.

    Attributes:
      num_subspaces: k, the number of output maps.
      rank: r, dimensions of each subspace.
      num_winners: w, active maps at each position in inference.
      kernel_size: side of the patch.
      padding: zeros around the image.
    """

    num_subspaces: int
    rank: int
    num_winners: int
    kernel_size: int
    padding: int


class EnergyArchitecture(NamedTuple):
    """ConvZCA followed by energy layers.

    Attributes:
      zca_kernel_size: side of the whitening kernel.
      zca_num_components: eigenvalues levelled; 0 for no whitening.
      layers: from the input upwards.
    """

    zca_kernel_size: int
    zca_num_components: int
    layers: tuple[EnergyLayer, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, for JSON."""
        return {**self._asdict(), "layers": [layer._asdict() for layer in self.layers]}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "EnergyArchitecture":
        """What `to_dict` made a dict of; `ValueError` for anything else."""
        try:
            if not (isinstance(layers := stored["layers"], list | tuple) and layers):
                raise ValueError("layers must be a list of at least one layer")
            if not all(isinstance(layer, Mapping) for layer in layers):
                raise ValueError("each layer must have named sizes")
            own = cls(**{**stored, "layers": tuple(EnergyLayer(**layer) for layer in layers)})
            for sizes in (own._asdict() | {"layers": 0}, *(layer._asdict() for layer in own.layers)):
                for name, value in sizes.items():
                    check_integer(name, value, low=0)
        except (TypeError, KeyError, ValueError) as error:
            words = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"this is not an architecture of energy layers: {words}") from None
        return own


ARCHITECTURES = {
    "1layer": EnergyArchitecture(5, 0, (EnergyLayer(59, 2, 1, 10, 4),)),
    "2layer": EnergyArchitecture(9, 18, (EnergyLayer(20, 5, 16, 10, 2), EnergyLayer(55, 16, 1, 19, 1))),
    "3layer": EnergyArchitecture(
        9,
        9,
        (EnergyLayer(37, 2, 9, 8, 2), EnergyLayer(9, 3, 8, 5, 1), EnergyLayer(58, 16, 2, 21, 2)),
    ),
    "4layer": EnergyArchitecture(
        11,
        18,
        (
            EnergyLayer(15, 2, 10, 7, 3),
            EnergyLayer(63, 12, 1, 17, 1),
            EnergyLayer(57, 7, 6, 8, 2),
            EnergyLayer(22, 1, 1, 3, 1),
        ),
    ),
}
"""The published architectures for 28×28 images by name (table 6); `3layer` is the paper's best."""


def adaptive_threshold(features: Array, *, num_winners: int) -> Array:
    """max(0, f − τ) with τ the (num_winners + 1)-th largest value on the last axis.

    Args:
      features: `[..., num_features]`, non-negative.
      num_winners: w, from 1 to `num_features`; τ = 0 if it equals `num_features`.

    Returns:
      An array of the same shape with at most w non-zero values on the last axis.

    Raises:
      TypeError: `features` are integers.
      ValueError: `num_winners` out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import energy
      >>> energy.adaptive_threshold(jnp.array([1.0, 4.0, 2.0, 3.0]), num_winners=2).tolist()
      [0.0, 2.0, 0.0, 1.0]
    """
    features = check_floating("features", features)
    _check_winners(num_winners, features.shape[-1])
    return jnp.moveaxis(_threshold(jnp.moveaxis(features, -1, 0), num_winners), 0, -1)


def energy_layer(
    images: Array,
    bases: Array,
    *,
    kernel_size: int,
    padding: int,
    num_winners: int,
    rescale: bool = True,
) -> Array:
    """One energy layer in inference (section 3, steps 1 to 4).

    Args:
      images: `[batch, height, width, channels]`.
      bases: `[num_subspaces, rank, kernel_size² · channels]`, orthonormal rows.
      kernel_size: side of the patch.
      padding: zeros around the image.
      num_winners: w, active maps at each position.
      rescale: normalise the vector of maps at each position to the norm of its input patch
        (step 4); False leaves the thresholded norms as they are.

    Returns:
      `[batch, out_height, out_width, num_subspaces]`; zero where the patch is blank.

    Raises:
      ValueError: `bases` does not fit the patches, or a size is out of range.

    Example:
      >>> import jax
      >>> from sul_jax import energy
      >>> images = jax.random.uniform(jax.random.key(0), (4, 12, 12, 1))
      >>> window = {"kernel_size": 5, "padding": 1}
      >>> state = energy.init(jax.random.key(1), images, num_subspaces=8, rank=2, **window)
      >>> energy.energy_layer(images, state.bases, num_winners=3, **window).shape
      (4, 10, 10, 8)
    """
    images, height, width = patches.check_window(images, kernel_size=kernel_size, padding=padding)
    bases = _check_bases(bases, images, kernel_size)
    _check_winners(num_winners, bases.shape[0])
    window = {"kernel_size": kernel_size, "padding": padding}
    responses = _responses(images, bases, window)

    def chunk_codes(chunk: Array) -> Array:
        maps = _threshold(k_subspaces.norms(responses(chunk)), num_winners)
        if rescale:
            size = root(jnp.sum(jnp.square(maps), axis=0, keepdims=True))
            patch_size = patches.norms(chunk, **window).reshape(size.shape)
            maps = maps * jnp.where(size > 0, patch_size / jnp.where(size > 0, size, 1), 0)
        return maps.T.reshape(chunk.shape[0], height, width, bases.shape[0])

    codes = patches.map_chunks(
        chunk_codes, images, bytes_per_image=_chunk_bytes(images, bases, kernel_size, padding)
    )
    return codes.reshape(-1, height, width, bases.shape[0])[: images.shape[0]]


def average_pool(images: Array) -> Array:
    """Averages over the four quadrants: `[batch, h, w, channels]` to `[batch, 2, 2, channels]`.

    An odd side is cut into its larger half first, 7 into 4 + 3.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import energy
      >>> energy.average_pool(jnp.ones((1, 7, 7, 5))).shape
      (1, 2, 2, 5)
    """
    images = check_array("images", images, ndim=4, axes="[batch, height, width, channels]")
    row, column = -(-images.shape[1] // 2), -(-images.shape[2] // 2)
    if min(images.shape[1:3]) < 2:
        raise ValueError(
            f"images of {images.shape[1]}×{images.shape[2]} positions cannot be cut into quadrants; "
            "at least 2×2 are needed"
        )
    halves = [images[:, :row], images[:, row:]]
    quadrants = [part for half in halves for part in (half[:, :, :column], half[:, :, column:])]
    pooled = jnp.stack([jnp.mean(part, axis=(1, 2)) for part in quadrants], axis=1)
    return pooled.reshape(images.shape[0], 2, 2, images.shape[3])


def pooled_codes(maps: Array, *, power: float | Array = 1.0) -> Array:
    """The network's codes: maps averaged over quadrants, flattened, raised to a power.

    Args:
      maps: non-negative `[batch, height, width, channels]`.
      power: positive; 1 is the paper's, 0.5 evens out the few strong features that dominate distances.

    Returns:
      `[batch, 4 * channels]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import energy
      >>> energy.pooled_codes(4 * jnp.ones((1, 7, 7, 2)), power=0.5).tolist()
      [[2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]]
    """
    pooled = average_pool(maps)
    codes = pooled.reshape(pooled.shape[0], -1)
    zero = codes == 0  # where the gradient of a root is not finite
    return jnp.where(zero, 0, jnp.where(zero, 1, codes) ** power)


def init(
    key: Array, images: Array, *, num_subspaces: int, rank: int, kernel_size: int, padding: int
) -> KSubspacesState:
    """Subspaces around random patches that are not blank (appendix A).

    Args:
      key: `jax.random.key`.
      images: `[batch, height, width, channels]`, the codes of the layer below.
      num_subspaces: k, the number of subspaces.
      rank: r, at most `kernel_size² · channels`.
      kernel_size: side of the patch.
      padding: zeros around the image.

    Returns:
      A `KSubspacesState` with `features = kernel_size² · channels`.

    Raises:
      ValueError: fewer patches than subspaces, or a size out of range.

    Example:
      >>> import jax
      >>> from sul_jax import energy
      >>> images = jax.random.uniform(jax.random.key(0), (4, 12, 12, 3))
      >>> energy.init(
      ...     jax.random.key(1), images, num_subspaces=8, rank=2, kernel_size=5, padding=1
      ... ).bases.shape
      (8, 2, 75)
    """
    patch_key, init_key = jax.random.split(key)
    images, height, width = patches.check_window(images, kernel_size=kernel_size, padding=padding)
    num_patches = images.shape[0] * height * width
    check_integer(
        "num_subspaces", num_subspaces, low=1, high=num_patches,
        why=f": images of shape {images.shape} hold {num_patches} patches",
    )  # fmt: skip
    vectors = patches.sample(
        patch_key, images, num_patches=num_subspaces, kernel_size=kernel_size, padding=padding
    )
    return k_subspaces.init(init_key, vectors, num_subspaces=num_subspaces, rank=rank)


def update(
    state: KSubspacesState,
    images: Array,
    *,
    kernel_size: int,
    padding: int,
    warmup: bool | Array = False,
    axis_name: str | None = None,
) -> tuple[KSubspacesState, KSubspacesInfo]:
    """One K-Subspaces step on all patches of a batch of images.

    Equal to `k_subspaces.update` on `patches.extract(...)`, without ever holding all patches.

    Args:
      state: the subspaces.
      images: `[batch, height, width, channels]`, the codes of the layer below.
      kernel_size: side of the patch.
      padding: zeros around the image.
      warmup: as in `k_subspaces.update`.
      axis_name: mapped axis over which the batch is split.

    Returns:
      The new state and the `KSubspacesInfo` of the old one; energies are per patch.

    Raises:
      ValueError: the state was made for other patches.

    Example:
      >>> import jax
      >>> from sul_jax import energy
      >>> images = jax.random.uniform(jax.random.key(0), (4, 12, 12, 1))
      >>> window = {"kernel_size": 5, "padding": 1}
      >>> state = energy.init(jax.random.key(1), images, num_subspaces=8, rank=2, **window)
      >>> state, info = energy.update(state, images, **window)
    """
    images, height, width = patches.check_window(images, kernel_size=kernel_size, padding=padding)
    _check_bases(state.bases, images, kernel_size)
    images = at_least_float32(images)
    window = {"kernel_size": kernel_size, "padding": padding}
    respond = _responses(images, state.bases, window)
    gathers = k_subspaces.gathers(state.bases)

    def of_chunk(chunk: Array) -> tuple[Array, Array, Array]:
        """Assignment, summed squares captured, and responses to gather by or else the scatter."""
        responses = respond(chunk)
        assignment = k_subspaces.winners(responses, warmup)
        if gathers:
            own = k_subspaces.own_responses(responses, assignment)
            return assignment, jnp.sum(jnp.square(own)), own
        weights = k_subspaces.masked_responses(responses, assignment)
        return assignment, jnp.sum(jnp.square(weights)), patches.back_project(chunk, weights, **window)

    bytes_per_image = _chunk_bytes(images, state.bases, kernel_size, padding)
    assignments, captured, scatters = patches.map_chunks(of_chunk, images, bytes_per_image=bytes_per_image)
    # Blank images that filled the last chunk are no patches of the batch, and capture nothing.
    assignment = assignments.ravel()[: images.shape[0] * height * width]
    if gathers:
        scatter = k_subspaces.gathered_scatter(
            scatters.reshape(-1, scatters.shape[-1])[: len(assignment)],
            assignment,
            patches.taker(images, **window),
            num_subspaces=state.bases.shape[0],
            max_vectors=height * width * patches.chunk_bytes() // bytes_per_image,
        )
    else:
        scatter = jnp.sum(scatters, axis=0).reshape(state.bases.shape)
    squares = patches.squared_norms(images, **window).ravel()
    total = k_subspaces.collect(jnp.sum(captured), assignment, squares, scatter)
    return k_subspaces.apply(state, total, axis_name=axis_name)


def layer_rule(layer: EnergyLayer, *, rescale: bool = True, random_subspaces: bool = False) -> LearningRule:
    """An energy layer as a `LearningRule` over images.

    Args:
      layer: the sizes.
      rescale: as in `energy_layer`.
      random_subspaces: begin with random orthonormal subspaces instead of patches. Without updates they show
        what learning adds.

    Example:
      >>> import jax
      >>> from sul_jax import energy
      >>> rule = energy.layer_rule(energy.EnergyLayer(8, 2, 3, 5, 1))
      >>> images = jax.random.uniform(jax.random.key(0), (4, 12, 12, 1))
      >>> state, info = rule.update(rule.init(jax.random.key(1), images), images, warmup=True)
    """
    num_subspaces, rank, num_winners, kernel_size, padding = layer
    _check_winners(num_winners, num_subspaces)

    def begin(key: Array, images: Array) -> KSubspacesState:
        sizes = {"num_subspaces": num_subspaces, "rank": rank}
        if not random_subspaces:
            return init(key, images, kernel_size=kernel_size, padding=padding, **sizes)
        noise = jax.random.normal(key, (num_subspaces, kernel_size**2 * images.shape[-1]))
        return k_subspaces.init(key, noise, **sizes)

    def encode(state: KSubspacesState, images: Array) -> Array:
        return energy_layer(
            images,
            state.bases,
            kernel_size=kernel_size,
            padding=padding,
            num_winners=num_winners,
            rescale=rescale,
        )

    return LearningRule(
        init=begin,
        update=partial(update, kernel_size=kernel_size, padding=padding),
        encode=encode,
    )


def network_rules(
    architecture: EnergyArchitecture, *, rescale: bool = True, random_subspaces: bool = False
) -> tuple[LearningRule, ...]:
    """ConvZCA and the energy layers, to be put into `stack(*rules)`; options as in `layer_rule`.

    Example:
      >>> import jax
      >>> from sul_jax import energy, stack
      >>> net = stack(*energy.network_rules(energy.ARCHITECTURES["1layer"]))
      >>> images = jax.random.uniform(jax.random.key(0), (4, 28, 28, 1))
      >>> jax.jit(lambda key: net.encode(net.init(key, images), images))(jax.random.key(1)).shape
      (4, 27, 27, 59)
    """
    zca = whitening.conv_zca_rule(
        kernel_size=architecture.zca_kernel_size, num_components=architecture.zca_num_components
    )
    options = {"rescale": rescale, "random_subspaces": random_subspaces}
    return zca, *(layer_rule(layer, **options) for layer in architecture.layers)


def _threshold(maps: Array, num_winners: int) -> Array:
    """`adaptive_threshold` along the leading axis.

    The (w + 1)-th largest value is found by running registers of maximum and minimum over the maps:
    exact, elementwise over positions, and some 30 times faster than `lax.top_k` on a CPU.
    """
    num_maps = maps.shape[0]
    if num_winners == num_maps:
        return jnp.maximum(maps, 0)
    # The (w + 1)-th largest is the (num_maps − w)-th smallest: keep the shorter list.
    from_top = num_winners + 1 <= num_maps - num_winners
    keep, carry = (jnp.maximum, jnp.minimum) if from_top else (jnp.minimum, jnp.maximum)
    length = num_winners + 1 if from_top else num_maps - num_winners

    def search(maps: Array) -> Array:
        if num_maps * length > _MAX_UNROLLED:
            return _insert_all(maps, keep, carry, length)
        registers: list[Array] = []
        for value in maps:
            for place, register in enumerate(registers):
                registers[place], value = keep(register, value), carry(register, value)
            if len(registers) < length:
                registers.append(value)
        return registers[-1]

    # XLA would fuse the search into the subtraction and repeat it for every map (an optimisation
    # barrier does not stop it on a CPU); it does not fuse across a loop, so search in two halves.
    flat = maps.reshape(num_maps, -1)
    half = -(-flat.shape[1] // 2)

    def search_half(index: Array, thresholds: Array) -> Array:
        start = index * (flat.shape[1] - half)
        part = lax.dynamic_slice_in_dim(flat, start, half, axis=1)
        return lax.dynamic_update_slice_in_dim(thresholds, search(part), start, axis=0)

    # Taken from `maps` rather than new zeros, the carry has its type under `shard_map` too.
    thresholds = lax.fori_loop(0, 2, search_half, flat[0])
    return jnp.maximum(maps - thresholds.reshape(1, *maps.shape[1:]), 0)


def _insert_all(maps: Array, keep: Callable[..., Array], carry: Callable[..., Array], length: int) -> Array:
    """The last of the `length` values that `keep` prefers, in a loop: as fast, and compiled in no time."""
    best = jnp.full_like(maps[0], jnp.inf if keep is jnp.maximum else -jnp.inf)

    def insert(index: Array, kept: Array) -> Array:
        # Of the old list each place keeps its own value, or the better of the new one and its neighbour's.
        above = jnp.concatenate([best[None], kept[:-1]])
        return keep(kept, carry(above, maps[index][None]))

    none = jnp.broadcast_to(-best, (length, *best.shape))
    return lax.fori_loop(0, maps.shape[0], insert, none)[-1]


def _responses(images: Array, bases: Array, window: dict[str, int]) -> Callable[[Array], Array]:
    """S-cells of every patch of a chunk, `[num_subspaces, rank, chunk * out_height * out_width]`."""
    num_subspaces, rank, features = bases.shape
    project = patches.projector(images, bases.reshape(num_subspaces * rank, features), **window)
    return lambda chunk: project(chunk).reshape(num_subspaces, rank, -1)


def _chunk_bytes(images: Array, bases: Array, kernel_size: int, padding: int) -> int:
    """Size of one image's patches, or of what becomes of them where that is larger."""
    images, height, width = patches.check_window(images, kernel_size=kernel_size, padding=padding)
    num_subspaces, rank, features = bases.shape
    results = num_subspaces * (2 * rank + 1)  # responses, their squares, norms
    return height * width * max(features, results) * images.dtype.itemsize


def _check_winners(num_winners: int, num_features: int) -> None:
    check_integer(
        "num_winners", num_winners, low=1, high=num_features,
        why=f": there are {num_features} features to win",
    )  # fmt: skip


def _check_bases(bases: Any, images: Array, kernel_size: int) -> Array:
    axes = "[num_subspaces, rank, features]"
    return patches.check_kernels("bases", bases, images, kernel_size=kernel_size, ndim=3, axes=axes)
