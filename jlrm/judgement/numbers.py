"""Scores as people write them, where they can be read in one way only.

Read: `8`, `8.5`, `7,5`, `8/10`, `8 out of 10`, `**8**`, `Score: 8`, `[[8]]`, digits of any script.
Both scores of one text: `8, 7`, `8/10 and 7/10`, `Answer 1: 8, Answer 2: 7`, JSON.
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
_THING = "answer|assistant|response|model|output|candidate"
_LABEL = (
    rf"(?:(?:final|overall|total|my|the|scores?|rating|grade|mark|points|verdict|for|of|{_THING}"
    r"|评分|分数|得分|スコア)(?:'s)?[\s_-]*)*"
    r"(?P<place>[12ab])?(?:'s)?[\s_]*(?:score|rating)?\s*(?:[:=]|\bis\b)\s*"
)
_SCORE = re.compile(
    rf"(?:{_LABEL})?(?P<whole>[+-]?[0-9]+)(?:\.(?P<point>[0-9]+)|,(?P<comma>[0-9]{{1,2}}))?"
    r"(?:\s*(?:/|\bout of\b|\bof\b)\s*(?P<most>[0-9]+)(?:\.0+)?)?\s*(?:points?|pts|点|分)?\.?",
    re.IGNORECASE,
)
# Marks of bold, italics and code, unless they stand between two digits.
_EMPHASIS = re.compile(r"(?<![0-9])[*_`]+|[*_`]+(?![0-9])")
# Brackets around one thing; a comma inside makes them a list.
_WRAPPED = re.compile(r"\\boxed\{([^{},]*)\}|\$+([^$,]*)\$+|\[+([^\[\],]*)\]+|\(([^()]*)\)")
_FENCE = re.compile(r"```\w*\s*(.*?)\s*```", re.DOTALL)
_QUOTES = "\"'\u201c\u201d\u2018\u2019\u201e\u00ab\u00bb"
_BETWEEN = (  # what may part two scores, the surest first
    re.compile(r"\s*\n\s*"),
    re.compile(r"\s*[;|]\s*"),
    re.compile(r",\s+"),
    re.compile(r",?\s+(?:and|vs\.?|&)\s+", re.IGNORECASE),
    re.compile(rf"\s+(?=(?:{_THING})[\s_]*[2b]\b)", re.IGNORECASE),
    re.compile(r"\s+"),
)
_TWO_WITH_COMMA = re.compile(r"([0-9]{1,2}(?:\.[0-9]+)?),([0-9]{1,2}(?:\.[0-9]+)?)")
_NAMES_OF_SCORES = re.compile(rf"{_THING}|scores?|ratings?|[^0-9a-z]")


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
    found = _SCORE.fullmatch(text)
    if not found or (found["most"] and float(found["most"]) != most):
        return None
    if found["place"] and PLACES[found["place"].lower()] != place:
        return None
    return float(f"{found['whole']}.{found['point'] or found['comma'] or 0}")


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
    if found := _TWO_WITH_COMMA.fullmatch(text):
        return float(found[1]), float(found[2])
    return None


def json_scores(text: str, most: float) -> Pair | None:
    """Return both scores of a text that is one JSON object and nothing else, else None."""
    text = _unfenced(text.strip())
    return _both_of_json(_json(text), most) if text.startswith("{") else None


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
        text = _EMPHASIS.sub("", text).strip().strip(_QUOTES).strip()
        if found := _WRAPPED.fullmatch(text):
            text = found[found.lastindex or 0].strip()
    return text


def _unfenced(text: str) -> str:
    found = _FENCE.fullmatch(text)
    return found[1] if found else text


def _json(text: str) -> Any:
    """Return the value of a JSON object or list; None for other texts and for keys given twice."""
    if not text.startswith(("{", "[")):
        return None
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return None


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
    inner = [x for key, x in value.items() if not _name(key) and isinstance(x, dict | list)]
    return _both_of_json(inner[0], most) if len(inner) == 1 and not any(places) else None


def _name(key: str) -> str:
    """Return which answer a key names: what is left without the words for answers and scores."""
    return _NAMES_OF_SCORES.sub("", key.lower())
