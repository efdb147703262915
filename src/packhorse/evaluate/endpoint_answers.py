"""Answers of a model behind an endpoint: several requests at once, each answer kept as it arrives."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from packhorse.evaluate.answer_cache import Answer, AnswerCache, answer_key
from packhorse.evaluate.endpoint import ChatReply, EndpointClient
from packhorse.evaluate.generate import Message, template_answer
from packhorse.evaluate.held_out import Question

REQUESTS_AT_ONCE: Final = 16
"""A server such as vLLM answers the requests that it has in one batch."""


def endpoint_answers(
    client: EndpointClient,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    limits: Sequence[int],
    cache: AnswerCache,
) -> list[Answer]:
    """Return one answer per question, in the order of the questions.

    Args:
        client: The model. Its server renders the chats with its own template.
        tokenizer: Tokenizer whose template writes calls of tools as text, as the expected answers have them.
        questions: Rows to answer.
        limits: Largest number of new tokens, per question.
        cache: Answers that are known; a new one is added as soon as it arrives.

    Raises:
        UserError: The endpoint fails; answers that have arrived are kept.
    """
    keys = [_key(client, question, limit) for question, limit in zip(questions, limits, strict=True)]
    unknown = {key: row for row, key in enumerate(keys) if cache.get(key) is None}

    def ask(row: int) -> Answer:
        question = questions[row]
        reply = client.chat(list(openai_messages(question.prompt)), limits[row], question.tools)
        return Answer(_text(reply, tokenizer, question), reply.ended)

    pool = ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="endpoint")
    try:
        asked = {pool.submit(ask, row): key for key, row in unknown.items()}
        for done in as_completed(asked):
            cache.add({asked[done]: done.result()})
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    known = [cache.get(key) for key in keys]
    return [answer for answer in known if answer is not None]


def openai_messages(messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    """Yield a chat in OpenAI's form: arguments of calls as JSON text, an id for each call, no thinking."""
    open_ids: list[str] = []
    num_calls = 0
    for message in messages:
        turn: dict[str, Any] = {
            key: message[key] for key in ("role", "content", "name", "tool_call_id") if key in message
        }
        if message["role"] == "tool" and open_ids:
            # Without an id, tools answer in the order of the calls.
            at = open_ids.index(turn["tool_call_id"]) if turn.get("tool_call_id") in open_ids else 0
            turn["tool_call_id"] = open_ids.pop(at)
        if calls := message.get("tool_calls"):
            turn["tool_calls"] = []
            for call in calls:
                num_calls += 1
                name = call.get("id") or f"call_{num_calls}"
                open_ids.append(name)
                function = {
                    "name": call["function"]["name"],
                    "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                }
                turn["tool_calls"].append({"id": name, "type": "function", "function": function})
        yield turn


def _key(client: EndpointClient, question: Question, limit: int) -> str:
    asked = json.dumps([client.url, client.model, list(question.prompt), list(question.tools)], sort_keys=True)
    return answer_key(asked, (), limit, ())


def _text(reply: ChatReply, tokenizer: PreTrainedTokenizerBase, question: Question) -> str:
    """Return the answer as the model's template writes it, where the server has read calls of tools from it."""
    if not reply.tool_calls:
        return reply.text
    try:
        calls = [
            {"type": "function", "function": {"name": call["function"]["name"], "arguments": _arguments(call)}}
            for call in reply.tool_calls
        ]
    except (KeyError, TypeError, ValueError):
        return reply.text  # the model's call is no call; what is left of its answer is judged
    turn = {"role": "assistant", "content": reply.text, "tool_calls": calls}
    return template_answer(tokenizer, question.prompt, turn, question.tools) or reply.text


def _arguments(call: dict[str, Any]) -> Any:  # noqa: ANN401  # JSON
    return json.loads(call["function"]["arguments"])
