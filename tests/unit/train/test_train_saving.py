"""Saving beside training: the copy is of its step, each rank writes its share, and all ranks know what failed."""

from __future__ import annotations

import json
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from packhorse.checkpoints.manifest import read_manifest
from packhorse.checkpoints.shelf import newest_sound
from packhorse.errors import EXIT_DISK, UserError
from packhorse.train.failure import agreed_failure
from packhorse.train.saving import HostBuffers, Share, fresh_copy, own_parts
from saving_cases import Trainer, make_run, save_at

RANKS = 2


def test_each_tensor_goes_to_the_rank_that_has_least_to_write() -> None:
    states: list[tuple[str, Any]] = [(f"{n}/exp_avg", torch.full((n,), float(n))) for n in (50, 10, 30, 20, 40, 5)]
    states.insert(2, ("1/step", 3))
    seen: dict[str, torch.Tensor] = {}
    for rank in range(RANKS):
        loads, others = [200, 0], {}
        for part in own_parts(states, rank, loads, others, fresh_copy):
            assert seen.keys().isdisjoint(part)
            seen |= part
        assert others == {"1/step": 3}
        assert loads == [480, 340], "200 bytes of weights are rank 0's from the start"
    assert sorted(seen) == sorted(name for name, value in states if isinstance(value, torch.Tensor))


def test_a_copy_does_not_change_with_what_it_was_copied_from() -> None:
    buffers = HostBuffers()
    for copy in (fresh_copy, buffers.copy):
        tensor = torch.arange(6.0).reshape(2, 3).T
        kept = copy("name", tensor)
        tensor.zero_()
        assert kept.is_contiguous()
        assert torch.equal(kept, torch.arange(6.0).reshape(2, 3).T)
    first = buffers.copy("name", torch.ones(3, 2))
    assert torch.equal(buffers.copy("name", torch.full((3, 2), 2.0)), first), "the room is used again"
    assert buffers.copy("name", torch.ones(4)).shape == (4,)


def test_a_checkpoint_is_of_its_step_though_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(make_run(tmp_path / "runs"))
    may_write = threading.Event()
    write = Share.write

    def slowly(share: Share) -> None:
        may_write.wait(10)
        write(share)

    monkeypatch.setattr(Share, "write", slowly)
    checkpoints = trainer.checkpoints
    checkpoints.save(trainer.steps_to(2))
    weights, moments = trainer.weights(), trainer.moments()
    trainer.steps_to(5)
    assert not checkpoints.pending_done()
    checkpoints.publish(all_done=False)
    may_write.set()
    checkpoints.finish()
    figures = checkpoints.take_figures()
    assert 0 < figures["checkpoint/stall_seconds"] <= figures["checkpoint/seconds"]
    assert checkpoints.take_figures() == {}
    checkpoint = newest_sound(checkpoints.folder).checkpoint
    assert checkpoint is not None
    stored = load_file(checkpoint / "model" / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in stored.items())
    states = load_file(checkpoint / "optimizer-00000-001.safetensors")
    assert all(torch.equal(states[name], value) for name, value in moments.items())
    assert any(not torch.equal(trainer.weights()[name], value) for name, value in stored.items())


def test_a_step_is_saved_once_and_a_save_waits_for_the_one_before(tmp_path: Path) -> None:
    trainer = Trainer(make_run(tmp_path / "runs"))
    for step in (2, 2, 4):
        trainer.checkpoints.save(trainer.steps_to(step))
    assert newest_sound(trainer.checkpoints.folder).checkpoint == trainer.checkpoints.folder / "step-000002"
    trainer.checkpoints.finish()
    assert newest_sound(trainer.checkpoints.folder).checkpoint == trainer.checkpoints.folder / "step-000004"


def test_on_full_continue_goes_on_and_counts_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(make_run(tmp_path / "runs", on_full="continue"))
    save_at(trainer, 2)
    full: Any = type("Usage", (), {"free": 5_000})
    with monkeypatch.context() as patched:
        patched.setattr("packhorse.train.checkpoint.shutil.disk_usage", lambda folder: full)
        for step in (4, 6):
            save_at(trainer, step)
    assert trainer.checkpoints.take_figures()["checkpoint/failed"] == 2
    told = capsys.readouterr().err
    assert "warning: no checkpoint of step 4: " in told
    assert "are needed for a checkpoint" in told
    assert [path.name for path in trainer.checkpoints.folder.iterdir()] == ["step-000002"]
    save_at(trainer, 8)
    assert newest_sound(trainer.checkpoints.folder).checkpoint == trainer.checkpoints.folder / "step-000008"


def test_a_spoilt_model_is_never_a_checkpoint_whatever_on_full_says(tmp_path: Path) -> None:
    trainer = Trainer(make_run(tmp_path / "runs", on_full="continue"))
    save_at(trainer, 2)
    trainer.steps_to(4)
    with torch.no_grad():
        next(iter(trainer.model.parameters()))[0, 0] = torch.nan
    with pytest.raises(UserError, match="1 of 512 numbers that are not finite"):
        save_at(trainer, 4)
    assert [path.name for path in trainer.checkpoints.folder.iterdir()] == ["step-000002"]


def of_two_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=60), RANKS, rank)
    plan = make_run(Path(folder) / "runs", processes=RANKS, make=rank == 0, asynchronous=True)
    dist.barrier()
    trainer = Trainer(plan, is_main=rank == 0)
    trainer.engine.control = dist.new_group(backend="gloo")
    save_at(trainer, 2)
    if rank == 1:  # it cannot write its share
        (trainer.checkpoints.folder / ".step-000004.tmp" / "optimizer-00001-001.safetensors").mkdir(parents=True)
    dist.barrier()
    told = ""
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("packhorse.train.checkpoint.Checkpoints._make_room", lambda self, temporary: None)
            save_at(trainer, 4)
    except UserError as error:
        told = f"{error.exit_code} {error}"
    bug = agreed_failure(trainer.engine, ValueError("on rank 1") if rank == 1 else None)
    nothing = agreed_failure(trainer.engine, None)
    (Path(folder) / f"told-{rank}.json").write_text(json.dumps([told, repr(bug), repr(nothing)]))
    dist.barrier()
    save_at(trainer, 6)
    dist.destroy_process_group()


def test_two_ranks_write_a_share_each_and_what_fails_on_one_is_known_to_both(tmp_path: Path) -> None:
    mp.spawn(of_two_ranks, (str(tmp_path),), nprocs=RANKS)
    folder = tmp_path / "runs" / "tiny" / "checkpoints"
    first, last = (read_manifest(folder / name) for name in ("step-000002", "step-000006"))
    assert first is not None
    assert last is not None, "after a failure the next one is saved as ever"
    assert {"optimizer-00000-001.safetensors", "optimizer-00001-001.safetensors"} <= first.files.keys()
    sizes = [
        sum(r.bytes for n, r in first.files.items() if n.startswith("optimizer-00001") == own) for own in (False, True)
    ]
    assert 0.7 < sizes[1] / sizes[0] < 1.3
    (told, bug, nothing), (other_told, other_bug, _) = (
        json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(RANKS)
    )
    assert told == other_told
    assert told.startswith(f"{EXIT_DISK} {folder}/step-000004 could not be written: ")
    assert bug == "RuntimeError(\"another rank failed: ValueError('on rank 1')\")"
    assert other_bug == "ValueError('on rank 1')"
    assert nothing == "None"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002", "step-000006"]
