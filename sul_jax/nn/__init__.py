"""Flax NNX modules: learned states with a `__call__`, saved and loaded with Orbax."""

from sul_jax.nn.energy_net import EnergyNet

__all__ = ["EnergyNet"]
