"""Render rows of preference pairs as two documents, and answers with a verdict with the length of their prompt.

What differs between the documents of a row must be the answer alone: each begins with the ids of the same prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from packhorse.data.formats.bad_row import BadRowError, excerpt
from packhorse.data.formats.example import Example
from packhorse.data.read.row import RowMistakes
from packhorse.data.render.render import render_examples
from packhorse.data.render.renderer import Rendered, Renderer


def render_pairs(renderer: Renderer, examples: Sequence[Example], mistakes: RowMistakes) -> list[Rendered | None]:
    """Render both answers of each row; None in place of a row that cannot be trained on."""
    chosen = render_examples(renderer, examples, mistakes)
    good = [at for at, row in enumerate(chosen) if row is not None]
    rejected = dict(zip(good, render_examples(renderer, [examples[at].rejected_chat for at in good], mistakes)))
    out: list[Rendered | None] = [None] * len(examples)
    for at in good:
        one, other = chosen[at], rejected[at]
        if one is None or other is None:
            continue
        try:
            _check_pair(renderer, one, other)
        except BadRowError as error:
            mistakes.add(error.at(examples[at].where))
        else:
            out[at] = Rendered(one.ids + other.ids, np.concatenate([one.supervised, other.supervised]), len(one.ids))
    return out


def render_verdicts(renderer: Renderer, examples: Sequence[Example], mistakes: RowMistakes) -> list[Rendered | None]:
    """Render each row, with the length of its prompt; None in place of a row that cannot be trained on."""
    out = render_examples(renderer, examples, mistakes)
    for at, row in enumerate(out):
        if row is None:
            continue
        out[at] = Rendered(row.ids, row.supervised, _prompt_length(row))
        if _prompt_length(row) == 0:
            out[at] = None
            mistakes.add(_no_prompt().at(examples[at].where))
    return out


def documents_of(example: Example, row: Rendered) -> list[tuple[Example, Rendered]]:
    """Return the chats of a row with their tokens: both answers of a pair, else the row itself."""
    if example.rejected is None:
        return [(example, row)]
    cut = row.cut
    chosen, rejected = (Rendered(row.ids[part], row.supervised[part]) for part in (slice(cut), slice(cut, None)))
    return [(example, chosen), (example.rejected_chat, rejected)]


def _prompt_length(row: Rendered) -> int:
    return int(np.argmax(row.supervised))


def _check_pair(renderer: Renderer, chosen: Rendered, rejected: Rendered) -> None:
    prompts = [row.ids[: _prompt_length(row)] for row in (chosen, rejected)]
    if prompts[0] != prompts[1]:
        at = next((at for at, (one, other) in enumerate(zip(*prompts)) if one != other), min(map(len, prompts)))
        shown = [excerpt(renderer.tokenizer.decode(prompt[at : at + 8])) for prompt in prompts]
        raise BadRowError(
            f"the prompt has other ids before the chosen answer than before the rejected one, from token {at} on: "
            f"{shown[0]} and {shown[1]}.",
            "the answers would be compared as answers to different prompts.",
            "fix the template, so that an answer does not change the text before it; or set data.template to another.",
        )
    if not prompts[0]:
        raise _no_prompt()
    if chosen.ids == rejected.ids:
        raise BadRowError(
            "chosen and rejected have equal ids.",
            "such a pair does not say which is better.",
            "remove the row, or set data.strip and data.train_on.thinking so that its answers differ.",
        )


def _no_prompt() -> BadRowError:
    return BadRowError(
        "there is no token before the answer.",
        "an answer is better or worse only as an answer to something, and its first token needs one before it.",
        "add a prompt, or remove the row.",
    )
