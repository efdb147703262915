"""What is personal data by its form, and what only looks like it. All numbers are published examples or made up."""

from __future__ import annotations

import pytest

from packhorse.data.checks.personal import find_personal, masked

PRIVATE_KEY = (
    "-----BEGIN RSA PRIVATE KEY-----\n"
    + "MIIEpAIBAAKCAQEA75tRk1vJqHnYbGzL0Xw2cD4eF6gH8iJ0kL2mN4oP6qR8sT0u\n" * 3
    + "-----END RSA PRIVATE KEY-----"
)
WEB_TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"


@pytest.mark.parametrize(
    ("kind", "secret"),
    [
        ("email", "jane.doe+news@mail.bank.co.uk"),
        ("email", "j@x.org"),
        ("phone", "+34 612 345 678"),
        ("phone", "+34612345678"),
        ("phone", "+44 (0)20 7946 0958"),
        ("phone", "(212) 555-0187"),
        ("phone", "212-555-0187"),
        ("phone", "1-212-555-0187"),
        ("credit_card", "4111 1111 1111 1111"),
        ("credit_card", "5555-5555-5555-4444"),
        ("credit_card", "378282246310005"),
        ("credit_card", "30569309025904"),
        ("iban", "GB29 NWBK 6016 1331 9268 19"),
        ("iban", "DE89370400440532013000"),
        ("iban", "NO93 8601 1117 947"),
        ("iban", "MT84MALT011000012345MTLCAST001S"),
        ("ip_address", "93.184.216.34"),
        ("social_security_number", "219-09-9999"),
        ("api_key", "AKIAIOSFODNN7EXAMPLE"),
        ("api_key", "ghp_16C7e42F292c6912E7710c838347Ae178B4a"),
        ("api_key", "github_pat_11ABCDEFG0aBcDeFgHiJkL_" + "mNoPqRsTuVwXyZ012345" * 2),
        ("api_key", "sk-proj-" + "aB3dE5fG" * 5),
        ("api_key", "sk-ant-api03-" + "aB3dE5fG" * 5),
        ("api_key", "xoxb-123456789012-abcdefABCDEF"),
        ("api_key", "AIzaSyD-9tSrke72PouQMnMX-a7eZSW0jkFMBWY"),
        ("api_key", "hf_" + "aBcDeFgHiJ" * 3 + "kLmN"),
        ("json_web_token", WEB_TOKEN),
        ("private_key", PRIVATE_KEY),
    ],
    ids=lambda value: value[:12].replace("\n", " "),
)
@pytest.mark.parametrize("around", ["{}", "It is {}.", "a\n({}), é", '"{}"', "key={} "])
def test_personal_data_is_found_whole(kind: str, secret: str, around: str) -> None:
    text = around.format(secret)
    (found,) = find_personal(text)
    assert (found[0], text[found[1] : found[2]]) == (kind, secret)
    assert masked(text) == around.format(f"[{kind}]")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("3 + 4 = 7, <<48/2=24>>24, $1,234,567,890.12", id="sums"),
        pytest.param("12345678901234567890 stars and 4242424242424241", id="long numbers"),
        pytest.param("472547338\n+960397912423686\n-------", id="a long sum"),
        pytest.param("4111 1111 1111 1112", id="wrong last digit of a card"),
        pytest.param("GB28 NWBK 6016 1331 9268 19", id="wrong check digits of an IBAN"),
        pytest.param("IN THE YEAR 2001 ALSO THIS", id="capitals"),
        pytest.param("version 93.184.216.34, v99.1.2.3, V 93.184.216.34 and Chrome/58.0.29.110", id="versions"),
        pytest.param("see 1.2.3.4 and 10.1.2.3, 192.168.0.17, 127.0.0.1", id="sections and private networks"),
        pytest.param("300.1.2.3 and 1.22.333.4444", id="no addresses"),
        pytest.param("2023-01-15 10:30:45, 15.01.2023, 01/15/2023", id="dates"),
        pytest.param("ISBN 978-3-16-148410-0", id="a book"),
        pytest.param("000-12-3456, 666-12-3456, 123-00-4567, 912-34-5678", id="no social security numbers"),
        pytest.param("user@example.com, a@b.example.org, root@localhost", id="names for examples"),
        pytest.param("@decorator, a @ b, foo@, 5@3.2", id="at signs"),
        pytest.param("sk-loading-wheel-container-with-long-name", id="a class name"),
        pytest.param("a task-force-of-A1-and-very-long-names-here", id="sk- within a word"),
        pytest.param("-----BEGIN RSA PRIVATE KEY-----\n...\n-----END RSA PRIVATE KEY-----", id="no key within"),
        pytest.param("-----BEGIN PUBLIC KEY-----\n" + "MIIBIjANBgkqhkiG9w0BAQ" * 5, id="a public key"),
        pytest.param("https://en.wikipedia.org/wiki/Raymond_III,_Count_of_Tripoli_and_more", id="a link"),
        pytest.param("", id="nothing"),
    ],
)
def test_what_only_looks_like_it_is_left(text: str) -> None:
    assert (find_personal(text), masked(text)) == ([], text)


@pytest.mark.parametrize(
    "text",
    [
        "Tel: 612 345 678",
        "tel +34 612 345 678",
        "Teléfono: 91 234 56 78",
        "Phone number is 020 7946 0958",
        "my mobile 0171 2345678",
    ],
)
def test_an_announced_number_is_a_telephone_number(text: str) -> None:
    (found,) = find_personal(text)
    assert (found[0], found[2]) == ("phone", len(text))
    assert text[found[1]] in "+0123456789"


def test_several_stand_in_order_and_none_within_another() -> None:
    text = f"mail a.b@c.org or +1 212 555 0187; card 4111111111111111; {PRIVATE_KEY}"
    assert masked(text) == "mail [email] or [phone]; card [credit_card]; [private_key]"


@pytest.mark.parametrize(
    "part",
    ["+1", "1 ", "a@", "a.-", "sk-A1", "eyJaaaaaaaa.", "-----BEGIN PRIVATE KEY-----", "4111 ", "GB29 ", "phone is "],
)
def test_hostile_text_ends(part: str) -> None:
    assert isinstance(masked(part * 20_000 + "x"), str)
