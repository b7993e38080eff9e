"""The command from end to end: recorded verdicts, answers that are kept, stops, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
from judges.test_local import write_model

from jlrm import evaluate, judge
from jlrm.config import RunError, UsageError
from jlrm.data.comparisons import write_comparisons
from jlrm.data.worlds import toy
from jlrm.evaluation.benchmarks.registry import BENCHMARKS
from jlrm.evaluation.games import Response
from jlrm.evaluation.journal import Journal
from jlrm.judges import options
from jlrm.judges.paid import Spending
from jlrm.reports import results_file
from jlrm.reports.results_file import SubsetResult
from jlrm.runtime import commands

ROOT = pathlib.Path(__file__).parent.parent
GPT = "dataset=judgebench,response_model=gpt-4o-2024-05-13"
GOOD, BAD = (f"r</think><answer>{a}</answer><answer>{b}</answer>" for a, b in ((9, 2), (1, 8)))


def ran(capsys, *flags) -> dict:
    """Run the command with --json and return what it prints."""
    evaluate.main([*map(str, flags), "--json"])
    return json.loads(capsys.readouterr().out)


def failed(capsys, *flags) -> tuple[int, str]:
    """Run the command as the shell does; return its exit code and what it says."""
    code = commands.run(lambda: evaluate.main([*map(str, flags)]))
    return code, capsys.readouterr().err


@pytest.fixture
def pairs(tmp_path) -> pathlib.Path:
    """Twelve comparisons, of which answer 1 is the better one."""
    rows = [
        {"id": f"p{i}", "question": f"?{i}", "answer_1": "a", "answer_2": "b", "preference": 1}
        | {"source": "even" if i % 2 == 0 else "odd"}
        for i in range(12)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


class Judge:
    """A backend that can be told what to say, and when to stop."""

    def __init__(self, say=lambda game: GOOD if game.first == 0 else BAD, stop_after=None):
        self.asked, self.say, self.stop_after, self.stop = [], say, stop_after, None

    def __call__(self, games, record):
        for game in games:
            if self.stop_after is not None and len(self.asked) == self.stop_after:
                self.stop()
            self.asked.append(game.id)
            said = self.say(game)
            error = None if said else "timeout"
            record(Response(game.id, texts=(said,) if said else None, error=error, num_tokens=7))


@pytest.fixture
def judged_by(monkeypatch):
    """Put a judge in the place of a model that is called over the network."""

    def use(judge: Judge) -> Judge:
        monkeypatch.setattr(options, "make", lambda *args: judge)
        return judge

    return use


def model(pairs, out, *more) -> list[str]:
    flags = ["--model", "m", "--backend", "openai", "--benchmark", "pairs", "--data", str(pairs)]
    return [*flags, "--out", str(out), "--no-report", *more]


def test_each_answer_is_scored_alone(pairs, tmp_path, judged_by, capsys):
    """Answer 0 is worth 7 and answer 1 is worth 4, but every fourth is not read."""

    def say(game):
        assert game.is_single
        number = int(game.item.id.removeprefix("p"))
        if game.first and number % 4 == 0:
            return "why</think>none"
        return f"why</think><answer>{7 - 3 * game.first}</answer>"

    judge = judged_by(Judge(say))
    found = ran(capsys, *model(pairs, tmp_path / "o", "--single"))["pairs"]
    assert len(judge.asked) == len(set(judge.asked)) == 24  # not 48: an order is not asked
    assert (found["n"], found["parse_failures"]) == (12, 6)
    assert found["overall"] == 75.0 and found["consistency"] == 75.0
    kept = json.loads((tmp_path / "o" / "results.json").read_text())
    assert kept["judge"]["decoding"]["single"] is True
    assert kept["benchmarks"]["pairs"]["statuses"] == {"ok": 18, "no_answer": 6}
    ran(capsys, *model(pairs, tmp_path / "o", "--single"))
    assert len(judge.asked) == 24  # nothing is asked twice
    with pytest.raises(UsageError, match=r"single None \(now True\)|single True \(now None\)"):
        evaluate.main(model(pairs, tmp_path / "o"))
    other = ["--single", "--compare", str(tmp_path / "o")]
    ran(capsys, *model(pairs, tmp_path / "again", *other))
    compared = json.loads((tmp_path / "again" / "results.json").read_text())
    assert compared["benchmarks"]["pairs"]["comparison"]["difference"] == 0.0


def test_the_lines_of_jlrm_judge_are_verdicts_of_both_orders(pairs, tmp_path, capsys):
    heuristic = ["--backend", "heuristic", "--model", "longer"]
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for i, row in enumerate(rows):
        row[f"answer_{1 + (i % 3 == 0)}"] = "the longer one"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge.main([str(pairs), *heuristic, "--out", str(tmp_path / "judged"), "--no-report"])
    path, common = tmp_path / "judged" / "verdicts.jsonl", ("--benchmark", "pairs", "--data", pairs)
    capsys.readouterr()
    wanted = ran(capsys, *common, *heuristic, "--out", tmp_path / "o")["pairs"]
    assert ran(capsys, *common, "--verdicts", path)["pairs"] == wanted
    assert wanted["overall"] == pytest.approx(100 * 8 / 12) and wanted["consistency"] == 100
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:  # the same said in words, as each game showed the answers
        for game in line["games"]:
            scores = [9 if number == game["winner"] else 4 for number in game["order"]]
            game["texts"] = ["why</think>" + "".join(f"<answer>{n}</answer>" for n in scores)]
            game["winner"] = None
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ran(capsys, *common, "--verdicts", path)["pairs"]["overall"] == wanted["overall"]
    lines[0]["games"][0]["order"] = [1, 3]
    path.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(UsageError, match=r"line 1: the 'order' of a game must be"):
        evaluate.main([*map(str, common), "--verdicts", str(path)])


def test_another_judge_to_compare_with_is_looked_for_before_anything_is_asked(
    pairs, tmp_path, judged_by
):
    judge = judged_by(Judge(lambda game: GOOD))
    with pytest.raises(UsageError, match="There are no responses at"):
        evaluate.main(model(pairs, tmp_path / "o", "--compare", str(tmp_path / "nowhere")))
    assert not judge.asked


def test_two_that_write_to_one_place_do_not_ask_the_same_games(pairs, tmp_path, judged_by):
    judge = judged_by(Judge(lambda game: GOOD))
    header = {"of": "another evaluation"}
    with (
        Journal(tmp_path / "o" / "pairs", header).opened(),
        pytest.raises(UsageError, match="is written by another process"),
    ):
        evaluate.main(model(pairs, tmp_path / "o"))
    assert not judge.asked
    early = Journal(tmp_path / "o" / "pairs", header)
    with Journal(tmp_path / "o" / "pairs", header).opened() as kept:
        kept.record(Response("p1/0", texts=("said",)))
    with pytest.raises(UsageError, match="is written by another process"), early.opened():
        pass  # it has not read what is there by now


def test_a_game_of_single_answers_fails_where_one_of_them_does(pairs, tmp_path, judged_by, capsys):
    judge = judged_by(Judge(lambda game: None if game.first else GOOD))
    with pytest.raises(RunError, match=r"No item of pairs was judged\. The first game"):
        evaluate.main(model(pairs, tmp_path / "o", "--single"))
    assert len(judge.asked) == 24


# ------------------------------------------------------------------------------ recorded judges


@pytest.mark.slow
def test_pandalm_of_the_recorded_judgelrm_3b(reference, capsys, tmp_path):
    folder = reference / "pandalm"
    found = ran(
        capsys,
        *("--backend", "verdicts", "--verdicts", folder / "results_judgelrm3b.json"),
        *("--benchmark", "pandalm", "--data", folder / "testset-v1.json", "--out", tmp_path / "o"),
    )
    assert list(found) == ["pandalm"]
    row = found["pandalm"]
    metrics = {name: round(row[name], 2) for name in ("agreement", "precision", "recall", "f1")}
    assert metrics == {"agreement": 77.68, "precision": 74.26, "recall": 70.86, "f1": 72.12}
    assert (row["n"], row["parse_failures"], row["ties"]) == (999, 9, 73)
    assert row["policy"] == {
        **{"aggregation": "first_order", "order": "as_given"},
        **{"tie_credit": 0.0, "error_credit": "tie", "refused": "unjudged"},
    }
    kept = json.loads((tmp_path / "o" / "results.json").read_text())
    assert kept["judge"] == {
        **{"name": "results_judgelrm3b", "model": "results_judgelrm3b", "backend": "verdicts"},
        **{"prompt": "", "parser": "lenient", "decoding": {}},
    }
    entry = kept["benchmarks"]["pandalm"]
    assert set(entry) == {
        *("metrics", "intervals", "n", "parse_failures", "ties", "statuses", "policy", "subsets"),
        *("diagnostics", "published", "incomplete", "worst", "unread", "clusters"),
        *("design_effect", "groups"),
    }
    assert entry["clusters"] == row["clusters"] == 170
    assert 2.2 < entry["design_effect"] < 2.4
    assert entry["statuses"] == {"ok": 990, "out_of_range": 9} and not entry["incomplete"]
    low, high = entry["intervals"]["f1"]
    assert 65.5 < low < 67.5 and 76.5 < high < 78.5  # over items alone 68.6 to 75.7
    assert sum(subset["n"] for subset in entry["subsets"].values()) == 999
    assert len(entry["worst"]) == 20 and {row["credit"] for row in entry["worst"]} == {0.0}
    worst = {"item", "subset", "question", "answers", "label", "outputs", "scores", "credit"}
    assert set(entry["worst"][0]) == worst
    for name in ("report.html", "report.png", "model_card.md"):
        assert (tmp_path / "o" / name).stat().st_size


@pytest.mark.slow
def test_metrics_of_groups_are_those_of_their_items_alone(reference, capsys, tmp_path):
    """PandaLM's recorded 3B: a group is what --subset would leave, and all subsets the whole."""
    folder = reference / "pandalm"
    given = ["--verdicts", folder / "results_judgelrm3b.json", "--benchmark", "pandalm"]
    given += ["--data", folder / "testset-v1.json", "--parser", "judgelrm"]
    rows = json.loads((folder / "testset-v1.json").read_text())
    names = sorted({row["motivation_app"].strip().lower() for row in rows} - {"imdb"})
    named = {"Films": {"subsets": ["IMDB"], "share": 30}, "Others": {"subsets": names}}
    file = tmp_path / "groups.json"
    file.write_text(json.dumps({"groups": named}))
    out = tmp_path / "out"
    evaluate.main([*map(str, given), "--groups", str(file), "--out", str(out)])
    assert "Films" in capsys.readouterr().out
    found = results_file.read(out).benchmarks["pandalm"]
    films, others = found.groups["Films"], found.groups["Others"]
    assert (films.n, films.share, others.n, others.share) == (50, 30.0, 949, None)
    alone = ran(capsys, *given, "--subset", "imdb")["pandalm"]
    assert films.metrics["f1"] == alone["f1"] and films.metrics["f1"] is not None
    low, high = films.intervals["f1"]
    assert low is not None and high is not None and low < films.metrics["f1"] < high
    whole = sum(each.n * (each.metrics["agreement"] or 0.0) for each in (films, others)) / 999
    assert whole == pytest.approx(found.metrics["agreement"])
    assert "agreement by group" in (out / "report.html").read_text()
    code, told = failed(capsys, *given, "--groups", tmp_path / "none.yaml")
    assert code == 2 and "none.yaml" in told


def test_several_benchmarks_name_their_files_and_paths_may_hold_equal_signs(reference, capsys):
    folder, bench = reference / "pandalm", reference / "judgebench"
    judge = f"{GPT},judge_name=arena_hard,judge_model=o1-mini-2024-09-12.jsonl"
    found = ran(
        capsys,
        *("--benchmark", "judgebench,pandalm", "--policy", "judgebench.order=as_given"),
        *("--data", f"judgebench={bench / 'data' / f'{GPT}.jsonl'}"),
        *("--data", f"pandalm={folder / 'testset-v1.json'}"),
        *("--verdicts", f"judgebench={bench / 'outputs' / judge}"),
        *("--verdicts", f"pandalm={folder / 'gpt-3.5-turbo-testset-v1.json'}"),
    )
    assert round(found["judgebench"]["overall"], 2) == 70.86
    assert found["judgebench"]["policy"]["order"] == "as_given"
    assert round(found["pandalm"]["f1"], 2) == 57.55
    single = bench / "data" / f"{GPT}.jsonl", bench / "outputs" / judge
    flags = ("--benchmark", "judgebench", "--data", single[0], "--verdicts", single[1])
    assert round(ran(capsys, *flags)["judgebench"]["overall"], 2) == 65.71


@pytest.mark.slow
def test_two_recorded_judges_are_compared(reference, capsys, tmp_path):
    folder = reference / "pandalm"
    common = ("--benchmark", "pandalm", "--data", folder / "testset-v1.json", "--verdicts")
    ran(capsys, *common, folder / "results_judgelrm3b.json", "--out", tmp_path / "a", "--no-report")
    other = folder / "gpt-3.5-turbo-testset-v1.json"
    found = ran(capsys, *common, other, "--compare", tmp_path / "a")["pandalm"]["comparison"]
    assert found["difference"] == pytest.approx(71.0711 - 77.6777, abs=1e-3)
    assert found["with"] == "results_judgelrm3b" and found["n"] == 999
    assert found["p_value"] < 0.01 and found["interval"][0] < found["difference"]
    evaluate.main([*map(str, (*common, other)), "--compare", str(tmp_path / "a")])
    assert "against results_judgelrm3b: -6.61 points" in capsys.readouterr().out


@pytest.mark.slow
def test_a_comparison_reaches_the_page(reference, capsys, tmp_path):
    folder = reference / "pandalm"
    common = ("--benchmark", "pandalm", "--data", folder / "testset-v1.json", "--limit", 200)
    files = folder / "results_judgelrm3b.json", folder / "gpt-3.5-turbo-testset-v1.json"
    ran(capsys, *common, "--verdicts", files[0], "--out", tmp_path / "a", "--no-report")
    flags = ("--verdicts", files[1], "--out", tmp_path / "b", "--compare", tmp_path / "a")
    compared = ran(capsys, *common, *flags)["pandalm"]["comparison"]
    page = (tmp_path / "b" / "report.html").read_text()
    low, high = compared["interval"]
    cells = f"<td>{compared['difference']:+.2f}<small>{low:.1f} to {high:.1f}</small></td>"
    cells += f"<td>{compared['p_value']:.4f}</td>"
    row = f'<th scope="row">gpt-3.5-turbo-testset-v1 less results_judgelrm3b</th>{cells}'
    assert compared["n"] == 200 and row in page
    assert f"results_judgelrm3b leads by {-compared['difference']:.1f} points" in page


@pytest.mark.slow
def test_a_sample_is_drawn_by_seed_and_grows(reference, capsys, tmp_path):
    folder = reference / "pandalm"
    files = folder / "testset-v1.json", folder / "results_judgelrm3b.json"
    common = ("--benchmark", "pandalm", "--data", files[0], "--verdicts", files[1])
    items = {}
    for limit, seed in ((50, 0), (80, 0), (50, 1)):
        out = tmp_path / f"{limit}-{seed}"
        found = ran(capsys, *common, "--limit", limit, "--seed", seed, "--no-report", "--out", out)
        assert found["pandalm"]["n"] == limit
        lines = (out / "pandalm" / "responses.jsonl").read_text().splitlines()[1:]
        items[limit, seed] = {json.loads(line)["game"] for line in lines}
    assert items[50, 0] < items[80, 0]
    assert items[50, 0] != items[50, 1]


@pytest.mark.slow
def test_missing_verdicts_make_an_evaluation_incomplete(pairs, capsys, tmp_path):
    said = [{"id": f"p{i}", "decision": 1, "swapped": s} for i in range(10) for s in (False, True)]
    file = tmp_path / "said.json"
    file.write_text(json.dumps([*said[:-1], {"id": "other", "decision": 1}]))
    flags = ("--benchmark", "pairs", "--data", pairs, "--verdicts", file, "--out", tmp_path / "o")
    code, text = failed(capsys, *flags)
    assert code == 1 and "Incomplete: 3 of 12 items of pairs" in text
    assert "1 rows name no item of the benchmark; 5 games have no row" in text
    entry = json.loads((tmp_path / "o" / "results.json").read_text())["benchmarks"]["pairs"]
    assert entry["incomplete"] and entry["n"] == 9
    file.write_text(json.dumps([{"id": "other", "decision": 1}]))
    code, text = failed(capsys, *flags[:6])
    assert code == 1 and "No item of pairs was judged" in text


# --------------------------------------------------------------------------------- kept answers


def test_answers_are_kept_and_another_policy_or_parser_asks_for_nothing(
    pairs, capsys, tmp_path, judged_by
):
    judge = judged_by(Judge())
    found = ran(capsys, *model(pairs, tmp_path / "o"))["pairs"]
    assert found["overall"] == found["consistency"] == found["even"] == 100.0
    assert (found["n"], len(judge.asked)) == (12, 24)
    for more in (("--policy", "order=as_given"), ("--parser", "strict"), ()):
        found = ran(capsys, *model(pairs, tmp_path / "o", *more))["pairs"]
        assert found["overall"] == 100.0 and len(judge.asked) == 24
    scores = json.loads((tmp_path / "o" / "results.json").read_text())
    assert scores["benchmarks"]["pairs"]["diagnostics"]["games"] == 24
    assert scores["judge"]["decoding"]["temperature"] == 0.0


def test_a_torn_file_is_mended_and_only_what_it_lacks_is_asked(pairs, capsys, tmp_path, judged_by):
    first = judged_by(Judge())
    whole = ran(capsys, *model(pairs, tmp_path / "o"))
    file = tmp_path / "o" / "pairs" / "responses.jsonl"
    content = file.read_bytes()
    lines = content.splitlines(keepends=True)
    for cut in (len(content) - 5, len(b"".join(lines[:9])), len(lines[0]), len(lines[0]) - 3, 0):
        file.write_bytes(content[:cut])
        again = judged_by(Judge())
        assert ran(capsys, *model(pairs, tmp_path / "o")) == whole
        num_kept = max(0, content[:cut].count(b"\n") - 1)
        assert again.asked == first.asked[num_kept:]
        assert file.read_bytes() == content
    file.write_bytes(lines[0] + b"{broken\n" + lines[2])
    code, text = failed(capsys, *model(pairs, tmp_path / "o"))
    assert code == 2 and "line 2 is no response" in text


def test_a_journal_of_an_older_program_is_read_and_continued(pairs, capsys, tmp_path, judged_by):
    first = judged_by(Judge())
    whole = ran(capsys, *model(pairs, tmp_path / "o"))
    new, old = (tmp_path / "o" / "pairs" / f"{name}.jsonl" for name in ("responses", "answers"))
    lines = new.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines[1:]]
    assert {tuple(row) for row in rows} == {("game", "outputs", "num_tokens")}  # the old keys
    new.unlink()
    old.write_text("".join(lines[:9]))
    again = judged_by(Judge())
    compared = ran(capsys, *model(pairs, tmp_path / "o", "--compare", tmp_path / "o"))["pairs"]
    assert compared.pop("comparison")["n"] == 12 and compared == whole["pairs"]
    assert again.asked == first.asked[8:]
    assert old.read_text() == "".join(lines) and not new.exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--temperature", "0.7"), "temperature 0.0 (now 0.7)"),
        (("--seed", "3"), "seed 0 (now 3)"),
        (("--scale", "1", "5"), "scale [1, 10] (now [1, 5])"),
        (("--prompt", "judgelrm_eval"), "prompt 'jlrm' (now 'judgelrm_eval')"),
        (("--model", "other"), "model 'm' (now 'other')"),
    ],
)
def test_answers_given_under_other_settings_are_refused(
    pairs, capsys, tmp_path, judged_by, change, named
):
    judged_by(Judge())
    ran(capsys, *model(pairs, tmp_path / "o"))
    code, text = failed(capsys, *model(pairs, tmp_path / "o", *change))
    assert code == 2 and f"holds responses given under {named}. Name another --out" in text


def test_other_data_is_refused_but_not_another_label_or_concurrency(
    pairs, capsys, tmp_path, judged_by
):
    judge = judged_by(Judge())
    ran(capsys, *model(pairs, tmp_path / "o"))
    pairs.write_text(pairs.read_text().replace('"preference": 1', '"preference": 2'))
    found = ran(capsys, *model(pairs, tmp_path / "o", "--concurrency", "2"))
    assert found["pairs"]["overall"] == 0.0 and len(judge.asked) == 24
    pairs.write_text(pairs.read_text().replace("?3", "?4"))
    code, text = failed(capsys, *model(pairs, tmp_path / "o"))
    assert code == 2 and "holds responses given under data" in text


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_leaves_what_the_next_run_goes_on_from(
    pairs, capsys, tmp_path, judged_by, signum, code
):
    judge = judged_by(Judge(stop_after=5))
    judge.stop = lambda: os.kill(os.getpid(), signum)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    found, text = failed(capsys, *model(pairs, tmp_path / "o"))
    assert found == code and "Stopped: 5 of 24 games of pairs are judged" in text
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    again = judged_by(Judge())
    assert ran(capsys, *model(pairs, tmp_path / "o"))["pairs"]["overall"] == 100.0
    assert len(again.asked) == 19


def test_a_game_without_an_answer_is_asked_again(pairs, capsys, tmp_path, judged_by):
    judged_by(Judge(lambda game: "" if game.id == "p3:1-0" else GOOD))
    code, text = failed(capsys, *model(pairs, tmp_path / "o"))
    assert code == 1 and "Incomplete: 1 of 12 items of pairs" in text
    again = judged_by(Judge())
    assert ran(capsys, *model(pairs, tmp_path / "o"))["pairs"]["n"] == 12
    assert again.asked == ["p3:1-0"]


def test_what_is_spent_is_shown_beside_the_progress(pairs, capsys, tmp_path, judged_by):
    judge = judged_by(Judge())
    judge.spent = Spending(num_requests=24, usd=0.126)
    evaluate.main(model(pairs, tmp_path / "o"))
    assert "24 requests, 0 cached, 0.13 USD" in capsys.readouterr().err


def test_text_that_no_file_can_hold_is_kept(pairs, capsys, tmp_path, judged_by):
    judged_by(Judge(lambda game: "\ud800\u2028\x85\n" + GOOD))
    whole = ran(capsys, *model(pairs, tmp_path / "o"))
    assert whole["pairs"]["parse_failures"] == 0
    again = judged_by(Judge())
    assert ran(capsys, *model(pairs, tmp_path / "o")) == whole
    assert not again.asked


@pytest.mark.slow
def test_benchmarks_of_one_judge_gather_in_one_result(pairs, capsys, tmp_path, judged_by):
    rows = [
        {"context": "?", "response1": "a", "response2": "b", "overall_preference": -1}
        for _ in range(3)
    ]
    (tmp_path / "h.json").write_text(json.dumps(rows))
    judged_by(Judge())
    ran(capsys, *model(pairs, tmp_path / "o"))
    second = ["--benchmark", "helpsteer3", "--data", tmp_path / "h.json", "--policy", "order=both"]
    flags = [*model(pairs, tmp_path / "o")[:4], *second, "--out", tmp_path / "o"]
    found = ran(capsys, *flags)
    assert list(found) == ["helpsteer3"] and found["helpsteer3"]["overall"] == 100.0
    kept = json.loads((tmp_path / "o" / "results.json").read_text())["benchmarks"]
    assert set(kept) == {"pairs", "helpsteer3"}


def test_votes_cost_and_statuses_are_reported(pairs, capsys, tmp_path, judged_by):
    judged_by(Judge(lambda game: GOOD if game.item.id != "p1" else "none"))
    found = ran(capsys, *model(pairs, tmp_path / "o"))["pairs"]
    assert found["parse_failures"] == 2
    entry = json.loads((tmp_path / "o" / "results.json").read_text())["benchmarks"]["pairs"]
    assert entry["statuses"] == {"ok": 22, "no_answer": 2}
    assert entry["diagnostics"]["cost"]["num_tokens"]["mean"] == 7
    assert entry["worst"][0]["item"] == "p1" and entry["worst"][0]["outputs"] == ["none", "none"]
    assert entry["subsets"]["odd"]["n"] == 6


def test_a_judge_without_any_verdict_has_no_metrics_and_is_told(pairs, capsys, tmp_path, judged_by):
    """By the official rule such games are ties, so `precision` and others would be numbers."""
    judged_by(Judge(lambda game: "no verdict"))
    out = tmp_path / "o"
    flags = [*model(pairs, out, "--policy", "aggregation=first_order", "error_credit=tie")]
    evaluate.main([flag for flag in flags if flag != "--no-report"])
    told = capsys.readouterr()
    assert "pairs: 24 of 24 games have NO VERDICT (100.0 %): no answer 24." in told.err
    assert "Its metrics would describe the policy alone and are left out." in told.err
    result = results_file.read(out).benchmarks["pairs"]
    assert set(result.metrics) >= {"agreement", "f1"} and set(result.metrics.values()) == {None}
    assert result.intervals == {} and result.subsets["odd"] == SubsetResult(6, None)
    card = (out / "model_card.md").read_text()
    assert re.search(r"\| agreement \| – \| – \| 12 \|", card)
    for metric in ("precision", "f1", "consistency"):
        assert re.search(rf"{metric}\s+-", told.out), told.out


@pytest.mark.slow
def test_a_silent_subset_is_told_in_the_terminal_the_card_and_the_page(
    pairs, capsys, caplog, tmp_path, judged_by
):
    judged_by(Judge(lambda game: GOOD if int(game.item.id[1:]) % 2 else "no verdict"))
    out = tmp_path / "o"
    evaluate.main([flag for flag in model(pairs, out) if flag != "--no-report"])
    told = capsys.readouterr().out
    assert "pairs: NO VERDICT for even. These figures are left out." in caplog.text
    assert re.search(r"even\s+-", told)
    assert "intervals: 12 items, none of which share a question" in told
    card = (out / "model_card.md").read_text()
    assert "* **pairs: NO VERDICT for even, whose figures are left out.**" in card
    assert re.search(r"\| even \| – \| – \| 12 \|", card)
    page = (out / "report.html").read_text()
    assert "NO VERDICT." in page and "pairs, none for even" in page


def test_a_judge_without_a_verdict_is_not_compared(pairs, capsys, caplog, tmp_path, judged_by):
    judged_by(Judge(lambda game: "no verdict"))
    evaluate.main(model(pairs, tmp_path / "silent"))
    judged_by(Judge())
    evaluate.main(model(pairs, tmp_path / "mine", "--compare", str(tmp_path / "silent")))
    assert "pairs: NO COMPARISON with m: one of the two judges has no verdict" in caplog.text
    assert "against" not in capsys.readouterr().out
    assert results_file.read(tmp_path / "mine").benchmarks["pairs"].comparison is None


def test_items_of_one_question_are_drawn_together_and_said_to_be(
    pairs, capsys, tmp_path, judged_by
):
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["question"] = f"{'Why?' if number % 2 else 'why -'} {number // 3}"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged_by(Judge(lambda game: GOOD if game.first == 0 and game.item.id < "p3" else BAD))
    out = tmp_path / "o"
    evaluate.main(model(pairs, out))
    evaluate.main([*model(pairs, out), "--compare", str(out)])
    told = capsys.readouterr().out
    assert "intervals: 12 items in 4 clusters of items that share a question, design effect" in told
    found = results_file.read(out).benchmarks["pairs"]
    assert found.comparison and found.comparison.mcnemar_p is None
    assert (found.clusters, found.comparison.clusters) == (4, 4)


def test_a_judge_with_half_of_its_verdicts_is_told_that_the_policy_speaks(
    pairs, capsys, tmp_path, judged_by
):
    for num_failed, is_half in ((0, False), (5, False), (6, True)):
        failing = {f"p{i}" for i in range(num_failed)}
        judged_by(Judge(lambda game, failing=failing: "?" if game.item.id in failing else GOOD))
        evaluate.main(model(pairs, tmp_path / str(num_failed)))
        told = capsys.readouterr().err
        assert ("NO VERDICT" in told) == (num_failed > 0)
        assert ("describe the policy more than the judge" in told) == is_half


def test_games_without_a_verdict_are_shown_with_their_texts(pairs, caplog, tmp_path, judged_by):
    said = {"p1": "[[A]]", "p3": "why</think>7 to 8 and 9", "p5": "x" * 500 + " [[B]]"}
    judged_by(Judge(lambda game: said.get(game.item.id, GOOD) if game.first == 0 else GOOD))
    evaluate.main(model(pairs, tmp_path / "o"))
    told = caplog.text
    assert "pairs: 3 of 24 games have NO VERDICT (12.5 %): no answer 3." in told
    for game in ("p1:0-1, no answer: '[[A]]'", "p3:0-1, no answer: 'why</think>7 to 8 and 9'"):
        assert f"  {game}\n" in told
    assert "p5:0-1, no answer: '… xxx" in told and "x" * 200 not in told
    assert "What may help: --parser letters" in told
    unread = results_file.read(tmp_path / "o").benchmarks["pairs"].unread
    assert [each.game for each in unread] == ["p1:0-1", "p3:0-1", "p5:0-1"]
    evaluate.main(model(pairs, tmp_path / "o", "--parser", "letters"))
    # Now the scores are what can't be read.
    assert "22 of 24 games have NO VERDICT" in caplog.text


def test_a_text_that_was_cut_off_has_no_verdict(pairs, capsys, tmp_path, monkeypatch):
    """A draft before `</think>` is none, whoever cut it; a finished text without it is read."""
    draft = "Maybe <answer>3</answer><answer>5</answer>"
    endings = {0: "length", 1: "stop"}

    def judge(games, record):
        for game in games:
            record(Response(game.id, texts=(draft,), endings=(endings[game.first],)))

    monkeypatch.setattr(options, "make", lambda *args: judge)
    evaluate.main(model(pairs, tmp_path / "o"))
    told = capsys.readouterr().err
    assert "12 of 24 games have NO VERDICT (50.0 %): cut 12." in told
    assert "What may help: a larger --max-new-tokens." in told
    for parser, num_failed in (("strict", 24), ("lenient", 12), ("judgelrm", 0)):
        found = ran(capsys, *model(pairs, tmp_path / "o", "--parser", parser))
        assert found["pairs"]["parse_failures"] == num_failed, parser


def test_none_of_twelve_right_does_not_mean_never(pairs, capsys, tmp_path, judged_by):
    judged_by(Judge(lambda game: BAD if game.first == 0 else GOOD))
    assert ran(capsys, *model(pairs, tmp_path / "o"))["pairs"]["overall"] == 0.0
    result = results_file.read(tmp_path / "o").benchmarks["pairs"]
    assert result.intervals["overall"] == (0.0, pytest.approx(26.46, abs=0.01))
    assert result.intervals["odd"] == (0.0, pytest.approx(45.93, abs=0.01))
    assert result.subsets["odd"].interval == result.intervals["odd"]
    assert result.diagnostics.consistency.interval == (pytest.approx(73.54, abs=0.01), 100.0)


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--benchmark", "padalm", "--model", "m"), "Did you mean 'pandalm'"),
        (("--benchmark", " ,", "--model", "m"), "--benchmark is empty. Known: helpsteer3"),
        (("--benchmark", "pandalm"), "--backend jlrm needs --model"),
        (
            ("--benchmark", "pandalm", "--verdicts", "x", "--single"),
            "--single has no effect with --backend verdicts",
        ),
        (("--benchmark", "pandalm", "--backend", "verdicts"), "needs --verdicts FILE"),
        (
            ("--benchmark", "pandalm", "--backend", "openai", "--model", "m", "--verdicts", "x"),
            "--backend openai has no use for --verdicts",
        ),
        (
            ("--benchmark", "pandalm", "--verdicts", "x", "--votes", "3"),
            "--votes has no effect with --backend verdicts",
        ),
        (
            ("--benchmark", "pandalm", "--backend", "openai", "--model", "m", "--num-beams", "4"),
            "--num-beams has no effect with --backend openai",
        ),
        (
            ("--benchmark", "pandalm", "--backend", "openai", "--model", "m", "--votes", "0"),
            "--votes=0 is too small",
        ),
        (
            ("--benchmark", "pandalm", "--backend", "openai", "--model", "m", "--scale", "5", "1"),
            "the first must be below the second",
        ),
        (
            ("--benchmark", "pandalm", "--verdicts", "x"),
            "There is no data to read. Download data/testset-v1.json",
        ),
        (
            ("--benchmark", "pandalm", "--verdicts", "x", "--data", "absent.json"),
            "Cannot read the data file absent.json",
        ),
        (
            ("--benchmark", "pandalm,llmbar", "--verdicts", "x", "--data", "y"),
            "say for which benchmark, e.g. --data pandalm=PATH",
        ),
        (
            ("--benchmark", "pandalm", "--verdicts", "x", "--data", "y", "--data", "z"),
            "--data names two values for pandalm: y, z",
        ),
        (("--benchmark", "pandalm", "--verdicts", "x", "--limit", "-1"), "--limit=-1 is negative"),
        (("--benchmark", "pandalm", "--verdicts", "x", "--parser", "strct"), "'strict'"),
        (
            ("--benchmark", "pandalm", "--verdicts", "x", "--policy", "oder=both"),
            "Did you mean 'order'",
        ),
    ],
)
def test_mistakes_end_in_one_sentence(capsys, flags, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, text = failed(capsys, *flags)
    assert code == 2 and message in text
    assert text.count("error: ") == 1 and "Traceback" not in text
    assert not list(tmp_path.iterdir())


def test_a_missing_file_of_verdicts_is_named(pairs, capsys, tmp_path):
    flags = ("--benchmark", "pairs", "--data", pairs, "--verdicts", tmp_path / "absent.json")
    code, text = failed(capsys, *flags)
    assert code == 2 and "absent.json" in text and "Name a JSON or JSONL file" in text


def test_comparisons_that_can_not_be_made_are_refused(pairs, capsys, tmp_path, judged_by):
    judged_by(Judge())
    ran(capsys, *model(pairs, tmp_path / "a"))
    with pytest.raises(UsageError, match="There are no responses at"):
        evaluate.main(model(pairs, tmp_path / "b", "--compare", str(tmp_path / "none")))
    found = ran(capsys, *model(pairs, tmp_path / "b", "--compare", tmp_path / "a"))
    assert found["pairs"]["comparison"]["difference"] == 0.0
    pairs.write_text(pairs.read_text().replace("?3", "?4"))
    with pytest.raises(UsageError, match="it was evaluated on other data of pairs"):
        evaluate.main(model(pairs, tmp_path / "c", "--compare", str(tmp_path / "a")))


def test_nothing_that_is_judged_is_an_error(pairs, tmp_path, judged_by):
    judged_by(Judge(lambda game: ""))
    with pytest.raises(RunError, match="No item of pairs was judged"):
        evaluate.main(model(pairs, tmp_path / "o"))


def test_the_model_of_a_backend_is_known_by_its_files(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"0" * 3_000_000)
    chosen = {name: option.default for name, option in options.OPTIONS.items()}

    def known():
        return options.identity("jlrm", str(folder), {"votes": chosen["votes"]}, 0)["model"]

    before = known()
    assert known() == before
    (folder / "README.md").write_text("no weight")
    assert known() == before
    (folder / "model.safetensors").write_bytes(b"0" * 2_999_999 + b"1")
    assert known() != before


def test_options_reach_the_backends_under_the_names_they_have():
    """What `options.make` passes on is what the backends take."""
    import inspect

    from jlrm.judges import local, openai
    from jlrm.sampling import writer

    passed = {"api_key_env": "api_key", "stop": "stop_strings"}
    decoding = {field.name for field in dataclasses.fields(writer.DecodingSettings)}
    for taken, name in ((local.make, "jlrm"), (openai.EndpointSettings, "openai")):
        ours = {
            passed.get(k, k) for k, option in options.OPTIONS.items() if name in option.backends
        }
        wanted = set(inspect.signature(taken).parameters)
        wanted |= decoding if "decoding" in wanted else set()
        # What ends the reasoning follows from the prompt.
        assert ours == wanted - {"model", "seed", "decoding", "stop_after"}


@pytest.mark.slow
def test_help_tells_all_benchmarks_and_policies():
    done = subprocess.run(
        [sys.executable, "-m", "jlrm.evaluate", "--help"],
        **{"capture_output": True, "text": True, "cwd": ROOT, "check": True},
    )
    text = " ".join(done.stdout.split())
    for name, known in BENCHMARKS.items():
        assert f"{name} {' | '.join(policy.aggregation for policy in known.policies)}" in text
    for option in options.OPTIONS:
        assert f"--{option.replace('_', '-')}" in text


def test_rows_in_columns_of_their_own_are_evaluated_as_they_are_prepared(
    tmp_path, capsys, judged_by
):
    rows = [{"prompt": f"?{i}", "left": "a", "right": "b", "label": int(i > 5)} for i in range(8)]
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged_by(Judge(lambda game: GOOD if game.first == 0 else BAD))
    columns = ["--columns", "answer_1=left", "answer_2=right", "preference=label"]
    flags = [*model(file, tmp_path / "o"), *columns]
    assert ran(capsys, *flags)["pairs"]["overall"] == 25.0  # 0 was taken for a tie
    assert "data.values={0: 1, 1: 2}" in failed(capsys, *flags)[1]
    for values in (["0=1", "1=2"], ["{0: 1, 1: 2}"], ["0=1,1=2"]):
        assert ran(capsys, *flags, "--values", *values)["pairs"]["overall"] == 75.0
    all_first = ran(capsys, *flags, "--values", "0=1", "1=1")
    assert all_first["pairs"]["overall"] == 100.0
    code, text = failed(capsys, *flags, "--values", "0=1")
    assert code == 2 and "line 7: the label 1 is not among those of --values={0: 1}" in text
    code, text = failed(capsys, *model(file, tmp_path / "o"))
    assert code == 2 and "has no field 'question'" in text and "--columns=question=NAME" in text


def test_columns_are_for_rows_of_ones_own(capsys, tmp_path):
    flags = ["--model", "m", "--backend", "openai", "--benchmark", "pandalm", "--data", "x.json"]
    for flag in (["--columns", "question=q"], ["--values", "0=1"], ["--scores", "score"]):
        code, text = failed(capsys, *flags, *flag)
        assert code == 2 and f"{flag[0]} is for rows of your own: --benchmark pairs, or" in text


@pytest.mark.slow
def test_a_model_of_ours_judges_from_end_to_end(tmp_path, capsys):
    """Random weights: they write no verdict, and the same command does not load them again."""
    write_model(tmp_path / "model")
    write_comparisons(toy.comparisons(1, 3), tmp_path / "toy.jsonl")
    flags = ["--model", tmp_path / "model", "--benchmark", "pairs", "--prompt", "toy"]
    flags += ["--data", tmp_path / "toy.jsonl", "--max-prompt-tokens", 256, "--max-new-tokens", 4]
    flags += ["--compute-dtype", "float32", "--batch-size", 8, "--mesh", "data=8", "fsdp=1"]
    flags += ["--out", tmp_path / "o", "--no-report"]
    found = ran(capsys, *flags)["pairs"]
    assert (found["n"], found["parse_failures"], found["overall"]) == (3, 6, None)
    lines = (tmp_path / "o" / "pairs" / "responses.jsonl").read_text().splitlines()
    header, answer = (json.loads(line) for line in lines[:2])
    assert header["header"]["prompt"] == "toy" and header["header"]["max_new_tokens"] == 4
    assert answer["num_tokens"] == 4 and answer["prompt_tokens"] > 10
    (tmp_path / "model" / "tokenizer.json").rename(tmp_path / "model" / "moved")
    code, text = failed(capsys, *flags)
    assert code == 2 and "holds responses given under model" in text
    (tmp_path / "model" / "moved").rename(tmp_path / "model" / "tokenizer.json")
    assert ran(capsys, *flags)["pairs"] == found


def test_a_journal_without_a_response_binds_nobody(pairs, tmp_path, judged_by, capsys):
    """A judge that never answered: the flag that helps is no other judge's."""
    out = tmp_path / "o"
    judged_by(Judge(say=lambda game: None))
    code, text = failed(capsys, *model(pairs, out))
    assert code == 1 and "No item of pairs was judged. The first game: timeout." in text
    judged_by(Judge())
    found = ran(capsys, *model(pairs, out, "--temperature", "0.5"))["pairs"]
    assert found["parse_failures"] == 0
    lines = (out / "pairs" / "responses.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["header"]["temperature"] == 0.5
    assert not any("error" in json.loads(line) for line in lines[1:])
    code, text = failed(capsys, *model(pairs, out))
    assert code == 2 and "holds responses given under temperature 0.5" in text


def test_refused_games_are_asked_again_until_a_policy_counts_them(
    pairs, tmp_path, judged_by, capsys
):
    class Wary(Judge):
        def __call__(self, games, record):
            self.asked += [game.id for game in games]
            for game in games:
                refused = "content_filter" if game.item.id == "p0" else None
                record(Response(game.id, texts=None if refused else (GOOD,), refused=refused))

    out, flags = tmp_path / "o", ("--policy", "order=as_given", "error_credit=0.25")
    judge = judged_by(Wary())
    code, text = failed(capsys, *model(pairs, out, *flags))
    assert code == 1 and "Incomplete: 1 of" in text
    num_asked = len(judge.asked)
    failed(capsys, *model(pairs, out, *flags))
    assert len(judge.asked) == num_asked + 1
    found = ran(capsys, *model(pairs, out, *flags, "refused=error_credit"))["pairs"]
    assert len(judge.asked) == num_asked + 1
    assert found["n"] == num_asked and found["parse_failures"] == 1
    assert found["policy"]["refused"] == "error_credit"
    kept = json.loads((out / "results.json").read_text())["benchmarks"]["pairs"]
    assert kept["statuses"]["refused"] == 1
    worst = [row for row in kept["worst"] if row["item"] == "p0"]
    assert worst and worst[0]["credit"] == 0.25


def test_a_flag_for_a_benchmark_that_is_not_asked_is_refused(capsys):
    for flag in ("--data", "--subset"):
        code, said = failed(
            capsys, *("--model", "x", "--benchmark", "judgebench", flag, "llmbar=X", "--out", "y")
        )
        assert code == 2 and f"{flag} llmbar=X: --benchmark does not name llmbar." in said


def test_a_judge_of_recorded_verdicts_is_called_as_its_file(tmp_path, capsys, pairs):
    said = tmp_path / "said.jsonl"
    rows = [{"id": f"p{i}", "decision": 1} for i in range(12)]
    said.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--benchmark", "pairs", "--data", f"pairs={pairs}", "--policy", "order=as_given"]
    ran(capsys, *flags, "--verdicts", f"pairs={said}", "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["judge"]["name"] == "said"


def test_recorded_verdicts_and_heuristics_bring_no_jax():
    code = "import sys; import jlrm.evaluate; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
