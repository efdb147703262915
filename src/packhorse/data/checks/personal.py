"""Find personal data and secrets in text by their form: findings are reliable, and some data is missed.

Numbers must pass their own check (Luhn, mod 97, valid blocks), and names reserved for examples do not count.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from typing import Final

Finding = tuple[str, int, int]
"""Kind, first character, character after the last."""

# Every secret below has a run of twenty such characters: searching for a run costs a tenth of searching for the form.
_IN_KEYS: Final = bytes(97 if (chr(byte).isalnum() and byte < 128) or byte in b"_-" else 32 for byte in range(256))
_LONG_RUN: Final = b"a" * 20
# Every number below has eight digits or separators in a row, the first a digit; and then nine digits with at most two
# separators between any two, or four numbers with dots between.
_IN_NUMBERS: Final = bytes(48 if 48 <= byte < 58 else 46 if byte in b" .()/-" else 32 for byte in range(256))
_LONG_NUMBER: Final = re.compile(rb"0[0.]{7}")
_NUMBER_SIGN: Final = re.compile(r"[0-9](?:[ .()/-]{0,2}[0-9]){8}|[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]")

_PRIVATE_KEY: Final = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:[^-]{40,16384}-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----|[A-Za-z0-9+/=\s]{40,})"
)
# RFC 7519: two objects and a signature in base64url, in which `{"` is `eyJ`.
_WEB_TOKEN: Final = re.compile(r"(?<![\w-])eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}", re.ASCII)
# Forms that the services publish for secret scanning: AWS, GitHub (two), OpenAI and Anthropic, Slack, Google, Hugging
# Face. A class name such as `sk-loading-wheel` has no digit or no capital.
_API_KEY: Final = re.compile(
    r"(?<![\w-])(?:(?:AKIA|ASIA)[A-Z2-7]{16}(?![A-Z0-9])"
    r"|gh[pousr]_[A-Za-z0-9]{36,255}"
    r"|github_pat_[A-Za-z0-9_]{60,255}"
    r"|sk-(?=[\w-]{0,99}[0-9])(?=[\w-]{0,99}[A-Z])[\w-]{20,255}"
    r"|xox[abeoprs]-[0-9A-Za-z-]{16,255}"
    r"|AIza[\w-]{35}(?![\w-])"
    r"|hf_[A-Za-z0-9]{30,60}(?!\w))",
    re.ASCII,
)
_EMAIL: Final = re.compile(
    r"(?<![\w.+%-])\w(?:[\w.+%-]{0,62}[\w+%-])?@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}"
    r"[A-Za-z]{2,24}(?![\w-])",
    re.ASCII,
)
# RFC 2606: such addresses receive no mail.
_RESERVED_NAME: Final = re.compile(r"[@.](?:example\.(?:com|net|org)|example|test|invalid|localhost)$", re.IGNORECASE)
_IBAN: Final = re.compile(r"(?<!\w)[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)", re.ASCII)
# 16 digits, 15 of American Express, 14 of Diners Club; other lengths are rare and would match too many plain numbers.
_CARD: Final = re.compile(
    r"(?<![\w.,-])(?:[2-6][0-9]{3}([ -]?)[0-9]{4}\1[0-9]{4}\1[0-9]{4}|3[47][0-9]{2}([ -]?)[0-9]{6}\2[0-9]{5}"
    r"|3[068][0-9]{2}([ -]?)[0-9]{6}\3[0-9]{4})(?![\w-]|[.,][0-9])",
    re.ASCII,
)
# No block is all zeros, and numbers never begin with 000, 666 or 9 (US Social Security Administration).
_SOCIAL_SECURITY: Final = re.compile(
    r"(?<![\w.-])(?!000|666|9)[0-9]{3}-(?!00)[0-9]{2}-(?!0000)[0-9]{4}(?![\w-])", re.ASCII
)
_ADDRESS: Final = re.compile(r"(?<![\w./-])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![\w-]|\.[0-9])", re.ASCII)
_VERSION_BEFORE: Final = re.compile(r"(?:\bv|version|release|build)[ .:=]{0,2}$", re.IGNORECASE)
_INTERNATIONAL: Final = re.compile(
    r"(?<![\w+./-])\+[1-9](?:[ .-]?(?:\([0-9]{1,4}\)|[0-9]++)){1,8}+(?![\w-]|\.[0-9])", re.ASCII
)
_NORTH_AMERICAN: Final = re.compile(
    r"(?<![\w./+-])(?:1[ .-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[.-])[2-9][0-9]{2}[.-][0-9]{4}(?![\w-]|\.[0-9])",
    re.ASCII,
)
_ANNOUNCED: Final = re.compile(
    r"(?i:\b(?:phone|telephone|telefon|tel|fax|mobile|whatsapp|teléfono|móvil)\b"
    r"(?:[ .:#]|number|no\b|nr\b|is\b|es\b|ist\b){0,6})(?P<it>\+?\(?[0-9](?:[ .()/-]{0,2}[0-9]){8,14})(?![\w-]|\.[0-9])"
)


def find_personal(text: str) -> list[Finding]:
    """Return personal data and secrets in a text as (kind, start, end), in order and without overlaps.

    Kinds are private_key, json_web_token, api_key, email, iban, credit_card, social_security_number, ip_address, phone.
    """
    findings: list[Finding] = []
    taken = bytearray()
    for kind, start, end in _all(text):
        taken = taken or bytearray(len(text))
        if not any(taken[start:end]):
            taken[start:end] = b"\1" * (end - start)
            findings.append((kind, start, end))
    return sorted(findings, key=lambda finding: finding[1])


def masked(text: str) -> str:
    """Return the text with each finding replaced by `[kind]`."""
    pieces, done = [], 0
    for kind, start, end in find_personal(text):
        pieces += [text[done:start], f"[{kind}]"]
        done = end
    return "".join(pieces) + text[done:]


def _all(text: str) -> Iterator[Finding]:
    """Yield all matches, kinds that may contain others first; usual text costs only three cheap searches."""
    encoded = text.encode("utf-8", "surrogatepass")
    if _LONG_RUN in encoded.translate(_IN_KEYS):
        yield from _matches(text, "private_key", _PRIVATE_KEY)
        yield from _matches(text, "json_web_token", _WEB_TOKEN)
        yield from _matches(text, "api_key", _API_KEY)
    if "@" in text:
        yield from _matches(text, "email", _EMAIL, lambda match: _RESERVED_NAME.search(match[0]) is None)
    if _LONG_NUMBER.search(encoded.translate(_IN_NUMBERS)) and _NUMBER_SIGN.search(text):
        yield from _matches(text, "iban", _IBAN, _is_iban)
        yield from _matches(text, "credit_card", _CARD, _is_card)
        yield from _matches(text, "social_security_number", _SOCIAL_SECURITY)
        yield from _matches(text, "ip_address", _ADDRESS, _is_address)
        yield from _matches(text, "phone", _INTERNATIONAL, _has_phone_digits)
        yield from _matches(text, "phone", _NORTH_AMERICAN)
        yield from _matches(text, "phone", _ANNOUNCED, group="it")


Check = Callable[[re.Match[str]], bool]


def _matches(
    text: str, kind: str, pattern: re.Pattern[str], check: Check | None = None, group: str | int = 0
) -> Iterator[Finding]:
    for match in pattern.finditer(text):
        if check is None or check(match):
            yield kind, match.start(group), match.end(group)


def _digits(match: re.Match[str]) -> list[int]:
    return [int(character) for character in match[0] if character.isdigit()]


def _is_card(match: re.Match[str]) -> bool:
    """Return whether the check digit is right (Luhn, ISO/IEC 7812-1)."""
    digits = _digits(match)
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_iban(match: re.Match[str]) -> bool:
    """Return whether the check digits are right (mod 97, ISO 13616)."""
    number = match[0].replace(" ", "")
    as_digits = "".join(str(int(character, 36)) for character in number[4:] + number[:4])
    return 15 <= len(number) <= 34 and int(as_digits) % 97 == 1


def _is_address(match: re.Match[str]) -> bool:
    """Return whether it is a public address: not a version, a section number, or a private or reserved network."""
    try:
        address = ipaddress.IPv4Address(match[0])
    except ValueError:
        return False
    before = match.string[max(0, match.start() - 12) : match.start()]
    return address.is_global and max(address.packed) > 9 and _VERSION_BEFORE.search(before) is None


def _has_phone_digits(match: re.Match[str]) -> bool:
    """Return whether there are 9 to 15 digits (E.164), or at most 13 without a separator, as in sums such as +1234."""
    num_digits = len(_digits(match))
    return 9 <= num_digits <= (13 if num_digits + 1 == len(match[0]) else 15)
