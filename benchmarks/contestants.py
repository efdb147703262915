"""The contestants of step_loop.py, each in a process of its own: the same weights, the same packs, one thread.

Each waits at a gate after its warm-up step and after every round, where its CPU clock is read; so they take turns, and
start-up is measured for none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import LinearCrossEntropyOptions
from torch.optim import AdamW
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from packhorse.data.packs.batches import BatchPlan
from packhorse.data.packs.loader import IGNORED_LABEL, MicroBatch, make_micro_batch
from packhorse.data.packs.store import open_store
from packhorse.data.render.render import load_tokenizer
from packhorse.model.attention import Documents, register_attention
from packhorse.model.load import load_model
from packhorse.plan.run_plan import RunPlan, read_plan
from packhorse.track.meter import Figures, resident_peak_bytes
from packhorse.train import worker
from packhorse.train.objectives.token_loss import CHUNK_TOKENS
from packhorse.train.ranks.signals import StopRequest
from packhorse.train.reporter import Reporter
from packhorse.train.setup import base_request
from packhorse.train.state import TrainState


@dataclass(frozen=True)
class Reading:
    """One round of one contestant: CPU seconds of all its threads, tokens, and the loss of its last step."""

    cpu_seconds: float
    num_tokens: int
    num_supervised_tokens: int
    loss: float
    peak_bytes: int

    @property
    def speed(self) -> float:
        """Real tokens per CPU second."""
        return self.num_tokens / self.cpu_seconds


AtStep = Callable[[int, int, float], None]
"""Takes tokens, supervised tokens and loss of a finished step."""


class Gate:
    """Holds a contestant after its warm-up step and after every round."""

    def __init__(self, pipe: Connection, steps_per_round: int) -> None:
        self._pipe, self._steps_per_round = pipe, steps_per_round
        self._num_steps = 0
        self._start()

    def step(self, num_tokens: int, num_supervised_tokens: int, loss: float) -> None:
        """Counts a step; waits for the next turn where the round is over."""
        self._num_tokens += num_tokens
        self._num_supervised_tokens += num_supervised_tokens
        round_is_over = self._num_steps % self._steps_per_round == 0  # step 0 is the warm-up
        self._num_steps += 1
        if not round_is_over:
            return
        seconds = time.process_time() - self._began
        self._pipe.send(Reading(seconds, self._num_tokens, self._num_supervised_tokens, loss, resident_peak_bytes()))
        if not self._pipe.recv():
            raise SystemExit
        self._start()

    def _start(self) -> None:
        self._num_tokens = self._num_supervised_tokens = 0
        self._began = time.process_time()


class Workload:
    """The steps that the batch plan fixes, as the loader's own tensors, one pack a pass; of this rank's packs alone."""

    def __init__(self, plan: RunPlan, rank: int = 0) -> None:
        assert plan.data is not None
        assert plan.num_steps is not None
        self.num_steps = plan.num_steps
        self._store = open_store(Path(plan.data.folder), "train")
        self.packs_per_step = plan.batch.packs_per_step
        self._rank, self.world_size = rank, plan.topology.world_size
        self._batch_plan = BatchPlan(self._store.pack_costs, self.packs_per_step, plan.recipe.seed)

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step, in the order in which our loader gives them."""
        return [make_micro_batch(self._store, packs) for packs in self._shares(step)]

    def counts(self, step: int) -> tuple[int, int]:
        """Tokens and supervised tokens of a step."""
        packs = self._shares(step).ravel()
        return int(self._store.pack_tokens[packs].sum()), int(self._store.pack_labels[packs].sum())

    def supervised_of_all_ranks(self, step: int) -> int:
        """Supervised tokens of the whole step."""
        packs = self._batch_plan.packs(step)
        return int(self._store.pack_labels[packs].sum())

    def documents(self) -> Iterator[dict[str, list[int]]]:
        """Ids and unshifted labels of each document of all steps."""
        for step in range(self.num_steps):
            for pack in self._shares(step).ravel().tolist():
                for index in self._store.documents_of(pack).tolist():
                    ids, supervised = self._store.document(index)
                    labels = [token if on else IGNORED_LABEL for token, on in zip(ids.tolist(), supervised.tolist())]
                    yield {"input_ids": ids.tolist(), "labels": labels}

    def _shares(self, step: int) -> Any:  # noqa: ANN401
        return self._batch_plan.share(step, self.world_size, self.packs_per_step // self.world_size)[self._rank]


def run_contestant(name: str, run_folder: Path, pipe: Connection, steps_per_round: int) -> None:
    """Trains as contestant `name` until the gate ends the process."""
    assert torch.get_num_threads() == 1
    plan = read_plan(run_folder)
    CONTESTANTS[name](plan, Workload(plan), Gate(pipe, steps_per_round).step)


def train_ours(plan: RunPlan, workload: Workload, gate: AtStep) -> None:
    """The worker itself, whole: engine, probe, meter, loader, metrics file, status file, stop agreement."""

    class GatedReporter(Reporter):
        def step(self, state: TrainState, figures: Figures) -> None:
            super().step(state, figures)
            gate(*workload.counts(state.step - 1), figures["train/loss"])

    worker.Reporter = GatedReporter  # type: ignore[attr-defined]
    worker.run_worker(Path(plan.run_folder) / "plan.json", StopRequest())


def train_bare_plain(plan: RunPlan, workload: Workload, gate: AtStep) -> None:
    """A bare torch loop: the model's own loss, SDPA, documents kept apart by position_ids."""
    model = _fresh_model(plan, "sdpa")

    def loss_of(micro_batch: MicroBatch, num_supervised_tokens: int) -> Tensor:
        batch = _as_transformers(micro_batch)
        return model(**batch, use_cache=False, num_items_in_batch=num_supervised_tokens).loss  # type: ignore[no-any-return]

    _bare_loop(model, loss_of, workload, gate)


def train_bare_chunked(plan: RunPlan, workload: Workload, gate: AtStep) -> None:
    """A bare torch loop with our attention and torch's chunked loss on the supervised positions."""
    model: Any = _fresh_model(plan, register_attention("sdpa"))
    options = LinearCrossEntropyOptions(batch_chunk_size=CHUNK_TOKENS)

    def loss_of(micro_batch: MicroBatch, num_supervised_tokens: int) -> Tensor:
        documents = Documents(micro_batch.document_lengths, micro_batch.cu_seq_lens, micro_batch.max_length)
        inputs = {"input_ids": micro_batch.input_ids, "position_ids": micro_batch.position_ids}
        hidden = model.model(**inputs, documents=documents, use_cache=False).last_hidden_state[0]
        chosen = micro_batch.labels[0] != IGNORED_LABEL
        labels = micro_batch.labels[0, chosen]
        loss = F.linear_cross_entropy(hidden[chosen], model.lm_head.weight, labels, reduction="sum", options=options)
        return loss / num_supervised_tokens

    _bare_loop(model, loss_of, workload, gate)


def train_hf_trainer(plan: RunPlan, workload: Workload, gate: AtStep) -> None:
    """Hugging Face's Trainer on the packs."""
    steps = range(workload.num_steps)
    packs = [_as_transformers(micro_batch) for step in steps for micro_batch in workload.micro_batches(step)]
    trainer = _GatedTrainer(
        model=_fresh_model(plan, "sdpa"),
        args=TrainingArguments(**_trainer_settings(plan), remove_unused_columns=False),
        train_dataset=packs,
        data_collator=_only,
    )
    trainer.add_callback(_AtGate(trainer, gate))
    trainer.train()


def train_trl(plan: RunPlan, workload: Workload, gate: AtStep) -> None:
    """TRL's SFTTrainer on the rows of the packs, which it packs itself: best fit, flattened, no padding."""
    # Only here: its import costs 10 s of CPU and 500 MB that the others need not carry.
    from trl import SFTConfig, SFTTrainer

    class GatedSftTrainer(_Counting, SFTTrainer):  # type: ignore[misc]
        pass

    assert plan.data is not None
    settings = SFTConfig(
        **_trainer_settings(plan),
        packing=True,
        packing_strategy="bfd",
        max_length=plan.batch.length_tokens,
        gradient_checkpointing=False,
    )
    trainer = GatedSftTrainer(
        model=_fresh_model(plan, "sdpa"),
        args=settings,
        train_dataset=Dataset.from_list(list(workload.documents())),
        processing_class=load_tokenizer(Path(plan.data.tokenizer), plan.recipe.data.template),
    )
    trainer.add_callback(_AtGate(trainer, gate))
    trainer.train()


CONTESTANTS: dict[str, Callable[[RunPlan, Workload, AtStep], None]] = {
    "ours": train_ours,
    "bare": train_bare_plain,
    "bare-chunked": train_bare_chunked,
    "trainer": train_hf_trainer,
    "trl": train_trl,
}


def _bare_loop(
    model: nn.Module, loss_of: Callable[[MicroBatch, int], Tensor], workload: Workload, gate: AtStep
) -> None:
    """Nothing but forward, backward, clip and step; every tensor is made beforehand."""
    steps = [
        (workload.micro_batches(step), workload.counts(step), workload.supervised_of_all_ranks(step))
        for step in range(workload.num_steps)
    ]
    parameters = list(model.parameters())
    matrices, vectors = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=1e-4, weight_decay=0.01, fused=True)
    for micro_batches, (num_tokens, num_supervised_tokens), num_of_all in steps:
        total = 0.0
        for micro_batch in micro_batches:
            loss = loss_of(micro_batch, num_of_all)
            loss.backward()
            total += loss.item()
        if dist.is_initialized():
            for parameter in parameters:
                dist.all_reduce(parameter.grad)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gate(num_tokens, num_supervised_tokens, total)


def _fresh_model(plan: RunPlan, attention: str) -> nn.Module:
    assert plan.data is not None
    tokenizer = load_tokenizer(Path(plan.data.tokenizer), plan.recipe.data.template)
    request = base_request(plan, torch.device("cpu"), tokenizer, attention)
    model = load_model(request, len(tokenizer))
    model.config.use_cache = False
    return model.train()


def _as_transformers(micro_batch: MicroBatch) -> dict[str, Tensor]:
    """Labels as transformers has them: not shifted, and never the first token of a document."""
    labels = torch.full_like(micro_batch.labels, IGNORED_LABEL)
    labels[:, 1:] = micro_batch.labels[:, :-1]
    return {"input_ids": micro_batch.input_ids, "position_ids": micro_batch.position_ids, "labels": labels}


def _trainer_settings(plan: RunPlan) -> dict[str, Any]:
    """What makes the Trainers do our work and nothing beside it; their fused AdamW is kept."""
    return {
        "output_dir": plan.run_folder,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": plan.batch.accumulation_steps,
        "max_steps": plan.num_steps,
        "learning_rate": plan.recipe.optimizer.learning_rate,
        "weight_decay": plan.recipe.optimizer.weight_decay,
        "max_grad_norm": plan.recipe.optimizer.clip_norm,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _only(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    (example,) = examples
    return example


class _Counting:
    """Mixed into a Trainer: counts the tokens that really went through, and the step's loss."""

    num_tokens = num_supervised_tokens = 0
    step_loss = 0.0

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *rest: Any) -> Tensor:  # noqa: ANN401
        self.num_tokens += inputs["input_ids"].numel()  # flattened: there is no padding
        self.num_supervised_tokens += int((inputs["labels"][:, 1:] != IGNORED_LABEL).sum())
        loss = super().training_step(model, inputs, *rest)  # type: ignore[misc]
        self.step_loss += float(loss)
        return loss  # type: ignore[no-any-return]


class _GatedTrainer(_Counting, Trainer):  # type: ignore[misc]
    def _get_train_sampler(self, *_: object) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class _AtGate(TrainerCallback):  # type: ignore[misc]
    def __init__(self, trainer: Any, gate: AtStep) -> None:  # noqa: ANN401
        self._trainer, self._gate = trainer, gate

    def on_step_end(self, *_: object, **__: object) -> None:
        trainer = self._trainer
        counted = trainer.num_tokens, trainer.num_supervised_tokens, trainer.step_loss
        trainer.num_tokens = trainer.num_supervised_tokens = 0
        trainer.step_loss = 0.0
        self._gate(*counted)
