"""Scores as people write them, where they can be read in one way only.

Read: `8`, `8.5`, `7,5`, `8/10`, `8 out of 10`, `**8**`, `Score: 8`, `[[8]]`, digits of any script,
`eight`, `8 (good)`.
Both scores of one text: `8, 7`, `8/10 and 7/10`, `Answer 1: 8, Answer 2: 7`, JSON. Of more answers:
`8, 7, 5`.
Not read: `7-8`, `8 or 9`, `1,000`, `8/9`, `8/9/10`, `80%`, `1e1`, `nan`, the other answer's label.
"""

from __future__ import annotations

import json
import re
from typing import Any

from jlrm.judgement.spelling import plain

Pair = tuple[float, float]

LONGEST = 400  # characters of what is looked at; longer texts are digits alone, or no score
PLACES = {"1": 1, "a": 1, "one": 1, "first": 1, "2": 2, "b": 2, "two": 2, "second": 2}

PLAIN_NUMBER = re.compile(r"[+-]?[0-9]+(?:\.[0-9]+)?")
_THING = "answer|assistant|response|model|output|candidate|回答|答案|助手|模型"
_LABEL = (
    rf"(?:(?:final|overall|total|my|the|scores?|rating|grade|mark|points|verdict|for|of|{_THING}"
    r"|评分|分数|得分|スコア)(?:'s)?[\s_-]*)*"
    rf"(?P<place>[12ab]|first|second)?(?:'s)?(?:[\s_]+(?:{_THING}))?[\s_]*(?:score|rating)?"
    r"\s*(?:[:=]|\s[-\u2013\u2014]\s|\b(?:is|gets|receives)\b)\s*"
)
_WORDS = {
    **{
        word: number
        for number, word in enumerate(
            ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
        )
    },
    **{word: number for number, word in enumerate("零一二三四五六七八九十")},
}
_POINTS = r"(?:points?|stars?|pts|点|分|점)"
_SCORE = re.compile(
    rf"(?:{_LABEL})?(?:(?P<whole>[+-]?[0-9]+)(?:\.(?P<point>[0-9]+)|,(?P<comma>[0-9]{{1,2}}))?"
    rf"|(?P<word>{'|'.join(_WORDS)}))\s*{_POINTS}?"
    r"(?:\s*\(?\s*(?:/|\bout of\b|\bof\b)\s*(?P<most>[0-9]+)(?:\.0+)?\)?)?"
    rf"\s*{_POINTS}?\s*(?:\([^()0-9]*\))?\s*[.,;]?",  # e.g. `8 (good)`
    re.IGNORECASE,
)
# Marks of bold, italics and code, unless they stand between two digits.
_EMPHASIS = re.compile(r"(?<![0-9])[*_`]+|[*_`]+(?![0-9])")
# Brackets around one thing; a comma inside makes them a list.
_WRAPPED = re.compile(
    r"\$+([^$,]*)\$+|\[+([^\[\],]*)\]+|\(([^()]*)\)|\\\(([^,]*)\\\)|\\\[([^,]*)\\\]"
)
_MACRO = re.compile(r"\\(?:boxed|text|textbf|mathbf|mathrm)\{([^{},]*)\}|\[\[([^\[\],]*)\]\]")
_HTML = re.compile(r"</?(?:b|strong|em|i|u|p|br|span|code|score)\s*/?>", re.IGNORECASE)
_BULLET = re.compile(r"^[ \t]*[-*\u2022][ \t]+", re.MULTILINE)
_FENCE = re.compile(r"```\w*\s*(.*?)\s*```", re.DOTALL)
_QUOTES = "\"'\u201c\u201d\u2018\u2019\u201e\u00ab\u00bb"
_BETWEEN = (  # what may part two scores, the surest first
    re.compile(r"\s*\n\s*"),
    re.compile(r"\s*[;|]\s*"),
    re.compile(r",\s+"),
    re.compile(r",?\s+(?:and|vs\.?|&)\s+", re.IGNORECASE),
    re.compile(rf"[,\s]\s*(?=(?:(?:{_THING})[\s_]*[2b]\b|b\s*[:=]))", re.IGNORECASE),
    re.compile(r"\s*\u3001\s*"),
    re.compile(r"(?<![.\s])\s+(?:,\s*)?"),  # `1. 8` is a numbered score, or 1.8
)
_TWO_WITH_COMMA = re.compile(r"([0-9]{1,2}(?:\.[0-9]+)?),([0-9]{1,2}(?:\.[0-9]+)?)")
_COMMA = re.compile(",")
_NAMES_OF_SCORES = re.compile(rf"{_THING}|scores?|ratings?|final|overall|\b(?:of|for)\b|[^0-9a-z]")
# Where the JSON begins that a text ends with: on a line of its own, or behind a label.
_JSON_BEGIN = re.compile(
    r"^(?:[*#> ]*(?:my |the )?(?:final |overall )?(?:scores?|ratings?|verdict|result|output|json)"
    r"\b[* ]*:[* ]*)?(?=[{\[])",
    re.IGNORECASE | re.MULTILINE,
)
_FENCED = re.compile(r"^```\w*[ \t]*\n([^`]*+)```", re.MULTILINE)


def score(text: str, most: float, place: int = 0) -> float | None:
    """Return the one score that a text states, else None.

    most: the end of the scale; `8/10` is a score of a scale to 10. place: the answer, 1 or 2, that
    the score is of; a label of the other one is a contradiction. 0: it may have none.
    """
    if PLAIN_NUMBER.fullmatch(text.strip()):
        return float(text.strip())
    text = _bare(text)
    if len(text) > LONGEST:
        return None
    if text.startswith("{"):
        return _score_of_json(_json(text), most, place)
    match = _SCORE.fullmatch(text)
    if not match or (match["most"] and float(match["most"]) != most):
        return None
    if match["place"] and PLACES[match["place"].lower()] != place:
        return None
    if match["word"]:
        return float(_WORDS[match["word"].lower()])
    return float(f"{match['whole']}.{match['point'] or match['comma'] or 0}")


def both(text: str, most: float) -> Pair | None:
    """Return the scores of answer 1 and answer 2 that one text states, else None."""
    text = _bare(text)
    if len(text) > LONGEST:
        return None
    if text.startswith(("{", "[")) and (listed := _json(text)) is not None:
        return _both_of_json(listed, most)
    text = text.removeprefix("[").removesuffix("]")
    for between in _BETWEEN:
        parts = [part for part in between.split(text) if part]
        if len(parts) == 2:
            return _pair(score(parts[0], most, 1), score(parts[1], most, 2))
    if match := _TWO_WITH_COMMA.fullmatch(text):
        return float(match[1]), float(match[2])
    return None


def several(text: str, most: float, num: int) -> tuple[float, ...] | None:
    """Return the scores of so many answers, more than two, that one text states, else None.

    Commas alone part them too, where that makes as many parts: `8,5,6`.
    """
    text = _bare(text)
    if len(text) > LONGEST:
        return None
    text = text.removeprefix("[").removesuffix("]")
    for between in (*_BETWEEN, _COMMA):
        parts = [part for part in between.split(text) if part]
        if len(parts) == num:
            found = [score(part, most, place) for place, part in enumerate(parts, start=1)]
            scores = tuple(each for each in found if each is not None)
            return scores if len(scores) == num else None
    return None


def json_scores(text: str, most: float) -> Pair | None:
    """Return both scores of the JSON that a text ends with, or of its last fenced block."""
    text = text.strip().removeprefix("\ufeff")
    fenced = _FENCED.findall(text)
    begins = [match.end() for match in _JSON_BEGIN.finditer(text)]
    last = fenced[-1] if fenced else text[begins[-1] :] if begins else _unfenced(text)
    return _both_of_json(_json(last.strip()), most)


def _pair(one: float | None, two: float | None) -> Pair | None:
    return None if one is None or two is None else (one, two)


def _bare(text: str) -> str:
    """Return a text without what is there for looks: fences, emphasis, quotes, brackets."""
    if len(text) > 2 * LONGEST:
        return text
    text = _unfenced(plain(text).strip())
    before = ""
    while text != before:
        before = text
        text = _MACRO.sub(r" \1\2 ", _HTML.sub(" ", text)).replace("\u2019", "'")
        text = _EMPHASIS.sub("", _BULLET.sub("", text)).strip().strip(_QUOTES).strip()
        if match := _WRAPPED.fullmatch(text):
            text = match[match.lastindex or 0].strip()
    return text


def _unfenced(text: str) -> str:
    match = _FENCE.fullmatch(text)
    return match[1] if match else text


def _json(text: str) -> Any:
    """Return the value of a JSON object or list; None for other texts and for keys given twice."""
    if not text.startswith(("{", "[")):
        return None
    try:
        return json.loads(_as_json(text), object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return None


def _as_json(text: str) -> str:
    """Write a dictionary of Python with double quotes, and leave out a comma behind the last."""
    text = text if '"' in text else text.replace("'", '"')
    return text.removesuffix("}").rstrip().removesuffix(",") + "}" if text[-1:] == "}" else text


def _once(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(entries)) < len(entries):
        raise ValueError("a key stands there twice")
    return dict(entries)


def _value(value: Any, most: float, place: int) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return score(str(value), most)
    if isinstance(value, str):
        return score(value, most, place)
    return _score_of_json(value, most, place)


def _score_of_json(value: Any, most: float, place: int) -> float | None:
    """Return the number of an object that holds one, whatever texts there are beside it."""
    if not isinstance(value, dict):
        return None
    named = [_value(each, most, place) for key, each in value.items() if not _name(key)]
    said = [each for each in named if each is not None]
    return said[0] if len(said) == 1 else None


def _both_of_json(value: Any, most: float) -> Pair | None:
    """Return the numbers of a list of two, or of the keys that name answer 1 and answer 2."""
    if isinstance(value, list):
        if len(value) == 2:
            return _pair(_value(value[0], most, 1), _value(value[1], most, 2))
        return _both_of_json(value[0], most) if len(value) == 1 else None  # [[8, 7]]
    if not isinstance(value, dict):
        return None
    places = [PLACES.get(_name(key)) for key in value]
    if sorted(filter(None, places)) == [1, 2]:
        one, two = (list(value.values())[places.index(place)] for place in (1, 2))
        return _pair(_value(one, most, 1), _value(two, most, 2))
    inner = [
        x
        for key, x in value.items()
        if isinstance(x, dict) or (isinstance(x, list) and not _name(key))
    ]
    return _both_of_json(inner[0], most) if len(inner) == 1 and not any(places) else None


def _name(key: str) -> str:
    """Return which answer a key names: what is left without the words for answers and scores."""
    return _NAMES_OF_SCORES.sub("", key.lower())
