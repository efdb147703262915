"""Bytes that a rank really holds: weights, gradients, optimizer states, and what is kept for the backward pass."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from packhorse.data.packs.loader import MicroBatch, lay_out
from packhorse.estimate.activations import count_activations
from packhorse.estimate.measure.rank_tensors import (
    bytes_of,
    gradient_tensors,
    planned_sizes,
    state_tensors,
    weight_tensors,
)
from packhorse.estimate.packs import PackFigures
from packhorse.estimate.weights import WeightTensor, compute_width, list_weights
from packhorse.launching.local.environment import FOLDER_VARIABLE, extensions_folder, remove_abandoned_locks
from packhorse.model_spec.parameters import Shape, read_shape
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import DataFacts, RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.schema import Recipe
from packhorse.train.engine.engine import start_accelerator, start_engine
from packhorse.train.engine.optimizer import make_optimizer
from packhorse.train.objectives.forward import micro_batch_loss
from packhorse.train.setup import training_model

CPU = torch.device("cpu")
SMALL_BUCKET = 2**16
Figures = dict[str, int]
METHODS: dict[str, Any] = {
    "full": "full",
    "partial": {"kind": "partial", "last_layers": 1},
    "lora": "lora",
    "lora without dropout": {"kind": "lora", "dropout": 0.0, "target": ["q_proj", "v_proj"]},
    "dora": {"kind": "lora", "dora": True, "dropout": 0.0},
    "dora with dropout": {"kind": "lora", "dora": True},
    "lora and whole ends": {"kind": "lora", "dropout": 0.0, "train_also": ["lm_head", "embed_tokens"]},
    "qlora": "qlora",
    "qlora int8": {"kind": "qlora", "quantization": "int8"},
    "qlora dora with dropout": {"kind": "qlora", "dora": True},
    "ia3": "ia3",
    "prompt": "prompt_tuning",
    "prefix": "prefix_tuning",
}


def save_model(folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """A model with random weights in Hugging Face form."""
    fields = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, **config}
    kind = fields.pop("model_type")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), dtype=dtype).save_pretrained(folder)


def plan_of(folder: Path, lengths: Sequence[int], processes: int = 1, **sections: Any) -> RunPlan:
    """A plan on the CPU whose pass is one pack of documents of these lengths; 1 pack a step and process."""
    length = sum(lengths)
    fields = {
        "name": "r",
        "model": {"path": str(folder)},
        "data": {"sources": [{"path": "r.jsonl"}]},
        "optimizer": {"learning_rate": 1e-4, "clip_norm": 1.0},
        "steps": 2,
        "batch": {"length": length, "packs": processes, "micro": 1},
        **sections,
    }
    fields["parallel"] = {"engine": "single", **sections.get("parallel", {}), "processes": processes}
    counts = {"num_rows": 4, "num_packs": 4, "num_tokens": 4 * length, "num_supervised_tokens": 4 * length}
    data = DataFacts(folder=str(folder), content_hash="0", tokenizer=str(folder), fill=1.0, **counts)
    plan = make_plan(Recipe.model_validate(fields), DeviceRequest(), Hardware(num_cores=2, gpus=()), data)
    if plan.deepspeed is None:
        return plan
    # Buckets and limits for a small model: what is in the buckets is known, and all of its weights would stay gathered.
    zero = {**plan.deepspeed["zero_optimization"], "reduce_bucket_size": SMALL_BUCKET}
    if zero["stage"] == 3:
        zero |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    return plan.model_copy(update={"deepspeed": {**plan.deepspeed, "zero_optimization": zero}})


def shape_of(folder: Path) -> Shape:
    """Of a model on disk."""
    shape = read_shape(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    assert shape is not None
    return shape


def figures_of(lengths: Sequence[int]) -> PackFigures:
    """Of one pack of documents of these lengths."""
    squares = sum(length**2 for length in lengths)
    full = PackFigures.full(sum(lengths))
    return replace(full, supervised_max=sum(lengths) - len(lengths), squares_max=squares, longest_document=max(lengths))


def predicted(plan: RunPlan, folder: Path, lengths: Sequence[int]) -> Figures:
    """Return the planned bytes by component."""
    return predicted_of(plan, shape_of(folder), figures_of(lengths))


def predicted_of(plan: RunPlan, shape: Shape, packs: PackFigures) -> Figures:
    """Return the planned bytes of a model of this shape by component."""
    held = list_weights(plan, shape)
    assert held is not None
    kept = count_activations(plan, shape, held, packs)
    return planned_sizes(plan, held) | {
        "activations": kept.kept + kept.loss_gradients,
        "gathered": gathered(plan, held),
    }


def gathered(plan: RunPlan, held: Sequence[WeightTensor]) -> int:
    """Bytes of whole weights that an engine leaves to the backward pass, which starts with the output head.

    FSDP2 keeps its last unit (`reshard_after_forward=False`). ZeRO-3 keeps nothing where the limits are 0, but torch's
    loss saves a detached head, unless it computes its gradients in the forward pass, as in float32.
    """
    engine, width = plan.topology.engine, compute_width(plan)
    last = [weight.size for weight in held if weight.unit == "head" and (engine == "fsdp2" or len(weight.shape) == 2)]
    return sum(last) * width if engine == "fsdp2" or (engine == "zero3" and width == 2) else 0


def measured(plan: RunPlan, lengths: Sequence[int]) -> Figures:
    """What one step of the real model and engine holds on this rank."""
    accelerator = start_accelerator(plan)
    model = training_model(plan, _tokenizer(), CPU, None, lambda: None)
    engine = start_engine(accelerator, plan, model, make_optimizer(model, plan.recipe))
    alive = AliveTensors(model)
    with engine.micro_step(is_last=True), alive:
        loss = micro_batch_loss(engine.model, micro_batch(lengths), CPU)
    figures = dict(zip(("activations", "gathered"), alive.bytes(), strict=True))
    if engine.is_deepspeed:
        engine.model.backward(loss)
        figures["gradients"] = bytes_of(gradient_tensors(engine))
        engine.model.step()
    else:
        engine.accelerator.backward(loss)
        figures["gradients"] = bytes_of(gradient_tensors(engine))
        engine.step()
    figures["weights"] = bytes_of(weight_tensors(model))
    figures["optimizer"] = bytes_of(state_tensors(engine))
    return figures


def micro_batch(lengths: Sequence[int]) -> MicroBatch:
    """Documents of these lengths, every token supervised."""
    ids = [(np.arange(length) % 50 + 2).astype(np.uint16) for length in lengths]
    return lay_out(ids, [np.ones(length, np.uint8) for length in lengths])


class LivePeak(TorchDispatchMode):
    """The most bytes of new tensors that exist at once, as torch's allocator would count them on a GPU.

    What an operator allocates within itself is not seen, such as logits in the forward pass of torch's chunked loss.
    """

    def __init__(self, there_before: Iterable[Tensor]) -> None:
        super().__init__()
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in there_before}
        self._now = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator and counts what it returns."""
        out = func(*args, **(kwargs or {}))
        self.count(tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor))
        return out

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that are not yet known, such as those that no operator has made."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self._now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata)
        self.peak = max(self.peak, self._now)

    def take(self) -> int:
        """The peak since the last call."""
        peak, self.peak = self.peak, self._now
        return peak

    def _gone(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


def measured_peak(plan: RunPlan, lengths: Sequence[int]) -> int:
    """Bytes at the fullest moment of the backward pass of a second step, in one process."""
    accelerator = start_accelerator(plan)
    model = training_model(plan, _tokenizer(), CPU, None, lambda: None)
    engine = start_engine(accelerator, plan, model, make_optimizer(model, plan.recipe))
    engine.accelerator.backward(micro_batch_loss(engine.model, micro_batch(lengths), CPU))
    engine.step()
    stay = [*weight_tensors(model), *state_tensors(engine)]
    live = LivePeak([*stay, *model.parameters(), *model.buffers()])
    with live:
        loss = micro_batch_loss(engine.model, micro_batch(lengths), CPU)
        live.peak = 0
        engine.accelerator.backward(loss)
    return bytes_of(stay) + live.peak


class AliveTensors(TorchDispatchMode):
    """Bytes that a forward pass leaves until the backward pass; weights of before are not counted.

    Hooks on saved tensors would miss what an autograd function keeps as its attribute.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # Held, so that no other storage gets the address of one of these.
        self._before = [_storage(each) for each in (*weight_tensors(model), *model.parameters(), *model.buffers())]
        self._made: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._weights: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for module in model.modules():
            module.register_forward_pre_hook(self._note_weights)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator and notes what it returns."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._made[_storage(tensor)._cdata] = weakref.ref(_storage(tensor))
        return out

    def _note_weights(self, module: nn.Module, _: Any) -> None:
        for parameter in module.parameters(recurse=False):
            self._weights[_storage(parameter)._cdata] = weakref.ref(_storage(parameter))

    def bytes(self) -> tuple[int, int]:
        """Of activations, and of weights that an engine has gathered."""
        before = {storage._cdata for storage in self._before}
        made, weights = (
            {key: storage.nbytes() for key, each in found.items() if (storage := each()) is not None}
            for found in (self._made, self._weights)
        )
        new = {key: size for key, size in made.items() if key not in before}
        gathered = sum(size for key, size in new.items() if key in weights)
        return sum(new.values()) - gathered, gathered


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="a")


# --- two ranks ------------------------------------------------------------------------------------

Case = tuple[str, str, str]
"""Engine, name of the method, precision."""


def measure_ranks(rank: int, world: int, folder: str, ports: list[int], cases: list[Case], lengths: list[int]) -> None:
    """One of `world` processes; rank 0 writes measured and planned bytes to `folder`/measured.json."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu", "FSDP_VERSION": "2"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    os.environ[FOLDER_VARIABLE] = str(extensions_folder())
    torch.set_num_threads(1)
    results = []
    for port, (engine, method, precision) in zip(ports, cases, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        _forget_the_last_case()
        os.environ["ACCELERATE_USE_DEEPSPEED"] = str(engine.startswith("zero")).lower()
        os.environ["ACCELERATE_USE_FSDP"] = str(engine == "fsdp2").lower()
        model = Path(folder) / "model"
        sections = {"method": METHODS[method], "precision": precision, "parallel": {"engine": engine}}
        plan = plan_of(model, lengths, world, **sections)
        results.append([measured(plan, lengths), predicted(plan, model, lengths)])
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        (Path(folder) / "measured.json").write_text(json.dumps(results), encoding="utf-8")


def _forget_the_last_case() -> None:
    """Accelerate and DeepSpeed keep their groups in globals."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    import_module("deepspeed.comm.comm").cdb = None
    groups = import_module("deepspeed.utils.groups")
    for name in ("_WORLD_GROUP", "_DATA_PARALLEL_GROUP", "_ZERO_PARAM_INTRA_PARALLEL_GROUP"):
        setattr(groups, name, None)


def make_extensions_free() -> None:
    """As a launch does before it starts ranks: a lock that nobody holds would stop DeepSpeed for ever."""
    remove_abandoned_locks(extensions_folder())
