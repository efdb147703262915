"""A stop while data is prepared leaves nothing half-written; once ranks run, signals only set flags."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from packhorse.cli.main import main
from packhorse.data import prepare
from packhorse.launching.local.stop_signals import StoppedBeforeStart, StopSignals, stop_signals
from packhorse.train.ranks.signals import STOP_SIGNALS
from tiny import write_tiny


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path)
    return tmp_path


def ask_while_preparing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Send the signal when the packs are written, before the folder gets its name."""
    write_manifest = prepare.write_data_manifest

    def ask_first(*arguments):
        os.kill(os.getpid(), number)
        write_manifest(*arguments)

    monkeypatch.setattr(prepare, "write_data_manifest", ask_first)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR2, 75), (signal.SIGINT, 130)])
def test_a_stop_while_data_is_prepared(
    number: int, code: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    ask_while_preparing(monkeypatch, number)
    assert main(["train", "tiny.yaml"]) == code
    assert "stopped" in capsys.readouterr().err
    assert not (folder / "runs" / "tiny").exists()
    assert list((folder / "runs").glob("**/*draft*")) == []
    assert list((folder / "runs" / ".data").glob("*/data.json")) == []
    assert signal.getsignal(number) == before


def test_once_ranks_may_run_a_signal_sets_a_flag_and_only_a_second_stop_ends_at_once() -> None:
    with stop_signals() as stop:
        stop.ranks_may_run()
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert (stop.requested, stop.at_once) == (True, False)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.at_once


def test_before_ranks_run_a_signal_raises_an_exception_that_is_no_error() -> None:
    stop = StopSignals()
    with pytest.raises(StoppedBeforeStart):
        stop.handle(signal.SIGTERM, None)
    assert not issubclass(StoppedBeforeStart, Exception)
    stop.close()


def test_the_launcher_takes_every_signal_that_a_rank_takes() -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with stop_signals() as stop:
        assert all(signal.getsignal(number) == stop.handle for number in STOP_SIGNALS)
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before
