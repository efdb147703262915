"""Client of an OpenAI-compatible endpoint for chat, such as vLLM's; a request is repeated where that helps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, NoReturn

import httpx

from packhorse.errors import UserError, shown_characters
from packhorse.secrets import MASK, mask

ATTEMPTS: Final = 6
FIRST_WAIT_SECONDS: Final = 1.0
"""Wait before the second attempt; each later wait is twice as long, unless the endpoint names one."""
LONGEST_WAIT_SECONDS: Final = 120.0
CONNECT_SECONDS: Final = 20.0
BUSY: Final = (408, 409, 425, 429)


@dataclass(frozen=True)
class ChatReply:
    """Answer of an endpoint.

    Attributes:
        text: Content of the answer, without thinking that the endpoint separates.
        ended: Whether the model ended it; otherwise it was cut at `max_tokens` or by a filter.
        tool_calls: Calls in OpenAI's form, with arguments as JSON text.
        prompt_tokens: Tokens of the request as the endpoint counts them; None if it does not.
        completion_tokens: Tokens of the answer, with its thinking.
    """

    text: str
    ended: bool
    tool_calls: tuple[dict[str, Any], ...] = ()
    prompt_tokens: int | None = field(default=None, compare=False)
    completion_tokens: int | None = field(default=None, compare=False)


class EndpointClient:
    """A model behind an endpoint. Threads may share it."""

    def __init__(
        self,
        url: str,
        model: str,
        api_key: str | None = None,
        timeout_seconds: float = 600.0,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], object] = time.sleep,
        key_setting: str = "--api-key-env NAME",
        repeats_timeouts: bool = False,
    ) -> None:
        """Open a client; nothing is sent yet.

        Args:
            url: Address up to the version, such as `http://localhost:8000/v1`.
            model: Name of the model at the endpoint.
            api_key: Key that is sent as a bearer token; None for none.
            timeout_seconds: Longest wait for one answer.
            transport: Replaces the network.
            sleep: Waits between attempts.
            key_setting: What the user writes to name the variable with the key.
            repeats_timeouts: Whether a request is repeated that was not answered in time.

        Raises:
            UserError: The address does not begin with http:// or https://.
        """
        self.url, self.model, self._api_key, self._sleep = url.rstrip("/"), model, api_key, sleep
        self._key_setting, self._repeats_timeouts = key_setting, repeats_timeouts
        if not self.url.startswith(("http://", "https://")):
            raise UserError(
                f"{url} is not the address of an endpoint.",
                "requests are sent over HTTP to ADDRESS/chat/completions.",
                "give the address up to the version, for example http://localhost:8000/v1.",
            )
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(timeout_seconds, connect=CONNECT_SECONDS)
        self._http = httpx.Client(headers=headers, timeout=timeout, transport=transport)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_tokens: int,
        tools: Sequence[Mapping[str, Any]] = (),
        **settings: Any,  # noqa: ANN401
    ) -> ChatReply:
        """Return the answer to a chat: the most likely one, unless `settings` contains another temperature.

        Args:
            messages: Chat that ends before the answer, in OpenAI's form.
            max_tokens: Largest number of new tokens.
            tools: Tools that may be called, in OpenAI's form.
            settings: Further fields of the request, such as `seed` or `response_format`; None removes a field.

        Raises:
            UserError: The endpoint cannot be reached, refuses the request, is busy or fails in every attempt, or does
                not answer in OpenAI's form.
        """
        body = {"model": self.model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0} | settings
        if tools:
            body["tools"] = list(tools)
        return self._reply(self._post({name: value for name, value in body.items() if value is not None}))

    def _post(self, body: Mapping[str, Any]) -> httpx.Response:
        """Return the first successful response."""
        failure = ""
        for attempt in range(ATTEMPTS):
            wait = FIRST_WAIT_SECONDS * 2**attempt
            try:
                response = self._http.post(f"{self.url}/chat/completions", json=body)
            except httpx.TransportError as error:
                failure = f"{type(error).__name__} {error}".rstrip()
                if isinstance(error, httpx.ReadTimeout) and not self._repeats_timeouts:
                    break  # the endpoint has taken the request, and would take as long again
            else:
                if response.is_success:
                    return response
                failure = f"HTTP {response.status_code}: {self._message(response)}"
                if response.status_code not in BUSY and response.status_code < 500:
                    self._refuse(response.status_code, failure)
                wait = _retry_after(response, wait)
            if wait > LONGEST_WAIT_SECONDS:
                break
            if attempt + 1 < ATTEMPTS:
                self._sleep(wait)
        raise UserError(
            f"{self.url} gave no answer of {self.model}; attempt {attempt + 1} ended with: {failure}",
            "the endpoint is down, overloaded, or allows fewer requests.",
            f"look at it with `curl {self.url}/models`, and run the same command again: answers so far are kept.",
        )

    def _refuse(self, status: int, failure: str) -> NoReturn:
        """Raise the error of a request that would fail again."""
        fact = f"{self.url} refused a request to {self.model}: {failure}"
        if status in (401, 403):
            sent = "the key that was sent is not accepted" if self._api_key else "no key was sent"
            raise UserError(
                fact, f"{sent}.", f"put the key into an environment variable, and name it: {self._key_setting}."
            )
        raise UserError(
            fact,
            "the endpoint has no such model or address, or the chat does not fit its context.",
            f"compare the address and the name of the model with `curl {self.url}/models`.",
        )

    def _reply(self, response: httpx.Response) -> ChatReply:
        """Return the first choice of a response."""
        try:
            body = response.json()
            choice, usage = body["choices"][0], body.get("usage") or {}
            message = choice["message"]
            text, calls = message.get("content"), message.get("tool_calls")
            if not isinstance(text, str | None) or not isinstance(calls, list | None):
                raise TypeError("content is no text, or tool_calls no list")
            ended = choice.get("finish_reason") in ("stop", "tool_calls")
            counts = (usage.get(name) for name in ("prompt_tokens", "completion_tokens"))
            known = (count if isinstance(count, int) else None for count in counts)
            return ChatReply(text or "", ended, tuple(calls or ()), *known)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.url} answered {self._message(response) or 'an empty body'!r}.",
                "a response in OpenAI's form has choices[0].message.content.",
                "give the address of an OpenAI-compatible endpoint up to the version, as in http://localhost:8000/v1.",
            ) from error

    def _message(self, response: httpx.Response) -> str:
        """Return what the response says, on one line and without secrets."""
        text = response.text
        try:
            value = json.loads(text)
            text = str(value["error"]["message"])
        except (ValueError, LookupError, TypeError):
            pass
        text = " ".join(text.split())
        return mask(text.replace(self._api_key, MASK) if self._api_key else text)[: shown_characters(200)]


def _retry_after(response: httpx.Response, otherwise: float) -> float:
    """Return the seconds that the endpoint wants a client to wait (RFC 9110, 10.2.3): a number or a date."""
    value = response.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return otherwise
