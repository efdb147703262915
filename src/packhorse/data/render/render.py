"""Rows to token ids and mask, in batches, with the proofs that the right tokens are trained on.

Ids and masks equal `apply_chat_template(…, return_assistant_tokens_mask=True)` where the template marks what is
generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from packhorse.data.formats.example import Example
from packhorse.data.read.mistakes import RowMistakes
from packhorse.data.render.contents import check_contents
from packhorse.data.render.control_tokens import ControlTokens
from packhorse.data.render.draw import ChatTemplate
from packhorse.data.render.gates import prove_template, refuse_double_start
from packhorse.data.render.refusal import RowRefusedError
from packhorse.data.render.renderer import ChatRenderer, Rendered, Renderer
from packhorse.data.render.serving import check_serving
from packhorse.data.render.spans import TurnSpan, draw_chat
from packhorse.data.render.tokenizer import load_tokenizer, require_stop_token, stop_ids
from packhorse.data.render.turns import template_tools, template_turns, trained_turns
from packhorse.recipe.schema import DataSection

__all__ = ["Rendered", "Renderer", "check_serving", "load_tokenizer", "make_renderer", "render_examples"]

Drawn = tuple[int, str, list[TurnSpan]]


def make_renderer(tokenizer: PreTrainedTokenizerBase, folder: Path, data: DataSection, chats: bool) -> Renderer:
    """Prove that the tokenizer's template trains what it should, on a chat made for it.

    Args:
        tokenizer: From `load_tokenizer`.
        folder: Where it was loaded from; its generation_config.json may name more stop tokens.
        data: What of the rows is trained on.
        chats: Whether there are chats among the rows; plain text needs no template.

    Raises:
        UserError: No template, one that would train the wrong tokens, or no stop token.
    """
    require_stop_token(tokenizer, folder)
    stops = stop_ids(tokenizer, folder)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    renderer = None
    if chats:
        template, masker = prove_template(tokenizer, folder, stops, data.train_on)
        # Some tokenizers have a second template for chats with tools.
        tool_source = tokenizer.get_chat_template(tools=[{}])
        with_tools = template if tool_source == template.source else ChatTemplate(tool_source, tokenizer)
        renderer = ChatRenderer(template, with_tools, masker)
    # The vocabulary may have gaps, so its size can be below its highest id.
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    control = ControlTokens(tokenizer, data.control_tokens)
    return Renderer(
        tokenizer, tokenizer.bos_token_id, tokenizer.eos_token_id, vocab_size, data.train_on, control, renderer
    )


def render_examples(renderer: Renderer, examples: Sequence[Example], mistakes: RowMistakes) -> list[Rendered | None]:
    """Render up to a batch of rows; None in the place of a row that cannot be trained on as it is.

    Text is tokenised as the tokenizer does by itself, and ends with the stop token; all of it is trained on.
    """
    out: list[Rendered | None] = [None] * len(examples)
    drawn: list[Drawn] = []
    texts: list[tuple[int, str]] = []
    for at, example in enumerate(examples):
        try:
            if example.messages is None:
                texts.append((at, renderer.control.checked(example.text or "", "the text")))
            else:
                drawn.append((at, *_draw(renderer, example)))
        except RowRefusedError as error:
            mistakes.add(error.at(example.where))
    backend = renderer.tokenizer.backend_tokenizer
    # Without offsets, which would cost a quarter of the whole; the mask needs none.
    encodings = backend.encode_batch_fast([text for _, text, _ in drawn], add_special_tokens=False)
    for (at, text, spans), encoding in zip(drawn, encodings):
        try:
            out[at] = _masked(renderer, examples[at], text, spans, encoding.ids)
        except RowRefusedError as error:
            mistakes.add(error.at(examples[at].where))
    for (at, text), encoding in zip(texts, backend.encode_batch_fast([text for _, text in texts])):
        try:
            out[at] = _plain(renderer, text, encoding.ids)
        except RowRefusedError as error:
            mistakes.add(error.at(examples[at].where))
    return out


def _draw(renderer: Renderer, example: Example) -> tuple[str, list[TurnSpan]]:
    chats = renderer.chats
    assert chats is not None, "make_renderer was told that there are no chats"
    trained = trained_turns(example, renderer.train_on)
    turns = template_turns(example, renderer.train_on, renderer.control)
    tools = template_tools(example, renderer.control)
    template = chats.tool_template if tools else chats.template
    try:
        text, spans = draw_chat(template, turns, tools, trained)
    except TemplateError as error:
        raise RowRefusedError(
            f"the chat template refuses the chat (roles: {', '.join(turn['role'] for turn in turns)}): {error}",
            "every row is rendered by it.",
            "mend the row, or set data.template to one that takes it.",
        ) from error
    check_contents(text, turns, tools, spans)
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
