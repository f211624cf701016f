"""Flax NNX modules: learned states with a `__call__`, saved and loaded with Orbax."""

from sul_jax.nn.acol import ACOL
from sul_jax.nn.backbones import MLP, ResNet
from sul_jax.nn.classifier import Classifier
from sul_jax.nn.convnets import AlexNet, LeNet5, sobel
from sul_jax.nn.energy_net import EnergyNet
from sul_jax.nn.nmce import NMCE
from sul_jax.nn.nnl_conv import NNLBlock, NNLConv
from sul_jax.nn.soft_hebb_net import SoftHebbNet

__all__ = [
    "ACOL",
    "MLP",
    "NMCE",
    "AlexNet",
    "Classifier",
    "EnergyNet",
    "LeNet5",
    "NNLBlock",
    "NNLConv",
    "ResNet",
    "SoftHebbNet",
    "sobel",
]
