"""Flax NNX modules: learned states with a `__call__`, saved and loaded with Orbax."""

from sul_jax.nn.backbones import MLP, ResNet
from sul_jax.nn.energy_net import EnergyNet
from sul_jax.nn.nmce import NMCE

__all__ = ["MLP", "NMCE", "EnergyNet", "ResNet"]
