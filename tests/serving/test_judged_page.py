"""The page of judged pairs: what was judged, as text; and it can be drawn again."""

from __future__ import annotations

import json
import re

import pytest
from test_evaluate import Judge
from test_judge import ENDPOINT, run

from jlrm import report
from jlrm.evaluation.games import Response
from jlrm.judges import options
from jlrm.runtime import commands
from jlrm.serving import judged_page

EVIL = "<script>alert('x')</script> & <img src=x onerror=alert(1)>"
WORDS = f"I weigh both. {EVIL}</think><answer>{{}}</answer><answer>{{}}</answer>"


class Leans:
    """Names the answer shown first in rows 0 and 1, is fair in 2 and 3, and fails in 4."""

    def __call__(self, games, record):
        for game in games:
            number, scores = int(game.item.id), (8, 3)
            if number in (2, 3) and game.first == 1:
                scores = (3, 8)
            if number == 4:
                record(Response(game.id, error="timeout"))
                continue
            record(Response(game.id, texts=(WORDS.format(*scores),), endings=("stop",)))


@pytest.fixture
def out(tmp_path, monkeypatch, capsys):
    rows = [
        {
            "id": f"row {i}",
            "question": f"Why {i}? {EVIL}",
            "answer_1": "long answer",
            "answer_2": "b",
        }
        | ({"preference": 2} if i == 3 else {})
        for i in range(5)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"question": "q"}]))
    monkeypatch.setattr(options, "make", lambda *_: Leans())
    code, _, err = run(capsys, path, *ENDPOINT, "--out", tmp_path / "o")
    assert code == 1 and "2 of 6 rows" in err
    return tmp_path / "o"


def test_the_page_says_what_was_judged(out):
    text = (out / "report.html").read_text()
    found = json.loads((out / "summary.json").read_text())
    assert found["judge"] == "m" and found["pairs"] == "pairs.jsonl"
    assert "<h1>pairs.jsonl</h1>" in text and "Judge: m" in text
    tiles = re.findall(r'<div class="tile"><h3>(.*?)</h3><p>([\d.]+)', text)
    assert tiles == [
        ("Answer 1 wins", "75.0"),  # two wins, and two ties by mean scores
        ("Both orders agree", "50.0"),
        ("Names the first shown", "75.0"),
        ("Names the longer", "75.0"),
        ("Agrees with the label", "0.0"),
    ]
    assert text.count("no interval") == 0
    assert re.findall(r'<th scope="row">(\w+)<small>.*?</small></th><td>(\d+)</td>', text) == [
        ("ok", "8"),
        ("unjudged", "2"),
    ]
    assert "The orders disagree: 2" in text and "Against the label: 1" in text
    assert "2 rows with an error" in text and "row 4: timeout" in text


def test_disagreements_stand_there_in_full_and_as_text(out):
    text = (out / "report.html").read_text()
    section = text.split("The orders disagree: 2")[1].split("Against the label")[0]
    assert section.count("<article>") == 2 and section.count("I weigh both.") == 4
    assert section.count("Shown 1, 2: <b>answer 1</b>") == 2
    assert section.count("Shown 2, 1: <b>answer 2</b>") == 2
    assert "&lt;/think&gt;&lt;answer&gt;8" in section and "Why 0? &lt;script&gt;" in section
    assert "<script" not in text and "<img src=x" not in text
    assert not re.search(r'(?:src|href)="(?!data:|#)', text) and not re.search("https?://", text)


def test_a_page_shows_so_many_and_counts_the_rest(out, monkeypatch):
    monkeypatch.setattr(judged_page, "MOST_SHOWN", 1)
    judged_page.write(out)
    text = (out / "report.html").read_text()
    assert text.count("<article>") == 2 and text.count("1 further ones stand in") == 1


def test_it_is_drawn_again_and_other_files_are_named(out, capsys):
    before = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    report.main([str(out)])
    assert (out / "report.html").read_bytes() == before
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    lines = (out / "verdicts.jsonl").read_text()
    for broken, said in (
        ("{", "line 6 is no JSON"),
        ('{"score": 1}', "line 6 is no verdict on a pair"),
    ):
        (out / "verdicts.jsonl").write_text("".join(lines.splitlines(True)[:5]) + broken + "\n")
        assert commands.run(lambda: report.main([str(out)])) == 2
        assert said in capsys.readouterr().err


def test_without_a_page(tmp_path, monkeypatch, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"question": "q", "answer_1": "a", "answer_2": "b"}) + "\n")
    monkeypatch.setattr(options, "make", lambda *_: Judge())
    assert run(capsys, path, *ENDPOINT, "--out", tmp_path / "o", "--no-report")[0] == 0
    assert not (tmp_path / "o" / "report.html").exists()
