"""llama.cpp in another process: it tokenises, and gives log-probabilities, as it will where the file is used.

Run as a program, this module loads one file and prints the address of its HTTP server. A file that llama.cpp cannot
load may end the process, which must not be the user's.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final
from urllib.parse import urlsplit

import xllamacpp

from packhorse.errors import UserError

START_SECONDS: Final = 600
REQUEST_SECONDS: Final = 600


class LlamaCpp:
    """A GGUF file in llama.cpp; use it as a context manager."""

    def __init__(self, file: Path, context: int, exact: bool = False, threads: int = 1) -> None:
        """Load a file.

        Args:
            file: GGUF file.
            context: Tokens of the longest row.
            exact: Whether keys and values are kept in fp32, for comparisons with transformers.
            threads: CPU threads.

        Raises:
            UserError: llama.cpp cannot load it.
        """
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        words = [str(file), str(context), str(int(exact)), str(threads)]
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", __name__, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self._process.stdout is not None
        address = self._process.stdout.readline().strip()
        if not address:
            error = self._broken(file)
            self._end()
            raise error
        found = urlsplit(address)
        assert found.hostname is not None
        self._plain: int | None = None
        self._connection = http.client.HTTPConnection(found.hostname, found.port, timeout=REQUEST_SECONDS)

    def _broken(self, file: Path) -> UserError:
        self._process.wait(START_SECONDS)
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line.split(" E ", 1)[1] for line in lines if " E " in line]
        reason = errors[0] if errors else lines[-1] if lines else "no message"
        return UserError(
            f"llama.cpp cannot load {file.name}: {reason.strip()}.",
            "a file that it cannot load is of no use to Ollama and LM Studio, which contain it.",
            "keep the Hugging Face folder (packhorse export RUN), and report the message with the model's name.",
        )

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the process."""
        self._connection.close()
        self._end()

    def _end(self) -> None:
        self._process.kill()
        with self._process:  # closes its pipes, and waits for it
            self._log.close()

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a rendered chat: special tokens in it are tokens, nothing is added around it."""
        answer = self._post("/tokenize", {"content": text, "add_special": False, "parse_special": True})
        ids: list[int] = answer["tokens"]
        return ids

    def next_log_probabilities(self, ids: Sequence[int], top: int) -> dict[int, float]:
        """Return the natural log-probabilities of the `top` likeliest next tokens after these, by id."""
        # The server holds back what it has to say of an end token, and of half a character: the token is forced.
        forced = [[self._plain_token(), 1e4]]
        words = {"prompt": list(ids), "n_predict": 1, "n_probs": top, "logit_bias": forced, "cache_prompt": True}
        answer = self._post("/completion", words)
        return {one["id"]: one["logprob"] for one in answer["completion_probabilities"][0]["top_logprobs"]}

    def _plain_token(self) -> int:
        """Return an id whose text is whole and ends nothing."""
        if self._plain is None:
            self._plain = self.tokenize("a")[-1]
        return self._plain

    def complete(self, ids: Sequence[int], max_new_tokens: int) -> tuple[list[int], bool]:
        """Return the greedy answer to a prompt, and whether it ended with a stop token."""
        words = {
            "prompt": list(ids),
            "n_predict": max_new_tokens,
            "temperature": 0.0,
            "top_k": 1,
            "cache_prompt": True,
            "return_tokens": True,
        }
        answer = self._post("/completion", words)
        tokens: list[int] = answer["tokens"]
        return tokens, answer["stop_type"] in ("eos", "word")

    def _post(self, path: str, words: dict[str, Any]) -> Any:  # noqa: ANN401
        self._connection.request("POST", path, json.dumps(words), {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        body = response.read()
        if response.status != http.client.OK:
            raise RuntimeError(f"llama.cpp answered {response.status} to {path}: {body[:300]!r}")
        return json.loads(body)


def _serve(file: str, context: str, exact: str, threads: str) -> None:
    """Load a file, print the server's address, and wait until the caller goes away."""
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.hostnames = ["127.0.0.1"] if hasattr(params, "hostnames") else params.hostnames
    params.port = 0
    params.n_ctx = int(context)
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.warmup = False
    if exact == "1":
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
