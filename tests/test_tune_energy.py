"""The search for architectures: on a few hundred of the bundled digits, with one small layer."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest

from experiments import mnist_energy, tune_energy
from experiments.common import architectures, energy_space, studies
from experiments.common.energy_space import Space
from experiments.tune_energy import Config
from sul_jax import energy

SMALL = {
    "dataset": "digits", "num_layers": 1, "num_images": 256, "trials": 3, "max_mflop": 2.0, "passes": 1,
    "finalists": 1, "finalist_seeds": 1,
}  # fmt: skip


def study_in(workdir: Path) -> optuna.Study:
    from optuna.storages.journal import JournalFileBackend

    storage = optuna.storages.JournalStorage(JournalFileBackend(str(workdir / "study.log")))
    return optuna.load_study(storage=storage, study_name="tune_energy")


def test_a_search_and_what_it_found(tmp_path: Path) -> None:
    first = energy.EnergyArchitecture(3, 2, (energy.EnergyLayer(8, 2, 2, 9, 0),))
    architectures.save(tmp_path / "first.json", architectures.Named(first))
    config = Config(
        **SMALL,
        num_labels=100,
        workdir=tmp_path / "study",
        start_from=str(tmp_path / "first.json"),
        networks=2,
    )
    found = tune_energy.run(config)
    # One pass was asked for; the minibatches of 128 were only right for so few images.
    assert found.named.options == {"networks": 2, "code_power": 1.0, "passes": 1}
    study = study_in(config.workdir)
    assert study.trials[0].params == Space("full", 1, (28, 28, 1)).parameters(first)
    begun = [t for t in study.trials if "error_first" in t.user_attrs]
    assert len(begun) == 3
    ((_, _, errors),) = found.table
    assert found.error == pytest.approx(errors[0])
    assert found.error < 50  # chance would be wrong in about 75 %
    assert found.named.study["train_clustering_error"] == pytest.approx(found.error)
    assert all(t.user_attrs["mflop"] <= 2 for t in begun)
    for name in ("history", "importances", "cost"):
        assert (config.workdir / f"{name}.png").exists()
    assert architectures.get(str(config.workdir / "best.json")).architecture == found.named.architecture

    with pytest.raises(ValueError, match="--resume"):
        tune_energy.run(config)
    with pytest.raises(ValueError, match="num_labels"):
        tune_energy.run(replace(config, num_labels=50, resume=True))
    found = tune_energy.run(replace(config, trials=4, resume=True))
    assert sum("error_first" in t.user_attrs for t in study_in(config.workdir).trials) == 4
    stored = json.loads((config.workdir / "results.json").read_text())
    assert stored["cost"]["trials"] == 4
    assert len(stored["finalists"][0]["errors"]) == 1

    # The half whose labels the search has seen is left out of the test.
    (result,) = mnist_energy.run(
        mnist_energy.Config(
            dataset="digits",
            architecture=str(config.workdir / "best.json"),
            num_train=256,
            passes=1,
            num_train_evaluated=0,
            evaluate_layers=False,
            workdir=tmp_path / "run",
        )
    )
    assert result.network.architecture == found.named.architecture
    assert found.named.study["searched"] == 898


def test_few_labels_are_of_every_class() -> None:
    found = tune_energy._of_every_class(np.array([2, 2, 2, 0, 1, 0]))
    assert found.tolist() == [0, 3, 4, 1, 5, 2]


def test_presets_change_the_space() -> None:
    for number in range(1, 5):
        known, space = energy.ARCHITECTURES[f"{number}layer"], Space("full", number, (28, 28, 1))
        assert space.propose(optuna.trial.FixedTrial(space.parameters(known))) == known
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for preset, check in {
        "no_zca": lambda a: a.zca_num_components == 0,
        "rank_one": lambda a: all(layer.rank == 1 for layer in a.layers),
    }.items():
        assert check(Space(preset, 1, (28, 28, 1)).propose(study.ask()))


@pytest.mark.parametrize(
    ("name", "mflop"), [("1layer", 17), ("2layer", 633), ("3layer", 393), ("4layer", 1680)]
)
def test_cost_is_that_of_the_published_networks(name: str, mflop: float) -> None:
    operations, _ = energy_space.cost(energy.ARCHITECTURES[name], (28, 28, 1), num_images=1000)
    assert operations == pytest.approx(mflop, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["neither", "random_subspaces"])
def test_ablations_are_searched_anew(preset: str, tmp_path: Path) -> None:
    small = SMALL | {"trials": 1, "finalist_seeds": 0}
    found = tune_energy.run(Config(**small, preset=preset, workdir=tmp_path))
    assert set(found.named.options) & {"rescale", "random_subspaces"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 5}, "num_layers=5"),
        ({"num_labels": 5}, "num_labels=5"),
        ({"num_images": 5000}, "num_images=5000"),
        ({"first_share": 2.0}, "first_share=2.0"),
        ({"max_mflop": 1e-6}, "could not be started"),
        ({"save_as": "3layer"}, "save_as='3layer'"),
        ({"save_as": "digits"}, "save_as='digits'"),
        ({"dataset": "sorted.npz"}, "hold only 5 of the 10 classes"),
        ({"start_from": "3layer"}, "start_from='3layer'"),
        ({"start_from": "3layer", "num_layers": 3, "dataset": "small.npz"}, "allow 1 to 8"),
        ({"storage": "no-such-thing"}, "storage='no-such-thing'"),
        ({"preset": "nothing"}, "preset='nothing'"),
    ],
)
def test_bad_options(
    options: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_energy, "_MAX_NOT_BEGUN", 20)
    monkeypatch.chdir(tmp_path)
    np.savez("small.npz", images=np.zeros((600, 8, 8), np.float32), labels=np.arange(600) % 10)
    np.savez("sorted.npz", images=np.zeros((600, 8, 8), np.float32), labels=np.arange(600) // 60)
    with pytest.raises(ValueError, match=re.escape(message)):
        tune_energy.run(Config(**(SMALL | {"workdir": tmp_path} | options)))


def test_unknown_architectures() -> None:
    with pytest.raises(ValueError, match="architecture='5layer' is unknown"):
        architectures.get("5layer")
    with pytest.raises(ValueError, match="no-such"):
        architectures.get("no-such.json")


def worker(workdir: Path, trials: int, *options: str) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "experiments.tune_energy", "--workdir", str(workdir)]
    small = SMALL | {"trials": trials, "finalist_seeds": 0}
    command += [f"--{name.replace('_', '-')}={value}" for name, value in small.items()]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.Popen(
        [*command, *options], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.slow
def test_two_workers_and_one_that_is_killed(tmp_path: Path) -> None:
    def wait_for(condition: str) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            log = tmp_path / "study.log"
            if log.exists() and condition in log.read_text():
                return
            time.sleep(0.05)
        raise AssertionError(f"{condition} never came")

    killed = worker(tmp_path, 50)
    wait_for('"worker"')
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    both = [worker(tmp_path, 3, "--resume") for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    trials = study_in(tmp_path).trials
    states = [trial.state for trial in trials]
    assert optuna.trial.TrialState.RUNNING not in states
    assert [trial.number for trial in trials] == list(range(len(trials)))
    begun = [t for t in trials if "error_first" in t.user_attrs]
    assert 3 <= len(begun) <= 4  # both may begin the last at once
    assert len({json.dumps(t.params, sort_keys=True) for t in begun}) == len(begun)
    assert len({t.user_attrs["worker"] for t in trials if "worker" in t.user_attrs}) >= 2


_DIES = """
import os, signal, sys
from optuna.storages.journal import JournalFileBackend
from experiments import tune_energy
last, append = int(sys.argv.pop(1)), JournalFileBackend.append_logs
def append_and_die(self, logs):
    append(self, logs)
    if logs[0]["op_code"] == last:
        os.kill(os.getpid(), signal.SIGKILL)
JournalFileBackend.append_logs = append_and_die
tune_energy.main()
"""


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("record", "half", "resume", "said"),
    [
        pytest.param(0, "", True, "a new study begins", marks=SLOW),  # made, but without its settings
        pytest.param(0, "", False, "256 training images", marks=SLOW),
        pytest.param(4, "", True, "256 training images", marks=SLOW),  # a trial asked for, and nothing more
        (4, '{"op_code":5,"worker', True, "an incomplete record"),  # the disk was full
    ],
)
def test_killed_at_a_record(
    record: int,
    half: str,
    resume: bool,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = SMALL | {"trials": 1, "finalist_seeds": 0}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in small.items()]
    command = [sys.executable, "-c", _DIES, str(record), "--workdir", str(tmp_path), *options]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    log = tmp_path / "study.log"
    whole = log.read_text()
    log.write_text(whole + half)
    began = time.monotonic()
    tune_energy.run(Config(**small, workdir=tmp_path, resume=resume))
    assert time.monotonic() - began < 300
    printed = capsys.readouterr().out
    assert said in printed
    assert "waiting for" not in printed
    assert log.read_text().startswith(whole)
    states = [trial.state for trial in study_in(tmp_path).trials]
    assert optuna.trial.TrialState.RUNNING not in states


def test_a_damaged_study_is_named(tmp_path: Path) -> None:
    (tmp_path / "study.log").write_text('{"op_code":0,"wor{"op_code":1}\n{"op_code":2}\n')
    with pytest.raises(ValueError, match=r"study\.log' cannot be used"):
        tune_energy.run(Config(**SMALL, workdir=tmp_path, resume=True))


def test_nothing_to_resume_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune_energy, "_MAX_NOT_BEGUN", 1)
    with pytest.raises(ValueError, match="could not be started"):
        tune_energy.run(Config(**(SMALL | {"max_mflop": 1e-6}), workdir=tmp_path, resume=True))
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("nothing to resume in") and "new study begins" in line]


def test_trials_that_no_worker_has_named(monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study()
    trial = study.ask()
    studies.release_dead(study)  # its worker may be about to
    assert study.trials[0].state == optuna.trial.TrialState.RUNNING
    monkeypatch.setattr(studies, "_MAX_NAMING", 0)
    studies.release_dead(study)
    assert study.trials[trial.number].state == optuna.trial.TrialState.FAIL


def test_the_digits_have_a_network_of_their_own() -> None:
    found = architectures.get("digits")
    assert found.study["dataset"] == "digits"
    assert found.study["searched"] == 898


def test_a_trial_worse_than_the_median_is_stopped_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets: list[list[int]] = []

    class Learner:
        """Five good networks, and a bad one."""

        def __init__(self, *_: object) -> None:
            budgets.append([])

        def errors(self, seeds: list[int], num_batches: int) -> list[float]:
            budgets[-1].append(num_batches)
            return [10.0 if len(budgets) <= 5 else 50.0] * len(seeds)

    monkeypatch.setattr(tune_energy, "Learner", Learner)
    monkeypatch.setattr(tune_energy, "draw", lambda *_: None)
    tune_energy.run(Config(**(SMALL | {"trials": 6, "finalist_seeds": 0}), workdir=tmp_path))
    assert budgets[:6] == [[1, 2]] * 5 + [[1]]
    begun = [trial for trial in study_in(tmp_path).trials if "error_first" in trial.user_attrs]
    states = optuna.trial.TrialState
    assert [trial.state for trial in begun] == [states.COMPLETE] * 5 + [states.PRUNED]
    assert begun[-1].user_attrs["reason"] == "an error of 50.0 % after 1 of 2 minibatches"
