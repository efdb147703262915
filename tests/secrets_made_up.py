"""Secrets that are none, in the forms that real ones have; put together here, so that no scanner finds them."""

from __future__ import annotations

_LETTERS = "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7"

SECRETS = {
    "hugging face": "hf_" + _LETTERS + "xyzXYZ1",
    "openai": "sk-" + _LETTERS * 2,
    "openai, project": "sk-" + "proj-" + _LETTERS + "_" + _LETTERS,
    "github": "gh" + "p_" + _LETTERS + "abcdefghi",
    "github, fine": "github_" + "pat_11AAAAAAA0" + _LETTERS,
    "gitlab": "gl" + "pat-" + _LETTERS[:20],
    "aws": "AKIA" + "IOSFODNN7EXAMPL3",
    "google": "AIza" + _LETTERS + "01234567",
    "slack": "xox" + "b-123456789012-" + _LETTERS,
    "private key": "-----BEGIN RSA " + "PRIVATE KEY-----\n" + _LETTERS + "\n-----END RSA PRIVATE KEY-----",
    "address": "https://user:" + "pa55word" + "@host/path",
    "wandb": "api_key=" + "0123456789abcdef" * 2 + "01234567",
}
