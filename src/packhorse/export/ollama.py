"""Text files for programs that run a GGUF file: Ollama's Modelfile, and where LM Studio looks for a file."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from packhorse.export.gguf.export import GgufRequest

LEAST_OLLAMA: Final = "0.12.0"
"""First version whose engine renders the chat template inside the file."""


def modelfile(file: Path, request: GgufRequest, context: int) -> str:
    """Return Ollama's Modelfile for a GGUF file.

    Args:
        file: The GGUF file, beside which the Modelfile is put.
        request: What was exported: its stop tokens.
        context: Tokens of the longest chat; Ollama's own default is 4,096.
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


def ollama_command(folder: Path, name: str) -> str:
    """Return the command that makes the model known to Ollama."""
    return f"ollama create {name} -f {folder / 'Modelfile'}"


def lm_studio_command(file: Path, publisher: str, name: str) -> str:
    """Return the command that makes a file known to LM Studio, which ignores files outside PUBLISHER/MODEL folders."""
    return f"lms import {file} --user-repo {publisher}/{name} --hard-link -y"
