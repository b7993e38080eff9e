"""A text that reads as a string and as a conversation, for rewards written for either.

TRL hands a reward strings or lists of messages, whichever form the data has, and public rewards are
written for one of the two: `len(completion)` or `completion[0]["content"]`. Nothing in a function
says which. So prompts and completions are given in a form that is both.
"""

from __future__ import annotations

from typing import Any, SupportsIndex


class Turn(str):
    """A string whose every character answers as the message that the whole text is.

    `turn` is the text in all respects. `turn[0]` is its first character, as of any string, and
    `turn[0]["content"]` is the whole text, `turn[0]["role"]` who wrote it. `turn[-1]` does the
    same, and both exist for an empty text too.
    """

    role: str
    content: str

    def __new__(cls, text: str, role: str = "assistant", content: str | None = None) -> Turn:
        """Return a text of this role; `content` is the whole that a single character is of."""
        turn = super().__new__(cls, text)
        turn.role, turn.content = role, str(text if content is None else content)
        return turn

    def __getnewargs__(self) -> Any:
        """Return what a copy in another process is made from."""
        return str(self), self.role, self.content

    def __getitem__(self, key: SupportsIndex | slice | str) -> Any:  # pyright: ignore
        """Return a character, a slice, or a field of the message."""
        if isinstance(key, str):
            return {"role": self.role, "content": self.content}[key]
        if isinstance(key, slice):
            return super().__getitem__(key)
        is_message = not self and key in (0, -1)
        return Turn("" if is_message else super().__getitem__(key), self.role, self.content)

    def get(self, field: str, default: Any = None) -> Any:
        """Return a field of the message, as a dictionary's `get`."""
        return {"role": self.role, "content": self.content}.get(field, default)
