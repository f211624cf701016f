"""Scikit-learn estimators: each method learns from unlabelled images, or vectors, and clusters them.

For images: `EnergyClustering`, `ACOLClustering`, `NMCEClustering`, `DeepClustering` and, as a baseline,
`PixelClustering`. For vectors such as embeddings, in memory or on disk: `KMeans`, `KSubspaces`,
`HebbianFeatures` and `RateReductionClustering`.

They hold what was learned and compile what they run; rules, training and mathematics come from this package.
An image gets the same code and cluster in any batch: programs take batches of one size.

How cost grows, for n images of s×s pixels with codes of d numbers:

=========  ==================================================  ===================================
part       time                                                memory
=========  ==================================================  ===================================
learning   steps · `batch_size` · s²; steps up to `max_steps`  `batch_size` · s² · maps of a layer
codes      n · s²                                              n · d
k-means    n · d · `n_clusters` · starts · iterations          at most some GiB: of part of many
distances  n · d · `n_clusters`                                n · `n_clusters`
=========  ==================================================  ===================================

k-means makes ten starts, fewer from n · d · `n_clusters` = 7·10⁹ on, and one from 3·10¹⁰ on. On two CPU cores
`PixelClustering` takes half a minute for 50,000 images of 28×28 pixels and 1,000 clusters.
"""

from sul_jax.estimators._base import fit_together
from sul_jax.estimators._saved import load
from sul_jax.estimators.acol import ACOLClustering
from sul_jax.estimators.deep_cluster import DeepClustering
from sul_jax.estimators.energy import EnergyClustering
from sul_jax.estimators.hebbian import HebbianFeatures
from sul_jax.estimators.k_means import KMeans
from sul_jax.estimators.k_subspaces import KSubspaces
from sul_jax.estimators.nmce import NMCEClustering
from sul_jax.estimators.pixels import PixelClustering
from sul_jax.estimators.rate_reduction import RateReductionClustering

__all__ = [
    "ACOLClustering",
    "DeepClustering",
    "EnergyClustering",
    "HebbianFeatures",
    "KMeans",
    "KSubspaces",
    "NMCEClustering",
    "PixelClustering",
    "RateReductionClustering",
    "fit_together",
    "load",
]
