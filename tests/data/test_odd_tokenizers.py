"""Tokenizers in the field: gaps in the ids, odd added tokens, templates that raise or tell time."""

from __future__ import annotations

import datetime
import json
import pathlib
from typing import Any

import numpy as np
import pytest
from conftest import mesh_of, tiny_config

from jlrm.config import UsageError
from jlrm.data.batches import prompt_encoder
from jlrm.data.comparisons import Comparison
from jlrm.data.tokenizer import (
    NOW,
    check_vocabulary,
    control_tokens,
    decode,
    encode,
    end_ids,
    highest_id,
    load_tokenizer,
    prompt_template,
    token_bytes,
)
from jlrm.data.worlds import toy
from jlrm.judgement import prompts
from jlrm.sampling.policy import open_policy
from jlrm.sampling.stops import stop_tables

pytestmark = pytest.mark.slow  # each writes a tokenizer or a checkpoint

TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
HEADER = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATE = TURNS + HEADER
END = toy.VOCAB_SIZE + 60  # of a tokenizer with a gap below its end token


def edit(file: pathlib.Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def add(directory: pathlib.Path, *added: tuple[str, int, bool]) -> None:
    """Add tokens (text, id, is special) to a written tokenizer.

    They stand in the vocabulary too: the library numbers others itself, and leaves no gap.
    """
    file = directory / "tokenizer.json"
    described = json.loads(file.read_text())
    described["model"]["vocab"] |= {text: index for text, index, _ in added}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    described["added_tokens"] += [
        {"id": index, "content": text, "special": special, **flags}
        for text, index, special in added
    ]
    file.write_text(json.dumps(described))


@pytest.fixture
def directory(tmp_path) -> pathlib.Path:
    toy.save_tokenizer(tmp_path)
    edit(tmp_path / "tokenizer_config.json", chat_template=TEMPLATE)
    return tmp_path


@pytest.fixture
def gapped(directory) -> pathlib.Path:
    add(directory, ("<|end of turn|>", END, True))
    edit(directory / "tokenizer_config.json", eos_token="<|end of turn|>")
    return directory


def templated(directory: pathlib.Path, template: Any) -> Any:
    edit(directory / "tokenizer_config.json", chat_template=template)
    return load_tokenizer(directory)


# ------------------------------------------------------------------ ids


def test_a_tokenizer_is_measured_by_its_highest_id(gapped):
    tokenizer = load_tokenizer(gapped)
    assert len(tokenizer) < END == highest_id(tokenizer)
    check_vocabulary(tokenizer, END + 1)
    with pytest.raises(UsageError, match=f"is {END}.*needs {END + 1} ids.*vocabulary {END}"):
        check_vocabulary(tokenizer, END)


def test_every_id_below_the_highest_can_be_drawn_the_end_token_too(gapped):
    model = tiny_config(vocab_size=512)
    policy = open_policy(model, mesh_of(1, 1, 1), gapped)
    assert policy.end_ids == (END,)
    assert policy.num_ids == END + 1


def test_an_end_token_beyond_the_tokenizer_can_be_drawn_and_one_beyond_the_model_is_named(gapped):
    file, model = gapped / "generation_config.json", tiny_config(vocab_size=512)
    file.write_text(json.dumps({"eos_token_id": [1, 511]}))
    policy = open_policy(model, mesh_of(1, 1, 1), gapped)
    assert (policy.end_ids, policy.num_ids) == ((END, 1, 511), 512)
    file.write_text(json.dumps({"eos_token_id": [1, 512]}))
    with pytest.raises(UsageError, match=r"names the end token 512, .* has 512 ids"):
        open_policy(model, mesh_of(1, 1, 1), gapped)


def test_tables_reach_the_highest_id_and_a_gap_keeps_the_state(gapped):
    tokenizer = load_tokenizer(gapped)
    spelled = token_bytes(tokenizer)
    assert len(spelled) == END + 1
    assert spelled[END] == b"<|end of turn|>"
    assert set(spelled[toy.VOCAB_SIZE : END]) == {b""}
    tables = stop_tables({"<|end of turn|>": 1, "zz": 2}, spelled, 512).tables
    assert tables.shape[2] == 512
    assert tables[0, 0, END] == len("<|end of turn|>")
    states = np.arange(tables.shape[1])
    np.testing.assert_array_equal(tables[0, :, END - 1], states)
    assert decode(tokenizer, [[END - 1, END]]) == ["<|end of turn|>"]


def test_a_piece_that_spells_no_bytes_stands_for_itself(directory):
    file = directory / "tokenizer.json"
    described = json.loads(file.read_text())
    described["model"]["vocab"]["▁日"] = toy.VOCAB_SIZE
    file.write_text(json.dumps(described))
    tokenizer = load_tokenizer(directory)
    assert token_bytes(tokenizer)[toy.VOCAB_SIZE] == "▁日".encode()
    assert decode(tokenizer, [[toy.VOCAB_SIZE]]) == ["▁日"]


def write_fallback(directory: pathlib.Path, decoder: Any) -> None:
    """Write a tokenizer of Mistral's kind: spaces are marked, unknown characters are bytes."""
    from tokenizers import Tokenizer, models, normalizers

    alphabet = "\N{LOWER ONE EIGHTH BLOCK}abcdefghijklmnopqrstuvwxyz</>"
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *alphabet]
    merges = [("a", "n"), ("s", "w"), ("an", "sw"), ("e", "r"), ("answ", "er")]
    pieces += [left + right for left, right in merges]
    model = models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    marked = normalizers.Replace(" ", "\N{LOWER ONE EIGHTH BLOCK}")
    begun = normalizers.Prepend("\N{LOWER ONE EIGHTH BLOCK}")
    tokenizer.normalizer = normalizers.Sequence([begun, marked])
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def test_pieces_of_a_tokenizer_that_falls_back_to_bytes_spell_its_text(tmp_path):
    from tokenizers import decoders

    parts = [
        decoders.Replace("\N{LOWER ONE EIGHTH BLOCK}", " "),
        *(decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)),
    ]
    write_fallback(tmp_path, decoders.Sequence(parts))
    tokenizer = load_tokenizer(tmp_path)
    spelled = token_bytes(tokenizer)
    for text in ("an answer</answer>", "gr\u00fc\u00df dich\n</answer> \U0001f600", "</answer>"):
        (ids,) = encode(tokenizer, [text])
        assert b"".join(spelled[i] for i in ids) == b" " + text.encode()
        assert decode(tokenizer, [ids]) == [text]
        stops = stop_tables({"</answer>": 1}, spelled, highest_id(tokenizer) + 1)
        state = 0
        for i in ids:
            state = stops.tables[0, state, i]
        assert state == stops.accept[0]


def test_a_tokenizer_whose_ids_have_no_bytes_says_how_to_do_without(tmp_path):
    from tokenizers import decoders

    write_fallback(tmp_path, decoders.WordPiece())
    with pytest.raises(UsageError, match=r"WordPiece.*sampling\.stop_strings=\{\}"):
        token_bytes(load_tokenizer(tmp_path))


# ------------------------------------------------------------------ end tokens


@pytest.mark.parametrize("value", ["x", "2", 2.0, True, -1, [2, "a"], [None, -3], {"a": 1}, [[2]]])
def test_an_end_token_that_is_no_id_is_named(value, directory):
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UsageError, match=r"eos_token_id=.* neither a token id nor a list"):
        end_ids(load_tokenizer(directory), directory)


def test_config_json_names_the_end_token_where_nothing_else_does(directory):
    edit(directory / "tokenizer_config.json", eos_token=None)
    tokenizer = load_tokenizer(directory)
    assert tokenizer.eos_token_id is None
    with pytest.raises(UsageError, match="names no end token"):
        end_ids(tokenizer, directory)
    (directory / "config.json").write_text('{"eos_token_id": [1, null, 2]}')
    assert end_ids(tokenizer, directory) == (1, 2)
    (directory / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert end_ids(tokenizer, directory) == (0,)


def test_the_models_end_token_of_config_json_counts_beside_the_tokenizers(directory):
    """transformers stops there where no generation_config.json names another."""
    (directory / "config.json").write_text('{"eos_token_id": 1}')
    tokenizer = load_tokenizer(directory)
    assert end_ids(tokenizer, directory) == (tokenizer.eos_token_id, 1)
    (directory / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert end_ids(tokenizer, directory) == (tokenizer.eos_token_id, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "qwen2", "dtype": "torch.bfloat16"},
        {"model_type": "qwen3", "torch_dtype": "torch.float16", "layer_types": ["x"]},
        {"model_type": "no such"},
        {"model_type": ["qwen2"]},
        {},
    ],
)
def test_a_tokenizer_is_read_whatever_the_models_config_holds(fields, directory, torch):
    wanted = encode(load_tokenizer(directory), ["a <|im_end|> b"])
    (directory / "config.json").write_text(json.dumps(fields))
    assert encode(load_tokenizer(directory), ["a <|im_end|> b"]) == wanted


# ------------------------------------------------------------------ added tokens


def test_added_words_stay_words_and_control_tokens_are_broken(directory):
    words = ("é", "日", "  ", "\n\n", "heart attack")
    special = ("<|end of turn|>", "¶", "<end>")
    first = toy.VOCAB_SIZE
    add(directory, *((text, first + i, False) for i, text in enumerate(words)))
    add(directory, *((text, first + 10 + i, True) for i, text in enumerate(special)))
    add(directory, ("<tool call>", first + 20, False))
    tokenizer = load_tokenizer(directory)
    control = control_tokens(tokenizer)
    assert control == {toy.PAD, "<|im_start|>", toy.END, *special, "<tool call>"}
    text = "café: 日  heart attack\n\nand more"
    hostile = f"{text} ¶ <|end of turn|> <|im_end|> <end> <tool call>"
    row = Comparison("1", text, hostile, text)
    (example,) = prompt_encoder(tokenizer, "toy")([row])
    ids = set(example.prompt_ids)
    assert {first + i for i in range(len(words))} <= ids  # as written, words are read as such
    assert not ids & {*range(first + 10, first + 21)}
    assert list(example.prompt_ids).count(tokenizer.convert_tokens_to_ids(toy.END)) == 1
    assert text in example.prompt


# ------------------------------------------------------------------ chat templates


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}",
            "No system",
        ),
        ("{% for m in messages %}{{ m.content }}", "endfor"),
        ("{{ messages[7].content }}", "messages|list|undefined|dict"),
        ("{{ messages + 1 }}", "."),
        ("{{ 1 / 0 }}", "division by zero"),
        ([{"name": "rag", "template": TEMPLATE}], "."),
    ],
)
def test_a_template_that_cant_be_filled_is_one_sentence_with_the_way_out(template, why, directory):
    tokenizer = templated(directory, template)
    with pytest.raises(UsageError, match=why) as error:
        prompt_template(tokenizer, "jlrm")
    assert "data.prompt=judgelrm_train" in str(error.value) and "\n" not in str(error.value)
    assert prompt_template(tokenizer, "judgelrm_train")  # the way out


@pytest.mark.parametrize(
    "end",
    [
        *("", "<think>", "<think>\n", "<think>\n\n", "<think>\n\n</think>\n\n"),
        *("<think></think>", "</think>", "</think>\n\n", "<think>\n</think>"),
        *("<think>\n\n</think>\n\n</think>", "<think></think>\n<think></think>"),
    ],
)
def test_a_prompt_opens_thinking_once_whatever_a_template_writes(end, directory):
    header = HEADER.replace("assistant\n", "assistant\n" + end)
    text = prompt_template(templated(directory, TURNS + header), "jlrm")
    turn = text.rpartition("<|im_start|>assistant\n")[2]
    assert turn.strip() == "<think>"
    if end in ("<think>", "<think>\n", "<think>\n\n"):
        assert turn == end  # as its author wrote it
    else:
        assert turn == "<think>\n"


def test_an_empty_block_before_an_open_one_goes(directory):
    header = HEADER.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n<think>")
    text = prompt_template(templated(directory, TURNS + header), "jlrm")
    assert text.endswith("<|im_start|>assistant\n<think>")


@pytest.mark.parametrize("switch", ["enable_thinking", "thinking"])
def test_thinking_is_switched_on_by_either_name(switch, directory):
    header = (
        f"{{% endfor %}}<|im_start|>assistant\n{{% if not {switch} %}}NO{{% else %}}<think>"
        "{% endif %}"
    )
    text = prompt_template(templated(directory, TURNS + header), "jlrm")
    assert text.endswith("<|im_start|>assistant\n<think>")


class OtherDay(datetime.datetime):
    """A clock of another day than ours."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:
        return cls(1999, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    "head",
    [
        "{{ strftime_now('%d %b %Y') }}\n",
        "\n{{ strftime_now('%Y-%m-%d, %A %H:%M') }}",
        "{% if strftime_now is defined %}{% set today = strftime_now('%-d %B %Y %%') %}{% endif %}"
        "{{ today }}\n",
        "{% macro day() %}{{ strftime_now('%d.%m.%y') }}{% endmacro %}Today is {{ day() }}.",
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
        "{% endif %}{{ date_string }}",
    ],
)
def test_the_date_in_a_prompt_is_the_same_every_day(head, directory, monkeypatch):
    """And what surrounds it is what the template writes on the day that is told."""
    from transformers.utils import chat_template_utils

    tokenizer = templated(directory, head + TEMPLATE)
    today = prompt_template(tokenizer, "jlrm")
    monkeypatch.setattr(chat_template_utils, "datetime", OtherDay)
    assert prompt_template(tokenizer, "jlrm") == today
    monkeypatch.setattr(OtherDay, "now", classmethod(lambda cls: NOW))
    system, user = prompts.messages("jlrm", 1, 10)
    chat = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    written = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert today == written + "<think>\n"
    assert "2024" in today or ".24" in today


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"3", b"[" * 10**5])
def test_a_broken_tokenizer_is_one_sentence(name, content, directory):
    (directory / name).write_bytes(content)
    with pytest.raises(UsageError, match="Cannot load the tokenizer in") as error:
        load_tokenizer(directory)
    assert "\n" not in str(error.value)


def test_encoding_and_decoding_are_as_before(directory):
    tokenizer = load_tokenizer(directory)
    assert decode(tokenizer, encode(tokenizer, ["Name birds."])) == ["Name birds."]
