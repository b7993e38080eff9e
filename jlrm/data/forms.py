"""The forms that a row of comparisons comes in, told apart by its keys, and what a row must hold.

`in_our_form` translates a row's own keys into ours: JudgeLM-100K's, verl's (a filled-in judge
prompt with its ground truth), TRL's (prompt, chosen, rejected), and two whole conversations. What
has no meaning here stays as it is, and goes to `Comparison.meta`. The checks stand in one place,
`comparison`: a wrong type stops the reading with its place, an unusable value drops the row.

Left out: what labels and scores look like (judgement/labels.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from jlrm.config import UsageError
from jlrm.data.comparisons import AnswerList, Comparison, Where, listed
from jlrm.judgement import labels
from jlrm.judgement.conversations import (
    Messages,
    context,
    conversation,
    messages,
    talks_of_turns,
    until,
    written_turns,
)
from jlrm.judgement.labels import Unusable
from jlrm.judgement.prompts import MOST_LISTED, PAIR_TEMPLATES, split_judgelm_text
from jlrm.judgement.transcripts import without_end

Row = dict[str, Any]
C = TypeVar("C", bound=Comparison)

# Our names, and JudgeLM-100K's.
TEXTS = {"question": "question_body", "answer_1": "answer1_body", "answer_2": "answer2_body"}
ANSWERS = ("answer_1", "answer_2")
QUESTIONS = ("question", "prompt", "instruction")  # the first that a row has
TRL_QUESTIONS = ("prompt", "question", "instruction")
IDS = ("id", "review_id", "question_id")  # the first that a row has
SCORES = ("score_1", "score_2")
TRL = ("chosen", "rejected", "score_chosen", "score_rejected")
LIST = ("answers", "scores", "ranking")
RENAMABLE = (*TEXTS, *SCORES, "preference", "id", "source", "score", "text", "prompt", *TRL, *LIST)
SPELLED = {*QUESTIONS, *ANSWERS, *SCORES, *TRL, "score", "preference", "winner"}
# What is read into a field of its own; "reasoning" is in `meta`, but has a meaning there.
OURS = {*TEXTS, *SCORES, "score", "preference", "source", "text", "meta"}


def comparison(
    row: Row,
    identity: str,
    place: Where,
    known: Mapping[str, int],
    needs_label: bool = True,
) -> Comparison:
    """Check a row in our form: a wrong type stops the reading, an unusable value drops the row.

    known: what labels mean, of `labels.meanings`.
    needs_label: a row with neither scores nor a preference is dropped; one score alone always is.
    """
    where = str(place)
    texts = {name: _text(row, name, where) for name in TEXTS}
    first, second = _scores(row, where)
    pair = None if first is None or second is None else (first, second)
    source = row.get("source")
    comparison = Comparison(
        id=identity,
        question=texts["question"],
        answer_1=texts["answer_1"],
        answer_2=texts["answer_2"],
        score_1=pair[0] if pair else None,
        score_2=pair[1] if pair else None,
        preference=labels.preference(row.get("preference"), known, where),
        source="" if source is None else str(source),
        meta=_meta(row),
        where=place,
    )
    if pair is None and comparison.preference is None:
        if first is not None or second is not None:
            raise Unusable("one_score")
        if needs_label:
            raise Unusable("no_label")
    conflicts = pair and comparison.label != dataclasses.replace(comparison, preference=None).label
    if pair and _is_failed(*pair) and (conflicts or comparison.preference is None):
        raise Unusable("failed_review")
    if conflicts:
        raise Unusable("conflicting_label")
    return _writable_row(comparison)


def answer_list(row: Row, identity: str, place: Where, known: Mapping[str, int]) -> AnswerList:
    """Check a row that has a list of answers, as `comparison` does; `known` is of pairs alone."""
    where, answers = str(place), row.get("answers")
    if not isinstance(answers, list) or not 2 <= len(answers) <= MOST_LISTED:
        got = f"{len(answers)}" if isinstance(answers, list) else f"{answers!r:.60}"
        raise UsageError(
            f"{where}: data.judging=lists reads 'answers', 2 to {MOST_LISTED} texts, got {got}."
        )
    texts = [_text({"answers": each}, "answers", where) for each in answers]
    golds, is_ranked = labels.golds(row.get("scores"), row.get("ranking"), len(texts), where)
    read = AnswerList(
        id=identity,
        question=_text(row, "question", where),
        answer_1=texts[0],
        answer_2=texts[1],
        rest=tuple(texts[2:]),
        golds=golds,
        is_ranked=is_ranked,
        source=str(row.get("source") or ""),
        meta=_meta(_without(row, *LIST)),
        where=place,
    )
    return _writable_row(read)


def _writable_row(row: C) -> C:
    try:
        json.dumps(vars(row), ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):  # half a surrogate pair, or nested too deep
        raise Unusable("unwritable") from None
    return row


def _text(row: Row, name: str, where: str) -> str:
    if name not in row and "answers" in row:
        raise UsageError(f"{where} has a list of answers, which data.judging=lists reads.")
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


def _scores(row: Row, where: str) -> tuple[float | None, float | None]:
    pair: Any = row.get("score")
    if pair is None:
        pair = [row.get(name) for name in SCORES]
    return labels.scores(pair, where)


def _is_failed(*scores: float) -> bool:
    """Return whether JudgeLM marks a review that could not be read; rewards may be -1 too."""
    return -1 in scores and all(score == -1 or score >= 0 for score in scores)


def _meta(row: Row) -> Row:
    """Return what else a row tells; flat formats hold it as the text of a JSON object."""
    meta = row.get("meta")
    if isinstance(meta, str) and meta.lstrip().startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):  # text after all
            meta = json.loads(meta)
    meta = {} if meta is None else meta if isinstance(meta, dict) else {"meta": meta}
    own = {name: value for name, value in row.items() if name not in OURS}
    if own:
        meta = {**meta, **_writable(own)}
    if isinstance(row.get("text"), str):
        meta = {**meta, "reasoning": split_judgelm_text(row["text"])}
    return meta


def _writable(columns: Row) -> Row:
    """Return columns with "?" for what UTF-8 can't hold: bytes in one cost no row."""
    with contextlib.suppress(RecursionError):
        text = json.dumps(columns, ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError:
            return json.loads(text.encode(errors="replace"))
    return columns


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
    """Return the row with our names for headers such as `Question` and `Response A`.

    A name is changed only if the row lacks it in our spelling and one header alone can be meant.
    """
    names = _spellings(tuple(row))
    return {names.get(key, key): value for key, value in row.items()} if names else row


@functools.lru_cache(maxsize=1024)
def _spellings(keys: tuple[str, ...]) -> dict[str, str]:
    """Return our names by the headers that mean them."""
    meant: dict[str, list[str]] = {}
    for key in keys:
        meant.setdefault(our_spelling(key), []).append(key)
    only = {theirs[0]: ours for ours, theirs in meant.items() if len(theirs) == 1}
    return {theirs: ours for theirs, ours in only.items() if ours in SPELLED and theirs != ours}


def our_spelling(header: str) -> str:
    """Return e.g. "answer_1" for `Answer 1`, `answer1`, `Response A` and `conversation_a`."""
    words = re.sub(r"[\s_-]+", "_", str(header).strip().lower())
    words = re.sub(r"^(chosen|rejected)_(?:score|rating|reward)$", r"score_\1", words)
    words = re.sub(r"^(?:rating|reward)_(chosen|rejected)$", r"score_\1", words)
    number = {"a": "1", "b": "2"}
    if match := re.fullmatch(
        r"(answer|response|output|completion|conversation|messages)_?([12ab])", words
    ):
        return f"answer_{number.get(match[2], match[2])}"
    if match := re.fullmatch(r"(score|rating|reward)_?([12ab])", words):
        return f"score_{number.get(match[2], match[2])}"
    return words


def there_are(names: Collection[str]) -> str:
    return f"There are: {listed(names)}." if names else "There are none."


# ----------------------------------------------------------------------------------- forms of rows


def in_our_form(row: Row, scores: str, where: str) -> Row:
    """Return a row with our names for what has a meaning, and its other columns as they are."""
    if "reward_model" in row:
        return _from_verl(row, where)
    if "chosen" in row and "rejected" in row:
        return _from_trl(row, where)
    if any(name in row for name in TEXTS.values()):
        return _from_judgelm(row, scores)
    if any(name in row for name in ANSWERS):
        return _from_pair(row, where)
    return row


def _from_judgelm(row: Row, scores: str) -> Row:
    text = "text" if scores == "score" else "text_w_reference"
    lacks = row.get(scores) is None and row.get("preference") is None
    if scores != "score" and lacks:
        raise Unusable("no_scores")
    ours = {name: row[theirs] for name, theirs in TEXTS.items() if theirs in row}
    rest = _without(row, *TEXTS.values(), "score_w_reference", "text_w_reference")
    return ours | rest | {"score": row.get(scores), "text": row.get(text)}


def _without(row: Row, *names: str) -> Row:
    return {key: value for key, value in row.items() if key not in names}


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
        **_without(row, *OURS, "reward_model", "data_source", "prompt", "extra_info"),
        **{name: texts[name] for name in TEXTS},
        **{name: label[name] for name in known if name in label},
        **({"score": label["solution_text_format"]} if "solution_text_format" in label else {}),
        "text": label.get("statements"),  # the authors' name for JudgeLM's `text`
        "source": row.get("data_source"),
        "meta": _meta({"meta": row.get("meta")}) | {k: v for k, v in kept.items() if v is not None},
    }


def _texts_of_prompt(row: Row, where: str) -> Row:
    """Take a filled-in prompt apart, where that is possible in one way only."""
    if "prompt" not in row:
        _text(row, "prompt", where)
    prompt = conversation(messages(row["prompt"], "prompt", "user", where))
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
    question, texts = _taken_apart(row, TRL[:2], where)
    if texts[0] == texts[1]:
        raise Unusable("same_answers")
    first, second = sorted((0, 1), key=texts.__getitem__)
    digest = hashlib.sha256(json.dumps([question, texts[first], texts[second]]).encode()).digest()
    if digest[0] % 2:
        first, second = second, first
    given = [row.get(name) for name in TRL[2:]]
    return {
        **_without(row, *TRL, *OURS, *_columns_of_question(row, TRL_QUESTIONS)),
        **{"question": question, "answer_1": texts[first], "answer_2": texts[second]},
        **{"score_1": given[first], "score_2": given[second]},
        "preference": labels.WORDS[first + 1],
        **{"source": row.get("source"), "meta": row.get("meta")},
    }


def _from_pair(row: Row, where: str) -> Row:
    """Find the question of two answers: under another name, or at the head of two conversations."""
    if not all(name in row for name in ANSWERS):
        return row  # `comparison` says what is missing
    row = _with_turns(row)
    is_text = not any(isinstance(row[name], list | dict) and row[name] for name in ANSWERS)
    if is_text and isinstance(row.get("question"), str):
        return row
    has_question = any(row.get(name) is not None for name in QUESTIONS)
    if is_text and not has_question and not all(written_turns(row[name], True) for name in ANSWERS):
        return row
    question, texts = _taken_apart(row, ANSWERS, where)
    rest = _without(row, *_columns_of_question(row, QUESTIONS))
    return rest | {"question": question} | dict(zip(ANSWERS, texts, strict=True))


def _with_turns(row: Row) -> Row:
    """Return a row with two conversations where it holds three lists of their turns."""
    name = next((name for name in QUESTIONS if row.get(name) is not None), "")
    talks = talks_of_turns(row.get(name), [row[side] for side in ANSWERS])
    return _without(row, name) | dict(zip(ANSWERS, talks, strict=True)) if talks else row


def _columns_of_question(row: Row, names: Iterable[str]) -> list[str]:
    """Return the first column that holds the question; Alpaca's instructions may have an input."""
    there = [name for name in names if name in row]
    name = next((name for name in there if row[name] is not None), next(iter(there), "prompt"))
    is_alpaca = name == "instruction" and isinstance(row.get(name), str)
    has_input = is_alpaca and isinstance(row.get("input"), str)
    return [name, "input"] if has_input else [name]


def _taken_apart(row: Row, sides: Sequence[str], where: str) -> tuple[str, list[str]]:
    """Return the question and both answers, of texts, conversations or transcripts of these.

    The question is the prompt, and the turns with which both sides begin, up to the last one of the
    user that they share. The rest of each side is its answer.
    """
    columns = _columns_of_question(row, QUESTIONS if sides == ANSWERS else TRL_QUESTIONS)
    given = row.get(columns[0])
    if given is not None and len(columns) > 1:
        given = "\n\n".join(text for text in map(row.get, columns) if text)
    prompt = [] if given is None else context(given, columns[0], where)
    talks = _talks(row, sides, prompt, where)
    turns = itertools.takewhile(lambda two: two[0] == two[1], zip(*talks, strict=False))
    shared = [turn for turn, _ in turns]
    while shared and shared[-1][0] != "user":
        shared.pop()
    if not prompt and not shared:
        if all(len(talk) > 1 for talk in talks):
            raise Unusable("no_question")
        _text(row, columns[0], where)
    if not all(len(talk) > len(shared) for talk in talks):
        raise Unusable("missing_text")
    is_repeated = _begins(shared, prompt) or _begins(shared[-len(prompt) :], prompt)
    question = shared if is_repeated else prompt + shared
    texts = [conversation(talk[len(shared) :]) for talk in talks]
    if written_turns(given):  # whose last line, "Assistant:", the answers go on after a space
        texts = [without_end(text.removeprefix(" ")) for text in texts]
    return conversation(question), texts


def _talks(row: Row, sides: Sequence[str], prompt: Messages, where: str) -> list[Messages]:
    """Return the messages of both sides, both with or both without the prompt's at their head."""
    written = [written_turns(row[side], is_loose=not prompt) for side in sides]
    is_json = all(str(row[side]).lstrip().startswith("[") for side in sides)
    are_answered = all(turns and turns[-1][0] != "user" for turns in written)
    # A transcript that does not begin as the prompt does is an answer that writes a dialogue.
    is_whole = all(written) if not prompt else is_json and are_answered
    talks = [
        turns
        if turns and (is_whole or (prompt and _begins(turns, prompt)))
        else messages(row[side], side, "assistant", where)
        for side, turns in zip(sides, written, strict=True)
    ]
    has_prompt = [bool(prompt) and _begins(talk, prompt) for talk in talks]
    if any(has_prompt) and not all(has_prompt):  # else the prompt would tell the two apart
        talks = [
            talk[len(prompt) :] if has else talk
            for talk, has in zip(talks, has_prompt, strict=True)
        ]
    return [until(talk, row.get("turn")) for talk in talks] if sides == ANSWERS else talks


def _begins(turns: Messages, head: Messages) -> bool:
    """Return whether a conversation begins with these turns, but for white space around them."""
    both = zip(turns, head, strict=False)
    same = all(one[0] == two[0] and one[1].strip() == two[1].strip() for one, two in both)
    return same and len(turns) >= len(head)
