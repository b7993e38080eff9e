"""What is sent to OpenAI-compatible servers and what they send: prompts, judgements, errors.

Prompts. `jlrm` goes to /chat/completions as a system and a user message. The raw templates
(`prompts.PAIR_TEMPLATES`) go to /completions byte for byte: they are text with ChatML's control
tokens in it, for servers of the judges that were trained on them, and any other model would read
the tokens as text. The server turns control tokens into ids wherever they stand, in the answers to
be judged too; `neutral` breaks those of Qwen's tokenizers there, and the tags of judgements.

Responses are what follows the prompt's `<think>`, which a chat prompt cannot open for the model: a
`<think>` that the model begins with is taken off, and where the server has cut the reasoning out of
the content (`reasoning_content`, `reasoning`) it is put before it, with `</think>` between.

Nothing here trusts a server to send what it should: what is not of the right form raises
`Unreadable`, and everything else comes out as text that can be written to a file.
"""

from __future__ import annotations

import datetime
import email.utils
import json
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from jlrm.evaluation.games import Game, Response
from jlrm.judgement import prompts

# The added tokens of Qwen2.5 and Qwen3, and the tags that our parser reads.
CONTROL_TOKENS = frozenset(
    f"<|{name}|>"
    for name in (
        *("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start"),
        *("box_end", "quad_start", "quad_end", "vision_start", "vision_end", "vision_pad"),
        *("image_pad", "video_pad", "fim_prefix", "fim_middle", "fim_suffix", "fim_pad"),
        *("repo_name", "file_sep"),
    )
) | {
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *prompts.THINK_TAGS,
}

_SURROGATE = re.compile("[\ud800-\udfff]")


class Template(NamedTuple):
    """A prompt's text: raw, or a user message with a system message before it."""

    system: str | None
    text: str
    quote: Callable[[str], str]  # how the texts to be judged are written into it

    @classmethod
    def of(cls, name: str, scale: tuple[int, int], neutral: bool) -> Template:
        quote = partial(prompts.quote, name=name, control_tokens=CONTROL_TOKENS)
        if not neutral:
            quote = partial(prompts.neutralise, control_tokens=())
        if name in prompts.PAIR_TEMPLATES:
            return cls(None, prompts.PAIR_TEMPLATES[name], quote)
        return cls(*prompts.messages(name, *scale), quote)

    def fill(self, game: Game) -> dict[str, Any]:
        """Return the part of a request's body that holds the prompt."""
        item = game.item
        text = prompts.fill(
            self.text,
            question=self.quote(item.question),
            answer_1=self.quote(item.answers[game.first]),
            answer_2=self.quote(item.answers[game.second]),
        )
        if self.system is None:
            return {"prompt": text}
        roles = {"system": self.system, "user": text}
        return {"messages": [{"role": role, "content": text} for role, text in roles.items()]}


class Reply(NamedTuple):
    """What is kept of a server's reply."""

    text: str  # what follows the prompt's `<think>`
    finish_reason: str | None  # the server's word for it
    prompt_tokens: int | None  # None: the server did not say
    num_tokens: int | None
    seconds: float  # that the request took


class Unreadable(Exception):
    """A body that holds no judgement."""


class Complaint(NamedTuple):
    """A server's error."""

    message: str
    code: str  # or its type; "" where it has none


def read(body: bytes, seconds: float) -> Reply:
    """Read the body of /completions or /chat/completions.

    Raises:
      Unreadable: no JSON, no choice, or no text in it.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise Unreadable(f"no JSON: {body.decode(errors='replace')}") from None
    try:
        choice = content["choices"][0]
        text = _chat_text(choice) if "message" in choice else choice["text"]
        finish_reason = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        text, finish_reason = None, None
    if not isinstance(text, str):
        raise Unreadable(f"no judgement in it: {complaint(body).message}")
    usage = content.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Reply(
        _SURROGATE.sub("\ufffd", text),
        finish_reason if isinstance(finish_reason, str) else None,
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
        seconds,
    )


def complaint(body: bytes) -> Complaint:
    """Read an error in whatever form it has."""
    text = body.decode(errors="replace")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return Complaint(text, "")
    error = content.get("error", content) if isinstance(content, dict) else content
    if not isinstance(error, dict):
        return Complaint(error if isinstance(error, str) else text, "")
    message = error.get("message") or error.get("detail")
    codes = [error.get(name) for name in ("code", "type")]
    return Complaint(
        message if isinstance(message, str) else text,
        next((code for code in codes if code and isinstance(code, str)), ""),
    )


def response(game: Game, results: Sequence[Reply | str | None]) -> Response:
    """Return a game's response; tokens and seconds are sums over its votes."""
    given = [result for result in results if isinstance(result, Reply)]
    if len(given) < len(results):
        return Response(game.id, error=next(each for each in results if isinstance(each, str)))
    return Response(
        game.id,
        texts=tuple(reply.text for reply in given),
        prompt_tokens=_total([reply.prompt_tokens for reply in given]),
        num_tokens=_total([reply.num_tokens for reply in given]),
        seconds=sum(reply.seconds for reply in given),
    )


def retry_after(header: str | None, now: datetime.datetime) -> float | None:
    """Return the seconds that a Retry-After header asks for, which is a number or a date."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(header)
        except ValueError:
            return None
        seconds = (date.replace(tzinfo=date.tzinfo or datetime.UTC) - now).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _chat_text(choice: Any) -> Any:
    """Return a message as a continuation of `<think>`.

    A refusal is a response, which has no verdict. Reasoning that was cut short is left open, so
    that its status is that of a cut judgement.
    """
    message = choice["message"]
    content, reasoning = message.get("content"), _reasoning(message)
    if isinstance(content, str) and content.lstrip().startswith("<think>"):
        content = content.lstrip().removeprefix("<think>")
    if not reasoning:
        return message.get("refusal") if content is None else content
    if not content and choice.get("finish_reason") == "length":
        return reasoning
    content = content or ""
    # A model that was told to write `</think>` may do so besides what its server took out.
    return reasoning + ("" if "</think>" in content else "</think>") + content


def _reasoning(message: Any) -> str:
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    return reasoning if isinstance(reasoning, str) else ""


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _count(value: Any) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return value if is_count else None
