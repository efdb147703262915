"""Requests to a judge: counted and priced before the first is sent, kept on disk, several at the same time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from packhorse.durable import append_line, read_lines
from packhorse.errors import Mistake, UserError
from packhorse.evaluate.endpoint import EndpointClient
from packhorse.evaluate.stored import require_writable
from packhorse.recipe.evaluation import JudgeSection

CountTokens = Callable[[str], int]
MILLION: Final = 1_000_000


class JudgeReply(BaseModel):
    """Reply of a judge; one line of judge.jsonl."""

    model_config = ConfigDict(frozen=True)

    key: str
    """Hash of endpoint, model, settings and prompt."""
    text: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class JudgeCost:
    """Requests that an evaluation needs, before any is sent.

    Attributes:
        num_kept: Replies that an earlier judgement has kept.
        num_requests: Requests that are still to be sent.
        prompt_tokens: Tokens of these requests, counted by the tokenizer of the run: an estimate.
        completion_tokens: Most tokens of their replies.
        cost: Most that all requests cost, kept ones included; None without prices.
    """

    num_kept: int
    num_requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None

    def __str__(self) -> str:
        if not self.num_requests:
            return f"judge: all {self.num_kept:,} replies are kept from before; no request is sent"
        cost = f", cost at most about {self.cost:.4g}" if self.cost is not None else ""
        kept = f" ({self.num_kept:,} replies are kept from before)" if self.num_kept else ""
        return (
            f"judge: {self.num_requests:,} requests{kept}, about {self.prompt_tokens:,} tokens to read and at most "
            f"{self.completion_tokens:,} to write{cost}; counted with the tokenizer of the run"
        )


def api_key(settings: JudgeSection) -> str | None:
    """Return the API key; None if the section names no variable.

    Raises:
        UserError: The variable is not set.
    """
    if settings.api_key_env is None:
        return None
    key = os.environ.get(settings.api_key_env, "").strip()
    if not key:
        raise UserError(
            f"evaluation.judge.api_key_env is {settings.api_key_env}, and this variable is not set.",
            "the key is read from the environment only, so that no file holds it.",
            f"export {settings.api_key_env}=KEY, or remove evaluation.judge.api_key_env for an endpoint without one.",
        )
    return key


class Judge:
    """A judge with the replies that it has given so far."""

    def __init__(self, settings: JudgeSection, file: Path, count_tokens: CountTokens) -> None:
        """Read the replies that are kept.

        Args:
            settings: Section of the recipe.
            file: judge.jsonl of the run.
            count_tokens: Tokens of a text; estimates what the judge counts.

        Raises:
            UserError: The variable of the API key is not set.
        """
        self._settings, self._file, self._count_tokens = settings, file, count_tokens
        self._api_key = api_key(settings)
        self._replies = {reply.key: reply for reply in read_lines(file, JudgeReply)}
        self._stop, self._lock = Event(), Lock()

    def reply(self, prompt: str) -> JudgeReply:
        """Return the reply to a prompt of `ask`."""
        return self._replies[self._key(prompt)]

    def price(self, replies: Sequence[JudgeReply]) -> float | None:
        """Return the cost of replies; None without prices."""
        read, written = (sum(getattr(r, name) for r in replies) for name in ("prompt_tokens", "completion_tokens"))
        return self._cost(read, written)

    def estimate(self, prompts: Sequence[str]) -> JudgeCost:
        """Return what the prompts need.

        Raises:
            UserError: It is above `max_requests` or `max_cost`.
        """
        settings, missing = self._settings, self._missing(prompts)
        kept = [self._replies[key] for key in {self._key(prompt) for prompt in prompts} if key in self._replies]
        prompt_tokens = sum(self._count_tokens(prompt) for prompt in missing.values())
        completion_tokens = len(missing) * settings.max_reply_tokens
        most = self._cost(prompt_tokens, completion_tokens)
        cost = None if most is None else most + (self.price(kept) or 0.0)
        if len(kept) + len(missing) > settings.max_requests:
            raise UserError(
                f"the judge needs {len(kept) + len(missing):,} requests, and evaluation.judge.max_requests is "
                f"{settings.max_requests:,}.",
                "no request is sent if all together are above the limit.",
                f"set evaluation.judge.max_requests to {len(kept) + len(missing)}, or set evaluation.judge.max_rows.",
            )
        if missing and cost is not None and settings.max_cost is not None and cost > settings.max_cost:
            raise UserError(
                f"the judge may cost about {cost:.4g}, and evaluation.judge.max_cost is {settings.max_cost:g}.",
                f"{len(missing):,} requests have about {prompt_tokens:,} tokens by the tokenizer of the run, "
                f"and up to {completion_tokens:,} tokens of replies; no request was sent.",
                "raise evaluation.judge.max_cost, or set evaluation.judge.max_rows.",
            )
        return JudgeCost(len(kept), len(missing), prompt_tokens, completion_tokens, cost)

    def ask(self, prompts: Sequence[str], show: Callable[[int], None] = lambda _: None) -> None:
        """Get a reply to each prompt; replies that are kept are not requested again.

        Args:
            prompts: Prompts of one evaluation.
            show: Function that takes the number of replies so far.

        Raises:
            UserError: The file cannot be written, the endpoint fails or refuses, or the replies have cost more than
                `max_cost`.
        """
        settings = self._settings
        missing = list(self._missing(prompts).items())
        require_writable(self._file)
        client = EndpointClient(
            settings.url,
            settings.model,
            self._api_key,
            settings.timeout_seconds,
            key_setting="evaluation.judge.api_key_env: NAME",
            repeats_timeouts=True,
            sleep=self._sleep,
        )
        used = {self._key(prompt) for prompt in prompts}
        with closing(client), ThreadPoolExecutor(settings.concurrency) as pool:
            try:
                # The first alone: a wrong key or address fails once, and not in every thread.
                for number, (key, prompt) in enumerate(missing[:1], 1):
                    self._ask(client, key, prompt, used)
                    show(number)
                waiting = [pool.submit(self._ask, client, key, prompt, used) for key, prompt in missing[1:]]
                for number, done in enumerate(as_completed(waiting), 2):
                    done.result()
                    show(number)
            except UserError as error:
                raise self._with_progress(error, used) from error
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)  # waits for requests that are on the way: they are paid for

    def _ask(self, client: EndpointClient, key: str, prompt: str, used: set[str]) -> None:
        settings = self._settings
        fields: dict[str, Any] = {"max_tokens": settings.max_reply_tokens} | settings.request
        chat = client.chat([{"role": "user", "content": prompt}], **fields)
        reply = JudgeReply(
            key=key,
            text=chat.text,
            prompt_tokens=self._count_tokens(prompt) if chat.prompt_tokens is None else chat.prompt_tokens,
            completion_tokens=self._count_tokens(chat.text)
            if chat.completion_tokens is None
            else chat.completion_tokens,
        )
        with self._lock:
            append_line(self._file, reply)
            self._replies[key] = reply
            spent = self.price([self._replies[key] for key in used if key in self._replies])
        if settings.max_cost is not None and spent is not None and spent > settings.max_cost:
            raise UserError(
                f"the replies of the judge have cost {spent:.4g}, and evaluation.judge.max_cost is "
                f"{settings.max_cost:g}.",
                "the judge counts more tokens than the tokenizer of the run, or thinks.",
                "raise evaluation.judge.max_cost, or set evaluation.judge.max_rows.",
            )

    def _with_progress(self, error: UserError, used: set[str]) -> UserError:
        """Return the error with the number of replies that are kept."""
        kept = sum(key in self._replies for key in used)
        (mistake,) = error.mistakes
        why = f"{mistake.why} {kept:,} of {len(used):,} replies are kept, and are not requested again."
        return UserError.of([Mistake(mistake.fact, why, mistake.fix)])

    def _sleep(self, seconds: float) -> None:
        """Wait, unless another request has failed: then this one is not repeated."""
        if self._stop.wait(seconds):
            raise _StoppedError

    def _missing(self, prompts: Sequence[str]) -> Mapping[str, str]:
        keys = {self._key(prompt): prompt for prompt in prompts}
        return {key: prompt for key, prompt in keys.items() if key not in self._replies}

    def _key(self, prompt: str) -> str:
        settings = self._settings
        content = [settings.url, settings.model, settings.max_reply_tokens, settings.request, prompt]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        settings = self._settings
        if settings.input_price is None or settings.output_price is None:
            return None
        return (prompt_tokens * settings.input_price + completion_tokens * settings.output_price) / MILLION


class _StoppedError(Exception):
    """A request was given up because another one failed."""
