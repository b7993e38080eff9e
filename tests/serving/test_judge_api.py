"""`Judge` from Python: what it says of pairs, streams, tables and rankings, and how it fails."""

from __future__ import annotations

import asyncio
import dataclasses
import http.server
import json
import subprocess
import sys
import threading

import pytest
from judges.test_local import CONFIG, write_model

import jlrm
from jlrm.config import UsageError
from jlrm.evaluation.games import Response
from jlrm.evaluation.reading import Reader
from jlrm.judges import options
from jlrm.serving import judge as judge_module
from jlrm.serving.judge import Judge

BEST = "better"  # the answer that the judge below prefers


def says(first: float, second: float, why: str = "r") -> str:
    return f"{why}</think><answer>{first}</answer><answer>{second}</answer>"


class Teller:
    """A backend that scores texts by a function of both, as shown."""

    def __init__(self, say=None):
        self.say, self.calls = say or self.fair, []

    @staticmethod
    def fair(first, second):
        return says(*(9 if text == BEST else 3 for text in (first, second)))

    def __call__(self, games, record):
        self.calls.append(len(games))
        for game in reversed(games):  # in any order
            shown = (game.item.answers[game.first], game.item.answers[game.second])
            said = self.say(*shown)
            if isinstance(said, Response):
                record(dataclasses.replace(said, game=game.id))
            else:
                record(Response(game.id, texts=(said,), endings=("stop",), num_tokens=5))


def judge_of(say=None) -> Judge:
    return Judge(Teller(say), Reader(), "teller")


def test_a_pair_is_judged_in_both_orders_and_scores_are_of_the_answers_as_given():
    result = judge_of().compare("q", "worse", BEST)
    assert (result.winner, result.scores, result.is_consistent) == (2, (3.0, 9.0), True)
    assert [game.order for game in result.games] == [(1, 2), (2, 1)]
    assert [game.winner for game in result.games] == [2, 2]
    assert result.confidence == pytest.approx(0.5 + 6 / 18)
    assert (result.reason, result.status, result.num_tokens) == ("r", "ok", 10)
    assert repr(result) == ("<answer 2, scores 3 and 9, confidence 0.83, both orders agree>")
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.winner = 1


def test_a_judge_that_follows_the_place_is_seen_to():
    result = judge_of(lambda first, second: says(8, 6)).compare("q", "a", "b")
    assert (result.winner, result.scores, result.is_consistent) == (0, (7.0, 7.0), False)
    assert result.confidence is None and "the orders disagree" in repr(result)


@pytest.mark.parametrize(("orders", "num_games"), [("both", 2), ("given", 1), ("random", 1)])
def test_orders(orders, num_games):
    judge = judge_of()
    results = judge.compare(["q"] * 9, [f"{i}" for i in range(9)], [BEST] * 9, orders=orders)
    assert [len(each.games) for each in results] == [num_games] * 9
    assert judge._backend.calls == [9 * num_games]  # all in one batch
    assert all(each.winner == 2 for each in results)
    shown = {each.games[0].order for each in results}
    assert len(shown) == (2 if orders == "random" else 1)
    if orders != "both":
        assert all(each.is_consistent is None for each in results)
    again = judge.compare(["q"] * 9, [f"{i}" for i in range(9)], [BEST] * 9, orders=orders)
    assert [each.games[0].order for each in again] == [each.games[0].order for each in results]


def test_what_can_not_be_read_has_a_status_and_raises_nothing():
    def say(first, second):
        return "I like both." if first == "a" else says(2, 7)

    result = judge_of(say).compare("q", "a", "b")
    assert result.games[0].winner is None and result.games[0].status == "no_answer"
    assert (result.winner, result.status, result.is_consistent) == (1, "no_answer", False)
    failed = judge_of(lambda *shown: Response("", error="timeout")).compare("q", "a", "b")
    assert (failed.winner, failed.status, failed.error) == (None, "unjudged", "timeout")
    refused = judge_of(lambda *shown: Response("", refused="filter")).compare("q", "a", "b")
    assert (refused.winner, refused.status, refused.error) == (None, "refused", "filter")


def test_verdicts_without_scores():
    longer = Judge.load("longer", backend="heuristic")
    assert longer.compare("q", "a", "bbb").winner == 2
    first = Judge.load("first", backend="heuristic").compare("q", "a", "b")
    assert (first.winner, first.scores, first.is_consistent) == (0, None, False)


def test_streams_keep_their_order(monkeypatch):
    monkeypatch.setattr(judge_module, "STREAM_PAIRS", 2)
    judge, taken = judge_of(), []

    def pairs():
        for number in range(5):
            taken.append(number)
            texts = ("q", BEST, "x") if number % 2 else ("q", "x", BEST)
            yield dict(zip(("question", "answer_1", "answer_2"), texts, strict=True))

    results = judge.compare_each(pairs())
    assert next(results).winner == 2 and taken == [0, 1]  # no more than is asked together
    assert [each.winner for each in results] == [1, 2, 1, 2]
    assert [each.winner for each in judge.compare_each([("q", BEST, "x")])] == [1]


def test_a_table_in_and_columns_out():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"question": ["q", "q"], "answer_1": [BEST, "x"], "answer_2": ["x", BEST], "more": [1, 2]}
    )
    judged = judge_of().compare(frame)
    assert [*judged["winner"]] == [1, 2] and [*judged["more"]] == [1, 2]
    assert [*judged["judged_score_1"]] == [9, 3] and judged["is_consistent"].all()
    assert "winner" not in frame.columns
    with pytest.raises(UsageError, match="no column 'answer_2'"):
        judge_of().compare(frame.drop(columns="answer_2"))


def test_results_become_plain_and_show_no_html_of_a_judge():
    say = "<script>alert(1)</script>"
    result = judge_of(lambda *shown: says(9, 1, say)).compare("q", "a", "b")
    assert json.loads(json.dumps(result.to_dict()))["games"][0]["texts"][0].startswith(say)
    page = result._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page
    ranking = judge_of().rank("q", ["a", BEST])
    assert "<table>" in ranking._repr_html_() and ranking.to_dict()["order"] == [2, 1]


def test_answers_are_ranked():
    quality = {"bad": 2, "fair": 5, "good": 8, BEST: 10}
    judge = judge_of(lambda first, second: says(quality[first], quality[second]))
    ranking = judge.rank("q", ["fair", BEST, "bad", "good"])
    assert ranking.order == (2, 4, 1, 3) and ranking.wins == (2.0, 6.0, 0.0, 4.0)
    assert judge._backend.calls == [12] and len(ranking.pairs) == 6
    assert sum(ranking.strengths) == pytest.approx(0, abs=1e-9)
    both = zip(ranking.strengths, ranking.intervals, strict=True)
    assert all(low < strength < high for strength, (low, high) in both)
    with pytest.raises(UsageError, match="two answers at least"):
        judge.rank("q", ["one"])


def test_an_audit_against_labels():
    questions, ones, twos = ["q", "q", "p"], [BEST, "x", "long answer"], ["x", BEST, BEST]
    found = judge_of().audit(questions, ones, twos, [1, 1, None])
    assert (found.rows, found.agreement.percent, found.recall["answer 1"].n) == (2, 50.0, 2)
    assert found.longer_judge.percent == 100.0 and found.ece is not None
    with pytest.raises(UsageError, match="labels are 1, 2, 0 or None, got 3"):
        judge_of().audit(["q"], ["a"], ["b"], [3])


def test_without_blocking_an_event_loop():
    async def ask():
        judge = judge_of()
        return await asyncio.gather(
            judge.acompare("q", BEST, "x"), judge.acompare("q", "x", BEST), judge.arank("q", "ab")
        )

    one, two, ranking = asyncio.run(ask())
    assert (one.winner, two.winner, len(ranking.order)) == (1, 2, 2)


def test_conversations_are_written_out():
    seen = []

    def say(first, second):
        seen.append((first, second))
        return says(7, 3)

    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    judge = judge_of(say)
    assert judge.compare(talk, "a", [{"role": "assistant", "content": "b"}], orders="given").winner
    assert seen == [("a", "b")]
    with pytest.raises(UsageError, match="every message must have a text"):
        judge.compare("q", "a", [{"role": "assistant", "content": None}])


def test_threads_wait_for_one_another():
    running, most = [0], [0]

    def say(first, second):
        running[0] += 1
        most[0] = max(most[0], running[0])
        running[0] -= 1
        return Teller.fair(first, second)

    judge, results = judge_of(say), {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: judge.compare("q", BEST, str(i))}))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and all(each.winner == 1 for each in results.values())


def test_a_model_that_is_no_judge_is_said_so_once(caplog):
    judge = judge_of(lambda *shown: "Both are nice.")
    judge.compare("q", "a", "b")
    assert not caplog.records
    judge.compare(["q"] * 3, ["a"] * 3, ["b"] * 3)
    judge.compare(["q"] * 3, ["a"] * 3, ["b"] * 3)
    (record,) = caplog.records
    assert "teller wrote no verdict in 8 of 8 games" in record.message


@pytest.mark.parametrize(
    ("call", "says_"),
    [
        (lambda j: j.compare("q", "a"), "answer_2 must be text or a list of messages, got None"),
        (lambda j: j.compare(["q"], ["a"], ["b", "c"]), "2 of answer_2"),
        (lambda j: j.compare("q", "a", "b", orders="twice"), "orders='twice'"),
        (lambda j: list(j.compare_each([("q", "a")])), "got 2 texts"),
        (lambda j: Judge.load("m", votse=3), "Did you mean 'votes'"),
        (lambda j: Judge.load("m", backend="verdicts"), "no backend 'verdicts'"),
        (lambda j: Judge.load("longest", backend="heuristic"), "no heuristic"),
        (lambda j: Judge.load("http://127.0.0.1:9/v1"), "names no model"),
        (lambda j: Judge.load("/nowhere/at/all"), "/nowhere/at/all"),
    ],
)
def test_mistakes_are_one_sentence(call, says_):
    with pytest.raises(UsageError, match=says_):
        call(judge_of())


@pytest.mark.parametrize("names", [["only"], ["one", "two"]])
def test_an_endpoint_is_asked_for_its_model(names, monkeypatch):
    class Models(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers["Authorization"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"id": name} for name in names]}).encode())

        def log_message(self, *args):
            pass

    made, seen = [], []
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setattr(options, "make", lambda *args: made.append(args) or Teller())
    with http.server.HTTPServer(("127.0.0.1", 0), Models) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        if len(names) > 1:
            with pytest.raises(UsageError, match="serves one, two: name one of them"):
                Judge.load(url)
        else:
            assert Judge.load(url, votes=3).compare("q", BEST, "x").winner == 1
            backend, model, chosen, *_ = made[0]
            assert (backend, model, chosen["base_url"], chosen["votes"]) == (
                "openai",
                "only",
                url,
                3,
            )
            assert seen == ["Bearer k"]
            Judge.load("only", base_url=url)  # an address is an endpoint's
            assert made[1][:2] == ("openai", "only")
        server.shutdown()


@pytest.mark.slow
def test_a_model_of_ours(tmp_path):
    """Random weights write no verdict; that is a status, and the same pair gives the same text."""
    write_model(tmp_path)
    settings = {"prompt": "toy", "compute_dtype": "float32", "max_prompt_tokens": 256}
    judge = Judge.load(str(tmp_path), max_new_tokens=8, mesh=["fsdp=8"], **settings)
    first, again = (judge.compare("Name birds.", "robin", "wren") for _ in range(2))
    assert first == again and first.winner is None and first.status != "unjudged"
    assert len(first.games) == 2 and first.num_tokens > 0


def test_importing_it_takes_no_jax():
    code = "import sys; from jlrm import Judge; Judge.load('longer', backend='heuristic')"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'jax' not in sys.modules"], check=True)
    assert jlrm.Judge is Judge
    with pytest.raises(AttributeError, match="no attribute 'Jugde'"):
        _ = jlrm.Jugde


# --- one answer by itself -------------------------------------------------------------------------


class Scorer:
    """A backend that judges single answers by their length."""

    def __call__(self, games, record):
        for game in games:
            assert game.is_single and game.id.endswith(":0-0")
            (answer,) = game.item.answers
            text = f"so long</think><answer>{len(answer)}</answer>"
            record(Response(game.id, texts=(text,), endings=("stop",), num_tokens=7))


def test_answers_are_scored_one_by_one_and_in_lists():
    judge = Judge(Scorer(), Reader(), "scorer")
    one = judge.score("q", "abc")
    assert (one.score, one.reason, one.status, one.num_tokens) == (3.0, "so long", "ok", 7)
    assert repr(one) == "<score 3>" and "so long" in one._repr_html_()
    assert [each.score for each in judge.score(["q", "q"], ["ab", "a" * 10])] == [2.0, 10.0]
    assert judge.score("q", "a" * 11).status == "out_of_range"
    assert asyncio.run(judge.ascore("q", "abcd")).score == 4.0
    with pytest.raises(UsageError, match="2 of question, 1 of answer"):
        judge.score(["q", "q"], ["a"])
    with pytest.raises(UsageError, match="answer must be text"):
        judge.score("q", 3)


def test_a_heuristic_scores_nothing_by_itself():
    scored = Judge.load("longer", backend="heuristic").score("q", "a")
    assert scored.score is None and "scores none" in scored.error


def test_a_local_judge_scores_as_its_chat_template_asks(tmp_path):
    write_model(tmp_path, config=dataclasses.replace(CONFIG, max_position_embeddings=2048))
    judge = Judge.load(
        str(tmp_path), prompt="judgelrm_eval", max_prompt_tokens=1500, max_new_tokens=8
    )
    scored = judge.score("q", "a")
    assert scored.status == "cut" and scored.num_tokens == 8
    pair = judge.compare("q", "a", "b")  # the same judge, in its other form
    assert pair.games[0].texts != scored.texts
