"""Two ranks load a model unit by unit into FSDP2 and ZeRO-3 shards: right to the bit, and never whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from packhorse.model.load import ModelRequest, Quantization, load_model, open_model
from packhorse.model.methods.attach import Start, attach
from packhorse.model.sharded import assign, shard_of
from packhorse.model.streaming import KeptRows
from packhorse.plan.run_plan import Topology
from packhorse.recipe.methods import FullMethod, LoraMethod, Method, PartialMethod, PromptTuningMethod, QloraMethod
from packhorse.train.engine.sharding import Fsdp2, Placement, Zero3, make_mesh
from packhorse.train.loading import place_streamed, place_whole

RANKS = 2
LAYERS = 12
CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
METHODS: dict[str, Method] = {
    "full": FullMethod(),
    "partial": PartialMethod(last_layers=1),
    "lora": LoraMethod(rank=4),
    "dora": LoraMethod(rank=4, dora=True),
    "lora and whole ends": LoraMethod(rank=4, train_also=["lm_head", "embed_tokens"]),
    "prompt": PromptTuningMethod(virtual_tokens=4),
    "qlora": QloraMethod(rank=4),
    "qlora, placed whole": QloraMethod(rank=4),
}
CASES = [("fsdp2", name) for name in METHODS] + [("zero3", name) for name in ("full", "lora and whole ends", "qlora")]
DEEPSPEED = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


class Counted:
    """A stored tensor that counts the bytes that are read of it, in a list shared by all of a model."""

    def __init__(self, stored: Any, read: list[int]) -> None:
        self.stored, self.read = stored, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stored, name)

    def __getitem__(self, rows: Any) -> Tensor:
        tensor: Tensor = self.stored[rows]
        self.read.append(tensor.nbytes)
        return tensor


class Watched(Placement):
    """Notes the most bytes of weights that were alive when a unit was there and not yet placed."""

    def __init__(self, inner: Placement, model: nn.Module) -> None:
        self.inner, self.model = inner, model
        self.peak = self.largest = 0

    @property
    def kept_rows(self) -> KeptRows | None:
        return self.inner.kept_rows

    def unit(self, modules: Sequence[nn.Module], is_last: bool) -> None:
        self.peak = max(self.peak, alive(self.model))
        self.largest = max(self.largest, sum(alive(module) for module in modules))
        self.inner.unit(modules, is_last)

    def root(self, model: nn.Module) -> None:
        self.inner.root(model)


def alive(model: nn.Module) -> int:
    """Bytes of parameters that exist on this rank."""
    storages = {}
    for parameter in model.parameters():
        local: Tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        for tensor in (local, getattr(parameter, "ds_tensor", None)):
            if tensor is not None and not tensor.is_meta and tensor.numel():
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def whole(parameter: Any) -> Tensor:
    """Return the bytes; 4-bit weights may be stored as floats that are NaN."""
    if isinstance(parameter, DTensor):
        value = parameter.full_tensor()
    elif hasattr(parameter, "ds_id"):
        parameter.all_gather()
        value = parameter.data.clone()
        parameter.partition()
    else:
        value = parameter
    return value.detach().contiguous().flatten().view(torch.uint8)


def placed(engine: str, checkpoint: str, name: str) -> dict[str, Any]:
    """What one rank sees of a model that it loaded into shards, beside the same loaded whole."""
    method = METHODS[name]
    bits = Quantization("nf4", True, torch.float32) if isinstance(method, QloraMethod) else None
    request = ModelRequest(
        source=checkpoint, revision=None, config=None, seed=0, dtype=torch.float32, attention="sdpa",
        quantization=bits, trust_remote_code=False, device=CPU,
    )  # fmt: skip

    def attached(base: nn.Module) -> nn.Module:
        return attach(base, method, Start(seed=1))

    expected = dict(attached(load_model(request, 90)).named_parameters())
    topology = Topology(device="cpu", engine="fsdp2", num_nodes=1, processes_per_node=RANKS, threads_per_process=1)
    inner = Fsdp2(make_mesh(topology, CPU), "fp32") if engine == "fsdp2" else Zero3(DEEPSPEED, "fp32", CPU)
    read: list[int] = []
    if name.endswith("placed whole"):
        base = load_model(request, 90)
        watched = Watched(inner, base)
        model = place_whole(base, attached, watched, lambda: None)
    else:
        weights = open_model(request, 90)
        assert weights is not None
        weights.tensors = {key: Counted(stored, read) for key, stored in weights.tensors.items()}
        watched = Watched(inner, weights.model)
        model = place_streamed(weights, attached, watched, method, 1, CPU, lambda: None)
    found = dict(model.named_parameters())
    differing = [key for key in sorted(found) if not torch.equal(whole(found[key]), whole(expected[key]))]
    unsharded = [key for key, value in found.items() if not isinstance(value, DTensor) and not hasattr(value, "ds_id")]
    trained = {key for key, value in found.items() if value.requires_grad}
    changed = next(key for key in sorted(trained))
    value = torch.arange(expected[changed].numel(), dtype=torch.float32).reshape(expected[changed].shape)
    assign(found[changed], value)
    return {
        "names": sorted(found.keys() ^ expected.keys()),
        "differing": differing,
        "unsharded": unsharded,
        "frozen wrongly": sorted(trained ^ {key for key, value in expected.items() if value.requires_grad}),
        "assigned": torch.equal(whole(found[changed]), whole(value)),
        "read": sum(read),
        "stored": sum(value.numel() * value.element_size() for value in load_model(request, 90).parameters()),
        "shards": alive(model), "largest": watched.largest, "peak": watched.peak,
        "total": alive(attached(load_model(request, 90))),
    }  # fmt: skip


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    found = {
        f"{engine} {name}": placed(engine, f"{folder}/{'tied' if name == 'lora and whole ends' else 'plain'}", name)
        for engine, name in CASES
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the second rank found: the first has the larger part where shards are uneven."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    for name, config in (
        ("plain", LlamaConfig(**SIZES, tie_word_embeddings=False)),
        ("tied", Qwen2Config(**SIZES, tie_word_embeddings=True)),
    ):
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name, max_shard_size="500KB")
    mp.spawn(work, (str(folder),), nprocs=RANKS)
    found: dict[str, dict[str, Any]] = torch.load(folder / "1.pt", weights_only=True)
    return found


@pytest.mark.parametrize(("engine", "name"), CASES)
def test_shards_are_of_the_model_that_is_loaded_whole(
    engine: str, name: str, loaded: dict[str, dict[str, Any]]
) -> None:
    found = loaded[f"{engine} {name}"]
    for what in ("names", "differing", "unsharded", "frozen wrongly"):
        assert found[what] == [], what
    assert found["assigned"]


@pytest.mark.parametrize(("engine", "name"), [case for case in CASES if not case[1].endswith("placed whole")])
def test_no_rank_ever_holds_more_than_its_shards_and_one_unit(
    engine: str, name: str, loaded: dict[str, dict[str, Any]]
) -> None:
    found = loaded[f"{engine} {name}"]
    assert found["shards"] <= 0.55 * found["total"]
    assert found["peak"] <= found["shards"] + found["largest"]
    assert found["peak"] < 0.7 * found["total"]


@pytest.mark.parametrize(
    ("case", "share"),
    [("fsdp2 full", 0.5), ("fsdp2 lora", 0.5), ("fsdp2 lora and whole ends", 0.5), ("zero3 full", 0.0),
     ("fsdp2 dora", 1.0), ("fsdp2 prompt", 1.0)],
)  # fmt: skip
def test_the_second_rank_reads_its_rows_only(case: str, share: float, loaded: dict[str, dict[str, Any]]) -> None:
    """DeepSpeed sends it every weight from the first rank; DoRA and prompts start from whole weights."""
    assert loaded[case]["read"] == share * loaded[case]["stored"]


def test_hybrid_sharding_copies_over_groups_of_neighbours() -> None:
    """8 ranks in groups of 4, on torch's fake backend: a weight's rows are shared by 4 and there are 2 copies."""
    dist.init_process_group("fake", rank=5, world_size=8, store=FakeStore())
    try:
        topology = Topology(
            device="cpu", engine="hsdp", num_nodes=2, processes_per_node=4, threads_per_process=1, shard_group=4
        )
        mesh = make_mesh(topology, CPU)
        layer = nn.Linear(3, 16, bias=False)
        placement = Fsdp2(mesh, "fp32")
        placement.unit([layer], is_last=False)
        weight: Any = layer.weight
        assert mesh.get_local_rank("shard") == 1  # ranks 4, 5, 6, 7 share one copy
        assert mesh["shard"].mesh.tolist() == [4, 5, 6, 7]
        assert tuple(weight.device_mesh.shape) == (2, 4)
        assert weight.to_local().shape == (4, 3)
        assert placement.kept_rows("weight", (16, 3)) == slice(4, 8)
        whole = torch.arange(48.0).reshape(16, 3)
        assert torch.equal(shard_of(whole, weight).to_local(), whole[4:8])
    finally:
        dist.destroy_process_group()
