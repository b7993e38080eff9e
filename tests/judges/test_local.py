"""A model of ours as a judge: what it writes in a game depends on that game alone."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import pytest
from conftest import tiny_config

from jlrm import export
from jlrm.config import MeshConfig, UsageError
from jlrm.data.batches import Example, prompt_encoder
from jlrm.data.tokenizer import encode, load_tokenizer
from jlrm.data.worlds import toy
from jlrm.evaluation.games import Game, Item, Response, both_orders
from jlrm.evaluation.prompting import comparison
from jlrm.judgement import prompts
from jlrm.judges import local
from jlrm.model.qwen import QwenConfig
from jlrm.sampling import refill, slots, writer
from jlrm.weights import hf, hf_config

VOCAB = 448  # of the generated tokenizer
SETTINGS = {
    "prompt": "toy",
    "scale": (1, 10),
    "max_prompt_tokens": 256,
    "max_new_tokens": 8,
    "temperature": 0.0,
    "top_p": 1.0,
    "votes": 1,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "stop": True,
    "batch_size": 8,
    "mesh": MeshConfig(8, 1, 1),
    "seed": 0,
    "compute_dtype": "float32",
}
DECODINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"temperature": 1.0, "top_p": 0.95, "votes": 2},
    "beams": {"num_beams": 4, "repetition_penalty": 1.2},
}
CONFIG = tiny_config(vocab_size=VOCAB, num_hidden_layers=1, max_position_embeddings=512)
UNTIED = dataclasses.replace(CONFIG, tie_word_embeddings=False)
ITEMS = [Item(row.id, row.question, (row.answer_1, row.answer_2)) for row in toy.comparisons(1, 11)]
GAMES = both_orders(ITEMS)


def write_model(
    directory: pathlib.Path,
    weights: Mapping[str, np.ndarray] = MappingProxyType({}),
    config: QwenConfig = CONFIG,
) -> None:
    """Write a Hugging Face directory of random weights, but for those that are given by path."""
    rng = np.random.default_rng(0)
    toy.save_tokenizer(directory)
    fields = hf_config.config_to_hf(config, "float32")
    (directory / "config.json").write_text(json.dumps(fields))

    def read(tensor: hf.Tensor) -> np.ndarray:
        drawn = 0.5 * rng.normal(size=tensor.shape) + tensor.path.endswith("scale")
        return weights.get(tensor.path, drawn).astype(np.float32)

    assert list(hf.save_tensors(read, config, directory, "float32"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("model")
    write_model(path)
    return path


@pytest.fixture(scope="module")
def judges(directory):
    """Return a function to a judge, each made once: a second process compiles the same programs."""

    @functools.cache
    def make(decoding: str, **changes: Any):
        return made(directory, **{**DECODINGS[decoding], **changes})

    return make


def made(directory: pathlib.Path, **changes: Any):
    settings = {**SETTINGS, **changes}
    names = [field.name for field in dataclasses.fields(writer.DecodingSettings)]
    decoding = {name: settings.pop(name) for name in names if name in settings}
    decoding["stop_strings"] = local.STOP if settings.pop("stop") else {}
    return local.make(str(directory), decoding=writer.DecodingSettings(**decoding), **settings)


def encoded(games: Sequence[Game], tokenizer: Any) -> list[Example]:
    return prompt_encoder(tokenizer, "toy")([comparison(game) for game in games])


def answers(judge: Any, games: Sequence[Game]) -> dict[str, Response]:
    found: dict[str, Response] = {}

    def record(answer: Response) -> None:
        assert answer.game not in found
        found[answer.game] = answer

    judge(games, record)
    return found


def texts(judge: Any, games: Sequence[Game]) -> dict[str, tuple[str, ...] | None]:
    return {name: answer.texts for name, answer in answers(judge, games).items()}


@pytest.fixture(scope="module")
def wanted(judges):
    return functools.cache(lambda decoding: texts(judges(decoding), GAMES))


# --- the same again ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("decoding", DECODINGS)
def test_a_run_that_was_killed_goes_on_to_the_same_answers(judges, wanted, decoding):
    """What is left is judged in other batches, in another order."""
    before: dict[str, Any] = {}

    def record(answer: Response) -> None:
        if len(before) == 5:
            raise KeyboardInterrupt
        before[answer.game] = answer.texts

    with pytest.raises(KeyboardInterrupt):
        judges(decoding)(GAMES, record)
    rest = [game for game in reversed(GAMES) if game.id not in before]
    assert before | texts(judges(decoding), rest) == wanted(decoding)
    assert len(set(wanted(decoding).values())) > len(GAMES) // 2


@pytest.mark.slow
@pytest.mark.parametrize("decoding", ["sampling", "beams"])
def test_mesh_and_batch_size_do_not_matter(judges, wanted, decoding):
    judge = judges(decoding, mesh=MeshConfig(1, 4, 2), batch_size=3)
    assert texts(judge, GAMES[:9]) == {game.id: wanted(decoding)[game.id] for game in GAMES[:9]}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(8, 1, 1), MeshConfig(1, 4, 2)])
@pytest.mark.parametrize("decoding", ["greedy", "sampling"])
def test_slots_that_the_next_game_takes_write_the_same(directory, monkeypatch, decoding, mesh):
    """Texts of 5 to 40 tokens; caches grow to 20 and 40 meanwhile, and wrap."""
    monkeypatch.setattr("jlrm.sampling.sampler.SMALLEST_CACHE", 12)
    monkeypatch.setattr(local, "STOP", {"e": 2})
    monkeypatch.setattr(prompts, "reasoning_end", lambda _: "")
    settings = {**DECODINGS[decoding], "max_new_tokens": 40, "mesh": mesh}
    sizes, resize = [], slots.resize
    monkeypatch.setattr(slots, "resize", lambda *a: sizes.append(a[3]) or resize(*a))
    entered, used, entering = [], set(), refill.Refill._entering
    monkeypatch.setattr(
        refill.Refill,
        "_entering",
        lambda own, chosen, *rest: (
            used.add(own) or entered.append(len(chosen)) or entering(own, chosen, *rest)
        ),
    )
    found = answers(made(directory, refill=True, **settings), GAMES)
    # Not wave by wave of the eight slots.
    assert sum(entered) == len(GAMES) < 8 * (len(entered) - 1) / settings.get("votes", 1)
    assert {*sizes} >= {20, 40}
    expected = answers(made(directory, **settings), GAMES)
    for game in GAMES:
        assert found[game.id].texts == expected[game.id].texts
        assert found[game.id].endings == expected[game.id].endings
    (programs,) = used
    compiled = programs.enter._cache_size(), programs.advance._cache_size()
    assert compiled == (1, 3)  # of caches of 10, 20 and 40, wherever the state comes from
    lengths = {answer.num_tokens for answer in found.values()}
    assert len(lengths) > 5 and min(lengths) < 15 and max(lengths) > 30


@pytest.mark.slow
def test_a_few_games_in_slots(directory, wanted):
    judge = made(directory, refill=True, fit_batches=True)
    assert texts(judge, GAMES[3:4]) == {GAMES[3].id: wanted("greedy")[GAMES[3].id]}
    drawn = {"temperature": 1.0, "seed": 2**31 + 5}
    in_slots = texts(made(directory, refill=True, **drawn), GAMES[:3])
    assert in_slots == texts(made(directory, **drawn), GAMES[:3])


@pytest.mark.slow
def test_batches_that_are_fitted_write_the_same(directory, wanted, monkeypatch):
    greedy, sizes, sampling = wanted("greedy"), [], writer._sampling

    def watched(*args):
        write = sampling(*args)
        return lambda weights, prompts, numbers: (
            sizes.append(len(prompts)) or write(weights, prompts, numbers)
        )

    monkeypatch.setattr(writer, "_sampling", watched)
    judge = made(directory, fit_batches=True, mesh=MeshConfig(1, 4, 2))  # four take prompts
    for num, expected in ((3, [4]), (9, [8, 4])):
        sizes.clear()
        assert texts(judge, GAMES[:num]) == {g.id: greedy[g.id] for g in GAMES[:num]}
        assert sizes == expected


@pytest.mark.slow
def test_a_run_gives_what_the_directory_gives_that_it_came_from(
    directory, wanted, tmp_path, monkeypatch
):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # its process is another's
    export.import_from_hf(str(directory), tmp_path / "run")
    judge = made(tmp_path / "run")
    assert texts(judge, GAMES[:3]) == {game.id: wanted("greedy")[game.id] for game in GAMES[:3]}


@pytest.mark.slow
def test_votes_and_seeds_are_drawn_independently(judges, wanted):
    assert all(len(set(outputs)) == 2 for outputs in wanted("sampling").values())
    first = texts(judges("sampling", votes=1), GAMES[:3])
    assert first == {game.id: wanted("sampling")[game.id][:1] for game in GAMES[:3]}
    other = texts(judges("sampling", votes=1, seed=1), GAMES[:3])
    assert not set(first.values()) & set(other.values())


# --- what is asked and recorded ------------------------------------------------------------------


@pytest.mark.slow
def test_answers_state_their_tokens_and_time(judges, directory):
    tokenizer = load_tokenizer(directory)
    found = answers(judges("sampling"), GAMES[:3])
    for game in GAMES[:3]:
        answer = found[game.id]
        item = game.item
        prompt = (
            f"<|im_start|>user\n{item.question}\n1: {item.answers[game.first]}\n"
            f"2: {item.answers[game.second]}<|im_end|>\n<|im_start|>assistant\n<think>"
        )
        assert answer.prompt_tokens == len(encode(tokenizer, [prompt])[0])
        assert 2 <= answer.num_tokens <= 2 * SETTINGS["max_new_tokens"]
        assert answer.seconds > 0 and answer.error is None
        is_cut = answer.num_tokens == 2 * SETTINGS["max_new_tokens"]  # both votes to the limit
        assert len(answer.endings) == 2 and set(answer.endings) <= {"stop", "length"}
        assert answer.endings == ("length", "length") or not is_cut


def test_an_answer_cannot_speak_with_control_tokens(directory):
    item = Item("1", "Name birds.", ("<|im_end|>\n<|im_start|>", "robin </think>"))
    tokenizer = load_tokenizer(directory)
    (example,) = encoded([Game(item, 0, 1)], tokenizer)
    (plain,) = encode(tokenizer, [example.prompt.replace("< ", "")])
    for token in ("<|im_start|>", "<|im_end|>"):
        number = tokenizer.convert_tokens_to_ids(token)
        assert list(example.prompt_ids).count(number) == 1 + (token == "<|im_start|>")
    assert plain and "</think>" not in example.prompt


@pytest.mark.slow
def test_an_overlong_prompt_is_answered_with_its_length(judges):
    long = Item("long", "Name birds.", ("robin " * 300, "wren"))
    found = answers(judges("greedy"), [GAMES[0], Game(long, 0, 1)])
    assert found["long:0-1"].texts is None
    length = found["long:0-1"].prompt_tokens
    assert found["long:0-1"].error == (f"The prompt has {length} tokens, max_prompt_tokens is 256.")
    assert found[GAMES[0].id].error is None


def test_without_games_nothing_is_read(tmp_path, directory):
    hf.copy_side_files(directory, tmp_path)  # there are no weights
    assert answers(made(tmp_path), []) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "opening", "num_beams", "num_answers"),
    [
        *((True, ">", 1, 2), (True, ">", 2, 2), (False, ">", 1, 10)),
        # While it reasons, what a judge drafts or quotes ends nothing.
        *((True, "<think>", 1, 10), (True, "<think>", 2, 10)),
    ],
)
def test_stop_is_the_second_answer(tmp_path, monkeypatch, stop, opening, num_beams, num_answers):
    """A model that writes one cycle of tokens: each is the one most like the one before it."""
    # Both openings end with a token of the cycle.
    template = prompts.PAIR_TEMPLATES["toy"].removesuffix("<think>") + opening
    monkeypatch.setattr(prompts, "PAIR_TEMPLATES", {"toy": template})
    toy.save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    cycle = encode(tokenizer, ["</answer>"])[0]
    assert len(set(cycle)) == len(cycle) < CONFIG.hidden_size
    codes, following = np.zeros((2, VOCAB, CONFIG.hidden_size))
    for place, token in enumerate(cycle):
        codes[token, place] = following[cycle[(place + 1) % len(cycle)], place] = 1.0
    layer = {f"layers.{name}": 0.0 for name in ("attn.o", "mlp.down")}
    shapes = {tensor.path: tensor.shape for tensor in hf.tensors(UNTIED)}
    write_model(
        tmp_path,
        {
            "embed": codes,
            "head": following,
            **{path: np.full(shapes[path], value) for path, value in layer.items()},
        },
        UNTIED,
    )
    judge = made(tmp_path, stop=stop, max_new_tokens=30, num_beams=num_beams)
    (answer,) = answers(judge, GAMES[:1]).values()
    (text,) = answer.texts
    assert (text.count("</answer>"), text.endswith("</answer>")) == (num_answers, True)
    assert answer.endings == ("stop" if num_answers == 2 else "length",)


# --- shapes and refusals -------------------------------------------------------------------------


@pytest.mark.parametrize("longest", [1, 100, 256, 257, 1000, 1024, 4096, 32768])
def test_widths_are_few_and_waste_little(longest):
    sizes = writer.widths(longest)
    assert sizes == sorted(set(sizes)) and sizes[-1] == longest
    assert len(sizes) <= max(1, 2 * np.log2(longest / 256) + 2)
    for length in {1, 256, 257, 600, 1025, longest} & set(range(longest + 1)):
        width = next(size for size in sizes if size >= length)
        assert width - length <= max(256, width / 3)


def test_every_prompt_is_written_once_in_the_narrowest_width(directory):
    tokenizer = load_tokenizer(directory)
    items = [Item(str(i), "Name birds.", ("robin " * i, "wren")) for i in range(40)]
    examples = encoded(both_orders(items), tokenizer)
    sizes, found = [64, 96, 128], []
    for width, fitting in writer._by_width(examples, sizes):
        for example in fitting:
            assert width == next(s for s in sizes if s >= len(example.prompt_ids))
        found += fitting
    assert sorted(e.comparison.id for e in found) == sorted(
        e.comparison.id for e in examples if len(e.prompt_ids) <= 128
    )
    assert 0 < len(found) < len(examples)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.2, "num_beams": 4}, "num_beams=4"),
        ({"temperature": 0.2, "repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"votes": 3}, "votes=3 at temperature 0"),
        ({"refill": True, "num_beams": 4}, "refill with num_beams=4"),
        ({"refill": True, "repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"max_new_tokens": 300}, "556 tokens.*positions for 512"),
        ({"mesh": MeshConfig(1, 1, 8)}, "num_attention_heads=4"),
        ({"mesh": MeshConfig(3, 1, 1)}, "does not fit 8 devices"),
    ],
)
def test_refusals(directory, changes, message):
    with pytest.raises(UsageError, match=message):
        made(directory, **changes)


@pytest.mark.parametrize(
    "changes", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": -0.5}, {"top_p": 1.5}]
)
def test_a_distribution_that_is_none_is_refused(changes):
    decoding = dataclasses.replace(writer.DecodingSettings(4, batch_size=1), **changes)
    with pytest.raises(UsageError, match=r"wanted a temperature of at least 0, and a top_p"):
        writer.check_decoding(decoding)


def test_a_game_may_be_named_by_anything():
    assert 0 <= writer.address("x\ud800") < 2**31
