"""Every reader of files meets damaged ones: what it says is a sentence, never a traceback.

Everything tries some damages of each file, the campaign JLRM_FUZZ of them (20,000), and names the
slowest. A damage changes bytes, or values inside of JSON; each follows from its number, so that a
failure says how to meet it again.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import random
import struct
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from jlrm.config import RunError, UsageError
from jlrm.data import audit, readers
from jlrm.data.tokenizer import end_ids, load_tokenizer
from jlrm.data.worlds import toy
from jlrm.evaluation import journal, rubrics
from jlrm.evaluation.prompting import prompting
from jlrm.judgement import verdict
from jlrm.judges import paid
from jlrm.reports import contracts, results_file, run_summary, tracking
from jlrm.runtime import settings
from jlrm.serving import calibration, lists
from jlrm.serving import rows as judged_rows
from jlrm.weights import hf_config, hf_files

MANY = int(os.environ.get("JLRM_FUZZ", "20000"))
SOME = 60  # in everything
ODD = [
    None, True, 0, -1, 1e308, float("nan"), float("inf"), 10**400, "", "x", "é\ud800", "1", [], {},
    [[]], [None], {"": None}, {"a": {"b": []}}, "\x00", "../../x", "a" * 5000, 2**31, 1e-320,
]  # fmt: skip

ROW = {"question": "q?", "answer_1": "a", "answer_2": "b", "score_1": 7, "score_2": 4}
JUDGELM = {
    "question_id": 1, "question_body": "q", "answer1_body": "a", "answer2_body": "b",
    "score": [3.0, 4.0],
}  # fmt: skip
CHAT = {
    "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}],
}
HF = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 64,
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "hidden_act": "silu",
    "max_position_embeddings": 128, "tie_word_embeddings": True, "torch_dtype": "float32",
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "layer_types": ["full_attention", "full_attention"], "use_sliding_window": False,
}  # fmt: skip
METRICS = {"stage": "grpo", "step": 1, "loss": 0.5, "reward": "nan"}
DRAWN = {
    "stage": "grpo", "step": 1, "position": 0, "of": 4, "rows": [[0, 1]],
    "fates": [["trained", "skipped"]],
}  # fmt: skip
HEADER = {"header": {"judge": "x", "prompt": "jlrm"}}
RESPONSE = {"game": "1:ab", "outputs": ["<answer>1</answer>"], "scores": [1.0, 2.0]}
REPLY = {"texts": ["<answer>1</answer>"], "finish_reason": "stop"}
SUMMARY = {"sft": {"agreement": 50.0}, "steps": 3, "seconds": 1.5, "tokens": 9, "version": 1}
CONFIG = """
run: {dir: r, save_every: 10, keep_last: 2}
model: {preset: toy, tokenizer: toy}
data: &d {train: toy, columns: {question: q}, rescale: {0: 1, 100: 10}}
grpo: {steps: 10, loss: {clip_low: 0.2}, optimizer: {learning_rate: 1e-6}}
"""
WHOLE = """
run: {dir: r}
model: {preset: toy, tokenizer: toy}
data: {train: toy}
grpo: {steps: 1}
"""
LIST = {"id": 1, "question": "q", "answers": ["a", "b", "c"], "gold": "a"}
SINGLE = {"question": "q", "answer": "a"}
RUBRIC = "facts: right\nstyle: {description: plain words, weight: 0.5}\n"
TEMPLATE = "{question}\n1: {answer_1}\n2: {answer_2}\n{{x}} {rubric} {min_score}\n"
TEXT = (
    "so</think><answer>7</answer><answer>4</answer> <think> \\boxed{3} [[A]] 7/10 ½ ٣ 1,5 1e400"
    "</answer><answer><answer></think>"
)


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({name: [value] * 3 for name, value in ROW.items()}), file)
    return file.getvalue()


def results() -> bytes:
    judge = {"name": "j", "model": "m", "prompt": "jlrm"}
    return json.dumps({"version": 1, "judge": judge, "benchmarks": {"pairs": {"n": 3}}}).encode()


def a_map() -> bytes:
    numbers = [0.5, 0.7, 0.8, 0.9, 0.6] * 8
    right = [number > 0.6 for number in numbers]
    return json.dumps(contracts.encode(calibration.fit(numbers, right, range(40)))).encode()


def tensors() -> bytes:
    return safetensors.numpy.save({"model.embed_tokens.weight": np.ones((4, 2), np.float32)})


def read_tensors(directory: pathlib.Path) -> None:
    with contextlib.ExitStack() as stack:
        hf_files.open_tensors(directory, {"model.embed_tokens.weight": (4, 2)}, stack, is_tied=True)


def read_cache(directory: pathlib.Path) -> None:
    cache = paid.Cache(directory)
    (directory / "reply.json").rename(cache.path({"a": 1}))
    cache.get({"a": 1})


def read_texts(directory: pathlib.Path) -> None:
    text = (directory / "text").read_bytes().decode(errors="surrogateescape")
    verdict.parse(text)
    verdict.parse_authors(text)


def read_override(directory: pathlib.Path) -> None:
    text = (directory / "override").read_bytes().decode(errors="surrogateescape")
    settings.load(directory.parent / "whole.yaml", [text])


def rows(name: str) -> Callable[[pathlib.Path], Any]:
    return lambda directory: readers.read(str(directory / name))


Reader = tuple[str, Callable[[], bytes], Callable[[pathlib.Path], Any]]
READERS: dict[str, Reader] = {
    "rows of ours": ("r.jsonl", lambda: lines(ROW, ROW), rows("r.jsonl")),
    "rows of JudgeLM": ("r.jsonl", lambda: lines(JUDGELM, JUDGELM), rows("r.jsonl")),
    "conversations": ("r.jsonl", lambda: lines(CHAT, CHAT), rows("r.jsonl")),
    "a list": ("r.json", lambda: json.dumps([ROW, ROW]).encode(), rows("r.json")),
    "CSV": (
        "r.csv",
        lambda: b'question,answer_1,answer_2,score_1,score_2\nq,"a\n,",b,7,4\n',
        rows("r.csv"),
    ),
    "TSV": (
        "r.tsv",
        lambda: b"question\tanswer_1\tanswer_2\tpreference\nq\ta\tb\t1\n",
        rows("r.tsv"),
    ),
    "Parquet": ("r.parquet", table, rows("r.parquet")),
    "HF config": ("config.json", lambda: json.dumps(HF).encode(), hf_config.read_config),
    "safetensors": ("model.safetensors", tensors, read_tensors),
    "YAML": ("c.yaml", CONFIG.encode, lambda d: settings.load(d / "c.yaml")),
    "overrides": ("override", b"grpo.optimizer.learning_rate=1e-6".strip, read_override),
    "verdicts": ("text", TEXT.encode, read_texts),
    "metrics": ("metrics.jsonl", lambda: lines(METRICS, METRICS), tracking.read_metrics),
    "audit": ("audit.jsonl", lambda: lines(DRAWN), lambda d: audit.check(audit.read(d))),
    "summary": ("summary.json", lambda: json.dumps(SUMMARY).encode(), run_summary.read),
    "journal": ("responses.jsonl", lambda: lines(HEADER, RESPONSE, RESPONSE), journal.read),
    "cache": ("reply.json", lambda: json.dumps(REPLY).encode(), read_cache),
    "results": ("results.json", results, results_file.read),
    "lists": (
        "l.jsonl",
        lambda: lines(LIST, LIST),
        lambda d: lists.read(str(d / "l.jsonl"), {}, "gold"),
    ),
    "single answers": (
        "s.jsonl",
        lambda: lines(SINGLE, SINGLE),
        lambda d: judged_rows.read_single(str(d / "s.jsonl"), {}),
    ),
    "a rubric": ("r.yaml", RUBRIC.encode, lambda d: rubrics.read(str(d / "r.yaml"))),
    "a rubric in JSON": (
        "r.json",
        lambda: json.dumps({"facts": {"description": "x", "weight": 2}}).encode(),
        lambda d: rubrics.read(str(d / "r.json")),
    ),
    "a template": ("t.txt", TEMPLATE.encode, lambda d: prompting(str(d / "t.txt"), (1, 10))),
    "a map": ("calibration.json", a_map, lambda d: calibration.read(d / "calibration.json")),
}


# --- Damages ---


def damaged(content: bytes, number: int) -> bytes:
    """Return the content with the damage of that number."""
    rng = random.Random(number)
    if rng.random() < 0.5:
        with contextlib.suppress(ValueError):
            return _other_values(content, rng)
    for _ in range(rng.choice([1, 1, 2, 5])):
        content = _other_bytes(content, rng)
    return content


def _other_values(content: bytes, rng: random.Random) -> bytes:
    """Change a value, or the name of one, in one line of JSON, or in all of it."""
    parts = content.splitlines() if content.count(b"\n") > 1 else [content]
    at = rng.randrange(len(parts))
    tree = json.loads(parts[at])
    places = list(_places(tree))
    if not places:
        raise ValueError
    holder, key = rng.choice(places)
    change = rng.randrange(4)
    if change == 0 and isinstance(holder, dict):
        del holder[key]
    elif change == 1 and isinstance(holder, dict):
        holder[rng.choice(["", "x", key + " ", key.upper()])] = holder.pop(key)
    else:
        holder[key] = rng.choice(ODD)
    parts[at] = json.dumps(tree).encode()
    return b"\n".join(parts) + b"\n"


def _places(tree: Any):
    for key in (
        tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    ):
        yield tree, key
        yield from _places(tree[key])


def _other_bytes(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    end = min(at + rng.choice([1, 1, 4, 30]), len(content))
    pieces = [
        b"", bytes([rng.randrange(256)]), b"\x00", b"\xff\xfe", b"{", b"]", b'"', b"\n", b",",
        struct.pack("<Q", rng.choice([0, 2**40, 2**63])), b"&a [*a]", b"!!python/object:x",
        b"999999999999999999999", b"- ", b"[" * 3000, content[at:end] * 3,
    ]  # fmt: skip
    kind = rng.randrange(4)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + content[end:]
    return content[:at] + rng.choice(pieces) + (content[at:] if kind == 2 else content[end:])


Attempt = Callable[[bytes], None]


def attempts(name: str, folder: pathlib.Path) -> Attempt:
    """Return what writes a content where its reader looks for it, and reads it."""
    file, _, read = READERS[name]
    (folder / "whole.yaml").write_text(WHOLE)
    directory = folder / "files"
    directory.mkdir(exist_ok=True)

    def attempt(content: bytes) -> None:
        for old in directory.iterdir():
            old.unlink()
        (directory / file).write_bytes(content)
        read(directory)

    return attempt


def faults(attempt: Attempt, content: bytes, num_damages: int) -> list[str]:
    """Return which damages raised anything but the errors of commands; print the slowest."""
    found, slowest = [], (0.0, 0)
    for number in range(num_damages):
        changed = damaged(content, number)
        began = time.perf_counter()
        try:
            with contextlib.suppress(UsageError, RunError):
                attempt(changed)
        except Exception as error:
            found.append(f"{number}: {type(error).__name__}: {error}: {changed[:500]!r}")
        slowest = max(slowest, (time.perf_counter() - began, number))
    print(
        f"{num_damages} damages, {len(found)} faults, the slowest took {slowest[0]:.3f} s", slowest
    )
    return found


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "num_damages", [SOME, pytest.param(MANY, marks=pytest.mark.campaign, id="campaign")]
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_get_a_sentence(tmp_path, name, num_damages):
    attempt, content = attempts(name, tmp_path), READERS[name][1]()
    attempt(content)  # undamaged, it is read: else all would be refused for one reason
    assert faults(attempt, content, num_damages) == []


@pytest.mark.slow  # reads whole tokenizers
@pytest.mark.parametrize(
    "num_damages", [10, pytest.param(MANY, marks=pytest.mark.campaign, id="campaign")]
)
@pytest.mark.parametrize(
    "file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_tokenizers_get_a_sentence(tmp_path, file, num_damages):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "VOCAB_SIZE", 300)
        toy.save_tokenizer(tmp_path)
    if not (tmp_path / file).exists():
        (tmp_path / file).write_text('{"eos_token_id": [1, 2]}\n')
    content = (tmp_path / file).read_bytes()

    def attempt(changed: bytes) -> None:
        (tmp_path / file).write_bytes(changed)
        end_ids(load_tokenizer(tmp_path), tmp_path)

    attempt(content)
    assert faults(attempt, content, num_damages) == []
