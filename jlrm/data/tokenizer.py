"""Tokenizers: loading them, the bytes of each id, and prompts in which user text stays text.

A real tokenizer maps `<|im_end|>` inside an answer to the control token that ends a turn. So an
answer could pretend to be another speaker. Before the template is filled,
`judgement.prompts.neutralise` breaks the `control_tokens` that this file lists.
"""

from __future__ import annotations

import datetime
import functools
import json
import logging
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jlrm.config import UsageError
from jlrm.judgement import prompts
from jlrm.judgement.prompts import PromptText
from jlrm.runtime import hosts
from jlrm.runtime.settings import read_json

log = logging.getLogger(__name__)

Tokenizer = Any  # transformers.PreTrainedTokenizerBase; imported late, it costs a second

# The time that chat templates are told, whatever day it is: prompts of a run stay the same, and so
# do those of its judge. It is the day that Llama's own template writes where it has no clock.
NOW = datetime.datetime(2024, 7, 26)
# In place of transformers' own function, since it takes no function with a template. A macro has
# no way to format a date, but what a date's directives stand for can be filled in. The last `{{}}`
# keeps a line break that the template may begin with.
CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(
        f" | replace({f'%{flag}{letter}'!r}, {NOW.strftime(f'%{flag}{letter}')!r})"
        for flag in ("-", "")
        for letter in "aAbBcdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"
    )
    + " | replace('%%', '%') }}{% endmacro %}{{ '' }}"
)
# Pieces of a tokenizer that falls back to bytes: a byte, and what stands for a space.
FALLBACK, SPACE = re.compile("<0x([0-9A-F]{2})>"), "\N{LOWER ONE EIGHTH BLOCK}"
# What templates write to switch thinking off: an empty block, or its end alone.
EMPTY_THINKING = re.compile(r"((<think>\s*)?</think>\s*)+(?=(<think>\s*)?$)")


def load_tokenizer(directory: pathlib.Path) -> Tokenizer:
    """Load a Hugging Face tokenizer from a local directory.

    Raises:
      UsageError: there is none, or it can't be read.
    """
    from transformers import AutoTokenizer

    if not (directory / "tokenizer.json").is_file():
        raise UsageError(
            f"{directory} holds no tokenizer.json. Set model.tokenizer to a directory that does."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, config=_model_kind(directory), trust_remote_code=False
        )
        # What a broken file does not break until it is used, and a tokenizer in Python alone lacks.
        tokenizer.backend_tokenizer.to_str()
        tokenizer.decode(tokenizer(["a"])["input_ids"][0])
        highest_id(tokenizer)
    except Exception as error:  # a broken file raises anything, the Rust library its own kinds
        why = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise UsageError(f"Cannot load the tokenizer in {directory}: {why}.") from None
    return tokenizer


def _model_kind(directory: pathlib.Path) -> Any:
    """Return a model's kind, by which transformers chooses a tokenizer's class.

    It would read all of config.json for that, and refuse what says nothing of a tokenizer: with
    PyTorch installed, a dtype that is spelt `torch.bfloat16`.
    """
    from transformers import AutoConfig, PretrainedConfig

    try:
        return AutoConfig.for_model(str(read_json(directory / "config.json").get("model_type")))
    except (UsageError, ValueError):  # no such file, or a kind that it does not know
        return PretrainedConfig()


def highest_id(tokenizer: Tokenizer) -> int:
    """Return the highest id; there may be gaps below, so it is no count."""
    return max(tokenizer.get_vocab().values())


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int] = ()) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for, and such end tokens.

    Raises:
      UsageError: if so.
    """
    if (highest := highest_id(tokenizer)) >= vocab_size:
        raise UsageError(
            f"The highest id of the tokenizer is {highest}, and so it needs {highest + 1} ids, "
            f"but the model's vocabulary {vocab_size}. "
            "Set model.tokenizer to the tokenizer the model was trained with."
        )
    if beyond := [token for token in ends if token >= vocab_size]:
        raise UsageError(
            f"generation_config.json or config.json names the end token {beyond[0]}, but the "
            f"model's vocabulary has {vocab_size} ids. Take the file of the same model."
        )


def end_ids(tokenizer: Tokenizer, directory: pathlib.Path) -> tuple[int, ...]:
    """Return every id that ends a sequence: the model's, and the tokenizer's own.

    As in transformers, config.json names the model's where generation_config.json does not.

    Raises:
      UsageError: there is none, or one that is no id.
    """
    own = tokenizer.eos_token_id
    ids = [] if own is None else [own]
    ids += _ends_of(directory / "generation_config.json") or _ends_of(directory / "config.json")
    if not ids:
        raise UsageError(
            f"{directory} names no end token, neither in its tokenizer nor in "
            "generation_config.json."
        )
    return tuple(dict.fromkeys(ids))


def _ends_of(file: pathlib.Path) -> list[int]:
    """Return the end tokens that a file names; as in transformers, a broken file names none."""
    if not file.is_file():
        return []
    try:
        value = read_json(file).get("eos_token_id")
    except UsageError as error:
        _warn(f"{error} It is left out; sequences end with the tokenizer's own end token.")
        return []
    listed = value if isinstance(value, list) else [value]
    ids = [token for token in listed if token is not None]
    if any(type(token) is not int or token < 0 for token in ids):  # a bool is an int too
        raise UsageError(
            f"{file}: eos_token_id={value!r:.80} is neither a token id nor a list of these."
        )
    return ids


def prompt_template(
    tokenizer: Tokenizer,
    name: str,
    *,
    min_score: int = 1,
    max_score: int = 10,
    has_reference: bool = False,
    is_single: bool = False,
    num_answers: int = 2,
) -> str:
    """Return the text of a pair template, with its fields `{question}`, `{answer_1}`, `{answer_2}`.

    Of a list there are `num_answers` of these. With `is_single` that of its form for one answer,
    with the fields `{question}`, `{answer}`.

    `jlrm` goes through the tokenizer's chat template, thinking switched on where it has a switch,
    and opens `<think>` exactly once whether or not that template does so itself. The scale is
    written into it; the other templates are fixed texts. `has_reference` adds the field
    `{reference}`, for which `jlrm` alone has a place.

    Raises:
      UsageError: no such template, no chat template, or one that can't be filled or that a field
        does not come through.
    """
    if name in prompts.PAIR_TEMPLATES and not is_single:
        return prompts.pair_template(name, num_answers)
    listed = functools.partial(prompts.messages, num_answers=num_answers)
    write = prompts.single_messages if is_single else listed
    asked = write(name, min_score, max_score, has_reference=has_reference)
    return whole_text(tokenizer, name, asked)


def whole_text(tokenizer: Tokenizer, name: str, prompt: PromptText) -> str:
    """Return all of the text that a model sees of a prompt, with the prompt's fields in it.

    Raises:
      UsageError: as `prompt_template`, naming the prompt by `name`.
    """
    system, user = prompt
    if system is None:
        return user
    if not tokenizer.chat_template:
        raise UsageError(
            f"data.prompt={name} needs a chat template, which this tokenizer lacks. Set "
            "model.tokenizer to an instruct model's, or data.prompt=judgelrm_train."
        )
    chat = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    try:
        text = _fill_chat(tokenizer, chat if system else chat[1:])
    except Exception as error:  # a template is a program: it raises on purpose, or anything
        raise UsageError(
            f"The tokenizer's chat template can't write data.prompt={name}, a system and a user "
            f"message ({_why(error)}). Use data.prompt=judgelrm_train, which needs no chat "
            "template, or set model.tokenizer to one whose template has a system role."
        ) from None
    text = open_thinking(text)
    if prompts.opens_rubric(name):
        text = text.rstrip().removesuffix(prompts.THINK_TAGS[0]) + f"{prompts.first_tag(name)}\n"
    for message in filter(None, (system, user)):
        if text.count(message) != 1:
            raise UsageError(
                f"The tokenizer's chat template changes or drops a message of data.prompt={name}. "
                "Use data.prompt=judgelrm_train, which needs no chat template."
            )
    return text


def chat_text(tokenizer: Tokenizer, chat: Sequence[Mapping[str, str]]) -> str:
    """Return the text of a conversation and the header of an answer, which opens `<think>`.

    Raises:
      UsageError: no chat template, or it refuses these messages.
    """
    if not tokenizer.chat_template:
        raise UsageError("The model's tokenizer has no chat template.")
    try:
        text = _fill_chat(tokenizer, chat)
    except Exception as error:
        raise UsageError(f"The chat template refuses these messages: {_why(error)}.") from None
    return open_thinking(text)


def question_template(tokenizer: Tokenizer) -> str:
    """Return what a model sees of a question that it is to answer, with the field `{question}`.

    It is the tokenizer's chat template, or ChatML where it has none.

    Raises:
      UsageError: a chat template that can't be filled, or that changes the question.
    """
    field = "{question}"
    if not tokenizer.chat_template:
        return f"<|im_start|>user\n{field}<|im_end|>\n<|im_start|>assistant\n"
    try:
        text = _fill_chat(tokenizer, [{"role": "user", "content": field}])
    except Exception as error:  # a template is a program, as above
        raise UsageError(
            f"The tokenizer's chat template can't write a question ({_why(error)})."
        ) from None
    if text.count(field) != 1:
        raise UsageError("The tokenizer's chat template changes or drops a question.")
    return text


def open_thinking(text: str) -> str:
    """Let a prompt end in one `<think>`, whatever its template has written there."""
    text = EMPTY_THINKING.sub("", text)
    return text if text.rstrip().endswith("<think>") else f"{text}<think>\n"


def _fill_chat(tokenizer: Tokenizer, chat: Sequence[Mapping[str, str]]) -> str:
    """Fill the chat template, with thinking switched on; it raises whatever it likes."""
    template = tokenizer.get_chat_template()
    return tokenizer.apply_chat_template(
        list(chat),
        chat_template=(CLOCK if "strftime_now" in template else "") + template,
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=True,  # Qwen, and most
        thinking=True,  # DeepSeek, Granite
    )


def _why(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text, nothing added."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []


def decode(tokenizer: Tokenizer, ids: Sequence[Sequence[int]]) -> list[str]:
    """Return each sequence's text, control tokens included: rewards see what was written."""
    return [
        tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for row in ids
    ]


def control_tokens(tokenizer: Tokenizer) -> frozenset[str]:
    """Return the texts that the tokenizer turns into single added ids, and that may steer a model.

    Those that are not special and are one character, white space or several words are left out:
    text that people added to a vocabulary, which would be garbled.
    """
    added = tokenizer.added_tokens_decoder.values()
    return frozenset(str(token) for token in added if token.special or not _is_text(str(token)))


def _is_text(token: str) -> bool:
    return len(token) < 2 or token.isspace() or (" " in token and token[0].isalnum())


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """Return the bytes that every id stands for, up to the highest; none for an id in a gap.

    Raises:
      UsageError: a tokenizer that is neither byte-level (Qwen, Llama 3) nor falls back to bytes
        (Mistral).
    """
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    kinds = [decoder.get("type")] + [part.get("type") for part in decoder.get("decoders", [])]
    falls_back = "ByteFallback" in kinds
    if "ByteLevel" not in kinds and not falls_back:
        raise UsageError(
            f"sampling.stop_strings need a tokenizer of bytes, this one decodes by {kinds}. With "
            "sampling.stop_strings={} only the end tokens stop a judgement."
        )
    added = {index: text for text, index in tokenizer.get_added_vocab().items()}
    spelled = byte_of_character()
    bytes_of_ids = []
    pieces = tokenizer.convert_ids_to_tokens(list(range(highest_id(tokenizer) + 1)))
    for index, piece in enumerate(pieces):
        if index in added or piece is None:
            bytes_of_ids.append(added.get(index, "").encode())
        elif falls_back:
            byte = FALLBACK.fullmatch(piece)
            text = piece.replace(SPACE, " ")
            bytes_of_ids.append(bytes.fromhex(byte[1]) if byte else text.encode())
        elif spelled.keys() >= set(piece):
            bytes_of_ids.append(bytes(spelled[character] for character in piece))
        else:  # a piece that is no spelling of bytes stands for itself, as in the library's decoder
            bytes_of_ids.append(piece.encode())
    return bytes_of_ids


@functools.cache
def byte_of_character() -> dict[str, int]:
    """Return GPT-2's spelling of bytes as printable characters, which byte-level tokenizers use."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(rest)
    }


@functools.cache  # a run opens its tokenizer more than once, and says this once
def _warn(text: str) -> None:
    if hosts.is_main():
        log.warning("%s", text)
