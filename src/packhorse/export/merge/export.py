"""Export the result of a run as one model in Hugging Face form: merged, proven, and only then at its name."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from packhorse.durable import publish_folder
from packhorse.errors import UserError
from packhorse.export.merge.adapter import StoredAdapter
from packhorse.export.merge.base import SeenBase, linear_weights, open_base
from packhorse.export.merge.merge import Merge, sha256, write_merged
from packhorse.export.merge.prove import MergeProof, divergence_on, prove_merge
from packhorse.export.reference import layers_to_compare, load_layers
from packhorse.model.load import ModelRequest
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.layout import MERGE_FILE
from packhorse.train.engine.precision import COMPUTE_DTYPES
from packhorse.train.setup import base_request

DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CARD_FILE: Final = "README.md"
PROOF_ROWS: Final = 4
PROOF_TOKENS: Final = 256


@dataclass(frozen=True)
class MergeRequest:
    """What to merge.

    Attributes:
        base: How training loaded the base.
        adapter: Folder of the adapter, with the tokenizer of training.
        tokenizer: That tokenizer.
        dtype: Type of the result.
        unrounded: Merge QLoRA into the weights on disk, which training did not see.
        out: Folder of the result.
        rows: Ids of held-out rows.
        card: Text of the model's README.md.
    """

    base: ModelRequest
    adapter: Path
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    unrounded: bool
    out: Path
    rows: Sequence[Sequence[int]]
    card: str = ""


def merge_request(
    plan: RunPlan,
    adapter: Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    unrounded: bool,
    out: Path,
    rows: Sequence[Sequence[int]],
    card: str,
) -> MergeRequest:
    """Return what to merge for a run; an empty dtype is the one that training computed in."""
    return MergeRequest(
        base=base_request(plan, torch.device("cpu"), tokenizer, attention="eager"),
        adapter=adapter,
        tokenizer=tokenizer,
        dtype=DTYPES[dtype] if dtype else COMPUTE_DTYPES[plan.recipe.precision],
        unrounded=unrounded,
        out=out,
        rows=rows,
        card=card,
    )


def export_merged(request: MergeRequest, progress: Callable[[int, int], None]) -> MergeProof:
    """Write the merged model; an interrupted call continues with the next file.

    Raises:
        UserError: The adapter does not fit the base, changes nothing, or the merged model is not what was trained.
    """
    adapter = StoredAdapter(request.adapter)
    draft = request.out.with_name(f".{request.out.name}.tmp")
    scratch = request.out.with_name(f".{request.out.name}.base")
    draft.mkdir(parents=True, exist_ok=True)
    try:
        base = open_base(request.base, len(request.tokenizer), request.unrounded, scratch)
        if adapter.can_stream:
            key = json.dumps([_result_key(request), [(name, _stamp(base, name)) for name in base.files.files]])
            merge = write_merged(base, adapter.changes(), request.dtype, draft, progress, key)
        else:
            merge = _merged_by_peft(request, base, draft)
        _finish_folder(request, draft)
        proof = _prove(request, base, draft)
        _write_manifest(request, base, merge, proof, draft)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    publish_folder(draft, request.out)
    return proof


def _finish_folder(request: MergeRequest, draft: Path) -> None:
    """Write tokenizer, template and stop tokens as they were trained, and the card."""
    (draft / CARD_FILE).write_text(request.card, encoding="utf-8")
    request.tokenizer.save_pretrained(draft)
    stops = GenerationConfig(
        eos_token_id=request.tokenizer.eos_token_id,
        bos_token_id=request.tokenizer.bos_token_id,
        pad_token_id=request.tokenizer.pad_token_id
        if request.tokenizer.pad_token_id is not None
        else request.tokenizer.eos_token_id,
    )
    stops.save_pretrained(draft)


def _prove(request: MergeRequest, base: SeenBase, draft: Path) -> MergeProof:
    """Load both in fp32, a large model by its first layers, and compare them."""
    rows = [ids[:PROOF_TOKENS] for ids in request.rows[:PROOF_ROWS]]
    fp32_bytes = 4 * sum(math.prod(base.shape(name)) for name in base.names())
    config = AutoConfig.from_pretrained(draft)
    layers = layers_to_compare(config, fp32_bytes)
    merged = load_layers(draft, config, layers)
    proof = prove_merge(_adapted(request, base, layers), merged, rows, request.dtype)
    if not request.unrounded or request.base.quantization is None:
        return proof
    trained = _adapted(request, replace(base, in_few_bits=linear_weights(base.config)), layers)
    return replace(proof, trained_to_merged=divergence_on(trained, merged, rows))


def _adapted(request: MergeRequest, base: SeenBase, num_layers: int) -> Any:  # noqa: ANN401
    """Return peft's model in fp32, on the base that training saw."""
    peft = import_module("peft")  # takes seconds
    with warnings.catch_warnings():
        # peft asks transformers for a name that transformers has renamed; a user cannot fix that.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        return peft.PeftModel.from_pretrained(base.model(num_layers), str(request.adapter)).eval()


def _merged_by_peft(request: MergeRequest, base: SeenBase, draft: Path) -> Merge:
    """Merge what has no tensor of the base for each change (experts, IA3): peft does it on the whole model."""
    model = _adapted(request, base, base.config.num_hidden_layers).merge_and_unload()
    model.to(request.dtype).save_pretrained(draft)
    return Merge({file.name: sha256(file) for file in draft.glob("*.safetensors")}, {}, False)


def _write_manifest(request: MergeRequest, base: SeenBase, merge: Merge, proof: MergeProof, draft: Path) -> None:
    manifest = {
        "base": {"source": request.base.source, "revision": request.base.revision}
        | {"files": {name: sha256(base.files.folder / name) for name in base.files.files}},
        "dtype": _dtype_name(request),
        "unrounded": request.unrounded,
        "adapter": _hashes(request.adapter),
        "files": dict(merge.hashes),
        "untied": merge.untied,
        "change_by_weight": dict(merge.moved),
        "proof": asdict(proof),
    }
    (draft / MERGE_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def is_merged(request: MergeRequest) -> bool:
    """Return whether the result of such a merge is there already."""
    file = request.out / MERGE_FILE
    if not file.is_file():
        return False
    found = json.loads(file.read_text(encoding="utf-8"))
    return [found["dtype"], found["unrounded"], found["adapter"]] == _result_key(request)


def _result_key(request: MergeRequest) -> list[Any]:
    """Return what decides the result, beside the base: type, rounding and adapter."""
    return [_dtype_name(request), request.unrounded, _hashes(request.adapter)]


def _stamp(base: SeenBase, name: str) -> tuple[int, int]:
    """Return size and time of a file of the base."""
    found = (base.files.folder / name).stat()
    return found.st_size, found.st_mtime_ns


def _dtype_name(request: MergeRequest) -> str:
    return str(request.dtype).removeprefix("torch.")


def _hashes(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}


def check_method(kind: str) -> None:
    """Refuse a method whose result is no change of weights.

    Raises:
        UserError: The adapter is a prompt or a prefix.
    """
    if kind in ("prompt_tuning", "prefix_tuning"):
        raise UserError(
            f"a {kind} adapter cannot be merged.",
            "it is trained input, and not a change of weights.",
            "use RUN/adapter with its base.",
        )
