"""Saving during training: the copy is of its step, each rank writes its share, and all ranks know what failed."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from packhorse.errors import EXIT_DISK, UserError
from packhorse.estimate.checkpoint_size import buffers_bytes
from packhorse.plan.run_plan import Topology
from packhorse.run_folder.checkpoints.listing import find_newest_sound
from packhorse.run_folder.checkpoints.manifest import read_manifest
from packhorse.train.checkpoint import saved_tensor, snapshot
from packhorse.train.checkpoint.optimizer_state import load_states
from packhorse.train.checkpoint.rank_share import RankShare
from packhorse.train.checkpoint.saved_tensor import (
    SavedFile,
    SavedTensor,
    copy_to_host,
    deal_files,
    deal_states,
    gather_files,
    held_whole,
    split_into_files,
    write_states,
)
from packhorse.train.checkpoint.snapshot import HostBuffers, ShardGroup, Snapshot
from packhorse.train.checkpoint.stored_tensor import StoredTensor
from packhorse.train.engine.sharding import make_mesh
from packhorse.train.ranks.agreement import agreed_failure
from saving_cases import Trainer, buffers_of, make_run, save_at, weights_of

RANKS, SECONDS = 2, timedelta(seconds=60)


def saved(key: str, tensor: torch.Tensor) -> SavedTensor:
    shard = tensor if isinstance(tensor, DTensor) else None
    return SavedTensor(key, tuple(tensor.shape), tensor.nbytes, partial(held_whole, tensor), shard)


def test_each_tensor_goes_to_the_rank_with_the_fewest_bytes() -> None:
    states = [saved(f"{n}/exp_avg", torch.full((n,), float(n))) for n in (50, 10, 30, 20, 40, 5)]
    loads = [200, 0]
    dealt = deal_states(states, loads)
    assert loads == [480, 340], "200 bytes of weights are rank 0's from the start"
    keys = [[tensor.key for file in own for tensor in file.tensors] for own in dealt]
    assert sorted(keys[0] + keys[1]) == sorted(state.key for state in states)
    assert [sum(file.num_bytes for file in own) for own in dealt] == [280, 340]
    assert [[file.name for file in own] for own in dealt] == [
        [f"optimizer-{rank:05d}-001.safetensors"] for rank in (0, 1)
    ]


def test_a_file_ends_before_it_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packhorse.train.checkpoint.saved_tensor.MAX_FILE_BYTES", 100)
    tensors = [saved(name, torch.zeros(size, dtype=torch.uint8)) for name, size in zip("abcde", (60, 40, 1, 300, 5))]
    groups: list[list[SavedTensor]] = [[each] for each in tensors]
    assert [[each.key for each in part] for part in split_into_files(groups)] == [["a", "b"], ["c"], ["d"], ["e"]]
    groups[1:3] = [[tensors[1], tensors[2]]]
    assert [[each.key for each in part] for part in split_into_files(groups)] == [["a"], ["b", "c"], ["d"], ["e"]]


def test_every_rank_gathers_a_turn_before_any_writes_so_that_all_write_at_once() -> None:
    """A rank that wrote between the tensors of a turn would keep the others, which need its rows, waiting."""
    files = [SavedFile(name, [saved(name, torch.ones(1))], write_states) for name in "abcde"]
    dealt = deal_files(files, [0, 0])
    gathered: list[str] = []

    def fetch(tensor: SavedTensor, owner: int) -> torch.Tensor | None:
        gathered.append(tensor.key)
        return torch.ones(1) if owner == 0 else None

    taken = [(file.name, list(tensors), "".join(gathered)) for file, tensors in gather_files(dealt, 0, fetch)]
    assert taken == [("a", ["a"], "ab"), ("c", ["c"], "abcd"), ("e", ["e"], "abcde")]


def test_a_copy_does_not_change_with_its_source() -> None:
    buffers = HostBuffers()
    for copy in (copy_to_host, partial(buffers.copy, "name")):
        tensor = torch.arange(6.0).reshape(2, 3).T
        kept = copy(tensor)
        tensor.zero_()
        assert kept.is_contiguous()
        assert torch.equal(kept, torch.arange(6.0).reshape(2, 3).T)
    first = buffers.copy("name", torch.ones(3, 2))
    assert torch.equal(buffers.copy("name", torch.full((3, 2), 2.0)), first), "the buffer is used again"
    assert buffers.copy("name", torch.ones(4)).shape == (4,)


def test_a_checkpoint_is_of_its_step_while_training_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(make_run(tmp_path / "runs"))
    may_write = threading.Event()
    write = RankShare.write

    def slowly(share: RankShare) -> None:
        may_write.wait(10)
        write(share)

    monkeypatch.setattr(RankShare, "write", slowly)
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
    checkpoint = find_newest_sound(checkpoints.folder).checkpoint
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
    assert find_newest_sound(trainer.checkpoints.folder).checkpoint == trainer.checkpoints.folder / "step-000002"
    trainer.checkpoints.finish()
    assert find_newest_sound(trainer.checkpoints.folder).checkpoint == trainer.checkpoints.folder / "step-000004"


def test_on_full_continue_counts_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(make_run(tmp_path / "runs", on_full="continue"))
    save_at(trainer, 2)
    full: Any = type("Usage", (), {"free": 5_000})
    with monkeypatch.context() as patched:
        patched.setattr("packhorse.train.checkpoint.checkpoints.shutil.disk_usage", lambda folder: full)
        for step in (4, 6):
            save_at(trainer, step)
    assert trainer.checkpoints.take_figures()["checkpoint/failed"] == 2
    err = capsys.readouterr().err
    assert "warning: no checkpoint of step 4: " in err
    assert "are needed for a checkpoint" in err
    assert [path.name for path in trainer.checkpoints.folder.iterdir()] == ["step-000002"]
    save_at(trainer, 8)
    assert find_newest_sound(trainer.checkpoints.folder).checkpoint == trainer.checkpoints.folder / "step-000008"


def test_a_damaged_model_is_never_a_checkpoint_whatever_on_full_says(tmp_path: Path) -> None:
    trainer = Trainer(make_run(tmp_path / "runs", on_full="continue"))
    save_at(trainer, 2)
    trainer.steps_to(4)
    with torch.no_grad():
        next(iter(trainer.model.parameters()))[0, 0] = torch.nan
    with pytest.raises(UserError, match="1 of 512 numbers that are not finite"):
        save_at(trainer, 4)
    assert [path.name for path in trainer.checkpoints.folder.iterdir()] == ["step-000002"]


def joined(rank: int, folder: str) -> None:
    """Join two ranks; a rank that waits in vain fails after seconds, not after a day."""
    dist.init_process_group("gloo", f"file://{folder}/store", SECONDS, RANKS, rank)
    snapshot.GATHER_TIMEOUT = SECONDS  # type: ignore[misc]


def of_two_ranks(rank: int, folder: str, engine: str) -> None:
    torch.set_num_threads(1)
    joined(rank, folder)
    plan = make_run(Path(folder) / "runs", processes=RANKS, engine=engine, make=rank == 0, asynchronous=True)
    dist.barrier()
    trainer = Trainer(plan, is_main=rank == 0)
    trainer.engine.control = dist.new_group(backend="gloo")
    save_at(trainer, 2)
    (Path(folder) / f"buffers-{rank}").write_text(str(buffers_of(trainer)))
    if rank == 1:  # it cannot write its share
        (trainer.checkpoints.folder / ".step-000004.tmp" / "optimizer-00001-001.safetensors").mkdir(parents=True)
    dist.barrier()
    message = ""
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(
                "packhorse.train.checkpoint.checkpoints.Checkpoints._make_folder", lambda self, temporary: None
            )
            save_at(trainer, 4)
    except UserError as error:
        message = f"{error.exit_code} {error}"
    bug = agreed_failure(trainer.engine, ValueError("on rank 1") if rank == 1 else None)
    nothing = agreed_failure(trainer.engine, None)
    (Path(folder) / f"message-{rank}.json").write_text(json.dumps([message, repr(bug), repr(nothing)]))
    dist.barrier()
    save_at(trainer, 6)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_ranks_write_a_share_each_and_what_fails_on_one_is_known_to_both(engine: str, tmp_path: Path) -> None:
    mp.spawn(of_two_ranks, (str(tmp_path), engine), nprocs=RANKS)
    folder = tmp_path / "runs" / "tiny" / "checkpoints"
    first, last = (read_manifest(folder / name) for name in ("step-000002", "step-000006"))
    assert first is not None
    assert last is not None, "after a failure the next one is saved as usual"
    assert {"optimizer-00000-001.safetensors", "optimizer-00001-001.safetensors"} <= first.files.keys()
    sizes = [
        sum(r.bytes for n, r in first.files.items() if n.startswith("optimizer-00001") == own) for own in (False, True)
    ]
    assert 0.7 < sizes[1] / sizes[0] < 1.3
    plan = make_run(tmp_path / "runs", RANKS, engine, make=False)
    kept = sum(int((tmp_path / f"buffers-{rank}").read_text()) for rank in range(RANKS))
    assert buffers_bytes(plan, weights_of(plan)) == pytest.approx(kept, rel=2e-2), "as it was planned"
    (message, bug, nothing), (other_message, other_bug, _) = (
        json.loads((tmp_path / f"message-{rank}.json").read_text()) for rank in range(RANKS)
    )
    assert message == other_message
    assert message.startswith(f"{EXIT_DISK} {folder}/step-000004 could not be written: ")
    assert bug == "RuntimeError(\"another rank failed: ValueError('on rank 1')\")"
    assert other_bug == "ValueError('on rank 1')"
    assert nothing == "None"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002", "step-000006"]


def of_sharded_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    joined(rank, folder)
    saved_tensor.MAX_FILE_BYTES = 7_000  # type: ignore[misc]  # embedding, layer and head are a file each
    write = RankShare.write
    for asynchronous in (False, True):
        runs, may_write = Path(folder) / str(asynchronous), threading.Event()
        plan = make_run(
            runs, RANKS, "fsdp2", make=rank == 0, asynchronous=asynchronous, keep_last=9, on_full="continue"
        )
        dist.barrier()
        gathered_shards(rank, plan.topology)
        # The ranks hold unequal parts of 33 and 17 rows, equal ones of the others.
        trainer = Trainer(plan, is_main=rank == 0, vocab_size=33, intermediate_size=17)
        trainer.engine.control = dist.new_group(backend="gloo")
        if not asynchronous:
            may_write.set()

        def when_allowed(share: RankShare, message: threading.Event = may_write) -> None:
            message.wait(30)
            write(share)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(RankShare, "write", when_allowed)
            trainer.checkpoints.save(trainer.steps_to(2))
            trainer.steps_to(4)
            may_write.set()
            trainer.steps_to(8)  # while the threads gather and write
            trainer.checkpoints.finish()
        save_at(trainer, 10)
    if rank == 0:
        (trainer.checkpoints.folder / ".step-000012.tmp" / "model" / "config.json").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("packhorse.train.checkpoint.checkpoints.Checkpoints._make_folder", lambda self, temporary: None)
        save_at(trainer, 12)  # rank 0 fails before the states are gathered
    save_at(trainer, 14)
    loaded_in_part(trainer, Trainer(plan, is_main=False, vocab_size=33, intermediate_size=17))
    weights = {name: value.full_tensor() for name, value in trainer.weights().items()}  # type: ignore[attr-defined]
    if rank == 0:
        torch.save(weights, Path(folder) / "weights.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_asynchronous_and_synchronous_saves_write_equal_files(tmp_path: Path) -> None:
    mp.spawn(of_sharded_ranks, (str(tmp_path),), nprocs=RANKS)
    synchronous, asynchronous = (tmp_path / kind / "tiny" / "checkpoints" for kind in ("False", "True"))
    steps = ["step-000002", "step-000010", "step-000014"]
    assert sorted(path.name for path in asynchronous.iterdir()) == steps
    first, second, _ = (content(asynchronous / step) for step in steps)
    assert [content(synchronous / step) for step in steps[:2]] == [first, second]
    model_files = {f"model/model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}
    states = {"optimizer-00000-001.safetensors", "optimizer-00001-001.safetensors"}
    assert {*model_files, *states, "model/model.safetensors.index.json", "model/config.json"} <= set(first)
    assert not any("/." in name or name.count("/") > 1 for name in first), "nothing is left over"
    loaded = AutoModelForCausalLM.from_pretrained(asynchronous / steps[-1] / "model").state_dict()
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    assert all(first[name] != second[name] for name in first if name.endswith(".safetensors"))


def loaded_in_part(trainer: Trainer, fresh: Trainer) -> None:
    """Check that a rank reads its rows of each state, and gets those that it had."""
    read = []
    take = StoredTensor.__getitem__

    def counted(tensor: StoredTensor, rows: Any) -> torch.Tensor:
        read.append(take(tensor, rows))
        return read[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StoredTensor, "__getitem__", counted)
        load_states(fresh.engine, trainer.checkpoints.folder / "step-000014")
    expected, loaded = trainer.moments(), fresh.moments()
    assert loaded.keys() == expected.keys()
    own = {key: value.to_local() if isinstance(value, DTensor) else value for key, value in expected.items()}
    for key, value in loaded.items():
        assert torch.equal(value.to_local() if isinstance(value, DTensor) else value, own[key]), key
    assert sum(tensor.nbytes for tensor in read) == sum(value.nbytes for value in own.values())


def content(checkpoint: Path) -> dict[str, bytes]:
    """Return each file except the manifest, which contains the plan's hash."""
    files = (path for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(checkpoint).as_posix(): path.read_bytes() for path in files}


def gathered_shards(rank: int, topology: Topology) -> None:
    """Check that the rank that writes a tensor gets it whole, for any number of rows."""
    mesh = make_mesh(topology, torch.device("cpu"))
    held = Snapshot(HostBuffers(), rank, ShardGroup(topology))
    shapes = [(4, 2), (5, 3), (1, 4), (3,), (2, 2, 2)]
    tensors = {str(shape): torch.arange(1.0, 1 + math.prod(shape)).reshape(shape) for shape in shapes}
    sharded = [saved(name, distribute_tensor(tensor, mesh, [Shard(0)])) for name, tensor in tensors.items()]
    for number, tensor in enumerate(sharded):
        held.hold(tensor, number % RANKS)
    for tensor in sharded:
        assert tensor.shard is not None
        tensor.shard.to_local().zero_()
    found = {tensor.key: held.take(tensor, number % RANKS) for number, tensor in enumerate(sharded)}
    own = list(tensors)[rank::RANKS]
    assert [name for name, value in found.items() if value is not None] == own
    assert all(torch.equal(found[name], tensors[name]) for name in own)  # type: ignore[arg-type]
    for placement in (Shard(1), Replicate()):
        other = distribute_tensor(tensors["(4, 2)"], mesh, [placement])
        held.hold(replace(saved("other", other), whole=lambda other=other: held_whole(other.full_tensor())), 0)
        whole = held.take(saved("other", other), 0)
        assert (whole is not None) == (rank == 0)
        assert whole is None or torch.equal(whole, tensors["(4, 2)"])
