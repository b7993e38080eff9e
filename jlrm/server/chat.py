"""Completions in OpenAI's form, of a conversation or a text: as one reply, or as they grow.

In a conversation reasoning stands apart from the content, as `reasoning_content`, which servers of
open models have. What continues a text is one text.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from jlrm.server.bodies import ChatBody
from jlrm.server.service import THINK_END, Piece, Service, parts


class Choices:
    """The completions of one conversation, as they grow, in OpenAI's form."""

    _marks: tuple[str, ...] = (THINK_END,)  # which part a text, and may have come in part
    id_start, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, service: Service, body: ChatBody, num_prompt: int) -> None:
        self._service, self._body, self._num_prompt = service, body, num_prompt
        self._texts: dict[int, str] = {}  # without their end
        self._endings: dict[int, str] = {}
        self._num_tokens: dict[int, int] = {}
        self._sent: dict[int, tuple[int, int]] = {}  # characters of the reasoning and of the rest
        self._about = {
            "id": f"{self.id_start}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.defaults.model,
        }

    @property
    def are_finished(self) -> bool:
        """Whether all completions have ended."""
        return len(self._endings) == self._body.drawing.votes

    def add(self, piece: Piece) -> None:
        """Take in what has come; a stop string of the request ends a completion."""
        index = piece.completion
        if index in self._endings:
            return
        self._num_tokens[index] = piece.num_tokens
        text, ending = piece.text, piece.ending
        if ending == "stop":
            text = self._service.without_end(text)
        begins = [text.find(stop) for stop in self._body.stops if stop in text]
        if begins:
            text, ending = text[: min(begins)], "stop"
        self._texts[index] = text
        if ending:
            self._endings[index] = ending

    def whole(self) -> dict[str, Any]:
        """Return the reply."""
        listed = [
            {"index": i, **self._said(self._texts[i]), "finish_reason": self._endings[i]}
            for i in sorted(self._texts)
        ]
        return {
            **self._about,
            "object": self.whole_kind,
            "choices": listed,
            "usage": self._usage(),
        }

    def _said(self, text: str) -> dict[str, Any]:
        """Return a whole completion's part of the reply."""
        reasoning, content = parts(text)
        message = {"role": "assistant", "content": content}
        return {"message": {**message, "reasoning_content": reasoning} if reasoning else message}

    def _parts(self, text: str) -> tuple[str, str]:
        """Return the reasoning of what is written so far, and the rest."""
        return parts(text)

    def opening(self) -> list[dict[str, Any]]:
        """Return the first chunks of a stream: who speaks."""
        role = {"role": "assistant", "content": ""}
        return [self._chunk(index, role, None) for index in range(self._body.drawing.votes)]

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Take in what has come, and return what of it is new and can't change any more."""
        index = piece.completion
        if index in self._endings:
            return []
        self.add(piece)
        ending = self._endings.get(index)
        text = self._texts[index]
        # The beginning of a stop string, or of the end of the reasoning, may be its end already.
        held = (*self._body.stops, *self._marks)
        cut = max((_overlap(text, each) for each in held), default=0)
        safe = text if ending else text[: len(text) - cut]
        reasoning, content = self._parts(safe)
        was = self._sent.get(index, (0, 0))
        new = {"reasoning_content": reasoning[was[0] :], "content": content[was[1] :]}
        self._sent[index] = max(was[0], len(reasoning)), len(content)
        delta = {name: text for name, text in new.items() if text}
        found = [self._chunk(index, delta, None)] if delta else []
        return [*found, self._chunk(index, {}, ending)] if ending else found

    def usage_chunk(self) -> dict[str, Any]:
        """Return the last chunk of a stream that is to have the usage."""
        chunk = self._chunk(0, {}, None)
        return {**chunk, "choices": [], "usage": self._usage()}

    def _chunk(self, index: int, delta: Mapping[str, str], ending: str | None) -> dict[str, Any]:
        choice = {"index": index, **self._new(delta), "finish_reason": ending}
        return {**self._about, "object": self.chunk_kind, "choices": [choice]}

    def _new(self, delta: Mapping[str, str]) -> dict[str, Any]:
        """Return a chunk's part of a choice."""
        return {"delta": dict(delta)}

    def _usage(self) -> dict[str, int]:
        written = sum(self._num_tokens.values())
        return {
            "prompt_tokens": self._num_prompt,
            "completion_tokens": written,
            "total_tokens": self._num_prompt + written,
        }


class TextChoices(Choices):
    """The completions of one text."""

    id_start, whole_kind, chunk_kind, _marks = "cmpl", "text_completion", "text_completion", ()

    def _said(self, text: str) -> dict[str, Any]:
        return {"text": text, "logprobs": None}

    def _parts(self, text: str) -> tuple[str, str]:
        return "", text

    def opening(self) -> list[dict[str, Any]]:
        """Return no chunk: nobody speaks."""
        return []

    def _new(self, delta: Mapping[str, str]) -> dict[str, Any]:
        return {"text": delta.get("content", ""), "logprobs": None}


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text may begin a stop string."""
    return max(n for n in range(len(stop)) if text.endswith(stop[:n]))
