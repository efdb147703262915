"""Two processes that share each row compute what one computes with the whole of it.

The oracle of attention is torch's own with a dense mask over the whole row; that of the model is transformers' eager
attention, one document at a time.
"""

from __future__ import annotations

from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig

from packhorse.data.packs.loader import lay_out
from packhorse.data.packs.store import open_store
from packhorse.errors import UserError
from packhorse.model.attention import Documents, register_attention
from packhorse.model.sequence import SequenceGroup, join_sequence_group, to_whole_documents
from packhorse.recipe.objectives import SimpoObjective
from packhorse.train.objectives.forward import micro_batch_loss
from packhorse.train.objectives.objective import TokenObjective
from packhorse.train.objectives.preference import make_objective
from packhorse.train.objectives.token_loss import install_loss_head
from packhorse.train.probe import ProbeReport, probe
from packhorse.train.validation import StorePasses, validate
from prepared import write_prepared

RANKS = 2
LENGTHS = (5, 22, 1, 14)
TOKENS = sum(LENGTHS)
# Query heads, key/value heads, width of q and k, width of v, window.
SHAPES = {
    "a key for every query": (4, 4, 8, 8, None),
    "grouped": (4, 2, 8, 8, None),
    "one key": (4, 1, 8, 8, None),
    "three keys on two ranks": (6, 3, 8, 8, None),
    "narrow values": (4, 2, 8, 6, None),
    "sliding window": (4, 2, 8, 8, 7),
}
# 43 tokens, which two ranks cannot share equally.
ODD_LENGTHS = (*LENGTHS, 1)
CONFIG = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


def drawn(shape: tuple[int, int, int, int, int | None]) -> tuple[torch.Tensor, ...]:
    """query, key, value and the gradient of the output [1, T, H, Ev]."""
    heads, keys, width, value_width, _ = shape
    generator = torch.Generator().manual_seed(1)
    sizes = [(heads, TOKENS, width), (keys, TOKENS, width), (keys, TOKENS, value_width), (TOKENS, heads, value_width)]
    return tuple(torch.randn(1, *size, generator=generator) for size in sizes)


def model(attention: str) -> torch.nn.Module:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG), attn_implementation=attention)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)  # fresh weights hardly look at other tokens
    return made.train()


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 97, (length,), generator=generator) for length in ODD_LENGTHS]


def gradients(trained: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in trained.named_parameters()}


def attend_to_part(shape: tuple[int, int, int, int, int | None], sequence: SequenceGroup) -> list[torch.Tensor]:
    """Output and gradients of q, k and v of this rank's tokens."""
    *tensors, out_grad = drawn(shape)
    length = TOKENS // RANKS
    here = slice(sequence.rank * length, (sequence.rank + 1) * length)
    q, k, v = (tensor[:, :, here].clone().requires_grad_() for tensor in tensors)
    ends = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32)
    documents = Documents(LENGTHS, ends, max(LENGTHS), sequence)
    attention = AttentionInterface()[register_attention("sdpa")]
    out, _ = attention(torch.nn.Module(), q, k, v, None, sliding_window=shape[-1], documents=documents)
    out.backward(out_grad[:, here])
    return [out.detach(), q.grad, k.grad, v.grad]


def train_on_part(sequence: SequenceGroup, checkpointing: bool) -> tuple[float, dict[str, torch.Tensor]]:
    trained = model(register_attention("sdpa"))
    install_loss_head(trained)
    if checkpointing:
        trained.gradient_checkpointing_enable({"use_reentrant": False})
    ids = [row.numpy() for row in rows()]
    batch = lay_out(ids, [row * 0 + 1 for row in ids])
    loss = micro_batch_loss(trained, batch, torch.device("cpu"), sequence)
    loss.backward()
    return sequence.sum(loss), gradients(trained)


def preferred_on_part(sequence: SequenceGroup | None) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of two preference pairs; most documents are cut between the ranks or on one of them."""
    trained = model(register_attention("sdpa"))
    install_loss_head(trained)
    ids = [row.numpy() for row in (*rows()[:2], *rows()[1::2])]
    batch = lay_out(ids, [row * 0 + 1 for row in ids])
    loss = make_objective(SimpoObjective())(trained, batch, torch.device("cpu"), sequence).total
    loss.backward()
    return sequence.sum(loss) if sequence else loss.item(), gradients(trained)


def looks_one_token_back(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Look one token back, like convolutions and state spaces, within each document and this rank's part."""
    before = F.pad(args[0][:, :-1], (0, 0, 1, 0)) * (kwargs["position_ids"] > 0)[..., None]
    return (args[0] + before, *args[1:]), kwargs


def probed(folder: str, sequence: SequenceGroup, leaky: bool) -> ProbeReport | str:
    """Return the probe's report, or its error."""
    proven = model(register_attention("sdpa"))
    install_loss_head(proven)
    if leaky:
        proven.model.layers[1].register_forward_pre_hook(looks_one_token_back, with_kwargs=True)
    engine: Any = SimpleNamespace(model=proven, device=torch.device("cpu"))
    try:
        return probe(engine, open_store(Path(folder) / "data", "train"), TokenObjective(), "fp32", sequence)
    except UserError as error:
        return str(error)


def validated(folder: str, sequence: SequenceGroup) -> float:
    """Validation loss of all rows, on the one group that there is."""
    trained = model(register_attention("sdpa"))
    install_loss_head(trained)
    engine: Any = SimpleNamespace(
        model=trained,
        device=torch.device("cpu"),
        sum_over_ranks=lambda values: [sequence.sum(torch.tensor(value, dtype=torch.float64)) for value in values],
    )
    store = open_store(Path(folder) / "data", "train")
    passes = StorePasses(store, 1, 0, 1, lambda: None)
    return validate(engine, TokenObjective(), passes, sequence)["evaluation/loss"]


def refusal(sequence: SequenceGroup) -> str:
    odd = torch.zeros(1, 3, 4, 8)
    try:
        to_whole_documents(odd, odd, odd, sequence)
    except UserError as error:
        return str(error)
    return ""


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    sequence = join_sequence_group(RANKS, timedelta(seconds=60))
    assert sequence is not None
    found: dict[str, Any] = {name: attend_to_part(shape, sequence) for name, shape in SHAPES.items()}
    found |= {f"checkpointing {on}": train_on_part(sequence, on) for on in (False, True)}
    found["simpo"] = preferred_on_part(sequence)
    found["validation"] = validated(folder, sequence)
    found["refusal"] = refusal(sequence)
    found["proof"] = probed(folder, sequence, leaky=False).figures()
    found["leak"] = probed(folder, sequence, leaky=True)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    documents = [(row.tolist(), [1] * len(row), {}) for row in rows()]
    write_prepared(folder / "data", {"train": documents}, vocab_size=97)
    mp.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("name", SHAPES, ids=str)
def test_attention_over_two_ranks_is_torchs_own_over_the_whole_row(name: str, parts: list[dict[str, Any]]) -> None:
    q, k, v, out_grad = drawn(SHAPES[name])
    for tensor in (q, k, v):
        tensor.requires_grad_()
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    mask = (document[:, None] == document) & (distance >= 0) & (distance < (SHAPES[name][-1] or TOKENS))
    out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)
    out.backward(out_grad)
    found = [torch.cat(pieces, 1 if number == 0 else 2) for number, pieces in enumerate(zip(*(p[name] for p in parts)))]
    for mine, expected in zip(found, (out.detach(), q.grad, k.grad, v.grad), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
def test_gradients_summed_over_ranks_are_those_of_documents_alone(
    checkpointing: bool, parts: list[dict[str, Any]]
) -> None:
    plain = model("eager")
    expected = torch.zeros(())
    for row in rows():
        if len(row) > 1:
            logits = plain(row[None], use_cache=False).logits[0, :-1]
            expected = expected + F.cross_entropy(logits, row[1:], reduction="sum")
    expected.backward()
    (loss, mine), (also, theirs) = (part[f"checkpointing {checkpointing}"] for part in parts)
    assert loss == also == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in gradients(plain).items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(mine[name] + theirs[name], gradient, atol=1e-6 * scale, rtol=1e-5, msg=name)
        assert mine[name].abs().max() > 0, "both parts must teach, or equal sums say little"
        assert theirs[name].abs().max() > 0


def test_pairs_cut_between_ranks_have_the_gradient_of_whole_ones(parts: list[dict[str, Any]]) -> None:
    expected, whole = preferred_on_part(None)
    (loss, mine), (also, theirs) = (part["simpo"] for part in parts)
    assert loss == also == pytest.approx(expected, rel=1e-6)
    for name, gradient in whole.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(mine[name] + theirs[name], gradient, atol=1e-6 * scale, rtol=1e-5, msg=name)
        assert mine[name].abs().max() > 0, "both parts must teach, or equal sums say little"
        assert theirs[name].abs().max() > 0


def test_validation_loss_is_that_of_whole_rows(parts: list[dict[str, Any]]) -> None:
    plain = model("eager")
    with torch.no_grad():
        losses = [
            F.cross_entropy(plain(row[None], use_cache=False).logits[0, :-1], row[1:], reduction="sum").item()
            for row in rows()
            if len(row) > 1
        ]
    expected = sum(losses) / sum(length - 1 for length in ODD_LENGTHS)
    for part in parts:
        assert part["validation"] == pytest.approx(expected, rel=1e-6)


def test_heads_that_the_ranks_cannot_share_are_refused_with_both_numbers(parts: list[dict[str, Any]]) -> None:
    for part in parts:
        assert "parallel.sequence is 2, which does not divide the model's 3 attention heads" in part["refusal"]
        assert "parallel.sequence to 1." in part["refusal"]


def test_the_probe_compares_rows_cut_and_whole(parts: list[dict[str, Any]]) -> None:
    for part in parts:
        assert set(part["proof"]) == {
            f"proof/{name}_difference" for name in ("isolation", "packing", "head", "sequence")
        }
        assert max(part["proof"].values()) < 1e-5


def test_a_layer_that_looks_past_the_cut_is_refused(parts: list[dict[str, Any]]) -> None:
    for part in parts:
        assert "rows shared by several processes have a different loss than whole rows" in part["leak"]
        assert "set parallel.sequence to 1" in part["leak"]
