"""Prove a chat template on a known chat, before any row is rendered."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from packhorse.data.formats.bad_row import BadRowError, excerpt
from packhorse.data.render.chat_template import ChatTemplate
from packhorse.data.render.check_contents import check_contents
from packhorse.data.render.clock import ClockError
from packhorse.data.render.mask import TokenMasker
from packhorse.data.render.spans import TurnSpan, render_chat
from packhorse.data.render.tokenizer import HOW_TO_MARK, fitting_templates, require_template, tokenizer_of
from packhorse.data.render.turns import Turn
from packhorse.errors import UserError
from packhorse.recipe.schema import Recipe, TrainOnSection

PROBE_SYSTEM: Final[Turn] = {"role": "system", "content": "instruction of the probe"}
PROBE: Final[tuple[Turn, ...]] = (
    {"role": "user", "content": "first question of the probe"},
    {"role": "assistant", "content": "first answer of the probe"},
    {"role": "user", "content": "second question of the probe"},
    {"role": "assistant", "content": "second answer of the probe"},
)
CHATS: Final[tuple[list[Turn], ...]] = ([PROBE_SYSTEM, *PROBE], [*PROBE])


def prove_template(
    tokenizer: PreTrainedTokenizerBase, folder: Path, stops: frozenset[int], train_on: TrainOnSection
) -> tuple[ChatTemplate, TokenMasker]:
    """Prove that the tokenizer's template trains each answer with its stop token, and no other text.

    The chat begins with a system turn if the template accepts one.

    Raises:
        UserError: There is no template, or it fails the proof.
    """
    require_template(tokenizer, folder)
    try:
        template = ChatTemplate(tokenizer.get_chat_template(), tokenizer)
        prove_fixed_clock(template, folder)
        for turns in CHATS:
            try:
                return template, _prove(tokenizer, template, stops, turns, train_on)
            except (TemplateError, BadRowError) as error:
                refused = error
        raise refused
    except TemplateError as error:
        raise UserError(
            f"the chat template of {folder} cannot render a chat of user and assistant turns: {error}",
            "every row is rendered by it.",
            f"fix the template, or set data.template to {' or '.join(fitting_templates(tokenizer))}.",
        ) from error
    except BadRowError as error:
        marked = "" if template.has_markers else f" In it, {HOW_TO_MARK}"
        fact = f"the chat template of {folder}, tested on a chat: {error.fact}"
        raise UserError(fact, error.why, error.fix + marked) from error


def prove_fixed_clock(template: ChatTemplate, folder: Path) -> None:
    """Raise UserError for a template that writes the current date into a chat, with or without a system turn."""
    for turns in CHATS:
        try:
            template.text(turns)
            template.prompt(turns[:-1])
        except ClockError as error:
            raise UserError(f"{error.fact}; it is the template of {folder}.", error.why, error.fix) from error
        except TemplateError:
            continue  # refused below, unless the template accepts the other chat


def prove_recipe_clock(recipe: Recipe, folder: Path) -> None:
    """Raise UserError if the template of a recipe with this tokenizer folder writes the current date into chats."""
    tokenizer = tokenizer_of(recipe, folder)
    if tokenizer.chat_template:
        prove_fixed_clock(ChatTemplate(tokenizer.get_chat_template(), tokenizer), folder)


def _prove(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    stops: frozenset[int],
    turns: list[Turn],
    train_on: TrainOnSection,
) -> TokenMasker:
    answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    trained = answers[-1:] if train_on.turns == "last" else answers
    text, spans = render_chat(template, turns, None, trained)
    check_contents(text, turns, None, spans)
    masker = TokenMasker(tokenizer, stops, text)
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    masker.mask(text, ids, spans, [turn["role"] for turn in turns], hide_thinking=False)
    refuse_double_start(ids, tokenizer.bos_token_id, text)
    for span in spans:
        _check_prompt(template, turns, text, span)
    return masker


def _check_prompt(template: ChatTemplate, turns: list[Turn], text: str, span: TurnSpan) -> None:
    prompt = template.prompt(turns[: span.place])
    if text.startswith(prompt) and len(prompt) >= span.start:
        return
    raise BadRowError(
        f"turn {span.place + 1} is trained after {excerpt(text, span.start)}, and generated after "
        f"{excerpt(prompt, len(prompt))}",
        "nothing would write the text between the two: a served prompt lacks it, and it is not trained on.",
        "end the template with the text that precedes an answer, for instance "
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}.",
    )


def refuse_double_start(ids: list[int], start: int | None, text: str) -> None:
    """Raise BadRowError for a row that begins with the start token twice."""
    if start is not None and ids[0:1] == ids[1:2] == [start]:
        raise BadRowError(
            f"the row begins with the start token twice (id {start}): {excerpt(text)}",
            "the model never saw that; two of the template, the text and the tokenizer write it.",
            "remove it from the template or from the row's text.",
        )
