"""How else a text can be spelt so that a reader, or a judge, still takes it for the same.

`plain` undoes what does not change what people read: full-width characters, digits of other
scripts, characters without width. `in_brackets` finds a control text in every such spelling, in any
case, with white space in it, and with its angle brackets as HTML entities or escapes.
"""

from __future__ import annotations

import functools
import re
import unicodedata

# Not those that turn the direction of reading: with them the eye and the text disagree.
ZERO_WIDTH = (
    "\u00ad\u034f\u180e\u200b\u200c\u200d\u2060\u2061\u2062\u2063\u2064\ufe0e\ufe0f\ufeff\u20e3"
)
# Besides, of use only to hide: combining strokes, marks of direction, tag letters.
_HIDING = (
    ZERO_WIDTH + "\0\b\x1b\u0300-\u036f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufffd"
    "\U000e0000-\U000e007f"
)
_OPEN = r"(?:[<\uff1c\ufe64\u2039\u27e8\u2329\u3008]|&(?:amp;)*(?:lt|#0*60|#x0*3c);?|\\u003c|%3c)"
_CLOSE = r"(?:[>\uff1e\ufe65\u203a\u27e9\u232a\u3009]|&(?:amp;)*(?:gt|#0*62|#x0*3e);?|\\u003e|%3e)"
_OTHERS = {"|": "|\uff5c\u2223\u00a6\u01c0", "/": "/\uff0f\u2044\u2215\u29f8", "k": "k\u212a"}
_CYRILLIC = dict(zip("aceoixp", "\u0430\u0441\u0435\u043e\u0456\u0445\u0440", strict=True))

MOST_END_TOKENS = 16  # that are looked past
_END_TOKEN = re.compile(r"<(?:[|\uff5c][a-z_\u2581]{1,24}[|\uff5c]|/s|eos|end_of_turn)>\Z")


def plain(text: str) -> str:
    """Write full-width characters and all decimal digits in ASCII, and drop those without width."""
    return text if text.isascii() else text.translate(_PLAIN)


def without_end_tokens(text: str) -> str:
    """Return a text without white space, NULs and tokens such as `<|im_end|>` at its end."""
    text = text.rstrip().rstrip("\0 \n")
    for _ in range(MOST_END_TOKENS):
        if not (match := _END_TOKEN.search(text[-32:])):
            break
        text = text[: -len(match[0])].rstrip()
    return text


def in_brackets(text: str, tokens: frozenset[str]) -> str:
    """Write `[NAME]` for every spelling of the control texts `<NAME>`.

    Linear in the text: what may stand between two characters is matched without going back.
    """
    pattern, names = _lookalikes(tokens)
    return pattern.sub(lambda hit: f"[{names[(hit.lastindex or 1) - 1]}]", text)


@functools.lru_cache(maxsize=16)
def _lookalikes(tokens: frozenset[str]) -> tuple[re.Pattern[str], list[str]]:
    """Return what matches any spelling of a control text, and the names of its groups."""
    between = rf"[\s{_HIDING}]*+"
    named = {token[1:-1] for token in tokens if len(token) > 2 and token[0] + token[-1] == "<>"}
    names = sorted(named, key=len, reverse=True)
    spelt = (f"({between.join(map(_character, name))})" for name in names)
    inside = f"{between}(?:{'|'.join(spelt)}){between}"
    return re.compile(rf"\\?{_OPEN}{inside}\\?{_CLOSE}", re.IGNORECASE), names


def _character(character: str) -> str:
    """Match one character of a name in ASCII or full width; Latin letters also as Cyrillic ones."""
    same = _OTHERS.get(character, character)
    if "!" <= character <= "~":
        same += chr(ord(character) + 0xFEE0)
    return f"[{re.escape(same + _CYRILLIC.get(character, ''))}]"


class _PlainCharacters(dict[int, str | None]):
    """What is written for a character, asked for one by one: there are a million of them."""

    def __missing__(self, code: int) -> str:
        digit = unicodedata.decimal(chr(code), None)
        self[code] = chr(code) if digit is None else str(digit)
        return self[code] or ""


_PLAIN = _PlainCharacters(
    {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
    | {0x3000: " ", 0x2044: "/", 0x2215: "/"}
    | dict.fromkeys(map(ord, ZERO_WIDTH))
)
