"""Verdicts that name the better answer and score none: `[[A]]`, `[RESULT] B`, `Answer 1`, a tie.

Marked verdicts, of which the last one counts: `[[A]]`, `[[B]]`, `[[C]]` for a tie (FastChat,
RewardBench), `[[A>>B]]`, `[[A=B]]` (Arena-Hard, JudgeBench), `[RESULT] A` (Prometheus), `Final
decision: Response 1` (Auto-J), `<answer>A</answer>`, `<verdict>A</verdict>`, `\\boxed{B}`,
`"winner": "A"`. Where there is none, a last or first line that says nothing else: `Output (a)`
(LLMBar), `Response 2 is better.`, `Tie` (PandaLM).

Mentions are no verdicts: `[[A]] or [[B]]`, `[[A]] if the first is better`, `not [[A]]`. A mark in
quotation marks counts only where all are quoted. `The answer is 2` speaks of the question.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from jlrm.judgement.numbers import PLACES
from jlrm.judgement.spelling import plain, without_end_tokens

Failure = Literal["no_answer", "ambiguous"]

LONGEST_LINE = 300  # characters of a line that names an answer

_THING = (
    r"(?:answer|assistant|response|model|output|candidate|option|completion|system|one"
    r"|回答|答案|助手|模型|回复)"
)
_SIDE = (
    rf"(?:the\s+)?(?:{_THING}\s+(?:of|from|by)\s+)?(?:{_THING}[\s_-]*)?"
    rf"(?:\(\s*)?(?P<side>[ab12]|first|second)(?:\s*\))?(?:'s)?(?:\s+{_THING})?"
)
_SIGN = {">": 1, "\u226b": 1, "\u227b": 1, "<": 2, "\u226a": 2, "\u227a": 2, "=": 0, "\u2248": 0}
_COMPARED = re.compile(
    rf"(?:{_THING}[\s_-]*)?(?P<left>[ab12])\s*(?P<sign>([{''.join(_SIGN)}])\3*)\s*"
    rf"(?:{_THING}[\s_-]*)?(?P<right>[ab12])"
)
# What may stand before a statement and changes nothing in it.
_OPENERS = re.compile(
    r"\A(?:(?:overall|therefore|thus|so|hence|finally|consequently|in (?:conclusion|summary)"
    r"|to conclude|i (?:think|believe|(?:would )?(?:prefer|choose|pick|select|vote for|say))"
    r"|(?:based on|considering|given|taking|in my|on balance|for th(?:is|ese) reasons?"
    r"|as a result)\b[^,]{0,80},)[\s,:]+(?:that\s+)?)*"
)
_BETTER = re.compile(
    rf"{_SIDE}(?:\s+wins|\s*(?:更好|更优|较好|胜出|获胜)"
    r"|\s+(?:is|was|has|provides|provided|gives|gave|performs|performed|did)\b(?P<said>.*))?",
    re.DOTALL,
)
_PRAISE = re.compile(
    r"(?:\s+(?:the|a|clearly|slightly|much|significantly|overall|far|more))*\s*"
    r"(?:better|best|superior|preferable|preferred|stronger|helpful|winner)\b"
    r"(?P<more>[\s,]+(?:than|one|answer|response|overall|here|because|since|as|in|by|for|and|due)"
    r"\b.*)?",
    re.DOTALL,
)
_REASONED = re.compile(r"\b(?:because|since|as|due)\b")
# What speaks for the other answer too; without its reasons, which may name both.
_BUT = re.compile(r"\b(?:but|however|although|though|while|whereas|worse|not)\b")
_THAN = re.compile(rf"\s*than\s+{_SIDE.replace('(?P<side>', '(?:')}\b")
_OTHER = re.compile(rf"\b(?:{_THING}[\s_-]*[ab12]|b|first|second)\b|, a\b")
_EVEN = r"(?:equal|tied|even|the\s+same|equally\s+(?:good|bad|well|helpful)|neutral)"
_TIE = re.compile(
    r"(?:(?:it|this|the\s+result)(?:'s|\s+is)\s+)?(?:an?\s+)?"
    r"(?:tie|draw|both|neither|none|no\s+(?:preference|winner|difference)|same|both\s+bad|平局"
    rf"|{_EVEN})(?:\s*\(\s*both\s*(?:bad|good)?\s*\))?"
    rf"|neither(?:\s+{_THING})?\s+is\s+better(?:\s+than\s+the\s+other)?"
    rf"|(?:both|they|(?:both|the\s+two|the)\s+{_THING}s|(?:{_THING}\s+)?[a1]\s+and\s+"
    rf"(?:{_THING}\s+)?[b2])\s+(?:(?:are|is|performed|did)\s+)?{_EVEN}"
)
_WORD = r"(?:verdict|decision|winner|preference|choice|judge?ment|vote)"
_RANK = r"(?:better|best|preferred|winning|chosen|selected)"
_IS = r"[\"'*_]*\s*(?:is\b[\s:]*|[:=]\s*)"
_MARKS = re.compile(
    r"\\?\[\\?\[(?P<double>[^\[\]\\\n]{1,60})\\?\]\\?\]"
    r"|\[(?:result|verdict|winner|decision|final answer)\]\s*:?\s*(?P<bracket>[^\n]{1,80})"
    r"|<answer>(?P<tag>[^<>]{1,80})</answer>"
    rf"|<(?:final_)?(?:{_WORD}|{_RANK}|result)>(?P<xml>[^<>]{{1,80}})</"
    r"|\\boxed\{(?:\\[a-z]+\{)?(?P<boxed>[^{}\n]{1,60})\}"
    rf'|"(?:[a-z]+_)?(?:{_WORD}|{_RANK})(?:_[a-z]+)?"\s*:\s*(?P<json>"[^"\n]{{1,60}}"|[0-2])'
    rf"|\b(?:{_WORD}|{_RANK}\s+{_THING}){_IS}(?P<label>[^\n]{{1,120}})"
    # `The answer is 2` and `Correct answer: A` speak of the question.
    rf"|(?:(?<!correct\s)\b(?:answer|result|conclusion|{_RANK}|more\s+helpful)|答案|结论|判决)"
    r"[\"'*_]*\s*[:=]\s*(?P<colon>[^\n]{1,120})",
    re.IGNORECASE,
)
_LINE_MARKS = ("label", "colon", "bracket")  # the rest of a line, which may hold another mark
# `[[A]] if ...`, `[[A]]?`; `if the first is better, write [[A]]`, `not [[A]]`.
_ASKED = re.compile(r"[\"'`*_\s]*(?:\?|(?:if|when|for\s+a\s+tie|means)\b)", re.IGNORECASE)
_CONDITION = re.compile(
    r"\b(?:if|when)\b[^,.!?;\n]*,?\s*(?:then\s+)?(?:please\s+)?"
    r"(?:output|write|answer|say|reply|use|print|respond|choose)?(?:\s+with)?[\s\"'`*:]*\Z",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"\b(?:not|nor|neither|than|over|instead\s+of)[\s\"'`*]*(?:for\s+)?[\s\"'`*]*\Z",
    re.IGNORECASE,
)
NEAR = 100  # characters around a mark that may make it a mention
_SIDE_BY_SIDE = re.compile(r"[\s\"'`,/|*_]*(?:or|and|vs\.?)?[\s\"'`,/|*_]*", re.IGNORECASE)
_REASON = re.compile(r"\s*(?:because|since|as|given|due|it|its|which|with|for|in)\b")
_QUOTES = "\"'`\u201c\u201d\u2018\u2019"
_LOOKS = " \t\r\n\0{},*_.!#\\\u3010\u3011\u300c\u300d" + _QUOTES
_BRACKETS = "<>"  # half of a pair is for no looks: `A>` is half of a comparison


class NamedAnswer(NamedTuple):
    """A place in a text that names an answer."""

    start: int
    end: int
    preference: int


def preference(text: str) -> int | Failure:
    """Return what a judge prefers: 1 the first answer, 2 the second, 0 a tie; or why it is unknown.

    What stands before the last `</think>` is not looked at.
    """
    text = without_end_tokens(plain(text.rpartition("</think>")[2]))
    marks = list(_marks(text))
    last = _last_clear(text, [m for m in marks if not _is_quoted(text, m)] or marks)
    if last is not None:
        return last.preference
    lines = [line for line in text.splitlines() if line.strip(_LOOKS + _BRACKETS)]
    for line in (lines[-1], lines[0]) if lines and not marks else ():
        stated = named(line.lstrip("> -").strip(_LOOKS).rpartition(". ")[2])
        if stated is not None:
            return stated
    return "ambiguous" if marks else "no_answer"


def named(text: str) -> int | None:
    """Return the preference that a short text states and nothing else, else None."""
    if len(text) > LONGEST_LINE:
        return None
    text = text.strip(_LOOKS)
    if text.startswith("<") != text.endswith(">"):
        return None
    text = " ".join(text.strip(_LOOKS + _BRACKETS).replace("\u2019", "'").lower().split())
    if text[:1] + text[-1:] == "[]" and not text.strip("[] ").isdecimal():
        text = text.strip("[]")
    if match := _COMPARED.fullmatch(text):
        better = _SIGN[match["sign"][0]]
        left, right = PLACES[match["left"]], PLACES[match["right"]]
        return None if left == right else (0, left, right)[better]
    text = _OPENERS.sub("", text)
    if _TIE.fullmatch(text):
        return 0
    match = _BETTER.fullmatch(text)
    return PLACES[match["side"]] if match and _is_praise(match["said"]) else None


def _is_praise(said: str | None) -> bool:
    """Return whether what is said of an answer says only that it is the better one."""
    if said is None:
        return True
    match = _PRAISE.fullmatch(said)
    if not match or _BUT.search(said):
        return False
    return not _OTHER.search(_REASONED.split(_THAN.sub("", match["more"] or "", count=1))[0])


def _marks(text: str) -> Iterator[NamedAnswer]:
    """Yield the marked verdicts in order; a mark with anything else in it is none."""
    start = 0
    while match := _MARKS.search(text, start):
        group = match.lastgroup or ""
        said, end = _said(match[group], group), match.end()
        if group in _LINE_MARKS:
            end = match.start(group) + (len(match[group]) if said is not None else 0)
            nested = _MARKS.match(text, match.start(group))
            said = None if nested else said
            end = match.start(group) if nested else end
        if said is not None and not _is_mention(text, match.start(), end):
            yield NamedAnswer(match.start(), end, said)
        start = max(end, match.start() + 1)


def _is_mention(text: str, start: int, end: int) -> bool:
    """Return whether a sentence speaks of a mark without deciding so."""
    before = text[max(start - NEAR, 0) : start]
    is_denied = _CONDITION.search(before) or _DENIED.search(before)
    return bool(is_denied or _ASKED.match(text, end))


def _is_quoted(text: str, mark: NamedAnswer) -> bool:
    """Return whether a mark stands in quotation marks within a line of other words."""
    quotes = text[max(mark.start - 1, 0) : mark.start] + text[mark.end : mark.end + 1]
    if quotes not in ('""', "\u201c\u201d"):
        return False
    before = text[max(mark.start - NEAR, 0) : mark.start].rpartition("\n")[2]
    after = text[mark.end : mark.end + NEAR].partition("\n")[0]
    return bool((before + after).strip(_LOOKS + _BRACKETS))


def _said(text: str, group: str) -> int | None:
    text = text.strip(_LOOKS + _BRACKETS).strip("[]")
    if (
        group not in ("label", "colon", "json", "xml")
        and text.strip(_LOOKS + _BRACKETS + "()").isdecimal()
    ):
        return None  # a score: `[RESULT] 2` is Prometheus' grade of a single answer
    if group == "json" and text == "0":
        return 0
    whole = 0 if text.strip(_LOOKS + _BRACKETS) in ("C", "c") else named(text)
    if whole is not None or group not in _LINE_MARKS:
        return whole
    for separator in (".", ",", ";", " - ", " \u2014 ", "("):  # e.g. `B, because it is exact`
        head, separated, rest = text.partition(separator)
        if separated and (separator in ".(" or _REASON.match(rest.lower())):
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
