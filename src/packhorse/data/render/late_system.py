"""Accept a system turn that is not the first one where the template writes it in its place, and refuse it elsewhere.

Many templates write only a first system turn. Others move all system texts to the beginning, omit the later ones or
refuse them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from uuid import uuid4

from jinja2 import TemplateError

from packhorse.data.formats.bad_row import BadRowError, excerpt
from packhorse.data.render.chat_template import ChatTemplate
from packhorse.data.render.turns import Turn

# Random, so that no row and no template contains it; letters and digits, which no filter of a template changes.
NAME: Final = f"turn{uuid4().hex}"


def check_late_systems(template: ChatTemplate, turns: Sequence[Turn], tools: list[Turn] | None) -> None:
    """Render the chat with a unique text in place of each turn's, and check where those of late system turns are.

    Raises:
        BadRowError: The template does not write such a turn once, after all turns before it and before all after it.
    """
    late = [place for place, turn in enumerate(turns) if place and turn["role"] == "system" and turn["content"].strip()]
    if not late:
        return
    # Some templates write an empty turn differently, such as one with tool calls.
    names = [f"{NAME}{place}x" if turn["content"].strip() else "" for place, turn in enumerate(turns)]
    try:
        text = template.text([{**turn, "content": name} for turn, name in zip(turns, names)], tools)
    except TemplateError as error:
        raise _late_system(late[0], turns, f"refuses ({error})") from error
    locations = [text.find(name) if name else -1 for name in names]
    for place in late:
        here = locations[place]
        after = [at for at in locations[place + 1 :] if at >= 0]
        if text.count(names[place]) != 1 or max(locations[:place]) > here or min(after, default=here) < here:
            raise _late_system(place, turns, "does not write in its place")


def _late_system(place: int, turns: Sequence[Turn], what: str) -> BadRowError:
    return BadRowError(
        f"turn {place + 1} is a system turn, which the chat template {what}: {excerpt(turns[place]['content'])}",
        "the model would be trained on another chat than the row has.",
        "move it to the beginning, make it a user turn, or set data.template to one that writes it in its place, such "
        "as chatml.",
    )
