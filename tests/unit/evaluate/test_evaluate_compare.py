"""Base beside tuned on rows that the tuned model was made to know, against figures counted by hand."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluate_cases import ROWS, chat_of, is_right
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM

from packhorse.data.packs.store import open_store
from packhorse.errors import UserError
from packhorse.evaluate import generate
from packhorse.evaluate.answer_cache import Answer, AnswerCache
from packhorse.evaluate.compare import compare
from packhorse.evaluate.generate import answers, greedy
from packhorse.evaluate.held_out import Question, choose, read_held_out, read_sets
from packhorse.evaluate.models import Subject, load_base, load_tuned, measure_both
from packhorse.evaluate.results import Comparison, ComparisonLine, MetricResult, Sample, Score
from packhorse.evaluate.score import document_losses
from packhorse.evaluate.show import render
from packhorse.recipe.evaluation import EvaluationSection


@pytest.fixture
def saved(tmp_path, tiny):
    folder = tmp_path / "base"
    tiny.save_pretrained(folder)
    return folder


def learn(model, store, steps=60):
    """Learns the documents of a store by heart."""
    pairs = [store.document(index) for index in range(store.num_documents)]
    ids, mask = (
        pad_sequence([torch.from_numpy(np.asarray(pair[part]).astype(np.int64)) for pair in pairs], batch_first=True)
        for part in (0, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(steps):
        model(ids, labels=torch.where(mask == 1, ids, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_the_table_tells_what_was_learnt(tiny, saved, tokenizer, write_data, request_of, form):
    known, retain = [*ROWS[:2], *ROWS[8:10]], ROWS[4:6]
    data = write_data(validation=known, retain=retain)
    learn(tiny, open_store(data, "validation")).save_pretrained(saved.with_name("model"))
    subject = Subject(request_of(saved), saved.with_name("model"), len(tokenizer))
    settings = EvaluationSection(group_by="language", max_new_tokens=32)
    comparison = compare(subject, tokenizer, read_sets(data, settings, form), settings).comparison
    found = {(line.set, line.group): line for line in comparison.lines}
    assert list(found) == [
        ("validation", None),
        ("validation", "en"),
        ("validation", "es"),
        ("retain", None),
        ("retain", "en"),
    ]
    whole = found["validation", None]
    assert (whole.num_rows, whole.base.num_answered, whole.base.num_exact, whole.tuned.num_exact) == (4, 4, 0, 4)
    assert whole.exact_match_change == 1.0
    assert found["validation", "es"].num_rows == 2
    assert found["validation", "es"].tuned.exact_match == 1.0
    assert found["validation", "es"].tuned.num_answered == 2
    assert found["retain", None].num_rows == 2
    assert whole.tuned.loss < 0.1
    assert whole.base.loss > 1.0
    assert whole.base.perplexity == pytest.approx(math.exp(whole.base.loss))
    # The whole set's loss is a mean over tokens, so the groups' losses add up to it by tokens.
    groups = [found["validation", "en"].base, found["validation", "es"].base]
    by_tokens = sum(score.loss * score.num_supervised_tokens for score in groups)
    assert by_tokens == pytest.approx(whole.base.loss * whole.base.num_supervised_tokens)
    # The model's own loss on one row.
    row = known[0]["messages"]
    encoded = tokenizer.apply_chat_template(row, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = torch.tensor([encoded["input_ids"]]), torch.tensor([encoded["assistant_masks"]])
    with torch.no_grad():
        own = LlamaForCausalLM.from_pretrained(saved)(ids, labels=torch.where(mask == 1, ids, -100)).loss
    losses = document_losses(load_base(subject), open_store(data, "validation"))
    assert losses[0].nats_per_token == pytest.approx(own.item(), abs=1e-5)
    assert len(comparison.samples) == 3
    for sample in comparison.samples:
        assert sample.tuned == sample.expected != sample.base
    assert Comparison.model_validate_json(comparison.model_dump_json()) == comparison
    assert json.loads(comparison.model_dump_json())["lines"][0]["tuned"]["exact_match"] == 1.0


# peft 0.21 reads a property that transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_switched_off_for_the_base(tiny, saved, tokenizer, write_data, request_of):
    data = write_data(validation=ROWS[:3])
    base_losses = document_losses(tiny, open_store(data, "validation"))
    adapted = get_peft_model(tiny, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    adapted.save_pretrained(saved.with_name("adapter"))
    tuned_losses = document_losses(adapted, open_store(data, "validation"))
    subject = Subject(request_of(saved), saved.with_name("adapter"), len(tokenizer))
    store = open_store(data, "validation")
    base, tuned = measure_both(subject, lambda model, _: [loss.sum_nats for loss in document_losses(model, store)])
    assert base == pytest.approx([loss.sum_nats for loss in base_losses], abs=1e-4)
    assert tuned == pytest.approx([loss.sum_nats for loss in tuned_losses], abs=1e-4)
    assert abs(base[0] - tuned[0]) > 0.01
    prompts = [row["messages"][:1] for row in ROWS[:3]]
    said = measure_both(subject, lambda model, _: answers(model, tokenizer, prompts, [6] * 3))
    assert said[1] == answers(adapted, tokenizer, prompts, [6] * 3)


def test_a_fresh_base_is_built_from_its_seed(tmp_path, tiny_config, tokenizer, request_of):
    config = {"model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    config["pad_token_id"] = tokenizer.pad_token_id
    request = replace(request_of(tmp_path), source=None, config=config, seed=7)
    first, second = (load_base(Subject(request, tmp_path, len(tokenizer))) for _ in range(2))
    torch.manual_seed(7)
    expected = LlamaForCausalLM(tiny_config)
    for model in (first, second):
        assert not model.training
        for found, wanted in zip(model.parameters(), expected.parameters()):
            assert torch.equal(found, wanted)


def test_a_run_that_left_nothing_says_so(tmp_path, request_of, saved):
    with pytest.raises(UserError, match=r"neither config.json nor adapter_config.json"):
        load_tuned(Subject(request_of(saved), tmp_path / "model", 1))


def test_no_held_out_rows_is_a_users_mistake(write_data, form):
    data = write_data(train=ROWS[:2], test=ROWS[2:4])
    with pytest.raises(UserError, match="0 validation rows"):
        read_sets(data, EvaluationSection(), form)


def by_language(num_questions):
    return EvaluationSection(group_by="language", max_answered_rows=num_questions)


def test_chosen_rows_are_balanced_and_do_not_depend_on_the_files_order(write_data, form):
    data = write_data(validation=ROWS)
    first = read_held_out(data, "validation", by_language(6), form)
    assert [first.groups[question.row] for question in first.questions].count("en") == 3
    turned = write_data_again(write_data, data, ROWS[::-1])
    second = read_held_out(turned, "validation", by_language(6), form)
    assert [question.answer for question in first.questions] == [question.answer for question in second.questions]
    everything = read_held_out(turned, "validation", by_language(100), form)
    assert sorted(question.row for question in everything.questions) == list(range(16))
    assert choose(everything.questions, everything.groups, 0) == ()


def write_data_again(write_data, data, rows):
    data.rename(data.with_name("before"))
    return write_data(validation=rows)


def test_the_last_assistant_turn_is_asked_with_the_true_history(write_data, form):
    messages = [*chat_of("say fig", "fig!"), *chat_of("say plum", "plum!"), {"role": "user", "content": "thanks"}]
    data = write_data(validation=[{"messages": messages, "fields": {}, "where": "f:1"}])
    (question,) = read_held_out(data, "validation", EvaluationSection(), form).questions
    assert list(question.prompt) == messages[:3]
    assert question.answer == {"role": "assistant", "content": "plum!"}


def test_plain_text_has_a_loss_and_no_question(write_data, form):
    data = write_data(validation=ROWS[:1])
    file = data / "validation" / "rows.jsonl"
    file.write_text(json.dumps({"text": "say", "fields": {}, "where": "f:1"}) + "\n")
    held_out = read_held_out(data, "validation", by_language(10), form)
    assert held_out.questions == ()
    assert held_out.groups == ("(none)",)


def question_of(content):
    return Question(row=0, prompt=(), answer={"role": "assistant", "content": content}, key="")


def test_the_right_words_without_an_end_are_no_match():
    question = question_of("fig!")
    assert is_right(question, Answer(" fig!", ended=True))
    assert not is_right(question, Answer("fig!", ended=False))


def result_of(name, unit, base, tuned, pairs=200, differing=40, verdict="better", needed=None):
    ends = {"low": tuned - base - 0.05, "high": tuned - base + 0.05}
    counts = {"num_pairs": pairs, "num_unscored": 0, "num_differing": differing, "num_clusters": pairs}
    kinds = {"metric": name, "unit": unit, "higher_is_better": unit != "nats", "test": "exact McNemar"}
    known = {"p": 0.001, "p_adjusted": 0.002, "verdict": verdict, "rows_needed": needed}
    return MetricResult(base=base, tuned=tuned, **kinds, **counts, **ends, **known)


def line_of(group, *results, name="validation"):
    score = Score(loss=1.0, num_supervised_tokens=100, num_exact=1, num_answered=200)
    return ComparisonLine(set=name, group=group, num_rows=1200, base=score, tuned=score, metrics=results)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(width):
    lines = (
        line_of(
            None,
            result_of("loss", "nats", 7.2345, 0.4),
            result_of("exact_match", "%", 0.0, 0.935),
            result_of("normalised_match", "%", 0.95, 0.93, verdict="cannot tell", needed=1140),
            result_of("chrf", "points", 31.25, 100.0),
        ),
        line_of("unit_conversion_with_a_long_name", result_of("exact_match", "%", 0.1, 0.11, verdict="too few")),
        line_of(None, result_of("exact_match", "%", 0.5, 0.4, verdict="worse"), name="retain"),
    )
    sample = Sample(
        set="validation", group="en", prompt="say [bold]fig", expected="fig!", base="\x1b[31mx" * 99, tuned="fig!"
    )
    out = io.StringIO()
    Console(file=out, width=width).print(render(Comparison(lines=lines, samples=(sample,))))
    shown = out.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    for text in (
        "7.234 → 0.400",
        "-6.834 [-6.884, -6.784]",
        "0.0 → 93.5",
        "+93.5 [+88.5, +98.5]",
        "(1.1k)",
        "31.25 → 100.00",
        "too few (40",
        "-10.0 [-15.0, -5.0]",
        "say [bold]fig",
    ):
        assert text in shown
    assert "\x1b" not in shown


def test_an_evaluation_that_was_killed_continues(tiny, saved, tokenizer, write_data, request_of, form, monkeypatch):
    data = write_data(validation=ROWS[:4])
    tiny.save_pretrained(saved.with_name("model"))
    subject = Subject(request_of(saved), saved.with_name("model"), len(tokenizer))
    settings = EvaluationSection(max_new_tokens=4)
    generated = []

    def counted(model, prompts, *more):
        if len(generated) == 6:
            raise KeyboardInterrupt
        generated.extend(prompts)
        return greedy(model, prompts, *more)

    def evaluated(settings=settings):
        cache = AnswerCache(saved.with_name("evaluation") / "answers.jsonl")
        return compare(subject, tokenizer, read_sets(data, settings, form), settings, batch_size=1, cache=cache)

    monkeypatch.setattr(generate, "greedy", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluated()
    with (saved.with_name("evaluation") / "answers.jsonl").open("a") as file:
        file.write('{"key": "cut sho')
    generated[:] = [None] * 7  # not killed again
    whole = evaluated()
    assert len(generated) == 7 + 2, "4 answers of the base and 2 of the tuned model were there"
    # Other metrics need no answer again; other weights, or another limit, do.
    evaluated(EvaluationSection(max_new_tokens=4, metrics=["rouge_l"]))
    assert len(generated) == 9
    monkeypatch.undo()
    plain = compare(subject, tokenizer, read_sets(data, settings, form), settings)
    assert plain.rows == whole.rows
    monkeypatch.setattr(generate, "greedy", counted)
    learn(tiny, open_store(data, "validation"), steps=1).save_pretrained(saved.with_name("model"))
    evaluated()
    assert len(generated) == 9 + 4
    evaluated(EvaluationSection(max_new_tokens=3))
    assert len(generated) == 13 + 8
