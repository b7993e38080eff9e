"""What a scorecard promises: the numbers of `results.json`, hostile text kept text, no network."""

from __future__ import annotations

import base64
import copy
import io
import json
import pathlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from jlrm import scorecard
from jlrm.config import UsageError
from jlrm.evaluation import diagnostics, intervals
from jlrm.evaluation.games import Game, GameVerdict, Item, ItemVerdicts, Response, outcome
from jlrm.reports import contracts, evaluated, results_file, scorecard_page
from jlrm.reports.results_file import (
    BenchmarkResult,
    Diagnostics,
    JudgeRecord,
    PairedComparison,
    Published,
    Results,
    SubsetResult,
    WorstItem,
)

EVIL = "</pre></details><script>alert('x')</script><img src=http://evil.example/x onerror=y> | $x_"
POLICY = {"order": "both", "tie": "half credit", "error": "wrong"}


def random_diagnostics(seed: int, num_items: int = 60) -> Diagnostics:
    rng = np.random.default_rng(seed)
    judged, responses = [], {}
    for number in range(num_items):
        texts = ("a" * int(rng.integers(9, 99)), "b" * int(rng.integers(9, 99)))
        item = Item(str(number), "?", texts, label=int(rng.integers(3)))
        outcomes = []
        for order in ((0, 1), (1, 0)):
            game = Game(item, *order)
            scores = (float(rng.integers(1, 11)), float(rng.integers(1, 11)))
            is_cut = rng.random() < 0.1
            cut = GameVerdict(*order, None, None, "no_think_end")
            outcomes.append(cut if is_cut else outcome(game, scores))
            responses[game.id] = Response(
                game.id,
                outputs=("",),
                prompt_tokens=70,
                num_tokens=int(rng.integers(99)),
                seconds=0.5,
            )
        judged.append(ItemVerdicts(item, tuple(outcomes)))
    return diagnostics.summary(judged, responses)


def benchmark(seed: int, metrics: dict[str, float | None], **fields: Any) -> BenchmarkResult:
    made = random_diagnostics(seed)
    values: dict[str, Any] = {
        "metrics": metrics,
        "intervals": {n: (v - 3.25, v + 2.75) for n, v in metrics.items() if v is not None},
        "n": 1234,
        "parse_failures": 7,
        "ties": 9,
        "statuses": made.statuses,
        "policy": POLICY,
        "subsets": {
            "easy": SubsetResult(40, 71.5, (60.0, 80.0)),
            f"hard {EVIL}": SubsetResult(20, 31.5, (20.0, 45.0)),
        },
        "diagnostics": made,
        "published": (
            Published(
                "JudgeLRM-7B",
                next(iter(metrics)),
                78.28,
                "arXiv 2504.00050, Table 1; https://example.org/paper",
                "python -m jlrm.evaluate --benchmark pandalm",
            ),
        ),
        "worst": tuple(
            WorstItem(
                item=f"item-{number}",
                subset="easy",
                question=f"Why? {EVIL}",
                answers=(f"One {EVIL}", f"Two {EVIL}"),
                label=number,
                responses=(f"first vote {EVIL}", "second vote \ud800"),
                scores=((9.0, 2.5), None),
                credit=0.0,
            )
            for number in range(3)
        ),
    }
    return BenchmarkResult(**values | fields)


def judge(name: str, **benchmarks: BenchmarkResult) -> Results:
    about = JudgeRecord(
        name=name,
        model="Qwen/Qwen2.5-3B",
        backend="jlrm",
        prompt="judgelrm",
        parser="strict",
        decoding={"temperature": 0.0, "max_new_tokens": 2048},
    )
    return Results(about, benchmarks)


PAIRED = intervals.Paired(-4.5, (-8.125, -0.875), 0.0123, 0.0456)
RESULTS = [
    judge(
        "ours",
        pandalm=benchmark(0, {"agreement": 77.68, "precision": 74.26, "f1": 72.12}),
        rewardbench=benchmark(1, {"Chat": 92.9, "overall": 75.2}, incomplete=True),
    ),
    judge(
        f"base {EVIL}",
        pandalm=benchmark(
            2,
            {"agreement": 71.07, "f1": 57.36},
            comparison=PairedComparison("ours", 1000, *PAIRED),
        ),
        judgebench=benchmark(
            3,
            {"overall": 65.71, "Coding": None},
            comparison=PairedComparison("ours", 1000, *PAIRED._replace(mcnemar_p=None)),
        ),
    ),
]


class Page(HTMLParser):
    """Collect what a test asks about; refuses tags that are closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")
        if tag == "br":
            self.handle_data("\n")
        if tag not in ("meta", "source", "img", "tr", "th", "td", "br", "li"):  # need no end tag
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "table" in self.open:
            self.tables[-1][-1][-1] += data

    def table(self, corner: str) -> list[dict[str, list[str]]]:
        """Return all tables with a first header cell: row -> cells, "" -> the header."""
        return [
            {row[0].split("\n")[0]: row[1:] for row in table[1:]} | {"": table[0][1:]}
            for table in self.tables
            if table[0][0] == corner
        ]


def render(out: pathlib.Path, results: list[Results]) -> Page:
    scorecard_page.write(out, results)
    return Page((out / "report.html").read_text())


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("full")
    before = copy.deepcopy(RESULTS)
    scorecard_page.write(out, RESULTS)
    assert repr(RESULTS) == repr(before)
    return out


@pytest.fixture(scope="module")
def page(full) -> Page:
    return Page((full / "report.html").read_text())


def test_the_page_stands_alone(full, page):
    text = (full / "report.html").read_text()
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "srcset", "href", "action", "poster", "data", "xlink:href"):
            assert value.startswith(("data:image/png;base64,", "#")), value[:50]
    targets = {value for name, value in page.attributes if name == "id"}
    links = {value[1:] for name, value in page.attributes if name == "href"}
    assert links and links <= targets
    styles = text[: text.index("</style>")] + "".join(v for n, v in page.attributes if n == "style")
    assert "url(" not in styles and "@import" not in styles


def test_what_a_judge_wrote_stays_text(full, page):
    text = (full / "report.html").read_text()
    assert EVIL not in text and "<script" not in text and "evil.example/x onerror" in text
    for written in ("Why? ", "One ", "Two ", "first vote ", "hard ", "base "):
        assert written + EVIL in page.text or written == "hard "  # a subset is in a picture
    assert page.text.count("first vote") == 3 * 4 and "second vote ?" in page.text
    assert page.tags.count("script") == 0 and page.text.count("scores 9 : 2.5, none") == 12
    assert "label: a tie" in page.text and "Answer 2 (label)" in page.text


def test_every_metric_of_every_judge_is_in_the_tables(page):
    tables = page.table("Metric (%)")
    assert len(tables) == 3
    for name, table in zip(("pandalm", "rewardbench", "judgebench"), tables, strict=True):
        assert table[""] == ["ours", f"base {EVIL}", "Published"]
        for column, result in enumerate(RESULTS):
            entry = result.benchmarks.get(name, BenchmarkResult())
            for metric, cells in table.items():
                value = entry.metrics.get(metric)
                if metric == "" or value is None:
                    assert not metric or cells[column] == "–"
                    continue
                low, high = entry.intervals[metric]
                expected = f"{value:.2f}\n{low:.1f} to {high:.1f}"
                assert cells[column] == expected + "\n⚠ INCOMPLETE" * entry.incomplete
        metrics = {m for r in RESULTS for m in r.benchmarks.get(name, BenchmarkResult()).metrics}
        assert set(table) == {*metrics, ""} - {"Coding"}  # which has no value
    assert tables[0]["agreement"][2] == "78.28\nJudgeLRM-7B" and tables[0]["f1"][2] == "–"


def test_the_headline_table_compares_benchmarks_and_judges(page):
    table = page.tables[0]
    assert table[0] == ["", "ours", f"base {EVIL}", "Published"]
    policy = ["order: both · tie: half credit · error: wrong"]
    assert table[1][0] == "pandalm\nagreement, n = 1,234" and table[2] == policy
    assert table[1][1:] == ["77.68\n74.4 to 80.4", "71.07\n67.8 to 73.8", "78.28\nJudgeLRM-7B"]
    assert table[3][0] == "rewardbench\noverall, n = 1,234" and table[4] == policy
    assert table[3][1] == "75.20\n72.0 to 78.0\n⚠ INCOMPLETE" and table[3][2:] == ["–", "–"]
    assert table[5][:2] == ["judgebench\noverall, n = 1,234", "–"] and len(table) == 7


def test_diagnostics_are_those_of_the_results(page):
    tables = [table for table in page.table("") if "Games" in table]
    assert len(tables) == 3
    for name, table in zip(("pandalm", "rewardbench", "judgebench"), tables, strict=True):
        for column, result in enumerate(RESULTS):
            if name not in result.benchmarks:
                assert {cells[column] for cells in table.values() if cells} <= {
                    "–",
                    "0",
                    table[""][column],
                }
                continue
            made = result.benchmarks[name].diagnostics
            rate, lean, failures = made.first, made.lean_to_first, made.parse_failures
            low, high = rate.interval
            assert table["Names the answer shown first"][column] == (
                f"{rate.percent:.1f} %\n{low:.1f} to {high:.1f}\nn = {rate.n}"
            )
            assert table["Lean to the first, of the other pairs"][column] == (
                f"{lean.points:+.1f} points\nn = {lean.n}"
            )
            assert table["No verdict"][column].startswith(f"{failures.percent:.1f} %")
            assert table["… no think end"][column] == str(made.statuses["no_think_end"])
            assert table["Verdicts for the longer answer"][column].startswith(
                f"{made.length.verdicts.percent:.1f} %"
            )
            calibration, cost = made.calibration, made.cost
            assert table["Expected calibration error (points)"][column] == f"{calibration.ece:.1f}"
            assert table["Brier score (0 to 1)"][column] == f"{calibration.brier:.3f}"
            assert table["Prompt tokens a game"][column] == "70\nn = 120"
            assert table["Generated tokens a second"][column] == f"{cost.tokens_per_second:.0f}"


def test_confusion_matrices_and_reliability_in_numbers(page):
    matrices = [table for table in page.tables if table[0] == ["", "tie", "1", "2", "none"]]
    expected = [
        result.benchmarks[name].diagnostics
        for name in ("pandalm", "rewardbench", "judgebench")
        for result in RESULTS
        if name in result.benchmarks
    ]
    assert len(matrices) == len(expected) == 4
    for matrix, made in zip(matrices, expected, strict=True):
        assert [row[0] for row in matrix[1:]] == ["tie", "1", "2"]
        counts = [[int(cell) for cell in row[1:]] for row in matrix[1:]]
        assert counts == [list(row) for row in made.confusion.counts]
    reliability = [table for table in page.tables if table[0][0] == "Confidence (%)"]
    for table, made in zip(reliability, expected, strict=True):
        assert table[1:] == [
            [f"{b.low:g} to {b.high:g}", f"{b.confidence:.1f}", f"{b.accuracy:.1f}", f"{b.n}"]
            for b in made.calibration.bins
            if b.n
        ]


def test_comparisons_and_sources_are_told(page):
    header = ["Points", "Bootstrap p", "McNemar p", "Items"]
    pandalm, judgebench = [table for table in page.table("") if table[""] == header]
    assert pandalm["Mean credit"] == ["-4.50\n-8.1 to -0.9", "0.0123", "0.0456", "1,000"]
    assert judgebench["Mean credit"] == ["-4.50\n-8.1 to -0.9", "0.0123", "–", "1,000"]
    assert page.text.count(f"base {EVIL} less ours, on the same items") == 2
    assert "https://example.org/paper" in page.text and "jlrm.evaluate --benchmark" in page.text


def test_incomplete_runs_are_marked_in_the_page_and_the_card(full, page):
    assert "INCOMPLETE. These runs have not judged all games" in page.text
    assert page.text.count("ours: rewardbench") == 2  # above all, and in its section
    assert "ours: pandalm" not in page.text
    card = (full / "model_card.md").read_text()
    assert "| rewardbench (INCOMPLETE) |" in card and "pandalm (INCOMPLETE)" not in card
    assert "**ours, rewardbench: INCOMPLETE. Not all games were judged.**" in card
    complete = judge("ours", rewardbench=benchmark(1, {"overall": 75.2}))
    assert scorecard_page._warning(["rewardbench"], evaluated.name_judges([complete])) == ""


def test_pictures_are_pictures_in_two_themes(full, page):
    from PIL import Image

    sources = [v for n, v in page.attributes if n in ("src", "srcset")]
    alts = [value for name, value in page.attributes if name == "alt"]
    kinds = {"Results", "Same verdict", "Verdicts", "Reliability", "Accuracy by subset"}
    assert all(any(alt.startswith(kind) for alt in alts) for kind in kinds)
    assert len(alts) == 3 + 2 * 3 and len(sources) == 2 * len(alts)
    corners = set()
    for source in sources:
        content = base64.b64decode(source.partition(",")[2], validate=True)
        corners.add(Image.open(io.BytesIO(content)).convert("RGB").getpixel((0, 0)))
    assert corners == {(255, 255, 255), (0x1C, 0x1F, 0x24)}
    overview = Image.open(full / "report.png")
    assert overview.width > 2000 and len(set(overview.convert("L").resize((64, 64)).getdata())) > 9


def card_rows(out: pathlib.Path) -> list[list[str]]:
    lines = (out / "model_card.md").read_text().splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows]


def test_the_model_card_holds_every_metric_with_its_rules(full):
    rows = card_rows(full)
    header = ["judge", "benchmark", "metric", "value (%)", "95 % interval", "n", "policy"]
    assert rows[0] == [*header, "prompt", "parser"] and set(rows[1]) == {"---"}
    policy = "order: both · tie: half credit · error: wrong"
    expected = ["ours", "pandalm", "agreement", "77.68", "74.4 to 80.4", "1234", policy]
    assert rows[2] == [*expected, "judgelrm", "strict"]
    metrics = sum(len(b.metrics) for r in RESULTS for b in r.benchmarks.values())
    assert [len(row) for row in rows[: metrics + 2]] == [9] * (metrics + 2)
    assert rows[metrics + 1][2:5] == ["Coding", "–", "–"]
    published = rows[metrics + 2 :]
    assert published[0] == ["benchmark", "judge", "metric", "value (%)", "source"]
    assert (
        published[2][:4] == ["pandalm", "JudgeLRM-7B", "agreement", "78.28"] and len(published) == 5
    )
    text = (full / "model_card.md").read_text()
    assert "<script" not in text and "<img" not in text
    made = RESULTS[0].benchmarks["pandalm"].diagnostics
    failures, swaps = made.parse_failures, made.consistency
    assert f"no verdict in {failures.percent:.1f} % (n = {failures.n})" in text
    assert f"same verdict in both orders {swaps.percent:.1f} % (n = {swaps.n})" in text
    assert "temperature 0.0" in text and "bootstrap over items" in text


def test_one_judge_has_no_judge_column(tmp_path):
    less = {"worst": (), "subsets": {}, "diagnostics": Diagnostics(), "published": ()}
    entry = benchmark(0, {"agreement": 50.0}, **less)
    page = render(tmp_path, [judge("ours", pandalm=entry)])
    assert card_rows(tmp_path)[0][0] == "benchmark" and len(card_rows(tmp_path)) == 3
    assert page.table("Metric (%)")[0][""] == ["ours"]


@pytest.mark.parametrize(
    "result",
    [
        {"judge": {}, "benchmarks": {}},
        {"judge": {"name": "j"}, "benchmarks": {"b": {}}},
        {"judge": {"name": "j"}, "benchmarks": {"b": {"metrics": {"overall": 50.0}}}},
        {"judge": {"name": "j"}, "benchmarks": {"b": {"metrics": {"overall": "nan"}, "n": 0}}},
        {
            "judge": {"name": "j"},
            "benchmarks": {
                "b": {
                    "metrics": {"x": None},
                    "intervals": {"x": [None, None]},
                    "n": 0,
                    "diagnostics": contracts.encode(diagnostics.summary([], {})),
                    "subsets": {"s": {"n": 0, "accuracy": None, "interval": None}},
                    "worst": [{}],
                }
            },
        },
    ],
    ids=["nothing", "no metrics", "one metric", "nan", "nothing judged"],
)
def test_what_is_missing_is_left_out(tmp_path, result):
    (tmp_path / "results.json").write_text(json.dumps(result))
    page = render(tmp_path, [results_file.read(tmp_path)])
    assert "nan" not in page.text and "None" not in page.text
    for absent in ("Labels (rows)", "Reliability", "Calibration", "Cost", "Length", "INCOMPLETE"):
        assert absent not in page.text
    has_value = result["benchmarks"].get("b", {}).get("metrics") == {"overall": 50.0}
    assert page.tags.count("img") == has_value and ("50.00" in page.text) == has_value
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "model_card.md").read_text().startswith("## Evaluation")


def test_judges_of_one_name_are_told_apart(tmp_path):
    three = [judge("same", b=BenchmarkResult(metrics={"x": float(i)})) for i in range(3)]
    page = render(tmp_path, three)
    assert page.table("Metric (%)")[0] == {
        "": ["same", "same (2)", "same (3)"],
        "x": ["0.00", "1.00", "2.00"],
    }


def test_the_command_renders_compares_and_refuses(tmp_path):
    for name, value in {"a": 41.0, "b": 43.0}.items():
        (tmp_path / name).mkdir()
        entry = BenchmarkResult(metrics={"agreement": value})
        results_file.write(tmp_path / name, judge(name, pandalm=entry))
    command = [sys.executable, "-m", "jlrm.scorecard"]
    places = [str(tmp_path / name) for name in ("a", "b")]
    done = subprocess.run(
        [*command, *places, "--out", str(tmp_path / "new" / "both")], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.strip() == str(tmp_path / "new" / "both" / "report.html")
    page = Page((tmp_path / "new" / "both" / "report.html").read_text())
    assert page.table("Metric (%)")[0] == {"": ["a", "b"], "agreement": ["41.00", "43.00"]}
    wrong = subprocess.run([*command, str(tmp_path), "--out", "x"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert "holds no results.json" in wrong.stderr


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit) as stop:
        scorecard.main(["--help"])
    assert stop.value.code == 0 and "--out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[1]", "holds no JSON object"),
        ("null", "holds no JSON object"),
        ('{"judge": {}}', "no `judge` and `benchmarks`"),
        ('{"judge": 1, "benchmarks": []}', "no `judge` and `benchmarks`"),
        (
            '{"judge": {}, "benchmarks": {"b": {"n": "x"}}}',
            r"benchmarks\.b\.n must be a whole number, got 'x'",
        ),
        (
            '{"judge": {}, "benchmarks": {"b": {"metrics": {"f1": [1]}}}}',
            r"metrics\.f1 must be a number, got \[1\]",
        ),
        (
            '{"judge": {}, "benchmarks": {"b": {"subsets": {"s": {}}}}}',
            r"subsets\.s has no 'n'",
        ),
        (
            '{"version": 2, "judge": {}, "benchmarks": {}}',
            "is of version 2, and this program reads version 1 and older. Update jlrm",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        scorecard.main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("results", RESULTS)
def test_results_are_read_back_as_they_were_written(tmp_path, results):
    results_file.write(tmp_path, results)
    assert results_file.read(tmp_path) == results
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["version"] == 1
    content |= {"later": 1}  # a key of a newer program
    del content["version"]  # as files were written before there was one
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert results_file.read(tmp_path) == results
