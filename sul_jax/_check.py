"""Argument checks with one style of message: the argument, what was given, what is accepted."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def check_integer(name: str, value: int, *, low: int, high: int | None = None, why: str = "") -> None:
    """Raises unless `value` is an integer in `[low, high]`."""
    try:
        operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if value < low or (high is not None and value > high):
        accepted = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name}={value} is not accepted: it must be {accepted}{why}")


def check_images(name: str, images: Array) -> None:
    """Raises unless `images` is a non-empty floating `[batch, height, width, channels]`."""
    check_array(name, images, ndim=4, axes="[batch, height, width, channels]")


def check_vectors(name: str, inputs: Array, *, features: int | None = None) -> None:
    """Raises unless `inputs` is a non-empty floating `[batch, features]`."""
    check_array(name, inputs, ndim=2, axes="[batch, features]")
    if features is not None and inputs.shape[1] != features:
        raise ValueError(
            f"{name} has {inputs.shape[1]} features (shape {tuple(inputs.shape)}), "
            f"but the state was made for {features}"
        )


def check_array(name: str, array: Array, *, ndim: int, axes: str) -> None:
    """Raises unless `array` has `ndim` non-empty axes and a floating type."""
    shape = tuple(jnp.shape(array))
    if len(shape) != ndim:
        raise ValueError(f"{name} must have shape {axes}, got {len(shape)} axes: {shape}")
    if 0 in shape:
        raise ValueError(f"{name} is empty: its shape is {shape}; {axes} must all be at least 1")
    check_floating(name, array)


def check_floating(name: str, array: Array) -> None:
    """Raises unless `array` has a floating type."""
    if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
        raise TypeError(
            f"{name} must be floating point, got {jnp.result_type(array)}; "
            "convert integer pixels first, for example images / 255"
        )


def check_finite(name: str, values: Array) -> None:
    """Raises if values are NaN or infinite, outside jit, where this process knows them."""
    if isinstance(values, jax.core.Tracer) or not getattr(values, "is_fully_addressable", True):
        return
    if not np.isfinite(np.asarray(values)).all():
        raise ValueError(f"{name} holds NaN or infinite values; all must be finite")


def check_labels(name: str, labels: Array, *, num_examples: int, num_classes: int) -> None:
    """Raises unless `labels` is an integer `[num_examples]`, outside jit also in [0, num_classes)."""
    if jnp.shape(labels) != (num_examples,) or not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise ValueError(
            f"{name} must be integers of shape [{num_examples}], got {jnp.result_type(labels)} of shape "
            f"{list(jnp.shape(labels))}"
        )
    if isinstance(labels, jax.core.Tracer):
        return
    values = np.asarray(labels)  # np.min would be traced where they are a constant of a program
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"{name} go from {low} to {high}; 0 to {num_classes - 1} are accepted")
