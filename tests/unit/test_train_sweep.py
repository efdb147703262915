"""A sweep on one machine: failed runs do not end it, finished ones are not trained again, a stop ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from packhorse.cli.main import main
from packhorse.cli.train import train as train_command
from packhorse.errors import UserError
from packhorse.run_folder.layout import PLAN_FILE
from packhorse.run_folder.status import Status, write_status
from packhorse.workflows import train_sweep
from packhorse.workflows.new_run import RunEnd
from tiny import write_tiny

WORDS = ["sweep.runs=[{seed: 1}, {seed: 2}, {seed: 3}]"]


class Machine:
    """Trains nothing: records which runs start, and ends each with the exit code that is set for it."""

    def __init__(self) -> None:
        self.codes: dict[str, int | UserError] = {}
        self.started: list[str] = []

    def train(self, recipe: Any, *_: Any) -> RunEnd:
        run = Path(recipe.runs_folder).absolute() / recipe.name
        run.mkdir(parents=True)
        (run / PLAN_FILE).write_text("{}")
        return self._end(run)

    def resume(self, run: str, *_: Any) -> RunEnd:
        return self._end(Path(run))

    def _end(self, run: Path) -> RunEnd:
        self.started.append(run.name)
        code = self.codes.get(run.name, 0)
        if isinstance(code, UserError):
            raise code
        state = {0: "finished", 75: "stopped"}.get(code, "failed")
        write_status(run, Status(state=state, step=6, num_steps=6, attempt=1))
        return RunEnd(None, code, "" if code == 0 else f"it ended with {code}")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    fake = Machine()
    monkeypatch.setattr(train_sweep, "train", fake.train)
    monkeypatch.setattr(train_sweep, "resume_here", fake.resume)
    monkeypatch.setattr(train_sweep, "find_prepared", lambda recipe: object())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    write_tiny(tmp_path)
    return fake


def test_the_others_follow_a_failed_run_and_the_same_command_trains_what_is_left(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.codes = {"tiny-1": 65, "tiny-2": UserError("the GPU holds 1 GiB.", "why.", "fix.")}
    assert train_command("tiny.yaml", WORDS) == 65
    assert machine.started == ["tiny-1", "tiny-2", "tiny-3"]
    shown = capsys.readouterr()
    assert "2 of 3 runs are not finished; next: packhorse resume runs/tiny" in shown.out
    assert "tiny-2 is not finished: the GPU holds 1 GiB." in shown.err
    machine.codes, machine.started = {}, []
    assert main(["resume", "tiny"]) == 0
    assert machine.started == ["tiny-1", "tiny-2"]
    assert "done: runs/tiny; next: packhorse evaluate runs/tiny" in capsys.readouterr().out
    assert train_command("tiny.yaml", WORDS) == 0
    assert machine.started == ["tiny-1", "tiny-2"]


def test_a_stop_ends_the_sweep(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.codes = {"tiny-1": 3, "tiny-2": 75}
    assert train_command("tiny.yaml", WORDS) == 75
    assert machine.started == ["tiny-1", "tiny-2"]
    assert main(["runs"]) == 0
    assert "tiny-3: it is not started yet" in capsys.readouterr().out


def test_another_sweep_of_the_same_name_is_refused(machine: Machine) -> None:
    train_command("tiny.yaml", WORDS)
    with pytest.raises(UserError, match=r"runs/tiny is a sweep of another recipe or of other overrides"):
        train_command("tiny.yaml", [*WORDS, "optimizer.learning_rate=1e-3"])
    assert len(machine.started) == 3
