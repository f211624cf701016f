"""k-means on the pixels: what any learning must beat."""

from collections.abc import Callable
from typing import Any

from jax import Array

from sul_jax.estimators._base import ImageClustering
from sul_jax.estimators._images import Images


class PixelClustering(ImageClustering):
    """k-means on the pixels, the baseline.

    Args:
      n_clusters: clusters.
      image_shape: height, width and perhaps channels of images given as rows, which need it.
      image_size: side to which images are resized.
      random_state: an integer for the same result every time, on one machine with as many threads.
      verbose: show progress.

    Example:
      >>> import numpy as np
      >>> from sul_jax.estimators import PixelClustering
      >>> images = np.repeat(np.eye(2), 5, axis=0).reshape(10, 2, 1)
      >>> PixelClustering(2, random_state=0).fit_predict(images)[[0, 5]].tolist() in ([0, 1], [1, 0])
      True
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        image_shape: tuple[int, ...] | None = None,
        image_size: int = 28,
        random_state: Any = None,
        verbose: bool = False,
    ):
        self.n_clusters = n_clusters
        self.image_shape = image_shape
        self.image_size = image_size
        self.random_state = random_state
        self.verbose = verbose

    def _template(self) -> Any:
        return ()

    def _learn(self, keys: Array, images: Images) -> Any:
        return ()

    def _encoder(self, learned: Any) -> Callable[[Array], Array]:
        return lambda images: images.reshape(len(images), -1)
