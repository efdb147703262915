"""Checkpoints: temporary folder, every file on disk, manifest, rename; one that does not match its manifest is ignored.

RUN/checkpoints/step-000100/
    model/ or adapter/       weights in Hugging Face form
    optimizer-*.safetensors  states of the optimizer by parameter name
    optimizer.json           states that are not tensors
    state.json               step and counters
    manifest.json            written last: size and sha256 of each file; engine, world size, plan, data
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from packhorse.durable import disk_error, size
from packhorse.errors import EXIT_DISK, UserError
from packhorse.model.methods.attach import is_adapted
from packhorse.model_spec.stored_weights import INDEX_FILE
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.checkpoints.listing import (
    prune_checkpoints,
    step_of,
)
from packhorse.run_folder.checkpoints.manifest import RunFacts
from packhorse.run_folder.checkpoints.publishing import publish_checkpoint
from packhorse.run_folder.layout import (
    ADAPTER_FOLDER,
    CHECKPOINTS_FOLDER,
    MODEL_FOLDER,
    OPTIMIZER_FILE,
    PLAN_FILE,
    STATE_FILE,
    WANDB_ID_FILE,
    step_folder_name,
    unfinished_step_folder,
)
from packhorse.track.meter import Figures
from packhorse.train.checkpoint.master_weights import load_master_weights
from packhorse.train.checkpoint.model_files import index_of, model_files
from packhorse.train.checkpoint.optimizer_state import load_states, saved_states, scale_of
from packhorse.train.checkpoint.rank_share import BackgroundTask, RankShare
from packhorse.train.checkpoint.saved_tensor import (
    FileTensors,
    PlainStates,
    SavedFile,
    SavedTensor,
    copy_to_host,
    deal_files,
    deal_states,
    gather_files,
)
from packhorse.train.checkpoint.snapshot import HostBuffers, ShardGroup, Snapshot
from packhorse.train.checkpoint.weights import (
    adapter_files_writer,
    gather_saved_weights,
    saved_weights,
    unwrapped,
    weights_folder_name,
)
from packhorse.train.engine.engine import Engine
from packhorse.train.engine.process_group import own_rank
from packhorse.train.ranks.agreement import agreed_failure
from packhorse.train.state import TrainState


@dataclass
class _Pending:
    """A checkpoint that is being written.

    Attributes:
        state: Training state at the checkpoint.
        temporary: Folder that it is written to.
        started: When the step loop began it, `time.perf_counter`.
        stall_seconds: How long the step loop has waited for it so far.
        is_written: Every rank's share is on disk; rank 0 publishes it.
    """

    state: TrainState
    temporary: Path
    started: float
    stall_seconds: float = 0.0
    is_written: bool = False


class Checkpoints:
    """The checkpoints of one run.

    `save`, `publish` and `finish` are collectives, called by all ranks at the same step. Between them threads write the
    files; these wait for other ranks only to gather FSDP2's shards. A checkpoint takes two tasks: each rank writes its
    share; when all have, rank 0 publishes it and removes old ones.
    """

    def __init__(
        self, plan: RunPlan, engine: Engine, is_main: bool, still_alive: Callable[[], None] = lambda: None
    ) -> None:
        """Prepare buffers and groups; a collective under fsdp2 and hsdp.

        `still_alive` is called about every second while this rank waits for its disk.
        """
        self.folder = Path(plan.run_folder) / CHECKPOINTS_FOLDER
        self._plan = plan
        self._engine = engine
        self._is_main = is_main
        self._still_alive = still_alive
        self._section = plan.recipe.checkpoint
        self._buffers = HostBuffers()
        sharded = self._section.asynchronous and plan.topology.engine in ("fsdp2", "hsdp")
        self._shard_group = ShardGroup(plan.topology) if sharded else None
        self._task = BackgroundTask()
        self._pending: _Pending | None = None
        self._newest_step: int | None = None
        self._num_failed = 0
        self._figures: Figures = {}

    def save(self, state: TrainState) -> None:
        """Begin the checkpoint of this step, after finishing the one before.

        With `checkpoint.asynchronous` this returns once the state is copied to the host, otherwise once it is
        published.

        Raises:
            UserError: The disk refuses and `checkpoint.on_full` is `stop`, or the written files are damaged.
        """
        self.finish()
        if state.step == self._newest_step:
            return
        self._newest_step = state.step
        pending = _Pending(state, unfinished_step_folder(self.folder, state.step), time.perf_counter())
        self._pending = pending
        share, error = self._share(pending)
        failure = self._failure(error)
        if failure is not None:
            self._give_up(failure)
            return
        if self._section.asynchronous:
            self._task.start(share.write)
        else:
            self._task.run(share.write)
        pending.stall_seconds = time.perf_counter() - pending.started
        if not self._section.asynchronous:
            self.finish()

    def pending_done(self) -> bool:
        """Return whether this rank has nothing more to write; `publish` is due once that holds on all ranks."""
        return self._task.done

    def publish(self, all_done: bool = True) -> None:
        """Move the checkpoint that is being written one task further, if there is one.

        Args:
            all_done: Whether `pending_done` holds on every rank; otherwise nothing happens.

        Raises:
            UserError: See `save`.
        """
        pending = self._pending
        if pending is None or not all_done:
            return
        entered = time.perf_counter()
        failure = self._failure(self._task.take_error())
        if failure is not None:
            self._give_up(failure)
            return
        if not pending.is_written:
            pending.is_written = True
            if self._is_main:
                self._task.start(partial(self._publish, pending))
            pending.stall_seconds += time.perf_counter() - entered
            return
        self._pending = None
        now = time.perf_counter()
        stall = pending.stall_seconds + now - entered
        self._figures |= {"checkpoint/stall_seconds": stall, "checkpoint/seconds": now - pending.started}

    def finish(self) -> None:
        """Wait until the pending checkpoint is published; raises what `publish` does."""
        while self._pending is not None:
            entered = time.perf_counter()
            self._task.wait(self._still_alive)
            self._pending.stall_seconds += time.perf_counter() - entered
            self.publish()

    def take_figures(self) -> Figures:
        """Return the figures of the checkpoints that were published or abandoned since the last call."""
        figures, self._figures = self._figures, {}
        return figures

    def load_optimizer(self, checkpoint: Path) -> None:
        """Restore the optimizer; the weights were loaded with the model.

        Raises:
            UserError: The checkpoint holds states of other weights or, in 8 bits, of another engine or world size.
        """
        self._newest_step = step_of(checkpoint)
        model = unwrapped(self._engine)
        load_states(self._engine, checkpoint)
        weights = checkpoint / weights_folder_name(self._plan)
        load_master_weights(model, weights, self._plan.recipe.model.trust_remote_code)

    def _share(self, pending: _Pending) -> tuple[RankShare, Exception | None]:
        """Return what this rank writes, and why it cannot; with `asynchronous`, a copy of it on the host.

        Every rank takes every step here even after an error, because most of them are collectives; the ranks agree on
        the error afterwards (`_failure`).
        """
        error = self._make_folder(pending.temporary) if self._is_main else None
        rank = own_rank()
        snapshot = Snapshot(self._buffers, rank, self._shard_group) if self._section.asynchronous else None
        loads = [0] * self._plan.topology.world_size
        adapter, weights = self._weights(snapshot, loads)
        states, plain = saved_states(self._engine)
        dealt = deal_files(weights, loads), deal_states(states, loads)
        files = [[*weights, *states] for weights, states in zip(*dealt, strict=True)]
        if snapshot is not None:
            for owner, own in enumerate(files):
                for tensor in (tensor for file in own for tensor in file.tensors):
                    snapshot.hold(tensor, owner)
        # Without a copy, tensors are gathered while they are written, so that only one file of them exists at a time.
        fetch = snapshot.take if snapshot is not None else partial(_fetch, rank)
        share = RankShare(pending.temporary, rank, gather_files(files, rank, fetch))
        if not self._is_main:
            return share, error
        error = error or _no_room(self.folder, sum(loads))
        return self._with_main(share, pending.state, adapter, weights, plain), error

    def _weights(self, snapshot: Snapshot | None, loads: list[int]) -> tuple[FileTensors, list[SavedFile]]:
        """Return the adapter on rank 0, which alone writes it, or the files of a model; a collective."""
        model = unwrapped(self._engine)
        weights = saved_weights(self._engine)
        if not is_adapted(model):
            return {}, model_files(model, weights, MODEL_FOLDER)
        loads[0] += sum(weight.num_bytes for weight in weights)
        return gather_saved_weights(self._engine, self._is_main, snapshot.copy if snapshot else None), []

    def _with_main(
        self, share: RankShare, state: TrainState, adapter: FileTensors, weights: list[SavedFile], plain: PlainStates
    ) -> RankShare:
        """Return the share of rank 0, which writes the adapter and the small files too."""
        model = unwrapped(self._engine)
        scale = scale_of(self._engine)
        texts = {
            STATE_FILE: lambda: json.dumps(asdict(state), indent=2) + "\n",
            OPTIMIZER_FILE: lambda: json.dumps({"states": plain, "scaler": scale}, indent=1) + "\n",
        }
        if len(weights) > 1:
            texts[f"{MODEL_FOLDER}/{INDEX_FILE}"] = partial(index_of, model, weights)
        if weights:
            return replace(share, texts=texts)
        was_stepped = state.num_supervised_tokens > 0 and state.step > state.num_skipped_steps
        write = adapter_files_writer(model, adapter, was_stepped=was_stepped)
        return replace(share, texts=texts, folders={ADAPTER_FOLDER: write})

    def _make_folder(self, temporary: Path) -> OSError | None:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as error:
            return error
        return None

    def _publish(self, pending: _Pending) -> None:
        """Publish the checkpoint and remove old ones; runs in rank 0's thread."""
        publish_checkpoint(pending.temporary, self._facts(pending.state.step))
        state, section = pending.state, self._section
        best = step_folder_name(state.best_step) if section.keep_best and state.best_step is not None else None
        try:
            prune_checkpoints(self.folder, section.keep_last, best)
        except OSError as error:
            sys.stderr.write(f"warning: an old checkpoint could not be removed: {error}\n")

    def _facts(self, step: int) -> RunFacts:
        run_folder = Path(self._plan.run_folder)
        wandb_id = run_folder / WANDB_ID_FILE
        assert self._plan.data is not None
        return RunFacts(
            step=step,
            engine=self._plan.topology.engine,
            world_size=self._plan.topology.world_size,
            plan=hashlib.sha256((run_folder / PLAN_FILE).read_bytes()).hexdigest(),
            data=self._plan.data.content_hash,
            wandb_id=wandb_id.read_text(encoding="utf-8").strip() if wandb_id.is_file() else None,
        )

    def _failure(self, error: Exception | None) -> Exception | None:
        """Return `agreed_failure` of all ranks, where a disk's error is a UserError."""
        if isinstance(error, (OSError, SafetensorError)):
            assert self._pending is not None
            error = disk_error(self.folder / step_folder_name(self._pending.state.step), error)
        return agreed_failure(self._engine, error)

    def _give_up(self, failure: Exception) -> None:
        """Remove the pending checkpoint; then raise, or continue where `checkpoint.on_full` says so."""
        pending, self._pending = self._pending, None
        assert pending is not None
        if self._is_main:
            shutil.rmtree(pending.temporary, ignore_errors=True)
        is_disk_error = isinstance(failure, UserError) and failure.exit_code == EXIT_DISK
        if not is_disk_error or self._section.on_full == "stop":
            raise failure
        self._num_failed += 1
        if self._is_main:
            sys.stderr.write(f"warning: no checkpoint of step {pending.state.step}: {str(failure).splitlines()[0]}\n")
        self._figures["checkpoint/failed"] = self._num_failed


def _fetch(rank: int, tensor: SavedTensor, owner: int) -> Tensor | None:
    """Return a copy of a whole tensor on the rank that writes it; a collective where it is sharded."""
    with tensor.whole() as value:
        return copy_to_host(value) if owner == rank else None


def _no_room(folder: Path, needed_bytes: float) -> OSError | None:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return error
    if free >= needed_bytes:
        return None
    return OSError(errno.ENOSPC, f"{size(needed_bytes)} are needed for a checkpoint")
