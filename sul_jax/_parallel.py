"""Sums, random numbers and functions over a mapped axis, where there is one."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array, lax

Tree = TypeVar("Tree")


def sum_over(values: Tree, axis_name: str | None) -> Tree:
    """The sums over the axis of an array or a tree of arrays, or the values themselves without an axis."""
    return values if axis_name is None else lax.psum(values, axis_name)


def gathered(values: Tree) -> Tree:
    """Arrays of the host, of all processes of `jax.distributed` one after the other, along their first axis.

    Args:
      values: of this process, of any length.
    """
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    def of_all(own: np.ndarray) -> np.ndarray:
        lengths = multihost_utils.process_allgather(np.array([len(own)]))[:, 0]
        filled = np.zeros((int(lengths.max()), *own.shape[1:]), own.dtype)
        filled[: len(own)] = own
        every = multihost_utils.process_allgather(filled)
        return np.concatenate([part[:length] for part, length in zip(every, lengths, strict=True)])

    return jax.tree.map(of_all, values)


def wait_for_all() -> None:
    """Until every process of `jax.distributed` has come as far."""
    gathered(np.zeros(1, np.float32))


def own_part(values: Tree, axis_name: str | None, *, batch_axis: int = 0) -> Tree:
    """This shard's part of arrays that every shard holds whole, cut along their axis of the batch."""
    if axis_name is None:
        return values

    def cut(values: Array) -> Array:
        size = values.shape[batch_axis] // lax.axis_size(axis_name)
        return lax.dynamic_slice_in_dim(values, lax.axis_index(axis_name) * size, size, batch_axis)

    return jax.tree.map(cut, values)


def drawn(
    draw: Callable[[tuple[int, ...]], Array],
    shape: tuple[int, ...],
    axis_name: str | None,
    *,
    batch_axis: int = 0,
) -> Array:
    """Random numbers of a shard's shape: those that the whole batch would draw in its place."""
    if axis_name is None:
        return draw(shape)
    size = shape[batch_axis] * lax.axis_size(axis_name)
    whole = draw((*shape[:batch_axis], size, *shape[batch_axis + 1 :]))
    return own_part(whole, axis_name, batch_axis=batch_axis)


def of_whole_batch(
    function: Callable[[Array, Array], Any], axis_name: str | None, *, batch_axis: int = 0
) -> Callable[[Array, Array], Any]:
    """A random function of a key and a batch, which gives a shard its part of what the whole batch would get.

    Args:
      function: of a key and inputs `[batch, ...]`, to a tree of arrays.
      axis_name: mapped axis over which the batch is split.
      batch_axis: of the results.
    """
    if axis_name is None:
        return function

    def of_shard(key: Array, inputs: Array) -> Any:
        whole = lax.all_gather(inputs, axis_name, tiled=True)
        return own_part(function(key, whole), axis_name, batch_axis=batch_axis)

    return of_shard
