"""The forms that a row of comparisons comes in, told apart by its keys, and what a row must hold.

`in_our_form` translates a row's own keys into ours: JudgeLM-100K's, verl's (a filled-in judge
prompt with its ground truth) and TRL's (prompt, chosen, rejected). The checks stand in one place,
`comparison`: a wrong type stops the reading with its place, an unusable value drops the row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from jlrm.config import UsageError
from jlrm.data.comparisons import Comparison, Where
from jlrm.judgement.prompts import PAIR_TEMPLATES, split_judgelm_text

Row = dict[str, Any]
Messages = list[tuple[str, str]]  # (role, text)

# Our names, and JudgeLM-100K's.
TEXTS = {"question": "question_body", "answer_1": "answer1_body", "answer_2": "answer2_body"}
RENAMABLE = (*TEXTS, "score_1", "score_2", "preference", "id", "source", "score", "text")
SPELLED = {*TEXTS, "score_1", "score_2", "score", "preference", "winner"} | {
    *("prompt", "chosen", "rejected", "score_chosen", "score_rejected")
}
PREFERENCES = {
    **{0: 0, 1: 1, 2: 2, "0": 0, "1": 1, "2": 2, "a": 1, "b": 2},
    **{"model_a": 1, "model_b": 2, "answer_1": 1, "answer_2": 2},
}


class Unusable(Exception):
    """This row is to be left out; the text is the reason."""


def comparison(row: Row, identity: str, place: Where) -> Comparison:
    """Check a row in our form: a wrong type stops the reading, an unusable value drops the row."""
    where = str(place)
    texts = {name: _text(row, name, where) for name in TEXTS}
    pair = _scores(row, where)
    source = row.get("source")
    comparison = Comparison(
        id=identity,
        question=texts["question"],
        answer_1=texts["answer_1"],
        answer_2=texts["answer_2"],
        score_1=pair[0] if pair else None,
        score_2=pair[1] if pair else None,
        preference=_preference(row.get("preference"), where),
        source="" if source is None else str(source),
        meta=_meta(row),
        where=place,
    )
    if pair is None and comparison.preference is None:
        raise Unusable("no_label")
    if pair is not None and -1 in pair:
        raise Unusable("failed_review")
    if pair and comparison.label != dataclasses.replace(comparison, preference=None).label:
        raise Unusable("conflicting_label")
    try:
        json.dumps(vars(comparison), ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):  # half a surrogate pair, or nested too deep
        raise Unusable("unwritable") from None
    return comparison


def _text(row: Row, name: str, where: str) -> str:
    if name not in row:
        other = f" (or '{TEXTS[name]}')" if name in TEXTS else ""
        raise UsageError(
            f"{where} has no field '{name}'{other}. {there_are(row)}"
            f" If one of these is meant, name it, e.g. data.columns={name}=NAME."
        )
    if row[name] is None:
        raise Unusable("missing_text")
    if not isinstance(row[name], str):
        raise UsageError(f"{where}: '{name}' must be text, got {row[name]!r}.")
    return row[name]


def _scores(row: Row, where: str) -> tuple[float, float] | None:
    pair: Any = row.get("score")
    if pair is None:
        pair = [row.get("score_1"), row.get("score_2")]
    if pair == [None, None]:
        return None
    is_pair = isinstance(pair, list) and len(pair) == 2
    if not is_pair or any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in pair):
        raise UsageError(f"{where}: the scores must be two numbers, got {pair!r}.")
    try:
        first, second = float(pair[0]), float(pair[1])
    except OverflowError:
        first = second = math.inf
    if not all(0 <= score < math.inf or score == -1 for score in (first, second)):
        raise UsageError(f"{where}: scores must be finite and not negative, got {pair!r}.")
    return first, second


def _preference(value: Any, where: str) -> int | None:
    if value is None:
        return None
    word = value.strip().lower() if isinstance(value, str) else value
    if isinstance(word, str) and word.startswith("tie"):
        return 0
    if isinstance(word, (int, float, str)) and not isinstance(word, bool) and word in PREFERENCES:
        return PREFERENCES[word]
    raise UsageError(
        f"{where}: the preference must be 1, 2 or 0 (a tie), or A, B, model_a, model_b, answer_1,"
        f" answer_2 or tie, got {value!r}."
    )


def _meta(row: Row) -> Row:
    """Return what else a row tells; flat formats hold it as the text of a JSON object."""
    meta = row.get("meta")
    if isinstance(meta, str) and meta.lstrip().startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):  # text after all
            meta = json.loads(meta)
    meta = {} if meta is None else meta if isinstance(meta, dict) else {"meta": meta}
    if isinstance(row.get("text"), str):
        meta = {**meta, "reasoning": split_judgelm_text(row["text"])}
    return meta


def renamed(row: Row, columns: Mapping[str, str], where: str) -> Row:
    if not columns:
        return row
    for ours, theirs in columns.items():
        if ours in TEXTS and theirs not in row:
            raise UsageError(f"{where} has no column '{theirs}' ({ours}). {there_are(row)}")
    gone = {*columns, *columns.values()}
    kept = {key: value for key, value in row.items() if key not in gone}
    return kept | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def respelled(row: Row) -> Row:
    """Return the row with our names for headers such as `Question` and `Answer 1`, and `winner`.

    A name is changed only if the row lacks it in our spelling and one header alone can be meant.
    """
    names = _spellings(tuple(row))
    if names:
        row = {names.get(key, key): value for key, value in row.items()}
    labels = ("preference", "score", "score_1", "chosen", "reward_model")
    if "winner" in row and all(row.get(label) is None for label in labels):
        return {**row, "preference": row["winner"]}
    return row


@functools.lru_cache(maxsize=1024)
def _spellings(keys: tuple[str, ...]) -> dict[str, str]:
    """Return our names by the headers that mean them."""
    meant: dict[str, list[str]] = {}
    for key in keys:
        meant.setdefault(our_spelling(key), []).append(key)
    only = {theirs[0]: ours for ours, theirs in meant.items() if len(theirs) == 1}
    return {theirs: ours for theirs, ours in only.items() if ours in SPELLED and theirs != ours}


def our_spelling(header: str) -> str:
    """Return e.g. "answer_1" for `Answer 1`, `answer1` and `ANSWER-1`."""
    words = re.sub(r"[\s_-]+", "_", str(header).strip().lower())
    return re.sub(r"^(answer|score)_?([12])$", r"\1_\2", words)


def there_are(names: Collection[str]) -> str:
    return f"There are: {listed(names)}." if names else "There are none."


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


# ----------------------------------------------------------------------------------- forms of rows


def in_our_form(row: Row, scores: str, where: str) -> Row:
    if "reward_model" in row:
        return _from_verl(row, where)
    if "chosen" in row and "rejected" in row:
        return _from_trl(row, where)
    if any(name in row for name in TEXTS.values()):
        return _from_judgelm(row, scores)
    return row


def _from_judgelm(row: Row, scores: str) -> Row:
    text = "text" if scores == "score" else "text_w_reference"
    lacks = row.get(scores) is None and row.get("preference") is None
    if scores != "score" and lacks:
        raise Unusable("no_scores")
    ours = {name: row[theirs] for name, theirs in TEXTS.items() if theirs in row}
    return ours | row | {"score": row.get(scores), "text": row.get(text)}


def _from_verl(row: Row, where: str) -> Row:
    reward, extra = row["reward_model"], row.get("extra_info")
    if not isinstance(reward, dict) or "ground_truth" not in reward:
        raise UsageError(f"{where}: 'reward_model' must hold 'ground_truth', got {reward!r}.")
    holders = (d for d in (extra, row) if isinstance(d, dict) and d.keys() >= TEXTS.keys())
    texts = next(holders, None) or _texts_of_prompt(row, where)
    truth = reward["ground_truth"]
    label = truth if isinstance(truth, dict) else {"score": truth}
    known = ("score", "score_1", "score_2", "preference")
    kept = {"ground_truth": truth, "extra_info": extra}
    return {
        **{name: texts[name] for name in TEXTS},
        **{name: label[name] for name in known if name in label},
        **({"score": label["solution_text_format"]} if "solution_text_format" in label else {}),
        "text": label.get("statements"),  # the authors' name for JudgeLM's `text`
        "source": row.get("data_source"),
        "meta": _meta({"meta": row.get("meta")}) | {k: v for k, v in kept.items() if v is not None},
    }


def _texts_of_prompt(row: Row, where: str) -> Row:
    """Take a filled-in prompt apart, where that is possible in one way only."""
    prompt = conversation(_messages(row, "prompt", "user", where))
    for name in ("judgelrm_train", "judgelrm_eval"):
        first, last = (pattern.fullmatch(prompt) for pattern in _patterns(name))
        if first and last:
            if first.groupdict() != last.groupdict():
                raise Unusable("ambiguous_prompt")
            return first.groupdict()
    raise Unusable("unknown_prompt")


@functools.cache
def _patterns(template: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Match with every text as short, and as long, as it can be: equal if there is one way only."""
    pieces = re.split(r"\{(\w+)\}", PAIR_TEMPLATES[template])

    def pattern(some: str) -> re.Pattern[str]:
        texts = (f"(?P<{name}>{some})" for name in pieces[1::2])
        literals = map(re.escape, pieces[::2])
        zipped = itertools.zip_longest(literals, texts, fillvalue="")
        return re.compile("".join(itertools.chain.from_iterable(zipped)), re.DOTALL)

    return pattern(".*?"), pattern(".*")


def _from_trl(row: Row, where: str) -> Row:
    """Put the two answers into an order that their texts alone decide, not which one is better.

    The better one first would teach a lean to the first answer.
    """
    chosen, rejected = (_messages(row, name, "assistant", where) for name in ("chosen", "rejected"))
    turns = itertools.takewhile(lambda two: two[0] == two[1], zip(chosen, rejected, strict=False))
    shared = [turn for turn, _ in turns]
    while shared and shared[-1][0] != "user":
        shared.pop()
    question = conversation(_context(row, shared, where))
    texts = [conversation(answer[len(shared) :]) for answer in (chosen, rejected)]
    if not all(len(answer) > len(shared) for answer in (chosen, rejected)):
        raise Unusable("missing_text")
    if texts[0] == texts[1]:
        raise Unusable("same_answers")
    first, second = sorted((0, 1), key=texts.__getitem__)
    digest = hashlib.sha256(json.dumps([question, texts[first], texts[second]]).encode()).digest()
    if digest[0] % 2:
        first, second = second, first
    given = (row.get("score_chosen"), row.get("score_rejected"))
    return {
        **{"question": question, "answer_1": texts[first], "answer_2": texts[second]},
        **{"score_1": given[first], "score_2": given[second], "preference": 1 + first},
        **{"source": row.get("source"), "meta": row.get("meta")},
    }


def _context(row: Row, shared: Messages, where: str) -> Messages:
    """Return the turns before the answers: `prompt`, and those with which both answers begin."""
    key = "prompt" if row.get("prompt") is not None or "question" not in row else "question"
    if row.get(key) is None and shared:
        return shared
    prompt = _messages(row, key, "user", where)
    is_repeated = prompt in (shared[: len(prompt)], shared[-len(prompt) :])
    return shared if is_repeated else prompt + shared


def _messages(row: Row, name: str, role: str, where: str) -> Messages:
    """Read text, or a list of {role, content}, as messages."""
    if not isinstance(row.get(name), list):
        return [(role, _text(row, name, where))]
    messages = []
    for message in row[name]:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UsageError(
                f"{where}: '{name}' must be text or a list of {{role, content}}, got {message!r}."
            )
        messages.append((message["role"], _text(message, "content", f"{where}: '{name}'")))
    if not messages:
        raise UsageError(f"{where}: '{name}' is an empty list, wanted text or messages.")
    return messages


def conversation(messages: Messages) -> str:
    """Write messages as one text: a single one as it is, several under the names of their roles."""
    if len(messages) == 1:
        return messages[0][1]
    return "\n\n".join(f"{role.capitalize()}: {content}" for role, content in messages)
