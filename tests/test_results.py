"""The results tables: what they take from the records, the pages that show them, and what runs their rows."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import nmce_spiral, reproduce
from experiments.common import runs
from experiments.results import records, render
from experiments.results.rows import ACCELERATOR, TABLES, Row

ROOT = Path(__file__).parents[1]
ROWS = [row for rows in TABLES.values() for row in rows]
Store = Callable[..., None]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Puts records of changed options into an empty folder of results."""
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setattr(runs, "RESULTS", folder)

    def add(row: Row, value: float = 1.0, seed: int = 0, drop: str = "", **changes: Any) -> None:
        path = folder / f"{records.experiment(row)}.json"
        config = {k: v for k, v in (dict(records.expected(row)) | changes).items() if k != drop}
        one = {"config": config, "seed": seed, "metrics": {row.metric: value}, "paper": {}}
        earlier = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps([*earlier, one | {"device": "CPU, 2 cores", "seconds": 90.0}]))

    return add


@pytest.mark.parametrize("page", render.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_fresh(page: Path) -> None:
    text = page.read_text()
    assert render.rendered(text, render.PAGES[page]) == text, "run: python -m experiments.results"


def test_readme_is_two_screens() -> None:
    text = (ROOT / "README.md").read_bytes()
    assert text.count(b"\n") <= 150
    assert len(text) <= 12 * 1024


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.command} {row.metric}")
def test_commands_of_rows_are_accepted(row: Row) -> None:
    """And every option that is filled in is one that the command leaves to the experiment."""
    if records.experiment(row) == "sul-jax":
        return
    stated = records.options(row.command)
    assert all(stated[name] in (None, "auto") for name in row.filled)
    assert stated.get("dataset") != "auto", "which data set it was is the row's to say"


def test_labels_and_commands_name_rows() -> None:
    assert len({(row.command, row.metric) for row in ROWS}) == len(ROWS)
    headlines = [row.headline for row in ROWS if row.headline]
    assert len(set(headlines)) == len(headlines) == 12
    costs = {row.command: row.minutes for row in ROWS}
    assert all(costs[row.command] == row.minutes for row in ROWS)


def test_every_record_of_a_run_is_of_its_command(store: Store, tmp_path: Path) -> None:
    """What an experiment records is found by the command that made it, not by its neighbours'."""
    config = nmce_spiral.Config(
        workdir=tmp_path / "run", steps=2, batch_size=8, num_test=20, hidden_size=4, record=True
    )
    nmce_spiral.run(config)
    command = "nmce_spiral --steps 2 --batch-size 8 --num-test 20 --hidden-size 4"
    row = Row("spiral", "–", command, 1, "clustering_accuracy", "higher")
    assert list(records.recorded(row)) == [0]
    assert not records.recorded(row._replace(command=f"{command} --num-layers 4"))
    assert not records.recorded(row._replace(command="nmce_spiral"))
    assert not records.recorded(row._replace(metric="something_else"))


def test_matching(store: Store) -> None:
    row = next(row for row in ROWS if row.command == "mnist_energy --dataset mnist --no-zca")
    assert records.expected(row)["zca"] is False
    assert records.expected(row)["batch_size"] == 512  # the command leaves it to the experiment
    store(row, 3.0)
    store(row, 4.0, networks=2)
    store(row, 4.0, dataset="fashion_mnist")
    store(row, 5.0, seed=1, seeds_together=7, drop="code_whitening")  # says nothing; younger than the record
    store(row, 6.0, seed=2, drop="zca")  # its default is another than the command's
    assert {seed: one["metrics"][row.metric] for seed, one in records.recorded(row).items()} == {
        0: 3.0,
        1: 5.0,
    }
    store(row, 2.0)
    assert records.recorded(row)[0]["metrics"][row.metric] == 2.0  # the last of a seed


def test_published_rows_take_what_the_run_calls_the_papers(store: Store) -> None:
    row = next(row for row in ROWS if row.published)
    store(row)
    assert not records.recorded(row)
    path = runs.RESULTS / "nmce_images.json"
    path.write_text(path.read_text().replace('"paper": {}', f'"paper": {{"{row.metric}": 1.0}}'))
    assert records.recorded(row)


@pytest.mark.parametrize("command", ["nothing", "nmce_spiral --nothing 3"])
def test_wrong_commands(command: str) -> None:
    with pytest.raises(ValueError, match=rf"'{command}' is not"):
        records.options(command)


def test_table(store: Store) -> None:
    row = next(row for row in ROWS if row.command == "nmce_spiral")
    for seed, value in enumerate((98.0, 100.0)):
        store(row, value, seed)
    large = row._replace(command="nmce_spiral --steps 7", minutes=ACCELERATOR)
    table = render.results_table((row, row._replace(command="nmce_spiral --steps 6"), large)).splitlines()
    assert "| 99.00 ± 1.41 | 100.00 |" in " ".join(table[2].split())
    assert "| 0, 1 | CPU, 2 cores, 2 min | `nmce_spiral` |" in " ".join(table[2].split())
    assert "not yet run" in table[3]
    assert "about 4 min" in table[3]
    assert "not yet run" in table[4]
    assert "an accelerator" in table[4]


class Child:
    """In place of a run: leaves its folder and a record, or is interrupted, or fails."""

    commands: list[list[str]]
    end: Callable[[str], int | None]

    def __init__(self, command: list[str], process_group: int) -> None:
        assert command[0] == sys.executable
        assert process_group == 0
        self.commands.append(command[2:])
        self.code: int | None = None
        self.pid = 123
        workdir = Path(command[command.index("--workdir") + 1])
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text("{}")

    def wait(self) -> int:
        self.code = type(self).end(self.commands[-1][0]) if self.code is None else self.code
        if self.code is None:
            self.code = -signal.SIGTERM
            raise KeyboardInterrupt
        return self.code

    def poll(self) -> int | None:
        return None if self.code == -signal.SIGTERM else self.code


@pytest.fixture
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Store) -> list[list[str]]:
    """Four rows without records, of runs that come to their end at once; returns their commands."""
    rows = (
        Row("a", "–", "nmce_spiral --steps 5", 90, "clustering_accuracy"),
        Row("b", "–", "nmce_spiral --steps 4", 3, "clustering_accuracy"),
        Row("c", "–", "nmce_coil --dataset coil100", 1, "clustering_error"),
        Row("d", "–", "nmce_spiral --steps 3", ACCELERATOR, "clustering_accuracy"),
    )
    page = tmp_path / "page.md"
    page.write_text("<!-- t: begin --><!-- t: end -->")
    monkeypatch.setattr(reproduce, "TABLES", {"003": rows})
    monkeypatch.setattr(render, "PAGES", {page: {"t": lambda: render.results_table(rows)}})
    monkeypatch.setattr(reproduce, "_accelerated", lambda: False)
    monkeypatch.setattr(reproduce, "_missing", lambda name: f"{name} is not there" if name else "")
    monkeypatch.setattr(reproduce.subprocess, "Popen", Child)
    commands: list[list[str]] = []

    def end(_: str) -> int:
        steps = commands[-1][commands[-1].index("--steps") + 1]
        store(next(row for row in rows if row.command.endswith(steps)))
        return 0

    monkeypatch.setattr(Child, "commands", commands, raising=False)
    monkeypatch.setattr(Child, "end", staticmethod(end), raising=False)
    return commands


def test_reproduce(children: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = reproduce.Config(workdir=tmp_path / "work")
    left = reproduce.run(config)
    work = str(tmp_path / "work" / "nmce_spiral-steps-")
    assert children == [
        ["experiments.nmce_spiral", "--steps", "4", "--record", "--workdir", f"{work}4"],
        ["experiments.nmce_spiral", "--steps", "5", "--record", "--workdir", f"{work}5"],
    ]
    assert [(task.command, task.obstacle) for task in left] == [
        ("nmce_coil --dataset coil100", "coil100 is not there"),
        ("nmce_spiral --steps 3", "needs an accelerator"),
    ]
    text = capsys.readouterr().out
    assert "without a record: 4; 2 can be run here, in about 93 min" in text
    assert "without a record: 2; none can be run here" in text
    assert (tmp_path / "page.md").read_text().count("not yet run") == 2
    reproduce.run(config)
    assert len(children) == 2, "what has a record is not run again"


def test_reproduce_within_hours_and_the_plan_only(children: list[list[str]], tmp_path: Path) -> None:
    assert len(reproduce.run(reproduce.Config(list=True, workdir=tmp_path))) == 4
    assert not children
    left = reproduce.run(reproduce.Config(hours=1, workdir=tmp_path))
    assert [command[2] for command in children] == ["4"]
    assert "nmce_spiral --steps 5" in [task.command for task in left]
    with pytest.raises(ValueError, match="hours=0"):
        reproduce.run(reproduce.Config(hours=0, workdir=tmp_path))


def test_reproduce_goes_on_after_an_interruption(
    children: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    stopped: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "killpg", lambda *call: stopped.append(call))
    monkeypatch.setattr(sys, "argv", ["reproduce", "--workdir", str(tmp_path)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(Child, "end", staticmethod(lambda _: None))
        with pytest.raises(SystemExit) as stop:
            reproduce.main()
    assert stop.value.code == 130
    assert stopped == [(123, signal.SIGTERM)]
    assert capsys.readouterr().err == "\ninterrupted\n"
    reproduce.run(reproduce.Config(workdir=tmp_path))
    assert [("--steps", command[2], "--resume" in command) for command in children] == [
        ("--steps", "4", False),
        ("--steps", "4", True),
        ("--steps", "5", False),
    ]


def test_reproduce_goes_on_after_a_failure(
    children: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(Child, "end", staticmethod(lambda _: 2))
    assert len(reproduce.run(reproduce.Config(workdir=tmp_path))) == 4
    assert len(children) == 2
    assert "nmce_spiral --steps 4 failed; continuing with the others" in capsys.readouterr().err


def test_readmes_code_runs() -> None:
    """The two blocks about rules, one after the other as a reader would."""
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:3]
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.split("```")[0], names)
    assert names["codes"].shape == (1797, 16)
    assert names["infos"].loss[-1] < names["infos"].loss[0]
