"""Conversations: lists of messages, texts that write them out, and one text for a judge to read."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

from jlrm.config import UsageError
from jlrm.judgement.labels import Unusable

Messages = list[tuple[str, str]]  # (role, text)

ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT and of transcripts


def context(value: Any, name: str, where: str) -> Messages:
    """Read the turns before an answer; a transcript ends with the name of who answers."""
    turns = written_turns(value) or messages(value, name, "user", where)
    return turns[:-1] if len(turns) > 1 and turns[-1] == ("assistant", "") else turns


def messages(value: Any, name: str, role: str, where: str) -> Messages:
    """Read a list of {role, content}, or of ShareGPT's {from, value}; a text is of one role.

    Raises:
      UsageError: neither, named.
      Unusable: no text, or a message without.
    """
    if not isinstance(value, list):
        return [(role, _text(value, f"{where}: '{name}'"))]
    if not value:
        raise UsageError(f"{where}: '{name}' is an empty list, wanted text or messages.")
    return [_message(each, name, where) for each in value]


def _message(message: Any, name: str, where: str) -> tuple[str, str]:
    fields = message if isinstance(message, dict) else {}
    role, content = ("from", "value") if "from" in fields else ("role", "content")
    who, parts = fields.get(role), fields.get(content)
    if not isinstance(who, str):
        raise UsageError(
            f"{where}: '{name}' must be text or a list of {{role, content}}, got {message!r}."
        )
    if isinstance(parts, list):  # as the chat APIs have it: texts and pictures
        texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise Unusable("not_text")
        parts = "\n".join(map(str, texts))
    return ROLES.get(who.lower(), who.lower()), _text(parts, f"{where}: '{name}': '{content}'")


def _text(value: Any, what: str) -> str:
    if value is None:
        raise Unusable("missing_text")
    if not isinstance(value, str):
        raise UsageError(f"{what} must be text, got {value!r}.")
    return value


def written_turns(value: Any) -> Messages:
    """Return the turns that a text writes out, as JSON or as a transcript; [] of any other."""
    if not isinstance(value, str):
        return []
    if re.match(r"\s*\[\s*\{", value):
        with contextlib.suppress(ValueError, RecursionError, UsageError):
            return messages(json.loads(value), "", "", "")
    if not re.match(r"\s*(?:Human|User|System):", value):
        return []
    is_apart = re.search(r"\n\r?\n\s*Assistant:", value)
    gap = r"(?:\r?\n){2}" if is_apart or "\nAssistant:" not in value else r"\r?\n"
    _, *pieces = re.split(rf"(?:\A|{gap})\s*(Human|User|Assistant|System): ?", value)
    roles = [ROLES.get(role.lower(), role.lower()) for role in pieces[::2]]
    is_transcript = "assistant" in roles or value.startswith("\n\nHuman:")
    texts = map(str.strip, pieces[1::2])
    return list(zip(roles, texts, strict=True)) if is_transcript else []


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
