"""README's tables, rendered from the recorded runs in `experiments/results/`.

python -m experiments.results
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from experiments.common import runs
from experiments.common.tables import format_table
from experiments.compare import comparison
from experiments.data import atomic_path

README = Path(__file__).parents[2] / "README.md"


class Row(NamedTuple):
    """A row of the README's results table: which runs it takes and which number of theirs."""

    what: str
    paper: str
    experiment: str
    metric: str
    where: Mapping[str, Any]  # values that the record's config must have
    dataset: str
    num_train: int
    command: str
    better: str = "lower"  # or "higher", or "" where no value is better than another
    decimals: int = 2
    spread: str = ""  # the metric that is a single run's own spread
    published: bool = False  # only runs of the very setting that the paper's number is of


# Options of the published network as it is trained and evaluated.
_PUBLISHED: dict[str, Any] = {
    "architecture": "3layer",
    "zca": True,
    "rescale": True,
    "rank_one": False,
    "random_subspaces": False,
    "batch_size": 512,
    "passes": 1,
    "networks": 1,
    "code_power": 1.0,
    "code_whitening": 0.0,
    "warmup_steps": 10,
    "num_train": None,
    "num_test": None,
    "num_clusters": 10,
}


def _energy_row(what: str, paper: str, metric: str, options: str = "", **where: Any) -> Row:
    """A row of paper 000 on the whole of MNIST; `where` changes the published network's options."""
    command = f"mnist_energy --dataset mnist{options}"
    return Row(what, paper, "mnist_energy", metric, _PUBLISHED | where, "mnist", 60_000, command)


_GAMMAS = [1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 400.0]  # of a self-expression, tried one after the other
_ERROR = "test_clustering_error"


def _nmce_row(what: str, paper: str, experiment: str, dataset: str, options: str = "", **where: Any) -> Row:
    """A row of paper 003's generated data, accuracy in percent."""
    seen = where["steps"] * where["batch_size"]
    return Row(
        what, paper, experiment, "clustering_accuracy", where, dataset, seen, experiment + options, "higher"
    )


def _alignment_row(
    what: str,
    paper: str,
    dataset: str,
    num_train: int,
    clusters: int,
    options: str = "",
    *,
    networks: int = 100,
    sobel: bool | str = False,
) -> Row:
    """A row of paper 004's initial alignment: the mean over untrained networks."""
    colour = dataset == "cifar10"
    where = {
        "num_clusters": clusters, "num_networks": networks, "num_train": None, "sobel": sobel,
        "architecture": "alexnet" if colour else "lenet5", "num_components": 256 if colour else 0,
        "kmeans": "scikit-learn",
    }  # fmt: skip
    command = f"deepcluster_alignment --dataset {dataset}{options}"
    metric = "initial_alignment_mean"
    spread = metric.replace("mean", "std")
    name = "deepcluster_alignment"
    return Row(what, paper, name, metric, where, dataset, num_train, command, "", 3, spread)


def _deepcluster_row(
    what: str,
    metric: str,
    options: str = "",
    size: int = 60_000,
    dataset: str = "fashion_mnist",
    **changes: Any,
) -> Row:
    """A row of paper 004's runs, by default on Fashion-MNIST: accuracy of a linear probe in percent."""
    where = {
        "architecture": "lenet5", "num_clusters": 5, "num_components": 0, "sobel": False, "cycles": 50,
        "halt": None, "augmentation": "code", "learning_rate": 0.1, "momentum": 0.1, "weight_decay": 1e-3,
        "batch_size": 128, "probe_layer": "conv_2", "probe_epochs": 20, "num_train": None, "num_test": None,
        "kmeans": "scikit-learn", "fresh_head": True,
    }  # fmt: skip
    if dataset == "cifar10":
        where |= {
            "architecture": "alexnet", "num_clusters": 1000, "num_components": 256, "sobel": "random",
            "momentum": 0.9, "batch_size": 64, "probe_layer": "relu_5", "kmeans": "faiss",
        }  # fmt: skip
    command = f"deepcluster --dataset {dataset}{options}"
    return Row(what, "–", "deepcluster", metric, where | changes, dataset, size, command, "higher")


def _coil_row(
    what: str, paper: str, options: str = "", dataset: str = "coil20", size: int = 1440, **changes: Any
) -> Row:
    """A row of paper 003 on COIL: clustering error in percent; `changes` of the defaults."""
    where = {
        "image_size": 64, "num_images": None, "depth": 18, "num_filters": 32, "num_pre_features": 4096,
        "num_features": 40, "steps": 2000, "learning_rate": 1e-3, "weight_decay": 1e-6, "eps_squared": 0.01,
        "invariance_weight": 20.0, "gamma": 400.0, "gammas": [], "l1_ratio": 1.0, "num_clusters": None,
        **changes,
    }  # fmt: skip
    return Row(what, paper, "nmce_coil", "clustering_error", where, dataset, size, f"nmce_coil{options}")


def _acol_row(what: str, paper: str, dataset: str, size: int, options: str = "", **changes: Any) -> Row:
    """A row of paper 002, by default with all eight transformations: accuracy in percent."""
    where = {
        "supervision": "pseudo", "transformations": list(range(1, 9)), "representation": "features",
        "epochs": 400, "nodes_per_parent": 20, "num_features": 2048, "num_filters": 32, "batch_size": 400,
        "frobenius": "squared", "num_train": None, "num_test": None,
    }  # fmt: skip
    where |= {
        "affinity_weight": 0.1, "balance_weight": 1.0, "frobenius_weight": 1e-6, "learning_rate": 1e-3,
        "num_clusters": 10, "decay_epochs": 0, **changes,
    }  # fmt: skip
    command, metric = f"acol_pseudo --dataset {dataset}{options}", "clustering_accuracy"
    return Row(what, paper, "acol_pseudo", metric, where, dataset, size, command, "higher")


def _hebbian_row(what: str, paper: str, options: str = "", metric: str = "test_error", **where: Any) -> Row:
    """A row of paper 001 on CIFAR-10: error of the classifier in percent."""
    design = {
        "architecture": "single", "response": "nnl", "num_units": None, "powers": [], "filters_from": None,
        "anti_hebbian": None, "rank": 2, "epochs": 70, "batch_size": 300, "learning_rate": 6e-4,
        "schedule": "linear", "num_train": None, "num_test": None, "filter_steps": 10_000,
        "filter_start": "patches", "filter_learning_rate": 4e-3, "patch_batch": 1000,
        "normalize_update": True,
    } | where  # fmt: skip
    command = f"cifar10_hebbian{options}"
    return Row(what, paper, "cifar10_hebbian", metric, design, "cifar10", 50_000, command)


# By what the rows of a table are of.
ROWS: Mapping[str, tuple[Row, ...]] = {
    "Stacked energy layers (paper 000): clustering error, %": (
        _energy_row("MNIST, k-means on pixels", "46.2", "pixels_clustering_error"),
        _energy_row("… on whitened pixels", "50.0", "zca_clustering_error"),
        _energy_row("… after energy layer 1", "22.7", "layer1_clustering_error"),
        _energy_row("… after energy layer 2", "22.2", "layer2_clustering_error"),
        _energy_row("… after energy layer 3", "2.3", "layer3_clustering_error"),
        _energy_row("**… pooled 2×2: the three-layer network**", "2.1", _ERROR),
        _energy_row(
            "**… its codes partly whitened²**", "–", _ERROR, " --code-whitening 0.2", code_whitening=0.2
        ),
        _energy_row(
            "**… two such networks side by side²**",
            "–",
            _ERROR,
            " --networks 2 --code-whitening 0.2",
            code_whitening=0.2,
            networks=2,
        ),
        _energy_row(
            "**… three such networks side by side²**",
            "–",
            _ERROR,
            " --networks 3 --code-whitening 0.2",
            code_whitening=0.2,
            networks=3,
        ),
        _energy_row("… error on the first 10,000 training images", "2.5", "train_clustering_error"),
        _energy_row(
            "… the same, codes partly whitened²",
            "–",
            "train_clustering_error",
            " --code-whitening 0.2",
            code_whitening=0.2,
        ),
        _energy_row(
            "MNIST, 3 layers that 50 trials on 5,000 images found",
            "–",
            _ERROR,
            " --architecture mnist_50_trials",
            architecture="mnist_50_trials",
        ),
        _energy_row("MNIST, 1 layer", "20.2", _ERROR, " --architecture 1layer", architecture="1layer"),
        _energy_row("MNIST, 2 layers", "2.9", _ERROR, " --architecture 2layer", architecture="2layer"),
        _energy_row("MNIST, 4 layers", "3.1", _ERROR, " --architecture 4layer", architecture="4layer"),
        _energy_row("MNIST, 3 layers, no ZCA¹", "4.0", _ERROR, " --no-zca", zca=False),
        _energy_row("MNIST, 3 layers, no rescaling¹", "4.1", _ERROR, " --no-rescale", rescale=False),
        _energy_row("MNIST, 3 layers, 1-D subspaces¹", "16.0", _ERROR, " --rank-one", rank_one=True),
        _energy_row(
            "MNIST, 3 layers, random subspaces¹", "29.4", _ERROR, " --random-subspaces", random_subspaces=True
        ),
        Row(
            "bundled digits, the published 3 layers (pixels: 20.3)",
            "–",
            "mnist_energy",
            _ERROR,
            _PUBLISHED | {"batch_size": 128, "passes": 3},
            "digits",
            1797,
            "mnist_energy --dataset digits --architecture 3layer",
        ),
        Row(
            "… searched on one half¹⁰, error on the other",
            "–",
            "mnist_energy",
            _ERROR,
            {
                "architecture": "digits",
                "networks": 5,
                "zca": True,
                "rescale": True,
                "rank_one": False,
                "random_subspaces": False,
            },
            "digits",
            1797,
            "mnist_energy --dataset digits",
        ),
        *(
            Row(
                f"… 2 layers searched by {number} labels of that half⁶",
                "–",
                "mnist_energy",
                _ERROR,
                _PUBLISHED | {"architecture": f"digits_{number}_labels", "batch_size": 128, "passes": 3},
                "digits",
                1797,
                f"mnist_energy --dataset digits --architecture digits_{number}_labels",
            )
            for number in (10, 50, 200, 896)
        ),
    ),
    "Hebbian filters (paper 001): test error, %": (
        _hebbian_row("CIFAR-10, Hebbian filters of 4×4 pixels", "27.80"),
        _hebbian_row("… with a shadow over the test images³", "–", metric="shadowed_test_error"),
        _hebbian_row(
            "… with filters that stay the patches they start from³", "–", " --filter-steps 0", filter_steps=0
        ),
        _hebbian_row("… and a shadow", "–", " --filter-steps 0", "shadowed_test_error", filter_steps=0),
        _hebbian_row(
            "… the same network trained end to end",
            "27.11",
            " --response relu",
            response="relu",
            learning_rate=1e-4,
            schedule="drops",
        ),
        _hebbian_row("… five blocks of filters", "23.40", " --architecture five", architecture="five"),
        _hebbian_row(
            "… of 80 filters each, not 400",
            "–",
            " --architecture five --num-units 80",
            architecture="five",
            num_units=80,
        ),
        Row(
            "MNIST, 2,000 Hebbian units that see whole digits",
            "–",
            "mnist_hebbian",
            "test_error",
            {
                "architecture": "full",
                "response": "nnl",
                "num_units": None,
                "powers": [4.0, 5.0, 6.0],
                "filter_steps": 500,
                "learning_rate": 0.1,
                "epochs": 70,
                "num_train": None,
                "num_test": None,
            },
            "mnist",
            60_000,
            "mnist_hebbian --powers 4 5 6",
        ),
    ),
    "Pseudo supervision (paper 002): clustering accuracy, %": (
        _acol_row("MNIST, pseudo supervision (ACOL)", "98.32", "mnist", 60_000),
        *(
            _acol_row(
                f"MNIST, transformations {', '.join(map(str, numbers))} only",
                paper,
                "mnist",
                60_000,
                f" --transformations {' '.join(map(str, numbers))}",
                transformations=list(numbers),
            )
            for numbers, paper in (((1, 2), "72.52"), ((1, 3), "96.84"), ((1, 2, 3, 4), "97.80"))
        ),
        _acol_row(
            "MNIST, the logits Z in place of F",
            "98.16",
            "mnist",
            60_000,
            " --representation logits",
            representation="logits",
        ),
        _acol_row(
            "MNIST, 10,000 training images, 60 epochs",
            "–",
            "mnist",
            10_000,
            " --num-train 10000 --epochs 60",
            num_train=10_000,
            epochs=60,
        ),
        _acol_row(
            "… 100 epochs of smaller minibatches",
            "–",
            "mnist",
            10_000,
            " --num-train 10000 --epochs 100 --batch-size 100",
            num_train=10_000,
            epochs=100,
            batch_size=100,
        ),
        _acol_row(
            "… and 20 more at a falling rate⁷",
            "–",
            "mnist",
            10_000,
            " --num-train 10000 --epochs 120 --batch-size 100 --decay-epochs 20",
            num_train=10_000,
            epochs=120,
            batch_size=100,
            decay_epochs=20,
        ),
        _acol_row(
            "… 140 epochs",
            "–",
            "mnist",
            10_000,
            " --num-train 10000 --epochs 140",
            num_train=10_000,
            epochs=140,
        ),
        _acol_row("USPS, pseudo supervision (ACOL)", "96.51", "usps", 9298),
        _acol_row("SVHN, pseudo supervision (ACOL)", "76.80", "svhn_cropped", 73_257),
        _acol_row(
            "USPS, pseudo supervision, 150 epochs (paper: 400)",
            "96.51",
            "usps",
            9298,
            " --epochs 150",
            epochs=150,
        ),
        *(
            _acol_row(
                what,
                "–",
                "digits",
                1797,
                options,
                epochs=epochs,
                decay_epochs=decay_epochs,
                batch_size=50,
                num_filters=16,
            )
            for what, options, epochs, decay_epochs in (
                ("bundled digits, pseudo supervision⁸", "", 85, 0),
                ("… 200 epochs", " --epochs 200", 200, 0),
                ("… the last 42 of 85 at a falling rate", " --decay-epochs 42", 85, 42),
            )
        ),
    ),
    "Neural manifolds (paper 003): clustering error or accuracy, %": (
        _nmce_row(
            "double spiral, **accuracy**",
            "–",
            "nmce_spiral",
            "spiral",
            steps=30_000,
            batch_size=512,
            tcr_steps=0,
        ),
        _nmce_row(
            "two random manifolds⁹, identifiable, **accuracy**",
            "100.0",
            "nmce_manifolds",
            "manifolds",
            steps=3000,
            batch_size=1024,
            biases=True,
        ),
        _nmce_row(
            "… not identifiable, **accuracy**",
            "69.8",
            "nmce_manifolds",
            "manifolds",
            " --no-biases",
            steps=3000,
            batch_size=1024,
            biases=False,
        ),
        _coil_row("COIL-20, error at the paper's size", "0.0"),
        *(
            _coil_row(
                what,
                "–",
                f" --image-size 32 --depth 10 --num-filters 16 --steps {steps}"
                + (" --gammas " + " ".join(f"{value:g}" for value in gammas) if gammas else ""),
                image_size=32,
                depth=10,
                num_filters=16,
                steps=steps,
                gammas=gammas,
            )
            for what, steps, gammas in (
                ("… of a ResNet-10 at 32×32 pixels, 300 steps", 300, []),
                ("… the same features, the sparsest graph that is whole⁴", 300, _GAMMAS),
                ("… 500 steps⁴", 500, _GAMMAS),
                ("… 1,500 steps⁴", 1500, _GAMMAS),
            )
        ),
        *(
            _coil_row(
                f"COIL-100, error with {clusters} clusters" + (", a number tuned on labels" if tuned else ""),
                "11.53" if tuned else "–",
                " --dataset coil100 --depth 10 --num-features 200 --eps-squared 0.001 --steps 10000"
                f" --gamma 200 --l1-ratio 0.5 --num-clusters {clusters}",
                "coil100",
                7178,
                depth=10,
                num_features=200,
                eps_squared=0.001,
                steps=10_000,
                gamma=200.0,
                l1_ratio=0.5,
                num_clusters=clusters,
            )
            for clusters, tuned in ((94, True), (100, False))
        ),
        *(
            Row(
                f"{name}, NMCE with ResNet-18, **accuracy**",
                paper,
                "nmce_images",
                "clustering_accuracy",
                {"depth": 18, "stage": 3, "num_clusters": classes},
                dataset,
                size,
                f"nmce_images --dataset {dataset}",
                "higher",
                published=True,
            )
            for name, dataset, size, classes, paper in (
                ("CIFAR-10", "cifar10", 50_000, 10, "83.0"),
                ("CIFAR-20", "cifar20", 50_000, 20, "43.7"),
                ("STL-10", "stl10", 13_000, 10, "72.5"),
            )
        ),
    ),
    "DeepCluster (paper 004): initial alignment (NMI); test accuracy of a linear classifier, %": (
        _alignment_row(
            "MNIST, **initial alignment** of 100 LeNets, 9 clusters (NMI)", "0.409", "mnist", 60_000, 9
        ),
        _alignment_row(
            "Fashion-MNIST, **initial alignment** of 100 LeNets, 5 clusters",
            "0.37–0.41",
            "fashion_mnist",
            60_000,
            5,
        ),
        _alignment_row(
            "CIFAR-10, **initial alignment** of 100 AlexNets, 1,000 clusters⁵",
            "0.065–0.085",
            "cifar10",
            50_000,
            1000,
            sobel="random",
        ),
        _alignment_row(
            "… of 10 AlexNets above Sobel's filters⁵",
            "–",
            "cifar10",
            50_000,
            1000,
            " --sobel True --num-networks 10",
            networks=10,
            sobel=True,
        ),
        _deepcluster_row("Fashion-MNIST, DeepCluster, 50 cycles: probe on conv_2", "probe_accuracy"),
        _deepcluster_row("… of the untrained network", "random_probe_accuracy"),
        *(
            _deepcluster_row(
                what,
                metric,
                f" --num-train 10000 --cycles 20 --every-layer --num-clusters {clusters}",
                10_000,
                num_train=10_000,
                cycles=20,
                num_clusters=clusters,
            )
            for what, metric, clusters in (
                ("10,000 images of it, 20 cycles, 5 clusters: probe on conv_2", "probe_accuracy", 5),
                ("… 20 clusters", "probe_accuracy", 20),
                ("… 200 clusters", "probe_accuracy", 200),
                ("… untrained", "random_probe_accuracy", 5),
                ("… 5 clusters, probe on relu_2", "probe_accuracy_relu_2", 5),
                ("… 20 clusters, relu_2", "probe_accuracy_relu_2", 20),
                ("… 200 clusters, relu_2", "probe_accuracy_relu_2", 200),
                ("… untrained, relu_2", "random_probe_accuracy_relu_2", 5),
            )
        ),
        *(
            _deepcluster_row(
                f"… clusters of cycle {halt} kept to the end, {layer}",
                metric,
                f" --num-train 10000 --cycles 20 --every-layer --halt {halt}",
                10_000,
                num_train=10_000,
                cycles=20,
                halt=halt,
            )
            for layer, metric in (("conv_2", "probe_accuracy"), ("relu_2", "probe_accuracy_relu_2"))
            for halt in (1, 5)
        ),
        *(
            _deepcluster_row(what, metric, " --probe-every 4", 50_000, "cifar10", cycles=100)
            for what, metric in (
                ("CIFAR-10, DeepCluster, 1,000 clusters, 100 cycles: probe on relu_5", "probe_accuracy"),
                ("… after 8 cycles", "probe_accuracy_after_8"),
                ("… untrained", "random_probe_accuracy"),
            )
        ),
        *(
            _deepcluster_row(
                what,
                metric,
                " --cycles 8 --sobel True --kmeans scikit-learn",
                50_000,
                "cifar10",
                cycles=8,
                sobel=True,
                kmeans="scikit-learn",
            )
            for what, metric in (
                ("… above Sobel's filters⁵, scikit-learn's k-means, 8 cycles", "probe_accuracy"),
                ("… untrained", "random_probe_accuracy"),
            )
        ),
        *(
            _deepcluster_row(
                what,
                metric,
                f" --num-train 10000 --cycles 8 --num-clusters {clusters}",
                10_000,
                "cifar10",
                cycles=8,
                num_train=10_000,
                num_clusters=clusters,
            )
            for what, metric, clusters in (
                ("10,000 images of it, 8 cycles, 10 clusters", "probe_accuracy", 10),
                ("… 100 clusters", "probe_accuracy", 100),
                ("… 1,000 clusters", "probe_accuracy", 1000),
                ("… untrained", "random_probe_accuracy", 10),
            )
        ),
    ),
    "Your own images: clustering accuracy, %": (
        *(
            Row(
                what,
                "–",
                "cluster_images",
                metric,
                {"method": "energy", "num_clusters": [10], "image_size": 28},
                "fashion_mnist_png",
                10_000,
                "cluster_images --images FOLDER",
                "higher",
            )
            for what, metric in (
                (
                    "Fashion-MNIST's test images as PNG files, three seeds",
                    "clustering_accuracy",
                ),
                ("… k-means on the pixels", "pixels_clustering_accuracy"),
            )
        ),
    ),
}


# Of each paper the rows to see first, with what they are called there.
HEADLINES: Mapping[str, str] = {
    "**… pooled 2×2: the three-layer network**": "MNIST, three energy layers: clustering error, %",
    "**… three such networks side by side²**": "… three networks side by side, codes partly whitened²",
    "… searched on one half¹⁰, error on the other": (
        "bundled digits, searched on one half¹⁰: clustering error on the other, %"
    ),
    "CIFAR-10, Hebbian filters of 4×4 pixels": "CIFAR-10, Hebbian filters: test error, %",
    "USPS, pseudo supervision, 150 epochs (paper: 400)": (
        "USPS, ACOL, 150 epochs (paper: 400): clustering accuracy, %"
    ),
    "double spiral, **accuracy**": "double spiral, NMCE: clustering accuracy, %",
    "… 1,500 steps⁴": (
        "COIL-20, NMCE of a small ResNet at 32×32 pixels⁴ (paper's size: 0.0): clustering error, %"
    ),
    "Fashion-MNIST, **initial alignment** of 100 LeNets, 5 clusters": (
        "Fashion-MNIST, untrained LeNets: initial alignment (NMI)"
    ),
    "CIFAR-10, DeepCluster, 1,000 clusters, 100 cycles: probe on relu_5": (
        "CIFAR-10, DeepCluster, 100 cycles: accuracy of a linear classifier, %"
    ),
    "CIFAR-10, **initial alignment** of 100 AlexNets, 1,000 clusters⁵": (
        "CIFAR-10, untrained AlexNets⁵: initial alignment (NMI)"
    ),
}


def headline_table() -> str:
    """The rows to see first, and how many of all have been run."""
    rows = {row.what: row for section in ROWS.values() for row in section}
    table = results_table([rows[what]._replace(what=label) for what, label in HEADLINES.items()])
    published = [row for section in ROWS.values() for row in section if row.paper != "–"]
    run = sum(bool(_recorded(row)) for row in published)
    return (
        f"{table}\n\nOf the {len(published)} rows below that have a paper's number, {run} have been run, one "
        "of them shortened; most of the others, such as ACOL on all of MNIST and NMCE on CIFAR-10, want an "
        "accelerator."
    )


def results_tables() -> str:
    """README's results, a table for each of `ROWS` that opens on a click."""
    return "\n\n".join(
        f"<details><summary>{title}</summary>\n\n{results_table(rows)}\n\n</details>"
        for title, rows in ROWS.items()
    )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 60 else "< 1 min"


def results_table(rows: Sequence[Row]) -> str:
    """The table of some rows; those without a recorded run say so."""
    lines = []
    for row in rows:
        latest = _recorded(row)
        command = f"`{row.command}`"
        if not latest:
            lines.append((row.what, row.paper, "not yet run", "", "", "", command))
            continue
        values = [r["metrics"][row.metric] for r in latest.values()]
        number = f".{row.decimals}f"
        last = list(latest.values())[-1]
        spread = f" ± {stdev(values):{number}}" if len(values) > 1 else ""
        if row.spread and not spread:
            spread = f" ± {last['metrics'][row.spread]:{number}}"
        best = {"lower": min, "higher": max}.get(row.better)
        lines.append(
            (
                row.what,
                row.paper,
                f"{mean(values):{number}}{spread}",
                f"{best(values):{number}}" if best else "",
                ", ".join(map(str, sorted(latest))),
                f"{last['device']}, {_minutes(mean(r['seconds'] for r in latest.values()))}",
                command,
            )
        )
    header = ("", "paper", "ours, mean ± s.d.", "best", "seeds", "device, time a seed", "command")
    return format_table(header, lines)


def comparison_table() -> str:
    """The README's table of all methods on the bundled digits, from the last run of each seed."""
    path = runs.RESULTS / "compare.json"
    records = json.loads(path.read_text()) if path.exists() else []
    latest: dict[str, dict[int, dict[str, float]]] = {}
    for one in records:
        if one["dataset"]["name"] == "digits" and one["config"]["num_images"] is None:
            (method,) = one["config"]["methods"]
            latest.setdefault(method, {})[one["seed"]] = one["metrics"]
    return comparison({method: list(seeds.values()) for method, seeds in latest.items()})


_TABLES: Mapping[str, Callable[[], str]] = {
    "headlines": headline_table,
    "results": results_tables,
    "comparison": comparison_table,
}


def render_readme(text: str) -> str:
    """README text with the tables between their markers made anew."""
    for name, table in _TABLES.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}\n{table()}\n{end}{after}"
    return text


def _recorded(row: Row) -> dict[int, Any]:
    """The last record of each seed that belongs to a row."""
    path = runs.RESULTS / f"{row.experiment}.json"
    records = json.loads(path.read_text()) if path.exists() else []
    return {record["seed"]: record for record in records if _belongs(record, row)}


def _belongs(record: Mapping[str, Any], row: Row) -> bool:
    config = runs.ADDED_LATER | record["config"]
    return (
        record["dataset"]["name"] == row.dataset
        and record["dataset"]["num_train"] == row.num_train
        and row.metric in record["metrics"]
        and (not row.published or row.metric in record["paper"])
        and all(config.get(key) == value for key, value in row.where.items())
    )


if __name__ == "__main__":
    with atomic_path(README) as temporary_readme:
        temporary_readme.write_text(render_readme(README.read_text()))
