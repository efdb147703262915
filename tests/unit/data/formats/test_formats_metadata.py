"""Rows with the keys of published data sets, which nobody should have to explain."""

from __future__ import annotations

from typing import Any

import pytest
from formats_cases import BOT, GPT, HUMAN, USER, count_keys

CONTEXT = "Ana beat Bo 3-1."
PROSE = "It was a long day, and nobody knew how it would end. " * 5
HARMLESS = {
    "tatsu-lab/alpaca": {
        "instruction": "Add.",
        "input": "1 2",
        "output": "3",
        "text": "Below is an instruction.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3",
    },
    "HuggingFaceH4/no_robots": {"prompt": "hi", "prompt_id": "a1", "messages": [USER, BOT], "category": "Chat"},
    "AI-MO/NuminaMath-CoT": {"source": "olympiads", "problem": "hi", "solution": "fine", "messages": [USER, BOT]},
    "lmsys/lmsys-chat-1m": {
        "conversation_id": "c0",
        "model": "vicuna",
        "messages": [USER, BOT],
        "turn": 1,
        "language": "English",
        "openai_moderation": [{"categories": {"hate": False}, "flagged": False}],
        "redacted": True,
    },
    "teknium/OpenHermes-2.5": {
        "conversations": [HUMAN, GPT],
        "system_prompt": None,
        "source": "x",
        "idx": 3,
        "hash": "f00",
        "views": None,
        "custom_instruction": None,
        "topic": "trivia",
        "title": "T",
        "model_name": "gpt-4",
        "avatarUrl": None,
    },
    "Open-Orca/SlimOrca": {"conversations": [{**HUMAN, "weight": 0.0}, {**GPT, "weight": 1.0}]},
    "allenai/c4": {"text": PROSE, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org/" + "a" * 300},
    "HuggingFaceFW/fineweb": {
        "text": PROSE,
        "id": "<urn:uuid:0>",
        "dump": "CC-MAIN",
        "url": "https://a.b",
        "date": "2024-01-01",
        "file_path": "s3://x",
        "language": "en",
        "language_score": 0.9,
        "token_count": 512,
    },
    "togethercomputer/RedPajama-V2": {
        "text": PROSE,
        "meta": {"title": "T", "abstract": PROSE},
        "quality_signals": '{"ccnet": [[0, 7033, 1.0]], "lines": [[0, 4, 2.5]]}',
    },
    "open-web-math": {"text": PROSE, "url": "u", "metadata": '{"extraction_info": {"snippet": "' + PROSE + '"}}'},
    "nvidia/HelpSteer2": {"prompt": "hi", "response": "fine", "helpfulness": 3, "verbosity": 2},
    "rajpurkar/squad": {
        "id": "5",
        "title": "T",
        "context": CONTEXT,
        "question": "Who?",
        "answers": {"text": ["Ana"], "answer_start": [0]},
    },
    "mandarjoshi/nq": {
        "question": "hi",
        "answer": "fine",
        "answers": ["fine", "well", "good"],
        "uuid": "1",
        "rating": 4.5,
    },
    "trl-lib/ultrafeedback": {
        "prompt": "hi",
        "prompt_id": "0",
        "messages": [USER, BOT],
        "chosen": [USER, BOT],
        "rejected": [USER, {"role": "assistant", "content": "no"}],
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    },
    "a crawl of posts": {
        "text": "post",
        "replies": 12,
        "turns": "many",
        "tags": ["a b", "c"],
        "author": {"name": "Ann"},
    },
    "llama-factory": {"instruction": "a", "input": "", "output": "b", "images": [], "videos": None, "audios": []},
}


@pytest.mark.parametrize("values", HARMLESS.values(), ids=HARMLESS)
def test_metadata_of_published_data_sets_needs_no_setting(values: dict[str, Any]) -> None:
    counts = count_keys({}, values)
    listed = counts.used | counts.kept | counts.ignored
    assert {key for key, value in values.items() if value not in (None, "", [])} <= listed.keys()
