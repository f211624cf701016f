"""Sums over a mapped axis, where there is one."""

from typing import TypeVar

from jax import lax

Tree = TypeVar("Tree")


def sum_over(values: Tree, axis_name: str | None) -> Tree:
    """The sums over the axis of an array or a tree of arrays, or the values themselves without an axis."""
    return values if axis_name is None else lax.psum(values, axis_name)
