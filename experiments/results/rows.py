"""The rows of the results tables: which number of which command stands beside which number of a paper.

They are in `rows.csv`, by table; `Row` says what its columns are. A row's command says which recorded runs
are its own (`experiments.results.records`): the options it states, the defaults of the others, and where a
default depends on the data (None in the experiment's `Config`) what `FILLED` says. Superscripts in labels are
the notes below the tables in `experiments/results/README.md`.
"""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

ACCELERATOR = None  # in place of minutes: more than a day, or more memory than there is, on two cores


class Row(NamedTuple):
    """A row of a results table.

    Attributes:
      label: what stands in the first column.
      paper: the paper's number, "–" where it gives none.
      command: what makes ours, after `python -m experiments.`; the installed command `sul-jax` as it is.
      minutes: what a seed takes on two cores, or `ACCELERATOR`, which is left empty in the file.
      metric: name of the number in the records.
      better: "lower", "higher", or "" where no value is better than another.
      filled: what the experiment fills in where this row's command leaves an option to it, beyond `FILLED`;
        in the file `name=value`, the value in JSON.
      decimals: printed, 2 where the file says nothing.
      spread: the metric that is a single run's own spread, if there is one.
      published: only runs count for whose very options the run itself names the paper's number; what they
        fill in is then not compared. In the file "yes".
      headline: what README.md calls the row, if it shows it.

    Example:
      >>> from experiments.results.rows import TABLES
      >>> row = TABLES["000"][13]
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
    headline: str = ""


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


def _read() -> Mapping[str, tuple[Row, ...]]:
    tables: dict[str, tuple[Row, ...]] = {}
    with open(Path(__file__).with_name("rows.csv"), encoding="utf-8", newline="") as file:
        for cells in csv.DictReader(file):
            pairs = [pair.split("=", 1) for pair in cells["filled"].split()]
            row = Row(
                cells["label"],
                cells["paper"],
                cells["command"],
                float(cells["minutes"]) if cells["minutes"] else ACCELERATOR,
                cells["metric"],
                cells["better"],
                {name: json.loads(value) for name, value in pairs},
                int(cells["decimals"] or 2),
                cells["spread"],
                cells["published"] == "yes",
                cells["headline"],
            )
            tables[cells["table"]] = (*tables.get(cells["table"], ()), row)
    return tables


# By paper; below each table in experiments/results/README.md are its notes.
TABLES = _read()
