"""Several seeds side by side: trees of arrays with a leading axis of seeds.

On an accelerator small networks of several seeds learn in little more time than one.

A seed (a key, `random_state`, `--seed`) fixes all random numbers. The same program on the same machine, with
as many threads and devices and the same jax, then gives the same bits. Anything else changes the order of
sums and so their rounding. K-Subspaces amplify this: a patch near a tie goes to another subspace, and others
follow. Judge by several seeds; several networks together (`EnergyNet`) depend least on rounding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def over_seeds(function: Callable[..., Any], in_axes: int | Sequence[int | None] = 0) -> Callable[..., Any]:
    """A function mapped over a leading axis of seeds, as by `jax.vmap`.

    A single seed goes as it is and has the axis again in the result: convolutions mapped over their kernels
    take a CPU 1.4 times as long.

    Args:
      function: of one or more trees of arrays, to a tree of arrays.
      in_axes: 0 for each tree that has the axis, the first among them, and None for the others; or 0 for all.

    Returns:
      The function of trees whose leaves have the axis, `[num_seeds, ...]`, to a tree of such leaves.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import seeds
      >>> add = seeds.over_seeds(lambda one, all: one + all, (0, None))
      >>> add(jnp.zeros(2), 3.0).tolist(), add(jnp.zeros(1), 3.0).tolist()
      ([3.0, 3.0], [3.0])
    """
    mapped = jax.vmap(function, in_axes)

    def call(*trees: Any) -> Any:
        if len(jax.tree.leaves(trees[0])[0]) > 1:
            return mapped(*trees)
        axes = in_axes if isinstance(in_axes, Sequence) else (in_axes,) * len(trees)
        own = (tree if axis is None else of_seed(tree, 0) for tree, axis in zip(trees, axes, strict=True))
        return stacked([function(*own)])

    return call


def of_seed(tree: Any, index: int) -> Any:
    """One seed's part of a tree.

    Args:
      tree: of arrays `[num_seeds, ...]`.
      index: 0 to num_seeds − 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import seeds
      >>> seeds.of_seed({"weights": jnp.eye(2)}, 1)["weights"].tolist()
      [0.0, 1.0]
    """
    return jax.tree.map(lambda leaf: leaf[index], tree)


def stacked(trees: Sequence[Any]) -> Any:
    """Trees of several seeds as one.

    Args:
      trees: of one structure and one shape of each array, `[...]`.

    Returns:
      The tree of arrays `[num_seeds, ...]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import seeds
      >>> seeds.stacked([(jnp.zeros(3),), (jnp.ones(3),)])[0].shape
      (2, 3)
    """
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
