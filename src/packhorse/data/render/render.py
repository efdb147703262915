"""Render rows as token ids and masks, in batches, with the proofs that the right tokens are trained on.

Ids and masks equal `apply_chat_template(…, return_assistant_tokens_mask=True)` if the template marks what is generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from packhorse.data.formats.bad_row import BadRowError
from packhorse.data.formats.example import Example
from packhorse.data.read.row import RowMistakes
from packhorse.data.render.chat_template import ChatTemplate
from packhorse.data.render.check_contents import check_contents
from packhorse.data.render.control_tokens import ControlTokens
from packhorse.data.render.late_system import check_late_systems
from packhorse.data.render.prove_template import prove_template, refuse_double_start
from packhorse.data.render.renderer import ChatRenderer, Rendered, Renderer
from packhorse.data.render.serving import check_serving
from packhorse.data.render.spans import TurnSpan, render_chat
from packhorse.data.render.thinking import thinking_marks
from packhorse.data.render.tokenizer import load_tokenizer, require_stop_token, stop_ids
from packhorse.data.render.turns import template_tools, template_turns, trained_turns
from packhorse.recipe.schema import DataSection

__all__ = ["Rendered", "Renderer", "check_serving", "load_tokenizer", "make_renderer", "render_examples"]

ChatText = tuple[int, str, list[TurnSpan]]


def make_renderer(tokenizer: PreTrainedTokenizerBase, folder: Path, data: DataSection, chats: bool) -> Renderer:
    """Return a renderer after proving, on a known chat, that the tokenizer's template trains the right tokens.

    Args:
        tokenizer: Tokenizer from `load_tokenizer`.
        folder: Folder of the tokenizer; its generation_config.json may name more stop tokens.
        data: Settings, such as which turns are trained on.
        chats: Whether the rows include chats; plain text needs no template.

    Raises:
        UserError: There is no template or no stop token, or the template would train the wrong tokens.
    """
    require_stop_token(tokenizer, folder)
    stops = stop_ids(tokenizer, folder)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    renderer = None
    if chats:
        template, masker = prove_template(tokenizer, folder, stops, data.train_on)
        # Some tokenizers have a separate template for chats with tools.
        tool_source = tokenizer.get_chat_template(tools=[{}])
        with_tools = template if tool_source == template.source else ChatTemplate(tool_source, tokenizer)
        renderer = ChatRenderer(template, with_tools, masker, thinking_marks(template, tokenizer))
    # The vocabulary may have gaps, so its size can be smaller than its highest id.
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    control = ControlTokens(tokenizer, data.control_tokens)
    return Renderer(
        tokenizer, tokenizer.bos_token_id, tokenizer.eos_token_id, vocab_size, data.train_on, control, renderer
    )


def render_examples(renderer: Renderer, examples: Sequence[Example], mistakes: RowMistakes) -> list[Rendered | None]:
    """Render a batch of rows; None in place of a row that cannot be trained on.

    Plain text is tokenised with the tokenizer's defaults and ends with the stop token; all of it is trained on.
    """
    out: list[Rendered | None] = [None] * len(examples)
    chats: list[ChatText] = []
    texts: list[tuple[int, str]] = []
    for at, example in enumerate(examples):
        try:
            if example.messages is None:
                texts.append((at, renderer.control.checked(example.text or "", "the text")))
            else:
                chats.append((at, *_chat_text(renderer, example)))
        except BadRowError as error:
            mistakes.add(error.at(example.where))
    backend = renderer.tokenizer.backend_tokenizer
    # Without offsets, which would cost a quarter of the time; the mask needs none.
    encodings = backend.encode_batch_fast([text for _, text, _ in chats], add_special_tokens=False)
    for (at, text, spans), encoding in zip(chats, encodings):
        try:
            out[at] = _masked(renderer, examples[at], text, spans, encoding.ids)
        except BadRowError as error:
            mistakes.add(error.at(examples[at].where))
    for (at, text), encoding in zip(texts, backend.encode_batch_fast([text for _, text in texts])):
        try:
            out[at] = _plain(renderer, text, encoding.ids)
        except BadRowError as error:
            mistakes.add(error.at(examples[at].where))
    return out


def _chat_text(renderer: Renderer, example: Example) -> tuple[str, list[TurnSpan]]:
    chats = renderer.chats
    assert chats is not None, "the caller of make_renderer said that there are no chats"
    messages = example.messages or ()
    chats.thinking.check_turns(messages)
    trained = trained_turns(example, renderer.train_on)
    turns = template_turns(example, renderer.train_on, renderer.control)
    tools = template_tools(example, renderer.control)
    template = chats.tool_template if tools else chats.template
    check_late_systems(template, turns, tools)
    try:
        text, spans = render_chat(template, turns, tools, trained)
    except TemplateError as error:
        raise BadRowError(
            f"the chat template refuses the chat (roles: {', '.join(turn['role'] for turn in turns)}): {error}",
            "every row is rendered by it.",
            "fix the row, or set data.template to one that accepts it.",
        ) from error
    check_contents(text, turns, tools, spans)
    chats.thinking.check_spans(text, spans, messages)
    return text, spans


def _masked(renderer: Renderer, example: Example, text: str, spans: list[TurnSpan], ids: list[int]) -> Rendered:
    assert renderer.chats is not None
    roles = [message.role for message in example.messages or ()]
    hide_thinking = renderer.train_on.thinking == "mask"
    supervised = renderer.chats.masker.mask(text, ids, spans, roles, hide_thinking)
    refuse_double_start(ids, renderer.start_id, text)
    return Rendered(ids, supervised)


def _plain(renderer: Renderer, text: str, ids: list[int]) -> Rendered:
    refuse_double_start(ids, renderer.start_id, text)
    if ids[-1:] != [renderer.stop_id]:
        ids = [*ids, renderer.stop_id]
    return Rendered(ids, np.ones(len(ids), np.uint8))
