"""Sums, random numbers and functions over a mapped axis, where there is one."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import Array, lax

Tree = TypeVar("Tree")


def sum_over(values: Tree, axis_name: str | None) -> Tree:
    """The sums over the axis of an array or a tree of arrays, or the values themselves without an axis."""
    return values if axis_name is None else lax.psum(values, axis_name)


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
