"""Transcripts: texts that write out a whole conversation, with names or a chat template's tokens.

`written` reads forms that nothing else looks like: `Human:` and `Assistant:` on lines of their own,
and the tokens of ChatML, Llama 2 and 3, Gemma, Zephyr and Open Assistant. `loosely_written` reads
looser ones too, such as `Q:` and `A:` or names within a line, which an ordinary answer may hold: it
is for texts that must be transcripts because nothing else holds the question.
"""

from __future__ import annotations

import re

Messages = list[tuple[str, str]]  # (role, text)

_NAMES: dict[str, list[str]] = {
    "user": ["human", "prompter", "[inst]", "h", "q", "question", "instruction"],
    "assistant": ["gpt", "bot", "chatbot", "model", "ai", "[/inst]", "a", "answer", "response"],
}
ROLES = {name: role for role, names in _NAMES.items() for name in names}

_TEMPLATES = (  # of the tokens before a turn; the group is the name of who speaks
    r"<\|im_start\|>\s*(\w+)\s*",  # ChatML
    r"<\|start_header_id\|>\s*(\w+)\s*<\|end_header_id\|>\s*",  # Llama 3
    r"<start_of_turn>\s*(\w+)\s*",  # Gemma
    r"<\|(user|assistant|system|prompter)\|>\s*",  # Zephyr, Phi, Open Assistant
    r"(\[/?INST\])\s*",  # Llama 2, Mistral
)
_AROUND = re.compile(
    r"(?:\s|<\|im_end\|>|<\|eot_id\|>|<end_of_turn>|<\|end\|>|<\|endoftext\|>|</?s>"
    r"|<\|begin_of_text\|>|<bos>)*"
)
_SYSTEM = re.compile(r"<<SYS>>(.*?)<</SYS>>(.*)", re.DOTALL)  # Llama 2, in the user's turn

_SPEAKERS = (
    *("Human|Assistant", "User|Assistant", "USER|ASSISTANT", "human|assistant", "user|assistant"),
    *("Human|AI", "Instruction|Input|Response", "Question|Answer", "Q|A", "H|A"),
)
# What stands before a name, the widest first; looked back at, so that long gaps cost no time.
_GAPS = (r"(?:(?<=\n\n)|(?<=\n\r\n))", r"(?<=\n)", r"(?<=[ \t])")


def written(text: str) -> Messages:
    """Return the turns of a transcript, [] of any other text."""
    return _with_tokens(text) or _with_names(text)


def loosely_written(text: str) -> Messages:
    """Return the turns of a transcript in a looser form too, [] of a text that is none."""
    return written(text) or next(filter(None, (_by(names, text) for names in _SPEAKERS)), [])


def without_end(text: str) -> str:
    """Return a text without the tokens by which a chat template ends a turn."""
    for start in (match.start() for match in re.finditer(r"<", text)):
        if _AROUND.fullmatch(text, start):
            return text[:start].rstrip()
    return text


def _with_names(text: str) -> Messages:
    if not re.match(r"\s*(?:Human|User|System):", text):
        return []
    is_apart = re.search(rf"{_GAPS[0]}[ \t]*Assistant:", text)
    gap = _GAPS[0] if is_apart or "\nAssistant:" not in text else _GAPS[1]
    turns = _split(rf"(?:\A\s*|{gap}[ \t]*)(Human|User|Assistant|System): ?", text)[1]
    is_transcript = "assistant" in _roles(turns) or text.startswith("\n\nHuman:")
    return turns if is_transcript else []


def _with_tokens(text: str) -> Messages:
    for head in _TEMPLATES:
        before, turns = _split(head, text)
        if turns and _AROUND.fullmatch(before) and "user" in _roles(turns):
            turns = [(role, without_end(turn)) for role, turn in turns]
            hidden = _SYSTEM.match(turns[0][1])
            return _two(hidden) + turns[1:] if hidden else turns
    return []


def _two(hidden: re.Match[str]) -> Messages:
    return [("system", hidden[1].strip()), ("user", hidden[2].strip())]


def _by(names: str, text: str) -> Messages:
    """Split at these names, at the widest gap before them that makes turns of both sides."""
    is_short = len(names) == 3  # "Plan A: ..." within a line names nobody
    for gap in _GAPS[:2] if is_short else _GAPS:
        head = rf"(?:\A\s*|{gap}|(?=\#\#))(?:\#\#+\s*)?\b({names}|System|SYSTEM|system):\s*"
        before, turns = _split(head, text)
        if turns[:1] and turns[0][0] in ("user", "system") and _roles(turns) >= {"assistant"}:
            has_preamble = before.strip() != ""
            if not has_preamble:
                return _joined(turns)
            if names.startswith(("USER", "Instruction")):  # Vicuna's and Alpaca's instruction
                return [("system", before.strip()), *_joined(turns)]
    return []


def _split(head: str, text: str) -> tuple[str, Messages]:
    """Return what stands before the first name, and the turns."""
    before, *pieces = re.split(head, text)
    roles = [ROLES.get(name.lower(), name.lower()) for name in pieces[::2]]
    return before, list(zip(roles, map(str.strip, pieces[1::2]), strict=True))


def _joined(turns: Messages) -> Messages:
    """Return turns in which Alpaca's input belongs to the instruction before it."""
    joined: Messages = []
    for role, text in turns:
        if role == "input" and joined:
            role, text = joined[-1][0], f"{joined.pop()[1]}\n\n{text}"
        joined.append((role, without_end(text)))
    return joined


def _roles(turns: Messages) -> set[str]:
    return {role for role, _ in turns}
