"""Rankings by one judgement of all answers, and judges that are asked as they were trained."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import http.server
import json
import pathlib
import re
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from judges.test_local import CONFIG, write_model
from serving.test_lists import lines, written

from jlrm import export
from jlrm import judge as command
from jlrm.config import RunError, UsageError
from jlrm.evaluation import prompting, rubrics
from jlrm.evaluation.games import Game, Item, Response
from jlrm.evaluation.reading import Reader
from jlrm.judgement import prompts
from jlrm.judges import local, options
from jlrm.runtime.settings import load, save
from jlrm.serving.asked import Listed, Pair
from jlrm.serving.judge import Judge
from jlrm.weights import hf

QUICKSTART = pathlib.Path(__file__).parent.parent.parent / "configs/quickstart.yaml"
WORTH = {"best": 9, "fair": 6, "poor": 2}


def blocks(*scores: object) -> str:
    return "".join(f"<answer>{score}</answer>" for score in scores)


def verdict(*scores: object) -> str:
    return f"r</think>{blocks(*scores)}"


class Lister:
    """A backend that says of each game what a function of its answers, as shown, says."""

    def __init__(self, say=lambda *shown: verdict(*(WORTH[each] for each in shown))):
        self.say, self.asked = say, []

    def __call__(self, games, record):
        self.asked += [game.id for game in games]
        for game in reversed(games):  # in any order
            said = self.say(*(game.item.answers[i] for i in game.shown))
            if isinstance(said, Response):
                record(dataclasses.replace(said, game=game.id))
            else:
                record(Response(game.id, texts=(said,), endings=("stop",), num_tokens=5))


def judge_of(backend, judging="pairs", read=Reader()) -> Judge:  # noqa: B008
    return Judge(backend, read, "m", judging=judging)


THREE = ["fair", "poor", "best"]


def test_all_answers_are_judged_at_once_as_given_and_in_reverse():
    lister = Lister()
    found = judge_of(lister).rank("q", THREE, at_once=True)
    assert lister.asked == ["0:0-1-2", "0:2-1-0"]
    assert (found.order, found.scores, found.wins) == ((3, 1, 2), (6, 2, 9), (2, 0, 4))
    assert (found.strengths, found.intervals, found.consistency) == ((), (), 1.0)
    assert [each.order for each in found.judgements] == [(1, 2, 3), (3, 2, 1)]
    assert [each.scores for each in found.judgements] == [(6, 2, 9)] * 2
    assert repr(found) == "<ranking 3 (9) > 1 (6) > 2 (2), the orders agree on 100 % of the pairs>"
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["judgements"][1]["texts"] == [verdict(9, 2, 6)]
    assert [pair["winner"] for pair in plain["pairs"]] == [1, 2, 2]
    assert "3 (9)" in found._repr_html_()


def test_orders_that_disagree_are_shown():
    # The answer shown first is the best, whichever it is.
    found = judge_of(Lister(lambda *shown: verdict(9, 5, 1))).rank("q", THREE, at_once=True)
    assert found.scores == (5, 5, 5) and found.consistency == 0.0
    assert "agree on 0 % of the pairs" in repr(found)
    assert all(pair.winner == 0 and not pair.is_consistent for pair in found.pairs)
    one = judge_of(Lister()).rank("q", THREE, at_once=True, orders="given")
    assert one.consistency is None and len(one.judgements) == 1
    assert repr(one) == "<ranking 3 (9) > 1 (6) > 2 (2)>"
    shown = {
        judge_of(Lister()).rank(f"q{i}", THREE, at_once=True, orders="random").judgements[0].order
        for i in range(9)
    }
    assert shown == {(1, 2, 3), (3, 2, 1)}


def test_one_order_that_can_not_be_read_leaves_the_other_and_none_no_ranking():
    texts = {"fair": verdict(6, 2), "best": verdict(9, 2, 6)}
    found = judge_of(Lister(lambda *shown: texts[shown[0]])).rank("q", THREE, at_once=True)
    assert found.order == (3, 1, 2) and found.consistency == 0.0
    assert [each.status for each in found.judgements] == ["too_few_answers", "ok"]
    nothing = judge_of(Lister(lambda *shown: "I like all.")).rank("q", THREE, at_once=True)
    assert nothing.order == () and nothing.scores == (None,) * 3 and nothing.wins == (0, 0, 0)
    assert repr(nothing) == "<no ranking, no_answer>"
    failed = judge_of(Lister(lambda *shown: Response("", error="timeout")))
    assert repr(failed.rank("q", THREE, at_once=True)) == "<no ranking, timeout>"


def test_votes_on_a_list_are_averaged_and_what_was_cut_is_no_verdict():
    texts = (verdict(8, 4, 2), verdict(6, 2, 4), verdict(10, 1))
    said = Response("", texts=texts, endings=("stop", "stop", "length"))
    found = judge_of(Lister(lambda *shown: said)).rank("q", THREE, at_once=True, orders="given")
    assert found.scores == (7, 3, 3)
    cut = Response("", texts=texts[2:], endings=("length",))
    found = judge_of(Lister(lambda *shown: cut)).rank("q", THREE, at_once=True)
    assert found.judgements[0].status == "cut"


def test_a_judge_of_lists_ranks_at_once_unless_told_otherwise():
    lister = Lister()
    judge = judge_of(lister, "lists")
    assert judge.rank("q", THREE).strengths == ()
    assert judge.rank("q", THREE, at_once=False).strengths != () and len(lister.asked) == 2 + 6
    assert judge.compare("q", "poor", "best").winner == 2  # a list of two is a pair
    with pytest.raises(UsageError, match=r"2 to 8 answers, got 9\. With at_once=False"):
        judge.rank("q", ["fair"] * 9)
    assert judge.rank("q", ["fair"] * 9, at_once=False).wins == (8,) * 9


CRITERIA = {"facts": "True?", "style": {"description": "Plain?", "weight": 3}}


def graded(*shown: str) -> str:
    """Score facts by worth, and style the other way round."""
    facts = [WORTH[each] for each in shown]
    lines = f"facts: {', '.join(map(str, facts))}\nstyle: {', '.join(str(10 - f) for f in facts)}"
    return f"r</think>{lines}\n{blocks(*facts)}"


def test_answers_are_judged_at_once_by_criteria():
    found = judge_of(Lister(graded)).rank("q", THREE, at_once=True, rubric=CRITERIA)
    assert found.scores == (4.5, 6.5, 3) and found.order == (2, 1, 3)  # means by weight, no totals
    both = {"facts": (6, 2, 9), "style": (4, 8, 1)}
    assert [each.criteria for each in found.judgements] == [both] * 2
    assert found.to_dict()["judgements"][1]["criteria"]["style"] == [4, 8, 1]
    two = judge_of(Lister(graded)).rank("q", THREE[1:], at_once=True, rubric=CRITERIA)
    assert two.scores == (6.5, 3) and two.judgements[1].criteria["facts"] == (2, 9)
    plain = judge_of(Lister()).rank("q", THREE, at_once=True, rubric="Is it true?")
    assert plain.scores == (6, 2, 9) and "criteria" not in plain.to_dict()["judgements"][0]


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ("facts: 8, 7\nstyle: 1, 2, 3", "no_criteria"),
        ("facts: 8, 7, 6", "no_criteria"),
        ("facts: 8, 7, 11\nstyle: 1, 2, 3", "out_of_range"),
    ],
)
def test_a_list_without_the_scores_of_all_criteria_is_unread(lines, status):
    judge = judge_of(Lister(lambda *shown: f"r</think>{lines}\n{blocks(8, 7, 6)}"))
    found = judge.rank("q", THREE, at_once=True, rubric=CRITERIA)
    assert found.order == () and {each.status for each in found.judgements} == {status}
    assert found.judgements[0].criteria is None


def test_prompts_ask_for_criteria_of_lists_or_say_that_they_can_not():
    rubric = rubrics.rubric(CRITERIA)
    game = Game(Item("i", "q", tuple(THREE), rubric=rubric), 0, 1, (2,))
    asked = prompting.prompting("jlrm").text(game)
    assert asked.system is not None and "the scores of the three answers for it" in asked.system
    assert "score of Answer 1, score of Answer 2, score of Answer 3\n" in asked.system
    for name in ("jlrm_rubric", "toy"):
        with pytest.raises(UsageError, match=f"'{name}' has no place for a rubric: take jlrm"):
            prompting.prompting(name).text(game)


def test_a_judge_of_single_answers_scores_each_by_itself():
    lister = Lister(lambda answer: verdict(WORTH[answer]))
    judge = judge_of(lister, "single")
    found = judge.compare("q", "poor", "best")
    assert lister.asked == ["0:0-0", "0:1-1"]  # each once: it sees no order
    assert (found.winner, found.scores, found.is_consistent) == (2, (2, 9), None)
    assert found.num_tokens == 10 and len(found.games) == 1 and len(found.games[0].texts) == 2
    ranking = judge.rank("q", THREE)
    assert len(lister.asked) == 2 + 3
    assert (ranking.order, ranking.scores, ranking.consistency) == ((3, 1, 2), (6, 2, 9), None)
    assert judge.score("q", "fair").score == 6
    assert [each.winner for each in judge.compare(["q"] * 2, THREE[:2], THREE[1:])] == [1, 2]
    with pytest.raises(UsageError, match="m was trained to judge each answer alone: no at_once"):
        judge.rank("q", THREE, at_once=True)


def test_a_judge_of_single_answers_fails_where_one_of_them_does():
    def say(answer):
        return Response("", error="timeout") if answer == "poor" else verdict(WORTH[answer])

    judge = judge_of(Lister(say), "single")
    failed = judge.compare("q", "best", "poor")
    assert (failed.winner, failed.status, failed.error) == (None, "unjudged", "timeout")
    ranking = judge.rank("q", THREE)
    assert ranking.order == (3, 1) and ranking.scores == (6, None, 9)
    assert ranking.judgements[0].error == "timeout"


def test_criteria_and_expected_scores_of_single_answers_stand_side_by_side():
    def say(games, record):
        for game in games:
            long = len(game.item.answers[game.first])
            text = f"</think>facts: {long}\nstyle: 4\n<answer>1</answer>"
            places = Reader().places(text, "stop", game.item.rubric, 1)
            own = ((float(long), 5.0),) if game.item.is_expected and places else None
            record(Response(game.id, texts=(text,), endings=("stop",), expected=own))

    told = {"rubric": {"facts": "True?", "style": "Plain?"}, "expected": True}
    found = judge_of(say, "single").compare("q", "a" * 8, "b" * 2, **told)
    assert found.criteria == {"facts": (8.0, 2.0), "style": (4.0, 4.0)}
    assert found.scores == (6.0, 3.0) and found.expected_scores == (6.5, 3.5)


def test_expected_scores_part_answers_of_equal_scores():
    expected = {"fair": 7.6, "poor": 2.5, "best": 8.4}

    def say(*shown):
        text = verdict(*(2 if each == "poor" else 8 for each in shown))
        own = tuple(expected[each] for each in shown)
        return Response("", texts=(text, "cut"), endings=("stop", "length"), expected=(own, None))

    judge = judge_of(Lister(say), "lists")
    found = judge.rank("q", THREE, expected=True)
    assert found.order == (3, 1, 2) and found.scores == (8, 2, 8)
    assert found.expected_scores == (7.6, 2.5, 8.4)
    assert [each.expected_scores for each in found.judgements] == [(7.6, 2.5, 8.4)] * 2
    assert found.pairs[1].winner == 0  # what was written is a tie
    plain = judge_of(Lister(), "lists").rank("q", THREE)
    assert plain.expected_scores is None and "expected_scores" not in str(plain.to_dict())


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (verdict(9, 2, 6), (9, 2, 6)),
        (verdict("8/10", "seven", "**3**"), (8, 7, 3)),
        ("so<answer>1</answer> first</think>" + verdict(9, 2, 6), (9, 2, 6)),
        (verdict(1, 1, 1) + "\nNo, rather:\n" + blocks(9, 2, 6), (9, 2, 6)),
        ("</think>A draft is <answer>4</answer>. Then I say " + blocks(9, 2, 6), (9, 2, 6)),
        ("</think>" + blocks("score of Answer 1") + blocks(9, 2, 6), (9, 2, 6)),
        (verdict(9, 2), "too_few_answers"),
        (verdict(9), "one_answer"),
        ("r</think>9, 2, 6", "no_answer"),
        (verdict(9, 2, 6, 1), "too_many_answers"),
        (verdict(9, 2, "7-8"), "not_a_number"),
        (verdict(9, 2, 11), "out_of_range"),
    ],
)
def test_what_other_models_write_of_lists(text, read):
    scores, status = Reader().read_list(text, "stop", 3)
    assert (scores if status == "ok" else status) == read
    strict, status = Reader("strict").read_list(text, "stop", 3)
    assert strict == (read if text in (verdict(9, 2, 6),) else None), status


@pytest.fixture
def endpoint():
    """The address of a server that scores each answer that it is shown by its place."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            shown = asked["messages"][-1]["content"].count("[End of Answer ")
            told = {"content": f"so</think>{blocks(*range(9, 9 - shown, -1))}"}
            choice = {"message": told, "finish_reason": "stop"}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [choice]}).encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_server_is_asked_at_once(endpoint):
    found = Judge.load("m", base_url=endpoint).rank("q", ["a", "b", "c", "d"], at_once=True)
    assert [each.scores for each in found.judgements] == [(9, 8, 7, 6), (6, 7, 8, 9)]
    assert found.consistency == 0.0 and found.scores == (7.5,) * 4


@pytest.mark.slow
def test_a_model_of_ours_is_asked_at_once(tmp_path):
    write_model(tmp_path, config=dataclasses.replace(CONFIG, max_position_embeddings=2048))
    sizes = {"max_prompt_tokens": 200, "max_new_tokens": 8}
    judge = Judge.load(str(tmp_path), prompt="toy", compute_dtype="float32", **sizes)
    found = judge.rank("Name tools.", ["axe", "saw", "was", "drill"], at_once=True)
    assert [each.status for each in found.judgements] == ["cut"] * 2
    assert [each.num_tokens for each in found.judgements] == [8, 8]
    assert found.judgements[0].texts != found.judgements[1].texts
    with pytest.raises(UsageError, match="'judgelrm_eval' has no form for 3 answers"):
        Judge.load(str(tmp_path), prompt="judgelrm_eval", **sizes).rank("q", THREE, at_once=True)
    mine = tmp_path / "mine.txt"
    mine.write_text("{question} {answer_1} {answer_2}")
    own = Judge.load("m", base_url="http://127.0.0.1:9/v1", prompt=str(mine))
    with pytest.raises(UsageError, match="has no form for 3 answers at once: take the prompt jlrm"):
        own.rank("q", THREE, at_once=True)


def test_a_heuristic_and_a_game_of_a_list():
    found = Judge.load("longer", backend="heuristic").rank("q", THREE, at_once=True)
    assert found.order == () and "no list at once" in found.judgements[0].error
    game = Game(Item("i", "q", ("a", "b", "c")), 0, 1, (2,))
    assert (game.id, game.shown, game.num_characters) == ("i:0-1-2", (0, 1, 2), 4)
    assert game.swapped().id == "i:2-1-0" and game.swapped().swapped() == game


# --- runs are asked as they were trained ----------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> pathlib.Path:
    """A directory with a run of random weights for each setting of `data.judging`, by its name."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "hf").mkdir()
    write_model(folder / "hf")
    export.main(["--from-hf", str(folder / "hf"), "--out", str(folder / "pairs")])
    for judging in ("pairs", "single", "lists"):
        if judging != "pairs":
            shutil.copytree(folder / "pairs", folder / judging)
        save(load(QUICKSTART, [f"data.judging={judging}"]), folder / judging / "config.yaml")
    return folder


@pytest.fixture(scope="module")
def exports(runs) -> pathlib.Path:
    """A directory with the exports of the runs, by the same names."""
    folder = runs / "exports"
    for judging in ("pairs", "single", "lists"):
        given = ["--checkpoint", str(runs / judging), "--dtype", "float32"]
        export.main([*given, "--out", str(folder / judging)])
    return folder


@pytest.fixture(params=["runs", "exports"])
def trained(request) -> pathlib.Path:
    return request.getfixturevalue(request.param)


SIZES = {"max_prompt_tokens": 128, "max_new_tokens": 4, "compute_dtype": "float32"}


@pytest.mark.slow
def test_a_run_and_its_export_are_asked_as_it_was_trained(trained, runs):
    """Random weights write no verdict: what is asked shows in the games."""
    lists, pairs, single = (
        Judge.load(str(trained / name), **SIZES) for name in ("lists", "pairs", "single")
    )
    assert [len(each.rank("q", THREE).games) for each in (lists, pairs, single)] == [2, 6, 1]
    assert pairs.compare("q", "a", "b") == lists.compare("q", "a", "b")
    (alone,) = single.compare("q", "a", "b").games
    assert alone.texts == tuple(single.score("q", each).texts[0] for each in ("a", "b"))
    assert alone.texts[0] != pairs.compare("q", "a", "b").games[0].texts[0]
    source = written(runs / "pairs.jsonl", {"question": "q", "answer_1": "a", "answer_2": "b"})
    out = ["--out", str(runs / "out")]
    for flags in ([str(source)], [str(written(runs / "lists.jsonl", ROWS[0])), "--rank"]):
        with pytest.raises(UsageError, match=r"no pairs\. Give rows of one answer, with --s"):
            command.main([*flags, "--model", str(trained / "single"), *out])


def test_an_export_says_how_its_run_was_trained(exports, tmp_path, monkeypatch):
    file = exports / "single" / prompting.NAME
    wanted = {"prompt": "toy", "scale": [1, 10], "judging": "single", "version": 1}
    assert json.loads(file.read_text()) == wanted
    found = options.options(asking_of(exports / "single"))
    assert (found["prompt"], found["scale"]) == ("toy", [1, 10])
    for name in ("single", "lists"):
        assert options.judging_of(asking_of(exports / name)) == name
    # Imported again and exported again it is still known; a file less, and nothing is.
    again, back = tmp_path / "run", tmp_path / "again"
    export.main(["--from-hf", str(exports / "single"), "--out", str(again)])
    export.main(["--checkpoint", str(again), "--out", str(back)])
    assert prompting.as_trained(str(again)) == prompting.as_trained(str(back))
    assert json.loads((back / prompting.NAME).read_text()) == wanted
    resolved = []
    monkeypatch.setattr(hf, "resolve", lambda name, files: resolved.append((name, files)) or back)
    assert options.judging(options.JLRM, "org/name") == "single"
    assert resolved == [("org/name", ("judging.json",))]
    (back / prompting.NAME).unlink()
    assert options.judging(options.JLRM, str(back)) == "pairs"
    assert options.judging(options.OPENAI, str(exports / "single")) == "pairs"


def asking_of(model: pathlib.Path) -> argparse.Namespace:
    open_ones = dict.fromkeys(options.OPTIONS)
    return argparse.Namespace(
        backend=options.JLRM, model=str(model), single=None, at_once=None, **open_ones
    )


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ('{"judging": "singles"}', "judging='singles'. Did you mean 'single'"),
        ('{"prompt": "/etc/passwd"}', "prompt='/etc/passwd'. Known"),
        ('{"scale": [10, 1]}', "scale=[10, 1] does not rise. Export the run again"),
        ('{"scale": "ten"}', "must be a list"),
        ('{"version": 2}', "Update jlrm"),
        ("pairs", "is no JSON"),
    ],
)
def test_what_says_nothing_of_a_training_is_refused(told, says, tmp_path):
    (tmp_path / prompting.NAME).write_text(told)
    with pytest.raises(UsageError, match=re.escape(says)):
        Judge.load(str(tmp_path))


@pytest.mark.slow
def test_a_run_of_single_answers_is_served_as_it_was_trained(trained):
    pytest.importorskip("uvicorn")
    from jlrm.server import bodies, terminal
    from jlrm.server.bodies import Drawing

    heard, drawing, home = (
        [],
        Drawing(1, 0.0, 4, 0, True),
        Judge.load(str(trained / "single"), **SIZES),
    )
    with served(trained / "single", 4) as (service, args):
        pair = Pair("q", "a", "b")
        told = service.judge([pair], "both", drawing, lambda game, _: heard.append(game.shown))
        (found,) = asyncio.run(told)
        ranking = asyncio.run(service.rank(Listed("q", THREE), False, "both", drawing))
    assert set(heard) == {(0,), (1,)}
    assert found == home.compare("q", "a", "b") and ranking == home.rank("q", THREE)
    body = {"question": "q", "answers": THREE}
    assert not bodies.judge_body(body, service.defaults).at_once
    with pytest.raises(UsageError, match="single was trained to judge each answer alone: no at_o"):
        bodies.judge_body({**body, "at_once": True}, service.defaults)
    args.backend = options.JLRM
    with pytest.raises(UsageError, match="has seen no pairs"), terminal._opened(args):
        pass


@contextlib.contextmanager
def served(model: pathlib.Path, num_new: int) -> Iterator[Any]:
    """Open what serves a model."""
    from jlrm.server import command as serving

    flags = ["--model", str(model), "--slots", "2", "--max-new-tokens", str(num_new)]
    args = serving._parser().parse_args(
        [*flags, "--max-prompt-tokens", "128", "--compute-dtype", "float32"]
    )
    service = serving.open_service(args)
    service.engine.start()
    try:
        yield service, args
    finally:
        service.engine.close()


@pytest.mark.slow
def test_a_run_of_lists_is_served_as_it_was_trained(runs, monkeypatch):
    """A text ends behind as many scores as it has answers; here a letter stands for a score."""
    pytest.importorskip("uvicorn")
    from jlrm.server import bodies

    model, sizes = str(runs / "lists"), {**SIZES, "max_new_tokens": 64}
    whole = Judge.load(model, **sizes).rank("q", THREE).judgements
    texts = [text for each in whole for text in each.texts]
    letter = min("ano", key=lambda each: -min(text.count(each) for text in texts))
    assert all(text.count(letter) > 3 for text in texts)
    monkeypatch.setattr(local, "STOP", {letter: 2})
    monkeypatch.setattr(prompts, "reasoning_end", lambda name: "")
    home = Judge.load(model, **sizes)
    body = {"question": "q", "answers": THREE}

    def asked(**more):
        read = bodies.judge_body({**body, **more}, service.defaults)
        told = read.listed, read.at_once, read.orders, read.drawing
        return asyncio.run(service.rank(*told))

    with served(runs / "lists", 64) as (service, _):
        assert asked() == asked(at_once=True) == home.rank("q", THREE)
        assert asked(at_once=False) == home.rank("q", THREE, at_once=False)
        assert asked(orders="given").judgements == home.rank("q", THREE, orders="given").judgements
        with pytest.raises(UsageError, match="at_once=False"):
            asked(answers=["a"] * 9)
        assert asked(expected_scores=True) == home.rank("q", THREE, expected=True)
    ended = [each.texts[0] for each in home.rank("q", THREE).judgements]
    assert [text.count(letter) for text in ended] == [3, 3]
    with pytest.raises(UsageError, match="at_once: wanted true or false, got 'yes'"):
        asked(at_once="yes")
    with pytest.raises(UsageError, match="at_once has no place beside answer"):
        bodies.judge_body({"question": "q", "answer": "a", "at_once": True}, service.defaults)


ROWS = (
    {"id": "one", "question": "q", "answers": THREE},
    {"id": "two", "question": "p", "answers": ["poor", "best"]},
    {"id": "many", "question": "r", "answers": ["fair"] * 9},
)


def test_lists_in_a_file_are_judged_at_once(tmp_path, capsys, runs, monkeypatch):
    monkeypatch.setattr(options, "make", lambda *_: Lister())
    source, out, made = (tmp_path / name for name in ("lists.jsonl", "out", "made.jsonl"))
    written(source, *ROWS)
    flags = [str(source), "--rank", "--model", str(runs / "lists"), "--out", str(out)]
    with pytest.raises(RunError, match="1 of 3 rows have no verdict"):
        command.main([*flags, "--make-pairs", str(made)])
    one, two, many = lines(out / "verdicts.jsonl")
    assert one["order"] == [3, 1, 2] and one["scores"] == [6, 2, 9] and one["id"] == "one"
    assert two["order"] == [2, 1] and len(two["judgements"]) == 2
    assert "2 to 8 where they are judged at once (--no-at-once takes more), got 9" in many["error"]
    assert "scores" not in many
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["games"], summary["unread"], summary["errors"]) == (4, 0, 1)
    assert summary["consistency"]["percent"] == 100 and summary["first"]["percent"] == 50
    assert "3 rankings by 4 games" in capsys.readouterr().out
    assert [(row["chosen"], row["rejected"]) for row in lines(made)] == [("best", "poor")] * 2
    with pytest.raises(UsageError, match="at_once"):  # other responses than those that lie there
        command.main([*flags, "--no-at-once"])
    command.main([*flags[:-1], str(tmp_path / "apart"), "--no-at-once"])
    assert lines(tmp_path / "apart" / "verdicts.jsonl")[2]["wins"] == [8.0] * 9
    with pytest.raises(UsageError, match="--at-once has an effect with --rank alone"):
        command.main([str(source), "--model", "m", "--at-once"])
