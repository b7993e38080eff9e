"""How files say which of two answers is better, and how well both did, read as ours.

Our labels are 1 (the first answer), 2 (the second) and 0 (a tie). Words such as "model_a" or "tie"
mean one thing everywhere. Numbers don't: some files count 0, 1 and 2 as first, second and tie.
Such a numbering can't be told from ours row by row, so it is read as ours. `doubts` speaks up when
the counts of a whole source don't look like ours, and with `meanings` a user sets it right.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from jlrm.config import UsageError
from jlrm.judgement.numbers import PLACES

# A graded label, such as a mean over votes, counts as the class that it is this close to. Those of
# AlpacaEval lie between 1 and 2.
TOLERANCE = 0.1
CLASSES = {0.0: 0, 1.0: 1, 1.5: 0, 2.0: 2}
SIDES = PLACES | {"left": 1, "right": 2, "1st": 1, "2nd": 2}
TIES = {"draw", "equal", "even", "same", "both", "neither", "no_preference", "bothbad", "bothgood"}
TIES |= {f"{start}_{end}" for start in ("both", "both_are", "equally") for end in ("good", "bad")}
WORDS = {1: "answer_1", 2: "answer_2", 0: "tie"}  # no numbers, which `data.values` may change
# Spellings of nothing, and of what YAML reads as true and false.
MISSING = {"", "nan", "none", "null", "na", "n/a"}
BOOLEANS = {"yes": "true", "on": "true", "no": "false", "off": "false"}
WIDE = str.maketrans("．，／", ".,/")  # beside full-width digits, which `float` knows
FEW = 20  # rows that may all have the same label by chance
# Names of a column whose numbers are usually classes counted from 0.
CLASS_COLUMNS = {"label", "labels", "class", "target"}

_NUMBER = re.compile(r"[+-]?\d+(?:\.\d*)?(?:e[+-]?\d+)?|[+-]?\.\d+|[+-]?\d+,(?!\d{3}$)\d+", re.I)
_ANSWER = "model|answer|response|resp|output|assistant|option|completion|candidate|text|system"
_SIDE = re.compile(
    rf"(?:the_)?(?:(?:{_ANSWER})_?)?({'|'.join(SIDES)})(?:_(?:{_ANSWER}))?"
    r"(?:(?:_is)?(?:_(?:much|slightly|significantly|clearly))?_(?:better|best|wins?|won))?"
)
_COMPARED = re.compile(r"[a1]\s*(>+|<+|=+)\s*[b2]|[b2]\s*(>+|<+|=+)\s*[a1]")
_MODEL = re.compile(r"(?:model|generator|system|llm)(?:_name)?_?([12ab])")


class Unusable(Exception):
    """This row is to be left out; the text is the reason, of data/comparisons.py."""


def meanings(values: Mapping[Any, Any]) -> dict[str, int]:
    """Check what labels mean, {theirs: 1, 2 or 0}, and return it by their plain spelling.

    Raises:
      UsageError: a meaning that is neither 1, 2 nor 0, or a label that stands twice.
    """
    known: dict[str, int] = {}
    for label, meaning in values.items():
        if str(meaning) not in ("0", "1", "2"):
            raise UsageError(
                f"data.values: {label!r} can't mean {meaning!r}: wanted 1 (the first answer), 2 "
                "(the second) or 0 (a tie), e.g. data.values={0: 1, 1: 2, 2: 0}."
            )
        name = plain(label)
        if name in known:
            raise UsageError(f"data.values: the label {name!r} stands twice.")
        known[name] = int(meaning)
    return known


def plain(label: Any) -> str:
    """Return one spelling for what is one label: "1" for 1, 1.0 and "1.0"; "true" for True."""
    if isinstance(label, bool):
        return str(label).lower()
    number = _number(label)
    if number is not None:
        return f"{number:.12g}"
    text = str(label).strip().lower()
    return BOOLEANS.get(text, text)


def numbering(label: Any) -> str:
    """Return the class that a label numbers: "0", "1", "1.5" or "2"; "" of any other label."""
    number = _number(label)
    near = [value for value in CLASSES if number is not None and abs(value - number) <= TOLERANCE]
    return f"{near[0]:g}" if near else ""


def preference(label: Any, known: Mapping[str, int], where: str) -> int | None:
    """Return which answer a label calls better: 1, 2, 0 for a tie; None where there is no label.

    Args:
      known: from `meanings`; unless it is empty, a number outside it means nothing.

    Raises:
      UsageError: a label that is not understood.
      Unusable: a graded one between two classes.
    """
    if is_missing(label):
        return None
    if not isinstance(label, (str, int, float)):
        raise _unknown(label, known, where)
    if (name := plain(label)) in known:
        return known[name]
    if isinstance(label, bool):
        raise _unknown(label, known, where)
    if (number := _number(label)) is not None:
        return _class_of(number, label, known, where)
    meaning = _of_word(name)
    if meaning is None:
        raise _unknown(label, known, where)
    return meaning


def _class_of(number: float, label: Any, known: Mapping[str, int], where: str) -> int:
    numbers = ((_number(name), meaning) for name, meaning in known.items())
    classes = {value: meaning for value, meaning in numbers if value is not None}
    classes = classes if known else CLASSES
    nearest = min(classes, key=lambda value: abs(value - number), default=math.inf)
    if abs(nearest - number) <= TOLERANCE:
        return classes[nearest]
    # Ours are graded from 1 to 2: what lies between 0 and 1 is of another scale.
    lowest = min(classes, default=math.inf) if known else 1.0
    if lowest < number < max(classes):
        raise Unusable("unclear_preference")
    raise _unknown(label, known, where)


def _of_word(text: str) -> int | None:
    """Return what a text means by itself: "Model A", "[[B]]", "A>B", "tie (bothbad)"."""
    if text == "[[c]]":  # FastChat's tie; "C" by itself may be a third answer
        return 0
    text = text.strip(" \t\n[](){}'\"*.").replace("&gt;", ">").replace("&lt;", "<")
    if compared := _COMPARED.fullmatch(text):
        mark = compared[1] or compared[2]
        first = (mark[0] == ">") == bool(compared[1])
        return 0 if mark[0] == "=" else 1 if first else 2
    words = re.sub(r"[\s_-]+", "_", text)
    if words.startswith("tie") or words in TIES:
        return 0
    side = _SIDE.fullmatch(words)
    return SIDES[side[1]] if side else None


class WinnerColumns(NamedTuple):
    """Columns that tell the better answer together, by what they stand for."""

    models: dict[int, str]  # the names of the models that gave the answers
    classes: dict[str, int]  # one column for each class, of which one is set: `winner_model_a`


def labelled(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a row with what tells its winner as `preference`.

    That is `winner`, or a column for each class (`winner_model_a`). It may name the model that
    gave the answer, of columns such as `model_a`. Beside two scores only a word counts: of a number
    or a name the scores say more.

    Raises:
      UsageError: a column of a class is neither 0 nor 1.
      Unusable: columns of several classes are set.
    """
    if any(row.get(name) is not None for name in ("chosen", "reward_model")):
        return row
    models, classes = _winner_columns(tuple(row))
    gone: Collection[str] = ("winner",)
    if not is_missing(row.get("preference")):
        label, gone = row["preference"], ()
    elif "winner" in row and (not classes or not is_missing(row["winner"])):
        label = row["winner"]
    elif classes:
        label, gone = _of_classes(row, classes, where), classes
    else:
        return row
    label = _of_model(label, row, models)
    is_word = isinstance(label, str) and _of_word(plain(label)) is not None
    if gone and _is_scored(row) and not is_word:
        return row
    return {name: row[name] for name in row if name not in gone} | {"preference": label}


@functools.lru_cache(maxsize=1024)
def _winner_columns(names: tuple[str, ...]) -> WinnerColumns:
    """Return what of these columns tells a winner; nothing that is there in half."""
    models: dict[int, str] = {}
    classes: dict[str, int] = {}
    for name in names:
        words = re.sub(r"[\s_-]+", "_", name.strip().lower())
        meant = _of_word(words.removeprefix("winner_")) if words.startswith("winner_") else None
        if meant is not None:
            classes[name] = meant
        elif match := _MODEL.fullmatch(words):
            models[SIDES[match[1]]] = name
    has_sides = {1, 2} <= set(classes.values())
    return WinnerColumns(models if len(models) == 2 else {}, classes if has_sides else {})


def _of_classes(row: Mapping[str, Any], classes: Mapping[str, int], where: str) -> str | None:
    said = set()
    for name, meaning in classes.items():
        value = plain(row[name])
        if value not in {"0", "1", "true", "false", *MISSING}:
            raise UsageError(f"{where}: '{name}' must be 0 or 1, got {row[name]!r}.")
        if value in ("1", "true"):
            said.add(meaning)
    if len(said) > 1:
        raise Unusable("several_winners")
    return WORDS[said.pop()] if said else None


def _of_model(label: Any, row: Mapping[str, Any], models: Mapping[int, str]) -> Any:
    """Return a label that is the name of one of the row's two models as a word, others as given."""
    if not isinstance(label, str):
        return label
    sides = [side for side, name in models.items() if plain(row[name]) == plain(label)]
    return WORDS[sides[0]] if len(sides) == 1 else label


def _is_scored(row: Mapping[str, Any]) -> bool:
    pair = row.get("score")
    pair = [row.get("score_1"), row.get("score_2")] if pair is None else pair
    return not any(map(is_missing, pair if isinstance(pair, list) else [pair]))


def is_missing(value: Any) -> bool:
    """Return whether a label or a score is not there, in one of its spellings."""
    is_nan = isinstance(value, float) and math.isnan(value)
    return value is None or is_nan or (isinstance(value, str) and value.strip().lower() in MISSING)


def _unknown(label: Any, known: Mapping[str, int], where: str) -> UsageError:
    if known:
        given = ", ".join(f"{name}: {meaning}" for name, meaning in known.items())
        return UsageError(
            f"{where}: the label {label!r} is not among those of data.values={{{given}}}. Add what "
            "it means: 1 (the first answer), 2 (the second) or 0 (a tie)."
        )
    hint = ""
    if isinstance(label, str | bool) and plain(label) in ("true", "false"):
        hint = " If it says whether the first answer is better: data.values={true: 1, false: 2}."
    elif isinstance(label, (str, int, float)):
        hint = (
            f" Say what it means by data.values={{{plain(label)[:40]}: N}}, N being 1 (the first "
            "answer), 2 (the second) or 0 (a tie)."
        )
    return UsageError(
        f"{where}: the preference must be 1, 2 or 0 (a tie), between 1 and 2 if it is graded, or A,"
        f" B, model_a, model_b, answer_1, answer_2 or tie, got {label!r}.{hint}"
    )


def doubts(counts: Mapping[str, int], column: str) -> str:
    """Say why numbers that were read as ours may be another numbering, or "" for no doubt.

    The first and the second answer are both better sometimes, and ties are rarer than either.

    Args:
      counts: rows by the number that labels them (`numbering`).
      column: the source's own name of the labels.
    """
    ties, first, second = (counts.get(name, 0) for name in "012")
    lacking = [name for name, count in (("1", first), ("2", second)) if not count]
    if "1.5" in counts or not ties + first + second:
        return ""
    if ties and lacking:
        what = f"never {' or '.join(lacking)}"
    elif lacking and first + second >= FEW:
        what = f"never {lacking[0]}"
    elif ties and (ties >= min(first, second) or column.strip().lower() in CLASS_COLUMNS):
        what = "which is how many files count first answer, second answer and tie"
    else:
        return ""
    there = [(name, counts[name]) for name in "012" if name in counts]
    shown = ", ".join(
        f"{name} ({count}{'' if place else ' rows'})" for place, (name, count) in enumerate(there)
    )
    read_as = {"0": "a tie", "1": "the first answer", "2": "the second"}
    told = ", ".join(
        f"{name} {'as' if place else 'was read as'} {read_as[name]}"
        for place, (name, _) in enumerate(there)
    )
    if not ties:
        advice = (
            "If the better answer always stands in one place, set data.orders=both or prepare "
            "with --swap"
        )
    else:
        theirs = "{0: 1, 1: 2, 2: 0}" if second else "{0: 1, 1: 2}"
        advice = f"If 0 is the first answer and 1 the second, set data.values={theirs}"
        if "2" not in counts and first:
            advice += "; if 1 says that the first is better and 0 the second, {1: 1, 0: 2}"
    same = ", ".join(f"{name}: {name}" for name, _ in there)
    return (
        f"the labels in '{column}' are {shown}, {what}. {told}. {advice}; if "
        f"they are right, data.values={{{same}}} says so (prepare, evaluate: --values)."
    )


def scores(given: Any, where: str) -> tuple[float | None, float | None]:
    """Read two scores, as numbers or as text such as "8", "7,5" and "8/10"; None is a missing one.

    Raises:
      UsageError: what is no pair of finite numbers, or not clearly so ("1,234", "8/10" and "4/5").
    """
    if isinstance(given, str):
        given = _listed(given)
    if not isinstance(given, list) or len(given) != 2:
        raise UsageError(f"{where}: the scores must be two numbers, got {given!r}.")
    pair = [_score(each) for each in given]
    outs = {out for _, out in pair if out is not None}
    has_whole = any(value is not None and out is None for value, out in pair)
    if any(math.isnan(value) for value, _ in pair if value is not None) or (
        len(outs) > 1 or (outs and has_whole)
    ):
        raise UsageError(f"{where}: the scores must be two numbers, got {given!r}.")
    if any(math.isinf(value) for value, _ in pair if value is not None):
        raise UsageError(f"{where}: scores must be finite, got {given!r}.")
    return pair[0][0], pair[1][0]


def golds(given: Any, ranking: Any, num: int, where: str) -> tuple[tuple[float | None, ...], bool]:
    """Read what each of `num` answers is worth, by scores, or by a ranking: then True is returned.

    A ranking has the place of each answer, 1 for the best, equal ones for equally good answers; it
    is returned as negative numbers, so that more is better. None is a missing score or place.

    Raises:
      UsageError: neither or both are given, or one that is no list of `num` finite numbers, or a
        place below 1.
      Unusable: fewer than two answers have one.
    """
    if (given is None) == (ranking is None):
        got = "neither" if given is None else "both"
        raise UsageError(f"{where}: a list of answers needs 'scores' or 'ranking', got {got}.")
    name, told = ("scores", given) if ranking is None else ("ranking", ranking)
    found = [_score(each) for each in told] if isinstance(told, list) else []
    is_finite = all(math.isfinite(value) for value, _ in found if value is not None)
    if len(found) != num or not is_finite or any(out is not None for _, out in found):
        raise UsageError(f"{where}: '{name}' must be {num} numbers, one an answer, got {told!r}.")
    values = [value for value, _ in found]
    if ranking is not None and any(value is not None and value < 1 for value in values):
        raise UsageError(
            f"{where}: 'ranking' has the place of each answer, 1 for the best, got {told!r}."
        )
    if num - values.count(None) < 2:
        raise Unusable("no_label")
    if ranking is None:
        return tuple(values), False
    return tuple(None if value is None else -value for value in values), True


def _listed(text: str) -> Any:
    """Return the list that a text holds, as JSON or as two numbers with a space between."""
    inner = text.strip()
    if inner.startswith("["):
        try:
            return json.loads(inner)
        except (ValueError, RecursionError):
            inner = inner.strip("[] ")
    parts = inner.split()
    return parts if len(parts) == 2 else text


def _score(given: Any) -> tuple[float | None, str | None]:
    """Return a score and what it is out of: None if it is missing, NaN if it is no number."""
    if given is None or (isinstance(given, float) and math.isnan(given)):
        return None, None
    if isinstance(given, str):
        text = given.translate(WIDE).strip(" \t\r\n*")
        if text.lower() in MISSING:
            return None, None
        given, _, out = (part.strip() for part in text.partition("/"))
        number = _number(given)
        is_out = not out or (out.isdecimal() and float(out) > 0)
        return (math.nan if number is None or not is_out else number), (out or None)
    number = None if isinstance(given, bool) else _number(given)
    return (math.nan if number is None else number), None


def _number(given: Any) -> float | None:
    if isinstance(given, str):
        text = given.translate(WIDE).strip()
        return float(text.replace(",", ".")) if _NUMBER.fullmatch(text) else None
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        return None
    try:
        return float(given)
    except OverflowError:
        return math.inf
