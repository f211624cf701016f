"""Searches the sizes of an energy network with few labels or many (paper 000, sections 5 and 6).

    python -m experiments.tune_energy                        # MNIST if at hand, else the bundled digits
    python -m experiments.tune_energy --resume               # go on, or join from another terminal
    python -m experiments.tune_energy --num-labels 100 --num-layers 2 --trials 100 --workdir runs/labels100
    python -m experiments.tune_energy --storage postgresql://… --study mnist --resume    # from many machines

Optuna proposes whitening and layers, a network learns without labels, and k-means on all its codes is
compared with the labels of some training images; test labels are never seen. The paper took 2,000 trials on
all 60,000 images and labels, 20 hours on 8 GPUs. Here a trial learns from a part of the images (on a CPU
5,000), is stopped early when its error after a quarter of them is worse than the median, and is not begun
when it would cost more than `--max-mflop` or not fit into memory. The best few trials are learned again from
fresh seeds; the winner is what `mnist_energy --architecture` takes.
"""

import collections
import contextlib
import datetime
import gc
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax import Array
from tqdm import tqdm

from experiments import data
from experiments.common import architectures, evaluation, figures
from experiments.common.options import CommandOptions, ConfigError, check_options, command_line
from experiments.common.runs import Outcome, device_name, identity, make_workdir, record, recorded, write_json
from sul_jax import energy, patches, training, whitening
from sul_jax.cli.tables import format_table
from sul_jax.seeds import over_seeds

if TYPE_CHECKING:
    import optuna

EXPERIMENT = "tune_energy"
_SPACE = 2  # changes with the parameters' names and meaning
_MAX_SUBSPACES, _MAX_RANK, _MAX_ZCA = 64, 16, 11
# What each preset changes (table 5).
_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "no_zca": {"zca": False},
    "no_rescale": {"rescale": False},
    "neither": {"zca": False, "rescale": False},
    "rank_one": {"max_rank": 1},
    "random_subspaces": {"random_subspaces": True},
}
# Proposals in a row that are too large.
_MAX_NOT_BEGUN = 200
# Trials whose compiled programs are held: each has memory maps, of which a process may have 65,530.
_FORGET_AFTER = 25
# Seconds to wait for the last trials of other workers.
_MAX_WAIT = 600
# Options that a worker may choose for itself; all others that are recorded are the study's.
_WORKERS_OWN = (
    "start_from",
    "trials",
    "finalists",
    "finalist_seeds",
    "memory_gib",
    "max_mflop",
)


@dataclass(frozen=True, kw_only=True)
class Config(CommandOptions):
    """Options of the search."""

    dataset: str = "auto"
    """mnist, fashion_mnist, digits, FILE.npz, or auto: MNIST if at hand, else the bundled digits. Of the
    digits, and of a file, only the first half is used."""
    workdir: Path = Path("runs/tune_energy")
    """Where the study, its plots and the best architecture are written."""
    num_layers: int = 3
    """Energy layers, 1 to 4."""
    preset: Literal["full", "no_zca", "no_rescale", "neither", "rank_one", "random_subspaces"] = "full"
    """What to search: the whole space, or one of the ablations of table 5."""
    trials: int = 50
    """Trials of the study in all, those of other workers and of earlier runs included; each worker may finish
    one more. Proposals that are too large to be begun do not count."""
    num_images: int | None = None
    """Training images of a trial; by default 5,000 on a CPU and all on an accelerator."""
    num_labels: int | None = None
    """Labelled images, as many of each class where they go round: the error to be minimised is theirs, in
    clusters of all images. By default all images of a trial."""
    batch_size: int | None = None
    """Images in a minibatch; by default the paper's 512, below 10,000 images 128."""
    passes: int | None = None
    """Passes over the images for each layer; by default 1, below 2,500 images 3."""
    code_power: float = 1.0
    """Power of the pooled codes before clustering; 0.5 takes the square root."""
    networks: int = 1
    """Networks whose codes are put side by side, as in mnist_energy."""
    seeds_per_trial: int = 1
    """Repetitions of a trial, trained together; the error is their mean."""
    first_share: float = 0.25
    """Share of a trial's images after which it is judged a first time; 1 to never stop early."""
    finalists: int = 3
    """Best trials that are learned again from fresh seeds at the end."""
    finalist_seeds: int = 3
    """Fresh seeds of each of them."""
    start_from: str | None = None
    """Begin with this architecture of `num_layers` layers: a name that mnist_energy takes, or FILE.json."""
    max_mflop: float = 400.0
    """Million floating-point operations for the codes of one image; a proposal beyond it is not begun. The
    paper's networks of 1 to 4 layers take 17, 633, 393 and 1,680."""
    memory_gib: float | None = None
    """Memory for a trial's codes; a proposal beyond it is not begun. By default 4, on an accelerator half of
    what it has."""
    storage: str | None = None
    """Any Optuna URL, such as sqlite:///study.db; by default a journal file in the workdir."""
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


class Found(NamedTuple):
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

    config: Filled
    images: Array  # [num_images, height, width, channels] in [0, 1], shuffled
    labels: np.ndarray  # of the first of them
    num_clusters: int
    whitened: Callable[[int, int], Array]


def run(config: Config) -> Found:
    """Searches; see the module's docstring.

    Args:
      config: the options.

    Raises:
      ValueError: options or data that cannot be used, or a study of other options.
    """
    _check(config)
    _share_compiled_programs()
    dataset = data.load(config.dataset, config.data_dir)
    given = {"batch_size": config.batch_size, "passes": config.passes}
    search = _prepare(config, dataset)
    filled = search.config
    first = None
    if filled.start_from is not None:
        begin = architectures.get(filled.start_from).architecture
        first = _as_parameters(begin, filled, search.images.shape[1:])
        mflop, gib = cost(begin, search.images.shape[1:], filled)
        if mflop > filled.max_mflop:
            raise ConfigError(f"start_from={filled.start_from!r} takes {mflop:.0f} MFLOP; raise --max-mflop")
        if gib > filled.memory_gib:
            raise ConfigError(f"start_from={filled.start_from!r} takes {gib:.1f} GiB; raise --memory-gib")
    make_workdir(filled.workdir)
    settings = recorded(filled) | {"seed": filled.seed, "data": identity(np.asarray(search.images))}
    settings["space"] = _SPACE
    # Through JSON, so that they compare equal to what is read back.
    settings = json.loads(json.dumps({k: v for k, v in settings.items() if k not in _WORKERS_OWN}))
    study = _open_study(filled, settings, first)
    print(
        f"{dataset.name}: {len(search.images)} training images, {len(search.labels)} of them labelled "
        f"({dataset.source})"
    )
    began = time.perf_counter()
    _search(study, search)
    _wait_for_others(study)
    costs = _study_cost(study)
    draw(study, filled.workdir)
    found = _finish(study, search, dataset, given)
    table = [{"trial": number, "error": first, "errors": errors} for number, first, errors in found.table]
    write_json(filled.workdir / "results.json", {"settings": settings, "finalists": table, "cost": costs})
    if filled.record:
        values = {"train_clustering_error": round(found.error, 4), **costs}
        outcome = Outcome(
            values, dataset, len(search.images), len(search.labels), time.perf_counter() - began, {}
        )
        record(EXPERIMENT, filled, filled.seed, outcome)
    return found


def _wait_for_others(study: "optuna.Study") -> None:
    """So that the finalists are chosen from all trials; not for one whose worker seems lost."""
    from optuna.trial import TrialState

    deadline, said = time.monotonic() + _MAX_WAIT, False
    while time.monotonic() < deadline:
        _release_dead(study)
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        now = datetime.datetime.now()
        ages = [(now - trial.datetime_start).total_seconds() for trial in running if trial.datetime_start]
        if not any(age < _MAX_WAIT for age in ages):
            return
        if not said:
            print(f"waiting for {len(ages)} trials of other workers, {_MAX_WAIT // 60} minutes at most")
            said = True
        time.sleep(0.5)


def _share_compiled_programs() -> None:
    """Between workers, and between a trial and a finalist."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(data.cache_dir() / "compiled"))
        jax.config.update("jax_compilation_cache_max_size", 2**30)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _prepare(config: Config, dataset: data.Dataset) -> Search:
    """The defaults that depend on the data, and the images and labels that trials use."""
    if dataset.train_labels is None:
        raise ConfigError(f"dataset={config.dataset!r} has no labels, which the search needs for some images")
    available = len(dataset.train_images)
    if dataset.train_images is dataset.test_images:
        available //= 2  # the other half is for the test
    accelerator = jax.default_backend() != "cpu"
    number = config.num_images or (available if accelerator else min(5000, available))
    if number > available:
        raise ConfigError(f"num_images={number} exceeds the {available} images there are to search on")
    batch_size = config.batch_size or min(128 if number < 10_000 else 512, number)
    if batch_size > number:
        raise ConfigError(f"batch_size={batch_size} exceeds the {number} training images")
    order = np.random.default_rng(config.seed).permutation(available)[: number // batch_size * batch_size]
    classes = len(np.unique(dataset.train_labels[:available]))
    if classes < len(np.unique(dataset.train_labels)):
        raise ConfigError(
            f"dataset={config.dataset!r}: the first {available} of its images hold {classes} of the "
            f"{len(np.unique(dataset.train_labels))} classes; shuffle them, the other half is for the test"
        )
    num_labels = config.num_labels or len(order)
    if not classes <= num_labels <= number:
        raise ConfigError(
            f"num_labels={num_labels} is not accepted: it must be between {classes}, the number of classes, "
            f"and {number}, the images of a trial"
        )
    num_labels = min(num_labels, len(order))  # those of whole minibatches
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 8 * 2**30) / 2**30
    if num_labels < len(order):  # the labelled images come first
        first = _of_every_class(dataset.train_labels[order])[:num_labels]
        order = np.concatenate([order[first], np.delete(order, first)])
    images = evaluation.to_float(jnp.asarray(dataset.train_images[order]))
    defaults = {
        "dataset": dataset.name,
        "num_images": number,
        "num_labels": num_labels,
        "batch_size": batch_size,
        "passes": config.passes or (3 if number < 2500 else 1),
        "memory_gib": config.memory_gib or (limit / 2 if accelerator else 4.0),
    }
    filled = Filled(**{**vars(config), **defaults})

    @partial(jax.jit, static_argnames=("kernel_size", "num_components"))
    def whiten(images: Array, kernel_size: int, num_components: int) -> Array:
        kernel = whitening.conv_zca_kernel(images, kernel_size=kernel_size, num_components=num_components)
        return whitening.conv_zca(images, kernel)

    @lru_cache(maxsize=4)
    def whitened(kernel_size: int, num_components: int) -> Array:
        return whiten(images, kernel_size, num_components) if num_components > 1 else images

    return Search(filled, images, dataset.train_labels[order[:num_labels]], classes, whitened)


def _of_every_class(labels: np.ndarray) -> np.ndarray:
    """Indices: the first image of each class, the second of each, and so on."""
    turn = np.empty(len(labels), int)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        turn[own] = np.arange(len(own))
    return np.argsort(turn, kind="stable")


def _open_study(config: Config, settings: dict[str, Any], first: dict[str, float] | None) -> "optuna.Study":
    """Creates the study, or joins the one that is there."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage: Any = config.storage
    if storage is None:
        from optuna.storages.journal import JournalFileBackend

        # Optuna's lock is a link to this path as it stands: a relative one would lead nowhere.
        journal = (config.workdir / "study.log").resolve()
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    try:
        study = optuna.create_study(storage=storage, study_name=config.study)
        study.set_user_attr("settings", settings)
        created = True
    except optuna.exceptions.DuplicatedStudyError:
        if not config.resume:
            where = config.storage or config.workdir
            raise ConfigError(
                f"{str(where)!r} holds a study {config.study!r}: --resume goes on with it or joins it; "
                "give another --workdir or --study for a new one"
            ) from None
        study = optuna.load_study(storage=storage, study_name=config.study)
        created = False
        _compare(study, settings)
    except Exception as error:  # of whatever database the URL names
        raise ConfigError(f"storage={config.storage!r} cannot be used: {error}") from None
    # Only the worker that made the study may take the seed: two with one seed would propose the same.
    seed = config.seed if created else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.sampler = optuna.samplers.TPESampler(
            seed=seed, constant_liar=True, multivariate=True, group=True
        )
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=5)
    _release_dead(study)
    if first is not None:
        trials = [trial for trial in study.get_trials(deepcopy=False) if not _failed(trial)]
        if first not in [trial.system_attrs.get("fixed_params", trial.params) for trial in trials]:
            study.enqueue_trial(first)
    return study


def _compare(study: "optuna.Study", settings: dict[str, Any]) -> None:
    """Raises `ConfigError` unless a worker wants what the study is about."""
    deadline = time.monotonic() + 10
    while "settings" not in study.user_attrs and time.monotonic() < deadline:
        time.sleep(0.1)  # its maker is about to write them
    stored = study.user_attrs.get("settings", {})
    for key, value in settings.items():
        if key not in stored or stored[key] != value:
            raise ConfigError(
                f"the study {study.study_name!r} has {key}={stored.get(key)!r} and cannot go on with "
                f"{key}={value!r}; give the same options, or another --workdir or --study"
            )


def _release_dead(study: "optuna.Study") -> None:
    """Marks as failed what workers of this machine were killed over."""
    import optuna

    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        host, _, process = trial.user_attrs.get("worker", "").rpartition(":")
        if host == socket.gethostname() and not _is_running(int(process)):
            # Another worker may say the same at this moment.
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def _search(study: "optuna.Study", search: Search) -> None:
    """Runs trials until the study has enough of them."""
    import optuna

    config = search.config
    not_begun, number_begun, reason = 0, 0, ""
    states = optuna.trial.TrialState
    with tqdm(total=config.trials, desc="search", unit="trial") as bar:
        while True:
            number, best = _progress(study)
            bar.n = min(number, config.trials)
            bar.set_postfix_str(f"best error {best:.2f} %" if best is not None else "")
            if number >= config.trials:
                return
            if not_begun >= _MAX_NOT_BEGUN:
                raise ConfigError(
                    f"{not_begun} proposals in a row could not be begun (the last: {reason}); raise "
                    "--max-mflop or --memory-gib"
                )
            trial = study.ask()
            trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
            try:
                began = time.perf_counter()
                with _CompileClock() as clock:
                    error = _objective(trial, search)
                trial.set_user_attr("seconds", time.perf_counter() - began)
                trial.set_user_attr("compile_seconds", clock.seconds)
                study.tell(trial, error)
            except optuna.TrialPruned as pruned:
                reason = str(pruned)
                trial.set_user_attr("reason", reason)
                trial.set_user_attr("seconds", time.perf_counter() - began)
                trial.set_user_attr("compile_seconds", clock.seconds)
                study.tell(trial, state=states.PRUNED)
            except BaseException as error:
                reason = f"{type(error).__name__}: {error}"[:500]
                trial.set_user_attr("reason", reason)
                too_large = _out_of_memory(error)
                study.tell(trial, state=states.PRUNED if too_large else states.FAIL)
                if not too_large:
                    raise
                tqdm.write(f"trial {trial.number} failed: {reason}")
            begun = "error_first" in trial.user_attrs
            not_begun = 0 if begun else not_begun + 1
            number_begun += begun
            if begun and number_begun % _FORGET_AFTER == 0:
                jax.clear_caches()
                gc.collect()


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def _failed(trial: "optuna.trial.FrozenTrial") -> bool:
    from optuna.trial import TrialState

    return trial.state == TrialState.FAIL


def _progress(study: "optuna.Study") -> tuple[int, float | None]:
    """Trials begun (not those that were too large), and the lowest error."""
    from optuna.trial import TrialState

    ended = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    trials = study.get_trials(deepcopy=False, states=ended)
    # Of trials that were stopped early Optuna keeps the early error as their value.
    errors = [t.value for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
    return sum("error_first" in t.user_attrs for t in trials), min(errors, default=None)


def _objective(trial: "optuna.Trial", search: Search) -> float:
    """Clustering error of a proposal in percent; raises `TrialPruned` with the reason."""
    import optuna

    config = search.config
    architecture = propose(trial, config, search.images.shape[1:])
    sizes = json.dumps(architecture.to_dict())
    trial.set_user_attr("architecture", sizes)
    for other in trial.study.get_trials(deepcopy=False):
        same = other.user_attrs.get("architecture") == sizes
        if other.number < trial.number and same and not _failed(other):
            raise optuna.TrialPruned(f"the same as trial {other.number}")
    mflop, gib = cost(architecture, search.images.shape[1:], config)
    trial.set_user_attr("mflop", round(mflop, 2))
    # Without it refused proposals would be the sampler's model of good ones until some trial has ended.
    trial.set_constraint("mflop", mflop - config.max_mflop)
    trial.set_constraint("gib", gib - config.memory_gib)
    if mflop > config.max_mflop:
        raise optuna.TrialPruned(f"{mflop:.0f} million operations an image")
    if gib > config.memory_gib:
        raise optuna.TrialPruned(f"{gib:.1f} GiB of codes")
    total = len(search.images) // config.batch_size
    first = max(1, round(config.first_share * total))
    learner = Learner(architecture, search)
    seeds = [config.seed + 1000 * trial.number + i for i in range(config.seeds_per_trial)]
    for name, number in (("error_first", first), ("error", total)):
        error = float(np.mean(errors_of(learner, search, architecture, seeds, number)))
        trial.set_user_attr(name, error)
        if number == total:
            trial.set_user_attr("error", error)
            return error
        trial.report(error, number)
        if trial.should_prune():
            raise optuna.TrialPruned(f"an error of {error:.1f} % after {number} of {total} minibatches")
    raise AssertionError


def propose(
    trial: "optuna.trial.BaseTrial", config: Config, shape: tuple[int, ...]
) -> energy.EnergyArchitecture:
    """Sizes from the paper's space: whitening, and of every layer k, r, w, kernel and padding.

    Args:
      trial: what chooses them.
      config: number of layers and preset.
      shape: of an image, height, width and channels.

    Raises:
      optuna.TrialPruned: too little is left of the image to be pooled.
    """

    return _sizes(partial(_suggest, trial), config, shape)


def _sizes(
    choose: Callable[[str, int, int], int], config: Config, shape: tuple[int, ...]
) -> energy.EnergyArchitecture:
    """An architecture whose sizes are chosen by name, each from a lowest to a highest value."""
    import optuna

    preset = _PRESETS[config.preset]
    side, channels = min(shape[:2]), shape[2]
    kernel, components = 1, 0
    if preset.get("zca", True):
        kernel = choose("zca_kernel_size", 1, min(_MAX_ZCA, side))
        components = choose("zca_num_components_share", 0, kernel**2 * channels)
    layers = []
    for index in range(1, config.num_layers + 1):
        name = f"layer{index}"
        num_subspaces = choose(f"{name}_num_subspaces", 2, _MAX_SUBSPACES)
        winners = choose(f"{name}_num_winners_share", 1, num_subspaces)
        # The images of the layers above are as large as those below make them.
        size = choose(f"{name}_kernel_size" if index == 1 else f"{name}_kernel_size_share", 1, side)
        padding = choose(f"{name}_padding_share", 0, size // 2)
        rank = min(choose(f"{name}_rank", 1, preset.get("max_rank", _MAX_RANK)), size**2 * channels)
        layers.append(energy.EnergyLayer(num_subspaces, rank, winners, size, padding))
        side, channels = patches.output_size(side, kernel_size=size, padding=padding), num_subspaces
        if side < 2:
            raise optuna.TrialPruned(f"layer {index} leaves {side}×{side} positions, too few to pool")
        if config.batch_size is not None and side**2 * config.batch_size < num_subspaces:
            raise optuna.TrialPruned("more subspaces than patches in a minibatch, too few to pool")
    return energy.EnergyArchitecture(kernel, components, tuple(layers))


def _suggest(trial: "optuna.trial.BaseTrial", name: str, low: int, high: int) -> int:
    """A size; where its range depends on other sizes the search sees its share of the range, in [0, 1].

    Optuna compares values of one fixed range only, in what it proposes as in what it calls important.
    """
    if not name.endswith("_share"):
        return trial.suggest_int(name, low, high)
    return min(low + int(trial.suggest_float(name, 0, 1) * (high - low + 1)), high)


def _as_parameters(
    architecture: energy.EnergyArchitecture, config: Config, shape: tuple[int, ...]
) -> dict[str, float]:
    """What `propose` would have to be given."""
    import optuna

    values = {
        "zca_kernel_size": architecture.zca_kernel_size,
        "zca_num_components": architecture.zca_num_components,
    }
    for index, layer in enumerate(architecture.layers, 1):
        values |= {f"layer{index}_{name}": value for name, value in layer._asdict().items()}
    parameters: dict[str, float] = {}

    def note(name: str, low: int, high: int) -> int:
        value = values[name.removesuffix("_share")]
        if not low <= value <= high:
            raise ConfigError(
                f"start_from={config.start_from!r} has {name.removesuffix('_share')}={value}, but images of "
                f"shape {shape} allow {low} to {high}"
            )
        share = name.endswith("_share")
        parameters[name] = (value - low + 0.5) / (high - low + 1) if share else value
        return value

    try:
        _sizes(note, config, shape)
    except optuna.TrialPruned as too_small:
        raise ConfigError(f"start_from={config.start_from!r} on images of {shape}: {too_small}") from None
    return parameters


def cost(
    architecture: energy.EnergyArchitecture, shape: tuple[int, ...], config: Filled
) -> tuple[float, float]:
    """Million operations for the codes of an image, and GiB that a trial holds.

    Args:
      architecture: the sizes.
      shape: of an image, height, width and channels.
      config: number of images and of seeds.
    """
    height, width, channels = shape
    operations, held, below = 0, 0, height * width * channels
    for layer in architecture.layers:
        window = {"kernel_size": layer.kernel_size, "padding": layer.padding}
        height, width = (patches.output_size(side, **window) for side in (height, width))
        patch = layer.kernel_size**2 * channels
        operations += 2 * height * width * patch * layer.num_subspaces * layer.rank
        channels = layer.num_subspaces
        above = height * width * channels
        # Codes of the layer below and above, bases, their scatter in a few chunks, and patches of chunks.
        bases = patch * layer.num_subspaces * layer.rank
        chunk = max(patches.chunk_bytes(), 4 * height * width * (patch + layer.num_subspaces * layer.rank))
        layer_bytes = 4 * (config.num_images * (below + above) + 10 * bases) + 4 * chunk
        held, below = max(held, layer_bytes), above
    total = config.seeds_per_trial * config.networks * held
    return operations / 1e6, total / 2**30


class Learner:
    """Learns networks of one architecture from whitened images; compiled once for all budgets and seeds."""

    def __init__(self, architecture: energy.EnergyArchitecture, search: Search):
        config, preset = search.config, _PRESETS[search.config.preset]
        random = preset.get("random_subspaces", False)
        _, *self._rules = energy.network_rules(
            architecture, rescale=preset.get("rescale", True), random_subspaces=random
        )
        self._size, self._passes = config.batch_size, 0 if random else config.passes
        self._programs = [training.LayerPrograms([rule]) for rule in self._rules]
        self._encoders = [jax.jit(over_seeds(rule.encode)) for rule in self._rules]

        def pooled(maps: Array) -> Array:
            codes = energy.pooled_codes(maps, power=config.code_power)
            # Features of zeros change no distance, and one compiled k-means serves every trial.
            return jnp.pad(codes, ((0, 0), (0, 4 * _MAX_SUBSPACES - codes.shape[1])))

        self._pooled = jax.jit(jax.vmap(pooled))

    def codes(self, keys: Array, images: Array, num_batches: int) -> Array:
        """Pooled codes `[networks, images, codes]` of the images of so many minibatches, of each key.

        Each layer encodes the images once; the codes are held.
        """
        size = self._size
        # Minibatches `[networks, batch, ...]`; all networks see the same images.
        batches = [
            jnp.broadcast_to(part, (len(keys), *part.shape))
            for part in jnp.split(images[: num_batches * size], num_batches)
        ]
        steps = self._passes * num_batches
        # The paper's ten steps, but not all there are where a trial is judged early.
        warmup = min(10, steps // 2)
        layer_keys = jax.vmap(lambda key: jax.random.split(key, len(self._rules)))(keys)
        for index in range(len(self._rules)):
            batches = self._learn_layer(index, batches, layer_keys[:, index], steps, warmup)
        return jnp.concatenate([self._pooled(batch) for batch in batches], axis=1)

    def _learn_layer(
        self, index: int, batches: Sequence[Array], keys: Array, steps: int, warmup: int
    ) -> list[Array]:
        """What a layer makes of the minibatches that it has learned from."""
        (state,) = training.train_layers(
            [self._rules[index]],
            (),
            lambda _: training.LayerTraining(partial(_turn, batches), steps, keys),
            hyperparameters=lambda steps: {"warmup": steps < warmup},
            programs=self._programs[index],
        )
        return [self._encoders[index](state, batch) for batch in batches]


def _turn(batches: Sequence[Array], first: int, end: int) -> Array:
    """Minibatches one after the other, again and again."""
    return jnp.stack([batches[index % len(batches)] for index in range(first, end)])


def errors_of(
    learner: Learner,
    search: Search,
    architecture: energy.EnergyArchitecture,
    seeds: Sequence[int],
    num_batches: int,
) -> list[float]:
    """Clustering error on the labelled images, of each seed, after so many minibatches."""
    images = search.whitened(architecture.zca_kernel_size, architecture.zca_num_components)
    networks = search.config.networks
    keys = jnp.stack([k for seed in seeds for k in jax.random.split(jax.random.key(seed), networks)])
    seen = num_batches * search.config.batch_size
    labels = search.labels[:seen]
    every = learner.codes(keys, images, num_batches)
    side_by_side = every.reshape(len(seeds), networks, seen, -1).swapaxes(1, 2).reshape(len(seeds), seen, -1)
    errors = []
    for seed, codes in zip(seeds, side_by_side, strict=True):
        found = evaluation.cluster(jax.random.key(seed), codes, None, num_clusters=search.num_clusters)
        errors.append(evaluation.agreement(labels, found.labels[: len(labels)])["clustering_error"])
    return errors


def _finish(
    study: "optuna.Study", search: Search, dataset: data.Dataset, given: Mapping[str, int | None]
) -> Found:
    """Learns the best trials again from fresh seeds, and saves the winner."""
    import optuna

    config = search.config
    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    ranked = sorted((float(trial.value), trial.number, trial) for trial in done if trial.value is not None)
    if not ranked:
        raise ConfigError("no trial was finished; raise --trials, --max-mflop or --memory-gib")
    total = len(search.images) // config.batch_size
    table, candidates = [], []
    for value, number, trial in tqdm(ranked[: config.finalists], desc="finalists", unit="trial"):
        architecture = propose(optuna.trial.FixedTrial(trial.params), config, search.images.shape[1:])
        _, gib = cost(architecture, search.images.shape[1:], config)
        if gib > config.memory_gib:
            tqdm.write(f"trial {number} is no finalist here: {gib:.1f} GiB of codes")
            continue
        # One after the other: together they might not fit.
        seeds = [2**30 + config.seed + i for i in range(config.finalist_seeds)]
        learner = Learner(architecture, search)
        errors = [errors_of(learner, search, architecture, [seed], total)[0] for seed in seeds]
        table.append((number, value, errors))
        candidates.append((float(np.mean(errors or [value])), number, architecture))
    if not candidates:
        raise ConfigError("none of the best trials fits into this machine's memory; raise --memory-gib")
    error, winner, architecture = min(candidates, key=lambda candidate: candidate[:2])
    preset = _PRESETS[config.preset]
    options = {name: preset[name] for name in ("rescale", "random_subspaces") if name in preset}
    options |= {"networks": config.networks, "code_power": config.code_power}
    # Of the default for a part of the images, nothing follows for all of them.
    options |= {name: value for name, value in given.items() if value is not None}
    finished = _progress(study)[0]
    about = {
        "dataset": dataset.name,
        # Of data that come as one set: the first, whose labels the search has seen.
        "searched": len(dataset.train_images) // 2 if dataset.train_images is dataset.test_images else None,
        "crc32": identity(dataset.train_images)["crc32"],
        "num_images": config.num_images,
        "num_labels": config.num_labels,
        "preset": config.preset,
        "start_from": config.start_from,
        "max_mflop": config.max_mflop,
        "trials": finished,
        "trial": winner,
        "train_clustering_error": round(error, 4),
        "seed": config.seed,
        "device": device_name(),
        "jax": jax.__version__,
    }
    named = architectures.Named(architecture, options, about)
    architectures.save(config.workdir / "best.json", named)
    rows = [
        [str(number), f"{first:.2f}", *(f"{e:.2f}" for e in errors), f"{np.mean(errors or [first]):.2f}"]
        for number, first, errors in table
    ]
    columns = [f"seed {i + 1}" for i in range(config.finalist_seeds)]
    print("\nclustering error on the labelled training images in %\n")
    print(format_table(["trial", "in the search", *columns, "mean"], rows))
    print(f"\nthe best: {architecture}")
    name = str(config.workdir / "best.json")
    if config.save_as is not None:
        architectures.save_as(config.save_as, named)
        name = config.save_as
    print(f"for mnist_energy: --architecture {name}")
    return Found(named, error, table)


def _study_cost(study: "optuna.Study") -> dict[str, float]:
    """What the trials of all workers took; also printed."""
    every = [trial.user_attrs for trial in study.get_trials(deepcopy=False)]
    begun = [attributes for attributes in every if "error_first" in attributes and "seconds" in attributes]
    seconds = sum(attributes["seconds"] for attributes in begun) or 1.0
    found = {
        "trials": len(begun),
        "trials_to_their_end": sum("error" in attributes for attributes in begun),
        "trials_per_hour": round(3600 * len(begun) / seconds, 1),
        "compiling_percent": round(100 * sum(a["compile_seconds"] for a in begun) / seconds, 1),
    }
    print(
        f"{found['trials']} trials in {seconds:.0f} s, {found['trials_per_hour']:.0f} an hour of a worker, "
        f"{found['trials_to_their_end']} of them to their end; {found['compiling_percent']:.0f} % of the "
        "time compiling"
    )
    reasons = [attributes.get("reason", "") for attributes in every if "error_first" not in attributes]
    kinds = ("operations", "GiB", "pool", "same")
    numbers = collections.Counter(next((k for k in kinds if k in reason), "failed") for reason in reasons)
    if reasons:
        words = ", ".join(f"{number} ({kind})" for kind, number in numbers.items())
        print(f"proposals not begun: {words}")
    return found


def draw(study: "optuna.Study", folder: Path) -> None:
    """The study's plots: history, importances, error against cost."""
    import optuna

    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    plots = optuna.visualization.matplotlib
    with warnings.catch_warnings(), matplotlib.rc_context():  # Optuna changes the style of all plots
        warnings.simplefilter("ignore")  # that a plot is experimental, that trials are few
        figures.of_axes(plots.plot_optimization_history(study), folder / "history.png")
        if len({trial.value for trial in done}) > 1:
            figures.of_axes(plots.plot_param_importances(study), folder / "importances.png")
    errors = [float(trial.value) for trial in done if trial.value is not None]
    figures.error_against_cost([t.user_attrs["mflop"] for t in done], errors, folder / "cost.png")


class _CompileClock:
    """Seconds that jax spent tracing, lowering and compiling since it was entered."""

    _total = 0.0
    _listens = False

    def __enter__(self) -> "_CompileClock":
        if not _CompileClock._listens:
            jax.monitoring.register_event_duration_secs_listener(_CompileClock._add)
            _CompileClock._listens = True
        self._before = _CompileClock._total
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = _CompileClock._total - self._before

    @staticmethod
    def _add(event: str, duration_secs: float, **_: str | int) -> None:
        if event in _COMPILE_EVENTS:
            _CompileClock._total += duration_secs


_COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


def _check(config: Config) -> None:
    check_options(
        config,
        at_least={
            "num_layers": 1, "trials": 1, "num_images": 1, "num_labels": 1, "batch_size": 1, "passes": 1,
            "seeds_per_trial": 1, "networks": 1, "finalists": 1, "finalist_seeds": 0, "seed": 0,
        },
        above={"first_share": 0, "code_power": 0, "max_mflop": 0, "memory_gib": 0},
    )  # fmt: skip
    if config.num_layers > 4:
        raise ConfigError(f"num_layers={config.num_layers} is not accepted: it must be 1 to 4")
    if config.first_share > 1:
        raise ConfigError(f"first_share={config.first_share} is not accepted: it must be at most 1")
    if config.preset not in _PRESETS:
        raise ConfigError(f"preset={config.preset!r} is unknown; accepted: {', '.join(_PRESETS)}")
    if config.save_as is not None:
        architectures.check_new_name(config.save_as)
    if config.start_from is not None:
        first = architectures.get(config.start_from).architecture
        if len(first.layers) != config.num_layers:
            raise ConfigError(
                f"start_from={config.start_from!r} has {len(first.layers)} layers, but num_layers="
                f"{config.num_layers}"
            )
        too_large = any(one.num_subspaces > _MAX_SUBSPACES or one.rank > _MAX_RANK for one in first.layers)
        if config.preset not in ("full", "no_rescale", "random_subspaces") or too_large:
            raise ConfigError(
                f"start_from={config.start_from!r} is outside the space of preset={config.preset}"
            )


def main() -> None:
    """The command line."""
    command_line(run, Config, description=__doc__)


if __name__ == "__main__":
    main()
