"""Optuna studies that several processes work on, any of which may be killed at any moment."""

import contextlib
import datetime
import logging
import os
import socket
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from experiments.common.options import ConfigError

# Seconds to wait for the last trials of other workers.
_MAX_WAIT = 600
# Seconds in which a living worker has named itself as that of a trial that was waiting.
_MAX_NAMING = 10


def open_study(
    config: Any, settings: Mapping[str, Any], first: Mapping[str, float] | None = None
) -> optuna.Study:
    """Makes a study, or with `resume` goes on with the one that is there or joins it.

    Optuna makes a study and notes its settings in two steps. One whose maker was killed between them holds
    nothing, and is taken over; where its maker lives, both begin it, which their settings must allow.

    Args:
      config: the run's dataclass, with `storage` (Optuna's URL, or None for `study.log` in `workdir`),
        `study` (the name), `resume` and `seed`.
      settings: what all workers must agree on, as JSON gives it back.
      first: parameters to begin with, unless a trial has them.

    Raises:
      ConfigError: a storage that cannot be used, a study that is not to be gone on with, other settings.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("optuna.study._optimize").setLevel(logging.CRITICAL)  # what is raised is not logged too
    journal = config.workdir / "study.log"
    where = repr(str(journal)) if config.storage is None else f"storage={config.storage!r}"
    try:
        storage = optuna.storages.get_storage(config.storage or _journal(journal))
        _name_workers(storage)
        study = optuna.create_study(storage=storage, study_name=config.study, load_if_exists=True)
    except Exception as error:  # of whatever database the URL names
        raise ConfigError(f"{where} cannot be used: {error}") from None
    begins = "settings" not in study.user_attrs and not study.get_trials(deepcopy=False)
    if begins:
        study.set_user_attr("settings", dict(settings))
        if config.resume:
            print(f"nothing to resume in {where}: a new study begins")
    elif not config.resume:
        raise ConfigError(
            f"{where} holds a study {config.study!r}: --resume continues or joins it; "
            "give another --workdir or --study for a new one"
        )
    _compare(study, settings)
    # Only the worker that began the study may take the seed: two with one would propose the same.
    seed = config.seed if begins else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.sampler = optuna.samplers.TPESampler(
            seed=seed, constant_liar=True, multivariate=True, group=True
        )
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=5)
    release_dead(study)
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.FAIL]
    if first and first not in [trial.system_attrs.get("fixed_params", trial.params) for trial in trials]:
        study.enqueue_trial(dict(first))
    return study


def _journal(path: Path) -> optuna.storages.JournalStorage:
    """A file of one record a line, without the half of one that a full disk or a kill left at its end."""
    # The system takes it from a process that dies; one of Optuna's own is then waited for half a minute.
    lock = FileLock(path.with_name(f"{path.name}.flock"))
    backend = JournalFileBackend(str(path.resolve()), lock)
    lock.acquire()  # another worker may be writing a line
    try:
        stored = path.read_bytes()
        whole = stored.rfind(b"\n") + 1
        if whole < len(stored):
            os.truncate(path, whole)
            print(f"{path} ended with an incomplete record, which is removed")
    finally:
        lock.release()
    return optuna.storages.JournalStorage(backend)


def _name_workers(storage: Any) -> None:
    """Lets a trial name its worker from its first moment, so that one left by a dead worker is known."""
    create = storage.create_new_trial

    def create_named(study_id: int, template_trial: FrozenTrial | None = None) -> int:
        if template_trial is None:
            named = {"worker": _own_name()}
            template_trial = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=named)
        return create(study_id, template_trial)

    storage.create_new_trial = create_named


def _own_name() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def _compare(study: optuna.Study, settings: Mapping[str, Any]) -> None:
    """Raises `ConfigError` unless a worker wants what the study is about."""
    stored = study.user_attrs.get("settings", {})
    for key, value in settings.items():
        if key not in stored or stored[key] != value:
            raise ConfigError(
                f"the study {study.study_name!r} has {key}={stored.get(key)!r} and cannot go on with "
                f"{key}={value!r}; give the same options, or another --workdir or --study"
            )


def name_worker(trial: optuna.Trial) -> None:
    """Names this process in a trial that was waiting for one."""
    if trial.user_attrs.get("worker") != _own_name():
        trial.set_user_attr("worker", _own_name())


def release_dead(study: optuna.Study) -> None:
    """Marks as failed what workers of this machine were killed over, or any before it named itself."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        host, _, process = trial.user_attrs.get("worker", "").rpartition(":")
        here = host == socket.gethostname()
        if (here and not _is_running(int(process))) or (not host and _age(trial) > _MAX_NAMING):
            # Another worker may say the same at this moment.
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # another user's
    return True


def _age(trial: FrozenTrial) -> float:
    return (datetime.datetime.now() - trial.datetime_start).total_seconds()


def wait_for_others(study: optuna.Study) -> None:
    """Until no trial runs, ten minutes at most; not for one whose worker seems lost."""
    deadline, said = time.monotonic() + _MAX_WAIT, False
    while time.monotonic() < deadline:
        release_dead(study)
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if all(_age(trial) >= _MAX_WAIT for trial in running):
            return
        if not said:
            print(f"waiting for {len(running)} trials of other workers, {_MAX_WAIT // 60} minutes at most")
            said = True
        time.sleep(0.5)
