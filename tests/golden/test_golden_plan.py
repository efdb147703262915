"""Memory, time and suggestions of `packhorse plan`, pinned as text (`--write-golden` rewrites it)."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from packhorse.cli.main import main

HERE = Path(__file__).parent
# Name -> arguments. The lines between the verdict and the tables contain paths of this machine and are not compared.
PLANS = {
    "fits": ["llama3.3-70b/qlora", "--gpus", "8xH100-80GB", "--price", "2.50", "--network", "400", "steps=500"],
    "two-nodes": ["llama3.3-70b/lora", "--gpus", "16xA100-80GB", "--nodes", "2", "steps=500"],
    "does-not-fit": ["llama3.1-8b/full", "--gpus", "2xA10"],
    "compare": ["llama3.1-8b/lora", "--gpus", "2xL4", "--compare"],
    "least": ["llama3.1-8b/lora", "--gpus", "auto", "--price", "1", "steps=500"],
    "unknown-card": ["llama3.1-8b/lora", "--gpus", "8"],
}


@pytest.mark.parametrize("name", PLANS)
def test_text_is_as_reviewed(
    name: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi: hides the GPUs of this machine
    monkeypatch.setattr("packhorse.cli.plan._now", lambda: datetime(2026, 1, 31, 9, 30, tzinfo=UTC))
    assert main(["plan", *PLANS[name]]) == 0
    output = capsys.readouterr().out
    if "\nmodel " in output:
        verdict, _, rest = output.partition("\nmodel ")
        output = verdict + "".join(rest.partition("\nphase")[1:])
    text = "".join(f"{line.rstrip()}\n" for line in output.splitlines())
    golden = HERE / "plans" / f"{name}.txt"
    if request.config.getoption("--write-golden"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")
