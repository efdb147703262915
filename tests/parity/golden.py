"""Golden trajectories: a training loop by hand that knows no packs, no chunks and no engine.

Each document goes alone through transformers' eager attention and plain cross-entropy; adapters are made by peft,
quantised weights by bitsandbytes, the steps by torch's own optimizers. It shares with Packhorse the rows, in the order
of the batch plan.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

SEED = 42
CLIP_NORM = 1.0
WEIGHT_DECAY = 0.01
LORA = {"rank": 8, "alpha": 16, "dropout": 0.0}
VIRTUAL_TOKENS = 4
# Of the first steps. Then fp32's rounding has been through Adam: the loop by hand, with its weights changed by 1e-7 at
# random, has norms up to 2.4e-5 (full, stories260K) from its own, while losses differ by 7e-7 at most.
NUM_FIRST_STEPS, NORM_TOLERANCE, LATER_NORM_TOLERANCE = 3, 1e-5, 5e-5

Document = tuple[np.ndarray, np.ndarray]
"""Token ids and the mask of those that are trained on, [length] each."""


@dataclass(frozen=True)
class Curve:
    """What a run shows of itself.

    Attributes:
        losses: Nats per trained token at each step.
        norms: Gradient norm before clipping at each step.
        untrained: Loss of the last step's rows before the first step.
    """

    losses: list[float]
    norms: list[float]
    untrained: float

    def first(self, num_steps: int) -> Curve:
        """The curve of a run that ends after so many steps."""
        return Curve(self.losses[:num_steps], self.norms[:num_steps], self.untrained)


def assert_norms(norms: list[float], golden: Curve) -> None:
    """A run's gradient norms are those of the loop by hand."""
    first = slice(NUM_FIRST_STEPS)
    assert norms[first] == pytest.approx(golden.norms[first], rel=NORM_TOLERANCE, abs=0)
    assert norms == pytest.approx(golden.norms, rel=LATER_NORM_TOLERANCE, abs=0)


def _everything(model: nn.Module) -> nn.Module:
    return model


def _last_layer(model: nn.Module) -> nn.Module:
    last = max(int(name.split(".")[2]) for name, _ in model.named_parameters() if ".layers." in name)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = f".layers.{last}." in name or name == "model.norm.weight"
    return model


def _lora(**more: Any) -> Callable[[nn.Module], nn.Module]:
    def attach(model: nn.Module) -> nn.Module:
        sizes = {"r": LORA["rank"], "lora_alpha": LORA["alpha"], "lora_dropout": LORA["dropout"]}
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **sizes, **more)
        adapted = _adapted(model, config)
        for name, layer in adapted.named_modules():
            if isinstance(layer, LoraLayer):
                _draw(layer, name)
        return adapted

    return attach


def _draw(layer: LoraLayer, name: str) -> None:
    """Where a curve starts is a convention: peft's own draw, seeded by recipe and layer, whatever their order."""
    digest = hashlib.blake2b(f"{SEED}/{name}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
    layer.reset_lora_parameters("default", True)


def _ia3(model: nn.Module) -> nn.Module:
    return _adapted(model, peft.IA3Config(task_type="CAUSAL_LM"))


def _prompt(model: nn.Module) -> nn.Module:
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS, prompt_tuning_init="SAMPLE_VOCAB"
    )
    return _adapted(model, config)


def _prefix(model: nn.Module) -> nn.Module:
    return _adapted(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS))


def _adapted(model: nn.Module, config: peft.PeftConfig) -> nn.Module:
    torch.manual_seed(SEED)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft reads the old name
        return peft.get_peft_model(model, config)


def four_bit(kind: str) -> BitsAndBytesConfig:
    """As the QLoRA paper stores weights, computing in fp32."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


@dataclass(frozen=True)
class Method:
    """A method as the recipe says it and as peft does it.

    Attributes:
        section: The recipe's `method`.
        learning_rate: High enough for 20 steps to be seen in the loss, and so low that weights changed by 1e-7 do not
            end on another curve.
        attach: Chooses what trains in a loaded model, or adds the adapter.
        quantized: How bitsandbytes stores the frozen weights.
    """

    section: dict[str, Any]
    learning_rate: float
    attach: Callable[[nn.Module], nn.Module]
    quantized: BitsAndBytesConfig | None = None


def _qlora(kind: str, quantized: BitsAndBytesConfig) -> Method:
    return Method({"kind": "qlora", "quantization": kind, **LORA}, 5e-3, _lora(), quantized)


METHODS = {
    "full": Method({"kind": "full"}, 2e-3, _everything),
    "partial": Method({"kind": "partial", "last_layers": 1, "train": ["model.norm.weight"]}, 2e-3, _last_layer),
    "lora": Method({"kind": "lora", **LORA}, 5e-3, _lora()),
    "dora": Method(
        {"kind": "lora", **LORA, "dora": True, "rank_stabilized": True}, 5e-3, _lora(use_dora=True, use_rslora=True)
    ),
    "nf4": _qlora("nf4", four_bit("nf4")),
    "fp4": _qlora("fp4", four_bit("fp4")),
    "int8": _qlora("int8", BitsAndBytesConfig(load_in_8bit=True)),
    "ia3": Method({"kind": "ia3"}, 2e-2, _ia3),
    "prompt": Method({"kind": "prompt_tuning", "virtual_tokens": VIRTUAL_TOKENS}, 2e-2, _prompt),
    "prefix": Method({"kind": "prefix_tuning", "virtual_tokens": VIRTUAL_TOKENS}, 5e-2, _prefix),
}


@dataclass(frozen=True)
class Start:
    """Where training starts from.

    Attributes:
        model: Makes the model, in eager attention, with fp32 weights.
        steps: Documents of each optimizer step.
    """

    model: Callable[[BitsAndBytesConfig | None], nn.Module]
    steps: Sequence[list[Document]] = field(repr=False)


def pretrained(folder: Path) -> Callable[[BitsAndBytesConfig | None], nn.Module]:
    """Loads a folder as transformers does, with weights quantised by bitsandbytes where that is asked for."""

    def load(quantized: BitsAndBytesConfig | None) -> nn.Module:
        more = {} if quantized is None else {"quantization_config": quantized, "device_map": {"": "cpu"}}
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, **more
        )
        for module in model.modules():
            # Else bitsandbytes repacks 4-bit weights, with rounded scales, on processors with AVX-512 BF16.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model

    return load


def adamw(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW with torch's own defaults, over matrices that decay and vectors that do not."""
    return torch.optim.AdamW(_decay_groups(model.named_parameters()), lr=learning_rate)


def adafactor(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Adafactor as torch has it."""
    return torch.optim.Adafactor(_decay_groups(model.named_parameters()), lr=learning_rate)


def lion(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Lion as its paper's algorithm 2 has it."""
    return Lion(_decay_groups(model.named_parameters()), {"lr": learning_rate, "betas": (0.9, 0.99)})


def muon(model: nn.Module, learning_rate: float) -> Both:
    """Muon as torch has it for the layers' matrices, AdamW for all else."""
    named = list(model.named_parameters())
    matrices = [(name, p) for name, p in named if p.dim() == 2 and ".layers." in name]
    others = [(name, p) for name, p in named if not (p.dim() == 2 and ".layers." in name)]
    return Both(
        torch.optim.Muon(_decay_groups(matrices), lr=learning_rate, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(_decay_groups(others), lr=learning_rate),
    )


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023 (arXiv 2302.06675), algorithm 2."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            slow, fast = group["betas"]
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * torch.sign(slow * mean + (1 - slow) * p.grad))
                mean.mul_(fast).add_((1 - fast) * p.grad)


class Both:
    """Two optimizers over two parts of a model."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()


def _decay_groups(named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Matrices, which decay, and what does not: biases, norms, and the factors of IA³, which start at 1."""
    decays: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named:
        if parameter.requires_grad:
            decays[parameter.dim() > 1 and "ia3" not in name].append(parameter)
    return [{"params": each, "weight_decay": WEIGHT_DECAY * matrix} for matrix, each in decays.items() if each]


def trajectory(
    method: Method,
    start: Start,
    make_optimizer: Callable[[nn.Module, float], torch.optim.Optimizer | Both] = adamw,
    learning_rate: float | None = None,
) -> Curve:
    """Trains by hand, with the method's own learning rate where none is given."""
    model = method.attach(start.model(method.quantized)).train()
    optimizer = make_optimizer(model, learning_rate or method.learning_rate)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        untrained = mean_loss(model, start.steps[-1]).item()
    losses, norms = [], []
    for documents in start.steps:
        loss = mean_loss(model, documents)
        loss.backward()
        norms.append(exact_norm(trained))
        nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Curve(losses, norms, untrained)


def exact_norm(parameters: Sequence[nn.Parameter]) -> float:
    """Norm of all gradients, summed in fp64: torch sums squares in fp32, which is up to 2e-5 too low on a CPU."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in parameters if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def mean_loss(model: nn.Module, documents: Sequence[Document]) -> torch.Tensor:
    """Mean loss of the trained tokens of these documents, each of which sees only itself."""
    total, count = torch.zeros(()), 0
    for ids, supervised in documents:
        row = torch.tensor(ids.astype("int64"))[None]
        labels = torch.where(torch.tensor(supervised.astype(bool)), row[0], -100)[1:]
        # A soft prompt stands before the row: the row's own logits are the last.
        logits = model(input_ids=row, use_cache=False).logits[0, -len(ids) : -1] if len(ids) > 1 else None
        if logits is not None:
            total = total + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            count += int((labels != -100).sum())
    return total / count
