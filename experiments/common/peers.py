"""What a user would pick instead of the library, to be timed beside it by the benchmark.

Each peer is made ready, on data of its own or given ones, and returned as a function that does the work once;
None where its package is not installed, or runs on another kind of device than jax.
"""

import importlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import numpy as np

from sul_jax.nn import AlexNet, LeNet5

Step = Callable[[], None]


def optional(package: str) -> Any:
    """A package, or None where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        return None


def k_subspaces_numpy(bases: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Algorithm 1 of K-Subspaces: new bases."""
    responses = x @ bases.reshape(-1, x.shape[1]).T
    winners = np.square(responses.reshape(len(x), *bases.shape[:2])).sum(2).argmax(1)
    new = bases.copy()
    for k in range(len(bases)):
        own = x[winners == k]
        if len(own):
            new[k] = np.linalg.svd(own.T @ (own @ bases[k].T), full_matrices=False)[0].T
    return new


def hebbian_numpy(weights: np.ndarray, x: np.ndarray, *, plain: bool) -> np.ndarray:
    """A ranked Hebbian step: by sorting all drives, as the authors, or by what NumPy does fastest."""
    number, examples = len(weights), np.arange(x.shape[1])
    drives = weights @ x
    if plain:
        order = np.argsort(drives, axis=0)
        first, second = order[number - 1], order[number - 2]
    else:
        first = drives.argmax(axis=0)
        rest = drives.copy()
        rest[first, examples] = -np.inf
        second = rest.argmax(axis=0)
    activity = np.zeros_like(drives)
    activity[first, examples] = 1
    activity[second, examples] = -0.2
    change = activity @ x.T - np.sum(activity * drives, axis=1)[:, None] * weights
    return np.asarray(weights + 0.02 / max(np.abs(change).max(), 1e-30) * change)


def faiss_k_means(
    x: np.ndarray, clusters: int, iterations: int, *, starts: int = 1, init: np.ndarray | None = None
) -> Callable[[], float] | None:
    """k-means by faiss on all vectors, with the labels after it; gives the inertia."""
    faiss = optional("faiss")
    if faiss is None:
        return None

    def fit() -> float:
        options = {"niter": iterations, "nredo": starts, "max_points_per_centroid": len(x)}
        model = faiss.Kmeans(x.shape[1], clusters, **options)
        model.train(x, init_centroids=init)
        return float(model.index.search(x, 1)[0].sum())

    return fit


def torch_coding_rate(features: np.ndarray, memberships: np.ndarray) -> Callable[[], Any] | None:
    """Coding-rate reduction and its gradient by the published formula."""
    torch = optional("torch")
    if torch is None:
        return None
    z, pi = (torch.tensor(a, requires_grad=True) for a in (features, memberships))
    n, d = z.shape
    eye = torch.eye(d)

    def gradient() -> Any:
        value = torch.logdet(eye + d / (n * 0.2) * z.T @ z) / 2
        # MCR²'s code multiplies by n×n diagonal matrices, cluster by cluster; NMCE's, as here, by rows.
        mass = pi.sum(0) + 1e-8
        grams = (z * pi.T[:, :, None]).mT @ z
        rates = torch.logdet(eye + (d / (mass * 0.2))[:, None, None] * grams)
        return torch.autograd.grad(value - (mass / (2 * n) * rates).sum(), (z, pi))

    return gradient


def torch_resnet(number: int, lower: bool) -> Step | None:
    """A step of ResNet-18 with paper 003's loss on two views, in bfloat16 on a GPU or float32 on a CPU."""
    torch = optional("torch")
    if torch is None or (lower and not torch.cuda.is_available()):
        return None
    nn = torch.nn

    def conv(inputs: int, outputs: int, size: int, stride: int) -> list[Any]:
        layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        return [layer, nn.BatchNorm2d(outputs)]

    class Block(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self, inputs: int, outputs: int):
            super().__init__()
            stride = outputs // inputs
            first = conv(inputs, outputs, 3, stride)
            self.body = nn.Sequential(*first, nn.ReLU(), *conv(outputs, outputs, 3, 1))
            straight = conv(inputs, outputs, 1, stride) if stride > 1 else []
            self.shortcut = nn.Sequential(*straight)

        def forward(self, x: Any) -> Any:
            return torch.relu(self.body(x) + self.shortcut(x))

    device = "cuda" if lower else "cpu"
    torch.backends.cudnn.benchmark = True
    widths = (64, 64, 64, 128, 128, 256, 256, 512, 512)
    network = nn.Sequential(
        *[*conv(3, 64, 3, 1), nn.ReLU()],
        *[Block(inputs, outputs) for inputs, outputs in pairwise(widths)],
        *[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 4096), nn.BatchNorm1d(4096), nn.ReLU()],
        nn.Linear(4096, 128),
    ).to(device, memory_format=torch.channels_last)
    images = torch.rand(2 * number, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    eye = torch.eye(128, device=device)

    def loss() -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=lower):
            z = network(images)
        views = nn.functional.normalize(z.float(), dim=1).reshape(2, number, 128)
        grams = eye + 128 / (number * 0.2) * views.mT @ views
        return -torch.logdet(grams).mean() / 2 - (views[0] * views[1]).sum(1).mean()

    descent = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    return _descent(descent, loss, after=torch.cuda.synchronize if lower else None)


def torch_acol(number: int) -> tuple[Step, ...]:
    """A step of paper 002 on a CPU, and one of the network without regularisation and augmentation."""
    torch = _torch_on_cpu()
    if torch is None:
        return ()
    nn = torch.nn
    layers: list[Any] = []
    for inputs, outputs in ((1, 32), (32, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
        if inputs == outputs:
            layers += [nn.MaxPool2d(2), nn.Dropout(0.2 if outputs == 32 else 0.3)]
    layers += [nn.Flatten(), nn.Linear(3136, 2048), nn.ReLU(), nn.Dropout(0.5), nn.Linear(2048, 160)]
    network = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    images = torch.rand(number, 1, 28, 28).to(memory_format=torch.channels_last)
    parents = torch.randint(0, 8, (number,))

    def turned() -> tuple[Any, Any]:
        ways = torch.randint(0, 8, (number,))
        views = images
        for way in range(1, 8):
            one = torch.rot90(images, way % 4, (2, 3))
            one = one.flip(3) if way >= 4 else one
            views = torch.where((ways == way)[:, None, None, None], one, views)
        return views, ways

    def regularised() -> Any:
        views, ways = turned()
        logits = network(views)
        pooled = logits.softmax(1).reshape(number, 20, 8).sum(1)
        active = logits.relu().reshape(number, 20, 8)
        gram = torch.einsum("bip,bjp->pij", active, active)
        diagonal = torch.diagonal(gram, dim1=1, dim2=2)
        outer = diagonal[:, :, None] * diagonal[:, None, :]
        ratios = []
        for matrix in (gram, outer):
            trace = torch.diagonal(matrix, dim1=1, dim2=2).sum(1)
            ratios.append(((matrix.sum((1, 2)) - trace) / (19 * trace + 1e-7)).mean())
        taught = -pooled.gather(1, ways[:, None]).clamp_min(1e-7).log().mean()
        return taught + 0.1 * ratios[0] + (1 - ratios[1]) + 1e-6 * logits.square().sum()

    def supervised() -> Any:
        return nn.functional.cross_entropy(network(images), parents)

    losses = (regularised, supervised)
    return tuple(_descent(torch.optim.Adam(network.parameters()), loss) for loss in losses)


def torch_convnet(network: LeNet5 | AlexNet, batch: int) -> tuple[Step, Step] | None:
    """The same network on a CPU, Sobel filters as a convolution: features of 400 images, and a step."""
    torch = _torch_on_cpu()
    if torch is None:
        return None
    nn = torch.nn
    channels = network.image_shape[2]
    layers: list[Any] = [nn.Conv2d(channels, 2, 3, padding=1).requires_grad_(False)] if channels == 3 else []
    inputs = 2 if channels == 3 else channels
    for one in network.specifications:
        layers.append(nn.Conv2d(inputs, one.filters, one.kernel_size, one.strides, one.padding))
        layers += [nn.BatchNorm2d(one.filters), nn.ReLU()]
        layers += [] if one.pool is None else [nn.MaxPool2d(*one.pool)]
        inputs = one.filters
    layers.append(nn.Flatten())
    for index, hidden in enumerate(network.hidden):
        layers += [nn.ReLU()] if index else []
        layers += [nn.Dropout(network.dropout), nn.Linear(*hidden.kernel[...].shape)]
    peer = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    images = torch.rand(400, channels, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.arange(batch) % network.num_features

    def features() -> None:
        peer.eval()
        with torch.no_grad():
            peer(images)

    def loss() -> Any:
        return nn.functional.cross_entropy(peer.train()(images[:batch]), labels)

    learned = [p for p in peer.parameters() if p.requires_grad]
    return features, _descent(torch.optim.SGD(learned, 0.1, momentum=0.9), loss)


def _torch_on_cpu() -> Any:
    return optional("torch") if jax.default_backend() == "cpu" else None


def _descent(optimizer: Any, loss: Callable[[], Any], after: Step | None = None) -> Step:
    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()
        if after is not None:
            after()

    return step
