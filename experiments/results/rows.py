"""The rows of the results tables: which number of which command stands beside which number of a paper.

A row's command says which recorded runs are its own (`experiments.results.records`): the options it states,
the defaults of the others, and where a default depends on the data (None in the experiment's `Config`) what
`FILLED` says. Superscripts in labels are the notes below the tables in `experiments/results/README.md`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

ACCELERATOR = None  # in place of minutes: more than a day, or more memory than there is, on two cores


class Row(NamedTuple):
    """A row of a results table.

    Attributes:
      label: what stands in the first column.
      paper: the paper's number, "–" where it gives none.
      command: what makes ours, after `python -m experiments.`; the installed command `sul-jax` as it is.
      minutes: what a seed takes on two cores, or `ACCELERATOR`.
      metric: name of the number in the records.
      better: "lower", "higher", or "" where no value is better than another.
      filled: what the experiment fills in where this row's command leaves an option to it; beyond `FILLED`.
      decimals: printed.
      spread: the metric that is a single run's own spread, if there is one.
      published: only runs count for whose very options the run itself names the paper's number; what they
        fill in is then not compared.

    Example:
      >>> from experiments.results.rows import TABLES
      >>> row = TABLES["000"][11]
      >>> row.label, row.paper, row.command
      ('MNIST, 1 layer', '20.2', 'mnist_energy --dataset mnist --architecture 1layer')
    """

    label: str
    paper: str
    command: str
    minutes: float | None
    metric: str
    better: str = "lower"
    filled: Mapping[str, Any] = {}
    decimals: int = 2
    spread: str = ""
    published: bool = False


_ENERGY: dict[str, Any] = {"networks": 1, "code_power": 1.0, "num_clusters": 10}
_ACOL = {"num_filters": 32, "epochs": 400, "batch_size": 400, "num_clusters": 10}
_HEBBIAN = {"epochs": 70, "batch_size": 300, "schedule": "linear"}
_LENET = {"architecture": "lenet5", "num_components": 0, "sobel": False}
_ALEXNET = {"architecture": "alexnet", "num_components": 256, "sobel": "random", "num_clusters": 1000}
# What an experiment fills in on a data set where the command leaves an option to it.
FILLED: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("mnist_energy", "mnist"): _ENERGY | {"architecture": "3layer", "batch_size": 512, "passes": 1},
    ("mnist_energy", "digits"): _ENERGY | {"architecture": "digits", "batch_size": 128, "passes": 3},
    ("cifar10_hebbian", "cifar10"): _HEBBIAN | {"learning_rate": 6e-4},
    ("mnist_hebbian", "mnist"): _HEBBIAN | {"learning_rate": 0.1},
    ("acol_pseudo", "mnist"): _ACOL,
    ("acol_pseudo", "usps"): _ACOL,
    ("acol_pseudo", "svhn_cropped"): _ACOL,
    ("acol_pseudo", "digits"): _ACOL | {"num_filters": 16, "epochs": 85, "batch_size": 50},
    ("deepcluster_alignment", "mnist"): _LENET | {"num_clusters": 9},
    ("deepcluster_alignment", "fashion_mnist"): _LENET | {"num_clusters": 5},
    ("deepcluster_alignment", "cifar10"): _ALEXNET,
    ("deepcluster", "fashion_mnist"): _LENET
    | {"num_clusters": 5, "cycles": 50, "momentum": 0.1, "batch_size": 128}
    | {"probe_layer": "conv_2", "kmeans": "scikit-learn"},
    ("deepcluster", "cifar10"): _ALEXNET
    | {"cycles": 100, "momentum": 0.9, "batch_size": 64, "probe_layer": "relu_5", "kmeans": "faiss"},
    ("sul-jax", ""): {"method": "energy", "num_clusters": [10], "image_size": 28},
}


def _mnist(label: str, paper: str, minutes: float, options: str = "", metric: str = "test") -> Row:
    command = f"mnist_energy --dataset mnist {options}".strip()
    return Row(label, paper, command, minutes, f"{metric}_clustering_error")


def _digits(label: str, minutes: float, options: str = "", **filled: float) -> Row:
    command = f"mnist_energy --dataset digits {options}".strip()
    return Row(label, "–", command, minutes, "test_clustering_error", filled=filled)


def _hebbian(
    label: str, paper: str, minutes: float, options: str = "", metric: str = "test_error", **filled: Any
) -> Row:
    command = f"cifar10_hebbian --dataset cifar10 {options}".strip()
    return Row(label, paper, command, minutes, metric, filled=filled)


def _acol(label: str, paper: str, minutes: float | None, options: str) -> Row:
    return Row(label, paper, f"acol_pseudo --dataset {options}", minutes, "clustering_accuracy", "higher")


def _accuracy(label: str, paper: str, minutes: float | None, command: str, **fields: Any) -> Row:
    return Row(label, paper, command, minutes, "clustering_accuracy", "higher", **fields)


def _coil(label: str, paper: str, minutes: float | None, options: str) -> Row:
    return Row(label, paper, f"nmce_coil {options}".strip(), minutes, "clustering_error")


def _alignment(label: str, paper: str, minutes: float, options: str) -> Row:
    command, name = f"deepcluster_alignment --dataset {options}", "initial_alignment"
    return Row(label, paper, command, minutes, f"{name}_mean", "", decimals=3, spread=f"{name}_std")


def _probe(label: str, minutes: float, options: str, after: str = "", before: str = "") -> Row:
    metric = f"{before}probe_accuracy{after}"
    return Row(label, "–", f"deepcluster --dataset {options}", minutes, metric, "higher")


_WHITENED = "--code-whitening 0.2"
_SMALL_COIL = "--image-size 32 --depth 10 --num-filters 16 --steps"
_GAMMAS = "--gammas 1.5 2 3 5 10 20 50 400"  # tried one after the other
_COIL_100 = (
    "--dataset coil100 --depth 10 --num-features 200 --eps-squared 0.001 --steps 10000 "
    "--gamma 200 --l1-ratio 0.5 --num-clusters"
)
_FASHION = "fashion_mnist --num-train 10000 --cycles 20 --every-layer"
_CIFAR, _SOBEL = "cifar10 --probe-every 4", "cifar10 --cycles 8 --sobel True --kmeans scikit-learn"
_SMALL_CIFAR = "cifar10 --num-train 10000 --cycles 8 --num-clusters"

_PAPER_000 = (
    _mnist("MNIST, k-means on pixels", "46.2", 11, metric="pixels"),
    _mnist("… on whitened pixels", "50.0", 11, metric="zca"),
    _mnist("… after energy layer 1", "22.7", 11, metric="layer1"),
    _mnist("… after energy layer 2", "22.2", 11, metric="layer2"),
    _mnist("… after energy layer 3", "2.3", 11, metric="layer3"),
    _mnist("**… pooled 2×2: the three-layer network**", "2.1", 11),
    _mnist("**… its codes partly whitened¹**", "–", 10, _WHITENED),
    _mnist("**… two such networks side by side¹**", "–", 16, f"--networks 2 {_WHITENED}"),
    _mnist("**… three such networks side by side¹**", "–", 37, f"--networks 3 {_WHITENED}"),
    _mnist("… one network: error on the first 10,000 training images", "2.5", 11, metric="train"),
    _mnist("… the same, codes partly whitened¹", "–", 10, _WHITENED, "train"),
    _mnist("MNIST, 1 layer", "20.2", 2, "--architecture 1layer"),
    _mnist("MNIST, 2 layers", "2.9", 11, "--architecture 2layer"),
    _mnist("MNIST, 4 layers", "3.1", 35, "--architecture 4layer"),
    _mnist("MNIST, 3 layers, no ZCA²", "4.0", 9, "--no-zca"),
    _mnist("MNIST, 3 layers, no rescaling²", "4.1", 10, "--no-rescale"),
    _mnist("MNIST, 3 layers, 1-D subspaces²", "16.0", 6, "--rank-one"),
    _mnist("MNIST, 3 layers, random subspaces²", "29.4", 2, "--random-subspaces"),
    _mnist("MNIST, 3 layers that 50 trials on 5,000 images found", "–", 5, "--architecture mnist_50_trials"),
    _digits("bundled digits, the published 3 layers (pixels: 20.3)", 2, "--architecture 3layer"),
    _digits("… searched on one half³, error on the other", 1, networks=5, code_power=0.5),
    *(
        _digits(f"… 2 layers searched by {n} labels of that half⁴", 1, f"--architecture digits_{n}_labels")
        for n in (10, 50, 200, 896)
    ),
)
_PAPER_001 = (
    _hebbian("CIFAR-10, Hebbian filters of 4×4 pixels", "27.80", 6),
    _hebbian("… with a shadow over the test images¹", "–", 6, metric="shadowed_test_error"),
    _hebbian("… with filters that stay the patches they start from¹", "–", 12, "--filter-steps 0"),
    _hebbian("… and a shadow", "–", 12, "--filter-steps 0", "shadowed_test_error"),
    _hebbian(
        "… the same network trained end to end", "27.11", 120, "--response relu",
        learning_rate=1e-4, schedule="drops",
    ),
    _hebbian("… five blocks of filters", "23.40", 240, "--architecture five"),
    _hebbian("… of 80 filters each, not 400", "–", 6, "--architecture five --num-units 80"),
    Row(
        "MNIST, 2,000 Hebbian units that see whole digits", "–",
        "mnist_hebbian --dataset mnist --powers 4 5 6", 2, "test_error",
    ),
)  # fmt: skip
_PAPER_002 = (
    _acol("MNIST, pseudo supervision (ACOL)", "98.32", 1130, "mnist"),
    _acol("MNIST, transformations 1, 2 only", "72.52", 1130, "mnist --transformations 1 2"),
    _acol("MNIST, transformations 1, 3 only", "96.84", 1130, "mnist --transformations 1 3"),
    _acol("MNIST, transformations 1, 2, 3, 4 only", "97.80", 1130, "mnist --transformations 1 2 3 4"),
    _acol("MNIST, the logits Z in place of F", "98.16", 1130, "mnist --representation logits"),
    _acol("MNIST, 10,000 training images, 60 epochs", "–", 28, "mnist --num-train 10000 --epochs 60"),
    _acol(
        "… 100 epochs of smaller minibatches", "–", 27,
        "mnist --num-train 10000 --epochs 100 --batch-size 100",
    ),
    _acol(
        "… and 20 more at a falling rate¹", "–", 28,
        "mnist --num-train 10000 --epochs 120 --batch-size 100 --decay-epochs 20",
    ),
    _acol("… 140 epochs", "–", 27, "mnist --num-train 10000 --epochs 140"),
    _acol("USPS, pseudo supervision (ACOL)", "96.51", 115, "usps"),
    _acol("USPS, pseudo supervision, 150 epochs (paper: 400)", "96.51", 43, "usps --epochs 150"),
    _acol("SVHN, pseudo supervision (ACOL)", "76.80", ACCELERATOR, "svhn_cropped"),
    _acol("bundled digits, pseudo supervision²", "–", 2, "digits"),
    _acol("… 200 epochs", "–", 2, "digits --epochs 200"),
    _acol("… the last 42 of 85 at a falling rate", "–", 1, "digits --decay-epochs 42"),
)  # fmt: skip
_PAPER_003 = (
    _accuracy("double spiral, **accuracy**", "–", 4, "nmce_spiral"),
    _accuracy("two random manifolds¹, identifiable, **accuracy**", "100.0", 2, "nmce_manifolds"),
    Row(
        "… absolute cosine within a cluster¹", "0.503", "nmce_manifolds", 2, "cosine_within_cluster", "",
        decimals=3,
    ),
    _accuracy("… not identifiable, **accuracy**", "69.8", 2, "nmce_manifolds --no-biases"),
    Row(
        "… absolute cosine within a cluster", "0.770", "nmce_manifolds --no-biases", 2,
        "cosine_within_cluster", "", decimals=3,
    ),
    _coil("COIL-20, error at the paper's size", "0.0", ACCELERATOR, ""),
    _coil("… of a ResNet-10 at 32×32 pixels, 300 steps", "–", 9, f"{_SMALL_COIL} 300"),
    _coil(
        "… the same features, the sparsest graph that is whole²", "–", 9, f"{_SMALL_COIL} 300 {_GAMMAS}"
    ),
    _coil("… 500 steps²", "–", 7, f"{_SMALL_COIL} 500 {_GAMMAS}"),
    _coil("… 1,500 steps²", "–", 22, f"{_SMALL_COIL} 1500 {_GAMMAS}"),
    _coil(
        "COIL-100, error with 94 clusters, a number tuned on labels", "11.53", ACCELERATOR, f"{_COIL_100} 94"
    ),
    _coil("COIL-100, error with 100 clusters", "–", ACCELERATOR, f"{_COIL_100} 100"),
    *(
        _accuracy(
            f"{name}, NMCE with ResNet-18, **accuracy**", paper, ACCELERATOR,
            f"nmce_images --dataset {dataset}", published=True,
        )
        for name, dataset, paper in (
            ("CIFAR-10", "cifar10", "83.0"), ("CIFAR-20", "cifar20", "43.7"), ("STL-10", "stl10", "72.5"),
        )
    ),
)  # fmt: skip
_PAPER_004 = (
    _alignment("MNIST, **initial alignment** of 100 LeNets, 9 clusters (NMI)", "0.409", 9, "mnist"),
    _alignment(
        "Fashion-MNIST, **initial alignment** of 100 LeNets, 5 clusters", "0.37–0.41", 4, "fashion_mnist"
    ),
    _alignment(
        "CIFAR-10, **initial alignment** of 100 AlexNets, 1,000 clusters¹", "0.065–0.085", 29, "cifar10"
    ),
    _alignment("… of 10 AlexNets above Sobel's filters¹", "–", 3, "cifar10 --sobel True --num-networks 10"),
    _probe("Fashion-MNIST, DeepCluster, 50 cycles: probe on conv_2", 15, "fashion_mnist"),
    _probe("… of the untrained network", 15, "fashion_mnist", before="random_"),
    _probe("10,000 images of it, 20 cycles, 5 clusters: probe on conv_2", 1, f"{_FASHION} --num-clusters 5"),
    _probe("… 20 clusters", 1, f"{_FASHION} --num-clusters 20"),
    _probe("… 200 clusters", 1, f"{_FASHION} --num-clusters 200"),
    _probe("… untrained", 1, f"{_FASHION} --num-clusters 5", before="random_"),
    _probe("… 5 clusters, probe on relu_2", 1, f"{_FASHION} --num-clusters 5", "_relu_2"),
    _probe("… 20 clusters, relu_2", 1, f"{_FASHION} --num-clusters 20", "_relu_2"),
    _probe("… 200 clusters, relu_2", 1, f"{_FASHION} --num-clusters 200", "_relu_2"),
    _probe("… untrained, relu_2", 1, f"{_FASHION} --num-clusters 5", "_relu_2", "random_"),
    *(
        _probe(f"… clusters of cycle {halt} kept to the end, {layer}", 1, f"{_FASHION} --halt {halt}", after)
        for layer, after in (("conv_2", ""), ("relu_2", "_relu_2"))
        for halt in (1, 5)
    ),
    _probe("CIFAR-10, DeepCluster, 1,000 clusters, 100 cycles: probe on relu_5", 85, _CIFAR),
    _probe("… after 8 cycles", 85, _CIFAR, "_after_8"),
    _probe("… untrained", 85, _CIFAR, before="random_"),
    _probe("… above Sobel's filters¹, scikit-learn's k-means, 8 cycles", 6, _SOBEL),
    _probe("… untrained", 6, _SOBEL, before="random_"),
    _probe("10,000 images of it, 8 cycles, 10 clusters", 4, f"{_SMALL_CIFAR} 10"),
    _probe("… 100 clusters", 3, f"{_SMALL_CIFAR} 100"),
    _probe("… 1,000 clusters", 4, f"{_SMALL_CIFAR} 1000"),
    _probe("… untrained", 4, f"{_SMALL_CIFAR} 10", before="random_"),
)
_OWN_IMAGES = tuple(
    Row(label, "–", "sul-jax cluster FOLDER --num-clusters 10", 5, metric, "higher")
    for label, metric in (
        ("Fashion-MNIST's test images as PNG files, three seeds", "clustering_accuracy"),
        ("… k-means on the pixels", "pixels_clustering_accuracy"),
    )
)

# By paper; below each table in experiments/results/README.md are its notes.
TABLES: Mapping[str, tuple[Row, ...]] = {
    "000": _PAPER_000,
    "001": _PAPER_001,
    "002": _PAPER_002,
    "003": _PAPER_003,
    "004": _PAPER_004,
    "own": _OWN_IMAGES,
}

# The rows to see first, by their labels, and what README.md calls them.
HEADLINES: Mapping[str, str] = {
    "**… pooled 2×2: the three-layer network**": "000: MNIST, three energy layers, clustering error, %",
    "**… three such networks side by side¹**": "000: … three networks, their codes partly whitened",
    "… searched on one half³, error on the other": "000: bundled digits, five small networks, error, %",
    "CIFAR-10, Hebbian filters of 4×4 pixels": "001: CIFAR-10, Hebbian filters, test error, %",
    "USPS, pseudo supervision, 150 epochs (paper: 400)": "002: USPS, 150 epochs (paper: 400), accuracy, %",
    "bundled digits, pseudo supervision²": "002: bundled digits, accuracy, %",
    "double spiral, **accuracy**": "003: double spiral, accuracy, %",
    "two random manifolds¹, identifiable, **accuracy**": "003: two random manifolds, accuracy, %",
    "… 1,500 steps²": "003: COIL-20, a small ResNet at 32×32 pixels (paper's size: 0.0), error, %",
    "MNIST, **initial alignment** of 100 LeNets, 9 clusters (NMI)": (
        "004: MNIST, untrained LeNets, initial alignment (NMI)"
    ),
    "CIFAR-10, **initial alignment** of 100 AlexNets, 1,000 clusters¹": (
        "004: CIFAR-10, untrained AlexNets, initial alignment (NMI)"
    ),
    "CIFAR-10, DeepCluster, 1,000 clusters, 100 cycles: probe on relu_5": (
        "004: CIFAR-10, 100 cycles, accuracy of a linear classifier, %"
    ),
}
