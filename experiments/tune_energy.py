"""Searches the sizes of an energy network with few labels or many (paper 000, sections 5 and 6).

    python -m experiments.tune_energy                        # MNIST if available, else the bundled digits
    python -m experiments.tune_energy --resume               # go on, or join from another terminal
    python -m experiments.tune_energy --num-labels 100 --num-layers 2 --trials 100 --workdir runs/labels100
    python -m experiments.tune_energy --storage postgresql://… --study mnist --resume    # from many machines

Optuna proposes whitening and layers, a network learns without labels, k-means clusters all its codes, and the
clusters are compared with the labels of some training images. Test labels are never seen. The paper took
2,000 trials on all 60,000 images and labels, 20 hours on 8 GPUs. Here a trial learns from a part of the
images (on a CPU 5,000). It is stopped early if its error after a quarter of them is worse than the median,
and it is not started if it would cost more than `--max-mflop` or not fit into memory. The best few trials are
learned again from new seeds; `mnist_energy --architecture` takes the winner.

A search by one worker and without a break is reproducible. A search that was resumed or joined is not: the
seed fixes only the proposals of the worker that started the study, up to its first break.
"""

import contextlib
import functools
import gc
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optuna
from jax import Array
from optuna.trial import TrialState
from tqdm import tqdm

from experiments import data
from experiments.common import architectures, energy_space, evaluation, figures, studies
from experiments.common.energy_space import PRESETS, Space
from experiments.common.options import CommandOptions, ConfigError, check_options, command_line
from experiments.common.runs import Outcome, device_name, identity, make_workdir, record, recorded, write_json
from sul_jax import energy, metrics, training, whitening
from sul_jax._check import check_integer
from sul_jax.cli.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Range
from sul_jax.energy import EnergyArchitecture
from sul_jax.seeds import over_seeds

EXPERIMENT = "tune_energy"
# Proposals in a row that are too large.
_MAX_NOT_BEGUN = 200
# Trials whose compiled programs are held: each has memory maps, of which a process may have 65,530.
_FORGET_AFTER = 25
# Options that a worker may choose for itself; all others that are recorded are the study's.
_WORKERS_OWN = ("start_from", "trials", "finalists", "finalist_seeds", "memory_gib", "max_mflop")
_COMPILE_EVENTS = {
    f"/jax/core/compile/{name}_duration"
    for name in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")
}


@dataclass(frozen=True, kw_only=True)
class Config(CommandOptions):
    """Options of the search."""

    dataset: str = "auto"
    """mnist, fashion_mnist, digits, FILE.npz, or auto: MNIST if available, else the bundled digits. Of the
    digits, or of a file, only the first half of the images is used."""
    workdir: Path = Path("runs/tune_energy")
    """Where the study, its plots and the best architecture are written."""
    num_layers: Annotated[int, Range(1, 4)] = 3
    """Energy layers, 1 to 4."""
    preset: Literal["full", "no_zca", "no_rescale", "neither", "rank_one", "random_subspaces"] = "full"
    """What to search: the whole space, or one of the ablations of table 5."""
    trials: PositiveInt = 50
    """All trials of the study, including those of other workers and of earlier runs; each worker may finish
    one more. Proposals that are too large to start do not count."""
    num_images: PositiveInt | None = None
    """Training images of a trial; by default 5,000 on a CPU and all on an accelerator."""
    num_labels: PositiveInt | None = None
    """Labelled images, equally many of each class if possible. All images are clustered; the search minimises
    the error on these ones. By default all images of a trial."""
    batch_size: PositiveInt | None = None
    """Images in a minibatch; by default the paper's 512, or 128 below 10,000 images."""
    passes: PositiveInt | None = None
    """Passes over the images for each layer; by default 1, or 3 below 2,500 images."""
    code_power: PositiveFloat = 1.0
    """Power of the pooled codes before clustering; 0.5 takes the square root."""
    networks: PositiveInt = 1
    """Networks whose codes are put side by side, as in mnist_energy."""
    seeds_per_trial: PositiveInt = 1
    """Repetitions of a trial, trained together; the error is their mean."""
    first_share: Annotated[float, Range(0, 1, open=True)] = 0.25
    """Share of a trial's images after which it is first judged; with 1, no trial is stopped early."""
    finalists: PositiveInt = 3
    """Best trials that are learned again from new seeds at the end."""
    finalist_seeds: NonNegativeInt = 3
    """New seeds for each of the finalists."""
    start_from: str | None = None
    """Begin with this architecture of `num_layers` layers: a name that mnist_energy takes, or FILE.json."""
    max_mflop: PositiveFloat = 400.0
    """Limit in million floating-point operations for the codes of one image; a larger proposal is not
    started. The paper's networks of 1 to 4 layers take 17, 633, 393 and 1,680."""
    memory_gib: PositiveFloat | None = None
    """Limit of memory for a trial's codes; a larger proposal is not started. By default 4, or half of an
    accelerator's memory."""
    storage: str | None = None
    """Where the study is stored: any Optuna URL, such as sqlite:///study.db; by default a journal file in the
    workdir."""
    study: str = "tune_energy"
    """Name of the study in the storage."""
    save_as: str | None = None
    """Also put the best architecture into experiments/common/architectures.json under this name."""


@dataclass(frozen=True, kw_only=True)
class Filled(Config):
    """The options with nothing left open."""

    num_images: int
    num_labels: int
    batch_size: int
    passes: int
    memory_gib: float


class SearchResult(NamedTuple):
    """What a search gave.

    Attributes:
      named: the winner.
      error: its mean clustering error on the labelled training images, over the finalists' seeds, in percent.
      table: each finalist's trial number, error in the search, and errors of its fresh seeds.
    """

    named: architectures.Named
    error: float
    table: list[tuple[int, float, list[float]]]


class Search(NamedTuple):
    """The data of a study and what every trial of it shares."""

    given: Config
    config: Filled
    dataset: data.Dataset
    images: Array  # [num_images, height, width, channels] in [0, 1], shuffled
    labels: np.ndarray  # of the first of them
    num_clusters: int

    @property
    def space(self) -> Space:
        """Of the proposals."""
        config = self.config
        return Space(config.preset, config.num_layers, self.images.shape[1:], config.batch_size)

    @property
    def num_batches(self) -> int:
        """Minibatches of a pass over all images."""
        return len(self.images) // self.config.batch_size

    def cost(self, architecture: EnergyArchitecture) -> tuple[float, float]:
        """Million operations for the codes of an image, and GiB that a trial holds."""
        config = self.config
        mflop, gib = energy_space.cost(architecture, self.space.shape, num_images=config.num_images)
        return mflop, config.seeds_per_trial * config.networks * gib

    def too_large(self, mflop: float, gib: float) -> str:
        """Why networks of this cost are not begun, if so."""
        if mflop > self.config.max_mflop:
            return f"{mflop:.0f} million operations an image"
        return f"{gib:.1f} GiB of codes" if gib > self.config.memory_gib else ""


def run(config: Config) -> SearchResult:
    """Searches; see the module's docstring.

    Args:
      config: the options.

    Raises:
      ValueError: options or data that cannot be used, or a study of other options.
    """
    check_options(config)
    if config.save_as is not None:
        architectures.check_new_name(config.save_as)
    _share_compiled_programs()
    dataset = data.load(config.dataset, config.data_dir)
    search = _prepare(config, dataset)
    filled, first = search.config, _first(search)
    make_workdir(filled.workdir)
    settings = recorded(filled) | {"seed": filled.seed, "data": identity(np.asarray(search.images))}
    settings["space"] = energy_space.VERSION
    # Through JSON, so that they compare equal to what is read back.
    settings = json.loads(json.dumps({k: v for k, v in settings.items() if k not in _WORKERS_OWN}))
    study = studies.open_study(filled, settings, first)
    number, labelled = len(search.images), len(search.labels)
    print(f"{dataset.name}: {number} training images, {labelled} of them labelled ({dataset.source})")
    began = time.perf_counter()
    _search(study, search)
    studies.wait_for_others(study)  # so that the finalists are chosen from all trials
    costs = _study_cost(study)
    draw(study, filled.workdir)
    result = _finish(study, search)
    table = [dict(zip(("trial", "error", "errors"), row, strict=True)) for row in result.table]
    write_json(filled.workdir / "results.json", {"settings": settings, "finalists": table, "cost": costs})
    if filled.record:
        values = {"train_clustering_error": round(result.error, 4), **costs}
        seconds = time.perf_counter() - began
        outcome = Outcome(values, dataset, number, labelled, seconds)
        record(EXPERIMENT, filled, filled.seed, outcome)
    return result


def _first(search: Search) -> dict[str, float] | None:
    """The parameters of the architecture to begin with, if one is given."""
    given = search.config.start_from
    if given is None:
        return None
    architecture = architectures.get(given).architecture
    try:
        parameters = search.space.parameters(architecture)
    except optuna.TrialPruned as outside:
        raise ConfigError(f"start_from={given!r} {outside}") from None
    if reason := search.too_large(*search.cost(architecture)):
        raise ConfigError(f"start_from={given!r} takes {reason}; raise --max-mflop or --memory-gib")
    return parameters


def _share_compiled_programs() -> None:
    """Between workers, and between a trial and a finalist."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(data.cache_dir() / "compiled"))
        jax.config.update("jax_compilation_cache_max_size", 2**30)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _prepare(config: Config, dataset: data.Dataset) -> Search:
    """The defaults that depend on the data, and the images and labels that trials use."""
    if dataset.train_labels is None:
        raise ConfigError(f"dataset={config.dataset!r} has no labels, but the search needs some")
    available = len(dataset.train_images)
    if dataset.is_one_set:
        available //= 2  # the other half is for the test
    accelerator = jax.default_backend() != "cpu"
    number = config.num_images or (available if accelerator else min(5000, available))
    batch_size = config.batch_size or min(128 if number < 10_000 else 512, number)
    every, classes = (len(np.unique(dataset.train_labels[:end])) for end in (None, available))
    num_labels = config.num_labels or number
    check_integer("num_images", number, low=1, high=available, why=", the number of images to search on")
    check_integer("batch_size", batch_size, low=1, high=number, why=", the number of training images")
    check_integer("num_labels", num_labels, low=classes, high=number, why=": some of each class")
    if classes < every:
        raise ConfigError(
            f"dataset={config.dataset!r}: its first {available} images hold only {classes} of the "
            f"{every} classes; shuffle them (the other half is for the test)"
        )
    order = np.random.default_rng(config.seed).permutation(available)[: number // batch_size * batch_size]
    num_labels = min(num_labels, len(order))  # those of whole minibatches
    if num_labels < len(order):  # the labelled images come first
        first = _of_every_class(dataset.train_labels[order])[:num_labels]
        order = np.concatenate([order[first], np.delete(order, first)])
    images = evaluation.to_float(jnp.asarray(dataset.train_images[order]))
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 8 * 2**30) / 2**30
    defaults = {
        "dataset": dataset.name,
        "num_images": number,
        "num_labels": num_labels,
        "batch_size": batch_size,
        "passes": config.passes or (3 if number < 2500 else 1),
        "memory_gib": config.memory_gib or (limit / 2 if accelerator else 4.0),
    }

    labels = dataset.train_labels[order[:num_labels]]
    return Search(config, Filled(**{**vars(config), **defaults}), dataset, images, labels, classes)


@partial(jax.jit, static_argnums=(1, 2))
def _whiten(images: Array, kernel_size: int, num_components: int) -> Array:
    kernel = whitening.conv_zca_kernel(images, kernel_size=kernel_size, num_components=num_components)
    return whitening.conv_zca(images, kernel)


def _of_every_class(labels: np.ndarray) -> np.ndarray:
    """Indices: the first image of each class, the second of each, and so on."""
    turn = np.empty(len(labels), int)
    for label in np.unique(labels):
        own = labels == label
        turn[own] = np.arange(own.sum())
    return np.argsort(turn, kind="stable")


def _search(study: optuna.Study, search: Search) -> None:
    """Runs trials until the study has enough of them."""
    trials, own = search.config.trials, list[dict[str, Any]]()
    with tqdm(total=trials, desc="search", unit="trial") as bar:
        while True:
            # Of trials that were stopped early Optuna keeps the early error as their value.
            errors = [trial.value for trial in _completed(study)]
            number = _num_begun(study)
            bar.n = min(number, trials)
            bar.set_postfix_str(f"best error {min(errors):.2f} %" if errors else "")
            if number >= trials:
                return
            judge, note = partial(_judge, search), lambda _, trial: own.append(trial.user_attrs)
            study.optimize(judge, n_trials=1, callbacks=[note])
            begun = ["error_first" in attributes for attributes in own]
            if len(begun) >= _MAX_NOT_BEGUN and not any(begun[-_MAX_NOT_BEGUN:]):
                last = own[-1]["reason"]
                raise ConfigError(
                    f"{_MAX_NOT_BEGUN} proposals in a row could not be started (the last: {last}); raise "
                    "--max-mflop or --memory-gib"
                )
            if begun[-1] and sum(begun) % _FORGET_AFTER == 0:
                jax.clear_caches()
                gc.collect()


def _completed(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _num_begun(study: optuna.Study) -> int:
    """Trials that have ended, but for those that were too large to be begun."""
    trials = study.get_trials(deepcopy=False)
    return sum("error_first" in trial.user_attrs and trial.state.is_finished() for trial in trials)


def _judge(search: Search, trial: optuna.Trial) -> float:
    """The objective, with what is noted of every trial; one that fits into no memory is stopped."""
    studies.name_worker(trial)
    try:
        with _timed(trial):
            return _objective(trial, search)
    except optuna.TrialPruned as pruned:
        trial.set_user_attr("reason", str(pruned))
        raise
    except BaseException as failure:
        reason = f"{type(failure).__name__}: {failure}"[:500]
        trial.set_user_attr("reason", reason)
        if not (isinstance(failure, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in reason):
            raise
        tqdm.write(f"trial {trial.number} failed: {reason}")
        raise optuna.TrialPruned(reason) from None


@functools.cache
def _compiling() -> list[float]:
    """Seconds that jax spends tracing, lowering and compiling, from the first call on: a list of one."""
    total = [0.0]

    def add(event: str, duration_secs: float, **_: str | int) -> None:
        total[0] += duration_secs if event in _COMPILE_EVENTS else 0

    jax.monitoring.register_event_duration_secs_listener(add)  # jax 0.7 has no way to take it back
    return total


@contextlib.contextmanager
def _timed(trial: optuna.Trial) -> Iterator[None]:
    """Notes what a trial takes, and how much of it is compiling."""
    began, (before,) = time.perf_counter(), _compiling()
    try:
        yield
    finally:
        trial.set_user_attr("seconds", time.perf_counter() - began)
        trial.set_user_attr("compile_seconds", _compiling()[0] - before)


def _objective(trial: optuna.Trial, search: Search) -> float:
    """Clustering error of a proposal in percent; raises `TrialPruned` with the reason."""
    config, total = search.config, search.num_batches
    architecture = search.space.propose(trial)
    sizes = json.dumps(architecture.to_dict())
    trial.set_user_attr("architecture", sizes)
    for other in trial.study.get_trials(deepcopy=False):
        same = other.user_attrs.get("architecture") == sizes
        if other.number < trial.number and same and other.state != TrialState.FAIL:
            raise optuna.TrialPruned(f"the same as trial {other.number}")
    mflop, gib = search.cost(architecture)
    trial.set_user_attr("mflop", round(mflop, 2))
    # Without it refused proposals would be the sampler's model of good ones until some trial has ended.
    trial.set_constraint("mflop", mflop - config.max_mflop)
    trial.set_constraint("gib", gib - config.memory_gib)
    if reason := search.too_large(mflop, gib):
        raise optuna.TrialPruned(reason)
    learner = Learner(architecture, search)
    seeds = [config.seed + 1000 * trial.number + i for i in range(config.seeds_per_trial)]
    first = max(1, round(config.first_share * total))
    error = float(np.mean(learner.errors(seeds, first)))
    trial.set_user_attr("error_first", error)
    if first < total:
        trial.report(error, first)
        if trial.should_prune():
            raise optuna.TrialPruned(f"an error of {error:.1f} % after {first} of {total} minibatches")
        error = float(np.mean(learner.errors(seeds, total)))
    trial.set_user_attr("error", error)
    return error


class Learner:
    """Learns networks of one architecture; compiled once for all budgets and seeds."""

    def __init__(self, architecture: EnergyArchitecture, search: Search):
        config, preset = search.config, PRESETS[search.config.preset]
        random = preset.get("random_subspaces", False)
        _, *rules = energy.network_rules(
            architecture, rescale=preset.get("rescale", True), random_subspaces=random
        )
        kernel, components = architecture.zca_kernel_size, architecture.zca_num_components
        self._search = search
        self._images = _whiten(search.images, kernel, components) if components > 1 else search.images
        self._passes = 0 if random else config.passes
        self._layers = [
            (rule, training.LayerPrograms([rule]), jax.jit(over_seeds(rule.encode))) for rule in rules
        ]

        def pooled(maps: Array) -> Array:
            codes = energy.pooled_codes(maps, power=config.code_power)
            # Features of zeros change no distance, and one compiled k-means serves every trial.
            return jnp.pad(codes, ((0, 0), (0, 4 * energy_space.MAX_SUBSPACES - codes.shape[1])))

        self._pooled = jax.jit(jax.vmap(pooled))

    def errors(self, seeds: Sequence[int], num_batches: int) -> list[float]:
        """Clustering error on the labelled images, of each seed, after so many minibatches."""
        search, networks = self._search, self._search.config.networks
        keys = jnp.stack([k for seed in seeds for k in jax.random.split(jax.random.key(seed), networks)])
        seen = num_batches * search.config.batch_size
        labels, errors = search.labels[:seen], []
        every = jnp.split(self._codes(keys, num_batches), len(seeds))
        for seed, codes in zip(seeds, every, strict=True):
            key, side_by_side = jax.random.key(seed), codes.swapaxes(0, 1)
            clustering = evaluation.cluster(key, side_by_side, None, num_clusters=search.num_clusters)
            errors.append(100 * metrics.clustering_error(labels, clustering.labels[: len(labels)]))
        return errors

    def _codes(self, keys: Array, num_batches: int) -> Array:
        """Pooled codes `[networks, images, codes]` of the images of so many minibatches, of each key.

        Each layer encodes the images once; the codes are held.
        """
        # Minibatches `[networks, batch, ...]`; all networks see the same images.
        batches = [
            jnp.broadcast_to(part, (len(keys), *part.shape))
            for part in jnp.split(self._images[: num_batches * self._search.config.batch_size], num_batches)
        ]
        steps = self._passes * num_batches
        # The paper's ten steps, but not all there are where a trial is judged early.
        warmup = min(10, steps // 2)

        def keywords(steps: np.ndarray) -> dict[str, np.ndarray]:
            return {"warmup": steps < warmup}

        layer_keys = jax.vmap(lambda key: jax.random.split(key, len(self._layers)))(keys)
        for index, (rule, programs, encode) in enumerate(self._layers):
            plan = training.LayerTraining(partial(_turn, batches), steps, layer_keys[:, index])
            (state,) = training.train_layers(
                [rule], (), [plan].__getitem__, hyperparameters=keywords, programs=programs
            )
            batches = [encode(state, batch) for batch in batches]
        return jnp.concatenate([self._pooled(batch) for batch in batches], axis=1)


def _turn(batches: Sequence[Array], first: int, end: int) -> Array:
    """Minibatches one after the other, again and again."""
    return jnp.stack([batches[index % len(batches)] for index in range(first, end)])


def _finish(study: optuna.Study, search: Search) -> SearchResult:
    """Learns the best trials again from fresh seeds, and saves the winner."""
    config = search.config
    learned = []
    for value, number, architecture in tqdm(_best(study, search), desc="finalists", unit="trial"):
        learner, fresh = Learner(architecture, search), 2**30 + config.seed
        # One after the other: together they might not fit.
        seeds = range(fresh, fresh + config.finalist_seeds)
        errors = [learner.errors([seed], search.num_batches)[0] for seed in seeds]
        mean = float(np.mean(errors or [value]))
        learned.append((mean, number, value, errors, architecture))
        words = ", ".join(f"{error:.2f}" for error in errors)
        tqdm.write(f"trial {number}: error {value:.2f} % in the search, from new seeds {words or 'none'}")
    error, winner, *_, architecture = min(learned, key=lambda one: one[:2])
    print(f"\nthe best, with {error:.2f} %: {architecture}")
    about = {"trials": _num_begun(study), "trial": winner, "train_clustering_error": round(error, 4)}
    named = _named(architecture, search, **about)
    name = config.save_as or str(config.workdir / "best.json")
    architectures.save(config.workdir / "best.json", named)
    if config.save_as is not None:
        architectures.save_as(config.save_as, named)
    print(f"for mnist_energy: --architecture {name}")
    return SearchResult(named, error, [one[1:4] for one in learned])


def _best(study: optuna.Study, search: Search) -> list[tuple[float, int, EnergyArchitecture]]:
    """Error, number and architecture of the best trials, of those that fit into this machine's memory."""
    config, best = search.config, []
    for trial in sorted(_completed(study), key=lambda trial: (trial.value, trial.number)):
        architecture = search.space.propose(optuna.trial.FixedTrial(trial.params))
        if search.cost(architecture)[1] <= config.memory_gib:
            best.append((trial.value, trial.number, architecture))
    if not best:
        raise ConfigError("no trial finished within the limits; raise --trials, --max-mflop or --memory-gib")
    return best[: config.finalists]


def _named(architecture: EnergyArchitecture, search: Search, **outcome: float) -> architectures.Named:
    """An architecture with what `mnist_energy` must know of its search."""
    config, dataset, preset = search.config, search.dataset, PRESETS[search.config.preset]
    options = {name: preset[name] for name in ("rescale", "random_subspaces") if name in preset}
    options |= {"networks": config.networks, "code_power": config.code_power}
    # Of the default for a part of the images, nothing follows for all of them.
    given = {name: getattr(search.given, name) for name in ("batch_size", "passes")}
    options |= {name: value for name, value in given.items() if value is not None}
    names = ("num_images", "num_labels", "preset", "start_from", "max_mflop", "seed")
    about = {
        "dataset": dataset.name,
        # Of data that come as one set: the first, whose labels the search has seen.
        "searched": len(dataset.train_images) // 2 if dataset.is_one_set else None,
        "crc32": identity(dataset.train_images)["crc32"],
        "device": device_name(),
        "jax": jax.__version__,
    }
    about |= {name: getattr(config, name) for name in names}
    return architectures.Named(architecture, options, about | outcome)


def _study_cost(study: optuna.Study) -> dict[str, float]:
    """What the trials of all workers took; also printed."""
    every = [trial.user_attrs for trial in study.get_trials(deepcopy=False)]
    begun = [attributes for attributes in every if {"error_first", "seconds"} <= attributes.keys()]
    seconds = sum(attributes["seconds"] for attributes in begun) or 1.0
    costs = {
        "trials": len(begun),
        "trials_to_their_end": sum("error" in attributes for attributes in begun),
        "trials_per_hour": round(3600 * len(begun) / seconds, 1),
        "compiling_percent": round(100 * sum(a["compile_seconds"] for a in begun) / seconds, 1),
    }
    print(
        f"{costs['trials']} trials in {seconds:.0f} s, {costs['trials_per_hour']:.0f} an hour of a worker, "
        f"{costs['trials_to_their_end']} of them to their end; {costs['compiling_percent']:.0f} % of the "
        f"time compiling; {sum('error_first' not in a for a in every)} proposals were not started"
    )
    return costs


def draw(study: optuna.Study, folder: Path) -> None:
    """The study's plots: history, importances, error against cost."""
    done = _completed(study)
    errors = [float(trial.value) for trial in done]
    plots = optuna.visualization.matplotlib
    with warnings.catch_warnings(), matplotlib.rc_context():  # Optuna changes the style of all plots
        warnings.simplefilter("ignore")  # that a plot is experimental, that trials are few
        figures.of_axes(plots.plot_optimization_history(study), folder / "history.png")
        if len(set(errors)) > 1:
            figures.of_axes(plots.plot_param_importances(study), folder / "importances.png")
    figures.error_against_cost([t.user_attrs["mflop"] for t in done], errors, folder / "cost.png")


main = partial(command_line, run, Config, description=__doc__)


if __name__ == "__main__":
    main()
