"""Checkpoints: temporary folder, every file on disk, manifest, rename; what does not fit its manifest does not exist.

RUN/checkpoints/step-000100/
    model/ or adapter/       weights in Hugging Face form
    optimizer-*.safetensors  the optimizer's states by parameter name
    optimizer.json           those that are no tensors
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

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from packhorse.durable import disk_error, size
from packhorse.errors import EXIT_DISK, UserError
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.checkpoints.listing import (
    SoundCheckpoint,
    find_newest_sound,
    newest_complete,
    prune_checkpoints,
    remove_unfinished,
    set_aside_newer,
    step_of,
)
from packhorse.run_folder.checkpoints.manifest import RunFacts
from packhorse.run_folder.checkpoints.publishing import publish_checkpoint
from packhorse.run_folder.layout import (
    CHECKPOINTS_FOLDER,
    OPTIMIZER_FILE,
    PLAN_FILE,
    STATE_FILE,
    WANDB_ID_FILE,
    step_folder_name,
    unfinished_step_folder,
)
from packhorse.track.meter import Clock, Figures
from packhorse.train.checkpoint.background import Background, Others, Part, Share, dealt, fresh_copy, in_files
from packhorse.train.checkpoint.masters import load_masters
from packhorse.train.checkpoint.optimizer_state import gather_states, load_states, scale_of
from packhorse.train.checkpoint.snapshot import HostBuffers, ShardGroup, Snapshot
from packhorse.train.checkpoint.weights import gather_kept, unwrapped, weights_folder_name, weights_writer
from packhorse.train.engine.engine import Engine
from packhorse.train.ranks.failure import agreed_failure
from packhorse.train.ranks.identity import own_rank
from packhorse.train.state import TrainState

# In place of a step, where rank 0 has none to go on from.
NONE_WRITTEN, NONE_IS_SOUND = -1, -2


@dataclass
class _Pending:
    """A checkpoint that is being written.

    Attributes:
        state: What it is of.
        temporary: Where it is written.
        started: When the step loop came to it, on the clock.
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

    `save`, `publish` and `finish` are collectives, and so called by all ranks at the same step. Between them the files
    are written by threads, which wait for other ranks only to put FSDP2's shards together. A checkpoint goes through
    two pieces of work: each rank writes its share; when all have, rank 0 publishes it and removes those no longer kept.
    """

    def __init__(
        self,
        plan: RunPlan,
        engine: Engine,
        is_main: bool,
        still_alive: Callable[[], None] = lambda: None,
        clock: Clock = time.perf_counter,
    ) -> None:
        """Nothing is written yet. A collective under fsdp2 and hsdp.

        Args:
            plan: The run.
            engine: What is saved.
            is_main: Whether this is rank 0.
            still_alive: Called about every second while this rank waits for its disk.
            clock: Where the time comes from.
        """
        self.folder = Path(plan.run_folder) / CHECKPOINTS_FOLDER
        self._plan = plan
        self._engine = engine
        self._is_main = is_main
        self._still_alive = still_alive
        self._clock = clock
        self._section = plan.recipe.checkpoint
        self._buffers = HostBuffers()
        sharded = self._section.asynchronous and plan.topology.engine in ("fsdp2", "hsdp")
        self._shard_group = ShardGroup(plan.topology) if sharded else None
        self._background = Background()
        self._pending: _Pending | None = None
        self._newest_step: int | None = None
        self._loads: list[int] = []
        self._num_failed = 0
        self._figures: Figures = {}

    def save(self, state: TrainState) -> None:
        """Begins the checkpoint of this step; the one before is finished first.

        With `checkpoint.asynchronous` this returns once the state is copied to the host, else once it is published.

        Raises:
            UserError: The disk refuses and `checkpoint.on_full` is `stop`, or what was written is spoilt.
        """
        self.finish()
        if state.step == self._newest_step:
            return
        self._newest_step = state.step
        pending = _Pending(state, unfinished_step_folder(self.folder, state.step), self._clock())
        self._pending = pending
        share, error = self._share(pending)
        failure = self._failure(error)
        if failure is not None:
            self._give_up(failure)
            return
        if self._section.asynchronous:
            self._background.start(share.write)
        else:
            self._background.run(share.write)
        pending.stall_seconds = self._clock() - pending.started
        if not self._section.asynchronous:
            self.finish()

    def pending_done(self) -> bool:
        """Whether this rank has nothing more to write; where all ranks have not, `publish` is due."""
        return self._background.done

    def publish(self, all_done: bool = True) -> None:
        """Goes on with the checkpoint that is being written, if there is one.

        Args:
            all_done: Whether `pending_done` holds on every rank; else nothing happens.

        Raises:
            UserError: As `save`.
        """
        pending = self._pending
        if pending is None or not all_done:
            return
        entered = self._clock()
        failure = self._failure(self._background.take_error())
        if failure is not None:
            self._give_up(failure)
            return
        if not pending.is_written:
            pending.is_written = True
            if self._is_main:
                self._background.start(partial(self._publish, pending))
            pending.stall_seconds += self._clock() - entered
            return
        self._pending = None
        now = self._clock()
        stall = pending.stall_seconds + now - entered
        self._figures |= {"checkpoint/stall_seconds": stall, "checkpoint/seconds": now - pending.started}

    def finish(self) -> None:
        """Waits until nothing is being written; as `publish`."""
        while self._pending is not None:
            entered = self._clock()
            self._background.wait(self._still_alive)
            self._pending.stall_seconds += self._clock() - entered
            self.publish()

    def take_figures(self) -> Figures:
        """What the checkpoints that were published, or given up, since the last call have cost."""
        figures, self._figures = self._figures, {}
        return figures

    def load_optimizer(self, checkpoint: Path) -> None:
        """Puts the optimizer where it was; the weights were loaded with the model.

        Raises:
            UserError: The checkpoint holds states of other weights or, in 8 bits, of another engine or world size.
        """
        self._newest_step = step_of(checkpoint)
        model = unwrapped(self._engine)
        load_states(self._engine, checkpoint)
        load_masters(model, checkpoint / weights_folder_name(self._plan), self._plan.recipe.model.trust_remote_code)

    def _share(self, pending: _Pending) -> tuple[Share, Exception | None]:
        """What this rank writes, and why it cannot; copied to the host where training is to go on meanwhile."""
        error = self._make_room(pending.temporary) if self._is_main else None
        at_once = self._section.asynchronous
        snapshot = Snapshot(self._buffers, own_rank(), self._shard_group) if at_once else None
        weights = gather_kept(self._engine, self._is_main, snapshot)
        (weights_bytes,) = self._engine.sum_over_ranks([float(sum(value.nbytes for value in weights.values()))])
        bytes_before = sum(self._loads)
        self._loads = [int(weights_bytes), *[0] * (self._plan.topology.world_size - 1)]
        others: Others = {}
        states = dealt(gather_states(self._engine, snapshot), self._loads, others)
        if snapshot is not None:
            for key, value, owner in states:
                snapshot.hold_state(key, value, owner)
            share = Share(pending.temporary, own_rank(), in_files(snapshot.states()), snapshot.gather_weights)
        else:
            own = ((key, fresh_copy(value)) for key, value, owner in states if owner == own_rank())
            share = Share(pending.temporary, own_rank(), in_files(own))
        if self._is_main and error is None:
            # Not at once, the states are seen as they are written: as many as at the save before.
            error = _no_room(self.folder, sum(self._loads) if at_once else max(bytes_before, weights_bytes))
        return (self._with_main(share, pending.state, weights, others) if self._is_main else share), error

    def _with_main(self, share: Share, state: TrainState, weights: Part, others: Others) -> Share:
        """The share of rank 0, which writes the weights and the small files too."""
        model = unwrapped(self._engine)
        was_stepped = state.num_supervised_tokens > 0 and state.step > state.num_skipped_steps
        scale = scale_of(self._engine)
        return replace(
            share,
            folders={weights_folder_name(self._plan): weights_writer(model, weights, None, was_stepped=was_stepped)},
            texts={
                STATE_FILE: lambda: json.dumps(asdict(state), indent=2) + "\n",
                OPTIMIZER_FILE: lambda: json.dumps({"states": others, "scaler": scale}, indent=1) + "\n",
            },
        )

    def _make_room(self, temporary: Path) -> OSError | None:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as error:
            return error
        return None

    def _publish(self, pending: _Pending) -> None:
        """On rank 0, in the thread."""
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
        """As `agreed_failure`, with what a user reads where the disk refused."""
        if isinstance(error, (OSError, SafetensorError)):
            assert self._pending is not None
            error = disk_error(self.folder / step_folder_name(self._pending.state.step), error)
        return agreed_failure(self._engine, error)

    def _give_up(self, failure: Exception) -> None:
        """Leaves nothing of the checkpoint that is being written; then as `checkpoint.on_full` says."""
        pending, self._pending = self._pending, None
        assert pending is not None
        if self._is_main:
            shutil.rmtree(pending.temporary, ignore_errors=True)
        of_disk = isinstance(failure, UserError) and failure.exit_code == EXIT_DISK
        if not of_disk or self._section.on_full == "stop":
            raise failure
        self._num_failed += 1
        if self._is_main:
            sys.stderr.write(f"warning: no checkpoint of step {pending.state.step}: {str(failure).splitlines()[0]}\n")
        self._figures["checkpoint/failed"] = self._num_failed


def _no_room(folder: Path, needed_bytes: float) -> OSError | None:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return error
    if free >= needed_bytes:
        return None
    return OSError(errno.ENOSPC, f"{size(needed_bytes)} are needed for a checkpoint")


def checkpoint_to_resume(run_folder: Path, is_main: bool) -> tuple[Path | None, TrainState]:
    """The newest checkpoint that is as it was written, and its state; a fresh state where the run has none.

    A collective: rank 0 reads the files, since a node's ranks would read the same bytes, and the others take its word.
    Checkpoints that are damaged are set aside under another name, so that their step can be written again.

    Raises:
        UserError: There are checkpoints, and none of them is sound.
    """
    folder = run_folder / CHECKPOINTS_FOLDER
    if is_main:
        remove_unfinished(folder)
    found = find_newest_sound(folder) if is_main else SoundCheckpoint(None, ())
    for fault in found.passed_over:
        sys.stderr.write(f"passed over: {fault}\n")
    step = _word_of_rank_0(_step_or(found))
    if step == NONE_IS_SOUND:
        raise UserError(
            f"no checkpoint of {run_folder.name} can be read: {next(iter(found.passed_over), 'see rank 0')}",
            "going on from what is damaged would train another model, and from step 0 is for you to decide.",
            f"look at them with `packhorse verify {run_folder}`; to begin again, remove {folder}.",
        )
    if is_main:
        set_aside_newer(folder, step)
    if step == NONE_WRITTEN:
        return None, TrainState()
    checkpoint = folder / step_folder_name(step)
    return checkpoint, read_state(checkpoint)


def _step_or(found: SoundCheckpoint) -> int:
    if found.checkpoint is not None:
        return step_of(found.checkpoint)
    return NONE_IS_SOUND if found.passed_over else NONE_WRITTEN


def _word_of_rank_0(step: int) -> int:
    if not dist.is_initialized():
        return step
    device = torch.accelerator.current_accelerator() if dist.get_backend() != "gloo" else None
    word = torch.tensor([step], device=device)
    dist.broadcast(word, src=0)
    return int(word.item())


def newest_state(run_folder: Path) -> TrainState:
    """The state of the newest complete checkpoint, whose other files are not read; to tell how far a run is."""
    newest = newest_complete(run_folder / CHECKPOINTS_FOLDER)
    return read_state(newest) if newest else TrainState()


def read_state(checkpoint: Path) -> TrainState:
    """The counters stored with a checkpoint."""
    record = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    return TrainState.of(record)
