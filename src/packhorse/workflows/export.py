"""Export the result of a finished run for other programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from packhorse.durable import replace_file
from packhorse.errors import UserError
from packhorse.plan.run_plan import RunPlan
from packhorse.report.model_card import model_card
from packhorse.report.run_report import read_report
from packhorse.run_folder.folder import relative
from packhorse.run_folder.layout import ADAPTER_FOLDER, EXPORT_FOLDER, MODEL_FOLDER
from packhorse.workflows.prepared_data import require_data

if TYPE_CHECKING:
    from packhorse.export.gguf.export import GgufExport, GgufRequest
    from packhorse.export.merge.prove import MergeProof
    from packhorse.export.reference import HeldOutRow

Progress = Callable[[str, int, int], None]
"""Called with what is being done, bytes done and bytes in all."""
MERGED_FOLDER = "merged"
GGUF_FOLDER = "gguf"
GGUF_FIGURES_FILE = "gguf.json"
MODELFILE = "Modelfile"
LEAST_OLLAMA = "0.12.0"
"""First version whose engine renders the chat template inside the file."""
MOST_TEXTS = 500
"""Rendered rows whose ids are compared; more of one kind find nothing more."""


@dataclass(frozen=True)
class Merged:
    """A whole model in Hugging Face form, and the proof of its merge; None where training made it."""

    folder: Path
    proof: MergeProof | None


def export_merged_model(
    plan: RunPlan, dtype: str, unrounded: bool, out: str, progress: Progress, reuse: bool = False
) -> Merged:
    """Merge the adapter of a run into its base; a whole model is returned where it is.

    Args:
        plan: Plan of a finished run.
        dtype: Type of the result, such as `bfloat16`; empty: the one that training computed in.
        unrounded: Merge QLoRA into the weights on disk, which training did not see.
        out: Folder of the result; empty: RUN/export/merged.
        progress: Called with what is being done, bytes done and bytes in all.
        reuse: Take the result of an earlier call.

    Raises:
        UserError: The run has not finished, its result cannot be merged, or the merged model is not what was trained.
    """
    run = Path(plan.run_folder)
    require_data(plan)
    if plan.recipe.method.trains_base:
        return Merged(_finished(plan, MODEL_FOLDER), None)
    adapter = _finished(plan, ADAPTER_FOLDER)
    from packhorse.export.merge.export import DTYPES, check_method, export_merged, is_merged, merge_request

    check_method(plan.recipe.method.kind)
    if dtype not in ("", *DTYPES):
        raise UserError(
            f"--dtype is {dtype}.", f"known are {', '.join(DTYPES)}.", "write for example --dtype bfloat16."
        )
    tokenizer = _tokenizer(plan, adapter)
    rows = [row.ids for row in _held_out_rows(plan, tokenizer)[0]]
    target = Path(out) if out else run / EXPORT_FOLDER / MERGED_FOLDER
    card = model_card(plan, read_report(plan))
    request = merge_request(plan, adapter, tokenizer, dtype, unrounded, target, rows, card)
    if reuse and is_merged(request):
        return Merged(request.out, None)
    return Merged(request.out, export_merged(request, lambda done, total: progress("merge", done, total)))


def export_gguf_files(
    plan: RunPlan, file_types: Sequence[str], out: str, progress: Progress
) -> tuple[GgufExport, Path]:
    """Write the model of a run as GGUF files, with a Modelfile for Ollama and the figures as JSON.

    Args:
        plan: Plan of a finished run; an adapter is merged first.
        file_types: Types of files, such as `Q8_0`.
        out: Folder of the result; empty: RUN/export/gguf.
        progress: Called with what is being done, bytes done and bytes in all.

    Raises:
        UserError: The run has not finished, the extra is not installed, or the files cannot be proven.
    """
    require_data(plan)
    _require_extra()
    from packhorse.export.gguf.export import export_gguf
    from packhorse.export.gguf.file_types import check_file_types

    check_file_types(list(file_types))
    model = export_merged_model(plan, "", False, "", progress, reuse=True).folder
    folder = Path(out) if out else Path(plan.run_folder) / EXPORT_FOLDER / GGUF_FOLDER
    request = _gguf_request(plan, model, file_types, folder)
    found = export_gguf(request, progress)
    replace_file(request.out / GGUF_FIGURES_FILE, json.dumps(_figures(found), indent=2) + "\n")
    replace_file(request.out / MODELFILE, _modelfile(found.files[0].path, request, plan.recipe.batch.length))
    return found, request.out


def _require_extra() -> None:
    """Refuse at once where the libraries of the extra are missing."""
    from importlib.util import find_spec

    missing = [name for name in ("gguf", "libgguf", "xllamacpp") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"{', '.join(missing)} is not installed.",
            "GGUF files are written with gguf and libgguf, and proven with llama.cpp (xllamacpp).",
            "pip install 'packhorse[gguf]'",
        )


def _finished(plan: RunPlan, name: str) -> Path:
    folder = Path(plan.run_folder)
    if not (folder / name).is_dir():
        raise UserError(
            f"{relative(folder)} has no {name} folder.",
            "training writes its result there when it ends.",
            f"let the run finish: packhorse resume {relative(folder)}.",
        )
    return folder / name


def _tokenizer(plan: RunPlan, folder: Path) -> Any:  # noqa: ANN401
    from packhorse.data.render.tokenizer import read_tokenizer

    return read_tokenizer(folder, plan.recipe.model.trust_remote_code)


def _held_out_rows(plan: RunPlan, tokenizer: Any) -> tuple[list[HeldOutRow], list[str]]:  # noqa: ANN401
    """Return validation and retain rows: ids with their supervised positions, and some as the template writes them."""
    from packhorse.data.packs.store import open_store
    from packhorse.evaluate.held_out import SETS, trained_form
    from packhorse.export.reference import HeldOutRow

    assert plan.data is not None
    folder = Path(plan.data.folder)
    stores = [open_store(folder, name) for name in SETS if (folder / name).is_dir()]
    documents = [store.document(at) for store in stores for at in range(store.num_documents)]
    if not documents:
        raise UserError(
            f"{folder} has 0 validation rows and 0 retain rows.",
            "an export is proven on rows that the model was not trained on.",
            "raise data.split.validation, or name rows in data.validation, and train again.",
        )
    rows = [HeldOutRow(tuple(ids.tolist()), tuple((np.flatnonzero(mask[1:]) + 1).tolist())) for ids, mask in documents]
    form = trained_form(tokenizer, plan.recipe.data)
    stored = islice((row for store in stores for row in store.rows()), MOST_TEXTS)
    return rows, [_text(tokenizer, form, row) for row in stored]


def _gguf_request(plan: RunPlan, model: Path, file_types: Sequence[str], out: Path) -> GgufRequest:
    from packhorse.data.render.tokenizer import stop_ids
    from packhorse.export.gguf.export import GgufRequest

    tokenizer = _tokenizer(plan, model)
    rows, texts = _held_out_rows(plan, tokenizer)
    stops = sorted(stop_ids(tokenizer, model), key=lambda index: index != tokenizer.eos_token_id)
    base = plan.recipe.model.id or plan.recipe.model.path
    return GgufRequest(
        model=model,
        tokenizer=tokenizer,
        stops=stops,
        file_types=file_types,
        out=out,
        name=Path(plan.run_folder).name,
        texts=texts,
        rows=rows,
        smallest_effect=plan.recipe.evaluation.smallest_effect,
        facts={"description": f"Fine-tuned by Packhorse from {base}"} if base else {},
    )


def _text(tokenizer: Any, form: Any, row: dict[str, Any]) -> str:  # noqa: ANN401
    """Return a row as the template writes it."""
    if not row.get("messages"):
        return str(row["text"])
    messages, tools = form(row)
    return str(tokenizer.apply_chat_template(messages, tools=list(tools) or None, tokenize=False))


def _figures(found: GgufExport) -> dict[str, Any]:
    """Return the export as JSON: proof, and for each file its size, hash, quality and verdict."""
    return {
        "proof": vars(found.proof),
        "files": [
            {
                "type": file.file_type,
                "file": file.path.name,
                "bytes": file.bytes,
                "sha256": file.sha256,
                "kl_nats": file.quality.kl,
                "top_1": file.quality.top_1,
                "loss": file.loss.model_dump(),
                "outcome": file.outcome,
            }
            for file in found.files
        ],
    }


def _modelfile(file: Path, request: GgufRequest, context: int) -> str:
    """Return Ollama's Modelfile for a GGUF file.

    Args:
        file: The GGUF file, beside which the Modelfile is put.
        request: What was exported: its stop tokens.
        context: Tokens of the longest chat; Ollama's default is 4,096.
    """
    stops = [request.tokenizer.convert_ids_to_tokens(index) for index in request.stops]
    lines = [
        f"FROM ./{file.name}",
        f"REQUIRES {LEAST_OLLAMA}",
        f"PARAMETER num_ctx {context}",
        "PARAMETER temperature 0",
        *(f'PARAMETER stop "{stop}"' for stop in stops),
    ]
    return "\n".join(lines) + "\n"
