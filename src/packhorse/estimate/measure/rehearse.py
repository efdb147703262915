"""Runs one optimizer step of a planned run as one of its ranks, in one process without the others.

Torch's fake process group (`torch.testing._internal.distributed.fake_pg`) accepts every collective and sends nothing,
so accelerate, DeepSpeed and FSDP2 are set up as on all ranks: with the launch's own environment, meshes and groups,
shards and batch split. A collective returns nothing from other ranks, so loss and gradients are meaningless; memory,
sharding and the collectives are real.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from accelerate.commands import launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

from packhorse.data.packs.loader import StepBatch
from packhorse.errors import UserError
from packhorse.estimate.measure.fake_tensors import measure_shape
from packhorse.estimate.measure.miniature import make_miniature
from packhorse.estimate.measure.rank_tensors import (
    Sizes,
    bytes_of,
    gradient_tensors,
    planned_sizes,
    state_tensors,
    weight_tensors,
)
from packhorse.estimate.weights import list_weights
from packhorse.model.sequence import SequenceGroup, join_sequence_group
from packhorse.model_spec.measured_model import NotMeasuredError
from packhorse.model_spec.parameters import read_shape
from packhorse.plan.run_plan import RunPlan
from packhorse.train.engine.engine import Engine, start_accelerator, start_engine
from packhorse.train.engine.joint_optimizer import InBackwardOptimizer
from packhorse.train.engine.optimizer import make_optimizer
from packhorse.train.engine.process_group import GROUP_TIMEOUT
from packhorse.train.objectives.forward import micro_batch_loss
from packhorse.train.setup import step_loader, training_model
from packhorse.train.worker import quiet_libraries

CPU: Final = torch.device("cpu")
NOT_REHEARSED: Final = ("zero3_offload", "zero3_nvme")


@dataclass(frozen=True)
class Rehearsal:
    """One step of one rank with the small model.

    Attributes:
        rank: Rank that was rehearsed.
        world_size: Number of ranks.
        runs: The engine's own report: class, stage, formats, accumulation.
        groups: Ranks of each group that contains this one, by name.
        passes: Packs of each pass of this rank.
        num_parameters: Parameters of the small model, unsharded, with its adapter.
        held: Bytes on this rank, by component.
        planned: Bytes that the plan counts, by component; None where it cannot.
        collectives: Number of calls of each collective in the step.
    """

    rank: int
    world_size: int
    runs: Mapping[str, str]
    groups: Mapping[str, tuple[int, ...]]
    passes: tuple[int, ...]
    num_parameters: int
    held: Sizes
    planned: Sizes | None
    collectives: Mapping[str, int]


def rehearse(plan: RunPlan, configuration: Mapping[str, Any] | None, rank: int = 0) -> Rehearsal:
    """Run one step as `rank`, in a separate process: its environment and libraries are changed permanently.

    Args:
        plan: Plan of the run.
        configuration: Configuration of its model, as in config.json.
        rank: Rank below the plan's number of processes.

    Raises:
        UserError: The engine or the architecture cannot be rehearsed, or the engine differs from the plan.
    """
    engine = plan.topology.engine
    if engine in NOT_REHEARSED:
        raise UserError(
            f"parallel.engine is {engine}, which cannot be rehearsed.",
            "DeepSpeed compiles its host optimizer or opens its files before the first step.",
            "set parallel.engine=zero3, which shards in the same way.",
        )
    kind = plan.recipe.objective.kind
    if kind != "sft":
        raise UserError(
            f"objective is {kind}, which cannot be rehearsed.",
            "a rehearsal runs a step with the loss per token, and no reference model or teacher.",
            "rehearse the engine with objective=sft, which is sharded in the same way.",
        )
    quiet_libraries(is_main=True)
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about its own names
    with tempfile.TemporaryDirectory(prefix="packhorse-rehearsal-") as folder:
        small = make_miniature(plan, configuration, Path(folder))
        planned = _planned(small)  # before DeepSpeed replaces torch's linear layers by its own
        os.environ.update(rank_environment(small, rank))
        if small.deepspeed is not None:
            _disable_rank_checks()
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=small.topology.world_size)
        try:
            return _step(small, rank, planned)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _disable_rank_checks() -> None:
    """Disable what needs other ranks: DeepSpeed's comparison of module order, and its shared memory."""
    import_module("deepspeed").ops.__compatible_ops__["deepspeed_shm_comm"] = False
    coordinator: Any = import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
    coordinator.assert_ints_same_as_other_ranks = lambda ints: None


def rank_environment(plan: RunPlan, rank: int) -> dict[str, str]:
    """Return the variables that `accelerate launch` with the plan's arguments sets for a rank."""
    topology = plan.topology
    per_node = topology.processes_per_node
    rank_variables = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % per_node),
        "WORLD_SIZE": str(topology.world_size),
        "LOCAL_WORLD_SIZE": str(per_node),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",  # not used: nothing listens on it
    }
    if topology.world_size == 1 and topology.engine in ("single", "ddp"):
        return plan.env
    argv = [*plan.argv[2:4], "--main_process_port", "0", *plan.argv[4:]]
    parsed = launch.launch_command_parser().parse_args(argv)
    arguments, _, _ = launch._validate_launch_command(parsed)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""  # the plan's own JSON has all fields
        variables: dict[str, str] = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        variables = prepare_multi_gpu_env(arguments)
    return {**variables, **plan.env, **rank_variables}


def _planned(plan: RunPlan) -> Sizes | None:
    """Return what the plan counts for the small model; None where it cannot count it."""
    assert plan.base_model is not None
    text = (Path(plan.base_model) / "config.json").read_text(encoding="utf-8")
    try:
        shape = read_shape(json.loads(text)) or measure_shape(text)
    except NotMeasuredError:
        return None
    weights = list_weights(plan, shape)
    return None if weights is None else planned_sizes(plan, weights)


def _step(plan: RunPlan, rank: int, planned: Sizes | None) -> Rehearsal:
    assert plan.data is not None
    accelerator = start_accelerator(plan)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(plan.data.tokenizer)
    model = training_model(plan, tokenizer, CPU, None, lambda: None)
    optimizer = make_optimizer(model, plan.recipe)
    engine = start_engine(accelerator, plan, model, optimizer)
    if isinstance(optimizer, InBackwardOptimizer):
        optimizer.step_in_backward()
    if isinstance(engine.model, DistributedDataParallel):
        # DDP's own all-reduce needs a result from the backend, which the fake one does not give.
        engine.model.register_comm_hook(None, lambda _, bucket: _all_reduced(bucket))
    sequence = join_sequence_group(plan.topology.sequence, GROUP_TIMEOUT)
    batch = _batch(plan, rank)
    seen = Collectives()
    with seen:
        gradients = _train(engine, batch, sequence)
        engine.step()
    held = {
        "weights": bytes_of(weight_tensors(model)),
        "gradients": gradients,
        "optimizer": bytes_of(state_tensors(engine)),
    }
    return Rehearsal(
        rank=rank,
        world_size=plan.topology.world_size,
        runs=_engine_report(engine),
        groups=_groups(engine.model, sequence),
        passes=tuple(len(micro_batch.document_lengths) for micro_batch in batch.micro_batches),
        num_parameters=sum(int(getattr(each, "ds_numel", each.numel())) for each in model.parameters()),
        held=held,
        planned=planned,
        collectives=dict(seen.counts),
    )


def _batch(plan: RunPlan, rank: int) -> StepBatch:
    """Return this rank's share of the first step, from the worker's loader."""
    loader = step_loader(plan, rank, pinned=False)
    try:
        return loader.step(0)
    finally:
        loader.close()


def _train(engine: Engine, batch: StepBatch, sequence: SequenceGroup | None) -> int:
    """Run all passes of a step as the step loop does; return the bytes of the gradients before the update."""
    factor, count = engine.gradient_factor / batch.divisor, len(batch.micro_batches)
    gradients = 0
    for index, micro_batch in enumerate(batch.micro_batches, start=1):
        with engine.micro_step(is_last=index == count):
            loss = micro_batch_loss(engine.model, micro_batch, CPU, sequence) * factor
            if engine.is_deepspeed and index == count:
                engine.model.backward(loss)  # type: ignore[operator]
                gradients = bytes_of(gradient_tensors(engine))
                engine.model.step()  # type: ignore[operator]
            else:
                engine.backward(loss)
    return gradients or bytes_of(gradient_tensors(engine))


def _all_reduced(bucket: Any) -> torch.futures.Future[Tensor]:  # noqa: ANN401
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _engine_report(engine: Engine) -> dict[str, str]:
    """Return the engine's own description of itself."""
    model: Any = engine.model
    report = {"class": type(model).__name__}
    if engine.is_deepspeed:
        report |= {
            "ZeRO stage": str(model.zero_optimization_stage()),
            "data-parallel ranks": str(model.dp_world_size),
            "accumulation": str(model.gradient_accumulation_steps()),
            "train_batch_size": str(model.train_batch_size()),
            "bf16": str(model.bfloat16_enabled()),
            "clipping": str(model.gradient_clipping()),
        }
    meshes = {each.device_mesh for each in model.parameters() if isinstance(each, DTensor)}
    report |= {"mesh": " and ".join(sorted(_mesh_text(mesh) for mesh in meshes))} if meshes else {}
    return report


def _mesh_text(mesh: Any) -> str:  # noqa: ANN401
    return " x ".join(f"{size} {name}" for name, size in zip(mesh.mesh_dim_names, mesh.shape, strict=True))


def _groups(model: nn.Module, sequence: SequenceGroup | None) -> dict[str, tuple[int, ...]]:
    groups: dict[str, tuple[int, ...]] = {}
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            for name in mesh.mesh_dim_names or ():
                groups[name] = tuple(dist.get_process_group_ranks(mesh.get_group(name)))
    if hasattr(model, "seq_data_parallel_group"):
        groups["shard"] = tuple(dist.get_process_group_ranks(model.seq_data_parallel_group))  # type: ignore[arg-type]
    if sequence is not None:
        groups["sequence"] = tuple(dist.get_process_group_ranks(sequence.group))
    return groups


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every collective that is started, by any library.

    Attributes:
        counts: Number of calls by name.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Run the operator."""
        space, _, name = str(func.name()).partition("::")
        if space in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            self.counts.update(kind for kind, form in _COLLECTIVES.items() if form.fullmatch(name))
        return func(*args, **(kwargs or {}))


# As in c10d and in functional collectives: `_allgather_base_`, `all_gather_into_tensor`.
_COLLECTIVES: Final = {
    "reduce-scatter": re.compile(r"_?reduce_scatter_.*"),
    "all-reduce": re.compile(r"all_?reduce.*"),
    "all-gather": re.compile(r"_?all_?gather_.*"),
    "all-to-all": re.compile(r"all_?to_?all_.*"),
    "reduce": re.compile(r"reduce_"),
    "broadcast": re.compile(r"broadcast_"),
    "barrier": re.compile(r"barrier"),
}
