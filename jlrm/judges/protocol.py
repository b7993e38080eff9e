"""What OpenAI-compatible servers reply: judgements, how they ended, and what they used.

A text is what follows the prompt's `<think>`, which a chat prompt cannot open for the model: a
`<think>` that the model begins with is taken off, and where the server has cut the reasoning out of
the content (`reasoning_content`, `reasoning`, parts of thinking) it is put before it, with
`</think>` between. Where there is no content, what was filed as reasoning is all that was written.

`finish_reason` decides what a reply is worth. A judgement that came to its end, or to the limit of
tokens, is a response; content that was refused is recorded as such; everything else was not
finished, says nothing about the judge, and is asked again.

Nothing here trusts a server to send what it should: what is not of the right form raises
`Unreadable`, and everything else comes out as text that can be written to a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from jlrm.evaluation.games import Game, Response
from jlrm.judges import complaints

Ending = Literal["stop", "length", "refused", "unfinished"]

# The words of servers, in lower case. A call of a tool ends a text as well: none was offered.
STOP = {
    *("stop", "eos", "eos_token", "end_turn", "stop_sequence", "stop_token", "end", "done"),
    *("complete", "completed", "finished", "tool_calls", "tool_call", "tool_use", "function_call"),
}
LENGTH = {
    *("length", "max_tokens", "max_output_tokens", "max_completion_tokens", "max_length"),
    *("model_length", "model_context_window_exceeded", "token_limit"),
}
REFUSED = {
    *("content_filter", "content_filtered", "content_filter_error", "refusal", "safety"),
    *("recitation", "prohibited_content", "blocklist", "spii", "sensitive"),
    *("guardrail_intervened", "error_toxic"),
}
MOST_TOKENS = 10**9  # that a reply can have used; what says more has counted wrongly

_SURROGATE = re.compile("[\ud800-\udfff]")


class Reply(NamedTuple):
    """What is kept of a server's reply."""

    text: str  # what follows the prompt's `<think>`; of a reply that failed, what is said of it
    finish_reason: str | None  # the server's word for it
    prompt_tokens: int | None  # None: the server did not say
    num_tokens: int | None
    seconds: float  # that the request took

    @property
    def ending(self) -> Ending:
        """What became of the text."""
        reason = (self.finish_reason or "").lower()
        if reason in REFUSED:
            return "refused"
        if reason in LENGTH:
            return "length"
        is_regular = reason in STOP or self.finish_reason is None
        return "stop" if is_regular and self.text.strip() else "unfinished"

    @property
    def is_finished(self) -> bool:
        """Whether the text is a response."""
        return self.ending in ("stop", "length")


class NoReply(NamedTuple):
    """Why a vote has no text. `is_refused`: because of what is in the texts to be judged."""

    reason: str
    is_refused: bool = False


class Unreadable(Exception):
    """A body that holds no judgement."""


def read(body: bytes, seconds: float) -> Reply:
    """Read the body of /completions or /chat/completions.

    An error beside a choice, as gateways send it, ends the text as "error"; a refusal that stands
    in the place of the content ends it as "refusal".

    Raises:
      Unreadable: no JSON, no choice, or no text in it.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise Unreadable(f"no JSON: {body[:1000].decode(errors='replace')}") from None
    try:
        return read_object(content, seconds)
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError):
        text = body[:1000].decode(errors="replace")
        message = complaints.of_object(content, text).message
        raise Unreadable(f"no judgement in it: {message}") from None


def read_object(content: Any, seconds: float) -> Reply:
    """Read a body that is parsed.

    Raises:
      KeyError, IndexError, TypeError, AttributeError, RecursionError: it is no reply.
    """
    choice = content["choices"][0]
    text, reason = _text(choice), choice.get("finish_reason")
    if error := choice.get("error") or content.get("error"):
        text, reason = complaints.of_object({"error": error}, str(error)).message, "error"
    usage = content.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Reply(
        _SURROGATE.sub("\ufffd", text),
        "refusal" if _is_refusal(choice) else None if reason is None else str(reason),
        count(usage.get("prompt_tokens")),
        count(usage.get("completion_tokens")),
        seconds,
    )


def stored(row: Any) -> Reply:
    """Return a reply from its row in a file.

    Raises:
      TypeError, ValueError: it is none.
    """
    reply = Reply(**row)
    is_text = isinstance(reply.text, str) and isinstance(reply.finish_reason, str | None)
    counts = (reply.prompt_tokens, reply.num_tokens)
    are_counts = all(number is None or count(number) is not None for number in counts)
    is_time = isinstance(reply.seconds, int | float) and 0 <= reply.seconds < 1e9
    if not (is_text and are_counts and is_time):
        raise ValueError("a field of it has not its type")
    return reply


def count(value: Any) -> int | None:
    """Return a number of tokens, or None if the value can't be one."""
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return value if is_count and 0 <= value <= MOST_TOKENS else None


def response(game: Game, results: Sequence[Reply | NoReply | None]) -> Response:
    """Return a game's response; tokens and seconds are sums over its votes."""
    lacking = [result for result in results if isinstance(result, NoReply)]
    given = [result for result in results if isinstance(result, Reply)]
    if errors := [each.reason for each in lacking if not each.is_refused]:
        return Response(game.id, error=errors[0])
    if lacking:
        return Response(game.id, refused=lacking[0].reason)
    return Response(
        game.id,
        texts=tuple(reply.text for reply in given),
        endings=_endings(given),
        prompt_tokens=_total([reply.prompt_tokens for reply in given]),
        num_tokens=_total([reply.num_tokens for reply in given]),
        seconds=sum(reply.seconds for reply in given),
    )


def _endings(replies: Sequence[Reply]) -> tuple[str, ...] | None:
    if all(reply.finish_reason is None for reply in replies):
        return None
    return tuple(reply.ending for reply in replies)


def _text(choice: Any) -> str:
    """Return a choice's text as a continuation of `<think>`.

    Reasoning that was cut short is left open, so that it is read as a judgement that was cut.
    """
    if "message" not in choice:
        return _text_itself(choice["text"])
    message = choice["message"]
    content, reasoning = _content(message), _reasoning(message)
    if content.lstrip().startswith("<think>"):
        content = content.lstrip().removeprefix("<think>")
    if not content.strip():
        return reasoning or _refusal(message) or content
    if not reasoning:
        return content
    # A model that was told to write `</think>` may do so besides what its server took out.
    return reasoning + ("" if "</think>" in content else "</think>") + content


def _content(message: Any) -> str:
    """Return what was written as content: text, or the texts among its parts.

    Raises:
      KeyError, TypeError: there is none, and nothing in its place.
    """
    content = message.get("content")
    if content is None and (_reasoning(message) or _refusal(message)):
        return ""
    if isinstance(content, list):
        return "".join(_said(part) for part in content if not _is_thinking(part))
    return _text_itself(content)


def _text_itself(value: Any) -> str:
    """Return a value that must be text. Raises TypeError for others."""
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def _reasoning(message: Any) -> str:
    for name in ("reasoning_content", "reasoning"):
        if isinstance(value := message.get(name), str | list) and (text := _said(value)):
            return text
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    return "".join(_said(part) for part in parts if _is_thinking(part))


def _is_thinking(part: Any) -> bool:
    kind = part.get("type") if isinstance(part, dict) else ""
    return isinstance(kind, str) and ("thinking" in kind or "reasoning" in kind)


def _said(part: Any) -> str:
    """Return the text of a part, which may be made of parts itself."""
    if isinstance(part, str):
        return part
    if isinstance(part, list):
        return "".join(_said(each) for each in part)
    names = ("text", "thinking", "reasoning", "content", "summary")
    values = (part.get(name) for name in names) if isinstance(part, dict) else ()
    return next((_said(value) for value in values if value), "")


def _is_refusal(choice: Any) -> bool:
    message = choice.get("message")
    return message is not None and bool(_refusal(message)) and not _content(message).strip()


def _refusal(message: Any) -> str:
    parts = message.get("content")
    refusals = [message, *(parts if isinstance(parts, list) else [])]
    texts = (each.get("refusal") for each in refusals if isinstance(each, dict))
    return next((text for text in texts if text and isinstance(text, str)), "")


def _total(counts: Sequence[int | None]) -> int | None:
    known = [number for number in counts if number is not None]
    return sum(known) if len(known) == len(counts) else None
