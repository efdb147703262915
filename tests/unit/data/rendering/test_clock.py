"""Templates that write the date: refused, or fixed to one date for rows, prompts and the published tokenizer."""

from __future__ import annotations

import importlib.util
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_cases import MakeRecipe, write_lines
from rendering_cases import CHAT, byte_tokenizer, chat_of, refusal, render, text_of
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from packhorse.cli.main import main
from packhorse.data.audit import audit
from packhorse.data.packs.store import open_store
from packhorse.data.prepare import prepare
from packhorse.data.render.serving import saved_form
from packhorse.data.render.tokenizer import load_tokenizer, tokenizer_of
from packhorse.data.resolve import resolve_tokenizer
from packhorse.errors import EXIT_USER_ERROR, UserError
from packhorse.evaluate.generate import prompt_ids
from packhorse.recipe.schema import Recipe

TURNS = (
    "{% for m in messages %}<t>{{ m.role }}:{{ m.content }}<e>{% endfor %}"
    "{% if add_generation_prompt %}<t>assistant:{% endif %}"
)
# As Llama 3.2 does.
DATED = (
    "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% else %}{% set day = '26 Jul 2024' %}"
    "{% endif %}\n  <t>Today is {{ day }}.<e>" + TURNS
)
ROW = {"messages": [{"role": turn.role, "content": turn.content} for turn in CHAT]}
DAYS = [datetime(2026, 1, 31, 23, 59), datetime(2026, 2, 1), datetime(2027, 12, 24, 8)]
WORDS = "the chat template writes the current date (strftime_now)"


def set_day(monkeypatch: pytest.MonkeyPatch, day: datetime) -> None:
    """The clock of transformers, and so of every server that renders with it."""

    class Then(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return day

    monkeypatch.setattr(chat_template_utils, "datetime", Then)


def written(folder: Path, recipe: Recipe) -> Path:
    file = folder / "recipe.yaml"
    sections = recipe.model_dump(exclude_none=True, exclude_defaults=True)
    file.write_text(yaml.safe_dump({**sections, "method": "full"}))
    return file


@pytest.fixture
def dated(tmp_path: Path) -> Path:
    return byte_tokenizer(tmp_path / "dated", "<t>", "<e>", template=DATED)


@pytest.fixture
def recipe_of(make_recipe: MakeRecipe, dated: Path, tmp_path: Path) -> Any:
    rows = write_lines(tmp_path / "rows.jsonl", ROW, {"messages": ROW["messages"][1:]})

    def make(**data: Any) -> Recipe:
        split = {"train": 1.0, "validation": 0.0, "test": 0.0}
        sections = {"data": {"split": split, **data}, "model": {"tokenizer": str(dated)}, "batch": {"length": 512}}
        return make_recipe(rows, **sections)

    return make


def test_check_plan_and_prepare_refuse_it(
    recipe_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = written(tmp_path, recipe_of())
    for command in ("check", "plan", "prepare"):
        assert main([command, str(recipe)]) == EXIT_USER_ERROR, command
        message = capsys.readouterr().err
        assert WORDS in message, command
        assert f"fix: set data.template_date to a fixed date, such as {datetime.now():%Y-%m-%d};" in message, command
    assert not (tmp_path / "runs" / ".check").exists()
    # The fix can be typed, and ends the refusal.
    assert main(["plan", str(recipe), "data.template_date=2026-01-31"]) == 0


def test_three_days_give_one_hash_and_the_same_tokens(recipe_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(template_date="2026-01-31")
    seen = set()
    for day in DAYS:
        set_day(monkeypatch, day)
        prepared = prepare(recipe)
        assert not prepared.was_warm
        seen.add((prepared.manifest.content_hash, (prepared.folder / "train" / "tokens.bin").read_bytes()))
        shutil.rmtree(prepared.folder)
    assert len(seen) == 1
    assert prepared.manifest.settings["template_date"] == "2026-01-31"
    assert audit(recipe).template == "tokenizer of 2026-01-31"
    other = prepare(recipe_of(template_date="2026-02-01"))
    assert other.manifest.content_hash != prepared.manifest.content_hash


def test_the_published_tokenizer_and_evaluation_write_the_same_date(
    recipe_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(template_date="2026-01-31", packing="in_order")
    store = open_store(prepare(recipe).folder, "train")
    trained = store.document(0)[0].tolist()
    set_day(monkeypatch, DAYS[2])
    tokenizer = tokenizer_of(recipe, resolve_tokenizer(recipe))
    published = saved_form(tokenizer)
    chat = published.apply_chat_template(ROW["messages"], tokenize=False)
    # The text that the template writes on that day without any change: no white space is added or lost.
    set_day(monkeypatch, DAYS[0])
    unchanged = AutoTokenizer.from_pretrained(resolve_tokenizer(recipe))
    assert chat == unchanged.apply_chat_template(ROW["messages"], tokenize=False)
    assert chat.startswith("  <t>Today is 31 Jan 2026.<e>")
    assert published(chat, add_special_tokens=False)["input_ids"] == trained
    set_day(monkeypatch, DAYS[2])
    for either in (tokenizer, published):  # `packhorse evaluate` and `packhorse chat` ask with this function
        prompt = prompt_ids(either, ROW["messages"][:2])
        assert trained[: len(prompt)] == prompt


TRL = Path(str(importlib.util.find_spec("trl").submodule_search_locations[0])) / "chat_templates"
DATED_BY_OTHERS = [path for path in sorted(TRL.glob("*.jinja")) if "strftime_now" in path.read_text()]


def test_published_templates_write_what_they_wrote_on_that_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {path.stem for path in DATED_BY_OTHERS} >= {"gptoss", "llama3_2"}
    for path in DATED_BY_OTHERS:
        folder = byte_tokenizer(tmp_path / path.stem, "<t>", "<e>", template=path.read_text())
        assert WORDS in refusal(folder, chat_of(*CHAT)), path
        texts = []
        for day, template_date in ((DAYS[0], None), (DAYS[2], "2026-01-31")):
            set_day(monkeypatch, day)
            tokenizer = load_tokenizer(folder, "tokenizer", template_date=template_date)
            # One of them writes the date only where the chat has no system turn.
            texts.append(tokenizer.apply_chat_template(ROW["messages"][1:], tokenize=False))
        assert texts[0] == texts[1], path
        assert "2026" in texts[0], path


FORMATS = ["%d %B %Y", "%Y-%m-%d", "%-d/%-m/%y", "%A, %d. %b", "%j %U %H:%M:%S %p", "100%% on %F", "%%d", "%x %X", ""]


def test_every_format_is_written_as_strftime_does(tmp_path: Path) -> None:
    source = "".join(f"{{{{ strftime_now({text!r}) }}}};" for text in FORMATS)
    folder = byte_tokenizer(tmp_path / "formats", "<t>", "<e>", template=source + TURNS)
    tokenizer = load_tokenizer(folder, "tokenizer", template_date="2026-02-01")
    dates = tokenizer.apply_chat_template(ROW["messages"], tokenize=False).split(";")[:-1]
    assert dates == [datetime(2026, 2, 1).strftime(text) for text in FORMATS]


def test_a_date_that_only_some_rows_get(tmp_path: Path) -> None:
    """Of two templates the one for tools is dated; another reads the clock and writes nothing of it."""
    plain = "{% set unused = strftime_now('%Y') %}" + TURNS
    templates = [{"name": "default", "template": plain}, {"name": "tool_use", "template": DATED + "{{ tools }}"}]
    folder = byte_tokenizer(tmp_path / "two", "<t>", "<e>", chat_template=templates)
    tool = {"type": "function", "function": {"name": "f"}}
    assert len(render(folder, chat_of(*CHAT))) == 1
    message = refusal(folder, chat_of(*CHAT), chat_of(*CHAT, tools=(tool,)))
    assert message.startswith(f"rows.jsonl:7: {WORDS}: ")
    assert f"Today is {datetime.now():%d %b %Y}" in message
    fixed = load_tokenizer(folder, "tokenizer", template_date="2026-01-31")
    assert "Today is 31 Jan 2026." in fixed.apply_chat_template(ROW["messages"], tools=[tool], tokenize=False)


def test_plain_text_needs_no_date(dated: Path, recipe_of: Any, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    assert len(render(dated, text_of("hi"))) == 1
    texts = write_lines(tmp_path / "texts.jsonl", {"text": "hi"})
    recipe = make_recipe(texts, model={"tokenizer": str(dated)})
    assert main(["plan", str(written(tmp_path, recipe))]) == 0


def test_a_day_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe_of: Any) -> None:
    file = written(tmp_path, recipe_of())
    for given, told in (
        ("2026-02-30", "data.template_date is 2026-02-30: day "),
        ("31.1.2026", "a date such as 2026-"),
    ):
        assert main(["check", str(file), f"data.template_date={given}"]) == EXIT_USER_ERROR
        assert told in capsys.readouterr().err


def test_the_refusal_is_a_user_error_before_rows_are_rendered(recipe_of: Any) -> None:
    with pytest.raises(UserError, match="it is the template of "):
        prepare(recipe_of(on_bad_row="drop", most_bad_rows=1.0))
