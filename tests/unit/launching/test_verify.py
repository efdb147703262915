"""`packhorse verify RUN` on sound, damaged, old and missing data of a run that has not begun."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from packhorse.cli.main import main
from packhorse.data.data_manifest import DataManifest, SplitCounts, read_data_manifest, write_data_manifest
from packhorse.errors import UserError
from packhorse.plan.run_plan import read_plan
from packhorse.workflows.prepared_data import require_data
from tiny import write_tiny


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The prepared data of a run that is planned and has not begun."""
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path)
    assert main(["plan", "tiny.yaml", "--gpus", "1", "--nodes", "1", "--write"]) == 0
    facts = read_plan(tmp_path / "runs" / "tiny").data
    assert facts is not None
    return Path(facts.folder)


def test_data_is_sound_damaged_old_or_gone(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "runs/tiny"]) == 0
    output = capsys.readouterr().out
    assert "holds no checkpoint" in output
    assert f"prepared data runs/.data/{data.name}  sound" in output

    rows = data / "validation" / "rows.jsonl"
    content = rows.read_bytes()
    rows.write_bytes(content[:-2] + b" \n")
    assert main(["verify", "runs/tiny"]) == 1
    output = capsys.readouterr().out
    assert "damaged\n  validation/rows.jsonl has other content than was written (sha256)." in output
    assert "packhorse prepare runs/tiny\n" in output
    rows.write_bytes(content)

    manifest = read_data_manifest(data)
    assert manifest is not None
    write_data_manifest(without_records(manifest), data)
    assert main(["verify", "runs/tiny"]) == 0
    assert "not checked: it was prepared by a version that kept no hashes" in capsys.readouterr().out

    shutil.rmtree(data)
    assert main(["verify", "runs/tiny"]) == 1
    assert "data.json is missing" in capsys.readouterr().out


def test_what_reads_a_runs_data_refuses_it_in_another_size(data: Path) -> None:
    """`resume`, `evaluate` and `chat` all check it here."""
    plan = read_plan(Path("runs/tiny"))
    assert require_data(plan) == plan.data
    file = data / "train" / "supervised.bin"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"train/supervised.bin has .* bytes instead of "):
        require_data(plan)


def without_records(manifest: DataManifest) -> DataManifest:
    bare = {name: SplitCounts(**counts.model_dump(exclude={"files"})) for name, counts in manifest.splits.items()}
    return manifest.model_copy(update={"splits": bare, "files": {}})
