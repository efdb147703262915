"""Change any leaf of a row: tokens or mask change, its key is listed as kept or ignored, or the row is refused."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from data_cases import WORDS
from rendering_cases import byte_tokenizer

from packhorse.data.formats.example import Example
from packhorse.data.formats.key_counts import KeyCounts
from packhorse.data.formats.rows import convert_rows, resolve_format
from packhorse.data.read.row import Row, RowMistakes
from packhorse.data.render.render import Renderer, make_renderer, render_examples
from packhorse.data.render.tokenizer import load_tokenizer
from packhorse.recipe.schema import DataSection, Source

NUM_ROWS = 2_000
UNTRAINABLE = ("preference", "kto")
NOUNS = [word for word in WORDS if word.isalpha()] + ["Ana beat Bo", "3", "no, thanks", "0"]
Leaf = tuple[Any, Any, str]
"""The container of a leaf, its key there, and the names above it."""


# --- rows of every format, made by chance ----------------------------------------------------------------------------


class Rows:
    """Rows with everything that a format may have, each part of it by chance."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.num_calls = 0

    def text(self) -> str:
        return " ".join(self.chance.choices(NOUNS, k=self.chance.randint(1, 4))) + "."

    def some(self, **parts: Any) -> dict[str, Any]:
        """Each part with an even chance."""
        return {key: value for key, value in parts.items() if self.chance.random() < 0.5}

    def metadata(self) -> dict[str, Any]:
        return self.some(
            id=self.chance.randint(0, 9), source=self.text(), score=0.5, flag=True, meta={"by": self.text(), "n": [1]},
            tags=[self.text(), "b"], nothing=None,
        )  # fmt: skip

    def user(self) -> dict[str, Any]:
        parts = [{"type": "text", "text": self.text()}, {"type": "text", "value": self.text()}]
        content = parts if self.chance.random() < 0.2 else self.text()
        return {"role": self.chance.choice(["user", "human"]), "content": content, **self.some(train=False)}

    def answer(self, marks: bool = True) -> dict[str, Any]:
        content: Any = self.text()
        if self.chance.random() < 0.2:
            content = [{"type": "reasoning", "text": self.text()}, {"type": "text", "text": content}]
        turn = {"role": "assistant", "content": content}
        if isinstance(content, str):
            turn |= self.chance.choice([{}, {"reasoning_content": self.text()}])
        return turn | (self.chance.choice([{}, {}, {"weight": 1}, {"train": True}]) if marks else {})

    def call(self) -> list[dict[str, Any]]:
        self.num_calls += 1
        called = {"name": "rain", "arguments": {"city": self.text(), "days": [1, {"deep": self.text()}]}}
        call: dict[str, Any] = {"id": f"call{self.num_calls}", "type": "function", "function": called}
        if self.chance.random() < 0.3:
            called["arguments"] = json.dumps(called["arguments"])
        turn = {"role": "assistant", "content": self.chance.choice([None, "", self.text()]), "tool_calls": [call]}
        if self.chance.random() < 0.3:
            turn = {"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps(called)}]}
            return [turn, {"role": "tool", "content": self.text(), "name": "rain"}]
        return [turn, {"role": "tool", "content": self.text(), "tool_call_id": call["id"], **self.some(name="rain")}]

    def turns(self, marks: bool = True) -> list[dict[str, Any]]:
        turns = []
        for _ in range(self.chance.randint(1, 2)):
            turns += [self.user() if marks else {"role": "user", "content": self.text()}]
            turns += self.call() if self.chance.random() < 0.3 else []
            turns += [self.answer(marks)]
        return turns

    def around(self) -> dict[str, Any]:
        """What may be beside a chat."""
        tools = [{"type": "function", "function": {"name": "rain", "description": self.text(), "strict": True}}]
        return self.some(tools=self.chance.choice([tools, json.dumps(tools)]), **{self.system(): self.text()})

    def system(self) -> str:
        return self.chance.choice(["system", "system_prompt"])

    def before(self) -> dict[str, Any]:
        """What may be beside a prompt that is a text."""
        history = self.chance.choice([[[self.text(), self.text()]], self.turns()])
        return {**self.around(), **self.some(history=history, context=self.text(), input=self.text())}

    def messages(self) -> dict[str, Any]:
        return {"messages": self.turns(), **self.around()}

    def sharegpt(self) -> dict[str, Any]:
        turns = [{"from": "human", "value": self.text()}, {"from": "gpt", "value": self.text()}]
        if self.chance.random() < 0.4:
            call = json.dumps({"name": "rain", "arguments": {"city": self.text()}})
            turns[1:1] = [{"from": "function_call", "value": call}, {"from": "observation", "value": self.text()}]
        return {"conversations": turns, **self.around()}

    def alpaca(self) -> dict[str, Any]:
        return {"instruction": self.text(), self.chance.choice(["output", "response"]): self.text(), **self.before()}

    def prompt_completion(self) -> dict[str, Any]:
        if self.chance.random() < 0.4:
            return {"prompt": [*self.turns(marks=False), self.user()], "completion": [self.answer()], **self.around()}
        return {"prompt": self.text(), self.chance.choice(["completion", "response"]): self.text(), **self.before()}

    def question_answer(self) -> dict[str, Any]:
        answers = self.chance.choice([
            {"answer": self.text()},
            {"answer": self.text(), "answers": [self.text()]},
            {"answers": {"text": [self.text(), self.text()], "answer_start": [3, 5]}},
            {"answers": [{"text": self.text(), "start": 3}]},
        ])  # fmt: skip
        return {"question": self.text(), **answers, **self.before()}

    def text_label(self) -> dict[str, Any]:
        label = self.chance.choice([self.text(), 3, True, 0.5])
        return {"text": self.text(), self.chance.choice(["label", "intent"]): label, **self.some(system=self.text())}

    def plain_text(self) -> dict[str, Any]:
        return {"text": self.chance.choice([self.text(), [self.text(), self.text()]])}

    def preference(self) -> dict[str, Any]:
        one, other = self.answer(marks=False), {"role": "assistant", "content": f"{self.text()} No"}
        if self.chance.random() < 0.5:
            prompt = [{"role": "user", "content": self.text()}]
            return {"chosen": [*prompt, one], "rejected": [*prompt, other], **self.some(system=self.text())}
        return {"prompt": self.text(), "chosen": self.text(), "rejected": [other], **self.before()}

    def kto(self) -> dict[str, Any]:
        label = {"label": self.chance.random() < 0.5}
        if self.chance.random() < 0.5:
            return {"messages": self.turns(marks=False), **label, **self.around()}
        return {"prompt": self.text(), "completion": self.text(), **label, **self.before()}

    def tree(self) -> dict[str, Any]:
        def node(role: str, depth: int) -> dict[str, Any]:
            other = "assistant" if role == "prompter" else "prompter"
            replies = [node(other, depth - 1) for _ in range(self.chance.randint(1, 2))] if depth else []
            return {"text": self.text(), "role": role, "replies": replies, **self.some(rank=float(depth), lang="en")}

        return node("prompter", self.chance.choice([1, 3]))


FORMATS = [name for name in vars(Rows) if name in {
    "messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "text_label", "plain_text", "preference",
    "kto", "tree",
}]  # fmt: skip


# --- the property -----------------------------------------------------------------------------------------------------


def leaves(value: Any, path: str = "") -> Iterator[Leaf]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        name = f"{path}.{key}" if isinstance(value, dict) else path
        if isinstance(inner, dict | list):
            yield from leaves(inner, name)
        elif inner is not None and inner != "":
            yield value, key, name.removeprefix(".")


def changed(value: Any, chance: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return value + chance.choice(["x", " changed", "?"])


def read(values: dict[str, Any]) -> tuple[Example | None, KeyCounts]:
    source, mistakes, counts = Source(path="rows.jsonl"), RowMistakes("rows.jsonl"), KeyCounts()
    rows = [Row("rows.jsonl:1", values)]
    made = list(convert_rows(rows, resolve_format("auto", rows, source), mistakes, source, counts))
    assert len(made) + mistakes.num_rows == 1
    return made[0] if made else None, counts


def trained(renderer: Renderer, example: Example) -> Any:
    """Tokens and mask; of a row that is not trained on yet, everything that its example says."""
    if example.rejected is not None or example.desirable is not None:
        return example.messages, example.tools, example.rejected, example.desirable
    mistakes = RowMistakes("rows.jsonl")
    (row,) = render_examples(renderer, [example], mistakes)
    return None if row is None else (row.ids, row.supervised.tolist())


def is_listed(counts: KeyCounts, path: str) -> bool:
    """Whether a key, or a part of it, is listed as kept or ignored."""
    listed = (counts.kept | counts.ignored).keys()
    root, last = path.partition(".")[0], path.rpartition(".")[2]
    others = {"answers": "answers after the first", "answers.text": "answers after the first"}
    if root == "replies":
        others[path] = "replies outside the best path"
    return bool({root, path, f"{root}.*.{last}", others.get(path)} & listed)


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    folder = byte_tokenizer(tmp_path_factory.mktemp("bytes") / "t", "<|im_start|>", "<|im_end|>")
    data = DataSection.model_validate({"sources": [{"path": "rows.jsonl"}], "template": "chatml"})
    return make_renderer(load_tokenizer(folder, "chatml"), folder, data, chats=True)


def test_no_leaf_of_a_row_is_lost_silently(renderer: Renderer) -> None:
    rows, outcomes = Rows(seed=15), {"changed": 0, "listed": 0, "refused": 0}
    for number in range(NUM_ROWS):
        row_format = FORMATS[number % len(FORMATS)]
        values = {**getattr(rows, row_format)(), **rows.metadata()}
        example, _ = read(copy.deepcopy(values))
        assert example is not None, values
        before = trained(renderer, example)
        assert before is not None, values
        other = copy.deepcopy(values)
        container, key, path = rows.chance.choice(list(leaves(other)))
        container[key] = changed(container[key], rows.chance)
        after, counts = read(other)
        result = None if after is None else trained(renderer, after)
        if result is None:
            outcomes["refused"] += 1
        elif result != before:
            outcomes["changed"] += 1
        else:
            assert is_listed(counts, path), f"{path} of {row_format} is lost: {values}"
            outcomes["listed"] += 1
    assert min(outcomes.values()) > NUM_ROWS // 20, outcomes
