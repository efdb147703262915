"""DDP, FSDP2 and DeepSpeed ZeRO behind one name: backward, step, gradient norm, and proof of what runs.

Accelerate wires each of them; the step loop sees none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs, PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from packhorse.errors import UserError
from packhorse.plan.run_plan import RunPlan

GROUP_TIMEOUT = timedelta(minutes=30)


@dataclass
class Engine:
    """What the step loop asks of whatever shards the model.

    Attributes:
        accelerator: Accelerate's handle.
        model: The wrapped model.
        optimizer: The optimizer whose learning rate counts.
        gradient_factor: What the loss is multiplied by to undo the engine's averaging.
        control: Process group on the CPU, for flags and figures that must not wait for a GPU.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: Optimizer
    gradient_factor: float
    clip_norm: float | None
    control: dist.ProcessGroup | None

    @property
    def is_deepspeed(self) -> bool:
        """DeepSpeed clips, steps and zeroes inside its own step."""
        return hasattr(self.model, "set_gradient_accumulation_boundary")

    @property
    def device(self) -> torch.device:
        """Where micro-batches go."""
        device: torch.device = self.accelerator.device
        return device

    @contextmanager
    def micro_step(self, is_last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch; gradients are exchanged with the last one only."""
        skip = not is_last and not self.is_deepspeed
        with self.accelerator.no_sync(self.model) if skip else nullcontext():
            yield

    def backward(self, loss: Tensor) -> None:
        """Backward pass; under DeepSpeed the last one of a step also clips, steps and zeroes."""
        if self.is_deepspeed:
            self.model.backward(loss)  # type: ignore[operator]
            self.model.step()  # type: ignore[operator]
        else:
            self.accelerator.backward(loss)

    def step(self) -> Tensor | float:
        """Clips, steps, zeroes; returns the gradient norm before clipping."""
        if self.is_deepspeed:
            whole: Tensor | float = self.model.get_global_grad_norm()  # type: ignore[operator]
            return whole
        norm: Tensor = self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip_norm or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Sums each figure over all ranks, in fp64 on the CPU."""
        if self.control is None:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return [float(value) for value in tensor.tolist()]

    def close(self) -> None:
        """Ends the process group in order: FSDP2 on gloo sometimes aborts at exit otherwise."""
        if dist.is_initialized():
            dist.barrier(group=self.control)
            dist.destroy_process_group()


def start_accelerator(plan: RunPlan) -> Accelerator:
    """Joins the process group and asserts that what runs is what was planned.

    Raises:
        UserError: World size or engine differ from the plan.
    """
    plugin = {}
    if plan.deepspeed is not None:
        # Its fields would contradict the plan's complete DeepSpeed configuration.
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
        plugin["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=dict(plan.deepspeed))
    on_cpu = plan.topology.device == "cpu"
    if on_cpu and plan.topology.engine == "fsdp2":
        _allow_fsdp_on_cpu()
    accelerator = Accelerator(
        # `cpu=True` makes Accelerate take DDP in place of DeepSpeed; there DS_ACCELERATOR=cpu says it.
        cpu=on_cpu and plan.deepspeed is None,
        mixed_precision="bf16" if plan.recipe.precision == "bf16" else "no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=GROUP_TIMEOUT)],
        **plugin,
    )
    _assert_as_planned(accelerator, plan)
    return accelerator


def _allow_fsdp_on_cpu() -> None:
    """Accelerate shards only where it sees an accelerator; torch's FSDP2 itself runs on gloo.

    With this, tests without a GPU run the same wiring as GPUs do.
    """
    state = PartialState(cpu=True, timeout=GROUP_TIMEOUT)
    state._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def _assert_as_planned(accelerator: Accelerator, plan: RunPlan) -> None:
    world = dist.get_world_size() if dist.is_initialized() else 1
    wanted = plan.topology.world_size
    if world != wanted:
        raise UserError(
            f"the plan is for {wanted} processes and {world} were started.",
            "each process trains on its share of the packs; with another number some would be used twice or never.",
            f"add --num_processes {wanted} to accelerate launch, or use `packhorse train`, which does.",
        )
    family = {"d": "ddp", "z": "deepspeed", "f": "fsdp"}[plan.topology.engine[0]]
    runs = str(accelerator.distributed_type.value).lower()
    actual = "deepspeed" if "deepspeed" in runs else "fsdp" if "fsdp" in runs else "ddp"
    if actual != family:
        raise UserError(
            f"the plan's engine is {plan.topology.engine} and Accelerate started {runs}.",
            "a launch that looks right can take another engine without a word, and then shards nothing.",
            f"launch with --config_file accelerate_configs/{plan.topology.engine}.yaml, or use `packhorse train`.",
        )


def start_engine(accelerator: Accelerator, plan: RunPlan, model: nn.Module, optimizer: Optimizer) -> Engine:
    """Shards model and optimizer as planned, and checks the stage that really runs.

    Raises:
        UserError: DeepSpeed runs another ZeRO stage than planned.
    """
    prepared_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    factor = float(plan.topology.world_size)
    if plan.deepspeed is not None:
        _assert_stage(prepared_model, plan)
        factor *= plan.batch.accumulation_steps
    return Engine(
        accelerator=accelerator,
        model=prepared_model,
        optimizer=prepared_optimizer,
        gradient_factor=factor,
        clip_norm=plan.recipe.optimizer.clip_norm,
        control=_control_group(),
    )


def _assert_stage(model: Any, plan: RunPlan) -> None:  # noqa: ANN401
    assert plan.deepspeed is not None
    wanted, actual = plan.deepspeed["zero_optimization"]["stage"], model.zero_optimization_stage()
    if wanted != actual:
        raise UserError(
            f"the plan's engine is {plan.topology.engine} (ZeRO-{wanted}) and DeepSpeed runs ZeRO-{actual}.",
            "another stage holds other memory than planned.",
            f"launch with --config_file accelerate_configs/{plan.topology.engine}.yaml, or use `packhorse train`.",
        )


def _control_group() -> dist.ProcessGroup | None:
    if not dist.is_initialized():
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
    return group
