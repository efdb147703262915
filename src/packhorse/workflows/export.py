"""Export the result of a finished run for other programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from packhorse.durable import replace_file
from packhorse.errors import UserError
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.folder import relative
from packhorse.run_folder.layout import EXPORT_FOLDER, MODEL_FOLDER
from packhorse.workflows.prepared_data import require_data

if TYPE_CHECKING:
    from packhorse.export.gguf.export import GgufExport, GgufRequest

GGUF_FOLDER = "gguf"
GGUF_FIGURES_FILE = "gguf.json"
MODELFILE = "Modelfile"
LEAST_OLLAMA = "0.12.0"
"""First version whose engine renders the chat template inside the file."""
MOST_TEXTS = 500
"""Rendered rows whose ids are compared; more of one kind find nothing more."""


def export_gguf_files(
    plan: RunPlan, file_types: Sequence[str], out: str, progress: Callable[[str, int, int], None]
) -> tuple[GgufExport, Path]:
    """Write the model of a run as GGUF files, with a Modelfile for Ollama and the figures as JSON.

    Args:
        plan: Plan of a finished run.
        file_types: Types of files, such as `Q8_0`.
        out: Folder of the result; empty: RUN/export/gguf.
        progress: Called with what is being done, bytes done and bytes in all.

    Raises:
        UserError: The run has not finished, the extra is not installed, or the files cannot be proven.
    """
    require_data(plan)
    _require_extra()
    from packhorse.export.gguf.export import export_gguf

    request = _gguf_request(plan, file_types, Path(out) if out else Path(plan.run_folder) / EXPORT_FOLDER / GGUF_FOLDER)
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


def result_folder(plan: RunPlan) -> Path:
    """Return the folder of the whole trained model in Hugging Face form.

    Raises:
        UserError: The run has not finished, or its result is an adapter.
    """
    folder = Path(plan.run_folder)
    if not plan.recipe.method.trains_base:
        raise UserError(
            f"the result of {relative(folder)} is an adapter.",
            "a GGUF file holds a whole model.",
            "train with method: full, or convert the adapter with llama.cpp's own program.",
        )
    model = folder / MODEL_FOLDER
    if not model.is_dir():
        raise UserError(
            f"{relative(folder)} has no {MODEL_FOLDER} folder.",
            "training writes its result there when it ends.",
            f"let the run finish: packhorse resume {relative(folder)}.",
        )
    return model


def _gguf_request(plan: RunPlan, file_types: Sequence[str], out: Path) -> GgufRequest:
    from packhorse.data.render.tokenizer import read_tokenizer, stop_ids
    from packhorse.evaluate.held_out import read_sets, trained_form
    from packhorse.export.gguf.export import GgufRequest
    from packhorse.export.gguf.measure import HeldOutRow

    model = result_folder(plan)
    tokenizer = read_tokenizer(model, plan.recipe.model.trust_remote_code)
    assert plan.data is not None
    settings = plan.recipe.evaluation
    form = trained_form(tokenizer, plan.recipe.data)
    sets = read_sets(Path(plan.data.folder), settings, form)
    rows = []
    for held_out in sets:
        for index in range(held_out.documents.num_documents):
            ids, mask = held_out.documents.document(index)
            rows.append(HeldOutRow(tuple(ids.tolist()), tuple((np.flatnonzero(mask[1:]) + 1).tolist())))
    texts = [text for held_out in sets for row in held_out.documents.rows() for text in _texts(tokenizer, form, row)]
    stops = sorted(stop_ids(tokenizer, model), key=lambda index: index != tokenizer.eos_token_id)
    return GgufRequest(
        model=model,
        tokenizer=tokenizer,
        stops=stops,
        file_types=file_types,
        out=out,
        name=Path(plan.run_folder).name,
        texts=texts[:MOST_TEXTS],
        rows=rows,
        smallest_effect=settings.smallest_effect,
        facts={"description": f"Fine-tuned by Packhorse from {plan.recipe.model.id or plan.recipe.model.path}"}
        if plan.recipe.model.id or plan.recipe.model.path
        else {},
    )


def _texts(tokenizer: Any, form: Any, row: dict[str, Any]) -> list[str]:  # noqa: ANN401
    """Return the text of a row as the template writes it."""
    if not row.get("messages"):
        return [row["text"]]
    messages, tools = form(row)
    return [tokenizer.apply_chat_template(messages, tools=list(tools) or None, tokenize=False)]


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
