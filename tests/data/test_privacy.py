"""Masks: what is found, what is left alone, and time in proportion to the text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.data.privacy import KINDS, check_kinds, mask
from fledge.errors import UserError

RANDOM = "q7Zp2Lx9Vb4Nc8Rt1Ks6"  # no key of anyone's
FOUND = [
    ("email", "Write to jane.doe+news@mail.example.co.uk.", "Write to <email>."),
    ("email", "<jörg@bücher.de>, a_b@c-d.org", "<<email>>, <email>"),
    ("email", "mailto:x@163.com", "mailto:<email>"),
    ("ip", "from 81.2.69.142:8080 and", "from <ip>:8080 and"),
    ("ip", "via 2a00:1450:4001:81b::200e today", "via <ip> today"),
    ("phone", "Call (212) 555-0123 or 212-555-0123.", "Call <phone> or <phone>."),
    ("phone", "212.555.0123, +1 212 555 0123, +12125550123", "<phone>, <phone>, <phone>"),
    ("phone", "+44 (0)20 7946 0958; +33 1 23 45 67 89", "<phone>; <phone>"),
    ("phone", "tel:+49-30-901820 or +919876543210", "tel:<phone> or <phone>"),
    ("phone", "+35212345, +49(030)901820, +7" + "1" * 14, "<phone>, <phone>, <phone>"),
    ("key", "AKIA" + "IOSFODNN7EXAMPLE", "<key>"),
    ("key", "token ghp_" + "a1B2" * 9, "token <key>"),
    ("key", "OPENAI=sk-" + "proj-" + RANDOM * 2, "OPENAI=<key>"),
    ("key", "eyJ" + "hbGciOiJI.eyJ" + "zdWIiOiIx.c2lnbmF0dXJl", "<key>"),
    ("key", f'api_key = "{RANDOM}"', 'api_key = "<key>"'),
    ("key", f"""{{'client_secret': '{RANDOM}'}}""", "{'client_secret': '<key>'}"),
    (
        "key",
        "a\n-----BEGIN RSA PRIVATE KEY-----\nMIIB\nx-y: z\n-----END RSA PRIVATE KEY-----\nb",
        "a\n<key>\nb",
    ),
    ("key", "-----BEGIN PRIVATE KEY-----\n" + "QUJD" * 16 + "\n" + "QUJD" * 16 + "\nend", "<key>\nend"),
]
LEFT_ALONE = [
    "git clone git@github.com:owner/name.git",
    "npm install lodash@4.17.21 and @types/node",
    "@property\n@a.b.c\nuser@localhost",
    "127.0.0.1, 192.168.0.1, 10.0.0.7, 255.255.255.0, 0.0.0.0 and 224.0.0.251",
    "version 81.2.69.142, Section 81.2.69.142 and v81.2.69.142",
    "kernel 2.6.18.6, 1.2.3.4.5, 999.1.1.1",
    "std::vector<int> a::b dead::beef 2001:db8::1 at 2023:10:11",
    "2020-12-31 and 31.12.2020, 12/31/2020, 2020-12-31T10:20:30+02:00",
    "ISBN 978-3-16-148410-0, ISBN 0-306-40615-2, 0201530821",
    "x = +3.14159265, +2147483647, -2147483648, 0x7FFFFFFF, 1234567890123",
    "+49 1, +4912345, +7" + "1" * 15 + ", +49" + "1" * 200,
    "3.11.4, 1.2.3-4567, 100-200-3000, 12-345-6789, part 555-0123",
    "UUID 123e4567-e89b-12d3-a456-426614174000, 4111-1111-1111-1111",
    "risk-taking sk-learn sk-something-with-no-number-in-it",
    'token = "abcdefghijklmnopqrstuvwxyz0123456789"',
    'password = "aaaaaaaaaaaaaaaa1"',
    f'name = "{RANDOM}"',
    "secret = 'changeme'",
    "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----",
]


@pytest.mark.parametrize(("kind", "text", "masked"), FOUND)
def test_it_is_found(kind: str, text: str, masked: str) -> None:
    result = mask(text, tuple(KINDS))
    assert result.text == masked
    assert result.counts == {kind: masked.count(f"<{kind}>")}
    assert mask(text, ()) == type(result)(text, {})


@pytest.mark.parametrize("text", LEFT_ALONE)
def test_it_is_left_alone(text: str) -> None:
    assert mask(text, tuple(KINDS)).text == text


@given(st.lists(st.sampled_from([text for _, text, _ in FOUND] + LEFT_ALONE), max_size=6))
def test_nothing_is_found_in_what_was_masked(parts: list[str]) -> None:
    masked = mask("\n\n".join(parts), tuple(KINDS))
    assert mask(masked.text, tuple(KINDS)).counts == {}


@given(st.text(max_size=200))
def test_text_without_a_digit_or_an_at_sign_is_left_alone(text: str) -> None:
    plain = "".join(c for c in text if not c.isnumeric() and c != "@")
    assert mask(plain, tuple(KINDS)).text == plain


@pytest.mark.parametrize(
    "unit",
    [
        *(
            "a",
            "1",
            "1.",
            "1-",
            "+1 ",
            "+49 ",
            "(212) ",
            "a.",
            "a@",
            "a@b.",
            "eyJ",
            "-eyJ",
            "sk-a",
            "sk-",
            "2000:",
        ),
        *("'", "'a", "-----BEGIN PRIVATE KEY-----"),
    ],
)
def test_a_long_run_of_almost_something_is_left_alone(unit: str) -> None:
    """A search that goes on to the end of the run from each of its places would take minutes."""
    text = unit * (50_000 // len(unit))
    assert mask(text, tuple(KINDS)).text == text


def test_a_run_of_digits_is_not_cut_into_groups() -> None:
    """Its 100 digits can be cut into six groups of at most 14 in some hundred thousand ways, on each line."""
    lines = ["+49" + "1" * digits + "a" for digits in [100] * 600 + [20_000]]
    text = "\n".join([*lines, *(line.replace("1", "1 ") for line in lines)])
    assert mask(text, ("phone",)).text == text


def test_an_unknown_kind_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"--mask mail: .* the nearest is 'email'"):
        check_kinds(["mail"])
