"""skipped_steps.json is read as it was written, completely or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from packhorse import durable
from packhorse.errors import UserError
from packhorse.run_folder.layout import SKIPPED_STEPS_FILE, SKIPPED_STEPS_FILE_BEFORE
from packhorse.run_folder.skipped_steps import read_skipped_steps, write_skipped_steps


def test_steps_are_read_in_order(tmp_path: Path) -> None:
    assert read_skipped_steps(tmp_path) == {}
    write_skipped_steps(tmp_path, {12: "the loss is nan", 3: "a spike"})
    assert list(read_skipped_steps(tmp_path).items()) == [(3, "a spike"), (12, "the loss is nan")]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_skipped_steps(tmp_path, {3: "a spike"})

    def broken(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(durable, "sync_to_disk", broken)
    with pytest.raises(OSError, match="No space left"):
        write_skipped_steps(tmp_path, {3: "a spike", 4: "another"})
    assert read_skipped_steps(tmp_path) == {3: "a spike"}


def test_the_file_of_earlier_versions_is_read_until_a_new_one_is_written(tmp_path: Path) -> None:
    (tmp_path / SKIPPED_STEPS_FILE_BEFORE).write_text('[{"step": 3, "why": "a spike"}]', encoding="utf-8")
    assert read_skipped_steps(tmp_path) == {3: "a spike"}
    write_skipped_steps(tmp_path, {3: "a spike", 4: "another"})
    assert read_skipped_steps(tmp_path) == {3: "a spike", 4: "another"}


@pytest.mark.parametrize("text", ["", "[{]", '{"step": 3}', '[{"step": "x", "why": ""}]', '[{"why": "a spike"}]'])
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / SKIPPED_STEPS_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=SKIPPED_STEPS_FILE):
        read_skipped_steps(tmp_path)
