"""Secrets are hidden wherever text is written, and plain text is left alone."""

from __future__ import annotations

import io
import json
import sys
import traceback
from pathlib import Path

import pytest
from rich.console import Console

from packhorse.secrets import mask, mask_output, masked, secret_in
from secrets_made_up import SECRETS

PLAIN = [
    "model.revision 0123456789abcdef0123456789abcdef01234567",
    "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "eos_token: <|im_end|>, pad_token=<pad>, new token 1234567890123",
    "num_tokens=123456789012 train/tokens.bin key=value api_key=short",
    "https://huggingface.co/org/model.git and ssh://git@host/x and C://a:b",
    "task-with-a-long-name-of-2024 risk-0123456789abcdef0 sk-learn-tutorial-data-2024 hf_hub_download shelf_0123456789",
    "TOKENIZERS_PARALLELISM=false and AKIA alone",
]


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_secret_stays(text: str) -> None:
    assert mask(text, {}) == text
    assert secret_in(text, {}) is None


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
def test_a_secret_is_hidden_by_its_form_anywhere_in_text(secret: str) -> None:
    for text in (secret, f"in the middle ({secret}), and on", f'{{"a": "{secret}"}}', f"--x={secret}", f"{secret}\n"):
        hidden = mask(text, {})
        assert secret not in hidden, hidden
        assert "***" in hidden
        assert mask(hidden, {}) == hidden
        assert secret_in(text, {}) is not None
    assert mask(f"in the middle ({secret}), and on", {}).startswith("in the middle (")


def test_only_the_password_of_an_address_and_the_value_beside_a_word_are_hidden() -> None:
    assert mask("https://user:pa55word@host:80/path?q=1", {}) == "https://***@host:80/path?q=1"
    assert mask("wandb api_key=0123456789abcdef0123456789abcdef01234567, then", {}) == "wandb api_key=***, then"


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "DB_PASSWORD",
        "my_passwd",
        "GITHUB_PAT",
        "API_KEY_2",
        "PGPASSWORD",
    ],
)
def test_the_value_of_a_variable_whose_name_says_so_is_hidden_in_every_spelling(name: str) -> None:
    value = 'plain "words" & ümlaut\\'
    for written in (
        value,
        json.dumps(value),
        repr(value),
        "https://host/?k=plain%20%22words%22%20%26%20%C3%BCmlaut%5C",
    ):
        hidden = mask(f"before {written} after", {name: value})
        assert "words" not in hidden
        assert hidden.startswith("before ")
        assert hidden.endswith(" after")
    assert secret_in(f"x{value}y", {name: value}) == f"the value of the environment variable {name}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "longer than eight"),
        ("HF_TOKEN_PATH", "longer than eight"),
        ("KEYBOARD", "longer than eight"),
        ("PWD", "longer than eight"),
        ("HF_TOKEN", "short"),
        ("GOOGLE_APPLICATION_CREDENTIALS", __file__),
    ],
)
def test_other_variables_are_not_hidden(name: str, value: str) -> None:
    assert mask(f"say {value}", {name: value}) == f"say {value}"


def test_a_secret_that_is_part_of_another_leaves_nothing_of_it() -> None:
    assert mask("a longsecretlonger b", {"A_KEY": "longsecret", "B_KEY": "longsecretlonger"}) == "a *** b"


def test_tracebacks_warnings_and_tables_are_masked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "correct horse battery"
    monkeypatch.setenv("SOME_PASSWORD", secret)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    mask_output()
    mask_output()  # once is enough, and twice does no harm
    Console(width=200).print(f"[bold]{secret}[/bold]")
    print("a", secret, "b")
    sys.stderr.writelines([f"{secret}\n"])
    try:
        raise RuntimeError(f"the server said no to {secret}")
    except RuntimeError:
        traceback.print_exc()
        sys.__excepthook__(*sys.exc_info())
    output = capsys.readouterr()
    assert secret not in output.out + output.err
    assert output.out.count("***") == 2
    assert output.err.count("the server said no to ***") == 2


def test_a_masked_stream_otherwise_behaves_like_the_original(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w", encoding="utf-8") as file:
        stream = masked(file)
        assert masked(stream) is stream
        assert stream.write("héllo\n") == 6
        assert stream.fileno() == file.fileno()
        assert stream.encoding == "utf-8"
        assert not stream.isatty()
        stream.flush()
    assert (tmp_path / "log").read_text(encoding="utf-8") == "héllo\n"
    with pytest.raises(AttributeError):
        _ = masked(io.StringIO()).nothing  # type: ignore[attr-defined]
