"""A reward for models that have learned nothing: their texts hold no verdict, and must differ."""

from __future__ import annotations

import os
import pathlib


def vowels(completions: list[str], **_: object) -> list[float]:
    """Pay vowels; raise in process 1 once the file exists that TRAP names."""
    trap = pathlib.Path(os.environ.get("TRAP", "/nowhere"))
    if trap.exists() and os.environ["JLRM_PROCESS_ID"] == "1":
        raise ValueError("the reward model is out")
    return [sum(map(text.count, "aeiou")) / 10 for text in completions]
