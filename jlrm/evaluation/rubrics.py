"""Rubrics: what a judge is told to look at, and the scores that it gives each criterion.

A rubric is a text, which the prompt shows, or criteria: names with descriptions and weights. Then
the judge writes a line for each criterion behind its reasoning, and the totals below them:

    accuracy: 8, 5
    clarity: 7, 7
    <answer>8</answer><answer>6</answer>

The scores of a verdict are the means of the criteria's by their weights. The totals end the text
and must be there, and do not count. A text in which a criterion has no score, or two different
ones, has no verdict: nothing is guessed.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jlrm.config import UsageError
from jlrm.judgement import numbers, prompts
from jlrm.judgement.spelling import plain
from jlrm.runtime import settings

NO_CRITERIA = "no_criteria"  # status: a criterion has no score that can be read, or several
MOST_CRITERIA = 32
LONGEST_NAME = 80  # characters
LONGEST = 20_000  # characters of all that the prompt shows

_BULLET = re.compile(r"^\s*(?:[-*\u2022]\s+|\(?[0-9]{1,2}[.)]\s+)")
_NUMBER = re.compile(r"(?<![\w.,])[0-9]+(?:\.[0-9]+)?(?![\w.]*[0-9])")


class Criterion(NamedTuple):
    """One thing that answers are scored on; its weight is relative to the others'."""

    name: str
    description: str
    weight: float = 1.0


@dataclass(frozen=True)
class Rubric:
    """A text, or criteria."""

    said: str = ""
    criteria: tuple[Criterion, ...] = ()

    @property
    def kind(self) -> str:
        """What a prompt must ask for: "text" or "criteria"."""
        return "criteria" if self.criteria else "text"

    @property
    def text(self) -> str:
        """What stands in the prompt. It is as untrusted as the answers are."""
        return self.said or "\n".join(map(_line, self.criteria))

    def total(self, scores: Sequence[float]) -> float:
        """Return the mean of the criteria's scores by their weights."""
        weights = [each.weight for each in self.criteria]
        return math.fsum(map(math.prod, zip(scores, weights, strict=True))) / math.fsum(weights)

    def by_name(self, scores: Sequence[Any]) -> dict[str, Any]:
        """Return what belongs to each criterion under its name."""
        return {each.name: own for each, own in zip(self.criteria, scores, strict=True)}


class Scored(NamedTuple):
    """A criterion's scores in a text, of each answer; where each begins, if plain."""

    scores: tuple[float, ...]
    places: tuple[int, ...] | None  # characters


def rubric(given: Any, what: str = "rubric") -> Rubric | None:
    """Return a rubric from a text or a mapping, None from None; `what` names it in errors.

    A mapping holds descriptions by name, or {"description": ..., "weight": ...} by name.

    Raises:
      UsageError: it is neither, empty or too long, or has a criterion that can't be one.
    """
    if given is None or isinstance(given, Rubric):
        return given
    if isinstance(given, str):
        found = Rubric(given.strip())
    elif isinstance(given, Mapping):
        found = Rubric(criteria=tuple(_criterion(*each, what) for each in given.items()))
    else:
        raise UsageError(
            f"{what}: wanted a text, or names with their descriptions, got {given!r:.60}."
        )
    if not found.text:
        raise UsageError(f"{what} is empty.")
    if len(found.text) > LONGEST or len(found.criteria) > MOST_CRITERIA:
        raise UsageError(
            f"{what}: at most {MOST_CRITERIA} criteria and {LONGEST} characters, got "
            f"{len(found.criteria)} and {len(found.text)}."
        )
    known: dict[str, str] = {}
    for each in found.criteria:
        if _key(each.name) in known:
            raise UsageError(
                f"{what}: the names {known[_key(each.name)]!r} and {each.name!r} have the same "
                "letters, so their scores could not be told apart."
            )
        known[_key(each.name)] = each.name
    return found


def read(path: str) -> Rubric:
    """Return the rubric of a file: JSON, YAML, or any other as text.

    Raises:
      UsageError: no such file, not in its form, or as `rubric`.
    """
    file = pathlib.Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"Cannot read the rubric {path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"The rubric {path} is not UTF-8 text: {error}.") from None
    kind, given = file.suffix.lower(), text
    if kind == ".json" and text.strip():
        try:
            given = json.loads(text, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"The rubric {path} is not valid JSON: {error}.") from None
    elif kind in (".yaml", ".yml"):
        given = settings.parse_yaml(text, f"The rubric {path}")
    found = rubric(given, f"The rubric {path}")
    if found is None:
        raise UsageError(f"The rubric {path} is empty.")
    return found


def identity(found: Rubric) -> Any:
    """Return a rubric as what `json.dumps` takes, by which files of responses tell rubrics."""
    return found.said or [list(each) for each in found.criteria]


def scores_in(text: str, found: Rubric, most: float, num_answers: int) -> list[Scored] | str:
    """Return the scores of every criterion in what a judge wrote, or the status that says why not.

    They stand behind the last `</think>`, or anywhere in a text without one, each on a line of its
    own. Of a line that stands twice the scores must be the same.

    most: the end of the scale. num_answers: that are judged at once.
    """
    said: dict[str, Scored] = {}
    wanted = {_key(each.name) for each in found.criteria}
    begin = text.rfind("</think>") + len("</think>") if "</think>" in text else 0
    for place, line in _lines(text, begin):
        for name, rest in _parted(line):
            if _key(name) not in wanted:
                continue
            scored = _scored(rest, place + len(line) - len(rest), most, num_answers)
            if scored is None:
                continue
            if said.setdefault(_key(name), scored).scores != scored.scores:
                return NO_CRITERIA
            break
    if said.keys() != wanted:
        return NO_CRITERIA
    return [said[_key(each.name)] for each in found.criteria]


def _once(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, count in Counter(name for name, _ in entries).items():
        if count > 1:
            raise ValueError(f"the key '{name}' stands twice")
    return dict(entries)


def _criterion(name: Any, given: Any, what: str) -> Criterion:
    if not isinstance(name, str):
        raise UsageError(f"{what}: names of criteria are texts, got {name!r:.60}.")
    name = " ".join(name.split())
    if not _key(name) or len(name) > LONGEST_NAME:
        raise UsageError(
            f"{what}: {name[:90]!r} can't be a criterion's name. Wanted letters, and at most "
            f"{LONGEST_NAME} characters."
        )
    own = given if isinstance(given, Mapping) else {"description": given}
    if unknown := own.keys() - {"description", "weight"}:
        raise UsageError(
            f"{what}: {name!r} has {min(map(str, unknown))!r}; a criterion has a description and a "
            "weight."
        )
    description, weight = own.get("description"), own.get("weight", 1)
    if not isinstance(description, str):
        raise UsageError(
            f"{what}: the description of {name!r} is no text, got {description!r:.60}."
        )
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not 0 < weight < 1e9:  # NaN is neither
        raise UsageError(
            f"{what}: the weight of {name!r} is no number above 0, got {weight!r:.60}."
        )
    return Criterion(name, description.strip(), float(weight))


def _line(criterion: Criterion) -> str:
    weight = "" if criterion.weight == 1 else f" (weight {criterion.weight:g})"
    said = " ".join(criterion.description.split())
    return f"- {criterion.name}{weight}{f': {said}' if said else ''}"


def _key(name: str) -> str:
    """Return the letters and digits of a name: they stay when it is broken or emphasised."""
    shown = prompts.quote(name, prompts.OURS, ())  # as the prompt has it
    return "".join(filter(str.isalnum, plain(shown).casefold()))


def _lines(text: str, begin: int) -> Iterator[tuple[int, str]]:
    """Yield the lines from a place on, with the place of each."""
    for line in text[begin:].split("\n"):
        yield begin, line
        begin += len(line) + 1


def _parted(line: str) -> Iterator[tuple[str, str]]:
    """Yield the ways to part a line into a name and what is said of it, the shortest name first.

    A name may hold colons of its own, and may stand in a list.
    """
    bare = _BULLET.sub("", line)
    for start in dict.fromkeys((line, bare)):
        ends = [match.end() for match in re.finditer(r"[:=|]", start[: 4 * LONGEST_NAME])]
        for end in ends:
            yield start[: end - 1], start[end:]


def _scored(said: str, place: int, most: float, num_answers: int) -> Scored | None:
    """Return the scores that the rest of a line states, which begins at a place of the text."""
    said = said.partition("<answer>")[0]
    if num_answers == 1:
        one = numbers.score(said, most)
        scores = None if one is None else (one,)
    elif num_answers == 2:
        scores = numbers.both(said, most)
    else:
        scores = numbers.several(said, most, num_answers)
    if scores is None:
        return None
    plainly = [match for match in _NUMBER.finditer(said) if match[0].isascii()]
    is_plain = [float(match[0]) for match in plainly] == list(scores)
    return Scored(scores, tuple(place + match.start() for match in plainly) if is_plain else None)
