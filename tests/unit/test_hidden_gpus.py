"""The tests are about the CPU path on every machine, also on one with GPUs; only `-m gpu` sees those."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from packhorse.cli.main import main
from packhorse.errors import EXIT_OK
from packhorse.plan.topology import detect_hardware
from tiny import write_tiny


def test_a_plan_without_other_words_is_for_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path, parallel={})
    assert main(["plan", "tiny.yaml", "--json"]) == EXIT_OK
    assert '"device": "cpu"' in capsys.readouterr().out


def test_it_is_so_on_a_machine_with_a_gpu(write_nvidia_smi: Callable[[str], None]) -> None:
    write_nvidia_smi("echo 'NVIDIA H200'")
    assert detect_hardware().gpus == ("NVIDIA H200",)
    test = f"{__file__}::{test_a_plan_without_other_words_is_for_the_cpu.__name__}"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", test], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
