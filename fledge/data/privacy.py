"""Personal data and keys in text, replaced by placeholders such as `<email>`.

What is looked for has a form that little else has: names and addresses of streets are not found. Where a form
is ambiguous (four numbers with dots may be a version), what is left alone is said at its pattern.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fledge.config import nearest
from fledge.errors import UserError

Find = Callable[[str], tuple[str, int]]
IsOne = Callable[[re.Match[str]], bool]


@dataclass(frozen=True)
class Masked:
    """A text with placeholders, and how many there are of each kind."""

    text: str
    counts: dict[str, int]


def mask(text: str, kinds: Sequence[str]) -> Masked:
    """Replace what is found of each kind (see `KINDS`) by `<kind>`."""
    counts = {}
    for kind, replace in KINDS.items():
        if kind in kinds:
            text, count = replace(text)
            if count:
                counts[kind] = count
    return Masked(text, counts)


def check_kinds(kinds: Sequence[str]) -> None:
    """Raises UserError for a kind that there is not."""
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"--mask {kind}: there is no such kind; the nearest is {nearest(kind, KINDS)!r}")


def _replace(pattern: re.Pattern[str], text: str, placeholder: str, is_one: IsOne | None) -> tuple[str, int]:
    """Replace matches, or their group `value` where there is one, for which `is_one` holds."""
    count = 0
    group = "value" if "value" in pattern.groupindex else 0

    def put(match: re.Match[str]) -> str:
        nonlocal count
        if is_one is not None and not is_one(match):
            return match[0]
        count += 1
        start, end = (place - match.start() for place in match.span(group))
        return match[0][:start] + placeholder + match[0][end:]

    return pattern.sub(put, text), count


def _before(match: re.Match[str], characters: int) -> str:
    return match.string[max(0, match.start() - characters) : match.start()]


# --- keys -----------------------------------------------------------------------------------------

_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:[\s\S]{0,8000}?-----END (?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY(?: BLOCK)?-----"
    r"|(?:\s{1,9}[A-Za-z0-9+/=]{40,100})+)"
)
# Keys whose beginning says what they are. None can begin inside of a word.
_PREFIXED = re.compile(
    r"(?<![\w-])(?:"
    r"(?:AKIA|ASIA)[A-Z0-9]{16}"  # Amazon
    r"|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255}|glpat-[\w-]{20,64}"
    r"|sk-(?:proj-|svcacct-|admin-|ant-)?(?=[\w-]{0,255}\d)[\w-]{20,255}"  # OpenAI, Anthropic
    r"|AIza[\w-]{35}|xox[abeoprs]-[A-Za-z0-9-]{10,255}|hf_[A-Za-z0-9]{30,64}"
    r"|(?:sk|rk)_live_[A-Za-z0-9]{16,255}"
    r"|eyJ[\w-]{8,4096}\.eyJ[\w-]{8,4096}\.[\w-]{8,4096}"  # JSON web tokens
    r")(?![\w-])"
)
_STARTS = ("AKIA", "ASIA", "gh", "glpat-", "sk-", "AIza", "xox", "hf_", "_live_", "eyJ")
# A quoted value; what it is assigned to stands before it.
_QUOTED = re.compile(r"""(?P<quote>["'])(?P<value>[^\s"'<>]{16,256})(?P=quote)""")
_SECRET_NAME = re.compile(
    r"""(?:api[_-]?key|secret|secret[_-]?key|access[_-]?key|auth[_-]?key|token|passw(?:or)?d)["']?"""
    r"""\s{0,3}(?:=>|:=|[:=])\s{0,3}$""",
    re.IGNORECASE,
)


def _is_secret(match: re.Match[str]) -> bool:
    """Assigned to what is named like a secret, and random: letters and digits, at least 3.5 bits a character
    (Shannon), no run of the alphabet or of digits."""
    value = match["value"]
    if not (any(c.isdigit() for c in value) and any(c.isalpha() for c in value)):
        return False
    if not _SECRET_NAME.search(_before(match, 40)):
        return False
    shares = [count / len(value) for count in Counter(value).values()]
    steps = "".join("+" if ord(b) - ord(a) == 1 else " " for a, b in pairwise(value))
    return -sum(share * math.log2(share) for share in shares) >= 3.5 and "+++++" not in steps


def _keys(text: str) -> tuple[str, int]:
    total = 0
    if "PRIVATE KEY" in text:
        text, total = _replace(_PRIVATE_KEY, text, "<key>", None)
    if any(start in text for start in _STARTS):
        text, count = _replace(_PREFIXED, text, "<key>", None)
        total += count
    text, count = _replace(_QUOTED, text, "<key>", _is_secret)
    return text, total + count


# --- e-mail ---------------------------------------------------------------------------------------

# The look-behind lets an address begin only where its characters do, which also keeps the search linear.
# Not an address: `git@host:path`, and `package@1.2`.
_EMAIL = re.compile(
    r"(?<![\w.%+-])(?!git@)[\w.%+-]{1,64}@(?!\d+\.\d+(?:\.\d|[^\w.]|$))(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w-])"
)


def _emails(text: str) -> tuple[str, int]:
    return _replace(_EMAIL, text, "<email>", None) if "@" in text else (text, 0)


# --- addresses of machines ------------------------------------------------------------------------

_IP4 = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?!\w|\.[0-9])")
_IP6 = re.compile(r"[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")
_NUMBERED = ("version ", "section ", "§", "§ ", "v. ", "release ")


def _is_public_address(match: re.Match[str]) -> bool:
    """Public addresses only: 127.0.0.1, 192.168.0.1, 255.255.255.0 and addresses for examples are nobody's.

    Four numbers after "version", "section" and their like are no address, nor are four numbers below 32:
    one in 4096 addresses is so low, and most versions are.
    """
    before = _before(match, 8).lower()
    if before and (before[-1].isalnum() or before[-1] in "._:" or before.endswith(_NUMBERED)):
        return False
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    if address.version == 4 and max(address.packed) < 32:
        return False
    return address.is_global and not address.is_multicast


def _ips(text: str) -> tuple[str, int]:
    text, four = _replace(_IP4, text, "<ip>", _is_public_address)
    text, six = _replace(_IP6, text, "<ip>", _is_public_address) if ":" in text else (text, 0)
    return text, four + six


# --- telephones -----------------------------------------------------------------------------------

# Country codes of the ITU (E.164), and at most 15 digits: in one run, or in groups separated by one
# character, the same throughout. The run has its own alternative: an empty separator could cut it up anyhow.
_CODE = (
    r"(?:7|20|27|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|21[12368]|2[2-69]\d|3[578]\d|42\d|5[09]\d|6[789]\d"
    r"|8[0578]\d|9[679]\d)"
)
_AREA = r"(?:\(0?\d{0,4}\)[ .\u00a0-]?)?"
_INTERNATIONAL = re.compile(
    rf"(?<![\w+.])(?P<value>\+{_CODE}"
    rf"(?:{_AREA}\d{{1,14}}|(?P<separator>[ .\u00a0-]){_AREA}\d{{1,14}}(?:(?P=separator)\d{{1,14}}){{0,5}}))"
    r"(?!\w|[.,]\d)"
)
# North America: 3-3-4 digits with separators, neither area nor exchange beginning with 0 or 1.
_NORTH_AMERICA = re.compile(
    r"(?<![\w+./-])(?P<value>(?:1[ .-])?"
    r"(?:\([2-9]\d\d\) ?[2-9]\d\d-|[2-9]\d\d-[2-9]\d\d-|[2-9]\d\d\.[2-9]\d\d\.)\d{4})(?![\w/-]|[.,]\d)"
)
_PLAIN_NORTH_AMERICA = re.compile(
    r"(?<![\w+.])(?P<value>\+1[ .-]?\(?[2-9]\d\d\)?[ .-]?[2-9]\d\d[ .-]?\d{4})(?!\w|[.,]\d)"
)


# Most texts have nothing like it; this is quicker to say.
_MAYBE_NORTH_AMERICA = re.compile(r"[2-9][0-9]{2}[.-][0-9]{4}")
_MAYBE_INTERNATIONAL = re.compile(r"\+[1-9]")


def _has_telephone_length(match: re.Match[str]) -> bool:
    """8 to 15 digits; with dots, at least two of them: +3.14159265 is a number."""
    value = match["value"]
    return 8 <= sum(c.isdigit() for c in value) <= 15 and value.count(".") != 1


def _phones(text: str) -> tuple[str, int]:
    total = 0
    patterns = [_INTERNATIONAL, _PLAIN_NORTH_AMERICA] if _MAYBE_INTERNATIONAL.search(text) else []
    patterns += [_NORTH_AMERICA] if _MAYBE_NORTH_AMERICA.search(text) else []
    for pattern in patterns:
        text, count = _replace(pattern, text, "<phone>", _has_telephone_length)
        total += count
    return text, total


# In this order: what a key contains is not looked at again.
KINDS: dict[str, Find] = {"key": _keys, "email": _emails, "ip": _ips, "phone": _phones}
