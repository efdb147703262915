"""Rows with tools, thinking and pieces: asked as they were trained, judged by what is said."""

import copy
import json

import pytest
from evaluate_cases import ROWS, chat_of, is_right

from packhorse.evaluate.answer_cache import Answer
from packhorse.evaluate.compare import _with_written_calls, compare
from packhorse.evaluate.generate import answers, prompt_ids, template_answer
from packhorse.evaluate.held_out import read_held_out, trained_form
from packhorse.evaluate.models import Subject
from packhorse.recipe.evaluation import EvaluationSection
from packhorse.recipe.schema import DataSection, Source, TrainOnSection

TOOLS = [{"type": "function", "function": {"name": "price", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "price", "arguments": {"of": "fig"}}}
TEMPLATE = """{%- if tools %}<|im_start|>system
{{ tools | map(attribute='function') | map(attribute='name') | join(' ') }}<|im_end|>
{% endif -%}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif -%}
{{ message.content }}
{%- for call in message.tool_calls or [] %}CALL {{ call.function.name }}({{ call.function.arguments.of }}){% endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture
def caller(tokenizer):
    """A tokenizer whose template writes tools and calls."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = TEMPLATE
    return other


def with_rows(write_data, rows, name="validation"):
    """The documents are those of other rows; only what rows.jsonl says counts here."""
    folder = write_data(**{name: ROWS[: len(rows)]})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name / "rows.jsonl").write_text(text, encoding="utf-8")
    return folder


def calling_row():
    messages = [
        {"role": "user", "content": "what is a fig?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ]
    return {"messages": messages, "tools": TOOLS, "fields": {}, "where": "f:1"}


def test_a_prompt_shows_the_tools(caller):
    messages = chat_of("what is a fig?", "")[:1]
    text = "<|im_start|>system\nprice<|im_end|>\n<|im_start|>user\nwhat is a fig?<|im_end|>\n<|im_start|>assistant\n"
    assert caller.decode(prompt_ids(caller, messages, TOOLS)) == text
    assert "price" not in caller.decode(prompt_ids(caller, messages))


def test_a_tool_call_is_expected_as_the_template_writes_it(caller, write_data):
    form = trained_form(caller, DataSection(sources=[Source(path="x")]))
    held_out = read_held_out(with_rows(write_data, [calling_row()]), "validation", EvaluationSection(), form)
    (question,) = _with_written_calls(held_out, caller).questions
    assert [dict(tool) for tool in question.tools] == TOOLS
    assert question.answer["content"] == "CALL price(fig)"
    assert is_right(question, Answer("CALL price(fig)", ended=True))
    assert not is_right(question, Answer("CALL price(plum)", ended=True))


def test_a_call_that_the_template_does_not_write_is_not_asked(tokenizer, write_data, form):
    """The built-in template knows no calls: an empty answer would be the right one."""
    held_out = read_held_out(with_rows(write_data, [calling_row()]), "validation", EvaluationSection(), form)
    assert len(held_out.questions) == 1
    assert _with_written_calls(held_out, tokenizer).questions == ()
    assert template_answer(tokenizer, *([calling_row()["messages"][:1], calling_row()["messages"][1]])) is None


def test_each_prompt_is_answered_with_its_own_tools(tiny, caller, monkeypatch):
    seen = []

    def said(model, prompts, *_):
        seen.extend(caller.decode(ids) for ids in prompts)
        return [[] for _ in prompts]

    monkeypatch.setattr("packhorse.evaluate.generate.greedy", said)
    prompts = [chat_of("a", "")[:1], chat_of("b", "")[:1]]
    answers(tiny, caller, prompts, [1, 2], tools=[(), TOOLS])
    assert ["price" in text for text in seen] == [False, True]


def test_a_comparison_asks_with_tools_and_judges_calls(tiny, caller, write_data, request_of, tmp_path, monkeypatch):
    asked = []

    def said(model, tokenizer, prompts, *_):
        asked.extend(tokenizer.decode(ids) for ids in prompts)
        return [Answer("CALL price(fig)", ended=True) for _ in prompts]

    monkeypatch.setattr("packhorse.evaluate.measure.answers_to", said)
    tiny.save_pretrained(tmp_path / "model")
    subject = Subject(request_of(tmp_path / "model"), tmp_path / "model", len(caller))
    form = trained_form(caller, DataSection(sources=[Source(path="x")]))
    held_out = read_held_out(with_rows(write_data, [calling_row()]), "validation", EvaluationSection(), form)
    (line,) = compare(subject, caller, [held_out], EvaluationSection()).comparison.lines
    assert (line.base.num_exact, line.tuned.num_exact) == (1, 1)
    assert ["price" in text for text in asked] == [True, True]


def test_thinking_is_asked_for_as_it_was_trained(caller, write_data):
    turns = chat_of("say fig", "fig!")
    turns[1]["reasoning_content"] = "a fruit"
    row = {"messages": [*turns, *chat_of("and plum", "<think>easy</think>\nplum!")], "fields": {}, "where": "f:1"}
    folder = with_rows(write_data, [row])
    for thinking, history, expected in (
        ("keep", "<think>a fruit</think>fig!", "<think>easy</think>\nplum!"),
        ("remove", "assistant\nfig!", "plum!"),
    ):
        data = DataSection(sources=[Source(path="x")], train_on=TrainOnSection(thinking=thinking))
        (question,) = read_held_out(folder, "validation", EvaluationSection(), trained_form(caller, data)).questions
        assert history in caller.decode(prompt_ids(caller, question.prompt, question.tools))
        assert question.answer["content"] == expected
        assert is_right(question, Answer("<think>another way</think>plum!", ended=True))
        assert not is_right(question, Answer("<think>plum!", ended=True))


def test_the_pieces_of_a_text_are_one_row(tiny, tokenizer, write_data, request_of, form, tmp_path):
    """A text longer than a pack: three documents and three losses, one row of the table."""
    texts = [
        *({"text": "long", "fields": {"language": "en"}, "where": "f:1"} for _ in range(3)),
        {"text": "short", "fields": {"language": "en"}, "where": "f:2"},
        {"messages": chat_of("say fig", "fig!"), "fields": {"language": "es"}, "where": "f:3"},
        {"messages": chat_of("say fig", "fig!"), "fields": {"language": "es"}, "where": "f:3"},
    ]
    settings = EvaluationSection(group_by="language", max_answered_rows=0)
    held_out = read_held_out(with_rows(write_data, texts), "validation", settings, form)
    assert held_out.rows == (0, 0, 0, 1, 2, 3)
    tiny.save_pretrained(tmp_path / "model")
    subject = Subject(request_of(tmp_path / "model"), tmp_path / "model", len(tokenizer))
    lines = compare(subject, tokenizer, [held_out], settings).comparison.lines
    assert [(line.group, line.num_rows) for line in lines] == [(None, 4), ("en", 2), ("es", 2)]
    assert lines[1].base.num_supervised_tokens > 0


@pytest.mark.parametrize("name", ["test", "train", "tset"])
def test_no_other_rows_are_read_by_name(name, write_data, form):
    data = write_data(validation=ROWS[:1], test=ROWS[1:2])
    with pytest.raises(ValueError, match=f"{name} is not one of validation, retain"):
        read_held_out(data, name, EvaluationSection(), form)


def test_near_copies_and_rows_of_one_document_are_a_cluster(tokenizer, write_data, form):
    long = "say apple pear plum fig kiwi lime date melon manzana pera ciruela higo lima say pera apple fig"
    asked = [long, f"{long} lime", "say kiwi", "say lime and melon", long]
    rows = [
        {"messages": chat_of(text, "fig!"), "fields": {"language": language}, "where": f"f:{number}"}
        for number, (text, language) in enumerate(zip(asked, ["en", "es", "en", "es", "es"]))
    ]
    data = write_data(validation=rows)
    first, near, *others, equal = read_held_out(data, "validation", EvaluationSection(), form).clusters
    assert first == near == equal
    assert len({first, *others}) == 3
    by_language = read_held_out(data, "validation", EvaluationSection(cluster_by="language"), form).clusters
    assert by_language == (0, 1, 0, 1, 1)
