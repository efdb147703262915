"""DDP, FSDP2 and DeepSpeed ZeRO behind one interface: backward, step, gradient norm, sums over ranks.

Accelerate wires each of them; the step loop only sees `Engine`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs, PartialState
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from packhorse.plan.run_plan import RunPlan
from packhorse.train.engine.gradient_norm import clip_gradients, gradient_norm
from packhorse.train.engine.joint_optimizer import InBackwardOptimizer
from packhorse.train.engine.launch_proof import (
    assert_device_as_planned,
    assert_launched_as_planned,
    assert_sharded_as_planned,
)
from packhorse.train.engine.precision import refuse_small_loss_scale, scale_on_cpu
from packhorse.train.engine.process_group import GROUP_TIMEOUT, control_group


@dataclass
class Engine:
    """The interface of the step loop to whatever shards the model.

    Attributes:
        accelerator: Accelerate's handle.
        model: The wrapped model.
        optimizer: The optimizer whose learning rate counts.
        gradient_factor: Factor of the loss that undoes the engine's averaging.
        clip_norm: Largest gradient norm, None for no clipping.
        control: Process group on the CPU, for flags and figures that must not wait for a GPU.
        step_was_skipped: Whether the last step was skipped because its gradient overflowed fp16.
        step_was_refused: Whether the last step was skipped because its gradient is not finite; the weights are
            unchanged.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: Optimizer
    gradient_factor: float
    clip_norm: float | None
    control: dist.ProcessGroup | None
    step_was_skipped: bool = False
    step_was_refused: bool = False
    _no_backward: bool = False
    _norm: Tensor | None = None
    _scale_before: float | None = None

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed runs the model; it clips, steps and zeroes inside its own step."""
        return hasattr(self.model, "set_gradient_accumulation_boundary")

    @property
    def device(self) -> torch.device:
        """Device of the micro-batches."""
        device: torch.device = self.accelerator.device
        return device

    @contextmanager
    def micro_step(self, is_last: bool) -> Iterator[None]:
        """Context for forward and backward of one micro-batch; only the last one exchanges gradients."""
        skip = not is_last and not self.is_deepspeed
        with self.accelerator.no_sync(self.model) if skip else nullcontext():
            yield

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass; under DeepSpeed the last one of a step also clips, steps and zeroes."""
        if self.is_deepspeed:
            self.model.backward(loss)  # type: ignore[operator]
            self.model.step()  # type: ignore[operator]
        else:
            self.accelerator.backward(loss)

    def refuse(self) -> None:
        """Replace the backward pass of an engine that steps in it, where the loss is not finite."""
        self._no_backward = True

    @property
    def loss_scale(self) -> float | None:
        """Loss scale of fp16, None under other precisions; waits for the device."""
        if not self.is_deepspeed:
            return self.accelerator.scaler.get_scale() if self.accelerator.scaler else None
        scaled = self.model.fp16_enabled()  # type: ignore[operator]
        return float(self.model.optimizer.loss_scale) if scaled else None  # type: ignore[union-attr, arg-type]

    @property
    def steps_in_backward(self) -> bool:
        """Whether weights change before the norm of the whole gradient is known."""
        return isinstance(self._plain_optimizer, InBackwardOptimizer)

    @property
    def _plain_optimizer(self) -> Optimizer:
        plain: Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # below accelerate's wrapper
        return plain

    def step(self) -> None:
        """Queue clip, step and zero on the device; a gradient that is not finite is only zeroed.

        All ranks decide alike, because the norm is that of the whole gradient. AdamW and fp16's loss scale decide on
        the device; for other optimizers the host must read the norm first, which waits for the device.
        """
        self.step_was_skipped = self.step_was_refused = False
        if self._no_backward:
            self._no_backward, self.step_was_refused = False, True
            self._norm = torch.tensor(math.nan)
        elif self.is_deepspeed:
            self._norm = self._after_deepspeed_step()
        elif isinstance(self._plain_optimizer, InBackwardOptimizer):
            self._norm = self._plain_optimizer.take_norm()
        else:
            self.accelerator.unscale_gradients()
            self._norm = gradient_norm(self.model.parameters())
            if self._may_step(self._norm):
                if self.clip_norm is not None:
                    clip_gradients(self.model.parameters(), self.clip_norm, self._norm)
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _may_step(self, norm: Tensor) -> bool:
        """Return whether to call the optimizer, which may still leave the weights unchanged on the device."""
        if self.accelerator.scaler is not None:
            if self._scale_before is None:
                self._scale_before = self.loss_scale
            return True
        optimizer = self._plain_optimizer
        if isinstance(optimizer, AdamW) and optimizer.defaults["fused"]:
            # Where this is 1, the fused kernel changes no weight, state or step count, as under fp16's loss scale.
            optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
            return True
        return bool(norm.isfinite())

    def finish_step(self, losses: list[Tensor]) -> tuple[float, float]:
        """Wait for the device, once, and learn how the step ended.

        Args:
            losses: Sum of token losses of each micro-batch.

        Returns:
            Sum of the losses of this rank; gradient norm before clipping, under DeepSpeed infinite whenever it is not
            finite.

        Raises:
            UserError: Gradients overflow fp16 at any loss scale.
        """
        assert self._norm is not None, "`step` comes first"
        loss_sum = torch.stack(losses).double().sum()
        norm = self._norm.to(loss_sum.device, torch.float64, non_blocking=True)
        loss, grad_norm = torch.stack([loss_sum, norm]).tolist()
        self._norm = None
        if self._scale_before is not None:
            # Fused optimizers skip a step internally, unseen by accelerate; the scale shrinks in exactly these steps.
            after = self.loss_scale
            assert after is not None
            self.step_was_skipped, self._scale_before = after < self._scale_before, after
            refuse_small_loss_scale(after)
        elif not self.is_deepspeed and not self.steps_in_backward:
            self.step_was_refused |= not math.isfinite(grad_norm)
        return loss, grad_norm

    def _after_deepspeed_step(self) -> Tensor:
        """Read the result of the step inside the last backward; DeepSpeed skips a gradient that is not finite."""
        model: Any = self.model
        skipped = not model.was_step_applied()
        self.step_was_skipped = skipped and self.loss_scale is not None
        self.step_was_refused = skipped and not self.step_was_skipped
        return torch.as_tensor(model.get_global_grad_norm())

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Sum each value over all ranks, in fp64 on the CPU; a collective."""
        if self.control is None:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return [float(value) for value in tensor.tolist()]

    def free(self) -> None:
        """Free model and optimizer, so that another engine can be started; this one is of no use afterwards."""
        if self.is_deepspeed:
            self.model.destroy()  # type: ignore[operator]
        self.model = nn.Module()
        self.optimizer = None  # type: ignore[assignment]
        self.accelerator.free_memory()

    def close(self) -> None:
        """Destroy the process group; without it FSDP2 on gloo sometimes aborts at exit."""
        if dist.is_initialized():
            dist.barrier(group=self.control)
            dist.destroy_process_group()


def start_accelerator(plan: RunPlan) -> Accelerator:
    """Join the process group, and assert that the launch matches the plan.

    Raises:
        UserError: Device, world size or engine differ from the plan.
    """
    assert_device_as_planned(plan)
    plugin = {}
    if plan.deepspeed is not None:
        # Accelerate's own fields would contradict the plan's complete DeepSpeed configuration.
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
        plugin["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=dict(plan.deepspeed))
    on_cpu = plan.topology.device == "cpu"
    if on_cpu and plan.topology.engine in ("fsdp2", "hsdp"):
        _allow_fsdp_on_cpu()
    accelerator = Accelerator(
        # `cpu=True` makes Accelerate choose DDP instead of DeepSpeed, which reads DS_ACCELERATOR=cpu instead.
        cpu=on_cpu and plan.deepspeed is None,
        mixed_precision="no" if plan.recipe.precision == "fp32" else plan.recipe.precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=GROUP_TIMEOUT)],
        **plugin,
    )
    if on_cpu and plan.recipe.precision == "fp16":
        scale_on_cpu(accelerator)
    # Otherwise transformers shards what it loads, or refuses to load it, where the worker shards unit by unit.
    unset_hf_deepspeed_config()
    assert_launched_as_planned(accelerator, plan)
    return accelerator


def _allow_fsdp_on_cpu() -> None:
    """Let Accelerate wire FSDP2 without an accelerator, so that tests on a CPU run the same code as GPUs do.

    Accelerate refuses this combination, while torch's FSDP2 itself runs on gloo.
    """
    state = PartialState(cpu=True, timeout=GROUP_TIMEOUT)
    state._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def start_engine(accelerator: Accelerator, plan: RunPlan, model: nn.Module, optimizer: Optimizer) -> Engine:
    """Shard model and optimizer as planned, and prove it.

    Raises:
        UserError: ZeRO stage, offload, mesh or precision differ from the plan.
    """
    if plan.topology.engine in ("fsdp2", "hsdp"):
        # Sharded while it was loaded; the optimizer already holds the shards.
        prepared_model, prepared_optimizer = model, accelerator.prepare_optimizer(optimizer)
    else:
        prepared_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    assert_sharded_as_planned(prepared_model, plan)
    factor = float(plan.topology.world_size)
    if plan.deepspeed is not None:
        factor *= plan.batch.accumulation_steps
    return Engine(
        accelerator=accelerator,
        model=prepared_model,
        optimizer=prepared_optimizer,
        gradient_factor=factor,
        clip_norm=plan.recipe.optimizer.clip_norm,
        control=control_group(),
    )
