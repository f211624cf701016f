"""Guards: a few steps of every training give the very numbers in guards.json.

They prove that code which was moved or rewritten still computes the same. Every experiment and every
estimator learns for moments from stripes drawn here, and what it learned is compared with what an earlier
commit learned: bit for bit on a machine like the one that wrote the numbers (see `_machine`), elsewhere by
the mean and the standard deviation of the weights. K-Subspaces, where a rounding error moves a patch to
another subspace, are only compared bit for bit.

`python -m pytest -m guard` runs them, which takes minutes; without it they are left out.
`python tests/test_guards.py --write` writes the numbers anew; `--write -k NAME` only some of them. Do that
where results are meant to change, and name the change in the commit; never to make a refactoring pass.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import matplotlib.figure
import numpy as np
import pytest
import sklearn.manifold
from flax import nnx

from experiments import (
    acol_pseudo,
    cifar10_hebbian,
    deepcluster,
    deepcluster_alignment,
    mnist_energy,
    mnist_hebbian,
    nmce_coil,
    nmce_images,
    nmce_manifolds,
    nmce_spiral,
    tune_energy,
)
from sul_jax import energy, estimators
from sul_jax.nn import backbones

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "guards.json"
_WRITE = "SUL_JAX_WRITE_GUARDS"
_RTOL = 2e-2


class Case(NamedTuple):
    """What is run: an experiment's module or an estimator's class, and its options.

    Paths among the options are files of the folder that `_fill` fills; of several `random_state`s the
    estimators are fitted together.
    """

    what: ModuleType | type
    options: dict[str, Any]
    by_subspaces: bool = False


_LAYERS = (energy.EnergyLayer(6, 2, 2, 5, 1), energy.EnergyLayer(5, 3, 1, 3, 0))
_ONE, _TWO = energy.EnergyArchitecture(3, 4, _LAYERS[:1]), energy.EnergyArchitecture(3, 4, _LAYERS)
_GRAY, _COLOUR = {"dataset": Path("gray.npz")}, {"dataset": Path("colour.npz")}
_ENERGY = _GRAY | {
    "architecture": Path("two.json"), "batch_size": 24, "passes": 2, "warmup_steps": 2,
    "num_train_evaluated": 40,
}  # fmt: skip
_ACOL = _GRAY | {
    "num_train": 48, "num_test": 48, "batch_size": 24, "epochs": 2, "num_features": 16, "num_filters": 4,
    "nodes_per_parent": 3,
}  # fmt: skip
_MLP = {"steps": 20, "batch_size": 32, "hidden_size": 16, "num_layers": 2, "num_test": 100}
_RESNET = {"image_size": 12, "depth": 10, "num_filters": 4, "num_pre_features": 16, "num_features": 8}
_DEEP = _GRAY | {
    "num_train": 48, "num_test": 48, "cycles": 2, "batch_size": 24, "num_clusters": 4, "probe_epochs": 2,
}  # fmt: skip
_HEBBIAN = {
    "num_units": 12, "filter_steps": 20, "patch_batch": 50, "epochs": 4, "probe_every": 2, "batch_size": 24,
    "learning_rate": 0.02,
}  # fmt: skip
_ESTIMATOR = {"n_clusters": 4, "image_size": 12, "random_state": 0}
_STEPS = _ESTIMATOR | {"batch_size": 24, "max_steps": 4}
_NMCE = _STEPS | {"num_filters": 2, "num_features": 4}
_DEEP_ESTIMATOR = {"n_clusters": 4, "cycles": 2, "steps_per_cycle": 2, "batch_size": 24, "random_state": 0}

CASES = {
    "mnist_energy": Case(mnist_energy, _ENERGY, True),
    "mnist_energy_networks": Case(mnist_energy, _ENERGY | {"networks": 2, "code_whitening": 0.3}, True),
    "mnist_energy_together": Case(mnist_energy, _ENERGY | {"seeds": 2, "seeds_together": 2}, True),
    "mnist_energy_random": Case(mnist_energy, _ENERGY | {"random_subspaces": True}, True),
    "mnist_energy_devices": Case(mnist_energy, _ENERGY | {"devices": 2}, True),
    "tune_energy": Case(
        tune_energy,
        _GRAY | {
            "start_from": Path("one.json"), "num_layers": 1, "num_images": 48, "batch_size": 24,
            "passes": 1, "trials": 2, "max_mflop": 2.0, "finalists": 1, "finalist_seeds": 1,
        },
        True,
    ),
    "acol_pseudo": Case(acol_pseudo, _ACOL),
    "acol_pseudo_parents": Case(acol_pseudo, _ACOL | {"supervision": "parents", "decay_epochs": 1}),
    "acol_pseudo_together": Case(acol_pseudo, _ACOL | {"seeds": 2, "seeds_together": 2}),
    "nmce_spiral": Case(nmce_spiral, _MLP),
    "nmce_manifolds": Case(nmce_manifolds, _MLP | {"tcr_steps": 10}),
    "nmce_coil": Case(nmce_coil, _GRAY | _RESNET | {"num_images": 24, "steps": 3}),
    "nmce_images": Case(
        nmce_images,
        _COLOUR | _RESNET | {"num_images": 48, "batch_size": 24, "epochs": (1, 1, 1), "num_views": 2},
    ),
    "deepcluster": Case(deepcluster, _DEEP),
    "deepcluster_halting": Case(deepcluster, _DEEP | {"halt": 1, "fresh_head": False}),
    "deepcluster_together": Case(deepcluster, _DEEP | {"seeds": 2, "seeds_together": 2}),
    "deepcluster_alexnet": Case(
        deepcluster, _DEEP | _COLOUR | {"architecture": "alexnet", "num_components": 5}
    ),
    "deepcluster_alignment": Case(deepcluster_alignment, _GRAY | {"num_networks": 3, "num_train": 48}),
    "cifar10_hebbian": Case(cifar10_hebbian, _COLOUR | _HEBBIAN),
    "cifar10_hebbian_powers": Case(
        cifar10_hebbian, _COLOUR | _HEBBIAN | {"powers": (10.0, 30.0), "num_validation": 24}
    ),
    "cifar10_hebbian_relu": Case(cifar10_hebbian, _COLOUR | _HEBBIAN | {"response": "relu"}),
    "cifar10_hebbian_photographs": Case(cifar10_hebbian, _HEBBIAN | {"dataset": "photographs"}),
    "mnist_hebbian": Case(mnist_hebbian, _GRAY | _HEBBIAN),
    "PixelClustering": Case(estimators.PixelClustering, _ESTIMATOR),
    "EnergyClustering": Case(estimators.EnergyClustering, _STEPS | {"architecture": _TWO}, True),
    "ACOLClustering": Case(
        estimators.ACOLClustering, _STEPS | {"num_filters": 2, "num_features": 8, "nodes_per_parent": 2}
    ),
    "NMCEClustering": Case(estimators.NMCEClustering, _NMCE),
    "DeepClustering": Case(estimators.DeepClustering, _DEEP_ESTIMATOR),
    "fit_together_nmce": Case(estimators.NMCEClustering, _NMCE | {"random_state": (0, 1)}),
    "fit_together_deep": Case(estimators.DeepClustering, _DEEP_ESTIMATOR | {"random_state": (0, 1)}),
}  # fmt: skip


@pytest.mark.guard
@pytest.mark.parametrize("name", CASES)
def test_nothing_has_changed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (energy, mnist_energy):  # an installed package would guard nothing
        assert Path(module.__file__).is_relative_to(ROOT), "run `python -m pytest` in the checkout"
    machine, case = _machine(), CASES[name]
    stored = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"machine": None, "cases": {}}
    same, writing = stored["machine"] == machine, _WRITE in os.environ
    if case.by_subspaces and not same and not writing:
        pytest.skip(f"K-Subspaces take their own course on another machine than {stored['machine']}")
    # A ResNet of one block in place of four; pictures take longer than learning.
    monkeypatch.setitem(backbones.RESNET_BLOCKS, 10, (1,))
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda _, path, **__: Path(path).touch())
    monkeypatch.setattr(sklearn.manifold.TSNE, "fit_transform", lambda _, codes: codes[:, :2])
    _fill(tmp_path)
    found = _learned(case, tmp_path)
    if writing:
        cases = {k: v for k, v in stored["cases"].items() if same and k in CASES} | {name: found}
        text = json.dumps({"machine": machine, "cases": {k: cases[k] for k in CASES if k in cases}}, indent=1)
        GOLDEN.write_text(text + "\n")
    elif same:
        assert found == stored["cases"][name]
    else:
        warnings.warn(f"{name}: another machine, only summaries are compared", stacklevel=1)
        expected = stored["cases"][name]["summary"]
        assert found["summary"].keys() == expected.keys()
        for shape, (number, mean, deviation) in expected.items():
            other = found["summary"][shape]
            assert other[0] == number, shape
            scale = _RTOL * (abs(mean) + deviation) + 1e-6
            np.testing.assert_allclose(other[1:], [mean, deviation], rtol=0, atol=scale, err_msg=shape)


def _machine() -> dict[str, Any]:
    """What the bits of a result depend on, beside the code."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "scikit-learn", "optuna")
    return {
        "platform": f"{platform.system()} {platform.machine()} {jax.default_backend()}",
        "cpu": next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), ""),
        "cores": os.cpu_count(),
        "devices": jax.device_count(),
        "flags": os.environ.get("XLA_FLAGS", ""),
        "optimized": not jax.config.values["jax_disable_most_optimizations"],
        **{package: importlib.metadata.version(package) for package in packages},
    }


def _fill(folder: Path) -> None:
    """Writes the data: stripes that lie or stand, narrow or wide; and two architectures."""
    rng = np.random.default_rng(0)
    labels = np.arange(96) % 4
    phase, colour = rng.random((96, 1, 1, 1)) * 6, rng.random((96, 1, 1, 3)) * 0.5 + 0.5
    rows, columns = np.arange(16)[None, :, None, None], np.arange(16)[None, None, :, None]
    of_class = labels[:, None, None, None]
    along = np.where(of_class % 2 == 0, rows, columns) * np.where(of_class < 2, 1.6, 0.8)
    images = (np.sin(along + phase) + 1) / 2 * colour * 200 + rng.random((96, 16, 16, 3)) * 55
    np.savez(folder / "colour.npz", images=images.astype(np.uint8), labels=labels)
    np.savez(folder / "gray.npz", images=images.mean(axis=-1).astype(np.uint8), labels=labels)
    for name, architecture in (("one", _ONE), ("two", _TWO)):
        stored = {"architecture": architecture.to_dict(), "options": {}, "study": {}}
        (folder / f"{name}.json").write_text(json.dumps(stored))


def _learned(case: Case, folder: Path) -> dict[str, Any]:
    """Runs a case; what is compared of it."""
    if isinstance(case.what, ModuleType):
        options = {k: str(folder / v) if isinstance(v, Path) else v for k, v in case.options.items()}
        results = case.what.run(case.what.Config(**options, workdir=folder / "run"))
        if case.what is tune_energy:
            errors = [np.array([error, *own]) for _, error, own in results.table]
            found = {"error": results.error, "architecture": results.named.architecture.to_dict()}
            return _described([errors], [found])
        leaves = [jax.tree.leaves(_arrays(result.network)) for result in results]
        return _described(leaves, [result.metrics for result in results])
    images = np.load(folder / "colour.npz")["images"]
    seeds = case.options["random_state"]
    options = {k: v for k, v in case.options.items() if k != "random_state"}
    models = [case.what(**options, random_state=s) for s in (seeds if isinstance(seeds, tuple) else [seeds])]
    if len(models) > 1:
        list(estimators.fit_together(models, images))
    else:
        models[0].fit(images)
    labels = [model.labels_ for model in models]
    return _described([[model.transform(images)] for model in models], [], labels)


def _arrays(network: Any) -> Any:
    return nnx.state(network) if isinstance(network, nnx.Module) else network


def _described(
    seeds: Sequence[Sequence[Any]], metrics: Sequence[dict[str, Any]], labels: Sequence[np.ndarray] = ()
) -> dict[str, Any]:
    """Of the arrays of each seed, in whatever order, and its metrics but for times and memory."""
    plain = [[_plain(leaf) for leaf in leaves] for leaves in seeds]
    by_shape: dict[tuple[int, ...], list[np.ndarray]] = {}
    for leaf in (leaf for leaves in plain for leaf in leaves):
        by_shape.setdefault(leaf.shape, []).append(leaf.astype(np.float64))
    summary = {
        "x".join(map(str, shape)): [len(own), *(float(f"{f(own):.6g}") for f in (np.mean, np.std))]
        for shape, own in sorted(by_shape.items())
    }
    kept = [{k: v for k, v in m.items() if "seconds" not in k and "peak" not in k} for m in metrics]
    found = {
        "hash": _hash(leaf for leaves in plain for leaf in sorted(leaves, key=_order)),
        "summary": summary,
        "metrics": kept,
        "labels_hash": _hash(np.asarray(own, np.int64) for own in labels) if len(labels) else None,
    }
    return json.loads(json.dumps(found))  # so that it compares equal to what is read back


def _plain(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _order(leaf: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return leaf.shape, leaf.tobytes()


def _hash(arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"]:
        raise SystemExit(__doc__)
    # As the tests run: conftest.py sets up jax before it starts, and the packages are this checkout's.
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-n", "0", "-m", "guard", *sys.argv[2:]]
    raise SystemExit(subprocess.call(command, cwd=ROOT, env={**os.environ, _WRITE: "1"}))
