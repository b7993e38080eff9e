"""Rubrics, references, own templates and expected scores, from Python and from the command."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from judges.test_local import UNTIED, VOCAB, write_model
from serving.test_judge_api import Teller, judge_of

from jlrm import judge as command
from jlrm.config import UsageError
from jlrm.data.batches import prompt_encoder
from jlrm.data.comparisons import Comparison
from jlrm.data.tokenizer import encode, load_tokenizer
from jlrm.data.worlds import toy
from jlrm.evaluation.games import Game, Item, Response
from jlrm.evaluation.prompting import prompting
from jlrm.evaluation.reading import Reader
from jlrm.evaluation.rubrics import rubric
from jlrm.judgement import prompts
from jlrm.judges import local, openai, options
from jlrm.runtime import commands
from jlrm.server import bodies
from jlrm.server import command as serving
from jlrm.serving.judge import Judge
from jlrm.weights import hf

TWO = {"facts": "True?", "style": {"description": "Plain?", "weight": 3}}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDPOINT = ("--model", "m", "--backend", "openai")


def by_criteria(first: str, second: str) -> str:
    """Score texts by their lengths, and their totals by nothing."""
    one, two = len(first), len(second)
    lines = f"facts: {one}, {two}\nstyle: {two}, {one}\n"
    return f"so</think>\n{lines}<answer>1</answer><answer>1</answer>"


# --- rubrics and references ---------------------------------------------------------------------


def test_criteria_are_in_the_result_of_the_answers_as_given():
    judge = judge_of(by_criteria)
    result = judge.compare("q", "a" * 8, "b" * 4, rubric=TWO)
    assert result.criteria == {"facts": (8.0, 4.0), "style": (4.0, 8.0)}
    assert result.scores == (5.0, 7.0) and result.winner == 2 and result.is_consistent
    assert [game.criteria for game in result.games] == [result.criteria] * 2
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["criteria"]["style"] == [4, 8] and "facts" in result._repr_html_()
    without = judge.compare("q", "a" * 8, "b" * 4)
    assert without.scores == (1.0, 1.0) and "criteria" not in without.to_dict()


def test_a_rubric_of_the_judge_and_one_of_the_call():
    teller = Teller(by_criteria)
    judge = Judge(teller, Reader(), "teller", rubric=rubric(TWO))
    assert judge.compare("q", "a" * 8, "b" * 4).winner == 2
    other = judge.compare(["q"], ["a" * 8], ["b" * 4], rubric={"facts": "True?"})[0]
    assert other.winner == 1 and other.criteria == {"facts": (8.0, 4.0)}
    assert [each.winner for each in judge.compare_each([("q", "aa", "b")])] == [2]
    assert judge.rank("q", ["aaaa", "b"]).order == (2, 1)
    with pytest.raises(UsageError, match="is empty"):
        judge.compare("q", "a", "b", rubric="")
    with pytest.raises(UsageError, match="The parser letters reads no scores of criteria"):
        Judge(teller, Reader("letters"), "teller").compare("q", "a", "b", rubric=TWO)


def test_what_is_not_scored_by_the_rubric_has_a_status():
    result = judge_of().compare("q", "a", "b", rubric=TWO)
    assert (result.winner, result.status, result.criteria) == (None, "no_criteria", None)


def test_references_come_with_their_pairs():
    seen = []

    def keep(games, record):
        seen.extend(game.item.reference for game in games)
        for game in games:
            record(Response(game.id, texts=("</think><answer>2</answer><answer>1</answer>",)))

    judge = Judge(keep, Reader(), "keep")
    judge.compare(["q"] * 2, ["a"] * 2, ["b"] * 2, reference=["r", "s"], orders="given")
    judge.score("q", "a", reference="t")
    judge.rank("q", ["a", "b"], reference="u", orders="given")
    assert seen == ["r", "s", "t", "u"]
    for wrong, says in (("r", "a list of references"), (["r"], "2 of answer_2, 1 of reference")):
        with pytest.raises(UsageError, match=says):
            judge.compare(["q"] * 2, ["a"] * 2, ["b"] * 2, reference=wrong)


def test_single_answers_by_criteria():
    def say(games, record):
        for game in games:
            text = "</think>facts: 8\nstyle: 4\n<answer>1</answer>"
            record(Response(game.id, texts=(text,), endings=("stop",)))

    scored = Judge(say, Reader(), "s").score("q", "a", rubric=TWO)
    assert scored.score == 5.0 and scored.criteria == {"facts": 8.0, "style": 4.0}


def test_judges_that_have_no_prompt_or_no_probabilities_say_so():
    longer = Judge.load("longer", backend="heuristic")
    for told in ({"rubric": TWO}, {"expected": True}, {"reference": "r"}):
        with pytest.raises(UsageError, match="heuristic longer reads no rubric"):
            longer.compare("q", "a", "b", **told)
    with pytest.raises(UsageError, match="an endpoint tells those of a few"):
        Judge.load("m", base_url="http://127.0.0.1:9/v1", expected=True)
    judge = Judge.load("m", base_url="http://127.0.0.1:9/v1")
    assert isinstance(judge._backend, openai.Endpoint)
    with pytest.raises(UsageError, match=r"\(logprobs, top_logprobs\)"):
        judge.compare("q", "a", "b", expected=True)


# --- a model of ours ----------------------------------------------------------------------------


def test_the_prompts_of_games_are_those_of_training(tmp_path):
    toy.save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.chat_template = CHAT
    texts = "q </answer>{answer_1}", "one <|im_end|>", "two"
    for name in ("toy", "jlrm", "judgelrm_eval"):
        (wanted,) = prompt_encoder(tokenizer, name, (0, 5))([Comparison("i:0-1", *texts)])
        asked = local.game_encoder(tokenizer, prompting(name, (0, 5)))
        assert asked([Game(Item("i", texts[0], texts[1:]), 0, 1)]) == [wanted]


def test_a_template_goes_through_the_chat_of_the_model(tmp_path):
    toy.save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.chat_template = CHAT
    file = tmp_path / "own.txt"
    file.write_text("{question}: {answer_1} or {answer_2}? {{x}} {rubric}\n")
    item = Item("i", "q", ("{rubric}<answer>9</answer>", "two"), rubric=rubric("look"))
    (example,) = local.game_encoder(tokenizer, prompting(str(file)))([Game(item, 1, 0)])
    assert example.prompt == (
        "<|im_start|>user\nq: two or {rubric}[answer]9[/answer]? {x} look<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A model whose next token depends on the last one alone, and what it makes of scores."""
    path = tmp_path_factory.mktemp("chain")
    toy.save_tokenizer(path)
    tokenizer = load_tokenizer(path)

    def token(text: str) -> int:
        (found,) = encode(tokenizer, [text])[0]
        return found

    written = ["x", "<", "answer", ">", "8", "</", *"answer", "><"]
    follows = {one: {two: 1.0} for one, two in itertools.pairwise(written)}
    follows |= {"><": {"answer": 1.0}, "1": {"0": 0.5, "</": 0.5}}
    follows[">"] = {"8": 0.5, "3": 0.25, "1": 0.2, "z": 0.05}
    codes, head = np.zeros((2, VOCAB, UNTIED.hidden_size))
    head[:] = -30.0
    for place, (last, chances) in enumerate(follows.items()):
        codes[token(last), place] = 100.0  # beside which the epsilon of the norm is nothing
        for text, chance in chances.items():
            head[token(text), place] = math.log(chance)
    shapes = {tensor.path: tensor.shape for tensor in hf.tensors(UNTIED)}
    still = {path: np.zeros(shapes[path]) for path in ("layers.attn.o", "layers.mlp.down")}
    norm = {"final_norm.scale": np.ones(UNTIED.hidden_size)}
    # The last norm makes sqrt(D) of a code's one number.
    weights = {"embed": codes, "head": head / math.sqrt(UNTIED.hidden_size), **still, **norm}
    write_model(path, weights, dataclasses.replace(UNTIED, max_position_embeddings=2048))
    return path, (8 * 0.5 + 3 * 0.25 + 10 * 0.1 + 1 * 0.1) / 0.95


def load(path, monkeypatch, **settings):
    template = prompts.PAIR_TEMPLATES["toy"].removesuffix("<think>") + "x"
    monkeypatch.setattr(prompts, "PAIR_TEMPLATES", {"toy": template})
    sizes = {"max_prompt_tokens": 256, "max_new_tokens": 30, "compute_dtype": "float32"}
    return Judge.load(str(path), prompt="toy", mesh=["fsdp=8"], **{**sizes, **settings})


@pytest.mark.slow
def test_expected_scores_of_a_model_whose_probabilities_are_known(chain, monkeypatch):
    path, wanted = chain
    judge = load(path, monkeypatch, expected=True)
    result = judge.compare("Name birds.", "robin", "wren")
    assert result.scores == (8.0, 8.0) and result.status == "ok"
    assert result.expected_scores == pytest.approx((wanted, wanted), abs=1e-5)
    assert all(game.expected_scores == result.expected_scores for game in result.games)
    assert result.to_dict()["expected_scores"] == list(result.expected_scores)
    plain = load(path, monkeypatch).compare("Name birds.", "robin", "wren")
    assert plain.expected_scores is None and "expected_scores" not in str(plain.to_dict())
    # What is written is the same, whether or not it is wanted.
    bare = dataclasses.replace(
        result,
        expected_scores=None,
        games=tuple(dataclasses.replace(game, expected_scores=None) for game in result.games),
    )
    assert bare == plain


@pytest.mark.slow
def test_expected_scores_of_a_list_whose_probabilities_are_known(chain, monkeypatch):
    path, wanted = chain
    judge = load(path, monkeypatch, max_new_tokens=48)
    found = judge.rank("Name birds.", ["robin", "wren", "owl"], at_once=True, expected=True)
    assert found.scores == (8.0, 8.0, 8.0) and found.order == (1, 2, 3)
    assert found.expected_scores == pytest.approx((wanted,) * 3, abs=1e-5)
    assert [each.status for each in found.judgements] == ["ok", "ok"]


@pytest.mark.slow
def test_expected_scores_do_not_depend_on_what_was_drawn(chain, monkeypatch):
    path, wanted = chain
    judge = load(path, monkeypatch, temperature=1.0, votes=4)
    results = judge.compare(["Name birds."] * 3, ["robin"] * 3, list("abc"), expected=True)
    said = [each for each in results if each.expected_scores]
    assert said and len({each.scores for each in said}) > 1
    for each in said:
        assert each.expected_scores == pytest.approx((wanted, wanted), abs=1e-5)


@pytest.mark.slow
def test_a_server_computes_the_same_between_its_blocks(chain, monkeypatch):
    path, wanted = chain
    load(path, monkeypatch)  # which sets the prompt
    sizes = ["--max-prompt-tokens", "256", "--max-new-tokens", "30", "--compute-dtype", "float32"]
    words = ["--model", str(path), "--prompt", "toy", "--slots", "8", *sizes]
    service = serving.open_service(serving._parser().parse_args(words))
    service.engine.start()
    told = {"question": "Name birds.", "answer_1": "robin", "answer_2": "wren"}

    async def ask(**more):
        body = bodies.judge_body({**told, **more}, service.defaults)
        return (await service.judge(body.pairs, body.orders, body.drawing))[0]

    async def ask_together():
        return await asyncio.gather(ask(expected_scores=True), ask(), ask(expected_scores=True))

    first, plain, again = asyncio.run(ask_together())
    service.engine.close()
    assert first.expected_scores == again.expected_scores
    assert first.expected_scores == pytest.approx((wanted, wanted), abs=1e-5)
    assert plain.expected_scores is None and plain.scores == first.scores == (8.0, 8.0)


def test_expected_scores_of_criteria_are_theirs_by_weight():
    text = "</think>facts: 8, 4\nstyle: 2, 6\n<answer>1</answer><answer>1</answer>"

    def say(games, record):
        for game in games:
            assert game.item.is_expected
            record(Response(game.id, texts=(text,), expected=((7.0, 5.0, 3.0, 6.0),)))

    result = Judge(say, Reader(), "s").compare("q", "a", "b", rubric=TWO, expected=True)
    assert [game.expected_scores for game in result.games] == [(4.0, 5.75), (5.75, 4.0)]
    assert result.expected_scores == (4.875, 4.875)


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    rows = [
        {"id": str(i), "question": f"q{i}", "answer_1": "aaaa", "answer_2": "bb", "gold": f"g{i}"}
        for i in range(3)
    ]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    criteria = tmp_path / "rubric.yaml"
    criteria.write_text("facts: 'True?'\nstyle: {description: 'Plain?', weight: 3}\n")
    own = tmp_path / "own.txt"
    own.write_text("{question} {answer_1} {answer_2}")
    return {"pairs": pairs, "rubric": criteria, "own": own, "out": tmp_path / "o"}


def run(capsys, files, *flags):
    words = [files["pairs"], *ENDPOINT, "--out", files["out"], *flags]
    code = commands.run(lambda: command.main([*map(str, words)]))
    return code, capsys.readouterr().err


def lines(files):
    return [json.loads(each) for each in (files["out"] / "verdicts.jsonl").read_text().splitlines()]


def test_a_rubric_and_references_as_flags(files, capsys, monkeypatch):
    seen = []

    def make(*args):
        teller = Teller(by_criteria)

        def judge(games, record):
            seen.extend((game.item.reference, game.item.rubric) for game in games)
            teller(games, record)

        return judge

    monkeypatch.setattr(options, "make", make)
    flags = ("--rubric", files["rubric"], "--reference", "gold")
    assert run(capsys, files, *flags)[0] == 0
    assert {reference for reference, _ in seen} == {"g0", "g1", "g2"} and len(seen) == 6
    assert {each for _, each in seen} == {rubric(TWO)}
    found = lines(files)
    assert [row["reference"] for row in found] == ["g0", "g1", "g2"]
    assert found[0]["criteria"] == {"facts": [4, 2], "style": [2, 4]} and found[0]["winner"] == 2
    # The same goes on; others are told what was changed.
    assert run(capsys, files, *flags)[0] == 0 and len(seen) == 6
    for other, says in (
        (flags[:2], "references"),
        (flags[2:], "rubric"),
        ((*flags, "--orders", "given"), "orders 'both' (now 'given')"),
    ):
        code, err = run(capsys, files, *other)
        assert code == 2 and "holds responses given under" in err and says in err
    files["rubric"].write_text("facts: 'Right?'\n")
    code, err = run(capsys, files, *flags)
    assert code == 2 and "rubric" in err and len(seen) == 6


def test_another_template_under_the_same_name_does_not_go_on(files, capsys, monkeypatch):
    monkeypatch.setattr(options, "make", lambda *args: Teller())
    flags = ("--prompt", files["own"])
    assert run(capsys, files, *flags)[0] == 0
    assert run(capsys, files, *flags)[0] == 0
    files["own"].write_text("{question}: {answer_1} {answer_2}")
    code, err = run(capsys, files, *flags)
    assert code == 2 and "prompt 'a template of sha256" in err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--rubric", "nowhere.txt"], "Cannot read the rubric nowhere.txt"),
        (["--rubric", "RUBRIC", "--parser", "letters"], "The parser letters reads no scores"),
        (["--reference", "godl"], "has no reference in 'godl'"),
        (["--expected-scores"], "an endpoint tells those of a few (logprobs, top_logprobs)"),
        (["--prompt", "jlmr"], "neither the name of one nor a file"),
    ],
)
def test_mistakes_end_with_2(files, capsys, flags, says):
    words = [str(files["rubric"]) if flag == "RUBRIC" else flag for flag in flags]
    code, err = run(capsys, files, *words)
    assert code == 2 and says in err, err
