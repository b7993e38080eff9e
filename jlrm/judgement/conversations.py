"""Conversations: lists of messages, texts that write them out, and one text for a judge to read."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Sequence
from typing import Any

from jlrm.config import UsageError
from jlrm.judgement.labels import Unusable
from jlrm.judgement.transcripts import ROLES, Messages, loosely_written, written


def context(value: Any, name: str, where: str) -> Messages:
    """Read the turns before an answer; a transcript ends with the name of who answers."""
    turns = written_turns(value) or messages(value, name, "user", where)
    return turns[:-1] if len(turns) > 1 and turns[-1] == ("assistant", "") else turns


def messages(value: Any, name: str, role: str, where: str) -> Messages:
    """Read messages as {role, content} or ShareGPT's {from, value}; a text is of one role.

    Raises:
      UsageError: neither, named.
      Unusable: no text, or a message without.
    """
    if isinstance(value, dict) and ("role" in value or "from" in value):
        value = [value]
    if not isinstance(value, list):
        return [(role, _text(value, f"{where}: '{name}'"))]
    if not value:
        raise UsageError(f"{where}: '{name}' is an empty list, wanted text or messages.")
    return [_message(each, name, where) for each in value]


def _message(message: Any, name: str, where: str) -> tuple[str, str]:
    fields = message if isinstance(message, dict) else {}
    who = fields.get("role", fields.get("from"))
    if not isinstance(who, str):
        raise UsageError(
            f"{where}: '{name}' must be text or a list of {{role, content}}, got {message!r}."
        )
    content = next((key for key in ("content", "value", "text") if key in fields), "content")
    parts = fields.get(content)
    if isinstance(parts, list):  # as the chat APIs have it: texts and pictures
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise Unusable("not_text")
        parts = "\n".join(map(str, texts))
    if calls := fields.get("tool_calls"):  # part of what is judged, often all of it
        parts = "\n".join(filter(None, (parts, json.dumps(calls, ensure_ascii=False))))
    return ROLES.get(who.lower(), who.lower()), _text(parts, f"{where}: '{name}': '{content}'")


def _text(value: Any, what: str) -> str:
    if value is None:
        raise Unusable("missing_text")
    if not isinstance(value, str):
        raise UsageError(f"{what} must be text, got {value!r}.")
    return value


def written_turns(value: Any, is_loose: bool = False) -> Messages:
    """Return the turns that a text writes out, as JSON, as Python or as a transcript; [] of others.

    is_loose: also in a form that an ordinary answer might have (judgement/transcripts.py).
    """
    if not isinstance(value, str):
        return []
    if listed := _listed(value):
        with contextlib.suppress(UsageError):
            return messages(listed, "", "", "")
    return loosely_written(value) if is_loose else written(value)


def _listed(text: str) -> Any:
    """Return the list of objects that a text holds; a spreadsheet of pandas has it as Python's."""
    if not re.match(r"\s*\[\s*\{", text):
        return []
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
        # An array of NumPy has line breaks for commas; those of texts are escaped.
        return ast.literal_eval(re.sub(r"\}\s*\n\s*\{", "}, {", text.strip()))
    return []


def talks_of_turns(asked: Any, answered: Sequence[Any]) -> list[list[dict[str, Any]]]:
    """Return conversations from lists of texts, which hold a turn each; [] of anything else.

    The lists, of the user's turns and of each side's answers to them, may be written out as JSON.
    That is how Kaggle hands out Chatbot Arena.
    """
    questions, *sides = map(_turn_texts, (asked, *answered))
    if not questions or any(len(side) != len(questions) for side in sides):
        return []
    return [
        [
            {"role": role, "content": text}
            for both in zip(questions, answers, strict=True)
            for role, text in zip(("user", "assistant"), both, strict=True)
        ]
        for answers in sides
    ]


def _turn_texts(value: Any) -> list[str | None]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    is_list = isinstance(value, list)
    return value if is_list and all(isinstance(text, str | None) for text in value) else []


def until(talk: Messages, turn: Any) -> Messages:
    """Return a conversation up to the answer of the turn that was judged, counted from 1.

    Rows of MT-Bench hold both turns, of which `turn` says which one the vote is on.
    """
    asked = [place for place, (role, _) in enumerate(talk) if role == "user"]
    is_number = isinstance(turn, (int, str)) and str(turn).isdecimal() and int(turn) > 0
    return talk[: asked[int(turn)]] if is_number and int(turn) < len(asked) else talk


def conversation(messages: Messages) -> str:
    """Write messages as one text: a single one as it is, several under the names of their roles."""
    if len(messages) == 1:
        return messages[0][1]
    return "\n\n".join(f"{role.capitalize()}: {content}" for role, content in messages)
