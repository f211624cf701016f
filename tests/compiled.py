"""One program where the eager calls of a test would compile hundreds."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax
import numpy as np

_ARRAY = object()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """jax.jit with all static that is no array: sizes, rules, options and functions."""

    @partial(jax.jit, static_argnums=0)
    def program(static: tuple[Any, tuple[Any, ...]], arrays: list[Any]) -> Any:
        structure, leaves = static
        taken = iter(arrays)
        args, kwargs = jax.tree.unflatten(structure, [next(taken) if x is _ARRAY else x for x in leaves])
        return function(*args, **kwargs)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs))
        is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
        static = tuple(_ARRAY if array else leaf for leaf, array in zip(leaves, is_array, strict=True))
        arrays = [leaf for leaf, array in zip(leaves, is_array, strict=True) if array]
        return program((structure, static), arrays)

    return call
