"""Each shipped recipe on 8, 16 and 64 ranks, in one process: torch's fake process group sends nothing.

At full size, model and adapter are made on the meta device, and sharded as fake tensors, which have shapes and no
memory. A step needs numbers, and there a narrow model of the same architecture has two layers: DeepSpeed reads values
of tensors, and bitsandbytes' weights cannot be fake tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import cache
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from packhorse.model.attention import Documents, register_attention
from packhorse.model.load import DTYPES, ModelRequest, Quantization, load_model
from packhorse.model.methods.attach import Start, attach
from packhorse.model.units import units_of
from packhorse.model_spec.configuration import find_configuration
from packhorse.model_spec.parameters import read_shape
from packhorse.model_spec.trainable import count_shape
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.load import load_recipe
from packhorse.recipe.methods import QloraMethod
from packhorse.recipe.shipped import list_recipes
from packhorse.train.engine.optimizer import make_optimizer
from packhorse.train.engine.sharding import Placement, placement_of
from packhorse.train.objectives.token_loss import install_loss_head, loss_sum
from packhorse.train.setup import apply_checkpointing

# Of peft and deepspeed, about names that torch and transformers have changed.
pytestmark = pytest.mark.filterwarnings("ignore")

GPUS = (8, 16, 64)
CPU = torch.device("cpu")
NAMES = [recipe.name for recipe in list_recipes() if not recipe.name.startswith("quickstart/")]
ENGINE = {name: load_recipe(name).parallel.engine for name in NAMES}
SHARDED = [name for name in NAMES if ENGINE[name] != "ddp"]
PACKS = {name: load_recipe(name).batch.packs for name in NAMES}
# What a rank of ddp does is the same in each world: each recipe in one of them, by turns; a rank needs a pack.
STEPS = [
    (name, min(gpus, PACKS[name]))
    for at, name in enumerate(NAMES)
    for gpus in (GPUS if name in SHARDED else [GPUS[at % 3]])
]
# A share takes seconds to make at full size: each recipe in one world by turns, in the others in `make parity`.
SHARES = [
    pytest.param(name, gpus, marks=() if gpus == GPUS[at % 3] else pytest.mark.matrix)
    for at, name in enumerate(SHARDED)
    for gpus in GPUS
]
NARROW = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
}
NUM_TOKENS = 24


@pytest.fixture(autouse=True)
def own_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed puts its own in the place of torch's under ZeRO-3, for good: other tests count what torch's does."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)


def planned(name: str, gpus: int) -> RunPlan:
    return make_plan(load_recipe(name), DeviceRequest(gpus=gpus), Hardware(num_cores=2, gpus=()), None)


def bare(plan: RunPlan, device: str, **changed: int) -> PreTrainedModel:
    """The recipe's architecture."""
    fields = {**(find_configuration(plan.recipe) or {})}
    fields |= {name: value for name, value in changed.items() if name in fields}
    kind = fields.pop("model_type")
    config = AutoConfig.for_model(kind, **fields, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[plan.chosen("model.dtype")], attn_implementation=register_attention("sdpa")
        )


def prepared(plan: RunPlan, model: PreTrainedModel) -> tuple[PreTrainedModel, nn.Module]:
    """The model, and the same with the recipe's method."""
    adapted = attach(model, plan.recipe.method, Start())
    install_loss_head(adapted)
    apply_checkpointing(adapted, plan.recipe.parallel)
    return model, adapted.train()


@contextmanager
def ranks(gpus: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in {"WORLD_SIZE": str(gpus), "RANK": "0", "LOCAL_RANK": "0"}.items():
            patch.setenv(variable, value)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
        try:
            yield
        finally:
            dist.destroy_process_group()
            # Else DeepSpeed takes this world's groups for the next's.
            deepspeed.comm.comm.cdb = None
            for group in ("_WORLD_GROUP", "_DATA_PARALLEL_GROUP", "_ZERO_PARAM_INTRA_PARALLEL_GROUP"):
                setattr(groups, group, None)


@cache
def on_meta(name: str) -> tuple[PreTrainedModel, nn.Module]:
    return prepared(planned(name, 8), bare(planned(name, 8), "meta"))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_made_at_full_size_and_has_the_parameters_that_the_plan_tells(name: str) -> None:
    recipe = load_recipe(name)
    _, adapted = on_meta(name)
    shape = read_shape(find_configuration(recipe))
    assert shape is not None
    counts = count_shape(shape, recipe.method)
    assert counts is not None
    every = list(adapted.parameters())
    assert counts.total == sum(parameter.numel() for parameter in every)
    assert counts.trainable == sum(parameter.numel() for parameter in every if parameter.requires_grad)


@pytest.mark.parametrize(("name", "gpus"), SHARES)
def test_each_rank_holds_its_share_of_it(name: str, gpus: int) -> None:
    plan = planned(name, gpus)
    model, adapted = deepcopy(on_meta(name))  # peft takes longer to make them
    quantized = isinstance(plan.recipe.method, QloraMethod)
    with ranks(gpus):
        placement = placement_of(plan, CPU)
        with FakeTensorMode():
            fake(adapted, quantized)
            num_weights = sum(parameter.numel() for parameter in adapted.parameters())
            place(placement, model, adapted)
            # DeepSpeed holds weights in the type that it computes with.
            whole = sum(whole_size(parameter) * stored(parameter).element_size() for parameter in adapted.parameters())
            assert num_weights == sum(whole_size(parameter) for parameter in adapted.parameters())
            mine = sum(part.numel() for part in held(adapted).values())
    # What does not come out even is filled up.
    assert whole / gpus <= mine <= 1.02 * whole / gpus


def place(placement: Placement, model: PreTrainedModel, adapted: nn.Module) -> None:
    for unit in units_of(model):
        placement.unit([model.get_submodule(part) for part in unit.names], unit.is_last)
    placement.root(adapted)


def fake(model: nn.Module, quantized: bool) -> None:
    """Gives fake tensors to a model on the meta device; four 4-bit weights are stored as one number of 16 bits."""
    known: dict[int, nn.Parameter] = {}
    head = model.get_output_embeddings().weight
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in known:
                packed = quantized and isinstance(module, nn.Linear) and not parameter.requires_grad
                packed = packed and parameter is not head
                shape = (parameter.numel() // 4, 1) if packed else parameter.shape
                empty = torch.empty(shape, dtype=parameter.dtype)
                known[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[name] = known[id(parameter)] if parameter is not None else None
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype) if buffer is not None else None


@pytest.mark.parametrize(("name", "gpus"), STEPS)
def test_it_takes_one_planned_step(name: str, gpus: int, tmp_path: Path) -> None:
    plan = planned(name, gpus)
    model, adapted = prepared(plan, narrow(plan, tmp_path))
    with ranks(gpus):
        place(placement_of(plan, CPU), model, adapted)
        before = held(adapted)
        norm = {"ddp": ddp_step, "fsdp2": fsdp2_step, "zero3": zero3_step}[ENGINE[name]](plan, adapted)
        after = held(adapted)
    assert 0 < norm < float("inf")
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert moved, "no weight of this rank has moved"
    assert moved <= {key for key, parameter in adapted.named_parameters() if parameter.requires_grad}


def narrow(plan: RunPlan, folder: Path) -> PreTrainedModel:
    """Two layers of the architecture with weights, quantised where the recipe says so."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = bare(plan, "cpu", **NARROW)
    if not isinstance(plan.recipe.method, QloraMethod):
        return model
    model.save_pretrained(folder)
    quantization = Quantization("nf4", plan.recipe.method.double_quantization, torch.bfloat16)
    request = ModelRequest(
        str(folder), None, None, 0, torch.bfloat16, register_attention("sdpa"), quantization, False, CPU
    )
    return load_model(request, NARROW["vocab_size"])


def held(model: nn.Module) -> dict[str, Tensor]:
    """The bytes of this rank's part of each weight: among 4-bit ones some read as numbers are none."""
    parts = {}
    for name, parameter in model.named_parameters():
        parts[name] = stored(parameter).detach().clone().reshape(-1).view(torch.uint8)
    return parts


def stored(parameter: nn.Parameter) -> Tensor:
    part: Tensor = getattr(parameter, "ds_tensor", parameter)
    return part.to_local() if isinstance(part, DTensor) else part


def whole_size(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def ddp_step(plan: RunPlan, model: nn.Module) -> float:
    wrapped = DistributedDataParallel(model)
    # DDP's own all-reduce asks the backend for a result, which the fake one does not give.
    wrapped.register_comm_hook(None, lambda _, bucket: averaged(bucket))
    return plain_step(plan, wrapped, model)


def averaged(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def fsdp2_step(plan: RunPlan, model: nn.Module) -> float:
    return plain_step(plan, model, model)


def plain_step(plan: RunPlan, wrapped: nn.Module, model: nn.Module) -> float:
    optimizer = make_optimizer(model, plan.recipe)
    for left in reversed(range(plan.batch.accumulation_steps)):
        waits = wrapped.no_sync() if left and isinstance(wrapped, DistributedDataParallel) else nullcontext()
        with waits, torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(wrapped)
            loss.backward()
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def zero3_step(plan: RunPlan, model: nn.Module) -> float:
    assert plan.deepspeed is not None
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model, plan.recipe),
        config=dict(plan.deepspeed),
        dist_init_required=False,
    )
    assert engine.zero_optimization_stage() == 3
    assert engine.train_batch_size() == plan.topology.world_size * plan.batch.accumulation_steps
    for _ in range(plan.batch.accumulation_steps):
        assert engine.global_steps == 0
        engine.backward(loss_of(engine))
        engine.step()
    assert engine.global_steps == 1
    return float(engine.get_global_grad_norm())


def loss_of(model: nn.Module) -> Tensor:
    ids = torch.arange(NUM_TOKENS)[None]
    documents = Documents((NUM_TOKENS,), torch.tensor([0, NUM_TOKENS], dtype=torch.int32), NUM_TOKENS)
    inputs = {"input_ids": ids, "position_ids": ids, "documents": documents}
    return loss_sum(model, inputs, torch.arange(NUM_TOKENS - 1), ids[0, 1:])
