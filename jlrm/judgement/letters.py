"""Verdicts that name the better answer and score none: `[[A]]`, `[RESULT] B`, `Answer 1`, a tie.

Marked verdicts, of which the last one counts: `[[A]]`, `[[B]]`, `[[C]]` for a tie (FastChat,
RewardBench), `[[A>>B]]`, `[[A=B]]` (Arena-Hard, JudgeBench), `[RESULT] A` (Prometheus), `Final
decision: Response 1` (Auto-J), `<answer>A</answer>`, `\\boxed{B}`, `"winner": "A"`. Where there is
none, a last or first line that says nothing else: `Output (a)` (LLMBar), `Response 2 is better.`,
`Tie` (PandaLM). Mentions are no verdicts: `[[A]] or [[B]]`, and `[[A]] if the first is better`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from jlrm.judgement.spelling import plain

Failure = Literal["no_answer", "ambiguous"]

LONGEST_LINE = 300  # characters of a line that names an answer

_THING = r"(?:answer|assistant|response|model|output|candidate|option|completion|one)"
_SIDE = (
    rf"(?:the\s+)?(?:{_THING}[\s_-]*)?(?:\(\s*)?(?P<side>[ab12]|first|second)(?:\s*\))?"
    rf"(?:\s+{_THING})?"
)
_SIGN = {">": 1, "\u227b": 1, "<": 2, "\u227a": 2, "=": 0, "\u2248": 0}
_COMPARED = re.compile(
    rf"(?:{_THING}[\s_-]*)?(?P<left>[ab12])\s*(?P<sign>([{''.join(_SIGN)}])\3*)\s*"
    rf"(?:{_THING}[\s_-]*)?(?P<right>[ab12])"
)
_BETTER = re.compile(
    r"(?:(?:overall|therefore|thus|so|hence|finally|in conclusion|in summary|i think|i believe"
    r"|i (?:would )?(?:prefer|choose|pick|select|vote for))[\s,:]+)*"
    rf"{_SIDE}(?:\s+(?:wins|(?:is|was|has|provides|gives)\b(?P<said>.*)))?",
    re.DOTALL,
)
_PRAISE = re.compile(
    r"(?:\s+(?:the|a|clearly|slightly|much|significantly|overall|far|more))*\s*"
    r"(?:better|best|superior|preferable|preferred|stronger|winner)\b(?:\s+(?:than|one|answer"
    r"|response|overall|here|because|since|as|in|by|for|and|due)\b.*)?",
    re.DOTALL,
)
_BUT = re.compile(r"\b(?:but|however|although|though|while|worse|not)\b")
_TIE = re.compile(
    r"(?:(?:it|this)(?:'s|\s+is)\s+)?(?:an?\s+)?(?:tie|tied|draw|equal|even|same|neither|both"
    r"|no\s+(?:preference|winner|difference)|(?:both|they)(?:\s+\w+)?\s+(?:are\s+)?(?:equal|tied"
    r"|the\s+same|equally\s+good|equally\s+bad)|equally\s+(?:good|bad))"
)
_MARKS = re.compile(
    r"\[\[(?P<double>[^\[\]\n]{1,60})\]\]"
    r"|\[(?:result|verdict|winner|decision|final answer)\]\s*:?\s*(?P<bracket>[^\n]{1,80})"
    r"|<answer>(?P<tag>[^<>]{1,80})</answer>"
    r"|\\boxed\{(?:\\text\{)?(?P<boxed>[^{}\n]{1,60})\}"
    r"|\b(?:verdict|decision|winner|preference|choice|judge?ment|conclusion|result|answer"
    rf"|(?:better|best|preferred|winning)\s+{_THING})[\"'*_]*\s*(?:is\b[\s:]*|[:=]\s*)"
    r"(?P<label>[^\n]{1,120})",
    re.IGNORECASE,
)
_MENTIONED = re.compile(r"[\"'`*_\s]*(?:if|when|for\s+a\s+tie|means)\b", re.IGNORECASE)
_SIDE_BY_SIDE = re.compile(r"[\s\"'`,/|*_]*(?:or|and|vs\.?)?[\s\"'`,/|*_]*", re.IGNORECASE)
_REASON = re.compile(r"\s*(?:because|since|as|given|due|it|its|which|with|for|in)\b")
_LOOKS = " \t\r\n{},*_`\"'\u201c\u201d\u2018\u2019.!#"


class NamedAnswer(NamedTuple):
    """A place in a text that names an answer."""

    start: int
    end: int
    preference: int


def preference(text: str) -> int | Failure:
    """Return what a judge prefers: 1 the first answer, 2 the second, 0 a tie; or why it is unknown.

    What stands before the last `</think>` is not looked at.
    """
    text = plain(text.rpartition("</think>")[2])
    marks = list(_marks(text))
    last = _last_clear(text, marks)
    if last is not None:
        return last.preference
    lines = [line for line in text.splitlines() if line.strip(_LOOKS)]
    for line in (lines[-1], lines[0]) if lines and not marks else ():
        found = named(line.lstrip("> ").strip(_LOOKS).rpartition(". ")[2])
        if found is not None:
            return found
    return "ambiguous" if marks else "no_answer"


def named(text: str) -> int | None:
    """Return the preference that a short text states and nothing else, else None."""
    if len(text) > LONGEST_LINE:
        return None
    text = " ".join(text.strip(_LOOKS).lower().split())
    if found := _COMPARED.fullmatch(text):
        better = _SIGN[found["sign"][0]]
        left, right = _number(found["left"]), _number(found["right"])
        return None if left == right else (0, left, right)[better]
    if _TIE.fullmatch(text):
        return 0
    found = _BETTER.fullmatch(text)
    said = found and found["said"]
    is_clear = said is None or (_PRAISE.fullmatch(said) and not _BUT.search(said))
    return _number(found["side"]) if found and is_clear else None


def _number(side: str) -> int:
    return 1 if side in ("a", "1", "first") else 2


def _marks(text: str) -> Iterator[NamedAnswer]:
    """Yield the marked verdicts in order; a mark with anything else in it is none."""
    start = 0
    while found := _MARKS.search(text, start):
        group = found.lastgroup or ""
        said, end = _said(found[group], group), found.end()
        if group in ("label", "bracket"):  # the rest of a line may hold another mark
            end = found.start(group) + (len(found[group]) if said is not None else 0)
            nested = _MARKS.match(text, found.start(group))
            said = None if nested else said
            end = found.start(group) if nested else end
        if said is not None and not _MENTIONED.match(text, end):
            yield NamedAnswer(found.start(), end, said)
        start = max(end, found.start() + 1)


def _said(text: str, group: str) -> int | None:
    text = text.strip(_LOOKS).strip("[]")
    if group != "label" and text.strip(_LOOKS + "()").isdecimal():
        return None  # a score: `[RESULT] 2` is Prometheus' grade of a single answer
    whole = 0 if text.strip(_LOOKS) in ("C", "c") else named(text)
    if whole is not None or group not in ("label", "bracket"):
        return whole
    for separator in (".", ",", ";", " - ", " \u2014 ", "("):  # e.g. `B, because it is exact`
        head, found, rest = text.partition(separator)
        if found and (separator in ".(" or _REASON.match(rest.lower())):
            said = named(head)
            if said is not None:
                return said
    return None


def _last_clear(text: str, marks: list[NamedAnswer]) -> NamedAnswer | None:
    """Return the last mark that has no mark of another answer beside it."""
    for i in range(len(marks) - 1, -1, -1):
        beside = [
            (first, second)
            for first, second in zip(
                marks[max(i - 1, 0) : i + 1], marks[max(i, 1) : i + 2], strict=False
            )
            if first.preference != second.preference
            and _SIDE_BY_SIDE.fullmatch(text, first.end, second.start)
        ]
        if not beside:
            return marks[i]
    return None
