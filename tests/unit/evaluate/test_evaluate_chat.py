import pytest
import torch

from packhorse.evaluate.chat import HELP, ChatSession, _readable, chat


def drive(session, lines):
    """Runs a chat on given lines; an exception among them is raised in the place of a line."""
    waiting, written = list(lines), []

    def read(prompt):
        line = waiting.pop(0) if waiting else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    chat(session, read, written.append)
    return "".join(written)


def test_the_reply_is_generates_and_history_is_sent_along(tiny, tokenizer):
    session = ChatSession(tiny, tokenizer, max_new_tokens=6)
    messages = []
    for question in ("say apple", "say pear"):
        messages.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        out = tiny.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=6,
            eos_token_id=tokenizer.eos_token_id,
        )
        expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert "".join(session.reply(question)) == expected
        messages.append({"role": "assistant", "content": expected})
    assert session.history == messages


def test_reset_forgets_and_exit_ends(tiny, tokenizer):
    session = ChatSession(tiny, tokenizer, max_new_tokens=3)
    text = drive(session, ["say fig", "/reset", "say fig", "", "/exit", "never read"])
    first, second = text.removeprefix(HELP + "\n").split("(new chat)\n")
    assert first == second
    assert len(session.history) == 2


@pytest.mark.parametrize("end", [EOFError(), KeyboardInterrupt()], ids=["end of input", "ctrl-c"])
def test_the_end_of_input_ends_the_chat(tiny, tokenizer, end):
    assert drive(ChatSession(tiny, tokenizer), [end]) == HELP + "\n\n"


def test_an_unknown_command_is_not_sent_to_the_model(tiny, tokenizer):
    session = ChatSession(tiny, tokenizer)
    assert "there is no command /quit" in drive(session, ["/quit"])
    assert session.history == []


def test_ctrl_c_cuts_an_answer_and_the_chat_goes_on(tiny, tokenizer, monkeypatch):
    def interrupted(model, prompt, limit, stop_ids):
        yield tokenizer("say")["input_ids"][0]
        raise KeyboardInterrupt

    monkeypatch.setattr("packhorse.evaluate.chat.stream", interrupted)
    session = ChatSession(tiny, tokenizer)
    assert drive(session, ["hello", "/unknown"]).count("(cut short)") == 1
    assert [message["role"] for message in session.history] == ["user", "assistant"]


def test_a_chat_beyond_the_context_says_so_and_keeps_its_history(tiny, tokenizer):
    session = ChatSession(tiny, tokenizer, max_new_tokens=2)
    text = drive(session, ["say fig", "word " * 200])
    assert "and the model's context has 128" in text
    assert "/reset" in text
    assert len(session.history) == 2


def test_an_answer_ends_where_the_context_ends(tiny, tokenizer, monkeypatch):
    limits = []
    monkeypatch.setattr("packhorse.evaluate.chat.stream", lambda model, prompt, limit, stop: limits.append(limit) or ())
    messages = [{"role": "user", "content": "say fig"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    list(ChatSession(tiny, tokenizer, max_new_tokens=512).reply("say fig"))
    list(ChatSession(tiny, tokenizer, max_new_tokens=5).reply("say fig"))
    assert limits == [128 - len(prompt), 5]


def test_letters_of_several_tokens_come_whole(tokenizer):
    text = "ñ🐎日é"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > len(text)
    pieces = list(_readable(tokenizer, ids))
    assert "".join(pieces) == text
    assert len(pieces) == len(text)
    assert not any("\ufffd" in piece for piece in pieces)
