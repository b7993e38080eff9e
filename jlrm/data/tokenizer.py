"""Tokenizers: loading them, the bytes of each id, and prompts in which user text stays text.

A real tokenizer maps `<|im_end|>` inside an answer to the control token that ends a turn. So an
answer could pretend to be another speaker. Before the template is filled,
`judgement.prompts.neutralise` breaks the `control_tokens` that this file lists.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from jlrm.config import UsageError
from jlrm.judgement import prompts

Tokenizer = Any  # transformers.PreTrainedTokenizerBase; imported late, it costs a second


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
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"Cannot load the tokenizer in {directory}: {error}") from None


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for.

    Raises:
      UsageError: the tokenizer is larger than the model's vocabulary.
    """
    if len(tokenizer) > vocab_size:
        raise UsageError(
            f"The tokenizer has {len(tokenizer)} ids, but the model's vocabulary {vocab_size}. "
            "Set model.tokenizer to the tokenizer the model was trained with."
        )


def end_ids(tokenizer: Tokenizer, directory: pathlib.Path) -> tuple[int, ...]:
    """Return every id that ends a sequence: generation_config.json's, and the tokenizer's own."""
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    file = directory / "generation_config.json"
    if file.is_file():
        listed = json.loads(file.read_text()).get("eos_token_id")
        ids += listed if isinstance(listed, list) else [listed]
    if not any(token is not None for token in ids):
        raise UsageError(
            f"{directory} names no end token, neither in its tokenizer nor in "
            "generation_config.json."
        )
    return tuple(dict.fromkeys(token for token in ids if token is not None))


def prompt_template(
    tokenizer: Tokenizer, name: str, *, min_score: int = 1, max_score: int = 10
) -> str:
    """Return the text of a pair template, with its fields `{question}`, `{answer_1}`, `{answer_2}`.

    `jlrm` goes through the tokenizer's chat template, thinking switched on where it has a switch,
    and opens `<think>` exactly once whether or not that template does so itself. The scale is
    written into it; the other templates are fixed texts.

    Raises:
      UsageError: no such template, no chat template, or one that a field does not come through.
    """
    if name in prompts.PAIR_TEMPLATES:
        return prompts.PAIR_TEMPLATES[name]
    system, user = prompts.messages(name, min_score, max_score)
    if not tokenizer.chat_template:
        raise UsageError(
            f"data.prompt={name} needs a chat template, which this tokenizer lacks. Set "
            "model.tokenizer to an instruct model's, or data.prompt=judgelrm_train."
        )
    chat = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    text = tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    if not text.rstrip().endswith("<think>"):
        text += "<think>\n"
    for message in (system, user):
        if text.count(message) != 1:
            raise UsageError(
                f"The tokenizer's chat template changes or drops a message of data.prompt={name}. "
                "Use data.prompt=judgelrm_train, which needs no chat template."
            )
    return text


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
    """Return the texts that the tokenizer turns into single added ids."""
    return frozenset(tokenizer.get_added_vocab())


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """Return the bytes that every id stands for, in the order of ids.

    Raises:
      UsageError: not a byte-level BPE tokenizer (every Qwen one is).
    """
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    kinds = [decoder.get("type")] + [part.get("type") for part in decoder.get("decoders", [])]
    if "ByteLevel" not in kinds:
        raise UsageError(
            f"sampling.stop_strings need a byte-level tokenizer, this one decodes by {kinds}."
        )
    added = {index: text for text, index in tokenizer.get_added_vocab().items()}
    spelled = byte_of_character()
    bytes_of_ids = []
    for index, piece in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        if index in added or piece is None:
            bytes_of_ids.append(added.get(index, "").encode())
        else:
            bytes_of_ids.append(bytes(spelled[character] for character in piece))
    return bytes_of_ids


@functools.cache
def byte_of_character() -> dict[str, int]:
    """Return GPT-2's spelling of bytes as printable characters, which byte-level tokenizers use."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(rest)
    }
