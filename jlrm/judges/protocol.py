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
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jlrm.evaluation.games import Game, Response
from jlrm.judges import complaints

Ending = Literal["stop", "length", "refused", "unfinished"]

# The words of servers, as `_letters` gives them. A call of a tool ends a text as well: none was
# offered. A regular end must be known by its whole word; limits and refusals have too many names.
STOP = {
    *("stop", "stopsequence", "stoptoken", "stopword", "end", "endturn", "endoftext", "imend"),
    *("eos", "eostoken", "eosfound", "eot", "done", "complete", "completed", "finished", "normal"),
    *("toolcall", "toolcalls", "tooluse", "functioncall"),
}
LENGTH = re.compile(
    r"length|tokens?limit|max(new|output|completion|predicted)?(token|len)|maxoutput"
    r"|contextwindow|^(error)?limit$"
)
REFUSED = re.compile(
    r"filter|refus|safety|moderat|guardrail|prohibited|sensitive|blocklist|toxic"
    r"|recitation|spii|flagged"
)
MOST_TOKENS = 10**9  # that a reply can have used; what says more has counted wrongly

# Fields of a message that hold what was thought, of vLLM, SGLang, OpenRouter, LiteLLM and Ollama.
REASONING = ("reasoning_content", "reasoning", "reasoning_details", "thinking_blocks", "thinking")

_SURROGATE = re.compile("[\ud800-\udfff]")
_THINKING = re.compile("thinking|reasoning|thought")
_EVENT = re.compile(rb"\s*(data|event|id|retry|):")  # how server-sent events begin


def _letters(word: str) -> str:
    """Return a server's word in one spelling: "maxtokens" of "FinishReason.MAX_TOKENS".

    What follows a colon is a detail: "content_filter: RECITATION".
    """
    letters = re.sub(r"[^a-z]", "", word.lower().partition(":")[0])
    return letters.removeprefix("finishreason").removeprefix("stopreason").removeprefix("reason")


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
        word = _letters(self.finish_reason or "")
        if REFUSED.search(word):
            return "refused"
        if LENGTH.search(word):
            return "length"
        is_regular = word in STOP or self.finish_reason is None
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
    """A body that holds no judgement. `status`: of HTTP, where an error in the body names one."""

    def __init__(self, reason: str, status: int = 0) -> None:
        super().__init__(reason)
        self.status = status


def read(body: bytes, seconds: float) -> Reply:
    """Read the body of /completions or /chat/completions.

    An error beside a choice, as gateways send it, ends the text as "error"; a refusal in the place
    of the content ends it as "refusal". Events, though none were asked for, are joined.

    Raises:
      Unreadable: no JSON, no choice, or no text in it.
    """
    try:
        content = _joined(body) if _EVENT.match(body) else json.loads(body)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise Unreadable(f"no JSON: {complaints.read(body[:1000]).message}") from None
    try:
        return read_object(content, seconds)
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError):
        text = body[:1000].decode(errors="replace")
        complaint = complaints.of_object(content, text)
        raise Unreadable(f"no judgement in it: {complaint.message}", complaint.status) from None


def read_object(content: Any, seconds: float) -> Reply:
    """Read a body that is parsed.

    Raises:
      KeyError, IndexError, TypeError, AttributeError, RecursionError: it is no reply.
    """
    if word := _blocked(content):
        return Reply("", word, None, None, seconds)
    choice = content["choices"][0]
    text, reason = _text(choice), choice.get("finish_reason")
    if error := _error(choice) or _error(content):
        complaint = complaints.of_object({"error": error}, str(error))
        text = complaint.message
        reason = (
            "refusal" if complaints.is_filtered(complaint.status or 400, complaint) else "error"
        )
    elif _is_refusal(choice):
        reason = "refusal"
    reason = None if reason is None else _SURROGATE.sub("\ufffd", str(reason))
    return Reply(_SURROGATE.sub("\ufffd", text), reason, *_usage(content), seconds)


def _blocked(content: Any) -> str:
    """Return why Gemini's filter has let no candidate through; else ""."""
    if content.get("choices"):
        return ""
    feedback = content.get("prompt_feedback") or content.get("promptFeedback") or {}
    reason = feedback.get("block_reason") or feedback.get("blockReason")
    return f"content_filter: {reason}" if reason else ""


def _error(holder: Any) -> Any:
    """Return an error that says anything: some servers always send the field."""
    error = holder.get("error")
    return error if not isinstance(error, dict) or any(error.values()) else None


def _usage(content: Any) -> tuple[int | None, int | None]:
    """Return the tokens of the prompt and those generated.

    Some servers leave the reasoning out of `completion_tokens`, and bill by `total_tokens`.
    """
    usage = content.get("usage")
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    told = (usage.get(name) for name in names) if isinstance(usage, dict) else (None, None, None)
    num_prompt, num_generated, total = map(count, told)
    if num_prompt is not None and num_generated is not None and total is not None:
        num_generated = max(num_generated, total - num_prompt)
    return num_prompt, num_generated


def _joined(body: bytes) -> dict[str, Any]:
    """Return what server-sent events come to, in the form of a reply that is sent whole.

    Raises:
      ValueError, KeyError, TypeError, AttributeError: they are no events of a reply.
    """
    whole: dict[str, Any] = {}
    choice: dict[str, Any] = {"message": {}, "finish_reason": "a stream that broke off"}
    for line in body.splitlines():
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or not data:
            continue
        if data == b"[DONE]":
            if choice["finish_reason"] == "a stream that broke off":
                choice["finish_reason"] = None
            break
        event = json.loads(data)
        whole |= {name: event[name] for name in ("usage", "error") if event.get(name)}
        for piece in (event.get("choices") or ())[:1]:
            _extend(choice["message"], piece.get("delta") or piece.get("message") or {})
            _extend(choice, {"text": piece.get("text")})
            choice["finish_reason"] = piece.get("finish_reason") or choice["finish_reason"]
    return {**whole, "choices": [choice]}


def _extend(message: dict[str, Any], delta: Mapping[str, Any]) -> None:
    for name, value in delta.items():
        if isinstance(value, str | list) and isinstance(value, type(message.get(name, value))):
            message[name] = message[name] + value if name in message else value


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
        raise ValueError("a field has the wrong type")
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
    message = choice.get("message")
    if not message:
        # Of what is filtered or cut off at once, some servers send nothing but the reason.
        is_ended = choice.get("finish_reason") and choice.get("text") is None
        return "" if is_ended else _text_itself(choice["text"])
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
      TypeError: it is something else.
    """
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, list | dict):
        return "".join(_said(part) for part in _parts(message) if not _is_thinking(part))
    return _text_itself(content)


def _parts(message: Any) -> list[Any]:
    """Return the parts of a content that has any."""
    content = message.get("content")
    if isinstance(content, dict):
        return [content]
    return content if isinstance(content, list) else []


def _text_itself(value: Any) -> str:
    """Return a value that must be text. Raises TypeError for others."""
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def _reasoning(message: Any) -> str:
    for name in REASONING:
        if text := _said(message.get(name)):
            return text
    return "".join(_said(part) for part in _parts(message) if _is_thinking(part))


def _is_thinking(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    kind = part.get("type")
    return part.get("thought") is True or (isinstance(kind, str) and bool(_THINKING.search(kind)))


def _said(part: Any) -> str:
    """Return the text of a part, which may be made of parts itself."""
    if isinstance(part, str):
        return part
    if isinstance(part, list):
        return "".join(_said(each) for each in part)
    names = ("text", "thinking", "reasoning", "content", "summary", "parts", "value")
    values = (part.get(name) for name in names) if isinstance(part, dict) else ()
    return next((_said(value) for value in values if value), "")


def _is_refusal(choice: Any) -> bool:
    message = choice.get("message")
    return message is not None and bool(_refusal(message)) and not _content(message).strip()


def _refusal(message: Any) -> str:
    holders = [message, *_parts(message)]
    texts = (each.get("refusal") for each in holders if isinstance(each, dict))
    return next((text for text in texts if text and isinstance(text, str)), "")


def _total(counts: Sequence[int | None]) -> int | None:
    known = [number for number in counts if number is not None]
    return sum(known) if len(known) == len(counts) else None
