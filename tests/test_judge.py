"""`jlrm judge`: a line for a line, in order, after kills too; labels, tables, stdin, mistakes."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys

import pytest
from test_evaluate import Judge

from jlrm import judge
from jlrm.config import RunError
from jlrm.evaluation.games import Response
from jlrm.judges import options
from jlrm.runtime import commands

ROWS = [
    {"id": f"p{i}", "question": f"?{i // 2}", "answer_1": "long answer", "answer_2": f"b{i}"}
    for i in range(6)
]


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def judged_by(monkeypatch):
    def use(teller):
        monkeypatch.setattr(options, "make", lambda *args: teller)
        return teller

    return use


def run(capsys, *flags):
    code = commands.run(lambda: judge.main([*map(str, flags)]))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def lines(out):
    return [json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]


ENDPOINT = ("--model", "m", "--backend", "openai")


def test_one_line_in_one_line_out(pairs, tmp_path, capsys, judged_by):
    teller = judged_by(Judge())
    code, out, err = run(capsys, pairs, *ENDPOINT, "--out", tmp_path / "o")
    assert code == 0, err
    assert [row["id"] for row in lines(tmp_path / "o")] == [row["id"] for row in ROWS]
    assert all(row["winner"] == 1 and row["is_consistent"] for row in lines(tmp_path / "o"))
    assert "6 pairs: answer 1 wins 6, answer 2 wins 0" in out and len(teller.asked) == 12
    assert "both orders agree" in out and "agreement" not in out
    # The same again asks nothing, and gives the same lines.
    before = (tmp_path / "o" / "verdicts.jsonl").read_bytes()
    code, out, err = run(capsys, pairs, *ENDPOINT, "--out", tmp_path / "o", "--json")
    summary = json.loads(out)
    assert code == 0 and len(teller.asked) == 12
    assert (tmp_path / "o" / "verdicts.jsonl").read_bytes() == before
    assert (summary["rows"], summary["games"], summary["wins_1"]) == (6, 12, 6)
    assert summary["share_1"]["n"] == 6 and summary["tokens"] == 84
    assert json.loads((tmp_path / "o" / "summary.json").read_text()) == summary


def test_a_stop_loses_nothing(pairs, tmp_path, capsys, judged_by):
    first = judged_by(Judge(stop_after=5))
    first.stop = lambda: signal.raise_signal(signal.SIGTERM)
    code, _, err = run(capsys, pairs, *ENDPOINT, "--out", tmp_path / "o")
    assert code == 143 and "5 of 12 games" in err and not (tmp_path / "o/verdicts.jsonl").exists()
    second = judged_by(Judge())
    assert run(capsys, pairs, *ENDPOINT, "--out", tmp_path / "o")[0] == 0
    assert len(first.asked) + len(second.asked) == 12
    judged_by(Judge())
    run(capsys, pairs, *ENDPOINT, "--out", tmp_path / "undisturbed")
    assert lines(tmp_path / "o") == lines(tmp_path / "undisturbed")


def test_errors_stand_in_their_place(tmp_path, capsys, judged_by):
    path = tmp_path / "pairs.jsonl"
    bad = [{"question": "q", "answer_1": "a"}, {"question": "q", "answer_1": "a", "answer_2": None}]
    rows = [ROWS[0], *bad, {**ROWS[1], "answer_2": 5}, ROWS[2]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    teller = judged_by(Judge())
    code, _, err = run(capsys, path, *ENDPOINT, "--out", tmp_path / "o")
    assert code == 1 and "3 of 5 rows have no verdict" in err and len(teller.asked) == 4
    found = lines(tmp_path / "o")
    assert [row["winner"] for row in found] == [1, None, None, None, 1]
    assert "no field 'answer_2'" in found[1]["error"] and "--columns" in found[1]["error"]
    assert "missing text" in found[2]["error"] and "must be text, got 5" in found[3]["error"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.jsonl", '{"question": "q", "answer_1"\n{good}\n[1]\n{good}\n', "is not valid JSON"),
        ("x.csv", "question,answer_1,answer_2\na\nq,a,b\na,b,c,d\nq,a,b\n", "has 1 cells"),
    ],
)
def test_a_torn_line_has_its_place(tmp_path, capsys, judged_by, name, content, says):
    (tmp_path / name).write_text(content.replace("{good}", json.dumps(ROWS[0])))
    teller = judged_by(Judge())
    for flags in ((), ("--single", "--columns", "answer=answer_1")):
        out = tmp_path / f"o{len(flags)}"
        code, _, err = run(capsys, tmp_path / name, *ENDPOINT, *flags, "--out", out)
        assert code == 1 and "2 of 4 rows have no verdict" in err
        found = lines(out)
        assert [each["error"] is None for each in found] == [False, True, False, True]
        assert says in found[0]["error"] and f"{tmp_path / name}, " in found[0]["error"]
    assert len(teller.asked) == 6


def test_what_a_server_fails_is_asked_again(pairs, tmp_path, capsys, judged_by):
    judged_by(Judge(lambda game: None))
    code, _, err = run(capsys, pairs, *ENDPOINT, "--out", tmp_path / "o")
    assert code == 1 and "6 of 6 rows" in err
    assert lines(tmp_path / "o")[0]["error"] == "timeout"
    teller = judged_by(Judge())
    assert run(capsys, pairs, *ENDPOINT, "--out", tmp_path / "o")[0] == 0
    assert len(teller.asked) == 12


def test_what_is_refused_is_asked_again(pairs, tmp_path, capsys, judged_by):
    class Refuses(Judge):
        def __call__(self, games, record):
            for game in games:
                self.asked.append(game.id)
                record(Response(game.id, refused="filter"))

    judged_by(Refuses())
    code, _, err = run(capsys, pairs, *ENDPOINT, "--out", tmp_path / "o")
    assert code == 1 and "6 of 6 rows" in err and lines(tmp_path / "o")[0]["status"] == "refused"
    teller = judged_by(Judge())
    assert run(capsys, pairs, *ENDPOINT, "--out", tmp_path / "o")[0] == 0
    assert len(teller.asked) == 12


def test_labels_are_compared_with_where_there_are_some(tmp_path, capsys, judged_by):
    path = tmp_path / "pairs.csv"
    path.write_text(
        "prompt,a,b,winner\n" + "q1,x,y,1\n" + "q2,x,y,2\n" + "q3,x,y,\n" + "q4,x,y,tie\n"
    )
    judged_by(Judge())
    columns = ("--columns", "question=prompt", "answer_1=a", "answer_2=b", "preference=winner")
    code, out, err = run(capsys, path, *columns, *ENDPOINT, "--out", tmp_path / "o", "--json")
    assert code == 0, err
    agreement = json.loads(out)["agreement"]
    assert agreement["n"] == 3 and agreement["percent"] == pytest.approx(100 / 3)


def test_what_was_judged_is_checked_as_it_is(tmp_path, capsys, judged_by):
    path = tmp_path / "pairs.jsonl"
    rows = [{**row, "preference": 1 + number % 2} for number, row in enumerate(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged_by(Judge())
    assert run(capsys, path, *ENDPOINT, "--out", tmp_path / "o")[0] == 0
    code, out, err = run(capsys, "check", tmp_path / "o" / "verdicts.jsonl", "--json")
    found = json.loads(out)
    assert code == 0 and found["agreement"]["percent"] == 50.0, err
    assert found["longer_judge"]["percent"] == 100.0 and found["ece"] is not None


def test_pairs_on_stdin(tmp_path, capsys, judged_by, monkeypatch):
    judged_by(Judge())
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    code, _, err = run(capsys, "-", *ENDPOINT, "--out", tmp_path / "o")
    assert code == 0 and len(lines(tmp_path / "o")) == 6 and "stdin.jsonl" in err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert run(capsys, "-", *ENDPOINT, "--out", tmp_path / "empty")[0] == 2


def test_other_pairs_or_settings_are_refused(pairs, tmp_path, capsys, judged_by):
    judged_by(Judge())
    out = ("--out", tmp_path / "o")
    assert run(capsys, pairs, *ENDPOINT, *out)[0] == 0
    code, _, err = run(capsys, pairs, *ENDPOINT, *out, "--orders", "given")
    assert code == 2 and "orders 'both' (now 'given')" in err
    pairs.write_text(json.dumps(ROWS[0]) + "\n")
    code, _, err = run(capsys, pairs, *ENDPOINT, *out)
    assert code == 2 and "data" in err
    # Another parser reads what was said already.
    other = run(capsys, pairs, *ENDPOINT, "--out", tmp_path / "p", "--parser", "strict")
    assert other[0] == 0


def test_a_model_that_is_no_judge_is_said_so(pairs, tmp_path, capsys, judged_by):
    judged_by(Judge(lambda game: "Both are nice."))
    code, out, err = run(capsys, pairs, *ENDPOINT, "--out", tmp_path / "o")
    assert code == 0 and "m wrote no verdict in 12 of 12 games" in err
    assert "games without a readable verdict      12 of 12" in out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["nowhere.jsonl", "--model", "longer", "--backend", "heuristic"], "No such file"),
        (["PAIRS"], "--model is missing"),
        (["PAIRS", "--model", "longest", "--backend", "heuristic"], "no heuristic"),
        (["PAIRS", "--model", "/nowhere/x", "--out", "OUT"], "/nowhere/x"),
        (["PAIRS", "--model", "longer", "--backend", "heuristic", "--out", "PAIRS"], "is a file"),
        (["PAIRS", *ENDPOINT, "--votes", "0"], "--votes=0 is too small"),
        (["PAIRS", *ENDPOINT, "--columns", "qestion=q"], "Did you mean 'question'?"),
        (["PAIRS", *ENDPOINT, "--columns", "question=q"], "has a column 'q'"),
    ],
)
def test_mistakes_end_with_2(pairs, tmp_path, capsys, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)  # where what has no --out is written
    words = [{"PAIRS": str(pairs), "OUT": str(tmp_path / "o")}.get(flag, flag) for flag in flags]
    code, _, err = run(capsys, *words)
    assert code == 2 and says in err, err


def test_a_heuristic_as_a_command(pairs, tmp_path):
    words = ["--model", "longer", "--backend", "heuristic", "--out", str(tmp_path / "o")]
    done = subprocess.run(
        [sys.executable, "-m", "jlrm.judge", str(pairs), *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # Rows of three questions: intervals draw these.
    assert "verdicts for the longer answer        100.0 % [29.2, 100.0] of 12" in done.stdout


def test_failures_are_errors(pairs, tmp_path, judged_by):
    judged_by(Judge(lambda game: None))
    with pytest.raises(RunError):
        judge.main([str(pairs), *ENDPOINT, "--out", str(tmp_path / "o")])


class Scorer:
    """A backend that scores an answer by its length, and says nothing of those that are empty."""

    asked = 0

    def __call__(self, games, record):
        for game in games:
            self.asked += 1
            (answer,) = game.item.answers
            text = f"t</think><answer>{len(answer)}</answer>" if answer else "no"
            record(Response(game.id, texts=(text,), endings=("stop",), num_tokens=3))


def test_single_answers_are_scored_line_by_line(tmp_path, capsys, judged_by):
    file, out = tmp_path / "answers.jsonl", tmp_path / "o"
    rows = [
        {"id": 7, "question": "q", "answer": "abc"},
        {"prompt": "q", "response": "abcde"},
        {"question": "q"},
        {"question": "q", "answer": [{"role": "assistant", "content": "abcd"}]},
        {"question": "q", "answer": ""},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scorer = judged_by(Scorer())
    code, printed, err = run(capsys, file, "--single", *ENDPOINT, "--out", out)
    found = lines(out)
    assert code == 1 and "1 of 5 rows" in err  # the row without an answer
    assert [row["score"] for row in found] == [3.0, 5.0, None, 4.0, None]
    assert found[0]["id"] == "7" and found[1]["answer"] == "abcde"
    assert "answer must be text" in found[2]["error"] and found[4]["status"] == "no_answer"
    assert "mean score 4.00, without a score 1" in printed
    assert run(capsys, file, "--single", *ENDPOINT, "--out", out)[0] == 1
    assert scorer.asked == 4 and lines(out) == found  # nothing is asked again


def test_single_answers_with_other_columns(tmp_path, capsys, judged_by):
    file, out = tmp_path / "answers.csv", tmp_path / "o"
    file.write_text("ask,said\nq,abc\n")
    judged_by(Scorer())
    names = ("--columns", "question=ask", "answer=said")
    code, _, err = run(capsys, file, "--single", *ENDPOINT, "--out", out, *names)
    assert code == 0, err
    assert lines(out)[0]["score"] == 3.0
    code, _, err = run(capsys, file, "--single", *ENDPOINT, "--columns", "answr=said")
    assert code == 2 and "answer" in err
    code, _, err = run(capsys, file, "--single", *ENDPOINT, "--out", tmp_path / "p")
    assert code == 2 and "no row that can be judged" in err
